# SPDX-License-Identifier: GPL-3.0-or-later
"""Bits that flip on the disk, below the file system: found, named, healed, nothing else touched."""

from __future__ import annotations

import json
import mmap
import os
import random

import pytest
from conftest import BOTH, MiB, noise, revisions, write_image

import backy

SIZE = 6 * MiB + 777
BLOCK = backy.BLOCK


def flip_on_disk(disk, needles: list[bytes]) -> None:
    """Flip a bit wherever one of these bytes stands on the disk; all that share it have it then."""
    with open(disk, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        for needle in needles:
            bit, at = 1 << random.randrange(8), view.find(needle)
            assert at >= 0
            while at >= 0:
                view[at + len(needle) // 2] ^= bit
                at = view.find(needle, at + 1)


class Rot:
    """A job with three revisions on a disk of its own, and what its images should be."""

    def __init__(self, file_system, tmp_path, run) -> None:
        self.file_system, self.run = file_system, run
        self.job, self.image = file_system.path / "job", tmp_path / "image"
        write_image(self.image, (0, noise(SIZE, 11)))
        assert run("-b", self.job, "init", "file", self.image).status == 0
        self.contents = {}
        for number in range(3):
            write_image(
                self.image,
                *(
                    (at + number * 4096, noise(4096, at + number))
                    for at in range(0, SIZE - MiB, MiB)
                ),
            )
            self.backup()

    def backup(self) -> None:
        result = self.run("-b", self.job, "backup", "x")
        assert result.status == 0, result
        newest = revisions(self.job)[-1]
        self.contents[newest.id] = self.image.read_bytes()

    def flip(self, needles: list[bytes]) -> None:
        self.file_system.unmount()
        flip_on_disk(self.file_system.disk, needles)
        self.file_system.mount()

    def check(self) -> None:
        """Everything is as it was made, and verified as such."""
        result = self.run("-b", self.job, "verify", "--all")
        assert result.status == 0, result
        for revision in revisions(self.job):
            assert (self.job / revision.id).read_bytes() == self.contents[revision.id]
            assert revision.trust is backy.Trust.VERIFIED
            assert not revision.damaged
        names = {name for name in os.listdir(self.job) if not name.startswith(".")} - {
            "config",
            "last",
            "last.rev",
        }
        assert names == {one + end for one in self.contents for end in ("", ".rev", ".sums")}


@pytest.fixture(params=BOTH)
def rot(request, new_file_system, tmp_path, run):
    random.seed(7)
    return Rot(new_file_system(request.param, 400 * MiB), tmp_path, run)


def image_places(rot: Rot, number: int) -> dict[str, dict[int, bytes]]:
    """For each revision its blocks with some of `number` random places, and the bytes there."""
    places: dict[str, dict[int, bytes]] = {name: {} for name in rot.contents}
    chosen = set()
    names = list(rot.contents)
    while len(chosen) < number:
        content = rot.contents[random.choice(names)]
        at = random.randrange(0, len(content) - 64)
        needle = content[at : at + 32]
        if at % 4096 > 4000 or at - at % BLOCK in chosen:
            continue
        if rot.image.read_bytes()[at : at + 32] != needle:
            continue  # nobody has it any more
        chosen.add(at - at % BLOCK)
        for name in names:
            if rot.contents[name][at : at + 32] == needle:
                places[name][at - at % BLOCK] = needle
    return places


@pytest.mark.slow
def test_flips_in_images_are_found_named_and_healed(rot):
    """Six times ten places; the blocks are those that verify prints, no more and no fewer."""
    for _ in range(6):
        places = image_places(rot, 10)
        rot.flip(sorted({needle for blocks in places.values() for needle in blocks.values()}))
        result = rot.run("-b", rot.job, "verify", "--all", "--json")
        assert result.status == 1, result
        for entry in json.loads(result.out)["revisions"]:
            named = {
                at
                for span in entry["damaged"]
                for at in range(span["offset"], span["offset"] + span["length"], BLOCK)
            }
            assert named == set(places[entry["id"]])
        rot.backup()
        rot.check()


@pytest.mark.slow
def test_flips_in_digests_are_found_and_healed(rot):
    for _ in range(15):
        content = random.choice(list(rot.contents.values()))
        at = random.randrange(len(content) // BLOCK) * BLOCK
        digest = backy.block_digest(memoryview(content)[at : at + BLOCK])
        rot.flip([digest])
        result = rot.run("-b", rot.job, "verify", "--all")
        assert result.status == 1, result
        assert "digests" in result.out
        rot.check()


@pytest.mark.slow
def test_flips_in_images_and_digests_at_once_are_healed_by_the_next_backup(rot):
    for _ in range(5):
        places = image_places(rot, 4)
        needles = {needle for blocks in places.values() for needle in blocks.values()}
        content = random.choice(list(rot.contents.values()))
        at = random.randrange(len(content) // BLOCK) * BLOCK
        needles.add(backy.block_digest(memoryview(content)[at : at + BLOCK]))
        rot.flip(sorted(needles))
        assert rot.run("-b", rot.job, "verify", "--all").status == 1
        rot.backup()
        rot.run("-b", rot.job, "verify", "--all")
        rot.check()


def test_a_revision_that_nobody_can_heal_stays_distrusted_and_restores_the_rest(rot, tmp_path):
    places = image_places(rot, 1)
    rot.flip(sorted({needle for blocks in places.values() for needle in blocks.values()}))
    assert rot.run("-b", rot.job, "verify", "--all").status == 1
    name, blocks = next((name, blocks) for name, blocks in places.items() if blocks)
    damaged = {one.id: one for one in revisions(rot.job)}[name]
    assert damaged.trust is backy.Trust.DISTRUSTED
    ((offset, length),) = damaged.damaged
    assert {offset} == set(blocks)
    target = tmp_path / "restored"
    assert rot.run("-b", rot.job, "restore", "-r", name, target).status == 1
    restored, content = target.read_bytes(), rot.contents[name]
    assert restored[:offset] == content[:offset]
    assert restored[offset + length :] == content[offset + length :]
