# SPDX-License-Identifier: GPL-3.0-or-later
"""The file that vouches for an image: its format, to the byte, and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import struct

import pytest
from conftest import command, flip, noise, revisions

import backy

BLOCK = backy.BLOCK


def expected(image):
    """The digest file for `image`, made from the description of the format alone."""
    header = b"backysum" + struct.pack("<I", 1) + b"sha256".ljust(16, b"\0")
    data = header + struct.pack("<I", BLOCK) + struct.pack("<Q", len(image)) + bytes(24)
    for at in range(0, len(image), BLOCK):
        block = image[at : at + BLOCK]
        data += hashlib.sha256(block).digest() if block.strip(b"\0") else bytes(32)
    return data


def test_the_format_is_header_and_a_digest_for_each_block(job, source, run):
    for size in (source.stat().st_size, 3 * BLOCK, BLOCK - 1, 1, 0, 5 * BLOCK + 1):
        os.truncate(source, size)
        assert run("-b", job, "backup", "daily").status == 0
        one = revisions(job)[-1]
        data = (job / f"{one.id}.sums").read_bytes()
        assert data == expected(source.read_bytes())
        assert one.digest == hashlib.sha256(data).hexdigest()
        by_hand = command("sha256sum", job / f"{one.id}.sums").stdout.split()[0]
        assert f"digest: sha256:{by_hand}\n" in (job / f"{one.id}.rev").read_text()


def make(path, image):
    path.write_bytes(expected(image))
    fd = os.open(path, os.O_RDWR)
    return fd, backy.Sums(fd, len(image))


def test_digests_are_read_and_written_where_their_blocks_are(tmp_path):
    image = noise(5 * BLOCK + 9, 1)
    fd, sums = make(tmp_path / "sums", image)
    assert sums.read(0, len(image)) == [
        hashlib.sha256(image[at : at + BLOCK]).digest() for at in range(0, len(image), BLOCK)
    ]
    assert sums.read(2 * BLOCK, 1) == [hashlib.sha256(image[2 * BLOCK : 3 * BLOCK]).digest()]
    sums.write(3 * BLOCK, [b"a" * 32, b"b" * 32])
    assert sums.read(2 * BLOCK, 4 * BLOCK)[1:3] == [b"a" * 32, b"b" * 32]
    with pytest.raises(OSError, match="digests cut short"):
        sums.read(5 * BLOCK, 2 * BLOCK)
    os.close(fd)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, 63), "its header is too short"),
        (lambda path: os.truncate(path, 0), "its header is too short"),
        (lambda path: flip(path, 0), "its header is unknown"),
        (lambda path: flip(path, 8), "its header is unknown"),
        (lambda path: flip(path, 12), "its header is unknown"),
        (lambda path: flip(path, 28), "its header is unknown"),
        (lambda path: flip(path, 32), "it is for "),
        (lambda path: flip(path, 50), "its own digest is wrong"),
        (lambda path: flip(path, 64), "its own digest is wrong"),
        (lambda path: os.truncate(path, 64 + 32), "it has the wrong length"),
        (lambda path: os.truncate(path, 64 + 4 * 32), "it has the wrong length"),
    ],
)
def test_a_damaged_digest_file_is_refused_with_its_reason(tmp_path, damage, reason):
    path, image = tmp_path / "sums", noise(2 * BLOCK + 9, 1)
    fd, sums = make(path, image)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.check(digest)
    damage(path)
    with pytest.raises(backy.Damaged, match=reason):
        sums.check(digest)
    os.close(fd)


def test_a_digest_file_that_cannot_be_read_is_damaged(tmp_path, monkeypatch):
    fd, sums = make(tmp_path / "sums", b"x")

    def pread(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(backy.os, "pread", pread)
    with pytest.raises(backy.Damaged, match="Input/output error"):
        sums.check("")
    os.close(fd)


def test_only_blocks_of_zeros_have_a_digest_of_zeros():
    assert backy.block_digest(memoryview(bytes(BLOCK))) == bytes(32)
    assert backy.block_digest(memoryview(bytes(5))) == bytes(32)
    for at in (0, 4000, BLOCK - 1):
        block = bytearray(BLOCK)
        block[at] = 1
        assert backy.block_digest(memoryview(block)) == hashlib.sha256(block).digest()


def test_a_page_that_cannot_be_read_hides_no_units_behind_it(tmp_path, monkeypatch):
    """The kernel gives what stands before such a page, and an error only for the page itself."""
    fd = os.open(tmp_path / "sums", os.O_RDWR | os.O_CREAT)
    sums = backy.Sums(fd, 300 * backy.MiB)
    sums.prepare()
    for unit in range(300):
        sums.write(unit * backy.MiB, [b"a" * 32] * 16)
    real, page = os.pread, 5 * 4096

    def pread(fd, length, offset):
        if offset <= page < offset + length:
            if offset == page:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            length = page - offset
        return real(fd, length, offset)

    monkeypatch.setattr(backy.os, "pread", pread)
    assert [start for start, _ in sums.extents()] == [unit * backy.MiB for unit in range(300)]
    os.close(fd)


def test_a_page_of_digests_that_cannot_be_read_puts_none_in_doubt(tmp_path, monkeypatch):
    """The image says what they were; the two before a page's end are read with the page."""
    image = noise(200 * BLOCK, 1)
    (new_fd, new), (old_fd, _) = (make(tmp_path / name, image) for name in ("new", "old"))
    real = os.pread

    def pread(fd, length, offset):
        if fd == old_fd and offset + length > 4096:
            if offset >= 4096:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            length = 4096 - offset
        return real(fd, length, offset)

    monkeypatch.setattr(backy.os, "pread", pread)
    assert backy.disputed_digests(old_fd, new, set(), []) == {}
    os.close(old_fd)
    os.close(new_fd)
