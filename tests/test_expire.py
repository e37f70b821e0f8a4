# SPDX-License-Identifier: GPL-3.0-or-later
"""What expires and what never does; and that it is done durably, on real file systems."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import faults
import mutants
import pytest
from conftest import (
    COMPILED,
    backy_process,
    contents,
    flip,
    need,
    need_root,
    revisions,
    write_image,
)
from faults import Bench, kill, points_of, sample, sweep

import backy
from backy import Interval, Revision, Schedule, Trust, judge_revisions

slow = pytest.mark.slow
DAY, HOUR, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)
NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=timezone.utc)
DAILY = Schedule("daily", (Interval("daily", DAY, 5),))
TWO = Schedule("two", (Interval("daily", DAY, 3), Interval("weekly", 7 * DAY, 2)))


def one(age: timedelta, tags: str = "daily", **values: object) -> Revision:
    moment = NOW - age
    values = {"duration": 1.0, **values}
    clock = backy.epoch_microseconds(moment)
    return Revision(f"r{clock}", moment, clock, tuple(sorted(tags.split())), **values)


def history(*some: Revision) -> list[Revision]:
    return sorted(some, key=lambda revision: revision.clock)


def verdicts(schedule: Schedule, *some: Revision, now: datetime = NOW) -> list[str]:
    """`keep reason` or `drop reason`, oldest first."""
    judged = judge_revisions(history(*some), schedule, now)
    return [f"{'keep' if verdict.keep else 'drop'} {verdict.reason}" for verdict in judged]


# -- the rule -----------------------------------------------------------------


def test_more_than_its_number_stay_while_they_are_young():
    """From backy 2.x: keep 5, with 6 inside of the window."""
    ages = [DAY * number / 2 for number in range(6)]
    assert verdicts(DAILY, *map(one, ages)) == [
        "keep daily, within 5 days",
        *(f"keep daily {number} of 5" for number in range(5, 0, -1)),
    ]
    assert verdicts(DAILY, one(6 * DAY), *map(one, ages))[:2] == [
        "drop daily 7 of 5, older than 5 days",
        "keep daily, within 5 days",
    ]


def test_the_newest_of_each_tag_stay_however_old_they_are():
    assert verdicts(DAILY, *(one((1000 + number) * DAY) for number in range(6))) == [
        "drop daily 6 of 5, older than 5 days",
        *(f"keep daily {number} of 5" for number in range(5, 0, -1)),
    ]


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (5 * DAY, "keep daily, within 5 days"),
        (5 * DAY + timedelta(microseconds=1), "drop daily 6 of 5, older than 5 days"),
    ],
)
def test_to_the_end_of_its_window_it_stays(age, expected):
    assert verdicts(DAILY, one(age), *map(one, [SECOND * number for number in range(5)]))[0] == (
        expected
    )


def test_each_tag_counts_for_itself():
    tags = ["daily weekly" if number % 7 == 0 else "daily" for number in range(22)]
    some = history(*(one(number * DAY + HOUR, words) for number, words in enumerate(tags)))
    judged = judge_revisions(some, TWO, NOW)
    assert [(verdict.tags, verdict.reason) for verdict in judged if verdict.keep] == [
        (("weekly",), "weekly 2 of 2; without daily 8 of 3, older than 3 days"),
        (("daily",), "daily 3 of 3"),
        (("daily",), "daily 2 of 3"),
        (("daily", "weekly"), "daily 1 of 3, weekly 1 of 2"),
    ]
    assert judged[0].reason == (
        "daily 22 of 3, older than 3 days, weekly 4 of 2, older than 14 days"
    )


def test_tags_of_no_schedule_go_but_manual_ones():
    some = [one(3 * HOUR, "manual:x"), one(2 * HOUR, "foreign"), one(HOUR, "daily foreign manual")]
    assert verdicts(DAILY, *some) == [
        "keep manual:x",
        "drop unknown tag 'foreign'",
        "keep daily 1 of 5; without unknown tag 'foreign', unknown tag 'manual'",
    ]
    assert judge_revisions(some, DAILY, NOW)[2].tags == ("daily",)


def test_without_any_tag_a_revision_goes():
    assert verdicts(DAILY, one(HOUR, ""), one(HOUR / 2)) == ["drop no tags", "keep daily 1 of 5"]


def test_a_keep_of_zero_keeps_all():
    forever = Schedule("", (Interval("daily", DAY, 0),))
    assert set(verdicts(forever, *(one(number * DAY) for number in range(400)))) == {
        "keep daily, kept for ever"
    }


def test_what_is_printed_of_a_tag_is_harmless():
    (verdict,) = judge_revisions([one(HOUR, "manual:\x1b[31m"), one(0 * DAY)][:1], DAILY, NOW)
    assert verdict.reason == "manual:\N{REPLACEMENT CHARACTER}[31m"
    assert verdicts(DAILY, one(HOUR, "\x1b"), one(HOUR / 2))[0] == (
        "drop unknown tag '\N{REPLACEMENT CHARACTER}'"
    )


# -- what never goes ----------------------------------------------------------

OLD = 99 * DAY
FIVE = [one(HOUR * number) for number in range(5)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "drop daily 6 of 5, older than 5 days"),
        ({"duration": None}, "keep incomplete"),
        ({"protected": True}, "keep protected"),
        ({"damaged": ((0, 65536),)}, "keep damaged"),
        ({"damaged": ((0, 9),), "trust": Trust.DISTRUSTED, "protected": True},
         "keep damaged, protected"),
        ({"sums_damaged": True}, "keep damaged"),
        ({"problem": "its image: gone"}, "keep damaged: its image: gone"),
        ({"trust": Trust.DISTRUSTED}, "drop daily, with 5 of 5 good ones newer, older than 5 days"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tags", ["daily", "", "foreign"])
def test_what_must_stay_stays_as_it_is(values, expected, tags):
    judged = judge_revisions(history(one(OLD, tags, **values), *FIVE), DAILY, NOW)[0]
    if tags == "daily" or expected.startswith("keep"):
        assert f"{'keep' if judged.keep else 'drop'} {judged.reason}" == expected
    if judged.keep:
        assert judged.tags == judged.revision.tags


@pytest.mark.parametrize(
    "values",
    [
        {"duration": None},
        {"damaged": ((0, 1),)},
        {"sums_damaged": True},
        {"problem": "gone"},
        {"trust": Trust.DISTRUSTED},
    ],
)
def test_what_is_not_good_takes_no_place_from_a_good_one(values):
    bad = [one(HOUR * number / 9, **values) for number in range(9)]
    good = [one((50 + number) * DAY) for number in range(6)]
    judged = judge_revisions(history(*bad, *good), DAILY, NOW)
    assert [verdict.keep for verdict in judged] == [False] + [True] * 14


def test_a_distrusted_revision_counts_for_nothing_but_expires():
    some = [one(OLD, trust=Trust.DISTRUSTED), *(one(20 * DAY + number * HOUR) for number in
            range(4))]  # fmt: skip
    assert verdicts(DAILY, *some)[0] == "keep daily, with 4 of 5 good ones newer"


def test_the_only_good_revision_stays():
    gone = [one(HOUR, "foreign"), one(2 * HOUR, "foreign")]
    assert verdicts(DAILY, *gone) == ["drop unknown tag 'foreign'", "keep only good one"]
    worse = one(HOUR / 2, "foreign", trust=Trust.DISTRUSTED)
    assert verdicts(DAILY, *gone, worse)[1:] == [
        "keep only good one",
        "drop unknown tag 'foreign'",
    ]
    assert verdicts(DAILY, one(HOUR / 2, trust=Trust.DISTRUSTED), *gone)[1] == "keep only good one"
    assert (
        verdicts(DAILY, one(HOUR / 2, "x", protected=True), *gone)[:2]
        == ["drop unknown tag 'foreign'"] * 2
    )


def test_where_none_is_good_the_newest_stays():
    some = [one(HOUR * number, "foreign", trust=Trust.DISTRUSTED) for number in (2, 1)]
    assert verdicts(DAILY, *some) == ["drop unknown tag 'foreign'", "keep only one"]


# -- clocks -------------------------------------------------------------------


def test_revisions_from_the_future_are_kept_and_counted():
    some = [one(-500 * DAY), *(one((9 + number) * DAY) for number in range(5))]
    assert verdicts(DAILY, *some) == [
        "drop daily 6 of 5, older than 5 days",
        *(f"keep daily {number} of 5" for number in (5, 4, 3, 2)),
        "keep daily 1 of 5, from the future",
    ]


@pytest.mark.parametrize("jump", [-9999 * DAY, -DAY, DAY, 9999 * DAY])
def test_no_clock_takes_the_newest_of_a_tag(jump):
    some = [one(number * DAY, "daily weekly") for number in range(30)]
    judged = judge_revisions(history(*some), TWO, NOW + jump)
    assert all("daily" in verdict.tags for verdict in judged[-3:])
    assert all("weekly" in verdict.tags for verdict in judged[-2:])
    kept = sum(verdict.keep for verdict in judged)
    assert kept == {-9999 * DAY: 30, -DAY: 16, DAY: 14, 9999 * DAY: 3}[jump]


# -- against a straightforward statement of the rule --------------------------


def by_the_book(tags_of: dict[int, set], moments: list, schedule: Schedule, now: datetime) -> dict:
    """Section 5 of the description of 2.x, word by word, for good revisions 0, 1, 2 ..."""
    tags_of = {number: set(tags) for number, tags in tags_of.items()}
    for interval in schedule.intervals:
        carrying = [number for number in sorted(tags_of) if interval.tag in tags_of[number]]
        if len(carrying) < interval.keep:
            continue
        for number in carrying[: -interval.keep]:
            if moments[number] < now - interval.keep * interval.every:
                tags_of[number].discard(interval.tag)
    for tags in tags_of.values():
        for tag in list(tags):
            if tag not in schedule.tags and not tag.startswith("manual:"):
                tags.discard(tag)
    return {number: tags for number, tags in tags_of.items() if tags}


def random_history(dice: random.Random) -> tuple[Schedule, list[Revision]]:
    names = dice.sample(["a", "b", "c"], dice.randint(1, 3))
    schedule = Schedule(
        "random",
        tuple(
            Interval(name, timedelta(hours=dice.randint(1, 60)), dice.randint(1, 6))
            for name in names
        ),
    )
    words = [*names, "old", "manual:1"]
    some = [
        one(
            timedelta(hours=dice.randint(-3 if dice.random() < 0.1 else 0, 500)) + SECOND * number,
            " ".join(dice.sample(words, dice.choice([0, 1, 1, 1, 2, 3])))[:99],
        )
        for number in range(dice.randint(1, 40))
    ]
    return schedule, history(*some)


def test_retention_is_by_the_book():
    dice = random.Random(4)
    removed = changed = 0
    for _ in range(700):
        schedule, some = random_history(dice)
        moments = [revision.timestamp for revision in some]
        expected = by_the_book({at: set(two.tags) for at, two in enumerate(some)}, moments,
                               schedule, NOW)  # fmt: skip
        judged = judge_revisions(some, schedule, NOW)
        left = {at: set(verdict.tags) for at, verdict in enumerate(judged) if verdict.keep}
        if not expected:  # only here we are more careful
            assert left == {len(some) - 1: set(some[-1].tags)}
            continue
        assert left == expected
        removed += len(some) - len(left)
        changed += sum(set(some[at].tags) != tags for at, tags in left.items())
    assert removed > 2000 and changed > 500


def test_whatever_else_is_there_good_ones_are_never_fewer():
    """With damage, protection and the like strewn in, what is good stays as without these."""
    dice = random.Random(5)
    spoiled = [
        {"duration": None},
        {"damaged": ((0, 1),), "trust": Trust.DISTRUSTED},
        {"trust": Trust.DISTRUSTED},
        {"problem": "gone"},
        {"protected": True},
    ]
    for _ in range(700):
        schedule, some = random_history(dice)
        some = [
            replace(revision, **dice.choice(spoiled)) if dice.random() < 0.3 else revision
            for revision in some
        ]
        judged = judge_revisions(some, schedule, NOW)
        for verdict in judged:
            revision = verdict.revision
            if not revision.is_complete or revision.protected or revision.problem:
                assert verdict.keep and not verdict.changes
            if revision.damaged:
                assert verdict.keep and not verdict.changes
        good = [revision for revision in some if backy.is_sound(revision)]
        among_good = judge_revisions(good, schedule, NOW)
        kept = {verdict.revision.id for verdict in judged if verdict.keep}
        if any(verdict.keep and "only" not in verdict.reason for verdict in among_good):
            assert {verdict.revision.id for verdict in among_good if verdict.keep} <= kept
        assert kept
        assert any(revision.id in kept for revision in good) or not good


def test_judging_late_comes_to_the_same_as_judging_after_each_run():
    dice = random.Random(6)
    for _ in range(60):
        schedule, some = random_history(dice)
        some = [revision for revision in some if set(revision.tags) & set(schedule.tags)]
        kept: list[Revision] = []
        for revision in some:
            kept.append(revision)
            judged = judge_revisions(kept, schedule, revision.timestamp)
            kept = [replace(two.revision, tags=two.tags) for two in judged if two.keep]
        at_once = judge_revisions(some, schedule, some[-1].timestamp) if some else []
        assert [(two.id, two.tags) for two in kept] == [
            (two.revision.id, two.tags) for two in at_once if two.keep
        ]


# -- the command --------------------------------------------------------------

CONFIG = """\
schedule:
  daily: {interval: 1d, keep: 3}
  weekly: {interval: 7d, keep: 2}
source: {type: file, filename: %s}
"""
# days ago and tags; what is expected of it
PAST = [
    (40, "daily weekly", "drop"),
    (20, "weekly", "keep weekly 2 of 2"),
    (9, "daily weekly", "keep weekly 1 of 2; without daily 6 of 3, older than 3 days"),
    (5, "daily", "drop"),
    (4, "daily manual:x", "keep manual:x; without daily 4 of 3, older than 3 days"),
    (3, "daily", "keep daily 3 of 3"),
    (2, "daily", "keep daily 2 of 3"),
    (1, "daily", "keep daily 1 of 3"),
]


def age(job: Path, past: list) -> list[str]:
    """Let the revisions be from so many days ago, with these tags; their ids."""
    with backy.Repository.open(str(job)) as repository:
        now = datetime.now(timezone.utc)
        for revision, (days, tags, _) in zip(list(repository.revisions), past):
            moment = now - (days - 0.1) * DAY
            values = {"timestamp": moment, "clock": backy.epoch_microseconds(moment)}
            repository.change(revision, tags=tuple(sorted(tags.split())), **values)
        return [revision.id for revision in repository.revisions]


@pytest.fixture
def aged(cow, tmp_path, run):
    """A job with revisions of the last weeks; `aged.ids` are theirs, oldest first."""
    return make_aged(cow / "job", tmp_path / "image", run)


def make_aged(job: Path, image: Path, run):
    write_image(image, (0, b"x" * 9999), size=1 << 20)
    assert run("-b", job, "init", "file", image).status == 0
    for number in range(len(PAST)):
        write_image(image, (number * 8192, b"y" * 4096))
        os.utime(image, (1e9, 1e9))
        assert run("-b", job, "backup", "daily").status == 0
    (job / "config").chmod(0o600)
    (job / "config").write_text(CONFIG % image)
    ids = age(job, PAST)
    return type("Job", (), {"path": job, "ids": ids, "image": image})


def expected_names(ids: list[str]) -> set[str]:
    stay = [name for name, (_, _, what) in zip(ids, PAST) if what != "drop"]
    return {f"{name}{end}" for name in stay for end in ("", ".rev", ".sums")}


OTHERS = {"config", ".lock", "last", "last.rev"}


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_expire_shows_and_does_what_was_decided(aged, run):
    before = contents(aged.path)
    trial = run("-b", aged.path, "expire", "-n")
    assert trial.status == 0 and contents(aged.path) == before
    head, *rows = table(trial.out)
    assert head == ["Date (UTC)", "ID", "Tags", "Verdict", "Reason"]
    assert [row[1] for row in rows] == aged.ids
    shown = [f"{row[3]} {row[4]}" if row[3] == "keep" else row[3] for row in rows]
    assert shown == [what for _, _, what in PAST]
    assert trial.out.endswith("job: 8 revisions: 6 to keep, 2 to drop\n")

    done = run("-b", aged.path, "expire")
    assert done.status == 0
    assert [row[3] for row in table(done.out)[1:]] == [
        {"keep": "kept", "drop": "removed"}[what[:4]] for _, _, what in PAST
    ]
    assert done.out.endswith("job: 8 revisions: 6 kept, 2 removed\n")
    assert [row[4] for row in table(done.out)] == [row[4] for row in table(trial.out)]
    assert set(os.listdir(aged.path)) == expected_names(aged.ids) | OTHERS
    assert f"job: {aged.ids[0]} (" in done.err and "is removed: daily 7 of 3" in done.err
    assert " UTC) keeps [weekly]: weekly 1 of 2; without daily 6 of 3" in done.err
    steps = [line.partition(" UTC) ")[2].split()[0] for line in done.err.splitlines()]
    assert steps == ["is", "is", "keeps", "keeps"]  # what gives room comes first
    tags = {revision.id: revision.tags for revision in revisions(aged.path)}
    assert tags[aged.ids[2]] == ("weekly",) and tags[aged.ids[4]] == ("manual:x",)
    after = contents(aged.path)
    for name in expected_names(aged.ids):  # no image, no digests, no other metadata is touched
        assert after[name] == before[name] or name in {f"{aged.ids[2]}.rev", f"{aged.ids[4]}.rev"}

    again = run("-b", aged.path, "expire")
    assert again.status == 0 and contents(aged.path) == after and again.err == ""
    assert run("-b", aged.path, "verify", "--all").status == 0
    assert run("-b", aged.path, "backup", "daily").status == 0


def test_expire_in_json(aged, run):
    result = json.loads(run("-b", aged.path, "expire", "-n", "--json").out)
    assert (result["version"], result["dry_run"], result["failed"]) == (1, True, [])
    (job,) = result["jobs"]
    assert job["job"] == "job"
    first, third = job["revisions"][0], job["revisions"][2]
    assert (first["id"], first["keep"], first["tags_left"], first["done"]) == (
        aged.ids[0], False, [], False,
    )  # fmt: skip
    assert (third["keep"], third["tags"], third["tags_left"]) == (
        True, ["daily", "weekly"], ["weekly"],
    )  # fmt: skip
    done = json.loads(run("-b", aged.path, "expire", "--json").out)["jobs"][0]["revisions"]
    assert [one["done"] for one in done] == [True, False, True, True, True, False, False, False]
    assert {one["failure"] for one in done} == {None}


def test_the_last_complete_revision_may_go_and_last_turns_away(aged, run):
    tags = [(days, "nothing" if days == 1 else tags, what) for days, tags, what in PAST]
    age(aged.path, tags)
    assert run("-b", aged.path, "expire").status == 0
    assert os.readlink(aged.path / "last") == aged.ids[-2]


def test_without_a_schedule_nothing_expires(aged, run):
    before = contents(aged.path)
    del before["config"]
    for config, message in (
        ("{type: file, filename: /x}", "there is no schedule"),
        ("source: {type: file, filename: /x}", "there is no schedule"),
        ("source: {type: nonsense}\nschedule: {}", "has no interval"),
        ("source: {}\nschedule: {daily: {interval: 1d}}", "has no keep"),
        ("source: {}\nschedule: {daily: {interval: 0d, keep: 1}}", "interval is a number "),
        ("source: {}\nschedule: {daily: {interval: 1d, keep: -1}}", "keep is"),
        ("source: {}\nschedule: daily", "is a mapping"),
        ("source: {}\nschedule: ~", "has no interval"),
        ("{", ""),
        ("- a", "there is no schedule"),
        ("\udcff", ""),
    ):
        (aged.path / "config").write_bytes(config.encode("utf-8", "surrogateescape"))
        result = run("-b", aged.path, "expire")
        after = contents(aged.path)
        del after["config"]
        assert result.status == 1 and result.out == "" and after == before
        assert message in result.err and "Traceback" not in result.err


def test_without_a_schedule_the_hint_names_the_configuration(aged, run):
    (aged.path / "config").write_text(f"{{type: file, filename: {aged.image}}}")
    result = run("-b", aged.path, "expire")
    assert "backy: job: config: there is no schedule\nbacky: hint: " in result.err
    assert "backy expire -c FILE JOB" in result.err


def write_settings(path: Path, base: Path, image: Path, *jobs: str) -> Path:
    lines = [f"  {job}: {{schedule: two, source: {{type: file, filename: {image}}}}}\n" for job in
             jobs]  # fmt: skip
    path.write_text(
        f"global: {{base-dir: {base}}}\n"
        "schedules: {two: {daily: {interval: 1d, keep: 3}, weekly: {interval: 7d, keep: 2}}}\n"
        "jobs:\n" + "".join(lines)
    )
    return path


def test_expire_takes_jobs_of_a_configuration_and_one_failure_stops_no_other(aged, run, tmp_path):
    base = aged.path.parent
    for name in ("vm2", "vm3"):
        shutil.copytree(aged.path, base / name, symlinks=True)
    (base / "vm2" / "odd.rev").write_text("what is this?\n")
    conf = write_settings(tmp_path / "conf", base, aged.image, "vm1", "vm2", "job", "vm3")
    before = contents(base / "vm2")

    only = run("expire", "-c", conf, "vm3", "-n")
    assert only.status == 0 and only.out.endswith("vm3: 8 revisions: 6 to keep, 2 to drop\n")
    unknown = run("-c", conf, "expire", "vm4")
    assert unknown.status == 1 and "no job 'vm4' (vm" in unknown.err

    result = run("expire", "-c", conf)
    assert result.status == 1
    assert "vm1: nothing to expire" in result.err  # it was never backed up
    assert "backy: vm2: nothing expires: cannot read odd.rev" in result.err
    assert contents(base / "vm2") == before
    for name in ("job", "vm3"):
        assert set(os.listdir(base / name)) == expected_names(aged.ids) | OTHERS

    both = run("expire", "-c", conf, "-b", base / "vm2")
    assert both.status == 1 and both.err.startswith("backy: -b names one directory")


def test_while_metadata_cannot_be_read_nothing_expires_and_the_table_says_so(aged, run):
    path = aged.path / f"{aged.ids[5]}.rev"
    path.chmod(0o600)
    path.write_text("torn\n")
    before = contents(aged.path)
    for words in (["expire"], ["expire", "-n"]):
        result = run("-b", aged.path, *words)
        assert result.status == 1 and contents(aged.path) == before
        assert f"nothing expires: cannot read {aged.ids[5]}.rev" in result.err
        rows = table(result.out)[1:]
        assert {row[3] for row in rows} == {"keep"}
        assert rows[0][4] == "while not all metadata can be read"
    failed = json.loads(run("-b", aged.path, "expire", "--json").out)["failed"]
    assert failed[0]["job"] == "job" and aged.ids[5] in failed[0]["error"]
    path.unlink()
    assert run("-b", aged.path, "expire").status == 0


@pytest.mark.parametrize("what", ["image gone", "image shorter", "protected", "damaged"])
def test_what_must_stay_is_still_there_after(aged, run, what):
    victim = aged.ids[0]
    if what == "image gone":
        (aged.path / victim).unlink()
    elif what == "image shorter":
        os.truncate(aged.path / victim, 4096)
    elif what == "protected":
        assert run("-b", aged.path, "protect", "-r", victim).status == 0
    else:
        for name in aged.ids:  # in all of them, so that nobody heals it
            os.chmod(aged.path / name, 0o600)
            flip(aged.path / name, 100)
        assert run("-b", aged.path, "verify", "-r", victim).status == 1
    before = {path.name: path.read_bytes() for path in aged.path.glob(f"{victim}*")}
    result = run("-b", aged.path, "expire")
    assert result.status == 0
    assert {path.name: path.read_bytes() for path in aged.path.glob(f"{victim}*")} == before
    (row,) = (row for row in table(result.out) if row[1] == victim)
    assert row[3] == "kept" and ("protected" if what == "protected" else "damaged") in row[4]


def test_foreign_files_are_not_touched(aged, run):
    names = [f"{aged.ids[0]}.txt", f"{aged.ids[0]}x", "disk.img", f"{aged.ids[3]}.old"]
    for name in names:
        (aged.path / name).write_text("mine")
    assert run("-b", aged.path, "expire").status == 0
    assert set(os.listdir(aged.path)) == {*expected_names(aged.ids), *OTHERS, *names}


# -- locks --------------------------------------------------------------------

HOLDER = """\
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen:
    """A process that has a shared lock on the file until its standard input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], **pipes)
    assert process.stdout.readline() == b"held\n"
    return process


def test_an_image_that_is_open_elsewhere_stays_until_it_is_closed(aged, run):
    process = holder(aged.path / aged.ids[0])
    try:
        trial = run("-b", aged.path, "expire", "-n")
        result = run("-b", aged.path, "expire")
    finally:
        process.communicate(b"")
    for done, word in ((trial, "keep"), (result, "kept")):
        rows = {row[1]: row for row in table(done.out)}
        assert done.status == 0 and rows[aged.ids[0]][3:] == [word, "open"]
    left = set(os.listdir(aged.path))
    assert aged.ids[0] in left and aged.ids[3] not in left
    assert revisions(aged.path)[0].tags == ("daily", "weekly")
    assert run("-b", aged.path, "expire").status == 0
    assert set(os.listdir(aged.path)) == expected_names(aged.ids) | OTHERS


def test_an_image_opened_at_the_last_moment_stays(aged, run, monkeypatch):
    """Between the verdict and the removal."""
    monkeypatch.setattr(backy, "is_open", lambda *_: False)
    process = holder(aged.path / aged.ids[0])
    try:
        result = run("-b", aged.path, "expire")
    finally:
        process.communicate(b"")
    assert result.status == 0 and (aged.path / aged.ids[0]).exists()
    assert [row[3:] for row in table(result.out) if row[1] == aged.ids[0]] == [["kept", "open"]]


def test_the_parent_of_a_running_backup_stays(aged, run, meanwhile):
    past = [(days, "nothing" if days == 1 else tags, what) for days, tags, what in PAST]
    age(aged.path, past)
    said = []
    happened = meanwhile(1, lambda: said.append(backy_process("-b", aged.path, "expire").stdout))
    write_image(aged.image, (0, b"new" * 999))
    result = run("-b", aged.path, "backup", "daily")
    assert happened and result.status == 0, result
    rows = {row[1]: row for row in table(said[0])}
    assert rows[aged.ids[-1]][3:] == ["kept", "open"]
    assert rows[aged.ids[0]][3] == "removed"
    (running,) = (row for row in rows.values() if row[4] == "incomplete")
    newest = revisions(aged.path)[-1]
    assert newest.id == running[1] and newest.parent == aged.ids[-1]
    assert (aged.path / newest.id).read_bytes() == aged.image.read_bytes()
    assert run("-b", aged.path, "expire").status == 0
    assert aged.ids[-1] not in os.listdir(aged.path)


def test_expire_waits_for_who_changes_metadata(aged):
    fd = os.open(aged.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    words = [sys.executable, str(COMPILED), "-b", str(aged.path), "expire"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while str(os.stat(aged.path).st_ino) not in waiting_for_locks():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    assert set(os.listdir(aged.path)) > {aged.ids[0], aged.ids[3]}
    os.close(fd)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert set(os.listdir(aged.path)) == expected_names(aged.ids) | OTHERS


def waiting_for_locks() -> str:
    """The inodes of the files for whose lock somebody waits."""
    lines = Path("/proc/locks").read_text().splitlines()
    return " ".join(line.split()[6].rpartition(":")[2] for line in lines if "->" in line)


def test_who_waits_gets_the_lock_between_two_removals(aged, run, monkeypatch):
    """Here after each: the time that others are kept waiting does not grow with the work."""
    monkeypatch.setattr(backy, "SHORT_WHILE", -1.0)
    locks = []
    real = backy.Repository.metadata_lock
    monkeypatch.setattr(
        backy.Repository, "metadata_lock", lambda self: locks.append(1) or real(self)
    )
    assert run("-b", aged.path, "expire").status == 0
    assert len(locks) == 4  # two removals and two changes
    assert set(os.listdir(aged.path)) == expected_names(aged.ids) | OTHERS


def test_metadata_that_became_unreadable_meanwhile_stops_it(aged):
    with backy.Repository.open(str(aged.path)) as repository:
        schedule = backy.load_schedule(repository)
        (aged.path / "odd.rev").write_text("torn")
        with pytest.raises(backy.BackyError, match="nothing expires: cannot read odd"):
            backy.expire_revisions(repository, schedule, datetime.now(timezone.utc))
    assert set(os.listdir(aged.path)) > {aged.ids[0], aged.ids[3]}


def test_a_directory_that_is_moved_away_meanwhile_is_no_success(aged, run, monkeypatch):
    real = backy.judge

    def judge(*words):
        if aged.path.exists():
            aged.path.rename(aged.path.parent / "elsewhere")
        return real(*words)

    monkeypatch.setattr(backy, "judge", judge)
    result = run("-b", aged.path, "expire")
    assert result.status == 1 and "was moved or deleted" in result.err


# -- rights and room ----------------------------------------------------------


def test_on_a_read_only_file_system_it_shows_but_fails(new_file_system, run, tmp_path):
    system = new_file_system("xfs")
    aged = make_aged(system.path / "job", tmp_path / "image", run)
    system.unmount()
    system.mount("ro")
    trial = run("-b", aged.path, "expire", "-n")
    assert trial.status == 0 and trial.out.endswith("6 to keep, 2 to drop\n")
    result = run("-b", aged.path, "expire")
    assert result.status == 1
    assert result.out.endswith("job: 8 revisions: 4 kept, 0 removed, 4 failed\n")
    assert "backy: job: 4 revisions did not expire: job: cannot remove" in result.err
    assert "Read-only file system" in result.err


def test_who_may_not_read_or_write_gets_a_line_and_status_1(aged, run, tmp_path):
    need_root()
    nobody = (
        {"user": 65534} if sys.version_info >= (3, 9) else {"preexec_fn": lambda: os.setuid(65534)}
    )
    need(os.access("/usr/bin/env", os.X_OK), "no env")
    for path in (*aged.path.parents, tmp_path):
        if path.stat().st_mode & 0o005 != 0o005 and path != Path("/"):
            path.chmod(0o755)
    program = shutil.copy(backy.__file__, aged.path.parent / "backy.py")
    os.chmod(program, 0o644)

    def by_nobody(*words):
        words = [shutil.which("python3", path="/usr/bin:/bin"), program, *map(str, words)]
        return subprocess.run(words, capture_output=True, text=True, check=False, **nobody)

    need(shutil.which("python3", path="/usr/bin:/bin"), "no python3 for others")
    closed = by_nobody("-b", aged.path, "expire")
    assert closed.returncode == 1 and "Permission denied" in closed.stderr
    for path in (aged.path, *aged.path.glob("*.rev"), aged.path / "config"):
        if not path.is_symlink():
            path.chmod(0o755)
    before = set(os.listdir(aged.path))
    trial = by_nobody("-b", aged.path, "expire", "-n")
    assert trial.returncode == 0 and "2 to drop" in trial.stdout
    result = by_nobody("-b", aged.path, "expire")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "did not expire" in result.stderr and "Permission denied" in result.stderr
    assert set(os.listdir(aged.path)) == before


@slow
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_on_a_full_disk_it_makes_room(new_file_system, run, tmp_path, kind):
    system = new_file_system(kind, 400 << 20)
    aged = make_aged(system.path / "job", tmp_path / "image", run)
    big = aged.path / aged.ids[3]
    big.chmod(0o600)
    with open(big, "r+b") as file:  # bytes of its own
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    with backy.Repository.open(str(aged.path)) as repository:
        repository.change(repository.find(aged.ids[3]), size=64 << 20)
    fill(system.path / "filler")
    free = os.statvfs(system.path).f_bavail
    result = run("-b", aged.path, "expire")
    left = set(os.listdir(aged.path))
    assert aged.ids[0] not in left and aged.ids[3] not in left, result
    subprocess.run(["sync", "-f", str(system.path)], check=True)
    assert os.statvfs(system.path).f_bavail * 4096 > free * 4096 + (50 << 20)
    assert run("-b", aged.path, "expire").status == 0  # with room the tags go too
    assert set(os.listdir(aged.path)) == expected_names(aged.ids) | OTHERS
    assert revisions(aged.path)[1].tags == ("weekly",)


def fill(path: Path) -> None:
    """Leave no room at all."""
    for size in (1 << 20, 1 << 16, 4096, 512):
        with open(path, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())
            except OSError:
                continue


# -- killed -------------------------------------------------------------------


def expiring(top: Path) -> Bench:
    """Two of six revisions are to go, the newest among them, and a tag of a third."""
    one, two, three = faults.contents()
    bench = Bench(top, one, two, one, two, one, two, three, words=("expire",))
    (bench.base / "config").chmod(0o600)
    (bench.base / "config").write_text(CONFIG % bench.source)
    kinds = [(9, "daily weekly"), (8, "daily"), (2, "daily"), (1.5, "daily"), (1, "daily")]
    age(bench.base, [(*kind, "") for kind in [*kinds, (0.5, "nothing")]])
    bench.remember()
    bench.mayfly = {bench.ids[1], bench.ids[5]}
    with bench.job() as job:
        done = bench.run(job)
        assert done.status == 0, done.said
        assert {revision.id for revision in faults.complete(job)} == {*bench.ids} - bench.mayfly
        name = f"{bench.ids[0]}.rev"
        bench.healthy = {name: (job / name).read_bytes()}
    assert bench.healthy[name] != bench.known[name]
    return bench


def after_expiry(bench: Bench, job: Path, done: faults.Run):
    """Old or new, never between; a second run brings it to the end, and a backup clears up."""
    yield from faults.lasting(bench, job)
    for name in bench.mayfly:
        if (job / f"{name}.rev").exists() and not (job / name).exists():
            yield f"I2: {name} has lost its image before its metadata"
    again = faults.run("-b", job, "expire")
    if again.status:
        yield f"I5: the next expire: status {again.status}: {again.said[-300:]!r}"
    dead = {f"{name}{end}" for name in bench.mayfly for end in ("", ".sums", ".del", ".rev")}
    if dead & set(os.listdir(job)):
        yield f"I6: after the next expire there is {dead & set(os.listdir(job))}"
    if {revision.id for revision in faults.complete(job)} != {*bench.ids} - bench.mayfly:
        yield "I7: after the next expire there are others than there should be"
    if (job / f"{bench.ids[0]}.rev").read_bytes() not in bench.healthy.values():
        yield "I7: after the next expire a tag is left that is over"
    yield from faults.next_run_succeeds(bench, job)


def test_killed_where_it_changes_something_retention_harms_nothing(cow):
    bench = expiring(cow)
    points = points_of(bench.trace(), lambda call: call.changes)
    assert len(points) >= 20
    sweep(bench, kill, sample(points, 12), after_expiry)  # the slow test takes all


@slow
def test_killed_at_any_call_retention_harms_nothing(cow):
    bench = expiring(cow)
    points = points_of(bench.trace())
    sweep(bench, kill, [*points, points[-1] + 1], after_expiry)
    assert len(points) >= 60


@slow
@pytest.mark.parametrize("mutant", [mutants.image_removed_first, mutants.metadata_in_place])
def test_a_kill_finds_out(xfs, mutant):
    """What is claimed above can fail: with two steps in the wrong order, it does."""
    bench = expiring(xfs)
    with bench.job() as job:
        points = points_of(bench.run(job, mutate=mutant).trace, lambda call: call.changes)
    assert faults.found(bench, kill, points, after_expiry, mutate=mutant)


def after_failing_expiry(bench: Bench, job: Path, done: faults.Run):
    yield from faults.failure_is_told(done)
    yield from after_expiry(bench, job, done)


@slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
def test_errors_at_any_call_are_told_and_harm_nothing(cow, code, sticky):
    bench = expiring(cow)
    trace = bench.trace()
    points = points_of(trace, lambda call: faults.can_fail(call, code))
    sweep(bench, faults.fail(code), sample(points, 40), after_failing_expiry, sticky)
