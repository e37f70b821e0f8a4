# SPDX-License-Identifier: GPL-3.0-or-later
"""What `rbd export-diff` prints is refused unless it is all that it must be."""

from __future__ import annotations

import json
import os
import random
import struct
import sys

import pytest
from conftest import MiB, noise

import backy

SIZE = 3 * MiB + 1000
OLD, NEW = "backy-one", "backy-two"


class Canned:
    """Stands for the program behind the pipe: some bytes, then the end and its status."""

    name = "rbd export-diff"

    def __init__(self, data: bytes, failure: str = "") -> None:
        self.data, self.at, self.failure = data, 0, failure

    def read_whole(self, view: memoryview) -> None:
        piece = self.data[self.at : self.at + len(view)]
        self.at += len(piece)
        if len(piece) < len(view):
            raise EOFError
        view[:] = piece

    def finish(self) -> None:
        if self.failure:
            raise backy.ProgramFailed(self.failure, 2)
        if self.at < len(self.data):
            raise backy.ProgramFailed(f"{self.name}: there is more than its end")


def name_record(tag: bytes, name: str) -> bytes:
    return tag + struct.pack("<I", len(name)) + name.encode()


def head(older: str = OLD, newer: str = NEW, size: int = SIZE) -> list[bytes]:
    sizes = b"s" + struct.pack("<Q", size)
    return [b"rbd diff v1\n", name_record(b"f", older), name_record(b"t", newer), sizes]


def w(offset: int, data: bytes) -> bytes:
    return b"w" + struct.pack("<QQ", offset, len(data)) + data


def z(offset: int, length: int) -> bytes:
    return b"z" + struct.pack("<QQ", offset, length)


def apply(stream: bytes, old: bytes = bytes(SIZE), failure: str = "") -> bytes:
    """The image that a stream makes of `old`, read in units as a backup does."""
    changes = backy.DiffStream(Canned(stream, failure), SIZE, OLD, NEW)
    image, view = bytearray(old), memoryview(bytearray(backy.UNIT))
    for offset, length in backy.units(SIZE, changes.extents()):
        for start, end in changes.read(view, offset, length):
            image[offset + start : offset + end] = view[start:end]
    changes.finish()
    return bytes(image)


def joined(*records: bytes) -> bytes:
    return b"".join((*head(), *records))


def test_a_diff_is_laid_over_the_old_image():
    old, new = noise(SIZE, 1), bytearray(noise(SIZE, 1))
    new[5:7], new[MiB - 10 : MiB + 90] = b"ab", noise(100, 2)
    new[2 * MiB : SIZE] = bytes(SIZE - 2 * MiB)
    records = (w(5, b"ab"), w(MiB - 10, noise(100, 2)), z(2 * MiB, SIZE - 2 * MiB), b"e")
    assert apply(joined(*records), old) == new


def test_an_empty_diff_is_one_too():
    assert apply(joined(b"e")) == bytes(SIZE)


def test_the_head_may_be_in_any_order():
    first, *rest = head()
    assert apply(b"".join((first, *reversed(rest), b"e"))) == bytes(SIZE)


def without(number: int) -> bytes:
    records = head()
    del records[number]
    return b"".join((*records, b"e"))


REFUSED = {
    "nothing": b"",
    "another header": joined(b"e").replace(b"v1", b"v2"),
    "a header cut short": b"rbd dif",
    "unknown record": joined(b"x", b"e"),
    "unknown record behind": joined(w(0, b"a"), b"?", b"e"),
    "no from": without(1),
    "no to": without(2),
    "no size": without(3),
    "from twice": joined(name_record(b"f", OLD), b"e"),
    "another from": b"".join((*head(older="backy-other"), b"e")),
    "another to": b"".join((*head(newer="backy-other"), b"e")),
    "another size": b"".join((*head(size=SIZE - 1), b"e")),
    "size behind an extent": joined(w(0, b"a"), b"s" + struct.pack("<Q", SIZE), b"e"),
    "a name too long": b"rbd diff v1\nf" + struct.pack("<I", 1 << 31),
    "a name cut short": b"rbd diff v1\nf" + struct.pack("<I", 9) + b"back",
    "out of order": joined(w(5000, b"ab"), w(0, b"cd"), b"e"),
    "overlapping": joined(w(0, b"abcd"), w(3, b"ef"), b"e"),
    "overlapping zeros": joined(z(0, MiB), w(MiB - 1, b"ef"), b"e"),
    "twice": joined(w(7, b"a"), w(7, b"a"), b"e"),
    "beyond the size": joined(w(SIZE - 1, b"ab"), b"e"),
    "zeros beyond the size": joined(z(SIZE, 1), b"e"),
    "huge": joined(z(0, (1 << 64) - 1), b"e"),
    "wrapping around": joined(z((1 << 64) - 1, 2), b"e"),
    "no end": joined(w(0, b"abc")),
    "cut in its bytes": joined(w(0, b"abc"))[:-1],
    "cut in a record": joined(z(0, 5))[:-3],
    "cut behind the head": joined(),
    "more than its end": joined(b"e", b"e"),
}


@pytest.mark.parametrize("stream", REFUSED.values(), ids=REFUSED)
def test_a_diff_is_refused_with(stream):
    with pytest.raises(backy.BackyError):
        apply(stream)


@pytest.mark.parametrize("records", [(b"e",), (w(0, b"a"), b"e"), (), (w(0, b"a"),)])
def test_a_diff_counts_only_with_status_0_and_the_program_has_the_word(records):
    with pytest.raises(backy.ProgramFailed, match="no such snapshot"):
        apply(joined(*records), failure="rbd: no such snapshot (exit status 2)")


def test_a_diff_may_be_cut_off_anywhere():
    stream = joined(w(5, b"ab"), z(4096, 100), w(MiB, b"words"), b"e")
    for end in range(len(stream)):
        with pytest.raises(backy.BackyError):
            apply(stream[:end])
    apply(stream)


def test_records_of_any_length_need_little_memory():
    """1 TiB of zeros, and what is in the pipe is taken a unit at a time."""
    size = 1 << 40
    stream = b"".join((*head(size=size), z(0, size), b"e"))
    changes = backy.DiffStream(Canned(stream), size, OLD, NEW)
    view = memoryview(bytearray(backy.UNIT))
    for number, (offset, length) in enumerate(backy.units(size, changes.extents())):
        assert changes.read(view, offset, length) == [(0, backy.UNIT)]
        if number == 1000:
            break


SOME_OR_MANY = [5_000, pytest.param(1_000_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", SOME_OR_MANY)
def test_no_input_is_taken_for_a_diff_that_is_none(count):
    """Mutated streams either are refused in a line, or say what an independent reader says."""
    rng = random.Random(int(os.environ.get("BACKY_SEED", "5")))
    good = joined(w(5, b"ab"), z(4096, 100), w(MiB, noise(50, 3)), z(SIZE - 4, 4), b"e")
    view = memoryview(bytearray(backy.UNIT))
    taken = 0
    for _ in range(count):
        stream = mutate(rng, good)
        changes = backy.DiffStream(Canned(stream), SIZE, OLD, NEW)
        seen = []
        try:
            for offset, length in backy.units(SIZE, changes.extents()):
                covered = changes.read(view, offset, length)
                seen += [(offset + start, bytes(view[start:end])) for start, end in covered]
            changes.finish()
        except backy.BackyError as e:
            assert "\n" not in str(e) and len(str(e)) < 500
            continue
        taken += 1
        assert seen == read_independently(stream)
    assert taken > count // 1000


def mutate(rng: random.Random, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice((1, 1, 8, 17, 40))]
        elif kind == 2:
            data[at:at] = rng.choice((b"w", b"z", b"e", b"s", bytes(8), b"\xff" * 8, z(at, 3)))
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, SIZE, SIZE - 1, 1 << 63, 4096)))
        elif kind == 4:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.randrange(40)]
        else:
            del data[at:]
    return bytes(data)


def read_independently(stream: bytes) -> list[tuple[int, bytes]]:
    """What a stream says, cut into units as a backup reads it."""
    assert stream.startswith(b"rbd diff v1\n") and stream.endswith(b"e")
    at, seen = len(b"rbd diff v1\n"), []
    while stream[at : at + 1] in (b"f", b"t", b"s"):
        is_size = stream[at : at + 1] == b"s"
        at += 9 if is_size else 5 + struct.unpack_from("<I", stream, at + 1)[0]
    while stream[at : at + 1] != b"e":
        start, length = struct.unpack_from("<QQ", stream, at + 1)
        is_data = stream[at : at + 1] == b"w"
        data = stream[at + 17 : at + 17 + length] if is_data else bytes(length)
        at += 17 + (length if is_data else 0)
        end = start + length
        while start < end:
            stop = min(end, start - start % backy.UNIT + backy.UNIT)
            seen.append((start, data[: stop - start]))
            data, start = data[stop - start :], stop
    assert at == len(stream) - 1
    return seen


@pytest.mark.parametrize(
    "words",
    [
        "",
        "rbd",
        "/x",
        "rbd/",
        "rbd/a/b/c",
        "-p/x",
        "rbd/-x",
        "rbd/a@b",
        "rbd/a b\n",
        "x\0/y",
    ],
)
def test_what_can_be_no_image_is_refused(tmp_path, run, words):
    result = run("-b", tmp_path / "job", "init", "--", "ceph-rbd", words)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "POOL/IMAGE or POOL/NAMESPACE/IMAGE" in result.err


# -- what rbd may answer: a script in its place ---------------------------------

SOUND = {
    "info": json.dumps({"size": 2 * MiB, "object_size": 4 * MiB, "features": []}),
    "snap ls": json.dumps([{"id": 1, "name": "NAME", "size": 2 * MiB}]),
    "snap create": "",
    "snap rm": "",
}
FAKE = """
import os, re, sys
answers, log = eval(open({answers!r}).read()), {log!r}
words = sys.argv[1:]
with open(log, "a") as file: file.write(" ".join(words) + "\\n")
verb = " ".join(words[:2]) if words[0] == "snap" else words[0]
made = re.findall("snap create .*@(.*)", open(log).read())
if verb == "export":
    sys.stdout.write("x" * answers.get("length", {size}))
else:
    sys.stdout.write(answers[verb].replace("NAME", made[-1] if made else ""))
sys.exit(answers.get("status", 0) if verb == answers.get("failing") else 0)
"""


@pytest.fixture
def fake(tmp_path, run, monkeypatch):
    """A function that makes a backup with a `rbd` of these answers; its result and its calls."""
    log, program, answers = tmp_path / "log", tmp_path / "rbd", tmp_path / "answers"
    text = FAKE.format(answers=str(answers), log=str(log), size=2 * MiB)
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)
    monkeypatch.setenv("BACKY_RBD", str(program))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run("-b", tmp_path / "job", "init", "ceph-rbd", "rbd/vm").status == 0

    def backup(**given):
        answers.write_text(repr({**SOUND, **given}))
        result = run("-b", tmp_path / "job", "backup", "daily")
        return result, log.read_text().splitlines()

    backup.job = tmp_path / "job"
    return backup


def test_what_is_asked_of_rbd(fake):
    result, calls = fake()
    assert result.status == 0, result
    name = (fake.job / "last").resolve().name
    assert calls[0] == "info rbd/vm --format=json"
    assert calls[1] == f"snap create rbd/vm@backy-{name}"
    assert f"export rbd/vm@backy-{name} -" in calls
    assert (fake.job / "last").read_bytes() == b"x" * 2 * MiB
    assert (fake.job / ".snapshots").read_text() == f"rbd/vm@backy-{name}\n"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"info": "[]"}, "an answer of another kind"),
        ({"info": "oops"}, "is no JSON"),
        ({"snap ls": "{}"}, "an answer of another kind"),
        ({"snap ls": "[]"}, "there is no snapshot backy-"),
        ({"snap ls": '[1, null, {}, {"name": 5}]'}, "there is no snapshot backy-"),
        ({"snap ls": '[{"name": "NAME", "size": "7"}]'}, "which is no number"),
        ({"snap ls": '[{"name": "NAME", "size": -7}]'}, "which is no number"),
        ({"length": 2 * MiB - 1}, "its output ends before"),
        ({"length": 2 * MiB + 1}, "there is more than its end"),
        ({"length": 0}, "its output ends before"),
        ({"failing": "export", "status": 1}, "exit status 1"),
        ({"failing": "info", "status": 1}, "exit status 1"),
        ({"failing": "snap create", "status": 17}, "exit status 17"),
    ],
)
def test_an_odd_answer_is_an_error_and_leaves_nothing(fake, given, complaint):
    result, calls = fake(**given)
    assert result.status == 1 and complaint in result.err and "Traceback" not in result.err
    assert not list(fake.job.glob("*.rev"))
    assert ("snap rm" in calls[-1]) == ("info" not in given and given.get("failing") != "info")


def test_a_snapshot_that_cannot_be_removed_is_remembered(fake):
    fake()
    (first,) = (fake.job / ".snapshots").read_text().splitlines()
    listing = [{"id": 1, "name": "NAME", "size": 5}, {"name": first.partition("@")[2]}]
    answers = {"snap ls": json.dumps(listing), "length": 5, "failing": "snap rm", "status": 16}
    result, _ = fake(**answers)
    assert result.status == 0 and "stays, which is tried again next time" in result.err
    assert first in (fake.job / ".snapshots").read_text().splitlines()


@pytest.mark.parametrize(
    "text", ["\xff\xfe", "-rf /\n", "rbd/vm@by-hand\n", "x@backy-\n", "\x1b[2J\n"]
)
def test_nothing_but_snapshots_of_ours_is_removed_whatever_the_list_says(fake, text):
    (fake.job / ".snapshots").write_text(text)
    result, calls = fake()
    assert result.status == 0 and not any("snap rm" in call for call in calls)
