# SPDX-License-Identifier: GPL-3.0-or-later
"""Dying at any call: nothing complete is lost or altered, and the next run needs no help."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import faults
import mutants
import pytest
from conftest import COMPILED, command, need, need_tool, shared_bytes
from faults import (
    Bench,
    Plan,
    contents,
    first,
    forgetting,
    interrupted_before,
    is_new,
    kill,
    points_of,
    sample,
    second,
    spread,
    sweep,
    terminate,
    threaded,
)

slow = pytest.mark.slow


def by_digest(top: Path) -> Bench:
    return Bench(top, *contents(), words=("backup", "--verify", "written", "daily"))


def damaged_parent(top: Path) -> Bench:
    """The parent's image and digests have rotten on the disk, where it does not tell."""
    bench = Bench(top, *contents())
    name = bench.ids[-1]
    bench.healthy = {one: bench.known[one] for one in (name, f"{name}.sums")}
    for name, offset in ((bench.ids[-1], 3 * faults.PAGE), (f"{bench.ids[-1]}.sums", 99)):
        with open(bench.base / name, "r+b") as file:
            file.seek(offset)
            file.write(b"rotten")
    bench.remember()
    bench.rewritten = {bench.ids[-1]}
    return bench


def verifying(top: Path) -> Bench:
    bench = Bench(top, *contents(), words=("verify", "-r", "0"))
    bench.rewritten = {bench.ids[-1]}
    return bench


def restoring(top: Path) -> Bench:
    return Bench(top, *contents(), words=("restore", "{target}"))


def after_restore(bench: Bench, job: Path, done: faults.Run):
    """The repository is untouched, and the same restore, asked for with force, succeeds."""
    if set(os.listdir(job)) != set(bench.known):
        yield f"I16: a restore has left {set(os.listdir(job)) ^ set(bench.known)}"
    yield from faults.lasting(bench, job)
    target = job.parent / "target"
    again = faults.run("-b", job, "restore", "--force", target)
    if again.status or target.read_bytes() != bench.known[bench.ids[-1]]:
        yield f"I5: restored again, status {again.status}: {again.said[-300:]!r}"


# -- the order of the steps ---------------------------------------------------


def test_each_step_is_on_the_medium_before_the_next_builds_on_it(cow):
    """I3, I9: image, digests, directory; the metadata; `last`; nothing after its flush."""
    bench = second(cow)
    trace = bench.trace()
    (name,) = {call.subject for call in trace if is_new(call, bench)}

    def numbers(call_name: str, subject: str = "") -> list[int]:
        return [
            call.number
            for call in trace
            if call.name == call_name and (not subject or call.subject == subject)
        ]

    directory, (begun, commit, last, last_rev) = numbers("fsync", "job"), numbers("rename")
    image, sums = max(numbers("fsync", name)), max(numbers("fsync", f"{name}.sums"))
    assert any(begun < at < numbers("open", name)[0] for at in directory)
    assert any(max(image, sums) < at < commit for at in directory)
    assert any(image < at < commit for at in numbers("preadv", name)), "nothing is read back"
    assert any(commit < at < min(numbers("symlink")) for at in directory)
    assert any(max(last, last_rev) < at for at in directory)
    for flush, subject in ((image, name), (sums, f"{name}.sums")):
        changes = [call for call in trace if call.changes and call.subject == subject]
        assert max(call.number for call in changes if call.name != "symlink") == flush
    for rename in (begun, commit):
        temporary = trace[rename - 1].subject
        assert max(numbers("pwrite", temporary)) < max(numbers("fsync", temporary)) < rename


def test_an_image_shares_nothing_with_its_source(cow):
    """I10: else both would rot at once."""
    bench = second(cow)
    assert bench.run(bench.base).status == 0
    command("sync", "-f", cow)
    assert shared_bytes(bench.source) == 0
    assert shared_bytes(bench.base / "last") > 0


# -- SIGKILL ------------------------------------------------------------------


def test_killed_where_it_matters_nothing_is_lost(cow):
    """I1, I2, I4, I5, I6, when killed before each call that changes the medium."""
    bench = second(cow)
    points = points_of(bench.trace(), lambda call: call.changes)
    sweep(bench, kill, points, faults.after_death)
    assert len(points) >= 25


@slow
def test_killed_at_every_call_of_a_backup_nothing_is_lost(cow):
    """I1, I2, I4, I5, I6, when killed before each call and after the last."""
    bench = second(cow)
    points = points_of(bench.trace())
    sweep(bench, kill, [*points, points[-1] + 1], faults.after_death)
    assert len(points) >= 150


@slow
@pytest.mark.parametrize(
    "make, number",
    [
        (first, 60),
        (by_digest, 40),
        (damaged_parent, 60),
        (interrupted_before, 60),
        (forgetting, 60),
        (verifying, 30),
        (threaded, 25),
    ],
)
def test_killed_anywhere_nothing_is_lost(cow, make, number):
    """I1, I2, I4, I5, I6, for other commands and other states of the directory."""
    bench = make(cow)
    trace = bench.trace()
    changes = points_of(trace, lambda call: call.changes)
    points = {*sample(changes, number // 2), *sample(points_of(trace), number // 2)}
    sweep(bench, kill, sorted(points), faults.after_death)


@slow
def test_a_restore_that_was_killed_harms_nothing_and_can_be_repeated(cow):
    bench = restoring(cow)
    sweep(bench, kill, sample(points_of(bench.trace()), 40), after_restore)


@slow
def test_killed_once_more_in_the_recovery_nothing_is_lost(cow):
    """I5, I6 hold also for the run after the run that was to recover."""
    bench = second(cow)
    started, violations, points = time.monotonic(), [], 0
    for at in sample(points_of(bench.trace(), lambda call: call.changes), 8):
        with bench.job() as job:
            bench.run(job, Plan(at, kill))
            again = copy.copy(bench)
            again.base = job
            changes = sample(points_of(again.trace(), lambda call: call.changes), 8)
            problems = faults.found(again, kill, changes, faults.after_death)
            violations += [f"kill at call {at}, then {problem}" for problem in problems]
            points += len(changes)
    faults.tell(points, violations, started)


# -- SIGTERM ------------------------------------------------------------------


def after_stop(bench: Bench, job: Path, done: faults.Run):
    """It has ended by the signal, or its last call was behind it; what is left can be resumed."""
    new = [revision.id for revision in faults.complete(job) if revision.id not in bench.ids]
    if done.status not in (0, 143) or (done.status == 0 and len(new) != 1):
        yield f"I8: status {done.status}, {len(new)} new revisions: {done.said[-300:]!r}"
    left = faults.left_over(bench, job)
    if len({name.partition(".")[0] for name in left}) > 1 or any(
        name.startswith(".") or name.endswith(".del") for name in left
    ):
        yield f"I6: {left} are left over"
    yield from faults.after_death(bench, job, done)


@slow
def test_stopped_at_any_call_it_leaves_at_most_what_can_be_resumed(cow):
    """SIGTERM: I1, I2, I4, I5, I6."""
    bench = second(cow)
    trace = bench.trace()
    points = {*points_of(trace, lambda call: call.changes), *sample(points_of(trace), 60)}
    sweep(bench, terminate, sorted(points), after_stop)


@slow
def test_stopped_while_threads_work_it_leaves_at_most_what_can_be_resumed(cow):
    bench = threaded(cow)
    sweep(bench, terminate, sample(points_of(bench.trace()), 15), after_stop)


# -- programs with a fault ----------------------------------------------------


@slow
@pytest.mark.parametrize(
    "make, mutant",
    [
        (second, mutants.commit_before_data),
        (second, mutants.last_before_commit),
        (second, mutants.metadata_in_place),
        (forgetting, mutants.image_removed_first),
    ],
)
def test_a_kill_finds_out(xfs, make, mutant):
    """What is claimed above can fail: with two steps in the wrong order, it does."""
    bench = make(xfs)
    with bench.job() as job:
        points = points_of(bench.run(job, mutate=mutant).trace, lambda call: call.changes)
    assert faults.found(bench, kill, points, faults.after_death, mutate=mutant)


# -- real system calls --------------------------------------------------------

SYSTEM_CALLS = (
    "openat,close,read,pread64,preadv2,pwrite64,fsync,fdatasync,rename,renameat,renameat2,"
    "unlink,unlinkat,symlink,symlinkat,ftruncate,fchmod,ioctl,flock,lseek,newfstatat,fstat,"
    "getdents64,fadvise64,mkdir,mkdirat,write,fallocate,fcntl"
)


def strace(job: Path, log: Path, *options: str) -> int:
    """Run a backup as a process of its own under strace; its status."""
    words = ["strace", "-f", "-qq", "-o", log, "-e", "signal=none", *options]
    words += [sys.executable, COMPILED, "-b", job, "backup", "daily"]
    return subprocess.run(words, capture_output=True, check=False, timeout=60).returncode


def real_calls(bench: Bench, log: Path) -> list[tuple[str, int, str]]:
    """(name, how many of that name before and with it, text) of all calls from the first
    on that concerns the job."""
    with bench.job() as job:
        status = strace(job, log, "-e", f"trace={SYSTEM_CALLS}")
        need(status == 0, f"strace cannot trace here: {log.read_text()[-200:]}")
        calls, seen, begun = [], Counter(), False
        for line in log.read_text().splitlines():
            match = re.match(r"(?:\d+ +)?(\w+)\(", line)
            if match:
                seen[match[1]] += 1
                begun = begun or f'"{job}"' in line
                if begun:
                    calls.append((match[1], seen[match[1]], line))
        return calls


@slow
def test_killed_at_real_system_calls_nothing_is_lost(cow, tmp_path):
    """I1, I2, I4, I5, I6, without the seam; and it had missed no call that changes anything."""
    need_tool("strace")
    bench = second(cow)
    calls = real_calls(bench, tmp_path / "log")

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, _, text in calls)

    names = Counter(call.name for call in bench.trace() if call.changes)
    assert names["fsync"] == count(r"fsync\(") >= 6
    assert names["pwrite"] == count(r"pwrite64\(")
    assert names["rename"] == count(r"rename(at2?)?\(")
    assert names["unlink"] == count(r"unlink(at)?\(")
    assert names["symlink"] == count(r"symlink(at)?\(")
    assert names["ftruncate"] == count(r"ftruncate\(")
    assert names["fchmod"] == count(r"fchmod\(")
    assert names["open"] == count("openat.*O_CREAT")
    assert names["ioctl"] == count("ioctl.*(FICLONE|UNRESVSP|0x58, 0x2b)")
    assert not count(r"\b(fallocate|mkdir|mkdirat|write)\((?!2,)")

    started = time.monotonic()
    chosen = sample(list(range(len(calls))), 30)

    def work(index: int):
        name, ordinal, text = calls[index]
        with bench.job() as job:
            inject = f"inject={name}:signal=KILL:when={ordinal}"
            status = strace(job, tmp_path / f"log{index}", "-e", f"trace={name}", "-e", inject)
            if status not in (137, -9):
                yield f"killed at {text}: status {status}"
            for problem in faults.after_death(bench, job, faults.Run(status, "")):
                yield f"killed at {text}: {problem}"

    faults.tell(len(chosen), spread(work, chosen), started)
