# SPDX-License-Identifier: GPL-3.0-or-later
"""tools/bench.py, small: that it measures every step, not how fast anything is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import PROGRAM, need_root, need_tool

PEERS = ("borg, blocks of 64 KiB", "restic", "qemu-img convert, qcow2")
UNCHANGED, SCATTERED = "second backup, unchanged", "second backup, 1 % scattered"
TO_NEW = "restore to a new file, other file system"
SHARED = "restore to a new file, same file system"
ROWS = [
    ("first backup", "cp --sparse=always && sync"),
    *(("first backup", peer) for peer in PEERS),
    *(
        row
        for step in (UNCHANGED, SCATTERED)
        for row in (
            (f"{step}, verify: full", "cat SOURCE PARENT"),
            (f"{step}, verify: written", "cat SOURCE"),
            *((f"{step}, verify: full", peer) for peer in PEERS),
        )
    ),
    (f"{UNCHANGED}: CPU per GiB of data", "-"),
    (f"{UNCHANGED}: growth of the store", "-"),
    (SHARED, "-"),
    (f"{SCATTERED}: growth on XFS", "bytes changed"),
    (f"{SCATTERED}: growth on btrfs", "bytes changed"),
    (f"{SCATTERED}: growth on btrfs", "written to a clone by hand"),
    (TO_NEW, "cp --sparse=always && sync"),
    *((TO_NEW, peer) for peer in PEERS),
    (f"{SHARED}, scattered", "cp --reflink=always && sync"),
    ("restore over a file, 1 % differs", "cmp"),
    ("restore to a pipe", "cat"),
    ("restore to a block device", "qemu-img convert -n && sync"),
    ("verify", "cat IMAGE"),
    *(("verify", peer) for peer in PEERS),
    ("peak memory, image of 1 GiB", "-"),
    ("peak memory, image of 64 GiB", "-"),
    ("peak memory, image of 1 TiB", "-"),
    ("second backup, image of 1 TiB", "-"),
    ("CPU of find, 1,000 revisions", "-"),
    ("CPU of status, 1,000 revisions", "-"),
    ("CPU of --version", "-"),
]


@pytest.mark.slow
@pytest.mark.root
def test_the_quick_bench_has_a_row_for_every_step(tmp_path):
    need_root()
    for tool in ("mkfs.xfs", "mkfs.btrfs", "losetup", "blkdiscard"):
        need_tool(tool)
    words = ["--quick", "--markdown", "--directory", tmp_path, "--program", tmp_path / "backy"]
    bench = PROGRAM.parent / "tools" / "bench.py"
    done = subprocess.run([sys.executable, bench, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    steps = [(row[0], row[2]) for row in cells[2:]]
    assert sorted(steps) == sorted(ROWS)
    for row in cells[2:]:
        has_peer, has_target = row[2] != "-", row[5] != "-"
        assert row[1] != "-", row
        assert row[3].startswith("skipped") or (row[4] != "-") == has_peer, row
        assert row[6] in (("met", "MISSED") if has_target else ("-",)), row
    assert str(tmp_path) not in subprocess.check_output(["losetup", "--all"], text=True)
    assert [one.name for one in tmp_path.iterdir()] == ["backy"]
