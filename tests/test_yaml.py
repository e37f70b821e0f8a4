"""YAML: our subset, text to nodes and values to text."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date, datetime, timedelta, timezone

import pytest
from conftest import noise

import backy

UTC = timezone.utc
DOCUMENTS = int(os.environ.get("BACKY_YAML_DOCUMENTS", "20000"))
MUTATIONS = int(os.environ.get("BACKY_YAML_MUTATIONS", "100000"))
# few in the fast tests, all in the slow ones, and never the same
SEEDS = [range(500), pytest.param(range(500, 500 + DOCUMENTS), marks=pytest.mark.slow)]
ROUNDS = [4000, pytest.param(MUTATIONS, marks=pytest.mark.slow)]
SOME_OR_ALL = ["some", "all"]


def texts(node):
    """A node as the plain lists, dicts and texts that it holds."""
    if isinstance(node, backy.Mapping):
        return {key: texts(value) for key, (_, value) in node.entries.items()}
    if isinstance(node, backy.Sequence):
        return [texts(entry) for entry in node.items]
    return node.text


def read(text):
    return texts(backy.parse_yaml(text))


def load(text):
    return backy.resolve(backy.parse_yaml(text))


# Samples, as old PyYAML wrote them

REVISION = """\
parent: qXYnPVpor2wxnfLwd33VDT
stats: {bytes_written: 196608, ceph-verification: partial, duration: 0.9258553981781006}
tags: [manual]
timestamp: 2026-11-22 04:28:09.998174+00:00
uuid: U5hyNzKWPiQXvih6TJAQF8
"""
REVISION_VALUE = {
    "parent": "qXYnPVpor2wxnfLwd33VDT",
    "stats": {
        "bytes_written": 196608,
        "ceph-verification": "partial",
        "duration": 0.9258553981781006,
    },
    "tags": ["manual"],
    "timestamp": datetime(2026, 11, 22, 4, 28, 9, 998174, UTC),
    "uuid": "U5hyNzKWPiQXvih6TJAQF8",
}
WRAPPED_REVISION = """\
parent: null
stats:
  bytes_written: 196608
  ceph-verification: partial
  chunk_stats: {write_full: 5, write_partial: 12}
  duration: 0.9258553981781006
tags: [daily, monthly, weekly, yearly, 'manual:before-the-upgrade', test of a long
    tag, x]
timestamp: 2026-11-22 04:28:09+00:00
uuid: U5hyNzKWPiQXvih6TJAQF8
"""
STATUS = """\
- {job: test01, last_duration: 0.0 s, last_tags: 'daily,weekly', last_time: '2026-11-22
    04:13:36 UTC', next_tags: daily, next_time: '2026-11-22 20:22:53 UTC', sla: OK,
  status: waiting}
- {job: test02, last_duration: '-', last_tags: '-', last_time: '-', next_tags: daily,
  next_time: '2026-11-22 20:22:53 UTC', sla: TOO OLD, status: 'running (slow)'}
"""
CONFIGURATION = """\
global: {base-dir: /srv/backy}
jobs:
  '0123':
    schedule: default
    source: &id001 {full-always: false, image: a, pool: rbd, type: ceph-rbd}
  "gr\\xFCn":
    note: plain words which a dumper folds at column eighty so that they go on upon the
      next line
    schedule: default
    source: *id001
  'on':
    schedule: default
    source:
      filename: /dev/vg/on
      type: file
schedules:
  default:
    daily: {interval: 1d, keep: 10}
"""
BY_HAND = """\
---
# written by hand
global:
    base-dir: /my/backydir   # a comment

schedules:
    default:                 # lists and maps in any mixture
        daily:
            interval: 1d
            keep: 9
    frequent: {daily: {interval: 1d, keep: 9},
               hourly: {interval: 1h, keep: 25},}   # a comma too many is fine
jobs:
    test01:
        source:
            type: file
            filename: "/my/virtual/disk.img"
        schedule: default
    notes:
    - one
    -   two
    - - three
      - four
    empty:
"""


def test_a_revision_file_of_old_is_read():
    assert load(REVISION) == REVISION_VALUE


def test_a_revision_file_is_written_as_of_old():
    assert backy.format_yaml(REVISION_VALUE) == REVISION


def test_a_revision_file_that_old_pyyaml_wrapped_is_read():
    value = load(WRAPPED_REVISION)
    assert value["parent"] is None
    assert value["stats"]["chunk_stats"] == {"write_full": 5, "write_partial": 12}
    assert value["tags"][-3:] == ["manual:before-the-upgrade", "test of a long tag", "x"]
    assert value["timestamp"] == datetime(2026, 11, 22, 4, 28, 9, tzinfo=UTC)


def test_a_status_file_with_folded_quotes_is_read():
    first, second = load(STATUS)
    assert first["last_time"] == "2026-11-22 04:13:36 UTC"
    assert first["last_tags"] == "daily,weekly"
    assert first["status"] == "waiting"
    assert second["last_time"] == "-"
    assert second["sla"] == "TOO OLD"


def test_a_configuration_that_a_program_dumped_is_read():
    jobs = read(CONFIGURATION)["jobs"]
    assert list(jobs) == ["0123", "gr\xfcn", "on"]
    assert jobs["gr\xfcn"]["note"].endswith("so that they go on upon the next line")
    assert jobs["gr\xfcn"]["source"] == jobs["0123"]["source"]


def test_an_alias_shares_the_node():
    jobs = backy.parse_yaml(CONFIGURATION).entries["jobs"][1].entries
    sources = [jobs[name][1].entries["source"][1] for name in ("0123", "gr\xfcn")]
    assert sources[0] is sources[1]


def test_a_configuration_written_by_hand_is_read():
    value = read(BY_HAND)
    assert value["global"] == {"base-dir": "/my/backydir"}
    assert value["schedules"]["frequent"]["hourly"] == {"interval": "1h", "keep": "25"}
    assert value["jobs"]["test01"]["source"]["filename"] == "/my/virtual/disk.img"
    assert value["jobs"]["notes"] == ["one", "two", ["three", "four"]]
    assert value["jobs"]["empty"] == ""


def test_a_json_document_is_read():
    value = {"a": 1, "b": [True, None, "x: y", {}], "c": {"d": 'q"\\/\n\U0001f600'}, "e": -1.5}
    for indent in (None, 2):
        for separators in ((",", ":"), (", ", ": ")):
            assert load(json.dumps(value, indent=indent, separators=separators)) == value


# Reading

READABLE = [
    ("", ""),
    ("# nothing\n", ""),
    ("---\n...\n", ""),
    ("\ufeffa: 1\r\nb: 2\r\n", {"a": "1", "b": "2"}),
    ("--- x\n", "x"),
    ("a:\n", {"a": ""}),
    ("a: ~\n", {"a": "~"}),
    ("a b : c d\n", {"a b": "c d"}),
    ("a: b:c http://x/#y\n", {"a": "b:c http://x/#y"}),
    ("a: -1\nb: ?x\nc: :x\n", {"a": "-1", "b": "?x", "c": ":x"}),
    ("a: b\n  c\n\n  d # e\n", {"a": "b c\nd"}),
    ("a:\n  b\n  c\n", {"a": "b c"}),
    ("a: 'it''s'\n", {"a": "it's"}),
    ("a: '  x  \n\n\n  y  '\n", {"a": "  x\n\ny  "}),
    ('a: "\\x41\\u00e4\\U0001F600\\t\\"\\\\\\/\\N\\_\\L\\P\\0\\e\\ "\n', None),
    ('a: "x \\\n   y\\\n\n   z"\n', {"a": "x y\nz"}),
    ("'a': 1\n\"b\" : 2\n", {"a": "1", "b": "2"}),
    ("a: |\n  x\n   y\n\n  z\n\nb: 1\n", {"a": "x\n y\n\nz\n", "b": "1"}),
    ("a: |-\n  x\n", {"a": "x"}),
    ("a: |+ # kept\n  x\n\nb: 1\n", {"a": "x\n\n", "b": "1"}),
    ("a: |2-\n    x\n  y\n", {"a": "  x\ny"}),
    ("a: >\n  x\n  y\n\n  z\n    w\n  v\n", {"a": "x y\nz\n  w\nv\n"}),
    ("- |\n x\n- >-\n y\n", ["x\n", "y"]),
    ("a:\n- 1\n-  2\nb: 3\n", {"a": ["1", "2"], "b": "3"}),
    ("- - a\n  - b\n-\n  - c\n- d: 1\n  e: 2\n", [["a", "b"], ["c"], {"d": "1", "e": "2"}]),
    ("- -\n- - -\n", [[""], [[""]]]),
    ("  a: 1\n  b:\n     c: 2\n", {"a": "1", "b": {"c": "2"}}),
    (
        "a: [b, 'c', \"d\", [e], {f: g}, -, -h,]\n",
        {"a": ["b", "c", "d", ["e"], {"f": "g"}, "-", "-h"]},
    ),
    ("a: {b: , c: [], d: {}, e: x\n y}\n", {"a": {"b": "", "c": [], "d": {}, "e": "x y"}}),
    ("{\"a\":1,'b' :2, c: http://x:1/y}\n", {"a": "1", "b": "2", "c": "http://x:1/y"}),
    ("a: [ # one\n  b, # two\n\n  c\n]\n", {"a": ["b", "c"]}),
    ("a: &x\n  b: 1\nc: *x\nd: [*x, &y z, *y]\n", None),
    ("a: &x\n- 1\nb: *x\n", {"a": ["1"], "b": ["1"]}),
    ("'<<': 1\n", {"<<": "1"}),
    ("[" * 64 + "]" * 64, None),
]


@pytest.mark.parametrize(("text", "value"), READABLE)
def test_the_subset_is_read(text, value):
    if value is not None:
        assert read(text) == value
    else:
        backy.parse_yaml(text)


def test_every_escape_is_read():
    text = r'"\x41\u00e4\U0001F600\ud83d\ude00\0\a\b\t\n\v\f\r\e\"\\\/\ \N\_\L\P"'
    value = 'A\xe4\U0001f600\U0001f600\0\a\b\t\n\v\f\r\x1b"\\/ \x85\xa0\u2028\u2029'
    assert read(text) == value


def test_names_that_yaml_takes_for_other_types_stay_text():
    names = ["on", "0123", "1e3", "12:30", "null", "2015-11-05", "1_000", "No"]
    assert list(read("".join(f"{name}: x\n" for name in names))) == names


def test_nodes_know_where_they_start():
    root = backy.parse_yaml("a: x\n'b':\n  - 1\n  - {c: \"d\",\n     e: }\nf: |\n  g\n")
    (a, x), (b, items), (f, g) = root.entries.values()
    assert (root.line, root.column) == (1, 1)
    assert (a, x) == (backy.Scalar("a", True, 1, 1), backy.Scalar("x", True, 1, 4))
    assert b == backy.Scalar("b", False, 2, 1)
    assert (items.line, items.column) == (3, 3)
    assert items.items[0] == backy.Scalar("1", True, 3, 5)
    flow = items.items[1]
    assert (flow.line, flow.column) == (4, 5)
    assert flow.entries["c"] == (backy.Scalar("c", True, 4, 6), backy.Scalar("d", False, 4, 9))
    assert flow.entries["e"] == (backy.Scalar("e", True, 5, 6), backy.Scalar("", True, 5, 8))
    assert (f, g) == (backy.Scalar("f", True, 6, 1), backy.Scalar("g\n", False, 6, 4))


# Refusing

CONTINUED = "': ' in the continuation of a plain value, check the indentation"
REFUSED = [
    ("\ta: 1", "1:1: tab in the indentation, use blanks"),
    ("a:\n  \tb: 1", "2:3: tab in the indentation, use blanks"),
    ("a:\t1", "1:3: tab between words, use blanks"),
    ("a: 1\nb: 2\n'a': 3", "3:1: duplicate key 'a', first on line 1"),
    ("{a: 1,\n a: 2}", "2:2: duplicate key 'a', first on line 1"),
    ("a: !x 1", "1:4: tags ('!') are not supported"),
    ("a: [!!str 1]", "1:5: tags ('!') are not supported"),
    ("a:\n  <<: {b: 1}", "2:3: merge keys ('<<') are not supported"),
    ("? a\n: b", "1:1: complex keys ('? ') are not supported"),
    ("{? a : b}", "1:2: complex keys ('? ') are not supported"),
    ("a: 1\n---\nb: 2", "2:1: several documents in one file are not supported"),
    ("a: 1\n...\nb: 2", "2:1: several documents in one file are not supported"),
    ("%YAML 1.1\n---\na: 1", "1:1: directives ('%') are not supported"),
    ("a: *b", "1:4: unknown alias '*b'"),
    ("a: &b [*b]", "1:8: unknown alias '*b'"),
    ("a: &b 1\nc: &b 2", "2:4: anchor '&b' was already given above"),
    ("a: &", "1:4: no name of letters, digits, '-' and '_' after '&'"),
    ("a: &b &c d", "1:6: an anchor must stand before a value, not before an anchor or alias"),
    ("a: @x", "1:4: a plain value cannot start with '@', quote it"),
    ("a: `x", "1:4: a plain value cannot start with '`', quote it"),
    ("a: %x", "1:4: a plain value cannot start with '%', quote it"),
    ("a: ,x", "1:4: a plain value cannot start with ',', quote it"),
    ("[|\n x]", "1:2: a plain value cannot start with '|', quote it"),
    ("a: - b", "1:4: a list must start on a line of its own"),
    ("[- a]", "1:2: unexpected '-', quote it if it is text"),
    (": a", "1:1: unexpected ':', quote it if it is text"),
    ("a: b: c", "1:5: ': ' inside a plain value, quote the value"),
    ("a: b:", "1:5: ': ' inside a plain value, quote the value"),
    ("a: b\n  c: d", f"2:4: {CONTINUED}"),
    ("a: {base-dir}/x", "1:13: no ':' after key 'base-dir', quote a value that holds brackets"),
    ("a: 1\nb", "2:2: no ':' after key 'b', quote a value that holds brackets"),
    ("a: [1]/x", "1:7: unexpected '/' after a value, quote all that belongs to it"),
    ("a: 'b' c", "1:8: unexpected 'c' after a value, quote all that belongs to it"),
    ("a: [1, 2", "1:4: '[' is never closed"),
    ("a: [1, {b: 2]", "1:13: expected ',' or '}' instead of ']'"),
    ("a: {b:", "1:4: '{' is never closed"),
    ("[&a", "1:4: the text ends where a value should be"),
    ("a: {b: 1\n", "1:4: '{' is never closed"),
    ("a: ]", "1:4: ']' closes nothing here"),
    ("[a,,b]", "1:4: nothing stands before this ','"),
    ("[a: b]", "1:3: a mapping inside [ ] needs { } around it"),
    ("[a]: b", "1:4: unexpected ':' after a value, quote all that belongs to it"),
    (
        "a: 1\n[b]: 2",
        "2:1: a key must be plain or quoted text, without anchor, alias or brackets",
    ),
    ("'a\n b': c", "1:1: a key must stand on one line"),
    ("a: 'b", "1:4: no closing ' for this one"),
    ('a: "b\nc: "d"', "2:5: unexpected 'd' after a value, quote all that belongs to it"),
    ('"\\q"', "1:2: unknown escape '\\q' in double quotes"),
    ('"it\\\'s"', "1:4: unknown escape '\\'' in double quotes"),
    ('"\\U00110000"', "1:2: unknown escape '\\U00110000' in double quotes"),
    ('"\\x1"', "1:2: incomplete escape in double quotes"),
    ('"\\ud83d"', "1:1: half of a surrogate pair in double quotes"),
    ("a: |x\n  y", "1:4: unexpected text after '|', quote the value"),
    ("a:\n    b: 1\n  c: 2", "3:3: the indentation fits no line above"),
    ("a: 'b'\n  c: 2", "2:3: the indentation fits no line above"),
    ("- [a]\n  - b", "2:3: the indentation fits no line above"),
    ("- a\nb: 1", "2:1: expected '- ' as on the lines above"),
    ("a: 1\n- b", "2:1: a list entry cannot stand among the keys of a mapping"),
    (
        "  a: 1\nb: 2",
        "2:1: text after the end of the document's value, check the indentation",
    ),
    ("- " * 65 + "a", "1:129: nested deeper than 64 levels"),
    ("[" * 100_000, "1:65: nested deeper than 64 levels"),
    ("a: \a", "1:4: control character U+0007, use an escape in double quotes"),
    ("a: 1\rb: 2", "1:5: control character U+000D, use an escape in double quotes"),
    ("a: '\ud800'", "1:5: control character U+D800, use an escape in double quotes"),
    ("a: x\ufeff", "1:5: control character U+FEFF, use an escape in double quotes"),
    ("#" * (1 << 20) + "#", "1:1: longer than 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_all_else_is_refused_in_one_sentence(text, message):
    with pytest.raises(backy.YAMLError) as caught:
        backy.parse_yaml(text)
    assert str(caught.value) == message
    error = caught.value
    assert f"{error.line}:{error.column}: {error.message}" == message


def test_a_bomb_of_aliases_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(backy.YAMLError, match="aliases stand for more than 200000 nodes"):
        backy.parse_yaml("\n".join(lines))


def test_a_tower_of_aliases_is_refused():
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100))]
    with pytest.raises(backy.YAMLError, match="nested deeper than 64 levels by alias"):
        backy.parse_yaml("\n".join(lines))


def long_texts(k: int) -> dict[str, str]:
    """Texts of which the time to parse grows with `k`, or with its square if we are not careful."""
    return {
        "blanks": "a:" + " " * (500 * k) + "b",
        "blanks in quotes": '"' + " " * (500 * k) + 'x"',
        "blanks, never closed": "'" + " \t" * (250 * k),
        "blank lines": "a: b" + "\n  " * (150 * k) + "c",
        "blank lines in quotes": "a: 'b" + "\n  " * (150 * k) + "c",
        "words": "a: " + "b # " * (100 * k),
        "colons": "a" + " :" * (200 * k),
        "one long flow list": "[" + "a," * (200 * k) + "]",
        "flow list of lines": "[" + "a,\n" * (150 * k) + "]",
        "one long plain value": "a: " + "b\n   " * (90 * k),
        "comments": "# c\n" * (100 * k),
        "block scalar": "a: |\n" + "  x\n" * (120 * k),
        "blank block scalar": "a: >\n" + "   \n" * (120 * k) + " x",
        "anchors": "".join(f"- &a{i}\n" for i in range(50 * k)),
        "keys": "".join(f"k{i}: v\n" for i in range(50 * k)),
        "hashes": "[" + "#" * (500 * k),
        "open quotes": "'" * (500 * k),
        "backslashes": '"' + "\\" * (500 * k),
        "carriage returns": "\r" * (500 * k),
    }


LONG = long_texts(1000)


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("k", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_time_to_parse_is_linear(k, text):
    text = long_texts(k)[text]
    start = time.process_time()
    with suppress(backy.YAMLError):
        backy.parse_yaml(text)
    assert time.process_time() - start < 1 + k / 250


# Meaning

MEANINGS = [
    ("", None),
    ("~", None),
    ("Null", None),
    ("nUll", "nUll"),
    ("yes", True),
    ("Off", False),
    ("y", "y"),
    ("0", 0),
    ("-12", -12),
    ("+1_000", 1000),
    ("0123", 83),
    ("-010", -8),
    ("0123_4", 668),
    ("089", "089"),
    ("0o17", "0o17"),
    ("0x1F", 31),
    ("0b101", 5),
    ("0x_", "0x_"),
    ("12:30", 750),
    ("-1:30:00", -5400),
    ("1:60", "1:60"),
    ("1.5", 1.5),
    ("1.", 1.0),
    (".5", 0.5),
    ("-.5", "-.5"),
    ("1e3", "1e3"),
    ("1.0e3", "1.0e3"),
    ("1.0e+3", 1000.0),
    ("1:30.5", 90.5),
    ("-.INF", float("-inf")),
    ("=", "="),
    ("2026-11-22", date(2026, 11, 22)),
    ("2026-13-22", "2026-13-22"),
    ("2026-1-2", "2026-1-2"),
    ("2026-11-22 04:28:09", datetime(2026, 11, 22, 4, 28, 9)),
    ("2026-11-22 04:28:09.5Z", datetime(2026, 11, 22, 4, 28, 9, 500000, UTC)),
    ("2026-1-2t4:28:09 +2", datetime(2026, 1, 2, 2, 28, 9, tzinfo=UTC)),
    ("2026-11-22T04:28:09.1234567-01:30", datetime(2026, 11, 22, 5, 58, 9, 123456, UTC)),
    ("2026-11-22 24:00:00", "2026-11-22 24:00:00"),
    ("0001-01-01 00:00:00+01:00", "0001-01-01 00:00:00+01:00"),
    ("9" * 5000, "9" * 5000),
]


@pytest.mark.parametrize(("text", "value"), MEANINGS)
def test_plain_text_means_what_pyyaml_makes_of_it(text, value):
    found = backy.resolve(backy.Scalar(text, True, 1, 1))
    assert (type(found), found) == (type(value), value)
    if isinstance(value, datetime):
        assert found.tzinfo == value.tzinfo


def test_not_a_number_is_a_float():
    assert str(load(".NaN")) == "nan"


@pytest.mark.parametrize("text", [text for text, _ in MEANINGS])
def test_quoted_text_is_text(text):
    assert backy.resolve(backy.Scalar(text, False, 1, 1)) == text


def test_keys_have_a_meaning_too():
    assert load("2: a\non: b\n'off': c\n") == {2: "a", True: "b", "off": "c"}


# Writing

WRITTEN = [
    ({}, "{}\n"),
    ([], "[]\n"),
    ([1, "a"], "[1, a]\n"),
    ("x", "x\n"),
    ("", "''\n"),
    ({"b": 1, "a": None}, "a: null\nb: 1\n"),
    ({"a": True, "b": False, "c": 1.0, "d": 1e20, "e": 1e-07}, None),
    ({"a": float("inf"), "b": float("-inf")}, "a: .inf\nb: -.inf\n"),
    ({"tags": [], "stats": {}}, "stats: {}\ntags: []\n"),
    ({"a": {"b": {"c": 1}}}, "a:\n  b: {c: 1}\n"),
    ({"a": [{"b": 1}, "c", ["d"]]}, "a:\n- {b: 1}\n- c\n- [d]\n"),
    ([{"a": [1], "b": {"c": []}}], "- a: [1]\n  b:\n    c: []\n"),
    ([[[1], 2], 3], "- - [1]\n  - 2\n- 3\n"),
    ({"a": "x: y", "b": "x:y", "c": ["x:y", "x,y"]}, "a: 'x: y'\nb: x:y\nc: ['x:y', 'x,y']\n"),
    ({"a": "on", "0123": "1:30", "null": "="}, "'0123': '1:30'\na: 'on'\n'null': '='\n"),
    ({"a": "it's", "b": "'x'"}, "a: it's\nb: '''x'''\n"),
    ({"a": "x\ny", "b": "gr\xfcn", "c": '\t"\\'}, 'a: "x\\ny"\nb: "gr\\xFCn"\nc: "\\t\\"\\\\"\n'),
    ({"a": "\u20ac\U0001f600\x85\u2028"}, 'a: "\\u20AC\\U0001F600\\N\\L"\n'),
    ({"a": "-.5", "b": "1e3", "c": "- x", "d": "x #y", "e": " x"}, None),
    ({"t": date(2026, 11, 22)}, "t: 2026-11-22\n"),
    (
        {"t": {"s": datetime(2026, 11, 22, 5, tzinfo=timezone(timedelta(hours=1)))}},
        "t:\n  s: 2026-11-22 04:00:00+00:00\n",
    ),
]


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_values_are_written_in_the_style_of_old(value, text):
    written = backy.format_yaml(value)
    assert text is None or written == text
    assert load(written) == value


def test_floats_are_written_so_that_they_stay_floats():
    assert backy.format_yaml([1.0, 1e20, 1e-07, 1.5e300]) == "[1.0, 1.0e+20, 1.0e-07, 1.5e+300]\n"


def test_a_mapping_of_scalars_may_be_written_on_one_line():
    source = {"type": "file", "filename": "/path"}
    assert backy.format_yaml(source, flow=True) == "{filename: /path, type: file}\n"
    assert backy.format_yaml({"a": [1]}, flow=True) == "a: [1]\n"


def test_long_lines_are_not_wrapped():
    assert backy.format_yaml({"a": ["word " * 100 + "end"]}).count("\n") == 1


def test_other_values_are_not_written():
    with pytest.raises(TypeError, match="no YAML for bytes"):
        backy.format_yaml({"a": b"x"})


KEPT = """\
a: '1'
b: [0x1F, '0x1F', ~, 'null', null]
c:
  d: 12:30
  e: 2026-11-22 04:28:09
f: "x\\ny"
g: {yes: 'yes'}
h: 1_000
'on': on
"""


def test_nodes_are_written_with_the_meaning_they_had():
    assert backy.format_yaml(backy.parse_yaml(KEPT)) == KEPT


def test_nodes_inside_a_value_are_written_with_it():
    root = backy.parse_yaml("x: &x [1, '1', a]\ny: *x\nz:\nw: a\n  b, c\n")
    nodes = {key: value for key, (_, value) in root.entries.items()}
    text = backy.format_yaml({**nodes, "v": 1, "l": [nodes["w"]]})
    assert text == "l: ['a b, c']\nv: 1\nw: a b, c\nx: [1, '1', a]\n" + "y: [1, '1', a]\nz: null\n"


# Against PyYAML

WORDS = [
    "a",
    "b1",
    "x-y",
    "/dev/vg/a",
    "http://x:80/y#z",
    "10",
    "0123",
    "on",
    "No",
    "~",
    "null",
    ".5",
]
WORDS += ["1:30", "2026-11-22", "2026-11-22 04:28:09.5+00:00", "1e3", "-1.5", "0x1f", "a b", "it's"]
WORDS += [
    "-x",
    "?y",
    ":z",
    "a#b",
    "a:b",
    "1_0.5",
    "\xe4\u20ac",
    "x  y",
    "1.5e+3",
    ".inf",
    "--",
    "=x",
]
STRINGS = [
    *WORDS,
    "",
    " a",
    "a ",
    "- a",
    "a: b",
    "a #b",
    "#a",
    "[",
    "{x}",
    "a,b",
    "&a",
    "*a",
    "!a",
    "|",
]
STRINGS += [
    ">",
    "%a",
    "@a",
    "`a",
    "'",
    '"',
    "\\",
    "a\nb",
    "\n",
    "a\n\n b\n",
    "\t",
    "\x07",
    "\xa0",
    "\u2028",
]
STRINGS += [
    "\U0001f600",
    "---",
    "...",
    "-",
    "?",
    ":",
    "a:",
    "<<",
    "=",
    "-.5",
    "._1",
    "1.",
    "a\\nb",
    "---a",
]


class Writer:
    """Writes random documents of the subset as a person or an old dumper might."""

    def __init__(self, choice: random.Random) -> None:
        self.random = choice
        self.anchors: list[str] = []

    def document(self) -> str:
        body = self.block(0, 0)
        head = self.random.choice(["", "", "---\n", "# head\n", "\ufeff", "\n"])
        tail = self.random.choice(["", "", "...\n", "# tail\n"])
        text = head + body + tail
        return text.replace("\n", "\r\n") if self.random.random() < 0.1 else text

    def blank(self) -> str:
        return self.random.choice([""] * 12 + [" # note", "  ", "\n", "\n  # note: x"])

    def block(self, indent: int, depth: int) -> str:
        """A block collection, indented, with its last line end."""
        return (self.mapping if self.random.random() < 0.7 else self.sequence)(indent, depth)

    def mapping(self, indent: int, depth: int) -> str:
        keys = self.random.sample(WORDS, self.random.randint(1, 4))
        lines = []
        for key in keys:
            if key in ("2026-11-22 04:28:09.5+00:00",) or self.random.random() < 0.2:
                key = self.quote(key, 0, False)
            lines.append(f"{' ' * indent}{key}:{self.value(indent, depth, True)}")
        return "".join(lines)

    def sequence(self, indent: int, depth: int) -> str:
        lines = []
        for _ in range(self.random.randint(1, 4)):
            if depth < 4 and self.random.random() < 0.2:
                gap = self.random.randint(1, 3)
                inner = self.block(indent + 1 + gap, depth + 1).lstrip(" ")
                lines.append(f"{' ' * indent}-{' ' * gap}{inner}")
            else:
                lines.append(f"{' ' * indent}-{self.value(indent, depth, False)}")
        return "".join(lines)

    def value(self, indent: int, depth: int, in_mapping: bool) -> str:
        """What follows an indicator, with its line end."""
        anchor = ""
        if self.random.random() < 0.1:
            anchor = f" &id{self.random.randint(0, 10**9)}"
        kind = self.random.random()
        if kind < 0.25 and depth < 4:
            if in_mapping and self.random.random() < 0.3:
                text = f"{anchor}{self.blank()}\n" + self.sequence(indent, depth + 1)
            else:
                deeper = indent + self.random.randint(1, 4)
                text = f"{anchor}{self.blank()}\n" + self.block(deeper, depth + 1)
        elif kind < 0.35:
            text = f"{anchor} {self.literal(indent)}"
        elif kind < 0.4:
            text = f"{anchor}{self.blank()}\n"
        elif kind < 0.45 and self.anchors:
            anchor, text = "", f" *{self.random.choice(self.anchors)}{self.blank()}\n"
        elif kind < 0.65:
            text = f"{anchor} {self.flow(indent, depth)}{self.blank()}\n"
        else:
            text = f"{anchor} {self.text(indent, False)}{self.blank()}\n"
        if anchor:
            self.anchors.append(anchor[2:])
        return text

    def literal(self, indent: int) -> str:
        width = indent + self.random.randint(1, 3)
        header = self.random.choice("|>") + self.random.choice(["", "-", "+"])
        lines = [
            self.random.choice(["a", "b c", "  d", "", "# e", "f: g", "- h", ""]) for _ in range(4)
        ]
        lines.insert(0, "first")
        body = "".join(" " * width * bool(line) + line + "\n" for line in lines)
        return f"{header}{self.random.choice(['', ' # note'])}\n{body}"

    def flow(self, indent: int, depth: int) -> str:
        gap = self.random.choice(["", " ", "\n" + " " * (indent + 2)])
        count = self.random.randint(0, 4)
        if self.random.random() < 0.5:
            entries = [self.flow_value(indent, depth) for _ in range(count)]
            opening, closing = "[", "]"
        else:
            opening, closing = "{", "}"
            keys = [key for key in self.random.sample(WORDS, count) if key not in ("?y", ":z")]
            entries = []
            for key in keys:
                quoted = self.random.random() < 0.3
                colon = self.random.choice([":", ": ", " : "]) if quoted else ": "
                shown = self.quote(key, 0, False) if quoted else key
                entries.append(shown + colon + self.flow_value(indent, depth))
        comma = "," if entries and self.random.random() < 0.2 else ""
        return opening + gap + ("," + (gap or " ")).join(entries) + comma + gap + closing

    def flow_value(self, indent: int, depth: int) -> str:
        if depth < 4 and self.random.random() < 0.2:
            return self.flow(indent, depth + 1)
        if self.anchors and self.random.random() < 0.1:
            return f"*{self.random.choice(self.anchors)} "
        return self.text(indent, True)

    def text(self, indent: int, in_flow: bool) -> str:
        if self.random.random() < 0.3:
            return self.quote(self.random.choice(STRINGS), indent, True)
        words = [self.random.choice(WORDS)]
        while in_flow and words[0] in ("?y", ":z"):
            words = [self.random.choice(WORDS)]
        while self.random.random() < 0.2:
            words.append(self.random.choice([word for word in WORDS if "?" not in word]))
        breaks = [" ", " ", "  ", f"\n{' ' * (indent + 2)}", f" \n\n{' ' * (indent + 1)}"]
        return "".join(word + self.random.choice(breaks) for word in words[:-1]) + words[-1]

    def quote(self, text: str, indent: int, folded: bool) -> str:
        fold = " "
        if folded and " " in text.strip() and "  " not in text and self.random.random() < 0.5:
            fold = "\n" + " " * (indent + 3)
            text = text.strip()
        if self.random.random() < 0.5 and all(char.isprintable() for char in text):
            return "'" + text.replace("'", "''").replace(" ", fold) + "'"
        quoted = json.dumps(text, ensure_ascii=max(text, default="") < "\U00010000")
        if folded and self.random.random() < 0.1:
            quoted = quoted[:-1] + '\\\n   \\x41\\e\\N\\_\\ \\/"'
        return quoted.replace(" ", fold)


@pytest.mark.parametrize("seeds", SEEDS, ids=SOME_OR_ALL)
def test_pyyaml_reads_the_same_from_random_documents(seeds):
    yaml = pytest.importorskip("yaml")
    equal = 0
    for seed in seeds:
        text = Writer(random.Random(seed)).document()
        try:
            wanted = yaml.safe_load(text)
        except yaml.YAMLError as e:
            pytest.fail(f"seed {seed}: the test writes no YAML: {e}\n{text}")
        try:
            assert repr(load(text)) == repr(wanted), f"seed {seed}\n{text}"
            equal += 1
        except backy.YAMLError as e:
            if "duplicate key" not in e.message:
                pytest.fail(f"seed {seed}: {e}\n{text}")
    assert equal > 0.9 * len(seeds)  # PyYAML lets keys stand twice


@pytest.mark.parametrize("seeds", SEEDS, ids=SOME_OR_ALL)
def test_what_pyyaml_dumps_in_any_style_means_the_same(seeds):
    yaml = pytest.importorskip("yaml")
    for seed in seeds[: len(seeds) // 2]:
        choice = random.Random(seed)
        value = random_value(choice)
        options = {
            "default_flow_style": choice.choice([None, True, False]),
            "width": choice.choice([20, 80, 10**9]),
            "indent": choice.choice([None, 2, 4, 7]),
            "allow_unicode": choice.choice([None, True]),
            "explicit_start": choice.choice([None, True]),
            "explicit_end": choice.choice([None, True]),
            "sort_keys": choice.choice([True, False]),
        }
        text = yaml.safe_dump(value, **options)
        if any(odd in text for odd in ("!!timestamp", "!!float", "? ", "\u2028")):
            continue
        try:
            wanted = yaml.safe_load(text)  # not always what it was told to dump
            assert repr(sort(load(text))) == repr(sort(wanted)), f"seed {seed}\n{text}"
        except backy.YAMLError as e:
            pytest.fail(f"seed {seed}: {e}\n{text}")


def random_value(choice: random.Random, depth: int = 0):
    kind = choice.random()
    if depth < 4 and kind < 0.15:
        return [random_value(choice, depth + 1) for _ in range(choice.randint(0, 3))]
    if depth < 4 and kind < (1.0 if depth == 0 else 0.35):
        keys = [random_text(choice) or "x" for _ in range(choice.randint(0, 4))]
        return {key: random_value(choice, depth + 1) for key in keys}
    scalars = [None, True, False, choice.randint(-(10**6), 10**12), choice.random() * 10**6]
    scalars += [choice.random() * 1e-9, 1e22, float("inf"), date(2026, 11, choice.randint(1, 30))]
    moment = datetime(2026, 11, 22, 4, 28, 9, choice.choice([0, 998174]), UTC)
    return choice.choice([*scalars, moment, *(random_text(choice) for _ in range(9))])


def random_text(choice: random.Random) -> str:
    if choice.random() < 0.7:
        return choice.choice(STRINGS)
    letters = "ab01:-,.'\"#?[]{} &*!|>%@`~_=+eExTZ\\" + "\n\t\xe4"
    return "".join(choice.choice(letters) for _ in range(choice.randint(0, 8)))


@pytest.mark.parametrize("seeds", SEEDS, ids=SOME_OR_ALL)
def test_pyyaml_reads_what_is_written_and_would_write_the_same(seeds):
    yaml = pytest.importorskip("yaml")
    same = 0
    for seed in seeds:
        value = random_value(random.Random(seed))
        text = backy.format_yaml(value)
        assert repr(sort(load(text))) == repr(sort(value)), f"seed {seed}\n{text}"
        assert repr(sort(yaml.safe_load(text))) == repr(sort(value)), f"seed {seed}\n{text}"
        assert backy.format_yaml(backy.parse_yaml(text)) == text, f"seed {seed}\n{text}"
        other = yaml.safe_dump(value, default_flow_style=None, width=10**9)
        inside = value.values() if isinstance(value, dict) else [value]
        if not any(isinstance(entry, (list, dict)) for entry in inside):
            continue  # a mapping of scalars, which we write in block style
        if any(odd in other for odd in ("\n\n", "!!timestamp", "&id", "'-.", "? ", "._", "-.")):
            continue
        assert text == other, f"seed {seed}"
        same += 1
    assert same > len(seeds) // 20


def sort(value):
    """The value with its keys in the same order, whatever order that is."""
    if isinstance(value, dict):
        return {key: sort(value[key]) for key in sorted(value, key=repr)}
    return [sort(entry) for entry in value] if isinstance(value, list) else value


def meaning(node):
    """What a node says, with its keys in one order."""
    if isinstance(node, backy.Mapping):
        entries = ((text, backy.resolve(key), value) for text, (key, value) in node.entries.items())
        return sorted((text, repr(key), repr(meaning(value))) for text, key, value in entries)
    if isinstance(node, backy.Sequence):
        return [meaning(entry) for entry in node.items]
    return backy.resolve(node)


def mutate(choice: random.Random, text: str) -> str:
    for _ in range(choice.randint(1, 4)):
        place = choice.randint(0, len(text))
        end = place + choice.randint(0, 5)
        other = choice.randint(0, len(text))
        added = choice.choice(["", *"\n\t '\"[]{}:,-?&*!|>%@#\\<~", text[other : other + 8]])
        added *= choice.choice([1, 1, 1, 2, 70])
        text = text[:place] + added + text[end:]
    return text


@pytest.mark.parametrize("rounds", ROUNDS, ids=SOME_OR_ALL)
def test_no_text_raises_anything_but_our_error(rounds):
    choice = random.Random(rounds)
    samples = [REVISION, WRAPPED_REVISION, STATUS, BY_HAND, CONFIGURATION]
    samples += [text for text, _ in READABLE + REFUSED if len(text) < 200]
    samples += [Writer(random.Random(seed)).document()[:300] for seed in range(200)]
    refused = 0
    for _ in range(rounds):
        text = mutate(choice, choice.choice(samples))
        if choice.random() < 0.05:
            text = "".join(choice.choice(string.punctuation + " \n\tab") for _ in range(40))
        try:
            node = backy.parse_yaml(text)
        except backy.YAMLError as e:
            refused += 1
            assert e.line >= 1 <= e.column and "\n" not in str(e), repr(text)
            continue
        again = backy.parse_yaml(backy.format_yaml(node))
        assert repr(meaning(again)) == repr(meaning(node)), repr(text)
    assert rounds // 5 < refused < rounds


MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import backy
text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    backy.parse_yaml(text)
except backy.YAMLError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
HUNGRY = {
    **{name: LONG[name] for name in ("one long flow list", "block scalar", "keys", "anchors")},
    "nothing but dashes": "-\n" * (1 << 19),
    "nothing but commas": "[" + "a," * ((1 << 19) - 2) + "]",
    "nothing but keys": "".join(f"{n}:\n" for n in range(140_000)),
    "bomb": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "random bytes": noise(1 << 20).decode("latin-1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("text", HUNGRY.values(), ids=HUNGRY)
def test_the_memory_for_any_text_is_bounded(text):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, os.path.dirname(backy.__file__)],
        input=text[: 1 << 20].encode("utf-8", "surrogateescape")[: 1 << 20],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert int(done.stdout) < 400 * 1024  # KiB
