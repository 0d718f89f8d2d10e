# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Refcount patterns, the one place that says what "contig" and "split" look like in struct pages.

The first page of a block counts who holds it: at least 1, more for a folio in the page cache.
The other pages are at 0 in memory that was never split, and are each held for themselves where it
was.  This is the distinction that the series makes by the second page's refcount.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..abi import KHO_PAGE_SPLIT, NO_TYPE, TYPE_NAMES, Abi
from ..columns import Blocks, Pages


def readable(pages: Pages) -> NDArray[np.bool_]:
    """Blocks all of whose struct pages were read."""
    return pages.unread == 0


def held(pages: Pages) -> NDArray[np.bool_]:
    """Blocks whose first page is held, and of which no page is free."""
    return readable(pages) & (pages.head > 0) & (pages.free == 0)


def tails(pages: Pages) -> NDArray[np.int64]:
    """How many pages follow the first."""
    return pages.zeros.astype(np.int64) + pages.ones + pages.others


def is_contig(pages: Pages) -> NDArray[np.bool_]:
    """Head held, tails at 0.  A single page is both contig and split."""
    return held(pages) & (pages.zeros == tails(pages))


def is_split(pages: Pages) -> NDArray[np.bool_]:
    """Every page held for itself, and not parts of a compound page."""
    return held(pages) & (pages.zeros == 0) & (pages.compound <= 0)


def restores_split(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    """
    Blocks that the next kernel will restore with a refcount on every page.

    It is assumed to be the same kernel as this one, and clients to restore what is a folio with
    ``kho_restore_folio`` and all else with ``kho_restore_pages`` (``kho_init_pages`` and
    ``kho_init_folio`` in kexec_handover.c).
    """
    folio = blocks.facts.compound > 0
    if not abi.has_types:
        return ~folio
    return ~folio & (blocks.type == KHO_PAGE_SPLIT)


def has_page_type(pages: Pages) -> NDArray[np.bool_]:
    """
    First pages with a page type: slab, page table and so on, not what KHO restores.

    ``page_type`` shares its word with ``_mapcount``: a count has its top bit clear, -1 means
    neither (``page_type_has_type`` in page-flags.h).
    """
    top = pages.page_type >> np.uint32(24)
    return (top >= 0x80) & (top < 0xFF)


def describe(pages: Pages, row: int) -> str:
    """
    The pattern of one block in words, like ``1/0`` (head/tails) or ``1/0 but 1 at page 4``.
    """
    head = int(pages.head[row])
    if pages.unread[row]:
        return f"{pages.unread[row]} struct pages unreadable"
    count = int(tails(pages)[row])
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
    return text


def type_name(page_type: int) -> str:
    """``contig``, ``split``, or ``untyped``."""
    return TYPE_NAMES.get(page_type) or "untyped"


def typed(blocks: Blocks) -> NDArray[np.bool_]:
    return blocks.type != NO_TYPE
