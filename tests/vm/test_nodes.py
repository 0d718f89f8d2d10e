# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A guest whose NUMA nodes meet in the middle of preserved memory, through a kexec.

What ``kho_restore_pages`` skips there is what khoscope forecasts, and then misses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.vm.test_rules import Look, phys
from vm.exercise import Piece
from vm.machine import Machine

#: Where nodes 0 and 1, and 1 and 2 meet: at multiples of four pages and of one.
HALVES, SINGLE = 0x2010_4000, 0x2800_5000
PAGE = 4096


def managed(machine: Machine) -> int:
    """How many pages the page allocator manages."""
    zones = machine.run(("cat", "/proc/zoneinfo"), check=True).stdout
    return sum(map(int, re.findall(r"managed +(\d+)", zones)))


def skipped(look: Look, before: Path) -> list[Any]:
    """The findings that say what the kernel has skipped."""
    findings = look.verify("--before", str(before), "--only", "not-restored")
    return [found for found in findings if "skipped at" in found["message"]]


def preserved(look: Look) -> list[Piece]:
    return [piece for piece in look.exercise.report() if piece.state == "preserved"]


def blocks_at(look: Look, *pieces: Piece) -> list[tuple[int, int]]:
    """Address and pages of the blocks that lie in some pieces."""
    every = look.ask("tree", "--limit", "0")["blocks"]
    found = [(int(block["phys"], 16), block["pages"]) for block in every]
    spans = [span for piece in pieces for span in piece.ranges]
    return [block for block in found if any(a <= block[0] < b for a, b in spans)]


@pytest.mark.parametrize("kernel", ["7.2-base"])
def test_memory_of_two_nodes(kernel: str, tmp_path: Path) -> None:
    before = tmp_path / "before.khosnap"
    # A kernel that KASLR puts into the small node in the middle needs more scratch there than that
    # node has, and switches KHO off.
    borders = (HALVES >> 10, SINGLE >> 10)
    with Machine(kernel, append="nokaslr", borders=borders) as machine:
        look = Look(machine)
        nodes = look.ask("status")["nodes"]
        assert [int(node["phys"], 16) for node in nodes[1:]] == [HALVES, SINGLE]

        # Unpreserving cuts as preserving does.
        look.exercise.load()
        look.exercise.preserve("node-border", HALVES)
        (first,) = preserved(look)
        assert blocks_at(look, first) == [(HALVES - 4 * PAGE, 4), (HALVES, 4)]
        look.exercise.free("node-border")
        assert blocks_at(look, first) == []

        look.exercise.preserve("node-border", HALVES)
        look.exercise.preserve("node-halves", SINGLE)
        one, each = preserved(look)
        assert (phys(one), one.pages) == (f"{HALVES - 4 * PAGE:#x}", 8)
        assert (phys(each), each.pages) == (f"{SINGLE - PAGE:#x}", 2)
        machine.load_kexec()
        # Some of these pages are in use, and may be anything.
        cut = look.verify("--only", "cut-at-node")
        assert [(f["phys"], f["order"], f["severity"]) for f in cut] == [
            (f"{HALVES:#x}", 2, "warning"),
            (f"{SINGLE:#x}", 0, "warning"),
        ]
        assert "will restore 4 pages and skip 4 pages" in cut[0]["message"]

        look.ask("snapshot", str(before))
        machine.execute_kexec()
        look.exercise.load()
        assert skipped(look, before) == []
        counts = [managed(machine)]
        for scenario in ("node-border", "node-halves"):
            look.exercise.restore(scenario)
            counts.append(managed(machine))
        # Restored as asked, says KHO, and all pages have a reference. Half of them were not.
        for piece in look.exercise.report():
            if piece.state == "restored":
                assert (piece.ret, piece.shape) == (0, "1/1")
        assert [counts[1] - counts[0], counts[2] - counts[1]] == [4, 2]
        (missed,) = skipped(look, before)
        assert (missed["phys"], missed["order"]) == (f"{HALVES:#x}", 2)
        assert f"the block at {phys(one)} was restored" in missed["message"]
        assert "The kernel is wrong here" in missed["explain"]
