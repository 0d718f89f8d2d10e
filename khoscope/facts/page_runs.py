# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the struct pages of a range of memory say, page by page: equal neighbours form one run.

A range may be all of a host's RAM.  khoscope goes through it window by window, in columns, whether
it reads the struct pages from a kernel or takes what a snapshot recorded of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, NO_TYPE, U64, Abi
from ..words.errors import KhoscopeError
from .by_address import of_kinds
from .columns import Blocks, Columns, Pages, page_type_has_type
from .owners import UNKNOWN, Owners
from .snapshot import Snapshot
from .tree import KeySet

#: How many pages of a snapshot one window has.
WINDOW: Final = 1 << 15


class PageKnowledge(IntEnum):
    """How much is known about a page."""

    #: Its struct page was read.
    READ = 0
    #: A snapshot recorded only its refcount: it is not the first page of its block.
    REFCOUNT = 1
    #: A snapshot recorded how many pages of its block have which refcount, but not which one this
    #: page has.
    COUNTED = 2
    #: Its struct page cannot be read.
    UNREAD = 3
    #: A snapshot says nothing about it.
    UNRECORDED = 4
    #: No System RAM is there.
    OUTSIDE_RAM = 5
    #: It is a tail of a hugetlb folio that shares its struct page with other tails (HVO,
    #: mm/hugetlb_vmemmap.c): no fact of its own.
    SHARED = 6


@dataclass(frozen=True, eq=False)
class PageRuns(Columns):
    """
    Runs of pages that are equal in every respect, sorted by address; a row may be a single page.

    :param phys: u64, ``phys_addr_t`` of the first page.
    :param pages: u64, how many.
    :param seen: u8, a :class:`PageKnowledge`: columns that are not known are as in :meth:`nothing`.
    :param stamp: u64, ``page->private`` if that is a stamp, else 0.
    :param flags: u64, ``page->flags`` as far as ``enum pageflags`` has names; 0 in the tail of a
        compound page, where that word holds something else.
    :param refcount: i32.
    :param page_type: u8, the top byte of ``page->page_type``, if that is a type; else ``UNTYPED``.
    :param compound: i8, as in :class:`~khoscope.facts.columns.Pages`.
    :param buddy: i8, order of the free buddy block that the page is in; ``ALLOCATED``, or ``FREE``
        if the page is known to be free but the order is not.
    :param key: u64, radix key of the preserved block that covers the first page; 0: none does.
    :param order: u8, order of that block, and of those that cover the other pages; ``BAD_ORDER``:
        none does.
    :param type: i8, type of these blocks.
    :param owner: i32, index into the outgoing side's owners; ``owners.UNKNOWN``.
    """

    phys: U64
    pages: U64
    seen: NDArray[np.uint8]
    stamp: U64
    flags: U64
    refcount: NDArray[np.int32]
    page_type: NDArray[np.uint8]
    compound: NDArray[np.int8]
    buddy: NDArray[np.int8]
    key: U64
    order: NDArray[np.uint8]
    type: NDArray[np.int8]
    owner: NDArray[np.int32]

    #: No type is 0: ``page_type`` counts mappings if its highest bit is clear.
    UNTYPED: ClassVar[int] = 0
    ALLOCATED: ClassVar[int] = -1
    FREE: ClassVar[int] = -2

    @classmethod
    def nothing(cls, phys: U64, seen: PageKnowledge) -> PageRuns:
        """Single pages about which nothing is known, as writable columns."""
        blank = {name: np.zeros(len(phys), dtype) for name, dtype in cls.DTYPES.items()}
        runs = cls(**blank | {"phys": phys})
        runs.pages[:] = 1
        runs.seen[:] = seen
        runs.page_type[:] = cls.UNTYPED
        runs.compound[:] = Pages.NOT_COMPOUND
        runs.buddy[:] = cls.ALLOCATED
        runs.order[:] = BAD_ORDER
        runs.type[:] = NO_TYPE
        runs.owner[:] = UNKNOWN
        return runs


#: Gives the pages [start, end), pfns in RAM, in order, each a row.
Look = Callable[[int, int], Iterator[PageRuns]]


def page_types(page_type: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The top byte if ``page_type_has_type()``; a page without a type counts mappings there."""
    top = (page_type >> np.uint32(24)).astype(np.uint8)
    return np.where(page_type_has_type(page_type), top, PageRuns.UNTYPED).astype(np.uint8)


def runs(facts: Snapshot, first: int, end: int, look: Look) -> Iterator[PageRuns]:
    """
    The runs of pages that hold [first, end), physical.

    :param facts: of the same kernel, with its tree.
    """
    shift = facts.abi.page_shift
    keys = KeySet(facts.abi, facts.outgoing.tree.leaves)
    owners = Owners.of_side(facts.outgoing, shift)
    names = np.uint64((1 << min(len(facts.kernel.page_flags), 64)) - 1)
    carry = PageRuns.empty()
    for chunk in _pages(facts.ram, first >> shift, -(-end >> shift), shift, look):
        chunk.flags[:] &= names
        if chunk.seen[0] != PageKnowledge.OUTSIDE_RAM:
            _cover(facts.abi, keys, chunk)
            chunk.owner[:] = owners.at(chunk.phys, chunk.phys + np.uint64(facts.abi.page_size))
        joined = _join(PageRuns.concatenate([carry, chunk]), shift)
        if len(joined) > 1:
            yield joined[:-1]
        carry = joined[-1:]
    if len(carry):
        yield carry


def _pages(ram: U64, start: int, end: int, shift: int, look: Look) -> Iterator[PageRuns]:
    """The pages of [start, end), pfns; each stretch outside RAM is one row."""
    for low, high in ram.tolist():
        # The page allocator does not use a page that is RAM only in part.
        low, high = max(-(-low >> shift), start), min(high >> shift, end)
        if low >= high:
            continue
        yield from _outside(start, low, shift)
        yield from look(low, high)
        start = high
    yield from _outside(start, end, shift)


def _outside(start: int, end: int, shift: int) -> Iterator[PageRuns]:
    if start < end:
        run = PageRuns.nothing(np.array([start << shift], np.uint64), PageKnowledge.OUTSIDE_RAM)
        run.pages[0] = end - start
        yield run


def _cover(abi: Abi, keys: KeySet, pages: PageRuns) -> None:
    """Which preserved block covers each page of RAM; if several do, the largest."""
    base = np.uint64(~(abi.leaf_bits - 1) & (1 << 64) - 1)
    for order in keys.orders:
        for page_type in abi.key_types:
            wanted = abi.kho_radix_encode_keys(pages.phys, order, page_type)
            at = int(np.searchsorted(keys.leaves.key, wanted[0] & base))
            if at == len(keys.leaves) or keys.leaves.key[at] > wanted[-1]:
                continue
            found = keys.contains(wanted)
            pages.key[found] = wanted[found]
            pages.order[found] = order
            pages.type[found] = page_type


def _join(rows: PageRuns, shift: int) -> PageRuns:
    """Join neighbours that are equal in every respect into one row."""
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = rows.phys[:-1] + (rows.pages[:-1] << np.uint64(shift)) != rows.phys[1:]
    for name in PageRuns.DTYPES.keys() - {"phys", "pages", "key"}:
        column = getattr(rows, name)
        begins[1:] |= column[1:] != column[:-1]
    first = np.flatnonzero(begins)
    joined = rows[first]
    joined.pages[:] = np.add.reduceat(rows.pages, first)
    return joined


def recorded(facts: Snapshot) -> Look:
    """
    What a snapshot recorded of pages: those of preserved, stamped and watched blocks.

    If several of them hold a page, they say the same, except for what moved meanwhile.
    """
    abi = facts.abi
    shift = abi.page_shift
    buddy = {name: top for top, name in facts.kernel.page_types.items()}.get("buddy")

    def look(start: int, end: int) -> Iterator[PageRuns]:
        # Of the others, only those of one kind are in order of address.
        watched, outgoing = of_kinds(facts.watched), of_kinds(facts.outgoing.blocks)
        every = [*watched.values(), facts.stamps, *outgoing.values()]
        streams = [_Ahead(stream, abi) for stream in every]
        for low in range(start, end, WINDOW):
            phys = np.arange(low, min(low + WINDOW, end), dtype=np.uint64) << np.uint64(shift)
            window = PageRuns.nothing(phys, PageKnowledge.UNRECORDED)
            for stream in streams:
                _fill(window, stream.within(low, low + len(window)), abi, buddy)
            yield window

    return look


class _Ahead:
    """Blocks sorted by address, taken window by window."""

    def __init__(self, stream: Iterable[Blocks], abi: Abi) -> None:
        self._stream = iter(stream)
        self._shift = abi.page_shift
        self._held: list[Blocks] = []
        self._last = -1

    def within(self, start: int, end: int) -> Blocks:
        """
        The blocks that reach into the pfns [start, end); each window begins where the last one
        ended.

        :raises KhoscopeError: if the blocks are not sorted: there might be any number of them.
        """
        low, high = start << self._shift, end << self._shift
        while self._last < high and (chunk := next(self._stream, None)) is not None:
            chunk = chunk[chunk.order != BAD_ORDER]
            if not len(chunk):
                continue
            if int(chunk.phys[0]) <= self._last or (chunk.phys[1:] <= chunk.phys[:-1]).any():
                raise KhoscopeError(
                    "the snapshot's blocks are not in order of address",
                    "take the snapshot again, or copy the file again",
                )
            self._last = int(chunk.phys[-1])
            self._held.append(chunk[chunk.end(self._shift) > np.uint64(low)])
        held = Blocks.concatenate(part for part in self._held if len(part))
        held = held[held.end(self._shift) > np.uint64(low)] if len(held) else held
        # Any number of blocks could overlap: of those that begin earlier, keep only the two that
        # _covered_by() can choose.
        early = int(np.searchsorted(held.phys, np.uint64(low)))
        if early > 2:
            furthest = int(np.argmax(held.end(self._shift)[:early]))
            held = held[np.append(np.unique([furthest, early - 1]), range(early, len(held)))]
        self._held = [held] if len(held) else []
        return held[: int(np.searchsorted(held.phys, np.uint64(min(high, 2**64 - 1))))]


def _covered_by(
    begin: NDArray[np.int64], end: NDArray[np.int64], pages: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    The pages that lie in a block, and in which block.  If several blocks hold a page, take the one
    that begins last if it reaches that far, else the one that reaches furthest.

    :param begin: of each block, sorted; pages count from 0.
    """
    reach = np.maximum.accumulate(end)
    furthest = np.maximum.accumulate(np.where(end == reach, np.arange(len(end)), 0))
    page = np.arange(pages)
    last = np.searchsorted(begin, page, "right") - 1
    inside = last >= 0
    inside[inside] = reach[last[inside]] > page[inside]
    page, last = page[inside], last[inside]
    return page, np.where(end[last] > page, last, furthest[last])


def _fill(window: PageRuns, blocks: Blocks, abi: Abi, buddy: int | None) -> None:
    """Fill in what the facts of some blocks say about the pages of a window."""
    if not len(blocks):
        return
    shift = np.uint64(abi.page_shift)
    facts = blocks.facts
    begin = (blocks.phys >> shift).astype(np.int64) - int(window.phys[0] >> shift)
    count = np.minimum(blocks.page_count, np.uint64(1 << 52)).astype(np.int64)
    page, block = _covered_by(begin, begin + count, len(window))
    tails = (facts.zeros + facts.ones + facts.others)[block]
    unread = facts.unread[block] > 0
    alike = (facts.zeros[block] == tails) | (facts.ones[block] == tails)
    window.seen[page] = np.where(
        unread, PageKnowledge.UNREAD, np.where(alike, PageKnowledge.REFCOUNT, PageKnowledge.COUNTED)
    )
    window.refcount[page] = np.where(alike & ~unread, facts.ones[block] > 0, 0)
    window.buddy[page] = np.where(facts.free[block] > tails, PageRuns.FREE, PageRuns.ALLOCATED)
    at = page - begin[block]
    shared = at >= (count - blocks.shared)[block]
    window.seen[page[shared]] = PageKnowledge.SHARED
    window.refcount[page[shared]] = 0
    inside = at < 1 << np.clip(facts.compound[block].astype(np.int64), 0, 62)
    window.compound[page] = np.where(
        inside & (facts.compound[block] > 0), Pages.COMPOUND_TAIL, Pages.NOT_COMPOUND
    )

    heads = np.flatnonzero((begin >= 0) & (facts.unread == 0))
    at, of = begin[heads], facts[heads]
    types = page_types(of.page_type)
    is_buddy = types == (buddy or PageRuns.UNTYPED)
    is_buddy &= types != PageRuns.UNTYPED
    free = np.where((of.free > 0) & (of.head == 0), PageRuns.FREE, PageRuns.ALLOCATED)
    window.seen[at] = PageKnowledge.READ
    window.stamp[at] = np.where(abi.stamp.is_stamp(of.private), of.private, 0)
    window.flags[at] = np.where(of.compound == Pages.COMPOUND_TAIL, 0, of.flags)
    window.refcount[at] = of.head
    window.page_type[at] = types
    window.compound[at] = of.compound
    window.buddy[at] = np.where(is_buddy, np.minimum(of.private, abi.max_page_order), free)
