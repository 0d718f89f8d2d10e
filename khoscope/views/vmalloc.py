# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope vmalloc``, and of vmalloc areas and ranges of memory elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

from ..abi.serialized import KHO_VMALLOC_FLAGS, bits
from ..checks import Finding
from ..facts.clients import Claims, Vmalloc
from ..facts.owners import ClaimsByOwner
from ..facts.snapshot import Snapshot
from . import documents
from .text import Text, counted


class VmallocText(Text):
    """Prints vmalloc areas as text."""

    def vmalloc(self, facts: Snapshot, findings: Iterable[Finding]) -> None:
        """Print the one area of the outgoing side."""
        self.header(facts)
        memory = ClaimsByOwner(facts.outgoing, facts.abi.page_shift)
        for area in facts.outgoing.vmallocs:
            self.line()
            self.line(f"struct kho_vmalloc at {area.phys:#014x}: {area.name}")
            self._area(memory, area)
        for found in findings:
            at = "" if found.phys is None else f"{found.phys:#014x} "
            self.wrapped(f"{found.rule}: {at}{found.message}", "    ", self.paint("red", "error: "))

    def _area(self, memory: ClaimsByOwner, area: Vmalloc) -> None:
        """Print what the descriptor says, the chunks, and the pages that the chunks list."""
        flags = " ".join(bits(area.flags, KHO_VMALLOC_FLAGS)) or "none"
        self.line(
            f"  {counted(area.total_pages, 'page')} of order {area.order}, flags {flags}, "
            f"first chunk {area.first:#x}"
        )
        for part, number, what in (
            (memory.chunks(area), area.chunks, "chunk"),
            (memory.pages(area), area.listed, "page"),
        ):
            self.line(f"  {counted(number, what)}{':' if len(part) else ''}")
            self.ranges(part, "    ")

    def ranges(self, claims: Claims, indent: str) -> None:
        """Print ranges of memory, one per line."""
        for phys, size in islice(
            zip(claims.phys.tolist(), claims.size.tolist(), strict=True), self._limit
        ):
            self.line(f"{indent}{phys:#014x}..{phys + size:#014x}")
        self._more(len(claims), len(claims), "ranges")


def range_rows(claims: Claims) -> list[dict[str, Any]]:
    """Ranges of memory."""
    return [
        {"phys": f"{phys:#x}", "size": size}
        for phys, size in zip(claims.phys.tolist(), claims.size.tolist(), strict=True)
    ]


def area_row(memory: ClaimsByOwner, area: Vmalloc) -> dict[str, Any]:
    """A vmalloc area."""
    return {
        "name": area.name,
        "phys": f"{area.phys:#x}",
        "first": f"{area.first:#x}",
        "total_pages": area.total_pages,
        "order": area.order,
        "flags": bits(area.flags, KHO_VMALLOC_FLAGS),
        "chunks": range_rows(memory.chunks(area)),
        "pages": range_rows(memory.pages(area)),
        "listed": area.listed,
        "problems": area.problems,
    }


def write_json(facts: Snapshot, findings: Iterable[Finding], out: IO[str]) -> None:
    """``vmalloc --json``, schema khoscope.vmalloc/1."""
    memory = ClaimsByOwner(facts.outgoing, facts.abi.page_shift)
    document = {
        "schema": "khoscope.vmalloc/1",
        **documents.about(facts),
        "areas": [area_row(memory, area) for area in facts.outgoing.vmallocs],
        "findings": [documents.finding(found) for found in findings],
    }
    documents.write(document, out)
