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
    Options        tables of keys, and mappings read by them
    Schedule       when a job is next due, and when it is late
    Kernel         clone, punch, find data, pass by the page cache
    Files          replace durably, lock, sync
    Programs       run other programs, and wait for none of them for ever
    Images         read, compare, write and hash images, by several threads
    Digests        the file beside an image that vouches for its bytes
    Revisions      one revision and its metadata
    Repository     all revisions of one job: find, create, remove
    Sources        what a source must do; plain files and block devices
    Ceph           the rbd commands, the diff stream, the source
    Flying Circus  a Ceph source whose snapshots are asked for through Consul
    Plug-ins       sources that are programs of their own
    Progress       how far it is, for the person who waits
    Checks         an image read while it is held against its digests
    Repair         sound copies of bad blocks, found and put in their place
    Backup         a revision, step by step
    Verify         which blocks are looked at, and what that says
    Dedup          equal blocks, made to share one extent
    Restore        a revision back to a file, a device or a pipe
    Expire         why each revision is kept, and the removal of the others
    Selftest       the main job, shown in a temporary directory
    Configuration  backy.conf: every key with type, default and meaning
    Loop           waiting for files, moments and signals at once
    Timetable      what is started when, and what waits for what
    Shell          telnet sessions that look at the jobs
    Scheduler      children, disks, signals and systemd: the daemon
    Plan           the coming runs, and what retention makes of them
    Check          the status file, read for monitoring
    Partitions     where the partitions of a disk lie
    Exports        what can be opened by a name: revisions, parts and clones of them
    NBD            messages, then a session, then the server
    Command line   the commands, then main()
"""

from __future__ import annotations

import argparse
import atexit
import errno
import fcntl
import gc
import hashlib
import heapq
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
from functools import cached_property, lru_cache
from typing import Any, Callable, ClassVar, Iterable, Iterator, NamedTuple, NoReturn, Tuple
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


class JournalForm(logging.Formatter):
    """A priority before each line, and no time: the journal has its own; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        levels = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}
        text = super().format(record)
        return "\n".join(f"<{levels.get(record.levelno, 3)}>{line}" for line in text.splitlines())


def is_journal(fd: int) -> bool:
    """Whether what is written to `fd` goes to the journal, as systemd has told us."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


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
    terminal.setFormatter(JournalForm() if is_journal(2) else TerminalForm())
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
    try:
        return timedelta(seconds=int(match[1]) * unit)
    except OverflowError:
        raise ValueError(f"{text!r} is no duration: more than {timedelta.max.days} days") from None


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


def table_rule(widths: ListLike[int]) -> str:
    return "+" + "+".join("-" * (width + 2) for width in widths) + "+\n"


def table_line(cells: ListLike[str], widths: ListLike[int], is_right: ListLike[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, is_right)
    ]
    return f"| {' | '.join(padded)} |\n"


def count_of(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def split_span(span: timedelta) -> tuple[int, str]:
    """(90, "minute"): a number of the largest unit that has no rest."""
    seconds = int(span.total_seconds())
    for word, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds and not seconds % length:
            return seconds // length, word
    return seconds, "second"


def format_table(
    columns: ListLike[str], rows: Iterable[ListLike[str]], right: ListLike[str] = ()
) -> str:
    """An ASCII grid; the columns named in `right` are set flush right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    is_right = [column in right for column in columns]
    rule = table_rule(widths)
    lines = [table_line(row, widths, is_right) for row in rows]
    return rule + table_line(columns, widths, is_right) + rule + "".join(lines) + rule


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


class Regex:
    """A regular expression, compiled when it is first used: most starts need few of them."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self.pattern, self.flags = pattern, flags

    def __getattr__(self, name: str) -> Any:
        method = getattr(re.compile(self.pattern, self.flags), name)
        setattr(self, name, method)  # the next time it is found at once
        return method


MAX_YAML_TEXT = 1 << 20  # bytes
MAX_YAML_DEPTH = 64  # collections inside one another
MAX_YAML_NODES = 200_000  # with every alias counted as a copy

# Raw control characters, the line ends that only YAML 1.1 knows, surrogates and stray BOMs.
FORBIDDEN_CHARACTER = Regex(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
)
DOCUMENT_MARKER = Regex(r"^(?:---|\.\.\.)(?=[ \t\n]|\Z)", re.MULTILINE)
BETWEEN_TOKENS = Regex(r"(?:[ \n]|(?<![^ \n])#[^\n]*)*")  # blanks, line ends and comments
INDICATOR = Regex(r"[-?:](?=[ \t\n]|\Z)")
LINE_END = Regex(r" *\n[ \n]*")
ANCHOR_NAME = Regex(r"[&*]([0-9A-Za-z_-]+)(?=[ \t\n,\]}]|\Z)")
BLOCK_HEADER = Regex(r"[|>](?:([1-9])([-+]?)|([-+]?)([1-9]?)) *(?:(?<= )#[^\n]*)?(?:\n|\Z)")
LEADING_BLANKS = Regex(r"[ \n]*")

# Where one line of a plain scalar ends, and the colon that makes a scalar a key.
BLOCK_END = Regex(r"[\t\n]|(?<= )#|:(?=[ \t\n]|\Z)|\Z")
FLOW_END = Regex(r"[\t\n,\[\]{}]|(?<= )#|:(?=[ \t\n,\[\]{}]|\Z)|\Z")
BLOCK_COLON = Regex(r" *:(?=[ \t\n]|\Z)")
FLOW_COLON = Regex(r" *:")

# The pieces of a quoted scalar; exactly one group matches: text, line ends to fold,
# blanks, an escape, the closing quote.
QUOTED = {
    "'": Regex(r"([^' \t\n]+)|([ \t]*\n[ \t\n]*)|([ \t]+)|'(')|(')"),
    '"': Regex(
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
PLAIN_INTEGER = Regex(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*(?::[0-5]?[0-9])*)")
PLAIN_FLOAT = Regex(
    r"[-+]?[0-9][0-9_]*(?:(?::[0-5]?[0-9])+\.[0-9_]*|\.[0-9_]*(?:[eE][-+][0-9]+)?)"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
PLAIN_DATE = Regex(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
PLAIN_TIMESTAMP = Regex(
    r"([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})(?:[Tt]|[ \t]+)([0-9]{1,2}):([0-9]{2}):([0-9]{2})"
    r"(?:\.([0-9]*))?(?:[ \t]*(Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?"
)
PLAIN_ODD = Regex(r"[-+]?\.[0-9_]+|=|<<")  # refused by PyYAML, or a number to old ones
MAX_PLAIN_NUMBER = 256  # characters; int() is slow on long texts

NOT_PLAIN = Regex(
    r"^(?:---|\.\.\.|[ #,\[\]{}&*!|>'\"%@`]|[-?:](?: |\Z))|:(?: |\Z)| #| \Z"  # anywhere
)
NOT_PLAIN_IN_FLOW = Regex(NOT_PLAIN.pattern + r"|[,?:\[\]{}]")


# Documents of lines like `key: 2026-11-05 10:15`, `key: {a: 1, b: c}`, `key: [a, b]` and no other.
SHORT_NAME = "[a-z][0-9a-z_-]*"
SHORT_WORD = Regex("[0-9A-Za-z]+(?:(?: [.+/-]*|[.+/-]+)[0-9A-Za-z]+)*")
SHORT_PAIR = Regex(f"({SHORT_NAME}): ({SHORT_WORD.pattern})")
SHORT_TEXT = Regex(
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
    if text[0] not in "+-.0123456789" or len(text) > MAX_PLAIN_NUMBER:
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


# ==== Options ================================================================
#
# Tables of the keys that a mapping may have, and the reading of a mapping by its
# table.  One table serves the parser, `config show`, the example and the manual.
# What is wrong is gathered with its place, so that one run names all of it.

LONGEST_EXCERPT = 120  # characters of a line that are shown
# What stands behind a key that names a secret, as far as it is on the same line.
SECRET = Regex("token|secret|passw|credential", re.IGNORECASE)
SECRET_VALUE = Regex(
    rf"((?:{SECRET.pattern})[\w-]*['\"]?\s*:\s*)(\"(?:[^\"\\]|\\.)*\"?|'(?:[^']|'')*'?|[^\s,}}]+)",
    re.IGNORECASE,
)
HIDDEN = "(secret)"


@dataclass(frozen=True)
class Kind:
    """How the text of a value is read, and how a value is shown.

    `expected` goes on after the name of the key: "is a number of extents".  `parse`
    raises ValueError for anything else.  A value of a kind with `is_list` is a list
    of texts, or one text with commas, and `parse` gets the texts; one with
    `is_section` is a mapping with a table of its own.
    """

    expected: str
    parse: Callable[[Any], Any] = str
    format: Callable[[Any], str] = str
    is_list: bool = False
    is_section: bool = False


@dataclass(frozen=True)
class Option:
    """One key: how its value is read, what holds without it, and what it is for.

    `default` is written as in a file; empty is none, and None that the key must be
    given.
    """

    name: str
    kind: Kind
    default: str | None = ""
    meaning: str = ""

    @property
    def is_secret(self) -> bool:
        return bool(SECRET.search(self.name))


def parse_whole(text: str) -> int:
    """A number of digits alone; one that starts with 0 would be octal to some."""
    if not re.fullmatch("0|[1-9][0-9]{0,11}", text, re.ASCII):
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def number(least: int, most: int, expected: str = "") -> Kind:
    def parse(text: str) -> int:
        if not least <= parse_whole(text) <= most:
            raise ValueError(f"{text} is out of range")
        return int(text)

    return Kind(expected or f"is a number from {least} to {most}", parse)


def choice(*words: str) -> Kind:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {words}")
        return text

    *most, last = words
    return Kind(f"is {', '.join(most)} or {last}" if most else f"is {last}", parse)


def parse_boolean(text: str) -> bool:
    if text not in PLAIN_TRUE | PLAIN_FALSE:
        raise ValueError(f"{text!r} is neither yes nor no")
    return text in PLAIN_TRUE


def format_boolean(value: bool) -> str:
    return "yes" if value else "no"


LONGEST_TIME = timedelta(days=10_000)  # 100,000 of them are still a timedelta


def parse_time_span(text: str) -> timedelta:
    if text.isdigit():
        parse_whole(text)
    span = parse_duration(text)
    if not timedelta(0) < span <= LONGEST_TIME:
        raise ValueError(f"{text!r} is out of range")
    return span


def format_time_span(span: timedelta) -> str:
    """`1d`, `90m`: what parse_duration() reads, in the largest unit that has no rest."""
    count, word = split_span(span)
    return f"{count}{word[0]}"


@dataclass(frozen=True)
class Space:
    """A part of a file system: a share of it, or so many bytes."""

    share: float = 0.0  # of 1
    size: int = 0

    def of(self, total: int) -> int:
        """In bytes, of a file system of `total` bytes."""
        return self.size or int(total * self.share)

    def __str__(self) -> str:
        for unit, size in (("T", 1 << 40), ("G", GiB), ("M", MiB), ("K", KiB)):
            if self.size and not self.size % size:
                return f"{self.size // size}{unit}"
        return str(self.size) if self.size or not self.share else f"{self.share * 100:.12g}%"


def parse_space(text: str) -> Space:
    """`10%`, `50G`, `1024`; 0 is nothing.  Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,15})(?:(\.[0-9]{1,6})?(%)|([KMGT]?)(?:iB)?)", text, re.ASCII)
    if not match:
        raise ValueError(f"{text!r} is no space: a share such as 10%, or a size such as 50G")
    whole, part, percent, unit = match.groups()
    if not percent:
        return Space(size=int(whole) << 10 * " KMGT".index(unit or " "))
    if float(whole + (part or "")) > 100:
        raise ValueError(f"{text!r} is more than all")
    return Space(share=float(whole + (part or "")) / 100)


def parse_words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("no file is called so")
    return text


TEXT = Kind("is text")
PATH = Kind("is a path", parse_path)
BOOLEAN = Kind("is yes or no", parse_boolean, format_boolean)
TIME_SPAN = Kind(
    "is a number with s, m, h, d or w, from 1s to 10000d", parse_time_span, format_time_span
)
SPACE = Kind("is a share such as 10% or a size such as 50G", parse_space)
LIST = Kind("is a list, or text with commas", tuple, ", ".join, is_list=True)
SECTION = Kind("is a mapping", is_section=True)


def shown_width(text: str) -> int:
    """Columns that a terminal takes for `text`."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def hide_secrets(line: str) -> str:
    return SECRET_VALUE.sub(lambda match: match[1] + "*" * len(match[2]), line)


def excerpt(line: str, column: int, width: int) -> list[str]:
    """The line, or the part of it around `column`, and the marks below."""
    start = max(0, column - 1 - LONGEST_EXCERPT // 2) if len(line) > LONGEST_EXCERPT else 0
    line = line[start : start + LONGEST_EXCERPT]
    before, marked = line[: column - 1 - start], line[column - 1 - start :][:width]
    return [line, " " * shown_width(before) + "^" * max(1, shown_width(marked))]


@dataclass(frozen=True)
class Remark:
    """What is wrong at a place of a file, the line there, and what helps; `line` 0 is all of it."""

    text: str
    path: str
    line: int = 0
    column: int = 0
    excerpt: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    is_error: bool = True

    @property
    def first_line(self) -> str:
        place = f"{self.path}:{self.line}:{self.column}" if self.line else self.path
        text = self.text if len(self.text) < 400 else f"{self.text[:400]} ..."
        return printable(f"{place}: {'' if self.is_error else 'warning: '}{text}")

    def __str__(self) -> str:
        hints = (f"    {printable(hint[:1000])}" for hint in self.hints)
        return "\n".join((self.first_line, *self.excerpt, *hints))


@dataclass(frozen=True)
class Value:
    """What holds for a key, and where that was said; `line` 0 is the default."""

    value: Any
    node: Node | None = None
    path: str = ""

    @property
    def place(self) -> str:
        return f"{self.path}:{self.node.line}" if self.node else "default"


def is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.plain and node.text in PLAIN_NULL


def describe_node(node: Node, is_secret: bool = False) -> str:
    if isinstance(node, Scalar):
        return HIDDEN if is_secret else repr(printable(node.text[:60]))
    return "a mapping" if isinstance(node, Mapping) else "a list"


def texts_in(node: Node, kind: Kind) -> str | tuple[str, ...] | None:
    """What a value of this kind is parsed from; None if the node is no such value."""
    if isinstance(node, Scalar):
        return parse_words(node.text) if kind.is_list else node.text
    if not kind.is_list or not isinstance(node, Sequence):
        return None
    texts = [one.text for one in node.items if isinstance(one, Scalar)]
    return tuple(texts) if len(texts) == len(node.items) else None


def is_entry(node: Node, kind: Kind) -> bool:
    """Whether `node` may stand in a list of this kind."""
    try:
        return isinstance(node, Scalar) and kind.parse((node.text,)) is not None
    except ValueError:
        return False


def hints_for(node: Node) -> list[str]:
    if isinstance(node, Scalar) and node.plain and node.text.endswith(","):
        return ["the comma is part of the value here"]
    return []


def nodes_of(root: Node) -> Iterator[Node]:
    """All values, the root too; what aliases stand for comes once."""
    nodes, seen = [root], {id(root)}
    while nodes:
        node = nodes.pop()
        yield node
        inside: list[Node] = []
        if isinstance(node, Mapping):
            inside = [value for _, value in node.entries.values()]
        elif isinstance(node, Sequence):
            inside = node.items
        nodes += [one for one in inside if id(one) not in seen]
        seen.update(map(id, inside))


def default_of(option: Option) -> Value | None:
    """The value without the key; None if there is none."""
    if not option.default:
        return None
    texts = parse_words(option.default) if option.kind.is_list else option.default
    return Value(option.kind.parse(texts))


class Document:
    """A file with settings: its text, and what is wrong with it.

    Where it is not `strict` only what is needed must be right: an unknown key is a
    warning then.
    """

    def __init__(self, path: str, text: str, remarks: list[Remark], strict: bool = True) -> None:
        self.path, self.text, self.remarks, self.strict = path, text, remarks, strict
        self.root: Node = Scalar("", True, 1, 1)
        self.shown: dict[int, str] = {}  # lines that were looked at; a long one has many remarks
        self.lines = text.replace("\r\n", "\n").lstrip("\ufeff").split("\n")

    # Remarks

    def width(self, node: Node) -> int:
        """How many characters the value takes on its line."""
        rest = self.lines[node.line - 1][node.column - 1 :]
        if isinstance(node, Scalar) and node.plain and rest.startswith(node.text):
            return len(node.text)
        quoted = re.match(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", rest)
        if quoted or not isinstance(node, Scalar):
            return quoted.end() if quoted else 1
        return len(rest.rstrip())

    def line(self, number: int) -> str:
        """A line as it may be shown, character for character as long as it is."""
        if number not in self.shown:
            self.shown[number] = printable(hide_secrets(self.lines[number - 1]))
        return self.shown[number]

    def note(self, node: Node, text: str, *hints: str, is_error: bool = True) -> None:
        shown = excerpt(self.line(node.line), node.column, self.width(node))
        place = (self.path, node.line, node.column)
        self.remarks.append(Remark(text, *place, tuple(shown), hints, is_error))

    def warn(self, node: Node, text: str, *hints: str) -> None:
        self.note(node, text, *hints, is_error=False)

    # Mappings

    def entries(self, node: Node, where: str) -> dict[str, tuple[Scalar, Node]]:
        """What is in a mapping; nothing at all is an empty one."""
        if isinstance(node, Mapping):
            return node.entries
        if not is_null(node):
            self.note(node, f"{where} is a mapping, not {describe_node(node)}")
        return {}

    def unknown(self, key: Scalar, known: Iterable[str], where: str) -> None:
        text = f"unknown key {printable(key.text)!r}{suggestion(key.text, known)}"
        self.note(key, f"{where}: {text}" if where else text, is_error=self.strict)

    def section(
        self, node: Node, options: Iterable[Option], where: str, at: Node | None = None
    ) -> dict[str, Value]:
        """What the mapping says for each of `options`, with the defaults; faults are left out.

        `where` names the mapping in messages, and `at` is where it is missing a key.
        """
        entries = self.entries(node, where or "it")
        if not isinstance(node, Mapping) and not is_null(node):
            return {}
        values = {}
        known = {option.name: option for option in options}
        for name, (key, _) in entries.items():
            if name not in known:
                self.unknown(key, known, where)
        for name, option in known.items():
            _, given = entries.get(name, (None, None))
            if not self.strict and isinstance(given, (Mapping, Sequence)):
                given = None if not option.kind.is_section else given
            if given is not None and not is_null(given):
                value = self.value(option, given, where)
            elif option.default is None:
                self.note(at or node, f"{where or 'its source'} has no {name}")
                continue
            else:
                value = default_of(option)
            if value is not None:
                values[name] = value
        return values

    def value(self, option: Option, node: Node, where: str) -> Value | None:
        """The value of one key, None if it is none."""
        if option.kind.is_section:
            return Value(node, node, self.path)
        texts = texts_in(node, option.kind)
        if texts is not None:
            with suppress(ValueError):
                return Value(option.kind.parse(texts), node, self.path)
        faults = [node]
        if option.kind.is_list and isinstance(node, Sequence):
            faults = [one for one in node.items if not is_entry(one, option.kind)]
        for one in faults:
            shown = describe_node(one, option.is_secret)
            text = f"{option.name} {option.kind.expected}, not {shown}"
            self.note(one, f"{where}: {text}" if where else text, *hints_for(one))
        return None


# ==== Schedule ===============================================================
#
# When a job is next due, and when it is late, as backy 2.2 and newer reckon it.
# Everything is decided from what is given; nothing here asks the clock.
#
# Only complete revisions count.  One that lies in the future, because the clock
# was wrong when it was made or is wrong now, says nothing about how old the newest
# image is: it hides neither a missed run nor that the job is overdue.  Only when
# the clock was set back by less than half an interval, a run is not made twice.

ORIGIN = datetime(1, 1, 1, tzinfo=UTC)  # a Monday; all intervals are counted from here
FUTURE = timedelta(minutes=5)  # by so much clocks may differ before it means something
NEAR = timedelta(minutes=5)  # a regular time so near is not run ahead of
LONGEST_BACK_OFF = timedelta(minutes=360)


@dataclass(frozen=True)
class Interval:
    """One tag of a schedule: how often it is due, and how many revisions it keeps."""

    tag: str
    every: timedelta
    keep: int


@dataclass(frozen=True)
class Schedule:
    """A set of intervals, the shortest first."""

    name: str
    intervals: tuple[Interval, ...]

    @cached_property
    def shortest(self) -> timedelta:
        return min(one.every for one in self.intervals)

    @cached_property
    def longest(self) -> timedelta:
        return max(one.every for one in self.intervals)

    @cached_property
    def tags(self) -> tuple[str, ...]:
        return tuple(one.tag for one in self.intervals)


@dataclass(frozen=True)
class Past:
    """What the times of a job are reckoned from: one of its complete revisions."""

    moment: datetime
    tags: tuple[str, ...]
    duration: float  # seconds


@lru_cache(maxsize=1 << 16)
def spread_within(seconds: int, job: str) -> int:
    import random

    options: dict[str, Any] = {}
    if sys.version_info >= (3, 9):  # hosts in FIPS mode have md5 only for what is no secret
        options["usedforsecurity"] = False
    digest = hashlib.md5(job.encode("utf-8", "surrogatepass"), **options)  # noqa: S324
    return random.Random(int(digest.hexdigest(), 16)).randint(0, seconds)


def spread_of(job: str, schedule: Schedule) -> int:
    """The second within the longest interval at which this job runs: the same on all hosts."""
    return spread_within(schedule.longest // timedelta(seconds=1), job)


def next_slot(every: timedelta, spread: int, now: datetime) -> datetime:
    """The first moment after `now` that is `spread` seconds and whole intervals from the origin."""
    start = ORIGIN + timedelta(seconds=spread)
    return start + ((now - start) // every + 1) * every


def earliest(slots: Iterable[tuple[datetime, str]]) -> tuple[datetime, tuple[str, ...]]:
    """The first of the moments, and all tags that are due at it."""
    slots = list(slots)
    first = min(moment for moment, _ in slots)
    return first, tuple(tag for moment, tag in slots if moment == first)


def next_time(schedule: Schedule, spread: int, now: datetime) -> tuple[datetime, tuple[str, ...]]:
    """The next regular time, always later than `now`, and the tags that are due then."""
    return earliest((next_slot(one.every, spread, now), one.tag) for one in schedule.intervals)


def next_slot_unserved(one: Interval, spread: int, past: ListLike[Past], now: datetime) -> datetime:
    """Like next_slot(), but past a slot that was served before the clock was set back a little."""
    slot = next_slot(one.every, spread, now)
    for revision in reversed(past):
        if one.tag in revision.tags:
            served = now < revision.moment < now + one.every / 2 and slot <= revision.moment
            return slot + one.every if served else slot
    return slot


def missed_tags(schedule: Schedule, past: ListLike[Past], now: datetime) -> tuple[str, ...]:
    """The tags of the schedule that no revision has which is younger than their interval."""

    def is_missed(one: Interval) -> bool:
        return not any(
            one.tag in revision.tags and -FUTURE <= now - revision.moment < one.every
            for revision in reversed(past)
        )

    return tuple(one.tag for one in schedule.intervals if is_missed(one))


def next_run(
    schedule: Schedule, spread: int, past: ListLike[Past], now: datetime
) -> tuple[datetime, tuple[str, ...], str]:
    """When the job is to run next, with which tags, and why then.

    What was missed is run now, unless the regular time is near, which then takes
    it along.  A job without any revision waits for its regular time, so that a
    hundred new jobs do not start at once.
    """
    moment, regular = earliest(
        (next_slot_unserved(one, spread, past, now), one.tag) for one in schedule.intervals
    )
    missed = missed_tags(schedule, past, now)
    if missed and past and moment > now + NEAR:
        return now, missed, f"catching up: {', '.join(missed)} missed"
    tags = tuple(tag for tag in schedule.tags if tag in regular or tag in missed)
    besides = [tag for tag in missed if tag not in regular]
    reason = f"regular time of {', '.join(regular)}"
    if not past:
        reason += "; never backed up before"
    elif besides:
        reason += f"; {', '.join(besides)} missed"
    return moment, tags, reason


def overdue_since(
    schedule: Schedule, past: ListLike[Past], first_seen: datetime, now: datetime
) -> datetime | None:
    """Since when the job is without a revision young enough; None while it is within its SLA.

    A job that has none is given as long from `first_seen` on, which who keeps it must
    set to `now` when it lies in the future.
    """
    moments = (revision.moment for revision in past if revision.moment <= now + FUTURE)
    limit = max(moments, default=first_seen) + 3 * schedule.shortest / 2
    return limit if now > limit else None


def back_off(failures: int) -> timedelta:
    """How long to wait after so many failures in a row: 2, 4, 8 ... 256, 360 minutes."""
    if failures <= 0:
        return timedelta(0)
    return min(timedelta(minutes=2 ** min(failures, 9)), LONGEST_BACK_OFF)


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
# linux/falloc.h: FS_IOC_ZERO_RANGE = _IOW('X', 57, struct space_resv)
FS_IOC_ZERO_RANGE = 0x40305839
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
    if answer[8] < 0:
        raise OSError(-answer[8], os.strerror(-answer[8]))
    return answer[7] if answer[8] == 0 else 0


def extent_map(fd: int, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(logical, physical, length, flags) of the extents from `start` to `end`.  Raises OSError."""
    most = 500
    while start < end:
        buffer = bytearray(fiemap.size + most * fiemap_extent.size)
        fiemap.pack_into(buffer, 0, start, end - start, FIEMAP_FLAG_SYNC, 0, most, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        count = fiemap.unpack_from(buffer)[3]
        end_of_map = fiemap.size + count * fiemap_extent.size
        for extent in fiemap_extent.iter_unpack(memoryview(buffer)[fiemap.size : end_of_map]):
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


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Make a range read as zeros and keep room for it; False where that cannot be had."""
    try:
        fcntl.ioctl(fd, FS_IOC_ZERO_RANGE, space_resv.pack(0, os.SEEK_SET, 0, offset, length, 0, 0))
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


def read_limited(fd: int, limit: int) -> bytes:
    """All that comes from `fd`; raises OSError with EFBIG for more than `limit` bytes."""
    data = bytearray()
    while len(data) <= limit:
        piece = os.read(fd, limit + 1 - len(data))
        if not piece:
            return bytes(data)
        data += piece
    raise OSError(errno.EFBIG, f"larger than {format_size(limit)}")


def read_small(dir_fd: int, name: str, limit: int = MiB) -> bytes:
    """The contents of a regular file of at most `limit` bytes."""
    fd = open_regular(dir_fd, name)
    try:
        return read_limited(fd, limit)
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


def replace_file(dir_fd: int, name: str, data: bytes, mode: int, durable: bool = True) -> None:
    """Put `data` at `name`; after a crash there is the old file or the new one.

    What reached the medium is read back before the old file goes.  What is soon
    written again need not be `durable`: a power cut may then leave neither.
    """
    temporary = temporary_name()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW
    fd = os.open(temporary, flags, mode, dir_fd=dir_fd)
    try:
        try:
            write_all(fd, data, 0)
            os.fchmod(fd, mode)
            if durable:
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
    if durable:
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


@contextmanager
def replacement(dir_fd: int, name: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A new file, and what lets it take the name `name`, for good; without that it is gone.

    The caller brings the file to the medium first.  After a crash there is the old
    file or the new one.
    """
    temporary = temporary_name()
    fd = open_regular(dir_fd, temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def take_name() -> None:
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        sync(dir_fd)

    try:
        yield fd, take_name
    finally:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        close(fd)


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


# ==== Programs ===============================================================
#
# Other programs, for sources: without a shell or a terminal, with a clean environment,
# and with an end to all waiting.  What a program says is hostile until it is proven:
# its output has a limit, its words are shortened and made fit to print.

PASSED_ON = frozenset(
    ("HOME", "LANG", "LC_ALL", "TZ", "CEPH_ARGS", "CEPH_CONF", "CEPH_CLUSTER", "CEPH_KEYRING")
) | {"CONSUL_HTTP_ADDR"}
MOST_OUTPUT = 16 * MiB
MOST_WORDS = 64 * KiB  # of what a program says on standard error; the end of it counts
PROGRESS = re.compile(r"\d+% complete")


class ProgramFailed(BackyError):
    """A program did not do its work; `code` is its exit status, None if it was ended or never ran.

    The message has its own words.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


def own_words(said: bytes) -> str:
    """The last lines of what a program said, one behind the other, without its progress."""
    lines = [line.strip() for line in re.split("[\r\n]+", said.decode("utf-8", "replace"))]
    lines = [line for line in lines if line and not PROGRESS.search(line)]
    return printable("; ".join(lines[-3:])[-500:])


def program_environment(**more: str) -> dict[str, str]:
    """What a program gets of our environment: nothing that changes how it is loaded."""
    kept = {name: value for name, value in os.environ.items() if name in PASSED_ON}
    return {"PATH": os.environ.get("PATH", os.defpath), **kept, **more}


class Program:
    """A program while it runs, its output read as it comes.

    It is killed, with all that it has started, when nothing comes for `patience` seconds
    on either of its outputs, when it has run for `limit` seconds, or when we leave.
    """

    def __init__(
        self,
        *words: str,
        patience: float,
        limit: float = math.inf,
        stdin: bytes = b"",
        **environment: str,
    ) -> None:
        self.words, self.patience, self.limit, self.stdin = words, patience, limit, stdin
        self.environment = environment
        self.said = b""  # the end of its standard error
        self.name = printable(" ".join(words))[:300]

    def __enter__(self) -> Program:
        import select
        import subprocess
        import tempfile

        log.debug("$ %s", self.name)
        with tempfile.TemporaryFile() as stdin:  # not a pipe: nobody need wait for anybody
            stdin.write(self.stdin)
            stdin.seek(0)
            try:
                self.process = subprocess.Popen(
                    self.words,
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    env=program_environment(**self.environment),
                    start_new_session=True,
                )
            except (OSError, ValueError) as e:
                reason = getattr(e, "strerror", None) or e
                raise ProgramFailed(f"cannot start {self.name}: {printable(reason)}") from e
        self.out_fd, self.err_fd = self.process.stdout.fileno(), self.process.stderr.fileno()
        widen_pipe(self.out_fd)
        self.poll = select.poll()
        for fd in (self.out_fd, self.err_fd):
            self.poll.register(fd, select.POLLIN)
        self.open = {self.out_fd, self.err_fd}
        self.deadline = time.monotonic() + self.limit
        return self

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.kill()
            with suppress(Exception):  # one that cannot be killed is waited for by init
                self.process.wait(10)
        self.process.stdout.close()
        self.process.stderr.close()

    def await_output(self) -> set[int]:
        """The outputs on which there is something, or the end.  Raises ProgramFailed in time."""
        now = time.monotonic()
        until = min(now + self.patience, self.deadline)
        while now < until:
            ready = self.poll.poll(min(until - now, 3600) * 1000)
            if ready:
                return {fd for fd, _ in ready}
            now = time.monotonic()
        self.give_up()

    def give_up(self) -> NoReturn:
        words = own_words(self.said)
        is_late = time.monotonic() >= self.deadline
        what = "takes too long" if is_late else f"stands still for {self.patience:g} s"
        raise ProgramFailed(f"{self.name} {what}{f': {words}' if words else ''}")

    def read(self, view: memoryview) -> int:
        """Put what comes next to the start of `view`; how much that is, 0 at the end."""
        while True:
            ready = self.await_output()
            if self.err_fd in ready:
                self.listen()
            if self.out_fd in ready:
                got = os.readv(self.out_fd, [view])
                if not got:
                    self.leave(self.out_fd)
                return got

    def read_whole(self, view: memoryview) -> None:
        """Fill `view`.  Raises EOFError where the output ends before that."""
        while len(view):
            got = self.read(view[:MiB])
            if not got:
                raise EOFError
            view = view[got:]

    def leave(self, fd: int) -> None:
        self.poll.unregister(fd)
        self.open.discard(fd)

    def listen(self) -> None:
        piece = os.read(self.err_fd, MOST_WORDS)
        if not piece:
            self.leave(self.err_fd)
        self.said = (self.said + piece)[-MOST_WORDS:]

    def finish(self) -> None:
        """Wait for the end.  Raises ProgramFailed unless that is all, and the status 0."""
        if self.out_fd in self.open and self.read(memoryview(bytearray(1))):
            raise ProgramFailed(f"{self.name}: there is more than its end")
        alive = time.monotonic()
        while self.process.poll() is None:
            if self.err_fd not in self.open:
                time.sleep(0.005)
            elif self.poll.poll(50):
                self.listen()
                alive = time.monotonic()
            if time.monotonic() > min(alive + self.patience, self.deadline):
                self.give_up()
        while self.err_fd in self.open and self.poll.poll(0):
            self.listen()
        code = self.process.returncode
        if code:
            how = f"exit status {code}" if code > 0 else f"ended by signal {-code}"
            words = own_words(self.said)
            shown = f"{self.name}: {words} ({how})" if words else f"{self.name}: {how}"
            raise ProgramFailed(shown, code)


def run_program(
    *words: str, limit: float, stdin: bytes = b"", most: int = MOST_OUTPUT, **environment: str
) -> bytes:
    """What the program prints; raises ProgramFailed, also for more than `most` bytes."""
    with Program(*words, patience=limit, limit=limit, stdin=stdin, **environment) as program:
        output, piece = bytearray(), memoryview(bytearray(64 * KiB))
        while True:
            got = program.read(piece)
            if not got:
                break
            output += piece[:got]
            if len(output) > most:
                raise ProgramFailed(f"{program.name}: prints more than {format_size(most)}")
        program.finish()
        return bytes(output)


def parse_json(data: bytes, what: str) -> Any:
    """Raises BackyError for what is no JSON, in all the ways in which it can be none."""
    import json

    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BackyError(f"{what} is no JSON: {printable(e)[:200]}") from e


# ==== Images =================================================================
#
# An image is read in units, by several threads, each with buffers of its own;
# it is hashed in blocks and written in pages.  Positional calls only, never
# mmap of a file: a source that shrinks would end us with SIGBUS.

BLOCK = 64 * KiB
UNIT = MiB
ZEROS = bytearray(UNIT)
HOLE = memoryview(ZEROS)  # of which a slice is no copy
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
        self.covered: list[Span] = []  # what of `new` has come from a source that names changes

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
            view[filled:start] = HOLE[: start - filled]
            if self.drop:
                drop_cache(self.fd, offset + start, end - start)
            if read_at(self.fd, view[start:], offset + start, end - start) < end - start:
                raise EOFError
            if self.drop and not self.direct:
                drop_cache(self.fd, offset + start, end - start)
            with self.lock:
                self.bytes_read += end - start
            filled = end
        view[filled:length] = HOLE[: length - filled]

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
                view[at : min(at + PAGE, length)] = HOLE[: min(PAGE, length - at)]
                lost.append(at)
        return lost


def resize(fd: int, size: int) -> None:
    """Give an image this size; a last page that is cut, and may be rotten, is let go, not read."""
    now = os.fstat(fd).st_size
    if now != size:
        kept = min(now, size)
        os.ftruncate(fd, kept - kept % PAGE)
        os.ftruncate(fd, size)


def write_pages(fd: int, view: memoryview, offset: int, size: int) -> None:
    """Write at a page of an image of `size` bytes, also over a last page that is rotten.

    A page of which a part lies behind the end is read before it is written: where
    it cannot be, it is let go.
    """
    try:
        write_all(fd, view, offset)
    except OSError as e:
        tail = size - size % PAGE
        if e.errno != errno.EIO or not offset <= tail < offset + len(view):
            raise
        with suppress(OSError):  # of a device, whose error stands
            resize(fd, tail)
            resize(fd, size)
        write_all(fd, view, offset)


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
                write_pages(fd, new[start:end], offset + start, self.size)
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


@dataclass(frozen=True)
class Turns:
    """What is read from a pipe: by whoever has taken the next piece, and before another does.

    `abort` makes a reader that waits give up.
    """

    take: Callable[[int, int, Buffers], None]
    abort: Callable[[], None]


class Crew:
    """Threads that take pieces from one list.

    They are waited for by an event, not by join(): in Python 3.8 a signal in the
    middle of a join makes the next one wait for ever (bpo-45274).  Each counts itself,
    for it gets no signals; one that comes only after the end does nothing.
    """

    def __init__(
        self,
        pieces: Iterable[tuple[int, int]],
        work: Callable[[int, int, Buffers], None],
        turns: Turns | None,
    ) -> None:
        self.queue, self.work, self.turns = iter(pieces), work, turns
        self.turn = threading.Lock()
        self.lock, self.is_stopped, self.done = threading.Lock(), False, threading.Event()
        self.active = 0
        self.failures: list[BaseException] = []

    def start_worker(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with self.lock:
            if self.is_stopped:
                return
            self.active += 1
        try:
            buffers = Buffers()
            while not self.is_stopped:
                piece = self.take(buffers)
                if piece is None:
                    return
                self.work(*piece, buffers)
        except BaseException as e:
            self.failures.append(e)
            self.is_stopped = True
        finally:
            self.leave()

    def take(self, buffers: Buffers) -> tuple[int, int] | None:
        """The next piece, None if that was all, or nobody can know what is next."""
        with self.turn:
            if self.is_stopped:
                return None
            try:
                piece = next(self.queue, None)
                if piece is not None and self.turns:
                    self.turns.take(*piece, buffers)
                return piece
            except BaseException:
                self.is_stopped = True
                raise

    def leave(self) -> None:
        with self.lock:
            self.active -= 1
            if not self.active:
                self.done.set()

    def stop(self) -> None:
        """Wait until each worker is through with the piece it has."""
        with self.lock:
            self.is_stopped = True
        while self.active and not self.done.wait(1):
            pass


def work_through(
    pieces: Iterable[tuple[int, int]],
    work: Callable[[int, int, Buffers], None],
    tick: Callable[[], None],
    workers: int,
    turns: Turns | None = None,
) -> None:
    """Call `work` for each (offset, length), in `workers` threads; `tick` now and then in this one.

    The first exception, in a worker or in `tick`, ends all of them and is raised.
    One worker is this very thread.
    """
    if workers <= 1:
        buffers = Buffers()
        for offset, length in pieces:
            if turns:
                turns.take(offset, length, buffers)
            work(offset, length, buffers)
            tick()
        return
    give_memory_back()
    crew = Crew(pieces, work, turns)
    try:
        for _ in range(workers):
            crew.start_worker()
        while not crew.done.wait(0.1):
            tick()
    except BaseException:
        if turns:
            turns.abort()
        raise
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
        """The units of the image with blocks that are not zeros, or of which that is not known."""
        first, step = sums_header.size, DIGEST * UNIT // BLOCK
        size = os.fstat(self.fd).st_size
        for start, end in data_extents(self.fd, 0, size):
            first += max(0, start - first) // step * step
            while first < end:
                piece = b""
                with suppress(OSError):
                    piece = os.pread(self.fd, 128 * step, first)
                # a page that cannot be read ends it early
                piece = piece.ljust(min(128 * step, size - first), b"?")
                for at in range(0, len(piece), step):
                    if not is_zero(memoryview(piece)[at : at + step]):
                        offset = (first + at - sums_header.size) // DIGEST * BLOCK
                        yield offset, offset + UNIT
                first += 128 * step


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


@lru_cache(maxsize=16)
def blocks_of(length: int) -> ListLike[tuple[int, int, int]]:
    """(number, start, end) of the blocks in a unit of `length` bytes."""
    return tuple((at, start, end) for at, (start, end) in enumerate(blocks_in([(0, length)])))


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

    def stat(self, key: str) -> Any:
        """What `stats` has for a key, as it was written or read; None if nothing."""
        value = self.stats.get(key)
        return resolve(value) if isinstance(value, Node) else value

    @property
    def share_seen(self) -> float | None:
        """How much of the image was found right when it was made; None if that is not known."""
        seen = self.stat("bytes_verified")
        return min(1.0, seen / self.size) if isinstance(seen, int) and self.size else None

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

    def current(self, revision: Revision) -> Revision:
        """What is now known of `revision`; raises NotFound when it has been removed."""
        for one in self.revisions:
            if one.id == revision.id:
                return one
        raise NotFound(f"{self.name}: {revision.id} is gone")

    def mark_damaged(self, revision: Revision, ranges: Iterable[tuple[int, int]]) -> None:
        """Distrust a revision for these ranges, beside those that are known by now."""
        with self.metadata_lock(revision.id):
            known = self.current(revision).damaged
            damaged = join_ranges([*known, *ranges])
            self.change(revision, trust=Trust.DISTRUSTED, damaged=damaged, heal_tried=0)

    def change(self, revision: Revision, **values: Any) -> Revision:
        """Rewrite what has been written of `revision` meanwhile, with `values` on top."""
        if values.get("trust") is Trust.DISTRUSTED:
            values["seen_to"] = 0
        changed = replace(self.current(revision), **values)
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
            try:
                self.condemn(revision.id)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # no room in the directory for one more name: the one that can be spared goes first
                with suppress(FileNotFoundError):
                    os.unlink(f"{revision.id}.sums", dir_fd=self.dir_fd)
                self.condemn(revision.id)
            self.bury(revision.id)

    def condemn(self, name: str) -> None:
        """Turn `last` away from a revision and put up its tombstone."""
        self.point_last()
        os.rename(f"{name}.rev", f"{name}.del", src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
        sync(self.dir_fd)

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


SAMPLE = 4 * MiB  # how much of a source is compared once more at one place


class Changes:
    """What has changed in a source since a revision, from its beginning to its end, once."""

    in_order = True  # whether the units must be read one after the other
    bytes_read = 0

    def extents(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what may have changed, in order."""
        raise NotImplementedError

    def read(self, view: memoryview, offset: int, length: int) -> list[Span]:
        """Put what has changed of this unit to its places in `view`; these places, in order."""
        raise NotImplementedError

    def finish(self) -> None:
        """Raise BackyError unless that was all, and can be relied on."""

    def abort(self) -> None:
        """Make who waits for more give up."""


def whole_blocks(extents: Iterable[tuple[int, int]], size: int) -> list[Span]:
    """(start, end) of the blocks that these (offset, length) touch, in an image of `size` bytes."""
    touched = ((at - at % BLOCK, -(-(at + length) // BLOCK) * BLOCK) for at, length in extents)
    joined = join_ranges((start, end - start) for start, end in touched)
    return [(start, min(start + length, size)) for start, length in joined if start < size]


class ListedChanges(Changes):
    """Blocks that are read from an image which can be read anywhere."""

    in_order = False

    def __init__(self, reader: Reader, spans: list[Span]) -> None:
        self.reader, self.spans = reader, spans
        self.starts = [start for start, _ in self.spans]

    def extents(self) -> Iterator[tuple[int, int]]:
        return iter(self.spans)

    def read(self, view: memoryview, offset: int, length: int) -> list[Span]:
        covered = []
        for start, end in self.spans[max(0, bisect_right(self.starts, offset) - 1) :]:
            if start >= offset + length:
                break
            first, last = max(start, offset) - offset, min(end, offset + length) - offset
            if first < last:
                self.reader.read(view[first:], offset + first, last - first)
                covered.append((first, last))
        self.bytes_read = self.reader.bytes_read
        return covered


class PipedChanges(Changes):
    """Extents whose bytes come through a pipe, one after the other."""

    def __init__(self, program: Program, size: int) -> None:
        self.program, self.size = program, size
        self.records = self.parse()
        self.start, self.end, self.is_zero = 0, 0, True  # what is left of the present extent

    def parse(self) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether all is zeros) of each extent, ascending; bytes are taken between."""
        raise NotImplementedError

    def refuse(self, what: str) -> NoReturn:
        raise BackyError(f"{self.program.name}: {what}")

    def take(self, view: memoryview) -> None:
        """Fill `view`; where the pipe ends too soon the program's own words come first."""
        try:
            self.program.read_whole(view)
        except EOFError:
            self.program.finish()
            self.refuse("its output ends too soon")
        self.bytes_read += len(view)

    def is_over(self) -> bool:
        """Whether there is no extent left; goes on to the next when the present one is read."""
        while self.start >= self.end:
            record = next(self.records, None)
            if record is None:
                return True
            self.start, self.end, self.is_zero = record
        return False

    def extents(self) -> Iterator[tuple[int, int]]:
        while not self.is_over():
            yield self.start, self.end

    def read(self, view: memoryview, offset: int, length: int) -> list[Span]:
        covered = []
        while not self.is_over() and self.start < offset + length:
            if self.start < offset:
                raise ValueError(f"extent at {self.start} was passed by")
            end = min(self.end, offset + length)
            part = view[self.start - offset : end - offset]
            if self.is_zero:
                part[:] = HOLE[: len(part)]
            else:
                self.take(part)
            covered.append((self.start - offset, end - offset))
            self.start = end
        return covered

    def finish(self) -> None:
        if not self.is_over():
            self.refuse("there is more than was read of it")
        self.program.finish()

    def abort(self) -> None:
        self.program.kill()


class PipeReader:
    """Reads an image that a program prints, from its beginning on; starts it when needed."""

    def __init__(self, start: Callable[[], Program], size: int) -> None:
        self.start, self.size, self.bytes_read = start, size, 0
        self.program: Program | None = None

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    def read(self, view: memoryview, offset: int, length: int) -> None:
        """Only what comes next can be read.  Raises BackyError where the output ends too soon."""
        if self.program is None:
            self.program = self.start()
        if offset != self.bytes_read:
            raise ValueError(f"offset {offset} is not next, but {self.bytes_read}")
        try:
            self.program.read_whole(view[:length])
        except EOFError:
            self.program.finish()
            short = f"its output ends before {self.size} bytes"
            raise BackyError(f"{self.program.name}: {short}") from None
        self.bytes_read += length

    def finish(self) -> None:
        """Raise BackyError unless the program has printed just this image, and ended well."""
        if self.program:
            self.program.finish()

    def abort(self) -> None:
        if self.program:
            self.program.kill()


class Still:
    """An image that is being backed up: its reader, and what else its source knows of it."""

    in_order = False  # whether the reader can only go from the beginning to the end

    def __init__(self, name: str, size: int, reader: Reader | None, state: str = "") -> None:
        """`state` names this very content; an interrupted run goes on where it is the same."""
        self.name, self.size, self.state = name, size, state
        if reader is not None:
            self.reader = reader

    def check(self) -> None:
        """Raise BackyError when the image is no longer what it was."""

    def finish(self) -> None:
        """Raise BackyError unless all that was read can be relied on."""

    def knows(self, revision: Revision) -> bool:
        """Whether changes since this revision can be asked for."""
        return False

    def changes(self, revision: Revision, stack: ExitStack) -> Changes | str:
        """What has changed since a revision that it knows, or why that cannot be said."""
        return ""

    def sample(self, spans: Iterable[Span]) -> Iterator[tuple[int, memoryview]]:
        """The offset and the bytes of these parts, in pieces; read anew from the source."""
        view = memoryview(mmap.mmap(-1, UNIT))
        for start, end in spans:
            for offset in range(start, end, UNIT):
                length = min(UNIT, end - offset)
                self.reader.read(view, offset, length)
                yield offset, view[:length]


class VerifyMode(Enum):
    """How a backup is proven: by reading the previous image too, or only what was written.

    With SAMPLE what the source says is unchanged is not even read, but for a sample.
    """

    FULL = "full"
    WRITTEN = "written"
    SAMPLE = "sample"


INTERVAL_OPTIONS = (
    Option("interval", TIME_SPAN, None, "how often a revision with this tag is due"),
    Option("keep", number(0, 99_999), None, "how many are kept at least; 0: all of them"),
)

SOURCE_OPTIONS = (
    Option("type", TEXT, None, "the type of source"),
    Option("verify", choice("full", "written", "sample"), "full", "how a backup is proven"),
    Option(
        *("rewrite-above", number(0, 10**12 - 1, "is a number of extents"), "100000"),
        "an image in more extents is written anew; 0: never",
    ),
    Option("sample-time", TIME_SPAN, "5m", "how long samples are compared"),
    Option("full-always", BOOLEAN, "no", "read all, whatever the source says of changes"),
    Option("backend", choice("cowfile"), "cowfile", "of backy 2.x: how revisions are kept"),
)


DEFAULT_TIMEOUT = timedelta(seconds=60)
TIMEOUT = Option("timeout", TIME_SPAN, "60", "when a program that stands still is given up")


def types_below(kind: type[Source]) -> Iterator[tuple[str, type[Source]]]:
    for one in kind.__subclasses__():
        yield from ((name, one) for name in (one.type, *one.aliases))
        yield from types_below(one)


@dataclass(frozen=True)
class Source:
    """Where images come from.  Naming a `type` registers it."""

    type = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    keeps = False  # whether its snapshots stay, to tell later what has changed
    keys: ClassVar[tuple[Option | str, ...]] = ()  # beside SOURCE_OPTIONS; a str is optional text

    @classmethod
    def types(cls) -> dict[str, type[Source]]:
        return dict(types_below(Source))

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The table of a source of this type."""
        own = (Option(key, TEXT) if isinstance(key, str) else key for key in cls.keys)
        defaults = {"verify": "sample"} if cls.keeps else {}
        common = (
            replace(one, default=defaults.get(one.name, one.default)) for one in SOURCE_OPTIONS
        )
        return (*common, *own)

    @classmethod
    def options_for(cls, names: Iterable[str]) -> tuple[Option, ...]:
        """The table of a source for which these keys are given."""
        return cls.options()

    @classmethod
    def parse(cls, words: str) -> dict[str, str]:
        """What `init` writes to the configuration for SOURCE."""
        raise NotImplementedError

    @classmethod
    def load(cls, options: dict[str, str]) -> Source:
        raise NotImplementedError

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Still]:
        """Hold the image still for revision `name`; a failure inside leaves no snapshot."""
        raise NotImplementedError
        yield

    @contextmanager
    def reopen(self, revision: Revision) -> Iterator[Still]:
        """What a revision is to be compared with: its own snapshot, or the image as it is now."""
        with self.snapshot(new_id()) as still:
            yield still

    def snapshot_name(self, name: str) -> str:
        """What the snapshot of revision `name` is called when it is to be removed."""
        return ""

    def release(self, names: Iterable[str]) -> list[str]:
        """Remove these snapshots; those that stay, each with a warning."""
        return []


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
    keys = (
        Option("filename", PATH, None, "the image file or block device"),
        Option("cow", BOOLEAN, "yes", "of backy 2.x, without effect"),
    )

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


def read_schedule(document: Document, node: Node, name: str, where: str) -> Schedule | None:
    """The faultless ones of the intervals in the mapping `node`; None if there are none."""
    intervals = []
    tags = document.entries(node, where)
    for tag, (key, one) in tags.items():
        try:
            if parse_tags(tag) != (tag,):
                raise BackyError(f"{printable(tag)!r} is not one tag")
        except BackyError as e:
            document.note(key, f"{where}: {e}", *filter(None, [e.hint]))
            tag = ""
        values = document.section(one, INTERVAL_OPTIONS, f"{where}.{printable(key.text)}", key)
        if tag and len(values) == len(INTERVAL_OPTIONS):
            intervals.append(Interval(tag, values["interval"].value, values["keep"].value))
    if (isinstance(node, Mapping) and not tags) or is_null(node):
        document.note(node, f"{where} has no interval")
    in_order = tuple(sorted(intervals, key=lambda one: one.every))
    return Schedule(name, in_order) if intervals else None


def find_source_type(document: Document, node: Node, where: str) -> type[Source] | None:
    """The class of the source in the mapping `node`; None if there is no such one."""
    entries = node.entries if isinstance(node, Mapping) else {}
    _, given = entries.get("type", (None, None))
    name = given.text if isinstance(given, Scalar) and not is_null(given) else ""
    types = Source.types()
    if name not in types or not name:
        alike = suggestion(name, types) if name else ""
        text = f"no source type {printable(name)!r} in this version{alike}"
        if not name and document.strict:
            text = "its source has no type"
        hints = [f"source types are: {', '.join(sorted(filter(None, types)))}"]
        hints += hints_for(given) if given else []
        document.note(given or node, f"{where}: {text}" if where else text, *hints)
        return None
    return types[name]


def texts_of(values: dict[str, Value]) -> dict[str, str]:
    """What was given, without the defaults, as text."""
    given = {name: value for name, value in values.items() if value.node}
    return {
        name: value.node.text if isinstance(value.node, Scalar) else ", ".join(value.value)
        for name, value in given.items()
    }


def read_source(document: Document, node: Node, where: str, at: Node) -> dict[str, Value]:
    """What the mapping `node` says of a source, with the defaults; empty if it is faulty."""
    if is_null(node) or not isinstance(node, Mapping):
        document.entries(node, f"{where}: source")
        return {}
    kind = find_source_type(document, node, where)
    if kind is None:
        return {}
    faults = len(document.remarks)
    values = document.section(node, kind.options_for(node.entries), where, at)
    if any(remark.is_error for remark in document.remarks[faults:]):
        return {}
    try:
        kind.load(texts_of(values))
    except ConfigError as e:
        document.note(at, f"{where}: {e}" if where else str(e), *filter(None, [e.hint]))
        return {}
    return values


@dataclass(frozen=True)
class Job:
    """What `config` in the job's directory says."""

    source: Source
    verify: VerifyMode
    rewrite_above: int  # extents; 0 is never
    sample_time: timedelta = timedelta(minutes=5)
    full_always: bool = False
    schedule: Schedule | None = None


def read_job(document: Document, root: Node) -> Job:
    """What a `config` says, flat or nested as backy 2.5 has it."""
    schedule = None
    entries = root.entries if isinstance(root, Mapping) else {}
    if "source" in entries:
        if "schedule" in entries:
            schedule = read_schedule(document, entries["schedule"][1], "config", "schedule")
        root = entries["source"][1]
    if not isinstance(root, Mapping):
        raise ConfigError("it is not a mapping")
    if "backend" in root.entries and describe_node(root.entries["backend"][1]) == "'chunked'":
        raise ConfigError(f"this directory {CHUNKED}")
    values = read_source(document, root, "", root)
    for remark in document.remarks:
        if remark.is_error:
            raise ConfigError(remark.text, "; ".join(remark.hints))
    source = Source.types()[values["type"].value].load(texts_of(values))
    mode = VerifyMode(values["verify"].value)
    limit, time_limit = values["rewrite-above"].value, values["sample-time"].value
    return Job(source, mode, limit, time_limit, values["full-always"].value, schedule)


def read_config(repository: Repository, hint: str = "") -> tuple[Document, Node]:
    """The text of `config`, and what it says.  Raises ConfigError, with `hint`."""
    where = f"{repository.name}: config"
    try:
        text = read_small(repository.dir_fd, "config").decode("utf-8")
        return Document(where, text, [], strict=False), parse_yaml(text)
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror}", hint) from e
    except (YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{where}: {e}", hint or getattr(e, "hint", "")) from e


def load_job(repository: Repository) -> Job:
    """Read `config`.  Raises ConfigError with what is wrong; unknown keys are a warning."""
    where = f"{repository.name}: config"
    document, root = read_config(repository)
    try:
        job = read_job(document, root)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}", e.hint) from e
    for remark in document.remarks:
        log.warning("%s: %s", where, remark.text)
    return job


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


# ==== Ceph ===================================================================
#
# Images of Ceph's block devices (RBD), by the program `rbd` alone.  A revision has a
# snapshot of the same id, from which the next one learns what has changed.  A diff says
# more than has changed, never less, but for zeros: what is written is decided by comparing.
#
# Life of a snapshot:  noted in the job's directory  ->  created  ->  read  ->  revision
# complete  ->  reference for the next one  ->  removed when that is complete.

NOT_THERE = 2  # ENOENT, as the exit status of rbd
MANY_OBJECTS = 10_000  # from here on it takes long to ask each of them for what has changed
LONGEST_NAME = 4 * KiB
DIFF_HEADER = b"rbd diff v1\n"
CEPH_NAME = re.compile(r"[^-/@\s][^/@]{0,250}")
CEPH_SNAPSHOT = re.compile(r"([^-@\s][^@]*)@(backy-[\w-]{1,64})", re.ASCII)


class DiffStream(PipedChanges):
    """What `rbd export-diff` prints: doc/dev/rbd-diff.rst in Ceph's sources, version 1.

    A diff is refused unless it begins with the names and the size that it must have,
    its extents ascend within that size, and it comes to its end.
    """

    def __init__(self, program: Program, size: int, older: str, newer: str) -> None:
        super().__init__(program, size)
        self.names = {b"f": older, b"t": newer}

    def number(self, size: int) -> int:
        data = bytearray(size)
        self.take(memoryview(data))
        return int.from_bytes(data, "little")

    def tag(self) -> bytes:
        data = bytearray(1)
        self.take(memoryview(data))
        return bytes(data)

    def parse(self) -> Iterator[tuple[int, int, bool]]:
        header = bytearray(len(DIFF_HEADER))
        self.take(memoryview(header))
        if header != DIFF_HEADER:
            self.refuse(f"no diff begins with {bytes(header)!r}")
        tag = self.parse_head()
        at = 0
        while tag in (b"w", b"z"):
            start, length = self.number(8), self.number(8)
            if start < at:
                self.refuse(f"an extent at {start} comes behind what ends at {at}")
            at = start + length
            if at > self.size:
                self.refuse(f"an extent ends at {at}, the image at {self.size}")
            yield start, at, tag == b"z"
            tag = self.tag()
        if tag != b"e":
            self.refuse(f"unknown or misplaced record {tag!r}")

    def parse_head(self) -> bytes:
        """Check what says which diff this is; the tag behind."""
        missing = {b"f", b"t", b"s"}
        while True:
            tag = self.tag()
            if tag not in missing:
                break
            missing.remove(tag)
            if tag == b"s":
                size = self.number(8)
                if size != self.size:
                    self.refuse(f"it is for {size} bytes, and the image has {self.size}")
                continue
            length = self.number(4)
            if length > LONGEST_NAME:
                self.refuse(f"the name of a snapshot has {length} bytes")
            name = bytearray(length)
            self.take(memoryview(name))
            if bytes(name) != self.names[tag].encode():
                self.refuse(f"it is about {bytes(name[:70])!r}, not {self.names[tag]!r}")
        if missing:
            self.refuse(f"record {tag!r} comes before {b' '.join(sorted(missing))!r}")
        return tag


class RBD:
    """The commands that are needed for one image, POOL/IMAGE or POOL/NAMESPACE/IMAGE."""

    def __init__(self, image: str, timeout: timedelta) -> None:
        self.image, self.timeout, self.patience = image, timeout, timeout.total_seconds()
        self.program = os.environ.get("BACKY_RBD") or "rbd"
        waits = ("client-mount-timeout", "rados-mon-op-timeout", "rados-osd-op-timeout")
        ours = " ".join(f"--{name}={max(1, math.ceil(self.patience))}" for name in waits)
        self.ceph_args = f"{ours} {os.environ.get('CEPH_ARGS', '')}".strip()

    def start(self, *words: str, stack: ExitStack) -> Program:
        """Start a command that prints much; its progress on standard error is a sign of life."""
        program = Program(self.program, *words, patience=self.patience, CEPH_ARGS=self.ceph_args)
        return stack.enter_context(program)

    def run(self, *words: str) -> bytes:
        limit = 3 * self.patience  # each of several operations may take up to the timeout
        return run_program(self.program, *words, limit=limit, CEPH_ARGS=self.ceph_args)

    def ask(self, kind: type, *words: str) -> Any:
        """The answer to a question, which must be a list, or a mapping."""
        answer = parse_json(self.run(*words, "--format=json"), f"rbd {words[0]} {self.image}")
        if not isinstance(answer, kind):
            raise BackyError(f"rbd {printable(' '.join(words))}: an answer of another kind")
        return answer

    def info(self, image: str = "") -> dict[str, Any]:
        return self.ask(dict, "info", image or self.image)

    def snapshots(self) -> dict[str, dict[str, Any]]:
        """All snapshots of the image by their names."""
        listing = self.ask(list, "snap", "ls", self.image)
        return {str(one["name"]): one for one in listing if isinstance(one, dict) and "name" in one}

    def create(self, name: str) -> None:
        self.run("snap", "create", f"{self.image}@{name}")

    def remove(self, name: str) -> None:
        self.run("snap", "rm", f"{self.image}@{name}")

    def can(self, command: str, option: str) -> bool:
        with suppress(ProgramFailed):
            return option.encode() in self.run("help", command)
        return False


def whole_number(mapping: dict[str, Any], key: str, what: str) -> int:
    value = mapping.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise BackyError(f"{what}: its {key} is {printable(value)[:100]!r}, which is no number")
    return value


class Objects:
    """Reads parts of a snapshot where they lie, by `rados`, which comes with `rbd`.

    `rbd` itself reads an image only from its beginning on.  `rados` knows nothing of
    the snapshots of an image, but it tells whether an object was written to since: then
    what is there now is not what was.
    """

    def __init__(self, rbd: RBD, info: dict[str, Any], snapshot: dict[str, Any]) -> None:
        self.rbd, self.info = rbd, info
        pool, *namespace, _ = rbd.image.split("/")
        self.place = [f"--pool={info.get('data_pool') or pool}"]
        self.place += [f"--namespace={one}" for one in namespace]
        self.snapshot = whole_number(snapshot, "id", rbd.image)
        self.prefix = str(info.get("block_name_prefix"))
        self.object_size = whole_number(info, "object_size", rbd.image)
        if not re.fullmatch(r"[\w.]+", self.prefix) or not self.object_size:
            raise BackyError(f"{rbd.image}: its objects are not known")

    def read(self, view: memoryview, offset: int) -> bool:
        """Fill `view` with what is at `offset`; False where something has changed since."""
        while len(view):
            number, start = divmod(offset, self.object_size)
            part = view[: self.object_size - start]
            name = f"{self.prefix}.{number:016x}"
            is_there = self.read_object(part, name, start)
            if not self.is_unchanged(name):
                return False
            if not is_there and not self.read_parent(part, offset):
                return False
            view, offset = view[len(part) :], offset + len(part)
        return True

    def start(self, *words: str) -> Program:
        words = ("rados", *self.place, *words)
        return Program(*words, patience=self.rbd.patience, CEPH_ARGS=self.rbd.ceph_args)

    def read_object(self, view: memoryview, name: str, start: int) -> bool:
        """Fill `view` from `start` of an object, with zeros behind its end; False if none."""
        with self.start("get", name, "-") as program:
            filled, rest = 0, memoryview(bytearray(min(MiB, start)))
            while filled < len(view):
                got = program.read(rest[:start] if start else view[filled : filled + MiB])
                start, filled = (start - got, filled) if start else (0, filled + got)
                if not got:
                    break
            if filled == len(view):
                return True  # what is behind is not wanted: it is ended
            view[filled:] = bytes(len(view) - filled)
            return self.is_found(program)

    @staticmethod
    def is_found(program: Program) -> bool:
        """Wait for the end; whether there was such an object."""
        try:
            program.finish()
        except ProgramFailed:
            if b"(2) No such file or directory" in program.said:
                return False
            raise
        return True

    def is_unchanged(self, name: str) -> bool:
        """Whether an object holds now what it did in the snapshot."""
        answer = bytearray(MiB)
        with self.start("listsnaps", name, "--format=json") as program:
            filled = 0
            while filled < len(answer):
                got = program.read(memoryview(answer)[filled:])
                filled += got
                if not got:
                    break
            if not self.is_found(program):
                return True
        listing = parse_json(bytes(answer[:filled]), f"the list of copies of {name}")
        clones = listing.get("clones") if isinstance(listing, dict) else None
        if not isinstance(clones, list) or not all(isinstance(one, dict) for one in clones):
            raise BackyError(f"{name}: its copies are not known")
        ids = [one.get("id") for one in clones]
        return all(one == "head" or (type(one) is int and one < self.snapshot) for one in ids)

    def read_parent(self, view: memoryview, offset: int) -> bool:
        """Where an image is a clone and has no object, there is what its parent has."""
        view[:] = bytes(len(view))
        parent = self.info.get("parent")
        if not isinstance(parent, dict) or not parent:
            return True
        overlap = min(len(view), whole_number(parent, "overlap", self.rbd.image) - offset)
        return overlap <= 0 or self.parent(parent).read(view[:overlap], offset)

    def parent(self, place: dict[str, Any]) -> Objects:
        """The snapshot that this image is a clone of."""
        words = [place.get(key) for key in ("pool", "pool_namespace", "image")]
        above = RBD("/".join(str(word) for word in words if word), self.rbd.timeout)
        snapshots, name = above.snapshots(), str(place.get("snapshot"))
        if name not in snapshots:
            raise BackyError(f"{above.image}: there is no snapshot {printable(name)}")
        return Objects(above, above.info(), snapshots[name])


class CephStill(Still):
    """A snapshot of an image."""

    in_order = True

    def __init__(self, rbd: RBD, name: str, info: dict[str, Any], stack: ExitStack) -> None:
        self.rbd, self.info = rbd, info
        self.snapshots = rbd.snapshots()
        if name not in self.snapshots:
            raise NotFound(f"{rbd.image}: there is no snapshot {name}")
        self.own = self.snapshots[name]
        size = whole_number(self.own, "size", f"{rbd.image}@{name}")
        shown = f"{rbd.image}@{name}"
        reader = PipeReader(lambda: rbd.start("export", shown, "-", stack=stack), size)
        super().__init__(shown, size, reader)
        self.snapshot = name

    def finish(self) -> None:
        self.reader.finish()

    def knows(self, revision: Revision) -> bool:
        older = self.snapshots.get(f"backy-{revision.id}", {})
        return revision.size is not None and older.get("size") == revision.size

    def is_striped(self) -> bool:
        """Whether neighbours in the image lie in several objects, and a diff is in their order."""
        return self.info.get("stripe_count", 1) != 1

    def changes(self, revision: Revision, stack: ExitStack) -> Changes | str:
        if self.is_striped():
            return "the image is striped"
        older = f"backy-{revision.id}"
        words = ["export-diff", self.name, "--from-snap", older]
        if self.prefers_whole_objects(older):
            words.append("--whole-object")
        program = self.rbd.start(*words, "-", stack=stack)
        return DiffStream(program, self.size, older, self.snapshot)

    def prefers_whole_objects(self, older: str) -> bool:
        """Whether it is cheaper to read whole objects than to ask each of them what has changed.

        It is where the image has a map of what has changed, so many objects that asking
        takes long, and few that have.
        """
        fast = "fast-diff" in self.info.get("features", ())
        if not fast or "fast diff invalid" in self.info.get("flags", ()):
            return False
        objects = self.size // max(1, whole_number(self.info, "object_size", self.name))
        if objects < MANY_OBJECTS or not self.rbd.can("export-diff", "--whole-object"):
            return False
        with suppress(BackyError):
            words = ("diff", self.name, "--from-snap", older, "--whole-object")
            return len(self.rbd.ask(list, *words)) <= objects // 200
        return False

    def sample(self, spans: Iterable[Span]) -> Iterator[tuple[int, memoryview]]:
        """The parts that can still be read; all of them, but more slowly, without `rados`."""
        spans, is_read = list(spans), False
        view = memoryview(bytearray(SAMPLE))
        try:
            objects = Objects(self.rbd, self.info, self.own)
            step = min(SAMPLE, objects.object_size)
            for start, end in spans if not self.is_striped() else ():
                for offset in range(start, end, step):
                    part = view[: min(step, end - offset)]
                    if objects.read(part, offset):
                        yield offset, part
                    is_read = True
        except BackyError as e:
            if is_read:
                raise
            log.debug("%s: cannot be read by its objects: %s", self.name, e)
        if not is_read:
            yield from self.read_through(spans)

    def read_through(self, spans: list[Span]) -> Iterator[tuple[int, memoryview]]:
        """The same from an export, which is read up to there."""
        view = memoryview(bytearray(UNIT))
        with ExitStack() as stack:
            program, at = self.rbd.start("export", self.name, "-", stack=stack), 0
            for start, end in spans:
                while at < end:
                    until = start if at < start else end
                    part = view[: min(UNIT, until - at)]
                    try:
                        program.read_whole(part)
                    except EOFError:
                        program.finish()
                        raise BackyError(f"{program.name}: its output ends too soon") from None
                    if at >= start:
                        yield at, part
                    at += len(part)


def parse_ceph_name(text: str) -> str:
    if not CEPH_NAME.fullmatch(text) or UNPRINTABLE.search(text):
        raise ValueError(f"{text!r} can be no name in Ceph")
    return text


CEPH_WORD = Kind("is a name without / and @, not beginning with -", parse_ceph_name)


@dataclass(frozen=True)
class CephSource(Source):
    """An image of a Ceph cluster."""

    image: str = ""  # POOL/IMAGE or POOL/NAMESPACE/IMAGE
    timeout: timedelta = DEFAULT_TIMEOUT

    type = "ceph-rbd"
    aliases = ("ceph",)
    keeps = True
    keys = (
        Option("pool", CEPH_WORD, None, "the pool of the image"),
        Option("namespace", CEPH_WORD, "", "its namespace in the pool"),
        Option("image", CEPH_WORD, None, "its name"),
        TIMEOUT,
    )
    spec = "POOL/IMAGE"

    @classmethod
    def parse(cls, words: str) -> dict[str, str]:
        names = words.split("/")
        try:
            pool, *namespace, image = map(parse_ceph_name, names)
            if len(namespace) > 1:
                raise ValueError("too many names")
        except ValueError:
            forms = f"{cls.spec} or {cls.spec.replace('/', '/NAMESPACE/', 1)}"
            raise ConfigError(
                f"a {cls.type} source is initialised with {forms}, not {printable(words)!r}"
            ) from None
        config = {"pool": pool, "image": image, "type": cls.type}
        return {**config, "namespace": namespace[0]} if namespace else config

    @classmethod
    def load(cls, options: dict[str, str]) -> Source:
        return cls(**cls.fields(options))

    @classmethod
    def fields(cls, options: dict[str, str]) -> dict[str, Any]:
        parts = (options["pool"], options.get("namespace", ""), options["image"])
        return {
            "image": "/".join(filter(None, parts)),
            "timeout": parse_time_span(options.get("timeout", TIMEOUT.default)),
        }

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Still]:
        rbd, own = RBD(self.image, self.timeout), f"backy-{name}"
        info = rbd.info()  # an image that is not there fails here, before anything is made
        try:
            self.create(rbd, own)
            with ExitStack() as stack:
                yield CephStill(rbd, own, info, stack)
        except BaseException:
            try:
                rbd.remove(own)
            except BackyError as e:
                if getattr(e, "code", None) != NOT_THERE:
                    log.warning("%s stays for now: %s", f"{self.image}@{own}", e)
            raise

    def create(self, rbd: RBD, name: str) -> None:
        rbd.create(name)

    @contextmanager
    def reopen(self, revision: Revision) -> Iterator[Still]:
        rbd = RBD(self.image, self.timeout)
        with ExitStack() as stack:
            yield CephStill(rbd, f"backy-{revision.id}", rbd.info(), stack)

    def snapshot_name(self, name: str) -> str:
        return f"{self.image}@backy-{name}"

    def release(self, names: Iterable[str]) -> list[str]:
        """Remove snapshots, here or where the image had another name; those that stay."""
        left: list[str] = []
        there: dict[str, dict[str, Any]] = {}
        for full, match in ((one, CEPH_SNAPSHOT.fullmatch(one)) for one in names):
            if not match:
                continue
            image, name = match.groups()
            try:
                for one in dict.fromkeys((self.image, image)):
                    rbd = RBD(one, self.timeout)
                    if one not in there:
                        there[one] = self.list_snapshots(rbd)
                    if name in there[one]:
                        rbd.remove(name)
            except BackyError as e:
                if getattr(e, "code", None) != NOT_THERE:
                    left.append(full)
                    log.warning("%s stays, which is tried again next time: %s", printable(full), e)
        return left

    def list_snapshots(self, rbd: RBD) -> dict[str, Any]:
        """Those of an image; none if there is no such image any more."""
        try:
            return rbd.snapshots()
        except ProgramFailed as e:
            if e.code == NOT_THERE:
                return {}
            raise


# ==== Flying Circus ==========================================================
#
# A ceph-rbd source whose snapshot is made by the host that runs the VM, which first
# has the guest write what it holds.  It is asked for with an entry in Consul's
# key-value store.  Consul may be as broken as it likes: then the snapshot is a plain one.

CONSUL = "127.0.0.1:8500"
REQUESTS = "snapshot/"  # where the entries are
CONSUL_LIMIT = 10.0  # seconds for one question and its answer
MOST_ANSWER = MiB


def quote_key(key: str) -> str:
    from urllib.parse import quote

    return quote(key, safe="/")


class Consul:
    """Questions to the key-value store of Consul, of which none takes long."""

    def __init__(self, address: str, token: str) -> None:
        match = re.fullmatch(r"(?:(https?)://)?([^/@\s]+?)(?::([0-9]{1,5}))?/?", address, re.ASCII)
        if not match:
            raise BackyError(f"{printable(address)!r} is no address of Consul")
        self.is_secure, self.host = match[1] == "https", match[2].strip("[]")
        self.port = int(match[3] or (443 if self.is_secure else 8500))
        self.headers = {"X-Consul-Token": token} if token else {}

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        """Status and body of the answer.  Raises BackyError, which never tells the token."""
        import http.client

        kind = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONSUL_LIMIT)
        alarm = threading.Timer(CONSUL_LIMIT, lambda: self.cut(sock))
        alarm.daemon = True
        try:
            connection.connect()
            sock = connection.sock  # which the answer takes over, if its length is not known
            alarm.start()
            connection.request(method, f"/v1/kv/{path}", body, self.headers)
            answer = connection.getresponse()
            data = answer.read(MOST_ANSWER + 1)
        except (OSError, http.client.HTTPException, ValueError) as e:
            what = printable(getattr(e, "strerror", None) or type(e).__name__)
            raise BackyError(f"Consul at {self.host}:{self.port}: {what}") from None
        finally:
            alarm.cancel()
            connection.close()
        if len(data) > MOST_ANSWER:
            raise BackyError(f"Consul at {self.host}:{self.port}: the answer is too long")
        return answer.status, data

    @staticmethod
    def cut(sock: Any) -> None:
        """End a conversation that takes too long, whatever it waits for."""
        import socket

        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def put(self, key: str, value: str) -> None:
        """Make a new entry.  Raises BackyError if there is one, or if that fails."""
        status, data = self.ask("PUT", f"{quote_key(key)}?cas=0", value)
        if status != 200 or data.strip() != b"true":
            raise BackyError(f"Consul has not taken the request (status {status})")

    def entries(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Keys and values below `prefix`, but for what is no entry."""
        import base64

        status, data = self.ask("GET", f"{quote_key(prefix)}?recurse")
        if status == 404:
            return
        listing = parse_json(data, "the answer of Consul") if status == 200 else None
        if not isinstance(listing, list):
            raise BackyError(f"Consul gives no list of requests (status {status})")
        for entry in listing:
            with suppress(TypeError, KeyError, ValueError):
                if isinstance(entry["Key"], str) and entry["Key"].startswith(prefix):
                    yield entry["Key"], base64.b64decode(entry["Value"] or "")

    def delete(self, key: str) -> None:
        status, _ = self.ask("DELETE", quote_key(key))
        if status not in (200, 404):
            raise BackyError(f"Consul has not removed a request (status {status})")


def new_uuid() -> str:
    """A random UUID of version 4, with dashes."""
    digits = list(os.urandom(16).hex())
    digits[12], digits[16] = "4", "89ab"[int(digits[16], 16) % 4]
    text = "".join(digits)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


@dataclass(frozen=True)
class FlyingCircusSource(CephSource):
    """An image whose snapshot is made together with the guest, if that answers in time."""

    vm: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""

    type = "flyingcircus"
    aliases = ()
    keys = (
        *CephSource.keys,
        Option("vm", TEXT, None, "the name of the virtual machine in Consul"),
        Option("consul_acl_token", TEXT, "", "what Consul asks for"),
        Option("consul_acl_token_file", PATH, "", "a file that has it"),
    )
    spec = "POOL/IMAGE,VM[,TOKEN]"
    pause, every, limit = 3.0, 2.0, 90.0  # seconds before and between looking, and in all

    @classmethod
    def parse(cls, words: str) -> dict[str, str]:
        image, *others = (word.strip() for word in words.split(","))
        if len(others) not in (1, 2) or not all(others):
            raise ConfigError(f"a {cls.type} source is initialised with {cls.spec}")
        config = {**super().parse(image), "vm": others[0]}
        return {**config, "consul_acl_token": others[1]} if others[1:] else config

    @classmethod
    def fields(cls, options: dict[str, str]) -> dict[str, Any]:
        return {
            **super().fields(options),
            "vm": options["vm"],
            "token": options.get("consul_acl_token", ""),
            "token_file": options.get("consul_acl_token_file", ""),
        }

    def create(self, rbd: RBD, name: str) -> None:
        try:
            if self.ask_for(rbd, name):
                return
            why = f"no snapshot came within {self.limit:g} s"
        except BackyError as e:
            if isinstance(e, ProgramFailed):
                raise
            why = str(e)
        log.warning("%s: a plain snapshot, without the guest: %s", self.image, why)
        try:
            rbd.create(name)
        except ProgramFailed as e:
            if e.code != errno.EEXIST:  # it has come after all
                raise

    def ask_for(self, rbd: RBD, name: str) -> bool:
        """Whether the snapshot was made on request; the request is gone in any case."""
        consul = Consul(os.environ.get("CONSUL_HTTP_ADDR") or CONSUL, self.load_token())
        import json

        key = REQUESTS + new_uuid()
        try:
            consul.put(key, json.dumps({"vm": self.vm, "snapshot": name}))
            until = time.monotonic() + self.limit
            time.sleep(self.pause)
            while time.monotonic() < until:
                if name in rbd.snapshots():
                    return True
                time.sleep(self.every)
            return False
        finally:
            self.clear(consul, key)

    def load_token(self) -> str:
        token = self.token
        if self.token_file and not token:
            with explain(f"cannot read {printable(self.token_file)}"):
                fd = os.open(self.token_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    token = read_limited(fd, 4 * KiB).decode("ascii", "replace").strip()
                finally:
                    close(fd)
        if not re.fullmatch("[!-~]*", token, re.ASCII):
            raise BackyError("the token for Consul has characters that cannot be sent")
        return token

    def clear(self, consul: Consul, key: str) -> None:
        """Remove our request, and what earlier runs left for this VM; all else stays."""
        try:
            consul.delete(key)
            for other, value in consul.entries(REQUESTS):
                if self.is_ours(value):
                    consul.delete(other)
        except BackyError as e:
            log.warning("%s: requests for snapshots may be left: %s", self.image, e)

    def is_ours(self, value: bytes) -> bool:
        try:
            request = parse_json(value, "a request")
            name = request["snapshot"]
            return request["vm"] == self.vm and name.startswith("backy-")
        except (BackyError, TypeError, KeyError, AttributeError):
            return False


# ==== Plug-ins ===============================================================
#
# A source that is a program of its own, called with a verb and JSON; backy.conf(5) has
# the protocol.  What it says of changes is a hint: blocks are read as a whole, and some
# that it does not name are compared each time.

MOST_EXTENTS = 16 * MiB  # bytes of JSON
PROTOCOL = 1


class ListedStream(PipedChanges):
    """Extents that a plug-in prints one behind the other."""

    def __init__(self, program: Program, size: int, spans: list[Span]) -> None:
        self.spans = spans
        super().__init__(program, size)

    def parse(self) -> Iterator[tuple[int, int, bool]]:
        for start, end in self.spans:
            yield start, end, False


class PlugIn:
    """The calls of one program."""

    def __init__(self, source: ExecSource, name: str) -> None:
        self.source, self.name = source, name
        self.shown = printable(source.program)

    def words(self, verb: str) -> tuple[str, str]:
        return self.source.program, verb

    def request(self, **more: Any) -> bytes:
        import json

        options = dict(self.source.options_given)
        return json.dumps(
            {"version": PROTOCOL, "options": options, "revision": self.name, **more}
        ).encode()

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        limit = self.source.timeout.total_seconds()
        words = self.words(verb)
        data = run_program(*words, limit=limit, stdin=self.request(**more), most=MOST_EXTENTS)
        answer = parse_json(data or b"{}", f"the answer of {self.shown} to {verb}")
        if isinstance(answer, list):
            answer = {"extents": answer}
        if not isinstance(answer, dict):
            raise BackyError(f"{self.shown}: its answer to {verb} is no mapping")
        return answer

    def start(self, spans: list[Span]) -> Program:
        """Have the bytes of these parts printed."""
        extents = [{"offset": start, "length": end - start} for start, end in spans]
        patience = self.source.timeout.total_seconds()
        return Program(*self.words("read"), patience=patience, stdin=self.request(extents=extents))


def decode_extents(listing: object, size: int, what: str) -> list[tuple[int, int]]:
    """(offset, length) of a list of mappings, cut at the end of the image.  Raises BackyError."""
    extents = []
    for one in listing if isinstance(listing, list) else [None]:
        if not isinstance(one, dict):
            raise BackyError(f"{what}: its extents are no list of mappings")
        offset, length = (whole_number(one, key, what) for key in ("offset", "length"))
        if offset < size and length:
            extents.append((offset, min(length, size - offset)))
    return extents


class PlugInStill(Still):
    """What a plug-in holds still: a path, or bytes that it prints when it is asked."""

    def __init__(
        self, plug_in: PlugIn, answer: dict[str, Any], tells: bool, stack: ExitStack
    ) -> None:
        self.plug_in, self.tells = plug_in, tells
        path, shown = answer.get("path"), plug_in.shown
        if isinstance(path, str) and path and "\0" not in path:
            with explain(f"{shown}: cannot open {printable(path)}"):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                stack.callback(close, fd)
                if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
                    raise BackyError(f"{shown}: {printable(path)} is neither a file nor a device")
                size = os.lseek(fd, 0, os.SEEK_END)
            super().__init__(printable(path), size, Reader(fd, size, True))
            return
        size = whole_number(answer, "size", shown)
        self.in_order = True

        def start() -> Program:
            return stack.enter_context(plug_in.start([(0, size)] if size else []))

        super().__init__(shown, size, PipeReader(start, size))

    def finish(self) -> None:
        if self.in_order:
            self.reader.finish()

    def knows(self, revision: Revision) -> bool:
        return self.tells

    def changes(self, revision: Revision, stack: ExitStack) -> Changes | str:
        try:
            answer = self.plug_in.ask("changes", parent=revision.id)
            if "extents" not in answer:
                return printable(answer.get("unknown") or "the plug-in does not know")[:500]
            extents = decode_extents(answer["extents"], self.size, self.plug_in.shown)
        except BackyError as e:
            return str(e)
        if not self.in_order:
            return ListedChanges(self.reader, whole_blocks(extents, self.size))
        spans = whole_blocks(extents, self.size)
        program = stack.enter_context(self.plug_in.start(spans))
        return ListedStream(program, self.size, spans)

    def sample(self, spans: Iterable[Span]) -> Iterator[tuple[int, memoryview]]:
        if not self.in_order:
            yield from super().sample(spans)
            return
        spans, view = list(spans), memoryview(bytearray(UNIT))
        with self.plug_in.start(spans) as program:
            for start, end in spans:
                for offset in range(start, end, UNIT):
                    part = view[: min(UNIT, end - offset)]
                    try:
                        program.read_whole(part)
                    except EOFError:
                        program.finish()
                        raise BackyError(f"{program.name}: its output ends too soon") from None
                    yield offset, part
            program.finish()


@dataclass(frozen=True)
class ExecSource(Source):
    """A source of any other kind, by a program that knows it."""

    program: str = ""
    timeout: timedelta = DEFAULT_TIMEOUT
    options_given: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    type = "exec"
    keeps = True
    keys = (TIMEOUT, Option("program", PATH, None, "the plug-in"))

    @classmethod
    def options_for(cls, names: Iterable[str]) -> tuple[Option, ...]:
        """Any further key is for the plug-in."""
        known = cls.options()
        others = set(names) - {option.name for option in known}
        return (*known, *(Option(name, TEXT) for name in sorted(others)))

    @classmethod
    def parse(cls, words: str) -> dict[str, str]:
        program, *others = (word.strip() for word in words.split(","))
        pairs = [other.partition("=") for other in others]
        if (
            not program
            or UNPRINTABLE.search(words)
            or not all(key and is_ for key, is_, _ in pairs)
        ):
            raise ConfigError(f"an {cls.type} source is initialised with PROGRAM[,KEY=VALUE,...]")
        options = {key.strip(): value.strip() for key, _, value in pairs}
        return {**options, "program": os.path.abspath(program), "type": cls.type}

    @classmethod
    def load(cls, options: dict[str, str]) -> Source:
        known = {option.name for option in cls.options()}
        others = ((key, value) for key, value in sorted(options.items()) if key not in known)
        timeout = parse_time_span(options.get("timeout", TIMEOUT.default))
        return cls(os.path.abspath(options["program"]), timeout, tuple(others))

    @contextmanager
    def snapshot(self, name: str) -> Iterator[Still]:
        plug_in = PlugIn(self, name)
        tells = plug_in.ask("capabilities").get("changes") is True
        is_kept = False
        try:
            answer = plug_in.ask("snapshot")
            with ExitStack() as stack:
                yield PlugInStill(plug_in, answer, tells, stack)
            is_kept = tells
        finally:
            if not is_kept:
                self.release_one(name)

    def release_one(self, name: str) -> bool:
        try:
            PlugIn(self, name).ask("release")
        except BackyError as e:
            log.warning("%s stays, which is tried again next time: %s", printable(name), e)
            return False
        return True

    def snapshot_name(self, name: str) -> str:
        return name

    def release(self, names: Iterable[str]) -> list[str]:
        return [one for one in names if REVISION_ID.fullmatch(one) and not self.release_one(one)]


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
    turns: Turns | None = None,
) -> None:
    """Call `work` for these pieces of an image of `size` bytes, and `look` now and then."""
    with Progress(label, size) as progress:

        def piece(offset: int, length: int, buffers: Buffers) -> None:
            progress.reach(offset)
            work(offset, length, buffers)

        def tick() -> None:
            progress.tick()
            look()

        work_through(pieces, piece, tick, workers_for(size), turns)


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
            view[:] = HOLE[: len(view)]
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
                repository.mark_damaged(revision, image.damaged)


def copy_image(repository: Repository, image: CheckedImage, fd: int) -> bool:
    """Make `fd` a clone of the image, or a sparse copy where extents cannot be shared; which it is.

    Raises OSError when more turns out to be damaged than was known: what is copied
    must not be worse than what it replaces.
    """
    with suppress(CloneUnsupported):
        clone_file(image.fd, fd)
        return True
    resize(fd, image.size)
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
    if length == BLOCK and found[0] >= 0:
        with suppress(CloneUnsupported):
            clone_range(found[0], found[1], length, fd, offset)
            return True
    write_pages(fd, block, offset, image.size)
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
) -> set[int]:
    """Build the new image and let it take the name of the old; the offsets of the blocks healed."""
    if not any(can_heal(image, donors, offset) for offset in offsets):
        return set()
    with replacement(repository.dir_fd, image.revision.id) as (fd, take_name):
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
            take_name()
        return healed


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
            healed = heal_clone(repository, image, donors, offsets)
    with repository.metadata_lock(revision.id):
        now = repository.current(revision)
        left = [at for at in block_offsets(now.damaged) if at not in healed]
        damaged = join_ranges((at, min(BLOCK, image.size - at)) for at in left)
        trust = Trust.DISTRUSTED if damaged or now.by_hand else Trust.TRUSTED
        tried = donors.newest if damaged and not set(left).difference(offsets) else 0
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
            mine, theirs = new[at : at + DIGEST], (old and old[at : at + DIGEST]) or None
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
        target, dir_fd = f"{revision.id}.sums", repository.dir_fd
        if file_type(dir_fd, target) not in (0, stat.S_IFREG):
            return None  # not ours, to be left alone
        fd, take_name = stack.enter_context(replacement(dir_fd, target))
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
        take_name()
        return join_ranges((at, min(BLOCK, image.size - at)) for at in wrong)


def repair_sums(repository: Repository, revision: Revision) -> None:
    """Make damaged digests anew, and mark what that shows of the image."""
    try:
        damaged = rebuild_sums(repository, revision)
        if damaged is None:
            log.warning("%s: digests of %s cannot be made anew", repository.name, revision.id)
            return
        log.warning("%s: digests of %s are made anew", repository.name, revision.id)
        if damaged:
            tell_damage(repository, revision, damaged)
            repository.mark_damaged(revision, damaged)
        with repository.metadata_lock(revision.id):
            repository.change(revision, sums_damaged=False, heal_tried=0)
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
    the digests found are not to be relied on.  With `changes` nothing else of the
    source is read.
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
        changes: Changes | None = None,
    ) -> None:
        self.still, self.old, self.writer, self.sums = still, old, writer, sums
        self.changes = changes
        self.named: set[int] = set()  # the parts of the size of a sample that they touch
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
        self.turns: Turns | None = None
        if (changes or still).in_order:
            self.turns = Turns(self.take, changes.abort if changes else still.reader.abort)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The units that hold something in the source, in the image or in the digests."""
        ends = [(block * BLOCK, block * BLOCK + 1) for block in sorted(self.resized)]
        if self.changes:
            return units(self.still.size, self.changes.extents(), ends)
        sums = [] if self.fresh else self.sums.extents()
        return units(self.still.size, self.still.reader.extents(), self.old.extents(), ends, sums)

    def unit(self, offset: int, length: int, buffers: Buffers) -> None:
        self.reached = max(self.reached, offset)
        if self.is_resumed and self.is_done(offset, length, buffers):
            return
        if not self.turns:
            self.take(offset, length, buffers)
        digests = [bytes(DIGEST)] * -(-length // BLOCK)
        if not self.fresh:
            digests = self.sums.read(offset, length)
        if self.changes:
            new, spans, lost = self.patch(buffers, offset, length, digests)
        else:
            new = [block_digest(buffers.new[start:end]) for _, start, end in blocks_of(length)]
            spans = [(0, length)]
            if self.by_digest:
                spans = join_blocks(length, lambda block: new[block] != digests[block])
            lost = [] if self.fresh else self.read_old(buffers, offset, length, spans)
        is_whole = not (self.changes or self.fresh or lost)
        if not spans or (is_whole and new == digests and buffers.equal(0, length)):
            self.mark_trail(offset, new, 0)
            return
        runs = differing_runs(buffers, spans, self.fresh, lost)
        changed = {
            block for start, end, _ in runs for block in range(start // BLOCK, -(-end // BLOCK))
        }
        if self.changes:  # nobody has read back what the change of size has made of these
            changed |= {at for at in range(len(new)) if offset // BLOCK + at in self.resized}
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

    def take(self, offset: int, length: int, buffers: Buffers) -> None:
        """Read what the source has there, or what has changed there."""
        if self.changes:
            buffers.covered = self.changes.read(buffers.new, offset, length)
        else:
            self.read_source(buffers.new, offset, length)

    def patch(
        self, buffers: Buffers, offset: int, length: int, digests: list[bytes]
    ) -> tuple[list[bytes], list[Span], list[int]]:
        """Lay what has changed over the old image: digests, spans to compare, lost old pages.

        Whole blocks are made of it, so each block that is touched must be what its
        digest says, or rot would get a digest of its own.
        """
        covered = buffers.covered
        self.named.add(offset // SAMPLE)
        first = offset // BLOCK
        touched = {
            block for start, end in covered for block in range(start // BLOCK, -(-end // BLOCK))
        }
        touched |= {block - first for block in self.resized if 0 <= block - first < len(digests)}
        spans = join_blocks(length, lambda block: block in touched)
        lost = self.read_old(buffers, offset, length, spans)
        ends = [0, *(end for _, end in covered)]
        gaps = [
            gap for gap in zip(ends, [*(start for start, _ in covered), length]) if gap[0] < gap[1]
        ]
        new = list(digests)
        for block, start, end in blocks_of(length):
            if block not in touched:
                continue
            kept = [(max(a, start), min(b, end)) for a, b in gaps if a < end and b > start]
            for a, b in kept:
                buffers.new[a:b] = buffers.old[a:b]
            new[block] = block_digest(buffers.new[start:end])
            is_comparable = first + block not in self.resized
            if kept and is_comparable and block_digest(buffers.old[start:end]) != digests[block]:
                self.look_at_parent(buffers.old[start:end], offset + start, digests[block])
                raise Distrusted(
                    f"the previous image is damaged at offset {offset + start}, "
                    "and the source has only changed a part of that block",
                    "the next backup reads all of the source",
                )
        return new, spans, lost

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


def choose_parent(
    repository: Repository, stack: ExitStack, knows: Callable[[Revision], bool]
) -> Base | None:
    """The newest good revision that the source knows, else the newest good one, else any.

    Its files are held open.
    """
    usable = [revision for revision in repository.complete if not revision.problem]
    good = [revision for revision in usable if revision.is_good]
    good.sort(key=knows)  # stable: in each half the newest is last
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


class Snapshots:
    """`.snapshots`: what the snapshots are called that were made for this directory.

    A name is noted before its snapshot is made, and stays until that is gone.  Nothing
    else is ever removed, be it named like ours or not.
    """

    FILE = ".snapshots"

    def __init__(self, repository: Repository, source: Source) -> None:
        self.repository, self.source = repository, source
        try:
            text = read_small(repository.dir_fd, self.FILE).decode("utf-8", "replace")
            self.names = [
                line for line in text.split("\n") if line and not UNPRINTABLE.search(line)
            ]
        except FileNotFoundError:  # a directory of backy 2.x has one for each revision at most
            self.names = [source.snapshot_name(one.id) for one in repository.revisions]
        except OSError as e:
            raise BackyError(f"{repository.name}: cannot read {self.FILE}: {e.strerror}") from e

    def note(self, name: str) -> None:
        self.save([*self.names, self.source.snapshot_name(name)])

    def save(self, names: list[str]) -> None:
        self.names = list(dict.fromkeys(names))
        with explain(f"{self.repository.name}: cannot write {self.FILE}"):
            text = "".join(f"{name}\n" for name in self.names)
            replace_file(self.repository.dir_fd, self.FILE, text.encode("utf-8"), 0o600)

    def release(self, keep: str) -> None:
        """Remove all but that of revision `keep`; what cannot be removed is tried next time."""
        kept = self.source.snapshot_name(keep) if keep else ""
        names = [name for name in self.names if name != kept]
        left = self.source.release(names)
        self.save([name for name in self.names if name == kept or name in left])


def choose_sample(size: int, touched: set[int], changed: int) -> list[Span]:
    """The 4 MiB that are compared with the source: at random, and the short piece at the end.

    They are looked for where nothing has changed.  1 % of the image is enough, and
    less where that were much beside the `changed` bytes which had to be read.
    """
    import random

    whole = size // SAMPLE
    others = [number for number in range(whole) if number not in touched] or list(range(whole))
    most = max(1, min(whole // 100, changed * 2 // 5 // SAMPLE))
    chosen = random.SystemRandom().sample(others, min(most, len(others)))
    spans = [(number * SAMPLE, (number + 1) * SAMPLE) for number in sorted(chosen)]
    return spans if size % SAMPLE == 0 else [*spans, (whole * SAMPLE, size)]


class Backup:
    """One run, from the lock to `last`."""

    def __init__(
        self, repository: Repository, job: Job, tags: tuple[str, ...], resume: bool = True
    ) -> None:
        self.repository, self.job, self.tags, self.resume = repository, job, tags, resume
        self.parent_damage: tuple[tuple[int, int], ...] = ()
        self.name = repository.name
        self.why_all = ""  # why all of a source is read that could say what has changed
        self.sampled = 0  # bytes that were compared with the source once more
        self.is_sampled = True  # whether these were all that should have been

    def run(self) -> Revision:
        """Make a revision and return it.

        Raises BackyError, and nothing is left then; after a signal or a crash what
        there is stays for the next run, which goes on with it if the source is the
        same.
        """
        repository = self.repository
        started = time.monotonic()
        source, name = self.job.source, new_id()
        if source.keeps:
            self.snapshots = Snapshots(repository, source)
            self.snapshots.note(name)
        with ExitStack() as stack, source.snapshot(name) as still:
            with repository.metadata_lock():
                unfinished = repository.find_unfinished(still.state) if self.resume else None
                repository.sweep(keep=unfinished.id if unfinished else "")
                base = choose_parent(repository, stack, still.knows)
                name = unfinished.id if unfinished else name
                revision = self.plan(name, base, still.state)
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

    def plan(self, name: str, base: Base | None, state: str) -> Revision:
        """The new revision, later than all others whatever the clock says."""
        revisions = self.repository.revisions
        now = datetime.now(UTC)
        newest = max((revision.clock for revision in revisions), default=0)
        revision = Revision(
            id=name,
            timestamp=now,
            clock=max(newest + 1, epoch_microseconds(now)),
            tags=self.tags,
            parent=base.revision.id if base else None,
            source_state=state,
        )
        if newest > epoch_microseconds(now + FUTURE):
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
            resized = base is not None and base.revision.size != still.size
            changes = self.find_changes(still, base, cloned and not rehash, stack)
            if changes and resized:
                self.check_edge(base, still.size)
            with explain(f"{self.name}: cannot prepare image"):
                # with changes alone nobody would write again what is cut off with a last page
                (os.ftruncate if changes else resize)(image_fd, still.size)
                sums = Sums(sums_fd, still.size)
                sums.prepare()
                # a second descriptor, for reading past the cache
                old_fd = open_regular(self.repository.dir_fd, revision.id)
                stack.callback(close, old_fd)
            reader = Reader(old_fd, still.size, True)
            update = Update(
                still,
                reader,
                Writer(image_fd, still.size),
                sums,
                fresh=not cloned,
                by_digest=cloned and not rehash and self.job.verify is not VerifyMode.FULL,
                rehash=rehash,
                resized_from=base.revision.size if base and resized else None,
                changes=changes,
            )
            update.is_resumed = is_resumed
            update.trail = Trail(take(f"{revision.id}.part", stack))
            is_differential = bool(base and cloned) and not self.why_all
            how = "differential" if is_differential else "full"
            why = f" ({self.why_all})" if self.why_all else ""
            log.info("%s: performing %s backup%s", self.name, how, why)
            try:
                self.transfer(update)
            finally:
                self.parent_damage = join_ranges(update.parent_damage)
                self.distrust_parent(base, self.parent_damage)
            digest = self.settle(image_fd, sums_fd, sums)
            proven = self.prove(update, reader, digest)
            if update.changes:
                proven += self.compare_sample(update, reader)
            extents = self.extents_when_written(base) if base and cloned else 0
            with suppress(OSError):
                extents = extents or count_extents(image_fd)
            if is_resumed:
                kept = format_size(update.bytes_kept)
                log.info("%s: %s of the interrupted run were sound and kept", self.name, kept)
            stats = {**revision.stats, **self.figures(update, proven)}
            everything = not update.by_digest
            return replace(
                revision,
                size=still.size,
                digest=digest,
                bytes_written=update.writer.bytes_written + update.bytes_kept_written,
                trust=Trust.VERIFIED if everything else Trust.TRUSTED,
                verified=datetime.now(UTC) if everything else None,
                image_state=state_of_inode(image_fd) if everything else "",
                stats={**stats, "extents_when_written": extents},
            )

    def figures(self, update: Update, proven: int) -> dict[str, Any]:
        """How the new image was proven, and by how many bytes; how many came from the source."""
        size, source = update.still.size, update.changes or update.still.reader
        how = "written" if update.by_digest else "full"
        if update.changes:
            how = "sample" if self.is_sampled else "partial"
        return {
            "verification": how,
            "bytes_verified": min(proven, size) if update.by_digest else size,
            "bytes_read": source.bytes_read,
        }

    def find_changes(
        self, still: Still, base: Base | None, is_comparable: bool, stack: ExitStack
    ) -> Changes | None:
        """What the source says has changed; None, and `why_all`, where all must be read.

        `is_comparable`: the image is a clone of `base`, and has digests to rely on.
        """
        if not self.job.source.keeps:
            return None
        if self.job.full_always:
            why: Changes | str = "full-always"
        elif self.job.verify is not VerifyMode.SAMPLE:
            why = f"verify: {self.job.verify.value}"
        elif base is None:
            why = "no parent"
        elif not base.revision.is_good:
            why = "the parent is distrusted"
        elif not still.knows(base.revision):
            why = "no good revision has a snapshot"
        elif base.sums_fd is None:
            why = "the parent has no sound digests"
        elif not is_comparable:
            why = "the image cannot be cloned, or is written anew"
        else:
            why = still.changes(base.revision, stack)
        if isinstance(why, Changes):
            return why
        self.why_all = why or "what has changed is not known"
        return None

    def check_edge(self, base: Base, size: int) -> None:
        """Raise Distrusted unless the parent's block is sound where the image ends or ended."""
        old = base.revision.size or 0
        offset = min(old, size) // BLOCK * BLOCK
        length = min(BLOCK, old - offset)
        if not length:
            return
        view = memoryview(bytearray(length))
        with explain(f"{self.name}: cannot read the parent at offset {offset}"):
            lost = Reader(base.image_fd, old, False).salvage(view, offset, length)
            digest = Sums(base.sums_fd, old).read(offset, length)[0]
        if lost or block_digest(view) != digest:
            self.distrust_parent(base, ((offset, length),))
            raise Distrusted(f"{self.name}: the parent is damaged at offset {offset}")

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
        number = base.revision.stat("extents_when_written")
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
                pass_over(self.name, still.size, update.pieces(), update.unit, look, update.turns)
                still.check()
            update.changes.finish() if update.changes else still.finish()
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

    def compare_sample(self, update: Update, reader: Reader) -> int:
        """Read parts of the source anew, hold the image against them; how many bytes that were.

        A difference says that the source was wrong about what has changed: then
        nothing that it knows of is a parent any more.
        """
        size, differing = update.still.size, -1
        deadline = time.monotonic() + self.job.sample_time.total_seconds()
        spans = choose_sample(size, update.named, update.changes.bytes_read)
        wanted = sum(end - start for start, end in spans)
        try:
            with Progress(f"{self.name} (comparing a sample)", wanted) as progress:
                for _ in range(3):  # others, for those which have changed in the source since
                    differing = self.compare_parts(update.still, reader, spans, deadline, progress)
                    missing = wanted - self.sampled
                    if differing >= 0 or missing <= 0 or time.monotonic() > deadline:
                        break
                    spans = choose_sample(size - size % SAMPLE, update.named, missing * 5 // 2)
        except (BackyError, OSError, EOFError) as e:
            what = e if isinstance(e, BackyError) else f"{update.still.name}: {e or 'it ends'}"
            log.warning("%s: the sample cannot be read: %s", self.name, what)
        if differing >= 0:
            self.distrust_known(update.still)
            raise Distrusted(
                f"{self.name}: verification failed: the source has other bytes than the image "
                f"between offset {differing} and {min(differing + UNIT, size)}, which it has not "
                "named as changed",
                "what it knows of is distrusted now, and the next backup reads all of it",
            )
        self.is_sampled = self.sampled >= wanted
        sampled = f"{format_size(self.sampled)} of {format_size(wanted)}"
        if not self.is_sampled:
            log.warning("%s: partly verified: only %s of the sample", self.name, sampled)
        return self.sampled

    def compare_parts(
        self, still: Still, reader: Reader, spans: list[Span], deadline: float, progress: Progress
    ) -> int:
        """Where the source and what the disk holds differ first in these parts; -1 if nowhere."""
        view = memoryview(mmap.mmap(-1, UNIT))
        for offset, part in still.sample(spans):
            for at in range(0, len(part), UNIT):
                piece = part[at : at + UNIT]
                if reader.salvage(view, offset + at, len(piece)) or view[: len(piece)] != piece:
                    return offset + at
            self.sampled += len(part)
            progress.reach(self.sampled)
            progress.tick()
            if time.monotonic() > deadline:
                break
        return -1

    def distrust_known(self, still: Still) -> None:
        """Distrust each revision from which the source could be asked for changes."""
        try:
            with self.repository.metadata_lock():
                for revision in self.repository.complete:
                    if revision.is_good and still.knows(revision):
                        self.repository.change(revision, trust=Trust.DISTRUSTED, sample=None)
                        log.warning("%s: %s is now distrusted", self.name, revision.id)
        except BackyError as e:
            log.warning("%s (this is not recorded)", e)

    def distrust_parent(self, base: Base | None, damaged: tuple[tuple[int, int], ...]) -> None:
        """Say that the parent is not what its digests say; our copy of it is written anew."""
        if base is None or not damaged:
            return
        name = base.revision.id
        for line in describe_ranges(damaged):
            log.warning("%s: parent %s is damaged: %s", self.name, name, line)
        log.warning("%s: parent %s is now distrusted", self.name, name)
        try:
            self.repository.mark_damaged(base.revision, damaged)
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
        if self.job.source.keeps:
            try:
                self.snapshots.release("" if self.job.full_always else revision.id)
            except BackyError as e:
                log.warning("%s", e)
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
        is_good = image.revision.is_good  # only one whole run ends a distrust
        goes_on = is_good and part.of == 1 and scope.deadline != math.inf
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
        if offset < before.start:  # that was another run
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
        self.unrecorded: set[str] = set()  # ids of what could not be marked, so nobody heals it

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
                self.mark(revision, sums_damaged=True)
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
            values = {"seen_to": run.reached} if image.revision.is_good else {}
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
                now = self.repository.current(revision)
                known = replace(revision, trust=now.trust, damaged=now.damaged, by_hand=now.by_hand)
                is_bad = values.get("trust") is Trust.DISTRUSTED or "sums_damaged" in values
                if not is_bad and known != revision:
                    log.warning("%s: %s was marked meanwhile", self.repository.name, revision.id)
                    return now
                if values.get("trust") is Trust.DISTRUSTED:
                    values["damaged"] = join_ranges([*values.get("damaged", ()), *now.damaged])
                    values["heal_tried"] = 0
                if "sums_damaged" in values:
                    values["trust"] = unverified(now)
                return self.repository.change(revision, **values)
        except BackyError as e:
            log.warning("%s (the result is not recorded)", e)
            self.unrecorded.add(revision.id)
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
            return
        now = {revision.id: revision for revision in repository.complete}
        self.results = [
            result
            if result.revision.id in self.unrecorded
            else self.after_repair(result, now.get(result.revision.id, result.revision))
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
    with ExitStack() as stack, source.reopen(revision) as still:
        image = CheckedImage(repository, revision, stack)
        if still.size != image.size:
            sizes = f"the source has {still.size} bytes, {revision.id} has {image.size}"
            raise Distrusted(f"{repository.name}: {sizes}")
        differing: list[tuple[int, int]] = []
        count, lock = 0, threading.Lock()

        def take(offset: int, length: int, buffers: Buffers) -> None:
            try:
                still.reader.read(buffers.old, offset, length)
            except EOFError:
                still.check()
                raise OSError(errno.EIO, "the source ends before its end") from None

        turns = Turns(take, still.reader.abort) if still.in_order else None

        def compare(offset: int, length: int, buffers: Buffers) -> None:
            nonlocal count
            if not turns:
                take(offset, length, buffers)
            image.read(buffers.new, offset, length)
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
            label = f"{repository.name} (comparing)"
            pass_over(label, image.size, pieces, compare, turns=turns)
        still.check()
        still.finish()
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
# compares the bytes before it lets go of one copy.  The extent of the newest
# revision is the one that stays, for a fresh image lies in few pieces; who shared
# an extent that goes, goes along, or nothing would be free.


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


def read_anew(fd: int, offset: int, length: int) -> None:
    """Let what the kernel compares come from the medium, for each page of which it would wait."""
    drop_cache(fd, offset, length)
    read_ahead(fd, offset, length)


def places_by_block(found: list[tuple[int, int, int]]) -> dict[int, list[tuple[int, int, int]]]:
    blocks: dict[int, list[tuple[int, int, int]]] = {}
    for logical, physical, length in found:
        for at in block_offsets([(logical, length)]):
            start, end = max(at, logical), min(at + BLOCK, logical + length)
            blocks.setdefault(at, []).append((start, physical + start - logical, end - start))
    return blocks


def same_blocks(
    blocks: Iterable[int],
    one: list[tuple[int, int, int]] | None,
    other: list[tuple[int, int, int]] | None,
) -> set[int]:
    """Those of the blocks at these offsets that lie in the same places by both lists."""
    if one is None or other is None:
        return set()
    if one == other:
        return set(blocks)
    ours, theirs = places_by_block(one), places_by_block(other)
    return {at for at in blocks if ours.get(at) == theirs.get(at)}


found_block = struct.Struct(">32sIQ")  # digest, number of the image, offset
found_match = struct.Struct(">IQIQ")  # image, offset; and the other image, offset


class Dedup:
    """One run over all images of some jobs; memory does not grow with them."""

    FILES = 200  # images open at a time, with their digests; others wait to be opened again
    REGION = 4 * GiB

    def __init__(self, repositories: list[Repository], dry_run: bool) -> None:
        self.images = [
            (repository, revision)
            for repository in repositories
            for revision in reversed(repository.complete)
            if revision.is_good and revision.digest
        ]
        self.dry_run = dry_run
        self.opened: dict[int, tuple[CheckedImage, ExitStack]] = {}
        self.blocks = self.shared = self.damaged = 0
        self.found = 0  # bytes of equal blocks
        self.moved: set[int] = set()  # the images that may lie on other extents now
        self.refused: set[int] = set()  # the images that could not be opened

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
            with Progress("sharing", self.found) as progress:
                for records in matches.sorted():
                    for run in self.runs(records):
                        self.share_run(*run)
                        progress.reach(progress.position + run[-1])
                        progress.tick()

    def forget_state(self, number: int) -> None:
        """Nobody has verified the extents on which this image will lie; said before it moves."""
        repository, revision = self.images[number]
        if number not in self.moved:
            with repository.metadata_lock(revision.id):
                if repository.current(revision).image_state:
                    repository.change(revision, image_state="")
            self.moved.add(number)

    def is_first(self, number: int) -> bool:
        """Whether this image is the newest of its job."""
        return number == 0 or self.images[number][0] is not self.images[number - 1][0]

    def collect(self, digests: Buckets, buckets: int) -> None:
        """Note every block that an image does not share with the one before it."""
        before: CheckedImage | None = None
        for number, (repository, revision) in enumerate(self.images):
            image = self.open(number)
            if image is None or image.sums is None:
                continue
            if self.is_first(number):
                before = None
            with explain(f"{repository.name}: cannot read digests of {revision.id}"):
                for offset, length in units(image.size, image.sums.extents()):
                    shared = self.shared_blocks(image, before, offset, length)
                    for block, digest in enumerate(image.sums.read(offset, length)):
                        at = offset + block * BLOCK
                        if digest == bytes(DIGEST) or at + BLOCK > image.size:
                            continue
                        self.blocks += 1
                        if at not in shared:
                            record = found_block.pack(digest, number, at)
                            digests.add(int.from_bytes(digest[:4], "big") % buckets, record)
            before = image

    @staticmethod
    def shared_blocks(
        image: CheckedImage, other: CheckedImage | None, offset: int, length: int
    ) -> set[int]:
        """The offsets of the blocks of a unit that lie in the same places in both."""
        if other is None:
            return set()
        mine, theirs = (places(one.fd, offset, offset + length) for one in (image, other))
        return same_blocks(range(offset, offset + length, BLOCK), mine, theirs)

    def match(self, records: list[bytes], matches: Buckets) -> None:
        """Of equal blocks the first is the one that the others are to share."""
        first: tuple[bytes, int, int] | None = None
        for record in records:
            digest, number, offset = found_block.unpack(record)
            if first is None or digest != first[0]:
                first = digest, number, offset
                continue
            self.found += BLOCK
            region = (number * 31 + offset // self.REGION) % 256  # few files; sorting does the rest
            matches.add(region, found_match.pack(number, offset, first[1], first[2]))

    @staticmethod
    def runs(records: list[bytes]) -> Iterator[tuple[int, int, int, int, int]]:
        """Image, offset, other image, other offset, length: neighbours that belong together."""
        run: tuple[int, int, int, int, int] | None = None
        for record in records:
            number, offset, other, place = found_match.unpack(record)
            if run and run[4] < 16 * MiB:
                follows = run[0], run[1] + run[4], run[2], run[3] + run[4]
                if follows == (number, offset, other, place):
                    run = (*run[:4], run[4] + BLOCK)
                    continue
            if run:
                yield run
            run = number, offset, other, place, BLOCK
        if run:
            yield run

    def share_run(self, number: int, offset: int, other: int, place: int, length: int) -> None:
        image, origin = self.open(number), self.open(other)
        if image is None or origin is None:
            return
        mine = places(image.fd, offset, offset + length)
        theirs = places(origin.fd, place, place + length)
        if mine is not None and theirs is not None:
            moved = [(at - place + offset, physical, size) for at, physical, size in theirs]
            if mine == moved:
                return
        try:
            if self.dry_run:  # no bytes: only to know whether it could be done
                dedupe_range(origin.fd, place, 0, image.fd, offset)
                self.shared += length
                return
            read_anew(origin.fd, place, length)
            self.shared += self.share_range(number, offset, other, place, length)
            self.take_along(number, mine, other, place - offset)
        except OSError as e:
            if e.errno in (*NOT_SUPPORTED, errno.EXDEV):
                raise CloneUnsupported(f"cannot share extents: {e.strerror}") from e
            log.warning("%s: %s", image.revision.id, e.strerror)
        except BackyError as e:  # it has just been removed, or we may not write there
            log.warning("%s", e)
        finally:
            drop_cache(origin.fd, place, length)

    def take_along(
        self, number: int, left: list[tuple[int, int, int]] | None, other: int, shift: int
    ) -> None:
        """Let older revisions that had the same extents as `number` share the new ones as well."""
        blocks = set(block_offsets((one[0], one[2]) for one in left or ()))
        while blocks and number + 1 < len(self.images) and not self.is_first(number + 1):
            number += 1
            image = self.open(number)
            if image is None or self.open(other) is None:
                return
            theirs = places(image.fd, min(blocks), max(blocks) + BLOCK)
            blocks = same_blocks(blocks, left, theirs)
            for at, length in join_ranges((at, BLOCK) for at in blocks):
                if at + length <= image.size:
                    self.share_range(number, at, other, at + shift, length)

    def share_range(self, number: int, offset: int, other: int, place: int, length: int) -> int:
        """Let one range share the other's extents; how many bytes of it now do."""
        image_fd = self.opened[number][0].fd
        self.forget_state(number)
        try:
            read_anew(image_fd, offset, length)
            return self.share_equal(number, offset, other, place, length)
        finally:
            drop_cache(image_fd, offset, length)

    def share_equal(self, number: int, offset: int, other: int, place: int, length: int) -> int:
        """Share all but the blocks that are not equal, which halving finds; the bytes shared.

        The digest of such a block is that of the other, so one of the two is rotten.
        """
        image, origin = self.opened[number][0], self.opened[other][0]
        shared = 0
        while length:
            done = 0
            try:
                done = dedupe_range(origin.fd, place, length, image.fd, offset)
            except OSError as e:
                if e.errno != errno.EIO:
                    raise
            done -= done % BLOCK  # a part of a block is shared, and looked at, once more
            if not done and length <= BLOCK:
                self.look_at(image, offset, length, self.images[number][0])
                self.look_at(origin, place, length, self.images[other][0])
                return shared
            if not done:
                done = length // BLOCK // 2 * BLOCK
                shared += self.share_equal(number, offset, other, place, done)
            else:
                shared += done
            offset, place, length = offset + done, place + done, length - done
        return shared

    def look_at(
        self, image: CheckedImage, offset: int, length: int, repository: Repository
    ) -> None:
        """Hold a block against its digest, and mark the revision if it is not that."""
        image.damaged.clear()
        image.check(offset, length, Buffers())
        if image.damaged:
            self.damaged += 1
            tell_damage(repository, image.revision, image.damaged)
            repository.mark_damaged(image.revision, image.damaged)

    def open(self, number: int) -> CheckedImage | None:
        """The image of that number, open as long as there is room."""
        if number in self.refused:
            return None
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
            stack.close()
            self.refused.add(number)
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
            if not self.target.is_device:
                resize(self.target.fd, self.image.size)
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
                write_pages(self.target.fd, buffers.new[start:end], offset + start, self.image.size)
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
        with suppress(BackyError):  # we may not be allowed to
            repository.mark_damaged(image.revision, damaged)
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
        position = 0
        with Progress(f"{repository.name} (restoring)", image.size) as progress:
            pieces = in_order(image.pieces(), image.check, workers_for(image.size))
            for offset, length, buffers in pieces:
                while position < offset:
                    position += write_some(fd, HOLE[: offset - position])
                while position < offset + length:
                    position += write_some(fd, buffers.new[position - offset : length])
                progress.reach(position)
                progress.tick()
            while position < image.size:
                position += write_some(fd, HOLE[: image.size - position])
        confess(repository, image)


# ==== Expire =================================================================
#
# Why each revision is kept, and the removal of those that nothing keeps.  A tag
# goes when as many newer good revisions have it as its schedule keeps, and it is
# older than so many intervals.  Both must hold, so that neither many backups in a
# day nor a wrong clock take the last ones.
#
# What is incomplete, damaged, protected or being read stays as it is, and so does
# the only good revision.  While some metadata cannot be read, all stays.  The lock
# is that of the directory, as for any removal; a backup may run meanwhile, whose
# parent it holds open.  What is removed goes first, for that needs no room on the
# disk; a tag that cannot be taken off then goes at the next time.

SHORT_WHILE = 0.5  # seconds that others may have to wait for the directory's lock


@dataclass(frozen=True)
class Verdict:
    """Whether a revision stays, with which tags, and why."""

    revision: Revision
    keep: bool
    reason: str
    tags: tuple[str, ...]  # those that are left
    failure: str = ""  # why it could not be carried out

    @property
    def changes(self) -> bool:
        return not self.keep or self.tags != self.revision.tags


def format_span(span: timedelta) -> str:
    """`1 day`, `90 minutes`: in the largest unit that has no rest."""
    return count_of(*split_span(span))


def describe_damage(revision: Revision) -> str:
    """What is wrong with the bytes of a revision, as far as that is known; empty if nothing."""
    if revision.problem:
        return f"damaged: {revision.problem}"
    return "damaged" if revision.damaged or revision.sums_damaged else ""


def is_sound(revision: Revision) -> bool:
    return revision.is_good and not describe_damage(revision)


def judge_tag(
    tag: str, interval: Interval | None, revision: Revision, newer: int, now: datetime
) -> tuple[bool, str]:
    """Whether the revision keeps this tag, which `newer` younger good ones have too, and why."""
    if interval is None:
        is_manual = tag.startswith("manual:")
        return is_manual, printable(tag) if is_manual else f"unknown tag {printable(tag)!r}"
    if not interval.keep:
        return True, f"{tag}, kept for ever"
    window = interval.keep * interval.every
    place = f"{tag} {newer + 1} of {interval.keep}"
    if not is_sound(revision):
        place = f"{tag}, with {newer} of {interval.keep} good ones newer"
    if newer < interval.keep:
        return True, place
    if now - revision.timestamp <= window:
        return True, f"{tag}, within {format_span(window)}"
    return False, f"{place}, older than {format_span(window)}"


def judge_one(
    revision: Revision, schedule: Schedule, newer: dict[str, int], now: datetime
) -> Verdict:
    """What holds for one revision without regard to the others, but for their number."""
    if not revision.is_complete:
        return Verdict(revision, True, "incomplete", revision.tags)
    intervals = {one.tag: one for one in schedule.intervals}
    tags = [*(tag for tag in schedule.tags if tag in revision.tags)]
    tags += [tag for tag in revision.tags if tag not in intervals]
    stays, goes, left = [], [], []
    for tag in tags:
        keep, why = judge_tag(tag, intervals.get(tag), revision, newer.get(tag, 0), now)
        (stays if keep else goes).append(why)
        left += [tag] if keep else []
    guards = [describe_damage(revision), "protected" if revision.protected else ""]
    if any(guards):
        return Verdict(revision, True, ", ".join(filter(None, [*stays, *guards])), revision.tags)
    if not stays:
        return Verdict(revision, False, ", ".join(goes) or "no tags", ())
    if revision.timestamp > now + FUTURE:
        stays.append("from the future")
    reason = ", ".join(stays) + (f"; without {', '.join(goes)}" if goes else "")
    return Verdict(revision, True, reason, tuple(sorted(left)))


def spare(verdict: Verdict, reason: str) -> Verdict:
    """The revision stays after all, with its tags."""
    return Verdict(verdict.revision, True, reason, verdict.revision.tags)


def spare_the_last(verdicts: list[Verdict]) -> list[Verdict]:
    """Let the newest good revision stay, if no good one would, or the newest if none is good."""
    complete = [one for one in verdicts if one.revision.is_complete]
    good = [one for one in complete if is_sound(one.revision)]
    some = good or complete
    if not some or any(one.keep for one in some):
        return verdicts
    reason = "only good one" if good else "only one"
    return [spare(one, reason) if one is some[-1] else one for one in verdicts]


def judge_revisions(
    revisions: ListLike[Revision], schedule: Schedule, now: datetime
) -> list[Verdict]:
    """The verdicts on all revisions of a job, given and returned with the oldest first.

    Only good revisions fill the places of a tag, so that a damaged or incomplete one
    never pushes a good one out.
    """
    newer: dict[str, int] = {}
    verdicts = []
    for revision in reversed(revisions):
        verdicts.append(judge_one(revision, schedule, newer, now))
        if is_sound(revision):
            for tag in revision.tags:
                newer[tag] = newer.get(tag, 0) + 1
    return spare_the_last(verdicts[::-1])


def is_open(repository: Repository, revision: Revision) -> bool:
    """Whether somebody reads the image, by his lock."""
    try:
        fd = open_regular(repository.dir_fd, revision.id)
    except OSError:
        return False
    try:
        return not take_lock(fd)
    finally:
        close(fd)


def judge(repository: Repository, schedule: Schedule, now: datetime) -> list[Verdict]:
    """The verdicts on the revisions of a repository as they were loaded."""
    verdicts = judge_revisions(repository.revisions, schedule, now)
    if repository.problems:
        reason = "while not all metadata can be read"
        return [spare(one, reason) if one.changes else one for one in verdicts]
    return [
        spare(one, "open") if not one.keep and is_open(repository, one.revision) else one
        for one in verdicts
    ]


def refuse_unreadable(repository: Repository) -> None:
    """Raise BackyError if there is metadata that says nothing: who knows what it is needed for."""
    if repository.problems:
        names = printable(", ".join(name for name, _ in repository.problems[:10]))
        raise BackyError(
            f"{repository.name}: nothing expires: cannot read {names}",
            "mend it, or move it and its image to another directory",
        )


def finish_removals(repository: Repository) -> None:
    """Give back the space of revisions whose removal was interrupted."""
    try:
        with explain(f"{repository.name}: cannot finish an interrupted removal"):
            for name in list_directory(repository.dir_fd):
                if name.endswith(".del") and REVISION_ID.fullmatch(name[: -len(".del")]):
                    repository.sweep_tombstone(name[: -len(".del")])
    except BackyError as e:
        log.warning("%s", e)


def carry_out(repository: Repository, verdict: Verdict) -> Verdict:
    """Do what was decided about one revision; what kept us from it is in the result."""
    revision = verdict.revision
    try:
        if verdict.keep:
            repository.change(revision, tags=verdict.tags)
        else:
            repository.remove(revision)
    except Busy:
        return spare(verdict, "open")
    except BackyError as e:
        return replace(verdict, failure=str(e))
    what = f"keeps [{printable(','.join(verdict.tags))}]" if verdict.keep else "is removed"
    log.info("%s: %s %s: %s", repository.name, revision, what, verdict.reason)
    return verdict


def expire_revisions(repository: Repository, schedule: Schedule, now: datetime) -> list[Verdict]:
    """Remove what nothing keeps, and take off the tags that are over; all verdicts.

    One that could not be carried out says why, and the others are carried out all
    the same.  Raises BackyError, having done nothing, when metadata cannot be read.
    """
    done: dict[str, Verdict] = {}
    is_through = False
    while not is_through:
        with repository.metadata_lock():
            refuse_unreadable(repository)
            finish_removals(repository)
            verdicts = judge(repository, schedule, now)
            left = [one for one in verdicts if one.changes and one.revision.id not in done]
            until = time.monotonic() + SHORT_WHILE
            for verdict in sorted(left, key=lambda one: one.keep):
                done[verdict.revision.id] = carry_out(repository, verdict)
                if time.monotonic() > until:
                    break
            is_through = all(one.revision.id in done for one in left)
        if not is_through:
            time.sleep(0.01)  # so that who waits for the lock gets it
    repository.check_presence()
    found = {one.revision.id: one for one in verdicts}
    every = {**found, **done}.values()
    return sorted(every, key=lambda one: (one.revision.clock, one.revision.id))


def load_schedule(repository: Repository) -> Schedule:
    """The schedule in the job's `config`, which the scheduler writes there.  Raises ConfigError."""
    where = f"{repository.name}: config"
    hint = "take it from the scheduler's configuration: backy expire -c FILE JOB"
    document, root = read_config(repository, hint)
    entries = root.entries if isinstance(root, Mapping) else {}
    if "source" not in entries or "schedule" not in entries:
        raise ConfigError(f"{where}: there is no schedule", hint)
    schedule = read_schedule(document, entries["schedule"][1], "config", "schedule")
    for remark in document.remarks:
        if remark.is_error:
            raise ConfigError(f"{where}: {remark.text}", "; ".join(remark.hints))
    if schedule is None:
        raise ConfigError(f"{where}: there is no schedule", hint)
    return schedule


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


# ==== Configuration ==========================================================
#
# backy.conf and the files it includes: the tables of their keys, and all jobs,
# each with its schedule, or all that is wrong.  A configuration with one fault is
# no configuration: whoever had a good one goes on with that.

DEFAULT_CONFIG = "/etc/backy.conf"
LEAST_RUNTIME = timedelta(hours=6)
MOST_REMARKS = 1000  # that are printed
FSTAB = "/etc/fstab"
UNANSWERED = 3.0  # seconds
MOST_NAMES = 50  # schedules that a message lists
JOB_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
JOB_NAME_HINT = (
    "a job's name is 1 to 128 letters, digits and . _ : -, beginning with a letter or digit"
)
# Names that are, or look like, files of ours in a base directory or a job's directory.
RESERVED_NAMES = frozenset(("status", "config", "last", "latest", "last.rev", "backy.log"))


def parse_addresses(words: Iterable[str]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(words))
    for word in words:
        if re.fullmatch("[0-9.]+", word, re.ASCII) or ":" in word:
            import ipaddress

            ipaddress.ip_address(word)
        elif not re.fullmatch("[0-9A-Za-z]([0-9A-Za-z.-]{0,252})", word, re.ASCII):
            raise ValueError(f"{word!r} is no address")
    return words


ADDRESSES = Kind(
    "is a list of addresses, or text with commas", parse_addresses, ", ".join, is_list=True
)

TOP_OPTIONS = (
    Option("global", SECTION, "", "settings of the scheduler"),
    Option("config", SECTION, "", "another name for global"),
    Option("schedules", SECTION, "", "schedules by their names"),
    Option("jobs", SECTION, "", "jobs by their names"),
    Option("include", LIST, "", "more files with schedules and jobs"),
)
GLOBAL_OPTIONS = (
    Option("base-dir", PATH, "/srv/backy", "the directory of all jobs' directories"),
    Option("worker-limit", number(1, 1000), "1", "how many backups run at once"),
    Option("status-file", PATH, "{base-dir}/status", "what the scheduler writes for check"),
    Option("status-interval", TIME_SPAN, "30", "how often it is written"),
    Option("telnet-addrs", ADDRESSES, "127.0.0.1, ::1", "where the telnet shell listens"),
    Option("telnet-port", number(0, 65535), "6023", "its port; 0: any free one"),
    Option("telnet-control", BOOLEAN, "no", "whether its users may start jobs and reload"),
    Option("space-warning", SPACE, "5%", "check warns with less free space than this"),
    Option("space-critical", SPACE, "2%", "check is critical with less than this"),
    Option("source-types", SECTION, "", "further types of sources, and their programs"),
)
SOURCE_TYPE = re.compile("[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
JOB_OPTIONS = (
    Option("schedule", TEXT, None, "the name of its schedule"),
    Option("source", SECTION, None, "where its image comes from"),
    Option("max-runtime", TIME_SPAN, "", "when a backup is taken for hung"),
)


@dataclass(frozen=True)
class JobSettings:
    """One job of backy.conf."""

    name: str
    schedule: Schedule
    source: dict[str, str]
    max_runtime: timedelta
    place: str  # file:line, for messages


@dataclass(frozen=True)
class Settings:
    """A whole backy.conf without faults."""

    path: str
    base_dir: str
    worker_limit: int
    status_file: str
    status_interval: timedelta
    telnet_addrs: tuple[str, ...]
    telnet_port: int
    telnet_control: bool
    schedules: dict[str, Schedule]
    jobs: dict[str, JobSettings]  # in the order of the file
    space_warning: Space = Space()
    space_critical: Space = Space()


def count_remarks(remarks: Iterable[Remark]) -> str:
    """`2 errors, 1 warning`."""
    errors = [remark.is_error for remark in remarks]
    warnings = len(errors) - sum(errors)
    words = count_of(sum(errors), "error") if any(errors) else "no errors"
    return words + (f", {count_of(warnings, 'warning')}" if warnings else "")


class ConfigErrors(ConfigError):
    """All that is wrong with a configuration; `summary` is one line of it."""

    def __init__(self, path: str, remarks: list[Remark]) -> None:
        self.remarks = remarks
        errors = [remark for remark in remarks if remark.is_error]
        first = errors[0].first_line
        self.summary = first
        if len(errors) > 1:
            self.summary = f"{printable(path)}: {len(errors)} errors, the first: {first}"
        is_alone = len(remarks) == 1 and not remarks[0].line
        lines = [str(one) for one in remarks[:MOST_REMARKS]]
        if remarks[MOST_REMARKS:]:
            lines.append(f"... and {len(remarks) - MOST_REMARKS} more")
        if not is_alone:
            lines.append(count_remarks(remarks))
        super().__init__("\n".join(lines))


def usual_runtime(schedule: Schedule) -> timedelta:
    """When a backup is taken for hung if that is not configured."""
    return max(3 * schedule.shortest, LEAST_RUNTIME)


class Entry(NamedTuple):
    """A schedule or job as it stands in a file."""

    document: Document
    key: Scalar
    node: Node

    @property
    def place(self) -> str:
        return f"{self.document.path}:{self.key.line}"


def read_settings_file(path: str) -> str:
    """The text of a file with settings.  Raises OSError, or ConfigError with what is wrong."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("not a regular file")
        if status.st_mode & 0o022 and os.geteuid() == 0:
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(f"others than root may write to it (mode {mode:04o}): chmod go-w")
        data = read_limited(fd, MAX_YAML_TEXT)
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"byte 0x{data[e.start]:02X} on line {line} is not UTF-8") from e
    finally:
        close(fd)


class Configuration:
    """backy.conf as it is read: its files, what they say, and what is wrong with them."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path) if path else ""
        self.remarks: list[Remark] = []
        self.is_whole = True
        self.documents: dict[str, Document] = {}  # by real path, in the order of reading
        self.section: Entry | None = None  # `global`
        self.entries: dict[str, dict[str, Entry]] = {"schedule": {}, "job": {}}
        self.settings: dict[str, Value] = {}
        self.jobs: dict[str, dict[str, Value]] = {}
        self.sources: dict[str, dict[str, Value]] = {}
        self.schedules: dict[str, Schedule | None] = {}
        self.source_types: dict[str, Value] = {}  # the path of a plug-in for each name

    def load(self) -> Settings:
        """Read everything.  Raises ConfigErrors."""
        self.read_main()
        if not self.is_whole:  # all else would only be said to be missing
            self.check()
        self.settings = self.read_global()
        for name, entry in self.entries["schedule"].items():
            self.schedules[name] = self.read_schedule(name, entry)
        jobs = {name: self.read_job(name, entry) for name, entry in self.entries["job"].items()}
        self.find_commas()
        self.check()
        settings = {name.replace("-", "_"): value.value for name, value in self.settings.items()}
        return Settings(path=self.path, **settings, schedules=self.schedules, jobs=jobs)

    def check(self) -> None:
        """Raise ConfigErrors if there is an error up to here."""
        order = {document.path: at for at, document in enumerate(self.documents.values())}
        self.remarks.sort(key=lambda one: (order.get(one.path, -1), one.line, one.column))
        if any(remark.is_error for remark in self.remarks):
            raise ConfigErrors(self.path, self.remarks)

    # Files

    def read_main(self) -> None:
        try:
            text = read_settings_file(self.path)
        except (OSError, ConfigError) as e:
            reason = getattr(e, "strerror", None) or str(e)
            self.remarks.append(Remark(reason, printable(self.path) or "-c"))
            self.is_whole = False
            return
        document = self.add(self.path, text)
        top = self.read_top(document)
        if "include" in top:
            self.include(document, top["include"])
        elif self.is_whole and "jobs" not in top:
            self.remarks.append(Remark("it has no jobs", document.path))

    def add(self, path: str, text: str) -> Document:
        document = Document(printable(path), text, self.remarks)
        self.documents[os.path.realpath(path)] = document
        return document

    def read_top(self, document: Document) -> dict[str, Value]:
        """Take the sections of one file over."""
        try:
            root = document.root = parse_yaml(document.text)
        except YAMLError as e:
            document.note(Scalar("", False, e.line, e.column), e.message)
            self.is_whole = False
            return {}
        if not isinstance(root, Mapping):
            what = "it is empty" if is_null(root) else "it is not a mapping"
            self.remarks.append(Remark(what, document.path))
            self.is_whole = False
            return {}
        keys = {key: one for key, one in root.entries.items() if not key.startswith("x-")}
        top = document.section(Mapping(keys, root.line, root.column), TOP_OPTIONS, "")
        for name in root.entries:
            if name in ("global", "config") and name in top:
                self.take_global(Entry(document, *root.entries[name]))
        for kind in self.entries:
            if f"{kind}s" in top:
                self.take(document, kind, top[f"{kind}s"].value)
        return top

    def take_global(self, entry: Entry) -> None:
        if self.section is None:
            self.section = entry
            return
        first = f"{self.section.key.text}, at {self.section.place}"
        text = f"{entry.key.text} means the same as {first}: keep one of them"
        if entry.key.text == self.section.key.text:
            text = f"{entry.key.text} is also at {self.section.place}: keep one of them"
        entry.document.note(entry.key, text)

    def take(self, document: Document, kind: str, node: Node) -> None:
        """Take over all schedules, or all jobs, of a file."""
        names = self.entries[kind]
        for name, (key, one) in document.entries(node, f"{kind}s").items():
            if name in names:
                shown = printable(name)
                document.note(key, f"{kind} {shown} is also at {names[name].place}")
            else:
                names[name] = Entry(document, key, one)

    def include(self, document: Document, value: Value) -> None:
        nodes = value.node.items if isinstance(value.node, Sequence) else [value.node]
        for text in value.value:
            node = next((one for one in nodes if one.text == text), value.node)
            for path in self.find_included(document, node, text):
                self.include_file(document, node, path)

    def find_included(self, document: Document, node: Node, text: str) -> list[str]:
        """The files that a pattern means; a name that is no pattern must be there."""
        import glob

        if "\0" in text:
            document.note(node, "include: no file is called so")
            return []
        pattern = os.path.join(os.path.dirname(self.path), text)
        if not glob.has_magic(text):
            return [pattern]
        directory = os.path.dirname(pattern)
        if os.path.isdir(directory) and not os.access(directory, os.R_OK | os.X_OK):
            document.note(node, f"include: {printable(directory)}: {os.strerror(errno.EACCES)}")
            self.is_whole = False
        return sorted(glob.glob(pattern))

    def include_file(self, document: Document, node: Node, path: str) -> None:
        real = os.path.realpath(path)
        if real == next(iter(self.documents)):
            document.note(node, f"include: {printable(path)} is this file itself")
        if real in self.documents:
            return
        try:
            text = read_settings_file(path)
        except (OSError, ConfigError) as e:
            reason = getattr(e, "strerror", None) or str(e)
            document.note(node, f"include: {printable(path)}: {reason}")
            self.is_whole = False
            return
        included = self.add(path, text)
        top = self.read_top(included)
        if "include" in top:
            included.note(top["include"].node, "an included file cannot include others")

    # What they say

    def read_global(self) -> dict[str, Value]:
        """The settings of the scheduler, with all paths absolute."""
        if self.section is None:
            values = {one.name: default_of(one) for one in GLOBAL_OPTIONS if one.default}
        else:
            document, _, node = self.section
            values = document.section(node, GLOBAL_OPTIONS, self.section.key.text)
            if "source-types" in values:
                self.read_source_types(document, values.pop("source-types").value)
        if not {"base-dir", "status-file"} <= set(values):
            return values
        base = os.path.normpath(os.path.join(os.path.dirname(self.path), values["base-dir"].value))
        values["base-dir"] = replace(values["base-dir"], value=base)
        status = values["status-file"].value.replace("{base-dir}", base)
        status = os.path.normpath(os.path.join(base, status))
        values["status-file"] = replace(values["status-file"], value=status)
        return values

    def read_source_types(self, document: Document, node: Node) -> None:
        where, program = "source-types", Option("program", PATH)
        for name, (key, one) in document.entries(node, where).items():
            if not SOURCE_TYPE.fullmatch(name) or name in Source.types():
                document.note(key, f"{where}: no further type can be called {printable(name)!r}")
                continue
            value = document.value(replace(program, name=name), one, where)
            if value:
                self.source_types[name] = value

    def resolve_type(self, node: Node) -> Node:
        """A source of a type that is a plug-in, as the source of type exec that it means."""
        entries = node.entries if isinstance(node, Mapping) else {}
        key, given = entries.get("type", (None, None))
        if not isinstance(given, Scalar) or given.text not in self.source_types:
            return node
        path, base = self.source_types[given.text], os.path.dirname(self.path)
        program = replace(path.node, text=os.path.join(base, path.value), plain=False)
        return replace(
            node,
            entries={
                **entries,
                "type": (key, replace(given, text=ExecSource.type)),
                "program": (key, program),
            },
        )

    def read_schedule(self, name: str, entry: Entry) -> Schedule | None:
        where = f"schedule {printable(name)}"
        if not name or UNPRINTABLE.search(name):
            entry.document.note(entry.key, f"{where}: no schedule can be called so")
        return read_schedule(entry.document, entry.node, name, where)

    def read_job(self, name: str, entry: Entry) -> JobSettings | None:
        document, key, node = entry
        where = f"job {printable(name) or repr(name)}"
        self.check_name(name, entry)
        values = document.section(node, JOB_OPTIONS, where, key)
        schedule = None
        if "schedule" in values:
            schedule = self.find_schedule(document, values["schedule"], where)
        source = {}
        if "source" in values:
            node = self.resolve_type(values["source"].value)
            self.sources[name] = read_source(document, node, where, key)
            source = self.absolute(self.sources[name])
        if not (schedule and source):
            return None
        if "max-runtime" not in values:
            values["max-runtime"] = Value(usual_runtime(schedule))
        self.jobs[name] = values
        return JobSettings(name, schedule, source, values["max-runtime"].value, entry.place)

    def check_name(self, name: str, entry: Entry) -> None:
        where = f"job {printable(name[:140]) or repr(name)}"
        if not JOB_NAME.fullmatch(name):
            entry.document.note(entry.key, f"{where}: no job can be called so", JOB_NAME_HINT)
            return
        base, status = (self.settings.get(key) for key in ("base-dir", "status-file"))
        is_status = base and status and os.path.join(base.value, name) == status.value
        if name in RESERVED_NAMES or is_status:
            text = f"{where}: no job can be called so: it is the name of one of backy's own files"
            entry.document.note(entry.key, text)

    def find_schedule(self, document: Document, value: Value, where: str) -> Schedule | None:
        name = value.value
        if name in self.schedules:
            return self.schedules[name]
        known = list(self.schedules)[:MOST_NAMES]  # to look for likeness takes time
        owners = [one for one in known if name in self.tags_of(one)]
        note = f" ({printable(name)!r} is an interval of {', '.join(owners)})" if owners else ""
        more = ", ..." if len(self.schedules) > len(known) else ""
        hint = (
            f"schedules are: {', '.join(known)}{more}{note}" if known else "there are no schedules"
        )
        alike = "" if owners else suggestion(name, known)
        text = f"{where}: no schedule {printable(name)!r}{alike}"
        document.note(value.node, text, hint, *hints_for(value.node))
        return None

    def tags_of(self, schedule: str) -> Iterable[str]:
        node = self.entries["schedule"][schedule].node
        return node.entries if isinstance(node, Mapping) else ()

    def absolute(self, source: dict[str, Value]) -> dict[str, str]:
        """The texts of a source; its paths start at the base directory, as in 2.x."""
        texts = texts_of(source)
        if not texts or "base-dir" not in self.settings:
            return texts
        for option in Source.types()[texts["type"]].options():
            if option.kind is PATH and option.name in texts:
                path = os.path.join(self.settings["base-dir"].value, texts[option.name])
                texts[option.name] = path
                source[option.name] = replace(source[option.name], value=path)
        return texts

    def find_commas(self) -> None:
        """Warn of commas that have become parts of values, unless that is an error already."""
        noted = {(remark.path, remark.line, remark.column) for remark in self.remarks}
        for document in self.documents.values():
            for node in nodes_of(document.root):
                place = (document.path, node.line, node.column)
                if place not in noted:
                    for hint in hints_for(node):
                        document.warn(node, f"{printable(node.text)!r}: {hint}")


def load_settings(path: str) -> Settings:
    """The configuration at `path`.  Raises ConfigErrors, whose text is all that is wrong."""
    return Configuration(path).load()


def job_config(job: JobSettings) -> bytes:
    """What the scheduler writes to the job's `config`, in the form of backy 2.5."""
    schedule = {
        one.tag: {"interval": format_time_span(one.every), "keep": one.keep}
        for one in job.schedule.intervals
    }
    return format_yaml({"schedule": schedule, "source": job.source}).encode()


# What is legal and yet looks like a mistake


def can_share_extents(directory: str) -> bool | None:
    """Whether files in `directory` can share extents; None if that cannot be tried.

    It is tried with two files without names, so that nothing is left behind.
    """
    fds: list[int] = []
    try:
        for _ in range(2):
            fds.append(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        write_all(fds[0], bytes(4096), 0)
        clone_file(*fds)
    except CloneUnsupported:
        return False
    except (OSError, BackyError):
        return None
    finally:
        for fd in fds:
            close(fd)
    return True


def secrets_in(root: Node) -> Iterator[Scalar]:
    """The values of all keys that name a secret."""
    for node in nodes_of(root):
        if isinstance(node, Mapping):
            for key, value in node.entries.values():
                if isinstance(value, Scalar) and not is_null(value) and SECRET.search(key.text):
                    yield value


def unmounted_above(directory: str) -> str:
    """The place of the directory where a file system ought to be mounted and is not, or nothing."""
    path, above = os.path.realpath(directory), []
    while path != "/":
        above.append(path)
        path = os.path.dirname(path)
    with suppress(OSError), open(FSTAB, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            if len(words) < 3 or words[0].startswith("#"):
                continue
            place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[1])
            place = os.path.normpath(place)
            if place in above and not os.path.ismount(place):
                return place
    return ""


def look_for(paths: Iterable[str]) -> dict[str, str | None]:
    """By path, the real path, and None for one that is not there.

    What does not answer, since a file server is gone, is not in the result.
    """
    found: dict[str, str | None] = {}
    left = list(dict.fromkeys(paths))

    def look() -> None:
        while left:
            path = left.pop()
            try:
                os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                found[path] = None
                continue
            except OSError:  # perhaps we may not look there
                pass
            found[path] = os.path.realpath(path)

    for _ in range(10):
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        count = -1
        while thread.is_alive() and len(found) > count:
            count = len(found)
            thread.join(UNANSWERED)
        if not left:
            break
    return dict(found)


def is_job_directory(path: str) -> bool:
    with suppress(OSError):
        return any(name == "config" or name.endswith(".rev") for name in os.listdir(path))
    return False


def examine_files(configuration: Configuration) -> None:
    """Warn of who may read and write the files; this needs no faultless configuration."""
    for path, document in configuration.documents.items():
        try:
            status = os.stat(path)
        except OSError:
            continue
        if os.geteuid() == 0 and status.st_uid != 0:
            text = f"it belongs to user {status.st_uid}, who decides what root reads"
            configuration.remarks.append(Remark(text, document.path, is_error=False))
        for node in secrets_in(document.root) if status.st_mode & 0o004 else ():
            hint = f"chmod o-r {document.path}"
            document.warn(node, "a secret in a file that every user may read", hint)


class Examination:
    """Looks at a faultless configuration for what its author may not have meant."""

    def __init__(self, configuration: Configuration, settings: Settings) -> None:
        self.configuration, self.settings = configuration, settings
        self.found: dict[str, str | None] = {}

    def run(self) -> None:
        """Add warnings to the remarks of the configuration."""
        if not self.settings.jobs:
            self.warn("it has no jobs")
        self.base_directory()
        self.scheduler()
        self.schedules()
        self.sources()
        self.orphans()

    def warn(self, text: str, *hints: str) -> None:
        """A warning that belongs to no line."""
        path = printable(self.settings.path)
        self.configuration.remarks.append(Remark(text, path, hints=hints, is_error=False))

    def warn_at(self, key: str, text: str, *hints: str) -> None:
        """A warning about a setting of the scheduler, given or not."""
        value, section = self.configuration.settings[key], self.configuration.section
        if value.node and section:
            section.document.warn(value.node, f"{section.key.text}: {text}", *hints)
        else:
            self.warn(text, *hints)

    def base_directory(self) -> None:
        base, status_file = self.settings.base_dir, self.settings.status_file
        shown = printable(base)
        place = unmounted_above(base)
        if place:
            text = f"{printable(place)} is in /etc/fstab and not mounted"
            self.warn_at("base-dir", f"base-dir is on another disk than it seems: {text}")
        try:
            if not stat.S_ISDIR(os.stat(base).st_mode):
                self.warn_at("base-dir", f"base-dir {shown} is not a directory")
                return
        except PermissionError:
            return
        except OSError as e:
            self.warn_at("base-dir", f"base-dir {shown}: {e.strerror}")
            return
        if can_share_extents(base) is False:
            hint = "keep backups on btrfs, or on XFS made with reflink=1"
            text = f"no reflinks on the file system of {shown}: each revision takes its full size"
            self.warn_at("base-dir", text, hint)
        above = os.path.dirname(status_file)
        if not os.path.isdir(above):
            self.warn_at("status-file", f"there is no directory {printable(above)}")

    def scheduler(self) -> None:
        import ipaddress

        settings, processors = self.settings, len(os.sched_getaffinity(0))
        if settings.worker_limit > processors:
            text = f"worker-limit is {settings.worker_limit}, and there are {processors} processors"
            self.warn_at("worker-limit", text)
        if settings.status_interval > timedelta(hours=1):
            self.warn_at("status-interval", "check learns of nothing for so long")
        for address in settings.telnet_addrs:
            with suppress(ValueError):
                if not ipaddress.ip_address(address).is_loopback:
                    text = f"whoever reaches {address} can use the telnet shell, without password"
                    self.warn_at("telnet-addrs", text)

    def schedules(self) -> None:
        used = {job.schedule.name for job in self.settings.jobs.values()}
        for name, entry in self.configuration.entries["schedule"].items():
            where = f"schedule {printable(name)}"
            if name not in used:
                entry.document.warn(entry.key, f"{where} is not used by any job")
            nodes = entry.node.entries if isinstance(entry.node, Mapping) else {}
            for one in self.settings.schedules[name].intervals:
                key, _ = nodes[one.tag]
                self.interval(entry.document, key, f"{where}.{one.tag}", one)

    def interval(self, document: Document, key: Scalar, where: str, one: Interval) -> None:
        if one.tag.startswith("manual:"):
            document.warn(key, f"{where}: tags with manual: are for backups made by hand")
        if not one.keep:
            document.warn(key, f"{where}: keep is 0, so nothing with this tag ever expires")
        years = one.every.total_seconds() * one.keep / (365.25 * 86400)
        if years > 50:
            text = f"{where}: {one.keep} revisions will be there only after {years:.0f} years"
            document.warn(key, text)

    def sources(self) -> None:
        first: dict[tuple, str] = {}
        jobs = self.settings.jobs.values()
        self.found = look_for(job.source[name] for job in jobs for name in self.paths(job))
        for name, job in self.settings.jobs.items():
            key = self.configuration.entries["job"][name].key
            document = self.configuration.entries["job"][name].document
            where = f"job {printable(name)}"
            for path in (job.source[name] for name in self.paths(job)):
                if path not in self.found:
                    document.warn(key, f"{where}: {printable(path)} does not answer")
                elif self.found[path] is None:
                    document.warn(key, f"{where}: there is no {printable(path)}")
            other = first.setdefault(self.identity(job), name)
            if other != name:
                document.warn(key, f"{where} has the same source as job {printable(other)}")

    def paths(self, job: JobSettings) -> list[str]:
        options = Source.types()[job.source["type"]].options()
        return [one.name for one in options if one.kind is PATH and one.name in job.source]

    def identity(self, job: JobSettings) -> tuple:
        """What is equal for two jobs that read the same image."""
        common = {one.name for one in SOURCE_OPTIONS}
        paths = self.paths(job)
        own = (
            (name, self.found.get(text) or text if name in paths else text)
            for name, text in sorted(job.source.items())
            if name not in common and name != "cow" and not SECRET.search(name)
        )
        return (job.source["type"], *own)

    def orphans(self) -> None:
        """Directories of jobs that are configured no more."""
        names = []
        with suppress(OSError), os.scandir(self.settings.base_dir) as entries:
            for entry in entries:
                if entry.name in self.settings.jobs or entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False) and is_job_directory(entry.path):
                    names.append(entry.name)
        shown = [printable(os.path.join(self.settings.base_dir, name)) for name in sorted(names)]
        for path in shown[:20]:
            self.warn(f"{path} belongs to no job", "nothing in it expires or is backed up")
        if shown[20:]:
            self.warn(f"{len(shown) - 20} more directories belong to no job")


# What holds, and where that was said


def show_value(option: Option, value: Value) -> str:
    """A value as it would be written in a file."""
    if option.is_secret:
        return HIDDEN
    if isinstance(value.value, str) or option.kind.is_list:
        return format_scalar(option.kind.format(value.value))
    return option.kind.format(value.value)


def value_json(option: Option, value: Value) -> dict[str, Any]:
    plain = value.value
    if isinstance(plain, timedelta):
        plain = int(plain.total_seconds())
    elif isinstance(plain, Space):
        plain = str(plain)
    return {"value": HIDDEN if option.is_secret else plain, "from": value.place}


class Overview:
    """A configuration with its defaults, as a tree of (option, value)."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration

    def tree(self) -> dict[str, Any]:
        entries = self.configuration.entries
        settings = self.configuration.settings
        return {
            "global": {**self.leaves(GLOBAL_OPTIONS, settings), **self.source_types()},
            "schedules": {name: self.schedule(one) for name, one in entries["schedule"].items()},
            "jobs": {name: self.job(name) for name in entries["job"]},
        }

    def source_types(self) -> dict[str, Any]:
        types = self.configuration.source_types
        leaves = {name: (Option(name, PATH), value) for name, value in types.items()}
        return {"source-types": leaves} if leaves else {}

    @staticmethod
    def leaves(options: Iterable[Option], values: dict[str, Value]) -> dict[str, Any]:
        return {one.name: (one, values[one.name]) for one in options if one.name in values}

    def schedule(self, entry: Entry) -> dict[str, Any]:
        return {
            tag: self.leaves(INTERVAL_OPTIONS, entry.document.section(node, INTERVAL_OPTIONS, ""))
            for tag, (_, node) in entry.document.entries(entry.node, "").items()
        }

    def job(self, name: str) -> dict[str, Any]:
        values, source = self.configuration.jobs[name], self.configuration.sources[name]
        kind = Source.types()[source["type"].value]
        return {
            **self.leaves((one for one in JOB_OPTIONS if one.name != "source"), values),
            "source": self.leaves(kind.options_for(source), source),
        }

    def json(self, tree: Any = None) -> Any:
        tree = self.tree() if tree is None else tree
        if isinstance(tree, tuple):
            return value_json(*tree)
        return {name: self.json(part) for name, part in tree.items()}

    def lines(self, tree: dict[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
        """What a file with all this would have, and where each line is from."""
        for name, part in tree.items():
            key = f"{indent}{format_scalar(name)}:"
            if isinstance(part, tuple):
                yield f"{key} {show_value(*part)}", part[1].place
            else:
                yield key if part else f"{key} {{}}", ""
                yield from self.lines(part, indent + "    ")

    def text(self) -> str:
        lines = list(self.lines(self.tree()))
        width = max(len(line) for line, _ in lines)
        width = min(width, 60)
        return "".join(
            f"{line:{width}}  # {place}\n" if place else f"{line}\n" for line, place in lines
        )


# ==== Loop ===================================================================
#
# One thread that waits for files, for moments and for signals, all at once.  What
# it calls must not block.


class Timer:
    """An action that is due at a moment, unless it is cancelled before."""

    def __init__(self, moment: float, action: Callable[[], None]) -> None:
        self.moment, self.action = moment, action
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    """Wait, and call; `turn()` again and again is the life of a daemon."""

    def __init__(self) -> None:
        import selectors

        self.selector = selectors.DefaultSelector()
        self.timers: list[tuple[float, int, Timer]] = []
        self.numbers = itertools.count()  # timers of one moment go in their order

    def close(self) -> None:
        self.selector.close()

    def watch(self, file: Any, events: int, ready: Callable[[int], None]) -> None:
        """Call `ready` with the events (EVENT_READ, EVENT_WRITE) once `file` has some."""
        try:
            self.selector.modify(file, events, ready)
        except KeyError:
            self.selector.register(file, events, ready)

    def forget(self, file: Any) -> None:
        with suppress(KeyError, ValueError):
            self.selector.unregister(file)

    def call_at(self, moment: float, action: Callable[[], None]) -> Timer:
        """Call `action` at `moment`, by time.monotonic()."""
        timer = Timer(moment, action)
        heapq.heappush(self.timers, (moment, next(self.numbers), timer))
        return timer

    def call_in(self, seconds: float, action: Callable[[], None]) -> Timer:
        return self.call_at(time.monotonic() + seconds, action)

    def turn(self, most: float = 60.0) -> None:
        """Wait until something happens, at most so many seconds, and let it happen."""
        while self.timers and self.timers[0][2].is_cancelled:
            heapq.heappop(self.timers)
        if self.timers:
            most = min(most, max(0.0, self.timers[0][0] - time.monotonic()))
        for key, events in self.selector.select(most):
            if self.selector.get_map().get(key.fd) is key:  # not forgotten meanwhile
                key.data(events)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            timer = heapq.heappop(self.timers)[2]
            if not timer.is_cancelled:
                timer.action()


def listening_sockets(address: str, port: int) -> list[Any]:
    """One for each of the addresses that are meant, which wait for nothing.

    Raises OSError, and what else a bad address or port is good for.
    """
    import socket

    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[Any] = []
    try:
        for family, kind, protocol, _, place in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((place[0], port, *place[2:]))
            listener.listen(128)
            listener.setblocking(False)
            port = listener.getsockname()[1]  # 0 is any, but the same for all of them
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


# ==== Timetable ==============================================================
#
# What is started when, and what waits for what.  It asks no clock, starts nothing
# and touches no file: it is told the time and what became of a run.  The life of a
# job:
#
#   waiting, failed  -- its moment comes -->  queued  -- a slot is free -->  running
#   running  -- success, failure, somebody else has it -->  waiting, failed
#   running  -- given up, since nothing ends it -->  stuck  -- it ends after all -->  failed
#
# Jobs whose last revision took less than ten minutes never wait for a slot behind
# long ones: as long as there are such jobs, long ones leave one slot of two or more
# free.  Otherwise the one that has waited longest comes first.

LONG_RUN = 600.0  # seconds
FORGET_ABSENT = timedelta(days=30)  # of a job that has left the configuration
LATE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
BUSY_PAUSE = timedelta(seconds=30)  # before asking again whether somebody else is through
UNKNOWN_SCHEDULE = Schedule("", (Interval("", timedelta(days=1), 0),))  # of a job that was removed


class State(Enum):
    """What a job is at, in the words of backy 2.x."""

    WAITING = "waiting for deadline"
    QUEUED = "queued for execution"
    RUNNING = "running"
    FAILED = "failed"
    STUCK = "stuck"


class TimedJob:
    """One job, and all that its times are reckoned from."""

    def __init__(self, name: str, schedule: Schedule, first_seen: datetime) -> None:
        self.name, self.first_seen = name, first_seen
        self.set_schedule(schedule)
        self.is_known = False  # what is on the disk
        self.past: list[Past] = []
        self.failures = 0  # in a row
        self.last_error = ""
        self.not_before: datetime | None = None
        self.owed: tuple[str, ...] = ()  # the tags of the run that failed
        self.state = State.WAITING
        self.due: datetime | None = None
        self.tags: tuple[str, ...] = ()
        self.reason = ""
        self.started: datetime | None = None
        self.is_long = True
        self.runs_again = False  # asked for by hand while it ran
        self.is_first = False  # in its queue
        self.ticket = 0  # its only valid entry in a heap

    def set_schedule(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.shortest, self.schedule_tags = schedule.shortest, schedule.tags
        self.spread = spread_of(self.name, schedule)

    @property
    def is_active(self) -> bool:
        return self.state in (State.RUNNING, State.STUCK)

    @property
    def awaited(self) -> datetime:
        """When a revision was last wanted in vain; who has waited longest goes first."""
        basis = self.past[-1].moment + self.shortest if self.past else self.first_seen
        return max(basis, self.not_before) if self.not_before else basis

    def overdue_since(self, now: datetime) -> datetime | None:
        return overdue_since(self.schedule, self.past, self.first_seen, now)

    def late_at(self, now: datetime) -> datetime:
        """When it will be overdue if nothing happens."""
        moments = (one.moment for one in self.past if one.moment <= now + FUTURE)
        return max(moments, default=self.first_seen) + 1.5 * self.shortest

    def reckon(self, now: datetime) -> None:
        """Find out when it is next due, and with which tags."""
        if self.past and now < self.past[-1].moment <= now + self.shortest / 2:
            now = self.past[-1].moment  # the clock went back: nothing is run twice for that
        self.due, self.tags, self.reason = next_run(self.schedule, self.spread, self.past, now)
        if self.owed:
            self.due, self.reason = now, "again after a failure"
            self.add_tags(self.owed, now)
        elif not self.past and next_time(self.schedule, self.spread, self.first_seen)[0] <= now:
            self.due, self.reason = now, "its first time has passed"
        if self.not_before:
            pause = back_off(self.failures) if self.failures else BUSY_PAUSE
            self.not_before = min(self.not_before, now + pause)  # the clock may have gone back
            self.due = max(self.due, self.not_before)

    def add_tags(self, tags: tuple[str, ...], now: datetime) -> None:
        """Let the next run have `tags`, and what has been missed meanwhile."""
        wanted = {*tags, *missed_tags(self.schedule, self.past, now)}
        self.tags = tuple(tag for tag in self.schedule_tags if tag in wanted) or self.tags

    def look_at(self, now: datetime) -> datetime:
        """When something has to be decided: it is due, or a tag has then been missed."""
        moment = self.due
        for interval in self.schedule.intervals:
            for one in reversed(self.past):
                if interval.tag in one.tags:
                    missed = one.moment + interval.every + SECOND
                    if now < missed < moment:
                        moment = missed
                    break
        return moment

    def succeed(self, tags: tuple[str, ...]) -> None:
        """There is a new revision with these tags."""
        self.failures, self.not_before, self.last_error = 0, None, ""
        self.owed = tuple(tag for tag in self.owed if tag not in tags)

    def fail(self, error: str, now: datetime) -> None:
        """There is none.  Without an error somebody else holds the job, who may make one."""
        self.owed = self.tags
        if error:
            self.failures += 1
            self.last_error = error
        self.not_before = now + (back_off(self.failures) if error else BUSY_PAUSE)

    def remember(self) -> dict[str, Any]:
        """What must survive the program."""
        kept: dict[str, Any] = {"first_seen": self.first_seen.isoformat()}
        if self.failures and self.not_before:
            kept["failures"] = self.failures
            kept["not_before"] = self.not_before.isoformat()
            kept["last_error"] = self.last_error
        return kept

    def recall(self, kept: dict[str, Any], now: datetime) -> None:
        """Take over what was remembered.  Raises KeyError, TypeError, ValueError if it is odd."""
        first_seen = decode_timestamp(datetime.fromisoformat(kept["first_seen"]))
        self.first_seen = min(first_seen, now)
        if "failures" in kept:
            not_before = decode_timestamp(datetime.fromisoformat(kept["not_before"]))
            self.failures, self.not_before = max(1, int(kept["failures"])), not_before
            self.last_error = str(kept["last_error"])


def newest_of_each(tags: ListLike[str], past: ListLike[Past]) -> list[Past]:
    """The revisions that anything is reckoned from: the newest, and the newest of each tag."""
    kept = list(past[-1:])
    wanted = set(tags)
    for one in reversed(past):
        if not wanted:
            break
        if not wanted.isdisjoint(one.tags):
            wanted.difference_update(one.tags)
            if one is not kept[0]:
                kept.append(one)
    return kept[::-1]


class Timetable:
    """All jobs, when they are due, and who gets a slot."""

    def __init__(self, limit: int = 1) -> None:
        self.limit = limit
        self.jobs: dict[str, TimedJob] = {}
        self.leaving: dict[str, TimedJob] = {}  # not configured any more, but still active
        self.absent: dict[str, dict[str, Any]] = {}  # remembered of jobs that are not configured
        self.waiting: list[tuple[datetime, int, TimedJob]] = []
        # by is_long
        self.queues: dict[bool, list[tuple[bool, datetime, int, TimedJob]]] = {False: [], True: []}
        self.running = self.running_long = self.queued = self.stuck = self.short_jobs = 0
        self.changed: set[str] = set()  # names; for who shows them, and takes them out
        self.tickets = itertools.count(1)

    # -- what is configured -----------------------------------------------------

    def configure(self, schedules: dict[str, Schedule], limit: int, now: datetime) -> list[str]:
        """These jobs are configured now, and no others.

        The jobs that have another schedule now, whose names are returned, come to
        nothing before reckon_anew() has placed them, which may take a while.
        """
        moved = []
        self.limit = limit
        for name in [name for name in self.jobs if name not in schedules]:
            job = self.jobs.pop(name)
            self.absent[name] = {**job.remember(), "absent_since": now.isoformat()}
            if job.is_active:
                self.leaving[name] = job
        for name, schedule in schedules.items():
            job = (
                self.jobs.get(name) or self.leaving.pop(name, None) or self.new(name, schedule, now)
            )
            self.absent.pop(name, None)
            self.jobs[name] = job
            if schedule != job.schedule:
                job.set_schedule(schedule)
                if job.state is State.QUEUED:
                    job.state = State.WAITING
                job.ticket = 0
                moved.append(name)
        self.jobs = {name: self.jobs[name] for name in schedules}
        for heap in (self.waiting, *self.queues.values()):
            heap[:] = [entry for entry in heap if self.is_valid(entry)]
            heapq.heapify(heap)
        self.count()
        return moved

    def is_valid(self, entry: Any) -> bool:
        """Whether an entry of a heap still stands for its job."""
        *_, ticket, job = entry
        return ticket == job.ticket and self.jobs.get(job.name) is job

    def new(self, name: str, schedule: Schedule, now: datetime) -> TimedJob:
        job = TimedJob(name, schedule, now)
        if name in self.absent:
            with suppress(KeyError, TypeError, ValueError, OverflowError):
                job.recall(self.absent[name], now)
        return job

    def count(self) -> None:
        jobs = [*self.jobs.values(), *self.leaving.values()]
        running = [job for job in jobs if job.state is State.RUNNING]
        self.running, self.running_long = len(running), sum(job.is_long for job in running)
        self.queued = sum(job.state is State.QUEUED for job in jobs)
        self.stuck = sum(job.state is State.STUCK for job in jobs)
        self.short_jobs = sum(not job.is_long for job in jobs)

    def remember(self) -> dict[str, dict[str, Any]]:
        """By name, what must survive the program."""
        return {**self.absent, **{name: job.remember() for name, job in self.jobs.items()}}

    def recall(self, kept: object, now: datetime) -> None:
        """Take over what another timetable remembered, before the jobs are configured."""
        for name, one in kept.items() if isinstance(kept, dict) else ():
            if isinstance(one, dict):
                since = str(one.get("absent_since") or now.isoformat())
                with suppress(ValueError):
                    if decode_timestamp(datetime.fromisoformat(since)) > now - FORGET_ABSENT:
                        self.absent[name] = {**one, "absent_since": since}

    # -- what is known ----------------------------------------------------------

    def learn(self, name: str, past: ListLike[Past], now: datetime) -> None:
        """These are the complete revisions of the job, oldest first."""
        job = self.jobs.get(name) or self.leaving.get(name)
        if job is None:
            return
        newest = job.past[-1:]
        job.past = newest_of_each(job.schedule_tags, past)
        if job.is_known and job.past and job.past[-1:] != newest and not job.is_active:
            job.succeed(job.past[-1].tags)  # by hand
        job.is_known = True
        if not job.is_active:
            self.short_jobs += job.is_long
            job.is_long = not job.past or job.past[-1].duration >= LONG_RUN
            self.short_jobs -= job.is_long
            self.place(job, now)

    def place(self, job: TimedJob, now: datetime) -> None:
        """Reckon anew when a job that does not run is due."""
        self.changed.add(job.name)
        if job.is_active or not job.is_known:
            return
        if job.state is not State.QUEUED:
            job.reckon(now)
            job.state = State.FAILED if job.failures else State.WAITING
        if job.runs_again:
            self.queue_by_hand(job, now)
        else:
            self.enter(job, now)

    def enter(self, job: TimedJob, now: datetime) -> None:
        """Put a job where its state belongs; an older entry of it is void."""
        job.ticket = next(self.tickets)
        if job.state is State.QUEUED:
            entry = (not job.is_first, job.awaited, job.ticket, job)
            heapq.heappush(self.queues[job.is_long], entry)
        elif job.due and not job.is_active:
            heapq.heappush(self.waiting, (job.look_at(now), job.ticket, job))

    def reckon_anew(self, now: datetime, names: Iterable[str] | None = None) -> None:
        """The clock was set: what the other clock said may be due far too late."""
        for name in self.jobs if names is None else names:
            job = self.jobs.get(name)
            if job:
                job.first_seen = min(job.first_seen, now)
                self.place(job, now)

    # -- what happens -----------------------------------------------------------

    def next_moment(self) -> datetime | None:
        """When something has to be decided next, but for what waits for a slot."""
        while self.waiting and self.waiting[0][1] != self.waiting[0][2].ticket:
            heapq.heappop(self.waiting)
        return self.waiting[0][0] if self.waiting else None

    def run(self, name: str, now: datetime, first: bool = True) -> bool:
        """Let a job run as soon as there is a slot, or again if it runs; False: no such job."""
        job = self.jobs.get(name)
        if job is None:
            return False
        job.runs_again = True
        if job.is_known and not job.is_active:
            self.queue_by_hand(job, now, first)
        return True

    def queue_by_hand(self, job: TimedJob, now: datetime, first: bool = True) -> None:
        job.runs_again, job.reason = False, "by hand"
        self.queue(job, now, first)

    def queue(self, job: TimedJob, now: datetime, first: bool = False) -> None:
        self.changed.add(job.name)
        self.queued += job.state is not State.QUEUED
        job.state, job.is_first = State.QUEUED, first
        self.enter(job, now)

    def start(self, now: datetime) -> list[TimedJob]:
        """The jobs to start now; from here on they run."""
        while True:
            moment = self.next_moment()
            if moment is None or moment > now:
                break
            job = heapq.heappop(self.waiting)[2]
            if job.due > now:
                self.place(job, now)
                continue
            if now - job.due > LATE:  # the host slept, or the clock was set
                job.add_tags(job.tags, now)
            self.queue(job, now)
        started = []
        while self.queued and self.running < self.limit:
            job = self.next_in_queue()
            if job is None:
                break
            job.state, job.started = State.RUNNING, now
            job.ticket = 0
            self.changed.add(job.name)
            self.queued -= 1
            self.running += 1
            self.running_long += job.is_long
            started.append(job)
        return started

    def next_in_queue(self) -> TimedJob | None:
        """Take the job that has waited longest, of those that may have a slot."""
        kept_free = 1 if self.limit > 1 and self.short_jobs else 0
        heads = []
        for is_long, queue in self.queues.items():
            while queue and queue[0][2] != queue[0][3].ticket:
                heapq.heappop(queue)
            if queue and not (is_long and self.running_long >= self.limit - kept_free):
                heads.append(queue)
        return heapq.heappop(min(heads, key=lambda queue: queue[0][:3]))[3] if heads else None

    def adopt(self, name: str, started: datetime) -> bool:
        """The job runs already: an earlier life of the scheduler has started it.

        It may be configured no more; False if another process of it was found before.
        """
        job = self.jobs.get(name) or self.leaving.get(name)
        if job is None:
            job = self.leaving[name] = TimedJob(name, UNKNOWN_SCHEDULE, started)
        if job.is_active:
            return False
        self.queued -= job.state is State.QUEUED
        job.state, job.started, job.ticket = State.RUNNING, started, 0
        self.changed.add(name)
        self.running += 1
        self.running_long += job.is_long
        return True

    def give_up(self, name: str) -> None:
        """Nothing ends the run, so its slot is for others now."""
        job = self.jobs.get(name) or self.leaving[name]
        self.free_slot(job)
        job.state = State.STUCK
        self.changed.add(name)
        self.stuck += 1

    def free_slot(self, job: TimedJob) -> None:
        if job.state is State.RUNNING:
            self.running -= 1
            self.running_long -= job.is_long
        else:
            self.stuck -= 1

    def finish(self, name: str, error: str | None, past: ListLike[Past], now: datetime) -> None:
        """A run has ended: with success, with an error, or before it began (`error` is "").

        The last means that somebody else holds the job, which is no failure of it.
        """
        job = self.jobs.get(name) or self.leaving.pop(name)
        self.free_slot(job)
        if error is None:
            job.succeed(job.tags)
        else:
            job.fail(error, now)
        if name in self.jobs:
            job.past, job.is_known = list(past[-1:]), True  # so that it is not taken for by hand
            job.state, job.started = State.WAITING, None
            self.learn(name, past, now)
        else:
            self.short_jobs -= not job.is_long


# ==== Shell ==================================================================
#
# Whoever reaches the telnet port may look at the jobs, and touch them only if that
# is configured.  Nothing a client sends, or does not read, holds up the loop: bytes
# are taken in small portions, one turn of the loop does one short step of one
# session's work, and sessions, lines, patterns, output and time all have a limit.

MAX_SHELL_SESSIONS = 16
MAX_SHELL_LINE = KiB
MAX_SHELL_PATTERN = 256  # characters
MAX_SHELL_QUEUE = 32  # lines that wait to be answered; then no more are read
MAX_SHELL_OUTPUT = 256 * KiB  # what may wait for a client; one that lets more wait is dropped
SHELL_WATERMARK = 64 * KiB  # no table is continued while more than this waits
SHELL_SLICE = 0.01  # seconds of work in one turn of the loop
SHELL_PATTERN_TIME = 0.05  # seconds of CPU for one pattern on all names
SHELL_IDLE = 300.0  # seconds since the last line
SHELL_SILENT = 60.0  # seconds for the first line
SHELL_SETTLED = 10.0  # a silent session this old makes way for a new one
SHELL_STALLED = 30.0  # seconds in which a client read nothing of what waits for it
SHELL_BATCH = 100  # jobs between two looks at the clock

JOB_COLUMNS = ("Job", "SLA", "Status", "Last Backup (UTC)", "Last Tags", "Last Dur")
JOB_COLUMNS += ("Next Backup (UTC)", "Next Tags")
JOB_KEYS_SHOWN = ("job", "sla", "status", "last_time", "last_tags", "last_duration")
JOB_KEYS_SHOWN += ("next_time", "next_tags")

# What replies of the shell begin with when nothing was done.
SHELL_FAILURE = re.compile(r"error: |Usage: |Unknown job |Reload refused: |.*: command not found\.")


class TimeUp(Exception):
    """What was to be done took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside when it takes more CPU time; also inside a pattern that never ends.

    Only in the main thread.  Nested one in the other, the inner one wins.
    """
    armed, end = True, time.thread_time() + seconds

    def expire(*_: object) -> None:
        left = end - time.thread_time()
        if armed and left > 0:  # others had the processor
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
        elif armed:
            raise TimeUp

    before = signal.signal(signal.SIGALRM, expire)
    try:  # two of them: the signal may come between the end of the work and `armed = False`
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Raises BackyError for what is no regular expression."""
    import warnings

    if len(pattern) > MAX_SHELL_PATTERN:
        raise BackyError(f"a pattern of more than {MAX_SHELL_PATTERN} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would go to the log of the daemon
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise BackyError(f"{printable(pattern)!r} is no regular expression: {e}") from e


# Telnet: RFC 854 and 855.  We offer no option and accept none, so that the client
# stays in its line mode: it echoes and edits, and sends whole lines.

TELNET_EOF, TELNET_SE, TELNET_BREAK, TELNET_INTERRUPT = 236, 240, 243, 244
TELNET_ABORT_OUTPUT, TELNET_ARE_YOU_THERE, TELNET_ERASE_CHARACTER = 245, 246, 247
TELNET_ERASE_LINE, TELNET_SB, TELNET_WILL, TELNET_WONT = 248, 250, 251, 252
TELNET_DO, TELNET_DONT, TELNET_IAC = 253, 254, 255
REFUSAL = {TELNET_DO: TELNET_WONT, TELNET_WILL: TELNET_DONT}


class Key(Enum):
    """What a client says beside lines."""

    INTERRUPT = "^C"
    STOP_OUTPUT = "abort output"
    ARE_YOU_THERE = "are you there"
    TOO_LONG = "a line longer than may be"
    END = "^D"


TELNET_KEYS = {
    TELNET_EOF: Key.END,
    TELNET_BREAK: Key.INTERRUPT,
    TELNET_INTERRUPT: Key.INTERRUPT,
    TELNET_ABORT_OUTPUT: Key.STOP_OUTPUT,
    TELNET_ARE_YOU_THERE: Key.ARE_YOU_THERE,
}


class LineReader:
    """Bytes from a telnet client to lines and keys, byte by byte, in five states."""

    def __init__(self) -> None:
        self.line = bytearray()
        self.is_too_long = self.after_return = False
        self.verb = 0
        self.found: list[str | Key] = []
        self.answers = bytearray()
        self.state = self.text

    def read(self, received: bytes) -> tuple[list[str | Key], bytes]:
        """The lines and keys that are complete now, and what telnet wants to be answered."""
        for byte in received:
            self.state = self.state(byte)
        found, self.found = self.found, []
        answers, self.answers = bytes(self.answers), bytearray()
        return found, answers

    def text(self, byte: int) -> Callable[[int], Any]:
        if byte == TELNET_IAC:
            return self.command
        after_return, self.after_return = self.after_return, byte == 13
        if byte in (10, 13):
            if byte == 13 or not after_return:
                self.end_line()
        elif byte == 3:
            self.press(Key.INTERRUPT)
        elif byte == 4:
            self.press(Key.END)
        elif byte in (8, 127):
            del self.line[-1:]
        elif byte:  # NUL is for printers; behind a CR it belongs to the line end
            self.add(byte)
        return self.text

    def add(self, byte: int) -> None:
        if len(self.line) < MAX_SHELL_LINE:
            self.line.append(byte)
        else:
            self.is_too_long = True

    def end_line(self) -> None:
        line = self.line.decode("utf-8", "replace")
        self.found.append(Key.TOO_LONG if self.is_too_long else line)
        self.drop_line()

    def drop_line(self) -> None:
        self.line.clear()
        self.is_too_long = False

    def press(self, key: Key) -> None:
        if key is Key.INTERRUPT:
            self.drop_line()
        self.found.append(key)

    def command(self, byte: int) -> Callable[[int], Any]:
        if TELNET_WILL <= byte <= TELNET_DONT:
            self.verb = byte
            return self.option
        if byte == TELNET_SB:
            return self.subnegotiation
        if byte == TELNET_IAC:
            self.add(byte)
        elif byte == TELNET_ERASE_LINE:
            self.drop_line()
        elif byte == TELNET_ERASE_CHARACTER:
            del self.line[-1:]
        elif byte in TELNET_KEYS:
            self.press(TELNET_KEYS[byte])
        return self.text

    def option(self, byte: int) -> Callable[[int], Any]:
        """Refuse what is asked for or offered; WONT and DONT are no questions."""
        if self.verb in REFUSAL:
            self.answers += bytes((TELNET_IAC, REFUSAL[self.verb], byte))
        return self.text

    def subnegotiation(self, byte: int) -> Callable[[int], Any]:
        return self.subnegotiation_command if byte == TELNET_IAC else self.subnegotiation

    def subnegotiation_command(self, byte: int) -> Callable[[int], Any]:
        return self.text if byte == TELNET_SE else self.subnegotiation


# Commands: each yields its reply in pieces, so that a long one can be interrupted
# by whatever else the loop has to do.  An empty piece is nothing but a pause, and an
# Awaited one that lasts until the daemon knows something.


class Awaited:
    """What is not known yet; `tell` ends the waiting for it."""

    def __init__(self) -> None:
        self.value = ""
        self.is_known = False
        self.wake: Callable[[], None] = lambda: None

    def tell(self, value: str) -> None:
        self.value, self.is_known = value, True
        self.wake()


class ShellHost:
    """What the shell knows of the daemon."""

    def rows(self) -> list[dict[str, Any]]:
        """The entries of the status file, as they would be written now."""
        raise NotImplementedError

    def run(self, job: str) -> bool:
        """Let a job run now; False if there is none of that name."""
        raise NotImplementedError

    def run_all(self) -> list[str]:
        """Let all jobs run now; their names."""
        raise NotImplementedError

    def reload(self, told: Callable[[str], None]) -> None:
        """Read the configuration again, and tell what is wrong with it, or nothing."""
        raise NotImplementedError


def job_cells(row: dict[str, Any]) -> list[str]:
    """One line of the table of jobs; times without the UTC that stands in the header."""
    cells = []
    for key in JOB_KEYS_SHOWN:
        value = row.get(key)
        text = "-" if value is None else printable(value)[:200]
        cells.append(text[:-4] if key.endswith("_time") and text.endswith(" UTC") else text)
    return cells


def table_of_jobs(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The same as format_table() makes, in pieces."""
    widths = [len(column) for column in JOB_COLUMNS]
    is_right = [column == "Last Dur" for column in JOB_COLUMNS]
    lines = []
    for at, row in enumerate(rows, 1):
        lines.append(job_cells(row))
        widths = [max(width, len(cell)) for width, cell in zip(widths, lines[-1])]
        if at % SHELL_BATCH == 0:
            yield ""
    rule = table_rule(widths)
    yield rule + table_line(JOB_COLUMNS, widths, is_right) + rule
    for at in range(0, len(lines), SHELL_BATCH):
        batch = lines[at : at + SHELL_BATCH]
        yield "".join(table_line(cells, widths, is_right) for cells in batch)
    yield rule


def centred(text: str, width: int) -> str:
    """An odd blank goes behind a text of odd length, before an even one, as in 2.x."""
    left = (width - len(text) + (len(text) + 1) % 2) // 2
    return " " * left + text + " " * (width - len(text) - left)


def table_of_states(rows: list[dict[str, Any]]) -> str:
    """How many jobs are in which state."""
    counts: dict[str, int] = {}
    for row in rows:
        state = printable(row.get("status", "-"))[:200]
        counts[state] = counts.get(state, 0) + 1
    table = [("Status", "#"), *((state, str(counts[state])) for state in sorted(counts))]
    widths = [max(map(len, cells)) for cells in zip(*table)]
    header, *lines = [
        table_line([centred(*one) for one in zip(cells, widths)], widths, (False, False))
        for cells in table
    ]
    rule = table_rule(widths)
    return rule + header + rule + "".join(lines) + rule


def split_commands(line: str) -> list[list[str]]:
    """The words of each command; `;` separates commands, quotes keep blanks in a word."""
    commands: list[list[str]] = [[]]
    for quoted, double, word in re.findall(r"'([^']*)'|\"([^\"]*)\"|(;|[^\s;]+)", line):
        if word == ";":
            commands.append([])
        else:
            commands[-1].append(quoted or double or word)
    return [words for words in commands if words]


SHELL_LOOKS = {
    "jobs": ("[REGEX]", "list all jobs, or those in whose name REGEX is found"),
    "status": ("", "how many jobs are in which state"),
    "help": ("", "this list"),
    "quit": ("", "end the session"),
}
SHELL_TOUCHES = {
    "run": ("JOB", "run a job now"),
    "runall": ("", "run all jobs now"),
    "reload": ("", "read the configuration again"),
}
SHELL_WORDS = {**SHELL_LOOKS, **SHELL_TOUCHES}
SHELL_QUITS = ("quit", "exit")


class ShellCommands:
    """What can be typed; a method for each word."""

    def __init__(self, host: ShellHost, control: bool) -> None:
        self.host, self.control = host, control

    def reply(self, words: list[str]) -> Iterator[str | Awaited]:
        """Raises BackyError, or whatever the daemon has for a bug."""
        name, *arguments = words
        if name not in SHELL_WORDS:
            yield f"{printable(name)[:80]}: command not found.\n"
            return
        if name in SHELL_TOUCHES and not self.control:
            yield f"error: {name} is not allowed; 'telnet-control: yes' in backy.conf allows it\n"
            return
        form = SHELL_WORDS[name][0]
        if len(arguments) not in {"": (0,), "JOB": (1,)}.get(form, (0, 1)):
            yield f"Usage: {name} {form}".rstrip() + "\n"
            return
        yield from getattr(self, name)(*arguments)

    def jobs(self, pattern: str = "") -> Iterator[str]:
        rows = sorted(self.host.rows(), key=lambda row: str(row.get("job")))
        yield self.refused_reload(rows)
        if pattern:
            rows = yield from self.matching(rows, pattern)
        yield from table_of_jobs(rows)
        yield f"{len(rows)} jobs shown\n"

    def refused_reload(self, rows: list[dict[str, Any]]) -> str:
        for row in rows:
            error = (row.get("scheduler") or {}).get("reload_error", "-")
            if error not in ("-", "", None):
                first, *others = str(error).strip().splitlines() or ["?"]
                more = f" (and {len(others)} more lines)" if others else ""
                return f"The changed configuration is not in use: {printable(first)[:500]}{more}\n"
        return ""

    def matching(self, rows: list[dict[str, Any]], pattern: str) -> Any:
        """Those whose name the pattern is found in; all of them in SHELL_PATTERN_TIME."""
        found: list[dict[str, Any]] = []
        left = SHELL_PATTERN_TIME
        expression: re.Pattern[str] | None = None
        for at in range(0, max(len(rows), 1), SHELL_BATCH):
            started = time.thread_time()
            try:
                with time_limit(left):
                    expression = expression or compile_pattern(pattern)
                    search, batch = expression.search, rows[at : at + SHELL_BATCH]
                    found += [row for row in batch if search(str(row.get("job")))]
            except TimeUp:
                raise BackyError(
                    f"{printable(pattern)!r} takes longer than {SHELL_PATTERN_TIME * 1000:.0f} ms"
                ) from None
            left -= time.thread_time() - started
            yield ""
        return found

    def status(self) -> Iterator[str]:
        yield table_of_states(self.host.rows())

    def run(self, job: str) -> Iterator[str]:
        known = self.host.run(job)
        word = "Triggered immediate run for" if known else "Unknown job"
        yield f"{word} {printable(job)[:200]}\n"

    def runall(self) -> Iterator[str]:
        names = self.host.run_all()
        for at in range(0, len(names), SHELL_BATCH):
            batch = names[at : at + SHELL_BATCH]
            yield "".join(f"Triggered immediate run for {printable(name)}\n" for name in batch)

    def reload(self) -> Iterator[str | Awaited]:
        yield "Triggering daemon reload.\n"
        error = Awaited()
        self.host.reload(error.tell)
        yield error
        if not error.value:
            yield "Daemon configuration reloaded.\n"
            return
        for line in error.value.strip().splitlines()[:100]:
            yield f"Reload refused: {printable(line)[:500]}\n"

    def help(self) -> Iterator[str]:
        for name, (form, meaning) in (SHELL_WORDS if self.control else SHELL_LOOKS).items():
            yield f"{f'{name} {form}':14}{meaning}\n"
        if not self.control:
            yield f"'telnet-control: yes' in backy.conf also allows {', '.join(SHELL_TOUCHES)}.\n"


class ShellSession:
    """One client, from its connection to its end.

    waits for a line -> asked -> reply, piece by piece -> prompt -> waits for a line
             `-> is_ending: nothing more is read, what waits is still sent -> closed
    """

    PROMPT = f"\nbacky-{__version__} % "
    REQUEST = re.compile(r"(?:GET|POST) |[A-Z]+ .* HTTP/")  # a web browser was sent here

    def __init__(self, server: ShellServer, connection: Any, peer: str) -> None:
        self.server, self.connection, self.peer = server, connection, peer
        self.reader = LineReader()
        self.asked: list[str | Key] = []
        self.reply: Iterator[str | Awaited] | None = None
        self.awaited: Awaited | None = None  # what the reply cannot go on without
        self.unsent = bytearray()
        self.is_open, self.is_ending, self.has_asked = True, False, False
        self.opened = self.last_asked = self.last_sent = time.monotonic()
        self.write(self.PROMPT)
        self.watch()

    def watch(self) -> None:
        """Let the loop call us for what can be dealt with."""
        if not self.is_open:
            return
        full = len(self.asked) >= MAX_SHELL_QUEUE
        reading = 0 if self.is_ending or full else 1  # selectors.EVENT_READ
        writing = 2 if self.unsent else 0  # selectors.EVENT_WRITE
        if reading or writing:
            self.server.loop.watch(self.connection, reading | writing, self.ready)
        else:
            self.server.loop.forget(self.connection)

    def ready(self, events: int) -> None:
        try:
            if events & 2:
                self.send()
            if events & 1 and self.is_open and not self.is_ending:
                self.receive()
        except BlockingIOError:
            pass
        except OSError:  # the client is gone
            self.close()
        self.watch()

    def receive(self) -> None:
        received = self.connection.recv(4 * KiB)
        found, answers = self.reader.read(received)
        self.write(answers)
        if not received:
            found.append(Key.END)
        for one in found:
            if one in (Key.INTERRUPT, Key.STOP_OUTPUT):
                self.drop()
            self.asked.append(one)
            if one is Key.END:
                self.is_ending = True
                break
        if found:
            self.last_asked, self.has_asked = time.monotonic(), True
            self.server.wake(self)

    def write(self, text: str | bytes) -> None:
        """Send what fits; a client that does not read is dropped."""
        if isinstance(text, str):
            text = text.replace("\n", "\r\n").encode("utf-8", "replace")
        if not self.unsent:
            self.last_sent = time.monotonic()
        self.unsent += text
        if len(self.unsent) > MAX_SHELL_OUTPUT:
            self.close()

    def send(self) -> None:
        count = self.connection.send(memoryview(self.unsent)[:SHELL_WATERMARK].tobytes())
        del self.unsent[:count]
        self.last_sent = time.monotonic()
        if self.is_through:
            self.close()
        elif self.has_work:
            self.server.wake(self)

    def drop(self) -> None:
        """Nothing that was asked is to be answered any more."""
        self.asked.clear()
        self.reply = self.awaited = None

    @property
    def has_work(self) -> bool:
        can_go_on = self.asked or self.reply
        if self.awaited and not self.awaited.is_known:
            can_go_on = False
        return bool(self.is_open and can_go_on and len(self.unsent) < SHELL_WATERMARK)

    @property
    def is_through(self) -> bool:
        return self.is_ending and not (self.unsent or self.asked or self.reply)

    def step(self) -> None:
        """Go on with the reply, or with the next line, for SHELL_SLICE."""
        until = time.monotonic() + SHELL_SLICE
        while self.has_work and time.monotonic() < until:
            if self.reply is None:
                self.reply = self.answer(self.asked.pop(0))
            piece = next(self.reply, None)
            if piece is None:
                self.reply = None
            elif isinstance(piece, Awaited):
                self.awaited = piece
                piece.wake = lambda: self.server.wake(self)
            elif piece:
                self.write(piece)
        if self.is_through:
            self.close()
        self.watch()

    def answer(self, asked: str | Key) -> Iterator[str | Awaited]:
        """What one line or key leads to, with the next prompt."""
        if asked is Key.END:
            self.is_ending = True
            return
        if asked is Key.TOO_LONG:
            yield f"error: a line of more than {MAX_SHELL_LINE} bytes"
        elif asked is Key.ARE_YOU_THERE:
            yield f"\nbacky-{__version__}: yes"
        elif isinstance(asked, str) and self.REQUEST.match(asked):
            self.close()
            return
        elif isinstance(asked, str):
            yield from self.without_last_line_end(self.replies(asked))
        if not self.is_ending:
            yield self.PROMPT

    def without_last_line_end(self, pieces: Iterator[str | Awaited]) -> Iterator[str | Awaited]:
        """The prompt brings one itself."""
        held = ""
        for piece in pieces:
            if isinstance(piece, Awaited):
                yield held  # so that the line can be seen
                yield piece
                held = ""
                continue
            text = held + piece
            held = "\n" if text.endswith("\n") else ""
            yield text[:-1] if held else text

    def replies(self, line: str) -> Iterator[str | Awaited]:
        for words in split_commands(line):
            if words[0] in SHELL_QUITS:
                self.is_ending = True
                self.asked.clear()
                yield "Goodbye.\n\n"
                return
            log.debug("shell: %s: %s", self.peer, printable(" ".join(words)))
            if words[0] in SHELL_TOUCHES and self.server.commands.control:
                log.info("shell: %s from %s", printable(" ".join(words)), self.peer)
            try:
                yield from self.server.commands.reply(words)
            except BackyError as e:
                yield f"error: {printable(e)}\n"
            except Exception:  # a defect of ours must not end the daemon
                log.exception("shell: %s failed", printable(" ".join(words)))
                yield "error: this failed, the log says how\n"

    def expire(self, now: float) -> None:
        """End the session if nothing has happened for too long."""
        limit = SHELL_IDLE if self.has_asked else SHELL_SILENT
        if self.unsent and now - self.last_sent > SHELL_STALLED:
            self.close()
        elif now - self.last_asked > limit and not self.is_ending:
            self.drop()
            self.is_ending = True
            self.write(f"\nNothing was asked for {limit:.0f} s. Goodbye.\n")
            self.watch()
        elif now - self.last_asked > limit + SHELL_STALLED:
            self.close()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.reply = self.awaited = None
            self.server.loop.forget(self.connection)
            self.connection.close()
            self.server.sessions.discard(self)


class ShellServer:
    """Listens, and shares the time that the loop can spare among the sessions."""

    def __init__(self, loop: Loop, commands: ShellCommands) -> None:
        self.loop, self.commands = loop, commands
        self.listeners: list[Any] = []
        self.sessions: set[ShellSession] = set()
        self.waiting: list[ShellSession] = []  # sessions with work, the next one first
        self.worker: Timer | None = None
        self.sweeper: Timer | None = None

    @property
    def ports(self) -> list[int]:
        """One for each address that is listened on."""
        return [listener.getsockname()[1] for listener in self.listeners]

    def listen(self, address: str, port: int) -> None:
        """Raises OSError, and what else a bad address or port is good for."""
        for listener in listening_sockets(address, port):
            self.listeners.append(listener)
            self.watch(listener)

    def watch(self, listener: Any) -> None:
        if listener in self.listeners:
            self.loop.watch(listener, 1, lambda _: self.accept(listener))

    def accept(self, listener: Any) -> None:
        """Take a few connections; the others wait for the next turn."""
        for _ in range(MAX_SHELL_SESSIONS):
            try:
                connection, place = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as e:  # no descriptors, no memory: in a moment there may be some
                log.warning("shell: cannot accept a connection: %s", e.strerror)
                self.loop.forget(listener)
                self.loop.call_in(1.0, lambda: self.watch(listener))
                return
            self.admit(connection, f"{place[0]}:{place[1]}")

    def admit(self, connection: Any, peer: str) -> None:
        import socket

        connection.setblocking(False)
        self.make_room()
        if len(self.sessions) >= MAX_SHELL_SESSIONS:
            with suppress(OSError):
                connection.send(b"error: too many sessions, try again in a moment\r\n")
            connection.close()
            return
        with suppress(OSError):  # the byte of an urgent IAC DM stays where it belongs
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SHELL_WATERMARK)
        self.sessions.add(ShellSession(self, connection, peer))
        if self.sweeper is None:
            self.sweeper = self.loop.call_in(5.0, self.sweep)

    def make_room(self) -> None:
        """Close the oldest session that never said a word, if room is needed."""
        silent = [one for one in self.sessions if not one.has_asked]
        if len(self.sessions) >= MAX_SHELL_SESSIONS and silent:
            oldest = min(silent, key=lambda one: one.opened)
            if time.monotonic() - oldest.opened >= SHELL_SETTLED:
                oldest.close()

    def sweep(self) -> None:
        for session in list(self.sessions):
            session.expire(time.monotonic())
        self.sweeper = self.loop.call_in(5.0, self.sweep) if self.sessions else None

    def wake(self, session: ShellSession) -> None:
        """Let `session` have its step, in one of the next turns."""
        if session not in self.waiting:
            self.waiting.append(session)
        if self.worker is None:
            self.worker = self.loop.call_in(0, self.work)

    def work(self) -> None:
        """One step of one session; the rest of the daemon comes before the next one."""
        self.worker = None
        session = self.waiting.pop(0)
        session.step()
        if session.has_work:
            self.waiting.append(session)
        if self.waiting:
            self.worker = self.loop.call_in(0, self.work)

    def close(self) -> None:
        for session in list(self.sessions):
            session.close()
        for listener in self.listeners:
            self.loop.forget(listener)
            listener.close()
        self.listeners.clear()
        self.waiting.clear()
        for timer in (self.worker, self.sweeper):
            if timer:
                timer.cancel()


def open_shell(
    loop: Loop, addresses: Iterable[str], port: int, host: ShellHost, control: bool
) -> ShellServer:
    """Listen on all addresses that there are; what cannot be had is a warning."""
    server = ShellServer(loop, ShellCommands(host, control))
    for address in addresses:
        try:
            server.listen(address, port)
        except (OSError, OverflowError, UnicodeError) as e:
            reason = getattr(e, "strerror", None) or e
            log.warning("shell: cannot listen on %s port %s: %s", printable(address), port, reason)
            continue
        log.info("starting telnet server on %s:%s", printable(address), server.ports[-1])
        if not re.match(r"127\.|::1\Z|localhost\Z", address):
            log.warning("shell: %s is more than this host: others can look", printable(address))
    return server


# The other end, for hosts without a telnet program.

SHELL_PROMPT = re.compile(rb"\r\n(backy-[!-~]{1,40} % )\Z")
TELNET_COMMAND = re.compile(
    rb"\xff(?:\xfa(?:[^\xff]|\xff[^\xf0])*\xff\xf0|[\xfb-\xfe].|\xff|[^\xfa-\xff])", re.DOTALL
)
SHELL_PATIENCE = 60.0  # seconds without a byte
MAX_SHELL_REPLY = 64 * MiB


def without_telnet(received: bytes) -> bytes:
    return TELNET_COMMAND.sub(lambda one: b"\xff" if one[0] == b"\xff\xff" else b"", received)


def quote_word(word: str) -> str:
    """As split_commands() reads it."""
    if word and not re.search(r"[\s;'\"]", word):
        return word
    return f'"{word}"' if "'" in word else f"'{word}'"


class ShellClient:
    """A connection to the shell of a running scheduler."""

    def __init__(self, addresses: Iterable[str], port: int) -> None:
        """Raises BackyError if none of the addresses answers, or if there is no room."""
        import socket

        failures = []
        for address in addresses:
            try:
                self.connection = socket.create_connection((address, port), 10)
                break
            except OSError as e:
                failures.append(f"{printable(address)} port {port}: {e.strerror or e}")
        else:
            places = "; ".join(failures) or "no address"
            raise BackyError(f"cannot connect to the scheduler: {places}", "is it running?")
        self.connection.settimeout(SHELL_PATIENCE)
        self.prompt = ""
        greeting = self.receive()
        if not self.prompt:
            self.close()
            raise BackyError(f"the scheduler says: {greeting.strip() or 'nothing'}")

    def ask(self, line: str) -> str:
        """The reply to one line.  `prompt` is empty when the other side has ended it."""
        with explain("cannot reach the scheduler any more"):
            self.connection.sendall(line.encode("utf-8", "replace") + b"\r\n")
        return self.receive()

    def receive(self) -> str:
        """All up to the next prompt, or to the end."""
        received, self.prompt = bytearray(), ""
        while True:
            try:
                piece = self.connection.recv(64 * KiB)
            except ConnectionError:
                piece = b""
            except OSError as e:  # a timeout has no strerror
                raise BackyError(f"no answer from the scheduler: {e.strerror or e}") from e
            received += piece
            if len(received) > MAX_SHELL_REPLY:
                raise BackyError(f"the scheduler says more than {format_size(MAX_SHELL_REPLY)}")
            prompt = SHELL_PROMPT.search(received, max(0, len(received) - 100))
            if prompt or not piece:
                break
        text = bytes(received)
        if prompt:
            text, self.prompt = text[: prompt.start()], prompt[1].decode()
        lines = without_telnet(text).decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
        return "\n".join(map(printable, lines)).strip("\n")

    def close(self) -> None:
        self.connection.close()


# ==== Scheduler ==============================================================
#
# Makes the Timetable true: one loop, and a child for every backup, which runs this
# same file, so that a job that crashes or hangs takes nothing else down.  A job's
# turn in its slot:
#
#   prepare (clerk)  ->  backup (child)  ->  examine (clerk)  ->  expire (child)  ->  examine
#
# Whatever touches a disk that may be slow is left to the clerk, a thread; all that is
# decided, is decided in the loop.  Should this process be killed, its children go on:
# the next scheduler finds them by a word in their environment and takes them over.

PROGRAM = os.path.abspath(__file__)  # found before anybody changes the directory
if not os.path.isfile(PROGRAM):
    PROGRAM = os.path.dirname(PROGRAM)  # the archive that we are in

READABLE = 1  # selectors.EVENT_READ
TICK = 5.0  # seconds, after which the clock is looked at in any case
GRACE = 30.0  # between asking a child to end, killing it, and giving it up
SETTLING = 30.0  # for so long a start waits for the disk to say what revisions there are
UNREAD = 200.0  # for so long the status file waits for that; check takes five minutes for old
SLICE = 500  # jobs, of those that there is something to do for, in one turn of the loop
CLOCK_JUMP = 2.0  # seconds that the clock may go another way than the time, within a tick
LOG_TAIL = 64 * KiB  # of a job's log, in which its last error is looked for
STATE_LIMIT = 64 * MiB
MEMORY = ".scheduler"

CHILD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def identity_of(base: str | int) -> str:
    """Which directory it is, however it is spelled."""
    status = os.stat(base)
    return f"{status.st_dev:x}:{status.st_ino:x}"


def child_environment(directory: str, base: str) -> dict[str, str]:
    """All that a child gets of ours: nothing by which somebody could change what it runs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or (name.startswith("BACKY_") and value.startswith("/"))
    }
    return {**kept, "PATH": CHILD_PATH, "BACKY_JOB": directory, "BACKY_BASE": base}


def child_command(directory: str, *words: str) -> list[str]:
    place = ("-b", directory, "-l", os.path.join(directory, "backy.log"))
    return [sys.executable, "-I", "-S", PROGRAM, *place, *words]


class Child:
    """A process that we wait for: ours, or one that an earlier scheduler has started."""

    def __init__(
        self, loop: Loop, pid: int, process: Any, ended: Callable[[int | None], None]
    ) -> None:
        """`ended` gets the exit status, negative for a signal, None where it is not ours."""
        self.loop, self.pid, self.process, self.ended = loop, pid, process, ended
        self.fd = -1
        with suppress(AttributeError, OSError):  # Python 3.8, Linux before 5.3
            self.fd = os.pidfd_open(pid)
            loop.watch(self.fd, READABLE, lambda _: self.end())

    def look(self) -> None:
        """Where nothing wakes us at its end: see whether it has come."""
        if self.fd < 0 and self.is_over():
            self.end()

    def is_over(self) -> bool:
        try:
            if self.process is None:
                with open(f"/proc/{self.pid}/stat", "rb") as file:
                    return file.read().rpartition(b")")[2].split()[0] == b"Z"
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, flags) is not None
        except OSError:
            return True

    def end(self) -> None:
        """Report the end; nobody of its process group outlives it."""
        if self.fd >= 0:
            self.loop.forget(self.fd)
            close(self.fd)
        status = None
        if self.process is not None:
            self.signal(signal.SIGKILL)  # it is not yet waited for, so the group is still its own
            status = self.process.wait()
        self.ended(status)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def find_children(base: str | int) -> Iterator[tuple[str, str, int, datetime]]:
    """(job, step, pid, since) of what an earlier scheduler of this directory has left running."""
    mark = os.fsencode(f"BACKY_BASE={identity_of(base)}")
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                words = file.read().split(b"\0")
                is_ours = os.fstat(file.fileno()).st_uid == os.geteuid()
            if mark not in words or not is_ours or os.getpgid(int(name)) != int(name):
                continue
            (directory,) = [word[10:] for word in words if word.startswith(b"BACKY_JOB=")]
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read().split(b"\0")
            steps = [step for step in ("backup", "expire") if step.encode() in command]
            if directory not in command or not steps:
                continue  # something that a child has started
            with open(f"/proc/{name}/stat", "rb") as file:
                ticks = int(file.read().rpartition(b")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            continue  # it has just ended, or belongs to somebody else
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        since = datetime.now(UTC) - timedelta(seconds=max(0.0, age))
        yield os.path.basename(os.fsdecode(directory)), steps[0], int(name), since


# -- the disk -------------------------------------------------------------------


class Task:
    """A piece of work for the clerk, and whom to tell in the loop."""

    def __init__(
        self,
        work: Callable[[], Any],
        done: Callable[[Any], None],
        hung: Callable[[], None],
        patience: float,
    ) -> None:
        self.work, self.done, self.hung, self.patience = work, done, hung, patience
        self.began = self.looked_at = self.used = 0.0
        self.clock = -1  # of the CPU time of its thread
        self.waits = self.is_late = False

    def begin(self) -> None:
        """In the thread that does it."""
        self.began = self.looked_at = time.monotonic()
        self.clock = time.pthread_getcpuclockid(threading.get_ident())
        self.used = time.clock_gettime(self.clock)

    def look_at(self, now: float) -> None:
        """See whether it has waited since the last look; only as long as its thread is there."""
        used = time.clock_gettime(self.clock)
        self.waits = used - self.used < (now - self.looked_at) / 50
        self.looked_at, self.used = now, used

    def result(self) -> Any:
        try:
            return self.work()
        except BackyError as e:
            return e
        except BaseException as e:
            log.exception("a defect of backy")
            return BackyError(f"{type(e).__name__}: {printable(e)}")


class Clerk:
    """A thread that does what may have to wait for a disk, the most urgent first.

    Each piece of work is a function; what it returns is given to another one in the
    loop.  While one waits for long, a new thread goes on with the rest; while one
    computes, only with what is more urgent, for the loop needs the interpreter too.
    When one does not return at all, a disk is dead: that is told to a third function.
    """

    SHORT = 0.05  # seconds that all others may have to wait for one
    PATIENCE = 60.0  # seconds until one is taken for hung
    MOST = 100  # pieces of work at once
    MOST_COMPUTING = 2  # of them that do not wait for a disk
    AT_ONCE = 100  # results that are taken in one turn of the loop

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.tasks: list[tuple[int, int, Task]] = []
        self.numbers = itertools.count()
        self.results: list[tuple[Callable[[Any], None], Any]] = []
        self.condition = threading.Condition()
        self.busy: set[Task] = set()
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        loop.watch(self.read_fd, READABLE, lambda _: self.deliver())
        self.task: Task | None = None  # what the thread is at
        self.urgency = 0  # of that
        self.thread: threading.Thread | None = None
        with self.condition:
            self.engage()

    def engage(self) -> None:
        """Begin with a new thread.  Raises RuntimeError if there can be none."""
        thread = threading.Thread(target=self.work, daemon=True)
        thread.start()  # it waits for the condition, which is held
        self.thread, self.task = thread, None

    def submit(
        self,
        urgency: int,
        work: Callable[[], Any],
        done: Callable[[Any], None],
        hung: Callable[[], None] | None = None,
        patience: float = 1.0,
    ) -> None:
        """Do `work` when its turn comes, 0 before 1; a BackyError of it is a result too.

        `hung` is called when it takes longer than `patience` times PATIENCE.
        """
        with self.condition:
            task = Task(work, done, hung or self.complain, patience * self.PATIENCE)
            heapq.heappush(self.tasks, (urgency, next(self.numbers), task))
            self.condition.notify()

    def complain(self) -> None:
        log.error("a disk does not answer for %d seconds, going on without", self.PATIENCE)

    def work(self) -> None:
        me = threading.current_thread()
        while True:
            with self.condition:
                while self.thread is me and not self.tasks:
                    self.condition.wait()
                if self.thread is not me:
                    return
                self.urgency, _, task = heapq.heappop(self.tasks)
                self.task = task
                task.begin()
                self.busy.add(task)
            result = task.result()
            with self.condition:
                self.busy.discard(task)
                if self.thread is me:
                    self.task = None
                self.results.append((task.done, result))
                self.condition.notify_all()
            with suppress(OSError):
                os.write(self.write_fd, b"x")

    def deliver(self) -> None:
        with suppress(OSError):
            os.read(self.read_fd, 4096)
        with self.condition:
            results = self.results[: self.AT_ONCE]
            del self.results[: self.AT_ONCE]
            if self.results:
                self.loop.call_in(0, self.deliver)
        for done, result in results:
            done(result)

    def close(self) -> None:
        """Let it finish what it is at, if that does not take long, and drop the rest."""
        with self.condition:
            self.thread = None
            self.tasks.clear()
            self.condition.notify_all()
            self.condition.wait_for(lambda: not self.busy, 5.0)

    @property
    def is_held_up(self) -> bool:
        """Whether there is work that waits for other work."""
        return bool(self.tasks and self.task)

    def check(self) -> None:
        """Go on with another thread when this one is held up, perhaps for ever."""
        now = time.monotonic()
        with self.condition:
            task = self.task
            for one in self.busy:
                if now - one.looked_at > self.SHORT:
                    one.look_at(now)
            computing = sum(not one.waits for one in self.busy)
            is_urgent = self.is_held_up and self.tasks[0][0] < self.urgency
            if (
                self.is_held_up
                and now - task.began > self.SHORT
                and (task.waits or (is_urgent and computing < self.MOST_COMPUTING))
                and len(self.busy) < self.MOST
            ):
                with suppress(RuntimeError):  # then the others have to wait
                    self.engage()
            late = [
                task for task in self.busy if not task.is_late and now - task.began > task.patience
            ]
        for task in late:
            task.is_late = True
            task.hung()


@dataclass(frozen=True)
class History:
    """What the directory of a job says about it."""

    past: tuple[Past, ...] | None = ()  # None: it cannot be read
    newest: str = ""  # the id of the newest complete revision
    trust: str = "-"
    problem: str = ""
    state: tuple[int, int] | None = None  # of the directory when it was read


class QuietRepository(Repository):
    """A repository whose problems are shown with the job and not logged again and again."""

    def tell_once(self, name: str, what: str) -> None:
        pass


def directory_state(path: str) -> tuple[int, int] | None:
    """What changes with the names in a directory, and never stays as it is while they do."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    recent = abs(time.time_ns() - status.st_mtime_ns) < 1_000_000_000
    return status.st_ino, 0 if recent else status.st_mtime_ns


class Survey:
    """Looks for a second which of some jobs' directories have changed."""

    def __init__(self, places: list[tuple[str, str, tuple[int, int] | None]]) -> None:
        """`places` are name, path and state when it was read, the first one last."""
        self.left = places
        self.name = ""  # of the one that is being looked at
        self.changed: list[str] = []
        self.is_given_up = False

    def work(self) -> None:
        until = time.monotonic() + 1.0
        while self.left and not self.is_given_up and time.monotonic() < until:
            self.name, path, state = self.left.pop()
            if directory_state(path) != state and not self.is_given_up:
                self.changed.append(self.name)


def read_history(directory: str) -> History:
    """The complete revisions, and what is wrong in the directory."""
    state = directory_state(directory)
    try:
        with QuietRepository.open(directory) as repository:
            complete = [one for one in repository.complete if not one.problem]
            unread = [f"{printable(name)}: {what}" for name, what in repository.problems]
            useless = [f"{one.id}: {one.problem}" for one in repository.complete if one.problem]
    except NotFound:
        return History(state=state)
    except BackyError as e:
        return History(past=None, problem=str(e), state=state)
    problems = unread + useless
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return History(
        tuple(Past(one.timestamp, one.tags, one.duration or 0.0) for one in complete),
        complete[-1].id if complete else "",
        complete[-1].trust.value if complete else "-",
        printable(problems[0] + more) if problems else "",
        state,
    )


def lock_holder(dir_fd: int) -> str:
    """Who holds the job, or nothing."""
    fd = open_regular(dir_fd, ".lock", os.O_RDWR | os.O_CREAT)
    try:
        if take_lock(fd):
            return ""
        holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
        return printable(holder) or "another process"
    finally:
        close(fd)


def prepare_directory(directory: str, config: bytes, base_fd: int) -> tuple[int, str]:
    """Make it ready for a run; a descriptor of the job's log, and who holds the job already."""
    base = os.path.dirname(directory)
    with explain(f"cannot examine {printable(base)}"):
        if not os.path.samestat(os.stat(base), os.fstat(base_fd)):
            raise BackyError(
                f"{printable(base)} is not the directory it was: unmounted, or another one",
                "put it right, and restart the scheduler",
            )
    with explain("cannot create the directory"), suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    dir_fd = open_directory(directory)
    try:
        with explain("cannot write config"):
            current = None
            with suppress(FileNotFoundError):
                current = read_small(dir_fd, "config")
            if current != config:
                replace_file(dir_fd, "config", config, 0o600)
        with explain("cannot lock"):
            holder = lock_holder(dir_fd)
        with explain("cannot open backy.log"):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            return open_regular(dir_fd, "backy.log", flags), holder
    finally:
        close(dir_fd)


def last_error(log_fd: int, start: int) -> str:
    """What a child wrote to its log last, from `start` on, of what went wrong."""
    try:
        size = os.fstat(log_fd).st_size
        text = os.pread(log_fd, LOG_TAIL, max(start, size - LOG_TAIL)).decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition(" ERROR ")[2] for line in lines]
    errors = [error for error in errors if error and not error.startswith("hint: ")]
    words = errors or [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d ", line)]
    return printable(words[-1])[:500] if words else ""


def describe_end(status: int, said: str, job: str) -> str:
    """`cannot open source /vm1.img: Permission denied (exit status 1)`."""
    how = f"exit status {status}"
    if status < 0:
        with suppress(ValueError):
            how = f"ended by {signal.Signals(-status).name}"
    if said.startswith(f"{job}: "):
        said = said[len(job) + 2 :]
    return f"{said} ({how})" if said else how


def sweep_temporaries(directory: str) -> None:
    """Remove what a scheduler that was killed has left unfinished."""
    with suppress(OSError):
        for name in os.listdir(directory):
            if is_temporary(name):
                os.unlink(os.path.join(directory, name))


def load_memory(base_fd: int) -> object:
    """What an earlier scheduler remembered of the jobs; nothing, if that cannot be read."""
    import json

    try:
        return json.loads(read_small(base_fd, MEMORY, STATE_LIMIT))["jobs"]
    except FileNotFoundError:
        log.debug("no %s yet: no failures are known, and all jobs are new", MEMORY)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        log.warning("cannot read %s, failures are not known: %s", MEMORY, printable(e))
    return {}


def save_memory(base_fd: int, jobs: dict[str, dict[str, Any]]) -> None:
    import json

    with explain(f"cannot write {MEMORY}"):
        replace_file(base_fd, MEMORY, json.dumps({"version": 1, "jobs": jobs}).encode(), 0o600)


def show_time(moment: datetime | None) -> str:
    return f"{format_time(moment)} UTC" if moment else "-"


def show_tags(tags: tuple[str, ...], schedule: Schedule) -> str:
    """The tags of the schedule, the most frequent first, behind all others."""
    own = [tag for tag in schedule.tags if tag in tags]
    return ",".join([tag for tag in tags if tag not in own] + own) or "-"


class Row:
    """What the status file says of a job, made anew only when something has changed."""

    def __init__(self, late_at: datetime, values: dict[str, Any]) -> None:
        self.late_at, self.values = late_at, values
        self.text = ""  # in YAML, made by the clerk


def write_status(path: str, rows: list[Row], about: dict[str, Any]) -> tuple[float, int, int]:
    """Put the status file in its place; how long that took, and the space that is left."""
    began = time.monotonic()
    with explain(f"cannot write {printable(path)}"):
        space = os.statvfs(about["base_dir"])
        about["free"] = space.f_bavail * space.f_frsize
        about["size"] = space.f_blocks * space.f_frsize
        for row in rows:
            row.text = row.text or format_yaml([row.values])
        texts = [row.text for row in rows]
        if rows:
            texts[0] = format_yaml([{**rows[0].values, "scheduler": about}])
        data = "".join(texts or ["[]\n"]).encode()
        dir_fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            replace_file(dir_fd, os.path.basename(path), data, 0o644, durable=False)
        finally:
            close(dir_fd)
    return time.monotonic() - began, about["free"], about["size"]


# -- systemd --------------------------------------------------------------------


class ServiceManager:
    """systemd, if it has started us, told what we are at; see sd_notify(3)."""

    def __init__(self) -> None:
        self.address = os.environ.pop("NOTIFY_SOCKET", "")
        owner = os.environ.pop("WATCHDOG_PID", "")
        interval = os.environ.pop("WATCHDOG_USEC", "")
        ours = owner in ("", str(os.getpid()))
        self.watchdog = 0.0  # seconds between two signs of life
        if ours and re.fullmatch("[0-9]{1,15}", interval, re.ASCII):
            self.watchdog = int(interval) / 2_000_000
        self.told = ""

    def tell(self, text: str) -> None:
        if self.address[:1] not in ("/", "@"):
            return
        import socket

        address = self.address.replace("@", "\0", 1) if self.address[0] == "@" else self.address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as connection:
            connection.sendto(text.encode(), address)

    def show(self, text: str) -> None:
        """What `systemctl status` shows."""
        if text != self.told:
            self.told = text
            self.tell(f"STATUS={text}")


# -- the whole ------------------------------------------------------------------


SILENT = "its directory does not answer"


class JobRun:
    """A job's turn in its slot."""

    def __init__(self, job: TimedJob, directory: str, max_runtime: timedelta) -> None:
        self.job, self.directory, self.max_runtime = job, directory, max_runtime
        self.newest = ""  # revision before it
        self.taken_over: datetime | None = None  # it began then, and what was before is not known
        self.child: Child | None = None
        self.step = "backup"
        self.log_fd, self.log_start = -1, 0
        self.timer: Timer | None = None
        self.verdict = ""  # why we have ended it
        self.is_lost = False  # given up

    @property
    def name(self) -> str:
        return self.job.name


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that come inside be dealt with at the end, by the handlers of then."""
    held = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_base(settings: Settings) -> tuple[int, int]:
    """Descriptors of the base directory and of its lock, which is held as long as it is open."""
    base = printable(settings.base_dir)
    with explain(f"cannot open base-dir {base}"):
        base_fd = os.open(settings.base_dir, os.O_RDONLY | os.O_DIRECTORY)
    with explain(f"cannot lock {base}"):
        lock_fd = open_regular(base_fd, ".lock", os.O_RDWR | os.O_CREAT)
        if not take_lock(lock_fd):
            pid = printable(os.pread(lock_fd, 20, 0).decode("utf-8", "replace").strip())
            raise Busy(f"another scheduler works on {base} already: pid {pid or 'unknown'}")
        os.ftruncate(lock_fd, 0)
        write_all(lock_fd, f"{os.getpid()}\n".encode(), 0)
    return base_fd, lock_fd


def load_for_reload(path: str) -> Settings:
    """Also find out now what is slow and would hold up the loop."""
    settings = load_settings(path)
    for job in settings.jobs.values():
        spread_of(job.name, job.schedule)
    return settings


class Scheduler(ShellHost):
    """The daemon: its jobs, their runs, and what is shown of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.base_fd, self.lock_fd = take_base(settings)
        self.base = identity_of(self.base_fd)
        self.manager = ServiceManager()
        self.started = datetime.now(UTC)
        self.loop = Loop()
        self.catch_signals()
        self.clerk = Clerk(self.loop)
        self.timetable = Timetable()
        self.runs: dict[str, JobRun] = {}
        self.histories: dict[str, History] = {}
        self.unread: set[str] = set()  # jobs whose directories have not been looked at yet
        self.unread_until = 0.0  # for so long nobody is told of that
        self.reading: dict[str, object] = {}  # by name, which of the readings counts
        self.silent: set[str] = set()  # jobs whose directories do not answer
        self.after_run: dict[str, str] = {}  # what went wrong after a success
        self.rows_made: dict[str, Row] = {}
        self.space = (0, 0)
        self.reload_error = ""
        self.is_reloading = False
        self.reload_asked: list[Callable[[str], None]] = []  # who waits for the next reload
        self.status_error = self.memory_error = ""
        self.memory: object = None
        self.is_writing = self.is_saving = self.is_ready = self.is_settled = False
        self.is_dirty = True
        self.status_due = self.status_allowed = 0.0
        self.stopping = 0  # signals that asked us to end
        self.clock = (time.monotonic(), time.time())
        self.shell: ShellServer | None = None

    # -- life -------------------------------------------------------------------

    def run_until_stopped(self) -> None:
        """Work until a signal ends it."""
        self.begin()
        while not (self.stopping and all(run.is_lost for run in self.runs.values())):
            self.loop.turn(self.pause())
            self.tick()
        self.end()

    def begin(self) -> None:
        os.chdir("/")
        null_fd = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null_fd, 0)
        close(null_fd)
        for directory in {self.settings.base_dir, os.path.dirname(self.settings.status_file)}:
            sweep_temporaries(directory)
        now = datetime.now(UTC)
        gc.disable()  # until everything has been read
        self.memory = load_memory(self.base_fd)
        self.timetable.recall(self.memory, now)
        self.configure(now)
        self.adopt_children()
        self.open_shell()
        place = unmounted_above(self.settings.base_dir)
        if place:
            log.warning("%s is in /etc/fstab and not mounted", printable(place))
        log.info("scheduler started: %s", count_of(len(self.timetable.jobs), "job"))
        self.loop.call_in(SETTLING, self.settle)
        self.keep_alive()
        self.poll()

    def settle(self) -> None:
        """Every directory has been read, or would take too long: now jobs may start."""
        if not self.is_settled:
            self.is_settled = True
            self.status_due = 0.0

    def pause(self) -> float:
        """Seconds until the next job is due, as far as that is to be seen."""
        most = self.clerk.SHORT if self.clerk.is_held_up else TICK
        moment = self.timetable.next_moment()
        if moment is None or not self.is_settled or self.stopping:
            return most
        return min(most, max(0.0, (moment - datetime.now(UTC)).total_seconds()))

    def tick(self) -> None:
        """What is looked at in every turn of the loop."""
        self.check_clock()
        self.clerk.check()
        for run in list(self.runs.values()):
            if run.child:
                run.child.look()
        if self.is_settled and not self.stopping:
            for job in self.timetable.start(datetime.now(UTC)):
                self.start(job)
        self.arrange_status()

    def check_clock(self) -> None:
        steady, wall = time.monotonic(), time.time()
        jump = (wall - self.clock[1]) - (steady - self.clock[0])
        self.clock = steady, wall
        if abs(jump) > CLOCK_JUMP:
            log.warning("the clock was set by %+.0f seconds, or the host slept", jump)
            self.reckon_anew(list(self.timetable.jobs))
            self.is_dirty = True

    def reckon_anew(self, names: list[str]) -> None:
        """All jobs, but not all at once."""
        now = datetime.now(UTC)
        self.timetable.reckon_anew(now, names[:SLICE])
        self.make_rows([name for name in names[:SLICE] if name in self.timetable.jobs])
        if names[SLICE:]:
            self.loop.call_in(0, lambda: self.reckon_anew(names[SLICE:]))

    def keep_alive(self) -> None:
        if self.manager.watchdog:
            self.manager.tell("WATCHDOG=1")
            self.loop.call_in(self.manager.watchdog, self.keep_alive)

    def end(self) -> None:
        """The last words: what is remembered, and how everything stands."""
        self.clerk.close()
        with suppress(BackyError):
            save_memory(self.base_fd, self.timetable.remember())
        with suppress(BackyError):
            write_status(self.settings.status_file, self.make_rows(), self.about())
        log.info("scheduler ended")

    # -- signals ----------------------------------------------------------------

    def catch_signals(self) -> None:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.loop.watch(read_fd, READABLE, lambda _: self.take_signals(read_fd))

    def take_signals(self, read_fd: int) -> None:
        with suppress(BlockingIOError):
            for number in os.read(read_fd, 512):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.stop(number)
                elif number == signal.SIGHUP and not self.stopping:
                    log.info("Received signal SIGHUP")
                    self.reload()

    def stop(self, number: int) -> None:
        """Start nothing more, and end what runs; asked twice, end it at once."""
        log.info("Received signal %s", signal.Signals(number).name)
        self.stopping += 1
        if self.stopping > 1:
            self.signal_children(signal.SIGKILL)
            return
        self.manager.tell("STOPPING=1")
        self.manager.show("waiting for backups to end")
        log.info("Terminating all tasks")
        if self.shell:
            self.shell.close()
        self.signal_children(signal.SIGTERM)
        self.loop.call_in(GRACE, lambda: self.signal_children(signal.SIGKILL))
        self.loop.call_in(2 * GRACE, self.leave_children)
        self.ask_for_time()

    def ask_for_time(self) -> None:
        self.manager.tell("EXTEND_TIMEOUT_USEC=30000000")
        self.loop.call_in(10.0, self.ask_for_time)

    def signal_children(self, number: int) -> None:
        for run in self.runs.values():
            if run.child:
                run.child.signal(number)

    def leave_children(self) -> None:
        for run in self.runs.values():
            if not run.is_lost:
                log.error("%s: its backup cannot be ended and is left behind", run.name)
                run.is_lost = True

    # -- configuration ----------------------------------------------------------

    def configure(self, now: datetime) -> None:
        """Let the timetable have the jobs of the settings."""
        jobs = self.settings.jobs
        schedules = {name: job.schedule for name, job in jobs.items()}
        moved = self.timetable.configure(schedules, self.settings.worker_limit, now)
        self.reckon_anew(moved)
        self.forget_removed()
        new = [name for name in jobs if name not in self.histories and name not in self.silent]
        self.unread = set(new)
        self.unread_until = time.monotonic() + UNREAD
        self.look_at_all(new)
        if not self.unread:
            self.settle()
        self.is_dirty = True

    def forget_removed(self) -> None:
        """What is known of jobs that are not configured any more, and do not run."""
        jobs = self.timetable.jobs
        if len(self.histories) + len(self.rows_made) <= 2 * len(jobs):
            return
        for table in (self.histories, self.after_run, self.rows_made):
            for name in [name for name in table if name not in jobs and name not in self.runs]:
                del table[name]

    def reload(self, told: Callable[[str], None] = lambda _: None) -> None:
        """Take over the configuration as it is now, or nothing of it, and tell what is wrong.

        It is read by the clerk, since ten thousand jobs take seconds.
        """
        self.reload_asked.append(told)
        if not self.is_reloading:
            self.begin_reload()

    def begin_reload(self) -> None:
        self.is_reloading = True
        asked, self.reload_asked = self.reload_asked, []
        path = self.settings.path
        gc.disable()  # to look for garbage among so much takes longer than a job may wait

        def done(settings: Any) -> None:
            self.is_reloading = False
            self.decide_on(settings)
            self.keep_from_collector()
            for told in asked:
                told(self.reload_error)
            if self.reload_asked and not self.stopping:  # it may have changed since
                self.begin_reload()

        self.tell_reloading()
        self.clerk.submit(1, lambda: load_for_reload(path), done)

    @staticmethod
    def keep_from_collector() -> None:
        """What is there now stays; only what comes is garbage some day."""
        gc.freeze()
        gc.enable()

    def tell_reloading(self) -> None:
        self.manager.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def decide_on(self, settings: Any) -> None:
        """Take the settings over, or refuse them, or the errors that came instead of them."""
        if isinstance(settings, Settings) and settings.base_dir != self.settings.base_dir:
            settings = BackyError(
                f"base-dir cannot change from {printable(self.settings.base_dir)} to "
                f"{printable(settings.base_dir)} while the scheduler runs: restart it"
            )
        if isinstance(settings, Settings):
            self.take_over(settings)
            self.reload_error = ""
            log.info("configuration reloaded: %s", count_of(len(settings.jobs), "job"))
        else:
            for line in str(settings).splitlines():
                log.error("%s", line)
            log.error("the configuration is refused, the old one stays in force")
            self.reload_error = str(getattr(settings, "summary", settings)).splitlines()[0]
        self.is_dirty = True
        self.manager.tell("READY=1")

    def take_over(self, settings: Settings) -> None:
        old, self.settings = self.settings, settings
        self.configure(datetime.now(UTC))
        self.status_due = 0.0
        self.remember()
        if any(
            getattr(old, key) != getattr(settings, key)
            for key in ("telnet_addrs", "telnet_port", "telnet_control")
        ):
            self.loop.call_in(0.1, self.open_shell)  # who has asked for this gets the answer

    def open_shell(self) -> None:
        if self.stopping:
            return
        if self.shell:
            self.shell.close()
        settings = self.settings
        self.shell = open_shell(
            self.loop,
            settings.telnet_addrs,
            settings.telnet_port,
            self,
            settings.telnet_control,
        )

    def run(self, job: str) -> bool:
        return self.timetable.run(job, datetime.now(UTC))

    def run_all(self) -> list[str]:
        names = list(self.timetable.jobs)
        for name in names:
            self.timetable.run(name, datetime.now(UTC), first=False)
        return names

    # -- what is on the disk ------------------------------------------------------

    def directory(self, name: str) -> str:
        return os.path.join(self.settings.base_dir, name)

    def poll(self) -> None:
        """Look which directories have changed, and again after a while."""
        self.survey(
            [
                (name, self.directory(name), history.state)
                for name, history in self.histories.items()
                if name not in self.runs and name not in self.silent
            ]
        )

    def survey(self, places: list[tuple[str, str, tuple[int, int] | None]]) -> None:
        survey = Survey(places)

        def done(_: object) -> None:
            if survey.is_given_up:
                self.silent.discard(survey.name)
                self.look_at(survey.name)
                return
            go_on()

        def hung() -> None:
            survey.is_given_up = True
            self.fall_silent(survey.name)
            go_on()

        def go_on() -> None:
            for name in survey.changed:
                self.look_at(name)
            if survey.left:
                self.survey(survey.left)
            else:
                pause = max(1.0, self.settings.status_interval.total_seconds())
                self.loop.call_in(pause, self.poll)

        self.clerk.submit(3, survey.work, done, hung)

    def look_at_all(self, names: list[str]) -> None:
        for name in names[:SLICE]:
            self.look_at(name)
        if names[SLICE:]:
            self.loop.call_in(0, lambda: self.look_at_all(names[SLICE:]))

    def look_at(self, name: str) -> None:
        """Have the directory of a job read."""
        if name in self.reading or name in self.runs:
            return
        reading = self.reading[name] = object()
        directory = self.directory(name)

        def done(history: Any) -> None:
            self.silent.discard(name)
            if self.reading.get(name) is reading:
                del self.reading[name]
                self.learn(name, history)

        self.clerk.submit(2, lambda: read_history(directory), done, lambda: self.fall_silent(name))

    def fall_silent(self, name: str) -> None:
        """Its directory does not answer; until it does, nothing is tried there."""
        log.error("%s: %s", name, SILENT)
        self.silent.add(name)
        self.timetable.changed.add(name)
        self.has_read(name)

    def learn(self, name: str, history: Any) -> None:
        if name in self.timetable.jobs:
            self.note_history(name, history)
            self.timetable.learn(name, self.past(name), datetime.now(UTC))
            self.make_rows([name])
        self.has_read(name)

    def has_read(self, name: str) -> None:
        if name in self.unread:
            self.unread.discard(name)
            self.is_dirty = True
            if not self.unread:
                self.settle()

    def note_history(self, name: str, history: Any) -> None:
        before = self.histories.get(name, History())
        if isinstance(history, BackyError):
            history = History(past=None, problem=str(history))
        if history.past is None:  # what was known is still better than nothing
            history = replace(history, past=before.past, newest=before.newest, trust=before.trust)
        self.histories[name] = history
        if history != before:
            if history.problem and history.problem != before.problem:
                log.warning("%s: %s", name, history.problem)
            self.timetable.changed.add(name)
            self.is_dirty = True

    def past(self, name: str) -> tuple[Past, ...]:
        return self.histories.get(name, History()).past or ()

    # -- runs ---------------------------------------------------------------------

    def enter(self, job: TimedJob, max_runtime: timedelta) -> JobRun:
        """The job is in its slot now; what is read of it meanwhile counts for nothing."""
        run = self.runs[job.name] = JobRun(job, self.directory(job.name), max_runtime)
        self.reading.pop(job.name, None)
        self.is_dirty = True
        return run

    def start(self, job: TimedJob) -> None:
        """A slot is free and it is this job's turn."""
        settings = self.settings.jobs[job.name]
        run = self.enter(job, settings.max_runtime)
        if job.name in self.silent:
            self.finish(run, SILENT)
            return
        due = job.due.strftime("%Y-%m-%dT%H:%M:%SZ") if job.due else "now"
        tags = ",".join(job.tags)
        log.info("%s: running backup [%s] due %s (%s)", job.name, tags, due, job.reason)
        self.limit_runtime(run, settings.max_runtime)
        config = job_config(settings)

        def work() -> Any:
            log_fd, holder = prepare_directory(run.directory, config, self.base_fd)
            return log_fd, os.fstat(log_fd).st_size, holder, read_history(run.directory)

        def undo(result: Any) -> None:
            if isinstance(result, tuple):
                close(result[0])

        self.examine(run, work, self.prepared, undo)

    def limit_runtime(self, run: JobRun, left: timedelta) -> None:
        if run.timer:
            run.timer.cancel()
        run.timer = self.loop.call_in(left.total_seconds(), lambda: self.end_hung(run))

    def examine(
        self,
        run: JobRun,
        work: Callable[[], Any],
        done: Callable[[JobRun, Any], None],
        undo: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Do something in the directory of a run, which is over if that does not answer."""

        def answered(result: Any) -> None:
            self.silent.discard(run.name)
            if self.runs.get(run.name) is run:
                done(run, result)
                return
            undo(result)
            self.look_at(run.name)

        def hung() -> None:
            if self.runs.get(run.name) is run:
                self.fall_silent(run.name)
                if run.child is None:
                    self.over(run, SILENT)

        self.clerk.submit(0, work, answered, hung, patience=5)  # a directory may be large

    def over(self, run: JobRun, error: str) -> None:
        """A step of the run has failed."""
        if run.step == "expire":
            self.expired(run, error)
        else:
            self.finish(run, error)

    def prepared(self, run: JobRun, result: Any) -> None:
        if isinstance(result, BackyError):
            self.finish(run, str(result))
            return
        run.log_fd, run.log_start, holder, history = result
        self.note_history(run.name, history)
        run.newest = self.histories.get(run.name, History()).newest
        if holder:
            log.warning("%s: is held by %s, waiting for that", run.name, holder)
        if holder or self.stopping or run.verdict:
            self.finish(run, run.verdict)
        else:
            self.spawn(run, "backup", ",".join(run.job.tags))

    def spawn(self, run: JobRun, step: str, *words: str) -> None:
        """Start a child for one step of the run."""
        import subprocess

        run.step = step
        try:
            process = subprocess.Popen(
                child_command(run.directory, step, *words),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if step == "expire" else run.log_fd,
                stderr=run.log_fd,
                start_new_session=True,
                env=child_environment(run.directory, self.base),
            )
        except OSError as e:
            self.finish(run, f"cannot start {step}: {e.strerror or e}")
            return
        run.child = Child(self.loop, process.pid, process, lambda status: self.ended(run, status))

    def adopt_children(self) -> None:
        """Take over what an earlier scheduler that was killed has left running."""
        for name, step, pid, since in find_children(self.base_fd):
            settings = self.settings.jobs.get(name)
            if not self.timetable.adopt(name, since):
                log.warning("%s: pid %d is left from an earlier scheduler", printable(name), pid)
                continue
            what = "goes on" if settings else "of a job that is configured no more goes on"
            log.warning("%s: pid %d %s from an earlier scheduler", printable(name), pid, what)
            job = self.timetable.jobs.get(name) or self.timetable.leaving[name]
            limit = settings.max_runtime if settings else LEAST_RUNTIME
            self.adopt(self.enter(job, limit), step, pid, since, settings is None)

    def adopt(self, run: JobRun, step: str, pid: int, since: datetime, is_removed: bool) -> None:
        run.step, run.taken_over = step, since
        run.child = Child(self.loop, pid, None, lambda status: self.ended(run, status))

        def limit() -> None:
            left = since + run.max_runtime - datetime.now(UTC)
            self.limit_runtime(run, max(timedelta(seconds=GRACE), left))

        def work() -> Any:
            limit = run.max_runtime
            if is_removed:
                with suppress(BackyError), QuietRepository.open(run.directory) as repository:
                    limit = usual_runtime(load_schedule(repository))
            return read_history(run.directory), limit

        def read(run: JobRun, result: Any) -> None:
            history = result
            if isinstance(result, tuple):
                history, run.max_runtime = result
            limit()
            self.note_history(run.name, history)
            run.taken_over = None
            is_through = self.has_made(run.name, since)
            run.newest = "" if is_through else self.histories[run.name].newest
            self.timetable.learn(run.name, self.past(run.name), datetime.now(UTC))
            self.has_read(run.name)

        limit()
        self.examine(run, work, read)

    def has_made(self, name: str, since: datetime) -> bool:
        return any(one.moment >= since for one in self.past(name))

    def ended(self, run: JobRun, status: int | None) -> None:
        """A child has ended; what it has left is looked at."""
        run.child = None
        directory, log_fd, start = run.directory, run.log_fd, run.log_start

        def work() -> Any:
            error = last_error(log_fd, start) if log_fd >= 0 else ""
            start_of_next = os.fstat(log_fd).st_size if log_fd >= 0 else 0
            holder = ""
            with suppress(OSError, BackyError):
                dir_fd = open_directory(directory)
                try:
                    holder = lock_holder(dir_fd)
                finally:
                    close(dir_fd)
            return error, start_of_next, holder, read_history(directory)

        self.examine(run, work, lambda run, result: self.examined(run, status, result))

    def examined(self, run: JobRun, status: int | None, result: Any) -> None:
        if isinstance(result, BackyError):
            self.over(run, str(result))
            return
        said, run.log_start, holder, history = result
        before = run.newest
        self.note_history(run.name, history)
        run.newest = history.newest or before
        is_new = run.newest != before
        if run.taken_over:  # and ended sooner than its past was read
            is_new = self.has_made(run.name, run.taken_over)
        error = "" if status in (0, None) else describe_end(status, said, run.name)
        if run.step == "expire":
            self.expired(run, error)
        elif not error and is_new:
            self.succeeded(run)
        elif holder or (self.stopping and not run.verdict):
            self.finish(run, "")
        else:
            self.finish(run, run.verdict or error or "it has ended without a new revision")

    def succeeded(self, run: JobRun) -> None:
        log.info("%s: finished backup", run.name)
        if self.stopping or run.verdict:
            self.finish(run, None)
            return
        if run.log_fd < 0:  # it was taken over
            with suppress(OSError):
                path = os.path.join(run.directory, "backy.log")
                run.log_fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NOFOLLOW, 0o600)
        self.spawn(run, "expire")

    def expired(self, run: JobRun, error: str) -> None:
        """What goes wrong here is shown, but there is a new revision all the same."""
        self.after_run.pop(run.name, None)
        if error and not self.stopping:
            self.after_run[run.name] = f"expire: {run.verdict or error}"
            log.error("%s: %s", run.name, self.after_run[run.name])
        self.finish(run, None)

    def finish(self, run: JobRun, error: str | None) -> None:
        """The turn is over: None is a success, "" no failure either, but no success."""
        if run.timer:
            run.timer.cancel()
        if run.log_fd >= 0:
            close(run.log_fd)
        del self.runs[run.name]
        self.has_read(run.name)
        before = run.job.failures
        now = datetime.now(UTC)
        self.timetable.finish(run.name, error, self.past(run.name), now)
        if error and run.step == "backup" and not self.stopping:
            wait = back_off(run.job.failures).total_seconds()
            log.error("%s: %s", run.name, error)
            log.info("%s: retrying in %d seconds", run.name, wait)
        self.is_dirty = True
        self.forget_removed()
        if before or run.job.failures:
            self.remember()

    def end_hung(self, run: JobRun) -> None:
        """It has run for too long: ask it to end, then kill it, then do without the slot."""
        if self.runs.get(run.name) is not run:
            return
        if not run.verdict:
            run.verdict = f"it ran longer than {format_time_span(run.max_runtime)}"
            log.error("%s: %s, ending it", run.name, run.verdict)
            self.signal_hung(run, signal.SIGTERM, lambda: self.kill_hung(run))

    def kill_hung(self, run: JobRun) -> None:
        log.error("%s: does not end, killing it", run.name)
        self.signal_hung(run, signal.SIGKILL, lambda: self.give_up(run))

    def signal_hung(self, run: JobRun, number: int, then: Callable[[], None]) -> None:
        if run.child:
            run.child.signal(number)
        run.timer = self.loop.call_in(GRACE, then)

    def give_up(self, run: JobRun) -> None:
        log.error("%s: cannot be killed, its slot is given to others", run.name)
        self.timetable.give_up(run.name)
        run.is_lost = True
        self.is_dirty = True

    # -- what is shown and remembered ---------------------------------------------

    def remember(self) -> None:
        """Write down what must survive us, soon and not too often."""
        if not self.is_saving:
            self.is_saving = True
            self.loop.call_in(1.0, self.save)

    def save(self) -> None:
        jobs = self.timetable.remember()
        self.clerk.submit(1, lambda: save_memory(self.base_fd, jobs), self.saved)

    def saved(self, error: Any) -> None:
        self.is_saving = False
        text = str(error or "")
        if text and text != self.memory_error:
            log.error("%s", text)
        self.memory_error = text

    def arrange_status(self) -> None:
        """Have the status file written when it is time, at most for a tenth of the time."""
        now = time.monotonic()
        if self.is_writing or not self.is_settled or now < self.status_allowed:
            return
        if self.unread and now < self.unread_until:
            return
        if not (self.is_dirty or self.timetable.changed) and now < self.status_due:
            return
        self.status_due = now + self.settings.status_interval.total_seconds()
        rows, about, path = self.make_rows(), self.about(), self.settings.status_file
        self.is_writing, self.is_dirty = True, False
        self.clerk.submit(1, lambda: write_status(path, rows, about), self.status_written)
        self.show_summary()

    def status_written(self, result: Any) -> None:
        self.is_writing = False
        took, error = 0.0, ""
        if isinstance(result, BackyError):
            error = str(result)
        else:
            took, *self.space = result
        if error != self.status_error:
            if error:
                log.error("%s", error)
            else:
                log.info("the status file can be written again")
        self.status_error = error
        wait = max(1.0, 10 * took)
        self.status_allowed = time.monotonic() + wait
        self.loop.call_in(wait, lambda: None)  # what has changed meanwhile is written then
        if not self.is_ready:
            self.is_ready = True
            self.keep_from_collector()
            self.remember()
            self.manager.tell("READY=1")

    def show_summary(self) -> None:
        table = self.timetable
        text = f"{count_of(len(table.jobs), 'job')}, {table.running} running"
        moment = table.next_moment()
        if moment is not None:
            text += f", next {table.waiting[0][2].name} {moment.strftime('%H:%M:%S')} UTC"
        if self.reload_error:
            text += f", configuration refused: {self.reload_error}"
        self.manager.show(text)

    def about(self) -> dict[str, Any]:
        """What the status file says of the scheduler itself."""
        interval = self.settings.status_interval.total_seconds()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": show_time(self.started),
            "written": show_time(datetime.now(UTC)),
            "worker_limit": self.timetable.limit,
            "running": self.timetable.running,
            "queued": self.timetable.queued,
            "stuck": self.timetable.stuck,
            "reload_error": self.reload_error or "-",
            "base_dir": self.settings.base_dir,
            "free": self.space[0],
            "size": self.space[1],
            "status_interval": int(interval) if interval == int(interval) else interval,
        }

    def rows(self) -> list[dict[str, Any]]:
        rows = [row.values for row in self.make_rows()]
        return [{**rows[0], "scheduler": self.about()}, *rows[1:]] if rows else []

    def make_rows(self, names: ListLike[str] | None = None) -> list[Row]:
        """The rows of these jobs, or of all, as things stand now."""
        now, jobs, made = datetime.now(UTC), self.timetable.jobs, self.rows_made
        shown = jobs if names is None else names
        for name in shown:
            row = made.get(name)
            if row is None or name in self.timetable.changed or now >= row.late_at:
                self.timetable.changed.discard(name)
                made[name] = self.make_row(jobs[name], now)
                self.is_dirty = True
        if names is None:
            self.timetable.changed.clear()  # of jobs that are not shown
        return [made[name] for name in shown]

    def make_row(self, job: TimedJob, now: datetime) -> Row:
        overdue, late_at = None, datetime.max.replace(tzinfo=UTC)
        if job.is_known or job.name in self.silent:  # else nothing can be said
            overdue = job.overdue_since(now)
            late_at = late_at if overdue else job.late_at(now)
        return Row(late_at, self.describe(job, overdue))

    def describe(self, job: TimedJob, overdue: datetime | None) -> dict[str, Any]:
        """One entry of the status file."""
        history = self.histories.get(job.name, History())
        newest = history.past[-1] if history.past else None
        problems = [history.problem, self.after_run.get(job.name, "")]
        if job.name in self.silent:
            problems.insert(0, SILENT)
        elif not job.is_known and time.monotonic() > self.unread_until:
            problems.insert(0, "its directory has not been read yet")
        return {
            "job": job.name,
            "sla": "TOO OLD" if overdue else "OK",
            "status": job.state.value,
            "last_time": show_time(newest and newest.moment),
            "last_tags": show_tags(newest.tags if newest else (), job.schedule),
            "last_duration": f"{newest.duration:.1f} s" if newest else "-",
            "next_time": show_time(None if job.is_active else job.due),
            "next_tags": show_tags(() if job.is_active else job.tags, job.schedule),
            "failures": job.failures,
            "last_error": job.last_error or "-",
            "overdue_since": show_time(overdue),
            "sla_limit": 1.5 * job.shortest.total_seconds(),
            "first_seen": show_time(job.first_seen),
            "trust": history.trust,
            "running_since": show_time(job.started),
            "stuck": job.state is State.STUCK,
            "problem": "; ".join(filter(None, problems)) or "-",
        }


# ==== Plan ===================================================================
#
# The coming runs of jobs, and which revisions these will leave, by the functions
# that the scheduler and `expire` themselves use, and from what the scheduler has
# written down.  Every run is taken to be started in time and to end well.

SHOWN_RUNS = 100
LISTED_RUNS = 10_000  # in JSON
COUNTED_RUNS = 100_000
SIMULATED_RUNS = 1_000_000


class Run(NamedTuple):
    """A coming backup, and why it is made then."""

    moment: datetime
    job: str
    tags: tuple[str, ...]
    reason: str


def past_of(revisions: Iterable[Revision]) -> list[Past]:
    """What the revisions say of a job's past; one without its image says nothing."""
    usable = (one for one in revisions if one.is_complete and not one.problem)
    return [Past(one.timestamp, one.tags, one.duration or 0.0) for one in usable]


def remember(past: list[Past], run: Past, schedule: Schedule) -> list[Past]:
    """`past` with `run`, and without what says nothing beside it: so it stays short."""
    rest = set(schedule.tags).difference(run.tags)
    return [*(one for one in past if not rest.isdisjoint(one.tags)), run]


def explain_run(run: Run, schedule: Schedule) -> str:
    """The reason of a run; of a regular time also its intervals, and where in them it lies."""
    spread = spread_of(run.job, schedule)
    moment, tags = next_time(schedule, spread, run.moment - MICROSECOND)
    if moment != run.moment:
        return run.reason
    spans = [format_time_span(one.every) for one in schedule.intervals if one.tag in tags]
    return f"{run.reason} (every {', '.join(spans)}; spread {timedelta(seconds=spread)})"


def load_remembered(base_dir: str) -> dict[str, Any]:
    """What the scheduler has written down of each job; nothing if there was none yet."""
    try:
        base_fd = os.open(base_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return {}
    try:
        kept = load_memory(base_fd)
        return kept if isinstance(kept, dict) else {}
    finally:
        close(base_fd)


def first_run(job: JobSettings, past: list[Past], kept: Any, now: datetime) -> Run:
    """The next run, by what the scheduler has kept: failures, and when it saw the job first."""
    timed = TimedJob(job.name, job.schedule, now)
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        timed.recall(kept, now)
    timed.past = newest_of_each(timed.schedule_tags, past)
    timed.reckon(now)
    reason = timed.reason
    if timed.failures and timed.due == timed.not_before:
        reason += f"; {count_of(timed.failures, 'failure')} in a row"
    return Run(timed.due, job.name, timed.tags, reason)


def coming_runs(
    job: str,
    schedule: Schedule,
    past: list[Past],
    now: datetime,
    until: datetime,
    first: Run | None = None,
) -> Iterator[Run]:
    """The runs of one job up to `until`, in order, beginning with `first` if that is known."""
    spread = spread_of(job, schedule)
    while True:
        if first is None:
            moment, tags, reason = next_run(schedule, spread, past, now)
            first = Run(moment, job, tags, reason)
        if first.moment > until:
            return
        yield first
        now = first.moment
        past, first = remember(past, Past(now, first.tags, 0.0), schedule), None


def coming_runs_of_all(
    jobs: Iterable[tuple[JobSettings, list[Past]]],
    remembered: dict[str, Any],
    now: datetime,
    until: datetime,
) -> Iterator[Run]:
    """The same of several jobs, in the order of time."""
    runs = [
        coming_runs(
            *(job.name, job.schedule, past, now, until),
            first_run(job, past, remembered.get(job.name), now),
        )
        for job, past in jobs
    ]
    return heapq.merge(*runs, key=lambda run: run.moment)


class Simulation:
    """The revisions of one job as its runs and the retention after each of them make them.

    A tag that is over stays over, so it does not matter when that is looked at: here
    whenever the number of revisions has doubled, which takes seconds where doing it
    after every run would take an hour.
    """

    def __init__(self, job: str, schedule: Schedule, revisions: ListLike[Revision]) -> None:
        self.job, self.schedule = job, schedule
        self.revisions = [one for one in revisions if one.is_complete]
        self.runs = 0
        self.enough = 0

    def run(self, now: datetime, until: datetime) -> list[Verdict]:
        """Let time pass; the verdicts on what is there at the end."""
        past, judged_at = past_of(self.revisions), now
        for run in coming_runs(self.job, self.schedule, past, now, until):
            self.runs += 1
            self.revisions.append(self.made_by(run))
            judged_at = run.moment
            if len(self.revisions) > self.enough:
                self.expire(judged_at)
        self.expire(judged_at)
        return judge_revisions(self.revisions, self.schedule, judged_at)

    def made_by(self, run: Run) -> Revision:
        newest = self.revisions[-1].clock + 1 if self.revisions else 0
        clock = max(newest, epoch_microseconds(run.moment))
        return Revision("", run.moment, clock, tuple(sorted(run.tags)), duration=0.0)

    def expire(self, now: datetime) -> None:
        verdicts = judge_revisions(self.revisions, self.schedule, now)
        self.revisions = [replace(one.revision, tags=one.tags) for one in verdicts if one.keep]
        self.enough = 2 * len(self.revisions) + 50


def count_runs(schedule: Schedule, span: timedelta) -> int:
    """How many runs there are in `span` at most."""
    return sum(span // one.every + 2 for one in schedule.intervals)


# ==== Check ==================================================================
#
# The status file, read for Nagios and its kin: one line, figures, what is behind
# them.  Nothing else is read but the configuration, and nothing is written.  What
# keeps us from knowing is UNKNOWN; it is never OK.

MAX_STATUS_FILE = 16 * MiB
MAX_CHECK_TEXT = 8000  # bytes; Nagios keeps 8 KiB
MAX_CHECK_NAMES = 10  # in the first line, for each reason
CHECK_TIMEOUT = 10.0  # seconds
STALE_AFTER = 300.0  # seconds without a new status file, or ten intervals if that is longer
RELOAD_WITHIN = 3600.0  # seconds until a job that the scheduler does not know is worth a warning
FAILURES_IN_A_ROW = 3


class Level(Enum):
    """The exit status of a plug-in."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


WORST_FIRST = (Level.CRITICAL, Level.UNKNOWN, Level.WARNING)


class Unknown(BackyError):
    """Something keeps us from knowing."""

    status = Level.UNKNOWN.value


# An entry on one line, as it is written by us and, with folded lines, by 2.x.
STATUS_PAIR = re.compile(
    r"([a-z_]+): (?:'((?:[^'\n]|'')*)'|([0-9A-Za-z./](?:[0-9A-Za-z ._/+-]*[0-9A-Za-z._/+-])?))"
    r"(?:, |\}\n?\Z)"
)


def status_text(path: str) -> tuple[str, float]:
    """The text of the status file and the time of its last change.  Raises Unknown."""
    shown = printable(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Unknown(f"{shown} is no regular file")
            return read_limited(fd, MAX_STATUS_FILE).decode("utf-8"), status.st_mtime
        finally:
            close(fd)
    except FileNotFoundError:
        raise Unknown(f"No status file found at {shown}") from None
    except OSError as e:
        if e.errno == errno.EFBIG:
            raise Unknown(f"{shown} is {e.strerror}") from e
        raise Unknown(f"cannot read {shown}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise Unknown(f"{shown} is damaged: it is not UTF-8") from e


def plain_values(node: Node) -> Any:
    """All scalars as text, None for null: a job may be called `on`."""
    if isinstance(node, Mapping):
        return {key: plain_values(value) for key, (_, value) in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain_values(one) for one in node.items]
    return None if is_null(node) else node.text


def parse_status_line(line: str) -> dict[str, Any] | None:
    """A mapping of plain and singly quoted texts on one line; None if it is anything else."""
    entry: dict[str, Any] = {}
    at = len("- {")
    if not re.search(r"[^ ,]\}\n?\Z", line):
        return None
    while at < len(line):
        pair = STATUS_PAIR.match(line, at)
        if not pair or pair[1] in entry:
            return None
        quoted, plain = pair[2], pair[3]
        if quoted is not None:
            entry[pair[1]] = quoted.replace("''", "'")
        else:
            entry[pair[1]] = None if plain in PLAIN_NULL else plain
        at = pair.end()
    return entry


def parse_status_piece(piece: str) -> Any:
    """One entry of the list, beginning with its dash.  Raises YAMLError."""
    if piece.startswith("- {") and "\t" not in piece:
        entry = parse_status_line(re.sub(r" *\n +", " ", piece))
        if entry is not None:
            return entry
    if re.search(r"\n(?!  |\n|\Z)", piece):  # there is more than an entry
        return plain_values(parse_yaml(piece))[0]
    try:
        return plain_values(parse_yaml(piece[2:].replace("\n  ", "\n")))
    except YAMLError as e:
        raise YAMLError(e.message, e.line, e.column + 2) from e


def parse_status(text: str) -> list[Any]:
    """The entries of a status file, one by one: it may be longer than other YAML of ours.

    Raises YAMLError.
    """
    head, *pieces = re.split(r"^(?=- )", text, flags=re.MULTILINE)
    if not pieces or not re.fullmatch(r"(?:(?:#[^\n]*|---)?\n)*", head):
        values = plain_values(parse_yaml(text))
        return values if isinstance(values, list) else [values]
    entries, line = [], 1 + head.count("\n")
    for piece in pieces:
        try:
            if FORBIDDEN_CHARACTER.search(piece):
                raise YAMLError("control character", 1, 1)
            entries.append(parse_status_piece(piece))
        except YAMLError as e:
            raise YAMLError(e.message, line + e.line - 1, e.column) from e
        line += piece.count("\n")
    return entries


def format_age(seconds: float) -> str:
    """`47.9 h`, `12 min`."""
    if seconds >= 5 * 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def parse_moment(text: object) -> datetime | None:
    period = parse_period(text) if isinstance(text, str) else None
    return period and period[0]


def parse_number(text: object, default: float | None = 0.0) -> float | None:
    """A finite number that is not negative, else `default`."""
    if isinstance(text, str) and re.fullmatch(
        r"[0-9]{1,18}(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?", text
    ):
        return float(text)
    return default


def parse_text(text: object) -> str:
    """For people; empty for nothing."""
    return "" if text in (None, "-", "") else printable(text).replace("|", "/")


@dataclass(frozen=True)
class WatchedJob:
    """What the status file says of a job; all but the first two may be missing (2.x)."""

    name: str
    sla: str
    status: str
    last_time: datetime | None
    failures: int
    last_error: str
    sla_limit: float | None  # seconds
    first_seen: datetime | None
    trust: str
    is_stuck: bool
    problem: str
    quarantined: int  # 2.5

    @classmethod
    def of(cls, entry: Any) -> WatchedJob:
        """Raises Unknown for what is no entry of a job."""
        if not isinstance(entry, dict) or not (entry.get("job") and entry.get("sla")):
            raise Unknown("an entry has no job or no sla")
        status = parse_text(entry.get("status"))
        return cls(
            name=parse_text(entry["job"]),
            sla=parse_text(entry["sla"]),
            status=status,
            last_time=parse_moment(entry.get("last_time")),
            failures=int(parse_number(entry.get("failures"))),
            last_error=parse_text(entry.get("last_error"))[:300],
            sla_limit=parse_number(entry.get("sla_limit"), None),
            first_seen=parse_moment(entry.get("first_seen")),
            trust=parse_text(entry.get("trust")),
            is_stuck=entry.get("stuck") in PLAIN_TRUE or status == "stuck",
            problem=parse_text(entry.get("problem"))[:300],
            quarantined=int(parse_number(entry.get("quarantine_reports"))),
        )

    @property
    def is_late(self) -> bool:
        return self.sla != "OK"

    @property
    def is_failing(self) -> bool:
        return self.failures >= FAILURES_IN_A_ROW

    def age(self, now: datetime) -> float | None:
        """Seconds since the last backup."""
        return max(0.0, (now - self.last_time).total_seconds()) if self.last_time else None


@dataclass(frozen=True)
class StatusFile:
    """All that the status file says."""

    jobs: list[WatchedJob]
    scheduler: dict[str, Any]  # empty in a file of 2.x
    changed: float  # seconds since 1970

    @classmethod
    def load(cls, path: str) -> StatusFile:
        """Raises Unknown."""
        text, changed = status_text(path)
        try:
            entries = parse_status(text)
            jobs = [WatchedJob.of(entry) for entry in entries]
        except (YAMLError, Unknown, RecursionError) as e:
            raise Unknown(f"{printable(path)} is damaged: {e}") from e
        scheduler = entries[0].get("scheduler") if entries else None
        return cls(jobs, scheduler if isinstance(scheduler, dict) else {}, changed)

    def age(self, now: datetime) -> float:
        """Seconds since it was written, or touched by anybody before that.  Raises Unknown."""
        written = parse_moment(self.scheduler.get("written"))
        moments = [self.changed, *([written.timestamp()] if written else [])]
        if max(moments) - now.timestamp() > FUTURE.total_seconds():
            hours = format_age(max(moments) - now.timestamp())
            raise Unknown(f"Status file is from the future ({hours}): a clock is wrong")
        return max(0.0, now.timestamp() - min(moments))

    @property
    def reload_error(self) -> str:
        return parse_text(self.scheduler.get("reload_error"))


def guess_status_file(text: str, path: str, default: str) -> str:
    """Where a file that cannot be parsed says that the status file is."""
    found = dict(
        re.findall(r"^[ \t]+(base-dir|status-file)[ \t]*:[ \t]+([^#\n]*)", text, re.MULTILINE)
    )
    found = {key: value.strip(" \t\r'\"") for key, value in found.items()}
    directory = os.path.dirname(path)
    base = os.path.join(directory, found.get("base-dir", os.path.dirname(default)))
    status = found.get("status-file", "status").replace("{base-dir}", base)
    return os.path.normpath(os.path.join(base, status))


@dataclass(frozen=True)
class CheckSettings:
    """What check needs of the configuration."""

    status_file: str
    status_interval: float  # seconds
    warning: Space
    critical: Space
    jobs: tuple[str, ...] = ()
    changed: float = math.inf  # when the configuration was written, seconds since 1970
    fault: str = ""  # why the configuration cannot be used

    @classmethod
    def load(cls, path: str) -> CheckSettings:
        """Raises Unknown if not even the place of the status file can be found out.

        A faulty configuration does not hide what a running scheduler, which has
        refused it and goes on with the one before, has to tell.
        """
        configuration = Configuration(path)
        try:
            settings = configuration.load()
        except ConfigErrors as e:
            return cls.of_faulty(configuration, e.summary)
        changed = max(map(os.path.getmtime, configuration.documents))
        interval = settings.status_interval.total_seconds()
        space = settings.space_warning, settings.space_critical
        return cls(settings.status_file, interval, *space, tuple(settings.jobs), changed)

    @classmethod
    def of_faulty(cls, configuration: Configuration, fault: str) -> CheckSettings:
        values = configuration.settings
        if configuration.documents and not values:
            values = configuration.read_global()
        names = ("status-file", "status-interval", "space-warning", "space-critical")
        if not set(names) <= set(values):
            raise Unknown(fault)
        path, interval, *space = (values[name].value for name in names)
        document = next(iter(configuration.documents.values()))
        if configuration.section is None and isinstance(document.root, Scalar):  # it is no YAML
            path = guess_status_file(document.text, configuration.path, path)
        return cls(path, interval.total_seconds(), *space, fault=fault)


@dataclass(frozen=True)
class Finding:
    """One reason for not being OK, and the jobs that have it."""

    level: Level
    text: str
    jobs: tuple[WatchedJob, ...] = ()


JOB_FINDINGS: tuple[tuple[Level, str, Callable[[WatchedJob], bool]], ...] = (
    (Level.CRITICAL, "not within SLA", lambda job: job.is_late),
    (Level.CRITICAL, "stuck", lambda job: job.is_stuck),
    (Level.WARNING, "failing", lambda job: job.is_failing),
    (Level.WARNING, "with a distrusted last revision", lambda job: job.trust == "distrusted"),
    (Level.WARNING, "with a problem", lambda job: bool(job.problem)),
    (Level.WARNING, "with quarantine reports", lambda job: job.quarantined > 0),
)


def list_names(names: ListLike[str]) -> str:
    """The first of them, and how many there are more; never long."""
    shown = list(names[:MAX_CHECK_NAMES])
    while len(shown) > 1 and sum(map(len, shown)) > 200:
        shown.pop()
    more = len(names) - len(shown)
    return ", ".join(shown)[:250] + (f", ... and {more} more" if more else "")


def format_figure(value: float) -> str:
    """A decimal number without exponent."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def figure(label: str, value: float, unit: str = "", *ranges: object) -> str:
    """One piece of performance data: label=value, unit, then warn; crit; min; max."""
    texts = ["" if one is None else str(one) for one in ranges]
    return ";".join([f"{label}={format_figure(value)}{unit}", *texts]).rstrip(";")


class Check:
    """The judgement on a status file, for all jobs or for chosen ones."""

    def __init__(self, settings: CheckSettings, status: StatusFile, now: datetime) -> None:
        self.settings, self.status, self.now = settings, status, now
        self.jobs = status.jobs
        self.is_whole = True  # also what concerns no single job
        self.findings: list[Finding] = []

    def choose(self, names: ListLike[str], pattern: str | None) -> None:
        """Look at some jobs only.  Raises Unknown if there are none of that name."""
        if not names and pattern is None:
            return
        known = {job.name: job for job in self.jobs}
        for name in names:
            if name not in known:
                alike = suggestion(name, known)
                raise Unknown(f"no job {printable(name)!r} in the status file{alike}")
        chosen = set(names)
        if pattern is not None:
            search = compile_pattern(pattern).search
            chosen |= {name for name in known if search(name)}
        if not chosen:
            raise Unknown(f"no job matches {printable(pattern)!r}")
        self.jobs = [job for job in self.jobs if job.name in chosen]
        self.is_whole = False

    def judge(self, space_given: bool) -> None:
        """Find all reasons, the worst first."""
        for level, what, concerns in JOB_FINDINGS:
            jobs = tuple(filter(concerns, self.jobs))
            if jobs:
                text = f"{len(jobs)} jobs {what}: {list_names([job.name for job in jobs])}"
                self.findings.append(Finding(level, text, jobs))
        if self.is_whole or space_given:
            self.judge_space(space_given)
        if self.is_whole:
            self.judge_scheduler()
        self.findings.sort(key=lambda finding: WORST_FIRST.index(finding.level))

    def judge_space(self, space_given: bool) -> None:
        free, size = self.space
        if free is None or size is None:
            if space_given:
                self.findings.append(Finding(Level.UNKNOWN, "the status file has no free space"))
            return
        levels = (Level.CRITICAL, self.settings.critical), (Level.WARNING, self.settings.warning)
        for level, least in levels:
            if free < least.of(size):
                text = f"free space {format_size(int(free))} is less than {least}"
                self.findings.append(Finding(level, text))
                return

    def judge_scheduler(self) -> None:
        error = self.status.reload_error
        if error:
            text = f"the changed configuration is not in use: {error[:200]}"
            self.findings.append(Finding(Level.WARNING, text))
        stuck = int(parse_number(self.status.scheduler.get("stuck")))
        if stuck and not any(job.is_stuck for job in self.jobs):
            text = f"{stuck} processes of backups are stuck"
            self.findings.append(Finding(Level.CRITICAL, text))
        names = {job.name for job in self.jobs}
        strange = [name for name in self.settings.jobs if name not in names]
        if strange and not names:
            self.findings.append(Finding(Level.UNKNOWN, "the status file has no jobs"))
        elif strange and self.status.scheduler and self.is_long_changed:
            text = (
                f"{len(strange)} jobs not known to the scheduler, reload it: {list_names(strange)}"
            )
            self.findings.append(Finding(Level.WARNING, text))

    @property
    def is_long_changed(self) -> bool:
        return self.now.timestamp() - self.settings.changed > RELOAD_WITHIN

    @property
    def space(self) -> tuple[float | None, float | None]:
        """Free and all bytes where the revisions are."""
        return tuple(parse_number(self.status.scheduler.get(key), None) for key in ("free", "size"))

    @property
    def level(self) -> Level:
        return self.findings[0].level if self.findings else Level.OK

    @property
    def summary(self) -> str:
        if not self.findings:
            return f"OK: {len(self.jobs)} jobs within SLA"
        return f"{self.level.name}: {'; '.join(finding.text for finding in self.findings)}"

    def figures(self) -> list[str]:
        """Performance data; what is not known is left out."""
        count = len(self.jobs)

        def having(*beginnings: str) -> int:
            return sum(job.status.startswith(beginnings) for job in self.jobs)

        limit = self.status.scheduler.get("worker_limit")
        figures = [
            figure("jobs", count, "", None, None, 0),
            figure("overdue", sum(job.is_late for job in self.jobs), "", 0, 0, 0, count),
            figure("running", having("running", "active"), "", None, None, 0, parse_text(limit)),
            figure("queued", having("queued", "waiting for worker"), "", None, None, 0),
            figure("failing", sum(job.is_failing for job in self.jobs), "", 0, None, 0, count),
            figure("stuck", sum(job.is_stuck for job in self.jobs), "", None, 0, 0, count),
        ]
        ages = [(job.age(self.now), job.sla_limit) for job in self.jobs if job.last_time]
        if ages:
            age, most = max(ages, key=lambda one: one[0])
            crit = format_figure(most) if most else None
            figures.append(figure("age_max", int(age), "s", None, crit, 0))
        free, size = self.space
        if self.is_whole and free is not None and size is not None:
            limits = (self.settings.warning.of(int(size)), self.settings.critical.of(int(size)))
            ranges = [f"{limit}:" if limit else None for limit in limits]
            figures.append(figure("free", free, "B", *ranges, 0, int(size)))
        return figures

    def describe(self, job: WatchedJob) -> str:
        """One line on what is behind the first one."""
        last = f"{format_time(job.last_time)} UTC" if job.last_time else "-"
        words = []
        age = job.age(self.now)
        if age is not None:
            limit = f", limit {format_age(job.sla_limit)}" if job.sla_limit else ""
            words.append(f"{format_age(age)} ago{limit}")
        elif job.is_late:
            words.append("no backup yet")
            if job.first_seen:
                seen = (self.now - job.first_seen).total_seconds()
                words[-1] += f", first seen {format_age(max(seen, 0.0))} ago"
        if job.is_stuck:
            words.append("a process of it is stuck")
        if job.failures:
            words.append(f"{count_of(job.failures, 'failure')} in a row")
        if job.last_error:
            words.append(f"last error: {job.last_error}")
        if job.trust == "distrusted":
            words.append("its last revision is distrusted")
        if job.problem:
            words.append(job.problem)
        if job.quarantined:
            words.append(count_of(job.quarantined, "quarantine report"))
        return f"{job.name} (last time: {last})" + (f": {'; '.join(words)}" if words else "")

    def affected(self, verbose: bool) -> list[WatchedJob]:
        """The jobs that are behind the first line, those with the worst reason first."""
        found = {job.name: job for finding in self.findings for job in finding.jobs}
        if verbose:
            found.update((job.name, job) for job in self.jobs if job.name not in found)
        return list(found.values())

    def text(self, verbose: bool) -> str:
        """What a plug-in prints: at most 8 KiB, and what is left out is counted."""
        first = self.summary
        if len(first) > 1000:
            first = f"{first[:1000]} ..."
        lines = [f"{first} | {' '.join(self.figures())}"]
        left = MAX_CHECK_TEXT - len(lines[0].encode("utf-8", "replace"))
        rest = [self.describe(job) for job in self.affected(verbose)]
        for at, line in enumerate(rest):
            left -= len(line.encode("utf-8", "replace")) + 1
            if left < 40:  # room for this last line
                lines.append(f"... and {len(rest) - at} more")
                break
            lines.append(line)
        return "\n".join(lines) + "\n"

    def json(self) -> dict[str, Any]:
        free, size = self.space
        return {
            "state": self.level.name,
            "status": self.level.value,
            "summary": self.summary,
            "findings": [
                {
                    "state": finding.level.name,
                    "text": finding.text,
                    "jobs": [job.name for job in finding.jobs],
                }
                for finding in self.findings
            ],
            "jobs": [self.job_json(job) for job in self.jobs],
            "free": None if free is None else int(free),
            "size": None if size is None else int(size),
        }

    def job_json(self, job: WatchedJob) -> dict[str, Any]:
        return {
            "job": job.name,
            "sla": job.sla,
            "status": job.status or None,
            "last_time": format_time_json(job.last_time),
            "age": job.age(self.now),
            "sla_limit": job.sla_limit,
            "failures": job.failures,
            "last_error": job.last_error or None,
            "trust": job.trust or None,
            "stuck": job.is_stuck,
            "problem": job.problem or None,
        }


def format_stale(limit: float) -> str:
    minutes = limit / 60
    span = f"{minutes:.0f} minutes" if minutes % 1 == 0 else f"{limit:.0f} seconds"
    return f"CRITICAL: Status file is older than {span}"


def load_check(
    path: str, warning: Space | None, critical: Space | None, now: datetime
) -> Check | str:
    """All there is to be judged, or the sentence on a status file that is too old.

    Raises Unknown.
    """
    settings = CheckSettings.load(path)
    try:
        status = StatusFile.load(settings.status_file)
        age = status.age(now)
    except Unknown as e:
        raise (Unknown(settings.fault) if settings.fault else e) from e
    limit = max(STALE_AFTER, 10 * settings.status_interval)
    if settings.fault and not (age <= limit and status.reload_error):
        raise Unknown(settings.fault)
    if age > limit:
        return format_stale(limit)
    given = {"warning": warning, "critical": critical}
    settings = replace(settings, **{key: one for key, one in given.items() if one is not None})
    return Check(settings, status, now)


def answer_of_child(work: Callable[[], bytes], seconds: float) -> bytes:
    """What `work` returns, from a process of its own; nothing if that crashed.

    Raises TimeUp.  The child may wait for a file server that is gone, where not even
    a signal would reach it; so it is left alone then, and holds no file of ours.
    """
    import select

    ours, theirs = os.pipe()
    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # what fork() calls swallows exceptions
    child = os.fork()
    if not child:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            rest = work()
            while rest:
                rest = rest[os.write(theirs, rest) :]
        finally:
            os._exit(0)
    os.close(theirs)
    answer, until = b"", time.monotonic() + seconds
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while select.select([ours], [], [], max(0.0, until - time.monotonic()))[0]:
            piece = os.read(ours, MiB)
            if not piece:
                os.waitpid(child, 0)
                return answer
            answer += piece
        raise TimeUp
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, os.WNOHANG)
        raise
    finally:
        os.close(ours)


# ==== Partitions =============================================================
#
# Where the partitions of a disk lie, by its MBR or GPT, so that each can be offered
# by itself.  The numbers are those of Linux.  A table that is not whole has none.

SECTOR = 512
MOST_PARTITIONS = 128
mbr_entry = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
MBR_EXTENDED = (0x05, 0x0F, 0x85)
MBR_PROTECTIVE = 0xEE  # the disk has a GPT
# signature, header size, CRC; own sector; first sector, number, size and CRC of the entries
gpt_header = struct.Struct("<8s4xII4xQ8x8x8x16xQIII")
gpt_entry = struct.Struct("<16s16xQQ")  # type, first and last sector
ReadAt = Callable[[int, int], bytes]  # length, offset


def mbr_entries(read: ReadAt, offset: int) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries at `offset`; none without a table."""
    table = read(SECTOR, offset)
    if len(table) < SECTOR or table[510:] != b"\x55\xaa":
        return []
    entries = [mbr_entry.unpack_from(table, at) for at in range(446, 510, mbr_entry.size)]
    if any(status & 0x7F for status, *_ in entries):  # the boot sector of a file system
        return []
    return [(kind, first, count) for _, kind, first, count in entries]


def logical_partitions(read: ReadAt, start: int) -> Iterator[tuple[int, int]]:
    """(first sector, sectors) along the chain of tables in the extended partition at `start`."""
    at, seen = start, {0}
    while at not in seen and len(seen) < MOST_PARTITIONS:
        seen.add(at)
        entries = mbr_entries(read, at * SECTOR)
        onward = [first for kind, first, _ in entries if kind in MBR_EXTENDED]
        for kind, first, count in entries:
            if kind and count and kind not in MBR_EXTENDED:
                yield at + first, count
        at = start + onward[0] if onward else 0


def gpt_partitions(read: ReadAt, size: int, sector: int) -> dict[int, tuple[int, int]] | None:
    """(offset, length) by number; None if neither table, first or last, is whole."""
    import zlib

    for place in (1, size // sector - 1):
        header = read(SECTOR, place * sector)
        if len(header) < SECTOR:
            continue
        magic, length, crc, own, first, count, width, entries_crc = gpt_header.unpack_from(header)
        if magic != b"EFI PART" or own != place or not 92 <= length <= SECTOR:
            continue
        blank = header[:16] + bytes(4) + header[20:length]
        if zlib.crc32(blank) != crc or not 128 <= width <= KiB or count > KiB:
            continue
        table = read(count * width, first * sector)
        if zlib.crc32(table) == entries_crc:
            found = [gpt_entry.unpack_from(table, at) for at in range(0, len(table), width)]
            return {
                number: (start * sector, (last + 1 - start) * sector)
                for number, (kind, start, last) in enumerate(found, 1)
                if kind != bytes(16) and start <= last
            }
    return None


def find_partitions(read: ReadAt, size: int) -> dict[int, tuple[int, int]]:
    """(offset, length) in bytes of each partition, by its number, as far as the image goes."""
    entries = mbr_entries(read, 0)
    if any(kind == MBR_PROTECTIVE for kind, *_ in entries):
        tables = (gpt_partitions(read, size, sector) for sector in (512, 4096))
        found = next((one for one in tables if one is not None), {})
    else:
        sectors: dict[int, tuple[int, int]] = {}
        for number, (kind, first, count) in enumerate(entries, 1):
            if kind in MBR_EXTENDED:
                sectors.update(enumerate(logical_partitions(read, first), 5))
            elif kind and count:
                sectors[number] = (first, count)
        found = {
            number: (first * SECTOR, count * SECTOR) for number, (first, count) in sectors.items()
        }
    return {
        number: (offset, min(length, size - offset))
        for number, (offset, length) in found.items()
        if 0 < offset < size
    }


# ==== Exports ================================================================
#
# What can be opened by a name: revisions, partitions of them, and clones that may be
# written to.  A name is looked up among the revisions and is never a path.
#
#   SPEC  SPEC/pN            in one job's directory       "" is the newest
#   JOB/SPEC  JOB/SPEC/pN    in a directory of jobs       JOB is its newest, "" of all
#
# An open image is locked as for any reading, so expiry leaves it alone.  Offsets are
# those of the whole image unless they are said to be those of the export.

MOST_REPOSITORIES = 64  # loaded at a time
MOST_MAPS = 16  # of images that nobody has open, kept for the next one
SETTLED = 100_000_000  # ns; an older directory does not change again under the same time
KEPT_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,63}", re.ASCII)
OUR_NAMES = re.compile(r"config|last|status|backy\.log.*|.*\.(?:rev|sums|part|del)")

CONTEXT_ALLOCATION = "base:allocation"
CONTEXTS_SINCE = ("x-backy:changed-since=", "qemu:dirty-bitmap:since-")
NBD_STATE_HOLE_ZERO = 3  # NBD_STATE_HOLE and NBD_STATE_ZERO
NBD_STATE_DIRTY = 1


class Runs:
    """Flags for each byte from `start` to `end`, as runs.

    `starts` says where each run begins, and at last where all ends; `flags` what it has.
    """

    def __init__(self, start: int, end: int, extents: Iterable[Span], inside: int, outside: int):
        from array import array

        self.starts, self.flags = array("Q"), bytearray()
        position = start
        for first, last in extents:
            if first > position:
                self.add(position, outside)
            self.add(first, inside)
            position = last
        if position < end:
            self.add(position, outside)
        self.starts.append(end)

    def add(self, start: int, flags: int) -> None:
        if not self.flags or self.flags[-1] != flags:
            self.starts.append(start)
            self.flags.append(flags)

    def between(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, flags) in order, without gaps."""
        number = bisect_right(self.starts, start) - 1
        while start < end:
            stop = min(self.starts[number + 1], end)
            yield start, stop, self.flags[number]
            start, number = stop, number + 1


def places_with_holes(fd: int, start: int, end: int) -> list[Span] | None:
    """(end, physical minus logical) of all runs from `start` to `end`; None if not known.

    Extents are the same place exactly where this difference is the same; -1 is a hole.
    """
    runs: list[Span] = []
    try:
        for logical, physical, length, flags in extent_map(fd, start, end):
            if flags & FIEMAP_EXTENT_VAGUE:
                return None
            if logical > start:
                runs.append((logical, -1))
            start = logical + length
            runs.append((start, physical - logical))
    except OSError:
        return None
    runs.append((max(start, end), -1))
    return runs


def differing_places(one_fd: int, other_fd: int, start: int, end: int) -> list[Span] | None:
    """(start, end) of what two files do not share, neighbours joined; None if not known."""
    one_runs, other_runs = (places_with_holes(fd, start, end) for fd in (one_fd, other_fd))
    if one_runs is None or other_runs is None:
        return None
    spans: list[Span] = []
    ones, others = iter(one_runs), iter(other_runs)
    one, one_place = next(ones)
    other, other_place = next(others)
    while start < end:
        stop = min(one, other, end)
        if one_place == other_place or stop <= start:
            pass
        elif spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
        start = max(start, stop)
        if one == stop and stop < end:
            one, one_place = next(ones)
        if other == stop and stop < end:
            other, other_place = next(others)
    return spans


def differing_blocks(one: Sums, other: Sums, size: int) -> Iterator[Span]:
    """(start, end) of the blocks whose digests differ in two files for `size` bytes."""
    for offset in range(0, size, UNIT * BLOCK // DIGEST):
        count = min(UNIT // DIGEST, -(-(size - offset) // BLOCK))
        place = sums_header.size + DIGEST * (offset // BLOCK)
        ours, theirs = (read_piece(sums.fd, DIGEST * count, place) for sums in (one, other))
        if ours == theirs and len(ours) == DIGEST * count:
            continue
        for number in range(count):
            at = DIGEST * number
            if ours[at : at + DIGEST] != theirs[at : at + DIGEST]:
                start = offset + number * BLOCK
                yield start, min(start + BLOCK, size)


def common_spans(ones: Iterable[Span], others: Iterable[Span]) -> Iterator[Span]:
    """What two lists of (start, end), each in order, have in common."""
    rest = iter(others)
    other = next(rest, None)
    for start, end in ones:
        while other is not None and other[1] <= start:
            other = next(rest, None)
        while other is not None and other[0] < end:
            yield max(start, other[0]), min(end, other[1])
            if other[1] > end:
                break
            other = next(rest, None)


def without_span(ranges: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of what is left of `ranges` when start to end is taken out."""
    left = []
    for offset, length in ranges:
        for first, last in (
            (offset, min(offset + length, start)),
            (max(offset, end), offset + length),
        ):
            if first < last:
                left.append((first, last - first))
    return left


@dataclass(frozen=True)
class ExportMode:
    """How exports are opened."""

    writable: bool = False
    shared: bool = False  # one clone for all clients, as long as the server runs
    keep: str = ""  # the name that a clone stays under
    verify: bool = False


@dataclass(frozen=True)
class ExportName:
    """What a name stands for."""

    job: str  # "" in one job's directory
    revision: Revision
    partition: int = 0  # 0 is the whole image

    def __str__(self) -> str:
        parts = [self.job, self.revision.id, f"p{self.partition}" if self.partition else ""]
        return "/".join(filter(None, parts))


class ImageMaps:
    """What was found out about an image that does not change."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: Runs | None = None
        self.changed: dict[str, Runs] = {}
        self.partitions: dict[int, tuple[int, int]] | None = None


class ExportedImage:
    """An image that is open for one client, or a clone that is for several."""

    def __init__(self, fd: int, found: ExportName, maps: ImageMaps | None) -> None:
        self.fd, self.size, self.found = fd, os.fstat(fd).st_size, found
        self.maps = maps  # None: it changes
        self.damaged = list(found.revision.damaged)
        self.is_writable = self.is_written = False
        self.users = 1
        self.kept = ""
        self.checked: CheckedImage | None = None
        self.stack = ExitStack()
        self.stack.callback(close, fd)

    def data(self, start: int, end: int) -> Runs:
        """What is data and what is a hole, at least from start to end."""
        if self.maps is None:
            return Runs(start, end, data_extents(self.fd, start, end), 0, NBD_STATE_HOLE_ZERO)
        with self.maps.lock:
            if self.maps.data is None:
                runs = Runs(
                    0, self.size, data_extents(self.fd, 0, self.size), 0, NBD_STATE_HOLE_ZERO
                )
                if os.fstat(self.fd).st_size != self.size:  # what is missing is no hole
                    raise OSError(errno.EIO, "the image was cut short")
                self.maps.data = runs
            return self.maps.data

    def partitions(self) -> dict[int, tuple[int, int]]:
        if self.maps is None or self.maps.partitions is None:
            found = find_partitions(lambda length, at: read_piece(self.fd, length, at), self.size)
            if self.maps is None:
                return found
            self.maps.partitions = found
        return self.maps.partitions

    def bad_spans(self, start: int, end: int) -> list[Span]:
        """Where it is known to be damaged, from start to end."""
        found = common_spans([(start, end)], [(at, at + length) for at, length in self.damaged])
        return list(found)

    def touch(self, start: int, end: int) -> None:
        """Note that a part of a clone was written to: it is what the client wants it to be."""
        self.is_written = True
        if self.damaged:
            self.damaged = without_span(self.damaged, start, end)

    def write(self, view: memoryview, offset: int) -> None:
        write_all(self.fd, view, offset)
        self.touch(offset, offset + len(view))

    def zero(self, offset: int, length: int, as_hole: bool, only_fast: bool) -> bool:
        """Make a part read as zeros; False if that is wanted fast and cannot be."""
        if not (punch_hole if as_hole else zero_range)(self.fd, offset, length):
            if only_fast:
                return False
            for start in range(offset, offset + length, UNIT):
                rest = min(UNIT, offset + length - start)
                write_all(self.fd, memoryview(ZEROS)[:rest], start)
        self.touch(offset, offset + length)
        return True

    def trim(self, offset: int, length: int) -> None:
        if punch_hole(self.fd, offset, length):
            self.touch(offset, offset + length)

    def flush(self) -> None:
        if self.is_writable:
            os.fdatasync(self.fd)


class Comparison:
    """Where an open image may differ from another revision, which is held open too."""

    def __init__(self, exports: Exports, image: ExportedImage, base: Revision) -> None:
        self.exports, self.image, self.base = exports, image, base
        with exports.repository(image.found.job) as repository:
            self.fd = repository.open_image(base)
        self.base_size = os.fstat(self.fd).st_size

    def close(self) -> None:
        close(self.fd)

    def spans(self, start: int, end: int) -> list[Span]:
        """(start, end) of what may differ: it has other extents.

        Where that is much, or not known, the digests are asked too: a copy has other
        extents everywhere.
        """
        both = min(end, self.base_size)
        found = differing_places(self.image.fd, self.fd, start, both) if start < both else []
        if found is None:
            found = [(start, both)]
        if self.image.maps and sum(last - first for first, last in found) > (both - start) // 4:
            with suppress(Damaged, BackyError):
                found = list(common_spans(found, self.differing_blocks()))
        return [*found, *([(max(start, both), end)] if both < end else [])]

    def differing_blocks(self) -> list[Span]:
        """By the digests of both.  Raises Damaged where there are none to rely on."""
        with self.exports.repository(self.image.found.job) as repository, ExitStack() as stack:
            sums = []
            for revision in (self.image.found.revision, self.base):
                fd, one = repository.open_sums(revision)
                stack.callback(close, fd)
                sums.append(one)
            return list(differing_blocks(*sums, min(self.image.size, self.base_size)))

    def runs(self, start: int, end: int) -> Runs:
        maps = self.image.maps
        if maps is None:
            return Runs(start, end, self.spans(start, end), NBD_STATE_DIRTY, 0)
        key = f"{self.base.id} {state_of_inode(self.fd)}"
        with maps.lock:
            if key not in maps.changed:
                whole = self.spans(0, self.image.size)
                maps.changed[key] = Runs(0, self.image.size, whole, NBD_STATE_DIRTY, 0)
            return maps.changed[key]


class Export:
    """What a client has open: an image or a part of it, and what it is compared with."""

    def __init__(self, found: ExportName, image: ExportedImage, offset: int, size: int) -> None:
        self.found, self.image, self.offset, self.size = found, image, offset, size
        self.stack = ExitStack()
        self.contexts: list[tuple[int, Callable[[int, int], Runs]]] = []


def describe_export(job: str, revision: Revision) -> str:
    """The line that goes with a name in the list."""
    tags = ",".join(revision.tags) or "no tags"
    size = format_size(revision.size or 0)
    when, trust = format_time(revision.timestamp), revision.trust.value
    return f"{job}, {when} UTC, {printable(tags)}, {size}, {trust}"


class Exports:
    """The revisions of one job, or of all jobs below a directory, as they are at the moment."""

    def __init__(self, path: str, is_base: bool, mode: ExportMode) -> None:
        self.path, self.is_base, self.mode = path.rstrip("/") or "/", is_base, mode
        self.lock = threading.RLock()  # for all that follows, and for every Repository
        self.repositories: dict[str, tuple[Repository, tuple[int, ...]]] = {}
        self.listings: dict[str, tuple[tuple[int, ...], list[tuple[str, str]]]] = {}
        self.maps: dict[str, ImageMaps] = {}
        self.open_images: set[ExportedImage] = set()
        self.clones: dict[tuple[object, str, str], ExportedImage] = {}

    # -- names ----------------------------------------------------------------

    @contextmanager
    def repository(self, job: str) -> Iterator[Repository]:
        """A job's repository as it is now, for one at a time.  Raises BackyError."""
        with self.lock:
            yield self.load(job)

    def path_of(self, job: str) -> str:
        return os.path.join(self.path, job) if job else self.path

    def state_of(self, job: str) -> tuple[tuple[int, ...], bool]:
        """What changes with a job's directory; and whether a change would show by now."""
        path = self.path_of(job)
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError as e:
            words = "no such directory" if e.errno == errno.ENOENT else e.strerror
            raise NotFound(f"{printable(path)}: {words}") from e
        if job and not stat.S_ISDIR(status.st_mode):
            raise NotFound(f"no job {printable(job)!r}")
        is_settled = time.time_ns() - status.st_mtime_ns > SETTLED
        return (status.st_dev, status.st_ino, status.st_mtime_ns), is_settled

    def load(self, job: str) -> Repository:
        """Read the directory again if it is not the one that was read, or has changed since."""
        repository, known = self.repositories.pop(job, (None, ()))
        try:
            state, is_settled = self.state_of(job)
            if repository is not None and known[:2] != state[:2]:
                repository.close()
                repository = None
            if repository is None:
                repository = Repository.open(self.path_of(job))
            elif known != state:
                repository.load()
        except BaseException:
            if repository is not None:
                repository.close()
            raise
        self.repositories[job] = (repository, state if is_settled else (*state[:2], -1))
        while len(self.repositories) > MOST_REPOSITORIES:
            self.repositories.pop(next(iter(self.repositories)))[0].close()
        return repository

    def jobs(self) -> list[str]:
        """The directories in which there may be revisions."""
        if not self.is_base:
            return [""]
        with explain(f"cannot list {printable(self.path)}"):
            entries = sorted(os.scandir(self.path), key=lambda entry: entry.name)
        return [
            entry.name
            for entry in entries
            if JOB_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]

    def names(self) -> Iterator[tuple[str, str]]:
        """Name and description of all complete revisions, the newest of each job first."""
        for job in self.jobs():
            try:
                lines = self.names_of(job)
            except BackyError as e:
                log.debug("nbd: %s", e)
                continue
            yield from lines

    def names_of(self, job: str) -> list[tuple[str, str]]:
        """They are kept, for there may be more jobs than can be loaded at a time."""
        with self.lock:
            known = self.listings.get(job)
            if known and known[0] == self.state_of(job)[0]:
                return known[1]
            repository = self.load(job)
            revisions = [one for one in reversed(repository.complete) if not one.problem]
            lines = [
                (str(ExportName(job, one)), describe_export(repository.name, one))
                for one in revisions
            ]
            self.listings[job] = (self.repositories[job][1], lines)
            return lines

    def find(self, name: str) -> ExportName:
        """What `name` stands for.  Raises NotFound."""
        job, *parts = name.split("/") if self.is_base else ("", *name.split("/"))
        spec = parts.pop(0) if parts else ""
        number = re.fullmatch("p([1-9][0-9]{0,2})", parts[0], re.ASCII) if parts else None
        if len(parts) > 1 or (parts and not number) or "\0" in name:
            raise NotFound(f"no export {printable(name)!r}")
        partition = int(number[1]) if number else 0
        if self.is_base and not job:
            if spec:
                raise NotFound(f"no export {printable(name)!r}")
            return self.newest()
        if self.is_base and not JOB_NAME.fullmatch(job):
            raise NotFound(f"no job {printable(job)!r}")
        with self.repository(job) as repository:
            return ExportName(job, repository.find(spec or "last"), partition)

    def newest(self) -> ExportName:
        found = []
        for job in self.jobs():
            with suppress(BackyError), self.repository(job) as repository:
                found.append(ExportName(job, repository.find("last")))
        if not found:
            raise NotFound("there is no complete revision yet")
        return max(found, key=lambda one: (one.revision.clock, one.job))

    def describe(self, found: ExportName) -> str:
        with self.repository(found.job) as repository:
            return describe_export(repository.name, found.revision)

    def find_contexts(
        self, found: ExportName, query: str, listing: bool
    ) -> list[tuple[str, Revision | None]]:
        """The metadata contexts that a query means; with the revision to compare with, if any."""
        if query == CONTEXT_ALLOCATION or (listing and query == "base:"):
            return [(CONTEXT_ALLOCATION, None)]
        with self.repository(found.job) as repository:
            for prefix in CONTEXTS_SINCE:
                space = prefix.partition(":")[0] + ":"
                if listing and query in (space, space + "dirty-bitmap:", prefix):
                    others = self.bases(repository, found, all_of_them=space == "x-backy:")
                    return [(prefix + one.id, one) for one in others]
                if query.startswith(prefix) and query != prefix:
                    with suppress(NotFound):
                        base = repository.find(query[len(prefix) :])
                        if base.is_complete and not base.problem:
                            return [(query, base)]
        return []

    def bases(
        self, repository: Repository, found: ExportName, all_of_them: bool
    ) -> ListLike[Revision]:
        """What it may be compared with: all other revisions, or the one that it was made from."""
        others = [
            one for one in repository.complete if one.id != found.revision.id and not one.problem
        ]
        if all_of_them:
            return others
        parent = [one for one in others if one.id == found.revision.parent]
        return parent or [one for one in others if one.clock < found.revision.clock][-1:]

    # -- opening --------------------------------------------------------------

    def open(self, found: ExportName, group: object = None) -> Export:
        """Open an export; to write to it, if that is the mode and there is a group to do it."""
        with self.repository(found.job) as repository:
            if group is not None and self.mode.writable:
                image = self.open_clone(repository, found, group)
            else:
                image = self.open_image(repository, found)
        try:
            offset, size = 0, image.size
            if found.partition:
                partitions = image.partitions()
                if found.partition not in partitions:
                    numbers = ", ".join(f"p{number}" for number in partitions) or "none"
                    raise NotFound(f"{found}: no such partition", f"there are: {numbers}")
                offset, size = partitions[found.partition]
            return Export(found, image, offset, size)
        except BaseException:
            self.release(image)
            raise

    def open_image(self, repository: Repository, found: ExportName) -> ExportedImage:
        revision = found.revision
        if revision.problem:
            raise Distrusted(f"{repository.name}: {revision.id}: {revision.problem}")
        fd = repository.open_image(revision)
        image = ExportedImage(fd, found, self.maps_of(fd) if revision.is_complete else None)
        self.open_images.add(image)
        try:
            if revision.size is not None and image.size != revision.size:
                raise Distrusted(f"{repository.name}: {revision.id} has the wrong size")
            if self.mode.verify:
                image.checked = CheckedImage(repository, revision, image.stack)
        except BaseException:
            self.release(image)
            raise
        return image

    def maps_of(self, fd: int) -> ImageMaps:
        """What is known of an image; those not asked for the longest time are forgotten."""
        key = f"{os.fstat(fd).st_dev} {state_of_inode(fd)}"
        maps = self.maps.pop(key, None) or ImageMaps()
        self.maps[key] = maps
        while len(self.maps) > MOST_MAPS:
            self.maps.pop(next(iter(self.maps)))
        return maps

    def open_clone(self, repository: Repository, found: ExportName, group: object) -> ExportedImage:
        key = ("" if self.mode.shared else group, found.job, found.revision.id)
        clone = self.clones.get(key)
        if clone is not None:
            clone.users += 1
            return clone
        origin = self.open_image(repository, found)
        fd, name = -1, ""
        try:
            with explain(f"{repository.name}: cannot make a clone"):
                fd, name = self.create_clone(repository)
                clone_file(origin.fd, fd)
            hint_small_copies(fd)
            clone = ExportedImage(fd, found, None)
        except BaseException:
            if fd >= 0:
                close(fd)
            if name:
                os.unlink(name, dir_fd=repository.dir_fd)
            self.release(origin)
            raise
        clone.stack.callback(self.release, origin)  # it stays as long as its clone
        clone.kept, clone.is_writable = name, True
        clone.users += self.mode.shared  # the server itself
        self.clones[key] = clone
        self.open_images.add(clone)
        return clone

    def create_clone(self, repository: Repository) -> tuple[int, str]:
        """A new file in the job's directory, with the name it has if it is to stay."""
        flags = os.O_RDWR | os.O_CLOEXEC
        if not self.mode.keep:
            return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=repository.dir_fd), ""
        for number in itertools.count(1):
            name = self.mode.keep if number == 1 else f"{self.mode.keep}-{number}"
            with suppress(FileExistsError):
                return open_regular(repository.dir_fd, name, flags | os.O_CREAT | os.O_EXCL), name
        raise AssertionError

    # -- while it is open -------------------------------------------------------

    def compare(self, export: Export, base: Revision) -> Callable[[int, int], Runs]:
        """What answers how an open export differs from `base`, which is held from now on."""
        comparison = Comparison(self, export.image, base)
        export.stack.callback(comparison.close)
        return comparison.runs

    def refresh(self) -> None:
        """Learn what has been found to be damaged in images that are open."""
        with self.lock:
            for image in list(self.open_images):
                if image.is_writable:
                    continue
                with suppress(BackyError):
                    repository = self.load(image.found.job)
                    known = repository.current(image.found.revision).damaged
                    image.damaged = list(join_ranges([*image.damaged, *known]))

    def note_damage(self, image: ExportedImage, ranges: list[tuple[int, int]]) -> None:
        """Remember in the revision what its digests have shown to be damaged."""
        image.damaged = list(join_ranges([*image.damaged, *ranges]))
        with suppress(BackyError), self.repository(image.found.job) as repository:
            repository.mark_damaged(image.found.revision, ranges)

    def close_export(self, export: Export) -> None:
        export.stack.close()
        self.release(export.image)

    def release(self, image: ExportedImage) -> None:
        """Close an image when its last user has gone; a clone is gone then, unless it is kept."""
        with self.lock:
            image.users -= 1
            if image.users:
                return
            self.open_images.discard(image)
            self.clones = {key: one for key, one in self.clones.items() if one is not image}
            if image.kept:
                self.keep(image)
            image.stack.close()

    def keep(self, clone: ExportedImage) -> None:
        """Let a clone stay that was written to; all of it is on the medium then."""
        found = clone.found
        try:
            with self.repository(found.job) as repository:
                name = repository.name
                if not clone.is_written:
                    os.unlink(clone.kept, dir_fd=repository.dir_fd)
                    return
                with explain(f"{name}: cannot write {clone.kept} to the medium"):
                    sync(clone.fd)
                    sync(repository.dir_fd)
            log.info("%s: what was written to %s is kept as %s", name, found, clone.kept)
        except (BackyError, OSError) as e:
            log.error("%s: %s", found, e)

    def close(self) -> None:
        """Let go of the shared clones, at the end."""
        for clone in list(self.clones.values()):
            self.release(clone)
        for repository, _ in self.repositories.values():
            repository.close()


# ==== NBD ====================================================================
#
# Network block devices, by the protocol's own document (doc/proto.md of the NBD
# project): a handshake, then requests.  A thread for each client; what one of them
# sends, or does not read, costs its own connection only.  The life of a session:
#
#   accepted  -- handshake, 10 s at most -->  export open  -- requests -->  closed
#
# Requests that came in one piece are answered in one piece: that is where the speed
# is from.  No more than MOST_WAITING bytes of replies exist at a time.

NBD_PORT = 9000
NBD_CLIENTS = 16  # by default
NBD_HANDSHAKE = 10.0  # seconds
NBD_HALF_OPEN = 64  # handshakes at a time; then the most silent one makes way
NBD_GRACE = 10.0  # seconds, at the end, for what is in flight
NBD_STALLED = 600  # seconds in which a client read nothing of what it asked for
NBD_NEWS = 1.0  # seconds between two looks at what was found to be damaged
MOST_OPTION = 4 * KiB
MOST_SKIPPED = 64 * KiB  # a larger option, up to this, is refused; beyond, the client is dropped
MOST_REQUEST = 32 * MiB
MOST_PAYLOAD = 64 * MiB  # likewise
MOST_CONTEXTS = 32
MOST_DESCRIPTORS = 64 * KiB  # in one answer; the client asks again for the rest
MOST_WAITING = MiB
MOST_PIECES = 1000  # IOV_MAX is 1024
COLD_BATCHES = 8
SMALL_READ = 32 * KiB  # up to here replies are gathered, beyond they go by sendfile()
REQUEST_ROOM = 64 * KiB
MSG_DONTWAIT, MSG_MORE = 0x40, 0x8000  # linux/socket.h
SD_LISTEN_FDS_START = 3  # sd_listen_fds(3)

NBDMAGIC, IHAVEOPT = b"NBDMAGIC", b"IHAVEOPT"
NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES = 1, 2
nbd_option = struct.Struct(">8sII")  # IHAVEOPT, option, length
nbd_option_reply = struct.Struct(">QIII")  # magic, option, type, length
NBD_REP_MAGIC = 0x3E889045565A9

NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_STARTTLS = 1, 2, 3, 5
NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY = 6, 7, 8
NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_EXTENDED_HEADERS = 9, 10, 11
NBD_REP_ACK, NBD_REP_SERVER, NBD_REP_INFO, NBD_REP_META_CONTEXT = 1, 2, 3, 4
NBD_REP_ERR = 1 << 31
NBD_REP_ERR_UNSUP, NBD_REP_ERR_POLICY, NBD_REP_ERR_INVALID = (NBD_REP_ERR + n for n in (1, 2, 3))
NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_SHUTDOWN = (
    NBD_REP_ERR + n for n in (5, 6, 7)
)
NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_EXT_HEADER_REQD = NBD_REP_ERR + 9, NBD_REP_ERR + 10
NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE = 0, 1, 2, 3

NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA = 1, 2, 4, 8
NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, NBD_FLAG_SEND_DF = 1 << 5, 1 << 6, 1 << 7
NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_FAST_ZERO = 1 << 8, 1 << 10, 1 << 11
FLAGS_ALWAYS = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE
FLAGS_WRITABLE = NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO

nbd_request = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
NBD_REQUEST_MAGIC = 0x25609513
nbd_request_extended = struct.Struct(">IHHQQQ")
NBD_EXTENDED_REQUEST_MAGIC = 0x21E41C71
nbd_simple_reply = struct.Struct(">IIQ")  # magic, error, cookie
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
nbd_chunk = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of what follows
nbd_chunk_with_data = struct.Struct(">IHHQIQ")  # and the offset of the data in OFFSET_DATA
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
nbd_chunk_extended = struct.Struct(">IHHQQQ")  # the same, with the offset of the request
nbd_chunk_extended_with_data = struct.Struct(">IHHQQQQ")
NBD_EXTENDED_REPLY_MAGIC = 0x6E8A278C

NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH = 0, 1, 2, 3
NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS = 4, 5, 6, 7
NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_REQ_ONE = 1, 2, 4, 8
NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_FLAG_PAYLOAD_LEN = 16, 32
# the method, the flags beside FUA, whether it changes something
NBD_COMMANDS = {
    NBD_CMD_READ: ("read", NBD_CMD_FLAG_DF, False),
    NBD_CMD_WRITE: ("write", NBD_CMD_FLAG_PAYLOAD_LEN, True),
    NBD_CMD_FLUSH: ("flush_export", 0, False),
    NBD_CMD_TRIM: ("trim", 0, True),
    NBD_CMD_CACHE: ("cache", 0, False),
    NBD_CMD_WRITE_ZEROES: ("write_zeroes", NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, True),
    NBD_CMD_BLOCK_STATUS: ("block_status", NBD_CMD_FLAG_REQ_ONE, False),
}
NBD_REPLY_FLAG_DONE = 1
NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE = 0, 1, 2
NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 5, 6
NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2
# The numbers of Linux are those of the protocol, which has only these.
NBD_ERRORS = {errno.ENOSPC: errno.ENOSPC, errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC}
NBD_ERRORS[errno.ENOMEM] = errno.ENOMEM


class NBDDropped(Exception):
    """The client has gone, or has broken the protocol in a way that cannot be answered."""


class NBDRefused(Exception):
    """An option is answered with this error, and the handshake goes on."""

    def __init__(self, error: int, text: str) -> None:
        super().__init__(text)
        self.error = error


class NBDFailed(Exception):
    """A request is answered with this error."""

    def __init__(self, error: int, text: str) -> None:
        super().__init__(text)
        self.error = error


@contextmanager
def failing_as_nbd() -> Iterator[None]:
    """Turn an OSError into the error that the protocol has for it."""
    try:
        yield
    except OSError as e:
        log.error("nbd: %s", e)
        raise NBDFailed(NBD_ERRORS.get(e.errno or 0, errno.EIO), e.strerror or "error") from e


def counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


class OptionReader:
    """Takes an option's data apart.  Raises NBDRefused for what is too short or too long."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def take(self, length: int) -> bytes:
        piece = self.data[self.at : self.at + length]
        if len(piece) < length:
            raise NBDRefused(NBD_REP_ERR_INVALID, "the option is too short for what it says")
        self.at += length
        return piece

    def text(self) -> str:
        piece = self.take(self.number(">I"))
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            raise NBDRefused(NBD_REP_ERR_INVALID, "not in UTF-8") from None

    def end(self) -> None:
        if self.at != len(self.data):
            raise NBDRefused(NBD_REP_ERR_INVALID, "the option is longer than what it says")


class NBDHandshake:
    """From the greeting until an export is open."""

    OPTIONS: ClassVar[dict[int, str]] = {
        NBD_OPT_EXPORT_NAME: "export_name",
        NBD_OPT_ABORT: "abort",
        NBD_OPT_LIST: "list_exports",
        NBD_OPT_STARTTLS: "start_tls",
        NBD_OPT_INFO: "info",
        NBD_OPT_GO: "go",
        NBD_OPT_STRUCTURED_REPLY: "structured_reply",
        NBD_OPT_LIST_META_CONTEXT: "list_meta_context",
        NBD_OPT_SET_META_CONTEXT: "set_meta_context",
        NBD_OPT_EXTENDED_HEADERS: "extended_headers",
    }

    def __init__(self, session: NBDSession) -> None:
        self.session, self.server = session, session.server
        self.exports = self.server.exports
        self.connection = session.connection
        self.deadline = time.monotonic() + NBD_HANDSHAKE
        self.is_tls = self.is_fixed = self.no_zeroes = False
        self.export: Export | None = None
        self.forget_all()

    def forget_all(self) -> None:
        """Nothing is agreed yet; also behind STARTTLS, before which anybody may have spoken."""
        self.structured = self.extended = False
        self.contexts: list[tuple[str, Revision | None]] = []
        self.contexts_of: tuple[str, str] | None = None

    # -- bytes ----------------------------------------------------------------

    def limit(self) -> None:
        """Wait for the client no longer than until the deadline."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise NBDDropped(f"no end of the handshake within {NBD_HANDSHAKE:g} s")
        self.connection.settimeout(left)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes, and not one more."""
        data = b""
        while len(data) < length:
            self.limit()
            piece = self.connection.recv(length - len(data))
            if not piece:
                raise NBDDropped("the client has gone")
            data += piece
        self.session.last_heard = time.monotonic()
        return data

    def send(self, data: bytes) -> None:
        self.limit()
        self.connection.sendall(data)

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(nbd_option_reply.pack(NBD_REP_MAGIC, option, kind, len(data)) + data)

    # -- phases ---------------------------------------------------------------

    def run(self) -> Export:
        """Shake hands.  Raises NBDDropped if it comes to nothing, and OSError."""
        flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
        self.send(NBDMAGIC + IHAVEOPT + struct.pack(">H", flags))
        (answer,) = struct.unpack(">I", self.receive(4))
        if answer & ~flags:
            raise NBDDropped(f"unknown flags {answer:#x}")
        self.is_fixed = bool(answer & NBD_FLAG_FIXED_NEWSTYLE)
        self.no_zeroes = bool(answer & NBD_FLAG_NO_ZEROES)
        while self.export is None:
            self.option(*nbd_option.unpack(self.receive(nbd_option.size)))
        return self.export

    def option(self, magic: bytes, option: int, length: int) -> None:
        if magic != IHAVEOPT:
            raise NBDDropped("an option without its magic")
        if length > MOST_SKIPPED:
            raise NBDDropped(f"an option of {length} bytes")
        data = self.receive(length)
        try:
            self.refuse_option(option, length)
            getattr(self, self.OPTIONS[option])(option, data)
        except NBDRefused as e:
            if option == NBD_OPT_EXPORT_NAME or not self.is_fixed:
                raise NBDDropped(str(e)) from e  # no other answer is allowed
            self.reply(option, e.error, str(e).encode("utf-8", "replace")[:KiB])

    def refuse_option(self, option: int, length: int) -> None:
        """Raise NBDRefused for what is not allowed at all, or not now."""
        if option not in self.OPTIONS:
            raise NBDRefused(NBD_REP_ERR_UNSUP, "unknown option")
        if not self.is_fixed and option != NBD_OPT_EXPORT_NAME:
            raise NBDRefused(NBD_REP_ERR_UNSUP, "only for fixed newstyle")
        if length > MOST_OPTION:
            raise NBDRefused(NBD_REP_ERR_TOO_BIG, f"more than {MOST_OPTION} bytes")
        open_now = (NBD_OPT_ABORT, NBD_OPT_STARTTLS)
        if self.server.tls and not self.is_tls and option not in open_now:
            raise NBDRefused(NBD_REP_ERR_TLS_REQD, "this server talks by TLS only")
        without_data = (NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY)
        if length and option in (*without_data, NBD_OPT_EXTENDED_HEADERS):
            raise NBDRefused(NBD_REP_ERR_INVALID, "this option has no data")
        if self.server.is_stopping and option != NBD_OPT_ABORT:
            raise NBDRefused(NBD_REP_ERR_SHUTDOWN, "the server is about to end")

    def abort(self, option: int, _: bytes) -> None:
        with suppress(OSError):  # it need not wait for this
            self.reply(option, NBD_REP_ACK)
        raise NBDDropped("")

    def start_tls(self, option: int, _: bytes) -> None:
        if self.server.tls is None:
            raise NBDRefused(NBD_REP_ERR_POLICY, "this server has no certificate")
        if self.is_tls:
            raise NBDRefused(NBD_REP_ERR_INVALID, "it is TLS already")
        self.reply(option, NBD_REP_ACK)
        self.limit()
        self.connection = self.session.connection = self.server.tls.wrap_socket(
            self.connection, server_side=True, do_handshake_on_connect=False
        )
        self.connection.do_handshake()
        self.is_tls = True
        self.forget_all()

    def list_exports(self, option: int, _: bytes) -> None:
        names = self.exports.names()
        try:
            while True:
                started = time.monotonic()
                one = next(names, None)
                self.deadline += time.monotonic() - started  # it is not the client who is slow
                if one is None:
                    break
                self.reply(option, NBD_REP_SERVER, counted(one[0].encode()) + one[1].encode())
        except BackyError as e:
            raise NBDRefused(NBD_REP_ERR_POLICY, str(e)) from e
        self.reply(option, NBD_REP_ACK)

    def structured_reply(self, option: int, _: bytes) -> None:
        if self.extended:
            raise NBDRefused(NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are agreed on")
        self.structured = True
        self.reply(option, NBD_REP_ACK)

    def extended_headers(self, option: int, _: bytes) -> None:
        self.structured = self.extended = True
        self.reply(option, NBD_REP_ACK)

    # -- exports --------------------------------------------------------------

    def find(self, name: str) -> ExportName:
        try:
            return self.exports.find(name)
        except NotFound as e:
            raise NBDRefused(NBD_REP_ERR_UNKNOWN, str(e)) from e
        except BackyError as e:
            raise NBDRefused(NBD_REP_ERR_POLICY, str(e)) from e

    def open(self, found: ExportName, group: object = None) -> Export:
        try:
            return self.exports.open(found, group)
        except NotFound as e:
            raise NBDRefused(NBD_REP_ERR_UNKNOWN, str(e)) from e
        except BackyError as e:
            log.error("nbd: %s", e)
            raise NBDRefused(NBD_REP_ERR_POLICY, str(e)) from e

    def open_for_good(self, found: ExportName) -> Export:
        """Open what the client has decided for, with the contexts that it has chosen."""
        if not self.server.claim(self.session):
            raise NBDRefused(
                NBD_REP_ERR_POLICY, f"{count_of(self.server.most_clients, 'client')} at most"
            )
        try:
            export = self.open(found, self.session.group)
        except NBDRefused:
            self.session.is_serving = False
            raise
        try:
            with explain(f"cannot examine {found}"):
                export.image.data(0, export.image.size)
            for number, (_, base) in enumerate(self.contexts_for(found), 1):
                runs = export.image.data if base is None else self.exports.compare(export, base)
                export.contexts.append((number, runs))
        except BackyError as e:
            self.exports.close_export(export)
            self.session.is_serving = False
            raise NBDRefused(NBD_REP_ERR_POLICY, str(e)) from e
        return export

    def contexts_for(self, found: ExportName) -> list[tuple[str, Revision | None]]:
        return self.contexts if self.contexts_of == (found.job, str(found)) else []

    def flags(self) -> int:
        mode = self.exports.mode
        flags = FLAGS_ALWAYS | (FLAGS_WRITABLE if mode.writable else NBD_FLAG_READ_ONLY)
        if self.structured:
            flags |= NBD_FLAG_SEND_DF
        if not mode.writable or mode.shared or self.session.is_process:
            flags |= NBD_FLAG_CAN_MULTI_CONN
        return flags

    def export_name(self, _: int, data: bytes) -> None:
        if self.extended:
            raise NBDRefused(NBD_REP_ERR_EXT_HEADER_REQD, "not with extended headers")
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError:
            raise NBDRefused(NBD_REP_ERR_UNKNOWN, "not in UTF-8") from None
        export = self.open_for_good(self.find(name))
        self.export = export
        padding = b"" if self.no_zeroes else bytes(124)
        self.send(struct.pack(">QH", export.size, self.flags()) + padding)

    def read_name(self, data: bytes) -> tuple[ExportName, list[int]]:
        """What INFO and GO ask for: an export, and what is to be told of it."""
        reader = OptionReader(data)
        name = reader.text()
        wanted = [reader.number(">H") for _ in range(reader.number(">H"))]
        reader.end()
        return self.find(name), wanted

    def tell(self, option: int, export: Export, wanted: list[int]) -> None:
        """The replies about an export, the same for INFO and GO."""
        answers = {
            NBD_INFO_EXPORT: lambda: struct.pack(">QH", export.size, self.flags()),
            NBD_INFO_NAME: lambda: str(export.found).encode(),
            NBD_INFO_DESCRIPTION: lambda: self.exports.describe(export.found).encode(),
            NBD_INFO_BLOCK_SIZE: lambda: struct.pack(">III", 1, PAGE, MOST_REQUEST),
        }
        for kind in answers:
            if kind == NBD_INFO_EXPORT or kind in wanted:
                with suppress(BackyError):  # a description may be lost by now
                    self.reply(option, NBD_REP_INFO, struct.pack(">H", kind) + answers[kind]())

    def info(self, option: int, data: bytes) -> None:
        found, wanted = self.read_name(data)
        export = self.open(found)
        try:
            self.tell(option, export, wanted)
        finally:
            self.exports.close_export(export)
        self.reply(option, NBD_REP_ACK)

    def go(self, option: int, data: bytes) -> None:
        found, wanted = self.read_name(data)
        self.export = export = self.open_for_good(found)
        self.tell(option, export, wanted)
        self.reply(option, NBD_REP_ACK)

    # -- metadata contexts ----------------------------------------------------

    def read_queries(self, data: bytes) -> tuple[ExportName, list[str]]:
        if not self.structured:
            raise NBDRefused(NBD_REP_ERR_INVALID, "only with structured replies")
        reader = OptionReader(data)
        name = reader.text()
        queries = [reader.text() for _ in range(reader.number(">I"))]
        reader.end()
        return self.find(name), queries

    def chosen(
        self, found: ExportName, queries: list[str], listing: bool
    ) -> list[tuple[str, Revision | None]]:
        try:
            matches = [self.exports.find_contexts(found, one, listing) for one in queries]
        except BackyError as e:
            raise NBDRefused(NBD_REP_ERR_POLICY, str(e)) from e
        return list(dict(itertools.chain(*matches)).items())

    def list_meta_context(self, option: int, data: bytes) -> None:
        found, queries = self.read_queries(data)
        everything = ["base:", "x-backy:", "qemu:"]
        for name, _ in self.chosen(found, queries or everything, True):
            self.reply(option, NBD_REP_META_CONTEXT, bytes(4) + name.encode())
        self.reply(option, NBD_REP_ACK)

    def set_meta_context(self, option: int, data: bytes) -> None:
        self.contexts, self.contexts_of = [], None
        found, queries = self.read_queries(data)
        contexts = self.chosen(found, queries, False)
        if len(contexts) > MOST_CONTEXTS:
            raise NBDRefused(NBD_REP_ERR_TOO_BIG, f"more than {MOST_CONTEXTS} contexts")
        for number, (name, _) in enumerate(contexts, 1):
            text = struct.pack(">I", number) + name.encode()
            self.reply(option, NBD_REP_META_CONTEXT, text)
        self.contexts, self.contexts_of = contexts, (found.job, str(found))
        self.reply(option, NBD_REP_ACK)


def is_loopback(address: str) -> bool:
    return re.match(r"(?:::ffff:)?127\.|::1\Z", address) is not None


def may_sendfile(connection: Any, is_tls: bool) -> bool:
    """Whether bytes can go to the client uncopied, and whether that is any good.

    Over loopback it is not: what the server saves, the client pays twice.
    """
    import socket

    if is_tls or connection.family == socket.AF_UNIX:
        return not is_tls
    return not is_loopback(connection.getpeername()[0])


class NBDTransmission:
    """Requests and replies, until the client has enough."""

    def __init__(self, session: NBDSession, handshake: NBDHandshake, export: Export) -> None:
        self.session, self.server = session, session.server
        self.connection, self.is_tls = session.connection, handshake.is_tls
        self.export, self.image = export, export.image
        self.structured, self.extended = handshake.structured, handshake.extended
        self.by_sendfile = may_sendfile(self.connection, self.is_tls) and not self.image.checked
        self.form = nbd_request_extended if self.extended else nbd_request
        self.magic = NBD_EXTENDED_REQUEST_MAGIC if self.extended else NBD_REQUEST_MAGIC
        self.room = memoryview(bytearray(REQUEST_ROOM))
        self.filled = 0
        self.parts: list[Any] = []  # replies that wait to be sent
        self.waiting = 0  # their bytes
        self.request_offset = 0
        self.probe = bytearray(1)
        self.cold = 0  # so many more times reads are expected not to be in the cache
        self.head_size = len(self.small_head(0, 0, 0))
        self.buffers: Buffers | None = None
        self.used = 0  # bytes of the buffer that wait to be sent
        self.held, self.held_bad = (0, 0), []  # what of a checked image is in the buffer
        self.told: set[Span] = set()
        self.bytes_sent = 0
        # where small reads may simply be made: not in holes, of which a clone knows nothing
        self.starts: ListLike[int] = (0, 1 << 63)
        self.flags: ListLike[int] = b"\0"
        if self.image.maps is not None:
            data = self.image.data(0, self.image.size)
            self.starts, self.flags = data.starts, data.flags

    # -- sending --------------------------------------------------------------

    def queue(self, *parts: Any) -> None:
        """Send this with what comes next."""
        self.parts += parts
        self.waiting += sum(map(len, parts))
        if self.waiting >= MOST_WAITING or len(self.parts) >= MOST_PIECES:
            self.flush()

    def flush(self, flags: int = 0) -> None:
        self.used = 0
        parts = self.parts
        if not parts:
            return
        try:
            if self.is_tls:
                self.flush_by_tls()
            else:
                sent = self.connection.sendmsg(parts, (), flags)
                if sent < self.waiting:
                    self.connection.sendall(memoryview(b"".join(parts))[sent:], flags)
        except BlockingIOError:
            raise NBDDropped(f"the client has read nothing for {NBD_STALLED} s") from None
        parts.clear()
        self.bytes_sent += self.waiting
        self.waiting = 0

    def flush_by_tls(self) -> None:
        """Small parts joined, large ones by themselves and uncopied."""
        small: list[Any] = []
        for part in self.parts:
            small.append(part)
            if len(part) > SMALL_READ:
                large = small.pop()
                self.connection.sendall(b"".join(small))
                self.connection.sendall(large)
                small.clear()
        self.connection.sendall(b"".join(small))

    def small_head(self, cookie: int, offset: int, length: int) -> bytes:
        """What stands before the bytes of a read that are at hand, and all of it."""
        if not self.structured:
            return nbd_simple_reply.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
        kind, flags = NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_FLAG_DONE
        if self.extended:
            form = nbd_chunk_extended_with_data
            magic = NBD_EXTENDED_REPLY_MAGIC
            return form.pack(magic, flags, kind, cookie, offset, 8 + length, offset)
        magic = NBD_STRUCTURED_REPLY_MAGIC
        return nbd_chunk_with_data.pack(magic, flags, kind, cookie, 8 + length, offset)

    def chunk(self, cookie: int, kind: int, length: int, is_last: bool) -> bytes:
        """The header of a chunk with `length` bytes behind it."""
        flags = NBD_REPLY_FLAG_DONE if is_last else 0
        if self.extended:
            magic, offset = NBD_EXTENDED_REPLY_MAGIC, self.request_offset
            return nbd_chunk_extended.pack(magic, flags, kind, cookie, offset, length)
        return nbd_chunk.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def error_chunk(self, cookie: int, failed: NBDFailed, is_last: bool, offset: int = -1) -> None:
        text = str(failed).encode("utf-8", "replace")[:KiB]
        body = struct.pack(">IH", failed.error, len(text)) + text
        kind = NBD_REPLY_TYPE_ERROR
        if offset >= 0:
            kind, body = NBD_REPLY_TYPE_ERROR_OFFSET, body + struct.pack(">Q", offset)
        self.queue(self.chunk(cookie, kind, len(body), is_last), body)

    def finish(
        self, cookie: int, failed: NBDFailed | None = None, needs_chunk: bool = False
    ) -> None:
        """Say that a request was done, or was not."""
        if self.extended or (self.structured and needs_chunk):
            if failed:
                self.error_chunk(cookie, failed, True)
            else:
                self.queue(self.chunk(cookie, NBD_REPLY_TYPE_NONE, 0, True))
        else:
            error = failed.error if failed else 0
            self.queue(nbd_simple_reply.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie))

    # -- requests -------------------------------------------------------------

    def run(self) -> None:
        """Answer until the client says goodbye or goes.  Raises NBDDropped and OSError."""
        is_last = False
        while not is_last:
            is_last = self.server.is_stopping
            if not self.receive(is_last):
                return
            used = self.answer_all()
            self.flush()
            if used < 0:
                return
            rest = self.filled - used
            if rest:
                self.room[:rest] = self.room[used : self.filled]
            self.filled = rest

    def receive(self, only_at_hand: bool) -> int:
        """Wait for more, or take only what is there already; how many bytes."""
        room, count = self.room[self.filled :], 0
        if not only_at_hand or (self.is_tls and self.connection.pending()):
            count = self.connection.recv_into(room)
        elif not self.is_tls:
            with suppress(BlockingIOError):
                count = self.connection.recv_into(room, 0, MSG_DONTWAIT)
        self.filled += count
        return count

    def answer_all(self) -> int:
        """Answer the requests that are there in whole; how many bytes they had, -1 at a goodbye.

        Small reads of what is data, nearly all that there is to do, are done here; what
        is anything else, or odd, goes on in answer().
        """
        width, expected, parts, head = self.form.size, self.magic, self.parts, self.small_head
        fd, base, size, pread = self.image.fd, self.export.offset, self.export.size, os.pread
        starts, flags_of = self.starts, self.flags
        most = 0 if self.image.damaged or self.image.checked else SMALL_READ
        at, head_size, seen = 0, self.head_size, 0
        while self.filled - at >= width:
            requests = self.room[at : at + (self.filled - at) // width * width]
            if len(requests) > width and at >= seen:
                self.look_ahead(requests)
            seen = at + len(requests)
            for request in self.form.iter_unpack(requests):
                at += width
                magic, flags, kind, cookie, offset, length = request
                if magic != expected:
                    raise NBDDropped("a request without its magic")
                if 0 < length <= most and kind == 0 == flags and offset + length <= size:
                    start = base + offset
                    number = bisect_right(starts, start)
                    if not flags_of[number - 1] and starts[number] >= start + length:
                        try:
                            data = pread(fd, length, start)
                        except OSError:  # answer() meets it again
                            data = b""
                        if len(data) == length:
                            parts.append(head(cookie, offset, length))
                            parts.append(data)
                            self.waiting += length + head_size
                            if self.waiting > MOST_WAITING or len(parts) > MOST_PIECES:
                                self.flush()
                            elif self.cold:
                                seen = self.look_out(seen)
                            continue
                if kind == NBD_CMD_DISC:
                    return -1
                if kind == NBD_CMD_WRITE or (self.extended and flags & NBD_CMD_FLAG_PAYLOAD_LEN):
                    at = self.answer_payload(request, at, self.filled)
                    break
                self.answer(request)
        return at

    def look_ahead(self, requests: memoryview) -> None:
        """Let the disk work on all reads at once, unless what is wanted is in the cache.

        The first read tells; once something was not there, that is believed for a while.
        """
        if not self.cold and not self.is_cold(self.form.unpack_from(requests)[4]):
            return
        self.cold = (self.cold or COLD_BATCHES) - 1
        for _, _, kind, _, offset, length in self.form.iter_unpack(requests):
            if kind != NBD_CMD_READ or offset + length > self.export.size:
                return
            read_ahead(self.image.fd, self.export.offset + offset, min(length, MOST_REQUEST))

    def look_out(self, seen: int) -> int:
        """Send what is ready, and let the disk begin with what is asked for meanwhile.

        Requests in the room before `seen` have begun already; now how far.
        """
        self.flush()
        if self.filled < len(self.room):
            self.receive(True)
        width = self.form.size
        requests = self.room[seen : seen + max(0, self.filled - seen) // width * width]
        if requests:
            self.look_ahead(requests)
        return seen + len(requests)

    def is_cold(self, offset: int) -> bool:
        try:
            os.preadv(self.image.fd, [self.probe], self.export.offset + offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except (OSError, OverflowError):  # no such call on this file system; no such offset
            return False
        return False

    def answer(self, request: tuple[int, int, int, int, int, int]) -> None:
        """Answer anything but a write, whose data follow it."""
        _, flags, kind, cookie, offset, length = request
        self.request_offset = offset
        try:
            self.refuse(flags, kind, offset, length)
            with failing_as_nbd():
                getattr(self, NBD_COMMANDS[kind][0])(flags, cookie, offset, length)
        except NBDFailed as e:
            self.finish(cookie, e, kind in (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS))

    def refuse(self, flags: int, kind: int, offset: int, length: int) -> None:
        """Raise NBDFailed for what cannot be asked."""
        if kind not in NBD_COMMANDS:
            raise NBDFailed(errno.EINVAL, "unknown command")
        name, allowed, changes = NBD_COMMANDS[kind]
        if changes and not self.image.is_writable:
            raise NBDFailed(errno.EPERM, "this export is read-only")
        if flags & ~(allowed | NBD_CMD_FLAG_FUA):
            raise NBDFailed(errno.EINVAL, f"flags {flags:#x} do not go with {name}")
        if flags & NBD_CMD_FLAG_DF and not self.structured:
            raise NBDFailed(errno.EINVAL, "DF goes with structured replies only")
        if kind == NBD_CMD_FLUSH:
            return
        if offset + length > self.export.size:
            full = kind in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
            raise NBDFailed(errno.ENOSPC if full else errno.EINVAL, "behind the end of the export")
        if length > MOST_REQUEST and kind in (NBD_CMD_READ, NBD_CMD_WRITE):
            raise NBDFailed(errno.EINVAL, f"more than {MOST_REQUEST} bytes")

    def flush_export(self, flags: int, cookie: int, *_: int) -> None:
        self.image.flush()
        self.finish(cookie)

    def trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self.image.trim(self.export.offset + offset, length)
        self.conclude(flags, cookie)

    def write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        start = self.export.offset + offset
        as_hole, fast = not flags & NBD_CMD_FLAG_NO_HOLE, bool(flags & NBD_CMD_FLAG_FAST_ZERO)
        if length and not self.image.zero(start, length, as_hole, fast):
            raise NBDFailed(errno.EOPNOTSUPP, "zeros would have to be written one by one")
        self.conclude(flags, cookie)

    def cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        read_ahead(self.image.fd, self.export.offset + offset, length)
        self.finish(cookie)

    def conclude(self, flags: int, cookie: int) -> None:
        """Say that a change was made; with FUA only when it is on the medium."""
        if flags & NBD_CMD_FLAG_FUA:
            self.image.flush()
        self.finish(cookie)

    def answer_payload(
        self, request: tuple[int, int, int, int, int, int], at: int, end: int
    ) -> int:
        """Take the data behind a write as they come; where in the room what follows them begins.

        Also when it fails all of them are taken, so that the next request is found.
        """
        _, flags, kind, cookie, offset, length = request
        self.request_offset = offset
        if length > MOST_PAYLOAD:
            raise NBDDropped(f"a request with {length} bytes behind it")
        failed: NBDFailed | None = None
        try:
            self.refuse(flags, kind, offset, length)
            if kind != NBD_CMD_WRITE or self.extended != bool(flags & NBD_CMD_FLAG_PAYLOAD_LEN):
                raise NBDFailed(
                    errno.EINVAL, "PAYLOAD_LEN goes with writes by extended headers, always"
                )
        except NBDFailed as e:
            failed = e
        start = self.export.offset + offset
        for piece in self.payload(at, end, length):
            try:
                with failing_as_nbd():
                    if not failed:
                        self.image.write(piece, start)
            except NBDFailed as e:
                failed = e
            start += len(piece)
        if not failed:
            try:
                with failing_as_nbd():
                    if flags & NBD_CMD_FLAG_FUA:
                        self.image.flush()
            except NBDFailed as e:
                failed = e
        self.finish(cookie, failed, kind in (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS))
        return min(end, at + length)

    def payload(self, at: int, end: int, length: int) -> Iterator[memoryview]:
        """The data of a write: what is in the room already, then what comes."""
        here = min(length, end - at)
        if here:
            yield self.room[at : at + here]
        if here < length:
            self.flush()
        room = self.buffer().new
        while here < length:
            wanted, got = min(UNIT, length - here), 0
            while got < wanted:
                count = self.connection.recv_into(room[got:wanted])
                if not count:
                    raise NBDDropped("the client has gone in the middle of a write")
                got += count
            yield room[:wanted]
            here += wanted

    def buffer(self) -> Buffers:
        if self.buffers is None:
            self.buffers = Buffers()
        return self.buffers

    # -- reading --------------------------------------------------------------

    def read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        start = self.export.offset + offset
        if not length:
            self.finish(cookie, None, True)
        elif not self.structured:
            self.read_simply(cookie, start, start + length)
        else:
            as_one = bool(flags & NBD_CMD_FLAG_DF)
            if as_one and self.image.checked and length > UNIT - BLOCK:
                raise NBDFailed(errno.EOVERFLOW, "too much to be checked and sent as one")
            for first, last, kind in self.pieces(start, start + length, as_one):
                self.read_piece(cookie, first, last, kind, last == start + length)

    def pieces(self, start: int, end: int, as_one: bool) -> Iterator[tuple[int, int, str]]:
        """(start, end, "data", "hole" or "bad") of a read; with `as_one` just "whole" or "bad"."""
        bad = self.image.bad_spans(start, end) if self.image.damaged else []
        if as_one:
            yield start, end, "bad" if bad else "whole"
            return
        for first, last in [*bad, (end, end)]:
            for run_start, run_end, flags in self.image.data(start, first).between(start, first):
                yield run_start, run_end, "hole" if flags else "data"
            if first < last:
                yield first, last, "bad"
            start = last

    def read_piece(self, cookie: int, start: int, end: int, kind: str, is_last: bool) -> None:
        """The chunks for one piece of a read."""
        offset = start - self.export.offset
        if kind == "hole":
            body = struct.pack(">QI", offset, end - start)
            self.queue(self.chunk(cookie, NBD_REPLY_TYPE_OFFSET_HOLE, 12, is_last), body)
        elif kind == "bad":
            self.read_damage(cookie, start, end, is_last)
        elif end - start > (SMALL_READ if self.by_sendfile else UNIT if kind == "whole" else end):
            self.stream(cookie, start, end, is_last)
        else:
            self.read_by_copy(cookie, start, end, kind, is_last)

    def read_damage(self, cookie: int, start: int, end: int, is_last: bool) -> None:
        self.tell_damage(start, end)
        failed = NBDFailed(errno.EIO, f"damaged: bytes {start} to {end - 1} of the image")
        self.error_chunk(cookie, failed, is_last, start - self.export.offset)

    def tell_damage(self, start: int, end: int) -> None:
        if (start, end) not in self.told and len(self.told) < 1000:
            self.told.add((start, end))
            where = f"bytes {start} to {end - 1}"
            log.error("nbd: %s is damaged: %s were asked for", self.export.found, where)

    def read_by_copy(self, cookie: int, start: int, end: int, kind: str, is_last: bool) -> None:
        """Chunks of what is in memory before the first of them is sent, so they are whole."""
        while start < end:
            stop, view, bad = self.load(start, end)
            if bad and kind == "whole":
                bad = [(start, end)]
            position = start
            for first, last in [*bad, (stop, stop)]:
                if position < first:
                    done = is_last and first == end
                    offset, length = position - self.export.offset, first - position
                    head = self.chunk(cookie, NBD_REPLY_TYPE_OFFSET_DATA, 8 + length, done)
                    data = view[position - start : first - start]
                    self.queue(head + struct.pack(">Q", offset), data)
                if first < last:
                    self.read_damage(cookie, first, last, is_last and last == end)
                position = last
            start = stop

    def load(self, start: int, end: int) -> tuple[int, memoryview, list[Span]]:
        """Read from `start` on as much as there is room for: where it ends, it, and what is bad.

        It stands behind what waits to be sent; if there is no room, that is sent first.
        """
        if self.image.checked:
            return self.load_checked(self.image.checked, start, end)
        stop = min(end, start + UNIT)
        room = -(-(stop - start) // PAGE) * PAGE
        if self.used + room > UNIT:
            self.flush()
        view = self.buffer().new[self.used :]
        self.used += room
        try:
            whole = read_at(self.image.fd, view, start, stop - start) == stop - start
        except OSError as e:
            log.error("nbd: %s: cannot read at %s: %s", self.export.found, start, e.strerror)
            whole = False
        return stop, view, [] if whole else [(start, stop)]

    def load_checked(
        self, checked: CheckedImage, start: int, end: int
    ) -> tuple[int, memoryview, list[Span]]:
        """The same, held against the digests; what was read last is not read again."""
        view = self.buffer().new
        if not self.held[0] <= start < self.held[1]:
            self.flush()
            first = start - start % BLOCK
            last = min(first + UNIT, -(-end // BLOCK) * BLOCK, checked.size)
            checked.read(view, first, last - first)
            found = list(join_ranges(checked.damaged))
            checked.damaged.clear()
            self.held = (first, last)
            self.held_bad = [(at, at + length) for at, length in found]
            if found:
                self.server.exports.note_damage(self.image, found)
        stop = min(end, self.held[1])
        return (
            stop,
            view[start - self.held[0] :],
            list(common_spans([(start, stop)], self.held_bad)),
        )

    def stream(self, cookie: int, start: int, end: int, is_last: bool) -> None:
        """One chunk of what is not in memory; only behind it can be said that it is right."""
        head = self.chunk(cookie, NBD_REPLY_TYPE_OFFSET_DATA, 8 + end - start, False)
        self.queue(head + struct.pack(">Q", start - self.export.offset))
        at = self.send_file(start, end)
        if at < end:
            for first in range(at, end, UNIT):
                self.queue(memoryview(ZEROS)[: min(UNIT, end - first)])
            self.read_damage(cookie, at, end, is_last)
        elif is_last:
            self.finish(cookie, None, True)

    def send_file(self, start: int, end: int) -> int:
        """Send bytes of the image behind what waits; how far it came, if they cannot be read."""
        if not self.by_sendfile:
            while start < end:
                stop, view, bad = self.load(start, end)
                if bad:
                    break
                self.queue(view[: stop - start])
                start = stop
            return start
        self.flush(MSG_MORE)
        while start < end:
            try:
                sent = os.sendfile(self.connection.fileno(), self.image.fd, start, end - start)
            except (ConnectionError, BlockingIOError):
                raise
            except OSError as e:
                log.error("nbd: %s: cannot read at %s: %s", self.export.found, start, e.strerror)
                break
            if not sent:
                break
            start += sent
            self.bytes_sent += sent
        return start

    def read_simply(self, cookie: int, start: int, end: int) -> None:
        """A read without chunks: behind the header an error can only be told by hanging up."""
        bad = self.image.bad_spans(start, end)
        head = nbd_simple_reply.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
        by_sendfile = self.by_sendfile and end - start > SMALL_READ
        if not bad and end - start <= UNIT - BLOCK and not by_sendfile:
            _, view, bad = self.load(start, end)
            if not bad:
                self.queue(head, view[: end - start])
                return
        for one in bad:
            self.tell_damage(*one)
        if bad:
            raise NBDFailed(errno.EIO, "damaged")
        self.queue(head)
        for first, last, kind in self.pieces(start, end, False):
            for at in range(first, last if kind == "hole" else first, UNIT):
                self.queue(memoryview(ZEROS)[: min(UNIT, last - at)])
            if kind == "data" and self.send_file(first, last) < last:
                raise NBDDropped(f"{self.export.found} cannot be read behind {first}")

    # -- what is where --------------------------------------------------------

    def block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not self.export.contexts or not length:
            raise NBDFailed(errno.EINVAL, "no metadata context, or nothing to tell of")
        start, end = self.export.offset + offset, self.export.offset + offset + length
        most = 1 if flags & NBD_CMD_FLAG_REQ_ONE else MOST_DESCRIPTORS
        answers = []
        for number, runs in self.export.contexts:
            found = itertools.islice(runs(start, end).between(start, end), most)
            flat = [value for first, last, state in found for value in (last - first, state)]
            answers.append((number, flat))
        for at, (number, flat) in enumerate(answers, 1):
            if self.extended:
                kind = NBD_REPLY_TYPE_BLOCK_STATUS_EXT
                body = struct.pack(f">II{len(flat)}Q", number, len(flat) // 2, *flat)
            else:
                kind = NBD_REPLY_TYPE_BLOCK_STATUS
                body = struct.pack(f">I{len(flat)}I", number, *flat)
            self.queue(self.chunk(cookie, kind, len(body), at == len(answers)), body)


def describe_listener(listener: Any) -> str:
    """As a client would write it, where that can be."""
    import socket

    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"nbd+unix:///?socket={name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"nbd://{host}:{name[1]}"


def prepare_connection(connection: Any, place: Any) -> tuple[str, int]:
    """Set a new connection up; how to call its other end, and its process if that is known."""
    import socket

    connection.setblocking(True)
    if connection.family == socket.AF_UNIX:
        size = struct.calcsize("3i")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        process, user, _ = struct.unpack("3i", peer)
        return f"process {process} of user {user}", process
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return f"{place[0]}:{place[1]}", 0


class NBDSession:
    """One client, from its connection to its end."""

    def __init__(self, server: NBDServer, connection: Any, peer: str, process: int) -> None:
        """`process` is the client's, if it is on this host and known; else 0."""
        self.server, self.connection, self.peer = server, connection, peer
        self.is_process = process > 0
        self.group: object = process or self
        self.last_heard = time.monotonic()
        self.is_serving = False

    def run(self) -> None:
        """What the thread does; it raises nothing."""
        export: Export | None = None
        handshake = NBDHandshake(self)
        try:
            try:
                export = handshake.run()
            finally:
                export = export or handshake.export
            self.serve(handshake, export)
        except (NBDDropped, OSError) as e:
            why = printable(e)
            (log.info if export else log.debug)("nbd: %s: %s", self.peer, why or "goodbye")
        except MemoryError:
            log.error("nbd: %s: out of memory", self.peer)
        except Exception:  # a defect of ours must cost this connection only
            log.exception("nbd: %s: the session failed", self.peer)
        finally:
            if export:
                self.server.exports.close_export(export)
            self.close()
            self.server.sessions.discard(self)

    def serve(self, handshake: NBDHandshake, export: Export) -> None:
        import socket

        self.connection.settimeout(None)
        timeout = struct.pack("@ll", NBD_STALLED, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        how = "writable" if export.image.is_writable else "read-only"
        log.info("nbd: %s: opened %s, %s", self.peer, export.found, how)
        if export.found.revision.trust is Trust.DISTRUSTED:
            log.warning("nbd: %s is distrusted", export.found)
        if export.image.checked and export.image.checked.unchecked:
            why = export.image.checked.unchecked
            log.warning("nbd: %s cannot be checked: %s", export.found, why)
        transmission = NBDTransmission(self, handshake, export)
        try:
            transmission.run()
        finally:
            sent = format_size(transmission.bytes_sent)
            log.info("nbd: %s: closed %s: %s sent", self.peer, export.found, sent)

    def stop(self) -> None:
        """Let it come to its end: what has arrived is still answered."""
        import socket

        with suppress(OSError):  # of an SSLSocket this would end TLS as well
            socket.socket.shutdown(self.connection, socket.SHUT_RD)

    def drop(self) -> None:
        """End it at once."""
        import socket

        with suppress(OSError):
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, but so that the client gets all that was sent to it."""
        import socket

        with suppress(OSError, ValueError):
            self.connection.settimeout(1)
            if hasattr(self.connection, "unwrap"):
                with suppress(OSError):
                    self.connection = self.connection.unwrap()
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 1
            while self.connection.recv(64 * KiB) and time.monotonic() < end:
                pass
        with suppress(OSError):
            self.connection.close()


class NBDServer:
    """Listens, and starts a thread for each client."""

    def __init__(self, loop: Loop, exports: Exports, tls: Any, most_clients: int) -> None:
        self.loop, self.exports, self.tls, self.most_clients = loop, exports, tls, most_clients
        self.listeners: list[Any] = []
        self.sockets: list[tuple[str, os.stat_result]] = []  # that are ours to remove
        self.sessions: set[NBDSession] = set()
        self.lock = threading.Lock()
        self.is_stopping = False
        self.news: Timer | None = None

    # -- listening ------------------------------------------------------------

    @property
    def hosts(self) -> list[str]:
        """The addresses that are listened on by TCP."""
        names = [listener.getsockname() for listener in self.listeners]
        return [name[0] for name in names if isinstance(name, tuple)]

    def listen(self, listener: Any) -> None:
        listener.setblocking(False)
        self.listeners.append(listener)
        self.watch(listener)
        log.info("nbd: listening on %s", printable(describe_listener(listener)))

    def listen_tcp(self, address: str, port: int) -> int:
        """Listen on all that `address` means; the port that it is.  Raises OSError and the like."""
        for listener in listening_sockets(address, port):
            self.listen(listener)
            port = listener.getsockname()[1]
        return port

    def listen_unix(self, path: str) -> None:
        """Listen on a socket that only its owner may use; one that nobody answers is replaced."""
        import socket

        with explain(f"cannot listen on {printable(path)}"):
            listener = socket.socket(socket.AF_UNIX)
            try:
                if os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
                    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
                        probe.connect(path)
                        raise Busy(f"{printable(path)} is in use by another server")
                    os.unlink(path)
                listener.bind(path)
                os.chmod(path, 0o600)
                listener.listen(128)
                self.sockets.append((path, os.lstat(path)))
            except BaseException:
                listener.close()
                raise
            self.listen(listener)

    def take_over(self, first: int, count: int) -> None:
        """Use the sockets that systemd, or a client that started us, listens on already."""
        import socket

        for fd in range(first, first + count):
            with explain(f"cannot use descriptor {fd} of LISTEN_FDS"):
                os.set_inheritable(fd, False)
                self.listen(socket.socket(fileno=fd))

    def watch(self, listener: Any) -> None:
        if listener in self.listeners:
            self.loop.watch(listener, 1, lambda _: self.accept(listener))

    def accept(self, listener: Any) -> None:
        for _ in range(16):
            try:
                connection, place = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as e:  # no descriptors, no memory: in a moment there may be some
                log.warning("nbd: cannot accept a connection: %s", e.strerror)
                self.loop.forget(listener)
                self.loop.call_in(1.0, lambda: self.watch(listener))
                return
            self.admit(connection, place)

    def admit(self, connection: Any, place: Any) -> None:
        self.make_room()
        try:
            session = NBDSession(self, connection, *prepare_connection(connection, place))
        except OSError:  # it is gone already
            connection.close()
            return
        self.sessions.add(session)
        try:
            threading.Thread(target=session.run, daemon=True).start()
        except RuntimeError as e:  # no more threads
            log.warning("nbd: %s: cannot be served: %s", session.peer, e)
            self.sessions.discard(session)
            connection.close()
            return
        if self.news is None:
            self.news = self.loop.call_in(NBD_NEWS, self.learn)

    def make_room(self) -> None:
        """Drop the handshake in which nothing has been said for the longest time, if need be."""
        waiting = [one for one in list(self.sessions) if not one.is_serving]
        if len(waiting) >= NBD_HALF_OPEN:
            silent = min(waiting, key=lambda one: one.last_heard)
            self.sessions.discard(silent)
            silent.drop()

    def claim(self, session: NBDSession) -> bool:
        """Count a client that has decided for an export, if there is room for it."""
        with self.lock:
            serving = sum(one.is_serving for one in list(self.sessions) if one is not session)
            session.is_serving = serving < self.most_clients
            return session.is_serving

    def learn(self) -> None:
        self.exports.refresh()
        self.news = self.loop.call_in(NBD_NEWS, self.learn) if self.sessions else None

    # -- the end --------------------------------------------------------------

    def run(self) -> None:
        """Serve until a signal ends it."""
        give_memory_back()
        try:
            while True:
                self.loop.turn()
        except KeyboardInterrupt:
            pass
        except Stopped as e:
            if e.status != 128 + signal.SIGTERM:
                raise
        finally:
            self.close()

    def close(self) -> None:
        """Take no more clients, and let those that are here have what they asked for."""
        self.is_stopping = True
        for listener in self.listeners:
            self.loop.forget(listener)
            listener.close()
        self.listeners.clear()
        for path, status in self.sockets:
            with suppress(OSError):
                if os.path.samestat(os.lstat(path), status):
                    os.unlink(path)
        for session in list(self.sessions):
            session.stop()
        end = time.monotonic() + NBD_GRACE
        while self.sessions and time.monotonic() < end:
            time.sleep(0.01)
        for session in list(self.sessions):
            session.drop()
        end = time.monotonic() + 2
        while self.sessions and time.monotonic() < end:
            time.sleep(0.01)
        self.exports.close()


def make_tls(certificate: str, key: str | None, authority: str | None) -> Any:
    """What TLS needs to know; with an `authority`, clients must show a certificate of it."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0
    for path in filter(None, (certificate, key, authority)):
        with explain(f"cannot read {printable(path)}"):
            open(path, "rb").close()
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
        if authority:
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, ValueError) as e:
        paths = ", ".join(printable(one) for one in (certificate, key, authority) if one)
        raise BackyError(f"no TLS with {paths}: {e}") from e
    return context


def listen_fds() -> int:
    """How many sockets we were started with, by LISTEN_FDS; children shall not think so too."""
    count, owner = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    if owner != str(os.getpid()):
        return 0
    if not re.fullmatch("[0-9]{1,4}", count, re.ASCII):
        raise BackyError(f"LISTEN_FDS is {printable(count)!r} and no number")
    return int(count)


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
        COMMANDS[run.__name__.replace("_", "-")] = Command(run, arguments, examples)
        return run

    return register


SPEC_WORDS = "number (0 is the newest), last, id or its beginning, tag, or ISO date or time"
SPEC_HELP = f"{SPEC_WORDS} (default: last)"
REVISION = argument("-r", "--revision", metavar="SPEC", default=argparse.SUPPRESS, help=SPEC_HELP)
THE_REVISION = argument(
    "-r", "--revision", metavar="SPEC", default=argparse.SUPPRESS, help=SPEC_WORDS
)
CONFIG = argument(
    *("-c", "--config"),
    metavar="FILE",
    default=argparse.SUPPRESS,
    help=f"the configuration (default: {DEFAULT_CONFIG})",
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
        "verification": revision.stat("verification"),
        "bytes_verified": revision.stat("bytes_verified"),
        "protected": revision.protected,
        "damaged": ranges_json(revision.damaged),
        "sums_damaged": revision.sums_damaged,
        "problem": revision.problem or None,
    }


@command(
    argument("type", metavar="TYPE", help="kind of source: file, ceph-rbd, flyingcircus or exec"),
    argument("source", metavar="SOURCE", help="the image: a path, or POOL/IMAGE; see backy(1)"),
    examples="backy -b /srv/backy/vm1 init file /var/lib/libvirt/images/vm1.img",
)
def init(args: argparse.Namespace) -> None:
    """Make a job directory for an image."""
    initialise(args.directory, args.type, args.source)


def refuse_unknown_tags(name: str, tags: tuple[str, ...], schedule: Schedule) -> None:
    """Raise BackyError for a tag that would go with the next expiry."""
    for tag in tags:
        if tag not in schedule.tags and not tag.startswith("manual:"):
            alike = suggestion(tag, schedule.tags)
            if not alike and tag.startswith("manual"):
                alike = " (manual:NAME?)"
            raise BackyError(
                f"{name}: no tag {tag!r} in its schedule{alike}",
                f"its tags are {', '.join(schedule.tags)} and manual: with anything behind it; "
                "--force takes any, but such a tag goes when revisions expire",
            )


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
    argument(*("-f", "--force"), action="store_true", help="take tags that are in no schedule"),
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
        if job.schedule and not args.force:
            refuse_unknown_tags(repository.name, tags, job.schedule)
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
    elif revision.stat("verification") == "partial" and revision.trust is Trust.TRUSTED:
        tags = f"{tags} (partly verified)".strip()
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
        columns += ["Trust", "Verified (UTC)", "Protected", "Extents", "Seen"]
        for row, revision, count in zip(rows, revisions, extents):
            verified = format_time(revision.verified) if revision.verified else "-"
            seen = "-" if revision.share_seen is None else f"{100 * revision.share_seen:.3g} %"
            row += [revision.trust.value, verified, "yes" if revision.protected else "-"]
            row += ["-" if count is None else str(count), seen]
    output(format_table(columns, rows, right=("Size", "Durat", "Extents", "Seen")))
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
        left = [
            one
            for one in (result.revision for result in verifier.results)
            if one.damaged or one.problem or one.sums_damaged
        ]
        hint = "restore still works, and lists what is lost; the next backup may heal more"
        raise Distrusted(
            f"{repository.name}: damage was found{'' if left else ', and all of it is healed'}",
            hint if left else "look at the disk: dmesg, smartctl",
        )
    unknown = [result for result in verifier.results if result.is_unknown]
    if unknown and len(unknown) == len(verifier.results):
        what = f"{unknown[0].revision.id} {unknown[0].text}"
        if len(unknown) > 1:
            what = f"none of {len(unknown)} revisions can be verified: they have no digests"
        raise Distrusted(f"{repository.name}: {what}")


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
    if run.damaged:
        hint = "backy verify finds all of it, and heals what it can"
        raise Distrusted(f"damage was found in {run.damaged} places", hint)


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


JOB = argument("job", metavar="JOB", nargs="?", help="one job of the configuration (default: all)")
# by whether it is only a trial, then by what is kept
EXPIRY_WORDS = {True: ("drop", "keep"), False: ("removed", "kept")}


@contextmanager
def one_of_many(name: str, failures: list[dict[str, str]]) -> Iterator[None]:
    """Log an error of one job and note it, so that the others are not held up."""
    try:
        yield
    except BackyError as e:
        log.error("%s", e)
        if e.hint:
            log.error("hint: %s", e.hint)
        failures.append({"job": name, "error": str(e)})


def choose_jobs(settings: Settings, name: str | None) -> list[JobSettings]:
    """The job of that name, or all.  Raises NotFound."""
    if name is None:
        return list(settings.jobs.values())
    if name not in settings.jobs:
        alike = suggestion(name, settings.jobs)
        raise NotFound(f"no job {printable(name)!r}{alike} in {printable(settings.path)}")
    return [settings.jobs[name]]


def verdict_json(verdict: Verdict, is_trial: bool) -> dict[str, Any]:
    return {
        **revision_json(verdict.revision),
        "keep": verdict.keep,
        "reason": verdict.reason,
        "tags_left": list(verdict.tags),
        "done": verdict.changes and not is_trial and not verdict.failure,
        "failure": verdict.failure or None,
    }


def print_expiry(name: str, verdicts: list[Verdict], is_trial: bool) -> None:
    words, rows = EXPIRY_WORDS[is_trial], []
    for one in verdicts:
        tags = printable(",".join(one.revision.tags))
        word = "failed" if one.failure else words[one.keep]
        rows.append([format_time(one.revision.timestamp), one.revision.id, tags, word, one.reason])
    output(format_table(["Date (UTC)", "ID", "Tags", "Verdict", "Reason"], rows))
    to = "to " if is_trial else ""
    counts = [f"{sum(row[3] == word for row in rows)} {to}{word}" for word in reversed(words)]
    failed = sum(bool(one.failure) for one in verdicts)
    counts += [f"{failed} failed"] if failed else []
    output(f"{name}: {count_of(len(rows), 'revision')}: {', '.join(counts)}\n")


class Expiry:
    """One run of `expire`: over one directory or many, and what came of it."""

    def __init__(self, is_trial: bool, is_json: bool) -> None:
        self.is_trial, self.is_json = is_trial, is_json
        self.jobs: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []

    def run(self, repository: Repository, schedule: Schedule) -> None:
        """Judge, do it, and show it.  Raises BackyError if not all could be done."""
        now = datetime.now(UTC)
        trial = self.is_trial or bool(repository.problems)
        verdicts = (judge if trial else expire_revisions)(repository, schedule, now)
        if self.is_json:
            listing = [verdict_json(one, trial) for one in verdicts]
            self.jobs.append({"job": repository.name, "revisions": listing})
        else:
            print_expiry(repository.name, verdicts, trial)
        refuse_unreadable(repository)
        failed = [one for one in verdicts if one.failure]
        if failed:
            count = count_of(len(failed), "revision")
            raise BackyError(f"{repository.name}: {count} did not expire: {failed[0].failure}")

    def run_job(self, job: JobSettings, base_dir: str) -> None:
        with one_of_many(job.name, self.failures):
            try:
                repository = Repository.open(os.path.join(base_dir, job.name))
            except NotFound as e:
                log.info("%s: nothing to expire: %s", job.name, e)
                return
            with repository:
                self.run(repository, job.schedule)


@command(
    JOB,
    CONFIG,
    JSON,
    argument("-n", "--dry-run", action="store_true", help="only show what would be done"),
    examples="backy -b /srv/backy/vm1 expire -n\nbacky expire -c /etc/backy.conf vm1",
)
def expire(args: argparse.Namespace) -> int:
    """Remove the revisions that nothing keeps any more, and say why."""
    expiry = Expiry(args.dry_run, args.json)
    if args.config_given or args.job is not None:
        if args.directory != ".":
            raise BackyError("-b names one directory, -c and JOB those of a configuration")
        settings = load_settings(args.config)
        for job in choose_jobs(settings, args.job):
            expiry.run_job(job, settings.base_dir)
    else:
        with Repository.open(args.directory) as repository:
            with one_of_many(repository.name, expiry.failures):
                expiry.run(repository, load_schedule(repository))
    if args.json:
        output_json(dry_run=args.dry_run, jobs=expiry.jobs, failed=expiry.failures)
    return 1 if expiry.failures else 0


def parse_days(text: str) -> timedelta:
    if not re.fullmatch("[0-9]{1,4}", text, re.ASCII) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days from 1 to 9999")
    return timedelta(days=int(text))


def parse_simulated(text: str) -> timedelta:
    try:
        return parse_time_span(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def load_revisions(
    job: JobSettings, base_dir: str, failures: list[dict[str, str]]
) -> list[Revision] | None:
    """The revisions of a job, none if it has no directory yet; a failure is noted and is None."""
    with one_of_many(job.name, failures):
        try:
            with Repository.open(os.path.join(base_dir, job.name)) as repository:
                return repository.revisions
        except NotFound:
            return []
    return None


def plan_runs(settings: Settings, args: argparse.Namespace) -> int:
    """Show the coming runs, as far as there is room."""
    failures: list[dict[str, str]] = []
    jobs = choose_jobs(settings, args.job)
    known = {job.name: job.schedule for job in jobs}
    loaded = [(job, load_revisions(job, settings.base_dir, failures)) for job in jobs]
    past = [(job, past_of(found)) for job, found in loaded if found is not None]
    now = datetime.now(UTC)
    remembered = load_remembered(settings.base_dir)
    runs = coming_runs_of_all(past, remembered, now, now + args.days)
    shown = list(itertools.islice(runs, LISTED_RUNS if args.json else SHOWN_RUNS))
    more = sum(1 for _ in itertools.islice(runs, COUNTED_RUNS + 1))
    words = [explain_run(run, known[run.job]) for run in shown]
    if args.json:
        listing = [
            {"time": format_time_json(run.moment), "job": run.job, "tags": run.tags, "reason": why}
            for run, why in zip(shown, words)
        ]
        output_json(runs=listing, more=more, failed=failures)
        return 1 if failures else 0
    rows = [
        [format_time(run.moment), run.job, ",".join(run.tags), why]
        for run, why in zip(shown, words)
    ]
    output(format_table(["Time (UTC)", "Job", "Tags", "Reason"], rows))
    count = f"more than {COUNTED_RUNS}" if more > COUNTED_RUNS else str(more)
    rest = f", and {count} more up to {format_time(now + args.days)}" if more else ""
    output(f"{count_of(len(shown), 'run')}{rest}\n")
    return 1 if failures else 0


def print_simulation(simulation: Simulation, verdicts: list[Verdict], span: timedelta) -> None:
    rows = []
    for one in verdicts:
        tags = printable(",".join(one.tags))
        rows.append([format_time(one.revision.timestamp), one.revision.id or "-", tags, one.reason])
    output(format_table(["Date (UTC)", "ID", "Tags", "Reason"], rows))
    output(
        f"{simulation.job}: {count_of(len(rows), 'revision')} after {format_span(span)} "
        f"with {count_of(simulation.runs, 'run')}\n"
    )


def plan_simulated(settings: Settings, args: argparse.Namespace) -> int:
    """Show what would be there after a time."""
    failures: list[dict[str, str]] = []
    jobs, listing = choose_jobs(settings, args.job), []
    runs = sum(count_runs(job.schedule, args.simulate) for job in jobs)
    if runs > SIMULATED_RUNS:
        raise BackyError(
            f"these are {runs} runs, and {SIMULATED_RUNS} can be simulated",
            "name one JOB, or take a shorter time",
        )
    now = datetime.now(UTC)
    for job in jobs:
        revisions = load_revisions(job, settings.base_dir, failures)
        simulation = Simulation(job.name, job.schedule, revisions or [])
        verdicts = simulation.run(now, now + args.simulate)
        if args.json:
            found = [verdict_json(one, True) for one in verdicts]
            listing.append({"job": job.name, "runs": simulation.runs, "revisions": found})
        else:
            print_simulation(simulation, verdicts, args.simulate)
    if args.json:
        output_json(jobs=listing, failed=failures)
    return 1 if failures else 0


@command(
    JOB,
    CONFIG,
    JSON,
    argument("--days", metavar="N", type=parse_days, default=timedelta(days=7), help="default: 7"),
    argument(
        "--simulate",
        metavar="TIME",
        type=parse_simulated,
        help="show which revisions there would be after that time: 400d",
    ),
    examples="backy plan -c /etc/backy.conf --days 1\nbacky plan vm1 --simulate 400d",
)
def plan(args: argparse.Namespace) -> int:
    """Show the coming backups, and why they are due then."""
    settings = load_settings(args.config)
    return plan_simulated(settings, args) if args.simulate else plan_runs(settings, args)


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


def examine_config(args: argparse.Namespace) -> int:
    """Print all mistakes and warnings; 1 if there is a mistake."""
    configuration = Configuration(args.config)
    with suppress(ConfigErrors):
        Examination(configuration, configuration.load()).run()
    examine_files(configuration)
    try:
        configuration.check()
    except ConfigErrors as e:
        sys.stderr.write(f"{e}\n")
        return 1
    for remark in configuration.remarks:
        sys.stderr.write(f"{remark}\n")
    jobs, schedules = (len(configuration.entries[kind]) for kind in ("job", "schedule"))
    counts = f"{count_of(jobs, 'job')}, {count_of(schedules, 'schedule')}"
    remarks = count_remarks(configuration.remarks)
    output(f"{printable(configuration.path)}: {counts}, {remarks}\n")
    return 0


@command(CONFIG, examples="backy scheduler -c /etc/backy.conf -l /var/log/backy.log")
def scheduler(args: argparse.Namespace) -> None:
    """Make backups when they are due, until a signal ends it."""
    with signals_held():
        daemon = Scheduler(load_settings(args.config))
    daemon.run_until_stopped()


@command(CONFIG, examples="backy check-config -c /etc/backy.conf")
def check_config(args: argparse.Namespace) -> int:
    """Look for mistakes in the configuration."""
    return examine_config(args)


@command(
    argument("action", metavar="ACTION", choices=("check", "show"), help="check or show"),
    CONFIG,
    JSON,
    examples="backy config show\nbacky config check -c /etc/backy.conf",
)
def config(args: argparse.Namespace) -> int:
    """Show all settings and where each is from, or look for mistakes."""
    if args.action == "check":
        if args.json:
            raise BackyError("--json goes with config show")
        return examine_config(args)
    configuration = Configuration(args.config)
    settings = configuration.load()
    overview = Overview(configuration)
    if args.json:
        files = [document.path for document in configuration.documents.values()]
        output_json(path=printable(settings.path), files=files, **overview.json())
    else:
        output(overview.text())
    return 0


def parse_threshold(text: str) -> Space:
    try:
        return parse_space(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def unable(level: Level, text: str) -> tuple[int, dict[str, Any], str]:
    """An answer that is nothing but a sentence."""
    text = printable(text).replace("|", "/")[:1000]
    return level.value, {"state": level.name, "status": level.value, "summary": text}, f"{text}\n"


def check_answer(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Status, JSON and text of what check has to say, whatever happens."""
    try:
        now = datetime.now(UTC)
        result = load_check(args.config, args.warning, args.critical, now)
        if isinstance(result, str):
            return unable(Level.CRITICAL, result)
        result.choose(args.jobs, args.match)
        result.judge(space_given=args.warning is not None or args.critical is not None)
        return result.level.value, result.json(), result.text(args.verbose)
    except BackyError as e:
        return unable(Level.UNKNOWN, f"UNKNOWN: {e}")
    except Exception as e:  # whatever it is, monitoring must not take it for a known state
        return unable(Level.UNKNOWN, f"UNKNOWN: check failed: {type(e).__name__}: {e}")


@command(
    argument("jobs", metavar="JOB", nargs="*", help="look at these jobs only"),
    argument("--match", metavar="REGEX", help="look at the jobs in whose name REGEX is found"),
    argument(
        *("-w", "--warning"),
        metavar="SPACE",
        type=parse_threshold,
        help="warn with less free space: 10%%, 200G (default: space-warning)",
    ),
    argument(
        *("-C", "--critical"),
        metavar="SPACE",
        type=parse_threshold,
        help="critical with less free space (default: space-critical)",
    ),
    argument(
        *("-t", "--timeout"),
        metavar="TIME",
        type=parse_limit,
        default=CHECK_TIMEOUT,
        help="UNKNOWN if it takes longer (default: 10 seconds)",
    ),
    JSON,
    CONFIG,
    examples="backy check -c /etc/backy.conf\nbacky check -w 200G -C 50G\nbacky check vm1",
)
def check(args: argparse.Namespace) -> int:
    """Tell monitoring whether all jobs have recent backups."""
    import json

    def work() -> bytes:
        return json.dumps(check_answer(args)).encode()

    try:
        answer = answer_of_child(work, args.timeout)
        status, values, text = (
            json.loads(answer)
            if answer
            else unable(Level.UNKNOWN, "UNKNOWN: check ended without an answer")
        )
    except TimeUp:
        status, values, text = unable(
            Level.UNKNOWN, f"UNKNOWN: no answer within {args.timeout:g} seconds"
        )
    except (Stopped, OSError, ValueError) as e:
        status, values, text = unable(Level.UNKNOWN, f"UNKNOWN: check failed: {e}")
    try:
        if args.json:
            output_json(**values)
        else:
            output(text)
    except (OSError, BackyError):
        return Level.UNKNOWN.value
    return status


def ask_each(client: ShellClient, lines: Iterable[str]) -> int:
    """Print the replies; 1 if there was one that says that nothing was done."""
    status = 0
    for line in lines:
        reply = client.ask(line.strip())
        output(f"{reply}\n" if reply else "")
        if any(map(SHELL_FAILURE.match, reply.splitlines())):
            status = 1
        if client.prompt:
            continue
        if line.strip() not in SHELL_QUITS:
            raise BackyError("the scheduler has ended the session")
        break
    return status


def typed_lines(client: ShellClient) -> Iterator[str]:
    """What is typed behind the prompt, with what readline offers."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() uses it
    while True:
        try:
            yield input(client.prompt)
        except EOFError:
            output("\n")
            return
        except KeyboardInterrupt:
            output("\n")


@command(
    argument("words", metavar="COMMAND", nargs="*", help="what to ask (default: what is typed)"),
    CONFIG,
    examples="backy shell\nbacky shell jobs 'web.*'\nbacky shell run vm1",
)
def shell(args: argparse.Namespace) -> int:
    """Talk to the running scheduler: help lists what it understands."""
    settings = load_settings(args.config)
    if not settings.telnet_port:
        raise BackyError("telnet-port is 0: only the log of the scheduler tells which one it took")
    client = ShellClient(settings.telnet_addrs, settings.telnet_port)
    try:
        if args.words:
            return ask_each(client, [" ".join(map(quote_word, args.words))])
        if sys.stdin and sys.stdin.isatty() and os.isatty(1):
            ask_each(client, typed_lines(client))
            return 0
        return ask_each(client, sys.stdin or ())
    finally:
        client.close()


def parse_port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text, re.ASCII) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no port: 0 to 65535")
    return int(text)


def parse_count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no number from 1 to 9999")
    return int(text)


def export_mode(args: argparse.Namespace) -> ExportMode:
    """How exports are opened.  Raises BackyError for options that do not go together."""
    for name in ("shared", "keep"):
        if getattr(args, name) and not args.writable:
            raise BackyError(f"--{name} goes with --writable")
    if args.verify and args.writable:
        raise BackyError("--verify is for what is only read, --writable for what changes")
    if args.keep and (not KEPT_NAME.fullmatch(args.keep) or OUR_NAMES.fullmatch(args.keep)):
        raise BackyError(
            f"{printable(args.keep)!r} cannot be the name of a clone that is kept",
            "letters, digits and . _ + -, at most 64, and not like a file of the repository",
        )
    return ExportMode(args.writable, args.shared, args.keep, args.verify)


def nbd_tls(args: argparse.Namespace) -> Any:
    if args.tls_cert:
        return make_tls(args.tls_cert, args.tls_key, args.tls_ca)
    if args.tls_key or args.tls_ca:
        raise BackyError("--tls-key and --tls-ca go with --tls-cert")
    return None


def refuse_openness(server: NBDServer, host: str, insecure: bool) -> None:
    """Raise BackyError for an address from which others could read all, unless that is wanted."""
    import socket

    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if all(is_loopback(place[0]) for *_, place in found):
        return
    if server.tls is None and not insecure:
        raise BackyError(
            f"{printable(host)} is more than this host: whoever reaches it could read everything",
            "use --tls-cert and --tls-ca, or --insecure",
        )
    if server.tls is None or not server.tls.verify_mode:
        log.warning("nbd: whoever reaches %s can read everything", printable(host))


def open_listeners(server: NBDServer, args: argparse.Namespace) -> None:
    """Listen where it was asked for.  Raises BackyError."""
    given = listen_fds()
    if given:
        server.take_over(SD_LISTEN_FDS_START, given)
        for host in server.hosts:
            refuse_openness(server, host, args.insecure)
        return
    if args.socket:
        server.listen_unix(args.socket)
    hosts = args.host or []
    if not hosts and not (args.socket and args.port is None):
        hosts = ["127.0.0.1", "::1"]
    port, failures = NBD_PORT if args.port is None else args.port, []
    for host in hosts:
        try:
            refuse_openness(server, host, args.insecure)
            port = server.listen_tcp(host, port)
        except (OSError, OverflowError, UnicodeError) as e:
            reason = getattr(e, "strerror", None) or e
            failures.append(f"cannot listen on {printable(host)} port {port}: {reason}")
    if failures and (args.host or len(failures) == len(hosts)):
        raise BackyError("; ".join(failures))
    for failure in failures:
        log.warning("nbd: %s", failure)


@command(
    argument(
        *("-c", "--config"),
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="serve all jobs of this configuration instead of the one of -b",
    ),
    argument(
        *("-H", "--host"),
        action="append",
        metavar="HOST",
        help="the address to listen on (default: 127.0.0.1 and ::1, or none with -U)",
    ),
    argument(
        *("-p", "--port"),
        type=parse_port,
        metavar="PORT",
        help=f"the port to listen on; 0 is any free one (default: {NBD_PORT})",
    ),
    argument(*("-U", "--socket"), metavar="SOCKET", help="listen on this Unix socket"),
    argument(
        "--max-clients",
        type=parse_count,
        default=NBD_CLIENTS,
        metavar="N",
        help=f"serve so many connections at a time (default: {NBD_CLIENTS})",
    ),
    argument("--verify", action="store_true", help="check all that is read against its digests"),
    argument(
        "--writable", action="store_true", help="give each client a clone that it may write to"
    ),
    argument(
        "--shared", action="store_true", help="with --writable: one clone for all, until the end"
    ),
    argument(
        "--keep",
        metavar="NAME",
        default="",
        help="with --writable: keep the clone as NAME in the job's directory",
    ),
    argument("--tls-cert", metavar="FILE", help="talk by TLS only, with this certificate"),
    argument("--tls-key", metavar="FILE", help="its key, if that is in a file of its own"),
    argument(
        "--tls-ca", metavar="FILE", help="want certificates of clients, made by this authority"
    ),
    argument(
        "--insecure",
        action="store_true",
        help="listen without TLS on an address that is not this host's own",
    ),
    examples=(
        "backy -b /srv/backy/vm1 nbd-server\n"
        "backy nbd-server -c /etc/backy.conf -U /run/backy.nbd --verify\n"
        "backy -b /srv/backy/vm1 nbd-server -U /run/vm1.nbd --writable --keep rescue.img"
    ),
)
def nbd_server(args: argparse.Namespace) -> None:
    """Serve revisions as network block devices, until a signal ends it."""
    mode = export_mode(args)
    tls = nbd_tls(args)
    if args.config_given:
        exports = Exports(load_settings(args.config).base_dir, True, mode)
        exports.jobs()  # if that fails, then before anybody connects
    else:
        exports = Exports(args.directory, False, mode)
        exports.load("")
    server = NBDServer(Loop(), exports, tls, args.max_clients)
    try:
        open_listeners(server, args)
    except BaseException:
        server.close()
        raise
    server.run()


class CommandParser(argparse.ArgumentParser):
    """Usage errors have status 1, and say what was meant."""

    def error(self, message: str) -> Any:
        match = re.search(r"invalid choice: '([^']*)' \(choose from", message)
        if match:
            alike = suggestion(match[1], COMMANDS) if "COMMAND" in message else ""
            message = f"{message.partition(':')[0]}: no {match[1]!r}{alike}"
        if self.prog == "backy check":  # monitoring reads standard output
            output(f"UNKNOWN: {printable(message).replace('|', '/')}\n{self.format_usage()}")
            raise SystemExit(Level.UNKNOWN.value)
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


def make_parser(
    words: ListLike[str] | None = None,
) -> tuple[CommandParser, dict[str, argparse.ArgumentParser]]:
    """The parser; of commands that are not among `words` only the names, which is faster."""
    parser = CommandParser(
        prog="backy",
        allow_abbrev=False,
        description="Keep versions of virtual machine images on a copy-on-write file system.",
        epilog="backy help COMMAND explains a command.",
    )
    add_common_options(parser, None)
    parser.add_argument("-r", "--revision", metavar="SPEC", help=argparse.SUPPRESS)
    parser.add_argument(
        *("-c", "--config"),
        metavar="FILE",
        help=f"the configuration, for commands that read it (default: {DEFAULT_CONFIG})",
    )
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
        if words is not None and name not in words:
            continue
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


def drop_unsaid() -> None:
    """Let what standard error does not take not become the exit status 120 of Python."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open("/dev/null", os.O_WRONLY), 2)


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
    atexit.register(drop_unsaid)


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
    elif path and same_file(path, 2):
        quiet = True  # every error would be there twice
    if args.command == "check":  # it writes nothing
        path, quiet = None, True
    return start_log(path, args.verbose, quiet)


def raise_stopped(number: int, _: object) -> None:
    raise Stopped(number)


def catch_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, raise_stopped)
    signal.signal(signal.SIGUSR1, report_progress)


def run_undisturbed(args: argparse.Namespace) -> int:
    """Run the command; a lock of Python's own that a signal has torn open is not the reason."""
    try:
        return COMMANDS[args.command].run(args) or 0
    except RuntimeError as e:
        if isinstance(e.__context__, (Stopped, KeyboardInterrupt)):
            raise e.__context__ from None
        raise


def run_command(args: argparse.Namespace) -> int:
    """Run what was asked for; all that can go wrong becomes a line and a status."""
    try:
        return run_undisturbed(args)
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


def choose_files(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """-r and -c may stand before the command too, if it takes them.

    Without -r the last revision is meant, but not to delete.  `given` and
    `config_given` tell whether they were there.
    """
    values = (args.directory, args.logfile, args.revision, args.config)
    if any(isinstance(one, list) for one in values):
        parser.error("an option is given without its value")  # `-r--`, which argparse lets pass
    if args.revision is not None and "-r SPEC" not in parser.format_usage():
        parser.error(f"{args.command} takes no -r")
    if args.revision is None and args.command == "forget":
        parser.error("forget needs -r SPEC")
    if args.config is not None and "-c FILE" not in parser.format_usage():
        parser.error(f"{args.command} takes no -c")
    args.config_given = args.config is not None
    args.config = DEFAULT_CONFIG if args.config is None else args.config
    args.given = args.revision is not None
    if not args.given:
        args.revision = "last"


def main(argv: ListLike[str] | None = None) -> int:
    """Run backy with `argv`; the exit status."""
    repair_descriptors()
    os.umask(0o077)
    words = list(sys.argv[1:] if argv is None else argv)
    for at, word in enumerate(words):
        if word == "--wait" and words[at - 1 : at] not in (["-b"], ["-l"], ["-r"], ["-c"]):
            words[at] = "--wait=forever"  # argparse would take the next word for the time
    parser, parsers = make_parser(words)
    try:
        args, strange = parser.parse_known_args(words)
        if strange:
            about = parsers.get(args.command, parser)
            about.error(f"unrecognized arguments: {' '.join(strange)}")
        if not args.command:
            output(parser.format_help())
            return 0
        choose_files(args, parsers[args.command])
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
