# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading revisions against their digests: what is found, named, marked, and healed."""

from __future__ import annotations

import errno
import json
import os

import pytest
from conftest import MiB, flip, noise, revisions, write_image

import backy

BLOCK = 65536


@pytest.fixture
def job(cow, source, run):
    """A job with one revision, on XFS and on btrfs."""
    assert run("-b", cow / "job", "init", "file", source).status == 0
    assert run("-b", cow / "job", "backup", "daily").status == 0
    return cow / "job"


def test_a_sound_revision_is_verified_and_marked(job, source, run):
    assert run("-b", job, "backup", "daily", "--verify", "written").status == 0
    one = revisions(job)[-1]
    assert (one.trust, one.verified) == (backy.Trust.TRUSTED, None)
    result = run("-b", job, "verify")
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{one.id}: sound (1.30 MiB read)\n"  # holes are not read
    one = revisions(job)[-1]
    assert one.trust is backy.Trust.VERIFIED
    assert abs((one.verified - one.timestamp).total_seconds()) < 60
    assert "| verified | " in run("-b", job, "status", "-v").out


@pytest.mark.parametrize(
    ("offsets", "ranges"),
    [
        ([0], [(0, BLOCK)]),
        ([BLOCK - 1], [(0, BLOCK)]),
        ([BLOCK], [(BLOCK, BLOCK)]),
        ([3, BLOCK + 3], [(0, 2 * BLOCK)]),
        ([3, 2 * BLOCK + 3], [(0, BLOCK), (2 * BLOCK, BLOCK)]),
        ([3 * MiB + 12344], [(3 * MiB, 12345)]),
        ([3 * BLOCK - 1, 3 * BLOCK], [(2 * BLOCK, 2 * BLOCK)]),
    ],
)
def test_damage_is_named_to_the_block_and_marked(job, run, offsets, ranges):
    (one,) = revisions(job)
    for offset in offsets:
        flip(job / one.id, offset)
    result = run("-b", job, "verify")
    assert result.status == 1
    assert [line for line in result.out.splitlines() if ": damaged: " in line] == [
        f"{one.id}: damaged: bytes {offset} to {offset + length - 1} ({length})"
        for offset, length in ranges
    ]
    assert "backy: job: damage was found" in result.err
    (one,) = revisions(job)
    assert one.trust is backy.Trust.DISTRUSTED
    assert one.damaged == tuple(ranges)
    assert "daily (distrusted)" in run("-b", job, "status", "-v").out


def test_damage_in_what_was_a_hole_is_found_and_healed(job, source, run):
    (one,) = revisions(job)
    flip(job / one.id, 2 * MiB + 700000)
    result = run("-b", job, "verify")
    assert result.status == 1
    at = 2 * MiB + 655360
    assert f"{one.id}: damaged: bytes {at} to {at + BLOCK - 1} ({BLOCK})\n" in result.out
    assert (job / one.id).read_bytes() == source.read_bytes()
    assert run("-b", job, "verify").status == 0


def test_damage_is_found_by_several_threads_too(cow, run, tmp_path):
    source = write_image(tmp_path / "image", (0, noise(12 * MiB, 1)))
    run("-b", cow / "job", "init", "file", source)
    assert run("-b", cow / "job", "backup", "daily").status == 0
    (one,) = revisions(cow / "job")
    places = [BLOCK * number for number in range(0, 192, 7)]
    for place in places:
        flip(cow / "job" / one.id, place + number_in_block(place))
    result = run("-b", cow / "job", "verify")
    assert result.status == 1
    assert revisions(cow / "job")[0].damaged == tuple((place, BLOCK) for place in places)


def number_in_block(place):
    return place // 7 % BLOCK


def test_a_hundred_ranges_are_listed_and_the_others_counted():
    ranges = [(number * 2 * BLOCK, BLOCK) for number in range(105)]
    lines = backy.describe_ranges(ranges)
    assert len(lines) == 101
    assert lines[-1] == "and 5 more ranges"


def test_an_image_of_another_length_is_no_image(job, run):
    (one,) = revisions(job)
    with open(job / one.id, "r+b") as file:
        file.truncate(one.size - 1)
    result = run("-b", job, "verify")
    assert result.status == 1
    assert f"its image has {one.size - 1} bytes instead of {one.size}" in result.err


@pytest.mark.parametrize("spec", ["1", "first"])
def test_the_revision_may_be_named(job, run, spec):
    with backy.Repository.open(str(job)) as repository, repository.metadata_lock():
        repository.change(repository.find("0"), tags=("first",))
    assert run("-b", job, "backup", "daily").status == 0
    one = revisions(job)[0]
    assert run("-b", job, "verify", "-r", spec).out.startswith(f"{one.id}: sound ")


def test_verification_reads_the_medium_and_not_the_cache(job, run, monkeypatch):
    """The first read of the image must be direct, or its range dropped from the cache before."""
    (one,) = revisions(job)
    (job / one.id).read_bytes()
    dropped, unsafe = set(), []
    real_advise, real_preadv = os.posix_fadvise, os.preadv

    def path_of(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def advise(fd, offset, length, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.add((path_of(fd), offset))
        return real_advise(fd, offset, length, advice)

    def preadv(fd, buffers, offset, flags=0):
        direct = backy.fcntl.fcntl(fd, backy.fcntl.F_GETFL) & os.O_DIRECT
        if path_of(fd) == one.id and not direct and (one.id, offset) not in dropped:
            unsafe.append(offset)
        return real_preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(backy.os, "posix_fadvise", advise)
    monkeypatch.setattr(backy.os, "preadv", preadv)
    assert run("-b", job, "verify").status == 0
    assert not unsafe
    monkeypatch.setattr(backy, "bypass_cache", lambda fd: False)  # a file system without O_DIRECT
    assert run("-b", job, "verify").status == 0
    assert dropped
    assert not unsafe


@pytest.mark.parametrize("count", [1, 2])
def test_what_cannot_be_read_is_damage_to_the_block(job, run, monkeypatch, count):
    (one,) = revisions(job)
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        end = offset + sum(map(len, buffers))
        bad = [2 * BLOCK + 4096, 9 * BLOCK][:count]
        if os.readlink(f"/proc/self/fd/{fd}").endswith(one.id) and any(
            offset <= place < end for place in bad
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(backy.os, "preadv", preadv)
    assert run("-b", job, "verify").status == 1
    assert revisions(job)[0].damaged == ((2 * BLOCK, BLOCK), (9 * BLOCK, BLOCK))[:count]


def test_verification_as_json_has_the_ranges(job, run):
    (one,) = revisions(job)
    flip(job / one.id, 70000)
    result = run("-b", job, "verify", "--json")
    assert result.status == 1
    shown = json.loads(result.out)
    assert set(shown) == {"version", "revisions"}
    (found,) = shown["revisions"]
    assert found["id"] == one.id
    assert found["trust"] == "distrusted"
    assert found["damaged"] == [{"offset": BLOCK, "length": BLOCK}]
    assert found["bytes_read"] > MiB
    assert found["verified"].endswith("Z")


def test_digests_that_are_missing_are_made_anew_from_a_sound_image(job, run):
    (one,) = revisions(job)
    sums = job / f"{one.id}.sums"
    before = sums.read_bytes()
    sums.unlink()
    result = run("-b", job, "verify")
    assert result.status == 1
    assert "its digests were damaged" in result.out
    assert sums.read_bytes() == before
    assert run("-b", job, "verify").status == 0


def test_a_damaged_image_without_sound_digests_cannot_be_verified(job, run):
    (one,) = revisions(job)
    flip(job / one.id, 70000)
    (job / f"{one.id}.sums").unlink()
    result = run("-b", job, "verify")
    assert result.status == 1
    assert f"{one.id}: cannot be verified: its digests are damaged: No such file" in result.out
    (one,) = revisions(job)
    assert one.digest
    assert not (job / f"{one.id}.sums").exists()


def test_any_damage_of_the_digests_is_found(job, run):
    (one,) = revisions(job)
    sums = job / f"{one.id}.sums"
    before = sums.read_bytes()
    for offset in range(0, len(before), 61):
        flip(sums, offset)
        result = run("-b", job, "verify")
        assert (result.status, "its digests were damaged" in result.out) == (1, True), offset
        assert sums.read_bytes() == before
    assert run("-b", job, "verify").status == 0


def test_verifying_again_forgets_damage_that_is_no_more(job, run):
    (one,) = revisions(job)
    flip(job / one.id, 70000)
    assert run("-b", job, "verify").status == 1
    flip(job / one.id, 70000)
    assert run("-b", job, "verify").status == 0
    (one,) = revisions(job)
    assert (one.trust, one.damaged) == (backy.Trust.VERIFIED, ())


def test_protection_given_meanwhile_is_kept(job, run, meanwhile):
    (one,) = revisions(job)

    def protect():
        with backy.Repository.open(str(job)) as repository, repository.metadata_lock():
            repository.change(one, protected=True)

    assert not meanwhile(1, protect)
    assert run("-b", job, "verify").status == 0
    assert revisions(job)[0].protected


@pytest.mark.parametrize("mode", ["full", "written"])
def test_the_next_backup_does_not_rely_on_a_distrusted_parent(job, source, run, mode):
    """Both unchanged and changed blocks are right, although the parent is not."""
    (one,) = revisions(job)
    for offset in (5, 70000, MiB + 5, 3 * MiB + 12344):
        flip(job / one.id, offset)
    assert run("-b", job, "verify").status == 1
    write_image(source, (70000, b"changed"))
    result = run("-b", job, "backup", "daily", "--verify", mode)
    assert result.status == 0
    assert f"parent {one.id} is distrusted, all is compared" in result.err
    two = revisions(job)[-1]
    assert (job / two.id).read_bytes() == source.read_bytes()
    assert run("-b", job, "verify").status == 0


def test_a_good_parent_is_preferred_to_a_newer_distrusted_one(job, source, run):
    (one,) = revisions(job)
    write_image(source, (70000, b"changed"))
    assert run("-b", job, "backup", "daily").status == 0
    flip(job / revisions(job)[-1].id, 70000)
    assert run("-b", job, "verify").status == 1
    assert run("-b", job, "backup", "daily", "--verify", "written").status == 0
    three = revisions(job)[-1]
    assert three.parent == one.id
    assert (job / three.id).read_bytes() == source.read_bytes()


def test_a_distrusted_revision_is_still_found_and_is_last(job, run):
    (one,) = revisions(job)
    flip(job / one.id, 5)
    assert run("-b", job, "verify").status == 1
    assert run("-b", job, "find").out == f"{job}/{one.id}\n"
    assert os.readlink(job / "last") == one.id


def test_what_cannot_be_marked_is_not_said_to_be_healed(job, run, monkeypatch):
    """As on a file system that is read-only or full."""
    (one,) = revisions(job)
    flip(job / one.id, 5)

    def refuse(self, only=None):
        raise backy.BackyError("job: cannot lock: Read-only file system")

    monkeypatch.setattr(backy.Repository, "metadata_lock", refuse)
    result = run("-b", job, "verify")
    assert result.status == 1
    assert f"{one.id}: damaged (" in result.out
    assert "healed" not in result.out
    assert "all of it is healed" not in result.err


@pytest.mark.parametrize("words", [[], ["--all"], ["--oldest"], ["--all", "--sample", "5%"]])
def test_where_nothing_has_digests_nothing_is_called_verified(job, run, words):
    for _ in range(2):
        assert run("-b", job, "backup", "x").status == 0
    with backy.Repository.open(str(job)) as repository:
        for revision in repository.revisions:
            repository.change(revision, digest="", trust=backy.Trust.TRUSTED)
            (job / f"{revision.id}.sums").unlink()
    result = run("-b", job, "verify", *words)
    assert result.status == 1
    assert "it has no digests" in result.out
    assert "can be verified" in result.err or "cannot be verified" in result.err
