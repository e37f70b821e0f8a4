#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure backy beside what people would use instead of it, and print one table.

Root gets file systems and block devices of its own in loop files, and a cold cache;
anybody else measures in one directory what can be measured there, and is told so.
A target that is missed is shown; it is no failure.

Chapters:

    Figures, Laboratory, Images, Contenders, Table, Steps, Promises, Network, Ageing,
    Command line
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Callable, Iterator, Tuple

ROOT = Path(__file__).resolve().parent.parent
KiB, MiB, GiB, TiB = (1024**power for power in (1, 2, 3, 4))
PAGE = 4 * KiB


# ==== Figures ================================================================
#
# A command is measured by a small process of its own: what the kernel calls the
# peak memory of a child is at least that of the process that started it.

MEASURE = r"""
import os, sys, time
def io():
    values = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(values["read_bytes"]), int(values["write_bytes"])
report = int(sys.argv[1])
os.set_inheritable(report, False)
read, written = io()
started = time.monotonic()
pid = os.fork()
if not pid:
    os.execvp("sh", ["sh", "-c", sys.argv[2]])
_, status, usage = os.wait4(pid, 0)
wall, now = time.monotonic() - started, io()
figures = wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
os.write(report, repr((*figures, now[0] - read, now[1] - written)).encode())
sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
"""


@dataclass(frozen=True)
class Figures:
    """What one command took: seconds, and for all else bytes."""

    wall: float
    cpu: float
    peak: float
    read: float
    written: float
    grown: float | None = None  # how much more the file system holds


def middle(runs: list[Figures]) -> Figures:
    """The median of each figure, but the highest peak."""

    def of(name: str) -> float:
        return median(getattr(run, name) for run in runs)

    peak = max(run.peak for run in runs)
    grown = of("grown") if runs[0].grown is not None else None
    return Figures(of("wall"), of("cpu"), peak, of("read"), of("written"), grown)


@dataclass(frozen=True)
class Contender:
    """A shell command to be measured, and what goes before and after it."""

    command: str
    prepare: str = ":"
    after: str = ":"
    store: str = ""  # the variable with the file system that is to grow
    program: str = "sh"  # what must be installed


# ==== Laboratory =============================================================
#
# Whatever is set up is a context, so that failures and signals leave no mount, no
# loop device and no file behind.  Commands find paths in variables.


class Failed(Exception):
    pass


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def place(name: str) -> Path:
    return Path(os.environ[name])


class Laboratory:
    """A temporary directory with file systems and devices, and the means to measure there."""

    def __init__(self, args: argparse.Namespace, top: str) -> None:
        self.runs, self.top = args.runs, Path(top)
        self.is_root = os.geteuid() == 0
        if re.search(r"\s", top):
            raise Failed(f"{top}: blanks in the name of a directory are not provided for")
        (self.top / "backy").symlink_to(args.program)
        os.environ.update(
            PATH=f"{top}:/usr/bin:/bin:/usr/sbin:/sbin:{os.environ.get('PATH', '')}",
            BORG_BASE_DIR=f"{top}/borg",
            BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes",
            RESTIC_PASSWORD="bench",
            RESTIC_CACHE_DIR=f"{top}/restic",
        )

    def sh(self, script: str) -> str:
        """Run a script that is not measured; its output."""
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{script}: status {done.returncode}: {done.stderr.strip()[-500:]}")
        return done.stdout

    @contextmanager
    def device(self, size: int) -> Iterator[str]:
        """A loop device; with direct I/O, or what is cold would still be in memory below it."""
        with tempfile.NamedTemporaryFile(prefix="disk-", dir=self.top) as disk:
            disk.truncate(size)
            device = self.sh(f"losetup --find --show {disk.name}").strip()
            try:
                with suppress(Failed):
                    self.sh(f"losetup --direct-io=on {device}")
                yield device
            finally:
                subprocess.run(["losetup", "--detach", device])

    @contextmanager
    def file_system(self, variable: str, kind: str, size: int) -> Iterator[Path]:
        """A new file system, its place in that variable; just a directory if not root."""
        path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.top))
        os.environ[variable] = str(path)
        if not self.is_root:
            yield path
            return
        with self.device(size) as device:
            self.sh(f"mkfs.{kind} -q {device} && mount {device} {path}")
            try:
                yield path
            finally:
                subprocess.run(["sh", "-c", f"umount {path} 2>&- || umount --lazy {path}"])

    def can_have(self, kind: str) -> bool:
        return kind == "xfs" or bool(self.is_root and shutil.which(f"mkfs.{kind}"))

    def cool(self) -> None:
        os.sync()
        if self.is_root:
            Path("/proc/sys/vm/drop_caches").write_text("3")

    def used(self, path: Path) -> int:
        """Bytes in use once all has reached the disk, and what was deleted has left it."""
        before = -1
        for _ in range(50):
            self.sh(f"sync -f {path}")
            status = os.statvfs(path)
            used = (status.f_blocks - status.f_bfree) * status.f_frsize
            if used == before:  # XFS frees the blocks of large files a little later
                break
            before = used
            time.sleep(0.1)
        return before

    def measure(self, command: str, store: str = "") -> Figures:
        """Run a command with a cold cache."""
        before = self.used(place(store)) if store else 0
        self.cool()
        ours, theirs = os.pipe()
        words = [sys.executable, "-I", "-S", "-c", MEASURE, str(theirs), command]
        options = {"stdout": subprocess.DEVNULL, "start_new_session": True}
        with tempfile.TemporaryFile() as errors, open(ours) as report:
            process = subprocess.Popen(words, stderr=errors, pass_fds=[theirs], **options)
            try:
                os.close(theirs)
                figures = re.findall(r"[0-9.e+-]+", report.read())
                status = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            errors.seek(0)
            if status or not figures:
                said = errors.read().decode(errors="replace").strip()[-500:]
                raise Failed(f"{command}: status {status}: {said}")
        found = Figures(*map(float, figures))
        return replace(found, grown=self.used(place(store)) - before) if store else found

    def compare(
        self,
        step: str,
        contenders: dict[str, Contender],
        each_round: Callable[[], object] = lambda: None,
    ) -> dict[str, Figures]:
        """Measure all that are installed in turn, and this several times; medians by name."""
        able = {name: one for name, one in contenders.items() if shutil.which(one.program)}
        runs: dict[str, list[Figures]] = {name: [] for name in able}
        for number in range(self.runs):
            each_round()
            for name, one in able.items():
                self.sh(one.prepare)
                runs[name].append(self.measure(one.command, one.store))
                say(f"{step}: {name}: {runs[name][-1].wall:.2f} s ({number + 1}/{self.runs})")
                self.sh(one.after)
        return {name: middle(of_one) for name, of_one in runs.items()}


# ==== Images =================================================================

WORDS = random.Random(1).choices(Path(__file__).read_bytes().split(), k=1 << 16)


def text(size: int) -> bytes:
    """Words in no order, which a compressor makes about half as long."""
    return b" ".join(map(WORDS.__getitem__, array("H", os.urandom(size))))[:size]


def make_image(path: Path, size: int, kinds: tuple = (None, os.urandom, text)) -> Path:
    """Write `size` bytes, in stripes of 16 MiB of each kind in turn; None is a hole."""
    with open(path, "wb") as image:
        image.truncate(size)
        for at in range(0, size, MiB):
            kind = kinds[at // (16 * MiB) % len(kinds)]
            if kind:
                image.seek(at)
                image.write(kind(min(MiB, size - at)))
        os.fsync(image.fileno())
    return path


def change(path: Path, share: float, length: int = PAGE) -> int:
    """Write noise to that share of an image, in single runs of `length`; the bytes changed."""
    places = path.stat().st_size // length
    chosen = random.sample(range(places), max(1, int(places * share)))
    with open(path, "r+b", buffering=0) as image:
        for number in sorted(chosen):
            os.pwrite(image.fileno(), os.urandom(length), number * length)
        os.fsync(image.fileno())
    return len(chosen) * length


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# ==== Contenders =============================================================
#
# STORE holds SOURCE and the JOB with its newest IMAGE, as in the worst case they
# share a disk; OTHER is another file system, DEVICE a block device.

NEW = "rm -rf $JOB && backy -b $JOB init file $SOURCE"
TOUCH = "touch $SOURCE"  # or peers would skip it unread
FORGET = "backy -b $JOB forget --force -r 0"
# Without --reflink=never cp shares the extents and copies nothing.
COPY = "cp --sparse=always --reflink=never"
CP = "cp --sparse=always && sync"
BORG, RESTIC, QCOW2 = "borg, blocks of 64 KiB", "restic", "qemu-img convert, qcow2"
PEERS = (BORG, RESTIC, QCOW2)

borg_create = "borg create --chunker-params=fixed,65536 $STORE/borg::{now:%H%M%S%f} $SOURCE && sync"
borg_init = f"{TOUCH}; rm -rf $STORE/borg; borg init --encryption=none $STORE/borg"
borg_extract = "cd $OTHER/borg && borg extract --sparse $STORE/borg::$(cat $OTHER/newest) && sync"
borg_find = "mkdir -p $OTHER/borg; borg list --last 1 --short $STORE/borg > $OTHER/newest"
restic_backup = "restic -q -r $STORE/restic backup $SOURCE && sync"
restic_init = f"{TOUCH}; rm -rf $STORE/restic; restic init -r $STORE/restic"
restic_restore = "restic -q -r $STORE/restic restore latest --target $OTHER/restic && sync"
qcow2_convert = "qemu-img convert -f raw -O qcow2 $SOURCE $STORE/qcow2 && sync"
qcow2_again = qcow2_convert.replace("$STORE/qcow2", "$STORE/next")
qcow2_restore = "qemu-img convert -f qcow2 -O raw $STORE/qcow2 $OTHER/raw && sync"


def backy(words: str, prepare: str = ":", after: str = ":", store: str = "") -> Contender:
    return Contender(f"backy -b $JOB {words}", prepare, after, store)


def again(words: str, after: str, job: str = "$JOB", store: str = "STORE") -> Contender:
    return Contender(f"backy -b {job} backup {words} daily", TOUCH, after, store)


FIRST = {
    "backy": backy("backup daily", NEW, store="STORE"),
    CP: Contender(f"{COPY} $SOURCE $STORE/copy && sync", "rm -f $STORE/copy", store="STORE"),
    BORG: Contender(borg_create, borg_init, store="STORE", program="borg"),
    RESTIC: Contender(restic_backup, restic_init, store="STORE", program="restic"),
    QCOW2: Contender(qcow2_convert, "rm -f $STORE/qcow2", store="STORE", program="qemu-img"),
}
SECOND = {
    "cat SOURCE": Contender("cat $SOURCE"),
    "cat SOURCE PARENT": Contender("cat $SOURCE $IMAGE"),
    "written": again("--verify written", FORGET),
    "full": again("--verify full", FORGET),
    BORG: Contender(borg_create, TOUCH, store="STORE", program="borg"),
    RESTIC: Contender(restic_backup, TOUCH, store="STORE", program="restic"),
    QCOW2: Contender(qcow2_again, TOUCH, "mv $STORE/next $STORE/qcow2", "STORE", "qemu-img"),
}
# What is verified in full stays, for the next round and to be restored; and one on btrfs.
SCATTERED = {**SECOND, "full": again("--verify full", ":")}
WRITE = f"""PYTHONPATH={ROOT}/tools {sys.executable} -c 'import bench
bench.change(bench.place("BTRFS") / "probe", 0.01)'"""
ON_BTRFS = {
    "btrfs": again("--verify full", ":", "$BTRFS/job", "BTRFS"),
    # so many pages written to a clone, by hand: what the file system takes for them
    "by hand": Contender(
        f"cp --reflink=always $BTRFS/job/last $BTRFS/probe && {WRITE} && sync",
        after="rm $BTRFS/probe && sync",
        store="BTRFS",
    ),
}
RESTORE = {
    "backy": backy("restore $OTHER/ours", "rm -f $OTHER/ours"),
    CP: Contender(f"{COPY} $IMAGE $OTHER/copy && sync", "rm -f $OTHER/copy", "rm $OTHER/copy"),
    BORG: Contender(borg_extract, borg_find, "rm -r $OTHER/borg", program="borg"),
    RESTIC: Contender(restic_restore, after="rm -r $OTHER/restic", program="restic"),
    QCOW2: Contender(qcow2_restore, after="rm $OTHER/raw", program="qemu-img"),
}
REFLINK = "cp --reflink=always && sync"
RESTORE_SHARED = {
    "backy": backy("restore $STORE/ours", after="rm $STORE/ours"),
    REFLINK: Contender(
        "cp --reflink=always $IMAGE $STORE/copy && sync $STORE/copy", after="rm $STORE/copy"
    ),
}
RESTORE_OVER = {
    "backy": backy("restore --force $OTHER/ours"),
    "cmp": Contender("cmp $IMAGE $OTHER/ours"),  # equal by now, so it reads all
}
RESTORE_PIPE = {
    "backy": backy("restore - | cat > /dev/null"),
    "cat": Contender("cat $IMAGE | cat > /dev/null"),
}
CONVERT = "qemu-img convert -n && sync"
RESTORE_DEVICE = {
    "backy": backy("restore --force $DEVICE", "blkdiscard $DEVICE"),
    CONVERT: Contender(
        "qemu-img convert -n -f raw -O raw $IMAGE $DEVICE && sync $DEVICE",
        "blkdiscard $DEVICE",
        program="qemu-img",
    ),
}
VERIFY = {
    "backy": backy("verify"),
    "cat IMAGE": Contender("cat $IMAGE"),
    BORG: Contender("borg check --verify-data $STORE/borg", program="borg"),
    RESTIC: Contender("restic -q -r $STORE/restic check --read-data", program="restic"),
    QCOW2: Contender("qemu-img compare -f raw -F qcow2 $SOURCE $STORE/qcow2", program="qemu-img"),
}


# ==== Table ==================================================================


def mib(value: float | None) -> str:
    return "-" if value is None else f"{value / MiB:.{0 if abs(value) >= 100 * MiB else 1}f}"


def in_mib(value: float) -> str:
    return f"{mib(value)} MiB"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def percent(value: float) -> str:
    return f"{value:.0%}"


class Table:
    """Rows of words, printed at the end."""

    COMPARED = (
        *("step", "ours", "peer", "the peer's", "ratio", "target", "met", "CPU s", "peak MiB"),
        *("read MiB", "written MiB", "grown MiB"),
    )

    def __init__(self, columns: tuple[str, ...] = COMPARED) -> None:
        self.columns, self.rows = columns, []

    def add(self, *words: object) -> None:
        self.rows.append([*map(str, words), *["-"] * (len(self.columns) - len(words))])

    def compared(
        self, step: str, ours: Figures, peer: str, theirs: Figures | None, limit: float = 0
    ) -> None:
        """A row of wall times, both measured; ours may be at most `limit` times the peer's."""
        if theirs is None:
            self.add(step, seconds(ours.wall), peer, "skipped: not installed")
            return
        ratio = ours.wall / theirs.wall
        target = (f"<= {limit} x", verdict(ratio <= limit)) if limit else ("-", "-")
        sizes = [(getattr(ours, one), getattr(theirs, one)) for one in SIZES]
        self.add(
            *(step, seconds(ours.wall), peer, seconds(theirs.wall), f"{ratio:.2f}", *target),
            f"{ours.cpu:.1f} / {theirs.cpu:.1f}",
            *(f"{mib(one)} / {mib(other)}" for one, other in sizes),
        )

    def fact(
        self,
        step: str,
        ours: float,
        form: Callable[[float], str],
        limit: float | None = None,
        peer: tuple[str, float] | None = None,
        times: float = 0,
        figures: Figures | None = None,
    ) -> None:
        """A row of anything else: at most `limit`, or at most `times` what the peer has."""
        cells = [step, form(ours), *["-"] * 5]
        if peer:
            cells[2:5] = peer[0], form(peer[1]), f"{ours / peer[1]:.2f}" if peer[1] else "-"
        if limit is not None:
            cells[5:] = f"<= {form(limit)}", verdict(ours <= limit)
        elif peer and times:
            cells[5:] = f"<= {times} x", verdict(ours <= times * peer[1])
        if figures:
            cells.append(f"{figures.cpu:.1f}")
            cells.extend(mib(getattr(figures, one)) for one in SIZES)
        self.add(*cells)

    def lines(self, markdown: bool) -> Iterator[str]:
        rows = [list(self.columns), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows.insert(1, ["-" * width for width in widths])
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths)]
            yield f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()


SIZES = ("peak", "read", "written", "grown")


def verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


# ==== Steps ==================================================================


def steps(lab: Laboratory, table: Table) -> None:
    """What an image goes through, in that order, with everyone who can do it."""
    versus(lab, table, "first backup", FIRST, CP, 2.2)
    lab.sh("rm $STORE/copy")
    found = second(lab, table, "second backup, unchanged", SECOND, 1.0, 1.0)
    of_data = found["full"].cpu / (allocated(place("SOURCE")) / GiB)
    table.fact("second backup, unchanged: CPU per GiB of data", of_data, seconds, 1.0)
    grown = found["full"].grown or 0
    table.fact("second backup, unchanged: growth of the store", grown, in_mib, MiB)
    step = "restore to a new file, same file system"
    ours = lab.compare(step, RESTORE_SHARED)["backy"]
    table.fact(step, ours.wall, seconds, 0.2, figures=ours)
    scattered(lab, table, "second backup, 1 % scattered")
    versus(lab, table, "restore to a new file, other file system", RESTORE, CP, 1.0)
    versus(lab, table, f"{step}, scattered", RESTORE_SHARED, REFLINK, 1.5)
    step, target = "restore over a file, 1 % differs", place("OTHER") / "ours"
    versus(lab, table, step, RESTORE_OVER, "cmp", 1.0, lambda: change(target, 0.01))
    versus(lab, table, "restore to a pipe", RESTORE_PIPE, "cat", 1.0)
    if lab.is_root:
        with lab.device(place("SOURCE").stat().st_size) as os.environ["DEVICE"]:
            versus(lab, table, "restore to a block device", RESTORE_DEVICE, CONVERT, 1.2)
    else:
        table.add("restore to a block device", "skipped: needs root")
    versus(lab, table, "verify", VERIFY, "cat IMAGE", 1.3)


def versus(
    lab: Laboratory,
    table: Table,
    step: str,
    contenders: dict[str, Contender],
    peer: str,
    limit: float,
    each_round: Callable[[], object] = lambda: None,
) -> None:
    """A step with one yardstick, and with what the peers do instead."""
    found = lab.compare(step, contenders, each_round)
    for name in (peer, *(one for one in PEERS if one in contenders)):
        table.compared(step, found["backy"], name, found.get(name), limit if name == peer else 0)


def second(
    lab: Laboratory,
    table: Table,
    step: str,
    contenders: dict[str, Contender],
    full: float,
    written: float,
    each_round: Callable[[], object] = lambda: None,
) -> dict[str, Figures]:
    found = lab.compare(step, contenders, each_round)
    cats = ("full", "cat SOURCE PARENT", full), ("written", "cat SOURCE", written)
    for mode, cat, limit in cats:
        table.compared(f"{step}, verify: {mode}", found[mode], cat, found[cat], limit)
    for name in PEERS:
        table.compared(f"{step}, verify: full", found["full"], name, found.get(name))
    return found


def scattered(lab: Laboratory, table: Table, step: str) -> None:
    changed = 0

    def each_round() -> None:
        nonlocal changed
        changed = change(place("SOURCE"), 0.01)

    with ExitStack() as stack:
        contenders = SCATTERED
        if lab.can_have("btrfs"):
            size = 2 * place("SOURCE").stat().st_size + 2 * GiB
            stack.enter_context(lab.file_system("BTRFS", "btrfs", size))
            job = "backy -b $BTRFS/job"
            lab.sh(f"{job} init file $SOURCE && {job} backup daily")
            contenders = {**SCATTERED, **ON_BTRFS}
        found = second(lab, table, step, contenders, 1.2, 1.5, each_round)
    for name, kind in (("full", "XFS" if lab.is_root else "this file system"), ("btrfs", "btrfs")):
        title, peer = f"{step}: growth on {kind}", ("bytes changed", changed)
        if name in found:
            table.fact(title, found[name].grown or 0, in_mib, None, peer, 1.1)
            if name == "btrfs":
                by_hand = "written to a clone by hand", found["by hand"].grown or 0
                table.fact(title, found[name].grown or 0, in_mib, None, by_hand, 1.1)
        else:
            table.add(title, "skipped: needs root and mkfs.btrfs")


# ==== Promises ===============================================================
#
# Memory, start, and what a backup does to others and to itself.


def memory(lab: Laboratory, table: Table) -> None:
    """Images of any size with so much in them: the peak of all steps, the time of one."""
    data = min(GiB, place("SOURCE").stat().st_size // 4)
    job, huge, back = "backy -b $STORE/huge", place("STORE") / "huge.img", "$STORE/back"
    for size, name in ((GiB, "1 GiB"), (64 * GiB, "64 GiB"), (TiB, "1 TiB")):
        say(f"sparse image of {name}")
        with open(huge, "wb") as image:
            image.truncate(size)
            for number in range(data // MiB):
                image.seek(number // 16 * (size * 16 * MiB // data) + number % 16 * MiB)
                image.write(os.urandom(MiB))
        lab.sh(f"{job} init file {huge}")
        words = "backup daily", "backup daily", "verify", f"restore {back}"
        found = [lab.measure(f"{job} {one}") for one in words]
        peak = max(one.peak for one in found)
        table.fact(f"peak memory, image of {name}", peak, in_mib, 40 * MiB)
        if size == TiB:
            step = f"second backup, image of {name}"
            table.fact(step, found[1].wall, seconds, 10.0, figures=found[1])
        lab.sh(f"rm -r $STORE/huge {huge} {back}")


def start(lab: Laboratory, table: Table) -> None:
    """Commands that read no image, with 1,000 revisions."""
    small = make_image(place("STORE") / "small.img", PAGE, (os.urandom,))
    job = place("STORE") / "many"
    lab.sh(f"backy -b {job} init file {small} && backy -b {job} backup daily")
    name = os.readlink(job / "last")
    metadata = (job / f"{name}.rev").read_text()
    for number in range(999):
        alike = name[:-4] + f"{number:04d}".translate(str.maketrans("01", "ab"))
        os.link(job / name, job / alike)
        os.link(job / f"{name}.sums", job / f"{alike}.sums")
        copy = metadata.replace(name, alike)
        (job / f"{alike}.rev").write_text(re.sub(r"\d{4}(-\d\d-\d\d )", r"2020\1", copy))
    count = len(json.loads(lab.sh(f"backy -b {job} status --json"))["revisions"])
    if count != 1000:
        raise Failed(f"of 1,000 revisions backy knows {count}")
    for words, limit in (("find", 0.25), ("status", 0.25), ("--version", 0.1)):
        step = f"CPU of {words}" + ("" if words == "--version" else ", 1,000 revisions")
        found = lab.compare(step, {"backy": Contender(f"backy -b {job} {words}")})
        table.fact(step, found["backy"].cpu, seconds, limit, figures=found["backy"])


def two(lab: Laboratory, table: Table) -> None:
    """Two backups at once, and one after the other."""
    new, touch, runs = [], [], []
    for number in (1, 2):
        source, job = (f"{place('STORE')}/two-{number}{end}" for end in (".img", ""))
        make_image(Path(source), place("SOURCE").stat().st_size // 2)
        new.append(f"rm -rf {job} && backy -b {job} init file {source}")
        touch.append(f"touch {source}")
        runs.append(f"backy -b {job} backup daily")
    for step, prepare in (("first", new), ("unchanged second", touch)):
        contenders = {
            "in turn": Contender(" && ".join(runs), " && ".join(prepare)),
            "at once": Contender(f"{' & '.join(runs)} && wait $!", " && ".join(prepare)),
        }
        found = lab.compare(f"two {step} backups at once", contenders)
        peer = "one after the other", found["in turn"]
        table.compared(f"two {step} backups at once", found["at once"], *peer)
    lab.sh("rm -r $STORE/two-*")


def cache(lab: Laboratory, table: Table) -> None:
    """What a backup leaves of the page cache."""
    size = place("SOURCE").stat().st_size
    kept = make_image(place("STORE") / "kept.img", size // 4, (os.urandom,))
    passing = make_image(place("STORE") / "passing.img", size // 2, (os.urandom,))
    lab.sh(f"backy -b $STORE/passing init file {passing}")
    kept_shares, left = [], []
    for command, image in (
        ("backy -b $STORE/passing backup daily", place("STORE") / "passing" / "last"),
        (f"{COPY} {passing} $STORE/copy && sync", place("STORE") / "copy"),
    ):
        lab.cool()
        lab.sh(f"dd if={kept} of=/dev/null bs=1M && {command}")
        kept_shares.append(cached_share(kept))
        left.append(sum(cached_share(one) * size // 2 for one in (passing, image)))
    title = f"page cache: left of {in_mib(size // 4)} that were in it"
    table.fact(title, kept_shares[0], percent, None, ("cp", kept_shares[1]))
    title = f"page cache: source and image, of {in_mib(size // 2)} each, in it afterwards"
    table.fact(title, left[0], in_mib, None, ("cp", left[1]))
    lab.sh(f"rm -r {kept} {passing} $STORE/passing $STORE/copy")


def cached_share(path: Path) -> float:
    """How much of a file is in the page cache, from 256 probes."""
    size, found = path.stat().st_size, 0
    with open(path, "rb", buffering=0) as file:
        for number in range(256):
            with suppress(BlockingIOError):
                offset = size * number // 256
                found += os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
    return found / 256


def resume(lab: Laboratory, table: Table) -> None:
    """A first backup that is killed at 90 %, and what the next one reads."""
    size = min(256 * MiB, place("SOURCE").stat().st_size)
    cut = make_image(place("STORE") / "cut.img", size, (os.urandom,))
    lab.sh(f"backy -b $STORE/cut init file {cut}")
    lab.cool()
    words = ["backy", "-b", f"{place('STORE')}/cut", "backup", "daily"]
    process, done = subprocess.Popen(words, stderr=subprocess.DEVNULL), 0
    try:
        while process.poll() is None and done < 0.9 * size:
            with suppress(OSError, ValueError, IndexError):
                done = int(Path(f"/proc/{process.pid}/io").read_text().split()[1])
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    figures = lab.measure("backy -b $STORE/cut backup daily")
    metadata = (place("STORE") / "cut" / "last.rev").read_text()
    read, missing = int(re.search(r"bytes_read: (\d+)", metadata)[1]), max(0, size - done)
    step = f"killed at {done / size:.0%} of {in_mib(size)}: the next reads of the source"
    table.fact(step, read, in_mib, missing + size // 20, ("what was missing", missing))
    table.fact("the same: the next reads in all", figures.read, in_mib, figures=figures)


# ==== Network ================================================================
#
# The NBD server beside two others that serve the same file.  A run is short, and all
# servers take turns.  "Wall" is seconds for a copy, and for each read otherwise.


@dataclass(frozen=True)
class Served:
    """A server that runs: where, and which process."""

    uri: str
    pid: int
    place: str | int  # a Unix socket or a port

    def cpu(self) -> float:
        """Seconds that it has worked until now."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def connect(self) -> socket.socket:
        """A client that has opened the export, by structured replies."""
        if isinstance(self.place, int):
            client = socket.create_connection(("127.0.0.1", self.place))
        else:
            client = socket.socket(socket.AF_UNIX)
            client.connect(self.place)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 20, 0))
        client.recv(18, socket.MSG_WAITALL)
        client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 8, 0))
        client.recv(20, socket.MSG_WAITALL)
        client.sendall(struct.pack(">8sIIIH", b"IHAVEOPT", 7, 6, 0, 0))
        while True:
            kind, length = struct.unpack(">12xII", client.recv(20, socket.MSG_WAITALL))
            client.recv(length, socket.MSG_WAITALL)
            if kind == 1:
                return client


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def server(lab: Laboratory, name: str, job: Path, kind: str) -> Iterator[Served]:
    """Let `name` serve the last revision of `job` over a unix socket, tcp or tls."""
    where, port, image = (
        str(lab.top / f"{name}.socket"),
        free_port(),
        os.path.realpath(job / "last"),
    )
    is_unix, pki = kind == "unix", lab.top / "pki"
    words = {
        "backy": ["backy", "-b", str(job), "nbd-server", "--max-clients", "64"]
        + (["-U", where] if is_unix else ["-H", "127.0.0.1", "-p", str(port)])
        + (["--tls-cert", f"{pki}/server-cert.pem", "--tls-key", f"{pki}/server-key.pem"]
           if kind == "tls" else []),
        "nbdkit": ["nbdkit", "-f", "-r", *(["-U", where] if is_unix else ["-p", str(port)])]
        + ([f"--tls-certificates={pki}", "--tls=require"] if kind == "tls" else [])
        + (["-i", "127.0.0.1"] if not is_unix else []) + ["file", image],
        "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw"]
        + (["-k", where] if is_unix else ["-b", "127.0.0.1", "-p", str(port)])
        + (["--object", f"tls-creds-x509,id=t,endpoint=server,dir={pki},verify-peer=off",
            "--tls-creds", "t"] if kind == "tls" else []) + [image],
    }[name]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    uris = {
        "unix": f"nbd+unix:///?socket={where}",
        "tcp": f"nbd://127.0.0.1:{port}/",
        "tls": f"nbds://127.0.0.1:{port}/?tls-certificates={pki}&tls-verify-peer=false",
    }
    served = Served(uris[kind], process.pid, where if is_unix else port)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with suppress(OSError), (
                socket.socket(socket.AF_UNIX) if is_unix else socket.socket()
            ) as probe:
                probe.connect(where if is_unix else ("127.0.0.1", port))
                break
            time.sleep(0.05)
        yield served
    finally:
        process.terminate()
        process.wait()
        with suppress(OSError):
            os.unlink(where)


Run = Tuple[float, float]  # seconds on the wall, and of the server's CPU


def copy_all(lab: Laboratory, one: Served) -> Run:
    started, before = time.monotonic(), one.cpu()
    lab.sh(f"nbdcopy '{one.uri}' null:")
    return time.monotonic() - started, one.cpu() - before


def read_randomly(depth: int, pinned: bool = False, cold: bool = False) -> Callable:
    """A function that reads 4 KiB here and there for two seconds."""

    def measure(lab: Laboratory, one: Served) -> Run:
        if cold:
            lab.cool()
        words = f"--name=x --ioengine=nbd '--uri={one.uri}' --rw=randread --bs=4k --size=100%"
        words += f" --iodepth={depth} --runtime=2 --time_based --output-format=json"
        cores = "0" if pinned else f"0-{(os.cpu_count() or 1) - 1}"
        lab.sh(f"taskset -a -c -p {cores} {one.pid}")
        before = one.cpu()
        report = lab.sh(f"taskset -c {cores} fio {words}")
        (job,) = json.loads(report[report.index("{") :])["jobs"]
        count = max(1, job["read"]["total_ios"])
        return 1 / (job["read"]["iops"] or 1), (one.cpu() - before) / count

    return measure


def microseconds(value: float) -> str:
    return f"{value * 1e6:.1f} us"


# step, image, kind; measure, form; at most so many times nbdkit and qemu-nbd: wall, then CPU
NETWORK = (
    ("copy", "full", "unix", copy_all, seconds, (1 / 1.1, 1 / 2), (0.5, 0.3)),
    ("reads, depth 16", "full", "unix", read_randomly(16), microseconds, (1 / 1.5, 1 / 4), ()),
    ("reads, depth 64", "full", "unix", read_randomly(64), microseconds, (1 / 1.4, 1 / 4), ()),
    ("reads, depth 1, one core", "full", "unix", read_randomly(1, True), microseconds,
     (1 / 1.3, 1 / 1.6), ()),
    ("cold reads, depth 16", "full", "unix", read_randomly(16, cold=True), microseconds,
     (1.0, 0), ()),
    ("cold reads, depth 64", "full", "unix", read_randomly(64, cold=True), microseconds,
     (1.0, 0), ()),
    ("copy", "full", "tcp", copy_all, seconds, (1.0, 0), ()),
    ("reads, depth 64", "full", "tcp", read_randomly(64), microseconds, (1 / 1.5, 0), ()),
    ("copy of 16,000 extents", "holes", "unix", copy_all, seconds, (1 / 1.5, 1 / 1.5), ()),
    ("copy", "full", "tls", copy_all, seconds, (0, 0), (1.15, 0)),
)  # fmt: skip


def nbd(lab: Laboratory, table: Table) -> None:
    """What clients get, and what that costs the server."""
    missing = [one for one in ("nbdcopy", "fio", "nbdkit", "qemu-nbd") if not shutil.which(one)]
    if missing:
        table.add("nbd", f"skipped: no {', '.join(missing)}")
        return
    size = min(GiB, place("SOURCE").stat().st_size)
    jobs = {}
    for name, step in (("full", 64 * KiB), ("holes", 128 * KiB)):
        image = place("STORE") / f"nbd-{name}.img"
        with open(image, "wb") as file:
            file.truncate(size * step // (64 * KiB))
            for offset in range(0, size * step // (64 * KiB), step):
                os.pwrite(file.fileno(), os.urandom(64 * KiB), offset)
        jobs[name] = place("STORE") / f"nbd-{name}"
        lab.sh(f"backy -b {jobs[name]} init file {image} && backy -b {jobs[name]} backup daily")
    make_certificates(lab)
    for title, image, kind, measure, form, limits, cpu_limits in NETWORK:
        found = network_runs(lab, jobs[image], kind, measure)
        step = f"nbd, {kind}: {title}"
        for at, peer in enumerate(("nbdkit", "qemu-nbd")):
            ours, theirs = found["backy"], found[peer]
            limit = round(limits[at], 2)
            table.fact(step, ours[0], form, None, (peer, theirs[0]), limit)
            if cpu_limits:
                cpu = (f"{peer}", theirs[1])
                table.fact(
                    f"{step}: CPU of the server", ours[1], seconds, None, cpu, cpu_limits[at]
                )
    network_promises(lab, table, jobs["full"], jobs["holes"])
    lab.sh("rm -r $STORE/nbd-*")


def network_runs(lab: Laboratory, job: Path, kind: str, measure: Callable) -> dict[str, Run]:
    """The medians of all three servers, in turn; a first round warms up."""
    runs: dict[str, list[Run]] = {"backy": [], "nbdkit": [], "qemu-nbd": []}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server(lab, name, job, kind)) for name in runs}
        for number in range(2 * lab.runs + 1):
            for name, one in servers.items():
                run = measure(lab, one)
                runs[name] += [run] if number else []
        say(f"{kind}: {', '.join(f'{name} {found[-1]}' for name, found in runs.items())}")
    return {name: tuple(map(median, zip(*found))) for name, found in runs.items()}


def network_promises(lab: Laboratory, table: Table, full: Path, holes: Path) -> None:
    """To connect; clients that never read; what has changed in 16,000 places."""
    with server(lab, "backy", full, "unix") as one:
        times = []
        for _ in range(300):
            started = time.monotonic()
            with one.connect() as client:
                client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 0, 0, 512))
                client.recv(28 + 512, socket.MSG_WAITALL)
                times.append(time.monotonic() - started)
        table.fact("nbd, unix: connect, GO, read", median(times), microseconds, 0.0004)
        clients = [one.connect() for _ in range(2)]
        for client in clients:
            for number in range(64):
                client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, 0, 32 * MiB))
        time.sleep(1)
        status = Path(f"/proc/{one.pid}/status").read_text()
        for step, key in (("memory", "VmRSS"), ("peak memory, the start included", "VmHWM")):
            size = int(status.split(f"{key}:")[1].split()[0]) * KiB
            table.fact(f"nbd: clients that never read: {step}", size, in_mib, 32 * MiB)
        for client in clients:
            client.close()
    source = place("STORE") / "nbd-holes.img"
    with open(source, "r+b") as file:
        for offset in range(0, source.stat().st_size, 128 * KiB):
            os.pwrite(file.fileno(), os.urandom(PAGE), offset)
    lab.sh(f"backy -b {holes} backup daily")
    with server(lab, "backy", holes, "unix") as one:
        words = f"nbdinfo --map=x-backy:changed-since=1 '{one.uri}'"
        first, again = (lab.measure(words).wall for _ in range(2))
        table.fact("nbd: changed since, 16,000 extents, first", first, seconds, 0.15)
        table.fact("nbd: changed since, 16,000 extents, again", again, seconds)


def make_certificates(lab: Laboratory) -> None:
    """An authority, a server and a client, by the names that the others expect."""
    pki = lab.top / "pki"
    pki.mkdir()
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout"
    lab.sh(f"cd {pki}; {new} ca-key.pem -x509 -out ca-cert.pem -days 2 -subj /CN=ca")
    (pki / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        lab.sh(
            f"cd {pki}; {new} {name}-key.pem -out {name}.csr -subj /CN={name} && "
            f"openssl x509 -req -in {name}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial "
            f"-days 2 -extfile names -out {name}-cert.pem"
        )


# ==== Ageing =================================================================
#
# What many small changes do to an image that is cloned from day to day, and what
# helps: writing it anew, and sharing afterwards what was written twice.

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
PATTERNS = (("64 KiB runs", 64 * KiB, 2_000), ("4 KiB pages", 4 * KiB, 20_000))
DAYS = (
    *("file system", "changes", "rewritten above", "day", "extents", "clone ms", "read MiB/s"),
    *("space MiB", "backup s", "dedup s", "dedup gives MiB"),
)


def days(lab: Laboratory, table: Table, count: int, size: int) -> None:
    """Simulate so many days of 1 % changes in each way, and look at every tenth."""
    for kind in filter(lab.can_have, ("xfs", "btrfs")):
        for name, length, limit in PATTERNS:
            for above in (0, limit):
                with lab.file_system("PLACE", "xfs", 2 * size + GiB) as path:
                    with lab.file_system("AGED", kind, 30 * size + GiB) as store:
                        source = make_image(path / "source.img", size)
                        lab.sh(f"backy -b $AGED/job init file {source}")
                        config = f"type: file\nfilename: {source}\nrewrite-above: {above}\n"
                        (store / "job" / "config").write_text(config)
                        head = kind, name, above or "never"
                        age(lab, table, head, store / "job", source, length, count)


def age(
    lab: Laboratory, table: Table, head: tuple, job: Path, source: Path, length: int, count: int
) -> None:
    backy = f"backy -b {job}"
    for day in range(1, count + 1):
        change(source, 0.01, length)
        figures = lab.measure(f"{backy} backup daily{',weekly' if day % 7 == 1 else ''}")
        listing = json.loads(lab.sh(f"{backy} status --json"))["revisions"]
        weekly = [one["id"] for one in listing if "weekly" in one["tags"]][-4:]
        for one in listing[:-10]:
            if one["id"] not in weekly:
                lab.sh(f"{backy} forget --force -r {one['id']}")
        if day % 10 == 0 or day == count:
            say(f"{', '.join(map(str, head))}: day {day}")
            row = [*head, day, *look_at_newest(lab, job), f"{figures.wall:.2f}"]
            if day == count:
                before = lab.used(job)
                took = lab.measure(f"{backy} dedup")
                row += [f"{took.wall:.1f}", mib(before - lab.used(job))]
            table.add(*row)


def look_at_newest(lab: Laboratory, job: Path) -> list[str]:
    """Extents, time of a clone, speed of reading from the disk, and the space of all."""
    listing = json.loads(lab.sh(f"backy -b {job} status -v --json"))["revisions"]
    image, clone, times = job / "last", job.parent / "clone", []
    speed = allocated(image) / MiB / lab.measure(f"cat {image}").wall
    for _ in range(3):
        os.sync()
        with open(image, "rb") as origin, open(clone, "wb") as target:
            started = time.monotonic()
            with suppress(OSError):  # not root, and not such a file system
                fcntl.ioctl(target.fileno(), FICLONE, origin.fileno())
            times.append(time.monotonic() - started)
        clone.unlink()
    cloned, space = f"{median(times) * 1000:.1f}", mib(lab.used(job))
    return [str(listing[-1]["extents"]), cloned, f"{speed:.0f}", space]


def dedup(lab: Laboratory, table: Table, size: int) -> None:
    """Ten images made from one template, each with 5 % of its own, made to share the rest."""
    for kind in ("xfs", "btrfs"):
        step = f"dedup of 10 images of {in_mib(size)} from one template, {kind}"
        if not lab.can_have(kind):
            table.add(step, "skipped: needs root and mkfs.btrfs")
            continue
        with lab.file_system("PLACE", "xfs", 3 * size + GiB) as path:
            with lab.file_system("VMS", kind, 12 * size + GiB) as store:
                template, source = make_image(path / "template", size), path / "source"
                for number in range(10):
                    lab.sh(f"cp --sparse=always {template} {source}")
                    change(source, 0.05, 64 * KiB)
                    job = f"backy -b $VMS/{number}"
                    lab.sh(f"{job} init file {source} && {job} backup daily")
                say(step)
                before = lab.used(store)
                took = lab.measure("backy -b $VMS/0 dedup $VMS/[1-9]")
                table.fact(f"{step}: space", lab.used(store), in_mib, None, ("before", before))
                table.fact(f"{step}: time", took.wall, seconds, figures=took)
                table.fact(f"{step}: peak memory", took.peak, in_mib, 40 * MiB)


def ceph(lab: Laboratory, table: Table) -> None:
    """An image of 1 GiB on a cluster in memory, of which 1 % changes each time."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ceph_cluster import TOOLS, Cluster, Image

    step = "ceph: 1 GiB, 1 % changed"
    if not (lab.is_root and all(map(shutil.which, TOOLS))):
        table.add(step, "skipped: needs root, ceph-mon, ceph-osd and ceph-common")
        return
    cluster = Cluster()
    try:
        with lab.file_system("STORE", "xfs", 4 * GiB), lab.file_system("OTHER", "xfs", 8 * GiB):
            os.environ.update(CEPH_CONF=str(cluster.conf), JOB=f"{place('STORE')}/job")
            image = Image(cluster, "rbd/bench", GiB)
            for at in range(0, GiB, 32 * MiB):
                image.write((at, os.urandom(16 * MiB)))
            lab.sh("backy -b $JOB init ceph-rbd rbd/bench && backy -b $JOB backup daily")
            for kind in ("scattered", "clustered"):
                compare_ceph(lab, table, f"{step}, {kind}", image, kind)
    finally:
        cluster.close()


def compare_ceph(lab: Laboratory, table: Table, step: str, image: object, kind: str) -> None:
    length = PAGE if kind == "scattered" else MiB

    def each_round() -> None:
        places = random.sample(range(GiB // length), GiB // 100 // length)
        for name, changes in (("old", []), ("new", places)):
            image.write(*((at * length, os.urandom(length)) for at in changes))
            lab.sh(f"rbd snap rm --no-progress rbd/bench@{name} 2>&- || :")
            lab.sh(f"rbd snap create --no-progress rbd/bench@{name}")
        lab.sh("rm -f $OTHER/*; rbd export-diff --no-progress rbd/bench@old $OTHER/first")

    diff = "rbd export-diff --no-progress --from-snap old rbd/bench@new"
    merged = "rbd merge-diff --no-progress $OTHER/first $OTHER/diff $OTHER/merged"
    contenders = {
        "backy": backy("backup daily", store="STORE"),
        "rbd export-diff > /dev/null": Contender(f"{diff} - > /dev/null"),
        "rbd export": Contender("rbd export --no-progress rbd/bench@new $OTHER/whole && sync"),
        "rbd export-diff, merge-diff": Contender(f"{diff} $OTHER/diff && {merged} && sync"),
    }
    found = lab.compare(step, contenders, each_round)
    ours = found.pop("backy")
    for peer, theirs in found.items():
        table.compared(step, ours, peer, theirs)
    size = int(lab.sh(f"{diff} - | wc -c"))
    told = json.loads(lab.sh("backy -b $JOB status --json"))["revisions"][-1]
    table.fact(f"{step}: written", told["bytes_written"], in_mib, None, ("the diff", size), 1.5)


# ==== Command line ===========================================================

WITH_IMAGE = {one.__name__: one for one in (steps, memory, start, cache, two, resume, nbd)}
QUICK = ("steps", "memory", "start")
PARTS = (*WITH_IMAGE, "dedup", "ceph", "days")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure backy beside other programs.")
    parser.add_argument("--size", type=float, metavar="GIB", help="of the image (default: 4)")
    parser.add_argument("-n", dest="runs", type=int, metavar="N", help="runs (default: 3)")
    parser.add_argument("--quick", action="store_true", help="256 MiB, one run, the main parts")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--directory", metavar="DIR", help="where to make a temporary directory")
    parser.add_argument("--program", type=Path, default=ROOT / "dist" / "backy", metavar="FILE")
    parser.add_argument("--install", action="store_true", help="first install peers from Debian")
    parts = parser.add_argument_group("parts", "Without one of these: all.")
    for name in PARTS[:-1]:
        parts.add_argument(f"--{name}", action="store_true")
    parts.add_argument("--days", type=int, nargs="?", const=60, metavar="N", help="(default: 60)")
    args = parser.parse_args()
    size = args.size * GiB if args.size else 256 * MiB if args.quick else 4 * GiB
    args.bytes = int(size) // (64 * MiB) * 64 * MiB or 64 * MiB
    args.runs = args.runs or (1 if args.quick else 3)
    args.program = args.program.absolute()
    args.directory = args.directory or tempfile.gettempdir()
    args.parts = [one for one in PARTS if getattr(args, one)] or (QUICK if args.quick else PARTS)
    return args


def describe(args: argparse.Namespace) -> Iterator[str]:
    """Where and how it was measured."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    host = f"{os.cpu_count()} x {processor[1] if processor else os.uname().machine}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GiB
    load = f"load {os.getloadavg()[0]:.1f} before"
    yield f"{datetime.date.today()}, {host}, {memory:.0f} GiB of memory, {load}"
    version = subprocess.run([args.program, "--version"], capture_output=True, text=True).stdout
    yield f"{version.strip()}, Linux {os.uname().release}, image of {in_mib(args.bytes)}"
    yield f"medians of {args.runs} interleaved runs; pairs are ours / the peer's"
    if os.geteuid():
        yield "not root: warm cache, no file systems of its own, no block device"
    else:
        yield "cold cache; file systems on loop devices, with direct I/O where that is possible"


def measure_all(args: argparse.Namespace, lab: Laboratory, tables: list[Table]) -> None:
    """Add to the one table, and a table of days."""
    with ExitStack() as stack:
        if set(args.parts) & set(WITH_IMAGE):
            store = stack.enter_context(lab.file_system("STORE", "xfs", 8 * args.bytes + 2 * GiB))
            stack.enter_context(lab.file_system("OTHER", "xfs", 4 * args.bytes + GiB))
            say("making the image")
            source = make_image(store / "source.img", args.bytes)
            os.environ.update(SOURCE=str(source), JOB=f"{store}/job", IMAGE=f"{store}/job/last")
        for name, part in WITH_IMAGE.items():
            if name in args.parts:
                part(lab, tables[0])
    if "dedup" in args.parts:
        dedup(lab, tables[0], min(512 * MiB, args.bytes))
    if "ceph" in args.parts:
        ceph(lab, tables[0])
    if "days" in args.parts:
        tables.append(Table(DAYS))
        days(lab, tables[1], args.days or 60, min(512 * MiB, args.bytes))


def stop(number: int, _: object) -> None:
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    if args.install:
        packages = ["qemu-utils", "borgbackup", "restic", "ceph-mon", "ceph-osd", "ceph-common"]
        packages += ["nbdkit", "libnbd-bin", "fio"]
        subprocess.run(["apt-get", "install", "--yes", *packages], stdout=sys.stderr, check=True)
    newest = max((ROOT / name).stat().st_mtime for name in ("backy.py", "tools/build.py"))
    if not args.program.exists() or args.program.stat().st_mtime < newest:
        subprocess.run([sys.executable, ROOT / "tools" / "build.py", args.program], check=True)
    heading, tables, status = list(describe(args)), [Table()], 0
    try:
        needed = 12 * args.bytes + 4 * GiB
        if shutil.disk_usage(args.directory).free < needed:
            raise Failed(f"{args.directory}: needs {in_mib(needed)} of free space")
        with tempfile.TemporaryDirectory(prefix="backy-bench-", dir=args.directory) as top:
            measure_all(args, Laboratory(args, top), tables)
    except (Failed, OSError) as e:
        say(str(e))
        status = 1
    except SystemExit as e:  # stopped: what was measured until now is still worth printing
        status = e.code
    print("\n".join(heading))
    for table in (one for one in tables if one.rows):
        print("", *table.lines(args.markdown), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
