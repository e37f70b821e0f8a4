#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Print the chapters of backy.py: where each begins and how long it is.

Exits 1 if the banners are not the chapters that the module docstring lists.
There the list is the block of lines after the first one that ends in
"hapters:", either a table (title, two blanks or more, what it is for) or titles
with commas between them.
"""

import ast
import itertools
import re
import sys
from pathlib import Path
from typing import List, Tuple

BANNER = re.compile(r"# ==== (.+?) =+$")


def find_banners(text: str) -> List[Tuple[int, str]]:
    """Line number and title of every banner, in order."""
    matches = ((n, BANNER.match(line)) for n, line in enumerate(text.splitlines(), 1))
    return [(n, match.group(1)) for n, match in matches if match]


def parse_listing(docstring: str) -> List[str]:
    """Titles of the chapters that the docstring announces."""
    found = re.search(r"hapters:\n(?:[ \t]*\n)*((?:[ \t]*\S.*(?:\n|$))+)", docstring)
    if found is None:
        return []
    lines = [line.strip() for line in found.group(1).splitlines()]
    if any("  " in line for line in lines):
        indent = min(len(line) - len(line.lstrip()) for line in found.group(1).splitlines())
        # A line that is indented further continues the one above it.
        rows = [line[indent:] for line in found.group(1).splitlines()]
        return [re.split(r" {2,}", row)[0] for row in rows if not row.startswith(" ")]
    return [title.strip(" .") for title in " ".join(lines).split(",") if title.strip(" .")]


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "backy.py")
    text = path.read_text(encoding="utf-8")
    banners = find_banners(text)
    ends = [line for line, _ in banners[1:]] + [len(text.splitlines()) + 1]
    print(" line   size  chapter")
    for (line, title), end in zip(banners, ends):
        print(f"{line:5d}  {end - line:5d}  {title}")
    listed = parse_listing(ast.get_docstring(ast.parse(text)) or "")
    titles = [title for _, title in banners]
    if listed == titles:
        return 0
    for number, pair in enumerate(itertools.zip_longest(listed, titles, fillvalue="(none)"), 1):
        if pair[0] != pair[1]:
            print(
                "map: chapter {}: {} in the docstring, {} here".format(number, *pair),
                file=sys.stderr,
            )
            break
    return 1


if __name__ == "__main__":
    sys.exit(main())
