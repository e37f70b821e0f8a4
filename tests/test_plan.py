# SPDX-License-Identifier: GPL-3.0-or-later
"""The coming runs and their reasons, what retention makes of them, and tags of no schedule."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import need, need_root, plant

import backy
from backy import (
    Interval,
    JobSettings,
    Past,
    Revision,
    Schedule,
    Simulation,
    coming_runs,
    coming_runs_of_all,
    explain_run,
    judge_revisions,
    next_run,
    past_of,
    spread_of,
)

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=timezone.utc)
THREE = Schedule(
    "three",
    (Interval("daily", DAY, 9), Interval("weekly", 7 * DAY, 5), Interval("monthly", 30 * DAY, 4)),
)
OFTEN = Schedule("often", (Interval("often", 10 * MINUTE, 18), Interval("daily", DAY, 7)))


def one(moment: datetime, tags: str, **values: object) -> Revision:
    values = {"duration": 1.0, **values}
    clock = backy.epoch_microseconds(moment)
    return Revision(f"r{clock}", moment, clock, tuple(sorted(tags.split())), **values)


# -- the coming runs ----------------------------------------------------------


def test_the_runs_of_a_new_job_are_the_regular_ones():
    runs = list(coming_runs("test01", THREE, [], NOW, NOW + 40 * DAY))
    spread = spread_of("test01", THREE)
    assert runs[0].tags == ("daily", "weekly", "monthly")
    assert [str(run.moment)[:19] for run in runs[:2]] == [
        "2026-11-26 09:31:32",
        "2026-11-27 09:31:32",
    ]
    assert len(runs) == 40
    now = NOW
    for run in runs:
        moment, tags = backy.next_time(THREE, spread, now)
        assert moment == run.moment and set(tags) <= set(run.tags)
        now = moment
    assert sum("weekly" in run.tags for run in runs) in (6, 7)
    assert explain_run(runs[0], THREE) == (
        "regular time of daily; never backed up before (every 1d; spread 7 days, 9:31:32)"
    )
    assert explain_run(runs[4], THREE) == (
        "regular time of daily, weekly (every 1d, 7d; spread 7 days, 9:31:32)"
    )


def test_what_was_missed_comes_first_and_once():
    past = [Past(NOW - 3 * DAY, ("daily", "monthly", "weekly"), 1.0)]
    first, second, *_ = coming_runs("test01", THREE, past, NOW, NOW + 9 * DAY)
    assert first == (NOW, "test01", ("daily",), "catching up: daily missed")
    assert explain_run(first, THREE) == first.reason
    assert str(second.moment)[:19] == "2026-11-26 09:31:32" and second.tags == ("daily",)


def test_leaving_out_what_says_nothing_changes_no_run():
    """The short memory against the whole of it."""
    dice = random.Random(3)
    for _ in range(40):
        every = [dice.choice([7, 10, 25, 60, 90]) for _ in range(3)]
        schedule = Schedule(
            "x", tuple(Interval(tag, number * MINUTE, 1) for tag, number in zip("abc", every))
        )
        past = [
            Past(NOW + dice.uniform(-5, 0.1) * HOUR, tuple(dice.sample("abcd", 2)), 1.0)
            for _ in range(dice.randint(0, 5))
        ]
        runs = list(coming_runs("x", schedule, past, NOW, NOW + 12 * HOUR))
        now, whole = NOW, list(past)
        for run in runs:
            assert next_run(schedule, spread_of("x", schedule), whole, now) == (
                run.moment, run.tags, run.reason,
            )  # fmt: skip
            whole.append(Past(run.moment, run.tags, 0.0))
            now = run.moment
        assert len(runs) > 10


def test_the_runs_of_several_jobs_are_in_the_order_of_time():
    jobs = [JobSettings(f"vm{number}", THREE, {}, DAY, "") for number in range(20)]
    runs = list(coming_runs_of_all([(job, []) for job in jobs], {}, NOW, NOW + 3 * DAY))
    assert [run.moment for run in runs] == sorted(run.moment for run in runs)
    assert {run.job for run in runs} == {job.name for job in jobs} and len(runs) == 60


def test_only_complete_revisions_with_their_image_are_past():
    some = [
        one(NOW - 9 * HOUR, "daily"),
        one(NOW - 2 * HOUR, "daily", duration=None),
        one(NOW - HOUR, "daily", problem="its image: gone"),
    ]
    assert past_of(some) == [Past(NOW - 9 * HOUR, ("daily",), 1.0)]


# -- the simulation -----------------------------------------------------------


def step_by_step(job: str, schedule: Schedule, revisions: list, span: timedelta) -> list:
    """The same with retention after every single run."""
    kept, now = list(revisions), NOW
    while True:
        moment, tags, _ = next_run(schedule, spread_of(job, schedule), past_of(kept), now)
        if moment > NOW + span:
            return kept
        now = moment
        kept.append(one(moment, " ".join(tags)))
        judged = judge_revisions(kept, schedule, now)
        kept = [replace(each.revision, tags=each.tags) for each in judged if each.keep]


@pytest.mark.parametrize("schedule, days", [(THREE, 200), (OFTEN, 4)])
@pytest.mark.parametrize("begun_with", ["nothing", "some"])
def test_the_simulation_ends_where_expiry_after_each_run_ends(schedule, days, begun_with):
    there = [
        one(NOW - 50 * DAY, "daily", protected=True),
        one(NOW - 40 * DAY, "foreign"),
        one(NOW - 30 * DAY, "manual:x daily"),
        one(NOW - 20 * DAY, "daily weekly", damaged=((0, 1),)),
        one(NOW - 2 * DAY, "daily weekly monthly often"),
    ]
    there = there if begun_with == "some" else []
    simulation = Simulation("vm1", schedule, there)
    verdicts = simulation.run(NOW, NOW + days * DAY)
    expected = step_by_step("vm1", schedule, there, days * DAY)
    found = [(two.revision.timestamp, two.tags) for two in verdicts]
    assert found == [(revision.timestamp, revision.tags) for revision in expected]
    assert all(two.keep for two in verdicts)
    if there:
        assert "protected" in verdicts[0].reason and "manual:x" in verdicts[1].reason


def test_the_simulation_begins_without_what_is_incomplete():
    simulation = Simulation("vm1", THREE, [one(NOW - DAY, "daily", duration=None)])
    assert all(two.revision.is_complete for two in simulation.run(NOW, NOW + 3 * DAY))


# -- the command --------------------------------------------------------------


@pytest.fixture
def conf(tmp_path):
    """A configuration with two jobs, whose base directory does not exist."""
    return write_conf(tmp_path)


def write_conf(tmp_path: Path, jobs: int = 2) -> Path:
    lines = [
        f"  vm{number}: {{schedule: {'often' if number == 2 else 'default'},"
        f" source: {{type: file, filename: /x{number}}}}}\n"
        for number in range(1, jobs + 1)
    ]
    path = tmp_path / "backy.conf"
    path.write_text(
        f"global: {{base-dir: {tmp_path}/base}}\n"
        "schedules:\n"
        "  default: {daily: {interval: 1d, keep: 9}, weekly: {interval: 7d, keep: 5}}\n"
        "  often: {often: {interval: 10m, keep: 18}, daily: {interval: 1d, keep: 7}}\n"
        "jobs:\n" + "".join(lines)
    )
    return path


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def make_revision(directory: Path, name: str, age: timedelta, tags: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config").write_text("{type: file, filename: /x}")
    moment = datetime.now(timezone.utc) - age
    plant(directory, name, f"timestamp: {moment}\nstats: {{duration: 1.5}}\ntags: [{tags}]\n")


def test_plan_shows_the_coming_runs(conf, run, tmp_path):
    make_revision(tmp_path / "base/vm1", "aaa", 50 * HOUR, "daily, weekly")
    make_revision(tmp_path / "base/vm2", "aaa", MINUTE, "daily, often")
    result = run("plan", "-c", conf, "--days", "2")
    assert result.status == 0 and result.err == ""
    head, *rows = table(result.out)
    assert head == ["Time (UTC)", "Job", "Tags", "Reason"]
    assert rows[0][1:] == ["vm1", "daily", "catching up: daily missed"]
    assert len(rows) == 100 and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert {row[1] for row in rows} == {"vm1", "vm2"}
    assert result.out.splitlines()[-1].startswith("100 runs, and 19")
    assert " more up to 20" in result.out.splitlines()[-1]

    alone = table(run("plan", "-c", conf, "vm1").out)[1:]
    assert {row[1] for row in alone} == {"vm1"} and len(alone) == 8
    assert alone[1][3].startswith("regular time of ") and "(every 1d" in alone[1][3]


def test_plan_in_json(conf, run, tmp_path):
    result = json.loads(run("-c", conf, "plan", "--json").out)
    assert (result["version"], result["more"], result["failed"]) == (1, 0, [])
    assert len(result["runs"]) in (7 + 7 * 144, 7 + 7 * 144 + 1, 7 + 7 * 144 + 2)
    assert set(result["runs"][0]) == {"time", "job", "tags", "reason"}
    assert result["runs"][0]["reason"].startswith("regular time of often; never backed up before")


def remember(base: Path, **jobs: dict) -> None:
    base.mkdir(exist_ok=True)
    (base / ".scheduler").write_text(json.dumps({"version": 1, "jobs": jobs}))


def test_plan_knows_the_failures_and_when_the_scheduler_first_saw_a_job(conf, run, tmp_path):
    make_revision(tmp_path / "base/vm2", "aaa", 2 * HOUR, "daily, often")
    now = datetime.now(timezone.utc)
    wait = now + 47 * MINUTE
    remember(
        tmp_path / "base",
        vm1={"first_seen": (now - 9 * DAY).isoformat()},
        vm2={"first_seen": (now - 9 * DAY).isoformat(), "failures": 7, "last_error": "x",
             "not_before": wait.isoformat()},
    )  # fmt: skip
    vm1, vm2 = (
        table(run("plan", "-c", conf, "vm1").out)[1],
        table(run("plan", "-c", conf, "vm2").out)[1],
    )
    assert vm1[1:] == ["vm1", "daily,weekly", "its first time has passed"]
    assert abs(datetime.fromisoformat(vm1[0] + "+00:00") - now) < MINUTE
    assert vm2[:2] == [backy.format_time(wait), "vm2"] and "often" in vm2[2]
    assert vm2[3].endswith("; 7 failures in a row")


@pytest.mark.parametrize(
    "kept", [None, [], {"first_seen": 7}, {"first_seen": "x"}, {"failures": 2}]
)
def test_what_is_odd_in_the_memory_of_the_scheduler_changes_no_plan(conf, run, tmp_path, kept):
    before = run("plan", "-c", conf, "vm1").out
    remember(tmp_path / "base", vm1=kept)
    assert run("plan", "-c", conf, "vm1").out == before


def test_a_memory_that_cannot_be_read_is_a_warning(conf, run, tmp_path):
    remember(tmp_path / "base")
    (tmp_path / "base/.scheduler").write_text("{")
    result = run("plan", "-c", conf, "vm1")
    assert result.status == 0 and len(table(result.out)) == 8
    assert "warning: cannot read .scheduler" in result.err and result.err.count("\n") == 1


def test_plan_of_more_than_can_be_counted_says_so(conf, run, monkeypatch):
    monkeypatch.setattr(backy, "COUNTED_RUNS", 150)
    assert run("plan", "-c", conf).out.splitlines()[-1].startswith("100 runs, and more than 150 ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--days", "0"], "no number of days"),
        (["--days", "x"], "no number of days"),
        (["--days", "99999"], "no number of days"),
        (["--simulate", "0d"], "out of range"),
        (["--simulate", "99999999999d"], "no duration"),
        (["--simulate", "999999999w"], "argument --simulate: "),
        (["--simulate", "1y"], "no duration"),
        (["--simulate", "10000d"], "can be simulated"),
        (["vm"], "no job 'vm' (vm"),
        (["\x1b[31m"], "no job '\N{REPLACEMENT CHARACTER}[31m' in "),
        (["\udcff"], "no job"),
    ],
)
def test_plan_refuses_in_a_line(conf, run, words, message):
    result = run("plan", "-c", conf, *words)
    assert result.status == 1 and result.out == ""
    assert message in result.err.splitlines()[-1] or message in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_the_longest_plan_is_bounded(conf, run):
    started = time.process_time()
    result = run("plan", "-c", conf, "--days", "9999")
    assert result.status == 0 and " and more than 100000 more up to 20" in result.out
    assert time.process_time() - started < 15


def test_simulate_prints_what_would_be_there(conf, run, tmp_path):
    make_revision(tmp_path / "base/vm1", "aaa", 50 * HOUR, "manual:first")
    result = run("plan", "-c", conf, "--simulate", "400d", "vm1")
    head, *rows = table(result.out)
    assert head == ["Date (UTC)", "ID", "Tags", "Reason"]
    assert rows[0][1:] == ["aaa", "manual:first", "manual:first"]
    assert rows[-1][1] == "-" and rows[-1][3].startswith("daily 1 of 9")
    assert len(rows) in range(14, 18)
    assert [row[3] for row in rows].count("daily 9 of 9") <= 1
    assert result.out.splitlines()[-1].startswith(f"vm1: {len(rows)} revisions after 400 days with")
    both = run("plan", "-c", conf, "--simulate", "2d")
    assert "vm1: " in both.out and "vm2: " in both.out


def test_simulate_in_json(conf, run):
    (job,) = json.loads(run("plan", "-c", conf, "--simulate", "9d", "vm1", "--json").out)["jobs"]
    assert (job["job"], job["runs"]) == ("vm1", 9)
    assert [one["tags"] for one in job["revisions"]].count(["daily", "weekly"]) >= 1


@pytest.mark.slow
def test_a_year_of_ten_minutes_takes_seconds(conf, run):
    started = time.process_time()
    result = run("plan", "-c", conf, "--simulate", "400d", "vm2")
    assert result.status == 0 and "400 days with 576" in result.out
    assert time.process_time() - started < 10


def test_a_directory_that_cannot_be_read_is_an_error_and_the_rest_is_shown(conf, run, tmp_path):
    (tmp_path / "base/vm2").mkdir(parents=True)
    os.symlink("vm2", tmp_path / "base/vm1")
    for words in ([], ["--simulate", "2d"]):
        result = run("plan", "-c", conf, *words)
        assert result.status == 1 and "vm1 is a symbolic link" in result.err
        assert "often 1 of 18" in result.out or "| vm2 |" in result.out


def test_a_damaged_rev_is_a_warning(conf, run, tmp_path):
    make_revision(tmp_path / "base/vm1", "aaa", HOUR, "daily, weekly")
    (tmp_path / "base/vm1/odd.rev").write_bytes(b"\xff\x00")
    result = run("plan", "-c", conf, "vm1")
    assert result.status == 0 and "vm1: odd.rev is left alone" in result.err
    assert len(table(result.out)) == 8


def test_whoever_may_read_nothing_can_simulate(tmp_path):
    need_root()
    conf = write_conf(tmp_path)
    conf.chmod(0o644)
    (tmp_path / "base/vm1").mkdir(parents=True)
    (tmp_path / "base").chmod(0o700)
    for path in (tmp_path, *list(tmp_path.parents)[:-1]):
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(0o755)
    program = shutil.copy(backy.__file__, tmp_path / "backy.py")
    os.chmod(program, 0o644)
    python = shutil.which("python3", path="/usr/bin:/bin")
    need(python, "no python3 for others")

    def by_nobody(*words: str) -> subprocess.CompletedProcess:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, program]
        return subprocess.run(
            [*command, *words, "-c", str(conf)], capture_output=True, text=True, check=False
        )

    result = by_nobody("plan", "--simulate", "30d", "vm1")
    assert result.returncode == 1 and "Permission denied" in result.stderr
    assert "daily 1 of 9" in result.stdout and "Traceback" not in result.stderr
    shutil.rmtree(tmp_path / "base")
    assert by_nobody("plan", "--simulate", "30d", "vm1").returncode == 0
    assert by_nobody("plan").returncode == 0


# -- tags of a backup ---------------------------------------------------------


@pytest.fixture
def scheduled(plain_job, source):
    (plain_job / "config").chmod(0o600)
    (plain_job / "config").write_text(
        "schedule: {daily: {interval: 1d, keep: 3}, weekly: {interval: 7d, keep: 2}}\n"
        f"source: {{type: file, filename: {source}}}\n"
    )
    return plain_job


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("dayly", "no tag 'dayly' in its schedule (daily?)"),
        ("daily,weakly", "no tag 'weakly' in its schedule (weekly?)"),
        ("manual", "no tag 'manual' in its schedule (manual:NAME?)"),
        ("xyz", "no tag 'xyz' in its schedule\n"),
        ("Daily", "no tag 'Daily' in its schedule (daily?)"),
    ],
)
def test_a_tag_of_no_schedule_is_refused(scheduled, run, tags, message):
    before = set(os.listdir(scheduled))
    result = run("-b", scheduled, "backup", tags)
    assert result.status == 1 and f"backy: job: {message}" in result.err
    assert "hint: its tags are daily, weekly and manual: with anything behind it" in result.err
    assert set(os.listdir(scheduled)) == before


@pytest.mark.parametrize(
    "words", [["daily"], ["weekly,daily"], ["manual:x,daily"], ["-f", "xyz"], ["--force", "manual"]]
)
def test_tags_of_the_schedule_and_manual_ones_are_taken(scheduled, run, words):
    assert run("-b", scheduled, "backup", *words).status == 0


def test_without_a_schedule_any_tag_is_taken(plain_job, run):
    assert run("-b", plain_job, "backup", "xyz").status == 0
