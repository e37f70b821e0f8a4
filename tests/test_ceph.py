# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups of images of a real Ceph cluster, which the tests start."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time

import pytest
from ceph_cluster import Image
from conftest import PROGRAM, MiB, backy_process, command, noise, revisions, rot

import backy

pytestmark = pytest.mark.slow
NUMBERS = itertools.count(1)
SIZE = 24 * MiB + 12345


@pytest.fixture
def ceph(cluster, monkeypatch):
    monkeypatch.setenv("CEPH_CONF", str(cluster.conf))
    return cluster


@pytest.fixture
def image(ceph):
    """An image of some MiB with noise, holes and an odd tail."""
    one = Image(ceph, f"rbd/vm{next(NUMBERS)}", SIZE)
    one.write(
        (0, noise(5 * MiB, 1)), (9 * MiB + 500, noise(70_000, 2)), (SIZE - 345, noise(345, 3))
    )
    return one


@pytest.fixture
def job(xfs, image, run):
    result = run("-b", xfs / "job", "init", "ceph-rbd", image.name)
    assert result.status == 0, result
    return xfs / "job"


def backup(run, job, *words, status: int = 0):
    result = run("-b", job, "backup", "daily", *words)
    assert result.status == status, result
    return result


def assert_same(image: Image, job) -> backy.Revision:
    """The newest revision is its snapshot byte for byte, and no other snapshot of ours is left."""
    newest = revisions(job)[-1]
    assert newest.is_complete
    assert (job / newest.id).read_bytes() == image.export(f"backy-{newest.id}")
    assert [one for one in image.snapshots() if one.startswith("backy-")] == [f"backy-{newest.id}"]
    assert (job / "last").resolve().name == newest.id
    return newest


def stat_of(job, key: str):
    return json.loads(json.dumps(backy.resolve(revisions(job)[-1].stats[key])))


def test_a_full_backup_and_a_differential_one(run, image, job):
    result = backup(run, job)
    assert "performing full backup (no parent)" in result.err
    assert_same(image, job)
    before = (job / "last").read_bytes()
    image.write((100, b"x"), (6 * MiB, noise(9000, 4)), (SIZE - 5, b"tails"))
    result = backup(run, job)
    assert "performing differential backup" in result.err
    newest = assert_same(image, job)
    assert newest.trust is backy.Trust.TRUSTED and newest.bytes_written < 100_000
    assert stat_of(job, "verification") == "sample"
    assert (job / revisions(job)[0].id).read_bytes() == before
    assert run("-b", job, "verify").status == 0
    assert run("-b", job, "verify", "--source").out == f"{newest.id}: equal to its source\n"


def test_an_unchanged_image_costs_nothing(run, image, job):
    backup(run, job)
    backup(run, job)
    newest = assert_same(image, job)
    assert newest.bytes_written == 0 and stat_of(job, "bytes_read") < 100


@pytest.mark.parametrize("features", ["1", "61"])  # layering alone, and with a map of objects
def test_all_kinds_of_changes(run, ceph, xfs, features):
    image = Image(ceph, f"rbd/kinds{features}", 40 * MiB + 4096, "--image-feature", "layering")
    if features == "61":
        for feature in ("exclusive-lock", "object-map"):  # which brings fast-diff with it
            image.rbd("feature", "enable", image.name, feature)
    image.write((0, noise(30 * MiB, 1)))
    job = xfs / "job"
    assert run("-b", job, "init", "ceph", image.name).status == 0
    backup(run, job)
    steps = [
        lambda: image.write(*((at * 97_001, noise(100, at)) for at in range(300))),
        lambda: image.write((7 * MiB - 5000, noise(2 * MiB, 7))),
        lambda: image.discard(8 * MiB, 8 * MiB),
        lambda: image.discard(20 * MiB + 4096, 8192),
        lambda: image.write((12 * MiB, bytes(MiB))),
        lambda: image.resize(52 * MiB + 777),
        lambda: image.write((52 * MiB - 100, noise(877, 9))),
        lambda: image.resize(21 * MiB + 5),
        lambda: image.resize(33 * MiB + 70_000),
        lambda: image.resize(4096),
        lambda: image.resize(40 * MiB),
    ]
    for number, step in enumerate(steps):
        step()
        result = backup(run, job)
        assert "performing differential backup" in result.err, number
        assert_same(image, job)
    assert run("-b", job, "verify", "--all").status == 0


def test_what_was_discarded_arrives_as_a_hole(run, image, job):
    backup(run, job)
    image.discard(0, 4 * MiB)
    backup(run, job)
    newest = assert_same(image, job)
    with open(job / newest.id, "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) >= 4 * MiB


def test_a_full_backup_shares_what_is_unchanged(run, image, job):
    backup(run, job)
    image.write((3 * MiB, b"changed"))
    config = (job / "config").read_text().replace("{", "{full-always: yes, ")
    (job / "config").write_text(config)
    result = backup(run, job)
    assert "performing full backup (full-always)" in result.err
    newest = revisions(job)[-1]
    assert newest.bytes_written == 4096
    assert (job / newest.id).read_bytes() == image.export()
    assert image.snapshots() == []


def test_a_snapshot_that_was_deleted_makes_the_next_one_full(run, image, job):
    backup(run, job)
    (name,) = image.snapshots()
    image.rbd("snap", "rm", f"{image.name}@{name}")
    result = backup(run, job)
    assert "performing full backup (no good revision has a snapshot)" in result.err
    assert_same(image, job)


def test_it_walks_back_to_the_newest_good_revision_with_a_snapshot(run, image, job):
    """The newest is distrusted and its predecessor has kept its snapshot, which was protected."""
    backup(run, job)
    (first,) = image.snapshots()
    image.rbd("snap", "protect", f"{image.name}@{first}")
    image.write((MiB, b"second"))
    result = backup(run, job)
    assert "warning" in result.err and "protected" in result.err
    assert sorted(image.snapshots()) == sorted([first, f"backy-{revisions(job)[-1].id}"])
    assert run("-b", job, "distrust", "-r", "0").status == 0
    image.write((2 * MiB, b"third"))
    result = backup(run, job)
    assert "performing differential backup" in result.err
    assert revisions(job)[-1].parent == revisions(job)[0].id
    image.rbd("snap", "unprotect", f"{image.name}@{first}")
    backup(run, job)
    assert_same(image, job)


def test_a_distrusted_parent_makes_the_next_one_full(run, image, job):
    backup(run, job)
    assert run("-b", job, "distrust", "-r", "0").status == 0
    result = backup(run, job)
    assert "performing full backup (the parent is distrusted)" in result.err
    assert_same(image, job)


def test_snapshots_of_others_are_left_alone(run, image, job, xfs):
    for name in ("by-hand", "backy-of-another-server"):
        image.rbd("snap", "create", "--no-progress", f"{image.name}@{name}")
    other = xfs / "other"
    run("-b", other, "init", "ceph-rbd", image.name)
    for _ in range(2):
        backup(run, job)
        backup(run, other)
    wanted = {"by-hand", "backy-of-another-server"}
    wanted |= {f"backy-{revisions(one)[-1].id}" for one in (job, other)}
    assert set(image.snapshots()) == wanted


def test_the_image_may_get_another_name(run, image, job):
    backup(run, job)
    new = f"{image.name}-new"
    image.rbd("rename", image.name, new)
    result = backup(run, job, status=1)
    assert "No such file or directory" in result.err and result.err.count("\n") == 1
    config = (job / "config").read_text()
    (job / "config").chmod(0o600)
    (job / "config").write_text(config.replace(image.name[4:], new[4:]))
    image.name = new
    image.write((0, b"renamed"))
    result = backup(run, job)
    assert "performing differential backup" in result.err
    assert_same(image, job)


def test_an_image_in_a_namespace(run, ceph, xfs):
    ceph.run("rbd", "namespace", "create", "rbd/ns1")
    image = Image(ceph, "rbd/ns1/vm", 8 * MiB)
    image.write((0, noise(5 * MiB, 1)))
    job = xfs / "job"
    assert run("-b", job, "init", "ceph-rbd", "rbd/ns1/vm").status == 0
    backup(run, job)
    image.write((5, b"x"))
    assert "differential" in backup(run, job).err
    assert_same(image, job)
    assert stat_of(job, "bytes_verified") > 4 * MiB


def test_a_clone_has_what_its_parent_has(run, ceph, xfs):
    parent = Image(ceph, "rbd/template", 16 * MiB)
    parent.write((0, noise(16 * MiB, 1)))
    parent.rbd("snap", "create", "--no-progress", "rbd/template@base")
    parent.rbd("snap", "protect", "rbd/template@base")
    parent.rbd("clone", "rbd/template@base", "rbd/child")
    image = Image.__new__(Image)
    image.cluster, image.name, image.size = ceph, "rbd/child", 16 * MiB
    job = xfs / "job"
    run("-b", job, "init", "ceph-rbd", "rbd/child")
    image.write((5 * MiB, b"of the child"))
    backup(run, job)
    image.write((9 * MiB, b"of the child"))
    result = backup(run, job)
    assert "differential" in result.err and "warning" not in result.err
    assert_same(image, job)
    assert stat_of(job, "verification") == "sample"


def test_an_image_that_is_not_there_leaves_nothing(run, ceph, xfs):
    for name in ("rbd/none", "nopool/none", "rbd/nons/none"):
        job = xfs / name.replace("/", "-")
        assert run("-b", job, "init", "ceph-rbd", name).status == 0
        result = backup(run, job, status=1)
        assert result.err.count("\n") == 1 and "exit status 2" in result.err
        assert not list(job.glob("*.rev"))


def test_an_image_that_was_deleted_keeps_its_revisions(run, image, job):
    backup(run, job)
    image.rbd("snap", "purge", "--no-progress", image.name)
    image.rbd("rm", "--no-progress", image.name)
    assert "No such file or directory" in backup(run, job, status=1).err
    assert len(revisions(job)) == 1 and run("-b", job, "verify").status == 0


# -- what can go wrong ----------------------------------------------------------


def stray_wrapper(path, text: str):
    """A program to stand for rbd: `text` sees the words, and runs the real one as it likes."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def set_timeout(job, seconds: int) -> None:
    config = (job / "config").read_text().replace("{", f"{{timeout: {seconds}, ")
    (job / "config").chmod(0o600)
    (job / "config").write_text(config)


def test_a_cluster_that_stops_answering_before_the_backup_ends_it(run, ceph, image, job):
    backup(run, job)
    set_timeout(job, 2)
    ceph.freeze()
    try:
        started = time.monotonic()
        result = backup(run, job, status=1)
        assert time.monotonic() - started < 30
        assert "rbd info" in result.err and len(revisions(job)) == 1
    finally:
        ceph.thaw()
    backup(run, job)
    assert_same(image, job)


@pytest.mark.parametrize("verb", ["export", "export-diff"])
def test_a_cluster_that_stops_in_the_middle_of_reading(
    run, ceph, image, job, tmp_path, monkeypatch, verb
):
    """The stream is cut off from the cluster after a while; then the cluster comes back."""
    image.resize(200 * MiB)
    if verb == "export-diff":
        backup(run, job)
    image.write((0, noise(190 * MiB, 77)))
    set_timeout(job, 2)
    pid = ceph.daemons["osd"].pid
    script = f'if [ "$1" = {verb} ]; then rbd "$@" | (head -c 6000000; kill -STOP {pid}; cat); '
    script += 'exit ${PIPESTATUS[0]}; fi; exec rbd "$@"'
    monkeypatch.setenv("BACKY_RBD", str(stray_wrapper(tmp_path / "rbd", script)))
    try:
        started = time.monotonic()
        result = backup(run, job, status=1)
        assert time.monotonic() - started < 40, result
    finally:
        ceph.thaw()
    assert "Traceback" not in result.err
    monkeypatch.delenv("BACKY_RBD")
    assert all(one.is_complete for one in revisions(job))
    backup(run, job)
    assert_same(image, job)


@pytest.mark.parametrize("verb", ["export", "export-diff"])
@pytest.mark.parametrize("how", ["kill -9 $$", "exit 5", "exit 0"])
def test_a_stream_that_ends_too_soon(run, image, job, tmp_path, monkeypatch, verb, how):
    if verb == "export-diff":
        backup(run, job)
        image.write((0, noise(2 * MiB, 78)))
    script = f'if [ "$1" = {verb} ]; then rbd "$@" | head -c 1000000; {how}; fi; exec rbd "$@"'
    monkeypatch.setenv("BACKY_RBD", str(stray_wrapper(tmp_path / "rbd", script)))
    result = backup(run, job, status=1)
    assert "Traceback" not in result.err
    monkeypatch.delenv("BACKY_RBD")
    assert len(revisions(job)) == (verb == "export-diff")
    assert len(image.snapshots()) == len(revisions(job))
    backup(run, job)
    assert_same(image, job)


def test_a_whole_stream_of_a_program_that_fails_does_not_count(
    run, image, job, tmp_path, monkeypatch
):
    backup(run, job)
    script = '[ "$1" = export-diff ] || exec rbd "$@"; rbd "$@"; echo rbd: it broke >&2; exit 22'
    monkeypatch.setenv("BACKY_RBD", str(stray_wrapper(tmp_path / "rbd", script)))
    assert "rbd: it broke (exit status 22)" in backup(run, job, status=1).err
    assert len(revisions(job)) == 1


def test_a_change_that_the_diff_does_not_name_is_found_by_the_sample(
    run, image, job, tmp_path, monkeypatch
):
    """A diff without its records: each part of 4 MiB has changed, so any sample finds it."""
    backup(run, job)
    image.write(*((at * MiB, b"changed") for at in range(0, 24)), (SIZE - 10, b"changed"))
    empty = tmp_path / "empty.py"
    empty.write_text(
        "import struct, sys\n"
        "def name(tag, text): return tag + struct.pack('<I', len(text)) + text.encode()\n"
        "newer, older = sys.argv[2].split('@')[1], sys.argv[4]\n"
        f"head = b'rbd diff v1\\n' + name(b'f', older) + name(b't', newer)\n"
        f"sys.stdout.buffer.write(head + b's' + struct.pack('<Q', {SIZE}) + b'e')\n"
    )
    script = f'[ "$1" = export-diff ] || exec rbd "$@"; exec {sys.executable} {empty} "$@"'
    monkeypatch.setenv("BACKY_RBD", str(stray_wrapper(tmp_path / "rbd", script)))
    result = backup(run, job, status=1)
    assert "the source has other bytes than the image" in result.err
    assert revisions(job)[0].trust is backy.Trust.DISTRUSTED and len(revisions(job)) == 1
    result = backup(run, job)
    assert "performing full backup (the parent is distrusted)" in result.err
    assert_same(image, job)


def test_without_rados_the_sample_comes_from_an_export(run, image, job, tmp_path, monkeypatch):
    backup(run, job)
    image.write((5, b"x"))
    (tmp_path / "bin").mkdir()
    for tool in ("rbd",):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    backup(run, job)
    assert stat_of(job, "verification") == "sample" and stat_of(job, "bytes_verified") > 4 * MiB
    monkeypatch.undo()
    os.environ["CEPH_CONF"] = str(image.cluster.conf)


def test_rot_in_a_block_of_which_a_part_has_changed_gets_no_digest(run, image, job):
    backup(run, job)
    (first,) = revisions(job)
    rot(job / first.id, MiB + 9000)
    image.write((MiB + 100, b"the same block of 64 KiB"))
    result = backup(run, job, status=1)
    assert "the previous image is damaged at offset 1048576" in result.err
    assert revisions(job)[0].trust is backy.Trust.DISTRUSTED
    result = backup(run, job)
    assert "full backup" in result.err
    assert_same(image, job)
    assert run("-b", job, "verify", "--all").status == 0  # the older one was healed


def test_rot_at_an_edge_that_moves_is_found(run, image, job):
    backup(run, job)
    rot(job / revisions(job)[0].id, SIZE - 20)
    image.resize(SIZE + 100_000)
    assert "the parent is damaged" in backup(run, job, status=1).err
    backup(run, job)
    assert_same(image, job)


PHASES = ["info", "snap create", "snap ls", "export", "export-diff", "rados", "snap rm"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_in_every_phase(run, ceph, image, job, tmp_path, phase, when):
    """The backup is killed when it calls rbd for something, or when that has just ended."""
    if phase != "export":
        backup(run, job)
        image.write((3 * MiB, noise(MiB, 5)), (SIZE - 9, b"tail"))
    name = "rados" if phase == "rados" else "rbd"
    real = shutil.which(name)
    kill = f"touch {tmp_path}/killed; kill -9 $PPID; sleep 0.2"
    words = '"$1"' if " " not in phase else '"$1 $2"'
    test = "true" if phase == "rados" else f"[ {words} = {phase!r} ]"
    action = f"{kill}; exit 1" if when == "before" else f'{real} "$@"; {kill}; exit'
    (tmp_path / "bin").mkdir()
    stray_wrapper(tmp_path / "bin" / name, f'if {test}; then {action}; fi; exec {real} "$@"')
    env = {**ceph.env, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    before = [one for one in revisions(job) if one.is_complete]
    done = backy_process("-b", job, "backup", "daily", env=env)
    assert (tmp_path / "killed").exists(), done.stderr
    assert done.returncode == -9
    for one in before:
        assert one in revisions(job) or phase == "snap rm"
    image.write((7 * MiB, b"after"))
    backup(run, job)
    assert_same(image, job)
    assert run("-b", job, "verify", "--all").status == 0


def test_an_interrupted_backup_removes_its_snapshot_at_once(run, ceph, image, job, tmp_path):
    backup(run, job)
    kept = image.snapshots()
    real = shutil.which("rbd")
    (tmp_path / "bin").mkdir()
    script = f'[ "$1" = export-diff ] && {{ kill -TERM $PPID; sleep 5; }}; exec {real} "$@"'
    stray_wrapper(tmp_path / "bin/rbd", script)
    env = {**ceph.env, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = backy_process("-b", job, "backup", "daily", env=env)
    assert done.returncode == 128 + 15, done.stderr
    assert image.snapshots() == kept and len(revisions(job)) == 1


def test_it_costs_what_has_changed(run, ceph, xfs, tmp_path, monkeypatch):
    """1 % of 1 GiB: no more than 1.5 times the diff is read from the cluster, and written."""
    size = 1024 * MiB
    image = Image(ceph, "rbd/big", size)
    image.write(*((at * 16 * MiB, noise(MiB, at)) for at in range(64)))
    job = xfs / "job"
    run("-b", job, "init", "ceph-rbd", image.name)
    backup(run, job)
    image.write(*((at * 64 * MiB + 4096, noise(640 * 1024, 100 + at)) for at in range(16)))
    counted = tmp_path / "counted"
    for name in ("rbd", "rados"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        real = shutil.which(name)
        stray_wrapper(
            tmp_path / "bin" / name,
            f'{real} "$@" | tee >(wc -c >> {counted}); exit ${{PIPESTATUS[0]}}',
        )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    backup(run, job)
    newest = assert_same(image, job)
    time.sleep(0.5)
    diff = 10 * MiB
    assert sum(map(int, counted.read_text().split())) < 1.5 * diff
    assert newest.bytes_written <= 1.01 * diff


def test_memory_stays_small_for_records_of_any_length(ceph, xfs, run):
    image = Image(ceph, "rbd/long", 256 * MiB, "--object-size", "32M")
    job = xfs / "job"
    run("-b", job, "init", "ceph-rbd", image.name)
    backup(run, job)
    image.write((0, noise(96 * MiB, 1)))
    script = (
        "import sys; sys.argv[0] = 'backy'; import backy\n"
        "status = backy.main(sys.argv[1:])\n"
        "lines = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(status, lines['VmHWM'].split()[0])\n"
    )
    words = [sys.executable, "-c", script, "-b", str(job), "backup", "daily"]
    done = command(*words, env=ceph.env, cwd=PROGRAM.parent)
    status, peak = map(int, done.stdout.split())
    assert status == 0 and peak < 64 * 1024
    assert_same(image, job)


def test_a_large_image_with_a_map_of_objects_is_asked_for_whole_ones(run, ceph, xfs, monkeypatch):
    image = Image(ceph, "rbd/wide", 256 * MiB, "--object-size", "4K")
    image.write((0, noise(MiB, 1)))
    monkeypatch.setattr(backy, "MANY_OBJECTS", 1000)
    job = xfs / "job"
    run("-b", job, "init", "ceph-rbd", image.name)
    config = (job / "config").read_text().replace("{", "{sample-time: 1, ")
    (job / "config").write_text(config)
    backup(run, job)
    image.write((100 * MiB + 5, b"x"), (MiB - 2, b"yz"))
    result = backup(run, job, "-v")
    assert "export-diff rbd/wide@" in result.err and "--whole-object" in result.err
    assert_same(image, job)
    image.write((10 * MiB, noise(40 * MiB, 3)))
    result = backup(run, job, "-v")
    diff = next(line for line in result.err.splitlines() if "export-diff" in line)
    assert "--whole-object" not in diff
    assert_same(image, job)


def test_a_striped_image_is_read_as_a_whole(run, ceph, xfs):
    options = ("--stripe-unit", "65536", "--stripe-count", "4")
    image = Image(ceph, "rbd/striped", 20 * MiB, *options)
    image.write((0, noise(9 * MiB, 1)))
    job = xfs / "job"
    run("-b", job, "init", "ceph-rbd", image.name)
    backup(run, job)
    image.write((70_000, b"x"))
    assert "full backup (the image is striped)" in backup(run, job).err
    assert_same(image, job)


def test_the_scheduler_may_back_it_up(run, ceph, image, xfs, tmp_path):
    """The child's environment has what rbd needs; consul_acl_token is for its eyes only."""
    pool, name = image.name.split("/")
    conf = tmp_path / "backy.conf"
    conf.write_text(
        f"global: {{base-dir: {xfs}}}\n"
        "schedules: {s: {daily: {interval: 1d, keep: 1}}}\n"
        f"jobs: {{vm: {{schedule: s, source: {{type: ceph, pool: {pool}, image: {name}}}}}}}\n"
    )
    job = backy.load_settings(str(conf)).jobs["vm"]
    (xfs / "vm").mkdir()
    (xfs / "vm/config").write_bytes(backy.job_config(job))
    backup(run, xfs / "vm")
    assert_same(image, xfs / "vm")


def test_a_snapshot_of_flying_circus_is_made_on_request_or_is_a_plain_one(
    run, ceph, image, xfs, monkeypatch
):
    from test_flyingcircus import Server

    server, job = Server(), xfs / "job"
    monkeypatch.setenv("CONSUL_HTTP_ADDR", server.address)
    for name in ("pause", "every"):
        monkeypatch.setattr(backy.FlyingCircusSource, name, 0.1)
    made = []

    def obey(key, value):
        request = json.loads(value)
        made.append(request["snapshot"])
        image.rbd("snap", "create", "--no-progress", f"{image.name}@{request['snapshot']}")

    server.on_put = obey
    assert run("-b", job, "init", "flyingcircus", f"{image.name},vm1,secret").status == 0
    for number in range(2):
        image.write((number, b"x"))
        assert "warning" not in backup(run, job).err
        newest = assert_same(image, job)
        assert made[-1] == f"backy-{newest.id}" and server.store == {}
    server.misbehave = lambda handler: not handler.answer(500)
    assert "a plain snapshot, without the guest" in backup(run, job).err
    assert_same(image, job)
    server.shutdown()
    server.server_close()


def test_an_image_of_no_bytes(run, image, job):
    image.resize(0)
    for size in (0, 0, 9 * MiB + 1, 0, 4096):
        image.resize(size)
        backup(run, job)
        assert_same(image, job)


def test_an_image_whose_objects_are_in_another_pool(run, ceph, xfs):
    ceph.run("ceph", "osd", "pool", "create", "data", "8")
    ceph.run("rbd", "pool", "init", "data")
    image = Image(ceph, "rbd/split", 12 * MiB, "--data-pool", "data")
    image.write((0, noise(9 * MiB, 1)))
    job = xfs / "job"
    run("-b", job, "init", "ceph-rbd", image.name)
    backup(run, job)
    image.write((5 * MiB, b"x"))
    result = backup(run, job, "-v")
    assert "rados --pool=data" in result.err and "cannot be read by its objects" not in result.err
    assert_same(image, job)
    assert stat_of(job, "verification") == "sample"
