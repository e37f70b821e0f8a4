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
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Dict

ROOT = Path(__file__).resolve().parent.parent

# Only what every sh has built in: a rescue system may have little else in its
# PATH.  Versions that backy is tested with come before newer ones.  Nothing
# after "exit" is read by the shell, nothing before the archive by Python.
PREAMBLE = r"""#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# backy @VERSION@: a zip archive; these lines only find a Python to run it with.
[ -z "$BACKY_PYTHON" ] || exec "$BACKY_PYTHON" -I "$0" "$@"
found=
for p in python3 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 \
    python3.14 python3.15 python3.16 python3.17 /usr/libexec/platform-python; do
    command -v "$p" >/dev/null 2>&1 || continue
    "$p" -ISc 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null &&
        exec "$p" -I "$0" "$@"
    v=$("$p" -V 2>&1) && found="$found${found:+, }${v#Python }"
done
echo "backy: UNKNOWN - needs Python 3.8 or newer, found ${found:+only }${found:-none}" >&2
exit 3
"""

# Python 2.7 must be able to read this.
MAIN = r"""# SPDX-License-Identifier: GPL-3.0-or-later
import sys

if sys.version_info < (3, 8):
    sys.stderr.write(
        "backy: UNKNOWN - needs Python 3.8 or newer, this is %d.%d (%s)\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(3)

from backy import main

sys.exit(main())
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
        write_archive(args.file, {"__main__.py": MAIN.encode(), **installed_files()})


if __name__ == "__main__":
    main()
