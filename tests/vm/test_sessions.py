# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Sessions that are nobody's: those that nobody retrieves, and those that nobody can.

One machine goes through three kexecs: into a kernel whose LUO is off, on into one whose LUO is on,
and into one that has no handler for memfds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.vm.test_clients import KERNELS
from tests.vm.test_khoscope import guest
from tests.vm.test_rules import Look, of, rules, said
from vm.kernel import series
from vm.luo import Memfd, hold
from vm.machine import CommandFailed, Machine

PAGE = 4096
#: Files by token; the kernel reads the sessions in this order.
SESSIONS = {"first": {1: Memfd(PAGE), 2: Memfd(5 * PAGE), 3: Memfd(0)}, "second": {7: Memfd(PAGE)}}
#: Keeps a kernel from having a handler for memfds.
NO_HANDLER = "initcall_blacklist=memfd_luo_init"


@dataclass
class Story:
    """What was seen of sessions that nobody retrieves."""

    kernel: str
    #: Findings by stage.
    findings: dict[str, list[Any]] = field(default_factory=dict)
    #: JSON documents of ``luo`` by stage.
    luo: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    refused: str = ""


@pytest.fixture(scope="module", params=KERNELS)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    seen = Story(request.param)
    snapshot = tmp_path_factory.mktemp("sessions") / "before.khosnap"
    with Machine(seen.kernel) as machine:
        look = Look(machine)
        _hold(machine)
        _kexec(machine, "liveupdate=off")
        seen.findings["off"] = look.verify()

        _kexec(machine, "liveupdate=on")
        seen.luo["lost"] = look.ask("luo")
        seen.findings["lost"] = look.verify()
        _hold(machine)
        guest(machine, "snapshot", "/root/before.khosnap")
        machine.copy_out("/root/before.khosnap", snapshot)
        _kexec(machine, NO_HANDLER)
        seen.findings["nobody"] = look.verify()
        seen.findings["nobody, before"] = look.verify("--before", str(snapshot))
        seen.refused = _open(machine)
        seen.luo["unread"] = look.ask("luo")
        seen.findings["unread"] = look.verify()
        seen.findings["unread, before"] = look.verify("--before", str(snapshot), status=1)
        seen.text = guest(machine, "luo")
    return seen


def _hold(machine: Machine) -> None:
    for name, files in SESSIONS.items():
        hold(machine, name, files)


def _kexec(machine: Machine, word: str) -> None:
    machine.load_kexec(append=word)
    machine.execute_kexec()


def _open(machine: Machine) -> str:
    """What whoever opens the device is told: then the kernel reads what LUO was handed."""
    with pytest.raises(CommandFailed) as refused:
        machine.run(": >/dev/liveupdate", check=True)
    return str(refused.value)


def named(name: str) -> str:
    count = len(SESSIONS[name])
    return f"session {name!r} ({count} file{'s' * (count > 1)})"


def test_luo_is_off(story: Story) -> None:
    """Whatever it was handed stays where it is."""
    assert rules(story.findings["off"]) == {"orphaned-session", "no-image"}
    orphans = of(story.findings["off"], "orphaned-session")
    assert [f["message"] for f in orphans] == [
        f"{named(name)} cannot be retrieved: LUO is off in this kernel" for name in SESSIONS
    ]
    assert {f["severity"] for f in orphans} == {"warning"}
    assert all("liveupdate=on" in f["explain"] for f in orphans)


def test_a_kexec_loses_what_nobody_has_retrieved(story: Story) -> None:
    """That is what the rule says, and what becomes of it."""
    incoming = story.luo["lost"]["incoming"]
    assert incoming is None or incoming["sessions"] == []
    assert story.luo["lost"]["liveupdate"]["enabled"] is True
    assert rules(story.findings["lost"]) == {"no-image"}


def test_nobody_has_retrieved_them(story: Story) -> None:
    assert rules(story.findings["nobody"]) == {"orphaned-session", "no-image"}
    orphans = of(story.findings["nobody"], "orphaned-session")
    assert [f["message"] for f in orphans] == [
        f"{named(name)} was handed over, and nobody has retrieved it" for name in SESSIONS
    ]
    orphans = of(story.findings["nobody, before"], "orphaned-session")
    assert [f["message"] for f in orphans] == [
        f"{named(name)} came, and nobody has retrieved it" for name in SESSIONS
    ]


def test_the_kernel_gives_up(story: Story) -> None:
    assert "Input/output error" in story.refused
    log = said(story.findings["unread"], "kernel-tainted")
    assert "luo: No registered handler for compatible 'memfd-v2'" in log
    assert "luo: Failed to deserialize files for session [first]" in log


def test_what_a_kernel_that_gave_up_still_has(story: Story) -> None:
    """Up to 7.1 the sessions that it has not come to, and a count that nobody corrects."""
    side = story.luo["unread"]["incoming"]
    assert side["live"] is True
    assert side["problems"] == []
    found = {s["name"]: (s["count"], len(s["files"]), s["retrieved"]) for s in side["sessions"]}
    messages = [f["message"] for f in of(story.findings["unread"], "orphaned-session")]
    if series(story.kernel) == "7.1":
        assert found == {"first": (3, 0, False), "second": (1, 1, None)}
        assert messages == [
            f"{named('first')}: the kernel has none of them",
            f"{named('second')}: the kernel gave up before it came to this one",
        ]
        (file,) = side["sessions"][1]["files"]
        assert (file["memfd"]["size"], file["memfd"]["pages"]) == (PAGE, 1)
        assert file["problems"] == file["memfd"]["problems"] == []
        assert "session second: 1 file, 24 KiB, given up by the kernel" in story.text
    else:
        assert found == {"first": (0, 0, False)}
        (message,) = messages
        assert message.startswith("session 'first' (0 files): the log says: ")
        assert "Failed to deserialize" in message


def test_what_did_not_come_back_is_lost(story: Story) -> None:
    (finding,) = of(story.findings["unread, before"], "lost")
    assert finding["message"] == "session 'first' came with 0 of 3 files"
    assert "EIO" in finding["explain"]
    assert "page allocator" not in finding["explain"]
