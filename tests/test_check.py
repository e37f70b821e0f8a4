# SPDX-License-Identifier: GPL-3.0-or-later
"""Chapter Check: what monitoring is told, and that it is never told OK without reason."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import PROGRAM, backy_process, contents, need, need_root

import backy

JOBS = "{schedule: default, source: {type: file, filename: /image}}"


def ago(**span: float) -> str:
    return f"{datetime.now(timezone.utc) - timedelta(**span):%Y-%m-%d %H:%M:%S} UTC"


def entry(name: str, **changed: object) -> dict:
    """An entry as the scheduler writes it, of a job in the best of health."""
    values = {
        "job": name,
        "sla": "OK",
        "status": "waiting for deadline",
        "last_time": ago(hours=2),
        "last_tags": "daily",
        "last_duration": "12.3 s",
        "next_time": ago(hours=-22),
        "next_tags": "daily",
        "failures": 0,
        "last_error": "-",
        "overdue_since": "-",
        "sla_limit": 129600.0,
        "first_seen": ago(days=9),
        "trust": "trusted",
        "running_since": "-",
        "stuck": False,
        "problem": "-",
    }
    return {**values, **changed}


def scheduler(**changed: object) -> dict:
    values = {
        "version": "1.0",
        "pid": 1,
        "started": ago(days=3),
        "written": ago(seconds=3),
        "worker_limit": 3,
        "running": 0,
        "queued": 0,
        "stuck": 0,
        "reload_error": "-",
        "base_dir": "/srv/backy",
        "free": 600 << 30,
        "size": 1000 << 30,
        "status_interval": 30,
    }
    return {**values, **changed}


class Place:
    """A configuration with its status file."""

    def __init__(self, path, run) -> None:
        self.run = run
        self.base = path / "base"
        self.base.mkdir()
        self.conf, self.status = path / "backy.conf", self.base / "status"
        self.configure(["a", "b"])

    def configure(self, names, lines: str = "") -> None:
        jobs = "".join(f"    {name}: {JOBS}\n" for name in names)
        self.conf.write_text(
            f"global:\n    base-dir: {self.base}\n{lines}"
            "schedules:\n    default:\n        daily: {interval: 1d, keep: 9}\n"
            f"jobs:\n{jobs}"
        )

    def write(self, *entries: dict, **changed: object) -> None:
        rows = [dict(one) for one in entries]
        if rows:
            rows[0]["scheduler"] = scheduler(**changed)
        self.status.write_text(backy.format_yaml(rows))

    def check(self, *words: object):
        return self.run("check", "-c", self.conf, *words)

    def first(self, *words: object) -> tuple[int, str]:
        """Exit status, and the first line without figures."""
        done = self.check(*words)
        assert done.err == ""
        return done.status, done.out.splitlines()[0].partition(" | ")[0]

    def rest(self, *words: object) -> list[str]:
        return self.check(*words).out.splitlines()[1:]


@pytest.fixture
def place(tmp_path, run):
    return Place(tmp_path, run)


# ==== As in 2.x ==============================================================


def test_all_in_time_is_ok(place):
    place.write(*(entry(f"test{number:02}") for number in range(9)))
    assert place.check().out.startswith("OK: 9 jobs within SLA | jobs=9;;;0 overdue=0;0;0;0;9 ")
    assert place.first() == (0, "OK: 9 jobs within SLA")
    assert place.rest() == []


def test_late_jobs_are_named_and_explained(place):
    last_time = ago(hours=47.9)
    place.write(
        entry("test00"),
        entry("test01", sla="TOO OLD", last_time=last_time, failures=3, last_error="rbd: x"),
        entry("test07", sla="TOO OLD", last_time="-", first_seen=ago(hours=50)),
    )
    assert place.first()[0] == 2
    assert place.first()[1].startswith("CRITICAL: 2 jobs not within SLA: test01, test07")
    assert place.rest() == [
        f"test01 (last time: {last_time}): 47.9 h ago, limit 36.0 h; "
        "3 failures in a row; last error: rbd: x",
        "test07 (last time: -): no backup yet, first seen 50.0 h ago",
    ]


def test_missing_status_file_is_unknown(place):
    assert place.first() == (3, f"UNKNOWN: No status file found at {place.status}")


def set_age(path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


@pytest.mark.parametrize(
    ("interval", "age", "expected"),
    [
        (30, 290, (0, "OK: 1 jobs within SLA")),
        (30, 302, (2, "CRITICAL: Status file is older than 5 minutes")),
        (60, 590, (0, "OK: 1 jobs within SLA")),
        (60, 602, (2, "CRITICAL: Status file is older than 10 minutes")),
        (31, 312, (2, "CRITICAL: Status file is older than 310 seconds")),
        (1, 290, (0, "OK: 1 jobs within SLA")),
        (30, -200, (0, "OK: 1 jobs within SLA")),
        (30, -3600, (3, "UNKNOWN: Status file is from the future (60 min): a clock is wrong")),
    ],
)
def test_status_file_must_be_fresh(interval, age, expected, place):
    place.configure(["a"], f"    status-interval: {interval}\n")
    place.write(entry("a"))
    set_age(place.status, age)
    assert place.first() == expected


def test_stale_comes_before_late(place):
    place.write(entry("a", sla="TOO OLD"))
    set_age(place.status, 400)
    assert place.check().out == "CRITICAL: Status file is older than 5 minutes\n"


def test_old_status_that_was_touched_or_copied_is_stale(place):
    place.write(entry("a"), written=ago(minutes=6))
    assert place.first() == (2, "CRITICAL: Status file is older than 5 minutes")
    place.write(entry("a"), written=ago(hours=-2))
    assert place.first()[0] == 3


COW = """\
- {job: test01, last_duration: 0.0 s, last_tags: 'daily,weekly', last_time: '2015-11-22
    04:13:36 UTC', next_tags: daily, next_time: '2026-11-22 20:22:53 UTC', sla: OK,
  status: waiting}
- {job: test02, last_duration: '-', last_tags: '-', last_time: '-', next_tags: '-',
  next_time: '-', sla: OK, status: ''}
"""
FIVE = """\
- job: test01
  last_duration: 0.25
  last_tags: daily
  last_time: 2015-11-22 04:13:36.123456+00:00
  manual_tags: ''
  next_tags: null
  next_time: null
  quarantine_reports: 0
  sla: OK
  sla_overdue: 0
  status: running (fast)
- job: 'on'
  last_duration: null
  last_tags: null
  last_time: null
  manual_tags: 'manual:x'
  next_tags: daily
  next_time: 2026-11-22 20:22:53+00:00
  quarantine_reports: 0
  sla: OK
  sla_overdue: 0
  status: waiting for worker slot (slow)
"""


@pytest.mark.parametrize("text", [COW, FIVE, f"---\n# {{}}\n{FIVE}"], ids=["cow", "2.5", "head"])
def test_status_of_2x_is_understood(text, place):
    place.status.write_text(text)
    assert place.first() == (0, "OK: 2 jobs within SLA")
    place.status.write_text(text.replace("sla: OK", "sla: TOO OLD", 1))
    assert place.first() == (2, "CRITICAL: 1 jobs not within SLA: test01")
    assert place.rest()[0].startswith("test01 (last time: 2015-11-22 04:13:36 UTC): ")
    place.status.write_text(text.replace("quarantine_reports: 0", "quarantine_reports: 2", 1))
    assert place.first()[0] == (1 if "quarantine" in text else 0)


def test_workers_of_25_are_counted(place):
    place.status.write_text(FIVE)
    assert " running=1;;;0 queued=1;;;0 " in place.check().out
    assert place.first("on") == (0, "OK: 1 jobs within SLA")


def test_status_in_json_is_understood(place):
    place.status.write_text(json.dumps([entry("a"), entry("b", sla="TOO OLD")]))
    assert place.first() == (2, "CRITICAL: 1 jobs not within SLA: b")


def test_own_entries_are_read_as_by_the_parser(place):
    odd = {"last_error": "it's: {x}, [y] # \x1b é", "problem": "'", "next_tags": "a,b"}
    place.write(entry("a"), entry("on"), entry("0123", **odd), entry("null", problem="it's, so"))
    text = place.status.read_text()
    assert backy.parse_status(text) == backy.plain_values(backy.parse_yaml(text))
    folded = re.sub(r", (?=next|status)", ",\n    ", text)
    assert backy.parse_status(folded) == backy.parse_status(text)


# ==== Unknown ================================================================


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged"),
        ("[]", "the status file has no jobs"),
        ("x", "is damaged"),
        ("{}", "is damaged"),
        ("a: [", "is damaged: 1:4: "),
        ("- {job: a, sla: OK}\n- {job: b, sla: O", "is damaged: 2:"),
        ("- {job: a, sla: OK}\n- {job: b}\n", "is damaged: an entry has no job or no sla"),
        ("- {job: a, sla: OK}\n- {job: b, sla: null}\n", "is damaged: an entry has"),
        ("- {job: a, sla: OK}\n- foo\n", "is damaged: an entry has no job or no sla"),
        ("- {job: a, sla: OK, sla: OK}\n", "duplicate key"),
        ("- {job: a, sla: OK}\n- {job: b, sla: 'O\x07K'}\n", "is damaged: 2:1: control character"),
        ("- job: a\nsla: OK\n", "is damaged: 2:1: "),
        ("- {job: a, sla: OK, ", "is damaged: 1:3: "),
        ("- " * 5000 + "x\n", "is damaged"),
        ("- " + "[" * 5000 + "\n", "is damaged"),
        ("- &a [x, x]\n- &b [*a, *a]\n", "is damaged"),
        ("\0\0\0\0", "is damaged"),
        ("- {job: a, sla: \x1b[2JOK}\n", "is damaged"),
        ("x" * (2 << 20), "is damaged"),
    ],
    ids=lambda one: repr(one[:20]),
)
def test_damaged_status_is_unknown(text, words, place):
    place.status.write_text(text)
    status, line = place.first()
    assert status == 3
    assert line.startswith("UNKNOWN: ")
    assert words in line


def test_status_that_is_not_text_is_unknown(place):
    place.status.write_bytes(b"- {job: \xff\xfe, sla: OK}\n")
    assert place.first() == (3, f"UNKNOWN: {place.status} is damaged: it is not UTF-8")


@pytest.mark.parametrize("kind", ["fifo", "directory", "huge", "loop", "socket"])
def test_status_that_is_no_file_is_unknown_at_once(kind, place, monkeypatch):
    if kind == "fifo":
        os.mkfifo(place.status)
    elif kind == "directory":
        place.status.mkdir()
    elif kind == "loop":
        place.status.symlink_to(place.status)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(place.base)  # the name of a socket is short
            listener.bind("status")
    else:
        place.status.touch()
        os.truncate(place.status, 1 << 40)
    started = time.monotonic()
    assert place.first("-t", "60")[0] == 3
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("words", [["--nonsense"], ["-w", "1x"], ["-C", "200%"], ["-t", "0"]])
def test_wrong_usage_is_unknown(words, place):
    place.write(entry("a"))
    done = place.check(*words)
    assert (done.status, done.err) == (3, "")
    assert done.out.startswith("UNKNOWN: ")
    assert "|" not in done.out
    assert place.run(*words, "check").status == (3 if words == ["--nonsense"] else 1)


def test_wrong_usage_of_other_commands_is_status_one(run):
    for words in (["status", "--nonsense"], ["--nonsense"], ["--nonsense", "status"], ["chek"]):
        done = run(*words)
        assert (done.status, done.out) == (1, "")
    assert run("-r", "1", "check").status == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["c"], "UNKNOWN: no job 'c' in the status file"),
        (["web0"], "UNKNOWN: no job 'web0' in the status file (web01?)"),
        (["--match", "x"], "UNKNOWN: no job matches 'x'"),
        (["--match", "[|"], "UNKNOWN: '[/' is no regular expression: unterminated character set"),
        (["web01", "\x1b|"], "UNKNOWN: no job '\ufffd/' in the status file"),
    ],
)
def test_job_that_is_not_there_is_unknown(words, line, place):
    place.write(entry("web01"), entry("other"))
    status, first = place.first(*words)
    assert (status, first[: len(line)]) == (3, line)


def test_pattern_without_end_is_unknown_in_time(place):
    place.write(entry("a" * 40 + "!"))
    started = time.monotonic()
    assert place.first("--match", "(a+)+$", "-t", "1") == (3, "UNKNOWN: no answer within 1 seconds")
    assert time.monotonic() - started < 30


def test_what_no_signal_reaches_is_unknown_in_time(place, monkeypatch):
    """As of a file server that is gone."""
    child = place.base / "child"
    null = os.stat("/dev/null")

    def hang(_):
        # nothing of it keeps the pipe of the caller open
        assert all(os.path.samestat(os.fstat(fd), null) for fd in range(3))
        child.write_text(str(os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(60)

    monkeypatch.setattr(backy, "status_text", hang)
    started = time.monotonic()
    assert place.first("-t", "1") == (3, "UNKNOWN: no answer within 1 seconds")
    assert time.monotonic() - started < 30
    pid = int(child.read_text())
    with contextlib.suppress(ChildProcessError):  # or it is gone already
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL  # it is not left to itself


@pytest.mark.root
def test_hung_file_system_is_unknown_in_time(hung_directory, place):
    place.configure(["a"], f"    status-file: {hung_directory}/status\n")
    started = time.monotonic()
    done = backy_process("check", "-c", place.conf, "-t", "1")
    assert (done.returncode, done.stdout) == (3, "UNKNOWN: no answer within 1 seconds\n")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "error", [RuntimeError("x|y\n"), MemoryError(), RecursionError(), OSError()]
)
def test_defect_is_unknown(error, place, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(backy, "status_text", fail)
    done = place.check()
    assert done.status == 3
    assert re.fullmatch(r"UNKNOWN: check failed: \w+: [^|\n]*\n", done.out)


def test_death_is_unknown(place, monkeypatch):
    monkeypatch.setattr(backy, "status_text", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert place.first() == (3, "UNKNOWN: check ended without an answer")


def test_monitoring_that_gives_up_is_told_unknown(place):
    os.mkfifo(place.status)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import backy\n"
        "backy.status_text = lambda _: time.sleep(60)\n"
        "sys.exit(backy.main(['check', '-c', sys.argv[2]]))"
    )
    words = [sys.executable, "-c", code, str(PROGRAM.parent), str(place.conf)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        end = time.monotonic() + 20
        while not open(children).read() and time.monotonic() < end:
            time.sleep(0.01)
        process.terminate()
        assert process.stdout.read() == "UNKNOWN: check failed: ended by SIGTERM\n"
    assert process.returncode == 3


@pytest.mark.parametrize(
    "text", ["", "global: [", "\t", "jobs: {a: {schedule: x}}", "global: {status-interval: x}\n"]
)
def test_bad_configuration_is_unknown(text, place):
    place.write(entry("a"))
    place.conf.write_text(text)
    status, line = place.first()
    assert status == 3
    assert line.startswith("UNKNOWN: ")
    assert str(place.conf) in line
    assert len(place.check().out.splitlines()) == 1


def test_missing_configuration_is_unknown(place):
    place.conf.unlink()
    assert place.first() == (3, f"UNKNOWN: {place.conf}: No such file or directory")


def test_closed_output_is_unknown(place):
    place.write(entry("a"))
    ours, theirs = os.pipe()
    os.close(ours)
    assert (
        backy_process("check", "-c", place.conf, stdout=theirs, capture_output=False).returncode
        == 3
    )
    os.close(theirs)


# ==== Reasons ================================================================


@pytest.mark.parametrize(
    ("changed", "status", "text"),
    [
        ({"failures": 2}, 0, "OK: 2 jobs within SLA"),
        ({"failures": 3}, 1, "WARNING: 1 jobs failing: b"),
        ({"trust": "verified"}, 0, "OK: 2 jobs within SLA"),
        ({"trust": "distrusted"}, 1, "WARNING: 1 jobs with a distrusted last revision: b"),
        ({"problem": "metadata damaged"}, 1, "WARNING: 1 jobs with a problem: b"),
        ({"stuck": True}, 2, "CRITICAL: 1 jobs stuck: b"),
        ({"status": "stuck"}, 2, "CRITICAL: 1 jobs stuck: b"),
        (
            {"failures": 4, "sla": "TOO OLD", "trust": "distrusted"},
            2,
            "CRITICAL: 1 jobs not within SLA: b; 1 jobs failing: b; "
            "1 jobs with a distrusted last revision: b",
        ),
    ],
)
def test_reasons_of_a_job(changed, status, text, place):
    place.write(entry("a"), entry("b", **changed))
    assert place.first() == (status, text)
    assert len(place.rest()) == bool(status)


@pytest.mark.parametrize(
    ("changed", "status", "text"),
    [
        ({"free": 60 << 30}, 0, "OK: 1 jobs within SLA"),
        ({"free": 40 << 30}, 1, "WARNING: free space 40.00 GiB is less than 5%"),
        ({"free": 10 << 30}, 2, "CRITICAL: free space 10.00 GiB is less than 2%"),
        ({"stuck": 1}, 2, "CRITICAL: 1 processes of backups are stuck"),
        (
            {"reload_error": "backy.conf:3:1: a|b\n"},
            1,
            "WARNING: the changed configuration is not in use: backy.conf:3:1: a/b\ufffd",
        ),
    ],
)
def test_reasons_of_the_whole(changed, status, text, place):
    place.write(entry("a"), **changed)
    assert place.first() == (status, text)
    assert place.first("a") == (0, "OK: 1 jobs within SLA")


def test_worst_reason_comes_first(place):
    place.write(entry("a", failures=3), free=1)
    assert place.first() == (2, "CRITICAL: free space 1 Byte is less than 2%; 1 jobs failing: a")


def test_thresholds_are_shares_or_sizes_and_come_from_the_configuration(place):
    place.write(entry("a"))
    assert place.first("-w", "70%")[0] == 1
    assert place.first("-w", "59.9%")[0] == 0
    assert place.first("-w", "601G")[0] == 1
    assert place.first("-w", "599G", "-C", "0")[0] == 0
    assert place.first("--warning", "80%", "--critical", "601G")[0] == 2
    assert place.first("a", "-C", "601G")[0] == 2
    place.configure(["a"], "    space-warning: 61%\n")
    assert place.first() == (1, "WARNING: free space 600.00 GiB is less than 61%")
    assert place.first("-w", "1G")[0] == 0


def test_space_that_is_asked_for_and_not_known_is_unknown(place):
    place.status.write_text(COW)
    assert place.first("-w", "10%") == (3, "UNKNOWN: the status file has no free space")


def test_jobs_are_chosen_by_name_and_by_pattern(place):
    place.write(entry("a1"), entry("a2", sla="TOO OLD"), entry("b", failures=5))
    assert place.first("a1") == (0, "OK: 1 jobs within SLA")
    assert place.first("a1", "b") == (1, "WARNING: 1 jobs failing: b")
    assert place.first("--match", "^a") == (2, "CRITICAL: 1 jobs not within SLA: a2")
    assert place.first("b", "--match", "1$") == (1, "WARNING: 1 jobs failing: b")
    assert " jobs=2;;;0 " in place.check("b", "a1").out


def test_refused_configuration_is_a_warning_as_long_as_the_scheduler_runs(place):
    place.write(entry("a"), reload_error="backy.conf:9: no")
    for line in ("  x: y", "\tx", "jobs: {c: {schedule: none}}", "include: [/nothing/there]"):
        place.configure(["a"], f"{line}\n")
        assert place.first() == (
            1,
            "WARNING: the changed configuration is not in use: backy.conf:9: no",
        ), line
    place.configure(["a"], "    space-critical: 90%\n    x: y\n")
    assert place.first()[0] == 2
    set_age(place.status, 400)
    assert place.first()[0] == 3
    place.write(entry("a"))
    assert place.first()[0] == 3


def test_job_that_the_scheduler_never_took_up_is_a_warning_after_an_hour(place):
    place.write(entry("a"))
    place.configure(["a", "c", "d"])
    assert place.first() == (0, "OK: 1 jobs within SLA")
    set_age(place.conf, 3700)
    assert place.first() == (1, "WARNING: 2 jobs not known to the scheduler, reload it: c, d")


def test_verbose_describes_all_jobs(place):
    last_time = ago(hours=2)
    place.write(entry("a", last_time=last_time), entry("b", last_time=last_time))
    assert place.rest("-v") == [
        f"{name} (last time: {last_time}): 2.0 h ago, limit 36.0 h" for name in "ab"
    ]


# ==== Form ===================================================================


def test_output_is_bounded_and_says_what_is_left_out(place):
    error = "| \x1b[2J\u202e" + "x" * 400
    rows = [
        entry(f"{'long' * 25}{number:04}", sla="TOO OLD", last_error=error) for number in range(99)
    ]
    place.write(*rows, reload_error=error)
    done = place.check()
    assert len(done.out.encode()) <= 8192
    first, *rest = done.out.splitlines()
    assert len(first) < 1200
    assert re.search(r", \.\.\. and 9\d more;", first)
    assert re.fullmatch(r"\.\.\. and \d+ more", rest[-1])
    shown = len(rest) - 1
    assert rest[-1] == f"... and {99 - shown} more"
    assert done.out.count("|") == 1
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.out) is None


def test_json_says_the_same(place):
    place.write(entry("a"), entry("b", sla="TOO OLD", failures=3))
    done = place.check("--json")
    assert done.status == 2
    said = json.loads(done.out)
    assert (said["version"], said["state"], said["status"]) == (1, "CRITICAL", 2)
    assert said["summary"] == "CRITICAL: 1 jobs not within SLA: b; 1 jobs failing: b"
    assert [one["jobs"] for one in said["findings"]] == [["b"], ["b"]]
    assert [one["job"] for one in said["jobs"]] == ["a", "b"]
    assert said["jobs"][1]["failures"] == 3
    place.status.unlink()
    done = place.check("--json")
    assert (done.status, json.loads(done.out)["state"]) == (3, "UNKNOWN")


# ==== Manners ================================================================


def test_nothing_is_written(place, tmp_path):
    place.write(entry("a"))
    before = contents(place.base), contents(tmp_path)
    assert place.run("-l", tmp_path / "log", "check", "-c", place.conf).status == 0
    assert place.run("-v", "-b", tmp_path / "none", "check", "-c", place.conf).status == 0
    assert (contents(place.base), contents(tmp_path)) == before


@pytest.fixture
def open_place(run):
    """A place that anybody can reach, which pytest's own directories are not."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o711)
        yield Place(Path(path), run)


@pytest.mark.root
def test_nobody_can_check(open_place):
    need_root()
    place = open_place
    place.write(entry("a"))
    place.status.chmod(0o644)
    place.conf.chmod(0o644)
    place.base.chmod(0o711)
    python = "/usr/bin/python3"
    need(os.access(python, os.X_OK), f"no {python} on this host")
    program = place.base / "backy.py"
    program.write_bytes(PROGRAM.read_bytes())
    program.chmod(0o644)
    words = [python, "-I", program, "check", "-c", place.conf]

    def drop() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def check() -> tuple[int, str]:
        done = subprocess.run(
            list(map(str, words)), preexec_fn=drop, env={}, capture_output=True, text=True, cwd="/"
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.partition(" | ")[0]

    assert check() == (0, "OK: 1 jobs within SLA")
    place.status.chmod(0o600)
    assert check() == (3, f"UNKNOWN: cannot read {place.status}: Permission denied\n")
    place.conf.chmod(0o600)
    assert check() == (3, f"UNKNOWN: {place.conf}: Permission denied\n")


@pytest.mark.slow
def test_ten_thousand_jobs_are_checked_in_seconds(place):
    place.write(*(entry(f"vm{number:05}") for number in range(10_000)))
    assert place.status.stat().st_size > 1 << 20
    started = time.monotonic()
    assert place.first() == (0, "OK: 10000 jobs within SLA")
    assert time.monotonic() - started < 5
