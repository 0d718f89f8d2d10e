# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the pages of some memory are used for, as their struct pages tell.

Kernel sources: ``include/linux/page-flags.h``, ``include/linux/mm.h`` (``folio_maybe_dma_pinned``,
``folio_expected_ref_count``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..facts.page_runs import PageRuns, page_types
from ..facts.snapshot import PageUse, ScratchUse
from .pages import PageReader, StructPages

#: ``GUP_PIN_COUNTING_BIAS``, a #define: what a pin adds to the refcount of a single page.
PIN_BIAS: Final = 1024
#: Low bits of ``page->mapping`` (``FOLIO_MAPPING_ANON`` and ``PAGE_MAPPING_MOVABLE``, #defines).
MAPPING_ANON, MAPPING_MOVABLE, MAPPING_BITS = 1, 2, 3

#: Codes of uses: those of page types are their numbers, which are 0x80 and more.
_CODES: Final = list(PageUse)
_FREE: Final = 0x7F
#: Uses of memory that has mappings, so that they say how many references there should be.
_MAPPED: Final = tuple(_CODES.index(use) for use in (PageUse.FILE, PageUse.ANON, PageUse.SHMEM))


@dataclass(frozen=True)
class UseLayout:
    """
    What tells the use of a page, beside what :class:`PageLayout` has.

    :param reserved: bit of ``page->flags``, as a mask; 0: this kernel has no such flag.  The others
        likewise.
    :param mapcount: offset of ``_large_mapcount`` in ``struct folio``; None: it has none.
    :param pincount: of ``_pincount``, likewise.
    """

    reserved: int
    swapbacked: int
    swapcache: int
    private: int
    mapcount: int | None
    pincount: int | None


@dataclass(frozen=True)
class _Uses:
    """Some pages, each a row: codes of their uses, and which are pinned or held."""

    code: NDArray[np.uint8]
    pinned: NDArray[np.bool_]
    held: NDArray[np.bool_]

    def __getitem__(self, rows: slice) -> _Uses:
        return _Uses(self.code[rows], self.pinned[rows], self.held[rows])


class UseReader:
    """
    Finds out what pages are used for.

    :param names: of page types, by number.
    :param moves: the kernel runs meanwhile.
    :param looked: called with how many more pages were looked at.
    """

    def __init__(
        self,
        pages: PageReader,
        layout: UseLayout,
        names: dict[int, str],
        moves: bool,
        looked: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._pages = pages
        self._layout = layout
        self._names = names
        self._moves = moves
        self._looked = looked

    def uses(self, start: int, end: int) -> tuple[int, ScratchUse]:
        """
        How many of the pages [start, end), pfns, the buddy allocator has, and what the others are
        used for.
        """
        codes = np.zeros(256, np.int64)
        pinned = held = seen = 0
        for uses in self._windows(start, end):
            seen += len(uses.code)
            codes += np.bincount(uses.code, minlength=256)
            pinned += int(uses.pinned.sum())
            held += int(uses.held.sum())
        counts: Counter[str] = Counter()
        for code in np.flatnonzero(codes).tolist():
            if code != _FREE:
                counts[self._name(code)] += int(codes[code])
        use = ScratchUse(None, dict(counts), pinned, held, end - start - seen)
        return int(codes[_FREE]), use

    def _name(self, code: int) -> str:
        return _CODES[code] if code < len(_CODES) else self._names.get(code, f"type {code:#x}")

    def _windows(self, start: int, end: int) -> Iterator[_Uses]:
        """The pages that can be read, in runs."""
        for low, high in self._pages.windows(start, end):
            # A compound page may begin in front of the window, but never in front of its region,
            # if it is not one of hugetlb's gigantic ones.
            for at, uses in self._look(low, high):
                yield uses[max(start - at, 0) : max(end - at, 0)]
            self._looked(min(high, end) - max(low, start))

    def _look(self, low: int, high: int) -> Iterator[tuple[int, _Uses]]:
        kernel = _CODES.index(PageUse.KERNEL)
        found = list(self._read(low, high))
        if not self._moves or not any((uses.code == kernel).any() for _, uses in found):
            yield from found
            return
        # A page that changes hands has references, too, before anything says what it is for.
        again = list(self._read(low, high))
        if [(at, len(uses.code)) for at, uses in found] != [(at, len(u.code)) for at, u in again]:
            yield from again
            return
        for (at, uses), (_, later) in zip(found, again, strict=True):
            passed = (uses.code == kernel) & (later.code != kernel)
            uses.code[passed] = _CODES.index(PageUse.TRANSIT)
            yield at, uses

    def _read(self, low: int, high: int) -> Iterator[tuple[int, _Uses]]:
        for at, pages, buddy in self._pages.with_buddies(low, high):
            yield at, self._uses(at, pages, buddy != PageRuns.ALLOCATED)

    def _uses(self, at: int, pages: StructPages, free: NDArray[np.bool_]) -> _Uses:
        tail = pages.is_tail
        code = self._codes(pages, free)
        pinned, held = self._references(pages, code)
        # A tail is what its head is.
        head = np.maximum.accumulate(np.where(tail, -1, np.arange(len(tail))))
        uses = _Uses(code[head], pinned[head], held[head])
        astray = head < 0
        if astray.any():
            first = self._head_of(at)
            uses.code[astray], uses.pinned[astray], uses.held[astray] = first
        return uses

    def _codes(self, pages: StructPages, free: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """The use of each page that is no tail."""
        flags, mapping = pages.flags, pages.mapping
        typed = page_types(pages.page_type)
        low = mapping & np.uint64(MAPPING_BITS)

        def having(mask: int) -> NDArray[np.bool_]:
            return flags & np.uint64(mask) != 0

        uses: list[tuple[NDArray[np.bool_], Any]] = [
            (free, _FREE),
            (having(self._layout.reserved), _CODES.index(PageUse.RESERVED)),
            (typed != PageRuns.UNTYPED, typed),
            (low & np.uint64(MAPPING_ANON) != 0, _CODES.index(PageUse.ANON)),
            (low == MAPPING_MOVABLE, _CODES.index(PageUse.DRIVER_MOVABLE)),
            (
                (mapping != 0) & having(self._layout.swapbacked),
                _CODES.index(PageUse.SHMEM),
            ),
            (mapping != 0, _CODES.index(PageUse.FILE)),
            (pages.refcount == 0, _CODES.index(PageUse.PCP)),
        ]
        conditions, choices = zip(*uses, strict=True)
        kernel = _CODES.index(PageUse.KERNEL)
        chosen = np.select(conditions, [np.asarray(c, np.uint8) for c in choices], kernel)
        return chosen.astype(np.uint8)

    def _references(
        self, pages: StructPages, code: NDArray[np.uint8]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of the pages that are no tails are pinned, and which have references to spare."""
        mapped = np.isin(code, _MAPPED)
        order = np.append(pages.compound_order(), np.int8(-1)).astype(np.int64)
        large = order > 0
        refcount = pages.refcount.astype(np.int64)
        # _mapcount and _large_mapcount begin at -1.
        mapcount = pages.page_type.view(np.int32).astype(np.int64) + 1
        if self._layout.mapcount is not None:
            mapcount = np.where(large, pages.of_folio(self._layout.mapcount) + 1, mapcount)
        flags = pages.flags
        cached = code != _CODES.index(PageUse.ANON)
        cached |= flags & np.uint64(self._layout.swapcache) != 0
        expected = mapcount + np.where(cached, 1 << np.clip(order, 0, 40), 0)
        private = flags & np.uint64(self._layout.private) != 0
        expected += private & (code == _CODES.index(PageUse.FILE))
        # A page that many have mapped has as many references.
        pincount = (refcount - expected) // PIN_BIAS
        if self._layout.pincount is not None:
            pincount = np.where(large, pages.of_folio(self._layout.pincount), pincount)
        pinned = mapped & (pincount > 0)
        return pinned, mapped & ~pinned & (refcount > expected)

    def _head_of(self, pfn: int) -> tuple[int, bool, bool]:
        """The use of the compound page of which a page is a tail, and which begins before it."""
        for order in range(1, 64):
            at = pfn >> order << order
            for begin, uses in self._head(at) if at < pfn else ():
                if begin == at:
                    return int(uses.code[0]), bool(uses.pinned[0]), bool(uses.held[0])
            if not at:
                break
        return _CODES.index(PageUse.KERNEL), False, False

    def _head(self, pfn: int) -> Iterator[tuple[int, _Uses]]:
        """The page, if it is the head of a compound page."""
        for at, pages, _ in self._pages.with_buddies(pfn, pfn + 2):
            if len(pages.flags) > 1 and pages.compound_order()[0] > 0:
                free = np.zeros(len(pages.flags), np.bool_)
                code = self._codes(pages, free)
                yield at, _Uses(code, *self._references(pages, code))
