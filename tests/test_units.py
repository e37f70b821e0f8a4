# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes, durations, times and tables, to text and back."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

import backy


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 Bytes"),
        (1, "1 Byte"),
        (2, "2 Bytes"),
        (1023, "1023 Bytes"),
        (1024, "1.00 kiB"),
        (2500, "2.44 kiB"),
        (192 << 10, "192.00 kiB"),
        ((1 << 20) - 1, "1024.00 kiB"),
        (1 << 20, "1.00 MiB"),
        (3 << 30, "3.00 GiB"),
        (1 << 40, "1.00 TiB"),
        (1 << 50, "1024.00 TiB"),
        (1 << 60, "1048576.00 TiB"),
    ],
)
def test_sizes_are_written_as_2_x_did(size, text):
    assert backy.format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (79, "1:19"), (3599, "59:59"), (3600, "1:00:00"),
     (7387, "2:03:07"), (360000, "100:00:00")],
)  # fmt: skip
def test_a_time_to_wait_is_written_like_a_clock(seconds, text):
    assert backy.format_clock(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("5", 5), ("10s", 10), ("25m", 1500), ("3h", 10800), ("2d", 172800), ("1w", 604800)],
)
def test_durations_are_read(text, seconds):
    assert backy.parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["", "s", "-1s", "1.5h", "1 h", "1y", "1hh", "٣s", "1s\n", "9999999999s", " 1s", "999999999w"],
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is no duration"):
        backy.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("2026-11-05", "2026-11-05 23:59:59.999999"),
        ("2026-11-05T10:15", "2026-11-05 10:15:59.999999"),
        ("2026-11-05 10:15:30", "2026-11-05 10:15:30.999999"),
        ("2026-11-05 10:15:30.5", "2026-11-05 10:15:30.500000"),
        ("2026-11-05 10:15:30.123456Z", "2026-11-05 10:15:30.123456"),
        ("2026-11-05 10:15:30 UTC", "2026-11-05 10:15:30.999999"),
        ("2026-11-05 10:15+02:00", "2026-11-05 08:15:59.999999"),
        ("2026-11-05 10:15-0230", "2026-11-05 12:45:59.999999"),
        ("2024-02-29", "2024-02-29 23:59:59.999999"),
    ],
)
def test_a_time_means_its_last_moment_in_utc(text, last):
    expected = datetime.strptime(last, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=timezone.utc)
    assert backy.parse_time(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "2026", "2026-11", "20261105", "2026-13-01", "2026-02-30", "2026-11-05T", "10:15"),
        *("2026-11-05T24:00", "2026-11-05 10:15 PM", "26-11-05", "2026-11-05\n", "\u0662026-11-05"),
        *("9999-12-31T23:59-23:59", "0001-01-01T00:00+23:59", "0000-01-01"),
    ],
)
def test_what_is_no_time_is_none(text):
    assert backy.parse_time(text) is None


def test_times_are_written_in_utc():
    moment = datetime(2026, 11, 5, 1, 2, 3, 4, timezone(timedelta(hours=2)))
    assert backy.format_time(moment) == "2026-11-04 23:02:03"
    assert backy.format_time_json(moment) == "2026-11-04T23:02:03.000004Z"
    assert backy.format_time_json(None) is None


def test_a_table_is_as_wide_as_its_widest_cell():
    assert backy.format_table(["A", "Size"], [["long one", "1"], ["b", "12345"]], ["Size"]) == (
        "+----------+-------+\n"
        "| A        |  Size |\n"
        "+----------+-------+\n"
        "| long one |     1 |\n"
        "| b        | 12345 |\n"
        "+----------+-------+\n"
    )


def test_a_misspelt_word_gets_a_suggestion_and_another_none():
    assert backy.suggestion("restoer", ["restore", "status"]) == " (restore?)"
    assert backy.suggestion("xyz", ["restore", "status"]) == ""
