# SPDX-License-Identifier: GPL-3.0-or-later
"""Power cuts at any call: what was complete, and what ended with status 0, is there afterwards.

Two ways to cut the power.  XFS can be told to go down at once, with all that is
not on the medium (its shutdown ioctl).  And the file that holds the file system
can be cloned at a call, as the disk stands at that moment; the clone is mounted.

A harness is worth what it finds, so it is also shown programs that leave out one
step or take two in the wrong order; each must be found out.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator

import faults
import mutants
import pytest
from conftest import FileSystem
from faults import (
    Bench,
    Call,
    MiB,
    Plan,
    Run,
    complete,
    first,
    forgetting,
    interrupted_before,
    kill,
    points_of,
    second,
)

import backy

SIZES = {"xfs": 300 * MiB, "btrfs": 128 * MiB}  # the smallest that work well
XFS_IOC_GOINGDOWN, NOLOGFLUSH = 0x8004587D, 2
slow = pytest.mark.slow


def after_cut(bench: Bench, job: Path, status: int | None) -> Iterator[str]:
    """I1, I2, I4, I5, I6; and I3: a status of 0 was a promise (None: the run was not over)."""
    new = [revision.id for revision in complete(job) if revision.id not in bench.ids]
    last = os.path.basename(os.path.realpath(job / "last"))
    if status == 0 and bench.words[0] == "backup" and new != [last]:
        yield f"I3: it ended with status 0; new are {new}, last names {last}"
    if status == 0 and any((job / f"{one}.rev").exists() for one in bench.mayfly):
        yield "I3: forget ended with status 0, and the revision is back"
    yield from faults.after_death(bench, job, Run(status or 0, ""))


# -- the disk as it stands at each call ----------------------------------------


class Frozen:
    """A file system whose disk is cloned before each call that changes it, and at the end."""

    def __init__(self, system: FileSystem) -> None:
        self.system = system

    def copy(self, name: object) -> Path:
        return self.system.top / f"disk-{name}"

    def take(self, name: object) -> None:
        with open(self.system.disk, "rb") as disk, open(self.copy(name), "wb") as copy:
            fcntl.ioctl(copy.fileno(), backy.FICLONE, disk.fileno())

    def __call__(self, call: Call) -> object:
        if call.changes:
            self.take(call.number)
        return call.run()

    def run(self, bench: Bench, mutate: Callable | None = None) -> list[tuple[str, Path]]:
        """Run the bench's command; where the power was cut, and the disk as it was then."""
        subprocess.run(["sync", "-f", bench.base], check=True)
        done = bench.run(bench.base, Plan(1, self, sticky=True), mutate)
        self.take("end")
        assert done.status == 0, done.said
        self.system.unmount()
        cuts = [(str(call), self.copy(call.number)) for call in done.trace if call.changes]
        return [*cuts, ("the end", self.copy("end"))]

    def judge(self, bench: Bench, cuts: list[tuple[str, Path]]) -> Iterator[str]:
        """What is wrong with each of these copies."""
        for where, copy in cuts:
            self.system.mount(disk=copy)
            try:
                for problem in after_cut(bench, bench.base, 0 if where == "the end" else None):
                    yield f"power cut at {where}: {problem}"
            finally:
                self.system.unmount()
                copy.unlink()


@pytest.fixture(params=["xfs", "btrfs"])
def system(request, new_file_system, xfs):
    """A file system of this test's own, whose disk can be cloned."""
    return new_file_system(request.param, SIZES[request.param], where=xfs)


@slow
@pytest.mark.parametrize("make", [second, first, interrupted_before, forgetting])
def test_a_power_cut_at_any_change_loses_nothing(system, make):
    """I1, I2, I3, I4, I5, I6, on the disk as it stands at that moment."""
    bench, frozen, started = make(system.path), Frozen(system), time.monotonic()
    cuts = frozen.run(bench)
    faults.tell(len(cuts), list(frozen.judge(bench, cuts)), started)
    assert len(cuts) >= 10


# -- file systems that go down ------------------------------------------------


def go_down(path: Path) -> None:
    """Stop a mounted XFS at once, without writing what only its memory knows."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, XFS_IOC_GOINGDOWN, struct.pack("I", NOLOGFLUSH))
    finally:
        os.close(fd)


def cut(system: FileSystem, bench: Bench, point: int | None, mutate: Callable | None = None):
    """What is wrong after the power was cut at call `point`, or at the end."""

    def fault(call: Call) -> None:
        go_down(system.path)
        kill(call)

    with bench.job() as job:
        subprocess.run(["sync", "-f", job], check=True)
        done = bench.run(job, Plan(point, fault) if point else None, mutate)
        if not point:
            assert done.status == 0, done.said
            go_down(system.path)
        system.unmount()
        system.mount()
        return list(after_cut(bench, job, None if point else 0))


def test_after_status_0_a_power_cut_loses_nothing(new_file_system):
    """I3."""
    system = new_file_system("xfs", SIZES["xfs"])
    bench = second(system.path)
    assert cut(system, bench, None) == []
    assert cut(system, bench, None, mutants.without_directory_flush)


@slow
@pytest.mark.parametrize("make", [second, first, interrupted_before])
def test_when_xfs_goes_down_at_any_change_nothing_is_lost(new_file_system, make):
    """I1, I2, I3, I4, I5, I6, with all lost that was not flushed."""
    system = new_file_system("xfs", SIZES["xfs"])
    bench = make(system.path)
    trace, started, violations = bench.trace(), time.monotonic(), []
    points = points_of(trace, lambda call: call.changes)
    for point in [*points, None]:
        where = trace[point - 1] if point else "the end"
        violations += [f"XFS down at {where}: {problem}" for problem in cut(system, bench, point)]
    faults.tell(len(points) + 1, violations, started)


# -- programs with a fault ----------------------------------------------------

MUTANTS = [
    mutants.without_image_flush_and_reading_back,
    mutants.without_directory_flush,
    mutants.without_metadata_flush,
    mutants.commit_before_data,
    mutants.last_before_commit,
]


@slow
@pytest.mark.parametrize(
    "system, mutant",
    [("btrfs", mutants.without_image_flush), *((kind, one) for kind in SIZES for one in MUTANTS)],
    indirect=["system"],
)
def test_a_power_cut_finds_out(system, mutant):
    """What is claimed above can fail: with one step left out or out of order, it does."""
    bench, frozen = second(system.path), Frozen(system)
    cuts = frozen.run(bench, mutant)
    assert any(frozen.judge(bench, cuts[::-1]))
