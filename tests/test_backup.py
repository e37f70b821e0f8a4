# SPDX-License-Identifier: GPL-3.0-or-later
"""Backing up: what a revision holds, what it costs, and what is refused."""

from conftest import MiB, noise, revisions, shared_bytes, write_image


def test_a_revision_equals_its_source(job, source, run):
    result = run("-b", job, "backup", "daily")
    assert result.status == 0, result
    (revision,) = revisions(job)
    assert (job / revision.id).read_bytes() == source.read_bytes()
    assert (job / "last").read_bytes() == source.read_bytes()
    assert revision.tags == ("daily",)
    assert revision.is_complete


def test_a_second_revision_shares_what_did_not_change(job, source, run):
    assert run("-b", job, "backup", "daily").status == 0
    write_image(source, (MiB + 8192, noise(4096, 7)))
    assert run("-b", job, "backup", "daily").status == 0
    _, two = revisions(job)
    assert (job / two.id).read_bytes() == source.read_bytes()
    assert two.bytes_written == 4096
    assert shared_bytes(job / two.id) > MiB
