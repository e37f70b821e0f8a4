# SPDX-License-Identifier: GPL-3.0-or-later
"""What `{id}.rev` says, read and written; damaged ones are in test_old_directories.py."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

import backy

LEAST = b"uuid: abc\nparent: null\ntimestamp: 2026-11-22 04:28:09.998174+00:00\n"
MOMENT = datetime(2026, 11, 22, 4, 28, 9, 998174, timezone.utc)


def decode(text):
    return backy.decode_revision(LEAST + text, "abc")


def test_the_least_there_must_be():
    assert decode(b"") == backy.Revision(
        id="abc",
        timestamp=MOMENT,
        clock=1795321689998174,
        known=decode(b"").known,
    )


def test_every_key_is_written_and_read_again():
    revision = backy.Revision(
        id="abc",
        timestamp=MOMENT,
        clock=17,
        tags=("daily", "manual:x"),
        parent="123",
        duration=1.5,
        bytes_written=4096,
        trust=backy.Trust.DISTRUSTED,
        verified=MOMENT,
        protected=True,
        size=10**6,
        digest="ab" * 32,
        damaged=((0, 65536), (131072, 65536)),
    )
    text = backy.encode_revision(revision)
    again = backy.decode_revision(text, "abc")
    assert again == backy.replace(revision, known=again.known)
    assert backy.encode_revision(again) == text
    assert text.decode().splitlines() == [
        "clock: 17",
        "damaged: [0+65536, 131072+65536]",
        f"digest: sha256:{'ab' * 32}",
        "parent: '123'",
        "protected: true",
        "size: 1000000",
        "stats: {bytes_written: 4096, duration: 1.5}",
        "tags: [daily, 'manual:x']",
        "timestamp: 2026-11-22 04:28:09.998174+00:00",
        "trust: distrusted",
        "uuid: abc",
        "verified: 2026-11-22 04:28:09.998174+00:00",
    ]


def test_an_incomplete_one_has_no_duration():
    text = backy.encode_revision(decode(b"stats: {bytes_written: 0}\n"))
    assert b"duration" not in text
    assert not backy.decode_revision(text, "abc").is_complete


def test_only_a_complete_trusted_one_with_its_image_is_good():
    good = decode(b"stats: {duration: 1.0}\n")
    assert good.is_good
    assert not decode(b"").is_good
    assert not backy.replace(good, trust=backy.Trust.DISTRUSTED).is_good
    assert not backy.replace(good, problem="its image is gone").is_good


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (b"stats: {duration: 0.0}", "duration", 0.0),
        (b"stats: {duration: 3}", "duration", 3),
        (b"stats: {bytes_written: 7}", "bytes_written", 7),
        (b"tags: [b, a, b]", "tags", ("a", "b")),
        (b"tags: [on, 007, null, 2026-01-01]", "tags", ("007", "2026-01-01", "null", "on")),
        (b"tags: []", "tags", ()),
        (b"trust: verified", "trust", backy.Trust.VERIFIED),
        (b"protected: true", "protected", True),
        (b"protected: no", "protected", False),
        (b"damaged: [5+6, x, '7+8', 9]", "damaged", ((5, 6), (7, 8))),
        (b"damaged: 5", "damaged", ()),
        (b"verified: 2026-11-22", "verified", datetime(2026, 11, 22, tzinfo=timezone.utc)),
    ],
)
def test_values_are_read(text, key, value):
    assert getattr(decode(text + b"\n"), key) == value


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-22 04:28:09", datetime(2026, 11, 22, 4, 28, 9)),
        ("2026-11-22T04:28:09Z", datetime(2026, 11, 22, 4, 28, 9)),
        ("2026-11-22 06:28:09.5+02:00", datetime(2026, 11, 22, 4, 28, 9, 500000)),
        ("2026-11-22", datetime(2026, 11, 22)),
        ("'2026-11-22 04:28:09'", datetime(2026, 11, 22, 4, 28, 9, 999999)),
        ("1795321689.5", datetime(2026, 11, 22, 4, 28, 9, 500000)),
        ("1795321689", datetime(2026, 11, 22, 4, 28, 9)),
        ("0", datetime(1970, 1, 1)),
    ],
)
def test_a_time_may_be_written_in_many_ways(text, moment):
    data = f"uuid: abc\nparent: null\ntimestamp: {text}\n".encode()
    revision = backy.decode_revision(data, "abc")
    assert revision.timestamp == moment.replace(tzinfo=timezone.utc)


def test_no_more_ranges_are_written_than_anyone_would_read():
    many = tuple((number * 2, 1) for number in range(5000))
    text = backy.encode_revision(backy.replace(decode(b""), damaged=many))
    assert len(backy.decode_revision(text, "abc").damaged) == backy.MOST_RANGES


@pytest.mark.parametrize(
    ("ranges", "joined"),
    [
        ([], ()),
        ([(5, 5)], ((5, 5),)),
        ([(5, 5), (0, 5)], ((0, 10),)),
        ([(0, 5), (6, 5)], ((0, 5), (6, 5))),
        ([(0, 9), (3, 2)], ((0, 9),)),
        ([(0, 9), (3, 20)], ((0, 23),)),
        ([(4, 2), (4, 2), (6, 1)], ((4, 3),)),
    ],
)
def test_ranges_that_touch_are_joined(ranges, joined):
    assert backy.join_ranges(ranges) == joined


def test_a_revision_is_shown_with_its_time():
    assert str(decode(b"")) == "abc (2026-11-22 04:28:09 UTC)"
