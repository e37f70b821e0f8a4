# SPDX-License-Identifier: GPL-3.0-or-later
"""What the scheduler tells systemd, and that the unit works under the real one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import COMPILED, PROGRAM, command, need_root, need_tool, noise

import backy

ROOT = PROGRAM.parent
UNIT = ROOT / "contrib/systemd/backy.service"
CONFIG = """\
global: {{base-dir: {base}, telnet-addrs: [], status-interval: 1}}
schedules: {{usual: {{tick: {{interval: 2s, keep: 3}}}}}}
jobs:
  vm1: {{schedule: usual, source: {{type: file, filename: {image}}}}}
"""


class Receiver:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self.received: list[dict[str, str]] = []

    def wait_for(self, **expected: str) -> dict[str, str]:
        """The next message with these words, patterns of their values."""
        deadline = time.monotonic() + 60
        while True:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            text = self.socket.recv(4096).decode()
            message = dict(line.split("=", 1) for line in text.splitlines())
            self.received.append(message)
            if all(re.fullmatch(value, message.get(key, "")) for key, value in expected.items()):
                return message


@pytest.fixture
def place(xfs):
    base = xfs / "base"
    base.mkdir()
    (xfs / "vm1.img").write_bytes(noise(100_000))
    config = xfs / "backy.conf"
    config.write_text(CONFIG.format(base=base, image=xfs / "vm1.img"))
    config.chmod(0o600)
    return xfs


def start(place: Path, **environment: str) -> subprocess.Popen:
    words = [sys.executable, COMPILED, "scheduler", "-c", place / "backy.conf"]
    env = {**os.environ, **environment}
    return subprocess.Popen(words, env=env, stderr=open(place / "stderr", "wb"))


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_all_that_happens(place, kind):
    address = str(place / "notify") if kind == "path" else f"@backy-test-{os.getpid()}"
    receiver = Receiver(address)
    process = start(place, NOTIFY_SOCKET=address, WATCHDOG_USEC="400000")
    try:
        receiver.wait_for(READY="1")
        assert (place / "base/status").exists(), "ready is after the first status file"
        begun = time.monotonic()
        for _ in range(3):
            receiver.wait_for(WATCHDOG="1")
        assert time.monotonic() - begun < 10
        receiver.wait_for(STATUS=r"1 job, \d running, next vm1 \d\d:\d\d:\d\d UTC")
        process.send_signal(signal.SIGHUP)
        clock = receiver.wait_for(RELOADING="1")["MONOTONIC_USEC"]
        assert abs(time.monotonic_ns() // 1000 - int(clock)) < 5_000_000
        receiver.wait_for(READY="1")
        (place / "backy.conf").write_text("nonsense: 1\n")
        process.send_signal(signal.SIGHUP)
        receiver.wait_for(RELOADING="1")
        receiver.wait_for(READY="1")
        receiver.wait_for(STATUS=".*configuration refused: .*backy.conf.*")
        process.send_signal(signal.SIGTERM)
        receiver.wait_for(STOPPING="1")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_watchdog_that_is_meant_for_another_process_is_left_alone(monkeypatch):
    for pid, seconds in ((str(os.getpid()), 1.5), ("", 1.5), ("1", 0.0)):
        monkeypatch.setenv("WATCHDOG_USEC", "3000000")
        monkeypatch.setenv("WATCHDOG_PID", pid)
        assert backy.ServiceManager().watchdog == seconds
        assert "WATCHDOG_USEC" not in os.environ
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert backy.ServiceManager().watchdog == 0.0


@pytest.mark.parametrize("address", ["", "nonsense", "/nowhere/at/all", "vsock:2:1"])
def test_a_manager_that_cannot_be_reached_is_no_trouble(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    backy.ServiceManager().tell("READY=1")


def test_lines_for_the_journal_have_a_priority_and_no_time(tmp_path):
    path = tmp_path / "journal"
    with open(path, "wb") as stream:
        status = os.fstat(stream.fileno())
        for names in (f"{status.st_dev}:{status.st_ino}", "1:2"):
            subprocess.run(
                [sys.executable, COMPILED, "-b", tmp_path / "none", "status"],
                env={**os.environ, "JOURNAL_STREAM": names}, stderr=stream, check=False,
            )  # fmt: skip
    first, second = path.read_text().splitlines()
    assert first == f"<3>{tmp_path}/none: no such directory"
    assert second == f"backy: {tmp_path}/none: no such directory"


def test_each_line_of_a_traceback_has_its_priority():
    form = backy.JournalForm()
    levels = {backy.logging.DEBUG: 7, backy.logging.INFO: 6, backy.logging.WARNING: 4}
    levels[backy.logging.ERROR] = 3
    for level, priority in levels.items():
        record = backy.logging.LogRecord("backy", level, "", 0, "one\ntwo", (), None)
        assert form.format(record) == f"<{priority}>one\n<{priority}>two"


def test_the_unit_is_well_shut_in():
    need_tool("systemd-analyze")
    command("systemd-analyze", "security", "--offline=yes", "--threshold=20", UNIT)


# -- the real one ---------------------------------------------------------------

INSIDE = """\
set -eu
mount -o loop {disk} /srv
mkdir -p /srv/backy && cp {image} /srv/vm1.img && chown nobody:nogroup /srv/vm1.img
chmod 600 /srv/vm1.img
install -m 755 {program} /usr/local/bin/backy
install -m 600 {config} /etc/backy.conf
install -m 644 {unit} /etc/systemd/system/backy.service
systemctl daemon-reload
systemctl start backy.service
systemctl show -p ActiveState,Type,StatusText backy.service
until [ -e /srv/backy/vm1/last ]; do sleep 0.2; done
for number in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(find /srv/backy/vm1 -name '*.rev' -type f | wc -l)" -ge 2 ] && break
    sleep 1
done
cmp /srv/backy/vm1/last /srv/vm1.img && echo "the image is there"
filefrag -v /srv/backy/vm1/last | grep -q shared && echo "extents are shared"
systemctl reload backy.service && echo "reloaded"
number=0
until systemctl show -p StatusText backy.service | grep ", next vm1" || [ $number -ge 200 ]; do
    number=$((number + 1))
    sleep 0.1
done
echo nonsense >> /etc/backy.conf
systemctl reload backy.service
sleep 1.5
systemctl show -p StatusText backy.service
pid=$(systemctl show -p MainPID --value backy.service)
sleep 5
[ "$pid" = "$(systemctl show -p MainPID --value backy.service)" ] && echo "the watchdog is content"
install -m 600 {config} /etc/backy.conf
kill -STOP $pid
sleep 9
systemctl show -p ActiveState,NRestarts backy.service
journalctl -u backy.service -o cat -p err --no-pager
systemctl stop backy.service || true
systemctl show -p ActiveState backy.service
"""


class Box:
    """A machine of its own: systemd as PID 1 on a throw-away overlay of this one's root."""

    TARGET = "[Unit]\nRequires=basic.target test.service\nAfter=basic.target\nAllowIsolate=yes\n"
    SERVICE = """\
[Unit]
After=basic.target dbus.service
Wants=dbus.service
DefaultDependencies=no
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/bash -c 'bash /box/script >/box/out 2>&1 </dev/null; echo $? >/box/status'
"""

    def __init__(self) -> None:
        need_root()
        need_tool("systemd-nspawn")
        self.top = Path(tempfile.mkdtemp(prefix="backy-test-box-"))
        self.memory, self.root = self.top / "memory", self.top / "root"
        self.memory.mkdir()
        self.root.mkdir()
        command("mount", "-t", "tmpfs", "tmpfs", self.memory)
        for name in ("upper", "work", "out"):
            (self.memory / name).mkdir()
        self.out = self.memory / "out"
        layers = f"lowerdir=/,upperdir={self.memory}/upper,workdir={self.memory}/work"
        command("mount", "-t", "overlay", "overlay", "-o", layers, self.root)

    def run(self, script: str) -> str:
        """Boot, run the script, and give what it printed."""
        units = self.root / "etc/systemd/system"
        (units / "test.target").write_text(self.TARGET)
        (units / "test.service").write_text(self.SERVICE)
        for name in ("systemd-udevd", "systemd-udev-trigger", "systemd-timesyncd", "rpcbind"):
            link = units / f"{name}.service"
            if not os.path.lexists(link):
                link.symlink_to("/dev/null")
        (self.out / "script").write_text(script)
        (self.out / "out").touch()
        words = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "-D", self.root]
        words += ["--private-network", f"--bind={self.out}:/box", "--console=read-only"]
        words += ["--property=DevicePolicy=auto", "--bind=/dev/loop-control"]
        words += [f"--bind={loop}" for loop in Path("/dev").glob("loop[0-9]*")]
        words += ["-b", "systemd.unit=test.target", "systemd.log_level=warning", "quiet"]
        done = subprocess.run(
            [str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=180, check=False,
        )  # fmt: skip
        if not (self.out / "status").exists():
            pytest.skip(f"no systemd here: {done.stderr or done.stdout}")
        return (self.out / "out").read_text()

    def close(self) -> None:
        for path in (self.root, self.memory):
            subprocess.run(["umount", "-l", path], check=False)
        shutil.rmtree(self.top, ignore_errors=True)


@pytest.fixture
def box():
    one = Box()
    yield one
    one.close()


@pytest.mark.slow
def test_the_unit_runs_under_systemd_itself(box):
    need_tool("mkfs.xfs")
    subprocess.run([sys.executable, ROOT / "tools/build.py", box.out / "backy"], check=True)
    (box.out / "vm1.img").write_bytes(noise(1_000_000))
    with open(box.out / "disk", "wb") as disk:
        disk.truncate(600 << 20)
    command("mkfs.xfs", "-q", "-m", "reflink=1", box.out / "disk")
    (box.out / "conf").write_text(CONFIG.format(base="/srv/backy", image="/srv/vm1.img"))
    unit = UNIT.read_text().replace("WatchdogSec=3min", "WatchdogSec=2").replace("30s", "1s")
    (box.out / "unit").write_text(unit)
    out = box.run(INSIDE.format(disk="/box/disk", image="/box/vm1.img", program="/box/backy",
                                config="/box/conf", unit="/box/unit"))  # fmt: skip
    print(out)
    assert "Type=notify" in out
    assert out.count("ActiveState=active") == 2
    assert re.search(r"StatusText=1 job, \d running, next vm1", out)
    for words in ("the image is there", "extents are shared", "reloaded"):
        assert words in out
    assert re.search("StatusText=.*configuration refused: .*backy.conf", out)
    assert "the watchdog is content" in out
    assert "NRestarts=1" in out, "one that does not answer is started again"
    assert "the configuration is refused, the old one stays in force" in out
