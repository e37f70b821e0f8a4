# SPDX-License-Identifier: GPL-3.0-or-later
"""The directory of a job: what is loaded, locked, cleared up, and what is never touched."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import threading
import time

import pytest
from conftest import backy_process, contents, plant, revisions, write_image

import backy

DONE = "parent: null\nstats: {bytes_written: 1, duration: 1.5}\n"
INCOMPLETE = "parent: null\nstats: {bytes_written: 0}\n"


@pytest.fixture
def job(tmp_path, run):
    """A job on whatever file system the temporary directory is on, without a revision."""
    source = write_image(tmp_path / "source.img", (0, b"image" * 2000))
    assert run("-b", tmp_path / "job", "init", "file", source).status == 0
    return tmp_path / "job"


def names(job):
    return sorted(path.name for path in job.iterdir())


# -- loading --------------------------------------------------------------------


def test_revisions_are_in_the_order_of_their_clock_and_not_of_their_time(job):
    plant(job, "older", DONE + "timestamp: 2026-11-22 10:00:00\nclock: 7\n")
    plant(job, "newer", DONE + "timestamp: 2026-11-20 10:00:00\nclock: 8\n")
    plant(job, "newest", DONE + "timestamp: 2026-11-19 10:00:00\nclock: 9\n")
    assert [one.id for one in revisions(job)] == ["older", "newer", "newest"]


def test_a_backup_is_the_newest_even_when_the_clock_ran_backwards(job, run):
    plant(job, "future", DONE + "timestamp: 2099-01-01 10:00:00\n")
    result = run("-b", job, "backup", "daily")
    assert result.status == 0
    assert "the newest revision is from the future; check the clock" in result.err
    first, second = revisions(job)
    assert first.id == "future"
    assert second.clock == first.clock + 1
    assert os.readlink(job / "last") == second.id


def test_a_newly_made_name_shows_at_once_although_the_directory_is_held_open(cow):
    plant(cow, "one", DONE + "timestamp: 2026-11-20\n")
    with backy.Repository.open(str(cow)) as repository:
        for number in range(5):
            plant(cow, f"more{number}", DONE + "timestamp: 2026-11-20\n")
            repository.load()
            assert len(repository.revisions) == number + 2


def test_a_revision_that_goes_while_the_directory_is_read_is_no_error(job, run, monkeypatch):
    plant(job, "one", DONE + "timestamp: 2026-11-20\n")
    real = os.listdir
    monkeypatch.setattr(backy.os, "listdir", lambda fd: [*real(fd), "gone.rev"])
    result = run("-b", job, "find")
    assert (result.status, result.out, result.err) == (0, f"{job}/one\n", "")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_without_resources_nothing_is_taken_for_damaged(job, run, monkeypatch, number):
    plant(job, "one", DONE + "timestamp: 2026-11-20\n")
    real = os.open

    def refuse(path, *args, **options):
        if path == "one.rev":
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    monkeypatch.setattr(backy.os, "open", refuse)
    result = run("-b", job, "status")
    assert result.status == 1
    assert result.err == f"backy: job: cannot read one.rev: {os.strerror(number)}\n"


def test_a_directory_that_cannot_be_listed_is_one_line(job, run, monkeypatch):
    def listdir(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(backy.os, "listdir", listdir)
    result = run("-b", job, "status")
    assert (result.status, result.err) == (
        1,
        "backy: job: cannot list the directory: Input/output error\n",
    )


def test_images_of_the_wrong_size_or_kind_are_of_no_use(job, run):
    plant(job, "short", DONE + "timestamp: 2026-11-20\nsize: 7\n", b"123456")
    plant(job, "link", DONE + "timestamp: 2026-11-21\n", None)
    (job / "link").symlink_to("/etc/passwd")
    plant(job, "pipe", DONE + "timestamp: 2026-11-22\n", None)
    os.mkfifo(job / "pipe")
    plant(job, "good", DONE + "timestamp: 2026-11-19\nsize: 6\n", b"123456")
    result = run("-b", job, "status")
    assert result.status == 0
    assert sorted(result.err.splitlines()) == [
        "backy: warning: job: link is of no use: its image is not a regular file",
        "backy: warning: job: pipe is of no use: its image is not a regular file",
        "backy: warning: job: short is of no use: its image has 6 bytes instead of 7",
    ]
    for name in ("short", "link", "pipe"):
        assert run("-b", job, "find", "-r", name).status == 1
        assert run("-b", job, "restore", "-r", name, "-").out == ""
        assert run("-b", job, "verify", "-r", name).status == 1
    # the newest that has its image is the parent, and "last"
    assert run("-b", job, "backup", "daily").status == 0
    assert revisions(job)[-1].parent == "good"
    assert os.readlink(job / "link") == "/etc/passwd"
    assert stat.S_ISFIFO((job / "pipe").stat().st_mode)


# -- the directory itself ---------------------------------------------------------


def test_a_job_directory_that_is_a_link_is_refused_with_the_real_path(job, run, tmp_path):
    (tmp_path / "link").symlink_to(job, target_is_directory=True)
    before = contents(job)
    for name in (f"{tmp_path}/link", f"{tmp_path}/link/"):
        for words in (["status"], ["backup", "daily"], ["init", "file", job]):
            result = run("-b", name, *words)
            assert result.status == 1
            assert result.err.splitlines() == [
                f"backy: {name} is a symbolic link",
                f"backy: hint: use the real path, {job}",
            ]
    assert contents(job) == before


def test_a_job_directory_that_is_a_file_is_one_line(tmp_path, run):
    (tmp_path / "file").write_text("")
    result = run("-b", tmp_path / "file", "status")
    assert result.status == 1
    assert result.err == f"backy: cannot open directory {tmp_path}/file: Not a directory\n"


def test_a_job_directory_with_a_hostile_name_is_shown_harmlessly(job, run):
    hostile = job.parent / "a\x1b[2J\nb"
    job.rename(hostile)
    result = run("-b", hostile, "backup", "daily")
    assert result.status == 0, result
    assert "\x1b" not in result.err
    shown = "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b"
    assert all(f"{shown}: " in line for line in result.err.splitlines())


def test_a_directory_that_is_deleted_meanwhile_fails_and_is_not_made_again(job, run, meanwhile):
    def delete():
        for path in job.iterdir():
            path.unlink()
        job.rmdir()

    assert not meanwhile(1, delete)
    result = run("-b", job, "backup", "daily")
    assert result.status == 1, result
    assert not job.exists()


@pytest.mark.parametrize("link", [True, False])
def test_a_directory_that_is_swapped_meanwhile_fails_and_leaves_both_alone(
    job, run, meanwhile, link
):
    assert run("-b", job, "backup", "daily").status == 0
    victim, moved = job.parent / "victim", job.parent / "moved"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    before, theirs = contents(job), contents(victim)

    def swap():
        job.rename(moved)
        if link:
            job.symlink_to(victim, target_is_directory=True)
        else:
            victim.rename(job)

    happened = meanwhile(2, swap)
    result = run("-b", job, "backup", "daily")
    assert happened
    assert result.status == 1
    assert f"the directory {job} was moved or deleted" in result.err
    assert contents(moved) == before
    assert contents(victim if link else job) == theirs


# -- locks -----------------------------------------------------------------------


def test_a_second_backup_ends_at_once_and_names_the_first(job, run):
    with backy.Repository.open(str(job)) as repository, repository.job_lock("backup"):
        before, started = contents(job), time.monotonic()
        result = run("-b", job, "backup", "daily")
        assert time.monotonic() - started < 20
    assert result.status == 1
    assert re.fullmatch(
        rf"backy: job is locked by backup \(pid {os.getpid()} on {re.escape(socket.gethostname())}"
        r", since [0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8} UTC\)\n",
        result.err,
    )
    assert contents(job) == before


def test_a_second_backup_waits_when_it_is_told_to(job, run):
    repository = backy.Repository.open(str(job))
    lock = repository.job_lock("backup")
    lock.__enter__()
    timer = threading.Timer(0.4, lambda: lock.__exit__(None, None, None))
    timer.start()
    started = time.monotonic()
    result = run("-b", job, "backup", "--wait", "daily")
    timer.join()
    repository.close()
    assert result.status == 0
    assert time.monotonic() - started > 0.3


def test_a_second_backup_waits_no_longer_than_told(job, run):
    with backy.Repository.open(str(job)) as repository, repository.job_lock("backup"):
        started = time.monotonic()
        result = run("-b", job, "backup", "daily", "--wait=1s")
        assert 0.9 < time.monotonic() - started < 20
    assert (result.status, "is locked by" in result.err) == (1, True)


def test_a_lock_is_gone_with_its_process(job, run):
    (job / ".lock").write_text("backup (pid 1 on elsewhere, since 2020-01-01 00:00:00 UTC)\n")
    assert run("-b", job, "backup", "daily").status == 0
    assert f"backup (pid {os.getpid()} on " in (job / ".lock").read_text()


def test_a_lock_held_by_who_knows_whom_is_an_error_all_the_same(job, run):
    with open(job / ".lock", "wb") as file:
        backy.fcntl.flock(file, backy.fcntl.LOCK_EX)
        result = run("-b", job, "backup", "daily")
        assert (result.status, result.err) == (1, "backy: job is locked by another process\n")
        file.write(b"\x1b[31mevil\x1b[0m\xff")
        file.flush()
        assert "\x1b" not in run("-b", job, "backup", "daily").err


def test_reading_commands_need_no_lock(job, run):
    assert run("-b", job, "backup", "daily").status == 0
    with backy.Repository.open(str(job)) as repository, repository.job_lock("backup"):
        for words in (["status"], ["find"], ["verify"], ["protect"], ["restore", "-"]):
            assert backy_process("-b", job, *words, text=False).returncode == 0


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "directory"])
def test_a_planted_lock_is_not_followed(job, run, tmp_path, kind):
    victim = tmp_path / "victim"
    if kind == "link":
        victim.write_text("precious")
    plant_at(job / ".lock", kind.replace("dangling", "link"), victim)
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert result.err.startswith("backy: job: cannot lock: ")
    assert not victim.exists() or victim.read_text() == "precious"
    assert names(job) == [".lock", "config"]


def plant_at(path, kind, victim):
    if path.is_symlink() or path.exists():
        path.unlink()
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("precious")


# -- planted names ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "socket"])
@pytest.mark.parametrize("which", ["ID", "ID.rev", "ID.sums", "ID.del"])
def test_what_is_planted_under_our_names_is_neither_followed_nor_removed(
    job, run, tmp_path, kind, which, monkeypatch
):
    assert run("-b", job, "backup", "daily").status == 0
    (one,) = revisions(job)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.chdir(tmp_path)
    name = which.replace("ID", one.id)
    plant_at(job / name, kind, victim)
    planted = os.lstat(job / name)
    result = run("-b", job, "backup", "daily")
    assert result.status == 0, result
    status = run("-b", job, "status")
    assert status.status == 0
    assert "Traceback" not in status.err
    again = os.lstat(job / name)
    assert (again.st_ino, again.st_mode) == (planted.st_ino, planted.st_mode)
    assert victim.read_text() == "precious"
    newest = revisions(job)[-1]
    assert os.readlink(job / "last") == newest.id != one.id


@pytest.mark.parametrize("kind", ["file", "directory", "pipe"])
def test_a_last_that_is_no_link_is_left_alone(job, run, kind):
    for name in ("last", "last.rev"):
        plant_at(job / name, kind, None)
    before = contents(job) if kind != "pipe" else None
    result = run("-b", job, "backup", "daily")
    assert result.status == 0
    assert "job: last is not a symbolic link and is left alone" in result.err
    assert "job: last.rev is not a symbolic link and is left alone" in result.err
    if before:
        after = contents(job)
        assert {name: after[name] for name in before} == before


def test_a_last_that_points_elsewhere_is_turned_and_its_target_spared(job, run, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (job / "last").symlink_to(victim)
    (job / "last.rev").symlink_to("/nowhere")
    assert run("-b", job, "backup", "daily").status == 0
    (one,) = revisions(job)
    assert (os.readlink(job / "last"), os.readlink(job / "last.rev")) == (one.id, f"{one.id}.rev")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_planted_config_is_not_followed(job, run, tmp_path, kind):
    (tmp_path / "victim").write_text("{filename: /etc/shadow, type: file}")
    plant_at(job / "config", kind, tmp_path / "victim")
    result = run("-b", job, "backup", "daily")
    assert result.status == 1
    assert result.err.startswith("backy: job: config: ")
    assert names(job) == ["config"]
    assert run("-b", job, "init", "file", "/x").status == 1


# -- clearing up -----------------------------------------------------------------


def test_every_incomplete_revision_is_removed_by_the_next_backup(job, run):
    for number in range(5):
        plant(job, f"left{number}", INCOMPLETE + f"timestamp: 2026-11-2{number} 10:00:00\n")
    (job / "left3").unlink()
    (job / "left2.sums").write_bytes(b"x")
    (job / "left2.other").write_bytes(b"x")
    (job / "left22").write_bytes(b"x")
    result = run("-b", job, "backup", "daily")
    assert result.status == 0
    assert result.err.count("removing incomplete revision") == 5
    (one,) = revisions(job)
    left = set(names(job)) - {one.id, f"{one.id}.rev", f"{one.id}.sums"}
    assert left == {".lock", "config", "last", "last.rev", "left2.other", "left22"}
    assert one.parent is None


def test_temporary_files_of_ours_are_removed_and_no_others(job, run):
    ours = backy.temporary_name()
    (job / ours).write_text("")
    (job / backy.temporary_name()).symlink_to("/nowhere")
    foreign = [".backy-tmp-", ".backy-tmp-x", f"{ours}2", f"x{ours}", ".tmp-abc"]
    for name in foreign:
        (job / name).write_text("")
    (job / backy.temporary_name()).mkdir()
    assert run("-b", job, "backup", "daily").status == 0
    left = {name for name in names(job) if "tmp" in name and not (job / name).is_dir()}
    assert left == set(foreign)
    assert sum(path.is_dir() for path in job.iterdir()) == 1


def test_a_removal_that_was_interrupted_is_finished(job, run):
    plant(job, "half", DONE + "timestamp: 2026-11-20\n")
    (job / "half.sums").write_bytes(b"x")
    (job / "half.rev").rename(job / "half.del")
    assert run("-b", job, "backup", "daily").status == 0
    assert not [name for name in names(job) if name.startswith("half")]


@pytest.mark.parametrize(
    "text", ["", "nonsense", "uuid: other\nparent: null\ntimestamp: 2026-11-20\n", "[" * 999]
)
def test_a_tombstone_that_is_not_ours_is_left_alone(job, run, text):
    (job / "half.del").write_text(text)
    (job / "half").write_text("precious")
    result = run("-b", job, "backup", "daily")
    assert result.status == 0
    assert "job: half.del is left alone: " in result.err
    assert (job / "half.del").read_text() == text
    assert (job / "half").read_text() == "precious"


def test_a_tombstone_beside_living_metadata_removes_nothing(job, run):
    plant(job, "half", DONE + "timestamp: 2026-11-20\n")
    (job / "half.del").write_text((job / "half.rev").read_text())
    assert run("-b", job, "backup", "daily").status == 0
    assert (job / "half").exists()
    assert (job / "half.rev").exists()


def test_images_without_metadata_are_left_alone(job, run):
    (job / "orphan").write_text("precious")
    (job / "orphan.sums").write_text("precious")
    assert run("-b", job, "backup", "daily").status == 0
    assert (job / "orphan").read_text() == (job / "orphan.sums").read_text() == "precious"


def test_a_revision_that_is_being_read_is_not_removed(job, run):
    plant(job, "left", INCOMPLETE + "timestamp: 2026-11-20\n")
    plant(job, "done", DONE + "timestamp: 2026-11-20\n")
    plant(job, "more", DONE + "timestamp: 2026-11-21\n")
    with backy.Repository.open(str(job)) as repository:
        fds = [repository.open_image(repository.find(name)) for name in ("left", "done")]
        result = run("-b", job, "forget", "-r", "done", "--force")
        assert (result.status, result.err) == (1, "backy: job: done is being read\n")
        result = run("-b", job, "backup", "daily")
        assert result.status == 0
        assert "backy: warning: job: left is being read" in result.err
        assert (job / "left").exists()
        assert (job / "left.rev").exists()
        for fd in fds:
            os.close(fd)
    assert run("-b", job, "forget", "-r", "done", "--force").status == 0
    assert run("-b", job, "backup", "daily").status == 0
    assert not (job / "left").exists()


def test_an_image_that_is_removed_while_it_is_opened_is_one_line(job, run, monkeypatch):
    plant(job, "done", DONE + "timestamp: 2026-11-20\n")
    real = backy.fcntl.flock

    def flock(fd, how):
        real(fd, how)
        if how == backy.fcntl.LOCK_SH:
            (job / "done").unlink()
            (job / "done").write_bytes(b"again")

    monkeypatch.setattr(backy.fcntl, "flock", flock)
    result = run("-b", job, "restore", "-")
    assert result.status == 1
    assert "job: cannot open image done: it has just been removed" in result.err


def test_an_image_that_is_replaced_while_it_is_opened_is_opened_again(job, run, monkeypatch):
    """As a repair does it."""
    assert run("-b", job, "backup", "daily").status == 0
    (one,) = revisions(job)
    real, replaced = backy.fcntl.flock, []

    def flock(fd, how):
        real(fd, how)
        if how == backy.fcntl.LOCK_SH and not replaced:
            replaced.append(one.id)
            shutil.copy(job / one.id, job / "new")
            (job / "new").rename(job / one.id)

    monkeypatch.setattr(backy.fcntl, "flock", flock)
    assert run("-b", job, "verify").status == 0
    assert replaced


def test_metadata_that_is_gone_is_not_written_again(job, run, monkeypatch):
    assert run("-b", job, "backup", "daily").status == 0
    (one,) = revisions(job)
    with backy.Repository.open(str(job)) as repository:
        (job / f"{one.id}.rev").unlink()
        with pytest.raises(backy.NotFound, match="is gone"), repository.metadata_lock():
            repository.change(one, protected=True)
    assert not (job / f"{one.id}.rev").exists()


def test_nothing_in_a_job_is_readable_by_others(job, run):
    assert run("-b", job, "-l", job / "backy.log", "backup", "daily").status == 0
    (one,) = revisions(job)
    modes = {path.name: path.lstat().st_mode & 0o777 for path in job.iterdir()}
    assert modes[one.id] == modes[f"{one.id}.rev"] == modes[f"{one.id}.sums"] == 0o440
    assert modes["config"] == modes[".lock"] == 0o600
    assert job.stat().st_mode & 0o777 == 0o700
    assert not modes["backy.log"] & 0o077
