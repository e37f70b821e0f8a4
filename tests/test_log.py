# SPDX-License-Identifier: GPL-3.0-or-later
"""Where messages go, in what form, and that nothing in them is obeyed by a terminal."""

from __future__ import annotations

import logging
import os
import re

import pytest
from conftest import backy_process, stop_log

import backy


@pytest.fixture
def log():
    yield backy.log
    stop_log()


@pytest.mark.parametrize(
    "text",
    ["\x00", "\x1b[2J", "\x07", "\n", "\r", "\t", "\x7f", "\x9b31m", "\u202e", "\u2066", "\u200f",
     "\u2028", "\u2029", "\udcff", "\u061c"],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_replaced(text):
    assert backy.printable(f"a{text}b").startswith("a\N{REPLACEMENT CHARACTER}")
    assert backy.printable(f"a{text}b").endswith("b")
    assert text not in backy.printable(f"a{text}b")


@pytest.mark.parametrize("text", ["plain", "ünï", "日本", "a b", "\N{PILE OF POO}", "\xa0"])
def test_what_is_harmless_is_left_alone(text):
    assert backy.printable(text) == text


def test_on_a_terminal_only_what_is_not_plain_says_what_it_is(log, capfd):
    backy.start_log(None, verbose=False)
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)("%s text", level)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "info text\nbacky: warning: warning text\nbacky: error text\n"


def test_verbose_says_more(log, capfd):
    backy.start_log(None, verbose=True)
    log.debug("debug text")
    assert capfd.readouterr().err == "debug text\n"


def test_a_log_file_has_time_in_utc_pid_and_level(log, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    backy.time.tzset()
    try:
        backy.start_log(str(tmp_path / "log"), verbose=False)
        log.info("some text")
        before = backy.format_time(backy.datetime.now(backy.UTC))
    finally:
        monkeypatch.undo()
        backy.time.tzset()
    (line,) = (tmp_path / "log").read_text().splitlines()
    pattern = rf"([0-9-]{{10}} [0-9:]{{8}}) \[{os.getpid()}\] INFO some text"
    match = re.fullmatch(pattern, line)
    assert match
    assert match[1][:15] == before[:15]
    assert capfd.readouterr().err == ""


def test_errors_go_to_standard_error_too(log, capfd, tmp_path):
    backy.start_log(str(tmp_path / "log"), verbose=False)
    log.warning("look at it")
    log.error("not done")
    assert capfd.readouterr().err == "backy: not done\n"
    assert [line.split("] ")[1] for line in (tmp_path / "log").read_text().splitlines()] == [
        "WARNING look at it",
        "ERROR not done",
    ]


def test_a_log_file_that_was_renamed_is_opened_again(log, tmp_path):
    path = tmp_path / "log"
    backy.start_log(str(path), verbose=False)
    log.info("one")
    path.rename(tmp_path / "log.1")
    log.info("two")
    assert (tmp_path / "log.1").read_text().endswith("INFO one\n")
    assert path.read_text().endswith("INFO two\n")


def test_a_log_file_that_cannot_be_opened_costs_a_warning(log, capfd, tmp_path):
    backy.start_log("/nowhere/\x1blog", verbose=False)
    log.info("goes on")
    assert capfd.readouterr().err == (
        "backy: warning: cannot open log file /nowhere/\N{REPLACEMENT CHARACTER}log: "
        "No such file or directory\ngoes on\n"
    )


def test_a_log_file_on_a_full_disk_costs_nothing(job, run):
    result = run("-b", job, "-l", "/dev/full", "backup", "daily")
    assert (result.status, result.err) == (0, "")


def test_any_text_can_be_logged(log, tmp_path, monkeypatch):
    backy.start_log(str(tmp_path / "log"), verbose=False)
    log.info("%s", backy.printable("ü\udcff"))
    assert "ü\N{REPLACEMENT CHARACTER}" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_traceback_is_shown_where_it_is_asked_for(log, capfd):
    backy.start_log(None, verbose=False)
    try:
        raise KeyError("deep inside")
    except KeyError:
        log.error("defect", exc_info=True)
        log.warning("defect", exc_info=True)
    err = capfd.readouterr().err
    assert err.startswith("backy: defect\nTraceback ")
    assert "backy: warning: defect\nTraceback " in err


def test_the_log_of_a_run_has_its_command_line_its_steps_and_its_end(plain_job, tmp_path):
    job = plain_job
    path = tmp_path / "log"
    done = backy_process("-b", job, "-l", path, "backup", "daily,weekly")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines = [re.sub(r"^.{19} \[[0-9]+\] ", "", line) for line in path.read_text().splitlines()]
    lines = [re.sub(r"[2-9A-Za-z]{22}", "ID", line) for line in lines if "WARNING" not in line]
    assert lines[0] == f"INFO $ backy -b {job} -l {path} backup daily,weekly"
    assert lines[1] == "INFO job: new revision ID [daily,weekly]"
    assert lines[2] == "INFO job: performing full backup"
    assert lines[-2].startswith("INFO job: revision ID complete: 3.01 MiB, ")
    assert lines[-1] == "INFO Backy operation complete."
    backy_process("-b", job, "-l", path, "find", "-r", "nope\x1b\n")
    lines = path.read_text().splitlines()
    assert "\x1b" not in lines[-3]
    assert lines[-1].endswith("INFO Backy operation failed.")


def test_other_loggers_are_left_alone(log, capfd):
    backy.start_log(None, verbose=True)
    assert not logging.getLogger().handlers or backy.log.propagate is False
