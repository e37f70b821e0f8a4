# SPDX-License-Identifier: GPL-3.0-or-later
"""Break backy at any call it makes, then judge what is left.

The seam stands between backy and its `os` and `fcntl`: it counts the calls, and
at the N-th it kills the process, fails, falls short, lies or flips a bit.  Every
run is a forked child, so nothing of that reaches the tests.

The oracle is a set of functions that look at a job's directory and yield what
is wrong, each with the number of the invariant that it checks:

    I1   a complete revision equals its source, and its digests are right
    I2   no earlier complete revision is changed or gone
    I4   `last` names a complete revision or does not exist
    I5   the next run succeeds unaided and gives the newest revision
    I6   after that run nothing is left over
    I8   status 0 if, and only if, there is a new complete revision
    I11  what failed to reach the medium is not flushed again
    I16  what we did not make is not touched
    I26  a failure is told in a line, never in a traceback

BACKY_TORTURE=N in the environment asks for N times as many points.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator

import backy

TORTURE = int(os.environ.get("BACKY_TORTURE", "1"))
PATIENCE = 60  # seconds until a run counts as hanging
KiB, MiB = 1024, 1024 * 1024

# -- the seam -----------------------------------------------------------------

CALLS = {
    os: "close fchmod fdatasync fstat fsync ftruncate link listdir lseek makedirs mkdir open "
    "posix_fadvise pread preadv pwrite read readlink rename stat symlink unlink write",
    fcntl: "fcntl flock ioctl lockf",
}
DATA_READ = {"read", "pread", "preadv"}
DATA_WRITTEN = {"write", "pwrite"}
CHANGES = {"fchmod", "ftruncate", "link", "makedirs", "mkdir", "pwrite", "rename", "symlink"}
CHANGES |= {"unlink"}
FLUSHES = {"fsync", "fdatasync"}


@dataclass
class Call:
    """One call: its number, counted from 1, its name and what it is about."""

    number: int
    name: str
    subject: str
    flags: object = None  # of an open, the request of an ioctl
    error: str = ""
    args: tuple = ()
    function: Callable = None

    def run(self, *args: object) -> object:
        return self.function(*(args or self.args))

    def __str__(self) -> str:
        return f"call {self.number}, {self.name} {self.subject}"

    @property
    def changes(self) -> bool:
        """Whether the medium, or what we may rely on, is another one after this call."""
        if self.name == "open":
            return bool(self.flags & os.O_CREAT)
        if self.name == "ioctl":
            return self.flags in (backy.FICLONE, backy.FS_IOC_UNRESVSP64)
        return self.name in CHANGES | FLUSHES


@dataclass
class Plan:
    """What happens at call `at`; `sticky`: and at every call after it."""

    at: int
    fault: Callable[[Call], object]
    sticky: bool = False


class Seam:
    """Counts the calls of backy, of all its threads, and carries out a plan."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan, self.trace, self.lock = plan, [], threading.Lock()

    def install(self) -> None:
        """Give backy other modules; for good, so in a child only."""
        backy.os, backy.fcntl = Module(self, os), Module(self, fcntl)

    def call(self, name: str, function: Callable, args: tuple) -> object:
        with self.lock:
            flags = args[1] if name in ("open", "ioctl") else None
            call = Call(len(self.trace) + 1, name, subject(args), flags, "", args, function)
            self.trace.append(call)
        plan = self.plan
        try:
            if plan and (call.number == plan.at or (plan.sticky and call.number > plan.at)):
                return plan.fault(call)
            return call.run()
        except BaseException as e:
            call.error = type(e).__name__
            raise


class Module:
    """A module of which some functions go through the seam."""

    def __init__(self, seam: Seam, module: object) -> None:
        self.seam, self.module, self.names = seam, module, CALLS[module].split()

    def __getattr__(self, name: str) -> object:
        value = getattr(self.module, name)
        if name not in self.names:
            return value

        def through_seam(*args: object, **options: object) -> object:
            return self.seam.call(name, lambda *some: value(*some, **options), args)

        return through_seam


def subject(args: tuple) -> str:
    """The name of the file that a call is about, for people and for comparing."""
    first = args[0] if args else ""
    with contextlib.suppress(OSError):
        if isinstance(first, int):
            return os.path.basename(os.readlink(f"/proc/self/fd/{first}"))
    return str(first)


# -- faults -------------------------------------------------------------------


def kill(call: Call) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(call: Call) -> object:
    os.kill(os.getpid(), signal.SIGTERM)
    return call.run()


def out_of_memory(call: Call) -> None:
    raise MemoryError


def fail(code: int) -> Callable[[Call], object]:
    """The call fails with `code`, if it is one that can; a close has closed all the same."""

    def fault(call: Call) -> object:
        if not can_fail(call, code):
            return call.run()
        if call.name == "close":
            call.run()
        raise OSError(code, os.strerror(code))

    fault.__name__ = errno.errorcode[code]
    return fault


def can_fail(call: Call, code: int) -> bool:
    if call.name == "write":  # to the terminal
        return False
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return call.changes
    if code in (errno.EMFILE, errno.ENFILE):
        return call.name in ("open", "listdir")
    if code == errno.EINTR:  # Python itself repeats all others
        return call.name == "close"
    return True


def fall_short(call: Call) -> object:
    """Read or write half of what was asked for."""
    if call.name in DATA_WRITTEN:
        fd, data, *rest = call.args
        return call.run(fd, data[: max(1, len(data) // 2)], *rest)
    if call.name == "preadv":  # all the same a whole one: O_DIRECT has a word to say
        return -(-call.run() // 2)
    result = call.run()
    return result[: -(-len(result) // 2)]


def lie(call: Call) -> object:
    """Say that it is done."""
    return len(call.args[1]) if call.name in DATA_WRITTEN else 0


def flip(call: Call) -> object:
    """Change a bit of what is read."""
    result = call.run()
    if call.name == "preadv":
        if result:
            call.args[1][0][result // 2] ^= 4
        return result
    data = bytearray(result)
    if data:
        data[len(data) // 2] ^= 4
    return bytes(data)


# -- runs ---------------------------------------------------------------------


@dataclass
class Run:
    """How a run ended: its exit status, negative for a signal, what it said, what it called."""

    status: int
    said: str
    trace: list[Call] = field(default_factory=list)


def run(*words: object, plan: Plan | None = None, mutate: Callable = None) -> Run:
    """Run backy in a child with a plan; `mutate` may first change the child's backy."""
    said, traced = os.memfd_create("said"), os.memfd_create("traced")
    child = os.fork()
    if not child:
        status = 70
        try:
            signal.alarm(PATIENCE)
            for number in (1, 2):
                os.dup2(said, number)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            if mutate:
                mutate()
            seam = Seam(plan)
            seam.install()
            try:
                status = backy.main([str(word) for word in words])
            finally:
                for call in seam.trace:
                    call.function, call.args = None, ()
                os.write(traced, pickle.dumps(seam.trace))
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    trace = take(traced)
    return Run(status, take(said).decode(errors="replace"), pickle.loads(trace) if trace else [])


def take(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()
