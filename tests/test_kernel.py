# SPDX-License-Identifier: GPL-3.0-or-later
"""The calls that Python has no name for, on the real thing, and where they are not to be had."""

from __future__ import annotations

import errno
import os

import pytest
from conftest import MiB, allocated_bytes, command, noise, shared_bytes, write_image

import backy

KiB = 1024


@pytest.fixture
def refuse(monkeypatch):
    """A function that lets every ioctl fail with a number."""

    def with_number(number):
        def ioctl(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(backy.fcntl, "ioctl", ioctl)

    return with_number


def opened(path, flags=os.O_RDWR | os.O_CREAT):
    return os.open(path, flags)


def test_a_clone_shares_every_extent(cow):
    one = opened(write_image(cow / "one", (0, noise(MiB, 1))))
    two = opened(cow / "two")
    backy.clone_file(one, two)
    assert (cow / "two").read_bytes() == (cow / "one").read_bytes()
    assert shared_bytes(cow / "two") == MiB
    os.close(one)
    os.close(two)


def test_where_extents_cannot_be_shared_it_says_so(ext4, cow):
    one = opened(write_image(ext4 / "one", (0, b"x" * 4096)))
    two, three = opened(ext4 / "two"), opened(cow / "three")
    for target in (two, three):
        with pytest.raises(backy.CloneUnsupported, match="cannot share extents"):
            backy.clone_file(one, target)
    for fd in (one, two, three):
        os.close(fd)


def test_another_failure_to_clone_is_no_lack_of_support(tmp_path, refuse):
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        backy.clone_file(0, 0)


def test_a_hole_frees_space_and_spares_its_neighbours(cow):
    path = write_image(cow / "image", (0, b"x" * MiB))
    fd = opened(path)
    before = allocated_bytes(path)
    assert backy.punch_hole(fd, 64 * KiB, 128 * KiB)
    os.fsync(fd)
    os.close(fd)
    image = path.read_bytes()
    assert image == b"x" * 64 * KiB + bytes(128 * KiB) + b"x" * (MiB - 192 * KiB)
    assert allocated_bytes(path) == before - 128 * KiB


def test_where_holes_cannot_be_had_it_says_so(tmp_path, refuse):
    for number in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS):
        refuse(number)
        assert backy.punch_hole(0, 0, 4096) is False
    refuse(errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        backy.punch_hole(0, 0, 4096)


def test_small_copies_are_asked_for_on_xfs_and_nowhere_missed(xfs, ext4, tmp_path):
    for directory in (xfs, ext4, tmp_path):
        fd = opened(directory / "image")
        backy.hint_small_copies(fd)
        os.close(fd)
    shown = command("xfs_io", "-c", "cowextsize", xfs / "image").stdout
    assert shown.startswith("[4096]")


def test_reads_past_the_cache_see_the_medium(xfs):
    path = write_image(xfs / "image", (0, noise(MiB, 1)))
    fd = os.open(path, os.O_RDONLY)
    assert backy.bypass_cache(fd)
    buffers = backy.Buffers()
    assert os.preadv(fd, [buffers.new[:4096]], 8192) == 4096
    assert bytes(buffers.new[:4096]) == noise(MiB, 1)[8192:12288]
    os.close(fd)


def test_where_the_cache_cannot_be_passed_it_says_so(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(backy.fcntl, "fcntl", refuse)
    assert backy.bypass_cache(0) is False


def test_whether_a_file_is_cached_is_seen_by_a_sample(xfs):
    path = write_image(xfs / "image", (0, noise(4 * MiB, 1)))
    fd = os.open(path, os.O_RDONLY)
    path.read_bytes()
    assert backy.is_cached(fd, 4 * MiB)
    backy.drop_cache(fd)
    for _ in range(3):  # a look hardly changes what it looks at
        assert not backy.is_cached(fd, 4 * MiB)
    assert int(command("fincore", "-b", "-n", "-o", "RES", path).stdout) < MiB
    assert backy.is_cached(fd, 0)
    os.close(fd)


def test_where_that_cannot_be_seen_the_cache_is_left_alone(monkeypatch):
    def preadv(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(backy.os, "preadv", preadv)
    assert backy.is_cached(0, 4096)


def test_writes_to_a_device_are_counted(block_device):
    device = block_device(MiB)
    number = os.stat(device).st_rdev
    before = backy.device_writes(number)
    assert before
    fd = os.open(device, os.O_RDWR)
    os.pread(fd, 4096, 0)
    assert backy.device_writes(number) == before
    os.pwrite(fd, b"x" * 4096, 0)
    os.fsync(fd)
    os.close(fd)
    assert backy.device_writes(number) != before
    assert backy.device_writes(os.makedev(4095, 1048575)) == ()
