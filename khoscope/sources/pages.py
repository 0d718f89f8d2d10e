# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read runs of ``struct page`` in bulk and boil them down to a row of facts per block.

Kernel sources: ``include/linux/mm_types.h``, ``page-flags.h``; free pages as in
``mm/page_alloc.c``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, NO_TYPE, U64, Abi
from ..facts.columns import CHUNK_BLOCKS, Blocks, Pages
from ..facts.page_runs import PageKnowledge, PageRuns, page_types

#: Reads ``size`` bytes at a kernel virtual address; None: that memory cannot be read.
ReadVirt = Callable[[int, int], bytes | None]
#: Which rows: a run of them, or each by its number.
Rows = slice | NDArray[np.int64]

#: struct pages read at once.
WINDOW: Final = 1 << 15
#: Blocks closer than this many pages are read in one go.
GAP: Final = 1 << 10
#: How many single pages per chunk of blocks are looked up on a free list.  Each look costs a read
#: or two; only a page without references that lies in no free buddy block needs it.
LIST_LOOKS: Final = 1024


@dataclass(frozen=True)
class InvertedTypes:
    """
    Page types before linux 6.12: bits of ``page_type`` that are cleared, since it begins as -1.

    ``PageType()`` and ``page_type_has_type()`` in page-flags.h of linux 6.6 and 6.11.

    :param base: ``PAGE_TYPE_BASE``, the bits that stay set in all types.
    :param reserve: ``PAGE_MAPCOUNT_RESERVE`` as u32; what is not below it is no type.
    :param bits: bit of each type, by the number that ``enum pagetype`` has for it since linux 6.12.
    """

    base: int
    reserve: int
    bits: dict[int, int]

    #: The number of a type of which only the bit is known; ``enum pagetype`` has none so low.
    OTHER: ClassVar[int] = 0x80

    def as_numbers(self, page_type: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """The words as linux 6.12 would have them: with the number of the type as the top byte."""
        base = page_type & np.uint32(self.base) == self.base
        has_type = base & (page_type < np.uint32(self.reserve))
        known = [has_type & (page_type & np.uint32(bit) == 0) for bit in self.bits.values()]
        number = np.select(known, [np.uint32(n) for n in self.bits], np.uint32(self.OTHER))
        low = page_type & np.uint32(0xFFFFFF)
        return np.where(has_type, number.astype(np.uint32) << np.uint32(24) | low, page_type)


@dataclass(frozen=True)
class PageLayout:
    """
    Where ``struct page`` keeps things; byte offsets and sizes from the kernel's types.

    :param vmemmap: virtual address of the struct page of pfn 0.
    :param size: ``sizeof(struct page)``, bytes.
    :param buddy_type: ``PGTY_buddy``, the top byte of ``page_type`` of a free block's first page.
    :param untyped: the lowest top byte of ``page_type`` that means "no type".
    :param head_bit: ``PG_head``.
    :param compound: offset of the word whose bit 0 says "tail of a compound page"
        (``compound_info``; ``compound_head`` before linux 7.1).
    :param lru: offset of ``lru``, where a page on a free list hangs.
    :param mapping: offset of ``mapping``.
    :param flag_count: ``__NR_PAGEFLAGS``: the bits of ``flags`` that are flags; what lies above
        them says where the page is.
    :param fake_heads: whether a tail may read like its head (:attr:`StructPages.is_fake_head`);
        not since linux 7.1.
    :param inverted: how the kernel has page types in bits; None: in numbers, as all that reads
        them expects.
    :param hugetlb_type: ``PGTY_hugetlb``; 0: the kernel has no such pages.
    :param optimized: ``HPG_vmemmap_optimized`` as a mask, for ``private`` of a hugetlb folio; 0:
        debug info has no such flag.
    """

    vmemmap: int
    size: int
    flags: int
    private: int
    refcount: int
    page_type: int
    compound: int
    lru: int
    mapping: int
    head_bit: int
    buddy_type: int
    flag_count: int
    untyped: int = 0xFF
    fake_heads: bool = False
    inverted: InvertedTypes | None = None
    hugetlb_type: int = 0
    optimized: int = 0

    def own(self, page_size: int) -> int:
        """
        How many struct pages an optimised hugetlb folio has for itself
        (``HUGETLB_VMEMMAP_RESERVE_PAGES`` in hugetlb_vmemmap.h).
        """
        return page_size // self.size

    def is_optimized(self, page_type: NDArray[np.uint32], private: U64) -> NDArray[np.bool_]:
        """
        Heads of hugetlb folios whose tails share struct pages
        (``folio_test_hugetlb_vmemmap_optimized()`` in hugetlb.h).
        """
        if not self.optimized:
            return np.zeros(len(page_type), np.bool_)
        hugetlb = page_type >> np.uint32(24) == self.hugetlb_type
        optimized: NDArray[np.bool_] = hugetlb & (private & np.uint64(self.optimized) != 0)
        return optimized


#: ``page_type`` of a page that has no type and is mapped nowhere (``_mapcount`` is -1).
NO_PAGE_TYPE: Final = np.uint32(0xFFFFFFFF)


class StructPages:
    """
    Struct pages, as columns.

    :param pfn: of the first page of a run, or of each page.
    :param page_size: bytes.
    """

    def __init__(self, layout: PageLayout, raw: bytes, pfn: int | U64, page_size: int) -> None:
        self._layout = layout
        self._raw = np.frombuffer(raw, np.uint8)
        self._pfn = pfn
        self._page_size = page_size

    def _column(self, offset: int, dtype: type[np.generic]) -> NDArray[Any]:
        width = np.dtype(dtype).itemsize
        if offset % width or self._layout.size % width:
            raise ValueError(f"struct page member at odd offset {offset}")
        return self._raw.view(dtype)[offset // width :: self._layout.size // width]

    @functools.cached_property
    def _address(self) -> U64:
        """u64, the virtual address of each struct page."""
        return self._addresses(0)

    def _addresses(self, offset: int) -> U64:
        """u64, the virtual address of the member at some offset, of each struct page."""
        pfn, layout = self._pfn, self._layout
        first = layout.vmemmap + offset
        if isinstance(pfn, int):
            count = len(self._raw) // layout.size
            return _offsets(layout.size, count) + np.uint64(first + pfn * layout.size)
        return pfn * np.uint64(layout.size) + np.uint64(first)

    @functools.cached_property
    def is_fake_head(self) -> NDArray[np.bool_]:
        """
        Tails of a hugetlb folio that read like its head (``page_is_fake_head()`` in page-flags.h).

        The kernel gave the memory of their struct pages back and maps that of the head's in its
        place, where every first struct page is the head.  The struct page behind it tells: it
        leads to another head.
        """
        raw_flags = self._column(self._layout.flags, np.uint64)
        fake = np.zeros(len(raw_flags), np.bool_)
        if not self._layout.fake_heads:
            return fake
        address, one = self._address, np.uint64(1)
        first = address[:-1] & np.uint64(self._page_size - 1) == 0
        head = (raw_flags[:-1] >> np.uint64(self._layout.head_bit)) & one != 0
        leads = self._column(self._layout.compound, np.uint64)[1:]
        fake[:-1] = first & head & (leads & one != 0) & (leads - one != address[:-1])
        return fake

    def _but_fake(self, values: NDArray[Any], otherwise: Any) -> NDArray[Any]:
        """A column in which fake heads have what tails have."""
        if not self._layout.fake_heads:
            return values
        return np.where(self.is_fake_head, otherwise, values)

    @property
    def refcount(self) -> NDArray[np.int32]:
        return self._but_fake(self._column(self._layout.refcount, np.int32), np.int32(0))

    @property
    def private(self) -> U64:
        return self._but_fake(self._column(self._layout.private, np.uint64), np.uint64(0))

    @property
    def flags(self) -> U64:
        flags = self._column(self._layout.flags, np.uint64)
        return self._but_fake(flags, flags & ~self._flag_mask) if self._layout.fake_heads else flags

    @property
    def _flag_mask(self) -> np.uint64:
        return np.uint64((1 << self._layout.flag_count) - 1)

    @property
    def page_type(self) -> NDArray[np.uint32]:
        types = self._column(self._layout.page_type, np.uint32)
        if self._layout.inverted is not None:
            types = self._layout.inverted.as_numbers(types)
        return self._but_fake(types, NO_PAGE_TYPE)

    @property
    def mapping(self) -> U64:
        """``page->mapping``; of a tail it holds something else."""
        return self._column(self._layout.mapping, np.uint64)

    @property
    def is_optimized(self) -> NDArray[np.bool_]:
        """:meth:`PageLayout.is_optimized` of each page."""
        return self._layout.is_optimized(self.page_type, self.private)

    def head_of_first(self) -> int:
        """The pfn of the head of the compound page that the first page is a tail of."""
        # The first page may be a fake head, and the one behind it is none.
        info = int(self._column(self._layout.compound, np.uint64)[1])
        address = int(self._address[1])
        if info & 1:
            # Since linux 7.1 a mask, where hugetlb folios can be optimised (_compound_head() in
            # page-flags.h); else the address of the head.
            rest = ~(info - 1) % (1 << 64)
            address = address & ~rest if rest & (rest + 1) == 0 else info - 1
        return (address - self._layout.vmemmap) // self._layout.size

    def of_folio(self, offset: int) -> NDArray[np.int64]:
        """
        i64 for each page: the ``atomic_t`` at some offset of ``struct folio``, if it is the head of
        a large one.
        """
        ahead, offset = divmod(offset, self._layout.size)
        column = self._column(offset, np.int32)
        found = np.zeros(len(column), np.int64)
        found[: max(len(column) - ahead, 0)] = column[ahead:]
        return found

    @property
    def is_tail(self) -> NDArray[np.bool_]:
        return self._is_tail(slice(None))

    def _is_tail(self, pages: Rows) -> NDArray[np.bool_]:
        compound = self._column(self._layout.compound, np.uint64)[pages]
        tail: NDArray[np.bool_] = compound & np.uint64(1) != 0
        if self._layout.fake_heads:
            tail |= self.is_fake_head[pages]
        return tail

    def _may_be_compound(self, pages: Rows) -> bool:
        """Whether any of them is a tail, or a head; single pages are neither."""
        words = ((self._layout.flags, 1 << self._layout.head_bit), (self._layout.compound, 1))
        every = ((self._column(offset, np.uint64)[pages], bit) for offset, bit in words)
        return any(int(np.bitwise_or.reduce(column)) & bit for column, bit in every)

    @property
    def is_buddy(self) -> NDArray[np.bool_]:
        layout = self._layout
        if layout.fake_heads or layout.inverted is not None:
            return (self.page_type >> np.uint32(24)) == layout.buddy_type
        # The top byte alone is less to go through.
        return self._column(layout.page_type + 3, np.uint8) == layout.buddy_type

    @property
    def is_pristine(self) -> NDArray[np.bool_]:
        """Pages that are as the boot left them, but for refcount and ``private``."""
        layout = self._layout
        node = self._addresses(layout.lru)
        pristine: NDArray[np.bool_] = self._column(layout.lru, np.uint64) == node
        # What is or was in use fails that already.
        if pristine.any():
            pristine &= self._column(layout.lru + 8, np.uint64) == node
            pristine &= self._column(layout.mapping, np.uint64) == 0
            pristine &= self._column(layout.page_type, np.uint32) == NO_PAGE_TYPE
            pristine &= self._column(layout.flags, np.uint64) & self._flag_mask == 0
        return pristine

    def compound_order(self, pages: Rows | None = None) -> NDArray[np.int8]:
        """
        i8: order of the compound page that starts at each page.

        :param pages: which; None: all but the last.  The order is in the page behind each.
        """
        if pages is None:
            pages = slice(0, len(self.flags) - 1)
        if not self._may_be_compound(pages):
            return np.full(len(self.flags[pages]), Pages.NOT_COMPOUND, np.int8)
        tail = self._is_tail(pages)
        found = np.where(tail, np.int8(Pages.COMPOUND_TAIL), np.int8(Pages.NOT_COMPOUND))
        head = (self.flags[pages] >> np.uint64(self._layout.head_bit)) & np.uint64(1) != 0
        rows = np.flatnonzero(head & ~tail)
        if len(rows):
            behind = (rows + pages.start if isinstance(pages, slice) else pages[rows]) + 1
            # No order is that high, but memory may hold anything; an order below 0 would mean
            # something else.
            order = np.minimum(self.flags[behind] & np.uint64(0xFF), np.uint64(127))
            large = self._is_tail(behind)
            found[rows[large]] = order[large].astype(np.int8)
        return found


@functools.lru_cache(maxsize=4)
def _offsets(size: int, count: int) -> U64:
    """Of so many struct pages from the first, bytes: most windows have as many."""
    return np.arange(count, dtype=np.uint64) * np.uint64(size)


class PageReader:
    """
    Reads struct pages of one kernel.

    :param ram_end: the first pfn behind RAM; nothing above it is read.
    """

    def __init__(self, abi: Abi, layout: PageLayout, read: ReadVirt, ram_end: int) -> None:
        self._abi = abi
        self._layout = layout
        self._read = read
        self._ram_end = ram_end

    def with_pages(self, blocks: Blocks) -> Blocks:
        """The same blocks with the facts of their struct pages."""
        return Blocks(blocks.key, blocks.phys, blocks.order, blocks.type, self._facts(blocks))

    def stamps(
        self, ram: U64, progress: Callable[[int], None], bare: bool = False
    ) -> Iterator[Blocks]:
        """
        Every page that carries a stamp, by looking at all struct pages.

        :param ram: u64, shape (n, 2), physical.
        :param progress: called for each part, with the number of pages that were looked at, or with
            the number that could not be read, as a negative number.
        :param bare: without the facts of the struct pages of the stamped blocks.
        """
        waiting: list[Blocks] = []
        rows = 0
        shift = self._abi.page_shift
        for first, end in ram.tolist():
            last = end >> shift
            for pfn in range(-(-first >> shift), last, WINDOW):
                for start, raw in self._readable(pfn, min(pfn + WINDOW, last), progress):
                    found = self._stamped(start, self._view(start, raw))
                    if len(found):
                        waiting.append(found if bare else self.with_pages(found))
                        rows += len(found)
                    if rows >= CHUNK_BLOCKS:
                        yield Blocks.concatenate(waiting)
                        waiting, rows = [], 0
        if rows:
            yield Blocks.concatenate(waiting)

    def pages(self, start: int, end: int) -> Iterator[PageRuns]:
        """
        The pages [start, end), pfns, each a row; window by window.

        The kernel marks a free block only at its first page.  So windows are whole regions of
        MAX_PAGE_ORDER, which no free block crosses.
        """
        for low, high in self.windows(start, end):
            yield self._region(low, high)[max(start - low, 0) : end - low]

    def windows(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The whole regions of MAX_PAGE_ORDER that hold the pages [start, end), some at a time."""
        region = 1 << self._abi.max_page_order
        step = max(WINDOW, region)
        for low in range(start & -region, end, step):
            yield low, min(low + step, -(-end // region) * region)

    def with_buddies(
        self, start: int, end: int
    ) -> Iterator[tuple[int, StructPages, NDArray[np.int8]]]:
        """
        What can be read of the pages of a window: where each run begins, and of each page the order
        of the free block that holds it, or ``PageRuns.ALLOCATED``.
        """
        parts = self._parts(start, end)
        buddy = self._buddy(start, end, parts)
        for at, pages in parts:
            yield at, pages, buddy[at - start :][: len(pages.flags)]

    def _region(self, start: int, end: int) -> PageRuns:
        pfn = np.arange(start, end, dtype=np.uint64)
        found = PageRuns.nothing(pfn << np.uint64(self._abi.page_shift), PageKnowledge.UNREAD)
        parts = self._parts(start, end)
        for at, pages in parts:
            to = slice(at - start, at - start + len(pages.flags))
            private, tail = pages.private, pages.is_tail
            found.seen[to] = PageKnowledge.READ
            found.stamp[to] = np.where(self._abi.stamp.is_stamp(private), private, 0)
            found.flags[to] = np.where(tail, 0, pages.flags)
            found.refcount[to] = pages.refcount
            found.page_type[to] = page_types(pages.page_type)
            last = Pages.COMPOUND_TAIL if tail[-1] else Pages.NOT_COMPOUND
            found.compound[to] = np.append(pages.compound_order(), np.int8(last))
            for low, high in self._shared(at, pages):
                self._forget(found[max(low - start, 0) : max(high - start, 0)])
        buddy = self._buddy(start, end, parts)
        found.buddy[:] = np.where(found.seen == PageKnowledge.READ, buddy, PageRuns.ALLOCATED)
        return found

    def _shared(self, start: int, pages: StructPages) -> Iterator[tuple[int, int]]:
        """
        The pages whose struct pages are shared among tails of hugetlb folios, first and end, pfns.

        :param pages: from ``start`` on; a folio may begin before them.
        """
        layout = self._layout
        if not layout.optimized:
            return
        parts = [(start, pages)]
        if np.count_nonzero(pages.is_tail[:2]) == 2:
            head = pages.head_of_first()
            raw = self._read_pages(head, head + 2) if 0 <= head < start else None
            if raw is not None:
                parts.append((head, self._view(head, raw)))
        for at, part in parts:
            rows = np.flatnonzero(part.is_optimized[:-1])
            orders = part.compound_order(rows).tolist()
            for head, order in zip((rows + at).tolist(), orders, strict=True):
                if order > 0:
                    yield head + layout.own(self._abi.page_size), head + (1 << order)

    def _forget(self, runs: PageRuns) -> None:
        """Their struct pages say nothing about these pages alone."""
        runs.seen[:] = PageKnowledge.SHARED
        runs.stamp[:] = runs.flags[:] = runs.refcount[:] = 0
        runs.page_type[:] = PageRuns.UNTYPED
        runs.compound[:] = Pages.COMPOUND_TAIL

    def _stamped(self, start: int, pages: StructPages) -> Blocks:
        abi = self._abi
        private = pages.private
        at = np.flatnonzero(abi.stamp.is_stamp(private))
        private = private[at]
        order = abi.stamp.order(private)
        sane = order <= abi.order_limit(self._ram_end << abi.page_shift)
        types = abi.stamp.type(private) if abi.has_types else np.full(len(at), NO_TYPE, np.int8)
        return Blocks(
            np.zeros(len(at), np.uint64),
            (at + start).astype(np.uint64) << np.uint64(abi.page_shift),
            np.where(sane, order, BAD_ORDER).astype(np.uint8),
            types,
        )

    def _readable(
        self, start: int, end: int, progress: Callable[[int], None]
    ) -> Iterator[tuple[int, bytes]]:
        """The struct pages of [start, end), without those that cannot be read."""
        if start >= end:
            return
        raw = self._read_pages(start, end)
        # Struct pages that share a page are all there, or none of them is.
        together = self._abi.page_size // self._layout.size
        if raw is not None:
            progress(end - start)
            yield start, raw
        elif start // together == (end - 1) // together:
            progress(start - end)
        else:
            middle = (start + end) // 2 // together * together
            middle = max(middle, (start // together + 1) * together)
            yield from self._readable(start, middle, progress)
            yield from self._readable(middle, end, progress)

    def _view(self, start: int, raw: bytes) -> StructPages:
        return StructPages(self._layout, raw, start, self._abi.page_size)

    def _read_pages(self, start: int, end: int) -> bytes | None:
        size = self._layout.size
        return self._read(self._layout.vmemmap + start * size, (end - start) * size)

    def _facts(self, blocks: Blocks) -> Pages:
        facts = Pages.blank(len(blocks))
        facts.compound[:] = Pages.NOT_COMPOUND
        start = (blocks.phys >> np.uint64(self._abi.page_shift)).view(np.int64)
        # Memory beyond RAM has no struct pages.  A block of a bad order has no pages.
        length = np.minimum(blocks.page_count, np.uint64(1) << np.uint64(40)).view(np.int64)
        end = start + length
        rows = np.arange(len(blocks))
        if int(end.max(initial=0)) > self._ram_end:
            end = np.minimum(end, self._ram_end)
            # The cap leaves room to add pages of RAM that cannot be read.
            facts.unread[:] = np.minimum(start + length - np.maximum(end, start), 2**31)
            rows = np.flatnonzero(end > start)
        elif not int(length.min(initial=1)):
            rows = np.flatnonzero(length)
        at: Rows = slice(0, len(rows)) if len(rows) == len(blocks) else rows
        if (start[at][1:] < start[at][:-1]).any():
            at = rows = rows[np.argsort(start[rows], kind="stable")]
        if len(rows):
            _Gather(self, facts, rows, start[at], end[at]).run()
            self._find_free(facts, start, rows)
        return facts

    def _find_free(self, facts: Pages, start: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """
        Mark blocks that lie in the middle of a free buddy block, or hang on a per-cpu free list.

        The page itself shows neither: the buddy allocator marks only the first page of its block,
        and the per-cpu lists mark nothing.
        """
        suspect = rows[facts.head[_run_of(rows)] == 0]
        suspect = suspect[
            (facts.free[suspect] == 0)
            & (facts.unread[suspect] == 0)
            & (facts.page_type[suspect] >> np.uint32(24) >= self._layout.untyped)
            & (facts.compound[suspect] == Pages.NOT_COMPOUND)
        ]
        order = self._abi.max_page_order
        region = start[suspect] >> order
        for part in np.split(suspect, np.flatnonzero(np.diff(region)) + 1):
            if len(part):
                pfn = start[part]
                first = int(pfn[0]) >> order << order
                end = first + (1 << order)
                buddy = self._buddy(first, end, self._parts(first, end))[pfn - first]
                facts.free[part] = buddy != PageRuns.ALLOCATED
        for row in suspect[facts.free[suspect] == 0][:LIST_LOOKS].tolist():
            facts.free[row] = self._on_a_list(int(start[row]))

    def _parts(self, start: int, end: int) -> list[tuple[int, StructPages]]:
        """What can be read of the pages [start, end), and where each part begins."""
        parts = self._readable(start, min(end, self._ram_end), lambda _: None)
        return [(at, self._view(at, raw)) for at, raw in parts]

    def _buddy(
        self, start: int, end: int, parts: list[tuple[int, StructPages]]
    ) -> NDArray[np.int8]:
        """
        The order of the free block that holds each page; ``PageRuns.ALLOCATED``: no free block
        does.

        :param start: of a region of MAX_PAGE_ORDER, pfn; ``end`` likewise.
        :param parts: all that can be read of it.
        """
        index = np.arange(end - start)
        head = np.full(end - start, -1)
        reach = np.zeros(end - start, np.int64)
        order = np.zeros(end - start, np.int8)
        for at, pages in parts:
            heads = np.flatnonzero(pages.is_buddy)
            to = heads + (at - start)
            order[to] = np.minimum(pages.private[heads], np.uint64(self._abi.max_page_order))
            reach[to] = to + (1 << order[to].astype(np.int64))
            head[to] = to
        free = index < np.maximum.accumulate(reach)
        return np.where(free, order[np.maximum.accumulate(head)], PageRuns.ALLOCATED)

    def _on_a_list(self, pfn: int) -> bool:
        """
        Whether a page without references hangs on a list, as pages on per-cpu free lists do.

        Its neighbours must point back at it; in any other page these words are something else.
        """
        node = self._layout.vmemmap + pfn * self._layout.size + self._layout.lru
        raw = self._read(node, 16)
        if raw is None:
            return False
        for at, back in ((0, 8), (8, 0)):
            neighbour = int.from_bytes(raw[at : at + 8], "little")
            if neighbour == node:
                return False
            pointer = self._read(neighbour + back, 8) if neighbour else None
            if pointer is None or int.from_bytes(pointer, "little") != node:
                return False
        return True


class _Gather:
    """
    One pass over the struct pages of blocks that are sorted by their first pfn.

    :param rows: where in ``facts`` each block's row is.
    """

    def __init__(
        self,
        reader: PageReader,
        facts: Pages,
        rows: NDArray[np.int64],
        start: NDArray[np.int64],
        end: NDArray[np.int64],
    ) -> None:
        self._reader = reader
        self._facts = facts
        self._rows = rows
        self._start = start
        self._end = end
        # Blocks of a corrupt tree may overlap.  All that reach into a window lie between the first
        # block at which the furthest end so far is beyond the window's start, and the last block
        # that begins before the window's end.
        self._reach = end
        if (start[1:] < end[:-1]).any():
            self._reach = np.maximum.accumulate(end)

    def run(self) -> None:
        begins = np.flatnonzero(self._start[1:] > self._reach[:-1] + GAP) + 1
        bounds = [0, *begins.tolist(), len(self._start)]
        for low, high in pairwise(bounds):
            first, last = int(self._start[low]), int(self._reach[high - 1])
            carry: np.int32 | None = None
            for pfn in range(first, last, WINDOW):
                carry = self._window(pfn, min(pfn + WINDOW, last), carry)

    def _window(self, low: int, high: int, carry: np.int32 | None) -> np.int32 | None:
        """
        Add the facts of the pages [low, high).

        :param carry: the refcount of page ``low - 1``, if it is in the same run.
        :return: the refcount of page ``high - 1``.
        """
        i = int(np.searchsorted(self._reach, low, "right"))
        j = int(np.searchsorted(self._start, high, "left"))
        hit: Rows = slice(i, j)
        if self._reach is not self._end:
            hit = np.arange(i, j)[self._end[i:j] > low]
        reader = self._reader
        # Read one more page than asked for: a compound page's order is in its second page.
        raw = reader._read_pages(low, high + 1) or reader._read_pages(low, high)
        if raw is None and high - low > 1:
            middle = (low + high) // 2
            return self._window(middle, high, self._window(low, middle, carry))
        rows, start, end = self._rows[hit], self._start[hit], self._end[hit]
        begin, stop = start - low, end - low
        if len(start) and (start[0] < low or self._reach[j - 1] > high):
            begin, stop = np.maximum(begin, 0), np.minimum(stop, high - low)
        facts = self._facts
        if raw is None:
            facts.unread[_run_of(rows)] += (stop - begin).astype(np.uint32)
            return None
        pages = reader._view(low, raw)
        refcount = pages.refcount[: high - low].copy()

        begun = int(np.searchsorted(start, low))
        head, to = _run_of(begin[begun:]), _run_of(rows[begun:])
        facts.head[to] = refcount[head]
        facts.private[to] = pages.private[head]
        facts.flags[to] = pages.flags[head]
        facts.page_type[to] = pages.page_type[head]
        # The last page has nothing behind it if that could not be read.
        known = slice(begun, int(np.searchsorted(start, low + len(pages.flags) - 1)))
        facts.compound[_run_of(rows[known])] = pages.compound_order(_run_of(begin[known]))

        several = np.flatnonzero(stop - begin > (start >= low))
        if len(several):
            length = end[several] - start[several]
            stop[several] = self._own(rows[several], start[several] - low, length, stop[several])
            self._tails(rows[several], start[several], stop[several], low, refcount, carry)

        to = _run_of(rows)
        for column, which in ((facts.free, pages.is_buddy), (facts.pristine, pages.is_pristine)):
            _count(column, to, which[: high - low], begin, stop)
        return refcount[-1]

    def _own(
        self,
        rows: NDArray[np.int64],
        begin: NDArray[np.int64],
        length: NDArray[np.int64],
        stop: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """
        Where the struct pages of each block end that are not shared with other tails.

        :param begin: of each block, in the window or before it; ``stop`` is in it.
        """
        facts, layout = self._facts, self._reader._layout
        types = facts.page_type[rows]
        if not (types >> np.uint32(24) == layout.hugetlb_type).any():
            return stop
        shares = layout.is_optimized(types, facts.private[rows])
        # A block that reaches beyond the folio has more struct pages of its own.
        order = np.clip(facts.compound[rows].astype(np.int64), 0, 62)
        shares &= length <= np.int64(1) << order
        own = layout.own(self._reader._abi.page_size)
        return np.where(shares, np.clip(begin + own, 0, stop), stop)

    def _tails(
        self,
        rows: NDArray[np.int64],
        start: NDArray[np.int64],
        last: NDArray[np.int64],
        low: int,
        refcount: NDArray[np.int32],
        carry: np.int32 | None,
    ) -> None:
        """
        Add the refcounts of the pages of some blocks that are not the first of their block.

        :param start: of each block, pfn.
        :param last: behind its last page in the window, which begins at ``low``; ``low`` is 0.
        """
        facts = self._facts
        first = np.maximum(start + 1, low) - low
        zeros, ones = np.zeros((2, len(rows)), np.uint32)
        _count(zeros, slice(None), refcount == 0, first, last)
        _count(ones, slice(None), refcount == 1, first, last)
        facts.zeros[rows] += zeros
        facts.ones[rows] += ones
        facts.others[rows] += (last - first).astype(np.uint32) - zeros - ones

        # Most blocks have tails that are all alike.
        count = last - first
        mixed = np.flatnonzero((start < low) | (zeros != count) & (ones != count))
        if not len(mixed):
            return
        rows, start, last = rows[mixed], start[mixed], last[mixed]
        # The first tail that differs from the one before it differs from the second page, too.
        changes = np.flatnonzero(refcount[1:] != refcount[:-1]) + 1
        if carry is not None and carry != refcount[0]:
            changes = np.append(0, changes)
        at = np.searchsorted(changes, np.maximum(start + 2, low) - low)
        change = np.append(changes, len(refcount))[at]
        odd = (change < last) & (facts.odd[rows] == 0)
        facts.odd[rows[odd]] = (change[odd] + low - start[odd]).astype(np.uint32)


def _run_of(rows: NDArray[np.int64]) -> Rows:
    """The same rows, as a slice if each follows the one before: that is several times as fast."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (rows[1:] > rows[:-1]).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _count(
    column: NDArray[np.uint32],
    rows: Rows,
    which: NDArray[np.bool_],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> None:
    """Add to rows of a column how many of the pages [first, last) are some."""
    if which.any():
        total = np.zeros(len(which) + 1, np.uint32)
        np.cumsum(which, dtype=np.uint32, out=total[1:])
        column[rows] += total[last] - total[first]
