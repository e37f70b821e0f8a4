#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""backy keeps versions of virtual machine images on a copy-on-write file system.

Every revision is a complete raw image that shares its unchanged extents with
its siblings, so a disk comes back with `dd` and a revision goes with `rm`.
This one file is the whole program; it needs Python 3.8 and nothing else.

A chapter uses only what stands above it.  Chapters:

    Errors         what can go wrong, and the exit status of each
    Log            one logger; forms for the terminal and for a file
    Units          bytes, durations, times and tables, to text and back
    YAML           our subset: text to values, values to text
    Kernel         clone, punch, find data, pass by the page cache
    Files          replace durably, lock, sync
    Images         read, compare, write and hash images, by several threads
    Digests        the file beside an image that vouches for its bytes
    Revisions      one revision and its metadata
    Repository     all revisions of one job: find, create, remove
    Sources        what a source must do; plain files and block devices
    Progress       how far it is, for the person who waits
    Checks         an image read while it is held against its digests
    Repair         sound copies of bad blocks, found and put in their place
    Backup         a revision, step by step
    Verify         which blocks are looked at, and what that says
    Dedup          equal blocks, made to share one extent
    Restore        a revision back to a file, a device or a pipe
    Selftest       the main job, shown in a temporary directory
    Command line   the commands, then main()
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import itertools
import logging
import math
import mmap
import os
import re
import signal
import stat
import struct
import sys
import threading
import time
from bisect import bisect_right
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone
from enum import Enum
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Tuple
from typing import Sequence as ListLike

__version__ = "0.1.0"


# ==== Errors =================================================================
#
# A BackyError is what an operator can act on: one line, an exit status, no
# traceback.  Everything else is a defect of ours and shows its traceback.


class BackyError(Exception):
    """What was tried, on what, in whose words it failed; and what helps, if we know."""

    status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(BackyError):
    """A configuration says something that cannot be done."""


class Busy(BackyError):
    """Somebody else holds what is needed."""


class NotFound(BackyError):
    """There is no such thing; the message says what there is."""


class Distrusted(BackyError):
    """The bytes are not what they should be."""


class CloneUnsupported(BackyError):
    """Extents cannot be shared here."""


class Stopped(BaseException):
    """A signal asked us to end; not an Exception, so that nothing holds it up."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"ended by {signal.Signals(signal_number).name}")
        self.status = 128 + signal_number


@contextmanager
def explain(attempt: str) -> Iterator[None]:
    """Turn an OSError inside into a BackyError that begins with `attempt`."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room: backy forget, or whatever else is there" if full else ""
        raise BackyError(f"{attempt}: {e.strerror or e}", hint) from e


# ==== Log ====================================================================
#
# Results go to standard output, all else goes through this logger: to standard
# error, or with -l to a file.  Nothing that came from outside is printed or
# logged without passing printable().

log = logging.getLogger("backy")

# C0, DEL, C1, bidirectional controls, line separators, lone surrogates
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    """`text` on one line, with nothing in it that a terminal would obey."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


class TerminalForm(logging.Formatter):
    """Plain lines; what is not plain information says so."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        traceback = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        if record.levelno >= logging.ERROR:
            return f"backy: {text}{traceback}"
        if record.levelno >= logging.WARNING:
            return f"backy: warning: {text}{traceback}"
        return text


class FileForm(logging.Formatter):
    """`2026-11-22 04:12:46 [9008] INFO text`, in UTC, as backy 2.x wrote it."""

    converter = time.gmtime

    def __init__(self) -> None:
        super().__init__("%(asctime)s [%(process)d] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


def start_log(path: str | None, verbose: bool, quiet_stderr: bool = False) -> bool:
    """Log to `path` (errors also to standard error) and return True, or to standard error.

    A file that cannot be opened costs a warning, never the work.  It is opened
    again when it was renamed, so logrotate needs no signal.
    """
    logging.raiseExceptions = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
    log.handlers.clear()
    terminal: logging.Handler = logging.NullHandler() if quiet_stderr else logging.StreamHandler()
    terminal.setFormatter(TerminalForm())
    log.addHandler(terminal)
    if path is None:
        return False
    from logging.handlers import WatchedFileHandler

    try:
        handler = WatchedFileHandler(path, encoding="utf-8")
    except OSError as e:
        log.warning("cannot open log file %s: %s", printable(path), e.strerror)
        return False
    handler.setFormatter(FileForm())
    terminal.setLevel(logging.ERROR)
    log.addHandler(handler)
    return True


def output(text: str) -> None:
    """Print a result.  Raises BackyError when nobody can receive it."""
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(1, data) :]
    except BrokenPipeError:
        raise
    except OSError as e:
        raise BackyError(f"cannot write to standard output: {e.strerror}") from e


# ==== Units ==================================================================
#
# Sizes are bytes, durations are timedelta or float seconds, times are aware and
# UTC.  Sizes and tables look as the manual of backy 2.x prints them.

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
UTC = timezone.utc
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def format_size(size: int) -> str:
    """`192.00 kiB`, `1 Byte`, `1024.00 TiB`."""
    if size < KiB:
        return f"{size} Byte" if size == 1 else f"{size} Bytes"
    value = float(size)
    for unit in ("Bytes", "kiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.2f} {unit}"


def format_clock(seconds: float) -> str:
    """`1:19`, `2:03:07`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def format_time_json(moment: datetime | None) -> str | None:
    return moment and moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_duration(text: str) -> timedelta:
    """An integer with s, m, h, d or w; without one it is seconds.  Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text, re.ASCII)
    if not match:
        raise ValueError(f"{text!r} is no duration: a number and one of s, m, h, d, w")
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2] or "s"]
    return timedelta(seconds=int(match[1]) * unit)


TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(\.[0-9]{1,6})?)?"
    r" ?(Z|UTC|[+-][0-9]{2}:?[0-9]{2})?)?",
    re.ASCII,
)


def parse_period(text: str) -> tuple[datetime, datetime] | None:
    """The first and the last moment that an ISO date or time means, or None if it is neither.

    `2026-11-05` is that day to its end, `2026-11-05T10:15` that minute; without
    a zone it is UTC, which is what all our tables show.
    """
    match = TIME.fullmatch(text)
    if not match:
        return None
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    try:
        parts = map(int, (year, month, day, hour or 0, minute or 0, second or 0))
        start = datetime(*parts, tzinfo=UTC)
        if zone and zone not in ("Z", "UTC"):
            offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
            start -= offset if zone[0] == "+" else -offset
        if fraction:
            start += timedelta(microseconds=int(fraction[1:].ljust(6, "0")))
            return start, start
        step = 1 if second else 60 if hour else 86400
        return start, start + timedelta(seconds=step) - MICROSECOND
    except (ValueError, OverflowError):
        return None


def parse_time(text: str) -> datetime | None:
    """The last moment that an ISO date or time means, or None if it is neither."""
    period = parse_period(text)
    return period and period[1]


def format_table(
    columns: ListLike[str], rows: Iterable[ListLike[str]], right: ListLike[str] = ()
) -> str:
    """An ASCII grid; the columns named in `right` are set flush right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+\n"

    def line(cells: ListLike[str]) -> str:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, cells, widths)
        ]
        return f"| {' | '.join(padded)} |\n"

    return rule + line(columns) + rule + "".join(map(line, rows)) + rule


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (restore?)` when `word` looks like one of `known`, else nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return f" ({close[0]}?)" if close else ""


# ==== YAML ===================================================================
#
# The part of YAML that people and dumpers write into our files: text to nodes,
# values to text.  Types come from the schema, so every scalar is read as text
# and remembers its place; resolve() is for values that no schema knows.  What
# may mean two things is refused, and parsing takes time linear in the text.

MAX_YAML_TEXT = 1 << 20  # bytes
MAX_YAML_DEPTH = 64  # collections inside one another
MAX_YAML_NODES = 200_000  # with every alias counted as a copy

# Raw control characters, the line ends that only YAML 1.1 knows, surrogates and stray BOMs.
FORBIDDEN_CHARACTER = re.compile(
    "[^\t\n -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
DOCUMENT_MARKER = re.compile(r"^(?:---|\.\.\.)(?=[ \t\n]|\Z)", re.MULTILINE)
BETWEEN_TOKENS = re.compile(r"(?:[ \n]|(?<![^ \n])#[^\n]*)*")  # blanks, line ends and comments
INDICATOR = re.compile(r"[-?:](?=[ \t\n]|\Z)")
LINE_END = re.compile(r" *\n[ \n]*")
ANCHOR_NAME = re.compile(r"[&*]([0-9A-Za-z_-]+)(?=[ \t\n,\]}]|\Z)")
BLOCK_HEADER = re.compile(r"[|>](?:([1-9])([-+]?)|([-+]?)([1-9]?)) *(?:(?<= )#[^\n]*)?(?:\n|\Z)")
LEADING_BLANKS = re.compile(r"[ \n]*")

# Where one line of a plain scalar ends, and the colon that makes a scalar a key.
BLOCK_END = re.compile(r"[\t\n]|(?<= )#|:(?=[ \t\n]|\Z)|\Z")
FLOW_END = re.compile(r"[\t\n,\[\]{}]|(?<= )#|:(?=[ \t\n,\[\]{}]|\Z)|\Z")
BLOCK_COLON = re.compile(r" *:(?=[ \t\n]|\Z)")
FLOW_COLON = re.compile(r" *:")

# The pieces of a quoted scalar; exactly one group matches: text, line ends to fold,
# blanks, an escape, the closing quote.
QUOTED = {
    "'": re.compile(r"([^' \t\n]+)|([ \t]*\n[ \t\n]*)|([ \t]+)|'(')|(')"),
    '"': re.compile(
        r"([^\"\\ \t\n]+)|([ \t]*\n[ \t\n]*)|([ \t]+)"
        r"|\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\n[ \t\n]*|[^xuU\n])|(\")"
    ),
}
ESCAPES = {"0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
ESCAPES.update({"e": "\x1b", '"': '"', "\\": "\\", "N": "\x85", "_": "\xa0", "L": "\u2028"})
ESCAPES.update({"P": "\u2029"})
ESCAPE_OF = {char: letter for letter, char in ESCAPES.items()}
ESCAPES.update({"/": "/", " ": " ", "\t": "\t"})  # read, not written

# What a plain scalar means in YAML 1.1; see yaml.org/type.
PLAIN_NULL = {"", "~", "null", "Null", "NULL"}
PLAIN_TRUE = {"yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"}
PLAIN_FALSE = {"no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"}
PLAIN_INTEGER = re.compile(
    r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*(?::[0-5]?[0-9])*)"
)
PLAIN_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*(?:(?::[0-5]?[0-9])+\.[0-9_]*|\.[0-9_]*(?:[eE][-+][0-9]+)?)"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
PLAIN_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
PLAIN_TIMESTAMP = re.compile(
    r"([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})(?:[Tt]|[ \t]+)([0-9]{1,2}):([0-9]{2}):([0-9]{2})"
    r"(?:\.([0-9]*))?(?:[ \t]*(Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?"
)
PLAIN_ODD = re.compile(r"[-+]?\.[0-9_]+|=|<<")  # refused by PyYAML, or a number to old ones
MAX_PLAIN_NUMBER = 256  # characters; int() is slow on long texts

NOT_PLAIN = re.compile(
    r"^(?:---|\.\.\.|[ #,\[\]{}&*!|>'\"%@`]|[-?:](?: |\Z))|:(?: |\Z)| #| \Z"  # anywhere
)
NOT_PLAIN_IN_FLOW = re.compile(NOT_PLAIN.pattern + r"|[,?:\[\]{}]")


# Documents of lines like `key: 2026-11-05 10:15`, `key: {a: 1, b: c}`, `key: [a, b]` and no other.
SHORT_NAME = "[a-z][0-9a-z_-]*"
SHORT_WORD = re.compile("[0-9A-Za-z]+(?:(?: [.+/-]*|[.+/-]+)[0-9A-Za-z]+)*")
SHORT_PAIR = re.compile(f"({SHORT_NAME}): ({SHORT_WORD.pattern})")
SHORT_TEXT = re.compile(
    f"(?:{SHORT_NAME}: (?:[0-9A-Za-z]+(?:(?: [.+/-]*|[.+/:-]+)[0-9A-Za-z]+)*"
    rf"|\{{{SHORT_PAIR.pattern}(?:, {SHORT_PAIR.pattern})*\}}"
    rf"|\[{SHORT_WORD.pattern}(?:, {SHORT_WORD.pattern})*\])\n)+"
)


class YAMLError(BackyError):
    """The text is not YAML, or not of our subset; `line` and `column` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"{line}:{column}: {message}")
        self.message = message
        self.line = line
        self.column = column


class Node:
    """A piece of a YAML document and the place, counted from 1, where it starts."""

    line: int
    column: int


@dataclass(frozen=True)
class Scalar(Node):
    """One text; `plain` if it was not quoted.  An empty value is plain and empty."""

    text: str
    plain: bool
    line: int
    column: int


@dataclass(frozen=True)
class Sequence(Node):
    """A list of nodes."""

    items: list[Node]
    line: int
    column: int


@dataclass(frozen=True)
class Mapping(Node):
    """Key texts in the order of the document, each with the key itself and its value."""

    entries: dict[str, tuple[Scalar, Node]]
    line: int
    column: int


class Anchored(NamedTuple):
    """A node that aliases may stand for, how many nodes it holds and how deep they go."""

    node: Node
    size: int
    height: int


def fold_line_ends(line_ends: int) -> str:
    """What stands for so many line ends inside a folded scalar."""
    return "\n" * (line_ends - 1) or " "


def fold_block(lines: list[str]) -> str:
    """The text of a `>` scalar; lines that start with a blank keep their line ends."""
    parts: list[str] = []
    last = ""
    blank_lines = 0
    for line in lines:
        if not line:
            blank_lines += 1
            continue
        if last and (last[0] in " \t" or line[0] in " \t"):
            parts.append("\n")
        elif last and not blank_lines:
            parts.append(" ")
        parts.append("\n" * blank_lines + line)
        last, blank_lines = line, 0
    return "".join(parts)


class YAMLParser:
    """Reads one document by recursive descent.

    The methods share `pos`.  Those that read block style leave it at the next
    token, which is then the first on its line; those that read inline (scalars and
    flow style) leave it right behind what they read.  Columns count from 0 in here.
    """

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        self.pos = 0
        self.depth = 0
        self.deepest = 0
        self.count = 0
        self.anchors: dict[str, Anchored | None] = {}  # None while it is being read

    def document(self) -> Node:
        """The document's root."""
        self.check_characters()
        self.find_document()
        root = self.node(-1, -1, beside=False)
        if self.char():
            self.fail("text after the end of the document's value, check the indentation")
        return root

    def check_characters(self) -> None:
        bad = FORBIDDEN_CHARACTER.search(self.text)
        if bad:
            name = f"U+{ord(bad[0]):04X}"
            self.fail(f"control character {name}, use an escape in double quotes", bad.start())

    def find_document(self) -> None:
        """Go to the document's start and cut the text at its end."""
        self.skip()
        if self.char() == "%" and self.column() == 0:
            self.fail("directives ('%') are not supported")
        opening = DOCUMENT_MARKER.match(self.text, self.pos)
        self.pos = opening.end() if opening and opening[0] == "---" else 0
        closing = DOCUMENT_MARKER.search(self.text, self.pos)
        if closing:
            rest = BETWEEN_TOKENS.match(self.text, closing.end())
            if closing[0] == "---" or rest.end() < len(self.text):
                self.fail("several documents in one file are not supported", closing.start())
            self.text = self.text[: closing.start()]

    # Places

    def place(self, pos: int) -> tuple[int, int]:
        """Line and column of `pos`, counted from 1."""
        line = bisect_right(self.line_starts, pos)
        return line, pos - self.line_starts[line - 1] + 1

    def column(self) -> int:
        return self.place(self.pos)[1] - 1

    def char(self) -> str:
        """The character at `pos`, empty at the end."""
        return self.text[self.pos : self.pos + 1]

    def fail(self, message: str, pos: int | None = None) -> NoReturn:
        raise YAMLError(message, *self.place(self.pos if pos is None else pos))

    def skip(self) -> bool:
        """Go to the next token; tells whether that is the first one on its line."""
        start = self.pos
        self.pos = BETWEEN_TOKENS.match(self.text, start).end()
        below = start == 0 or "\n" in self.text[start : self.pos]
        if self.char() == "\t":
            self.fail(f"tab {'in the indentation' if below else 'between words'}, use blanks")
        return below

    def end_line(self) -> None:
        """Go to the next token after a value, which must be on another line."""
        if not self.skip() and self.char():
            self.fail(f"unexpected '{self.char()}' after a value, quote all that belongs to it")

    def enter(self) -> None:
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        if self.deepest > MAX_YAML_DEPTH:
            self.fail(f"nested deeper than {MAX_YAML_DEPTH} levels")

    def scalar(self, text: str, plain: bool, start: int) -> Scalar:
        return Scalar(text, plain, *self.place(start))

    # Block style

    def node(self, indent: int, list_column: int, *, beside: bool) -> Node:
        """The node after an indicator: the rest of its line, or the deeper lines below.

        `indent` is the column of the collection around it.  A list below may start at
        `list_column`.  With `beside` a collection may start on the same line (`- a: 1`).
        """
        start = self.pos
        below = self.skip()
        self.count += 1
        least = list_column if self.at_dash() else indent + 1
        if not self.char() or (below and self.column() < least):
            return self.scalar("", True, start)
        if self.char() == "&":
            return self.anchored(lambda: self.node(indent, list_column, beside=False))
        if self.at_dash():
            if not (below or beside):
                self.fail("a list must start on a line of its own")
            return self.sequence(indent)
        if self.char() in "|>":
            return self.block_scalar(indent)
        return self.inline(indent, below or beside)

    def at_dash(self) -> bool:
        return self.char() == "-" and bool(INDICATOR.match(self.text, self.pos))

    def inline(self, indent: int, key_allowed: bool) -> Node:
        """A value that starts on this line, or the mapping whose first key stands here."""
        start = self.pos
        if self.char() in "[{*":
            node = self.flow_node()
            self.end_line()
            return node
        scalar = self.first_line(BLOCK_END)
        colon = BLOCK_COLON.match(self.text, self.pos)
        if colon and key_allowed:
            return self.mapping(scalar, start)
        if colon and scalar.plain:
            self.fail("': ' inside a plain value, quote the value", colon.end() - 1)
        if scalar.plain:
            scalar = self.continued(scalar, BLOCK_END, indent)
        self.end_line()
        return scalar

    def sequence(self, indent: int) -> Sequence:
        place = self.place(self.pos)
        column = self.column()
        items: list[Node] = []
        self.enter()
        while self.at_dash() and self.column() == column:
            self.pos += 1
            items.append(self.node(column, column + 1, beside=True))
        self.depth -= 1
        if self.char() and self.column() > column:
            self.fail("the indentation fits no line above")
        if self.char() and self.column() == column > indent:
            self.fail("expected '- ' as on the lines above")
        return Sequence(items, *place)

    def mapping(self, key: Scalar, start: int) -> Mapping:
        """The mapping whose first key was just read and started at `start`."""
        place = self.place(start)
        column = place[1] - 1
        entries: dict[str, tuple[Scalar, Node]] = {}
        self.enter()
        while True:
            self.check_key(key, entries, BLOCK_COLON)
            entries[key.text] = key, self.node(column, column, beside=False)
            if not self.char() or self.column() < column:
                break
            if self.column() > column:
                self.fail("the indentation fits no line above")
            if self.at_dash():
                self.fail("a list entry cannot stand among the keys of a mapping")
            key = self.first_line(BLOCK_END)
        self.depth -= 1
        return Mapping(entries, *place)

    def check_key(self, key: Scalar, entries: dict, colon: re.Pattern[str]) -> None:
        """Go past the colon behind `key`, which must be one line and new in `entries`."""
        found = colon.match(self.text, self.pos)
        if not found:
            self.fail(f"no ':' after key {key.text[:40]!r}, quote a value that holds brackets")
        place = (key.line, key.column)
        if key.line != self.place(self.pos)[0]:
            raise YAMLError("a key must stand on one line", *place)
        if key.plain and key.text == "<<":
            raise YAMLError("merge keys ('<<') are not supported", *place)
        if key.text in entries:
            first = entries[key.text][0].line
            raise YAMLError(f"duplicate key {key.text[:40]!r}, first on line {first}", *place)
        self.pos = found.end()

    def block_scalar(self, indent: int) -> Scalar:
        """A literal (`|`) or folded (`>`) scalar."""
        start = self.pos
        header = BLOCK_HEADER.match(self.text, start)
        if not header:
            self.fail(f"unexpected text after '{self.char()}', quote the value")
        digit, chomp = header[1] or header[4], header[2] or header[3]
        self.pos = header.end()
        width = max(indent, 0) + int(digit or 1)
        if not digit:
            blanks = LEADING_BLANKS.match(self.text, self.pos)[0]
            width = max(width, *map(len, blanks.split("\n")))
        text = self.block_lines(width)
        body = text.rstrip("\n")
        tail = text[len(body) :]
        if header[0][0] == ">":
            body = fold_block(body.split("\n"))
        self.skip()
        ending = {"-": "", "+": tail}.get(chomp or "", tail[:1] if body else "")
        return self.scalar(body + ending, False, start)

    def block_lines(self, width: int) -> str:
        """The lines from here that are blank or indented by `width`, without that indent."""
        lines: list[str] = []
        while self.pos < len(self.text):
            end = self.text.find("\n", self.pos) + 1 or len(self.text)
            line = self.text[self.pos : end]
            if line[:width].strip(" \n"):
                break
            lines.append(line[width:] or line.lstrip(" "))
            self.pos = end
        return "".join(lines)

    # Flow style

    def flow_node(self) -> Node:
        self.skip()
        self.count += 1
        char = self.char()
        if char == "&":
            return self.anchored(self.flow_node)
        if char == "*":
            return self.alias()
        if char == "[":
            return self.flow_sequence()
        if char == "{":
            return self.flow_mapping()
        scalar = self.first_line(FLOW_END)
        return self.continued(scalar, FLOW_END, -1) if scalar.plain else scalar

    def flow_sequence(self) -> Sequence:
        place = self.place(self.pos)
        items: list[Node] = []
        for _ in self.flow_entries("]"):
            items.append(self.flow_node())
            if FLOW_COLON.match(self.text, self.pos):
                self.fail("a mapping inside [ ] needs { } around it")
        return Sequence(items, *place)

    def flow_mapping(self) -> Mapping:
        place = self.place(self.pos)
        entries: dict[str, tuple[Scalar, Node]] = {}
        for _ in self.flow_entries("}"):
            key = self.first_line(FLOW_END)
            self.check_key(key, entries, FLOW_COLON)
            start = self.pos
            self.skip()
            empty = self.char() in ("", ",", "}")
            value = self.scalar("", True, start) if empty else self.flow_node()
            entries[key.text] = key, value
        return Mapping(entries, *place)

    def flow_entries(self, closing: str) -> Iterator[None]:
        """Stop at each entry, for the caller to read it, and end behind `closing`."""
        start = self.pos
        self.enter()
        self.pos += 1
        while True:
            self.skip()
            if self.char() == closing:
                break
            if self.char():
                yield
                self.skip()
            if not self.char():
                self.fail(f"'{self.text[start]}' is never closed", start)
            if self.char() == ",":
                self.pos += 1
            elif self.char() != closing:
                self.fail(f"expected ',' or '{closing}' instead of '{self.char()}'")
        self.pos += 1
        self.depth -= 1

    # Anchors

    def anchored(self, read: Callable[[], Node]) -> Node:
        """The node that `read` finds after an anchor, remembered for its aliases."""
        start = self.pos
        name = self.name()
        if name in self.anchors:
            self.fail(f"anchor '&{name}' was already given above", start)
        ahead = BETWEEN_TOKENS.match(self.text, self.pos).end()
        if self.text[ahead : ahead + 1] in ("&", "*"):
            self.fail("an anchor must stand before a value, not before an anchor or alias")
        self.anchors[name] = None
        count, deepest, self.deepest = self.count, self.deepest, self.depth
        node = read()
        self.anchors[name] = Anchored(node, self.count - count, self.deepest - self.depth)
        self.deepest = max(deepest, self.deepest)
        return node

    def alias(self) -> Node:
        start = self.pos
        name = self.name()
        target = self.anchors.get(name)
        if target is None:
            self.fail(f"unknown alias '*{name}'", start)
        self.count += target.size
        self.deepest = max(self.deepest, self.depth + target.height)
        if self.deepest > MAX_YAML_DEPTH:
            self.fail(f"nested deeper than {MAX_YAML_DEPTH} levels by alias '*{name}'", start)
        if self.count > MAX_YAML_NODES:
            self.fail(f"the aliases stand for more than {MAX_YAML_NODES} nodes", start)
        return target.node

    def name(self) -> str:
        match = ANCHOR_NAME.match(self.text, self.pos)
        if not match:
            self.fail(f"no name of letters, digits, '-' and '_' after '{self.char()}'")
        self.pos = match.end()
        return match[1]

    # Scalars

    def first_line(self, end: re.Pattern[str]) -> Scalar:
        """A quoted scalar, or the first line of a plain one (all of it in a key)."""
        start = self.pos
        if self.char() in QUOTED:
            return self.quoted()
        self.check_plain(end is FLOW_END)
        text = self.text[start : end.search(self.text, start).start()].rstrip(" ")
        self.pos = start + len(text)
        return self.scalar(text, True, start)

    def check_plain(self, in_flow: bool) -> None:
        """Refuse what cannot start a plain scalar."""
        char = self.char()
        alone = INDICATOR.match(self.text, self.pos)
        if not char:
            self.fail("the text ends where a value should be")
        if char == "!":
            self.fail("tags ('!') are not supported")
        if char in "&*[{":
            self.fail("a key must be plain or quoted text, without anchor, alias or brackets")
        if char in "]}":
            self.fail(f"'{char}' closes nothing here")
        if char == "," and in_flow:
            self.fail("nothing stands before this ','")
        if char == "?" and alone:
            self.fail("complex keys ('? ') are not supported")
        if alone or (in_flow and char in "?:"):
            self.fail(f"unexpected '{char}', quote it if it is text")
        if char in "#,|>%@`":
            self.fail(f"a plain value cannot start with '{char}', quote it")

    def continued(self, first: Scalar, end: re.Pattern[str], indent: int) -> Scalar:
        """The plain scalar `first` together with the lines that continue it."""
        parts = [first.text]
        while True:
            gap = LINE_END.match(self.text, self.pos)
            start = gap.end() if gap else len(self.text)
            if self.text[start : start + 1] in ("", "#", "\t"):
                break
            if self.place(start)[1] - 1 <= indent:
                break
            stop = end.search(self.text, start).start()
            line = self.text[start:stop].rstrip(" ")
            if not line:
                break
            if self.text[stop : stop + 1] == ":":
                self.fail("': ' in the continuation of a plain value, check the indentation", stop)
            parts += fold_line_ends(gap[0].count("\n")), line
            self.pos = start + len(line)
        return Scalar("".join(parts), True, first.line, first.column)

    def quoted(self) -> Scalar:
        start = self.pos
        pieces = QUOTED[self.char()]
        parts: list[str] = []
        self.pos += 1
        while True:
            piece = pieces.match(self.text, self.pos)
            if not piece:
                self.fail_in_quotes(start)
            self.pos = piece.end()
            if piece.lastindex == 5:
                return self.scalar(self.join_surrogates("".join(parts), start), False, start)
            text = piece[piece.lastindex]
            if piece.lastindex == 2:
                text = fold_line_ends(text.count("\n"))
            elif piece.lastindex == 4 and pieces is QUOTED['"']:
                text = self.unescape(text, piece.start())
            parts.append(text)

    def fail_in_quotes(self, start: int) -> NoReturn:
        if self.pos + 1 < len(self.text) and self.char() == "\\":
            self.fail("incomplete escape in double quotes")
        self.fail(f"no closing {self.text[start]} for this one", start)

    def unescape(self, escape: str, pos: int) -> str:
        """What `escape`, without its backslash, stands for."""
        if escape[0] == "\n":
            return "\n" * (escape.count("\n") - 1)
        if len(escape) == 1 and escape in ESCAPES:
            return ESCAPES[escape]
        if len(escape) == 1 or int(escape[1:], 16) > 0x10FFFF:
            self.fail(f"unknown escape '\\{escape}' in double quotes", pos)
        return chr(int(escape[1:], 16))

    def join_surrogates(self, text: str, start: int) -> str:
        """JSON writes one character beyond U+FFFF as two escapes."""
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.fail("half of a surrogate pair in double quotes", start)


def parse_short_lines(text: str) -> Mapping | None:
    """What YAMLParser makes of `text`, ten times faster, if it is as plain as our own metadata."""
    if not SHORT_TEXT.fullmatch(text):
        return None
    entries: dict[str, tuple[Scalar, Node]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, _, value = line.partition(": ")
        column = len(key) + 3
        node: Node
        if value[0] == "{":
            pairs: dict[str, tuple[Scalar, Node]] = {}
            for match in SHORT_PAIR.finditer(value):
                at = column + match.start()
                name = Scalar(match[1], True, number, at)
                pairs[match[1]] = name, Scalar(match[2], True, number, column + match.start(2))
            node = Mapping(pairs, number, column)
            if len(pairs) < value.count(": "):
                return None
        elif value[0] == "[":
            words = [
                Scalar(match[0], True, number, column + match.start())
                for match in SHORT_WORD.finditer(value)
            ]
            node = Sequence(list(words), number, column)
        else:
            node = Scalar(value, True, number, column)
        if key in entries:
            return None
        entries[key] = Scalar(key, True, number, 1), node
    return Mapping(entries, 1, 1)


def parse_yaml(text: str) -> Node:
    """The root of the document in `text`; an empty document is an empty scalar."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_YAML_TEXT:
        raise YAMLError(f"longer than {MAX_YAML_TEXT} bytes", 1, 1)
    short = parse_short_lines(text) if len(text) < 4096 else None
    if short is not None:
        return short
    return YAMLParser(text[1:] if text.startswith("\ufeff") else text).document()


def plain_sexagesimal(text: str, number: Callable[[str], float]) -> float:
    """`1:30:00` is 5400; a text without colons is just the number."""
    places = reversed(text.split(":"))
    return sum(number(digits) * 60**place for place, digits in enumerate(places))


def plain_integer(text: str) -> int:
    sign = -1 if text[0] == "-" else 1
    digits = text.lstrip("-+").replace("_", "")
    if ":" in digits:
        return sign * int(plain_sexagesimal(digits, int))
    bases = {"0b": 2, "0x": 16}
    return sign * int(digits, bases.get(digits[:2], 8 if digits[0] == "0" else 10))


def plain_float(text: str) -> float:
    sign = -1.0 if text[0] == "-" else 1.0
    digits = text.lstrip("-+").replace("_", "").lower()
    if digits in (".inf", ".nan"):
        return sign * float(digits[1:])
    return sign * plain_sexagesimal(digits, float)


def plain_timestamp(match: re.Match[str]) -> datetime:
    """Aware and UTC if the text names a zone, else naive."""
    *numbers, fraction, zone = match.groups()
    microseconds = int((fraction or "")[:6].ljust(6, "0"))
    time = datetime(*map(int, numbers), microseconds)
    if zone is None:
        return time
    if zone != "Z":
        hours, _, minutes = zone[1:].partition(":")
        offset = timedelta(hours=int(hours), minutes=int(minutes or 0))
        time += offset if zone[0] == "-" else -offset
    return time.replace(tzinfo=timezone.utc)


def plain_value(text: str) -> object:
    """The value of a plain scalar; raises ValueError or OverflowError if it has none."""
    if text in PLAIN_NULL:
        return None
    if text in PLAIN_TRUE or text in PLAIN_FALSE:
        return text in PLAIN_TRUE
    if len(text) > MAX_PLAIN_NUMBER:
        return text
    if PLAIN_INTEGER.fullmatch(text):
        return plain_integer(text)
    if PLAIN_FLOAT.fullmatch(text):
        return plain_float(text)
    if PLAIN_DATE.fullmatch(text):
        return date(*map(int, text.split("-")))
    timestamp = PLAIN_TIMESTAMP.fullmatch(text)
    return plain_timestamp(timestamp) if timestamp else text


def resolve(node: Node) -> object:
    """The value that PyYAML's SafeLoader gives for `node`; text if it has no valid one."""
    if isinstance(node, Mapping):
        return {resolve(key): resolve(value) for key, value in node.entries.values()}
    if isinstance(node, Sequence):
        return [resolve(entry) for entry in node.items]
    if not node.plain:
        return node.text
    try:
        return plain_value(node.text)
    except (ValueError, OverflowError):
        return node.text


def has_type(text: str) -> bool:
    """Whether PyYAML, old or new, reads a plain `text` as anything but text."""
    if text in PLAIN_NULL or text in PLAIN_TRUE or text in PLAIN_FALSE:
        return True
    return any(
        form.fullmatch(text)
        for form in (PLAIN_INTEGER, PLAIN_FLOAT, PLAIN_DATE, PLAIN_TIMESTAMP, PLAIN_ODD)
    )


def escape_character(char: str) -> str:
    code = ord(char)
    if char in ESCAPE_OF:
        return "\\" + ESCAPE_OF[char]
    if code > 0xFFFF:
        return f"\\U{code:08X}"
    return f"\\u{code:04X}" if code > 0xFF else f"\\x{code:02X}"


def format_string(text: str, in_flow: bool) -> str:
    """A string: plain if it is read back as such, else quoted; always one ASCII line."""
    if not re.fullmatch("[ -~]*", text):
        return '"' + re.sub(r"[^ -~]|[\"\\]", lambda char: escape_character(char[0]), text) + '"'
    if has_type(text) or (NOT_PLAIN_IN_FLOW if in_flow else NOT_PLAIN).search(text):
        return "'" + text.replace("'", "''") + "'"
    return text


def format_yaml_float(value: float) -> str:
    text = repr(value)
    if text in ("nan", "inf", "-inf"):
        return text.replace("nan", ".nan").replace("inf", ".inf")
    return text if "." in text else text.replace("e", ".0e")


def format_scalar(value: object, in_flow: bool = False) -> str:
    """A scalar as one word or one quoted text."""
    if isinstance(value, Scalar):
        if value.plain and has_type(value.text):
            return value.text or "null"
        value = value.text
    if isinstance(value, str):
        return format_string(value, in_flow)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return format_yaml_float(value)
    if isinstance(value, datetime):
        return (value.astimezone(timezone.utc) if value.tzinfo else value).isoformat(" ")
    if isinstance(value, (int, date)):
        return str(value)
    raise TypeError(f"no YAML for {type(value).__name__}")


def yaml_children(value: object) -> list | dict | None:
    """A collection's own list or dict (from node to node), None for a scalar."""
    if isinstance(value, Mapping):
        return dict(value.entries.values())
    if isinstance(value, Sequence):
        return value.items
    return value if isinstance(value, (list, dict)) else None


def sorted_entries(mapping: dict) -> list[tuple[object, object]]:
    def text(entry: tuple[object, object]) -> str:
        return entry[0].text if isinstance(entry[0], Scalar) else str(entry[0])

    return sorted(mapping.items(), key=text)


def fits_flow(value: object) -> bool:
    """Whether `value` is a scalar that old PyYAML reads inside brackets: no time does."""
    if isinstance(value, Scalar) and value.plain and has_type(value.text):
        return ":" not in value.text
    return yaml_children(value) is None and not isinstance(value, datetime)


def is_inline(value: object) -> bool:
    """Whether `value` is written on the line of its key: a scalar or a leaf collection."""
    inside = yaml_children(value)
    if isinstance(inside, dict):
        return all(fits_flow(part) for entry in inside.items() for part in entry)
    return inside is None or all(map(fits_flow, inside))


def format_inline(value: object) -> str:
    inside = yaml_children(value)
    if inside is None:
        return format_scalar(value)
    if isinstance(inside, list):
        return "[" + ", ".join(format_scalar(entry, True) for entry in inside) + "]"
    pairs = ((format_scalar(part, True) for part in pair) for pair in sorted_entries(inside))
    return "{" + ", ".join(map(": ".join, pairs)) + "}"


def format_block(value: object) -> list[str]:
    """The lines of a collection in block style."""
    inside = yaml_children(value)
    lines: list[str] = []
    if isinstance(inside, dict):
        for key, entry in sorted_entries(inside):
            if is_inline(entry):
                lines.append(f"{format_scalar(key)}: {format_inline(entry)}")
                continue
            indent = "" if isinstance(yaml_children(entry), list) else "  "
            lines.append(f"{format_scalar(key)}:")
            lines += [indent + line for line in format_block(entry)]
        return lines
    for entry in inside or ():
        first, *others = [format_inline(entry)] if is_inline(entry) else format_block(entry)
        lines.append(f"- {first}")
        lines += [f"  {line}" for line in others]
    return lines


def format_yaml(value: object, flow: bool = False) -> str:
    """`value` as 2.x wrote it: keys sorted, leaf collections in flow style.

    With `flow` also a mapping of nothing but scalars is written on one line.  Values
    are dict, list, str, int, float, bool, None, date, datetime and nodes.
    """
    inside = yaml_children(value)
    block = isinstance(inside, dict) and inside and not flow
    lines = format_block(value) if block or not is_inline(value) else [format_inline(value)]
    return "".join(line + "\n" for line in lines)


# ==== Kernel =================================================================
#
# Calls that Python has no name for, with the numbers of linux/fs.h and
# linux/falloc.h; the same on every architecture that backy is likely to meet.

# linux/fs.h: FICLONE = _IOW(0x94, 9, int)
FICLONE = 0x40049409
# linux/falloc.h, since Linux 5.6 for every file system: FS_IOC_UNRESVSP64 = _IOW('X', 43, ...)
FS_IOC_UNRESVSP64 = 0x4030582B
space_resv = struct.Struct("=hhiqqiI16x")  # type, whence, padding, start, length, sysid, pid
# linux/fs.h: BLKZEROOUT = _IO(0x12, 127), with start and length
BLKZEROOUT = 0x127F
# linux/fcntl.h: F_SETPIPE_SZ = F_LINUX_SPECIFIC_BASE + 7
F_SETPIPE_SZ = 1031
# linux/fs.h: FS_IOC_FSGETXATTR = _IOR('X', 31, struct fsxattr), FSSETXATTR = _IOW('X', 32, ...)
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
fsxattr = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
FS_XFLAG_COWEXTSIZE = 0x00010000

PAGE = 4 * KiB

# linux/fs.h: FICLONERANGE = _IOW(0x94, 13, struct file_clone_range)
FICLONERANGE = 0x4020940D
file_clone_range = struct.Struct("=qQQQ")  # src_fd, src_offset, src_length, dest_offset
# linux/fs.h: FIDEDUPERANGE = _IOWR(0x94, 54, struct file_dedupe_range), with one destination
FIDEDUPERANGE = 0xC0189436
file_dedupe_range = struct.Struct("=QQHHI qQQiI")  # offset, length, count; fd, offset, done, status
# linux/fiemap.h: FS_IOC_FIEMAP = _IOWR('f', 11, struct fiemap)
FS_IOC_FIEMAP = 0xC020660B
fiemap = struct.Struct("=QQIIII")  # start, length, flags, mapped_extents, extent_count
fiemap_extent = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
FIEMAP_FLAG_SYNC = 1
FIEMAP_EXTENT_LAST = 1
# unknown, delayed, encoded, encrypted, not aligned, inline, tail: no address to compare
FIEMAP_EXTENT_VAGUE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400

NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


def share_by(request: int, target_fd: int, argument: int | bytes) -> None:
    """One of the cloning calls; CloneUnsupported where extents cannot be shared, else OSError."""
    try:
        fcntl.ioctl(target_fd, request, argument)
    except OSError as e:
        if e.errno in (*NOT_SUPPORTED, errno.EXDEV):
            raise CloneUnsupported(f"cannot share extents: {e.strerror}") from e
        raise


def clone_file(origin_fd: int, target_fd: int) -> None:
    """Let the empty file `target_fd` share all extents of `origin_fd`.

    Raises CloneUnsupported where extents cannot be shared, OSError for all else.
    """
    share_by(FICLONE, target_fd, origin_fd)


def clone_range(
    origin_fd: int, offset: int, length: int, target_fd: int, target_offset: int
) -> None:
    """Let a part of `target_fd` share extents of `origin_fd`; all in bytes and whole blocks.

    Raises CloneUnsupported where that cannot be had, OSError for all else.
    """
    share_by(
        FICLONERANGE, target_fd, file_clone_range.pack(origin_fd, offset, length, target_offset)
    )


def dedupe_range(origin_fd: int, offset: int, length: int, other_fd: int, other_offset: int) -> int:
    """Let two ranges share extents if the kernel finds them equal; how many bytes now do."""
    argument = file_dedupe_range.pack(offset, length, 1, 0, 0, other_fd, other_offset, 0, 0, 0)
    answer = file_dedupe_range.unpack(fcntl.ioctl(origin_fd, FIDEDUPERANGE, argument))
    return answer[7] if answer[8] == 0 else 0


def extent_map(fd: int, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(logical, physical, length, flags) of the extents from `start` to `end`.  Raises OSError."""
    most = 500
    while start < end:
        buffer = bytearray(fiemap.size + most * fiemap_extent.size)
        fiemap.pack_into(buffer, 0, start, end - start, FIEMAP_FLAG_SYNC, 0, most, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        count = fiemap.unpack_from(buffer)[3]
        for number in range(count):
            extent = fiemap_extent.unpack_from(buffer, fiemap.size + number * fiemap_extent.size)
            start = extent[0] + extent[2]
            yield extent
            if extent[3] & FIEMAP_EXTENT_LAST:
                return
        if not count:
            return


def count_extents(fd: int) -> int:
    """How many extents a file has; raises OSError where that is not known."""
    argument = fiemap.pack(0, (1 << 63) - 1, 0, 0, 0, 0)
    return fiemap.unpack(fcntl.ioctl(fd, FS_IOC_FIEMAP, argument))[3]


def places(fd: int, start: int, end: int) -> list[tuple[int, int, int]] | None:
    """(logical, physical, length) of what is between `start` and `end`; None if not known."""
    found: list[tuple[int, int, int]] = []
    try:
        for logical, physical, length, flags in extent_map(fd, start, end):
            if flags & FIEMAP_EXTENT_VAGUE:
                return None
            first, last = max(logical, start), min(logical + length, end)
            if first >= last:
                continue
            at = physical + first - logical
            if found and found[-1][0] + found[-1][2] == first and found[-1][1] + found[-1][2] == at:
                found[-1] = (found[-1][0], found[-1][1], found[-1][2] + last - first)
            else:
                found.append((first, at, last - first))
    except OSError:
        return None
    return found


def share_extents(one_fd: int, other_fd: int, start: int, end: int) -> bool:
    """Whether two files have the same extents there: then they are equal, without reading."""
    one = places(one_fd, start, end)
    return one is not None and one == places(other_fd, start, end)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Free `length` bytes at `offset`, which then read as zeros; False where that cannot be had."""
    try:
        fcntl.ioctl(fd, FS_IOC_UNRESVSP64, space_resv.pack(0, os.SEEK_SET, 0, offset, length, 0, 0))
    except OSError as e:
        if e.errno in NOT_SUPPORTED:
            return False
        raise
    return True


def zero_device(fd: int, offset: int, length: int) -> bool:
    """Make a part of a block device read as zeros, in the cheapest way it has; False if none."""
    try:
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("=QQ", offset, length))
    except OSError as e:
        if e.errno in NOT_SUPPORTED:
            return False
        raise
    return True


def widen_pipe(fd: int) -> None:
    """Let a pipe hold 1 MiB, so that its two ends wait less for one another."""
    with suppress(OSError):  # not a pipe, or not allowed
        fcntl.fcntl(fd, F_SETPIPE_SZ, MiB)


def hint_small_copies(fd: int) -> None:
    """Ask XFS to unshare a page at a time; by default it reserves 128 KiB for each of them."""
    with suppress(OSError):  # advice only, and unknown outside XFS
        flags, size, _, project, _ = fsxattr.unpack(
            fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(fsxattr.size))
        )
        wanted = fsxattr.pack(flags | FS_XFLAG_COWEXTSIZE, size, 0, project, PAGE)
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, wanted)


def bypass_cache(fd: int) -> bool:
    """Make all reads of `fd` come from the medium (O_DIRECT); False where that cannot be had."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def drop_cache(fd: int, offset: int = 0, length: int = 0) -> None:
    """Start writing what is dirty in this range and forget what is clean; 0 is up to the end."""
    with suppress(OSError):  # advice only
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def read_ahead(fd: int, offset: int, length: int) -> None:
    """Begin to read so many bytes into the page cache; what reads them then hardly waits."""
    with suppress(OSError):  # advice only
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def give_memory_back() -> None:
    """Return to the system what starting has used; a few MiB were needed to compile this file."""
    import ctypes

    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def is_cached(fd: int, size: int) -> bool:
    """Whether most of the file is in the page cache, by a sample of 64 places.

    To ask for a page that is not there makes the kernel read it: another place
    each time, and forgotten afterwards, or the next answer would be wrong.
    """
    if not size:
        return True
    probe, missed = bytearray(1), []
    for number in os.urandom(8 * 64)[::8]:
        place = (size * number + int.from_bytes(os.urandom(8), "big") % size) // 256
        try:
            if os.preadv(fd, [probe], place, os.RWF_NOWAIT) == 0:
                missed.append(place)
        except BlockingIOError:
            missed.append(place)
        except OSError:  # no such call on this file system: leave its cache alone
            return True
    with suppress(OSError):
        for place in missed:
            os.preadv(fd, [probe], place)  # waits for that page, which cannot be dropped before
            drop_cache(fd, place - place % PAGE, PAGE)
    return len(missed) < 32


def device_writes(number: int) -> tuple[str, ...]:
    """The sectors that were written to and discarded on block device `number` since boot."""
    path = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat"
    with suppress(OSError), open(path, encoding="ascii") as file:
        fields = file.read().split()  # see block/stat.rst in the kernel's documentation
        return (fields[6], *fields[13:14])
    return ()


def disk_sequence(number: int) -> str:
    """What tells this disk from one that had the same number before (Linux 5.15); "" if unknown."""
    top = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if os.path.exists(f"{top}/partition"):
        top = os.path.dirname(top)
    with suppress(OSError), open(f"{top}/diskseq", encoding="ascii") as file:
        return file.read().strip()
    return ""


def files_below(number: int) -> list[str]:
    """The paths of the files that block device `number` is made of, by loop devices."""
    top = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if os.path.exists(f"{top}/partition"):
        top = os.path.dirname(top)
    found = []
    with suppress(OSError), open(f"{top}/loop/backing_file", encoding="utf-8") as file:
        found.append(file.read().rstrip("\n"))
    with suppress(OSError):
        for name in os.listdir(f"{top}/slaves"):
            with open(f"{top}/slaves/{name}/dev", encoding="ascii") as file:
                major, minor = file.read().split(":")
            found += files_below(os.makedev(int(major), int(minor)))
    return found


# ==== Files ==================================================================
#
# Names are resolved against a directory that is held open and links are never
# followed, so nobody can redirect us.  An fsync that failed is final: the kernel
# has thrown the data away, and the next fsync would say that all is well.

NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
TEMPORARY = ".backy-tmp-"


def open_directory(path: str) -> int:
    """A descriptor for the directory `path`, which must not itself be a symbolic link."""
    if not path:
        raise NotFound("the name of the directory is empty")
    try:
        return os.open(path.rstrip("/") or "/", os.O_DIRECTORY | os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENOTDIR) and os.path.islink(path.rstrip("/")):
            hint = f"use the real path, {printable(os.path.realpath(path))}"
            raise BackyError(f"{printable(path)} is a symbolic link", hint) from e
        if e.errno == errno.ENOENT:
            raise NotFound(f"{printable(path)}: no such directory") from e
        raise BackyError(f"cannot open directory {printable(path)}: {e.strerror}") from e


def close(fd: int) -> None:
    """Close `fd`; an error here says nothing that an fsync has not said before."""
    with suppress(OSError, MemoryError):
        os.close(fd)


def list_directory(dir_fd: int) -> list[str]:
    """All names, sorted; through a new descriptor, since one kept open is stale on btrfs."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
    try:
        return sorted(os.listdir(fd))
    finally:
        close(fd)


def state_of_inode(fd: int) -> str:
    """What changes when a file is written to, replaced or copied, but not when its medium rots."""
    status = os.fstat(fd)
    return f"{status.st_ino} {status.st_size} {status.st_ctime_ns}"


def file_type(dir_fd: int, name: str) -> int:
    """The S_IFMT bits of `name` itself, 0 if there is no such name."""
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return 0


def open_regular(dir_fd: int, name: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """Open the regular file `name`; a link, pipe or device of that name is an OSError."""
    fd = os.open(name, flags | NOFOLLOW, mode, dir_fd=dir_fd)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    close(fd)
    raise OSError(errno.EINVAL, "not a regular file")


def read_small(dir_fd: int, name: str, limit: int = MiB) -> bytes:
    """The contents of a regular file of at most `limit` bytes."""
    fd = open_regular(dir_fd, name)
    try:
        data = bytearray()
        while len(data) <= limit:
            piece = os.read(fd, limit + 1 - len(data))
            if not piece:
                return bytes(data)
            data += piece
        raise OSError(errno.EFBIG, f"larger than {format_size(limit)}")
    finally:
        close(fd)


def sync(fd: int) -> None:
    """Force a file or directory to the medium.  Once it failed, what was written is lost."""
    os.fsync(fd)


def write_all(fd: int, data: ListLike[int], offset: int) -> None:
    """Write all of `data`, bytes or a view of bytes, at `offset`."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        if done <= 0:
            raise OSError(errno.EIO, "nothing could be written")
        view = view[done:]
        offset += done


ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def new_id() -> str:
    """22 characters of base 57, 122 random bits and more: the ids of backy 2.x."""
    number = int.from_bytes(os.urandom(16), "big")
    digits = []
    for _ in range(22):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(digits)


def temporary_name() -> str:
    return TEMPORARY + new_id()


def is_temporary(name: str) -> bool:
    return re.fullmatch(re.escape(TEMPORARY) + "[0-9A-Za-z]{22}", name) is not None


def replace_file(dir_fd: int, name: str, data: bytes, mode: int) -> None:
    """Put `data` at `name`; after a crash there is the old file or the new one.

    What reached the medium is read back before the old file goes.
    """
    temporary = temporary_name()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW
    fd = os.open(temporary, flags, mode, dir_fd=dir_fd)
    try:
        try:
            write_all(fd, data, 0)
            os.fchmod(fd, mode)
            sync(fd)
            drop_cache(fd)
            if os.pread(fd, len(data) + 1, 0) != data:
                raise OSError(errno.EIO, "what was read back is not what was written")
        finally:
            close(fd)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise
    sync(dir_fd)


def replace_link(dir_fd: int, name: str, target: str) -> None:
    """Let the symbolic link `name` point to `target`; the caller syncs the directory."""
    temporary = temporary_name()
    os.symlink(target, temporary, dir_fd=dir_fd)
    try:
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise


def take_lock(fd: int, exclusive: bool = True, wait: bool = False) -> bool:
    """flock `fd`; False when somebody else holds it and we do not wait.

    The kernel frees it with the last descriptor, so there are no stale locks.
    """
    try:
        fcntl.flock(
            fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
        )
    except BlockingIOError:
        return False
    return True


# ==== Images =================================================================
#
# An image is read in units, by several threads, each with buffers of its own;
# it is hashed in blocks and written in pages.  Positional calls only, never
# mmap of a file: a source that shrinks would end us with SIGBUS.

BLOCK = 64 * KiB
UNIT = MiB
ZEROS = bytearray(UNIT)
WORKERS = 4
Span = Tuple[int, int]  # start and end, of bytes of a unit


def is_zero(view: memoryview) -> bool:
    return ZEROS.startswith(view)


class Buffers:
    """What one thread needs: page-aligned, as O_DIRECT wants it."""

    def __init__(self) -> None:
        import ctypes

        self.new = memoryview(mmap.mmap(-1, UNIT))
        self.room = bytearray(UNIT + PAGE)
        self.first = -ctypes.addressof(ctypes.c_char.from_buffer(self.room)) % PAGE
        self.old = memoryview(self.room)[self.first : self.first + UNIT]

    def equal(self, start: int, end: int) -> bool:
        """Whether both hold the same there; of all ways to ask, this one copies nothing."""
        return self.room.startswith(self.new[start:end], self.first + start)


def read_at(fd: int, view: memoryview, offset: int, length: int) -> int:
    """Read `length` bytes at `offset` to the start of `view`; fewer only where the file ends.

    `offset` and the room in `view` are whole pages, so that O_DIRECT works; a
    short read is taken up again at a page.
    """
    done = 0
    while done < length:
        start = done - done % PAGE
        got = os.preadv(fd, [view[start : -(-length // PAGE) * PAGE]], offset + start)
        if start + got <= done:
            break
        done = start + got
    return min(done, length)


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole, widened to whole pages; all where that is not known."""
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            last = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            if e.errno not in NOT_SUPPORTED:
                raise
            first, last = start, end
        if first >= end:
            return
        last = min(-(-max(last, first + 1) // PAGE) * PAGE, end)
        yield first - first % PAGE, last
        start = last


def units(size: int, *extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(offset, length) of all units that one of the extent lists touches, in order, each once."""
    lists = [iter(one) for one in extents]
    heads = [next(one, None) for one in lists]
    offset = 0
    while offset < size:
        nearest = size
        for number, head in enumerate(heads):
            while head is not None and head[1] <= offset:
                head = heads[number] = next(lists[number], None)
            if head is not None:
                nearest = min(nearest, head[0])
        if nearest >= size:
            return
        offset = max(offset, nearest - nearest % UNIT)
        yield offset, min(UNIT, size - offset)
        offset += UNIT


class Reader:
    """Reads an image in units; holes come back as zeros and cost nothing."""

    def __init__(self, fd: int, size: int, from_medium: bool) -> None:
        """With `from_medium` nothing is believed that only the page cache says."""
        self.fd, self.size = fd, size
        self.direct = from_medium and bypass_cache(fd)
        self.drop = (
            from_medium  # also with O_DIRECT, which btrfs does not keep to when it compresses
        )
        self.bytes_read = 0
        self.lock = threading.Lock()

    def extents(self) -> Iterator[tuple[int, int]]:
        return data_extents(self.fd, 0, self.size)

    def read(self, view: memoryview, offset: int, length: int) -> None:
        """Fill `view` with `length` bytes from `offset`; raises OSError, EOFError where it ends."""
        filled = 0
        for start, end in data_extents(self.fd, offset, offset + length):
            start, end = start - offset, end - offset
            view[filled:start] = ZEROS[: start - filled]
            if self.drop:
                drop_cache(self.fd, offset + start, end - start)
            if read_at(self.fd, view[start:], offset + start, end - start) < end - start:
                raise EOFError
            if self.drop and not self.direct:
                drop_cache(self.fd, offset + start, end - start)
            with self.lock:
                self.bytes_read += end - start
            filled = end
        view[filled:length] = ZEROS[: length - filled]

    def salvage(self, view: memoryview, offset: int, length: int) -> list[int]:
        """Like read(), but what cannot be read is zeros; the offsets of these pages."""
        with suppress(OSError, EOFError):
            self.read(view, offset, length)
            return []
        lost = []
        for at in range(0, length, PAGE):
            try:
                self.read(view[at : at + PAGE], offset + at, min(PAGE, length - at))
            except (OSError, EOFError):
                view[at : min(at + PAGE, length)] = ZEROS[: min(PAGE, length - at)]
                lost.append(at)
        return lost


class Writer:
    """Writes the pages of an image that differ from what the file or device holds."""

    def __init__(self, fd: int, size: int, is_device: bool = False, direct_fd: int = -1) -> None:
        """`direct_fd` is for whole pages, past the cache, if there is one."""
        self.fd, self.size, self.direct_fd = fd, size, direct_fd
        self.make_zero = zero_device if is_device else punch_hole
        self.can_zero, self.is_device = True, is_device
        self.bytes_written = 0
        self.recent: list[int] = []  # units written since the last flush
        self.flushed = (0, 0)
        self.lock = threading.Lock()

    def update(self, new: memoryview, offset: int, runs: list[tuple[int, int, bool]]) -> int:
        """Bring `runs` (start, end, whether all zero) of a unit to the file; the bytes written."""
        written = 0
        for start, end, zero in runs:
            if not (zero and self.zero(offset + start, end - start)):
                aligned = start % PAGE == 0 and end % PAGE == 0
                fd = self.direct_fd if aligned and self.direct_fd >= 0 else self.fd
                write_all(fd, new[start:end], offset + start)
                written += end - start
        with self.lock:
            self.bytes_written += written
            self.recent += [offset] if runs else []
            full = len(self.recent) >= 8
            window, self.recent = self.recent, [] if full else self.recent
        if full:
            self.flush(min(window), max(window) + UNIT)
        return written

    def flush(self, start: int, end: int) -> None:
        """Start the writing, so that the fsync is short; what was started before is clean."""
        drop_cache(self.fd, start, end - start)
        before, self.flushed = self.flushed, (start, end)
        if before[1]:
            drop_cache(self.fd, before[0], before[1] - before[0])

    def zero(self, offset: int, length: int) -> bool:
        if not self.is_device and offset + length == self.size:
            length = -(-length // PAGE) * PAGE
        self.can_zero = self.can_zero and self.make_zero(self.fd, offset, length)
        return self.can_zero


def blocks_in(spans: Iterable[Span]) -> Iterator[Span]:
    for first, last in spans:
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


def join_blocks(length: int, wanted: Callable[[int], bool]) -> list[Span]:
    """(start, end) of the runs of blocks of a unit whose numbers are `wanted`."""
    spans: list[Span] = []
    for number, (start, end) in enumerate(blocks_in([(0, length)])):
        if wanted(number) and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif wanted(number):
            spans.append((start, end))
    return spans


def differing_runs(
    buffers: Buffers, spans: Iterable[Span], fresh: bool = False, lost: Iterable[int] = ()
) -> list[tuple[int, int, bool]]:
    """(start, end, all zero) of the pages in which `new` differs from `old`, neighbours joined.

    Only `spans` are looked at; each begins with a block.  `fresh`: the old is all
    zeros and was not read.  `lost`: offsets of old pages that could not be read;
    they differ, whatever they were.
    """
    runs: list[tuple[int, int, bool]] = []
    lost = set(lost)
    for block, block_end in blocks_in(spans):
        if not lost and not fresh and buffers.equal(block, block_end):
            continue
        for start in range(block, block_end, PAGE):
            end = min(start + PAGE, block_end)
            zero = is_zero(buffers.new[start:end])
            if start in lost:
                zero = False  # a hole might be refused on a bad page; written bytes are not
            elif (fresh and zero) or (not fresh and buffers.equal(start, end)):
                continue
            if runs and runs[-1][1] == start and runs[-1][2] == zero:
                runs[-1] = (runs[-1][0], end, zero)
            else:
                runs.append((start, end, zero))
    return runs


def all_runs(buffers: Buffers, length: int) -> list[tuple[int, int, bool]]:
    """Like differing_runs() for an old that differs everywhere."""
    runs: list[tuple[int, int, bool]] = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        zero = is_zero(buffers.new[start:end])
        if runs and runs[-1][2] == zero:
            runs[-1] = (runs[-1][0], end, zero)
        else:
            runs.append((start, end, zero))
    return runs


class Crew:
    """Threads that take pieces from one list.

    They are waited for by an event, not by join(): in Python 3.8 a signal in the
    middle of a join makes the next one wait for ever (bpo-45274).
    """

    def __init__(
        self, pieces: Iterable[tuple[int, int]], work: Callable[[int, int, Buffers], None]
    ) -> None:
        self.queue, self.work = iter(pieces), work
        self.lock, self.is_stopped, self.done = threading.Lock(), False, threading.Event()
        self.active = 0
        self.failures: list[BaseException] = []

    def start_worker(self) -> None:
        with self.lock:
            self.active += 1
            self.done.clear()
        try:
            threading.Thread(target=self.run, daemon=True).start()
        except BaseException:
            self.leave()
            raise

    def run(self) -> None:
        try:
            buffers = Buffers()
            while not self.is_stopped:
                with self.lock:
                    piece = next(self.queue, None)
                if piece is None:
                    return
                self.work(*piece, buffers)
        except BaseException as e:
            self.failures.append(e)
            self.is_stopped = True
        finally:
            self.leave()

    def leave(self) -> None:
        with self.lock:
            self.active -= 1
            if not self.active:
                self.done.set()

    def stop(self) -> None:
        """Wait until each worker is through with the piece it has."""
        self.is_stopped = True
        while self.active and not self.done.wait(1):
            pass


def work_through(
    pieces: Iterable[tuple[int, int]],
    work: Callable[[int, int, Buffers], None],
    tick: Callable[[], None],
    workers: int,
) -> None:
    """Call `work` for each (offset, length), in `workers` threads; `tick` now and then in this one.

    The first exception, in a worker or in `tick`, ends all of them and is raised.
    One worker is this very thread.
    """
    if workers <= 1:
        buffers = Buffers()
        for offset, length in pieces:
            work(offset, length, buffers)
            tick()
        return
    give_memory_back()
    crew = Crew(pieces, work)
    try:
        for _ in range(workers):
            crew.start_worker()
        while not crew.done.wait(0.1):
            tick()
    finally:
        crew.stop()
    if crew.failures:
        raise crew.failures[0]


def finished(one: tuple[int, int, Buffers, Any]) -> tuple[int, int, Buffers]:
    one[3].result()
    return one[:3]


def in_order(
    pieces: Iterable[tuple[int, int]], work: Callable[[int, int, Buffers], Any], workers: int
) -> Iterator[tuple[int, int, Buffers]]:
    """Call `work` for each (offset, length) ahead, in threads; yields them in order when done."""
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

    give_memory_back()
    spare = [Buffers() for _ in range(workers + 1)]
    ahead: Any = deque()
    with ThreadPoolExecutor(workers) as pool:
        for offset, length in pieces:
            buffers = spare.pop()
            ahead.append((offset, length, buffers, pool.submit(work, offset, length, buffers)))
            if not spare:
                spare.append(ahead[0][2])
                yield finished(ahead.popleft())
        while ahead:
            yield finished(ahead.popleft())


def workers_for(size: int) -> int:
    return WORKERS if size > 8 * UNIT else 1


# ==== Digests ================================================================
#
# {id}.sums vouches for {id}: a header of 64 bytes, then the SHA-256 of each
# block of 64 KiB, in order; 32 zero bytes for a block of zeros.  The SHA-256 of
# this whole file stands in {id}.rev, so `sha256sum {id}.sums` can check it.

DIGEST = 32
sums_header = struct.Struct("<8sI16sIQ24x")  # magic, version, algorithm, block size, image size
SUMS_MAGIC = b"backysum"


def read_piece(fd: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes at `offset`; fewer only where the file ends."""
    data = b""
    while len(data) < length:
        piece = os.pread(fd, length - len(data), offset + len(data))
        if not piece:
            break
        data += piece
    return data


class Damaged(Exception):
    """A digest file is not what its revision says; the caller decides what that costs."""


def damage_or_failure(error: OSError) -> Exception:
    """What an error in reading digests means: Damaged, or that this process lacks something."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return BackyError(f"cannot read digests: {error.strerror}")
    return Damaged(error.strerror)


def block_digest(view: memoryview) -> bytes:
    """The digest of one block, which may be the short last one of an image."""
    return bytes(DIGEST) if is_zero(view) else hashlib.sha256(view).digest()


class Sums:
    """The digests of one image, read and written at the offset of a unit."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size

    def prepare(self) -> None:
        """Make the file, new or a clone, one for an image of `size` bytes."""
        os.ftruncate(self.fd, sums_header.size + DIGEST * -(-self.size // BLOCK))
        write_all(self.fd, sums_header.pack(SUMS_MAGIC, 1, b"sha256", BLOCK, self.size), 0)

    def check(self, digest: str) -> None:
        """Raise Damaged unless this is the file that `digest`, from the `.rev`, speaks of."""
        try:
            header = sums_header.unpack(read_piece(self.fd, sums_header.size, 0))
            if header[:4] != (SUMS_MAGIC, 1, b"sha256".ljust(16, b"\0"), BLOCK):
                raise Damaged("its header is unknown")
            if header[4] != self.size:
                raise Damaged(f"it is for {header[4]} bytes, not {self.size}")
            if os.fstat(self.fd).st_size != sums_header.size + DIGEST * -(-self.size // BLOCK):
                raise Damaged("it has the wrong length")
            if self.digest() != digest:
                raise Damaged("its own digest is wrong")
        except struct.error:
            raise Damaged("its header is too short") from None
        except OSError as e:
            raise damage_or_failure(e) from e

    def digest(self) -> str:
        """The SHA-256 of the whole file, from the medium."""
        drop_cache(self.fd)
        result, offset = hashlib.sha256(), 0
        while True:
            piece = os.pread(self.fd, UNIT, offset)
            if not piece:
                return result.hexdigest()
            result.update(piece)
            offset += len(piece)

    def read(self, offset: int, length: int) -> list[bytes]:
        """The digests of the blocks from image offset `offset`, a block's start."""
        wanted = DIGEST * -(-length // BLOCK)
        data = read_piece(self.fd, wanted, sums_header.size + DIGEST * (offset // BLOCK))
        if len(data) < wanted:
            raise OSError(errno.EIO, "digests cut short")
        return [data[at : at + DIGEST] for at in range(0, wanted, DIGEST)]

    def write(self, offset: int, digests: list[bytes]) -> None:
        write_all(self.fd, b"".join(digests), sums_header.size + DIGEST * (offset // BLOCK))

    def search(self, digest: bytes) -> Iterator[int]:
        """The image offsets of all blocks with this digest."""
        for start in range(sums_header.size, os.fstat(self.fd).st_size, UNIT):
            data = os.pread(self.fd, UNIT, start)
            at = data.find(digest)
            while at >= 0:
                if at % DIGEST == 0:
                    yield (start + at - sums_header.size) // DIGEST * BLOCK
                at = data.find(digest, at + 1)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Where in the image there may be blocks that are not zeros."""
        for start, end in data_extents(self.fd, 0, os.fstat(self.fd).st_size):
            first = max(0, start - sums_header.size) // DIGEST
            last = max(0, end - sums_header.size) // DIGEST + 1
            yield first * BLOCK, last * BLOCK


trail_step = struct.Struct("<32sQ")  # the SHA-256 of a unit's digests, the bytes written for it


class Trail:
    """`{id}.part`: a step for each unit that is done, by which an interrupted run is taken up.

    It needs no fsync: what it says counts only where the digests and the image
    agree with it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def mark(self, offset: int, digests: list[bytes], written: int) -> None:
        step = trail_step.pack(hashlib.sha256(b"".join(digests)).digest(), written)
        write_all(self.fd, step, trail_step.size * (offset // UNIT))

    def find(self, offset: int, digests: list[bytes]) -> int | None:
        """The bytes that were written for this unit, None if it was not done or is another now."""
        step = os.pread(self.fd, trail_step.size, trail_step.size * (offset // UNIT))
        if len(step) < trail_step.size:
            return None
        seen, written = trail_step.unpack(step)
        return written if seen == hashlib.sha256(b"".join(digests)).digest() else None


def blocks_of(length: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the blocks in a unit of `length` bytes."""
    for number, (start, end) in enumerate(blocks_in([(0, length)])):
        yield number, start, end


# ==== Revisions ==============================================================
#
# A revision is one image, never changed once it is complete, and a small file
# beside it that says what it is.  It exists when that file exists, and it is
# complete when that file has stats.duration.  Keys and values are those of backy
# 2.x; what we do not know is kept as it stands.

REVISION_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}", re.ASCII)
TAG = re.compile(r"[0-9A-Za-z][0-9A-Za-z:._+-]{0,63}", re.ASCII)
MOST_RANGES = 1000


class Trust(Enum):
    TRUSTED = "trusted"
    VERIFIED = "verified"
    DISTRUSTED = "distrusted"


@dataclass(frozen=True)
class Sample:
    """How far verification by samples is: the part seen last, and how many in a row were seen."""

    of: int
    last: int
    seen: int


@dataclass(frozen=True)
class Revision:
    """What `{id}.rev` says.  Sizes are bytes, `clock` is microseconds and orders revisions."""

    id: str
    timestamp: datetime
    clock: int
    tags: tuple[str, ...] = ()
    parent: str | None = None
    duration: float | None = None
    bytes_written: int = 0
    trust: Trust = Trust.TRUSTED
    verified: datetime | None = None
    protected: bool = False
    size: int | None = None
    digest: str = ""
    damaged: tuple[tuple[int, int], ...] = ()
    by_hand: bool = False  # distrusted by the operator, which only a whole verification lifts
    sums_damaged: bool = False  # its digests are not what `digest` says
    sample: Sample | None = None
    seen_to: int = 0  # how far verifications that ran out of time have found it sound
    heal_tried: int = 0  # the clock of the newest revision that had nothing for its damage
    image_state: str = ""  # of the inode when all of it was verified; see state_of_inode()
    source_state: str = ""  # what an interrupted run read; the next may go on if it is the same
    stats: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    known: frozenset[str] = frozenset()  # the keys of ours that the file had
    problem: str = ""  # why its image is of no use; found when the directory is read

    @property
    def is_complete(self) -> bool:
        return self.duration is not None

    @property
    def is_good(self) -> bool:
        return self.is_complete and not self.problem and self.trust is not Trust.DISTRUSTED

    def __str__(self) -> str:
        return f"{self.id} ({format_time(self.timestamp)} UTC)"


def parse_tags(text: str) -> tuple[str, ...]:
    """The tags of a comma list, sorted.  Raises BackyError for what can be no tag."""
    tags = sorted({tag.strip() for tag in text.split(",")})
    if "" in tags:
        raise BackyError(f"an empty tag in {printable(text)!r}")
    for tag in tags:
        if not TAG.fullmatch(tag):
            allowed = "letters, digits and : . _ + -, beginning with a letter or digit, at most 64"
            raise BackyError(f"{printable(tag)!r} cannot be a tag", f"a tag has {allowed}")
        if tag.isdigit() or tag in ("last", "latest") or parse_time(tag):
            raise BackyError(f"{tag!r} cannot be a tag: with -r it means something else")
    return tuple(tags)


def epoch_microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // MICROSECOND


REVISION_KEYS = (
    *("uuid", "timestamp", "clock", "parent", "stats", "tags", "trust", "verified"),
    *("protected", "size", "digest", "damaged", "by_hand", "sums_damaged", "sample"),
    *("seen_to", "heal_tried", "image_state", "source_state"),
)


def decode_timestamp(value: object) -> datetime:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return datetime.fromtimestamp(value, UTC)
        except (ValueError, OverflowError, OSError):
            raise ValueError(f"{value} is no time") from None
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    parsed = parse_time(value) if isinstance(value, str) else None
    if parsed is None:
        raise ValueError("its timestamp is no time")
    return parsed


def decode_number(node: Node, name: str) -> float:
    value = resolve(node)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"its {name} is no number")
    return value


def decode_stats(node: Node | None) -> tuple[dict[str, Any], float | None, int]:
    """What we do not know of `stats`, the duration of a complete revision, the bytes written.

    A duration that is there but is none must not make a revision incomplete, for
    those are removed: it is a ValueError.
    """
    if node is None:
        return {}, None, 0
    if not isinstance(node, Mapping):
        raise ValueError("its stats are no mapping")
    stats: dict[str, Any] = {key: value for key, (_, value) in node.entries.items()}
    duration, written = stats.pop("duration", None), stats.pop("bytes_written", None)
    return (
        stats,
        None if duration is None else decode_number(duration, "duration"),
        0 if written is None else int(decode_number(written, "bytes_written")),
    )


def decode_tags(node: Node | None) -> tuple[str, ...]:
    if node is None or resolve(node) is None:
        return ()
    if not isinstance(node, Sequence) or not all(isinstance(tag, Scalar) for tag in node.items):
        raise ValueError("its tags are no list of words")
    return tuple(sorted({tag.text for tag in node.items}))


def decode_trust(value: object) -> Trust:
    if value is None:
        return Trust.TRUSTED
    try:
        return Trust(value)
    except ValueError:
        raise ValueError(f"its trust is {printable(value)!r}") from None


def decode_digest(value: object) -> str:
    if value is None:
        return ""
    match = re.fullmatch("sha256:([0-9a-f]{64})", str(value), re.ASCII)
    if not match:
        raise ValueError("its digest is none")
    return match[1]


def decode_ranges(value: object) -> tuple[tuple[int, int], ...]:
    """Byte ranges, each written `OFFSET+LENGTH`."""
    ranges = []
    for text in value if isinstance(value, list) else ():
        match = re.fullmatch("([0-9]{1,20})[+]([0-9]{1,20})", str(text), re.ASCII)
        if match:
            ranges.append((int(match[1]), int(match[2])))
    return tuple(ranges)


def decode_sample(value: object) -> Sample | None:
    """None for anything odd: the worst is that blocks are looked at again."""
    numbers = [value.get(key) for key in ("of", "last", "seen")] if isinstance(value, dict) else []
    if len(numbers) == 3 and all(type(number) is int and number >= 0 for number in numbers):
        of, last, seen = numbers
        if last < of and seen <= of:
            return Sample(of, last, seen)
    return None


def decode_revision(data: bytes, name: str) -> Revision:
    """The revision that the text of `{name}.rev` describes.  Raises ValueError with the reason."""
    try:
        root = parse_yaml(data.decode("utf-8"))
    except YAMLError as e:
        raise ValueError(str(e)) from None
    if not isinstance(root, Mapping):
        raise ValueError("it is empty" if not data.strip() else "it is not a mapping")
    extra = {key: node for key, (_, node) in root.entries.items()}
    ours = {key: extra.pop(key) for key in REVISION_KEYS if key in extra}
    for key in ("uuid", "timestamp"):
        if key not in ours:
            raise ValueError(f"it has no {key}")
    if not isinstance(ours["uuid"], Scalar) or ours["uuid"].text != name:
        raise ValueError("its uuid is not its name")
    values = {key: resolve(node) for key, node in ours.items() if key not in ("stats", "tags")}
    stats, duration, written = decode_stats(ours.get("stats"))
    timestamp, verified = decode_timestamp(values["timestamp"]), values.get("verified")
    clock = values.get("clock", epoch_microseconds(timestamp))
    if not isinstance(clock, int) or not -(1 << 63) < clock < 1 << 63:
        raise ValueError("its clock is no time")
    return Revision(
        id=name,
        timestamp=timestamp,
        clock=clock,
        tags=decode_tags(ours.get("tags")),
        parent=ours["parent"].text if values.get("parent") else None,
        duration=duration,
        bytes_written=written,
        trust=decode_trust(values.get("trust")),
        verified=decode_timestamp(verified) if verified is not None else None,
        protected=values.get("protected") not in (None, False),
        size=values["size"] if isinstance(values.get("size"), int) else None,
        digest=decode_digest(values.get("digest")),
        damaged=decode_ranges(values.get("damaged")),
        by_hand=values.get("by_hand") is True,
        sums_damaged=values.get("sums_damaged") is True,
        sample=decode_sample(values.get("sample")),
        seen_to=values["seen_to"] if isinstance(values.get("seen_to"), int) else 0,
        heal_tried=values["heal_tried"] if isinstance(values.get("heal_tried"), int) else 0,
        image_state=str(values.get("image_state") or ""),
        source_state=str(values.get("source_state") or ""),
        stats=stats,
        extra=extra,
        known=frozenset(ours),
    )


def widen_ranges(ranges: ListLike[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """The same in at most `most` ranges: neighbours are made one, so that nothing is left out."""
    step = -(-len(ranges) // most) or 1
    groups = [ranges[at : at + step] for at in range(0, len(ranges), step)]
    return [(group[0][0], sum(group[-1]) - group[0][0]) for group in groups]


def encode_revision(revision: Revision) -> bytes:
    stats = {**revision.stats, "bytes_written": revision.bytes_written}
    if revision.duration is not None:
        stats["duration"] = revision.duration
    values: dict[str, Any] = {
        **revision.extra,
        "uuid": revision.id,
        "timestamp": revision.timestamp,
        "clock": revision.clock,
        "parent": revision.parent,
        "stats": stats,
        "tags": list(revision.tags),
        "trust": revision.trust.value,
    }
    if revision.verified:
        values["verified"] = revision.verified
    for key in ("protected", "by_hand", "sums_damaged"):
        if getattr(revision, key):
            values[key] = True
    if revision.sample:
        values["sample"] = {key: getattr(revision.sample, key) for key in ("of", "last", "seen")}
    for key in ("seen_to", "heal_tried", "image_state", "source_state"):
        if getattr(revision, key):
            values[key] = getattr(revision, key)
    if revision.size is not None:
        values["size"] = revision.size
    if revision.digest:
        values["digest"] = f"sha256:{revision.digest}"
    if revision.damaged:
        ranges = widen_ranges(revision.damaged, MOST_RANGES)
        values["damaged"] = [f"{offset}+{length}" for offset, length in ranges]
    return format_yaml(values).encode("utf-8")


def join_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(offset, length) pairs in order, with neighbours and overlaps made one."""
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if joined and offset <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(sum(joined[-1]), offset + length) - joined[-1][0])
        else:
            joined.append((offset, length))
    return tuple(joined)


def describe_ranges(ranges: ListLike[tuple[int, int]]) -> list[str]:
    lines = [
        f"bytes {offset} to {offset + length - 1} ({length})" for offset, length in ranges[:100]
    ]
    if len(ranges) > 100:
        lines.append(f"and {len(ranges) - 100} more ranges")
    return lines


# ==== Repository =============================================================
#
# The directory with all revisions of one job, held open; every name is resolved
# in it.  Locks are flocks, all gone with the process:
#
#   .lock          exclusive, no wait (--wait: wait)  backup, as long as it runs
#   the directory  exclusive, wait                    any change of metadata, `last`
#                                                     or a removal; milliseconds
#   an image       shared                             who reads it, and whose clone
#                                                     is being made
#                  exclusive, no wait                 who removes it
#
# Life of a revision:  .rev without duration, image, .sums  ->  .rev complete
# ->  last.  Removal: `last` turned away, .rev renamed to .del, image and .sums
# unlinked, .del unlinked.  A crash at any point leaves what sweep() can finish.

CHUNKED = (
    "was made by backy 2.2 or newer, which keeps chunks instead of images; "
    "restore it with that program and start a new directory with this one"
)


class Repository:
    """Load what is in the directory, find in it, add to it, remove from it."""

    def __init__(self, path: str, dir_fd: int) -> None:
        self.path, self.dir_fd = os.path.abspath(path), dir_fd
        self.name = printable(os.path.basename(os.path.realpath(path)) or "/")
        self.revisions: list[Revision] = []  # oldest first
        self.problems: list[tuple[str, str]] = []  # (name of a metadata file, what is wrong)
        self.told: set[str] = set()

    @classmethod
    def open(cls, path: str) -> Repository:
        """Open an existing job directory and load it; one that we cannot read is refused."""
        repository = cls(path, open_directory(path))
        try:
            repository.load()
            empty = not repository.revisions and not repository.problems
            if empty and not file_type(repository.dir_fd, "config"):
                hint = "make one with: backy -b DIR init file IMAGE"
                raise NotFound(f"{printable(path)}: no job here, there is no config", hint)
        except BaseException:
            repository.close()
            raise
        return repository

    def close(self) -> None:
        close(self.dir_fd)

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading --------------------------------------------------------------

    def load(self) -> None:
        """Read all metadata anew.  What is damaged or foreign costs one warning each."""
        self.revisions, self.problems = [], []
        with explain(f"{self.name}: cannot list the directory"):
            names = list_directory(self.dir_fd)
        if "chunks" in names and file_type(self.dir_fd, "chunks") == stat.S_IFDIR:
            raise BackyError(f"{self.name}: this directory {CHUNKED}")
        for name in names:
            if name.endswith(".rev") and name != "last.rev":
                self.load_one(name[: -len(".rev")])
        self.revisions.sort(key=lambda revision: (revision.clock, revision.id))

    def load_one(self, name: str) -> None:
        try:
            if not REVISION_ID.fullmatch(name) or name in ("last", "config", "status"):
                raise ValueError("it is not named like a revision")
            if file_type(self.dir_fd, f"{name}.rev") == stat.S_IFLNK:
                raise ValueError("it is a symbolic link")
            revision = decode_revision(read_small(self.dir_fd, f"{name}.rev"), name)
            self.refuse_doubtful(revision)
        except FileNotFoundError:
            return  # removed since the directory was listed
        except (ValueError, ArithmeticError, OSError) as e:
            if isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise BackyError(f"{self.name}: cannot read {name}.rev: {e.strerror}") from e
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            self.problems.append((f"{name}.rev", reason))
            self.tell_once(f"{name}.rev", f"is left alone: {printable(reason)}")
            return
        kind = revision.extra.get("backend_type")
        if isinstance(kind, Scalar) and kind.text == "chunked":
            raise BackyError(f"{self.name}: this directory {CHUNKED}")
        self.revisions.append(self.with_image(revision))

    def refuse_doubtful(self, revision: Revision) -> None:
        """Raise ValueError for what was complete but has no duration: it must not be swept."""
        if revision.is_complete:
            return
        ours = "clock" in revision.known
        name = (
            f"{revision.id}.rev" if ours else revision.id
        )  # what is read-only once it is complete
        kind, mode = file_type(self.dir_fd, name), 0o600
        if kind == stat.S_IFREG:
            mode = os.stat(name, dir_fd=self.dir_fd, follow_symlinks=False).st_mode
        if revision.digest or revision.verified or revision.size is not None or not mode & 0o200:
            raise ValueError("it was complete and has lost its duration")

    def with_image(self, revision: Revision) -> Revision:
        """`revision` with the size of its image, or with what is wrong with that."""
        if not revision.is_complete:
            return revision
        problem, size = "", revision.size
        try:
            status = os.stat(revision.id, dir_fd=self.dir_fd, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                problem = "its image is not a regular file"
            elif size is not None and status.st_size != size:
                problem = f"its image has {status.st_size} bytes instead of {size}"
            size = status.st_size
        except OSError as e:
            problem = f"its image: {e.strerror}"
        if problem:
            self.tell_once(revision.id, f"is of no use: {problem}")
        return replace(revision, size=size, problem=problem)

    def tell_once(self, name: str, what: str) -> None:
        if name not in self.told:
            self.told.add(name)
            log.warning("%s: %s %s", self.name, printable(name), what)

    @property
    def complete(self) -> list[Revision]:
        return [revision for revision in self.revisions if revision.is_complete]

    def find(self, spec: str) -> Revision:
        """The revision that `spec` names: number, last, id or its beginning, tag, date.

        Raises NotFound, saying what there is.  Only a full id finds an incomplete one.
        """
        complete = self.complete
        if complete and spec in ("last", "latest"):
            return complete[-1]
        if re.fullmatch("[0-9]{1,9}", spec, re.ASCII) and int(spec) < len(complete):
            return complete[-1 - int(spec)]
        for revision in self.revisions:
            if revision.id == spec:
                return revision
        if not complete:
            raise NotFound(f"{self.name}: there is no complete revision yet")
        tagged = [revision for revision in complete if spec in revision.tags]
        begun = [one for one in complete if spec and one.id.startswith(spec)]
        if spec.isdigit():
            begun = (
                begun if len(spec) > 2 else []
            )  # a number that is out of range must not become another revision
        if len(begun) > 1 or (tagged and begun and begun[0] != tagged[-1]):
            found = ", ".join(str(revision) for revision in [*tagged[-1:], *begun][:10])
            raise NotFound(f"{self.name}: {printable(spec)!r} is ambiguous: {found}")
        if begun or tagged:
            return (begun or tagged)[-1]
        moment = parse_time(spec)
        if moment:
            before = [revision for revision in complete if revision.timestamp <= moment]
            if before:
                return max(before, key=lambda revision: (revision.timestamp, revision.clock))
        tags = sorted({tag for revision in complete for tag in revision.tags})
        raise NotFound(
            f"{self.name}: no revision {printable(spec)!r}",
            f"there are {len(complete)}, number 0 ({complete[-1]}) to "
            f"{len(complete) - 1} ({complete[0]}); tags: {printable(', '.join(tags)) or 'none'}",
        )

    # -- locks ----------------------------------------------------------------

    @contextmanager
    def job_lock(self, verb: str, wait: float = 0) -> Iterator[None]:
        """Hold `.lock`.  Raises Busy, saying who holds it, when `wait` seconds were not enough."""
        with explain(f"{self.name}: cannot lock"):
            fd = open_regular(self.dir_fd, ".lock", os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + wait
            while not take_lock(fd):
                if time.monotonic() >= deadline:
                    holder = printable(os.pread(fd, 200, 0).decode("utf-8", "replace").strip())
                    raise Busy(f"{self.name} is locked by {holder or 'another process'}")
                time.sleep(0.1)
            since = format_time(datetime.now(UTC))
            holder = f"{verb} (pid {os.getpid()} on {os.uname().nodename}, since {since} UTC)\n"
            with suppress(OSError):  # a full disk does not keep anyone from locking
                os.ftruncate(fd, 0)
                write_all(fd, holder.encode(), 0)
            yield
        finally:
            close(fd)

    @contextmanager
    def metadata_lock(self, only: str = "") -> Iterator[None]:
        """Hold the directory, and see it, or the `only` revision of interest, as it is now."""
        with explain(f"{self.name}: cannot lock the directory"):
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.dir_fd)
        try:
            with explain(f"{self.name}: cannot lock the directory"):
                take_lock(fd, wait=True)
            if only:
                self.revisions = [one for one in self.revisions if one.id != only]
                self.load_one(only)
                self.revisions.sort(key=lambda revision: (revision.clock, revision.id))
            else:
                self.load()
            yield
        finally:
            close(fd)

    def open_image(self, revision: Revision) -> int:
        """A descriptor for reading the image, which cannot be removed while it is open."""
        try:
            for _ in range(3):  # a repair may just be putting a new file in its place
                fd = open_regular(self.dir_fd, revision.id)
                take_lock(fd, exclusive=False, wait=True)
                if os.fstat(fd).st_nlink:
                    return fd
                close(fd)
            raise FileNotFoundError(errno.ENOENT, "it has just been removed")
        except OSError as e:
            raise BackyError(f"{self.name}: cannot open image {revision.id}: {e.strerror}") from e

    def count_extents(self, revision: Revision) -> int | None:
        """In how many pieces the image lies on the disk; None where that cannot be known."""
        try:
            fd = open_regular(self.dir_fd, revision.id)
        except OSError:
            return None
        try:
            return count_extents(fd)
        except OSError:
            return None
        finally:
            close(fd)

    def open_sums(self, revision: Revision) -> tuple[int, Sums]:
        """The digests of `revision`, checked.  Raises Damaged when there are none to rely on."""
        if not revision.digest:
            raise Damaged("it has none")
        try:
            fd = open_regular(self.dir_fd, f"{revision.id}.sums")
        except OSError as e:
            raise damage_or_failure(e) from e
        try:
            sums = Sums(fd, revision.size or 0)
            sums.check(revision.digest)
        except BaseException:
            close(fd)
            raise
        return fd, sums

    def find_unfinished(self, state: str) -> Revision | None:
        """The newest interrupted revision that was made of a source in this very `state`."""
        recently = datetime.now(UTC) - timedelta(hours=36)
        for revision in reversed(self.revisions):
            same = state and revision.source_state == state
            young = revision.timestamp > recently or not state.startswith("device ")
            if same and young and not revision.is_complete:
                names = (revision.id, f"{revision.id}.sums", f"{revision.id}.part")
                if all(file_type(self.dir_fd, name) == stat.S_IFREG for name in names):
                    return revision
        return None

    # -- changing; under metadata_lock(), but for a new revision of one's own ----

    def write_revision(self, revision: Revision) -> None:
        """Put the metadata on the medium: the old or the new, whatever happens."""
        mode = 0o440 if revision.is_complete else 0o600
        with explain(f"{self.name}: cannot write {revision.id}.rev"):
            replace_file(self.dir_fd, f"{revision.id}.rev", encode_revision(revision), mode)
        others = [other for other in self.revisions if other.id != revision.id]
        self.revisions = sorted([*others, revision], key=lambda one: (one.clock, one.id))

    def change(self, revision: Revision, **values: Any) -> Revision:
        """Rewrite what has been written of `revision` meanwhile, with `values` on top."""
        current = next((one for one in self.revisions if one.id == revision.id), None)
        if current is None:
            raise NotFound(f"{self.name}: {revision.id} is gone")
        if values.get("trust") is Trust.DISTRUSTED:
            values["seen_to"] = 0
        changed = replace(current, **values)
        self.write_revision(changed)
        return changed

    def point_last(self) -> None:
        """Let `last` and `last.rev` name the newest complete revision that has its image."""
        usable = [revision for revision in self.complete if not revision.problem]
        target = usable[-1].id if usable else None
        changed = False
        for name, to in (("last", target), ("last.rev", target and f"{target}.rev")):
            kind = file_type(self.dir_fd, name)
            if kind not in (0, stat.S_IFLNK):
                self.tell_once(name, "is not a symbolic link and is left alone")
            elif to is None and kind:
                os.unlink(name, dir_fd=self.dir_fd)
                changed = True
            elif to is not None and not (kind and os.readlink(name, dir_fd=self.dir_fd) == to):
                replace_link(self.dir_fd, name, to)
                changed = True
        if changed:
            sync(self.dir_fd)

    def remove(self, revision: Revision) -> None:
        """Delete a revision.  Raises Busy, and does nothing, while somebody reads it."""
        with explain(f"{self.name}: cannot remove {revision.id}"), ExitStack() as stack:
            with suppress(FileNotFoundError, PermissionError):
                if file_type(self.dir_fd, revision.id) == stat.S_IFREG:
                    fd = open_regular(self.dir_fd, revision.id)
                    stack.callback(close, fd)
                    if not take_lock(fd):
                        raise Busy(f"{self.name}: {revision.id} is being read")
            self.revisions = [one for one in self.revisions if one.id != revision.id]
            self.point_last()
            dir_fd, name = self.dir_fd, revision.id
            os.rename(f"{name}.rev", f"{name}.del", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            sync(dir_fd)
            self.bury(name)

    def bury(self, name: str) -> None:
        """Finish the removal of the revision whose tombstone is `{name}.del`."""
        for victim in (name, f"{name}.sums", f"{name}.part", f"{name}.del"):
            kind = file_type(self.dir_fd, victim)
            if kind == stat.S_IFREG:
                os.unlink(victim, dir_fd=self.dir_fd)
            elif kind:
                self.tell_once(victim, "is not a regular file and is left alone")
        sync(self.dir_fd)

    def sweep(self, keep: str = "") -> None:
        """Finish or remove what interrupted runs left, but not the revision `keep`."""
        with explain(f"{self.name}: cannot clear what an interrupted run left"):
            for name in list_directory(self.dir_fd):
                if is_temporary(name):
                    if file_type(self.dir_fd, name) in (stat.S_IFREG, stat.S_IFLNK):
                        os.unlink(name, dir_fd=self.dir_fd)
                elif name.endswith(".del") and REVISION_ID.fullmatch(name[:-4]):
                    self.sweep_tombstone(name[:-4])
            for revision in self.revisions:
                if revision.is_complete and file_type(self.dir_fd, f"{revision.id}.part"):
                    self.drop_trail(revision.id)
                if not revision.is_complete and revision.id != keep:
                    log.warning("%s: removing incomplete revision %s", self.name, revision.id)
                    try:
                        self.remove(revision)
                    except Busy as e:
                        log.warning("%s", e)
            self.point_last()

    def drop_trail(self, name: str) -> None:
        if file_type(self.dir_fd, f"{name}.part") == stat.S_IFREG:
            os.unlink(f"{name}.part", dir_fd=self.dir_fd)

    def sweep_tombstone(self, name: str) -> None:
        try:
            decode_revision(read_small(self.dir_fd, f"{name}.del"), name)
        except (ValueError, ArithmeticError, OSError) as e:
            self.tell_once(f"{name}.del", f"is left alone: {printable(e)}")
            return
        if not file_type(self.dir_fd, f"{name}.rev"):
            self.bury(name)

    def check_presence(self) -> None:
        """Raise BackyError unless this directory is still where it was opened."""
        try:
            held = os.fstat(self.dir_fd)
            there = os.path.samestat(os.stat(self.path, follow_symlinks=False), held)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError as e:
            log.warning("%s: cannot examine the directory: %s", self.name, e.strerror)
            return
        if not there or not held.st_nlink:
            raise BackyError(
                f"{self.name}: the directory {printable(self.path)} was moved or deleted"
            )


# ==== Sources ================================================================
#
# A source gives a still image and says when it did not stay still.  That is all
# the rest of the program knows of it.


class Still:
    """An image that is being backed up: its reader, and whether it has changed since."""

    def __init__(self, name: str, size: int, reader: Reader, state: str = "") -> None:
        """`state` names this very content; an interrupted run goes on where it is the same."""
        self.name, self.size, self.reader, self.state = name, size, reader, state

    def check(self) -> None:
        """Raise BackyError when the image is no longer what it was."""


@dataclass(frozen=True)
class Source:
    """Where images come from.  Naming a `type` registers it."""

    type = ""
    keys = ("",)  # of the configuration, beside those of every job

    @classmethod
    def types(cls) -> dict[str, type[Source]]:
        return {one.type: one for one in Source.__subclasses__()}

    @classmethod
    def parse(cls, words: str) -> dict[str, str]:
        """What `init` writes to the configuration for SOURCE."""
        raise NotImplementedError

    @classmethod
    def load(cls, options: dict[str, str]) -> Source:
        raise NotImplementedError

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Still]:
        raise NotImplementedError
        yield


class SourceChanged(BackyError):
    """The source did not stay still, so what was read is no image of any moment."""

    remedy = "back up a snapshot, or stop what writes to it (fsfreeze, virsh suspend)"


class StillFile(Still):
    """A file or device, watched: it must not change its size, its time or its place."""

    def __init__(self, path: str, fd: int) -> None:
        status = os.fstat(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        super().__init__(printable(path), size, Reader(fd, size, not is_cached(fd, size)))
        self.path, self.fd, self.status = path, fd, status
        self.is_device = stat.S_ISBLK(status.st_mode)
        if time.time() - status.st_mtime < 0.02 and not self.is_device:
            time.sleep(0.02)  # so that a later write cannot have the same time
        self.writes = self.count_writes()
        self.state = self.describe_state()

    def describe_state(self) -> str:
        """What stays the same as long as nobody writes, and of a device while it is the same disk.

        Writes to a device count from boot, and are not seen when another host makes
        them: an interrupted run is gone on with for 36 hours.
        """
        status = self.status
        if not self.is_device:
            return f"{status.st_ino} {self.size} {status.st_mtime_ns} {status.st_ctime_ns}"
        with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            if len(self.writes) > 1 and self.writes[0]:
                words = ("device", status.st_rdev, self.size, *self.writes, file.read().strip())
                return " ".join(map(str, words))
        return ""

    def count_writes(self) -> tuple[str, ...]:
        if not self.is_device:
            return ()
        with suppress(OSError):  # what was dirty before must not count as written since
            os.fdatasync(self.fd)
        number = self.status.st_rdev
        return (disk_sequence(number), *device_writes(number))

    def check(self) -> None:
        status, what = os.fstat(self.fd), ""
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size != self.size:
            verb = "grew" if size > self.size else "shrank"
            what = f"{verb} from {self.size} to {size} bytes"
        elif (
            status.st_mtime_ns != self.status.st_mtime_ns and not self.is_device
        ) or self.count_writes() != self.writes:
            what = "changed"
        elif not self.is_device and not status.st_nlink:
            what = "vanished"
        else:
            try:
                if not os.path.samestat(os.stat(self.path), self.status):
                    what = "was replaced"
            except OSError:
                what = "vanished"
        if what:
            raise SourceChanged(f"{self.name} {what} while it was read", SourceChanged.remedy)


@dataclass(frozen=True)
class FileSource(Source):
    """An image file or a block device that nobody writes to meanwhile."""

    filename: str = ""

    type = "file"
    keys = ("filename", "cow")

    @classmethod
    def parse(cls, words: str) -> dict[str, str]:
        if not words or "\0" in words:
            raise ConfigError("a file source is initialised with the path of an image")
        if UNPRINTABLE.search(words):
            raise ConfigError(f"{printable(words)!r}: no config can hold such characters")
        return {"filename": os.path.abspath(words), "type": "file"}

    @classmethod
    def load(cls, options: dict[str, str]) -> Source:
        if not options.get("filename"):
            raise ConfigError("its source has no filename")
        return cls(filename=options["filename"])

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Still]:
        shown = printable(self.filename)
        with explain(f"cannot open source {shown}"):
            fd = os.open(self.filename, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise BackyError(f"source {shown} is neither a file nor a block device")
            with explain(f"cannot examine source {shown}"):
                still = StillFile(self.filename, fd)
            if still.is_device and not still.size:
                raise BackyError(f"source {shown} is a device without a medium")
            yield still
        finally:
            close(fd)


class VerifyMode(Enum):
    """How a backup is proven: by reading the previous image too, or only what was written."""

    FULL = "full"
    WRITTEN = "written"


@dataclass(frozen=True)
class Job:
    """What `config` in the job's directory says."""

    source: Source
    verify: VerifyMode
    rewrite_above: int  # extents; 0 is never


JOB_KEYS = ("type", "verify", "rewrite-above", "full-always", "backend")
REWRITE_ABOVE = 100_000


def load_job(repository: Repository) -> Job:
    """Read `config`.  Raises ConfigError with what is wrong; unknown keys are a warning."""
    where = f"{repository.name}: config"
    try:
        root = parse_yaml(read_small(repository.dir_fd, "config").decode("utf-8"))
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror}") from e
    except (YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{where}: {e}") from e
    if isinstance(root, Mapping) and "source" in root.entries:  # as backy 2.5 nests it
        root = root.entries["source"][1]
    if not isinstance(root, Mapping):
        raise ConfigError(f"{where}: it is not a mapping")
    options = {
        key: "" if node.plain and node.text in ("", "null", "~") else node.text
        for key, (_, node) in root.entries.items()
        if isinstance(node, Scalar)
    }
    kind = Source.types().get(options.get("type", ""))
    if kind is None:
        there = ", ".join(sorted(Source.types()))
        raise ConfigError(
            f"{where}: no source type {printable(options.get('type', ''))!r} in this version",
            f"source types are: {there}",
        )
    for key in root.entries:
        if key not in (*JOB_KEYS, *kind.keys):
            alike = suggestion(key, (*JOB_KEYS, *kind.keys))
            log.warning("%s: unknown key %r%s", where, printable(key), alike)
    if options.get("backend", "cowfile") == "chunked":
        raise ConfigError(f"{where}: this directory {CHUNKED}")
    try:
        mode = VerifyMode(options.get("verify") or "full")
    except ValueError:
        raise ConfigError(
            f"{where}: verify is full or written, not {options['verify']!r}"
        ) from None
    try:
        limit = options.get("rewrite-above") or str(REWRITE_ABOVE)
        if not re.fullmatch("[0-9]{1,12}", limit, re.ASCII):
            raise ConfigError(f"rewrite-above is a number of extents, not {printable(limit)!r}")
        return Job(kind.load(options), mode, int(limit))
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}", e.hint) from e


def initialise(path: str, kind: str, words: str) -> None:
    """Make a job directory with a config, which may hold secrets and is for us alone."""
    types = Source.types()
    if kind not in types:
        there = ", ".join(sorted(types))
        raise ConfigError(
            f"no source type {printable(kind)!r}{suggestion(kind, types)}; there are: {there}"
        )
    config = types[kind].parse(words)
    if "filename" in config and not os.path.exists(config["filename"]):
        log.warning("there is no %s yet", printable(config["filename"]))
    with explain(f"cannot create {printable(path)}"):
        os.makedirs(path, 0o700, exist_ok=True)
    dir_fd = open_directory(path)
    try:
        if file_type(dir_fd, "config"):
            raise BackyError("Refusing to initialize with existing config.")
        with explain(f"cannot write {printable(path)}/config"):
            replace_file(dir_fd, "config", format_yaml(config, flow=True).encode(), 0o600)
    finally:
        close(dir_fd)


# ==== Progress ===============================================================
#
# One line that is drawn over on a terminal, one a minute with -v elsewhere, and
# one whenever SIGUSR1 comes, also when nothing else is said.


class Progress:
    """How far one pass over an image is.  `position` moves in worker threads."""

    current: Progress | None = None
    silent = False  # standard error is the stream that carries an image

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.position = label, total, 0
        self.started = self.shown = time.monotonic()
        self.on_terminal = not Progress.silent and sys.stderr.isatty()
        self.width = 0

    def __enter__(self) -> Progress:
        Progress.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Progress.current = None
        if self.width:
            self.draw("")

    def reach(self, position: int) -> None:
        self.position = max(self.position, position)

    def tick(self) -> None:
        now = time.monotonic()
        if self.on_terminal and now - self.shown >= 0.2:
            self.shown = now
            self.draw(self.line())
        elif not self.on_terminal and now - self.shown >= 60:
            self.shown = now
            log.debug("%s", self.line())

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.started, 0.001)
        done, total = min(self.position, self.total), self.total
        share = 100 * done // total if total else 100
        text = f"{self.label}  {format_size(done)} of {format_size(total)}  {share} %"
        text += f"  {format_size(int(done / elapsed))}/s"
        if elapsed > 3 and 0 < done < total:
            text += f"  eta {format_clock(elapsed * (total - done) / done)}"
        return text

    def draw(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write("\r" + text.ljust(self.width) + ("" if text else "\r"))
            sys.stderr.flush()
        self.width = len(text)


def pass_over(
    label: str,
    size: int,
    pieces: Iterable[tuple[int, int]],
    work: Callable[[int, int, Buffers], None],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Call `work` for these pieces of an image of `size` bytes, and `look` now and then."""
    with Progress(label, size) as progress:

        def piece(offset: int, length: int, buffers: Buffers) -> None:
            progress.reach(offset)
            work(offset, length, buffers)

        def tick() -> None:
            progress.tick()
            look()

        work_through(pieces, piece, tick, workers_for(size))


def report_progress(*_: object) -> None:
    """On SIGUSR1."""
    line = Progress.current.line() if Progress.current else "between two steps"
    if not Progress.silent:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())


# ==== Checks =================================================================
#
# Reading an image while holding every block against its digest.  Verification,
# repair and restore all go this way, so that nothing is handed out unseen.


class CheckedImage:
    """A revision's image, open and pinned, and what is wrong with it as far as it was read.

    `mend`, if there is one, is given a bad block's digest, its offset and the view
    that holds it, and fills that with the right bytes if it can find them.
    """

    def __init__(
        self,
        repository: Repository,
        revision: Revision,
        stack: ExitStack,
        mend: Callable[[bytes, int, memoryview], bool] | None = None,
    ) -> None:
        if revision.problem:
            raise Distrusted(f"{repository.name}: {revision.id}: {revision.problem}")
        self.fd = repository.open_image(revision)
        stack.callback(close, self.fd)
        self.revision, self.size, self.mend = revision, os.fstat(self.fd).st_size, mend
        self.reader = Reader(self.fd, self.size, True)
        self.sums: Sums | None = None
        self.unchecked = ""
        self.damaged: list[tuple[int, int]] = []
        self.mended: list[tuple[int, int]] = []
        try:
            sums_fd, self.sums = repository.open_sums(replace(revision, size=self.size))
            stack.callback(close, sums_fd)
        except Damaged as e:
            self.unchecked = "it is incomplete"
            if revision.digest:
                self.unchecked = f"its digests are damaged: {e}"
            elif revision.is_complete:
                self.unchecked = "it has no digests, like all that backy 2.x made"

    def pieces(self, *others: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The units in which there is something, or should be, or where `others` have something."""
        digests = self.sums.extents() if self.sums else []
        return units(self.size, self.reader.extents(), digests, *others)

    def read(self, view: memoryview, offset: int, length: int) -> list[tuple[int, int]]:
        """Fill `view` from a block's start on; returns (start, end) of the blocks that were mended.

        What cannot be read is zeros.  Damage is noted, not raised.
        """
        lost = {at // BLOCK for at in self.reader.salvage(view, offset, length)}
        mended = []
        digests = self.digests(offset, length)
        for block, start, end in blocks_of(length):
            digest = digests[block]
            if block not in lost and digest in (None, block_digest(view[start:end])):
                continue
            if self.mend and digest and self.mend(digest, offset + start, view[start:end]):
                self.mended.append((offset + start, end - start))
                mended.append((start, end))
            else:
                self.damaged.append((offset + start, end - start))
        return mended

    def is_untouched(self) -> bool:
        """Whether all of it was verified, and nobody has written to the file since."""
        revision = self.revision
        known = revision.trust is Trust.VERIFIED and self.sums is not None
        return known and revision.image_state == state_of_inode(self.fd)

    def digests(self, offset: int, length: int) -> ListLike[bytes | None]:
        """One for each block; None without digests, empty, which fits nothing, if they are lost."""
        count = -(-length // BLOCK)
        if self.sums is None:
            return [None] * count
        try:
            return self.sums.read(offset, length)
        except OSError:
            return [b""] * count

    def check(self, offset: int, length: int, buffers: Buffers) -> None:
        self.read(buffers.new, offset, length)

    def damage(self) -> tuple[tuple[int, int], ...]:
        return join_ranges(self.damaged)


# ==== Repair =================================================================
#
# A block that went bad is found again by its digest: in another revision of the
# job, which may hold it in another extent.  An image is never repaired in place:
# a clone of it is, and takes its name when it is right.


class Donors:
    """The other revisions of a job, searched for sound copies of blocks; newest first."""

    def __init__(self, repository: Repository, revision: Revision, stack: ExitStack) -> None:
        self.repository, self.stack, self.lock = repository, stack, threading.Lock()
        others = [one for one in repository.complete if one.id != revision.id and not one.problem]
        self.others = [*reversed(others), revision]  # it may have the same block elsewhere
        self.newest = max((one.clock for one in others), default=0)
        self.images: dict[str, CheckedImage | None] = {}
        self.held: list[tuple[str, ExitStack]] = []

    def open(self, revision: Revision) -> CheckedImage | None:
        """The image of a donor, opened once; None if it is of no use."""
        if revision.id not in self.images:
            stack = ExitStack()
            try:
                image = CheckedImage(self.repository, revision, stack)
            except BackyError:
                image = None
            self.images[revision.id] = image if image and image.sums else None
            self.held.append((revision.id, self.stack.enter_context(stack)))
            if len(self.held) > 200:  # descriptors are few
                name, oldest = self.held.pop(0)
                self.images.pop(name)
                oldest.close()
        return self.images[revision.id]

    def limit_to_newer(self, clock: int) -> bool:
        """Leave out who was asked before, up to `clock`; whether anyone is left to ask."""
        if clock:
            self.others = [one for one in self.others if one.clock > clock]
        return bool(self.others)

    def mend(self, digest: bytes, offset: int, view: memoryview) -> bool:
        """Fill `view` with the block of that digest; False if nobody has it."""
        return self.find(digest, offset, view) is not None

    def find(self, digest: bytes, offset: int, view: memoryview) -> tuple[int, int] | None:
        """Like mend(), but says in which file and where it was; -1 for a block of zeros."""
        if digest == bytes(DIGEST):
            view[:] = ZEROS[: len(view)]
            return -1, 0
        with self.lock:
            for revision in self.others:
                image = self.open(revision)
                if image and self.fetch(image, digest, offset, view):
                    return image.fd, offset
            for revision in self.others:
                image = self.open(revision)
                for place in image.sums.search(digest) if image and image.sums else ():
                    if self.fetch(image, digest, place, view):
                        return image.fd, place
            for revision in self.others:
                image = self.open(revision)
                if image and self.patch(image, digest, offset, view):
                    return -1, 0
        return None

    @staticmethod
    def patch(image: CheckedImage, digest: bytes, offset: int, view: memoryview) -> bool:
        """Make `view` right by one page of a donor: most blocks share some of their pages."""
        if offset + len(view) > image.size:
            return False
        block = memoryview(mmap.mmap(-1, BLOCK))
        image.reader.salvage(block, offset, len(view))
        for start in range(0, len(view), PAGE):
            end = min(start + PAGE, len(view))
            if view[start:end] != block[start:end]:
                trial = bytearray(view)
                trial[start:end] = block[start:end]
                if block_digest(memoryview(trial)) == digest:
                    view[:] = trial
                    return True
        return False

    @staticmethod
    def fetch(image: CheckedImage, digest: bytes, offset: int, view: memoryview) -> bool:
        """Read the block at `offset` if it has this digest and this length, and check it."""
        if min(BLOCK, image.size - offset) != len(view):
            return False
        if image.digests(offset, len(view))[0] != digest:
            return False
        block = memoryview(mmap.mmap(-1, BLOCK))
        with suppress(OSError, EOFError):
            image.reader.read(block, offset, len(view))
            if block_digest(block[: len(view)]) == digest:
                view[:] = block[: len(view)]
                return True
        return False


def block_offsets(ranges: Iterable[tuple[int, int]]) -> list[int]:
    """The offsets of all blocks that these ranges touch."""
    blocks: set[int] = set()
    for offset, length in ranges:
        blocks.update(range(offset - offset % BLOCK, offset + length, BLOCK))
    return sorted(blocks)


def tell_damage(
    repository: Repository, revision: Revision, ranges: ListLike[tuple[int, int]]
) -> None:
    for line in describe_ranges(ranges):
        log.warning("%s: %s is damaged: %s", repository.name, revision.id, line)


def find_shared_damage(repository: Repository, offsets: list[int]) -> None:
    """Look at these blocks in every revision, since they may share what went bad; mark them."""
    for revision in repository.complete:
        with ExitStack() as stack, suppress(BackyError):
            image = CheckedImage(repository, revision, stack)
            if image.sums is None:
                continue
            buffers = Buffers()
            for offset in offsets:
                if offset < image.size:
                    image.check(offset, min(BLOCK, image.size - offset), buffers)
            known = join_ranges([*revision.damaged, *image.damaged])
            if image.damaged and known != revision.damaged:
                tell_damage(repository, revision, image.damage())
                with repository.metadata_lock(revision.id):
                    values = {"trust": Trust.DISTRUSTED, "damaged": known, "heal_tried": 0}
                    repository.change(revision, **values)


def copy_image(repository: Repository, image: CheckedImage, fd: int) -> bool:
    """Make `fd` a clone of the image, or a sparse copy where extents cannot be shared; which it is.

    Raises OSError when more turns out to be damaged than was known: what is copied
    must not be worse than what it replaces.
    """
    with suppress(CloneUnsupported):
        clone_file(image.fd, fd)
        return True
    os.ftruncate(fd, image.size)
    writer = Writer(fd, image.size)

    def work(offset: int, length: int, buffers: Buffers) -> None:
        image.read(buffers.new, offset, length)
        writer.update(buffers.new, offset, differing_runs(buffers, [(0, length)], fresh=True))

    pass_over(f"{repository.name} (healing)", image.size, image.pieces(), work)
    known = set(block_offsets(image.revision.damaged))
    if not known.issuperset(block_offsets(image.damage())):
        raise OSError(errno.EIO, "more of it is damaged than was known")
    return False


def can_heal(image: CheckedImage, donors: Donors, offset: int) -> bool:
    """Whether one block is sound after all, or somebody has a sound copy."""
    length = min(BLOCK, image.size - offset)
    digest = image.digests(offset, length)[0]
    block = memoryview(mmap.mmap(-1, BLOCK))
    image.reader.salvage(block, offset, length)
    block = block[:length]
    return block_digest(block) == digest or bool(digest and donors.mend(digest, offset, block))


def heal_block(image: CheckedImage, donors: Donors, offset: int, fd: int) -> bool:
    """Give `fd` a sound copy of one block, shared if that can be; False if there is none."""
    length = min(BLOCK, image.size - offset)
    digest = image.digests(offset, length)[0]
    block = memoryview(mmap.mmap(-1, BLOCK))
    image.reader.salvage(block, offset, length)
    block = block[:length]
    if block_digest(block) == digest:
        return True  # a range may hold sound blocks too
    found = donors.find(digest, offset, block) if digest else None
    if found is None:
        return False
    if length < BLOCK:  # to write a part of a page would be to read it: let it go first
        os.ftruncate(fd, offset)
        os.ftruncate(fd, image.size)
    elif found[0] >= 0:
        with suppress(CloneUnsupported):
            clone_range(found[0], found[1], length, fd, offset)
            return True
    write_all(fd, block, offset)
    return True


def read_back(
    repository: Repository, image: CheckedImage, fd: int, offsets: list[int] | None
) -> None:
    """Hold these blocks of `fd`, or all of them, against the digests of `image`; raises OSError."""
    new = Reader(fd, image.size, True)

    def work(offset: int, length: int, buffers: Buffers) -> None:
        new.read(buffers.new, offset, length)
        digests = image.digests(offset, length)
        for block, start, end in blocks_of(length):
            if block_digest(buffers.new[start:end]) != digests[block]:
                raise OSError(errno.EIO, "what was read back is not what was written")

    if offsets is None:
        pieces: Iterable[tuple[int, int]] = image.pieces()
    else:
        pieces = [(offset, min(BLOCK, image.size - offset)) for offset in offsets]
    pass_over(f"{repository.name} (reading back)", image.size, pieces, work)


def heal_clone(
    repository: Repository,
    image: CheckedImage,
    donors: Donors,
    offsets: list[int],
    stack: ExitStack,
) -> set[int]:
    """Build the new image and let it take the name of the old; the offsets of the blocks healed."""
    name, dir_fd = temporary_name(), repository.dir_fd
    if not any(can_heal(image, donors, offset) for offset in offsets):
        return set()
    fd = open_regular(dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    stack.callback(close, fd)
    try:
        is_clone = copy_image(repository, image, fd)
        healed = set()
        for offset in offsets:
            if heal_block(image, donors, offset, fd):
                healed.add(offset)
        if not is_clone and len(healed) < len(offsets):
            return set()  # a copy has zeros for what cannot be read now; the original may yet be
        if healed:
            os.fchmod(fd, 0o440)
            sync(fd)
            drop_cache(fd)
            read_back(repository, image, fd, sorted(healed) if is_clone else None)
            target = image.revision.id
            os.rename(name, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            sync(dir_fd)
        return healed
    finally:
        with suppress(OSError):
            os.unlink(name, dir_fd=dir_fd)


def heal(repository: Repository, revision: Revision, again: bool) -> bool:
    """Put sound copies in the place of the damaged blocks of a revision, as far as there are any.

    A new image is made, forced to the medium, read back and renamed; after a crash
    there is the old one or the new one.  True if nothing is damaged any more.
    """
    with ExitStack() as stack:
        image = CheckedImage(repository, revision, stack)
        donors = Donors(repository, revision, stack)
        offsets = block_offsets(revision.damaged)
        asked = 0 if again else revision.heal_tried
        if image.sums is None or not donors.limit_to_newer(asked):
            return False
        with explain(f"{repository.name}: cannot heal {revision.id}"):
            healed = heal_clone(repository, image, donors, offsets, stack)
    left = [(at, BLOCK) for at in offsets if at not in healed]
    damaged = join_ranges((at, min(BLOCK, image.size - at)) for at, _ in left)
    with repository.metadata_lock(revision.id):
        bad = damaged or repository.find(revision.id).by_hand
        trust = Trust.DISTRUSTED if bad else Trust.TRUSTED
        tried = donors.newest if damaged else 0
        repository.change(revision, trust=trust, damaged=damaged, heal_tried=tried)
    if not healed:
        return False
    log.warning(
        "%s: %s is healed in %d of %d blocks",
        repository.name,
        revision.id,
        len(healed),
        len(offsets),
    )
    return not damaged


def unverified(revision: Revision) -> Trust:
    return Trust.TRUSTED if revision.trust is Trust.VERIFIED else revision.trust


def make_sums(repository: Repository, image: CheckedImage, fd: int) -> tuple[Sums, set[int]]:
    """Write the digests of the image as it is to `fd`, and say which blocks cannot be read."""
    sums, lost = Sums(fd, image.size), set()
    sums.prepare()

    def work(offset: int, length: int, buffers: Buffers) -> None:
        for page in image.reader.salvage(buffers.new, offset, length):
            lost.add(offset + page - page % BLOCK)
        view = buffers.new
        sums.write(offset, [block_digest(view[start:end]) for _, start, end in blocks_of(length)])

    label = f"{repository.name} (digests of {image.revision.id})"
    pass_over(label, image.size, units(image.size, image.reader.extents()), work)
    return sums, lost


def disputed_digests(
    old_fd: int, sums: Sums, lost: set[int], others: list[Sums]
) -> dict[int, list[bytes]]:
    """For each block offset where the image's digest is in doubt, all that it could be.

    It is in doubt where the damaged file says something else or the block cannot
    be read; another revision that has one of two digests there decides.
    """
    found: dict[int, list[bytes]] = {}
    for start in range(sums_header.size, sums_header.size + DIGEST * -(-sums.size // BLOCK), PAGE):
        try:
            old: bytes | None = os.pread(old_fd, PAGE, start)
        except OSError:
            old = None
        new = os.pread(sums.fd, PAGE, start)
        for at in range(0, len(new), DIGEST):
            offset = (start + at - sums_header.size) // DIGEST * BLOCK
            mine, theirs = new[at : at + DIGEST], old and old[at : at + DIGEST]
            if mine == theirs or (theirs is None and offset not in lost):
                continue
            seen = {one.read(offset, 1)[0] for one in others if offset < one.size}
            choice = [one for one in (mine, theirs) if one] if theirs else sorted(seen)
            decided = [one for one in choice if one in seen]
            found[offset] = decided if len(decided) == 1 else choice
            if offset in lost and theirs:
                found[offset] = [theirs]
    return found


def settle_disputes(sums: Sums, digest: str, disputed: dict[int, list[bytes]]) -> list[int] | None:
    """Try until the whole has `digest`; where the image is wrong then, None if nothing fits."""
    if math.prod(map(len, disputed.values())) > 4096:
        return None
    before = {offset: sums.read(offset, 1)[0] for offset in disputed}
    for choice in itertools.product(*disputed.values()):
        for offset, one in zip(disputed, choice):
            sums.write(offset, [one])
        if sums.digest() == digest:
            return [at for at, one in zip(disputed, choice) if one != before[at]]
    return None


def sound_sums(repository: Repository, revision: Revision, stack: ExitStack) -> list[Sums]:
    """The digest files of other revisions, as far as they are sound; a hundred are enough."""
    found = []
    for other in repository.complete[-100:]:
        if other.id != revision.id and not other.problem:
            with suppress(Damaged):
                fd, sums = repository.open_sums(other)
                stack.callback(close, fd)
                found.append(sums)
    return found


def rebuild_sums(repository: Repository, revision: Revision) -> tuple[tuple[int, int], ...] | None:
    """Make `{id}.sums` anew, from the image and from what is left of the file.

    The digest in `.rev` proves the result, so nothing wrong can come of it.  The
    ranges in which the image turns out to be damaged, None if nothing fits.
    """
    with ExitStack() as stack, explain(f"{repository.name}: cannot make {revision.id}.sums anew"):
        image = CheckedImage(repository, revision, stack)
        name, target, dir_fd = temporary_name(), f"{revision.id}.sums", repository.dir_fd
        if file_type(dir_fd, target) not in (0, stat.S_IFREG):
            return None  # not ours, to be left alone
        fd = open_regular(dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        stack.callback(close, fd)
        try:
            sums, lost = make_sums(repository, image, fd)
            wrong: list[int] | None = []
            if sums.digest() != revision.digest:
                wrong = None
                with suppress(FileNotFoundError):
                    old_fd = open_regular(dir_fd, target)
                    stack.callback(close, old_fd)
                    others = sound_sums(repository, revision, stack)
                    disputed = disputed_digests(old_fd, sums, lost, others)
                    wrong = settle_disputes(sums, revision.digest, disputed)
            if wrong is None:
                return None
            os.fchmod(fd, 0o440)
            sync(fd)
            if sums.digest() != revision.digest:
                raise OSError(errno.EIO, "what was read back is not what was written")
            os.rename(name, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            sync(dir_fd)
            return join_ranges((at, min(BLOCK, image.size - at)) for at in wrong)
        finally:
            with suppress(OSError):
                os.unlink(name, dir_fd=dir_fd)


def repair_sums(repository: Repository, revision: Revision) -> None:
    """Make damaged digests anew, and mark what that shows of the image."""
    try:
        damaged = rebuild_sums(repository, revision)
        if damaged is None:
            log.warning("%s: digests of %s cannot be made anew", repository.name, revision.id)
            return
        log.warning("%s: digests of %s are made anew", repository.name, revision.id)
        trust = revision.trust
        if damaged:
            tell_damage(repository, revision, damaged)
            trust, damaged = Trust.DISTRUSTED, join_ranges([*revision.damaged, *damaged])
        with repository.metadata_lock(revision.id):
            values = {"sums_damaged": False, "trust": trust, "damaged": damaged}
            repository.change(revision, **values, heal_tried=0)
    except BackyError as e:
        log.warning("%s", e)


def repair(repository: Repository, found: Iterable[tuple[int, int]], again: bool = False) -> None:
    """Look who shares the damage just found, and heal what can be; under the job's lock.

    `again`: do so for all damage that is known, and ask who was asked in vain before.
    """
    offsets = set(block_offsets(found))
    if again:
        offsets.update(block_offsets(span for one in repository.complete for span in one.damaged))
    for revision in [one for one in repository.complete if one.sums_damaged and not one.problem]:
        repair_sums(repository, revision)
        now = [one for one in repository.complete if one.id == revision.id]
        offsets.update(block_offsets(now[0].damaged if now else ()))
    if offsets:
        find_shared_damage(repository, sorted(offsets))
    for revision in [one for one in repository.complete if one.damaged and not one.problem]:
        try:
            heal(repository, revision, again)
        except BackyError as e:
            log.warning("%s", e)


# ==== Backup =================================================================
#
# The order of the steps is the design: metadata that says incomplete, image,
# digests, each forced to the medium and read back, then the metadata that says
# complete, then `last`.  Until that one rename nothing counts, after it nothing
# is undone.


def block_mark(block: int, digest: bytes) -> int:
    return int.from_bytes(hashlib.sha256(struct.pack("<Q", block) + digest).digest(), "little")


class Update:
    """One pass that brings an image up to date with its source.

    `fresh`: the image is empty.  Else it is a clone of the parent, and with
    `by_digest` only blocks whose digest is new are compared with it.  `rehash`:
    the digests found are not to be relied on.
    """

    def __init__(
        self,
        still: Still,
        old: Reader,
        writer: Writer,
        sums: Sums,
        fresh: bool,
        by_digest: bool,
        rehash: bool,
        resized_from: int | None,
    ) -> None:
        self.still, self.old, self.writer, self.sums = still, old, writer, sums
        self.fresh, self.by_digest, self.rehash = fresh, by_digest, rehash
        # the short last block means something else when the size is another
        ends = {still.size // BLOCK, resized_from // BLOCK} if resized_from is not None else set()
        self.resized = {block for block in ends if block * BLOCK < still.size}
        self.written = bytearray(still.size // BLOCK // 8 + 1)  # a bit per block
        self.expected = 0
        self.reached = 0  # how far it got, about
        self.parent_damage: list[tuple[int, int]] = []
        self.trail: Trail | None = None
        self.is_resumed = False
        self.bytes_kept = self.bytes_kept_written = 0
        self.lock = threading.Lock()

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The units that hold something in the source, in the image or in the digests."""
        ends = [(block * BLOCK, block * BLOCK + 1) for block in sorted(self.resized)]
        sums = [] if self.fresh else self.sums.extents()
        return units(self.still.size, self.still.reader.extents(), self.old.extents(), ends, sums)

    def unit(self, offset: int, length: int, buffers: Buffers) -> None:
        self.reached = max(self.reached, offset)
        if self.is_resumed and self.is_done(offset, length, buffers):
            return
        self.read_source(buffers.new, offset, length)
        digests = [bytes(DIGEST)] * -(-length // BLOCK)
        if not self.fresh:
            digests = self.sums.read(offset, length)
        new = [block_digest(buffers.new[start:end]) for _, start, end in blocks_of(length)]
        if self.by_digest and new == digests:
            self.mark_trail(offset, new, 0)
            return
        spans = [(0, length)]
        if self.by_digest:
            spans = join_blocks(length, lambda block: new[block] != digests[block])
        lost = [] if self.fresh else self.read_old(buffers, offset, length, spans)
        runs = differing_runs(buffers, spans, self.fresh, lost)
        changed = {
            block for start, end, _ in runs for block in range(start // BLOCK, -(-end // BLOCK))
        }
        for block, start, end in blocks_of(length):
            comparable = not (self.fresh or self.rehash or offset // BLOCK + block in self.resized)
            if comparable and (block in changed or new[block] != digests[block]):
                self.look_at_parent(buffers.old[start:end], offset + start, digests[block])
        with explain(f"cannot write image at offset {offset}"):
            written = self.writer.update(buffers.new, offset, runs)
        with explain(f"cannot write digests for offset {offset}"):
            for block, digest in enumerate(new):
                if digest != digests[block]:  # never write again what was only read
                    self.sums.write(offset + block * BLOCK, [digest])
        self.note(offset, changed, new)
        self.mark_trail(offset, new, written)

    def mark_trail(self, offset: int, digests: list[bytes], written: int) -> None:
        if self.trail:
            with suppress(OSError):  # costs a resumption, not this run
                self.trail.mark(offset, digests, written)

    def is_done(self, offset: int, length: int, buffers: Buffers) -> bool:
        """Whether an interrupted run has done this unit, proven by what is on the medium."""
        try:
            digests = self.sums.read(offset, length)
            written = self.trail.find(offset, digests) if self.trail else None
            if written is None:
                return False
            self.old.read(buffers.old, offset, length)
        except (OSError, EOFError):
            return False
        for block, start, end in blocks_of(length):
            if block_digest(buffers.old[start:end]) != digests[block]:
                return False
        with self.lock:
            self.bytes_kept += length
            self.bytes_kept_written += written
        return True

    def look_at_parent(self, old: memoryview, offset: int, digest: bytes) -> None:
        """Note a block of the parent that is not what its digest says, now and when read again."""
        if block_digest(old) == digest:
            return
        again = memoryview(mmap.mmap(-1, BLOCK))
        lost = self.old.salvage(again, offset, len(old))
        with explain(f"cannot read digests for offset {offset}"):
            digest = self.sums.read(offset, len(old))[0]
        if lost or block_digest(again[: len(old)]) != digest:
            self.parent_damage.append((offset, len(old)))

    def read_source(self, view: memoryview, offset: int, length: int) -> None:
        try:
            self.still.reader.read(view, offset, length)
        except (OSError, EOFError):
            self.still.check()
            lost = self.still.reader.salvage(view, offset, length)
            if lost:
                name, at = self.still.name, offset + lost[0]
                raise BackyError(
                    f"cannot read source {name} at offset {at}: Input/output error"
                ) from None

    def read_old(self, buffers: Buffers, offset: int, length: int, spans: list[Span]) -> list[int]:
        """Read the clone's own bytes; the offsets of pages that cannot be read."""
        lost = []
        for start, end in spans:
            found = self.old.salvage(buffers.old[start:], offset + start, end - start)
            lost += [start + page for page in found]
        if lost:
            log.warning("the previous image cannot be read at offset %d: written anew", offset)
        if lost and length % PAGE and lost[-1] + PAGE > length:
            # to write a part of a page would be to read it: let it go first
            with explain("cannot truncate image"):
                os.ftruncate(self.writer.fd, offset + lost.pop())
                os.ftruncate(self.writer.fd, self.still.size)
        return lost

    def note(self, offset: int, changed: Iterable[int], digests: list[bytes]) -> None:
        """Remember what is to be read back, and a sum that tells lost writes of any kind."""
        first = offset // BLOCK
        with self.lock:
            for block in changed:
                self.written[(first + block) // 8] |= 1 << (first + block) % 8
                self.expected ^= block_mark(first + block, digests[block])

    def is_written(self, block: int) -> bool:
        return bool(self.written[block // 8] & 1 << block % 8)

    def written_units(self) -> Iterator[tuple[int, int]]:
        step = UNIT // BLOCK // 8
        for index in range(0, len(self.written), step):
            if any(self.written[index : index + step]):
                offset = index * 8 * BLOCK
                yield offset, min(UNIT, self.still.size - offset)


class ReadBack:
    """The second pass: what was written, from the medium, against the digests."""

    def __init__(self, update: Update, image: Reader) -> None:
        self.update, self.image = update, image
        self.sums = update.sums
        self.found = 0
        self.bytes_read = 0
        self.bad: list[int] = []
        self.lock = threading.Lock()

    def unit(self, offset: int, length: int, buffers: Buffers) -> None:
        digests = self.sums.read(offset, length)
        first = offset // BLOCK
        for start, end in join_blocks(length, lambda block: self.update.is_written(first + block)):
            lost = self.image.salvage(buffers.new[start:], offset + start, end - start)
            for at, stop in blocks_in([(start, end)]):
                block = at // BLOCK
                good = block_digest(buffers.new[at:stop]) == digests[block]
                with self.lock:
                    self.bytes_read += stop - at
                    self.found ^= block_mark(first + block, digests[block])
                    if not good or any(at <= start + page < stop for page in lost):
                        self.bad.append((first + block) * BLOCK)


@dataclass
class Base:
    """What a new image is cloned from, held open so that it stays."""

    revision: Revision
    image_fd: int
    sums_fd: int | None  # None: no digests to rely on


def choose_parent(repository: Repository, stack: ExitStack) -> Base | None:
    """The newest good revision, else the newest that can be read at all; its files held open."""
    usable = [revision for revision in repository.complete if not revision.problem]
    good = [revision for revision in usable if revision.is_good]
    for revision in [*reversed(good), *(one for one in reversed(usable) if one not in good)]:
        try:
            image_fd = repository.open_image(revision)
            break
        except BackyError as e:
            log.warning("%s: no parent: %s", repository.name, e)
    else:
        return None
    stack.callback(close, image_fd)
    if revision not in good:
        log.warning("%s: parent %s is distrusted, all is compared", repository.name, revision.id)
        return Base(revision, image_fd, None)
    try:
        sums_fd, _ = repository.open_sums(revision)
    except Damaged as e:
        if revision.digest:
            log.warning("%s: digests of %s are damaged: %s", repository.name, revision.id, e)
            with suppress(BackyError):  # that it is known helps the repair after this backup
                repository.change(revision, sums_damaged=True, trust=unverified(revision))
        return Base(revision, image_fd, None)
    stack.callback(close, sums_fd)
    return Base(revision, image_fd, sums_fd)


class Backup:
    """One run, from the lock to `last`."""

    def __init__(
        self, repository: Repository, job: Job, tags: tuple[str, ...], resume: bool = True
    ) -> None:
        self.repository, self.job, self.tags, self.resume = repository, job, tags, resume
        self.parent_damage: tuple[tuple[int, int], ...] = ()
        self.name = repository.name

    def run(self) -> Revision:
        """Make a revision and return it.

        Raises BackyError, and nothing is left then; after a signal or a crash what
        there is stays for the next run, which goes on with it if the source is the
        same.
        """
        repository = self.repository
        started = time.monotonic()
        with ExitStack() as stack, self.job.source.snapshot("backy") as still:
            with repository.metadata_lock():
                unfinished = repository.find_unfinished(still.state) if self.resume else None
                repository.sweep(keep=unfinished.id if unfinished else "")
                base = choose_parent(repository, stack)
                revision = self.plan(base, unfinished, still.state)
            try:
                self.begin(revision, unfinished is not None)
                revision = self.fill(revision, base, still, unfinished is not None)
                still.check()
                repository.check_presence()
                revision = replace(revision, duration=max(time.monotonic() - started, 0.001))
                repository.write_revision(replace(revision, source_state=""))
            except (Stopped, KeyboardInterrupt):
                self.leave(revision)
                raise
            except BaseException:
                self.discard(revision)
                raise
        return self.finish(revision)

    def plan(self, base: Base | None, unfinished: Revision | None, state: str) -> Revision:
        """The new revision, later than all others whatever the clock says."""
        revisions = self.repository.revisions
        now = datetime.now(UTC)
        newest = max((revision.clock for revision in revisions), default=0)
        revision = Revision(
            id=unfinished.id if unfinished else new_id(),
            timestamp=now,
            clock=max(newest + 1, epoch_microseconds(now)),
            tags=self.tags,
            parent=base.revision.id if base else None,
            source_state=state,
        )
        if newest > epoch_microseconds(now + timedelta(minutes=5)):
            log.warning("%s: the newest revision is from the future; check the clock", self.name)
        return revision

    def begin(self, revision: Revision, is_resumed: bool) -> None:
        """Say on the medium that there is an incomplete revision, before there is an image."""
        self.repository.write_revision(revision)
        verb = "going on with interrupted" if is_resumed else "new"
        tags = ",".join(self.tags)
        log.info("%s: %s revision %s [%s]", self.name, verb, revision.id, tags)

    def fill(
        self, revision: Revision, base: Base | None, still: Still, is_resumed: bool
    ) -> Revision:
        """Make image and digests, prove them, and return what is now known of them."""
        with ExitStack() as stack:
            take = self.reopen if is_resumed else self.create
            image_fd, sums_fd = (take(name, stack) for name in (revision.id, f"{revision.id}.sums"))
            origin = None if base and self.is_scattered(base) else base
            cloned = is_resumed or self.clone(origin, image_fd, sums_fd)
            rehash = is_resumed or not cloned or base is None or base.sums_fd is None
            with explain(f"{self.name}: cannot prepare image"):
                if os.fstat(image_fd).st_size != still.size:
                    os.ftruncate(image_fd, still.size)
                sums = Sums(sums_fd, still.size)
                sums.prepare()
                # a second descriptor, for reading past the cache
                old_fd = open_regular(self.repository.dir_fd, revision.id)
                stack.callback(close, old_fd)
            reader = Reader(old_fd, still.size, True)
            resized = base is not None and base.revision.size != still.size
            update = Update(
                still,
                reader,
                Writer(image_fd, still.size),
                sums,
                fresh=not cloned,
                by_digest=cloned and not rehash and self.job.verify is VerifyMode.WRITTEN,
                rehash=rehash,
                resized_from=base.revision.size if base and resized else None,
            )
            update.is_resumed = is_resumed
            update.trail = Trail(take(f"{revision.id}.part", stack))
            how = "differential" if base and cloned else "full"
            log.info("%s: performing %s backup", self.name, how)
            try:
                self.transfer(update)
            finally:
                self.parent_damage = join_ranges(update.parent_damage)
                self.distrust_parent(base, self.parent_damage)
            digest = self.settle(image_fd, sums_fd, sums)
            proven = self.prove(update, reader, digest)
            state = state_of_inode(image_fd)
            extents = self.extents_when_written(base) if base and cloned else 0
            with suppress(OSError):
                extents = extents or count_extents(image_fd)
        if is_resumed:
            kept = format_size(update.bytes_kept)
            log.info("%s: %s of the interrupted run were sound and kept", self.name, kept)
        everything = not update.by_digest
        stats = {**revision.stats, "verification": "full" if everything else "written"}
        stats["bytes_verified"] = still.size if everything else proven
        stats["bytes_read"] = still.reader.bytes_read
        stats["extents_when_written"] = extents
        return replace(
            revision,
            size=still.size,
            digest=digest,
            bytes_written=update.writer.bytes_written + update.bytes_kept_written,
            trust=Trust.VERIFIED if everything else Trust.TRUSTED,
            verified=datetime.now(UTC) if everything else None,
            image_state=state if everything else "",
            stats=stats,
        )

    def is_scattered(self, base: Base) -> bool:
        """Whether the parent lies in so many pieces that a new image in one piece is better."""
        limit = self.job.rewrite_above
        with suppress(OSError):
            count = count_extents(base.image_fd) if limit else 0
            if count > max(limit, 2 * self.extents_when_written(base)):
                space = os.statvfs(self.repository.path)
                needed = os.fstat(base.image_fd).st_blocks * 512
                if space.f_bavail * space.f_frsize > 2 * needed:
                    log.info("%s: %d extents: the image is written anew", self.name, count)
                    return True
                log.warning("%s: %d extents, but no room to write it anew", self.name, count)
        return False

    @staticmethod
    def extents_when_written(base: Base) -> int:
        """How many extents the parent's image had when it was last written as a whole."""
        value = base.revision.stats.get("extents_when_written")
        number = resolve(value) if isinstance(value, Node) else value
        return number if isinstance(number, int) else 0

    def create(self, name: str, stack: ExitStack) -> int:
        with explain(f"{self.name}: cannot create {name}"):
            fd = open_regular(self.repository.dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        stack.callback(close, fd)
        return fd

    def reopen(self, name: str, stack: ExitStack) -> int:
        """Open a file that an interrupted run left, whatever mode it had reached."""
        with explain(f"{self.name}: cannot open {name}"):
            fd = open_regular(self.repository.dir_fd, name)
            stack.callback(close, fd)
            os.fchmod(fd, 0o600)
            fd = open_regular(self.repository.dir_fd, name, os.O_RDWR)
        stack.callback(close, fd)
        return fd

    def clone(self, base: Base | None, image_fd: int, sums_fd: int) -> bool:
        """Let the new image share the parent's extents; False, and a warning, where it cannot."""
        try:
            with explain(f"{self.name}: cannot clone"):
                if base is None:
                    clone_file(sums_fd, image_fd)  # both are empty: only to know whether it works
                    return False
                self.clone_one(base.image_fd, image_fd)
                if base.sums_fd is not None:
                    self.clone_one(base.sums_fd, sums_fd)
                sync(image_fd)  # or a power failure could take the sharing and leave the trail
        except CloneUnsupported:
            log.warning(
                "%s: this file system cannot share extents: every revision is a full copy "
                "(keep backups on btrfs, or on XFS made with reflink=1)",
                self.name,
            )
            return False
        return True

    @staticmethod
    def clone_one(origin_fd: int, target_fd: int) -> None:
        clone_file(origin_fd, target_fd)
        if os.fstat(target_fd).st_size != os.fstat(origin_fd).st_size:
            raise OSError(errno.EIO, "the clone has another size")
        hint_small_copies(target_fd)

    def transfer(self, update: Update) -> None:
        """Run the first pass, with an eye on the source."""
        still, looked = update.still, time.monotonic()

        def look() -> None:
            nonlocal looked
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                still.check()

        try:
            with explain("cannot examine the source or the image"):
                pass_over(self.name, still.size, update.pieces(), update.unit, look)
                still.check()
        except SourceChanged as e:
            raise SourceChanged(f"{self.name}: {e}{self.first_difference(update)}", e.hint) from e
        except BackyError as e:
            raise BackyError(f"{self.name}: {e}", e.hint) from e

    @staticmethod
    def first_difference(update: Update) -> str:
        """Where the source differs from what was read of it, looked for during 10 seconds."""
        buffers, deadline = Buffers(), time.monotonic() + 10
        size = update.still.size
        reached = min(update.reached + UNIT, size)
        with suppress(OSError, EOFError):
            for offset in range(0, reached, UNIT):
                length = min(UNIT, size - offset)
                try:
                    update.still.reader.read(buffers.new, offset, length)
                except EOFError:
                    end = os.lseek(update.still.reader.fd, 0, os.SEEK_END)
                    return f": it ends at offset {end}"
                update.old.read(buffers.old, offset, length)
                runs = differing_runs(buffers, [(0, length)])
                if runs:
                    return f": it differs from offset {offset + runs[0][0]} on"
                if time.monotonic() > deadline:
                    break
        return f" (read up to offset {reached})"

    def settle(self, image_fd: int, sums_fd: int, sums: Sums) -> str:
        """Force image and digests to the medium, read-only; the digest of the digests."""
        for what, fd in (("image", image_fd), ("digests", sums_fd)):
            with explain(f"{self.name}: cannot write {what} to the medium"):
                os.fchmod(fd, 0o440)
                sync(fd)
                drop_cache(fd)
        with explain(f"{self.name}: cannot read the digests back"):
            digest = sums.digest()
        with explain(f"{self.name}: cannot write the directory to the medium"):
            sync(self.repository.dir_fd)
        return digest

    def prove(self, update: Update, reader: Reader, digest: str) -> int:
        """Read back what was written; raises Distrusted where that is not what it should be."""
        log.info(
            "%s: performing %s verification", self.name, "partial" if update.by_digest else "full"
        )
        check = ReadBack(update, reader)
        with explain(f"{self.name}: cannot read back"):
            label = f"{self.name} (reading back)"
            pass_over(label, reader.size, update.written_units(), check.unit)
        with explain(f"{self.name}: cannot examine the image"):
            size = os.fstat(update.writer.fd).st_size
        try:
            update.sums.check(digest)
        except Damaged as e:
            raise Distrusted(f"{self.name}: verification failed: digests: {e}") from e
        if check.bad:
            raise Distrusted(
                f"{self.name}: verification failed: the medium returns other bytes than were "
                f"written at offset {', '.join(map(str, sorted(check.bad)[:10]))}",
                "the disk, its cable or its controller may be failing; look at dmesg",
            )
        if check.found != update.expected or size != reader.size:
            raise Distrusted(f"{self.name}: verification failed: writes have been lost")
        return check.bytes_read

    def distrust_parent(self, base: Base | None, damaged: tuple[tuple[int, int], ...]) -> None:
        """Say that the parent is not what its digests say; our copy of it is written anew."""
        if base is None or not damaged:
            return
        name = base.revision.id
        for line in describe_ranges(damaged):
            log.warning("%s: parent %s is damaged: %s", self.name, name, line)
        log.warning("%s: parent %s is now distrusted", self.name, name)
        try:
            with self.repository.metadata_lock():
                now = self.repository.find(name)
                damaged = join_ranges([*now.damaged, *damaged])
                values = {"trust": Trust.DISTRUSTED, "damaged": damaged, "heal_tried": 0}
                self.repository.change(base.revision, **values)
        except BackyError as e:
            log.warning("%s (this is not recorded)", e)

    def leave(self, revision: Revision) -> None:
        """After a signal: keep what the next run can go on with, and nothing else."""
        try:
            with self.repository.metadata_lock():
                left = [one for one in self.repository.revisions if one.id == revision.id]
                usable = self.resume and self.repository.find_unfinished(revision.source_state)
                if left and not usable:
                    self.repository.remove(revision)
            if usable:
                log.info("%s: stopped; the next backup goes on from here", self.name)
        except BackyError as e:
            log.warning("%s: cannot clear up: %s", self.name, e)

    def discard(self, revision: Revision) -> None:
        """Leave nothing of a revision that did not become complete for certain."""
        try:
            with self.repository.metadata_lock():
                if any(one.id == revision.id for one in self.repository.revisions):
                    self.repository.remove(revision)
        except BackyError as e:
            log.warning("%s: cannot clear up after the failure: %s", self.name, e)

    def finish(self, revision: Revision) -> Revision:
        """After the commit: what fails now is a warning, for the revision is there."""
        try:
            with self.repository.metadata_lock():
                with explain(f"{self.name}: cannot point last to {revision.id}"):
                    self.repository.point_last()
                    self.repository.drop_trail(revision.id)
            if any(one.damaged or one.sums_damaged for one in self.repository.complete):
                repair(self.repository, self.parent_damage)
        except (BackyError, MemoryError) as e:
            log.warning("%s", e or "out of memory")
        with suppress(MemoryError):
            self.repository.check_presence()
        log.info(
            "%s: revision %s complete: %s, %s written, in %.1f s",
            self.name,
            revision.id,
            format_size(revision.size or 0),
            format_size(revision.bytes_written),
            revision.duration,
        )
        return revision


# ==== Verify =================================================================
#
# Which blocks of which revisions are looked at, and what that says of them.  A
# sample is a part of a partition: N runs of one part each are everything.  An
# extent that several revisions share is read once a run.


def part_blocks(first: int, last: int, part: Sample) -> Iterator[int]:
    """The blocks from `first` to `last` (excluded) that are in this part of the partition.

    Of every N neighbours one is in each part, and which one is different from
    stripe to stripe.
    """
    for stripe in range(first // part.of, last // part.of + 1):
        turn = (stripe * 2654435761 >> 7) % part.of
        block = stripe * part.of + (part.last - turn) % part.of
        if first <= block < last:
            yield block


@dataclass(frozen=True)
class Scope:
    """What a verification looks at: everything, or one part of so many, until a deadline."""

    parts: int = 1
    deadline: float = math.inf


class Verification:
    """One revision being verified; `before` is one that was just verified, to learn from."""

    def __init__(
        self, image: CheckedImage, before: Verification | None, scope: Scope, part: Sample
    ) -> None:
        self.image, self.before, self.scope, self.part = image, before, scope, part
        self.bad_before = set(block_offsets(before.image.damaged)) if before else set()
        goes_on = part.of == 1 and scope.deadline != math.inf
        seen_to = image.revision.seen_to
        self.start = self.reached = seen_to if goes_on and 0 < seen_to < image.size else 0
        self.is_finished = True

    def pieces(self) -> Iterator[tuple[int, int]]:
        """What must be read: what is wanted, without what `before` has shown to be sound."""
        for offset, length in self.image.pieces():
            if offset < self.start:
                continue
            if time.monotonic() > self.scope.deadline:
                self.is_finished = False
                return
            self.reached = offset + length
            if self.is_known(offset, length):
                continue
            start = end = offset
            for block_start, block_end in self.wanted(offset, length):
                if self.is_known(block_start, block_end - block_start):
                    continue
                if block_start != end and end > start:
                    yield start, end - start
                if block_start != end:
                    start = block_start
                end = block_end
            if end > start:
                yield start, end - start

    def wanted(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the blocks of a unit that this run is to see."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        for block in (
            part_blocks(first, last, self.part) if self.part.of > 1 else range(first, last)
        ):
            yield block * BLOCK, min((block + 1) * BLOCK, offset + length)

    def is_known(self, offset: int, length: int) -> bool:
        """Whether `before` has the same extents and digests there, and so the same fate."""
        before, image = self.before, self.image
        if before is None or offset + length > min(before.image.size, image.size):
            return False
        digests = image.digests(offset, length)
        if digests != before.image.digests(offset, length):
            return False
        if not share_extents(image.fd, before.image.fd, offset, offset + length):
            return False
        for _, start, end in blocks_of(length):
            if offset + start in self.bad_before:
                image.damaged.append((offset + start, end - start))
        return True


@dataclass(frozen=True)
class Result:
    """What a verification found: in words, the bytes that were read, the ranges that are bad."""

    revision: Revision
    text: str
    bytes_read: int = 0
    damaged: tuple[tuple[int, int], ...] = ()
    is_damaged: bool = False
    is_unknown: bool = False  # there is nothing to hold it against


class Verifier:
    """A run over some revisions of a job, and what it makes of them."""

    def __init__(self, repository: Repository, scope: Scope) -> None:
        self.repository, self.scope = repository, scope
        self.results: list[Result] = []

    def run(self, revisions: list[Revision]) -> None:
        """Verify these, in this order, and mark each.  Heals what it can if damage is found."""
        number = self.next_part(revisions)
        before: Verification | None = None
        held = ExitStack()  # the files of `before`
        try:
            for revision in revisions:
                if time.monotonic() > self.scope.deadline:
                    self.results.append(Result(revision, "not looked at, time is up"))
                    continue
                with ExitStack() as stack:
                    run = self.verify(revision, before, number, stack)
                    if run:
                        held.close()
                        before, held = run, stack.pop_all()
                        run.before = None
        finally:
            held.close()
        if any(result.is_damaged for result in self.results):
            self.repair()

    def next_part(self, revisions: list[Revision]) -> int:
        """The part after the one that was seen last, so that N runs in a row are everything."""
        seen = [one.sample for one in revisions if one.sample and one.sample.of == self.scope.parts]
        return (max(seen, key=lambda one: one.seen).last + 1) % self.scope.parts if seen else 0

    def verify(
        self, revision: Revision, before: Verification | None, number: int, stack: ExitStack
    ) -> Verification | None:
        repository, name = self.repository, self.repository.name
        if revision.problem:
            text = f"cannot be verified: {revision.problem}"
            self.results.append(Result(revision, text, is_damaged=True))
            return None
        image = CheckedImage(repository, revision, stack)
        if image.sums is None:
            text = f"cannot be verified: {image.unchecked}"
            damaged = bool(revision.digest)
            result = Result(revision, text, is_damaged=damaged, is_unknown=not damaged)
            self.results.append(result)
            if revision.digest:
                self.mark(revision, trust=unverified(revision), sums_damaged=True)
            return None
        old = revision.sample
        follows = old and old.of == self.scope.parts and (old.last + 1) % old.of == number
        seen = min((old.seen if old and follows else 0) + 1, self.scope.parts)
        part = Sample(self.scope.parts, number, seen)
        run = Verification(image, before, self.scope, part)
        with explain(f"{name}: verify"):
            pass_over(f"{name} (verifying {revision.id})", image.size, run.pieces(), image.check)
        self.conclude(run)
        return run

    def conclude(self, run: Verification) -> None:
        """Mark the revision with what is now known of it, and not more."""
        image, part = run.image, run.part
        values: dict[str, Any] = {}
        is_whole = run.is_finished and part.of == 1
        known = () if is_whole else image.revision.damaged  # may lie where nobody looked now
        if image.damaged:
            text = "damaged"
            values = {"trust": Trust.DISTRUSTED, "damaged": join_ranges([*image.damaged, *known])}
            part = replace(part, seen=0)
        elif not run.is_finished and part.of > 1:
            text = "partly verified, time is up"
        elif not run.is_finished:
            text = f"sound up to {format_size(run.reached)}, time is up"
            values = {"seen_to": run.reached}
        elif part.seen < part.of:
            text = f"sound in part {part.last + 1} of {part.of}, {part.seen} of them seen"
        elif known or (part.of > 1 and image.revision.trust is Trust.DISTRUSTED):
            text = "sound where it was looked at; distrusted until all is verified at once"
        else:
            text = "sound"
            values = {"trust": Trust.VERIFIED, "verified": datetime.now(UTC), "damaged": ()}
            values["image_state"] = state_of_inode(image.fd) if is_whole and not run.start else ""
            values["by_hand"], values["seen_to"] = False, 0
        if run.is_finished and part.of > 1:
            values["sample"] = part
        revision = self.mark(image.revision, **values) if values else image.revision
        read = image.reader.bytes_read
        self.results.append(Result(revision, text, read, image.damage(), bool(image.damaged)))

    def mark(self, revision: Revision, **values: Any) -> Revision:
        """Write down what was found; where that cannot be, the result stands all the same.

        What others have found bad meanwhile is not made good by what we saw before.
        """
        try:
            with self.repository.metadata_lock(revision.id):
                now = self.repository.find(revision.id)
                if values.get("trust") is not Trust.DISTRUSTED and (
                    (now.trust, now.damaged) != (revision.trust, revision.damaged)
                ):
                    log.warning("%s: %s was marked meanwhile", self.repository.name, revision.id)
                    return now
                if values.get("trust") is Trust.DISTRUSTED:
                    values["damaged"] = join_ranges([*values.get("damaged", ()), *now.damaged])
                    values["heal_tried"] = 0
                return self.repository.change(revision, **values)
        except BackyError as e:
            log.warning("%s (the result is not recorded)", e)
            return replace(revision, **values)

    def repair(self) -> None:
        """Mark who shares the damage, heal what can be, and say what came of it."""
        repository = self.repository
        try:
            with repository.job_lock("verify"):
                with repository.metadata_lock():
                    pass  # what there is now
                repair(repository, (), again=True)
        except BackyError as e:
            log.warning("%s: not healed now: %s", repository.name, e)
        now = {revision.id: revision for revision in repository.complete}
        self.results = [
            self.after_repair(result, now.get(result.revision.id, result.revision))
            for result in self.results
        ]

    @staticmethod
    def after_repair(result: Result, now: Revision) -> Result:
        text = result.text
        if now.problem:
            return result
        if result.is_damaged and not now.damaged and not now.sums_damaged:
            text = "damaged, and healed from other revisions"
            if not result.damaged:
                text = "sound, but its digests were damaged; they are made anew"
        elif result.is_damaged and not result.damaged and not now.sums_damaged:
            text = "damaged, and so were its digests"
        return replace(result, revision=now, text=text, damaged=result.damaged or now.damaged)


def compare_with_source(repository: Repository, revision: Revision, source: Source) -> int:
    """Read revision and source, say where they differ; how many bytes do, in pages."""
    with ExitStack() as stack, source.snapshot("backy") as still:
        image = CheckedImage(repository, revision, stack)
        if still.size != image.size:
            sizes = f"the source has {still.size} bytes, {revision.id} has {image.size}"
            raise Distrusted(f"{repository.name}: {sizes}")
        differing: list[tuple[int, int]] = []
        count, lock = 0, threading.Lock()

        def compare(offset: int, length: int, buffers: Buffers) -> None:
            nonlocal count
            image.read(buffers.new, offset, length)
            try:
                still.reader.read(buffers.old, offset, length)
            except EOFError:
                still.check()
                raise OSError(errno.EIO, "the source ends before its end") from None
            runs = differing_runs(buffers, [(0, length)])
            with lock:
                count += sum(end - start for start, end, _ in runs)
                differing.extend((offset + start, end - start) for start, end, _ in runs)
                if len(differing) > 10 * MOST_RANGES:  # the first stay exact, and are printed
                    known = join_ranges(differing)
                    first, rest = known[:MOST_RANGES], known[MOST_RANGES:]
                    differing[:] = [*first, *widen_ranges(rest, MOST_RANGES)]

        with explain(f"{repository.name}: cannot compare with the source"):
            pieces = image.pieces(still.reader.extents())
            pass_over(f"{repository.name} (comparing)", image.size, pieces, compare)
        still.check()
        for line in describe_ranges(join_ranges(differing)):
            output(f"{revision.id}: differs from the source: {line}\n")
        if image.damage():
            hint = "backy verify names and marks what is damaged"
            raise Distrusted(f"{repository.name}: {revision.id} is damaged", hint)
        return count


# ==== Dedup ==================================================================
#
# Blocks with one digest in several places are made to share one extent: across
# revisions, and across jobs of one file system.  Nothing is rewritten; the kernel
# compares the bytes before it lets go of one copy.


class Buckets:
    """Records of one size, spread over temporary files so that each is small enough to sort."""

    def __init__(self, size: int, stack: ExitStack) -> None:
        import tempfile

        self.size, self.stack, self.make = size, stack, tempfile.TemporaryFile
        self.files: dict[int, Any] = {}

    def add(self, bucket: int, record: bytes) -> None:
        if bucket not in self.files:
            self.files[bucket] = self.stack.enter_context(self.make(buffering=4 * KiB))
        self.files[bucket].write(record)

    def sorted(self) -> Iterator[list[bytes]]:
        """The records of each bucket, sorted; a bucket is gone when the next is asked for."""
        for bucket in sorted(self.files):
            file = self.files[bucket]
            file.seek(0)
            yield sorted(iter(lambda file=file: file.read(self.size), b""))
            file.close()


found_block = struct.Struct(">32sIQ")  # digest, number of the image, offset
found_match = struct.Struct(">IQIQ")  # image, offset; and the other image, offset


class Dedup:
    """One run over all images of some jobs; memory does not grow with them."""

    FILES = 64  # open at a time
    REGION = 4 * GiB

    def __init__(self, repositories: list[Repository], dry_run: bool) -> None:
        self.images = [
            (repository, revision)
            for repository in repositories
            for revision in repository.complete
            if revision.is_good and revision.digest
        ]
        self.dry_run = dry_run
        self.opened: dict[int, tuple[CheckedImage, ExitStack]] = {}
        self.blocks = self.shared = 0
        self.moved: set[int] = set()  # the images that lie on other extents now

    def run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.close_all)
            digests = Buckets(found_block.size, stack)
            matches = Buckets(found_match.size, stack)
            count = max(1, sum(revision.size or 0 for _, revision in self.images) // BLOCK)
            buckets = min(256, -(-count // 50_000))
            self.collect(digests, buckets)
            for records in digests.sorted():
                self.match(records, matches)
            for records in matches.sorted():
                self.share(records)
        for number in self.moved:  # nobody has verified those extents for it
            repository, revision = self.images[number]
            with suppress(BackyError), repository.metadata_lock(revision.id):
                repository.change(revision, image_state="")

    def collect(self, digests: Buckets, buckets: int) -> None:
        """Note every block that an image does not have in common with the one before it."""
        before: Sums | None = None
        for number, (repository, revision) in enumerate(self.images):
            image = self.open(number)
            if image is None or image.sums is None:
                continue
            sums = image.sums
            follows = number and self.images[number - 1][0] is repository
            with explain(f"{repository.name}: cannot read digests of {revision.id}"):
                for offset, length in units(image.size, sums.extents()):
                    mine = sums.read(offset, length)
                    theirs: list[bytes] = []
                    if follows and before and offset + length <= before.size:
                        theirs = before.read(offset, length)
                    for block, digest in enumerate(mine):
                        at = offset + block * BLOCK
                        if digest == bytes(DIGEST) or at + BLOCK > image.size:
                            continue
                        self.blocks += 1
                        if block < len(theirs) and theirs[block] == digest:
                            continue
                        record = found_block.pack(digest, number, at)
                        digests.add(int.from_bytes(digest[:4], "big") % buckets, record)
            before = sums

    def match(self, records: list[bytes], matches: Buckets) -> None:
        """Of equal blocks the first is the one that the others are to share."""
        first: tuple[bytes, int, int] | None = None
        for record in records:
            digest, number, offset = found_block.unpack(record)
            if first is None or digest != first[0]:
                first = digest, number, offset
                continue
            region = (number * 31 + offset // self.REGION) % 256  # few files; sorting does the rest
            matches.add(region, found_match.pack(number, offset, first[1], first[2]))

    def share(self, records: list[bytes]) -> None:
        """Share these blocks of one image, neighbours together."""
        run: list[int] = []  # number, offset, other, other offset, length
        for record in records:
            number, offset, other, place = found_match.unpack(record)
            follows = run and (run[0], run[2]) == (number, other) and run[4] < 16 * MiB
            if follows and run[1] + run[4] == offset and run[3] + run[4] == place:
                run[4] += BLOCK
                continue
            self.share_run(run)
            run = [number, offset, other, place, BLOCK]
        self.share_run(run)

    def share_run(self, run: list[int]) -> None:
        if not run:
            return
        number, offset, other, place, length = run
        image, origin = self.open(number), self.open(other)
        if image is None or origin is None:
            return
        mine = places(image.fd, offset, offset + length)
        theirs = places(origin.fd, place, place + length)
        if mine is not None and theirs is not None:
            moved = [(at - place + offset, physical, size) for at, physical, size in theirs]
            if mine == moved:
                return
        if not self.dry_run:  # the kernel would wait for each page
            read_ahead(origin.fd, place, length)
            read_ahead(image.fd, offset, length)
        try:  # no bytes: only to know whether it could be done
            done = dedupe_range(origin.fd, place, 0 if self.dry_run else length, image.fd, offset)
            self.shared += length if self.dry_run else done
            if done:
                self.moved.add(number)
        except OSError as e:
            if e.errno in (*NOT_SUPPORTED, errno.EXDEV):
                raise CloneUnsupported(f"cannot share extents: {e.strerror}") from e
            log.warning("%s: %s", image.revision.id, e.strerror)
        finally:
            drop_cache(image.fd, offset, length)
            drop_cache(origin.fd, place, length)

    def open(self, number: int) -> CheckedImage | None:
        """The image of that number, open as long as there is room."""
        if number in self.opened:
            self.opened[number] = self.opened.pop(number)  # now the last to be closed
            return self.opened[number][0]
        if len(self.opened) >= self.FILES:
            self.opened.pop(next(iter(self.opened)))[1].close()
        repository, revision = self.images[number]
        stack = ExitStack()
        try:
            image = CheckedImage(repository, revision, stack)
        except BackyError as e:
            log.warning("%s", e)
            return None
        self.opened[number] = image, stack
        return image

    def close_all(self) -> None:
        while self.opened:
            self.opened.popitem()[1][1].close()


# ==== Restore ================================================================
#
# To a new file by sharing or by copying, over a file or device by writing only
# what differs, to a pipe as a stream.  Every block is checked on the way; damage
# does not stop a restore, but it is listed and the exit status is 1.


class Target:
    """A file or block device that is to become the image."""

    def __init__(self, path: str, fd: int, is_new: bool) -> None:
        self.path, self.fd, self.is_new = path, fd, is_new
        self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)


def refuse_revision(repository: Repository, path: str) -> None:
    """A restore must never write into a repository, ours or another."""
    real = os.path.realpath(path)
    parent = os.path.dirname(real)
    with suppress(OSError):
        ours = os.path.samestat(os.stat(parent), os.fstat(repository.dir_fd))
        if ours or os.path.lexists(f"{real}.rev"):
            raise BackyError(f"{printable(path)} belongs to a repository and is never overwritten")


def refuse_used_file(fd: int, shown: str) -> None:
    """Raise Busy when somebody holds a lock on the file or has made a loop device of it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # qemu locks its images in this way
        used = not take_lock(fd)
    except OSError as e:
        used = e.errno in (errno.EAGAIN, errno.EACCES)
    status = os.fstat(fd)
    with suppress(OSError):
        for name in os.listdir("/sys/block"):
            backing = f"/sys/block/{name}/loop/backing_file"
            with suppress(OSError), open(
                backing, encoding="utf-8", errors="surrogateescape"
            ) as file:
                used = used or os.path.samestat(os.stat(file.read().rstrip("\n")), status)
    if used:
        raise Busy(f"{shown} is in use: it is locked or has a loop device")


def open_target(
    repository: Repository, path: str, size: int, force: bool, stack: ExitStack
) -> Target:
    """Open or create TARGET; refuses, before a byte is written, what must not be overwritten."""
    shown = printable(path)
    refuse_revision(repository, path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(close, fd)
        return Target(path, fd, True)
    except FileExistsError:
        pass
    except OSError as e:
        raise BackyError(f"cannot create {shown}: {e.strerror}") from e
    with explain(f"cannot examine {shown}"):
        status = os.stat(path)
    for below in files_below(status.st_rdev) if stat.S_ISBLK(status.st_mode) else ():
        refuse_revision(repository, below)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise BackyError(
            f"{shown} is neither a file nor a block device", "for a pipe use - as TARGET"
        )
    if not force:
        what = "a block device" if stat.S_ISBLK(status.st_mode) else "a file"
        raise BackyError(f"{shown} exists, it is {what}", "use --force to overwrite it")
    exclusive = (
        os.O_EXCL if stat.S_ISBLK(status.st_mode) else 0
    )  # the kernel refuses what is in use
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as e:
        if e.errno in (errno.EBUSY, errno.ETXTBSY):
            raise Busy(f"{shown} is in use: it is mounted or held open") from e
        raise BackyError(f"cannot open {shown}: {e.strerror}") from e
    stack.callback(close, fd)
    target = Target(path, fd, False)
    if not target.is_device:
        refuse_used_file(fd, shown)
    with explain(f"cannot examine {shown}"):
        room = os.lseek(fd, 0, os.SEEK_END)
    if target.is_device and room < size:
        raise BackyError(f"{shown} is too small: it has {room} bytes, the image {size}")
    return target


def shares_extents(image_fd: int, target_fd: int) -> bool:
    try:
        clone_file(image_fd, target_fd)
    except (CloneUnsupported, OSError):
        return False
    return os.fstat(target_fd).st_size == os.fstat(image_fd).st_size


def sync_parent(path: str) -> None:
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        close(fd)


class Restore:
    """Brings an image to a file or a device: shared, copied, or only what differs."""

    def __init__(
        self, repository: Repository, image: CheckedImage, target: Target, check: bool
    ) -> None:
        """`check`: read the image also where it was verified and its extents can be shared."""
        self.name, self.image, self.target = repository.name, image, target
        self.shown = printable(target.path)
        self.shared = target.is_new and shares_extents(image.fd, target.fd)
        self.is_checked = check or not self.shared or not image.is_untouched()
        self.writer = Writer(target.fd, image.size, target.is_device)
        self.old: Reader | None = None
        self.seen = self.differed = 0  # units of the target that were compared, that were others

    def prepare(self, stack: ExitStack) -> None:
        """Give a file its size; open what there is, to be compared with."""
        with explain(f"cannot prepare {self.shown}"):
            if not self.target.is_device and os.fstat(self.target.fd).st_size != self.image.size:
                os.ftruncate(self.target.fd, self.image.size)
            if not self.target.is_new:
                fd = os.open(f"/proc/self/fd/{self.target.fd}", os.O_RDWR | os.O_CLOEXEC)
                stack.callback(close, fd)
                self.old = Reader(fd, self.image.size, not is_cached(fd, self.image.size))
                if self.target.is_device and self.old.direct:
                    self.writer.direct_fd = fd

    def unit(self, offset: int, length: int, buffers: Buffers) -> None:
        mended = self.image.read(buffers.new, offset, length)
        if self.shared:  # it was read to be checked
            for start, end in mended:
                write_all(self.target.fd, buffers.new[start:end], offset + start)
            return
        with explain(f"cannot write {self.shown} at offset {offset}"):
            self.writer.update(buffers.new, offset, self.runs(offset, length, buffers))

    def runs(self, offset: int, length: int, buffers: Buffers) -> list[tuple[int, int, bool]]:
        """What to write of a unit.

        Where nearly all of the target is something else, reading it is in vain:
        then only every sixteenth unit is compared, until one is alike again.
        """
        if self.old is None:
            return differing_runs(buffers, [(0, length)], fresh=True)
        if self.seen >= 32 and self.differed > 0.95 * self.seen and offset // UNIT % 16:
            return all_runs(buffers, length)
        lost = self.old.salvage(buffers.old, offset, length)
        runs = differing_runs(buffers, [(0, length)], False, lost)
        self.seen += 1
        self.differed += sum(end - start for start, end, _ in runs) > length // 2
        return runs

    def run(self) -> None:
        """Do it, to the medium.  Damage of the image is left for confess()."""
        if self.is_checked:
            with explain(f"{self.name}: restore"):
                pieces = self.image.pieces(self.old.extents() if self.old else [])
                pass_over(f"{self.name} (restoring)", self.image.size, pieces, self.unit)
        with explain(f"cannot write {self.shown} to the medium"):
            sync(self.target.fd)
            drop_cache(self.target.fd)
            if self.target.is_new:
                sync_parent(self.target.path)

    def what_was_done(self) -> str:
        if not self.is_checked:
            return "extents shared, not read again (verified, not written to since)"
        if self.shared:
            return "extents shared and checked"
        return f"{format_size(self.writer.bytes_written)} written"


def announce(repository: Repository, image: CheckedImage) -> None:
    revision = image.revision
    log.info("%s: restoring %s [%s]", repository.name, revision, printable(",".join(revision.tags)))
    if revision.trust is Trust.DISTRUSTED:
        log.warning("%s: %s is distrusted", repository.name, revision.id)
    if image.sums is None:
        log.warning("%s: %s cannot be checked: %s", repository.name, revision.id, image.unchecked)


def confess(repository: Repository, image: CheckedImage) -> None:
    """Raise Distrusted with the byte ranges that are not what they should be."""
    for line in describe_ranges(join_ranges(image.mended)):
        name = image.revision.id
        log.warning("%s: %s: %s: taken from another revision", repository.name, name, line)
    damaged = image.damage()
    if damaged:
        known = join_ranges([*image.revision.damaged, *damaged])
        with suppress(BackyError), repository.metadata_lock():  # we may not be allowed to
            values = {"trust": Trust.DISTRUSTED, "damaged": known, "heal_tried": 0}
            repository.change(image.revision, **values)
        for line in describe_ranges(damaged):
            log.error("%s: %s is damaged: %s", repository.name, image.revision.id, line)
        raise Distrusted(
            f"{repository.name}: {sum(length for _, length in damaged)} bytes of "
            f"{image.revision.id} are not what was backed up; all else is restored",
            "no other revision has them; the same place may be sound in an older or newer one",
        )


def restore_revision(
    repository: Repository, revision: Revision, path: str, force: bool, check: bool = False
) -> None:
    """Bring the image to the file or device at `path`, and to the medium, before this returns.

    Raises Distrusted at the end when parts of the image were damaged.  What was
    interrupted goes on where it was when it is started again, since only what
    differs is written.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        donors = Donors(repository, revision, stack)
        image = CheckedImage(repository, revision, stack, donors.mend)
        target = open_target(repository, path, image.size, force, stack)
        announce(repository, image)
        restore = Restore(repository, image, target, check)
        try:
            restore.prepare(stack)
            restore.run()
        except BaseException:
            log.error("%s is not complete; start again, with --force, to go on", restore.shown)
            raise
        log.info(
            "%s: restored %s to %s: %s, %s, in %.1f s",
            repository.name,
            revision.id,
            restore.shown,
            format_size(image.size),
            restore.what_was_done(),
            time.monotonic() - started,
        )
        confess(repository, image)


def write_some(fd: int, view: memoryview) -> int:
    try:
        return os.write(fd, view)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise BackyError(f"cannot write to standard output: {e.strerror}") from e


def restore_to_pipe(repository: Repository, revision: Revision, fd: int) -> None:
    """Write the image, and nothing else, to `fd`."""
    with ExitStack() as stack:
        donors = Donors(repository, revision, stack)
        image = CheckedImage(repository, revision, stack, donors.mend)
        announce(repository, image)
        widen_pipe(fd)
        zeros, position = memoryview(ZEROS), 0
        with Progress(f"{repository.name} (restoring)", image.size) as progress:
            pieces = in_order(image.pieces(), image.check, workers_for(image.size))
            for offset, length, buffers in pieces:
                while position < offset:
                    position += write_some(fd, zeros[: offset - position])
                while position < offset + length:
                    position += write_some(fd, buffers.new[position - offset : length])
                progress.reach(position)
                progress.tick()
            while position < image.size:
                position += write_some(fd, zeros[: image.size - position])
        confess(repository, image)


# ==== Selftest ===============================================================
#
# The main job, start to end, on a small disk with a real FAT16 file system, in a
# temporary directory.  What it prints it has seen.


def fat_disk(fd: int, size: int, files: dict[str, bytes]) -> None:
    """Write a FAT16 file system with `files` (names in 8.3, 11 characters) to the file `fd`.

    See Microsoft's FAT specification of 2005; what holds nothing stays a hole.
    """
    sector, per_cluster, root_entries = 512, 4, 512
    cluster = sector * per_cluster
    sectors = size // sector
    table_sectors = -(-(sectors // per_cluster + 2) * 2 // sector)
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s",
        *(b"\xeb\x3c\x90", b"BACKY   ", sector, per_cluster, 1, 2, root_entries),
        *(sectors if sectors < 65536 else 0, 0xF8, table_sectors, 32, 64, 0),
        *(0 if sectors < 65536 else sectors, 0x80, 0, 0x29, 0xBAC4, b"SELFTEST   ", b"FAT16   "),
    )
    table, entries, next_cluster = [0xFFF8, 0xFFFF], b"", 2
    root = (1 + 2 * table_sectors) * sector
    first = root + root_entries * 32
    for name, content in files.items():
        count = -(-len(content) // cluster)
        entries += struct.pack("<11sB14xHI", name.encode(), 0x20, next_cluster, len(content))
        table += [*range(next_cluster + 1, next_cluster + count), 0xFFFF]
        write_all(fd, content, first + (next_cluster - 2) * cluster)
        next_cluster += count
    packed = struct.pack(f"<{len(table)}H", *table)
    os.ftruncate(fd, size)
    write_all(fd, boot.ljust(510, b"\0") + b"\x55\xaa", 0)
    write_all(fd, packed, sector)
    write_all(fd, packed, (1 + table_sectors) * sector)
    write_all(fd, entries, root)


def selftest_noise(seed: int, size: int) -> bytes:
    """The same bytes every time, and nothing that compresses."""
    pieces = [hashlib.sha512(struct.pack("<II", seed, at)).digest() for at in range(size // 64)]
    return b"".join(pieces)


def file_system_of(path: str) -> str:
    """The type of the file system that `path` is on, `unknown` where /proc is missing."""
    device, found = os.stat(path).st_dev, "unknown"
    with suppress(OSError), open(
        "/proc/self/mountinfo", encoding="utf-8", errors="replace"
    ) as file:
        real = os.path.realpath(path)
        best = -1
        for line in file:
            before, _, after = line.partition(" - ")
            words = before.split()
            point = words[4].replace("\\040", " ")
            exact = words[2] == f"{os.major(device)}:{os.minor(device)}"
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and (exact, len(point)) > (False, best):
                best, found = len(point), after.split()[0]
    return found


def probe_file_system(directory: str) -> dict[str, bool]:
    """What backups in `directory` can count on, tried with two small files there."""
    with ExitStack() as stack:
        dir_fd = open_directory(directory)
        stack.callback(close, dir_fd)
        fds = []
        for name in ("probe-a", "probe-b"):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=dir_fd)
            stack.callback(close, fd)
            stack.callback(os.unlink, name, dir_fd=dir_fd)
            fds.append(fd)
        write_all(fds[0], b"\1" * (2 * BLOCK), 0)
        sync(fds[0])
        try:
            clone_file(fds[0], fds[1])
            clones = True
        except CloneUnsupported:
            clones = False
        punches = punch_hole(fds[0], 0, BLOCK)
        holes = next(data_extents(fds[0], 0, 2 * BLOCK), (0, 0))[0] == BLOCK
        direct = bypass_cache(fds[0])
    return {
        "share extents between revisions": clones,
        "free the space of zeros": punches,
        "tell holes from data": holes,
        "read past the page cache": direct,
    }


class Selftest:
    """Make a disk, back it up, change it, back it up, verify, damage, restore, compare."""

    SIZE = 64 * MiB

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.disk, self.job = os.path.join(directory, "disk.img"), os.path.join(directory, "disk")
        self.started = time.monotonic()

    def run(self) -> None:
        kind = file_system_of(self.directory)
        output(f"backy {__version__} selftest in {printable(self.directory)} ({kind})\n\n")
        abilities = probe_file_system(self.directory)
        for ability, there in abilities.items():
            output(f"  {'can' if there else 'cannot':6} {ability}\n")
        output("\n")
        files = {f"NOISE{n}  BIN": selftest_noise(n, 4 * MiB) for n in range(4)}
        files["ZEROS   BIN"] = bytes(4 * MiB)
        files["WORDS   TXT"] = b"The quick brown fox jumps over the lazy dog.\r\n" * 90000
        first = self.write_disk(files)
        self.step("made a disk with a FAT16 file system", self.SIZE)
        initialise(self.job, "file", self.disk)
        one = self.back_up("manual:first")
        self.step("first backup, read back from the medium", self.SIZE, one.bytes_written)
        files["NOISE1  BIN"] = files["NOISE1  BIN"][: 2 * MiB] + selftest_noise(9, 2 * MiB)
        files["NEW     TXT"] = b"changed\r\n"
        second = self.write_disk(files)
        two = self.back_up("manual:second")
        self.step("changed 2.00 MiB, second backup", self.SIZE, two.bytes_written)
        if abilities["share extents between revisions"] and two.bytes_written > 3 * MiB:
            raise BackyError("selftest: the second backup wrote more than what changed")
        for revision in (one, two):
            if self.verify(self.job, revision.id).is_damaged:
                raise Distrusted(f"selftest: {revision.id} was found damaged")
        self.step("verified both against their digests", 2 * self.SIZE)
        at = self.damage_copy(two.id)
        self.step(f"flipped one bit at {at} of a copy: found, named, healed")
        target = os.path.join(self.directory, "restored.img")
        for revision, digest in ((one, first), (two, second)):
            with Repository.open(self.job) as repository:
                restore_revision(repository, repository.find(revision.id), target, force=True)
            self.compare(target, digest)
        self.compare(os.path.join(self.job, "last"), second)
        self.step(
            "restored both, equal byte for byte; so is `last`, read without backy", 2 * self.SIZE
        )
        elapsed = time.monotonic() - self.started
        output(
            f"\nproven: backup, change, verification, damage found, restore, in {elapsed:.1f} s\n"
        )
        if not abilities["share extents between revisions"]:
            output(
                f"on this file system ({kind}) every revision takes the space of a full copy;\n"
                "keep backups on btrfs, or on XFS made with reflink=1\n"
            )

    def step(self, text: str, size: int | None = None, written: int | None = None) -> None:
        now = time.monotonic()
        line = f"  ok     {text}"
        if size is not None:
            elapsed = (
                max(now - self.last_step, 0.001)
                if hasattr(self, "last_step")
                else now - self.started
            )
            line += f": {format_size(size)}"
            if written is not None:
                line += f", {format_size(written)} written"
            line += f", {elapsed:.2f} s, {format_size(int(size / max(elapsed, 0.001)))}/s"
        output(line + "\n")
        self.last_step = time.monotonic()

    def write_disk(self, files: dict[str, bytes]) -> str:
        fd = os.open(self.disk, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fat_disk(fd, self.SIZE, files)
            sync(fd)
        finally:
            close(fd)
        return self.digest(self.disk)

    @staticmethod
    def digest(path: str) -> str:
        result = hashlib.sha256()
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(MiB), b""):
                result.update(piece)
        return result.hexdigest()

    def compare(self, path: str, digest: str) -> None:
        if self.digest(path) != digest:
            raise Distrusted(f"selftest: {os.path.basename(path)} is not what was backed up")

    def back_up(self, tags: str) -> Revision:
        with Repository.open(self.job) as repository, repository.job_lock("selftest"):
            return Backup(repository, load_job(repository), parse_tags(tags)).run()

    def verify(self, job: str, name: str) -> Result:
        with Repository.open(job) as repository:
            verifier = Verifier(repository, Scope())
            verifier.run([repository.find(name)])
        return verifier.results[0]

    def damage_copy(self, name: str) -> int:
        """Flip one bit in a copy of the job; verification must name the block it is in."""
        import shutil

        copy, at = os.path.join(self.directory, "copy"), 3 * MiB + 12345
        shutil.copytree(self.job, copy, symlinks=True)
        path = os.path.join(copy, name)
        os.chmod(path, 0o600)
        with open(path, "r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
            file.flush()
            sync(file.fileno())
        result = self.verify(copy, name)
        found = result.damaged
        if found != ((at - at % BLOCK, BLOCK),):
            raise Distrusted(f"selftest: damage at {at} was reported as {found}")
        if result.revision.damaged or self.verify(copy, name).is_damaged:
            raise Distrusted(f"selftest: damage at {at} was not healed")
        return at


# ==== Command line ===========================================================
#
# Each command stands with its arguments and its help.  -b, -l and -v may stand
# before the command or behind it.


@dataclass(frozen=True)
class Command:
    """One verb: what it does, what it takes, and examples for its help."""

    run: Callable[[argparse.Namespace], int | None]
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]
    examples: str


COMMANDS: dict[str, Command] = {}


def argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


def command(
    *arguments: tuple[tuple[str, ...], dict[str, Any]], examples: str = ""
) -> Callable[
    [Callable[[argparse.Namespace], int | None]], Callable[[argparse.Namespace], int | None]
]:
    """Register a function as the command of its name; its docstring is the help."""

    def register(
        run: Callable[[argparse.Namespace], int | None],
    ) -> Callable[[argparse.Namespace], int | None]:
        COMMANDS[run.__name__] = Command(run, arguments, examples)
        return run

    return register


SPEC_WORDS = "number (0 is the newest), last, id or its beginning, tag, or ISO date or time"
SPEC_HELP = f"{SPEC_WORDS} (default: last)"
REVISION = argument("-r", "--revision", metavar="SPEC", default=argparse.SUPPRESS, help=SPEC_HELP)
THE_REVISION = argument(
    "-r", "--revision", metavar="SPEC", default=argparse.SUPPRESS, help=SPEC_WORDS
)
FORCE = argument("-f", "--force", action="store_true", help="do it without asking")
JSON = argument("--json", action="store_true", help="print JSON")


def output_json(**values: Any) -> None:
    import json

    output(json.dumps({"version": 1, **values}, indent=2) + "\n")


def ranges_json(ranges: ListLike[tuple[int, int]]) -> list[dict[str, int]]:
    return [{"offset": offset, "length": length} for offset, length in ranges]


def revision_json(revision: Revision) -> dict[str, Any]:
    return {
        "id": revision.id,
        "timestamp": format_time_json(revision.timestamp),
        "tags": list(revision.tags),
        "parent": revision.parent,
        "complete": revision.is_complete,
        "size": revision.size,
        "bytes_written": revision.bytes_written,
        "duration": revision.duration,
        "trust": revision.trust.value,
        "verified": format_time_json(revision.verified),
        "protected": revision.protected,
        "damaged": ranges_json(revision.damaged),
        "sums_damaged": revision.sums_damaged,
        "problem": revision.problem or None,
    }


@command(
    argument("type", metavar="TYPE", help="kind of source: file"),
    argument("source", metavar="SOURCE", help="the image file or block device"),
    examples="backy -b /srv/backy/vm1 init file /var/lib/libvirt/images/vm1.img",
)
def init(args: argparse.Namespace) -> None:
    """Make a job directory for an image."""
    initialise(args.directory, args.type, args.source)


def parse_wait(text: str) -> float:
    if text == "forever":
        return math.inf
    try:
        return parse_duration(text).total_seconds()
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


@command(
    argument("tags", metavar="TAGS", help="why this revision is kept: names, joined by commas"),
    argument(
        "--verify", choices=[mode.value for mode in VerifyMode], help="overrules the job's config"
    ),
    argument(
        "--no-resume", action="store_true", help="do not go on with what an interrupted run left"
    ),
    argument(
        "--wait",
        metavar="[=TIME]",
        type=parse_wait,
        default=0,
        help="wait for the lock: --wait, or at most so long: --wait=10m",
    ),
    examples="backy -b /srv/backy/vm1 backup manual:before-upgrade",
)
def backup(args: argparse.Namespace) -> None:
    """Make a new revision."""
    tags = parse_tags(args.tags)
    with Repository.open(args.directory) as repository:
        job = load_job(repository)
        if args.verify:
            job = replace(job, verify=VerifyMode(args.verify))
        with repository.job_lock("backup", args.wait):
            Backup(repository, job, tags, resume=not args.no_resume).run()


def status_row(revision: Revision) -> list[str]:
    tags = printable(",".join(revision.tags))
    if not revision.is_complete:
        tags = f"{tags} (incomplete)".strip()
    elif revision.problem:
        tags = f"{tags} (no image)".strip()
    elif revision.sums_damaged:
        tags = f"{tags} (unverified)".strip()
    elif revision.trust is Trust.DISTRUSTED:
        tags = f"{tags} (distrusted)".strip()
    durat = f"{revision.duration:.1f} s" if revision.duration is not None else "0 s"
    size = format_size(revision.bytes_written)
    return [format_time(revision.timestamp), revision.id, size, durat, tags]


@command(JSON, examples="backy -b /srv/backy/vm1 status -v")
def status(args: argparse.Namespace) -> None:
    """List the revisions, oldest first."""
    with Repository.open(args.directory) as repository:
        revisions = repository.revisions
        extents = [repository.count_extents(one) if args.verbose else None for one in revisions]
        if args.json:
            problems = [{"file": name, "problem": what} for name, what in repository.problems]
            listing = [revision_json(revision) for revision in revisions]
            for entry, count in zip(listing, extents):
                entry["extents"] = count
            output_json(job=repository.name, revisions=listing, problems=problems)
            return
    columns = ["Date (UTC)", "ID", "Size", "Durat", "Tags"]
    rows = [status_row(revision) for revision in revisions]
    if args.verbose:
        columns += ["Trust", "Verified (UTC)", "Protected", "Extents"]
        for row, revision, count in zip(rows, revisions, extents):
            verified = format_time(revision.verified) if revision.verified else "-"
            row += [revision.trust.value, verified, "yes" if revision.protected else "-"]
            row.append("-" if count is None else str(count))
    output(format_table(columns, rows, right=("Size", "Durat", "Extents")))
    total = format_size(sum(revision.bytes_written for revision in revisions))
    output(f"{len(revisions)} revisions containing {total} data (estimated)\n")


@command(
    REVISION, JSON, examples="dd if=$(backy -b /srv/backy/vm1 find -r daily) of=/dev/vg/vm1 bs=4M"
)
def find(args: argparse.Namespace) -> None:
    """Print the path of a revision's image."""
    with Repository.open(args.directory) as repository:
        revision = repository.find(args.revision)
        if revision.problem:
            raise NotFound(f"{repository.name}: {revision.id}: {revision.problem}")
        path = os.path.join(os.path.realpath(args.directory), revision.id)
        if not os.path.exists(path):
            raise NotFound(f"{repository.name}: {revision.id} has no image")
    if args.json:
        output_json(path=path, revision=revision_json(revision))
    else:
        output(path + "\n")


@command(
    REVISION,
    argument("target", metavar="TARGET", help="file or block device, or - for standard output"),
    argument(
        "-f", "--force", action="store_true", help="overwrite an existing file or a block device"
    ),
    argument(
        "--check", action="store_true", help="read all of it, also where extents are only shared"
    ),
    examples=(
        "backy -b /srv/backy/vm1 restore vm1.img\n"
        "backy -b /srv/backy/vm1 restore --force /dev/vg/vm1\n"
        "backy -b /srv/backy/vm1 restore -r 2026-11-05 - | rbd import - rbd/vm1"
    ),
)
def restore(args: argparse.Namespace) -> None:
    """Write a revision back to TARGET."""
    to_pipe = args.target == "-"
    if to_pipe and sys.stdout is None:
        raise BackyError("standard output is closed")
    if to_pipe and os.isatty(1):
        raise BackyError("an image is not written to a terminal", "redirect it, or name a file")
    with Repository.open(args.directory) as repository:
        revision = repository.find(args.revision)
        if not revision.is_complete:
            log.warning("%s: %s is incomplete", repository.name, revision.id)
        if to_pipe:
            restore_to_pipe(repository, revision, 1)
        else:
            restore_revision(repository, revision, args.target, args.force, args.check)


def parse_sample(text: str) -> int:
    """`5%` is one part of 20; the number of parts."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%?", text, re.ASCII)
    percent = float(match[1]) if match else 0.0
    if not 0.001 <= percent <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: more than 0 and at most 100%")
    return math.ceil(100 / percent - 1e-9)


def parse_limit(text: str) -> float:
    seconds = parse_wait(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to do anything in")
    return seconds


def choose_to_verify(repository: Repository, args: argparse.Namespace) -> list[Revision]:
    several = args.all or args.oldest
    if args.source and (several or args.json or args.parts > 1 or args.max_duration):
        raise BackyError("--source compares all of one revision: only -r goes with it")
    if several and args.given:
        raise BackyError("-r names one revision, --all and --oldest mean all")
    if not several:
        return [repository.find(args.revision)]
    chosen = repository.complete
    if args.oldest:
        chosen.sort(key=lambda one: one.verified or EPOCH)
    if not chosen:
        raise NotFound(f"{repository.name}: there is no complete revision yet")
    return chosen


def compare_to_source(repository: Repository, revision: Revision) -> None:
    differing = compare_with_source(repository, revision, load_job(repository).source)
    if differing:
        raise Distrusted(
            f"{repository.name}: {revision.id} differs from its source in {differing} bytes"
        )
    output(f"{revision.id}: equal to its source\n")


@command(
    REVISION,
    argument(
        "-a", "--all", action="store_true", help="all revisions; what they share is read once"
    ),
    argument("--oldest", action="store_true", help="all, the one verified longest ago first"),
    argument(
        *("--sample", "--samples"),
        metavar="SHARE",
        dest="parts",
        type=parse_sample,
        default=1,
        help="only this share, 5%%, and another one each time, until all is seen",
    ),
    argument("--max-duration", metavar="TIME", type=parse_limit, help="stop after 30m, 2h"),
    argument("--source", action="store_true", help="compare with the source, byte by byte"),
    JSON,
    examples=(
        "backy -b /srv/backy/vm1 verify\n"
        "backy -b /srv/backy/vm1 verify --all --sample 5%\n"
        "backy -b /srv/backy/vm1 verify --oldest --max-duration 1h"
    ),
)
def verify(args: argparse.Namespace) -> None:
    """Read revisions from the disk and hold them against their digests."""
    with Repository.open(args.directory) as repository:
        chosen = choose_to_verify(repository, args)
        if args.source:
            compare_to_source(repository, chosen[0])
            return
        scope = Scope(args.parts, time.monotonic() + (args.max_duration or math.inf))
        verifier = Verifier(repository, scope)
        verifier.run(chosen)
    if args.json:
        listing = [
            {
                **revision_json(result.revision),
                "result": result.text,
                "bytes_read": result.bytes_read,
                "damaged": ranges_json(result.damaged),
            }
            for result in verifier.results
        ]
        output_json(revisions=listing)
    else:
        for result in verifier.results:
            read = format_size(result.bytes_read)
            output(f"{result.revision.id}: {result.text} ({read} read)\n")
            for line in describe_ranges(result.damaged):
                output(f"{result.revision.id}: damaged: {line}\n")
    if any(result.is_damaged for result in verifier.results):
        left = [one for one in verifier.results if one.revision.damaged or one.revision.problem]
        hint = "restore still works, and lists what is lost; the next backup may heal more"
        raise Distrusted(
            f"{repository.name}: damage was found{'' if left else ', and all of it is healed'}",
            hint if left else "look at the disk: dmesg, smartctl",
        )
    if len(verifier.results) == 1 and verifier.results[0].is_unknown:
        result = verifier.results[0]
        raise Distrusted(f"{repository.name}: {result.revision.id} {result.text}")


@command(
    argument(
        "others", metavar="DIR", nargs="*", help="more job directories, on the same file system"
    ),
    argument("-n", "--dry-run", action="store_true", help="only say how much could be shared"),
    examples="backy -b /srv/backy/vm1 dedup -n /srv/backy/vm2 /srv/backy/vm3",
)
def dedup(args: argparse.Namespace) -> None:
    """Let equal blocks of revisions and jobs share their extents."""
    with ExitStack() as stack:
        names = {os.path.realpath(name) for name in (args.directory, *args.others)}
        jobs = [stack.enter_context(Repository.open(name)) for name in sorted(names)]
        run = Dedup(jobs, args.dry_run)
        run.run()
    verb = "could be shared" if args.dry_run else "are now shared"
    output(
        f"{len(run.images)} images, {format_size(run.blocks * BLOCK)} of blocks: "
        f"{format_size(run.shared)} {verb}\n"
    )


def parse_dates(text: str) -> tuple[datetime, datetime]:
    period = parse_period(text)
    if period is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no date or time like 2026-11-05T10:15")
    return period


@command(
    THE_REVISION,
    argument(
        "--from",
        dest="first",
        metavar="DATE",
        type=parse_dates,
        help="all from this date or time on",
    ),
    argument("--until", metavar="DATE", type=parse_dates, help="all up to its end"),
    examples="backy -b /srv/backy/vm1 distrust --from 2026-11-01 --until 2026-11-05",
)
def distrust(args: argparse.Namespace) -> None:
    """Mark revisions as not to be relied on; without -r or dates, all of them."""
    first = args.first[0] if args.first else datetime.min.replace(tzinfo=UTC)
    until = args.until[1] if args.until else datetime.max.replace(tzinfo=UTC)
    with Repository.open(args.directory) as repository, repository.metadata_lock():
        chosen = [one for one in repository.complete if first <= one.timestamp <= until]
        if args.given and (args.first or args.until):
            raise BackyError("-r names one revision, --from and --until mean those of a time")
        if args.given:
            chosen = [repository.find(args.revision)]
        for revision in chosen:
            if not revision.is_complete:
                raise BackyError(f"{repository.name}: {revision.id} is incomplete")
            repository.change(revision, trust=Trust.DISTRUSTED, by_hand=True, sample=None)
            log.info("%s: %s is distrusted", repository.name, revision.id)
        if not chosen:
            raise NotFound(f"{repository.name}: no revision is meant")


def set_protection(args: argparse.Namespace, protected: bool) -> None:
    with Repository.open(args.directory) as repository, repository.metadata_lock():
        revision = repository.find(args.revision)
        if not revision.is_complete:
            raise BackyError(f"{repository.name}: {revision.id} is incomplete")
        if revision.protected != protected:
            repository.change(revision, protected=protected)
        word = "protected" if protected else "not protected"
        log.info("%s: %s is %s", repository.name, revision.id, word)


@command(REVISION, examples="backy -b /srv/backy/vm1 protect -r manual:before-upgrade")
def protect(args: argparse.Namespace) -> None:
    """Keep a revision whatever expires."""
    set_protection(args, True)


@command(REVISION)
def unprotect(args: argparse.Namespace) -> None:
    """Let a revision expire again."""
    set_protection(args, False)


def find_for_removal(repository: Repository, spec: str) -> Revision:
    """Like find(), but only a full id counts while there is metadata that cannot be read."""
    revision = repository.find(spec)
    if repository.problems and spec != revision.id:
        names = printable(", ".join(name for name, _ in repository.problems))
        raise BackyError(
            f"{repository.name}: cannot read {names}, so {printable(spec)!r} may mean another one",
            "name the revision by its full id",
        )
    return revision


def may_forget(repository: Repository, revision: Revision) -> None:
    """Raise BackyError for what must stay, also with --force."""
    if revision.protected:
        raise BackyError(f"{repository.name}: {revision.id} is protected", "backy unprotect first")
    if not revision.is_complete or revision.problem:
        return
    good = [one for one in repository.complete if one.is_good and one.id != revision.id]
    if not good:
        raise BackyError(
            f"{repository.name}: {revision.id} is the only good revision",
            "make another backup first",
        )


def confirm(question: str) -> None:
    """Ask on the terminal; raises BackyError for anything but yes."""
    if not (sys.stdin and sys.stdin.isatty()):
        raise BackyError("nobody to ask", "use --force")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BackyError("nothing was deleted")


@command(THE_REVISION, FORCE, examples="backy -b /srv/backy/vm1 forget -r 7 --force")
def forget(args: argparse.Namespace) -> None:
    """Delete a revision."""
    with Repository.open(args.directory) as repository:
        revision = find_for_removal(repository, args.revision)
        may_forget(repository, revision)
        if not args.force:
            confirm(
                f"delete {revision} [{printable(','.join(revision.tags))}] of {repository.name}?"
            )
        with ExitStack() as stack:
            if not revision.is_complete:  # perhaps it is just being made
                stack.enter_context(repository.job_lock("forget"))
            stack.enter_context(repository.metadata_lock())
            revision = find_for_removal(repository, revision.id)
            may_forget(repository, revision)
            repository.remove(revision)
        log.info("%s: %s is deleted", repository.name, revision.id)


@command(
    argument("place", metavar="DIR", nargs="?", help="where to make the temporary directory"),
    examples="backy selftest /srv/backy",
)
def selftest(args: argparse.Namespace) -> None:
    """Show that backup, verification and restore work here."""
    import shutil
    import tempfile

    try:
        directory = tempfile.mkdtemp(prefix="backy-selftest-", dir=args.place)
    except OSError as e:
        where = printable(args.place or tempfile.gettempdir())
        raise BackyError(f"cannot make a directory in {where}: {e.strerror}") from e
    try:
        log.setLevel(logging.ERROR)
        Selftest(os.path.realpath(directory)).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class CommandParser(argparse.ArgumentParser):
    """Usage errors have status 1, and say what was meant."""

    def error(self, message: str) -> Any:
        match = re.search(r"invalid choice: '([^']*)' \(choose from", message)
        if match:
            alike = suggestion(match[1], COMMANDS) if "COMMAND" in message else ""
            message = f"{message.partition(':')[0]}: no {match[1]!r}{alike}"
        sys.stderr.write(f"{self.format_usage()}backy: {printable(message)}\n")
        raise SystemExit(1)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            output(message)


def add_common_options(parser: argparse.ArgumentParser, default: Any) -> None:
    """Before the command they have a value; behind it they only override it."""

    def value(one: object) -> Any:
        return default or one

    parser.add_argument(
        *("-b", "--backupdir"),
        dest="directory",
        metavar="DIR",
        default=value("."),
        help="the job's directory (default: .)",
    )
    parser.add_argument(
        *("-l", "--logfile"),
        metavar="FILE",
        default=default,
        help="log to FILE instead of standard error",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=value(False), help="say more"
    )
    parser.add_argument("--version", action="version", version=f"backy {__version__}")


def indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def make_parser() -> tuple[CommandParser, dict[str, argparse.ArgumentParser]]:
    parser = CommandParser(
        prog="backy",
        allow_abbrev=False,
        description="Keep versions of virtual machine images on a copy-on-write file system.",
        epilog="backy help COMMAND explains a command.",
    )
    add_common_options(parser, None)
    parser.add_argument("-r", "--revision", metavar="SPEC", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {}
    for name, one in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            help=one.run.__doc__,
            description=one.run.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{indented(one.examples)}" if one.examples else None,
        )
        add_common_options(parsers[name], argparse.SUPPRESS)
        for names, options in one.arguments:
            parsers[name].add_argument(*names, **options)
    return parser, parsers


@command(argument("topic", metavar="COMMAND", nargs="?", help="the command to explain"))
def help(args: argparse.Namespace) -> None:
    """Explain a command, or list them."""
    parser, parsers = make_parser()
    if args.topic and args.topic not in parsers:
        raise BackyError(f"no command {printable(args.topic)!r}{suggestion(args.topic, parsers)}")
    output((parsers[args.topic] if args.topic else parser).format_help())


def repair_descriptors() -> None:
    """Let no file of ours become descriptor 0, 1 or 2 because one of them was closed.

    Results then go nowhere, as was asked for; only an image cannot, see restore.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", flags)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def same_file(path: str | int, fd: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def choose_log(args: argparse.Namespace) -> bool:
    """Start the log, but never into the stream that carries an image."""
    path, quiet = args.logfile, False
    if args.command == "restore" and args.target == "-":
        quiet = Progress.silent = same_file(2, 1) and not os.isatty(1)
        if path and same_file(path, 1):
            path = None
    return start_log(path, args.verbose, quiet)


def raise_stopped(number: int, _: object) -> None:
    raise Stopped(number)


def catch_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, raise_stopped)
    signal.signal(signal.SIGUSR1, report_progress)


def run_command(args: argparse.Namespace) -> int:
    """Run what was asked for; all that can go wrong becomes a line and a status."""
    try:
        return COMMANDS[args.command].run(args) or 0
    except BackyError as e:
        log.error("%s", e)
        if e.hint:
            log.error("hint: %s", e.hint)
        return e.status
    except BrokenPipeError:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        log.error("interrupted")
        return 128 + signal.SIGINT
    except Stopped as e:
        log.error("%s", e)
        return e.status
    except MemoryError:
        log.error("out of memory")
        return 1
    except OSError as e:
        where = f"{printable(e.filename)}: " if e.filename is not None else ""
        log.error("%s%s", where, e.strerror or e, exc_info=args.verbose)
        return 1


def choose_revision(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """-r may stand before the command too; without it the last is meant, but not to delete."""
    if any(isinstance(one, list) for one in (args.directory, args.logfile, args.revision)):
        parser.error("an option is given without its value")  # `-r--`, which argparse lets pass
    if args.revision is not None and "-r SPEC" not in parser.format_usage():
        parser.error(f"{args.command} takes no -r")
    if args.revision is None and args.command == "forget":
        parser.error("forget needs -r SPEC")
    args.given = args.revision is not None
    if not args.given:
        args.revision = "last"


def main(argv: ListLike[str] | None = None) -> int:
    """Run backy with `argv`; the exit status."""
    repair_descriptors()
    os.umask(0o077)
    words = list(sys.argv[1:] if argv is None else argv)
    for at, word in enumerate(words):
        if word == "--wait" and words[at - 1 : at] not in (["-b"], ["-l"], ["-r"]):
            words[at] = "--wait=forever"  # argparse would take the next word for the time
    parser, parsers = make_parser()
    try:
        args = parser.parse_args(words)
        if not args.command:
            output(parser.format_help())
            return 0
        choose_revision(args, parsers[args.command])
    except BackyError as e:
        sys.stderr.write(f"backy: {e}\n")
        return e.status
    except BrokenPipeError:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    catch_signals()
    to_file = choose_log(args)
    if to_file:
        log.info("$ %s", printable(" ".join(["backy", *words])))
    status = run_command(args)
    if to_file:
        log.info("Backy operation %s.", "failed" if status else "complete")
    return status


if __name__ == "__main__":
    sys.exit(main())
