# SPDX-License-Identifier: GPL-3.0-or-later
"""The conversation with Consul, with a server that behaves as its API documents, or does not."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import backy

TOKEN = "a211c244-secret"


class Server(ThreadingHTTPServer):
    """A key-value store: values are base64 in lists, ?cas=0 makes only what is new."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.headers_seen: list[str] = []
        self.needs_token = False
        self.misbehave = None  # takes the handler, returns whether it has answered
        self.on_put = lambda key, value: None
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        server, url = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.calls.append(f"{self.command} {self.path}")
        server.headers_seen.append(self.headers.get("X-Consul-Token") or "")
        if server.misbehave and server.misbehave(self):
            return
        if server.needs_token and server.headers_seen[-1] != TOKEN:
            self.answer(403, b"Permission denied")
            return
        assert url.path.startswith("/v1/kv/")
        key, query = unquote(url.path[len("/v1/kv/") :]), parse_qs(url.query, True)
        if self.command == "PUT":
            is_new = key not in server.store
            if is_new or "cas" not in query:
                server.store[key] = body
                server.on_put(key, body)
            self.answer(200, b"true" if is_new or "cas" not in query else b"false")
        elif self.command == "DELETE":
            server.store.pop(key, None)
            self.answer(200, b"true")
        else:
            found = [one for one in server.store if one == key or "recurse" in query]
            entries = [
                {
                    "LockIndex": 0, "Key": one, "Flags": 0, "CreateIndex": 1, "ModifyIndex": 1,
                    "Value": base64.b64encode(server.store[one]).decode() or None,
                }
                for one in sorted(found)
                if one.startswith(key)
            ]  # fmt: skip
            self.answer(200 if entries else 404, json.dumps(entries).encode() if entries else b"")

    do_GET = do_PUT = do_DELETE = handle_any


class FakeRBD:
    """Stands where the commands of rbd are: which snapshots there are, and who made them."""

    image = "rbd/vm1"

    def __init__(self) -> None:
        self.there: dict[str, dict] = {}
        self.plain: list[str] = []

    def snapshots(self) -> dict:
        return dict(self.there)

    def create(self, name: str) -> None:
        self.plain.append(name)
        if name in self.there:
            raise backy.ProgramFailed("rbd: snapshot exists", 17)


@pytest.fixture
def consul(monkeypatch):
    server = Server()
    monkeypatch.setenv("CONSUL_HTTP_ADDR", server.address)
    monkeypatch.setattr(backy, "CONSUL_LIMIT", 0.7)
    monkeypatch.setattr(backy.log, "propagate", True)  # whatever ran before in this process
    kind = backy.FlyingCircusSource
    for name, value in (("pause", 0.01), ("every", 0.02), ("limit", 0.4)):
        monkeypatch.setattr(kind, name, value)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def rbd():
    return FakeRBD()


def source(**options: str) -> backy.FlyingCircusSource:
    return backy.FlyingCircusSource.load(
        {"pool": "rbd", "image": "vm1", "vm": "vm1", "type": "flyingcircus", **options}
    )


def obey(consul: Server, rbd: FakeRBD) -> None:
    """Let the host of the VM make the snapshots that are asked for."""
    consul.on_put = lambda key, value: rbd.there.setdefault(json.loads(value)["snapshot"], {})


def test_a_snapshot_is_asked_for_and_the_request_removed(consul, rbd):
    obey(consul, rbd)
    values = []
    on_put = consul.on_put
    consul.on_put = lambda key, value: (values.append((key, value)), on_put(key, value))
    source().create(rbd, "backy-X")
    ((key, value),) = values
    assert backy.re.fullmatch(r"snapshot/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key)
    assert json.loads(value) == {"vm": "vm1", "snapshot": "backy-X"}
    assert consul.calls[0] == f"PUT /v1/kv/{key}?cas=0"
    assert consul.store == {} and rbd.plain == []


def test_the_token_is_in_the_header_and_nowhere_else(consul, rbd, caplog, tmp_path):
    obey(consul, rbd)
    consul.needs_token = True
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    one, other = (
        source(consul_acl_token=TOKEN),
        source(consul_acl_token_file=str(tmp_path / "token")),
    )
    with caplog.at_level(logging.DEBUG, "backy"):
        for number, kind in enumerate((one, other)):
            kind.create(rbd, f"backy-{number}")
    assert rbd.plain == [] and set(consul.headers_seen) == {TOKEN}
    assert TOKEN not in "".join(consul.calls) + caplog.text + repr(one)


def test_without_an_answer_in_time_the_snapshot_is_a_plain_one(consul, rbd, caplog):
    source().create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"] and consul.store == {}
    assert "a plain snapshot, without the guest: no snapshot came within 0.4 s" in caplog.text


def test_a_snapshot_that_comes_too_late_is_taken(consul, rbd):
    real = rbd.create

    def create(name):
        rbd.there[name] = {}
        real(name)

    rbd.create = create
    source().create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"]


def test_all_own_requests_go_and_all_others_stay(consul, rbd):
    obey(consul, rbd)
    ours = {"vm": "vm1", "snapshot": "backy-old"}
    foreign = {
        "snapshot/a": json.dumps({"vm": "vm2", "snapshot": "backy-old"}).encode(),
        "snapshot/b": json.dumps({"vm": "vm1", "snapshot": "by-hand"}).encode(),
        "snapshot/c": b"\xff\x00 garbage {",
        "snapshot/d": b"",
        "snapshot/e": b"[1, 2]",
        "snapshot/f": b'{"vm": "vm1", "snapshot": 7}',
        "snapshot/g": b"[" * 3000,
        "other/h": json.dumps(ours).encode(),
    }
    consul.store = {**foreign, "snapshot/old": json.dumps(ours).encode()}
    consul.store["snapshot/odd name?&#%"] = json.dumps(ours).encode()
    source().create(rbd, "backy-X")
    assert consul.store == foreign and rbd.plain == []


def hang(handler) -> bool:
    time.sleep(2)
    return True


def trickle(handler) -> bool:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    return True


MISBEHAVIOUR = {
    "500": lambda handler: handler.answer(500, b"oops") or True,
    "503 without a body": lambda handler: handler.answer(503) or True,
    "403": lambda handler: handler.answer(403, b"Permission denied") or True,
    "404 for all": lambda handler: handler.answer(404) or True,
    "cas refused": lambda handler: handler.answer(200, b"false") or True,
    "no JSON": lambda handler: handler.answer(200, b"<html>") or True,
    "10 MiB": lambda handler: handler.answer(200, b"x" * (10 << 20)) or True,
    "no HTTP": lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n\r\n") or True,
    "nothing": lambda handler: True,
    "hang": hang,
    "trickle": trickle,
}


@pytest.mark.parametrize("misbehave", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_a_broken_consul_costs_a_warning_and_never_tells_the_token(consul, rbd, caplog, misbehave):
    def safely(handler):
        with backy.suppress(OSError):
            return misbehave(handler)
        return True

    consul.misbehave = safely
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG, "backy"):
        source(consul_acl_token=TOKEN).create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"] and "a plain snapshot" in caplog.text
    assert TOKEN not in caplog.text and time.monotonic() - started < 5


def test_a_redirection_is_not_followed_with_the_token(consul, rbd, caplog):
    other = Server()
    target = f"http://{other.address}/v1/kv/stolen"
    consul.misbehave = lambda handler: handler.answer(302, Location=target) or True
    source(consul_acl_token=TOKEN).create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"] and other.calls == []
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("phase", ["GET", "DELETE"])
def test_a_failure_to_clear_up_is_a_warning_after_a_good_snapshot(consul, rbd, caplog, phase):
    obey(consul, rbd)
    consul.misbehave = lambda handler: handler.command == phase and not handler.answer(500)
    source().create(rbd, "backy-X")
    assert rbd.plain == [] and "requests for snapshots may be left" in caplog.text


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "http://127.0.0.1:1/", "https://127.0.0.1:1", "unix:///x", "a b",
                "x:99999", "http://user@host"]
)  # fmt: skip
def test_an_address_without_consul_is_a_warning(consul, rbd, caplog, monkeypatch, address):
    monkeypatch.setenv("CONSUL_HTTP_ADDR", address)
    source(consul_acl_token=TOKEN).create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"] and TOKEN not in caplog.text


@pytest.mark.parametrize("token", ["a\nb: c", "tökèn", "\x00"])
def test_a_token_that_cannot_be_sent_is_not_told(consul, rbd, caplog, token):
    source(consul_acl_token=token).create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"] and token not in caplog.text and consul.calls == []


def test_a_token_file_that_is_not_there_is_a_warning(consul, rbd, caplog, tmp_path):
    source(consul_acl_token_file=str(tmp_path / "none")).create(rbd, "backy-X")
    assert rbd.plain == ["backy-X"] and "/none: No such file" in caplog.text


def test_a_failing_rbd_fails_the_backup_and_leaves_no_request(consul, rbd):
    def snapshots():
        raise backy.ProgramFailed("rbd: cluster is gone", 1)

    rbd.snapshots = snapshots
    with pytest.raises(backy.ProgramFailed):
        source().create(rbd, "backy-X")
    assert consul.store == {}


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("rbd/vm1,vm1", {"pool": "rbd", "image": "vm1", "vm": "vm1"}),
        ("rbd/ns/vm1 , vm 1, t", {"pool": "rbd", "namespace": "ns", "image": "vm1", "vm": "vm 1",
                                  "consul_acl_token": "t"}),
    ],
)  # fmt: skip
def test_init_takes_image_machine_and_token(words, config):
    assert backy.FlyingCircusSource.parse(words) == {**config, "type": "flyingcircus"}


@pytest.mark.parametrize("words", ["rbd/vm1", "rbd/vm1,", ",vm1", "rbd,vm1", "rbd/vm1,a,b,c", ""])
def test_init_refuses_what_is_no_machine(words):
    with pytest.raises(backy.ConfigError, match=r"POOL"):
        backy.FlyingCircusSource.parse(words)
