# SPDX-License-Identifier: GPL-3.0-or-later
"""The forms in which backy is handed out, in the surroundings where they must run.

One suite runs over all forms: the plain backy.py, dist/backy, the shiv file and
the installed wheel.  Each is built once, from a copy of the sources, into a
directory that every user can read.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "backy.py").read_text(encoding="utf-8"), re.MULTILINE
).group(1)
# The interpreter behind the virtual environment, which starts without it.
PYTHON = os.path.realpath(sys.executable)
STRANGER = 54321  # a user without an entry in /etc/passwd
IS_ROOT = os.geteuid() == 0


@dataclass(frozen=True)
class Form:
    """One form of the program and how it is started."""

    kind: str
    path: Path
    python: str = PYTHON  # behind a wheel's own start line

    def command(self, *options: str) -> List[str]:
        """The usual way to start it, or by an interpreter if `options` are for that."""
        if options or self.kind == "script":
            return [self.python, *options, str(self.path)]
        return [str(self.path)]

    def run(self, *args, options=(), **kwargs) -> subprocess.CompletedProcess:
        return run(*self.command(*options), *args, **kwargs)


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    """Run without a terminal; output as text unless it is sent elsewhere."""
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    kwargs.setdefault("stdout", subprocess.PIPE)
    kwargs.setdefault("stderr", subprocess.PIPE)
    kwargs.setdefault("timeout", 300)
    command = [str(word) for word in command]
    return subprocess.run(command, text=True, check=False, **kwargs)


def is_traceback_free(result: subprocess.CompletedProcess) -> bool:
    return "Traceback" not in (result.stdout or "") + (result.stderr or "")


def assert_shows_version(result: subprocess.CompletedProcess) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, f"backy {VERSION}\n", "")


def find_python(version: str) -> str:
    """An interpreter of exactly this version, or the test is skipped."""
    candidates = [f"python{version}"]
    for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")):
        candidates.append(str(path))
    question = "import sys; sys.stdout.write('%d.%d ' % sys.version_info[:2] + sys.executable)"
    for candidate in candidates:
        # Asked, not believed: a pyenv shim can stand for a version that is not there.
        with contextlib.suppress(FileNotFoundError):
            answer = run(candidate, "-c", question).stdout.partition(" ")
            if answer[0] == version:
                return answer[2]
    pytest.skip(f"no Python {version} on this host")


def find_program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on this host")
    return path


def become_stranger() -> None:
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)


# ==== Fixtures ================================================================


@pytest.fixture(scope="session")
def shelf():
    """A directory that every user can reach and read; pytest's own are private."""
    path = Path(tempfile.mkdtemp(prefix="backy-packaging-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def open_to_all(path: Path) -> None:
    """Undo what a strict umask did to `path` and all below it."""
    assert run("chmod", "-R", "a+rX", path).returncode == 0


def copy_sources(target: Path) -> Path:
    """What the builds read; a copy, since they write beside it."""
    for name in ("backy.py", "pyproject.toml", "COPYING", "Makefile", "tools/build.py"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(ROOT / name), str(target / name))
    return target


def build(sources: Path, *args, python=PYTHON, **kwargs) -> None:
    result = run(python, sources / "tools/build.py", *args, **kwargs)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def sources(shelf):
    path = copy_sources(shelf / "sources")
    open_to_all(path)
    return path


@pytest.fixture(scope="session")
def zipapp(sources, shelf):
    build(sources, shelf / "zipapp/backy")
    (shelf / "zipapp").chmod(0o755)
    return shelf / "zipapp/backy"


@pytest.fixture(scope="session")
def shiv(sources, shelf):
    program = Path(sys.executable).with_name("shiv")
    if not program.exists():
        pytest.skip(f"no shiv beside {sys.executable}")
    stage, path = shelf / "stage", shelf / "backy-shiv.pyz"
    build(sources, "--stage", stage)
    result = run(
        program, "--site-packages", stage, "--reproducible", "-e", "backy:main", "-o", path
    )
    assert result.returncode == 0, result.stderr
    open_to_all(path)
    return path


@pytest.fixture(scope="session")
def wheel(shelf):
    """The wheel, built as `pip install .` does, which needs a package index."""
    sources = copy_sources(shelf / "wheel-sources")
    result = run(
        *[sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--retries=1"],
        *["-w", shelf / "wheel", sources],
    )
    if "No matching distribution" in result.stderr:
        pytest.skip("pip finds no setuptools: no package index can be reached")
    assert result.returncode == 0, result.stderr
    (path,) = (shelf / "wheel").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def install_wheel(wheel, shelf):
    """A function that installs the wheel for one interpreter, once."""
    forms: Dict[str, Form] = {}

    def install(python: str) -> Form:
        if python not in forms:
            target = shelf / f"venv{len(forms)}"
            made = run(python, "-m", "venv", "--without-pip", target)
            assert made.returncode == 0, made.stdout + made.stderr
            (site_packages,) = target.glob("lib/python*/site-packages")
            # Only the pip of the tests is used, so no ensurepip is needed; it
            # writes the start line for the interpreter by which it is run.
            installed = run(
                *[sys.executable, "-m", "pip", "-q", "--python", target / "bin/python"],
                *["install", "--no-index", wheel],
            )
            assert installed.returncode == 0, installed.stderr
            assert (site_packages / "backy.py").exists()
            open_to_all(target)
            forms[python] = Form("wheel", target / "bin/backy", str(target / "bin/python"))
        return forms[python]

    return install


# The fast tests run on the archive, which has the script in it unchanged.  The script alone
# is started by tests of other files, as a user who may write nothing and by a relative path.
KINDS = [
    "zipapp",
    pytest.param("script", marks=pytest.mark.slow),
    pytest.param("shiv", marks=pytest.mark.slow),
    pytest.param("wheel", marks=pytest.mark.slow),
]


@pytest.fixture(params=KINDS)
def form(request):
    if request.param == "script":
        return Form("script", request.getfixturevalue("sources") / "backy.py")
    if request.param == "wheel":
        return request.getfixturevalue("install_wheel")(PYTHON)
    return Form(request.param, request.getfixturevalue(request.param))


@pytest.fixture
def surroundings(shelf, tmp_path):
    """An environment with little in it, in which python3 is the one under test."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "python3").symlink_to(PYTHON)
    cache = Path(tempfile.mkdtemp(dir=str(shelf)))
    cache.chmod(0o1777)
    # A shiv file unpacks itself below $HOME/.shiv before it does anything, and
    # dies with a traceback where it cannot.  That is its way and not ours to
    # mend, so it always gets another place.
    return {"PATH": f"{bin_directory}:/usr/bin:/bin:/usr/sbin:/sbin", "SHIV_ROOT": str(cache)}


# ==== Every form ==============================================================


def test_version_goes_to_stdout(form, surroundings):
    assert_shows_version(form.run("--version", env=surroundings))


def test_help_goes_to_stdout(form, surroundings):
    result = form.run("help", env=surroundings)
    assert (result.returncode, result.stderr) == (0, "")
    assert "backup" in result.stdout or "selftest" in result.stdout


def test_wrong_command_exits_with_1(form, surroundings):
    result = form.run("nosuchcommand", env=surroundings)
    assert (result.returncode, result.stdout) == (1, "")
    assert "nosuchcommand" in result.stderr
    assert is_traceback_free(result)


def test_status_of_an_empty_directory_is_no_traceback(form, surroundings, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = form.run("status", env=surroundings, cwd=str(empty))
    assert result.returncode in (0, 1)
    assert is_traceback_free(result)


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_needs_no_home(form, surroundings, home):
    if home:
        surroundings["HOME"] = home
    assert_shows_version(form.run("--version", env=surroundings))


def test_runs_isolated(form, surroundings):
    assert_shows_version(form.run("--version", options=["-I"], env=surroundings))


def test_runs_without_any_environment(form, surroundings):
    env = {"SHIV_ROOT": surroundings["SHIV_ROOT"]} if form.kind == "shiv" else {}
    assert_shows_version(form.run("--version", options=["-I"], env=env))


@pytest.mark.root
@pytest.mark.skipif(not IS_ROOT, reason="needs root, to become another user")
def test_runs_as_a_user_unknown_to_the_system_where_he_cannot_read(
    form, request, surroundings, tmp_path
):
    for python in (form.python, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            question = "import sys; sys.exit(sys.version_info < (3, 8))"
            if run(python, "-c", question, preexec_fn=become_stranger).returncode == 0:
                break
    else:
        pytest.skip("no Python here can be reached by other users")
    if form.kind != "wheel":
        form = Form(form.kind, form.path, python)
    elif form.python != python:
        form = request.getfixturevalue("install_wheel")(python)
    surroundings["PATH"] = f"{Path(python).parent}:/usr/bin:/bin"
    tmp_path.chmod(0o700)
    result = form.run("--version", env=surroundings, cwd=str(tmp_path), preexec_fn=become_stranger)
    assert_shows_version(result)


# Arguments: a directory that stays writable, a probe, then the command.
READ_ONLY = """
while read -r _ target _; do
    mount -o remount,bind,ro "$target" 2>/dev/null
done </proc/self/mounts
touch "$2" 2>/dev/null && exit 99
mount -t tmpfs tmpfs "$1" || exit 98
shift 2
exec "$@"
"""


@pytest.mark.root
@pytest.mark.skipif(not IS_ROOT, reason="needs root, to mount everything read-only")
def test_runs_where_nothing_can_be_written(form, surroundings, tmp_path):
    unshare = find_program("unshare")
    if run(unshare, "--mount", "true").returncode:
        pytest.skip("this host allows no private mounts")
    surroundings["HOME"] = str(tmp_path)
    result = run(
        *[unshare, "--mount", "sh", "-c", READ_ONLY, "sh"],
        *[surroundings["SHIV_ROOT"], tmp_path / "probe"],
        *form.command(),
        "--version",
        env=surroundings,
    )
    if result.returncode in (98, 99):
        pytest.skip("this host allows no read-only mounts")
    assert_shows_version(result)


def test_stdout_that_is_closed_is_no_traceback(form, surroundings):
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *form.command(), "--version"]
    assert is_traceback_free(run(*command, env=surroundings))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this host")
@pytest.mark.parametrize("words", ["--version", "help"])
def test_result_that_cannot_be_written_exits_with_1(form, surroundings, words):
    with open("/dev/full", "w") as full:
        result = form.run(words, stdout=full, env=surroundings)
    assert result.returncode == 1
    assert is_traceback_free(result)


def test_selftest_needs_no_open_files(form, surroundings, tmp_path):
    surroundings["TMPDIR"] = str(tmp_path)
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    result = run(*closed, *form.command(), "selftest", env=surroundings)
    if result.returncode:  # nothing was said, so let it say it again
        words = form.run("selftest", env=surroundings)
        pytest.fail(
            f"selftest exits with {result.returncode} without open files,"
            f" else with {words.returncode}:\n{words.stdout}{words.stderr}"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "selftest leaves files behind"


# ==== Every Python ============================================================


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
def test_runs_under(version, sources, zipapp, surroundings, tmp_path):
    python = find_python(version)
    surroundings["TMPDIR"] = str(tmp_path)
    surroundings["BACKY_PYTHON"] = python
    for form in (Form("script", sources / "backy.py", python), Form("zipapp", zipapp)):
        assert_shows_version(form.run("--version", env=surroundings))
        assert form.run("nosuchcommand", env=surroundings).returncode == 1
        result = form.run("selftest", env=surroundings)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_an_old_python_gets_one_line(version, zipapp, tmp_path):
    python = find_python(version)
    result = run(python, zipapp, "--version")
    assert (result.returncode, result.stdout) == (3, "")
    assert re.fullmatch(rf"backy: UNKNOWN - needs .*this is {version} .*\n", result.stderr)
    (tmp_path / "python3").symlink_to(os.path.realpath(python))
    result = run(zipapp, "--version", env={"PATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (3, "")
    assert re.fullmatch(rf"backy: UNKNOWN - needs .*found only {version}\.\d+\n", result.stderr)


# ==== The lines of sh before the archive ======================================

SHELLS = [["dash"], ["bash"], ["busybox", "sh"]]


@pytest.fixture(params=SHELLS, ids=lambda words: words[0])
def shell(request):
    return [find_program(request.param[0]), *request.param[1:]]


def write_fake_python(path: Path, version: str) -> None:
    """A program that answers like a Python of `version` and notes its arguments."""
    is_new = tuple(map(int, version.split("."))) >= (3, 8)
    path.write_text(
        "#!/bin/sh\n"
        f'echo "$1" >>"{path}.starts"\n'
        'case "$1" in\n'
        f"-V) echo Python {version} ;;\n"
        f"-ISc) exit {0 if is_new else 1} ;;\n"
        "*) printf '<%s>' \"$@\"; exit 42 ;;\n"
        "esac\n"
    )
    path.chmod(0o755)


def test_preamble_is_understood_by(shell, zipapp, surroundings):
    assert_shows_version(run(*shell, zipapp, "--version", env=surroundings))
    assert run(*shell, zipapp, "nosuchcommand", env=surroundings).returncode == 1


def test_preamble_hands_arguments_and_status_on(shell, zipapp, tmp_path):
    write_fake_python(tmp_path / "python3", "3.11.2")
    args = ["a b", "", "*", "--", "$x"]
    result = run(*shell, zipapp, *args, env={"PATH": str(tmp_path)})
    assert result.stdout == f"<-IS><{zipapp}>" + "".join(f"<{arg}>" for arg in args)
    assert (result.returncode, result.stderr) == (42, "")


def test_preamble_asks_one_python_only(zipapp, tmp_path):
    for name in ("python3", "python3.13", "python3.12"):
        write_fake_python(tmp_path / name, "3.12.1")
    run(zipapp, env={"PATH": str(tmp_path)})
    assert (tmp_path / "python3.starts").read_text() == "-ISc\n-IS\n"
    assert not (tmp_path / "python3.13.starts").exists()


def test_preamble_finds_a_newer_python_beside_an_old_one(shell, zipapp, tmp_path):
    write_fake_python(tmp_path / "python3", "3.6.8")
    (tmp_path / "python3.9").symlink_to(PYTHON)
    result = run(*shell, zipapp, "--version", env={"PATH": str(tmp_path)})
    assert_shows_version(result)


def test_preamble_tells_which_pythons_are_too_old(shell, zipapp, tmp_path):
    write_fake_python(tmp_path / "python3", "3.6.8")
    write_fake_python(tmp_path / "python3.8", "3.7.16")  # whatever its name says
    result = run(*shell, zipapp, "--version", env={"PATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith(
        "backy: UNKNOWN - needs Python 3.8 or newer, found only 3.6.8, "
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(
    os.path.exists("/usr/libexec/platform-python"), reason="this host has a platform-python"
)
def test_preamble_tells_that_there_is_no_python(shell, zipapp, tmp_path):
    result = run(*shell, zipapp, "--version", env={"PATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == "backy: UNKNOWN - needs Python 3.8 or newer, found none\n"


def test_preamble_passes_over_a_python_that_cannot_start(shell, zipapp, tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho 'pyenv: python3: command not found' >&2\nexit 127\n")
    broken.chmod(0o755)
    (tmp_path / "python3.12").symlink_to(PYTHON)
    assert_shows_version(run(*shell, zipapp, "--version", env={"PATH": str(tmp_path)}))


def test_environment_can_name_the_python(shell, zipapp, tmp_path):
    python = tmp_path / "my python"
    write_fake_python(python, "3.11.2")
    result = run(*shell, zipapp, "help", env={"PATH": "/nonexistent", "BACKY_PYTHON": str(python)})
    assert (result.returncode, result.stdout) == (42, f"<-IS><{zipapp}><help>")
    assert Path(f"{python}.starts").read_text() == "-IS\n"


def test_zipapp_runs_through_a_symlink(zipapp, surroundings, tmp_path):
    (tmp_path / "link").symlink_to(zipapp)
    assert_shows_version(run(tmp_path / "link", "--version", env=surroundings))


def test_zipapp_runs_from_a_path_with_blanks(zipapp, surroundings, tmp_path):
    path = tmp_path / "a  directory" / "back y's"
    path.parent.mkdir()
    shutil.copy(str(zipapp), str(path))
    assert_shows_version(run(path, "--version", env=surroundings))
    assert_shows_version(run(PYTHON, path, "--version", env=surroundings))


def test_zipapp_is_found_by_path(zipapp, surroundings):
    surroundings["PATH"] += f":{zipapp.parent}"
    assert_shows_version(run("sh", "-c", "backy --version", env=surroundings))


def test_zipapp_runs_by_a_relative_path(zipapp, surroundings):
    cwd = str(zipapp.parent)
    assert_shows_version(run("sh", "-c", "./backy --version", env=surroundings, cwd=cwd))
    assert_shows_version(run("sh", "backy", "--version", env=surroundings, cwd=cwd))


def test_zipapp_imports_nothing_from_the_current_directory_or_pythonpath(
    zipapp, surroundings, tmp_path
):
    for name in ("backy", "argparse", "subprocess", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a foreign module was imported')\n")
    surroundings["PYTHONPATH"] = str(tmp_path)
    assert_shows_version(run(zipapp, "--version", env=surroundings, cwd=str(tmp_path)))


# ==== The archive =============================================================


# ==== The compiled form that the archive keeps ================================


@pytest.fixture
def kept(zipapp, surroundings):
    """A function that runs the archive for a user, and the place of what it keeps."""
    cache = Path(surroundings["SHIV_ROOT"]) / "cache"
    cache.mkdir(mode=0o700)
    python, options = PYTHON, {}
    if IS_ROOT:  # whose place is fixed
        python, options = "/usr/bin/python3", {"preexec_fn": become_stranger}
        os.chown(cache, STRANGER, STRANGER)
    surroundings = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache)}

    def start():
        return run(python, "-I", zipapp, "--version", env=surroundings, **options)

    start.python = python
    return start, cache / "backy"


def seven(python: str) -> bytes:
    """Another program in its compiled form."""
    program = "import marshal; print(marshal.dumps(compile('main = lambda: 7', 'x', 'exec')).hex())"
    return bytes.fromhex(run(python, "-c", program).stdout)


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_the_compiled_form_is_kept_for_the_owner_alone(kept):
    start, place = kept
    assert_shows_version(start())
    assert place.stat().st_mode & 0o777 == 0o700
    assert only_file(place).stat().st_mode & 0o777 == 0o600


def test_the_compiled_form_is_what_runs_the_next_time(kept):
    start, place = kept
    start()
    only_file(place).write_bytes(seven(start.python))
    assert start().returncode == 7


@pytest.mark.parametrize(
    "damage",
    [b"\xe3", None, *(pytest.param(one, marks=pytest.mark.slow) for one in (b"", b"\0" * 100))],
)
def test_a_damaged_compiled_form_is_made_anew(kept, damage):
    start, place = kept
    start()
    path = only_file(place)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert_shows_version(start())
    assert len(path.read_bytes()) == len(whole)


def test_a_compiled_form_where_others_can_write_is_not_used(kept):
    start, place = kept
    start()
    only_file(place).write_bytes(seven(start.python))
    place.chmod(0o770)
    assert_shows_version(start())
    place.chmod(0o700)
    target = place.rename(place.with_name("elsewhere"))
    place.symlink_to(target)
    assert_shows_version(start())


def test_the_compiled_form_of_an_older_version_goes(kept):
    start, place = kept
    start()
    now = only_file(place)
    old = place / f"{'0' * 32}-{now.name.partition('-')[2]}"
    other = place / f"{'0' * 32}-cpython-2070000"
    now.rename(old)
    other.touch()
    assert_shows_version(start())
    assert set(place.iterdir()) == {now, other}


def test_archive_holds_plain_files_of_a_fixed_date(zipapp):
    with zipfile.ZipFile(str(zipapp)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            "__main__.py",
            f"backy-{VERSION}.dist-info/METADATA",
            "backy.py",
        ]
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.date_time == (1980, 1, 1, 0, 0, 0)
            assert (member.create_system, member.external_attr) == (3, 0o100644 << 16)
        assert archive.read("backy.py") == (ROOT / "backy.py").read_bytes()


def test_archive_tells_its_version_to_packaging_tools(zipapp):
    code = (
        "import importlib.metadata as m, sys\n"
        "found, = m.distributions(path=[sys.argv[1]])\n"
        "print(found.metadata['Name'], found.version, found.metadata['Requires-Python'])\n"
    )
    assert run(PYTHON, "-c", code, zipapp).stdout == f"backy {VERSION} >=3.8\n"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_build_depends_on_the_sources_only(umask, zipapp, tmp_path):
    sources = copy_sources(tmp_path / "elsewhere")
    for number, path in enumerate(sorted(sources.rglob("*"))):
        os.utime(str(path), (0, 10**9 + 10**7 * number))
    (sources / "backy.py").chmod(0o700)
    env = {"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": str(umask)}
    target = tmp_path / "dist/backy"
    build(sources, target, env=env, preexec_fn=lambda: os.umask(umask))
    assert target.read_bytes() == zipapp.read_bytes()
    assert target.stat().st_mode & 0o7777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["backy"]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
def test_build_gives_the_same_bytes_under(version, sources, zipapp, tmp_path):
    build(sources, tmp_path / "backy", python=find_python(version))
    assert (tmp_path / "backy").read_bytes() == zipapp.read_bytes()


@pytest.mark.slow
def test_wheel_needs_nothing_else(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        assert "backy.py" in archive.namelist()
        metadata = archive.read(f"backy-{VERSION}.dist-info/METADATA").decode()
    assert f"Version: {VERSION}\n" in metadata
    assert "Requires-Python: >=3.8\n" in metadata
    assert "GPL-3.0-or-later" in metadata
    assert "Requires-Dist" not in metadata


# ==== make ====================================================================


@pytest.fixture
def make(tmp_path):
    """A function that runs make in a copy of the sources."""
    program = find_program("make")
    sources = copy_sources(tmp_path / "sources")
    for name in ("backy.conf.example", "man", "contrib"):
        if (ROOT / name).is_dir():
            shutil.copytree(str(ROOT / name), str(sources / name))
        elif (ROOT / name).exists():
            shutil.copy(str(ROOT / name), str(sources / name))

    def run_make(*args):
        result = run(program, "-C", sources, f"PYTHON={PYTHON}", *args)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run_make


def list_files(directory: Path) -> List[str]:
    found = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(directory)) for path in found)


def test_make_builds_dist_backy(make, tmp_path, zipapp):
    make()
    assert (tmp_path / "sources/dist/backy").read_bytes() == zipapp.read_bytes()


def test_make_help_names_every_target(make):
    listed = {line.split()[0] for line in make("help").splitlines()}
    assert listed >= {"all", "help", "quick", "test", "test-all", "lint", "map", "bench"}
    assert listed >= {"shiv", "install", "install-bin", "dist", "clean"}


def test_make_install_puts_files_where_it_is_told(make, tmp_path, surroundings):
    target = tmp_path / "target"
    make("install", f"DESTDIR={target}", "PREFIX=/opt/backy")
    expected = ["opt/backy/bin/backy"]
    expected += [f"opt/backy/share/man/man1/{path.name}" for path in ROOT.glob("man/*.1")]
    expected += [f"opt/backy/share/man/man5/{path.name}" for path in ROOT.glob("man/*.5")]
    if (ROOT / "backy.conf.example").exists():
        expected += ["etc/backy.conf", "opt/backy/share/doc/backy/backy.conf.example"]
    for pattern in ("*.service", "*.timer"):
        for path in ROOT.glob(f"contrib/systemd/{pattern}"):
            expected.append(f"opt/backy/lib/systemd/system/{path.name}")
    for path in ROOT.glob("contrib/nagios/check_*"):
        expected.append(f"opt/backy/lib/nagios/plugins/{path.name}")
    assert list_files(target) == sorted(expected)
    assert_shows_version(run(target / "opt/backy/bin/backy", "--version", env=surroundings))


def test_make_install_keeps_a_configuration_that_is_there(make, tmp_path):
    conf = tmp_path / "target/etc/backy.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("mine\n")
    make("install", f"DESTDIR={tmp_path}/target")
    assert conf.read_text() == "mine\n"


def test_chapters_are_those_of_the_docstring():
    result = run(PYTHON, ROOT / "tools/map.py", ROOT / "backy.py")
    assert result.returncode == 0, result.stderr
