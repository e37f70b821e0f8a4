# SPDX-License-Identifier: GPL-3.0-or-later
"""What monitoring makes of `backy check`: Nagios itself, and the grammar of its plug-ins."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, command, need_root, need_tool
from test_check import COW, FIVE, Place, entry, place  # noqa: F401  # a fixture

ROOT = PROGRAM.parent
CONTRIB = ROOT / "contrib" / "nagios"

# ==== Performance data =======================================================
#
# From the development guidelines of Nagios and Icinga:
#
#     'label'=value[UOM];[warn];[crit];[min];[max]
#
# separated by blanks; the quotes may be left out if the label has no blank, no = and
# no quote; a value is a decimal number in the form of POSIX; warn and crit are ranges;
# min and max are numbers; trailing semicolons may go.

NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
RANGE = rf"@?(?:(?:{NUMBER}|~)?:)?(?:{NUMBER})?"
LABEL = r"(?:[^\s='|]+|'(?:[^'=|]|'')+')"
FIGURE = (
    rf"{LABEL}={NUMBER}(?:s|ms|us|%|B|KB|MB|GB|TB|c)?"
    rf"(?:;(?:{RANGE})(?:;(?:{RANGE})(?:;(?:{NUMBER})?(?:;(?:{NUMBER})?)?)?)?)?"
)
FIGURES = re.compile(rf"{FIGURE}(?: {FIGURE})*")
OUTPUT = re.compile(
    rf"(OK|WARNING|CRITICAL|UNKNOWN): [^|\n]+(?: \| ({FIGURES.pattern}))?(?:\n[^|\n]*)*\n"
)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("a=1", True),
        ("'a b'=1.5s;10;~:20;0;100", True),
        ("a=1B;10:;@5:6;0", True),
        ("a=1;;;0", True),
        ("a b=1", False),
        ("a=1,5", False),
        ("a=1e9", False),
        ("a=1;0;0;0;9;9", False),
        ("a=", False),
        ("a=1 b", False),
    ],
)
def test_grammar_of_performance_data(text, is_right):
    assert bool(FIGURES.fullmatch(text)) is is_right


def conditions() -> dict[str, tuple]:
    late = {"sla": "TOO OLD", "last_time": "-"}
    return {
        "good": ([entry("a"), entry("b", status="running")], {}),
        "late": ([entry("a", **late), entry("b", failures=3, last_error="x | y = 'z'")], {}),
        "odd": ([entry("a", sla_limit=1.5, last_duration="0.1 s")], {"worker_limit": 2}),
        "short": ([entry("a", stuck=True)], {"free": 1, "size": 3 << 50}),
        "refused": ([entry("a")], {"reload_error": "x|y"}),
    }


@pytest.mark.parametrize("name", conditions())
def test_output_follows_the_rules_of_plugins(name, place):  # noqa: F811
    rows, changed = conditions()[name]
    place.write(*rows, **changed)
    for words in ([], ["a"], ["-v"], ["-w", "99.999%", "-C", "1T"]):
        done = place.check(*words)
        match = OUTPUT.fullmatch(done.out)
        assert match, done.out
        assert ("OK", "WARNING", "CRITICAL", "UNKNOWN").index(match[1]) == done.status
        figures = [one.partition("=")[0] for one in match[2].split()]
        assert len(figures) == len({one[:19] for one in figures})
        assert done.out == f"{done.out.splitlines()[0]}\n" or done.status or "-v" in words


@pytest.mark.parametrize("text", [COW, FIVE, "", "- {job: a|b, sla: x}\n"])
def test_output_on_other_files_follows_the_rules(text, place):  # noqa: F811
    place.status.write_text(text)
    assert OUTPUT.fullmatch(place.check().out)
    place.status.unlink()
    assert OUTPUT.fullmatch(place.check().out)


def test_figures_are_what_they_say(place):  # noqa: F811
    place.write(
        entry("a", sla="TOO OLD", status="running", failures=3),
        entry("b", status="queued for execution", stuck=True),
    )
    line = place.check().out.splitlines()[0]
    figures = dict(one.split("=") for one in line.partition(" | ")[2].split())
    age = figures.pop("age_max")
    assert figures == {
        "jobs": "2;;;0",
        "overdue": "1;0;0;0;2",
        "running": "1;;;0;3",
        "queued": "1;;;0",
        "failing": "1;0;;0;2",
        "stuck": "1;;0;0;2",
        "free": f"{600 << 30}B;{50 << 30}:;{20 << 30}:;0;{1000 << 30}",
    }
    assert re.fullmatch(r"72\d\ds;;129600;0", age)


# ==== Nagios =================================================================

NAGIOS = """\
log_file={top}/nagios.log
cfg_file={top}/backy.cfg
cfg_file={top}/objects.cfg
object_cache_file={top}/objects.cache
precached_object_file={top}/objects.precache
status_file={top}/status.dat
status_update_interval=1
check_external_commands=0
command_file={top}/commands
lock_file={top}/lock
temp_file={top}/temp
temp_path={top}
check_result_path={top}/results
state_retention_file={top}/retention.dat
query_socket={top}/queries
nagios_user=root
nagios_group=root
interval_length=1
service_inter_check_delay_method=n
max_service_check_spread=1
host_inter_check_delay_method=n
use_syslog=0
enable_environment_macros=0
check_for_updates=0
"""
OBJECTS = """\
define command {
    command_name    true
    command_line    /bin/true
}
define timeperiod {
    timeperiod_name always
    alias           always
    monday          00:00-24:00
    tuesday         00:00-24:00
    wednesday       00:00-24:00
    thursday        00:00-24:00
    friday          00:00-24:00
    saturday        00:00-24:00
    sunday          00:00-24:00
}
define contact {
    contact_name    nobody
    host_notifications_enabled      0
    service_notifications_enabled   0
    host_notification_period        always
    service_notification_period     always
    host_notification_commands      true
    service_notification_commands   true
}
define host {
    host_name           backup1
    address             127.0.0.1
    check_command       true
    max_check_attempts  1
    check_period        always
    notification_period always
    contacts            nobody
}
"""
SERVICE = """\
define service {{
    host_name           backup1
    service_description {name}
    check_command       check_backy{arguments}
    max_check_attempts  1
    check_interval      2
    retry_interval      2
    check_period        always
    notification_period always
    contacts            nobody
}}
"""


class Nagios:
    """A Nagios of its own in a directory, with our commands as they are shipped."""

    def __init__(self, top: Path, configuration: Path, services: dict[str, str]) -> None:
        self.top, self.log = top, top / "nagios.log"
        (top / "results").mkdir(parents=True)
        program = top / "backy"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {shlex.quote(str(PROGRAM))} "$@"\n')
        program.chmod(0o755)
        commands = (CONTRIB / "backy.cfg").read_text()
        assert commands.count("/usr/local/bin/backy check -c /etc/backy.conf") == 1
        commands = commands.replace("/usr/local/bin/backy", str(program))
        commands = commands.replace("/etc/backy.conf", str(configuration))
        (top / "backy.cfg").write_text(commands)
        objects = "".join(
            SERVICE.format(name=name, arguments=one) for name, one in services.items()
        )
        (top / "objects.cfg").write_text(OBJECTS + objects)
        (top / "nagios.cfg").write_text(NAGIOS.format(top=top))
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command("nagios4", "-v", self.top / "nagios.cfg")
        words = ["nagios4", str(self.top / "nagios.cfg")]
        with open(self.top / "output", "wb") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=output)

    def services(self) -> dict[str, dict[str, str]]:
        """What Nagios has recorded of each service that it has checked."""
        found = {}
        path = self.top / "status.dat"
        text = path.read_text() if path.exists() else ""
        for block in re.findall(r"^servicestatus \{\n(.*?)^\t\}", text, re.MULTILINE | re.DOTALL):
            values = dict(line.strip().partition("=")[::2] for line in block.splitlines())
            if values["has_been_checked"] == "1":
                found[values["service_description"]] = values
        return found

    def until(self, condition) -> dict[str, dict[str, str]]:
        end = time.monotonic() + 40
        while True:
            services = self.services()
            if condition(services):
                return services
            assert self.process.poll() is None, (self.top / "output").read_text()
            assert time.monotonic() < end, services
            time.sleep(0.1)

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def nagios(tmp_path, monkeypatch):
    need_root()
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    need_tool("nagios4")
    started: list[Nagios] = []

    def start(configuration: Path, services: dict[str, str]) -> Nagios:
        started.append(Nagios(tmp_path / "nagios", configuration, services))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.mark.slow
@pytest.mark.root
def test_nagios_shows_what_check_says(nagios, place: Place):  # noqa: F811
    place.write(entry("vm1"), entry("vm2", failures=3), entry("web1"))
    services = {
        "all": "",
        "vm1": "!vm1",
        "web": "!--match '^web'",
        "space": "!-C 99%",
        "typing error": "!--nonsense",
        "gone": "!vm9",
    }
    running = nagios(place.conf, services)
    shown = running.until(lambda found: len(found) == len(services))
    assert {name: one["current_state"] for name, one in shown.items()} == {
        "all": "1",
        "vm1": "0",
        "web": "0",
        "space": "2",
        "typing error": "3",
        "gone": "3",
    }
    everything = shown["all"]
    assert everything["plugin_output"] == "WARNING: 1 jobs failing: vm2"
    assert FIGURES.fullmatch(everything["performance_data"])
    assert everything["performance_data"].startswith("jobs=3;;;0 overdue=0;0;0;0;3 ")
    assert everything["long_plugin_output"].startswith("vm2 (last time: ")
    assert shown["vm1"]["plugin_output"] == "OK: 1 jobs within SLA"
    assert shown["typing error"]["plugin_output"].startswith("UNKNOWN: unrecognized arguments")

    place.write(entry("vm1", sla="TOO OLD"), entry("vm2"), entry("web1"))
    shown = running.until(
        lambda found: found["all"]["current_state"] == found["vm1"]["current_state"] == "2"
    )
    assert shown["all"]["plugin_output"] == "CRITICAL: 1 jobs not within SLA: vm1"
    place.status.unlink()
    shown = running.until(lambda found: found["all"]["current_state"] == "3")
    assert shown["all"]["plugin_output"].startswith("UNKNOWN: No status file found at ")


# ==== The other files ========================================================


def test_command_of_nrpe_is_understood(place):  # noqa: F811
    place.write(entry("a"))
    (line,) = re.findall(
        r"^command\[\w+\]=/usr/local/bin/backy (.*)", (CONTRIB / "nrpe-backy.cfg").read_text(), re.M
    )
    words = line.replace("/etc/backy.conf", str(place.conf)).split()
    assert place.run(*words).status == 0


def test_options_for_icinga_are_those_of_check(run):
    text = (CONTRIB / "icinga2-backy.conf").read_text()
    options = set(re.findall(r'^ +"(-\S+)" = \{', text, re.MULTILINE)) - {"--"}
    assert options == {"-c", "-w", "-C", "-t", "-v", "--match"}
    usage = run("check", "--help").out
    assert all(re.search(rf"{option}\b", usage) for option in options)
