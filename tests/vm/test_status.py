# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope status`` and ``khoscope pages`` on real kernels, on both sides of a kexec."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest

from tests.vm.test_khoscope import guest, host
from vm.exercise import Exercise, Piece
from vm.luo import Memfd, hold
from vm.machine import Machine

SCENARIOS = ["contig", "split", "folio", "dma", "vmalloc"]
MEMFDS = {1: Memfd(4096), 2: Memfd(4 << 20)}
#: QEMU's memory of the guest, bytes.
MEMORY = 1 << 30


def refcounts(runs: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Run lengths of the reference counts, as the module reports them."""
    return [
        (value, sum(run["pages"] for run in same))
        for value, same in groupby(runs, key=lambda run: run["refcount"])
    ]


def look(at: tuple[str, ...], piece: Piece) -> list[dict[str, Any]]:
    """The runs of a piece's pages."""
    found: list[dict[str, Any]] = []
    for first, end in piece.ranges:
        found += json.loads(host(*at, "pages", f"{first:#x}..{end:#x}", "--json"))["runs"]
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A machine of which something is preserved, through a kexec: what was seen when."""
    seen: dict[str, Any] = {}
    snapshot = tmp_path_factory.mktemp("status") / "before.khosnap"
    with Machine("7.2-fixed") as machine:
        qemu = machine.source

        def status(*at: str) -> Any:
            return json.loads(host(*at, "status", "--json"))

        exercise = Exercise(machine)
        exercise.load()
        for name in SCENARIOS:
            exercise.preserve(name)
        held = hold(machine, "guests", MEMFDS)
        seen["no image"] = status(*qemu)
        machine.run(("kexec", "-c", "-l", "/kernel/bzImage", "--command-line=x"), check=True)
        seen["plain image"] = status(*qemu)
        machine.run(("kexec", "-u"), check=True)
        machine.load_kexec()
        seen["before"] = status(*qemu)
        seen["text"] = guest(machine, "status")
        seen["pieces"] = [p for p in exercise.report() if len(p.ranges) == 1]
        seen["pages"] = [look(qemu, piece) for piece in seen["pieces"]]
        seen["memfds"] = [r for file in held.files.values() for r in file.ranges]
        seen["memfd pages"] = [
            json.loads(host(*qemu, "pages", f"{first:#x}..{end:#x}", "--json"))["runs"]
            for first, end in seen["memfds"][:8]
        ]
        host(*qemu, "snapshot", str(snapshot))
        offline = ("--snapshot", str(snapshot))
        seen["offline"] = status(*offline)
        seen["offline pages"] = [look(offline, piece) for piece in seen["pieces"]]
        machine.execute_kexec()
        seen["after"] = status(*qemu)
        seen["stamped pages"] = [look(qemu, piece) for piece in seen["pieces"]]
        lines = host(*qemu, "pages", f"0..{MEMORY:#x}", "--jsonl").splitlines()
        seen["all pages"] = [json.loads(line) for line in lines]
    with Machine("7.2-base", append="kho=off") as machine:
        qemu = machine.source
        seen["off"] = status(*qemu)
        seen["pages when off"] = json.loads(host(*qemu, "pages", "0x1000000", "--json"))["runs"]
    return seen


def test_on(seen: dict[str, Any]) -> None:
    for when in ("no image", "before", "after", "offline"):
        assert seen[when]["kho"] == {
            "on": True,
            "why": "kho=on on the command line",
            "enabled": True,
        }
        assert seen[when]["liveupdate"] is True
        assert seen[when]["compatible"]["handlers"] == ["memfd-v2"]
        assert seen[when]["compatible"]["luo"] == "luo-v5"
        assert all(subtree["preserved"] for subtree in seen[when]["subtrees"])
        free = [area["free"] for area in seen[when]["scratch"]]
        assert all(
            0 <= f <= area["size"] for f, area in zip(free, seen[when]["scratch"], strict=True)
        )
        assert any(free)


def test_off(seen: dict[str, Any]) -> None:
    off = seen["off"]
    assert off["kho"] == {"on": False, "why": "kho=off on the command line", "enabled": False}
    assert (off["liveupdate"], off["scratch"], off["subtrees"]) == (False, [], [])
    assert off["tree"] == {"pages": 0, "preserved_per_byte": None}
    [page] = seen["pages when off"]
    assert (page["seen"], page["pages"]) == ("read", 1)


def test_the_image(seen: dict[str, Any]) -> None:
    assert seen["no image"]["image"]["loaded"] is False
    plain, ours = seen["plain image"]["image"], seen["before"]["image"]
    assert (plain["loaded"], plain["file_mode"], plain["kho_fdt"]) == (True, False, "0x0")
    assert (ours["loaded"], ours["file_mode"]) == (True, True)
    assert int(ours["kho_fdt"], 16)
    assert ours["size"] > 1 << 20


def test_the_handover(seen: dict[str, Any]) -> None:
    before, after = seen["before"], seen["after"]
    assert before["handover"]["is_kho_boot"] is False
    assert before["unclaimed"] == []
    assert after["handover"]["is_kho_boot"] is True
    assert after["handover"]["kexec_count"] == 1
    assert after["handover"]["previous_release"] == before["kernel"]["release"]
    assert {s["name"] for s in after["subtrees_incoming"]} == {
        s["name"] for s in before["subtrees"]
    }
    # Nobody has claimed a thing but what the kernel itself does at boot.
    was = {(t["order"], t["type"]): t["blocks"] for t in before["preserved"]}
    now = {(t["order"], t["type"]): t["blocks"] for t in after["unclaimed"]}
    assert all(0 < blocks <= was[kind] for kind, blocks in now.items())
    assert sum(now.values()) > len(seen["pieces"])


def test_sessions(seen: dict[str, Any]) -> None:
    [session] = seen["before"]["sessions"]
    assert (session["name"], session["files"]) == ("guests", 2)
    [handed] = seen["after"]["sessions_incoming"]
    assert (handed["name"], handed["files"]) == ("guests", 2)
    assert "sessions    guests: 2 files" in seen["text"]


def test_a_snapshot_says_the_same(seen: dict[str, Any]) -> None:
    # The boot id is made when somebody asks for it; what is in scratch comes and goes.
    same = seen["before"].keys() - {"taken", "kernel", "scratch"}
    assert {name: seen["offline"][name] for name in same} == {
        name: seen["before"][name] for name in same
    }


def test_text_fits_a_terminal(seen: dict[str, Any]) -> None:
    assert max(map(len, seen["text"].splitlines())) <= 80
    assert "[kexec_image]" in seen["text"]


def test_pages_are_what_the_module_sees(seen: dict[str, Any]) -> None:
    """Refcounts against what kernel code reads, page by page; all preserved, none free."""
    assert len(seen["pieces"]) >= len(SCENARIOS)
    for piece, runs in zip(seen["pieces"], seen["pages"], strict=True):
        assert refcounts(runs) == list(piece.refs), piece
        assert all(run["block"] and run["free"] is None for run in runs), piece
        assert (runs[0]["compound"] is not None) == (piece.compound and piece.pages > 1), piece


def test_a_snapshot_has_the_refcounts(seen: dict[str, Any]) -> None:
    for piece, runs in zip(seen["pieces"], seen["offline pages"], strict=True):
        assert refcounts(runs) == list(piece.refs), piece


def test_owners_of_memfds(seen: dict[str, Any]) -> None:
    for runs in seen["memfd pages"]:
        assert all("guests" in run["owner"] for run in runs if run["owner"]), runs
        assert any(run["owner"] for run in runs), runs


def test_stamps(seen: dict[str, Any]) -> None:
    for piece, runs in zip(seen["pieces"], seen["stamped pages"], strict=True):
        assert runs[0]["stamp"] is not None, piece


def test_all_of_ram(seen: dict[str, Any]) -> None:
    runs = seen["all pages"]
    assert sum(run["pages"] for run in runs) == MEMORY >> 12
    assert {run["seen"] for run in runs} == {"read", "outside_ram"}
    stamps = sum(total["blocks"] for total in seen["after"]["unclaimed"])
    assert sum(run["pages"] for run in runs if run["stamp"]) == stamps
    assert any(run["page_type"] == "slab" for run in runs)
    assert any(run["free"] == 10 and run["pages"] == 1023 for run in runs)
    assert any("swapbacked" in (run["flags"] or []) for run in runs)
