# SPDX-License-Identifier: GPL-3.0-or-later
"""What repair must not do: forget damage, make sound bytes worse, overrule what others found."""

from __future__ import annotations

import errno
import json
import os
import shutil

import faults
import pytest
from conftest import MiB, command, need, noise, revisions, rot, write_image

import backy

BLOCK = backy.BLOCK


def two_revisions(job, image, run) -> list[backy.Revision]:
    assert run("-b", job, "init", "file", image).status == 0
    for _ in range(2):
        assert run("-b", job, "backup", "x").status == 0
    return revisions(job)


def test_more_ranges_than_are_written_down_are_widened_and_none_forgotten(
    xfs, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(backy, "MOST_RANGES", 3)
    image = write_image(tmp_path / "image", (0, noise(4 * MiB, 1)))
    _, two = two_revisions(xfs / "job", image, run)
    rot(xfs / "job" / two.id, *range(0, 4 * MiB, 2 * BLOCK))
    assert run("-b", xfs / "job", "verify").status == 1
    assert (xfs / "job" / two.id).read_bytes() == image.read_bytes()
    assert run("-b", xfs / "job", "verify").status == 0


def test_ranges_that_are_widened_hold_all_that_they_held():
    ranges = [(at * 10, 3) for at in range(10)]
    for most in range(1, 12):
        wide = backy.widen_ranges(ranges, most)
        assert len(wide) <= most
        for offset, length in ranges:
            assert any(a <= offset and offset + length <= a + b for a, b in wide)
    assert backy.widen_ranges([], 3) == []


def test_a_read_error_while_a_copy_is_made_leaves_the_old_image(ext4, tmp_path, run, monkeypatch):
    """Without reflinks an image is copied to be healed; no read error may turn into zeros."""
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = ext4 / "job"
    _, two = two_revisions(job, image, run)
    rot(job / two.id, 5)
    damaged = (job / two.id).read_bytes()
    real, failing = os.preadv, []

    def preadv(fd, buffers, offset, flags=0):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if copying and path.endswith(two.id) and offset <= 2 * MiB < offset + len(buffers[0]):
            failing.append(offset)
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset, flags)

    copying = []
    copy_image = backy.copy_image
    monkeypatch.setattr(backy, "copy_image", lambda *words: copying.append(1) or copy_image(*words))
    monkeypatch.setattr(backy.os, "preadv", preadv)
    assert run("-b", job, "verify").status == 1
    monkeypatch.undo()
    assert failing
    assert (job / two.id).read_bytes() == damaged
    assert revisions(job)[-1].trust is backy.Trust.DISTRUSTED
    assert run("-b", job, "verify").status == 1
    assert (job / two.id).read_bytes() == image.read_bytes()


def test_distrust_while_it_is_verified_is_not_undone(xfs, tmp_path, run, meanwhile):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, _ = two_revisions(job, image, run)

    def distrust():
        with backy.Repository.open(str(job)) as repository, repository.metadata_lock():
            repository.change(one, trust=backy.Trust.DISTRUSTED)

    happened = meanwhile(2, distrust)
    run("-b", job, "verify", "-r", one.id)
    assert happened
    assert revisions(job)[0].trust is backy.Trust.DISTRUSTED


def mark(job, name: str, **values) -> None:
    """Write into the metadata as another process would."""
    with backy.Repository.open(str(job)) as repository, repository.metadata_lock():
        repository.change(repository.find(name), **values)


def test_a_distrust_by_hand_is_not_undone_by_who_saw_only_damage(xfs, tmp_path, run, meanwhile):
    """It was distrusted before, for damage that is healed; now the operator says so too."""
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, _ = two_revisions(job, image, run)
    mark(job, one.id, trust=backy.Trust.DISTRUSTED, damaged=((0, BLOCK),))
    happened = meanwhile(2, lambda: mark(job, one.id, by_hand=True))
    run("-b", job, "verify", "-r", one.id)
    assert happened
    now = revisions(job)[0]
    assert (now.trust, now.by_hand) == (backy.Trust.DISTRUSTED, True)


def test_damage_that_is_marked_while_other_damage_is_healed_is_kept(
    xfs, tmp_path, run, monkeypatch
):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, two = two_revisions(job, image, run)
    rot(job / two.id, 5)
    real = backy.heal_clone

    def heal_clone(*words):
        healed = real(*words)
        other = (2 * MiB, BLOCK)
        mark(job, two.id, trust=backy.Trust.DISTRUSTED, damaged=((0, BLOCK), other))
        return healed

    monkeypatch.setattr(backy, "heal_clone", heal_clone)
    run("-b", job, "verify", "-r", two.id)
    monkeypatch.undo()
    now = revisions(job)[1]
    assert (now.trust, now.damaged) == (backy.Trust.DISTRUSTED, ((2 * MiB, BLOCK),))
    assert now.heal_tried == 0
    assert (job / two.id).read_bytes() == (job / one.id).read_bytes()


def test_damage_that_is_marked_while_it_is_looked_for_elsewhere_is_kept(
    xfs, tmp_path, run, monkeypatch
):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, two = two_revisions(job, image, run)
    for revision in (one, two):
        rot(job / revision.id, 5)
    real = backy.tell_damage

    def tell_damage(repository, revision, ranges):
        if revision.id == one.id:
            mark(job, one.id, trust=backy.Trust.DISTRUSTED, damaged=((2 * MiB, BLOCK),))
        real(repository, revision, ranges)

    monkeypatch.setattr(backy, "tell_damage", tell_damage)
    monkeypatch.setattr(backy, "heal", lambda *words: False)
    run("-b", job, "verify", "-r", two.id)
    assert revisions(job)[0].damaged == ((0, BLOCK), (2 * MiB, BLOCK))


def test_a_distrust_made_while_digests_are_made_anew_is_kept_and_so_is_damage(
    xfs, tmp_path, run, monkeypatch
):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, _ = two_revisions(job, image, run)
    (job / f"{one.id}.sums").unlink()
    known = {"trust": backy.Trust.DISTRUSTED, "damaged": ((MiB, BLOCK),), "by_hand": True}
    real = backy.rebuild_sums

    def rebuild_sums(*words):
        made = real(*words)
        mark(job, one.id, **known)
        return made

    monkeypatch.setattr(backy, "rebuild_sums", rebuild_sums)
    monkeypatch.setattr(backy, "heal", lambda *words: False)
    run("-b", job, "verify", "-r", one.id)
    now = revisions(job)[0]
    assert {key: getattr(now, key) for key in known} == known
    assert not now.sums_damaged


def test_damaged_digests_are_made_anew_whatever_else_was_marked_meanwhile(
    xfs, tmp_path, run, meanwhile
):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    _, two = two_revisions(job, image, run)
    kept = (job / f"{two.id}.sums").rename(xfs / "kept")
    happened = meanwhile(1, lambda: mark(job, two.id, trust=backy.Trust.TRUSTED))
    result = run("-b", job, "verify", "--all")
    assert happened
    assert "its digests were damaged; they are made anew" in result.out
    assert (job / f"{two.id}.sums").read_bytes() == kept.read_bytes()
    assert not revisions(job)[1].sums_damaged


def test_another_disk_with_the_same_number_is_not_gone_on_with(xfs, tmp_path, run, block_device):
    """A loop device that was attached anew to something else: same number, size and counters."""
    need(os.path.exists("/sys/block/loop0/diskseq"), "this kernel has no diskseq")
    number = 200 + os.getpid() % 800  # high, so that no other test takes it while it is free
    device = block_device(24 * MiB, "--read-only", device=f"/dev/loop{number}")
    (backing,) = tmp_path.glob("device-*")
    write_image(backing, (0, noise(24 * MiB, 1)))
    job = xfs / "job"
    assert run("-b", job, "init", "file", device).status == 0
    shutil.copytree(job, tmp_path / "fresh")
    trace = faults.run("-b", job, "backup", "x").trace
    shutil.rmtree(job)
    shutil.copytree(tmp_path / "fresh", job)
    writes = [call.number for call in trace if call.name == "pwrite"]
    faults.run("-b", job, "backup", "x", plan=faults.Plan(writes[len(writes) // 2], faults.kill))
    assert list(job.glob("*.part"))
    command("losetup", "--detach", device)
    other = write_image(tmp_path / "other", (0, noise(24 * MiB, 2)))
    command("losetup", "--read-only", device, other)
    result = run("-b", job, "backup", "x")
    assert result.status == 0, result
    assert "kept" not in result.err
    assert (job / "last").read_bytes() == other.read_bytes()


def test_what_nobody_has_any_more_is_said_to_be_lost(xfs, tmp_path, run):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    assert run("-b", job, "init", "file", image).status == 0
    assert run("-b", job, "backup", "x").status == 0
    rot(job / "last", MiB + 1)
    result = run("-b", job, "verify", "--json")
    assert result.status == 1
    (entry,) = json.loads(result.out)["revisions"]
    assert entry["trust"] == "distrusted"
    assert entry["damaged"] == [{"offset": MiB, "length": BLOCK}]


@pytest.mark.parametrize("size", [3 * MiB, 3 * MiB + 100])
def test_a_block_at_another_place_of_the_same_image_heals_too(xfs, tmp_path, run, size):
    block = noise(BLOCK, 9)
    image = write_image(
        tmp_path / "image", (0, noise(size, 1)), (0, block), (2 * MiB, block), size=size
    )
    job = xfs / "job"
    assert run("-b", job, "init", "file", image).status == 0
    assert run("-b", job, "backup", "x").status == 0
    rot(job / "last", 77)
    assert run("-b", job, "verify").status == 1
    assert (job / "last").read_bytes() == image.read_bytes()


def test_a_source_restored_from_rot_is_backed_up_as_it_is(xfs, tmp_path, run):
    """`dd if=last of=SOURCE` of a rotten image: the new revision is what the source is now."""
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, two = two_revisions(job, image, run)
    rot(job / two.id, MiB + 7)
    image.write_bytes((job / "last").read_bytes())
    assert run("-b", job, "backup", "x").status == 0
    now = image.read_bytes()
    newest = revisions(job)[-1]
    assert run("-b", job, "verify", "-r", newest.id).status == 0
    assert (job / newest.id).read_bytes() == now
    assert (job / one.id).read_bytes() != now


def test_healing_does_not_lift_what_the_operator_distrusts(xfs, tmp_path, run):
    image = write_image(tmp_path / "image", (0, noise(3 * MiB, 1)))
    job = xfs / "job"
    one, two = two_revisions(job, image, run)
    assert run("-b", job, "distrust", "-r", two.id).status == 0
    rot(job / two.id, 7)
    for _ in range(2):
        run("-b", job, "verify", "-r", two.id, "--sample", "50%")
    assert (job / two.id).read_bytes() == (job / one.id).read_bytes()
    assert revisions(job)[-1].trust is backy.Trust.DISTRUSTED
    assert run("-b", job, "verify", "-r", two.id).status == 0
    assert revisions(job)[-1].trust is backy.Trust.VERIFIED


def test_what_cannot_be_healed_is_not_tried_again_with_the_same_donors(xfs, tmp_path, run):
    image = write_image(tmp_path / "image", (0, noise(MiB, 1)))
    job = xfs / "job"
    two_revisions(job, image, run)
    for revision in revisions(job):
        rot(job / revision.id, 7)
    write_image(image, (0, noise(65536, 2)))
    assert run("-b", job, "verify", "--all").status == 1
    tried = revisions(job)[0].heal_tried
    assert tried == revisions(job)[1].clock
    assert run("-b", job, "backup", "x").status == 0
    assert revisions(job)[0].heal_tried == revisions(job)[-1].clock
    assert revisions(job)[0].damaged == ((0, BLOCK),)


def test_an_image_that_cannot_be_opened_is_no_parent_and_no_obstacle(
    xfs, tmp_path, run, monkeypatch
):
    image = write_image(tmp_path / "image", (0, noise(MiB, 1)))
    job = xfs / "job"
    one, two = two_revisions(job, image, run)
    real = os.open

    def refusing(path, flags, *rest, **more):
        if path == two.id:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(backy.os, "open", refusing)
    result = run("-b", job, "backup", "x")
    monkeypatch.undo()
    assert result.status == 0, result
    assert "Permission denied" in result.err
    assert revisions(job)[-1].parent == one.id
