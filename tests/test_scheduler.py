# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon as a process of its own, with real backups, and what may befall it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from conftest import COMPILED, PROGRAM, MiB, contents, need_root, noise

import backy

ROOT = PROGRAM.parent
REAL_RUN = int(os.environ.get("BACKY_REAL_RUN", "40"))  # seconds; 120 to be sure
QUICK = "{tick: {interval: 2s, keep: 3}, tock: {interval: 9s, keep: 2}}"
DAILY = "{daily: {interval: 1d, keep: 3}}"

# Replaces the gate at which the command line of a child is built.
FAKE = """
import sys
sys.path.insert(0, {place!r})
import backy
backy.child_command = lambda directory, *words: [sys.executable, "-c", {child!r}, directory, *words]
{more}
sys.exit(backy.main(sys.argv[1:]))
"""
# A child that makes a revision by the real program, once it may.
SLOW_CHILD = f"""
import os, subprocess, sys, time
directory, *words = sys.argv[1:]
if words[0] == "backup":
    os.close(os.open(directory + "/begun", os.O_CREAT | os.O_WRONLY))
    while not os.path.exists(directory + "/go-on"):
        time.sleep(0.02)
sys.exit(subprocess.call([sys.executable, "-I", {str(COMPILED)!r}, "-b", directory, *words]))
"""


class Daemon:
    """A base directory, its configuration, and the scheduler that works on it."""

    def __init__(self, top: Path) -> None:
        self.top, self.base = top, top / "base"
        self.config, self.status_file = top / "backy.conf", self.base / "status"
        self.base.mkdir()
        self.process: subprocess.Popen | None = None
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.settings: dict[str, object] = {"worker-limit": 2, "status-interval": 1}
        self.schedule, self.jobs = DAILY, {}

    def add(self, *names: str, size: int = 100_000) -> None:
        for name in names:
            self.jobs[name] = self.top / f"{name}.img"
            self.jobs[name].write_bytes(noise(size, len(self.jobs)))

    def configure(self, **settings: object) -> None:
        self.settings.update({key.replace("_", "-"): value for key, value in settings.items()})
        lines = ["global:", "  telnet-addrs: 127.0.0.1"]
        self.settings.setdefault("base-dir", self.base)
        lines += ["  telnet-port: 0"] if "telnet-port" not in self.settings else []
        lines += [f"  {key}: {value}" for key, value in self.settings.items()]
        lines += [f"schedules: {{usual: {self.schedule}}}", "jobs:" if self.jobs else "jobs: {}"]
        lines += [
            f"  {name}: {{schedule: usual, source: {{type: file, filename: {image}}}}}"
            for name, image in self.jobs.items()
        ]
        self.config.write_text("\n".join(lines) + "\n")
        self.config.chmod(0o600)

    def make_overdue(self) -> None:
        """Every job was first seen days ago, so it runs at once, and then not before tomorrow."""
        long_ago = (datetime.now(backy.UTC) - timedelta(days=3)).isoformat()
        memory = {"version": 1, "jobs": {name: {"first_seen": long_ago} for name in self.jobs}}
        (self.base / ".scheduler").write_text(json.dumps(memory))

    def start(self, *words: object, fake: str = "", more: str = "", **options) -> None:
        self.configure()
        program = [sys.executable, str(COMPILED)]
        if fake or more:
            child = fake or SLOW_CHILD
            text = FAKE.format(place=str(COMPILED.parent), child=child, more=more)
            (self.top / "fake.py").write_text(text)
            program = [sys.executable, str(self.top / "fake.py")]
        command = [*(words or program), "scheduler", "-c", str(self.config)]
        self.lines = []
        self.process = subprocess.Popen(
            [str(word) for word in command], stderr=subprocess.PIPE, text=True, **options
        )
        threading.Thread(target=self.listen, args=(self.process.stderr,), daemon=True).start()

    def start_child(self, child: str, *names: str) -> None:
        """Start with such children, and wait until those of these jobs, or of vm1, have begun."""
        self.start(fake=child)
        for name in names or ("vm1",):
            self.until((self.base / name / "begun").exists)

    def listen(self, stream) -> None:
        for line in stream:
            with self.news:
                self.lines.append(line.rstrip("\n"))
                self.news.notify_all()

    def wait_for(self, pattern: str, count: int = 1, timeout: float = 60) -> str:
        """The line that matches for the `count`-th time."""

        def found() -> str | None:
            lines = [line for line in self.lines if re.search(pattern, line)]
            return lines[count - 1] if len(lines) >= count else None

        with self.news:
            assert self.news.wait_for(found, timeout), (pattern, self.lines)
            return found()

    def until(self, condition, timeout: float = 60):
        """Wait for what nobody reports; its value."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(FileNotFoundError):
                value = condition()
                if value:
                    return value
            assert time.monotonic() < deadline, (self.lines, self.status_file.read_text())
            time.sleep(0.05)

    def status(self) -> dict[str, dict]:
        return {row["job"]: row for row in yaml.safe_load(self.status_file.read_text())}

    def row(self, job: str, **expected: object) -> dict:
        """The job's entry of the status file, once it is as expected."""

        def is_so() -> object:
            row = self.status()[job]
            return all(row[key] == value for key, value in expected.items()) and row

        return self.until(is_so)

    def children(self) -> list[int]:
        return [pid for _, _, pid, _ in backy.find_children(str(self.base))]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send(number)
        return self.process.wait(40)

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        for pid in self.children() if self.base.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def daemon(xfs):
    one = Daemon(xfs)
    yield one
    one.close()


def complete(job: Path) -> list[backy.Revision]:
    with backy.Repository.open(str(job)) as repository:
        return repository.complete


# -- the ordinary run -------------------------------------------------------------


def test_a_backup_is_made_expired_shown_and_the_end_is_clean(daemon):
    daemon.add("vm1", "vm2")
    daemon.base.rename(daemon.top / "elsewhere")
    daemon.base.symlink_to("elsewhere")
    daemon.make_overdue()
    daemon.start("./backy.py", cwd=ROOT)
    daemon.wait_for("finished backup", 2)
    row = daemon.row("vm1", status="waiting for deadline", running_since="-")
    assert daemon.stop() == 0
    assert daemon.lines[-1] == "scheduler ended"
    image = daemon.base / "vm1/last"
    assert image.read_bytes() == daemon.jobs["vm1"].read_bytes()
    assert sorted(os.listdir(daemon.base)) == [".lock", ".scheduler", "status", "vm1", "vm2"]
    modes = {name: (daemon.base / name).stat().st_mode & 0o777 for name in os.listdir(daemon.base)}
    expected = {".lock": 0o600, ".scheduler": 0o600, "status": 0o644, "vm1": 0o700, "vm2": 0o700}
    assert modes == expected
    assert (daemon.base / "vm1/config").stat().st_mode & 0o777 == 0o600
    log = (daemon.base / "vm1/backy.log").read_text()
    assert [line.split()[-1] for line in log.splitlines() if "$ backy" in line] == [
        "daily", "expire"
    ]  # fmt: skip
    assert (row["sla"], row["last_tags"], row["next_tags"]) == ("OK", "daily", "daily")
    assert (row["failures"], row["last_error"], row["trust"]) == (0, "-", "verified")
    assert (row["sla_limit"], row["stuck"], row["problem"]) == (129600.0, False, "-")
    about = daemon.status()["vm1"]["scheduler"]
    assert (about["pid"], about["worker_limit"], about["running"]) == (daemon.process.pid, 2, 0)
    assert about["size"] > about["free"] > 0
    assert about["base_dir"] == str(daemon.base)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["python3 backy.py", "relative zipapp", "path of the zipapp"])
def test_it_works_however_it_is_started(daemon, tmp_path, way):
    archive = tmp_path / "bin/backy"
    subprocess.run([sys.executable, ROOT / "tools/build.py", archive], check=True)
    words, directory = {
        "python3 backy.py": ([sys.executable, "backy.py"], ROOT),
        "relative zipapp": (["bin/backy"], tmp_path),
        "path of the zipapp": ([archive], "/"),
    }[way]
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start(*words, cwd=directory)
    daemon.wait_for("vm1: finished backup")
    daemon.row("vm1", status="waiting for deadline")
    assert daemon.stop(signal.SIGINT) == 0
    assert "ERROR" not in (daemon.base / "vm1/backy.log").read_text()


def test_a_child_gets_nothing_of_ours_but_what_it_needs(daemon):
    spy = (
        "import json, os, sys; json.dump([dict(os.environ), os.getcwd(), os.getsid(0), os.getpid(),"
        "os.stat(0).st_rdev, sorted(map(int, os.listdir('/proc/self/fd')))],"
        "open(sys.argv[1] + '/spied', 'w'))"
    )
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start(
        fake=spy,
        env={**os.environ, "LD_PRELOAD": "", "PYTHONPATH": "/tmp", "NOTIFY_SOCKET": "@x",
             "BACKY_RBD": "/opt/rbd", "BACKY_CP": "cp", "CEPH_ARGS": "--id backy"},
    )  # fmt: skip
    daemon.wait_for("vm1: it has ended without a new revision")
    environment, directory, session, pid, stdin, fds = json.loads(
        (daemon.base / "vm1/spied").read_text()
    )
    allowed = {*backy.PASSED_ON, "PATH", "BACKY_JOB", "BACKY_BASE", "BACKY_RBD", "LC_CTYPE"}
    assert set(environment) <= allowed
    assert environment["BACKY_JOB"] == str(daemon.base / "vm1")
    assert environment["PATH"] == backy.CHILD_PATH
    assert environment["BACKY_RBD"] == "/opt/rbd"
    assert environment["CEPH_ARGS"] == "--id backy"
    assert (directory, session, stdin) == ("/", pid, os.stat("/dev/null").st_rdev)
    assert fds[:3] == [0, 1, 2]
    assert len(fds) == 4, "and the one that lists them"


def test_the_config_of_a_job_is_written_when_it_differs(tmp_path):
    base_fd = os.open(tmp_path, os.O_RDONLY)
    directory = tmp_path / "vm1"
    inodes = []
    for config in (b"a: 1\n", b"a: 1\n", b"a: 2\n"):
        log_fd, holder = backy.prepare_directory(str(directory), config, base_fd)
        os.close(log_fd)
        assert (directory / "config").read_bytes() == config
        assert holder == ""
        inodes.append((directory / "config").stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]
    os.close(base_fd)


def test_nothing_is_written_where_the_base_directory_is_gone(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    base_fd = os.open(base, os.O_RDONLY)
    base.rename(tmp_path / "moved")
    base.mkdir()
    with pytest.raises(backy.BackyError, match="is not the directory it was"):
        backy.prepare_directory(str(base / "vm1"), b"", base_fd)
    assert os.listdir(base) == []
    os.close(base_fd)


def test_the_command_of_a_child_is_absolute_and_isolated():
    words = backy.child_command("/srv/backy/vm1", "backup", "daily")
    assert words[:4] == [sys.executable, "-I", "-S", str(PROGRAM)]
    assert words[4:] == [
        "-b", "/srv/backy/vm1", "-l", "/srv/backy/vm1/backy.log", "backup", "daily"
    ]  # fmt: skip


def test_a_second_scheduler_is_told_who_the_first_is(daemon):
    daemon.add("vm1")
    daemon.start()
    daemon.wait_for("scheduler started")
    second = subprocess.run(
        [sys.executable, COMPILED, "scheduler", "-c", daemon.config], capture_output=True, text=True
    )
    assert second.returncode == 1
    assert f"pid {daemon.process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert daemon.stop() == 0


@pytest.mark.parametrize("break_it, words", [
    (lambda daemon: daemon.config.write_text("jobs: {a: {schedule: x}}\nfoo: 1\n"), "3 errors"),
    (lambda daemon: shutil.rmtree(daemon.base), "cannot open base-dir"),
])  # fmt: skip
def test_what_cannot_work_ends_at_once_with_the_reason(daemon, break_it, words):
    daemon.add("vm1")
    daemon.configure()
    break_it(daemon)
    done = subprocess.run(
        [sys.executable, COMPILED, "scheduler", "-c", daemon.config], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# -- what goes wrong ----------------------------------------------------------------


def test_faults_of_one_job_are_its_own(daemon):
    daemon.add("gone", "file", "good", "rot")
    daemon.jobs["gone"].unlink()
    (daemon.base / "file").write_text("in the place of a directory\n")
    (daemon.base / "rot").mkdir()
    (daemon.base / "rot/abc.rev").write_text("{{{ no metadata")
    daemon.make_overdue()
    daemon.start()
    daemon.wait_for("good: finished backup")
    daemon.wait_for("rot: finished backup")
    gone = daemon.row("gone", failures=1)
    assert "No such file or directory (exit status 1)" in gone["last_error"]
    assert gone["status"] == "failed"
    assert gone["sla"] == "TOO OLD"
    due = datetime.strptime(gone["next_time"], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=backy.UTC)
    assert timedelta(0) < due - datetime.now(backy.UTC) < timedelta(minutes=2)
    assert daemon.row("file", failures=1)["last_error"]
    assert "abc.rev" in daemon.row("rot", failures=0, status="waiting for deadline")["problem"]
    assert daemon.row("good", failures=0)["sla"] == "OK"
    assert daemon.wait_for("gone: retrying in 120 seconds")
    log = (daemon.base / "gone/backy.log").read_text()
    assert log.count("cannot open source") == 1, "an error is not logged twice"
    assert daemon.stop() == 0


def test_failures_survive_even_kill_9(daemon):
    daemon.add("vm1")
    daemon.jobs["vm1"].unlink()
    daemon.make_overdue()
    daemon.start()
    daemon.wait_for("vm1: retrying in 120 seconds")
    memory = daemon.base / ".scheduler"
    daemon.until(lambda: b"failures" in memory.read_bytes())
    daemon.stop(signal.SIGKILL)
    daemon.start()
    daemon.wait_for("scheduler started")
    row = daemon.row("vm1", failures=1)
    assert "No such file" in row["last_error"]
    assert daemon.stop() == 0
    assert not [line for line in daemon.lines if "running backup" in line]


def test_a_damaged_memory_costs_one_warning(daemon):
    daemon.add("vm1")
    (daemon.base / ".scheduler").write_text('{"jobs": ')
    daemon.start()
    daemon.wait_for("warning: cannot read .scheduler")
    daemon.row("vm1", failures=0)
    assert daemon.stop() == 0
    assert json.loads((daemon.base / ".scheduler").read_text())["jobs"]["vm1"]


def test_a_status_file_that_cannot_be_written_is_one_line_and_tried_again(daemon):
    daemon.add("vm1")
    daemon.status_file = daemon.top / "run/status"
    daemon.configure(status_file=daemon.status_file)
    daemon.make_overdue()
    daemon.start()
    daemon.wait_for("cannot write .*run/status: No such file or directory")
    daemon.wait_for("vm1: finished backup")
    daemon.status_file.parent.mkdir()
    daemon.wait_for("the status file can be written again")
    assert daemon.row("vm1", sla="OK")
    assert daemon.stop() == 0
    assert sum("cannot write" in line for line in daemon.lines) == 1
    assert os.listdir(daemon.status_file.parent) == ["status"]


def test_a_job_directory_deleted_while_it_runs_is_made_again(daemon):
    daemon.add("vm1", "vm2")
    daemon.make_overdue()
    daemon.start_child(SLOW_CHILD, "vm1", "vm2")
    (daemon.base / "vm2/go-on").touch()
    daemon.wait_for("vm2: finished backup")
    (daemon.base / "vm1").rename(daemon.top / "moved")
    (daemon.top / "moved/go-on").touch()
    for pid in daemon.children():
        os.killpg(pid, signal.SIGKILL)
    daemon.row("vm1", failures=1)
    daemon.row("vm2", failures=0)
    assert daemon.stop() == 0


def test_a_job_that_waits_for_a_slot_is_shown_so_at_once(daemon):
    daemon.add("vm1", "vm2")
    daemon.configure(worker_limit=1, status_interval="1h")
    daemon.make_overdue()
    daemon.start(fake=SLOW_CHILD)
    daemon.row("vm1", status="running")
    about = daemon.row("vm2", status="queued for execution")
    assert about["next_tags"] == "daily"
    assert daemon.status()["vm1"]["scheduler"]["queued"] == 1
    assert daemon.stop() == 0


def test_a_child_that_is_killed_has_failed(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start_child(SLOW_CHILD)
    (child,) = daemon.children()
    assert daemon.row("vm1", status="running")["running_since"] != "-"
    os.kill(child, signal.SIGKILL)
    assert daemon.row("vm1", failures=1)["last_error"] == "ended by SIGKILL"
    assert daemon.stop() == 0


def test_nothing_that_a_child_has_started_outlives_it(daemon):
    child = (
        "import subprocess, sys; done = subprocess.Popen(['sleep', '100']);"
        "open(sys.argv[1] + '/left', 'w').write(str(done.pid))"
    )
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start(fake=child)
    daemon.wait_for("vm1: it has ended without a new revision")
    left = (daemon.base / "vm1/left").read_text()
    daemon.until(lambda: state_of(left) in "Z-")
    assert daemon.stop() == 0


def state_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "-"


STUBBORN = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "open(sys.argv[1] + '/begun', 'w')\n"
    "while not os.path.exists(sys.argv[1] + '/go-on'): time.sleep(0.02)"
)
SHORT_LIFE = """
backy.GRACE = 0.3
load = backy.load_settings
def load_settings(path):
    settings = load(path)
    jobs = {n: backy.replace(j, max_runtime=backy.timedelta(seconds=1.5)) for n, j in settings.jobs.items()}
    return backy.replace(settings, jobs=jobs)
backy.load_settings = load_settings
"""  # noqa: E501


def test_a_hung_child_is_ended_then_killed(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start(fake=STUBBORN, more=SHORT_LIFE)
    daemon.wait_for("vm1: it ran longer than .*, ending it")
    daemon.wait_for("vm1: does not end, killing it")
    assert "it ran longer than" in daemon.row("vm1", failures=1, stuck=False)["last_error"]
    assert daemon.stop() == 0


def test_a_child_that_cannot_be_killed_gives_up_its_slot_and_is_noticed_when_it_ends(daemon):
    daemon.add("vm1", "vm2")
    daemon.configure(worker_limit=1)
    daemon.make_overdue()
    daemon.start(fake=STUBBORN, more=SHORT_LIFE + "backy.Child.signal = lambda *_: None\n")
    daemon.wait_for("cannot be killed, its slot is given to others", 2)
    _, first = (daemon.row(name, status="stuck", stuck=True) for name in ("vm2", "vm1"))
    assert first["scheduler"]["stuck"] == 2
    assert first["scheduler"]["running"] == 0
    (daemon.base / "vm1/go-on").touch()
    daemon.row("vm1", status="failed", stuck=False, failures=1)
    (daemon.base / "vm2/go-on").touch()
    daemon.row("vm2", status="failed", stuck=False, failures=1)
    assert daemon.stop() == 0


def test_a_job_held_by_somebody_else_waits_and_has_not_failed(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    (daemon.base / "vm1").mkdir(0o700)
    with open(daemon.base / "vm1/.lock", "w") as lock:
        lock.write("backup (pid 1 on here)\n")
        lock.flush()
        assert backy.take_lock(lock.fileno())
        daemon.start(more="backy.BUSY_PAUSE = backy.timedelta(seconds=3)")
        daemon.wait_for(r"vm1: is held by backup \(pid 1 on here\), waiting")
        assert daemon.row("vm1", status="waiting for deadline")["failures"] == 0
        assert daemon.children() == []
    daemon.until((daemon.base / "vm1/begun").exists)
    assert daemon.stop() == 0


def test_when_expire_fails_the_run_was_a_success_and_there_is_a_problem(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    broken = SLOW_CHILD.replace(
        "sys.exit(", "sys.exit('no way') if words[0] == 'expire' else sys.exit("
    ).replace("while not", "while False and not")
    daemon.start(fake=broken)
    daemon.wait_for(r"vm1: expire: no way \(exit status 1\)")
    row = daemon.row("vm1", failures=0, sla="OK", status="waiting for deadline")
    assert row["problem"] == "expire: no way (exit status 1)"
    assert daemon.stop() == 0


def test_a_clock_that_jumps_is_noticed_and_nothing_runs_for_that(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    jump = daemon.top / "jump"
    daemon.start(
        more=f"""
import os
backy.child_command = lambda directory, *words: [
    sys.executable, "-I", backy.PROGRAM, "-b", directory, *words]
check, reckon = backy.Scheduler.check_clock, backy.Timetable.reckon_anew
def jumped(self):
    if os.path.exists({str(jump)!r}):
        os.unlink({str(jump)!r})
        self.clock = self.clock[0], self.clock[1] + 3600
    check(self)
def told(self, now, names):
    backy.log.info("reckoning anew %s", names)
    reckon(self, now, names)
backy.Scheduler.check_clock, backy.Timetable.reckon_anew, backy.TICK = jumped, told, 0.1
"""
    )
    daemon.wait_for("vm1: finished backup")
    before = daemon.row("vm1", status="waiting for deadline")["next_time"]
    jump.touch()
    daemon.wait_for("the clock was set by -3600 seconds, or the host slept")
    daemon.wait_for(r"reckoning anew \[.vm1.\]")
    assert daemon.row("vm1", status="waiting for deadline")["next_time"] == before
    assert daemon.stop() == 0
    assert sum("running backup" in line for line in daemon.lines) == 1
    assert sum("the clock was set" in line for line in daemon.lines) == 1


# -- signals, reload, restart ---------------------------------------------------------


def start_slow_children(daemon):
    """Three jobs that are due, and two of them in their slots."""
    daemon.add("vm1", "vm2", "vm3")
    daemon.make_overdue()
    daemon.start_child(SLOW_CHILD, "vm1", "vm2")


def test_term_ends_the_children_and_they_have_not_failed(daemon):
    start_slow_children(daemon)
    assert daemon.stop() == 0
    assert daemon.children() == []
    rows = daemon.status()
    assert [rows[name]["failures"] for name in daemon.jobs] == [0, 0, 0]
    assert not (daemon.base / "vm3/begun").exists()


def test_asked_twice_it_does_not_wait_for_what_does_not_end(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start_child(STUBBORN)
    daemon.send(signal.SIGINT)
    daemon.wait_for("Terminating all tasks")
    assert daemon.stop(signal.SIGINT) == 0
    assert daemon.children() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_configuration_is_read_ends_it_well(daemon, number):
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start(more=SLOW_LOAD)
    daemon.wait_for("reading")
    assert daemon.stop(number) == 0
    assert daemon.lines[-1] == "scheduler ended"
    assert not (daemon.base / "vm1").exists()


def test_a_hangup_while_the_configuration_is_read_lets_it_be_read_again(daemon):
    daemon.add("vm1")
    daemon.start(more=SLOW_LOAD)
    daemon.wait_for("reading")
    daemon.send(signal.SIGHUP)
    daemon.wait_for("reading", 2)
    daemon.wait_for("configuration reloaded: 1 job")
    assert daemon.stop() == 0


SLOW_LOAD = """
import time
load = backy.load_settings
def slow_load(path):
    print("reading", file=sys.stderr, flush=True)
    time.sleep(0.7)
    return load(path)
backy.load_settings = slow_load
"""


def test_a_reload_from_the_shell_holds_up_nobody(daemon):
    daemon.add("vm1")
    daemon.configure(telnet_control="yes")
    daemon.start(more=SLOW_LOAD)
    port = int(daemon.wait_for("starting telnet server").split(":")[-1])
    first, second = (backy.ShellClient(["127.0.0.1"], port) for _ in range(2))
    replies = []
    asking = threading.Thread(target=lambda: replies.append(first.ask("reload")))
    asking.start()
    daemon.wait_for("reading", 2)
    began = time.monotonic()
    assert "jobs shown" in second.ask("jobs")
    assert time.monotonic() - began < 0.3 and not replies
    asking.join(20)
    assert replies[0].splitlines()[-1] == "Daemon configuration reloaded."
    daemon.config.write_text("no: good")
    assert "Reload refused: " in second.ask("reload")
    assert daemon.stop() == 0


def test_a_reload_asked_for_during_another_one_reads_what_is_there_then(daemon):
    daemon.add("vm1")
    daemon.start(more=SLOW_LOAD.replace("return load(path)", "return settings").replace(
        "    time.sleep", "    settings = load(path)\n    time.sleep"))  # fmt: skip
    daemon.wait_for("scheduler started")
    daemon.send(signal.SIGHUP)
    daemon.wait_for("reading", 2)
    time.sleep(0.2)
    daemon.add("vm2")
    daemon.configure()
    daemon.send(signal.SIGHUP)
    daemon.wait_for("configuration reloaded: 2 jobs")
    assert daemon.stop() == 0


def test_a_reload_takes_everything_over_while_backups_go_on(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start_child(SLOW_CHILD)
    child = daemon.children()
    image = daemon.jobs.pop("vm1")
    daemon.add("vm2", "vm3")
    port = daemon.wait_for("starting telnet server")
    daemon.status_file = daemon.base / "other"
    daemon.configure(worker_limit=3, status_file=daemon.status_file, telnet_control="yes")
    daemon.send(signal.SIGHUP)
    daemon.wait_for("configuration reloaded: 2 jobs")
    assert daemon.row("vm2")["scheduler"]["worker_limit"] == 3
    assert list(daemon.status()) == ["vm2", "vm3"]
    assert daemon.children() == child, "it goes on, though its job is gone"
    assert daemon.wait_for("starting telnet server", 2) != port
    (daemon.base / "vm1/go-on").touch()
    daemon.wait_for("vm1: finished backup")
    daemon.until(lambda: daemon.row("vm2")["scheduler"]["running"] == 0)
    assert (daemon.base / "vm1/last").read_bytes() == image.read_bytes()
    assert daemon.stop() == 0


def test_a_reload_that_is_refused_changes_nothing_and_is_shown(daemon):
    daemon.add("vm1")
    daemon.start()
    daemon.row("vm1")
    good = daemon.config.read_text()
    for count, (old, new, words) in enumerate([
        ("schedule: usual", "schedule: missing", "no schedule 'missing'"),
        ("/base\n", "/elsewhere\n", "base-dir cannot change from"),
        (good, "- : {", "backy.conf:1"),
    ], 1):  # fmt: skip
        bad = good.replace(old, new).replace("worker-limit: 2", "worker-limit: 7")
        daemon.config.write_text(bad)
        daemon.send(signal.SIGHUP)
        daemon.wait_for("the configuration is refused, the old one stays in force", count)
        assert daemon.wait_for(words)

    def is_shown() -> object:
        about = daemon.status()["vm1"]["scheduler"]
        return "backy.conf:1" in about["reload_error"] and about

    assert daemon.until(is_shown)["worker_limit"] == 2
    daemon.config.write_text(good)
    daemon.send(signal.SIGHUP)
    daemon.until(lambda: daemon.status()["vm1"]["scheduler"]["reload_error"] == "-")
    assert daemon.stop() == 0


def test_a_scheduler_that_was_killed_leaves_its_children_to_the_next(daemon):
    start_slow_children(daemon)
    orphans = sorted(daemon.children())
    daemon.stop(signal.SIGKILL)
    daemon.start(fake=SLOW_CHILD)
    for pid in orphans:
        daemon.wait_for(f"pid {pid} goes on from an earlier scheduler")
    rows = daemon.until(lambda: all(row["status"] != "-" for row in daemon.status().values())
                        and daemon.status()["vm3"]["status"] == "queued for execution"
                        and daemon.status())  # fmt: skip
    assert sorted(daemon.children()) == orphans, "they hold both slots"
    assert rows["vm1"]["status"] == rows["vm2"]["status"] == "running"
    for name in daemon.jobs:
        (daemon.base / name).mkdir(exist_ok=True)
        (daemon.base / name / "go-on").touch()
    for name in daemon.jobs:
        daemon.wait_for(f"{name}: finished backup")
        daemon.row(name, status="waiting for deadline", failures=0)
        assert len(complete(daemon.base / name)) == 1
    assert daemon.stop() == 0


def test_what_a_killed_scheduler_has_left_counts_though_it_is_configured_no_more(daemon):
    daemon.add("vm1", "vm2")
    daemon.configure(worker_limit=1)
    daemon.make_overdue()
    daemon.start_child(SLOW_CHILD)
    daemon.stop(signal.SIGKILL)
    image = daemon.jobs.pop("vm1")
    daemon.start(fake=SLOW_CHILD)
    daemon.wait_for("vm1: pid .* of a job that is configured no more goes on")
    daemon.until(lambda: list(daemon.status()) == ["vm2"])
    assert daemon.row("vm2", status="queued for execution")["scheduler"]["running"] == 1
    (daemon.base / "vm1/go-on").touch()
    daemon.wait_for("vm1: finished backup")
    daemon.until((daemon.base / "vm2/begun").exists)
    assert (daemon.base / "vm1/last").read_bytes() == image.read_bytes()
    assert list(daemon.status()) == ["vm2"]
    assert daemon.stop() == 0


def test_it_is_ended_by_the_rules_too(daemon):
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start_child(STUBBORN)
    (child,) = daemon.children()
    daemon.stop(signal.SIGKILL)
    daemon.jobs.clear()
    daemon.start(
        fake=STUBBORN,
        more="backy.GRACE = 0.3; backy.usual_runtime = lambda _: backy.timedelta(seconds=1)",
    )
    daemon.wait_for(f"vm1: pid {child} of a job that is configured no more goes on")
    daemon.wait_for("vm1: it ran longer than 1s, ending it")
    daemon.wait_for("vm1: does not end, killing it")
    daemon.wait_for("vm1: it ran longer than 1s$", 1)
    assert state_of(str(child)) in "Z-"
    assert daemon.stop() == 0


@pytest.mark.parametrize("spelling", ["{top}/base/", "{top}/./link", "{top}/link/../base"])
def test_what_a_killed_scheduler_has_left_is_found_however_the_directory_is_spelled(
    daemon, spelling
):
    (daemon.top / "link").symlink_to("base")
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start_child(SLOW_CHILD)
    (child,) = daemon.children()
    daemon.stop(signal.SIGKILL)
    daemon.base = Path(spelling.format(top=daemon.top))
    daemon.settings["base-dir"] = spelling.format(top=daemon.top)
    daemon.start(fake=SLOW_CHILD)
    daemon.wait_for(f"vm1: pid {child} goes on from an earlier scheduler")
    assert daemon.stop() == 0


def test_processes_of_others_or_of_a_child_are_no_children_of_ours(tmp_path):
    need_root()
    environment = {"BACKY_BASE": backy.identity_of(str(tmp_path)), "BACKY_JOB": "/x/vm1"}
    environment["PATH"] = "/usr/bin:/bin"
    sleep = ["sh", "-c", "sleep 100; exit"]
    mine, *others = (
        subprocess.Popen(command, env=environment, start_new_session=True)
        for command in (
            [*sleep, "-b", "/x/vm1", "backup", "a"],
            ["setpriv", "--reuid=65534", "--clear-groups", *sleep, "-b", "/x/vm1", "backup", "a"],
            [*sleep, "something", "that", "a", "child", "has", "started"],
        )
    )
    try:
        time.sleep(0.5)
        found = [(name, step, pid) for name, step, pid, _ in backy.find_children(str(tmp_path))]
        assert found == [("vm1", "backup", mine.pid)]
    finally:
        for one in (mine, *others):
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def test_an_expiry_that_a_killed_scheduler_has_left_is_no_failure(daemon):
    child = SLOW_CHILD.replace('== "backup"', '== "expire"')
    daemon.add("vm1")
    daemon.make_overdue()
    daemon.start_child(child)
    daemon.stop(signal.SIGKILL)
    daemon.start(fake=child)
    daemon.wait_for("vm1: pid .* goes on")
    (daemon.base / "vm1/go-on").touch()
    daemon.row("vm1", status="waiting for deadline", failures=0, last_error="-", sla="OK")
    assert daemon.stop() == 0


def test_a_child_that_is_taken_over_and_ends_before_its_past_is_read_has_not_made_it(daemon):
    daemon.add("vm1")
    (daemon.base / "vm1").mkdir()
    for words in (["init", "file", daemon.jobs["vm1"]], ["backup", "manual:x"]):
        subprocess.run([sys.executable, COMPILED, "-b", daemon.base / "vm1", *words], check=True)
    job = str(daemon.base / "vm1")
    child = subprocess.Popen(
        ["sh", "-c", "sleep 100; exit", "-b", job, "backup", "daily"],
        env={"BACKY_BASE": backy.identity_of(daemon.base), "BACKY_JOB": job, "PATH": "/bin"},
        start_new_session=True,
    )
    try:
        time.sleep(1)  # so that the revision is older
        daemon.start(more=SLOW_ONCE)
        daemon.wait_for(f"vm1: pid {child.pid} goes on from an earlier scheduler")
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    daemon.wait_for("vm1: (it has ended without a new revision|finished backup)")
    row = daemon.row("vm1", status="failed")
    assert (row["failures"], row["last_error"]) == (1, "it has ended without a new revision")
    assert daemon.stop() == 0


SLOW_ONCE = """
import time
read, seen = backy.read_history, []
def slow_once(directory):
    seen.append(directory)
    time.sleep(3 if len(seen) < 3 else 0)
    return read(directory)
backy.read_history = slow_once
"""


# -- disks that are slow or dead --------------------------------------------------------

SLOW_READING = """
import time
read = backy.read_history
def slow_read(directory):
    if directory.endswith("slow"):
        time.sleep(1.5)
    return read(directory)
backy.read_history, backy.SETTLING = slow_read, 0.2
"""


def test_nobody_is_told_of_a_job_before_its_directory_has_been_read(daemon):
    daemon.add("vm1", "slow")
    daemon.make_overdue()
    (daemon.base / "slow").mkdir()
    daemon.jobs["slow"].unlink()
    daemon.start(more=SLOW_READING)
    daemon.until((daemon.base / "vm1/begun").exists)  # the others need not wait
    assert not daemon.status_file.exists()
    rows = daemon.until(daemon.status)
    assert rows["slow"]["problem"] == "-"
    daemon.jobs["slow2"] = daemon.jobs.pop("slow")
    daemon.jobs["slow"] = daemon.jobs["slow2"]  # its past counts at once when it is back
    for jobs in ({"vm1": "x"}, daemon.jobs):
        daemon.jobs = jobs
        daemon.configure()
        daemon.send(signal.SIGHUP)
        daemon.wait_for(f"configuration reloaded: {len(jobs)} job")
    while "slow2" not in daemon.status():
        assert {row["problem"] for row in daemon.status().values()} == {"-"}
        time.sleep(0.05)
    assert {row["problem"] for row in daemon.status().values()} == {"-"}
    assert daemon.stop() == 0


DEAD = """
import os, time
def wait_for_it(path):
    while path.endswith("dead") and os.path.exists({switch!r}):
        time.sleep(0.02)
def hangs(function):
    def call(path, *others):
        wait_for_it(path)
        return function(path, *others)
    return call
backy.Clerk.PATIENCE = {patience}
for name in {names!r}:
    setattr(backy, name, hangs(getattr(backy, name)))
"""


def test_a_directory_that_hangs_holds_up_no_other(daemon):
    switch = daemon.top / "switch"
    daemon.add("dead", "vm1", "vm2")
    more = DEAD.format(switch=str(switch), patience=0.5, names=["directory_state"])
    for name in daemon.jobs:
        subprocess.run([sys.executable, PROGRAM, "-b", daemon.base / name, "init", "file",
                        daemon.jobs[name]], check=True)  # fmt: skip
        subprocess.run([sys.executable, PROGRAM, "-b", daemon.base / name, "backup", "daily"],
                       check=True, capture_output=True)  # fmt: skip
    daemon.start(more=more)
    first = {name: daemon.row(name)["last_time"] for name in daemon.jobs}
    switch.touch()
    daemon.wait_for("dead: its directory does not answer")
    assert daemon.row("dead", problem=backy.SILENT)["last_time"] == first["dead"]
    for name in ("vm1", "vm2"):
        subprocess.run([sys.executable, PROGRAM, "-b", daemon.base / name, "backup", "daily"],
                       check=True, capture_output=True)  # fmt: skip
        daemon.until(lambda: daemon.status()[name]["last_time"] != first[name])  # noqa: B023
    assert sum("does not answer" in line for line in daemon.lines) == 1
    switch.unlink()
    daemon.row("dead", problem="-", failures=0)
    assert daemon.stop() == 0


@pytest.mark.parametrize("names", [["read_history"], ["prepare_directory"]])
def test_a_job_whose_directory_hangs_fails_and_leaves_its_slot(daemon, names):
    switch = daemon.top / "switch"
    switch.touch()
    daemon.add("dead", "vm1", "vm2")
    daemon.configure(worker_limit=1)
    daemon.make_overdue()
    for name in daemon.jobs:
        (daemon.base / name).mkdir()
        (daemon.base / name / "go-on").touch()
    daemon.start(more=DEAD.format(switch=str(switch), patience=0.2, names=names))
    daemon.wait_for("vm1: finished backup")
    daemon.wait_for("vm2: finished backup")
    row = daemon.row("dead", problem=backy.SILENT)
    if names == ["prepare_directory"]:
        assert (row["failures"], row["last_error"]) == (1, backy.SILENT)
    daemon.until(lambda: daemon.status()["dead"]["scheduler"]["running"] == 0)
    daemon.configure(worker_limit=3)
    daemon.send(signal.SIGHUP)
    daemon.until(lambda: daemon.status()["dead"]["scheduler"]["worker_limit"] == 3)
    switch.unlink()
    daemon.row("dead", problem="-")
    assert daemon.stop() == 0


# -- parts ----------------------------------------------------------------------------


def no_thread() -> None:
    raise RuntimeError("can't start new thread")


def test_what_computes_gets_no_crowd_of_threads():
    """Each of them wants the interpreter, without which the loop can do nothing."""
    loop, results, most = backy.Loop(), [], 0
    clerk = backy.Clerk(loop)

    def compute() -> int:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            sum(range(100))
        return 1

    for _ in range(15):
        clerk.submit(2, compute, results.append)
    deadline = time.monotonic() + 120
    while len(results) < 15 and time.monotonic() < deadline:
        loop.turn(0.02)
        clerk.check()
        most = max(most, len(clerk.busy))
    assert len(results) == 15
    assert most <= 4  # two, and what a busy host lets look like waiting
    loop.close()


def test_what_a_disk_holds_up_does_not_hold_up_the_rest(monkeypatch):
    monkeypatch.setattr(backy.Clerk, "PATIENCE", 0.1)
    loop = backy.Loop()
    clerk = backy.Clerk(loop)
    dead, results = threading.Event(), []
    clerk.submit(0, dead.wait, results.append)
    clerk.submit(1, lambda: "alive", results.append)
    deadline = time.monotonic() + 60
    while not results and time.monotonic() < deadline:
        loop.turn(0.05)
        clerk.check()
    assert results == ["alive"]
    dead.set()
    while len(results) < 2 and time.monotonic() < deadline:
        loop.turn(0.05)
    assert results == ["alive", True], "it is not lost either"
    clerk.submit(0, lambda: time.sleep(0.3), results.append)
    clerk.submit(1, lambda: "late", results.append)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _: no_thread())
        while len(results) < 4 and time.monotonic() < deadline:
            loop.turn(0.05)
            clerk.check()
    assert results.pop() == "late" and results.pop() is None
    clerk.submit(0, lambda: 1 / 0, results.append)
    while len(results) < 3 and time.monotonic() < deadline:
        loop.turn(0.05)
    assert "ZeroDivisionError" in str(results[2])
    loop.close()


@pytest.mark.parametrize("text, error", [
    ("", ""),
    ("2026-11-25 10:00:00 [7] INFO all is well\n", ""),
    ("2026-11-25 10:00:00 [7] ERROR cannot read\n2026-11-25 10:00:00 [7] ERROR hint: try\n"
     "2026-11-25 10:00:00 [7] INFO Backy operation failed.\n", "cannot read"),
    ("Traceback (most recent call last):\n  File x\nKeyError: 'a'\n", "KeyError: 'a'"),
    ("2026-11-25 10:00:00 [7] ERROR a\x1b[2Jb\n", "a\N{REPLACEMENT CHARACTER}[2Jb"),
])  # fmt: skip
def test_the_last_error_is_found_in_the_log_of_the_job(tmp_path, text, error):
    path = tmp_path / "backy.log"
    path.write_text("2026-11-25 09:00:00 [6] ERROR an older one\n" + text)
    with open(path, "rb") as file:
        assert (
            backy.last_error(file.fileno(), len("2026-11-25 09:00:00 [6] ERROR an older one\n"))
            == error
        )


def test_tags_are_shown_shortest_interval_first_and_foreign_ones_before_them():
    schedule = backy.Schedule("x", (
        backy.Interval("daily", timedelta(1), 1), backy.Interval("weekly", timedelta(7), 1)
    ))  # fmt: skip
    assert backy.show_tags(("manual:x", "weekly", "daily"), schedule) == "manual:x,daily,weekly"
    assert backy.show_tags((), schedule) == "-"


# -- for long --------------------------------------------------------------------------


def memory_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_nothing_piles_up_over_many_runs(daemon):
    child = "import sys; sys.exit(sys.argv[2] == 'backup')"
    daemon.schedule = "{tick: {interval: 1s, keep: 3}}"
    daemon.add(*(f"vm{number}" for number in range(10)), size=1)
    daemon.configure(worker_limit=4)
    patch = "backy.back_off = lambda _: backy.timedelta(milliseconds=100)"
    daemon.start(fake=child, more=patch)

    def figures() -> tuple[int, int, int]:
        pid = daemon.process.pid
        threads = len(os.listdir(f"/proc/{pid}/task"))
        return len(os.listdir(f"/proc/{pid}/fd")), threads, memory_of(pid)

    daemon.wait_for("retrying", 200, timeout=60)
    before = figures()
    daemon.wait_for("retrying", 1000, timeout=120)
    after = figures()
    assert after[0] <= before[0] + 4 * 4
    assert 2 <= after[1] <= 6  # on a host that is slow now some work has others beside it
    assert after[2] < before[2] + MiB
    assert daemon.stop() == 0


@pytest.mark.slow
def test_ten_thousand_jobs_never_hold_up_the_loop(daemon):
    """The longest turn of the loop, from the start on, with histories, rows and status files."""
    names = [f"vm{number:05}" for number in range(10_000)]
    stamp = (datetime.now(backy.UTC) - timedelta(hours=1)).strftime("%Y-%m-%d %H:%M:%S")
    for name in names:
        job = daemon.base / name
        job.mkdir()
        (job / "config").write_text("{}")
        (job / "abc").write_text("x")
        (job / "abc.rev").write_text(
            f"stats: {{duration: 1.0}}\ntags: [daily]\ntimestamp: {stamp}\nuuid: abc\n"
        )
    daemon.jobs = {name: "/x" for name in names}
    watch = """
import time
longest = 0.0
turn = backy.Loop.turn
def timed(self, *args):
    select = self.selector.select
    def slept(*given):
        global began
        found = select(*given)
        began = time.thread_time()
        return found
    self.selector.select = slept
    turn(self, *args)
    self.selector.select = select
tick = backy.Scheduler.tick
def timed_tick(self):
    global longest
    tick(self)
    took = time.thread_time() - began
    if took > longest and self.timetable.jobs:
        longest = took
        print(f"longest turn {longest:.3f}", file=sys.stderr, flush=True)
def collecting(phase, _):
    global since
    if phase == "start":
        since = time.thread_time()
    elif time.thread_time() - since > 0.02:
        print(f"garbage {time.thread_time() - since:.3f}", file=sys.stderr, flush=True)
backy.Loop.turn, backy.Scheduler.tick = timed, timed_tick
backy.gc.callbacks.append(collecting)
"""
    daemon.start(fake="pass", more=watch)
    daemon.wait_for("scheduler started")
    began = time.monotonic()
    daemon.until(daemon.status_file.exists, timeout=120)
    assert time.monotonic() - began < backy.SETTLING
    for _ in range(3):
        os.utime(daemon.base / names[5])
        written = daemon.status_file.stat().st_ino
        daemon.until(lambda: daemon.status_file.stat().st_ino != written, 60)  # noqa: B023
    for count, schedule in enumerate([daemon.schedule, DAILY.replace("1d", "2d")], 1):
        daemon.schedule = schedule
        daemon.configure()
        daemon.send(signal.SIGHUP)
        daemon.wait_for("configuration reloaded", count, timeout=60)
    assert daemon.stop() == 0
    garbage = [float(line.split()[-1]) for line in daemon.lines if line.startswith("garbage ")]
    assert len(garbage) < 6, "only while the configuration is read for the first time"
    longest = [float(line.split()[-1]) for line in daemon.lines if "longest turn" in line]
    print(longest)
    assert max(longest) < 0.2  # 0.1 on a machine that has nothing else to do
    assert daemon.status_file.read_text().count("last_duration: 1.0 s") == 10_000


@pytest.mark.slow
def test_a_real_run_with_everything_killed_in_between(daemon):
    """Twenty jobs, three slots; children and the scheduler itself are killed again and again."""
    chance = random.Random(4)
    daemon.schedule = QUICK
    daemon.add(*(f"vm{number:02}" for number in range(20)), size=3 * MiB)
    daemon.configure(worker_limit=3)
    daemon.start(more=REAL_CHILDREN)
    most, kills, begun = 0, 0, time.monotonic()
    next_kill, next_restart = begun + 2, begun + 7
    while time.monotonic() < begun + REAL_RUN:
        children = daemon.children()
        most = max(most, len(children))
        if time.monotonic() > next_kill and children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(children), signal.SIGKILL)
                kills += 1
            next_kill += 3
        if time.monotonic() > next_restart:
            daemon.stop(signal.SIGKILL)
            daemon.start(more=REAL_CHILDREN)
            next_restart += 7
        for image in chance.sample(list(daemon.jobs.values()), 1):
            replaced = image.with_suffix(".new")
            replaced.write_bytes(noise(3 * MiB, chance.randrange(1000)))
            replaced.rename(image)
        time.sleep(0.02)
    for name in daemon.jobs:
        daemon.until((daemon.base / name / "last").exists, timeout=60)
    assert daemon.stop() == 0
    assert kills >= REAL_RUN / 6
    assert most == 3, "never more than three at once"
    assert daemon.children() == []
    for name in daemon.jobs:
        directory = daemon.base / name
        assert complete(directory), name
        verified = subprocess.run(
            [sys.executable, COMPILED, "-b", directory, "verify", "--all"], capture_output=True
        )
        assert verified.returncode == 0, (name, verified.stderr)
        check_retention(directory)
        leftovers = [one for one in contents(directory) if one.startswith(".backy-tmp")]
        assert leftovers == []
    assert not [one for one in os.listdir(daemon.base) if one.startswith(".backy-tmp")]


REAL_CHILDREN = """
backy.child_command = lambda directory, *words: [
    sys.executable, "-I", backy.PROGRAM, "-b", directory, "-l", directory + "/backy.log", *words]
backy.back_off = lambda _: backy.timedelta(seconds=1)
"""


def check_retention(directory: Path) -> None:
    """One more backup and its expiry, by hand: then exactly what the schedule keeps is there."""
    for words in (["backup", "tick,tock"], ["expire"]):
        subprocess.run(
            [sys.executable, COMPILED, "-b", directory, *words], check=True, capture_output=True
        )
    now = datetime.now(backy.UTC)
    with backy.Repository.open(str(directory)) as repository:
        assert all(one.is_complete for one in repository.revisions)
        schedule = backy.load_schedule(repository)
        for interval in schedule.intervals:
            tagged = [one for one in repository.complete if interval.tag in one.tags]
            for one in tagged[: -interval.keep]:
                assert now - one.timestamp < interval.keep * interval.every + timedelta(seconds=5)
