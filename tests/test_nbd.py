# SPDX-License-Identifier: GPL-3.0-or-later
"""The protocol of network block devices, phase by phase, by a client of its own."""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
import time

import nbd_client as nbd
import pytest
from conftest import MiB, backy_process, fresh_directory, noise, revisions, write_image
from nbd_client import Client, counted, go_data, meta_data

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
def own_store(cow):
    """One for a test that does change it."""
    return make_store(cow)


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
    found, position = set(), 0
    answer = client.status(0, client.size)
    for length, flags in answer[1]:
        assert flags in (0, 1)
        if flags:
            found |= set(range(position - position % 4096, position + length, 4096))
        position += length
    assert position == client.size
    assert found == changed_pages(new, old)
    assert sum(length for length, _ in answer[2]) == client.size


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
