# SPDX-License-Identifier: GPL-3.0-or-later
"""Getting an image back: to files, devices and pipes, and what is refused."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys

import pytest
from conftest import (
    COMPILED,
    MiB,
    allocated_bytes,
    backy_process,
    command,
    contents,
    flip,
    noise,
    on_terminal,
    revisions,
    shared_bytes,
    write_image,
)

import backy


@pytest.fixture
def job(cow, source, run):
    """A job with one revision, on XFS and on btrfs."""
    assert run("-b", cow / "job", "init", "file", source).status == 0
    assert run("-b", cow / "job", "backup", "daily").status == 0
    return cow / "job"


@pytest.fixture
def one_job(plain_job, run):
    """A job with one revision, where temporary files are: for tests of many processes."""
    assert run("-b", plain_job, "backup", "daily").status == 0
    return plain_job


@pytest.fixture
def written(monkeypatch):
    """What was written by position: (path, offset, length)."""
    calls: list = []
    real = os.pwrite

    def pwrite(fd, data, offset):
        calls.append((os.readlink(f"/proc/self/fd/{fd}"), offset, len(data)))
        return real(fd, data, offset)

    monkeypatch.setattr(backy.os, "pwrite", pwrite)
    return calls


# -- to a file ------------------------------------------------------------------


def test_a_new_file_on_the_same_file_system_shares_all_extents(job, source, run, written):
    target = job.parent / "back.img"
    result = run("-b", job, "restore", target)
    assert (result.status, result.out) == (0, "")
    (one,) = revisions(job)
    lines = result.err.splitlines()
    assert lines[0] == f"job: restoring {one} [daily]"
    assert lines[-1].startswith(f"job: restored {one.id} to {target}: 3.01 MiB, extents shared")
    assert target.read_bytes() == source.read_bytes()
    assert shared_bytes(target) > MiB
    assert not [call for call in written if call[0] == str(target)]
    assert target.stat().st_mode & 0o777 == 0o600
    # and it is a file of its own
    write_image(target, (0, b"changed"))
    assert (job / one.id).read_bytes() == source.read_bytes()


def test_a_new_file_elsewhere_is_a_sparse_copy(job, source, run, ext4):
    target = ext4 / "back.img"
    result = run("-b", job, "restore", target)
    assert result.status == 0
    assert target.read_bytes() == source.read_bytes()
    assert allocated_bytes(target) <= allocated_bytes(source)


@pytest.mark.parametrize("size", [0, 1, 4097, 65536, 10 * MiB + 5])
def test_images_of_any_length_come_back(cow, ext4, run, tmp_path, size):
    source = write_image(tmp_path / "image", (0, noise(size, 1)))
    run("-b", cow / "job", "init", "file", source)
    assert run("-b", cow / "job", "backup", "daily").status == 0
    for target in (cow / "new", ext4 / "new"):
        assert run("-b", cow / "job", "restore", target).status == 0
        assert target.read_bytes() == source.read_bytes()
        write_image(target, (size // 2, b"other"), size=size + 70000)
        assert run("-b", cow / "job", "restore", "--force", target).status == 0
        assert target.read_bytes() == source.read_bytes()
        os.truncate(target, size // 3)
        assert run("-b", cow / "job", "restore", "--force", target).status == 0
        assert target.read_bytes() == source.read_bytes()
    done = backy_process("-b", cow / "job", "restore", "-", text=False)
    assert (done.returncode, done.stdout) == (0, source.read_bytes())


@pytest.mark.parametrize(
    ("spec", "which"), [("0", 2), ("1", 1), ("2", 0), ("weekly", 0), ("last", 2)]
)
def test_any_revision_comes_back(job, source, run, tmp_path, spec, which):
    images = [source.read_bytes()]
    with backy.Repository.open(str(job)) as repository, repository.metadata_lock():
        repository.change(repository.find("0"), tags=("weekly",))
    for number in range(2):
        write_image(source, (number * MiB, noise(5000, number + 50)))
        images.append(source.read_bytes())
        assert run("-b", job, "backup", "daily").status == 0
    assert run("-b", job, "restore", "-r", spec, tmp_path / "back").status == 0
    assert (tmp_path / "back").read_bytes() == images[which]


def test_an_existing_file_is_not_overwritten_without_force(one_job, run, tmp_path):
    job = one_job
    target = tmp_path / "back"
    target.write_text("precious")
    result = run("-b", job, "restore", target)
    assert result.status == 1
    assert result.err.splitlines() == [
        f"backy: {target} exists, it is a file",
        "backy: hint: use --force to overwrite it",
    ]
    assert target.read_text() == "precious"


def test_over_a_file_only_the_pages_that_differ_are_written(job, source, run, tmp_path, written):
    target = tmp_path / "back"
    target.write_bytes(source.read_bytes())
    write_image(target, (4096, b"x"), (MiB + 8192, b"y" * 4097))
    written.clear()
    result = run("-b", job, "restore", "--force", target)
    assert result.status == 0
    assert target.read_bytes() == source.read_bytes()
    assert sorted(call[1:] for call in written if call[0] == str(target)) == [
        (4096, 4096),
        (MiB + 8192, 8192),
    ]
    assert "12.00 kiB written" in result.err


def test_over_a_file_zeros_become_holes(job, source, run, ext4):
    target = ext4 / "back"
    target.write_bytes(b"\xff" * source.stat().st_size)
    assert run("-b", job, "restore", "--force", target).status == 0
    assert target.read_bytes() == source.read_bytes()
    assert allocated_bytes(target) <= allocated_bytes(source)


def test_a_link_is_restored_to_what_it_names_and_with_force_alone(job, source, run, tmp_path):
    (tmp_path / "real").write_text("precious")
    (tmp_path / "link").symlink_to("real")
    assert run("-b", job, "restore", tmp_path / "link").status == 1
    assert (tmp_path / "real").read_text() == "precious"
    assert run("-b", job, "restore", "--force", tmp_path / "link").status == 0
    assert (tmp_path / "real").read_bytes() == source.read_bytes()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert run("-b", job, "restore", "--force", tmp_path / "dangling").status == 1
    assert not (tmp_path / "nowhere").exists()


def test_what_was_restored_is_on_the_medium_before_the_end(job, run, ext4, monkeypatch):
    forced = []
    real = os.fsync

    def fsync(fd):
        forced.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real(fd)

    monkeypatch.setattr(backy.os, "fsync", fsync)
    for target in (job.parent / "shared", ext4 / "copied"):
        forced.clear()
        assert run("-b", job, "restore", target).status == 0
        assert forced == [str(target), str(target.parent)]


def test_an_interrupted_restore_says_so_and_goes_on(job, source, run, tmp_path, monkeypatch):
    target, real = tmp_path / "back", os.pwrite

    def pwrite(fd, data, offset):
        if offset >= MiB:
            raise OSError(backy.errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(backy.os, "pwrite", pwrite)
        patch.setattr(backy, "FICLONE", 0)
        result = run("-b", job, "restore", target)
    assert result.status == 1
    assert f"{target} is not complete; start again, with --force, to go on" in result.err
    assert f"cannot write {target} at offset {MiB}: No space left on device" in result.err
    assert run("-b", job, "restore", "--force", target).status == 0
    assert target.read_bytes() == source.read_bytes()


# -- what is refused ------------------------------------------------------------


def test_a_repository_is_never_restored_into(job, run):
    (one,) = revisions(job)
    other = job.parent / "other"
    other.mkdir()
    (other / "abc.rev").write_text("")
    (other / "abc").write_text("precious")
    before, theirs = contents(job), contents(other)
    names = [one.id, "last", "last.rev", "config", f"{one.id}.rev", "new", ".backy-tmp-x"]
    for target in [*(job / name for name in names), other / "abc"]:
        result = run("-b", job, "restore", "--force", target)
        assert result.status == 1
        assert "belongs to a repository and is never overwritten" in result.err
    assert (contents(job), contents(other)) == (before, theirs)


@pytest.mark.parametrize("kind", ["pipe", "directory", "character device"])
def test_what_is_neither_file_nor_block_device_is_refused(one_job, run, tmp_path, kind):
    job = one_job
    target = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("/dev/null")
    result = run("-b", job, "restore", "--force", target)
    assert result.status == 1
    assert result.err.splitlines() == [
        f"backy: {target} is neither a file nor a block device",
        "backy: hint: for a pipe use - as TARGET",
    ]


@pytest.mark.parametrize("target", ["", "/nowhere/x", "/dev/null/x", "x" * 300, "/proc/x"])
def test_a_target_that_cannot_be_made_is_one_line(one_job, run, target):
    job = one_job
    result = run("-b", job, "restore", target)
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err.startswith("backy: cannot ")


def test_a_file_that_may_not_be_written_is_one_line(one_job, run, ext4):
    target = ext4 / "back"
    target.write_text("precious")
    command("chattr", "+i", target)
    try:
        result = run("-b", one_job, "restore", "--force", target)
        assert (result.status, result.err) == (
            1,
            f"backy: cannot open {target}: Operation not permitted\n",
        )
    finally:
        command("chattr", "-i", target)


def test_a_file_that_somebody_has_locked_is_refused(job, run, tmp_path):
    target = tmp_path / "vm.img"
    target.write_bytes(b"precious")
    locker = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_SH)\n"  # as qemu does
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", locker, str(target)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        result = run("-b", job, "restore", "--force", target)
        process.stdin.close()
    assert result.status == 1
    assert f"{target} is in use: it is locked or has a loop device" in result.err
    with open(target, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert run("-b", job, "restore", "--force", target).status == 1
    assert target.read_bytes() == b"precious"
    assert run("-b", job, "restore", "--force", target).status == 0


# -- to a block device ------------------------------------------------------------


def test_a_device_gets_only_what_differs(job, source, run, block_device, written):
    device = block_device(4 * MiB)
    size = source.stat().st_size
    result = run("-b", job, "restore", device)
    assert (result.status, result.err.splitlines()[0]) == (
        1,
        f"backy: {device} exists, it is a block device",
    )
    with open(device, "wb") as file:
        file.write(b"\xff" * 4 * MiB)
    assert run("-b", job, "restore", "--force", device).status == 0
    with open(device, "rb") as file:
        assert file.read(size) == source.read_bytes()
        assert file.read() == b"\xff" * (4 * MiB - size)
    with open(device, "r+b") as file:
        file.seek(MiB + 4096)
        file.write(b"changed")
    written.clear()
    assert run("-b", job, "restore", "--force", device).status == 0
    assert written == [(device, MiB + 4096, 4096)]


def test_a_device_that_is_too_small_is_refused_before_the_first_byte(
    job, source, run, block_device, written
):
    device = block_device(3 * MiB)
    result = run("-b", job, "restore", "--force", device)
    assert result.status == 1
    size = source.stat().st_size
    assert result.err == (
        f"backy: {device} is too small: it has {3 * MiB} bytes, the image {size}\n"
    )
    assert not written


def test_a_mounted_device_is_refused(job, run, new_file_system):
    made = new_file_system("ext4", 16 * MiB)
    (made.path / "file").write_text("precious")
    device = command("findmnt", "-n", "-o", "SOURCE", made.path).stdout.strip()
    result = run("-b", job, "restore", "--force", device)
    assert result.status == 1
    assert result.err == f"backy: {device} is in use: it is mounted or held open\n"
    result = run("-b", job, "restore", "--force", made.disk)
    assert (result.status, "has a loop device" in result.err) == (1, True)
    made.unmount()
    made.mount()
    assert (made.path / "file").read_text() == "precious"


def test_a_device_that_somebody_holds_exclusively_is_refused(job, run, block_device):
    device = block_device(4 * MiB)
    fd = os.open(device, os.O_RDWR | os.O_EXCL)
    assert run("-b", job, "restore", "--force", device).status == 1
    os.close(fd)
    assert run("-b", job, "restore", "--force", device).status == 0


def test_a_file_with_a_loop_device_is_refused(job, run, block_device, tmp_path):
    block_device(4 * MiB)
    result = run("-b", job, "restore", "--force", tmp_path / "device-0")
    assert result.status == 1
    assert "device-0 is in use: it is locked or has a loop device" in result.err
    assert not (tmp_path / "device-0").read_bytes().strip(b"\0")


def test_a_loop_device_on_a_revision_is_refused(job, source, run):
    (one,) = revisions(job)
    os.chmod(job / one.id, 0o600)
    device = command("losetup", "--find", "--show", job / one.id).stdout.strip()
    try:
        result = run("-b", job, "restore", "--force", device)
        assert result.status == 1
        assert "belongs to a repository and is never overwritten" in result.err
    finally:
        command("losetup", "--detach", device)


# -- to a pipe --------------------------------------------------------------------


def piped(job, *words, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return backy_process("-b", job, *words, text=False, capture_output=False, timeout=60, **options)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-v"],
        ["-l", "/dev/stdout"],
        ["-l", "/dev/fd/1", "-v"],
        ["-l", "/proc/self/fd/1"],
        ["-l", "/dev/stderr", "-v"],
        ["-l", "/nowhere/log"],
        ["-l", "-"],
        ["-l", "/dev/full", "-v"],
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_a_pipe_gets_the_bytes_of_the_image_alone(one_job, source, words, merged, tmp_path):
    job = one_job
    stderr = subprocess.STDOUT if merged else subprocess.PIPE
    done = piped(job, "restore", *words, "-", stderr=stderr, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == source.read_bytes()
    if not (merged or words):
        assert done.stderr.count(b"\n") == 1
        assert b"job: restoring " in done.stderr


def test_a_file_that_is_standard_output_and_log_gets_the_image_alone(one_job, source, tmp_path):
    job = one_job
    path = tmp_path / "both"
    with open(path, "wb") as file:
        done = piped(job, "restore", "-", "-l", path, "-v", stdout=file, stderr=file)
    assert done.returncode == 0
    assert path.read_bytes() == source.read_bytes()


def test_a_pipe_gets_zeros_where_the_image_has_holes(cow, run, tmp_path):
    source = write_image(tmp_path / "image", (5 * MiB + 1, b"x"), size=9 * MiB + 3)
    run("-b", cow / "job", "init", "file", source)
    assert run("-b", cow / "job", "backup", "daily").status == 0
    assert piped(cow / "job", "restore", "-").stdout == source.read_bytes()


def test_sigusr1_does_not_get_into_the_image(one_job, source):
    job = one_job
    words = [sys.executable, str(COMPILED), "-b", str(job), "restore", "-"]
    for stderr in (subprocess.STDOUT, subprocess.PIPE):
        pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "bufsize": 0}
        with subprocess.Popen(words, **pipes) as process:
            start = process.stdout.read(1)
            process.send_signal(signal.SIGUSR1)
            rest, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert start + rest == source.read_bytes()
        if said is not None:
            assert b"job (restoring)  " in said


def test_a_reader_that_has_enough_ends_it_quietly(one_job, source):
    job = one_job
    script = '"$@" restore - | head -c 1000; echo "${PIPESTATUS[0]}" >&2'
    words = [sys.executable, str(COMPILED), "-b", str(job), "-l", "/dev/null"]
    done = subprocess.run(["bash", "-c", script, "-", *words], capture_output=True, check=True)
    assert done.stdout == source.read_bytes()[:1000]
    assert done.stderr == b"141\n"


def test_a_full_disk_behind_the_pipe_is_an_error(one_job):
    job = one_job
    with open("/dev/full", "wb") as full:
        done = piped(job, "restore", "-", stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        b"backy: cannot write to standard output: No space left on device"
    )


def test_a_closed_standard_output_is_an_error(one_job):
    words = [sys.executable, str(COMPILED), "-b", str(one_job), "restore", "-"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "-", *words], capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"backy: ")
    assert b"Traceback" not in done.stderr


def test_a_terminal_is_refused(one_job):
    job = one_job
    status, seen = on_terminal("-b", job, "restore", "-", streams=("stdout", "stderr"))
    assert status == 1
    assert seen.splitlines() == [
        "backy: an image is not written to a terminal",
        "backy: hint: redirect it, or name a file",
    ]


# -- damage -----------------------------------------------------------------------


@pytest.fixture
def damaged(job, source):
    """A job whose only image is damaged in three of its blocks, and what it reads as."""
    (one,) = revisions(job)
    for offset in (5, 70000, 3 * MiB + 12344):
        flip(job / one.id, offset)
    return job, one.id, (job / one.id).read_bytes()


@pytest.mark.parametrize("where", ["shared", "copied", "over", "pipe"])
def test_a_damaged_image_is_restored_and_its_damage_listed(
    damaged, source, run, tmp_path, where, ext4
):
    job, name, image = damaged
    if where == "pipe":
        done = piped(job, "restore", "-")
        status, err, back = done.returncode, done.stderr.decode(), done.stdout
    else:
        target = {"shared": job.parent, "copied": ext4, "over": tmp_path}[where] / "back"
        if where == "over":
            target.write_bytes(source.read_bytes())
        result = run("-b", job, "restore", "--force", target)
        status, err, back = result.status, result.err, target.read_bytes()
    assert status == 1
    assert back == image
    assert err.splitlines()[-4:-1] == [
        f"backy: job: {name} is damaged: bytes 0 to 131071 (131072)",
        f"backy: job: {name} is damaged: bytes {3 * MiB} to {3 * MiB + 12344} (12345)",
        f"backy: job: {131072 + 12345} bytes of {name} are not what was backed up; "
        "all else is restored",
    ]
    assert err.splitlines()[-1].startswith("backy: hint: ")


def test_a_distrusted_revision_is_restored_with_a_warning(damaged, run, tmp_path):
    job, name, _ = damaged
    assert run("-b", job, "verify").status == 1
    result = run("-b", job, "restore", tmp_path / "back")
    assert result.status == 1
    assert f"backy: warning: job: {name} is distrusted" in result.err


@pytest.mark.parametrize("damage", ["missing", "flipped", "pipe"])
def test_without_sound_digests_it_is_restored_unchecked_and_says_so(
    job, source, run, tmp_path, damage
):
    (one,) = revisions(job)
    sums = job / f"{one.id}.sums"
    if damage == "flipped":
        flip(sums, 100)
    else:
        sums.unlink()
        if damage == "pipe":
            os.mkfifo(sums)
    result = run("-b", job, "restore", tmp_path / "back")
    assert result.status == 0
    assert f"backy: warning: job: {one.id} cannot be checked: its digests are dam" in result.err
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_an_incomplete_revision_is_restored_by_its_full_id_with_a_warning(job, run, tmp_path):
    (job / "half.rev").write_text("uuid: half\nparent: null\ntimestamp: 2026-11-20\n")
    (job / "half").write_bytes(b"half of it")
    assert run("-b", job, "restore", "-r", "hal", tmp_path / "back").status == 1
    result = run("-b", job, "restore", "-r", "half", tmp_path / "back")
    assert result.status == 0
    assert "backy: warning: job: half is incomplete" in result.err
    assert (tmp_path / "back").read_bytes() == b"half of it"


# -- meanwhile ----------------------------------------------------------------------


def test_a_revision_that_is_being_restored_cannot_be_forgotten(job, source, run):
    assert run("-b", job, "backup", "daily").status == 0
    words = [sys.executable, str(COMPILED), "-b", str(job), "restore", "-r", "1", "-"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(words, **pipes) as process:
        start = process.stdout.read(1)  # the pipe is full soon, and it waits
        result = run("-b", job, "forget", "-r", "1", "--force")
        rest, _ = process.communicate(timeout=60)
    assert (result.status, "is being read" in result.err) == (1, True)
    assert (process.returncode, start + rest) == (0, source.read_bytes())
    assert run("-b", job, "forget", "-r", "1", "--force").status == 0


TAIL = b"The last page is not a whole one"


def spoil_once(system, text: bytes) -> None:
    """Damage the first place of the disk that holds `text`, with nothing cached."""
    system.unmount()
    with open(system.disk, "r+b") as disk, mmap.mmap(disk.fileno(), 0) as view:
        assert view.find(text) >= 0
        view[view.find(text)] ^= 1
    system.mount()


def test_a_rotten_last_page_is_mended_on_the_same_file_system(new_file_system, tmp_path, run):
    """btrfs reads a page before it writes a part of it: that must not end in EIO."""
    system = new_file_system("btrfs", 256 * MiB)
    image, job = tmp_path / "image", system.path / "job"
    content = noise(MiB + 3000, 5)
    for tail in (TAIL, bytes(32), TAIL):  # the first and the last have it in extents of their own
        write_image(image, (0, content), (len(content) - 50, tail))
        if not job.exists():
            assert run("-b", job, "init", "file", image).status == 0
        assert run("-b", job, "backup", "x").status == 0
    spoil_once(system, TAIL)
    mended = 0
    for number in ("0", "2"):
        target = system.path / f"restored{number}"
        result = run("-b", job, "restore", "--check", "-r", number, target)
        assert result.status == 0, result
        mended += "taken from another revision" in result.err
        assert target.read_bytes() == image.read_bytes()
    assert mended == 1


@pytest.mark.parametrize("longer", [0, 1000, 100_000, -1000, -100_000])
def test_a_target_with_a_rotten_last_page_is_overwritten(new_file_system, tmp_path, run, longer):
    system = new_file_system("btrfs", 256 * MiB)
    content = noise(MiB + 3000, 5)
    image = write_image(tmp_path / "image", (0, content))
    job = tmp_path / "job"
    assert run("-b", job, "init", "file", image).status == 0
    assert run("-b", job, "backup", "x").status == 0
    old = bytearray(content + bytes(max(0, longer)))[: len(content) + longer]
    old[-50:-18] = TAIL
    write_image(system.path / "target", (0, bytes(old)))
    spoil_once(system, TAIL)
    result = run("-b", job, "restore", "--force", system.path / "target")
    assert result.status == 0, result
    assert (system.path / "target").read_bytes() == content
