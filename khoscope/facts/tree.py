# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A radix tree as it was read: how the walk went, the nodes and leaves, and the blocks that they
decode to.

Kernel source: ``struct kho_radix_tree`` in kernel/liveupdate/kexec_handover.c.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, U64, Abi
from .by_address import merged
from .columns import CHUNK_BLOCKS, Blocks, Leaves, Nodes

#: How many bits of leaves are unpacked at once.
RUN_BITS: Final = 1 << 21

#: First and last-plus-one pfn of runs of pages.
Run = tuple[U64, U64]


@dataclass(frozen=True)
class NodeProblem:
    """
    An entry that the kernel would not write into a tree.

    :param table: ``phys_addr_t`` of the node that holds it.
    :param index: its index there.
    :param entry: its value, u64.
    :param why: what is wrong with it.
    """

    level: int
    table: int
    index: int
    entry: int
    why: str


@dataclass(frozen=True)
class TreeState:
    """
    How the walk of a tree went.

    :param root: ``phys_addr_t`` of the root node; 0: there is no tree.
    :param reads: how often the tree was read until two reads agreed, or khoscope gave up.
    :param moved: blocks that came or went between the last two reads; they are left out.
    :param problems: the first entries that were not followed.
    :param problem_count: how many there are in all.
    """

    root: int
    reads: int = 1
    moved: int = 0
    problems: list[NodeProblem] = field(default_factory=list)
    problem_count: int = 0


@dataclass(frozen=True)
class Tree:
    """
    A radix tree as it was read.

    :param nodes: stream of all nodes.
    :param leaves: stream of the leaves that hold blocks, sorted by key.
    """

    state: TreeState
    nodes: Iterable[Nodes] = ()
    leaves: Iterable[Leaves] = ()

    def blocks(self, abi: Abi) -> Iterator[Blocks]:
        """The blocks, decoded, chunk by chunk, sorted by key."""
        waiting: list[Leaves] = []
        blocks = 0
        for group in self.leaves:
            start = 0
            for i, count in enumerate(group.counts().tolist()):
                blocks += count
                if blocks >= CHUNK_BLOCKS:
                    waiting.append(group[start : i + 1])
                    yield decode_leaves(abi, Leaves.concatenate(waiting))
                    waiting, blocks, start = [], 0, i + 1
            if start < len(group):
                waiting.append(group[start:])
        if blocks:
            yield decode_leaves(abi, Leaves.concatenate(waiting))

    def by_address(self, abi: Abi) -> Iterator[Blocks]:
        """
        The blocks, decoded, in chunks: each begins behind all blocks of the one before it, and is
        sorted by key.

        Whoever reads their struct pages comes by each of them once, whatever the orders.
        """
        kinds = []
        for order, leaves in _by_kind(abi, Leaves.concatenate(self.leaves)):
            if order == BAD_ORDER:
                # Keys that mean nothing have no address; they count as 0.
                yield from Tree(self.state, leaves=[leaves]).blocks(abi)
            else:
                kinds.append(_Decoded(abi, leaves))
        for blocks in merged(kinds):
            yield blocks.in_order_of("key")

    def totals(self, abi: Abi) -> dict[tuple[int, int], int]:
        """Blocks by (order, type), counted without decoding a key."""
        counted: dict[tuple[int, int], int] = {}
        for group in self.leaves:
            counts = group.counts()
            _, order, types = abi.kho_radix_decode_keys(group.key)
            # Order and type sit above a leaf's bits, except in the leaf that holds the orders
            # whose order bit is one of its own.
            low = (group.key & ~np.uint64(abi.type_bit)) == 0
            for i in np.flatnonzero(low):
                blocks = decode_leaves(abi, group[i : i + 1])
                _add(counted, blocks.order, blocks.type, np.ones(len(blocks), np.int64))
            _add(counted, order[~low], types[~low], counts[~low])
        return counted


def _add(
    counted: dict[tuple[int, int], int],
    order: NDArray[np.uint8],
    types: NDArray[np.int8],
    counts: NDArray[np.int64],
) -> None:
    kind = (order.astype(np.int64) << 8) | (types.astype(np.int64) + 1)
    kinds, where = np.unique(kind, return_inverse=True)
    sums = np.zeros(len(kinds), np.int64)
    np.add.at(sums, where, counts)
    for k, n in zip(kinds.tolist(), sums.tolist(), strict=True):
        counted[k >> 8, (k & 255) - 1] = counted.get((k >> 8, (k & 255) - 1), 0) + n


def _by_kind(abi: Abi, leaves: Leaves) -> Iterator[tuple[int, Leaves]]:
    """
    The order, and leaves, of each order and type: within these, keys and addresses are in one
    order.
    """
    if not len(leaves):
        return
    _, order, types = abi.kho_radix_decode_keys(leaves.key)
    begins = (order[1:] != order[:-1]) | (types[1:] != types[:-1])
    # The leaf that holds the highest orders has one of them for each of its blocks.
    low = (leaves.key & ~np.uint64(abi.type_bit)) == 0
    order = np.where(low, np.uint8(0), order)
    begins |= low[1:] | low[:-1]
    bounds = [0, *(np.flatnonzero(begins) + 1).tolist(), len(leaves)]
    for first, end in pairwise(bounds):
        yield int(order[first]), leaves[first:end]


class _Decoded:
    """Blocks of one kind in order of address, decoded some at a time."""

    def __init__(self, abi: Abi, leaves: Leaves) -> None:
        self._abi = abi
        self._leaves = leaves
        self._bounds = [0]
        most = max(RUN_BITS // abi.leaf_bits, 1)
        blocks = 0
        for end, count in enumerate(leaves.counts().tolist(), 1):
            blocks += count
            if blocks >= CHUNK_BLOCKS or end - self._bounds[-1] == most or end == len(leaves):
                self._bounds.append(end)
                blocks = 0

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, at: int) -> Blocks:
        leaves = self._leaves[self._bounds[at] : self._bounds[at + 1]]
        return decode_leaves(self._abi, leaves).in_order_of("phys")

    def __iter__(self) -> Iterator[Blocks]:
        return map(self.__getitem__, range(len(self)))


def decode_leaves(abi: Abi, leaves: Leaves) -> Blocks:
    """The blocks of some leaves, as :c:func:`kho_radix_walk_leaf` sees them."""
    if len(leaves) == 1:
        # The common case at scale: all blocks of a leaf have one order and type, so that key and
        # address are the index of the bit, scaled and shifted by constants.
        base = int(leaves.key[0])
        phys, order, kind = abi.kho_radix_decode_key(base)
        if base & ~abi.type_bit and order != BAD_ORDER:
            bits = _set_bits(leaves.bitmap[0])
            physes = bits << np.uint64(abi.page_shift + order)
            # In place: fresh memory costs more than the arithmetic.
            physes += np.uint64(phys)
            orders = np.full(len(bits), order, np.uint8)
            types = np.full(len(bits), kind, np.int8)
            return Blocks(bits + np.uint64(base), physes, orders, types)
    bits = _set_bits(leaves.bitmap.reshape(-1))
    leaf = bits >> np.uint64(abi.bitmap_size_log2)
    key = leaves.key[leaf.view(np.int64)] | (bits & np.uint64(abi.leaf_bits - 1))
    return Blocks(key, *abi.kho_radix_decode_keys(key))


@functools.cache
def _all_bits(count: int) -> U64:
    """Indices of all bits, cached: a big tree consists mostly of full leaves."""
    bits = np.arange(count, dtype=np.uint64)
    bits.flags.writeable = False
    return bits


def _set_bits(bitmap: NDArray[np.uint8]) -> U64:
    """Indices of the bits that are set."""
    if (bitmap.view(np.uint64) == np.uint64(2**64 - 1)).all():
        return _all_bits(8 * len(bitmap))
    bits = np.unpackbits(bitmap, bitorder="little").view(np.bool_)
    return np.flatnonzero(bits).view(np.uint64)


class KeySet:
    """
    Which keys a tree holds, for look-ups: its bitmaps, whole in memory.

    That is one bit per page of the range that the tree covers, 32 MiB for 1 TiB.
    """

    def __init__(self, abi: Abi, leaves: Iterable[Leaves]) -> None:
        self._abi = abi
        self.leaves = Leaves.concatenate(leaves)
        if not len(self.leaves):
            self.leaves = Leaves(np.zeros(0, np.uint64), np.zeros((0, abi.page_size), np.uint8))

    @functools.cached_property
    def counts(self) -> NDArray[np.int64]:
        """Blocks in each leaf."""
        return self.leaves.counts()

    def leaf(self, keys: U64) -> NDArray[np.int64]:
        """The row of the leaf that would hold each key; -1: the tree has none."""
        base = keys & ~np.uint64(self._abi.leaf_bits - 1)
        if len(base) > 1 and (base == base[0]).all():
            # As of a chunk of single pages: one look-up for all.
            return np.full(len(keys), self.leaf(base[:1])[0])
        at = np.searchsorted(self.leaves.key, base)
        there = at < len(self.leaves)
        there[there] = self.leaves.key[at[there]] == base[there]
        return np.where(there, at, -1)

    def __contains__(self, key: int) -> bool:
        return bool(self.contains(np.array([key], np.uint64))[0])

    def contains(self, keys: U64) -> NDArray[np.bool_]:
        """Which of the keys are set."""
        leaf = self.leaf(keys)
        if len(keys) > self._abi.leaf_bits >> 3 and (leaf == leaf[0]).all():
            if leaf[0] < 0:
                return np.zeros(len(keys), np.bool_)
            bits = np.unpackbits(self.leaves.bitmap[leaf[0]], bitorder="little").view(np.bool_)
            return bits[(keys & np.uint64(self._abi.leaf_bits - 1)).view(np.int64)]
        found = leaf >= 0
        bit = (keys[found] & np.uint64(self._abi.leaf_bits - 1)).astype(np.int64)
        byte = self.leaves.bitmap[leaf[found], bit >> 3]
        found[found] = (byte >> (bit & 7).astype(np.uint8)) & 1 != 0
        return found

    def minus(self, other: KeySet) -> Iterator[Blocks]:
        """The blocks that another set lacks."""
        step = max(CHUNK_BLOCKS // self._abi.leaf_bits, 1)
        for at in range(0, len(self.leaves), step):
            mine = self.leaves[at : at + step]
            row = other.leaf(mine.key)
            bitmap = mine.bitmap.copy()
            bitmap[row >= 0] &= ~other.leaves.bitmap[row[row >= 0]]
            rest = Leaves(mine.key, bitmap)
            if rest.counts().any():
                yield decode_leaves(self._abi, rest)

    @functools.cached_property
    def orders(self) -> list[int]:
        """The orders that blocks may have."""
        low = (self.leaves.key & ~np.uint64(self._abi.type_bit)) == 0
        _, orders, _ = self._abi.kho_radix_decode_keys(self.leaves.key[~low])
        # One leaf holds the highest orders together: their order bits lie inside that leaf.
        mixed = range(self._abi.order_0_log2 - self._abi.bitmap_size_log2 + 1, 64)
        every = {*orders.tolist(), *(mixed if low.any() else ())}
        return sorted(order for order in every if order <= self._abi.order_0_log2)

    def folios(self, phys: U64) -> U64:
        """u64, pages of the largest folio that is preserved at each address; 0: there is none."""
        abi = self._abi
        found = np.zeros(len(phys), np.uint64)
        for order in self.orders:
            if order <= abi.max_page_order:
                aligned = phys % np.uint64(abi.page_size << order) == 0
                keys = abi.kho_radix_encode_keys(phys, order, KHO_PAGE_CONTIG)
                found[aligned & self.contains(keys)] = 1 << order
        return found

    def runs(self) -> Iterator[tuple[U64, U64]]:
        """
        The runs of pages that the blocks cover, whatever their order: sorted and apart, in chunks.

        Each chunk is u64 first pfns and u64 last-plus-one pfns.  A run may go on in the next chunk.
        The time depends on the number of leaves, but not on the number or size of the blocks.
        """
        abi, every = self._abi, self.leaves
        phys, order, _ = abi.kho_radix_decode_keys(every.key)
        low = (every.key & ~np.uint64(abi.type_bit)) == 0
        regular = np.flatnonzero(~low & (order != BAD_ORDER))
        first = phys >> np.uint64(abi.page_shift)
        regular = regular[np.argsort(first[regular], kind="stable")]
        waiting = [self._runs_of_highest(np.flatnonzero(low))]
        step = max(RUN_BITS // abi.leaf_bits, 1)
        for at in range(0, len(regular), step):
            group = regular[at : at + step]
            waiting.append(self._runs_of(group, first[group], order[group]))
            rest = regular[at + step : at + step + 1]
            # All later runs begin there or behind.
            done, left = _merged(waiting, first[rest[0]] if len(rest) else None)
            waiting = [left]
            yield done
        if not len(regular):
            yield _merged(waiting, None)[0]

    def _runs_of(self, rows: NDArray[np.int64], first: U64, order: NDArray[np.uint8]) -> Run:
        """The runs of set bits of some leaves, each of which has one order."""
        # A zero between two leaves ends a run at the end of the first.
        width = self._abi.leaf_bits + 1
        bits = np.zeros(len(rows) * width + 1, np.bool_)
        apart = bits[1:].reshape(len(rows), width)
        apart[:, :-1] = np.unpackbits(self.leaves.bitmap[rows], axis=1, bitorder="little")
        # The bits begin with a zero, so changes alternately begin and end a run.
        begin, end = np.flatnonzero(bits[1:] != bits[:-1]).reshape(-1, 2).T
        leaf = begin // width
        shift = order[leaf].astype(np.uint64)
        start = first[leaf] + ((begin % width).astype(np.uint64) << shift)
        return start, start + ((end - begin).astype(np.uint64) << shift)

    def _runs_of_highest(self, rows: NDArray[np.int64]) -> Run:
        """The runs of the leaves, one for each type, whose bits include order bits."""
        blocks = Blocks.concatenate(
            decode_leaves(self._abi, self.leaves[row : row + 1]) for row in rows.tolist()
        )
        blocks = blocks[blocks.order != BAD_ORDER]
        start = blocks.phys >> np.uint64(self._abi.page_shift)
        return start, start + blocks.page_count

    def covered(self, phys: U64) -> NDArray[np.bool_]:
        """Which addresses lie in a block."""
        abi = self._abi
        found = np.zeros(len(phys), np.bool_)
        for order in self.orders:
            for page_type in self._abi.key_types:
                # Most have been found in the first order or two.
                rest = np.flatnonzero(~found)
                keys = abi.kho_radix_encode_keys(phys[rest], order, page_type)
                found[rest] = self.contains(keys)
        return found

    def covers(self, phys: int, size: int) -> bool:
        """Whether all of some memory lies in blocks."""
        step = self._abi.page_size
        end = phys + size
        if not 0 <= phys <= end <= 1 << 64:
            # From a file, this may be any number.
            return False
        start = phys & -step
        while start < end:
            last = min(start + step * CHUNK_BLOCKS, end)
            pages = np.arange(start, last, step, dtype=np.uint64)
            if not self.covered(pages).all():
                return False
            # Skip the rest of this block: it may be too large to look at page by page.
            start = self._behind(int(pages[-1]))
        return True

    def _behind(self, phys: int) -> int:
        """The first address behind the largest block that an address lies in."""
        abi = self._abi
        orders = (
            order
            for order in reversed(self.orders)
            if any(abi.kho_radix_encode_key(phys, order, kind) in self for kind in abi.key_types)
        )
        shift = abi.page_shift + next(orders)
        return ((phys >> shift) + 1) << shift


def _merged(runs: list[Run], until: np.uint64 | None) -> tuple[Run, Run]:
    """
    Merge runs, sorted and apart: those in front of a page, and those behind it.

    :param until: a pfn at which a run is cut; None: all are in front.
    """
    start, end = (np.concatenate([run[i] for run in runs]) for i in (0, 1))
    by = np.argsort(start, kind="stable")
    start, reach = start[by], np.maximum.accumulate(end[by])
    begins = np.ones(len(start), np.bool_)
    begins[1:] = start[1:] > reach[:-1]
    ends = np.append(begins[1:], np.ones(min(len(start), 1), np.bool_))
    start, end = start[begins], reach[ends]
    if until is None:
        return (start, end), (start[:0], end[:0])
    front, back = start < until, end > until
    return (
        (start[front], np.minimum(end[front], until)),
        (np.maximum(start[back], until), end[back]),
    )
