# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Facts as numpy columns: a host may preserve 10^8 blocks, so no block is an object.

A column set is a frozen dataclass whose fields are arrays of one length.  Streams of column sets
("chunks") are plain iterables, so memory stays bounded whatever a tree holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64

#: Blocks per chunk, at least, unless the stream ends: the size of one leaf's bitmap at 4 KiB
#: pages.  A chunk never holds more than this and one leaf together.
CHUNK_BLOCKS = 1 << 15


#: In the annotation of a column: the column is not kept in files.
NOT_KEPT: Final = "not kept"


class _Dtypes:
    """The columns of a set and their dtypes, as the annotations have them."""

    def __get__(self, instance: Columns | None, owner: type[Columns]) -> dict[str, str]:
        hints = get_type_hints(owner, include_extras=True)
        found = {name: _dtype(hint) for name, hint in hints.items()}
        owner.DTYPES = {name: dtype for name, dtype in found.items() if dtype}
        return owner.DTYPES


def _dtype(hint: Any) -> str:
    """As numpy writes it: of ``NDArray[np.uint32]``, or as ``Annotated`` has it; else empty."""
    if get_origin(hint) is Annotated:
        (said,) = hint.__metadata__
        return "" if said == NOT_KEPT else str(said)
    if get_origin(hint) is not np.ndarray:
        return ""
    (scalar,) = get_args(get_args(hint)[1])
    return np.dtype(scalar).str


class Columns:
    """
    Base of column sets.

    ``DTYPES`` has the dtypes of the columns that are kept in files, by name and in that order.
    """

    DTYPES: ClassVar[dict[str, str]] = _Dtypes()  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.DTYPES))))

    def __getitem__(self, rows: slice | NDArray[Any]) -> Self:
        """The same columns for some rows (a slice, a mask or indices)."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return type(self)(
            **{n: column[rows] for n, column in columns.items() if column is not None}
        )

    @classmethod
    def empty(cls) -> Self:
        return cls(**{name: np.zeros(0, dtype) for name, dtype in cls.DTYPES.items()})

    @classmethod
    def concatenate(cls, parts: Iterable[Self]) -> Self:
        kept = list(parts)
        if not kept:
            return cls.empty()
        if len(kept) == 1:
            return kept[0]
        columns: dict[str, Any] = {}
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            values = [getattr(part, f.name) for part in kept]
            if isinstance(values[0], Columns):
                columns[f.name] = type(values[0]).concatenate(values)
            elif values[0] is not None:
                columns[f.name] = np.concatenate(values)
        return cls(**columns)


@dataclasses.dataclass(frozen=True, eq=False)
class Pages(Columns):
    """
    What the struct pages of each block say (``include/linux/mm_types.h``).

    :param private: u64, ``page->private`` of the first page; a stamp or anything else.
    :param head: i32, refcount of the first page.
    :param zeros: u32, how many of the other pages have refcount 0.
    :param ones: u32, how many have 1.
    :param others: u32, how many have any other.  In none of the three are tails of a hugetlb folio
        that share their struct pages with others (HVO): :attr:`Blocks.shared`.
    :param odd: u32, index of the first page whose refcount differs from the second page's (the
        one that decides the type when the series preserves); 0: they all agree.
    :param free: u32, how many pages of the block are free: in the buddy allocator, or on a
        per-cpu free list.
    :param flags: u64, ``page->flags`` of the first page.
    :param page_type: u32, ``page->page_type`` of the first page; of kernels that keep types in bits
        (before linux 6.12) as later ones would have it.
    :param compound: i8, order of the compound page that starts here; ``NOT_COMPOUND``, or
        ``COMPOUND_TAIL`` for a page in the middle of one.
    :param unread: u32, how many struct pages could not be read.
    :param pristine: u32, how many pages are as the boot left them, whatever their refcount: no
        flag, no page type, no mapping, and a list head that leads to itself.  KHO's restoring
        changes none of that, except in a folio.  A page that came from the page allocator is not
        so.  ``UNRECORDED`` in older files; 0 in traces.
    """

    private: U64
    head: NDArray[np.int32]
    zeros: NDArray[np.uint32]
    ones: NDArray[np.uint32]
    others: NDArray[np.uint32]
    odd: NDArray[np.uint32]
    free: NDArray[np.uint32]
    flags: U64
    page_type: NDArray[np.uint32]
    compound: NDArray[np.int8]
    unread: NDArray[np.uint32]
    pristine: NDArray[np.uint32]

    @functools.cached_property
    def tails(self) -> NDArray[np.int64]:
        """i64, how many pages that were read follow the first."""
        return self.zeros.astype(np.int64) + self.ones + self.others

    @property
    def columns(self) -> list[NDArray[Any]]:
        """All columns."""
        return [getattr(self, name) for name in self.DTYPES]

    NOT_COMPOUND: ClassVar[int] = -1
    COMPOUND_TAIL: ClassVar[int] = -2
    UNRECORDED: ClassVar[int] = 2**32 - 1

    @classmethod
    def blank(cls, rows: int) -> Pages:
        """Writable columns of zeros."""
        return cls(**{name: np.zeros(rows, dtype) for name, dtype in cls.DTYPES.items()})


def page_type_has_type(page_type: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """
    Pages with a page type: slab, page table and so on (``page_type_has_type`` in page-flags.h).

    ``page_type`` shares its word with ``_mapcount``: a count has its top bit clear, -1 means
    neither.
    """
    top = page_type >> np.uint32(24)
    return (top >= 0x80) & (top < 0xFF)


def distinct(column: NDArray[Any]) -> NDArray[Any]:
    """The values of a column, or the only one, if a file has it as one for all rows."""
    return column[:1] if column.strides == (0,) else column


def stretches(
    columns: Sequence[NDArray[Any]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """
    The first row of each stretch of neighbours that have the same in all columns, and how many each
    has; None: there are too many to be worth it.
    """
    rows = len(columns[0])
    if rows < 3:
        return None
    changes, differ = np.zeros((2, rows - 1), np.bool_)
    for column in columns:
        if len(distinct(column)) > 1:
            changes |= np.not_equal(column[1:], column[:-1], out=differ)
    first = np.append(0, np.flatnonzero(changes) + 1)
    return (first, np.diff(np.append(first, rows))) if len(first) <= rows // 4 else None


def spread(found: NDArray[Any], count: NDArray[np.int64]) -> NDArray[Any]:
    """What was found of the first row of each stretch, for all rows."""
    if found.any():
        return np.repeat(found, count)
    return np.zeros(int(count.sum()), found.dtype)


#: Pages of a block of each order.
_PAGE_COUNT: Final = np.array([1 << o if o < 64 else 0 for o in range(256)], np.uint64)


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Columns):
    """
    Preserved blocks, sorted by key if they come from a tree.

    :param key: u64, radix key; 0 if only the stamp of a block is known.
    :param phys: u64, ``phys_addr_t`` of the first page.
    :param order: u8, log2 of its pages; ``abi.BAD_ORDER`` if the key (or stamp) is nonsense.
    :param type: i8, ``KHO_PAGE_CONTIG``, ``KHO_PAGE_SPLIT`` or ``abi.NO_TYPE``.
    :param pages: facts of the block's struct pages; None if they were not read.
    """

    key: U64
    phys: U64
    order: NDArray[np.uint8]
    type: NDArray[np.int8]
    pages: Pages | None = None

    @property
    def facts(self) -> Pages:
        """The page facts of blocks that have them."""
        if self.pages is None:
            raise ValueError("the struct pages of these blocks were not read")
        return self.pages

    @property
    def shared(self) -> NDArray[np.int64]:
        """
        i64, how many tails of each block have no struct pages of their own: the kernel has mapped
        those of a hugetlb folio onto others (HVO, ``mm/hugetlb_vmemmap.c``), and they are not
        counted.  In traces, these are all that were not looked at.
        """
        pages = self.facts
        typed = (pages.compound >= self.order) & page_type_has_type(pages.page_type)
        uncounted = self.page_count.view(np.int64) - 1 - pages.tails - pages.unread
        return np.where(typed & (pages.unread == 0), np.maximum(uncounted, 0), 0)

    @functools.cached_property
    def _stretches(self) -> tuple[Self, NDArray[np.int64]] | None:
        """
        The first of each stretch of neighbours that differ in nothing but key and address, and how
        many each has; None: there are too many to be worth it.
        """
        found = stretches([self.order, self.type, *self.facts.columns])
        return None if found is None else (self[found[0]], found[1])

    def by_look(self, find: Callable[[Self], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """
        What a function finds, worked out once for each stretch of blocks that look alike: most
        blocks look like their neighbours.

        :param find: of blocks with their facts, a mask; it must not look at key or address.
        """
        if self._stretches is None:
            return find(self)
        first, count = self._stretches
        return spread(find(first), count)

    @functools.cached_property
    def page_count(self) -> U64:
        """u64, pages of each block; 0 for a bad order."""
        if len(self.order) and (self.order == self.order[0]).all():
            only = int(self.order[0])
            return np.full(len(self.order), 1 << only if only < 64 else 0, np.uint64)
        return _PAGE_COUNT[self.order]

    def in_order_of(self, column: str) -> Self:
        """The same blocks sorted by ``phys`` or ``key``; those of one address keep their order."""
        values = getattr(self, column)
        if (values[1:] < values[:-1]).any():
            return self[np.argsort(values, kind="stable")]
        return self

    def end(self, page_shift: int) -> U64:
        """u64, the first physical address behind each block, saturating at 2^64 - 1."""
        count = self.page_count
        end = self.phys + (count << np.uint64(page_shift))
        # A block of the highest order has 2^64 bytes, which wrap around to 0.
        wrapped = (end <= self.phys) & (count > 0)
        if wrapped.any():
            end[wrapped] = 2**64 - 1
        return end


@dataclasses.dataclass(frozen=True, eq=False)
class Leaves(Columns):
    """
    Leaves of a tree that hold blocks, sorted by key.

    :param key: u64, the key of the leaf's bit 0.
    :param bitmap: u8, shape (n, PAGE_SIZE): ``struct kho_radix_leaf`` as it is in memory.
    """

    key: U64
    bitmap: NDArray[np.uint8]

    def counts(self) -> NDArray[np.int64]:
        """Blocks in each leaf."""
        words = self.bitmap.view(np.uint64)
        return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Nodes(Columns):
    """
    Nodes of a tree, top down.

    :param level: u8, ``KHO_TREE_MAX_DEPTH - 1`` for the root, 0 for leaves.
    :param phys: u64, ``phys_addr_t`` of the node's page.
    :param key: u64, the first key below it.
    :param used: u32, entries (of a table) or bits (of a leaf) in use.
    """

    level: NDArray[np.uint8]
    phys: U64
    key: U64
    used: NDArray[np.uint32]


K = TypeVar("K", Blocks, Leaves)


def aligned(a: Iterable[K], b: Iterable[K]) -> Iterator[tuple[K, K]]:
    """
    Cut two streams of blocks or leaves, each sorted by key, at the same keys.

    :return: pairs of parts; no key of one pair appears in another pair.
    """
    streams = (iter(a), iter(b))
    left, right = (next(s, None) for s in streams)
    while (some := right if left is None else left) is not None:
        cut = min(part.key[-1] for part in (left, right) if part is not None)
        pair: list[K] = []
        rest: list[K | None] = []
        for part, stream in zip((left, right), streams, strict=True):
            if part is None:
                pair.append(some[:0])
                rest.append(None)
                continue
            at = int(np.searchsorted(part.key, cut, "right"))
            pair.append(part[:at])
            rest.append(part[at:] if at < len(part) else next(stream, None))
        left, right = rest
        yield pair[0], pair[1]


@dataclasses.dataclass(frozen=True)
class ChunkByChunk:
    """A stream that is made of another one."""

    of: Iterable[Blocks]
    make: Callable[[Blocks], Blocks]

    def __iter__(self) -> Iterator[Blocks]:
        return map(self.make, self.of)


def paired(a: Iterable[Blocks], b: Iterable[Blocks]) -> Iterator[tuple[Blocks, Blocks]]:
    """
    Cut two streams of the same blocks, in the same order, at the same rows.

    :return: pairs of parts; only of the last one, one may be shorter: then its stream was.
    """
    if isinstance(b, ChunkByChunk) and b.of is a:
        yield from ((part, b.make(part)) for part in a)
        return
    streams = (iter(a), iter(b))
    left, right = (next(s, None) for s in streams)
    while left is not None and right is not None:
        rows = min(len(left), len(right))
        yield left[:rows], right[:rows]
        left = left[rows:] if rows < len(left) else next(streams[0], None)
        right = right[rows:] if rows < len(right) else next(streams[1], None)
    if left is not None or right is not None:
        yield left or Blocks.empty(), right or Blocks.empty()
