# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of the NBD protocol that does as it is told, also what is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time

from conftest import PROGRAM

ACK, SERVER, INFO, META = 1, 2, 3, 4
EXPORT_NAME, ABORT, LIST, STARTTLS, OPT_INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED, LIST_META, SET_META, EXTENDED = 8, 9, 10, 11
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD = 1, 2, 4, 8, 16, 32
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN = ((1 << 31) + n for n in (1, 2, 3, 5, 6))
SHUTDOWN, TOO_BIG, EXT_REQD = ((1 << 31) + n for n in (7, 9, 10))


def counted(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def go_data(name: str | bytes, *infos: int) -> bytes:
    return counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(name: str, *queries: str) -> bytes:
    return counted(name) + struct.pack(">I", len(queries)) + b"".join(map(counted, queries))


class Client:
    """One connection; `flags` None leaves the greeting without an answer."""

    def __init__(self, connection: socket.socket, flags: int | None = 3) -> None:
        self.socket = connection
        self.socket.settimeout(20)
        self.is_structured = self.is_extended = False
        assert self.receive(16) == b"NBDMAGICIHAVEOPT"
        assert self.receive(2) == b"\0\3"
        if flags is not None:
            self.send(struct.pack(">I", flags))

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes; raises EOFError where the server has closed."""
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def is_closed(self) -> bool:
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    # -- options

    def option(self, number: int, data: bytes = b"", length: int | None = None) -> list:
        """The replies (type, data) to an option, up to the last."""
        length = len(data) if length is None else length
        self.send(struct.pack(">8sII", b"IHAVEOPT", number, length) + data)
        replies = []
        while True:
            magic, option, kind, size = struct.unpack(">QIII", self.receive(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self.receive(size)))
            if kind == ACK or kind >> 31:
                return replies

    def ask(self, number: int, data: bytes = b"") -> int:
        """The type of the last reply."""
        return self.option(number, data)[-1][0]

    def structured(self) -> Client:
        assert self.ask(STRUCTURED) == ACK
        self.is_structured = True
        return self

    def extended(self) -> Client:
        assert self.ask(EXTENDED) == ACK
        self.is_structured = self.is_extended = True
        return self

    def contexts(self, name: str, *queries: str, listing: bool = False) -> list[tuple[int, str]]:
        replies = self.option(LIST_META if listing else SET_META, meta_data(name, *queries))
        assert replies.pop() == (ACK, b"")
        return [(int.from_bytes(data[:4], "big"), data[4:].decode()) for _, data in replies]

    def go(self, name: str = "", *infos: int) -> dict[int, bytes]:
        """Open an export; what the server tells of it."""
        replies = self.option(GO, go_data(name, *infos))
        assert replies.pop()[0] == ACK, replies
        told = {int.from_bytes(data[:2], "big"): data[2:] for _, data in replies}
        self.size, self.flags = struct.unpack(">QH", told[0])
        return told

    # -- requests

    def request(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"",
        cookie: int = 7, magic: int | None = None,
    ) -> None:  # fmt: skip
        form, usual = (">IHHQQI", 0x25609513)
        if self.is_extended:
            form, usual = (">IHHQQQ", 0x21E41C71)
        head = struct.pack(form, magic or usual, flags, kind, cookie, offset, length)
        self.send(head + data)

    def simple(self, cookie: int = 7) -> int:
        """The error in a simple reply."""
        magic, error, which = struct.unpack(">IIQ", self.receive(16))
        assert (magic, which) == (0x67446698, cookie)
        return error

    def chunks(self, cookie: int = 7, offset: int = 0) -> list[tuple[int, bytes]]:
        """(type, data) of all chunks of a reply."""
        found = []
        while True:
            if self.is_extended:
                magic, flags, kind, which, at, size = struct.unpack(">IHHQQQ", self.receive(32))
                assert (magic, at) == (0x6E8A278C, offset)
            else:
                magic, flags, kind, which, size = struct.unpack(">IHHQI", self.receive(20))
                assert magic == 0x668E33EF
            assert which == cookie
            found.append((kind, self.receive(size)))
            if flags & 1:
                return found

    def result(self, offset: int = 0) -> int:
        """The error of anything but a read or a status."""
        if not self.is_extended:
            return self.simple()
        ((kind, data),) = self.chunks(offset=offset)
        return int.from_bytes(data[:4], "big") if kind >> 15 else 0

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """The bytes there, of a read that must succeed."""
        data, errors = self.read_parts(offset, length, flags)
        assert not errors
        return data

    def read_parts(self, offset: int, length: int, flags: int = 0) -> tuple[bytes, list]:
        """The bytes there, `?` where none came, and (error, offset) of each error."""
        self.request(READ, offset, length, flags)
        if not self.is_structured:
            error = self.simple()
            return (b"", [(error, None)]) if error else (self.receive(length), [])
        data, covered, errors = bytearray(b"?" * length), 0, []
        for kind, body in self.chunks(offset=offset):
            if kind == 1:
                at = int.from_bytes(body[:8], "big") - offset
                assert at >= 0 and at + len(body) - 8 <= length and len(body) > 8
                data[at : at + len(body) - 8] = body[8:]
                covered += len(body) - 8
            elif kind == 2:
                at, size = struct.unpack(">QI", body)
                data[at - offset : at - offset + size] = bytes(size)
                covered += size
            elif kind >> 15:
                error, size = struct.unpack_from(">IH", body)
                body[6 : 6 + size].decode()
                at = int.from_bytes(body[6 + size :], "big") if kind == 0x8002 else None
                errors.append((error, at))
        assert covered == length or errors
        return bytes(data), errors

    def status(self, offset: int, length: int, flags: int = 0) -> dict[int, list]:
        """(length, flags) of the runs, by the number of the context."""
        self.request(STATUS, offset, length, flags)
        found = {}
        for kind, body in self.chunks(offset=offset):
            if self.is_extended:
                assert kind == 6
                number, count = struct.unpack_from(">II", body)
                values = struct.unpack(f">{2 * count}Q", body[8:])
            else:
                assert kind == 5
                (number,) = struct.unpack_from(">I", body)
                values = struct.unpack(f">{(len(body) - 4) // 4}I", body[4:])
            found[number] = list(zip(values[::2], values[1::2]))
        return found


@contextlib.contextmanager
def serving(*words: object, python: str = sys.executable, **options):
    """Run backy with these words until the block ends: an object with its log and its end."""
    process = Serving([python, str(PROGRAM), *map(str, words)], **options)
    try:
        process.wait_for("listening on ")
        yield process
    finally:
        process.end()


class Serving:
    """A server as a process of its own."""

    def __init__(self, words: list[str], **options) -> None:
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self.process = subprocess.Popen(words, stderr=write_fd, **options)
        os.close(write_fd)
        self.seen = ""

    @property
    def log(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while self.read_fd >= 0:
                piece = os.read(self.read_fd, 65536)
                if not piece:
                    break
                self.seen += piece.decode()
        return self.seen

    def wait_for(self, text: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < end and self.process.poll() is None, self.log
            time.sleep(0.01)

    @property
    def port(self) -> int:
        return int(self.log.split("nbd://127.0.0.1:")[1].split()[0])

    def forget_peak(self) -> None:
        """What it took to compile the program is not meant."""
        with open(f"/proc/{self.process.pid}/clear_refs", "w", encoding="ascii") as file:
            file.write("5")

    def memory(self, kind: str) -> int:
        """What it has in memory (VmRSS), or the most that it had (VmHWM), in KiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return int(file.read().split(f"{kind}:")[1].split()[0])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        if self.read_fd < 0:
            return self.process.returncode
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.log  # noqa: B018  # what it said at last
            os.close(self.read_fd)
            self.read_fd = -1
        return status


def connect(where: object, flags: int | None = 3) -> Client:
    """A client of a port or of a Unix socket."""
    if isinstance(where, int):
        return Client(socket.create_connection(("127.0.0.1", where)), flags)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(where))
    return Client(connection, flags)
