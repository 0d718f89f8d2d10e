# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What becomes of blocks that KHO cuts where two NUMA nodes meet.

``kho_preserve_pages`` cuts there, and ``kho_restore_pages`` takes no notice: it restores the first
of the blocks, steps over the others, and returns success (linux 7.1 to 7.3).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import Abi
from ..facts.calls import NO_PHYS, NUMBERS, Calls
from ..facts.columns import Blocks, Pages
from ..facts.nodes import Border, Step, borders_of, ctz, step_across, steps_across
from ..facts.owners import UNKNOWN, Owners
from ..facts.snapshot import Snapshot
from ..facts.tree import KeySet
from .rule import Marked, Severity, also, rule

#: What the kernel does, and what to do about it.
STEPS_OVER = """
    kho_preserve_pages() lets no block lie in two NUMA nodes: __kho_preserve_pages_order() makes the
    blocks smaller where two nodes meet. kho_restore_pages() computes its steps from address and
    count alone, without a look at nodes or stamps. It restores the first of these blocks, steps
    over the others, and returns success. The pages that it steps over look restored, because the
    boot gave each of them a reference. But the page allocator does not count them as memory that it
    manages, and page->private of each block's first page still holds the stamp. The kernel is wrong
    here, and not the client. Restore the memory of each node with a call of its own.
"""


@rule(
    "cut-at-node",
    Severity.WARNING,
    "tree",
    STEPS_OVER
    + """
    Blocks do not tell what calls were made for them: if the client does so anyway, all is well.
    """,
    kernel="__kho_preserve_pages_order kho_preserve_pages kho_restore_pages",
)
def cut_at_node(facts: Snapshot, every: KeySet) -> Iterator[tuple[Blocks, Marked]]:
    """Blocks that kho_preserve_pages() cuts where two NUMA nodes meet: kho_restore_pages() restores
    the first of them and skips the others."""
    borders, shift = borders_of(facts), facts.abi.page_shift
    ladders = [_recorded(facts, every, border, borders) for border in borders]
    others = _others(facts, [key for ladder in ladders for _, keys in ladder for key in keys])
    said = set()
    for ladder in ladders:
        whole = list(itertools.takewhile(lambda rung: others.isdisjoint(rung[1]), ladder))
        # The largest step that can be; two borders may lie in one.
        for step, keys in whole[-1:]:
            if step.pfn not in said:
                said.add(step.pfn)
                key = np.array(keys[1:2], np.uint64)
                skipped = Blocks(key, *facts.abi.kho_radix_decode_keys(key))
                say = functools.partial(_forecast, step, shift)
                yield skipped, Marked(np.ones(1, np.bool_), say)


def _forecast(step: Step, page_shift: int, row: int) -> str:
    start, end = step.pfn << page_shift, step.pfn + (1 << step.order) << page_shift
    return (
        f"one kho_restore_pages() of {start:#x}..{end:#x} will restore {_pages(step.restored)} and "
        f"skip {_pages(step.skipped)}: the blocks are cut at {step.border.named(page_shift)}"
    )


def _pages(count: int) -> str:
    return "1 page" if count == 1 else f"{count:,} pages"


def _recorded(
    facts: Snapshot, every: KeySet, border: Border, borders: Sequence[Border]
) -> list[tuple[Step, list[int]]]:
    """
    The steps across a border all of whose blocks are preserved, with the keys of the blocks.

    Each step has the blocks of the one before it, and more.
    """
    abi, found = facts.abi, []
    end = int(facts.ram[-1, 1]) if len(facts.ram) else 0
    for order in range(ctz(border.pfn) + 1, abi.order_limit(end) + 1):
        step = step_across(border, order, borders)
        keys = [key for pfn, size in step.blocks if (key := _key(abi, every, pfn, size))]
        if len(keys) < len(step.blocks):
            break
        found.append((step, keys))
    return found


def _key(abi: Abi, every: KeySet, pfn: int, order: int) -> int:
    """The key under which the tree holds a block, whatever its type; 0: the tree does not."""
    keys = (abi.kho_radix_encode_key(pfn << abi.page_shift, order, t) for t in abi.key_types)
    return next((key for key in keys if key in every), 0)


def _others(facts: Snapshot, keys: list[int]) -> set[int]:
    """
    Those of some blocks that no call of ``kho_restore_pages`` restores together with their
    neighbours: folios, and what known clients have preserved.
    """
    found: set[int] = set()
    if keys:
        wanted = np.array(keys, np.uint64)
        owners = Owners.of_side(facts.outgoing, facts.abi.page_shift)
        for chunk in facts.outgoing.blocks:
            blocks = chunk[np.isin(chunk.key, wanted)]
            folio = blocks.facts.compound != Pages.NOT_COMPOUND
            found |= {*blocks.key[folio | (owners.of(blocks) != UNKNOWN)].tolist()}
    return found


@also("cut-at-node", "calls")
def call_cut_at_node(facts: Snapshot, calls: Calls) -> Marked:
    """A call of kho_preserve_pages() whose memory lies in two nodes."""
    borders, shift = borders_of(facts), facts.abi.page_shift

    def steps(row: int) -> list[Step]:
        pfn = int(calls.phys[row]) >> shift
        return steps_across(pfn, pfn + int(calls.pages[row]), borders)

    def say(row: int) -> str:
        found = steps(row)
        skipped = sum(step.skipped for step in found)
        return (
            f"kho_preserve_pages() of {_pages(int(calls.pages[row]))} has cut them at "
            f"{found[0].border.named(shift)}: kho_restore_pages() will skip {_pages(skipped)}"
        )

    asked = (calls.function == NUMBERS["kho_preserve_pages"]) & (calls.phys != NO_PHYS)
    cut = asked & ~calls.failed & np.bool_(bool(borders))
    for row in np.flatnonzero(cut).tolist():
        cut[row] = bool(steps(row))
    return Marked(cut, say)


def stepped_over(
    blocks: Blocks,
    came: NDArray[np.bool_],
    left: NDArray[np.bool_],
    borders: Sequence[Border],
    page_shift: int,
) -> dict[int, Step]:
    """
    Rows of blocks that were left when the first block of a step was restored, with the step.

    :param came: the blocks that were restored.
    :param left: the blocks that were not.
    """
    found: dict[int, Step] = {}
    for border in borders:
        # Every step across a border has a block that begins there.
        if not (left & (blocks.phys == np.uint64(border.pfn << page_shift))).any():
            continue
        for order in range(ctz(border.pfn) + 1, 64 - page_shift):
            step = step_across(border, order, borders)
            rows = [row for block in step.blocks for row in _rows(blocks, *block, page_shift)]
            if len(rows) < len(step.blocks):
                break
            if came[rows[0]] and left[rows[1:]].all():
                found |= dict.fromkeys(rows[1:], step)
    return found


def _rows(blocks: Blocks, pfn: int, order: int, page_shift: int) -> list[int]:
    """The row of a block; none: it is not there."""
    same = (blocks.phys == np.uint64(pfn << page_shift)) & (blocks.order == order)
    rows: list[int] = np.flatnonzero(same)[:1].tolist()
    return rows
