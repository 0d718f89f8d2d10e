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
from vm import systemd
from vm.content import content
from vm.kernel import under_test
from vm.machine import CommandFailed, Machine

#: Of each service, the words of vm/keeper.py: names, tokens of the content and sizes.
KEEPER = ("ring:11:70000", "state:12:4096")
HOLDER = ("state:21:5000", "holder-own", "7:300000", "8:1")
UNITS = {"keeper.service": {"ring", "state"}, "holder.service": {"state"}}
#: What there is besides in the end.
LEFT = {"gone.service": {"cache"}}
OWN, LONELY, MORTAL = "holder-own", "lonely", "mortal"
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
#: A service with a session that ends when systemd ends the service.
MORTAL_UNIT = f"""\
[Service]
Environment=PYTHONPATH=/khoscope
ExecStart=/usr/bin/python3 -m vm.sessions hold {MORTAL} 6:4096:never
"""
#: It stores a file, and does not ask systemd to keep it.
CARELESS_UNIT = """\
[Service]
Type=notify
FileDescriptorStoreMax=1
Environment=PYTHONPATH=/khoscope
ExecStart=/usr/bin/python3 -m vm.keeper cache:31:4096
"""
#: It asks for that.
CAREFUL_UNIT = CARELESS_UNIT.replace("[Service]", "[Service]\nFileDescriptorStorePreserve=yes", 1)
#: In the next boot one of these is not there, and one may store nothing.
OTHERWISE = """\
rm /etc/systemd/system/gone.service
sed -i '/FileDescriptorStore/d' /etc/systemd/system/shrunk.service
"""
#: A kernel of another ABI, and where its image is.
OTHER = "7.2-base"
MOUNT_OTHER = (
    f"mkdir /run/other && mount -t 9p -o trans=virtio,version=9p2000.L,ro {OTHER} /run/other"
)
#: Both sessions are there.
HELD = """\
for name in lonely mortal; do
    until journalctl -b -u $name -o cat | grep -q same; do sleep 1; done
done
"""
#: What is written for Prometheus: by ``metrics``, and by khoscope-verify.service.
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
#: A file system that is full.
FULL = """\
mkdir -p /mnt/full && mount -t tmpfs -o size=4k tmpfs /mnt/full && ! cat /dev/zero >/mnt/full/all
"""


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
    luo: dict[str, Any] = field(default_factory=dict)
    from_outside: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    mapping: dict[str, Any] = field(default_factory=dict)
    #: What promtool says of what was written for Prometheus.
    promtool: dict[str, str] = field(default_factory=dict)
    #: Gates: their exit status and text, by what was so.
    gates: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: The journal after the gate that was open.
    gate_journal: list[dict[str, Any]] = field(default_factory=list)
    of_another: list[dict[str, Any]] = field(default_factory=list)
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


def booted(machine: Machine, *keepers: str) -> Boot:
    """What khoscope-verify.service has said, once systemd has come up, and services of ours."""
    systemd.wait(machine)
    back = {name: systemd.came_back(machine, name) for name in keepers}
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
    with systemd.machine("7.2-fixed", OTHER) as machine:
        systemd.start(machine, "keeper", *KEEPER)
        systemd.start(machine, "holder", *HOLDER)
        story.exposure = install(machine)
        story.before = json.loads(guest(machine, "luo", "--json"))
        story.text["before, from outside"] = host(*machine.source, "luo")
        story.gates["nothing is ready"] = gate(machine)

        # As it should be.
        machine.load_kexec()
        machine.run("systemctl start khoscope-carry", check=True, timeout=300)
        story.gates["ready"] = gate(machine)
        story.gate_journal = systemd.journal(machine)
        machine.run(MOUNT_OTHER, check=True)
        story.gates["another ABI"] = gate(machine, "--next", "/run/other/bzImage")
        story.of_another = systemd.journal(machine, "KHOSCOPE_RULE=image-abi-differs")
        machine.execute_kexec(systemd.KEXEC)
        story.well = booted(machine, "keeper", "holder")

        # A service that does not start again, a session that nobody asks for, a store that is not
        # kept; and whoever carries is killed, and is started again.
        machine.run("systemctl disable holder", check=True)
        systemd.add(machine, "lonely", LONELY_UNIT)
        systemd.add(machine, "mortal", MORTAL_UNIT)
        systemd.add(machine, "careless", CARELESS_UNIT)
        systemd.add(machine, "gone", CAREFUL_UNIT)
        systemd.add(machine, "shrunk", CAREFUL_UNIT)
        units = ("lonely", "mortal", "careless", "gone", "shrunk")
        machine.run(("systemctl", "start", *units), check=True, timeout=300)
        machine.run(HELD, check=True, timeout=300)
        machine.run(OTHERWISE, check=True)
        machine.run("systemctl start khoscope-carry", check=True, timeout=300)
        machine.run("systemctl kill -s KILL khoscope-carry", check=True)
        machine.load_kexec()
        story.gates["killed"] = gate(machine)
        story.killed = machine.run("systemctl --failed --plain --no-legend").stdout
        machine.run("systemctl start khoscope-carry", check=True, timeout=300)
        machine.execute_kexec(systemd.KEXEC)
        story.badly = booted(machine, "keeper")
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
        story.text["verdict"] = story.badly.metrics
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

        # Something was to come here, and KHO is off.
        machine.load_kexec(append=f"khoscope.init={systemd.INIT} kho=off")
        asked = khoscope(*machine.source, "verify", "--gate")
        story.gates["KHO off"] = asked.returncode, asked.stdout
        machine.execute_kexec()
        story.off = booted(machine)
    return story


def sessions(document: dict[str, Any], side: str = "incoming") -> dict[str, Any]:
    return {session["name"]: session for session in document[side]["sessions"]}


def by_rule(journal: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """The findings of a rule."""
    return [
        each
        for each in journal
        if each.get("KHOSCOPE_RULE") == rule and "KHOSCOPE_VERDICT" not in each
    ]


def verdicts(journal: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What each verdict is about, and which it is."""
    return [
        (each.get("KHOSCOPE_ABOUT", ""), each["KHOSCOPE_VERDICT"])
        for each in journal
        if "KHOSCOPE_VERDICT" in each
    ]


def came(journal: list[dict[str, Any]], kind: str) -> dict[str, set[str]]:
    """What came back to services (``CAME``), did not (``LOST``), or waits (``WAITS``)."""
    found: dict[str, set[str]] = {}
    for each in journal:
        if (names := each.get(f"KHOSCOPE_FD_{kind}")) is not None:
            found[each["OBJECT_SYSTEMD_UNIT"]] = {names} if isinstance(names, str) else {*names}
    return found


# -- the gate ---------------------------------------------------------------------------------


def test_gate_that_is_closed(story: Story) -> None:
    status, text = story.gates["nothing is ready"]
    assert status == 1
    assert re.search(r"^image +NO +no-image: ", text, re.MULTILINE)
    assert re.search(r"^carried +NO +nothing-carried: ", text, re.MULTILINE)
    assert re.search(r"^sessions +ok ", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith("GATE CLOSED: do not kexec: ")
    assert "(2 reasons)" in text


def test_gate_that_is_open(story: Story) -> None:
    status, text = story.gates["ready"]
    assert status == 0, text
    assert "GATE OPEN: the kexec may come" in text
    assert "of holder.service, keeper.service; systemctl kexec adds 3 memfds" in " ".join(
        text.split()
    )
    assert re.search(r"^it took [0-9.]+ s$", text, re.MULTILINE)
    assert "next kernel: " in text


def test_gate_in_the_journal(story: Story) -> None:
    """Entries of their own for each reason, and what would be handed over in numbers."""
    assert verdicts(story.gate_journal) == [("gate", "fail"), ("gate", "pass")]
    (carried,) = by_rule(story.gate_journal, "nothing-carried")[:1]
    assert (carried["KHOSCOPE_QUESTION"], carried["PRIORITY"]) == ("carried", "3")
    last = story.gate_journal[-1]
    assert (last["PRIORITY"], last["KHOSCOPE_SESSIONS"], last["KHOSCOPE_FILES"]) == ("5", "2", "3")
    assert {*last["KHOSCOPE_UNIT"]} == {*UNITS}
    assert int(last["KHOSCOPE_BYTES"]) > 300_000
    assert int(last["KHOSCOPE_BLOCKS"]) > 0
    assert float(last["KHOSCOPE_SECONDS"]) > 0
    assert last["MESSAGE"].startswith("GATE OPEN: ")


def test_gate_before_an_image_of_another_abi(story: Story) -> None:
    status, text = story.gates["another ABI"]
    assert status == 1
    assert re.search(r"^image +NO +image-abi-differs: ", text, re.MULTILINE)
    finding, verdict = story.of_another
    assert (finding["KHOSCOPE_QUESTION"], finding["PRIORITY"]) == ("image", "3")
    assert "kho-v4" in finding["MESSAGE"]
    assert (verdict["KHOSCOPE_ABOUT"], verdict["KHOSCOPE_VERDICT"]) == ("gate", "fail")


def test_gate_before_a_kernel_with_kho_off(story: Story) -> None:
    """What is loaded says so itself, by its command line."""
    status, text = story.gates["KHO off"]
    assert status == 1
    assert re.search(r"^image +NO +next-without-kho: ", text, re.MULTILINE)


def test_gate_when_carry_was_killed(story: Story) -> None:
    status, text = story.gates["killed"]
    assert status == 1
    assert "GATE CLOSED: do not kexec: nothing-carried (1 reason)" in text
    assert "khoscope-carry.service" in story.killed


def test_gate_tells_what_systemd_will_close(story: Story) -> None:
    """That is no reason to stay: nobody has asked for more, and another kexec ends nobody."""
    text = " ".join(story.gates["killed"][1].split())
    assert "note store-not-kept: careless.service: cache: FileDescriptorStorePreserve=" in text
    assert (
        f"note session-not-kept: session {MORTAL!r} (1 file) is held by mortal.service alone"
        in text
    )
    assert LONELY not in text


# -- the proof --------------------------------------------------------------------------------


def test_all_went_well(story: Story) -> None:
    """Services, journal, systemd and metrics say the same."""
    boot = story.well
    keeper, holder = boot.back["keeper"], boot.back["holder"]
    assert {name: (file["size"], file["same"]) for name, file in keeper.items()} == {
        "ring": (70000, True),
        "state": (4096, True),
    }
    assert holder["state"]["same"]
    assert {token: (f["size"], f["same"]) for token, f in holder["session"].items()} == {
        "7": (300000, True),
        "8": (1, True),
    }
    assert (boot.state, boot.failed) == ("active", False)
    assert verdicts(boot.journal) == [("arrival", "pass")]
    assert came(boot.journal, "CAME") == {
        "keeper.service": {"ring", "state"},
        "holder.service": {"session", "state"},
    }
    assert not came(boot.journal, "LOST")
    assert not came(boot.journal, "WAITS")
    assert int(boot.journal[-1]["KHOSCOPE_RELEASED"]) > 0
    assert 'khoscope_verdict{about="arrival",verdict="pass"} 1' in boot.metrics.splitlines()
    assert "holder.service: session, state came back; it is active (running)" in boot.of_holder


def test_much_went_wrong(story: Story) -> None:
    boot = story.badly
    assert (boot.state, boot.failed) == ("failed", True)
    assert verdicts(boot.journal)[0] == ("arrival", "fail")
    assert came(boot.journal, "CAME")["keeper.service"] == {"ring", "state"}
    assert came(boot.journal, "WAITS") == {
        "holder.service": {"session", "state"},
        "gone.service": {"cache"},
    }
    assert came(boot.journal, "LOST") == {"shrunk.service": {"cache"}}
    assert 'khoscope_verdict{about="arrival",verdict="fail"} 1' in boot.metrics.splitlines()


def test_a_service_that_did_not_start_again(story: Story) -> None:
    _, found = by_rule(story.badly.journal, "stored-fd-waits")
    assert found["OBJECT_SYSTEMD_UNIT"] == "holder.service"
    assert found["PRIORITY"] == "3"
    said = "holder.service has not taken session, state; it is inactive (dead-resources-pinned)"
    assert said in found["MESSAGE"]
    # Whoever asks about the unit finds it.
    assert said in story.badly.of_holder


def test_a_service_that_is_not_there_any_more(story: Story) -> None:
    """systemd goes on keeping what was its, and cannot say by which names."""
    found = [each["MESSAGE"] for each in by_rule(story.badly.journal, "stored-fd-waits")]
    assert "stored-fd-waits: gone.service has not taken cache; it is not-found" in found


def test_a_service_that_may_not_store_any_more(story: Story) -> None:
    (found,) = by_rule(story.badly.journal, "stored-fd-lost")
    assert (found["OBJECT_SYSTEMD_UNIT"], found["PRIORITY"]) == ("shrunk.service", "3")
    assert "shrunk.service: cache did not come back; " in found["MESSAGE"]


def test_a_session_that_nobody_asked_for(story: Story) -> None:
    (found,) = by_rule(story.badly.journal, "orphaned-session")
    assert found["OBJECT_SYSTEMD_UNIT"] == "lonely.service"
    said = f"session {LONELY!r} (1 file) came, and nobody has retrieved it"
    assert f"{said}; lonely.service had it before" in found["MESSAGE"]


def test_a_disk_that_is_full(story: Story) -> None:
    """The verdict is in the journal all the same, and the exit status is another."""
    status, said = story.full
    assert status == 2
    assert "/mnt/full/khoscope.prom: No space left on device" in said


def test_kho_is_off_where_something_was_to_come(story: Story) -> None:
    boot = story.off
    assert (boot.state, boot.failed) == ("failed", True)
    assert verdicts(boot.journal) == [("arrival", "error")]
    assert "KHO is off" in boot.journal[-1]["MESSAGE"]


def test_the_last_to_freeze(story: Story) -> None:
    """Where nobody has started it, khoscope-carry runs when all services have ended."""
    (file,) = sessions(story.luo)["khoscope"]["files"]
    assert file["memfd"]["size"] > 0


def test_hardening(story: Story) -> None:
    """As docs/guide.md has it."""
    assert story.exposure == {"khoscope-carry.service": 2.7, "khoscope-verify.service": 2.7}


# -- by names ---------------------------------------------------------------------------------


def test_stores_are_not_in_luo_before_the_kexec(story: Story) -> None:
    """Only the session that a service has made itself."""
    assert [*sessions(story.before, "outgoing")] == [OWN]
    assert story.before["holders"]["systemd_memfds"] == 3
    stores = {each["unit"]: each for each in story.before["services"]["stores"]}
    assert {
        unit: {fd["name"] for fd in stores[unit]["fds"] if fd["goes_along"]} for unit in UNITS
    } == {**UNITS, "holder.service": {"state", "session"}}
    # Nobody can ask the guest's systemd from there.
    assert "systemd has 3 memfds open" in story.text["before, from outside"]


def test_who_holds_a_session(story: Story) -> None:
    """The service itself, and systemd, which keeps it for the next start."""
    held_by = sessions(story.before, "outgoing")[OWN]["held_by"]
    found = {(each["comm"], each["unit"]) for each in held_by}
    assert found == {("python3", "holder.service"), ("systemd", "init.scope")}
    assert min(each["pid"] for each in held_by) == 1


def test_files_by_units(story: Story) -> None:
    found = sessions(story.luo)
    assert found.keys() == {fd_stores.SESSION, OWN, "khoscope"}
    systemd_s, own = found[fd_stores.SESSION], found[OWN]
    units: dict[str, set[str]] = {}
    for file in systemd_s["files"]:
        if file["unit"]:
            units.setdefault(file["unit"], set()).add(file["fd_name"])
        else:
            assert file["token"] == f"{fd_stores.TOKEN:#x}"
    assert units == UNITS | LEFT
    assert (own["unit"], own["fd_name"]) == ("holder.service", "session")
    assert [(file["unit"], file["fd_name"]) for file in own["files"]] == [(None, None)] * 2
    assert [(each["notes"], each["problems"]) for each in found.values()] == [([], [])] * 3


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
        "session 'systemd' (5 files of gone.service, holder.service, keeper.service) was handed "
        "over, and nobody has retrieved it" in verify
    )
    assert "session 'holder-own' of holder.service session (2 files) was handed over" in verify
    assert "What runs as PID 1 here has not." in verify


def test_metrics(story: Story) -> None:
    """Of a kernel that runs, as `verify` judges it."""
    lines = story.text["metrics"].splitlines()
    assert "khoscope_kho_enabled 1" in lines
    assert 'khoscope_luo_sessions{direction="incoming"} 3' in lines
    assert 'khoscope_luo_files{direction="incoming"} 8' in lines
    orphaned = 'khoscope_findings{about="kexec",rule="orphaned-session",severity="warning"} 3'
    assert orphaned in lines
    assert 'khoscope_verdict{about="kexec",verdict="pass"} 1' in lines
    assert story.promtool == dict.fromkeys(METRICS, "")


def test_what_is_in_files(story: Story) -> None:
    """Byte by byte, from memory that nobody has claimed yet."""
    for name, (token, size) in CONTENTS.items():
        assert story.contents[name] == content(token, size), name
    assert story.recorded == story.contents
    assert story.mode == "600"
    stored = fd_stores.fd_stores(json.dumps(story.mapping).encode())
    assert {(each.unit, each.name) for each in stored.files.values()} == {
        (unit, name) for unit, names in (UNITS | LEFT).items() for name in names
    }


def test_what_is_refused(story: Story) -> None:
    assert "no session has such a file: 7" in story.refused["7 --session systemd"]
    assert "no session has such a file: 0x99" in story.refused["0x99"]
    assert "/: is not a file" in story.refused["7 --output /"]


@pytest.mark.parametrize("kernel", [name for name in under_test() if name == "7.3-fixed"])
def test_another_kernel(kernel: str) -> None:
    """The way that goes well."""
    with systemd.machine(kernel) as machine:
        systemd.start(machine, "keeper", *KEEPER)
        install(machine)
        machine.load_kexec()
        machine.run("systemctl start khoscope-carry", check=True, timeout=300)
        status, text = gate(machine)
        assert status == 0, text
        machine.execute_kexec(systemd.KEXEC)
        back = systemd.came_back(machine, "keeper")
        assert {name: file["same"] for name, file in back.items()} == {"ring": True, "state": True}
        said = systemd.journal(machine)
        assert verdicts(said) == [("arrival", "pass")]
        assert came(said, "CAME") == {"keeper.service": {"ring", "state"}}
