# SPDX-License-Identifier: GPL-3.0-or-later
"""A backup that was cut off is gone on with: what is proven is kept, only the rest is read."""

from __future__ import annotations

import os
import shutil

import faults
import pytest
from conftest import MiB, backy_process, noise, revisions, write_image

import backy

SIZE = 24 * MiB


def missing_bytes(job) -> int:
    """How much of the image the trail of the interrupted revision does not have."""
    (trail,) = job.glob("*.part")
    steps = trail.read_bytes()
    step = backy.trail_step.size
    done = sum(any(steps[at : at + step]) for at in range(0, len(steps), step))
    return SIZE - done * backy.UNIT


@pytest.fixture
def big_job(cow, tmp_path, run):
    """A job whose image is read by several threads, and the image."""
    image = write_image(tmp_path / "big.img", (0, noise(SIZE, 5)), size=SIZE)
    assert run("-b", cow / "job", "init", "file", image).status == 0
    return cow / "job", image


def half_way(trace: list[faults.Call]) -> int:
    """The call with which half of what is written was written."""
    writes = [call.number for call in trace if call.name == "pwrite"]
    return writes[len(writes) // 2]


def cut_off(job, fresh, at: int) -> bool:
    """Kill a backup in a copy of `fresh` at its `at`-th call; whether anything can be kept."""
    shutil.rmtree(job, ignore_errors=True)
    shutil.copytree(fresh, job, symlinks=True)
    done = faults.run("-b", job, "backup", "x", plan=faults.Plan(at, faults.kill))
    assert done.status in (-9, 0)  # 0: its last call was before that one
    return bool(list(job.glob("*.part"))) and not revisions(job)[-1].is_complete


def go_on(job, image, run) -> backy.Revision:
    result = run("-b", job, "backup", "x")
    assert result.status == 0, result
    revision = revisions(job)[-1]
    assert (job / revision.id).read_bytes() == image.read_bytes()
    assert not list(job.glob("*.part"))
    return revision


def read_of_source(revision: backy.Revision) -> int:
    return backy.resolve(revision.stats["bytes_read"])


@pytest.mark.slow
def test_killed_at_100_points_the_next_run_reads_only_what_is_missing(big_job, tmp_path, run):
    job, image = big_job
    fresh = tmp_path / "fresh"
    shutil.copytree(job, fresh)
    calls = len(faults.run("-b", job, "backup", "x").trace)
    kept = 0
    for number in range(100):
        if cut_off(job, fresh, 1 + calls * number // 110):
            missing = missing_bytes(job)
            kept += missing < SIZE
            revision = go_on(job, image, run)
            assert read_of_source(revision) <= missing + SIZE // 20
        else:
            go_on(job, image, run)
    assert kept > 50


def test_what_a_killed_run_has_done_is_not_read_again(big_job, tmp_path, run):
    job, image = big_job
    shutil.copytree(job, tmp_path / "fresh")
    trace = faults.run("-b", job, "backup", "x").trace
    assert cut_off(job, tmp_path / "fresh", half_way(trace))
    missing = missing_bytes(job)
    assert 0 < missing < SIZE
    assert read_of_source(go_on(job, image, run)) <= missing + SIZE // 20


def test_a_differential_run_is_gone_on_with_and_still_shares(big_job, tmp_path, run):
    job, image = big_job
    assert run("-b", job, "backup", "x").status == 0
    write_image(image, *((at, noise(4096, at)) for at in range(0, SIZE, MiB // 2)))
    shutil.copytree(job, tmp_path / "fresh", symlinks=True)
    trace = faults.run("-b", job, "backup", "x").trace
    shutil.rmtree(job)
    shutil.copytree(tmp_path / "fresh", job, symlinks=True)
    done = faults.run("-b", job, "backup", "x", plan=faults.Plan(half_way(trace), faults.kill))
    assert done.status == -9
    missing = missing_bytes(job)
    assert missing < SIZE
    assert run("-b", job, "backup", "x").status == 0
    old, new = revisions(job)
    assert (job / new.id).read_bytes() == image.read_bytes()
    assert read_of_source(new) <= missing + SIZE // 20
    assert 0 < new.bytes_written <= SIZE // (MiB // 2) * 4096
    assert new.parent == old.id


def test_a_source_that_changed_meanwhile_is_read_anew(big_job, tmp_path, run):
    job, image = big_job
    shutil.copytree(job, tmp_path / "fresh")
    trace = faults.run("-b", job, "backup", "x").trace
    assert cut_off(job, tmp_path / "fresh", half_way(trace))
    write_image(image, (0, b"changed"))
    assert read_of_source(go_on(job, image, run)) == SIZE


def test_no_resume_begins_anew(big_job, tmp_path, run):
    job, image = big_job
    shutil.copytree(job, tmp_path / "fresh")
    trace = faults.run("-b", job, "backup", "x").trace
    assert cut_off(job, tmp_path / "fresh", half_way(trace))
    (left,) = job.glob("*.part")
    assert run("-b", job, "backup", "--no-resume", "x").status == 0
    (revision,) = revisions(job)
    assert revision.id != left.stem
    assert read_of_source(revision) == SIZE
    assert (job / revision.id).read_bytes() == image.read_bytes()


@pytest.mark.parametrize("what", ["image", "sums", "trail"])
def test_what_is_not_proven_is_read_again(big_job, tmp_path, run, what):
    """Whatever a power failure makes of the three files, only what agrees is kept."""
    job, image = big_job
    shutil.copytree(job, tmp_path / "fresh")
    trace = faults.run("-b", job, "backup", "x").trace
    assert cut_off(job, tmp_path / "fresh", half_way(trace))
    missing = missing_bytes(job)
    (trail,) = job.glob("*.part")
    path = {"image": job / trail.stem, "sums": job / f"{trail.stem}.sums", "trail": trail}[what]
    with open(path, "r+b") as file:
        data = file.read()
        first = next(at for at in range(backy.sums_header.size, len(data)) if data[at])
        file.seek(first)
        file.write(bytes([data[first] ^ 1]))
    revision = go_on(job, image, run)
    assert missing < read_of_source(revision) <= missing + 3 * backy.UNIT
    assert run("-b", job, "verify").status == 0


def test_a_terminated_run_says_that_the_next_goes_on(big_job, tmp_path, run):
    job, image = big_job
    shutil.copytree(job, tmp_path / "fresh")
    trace = faults.run("-b", job, "backup", "x").trace
    shutil.rmtree(job)
    shutil.copytree(tmp_path / "fresh", job)
    done = faults.run("-b", job, "backup", "x", plan=faults.Plan(half_way(trace), faults.terminate))
    assert done.status == 143
    assert "the next backup goes on from here" in done.said
    assert run("-b", job, "find").status == 1
    go_on(job, image, run)


def test_a_restore_that_was_cut_off_is_gone_on_with(big_job, tmp_path, run):
    job, image = big_job
    assert run("-b", job, "backup", "x").status == 0
    target = tmp_path / "restored.img"
    trace = faults.run("-b", job, "restore", target).trace
    os.unlink(target)
    done = faults.run("-b", job, "restore", target, plan=faults.Plan(half_way(trace), faults.kill))
    assert done.status == -9
    result = backy_process("-b", job, "restore", "--force", target)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == image.read_bytes()
    written = int(float(result.stderr.split(" MiB written")[0].rsplit(" ", 1)[1]))
    assert written < 20
