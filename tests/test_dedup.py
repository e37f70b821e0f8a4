# SPDX-License-Identifier: GPL-3.0-or-later
"""Equal blocks come to share one extent, across revisions and jobs; nothing else changes."""

from __future__ import annotations

import mmap
import os

import pytest
from conftest import MiB, command, noise, revisions, shared_bytes, write_image

import backy

SIZE = 10 * MiB + 999


@pytest.fixture
def jobs(cow, tmp_path, run):
    """Three jobs whose images were made from one, each with changes of its own."""
    made = []
    for number in range(3):
        image = write_image(tmp_path / f"image{number}", (0, noise(SIZE, 3)), size=SIZE)
        write_image(image, (number * MiB, noise(300000, number + 10)), (9 * MiB, bytes(MiB)))
        job = cow / f"job{number}"
        assert run("-b", job, "init", "file", image).status == 0
        assert run("-b", job, "backup", "x").status == 0
        made.append((job, image))
    return made


def dedup(run, jobs, *words):
    result = run("-b", jobs[0][0], "dedup", *words, *(job for job, _ in jobs[1:]))
    assert result.status == 0, result
    return result.out


def test_images_of_one_template_share_what_they_have_in_common(jobs, run):
    before = [shared_bytes(job / "last") for job, _ in jobs]
    assert before == [0, 0, 0]
    assert "3 images" in dedup(run, jobs)
    for job, image in jobs:
        assert shared_bytes(job / "last") > 7 * MiB
        assert (job / "last").read_bytes() == image.read_bytes()
        assert run("-b", job, "verify").status == 0


def test_a_second_run_finds_nothing_to_do(jobs, run):
    dedup(run, jobs)
    assert "0 Bytes are now shared" in dedup(run, jobs)


def test_a_dry_run_shares_nothing_and_says_how_much_there_is(jobs, run):
    promised = dedup(run, jobs, "-n").split(": ")[1]
    assert shared_bytes(jobs[0][0] / "last") == 0
    done = dedup(run, jobs).split(": ")[1]
    assert promised.split(" could")[0] == done.split(" are")[0]


def test_revisions_of_one_job_that_do_not_share_come_to_share(cow, tmp_path, run):
    image = write_image(tmp_path / "image", (0, noise(SIZE, 3)), size=SIZE)
    job = cow / "job"
    assert run("-b", job, "init", "file", image).status == 0
    assert run("-b", job, "backup", "x").status == 0
    content = image.read_bytes()
    write_image(image, (0, content[MiB : 2 * MiB]))  # the same bytes in two places
    assert run("-b", job, "backup", "x").status == 0
    out = run("-b", job, "dedup").out
    assert "1.00 MiB are now shared" in out
    assert (job / "last").read_bytes() == image.read_bytes()


def test_what_is_not_equal_any_more_is_left_alone(jobs, run):
    """The digests say so, the bytes do not: the kernel looks before it shares."""
    job, _ = jobs[1]
    (revision,) = revisions(job)
    with open(job / revision.id, "r+b") as file:
        file.seek(5 * MiB)
        file.write(b"rotten")
        os.fsync(file.fileno())
    damaged = (job / revision.id).read_bytes()
    result = run("-b", jobs[0][0], "dedup", *(job for job, _ in jobs[1:]))
    assert result.status == 1, result
    assert "damage was found in 1 places" in result.err
    assert f"job1: {revision.id} is damaged: bytes {5 * MiB} to {5 * MiB + 65535}" in result.err
    assert revisions(job)[0].damaged == ((5 * MiB, 65536),)
    assert shared_bytes(job / revision.id) > 7 * MiB, "one block must not cost its neighbours"
    assert (job / revision.id).read_bytes() == damaged
    for other, image in (jobs[0], jobs[2]):
        assert (other / "last").read_bytes() == image.read_bytes()


def test_a_kernel_that_stops_within_a_block_ends_nothing_and_damages_nothing(
    jobs, run, monkeypatch
):
    """It may share less than was asked for; then it is asked again from a block's start."""
    calls = []

    def dedupe_range(*words):
        calls.append(words)
        assert len(calls) < 1000
        return 4096 if len(calls) % 2 else 0

    monkeypatch.setattr(backy, "dedupe_range", dedupe_range)
    dedup(run, jobs[:2])
    assert all(words[1] % backy.BLOCK == words[4] % backy.BLOCK == 0 for words in calls)
    assert [one.damaged for job, _ in jobs for one in revisions(job)] == [(), (), ()]


@pytest.mark.parametrize("words", [[], ["-n"]])
def test_where_extents_cannot_be_shared_it_says_so(ext4, tmp_path, run, words):
    image = write_image(tmp_path / "image", (0, noise(MiB, 3) * 2), size=2 * MiB)
    assert run("-b", ext4 / "job", "init", "file", image).status == 0
    assert run("-b", ext4 / "job", "backup", "x").status == 0
    result = run("-b", ext4 / "job", "dedup", *words)
    assert result.status == 1
    assert "cannot share extents" in result.err


def test_more_images_than_may_be_open_are_no_matter(jobs, run, monkeypatch):
    monkeypatch.setattr(backy.Dedup, "FILES", 2)
    dedup(run, jobs)
    assert shared_bytes(jobs[2][0] / "last") > 7 * MiB


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_rots_on_the_disk_while_it_is_cached_is_not_shared(
    kind, new_file_system, tmp_path, run
):
    """Of two equal images one rots below the file system; the cache still knows the right bytes."""
    system = new_file_system(kind, 400 * MiB)
    image = write_image(tmp_path / "image", (0, noise(SIZE, 3)))
    jobs = [system.path / "one", system.path / "two"]
    for job in jobs:
        assert run("-b", job, "init", "file", image).status == 0
        assert run("-b", job, "backup", "x").status == 0
        assert (job / "last").read_bytes() == image.read_bytes()
    command("sync", "-f", system.path)
    needle = image.read_bytes()[3 * MiB + 100 : 3 * MiB + 164]
    with open(system.disk, "r+b") as disk, mmap.mmap(disk.fileno(), 0) as view:
        assert view.find(needle) >= 0
        view[view.find(needle)] ^= 1
    result = run("-b", jobs[0], "dedup", jobs[1])
    assert (result.status, "damage was found in 1 places" in result.err) == (1, True), result
    states = [run("-b", job, "verify").status for job in jobs]
    assert sorted(states) == [0, 1]
    assert shared_bytes(jobs[0] / "last") > 8 * MiB


@pytest.mark.parametrize("words", [[], ["-n"]])
def test_two_file_systems_share_nothing_and_it_says_so(xfs, new_file_system, tmp_path, run, words):
    image = write_image(tmp_path / "image", (0, noise(MiB, 3)))
    jobs = [xfs / "job", new_file_system("xfs", 300 * MiB).path / "job"]
    for job in jobs:
        assert run("-b", job, "init", "file", image).status == 0
        assert run("-b", job, "backup", "x").status == 0
    result = run("-b", jobs[0], "dedup", *words, jobs[1])
    assert (result.status, result.out) == (1, "")
    assert "cannot share extents: Invalid cross-device link" in result.err


def test_who_is_killed_leaves_no_image_that_passes_for_verified(jobs, run, monkeypatch):
    """Its extents are others from the first call on, and nobody has read them."""
    real = backy.dedupe_range
    states = {revision.id: revision.image_state for job, _ in jobs for revision in revisions(job)}
    assert all(states.values())

    def dedupe_range(*words):
        real(*words)
        moved.extend(one.id for job, _ in jobs for one in revisions(job) if not one.image_state)
        raise KeyboardInterrupt

    moved: list[str] = []
    monkeypatch.setattr(backy, "dedupe_range", dedupe_range)
    run("-b", jobs[0][0], "dedup", *(job for job, _ in jobs[1:]))
    assert len(moved) == 1
    shared = [job for job, _ in jobs if shared_bytes(job / "last")]
    assert moved[0] in [revisions(job)[0].id for job in shared]


@pytest.fixture
def histories(cow, tmp_path, run):
    """Two jobs of one template, each with three revisions that share most of their extents."""
    made = []
    for number in range(2):
        image = write_image(tmp_path / f"image{number}", (0, noise(SIZE, 3)), size=SIZE)
        job = cow / f"job{number}"
        assert run("-b", job, "init", "file", image).status == 0
        contents = []
        for at in range(3):
            write_image(image, ((at * 3 + 1) * MiB, noise(5000, 10 * number + at + 1)))
            assert run("-b", job, "backup", "x").status == 0
            contents.append(image.read_bytes())
        made.append((job, contents))
    command("sync", "-f", cow)
    return made


def physical(path) -> set[int]:
    """The places of the file on the disk, by pages."""
    with open(path, "rb") as file:
        found = backy.places(file.fileno(), 0, SIZE)
    return {at for _, first, length in found for at in range(first, first + length, 4096)}


def test_all_revisions_come_along_so_that_space_is_free(histories, run):
    def pages() -> int:
        return len(
            set().union(*(physical(job / one.id) for job, _ in histories for one in revisions(job)))
        )

    before = pages()
    out = run("-b", histories[0][0], "dedup", histories[1][0]).out
    assert "are now shared" in out
    assert before - pages() > 7 * MiB // 4096
    for job, contents in histories:
        assert [(job / one.id).read_bytes() for one in revisions(job)] == contents
        assert run("-b", job, "verify", "--all").status == 0
    assert "0 Bytes are now shared" in run("-b", histories[0][0], "dedup", histories[1][0]).out


def test_an_image_that_was_written_anew_gets_its_space_back_and_stays_in_one_piece(
    histories, run, monkeypatch
):
    job, contents = histories[0]
    monkeypatch.setattr(backy.Backup, "is_scattered", lambda *words: True)
    result = run("-b", job, "backup", "x")
    assert result.status == 0, result
    newest = revisions(job)[-1].id
    places = physical(job / newest)
    old = set().union(*(physical(job / one.id) for one in revisions(job)[:-1]))
    assert not places & old
    assert run("-b", job, "dedup").status == 0
    assert physical(job / newest) == places, "it is the old ones that move"
    now = set().union(*(physical(job / one.id) for one in revisions(job)[:-1]))
    assert len(now - places) < 2 * MiB // 4096
    assert [(job / one.id).read_bytes() for one in revisions(job)] == [*contents, contents[-1]]
