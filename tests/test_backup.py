# SPDX-License-Identifier: GPL-3.0-or-later
"""Backing up: what a revision holds, what it costs, and what is refused."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time

import pytest
from conftest import (
    COMPILED,
    MiB,
    allocated_bytes,
    command,
    contents,
    flip,
    need_tool,
    noise,
    revisions,
    shared_bytes,
    write_image,
)

import backy

KiB = 1024
MODES = ["full", "written"]


@pytest.fixture
def reads(monkeypatch):
    """How many bytes were read of each file, by its path, since the last clear()."""
    counted: dict = {}
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        got = real(fd, buffers, offset, flags)
        if not flags:
            path = os.readlink(f"/proc/self/fd/{fd}")
            counted[path] = counted.get(path, 0) + got
        return got

    monkeypatch.setattr(backy.os, "preadv", preadv)
    return counted


def make(run, job, source, tags="daily", *words):
    """Back up, check the new revision and the digests of all, and return it."""
    result = run("-b", job, "backup", tags, *words)
    assert result.status == 0, result
    newest = revisions(job)[-1]
    assert (job / newest.id).read_bytes() == source.read_bytes()
    assert (job / "last").resolve() == job / newest.id
    return newest


# -- what a revision holds --------------------------------------------------------


def test_a_revision_equals_its_source(job, source, run):
    result = run("-b", job, "backup", "daily")
    assert result.status == 0, result
    (revision,) = revisions(job)
    assert (job / revision.id).read_bytes() == source.read_bytes()
    assert (job / "last").read_bytes() == source.read_bytes()
    assert revision.tags == ("daily",)
    assert revision.is_complete
    assert revision.size == source.stat().st_size
    assert (revision.trust, revision.parent) == (backy.Trust.VERIFIED, None)


def test_a_second_revision_shares_what_did_not_change(job, source, run):
    assert run("-b", job, "backup", "daily").status == 0
    write_image(source, (MiB + 8192, noise(4096, 7)))
    assert run("-b", job, "backup", "daily").status == 0
    one, two = revisions(job)
    assert (job / two.id).read_bytes() == source.read_bytes()
    assert two.bytes_written == 4096
    assert two.parent == one.id
    assert shared_bytes(job / two.id) > MiB


def test_an_unchanged_source_costs_nothing(job, source, run):
    make(run, job, source)
    assert make(run, job, source).bytes_written == 0
    assert make(run, job, source, "daily", "--verify", "written").bytes_written == 0


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_scattered_changes_cost_little_more_than_themselves(kind, new_file_system, run, tmp_path):
    made = new_file_system(kind, 1024 * MiB)
    source = write_image(tmp_path / "image", (0, noise(32 * MiB, 3)))
    job = made.path / "job"
    run("-b", job, "init", "file", source)
    make(run, job, source)
    before = made.used()
    write_image(source, *((at * MiB + 5 * 4096, noise(4096, at)) for at in range(32)))
    revision = make(run, job, source)
    assert revision.bytes_written == 32 * 4096
    assert made.used() - before < 1.5 * MiB  # XFS alone would reserve 32 times 128 KiB


def test_an_image_never_shares_extents_with_its_source(cow, run):
    source = write_image(cow / "image", (0, noise(2 * MiB, 3)))
    run("-b", cow / "job", "init", "file", source)
    for _ in range(2):
        make(run, cow / "job", source)
        assert shared_bytes(source) == 0
        write_image(source, (0, noise(4096, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_zero_pages_become_holes(job, source, run, mode):
    make(run, job, source)
    write_image(source, (0, bytes(512 * KiB)), (640 * KiB, bytes(4096)))
    revision = make(run, job, source, "daily", "--verify", mode)
    assert revision.bytes_written == 0
    used = [allocated_bytes(job / one.id) for one in revisions(job)]
    assert used[0] - used[1] == 516 * KiB


def test_zeros_of_the_source_take_no_space(cow, run, tmp_path):
    source = write_image(tmp_path / "zeros", (0, bytes(4 * MiB)), (MiB, b"x"))
    run("-b", cow / "job", "init", "file", source)
    revision = make(run, cow / "job", source)
    assert allocated_bytes(cow / "job" / revision.id) <= 64 * KiB
    assert revision.bytes_written == 4096


def test_holes_of_the_source_are_not_read(cow, run, tmp_path, reads):
    source = write_image(tmp_path / "sparse", (0, noise(64 * KiB)), size=256 * MiB)
    write_image(source, (200 * MiB + 4096, b"x" * 5))
    run("-b", cow / "job", "init", "file", source)
    for _ in range(2):
        reads.clear()
        started = time.process_time()
        assert run("-b", cow / "job", "backup", "daily").status == 0
        assert reads[str(source)] <= 128 * KiB
        assert time.process_time() - started < 2
    newest = revisions(cow / "job")[-1]
    command("cmp", source, cow / "job" / newest.id)
    assert allocated_bytes(cow / "job" / newest.id) <= 128 * KiB


SIZES = [0, 1, 511, 512, 4095, 4096, 4097, 65535, 65536, 65537, MiB - 1, MiB, MiB + 1]


@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_length_are_kept(job, source, run, size):
    os.truncate(source, 0)
    write_image(source, (0, noise(size, 5)))
    make(run, job, source)
    for mode in MODES:
        if size:
            flip(source, size - 1)
        make(run, job, source, "daily", "--verify", mode)
        assert run("-b", job, "verify").status == 0


def test_an_empty_source_is_an_empty_image(job, source, run):
    os.truncate(source, 0)
    assert make(run, job, source).size == 0
    assert run("-b", job, "verify").status == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [0, 4096, 65537, 100000, 3 * MiB + 512])
def test_a_source_may_grow_and_shrink_between_backups(job, source, run, other, mode):
    sizes = [source.stat().st_size, other, 2 * MiB - 1, other, source.stat().st_size]
    kept = []
    for number, size in enumerate(sizes):
        old = source.stat().st_size
        os.truncate(source, size)
        if size > old and number % 2:  # else it grows by a hole
            write_image(source, (old, noise(size - old, number)))
        newest = make(run, job, source, "daily", "--verify", mode)
        assert newest.size == size
        result = run("-b", job, "verify")
        assert result.status == 0, result
        kept.append((newest.id, source.read_bytes()))
    for name, image in kept:
        assert (job / name).read_bytes() == image


def test_a_shrinking_source_leaves_nothing_of_its_old_tail(job, source, run):
    make(run, job, source)
    os.truncate(source, MiB + 100)
    make(run, job, source)
    os.truncate(source, 3 * MiB)
    revision = make(run, job, source)
    assert (job / revision.id).read_bytes()[MiB + 100 :].strip(b"\0") == b""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [700 * KiB + 77, 10 * MiB + 77])  # the latter by several threads
def test_many_changes_of_all_kinds_leave_every_revision_as_it_was(cow, run, tmp_path, mode, size):
    chance = random.Random(size)
    source = write_image(tmp_path / "image", (0, noise(size, 1)))
    job = cow / "job"
    run("-b", job, "init", "file", source)
    kept = {}
    for step in range(8):
        for _ in range(chance.randrange(4)):
            length = source.stat().st_size
            at, count = chance.randrange(length), chance.choice([1, 4096, 70000])
            at -= chance.choice([0, at % 4096])
            kind = chance.choice(["write", "zero", "grow", "shrink", "hole"])
            if kind == "write":
                write_image(source, (at, noise(min(count, length - at), step)))
            elif kind == "zero":
                write_image(source, (at, bytes(min(count, length - at))))
            elif kind == "hole":
                command("fallocate", "-p", "-o", at, "-l", count, source)
            else:
                os.truncate(source, length + count if kind == "grow" else max(1, length - count))
        newest = make(run, job, source, "daily", "--verify", mode)
        kept[newest.id] = source.read_bytes()
        assert run("-b", job, "verify").status == 0
    for name, image in kept.items():
        assert (job / name).read_bytes() == image


# -- what is read and proven ------------------------------------------------------


def in_store(reads, job):
    return sum(count for path, count in reads.items() if path.startswith(f"{job}/"))


def test_full_reads_the_whole_previous_image_and_written_hardly_any(job, source, run, reads):
    make(run, job, source)
    data = MiB + 300000 + 12345
    write_image(source, (0, noise(4096, 8)))
    reads.clear()
    full = make(run, job, source)
    assert in_store(reads, job) > data
    write_image(source, (0, noise(4096, 9)))
    reads.clear()
    written = make(run, job, source, "daily", "--verify", "written")
    assert in_store(reads, job) <= 192 * KiB  # one block compared and read back, and digests
    assert full.trust is backy.Trust.VERIFIED
    assert full.verified is not None
    assert full.stats["verification"].text == "full"
    assert written.trust is backy.Trust.TRUSTED
    assert written.verified is None
    assert written.stats["verification"].text == "written"
    assert written.stats["bytes_verified"].text == str(64 * KiB)
    assert full.bytes_written == written.bytes_written == 4096


def test_the_mode_of_verification_is_a_key_of_the_config(job, source, run):
    with open(job / "config", "a") as config:
        config.truncate(0)
        config.write(f"filename: {source}\ntype: file\nverify: written\n")
    make(run, job, source)
    assert "performing partial verification" in run("-b", job, "backup", "daily").err
    over = run("-b", job, "backup", "--verify", "full", "daily")
    assert "performing full verification" in over.err


def test_full_heals_what_has_rotted_in_the_previous_image(job, source, run):
    one = make(run, job, source)
    sound = (job / one.id).read_bytes()
    flip(job / one.id, 70000)
    result = run("-b", job, "backup", "daily")
    assert result.status == 0
    assert f"parent {one.id} is damaged: bytes 65536 to 131071 (65536)" in result.err
    assert f"parent {one.id} is now distrusted" in result.err
    two = revisions(job)[-1]
    assert two.bytes_written == 4096
    assert (job / two.id).read_bytes() == source.read_bytes()
    for number, image in enumerate([source.read_bytes(), sound]):
        healed = run("-b", job, "verify", "-r", number).status == 0
        assert healed is ((job / revisions(job)[1 - number].id).read_bytes() == image)
        assert healed or number == 1


def test_written_leaves_unchanged_blocks_to_verify(job, source, run):
    one = make(run, job, source)
    flip(job / one.id, 70000)
    result = run("-b", job, "backup", "daily", "--verify", "written")
    assert result.status == 0
    assert run("-b", job, "verify", "-r", "0").status == 1
    assert run("-b", job, "verify", "-r", "1").status == 1
    make(run, job, source, "daily", "--verify", "written")  # distrusted: all is compared
    assert run("-b", job, "verify").status == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", ["missing", "empty", "flipped", "header", "longer", "link"])
def test_without_sound_digests_all_is_compared(job, source, run, damage, mode):
    one = make(run, job, source)
    sums = job / f"{one.id}.sums"
    if damage == "missing":
        sums.unlink()
    elif damage == "link":
        sums.rename(job / "elsewhere")
        sums.symlink_to("elsewhere")
    elif damage == "empty":
        os.truncate(sums, 0)
    elif damage == "longer":
        os.truncate(sums, sums.stat().st_size + 32)
    else:
        flip(sums, 3 if damage == "header" else 70)
    flip(job / one.id, 70000)
    write_image(source, (0, noise(4096, 9)))
    result = run("-b", job, "backup", "daily", "--verify", mode)
    assert result.status == 0, result
    assert f"digests of {one.id} are damaged: " in result.err
    two = revisions(job)[-1]
    assert (job / two.id).read_bytes() == source.read_bytes()
    assert two.bytes_written == 8192
    assert run("-b", job, "verify").status == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_page_that_the_medium_returns_otherwise_than_written_fails_the_backup(
    job, source, run, monkeypatch, mode
):
    make(run, job, source)
    write_image(source, (MiB, noise(4096, 9)))
    before = contents(job)
    real = os.pwrite

    def pwrite(fd, data, offset):
        if offset == MiB:
            data = bytes(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr(backy.os, "pwrite", pwrite)
    result = run("-b", job, "backup", "daily", "--verify", mode)
    assert result.status == 1
    assert "the medium returns other bytes than were written at offset" in result.err
    assert "the disk, its cable or its controller may be failing" in result.err
    assert contents(job) == before


def test_writes_that_never_reach_the_medium_fail_the_backup(job, source, run, monkeypatch):
    """Image and digests both stay what they were, and so agree with each other."""
    make(run, job, source)
    write_image(source, (MiB, noise(4096, 9)))
    before = contents(job)
    real = os.pwrite

    def pwrite(fd, data, offset):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        return len(data) if len(name.partition(".")[0]) == 22 else real(fd, data, offset)

    monkeypatch.setattr(backy.os, "pwrite", pwrite)
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert "job: verification failed: writes have been lost" in result.err
    assert contents(job) == before


@pytest.mark.parametrize("mode", MODES)
def test_pages_of_the_previous_image_that_cannot_be_read_are_written_anew(
    job, source, run, monkeypatch, mode
):
    """A bad sector under the parent, also under its odd end; written bytes go elsewhere."""
    one = make(run, job, source)
    size = source.stat().st_size
    bad = {0, MiB + 8192, size - size % 4096}
    write_image(source, *((page, b"changed") for page in bad))
    real_read, real_write, real_truncate = os.preadv, os.pwrite, os.ftruncate

    def ours(fd):  # the new image, and only that
        path = os.readlink(f"/proc/self/fd/{fd}")
        return os.path.dirname(path) == str(job) and len(path) == len(f"{job}/{one.id}")

    def preadv(fd, buffers, offset, flags=0):
        end = offset + sum(map(len, buffers))
        if ours(fd) and any(offset <= page < end for page in bad):
            raise OSError(5, "Input/output error")
        return real_read(fd, buffers, offset, flags)

    def pwrite(fd, data, offset):
        if ours(fd):
            bad.difference_update(range(offset, offset + len(data), 4096))
        return real_write(fd, data, offset)

    def ftruncate(fd, length):
        if ours(fd):
            bad.difference_update([page for page in bad if page >= length])
        return real_truncate(fd, length)

    with monkeypatch.context() as patch:
        patch.setattr(backy.os, "preadv", preadv)
        patch.setattr(backy.os, "pwrite", pwrite)
        patch.setattr(backy.os, "ftruncate", ftruncate)
        result = run("-b", job, "backup", "daily", "--verify", mode)
    assert result.status == 0, result
    assert "the previous image cannot be read at offset 0: written anew" in result.err
    assert not bad
    two = revisions(job)[-1]
    assert (job / two.id).read_bytes() == source.read_bytes()
    assert run("-b", job, "verify").status == 0


def test_everything_is_on_the_medium_before_what_says_so(job, source, run, monkeypatch):
    """Image and digests before the metadata, the metadata before `last`."""
    make(run, job, source)
    write_image(source, (0, noise(4096, 9)))
    events = []

    def watch(name, describe):
        real = getattr(os, name)

        def call(*args, **options):
            events.append((name, describe(*args)))
            return real(*args, **options)

        monkeypatch.setattr(backy.os, name, call)

    def path_of(fd, *_):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    for name in ("fsync", "pwrite", "ftruncate", "fchmod"):
        watch(name, path_of)
    watch("rename", lambda _, target: target)
    two = make(run, job, source)
    commit = max(at for at, one in enumerate(events) if one == ("rename", f"{two.id}.rev"))
    last = events.index(("rename", "last"))
    for name in (two.id, f"{two.id}.sums"):
        places = [at for at, one in enumerate(events) if one[1] == name and one[0] != "rename"]
        assert events[places[-1]] == ("fsync", name)
        assert places[-1] < commit
        forced = [at for at in places if events[at][0] == "fsync"]
        for first, second in zip(forced, forced[1:]):  # once for each written state
            assert any(first < at < second for at in places if events[at][0] == "pwrite")
    assert events[commit - 1][0] == "fsync"
    assert ("fsync", "job") in events[:commit]
    assert events[commit + 1] == ("fsync", "job")
    assert ("fsync", "job") in events[last:]
    assert commit < last


# -- block devices ----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_block_device_of_an_odd_number_of_sectors_is_backed_up(cow, run, block_device, mode):
    device = block_device(MiB + 3 * 512)
    job = cow / "job"
    image = noise(MiB + 3 * 512, 2)
    with open(device, "wb") as file:
        file.write(image)
    run("-b", job, "init", "file", device)
    assert run("-b", job, "backup", "daily").status == 0
    image = image[:-512] + noise(512, 3)
    with open(device, "r+b") as file:
        file.seek(MiB + 2 * 512)
        file.write(image[-512:])
    result = run("-b", job, "backup", "daily", "--verify", mode)
    assert result.status == 0, result
    two = revisions(job)[-1]
    assert (job / two.id).read_bytes() == image
    assert two.size == len(image)


def test_a_device_without_a_medium_is_refused(cow, run, block_device):
    device = command("losetup", "--find").stdout.strip()
    run("-b", cow / "job", "init", "file", device)
    result = run("-b", cow / "job", "backup", "daily")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert os.listdir(cow / "job") in (["config"], ["config", ".lock"], [".lock", "config"])


def test_a_device_that_is_written_to_while_it_is_read_fails(cow, run, block_device, meanwhile):
    device = block_device(4 * MiB)
    with open(device, "wb") as file:
        file.write(noise(4 * MiB, 2))
    run("-b", cow / "job", "init", "file", device)
    before = contents(cow / "job")

    def write():
        with open(device, "r+b") as file:
            file.seek(8192)
            file.write(b"x" * 4096)

    happened = meanwhile(3, write)
    result = run("-b", cow / "job", "backup", "daily")
    assert happened
    assert (result.status, contents(cow / "job")) == (1, before), result
    assert f"job: {device} changed while it was read: it differs from offset 8192 on" in result.err


# -- sources that do not stay still -----------------------------------------------

EVENTS = {
    "grows": (
        lambda path: os.truncate(path, 12 * MiB + 4096),
        f"grew from {12 * MiB} to {12 * MiB + 4096} bytes while it was read (read up to offset",
    ),
    "shrinks": (
        lambda path: os.truncate(path, 5000),
        f"shrank from {12 * MiB} to 5000 bytes while it was read: it ends at offset 5000",
    ),
    "vanishes": (
        lambda path: path.unlink(),
        "vanished while it was read (read up to offset",
    ),
    "is moved away": (
        lambda path: path.rename(f"{path}.old"),
        "vanished while it was read (read up to offset",
    ),
    "is replaced": (
        lambda path: write_image(path.parent / "new", (0, b"new")).rename(path),
        "while it was read (read up to offset",
    ),
    "gives its name to another": (
        lambda path: [path.rename(f"{path}.old"), write_image(path, (0, b"new"))],
        "was replaced while it was read (read up to offset",
    ),
    "changes": (
        lambda path: write_image(path, (4096, b"changed")),
        "changed while it was read: it differs from offset 4096 on",
    ),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("event", EVENTS)
def test_a_source_that_does_not_stay_still_fails_with_offset_and_leaves_nothing(
    cow, run, tmp_path, meanwhile, event, first
):
    source = write_image(tmp_path / "moving.img", (0, noise(12 * MiB, 1)))
    job = cow / "job"
    run("-b", job, "init", "file", source)
    if not first:
        make(run, job, source)
    before = contents(job)
    action, reason = EVENTS[event]
    happened = meanwhile(9, lambda: action(source))
    result = run("-b", job, "backup", "daily")
    assert happened
    assert (result.status, result.out) == (1, "")
    assert f"backy: job: {source} " in result.err
    assert reason in result.err, result
    assert result.err.splitlines()[-1] == (
        "backy: hint: back up a snapshot, or stop what writes to it (fsfreeze, virsh suspend)"
    )
    assert contents(job) == before


def test_a_source_that_changes_in_the_last_moment_fails(job, source, run, monkeypatch):
    real = os.fchmod

    def fchmod(fd, mode):
        if mode == 0o440 and os.fstat(fd).st_size == source.stat().st_size:
            write_image(source, (0, b"late"))
        return real(fd, mode)

    monkeypatch.setattr(backy.os, "fchmod", fchmod)
    before = contents(job)
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert "changed while it was read" in result.err
    assert contents(job) == before


def test_a_source_that_changed_just_before_is_no_source_that_changes(job, source, run):
    for number in range(5):
        write_image(source, (0, noise(4096, number)))
        make(run, job, source)


def test_a_source_that_is_missing_costs_one_line(job, source, run):
    source.unlink()
    before = contents(job)
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert result.err == f"backy: cannot open source {source}: No such file or directory\n"
    assert contents(job) == before


@pytest.mark.parametrize("kind", ["pipe", "directory", "character device"])
def test_a_source_that_is_no_image_is_refused_at_once(job, source, run, kind):
    source.unlink()
    if kind == "pipe":
        os.mkfifo(source)
    elif kind == "directory":
        source.mkdir()
    else:
        source.symlink_to("/dev/zero")
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert result.err == f"backy: source {source} is neither a file nor a block device\n"


# -- file systems without reflinks --------------------------------------------------


def test_without_reflinks_there_is_one_warning_and_everything_else_is_equal(ext4, run, tmp_path):
    source = write_image(tmp_path / "image", (0, noise(MiB, 1)), size=3 * MiB + 5)
    job = ext4 / "job"
    run("-b", job, "init", "file", source)
    make(run, job, source)
    for number, mode in enumerate(MODES):
        write_image(source, (8192, noise(4096, number)))
        result = run("-b", job, "backup", "daily", "--verify", mode)
        assert result.status == 0
        warnings = [line for line in result.err.splitlines() if "warning" in line]
        assert len(warnings) == 1
        assert "this file system cannot share extents" in warnings[0]
        newest = revisions(job)[-1]
        assert newest.parent == revisions(job)[-2].id
        assert (job / newest.id).read_bytes() == source.read_bytes()
        assert allocated_bytes(job / newest.id) < 1.1 * MiB
        assert run("-b", job, "verify").status == 0
    assert run("-b", job, "restore", "-r", "2", tmp_path / "back").status == 0


def test_a_job_moved_between_file_systems_goes_on(xfs, ext4, run, tmp_path):
    source = write_image(tmp_path / "image", (0, noise(MiB, 1)))
    run("-b", xfs / "job", "init", "file", source)
    make(run, xfs / "job", source)
    command("cp", "-a", xfs / "job", ext4 / "job")
    make(run, ext4 / "job", source)


# -- tags and config ----------------------------------------------------------------


def test_tags_are_split_stripped_sorted_and_once(job, run):
    result = run("-b", job, "backup", "weekly, daily,daily ,manual:x+y_z-1.0")
    assert result.status == 0
    assert result.err.splitlines()[0].endswith(" [daily,manual:x+y_z-1.0,weekly]")
    assert revisions(job)[0].tags == ("daily", "manual:x+y_z-1.0", "weekly")


@pytest.mark.parametrize(
    "tags",
    [
        *("", ",", "a,,b", "..", "../x", "-x", "--force", "a b", "a\nb", "\x1b[2J", "ä", "a/b"),
        *("x" * 65, "5", "0", "last", "latest", "2026-01-01", "a,last", "\udcff", "[a]", "a\0"),
    ],
)
def test_what_can_be_no_tag_is_refused(plain_job, run, tags):
    job = plain_job
    before = contents(job)
    result = run("-b", job, "backup", "--", tags)
    assert (result.status, result.out) == (1, "")
    assert re.search(" cannot be a tag|an empty tag in ", result.err.splitlines()[0])
    assert "\x1b" not in result.err
    assert contents(job) == before


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("", "it is not a mapping"),
        ("- a\n", "it is not a mapping"),
        ("{", "1:1: "),
        ("a: b\na: c\n", "2:1: "),
        ("{type: tape}\n", "no source type 'tape' in this version"),
        ("{filename: /x}\n", "no source type '' in this version"),
        ("{type: file}\n", "its source has no filename"),
        ("{type: file, filename: }\n", "its source has no filename"),
        ("{type: file, filename: [a]}\n", "its source has no filename"),
        (
            "{type: file, filename: x, verify: often}\n",
            "verify is full, written or sample, not 'often'",
        ),
        ("{type: file, filename: x, backend: chunked}\n", "this directory was made by backy 2.2"),
        ("\xff", "1:1: "),
        ("a: " + "x" * MiB, "larger than 1.00 MiB"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(plain_job, run, config, complaint):
    job = plain_job
    (job / "config").write_text(config)
    result = run("-b", job, "backup", "daily")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("backy: job: config: ")
    if config != "\xff":
        assert complaint in result.err
    assert sorted(path.name for path in job.iterdir()) == ["config"]


def test_a_config_in_no_encoding_of_ours_is_one_line(plain_job, run):
    job = plain_job
    (job / "config").write_bytes(b"filename: \xff\n")
    result = run("-b", job, "backup", "daily")
    assert (result.status, result.err.count("\n")) == (1, 1)


def test_a_job_without_config_cannot_be_backed_up(job, source, run):
    make(run, job, source)
    (job / "config").unlink()
    result = run("-b", job, "backup", "daily")
    assert (result.status, result.err) == (1, "backy: job: config: No such file or directory\n")
    assert run("-b", job, "status").status == 0


def test_an_unknown_key_of_the_config_is_a_warning_with_a_suggestion(job, source, run):
    (job / "config").write_text(f"{{type: file, filename: {source}, verfy: full}}\n")
    result = run("-b", job, "backup", "daily")
    assert result.status == 0
    assert "backy: warning: job: config: unknown key 'verfy' (verify?)" in result.err


# -- the page cache -----------------------------------------------------------------


def resident(path):
    return int(command("fincore", "-b", "-n", "-o", "RES", path).stdout)


def test_a_source_that_was_not_cached_is_not_cached_afterwards(new_file_system, run):
    need_tool("fincore")
    made = new_file_system("xfs")
    source = write_image(made.path / "image", (0, noise(16 * MiB, 1)))
    job = made.path / "job"
    run("-b", job, "init", "file", source)
    command("sync", "-f", made.path)
    for _ in range(2):
        fd = os.open(source, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        make_quietly(run, job)
        assert resident(source) < 2 * MiB
        assert resident(job / revisions(job)[-1].id) < 2 * MiB
    left = []
    while 16 * MiB not in left:  # others may empty the cache meanwhile, but not each time
        assert len(left) < 4, left
        source.read_bytes()
        make_quietly(run, job)
        left.append(resident(source))
        assert resident(job / revisions(job)[-1].id) < 2 * MiB


def make_quietly(run, job):
    assert run("-b", job, "backup", "daily").status == 0


@pytest.fixture
def cached_and_source(new_file_system, run):
    """A cached file of 256 MiB, a source of 512 MiB that is not, and its job, on one XFS."""
    need_tool("fincore")
    made = new_file_system("xfs", 3072 * MiB)
    cached, source = made.path / "cached", made.path / "source"
    for path, mebibytes in ((cached, 256), (source, 512)):
        write_image(path, *((at * MiB, noise(4096, at) * 256) for at in range(mebibytes)))
    forget = os.open(source, os.O_RDONLY)
    os.posix_fadvise(forget, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(forget)
    cached.read_bytes()
    if resident(cached) < 256 * MiB:
        pytest.skip("somebody has dropped the whole page cache meanwhile")
    assert resident(source) == 0
    run("-b", made.path / "job", "init", "file", source)
    return cached, source, made.path / "job"


@pytest.mark.slow
def test_a_backup_leaves_the_page_cache_as_it_was(cached_and_source, run, tmp_path):
    cached, source, job = cached_and_source
    control = write_image(tmp_path / "control", (0, noise(MiB, 1)))
    for _ in range(2):
        control.read_bytes()
        make_quietly(run, job)
        if not resident(control):
            pytest.skip("somebody has dropped the whole page cache meanwhile")
        assert resident(cached) > 250 * MiB  # of 256; others use this machine too
        assert sum(map(resident, [source, *map(job.joinpath, os.listdir(job))])) < 16 * MiB


@pytest.mark.slow
def test_a_backup_takes_little_of_the_page_cache_at_any_time(cached_and_source):
    _, source, job = cached_and_source
    words = [sys.executable, str(COMPILED), "-b", str(job), "backup", "daily"]
    most = 0
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            names = [one for one in job.iterdir() if len(one.name) == 22]
            most = max(most, resident(source) + sum(map(resident, names)))
            time.sleep(0.05)
    assert process.returncode == 0
    assert most < 256 * MiB
