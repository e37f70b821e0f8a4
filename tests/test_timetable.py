# SPDX-License-Identifier: GPL-3.0-or-later
"""Who runs when, by a clock that the test sets; and a year of a thousand jobs."""

from __future__ import annotations

import heapq
import itertools
import json
import random
import time
from datetime import datetime, timedelta

import pytest

from backy import (
    EPOCH,
    UTC,
    Interval,
    Past,
    Schedule,
    State,
    Timetable,
    back_off,
    next_time,
)

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = (timedelta(seconds=number) for number in (1, 60, 3600, 86400))
DAILY = Schedule("default", (Interval("daily", DAY, 7),))
USUAL = Schedule(
    "usual",
    (Interval("daily", DAY, 7), Interval("weekly", 7 * DAY, 4), Interval("monthly", 30 * DAY, 4)),
)
LIVED = Schedule("lived", USUAL.intervals[:2])
SHORT, LONG = 100.0, 3600.0


def past(moment: datetime, duration: float = SHORT, tags: tuple[str, ...] = ("daily",)) -> Past:
    return Past(moment, tags, duration)


def timetable(limit: int = 1, now: datetime = NOW, **ages: object) -> Timetable:
    """Jobs whose newest revision is so old, or (that old, so many seconds long); None is new."""
    table = Timetable()
    table.configure({name: DAILY for name in ages}, limit, now)
    for name, age in ages.items():
        age, duration = age if isinstance(age, tuple) else (age, SHORT)
        table.learn(name, [past(now - age, duration)] if age is not None else [], now)
    return table


def started(table: Timetable, now: datetime = NOW) -> list[str]:
    return [job.name for job in table.start(now)]


def finish(table: Timetable, name: str, now: datetime, error: str | None = None) -> None:
    """End a run as the scheduler does: a success is a revision on the disk."""
    job = table.jobs.get(name) or table.leaving[name]
    revisions = list(job.past)
    if error is None:
        revisions.append(Past(job.started, job.tags, (now - job.started).total_seconds()))
    table.finish(name, error, revisions, now)


def run_until(table: Timetable, end: datetime, now: datetime = NOW) -> list[tuple[datetime, str]]:
    """Let every run succeed in a second; when which job was started."""
    runs = []
    while True:
        for job in table.start(now):
            runs.append((now, job.name))
            finish(table, job.name, now + SECOND)
        now = max(table.next_moment() or end, now + SECOND)
        if now >= end:
            return runs


# -- what is started ------------------------------------------------------------


def test_a_job_runs_at_its_regular_time_with_the_tags_due_then():
    table = timetable(test01=2 * HOUR)
    regular = next_time(DAILY, table.jobs["test01"].spread, NOW)[0]
    assert table.next_moment() == regular
    assert started(table, regular - SECOND) == []
    assert started(table, regular) == ["test01"]
    assert table.jobs["test01"].tags == ("daily",)


def test_nothing_runs_before_its_revisions_are_known():
    table = Timetable()
    table.configure({"a": DAILY}, 1, NOW)
    assert table.next_moment() is None
    assert started(table, NOW + 3 * DAY) == []
    assert table.run("a", NOW)
    assert started(table) == []
    table.learn("a", [past(NOW - HOUR)], NOW)
    assert started(table) == ["a"], "what was asked for meanwhile is not forgotten"


def test_after_an_outage_all_overdue_jobs_run_oldest_first_within_the_limit():
    table = timetable(2, a=3 * DAY, b=5 * DAY, c=2 * DAY, d=4 * DAY, fresh=HOUR)
    assert started(table) == ["b", "d"]
    assert started(table) == []
    finish(table, "d", NOW + MINUTE)
    assert started(table, NOW + MINUTE) == ["a"]
    finish(table, "b", NOW + 2 * MINUTE)
    finish(table, "a", NOW + 2 * MINUTE)
    assert started(table, NOW + 2 * MINUTE) == ["c"]


def test_a_tag_that_is_missed_while_the_job_waits_is_not_left_for_the_next_day():
    # restarted after the regular time, and a minute before the last revision is a day old
    regular = next_time(DAILY, timetable(test01=HOUR).jobs["test01"].spread, NOW)[0]
    table = timetable(now=regular + 9 * MINUTE, test01=DAY - MINUTE)
    assert table.jobs["test01"].due == regular + DAY
    runs = run_until(table, regular + 12 * HOUR, regular + 9 * MINUTE)
    assert runs == [(regular + 10 * MINUTE + SECOND, "test01")]


def test_a_job_without_revisions_is_caught_up_when_its_first_time_was_missed():
    table = timetable(test01=None)
    regular = next_time(DAILY, table.jobs["test01"].spread, NOW)[0]
    later = Timetable()
    later.recall(json.loads(json.dumps(table.remember())), regular + MINUTE)
    later.configure({"test01": DAILY}, 1, regular + MINUTE)
    later.learn("test01", [], regular + MINUTE)
    assert started(later, regular + MINUTE) == ["test01"]


def test_a_run_that_starts_far_too_late_makes_good_what_was_missed_meanwhile():
    table = Timetable()
    table.configure({"a": USUAL}, 1, NOW)
    revisions = [past(NOW - 6 * DAY, SHORT, USUAL.tags), past(NOW - HOUR)]
    table.learn("a", revisions, NOW)
    assert started(table, NOW + 2 * DAY) == ["a"]
    assert table.jobs["a"].tags == ("daily", "weekly")


# -- slots ----------------------------------------------------------------------


def test_short_jobs_never_wait_behind_long_ones():
    ages = {f"long{number}": (3 * DAY, LONG) for number in range(5)}
    table = timetable(3, **ages, short=HOUR)
    assert started(table) == ["long0", "long1"], "one slot stays free"
    table.run("short", NOW)
    assert started(table) == ["short"]
    finish(table, "long0", NOW + HOUR)
    assert started(table, NOW + HOUR) == ["long2"]


def test_long_jobs_have_all_slots_where_no_job_is_short():
    table = timetable(3, **{f"long{number}": (3 * DAY, LONG) for number in range(5)})
    assert len(started(table)) == 3


def test_a_single_slot_is_for_whoever_has_waited_longest():
    table = timetable(1, long=(4 * DAY, LONG), short=(3 * DAY, SHORT))
    assert started(table) == ["long"]
    finish(table, "long", NOW + HOUR)
    assert started(table, NOW + HOUR) == ["short"]


def test_short_is_under_ten_minutes():
    table = timetable(a=(HOUR, 599.9), b=(HOUR, 600.0), c=None)
    assert [job.is_long for job in table.jobs.values()] == [False, True, True]


def test_a_smaller_limit_lets_nothing_new_start_until_it_is_kept():
    table = timetable(3, **{f"job{number}": 3 * DAY for number in range(5)})
    assert len(started(table)) == 3
    table.configure({name: DAILY for name in table.jobs}, 1, NOW)
    for name in ("job0", "job1"):
        finish(table, name, NOW)
        assert started(table) == []
    finish(table, "job2", NOW)
    assert len(started(table)) == 1


# -- failures -------------------------------------------------------------------


def test_failures_back_off_and_success_resets_them():
    table, now = timetable(a=2 * DAY), NOW
    for minutes in (2, 4, 8, 16, 32, 64, 128, 256, 360, 360):
        assert started(table, now) == ["a"]
        finish(table, "a", now, "no such image")
        assert table.jobs["a"].state is State.FAILED
        assert table.jobs["a"].due == now + minutes * MINUTE
        assert started(table, now + minutes * MINUTE - SECOND) == []
        now += minutes * MINUTE
    started(table, now)
    finish(table, "a", now)
    assert table.jobs["a"].state is State.WAITING
    assert table.jobs["a"].failures == 0
    assert table.jobs["a"].due > now + 5 * MINUTE


def test_a_failed_attempt_is_repeated_with_its_tags_though_its_time_has_passed():
    # yesterday's revision was made late: at the retry the tag is not missed by a day yet
    spread = timetable(test01=HOUR).jobs["test01"].spread
    regular = next_time(DAILY, spread, NOW)[0]
    table = timetable(now=regular - HOUR, test01=22 * HOUR)
    assert started(table, regular) == ["test01"]
    finish(table, "test01", regular + SECOND, "no route to host")
    assert started(table, regular + SECOND + 2 * MINUTE) == ["test01"]
    assert table.jobs["test01"].tags == ("daily",)


def test_a_run_by_hand_does_not_reset_the_failures_unless_it_succeeds():
    table = timetable(a=2 * DAY)
    for failures in (1, 2):
        table.run("a", NOW)
        assert started(table) == ["a"]
        finish(table, "a", NOW, "no")
        assert table.jobs["a"].failures == failures
        assert table.jobs["a"].due == NOW + back_off(failures)
    table.run("a", NOW)
    started(table)
    finish(table, "a", NOW)
    assert table.jobs["a"].failures == 0


def test_failures_are_kept_over_a_restart():
    table = timetable(a=2 * DAY, b=2 * DAY)
    started(table)
    finish(table, "a", NOW, "no")
    kept = json.loads(json.dumps(table.remember()))
    later = Timetable()
    later.recall(kept, NOW + SECOND)
    later.configure({"a": DAILY, "b": DAILY}, 2, NOW + SECOND)
    for name in "ab":
        later.learn(name, [past(NOW - 2 * DAY)], NOW + SECOND)
    assert later.jobs["a"].last_error == "no"
    assert started(later, NOW + SECOND) == ["b"]
    assert started(later, NOW + 2 * MINUTE) == ["a"]
    finish(later, "a", NOW + 2 * MINUTE, "no")
    assert later.jobs["a"].due == NOW + 6 * MINUTE


@pytest.mark.parametrize("kept", [
    None, [], "x", {"a": None}, {"a": {}}, {"a": {"first_seen": 7}}, {"a": {"first_seen": "soon"}},
    {"a": {"first_seen": "2026-01-01", "failures": "many", "not_before": "2026-01-01"}},
    {"a": {"first_seen": "2026-01-01T00:00:00+00:00", "failures": 1}},
    {"a": {"absent_since": {}}}, {7: {"first_seen": "2026-01-01"}},
])  # fmt: skip
def test_what_is_odd_in_the_memory_is_passed_over(kept):
    table = Timetable()
    table.recall(kept, NOW)
    table.configure({"a": DAILY}, 1, NOW)
    assert table.jobs["a"].failures == 0
    assert table.jobs["a"].first_seen <= NOW


def test_a_job_that_was_first_seen_by_a_wrong_clock_is_first_seen_now():
    table = Timetable()
    table.recall({"a": {"first_seen": "2126-01-01T00:00:00+00:00"}}, NOW)
    table.configure({"a": DAILY}, 1, NOW)
    assert table.jobs["a"].first_seen == NOW


def test_a_job_that_fails_again_and_again_does_not_push_ahead_of_the_others():
    table = timetable(1, broken=9 * DAY, other=3 * DAY)
    assert started(table) == ["broken"]
    finish(table, "broken", NOW, "no")
    assert started(table) == ["other"]
    table.configure({name: DAILY for name in ("broken", "other", "third")}, 1, NOW)
    table.learn("third", [past(NOW - 2 * DAY)], NOW)
    finish(table, "other", NOW + 3 * MINUTE)
    assert started(table, NOW + 3 * MINUTE) == ["third"], "it waits for longer than the retry"


def test_a_job_that_left_the_configuration_is_remembered_for_a_month():
    table = timetable(a=2 * DAY)
    started(table)
    finish(table, "a", NOW, "no")
    table.configure({}, 1, NOW)
    for days, known in ((29, True), (31, False)):
        later = Timetable()
        later.recall(json.loads(json.dumps(table.remember())), NOW + days * DAY)
        later.configure({"a": DAILY}, 1, NOW + days * DAY)
        assert (later.jobs["a"].first_seen == NOW) is known


def test_who_finds_the_job_held_by_somebody_else_asks_again_and_has_not_failed():
    table = timetable(a=2 * DAY)
    started(table)
    finish(table, "a", NOW, "")
    assert table.jobs["a"].failures == 0
    assert table.jobs["a"].state is State.WAITING
    assert started(table, NOW + 29 * SECOND) == []
    assert started(table, NOW + 30 * SECOND) == ["a"]


def test_a_revision_that_somebody_else_made_is_a_success():
    table = timetable(a=2 * DAY)
    started(table)
    finish(table, "a", NOW, "no")
    table.learn("a", [past(NOW - 2 * DAY), past(NOW + SECOND)], NOW + MINUTE)
    assert table.jobs["a"].failures == 0
    assert table.jobs["a"].due > NOW + 5 * MINUTE


# -- while it runs --------------------------------------------------------------


def test_a_run_asked_for_while_the_job_runs_comes_after_it():
    table = timetable(a=2 * DAY)
    started(table)
    assert table.run("a", NOW)
    assert table.run("a", NOW)
    assert started(table) == []
    finish(table, "a", NOW + SECOND)
    assert started(table, NOW + SECOND) == ["a"]
    finish(table, "a", NOW + MINUTE)
    assert started(table, NOW + MINUTE) == [], "twice asked is once more"


def test_a_run_by_hand_goes_first_and_an_unknown_job_is_refused():
    table = timetable(1, a=4 * DAY, b=3 * DAY, c=HOUR)
    assert started(table) == ["a"]
    assert table.run("c", NOW)
    assert not table.run("d", NOW)
    finish(table, "a", NOW)
    assert started(table) == ["c"]


def test_a_stuck_job_gives_up_its_slot_but_does_not_run_twice():
    table = timetable(1, a=4 * DAY, b=3 * DAY)
    assert started(table) == ["a"]
    table.give_up("a")
    assert (table.running, table.stuck) == (0, 1)
    table.run("a", NOW)
    assert started(table, NOW + DAY) == ["b"]
    finish(table, "b", NOW + DAY)
    finish(table, "a", NOW + DAY, "it did not end")
    assert (table.running, table.stuck) == (0, 0)
    assert started(table, NOW + DAY) == ["a"]


def test_a_job_that_runs_already_has_its_slot():
    table = timetable(1, a=4 * DAY, b=3 * DAY)
    assert table.adopt("b", NOW - HOUR)
    assert not table.adopt("b", NOW)
    assert started(table) == []
    finish(table, "b", NOW)
    assert started(table) == ["a"]


def test_a_job_that_runs_and_is_configured_no_more_has_a_slot_until_it_ends():
    table = timetable(1, a=4 * DAY)
    assert table.adopt("gone", NOW - HOUR)
    assert not table.adopt("gone", NOW)
    assert (started(table), list(table.jobs)) == ([], ["a"])
    finish(table, "gone", NOW, "it failed")
    assert started(table) == ["a"]
    assert (table.running, table.leaving) == (1, {})


def test_a_reload_lets_running_jobs_run_also_removed_ones_and_counts_them():
    table = timetable(2, a=4 * DAY, b=3 * DAY, c=2 * DAY)
    assert started(table) == ["a", "b"]
    table.configure({"c": DAILY, "new": DAILY}, 2, NOW)
    assert (table.running, table.queued) == (2, 1)
    assert list(table.jobs) == ["c", "new"]
    finish(table, "a", NOW)
    assert started(table) == ["c"]
    table.configure({"b": DAILY}, 2, NOW)
    assert table.jobs["b"].state is State.RUNNING, "it is back and still runs"
    finish(table, "c", NOW, "no")
    finish(table, "b", NOW)
    assert (table.running, table.queued, table.leaving) == (0, 0, {})


def test_a_new_schedule_counts_at_once_also_for_a_job_that_waits_for_its_slot():
    table = timetable(1, a=4 * DAY, b=3 * DAY)
    started(table)
    hourly = Schedule("hourly", (Interval("hourly", HOUR, 3),))
    moved = table.configure({"a": DAILY, "b": hourly}, 1, NOW)
    assert moved == ["b"]
    table.reckon_anew(NOW, moved)
    finish(table, "a", NOW)
    assert started(table) == ["b"]
    assert table.jobs["b"].tags == ("hourly",)


# -- clocks ---------------------------------------------------------------------


@pytest.mark.parametrize("back", [MINUTE, HOUR, 11 * HOUR])
def test_when_the_clock_goes_back_nothing_runs_a_second_time(back):
    table = timetable(test01=2 * HOUR)
    regular = table.jobs["test01"].due
    started(table, regular)
    finish(table, "test01", regular + MINUTE)
    now = regular + 2 * MINUTE - back
    table.reckon_anew(now)
    assert run_until(table, regular + 2 * DAY, now) == [(regular + DAY, "test01")]


@pytest.mark.parametrize("back", [2 * DAY, 40 * DAY, 1000 * DAY])
def test_when_the_clock_was_far_ahead_no_job_waits_until_then(back):
    table = timetable(test01=2 * HOUR, test02=30 * HOUR)
    started(table)
    finish(table, "test02", NOW, "no")
    table.reckon_anew(NOW - back)
    for name, longest in (("test01", DAY), ("test02", 2 * MINUTE)):
        assert table.jobs[name].due <= NOW - back + longest
        assert table.jobs[name].first_seen <= NOW - back


def test_when_the_clock_jumps_ahead_each_job_runs_once():
    table = timetable(4, a=HOUR, b=2 * HOUR, c=3 * HOUR)
    table.reckon_anew(NOW + 400 * DAY)
    runs = run_until(table, NOW + 400 * DAY + 6 * MINUTE, NOW + 400 * DAY)
    assert sorted(name for _, name in runs) == ["a", "b", "c"]


# -- ten thousand jobs, and a year ------------------------------------------------


class Simulation:
    """The world around a timetable: a clock that may be wrong, a disk, sources that fail."""

    def __init__(self, count: int, limit: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.limit = limit
        self.schedules = {f"vm{number:05}": LIVED for number in range(count)}
        self.duration = {
            name: self.random.uniform(1200, 5000) if number % 20 == 0 else
            self.random.uniform(20, 500) for number, name in enumerate(self.schedules)
        }  # fmt: skip
        self.disk: dict[str, list[Past]] = {name: [] for name in self.schedules}
        self.steady, self.now = 0.0, NOW
        self.made = {name: 0.0 for name in self.schedules}  # by steady time
        self.excuse = {name: 0.0 for name in self.schedules}  # seconds since `made`
        self.backlog = 0.0  # seconds in all in which no slot was free, or nobody there
        self.seen_backlog = {name: 0.0 for name in self.schedules}
        self.failing: dict[str, float] = {}
        self.broken: dict[str, float] = {}  # until when a source is
        self.misses: list[str] = []
        self.starts = [0] * 24
        self.runs = self.failures = self.most = 0
        self.ends: list[tuple[float, int, str, bool]] = []
        self.active: set[str] = set()
        self.numbers = itertools.count()
        self.table = Timetable()
        self.begin({})

    def pass_time(self, seconds: float) -> None:
        self.steady += seconds
        self.now += timedelta(seconds=seconds)

    def begin(self, kept: dict) -> None:
        self.table = Timetable()
        self.table.recall(kept, self.now)
        self.table.configure(self.schedules, self.limit, self.now)
        for name, revisions in self.disk.items():
            self.table.learn(name, revisions, self.now)

    def run(self, until: float) -> None:
        """Live until then: start what the timetable says, end what has run long enough."""
        table = self.table
        while self.steady < until - 1e-6:
            self.start()
            moment = table.next_moment()
            pause = until - self.steady
            if moment is not None:
                pause = min(pause, max(1e-6, (moment - self.now).total_seconds()))
            if self.ends:
                pause = min(pause, self.ends[0][0] - self.steady)
            if table.queued:
                self.backlog += pause
            self.pass_time(pause)
            while self.ends and self.ends[0][0] <= self.steady + 1e-6:
                self.end(*heapq.heappop(self.ends)[2:])

    def start(self) -> None:
        for job in self.table.start(self.now):
            assert job.name not in self.active
            self.active.add(job.name)
            fails = self.random.random() < 0.01 or self.broken.get(job.name, 0) > self.steady
            lasts = 5.0 if fails else self.duration[job.name] * self.random.uniform(0.8, 1.2)
            entry = (self.steady + lasts, next(self.numbers), job.name, fails)
            heapq.heappush(self.ends, entry)
            self.starts[self.now.hour] += 1
            self.runs += 1
        self.most = max(self.most, len(self.active))

    def end(self, name: str, fails: bool) -> None:
        job = self.table.jobs[name]
        self.active.remove(name)
        if fails:
            self.failures += 1
            self.failing.setdefault(name, self.steady)
            self.table.finish(name, "it failed", self.disk[name], self.now)
            return
        lasted = (self.now - job.started).total_seconds()
        revisions = self.disk[name] = [*job.past, Past(job.started, job.tags, lasted)]
        self.judge(name)
        self.table.finish(name, None, revisions, self.now)

    def judge(self, name: str) -> None:
        """A gap of more than 1.5 intervals is a miss, but for what capacity and faults forced."""
        gap = self.steady - self.made[name] - (self.backlog - self.seen_backlog[name])
        gap -= self.steady - self.failing.pop(name, self.steady)
        if gap > 1.5 * 86400 + self.duration[name] * 1.2:
            self.misses.append(f"{name} at {self.now}: {gap / 3600:.1f} h")
        self.made[name], self.seen_backlog[name] = self.steady, self.backlog

    def outage(self, seconds: float) -> None:
        """The machine is off: what ran is lost, and what is remembered is what was written."""
        kept = json.loads(json.dumps(self.table.remember()))
        self.ends.clear()
        self.active.clear()
        self.pass_time(seconds)
        self.backlog += seconds
        self.begin(kept)

    def set_clock(self, ahead: timedelta) -> None:
        self.now += ahead
        self.table.reckon_anew(self.now)


def live(world: Simulation, days: int) -> None:
    """Day after day, and every tenth a calamity."""
    calamities = itertools.cycle([
        lambda: world.outage(4 * 3600), lambda: world.set_clock(-HOUR), lambda: world.outage(60),
        lambda: world.set_clock(5 * HOUR), lambda: world.outage(3 * 86400),
        lambda: world.set_clock(-4 * HOUR), lambda: world.set_clock(40 * DAY),
        lambda: world.set_clock(-40 * DAY),
    ])  # fmt: skip
    names = list(world.schedules)
    for day in range(days):
        for name in world.random.sample(names, len(names) // 500):
            world.broken[name] = world.steady + world.random.uniform(0, 3 * 86400)
        world.run(world.steady + 86400)
        if day % 10 == 9:
            next(calamities)()


def assert_lived_well(world: Simulation, runs: int) -> None:
    assert world.misses == []
    assert world.most == world.limit, "the limit is reached, and never exceeded"
    assert runs < world.runs < 1.25 * runs
    assert world.failures > world.runs / 200
    for name, revisions in world.disk.items():
        if name in world.failing:
            continue
        assert world.steady - 2 * 86400 < (revisions[-1].moment - NOW).total_seconds()


@pytest.mark.slow
def test_a_thousand_jobs_live_through_a_year():
    began = time.process_time()
    world = Simulation(1000, 8, seed=1)
    live(world, 365)
    assert_lived_well(world, 365_000)
    assert max(world.starts) < 1.5 * sum(world.starts) / 24, "the load is spread over the day"
    assert time.process_time() - began < 30, "11 s when it has a core to itself"


@pytest.mark.slow
def test_ten_thousand_jobs_live_for_some_days():
    world = Simulation(10_000, 70, seed=2)
    live(world, 11)
    assert_lived_well(world, 110_000)


def test_a_hundred_jobs_live_for_two_months():
    world = Simulation(100, 3, seed=3)
    live(world, 60)
    assert_lived_well(world, 5_500)


def test_ten_thousand_jobs_that_wait_cost_nothing():
    table = timetable(**{f"vm{number}": HOUR for number in range(10_000)})
    began = time.process_time()
    for second in range(1000):
        assert table.start(NOW + timedelta(microseconds=second)) == []
    assert time.process_time() - began < 0.3


def test_old_entries_do_not_pile_up():
    table = timetable(**{f"vm{number}": HOUR for number in range(10)})
    for _ in range(100):
        table.configure({name: DAILY for name in table.jobs}, 1, NOW)
    assert len(table.waiting) == 10
    assert table.next_moment() > EPOCH
