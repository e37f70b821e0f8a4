# SPDX-License-Identifier: GPL-3.0-or-later
"""How far it is: on a terminal, once a minute with -v, and at SIGUSR1."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from conftest import COMPILED, MiB, noise, stop_log, write_image

import backy


@pytest.fixture
def clock(monkeypatch):
    """A clock that this test sets."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(backy.time, "monotonic", lambda: Clock.now)
    return Clock


def test_the_line_has_share_rate_and_time_left(clock):
    progress = backy.Progress("vm", 100 * MiB)
    assert progress.line() == "vm  0 Bytes of 100.00 MiB  0 %  0 Bytes/s"
    progress.reach(25 * MiB)
    progress.reach(20 * MiB)  # another thread, a little behind
    clock.now += 2
    assert progress.line() == "vm  25.00 MiB of 100.00 MiB  25 %  12.50 MiB/s"
    clock.now += 3
    assert progress.line() == "vm  25.00 MiB of 100.00 MiB  25 %  5.00 MiB/s  eta 0:15"
    progress.reach(200 * MiB)
    assert progress.line() == "vm  100.00 MiB of 100.00 MiB  100 %  20.00 MiB/s"
    assert backy.Progress("empty", 0).line().startswith("empty  0 Bytes of 0 Bytes  100 %")


def test_without_a_terminal_there_is_one_line_a_minute_and_only_with_v(clock, capfd):
    for verbose in (True, False):
        backy.start_log(None, verbose)
        with backy.Progress("vm", 100 * MiB) as progress:
            for _ in range(1300):
                clock.now += 0.1
                progress.tick()
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == (2 if verbose else 0)
        assert all(line.startswith("vm  0 Bytes of 100.00 MiB") for line in lines)
    stop_log()


def test_on_a_terminal_one_line_is_drawn_over_and_goes_at_the_end(plain_job, run):
    assert run("-b", plain_job, "backup", "daily").status == 0
    ours, theirs = pty.openpty()
    slowly = ["sh", "-c", '"$@" | (head -c 1; sleep 0.5; cat) > /dev/null', "-"]
    words = [*slowly, sys.executable, str(COMPILED), "-b", str(plain_job), "restore", "-"]
    with subprocess.Popen(words, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):
            while True:
                seen += os.read(ours, 65536)
    os.close(ours)
    assert process.returncode == 0
    line = rb"\rjob \(restoring\)  [12].00 MiB of 3.01 MiB  (33|66) %  [0-9.]+ [kM]iB/s"
    assert re.search(line, seen), seen
    assert seen.endswith(b"\r")


def test_on_a_terminal_lines_are_drawn_five_times_a_second(clock, monkeypatch):
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr(backy.sys, "stderr", terminal)
    with backy.Progress("vm", 10 * MiB) as progress:
        for number in range(100):
            clock.now += 0.01
            progress.reach(number * MiB // 10)
            progress.tick()
        drawn = terminal.text.split("\r")[1:]
        assert 4 <= len(drawn) <= 5
        progress.draw("short")
        assert terminal.text.split("\r")[-1] == "short".ljust(len(drawn[-1].rstrip()))
    assert terminal.text.endswith("\r     \r")


def test_a_terminal_that_has_gone_stops_nothing(clock, monkeypatch):
    class Gone:
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(backy.sys, "stderr", Gone())
    with backy.Progress("vm", 10 * MiB) as progress:
        clock.now += 1
        progress.tick()


@pytest.mark.parametrize("size", [3 * MiB, 12 * MiB])
@pytest.mark.parametrize("words", [["backup", "daily"], ["verify"], ["restore", "TARGET"]])
def test_sigusr1_always_gets_one_line(xfs, run, tmp_path, meanwhile, size, words):
    source = write_image(tmp_path / "image", (0, noise(size, 1)))
    job = xfs / "job"
    run("-b", job, "init", "file", source)
    run("-b", job, "backup", "daily")
    words = [str(tmp_path / "target") if word == "TARGET" else word for word in words]
    happened = meanwhile(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    result = run("-b", job, "-l", "/dev/null", *words)
    assert happened
    assert result.status == 0, result
    (line,) = result.err.splitlines()
    assert re.fullmatch(r"job( \([\w ]+\))?  .* of [0-9]+\.00 MiB  [0-9]+ %  .*/s", line)


def test_sigusr1_between_two_steps_gets_a_line_too(capfd):
    backy.report_progress()
    assert capfd.readouterr().err == "between two steps\n"
