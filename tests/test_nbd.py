# SPDX-License-Identifier: GPL-3.0-or-later
"""The protocol of network block devices, phase by phase, by a client of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import nbd_client as nbd
import pytest
from conftest import (
    PROGRAM,
    MiB,
    backy_process,
    command,
    flip,
    fresh_directory,
    need_tool,
    noise,
    revisions,
    write_image,
)
from nbd_client import Client, connect, counted, go_data, meta_data, serving

import backy

KiB = 1024


def make_store(directory):
    """A job with two revisions of an image that has data, holes and an odd end."""
    image = write_image(
        directory / "vm.img",
        (0, noise(300 * KiB, 1)),
        (MiB, noise(5, 2)),
        (2 * MiB, noise(64 * KiB, 3)),
        size=3 * MiB + 12345,
    )
    steps = [("init", "file", image), ("backup", "daily,first"), ("backup", "daily")]
    for words in steps:
        assert backy_process("-b", directory / "vm", *words).returncode == 0
        if "daily,first" in words:
            write_image(image, (128 * KiB, noise(6000, 4)), (3 * MiB, noise(12345, 5)))
    return directory / "vm"


@pytest.fixture(scope="module")
def store(_file_systems):
    """The same for all tests that change nothing in it."""
    for directory in fresh_directory(_file_systems, "xfs"):
        yield make_store(directory)


@pytest.fixture
def own_store(cow, store):
    """One for a test that does change it."""
    command("cp", "-a", "--reflink=auto", store, cow)
    return cow / "vm"


@pytest.fixture
def nbd_server():
    """A function that makes a server for a directory; it has a function that connects to it."""
    made: list[backy.NBDServer] = []

    def make(path, is_base=False, tls=None, most=16, **mode) -> backy.NBDServer:
        exports = backy.Exports(str(path), is_base, backy.ExportMode(**mode))
        server = backy.NBDServer(backy.Loop(), exports, tls, most)

        def join(flags: int | None = 3) -> Client:
            ours, theirs = socket.socketpair()
            server.admit(theirs, None)
            return Client(ours, flags)

        server.join = join
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()
        server.loop.close()


@pytest.fixture
def logged(caplog, monkeypatch):
    """What is logged, whatever the tests before have done to the logger."""
    monkeypatch.setattr(backy.log, "propagate", True)
    caplog.set_level("INFO", "backy")
    return caplog


@pytest.fixture
def join(store, nbd_server):
    return nbd_server(store).join


def images(store) -> list[bytes]:
    """The bytes of all revisions, the newest first."""
    return [(store / one.id).read_bytes() for one in reversed(revisions(store))]


# ==== Handshake ==============================================================


def test_list_has_full_ids_with_what_they_are(store, join):
    *exports, last = join().option(nbd.LIST)
    assert last == (nbd.ACK, b"")
    newest, oldest = reversed(revisions(store))
    for (kind, data), revision, tags in zip(exports, (newest, oldest), ("daily", "daily,first")):
        assert kind == nbd.SERVER
        assert data.startswith(counted(revision.id))
        text = data[4 + len(revision.id) :].decode()
        assert text == (
            f"vm, {backy.format_time(revision.timestamp)} UTC, {tags}, 3.01 MiB, verified"
        )


@pytest.mark.parametrize(
    "spec", ["", "last", "0", "1", "first", "daily", "ID", "part", "2999-01-01"]
)
def test_an_export_has_every_name_that_restore_takes(spec, store, join):
    newest, oldest = reversed(revisions(store))
    name = {"ID": oldest.id, "part": oldest.id[:8]}.get(spec, spec)
    expected = oldest if spec in ("1", "first", "ID", "part") else newest
    told = join().go(name, 1, 2, 3)
    assert told[1].decode() == expected.id
    assert told[2].decode().startswith("vm, ")
    assert struct.unpack(">III", told[3]) == (1, 4096, 32 * MiB)


@pytest.mark.parametrize(
    "name",
    [
        *("2", "nosuch", "../vm/last", "last/", "last/p1", "last/p0", "/etc/passwd", "last\0"),
        *("x" * 4000, "config", "last.rev", ".", "/", b"\xff\xfe"),
    ],
)
def test_other_names_are_unknown_and_the_handshake_goes_on(name, join):
    client = join()
    known = (nbd.UNKNOWN, nbd.INVALID) if isinstance(name, bytes) else (nbd.UNKNOWN,)
    for option in (nbd.OPT_INFO, nbd.GO):
        assert client.ask(option, go_data(name)) in known
    assert client.go("last")


def test_info_and_go_say_the_same(store, join):
    client = join().structured()
    told = client.option(nbd.OPT_INFO, go_data("1", 3, 2, 1, 999))
    assert told == client.option(nbd.GO, go_data("1", 3, 2, 1, 999))
    assert client.read(0, 100) == images(store)[1][:100]


def test_flags_of_a_revision(join):
    plain, structured = join(), join().structured()
    plain.go()
    structured.go()
    assert plain.flags == 1 | 2 | 4 | 8 | 256 | 1024
    assert structured.flags == plain.flags | 128
    assert plain.size == 3 * MiB + 12345


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_export_name(flags, store, join):
    client = join(flags)
    client.send(struct.pack(">8sII", b"IHAVEOPT", 1, 1) + b"1")
    size, _ = struct.unpack(">QH", client.receive(10))
    assert size == 3 * MiB + 12345
    if not flags & 2:
        assert client.receive(124) == bytes(124)
    assert client.read(5, 100) == images(store)[1][5:105]


@pytest.mark.parametrize("name", [b"nosuch", b"\xff", b"x" * 5000])
def test_export_name_that_is_unknown_ends_the_connection(name, join):
    client = join()
    client.send(struct.pack(">8sII", b"IHAVEOPT", 1, len(name)) + name)
    assert client.is_closed()


def test_abort_is_acknowledged(join):
    client = join()
    assert client.ask(nbd.ABORT) == nbd.ACK
    assert client.is_closed()


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags, join):
    assert join(flags).is_closed()


@pytest.mark.parametrize("option", [nbd.ABORT, nbd.LIST, nbd.GO, 99])
def test_who_is_not_fixed_may_only_name_an_export(option, join):
    client = join(0)
    client.send(struct.pack(">8sII", b"IHAVEOPT", option, 0))
    assert client.is_closed()


@pytest.mark.parametrize(
    ("option", "data", "expected"),
    [
        (0, b"", nbd.UNSUP),
        (4, b"", nbd.UNSUP),
        (99, b"x" * 4000, nbd.UNSUP),
        (nbd.LIST, b"x", nbd.INVALID),
        (nbd.STARTTLS, b"", nbd.POLICY),
        (nbd.STARTTLS, b"x", nbd.INVALID),
        (nbd.STRUCTURED, b"x", nbd.INVALID),
        (nbd.EXTENDED, b"x", nbd.INVALID),
        (nbd.GO, b"", nbd.INVALID),
        (nbd.GO, b"\0\0\0", nbd.INVALID),
        (nbd.GO, b"\xff\xff\xff\xff", nbd.INVALID),
        (nbd.GO, counted("last"), nbd.INVALID),
        (nbd.GO, counted("last") + b"\0\1", nbd.INVALID),
        (nbd.GO, go_data("last") + b"x", nbd.INVALID),
        (nbd.OPT_INFO, go_data("last") + b"\0\0", nbd.INVALID),
        (nbd.GO, bytes(5000), nbd.TOO_BIG),
        (nbd.SET_META, meta_data("last", "base:allocation"), nbd.INVALID),
        (nbd.LIST_META, meta_data("last"), nbd.INVALID),
    ],
)
def test_odd_options_are_refused_and_the_handshake_goes_on(option, data, expected, join):
    client = join()
    assert client.ask(option, data) == expected
    assert client.go("last")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        counted("last"),
        counted("last") + b"\0\0\0\2" + counted("base:allocation"),
        counted("last") + b"\0\0\0\1" + b"\0\0\0\x20base:allocation",
        meta_data("last", "base:allocation") + b"slack",
        counted("last") + b"\xff\xff\xff\xff",
        b"\xff\xff\xff\xfflast",
    ],
)
def test_odd_queries_for_contexts_are_invalid(data, join):
    client = join().structured()
    for option in (nbd.LIST_META, nbd.SET_META):
        assert client.ask(option, data) == nbd.INVALID
    client.go("last")
    client.request(nbd.STATUS, 0, 10)
    assert client.chunks()[0][0] == 0x8001  # no context was chosen


@pytest.mark.parametrize("length", [65537, 1 << 20, 0xFFFFFFFF])
def test_an_option_that_says_to_be_huge_ends_the_connection(length, join):
    client = join()
    client.send(struct.pack(">8sII", b"IHAVEOPT", nbd.GO, length))
    assert client.is_closed()


def test_options_without_their_magic_end_the_connection(join):
    client = join()
    client.send(struct.pack(">8sII", b"IHAVEOPS", nbd.LIST, 0))
    assert client.is_closed()


def test_options_may_come_in_one_piece_or_byte_by_byte(join):
    client = join(None)
    name = go_data("last")
    data = struct.pack(">I8sII", 3, b"IHAVEOPT", nbd.STRUCTURED, 0)
    data += struct.pack(">8sII", b"IHAVEOPT", nbd.GO, len(name)) + name
    data += struct.pack(">IHHQQI", 0x25609513, 0, nbd.READ, 7, 0, 10)
    for at in range(20):
        client.send(data[at : at + 1])
        time.sleep(0.001)
    client.send(data[20:])
    replies = client.receive(20 + 20 + 12 + 20)
    assert [replies[16:20], replies[-8:-4]] == [bytes(4), b"\0\0\0\1"]
    assert len(client.chunks()[0][1]) == 18


# ==== Reading ================================================================


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_every_part_reads_as_in_the_image(mode, store, join):
    chance = random.Random(7)
    for name, image in zip(("0", "1"), images(store)):
        client = join()
        if mode != "simple":
            getattr(client, mode)()
        client.go(name)
        assert client.size == len(image)
        lengths = [1, 511, 4096, 32 * KiB, 32 * KiB + 1, MiB, len(image)]
        parts = [(0, length) for length in lengths] + [(len(image) - 1, 1)]
        for _ in range(60):
            length = chance.choice((chance.randint(1, 9000), chance.randint(1, len(image))))
            parts.append((chance.randint(0, len(image) - length), length))
        for number, (offset, length) in enumerate(parts):
            flags = nbd.DF if mode != "simple" and number % 3 == 0 else 0
            assert client.read(offset, length, flags) == image[offset : offset + length]


def test_many_requests_at_once_are_all_answered(store, join):
    (image, _), client = images(store), join().structured()
    client.go()
    chance = random.Random(8)
    parts = [(chance.randrange(len(image) - 70000), chance.choice((512, 4096, 70000)))
             for _ in range(300)]  # fmt: skip
    sender = threading.Thread(
        target=lambda: [client.request(0, *part, 0, b"", n) for n, part in enumerate(parts)]
    )
    sender.start()
    for number, (offset, length) in enumerate(parts):
        data = bytearray(length)
        for kind, body in client.chunks(number):
            if kind == 1:
                at = int.from_bytes(body[:8], "big") - offset
                data[at : at + len(body) - 8] = body[8:]
        assert data == image[offset : offset + length]
    sender.join()


def test_holes_are_told_as_holes_unless_df_forbids_it(join):
    client = join().structured()
    client.go()
    client.request(nbd.READ, 400 * KiB, 100 * KiB)
    assert client.chunks() == [(2, struct.pack(">QI", 400 * KiB, 100 * KiB))]
    client.request(nbd.READ, 400 * KiB, 100 * KiB, nbd.DF)
    chunks = [chunk for chunk in client.chunks() if chunk != (0, b"")]
    assert chunks == [(1, struct.pack(">Q", 400 * KiB) + bytes(100 * KiB))]


EINVAL, EPERM, ENOSPC = errno.EINVAL, errno.EPERM, errno.ENOSPC


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "expected"),
    [
        (nbd.READ, 3 * MiB + 12345, 1, 0, EINVAL),
        (nbd.READ, 3 * MiB, 12346, 0, EINVAL),
        (nbd.READ, (1 << 64) - 1, 2, 0, EINVAL),
        (nbd.READ, 0, 32 * MiB + 1, 0, EINVAL),
        (nbd.READ, 0, 0xFFFFFFFF, 0, EINVAL),
        (nbd.READ, 0, 10, nbd.REQ_ONE, EINVAL),
        (nbd.READ, 0, 10, 0x8000, EINVAL),
        (nbd.READ, 0, 0, 0, 0),
        (nbd.READ, 0, 10, nbd.FUA, 0),
        (nbd.STATUS, 0, 10, 0, EINVAL),  # no context
        (nbd.WRITE, 0, 5, 0, EPERM),
        (nbd.WRITE, 0, 5, nbd.FUA, EPERM),
        (nbd.WRITE, 4 * MiB, 5, 0, EPERM),
        (nbd.TRIM, 0, 5, 0, EPERM),
        (nbd.ZEROES, 0, 5, nbd.NO_HOLE, EPERM),
        (nbd.FLUSH, 0, 0, 0, 0),
        (nbd.FLUSH, 0, 0, nbd.FUA, 0),
        (nbd.CACHE, 0, MiB, 0, 0),
        (nbd.CACHE, 0, 4 * MiB, 0, EINVAL),
        (nbd.CACHE, 0, MiB, nbd.DF, EINVAL),
        (8, 0, 0, 0, EINVAL),
        (0xFFFF, 0, 10, 0, EINVAL),
    ],
)
@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_what_a_read_only_export_answers(mode, kind, offset, length, flags, expected, store, join):
    client = join()
    if mode != "simple":
        getattr(client, mode)()
    client.go()
    data = b"x" * length if kind == nbd.WRITE else b""
    flags |= nbd.PAYLOAD if data and mode == "extended" else 0
    client.request(kind, offset, length, flags, data)
    if mode == "extended" or (mode == "structured" and kind in (nbd.READ, nbd.STATUS)):
        *_, (reply, body) = client.chunks(offset=offset)
        found = int.from_bytes(body[:4], "big") if reply >> 15 else 0
    else:
        found = client.simple()
        if kind == nbd.READ and not found:
            client.receive(length)
    assert found == expected
    assert client.read(0, 10) == images(store)[0][:10]


def test_a_request_without_its_magic_ends_the_connection(join):
    client = join()
    client.go()
    client.request(nbd.READ, 0, 10, magic=0x25609514)
    assert client.is_closed()


def test_a_goodbye_lets_all_that_was_asked_for_be_answered(store, join):
    (image, _), client = images(store), join()
    client.go()
    for _ in range(30):
        client.request(nbd.READ, 0, 100 * KiB)
    client.request(nbd.DISC)
    for _ in range(30):
        assert client.simple() == 0
        assert client.receive(100 * KiB) == image[: 100 * KiB]
    assert client.is_closed()


# ==== What is where ==========================================================


def test_allocation_is_that_of_the_file(store, join):
    client = join().structured()
    assert client.contexts("", "base:allocation") == [(1, "base:allocation")]
    client.go()
    with open(store / "last", "rb") as file:
        extents = list(backy.data_extents(file.fileno(), 0, client.size))
    found, position = [], 0
    for length, flags in client.status(0, client.size)[1]:
        assert flags in (0, 3)
        if not flags:
            found.append((position, position + length))
        position += length
    assert (found, position) == (extents, client.size)
    first = client.status(0, client.size, nbd.REQ_ONE)[1]
    assert first == client.status(0, client.size)[1][:1]
    assert client.status(400 * KiB, 10) == {1: [(10, 3)]}
    client.request(nbd.STATUS, client.size, 1)
    assert client.chunks()[0][0] == 0x8001


def changed_pages(one: bytes, other: bytes) -> set[int]:
    pages = range(0, max(len(one), len(other)), 4096)
    return {at for at in pages if one[at : at + 4096] != other[at : at + 4096]}


def pages_with(wanted: int, runs: list) -> set[int]:
    found, position = set(), 0
    for length, flags in runs:
        if flags == wanted:
            found |= set(range(position - position % 4096, position + length, 4096))
        position += length
    return found


@pytest.mark.parametrize("query", ["x-backy:changed-since=%s", "qemu:dirty-bitmap:since-%s"])
@pytest.mark.parametrize("base", [0, 1])
def test_changed_since_is_what_differs(base, query, store, join):
    new, old = images(store)
    client = join().structured()
    name = query % base
    assert client.contexts(str(1 - base), name, "base:allocation") == [
        (1, name),
        (2, "base:allocation"),
    ]
    client.go(str(1 - base))
    answer = client.status(0, client.size)
    assert {flags for _, flags in answer[1]} == {0, 1}
    assert pages_with(1, answer[1]) == changed_pages(new, old)
    for number in (1, 2):
        assert sum(length for length, _ in answer[number]) == client.size


def test_contexts_that_are_listed(store, join):
    client = join().structured()
    newest, oldest = reversed(revisions(store))
    names = [
        "base:allocation",
        f"x-backy:changed-since={oldest.id}",
        f"qemu:dirty-bitmap:since-{oldest.id}",
    ]
    assert client.contexts("", listing=True) == [(0, name) for name in names]
    assert client.contexts("", "base:", listing=True) == [(0, names[0])]
    assert client.contexts("", "x-backy:", listing=True) == [(0, names[1])]
    assert client.contexts("", "qemu:dirty-bitmap:", listing=True) == [(0, names[2])]
    assert client.contexts("", names[1], names[1], listing=True) == [(0, names[1])]
    odd = ("base:", "base:nosuch", "x-backy:", "x-backy:changed-since=nosuch", "x:y", "", "base")
    assert client.contexts("", *odd) == []
    assert client.contexts("1", "x-backy:", listing=True) == [
        (0, f"x-backy:changed-since={newest.id}")
    ]


def test_contexts_are_for_the_export_they_were_chosen_for(join):
    client = join().structured()
    client.contexts("1", "base:allocation")
    client.go("0")
    client.request(nbd.STATUS, 0, 10)
    assert client.chunks()[0][0] == 0x8001
    client = join().structured()
    client.contexts("1", "base:allocation")
    assert client.ask(nbd.SET_META, b"") == nbd.INVALID  # the former choice is gone as well
    client.go("1")
    client.request(nbd.STATUS, 0, 10)
    assert client.chunks()[0][0] == 0x8001


def test_extended_headers(store, join):
    client = join().extended()
    assert client.ask(nbd.STRUCTURED) == nbd.EXT_REQD
    client.contexts("", "base:allocation")
    client.go()
    assert sum(length for length, _ in client.status(0, client.size)[1]) == client.size
    client.request(nbd.TRIM, 0, 1 << 40)
    assert client.result() == EPERM
    client.request(nbd.CACHE, 0, 1 << 40)
    assert client.result() == EINVAL
    client.request(nbd.STATUS, 0, 8, nbd.PAYLOAD, bytes(8))  # was not offered
    assert client.chunks()[0][1][:4] == b"\0\0\0\x16"
    assert client.read(0, 10) == images(store)[0][:10]
    client = join().extended()
    client.send(struct.pack(">8sII", b"IHAVEOPT", 1, 1) + b"1")
    assert client.is_closed()


# ==== Differences ============================================================


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], []),
        ([(0, 10)], [(0, 10)], [(0, 10)]),
        ([(0, 10)], [(10, 20)], []),
        ([(0, 10), (20, 30)], [(5, 25)], [(5, 10), (20, 25)]),
        ([(5, 25)], [(0, 10), (12, 13), (20, 30)], [(5, 10), (12, 13), (20, 25)]),
    ],
)
def test_common_spans(one, other, expected):
    assert list(backy.common_spans(one, other)) == expected
    assert list(backy.common_spans(other, one)) == expected


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([], [(0, 100, 3)]),
        ([(0, 100)], [(0, 100, 0)]),
        ([(10, 20), (20, 30)], [(0, 10, 3), (10, 30, 0), (30, 100, 3)]),
        ([(90, 100)], [(0, 90, 3), (90, 100, 0)]),
    ],
)
def test_runs_cover_everything_and_differ_from_their_neighbours(extents, expected):
    runs = backy.Runs(0, 100, extents, 0, 3)
    assert list(runs.between(0, 100)) == expected
    assert list(runs.between(95, 95)) == []
    assert [sum(one[1] - one[0] for one in runs.between(at, at + 7)) for at in range(93)] == [
        7
    ] * 93


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 5, [(10, 10)]), (0, 15, [(15, 5)]), (12, 14, [(10, 2), (14, 6)]), (5, 25, [])],
)
def test_what_is_written_anew_is_damaged_no_more(start, end, expected):
    assert backy.without_span([(10, 10)], start, end) == expected


# ==== Many jobs ==============================================================


@pytest.fixture
def base(cow, run):
    """A directory with two jobs, b the newer one, and other things."""
    for name in ("a", "b"):
        image = write_image(cow / f"{name}.img", (0, noise(5000, ord(name))), size=100_000)
        assert run("-b", cow / "base" / name, "init", "file", image).status == 0
        assert run("-b", cow / "base" / name, "backup", "daily").status == 0
    (cow / "base/status").write_text("x")
    (cow / "base/empty").mkdir()
    (cow / "base/.hidden").mkdir()
    (cow / "base/link").symlink_to("a")
    return cow / "base"


def test_names_of_many_jobs(base, nbd_server):
    join = nbd_server(base, is_base=True).join
    ids = {name: revisions(base / name)[0].id for name in "ab"}
    *exports, _ = join().option(nbd.LIST)
    names = [data[4 : 4 + data[3]].decode() for _, data in exports]
    assert names == [f"a/{ids['a']}", f"b/{ids['b']}"]
    for name, expected in {
        "": "b", "a": "a", "a/": "a", "a/last": "a", "b/0": "b", f"a/{ids['a']}": "a",
    }.items():  # fmt: skip
        client = join()
        assert client.go(name, 1)[1].decode() == f"{expected}/{ids[expected]}"
        assert client.read(0, 5000) == noise(5000, ord(expected))
    client = join()
    odd = ("c", "a/b", "empty", "link/last", ".hidden", "../base/a", "a/../b", "/a", "status")
    for name in (*odd, "a//"):
        assert client.ask(nbd.GO, go_data(name)) == nbd.UNKNOWN


def test_there_may_be_more_jobs_than_are_loaded_at_a_time(base, run, nbd_server, monkeypatch):
    monkeypatch.setattr(backy, "MOST_REPOSITORIES", 1)
    server = nbd_server(base, is_base=True)
    for count in (2, 3, 4):
        assert len(server.join().option(nbd.LIST)) == count + 1
        assert len(server.exports.repositories) == 1
        a, b = server.join(), server.join()
        a.go("a")
        b.go("b")
        assert a.read(0, 5000) == noise(5000, ord("a"))
        assert run("-b", base / "ab"[count % 2], "backup", "daily").status == 0


def test_the_configuration_says_where_the_jobs_are(base, tmp_path):
    (base.parent / "backy.conf").write_text(
        f"global: {{base-dir: {base}}}\nschedules: {{s: {{daily: {{interval: 1d, keep: 3}}}}}}\n"
        f"jobs: {{a: {{schedule: s, source: {{type: file, filename: /x}}}}}}\n"
    )
    with serving("nbd-server", "-c", base.parent / "backy.conf", "-U", tmp_path / "s"):
        client = connect(tmp_path / "s")
        assert len(client.option(nbd.LIST)) == 3
        client.go("a/last")
        assert client.read(0, 5000) == noise(5000, ord("a"))


# ==== While it is served =====================================================


def test_revisions_come_and_go_and_an_open_one_stays(own_store, run, nbd_server):
    join = nbd_server(own_store).join
    _, old = images(own_store)
    reader = join()
    reader.go("1")
    assert run("-b", own_store, "backup", "daily").status == 0
    assert len(join().option(nbd.LIST)) == 4
    assert run("-b", own_store, "forget", "-r", "2", "-f").status == 1  # it is being read
    assert len(join().option(nbd.LIST)) == 4
    assert run("-b", own_store, "forget", "-r", "1", "-f").status == 0
    assert len(join().option(nbd.LIST)) == 3
    assert reader.read(0, len(old)) == old
    reader.request(nbd.DISC)
    assert reader.is_closed()
    end = time.monotonic() + 10
    while run("-b", own_store, "forget", "-r", "1", "-f").status and time.monotonic() < end:
        time.sleep(0.01)
    assert len(join().option(nbd.LIST)) == 2
    assert join().ask(nbd.GO, go_data("1")) == nbd.UNKNOWN


def test_a_deleted_directory_costs_new_clients_only(own_store, nbd_server):
    join = nbd_server(own_store).join
    (new, _), reader = images(own_store), join()
    reader.go()
    own_store.rename(own_store.parent / "moved")
    assert reader.read(0, len(new)) == new
    client = join()
    assert client.ask(nbd.GO, go_data("")) == nbd.UNKNOWN
    assert client.option(nbd.LIST)[-1] == (nbd.ACK, b"")
    (own_store.parent / "moved").rename(own_store)
    assert join().go()


def test_an_incomplete_revision_is_served_by_its_full_id_only(own_store, nbd_server):
    name = "2" * 22
    (own_store / f"{name}.rev").write_text(f"uuid: {name}\ntimestamp: 2026-01-01 00:00:00+00:00\n")
    (own_store / name).write_bytes(b"part")
    join = nbd_server(own_store).join
    assert len(join().option(nbd.LIST)) == 3
    client = join()
    assert client.ask(nbd.GO, go_data(name[:10])) == nbd.UNKNOWN
    client.go(name)
    assert client.read(0, 4) == b"part"


def test_a_revision_of_the_wrong_size_is_not_served(own_store, nbd_server):
    join = nbd_server(own_store).join
    os.truncate(own_store / revisions(own_store)[0].id, 5)
    (own_store / "touch").touch()
    assert join().ask(nbd.GO, go_data("1")) == nbd.POLICY
    assert join().go("0")


# ==== Damage =================================================================

BAD = (64 * KiB, 128 * KiB)  # the block in which a byte was flipped


def mark_damage(store) -> None:
    flip(store / "last", 70_000)
    with backy.Repository.open(str(store)) as repository:
        revision = repository.find("last")
        repository.mark_damaged(revision, [(BAD[0], BAD[1] - BAD[0])])


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_known_damage_is_an_error_and_all_else_is_served(mode, own_store, nbd_server, logged):
    mark_damage(own_store)
    server = nbd_server(own_store)
    new, client = images(own_store)[0], server.join()
    if mode != "simple":
        getattr(client, mode)()
    client.go("last")
    assert client.read(0, BAD[0]) == new[: BAD[0]]
    assert client.read(BAD[1], 2 * MiB) == new[BAD[1] : BAD[1] + 2 * MiB]
    where = None if mode == "simple" else BAD[1] - 10
    assert client.read_parts(BAD[1] - 10, 20)[1] == [(errno.EIO, where)]
    data, errors = client.read_parts(10, 200 * KiB)
    assert len(errors) == 1
    if mode != "simple":
        size = BAD[1] - BAD[0]
        assert data == new[10 : BAD[0]] + b"?" * size + new[BAD[1] : 200 * KiB + 10]
        assert client.read_parts(10, 200 * KiB, nbd.DF)[1]
    assert f"is damaged: bytes {BAD[0]} to {BAD[1] - 1}" in logged.text
    assert client.read(0, 100) == new[:100]


def test_damage_that_appears_is_an_error_from_then_on(own_store, nbd_server):
    server = nbd_server(own_store)
    client = server.join()
    client.go("last")
    assert len(client.read(BAD[0], 10)) == 10
    mark_damage(own_store)
    server.learn()
    assert client.read_parts(BAD[0], 10)[1] == [(errno.EIO, None)]


@pytest.mark.parametrize("mode", ["simple", "structured"])
def test_verify_finds_damage_and_remembers_it(mode, own_store, nbd_server, logged):
    flip(own_store / "last", 70_000)
    server = nbd_server(own_store, verify=True)
    new, client = images(own_store)[0], server.join()
    if mode != "simple":
        client.structured()
    client.go("last")
    assert client.read(3 * MiB, 12345) == new[3 * MiB :]
    assert client.read(5, 100) == new[5:105]
    assert client.read(10, 1000) == new[10:1010]
    assert client.read_parts(70_000, 1)[1]
    assert revisions(own_store)[-1].damaged == ((BAD[0], BAD[1] - BAD[0]),)
    assert revisions(own_store)[-1].trust is backy.Trust.DISTRUSTED
    if mode != "simple":
        data, errors = client.read_parts(0, client.size)
        assert errors == [(errno.EIO, BAD[0])]
        assert data == new[: BAD[0]] + b"?" * (BAD[1] - BAD[0]) + new[BAD[1] :]
        client = server.join().structured()
        client.go("1")
        assert client.read(0, client.size) == images(own_store)[1]
        assert client.read(0, 200 * KiB, nbd.DF) == images(own_store)[1][: 200 * KiB]


def test_an_image_that_is_cut_short_is_an_error(own_store, nbd_server):
    join = nbd_server(own_store).join
    simple, structured = join(), join().structured()
    simple.go("last")
    structured.go("last")
    os.truncate(own_store / os.readlink(own_store / "last"), 100 * KiB)
    assert structured.read_parts(90 * KiB, 100 * KiB)[1] == [(errno.EIO, 100 * KiB)]
    assert structured.read_parts(150 * KiB, 100)[1]
    assert simple.read_parts(150 * KiB, 100)[1] == [(errno.EIO, None)]
    assert structured.read(0, 100)


# ==== Clones to write to =====================================================


def test_a_clone_can_be_written_to_and_the_revision_stays(own_store, nbd_server):
    before = images(own_store)
    names = sorted(os.listdir(own_store))
    server = nbd_server(own_store, writable=True)
    client = server.join().structured()
    client.contexts("1", "base:allocation", f"x-backy:changed-since={revisions(own_store)[0].id}")
    client.go("1")
    assert client.flags & 0x3F == 1 | 4 | 8 | 32 and client.flags >> 6 & 1 and client.flags >> 11
    image = bytearray(before[1])

    def write(kind, offset, length, flags=0, data=None):
        client.request(kind, offset, length, flags, data or b"")
        assert client.simple() == 0
        image[offset : offset + length] = data or bytes(length)

    write(nbd.WRITE, 5, 100, 0, noise(100, 9))
    write(nbd.WRITE, MiB - 7, 200 * KiB, nbd.FUA, noise(200 * KiB, 10))
    write(nbd.WRITE, len(image) - 3, 3, 0, b"end")
    write(nbd.ZEROES, 10, 5000)
    write(nbd.ZEROES, 128 * KiB, 64 * KiB, nbd.NO_HOLE | nbd.FUA)
    write(nbd.ZEROES, 256 * KiB, 4 * KiB, nbd.FAST_ZERO)
    write(nbd.TRIM, 2 * MiB, 64 * KiB, nbd.FUA)
    write(nbd.WRITE, 0, 0)
    client.request(nbd.FLUSH)
    assert client.simple() == 0
    assert client.read(0, len(image)) == image
    status = client.status(0, client.size)
    assert (64 * KiB, 3) in client.status(2 * MiB, 64 * KiB)[1]
    assert sum(length for length, _ in status[1]) == len(image)
    changed, position = set(), 0
    for length, flags in status[2]:
        changed |= (
            set(range(position - position % 4096, position + length, 4096)) if flags else set()
        )
        position += length
    assert changed_pages(image, before[1]) <= changed < set(range(0, len(image), 4096))
    for kind, expected in ((nbd.WRITE, ENOSPC), (nbd.ZEROES, ENOSPC), (nbd.TRIM, EINVAL)):
        client.request(kind, len(image) - 1, 2, 0, b"xx" if kind == nbd.WRITE else b"")
        assert client.simple() == expected
    client.request(nbd.WRITE, 0, 32 * MiB + 1, 0, bytes(32 * MiB + 1))
    assert client.simple() == ENOSPC
    assert images(own_store) == before
    assert sorted(os.listdir(own_store)) == names


def test_clients_do_not_see_what_others_write(own_store, nbd_server):
    """Both are one process, so the groups are made different here."""
    server = nbd_server(own_store, writable=True)
    one = server.join()
    for session in server.sessions:
        session.group = session
    one.go("last")
    other = server.join()
    other.go("last")
    one.request(nbd.WRITE, 0, 3, 0, b"one")
    assert one.simple() == 0
    assert other.read(0, 3) == images(own_store)[0][:3]
    third = server.join()  # the same process as `other`
    third.go("last")
    other.request(nbd.WRITE, 0, 3, 0, b"two")
    assert other.simple() == 0
    assert third.read(0, 3) == b"two"


def test_a_revision_stays_as_long_as_its_clone(own_store, run, nbd_server):
    server = nbd_server(own_store, writable=True)
    client = server.join()
    client.go("1")
    assert run("-b", own_store, "forget", "-r", "1", "-f").status == 1
    client.close()
    wait_until(lambda: not server.sessions)
    assert run("-b", own_store, "forget", "-r", "1", "-f").status == 0
    assert not server.exports.open_images


def test_a_shared_clone_lasts_as_long_as_the_server(own_store, nbd_server):
    server = nbd_server(own_store, writable=True, shared=True)
    for data in (images(own_store)[0][:3], b"one", b"two"):
        client = server.join()
        client.go("last")
        assert client.flags & 256
        if data != b"one":
            client.request(nbd.WRITE, 10, 3, 0, b"abc")
            assert client.simple() == 0
        else:
            assert client.read(10, 3) == b"abc"
        client.request(nbd.DISC)
        assert client.is_closed()


def test_what_was_written_can_be_kept(own_store, nbd_server, logged):
    before = images(own_store)
    (own_store / "mine").write_text("something else")
    server = nbd_server(own_store, writable=True, keep="mine")
    for data in (b"", b"one", b"two"):
        client = server.join()
        client.go("last")
        if data:
            client.request(nbd.WRITE, 0, 3, 0, data)
            assert client.simple() == 0
        client.request(nbd.DISC)
        assert client.is_closed()
        client.close()
        end = time.monotonic() + 10
        while server.sessions and time.monotonic() < end:
            time.sleep(0.01)
    assert (own_store / "mine").read_text() == "something else"
    assert (own_store / "mine-2").read_bytes() == b"one" + before[0][3:]
    assert (own_store / "mine-3").read_bytes() == b"two" + before[0][3:]
    assert not (own_store / "mine-4").exists()
    assert images(own_store) == before
    assert "is kept as mine-2" in logged.text


def test_writing_over_damage_makes_it_good(own_store, nbd_server):
    mark_damage(own_store)
    client = nbd_server(own_store, writable=True).join()
    client.go("last")
    assert client.read_parts(BAD[0], 10)[1]
    client.request(nbd.WRITE, BAD[0], BAD[1] - BAD[0], 0, bytes(BAD[1] - BAD[0]))
    assert client.simple() == 0
    assert client.read(BAD[0], BAD[1] - BAD[0]) == bytes(BAD[1] - BAD[0])


def test_no_clone_where_extents_cannot_be_shared(ext4, store, nbd_server):
    command("cp", "-a", store, ext4)
    client = nbd_server(ext4 / "vm", writable=True).join()
    (kind, text) = client.option(nbd.GO, go_data("last"))[-1]
    assert kind == nbd.POLICY
    assert b"cannot share extents" in text


# ==== Partitions =============================================================

TABLES = {
    "dos": "label: dos\n2048,4096,83\n6144,2048,c\n10240,20480,5\n12288,2048,83\n16384,2048,83\n",
    "gpt": "label: gpt\n2048,4096\n8192,2048\n",
    "none": "",
}


@pytest.mark.parametrize("label", TABLES)
def test_partitions_are_those_that_sfdisk_made(label, tmp_path):
    need_tool("sfdisk")
    disk = write_image(tmp_path / "disk", size=32 * MiB)
    expected = {}
    if label != "none":
        command("sfdisk", "-q", disk, input=TABLES[label])
        table = json.loads(command("sfdisk", "--json", disk).stdout)["partitiontable"]
        for one in table["partitions"]:
            number = int(one["node"][len(str(disk)) :])
            if one.get("type") != "5":
                expected[number] = (one["start"] * 512, one["size"] * 512)
    data = disk.read_bytes()

    def find(data: bytes) -> dict:
        return backy.find_partitions(lambda length, at: data[at : at + length], len(data))

    assert find(data) == expected
    if label == "gpt":
        assert find(data[:512] + bytes(512) + data[1024:]) == expected  # the one at the end
        assert find(data[:512] + bytes(512) + data[1024:-512]) == {}
        assert find(data[: 8 * MiB]) == expected
    broken, chance = bytearray(data[: 9 * MiB]), random.Random(6)
    for _ in range(60):
        whole = bytes(broken[:KiB])
        for _ in range(3):
            broken[chance.randrange(600)] = chance.randrange(256)
        for offset, length in find(broken).values():
            assert 0 < offset < offset + length <= len(broken)
        broken[:KiB] = whole


def test_a_partition_is_an_export(cow, run, nbd_server):
    need_tool("sfdisk")
    disk = write_image(cow / "disk", (2 * MiB, noise(MiB, 1)), size=32 * MiB)
    command("sfdisk", "-q", disk, input="label: gpt\n2048,4096\n8192,2048\n")
    assert run("-b", cow / "vm", "init", "file", disk).status == 0
    assert run("-b", cow / "vm", "backup", "daily").status == 0
    write_image(disk, (2 * MiB + 8192, b"x"))
    assert run("-b", cow / "vm", "backup", "daily").status == 0
    join = nbd_server(cow / "vm").join
    client = join().structured()
    assert client.contexts("0/p1", "base:allocation", "x-backy:changed-since=1")
    assert client.go("0/p1", 1)[1].decode() == f"{revisions(cow / 'vm')[-1].id}/p1"
    whole = images(cow / "vm")[0]
    assert client.size == 2 * MiB
    assert client.read(0, client.size) == whole[MiB : 3 * MiB]
    assert client.read(MiB, 10, nbd.DF) == whole[2 * MiB : 2 * MiB + 10]
    assert client.status(0, client.size) == {
        1: [(MiB, 3), (MiB, 0)],
        2: [(MiB + 8192, 0), (4096, 1), (MiB - 12288, 0)],
    }
    client.request(nbd.READ, client.size - 1, 2)
    assert client.chunks()[0][0] == 0x8001
    assert join().ask(nbd.GO, go_data("0/p3")) == nbd.UNKNOWN
    client = nbd_server(cow / "vm", writable=True).join()
    client.go("0/p1")
    client.request(nbd.WRITE, 5, 3, 0, b"abc")
    assert client.simple() == 0
    assert client.read(5, 3) == b"abc"
    client.request(nbd.WRITE, client.size, 3, 0, b"abc")
    assert client.simple() == ENOSPC


# ==== Limits =================================================================


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_no_more_clients_than_allowed(store, nbd_server):
    server = nbd_server(store, most=3)
    clients = [server.join() for _ in range(3)]
    for client in clients:
        client.go()
    other = server.join()
    assert other.ask(nbd.GO, go_data("")) == nbd.POLICY
    assert other.ask(nbd.OPT_INFO, go_data("")) == nbd.ACK
    clients.pop().close()
    wait_until(lambda: len(server.sessions) == 3)
    assert other.go()


def test_sixty_four_connections_at_once(store, nbd_server):
    (image, _), server = images(store), nbd_server(store, most=64)
    clients = [server.join().structured() for _ in range(64)]
    for number, client in enumerate(clients):
        client.go()
        client.request(nbd.READ, number * 1000, 100_000)
    for number, client in enumerate(clients):
        at, parts = number * 1000, bytearray(100_000)
        for kind, body in client.chunks():
            if kind == 1:
                first = int.from_bytes(body[:8], "big") - at
                parts[first : first + len(body) - 8] = body[8:]
        assert parts == image[at : at + 100_000]


def test_a_handshake_has_its_time(store, nbd_server, monkeypatch):
    monkeypatch.setattr(backy, "NBD_HANDSHAKE", 0.3)
    join = nbd_server(store).join
    silent, slow, busy = join(None), join(), join()
    slow.send(b"IHAV")
    with contextlib.suppress(EOFError, ConnectionError):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            busy.ask(nbd.OPT_INFO, go_data(""))
        raise AssertionError("it could go on for ever")
    assert silent.is_closed() and slow.is_closed()
    client = join()
    client.go()
    time.sleep(0.4)
    assert client.read(0, 10) == images(store)[0][:10]


def test_handshakes_that_say_nothing_make_way(store, nbd_server, monkeypatch):
    server = nbd_server(store)
    silent = [server.join(None) for _ in range(3 * backy.NBD_HALF_OPEN)]
    wait_until(lambda: len(server.sessions) <= backy.NBD_HALF_OPEN)
    assert server.join().go()
    assert sum(not select.select([one.socket], [], [], 0)[0] for one in silent) < 65


def test_a_client_that_vanishes_costs_nobody_else(store, nbd_server):
    server = nbd_server(store)
    honest = server.join()
    honest.go()
    for _ in range(20):
        client = server.join().structured()
        client.go()
        for _ in range(50):
            client.request(nbd.READ, 0, MiB)
        client.close()
    assert honest.read(0, 10) == images(store)[0][:10]
    wait_until(lambda: len(server.sessions) == 1)
    assert not server.exports.clones
    assert len(server.exports.open_images) == 1


def test_sessions_leave_nothing_open(store, nbd_server):
    server = nbd_server(store, writable=True)

    def session() -> None:
        client = server.join().structured()
        client.contexts("0", "x-backy:changed-since=1")
        client.go("0")
        client.status(0, client.size)
        client.close()
        wait_until(lambda: not server.sessions)

    session()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        session()
    assert len(os.listdir("/proc/self/fd")) == before


# ==== Fuzzing ================================================================


def odd_bytes(chance: random.Random) -> bytes:
    """What a client may send: nearly right, with something changed, cut off or added."""
    words = (b"last", b"0/p1", b"1", b"", b"base:allocation", b"x-backy:changed-since=1", b"qemu:")
    pieces = [struct.pack(">I", chance.choice((0, 1, 3, 3, 3, 3, 7)))]
    for _ in range(chance.randrange(6)):
        word = chance.choice(words)
        data = {
            0: b"",
            1: go_data(word, *range(chance.randrange(5))),
            2: counted(word) + struct.pack(">I", 1) + counted(chance.choice(words)),
        }[chance.randrange(3)]
        option = chance.choice((1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 8, 10, 99))
        length = len(data) if chance.random() < 0.9 else chance.choice((0, 3, 5000, 1 << 31))
        pieces.append(struct.pack(">8sII", b"IHAVEOPT", option, length) + data)
    name = go_data(chance.choice(words))
    pieces.append(struct.pack(">8sII", b"IHAVEOPT", 7, len(name)) + name)
    for _ in range(chance.randrange(12)):
        kind = chance.choice((0, 0, 0, 1, 3, 4, 5, 6, 7, 7, 2, 99))
        flags = chance.choice((0, 0, 0, 1, 4, 8, 16, 32, 0xFFFF))
        offset = chance.choice((0, 5, MiB, 3 * MiB, 1 << 40, (1 << 64) - 1))
        length = chance.choice((0, 1, 4096, 100_000, 3 * MiB, 1 << 31))
        form = chance.choice((">IHHQQI", ">IHHQQI", ">IHHQQQ"))
        magic = {">IHHQQI": 0x25609513, ">IHHQQQ": 0x21E41C71}[form]
        pieces.append(struct.pack(form, magic, flags, kind, 7, offset, length))
        pieces += [bytes(min(length, 5000))] if kind == 1 else []
    data = bytearray(b"".join(pieces))
    for _ in range(chance.choice((0, 0, 1, 3))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.randrange(1, len(data))] if chance.random() < 0.2 else data)


def fuzz(server, rounds: int, seed: int) -> float:
    """So many sessions, one after the other; the seconds of the longest."""
    chance, longest = random.Random(seed), 0.0
    for _ in range(rounds):
        started = time.monotonic()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        server.admit(theirs, None)
        (session,) = server.sessions
        left, is_open = memoryview(odd_bytes(chance)), True
        while is_open:
            can_read, can_write, _ = select.select([ours], [ours] if left else [], [], 20)
            assert can_read or can_write, "it hangs"
            try:
                if can_write:
                    left = left[ours.send(left) :]
                    if not left:
                        ours.shutdown(socket.SHUT_WR)
                if can_read:
                    is_open = bool(ours.recv(1 << 20))
            except OSError:
                is_open = False
        ours.close()
        while server.sessions and time.monotonic() - started < 20:
            time.sleep(0.0001)
        longest = max(longest, time.monotonic() - started)
        del session
    return longest


@pytest.mark.parametrize(
    "rounds", [100, pytest.param(20_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("mode", [{}, {"writable": True}, {"verify": True}], ids=str)
def test_nothing_that_a_client_sends_breaks_the_server(mode, rounds, store, nbd_server, logged):
    server = nbd_server(store, **mode)
    seed = int(os.environ.get("FUZZ_SEED", rounds))
    rounds = int(os.environ.get("FUZZ_ROUNDS", rounds))
    fuzz(server, 30, seed + 1)
    logged.clear()
    fds, peak = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fuzz(server, rounds, seed) < 10
    assert "Traceback" not in logged.text
    assert len(os.listdir("/proc/self/fd")) <= fds
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    logged.clear()
    assert grown < 64 * KiB  # KiB; the log that pytest keeps is part of it
    client = server.join()
    client.go()
    assert len(client.read(0, 100)) == 100


# ==== The server as a program ================================================


def test_it_listens_on_loopback_or_on_a_socket_of_the_owner(store, tmp_path):
    with serving("-b", store, "nbd-server", "-p", 0) as server:
        assert server.log.count("listening on nbd://") == 2
        assert f"nbd://127.0.0.1:{server.port}\n" in server.log
        assert f"nbd://[::1]:{server.port}\n" in server.log
        assert connect(server.port).go()
    path = tmp_path / "socket"
    with serving("-b", store, "nbd-server", "-U", path) as server:
        assert server.log.count("listening on") == 1
        assert path.stat().st_mode & 0o777 == 0o600
        assert connect(path).go()
        second = backy_process("-b", store, "nbd-server", "-U", path)
        assert (second.returncode, second.stderr) == (
            1,
            f"backy: {path} is in use by another server\n",
        )
        server.process.kill()
        server.process.wait()
    with serving("-b", store, "nbd-server", "-U", path):  # one that nobody answers is replaced
        assert connect(path).go()
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_answer_what_has_arrived(number, store, tmp_path):
    image = images(store)[0]
    with serving("-b", store, "nbd-server", "-U", tmp_path / "s") as server:
        idle, busy = connect(tmp_path / "s"), connect(tmp_path / "s").structured()
        idle.go()
        busy.go()
        for cookie in range(20):
            busy.request(nbd.READ, 0, 300 * KiB, nbd.DF, b"", cookie)
        time.sleep(0.1)
        server.process.send_signal(number)
        time.sleep(0.1)
        for cookie in range(20):
            assert busy.chunks(cookie)[0][1][8:] == image[: 300 * KiB]
        assert busy.is_closed() and idle.is_closed()
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log


def test_it_takes_sockets_that_it_is_started_with(store, tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(5)
    words = [sys.executable, str(PROGRAM), "-b", str(store), "nbd-server"]
    script = (
        f"import os; os.dup2({listener.fileno()}, 3); "
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
        f"os.execv({words[0]!r}, {words!r})"
    )
    process = nbd.Serving([sys.executable, "-c", script], pass_fds=[3, listener.fileno()])
    try:
        client = connect(tmp_path / "s")
        client.go()
        assert client.read(0, 10) == images(store)[0][:10]
        assert process.log.count("listening on") == 1
    finally:
        assert process.end() == 0
        listener.close()


def test_sockets_that_it_is_started_with_are_not_open_to_all_either(store):
    with socket.create_server(("0.0.0.0", 0)) as listener:
        words = [sys.executable, str(PROGRAM), "-b", str(store), "nbd-server"]
        script = (
            f"import os; os.dup2({listener.fileno()}, 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
            f"os.execv({words[0]!r}, {words!r})"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            pass_fds=[3, listener.fileno()],
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert (done.returncode, "is more than this host" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-H", "0.0.0.0"], "0.0.0.0 is more than this host: whoever reaches it could read"),
        (["-H", "::"], ":: is more than this host"),
        (["-H", "nosuch.invalid"], "cannot listen on nosuch.invalid port 9000"),
        (["-p", "65536"], "'65536' is no port"),
        (["-p", "-1"], "'-1' is no port"),
        (["--max-clients", "0"], "'0' is no number from 1 to 9999"),
        (["-U", "/nosuch/socket"], "cannot listen on /nosuch/socket: No such file"),
        (["-U", "/tmp/" + 110 * "x"], "AF_UNIX path too long"),
        (["--shared"], "--shared goes with --writable"),
        (["--keep", "x"], "--keep goes with --writable"),
        (["--writable", "--keep", "../x"], "'../x' cannot be the name of a clone"),
        (["--writable", "--keep", "last"], "'last' cannot be the name of a clone"),
        (["--writable", "--keep", "x.rev"], "'x.rev' cannot be the name of a clone"),
        (["--writable", "--verify"], "--verify is for what is only read"),
        (["--tls-key", "x"], "--tls-key and --tls-ca go with --tls-cert"),
        (["--tls-cert", "/nosuch"], "cannot read /nosuch: No such file"),
        (["--tls-cert", "/dev/null"], "no TLS with /dev/null"),
        (["-c", "/nosuch.conf"], "/nosuch.conf"),
    ],
)
def test_what_cannot_be_served_is_said(words, message, store, run):
    done = run("-b", store, "nbd-server", *words)
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_directory_without_a_job_is_refused(tmp_path, run):
    assert "no job here" in run("-b", tmp_path, "nbd-server").err
    assert "no such directory" in run("-b", tmp_path / "none", "nbd-server").err


def test_who_wants_it_may_listen_everywhere(store):
    with serving("-b", store, "nbd-server", "-p", 0, "-H", "0.0.0.0", "--insecure") as server:
        assert "warning: nbd: whoever reaches 0.0.0.0 can read everything" in server.log


def test_clients_that_ask_and_never_read_take_no_memory(store, tmp_path):
    with serving("-b", store, "nbd-server", "-U", tmp_path / "s") as server:
        connect(tmp_path / "s").go()
        before = server.memory("VmRSS")
        server.forget_peak()
        clients = [connect(tmp_path / "s") for _ in range(2)]
        for client in clients:
            client.structured().go()
            for cookie in range(64):
                client.request(nbd.READ, 0, 3 * MiB, 0, b"", cookie)
        honest = connect(tmp_path / "s")
        honest.go()
        for _ in range(20):
            honest.read(0, 3 * MiB)
        assert server.memory("VmHWM") - before < 8 * KiB  # KiB
        for client in clients:
            client.close()


@pytest.mark.slow
def test_a_flood_of_handshakes_beside_an_honest_client(store):
    with serving("-b", store, "nbd-server", "-H", "127.0.0.1", "-p", 0) as server:
        with contextlib.ExitStack() as stack:
            silent = []
            for _ in range(300):
                one = socket.create_connection(("127.0.0.1", server.port))
                silent.append(stack.enter_context(one))
            started = time.monotonic()
            client = connect(server.port)
            client.go()
            assert client.read(0, 10) == images(store)[0][:10]
            assert time.monotonic() - started < 5
            with open(f"/proc/{server.process.pid}/status", encoding="ascii") as file:
                threads = int(file.read().split("Threads:")[1].split()[0])
            assert threads < 2 * backy.NBD_HALF_OPEN


# ==== TLS ====================================================================


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and what it has certified: a server and a client; and another authority."""
    need_tool("openssl")
    top = tmp_path_factory.mktemp("tls")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        command(
            *("openssl", "req", "-x509", *key, "-keyout", top / f"{name}-key.pem"),
            *("-out", top / f"{name}-cert.pem", "-days", 2, "-subj", f"/CN={name}"),
            *("-addext", "keyUsage=critical,keyCertSign"),
        )
    for name, authority in (("server", "ca"), ("client", "ca"), ("foreign", "other")):
        request = top / f"{name}.csr"
        command(
            *("openssl", "req", *key, "-keyout", top / f"{name}-key.pem"),
            *("-out", request, "-subj", f"/CN={name}"),
        )
        (top / "ext").write_text(
            "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
        )
        command(
            *("openssl", "x509", "-req", "-in", request, "-CA", top / f"{authority}-cert.pem"),
            *("-CAkey", top / f"{authority}-key.pem", "-CAcreateserial", "-days", 2),
            *("-extfile", top / "ext", "-out", top / f"{name}-cert.pem"),
        )
    return top


def start_tls(client: Client, top, name: str = "client") -> Client:
    assert client.ask(nbd.STARTTLS) == nbd.ACK
    context = ssl.create_default_context(cafile=str(top / "ca-cert.pem"))
    if name:
        context.load_cert_chain(top / f"{name}-cert.pem", top / f"{name}-key.pem")
    client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
    return client


@pytest.fixture
def join_tls(store, nbd_server, certificates):
    top = certificates
    names = (top / "server-cert.pem", top / "server-key.pem", top / "ca-cert.pem")
    return nbd_server(store, tls=backy.make_tls(*map(str, names))).join


def test_nothing_is_said_without_tls_where_it_is_wanted(join_tls):
    client = join_tls()
    for option, data in (
        (nbd.LIST, b""), (nbd.GO, go_data("")), (nbd.STRUCTURED, b""), (nbd.OPT_INFO, b"x"),
    ):  # fmt: skip
        assert client.ask(option, data) == nbd.TLS_REQD
    assert client.ask(nbd.ABORT) == nbd.ACK
    client = join_tls()
    client.send(struct.pack(">8sII", b"IHAVEOPT", 1, 0))
    assert client.is_closed()


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_tls_reads_the_same(mode, store, certificates, join_tls):
    image, client = images(store)[0], start_tls(join_tls(), certificates)
    assert client.ask(nbd.STARTTLS) == nbd.INVALID
    if mode != "simple":
        getattr(client, mode)()
    client.go()
    assert client.read(0, len(image)) == image
    for offset in range(0, 300 * KiB, 9999):
        assert client.read(offset, 5000) == image[offset : offset + 5000]
    client.request(nbd.DISC)
    assert client.is_closed()


def test_nothing_said_before_tls_counts_behind_it(certificates, store, nbd_server):
    server = nbd_server(store)
    client = server.join().structured()
    client.contexts("", "base:allocation")
    top = certificates
    names = (top / "server-cert.pem", top / "server-key.pem", None)
    server.tls = backy.make_tls(*(name and str(name) for name in names))
    client = start_tls(client, certificates, "")
    assert client.ask(nbd.SET_META, meta_data("", "base:allocation")) == nbd.INVALID
    client.is_structured = False
    client.go()
    assert not client.flags & 128
    client.request(nbd.STATUS, 0, 10)
    assert client.simple() == EINVAL
    client.read(0, 10)


def test_what_is_sent_in_clear_behind_starttls_is_never_obeyed(join_tls):
    client = join_tls()
    name = go_data("")
    client.send(
        struct.pack(">8sII", b"IHAVEOPT", nbd.STARTTLS, 0)
        + struct.pack(">8sII", b"IHAVEOPT", nbd.GO, len(name)) + name
    )  # fmt: skip
    assert client.receive(20)[12:16] == b"\0\0\0\1"
    with contextlib.suppress(ConnectionError):
        assert b"\x25\x60" not in client.socket.recv(1000)


@pytest.mark.parametrize("name", ["", "foreign"])
def test_a_client_needs_a_certificate_of_the_authority(name, certificates, join_tls):
    with pytest.raises((ssl.SSLError, EOFError, ConnectionError, AssertionError)):
        start_tls(join_tls(), certificates, name).structured()
