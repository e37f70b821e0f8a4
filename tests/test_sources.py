# SPDX-License-Identifier: GPL-3.0-or-later
"""What a source must do, and image files with any name."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from conftest import noise, revisions, write_image

import backy


@pytest.mark.parametrize(
    "name",
    ["-r", "--force", "a b", "..img", "ünï", "日本", "'", '"', "#", "{a: b}", "%s", "null", "0123",
     "yes", "x" * 200, "a\\b", "*", "a: b", " ", "~"],
)  # fmt: skip
def test_an_image_may_have_any_name(tmp_path, run, name, monkeypatch):
    source = write_image(tmp_path / name, (0, noise(5000, 1)))
    monkeypatch.chdir(tmp_path)
    assert run("-b", "job", "init", "--", "file", name).status == 0
    result = run("-b", "job", "backup", "daily")
    assert result.status == 0, result
    assert (tmp_path / "job" / "last").read_bytes() == source.read_bytes()
    source.unlink()
    result = run("-b", "job", "backup", "daily")
    assert (result.status, result.err.count("\n")) == (1, 1)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\u2028", "\x85", "\u202e", "\udcff", "\x7f"])
def test_a_name_that_no_config_can_hold_is_refused_at_once(tmp_path, run, name):
    source = write_image(tmp_path / name, (0, noise(5000, 1)))
    result = run("-b", tmp_path / "job", "init", "file", source)
    assert (result.status, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "no config can hold such characters" in result.err
    assert "\x1b" not in result.err
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("name", ["a\\nb", "\\e[2J"])
def test_a_name_that_was_escaped_in_the_config_is_shown_harmlessly(tmp_path, run, name):
    (tmp_path / "config").write_text(f'type: file\nfilename: "/nowhere/{name}"\n')
    result = run("-b", tmp_path, "backup", "daily")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "\x1b" not in result.err


def test_a_source_may_be_a_link(tmp_path, run):
    source = write_image(tmp_path / "real", (0, noise(5000, 1)))
    (tmp_path / "link").symlink_to("real")
    run("-b", tmp_path / "job", "init", "file", tmp_path / "link")
    assert run("-b", tmp_path / "job", "backup", "daily").status == 0
    assert (tmp_path / "job" / "last").read_bytes() == source.read_bytes()


def test_a_read_only_source_is_enough(tmp_path, run):
    source = write_image(tmp_path / "image", (0, noise(5000, 1)))
    os.chmod(source, 0o400)
    before = source.stat()
    run("-b", tmp_path / "job", "init", "file", source)
    assert run("-b", tmp_path / "job", "backup", "daily").status == 0
    after = source.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_a_source_that_cannot_be_examined_is_one_line(tmp_path, run, monkeypatch):
    source = write_image(tmp_path / "image", (0, noise(5000, 1)))
    run("-b", tmp_path / "job", "init", "file", source)

    def lseek(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(backy.os, "lseek", lseek)
    result = run("-b", tmp_path / "job", "backup", "daily")
    assert result.status == 1
    assert result.err == f"backy: cannot examine source {source}: Input/output error\n"


def test_a_page_of_the_source_that_cannot_be_read_fails_with_its_offset(
    job, source, run, monkeypatch
):
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        end = offset + sum(map(len, buffers))
        is_source = os.readlink(f"/proc/self/fd/{fd}") == str(source)
        if is_source and offset <= (1 << 20) + 8192 < end:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(backy.os, "preadv", preadv)
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert (
        f"backy: job: cannot read source {source} at offset {(1 << 20) + 8192}: "
        "Input/output error" in result.err
    )
    assert sorted(os.listdir(job)) == [".lock", "config"]


def test_an_error_that_does_not_come_again_costs_nothing(job, source, run, monkeypatch):
    real, failed = os.preadv, []

    def preadv(fd, buffers, offset, flags=0):
        if not flags and not failed and os.readlink(f"/proc/self/fd/{fd}") == str(source):
            failed.append(True)
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(backy.os, "preadv", preadv)
    assert run("-b", job, "backup", "daily").status == 0
    assert (job / "last").read_bytes() == source.read_bytes()


def test_a_source_that_changed_this_instant_is_waited_for(tmp_path):
    """Else a write within the same tick of the clock would go unseen."""
    source = write_image(tmp_path / "image", (0, b"x"))
    fd = os.open(source, os.O_RDONLY)
    os.utime(source)
    started = time.monotonic()
    backy.StillFile(str(source), fd)
    assert time.monotonic() - started >= 0.02
    os.close(fd)


def test_naming_a_type_registers_a_source(tmp_path, run):
    @dataclass(frozen=True)
    class Made(backy.Source):
        """A source of another kind, which asks nothing of the rest of the program."""

        text: str = ""
        type = "made"
        keys = ("text",)

        @classmethod
        def parse(cls, words):
            return {"text": words, "type": "made"}

        @classmethod
        def load(cls, options):
            return cls(options["text"])

        @contextmanager
        def snapshot(self, name):
            path = write_image(tmp_path / "snapshot", (0, self.text.encode()))
            fd = os.open(path, os.O_RDONLY)
            size = path.stat().st_size
            yield backy.Still("made", size, backy.Reader(fd, size, False))
            os.close(fd)

    try:
        assert run("-b", tmp_path / "job", "init", "made", "some text").status == 0
        result = run("-b", tmp_path / "job", "backup", "daily")
        assert result.status == 0, result
        assert (tmp_path / "job" / "last").read_text() == "some text"
        assert len(revisions(tmp_path / "job")) == 1
    finally:
        Made.type = ""
        del Made
        import gc

        gc.collect()
    assert "made" not in backy.Source.types()


def test_a_bare_source_promises_nothing():
    with pytest.raises(NotImplementedError):
        backy.Source.parse("")
    with pytest.raises(NotImplementedError):
        backy.Source.load({})
    with pytest.raises(NotImplementedError), backy.Source().snapshot("x"):
        pass
