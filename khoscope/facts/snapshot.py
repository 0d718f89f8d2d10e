# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A Snapshot: facts about KHO in one kernel at one time, and no opinion.

Small facts are plain values.  Whatever a kernel decides the size of is a stream of column chunks
(:mod:`khoscope.facts.columns`): iterate it as often as needed, it is never whole in memory unless
it is small.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, NO_TYPE, U64, Abi
from ..abi.kho_fdt import Fdt
from .clients import Claims, Liveupdate, Luo, Owner, Vmalloc
from .columns import CHUNK_BLOCKS, Blocks, Columns, Leaves, Nodes

#: First and last-plus-one pfn of runs of pages.
Run = tuple[U64, U64]
#: Bits of leaves that are taken apart at once.
RUN_BITS: Final = 1 << 21


@dataclass(frozen=True)
class Taken:
    """When and how the facts were read."""

    khoscope: str
    time: str
    source: str


@dataclass(frozen=True)
class Kernel:
    """
    The kernel that was read.

    :param release: ``init_uts_ns.name.release``.
    :param version: ``init_uts_ns.name.version``.
    :param boot_id: ``/proc/sys/kernel/random/boot_id``; None when the kernel has not made it yet.
    :param tainted: ``tainted_mask``.
    :param log: lines of the kernel log about KHO gone wrong and bad pages (kernel/printk).
    :param page_flags: names of the ``enum pageflags`` bits, by bit.
    :param page_types: names of the ``enum pagetype`` values, by the top byte of ``page_type``.
    :param command_line: ``saved_command_line``.
    """

    release: str
    version: str
    boot_id: str | None
    tainted: int
    log: list[str]
    page_flags: list[str] = field(default_factory=list)
    page_types: dict[int, str] = field(default_factory=dict)
    command_line: str = ""


@dataclass(frozen=True)
class NodeProblem:
    """
    An entry that no tree of the kernel's would have.

    :param table: ``phys_addr_t`` of the node it stands in.
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
    :param reads: how often it was read until two reads agreed, or we gave up.
    :param moved: blocks that came or went between the last two reads; they are left out.
    :param problems: entries that were not followed, the first of them.
    :param problem_count: all of them.
    """

    root: int
    reads: int = 1
    moved: int = 0
    problems: list[NodeProblem] = field(default_factory=list)
    problem_count: int = 0


@dataclass(frozen=True)
class Tree:
    """
    A radix tree, read.

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
    """Indices of all bits, kept: a full leaf is what a big tree is made of."""
    bits = np.arange(count, dtype=np.uint64)
    bits.flags.writeable = False
    return bits


def _set_bits(bitmap: NDArray[np.uint8]) -> U64:
    """Indices of the bits that are set."""
    if (bitmap.view(np.uint64) == np.uint64(2**64 - 1)).all():
        return _all_bits(8 * len(bitmap))
    bits = np.unpackbits(bitmap, bitorder="little").view(np.bool_)
    return np.flatnonzero(bits).view(np.uint64)


@dataclass(frozen=True)
class Side:
    """
    What one direction holds: outgoing (``struct kho_out``) or incoming (``struct kho_in``).

    :param blobs: the FDT ("fdt") and the subtrees (by name) as they were, where readable.
    :param blocks: the tree's blocks with the facts of their struct pages; empty where these were
        not read.
    :param luo: what LUO has in it; None: nothing, or not looked at.
    :param vmallocs: the vmalloc areas that known structures lead to.
    :param owners: whose memory this is, as far as memory can tell.
    :param claims: stream of the memory of each.
    """

    fdt: Fdt
    tree: Tree
    blobs: dict[str, bytes] = field(default_factory=dict)
    blocks: Iterable[Blocks] = ()
    luo: Luo | None = None
    vmallocs: list[Vmalloc] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    claims: Iterable[Claims] = ()


@dataclass(frozen=True)
class KexecImage:
    """
    What the next kexec starts (``struct kimage *kexec_image``).

    :param loaded: whether there is one.
    :param file_mode: loaded with kexec_file_load(), not with kexec_load().
    :param kho_fdt: ``kho.fdt``, ``phys_addr_t``; 0: it will be handed nothing.
    :param size: of its segments in memory, bytes.
    """

    loaded: bool
    file_mode: bool = False
    kho_fdt: int = 0
    size: int = 0


@dataclass(frozen=True)
class Handover:
    """
    How this kernel came to be (``struct kho_in``).

    :param is_kho_boot: as the kernel's function of that name.
    :param previous_release: release of the kernel that handed over.
    :param kexec_count: kexecs since the last cold boot.
    """

    is_kho_boot: bool
    previous_release: str
    kexec_count: int


@dataclass(frozen=True)
class Scan:
    """How the search for stamps went, in pages."""

    scanned: int = 0
    unread: int = 0


@dataclass(frozen=True)
class Watched:
    """
    Pages of the blocks that another kernel had recorded, as they are now.

    :param time: when the snapshot that recorded them was taken.
    :param boot_id: the boot it was taken from.
    """

    time: str
    boot_id: str | None


@dataclass(frozen=True)
class Snapshot:
    """
    Everything that was read from one kernel.

    :param ram: u64, shape (n, 2): first and last-plus-one physical address of each range of
        System RAM (``iomem_resource``).
    :param scratch: u64, shape (n, 2): address and size of each area (``kho_scratch``).
    :param scratch_free: pages of each area that the buddy allocator holds, None where their
        struct pages cannot be read; empty: not counted.
    :param image: the kexec image; None: not looked at.
    :param liveupdate: LUO in this kernel; None: it has none, or was not looked at.
    :param unreadable: what else of the kernel's memory could not be read, in words: a vmcore may
        lack pages.
    :param unrecorded: what the khoscope that took it did not record yet, in words.
    :param contradictions: facts of it that contradict each other, in words, as far as that showed
        when a file was opened (:mod:`khoscope.facts.invariants`).
    :param outgoing: what this kernel is about to hand over.
    :param incoming: what it was handed; its tree is evidence, never proof.  None: not a KHO boot.
    :param stamps: stream of the stamped pages, found by scanning all struct pages; sorted by
        address.
    :param watched: stream of the blocks of another snapshot, in its order, with the page facts
        of this kernel.
    :param evidence: what stands now where the other snapshot's leaves stood, sorted by key: those
        leaves, or anything else.
    """

    taken: Taken
    kernel: Kernel
    abi: Abi
    kho_enable: bool
    handover: Handover
    ram: U64
    scratch: U64
    outgoing: Side
    incoming: Side | None = None
    scan: Scan | None = None
    stamps: Iterable[Blocks] = ()
    watching: Watched | None = None
    watched: Iterable[Blocks] = ()
    evidence: Iterable[Leaves] = ()
    scratch_free: list[int | None] = field(default_factory=list)
    image: KexecImage | None = None
    liveupdate: Liveupdate | None = None
    unreadable: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


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
        at = np.searchsorted(self.leaves.key, base)
        there = at < len(self.leaves)
        there[there] = self.leaves.key[at[there]] == base[there]
        return np.where(there, at, -1)

    def __contains__(self, key: int) -> bool:
        return bool(self.contains(np.array([key], np.uint64))[0])

    def contains(self, keys: U64) -> NDArray[np.bool_]:
        """Which of the keys are set."""
        leaf = self.leaf(keys)
        found = leaf >= 0
        bit = (keys[found] & np.uint64(self._abi.leaf_bits - 1)).astype(np.int64)
        byte = self.leaves.bitmap[leaf[found], bit >> 3]
        found[found] = (byte >> (bit & 7).astype(np.uint8)) & 1 != 0
        return found

    @functools.cached_property
    def orders(self) -> list[int]:
        """The orders of which there may be blocks."""
        low = (self.leaves.key & ~np.uint64(self._abi.type_bit)) == 0
        _, orders, _ = self._abi.kho_radix_decode_keys(self.leaves.key[~low])
        # One leaf holds the highest orders together: their order bits are bits of its own.
        mixed = range(self._abi.order_0_log2 - self._abi.bitmap_size_log2 + 1, 64)
        every = {*orders.tolist(), *(mixed if low.any() else ())}
        return sorted(order for order in every if order <= self._abi.order_0_log2)

    def folio(self, phys: int) -> int:
        """Pages of the folio that is preserved at an address; 0: there is none."""
        abi = self._abi
        for order in range(abi.max_page_order, -1, -1):
            aligned = phys % (abi.page_size << order) == 0
            if aligned and abi.kho_radix_encode_key(phys, order) in self:
                return 1 << order
        return 0

    def runs(self) -> Iterator[tuple[U64, U64]]:
        """
        What the blocks cover, whatever their order: runs of pages, sorted and apart, in chunks.

        Each chunk is u64 first pfns and u64 last-plus-one pfns.  A run may go on in the next chunk.
        It takes as long as there are leaves, and no longer for more or larger blocks.
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
            # Whatever comes later begins there or behind.
            done, left = _merged(waiting, first[rest[0]] if len(rest) else None)
            waiting = [left]
            yield done
        if not len(regular):
            yield _merged(waiting, None)[0]

    def _runs_of(self, rows: NDArray[np.int64], first: U64, order: NDArray[np.uint8]) -> Run:
        """The runs of set bits of some leaves, each of which has one order."""
        # A zero between any two leaves ends what the one has at its end.
        width = self._abi.leaf_bits + 1
        bits = np.zeros(len(rows) * width + 1, np.bool_)
        apart = bits[1:].reshape(len(rows), width)
        apart[:, :-1] = np.unpackbits(self.leaves.bitmap[rows], axis=1, bitorder="little")
        # They begin with a zero, so that what changes begins a run, then ends it.
        begin, end = np.flatnonzero(bits[1:] != bits[:-1]).reshape(-1, 2).T
        leaf = begin // width
        shift = order[leaf].astype(np.uint64)
        start = first[leaf] + ((begin % width).astype(np.uint64) << shift)
        return start, start + ((end - begin).astype(np.uint64) << shift)

    def _runs_of_highest(self, rows: NDArray[np.int64]) -> Run:
        """Of the leaf, one of each type, whose bits are order bits, too."""
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
            for page_type in self._types:
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
            # Out of a file, this may be any number.
            return False
        start = phys & -step
        while start < end:
            last = min(start + step * CHUNK_BLOCKS, end)
            pages = np.arange(start, last, step, dtype=np.uint64)
            if not self.covered(pages).all():
                return False
            # A block may be larger than all that would be looked at page by page.
            start = self._behind(int(pages[-1]))
        return True

    def _behind(self, phys: int) -> int:
        """The first address behind the largest block that an address lies in."""
        abi = self._abi
        orders = (
            order
            for order in reversed(self.orders)
            if any(abi.kho_radix_encode_key(phys, order, kind) in self for kind in self._types)
        )
        shift = abi.page_shift + next(orders)
        return ((phys >> shift) + 1) << shift

    @property
    def _types(self) -> tuple[int, ...]:
        """Of which there may be blocks."""
        return (KHO_PAGE_CONTIG, KHO_PAGE_SPLIT) if self._abi.type_bit else (NO_TYPE,)


def _merged(runs: list[Run], until: np.uint64 | None) -> tuple[Run, Run]:
    """
    Runs, sorted and apart: those in front of a page, and those behind it.

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


def in_ram(ram: U64, phys: int, size: int) -> bool:
    """
    Whether memory lies in one range of RAM.

    :param ram: as :attr:`Snapshot.ram`.
    :param phys: any number, as out of a file; ``size`` likewise.
    """
    if not 0 <= phys < 1 << 64 or not len(ram):
        return False
    at = int(np.searchsorted(ram[:, 0], np.uint64(phys), "right")) - 1
    return at >= 0 and phys + size <= int(ram[at, 1])


def rows(stream: Iterable[Columns]) -> int:
    """How many rows a stream has."""
    return sum(len(chunk) for chunk in stream)
