# SPDX-License-Identifier: GPL-3.0-or-later
"""When a job is next due, with the vectors of backy 2.x, and when it is late."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone

import pytest

from backy import (
    Interval,
    Past,
    Schedule,
    back_off,
    missed_tags,
    next_run,
    next_time,
    overdue_since,
    spread_of,
)

DAY, HOUR, MINUTE, SECOND = (timedelta(seconds=one) for one in (86400, 3600, 60, 1))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def schedule(**intervals: timedelta) -> Schedule:
    return Schedule("test", tuple(Interval(tag, every, 5) for tag, every in intervals.items()))


def past(*entries: tuple[str, str]) -> list[Past]:
    return [Past(at(moment), tuple(tags.split()), 1.0) for moment, tags in entries]


DAILY = schedule(daily=DAY)
THREE = schedule(daily=DAY, weekly=7 * DAY, monthly=30 * DAY)

# -- the regular times --------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "longest", "spread"),
    [
        ("test01", 86400, 19971),
        ("test02", 86400, 36217),
        ("asdf02", 86400, 14532),
        ("foo00", 86400, 72995),
        ("test01", 604800, 159773),
        ("test03", 604800, 286427),
        ("test01", 2592000, 639092),
        ("test02", 2592000, 1158966),
    ],
)
def test_the_spread_is_that_of_backy_2(job, longest, spread):
    assert spread_of(job, schedule(short=MINUTE, long=timedelta(seconds=longest))) == spread


@pytest.mark.parametrize("job", ["", "ä", "\udcff", "x" * 10000])
def test_any_name_has_a_spread(job):
    assert 0 <= spread_of(job, DAILY) <= 86400


@pytest.mark.parametrize(
    ("now", "spread", "due"),
    [
        ("2015-09-01 07:06:47", 1, "2015-09-02 00:00:01"),
        ("2015-09-01 07:06:47", 5, "2015-09-02 00:00:05"),
        ("2015-09-01 07:06:47", 100, "2015-09-02 00:01:40"),
        ("2015-09-02 00:01:39", 100, "2015-09-02 00:01:40"),
        ("2015-09-02 00:01:39.999999", 100, "2015-09-02 00:01:40"),
        ("2015-09-02 00:01:40", 100, "2015-09-03 00:01:40"),
        ("2015-09-02 00:01:41", 100, "2015-09-03 00:01:40"),
        ("2015-09-01 07:06:47", 0, "2015-09-02 00:00:00"),
        ("2015-09-01 07:06:47", 86400, "2015-09-02 00:00:00"),
    ],
)
def test_the_next_time_is_the_first_slot_after_now(now, spread, due):
    assert next_time(DAILY, spread, at(now)) == (at(due), ("daily",))


def test_a_job_runs_daily_weekly_and_monthly_at_one_phase():
    spread, now, seen = spread_of("test01", THREE), at("2015-09-01 00:00:00"), []
    for _ in range(8):
        now, tags = next_time(THREE, spread, now)
        seen.append((str(now)[:19], tags))
    assert seen[0] == ("2015-09-01 09:31:32", ("daily",))
    assert seen[6] == ("2015-09-07 09:31:32", ("daily", "weekly", "monthly"))
    assert seen[7] == ("2015-09-08 09:31:32", ("daily",))


def test_intervals_that_never_meet_have_times_of_their_own():
    two = schedule(a=7 * MINUTE, b=11 * MINUTE)
    now, seen = at("2015-09-01 00:00:00"), []
    for _ in range(200):
        now, tags = next_time(two, 123, now)
        seen.append((now, tags))
    for tag, every in (("a", 7 * MINUTE), ("b", 11 * MINUTE)):
        moments = [moment for moment, tags in seen if tag in tags]
        assert {later - one for one, later in zip(moments, moments[1:])} == {every}
    assert any(tags == ("a", "b") for _, tags in seen)


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_daylight_saving_moves_nothing(day):
    moment, _ = next_time(DAILY, 7200, at(f"{day} 00:30:00"))
    assert moment == at(f"{day} 02:00:00")
    assert next_time(DAILY, 7200, moment)[0] - moment == DAY


# -- catching up --------------------------------------------------------------

NOW = "2015-09-01 07:06:47"


@pytest.mark.parametrize(
    ("what", "entries", "now", "due", "tags"),
    [
        ("nothing yet", (), NOW, "2015-09-02 00:00:01", "daily weekly monthly"),
        (
            "all recent",
            [("2015-09-01 00:00:01", "daily weekly monthly")],
            NOW,
            "2015-09-02 00:00:01",
            "daily",
        ),
        ("1.6 intervals old", [("2015-08-30 16:42:47", "daily weekly monthly")], NOW, NOW, "daily"),
        (
            "1 interval old to the second",
            [("2015-08-31 07:06:47", "daily weekly monthly")],
            NOW,
            NOW,
            "daily",
        ),
        (
            "a moment younger",
            [("2015-08-31 07:06:47.000001", "daily weekly monthly")],
            NOW,
            "2015-09-02 00:00:01",
            "daily",
        ),
        (
            "several missed",
            [("2015-08-20 00:00:01", "daily weekly monthly")],
            NOW,
            NOW,
            "daily weekly",
        ),
        (
            "one never made",
            [("2015-09-01 00:00:01", "daily monthly")],
            NOW,
            NOW,
            "weekly",
        ),
        (
            "only tags that are unknown",
            [("2015-09-01 07:00:00", "manual:x foreign")],
            NOW,
            NOW,
            "daily weekly monthly",
        ),
        (
            "unknown tags besides",
            [("2015-09-01 00:00:01", "daily weekly monthly"), ("2015-09-01 07:00:00", "manual:x")],
            NOW,
            "2015-09-02 00:00:01",
            "daily",
        ),
        (
            "late, with 5:01 minutes to go",
            [("2015-08-01 00:00:01", "daily weekly")],
            "2015-09-01 23:55:00",
            "2015-09-01 23:55:00",
            "daily weekly monthly",
        ),
        (
            "late, with 5 minutes to go",
            [("2015-08-01 00:00:01", "daily weekly")],
            "2015-09-01 23:55:01",
            "2015-09-02 00:00:01",
            "daily weekly monthly",
        ),
    ],
)
def test_what_was_missed_is_run_now_unless_the_regular_time_is_near(what, entries, now, due, tags):
    moment, run_with, why = next_run(THREE, 1, past(*entries), at(now))
    assert (moment, run_with) == (at(due), tuple(tags.split())), what
    assert why.startswith("catching up") == (due == now)


def test_the_reason_says_what_is_due_and_what_was_missed():
    def why(*entries, now=NOW):
        return next_run(THREE, 1, past(*entries), at(now))[2]

    fresh = ("2015-09-01 00:00:01", "daily weekly monthly")
    assert why(fresh) == "regular time of daily"
    assert why() == "regular time of daily; never backed up before"
    assert why(("2015-08-30 00:00:01", "daily weekly monthly")) == "catching up: daily missed"
    late = ("2015-08-20 00:00:01", "daily weekly monthly")
    assert why(late, now="2015-09-01 23:59:00") == "regular time of daily; weekly missed"


def test_many_jobs_with_old_revisions_are_all_due_and_new_ones_are_spread():
    moments = [
        next_run(DAILY, spread_of(f"vm{number}", DAILY), [], at(NOW))[0] for number in range(500)
    ]
    hours = [int((moment - at(NOW)) / HOUR) for moment in moments]
    assert max(hours.count(hour) for hour in range(24)) < 3 * 500 / 24


# -- clocks -------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [6 * MINUTE, 13 * HOUR, 1000 * DAY])
def test_a_revision_from_the_future_hides_no_missed_run(ahead):
    now = at(NOW)
    history = [Past(now - 2 * DAY, ("daily",), 1.0), Past(now + ahead, ("daily",), 1.0)]
    assert missed_tags(DAILY, history, now) == ("daily",)
    assert next_run(DAILY, 1, history, now)[0] == now
    assert next_run(DAILY, 1, history[1:], now)[0] == now
    assert overdue_since(DAILY, history, now - 9 * DAY, now) == now - DAY / 2
    assert overdue_since(DAILY, history[1:], now - 9 * DAY, now) == now - 7.5 * DAY


def test_clocks_may_differ_by_five_minutes():
    now = at(NOW)
    history = [Past(now + 5 * MINUTE, ("daily",), 1.0)]
    assert missed_tags(DAILY, history, now) == ()
    assert overdue_since(DAILY, history, now - 9 * DAY, now) is None


@pytest.mark.parametrize(
    ("back", "is_skipped"),
    [
        (1 * SECOND, True),
        (2 * MINUTE, True),
        (HOUR, True),
        (12 * HOUR, True),
        (12 * HOUR + 2 * SECOND, False),
        (23 * HOUR, False),
        (3 * DAY + HOUR, False),
    ],
)
def test_a_clock_set_back_a_little_does_not_make_a_run_twice(back, is_skipped):
    """And one that is set back far does not hold up the next run beyond 1.5 intervals."""
    made = [at("2015-09-01 00:00:02") - number * DAY for number in range(5, -1, -1)]
    history = [Past(moment, ("daily",), 1.0) for moment in made]
    now = made[-1] + SECOND - back  # set back a second after the last run
    moment, tags, _ = next_run(DAILY, 1, history, now)
    assert tags == ("daily",)
    assert moment - now + SECOND <= 1.5 * DAY  # in real time, from run to run
    assert (moment == at("2015-09-02 00:00:01")) == is_skipped
    assert overdue_since(DAILY, history, made[0], now) is None


def test_a_slot_after_the_last_run_stays_when_the_clock_was_set_back():
    now = at("2015-09-01 12:00:00")
    history = [Past(now - 11 * HOUR, ("daily",), 1.0), Past(now + HOUR, ("daily",), 1.0)]
    assert next_run(DAILY, 3 * 3600 + 12 * 3600, history, now)[0] == now + 3 * HOUR


def test_any_clock_at_all_leaves_a_next_time():
    random_one = random.Random(7)
    for _ in range(3000):
        now = at("2026-01-01") + random_one.uniform(-9000, 90000) * DAY
        history = [
            Past(
                at("2026-01-01") + random_one.uniform(-9000, 90000) * DAY,
                tuple(random_one.sample(["daily", "weekly", "x"], random_one.randint(0, 3))),
                1.0,
            )
            for _ in range(random_one.randint(0, 6))
        ]
        two = schedule(daily=DAY, weekly=7 * DAY)
        moment, tags, why = next_run(two, random_one.randint(0, 604800), history, now)
        assert now <= moment <= now + 2 * DAY and tags and why
        assert set(tags) <= {"daily", "weekly"}


# -- overdue ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "is_late"),
    [
        (6 * HOUR, False),
        (24 * HOUR, False),
        (32 * HOUR, False),
        (36 * HOUR, False),
        (36 * HOUR + SECOND, True),
        (400 * DAY, True),
    ],
)
def test_a_job_is_late_after_one_and_a_half_of_its_shortest_intervals(age, is_late):
    now = at(NOW)
    late = overdue_since(THREE, [Past(now - age, ("manual:x",), 1.0)], now - 900 * DAY, now)
    assert late == (now - age + 36 * HOUR if is_late else None)
    never = overdue_since(THREE, [], now - age, now)
    assert never == (now - age + 36 * HOUR if is_late else None)


def test_the_newest_moment_counts_whatever_the_order_of_revisions():
    now = at(NOW)
    history = [Past(now - HOUR, ("daily",), 1.0), Past(now - 9 * DAY, ("daily",), 1.0)]
    assert overdue_since(DAILY, history, now - 99 * DAY, now) is None


# -- failures -----------------------------------------------------------------


def test_failures_in_a_row_are_tried_again_ever_later():
    minutes = [back_off(failures) / MINUTE for failures in range(12)]
    assert minutes == [0, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]
    assert back_off(10**9) == 360 * MINUTE
