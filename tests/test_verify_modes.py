# SPDX-License-Identifier: GPL-3.0-or-later
"""Which revisions and blocks a verification looks at: all, samples, the oldest, the source."""

from __future__ import annotations

import json
import re

import pytest
from conftest import MiB, noise, revisions, rot, write_image

import backy

SIZE = 12 * MiB + 777
BLOCKS = -(-SIZE // backy.BLOCK)


@pytest.fixture
def history(cow, tmp_path, run):
    """A job with three revisions, each with another MiB changed; and a function that adds one."""
    job, image = cow / "job", write_image(tmp_path / "image", (0, noise(SIZE, 1)), size=SIZE)
    assert run("-b", job, "init", "file", image).status == 0
    count = 0

    def add() -> backy.Revision:
        nonlocal count
        count += 1
        write_image(image, (count % 9 * MiB, noise(MiB, 100 + count)))
        assert run("-b", job, "backup", "x").status == 0
        return revisions(job)[-1]

    for _ in range(3):
        add()
    return job, add


def verify(run, job, *words, status=0):
    result = run("-b", job, "verify", "--json", *words)
    assert result.status == status, result
    return {entry["id"]: entry for entry in json.loads(result.out)["revisions"]}


def test_all_reads_what_is_shared_once(history, run):
    job, _ = history
    results = verify(run, job, "--all")
    assert [entry["result"] for entry in results.values()] == ["sound"] * 3
    read = sum(entry["bytes_read"] for entry in results.values())
    assert SIZE + 2 * MiB <= read <= SIZE + 3 * MiB


def test_all_does_not_overlook_what_only_one_revision_has(history, run):
    job, _ = history
    one, two, three = revisions(job)
    rot(job / two.id, 7 * MiB + 5)
    results = verify(run, job, "--all", status=1)
    assert results[two.id]["damaged"] == [{"offset": 7 * MiB, "length": backy.BLOCK}]
    assert not results[one.id]["damaged"] and not results[three.id]["damaged"]
    assert "healed" in results[two.id]["result"]
    assert verify(run, job, "--all")[two.id]["result"] == "sound"


def seen_blocks(monkeypatch) -> list[int]:
    """The offsets of the blocks that verifications ask for from now on."""
    seen: list[int] = []
    check = backy.CheckedImage.check

    def spy(self, offset, length, buffers):
        seen.extend((self.revision.id, at) for at in range(offset, offset + length, backy.BLOCK))
        check(self, offset, length, buffers)

    monkeypatch.setattr(backy.CheckedImage, "check", spy)
    return seen


@pytest.mark.parametrize(("share", "parts"), [("5%", 20), ("30", 4), ("100%", 1), ("7%", 15)])
def test_samples_cover_everything_in_exactly_so_many_runs(history, run, monkeypatch, share, parts):
    job, _ = history
    name = revisions(job)[-1].id
    seen = seen_blocks(monkeypatch)
    for number in range(parts):
        assert len({block for _, block in seen}) < BLOCKS
        result = verify(run, job, "--sample", share)[name]["result"]
        assert (result == "sound") == (number == parts - 1)
    blocks = [block for _, block in seen]
    if parts > 1:
        assert len(blocks) == len(set(blocks)) == BLOCKS
    assert revisions(job)[-1].trust is backy.Trust.VERIFIED


def test_each_sample_is_about_its_share(history, run):
    job, _ = history
    name = revisions(job)[-1].id
    for _ in range(20):
        read = verify(run, job, "--sample", "5%")[name]["bytes_read"]
        assert SIZE / 20 - 2 * backy.BLOCK <= read <= SIZE / 20 + 2 * backy.BLOCK


@pytest.mark.slow
def test_every_revision_is_covered_in_20_runs_while_others_come_and_go(history, run):
    """No revision needs more than 20 runs from its first, and none is called sound before."""
    job, add = history
    runs: dict[str, int] = {}
    done: dict[str, int] = {}
    for number in range(45):
        if number % 6 == 5:
            add()
        if number % 9 == 8:
            oldest = revisions(job)[0].id
            assert run("-b", job, "forget", "-r", oldest, "--force").status == 0
        results = verify(run, job, "--all", "--sample", "5%")
        for name, entry in results.items():
            runs[name] = runs.get(name, 0) + 1
            if entry["result"] == "sound":
                done.setdefault(name, runs[name])
    assert done and set(done.values()) == {20}
    assert all(name in done for name, count in runs.items() if count >= 20)


def test_damage_anywhere_is_found_within_20_samples(history, run):
    job, _ = history
    newest = revisions(job)[-1]
    rot(job / newest.id, SIZE - 1)
    status = [run("-b", job, "verify", "--sample", "5%").status for _ in range(20)]
    assert 1 in status


def test_a_sample_does_not_forget_what_was_damaged(history, run, monkeypatch):
    """Nobody has the block: it stays damaged, whatever later samples see."""
    job, _ = history
    newest = revisions(job)[-1]
    where = 3 * MiB + 5  # changed last, so no other revision has it
    rot(job / newest.id, where)
    for _ in range(45):
        run("-b", job, "verify", "--sample", "5%")
    known = revisions(job)[-1]
    assert known.trust is backy.Trust.DISTRUSTED
    assert known.damaged == ((where - where % backy.BLOCK, backy.BLOCK),)


class Countdown:
    """A deadline that comes after so many looks at the clock."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __lt__(self, now: float) -> bool:
        self.looks -= 1
        return self.looks < 0


def verify_a_while(job, looks: int) -> str:
    with backy.Repository.open(str(job)) as repository:
        verifier = backy.Verifier(repository, backy.Scope(deadline=Countdown(looks)))
        verifier.run(repository.complete[-1:])
    return verifier.results[0].text


def test_what_runs_out_of_time_goes_on_where_it_was(history, monkeypatch):
    job, _ = history
    with backy.Repository.open(str(job)) as repository:
        repository.change(repository.complete[-1], trust=backy.Trust.TRUSTED, verified=None)
    seen = seen_blocks(monkeypatch)
    texts = []
    while not texts or texts[-1] != "sound":
        assert revisions(job)[-1].trust is backy.Trust.TRUSTED
        texts.append(verify_a_while(job, 3))  # one look before it begins
        assert len(texts) < 20
    assert len(texts) > 2
    assert all("time is up" in text for text in texts[:-1])
    blocks = [block for _, block in seen]
    assert len(blocks) == len(set(blocks)) == BLOCKS
    done = revisions(job)[-1]
    assert done.trust is backy.Trust.VERIFIED
    assert (done.seen_to, done.image_state) == (0, "")  # nobody watched the image meanwhile


def test_what_another_run_has_seen_of_one_revision_says_nothing_of_another(history, monkeypatch):
    job, _ = history
    with backy.Repository.open(str(job)) as repository:
        first, second = repository.complete[-2:]
        repository.change(first, trust=backy.Trust.TRUSTED, seen_to=8 * MiB)
        repository.change(second, trust=backy.Trust.DISTRUSTED, by_hand=True)
    seen = seen_blocks(monkeypatch)
    with backy.Repository.open(str(job)) as repository:
        verifier = backy.Verifier(repository, backy.Scope(deadline=Countdown(1000)))
        verifier.run(repository.complete[-2:])
    assert (first.id, 0) not in seen
    assert (second.id, 0) in seen


def test_only_a_whole_run_ends_a_distrust(history):
    job, _ = history
    with backy.Repository.open(str(job)) as repository:
        repository.change(repository.complete[-1], trust=backy.Trust.DISTRUSTED, by_hand=True)
    verify_a_while(job, 3)
    assert revisions(job)[-1].seen_to == 0
    assert "sound" in verify_a_while(job, 1000)
    assert revisions(job)[-1].trust is backy.Trust.VERIFIED


def test_damage_makes_a_verification_begin_anew(history, monkeypatch):
    job, _ = history
    verify_a_while(job, 3)
    assert revisions(job)[-1].seen_to > 0
    with backy.Repository.open(str(job)) as repository:
        repository.change(repository.complete[-1], trust=backy.Trust.DISTRUSTED)
    assert revisions(job)[-1].seen_to == 0


@pytest.mark.parametrize("seen_to", [-1, SIZE, 10**30])
def test_a_place_that_is_not_in_the_image_hides_nothing(history, seen_to):
    job, _ = history
    newest = revisions(job)[-1]
    rot(job / newest.id, MiB)
    with backy.Repository.open(str(job)) as repository:
        repository.change(newest, seen_to=seen_to)
    assert "damaged" in verify_a_while(job, 1000)


def test_oldest_begins_with_what_was_verified_longest_ago(history, run):
    job, _ = history
    one, two, three = (revision.id for revision in revisions(job))
    verify(run, job, "-r", one)
    assert list(verify(run, job, "--oldest")) == [two, three, one]


def test_a_limit_of_time_ends_it_and_it_claims_no_more_than_it_saw(history, run, monkeypatch):
    job, _ = history
    before = {revision.id: revision for revision in revisions(job)}
    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(backy.time, "monotonic", lambda: next(now))
    results = verify(run, job, "--all", "--max-duration", "100s")
    texts = [entry["result"] for entry in results.values()]
    assert "not looked at, time is up" in texts
    for revision in revisions(job):
        if "time is up" in results[revision.id]["result"]:
            assert revision.verified == before[revision.id].verified


@pytest.mark.parametrize(
    "words",
    [
        ["--sample", "0"],
        ["--sample", "101%"],
        ["--sample", "x"],
        ["--max-duration", "0"],
        ["--max-duration", "soon"],
        ["--all", "-r", "0"],
        ["--source", "--all"],
        ["--source", "--json"],
    ],
)
def test_what_makes_no_sense_is_refused(history, run, words):
    assert run("-b", history[0], "verify", *words).status == 1


def test_source_compares_byte_by_byte(history, run, tmp_path):
    job, _ = history
    assert "equal to its source" in run("-b", job, "verify", "--source").out
    result = run("-b", job, "verify", "--source", "-r", "1")
    assert result.status == 1
    assert f"bytes {3 * MiB} to {4 * MiB - 1}" in result.out
    assert revisions(job)[-2].trust is backy.Trust.VERIFIED
    write_image(tmp_path / "image", size=SIZE + 1)
    result = run("-b", job, "verify", "--source")
    assert result.status == 1
    assert f"the source has {SIZE + 1} bytes" in result.err


def test_source_counts_all_differences_though_it_keeps_few(history, run, tmp_path, monkeypatch):
    job, _ = history
    monkeypatch.setattr(backy, "MOST_RANGES", 5)
    with open(tmp_path / "image", "r+b") as image:
        for page in range(0, 1000, 2):
            image.seek(page * 4096)
            image.write(b"something else")
    result = run("-b", job, "verify", "--source")
    assert result.status == 1
    assert f"differs from its source in {500 * 4096} bytes" in result.err
    lines = [line for line in result.out.splitlines() if "differs from the source" in line]
    assert [line.split(": ")[2] for line in lines[:3]] == [
        f"bytes {page * 4096} to {page * 4096 + 4095} (4096)" for page in (0, 2, 4)
    ]
    assert len(lines) <= 50


def test_source_tells_damage_from_change(history, run):
    job, _ = history
    rot(job / revisions(job)[-1].id, 100)
    result = run("-b", job, "verify", "--source")
    assert result.status == 1
    assert "is damaged" in result.err


def test_a_lost_image_is_no_success(history, run):
    job, _ = history
    (job / revisions(job)[0].id).unlink()
    results = verify(run, job, "--all", status=1)
    assert "No such file" in results[revisions(job)[0].id]["result"]


# -- distrust ------------------------------------------------------------------


def test_distrust_marks_one_some_or_all(history, run):
    job, _ = history

    def trust() -> list[str]:
        return [revision.trust.value for revision in revisions(job)]

    assert run("-b", job, "distrust", "-r", "1").status == 0
    assert trust() == ["verified", "distrusted", "verified"]
    assert run("-b", job, "distrust", "--from", "2001-01-01", "--until", "2001-12-31").status == 1
    assert run("-b", job, "distrust", "-r", "0", "--from", "2001-01-01").status == 1
    assert run("-b", job, "distrust", "--from", "nonsense").status == 1
    assert trust() == ["verified", "distrusted", "verified"]
    assert run("-b", job, "distrust", "--from", "2001-01-01").status == 0
    assert trust() == ["distrusted"] * 3
    assert "(distrusted)" in run("-b", job, "status").out
    verify(run, job, "--all")
    assert trust() == ["verified"] * 3
    assert run("-b", job, "distrust").status == 0
    assert trust() == ["distrusted"] * 3


def test_after_distrust_a_backup_compares_all_and_costs_no_more(history, run):
    job, _ = history
    assert run("-b", job, "distrust").status == 0
    result = run("-b", job, "backup", "x")
    assert result.status == 0
    assert "is distrusted, all is compared" in result.err
    assert revisions(job)[-1].bytes_written == 0
    assert revisions(job)[-1].trust is backy.Trust.VERIFIED


# -- what an image is written anew for -------------------------------------------


def test_an_image_in_too_many_pieces_is_written_anew_and_then_not_again(history, run):
    job, add = history
    config = job / "config"
    config.write_text(re.sub("}", ", rewrite-above: 2}", config.read_text()))
    for _ in range(6):
        newest = add()
    count = backy.resolve(newest.stats["extents_when_written"])
    assert count >= 1
    written = [revision.bytes_written for revision in revisions(job)]
    assert max(written[3:]) > 5 * MiB or backy.count_extents
    assert min(written[-3:]) <= MiB


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_limit_that_is_no_number_is_refused(history, run, value):
    config = history[0] / "config"
    config.write_text(re.sub("}", f", rewrite-above: {value}}}", config.read_text()))
    result = run("-b", history[0], "backup", "x")
    assert result.status == 1
    assert "rewrite-above" in result.err


def test_status_counts_extents_only_when_asked(history, run):
    job, _ = history
    assert "Extents" not in run("-b", job, "status").out
    assert "Extents" in run("-b", job, "-v", "status").out
    (entry, *_) = json.loads(run("-b", job, "status", "-v", "--json").out)["revisions"]
    assert entry["extents"] >= 1


# -- restore, what it reads ------------------------------------------------------


def test_what_was_verified_and_not_written_to_is_not_read_again(history, run, tmp_path):
    job, _ = history
    target = job.parent / "restored"
    result = run("-b", job, "restore", target)
    assert result.status == 0
    assert "not read again" in result.err
    assert target.read_bytes() == (tmp_path / "image").read_bytes()
    target.unlink()
    assert "extents shared and checked" in run("-b", job, "restore", "--check", target).err


def test_what_was_written_to_since_is_read_again(history, run):
    job, _ = history
    for revision in revisions(job):
        rot(job / revision.id, 11 * MiB)
    result = run("-b", job, "restore", job.parent / "restored")
    assert result.status == 1
    assert f"bytes {11 * MiB} to " in result.err
    assert revisions(job)[-1].trust is backy.Trust.DISTRUSTED


def test_a_damaged_block_is_taken_from_another_revision_on_the_way(history, run, tmp_path):
    job, _ = history
    rot(job / revisions(job)[-1].id, 11 * MiB)
    for target in (job.parent / "restored", tmp_path / "restored"):
        result = run("-b", job, "restore", target)
        assert result.status == 0, result
        assert "taken from another revision" in result.err
        assert target.read_bytes() == (tmp_path / "image").read_bytes()
