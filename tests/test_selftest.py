# SPDX-License-Identifier: GPL-3.0-or-later
"""The command that shows the main job: what it proves, where, as whom, and that it can fail."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest
from conftest import PROGRAM, MiB, backy_process, need, need_root, need_tool

import backy


@pytest.fixture(autouse=True)
def small_disk(monkeypatch):
    """Half as large, of bytes that are made once; as a process of its own it is as it is."""
    monkeypatch.setattr(backy.Selftest, "SIZE", 32 * MiB)
    monkeypatch.setattr(backy, "selftest_noise", NOISE)


NOISE = functools.lru_cache(maxsize=None)(backy.selftest_noise)


def test_it_proves_the_main_job_and_leaves_nothing(cow, run):
    result = run("selftest", cow)
    assert (result.status, result.err) == (0, ""), result
    lines = result.out.splitlines()
    assert lines[0].startswith(f"backy {backy.__version__} selftest in {cow}/backy-selftest-")
    assert "  can    share extents between revisions" in lines
    steps = [line.split(":")[0].split(",")[0] for line in lines if line.startswith("  ok     ")]
    assert [step.split()[1] for step in steps] == [
        *("made", "first", "changed", "verified", "flipped", "restored"),
    ]
    assert all("/s" in line for line in lines if line.startswith("  ok     first"))
    assert lines[-1].startswith("proven: backup, change, verification, damage found, restore, in ")
    assert list(cow.iterdir()) == []


def test_without_reflinks_it_says_what_that_costs(ext4, run):
    result = run("selftest", ext4)
    assert result.status == 0
    assert "  cannot share extents between revisions" in result.out
    assert "on this file system (ext4) every revision takes the space of a full copy" in result.out


def test_any_user_may_run_it(tmp_path):
    need_root()
    program = tmp_path / "backy.py"
    program.write_bytes(PROGRAM.read_bytes())
    for path in (*tmp_path.parents, tmp_path):
        if path.name.startswith(("pytest-", "popen-", "test_")):
            os.chmod(path, 0o755)
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    python = "/usr/bin/python3"  # a virtual environment may be out of the other's reach
    need(os.access(python, os.X_OK), f"no {python} on this host")
    done = subprocess.run(
        [python, "-I", str(program), "selftest", str(place)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
        preexec_fn=lambda: (os.setgroups([]), os.setgid(65534), os.setuid(65534)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "proven: " in done.stdout


def test_a_place_that_cannot_be_used_is_one_error(run):
    result = run("selftest", "/nowhere")
    assert (result.status, result.out) == (1, "")
    assert result.err == "backy: cannot make a directory in /nowhere: No such file or directory\n"


def test_its_disk_is_a_file_system_that_others_read(tmp_path):
    need_tool("fsck.fat")
    files = {"WORDS   TXT": b"words " * 1000, "NOISE   BIN": os.urandom(70000)}
    for size in (16 * MiB, 64 * MiB):
        path = tmp_path / f"disk-{size}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        backy.fat_disk(fd, size, files)
        os.close(fd)
        assert path.stat().st_size == size
        done = subprocess.run(["fsck.fat", "-n", path], capture_output=True, text=True, check=False)
        said = [line for line in done.stdout.splitlines()[1:] if line and "label" not in line]
        assert said[0] == "Leaving filesystem unchanged.", done.stdout
        assert said[1].startswith(f"{path}: 2 files, ")


# Each of these makes backy wrong in one place; the selftest must not say "proven".
MUTANTS = {
    "a backup that misses a change": (
        "differing_runs",
        lambda real: lambda buffers, length, *args, **kw: real(buffers, length, *args, **kw)[:-1],
    ),
    "digests that never differ": ("block_digest", lambda real: lambda view: bytes(32)),
    "a clone that is none": ("clone_file", lambda real: lambda origin_fd, target_fd: None),
    "a second backup that writes all": (
        "clone_file",
        lambda real: refuse_images(real),
    ),
}


def refuse_images(real):
    def clone_file(origin_fd, target_fd):
        if "probe-" in os.readlink(f"/proc/self/fd/{origin_fd}"):
            return real(origin_fd, target_fd)
        raise backy.CloneUnsupported("cannot share extents")

    return clone_file


@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_does_not_prove_what_is_not_true(xfs, run, monkeypatch, mutant):
    name, change = MUTANTS[mutant]
    monkeypatch.setattr(backy, name, change(getattr(backy, name)))
    result = run("selftest", xfs)
    assert result.status == 1
    assert "proven" not in result.out
    assert result.err.startswith("backy: ")


def test_wrong_bytes_after_a_restore_are_noticed(xfs, run, monkeypatch):
    real = os.pwrite

    def pwrite(fd, data, offset):
        path = os.readlink(f"/proc/self/fd/{fd}")
        wrong = path.endswith("restored.img") and offset
        return real(fd, bytes(len(data)) if wrong else data, offset)

    monkeypatch.setattr(backy.os, "pwrite", pwrite)
    result = run("selftest", xfs)
    assert result.status == 1
    assert "selftest: restored.img is not what was backed up" in result.err


def test_standard_output_that_is_full_ends_it(xfs):
    with open("/dev/full", "wb") as full:
        done = backy_process(
            "selftest", xfs, capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert list(xfs.iterdir()) == []


def test_the_type_of_a_file_system_is_known(cow, ext4, monkeypatch):
    assert backy.file_system_of(str(ext4)) == "ext4"
    assert backy.file_system_of(str(cow)) in str(cow)
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert backy.file_system_of(str(ext4)) == "unknown"
