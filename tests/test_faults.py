# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors, short and false answers at any call: told in a line, and nothing good is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Iterator

import faults
import mutants
import pytest
from conftest import FileSystem, command, need, need_root, noise
from faults import (
    DATA_READ,
    DATA_WRITTEN,
    FLUSHES,
    PAGE,
    Bench,
    Call,
    KiB,
    MiB,
    Plan,
    after_failure,
    can_fail,
    contents,
    fail,
    fall_short,
    flip,
    forgetting,
    lie,
    out_of_memory,
    points_of,
    sample,
    second,
    sweep,
    threaded,
)

slow = pytest.mark.slow
ERRORS = [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EINTR]
if faults.TORTURE > 1:
    ERRORS += [errno.EROFS, errno.EDQUOT, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.ESTALE]


def name_of(code: int) -> str:
    return errno.errorcode[code]


def after_lasting_failure(bench: Bench, job: Path, done: faults.Run):
    """After a run in which nothing went any more; it could not clear up.

    What it had made complete before that is complete, whatever its status is.
    """
    yield from faults.failure_is_told(done)
    yield from faults.flushed_once(done)
    if done.status == 0:
        yield from faults.status_is_true(bench, job, done)
    yield from faults.after_death(bench, job, done)


def after_success(bench: Bench, job: Path, done: faults.Run):
    """After a run that was to take no notice."""
    if done.status:
        yield f"I8: status {done.status}: {done.said[-300:]!r}"
    yield from after_failure(bench, job, done)


# -- errors -------------------------------------------------------------------


def test_a_flush_that_fails_once_is_the_end_of_the_revision(cow):
    """I2, I8, I11: each fsync, failing once with EIO; the next one would say that all is well."""
    bench = second(cow)
    flushes = points_of(bench.trace(), lambda call: call.name in FLUSHES)
    assert len(flushes) >= 6
    sweep(bench, fail(errno.EIO), flushes, after_failure)


@slow
@pytest.mark.parametrize("code", ERRORS, ids=name_of)
def test_an_error_at_any_call_is_coped_with_or_told_and_cleared_up(cow, code):
    """I1, I2, I4, I5, I6, I8, I11, I16, I26: any call fails once."""
    bench = second(cow)
    bench.rewritten = set(bench.ids)  # a parent that could not be read may be marked so
    points = points_of(bench.trace(), lambda call: can_fail(call, code))
    if "btrfs" in str(cow):
        points = sample(points, 120)
    sweep(bench, fail(code), points, after_failure)


@slow
@pytest.mark.parametrize("code", ERRORS, ids=name_of)
def test_errors_at_all_calls_from_any_on_harm_nothing(cow, code):
    """I1, I2, I4, I5, I11, I16, I26: this call and all later ones fail."""
    bench = second(cow)
    bench.rewritten = set(bench.ids)  # a parent that could not be read may be marked so
    points = points_of(bench.trace(), lambda call: can_fail(call, code))
    sweep(bench, fail(code), sample(points, 40), after_lasting_failure, sticky=True)


@slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=name_of)
def test_an_error_in_one_of_several_threads_ends_them_all(cow, code):
    bench = threaded(cow)
    bench.rewritten = set(bench.ids)  # a parent that could not be read may be marked so
    points = points_of(bench.trace(), lambda call: can_fail(call, code) and is_transfer(call))
    sweep(bench, fail(code), sample(points, 15), after_failure)


def is_transfer(call: Call) -> bool:
    return call.name in DATA_READ | DATA_WRITTEN | FLUSHES or call.name == "ioctl"


@slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=name_of)
def test_an_error_while_forgetting_loses_only_what_was_to_go(cow, code):
    bench = forgetting(cow)
    points = points_of(bench.trace(), lambda call: can_fail(call, code))
    sweep(bench, fail(code), sample(points, 40), after_lasting_failure)


@slow
def test_no_memory_at_any_call_is_told_and_cleared_up(xfs):
    bench = second(xfs)
    sweep(bench, out_of_memory, sample(points_of(bench.trace()), 60), after_failure)


# -- short and false answers --------------------------------------------------


@slow
def test_a_short_write_is_taken_up_again(xfs):
    """I1, I8: the run succeeds as if nothing had been."""
    bench = second(xfs)
    points = points_of(bench.trace(), lambda call: call.name == "pwrite")
    assert len(points) >= 5
    sweep(bench, fall_short, points, after_success)


@slow
def test_a_short_read_is_taken_up_again_or_told(xfs):
    """I1, I8, I26: images are read on; a small file that comes back cut is an error."""
    bench = second(xfs)
    trace = bench.trace()
    sweep(bench, fall_short, points_of(trace, lambda call: call.name == "preadv"), after_success)
    small = points_of(trace, lambda call: call.name in ("read", "pread"))
    sweep(bench, fall_short, small, after_failure)


@slow
@pytest.mark.parametrize("mode", ["full", "written"])
def test_a_write_that_was_never_done_is_found_out(xfs, mode):
    """I1, I8: pwrite, ioctl and ftruncate say that they are done and have done nothing."""
    bench = Bench(xfs, *contents(), words=("backup", "--verify", mode, "daily"))
    lying = ("pwrite", "ioctl", "ftruncate")
    sweep(bench, lie, points_of(bench.trace(), lambda call: call.name in lying), after_failure)
    fresh = xfs / "fresh"
    fresh.mkdir()
    bench = Bench(fresh, contents()[0], words=bench.words)
    sweep(bench, lie, points_of(bench.trace(), lambda call: call.name in lying), after_failure)


@slow
@pytest.mark.parametrize("mode", ["full", "written"])
def test_a_bit_that_flips_on_its_way_from_the_store_does_no_harm(xfs, mode):
    """I1, I2, I8, I15: what is read of our own files, with one bit wrong."""
    bench = Bench(xfs, *contents(), words=("backup", "--verify", mode, "daily"))
    bench.rewritten = set(bench.ids)  # a parent that looks damaged may be marked so
    points = points_of(
        bench.trace(), lambda call: call.name in DATA_READ and call.subject != "source"
    )
    sweep(bench, flip, points, after_failure)


@slow
def test_a_bit_flip_in_metadata_on_the_disk_deletes_nothing(xfs):
    """I15: whatever the damaged `.rev` seems to say now, its image stays."""
    bench = second(xfs)
    (name,) = bench.ids[-1:]
    data = bench.known[f"{name}.rev"]
    looks_incomplete = []
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            if not faults.backy.decode_revision(bytes(damaged), name).is_complete:
                looks_incomplete.append(bytes(damaged))
        except ValueError:
            pass
    for damaged in looks_incomplete[:: max(1, len(looks_incomplete) // 20)]:
        with bench.job() as job:
            mode = (job / f"{name}.rev").stat().st_mode
            (job / f"{name}.rev").chmod(0o600)
            (job / f"{name}.rev").write_bytes(damaged)
            (job / f"{name}.rev").chmod(mode)
            bench.run(job)
            assert (job / name).exists(), damaged.decode(errors="replace")


@pytest.mark.parametrize(
    "mutant, fault, names",
    [
        (mutants.flush_again, fail(errno.EIO), FLUSHES),
        (mutants.without_reading_back, lie, {"pwrite"}),
    ],
)
def test_a_fault_finds_out(xfs, mutant, fault, names):
    """What is claimed above can fail: with a step too many or too few, it does."""
    bench = second(xfs)
    points = points_of(bench.trace(), lambda call: call.name in names)
    assert faults.found(bench, fault, points, after_failure, mutate=mutant)


# -- a disk that is full ------------------------------------------------------


def fill(path: Path, room: int) -> Path:
    """Leave about `room` bytes on the file system."""
    filler = path / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        size = 0
        for step in (32 * MiB, 4 * MiB, 512 * KiB, 64 * KiB, PAGE):
            while True:
                try:
                    os.posix_fallocate(fd, size, step)
                    size += step
                except OSError:
                    break
        os.fsync(fd)
        os.ftruncate(fd, max(0, size - room))
    finally:
        os.close(fd)
    command("sync", "-f", path)
    return filler


@slow
@pytest.mark.parametrize("kind, size", [("xfs", 300 * MiB), ("btrfs", 128 * MiB)])
def test_on_a_full_disk_a_backup_fails_cleanly_and_forget_works(new_file_system, kind, size):
    """I1, I2, I4, I6, I8, I34, with 0 to 3 MB free for 2 MB of changes."""
    system = new_file_system(kind, size)
    image = noise(3 * MiB, 1)
    bench = Bench(system.path, noise(MiB, 3), image, noise(2 * MiB, 2) + image[2 * MiB :])
    violations, started, rooms = [], time.monotonic(), range(0, 3 * MiB + 1, 256 * KiB)
    statuses = set()
    for room in rooms:
        with bench.job() as job:
            filler = fill(system.path, room)
            done = bench.run(job)
            statuses.add(done.status)
            problems = [*faults.failure_is_told(done), *faults.status_is_true(bench, job, done)]
            problems += faults.nothing_is_left_over(bench, job)
            problems += faults.lasting(bench, job)
            if done.status and "No space left on device" not in done.said:
                problems.append(f"I26: {done.said!r}")
            forgotten = faults.run("-b", job, "forget", "-r", bench.ids[0], "--force")
            if forgotten.status or (job / bench.ids[0]).exists():
                problems.append(f"I34: forget, status {forgotten.status}: {forgotten.said!r}")
            bench.mayfly = {bench.ids[0]}
            problems += faults.lasting(bench, job)
            filler.unlink()
            command("sync", "-f", system.path)
            problems += faults.next_run_succeeds(bench, job)
            bench.mayfly = set()
        violations += [f"{room // KiB} KiB free: {problem}" for problem in problems]
    assert statuses == {0, 1}, "too much room or too little"
    faults.tell(len(rooms), violations, started)


# -- disks that do not answer -------------------------------------------------


def test_a_source_that_cannot_be_read_is_told_with_its_offset(cow, tmp_path, block_device):
    """I2, I8: a device of which the end is gone."""
    device = block_device(2 * MiB)
    Path(device).write_bytes(noise(2 * MiB, 1))
    job = cow / "job"
    assert faults.run("-b", job, "init", "file", device).status == 0
    assert faults.run("-b", job, "backup", "daily").status == 0
    before = faults.files(job)
    os.truncate(tmp_path / "device-0", MiB + 64 * KiB)
    command("blockdev", "--flushbufs", device)
    done = faults.run("-b", job, "backup", "daily")
    assert done.status == 1, done
    assert f"cannot read source {device} at offset {MiB + 64 * KiB}: " in done.said
    assert faults.files(job).keys() == before.keys()
    assert all(faults.files(job)[name] == data for name, data in before.items() if name != ".lock")


def test_a_directory_without_room_for_one_more_name_lets_revisions_go(new_file_system):
    """On a full XFS a small directory cannot grow by a block: the tombstone finds no room."""
    system = new_file_system("xfs", 300 * MiB)
    job, source = system.path / "job", system.top / "source"
    source.touch()
    assert faults.run("-b", job, "init", "file", source).status == 0
    for number in range(3):
        source.write_bytes(noise(MiB, number))
        assert faults.run("-b", job, "backup", "daily").status == 0
    names = 0
    with open(system.path / "filler", "wb") as filler, contextlib.suppress(OSError):
        for size in (MiB, 4 * KiB):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(filler.fileno(), filler.seek(0, 2), size)
                    filler.seek(0, 2)
        while True:  # until the directory's inode has no room either
            os.link(job / "config", job / f"{names:03}")
            names += 1
    for number in ("1", "0"):  # the newest needs another `last`, which needs some room
        done = faults.run("-b", job, "forget", "-r", number, "--force")
        assert done.status == 0, done.said
    assert len(list(job.glob("*.rev"))) == 2, "one revision and last.rev"


def spoil(disk: Path, *texts: bytes) -> None:
    """Change these texts on the disk itself, below the file system."""
    data = disk.read_bytes()
    with open(disk, "r+b") as file:
        for text in texts:
            place = data.find(text)
            need(place >= 0, "the file system does not keep data as it is")
            while place >= 0:
                file.seek(place)
                file.write(text.swapcase())
                place = data.find(text, place + 1)


ROTTEN = b"This will rot in the mid-image. ", b"And this will rot in the tail.  "


@pytest.mark.parametrize("mode", ["full", "written"])
def test_a_previous_image_that_cannot_be_read_is_written_anew(new_file_system, mode):
    """I5, I14: btrfs answers EIO for a rotten page, in the middle and in the odd tail."""
    system = new_file_system("btrfs", 128 * MiB)
    image = bytearray(noise(200 * KiB + 123, 1))
    image[100 * KiB : 100 * KiB + 32], image[-90:-58] = ROTTEN
    now = bytearray(image)
    if mode == "written":  # what has not changed is not looked at
        now[101 * KiB], now[-1] = now[101 * KiB] ^ 1, now[-1] ^ 1
    words = ("backup", "--verify", mode, "daily")
    bench = Bench(system.path, bytes(image), bytes(now), words=words)
    system.unmount()
    spoil(system.disk, *ROTTEN)
    system.mount()
    bench.put(bytes(now))
    (old,) = bench.ids
    with pytest.raises(OSError):
        (bench.base / old).read_bytes()
    done = bench.run(bench.base)
    assert done.status == 0, done.said
    assert "cannot be read at offset" in done.said
    newest = faults.complete(bench.base)[-1].id
    assert newest != old
    assert (bench.base / newest).read_bytes() == bench.image
    assert (bench.base / f"{newest}.sums").read_bytes() == faults.expected_sums(bench.image)
    assert faults.run("-b", bench.base, "verify", "-r", newest).status == 0


@pytest.mark.parametrize("mode", ["full", "written"])
@pytest.mark.parametrize("longer", [1000, 100_000, -1000, -100_000])
def test_an_image_with_a_rotten_last_page_gets_another_size(new_file_system, mode, longer):
    """btrfs reads a page before it changes a part of it: that must not end in EIO."""
    system = new_file_system("btrfs", 128 * MiB)
    image = bytearray(noise(200 * KiB + 123, 1))
    image[-90:-58] = ROTTEN[1]
    now = (bytes(image) + noise(max(0, longer), 2))[: len(image) + longer]
    bench = Bench(system.path, bytes(image), now, words=("backup", "--verify", mode, "daily"))
    bench.source.unlink()
    system.unmount()
    spoil(system.disk, ROTTEN[1])
    system.mount()
    bench.put(now)
    done = bench.run(bench.base)
    assert done.status == 0, done.said
    newest = faults.complete(bench.base)[-1].id
    assert (bench.base / newest).read_bytes() == now
    assert faults.run("-b", bench.base, "verify", "-r", newest).status == 0


@pytest.mark.parametrize("kind, size", [("xfs", 300 * MiB), ("btrfs", 128 * MiB)])
def test_what_is_read_back_comes_from_the_medium(new_file_system, kind, size):
    """I8, I12: what rots on the disk between the flush and the reading is found."""
    system = new_file_system(kind, size)
    image = noise(200 * KiB, 1)
    bench = Bench(system.path, image, image[: 100 * KiB] + ROTTEN[0] + image[100 * KiB + 32 :])
    flush = max(call.number for call in bench.trace() if is_flush_of_image(call))

    def rot(call: Call) -> None:
        call.run()
        spoil(system.disk, ROTTEN[0])

    done = bench.run(bench.base, Plan(flush, rot))
    bench.put(bench.image)
    assert done.status == 1
    assert "verification failed" in done.said
    assert list(faults.nothing_is_left_over(bench, bench.base)) == []
    assert list(faults.after_death(bench, bench.base, done)) == []


def is_flush_of_image(call: Call) -> bool:
    return call.name == "fsync" and len(call.subject) == 22


@contextlib.contextmanager
def small_memory(path: Path, size: int) -> Iterator[Path]:
    """A directory in memory that can be filled; a disk in it then fails to write."""
    command("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
    try:
        yield path
    finally:
        command("umount", "-l", path)


@slow
@pytest.mark.parametrize("kind, size", [("xfs", 300 * MiB), ("btrfs", 128 * MiB)])
def test_a_disk_that_fails_to_write_is_told_and_loses_nothing_older(tmp_path, kind, size):
    """I1, I2, I3, I4, I5, I6, I8, where errors come with the flush and only once."""
    need_root()
    image, started, violations = noise(3 * MiB, 1), time.monotonic(), []
    rooms, statuses = [KiB << shift for shift in range(6, 14)], set()
    for room in rooms:
        with small_memory(tmp_path, 120 * MiB), contextlib.ExitStack() as stack:
            system = FileSystem(kind, size, where=tmp_path)
            stack.callback(system.close)
            bench = Bench(system.path, image, noise(6 * MiB, 2))
            command("sync", "-f", system.path)
            filler = fill(tmp_path, room)
            done = bench.run(bench.base)
            statuses.add(done.status)
            problems = [*faults.failure_is_told(done), *faults.flushed_once(done)]
            filler.unlink()
            system.unmount()
            system.mount()
            if done.status == 0:
                problems += faults.status_is_true(bench, bench.base, done)
            problems += faults.after_death(bench, bench.base, done)
            violations += [f"{room // KiB} KiB left on the disk: {one}" for one in problems]
    assert statuses == {0, 1}, "too much room or too little"
    faults.tell(len(rooms), violations, started)
