# SPDX-License-Identifier: GPL-3.0-or-later
"""Directories of backy 2.0 and 2.1 go on; those of 2.2 and later are refused; damage is spared."""

from __future__ import annotations

import datetime
import os
import socket

import pytest
from conftest import MiB, contents, noise, plant, revisions, shared_bytes, write_image

import backy

DASHED = "b9a2e2a2-6a1e-4a6b-8d0f-3f1c2b7a9d55"
MANY_TAGS = "before-upgrade-of-the-database,daily,manual,monthly,weekly,x: y,yearly"

# As backy 2.1 left them: a dashed id, a float and a naive time, wrapped and folded text.
OLD = {
    DASHED: (
        "parent: null\n"
        "stats: {bytes_written: 3145728, duration: 0.05}\n"
        "tags: [weekly, daily]\n"
        "timestamp: 1441091207.5\n"  # 2.0b1
        "type: full\n"
    ),
    "123-0": (
        "parent: b9a2e2a2-6a1e-4a6b-8d0f-3f1c2b7a9d55\n"
        "stats: {bytes_written: 196608, ceph-verification: partial,\n"
        "  duration: 0.9258553981781006}\n"
        "tags: [before-upgrade-of-the-database, daily, manual, monthly, weekly,\n"
        "  yearly, 'x: y']\n"
        "timestamp: 2015-09-02 07:06:47.123456\n"
    ),
    "qXYnPVpor2wxnfLwd33VDT": (
        "---\n"
        "note: 'a value that was folded\n"
        "    between its quotes'\n"
        "nested: {a: 1, b: [x, yes, 2015-09-01, null, 0x10], c: 1e3}\n"
        "parent: 123-0\n"
        "stats:\n"
        "  bytes_written: 4096\n"
        "  duration: 2\n"
        "  ceph-verification: partial\n"
        "tags: [daily]\n"
        "timestamp: 2015-09-03 09:06:47+02:00\n"
        "flag: yes\n"
        "when: 2015-09-01\n"
        "nothing: ~\n"
    ),
}


@pytest.fixture
def image():
    return noise(MiB + 700, 1)


def make_old(job, image):
    job.mkdir()
    for number, (name, text) in enumerate(OLD.items()):
        head, _, rest = text.rpartition("---\n")
        (job / f"{name}.rev").write_text(f"{head}{_}uuid: {name}\n{rest}")
        write_image(job / name, (0, image), (number * 8192, b"old"))
        os.chmod(job / name, 0o440)
        os.chmod(job / f"{name}.rev", 0o440)
    (job / "last").symlink_to("qXYnPVpor2wxnfLwd33VDT")
    (job / "last.rev").symlink_to("qXYnPVpor2wxnfLwd33VDT.rev")
    (job / "config").write_text(
        f"{{filename: {job.parent}/image.img, full-always: yes, type: file}}\n"
    )
    os.chmod(job / "config", 0o440)
    write_image(job.parent / "image.img", (0, image), (100000, b"new"))
    return job


@pytest.fixture
def old(cow, image):
    """A job directory as backy 2.1 left it, whose source has changed since."""
    return make_old(cow / "vm", image)


def test_it_is_listed(old, run):
    result = run("-b", old, "status")
    assert (result.status, result.err) == (0, "")
    rows = [line.split("|")[1:-1] for line in result.out.splitlines() if "|" in line]
    assert [[cell.strip() for cell in row] for row in rows[1:]] == [
        ["2015-09-01 07:06:47", DASHED, "3.00 MiB", "0.1 s", "daily,weekly"],
        ["2015-09-02 07:06:47", "123-0", "192.00 kiB", "0.9 s", MANY_TAGS],
        ["2015-09-03 07:06:47", "qXYnPVpor2wxnfLwd33VDT", "4.00 kiB", "2.0 s", "daily"],
    ]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("0", "qXYnPVpor2wxnfLwd33VDT"),
        ("1", "123-0"),
        ("123-0", "123-0"),
        ("123-", "123-0"),
        ("b9a2e2a2-6a", DASHED),
        ("weekly", "123-0"),
        ("x: y", "123-0"),
        ("2015-09-01", DASHED),
        ("last", "qXYnPVpor2wxnfLwd33VDT"),
    ],
)
def test_its_revisions_are_found(old, run, spec, name):
    result = run("-b", old, "find", "-r", spec)
    assert (result.status, result.out) == (0, f"{old}/{name}\n")


def test_its_revisions_are_restored_although_nothing_vouches_for_them(old, run, tmp_path):
    before = contents(old)
    for number, name in enumerate(OLD):
        target = tmp_path / f"back{number}"
        result = run("-b", old, "restore", "-r", name, target)
        assert result.status == 0
        assert f"backy: warning: vm: {name} cannot be checked: it has no digests" in result.err
        assert target.read_bytes() == (old / name).read_bytes()
    assert contents(old) == before


def test_its_revisions_cannot_be_verified_and_it_says_why(old, run):
    before = contents(old)
    result = run("-b", old, "verify", "-r", "123-0")
    assert result.status == 1
    assert "123-0 cannot be verified: it has no digests" in result.err
    assert contents(old) == before


@pytest.mark.parametrize("mode", ["full", "written"])
def test_it_is_continued_at_the_cost_of_the_change(old, run, mode):
    before = contents(old)
    result = run("-b", old, "backup", "daily", "--verify", mode)
    assert (result.status, "warning" in result.err) == (0, False), result
    newest = revisions(old)[-1]
    assert newest.parent == "qXYnPVpor2wxnfLwd33VDT"
    assert newest.bytes_written == 2 * 4096  # "new", and "old" no more
    assert (old / newest.id).read_bytes() == (old.parent / "image.img").read_bytes()
    assert shared_bytes(old / newest.id) > 1000000
    assert run("-b", old, "verify").status == 0
    after = contents(old)
    for name in OLD:
        assert (after[name], after[f"{name}.rev"]) == (before[name], before[f"{name}.rev"])
    assert after["config"] == before["config"]
    assert (after["last"], after["last.rev"]) == (newest.id, f"{newest.id}.rev")


def test_what_an_interrupted_old_run_left_is_removed(old, run):
    for name in ("left1", "left2"):
        plant(old, name, "parent: null\nstats: {bytes_written: 0}\ntimestamp: 2015-09-04\n")
    (old / "left1.rbddiff").write_bytes(b"")
    assert run("-b", old, "backup", "daily").status == 0
    assert not {"left1", "left2", "left1.rev", "left2.rev"} & set(os.listdir(old))


# -- what we write there ------------------------------------------------------------

REQUIRED = {
    "uuid": str,
    "timestamp": datetime.datetime,
    "parent": (str, type(None)),
    "stats": dict,
    "tags": list,
}


def test_an_old_program_can_read_what_we_write(old, run):
    yaml = pytest.importorskip("yaml")
    assert run("-b", old, "backup", "daily,manual:x").status == 0
    assert run("-b", old, "protect").status == 0
    assert run("-b", old, "protect", "-r", "2").status == 0
    newest = revisions(old)[-1]
    for name in [newest.id, list(OLD)[1]]:
        loaded = yaml.safe_load((old / f"{name}.rev").read_text())
        for key, kind in REQUIRED.items():
            assert isinstance(loaded[key], kind), key
        assert loaded["uuid"] == name
        assert isinstance(loaded["stats"]["bytes_written"], int)
        assert isinstance(loaded["stats"]["duration"], float)
        assert all(isinstance(tag, str) for tag in loaded["tags"])
    loaded = yaml.safe_load((old / f"{newest.id}.rev").read_text())
    assert loaded["parent"] == "qXYnPVpor2wxnfLwd33VDT"
    assert loaded["tags"] == ["daily", "manual:x"]
    assert loaded["timestamp"].utcoffset() in (None, datetime.timedelta(0))
    assert loaded["trust"] == "verified"
    assert isinstance(yaml.safe_load((old / "config").read_text()), dict)


def test_an_incomplete_revision_of_ours_is_one_to_an_old_program(old, run, meanwhile):
    yaml = pytest.importorskip("yaml")
    seen = []

    def look():
        for path in old.glob("*.rev"):
            if path.stem not in OLD and not path.is_symlink():
                seen.append(yaml.safe_load(path.read_text()))

    meanwhile(1, look)
    assert run("-b", old, "backup", "daily").status == 0
    (loaded,) = seen
    assert set(REQUIRED) <= set(loaded)
    assert "duration" not in loaded["stats"]


@pytest.mark.parametrize("name", OLD)
def test_unknown_keys_and_values_survive_a_rewrite(old, run, name):
    yaml = pytest.importorskip("yaml")
    before = yaml.safe_load((old / f"{name}.rev").read_text())
    assert run("-b", old, "protect", "-r", name).status == 0
    after = yaml.safe_load((old / f"{name}.rev").read_text())
    assert after.pop("protected") is True
    assert isinstance(after.pop("clock"), int)
    assert after.pop("trust") == "trusted"
    assert after.pop("size") == (old / name).stat().st_size
    for known in ("timestamp", "tags"):
        before.pop(known)
        after.pop(known)
    assert after == before
    assert sorted(one.id for one in revisions(old)) == sorted(OLD)


def test_a_rewrite_keeps_the_moment_and_the_tags(old, run):
    before = {one.id: (one.timestamp, one.tags, one.clock) for one in revisions(old)}
    for name in OLD:
        assert run("-b", old, "protect", "-r", name).status == 0
    assert {one.id: (one.timestamp, one.tags, one.clock) for one in revisions(old)} == before


# -- directories with chunks ----------------------------------------------------------


@pytest.mark.parametrize("sign", ["directory", "metadata", "config"])
@pytest.mark.parametrize(
    "words", [["status"], ["find"], ["restore", "-"], ["backup", "daily"], ["verify"]]
)
def test_a_directory_with_chunks_is_refused_with_one_sentence(tmp_path, run, sign, words):
    job = make_old(tmp_path / "vm", b"image" * 100)
    if sign == "directory":
        (job / "chunks").mkdir()
        (job / "chunks" / "store").write_text("v2")
    elif sign == "metadata":
        plant(
            job,
            "new",
            "backend_type: chunked\nparent: ''\ntags: [daily]\n"
            "stats: {bytes_written: 1, duration: 0.1}\ntimestamp: 2017-09-01 00:00:00+00:00\n",
            b'{"mapping": {}, "size": 0}',
        )
    else:
        (job / "config").write_text("{backend: chunked, filename: /x, type: file}\n")
        if words != ["backup", "daily"]:
            return
    before = contents(job)
    result = run("-b", job, *words)
    assert (result.status, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "this directory was made by backy 2.2 or newer, which keeps chunks" in result.err
    assert contents(job) == before


def test_a_config_as_2_5_nests_it_is_understood(tmp_path, run):
    job = make_old(tmp_path / "vm", b"image" * 100)
    os.unlink(job / "config")
    (job / "config").write_text(
        "schedule:\n  daily: {interval: 1d, keep: 5}\n"
        f"source:\n  filename: {tmp_path}/image.img\n  type: file\n"
    )
    assert run("-b", job, "backup", "daily").status == 0


# -- damaged, foreign and hostile metadata -----------------------------------------------

GOOD = "parent: null\nstats: {bytes_written: 1, duration: 1.0}\ntimestamp: 2026-11-20\n"
BAD = {
    "empty": b"",
    "blank": b"\n\n",
    "null": b"null\n",
    "text": b"hello\n",
    "list": b"- uuid: bad\n",
    "cut": b"uuid: bad\nparent: null\nstats: {bytes_written: 1, dur",
    "no uuid": b"parent: null\ntimestamp: 2026-11-20\n",
    "no time": b"uuid: bad\nparent: null\n",
    "other uuid": b"uuid: good\nparent: null\ntimestamp: 2026-11-20\n",
    "uuid list": b"uuid: [bad]\nparent: null\ntimestamp: 2026-11-20\n",
    "uuid path": b"uuid: ../../etc/passwd\nparent: null\ntimestamp: 2026-11-20\n",
    "time": b"uuid: bad\nparent: null\ntimestamp: yesterday\n",
    "time list": b"uuid: bad\nparent: null\ntimestamp: [1]\n",
    "time far": b"uuid: bad\nparent: null\ntimestamp: 1.0e+300\n",
    "time nan": b"uuid: bad\nparent: null\ntimestamp: .nan\n",
    "time bool": b"uuid: bad\nparent: null\ntimestamp: yes\n",
    "time before year 1": b"uuid: bad\nparent: null\ntimestamp: 0001-01-01 00:00:00+14:00\n",
    "time after 9999": b"uuid: bad\nparent: null\ntimestamp: 9999-12-31 23:59:59-14:00\n",
    "month 13": b"uuid: bad\nparent: null\ntimestamp: 2026-13-01 00:00:00\n",
    "stats list": b"uuid: bad\nparent: null\ntimestamp: 2026-11-20\nstats: []\n",
    "duration text": b"uuid: bad\nparent: null\ntimestamp: 2026-11-20\nstats: {duration: '1'}\n",
    "duration null": b"uuid: bad\nparent: null\ntimestamp: 2026-11-20\nstats: {duration: null}\n",
    "duration < 0": b"uuid: bad\nparent: null\ntimestamp: 2026-11-20\nstats: {duration: -1.0}\n",
    "duration nan": b"uuid: bad\nparent: null\ntimestamp: 2026-11-20\nstats: {duration: .nan}\n",
    "tags text": b"uuid: bad\n" + GOOD.encode() + b"tags: daily\n",
    "tags nested": b"uuid: bad\n" + GOOD.encode() + b"tags: [daily, [weekly]]\n",
    "trust": b"uuid: bad\n" + GOOD.encode() + b"trust: maybe\n",
    "trust list": b"uuid: bad\n" + GOOD.encode() + b"trust: [trusted]\n",
    "digest": b"uuid: bad\n" + GOOD.encode() + b"digest: sha256:123\n",
    "verified": b"uuid: bad\n" + GOOD.encode() + b"verified: soon\n",
    "bytes": b"\xff\xfe\x00",
    "zeros": bytes(4096),
    "escapes": b"uuid: \x1b[2J\n",
    "latin1": "uuid: bad\nnote: ä\n".encode("latin-1"),
    "deep": b"[" * 5000,
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in b"abcdefgh"
    ),
    "large": b"a" * (MiB + 1),
    "twice": b"uuid: bad\nuuid: bad\n" + GOOD.encode(),
    "tab": b"uuid: bad\n\tparent: null\n",
}


@pytest.fixture
def job(tmp_path, run):
    """A job with one revision called good, on whatever file system there is."""
    write_image(tmp_path / "source.img", (0, noise(5000, 1)))
    job = tmp_path / "job"
    assert run("-b", job, "init", "file", tmp_path / "source.img").status == 0
    plant(job, "good", GOOD)
    return job


def works_beside(run, job, name):
    """All commands work beside `{name}.rev`, which costs one warning each time and stays."""
    before = contents(job)
    warnings = []
    for words in (["status"], ["find"], ["restore", "-"], ["status", "--json"]):
        result = run("-b", job, *words)
        assert result.status == 0, result
        lines = [line for line in result.err.splitlines() if f"{name}.rev " in line]
        assert len(lines) == 1, result
        warnings += lines
        assert "\x1b" not in result.err
    assert contents(job) == before
    result = run("-b", job, "backup", "daily")
    assert result.status == 0, result
    assert run("-b", job, "forget", "-r", "good", "--force").status == 0
    after = contents(job)
    for one in (name, f"{name}.rev", f"{name}.sums"):
        assert after.get(one) == before.get(one)
    assert len(set(warnings)) == 1
    assert warnings[0].startswith("backy: warning: job: ")
    return warnings[0]


@pytest.mark.parametrize("kind", BAD)
def test_damaged_metadata_costs_one_warning_and_nothing_of_it_is_deleted(job, run, kind):
    (job / "bad.rev").write_bytes(BAD[kind])
    (job / "bad").write_bytes(b"precious")
    (job / "bad.sums").write_bytes(b"precious")
    warning = works_beside(run, job, "bad")
    assert warning.startswith("backy: warning: job: bad.rev is left alone: ")
    assert len(warning) < 300


@pytest.mark.parametrize("kind", ["link", "dangling", "outside", "pipe", "directory", "socket"])
def test_metadata_that_is_no_file_costs_one_warning(job, run, kind, monkeypatch):
    path = job / "bad.rev"
    if kind == "link":
        path.symlink_to("good.rev")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "outside":
        path.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        monkeypatch.chdir(job)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("bad.rev")
    (job / "bad").write_bytes(b"precious")
    works_beside(run, job, "bad")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-r", "--", "a b", "a\nb", "\x1b[2J", "a.b", "config", "status", "x" * 80, "ä",
     "\udcff", "bad.rev", "*", ".backy-tmp-x"],
)  # fmt: skip
def test_metadata_with_a_name_of_no_revision_costs_one_warning(job, run, name):
    (job / f"{name}.rev").write_text(f"uuid: bad\n{GOOD}")
    before = contents(job)
    result = run("-b", job, "status")
    assert (result.status, result.err.count("\n")) == (0, 1)
    assert "is left alone: it is not named like a revision" in result.err
    assert "\x1b" not in result.err
    assert run("-b", job, "backup", "daily").status == 0
    after = contents(job)
    assert {one: after[one] for one in before} == before
    assert revisions(job)[0].id == "good"


def test_hostile_values_are_shown_harmlessly(job, run):
    plant(job, "evil", GOOD + 'tags: ["\\e[2J", "a\\nb", "\\u202e"]\nsize: 7\n', b"1234567")
    plant(job, "huge", GOOD + f"clock: {'9' * 200}\nbytes_written: .inf\nsize: -5\n")
    for words in (["status"], ["status", "-v"], ["find", "-r", "zz"], ["restore", "-"]):
        result = run("-b", job, *words)
        assert not set("\x1b\u202e") & set(result.out + result.err)
    assert run("-b", job, "backup", "daily").status == 0
    assert run("-b", job, "status").status == 0


def test_a_revision_that_lost_its_duration_is_not_taken_for_incomplete(job, run):
    """Ours by what else its metadata says, one of backy 2.x by its image being read-only."""
    assert run("-b", job, "backup", "daily").status == 0
    ours = revisions(job)[-1].id
    text = (job / f"{ours}.rev").read_text()
    lines = [line for line in text.splitlines(True) if not line.startswith("stats")]
    os.chmod(job / f"{ours}.rev", 0o600)
    (job / f"{ours}.rev").write_text("".join(lines))
    plant(job, "theirs", "parent: null\ntimestamp: 2026-11-20\nstats: {bytes_written: 0}\n")
    os.chmod(job / "theirs", 0o440)
    for name in (ours, "theirs"):
        warnings = run("-b", job, "status").err
        assert f"{name}.rev is left alone: it was complete and has lost its duration" in warnings
    before = contents(job)
    assert run("-b", job, "backup", "daily").status == 0
    after = contents(job)
    for name in (ours, f"{ours}.rev", f"{ours}.sums", "theirs", "theirs.rev"):
        assert after[name] == before[name]


def test_foreign_files_are_none_of_our_business(job, run):
    for name in ("notes.txt", "good.rbddiff", "good.old", ".backup", "x.sums", "y"):
        (job / name).write_text("precious")
    (job / "quarantine").mkdir()
    before = contents(job)
    result = run("-b", job, "backup", "daily")
    assert (result.status, result.err.count("left alone")) == (0, 0)
    after = contents(job)
    assert {one: after[one] for one in before} == before


def test_a_damaged_revision_is_never_the_parent_and_never_last(job, run):
    plant(job, "bad", GOOD.replace("2026", "2030"))
    (job / "bad.rev").write_bytes(b"")
    assert run("-b", job, "backup", "daily").status == 0
    assert revisions(job)[-1].parent == "good"


def test_a_directory_with_damaged_metadata_alone_is_a_job_all_the_same(tmp_path, run):
    (tmp_path / "bad.rev").write_text("")
    result = run("-b", tmp_path, "status")
    assert result.status == 0
    assert "0 revisions" in result.out
    assert backy.Repository.open(str(tmp_path)).problems == [("bad.rev", "it is empty")]
