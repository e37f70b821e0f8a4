# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups of images of a real Ceph cluster, which the tests start."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from ceph_cluster import Image
from conftest import MiB, noise, revisions

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


@pytest.mark.parametrize(
    "words",
    [
        "",
        "rbd",
        "/x",
        "rbd/",
        "rbd/a/b/c",
        "-p/x",
        "rbd/-x",
        "rbd/a@b",
        "rbd/a b\n",
        "x\0/y",
    ],
)
def test_what_can_be_no_image_is_refused(tmp_path, run, words):
    result = run("-b", tmp_path / "job", "init", "--", "ceph-rbd", words)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "POOL/IMAGE or POOL/NAMESPACE/IMAGE" in result.err
