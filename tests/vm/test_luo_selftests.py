# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The kernel's own selftests of live update, and what khoscope says of what they say they have made.

Those with two stages hold their sessions until the kexec, in a daemon, and look at them after it.
All of them go through one kexec together: none has a session that another one has.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from khoscope.abi.serialized import KHO_BLOCK_HEADER_SER, LUO_SESSION_SER
from khoscope.facts.store import load_file
from tests.vm.test_khoscope import COST, guest, host
from tests.vm.test_rules import Look
from vm.kernel import series, under_test
from vm.machine import Machine

PAGE = 4096
#: Each has another LUO, or other selftests.
KERNELS = [name for name in under_test() if name in ("7.1-base", "7.2-fixed", "7.3-fixed")] or [
    "7.2-fixed"
]
FILES, SESSIONS = 500, 2000
#: By selftest, its sessions; of each, what is in its files by their tokens: a text, in a page.
SELFTESTS: dict[str, dict[str, dict[int, str]]] = {
    "luo_kexec_simple": {
        "kexec_simple_state": {999: "2"},
        "test-session": {0x1A: "hello kexec world"},
    },
    "luo_multi_session": {
        "kexec_multi_state": {998: "2"},
        "multi-test-empty-1": {},
        "multi-test-empty-2": {},
        "multi-test-files-1": {0x1001: "Data for session files 1"},
        "multi-test-files-2": {
            0x2002: "First file for session files 2",
            0x3003: "Second file for session files 2",
        },
    },
    "luo_stress_files": {
        "kexec_many_files_state": {9999: "2"},
        "many_files_session": {token: f"file-data-{token}" for token in range(FILES)},
    },
    "luo_stress_sessions": {
        "kexec_many_state": {999: "2"},
        **{f"many-test-{number}": {} for number in range(SESSIONS)},
    },
}
#: What they say of it, at each stage.
SAID = {
    "luo_kexec_simple": ("", "--- SIMPLE KEXEC TEST PASSED ---"),
    "luo_multi_session": ("", "--- MULTI-SESSION KEXEC TEST PASSED ---"),
    "luo_stress_files": (
        f"Successfully preserved {FILES} files.",
        f"--- MANY-FILES KEXEC TEST PASSED ({FILES} files) ---",
    ),
    "luo_stress_sessions": (
        f"Successfully created {SESSIONS} sessions.",
        f"--- MANY-SESSIONS KEXEC TEST PASSED ({SESSIONS} sessions) ---",
    ),
}


@dataclass
class Story:
    """What was seen on the way through a kexec."""

    kernel: str
    #: The programs that are there, and what they have printed: of those with stages, at each.
    programs: set[str] = field(default_factory=set)
    unit: str = ""
    said: dict[str, list[str]] = field(default_factory=dict)
    #: JSON documents by name.
    seen: dict[str, Any] = field(default_factory=dict)
    #: JSON documents of ``verify`` by stage.
    reports: dict[str, Any] = field(default_factory=dict)
    #: What is in files by their sessions and tokens, as snapshots have it.
    contents: dict[str, dict[tuple[str, int], bytes]] = field(default_factory=dict)
    one: bytes = b""

    @property
    def selftests(self) -> dict[str, dict[str, dict[int, str]]]:
        """Those of this kernel: up to 7.1, nobody can have many sessions or files."""
        many = series(self.kernel) != "7.1"
        return {name: made for name, made in SELFTESTS.items() if many or "stress" not in name}

    @property
    def made(self) -> dict[str, dict[int, str]]:
        """All sessions."""
        return {
            session: files for made in self.selftests.values() for session, files in made.items()
        }

    @property
    def files(self) -> dict[tuple[str, int], str]:
        """All files."""
        return {
            (session, token): text
            for session, files in self.made.items()
            for token, text in files.items()
        }


@pytest.fixture(scope="module", params=KERNELS)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    story = Story(request.param)
    directory = tmp_path_factory.mktemp(story.kernel)
    before, after = directory / "before.khosnap", directory / "after.khosnap"
    with Machine(story.kernel) as machine:
        look = Look(machine)

        story.programs = {*machine.run("ls /kernel/selftests", check=True).stdout.split()}
        story.seen["owners, at first"] = look.ask("owners")
        story.unit = machine.run("/kernel/selftests/liveupdate", check=True).stdout
        story.seen["owners, unit"] = look.ask("owners")
        story.seen["luo, unit"] = look.ask("luo")

        for name in story.selftests:
            story.said[name] = [run(machine, name, 1)]
        for command in ("luo", "status", "owners"):
            story.seen[command] = look.ask(command)
        # It takes 20 s there: once is enough.
        if story.kernel == KERNELS[0]:
            story.seen["luo, in the guest"] = json.loads(guest(machine, "luo", "--json"))
        file = directory / "content"
        asked = ("--content", "0x1a", "--session", "test-session", "--output", str(file))
        host(*machine.source, "luo", *asked)
        story.one = file.read_bytes()
        machine.load_kexec()
        story.reports["before"] = look.ask("verify")
        story.contents["before"] = contents(machine, before)

        machine.execute_kexec()
        story.seen["luo, after"] = look.ask("luo")
        story.seen["status, after"] = look.ask("status")
        story.reports["after"] = look.ask("verify", "--before", str(before))
        story.contents["after"] = contents(machine, after)
        for name in story.selftests:
            story.said[name].append(run(machine, name, 2))
            story.seen[f"luo, after {name}"] = look.ask("luo")
        story.seen["status, at last"] = look.ask("status")
        story.reports["at last"] = look.ask("verify", "--before", str(before))
    return story


def run(machine: Machine, name: str, stage: int) -> str:
    return machine.run((f"/kernel/selftests/{name}", "-s", str(stage)), check=True).stdout


def contents(machine: Machine, snapshot: Path) -> dict[tuple[str, int], bytes]:
    host(*machine.source, "snapshot", str(snapshot), "--with-content")
    return {
        (each.session, each.token): b"".join(p for p in each.pieces if isinstance(p, bytes))
        for each in load_file(snapshot).contents
    }


def page(text: str) -> bytes:
    return text.encode().ljust(PAGE, b"\0")


def held(side: dict[str, Any]) -> dict[str, list[int]]:
    """The tokens of the files of each session."""
    assert side["problems"] == []
    for session in side["sessions"]:
        assert session["problems"] == []
        assert session["count"] == len(session["files"])
        for file in session["files"]:
            assert file["problems"] == file["memfd"]["problems"] == []
            assert (file["memfd"]["size"], file["memfd"]["pages"]) == (PAGE, 1)
    return {
        session["name"]: [int(file["token"], 16) for file in session["files"]]
        for session in side["sessions"]
    }


def memfds(side: dict[str, Any]) -> list[Any]:
    """All files, with what is known of their memory."""
    return [(f["token"], f["data"], f["memfd"]) for s in side["sessions"] for f in s["files"]]


def test_which_selftests_there_are(story: Story) -> None:
    """If the kernel has more of them, this should know."""
    assert story.programs == {"liveupdate", *story.selftests}


def test_what_they_say(story: Story) -> None:
    """The kernel is right, by its own tests."""
    (planned,) = re.findall(r"(?m)^1\.\.([0-9]+)$", story.unit)
    results = re.findall(r"(?m)^((?:not )?ok) [0-9]+ \S+(.*)$", story.unit)
    assert results == [("ok", "")] * int(planned)
    for name, said in story.said.items():
        for part, line in zip(said, SAID[name], strict=True):
            assert line in part


def test_nothing_is_left_of_what_needs_no_kexec(story: Story) -> None:
    assert held(story.seen["luo, unit"]["outgoing"]) == {}
    assert story.seen["luo, unit"]["device"] == {"in_use": False, "held_by": []}
    totals = [story.seen[name]["totals"] for name in ("owners, at first", "owners, unit")]
    assert totals[0] == totals[1]


def test_what_they_have_made(story: Story) -> None:
    luo = story.seen["luo"]
    assert held(luo["outgoing"]) == {name: [*files] for name, files in story.made.items()}
    if story.kernel == KERNELS[0]:
        assert story.seen["luo, in the guest"]["outgoing"] == luo["outgoing"]
    assert luo["incoming"] is None
    assert {s["name"]: s["files"] for s in story.seen["status"]["sessions"]} == {
        name: len(files) for name, files in story.made.items()
    }


def test_who_holds_it(story: Story) -> None:
    """The daemon that each of them has started, of which it says the number."""
    sessions = {s["name"]: s["held_by"] for s in story.seen["luo"]["outgoing"]["sessions"]}
    for name, made in story.selftests.items():
        (pid,) = re.findall(r"Child PID: ([0-9]+)", story.said[name][0])
        for session in made:
            (holder,) = sessions[session]
            assert (holder["pid"], holder["comm"]) == (int(pid), name[:15])
            assert holder["fds"] == 1


def test_whose_the_memory_is(story: Story) -> None:
    totals = story.seen["owners"]["totals"]
    assert {
        (each["session"], int(each["token"], 16)): each["pages"]
        for each in totals
        if each["kind"] == "memfd data"
    } == dict.fromkeys(story.files, 1)
    assert {each["session"] for each in totals if each["kind"] == "session"} == {
        name for name, files in story.made.items() if files
    }
    (listed,) = [each for each in totals if each["owner"] == "LUO: list of sessions"]
    per_block = (PAGE - KHO_BLOCK_HEADER_SER.itemsize) // LUO_SESSION_SER.itemsize
    # Up to 7.1 it has all the room that it may ever have (LUO_SESSION_PGCNT).
    pages = 16 if series(story.kernel) == "7.1" else -(-len(story.made) // per_block)
    assert listed["pages"] == pages
    assert "unknown" not in {each["kind"] for each in totals}


def test_what_is_in_files(story: Story) -> None:
    """Before the kexec, and after it, while nobody has looked at them."""
    assert story.one == page("hello kexec world")
    expected = {file: page(text) for file, text in story.files.items()}
    assert story.contents["before"] == expected
    assert story.contents["after"] == expected


def test_what_has_come(story: Story) -> None:
    incoming = story.seen["luo, after"]["incoming"]
    assert incoming["live"] is False
    assert held(incoming) == {name: [*files] for name, files in story.made.items()}
    assert memfds(incoming) == memfds(story.seen["luo"]["outgoing"])
    assert {s["name"]: s["files"] for s in story.seen["status, after"]["sessions_incoming"]} == {
        name: len(files) for name, files in story.made.items()
    }


def test_what_is_left_as_they_take_it_back(story: Story) -> None:
    left = story.made
    for name, made in story.selftests.items():
        left = {session: files for session, files in left.items() if session not in made}
        seen = story.seen[f"luo, after {name}"]
        assert seen["incoming"]["live"] is True
        assert held(seen["incoming"]) == {session: [*files] for session, files in left.items()}
        assert {s["retrieved"] for s in seen["incoming"]["sessions"]} <= {False}
        assert held(seen["outgoing"]) == {}
    assert story.seen["status, at last"]["sessions_incoming"] == []


def test_verdicts(story: Story) -> None:
    """Of each block, too: all is there until they take it back, and then nothing is left."""
    before, after, last = (story.reports[stage] for stage in ("before", "after", "at last"))
    assert {before["verdict"], after["verdict"], last["verdict"]} == {"pass"}
    assert before["counts"].keys() <= COST
    # Of each file: data, structure, the list of its folios and that list's chunk; and the lists.
    lists = sum(
        each["blocks"]
        for each in story.seen["owners"]["totals"]
        if each["owner"].endswith((": list of files", ": list of sessions"))
    )
    theirs = 4 * len(story.files) + lists
    # The last one is no session's: kho_test, which is built in, forgets its own FDT.
    assert after["fates"]["not-restored"] == theirs + 1
    assert after["counts"]["not-restored"] == theirs + 1
    assert after["counts"]["orphaned-session"] == len(story.made)
    assert last["fates"]["not-restored"] == 1
    assert last["fates"]["in-place"] == after["fates"]["in-place"]
    # A page that was freed may be somebody's again, and looks like one that was restored.
    taken = [
        report["fates"].get("released", 0) + report["fates"].get("restored", 0)
        for report in (after, last)
    ]
    assert taken[1] == taken[0] + theirs
    (left,) = (f["message"] for f in last["findings"] if f["rule"] not in {"no-image", *COST})
    assert left.startswith("subtree kho_test: ")
