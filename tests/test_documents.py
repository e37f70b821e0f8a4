# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documents say is what the program does.

The README's console blocks are run and their output is compared in shape; the
manual pages are held against the parser and the keys, in both directions.
"""

from __future__ import annotations

import ast
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import COMPILED, PROGRAM, MiB, need_tool, noise, write_image

import backy

ROOT = PROGRAM.parent
README = ROOT / "README.md"
MANUAL = ROOT / "man/backy.1"
SETTINGS = ROOT / "man/backy.conf.5"
EXAMPLE = ROOT / "backy.conf.example"
PLUGIN = ROOT / "contrib/nagios/check_backy_age"
UNITS = sorted((ROOT / "contrib/systemd").glob("backy*"))
MARKDOWN = [README, *sorted(ROOT.glob("contrib/*/README.md"))]
PAGES = [MANUAL, SETTINGS]
DOCUMENTS = [*MARKDOWN, *PAGES, EXAMPLE, *UNITS]

PARSER, PARSERS = backy.make_parser()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ==== README =================================================================

MASKS = [
    (r"selftest in \S+ \(\w+\)", "selftest in DIR (FS)"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"),
    (r"\b[2-9A-HJ-NP-Za-km-z]{22}\b", "ID"),
    (r"\d+(\.\d+)? (Bytes?|bytes|[kMGT]i?B)(/s)?", "SIZE"),
    (r"\d+(\.\d+)?(e-?\d+)?", "N"),
    (r"--+", "--"),
    (r" +", " "),
]


def mask(text: str) -> list[str]:
    """The lines of `text` without what differs from run to run."""
    for pattern, word in MASKS:
        text = re.sub(pattern, word, text)
    return text.splitlines()


def matches(shown: list[str], real: list[str]) -> bool:
    """Whether the lines are equal; a line `...` stands for any lines, or none."""
    if not shown:
        return not real
    if shown[0] == "...":
        return any(matches(shown[1:], real[skipped:]) for skipped in range(len(real) + 1))
    return bool(real) and shown[0] == real[0] and matches(shown[1:], real[1:])


@pytest.mark.parametrize(
    ("shown", "real", "expected"),
    [
        ("a\n", "a\n", True),
        ("a\n", "b\n", False),
        ("a\n", "a\nb\n", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("...\nc\n", "a\nb\nc\n", True),
        ("...\nb\n", "a\nb\nc\n", False),
        ("1.5 s, 3 Bytes written\n", "12.0 s, 2.03 MiB written\n", True),
        ("zF45FLfqQtNPLAQ8Zw2sfH\n", "MRHUf6mADQ2evRwiUHB3Ra\n", True),
    ],
)
def test_shapes_are_compared_line_by_line(shown, real, expected):
    assert matches(mask(shown), mask(real)) is expected


def console_steps(text: str) -> list[tuple[str, str]]:
    """(command, output) of all console blocks, in order."""
    steps = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            steps.append((command, output))
    return steps


@pytest.fixture
def newcomer(tmp_path, cow):
    """A function that runs a line of the README as if on a machine of its own."""
    places = {"/srv/backy": cow / "backy", "/var/lib/libvirt/images": tmp_path / "images"}
    places["/etc"] = tmp_path / "etc"
    for place in places.values():
        place.mkdir()
    example = EXAMPLE.read_text(encoding="utf-8")
    for shown, real in places.items():
        example = example.replace(f": {shown}", f": {real}")
    (tmp_path / "backy.conf.example").write_text(example)
    image = write_image(
        tmp_path / "images/vm1.img", (MiB, noise(2 * MiB, 1)), (9 * MiB, b"x"), size=64 * MiB
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/backy").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{COMPILED}" "$@"\n')
    shutil.copy(tmp_path / "bin/backy", tmp_path / "backy.py")
    for name in ("bin/backy", "backy.py"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LC_ALL": "C", "TMPDIR": str(tmp_path)}

    def call(command: str) -> str:
        if " backup " in command:  # something has changed since the last one
            write_image(image, (2 * MiB, os.urandom(5000)))
        for shown, real in places.items():
            command = command.replace(shown, str(real))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, check=False, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}"
        output = done.stdout
        for shown, real in places.items():
            output = output.replace(str(real), shown)
        return output

    call.image, call.job = image, cow / "backy/vm1"
    return call


@pytest.mark.root
def test_readme_shows_what_its_commands_print(newcomer):
    steps = console_steps(README.read_text(encoding="utf-8"))
    assert {"selftest", "init", "backup", "status", "restore", "verify;"} <= {
        word for command, _ in steps for word in command.split()
    }
    for command, shown in steps:
        real = newcomer(command)
        assert matches(mask(shown), mask(real)), f"$ {command}\n{real}"
    last = newcomer.job / "last"
    assert last.read_bytes() == newcomer.image.read_bytes()  # also after the damage

    text = README.read_text(encoding="utf-8").partition("## On disk")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall("`([^`]+)`", row)}
    there = {"\n".join(mask(path.name)) for path in newcomer.job.iterdir()}
    assert there == listed


def test_readme_starts_with_a_file_that_can_be_started():
    assert console_steps(README.read_text(encoding="utf-8"))[0][0] == "./backy.py selftest"
    assert os.access(PROGRAM, os.X_OK)


def test_readme_lists_all_commands():
    rows = re.findall(r"^\| `backy ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(PARSERS)


def test_readme_has_a_place_for_the_figures():
    assert "\n## Figures\n" in README.read_text(encoding="utf-8")


def test_readme_is_one_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 215


def test_readme_names_targets_and_files_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in MARKDOWN:
        code = "\n".join(code_of(path))
        for words in re.findall(r"\bmake((?: [a-z][a-z-]*)+)", code):
            for target in words.split():
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path}: make {target}"
        for word in re.findall(r"(?<![\w/.])(?:man|contrib)/[\w./@-]*", code):
            assert (ROOT / word).exists(), f"{path}: {word}"


# ==== Manual pages ===========================================================


def macro_words(path: Path, macro: str) -> set[str]:
    """The arguments of one mdoc macro, wherever it stands on a macro line."""
    words = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("."):
            continue
        taking = False
        for token in line[1:].split():
            if re.fullmatch("[A-Z][a-z]", token):
                taking = token == macro
            elif taking and re.fullmatch(r"-?\w[\w-]*", token):
                words.add(token)
    return words


def option_strings(parser) -> set[str]:
    return {string for action in parser._actions for string in action.option_strings}


COMMON_OPTIONS = {"-h", "-b", "-l", "-v", "--version"}  # of every command
ALL_OPTIONS = {string for one in (PARSER, *PARSERS.values()) for string in option_strings(one)}


def test_manual_has_every_option_and_no_other():
    assert {f"-{word}" for word in macro_words(MANUAL, "Fl")} == ALL_OPTIONS


def test_manual_has_every_command_and_no_other():
    assert macro_words(MANUAL, "Cm") == set(PARSERS)
    items = re.findall(r"^\.It Cm ([a-z-]+)", MANUAL.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(items) == sorted(PARSERS)


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_synopsis_has_the_arguments_of(name):
    text = MANUAL.read_text(encoding="utf-8")
    synopsis = text.partition(".Sh SYNOPSIS")[2].partition(".Sh ")[0]
    forms = re.findall(rf"^\.Nm\n\.Cm {name}\n((?:\.(?!Nm).*\n)*)", synopsis, re.MULTILINE)
    assert forms
    form = "".join(forms)
    alternatives = re.findall(r"[|] (?:Fl )?(-?\w[\w-]*)", form)  # .Op Fl a | -oldest | r Ar SPEC
    flags = {f"-{flag}" for flag in [*re.findall(r"\bFl (-?\w[\w-]*)", form), *alternatives]}
    own = [
        action
        for action in PARSERS[name]._actions
        if not COMMON_OPTIONS & set(action.option_strings)
    ]
    for action in own:
        if action.option_strings:
            assert flags & set(action.option_strings), action.option_strings
        else:
            assert f"Ar {action.metavar}" in form
    assert flags <= option_strings(PARSERS[name])


def test_every_type_of_source_and_every_mode_is_in_the_manual():
    """Keys and their defaults: see test_configuration.py."""
    text = SETTINGS.read_text(encoding="utf-8")
    for mode in backy.VerifyMode:
        assert f".It Sy {mode.value}\n" in text
    for kind in filter(None, backy.Source.types()):
        assert kind in macro_words(SETTINGS, "Sy")


def test_manual_names_the_fields_of_json():
    revision = backy.Revision("x", datetime.now(timezone.utc), 0)
    words = set(re.findall(r"\w+", MANUAL.read_text(encoding="utf-8")))
    assert set(backy.revision_json(revision)) <= words


def test_manual_names_what_commands_add_to_these_fields(tmp_path, source, run):
    words = set(re.findall(r"\w+", MANUAL.read_text(encoding="utf-8")))
    run("-b", tmp_path / "job", "init", "file", source)
    run("-b", tmp_path / "job", "backup", "daily")
    for name in ("status", "verify"):
        done = run("-b", tmp_path / "job", name, "--json")
        (revision,) = json.loads(done.out)["revisions"]
        assert set(revision) <= words


def test_manual_names_the_keys_of_rev_files():
    words = set(re.findall(r"\w+", MANUAL.read_text(encoding="utf-8")))
    assert set(backy.REVISION_KEYS) <= words


@functools.lru_cache(maxsize=None)
def texts_of_program() -> list[str]:
    """All texts in the program; what is filled in is a blank, as in the messages below."""
    texts = [os.strerror(errno.ENOSPC), os.strerror(errno.EOPNOTSUPP)]
    for node in ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else " " for one in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(re.sub("%[sdr]|%[.]1f", " ", node.value))
    return [" ".join(text.split()) for text in texts]


def is_said(words: str, texts: list[str]) -> bool:
    """Whether one text has these words, or the first of them are one and another goes on."""
    cuts = [at for at, letter in enumerate(words) if letter == " "]
    return any(words in text for text in texts) or any(
        any(text.endswith(words[:at]) for text in texts)
        and any(text.startswith(words[at + 1 :]) for text in texts)
        for at in cuts
    )


BLANKS = re.compile(r"JOB: config: |, not 'x'|\b[A-Z]+\b(?: UTC)?|'x'|\(y\?\)|\.\.\.|\\&|: text$")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("ID is damaged: bytes N to N (N)", True),
        ("SOURCE changed while it was read", True),
        ("SOURCE melted while it was read", False),
        ("ID is damaged in N bytes and is now distrusted", False),
    ],
)
def test_messages_are_found_in_the_program(message, expected):
    texts = texts_of_program()
    pieces = [piece.strip(" :,()+") for piece in BLANKS.split(message)]
    assert all(is_said(piece, texts) for piece in pieces) is expected


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_diagnostics_are_what_the_program_says(page):
    texts = texts_of_program()
    for message in re.findall(r"^\.It Li (.*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        for piece in BLANKS.split(message):
            assert is_said(piece.strip(" :,()+"), texts), f"{message}: {piece!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_mandoc_finds_nothing_wrong_with(page):
    need_tool("mandoc")
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", str(page)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# ==== All documents ==========================================================


def code_of(path: Path) -> list[str]:
    """The pieces of a document that are to be typed, or that a program reads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        fences = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        return [*fences, *re.findall(r"`([^`]+)`", prose)]
    if path in PAGES:
        displays = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", text, re.MULTILINE | re.DOTALL)
        return [*displays, *re.findall(r"\bQl (.*)", text)]
    if path in UNITS:
        return re.findall(r"^Exec\w+=(.*)", text, re.MULTILINE)
    return re.findall(r"backy [a-z].*", text) if path == PLUGIN else []


CALL = re.compile(r"(?<![\w.$-])(?:backy|backy\.py)(?:\s+-[a-z]\s+\S+|\s+-v)*\s+([a-z][a-z-]*)")


@pytest.mark.parametrize("path", [*MARKDOWN, *PAGES, *UNITS], ids=name_of)
def test_no_command_is_mentioned_that_does_not_exist_in(path):
    mentioned = {word for piece in code_of(path) for word in CALL.findall(piece)}
    assert mentioned <= set(PARSERS)


def test_commands_are_found_where_they_are_mentioned():
    found = {word for path in DOCUMENTS for piece in code_of(path) for word in CALL.findall(piece)}
    assert found >= {"init", "backup", "status", "restore", "verify", "forget", "selftest"}


def test_help_examples_are_accepted_by_the_parser():
    for name, command in backy.COMMANDS.items():
        for line in command.examples.splitlines():
            call = re.search(r"backy ([^|)]*)", line)
            args = PARSER.parse_args(call[1].split())
            assert args.command == name


@pytest.mark.parametrize("path", [MANUAL, *MARKDOWN, *UNITS], ids=name_of)
def test_calls_in_documents_are_accepted_by_the_parser(path):
    for piece in code_of(path):
        for line in piece.replace("\\e\n", " ").replace("\\\n", " ").splitlines():
            call = re.match(r"(?:\$ |.*-?/usr/local/bin/)?backy (-b [^|;]*)", line)
            if call:
                words = re.sub(r"\s#.*", "", call[1]).split()
                assert PARSER.parse_args(words).command in PARSERS, line


# ==== contrib ================================================================


def test_systemd_accepts_the_units(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this host")
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8").replace("/usr/local/bin/backy", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    copies = [str(tmp_path / unit.name) for unit in UNITS]
    words = ["systemd-analyze", "--man=no", "verify", *copies]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_shellcheck_finds_nothing_wrong_with_the_plugin():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck on this host")
    done = subprocess.run(["shellcheck", str(PLUGIN)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def check_age(*words: object, program: Path) -> tuple[int, str]:
    env = {**os.environ, "BACKY": str(program)}
    done = subprocess.run(
        [str(PLUGIN), *map(str, words)], capture_output=True, text=True, env=env, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_plugin_understands_the_status_of_backy(tmp_path, source, run):
    job = tmp_path / "job"
    program = write_program(tmp_path / "backy", f'exec "{sys.executable}" "{COMPILED}" "$@"')
    assert run("-b", job, "init", "file", source).status == 0
    assert check_age(job, program=program) == (2, "CRITICAL: job has no good revision\n")
    assert run("-b", job, "backup", "daily").status == 0
    (job / "foreign.rev").write_text("a warning on standard error\n")
    status, line = check_age(job, program=program)
    assert status == 0
    assert re.fullmatch(
        r"OK: job: newest good revision is 0\.0 h old, 0 distrusted"
        r" \| age=\d+s;108000;129600;0 distrusted=0;0\n",
        line,
    )
    status, line = check_age(tmp_path / "none", program=program)
    assert (status, line[:16]) == (3, "UNKNOWN: backy: ")


@pytest.mark.parametrize(
    ("hours", "trust", "options", "expected"),
    [
        (1, "verified", [], 0),
        (1, "trusted", [], 0),
        (31, "verified", [], 1),
        (37, "verified", [], 2),
        (31, "verified", ["-w", "32"], 0),
        (3, "verified", ["-w1", "-c", "2"], 2),
        (1, "distrusted", [], 2),
    ],
)
def test_plugin_judges_the_age_of_the_newest_good_revision(
    hours, trust, options, expected, tmp_path
):
    moment = datetime.now(timezone.utc) - timedelta(hours=hours)
    revision = backy.Revision("x", moment, 0, duration=1.0, trust=backy.Trust(trust))
    status = {"version": 1, "job": "vm1", "revisions": [backy.revision_json(revision)]}
    (tmp_path / "status").write_text(json.dumps(status, indent=2))
    program = write_program(tmp_path / "backy", f'cat "{tmp_path}/status"')
    assert check_age(*options, "job", program=program)[0] == expected


@pytest.mark.parametrize("words", [[], ["-x", "job"], ["-w", "soon", "job"], ["-w", "", "job"]])
def test_plugin_used_wrongly_is_unknown(words, tmp_path):
    status, line = check_age(*words, program=tmp_path / "none")
    assert (status, line[:15]) == (3, "UNKNOWN: usage:")


@pytest.mark.parametrize("text", ["echo nonsense", "echo '{}'", "exit 1", "exec /nonexistent/x"])
def test_plugin_that_learns_nothing_is_unknown(text, tmp_path):
    status, line = check_age("job", program=write_program(tmp_path / "backy", text))
    assert status == 3
    assert line.startswith("UNKNOWN: ")
