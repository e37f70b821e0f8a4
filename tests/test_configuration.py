# SPDX-License-Identifier: GPL-3.0-or-later
"""Configuration: backy.conf, its includes, all that can be wrong with it, and its commands."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from conftest import COMPILED, PROGRAM, backy_process, need_root, write_image

import backy

ROOT = PROGRAM.parent
EXAMPLE = ROOT / "backy.conf.example"
MANUAL = ROOT / "man/backy.conf.5"

GOOD = """\
global:
    base-dir: {base}
schedules:
    default:
        daily: {{interval: 1d, keep: 9}}
        weekly: {{interval: 7d, keep: 5}}
    frequent:
        hourly: {{interval: 1h, keep: 25}}
        daily: {{interval: 1d, keep: 9}}
jobs:
    test01:
        schedule: default
        source:
            type: file
            filename: {base}/test01.img
    test02:
        schedule: frequent
        source: {{type: file, filename: {base}/test02.img, verify: written}}
"""


@pytest.fixture
def conf(tmp_path):
    """A function that writes a configuration and returns its path."""

    def write(text: str, name: str = "backy.conf") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("BASE", str(tmp_path)))
        path.chmod(0o600)
        return path

    return write


def errors(path: Path) -> list[str]:
    """The first lines of all remarks, without the path of the file."""
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(path))
    return [one.first_line.replace(f"{path}:", "", 1) for one in caught.value.remarks]


def good_job(name: str = "a", schedule: str = "s", source: str = "type: file, filename: /x") -> str:
    return f"{name}: {{schedule: {schedule}, source: {{{source}}}}}"


SCHEDULE = "schedules: {s: {daily: {interval: 1d, keep: 1}}}\n"


# -- what is read ---------------------------------------------------------------


def test_a_configuration_is_read(conf, tmp_path):
    path = conf(GOOD.format(base=tmp_path))
    settings = backy.load_settings(str(path))
    assert settings.path == str(path)
    assert settings.base_dir == str(tmp_path)
    assert settings.status_file == f"{tmp_path}/status"
    assert settings.worker_limit == 1
    assert settings.status_interval == timedelta(seconds=30)
    assert settings.telnet_addrs == ("127.0.0.1", "::1")
    assert (settings.telnet_port, settings.telnet_control) == (6023, False)
    assert list(settings.schedules) == ["default", "frequent"]
    assert list(settings.jobs) == ["test01", "test02"]
    job = settings.jobs["test02"]
    assert job.source == {
        "type": "file",
        "filename": f"{tmp_path}/test02.img",
        "verify": "written",
    }
    assert job.schedule is settings.schedules["frequent"]
    assert job.schedule.intervals == (
        backy.Interval("hourly", timedelta(hours=1), 25),
        backy.Interval("daily", timedelta(days=1), 9),
    )
    assert job.place == f"{path}:16"


def test_the_shortest_interval_comes_first_wherever_it_stands(conf):
    path = conf(
        "schedules: {s: {a: {interval: 2w, keep: 1}, b: {interval: 60, keep: 0}}}\njobs: {}\n"
    )
    schedule = backy.load_settings(str(path)).schedules["s"]
    assert schedule.tags == ("b", "a")
    assert schedule.intervals[0] == backy.Interval("b", timedelta(seconds=60), 0)


def test_defaults_are_those_of_old(conf):
    settings = backy.load_settings(str(conf("jobs: {}\n")))
    assert (settings.base_dir, settings.status_file) == ("/srv/backy", "/srv/backy/status")


@pytest.mark.parametrize(
    ("interval", "runtime"),
    [("1h", "6h"), ("2h", "6h"), ("3h", "9h"), ("1d", "3d"), ("60", "6h")],
)
def test_a_backup_may_take_three_intervals_and_at_least_six_hours(conf, interval, runtime):
    intervals = f"x: {{interval: {interval}, keep: 1}}, y: {{interval: 9d, keep: 1}}"
    path = conf(f"schedules: {{s: {{{intervals}}}}}\njobs: {{{good_job()}}}\n")
    job = backy.load_settings(str(path)).jobs["a"]
    assert job.max_runtime == backy.parse_duration(runtime)


def test_the_longest_runtime_may_be_given(conf):
    path = conf(
        SCHEDULE
        + "jobs: {a: {schedule: s, max-runtime: 90m, source: {type: file, filename: /x}}}\n"
    )
    assert backy.load_settings(str(path)).jobs["a"].max_runtime == timedelta(minutes=90)


def test_global_may_be_called_config(conf):
    path = conf("config: {worker-limit: 3}\njobs: {}\n")
    assert backy.load_settings(str(path)).worker_limit == 3


@pytest.mark.parametrize("both", ["global: {}\nconfig: {}", "config: {}\nglobal: {}"])
def test_both_names_of_global_are_an_error(conf, both):
    (line,) = errors(conf(f"{both}\njobs: {{}}\n"))
    assert line.startswith("2:1: ") and "keep one of them" in line


@pytest.mark.parametrize(
    "value",
    ["127.0.0.1, ::1", "[127.0.0.1, '::1']", '"127.0.0.1,::1,"', "[127.0.0.1, '::1', '::1']"],
)
def test_addresses_are_a_list_or_text(conf, value):
    path = conf(f"global:\n  telnet-addrs: {value}\njobs: {{}}\n")
    assert backy.load_settings(str(path)).telnet_addrs == ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    "value", ["'1.2.3'", "'[::1]'", "127.0.0.1:6023", "a b", "-x", "{}", "'::g'"]
)
def test_what_is_no_address_is_refused(conf, value):
    (line,) = errors(conf(f"global:\n  telnet-addrs: {value}\njobs: {{}}\n"))
    assert line.startswith("2:17: global: telnet-addrs is a list of addresses")


def test_paths_start_at_the_file_and_at_the_base_directory(conf, tmp_path):
    path = conf("global: {base-dir: store, status-file: run/x}\n" + SCHEDULE
                + "jobs: {" + good_job(source="type: file, filename: vm.img") + "}\n")  # fmt: skip
    settings = backy.load_settings(str(path))
    assert settings.base_dir == f"{tmp_path}/store"
    assert settings.status_file == f"{tmp_path}/store/run/x"
    assert settings.jobs["a"].source["filename"] == f"{tmp_path}/store/vm.img"


def test_the_status_file_may_name_the_base_directory(conf):
    path = conf("global: {base-dir: /b, status-file: '{base-dir}/x/status'}\njobs: {}\n")
    assert backy.load_settings(str(path)).status_file == "/b/x/status"


def test_braces_without_quotes_are_explained(conf):
    (line,) = errors(conf("global:\n  status-file: {base-dir}/x\njobs: {}\n"))
    assert "quote a value that holds brackets" in line


def test_a_relative_path_is_made_absolute_at_once(conf, tmp_path, monkeypatch):
    conf("jobs: {}\n")
    monkeypatch.chdir(tmp_path)
    assert backy.load_settings("backy.conf").path == f"{tmp_path}/backy.conf"


NAMES = ["on", "0123", "12:30", "1e3", "null", "No", "2015-11-05", "1_000", "a.b-c_d", "x" * 128]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_may_be_called(conf, name):
    path = conf(f"{SCHEDULE}jobs:\n  {good_job(name)}\n")
    assert list(backy.load_settings(str(path)).jobs) == [name]


def test_schedules_and_tags_may_look_like_other_types(conf):
    path = conf("schedules: {0123: {on: {interval: 1d, keep: 1}}}\n"
                f"jobs: {{{good_job(schedule='0123')}}}\n")  # fmt: skip
    assert backy.load_settings(str(path)).jobs["a"].schedule.tags == ("on",)


@pytest.mark.parametrize(
    "dump", [yaml.safe_dump, json.dumps, lambda value: json.dumps(value, indent=1)]
)
def test_what_programs_dump_means_the_same(conf, tmp_path, dump):
    source = {
        "type": "file",
        "filename": "/srv/images of many/" + "long words " * 20,
        "full-always": False,
    }
    value = {
        "global": {
            "base-dir": "/b",
            "worker-limit": 3,
            "telnet-control": True,
            "telnet-addrs": ["::1"],
        },
        "schedules": {
            "s": {"daily": {"interval": "1d", "keep": 9}, "hour": {"interval": 3600, "keep": 1}}
        },
        "jobs": {name[:120]: {"schedule": "s", "source": source} for name in NAMES},
    }
    settings = backy.load_settings(str(conf(dump(value))))
    assert sorted(settings.jobs) == sorted(name[:120] for name in NAMES)  # longer: `? name`
    for job in settings.jobs.values():
        assert job.source == {**source, "full-always": "false"}
        assert job.schedule.shortest == timedelta(hours=1)
    assert (settings.telnet_addrs, settings.telnet_control) == (("::1",), True)


@pytest.mark.parametrize("null", sorted(backy.PLAIN_NULL))
def test_nothing_is_spelled_as_yaml_does(conf, null):
    path = conf(
        f"global: {null}\ninclude: {null}\nschedules: {{s: {{d: {{interval: 1d, keep: 1}}}}}}\n"
        f"jobs: {{a: {{schedule: s, source: {{type: file, filename: /x}}, max-runtime: {null}}}}}\n"
    )
    settings = backy.load_settings(str(path))
    assert settings.base_dir == "/srv/backy"
    assert settings.jobs["a"].max_runtime == timedelta(days=3)


def test_anchors_and_notes_may_stand_at_the_top(conf):
    path = conf("x-daily: &daily {interval: 1d, keep: 3}\nx-note: [1, {a: b}]\n"
                f"schedules: {{s: {{daily: *daily}}}}\njobs: {{{good_job()}}}\n")  # fmt: skip
    assert backy.load_settings(str(path)).schedules["s"].intervals[0].keep == 3


def test_ten_thousand_jobs_are_read_at_once(conf):
    jobs = "".join(f"  {good_job(f'vm{number}')}\n" for number in range(2000))
    assert len(backy.load_settings(str(conf(f"{SCHEDULE}jobs:\n{jobs}"))).jobs) == 2000


# -- what is wrong --------------------------------------------------------------

OLD_EXAMPLE = """\
global:
    base-dir: /my/backydir
    worker-limit: 3
schedules:
    default:
        daily:
            interval: 1d
            keep: 9
    frequent:
        hourly:
            interval: 1h
            keep: 25
jobs:
    test01:
        schedule: default
        source:
            type: file
            filename: /path/to/vm/image
    test02:
        schedule: default
        source:
            type: ceph-rbd
            pool: rbd
            image: test02
    test03:
        schedule: hourly
        source:
            type: flyingcircus,
            consul_acl_token: a211c244
            vm: test03,
            pool: test
            image: test03.root
"""


def test_each_mistake_of_the_old_example_is_named(conf):
    path = conf(OLD_EXAMPLE)
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(path))
    types = ", ".join(sorted(filter(None, backy.Source.types())))
    assert (
        str(caught.value).replace(f"{path}:", "")
        == f"""\
26:19: job test03: no schedule 'hourly'
        schedule: hourly
                  ^^^^^^
    schedules are: default, frequent ('hourly' is an interval of frequent)
28:19: job test03: no source type 'flyingcircus,' in this version (flyingcircus?)
            type: flyingcircus,
                  ^^^^^^^^^^^^^
    source types are: {types}
    the comma is part of the value here
30:17: warning: 'test03,': the comma is part of the value here
            vm: test03,
                ^^^^^^^
2 errors, 1 warning"""
    )


def test_errors_have_a_summary_of_one_line(conf):
    path = conf(OLD_EXAMPLE)
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(path))
    assert caught.value.summary == (
        f"{path}: 2 errors, the first: {path}:26:19: job test03: no schedule 'hourly'"
    )
    path.write_text("jobs: x\n")
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(path))
    assert caught.value.summary == f"{path}:1:7: jobs is a mapping, not 'x'"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("jobs: [a]\n", "1:7: jobs is a mapping, not a list"),
        ("schedules: x\njobs: {}\n", "1:12: schedules is a mapping, not 'x'"),
        ("global: [1]\njobs: {}\n", "1:9: global is a mapping, not a list"),
        ("shedules: {}\njobs: {}\n", "1:1: unknown key 'shedules' (schedules?)"),
        ("global: {basedir: /x}\njobs: {}\n", "1:10: global: unknown key 'basedir' (base-dir?)"),
        ("jobs: {a: b}\n", "1:11: job a is a mapping, not 'b'"),
        ("schedules: {s: }\njobs: {}\n", "1:15: schedule s has no interval"),
        ("schedules: {s: {}}\njobs: {}\n", "1:16: schedule s has no interval"),
        ("schedules: {s: {d: {keep: 1}}}\njobs: {}\n", "1:17: schedule s.d has no interval"),
        (
            "schedules: {s: {d: {intervall: 1d, interval: 1d, keep: 1}}}\njobs: {}\n",
            "1:21: schedule s.d: unknown key 'intervall' (interval?)",
        ),
        (
            "schedules: {s: {d: {interval: 1d, keep: -1}}}\njobs: {}\n",
            "1:41: schedule s.d: keep is a number from 0 to 99999, not '-1'",
        ),
        (
            "schedules: {s: {12: {interval: 1d, keep: 1}}}\njobs: {}\n",
            "1:17: schedule s: '12' cannot be a tag: with -r it means something else",
        ),
        (
            "schedules: {s: {'a,b': {interval: 1d, keep: 1}}}\njobs: {}\n",
            "1:17: schedule s: 'a,b' is not one tag",
        ),
        (
            "schedules: {s: {a b: {interval: 1d, keep: 1}}}\njobs: {}\n",
            "1:17: schedule s: 'a b' cannot be a tag",
        ),
        (
            "schedules: {'': {d: {interval: 1d, keep: 1}}}\njobs: {}\n",
            "1:13: schedule : no schedule",
        ),
        (f"{SCHEDULE}jobs: {{{good_job('../x')}}}\n", "2:8: job ../x: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('.x')}}}\n", "2:8: job .x: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('-x')}}}\n", "2:8: job -x: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('a/b')}}}\n", "2:8: job a/b: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('a b')}}}\n", "2:8: job a b: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('status')}}}\n", "2:8: job status: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('last')}}}\n", "2:8: job last: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job('config')}}}\n", "2:8: job config: no job can be called so"),
        (f"{SCHEDULE}jobs: {{{good_job(schedule='t')}}}\n", "2:22: job a: no schedule 't'"),
        (f"{SCHEDULE}jobs: {{a: {{schedule: s}}}}\n", "2:8: job a has no source"),
        (
            f"{SCHEDULE}jobs: {{a: {{schedule: s, source: x}}}}\n",
            "2:33: job a: source is a mapping",
        ),
        (f"{SCHEDULE}jobs: {{{good_job(source='')}}}\n", "2:33: job a: its source has no type"),
        (f"{SCHEDULE}jobs: {{{good_job(source='type: file')}}}\n", "2:8: job a has no filename"),
        (
            f"{SCHEDULE}jobs: {{{good_job(source='type: tape')}}}\n",
            "2:40: job a: no source type 'tape' in this version",
        ),
        (
            f"{SCHEDULE}jobs: {{{good_job(source='type: file, filename: x, filenam: y')}}}\n",
            "2:59: job a: unknown key 'filenam' (filename?)",
        ),
        (
            f"{SCHEDULE}jobs: {{{good_job(source='type: file, filename: x, verify: no')}}}\n",
            "2:67: job a: verify is full, written or sample, not 'no'",
        ),
        (
            SCHEDULE + 'jobs: {a: {schedule: s, source: {type: file, filename: "a\\0b"}}}\n',
            "2:56: job a: filename is a path, not 'a\ufffdb'",
        ),
        (
            "global: {base-dir: /b, status-file: '{base-dir}/vm'}\n"
            f"{SCHEDULE}jobs: {{{good_job('vm')}}}\n",
            "3:8: job vm: no job can be called so: it is the name of one of backy's own files",
        ),
        ("a: 1\n\tb: 2\n", "2:1: tab in the indentation, use blanks"),
        ("jobs:\n  a: 1\n  a: 2\n", "3:3: duplicate key 'a', first on line 2"),
        ("jobs: !!map {}\n", "1:7: tags ('!') are not supported"),
        ("jobs:\n  <<: {}\n", "2:3: merge keys ('<<') are not supported"),
        ("jobs: {}\n---\njobs: {}\n", "2:1: several documents in one file are not supported"),
        ("jobs: " + "[" * 70 + "]" * 70, "1:70: nested deeper than 64 levels"),
        ("", " it is empty"),
        ("# nothing\n", " it is empty"),
        ("- a\n", " it is not a mapping"),
        ("global: {}\n", " it has no jobs"),
        ("jobs:\n", " it has no jobs"),
    ],
)
def test_a_mistake_is_named_with_its_place(conf, text, complaint):
    (line,) = errors(conf(text))
    assert line.startswith(complaint)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("worker-limit", ["0", "-1", "many", "1.5", "1001"]),
        ("status-interval", ["0", "-5", "soon", "0s"]),
        ("telnet-port", ["-1", "65536", "telnet"]),
        ("telnet-control", ["maybe", "2"]),
        ("space-warning", ["101%", "lots", "-1"]),
        ("base-dir", ["[a]", "{a: b}", "''"]),
    ],
)
def test_settings_are_checked(conf, key, values):
    for value in values:
        (line,) = errors(conf(f"global: {{{key}: {value}}}\njobs: {{}}\n"))
        assert line.startswith(f"1:{12 + len(key)}: global: {key} is ")


def test_all_mistakes_are_named_in_one_run(conf):
    path = conf(
        "global: {worker-limit: 0}\nzzz: 1\nschedules: {s: {d: {interval: 0, keep: x}}}\n"
        "jobs: {a: {schedule: t}, status: {schedule: s}}\n"
    )
    lines = errors(path)
    assert [line.split(" ")[0] for line in lines] == [
        *("1:24:", "2:1:", "3:31:", "3:40:", "4:8:", "4:22:", "4:26:", "4:26:"),
    ]


def test_a_broken_schedule_is_not_said_to_be_missing(conf):
    (line,) = errors(
        conf(f"schedules: {{s: {{d: {{interval: 0, keep: 1}}}}}}\njobs: {{{good_job()}}}\n")
    )
    assert "interval is" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{number}: 1\n" for number in range(50_000)),
        "schedules: {" + ", ".join(f"s{n}: {{d: {{interval: 1d, keep: 1}}}}" for n in range(4000))
        + "}\njobs: {" + ", ".join(good_job(f"v{n}", f"t{n}") for n in range(4000)) + "}\n",
        "jobs: {}\nx-list:\n" + "- a,\n" * 100_000 + "zzz: 1\n",
        "jobs: {" + "k" * 1_000_000 + ": {}}\n",
        "global: {worker-limit: " + "9" * 1_000_000 + "}\njobs: {}\n",
        "x-token: '" + "k" * 1_000_000 + "\n",
    ],
    ids=["keys", "schedules", "commas", "long key", "long number", "long secret"],
)  # fmt: skip
def test_thousands_of_mistakes_take_seconds_and_few_lines(conf, text):
    start = time.process_time()
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(conf(text)))
    assert time.process_time() - start < 10
    assert len(str(caught.value)) < 2_000_000


# -- files ----------------------------------------------------------------------


def one_line(path: object, run) -> str:
    result = run("check-config", "-c", path)
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1), result
    return result.err.strip()


def test_what_is_no_file_of_ours_is_one_line(tmp_path, run):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"#" * ((1 << 20) + 1))
    (tmp_path / "latin").write_bytes(b"jobs: {}\n# caf\xe9\n")
    for name, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "large", "larger than 1.00 MiB"),
        (tmp_path / "latin", "byte 0xE9 on line 2 is not UTF-8"),
    ):
        assert one_line(name, run) == f"{name}: {reason}"
    assert one_line("", run) == "-c: No such file or directory"
    assert "\x1b" not in one_line(tmp_path / "\x1b[2J", run)


def test_a_link_to_a_configuration_is_followed(conf, tmp_path, run):
    conf("jobs: {}\n")
    (tmp_path / "link").symlink_to("backy.conf")
    assert run("check-config", "-c", tmp_path / "link").status == 0


@pytest.mark.root
def test_root_reads_nothing_that_others_may_write(conf, run):
    need_root()
    path = conf("jobs: {}\n")
    for mode in (0o602, 0o620, 0o666):
        path.chmod(mode)
        assert one_line(path, run).startswith(f"{path}: others than root may write to it (mode 0")
    path.chmod(0o644)
    assert run("check-config", "-c", path).status == 0


def as_nobody(*words: object) -> subprocess.CompletedProcess:
    """Run the program as a user who owns nothing."""
    need_root()
    call = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import backy; sys.exit(backy.main())"
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = subprocess.run(
        [*user, "/usr/bin/python3", "-c", call, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if "No module named" in done.stderr or "Permission denied: '/root" in done.stderr:
        pytest.skip("other users cannot read the program here")
    return done


# -- include --------------------------------------------------------------------


def test_schedules_and_jobs_may_stand_in_files_of_their_own(conf, tmp_path):
    main = conf("include: [d/*.conf, more/x]\nglobal: {base-dir: /b}\n")
    conf("schedules: {s: {d: {interval: 1d, keep: 1}}}\n", "d/10-schedules.conf")
    second = conf(f"jobs:\n  {good_job('b')}\n  {good_job('c')}\n", "d/20.conf")
    conf(f"jobs: {{{good_job('d')}}}\nx-note: 1\n", "more/x")
    conf(f"jobs: {{{good_job('a')}}}\n", "d/30.conf")
    conf("never read", "d/.hidden.conf")
    conf("never read", "d/20.conf~")
    settings = backy.load_settings(str(main))
    assert list(settings.jobs) == ["b", "c", "a", "d"]
    assert settings.jobs["c"].place == f"{second}:3"


def test_relative_includes_start_at_the_file_and_not_at_the_current_directory(conf, monkeypatch):
    main = conf("include: d/*.conf\n")
    conf("jobs: {}\n", "d/x.conf")
    monkeypatch.chdir("/")
    assert backy.load_settings(str(main)).jobs == {}


def test_a_name_in_two_files_is_an_error_that_names_both(conf, tmp_path):
    main = conf(f"include: [one, two]\n{SCHEDULE}")
    conf(f"jobs:\n  {good_job('x')}\n", "one")
    conf(f"{SCHEDULE}jobs: {{{good_job('x')}}}\nglobal: {{}}\n", "two")
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(main))
    assert [one.first_line for one in caught.value.remarks] == [
        f"{tmp_path}/two:1:13: schedule s is also at {main}:2",
        f"{tmp_path}/two:2:8: job x is also at {tmp_path}/one:2",
    ]


@pytest.mark.parametrize(
    ("include", "complaint"),
    [
        ("none.conf", "1:10: include: BASE/none.conf: No such file or directory"),
        ("[d, 'backy.conf']", "1:14: include: BASE/backy.conf is this file itself"),
        ("[d]", "1:11: include: BASE/d: not a regular file"),
        ("/dev/zero", "1:10: include: /dev/zero: not a regular file"),
        ("{a: b}", "1:10: include is a list, or text with commas, not a mapping"),
        ("[[d]]", "1:11: include is a list, or text with commas, not a list"),
        ('["a\\0b"]', "1:11: include: no file is called so"),
    ],
)
def test_what_cannot_be_included_is_named(conf, tmp_path, include, complaint):
    path = conf(f"include: {include}\njobs: {{}}\n")
    (tmp_path / "d").mkdir()
    lines = errors(path)
    assert complaint.replace("BASE", str(tmp_path)) in lines


def test_a_pattern_may_match_nothing(conf):
    assert backy.load_settings(str(conf("include: [d/*.conf, '?', '[ab]']\njobs: {}\n"))).jobs == {}


def test_a_file_that_two_patterns_match_is_read_once(conf):
    main = conf(f"include: [d/*.conf, d/x.conf]\n{SCHEDULE}")
    conf(f"jobs: {{{good_job()}}}\n", "d/x.conf")
    assert list(backy.load_settings(str(main)).jobs) == ["a"]


def test_an_included_file_includes_nothing(conf, tmp_path):
    main = conf("include: x\n")
    conf("include: backy.conf\njobs: {}\n", "x")
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(main))
    (remark,) = caught.value.remarks
    assert remark.first_line == f"{tmp_path}/x:1:10: an included file cannot include others"


def test_a_mistake_in_an_included_file_is_named_there(conf, tmp_path):
    main = conf(f"include: x\njobs: {{{good_job()}}}\n")  # what is in x is not said to be missing
    conf("schedules:\n  s: {\n", "x")
    with pytest.raises(backy.ConfigErrors) as caught:
        backy.load_settings(str(main))
    (remark,) = caught.value.remarks
    assert remark.first_line.startswith(f"{tmp_path}/x:2:6: '{{' is never closed")


# -- the config of a job --------------------------------------------------------


def test_the_config_of_a_job_comes_back_as_it_was(conf, tmp_path):
    path = conf(GOOD.format(base=tmp_path))
    for name, job in backy.load_settings(str(path)).jobs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config").write_bytes(backy.job_config(job))
        with backy.Repository.open(str(tmp_path / name)) as repository:
            loaded = backy.load_job(repository)
        assert loaded.schedule.intervals == job.schedule.intervals
        assert loaded.source.filename == job.source["filename"]
        assert loaded.verify.value == job.source.get("verify", "full")


def test_the_config_of_a_job_has_the_form_of_backy_2_5(conf, tmp_path):
    path = conf(GOOD.format(base=tmp_path))
    value = yaml.safe_load(backy.job_config(backy.load_settings(str(path)).jobs["test02"]))
    assert value == {
        "source": {"type": "file", "filename": f"{tmp_path}/test02.img", "verify": "written"},
        "schedule": {
            "hourly": {"interval": "1h", "keep": 25},
            "daily": {"interval": "1d", "keep": 9},
        },
    }


def load_config(directory: Path, text: str) -> backy.Job:
    (directory / "config").write_text(text)
    with backy.Repository.open(str(directory)) as repository:
        return backy.load_job(repository)


def test_a_flat_config_has_no_schedule(tmp_path):
    assert load_config(tmp_path, "{filename: /x, type: file}\n").schedule is None
    assert load_config(tmp_path, "source: {filename: /x, type: file}\n").schedule is None


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        ("x", "schedule is a mapping, not 'x'"),
        ("{daily: {interval: 0, keep: 1}}", "schedule.daily: interval is a number with s"),
        ("{daily: {interval: 1d}}", "schedule.daily has no keep"),
        ("{}", "schedule has no interval"),
    ],
)
def test_a_broken_schedule_in_a_config_is_an_error(tmp_path, schedule, complaint):
    with pytest.raises(backy.ConfigError) as caught:
        load_config(tmp_path, f"source: {{filename: /x, type: file}}\nschedule: {schedule}\n")
    assert str(caught.value).startswith(f"{tmp_path.name}: config: {complaint}")


# -- check-config ---------------------------------------------------------------


@pytest.fixture
def clean(conf, cow):
    """A configuration with nothing to complain of, and its base directory."""
    for name in ("test01.img", "test02.img"):
        write_image(cow / name, (0, b"x"))
    path = conf(GOOD.format(base=cow))
    return path, cow


def warnings(run, path) -> list[str]:
    result = run("check-config", "-c", path)
    assert result.status == 0, result
    lines = [line for line in result.err.splitlines() if ": warning: " in line]
    counted = f", {len(lines)} warning{'' if len(lines) == 1 else 's'}" if lines else ""
    assert result.out.endswith(f"no errors{counted}\n")
    return [line.partition(": warning: ")[2] for line in lines]


def test_nothing_is_said_of_a_good_configuration(clean, run):
    result = run("check-config", "-c", clean[0])
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{clean[0]}: 2 jobs, 2 schedules, no errors\n"
    assert sorted(path.name for path in clean[1].iterdir()) == ["test01.img", "test02.img"]


@pytest.mark.parametrize("words", [("check-config",), ("config", "check")])
def test_the_configuration_may_be_named_before_and_behind_the_command(clean, run, words):
    before = run("-c", clean[0], *words)
    behind = run(*words, "-c", clean[0])
    assert before.status == behind.status == 0
    assert before.out == behind.out == f"{clean[0]}: 2 jobs, 2 schedules, no errors\n"


def test_mistakes_are_printed_for_editors_to_jump_to(conf, run):
    path = conf(OLD_EXAMPLE)
    for words in (("check-config",), ("config", "check")):
        result = run(*words, "-c", path)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith(f"{path}:26:19: job test03: ")
        assert result.err.endswith("\n2 errors, 1 warning\n")


def test_other_commands_say_the_same_of_mistakes(conf, run):
    path = conf(OLD_EXAMPLE)
    result = run("config", "show", "-c", path)
    assert result.status == 1
    assert result.err == "backy: " + run("check-config", "-c", path).err


def change(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_two_jobs_on_one_source_are_noticed(clean, run):
    path, base = clean
    (base / "link.img").symlink_to("test01.img")
    change(path, ("test02.img", "link.img"))
    assert warnings(run, path) == ["job test02 has the same source as job test01"]


def test_a_source_that_is_not_there_is_noticed(clean, run):
    path, base = clean
    (base / "test02.img").unlink()
    assert warnings(run, path) == [f"job test02: there is no {base}/test02.img"]


@pytest.mark.root
def test_a_source_that_does_not_answer_is_noticed_and_holds_up_nothing(clean, hung_directory):
    path, base = clean
    path.write_text(path.read_text().replace(f"{base}/test01.img", f"{hung_directory}/test01.img"))
    started = time.monotonic()
    done = backy_process("check-config", "-c", path, timeout=60)
    assert done.returncode == 0
    assert f"{hung_directory}/test01.img does not answer" in done.stderr
    assert "test02" not in done.stderr
    assert time.monotonic() - started < 30


def test_directories_of_no_job_are_noticed(clean, run):
    path, base = clean
    for name in ("old", "lost+found", "empty", "test01"):
        (base / name).mkdir()
    (base / "old/config").write_text("x")
    (base / "test01/config").write_text("x")
    (base / "\x1b[2J").mkdir()
    (base / "\x1b[2J/a.rev").write_text("x")
    assert warnings(run, path) == [
        f"{base}/\ufffd[2J belongs to no job",
        f"{base}/old belongs to no job",
    ]


def test_a_missing_base_directory_is_noticed(clean, run):
    path, base = clean
    change(path, (f"base-dir: {base}", "base-dir: /nowhere/backy"))
    lines = warnings(run, path)
    assert lines[0] == "global: base-dir /nowhere/backy: No such file or directory"
    change(path, ("/nowhere/backy", "/dev/null"))
    assert "global: base-dir /dev/null is not a directory" in warnings(run, path)


def test_a_base_directory_whose_file_system_is_not_mounted_is_noticed(
    clean, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(backy, "FSTAB", str(tmp_path / "fstab"))
    path, base = clean
    silent = [f"#/dev/sdb1 {base} xfs", "/dev/sda1 / ext4", "/dev/sda2 none swap sw 0 0", "", "x"]
    silent += ["proc /proc proc defaults", f"/dev/sdc1 {base}2 xfs defaults 0 0"]
    (tmp_path / "fstab").write_text("\n".join(silent))
    assert "fstab" not in run("check-config", "-c", path).err
    for place in (base, f"{base}/", f"{base}/."):
        (tmp_path / "fstab").write_text("\n".join([*silent, f"/dev/sdb1 {place} xfs noauto 0 0"]))
        assert [
            f"{base} is in /etc/fstab and not mounted" in one for one in warnings(run, path)
        ] == [True]


def test_places_in_fstab_are_read_as_mount_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(backy, "FSTAB", str(tmp_path / "fstab"))
    (tmp_path / "my disk").mkdir()
    (tmp_path / "link").symlink_to("my disk")
    (tmp_path / "fstab").write_text(f"LABEL=x\t{tmp_path}/my\\040disk\txfs\tdefaults\t0 0\n")
    place = str(tmp_path / "my disk")
    assert backy.unmounted_above(str(tmp_path / "link/vms")) == place
    assert backy.unmounted_above(str(tmp_path)) == ""
    (tmp_path / "fstab").unlink()
    assert backy.unmounted_above(place) == ""


def test_a_file_system_without_reflinks_is_noticed(clean, ext4, run):
    path, base = clean
    change(path, (f"base-dir: {base}", f"base-dir: {ext4}"))
    (line,) = warnings(run, path)
    assert line.startswith(f"global: no reflinks on the file system of {ext4}")
    assert not list(ext4.iterdir())


def test_a_secret_that_all_may_read_is_noticed_and_not_shown(clean, run):
    path, _ = clean
    change(path, ("global:", "x-api_token: hunter2\nglobal:"))
    assert warnings(run, path) == []
    path.chmod(0o644)
    result = run("check-config", "-c", path)
    assert "1:14: warning: a secret in a file that every user may read" in result.err
    assert f"chmod o-r {path}" in result.err
    assert "hunter2" not in result.err
    change(path, ("x-api_token: hunter2", "x-api_token:"))
    assert warnings(run, path) == []


def test_a_secret_that_all_may_read_is_noticed_among_mistakes(conf, run):
    path = conf(OLD_EXAMPLE)
    path.chmod(0o644)
    result = run("check-config", "-c", path)
    assert f"{path}:29:31: warning: a secret in a file that every user may read" in result.err
    assert result.err.endswith("\n2 errors, 2 warnings\n")
    assert "a211c244" not in result.err


@pytest.mark.parametrize(
    ("setting", "warning"),
    [
        ("worker-limit: 999", "worker-limit is 999, and there are"),
        ("status-interval: 2d", "check learns of nothing for so long"),
        ("telnet-addrs: 0.0.0.0", "whoever reaches 0.0.0.0 can use the telnet shell"),
        ("status-file: /nowhere/status", "there is no directory /nowhere"),
    ],
)
def test_settings_that_are_hardly_meant_are_noticed(clean, run, setting, warning):
    change(clean[0], ("global:\n", f"global:\n    {setting}\n"))
    (line,) = warnings(run, clean[0])
    assert line.startswith(f"global: {warning}")


def test_schedules_that_are_hardly_meant_are_noticed(clean, run):
    change(
        clean[0],
        ("jobs:\n", "    other:\n        daily: {interval: 1d, keep: 1}\njobs:\n"),
        ("hourly: {interval: 1h, keep: 25}", "hourly: {interval: 1h, keep: 0}"),
        ("weekly: {interval: 7d, keep: 5}", "manual:x: {interval: 365d, keep: 100}"),
    )
    assert warnings(run, clean[0]) == [
        "schedule default.manual:x: tags with manual: are for backups made by hand",
        "schedule default.manual:x: 100 revisions will be there only after 100 years",
        "schedule frequent.hourly: keep is 0, so nothing with this tag ever expires",
        "schedule other is not used by any job",
    ]


@pytest.mark.root
def test_a_user_who_may_read_nothing_else_can_check(conf, tmp_path):
    path = conf(GOOD.format(base="/root/secret"))
    assert as_nobody("check-config", "-c", path).stderr.endswith("backy.conf: Permission denied\n")
    for above in (tmp_path, *tmp_path.parents):
        if not above.stat().st_mode & 1 and str(above).startswith("/tmp/"):
            above.chmod(above.stat().st_mode | 0o011)
    path.chmod(0o644)
    done = as_nobody("check-config", "-c", path)
    assert (done.returncode, done.stderr) == (0, "")


# -- config show ----------------------------------------------------------------


def test_all_that_holds_is_shown_with_its_origin(clean, run):
    path, base = clean
    text = run("config", "show", "-c", path).out
    lines = [re.sub("  +# ", "  # ", line.strip()) for line in text.splitlines()]
    assert f"base-dir: {base}  # {path}:2" in lines
    assert "worker-limit: 1  # default" in lines
    assert f"interval: 7d  # {path}:6" in lines
    assert "max-runtime: 6h  # default" in lines and "max-runtime: 3d  # default" in lines
    assert f"verify: written  # {path}:18" in lines and "verify: full  # default" in lines


def test_what_is_shown_is_a_configuration_that_means_the_same(clean, conf, run):
    path, _ = clean
    change(path, ("test01:", "'on':"), ("test02:", "0123:"), ("daily:", "null:"))
    shown = conf(run("config", "show", "-c", path).out, "shown.conf")
    first, second = (backy.load_settings(str(one)) for one in (path, shown))
    assert second.schedules == first.schedules
    assert [one.schedule for one in second.jobs.values()] == list(first.schedules.values())
    assert [one.max_runtime for one in second.jobs.values()] == [
        timedelta(days=3),
        timedelta(hours=6),
    ]
    assert {name: {**one.source} for name, one in first.jobs.items()}.keys() == second.jobs.keys()
    assert run("config", "show", "-c", shown).out.count("# default") == 0


def test_json_has_the_same(clean, run):
    path, base = clean
    value = json.loads(run("config", "show", "--json", "-c", path).out)
    assert (value["version"], value["path"], value["files"]) == (1, str(path), [str(path)])
    assert value["global"]["base-dir"] == {"value": str(base), "from": f"{path}:2"}
    assert value["global"]["telnet-addrs"] == {"value": ["127.0.0.1", "::1"], "from": "default"}
    assert value["schedules"]["default"]["weekly"]["interval"]["value"] == 604800
    job = value["jobs"]["test02"]
    assert job["source"]["verify"] == {"value": "written", "from": f"{path}:18"}
    assert job["max-runtime"] == {"value": 21600, "from": "default"}


def test_paths_are_shown_as_they_are_used(conf, tmp_path, run):
    source = good_job(source="type: file, filename: x")
    path = conf(f"global: {{base-dir: b}}\n{SCHEDULE}jobs: {{{source}}}\n")
    text = run("config", "show", "-c", path).out
    for line in (
        f"base-dir: {tmp_path}/b ",
        f"status-file: {tmp_path}/b/status ",
        f"{tmp_path}/b/x ",
    ):
        assert line in text


def test_a_setting_of_an_included_file_is_shown_with_its_place(conf, tmp_path, run):
    main = conf(f"include: x\n{SCHEDULE}")
    conf(f"\njobs: {{{good_job()}}}\n", "x")
    assert f"# {tmp_path}/x:2\n" in run("config", "show", "-c", main).out


def test_secrets_are_not_shown(conf, run):
    options = (*backy.FileSource.keys, "consul_acl_token")
    source = "type: file, filename: /x, consul_acl_token: hunter2"
    path = conf(f"{SCHEDULE}jobs: {{{good_job(source=source)}}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backy.FileSource, "keys", options)
        for words in ((), ("--json",)):
            result = run("config", "show", *words, "-c", path)
            assert result.status == 0 and "(secret)" in result.out
            assert "hunter2" not in result.out
        job = backy.load_settings(str(path)).jobs["a"]
        assert "hunter2" in backy.job_config(job).decode()  # the backup needs it


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("config",), "required: ACTION"),
        (("config", "shew"), "argument ACTION: no 'shew'"),
        (("config", "check", "--json"), "--json goes with config show"),
        (("-c", "x", "status"), "status takes no -c"),
        (("status", "-c", "x"), "unrecognized arguments: -c x"),
        (("check-config", "-r", "1"), "unrecognized arguments: -r 1"),
    ],
)
def test_wrong_usage_is_said(run, words, complaint):
    result = run(*words)
    assert (result.status, result.out) == (1, "")
    assert complaint in result.err


# -- the tables, the manual and the example ---------------------------------------


def tables() -> dict[str, tuple[backy.Option, ...]]:
    """All keys, by the place where they stand."""
    sources = {kind: one.options() for kind, one in backy.Source.types().items() if kind}
    return {
        "top": backy.TOP_OPTIONS,
        "global": backy.GLOBAL_OPTIONS,
        "interval": backy.INTERVAL_OPTIONS,
        "job": backy.JOB_OPTIONS,
        **sources,
    }


def test_every_key_is_in_the_manual_with_its_default_and_no_other():
    text = MANUAL.read_text(encoding="utf-8")
    items = re.findall(r"^\.It Ic ([\w-]+).*\n((?:(?!\.It Ic |\.El).*\n)*)", text, re.MULTILINE)
    known = {option.name: option for table in tables().values() for option in table}
    assert sorted(name for name, _ in items) == sorted(known)
    for name, body in items:
        default = known[name].default
        if default and known[name].kind is not backy.SECTION:
            words = [backy.re.escape(word) for word in default.split()]
            pattern = r"default is\s+(?:\.\w\w )?" + r"\s+".join(words)
            assert re.search(pattern, body), f"{name}: {default}"


def test_the_manual_has_the_keys_in_the_order_of_the_tables():
    names = re.findall(r"^\.It Ic ([\w-]+)", MANUAL.read_text(encoding="utf-8"), re.MULTILINE)
    for table in tables().values():
        places = [names.index(option.name) for option in table]
        assert places == sorted(places)


def uncommented() -> str:
    return re.sub(
        r"^( *)#(?=[a-z])", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE
    )


def test_every_key_is_in_the_example_with_its_default_and_no_other(conf):
    configuration = backy.Configuration(str(conf(uncommented())))
    configuration.load()
    assert not configuration.remarks
    top = {name: None for name in configuration.documents[configuration.path].root.entries}
    seen = {*top, "interval", "keep", "config", "source-types"}
    common = {option.name: option for option in (*backy.GLOBAL_OPTIONS, *backy.JOB_OPTIONS)}
    places = [(common, {**configuration.settings, **configuration.jobs["vm1"]})]
    for source in configuration.sources.values():
        kind = backy.Source.types()[source["type"].value]
        places.append(({option.name: option for option in kind.options_for(source)}, source))
    for options, given in places:
        seen |= {name for name, value in given.items() if value.node is not None}
        for name, value in given.items():
            if options[name].default and name not in ("status-file",):
                assert value.value == backy.default_of(options[name]).value, name
    assert all(value.node for value in configuration.sources["vm1"].values())
    wanted = {option.name for table in tables().values() for option in table}
    assert wanted <= seen


def test_the_example_is_a_working_minimum(conf, run):
    path = conf(EXAMPLE.read_text(encoding="utf-8"))
    settings = backy.load_settings(str(path))
    full = backy.load_settings(str(conf(uncommented(), "full.conf")))
    assert full.jobs["vm1"].max_runtime == settings.jobs["vm1"].max_runtime
    assert full.status_file == settings.status_file
    assert full.schedules == settings.schedules
    for line in warnings(run, path):
        assert "No such file" in line or "there is no" in line or "no reflinks" in line


def test_the_program_runs_from_elsewhere_with_a_relative_path(conf, tmp_path):
    conf("jobs: {}\n")
    done = subprocess.run(
        [sys.executable, str(COMPILED), "-c", "backy.conf", "config", "check"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path}/backy.conf: 0 jobs, 0 schedules, no errors")


# -- many configurations -----------------------------------------------------------

SOME_OR_ALL = [60, pytest.param(1500, marks=pytest.mark.slow)]


def random_configuration(choice: random.Random) -> dict:
    """A faultless configuration, as a program has it before it dumps it."""
    times = ["60", 60, "90s", "15m", "12h", "1d", "7d", "2w", 86400]
    names = [*NAMES[:-1], "daily", "hourly", "x", "y" * 60]
    tags = ["daily", "hourly", "on", "null", "a.b", "x:y", "w+1", "t_1"]
    schedules = {
        name: {
            tag: {
                "interval": choice.choice(times),
                "keep": choice.choice([0, 1, "7", 99999]),
            }
            for tag in choice.sample(tags, choice.randint(1, 4))
        }
        for name in choice.sample(names, choice.randint(1, 3))
    }
    sources = [
        {"type": "file", "filename": choice.choice(["/a b", "/x: y", "/\xe4", "/#", "/it's", "on"])}
        for _ in range(2)
    ]
    sources[1].update({"full-always": choice.choice([True, False, None]), "verify": "written"})
    jobs = {
        name: {
            "schedule": choice.choice(list(schedules)),
            "source": choice.choice(sources),
            **choice.choice([{}, {"max-runtime": choice.choice(times)}]),
        }
        for name in choice.sample(names, choice.randint(1, 5))
    }
    settings = {
        "worker-limit": choice.choice([1, "3"]),
        "telnet-control": choice.choice([True, False, "yes", "off"]),
        "telnet-addrs": choice.choice(["127.0.0.1, ::1", ["127.0.0.1", "::1"]]),
    }
    return {
        choice.choice(["global", "config"]): choice.choice([settings, {}, None]),
        "schedules": schedules,
        "jobs": jobs,
    }


def dumped(choice: random.Random, value: dict) -> str:
    if choice.random() < 0.2:
        return json.dumps(value, indent=choice.choice([None, 1, 4]))
    return yaml.safe_dump(
        value,
        default_flow_style=choice.choice([None, True, False]),
        width=choice.choice([30, 80, 10**9]),
        indent=choice.choice([None, 4, 7]),
        allow_unicode=choice.choice([None, True]),
        explicit_start=choice.choice([None, True]),
        sort_keys=choice.choice([True, False]),
    )


@pytest.mark.parametrize("count", SOME_OR_ALL)
def test_whatever_programs_dump_is_understood(conf, count):
    for seed in range(count):
        choice = random.Random(seed)
        value = random_configuration(choice)
        text = dumped(choice, value)
        settings = backy.load_settings(str(conf(text)))
        assert set(settings.jobs) == set(value["jobs"]), text
        for name, job in settings.jobs.items():
            given = value["jobs"][name]
            intervals = value["schedules"][given["schedule"]]
            assert job.schedule.name == given["schedule"]
            assert {one.tag: (one.every, one.keep) for one in job.schedule.intervals} == {
                tag: (backy.parse_duration(str(one["interval"])), int(one["keep"]))
                for tag, one in intervals.items()
            }, text
            path = os.path.join("/srv/backy", given["source"]["filename"])
            assert job.source["filename"] == path, text
            assert yaml.safe_load(backy.job_config(job))["source"] == job.source, text


def broken(choice: random.Random, text: str) -> str:
    for _ in range(choice.randint(1, 3)):
        at = choice.randrange(len(text) + 1)
        other = choice.randrange(len(text) + 1)
        added = choice.choice(
            ["", "", *"\n\t '\"[]{}:,-?&*!|>%@#\\<~0", "\x00", "\u202e", "null", "999999999999w",
             text[other : other + 20], "\x1b[2J", ": ", "\n  ", "9" * 50, "*id001", "\\0"]
        )  # fmt: skip
        text = text[:at] + added + text[at + choice.choice([0, 0, 1, 5, 20]) :]
    return text


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_broken_configuration_is_read_or_refused_in_clear_lines(conf, count):
    choice = random.Random(count)
    texts = [
        OLD_EXAMPLE,
        GOOD.format(base="/b"),
        EXAMPLE.read_text(encoding="utf-8"),
        uncommented(),
    ]
    texts += [dumped(choice, random_configuration(choice)) for _ in range(10)]
    refused = 0
    for _ in range(count):
        text = broken(choice, choice.choice(texts))
        path = conf(text)
        try:
            settings = backy.load_settings(str(path))
        except backy.ConfigErrors as e:
            refused += 1
            lines = str(e).split("\n")
            assert lines == [backy.printable(line) for line in lines], text
            assert len(lines) == 1 or re.fullmatch(r"\d+ errors?(, \d+ warnings?)?", lines[-1])
            assert lines[0].startswith(f"{path}:"), text
            assert "\n" not in e.summary
            continue
        for name, job in settings.jobs.items():
            assert backy.JOB_NAME.fullmatch(name), text
            assert job.schedule.shortest > timedelta(0), text
            if job.source["type"] == "file":
                assert os.path.isabs(job.source["filename"]), text
            backy.parse_yaml(backy.job_config(job).decode())
    assert count // 5 < refused < count
