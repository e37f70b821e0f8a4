# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands as they are typed: where options stand, what is printed, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import (
    COMPILED,
    PROGRAM,
    backy_process,
    command,
    contents,
    on_terminal,
    plant,
    revisions,
)

import backy

TYPES = "ceph, ceph-rbd, exec, file, flyingcircus"

DONE = "parent: null\nstats: {bytes_written: 4096, duration: 1.5}\n"


@pytest.fixture
def history(tmp_path):
    """A job with three complete revisions and an incomplete, newest one."""
    job = tmp_path / "vm1"
    job.mkdir()
    (job / "config").write_text("{filename: /nowhere/vm1.img, type: file}\n")
    plant(job, "aaXX1", DONE + "timestamp: 2026-11-20 10:00:00\ntags: [weekly, daily, a-1]\n")
    plant(job, "aaYY2", DONE + "timestamp: 2026-11-21 10:00:00+00:00\ntags: [daily]\n")
    plant(job, "bbZZ3", DONE + "timestamp: 2026-11-22 10:00:30.5+00:00\ntags: ['manual:x']\n")
    plant(job, "ccWW4", "parent: null\ntimestamp: 2026-11-23 10:00:00\nstats: {bytes_written: 0}\n")
    return job


# -- usage --------------------------------------------------------------------


def test_without_arguments_it_prints_its_usage(run):
    result = run()
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("usage: backy ")
    for name in backy.COMMANDS:
        assert f"\n    {name} " in result.out


def test_help_exits_with_0(run):
    result = run("--help")
    assert (result.status, result.err) == (0, "")
    assert result.out == run("help").out == run("-h").out


@pytest.mark.parametrize("name", sorted(backy.COMMANDS))
def test_every_command_explains_itself(run, name):
    result = run("help", name)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"usage: backy {name} ")
    assert result.out == run(name, "-h").out
    assert backy.COMMANDS[name].run.__doc__ in result.out


def test_help_on_an_unknown_command_suggests_one(run):
    result = run("help", "restoer")
    assert (result.status, result.out) == (1, "")
    assert result.err == "backy: no command 'restoer' (restore?)\n"


def test_the_version_is_printed(run):
    result = run("--version")
    assert (result.status, result.out, result.err) == (0, f"backy {backy.__version__}\n", "")


def test_the_version_is_printed_behind_a_command_too(run):
    assert run("status", "--version").out == f"backy {backy.__version__}\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["stauts"], "argument COMMAND: no 'stauts' (status?)"),
        (["status", "--jsno"], "unrecognized arguments: --jsno"),
        (["backup"], "the following arguments are required: TAGS"),
        (["forget"], "forget needs -r SPEC"),
        (["backup", "--verify", "fulll", "daily"], "argument --verify: no 'fulll'"),
        (["backup", "--wait=5x", "daily"], "argument --wait: '5x' is no duration"),
        (["restore", "a", "b"], "unrecognized arguments: b"),
        (["find", "-r"], "argument -r/--revision: expected one argument"),
        (["status", "--js"], "unrecognized arguments: --js"),
        (["\x1b[2J\nx"], "argument COMMAND: no"),
    ],
)
def test_a_usage_error_is_two_lines_and_status_1(run, words, complaint):
    result = run(*words)
    assert (result.status, result.out) == (1, "")
    last = result.err.splitlines()[-1]
    assert last.startswith(f"backy: {complaint}")
    assert result.err.startswith("usage: backy ")
    assert "\x1b" not in result.err


# -- options before and behind the command --------------------------------------


def test_the_directory_stands_before_or_behind_the_command(history, run, monkeypatch):
    before = run("-b", history, "status")
    assert before.status == 0
    assert "aaXX1" in before.out
    assert run("status", "-b", history).out == before.out
    assert run("status", f"--backupdir={history}").out == before.out
    assert run("-b", "/nowhere", "status", "-b", history).out == before.out
    monkeypatch.chdir(history)
    assert run("status").out == before.out


def test_verbose_stands_before_or_behind_the_command(history, run):
    before = run("-v", "-b", history, "status")
    assert "Trust" in before.out
    assert "Trust" in run("-b", history, "status", "-v").out
    assert "Trust" in run("-b", history, "status", "--verbose").out
    assert "Trust" not in run("-b", history, "status").out


def test_the_log_file_is_named_before_or_behind_the_command(history, run, tmp_path):
    for number, words in enumerate(
        [["-l", "LOG", "protect", "-r", "1"], ["protect", "-r", "1", "--logfile", "LOG"]]
    ):
        path = tmp_path / f"log{number}"
        result = run("-b", history, *[str(path) if word == "LOG" else word for word in words])
        assert (result.status, result.out, result.err) == (0, "", "")
        assert "aaYY2 is protected" in path.read_text()


def test_the_revision_is_named_before_the_command_too(history, run):
    assert run("-b", history, "-r", "1", "find").out == f"{history}/aaYY2\n"


def test_a_revision_is_not_named_where_it_means_nothing(history, run):
    for words in (["-r", "1", "status"], ["status", "-r", "1"], ["-r", "1", "backup", "daily"]):
        result = run("-b", history, *words)
        assert (result.status, result.out) == (1, "")


@pytest.mark.parametrize("word", ["-r", "--revision"])
def test_the_revision_stands_behind_the_command(history, run, word):
    assert run("-b", history, "find", word, "1").out == f"{history}/aaYY2\n"


# -- status -------------------------------------------------------------------

SAMPLE = """\
+---------------------+------------------------+------------+-------+--------+
| Date (UTC)          | ID                     |       Size | Durat | Tags   |
+---------------------+------------------------+------------+-------+--------+
| 2026-11-22 04:28:06 | qXYnPVpor2wxnfLwd33VDT |   8.00 MiB | 0.9 s | daily  |
| 2026-11-22 04:28:09 | U5hyNzKWPiQXvih6TJAQF8 | 192.00 kiB | 0.9 s | manual |
+---------------------+------------------------+------------+-------+--------+
2 revisions containing 8.19 MiB data (estimated)
"""


def test_status_prints_the_table_of_the_manual_to_the_column(tmp_path, run):
    plant(
        tmp_path,
        "U5hyNzKWPiQXvih6TJAQF8",
        "parent: qXYnPVpor2wxnfLwd33VDT\n"
        "stats: {bytes_written: 196608, ceph-verification: partial, duration: 0.9258553981781006}\n"
        "tags: [manual]\n"
        "timestamp: 2026-11-22 04:28:09.998174+00:00\n",
    )
    plant(
        tmp_path,
        "qXYnPVpor2wxnfLwd33VDT",
        "parent: null\n"
        "stats: {bytes_written: 8388608, duration: 0.8912}\n"
        "tags: [daily]\n"
        "timestamp: 2026-11-22 04:28:06.100000+00:00\n",
    )
    result = run("-b", tmp_path, "status")
    assert (result.status, result.err) == (0, "")
    assert result.out == SAMPLE


def test_status_of_a_job_without_revisions_is_an_empty_table(tmp_path, run):
    (tmp_path / "config").write_text("{filename: /x, type: file}\n")
    result = run("-b", tmp_path, "status")
    assert result.out.splitlines() == [
        "+------------+----+------+-------+------+",
        "| Date (UTC) | ID | Size | Durat | Tags |",
        "+------------+----+------+-------+------+",
        "+------------+----+------+-------+------+",
        "0 revisions containing 0 Bytes data (estimated)",
    ]


def test_status_is_oldest_first_sorts_tags_and_marks_the_incomplete(history, run):
    lines = run("-b", history, "status").out.splitlines()
    assert lines[3:-2] == [
        "| 2026-11-20 10:00:00 | aaXX1 | 4.00 kiB | 1.5 s | a-1,daily,weekly |",
        "| 2026-11-21 10:00:00 | aaYY2 | 4.00 kiB | 1.5 s | daily            |",
        "| 2026-11-22 10:00:30 | bbZZ3 | 4.00 kiB | 1.5 s | manual:x         |",
        "| 2026-11-23 10:00:00 | ccWW4 |  0 Bytes |   0 s | (incomplete)     |",
    ]
    assert lines[-1] == "4 revisions containing 12.00 kiB data (estimated)"


def test_status_marks_a_revision_whose_image_is_gone(history, run):
    (history / "aaYY2").unlink()
    result = run("-b", history, "status")
    assert result.status == 0
    assert "| daily (no image) " in result.out
    assert result.err == (
        "backy: warning: vm1: aaYY2 is of no use: its image: No such file or directory\n"
    )


def test_verbose_status_tells_trust_and_last_verification(job, run):
    assert run("-b", job, "backup", "daily").status == 0
    assert run("-b", job, "protect").status == 0
    lines = run("-b", job, "status", "-v").out.splitlines()
    assert "| Trust    | Verified (UTC)      | Protected |" in lines[1]
    (one,) = revisions(job)
    when = backy.format_time(one.verified)
    assert f" | daily | verified | {when} | yes       |" in lines[3]


def test_status_as_json_has_every_key_and_times_that_sort(history, run):
    (history / "zz.rev").write_text("nonsense\n")
    result = run("-b", history, "status", "--json")
    shown = json.loads(result.out)
    assert set(shown) == {"version", "job", "revisions", "problems"}
    assert (shown["version"], shown["job"]) == (1, "vm1")
    assert shown["problems"] == [{"file": "zz.rev", "problem": "it is not a mapping"}]
    assert [one["id"] for one in shown["revisions"]] == ["aaXX1", "aaYY2", "bbZZ3", "ccWW4"]
    known = {
        "id": "bbZZ3",
        "timestamp": "2026-11-22T10:00:30.500000Z",
        "tags": ["manual:x"],
        "parent": None,
        "complete": True,
        "size": 6,
        "bytes_written": 4096,
        "duration": 1.5,
        "trust": "trusted",
        "verified": None,
        "protected": False,
        "damaged": [],
        "problem": None,
    }
    assert {key: shown["revisions"][2][key] for key in known} == known
    assert shown["revisions"][3]["complete"] is False
    assert shown["revisions"][3]["duration"] is None


def test_status_works_on_a_read_only_file_system(new_file_system, source, run):
    made = new_file_system("ext4", 64 << 20)
    job = made.path / "job"
    assert run("-b", job, "init", "file", source).status == 0
    assert run("-b", job, "backup", "daily").status == 0
    made.unmount()
    made.mount("ro")
    assert run("-b", job, "status").status == 0
    assert run("-b", job, "find").out == f"{job}/{revisions(job)[0].id}\n"
    result = run("-b", job, "verify")
    assert result.status == 0
    assert "the result is not recorded" in result.err
    assert run("-b", job, "protect").status == 1


# -- find and SPEC --------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("0", "bbZZ3"),
        ("1", "aaYY2"),
        ("2", "aaXX1"),
        ("last", "bbZZ3"),
        ("latest", "bbZZ3"),
        ("aaXX1", "aaXX1"),
        ("ccWW4", "ccWW4"),  # incomplete: by its full id alone
        ("aaX", "aaXX1"),
        ("b", "bbZZ3"),
        ("daily", "aaYY2"),
        ("weekly", "aaXX1"),
        ("manual:x", "bbZZ3"),
        ("2026-11-20", "aaXX1"),
        ("2026-11-21", "aaYY2"),
        ("2026-11-22", "bbZZ3"),
        ("2030-01-01", "bbZZ3"),
        ("2026-11-21T09:59", "aaXX1"),
        ("2026-11-21 10:00", "aaYY2"),
        ("2026-11-22T10:00:29Z", "aaYY2"),
        ("2026-11-22T10:00:30", "bbZZ3"),
        ("2026-11-22T10:00:30.4Z", "aaYY2"),
        ("2026-11-22T10:00:30.5Z", "bbZZ3"),
        ("2026-11-22T11:00:30.5+01:00", "bbZZ3"),
        ("2026-11-22T09:00:29-0100", "aaYY2"),
        ("2026-11-21 10:00:00 UTC", "aaYY2"),
    ],
)
def test_a_revision_is_found_by(history, run, spec, found):
    result = run("-b", history, "find", "-r", spec)
    assert (result.status, result.out, result.err) == (0, f"{history}/{found}\n", "")


@pytest.mark.parametrize(
    "spec",
    [
        *("3", "-1", "999999999", "99999999999999999999", "ccWW", "nope", "", " ", "2026-11-19"),
        *("2026-13-45", "..", "../vm1/aaXX1", "aaXX1.rev", "config", "*", "aa*", "a\nb", "\x1b[2J"),
        *("-", "\u202e", "aaXX1\n", "\udcff", "٣", "0x0", "1.0", "+1", "1e0", "x" * 9999),
    ],
)
def test_an_unknown_spec_says_what_there_is(history, run, spec):
    result = run("-b", history, "find", f"-r{spec}" if spec else "--revision=")
    assert (result.status, result.out) == (1, "")
    error, hint = result.err.splitlines()
    assert error.startswith("backy: vm1: no revision ")
    assert hint == (
        "backy: hint: there are 3, number 0 (bbZZ3 (2026-11-22 10:00:30 UTC)) to "
        "2 (aaXX1 (2026-11-20 10:00:00 UTC)); tags: a-1, daily, manual:x, weekly"
    )
    assert "\x1b" not in error


def test_two_dashes_are_no_spec(history, run):
    for words in (["find", "-r--"], ["-r--", "find"], ["restore", "--revision=--", "-"]):
        result = run("-b", history, *words)
        assert (result.status, result.out) == (1, "")
        assert result.err.splitlines()[-1].startswith("backy: ")


def test_an_ambiguous_spec_says_what_it_may_mean(history, run):
    result = run("-b", history, "find", "-r", "aa")
    assert (result.status, result.out) == (1, "")
    assert result.err == (
        "backy: vm1: 'aa' is ambiguous: "
        "aaXX1 (2026-11-20 10:00:00 UTC), aaYY2 (2026-11-21 10:00:00 UTC)\n"
    )


def test_a_tag_that_also_begins_an_id_is_ambiguous(history, run):
    plant(history, "daily7", DONE + "timestamp: 2026-11-19 10:00:00\ntags: []\n")
    result = run("-b", history, "find", "-r", "daily")
    assert result.status == 1
    assert "aaYY2" in result.err
    assert "daily7" in result.err


def test_a_full_id_wins_over_a_longer_one_that_begins_with_it(history, run):
    plant(history, "aaXX12", DONE + "timestamp: 2026-11-19 10:00:00\n")
    assert run("-b", history, "find", "-r", "aaXX1").out == f"{history}/aaXX1\n"


def test_a_number_out_of_range_is_not_the_beginning_of_an_id(history, run):
    plant(history, "77aa", DONE + "timestamp: 2026-11-19 10:00:00\n")
    assert run("-b", history, "find", "-r", "77").status == 1
    assert run("-b", history, "find", "-r", "77a").out == f"{history}/77aa\n"


@pytest.mark.parametrize("name", ["0", "latest"])
def test_an_id_does_not_hide_what_a_number_or_word_means(history, run, name):
    plant(history, name, "parent: null\ntimestamp: 2026-11-19 10:00:00\n")
    assert run("-b", history, "find", "-r", name).out == f"{history}/bbZZ3\n"


def test_a_job_without_a_complete_revision_says_so(tmp_path, run):
    plant(tmp_path, "ccWW4", "parent: null\ntimestamp: 2026-11-23 10:00:00\n")
    result = run("-b", tmp_path, "find")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"backy: {tmp_path.name}: there is no complete revision yet\n"


def test_find_prints_the_real_path(history, run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert run("-b", tmp_path / "link" / "vm1", "find").out == f"{history}/bbZZ3\n"


def test_find_names_no_image_that_is_not_there(history, run):
    (history / "bbZZ3").unlink()
    result = run("-b", history, "find", "-r", "0")
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1] == (
        "backy: vm1: bbZZ3: its image: No such file or directory"
    )
    (history / "ccWW4").unlink()
    assert "ccWW4 has no image" in run("-b", history, "find", "-r", "ccWW4").err


def test_find_as_json_has_path_and_revision(history, run):
    shown = json.loads(run("-b", history, "find", "-r", "1", "--json").out)
    assert set(shown) == {"version", "path", "revision"}
    assert shown["path"] == f"{history}/aaYY2"
    assert shown["revision"]["id"] == "aaYY2"


# -- protect, unprotect, forget ----------------------------------------------------


def test_protect_and_unprotect_are_recorded_once(history, run):
    assert run("-b", history, "protect", "-r", "aaXX1").status == 0
    before = contents(history)
    again = run("-b", history, "protect", "-r", "aaXX1")
    assert (again.status, again.err) == (0, "vm1: aaXX1 is protected\n")
    assert contents(history) == before
    assert [one.protected for one in revisions(history)] == [True, False, False, False]
    assert run("-b", history, "unprotect", "-r", "aaXX1").status == 0
    assert not any(one.protected for one in revisions(history))


def test_an_incomplete_revision_cannot_be_protected(history, run):
    result = run("-b", history, "protect", "-r", "ccWW4")
    assert (result.status, result.err) == (1, "backy: vm1: ccWW4 is incomplete\n")


def test_forget_needs_force_where_there_is_nobody_to_ask(history):
    before = contents(history)
    done = backy_process("-b", history, "forget", "-r", "2", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "backy: nobody to ask\nbacky: hint: use --force\n"
    assert contents(history) == before


def test_forget_deletes_one_revision_and_nothing_else(history, run):
    plant(history, "aaXX12", DONE + "timestamp: 2026-11-19 10:00:00\n")
    (history / "aaXX1.sums").write_bytes(b"")
    (history / "aaXX1.mine").write_bytes(b"")
    before = contents(history)
    result = run("-b", history, "forget", "-r", "aaXX1", "--force")
    assert (result.status, result.out, result.err) == (0, "", "vm1: aaXX1 is deleted\n")
    gone = {"aaXX1", "aaXX1.rev", "aaXX1.sums"}
    after = contents(history)
    assert {name: value for name, value in before.items() if name not in gone} == {
        name: value for name, value in after.items() if name not in ("last", "last.rev")
    }
    assert after["last"] == "bbZZ3"


def test_forget_asks_on_a_terminal(history):
    status, seen = on_terminal("-b", history, "forget", "-r", "2", typed="n\n")
    assert status == 1
    assert "delete aaXX1 (2026-11-20 10:00:00 UTC) [a-1,daily,weekly] of vm1? [y/N]" in seen
    assert "nothing was deleted" in seen
    assert (history / "aaXX1").exists()
    assert on_terminal("-b", history, "forget", "-r", "2", typed="y\n")[0] == 0
    assert not (history / "aaXX1").exists()


def test_end_of_input_means_no(history):
    status, seen = on_terminal("-b", history, "forget", "-r", "2", typed="\x04")
    assert (status, (history / "aaXX1").exists()) == (1, True)
    assert "nothing was deleted" in seen


def test_forget_refuses_a_protected_revision_even_with_force(history, run):
    run("-b", history, "protect", "-r", "1")
    before = contents(history)
    result = run("-b", history, "forget", "-r", "1", "--force")
    assert result.status == 1
    assert result.err == "backy: vm1: aaYY2 is protected\nbacky: hint: backy unprotect first\n"
    assert contents(history) == before


def test_forget_refuses_the_only_good_revision(history, run):
    plant(history, "aaYY2", DONE + "timestamp: 2026-11-21 10:00:00\ntrust: distrusted\n")
    (history / "aaXX1").unlink()
    before = contents(history)
    result = run("-b", history, "forget", "-r", "bbZZ3", "--force")
    assert result.status == 1
    assert "bbZZ3 is the only good revision" in result.err
    assert contents(history) == before
    # what is of no use or distrusted may go as long as the good one stays
    assert run("-b", history, "forget", "-r", "aaYY2", "--force").status == 0
    assert run("-b", history, "forget", "-r", "aaXX1", "--force").status == 0
    assert [one.id for one in revisions(history)] == ["bbZZ3", "ccWW4"]


def test_forgetting_the_newest_turns_last_away(history, run):
    assert run("-b", history, "forget", "-r", "0", "--force").status == 0
    assert os.readlink(history / "last") == "aaYY2"
    assert os.readlink(history / "last.rev") == "aaYY2.rev"


def test_an_incomplete_revision_is_forgotten_unless_it_is_just_being_made(history, run):
    with backy.Repository.open(str(history)) as repository, repository.job_lock("backup"):
        result = run("-b", history, "forget", "-r", "ccWW4", "--force")
        assert result.status == 1
        assert f"vm1 is locked by backup (pid {os.getpid()} on " in result.err
    assert run("-b", history, "forget", "-r", "ccWW4", "--force").status == 0
    assert not (history / "ccWW4").exists()


def test_beside_metadata_that_cannot_be_read_only_a_full_id_is_forgotten(history, run):
    (history / "zz.rev").write_text("")
    before = contents(history)
    for spec in ("2", "weekly", "aaX", "last", "2026-11-20"):
        result = run("-b", history, "forget", "-r", spec, "--force")
        assert result.status == 1
        assert f"cannot read zz.rev, so '{spec}' may mean another one" in result.err
    assert contents(history) == before
    assert run("-b", history, "forget", "-r", "aaXX1", "--force").status == 0
    assert (history / "zz.rev").exists()


# -- init -----------------------------------------------------------------------


def test_init_writes_a_config_that_only_we_can_read(tmp_path, run):
    (tmp_path / "vm.img").write_text("image")
    result = run("-b", tmp_path / "new" / "vm", "init", "file", tmp_path / "vm.img")
    assert (result.status, result.out, result.err) == (0, "", "")
    config = tmp_path / "new" / "vm" / "config"
    assert config.read_text() == f"{{filename: {tmp_path}/vm.img, type: file}}\n"
    assert config.stat().st_mode & 0o777 == 0o600
    assert config.parent.stat().st_mode & 0o777 == 0o700


def test_init_mentions_that_there_is_no_image_yet(tmp_path, run):
    result = run("-b", tmp_path / "vm", "init", "file", "/nowhere/vm.img")
    assert result.status == 0
    assert result.err == "backy: warning: there is no /nowhere/vm.img yet\n"


def test_init_makes_a_relative_source_absolute(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("-b", "vm", "init", "file", "disk.img").status == 0
    assert f"filename: {tmp_path}/disk.img" in (tmp_path / "vm" / "config").read_text()


def test_init_refuses_an_existing_config(tmp_path, run):
    run("-b", tmp_path, "init", "file", "/a")
    before = contents(tmp_path)
    result = run("-b", tmp_path, "init", "file", "/b")
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1] == "backy: Refusing to initialize with existing config."
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "words", "complaint"),
    [
        (
            "fiel",
            "/a",
            f"no source type 'fiel' (file?); there are: {TYPES}",
        ),
        ("\x1b", "/a", f"no source type '\N{REPLACEMENT CHARACTER}'; there are: {TYPES}"),
        ("file", "", "a file source is initialised with the path of an image"),
    ],
)
def test_init_refuses_what_it_does_not_know(tmp_path, run, kind, words, complaint):
    result = run("-b", tmp_path / "vm", "init", kind, words)
    assert (result.status, result.err) == (1, f"backy: {complaint}\n")
    assert not (tmp_path / "vm").exists()


def test_init_where_no_directory_can_be_made(tmp_path, run):
    (tmp_path / "file").write_text("")
    result = run("-b", tmp_path / "file" / "vm", "init", "file", tmp_path / "file")
    assert result.status == 1
    assert result.err == f"backy: cannot create {tmp_path}/file/vm: Not a directory\n"


# -- errors ---------------------------------------------------------------------


def test_a_missing_directory_is_one_line(tmp_path, run):
    result = run("-b", tmp_path / "none", "status")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"backy: {tmp_path}/none: no such directory\n"


def test_an_empty_directory_name_is_not_the_root_directory(run):
    result = run("-b", "", "status")
    assert result.status == 1
    assert "no such directory" in result.err or "empty" in result.err


def test_a_directory_that_is_no_job_says_how_to_make_one(tmp_path, run):
    (tmp_path / "foreign").write_text("")
    result = run("-b", tmp_path, "status")
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines() == [
        f"backy: {tmp_path}: no job here, there is no config",
        "backy: hint: make one with: backy -b DIR init file IMAGE",
    ]


def test_a_full_disk_behind_standard_output_is_an_error(history):
    with open("/dev/full", "wb") as full:
        done = backy_process(
            "-b", history, "status", capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr == "backy: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["backup", "manual:x"], 0),
        (["find", "-r", "x"], 1),
        (["nonsense"], 1),
        (["check", "-?"], 3),
    ],
)
def test_a_full_disk_behind_standard_error_changes_no_status(plain_job, words, status):
    with open("/dev/full", "wb") as full:
        done = backy_process(
            "-b", plain_job, *words, capture_output=False, stdout=subprocess.PIPE, stderr=full
        )
    assert done.returncode == status


@pytest.mark.parametrize("words", [["status"], ["--help"], ["help", "status"]])
def test_a_reader_that_went_away_ends_it_quietly(history, words):
    reading, writing = os.pipe()
    os.close(reading)
    done = backy_process(
        "-b", history, *words, capture_output=False, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_help_on_a_full_disk_is_one_line(run):
    with open("/dev/full", "wb") as full:
        done = backy_process("--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (MemoryError(), 1, "backy: out of memory\n"),
        (KeyboardInterrupt(), 130, "backy: interrupted\n"),
        (backy.Stopped(signal.SIGTERM), 143, "backy: ended by SIGTERM\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_ends_a_command_is_a_status_and_a_line(
    history, run, monkeypatch, failure, status, said
):
    def write(*_):
        raise failure

    monkeypatch.setattr(backy.os, "write", write)
    standard_output = os.dup(1)
    try:
        result = run("-b", history, "status")
    finally:
        os.dup2(standard_output, 1)
        os.close(standard_output)
    assert (result.status, result.out, result.err) == (status, "", said)


def test_a_working_directory_that_was_deleted_is_no_traceback(tmp_path, run, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for words in (["status"], ["init", "file", "image"], ["-b", tmp_path, "restore", "image"]):
        result = run(*words)
        assert (result.status, result.out) == (1, "")
        assert all(line.startswith("backy: ") for line in result.err.splitlines())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_restore_with_its_status(plain_job, source, run, number):
    job = plain_job
    assert run("-b", job, "backup", "daily").status == 0
    words = [sys.executable, str(COMPILED), "-b", str(job), "restore", "-"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)  # the pipe is full soon, and it waits
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1] in (
        b"backy: interrupted",
        f"backy: ended by {signal.Signals(number).name}".encode(),
    )


def test_a_lock_that_a_signal_tears_open_does_not_hide_the_signal(plain_job, run, monkeypatch):
    """Python's locks are not safe against exceptions of signal handlers, so this may happen."""

    def stop(*_: object) -> None:
        condition = threading.Condition()
        with condition:
            condition.release()  # as if the signal came just before it was taken again
            raise backy.Stopped(signal.SIGTERM)

    monkeypatch.setattr(backy.Repository, "open", stop)
    result = run("-b", plain_job, "status")
    assert (result.status, result.err) == (128 + signal.SIGTERM, "backy: ended by SIGTERM\n")


def test_sighup_that_was_ignored_stays_ignored(plain_job, run):
    job = plain_job
    assert run("-b", job, "backup", "daily").status == 0
    words = [sys.executable, str(COMPILED), "-b", str(job), "restore", "-"]
    ignore = [sys.executable, "-c", "import os, signal, sys\n"]
    ignore[-1] += (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with subprocess.Popen([*ignore, *words], stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_closed_descriptors_do_not_become_files_of_ours(job, source):
    script = (
        "import os, runpy, sys\n"
        "[os.close(fd) for fd in (0, 1, 2)]\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = ["-b", str(job), "backup", "daily"]
    done = subprocess.run([sys.executable, "-c", script, str(COMPILED), *words], check=False)
    assert done.returncode == 0
    (one,) = revisions(job)
    assert (job / one.id).read_bytes() == source.read_bytes()


def test_nothing_dear_is_imported_before_it_is_needed():
    dear = ["subprocess", "tempfile", "pathlib", "ssl", "asyncio", "urllib.request", "difflib"]
    script = f"import sys; import backy; print([n for n in {dear!r} if n in sys.modules])"
    found = command(
        sys.executable,
        "-I",
        "-S",
        "-c",
        script.replace(";", f";sys.path.insert(0, {str(PROGRAM.parent)!r});", 1),
    )
    assert found.stdout.strip() == "[]"
