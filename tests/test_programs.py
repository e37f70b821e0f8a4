# SPDX-License-Identifier: GPL-3.0-or-later
"""Other programs are run with limits, and what they say is made fit to print."""

from __future__ import annotations

import os
import signal
import time

import pytest

import backy


def shell(script: str, **options) -> bytes:
    return backy.run_program("/bin/sh", "-c", script, **{"limit": 10, **options})


def test_the_output_of_a_program_is_returned():
    assert shell("cat; echo x", stdin=b"given\n") == b"given\nx\n"


def test_a_failure_has_the_programs_own_words_and_its_status():
    with pytest.raises(backy.ProgramFailed, match=r"no such image; really \(exit status 2\)") as e:
        shell("echo; echo no such image >&2; echo really >&2; exit 2")
    assert e.value.code == 2


def test_words_are_shortened_and_cleaned():
    with pytest.raises(backy.ProgramFailed) as e:
        shell("head -c 300000 /dev/zero | tr '\\0' x >&2; printf '\\033[2J\\351end' >&2; exit 3")
    assert len(str(e.value)) < 1000 and "\x1b" not in str(e.value) and "end" in str(e.value)


def test_progress_is_no_reason():
    said = b"Exporting image: 1% complete...\rExporting: 2% complete...failed.\nrbd: gone\n"
    assert backy.own_words(said) == "rbd: gone"


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path):
    started = time.monotonic()
    with pytest.raises(backy.ProgramFailed, match="takes too long"):
        shell(f"sleep 77 & echo $! > {tmp_path}/pid; echo hm >&2; wait", limit=0.5)
    assert time.monotonic() - started < 5
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read():
            return
        time.sleep(0.02)
    pytest.fail("the child lives on")


def test_a_stream_that_stands_still_is_given_up_and_one_that_shows_progress_is_not():
    words = ("/bin/sh", "-c", "for i in 1 2 3 4 5; do sleep .2; echo $i% >&2; done; echo x")
    with backy.Program(*words, patience=0.6) as program:
        view = memoryview(bytearray(2))
        program.read_whole(view)
        program.finish()
    with backy.Program("/bin/sh", "-c", "echo x; sleep 77", patience=0.3) as program:
        program.read_whole(view)
        with pytest.raises(backy.ProgramFailed, match=r"stands still for 0\.3 s"):
            program.read_whole(view)


def test_a_program_that_closes_its_output_and_lives_on_is_given_up():
    with backy.Program("/bin/sh", "-c", "exec >&- 2>&-; sleep 77", patience=0.3) as program:
        assert program.read(memoryview(bytearray(2))) == 0
        with pytest.raises(backy.ProgramFailed, match="stands still"):
            program.finish()


def test_more_output_than_is_wanted_is_refused():
    with pytest.raises(backy.ProgramFailed, match=r"prints more than 1\.00 MiB"):
        shell("head -c 2000000 /dev/zero", most=1 << 20)
    with backy.Program("/bin/sh", "-c", "echo xyz", patience=5) as program:
        program.read_whole(memoryview(bytearray(2)))
        with pytest.raises(backy.ProgramFailed, match="more than its end"):
            program.finish()


def test_a_program_ended_by_a_signal_has_failed():
    with pytest.raises(backy.ProgramFailed, match="ended by signal 9"):
        shell("kill -9 $$")


@pytest.mark.parametrize("name", ["/nonexistent/rbd", "", "a\0b", "/etc"])
def test_a_program_that_cannot_be_started_is_one_line(name):
    with pytest.raises(backy.ProgramFailed, match="cannot start") as e:
        backy.run_program(name, limit=5)
    assert e.value.code is None


def test_only_what_is_meant_for_it_reaches_a_program(monkeypatch):
    for name in ("LD_PRELOAD", "PYTHONPATH", "IFS", "SECRET"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CEPH_CONF", "/c")
    lines = shell("env").decode().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert "CEPH_CONF=/c" in lines and "PATH" in names
    assert not names & {"LD_PRELOAD", "PYTHONPATH", "SECRET"}


def test_a_program_has_no_terminal_and_a_signal_for_us_is_not_for_it():
    script = "ps -o pgid= -p $$ 2>/dev/null || cut -d' ' -f5 /proc/$$/stat"
    assert int(shell(script)) != os.getpgid(0)
    assert signal.getsignal(signal.SIGCHLD) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("text", [b"", b"[", b"\xff", b"[" * 100_000, b'{"a": NaNa}'])
def test_what_is_no_json_is_one_line(text):
    with pytest.raises(backy.BackyError, match="the answer is no JSON") as e:
        backy.parse_json(text, "the answer")
    assert "\n" not in str(e.value)
