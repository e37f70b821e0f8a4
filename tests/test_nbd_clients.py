# SPDX-License-Identifier: GPL-3.0-or-later
"""Today's clients of network block devices, each for real, and a machine that boots."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import (
    PROGRAM,
    MiB,
    command,
    fresh_directory,
    need,
    need_root,
    need_tool,
    noise,
    revisions,
    write_image,
)
from nbd_client import serving
from test_nbd import certificates, changed_pages, images, make_store  # noqa: F401

# Debian's modules load in its own interpreter only
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def store(_file_systems):
    for directory in fresh_directory(_file_systems, "xfs"):
        yield make_store(directory)


@pytest.fixture(scope="module")
def served(store, tmp_path_factory):
    """A server of `store`: its addresses by Unix socket and by TCP."""
    path = tmp_path_factory.mktemp("nbd") / "s"
    with serving("-b", store, "nbd-server", "-U", path, "-p", 0) as server:
        server.wait_for("nbd://[::1]:")
        yield f"nbd+unix:///%s?socket={path}", f"nbd://127.0.0.1:{server.port}/%s"


def test_nbdinfo(store, served):
    need_tool("nbdinfo")
    ids = [one.id for one in reversed(revisions(store))]
    for address in served:
        listing = json.loads(command("nbdinfo", "--list", "--json", address % "").stdout)
        assert [one["export-name"] for one in listing["exports"]] == ids
        (one,) = json.loads(command("nbdinfo", "--json", address % "1").stdout)["exports"]
        assert (one["export-size"], one["is_read_only"]) == (3 * MiB + 12345, True)
        assert one["can_multi_conn"] and one["can_df"] and one["can_cache"]
        assert one["block_size_maximum"] == 32 * MiB
        assert one["contexts"][0] == "base:allocation"
        since = ("x-backy:changed-since=1", "qemu:dirty-bitmap:since-1")
        for context in ("base:allocation", *since):
            words = ("nbdinfo", f"--map={context}", "--json", address % "0")
            runs = json.loads(command(*words).stdout)
            assert sum(one["length"] for one in runs) == 3 * MiB + 12345
            assert {one["type"] for one in runs} == ({0, 3} if context[0] == "b" else {0, 1})


def test_nbdcopy(store, served, tmp_path):
    need_tool("nbdcopy")
    for address in served:
        for number, image in enumerate(images(store)):
            command("nbdcopy", address % number, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == image
            (tmp_path / "copy").unlink()
    words = ["/usr/bin/env", SYSTEM_PYTHON, PROGRAM, "-b", store, "nbd-server"]
    command("nbdcopy", "--", "[", *words, "]", tmp_path / "copy")  # by LISTEN_FDS
    assert (tmp_path / "copy").read_bytes() == images(store)[0]


@pytest.mark.slow
def test_nbdcopy_to_a_clone(store, tmp_path):
    need_tool("nbdcopy")
    before, new = images(store), write_image(tmp_path / "new", (5, noise(2 * MiB)), size=3 * MiB)
    words = ("-b", store, "nbd-server", "-U", tmp_path / "s", "--writable", "--shared")
    with serving(*words):
        address = f"nbd+unix:///?socket={tmp_path}/s"
        command("nbdcopy", new, address)
        command("nbdcopy", address, tmp_path / "back")
        back = (tmp_path / "back").read_bytes()
        assert back[: 3 * MiB] == new.read_bytes()
        assert back[3 * MiB :] == before[0][3 * MiB :]
    assert images(store) == before


def test_qemu_img(store, served, tmp_path):
    need_tool("qemu-img")
    image = store / "last"
    for address in served:
        uri = address % ""
        command("qemu-img", "convert", "-O", "raw", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes()[: 3 * MiB + 12345] == image.read_bytes()
        command("qemu-img", "compare", uri, "-f", "raw", "-F", "raw", image)
        info = json.loads(command("qemu-img", "info", "--output=json", uri).stdout)
        assert info["virtual-size"] == 3 * MiB + 12345 + -(3 * MiB + 12345) % 512
        runs = json.loads(command("qemu-img", "map", "--output=json", uri).stdout)
        assert {one["zero"] for one in runs} == {True, False}
        shown = command("qemu-io", "-r", "-f", "raw", "-c", "read -v 1048576 5", uri).stdout
        assert noise(5, 2).hex(" ") in shown
    options = {"driver": "nbd", "server.type": "unix", "export": "0"}
    options["server.path"] = served[0].partition("socket=")[2]
    options["x-dirty-bitmap"] = "qemu:dirty-bitmap:since-1"
    words = ",".join(f"{key}={value}" for key, value in options.items())
    runs = json.loads(command("qemu-img", "map", "--output=json", "--image-opts", words).stdout)
    found = {at for one in runs if not one["data"]  # what is dirty is shown as no data
             for at in range(one["start"], one["start"] + one["length"], 4096)}  # fmt: skip
    assert {at for at in found if at < 3 * MiB + 12345} == changed_pages(*images(store))


@pytest.mark.slow
def test_qemu_io_on_a_clone(store, tmp_path):
    need_tool("qemu-io")
    with serving("-b", store, "nbd-server", "-U", tmp_path / "s", "--writable"):
        steps = ["write -P 7 4096 100000", "read -P 7 4096 100000", "write -z 8192 4096",
                 "read -P 0 8192 4096", "discard 65536 65536", "write -f -P 9 0 512", "flush",
                 "write -z -u 131072 4096", "read -P 9 0 512"]  # fmt: skip
        words = [word for step in steps for word in ("-c", step)]
        done = command("qemu-io", "-f", "raw", *words, f"nbd+unix:///1?socket={tmp_path}/s")
        assert "failed" not in done.stdout


LIBNBD = r"""
import nbd, sys
uri, old = sys.argv[1:]
h = nbd.NBD()
context = "x-backy:changed-since=1"
h.add_meta_context(context)
h.add_meta_context("base:allocation")
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.can_meta_context(context)
size, changed, position = h.get_size(), [], 0
def extents(name, offset, entries, error):
    if name == context:
        global position
        for length, flags in zip(entries[::2], entries[1::2]):
            if flags & 1:
                changed.append((position, length))
            position += length
while position < size:
    h.block_status(size - position, position, extents)
read = 0
with open(old, "r+b") as file:
    file.truncate(size)
    for offset, length in changed:
        file.seek(offset)
        file.write(h.pread(length, offset))
        read += length
h.shutdown()
print(read)
"""


def test_a_script_brings_an_old_copy_up_to_date_by_what_changed(store, served, tmp_path):
    need(subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"]).returncode == 0, "no python3-libnbd")
    new, old = images(store)
    for address in served:
        (tmp_path / "copy").write_bytes(old)
        done = command(SYSTEM_PYTHON, "-c", LIBNBD, address % "0", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == new
        assert 0 < int(done.stdout) <= 4096 * len(changed_pages(new, old))


STRICT = r"""
import nbd, sys
uri, size = sys.argv[1], int(sys.argv[2])
def fails(call, *words):
    try:
        call(*words)
    except nbd.Error as e:
        return e.errno
    raise AssertionError((call, words))
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_opt_mode(True)
    h.set_full_info(True)
    h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    names = []
    h.opt_list(lambda name, description: names.append(name))
    assert len(names) == 2
    h.set_export_name("nosuch")
    assert fails(h.opt_info) == "ENOENT", fails(h.opt_info)
    fails(h.opt_go)
    h.set_export_name(names[1])
    if structured:
        seen = []
        h.opt_list_meta_context(seen.append)
        assert seen == ["base:allocation"], seen
    h.opt_info()
    assert h.get_size() == size and h.get_canonical_export_name() == names[1]
    assert h.get_export_description()
    h.opt_go()
    h.set_strict_mode(0)
    assert fails(h.pread, 10, size) == "EINVAL"
    assert fails(h.pwrite, b"x", 0) == "EPERM"
    assert fails(h.zero, 10, 0) == "EPERM" and fails(h.trim, 10, 0) == "EPERM"
    h.flush(), h.cache(100, 0), h.pread(100, 0), h.is_rotational()
    data = bytearray(size)
    if structured:
        def chunk(part, offset, status, error):
            data[offset:offset + len(part)] = part
        h.pread_structured(size, 0, chunk, 4)
        assert data == h.pread(size, 0)
    h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
h = nbd.NBD()
h.set_handshake_flags(0)
h.connect_uri(uri)
assert len(h.pread(100, 0)) == 100
h.shutdown()
"""


def test_libnbd_on_every_way_through_the_handshake(served):
    need(subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"]).returncode == 0, "no python3-libnbd")
    for address in served:
        command(SYSTEM_PYTHON, "-c", STRICT, address % "", 3 * MiB + 12345)


@pytest.mark.slow
@pytest.mark.root
def test_nbdfuse_and_a_mounted_partition(cow, run, tmp_path):
    need_root()
    for tool in ("nbdfuse", "sfdisk", "mkfs.ext4"):
        need_tool(tool)
    need(Path("/dev/fuse").exists(), "no /dev/fuse")
    disk, part = write_image(cow / "disk", size=32 * MiB), cow / "part"
    command("sfdisk", "-q", disk, input="label: gpt\n2048,40960\n")
    write_image(part, size=20 * MiB)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/hello").write_text("from inside\n")
    command("mkfs.ext4", "-q", "-d", tmp_path / "files", part)
    write_image(disk, (MiB, part.read_bytes()))
    assert run("-b", cow / "vm", "init", "file", disk).status == 0
    assert run("-b", cow / "vm", "backup", "daily").status == 0
    fuse, mounted = tmp_path / "fuse", tmp_path / "mnt"
    fuse.mkdir()
    mounted.mkdir()
    with serving("-b", cow / "vm", "nbd-server", "-U", tmp_path / "s"):
        words = ["nbdfuse", str(fuse / "p1"), f"nbd+unix:///0/p1?socket={tmp_path}/s"]
        process = subprocess.Popen(words)
        try:
            end = time.monotonic() + 10
            while not (fuse / "p1").exists() and time.monotonic() < end:
                time.sleep(0.02)
            command("mount", "-o", "loop,ro,noload", fuse / "p1", mounted)
            try:
                assert (mounted / "hello").read_text() == "from inside\n"
            finally:
                command("umount", mounted)
        finally:
            subprocess.run(["umount", str(fuse)], check=False)
            process.terminate()
            process.wait(20)


@pytest.mark.slow
def test_fio(served):
    need_tool("fio")
    for address in served:
        words = ["--ioengine=nbd", f"--uri={address % '0'}", "--rw=randread", "--bs=4k"]
        words += ["--iodepth=16", "--size=3m", "--output-format=json"]
        done = command("fio", "--name=x", *words)
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        assert (job["error"], job["read"]["total_ios"]) == (0, 768)


@pytest.mark.slow
def test_nbd_client_lists(served, store):
    need_tool("nbd-client")
    port = served[1].split(":")[2].split("/")[0]
    done = command("nbd-client", "-l", "127.0.0.1", port)
    for one in revisions(store):
        assert one.id in done.stdout


@pytest.mark.slow
def test_clients_by_tls(store, certificates, tmp_path):  # noqa: F811
    need_tool("nbdcopy")
    pki = tmp_path / "pki"
    pki.mkdir()
    for name, origin in (
        ("ca-cert", "ca-cert"), ("client-cert", "client-cert"), ("client-key", "client-key"),
    ):  # fmt: skip
        (pki / f"{name}.pem").write_bytes((certificates / f"{origin}.pem").read_bytes())
    tls = ("--tls-cert", certificates / "server-cert.pem", "--tls-key",
           certificates / "server-key.pem", "--tls-ca", certificates / "ca-cert.pem")  # fmt: skip
    with serving("-b", store, "nbd-server", "-H", "0.0.0.0", "-p", 0, *tls) as server:
        port = server.log.split("nbd://0.0.0.0:")[1].split()[0]
        address = f"nbds://localhost:{port}/1?tls-certificates={pki}"
        command("nbdcopy", address, tmp_path / "copy", timeout=60)
        assert (tmp_path / "copy").read_bytes() == images(store)[1]
        assert "TLS" in command("nbdinfo", address, timeout=60).stdout
        secret = f"tls-creds-x509,id=t,endpoint=client,dir={pki}"
        image = f"driver=nbd,host=localhost,port={port},tls-creds=t,export=1"
        words = ("qemu-img", "convert", "--object", secret, "--image-opts", image)
        command(*words, "-O", "raw", tmp_path / "copy2", timeout=60)
        assert (tmp_path / "copy2").read_bytes()[: 3 * MiB] == images(store)[1][: 3 * MiB]
        without = subprocess.run(["nbdinfo", f"nbd://localhost:{port}/1"], capture_output=True)
        assert without.returncode


# ==== A machine that boots ===================================================


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A directory with Debian's kernel for clouds: `vmlinuz`, and its modules."""
    for tool in ("qemu-system-x86_64", "apt-get", "dpkg-deb", "depmod", "busybox", "cpio"):
        need_tool(tool)
    top = Path(os.environ.get("BACKY_TEST_KERNEL") or tmp_path_factory.mktemp("kernel"))
    if not (top / "vmlinuz").exists():
        listing = command("apt-cache", "depends", "linux-image-cloud-amd64").stdout
        (name,) = re.findall(r"Depends: (linux-image-[0-9]\S+)", listing)[:1]
        done = subprocess.run(["apt-get", "-q", "download", name], cwd=top, capture_output=True)
        need(done.returncode == 0, "cannot get a kernel for the guest")
        (package,) = top.glob("*.deb")
        command("dpkg-deb", "-x", package, top / "tree")
        (top / "lib").mkdir()
        (top / "tree/lib/modules").rename(top / "lib/modules")
        command("depmod", "-b", top, next((top / "lib/modules").iterdir()).name)
        next((top / "tree/boot").glob("vmlinuz-*")).rename(top / "vmlinuz")
    return top


def copy_program(program: str, tree: Path) -> None:
    """Put a program into a tree, with the libraries that it needs."""
    path = shutil.which(program)
    libraries = re.findall(r"(/\S+) \(0x", command("ldd", path).stdout)
    for one in (path, *libraries):
        (tree / one[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(one, tree / one[1:])


def make_tree(tree: Path, init: str, programs: tuple = (), kernel: Path | None = None,
              modules: tuple = ()) -> Path:  # fmt: skip
    """What a guest has: busybox, its init, and modules, which `$insmod` loads."""
    for name in ("bin", "proc", "sys", "dev", "mnt", "modules"):
        (tree / name).mkdir(parents=True)
    for program in ("busybox", *programs):
        copy_program(program, tree)
    order = []
    for module in modules:
        version = next((kernel / "lib/modules").iterdir()).name
        words = ("modprobe", "-d", kernel, "-S", version, "--show-depends", module)
        for path in re.findall(r"insmod (\S+)", command(*words).stdout):
            shutil.copy(path, tree / "modules")
            order.append(f"/modules/{Path(path).name}")
    load = "".join(f"insmod {one}\n" for one in dict.fromkeys(order))
    mounts = "mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev\n"
    (tree / "init").write_text(
        f"#!{shutil.which('busybox')} sh\n"
        f"busybox=$(busybox --list 2>/dev/null)\nexport PATH=/bin:/usr/bin:/sbin:/usr/sbin\n"
        f"{shutil.which('busybox')} --install -s /bin\n{mounts}{load}{init}\n"
    )
    (tree / "init").chmod(0o755)
    return tree


def boot(kernel: Path, initrd: Path, *words: str, seconds: int = 240) -> str:
    """Run a guest until it powers itself off; what its console says."""
    packed = initrd.with_suffix(".cpio")
    command("sh", "-c", f"find . | cpio -o -H newc --quiet > {packed}", cwd=initrd)
    done = subprocess.run(
        [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "384", "-nodefaults"),
            *("-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernel / "vmlinuz"),
            *("-initrd", packed, "-append", "console=ttyS0 panic=-1 quiet mitigations=off", *words),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_linux_boots_from_a_clone_and_writes(kernel, xfs, run, tmp_path):
    """Its root file system is the export; what it wrote is in the clone that is kept."""
    root = make_tree(tmp_path / "root", "echo LIVES; echo written >/mark; sync; poweroff -f")
    disk = write_image(xfs / "disk", size=64 * MiB)
    command("mkfs.ext4", "-q", "-d", root, disk)
    assert run("-b", xfs / "vm", "init", "file", disk).status == 0
    assert run("-b", xfs / "vm", "backup", "daily").status == 0
    before = (xfs / "vm/last").read_bytes()
    start = "mount -t ext4 /dev/vda /mnt && exec switch_root /mnt /init; poweroff -f"
    modules = ("virtio_pci", "virtio_blk", "ext4")
    initrd = make_tree(tmp_path / "initrd", start, (), kernel, modules)
    words = ("-b", xfs / "vm", "nbd-server", "-U", tmp_path / "s", "--writable", "--keep", "run1")
    with serving(*words):
        drive = f"file=nbd+unix:///last?socket={tmp_path}/s,format=raw,if=virtio"
        console = boot(kernel, initrd, "-drive", drive)
    assert "LIVES" in console, console
    assert (xfs / "vm/last").read_bytes() == before
    assert "written" in command("debugfs", "-R", "cat /mark", xfs / "vm/run1").stdout
    assert "written" not in command("debugfs", "-R", "cat /mark", xfs / "vm/last").stdout


@pytest.mark.slow
def test_the_client_in_the_kernel_mounts_an_export(kernel, xfs, run, tmp_path):
    need_tool("nbd-client")
    files = tmp_path / "files"
    files.mkdir()
    (files / "hello").write_bytes(noise(3 * MiB, 5))
    disk = write_image(xfs / "disk", size=64 * MiB)
    command("mkfs.ext4", "-q", "-d", files, disk)
    assert run("-b", xfs / "vm", "init", "file", disk).status == 0
    assert run("-b", xfs / "vm", "backup", "daily").status == 0
    with serving("-b", xfs / "vm", "nbd-server", "-H", "127.0.0.1", "-p", 0) as server:
        client = f"nbd-client 10.0.2.2 {server.port} /dev/nbd0 -N last -C 2 -persist"
        steps = [
            "ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up", client, "sleep 1",
            "mount -t ext4 -o ro,noload /dev/nbd0 /mnt && md5sum /mnt/hello",
            "echo x | dd of=/dev/nbd0 conv=notrunc 2>&1", "umount /mnt", "md5sum /dev/nbd0",
            "nbd-client -d /dev/nbd0", "poweroff -f",
        ]  # fmt: skip
        modules = ("virtio_pci", "virtio_net", "nbd", "ext4")
        initrd = make_tree(tmp_path / "initrd", "\n".join(steps), ("nbd-client",), kernel, modules)
        console = boot(kernel, initrd, "-nic", "user,model=virtio-net-pci")
    for data in (noise(3 * MiB, 5), (xfs / "vm/last").read_bytes()):
        assert hashlib.md5(data).hexdigest() in console, console
    assert server.log.count("opened ") == 2
