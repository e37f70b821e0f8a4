# SPDX-License-Identifier: GPL-3.0-or-later
"""A Ceph cluster of one monitor and one OSD, in memory, on loopback, without systemd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

TOOLS = ("ceph-mon", "ceph-osd", "rbd", "rados", "ceph", "ceph-authtool", "monmaptool")
CONF = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}]
mon_initial_members = a
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
keyring = {top}/keyring
run_dir = {top}
admin_socket = {top}/$name.$pid.asok
log_file = {top}/$name.log
log_to_stderr = false
crash_dir = {top}/crash
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_data_avail_crit = 1
mon_data_avail_warn = 2
osd_crush_chooseleaf_type = 0
paxos_propose_interval = 0.05
paxos_min_wait = 0.05
osd_objectstore = memstore
memstore_device_bytes = 8589934592
osd_class_default_list = *
osd_class_load_list = *
rbd_default_features = 61
mon_data = {top}/mon
osd_data = {top}/osd
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Cluster:
    """Started when it is made, ended by close()."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.top = Path(tempfile.mkdtemp(prefix="backy-test-ceph-", dir=memory))
        self.daemons: dict[str, subprocess.Popen] = {}
        self.conf = self.top / "ceph.conf"
        self.env = {**os.environ, "CEPH_CONF": str(self.conf)}
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def run(self, *words: object) -> str:
        """Run a program against this cluster; its output."""
        words = ("timeout", "60", *map(str, words))
        options = {"stdin": subprocess.DEVNULL, "env": self.env, "text": True}
        done = subprocess.run(words, capture_output=True, check=False, **options)
        assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
        return done.stdout

    def start(self) -> None:
        fsid, port = str(uuid.uuid4()), free_port()
        self.conf.write_text(CONF.format(fsid=fsid, port=port, top=self.top))
        for name in ("mon", "osd", "crash"):
            (self.top / name).mkdir()
        keyring, monmap = self.top / "keyring", self.top / "monmap"
        self.run(
            "ceph-authtool", "-C", keyring, "-n", "mon.", "--gen-key", "--cap", "mon", "allow *"
        )
        place = f"[v2:127.0.0.1:{port}]"
        self.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", place, monmap)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self.launch("mon", "ceph-mon", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        self.run("ceph", "osd", "new", osd)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.launch("osd", "ceph-osd", "-f", "-i", "0")
        end = time.monotonic() + 60
        while "1 up" not in self.run("ceph", "osd", "stat"):
            assert time.monotonic() < end, "the OSD does not come up"
            time.sleep(0.1)
        self.run("ceph", "osd", "pool", "create", "rbd", "8")
        self.run("rbd", "pool", "init", "rbd")

    def launch(self, name: str, *words: str) -> None:
        with open(self.top / f"{name}.out", "wb") as output:
            self.daemons[name] = subprocess.Popen(
                words, env=self.env, stdout=output, stderr=output, start_new_session=True
            )

    def close(self) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait(30)
        shutil.rmtree(self.top, ignore_errors=True)

    def freeze(self) -> None:
        """Let the OSD answer nobody, as one that is gone does, but keep what it holds."""
        self.daemons["osd"].send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.daemons["osd"].send_signal(signal.SIGCONT)


class Image:
    """An RBD image, and its bytes as they should be."""

    def __init__(self, cluster: Cluster, name: str, size: int, *options: str) -> None:
        self.cluster, self.name, self.size = cluster, name, size
        cluster.run("rbd", "create", "--size", f"{size}B", *options, name)

    def rbd(self, *words: object) -> str:
        return self.cluster.run("rbd", *words)

    def write(self, *pieces: tuple[int, bytes]) -> None:
        records = b"".join(
            b"w" + at.to_bytes(8, "little") + len(data).to_bytes(8, "little") + data
            for at, data in sorted(pieces)
        )
        self.apply(records)

    def discard(self, offset: int, length: int) -> None:
        self.apply(b"z" + offset.to_bytes(8, "little") + length.to_bytes(8, "little"))

    def apply(self, records: bytes) -> None:
        head = b"rbd diff v1\ns" + self.size.to_bytes(8, "little")
        path = self.cluster.top / "diff"
        path.write_bytes(head + records + b"e")
        self.rbd("import-diff", "--no-progress", path, self.name)
        path.unlink()

    def resize(self, size: int) -> None:
        if size != self.size:
            self.rbd("resize", "--allow-shrink", "--no-progress", "--size", f"{size}B", self.name)
        self.size = size

    def snapshots(self) -> list[str]:
        listing = json.loads(self.rbd("snap", "ls", "--format=json", self.name))
        return [one["name"] for one in listing]

    def export(self, snapshot: str = "") -> bytes:
        name = f"{self.name}@{snapshot}" if snapshot else self.name
        path = self.cluster.top / "export"
        self.rbd("export", "--no-progress", name, path)
        data = path.read_bytes()
        path.unlink()
        return data
