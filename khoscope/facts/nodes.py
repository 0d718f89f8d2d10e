# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Where NUMA nodes meet, and how KHO cuts blocks there.

``kho_preserve_pages`` makes a block smaller rather than let it lie in two nodes
(``__kho_preserve_pages_order`` in kexec_handover.c).  ``kho_restore_pages`` computes its steps
without a look at nodes.  The two agree except where a step of the second crosses a border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..abi.keys import Tracker
from .snapshot import Node, Snapshot

#: Scratch areas of a machine with one node: one in low memory, one anywhere, one for each node
#: (``kho_reserve_scratch``).
AREAS_OF_ONE_NODE: Final = 3


@dataclass(frozen=True)
class Border:
    """
    Where a node begins or ends in the middle of memory.

    :param pfn: of the first page behind it.
    :param below: number of the node in front of it.
    :param above: number of the node behind it.
    """

    pfn: int
    below: int
    above: int

    def named(self, page_shift: int) -> str:
        """The border in words."""
        return f"the border of nodes {self.below} and {self.above} ({self.pfn << page_shift:#x})"


@dataclass(frozen=True)
class Step:
    """
    A step of ``kho_restore_pages`` that crosses a border.

    :param pfn: where it begins.
    :param order: log2 of the pages that it goes on by.
    :param border: the first border that it crosses.
    :param blocks: pfn and order of the blocks that ``kho_preserve_pages`` makes of these pages.
    """

    pfn: int
    order: int
    border: Border
    blocks: tuple[tuple[int, int], ...]

    @property
    def restored(self) -> int:
        """Pages of the block that the step restores."""
        return 1 << self.blocks[0][1]

    @property
    def skipped(self) -> int:
        """Pages of the blocks that it steps over."""
        return (1 << self.order) - self.restored


def are_known(facts: Snapshot) -> bool:
    """Whether the facts tell at which borders this kernel cuts blocks, if any."""
    cuts = facts.abi.tracker == Tracker.RADIX
    return not cuts or facts.nodes is not None or len(facts.scratch) == AREAS_OF_ONE_NODE


def borders_of(facts: Snapshot) -> list[Border]:
    """
    The borders at which this kernel cuts blocks, in order.

    Nodes may interleave, and a kernel knows only from where to where a node reaches.  Where a node
    begins or ends inside another, there is a border, too; where two nodes take turns more often,
    the borders in between are not known.  Kernels that track preserved memory in xarrays do not
    cut.
    """
    if facts.abi.tracker != Tracker.RADIX:
        return []
    return _borders(facts.nodes or (), facts.abi.page_shift)


def _borders(nodes: Sequence[Node], page_shift: int) -> list[Border]:
    spans = [(node.start >> page_shift, node.end >> page_shift, node.number) for node in nodes]
    found = []
    for pfn in sorted({edge for start, end, _ in spans for edge in (start, end)}):
        below = {number for start, end, number in spans if start < pfn <= end}
        above = {number for start, end, number in spans if start <= pfn < end}
        # Of the nodes that begin or end here, one is on that side alone.
        if below and above and below != above:
            left, right = below - above or below, above - below or above
            found.append(Border(pfn, min(left), min(right)))
    return found


def steps_across(pfn: int, end: int, borders: Sequence[Border]) -> list[Step]:
    """The steps in which ``kho_restore_pages`` crosses a border on its way from pfn to end."""
    found: list[Step] = []
    for border in borders:
        if found and border.pfn < found[-1].pfn + (1 << found[-1].order):
            continue
        # The steps are the largest aligned blocks that fit.
        orders = range(ctz(border.pfn) + 1, (end - pfn).bit_length())
        within = [
            order
            for order in orders
            if pfn <= border.pfn >> order << order and (border.pfn >> order) + 1 << order <= end
        ]
        if within:
            found.append(step_across(border, within[-1], borders))
    return found


def step_across(border: Border, order: int, borders: Sequence[Border]) -> Step:
    """
    The step of this order that crosses a border.

    :param order: more than the border's own alignment.
    """
    pfn = border.pfn >> order << order
    blocks = tuple(kho_preserve_pages(pfn, pfn + (1 << order), borders))
    first = next(each for each in borders if each.pfn > pfn)
    return Step(pfn, order, first, blocks)


def kho_preserve_pages(
    pfn: int, end: int, borders: Sequence[Border] = ()
) -> Iterator[tuple[int, int]]:
    """Pfn and order of the blocks that the kernel's function of this name makes of a range."""
    while pfn < end:
        order = min(ctz(pfn), (end - pfn).bit_length() - 1)
        ahead = next((border.pfn - pfn for border in borders if border.pfn > pfn), 1 << order)
        order = min(order, ahead.bit_length() - 1)
        yield pfn, order
        pfn += 1 << order


def ctz(pfn: int) -> int:
    """``count_trailing_zeros``: log2 of the largest block that may begin at a page."""
    return (pfn & -pfn).bit_length() - 1 if pfn else 64
