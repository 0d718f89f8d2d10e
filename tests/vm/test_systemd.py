# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A live update as systemd does it, with khoscope's gate before and its proof after: the way that goes
well, those that do not, and what is in memory when nobody takes anything back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from khoscope.facts import fd_stores
from tests.vm.test_khoscope import guest, host, khoscope
from vm import kernel as kernels
from vm import systemd
from vm.content import content
from vm.machine import Machine

#: Of each service, the words of vm/keeper.py: names, tokens of the content and sizes.
KEEPER = ("ring:11:70000", "state:12:4096")
HOLDER = ("state:21:5000", "holder-own", "7:300000", "8:1")
UNITS = {"keeper.service": {"ring", "state"}, "holder.service": {"state"}}
OWN, LONELY = "holder-own", "lonely"
#: A service that goes down last, with a session that nobody will ask for.
LONELY_UNIT = f"""\
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
SurviveFinalKillSignal=yes
[Service]
Environment=PYTHONPATH=/khoscope
ExecStart=/usr/bin/python3 -m vm.sessions hold {LONELY} 5:4096:never
"""
#: It stores a file, and does not ask systemd to keep it.
CARELESS_UNIT = """\
[Service]
Type=notify
FileDescriptorStoreMax=1
Environment=PYTHONPATH=/khoscope
ExecStart=/usr/bin/python3 -m vm.keeper cache:31:4096
"""
#: What is read from the memory of files in which nobody has looked: how to name it, its token and
#: its size.
CONTENTS = {
    "keeper.service ring": (11, 70000),
    "keeper.service state": (12, 4096),
    "holder.service state": (21, 5000),
    "7": (7, 300000),
    "8": (8, 1),
}
#: A file system that is full.
FULL = "mkdir -p /mnt/full && mount -t tmpfs -o size=4k tmpfs /mnt/full && ! cat /dev/zero >/mnt/full/all"


@dataclass
class Boot:
    """What was seen in a kernel that systemd has come up in."""

    #: Entries of the journal that are khoscope's own, and those of ``journalctl -u holder``.
    journal: list[dict[str, Any]] = field(default_factory=list)
    of_holder: str = ""
    #: khoscope-verify.service: ``ActiveState``, and whether it is in ``systemctl --failed``.
    state: str = ""
    failed: bool = False
    #: What it has written for the node exporter.
    metrics: str = ""
    #: What came back to each service, as it says itself.
    back: dict[str, Any] = field(default_factory=dict)


@dataclass
class Story:
    """What was seen."""

    exposure: dict[str, float] = field(default_factory=dict)
    #: JSON of ``luo`` before the first kexec, and where nobody takes anything back; from outside.
    before: dict[str, Any] = field(default_factory=dict)
    text_before: str = ""
    luo: dict[str, Any] = field(default_factory=dict)
    from_outside: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    mapping: dict[str, Any] = field(default_factory=dict)
    #: Gates: their exit status and text, by what was so.
    gates: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: The journal after the gate that was open.
    gate_journal: list[dict[str, Any]] = field(default_factory=list)
    #: Kernels that systemd came up in: all went well; much did not; KHO is off.
    well: Boot = field(default_factory=Boot)
    badly: Boot = field(default_factory=Boot)
    off: Boot = field(default_factory=Boot)
    killed: str = ""
    full: tuple[int, str] = (0, "")
    #: What is in a file, by how it was named: in memory, and in a snapshot.
    contents: dict[str, bytes] = field(default_factory=dict)
    recorded: dict[str, bytes] = field(default_factory=dict)
    mode: str = ""
    refused: dict[str, str] = field(default_factory=dict)


def gate(machine: Machine, *options: str) -> tuple[int, str]:
    """The gate, asked in the guest as an agent would."""
    words = ("khoscope", "verify", "--gate", "--journal", *options)
    done = machine.run(words, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def booted(machine: Machine) -> Boot:
    """What khoscope-verify.service has said, once systemd has come up."""
    back = {name: systemd.came_back(machine, name) for name in ("keeper", "holder")}
    machine.run(("systemctl", "start", "khoscope-verify"), timeout=300)
    show = ("systemctl", "show", "-P", "ActiveState", "khoscope-verify")
    failed = ("systemctl", "--failed", "--plain", "--no-legend")
    of_holder = ("journalctl", "-b", "-o", "cat", "-u", "holder", "-t", "khoscope")
    return Boot(
        systemd.journal(machine),
        machine.run(of_holder).stdout,
        machine.run(show, check=True).stdout.strip(),
        "khoscope-verify.service" in machine.run(failed, check=True).stdout,
        machine.run("cat /var/lib/khoscope/khoscope.prom").stdout,
        back,
    )


def install(machine: Machine) -> dict[str, float]:
    """khoscope's units, as an operator would have them; how exposed systemd finds each."""
    guest(machine, "install-units", "--write", "/etc/systemd/system")
    units = ("khoscope-carry.service", "khoscope-verify.service")
    machine.run("systemctl daemon-reload", check=True)
    machine.run(("systemctl", "enable", *units), check=True)
    found = {}
    for unit in units:
        said = machine.run(("systemd-analyze", "security", unit), check=True).stdout
        found[unit] = float(re.findall(r"exposure level for \S+: ([0-9.]+)", said)[0])
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Kernel after kernel, by systemctl kexec; the last but one has no systemd, the last no KHO."""
    story = Story()
    copy = tmp_path_factory.mktemp("content") / "content"
    with systemd.machine("7.2-fixed") as machine:
        systemd.start(machine, "keeper", *KEEPER)
        systemd.start(machine, "holder", *HOLDER)
        story.exposure = install(machine)
        story.before = json.loads(guest(machine, "luo", "--json"))
        story.text_before = guest(machine, "luo")
        story.text["before, from outside"] = host(*machine.source, "luo")
        story.gates["nothing is ready"] = gate(machine)

        # As it should be.
        machine.load_kexec()
        machine.run("systemctl start khoscope-carry", check=True, timeout=300)
        story.gates["ready"] = gate(machine, "--next", "/kernel/bzImage")
        story.gate_journal = systemd.journal(machine)
        if (other := kernels.find("7.1-base")) is not None:
            image = ("--next", str(other.share / "bzImage"))
            asked = khoscope(*machine.source, "verify", "--gate", *image)
            story.gates["another ABI"] = asked.returncode, asked.stdout
        machine.execute_kexec(systemd.KEXEC)
        story.well = booted(machine)

        # A service that does not start again, a session that nobody asks for, a store that is not
        # kept; and whoever carries is killed, and is started again.
        machine.run("systemctl disable holder", check=True)
        systemd.add(machine, "lonely", LONELY_UNIT)
        systemd.add(machine, "careless", CARELESS_UNIT)
        machine.run("systemctl start lonely careless", check=True, timeout=120)
        machine.run("systemctl start khoscope-carry", check=True, timeout=300)
        machine.run("systemctl kill -s KILL khoscope-carry", check=True)
        machine.load_kexec()
        story.gates["killed"] = gate(machine, "--next", "/kernel/bzImage")
        story.killed = machine.run("systemctl --failed --plain --no-legend").stdout
        machine.run("systemctl reset-failed; systemctl start khoscope-carry", check=True, timeout=300)
        machine.execute_kexec(systemd.KEXEC)
        story.badly = booted(machine)
        machine.run(FULL, check=True)
        full = ("khoscope", "verify", "--before", "carried", "--journal", "--metrics")
        done = machine.run((*full, "/mnt/full/khoscope.prom"), timeout=300)
        story.full = done.returncode, done.stderr

        # Nobody starts khoscope-carry: kexec.target does.
        machine.run("systemctl enable --now holder", check=True, timeout=120)
        machine.load_kexec(append=systemd.WITHOUT)
        machine.execute_kexec(systemd.KEXEC)
        for command in ("luo", "status", "verify"):
            story.text[command] = host(*machine.source, command)
        story.text["metrics"] = guest(machine, "metrics")
        story.luo = json.loads(guest(machine, "luo", "--json"))
        story.from_outside = json.loads(host(*machine.source, "luo", "--json"))
        story.mapping = json.loads(host(*machine.source, "luo", "--content", "0"))
        guest(machine, "snapshot", "/root/with.khosnap", "--with-content")
        machine.copy_out("/root/with.khosnap", recorded := copy.with_name("with.khosnap"))
        for where, found in (
            (machine.source, story.contents),
            (("--snapshot", str(recorded)), story.recorded),
        ):
            for name in CONTENTS:
                host(*where, "luo", "--content", name, "--output", str(copy))
                found[name] = copy.read_bytes()
        guest(machine, "luo", "--content", "7", "--output", "/root/content")
        story.mode = machine.run("stat -c %a /root/content", check=True).stdout.strip()
        for words in ("7 --session systemd", "0x99", "7 --output /"):
            asked = khoscope(*machine.source, "luo", "--content", *words.split())
            story.refused[words] = asked.stderr
    return story
