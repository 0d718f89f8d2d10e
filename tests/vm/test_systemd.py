# SPDX-License-Identifier: LGPL-2.1-or-later
"""A live update as systemd does it: what services have stored, by the names that people know."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from khoscope.facts import fd_stores
from tests.vm.test_khoscope import guest, host, khoscope
from vm import systemd
from vm.content import content
from vm.machine import CommandFailed

#: Of each service, the words of vm/keeper.py: names, tokens of the content and sizes.
KEEPER = ("ring:11:70000", "state:12:4096")
HOLDER = ("state:21:5000", "holder-own", "7:300000", "8:1")
UNITS = {"keeper.service": {"ring", "state"}, "holder.service": {"state"}}
OWN = "holder-own"
CARRIED = "journalctl -b -o cat -u khoscope-carry | grep -q 'stays until the kexec'"
#: As docs/guide.md has it.
CARRY = """\
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
SurviveFinalKillSignal=yes
[Service]
ExecStart=/usr/local/bin/khoscope carry
"""
#: What is written for Prometheus: by ``metrics``, and by ``verify``.
METRICS = ("metrics", "verdict")
#: What is read from the memory of files in which nobody has looked: how to name it, its token and
#: its size.
CONTENTS = {
    "keeper.service ring": (11, 70000),
    "keeper.service state": (12, 4096),
    "holder.service state": (21, 5000),
    "7": (7, 300000),
    "8": (8, 1),
}


@dataclass
class Story:
    """What was seen."""

    #: What came back to each service at the first kexec.
    back: dict[str, Any] = field(default_factory=dict)
    #: JSON of ``luo`` before the first kexec, and where nobody takes anything back; from outside.
    before: dict[str, Any] = field(default_factory=dict)
    text_before: str = ""
    luo: dict[str, Any] = field(default_factory=dict)
    from_outside: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    #: What promtool says of what was written for Prometheus.
    promtool: dict[str, str] = field(default_factory=dict)
    mapping: dict[str, Any] = field(default_factory=dict)
    #: JSON of ``verify --before carried`` after the first kexec.
    carried: dict[str, Any] = field(default_factory=dict)
    #: What is in a file, by how it was named: in memory, and in a snapshot.
    contents: dict[str, bytes] = field(default_factory=dict)
    recorded: dict[str, bytes] = field(default_factory=dict)
    mode: str = ""
    refused: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two kexecs: into systemd, and then into a kernel in which nobody takes anything back."""
    story = Story()
    copy = tmp_path_factory.mktemp("content") / "content"
    with systemd.machine("7.2-fixed") as machine:
        systemd.start(machine, "keeper", *KEEPER)
        systemd.start(machine, "holder", *HOLDER)
        story.before = json.loads(guest(machine, "luo", "--json"))
        story.text_before = host(*machine.source, "luo")
        machine.load_kexec()
        systemd.add(machine, "khoscope-carry", CARRY)
        machine.run("systemctl start khoscope-carry", check=True)
        machine.run(f"until {CARRIED}; do sleep 1; done", check=True, timeout=120)
        machine.execute_kexec(systemd.KEXEC)
        carried = machine.run("khoscope verify --json --before carried", timeout=120)
        assert carried.stdout, carried.stderr
        story.carried = json.loads(carried.stdout)
        story.back = {name: systemd.came_back(machine, name) for name in ("keeper", "holder")}

        machine.load_kexec(append=systemd.WITHOUT)
        machine.execute_kexec(systemd.KEXEC)
        for command in ("luo", "status"):
            story.text[command] = host(*machine.source, command)
        verdict = copy.with_name("verdict")
        story.text["verify"] = host(*machine.source, "verify", "--metrics", str(verdict))
        story.text["metrics"] = guest(machine, "metrics")
        story.text["verdict"] = verdict.read_text()
        story.promtool = {name: systemd.promtool(machine, story.text[name]) for name in METRICS}
        with pytest.raises(CommandFailed, match="no help text"):
            systemd.promtool(machine, story.text["metrics"].replace("# HELP", "# "))
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


def sessions(document: dict[str, Any], side: str = "incoming") -> dict[str, Any]:
    return {session["name"]: session for session in document[side]["sessions"]}


def test_services_get_back_what_they_have_stored(story: Story) -> None:
    """The lab is as it should be: systemd's live update works."""
    keeper, holder = story.back["keeper"], story.back["holder"]
    assert {name: (file["size"], file["same"]) for name, file in keeper.items()} == {
        "ring": (70000, True),
        "state": (4096, True),
    }
    assert holder["state"]["same"]
    assert {token: (f["size"], f["same"]) for token, f in holder["session"].items()} == {
        "7": (300000, True),
        "8": (1, True),
    }


def test_carry_goes_along(story: Story) -> None:
    """Its session lives until the kexec, in a service that nothing ends."""
    assert story.carried["verdict"] == "pass"
    assert story.carried["fates"], story.carried


def test_stores_are_not_in_luo_before_the_kexec(story: Story) -> None:
    """Only the session that a service has made itself."""
    assert [*sessions(story.before, "outgoing")] == [OWN]
    assert story.before["holders"]["systemd_memfds"] == 3
    assert "systemd has 3 memfds open" in story.text_before


def test_who_holds_a_session(story: Story) -> None:
    """The service itself, and systemd, which keeps it for the next start."""
    held_by = sessions(story.before, "outgoing")[OWN]["held_by"]
    found = {(each["comm"], each["unit"]) for each in held_by}
    assert found == {("python3", "holder.service"), ("systemd", "init.scope")}
    assert min(each["pid"] for each in held_by) == 1


def test_files_by_units(story: Story) -> None:
    found = sessions(story.luo)
    assert found.keys() == {fd_stores.SESSION, OWN}
    systemd_s, own = found[fd_stores.SESSION], found[OWN]
    units: dict[str, set[str]] = {}
    for file in systemd_s["files"]:
        if file["unit"]:
            units.setdefault(file["unit"], set()).add(file["fd_name"])
        else:
            assert file["token"] == f"{fd_stores.TOKEN:#x}"
    assert units == UNITS
    assert (own["unit"], own["fd_name"]) == ("holder.service", "session")
    assert [(file["unit"], file["fd_name"]) for file in own["files"]] == [(None, None)] * 2
    assert [(each["notes"], each["problems"]) for each in found.values()] == [([], [])] * 2


def test_from_outside(story: Story) -> None:
    assert story.from_outside["incoming"] == story.luo["incoming"]


def test_what_people_read(story: Story) -> None:
    luo = story.text["luo"]
    assert "\n  session holder-own of holder.service session: 2 files, " in luo
    for unit, names in UNITS.items():
        for name in names:
            assert f" ({unit} {name}): memfd-v2, data " in luo
    assert "holder-own of holder.service session: 2 files" in story.text["status"]
    verify = " ".join(story.text["verify"].split())
    assert (
        "session 'systemd' (4 files of holder.service, keeper.service) was handed over, and nobody "
        "has retrieved it" in verify
    )
    assert "session 'holder-own' of holder.service session (2 files) was handed over" in verify
    assert "What runs as PID 1 here has not." in verify


def test_metrics(story: Story) -> None:
    """Of a kernel that runs, as `verify` judges it."""
    lines = story.text["metrics"].splitlines()
    assert "khoscope_kho_enabled 1" in lines
    assert 'khoscope_luo_sessions{direction="incoming"} 2' in lines
    assert 'khoscope_luo_files{direction="incoming"} 6' in lines
    orphaned = 'khoscope_findings{about="kexec",rule="orphaned-session",severity="warning"} 2'
    assert orphaned in lines
    verdict = 'khoscope_verdict{about="kexec",verdict="pass"} 1'
    assert verdict in lines
    assert verdict in story.text["verdict"].splitlines()
    assert story.promtool == dict.fromkeys(METRICS, "")


def test_what_is_in_files(story: Story) -> None:
    """Byte by byte, from memory that nobody has claimed yet."""
    for name, (token, size) in CONTENTS.items():
        assert story.contents[name] == content(token, size), name
    assert story.recorded == story.contents
    assert story.mode == "600"
    stored = fd_stores.fd_stores(json.dumps(story.mapping).encode())
    assert {(each.unit, each.name) for each in stored.files.values()} == {
        (unit, name) for unit, names in UNITS.items() for name in names
    }


def test_what_is_refused(story: Story) -> None:
    assert "no session has such a file: 7" in story.refused["7 --session systemd"]
    assert "no session has such a file: 0x99" in story.refused["0x99"]
    assert "/: is not a file" in story.refused["7 --output /"]
