# SPDX-License-Identifier: GPL-3.0-or-later
"""Plug-ins: the two examples, one that is written from the manual alone, and bad ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import PROGRAM, MiB, noise, revisions, write_image

import backy

EXAMPLES = PROGRAM.parent / "contrib/sources"
SIZE = 9 * MiB + 4321


@pytest.fixture
def image(xfs):
    return write_image(
        xfs / "vm.img", (0, noise(5 * MiB, 1)), (SIZE - 321, noise(321, 2)), size=SIZE
    )


def plug_in(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{text}")
    path.chmod(0o755)
    return path


def backup(run, job, status: int = 0):
    result = run("-b", job, "backup", "daily")
    assert result.status == status, result
    return result


def init(run, job, program, **options):
    words = ",".join([str(program), *(f"{key}={value}" for key, value in options.items())])
    assert run("-b", job, "init", "exec", words).status == 0
    return job


def stat_of(job, key: str):
    return revisions(job)[-1].stat(key)


def test_the_example_that_clones_a_file(run, image, xfs):
    job = init(run, xfs / "job", EXAMPLES / "reflink", file=image)
    for number in range(3):
        write_image(image, (number * MiB, noise(5000, 5 + number)))
        backup(run, job)
        assert (job / "last").read_bytes() == image.read_bytes()
    assert sorted(path.name for path in xfs.iterdir()) == ["job", "vm.img"]
    assert run("-b", job, "verify", "--source").status == 0


def test_the_example_that_asks_for_changed_blocks(run, image, xfs, tmp_path):
    """The commands clone a file, and compare two clones for what `rbd diff` would print."""
    snap = f"{image}-{{revision}}"
    differ = plug_in(
        tmp_path / "differ",
        "one, two = (open(name, 'rb').read() for name in sys.argv[1:])\n"
        "print(json.dumps([{'offset': at, 'length': 512, 'exists': 'true'}\n"
        "    for at in range(0, max(len(one), len(two)), 512)"
        " if one[at:at + 512] != two[at:at + 512]]))\n",
    )
    job = init(
        *(run, xfs / "job", EXAMPLES / "changed-blocks"),
        image=snap,
        snapshot=f"cp --reflink=always {image} {snap}",
        changed=f"{differ} {image}-{{parent}} {snap}",
        release=f"rm -f {snap}",
    )
    assert "full backup (no parent)" in backup(run, job).err
    steps = [[(5, b"a")], [(MiB - 3, noise(7000, 3)), (SIZE - 1, b"z")], [], [(0, noise(SIZE, 4))]]
    for pieces in steps:
        write_image(image, *pieces)
        assert "differential backup" in backup(run, job).err
        assert (job / "last").read_bytes() == image.read_bytes()
        assert [path.name for path in xfs.glob("vm.img-*")] == [f"vm.img-{revisions(job)[-1].id}"]
    for size in (SIZE + 70_000, 3 * MiB + 5, 4 * MiB + 1):
        os.truncate(image, size)
        assert "differential backup" in backup(run, job).err
        assert (job / "last").read_bytes() == image.read_bytes()
    (xfs / f"vm.img-{revisions(job)[-1].id}").unlink()
    result = backup(run, job)
    assert "full backup (changed: exit status 1)" in result.err
    assert run("-b", job, "verify", "--all").status == 0


# Written from PLUG-INS in backy.conf(5): an image that is a directory of numbered chunks of
# 1 MiB; a snapshot is a directory of links to them; it prints what it is asked for.
CHUNKS = """
ask = json.load(sys.stdin)
top, verb = ask["options"]["top"], sys.argv[1]
def place(name): return os.path.join(top, "snap-" + name)
def chunks(name): return sorted(os.listdir(place(name)))
with open(os.path.join(top, "calls"), "a") as calls: calls.write(verb + "\\n")
M = 1 << 20
if verb == "capabilities":
    print(json.dumps({"changes": True}))
elif verb == "snapshot":
    os.mkdir(place(ask["revision"]))
    for name in sorted(os.listdir(os.path.join(top, "live"))):
        os.link(os.path.join(top, "live", name), os.path.join(place(ask["revision"]), name))
    print(json.dumps({"size": M * len(chunks(ask["revision"]))}))
elif verb == "changes":
    new, old = place(ask["revision"]), place(ask["parent"])
    def same(name):
        paths = os.path.join(old, name), os.path.join(new, name)
        return all(map(os.path.exists, paths)) and os.path.samefile(*paths)
    liar = os.path.exists(os.path.join(top, "lie"))
    names = [] if liar else [name for name in chunks(ask["revision"]) if not same(name)]
    print(json.dumps({"extents": [{"offset": M * int(name), "length": M} for name in names]}))
elif verb == "read":
    for extent in ask["extents"]:
        at, end = extent["offset"], extent["offset"] + extent["length"]
        while at < end:
            with open(os.path.join(place(ask["revision"]), "%05d" % (at // M)), "rb") as file:
                file.seek(at % M)
                piece = file.read(min(M - at % M, end - at))
            sys.stdout.buffer.write(piece)
            at += len(piece)
elif verb == "release":
    if os.path.exists(place(ask["revision"])):
        import shutil
        shutil.rmtree(place(ask["revision"]))
"""


@pytest.fixture
def chunks(tmp_path, xfs, run):
    """The job of an image of 12 chunks, and a function that changes one of them."""
    top = tmp_path / "chunks"
    (top / "live").mkdir(parents=True)

    def change(number: int, seed: int) -> None:
        path = top / "live" / f"{number:05}"
        path.unlink() if path.exists() else None
        path.write_bytes(noise(MiB, seed))

    for number in range(12):
        change(number, number)
    job = init(run, xfs / "job", plug_in(tmp_path / "plug-in", CHUNKS), top=top)
    return job, top, change


def whole(top: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((top / "live").iterdir()))


def test_a_plug_in_written_from_the_manual(run, chunks):
    job, top, change = chunks
    assert "full backup (no parent)" in backup(run, job).err
    for number in (3, 11, 12, 0):
        change(number, 100 + number)
        result = backup(run, job)
        assert "differential backup" in result.err
        assert (job / "last").read_bytes() == whole(top)
        assert stat_of(job, "bytes_read") == MiB and stat_of(job, "verification") == "sample"
        assert len(list(top.glob("snap-*"))) == 1
    verbs = (top / "calls").read_text().split()
    assert verbs.count("changes") == 4 and verbs.count("release") == 4


def test_a_plug_in_that_forgets_a_change_is_found_out_and_distrusted(run, chunks):
    job, top, change = chunks
    backup(run, job)
    for number in range(12):
        change(number, 200 + number)
    (top / "lie").touch()
    result = backup(run, job, status=1)
    assert "the source has other bytes than the image" in result.err
    (parent,) = revisions(job)
    assert parent.trust is backy.Trust.DISTRUSTED
    assert "full backup (the parent is distrusted)" in backup(run, job).err
    assert (job / "last").read_bytes() == whole(top)
    assert len(list(top.glob("snap-*"))) == 1


def test_an_end_of_the_sample_time_is_said(run, chunks, monkeypatch):
    job, _, _ = chunks
    backup(run, job)
    loaded = backy.load_job

    def hurried(repository):
        from datetime import timedelta

        return backy.replace(loaded(repository), sample_time=timedelta(0))

    monkeypatch.setattr(backy, "load_job", hurried)
    monkeypatch.setattr(backy, "choose_sample", lambda *_: [(0, 4 * MiB), (4 * MiB, 8 * MiB)])
    result = backup(run, job)
    assert "partly verified" in result.err
    assert stat_of(job, "verification") == "partial"
    assert "(partly verified)" in run("-b", job, "status").out


def test_a_sample_that_cannot_be_read_leaves_the_revision_partly_verified(run, chunks, monkeypatch):
    job, top, change = chunks
    backup(run, job)
    change(3, 77)
    text = (top.parent / "plug-in").read_text()
    broken = (
        'if verb == "read" and len(ask["extents"]) > 1: sys.exit("no more")\nif verb == "read":'
    )
    (top.parent / "plug-in").write_text(text.replace('elif verb == "read":', broken, 1))
    monkeypatch.setattr(backy, "choose_sample", lambda *_: [(0, 4096), (8192, 9000)])
    result = backup(run, job)
    assert "the sample cannot be read" in result.err and "no more" in result.err
    assert stat_of(job, "verification") == "partial"
    assert (job / "last").read_bytes() == whole(top)


@pytest.mark.parametrize(
    "words",
    ["sys.exit('no idea')", "print('{')", "print('[[0, 5]]')", "print('{}')",
     "print('{\"unknown\": \"no idea\"}')", "print('[' + '1, ' * 8_000_000 + '1]')"],
)  # fmt: skip
def test_who_cannot_say_what_has_changed_is_read_as_a_whole(run, chunks, words):
    job, top, change = chunks
    backup(run, job)
    change(3, 77)
    text = (top.parent / "plug-in").read_text()
    broken = f'elif verb == "changes":\n    {words}\nelif verb == "never":'
    (top.parent / "plug-in").write_text(text.replace('elif verb == "changes":', broken, 1))
    result = backup(run, job)
    assert "performing full backup (" in result.err and result.err.count("\n") == 4
    assert (job / "last").read_bytes() == whole(top)


BAD = {
    "no JSON": "print('{')",
    "no mapping": "print(3)",
    "a failure": "sys.exit('it is on fire')",
    "no path and no size": "print('{}')",
    "a size that is none": "print(json.dumps({'size': -1}))",
    "a size that is text": "print(json.dumps({'size': '7'}))",
    "a size that no file has": "print(json.dumps({'size': 1 << 70}))",
    "a size that nothing holds": "print(json.dumps({'size': (1 << 63) - 1}))",
    "a path that is not there": "print(json.dumps({'path': '/nonexistent'}))",
    "a path to a directory": "print(json.dumps({'path': '/'}))",
    "nothing to read": "print(json.dumps({'size': 100}) if sys.argv[1] == 'snapshot' else '{}')",
    "too much": "print('x' * 20_000_000)",
    "killed": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_plug_in_is_one_error_and_leaves_nothing(run, tmp_path, text):
    job = init(run, tmp_path / "job", plug_in(tmp_path / "plug-in", text))
    result = backup(run, job, status=1)
    assert "Traceback" not in result.err and len(result.err) < 3000
    assert not list(job.glob("*.rev"))


def test_the_words_of_a_plug_in_are_shown(run, tmp_path):
    job = init(run, tmp_path / "job", plug_in(tmp_path / "plug-in", "sys.exit('it is on fire')"))
    assert "capabilities: it is on fire (exit status 1)" in backup(run, job, status=1).err


@pytest.mark.parametrize(
    "extents",
    ["3", "[3]", "[[0, 5]]", '[{"offset": "0", "length": 5}]', '[{"offset": 0}]', "{}",
     '[{"offset": -5, "length": 5}]', '[{"offset": 0, "length": 1e3}]'],
)  # fmt: skip
def test_extents_that_are_none_are_refused(extents):
    import json

    with pytest.raises(backy.BackyError):
        backy.decode_extents(json.loads(extents), 100, "it")


def test_extents_beyond_the_end_are_cut():
    one = [{"offset": 90, "length": 50}, {"offset": 100, "length": 1}, {"offset": 5, "length": 0}]
    assert backy.decode_extents(one, 100, "it") == [(90, 10)]


def test_a_name_may_stand_for_a_plug_in(run, tmp_path, image, xfs):
    conf = tmp_path / "backy.conf"
    (tmp_path / "clone").symlink_to(EXAMPLES / "reflink")
    conf.write_text(
        f"global: {{base-dir: {xfs}, source-types: {{clone: clone}}}}\n"
        "schedules: {s: {daily: {interval: 1d, keep: 1}}}\n"
        f"jobs: {{vm: {{schedule: s, source: {{type: clone, file: {image}}}}}}}\n"
    )
    job = backy.load_settings(str(conf)).jobs["vm"]
    assert job.source["type"] == "exec"
    (xfs / "vm").mkdir()
    (xfs / "vm/config").write_bytes(backy.job_config(job))
    backup(run, xfs / "vm")
    assert (xfs / "vm/last").read_bytes() == image.read_bytes()
    shown = run("config", "show", "-c", conf).out
    assert f"file: {image}" in shown and "clone: " in shown
    conf.write_text(conf.read_text().replace("{clone: clone}", "{file: clone}"))
    with pytest.raises(backy.ConfigErrors, match="no further type can be called 'file'"):
        backy.load_settings(str(conf))


@pytest.mark.parametrize("words", ["", ",a=b", "x,y", "x,=z"])
def test_init_wants_a_program_and_options(tmp_path, run, words):
    result = run("-b", tmp_path / "job", "init", "exec", words)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "PROGRAM[,KEY=VALUE,...]" in result.err
