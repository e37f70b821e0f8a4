# SPDX-License-Identifier: GPL-3.0-or-later
"""Names in a directory that is held open: replaced durably, locked, never followed."""

from __future__ import annotations

import errno
import os
import re
import socket

import pytest

import backy


@pytest.fixture
def directory(tmp_path):
    fd = backy.open_directory(str(tmp_path))
    yield fd
    os.close(fd)


def test_an_id_is_22_characters_of_base_57():
    ids = {backy.new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[2-9A-HJ-NP-Za-km-z]{22}", one) for one in ids)
    assert len(set("".join(ids))) == 57
    assert all(backy.REVISION_ID.fullmatch(one) for one in ids)


def test_a_temporary_name_is_known_again():
    assert backy.is_temporary(backy.temporary_name())
    ours = backy.temporary_name()
    for name in ("", ".backy-tmp-", "x", ours[:-1], ours + "\n", ours + "2"):
        assert not backy.is_temporary(name)


def test_the_root_directory_can_be_opened():
    for path in ("/", "//"):
        os.close(backy.open_directory(path))


def test_a_file_is_replaced_as_a_whole_with_its_mode(directory, tmp_path):
    (tmp_path / "file").write_text("old")
    with open(tmp_path / "file") as old:
        backy.replace_file(directory, "file", b"new", 0o440)
        assert old.read() == "old"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o440
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_replaced_is_on_the_medium_before_it_gets_its_name(directory, monkeypatch):
    order = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def call(*args, name=name, real=real, **options):
            order.append(name)
            return real(*args, **options)

        monkeypatch.setattr(backy.os, name, call)
    backy.replace_file(directory, "file", b"new", 0o600)
    assert order == ["fsync", "rename", "fsync"]


def test_what_the_medium_returns_otherwise_does_not_get_its_name(directory, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(backy.os, "pread", lambda *_: b"wrong")
    with pytest.raises(OSError, match="what was read back is not what was written"):
        backy.replace_file(directory, "file", b"new", 0o600)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_followed(directory, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    backy.replace_link(directory, "link", "elsewhere")
    assert os.readlink(tmp_path / "link") == "elsewhere"
    backy.replace_file(directory, "link", b"file", 0o600)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_link_that_cannot_be_put_leaves_nothing(directory, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        backy.replace_link(directory, "taken", "x")
    assert os.listdir(tmp_path) == ["taken"]


def test_only_regular_files_are_opened(directory, tmp_path, monkeypatch):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    os.close(backy.open_regular(directory, "real"))
    before = len(os.listdir("/proc/self/fd"))
    for name in ("link", "dir", "pipe", "socket", "none"):
        with pytest.raises(OSError, match=r"\w"):
            backy.open_regular(directory, name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_small_file_is_read_up_to_its_limit(directory, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert backy.read_small(directory, "file", 100) == b"x" * 100
    with pytest.raises(OSError, match="larger than 99 Bytes") as caught:
        backy.read_small(directory, "file", 99)
    assert caught.value.errno == errno.EFBIG


def test_all_is_written_however_little_the_kernel_takes(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(backy.os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:3], at))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    backy.write_all(fd, b"0123456789", 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789"
    monkeypatch.setattr(backy.os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="nothing could be written"):
        backy.write_all(fd, b"x", 0)
    os.close(fd)


def test_a_lock_is_shared_or_not(tmp_path):
    path = tmp_path / "lock"
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(3)]
    assert backy.take_lock(fds[0], exclusive=False)
    assert backy.take_lock(fds[1], exclusive=False)
    assert not backy.take_lock(fds[2])
    os.close(fds[0])
    os.close(fds[1])
    assert backy.take_lock(fds[2])
    os.close(fds[2])
