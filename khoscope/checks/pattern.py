# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Refcount patterns, the one place that says what "contig" and "split" look like in struct pages.

The first page of a block counts who holds it: at least 1, more for a folio in the page cache.  In
memory that was never split, the other pages are at 0; in split memory, each page is held for
itself.  The series makes this distinction by the second page's refcount.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import KHO_PAGE_CONTIG, NO_TYPE, TYPE_NAMES, U64, Abi, Restore
from ..facts.columns import Blocks, Leaves, Pages
from ..facts.snapshot import Snapshot

#: The rule whose finding explains all that is wrong with blocks of a lost order.
ORDER_LOST: Final = "order-not-stored"


def readable(pages: Pages) -> NDArray[np.bool_]:
    """Blocks all of whose struct pages were read."""
    return pages.unread == 0


def held(pages: Pages) -> NDArray[np.bool_]:
    """Blocks whose first page is held, and that have no free page."""
    return readable(pages) & (pages.head > 0) & (pages.free == 0)


def is_contig(pages: Pages) -> NDArray[np.bool_]:
    """Head held, tails at 0.  A single page is both contig and split."""
    return held(pages) & (pages.zeros == pages.tails)


def is_split(pages: Pages) -> NDArray[np.bool_]:
    """Every page is held for itself, and the pages are not parts of a compound page."""
    return held(pages) & (pages.zeros == 0) & (pages.compound <= 0)


def restores_split(
    abi: Abi, types: NDArray[np.int8], as_folio: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """
    Blocks that a restore gives a refcount on every page.

    Kernels without types do that to everything except folios (``kho_init_pages`` and
    ``kho_init_folio`` in kexec_handover.c); the oldest restore nothing but folios.
    """
    if abi.restores_pages_as == Restore.FOLIO:
        return np.zeros(len(types), np.bool_)
    return ~as_folio & (types != KHO_PAGE_CONTIG)


def stays_compound(
    abi: Abi, order: NDArray[np.uint8], as_folio: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """
    Blocks that are restored as pages and keep the flags of a compound page.

    ``kho_restore_page`` of linux 6.18 makes a compound page of every block, and ``split_page``,
    which is not made for those, only sets its refcounts.
    """
    return ~as_folio & (order > 0) & (abi.restores_pages_as == Restore.SPLIT_FOLIO)


def lost_type(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    """Split blocks of several pages that are recorded contig because the tree dropped the type."""
    if not abi.has_types or abi.type_is_stored or abi.type_is_refused:
        return np.zeros(len(blocks), np.bool_)

    def lost(blocks: Blocks) -> NDArray[np.bool_]:
        pages = blocks.facts
        return (blocks.type == KHO_PAGE_CONTIG) & is_split(pages) & (pages.tails > 0)

    return blocks.by_look(lost)


def lost_order(facts: Snapshot, blocks: Blocks) -> NDArray[np.bool_]:
    """
    Blocks that are none: the tree dropped the order bit of single pages.

    All that is left of the key of such a page is the page's number.  The keys of other blocks are
    higher than the numbers of all pages in RAM, up to blocks of 32 GiB on machines with 8 TiB.
    """
    return _are_page_numbers(facts, blocks.key, 1)


def lost_orders(facts: Snapshot, leaves: Leaves) -> NDArray[np.bool_]:
    """Leaves with such blocks, and with no others."""
    return _are_page_numbers(facts, leaves.key, facts.abi.leaf_bits)


def _are_page_numbers(facts: Snapshot, keys: U64, count: int) -> NDArray[np.bool_]:
    """Keys that begin so many numbers of pages, of which some lie in RAM; a lost order's."""
    if facts.abi.order_is_stored or not len(facts.ram):
        return np.zeros(len(keys), np.bool_)
    shift = np.uint64(facts.abi.page_shift)
    at = np.searchsorted(facts.ram[:, 0], (keys + np.uint64(count)) << shift).astype(np.int64) - 1
    return (at >= 0) & (facts.ram[np.maximum(at, 0), 1] > keys << shift)


def fits(pages: Pages, split: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Blocks that are what they should be, split or contig."""
    return np.where(split, is_split(pages), is_contig(pages))


def differs(was: Pages, now: Pages) -> NDArray[np.bool_]:
    """
    Blocks that had another pattern, or none, before the kexec.

    It leaves out blocks that cannot be judged: their pages were not read, or were free already.
    """
    same = (is_contig(was) & is_contig(now)) | (is_split(was) & is_split(now))
    return readable(was) & (was.free == 0) & readable(now) & ~same


def named(order: int, split: bool) -> str:
    """The refcounts (head/tails) of a block that is split, or contig."""
    return "1" if order == 0 else "1/1" if split else "1/0"


def describe(pages: Pages, row: int, order: int = 0) -> str:
    """
    The pattern of one block in words, like ``1/0`` (head/tails) or ``1/0 but 1 at page 4``.

    :param order: the block's; if fewer pages were looked at, the text says so.
    """
    head = int(pages.head[row])
    if pages.unread[row]:
        return f"{pages.unread[row]} struct pages unreadable"
    count = int(pages.tails[row])
    if count == 0:
        text = f"{head}"
    elif pages.zeros[row] == count:
        text = f"{head}/0"
    elif pages.ones[row] == count:
        text = f"{head}/1"
    else:
        parts = [
            f"{n} at {what}"
            for n, what in (
                (pages.zeros[row], "0"),
                (pages.ones[row], "1"),
                (pages.others[row], "more"),
            )
            if n
        ]
        text = f"{head}/mixed (tails: {', '.join(parts)}; first odd page {pages.odd[row]})"
    if pages.compound[row] >= 0:
        text += f" compound order {pages.compound[row]}"
    elif pages.compound[row] == Pages.COMPOUND_TAIL:
        text += " inside a compound page"
    if count + 1 < 1 << order:
        text += f" in the {count + 1:,} pages looked at"
    return text


def type_name(page_type: int) -> str:
    """``contig``, ``split``, or ``untyped``."""
    return TYPE_NAMES.get(page_type) or "untyped"


def typed(blocks: Blocks) -> NDArray[np.bool_]:
    return blocks.type != NO_TYPE
