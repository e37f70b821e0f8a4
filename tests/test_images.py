# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading, comparing and writing images, in units, blocks and pages, by several threads."""

from __future__ import annotations

import errno
import os
import random
import threading
import time

import pytest
from conftest import MiB, allocated_bytes, noise, write_image

import backy

PAGE, BLOCK, UNIT = backy.PAGE, backy.BLOCK, backy.UNIT


@pytest.fixture
def buffers():
    return backy.Buffers()


def fill(buffers, new, old):
    buffers.new[: len(new)] = new
    buffers.old[: len(old)] = old


# -- extents ----------------------------------------------------------------------


def test_extents_are_what_is_no_hole(cow):
    path = write_image(
        cow / "image", (0, b"x" * BLOCK), (MiB, b"x" * 100), (3 * MiB - 5, b"12345"), size=3 * MiB
    )
    fd = os.open(path, os.O_RDONLY)
    assert list(backy.data_extents(fd, 0, 3 * MiB)) == [
        (0, BLOCK),
        (MiB, MiB + PAGE),
        (3 * MiB - PAGE, 3 * MiB),
    ]
    assert list(backy.data_extents(fd, MiB + PAGE, 2 * MiB)) == []
    assert list(backy.data_extents(fd, 10, 20)) == [(0, 20)]
    assert list(backy.data_extents(fd, 5 * MiB, 6 * MiB)) == []
    os.close(fd)


def test_where_holes_are_not_known_all_is_data(tmp_path, monkeypatch):
    fd = os.open(write_image(tmp_path / "image", size=MiB), os.O_RDONLY)

    def lseek(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(backy.os, "lseek", lseek)
    assert list(backy.data_extents(fd, 0, MiB)) == [(0, MiB)]
    os.close(fd)


def test_an_error_while_looking_for_data_is_an_error(monkeypatch):
    def lseek(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(backy.os, "lseek", lseek)
    with pytest.raises(OSError, match="Input/output"):
        list(backy.data_extents(0, 0, MiB))


@pytest.mark.parametrize(
    ("size", "extents", "offsets"),
    [
        (0, [[(0, 1)]], []),
        (UNIT, [[]], []),
        (UNIT, [], []),
        (3 * UNIT, [[(0, 1)]], [0]),
        (3 * UNIT, [[(5, UNIT + 1)]], [0, UNIT]),
        (3 * UNIT, [[(5, UNIT)]], [0]),
        (3 * UNIT + 1, [[(3 * UNIT, 3 * UNIT + 1)], [(0, 9), (UNIT - 1, UNIT)]], [0, 3 * UNIT]),
        (9 * UNIT, [[(0, UNIT), (4 * UNIT, 5 * UNIT)], [(4 * UNIT + 7, 6 * UNIT)]],
         [0, 4 * UNIT, 5 * UNIT]),
        (2 * UNIT, [[(0, 9 * UNIT)]], [0, UNIT]),
    ],
)  # fmt: skip
def test_units_touch_all_extents_in_order_and_once(size, extents, offsets):
    pieces = [(offset, min(UNIT, size - offset)) for offset in offsets if offset < size]
    assert list(backy.units(size, *extents)) == pieces


def test_units_of_random_extents_miss_nothing():
    chance = random.Random(1)
    for _ in range(200):
        size = chance.randrange(1, 40 * UNIT)
        lists = []
        for _ in range(3):
            points = sorted(chance.randrange(size + UNIT) for _ in range(2 * chance.randrange(5)))
            pairs = zip(points[::2], points[1::2])
            lists.append([(start, end) for start, end in pairs if start < end])
        expected = {
            unit * UNIT
            for one in lists
            for start, end in one
            for unit in range(start // UNIT, -(-end // UNIT))
            if start < size and unit * UNIT < size
        }
        assert [offset for offset, _ in backy.units(size, *lists)] == sorted(expected)


# -- reading ----------------------------------------------------------------------


@pytest.mark.parametrize("from_medium", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_a_reader_fills_holes_with_zeros_and_does_not_read_them(
    cow, buffers, monkeypatch, from_medium, direct
):
    if not direct:
        monkeypatch.setattr(backy, "bypass_cache", lambda fd: False)
    path = write_image(
        cow / "image", (BLOCK, noise(5000, 1)), (UNIT - 10, b"end of it!"), size=UNIT + 77
    )
    image = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    reader = backy.Reader(fd, UNIT + 77, from_medium)
    for offset in (0, UNIT):
        buffers.new[:] = b"\xff" * UNIT
        length = min(UNIT, UNIT + 77 - offset)
        reader.read(buffers.new, offset, length)
        assert bytes(buffers.new[:length]) == image[offset : offset + length]
    assert reader.bytes_read <= 3 * PAGE + 77
    os.close(fd)


def test_a_short_read_is_taken_up_again(tmp_path, buffers, monkeypatch):
    path = write_image(tmp_path / "image", (0, noise(3 * PAGE + 100, 1)))
    fd = os.open(path, os.O_RDONLY)
    real = os.preadv
    monkeypatch.setattr(
        backy.os, "preadv", lambda fd, views, at: real(fd, [views[0][: PAGE + 10]], at)
    )
    got = backy.read_at(fd, buffers.new, 0, 3 * PAGE + 100)
    assert got == 3 * PAGE + 100
    assert bytes(buffers.new[:got]) == path.read_bytes()
    os.close(fd)


def test_a_file_that_ends_too_soon_is_no_zeros(tmp_path, buffers, monkeypatch):
    fd = os.open(write_image(tmp_path / "image", (0, b"x" * PAGE)), os.O_RDONLY)
    monkeypatch.setattr(backy, "data_extents", lambda fd, start, end: iter([(start, end)]))
    with pytest.raises(EOFError):
        backy.Reader(fd, 2 * PAGE, False).read(buffers.new, 0, 2 * PAGE)
    os.close(fd)


def test_what_cannot_be_read_is_told_page_by_page(tmp_path, buffers, monkeypatch):
    path = write_image(tmp_path / "image", (0, b"x" * (4 * PAGE + 10)))
    fd = os.open(path, os.O_RDONLY)
    real = os.preadv

    def preadv(fd, views, offset):
        if offset <= PAGE + 5 < offset + len(views[0]):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, views, offset)

    monkeypatch.setattr(backy.os, "preadv", preadv)
    buffers.new[:] = b"\xff" * UNIT
    reader = backy.Reader(fd, 4 * PAGE + 10, False)
    assert reader.salvage(buffers.new, 0, 4 * PAGE + 10) == [PAGE]
    expected = b"x" * PAGE + bytes(PAGE) + b"x" * (2 * PAGE + 10)
    assert bytes(buffers.new[: 4 * PAGE + 10]) == expected
    os.close(fd)


# -- comparing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "changed", "runs"),
    [
        (UNIT, [], []),
        (UNIT, [0], [(0, PAGE, False)]),
        (UNIT, [PAGE - 1, PAGE], [(0, 2 * PAGE, False)]),
        (UNIT, [0, 2 * PAGE], [(0, PAGE, False), (2 * PAGE, 3 * PAGE, False)]),
        (UNIT, [UNIT - 1], [(UNIT - PAGE, UNIT, False)]),
        (BLOCK + 5, [BLOCK + 4], [(BLOCK, BLOCK + 5, False)]),
        (PAGE + 1, [PAGE], [(PAGE, PAGE + 1, False)]),
        (UNIT, [BLOCK - 1, BLOCK], [(BLOCK - PAGE, BLOCK + PAGE, False)]),
    ],
)
def test_runs_are_the_pages_that_differ(buffers, length, changed, runs):
    old = bytearray(noise(UNIT, 1))
    new = bytearray(old)
    for offset in changed:
        new[offset] ^= 1
    new[length:] = noise(UNIT - length, 2)  # what lies behind does not count
    fill(buffers, new, old)
    assert backy.differing_runs(buffers, [(0, length)]) == runs


def test_zero_pages_are_runs_of_their_own(buffers):
    old = noise(UNIT, 1)
    fill(buffers, bytes(2 * PAGE) + noise(PAGE, 2) + bytes(PAGE) + old[4 * PAGE :], old)
    assert backy.differing_runs(buffers, [(0, UNIT)]) == [
        (0, 2 * PAGE, True),
        (2 * PAGE, 3 * PAGE, False),
        (3 * PAGE, 4 * PAGE, True),
    ]


def test_on_an_empty_image_only_what_is_not_zero_differs(buffers):
    fill(buffers, bytes(PAGE) + b"x" + bytes(UNIT - PAGE - 1), b"\xff" * UNIT)
    assert backy.differing_runs(buffers, [(0, UNIT)], fresh=True) == [(PAGE, 2 * PAGE, False)]


def test_a_page_that_could_not_be_read_differs_and_is_never_a_hole(buffers):
    fill(buffers, bytes(UNIT), bytes(UNIT))
    assert backy.differing_runs(buffers, [(0, UNIT)], lost=[PAGE]) == [(PAGE, 2 * PAGE, False)]


# -- writing ----------------------------------------------------------------------


def test_a_writer_writes_runs_and_punches_zeros(cow, buffers):
    path = write_image(cow / "image", (0, b"x" * UNIT))
    fd = os.open(path, os.O_RDWR)
    buffers.new[:] = bytes(UNIT)
    buffers.new[:PAGE] = b"y" * PAGE
    writer = backy.Writer(fd, UNIT)
    writer.update(buffers.new, 0, [(0, PAGE, False), (BLOCK, UNIT, True)])
    os.fsync(fd)
    assert path.read_bytes() == b"y" * PAGE + b"x" * (BLOCK - PAGE) + bytes(UNIT - BLOCK)
    assert (writer.bytes_written, allocated_bytes(path)) == (PAGE, BLOCK)
    os.close(fd)


def test_where_holes_cannot_be_had_zeros_are_written(tmp_path, buffers, monkeypatch):
    asked = []

    def ioctl(*_):
        asked.append(True)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(backy.fcntl, "ioctl", ioctl)
    path = write_image(tmp_path / "image", (0, b"x" * 100000))
    fd = os.open(path, os.O_RDWR)
    buffers.new[:] = bytes(UNIT)
    writer = backy.Writer(fd, 100000)
    writer.update(buffers.new, 0, [(0, PAGE, True), (2 * PAGE, 100000, True)])
    assert path.read_bytes() == bytes(PAGE) + b"x" * PAGE + bytes(100000 - 2 * PAGE)
    assert writer.bytes_written == 100000 - PAGE
    assert len(asked) == 1
    os.close(fd)


def test_a_hole_at_the_odd_end_frees_the_last_page_and_adds_no_byte(cow, buffers):
    path = write_image(cow / "image", (0, b"x" * 5000))
    fd = os.open(path, os.O_RDWR)
    buffers.new[:] = bytes(UNIT)
    backy.Writer(fd, 5000).update(buffers.new, 0, [(PAGE, 5000, True)])
    os.fsync(fd)
    assert path.read_bytes() == b"x" * PAGE + bytes(5000 - PAGE)
    assert allocated_bytes(path) == PAGE
    os.close(fd)


# -- threads ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_every_offset_is_worked_on_once(workers):
    seen, ticks = [], []
    pieces = [(number, 7) for number in range(500)]
    backy.work_through(
        iter(pieces), lambda *piece: seen.append(piece[:2]), lambda: ticks.append(1), workers
    )
    assert sorted(seen) == pieces
    assert ticks or workers > 1  # they may be faster than the first look


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("where", ["work", "offsets", "tick"])
def test_the_first_failure_ends_all_and_is_raised(workers, where):
    def offsets():
        for number in range(10**9):
            if where == "offsets" and number == 20:
                raise KeyError("failure")
            yield number, 1

    def work(offset, length, _):
        calls.append(offset)
        if where == "work" and offset == 20:
            raise KeyError("failure")

    def tick():
        if where == "tick":
            raise KeyError("failure")

    before, calls = threading.enumerate(), []
    with pytest.raises(KeyError, match="failure"):
        backy.work_through(offsets(), work, tick, workers)
    done = len(calls)
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(5)
            assert not thread.is_alive()
    assert len(calls) == done  # none of them went on


def test_threads_that_cannot_be_started_are_a_failure(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        backy.work_through(iter([(0, 1)] * 9), lambda *_: None, lambda: None, 4)


def test_small_images_need_no_threads():
    assert backy.workers_for(8 * MiB) == 1
    assert backy.workers_for(8 * MiB + 1) > 1


@pytest.mark.parametrize("number", range(0, 40, 7))
def test_what_is_taken_in_turns_is_taken_in_order_and_a_failure_is_the_end(number):
    """After a failure nobody may ask for the next piece: what is next is not known."""
    taken, asked = [], []

    def pieces():
        for at in range(50):
            asked.append(at)
            yield at * backy.UNIT, backy.UNIT

    def take(offset, length, buffers):
        assert asked[-1] * backy.UNIT == offset
        if len(taken) == number:
            raise backy.BackyError("the pipe is broken")
        taken.append(offset)

    with pytest.raises(backy.BackyError, match="the pipe is broken"):
        turns = backy.Turns(take, lambda: None)
        backy.work_through(pieces(), lambda *_: None, lambda: None, 4, turns)
    assert len(asked) == number + 1 and taken == sorted(taken)


def test_who_waits_for_a_pipe_is_made_to_give_up_when_the_work_is_stopped():
    given_up = threading.Event()

    def take(offset, length, buffers):
        assert given_up.wait(20)
        raise backy.BackyError("given up")

    def tick():
        raise backy.Stopped(15)

    started = time.monotonic()
    with pytest.raises(backy.Stopped):
        turns = backy.Turns(take, given_up.set)
        backy.work_through(iter([(0, 1)] * 9), lambda *_: None, tick, 4, turns)
    assert time.monotonic() - started < 5
