# SPDX-License-Identifier: GPL-3.0-or-later
"""The real thing for each test: fresh directories on XFS and btrfs, block devices, the program.

What the host cannot give is skipped with its reason; with CI set it is a failure.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import marshal
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import backy

PROGRAM = Path(backy.__file__).resolve()
MiB = 1024 * 1024

# Python compiles a program anew at each start, which takes longer than most that is tested
# here.  So it is compiled once; that it starts as it is handed out is for test_packaging.py.
PLACE = Path(tempfile.mkdtemp(prefix="backy-test-program-"))
COMPILED = PLACE / "backy.pyc"
COMPILED.write_bytes(
    importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(backy.__loader__.get_code("backy"))
)


def pytest_unconfigure() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)


# argparse looks for translations on the disk for each word that it might say
os.environ["LANGUAGE"] = "C"


def need(condition: object, reason: str) -> None:
    """Skip the test unless `condition`; where CI is set, everything is expected to be there."""
    if not condition:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def need_tool(name: str) -> None:
    need(shutil.which(name), f"no {name} on this host")


def need_root() -> None:
    need(os.geteuid() == 0, "needs root")


def command(*words: object, **options) -> subprocess.CompletedProcess:
    """Run another program; its failure fails the test with its own words."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
    return done


# -- file systems -------------------------------------------------------------

MKFS = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
}


class FileSystem:
    """A file system of its own in a sparse file, mounted by a loop device."""

    def __init__(self, kind: str, size: int = 2048 * MiB, where: object = None) -> None:
        need_root()
        need_tool(MKFS[kind][0])
        self.kind = kind
        self.top = Path(tempfile.mkdtemp(prefix=f"backy-test-{kind}-", dir=where or scratch()))
        self.disk, self.path = self.top / "disk", self.top / "mnt"
        self.path.mkdir()
        with open(self.disk, "wb") as file:
            file.truncate(size)
        command(*MKFS[kind], self.disk)
        self.mount()

    def mount(self, *options: str, disk: object = None) -> None:
        self.mounted = disk or self.disk
        command("mount", "-o", ",".join(("loop", *options)), self.mounted, self.path)

    def unmount(self) -> None:
        """Not mounted any more, and nothing of it cached.

        A mount namespace that another test has just made holds a copy of every mount; as
        long as it lives, mounting again would show the same pages.
        """
        command("umount", self.path)
        end = time.monotonic() + 60
        while command("losetup", "--associated", self.mounted).stdout:
            assert time.monotonic() < end, f"{self.mounted} stays mounted in another namespace"
            time.sleep(0.02)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if os.path.ismount(self.path):
                subprocess.run(["umount", "-l", str(self.path)], check=False)
        shutil.rmtree(self.top, ignore_errors=True)

    def used(self) -> int:
        """Bytes in use, once everything has reached the disk."""
        command("sync", "-f", self.path)
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize


def scratch() -> str:
    """Where disks of file systems are put: memory is several times faster."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


@pytest.fixture(scope="session")
def _file_systems():
    mounted: dict[str, FileSystem] = {}
    yield mounted
    for one in mounted.values():
        one.close()


def fresh_directory(mounted: dict, kind: str):
    if kind not in mounted:
        mounted[kind] = FileSystem(kind)
    path = Path(tempfile.mkdtemp(dir=mounted[kind].path))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def xfs(_file_systems):
    """An empty directory on XFS with reflinks."""
    yield from fresh_directory(_file_systems, "xfs")


@pytest.fixture
def btrfs(_file_systems):
    """An empty directory on btrfs."""
    yield from fresh_directory(_file_systems, "btrfs")


# the fast tests run on XFS, all of them on both
BOTH = ("xfs", pytest.param("btrfs", marks=pytest.mark.slow))


@pytest.fixture(params=BOTH)
def cow(request, _file_systems):
    """An empty directory on a file system that shares extents; the test runs on each kind."""
    yield from fresh_directory(_file_systems, request.param)


@pytest.fixture
def ext4(_file_systems):
    """An empty directory on a file system that cannot share extents."""
    yield from fresh_directory(_file_systems, "ext4")


@pytest.fixture
def new_file_system():
    """A function that makes and mounts a file system which is this test's own."""
    made: list[FileSystem] = []

    def make(kind: str, size: int = 2048 * MiB, where: object = None) -> FileSystem:
        made.append(FileSystem(kind, size, where))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


@pytest.fixture
def block_device(tmp_path):
    """A function that makes a loop device of `size` bytes; all are detached at the end."""
    need_root()
    need_tool("losetup")
    devices: list[str] = []

    def make(size: int, *options: str, device: str = "") -> str:
        path = tmp_path / f"device-{len(devices)}"
        with open(path, "wb") as file:
            file.truncate(size)
        if device:
            command("losetup", *options, device, path)
        else:
            device = command("losetup", "--find", "--show", *options, path).stdout.strip()
        devices.append(device)
        return devices[-1]

    yield make
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=False)


@pytest.fixture
def hung_directory(tmp_path):
    """A mounted file system whose server never answers."""
    need_root()
    path = tmp_path / "hung"
    path.mkdir()
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as e:
        pytest.skip(f"no /dev/fuse: {e.strerror}")
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    words = ["mount", "-i", "-t", "fuse", "none", str(path), "-o", options]
    done = subprocess.run(words, pass_fds=[fd], capture_output=True, text=True, check=False)
    if done.returncode:
        os.close(fd)
        pytest.skip(f"no FUSE: {done.stderr}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
    os.close(fd)


# -- the program --------------------------------------------------------------


class Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def __repr__(self) -> str:
        return f"status {self.status}\n--- stdout\n{self.out}--- stderr\n{self.err}"


@pytest.fixture
def run(capfd):
    """A function that runs backy inside this process: run("-b", job, "status")."""
    umask = os.umask(0o022)
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]

    def call(*words: object) -> Result:
        stop_log()
        capfd.readouterr()
        try:
            status = backy.main([str(word) for word in words])
        except SystemExit as e:
            status = e.code
        out, err = capfd.readouterr()
        return Result(status, out, err)

    yield call
    os.umask(umask)
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    stop_log()


def stop_log() -> None:
    """Close what backy has logged to; on a full disk a file fails at that once more."""
    while backy.log.handlers:
        with contextlib.suppress(OSError):
            backy.log.handlers.pop().close()


def backy_process(*words: object, **options):
    """Run backy as a process of its own; its CompletedProcess, with text unless told otherwise."""
    options = {"capture_output": True, "text": True, **options}
    command = [sys.executable, str(COMPILED), *map(str, words)]
    return subprocess.run(command, check=False, **options)


def on_terminal(*words: object, typed: str = "", streams=("stdin", "stderr")):
    """Run backy with `streams` on a terminal: its status and what the terminal has seen."""
    ours, theirs = pty.openpty()
    given = {name: subprocess.PIPE for name in ("stdout", "stderr")}
    given.update({name: theirs for name in streams})
    process = subprocess.Popen([sys.executable, str(COMPILED), *map(str, words)], **given)
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    with contextlib.suppress(OSError):  # EIO once nobody else has it open
        while True:
            seen += os.read(ours, 65536)
    os.close(ours)
    process.communicate(timeout=60)
    return process.returncode, seen.decode()


# -- images -------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "little") if size else b""


def write_image(path: Path, *pieces: tuple[int, bytes], size: int | None = None) -> Path:
    """Write `pieces` (offset, bytes) to a sparse image, which keeps what it has elsewhere."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if size is not None:
            os.ftruncate(fd, size)
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    return path


@pytest.fixture
def source(tmp_path):
    """An image of 3 MiB and a bit: noise, text, a hole, zeros, an odd tail."""
    size = 3 * MiB + 12345
    return write_image(
        tmp_path / "source.img",
        (0, noise(MiB, 1)),
        (MiB, b"words " * 50000),
        (2 * MiB + 4096, bytes(65536)),
        (3 * MiB, noise(12345, 2)),
        size=size,
    )


@pytest.fixture
def job(cow, source, run):
    """A job directory for `source`, without a revision, on XFS and on btrfs."""
    assert run("-b", cow / "job", "init", "file", source).status == 0
    return cow / "job"


@pytest.fixture
def plain_job(tmp_path, source, run):
    """A job directory for `source`, without a revision, where temporary files are."""
    assert run("-b", tmp_path / "job", "init", "file", source).status == 0
    return tmp_path / "job"


def revisions(job: Path) -> list[backy.Revision]:
    with backy.Repository.open(str(job)) as repository:
        return repository.revisions


def plant(job: Path, name: str, text: str, image: bytes | None = b"image\n") -> None:
    """Write `{name}.rev` with `text` behind its uuid, and an image unless that is None."""
    (job / f"{name}.rev").write_text(f"uuid: {name}\n{text}")
    if image is not None:
        (job / name).write_bytes(image)


def contents(directory: Path) -> dict[str, object]:
    """Everything in a directory as it stands; two of them are equal when nothing changed."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.name == ".lock" and path.is_file():
            continue
        if path.is_symlink():
            found[path.name] = os.readlink(path)
        elif path.is_file():
            found[path.name] = (path.stat().st_ino, path.stat().st_mode, path.read_bytes())
        else:
            found[path.name] = path.stat().st_mode
    return found


def flip(path: Path, offset: int) -> None:
    """Damage one byte of a file, whatever its mode."""
    fd = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 0x5A]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.fixture
def meanwhile(monkeypatch):
    """A function that lets `event` happen once, at the n-th positional read of an image.

    With n above 1 the beginning of the image has been read by then, also by several
    threads, of which any may be slow.
    """

    def at_read(number: int, event) -> list:
        happened: list = []
        ended: set[int] = set()
        calls, lock = iter(range(1, 1 << 30)), threading.Lock()
        real = os.preadv

        def preadv(fd, buffers, offset, flags=0):
            if flags or len(buffers[0]) == 1:  # it looks whether that is cached
                return real(fd, buffers, offset, flags)
            with lock:
                is_time = next(calls) >= number and (number == 1 or 0 in ended) and not happened
                happened.extend([True] * is_time)
            if is_time:
                event()
            got = real(fd, buffers, offset, flags)
            ended.add(offset)
            return got

        monkeypatch.setattr(backy.os, "preadv", preadv)
        return happened

    return at_read


def rot(path, *offsets: int) -> None:
    """Change a bit at each offset, as a disk may do."""
    with open(path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 4]))


def shared_bytes(path: Path) -> int:
    """How many bytes of the file lie in extents that another file has too (FIEMAP)."""
    lines = command("filefrag", "-v", "-b1", path).stdout.splitlines()
    return sum(int(line.split(":")[3]) for line in lines if "shared" in line and ".." in line)


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


# -- what was found -----------------------------------------------------------


def pytest_terminal_summary(terminalreporter) -> None:
    """Say at how many points the program was broken, and with what success."""
    figures = getattr(sys.modules.get("faults"), "FIGURES", [])
    if figures:
        terminalreporter.section("points at which backy was killed, failed or cut off")
        figures = [*figures, ("in all", *map(sum, zip(*(one[1:] for one in figures))))]
        for name, points, violations, seconds in figures:
            line = f"{points:6} points  {violations} violations  {seconds:6.1f} s  {name}"
            terminalreporter.write_line(line)


# -- Ceph ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster():
    """A Ceph cluster; starting it takes some seconds."""
    from ceph_cluster import TOOLS, Cluster

    need_root()
    for tool in TOOLS:
        need_tool(tool)
    one = Cluster()
    yield one
    one.close()
