# SPDX-License-Identifier: GPL-3.0-or-later
"""Options: tables of keys, mappings read by them, and what is said of mistakes."""

from __future__ import annotations

from datetime import timedelta

import pytest

import backy

TABLE = (
    backy.Option("name", backy.TEXT, None, "needed"),
    backy.Option("count", backy.number(1, 9), "3", "a number"),
    backy.Option("often", backy.TIME_SPAN, "1d", "a time"),
    backy.Option("loud", backy.BOOLEAN, "no", "a switch"),
    backy.Option("mode", backy.choice("fast", "slow"), "fast", "a choice"),
    backy.Option("places", backy.LIST, "a, b", "a list"),
    backy.Option("free", backy.SPACE, "5%", "a space"),
    backy.Option("inside", backy.SECTION, "", "a mapping"),
    backy.Option("api_token", backy.number(1, 9), "", "a secret number"),
)


def read(text, strict=True):
    """The values in `text` and all remarks."""
    document = backy.Document("file", text, [], strict)
    values = document.section(backy.parse_yaml(text), TABLE, "here")
    return {name: value.value for name, value in values.items()}, document.remarks


def complaints(text, strict=True):
    return [remark.first_line for remark in read(text, strict)[1]]


def test_defaults_hold_for_what_is_not_there():
    values, remarks = read("name: x\n")
    assert not remarks
    assert values == {
        "name": "x",
        "count": 3,
        "often": timedelta(days=1),
        "loud": False,
        "mode": "fast",
        "places": ("a", "b"),
        "free": backy.Space(share=0.05),
    }


@pytest.mark.parametrize("nothing", ["", "~", "null"])
def test_a_key_without_value_is_a_key_that_is_not_there(nothing):
    assert read(f"name: x\ncount: {nothing}\n")[0]["count"] == 3
    assert complaints(f"name: {nothing}\n") == ["file:1:1: here has no name"]


def test_a_quoted_null_is_text():
    assert read("name: 'null'\n")[0]["name"] == "null"


@pytest.mark.parametrize("name", ["on", "0123", "12:30", "1e3", "null x", "2015-11-05", "1_000"])
def test_text_is_text_whatever_it_looks_like(name):
    assert read(f"name: {name}\n")[0]["name"] == name


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("count: 9", "count", 9),
        ("count: '9'", "count", 9),
        ("often: 60", "often", timedelta(seconds=60)),
        ("often: '60'", "often", timedelta(seconds=60)),
        ("often: 90s", "often", timedelta(seconds=90)),
        ("often: 2m", "often", timedelta(minutes=2)),
        ("often: 3h", "often", timedelta(hours=3)),
        ("often: 2w", "often", timedelta(weeks=2)),
        ("often: 10000d", "often", timedelta(days=10000)),
        ("loud: yes", "loud", True),
        ("loud: true", "loud", True),
        ('loud: "on"', "loud", True),
        ("loud: Off", "loud", False),
        ("places: x", "places", ("x",)),
        ("places: 'x , y,'", "places", ("x", "y")),
        ('places: [x, "y, z"]', "places", ("x", "y, z")),
        ("places: []", "places", ()),
        ("free: 7.5%", "free", backy.Space(share=0.075)),
        ("free: 50G", "free", backy.Space(size=50 << 30)),
        ("free: 3TiB", "free", backy.Space(size=3 << 40)),
        ("free: 0", "free", backy.Space()),
    ],
)
def test_values_have_the_type_of_the_table(line, key, value):
    values, remarks = read(f"name: x\n{line}\n")
    assert not remarks
    assert values[key] == value


COUNT = "here: count is a number from 1 to 9, not"
OFTEN = "here: often is a number with s, m, h, d or w, from 1s to 10000d, not"


@pytest.mark.parametrize(
    ("line", "place", "complaint"),
    [
        ("count: 0", "2:8", f"{COUNT} '0'"),
        ("count: 10", "2:8", f"{COUNT} '10'"),
        ("count: -1", "2:8", f"{COUNT} '-1'"),
        ("count: 03", "2:8", f"{COUNT} '03'"),
        ("count: 0x3", "2:8", f"{COUNT} '0x3'"),
        ("count: 3.0", "2:8", f"{COUNT} '3.0'"),
        ("count: '3 '", "2:8", f"{COUNT} '3 '"),
        ("count: ''", "2:8", f"{COUNT} ''"),
        ("count: \u0663", "2:8", f"{COUNT} '\u0663'"),
        ("count: \xb2", "2:8", f"{COUNT} '\xb2'"),
        ("count: " + "9" * 99, "2:8", f"{COUNT} '{'9' * 60}'"),
        ("count: [3]", "2:8", f"{COUNT} a list"),
        ("count: {a: 3}", "2:8", f"{COUNT} a mapping"),
        ("often: 0", "2:8", f"{OFTEN} '0'"),
        ("often: 0d", "2:8", f"{OFTEN} '0d'"),
        ("often: -1d", "2:8", f"{OFTEN} '-1d'"),
        ("often: 1.5h", "2:8", f"{OFTEN} '1.5h'"),
        ("often: 1h30m", "2:8", f"{OFTEN} '1h30m'"),
        ("often: 1 d", "2:8", f"{OFTEN} '1 d'"),
        ("often: 1D", "2:8", f"{OFTEN} '1D'"),
        ("often: 060", "2:8", f"{OFTEN} '060'"),
        ("often: 10001d", "2:8", f"{OFTEN} '10001d'"),
        ("often: 999999999w", "2:8", f"{OFTEN} '999999999w'"),
        ("loud: maybe", "2:7", "here: loud is yes or no, not 'maybe'"),
        ("mode: Fast", "2:7", "here: mode is fast or slow, not 'Fast'"),
        (
            "free: 101%",
            "2:7",
            "here: free is a share such as 10% or a size such as 50G, not '101%'",
        ),
        (
            "places: {a: b}",
            "2:9",
            "here: places is a list, or text with commas, not a mapping",
        ),
        ("cuont: 3", "2:1", "here: unknown key 'cuont' (count?)"),
        ("zzz: 3", "2:1", "here: unknown key 'zzz'"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(line, place, complaint):
    assert complaints(f"name: x\n{line}\n") == [f"file:{place}: {complaint}"]


def test_the_entry_of_a_list_that_is_wrong_is_named():
    assert complaints("name: x\nplaces: [a, [b]]\n") == [
        "file:2:13: here: places is a list, or text with commas, not a list"
    ]


def test_all_mistakes_are_found_in_one_run():
    assert len(complaints("count: 0\noften: 0\nloud: 0\nzzz: 0\n")) == 5  # and there is no name


def test_what_is_no_mapping_is_said_once():
    assert complaints("x\n") == ["file:1:1: here is a mapping, not 'x'"]


def test_unknown_keys_are_warnings_where_only_what_is_needed_must_be_right():
    assert complaints("name: x\ncuont: 3\n", strict=False) == [
        "file:2:1: warning: here: unknown key 'cuont' (count?)"
    ]


def shown(text):
    return str(read(text)[1][0]).split("\n")


@pytest.mark.parametrize(
    ("line", "marks"),
    [
        ("count: none", "       ^^^^"),
        ("count: 'no''ne' # x", "       ^^^^^^^^"),
        ('count: "a\\"b"', "       ^^^^^^"),
        ("count: a b   # c", "       ^^^"),
        ("count: [1, 2]", "       ^"),
        ("count: a\n  b", "       ^"),
        ("count: |\n  b", "       ^"),
        ("'\u65e5\u672c': x", "^^^^^^"),
        ("{\u65e5\u672c: x, count: y}", None),
    ],
)
def test_the_mark_is_below_the_value_and_as_long(line, marks):
    if marks is None:  # wide letters take two columns each
        text = "name: x\ninside: {}\n\u65e5\u672c: 1\n"
        assert str(read(text)[1][0]).split("\n")[1:3] == ["\u65e5\u672c: 1", "^^^^"]
        return
    lines = shown(f"name: x\n{line}\n")
    assert lines[1] == line.split("\n")[0]
    assert lines[2] == marks


def test_a_comma_at_the_end_is_explained():
    assert shown("name: x\nmode: fast,\n")[3:] == ["    the comma is part of the value here"]


def test_only_a_part_of_a_long_line_is_shown():
    text = "{name: " + "x" * 5000 + ", count: none, places: [" + "y, " * 2000 + "z]}"
    lines = shown(text)
    assert len(lines) == 3 and max(map(len, lines)) <= 120
    assert lines[1][len(lines[2]) - 4 :].startswith("none")


@pytest.mark.parametrize(
    "line",
    [
        "api_token: hunter2",
        "api_token: 'hunter2'",
        'api_token: "hun\\"ter2"',
        "'api_token' : hunter2",
    ],
)
def test_a_secret_is_never_shown(line):
    (remark,) = read(f"name: x\n{line}\n")[1]
    assert "ter2" not in str(remark)
    assert "here: api_token is a number from 1 to 9, not (secret)" in str(remark)
    (remark,) = read(f"{{name: x, cuont: 1, {line}}}\n".replace("api_token", "api_tokens"))[1][:1]
    assert "ter2" not in str(remark)


def test_nothing_that_a_terminal_obeys_is_shown():
    text = 'name: "\\e[2J"\ncount: "\\e[2J\\u202e"\n"\\e]0;x\\a": 1\n'
    for remark in read(text)[1]:
        assert backy.printable(str(remark).replace("\n", "")) == str(remark).replace("\n", "")


def test_a_message_has_an_end():
    for remark in read("name: x\n" + "k" * 100_000 + ": 1\n")[1]:
        assert len(str(remark)) < 1000


@pytest.mark.parametrize(
    ("span", "text"),
    [(1, "1s"), (60, "1m"), (90, "90s"), (86400, "1d"), (604800, "7d"), (5400, "90m")],
)
def test_times_are_written_as_they_are_read(span, text):
    assert backy.format_time_span(timedelta(seconds=span)) == text
    assert backy.parse_time_span(text) == timedelta(seconds=span)


@pytest.mark.parametrize("text", ["5%", "2.5%", "0", "50G", "1023", "3M", "7K", "2T", "100%"])
def test_space_is_written_as_it_is_read(text):
    assert str(backy.parse_space(text)) == text


@pytest.mark.parametrize(
    "text", ["", "%", "-1", "1.5G", "1e3", "5 %", "1P", "100.1%", "9" * 30, "\u0663%"]
)
def test_what_is_no_space_is_refused(text):
    with pytest.raises(ValueError):
        backy.parse_space(text)


def test_space_is_reckoned_in_bytes():
    assert backy.parse_space("10%").of(1000) == 100
    assert backy.parse_space("1K").of(1000) == 1024
    assert backy.parse_space("0").of(1000) == 0


def test_every_default_is_a_value_of_its_kind():
    tables = (backy.GLOBAL_OPTIONS, backy.INTERVAL_OPTIONS, backy.JOB_OPTIONS, backy.TOP_OPTIONS)
    sources = (one.options() for one in backy.Source.types().values())
    for option in (option for table in (*tables, *sources) for option in table):
        assert (option.meaning and backy.default_of(option) is not None) or not option.default
