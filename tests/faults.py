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
import time
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
    function: Callable | None = None

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
    if call.name in DATA_WRITTEN:
        return len(call.args[1])
    return call.args[2] if call.name == "ioctl" else None


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


def run(*words: object, plan: Plan | None = None, mutate: Callable | None = None) -> Run:
    """Run backy in a child with a plan; `mutate` may first change the child's backy."""
    said, traced = os.memfd_create("said"), os.memfd_create("traced")
    child = os.fork()
    if not child:
        status = 70
        try:
            signal.alarm(PATIENCE)
            sys.settrace(None)  # no coverage; it would never be saved
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


# -- benches ------------------------------------------------------------------

PAGE, BLOCK = 4 * KiB, 64 * KiB
OWN = {"config", ".lock", "last", "last.rev"}


def contents(size: int = 200 * KiB + 123) -> list[bytes]:
    """An image at three moments: noise with a hole; pages changed; grown, with pages zeroed."""
    one = bytearray(random.Random(size).getrandbits(8 * size).to_bytes(size, "little"))
    one[80 * KiB : 120 * KiB] = bytes(40 * KiB)
    two = bytearray(one)
    for page in (2, 22, size // PAGE):
        two[page * PAGE : page * PAGE + 99] = b"two" * 33
    three = bytearray(two)
    three[5 * PAGE : 7 * PAGE] = bytes(2 * PAGE)
    for page in (2, 3, 25):
        three[page * PAGE + 7 : page * PAGE + 106] = b"3rd" * 33
    return [bytes(one), bytes(two), bytes(three + b"grown" * 900)]


class Bench:
    """A job's directory as it is before each point, and what is known of it."""

    def __init__(self, top: Path, *images: bytes, words: Iterable[str] = ("backup", "daily")):
        """Back up all but the last of `images`, which is what the source then holds."""
        self.top, self.source, self.base = top, top / "source", top / "base"
        self.words = tuple(words)
        self.mayfly: set[str] = set()  # the revisions that the command may remove
        self.rewritten: set[str] = set()  # and those of which it may rewrite the metadata
        self.healthy: dict[str, bytes] = {}  # what a damaged file may be healed to
        (top / "outside").write_bytes(b"not ours\n")
        self.put(images[0])
        assert run("-b", self.base, "init", "file", self.source).status == 0
        self.plant()
        for image in images[:-1]:
            self.put(image)
            done = run("-b", self.base, "backup", "daily")
            assert done.status == 0, done.said
        self.put(images[-1])
        self.remember()

    def put(self, image: bytes) -> None:
        """Let the source hold `image`, since long ago."""
        self.image = image
        self.source.write_bytes(image)
        os.utime(self.source, (1e9, 1e9))

    def plant(self) -> None:
        """Put things into the directory that are not ours, though they may look so."""
        (self.base / "disk.img").write_bytes(b"not ours")
        (self.base / "notes.del").write_bytes(b"not ours")
        (self.base / ".backy-tmp-mine").write_bytes(b"not ours")
        (self.base / "link").symlink_to("../outside")

    def remember(self) -> None:
        """What is in the directory now is what must stay."""
        self.known = files(self.base)
        self.ids = [revision.id for revision in complete(self.base)]
        ours = {f"{one}{ending}" for one in self.ids for ending in ("", ".rev", ".sums")}
        self.foreign = set(self.known) - ours - OWN

    @contextlib.contextmanager
    def job(self) -> Iterator[Path]:
        """A clone of the directory, for one point."""
        place = Path(tempfile.mkdtemp(prefix="point-", dir=self.top))
        try:
            yield clone_directory(self.base, place / "job")
        finally:
            shutil.rmtree(place)

    def run(self, job: Path, plan: Plan | None = None, mutate: Callable | None = None) -> Run:
        words = [word.format(target=job.parent / "target") for word in self.words]
        return run("-b", job, *words, plan=plan, mutate=mutate)

    def trace(self) -> list[Call]:
        """The calls of the command when all goes well, and quickly: a slow run makes more."""
        traces = []
        for _ in range(2):
            with self.job() as job:
                done = self.run(job)
                assert done.status == 0, done.said
                traces.append(done.trace)
        return min(traces, key=len)


def first(top: Path) -> Bench:
    """The first backup of all."""
    return Bench(top, contents()[0])


def second(top: Path) -> Bench:
    """A third backup: two revisions are there, the source has changed and grown."""
    return Bench(top, *contents())


def threaded(top: Path) -> Bench:
    """So large that several threads work on it."""
    return Bench(top, *contents(12 * MiB + 123))


def interrupted_before(top: Path) -> Bench:
    """An earlier backup was killed when its image was written and not yet flushed."""
    bench = second(top)
    flush = max(one.number for one in bench.trace() if one.name == "fsync" and is_new(one, bench))
    assert run("-b", bench.base, *bench.words, plan=Plan(flush, kill)).status < 0
    return bench


def is_new(call: Call, bench: Bench) -> bool:
    """Whether the call is about an image that is just being made."""
    return len(call.subject) == 22 and call.subject not in bench.ids


def forgetting(top: Path) -> Bench:
    """The newest of three revisions is to be deleted, so `last` must turn away from it."""
    one, two, three = contents()
    bench = Bench(top, one, two, three, three, words=("forget", "-r", "0", "--force"))
    bench.mayfly = {bench.ids[-1]}
    return bench


def clone_directory(base: Path, place: Path) -> Path:
    place.mkdir(mode=0o700)
    for entry in os.scandir(base):
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), place / entry.name)
            continue
        with open(entry.path, "rb") as old, open(place / entry.name, "wb") as new:
            try:
                fcntl.ioctl(new.fileno(), backy.FICLONE, old.fileno())
            except OSError:
                shutil.copyfileobj(old, new)
            os.fchmod(new.fileno(), entry.stat().st_mode & 0o777)
    return place


def files(job: Path) -> dict[str, object]:
    """All names in the directory with their bytes, or where the links point to."""
    found = {}
    for name in os.listdir(job):
        path = job / name
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return found


def complete(job: Path) -> list[backy.Revision]:
    """The complete revisions, oldest first, by a view of our own on the directory."""
    found = []
    for name in os.listdir(job):
        if name.endswith(".rev") and not (job / name).is_symlink():
            with contextlib.suppress(ValueError):
                found.append(backy.decode_revision((job / name).read_bytes(), name[:-4]))
    return sorted((one for one in found if one.is_complete), key=lambda one: one.clock)


# -- the oracle ---------------------------------------------------------------


def expected_sums(image: bytes) -> bytes:
    """What an image's `.sums` must be, to the byte."""
    header = struct.pack("<8sI16sIQ24x", b"backysum", 1, b"sha256", BLOCK, len(image))
    blocks = (image[at : at + BLOCK] for at in range(0, len(image), BLOCK))
    zeros = bytes(BLOCK)
    digest = (
        bytes(32) if zeros.startswith(one) else hashlib.sha256(one).digest() for one in blocks
    )
    return header + b"".join(digest)


def earlier_are_intact(bench: Bench, job: Path) -> Iterator[str]:
    """I2, I16: whatever was complete, or not ours, is as it was."""
    for name, data in bench.known.items():
        owner = name.partition(".")[0]
        if name in OWN or (owner in bench.mayfly and not (job / f"{owner}.rev").exists()):
            continue
        invariant = "I16" if name in bench.foreign else "I2"
        try:
            now = os.readlink(job / name) if isinstance(data, str) else (job / name).read_bytes()
        except OSError as e:
            yield f"{invariant}: {name}: {e.strerror}"
            continue
        if now == data or now == bench.healthy.get(name):
            continue
        if not (name.endswith(".rev") and owner in bench.rewritten and says_the_same(now, data)):
            yield f"{invariant}: {name} has changed"


def says_the_same(one: bytes, other: bytes) -> bool:
    """Whether two `.rev` files differ only in what may become known of a revision."""
    keys = ("timestamp", "clock", "tags", "parent", "duration", "bytes_written", "size", "digest")
    revisions = [backy.decode_revision(data, rev_name(data)) for data in (one, other)]
    return all(len({getattr(revision, key) for revision in revisions}) == 1 for key in keys)


def rev_name(data: bytes) -> str:
    return next(line[6:] for line in data.decode().splitlines() if line.startswith("uuid: "))


def complete_are_right(bench: Bench, job: Path, image: bytes | None = None) -> Iterator[str]:
    """I1: what calls itself complete is what the source held, and its digests agree."""
    image = bench.image if image is None else image
    for revision in complete(job):
        if revision.id in bench.ids:
            continue
        try:
            if (job / revision.id).read_bytes() != image:
                yield f"I1: {revision.id} is complete and not what the source holds"
                continue
            sums = (job / f"{revision.id}.sums").read_bytes()
        except OSError as e:
            yield f"I1: {revision.id} is complete: {e}"
            continue
        if sums != expected_sums(image) or hashlib.sha256(sums).hexdigest() != revision.digest:
            yield f"I1: the digests of {revision.id} are not those of its image"


def last_is_complete(bench: Bench, job: Path) -> Iterator[str]:
    """I4: for both links."""
    ids = [revision.id for revision in complete(job)]
    for name, targets in (("last", ids), ("last.rev", [f"{one}.rev" for one in ids])):
        if os.path.lexists(job / name):
            target = os.readlink(job / name)
            if target not in targets or not (job / target).exists():
                yield f"I4: {name} names {target}, which is not complete"


def left_over(bench: Bench, job: Path) -> list[str]:
    """All but whole revisions, the config, the lock, `last`, and what was not ours."""
    ours = {f"{one.id}{end}" for one in complete(job) for end in ("", ".rev", ".sums")}
    return sorted(set(os.listdir(job)) - ours - OWN - bench.foreign)


def nothing_is_left_over(bench: Bench, job: Path) -> Iterator[str]:
    """I6"""
    left = left_over(bench, job)
    if left:
        yield f"I6: {', '.join(left)} left over"


def status_is_true(bench: Bench, job: Path, done: Run) -> Iterator[str]:
    """I8: exit status 0 and a new complete revision go together."""
    new = [revision.id for revision in complete(job) if revision.id not in bench.ids]
    if bench.words[0] == "backup" and (done.status == 0) != (len(new) == 1):
        yield f"I8: status {done.status} and {len(new)} new complete revisions"


def failure_is_told(done: Run) -> Iterator[str]:
    """I26: in a line of ours."""
    lines = [line for line in done.said.splitlines() if line.startswith("backy: ")]
    if "Traceback" in done.said or done.status not in (0, 1) or (done.status and not lines):
        yield f"I26: status {done.status}, {done.said.strip()[-300:]!r}"


def flushed_once(done: Run) -> Iterator[str]:
    """I11: a file whose flush failed is not flushed a second time."""
    lost = set()
    for call in done.trace:
        if call.name in FLUSHES:
            if call.subject in lost:
                yield f"I11: {call} although the one before had failed"
            if call.error and call.subject != "job":  # a directory is, for another change
                lost.add(call.subject)


def next_run_succeeds(bench: Bench, job: Path) -> Iterator[str]:
    """I5, I6: without anyone's help."""
    done = run("-b", job, "backup", "daily")
    if done.status:
        yield f"I5: the next run: status {done.status}: {done.said.strip()[-300:]!r}"
        return
    newest = complete(job)[-1]
    if newest.id in bench.ids or os.readlink(job / "last") != newest.id:
        yield f"I5: after the next run the newest is {newest.id}, last {os.readlink(job / 'last')}"
    yield from lasting(bench, job)
    yield from nothing_is_left_over(bench, job)


def lasting(bench: Bench, job: Path) -> Iterator[str]:
    """What holds at every moment, whatever happened: I1, I2, I4, I16."""
    yield from earlier_are_intact(bench, job)
    yield from complete_are_right(bench, job)
    yield from last_is_complete(bench, job)


def after_death(bench: Bench, job: Path, done: Run) -> Iterator[str]:
    """After a run that could not do anything any more."""
    yield from lasting(bench, job)
    yield from next_run_succeeds(bench, job)


def after_failure(bench: Bench, job: Path, done: Run) -> Iterator[str]:
    """After a run that met one fault: it has coped, or said so and cleared up."""
    yield from failure_is_told(done)
    yield from flushed_once(done)
    yield from status_is_true(bench, job, done)
    if done.status:  # after a warning the next run may have something to clear up
        yield from nothing_is_left_over(bench, job)
    yield from after_death(bench, job, done)


# -- sweeps -------------------------------------------------------------------

FIGURES: list[tuple[str, int, int, float]] = []  # test, points, violations, seconds


def points_of(trace: list[Call], wanted: Callable[[Call], bool] = lambda call: True) -> list[int]:
    """The numbers of the calls to try.

    Not those before the first file is opened, which look at the standard streams;
    of a row of equal ones the first two and the last.
    """
    what = [(call.name, call.subject) for call in trace]
    begun = next(at for at, call in enumerate(trace) if call.name == "open")
    return [
        call.number
        for at, call in enumerate(trace)
        if at >= begun and wanted(call) and what[max(0, at - 2) : at + 2] != [what[at]] * 4
    ]


def sample(points: list[int], number: int) -> list[int]:
    """So many of them, times BACKY_TORTURE, evenly spread and the same each time."""
    number = min(len(points), number * TORTURE)
    return [points[len(points) * index // number] for index in range(number)]


def spread(work: Callable[[int], Iterable[str]], points: list[int]) -> list[str]:
    """All that `work` yields for the points, with a process for each half of them."""
    children, results = [], []
    for half in range(2):
        result = os.memfd_create("result")
        child = os.fork()
        if not child:
            found: list[str] = []
            try:
                for point in points[half::2]:
                    found.extend(work(point))
            except BaseException:
                found.append(traceback.format_exc())
            finally:
                os.write(result, pickle.dumps(found))
                os._exit(0)
        children.append((child, result))
    for child, result in children:
        os.waitpid(child, 0)
        results += pickle.loads(take(result))
    return results


Judge = Callable[[Bench, Path, Run], Iterable[str]]


def found(
    bench: Bench,
    fault: Callable[[Call], object],
    points: list[int],
    judge: Judge,
    sticky: bool = False,
    mutate: Callable | None = None,
) -> list[str]:
    """Run the bench's command once for each point, with the fault there, and judge it."""
    trace = bench.trace()

    def work(point: int) -> Iterator[str]:
        with bench.job() as job:
            done = bench.run(job, Plan(point, fault, sticky), mutate)
            where = trace[point - 1] if point <= len(trace) else "the end"
            problems = list(judge(bench, job, done))
            if done.status == -signal.SIGALRM:
                problems.append("I26: it hangs")
            # a quicker run may have come to its end before
            if fault is kill and done.status != -signal.SIGKILL and point <= len(done.trace):
                problems.append(f"it was not killed there, status {done.status}")
            for problem in problems:
                yield f"{fault.__name__}{' from' if sticky else ' at'} {where}: {problem}"

    return spread(work, points)


def sweep(
    bench: Bench,
    fault: Callable[[Call], object],
    points: list[int],
    judge: Judge,
    sticky: bool = False,
) -> None:
    """Fail the test if anything is found at one of the points."""
    started = time.monotonic()
    tell(len(points), found(bench, fault, points, judge, sticky), started)


def tell(points: int, violations: list[str], started: float) -> None:
    """Keep the figures for the end, and fail the test if there were violations."""
    name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    seconds = time.monotonic() - started
    FIGURES.append((name, points, len(violations), seconds))
    assert points
    more = f"\n... and {len(violations) - 30} more" if len(violations) > 30 else ""
    assert not violations, "\n".join(violations[:30]) + more
