# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs with a fault: each makes the backy of a child leave out one step or misplace it.

What the tests of crashes, faults and power cuts claim is worth something only if
they find these out.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import Callable

import backy


def flush_unless(unless: Callable[[int], bool]) -> None:
    real = backy.sync
    backy.sync = lambda fd: None if unless(fd) else real(fd)


def name_of(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def through_the_cache() -> None:
    """Without the advice and the way of reading that happen to have the data written."""
    backy.bypass_cache = lambda fd: False
    backy.drop_cache = lambda fd, offset=0, length=0: None


def without_image_flush() -> None:
    """XFS does not mind: it writes and logs what is then read back past the cache."""
    flush_unless(lambda fd: len(name_of(fd)) == 22)


def without_image_flush_and_reading_back() -> None:
    without_image_flush()
    through_the_cache()


def without_directory_flush() -> None:
    flush_unless(lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode))


def without_metadata_flush() -> None:
    flush_unless(lambda fd: name_of(fd).startswith(backy.TEMPORARY))
    through_the_cache()


def flush_again() -> None:
    """A flush that failed is tried once more."""
    real = backy.sync

    def sync(fd: int) -> None:
        try:
            real(fd)
        except OSError:
            real(fd)

    backy.sync = sync


def commit_before_data() -> None:
    real = backy.Backup.fill

    def fill(self, revision, *rest):
        self.repository.write_revision(replace(revision, duration=1.0))
        return real(self, revision, *rest)

    backy.Backup.fill = fill


def last_before_commit() -> None:
    real = backy.Backup.fill

    def fill(self, revision, *rest):
        backy.replace_link(self.repository.dir_fd, "last", revision.id)
        backy.sync(self.repository.dir_fd)
        return real(self, revision, *rest)

    backy.Backup.fill = fill


def without_reading_back() -> None:
    backy.Backup.prove = lambda self, *_: 0


def metadata_in_place() -> None:
    def replace_file(dir_fd: int, name: str, data: bytes, mode: int) -> None:
        fd = backy.os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode, dir_fd=dir_fd)
        backy.os.pwrite(fd, data, 0)
        backy.sync(fd)
        backy.os.close(fd)

    backy.replace_file = replace_file


def image_removed_first() -> None:
    real = backy.Repository.remove

    def remove(self, revision):
        backy.os.unlink(revision.id, dir_fd=self.dir_fd)
        real(self, revision)

    backy.Repository.remove = remove
