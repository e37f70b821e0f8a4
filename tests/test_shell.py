# SPDX-License-Identifier: GPL-3.0-or-later
"""Chapter Shell: what telnet clients see, and what they cannot do to the loop."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMPILED, need, need_tool

import backy

PROMPT = f"\r\nbacky-{backy.__version__} % "
IAC = 255

ROWS = [
    {
        "job": "quick",
        "sla": "OK",
        "status": "waiting for deadline",
        "last_time": "2026-11-22 04:37:04 UTC",
        "last_tags": "tick",
        "last_duration": "0.1 s",
        "next_time": "2026-11-22 04:37:11 UTC",
        "next_tags": "tick",
    },
    {
        "job": "new",
        "sla": "OK",
        "status": "waiting for deadline",
        "last_time": "-",
        "last_tags": "-",
        "last_duration": "-",
        "next_time": "2026-11-22 20:22:53 UTC",
        "next_tags": "daily",
    },
]

# The table of 2.x, byte by byte.
JOBS = """\
+-------+-----+----------------------+---------------------+-----------+----------+---------------------+-----------+
| Job   | SLA | Status               | Last Backup (UTC)   | Last Tags | Last Dur | Next Backup (UTC)   | Next Tags |
+-------+-----+----------------------+---------------------+-----------+----------+---------------------+-----------+
| new   | OK  | waiting for deadline | -                   | -         |        - | 2026-11-22 20:22:53 | daily     |
| quick | OK  | waiting for deadline | 2026-11-22 04:37:04 | tick      |    0.1 s | 2026-11-22 04:37:11 | tick      |
+-------+-----+----------------------+---------------------+-----------+----------+---------------------+-----------+
2 jobs shown"""  # noqa: E501

STATES = """\
+----------------------+---+
|        Status        | # |
+----------------------+---+
| waiting for deadline | 2 |
+----------------------+---+"""


class Host(backy.ShellHost):
    """A daemon of which the shell sees as much as it ever does."""

    def __init__(self, rows=ROWS) -> None:
        self.entries = [dict(row) for row in rows]
        self.asked: list[str] = []
        self.reload_error = ""

    def rows(self):
        return self.entries

    def run(self, job):
        self.asked.append(job)
        return any(row["job"] == job for row in self.entries)

    def run_all(self):
        self.asked.append("*")
        return [row["job"] for row in self.entries]

    def reload(self, told):
        self.asked.append("reload")
        self.told = told
        if self.reload_error is not None:
            told(self.reload_error)


def many_rows(count: int) -> list[dict]:
    return [{**ROWS[0], "job": f"a{'a' * 25}{number:05}!"} for number in range(count)]


class Stage:
    """A loop with a shell in it, and clients that are served while they wait."""

    def __init__(self) -> None:
        self.loop = backy.Loop()
        self.servers: list[backy.ShellServer] = []
        self.clients: list[socket.socket] = []

    def open(self, host=None, control=False, addresses=("127.0.0.1",), port=0):
        self.servers.append(backy.open_shell(self.loop, addresses, port, host or Host(), control))
        return self.servers[-1]

    @property
    def sessions(self):
        return self.servers[-1].sessions

    def client(self, sent: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.servers[-1].ports[0]))
        client.setblocking(False)
        self.clients.append(client)
        if sent:
            client.sendall(sent)
        return client

    def until(self, condition, seconds: float = 60.0) -> None:
        """Turn the loop until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "nothing happens"
            self.loop.turn(0.001)

    def receive(self, client, until: object = PROMPT, count: int = 1, seconds=60.0) -> str:
        """What the client gets until it has `until` that many times, or None: until the end."""
        seen = bytearray()
        ended = False

        def enough() -> bool:
            nonlocal ended
            try:
                received = client.recv(65536)
                ended = not received
                seen.extend(received)
            except BlockingIOError:
                pass
            except ConnectionError:
                ended = True
            return ended or (until is not None and seen.count(until.encode()) >= count)

        self.until(enough, seconds)
        return seen.decode("utf-8", "surrogateescape")

    def ask(self, client, *lines: str) -> str:
        """The reply to the last line, without prompt."""
        reply = ""
        for line in lines:
            client.sendall(line.encode() + b"\r\n")
            reply = self.receive(client)
        assert reply.endswith(PROMPT)
        return reply[: -len(PROMPT)].replace("\r\n", "\n")

    def greeted(self):
        """A client that has its first prompt."""
        client = self.client()
        assert self.receive(client) == PROMPT
        return client

    def connected(self, **options):
        self.open(**options)
        return self.greeted()

    def close(self) -> None:
        for server in self.servers:
            server.close()
        for client in self.clients:
            client.close()
        self.loop.close()


@pytest.fixture(autouse=True)
def log_that_is_seen(monkeypatch, caplog):
    """Other tests of this process may have started the log for good."""
    monkeypatch.setattr(backy.log, "propagate", True)
    caplog.set_level("INFO", "backy")


@pytest.fixture
def stage():
    stage = Stage()
    yield stage
    stage.close()


# ==== Lines ==================================================================


def read(*pieces: bytes) -> tuple[list, bytes]:
    reader, found, answers = backy.LineReader(), [], b""
    for piece in pieces:
        one, other = reader.read(piece)
        found += one
        answers += other
    return found, answers


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\0b\r\0", ["a", "b"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\rb\r", ["a", "b"]),
        (b"a\r\n\r\n\n\r", ["a", "", "", ""]),
        (b"a\n\rb\r\n", ["a", "", "b"]),
        (b"caf\xc3\xa9\r\n", ["café"]),
        (b"\xfe\r\n", ["\ufffd"]),
        (b"jobz\x08s\r\n", ["jobs"]),
        (b"jobz\x7fs\r\n", ["jobs"]),
        (b"\x7f\x7fa\r\n", ["a"]),
        (b"no\xff\xf8yes\r\n", ["yes"]),
        (b"jobx\xff\xf7s\r\n", ["jobs"]),
        (b"a\xff\xffb\r\n", ["a\ufffdb"]),
        (b"a\xff\xf1b\xff\xf2c\xff\xf9d\r\n", ["abcd"]),
        (b"no\x03yes\r\n", [backy.Key.INTERRUPT, "yes"]),
        (b"no\xff\xf4yes\r\n", [backy.Key.INTERRUPT, "yes"]),
        (b"no\xff\xf3yes\r\n", [backy.Key.INTERRUPT, "yes"]),
        (b"y\xff\xf5es\r\n", [backy.Key.STOP_OUTPUT, "yes"]),
        (b"\xff\xf6\r\n", [backy.Key.ARE_YOU_THERE, ""]),
        (b"\x04", [backy.Key.END]),
        (b"\xff\xec", [backy.Key.END]),
        (b"a\xff\xfa\x18\x01jobs\r\n\xff\xff\xf0\xff\xf0b\r\n", ["ab"]),
        (b"x" * 1024 + b"\n", ["x" * 1024]),
        (b"x" * 1025 + b"\nb\n", [backy.Key.TOO_LONG, "b"]),
    ],
)
def test_lines_and_keys_are_read_whole_and_byte_by_byte(received, expected):
    assert read(received)[0] == expected
    assert read(*(received[at : at + 1] for at in range(len(received))))[0] == expected


def test_every_option_is_refused_and_no_refusal_is_answered():
    for option in range(256):
        assert read(bytes((IAC, 253, option)))[1] == bytes((IAC, 252, option))
        assert read(bytes((IAC, 251, option)))[1] == bytes((IAC, 254, option))
        assert read(bytes((IAC, 252, option, IAC, 254, option))) == ([], b"")


def test_random_bytes_are_read_in_bounded_memory():
    seed = random.Random(1)
    reader = backy.LineReader()
    for _ in range(2000):
        data = bytes(seed.choice([seed.randrange(256), 255, 250, 13]) for _ in range(50))
        found, answers = reader.read(data)
        assert len(found) <= 50
        assert len(answers) <= 75
        assert len(reader.line) <= backy.MAX_SHELL_LINE


# ==== Commands ===============================================================


def test_jobs_and_status_look_as_in_2x(stage):
    client = stage.connected()
    assert stage.ask(client, "jobs") == JOBS
    assert stage.ask(client, "status") == STATES


def test_table_of_no_jobs_has_its_rules(stage):
    client = stage.connected(host=Host([]))
    rule, header, *rest = stage.ask(client, "jobs").splitlines()
    assert rest == [rule, rule, "0 jobs shown"]
    assert header.startswith("| Job | SLA | Status | Last Backup (UTC) |")


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("Status", 20, "       Status       "),
        ("running", 20, "      running       "),
        ("finished", 20, "      finished      "),
        ("ab", 5, "  ab "),
        ("abc", 6, " abc  "),
        ("12", 2, "12"),
    ],
)
def test_texts_are_centred_as_2x_did_it(text, width, expected):
    assert backy.centred(text, width) == expected


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("ui", ["quick"]),
        ("^q", ["quick"]),
        ("[nq]", ["new", "quick"]),
        (r"'\w+k$'", ["quick"]),
        ('"n e|quick"', ["quick"]),
        ("''", ["new", "quick"]),
        ("nothing", []),
    ],
)
def test_pattern_is_searched_in_the_names(pattern, names, stage):
    client = stage.connected()
    lines = stage.ask(client, f"jobs {pattern}").splitlines()
    assert [line.split()[1] for line in lines[3:-2]] == names
    assert lines[-1] == f"{len(names)} jobs shown"


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("foo bar", "foo: command not found."),
        ("jobsX", "jobsX: command not found."),
        ("jobs a b", "Usage: jobs [REGEX]"),
        ("status x", "Usage: status"),
        ("jobs [", "error: '[' is no regular expression: unterminated character set at position 0"),
        ("jobs " + "(" * 250, None),
        ("jobs " + "a" * 257, "error: a pattern of more than 256 characters"),
        ("x" * 2000, "error: a line of more than 1024 bytes"),
        ("", ""),
        (";;", ""),
        ("\x1b[2J\x07x", "\ufffd[2J\ufffdx: command not found."),
        ("foo; status", f"foo: command not found.\n{STATES}"),
    ],
)
def test_what_is_wrong_costs_one_line(line, reply, stage):
    client = stage.connected()
    answer = stage.ask(client, line)
    assert answer == reply if reply is not None else answer.startswith("error: ")
    assert stage.ask(client, "status") == STATES


def test_reply_to_an_unknown_word_is_short(stage):
    assert len(stage.ask(stage.connected(), "x" * 1000)) < 120


@pytest.mark.parametrize("line", ["run quick", "runall", "reload"])
def test_looking_is_allowed_and_touching_is_not(line, stage):
    host = Host()
    client = stage.connected(host=host)
    answer = stage.ask(client, line)
    assert answer.startswith(f"error: {line.split()[0]} is not allowed; 'telnet-control: yes' in")
    assert host.asked == []


def test_control_runs_jobs_and_reloads(stage):
    host = Host()
    client = stage.connected(host=host, control=True)
    assert stage.ask(client, "run quick") == "Triggered immediate run for quick"
    assert stage.ask(client, "run slow") == "Unknown job slow"
    assert stage.ask(client, "run") == "Usage: run JOB"
    assert stage.ask(client, "runall").splitlines() == [
        "Triggered immediate run for quick",
        "Triggered immediate run for new",
    ]
    assert stage.ask(client, "reload").splitlines() == [
        "Triggering daemon reload.",
        "Daemon configuration reloaded.",
    ]
    host.reload_error = "backy.conf:3:1: bad\n  x\x1b\n"
    assert stage.ask(client, "reload").splitlines()[1:] == [
        "Reload refused: backy.conf:3:1: bad",
        "Reload refused:   x\ufffd",
    ]
    assert host.asked == ["quick", "slow", "*", "reload", "reload"]


def test_reload_is_answered_when_it_is_through_and_holds_up_nobody(stage, pulse, monkeypatch):
    work, turns = backy.ShellServer.work, []
    monkeypatch.setattr(backy.ShellServer, "work", lambda self: turns.append(1) or work(self))
    host = Host()
    host.reload_error = None  # not known yet
    client = stage.connected(host=host, control=True)
    client.sendall(b"reload; status\r\n")
    assert stage.receive(client, until="reload.\r\n") == "Triggering daemon reload.\r\n"
    assert "| waiting for deadline |" in stage.ask(stage.greeted(), "status")
    end = time.monotonic() + 0.3
    stage.until(lambda: time.monotonic() > end)
    assert len(turns) < 10, "it waits, and does not ask again and again"
    host.told("backy.conf:1: bad")
    reply = stage.receive(client)
    assert reply.startswith("Reload refused: backy.conf:1: bad\r\n+---")


@pytest.mark.parametrize("key", [b"\x03", b"\xff\xf4"])
def test_interrupt_ends_the_waiting_for_a_reload(stage, key):
    host = Host()
    host.reload_error = None
    client = stage.connected(host=host, control=True)
    client.sendall(b"reload\r\n")
    stage.receive(client, until="reload.\r\n")
    client.sendall(key)
    assert stage.receive(client) == PROMPT
    host.told("")
    assert stage.ask(client, "reload x") == "Usage: reload"


def test_end_of_file_waits_for_the_answer_to_a_reload(stage):
    host = Host()
    host.reload_error = None
    client = stage.connected(host=host, control=True)
    client.sendall(b"reload\r\n")
    client.shutdown(socket.SHUT_WR)
    stage.receive(client, until="reload.\r\n")
    host.told("")
    assert "Daemon configuration reloaded." in stage.receive(client, until=None)


def test_a_reload_nobody_waits_for_any_more_is_no_matter(stage):
    host = Host()
    host.reload_error = None
    client = stage.connected(host=host, control=True)
    client.sendall(b"reload\r\n")
    stage.receive(client, until="reload.\r\n")
    client.close()
    stage.until(lambda: not stage.sessions or host.told(""))
    host.told("")
    assert stage.ask(stage.greeted(), "reload x") == "Usage: reload"


def test_refused_reload_stands_above_the_table(stage):
    host = Host()
    host.entries[0]["scheduler"] = {"reload_error": "backy.conf:3:1: bad\nmore\n"}
    first, *table = stage.ask(stage.connected(host=host), "jobs").split("\n")
    assert first == (
        "The changed configuration is not in use: backy.conf:3:1: bad (and 1 more lines)"
    )
    assert "\n".join(table) == JOBS


def test_help_names_what_is_allowed(stage):
    look = stage.ask(stage.connected(), "help")
    assert [line.split()[0] for line in look.splitlines()][:4] == ["jobs", "status", "help", "quit"]
    assert "'telnet-control: yes'" in look
    touch = stage.ask(stage.connected(control=True), "help")
    assert [line.split()[0] for line in touch.splitlines()][4:] == ["run", "runall", "reload"]


def test_nothing_from_the_daemon_reaches_the_terminal_raw(stage):
    row = {**ROWS[0], "job": "evil\x1b[2J\xff\u202e", "status": "x\r\ny", "last_tags": None}
    client = stage.connected(host=Host([row]), control=True)
    for line in ("jobs", "status", "run evil\x1b", "runall"):
        assert re.fullmatch("[ -~\n\xff\ufffd]*", stage.ask(client, line))


def test_defect_of_the_daemon_costs_one_line(stage, caplog):
    host = Host()
    host.rows = lambda: 1 // 0
    client = stage.connected(host=host)
    with caplog.at_level("ERROR", "backy"):
        assert stage.ask(client, "jobs") == "error: this failed, the log says how"
    assert "ZeroDivisionError" in caplog.text
    assert stage.ask(client, "help").startswith("jobs")


# ==== Sessions ===============================================================


def test_quit_says_goodbye_and_closes(stage):
    client = stage.connected()
    client.sendall(b"quit\r\njobs\r\n")
    assert stage.receive(client, None) == "Goodbye.\r\n"
    assert not stage.sessions


@pytest.mark.parametrize("end", [b"\x04", b"\xff\xec", None])
def test_end_of_file_closes_after_what_was_asked(end, stage):
    client = stage.connected()
    client.sendall(b"status\r\n" + (end or b""))
    if end is None:
        client.shutdown(socket.SHUT_WR)
    assert stage.receive(client, None).replace("\r\n", "\n").startswith(STATES)
    assert not stage.sessions


@pytest.mark.parametrize("key", [b"\x03", b"\xff\xf4", b"\xff\xf4\xff\xfd\x06"])
def test_interrupt_drops_the_line_and_prompts_anew(key, stage):
    client = stage.connected()
    client.sendall(b"quit" + key)
    answer = stage.receive(client)
    assert answer.encode("utf-8", "surrogateescape") == (
        (b"\xff\xfc\x06" if key.endswith(b"\x06") else b"") + PROMPT.encode()
    )
    assert stage.ask(client, "status") == STATES


def test_interrupt_with_urgent_data_keeps_the_stream_in_step(stage):
    client = stage.connected()
    client.send(b"quit\xff\xf4\xff")
    client.send(b"\xf2", socket.MSG_OOB)
    client.send(b"\xff\xfd\x06status\r\n")
    assert STATES in stage.receive(client, count=2).replace("\r\n", "\n")


def test_interrupt_stops_a_long_reply(stage):
    client = stage.connected(host=Host(many_rows(10_000)))
    client.sendall(b"jobs\r\n")
    stage.receive(client, "a00100!")
    client.sendall(b"\xff\xf4")
    assert "jobs shown" not in stage.receive(client)
    assert stage.ask(client, "foo") == "foo: command not found."


def test_are_you_there_is_answered(stage):
    client = stage.connected()
    client.sendall(b"\xff\xf6")
    assert f"backy-{backy.__version__}: yes" in stage.receive(client)


@pytest.mark.parametrize(
    "request_line", ["GET / HTTP/1.1", "POST / HTTP/1.1", "GET /", "PUT /x HTTP/1.1"]
)
def test_web_browser_is_sent_away(request_line, stage):
    host = Host()
    client = stage.connected(host=host, control=True)
    client.sendall(f"{request_line}\r\nHost: localhost\r\n\r\nrun quick\r\n".encode())
    assert stage.receive(client, None) == ""
    assert host.asked == []


def test_seventeenth_session_is_told_and_closed(stage):
    stage.open()
    clients = [stage.client() for _ in range(16)]
    for client in clients:
        assert stage.receive(client) == PROMPT
    assert stage.receive(stage.client(), None) == (
        "error: too many sessions, try again in a moment\r\n"
    )
    clients[0].close()
    stage.until(lambda: len(stage.sessions) < 16)
    stage.greeted()


def test_silent_session_makes_way_after_a_moment(stage, monkeypatch):
    talker = stage.connected()
    stage.ask(talker, "status")
    silent = [stage.client() for _ in range(15)]
    stage.until(lambda: len(stage.sessions) == 16)
    monkeypatch.setattr(backy, "SHELL_SETTLED", 0.0)
    stage.greeted()
    assert stage.receive(silent[0], None) in (PROMPT, "")  # the oldest has been closed
    with pytest.raises(AssertionError):
        stage.receive(silent[1], None, seconds=0.1)
    assert stage.ask(talker, "status") == STATES


@pytest.mark.parametrize("asks", [False, True])
def test_idle_session_is_closed(asks, stage, monkeypatch):
    monkeypatch.setattr(backy, "SHELL_IDLE" if asks else "SHELL_SILENT", 100.0)
    client = stage.connected()
    if asks:
        stage.ask(client, "status")
    (session,) = stage.sessions
    session.expire(session.last_asked + 99)
    assert session.is_open and not session.is_ending
    session.expire(session.last_asked + 101)
    assert stage.receive(client, None) == "\r\nNothing was asked for 100 s. Goodbye.\r\n"
    assert not stage.sessions


def test_sessions_are_looked_after_from_time_to_time(stage, monkeypatch):
    client = stage.connected()
    server = stage.servers[0]
    assert server.sweeper is not None
    monkeypatch.setattr(backy, "SHELL_SILENT", 0.0)
    server.sweeper.action()
    assert stage.receive(client, None).endswith("Goodbye.\r\n")
    server.sweeper.action()
    assert server.sweeper is None


def test_slow_reader_costs_bounded_memory_and_is_dropped(stage):
    host = Host(many_rows(5_000))
    stage.open(host=host)
    client = stage.client(b"jobs\r\n" * 20)
    stage.until(lambda: any(one.has_asked for one in stage.sessions))
    (session,) = stage.sessions
    for _ in range(300):
        stage.loop.turn(0)
    assert backy.SHELL_WATERMARK <= len(session.unsent) <= backy.MAX_SHELL_OUTPUT
    session.expire(session.last_sent + 1)
    assert session.is_open
    session.expire(session.last_sent + backy.SHELL_STALLED + 1)
    assert not session.is_open
    assert client in stage.clients


def test_answers_nobody_reads_are_not_kept(stage):
    stage.connected()
    (session,) = stage.sessions
    session.write(b"x" * backy.MAX_SHELL_OUTPUT)
    assert session.is_open
    session.write(b"x")
    assert not session.is_open
    assert not stage.sessions


# ==== The loop is not held up ================================================


class Pulse:
    """A timer in the same loop, and by how much it was ever late."""

    def __init__(self, loop: backy.Loop, every: float = 0.005) -> None:
        self.loop, self.every, self.worst = loop, every, 0.0
        self.due, self.ousted = time.monotonic() + every, ousted()
        self.loop.call_at(self.due, self.beat)

    def beat(self) -> None:
        now, before, self.ousted = time.monotonic(), self.ousted, ousted()
        self.worst = max(self.worst, now - self.due - (self.ousted - before))
        self.due = now + self.every
        self.loop.call_at(self.due, self.beat)


def ousted() -> float:
    """Seconds for which this thread could have run and the host let others run."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


@pytest.fixture
def pulse(stage, record_property):
    """Fails the test if a timer was late by more than 100 ms of a host that others use too."""
    pulse = Pulse(stage.loop)
    yield pulse
    record_property("worst delay", pulse.worst)
    print(f"worst delay {pulse.worst * 1000:.1f} ms")
    assert pulse.worst < 0.25


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(.*)*(.*)*x", "(?i)[\\x00-\\U0010ffff]*(a+)+$"]
)
def test_pattern_without_end_costs_a_line(pattern, stage, pulse):
    client = stage.connected(host=Host(many_rows(1_000)))
    started = time.monotonic()
    answer = stage.ask(client, f"jobs {pattern}")
    assert answer == f"error: {pattern!r} takes longer than 50 ms"
    assert time.monotonic() - started < 10
    assert backy.signal.getsignal(backy.signal.SIGALRM) == backy.signal.SIG_DFL


def test_a_pattern_pays_for_what_it_takes_and_not_for_a_busy_host():
    with backy.time_limit(0.02):
        time.sleep(0.1)  # others have the processor
    started = time.thread_time()
    with pytest.raises(backy.TimeUp), backy.time_limit(0.02):
        time.sleep(0.1)
        while time.thread_time() < started + 5:
            pass
    assert time.thread_time() - started < 1


@pytest.mark.slow
def test_many_patterns_without_end_take_turns(stage, pulse):
    stage.open(host=Host(many_rows(1_000)))
    clients = [stage.client(b"jobs (a+)+$\r\n" * 2) for _ in range(8)]
    for client in clients:
        assert stage.receive(client, "takes longer", 2)


def test_ten_thousand_jobs_are_shown_in_slices(stage, pulse):
    client = stage.connected(host=Host(many_rows(10_000)))
    client.sendall(b"jobs\r\n")
    table = stage.receive(client)
    assert table.count("\r\n") == 10_005
    assert "\r\n10000 jobs shown\r\n" in table
    assert stage.ask(client, "jobs 0999.!").endswith("\n10 jobs shown")


def test_reply_that_takes_long_is_made_in_slices(stage, pulse, monkeypatch):
    def slowly(_):
        for _ in range(80):
            time.sleep(0.005)
            yield ""
        yield "done\n"

    monkeypatch.setattr(backy.ShellCommands, "status", slowly)
    assert stage.ask(stage.connected(), "status") == "done"


def test_flood_of_half_open_connections_holds_nothing_up(stage, pulse):
    talker = stage.connected()
    stage.ask(talker, "status")
    for _ in range(1000):
        with contextlib.suppress(OSError):
            stage.client()
        stage.loop.turn(0)
    assert len(stage.sessions) <= backy.MAX_SHELL_SESSIONS
    assert stage.ask(talker, "status") == STATES
    for client in stage.clients[1:]:
        client.close()
    stage.until(lambda: len(stage.sessions) == 1)
    assert stage.ask(stage.greeted(), "status") == STATES


STORMS = [bytes((255, 253, 1)), bytes((255, 250)), b"\xff"]


@pytest.mark.parametrize(
    "storm", [*STORMS, *(pytest.param(one, marks=pytest.mark.slow) for one in (b"\n", b"\x03"))]
)
def test_storm_of_commands_holds_nothing_up(storm, stage, pulse):
    talker = stage.connected()
    stormers = [stage.client() for _ in range(8)]
    for turn in range(60):
        for client in stormers:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                client.send(storm * 2000)
        stage.loop.turn(0)
        if turn % 20 == 0:
            assert stage.ask(talker, "status") == STATES
    for session in stage.sessions:
        assert len(session.unsent) <= backy.MAX_SHELL_OUTPUT
        assert len(session.asked) <= backy.MAX_SHELL_QUEUE + 4096


def test_garbage_ends_no_server(stage, pulse):
    stage.open(control=True)
    seed = random.Random(2)
    for _ in range(300):
        client = stage.client(bytes(seed.randrange(256) for _ in range(200)))
        stage.loop.turn(0)
        client.close()
    stage.until(lambda: not stage.sessions)
    assert stage.ask(stage.greeted(), "status") == STATES


def test_no_descriptor_and_no_timer_is_left_by_sessions(stage):
    stage.open()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        client = stage.client(b"status\r\nquit\r\n")
        assert stage.receive(client, None)
        client.close()
        stage.clients.clear()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(stage.loop.timers) < 10


# ==== Listening ==============================================================


def test_missing_address_is_a_warning(stage, caplog):
    with caplog.at_level("INFO", "backy"):
        server = stage.open(addresses=["192.0.2.1", "127.0.0.1", "no such host.invalid"])
    assert len(server.ports) == 1
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warnings[0].startswith("shell: cannot listen on 192.0.2.1 port 0: ")
    assert warnings[1].startswith("shell: cannot listen on no such host.invalid port 0: ")
    stage.greeted()


def test_port_in_use_is_a_warning(stage, caplog):
    first = stage.open()
    second = stage.open(port=first.ports[0])
    assert second.ports == []
    assert "Address already in use" in caplog.text


def test_address_of_the_network_is_a_warning(stage, caplog):
    stage.open(addresses=["0.0.0.0"])
    assert "0.0.0.0 is more than this host" in caplog.text


def test_ipv6_is_served_beside_ipv4(stage):
    try:
        socket.socket(socket.AF_INET6).bind(("::1", 0))
    except OSError:
        need(False, "no IPv6 on this host")
    server = stage.open(addresses=["127.0.0.1", "::1"])
    assert len(server.ports) == 2
    client = socket.create_connection(("::1", server.ports[1]))
    client.setblocking(False)
    stage.clients.append(client)
    assert stage.receive(client) == PROMPT


# ==== A terminal with telnet =================================================


class Terminal:
    """A program in a terminal of 130 columns and 40 lines."""

    def __init__(self, stage: Stage, *words: object) -> None:
        need_tool("tmux")
        self.stage, self.name = stage, f"backy-test-{os.getpid()}-{id(self)}"
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", 130, "-y", 40, *words)

    def tmux(self, *words: object) -> str:
        done = subprocess.run(
            ["tmux", "-L", self.name, *map(str, words)], capture_output=True, text=True, check=True
        )
        return done.stdout

    def type(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def screen(self) -> list[str]:
        return [line.rstrip() for line in self.tmux("capture-pane", "-p").rstrip().splitlines()]

    def until(self, condition) -> list[str]:
        """The screen, once it fulfils `condition`."""
        self.stage.until(lambda: condition(self.screen()))
        return self.screen()

    def until_prompt(self, count: int) -> list[str]:
        prompt = PROMPT.strip()
        return self.until(
            lambda screen: (
                sum(line.startswith(prompt) for line in screen) == count and screen[-1] == prompt
            )
        )

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self.name, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def terminal(stage):
    """A function that starts a program in a terminal of its own."""
    opened: list[Terminal] = []

    def open_terminal(*words: object) -> Terminal:
        opened.append(Terminal(stage, *words))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_session_of_a_telnet_client_looks_as_in_the_manual(stage, terminal):
    need_tool("telnet")
    server = stage.open(control=True)
    client = terminal(f"telnet 127.0.0.1 {server.ports[0]}; sleep 60")
    client.until_prompt(1)
    client.type("jobs", "Enter")
    client.until_prompt(2)
    client.type("statuz", "BSpace", "s", "Enter")  # the client edits
    client.until_prompt(3)
    client.type("run nothing at all", "C-c")
    client.until_prompt(4)
    client.type("xyz", "Enter")
    screen = client.until_prompt(5)
    prompt = PROMPT.strip()
    assert screen[3:] == [
        "",
        f"{prompt} jobs",
        *JOBS.splitlines(),
        f"{prompt} status",
        *STATES.splitlines(),
        f"{prompt} run nothing at all^C",
        f"{prompt} xyz",
        "xyz: command not found.",
        prompt,
    ] or screen[3:] == [
        "",
        f"{prompt} jobs",
        *JOBS.splitlines(),
        f"{prompt} status",
        *STATES.splitlines(),
        f"{prompt} ^C",  # the terminal drops the line itself
        f"{prompt} xyz",
        "xyz: command not found.",
        prompt,
    ]
    client.type("C-d")
    client.until(lambda screen: screen[-1].endswith("Connection closed by foreign host."))
    assert not stage.sessions


# ==== backy shell ============================================================


class Client:
    """`backy shell` as a process, while the loop goes on."""

    def __init__(self, stage: Stage, path: Path) -> None:
        self.stage, self.conf = stage, path / "backy.conf"

    def configure(self, port: int, addresses: str = "127.0.0.1") -> None:
        self.conf.write_text(
            f"global: {{telnet-port: {port}, telnet-addrs: '{addresses}'}}\n"
            "schedules: {default: {daily: {interval: 1d, keep: 9}}}\n"
            "jobs: {a: {schedule: default, source: {type: file, filename: /image}}}\n"
        )

    def ask(self, *words: str, typed: str = "") -> tuple[int, str, str]:
        command = [sys.executable, str(COMPILED), "shell", "-c", str(self.conf), *words]
        paths = [self.conf.parent / name for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(typed)
        with open(paths[0]) as given, open(paths[1], "w") as out, open(paths[2], "w") as err:
            process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err)
            self.stage.until(lambda: process.poll() is not None)
        return process.returncode, paths[1].read_text(), paths[2].read_text()


@pytest.fixture
def client(stage, tmp_path):
    return Client(stage, tmp_path)


@pytest.fixture
def serving(stage, client):
    host = Host()
    server = stage.open(host=host, control=True)
    client.configure(server.ports[0])
    return host


REPLIES = [
    (["jobs", "(new|qu ?ick)"], (0, JOBS)),
    (["foo"], (1, "foo: command not found.")),
]
MORE_REPLIES = [
    (["jobs"], (0, JOBS)),
    (["jobs", "new|quick"], (0, JOBS)),
    (["status"], (0, STATES)),
    (["run", "new"], (0, "Triggered immediate run for new")),
    (["run", "old"], (1, "Unknown job old")),
    (["run"], (1, "Usage: run JOB")),
    (["quit"], (0, "Goodbye.")),
]


@pytest.mark.parametrize(
    ("words", "expected"),
    [*REPLIES, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_REPLIES)],
)
def test_client_prints_the_reply_and_nothing_else(words, expected, serving, client):
    assert client.ask(*words) == (expected[0], expected[1] + "\n", "")


def test_client_asks_what_it_reads(serving, client):
    text = f"foo: command not found.\n{STATES}\nGoodbye.\n"
    assert client.ask(typed="foo\n\nstatus\nquit\nstatus\n") == (1, text, "")
    assert client.ask(typed="") == (0, "", "")


def test_client_says_why_it_cannot_connect(stage, client):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client.configure(unused.getsockname()[1], "127.0.0.1, ::1")
        status, out, err = client.ask("jobs")
    assert (status, out) == (1, "")
    assert re.match(r"backy: cannot connect to the scheduler: 127\.0\.0\.1 port \d+: Conn", err)
    assert err.endswith("backy: hint: is it running?\n")


@pytest.mark.slow
def test_client_tries_all_addresses(serving, stage, client):
    client.configure(stage.servers[0].ports[0], "127.0.0.9, 127.0.0.1")
    assert client.ask("status") == (0, f"{STATES}\n", "")


def test_client_passes_on_that_there_is_no_room(serving, stage, client):
    for _ in range(16):
        stage.greeted()
    assert client.ask("status") == (
        1,
        "",
        "backy: the scheduler says: error: too many sessions, try again in a moment\n",
    )


@pytest.mark.slow
def test_client_gets_ten_thousand_jobs(serving, client):
    serving.entries = many_rows(10_000)
    status, out, _ = client.ask("jobs")
    assert (status, out.count("\n")) == (0, 10_005)


def test_client_trusts_nobody_at_the_other_end(stage, client):
    """Some other program may have the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    answer = b"\xff\xfb\x01\x1b[2Jhello\xff\xfa\x01\xff\xf0\xff\xff\r\nbacky-\x1b % \r\n"

    def accept(_) -> None:
        other = listener.accept()[0]
        stage.clients.append(other)
        other.sendall(answer + b"\r\nbacky-9 % ")
        stage.loop.watch(other, 1, lambda _: reply(other))

    def reply(other) -> None:
        stage.loop.forget(other)
        other.recv(100)
        other.sendall(answer)
        other.close()

    stage.loop.watch(listener, 1, accept)
    stage.clients.append(listener)
    client.configure(listener.getsockname()[1])
    status, out, err = client.ask("status")
    assert (status, err) == (1, "backy: the scheduler has ended the session\n")
    assert "[2Jhello" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"a\xff\xfb\x01b\xff\xfd\x01c", b"abc"),
        (b"a\xff\xfa\x18\x01\xff\xff\xff\xf0b", b"ab"),
        (b"a\xff\xffb\xff\xf1", b"a\xffb"),
    ],
)
def test_telnet_bytes_are_taken_out(received, expected):
    assert backy.without_telnet(received) == expected


@pytest.mark.parametrize("word", ["a", "a b", "it's", "(a|b)+$", "", 'a"b', r"\d+;"])
def test_words_arrive_as_they_were_given(word):
    assert backy.split_commands(f"jobs {backy.quote_word(word)}") == [["jobs", word]]


def test_client_on_a_terminal_has_a_prompt_and_history(serving, client, terminal):
    words = f"{sys.executable} {COMPILED} shell -c {client.conf}; echo status $?; sleep 60"
    screen = terminal(words)
    screen.until_prompt(1)
    screen.type("status", "Enter")
    screen.until_prompt(2)
    screen.type("abc", "C-c")
    screen.until_prompt(3)
    screen.type("Up", "Enter")
    screen.until_prompt(4)
    screen.type("C-d")
    shown = screen.until(lambda lines: lines[-1] == "status 0")
    assert shown.count(f"{PROMPT.strip()} status") == 2
    assert "\n".join(shown).count(STATES) == 2


def test_all_addresses_of_both_kinds_go_together(stage):
    try:
        socket.socket(socket.AF_INET6).bind(("::1", 0))
    except OSError:
        need(False, "no IPv6 on this host")
    first = stage.open(addresses=["0.0.0.0"])
    assert stage.open(addresses=["::"], port=first.ports[0]).ports == first.ports
