#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build dist/backy: backy.py in a zip archive, behind a few lines of sh that find a Python.

The same sources give the same bytes under any Python, time zone, umask and
time stamp.  To that end nothing is compressed (one zlib packs other bytes than
the next) and dates, modes and order are fixed.

    tools/build.py [FILE]             write FILE (default: dist/backy)
    tools/build.py --stage DIRECTORY  lay out what is to be installed, for shiv
"""

import argparse
import hashlib
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Dict

ROOT = Path(__file__).resolve().parent.parent

# Only what every sh has built in: a rescue system may have little else in its
# PATH.  Versions that backy is tested with come before newer ones.  A Python that
# is found tells its own path, as a shim's start costs more than that of Python; what
# others have installed there (-S) is not needed and not waited for.
# Nothing after "exit" is read by the shell, nothing before the archive by Python.
PREAMBLE = r"""#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# backy @VERSION@: a zip archive; these lines only find a Python to run it with.
[ -z "$BACKY_PYTHON" ] || exec "$BACKY_PYTHON" -IS "$0" "$@"
found=
for p in python3 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 \
    python3.14 python3.15 python3.16 python3.17 /usr/libexec/platform-python; do
    command -v "$p" >/dev/null 2>&1 || continue
    e=$("$p" -ISc 'import sys
sys.version_info < (3, 8) and sys.exit(1)
sys.stdout.write(sys.executable)' 2>/dev/null) && exec "${e:-$p}" -IS "$0" "$@"
    v=$("$p" -V 2>&1) && found="$found${found:+, }${v#Python }"
done
echo "backy: UNKNOWN - needs Python 3.8 or newer, found ${found:+only }${found:-none}" >&2
exit 3
"""

# Python 2.7 must be able to read this.  The compiled form takes half of the time to
# start, and an archive has no __pycache__; so it is kept where only we can write.
MAIN = r"""# SPDX-License-Identifier: GPL-3.0-or-later
import os
import stat
import sys

if sys.version_info < (3, 8):
    sys.stderr and sys.stderr.write(
        "backy: UNKNOWN - needs Python 3.8 or newer, this is %d.%d (%s)\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(3)

import marshal

NAME = "@DIGEST@-%s-%x" % (sys.implementation.name, sys.hexversion)


def cache_directory():
    "Where root, or the user, keeps what can be made again; None where others could write."
    home = os.environ.get("HOME", "")
    path = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if os.geteuid() == 0:
        path = "/var/cache"
    if not os.path.isabs(path):
        return None
    path = os.path.join(path, "backy")
    try:
        os.path.isdir(path) or os.makedirs(path, 0o700)
        status = os.lstat(path)
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return path if ours and not status.st_mode & 0o022 else None


def keep(directory, code):
    "Leave the compiled program for the next start, in place of those of older versions."
    path = os.path.join(directory, NAME)
    unfinished = "%s.%d" % (path, os.getpid())
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(marshal.dumps(code))
        os.rename(unfinished, path)
        for name in os.listdir(directory):
            if name != NAME and name.split(".")[0].split("-")[1:] == NAME.split("-")[1:]:
                os.unlink(os.path.join(directory, name))
    except OSError:
        pass


def load():
    "The compiled program: from the cache, else from the archive."
    directory = cache_directory()
    if directory:
        try:
            with open(os.path.join(directory, NAME), "rb") as file:
                return marshal.loads(file.read())
        except (OSError, EOFError, ValueError, TypeError):
            pass
    code = __loader__.get_code("backy")
    if directory:
        keep(directory, code)
    return code


backy = sys.modules["backy"] = type(sys)("backy")
backy.__file__ = os.path.join(__loader__.archive, "backy.py")
backy.__loader__ = __loader__
exec(load(), backy.__dict__)
sys.exit(backy.main())
"""

METADATA = """\
Metadata-Version: 2.1
Name: backy
Version: @VERSION@
Summary: @SUMMARY@
License: GPL-3.0-or-later
Requires-Python: >=3.8
"""


def find_value(name: str, file: str) -> str:
    """What `file` assigns to `name` in a line of its own: name = "value"."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(rf'^{name} = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit(f'build.py: {file} has no line {name} = "..."')
    return found.group(1)


def fill_in(template: str) -> bytes:
    values = {
        "DIGEST": hashlib.sha256((ROOT / "backy.py").read_bytes()).hexdigest()[:32],
        "VERSION": find_value("__version__", "backy.py"),
        "SUMMARY": find_value("description", "pyproject.toml"),
    }
    return re.sub("@([A-Z]+)@", lambda found: values[found.group(1)], template).encode()


def installed_files() -> Dict[str, bytes]:
    """What a package manager would lay down: the module, and what it is."""
    version = find_value("__version__", "backy.py")
    return {
        "backy.py": (ROOT / "backy.py").read_bytes(),
        f"backy-{version}.dist-info/METADATA": fill_in(METADATA),
    }


def write_archive(target: Path, members: Dict[str, bytes]) -> None:
    """Put the runnable archive at `target`; there is the old file or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    with open(unfinished, "wb") as stream:
        stream.write(fill_in(PREAMBLE))
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, content in sorted(members.items()):
                member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                member.create_system = 3  # Unix, or the modes mean nothing
                member.external_attr = 0o100644 << 16
                archive.writestr(member, content)
    os.chmod(unfinished, 0o755)
    os.replace(unfinished, target)


def write_stage(directory: Path) -> None:
    """Lay the files out in `directory`; shiv packs their modes, so these are fixed too."""
    if directory.exists():
        shutil.rmtree(directory)
    for name, content in installed_files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o644)
        path.parent.chmod(0o755)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build dist/backy.")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "dist" / "backy")
    parser.add_argument("--stage", metavar="DIRECTORY", type=Path)
    args = parser.parse_args()
    if args.stage:
        write_stage(args.stage)
    else:
        write_archive(args.file, {"__main__.py": fill_in(MAIN), **installed_files()})


if __name__ == "__main__":
    main()
