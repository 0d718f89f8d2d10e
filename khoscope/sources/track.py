# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read what kernels before the radix tree preserve: a ``struct kho_mem_track``, and the chain of
``struct khoser_mem_chunk`` that is handed over in its place.

Both lead to bitmaps, each for blocks of one order.  The bits of a bitmap are those of a leaf, so
either becomes a :class:`~khoscope.facts.tree.Tree`.  Like the walk of a radix tree, these walks
take no lock, trust no pointer and always end: what an entry leads to must be aligned, in RAM, not
reached before and, in an xarray, below the node that holds the entry.  The numbers of tables, of
bitmaps and of leaves are bounded by what RAM could need.
Mirrors ``kho_mem_serialize`` and ``kho_mem_deserialize`` in kexec_handover.c of linux 6.16 to 7.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64, Abi
from ..abi.serialized import KHOSER_MEM_BITMAP_PTR, KHOSER_MEM_CHUNK_HDR, unpack
from ..facts.columns import Leaves, Nodes
from ..facts.tree import NodeProblem, Tree, TreeState
from .walk import PROBLEMS_KEPT, ReadPhys, groups, in_ranges, read_nodes

I64 = NDArray[np.int64]

#: Internal entries of an xarray up to here are not nodes (``xa_is_node`` in linux/xarray.h).
XA_NOT_A_NODE: Final = 4096
#: Nodes above each other, at most: 64 bits of index in the smallest nodes (XA_CHUNK_SHIFT 4).
XA_DEEPEST: Final = 16

_TOO_MANY: Final = "more nodes than this RAM could need"


@dataclass(frozen=True)
class TrackLayout:
    """
    Where ``struct xarray``, ``struct xa_node`` and ``struct kho_mem_phys`` keep things, in bytes.

    :param head: ``xa_head`` in ``struct xarray``.
    :param node: size of ``struct xa_node``.
    :param shift: ``shift`` (u8) in ``struct xa_node``.
    :param slots: ``slots`` in it.
    :param chunk_log2: how many slots there are (XA_CHUNK_SHIFT).
    :param phys_bits: ``phys_bits``, a ``struct xarray``, in ``struct kho_mem_phys``.
    :param direct_map: virtual address at which physical address 0 is mapped.
    """

    head: int
    node: int
    shift: int
    slots: int
    chunk_log2: int
    phys_bits: int
    direct_map: int


def walk_track(
    abi: Abi, layout: TrackLayout, root: int, head: int, ram: U64, read: ReadPhys
) -> Tree:
    """
    Read a ``struct kho_mem_track`` once.

    :param root: ``phys_addr_t`` of ``orders``.
    :param head: ``orders.xa_head``; 0 as long as nothing was ever preserved.
    :param ram: u64, shape (n, 2): where nodes and bitmaps may be.
    """
    bitmaps = _Bitmaps(abi, root, ram, read)
    xarrays = _Xarrays(layout, bitmaps)
    for order, phys, table, slot in xarrays.orders(root, head):
        xarrays.bitmaps(order, phys, table, slot)
    return bitmaps.tree()


def walk_chunks(abi: Abi, first: int, ram: U64, read: ReadPhys) -> Tree:
    """
    Read a chain of ``struct khoser_mem_chunk`` once.

    :param first: ``phys_addr_t`` of the first chunk; 0: there is none.
    :param ram: u64, shape (n, 2): where chunks and bitmaps may be.
    """
    if first == 0:
        return Tree(TreeState(0))
    bitmaps = _Bitmaps(abi, first, ram, read)
    phys, table, slot = first, first, 0
    capacity = (abi.page_size - KHOSER_MEM_CHUNK_HDR.itemsize) // KHOSER_MEM_BITMAP_PTR.itemsize
    while phys:
        raw = bitmaps.read_table(1, phys, abi.page_size, abi.page_size, table, slot)
        if raw is None:
            break
        header = unpack(KHOSER_MEM_CHUNK_HDR, raw)
        count, order = int(header["num_elms"]), int(header["order"])
        if count > capacity:
            bitmaps.problem(1, phys, 0, count, f"num_elms, of {capacity} that fit into a chunk")
            count = capacity
        rows = np.frombuffer(raw, KHOSER_MEM_BITMAP_PTR, count, KHOSER_MEM_CHUNK_HDR.itemsize)
        bitmaps.table(1, phys, bitmaps.first_key(order), count)
        bitmaps.add_at(order, rows["phys_start"], rows["bitmap"], phys)
        # From here on, an entry that cannot be followed is this chunk's hdr.next.
        phys, table, slot = int(header["next"]), phys, -1
    return bitmaps.tree()


@dataclass
class _Bitmaps:
    """
    The bitmaps that were found, and what led to them.

    :param found: of the bitmaps in chunks: key of bit 0, ``phys_addr_t``, and the table and index
        that lead there.
    :param found_count: bitmaps in all of it.
    :param tables: level, ``phys_addr_t``, first key and entries in use of what leads to them.
    """

    abi: Abi
    root: int
    ram: U64
    read: ReadPhys
    problems: list[NodeProblem] = field(default_factory=list)
    problem_count: int = 0
    tables: list[tuple[int, int, int, int]] = field(default_factory=list)
    found: list[tuple[U64, U64, U64, I64]] = field(default_factory=list)
    found_count: int = 0
    seen: set[int] = field(default_factory=set)

    def problem(self, level: int, table: int, index: int, entry: int, why: str) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(NodeProblem(level, table, index, entry, why))

    def refuse(self, bad: NDArray[np.bool_], table: U64, index: I64, entry: U64, why: str) -> None:
        rows = np.flatnonzero(bad)
        kept = rows[: PROBLEMS_KEPT - len(self.problems)].tolist()
        for row in kept:
            self.problem(1, int(table[row]), int(index[row]), int(entry[row]), why)
        self.problem_count += len(rows) - len(kept)

    def read_table(
        self, level: int, phys: int, size: int, align: int, table: int, index: int
    ) -> bytes | None:
        """What is at an address that an entry leads to; None: the entry is a problem."""
        raw = why = None
        if phys % align:
            why = f"not aligned to {align:,} bytes"
        elif not self._in_ram(phys, size):
            why = "not in RAM"
        elif phys in self.seen:
            why = "leads to a node reached before"
        # More tables than there could be, were each to lead to a single bitmap.
        elif len(self.seen) >= XA_DEEPEST * self._most(self.abi.bitmap_log2):
            why = _TOO_MANY
        else:
            self.seen.add(phys)
            raw = self.read(phys, size)
            why = "node cannot be read"
        if raw is None:
            self.problem(level, table, index, phys, why)
        return raw

    def _in_ram(self, phys: int, size: int) -> bool:
        if phys + size >= 1 << 64:
            return False
        at, end = np.array([phys], np.uint64), np.array([phys + size], np.uint64)
        return bool(in_ranges(self.ram, at, end)[0])

    def _most(self, bits_log2: int) -> int:
        """
        Bitmaps, or leaves, that it takes to preserve all of this RAM at each order at once; twice
        as many, to be on the safe side.

        Each bit stands for a block, and there are half as many blocks of the next order; the last
        bitmap of each order need not be full.  Kernels keep no two bitmaps for the same memory.

        :param bits_log2: how many bits one has.
        """
        pages = int(self.ram[-1, 1]) >> self.abi.page_shift if len(self.ram) else 0
        return 2 * (2 * (pages >> bits_log2) + self.abi.order_0_log2 + 1)

    def table(self, level: int, phys: int, key: int, used: int) -> None:
        """Something that leads to bitmaps, or to what does."""
        self.tables.append((level, phys, key, used))

    def first_key(self, order: int) -> int:
        """The key of the block of an order at address 0; 0 if there is no such order."""
        return 1 << self.abi.order_0_log2 - order if self._is_order(order) else 0

    def _is_order(self, order: int) -> bool:
        """Whether there can be blocks of an order: keys of all such are in leaves of their own."""
        return order <= self.abi.order_0_log2 - self.abi.bitmap_size_log2

    def add_at(self, order: int, start: U64, phys: U64, table: int) -> None:
        """
        The bitmaps of a chunk.

        :param start: u64, the address that bit 0 of each stands for.
        """
        slot = np.arange(len(phys))
        tables = np.full(len(phys), table, np.uint64)
        shift = min(self.abi.page_shift + order + self.abi.bitmap_log2, 63)
        odd = start & np.uint64((1 << shift) - 1) != 0
        self.refuse(odd, tables, slot, start, "phys_start, where no bitmap of its order begins")
        even = ~odd
        index = start[even] >> np.uint64(shift)
        self.add(order, index, phys[even], tables[even], slot[even])

    def add(self, order: int, index: U64, phys: U64, table: U64, slot: I64) -> None:
        """
        Bitmaps of one order.

        :param index: u64, of each in the xarray of its order.
        """
        abi = self.abi
        if not self._is_order(order):
            every = np.ones(len(phys), np.bool_)
            self.refuse(every, table, slot, phys, f"a bitmap of order {order}")
            return
        beyond = index >> np.uint64(abi.order_0_log2 - order - abi.bitmap_log2) != 0
        self.refuse(beyond, table, slot, phys, "a bitmap for memory behind all addresses")
        good = ~beyond
        # A page of pointers may lead to a page of bits by each, all of them different.
        over = np.zeros(len(phys), np.bool_)
        over[np.flatnonzero(good)[self._most(abi.bitmap_log2) - self.found_count :]] = True
        self.refuse(over, table, slot, phys, _TOO_MANY)
        good &= ~over
        self.found_count += int(good.sum())
        key = (index[good] << np.uint64(abi.bitmap_log2)) | np.uint64(self.first_key(order))
        self.found.append((key, phys[good], table[good], slot[good]))

    def tree(self) -> Tree:
        """The tree whose leaves hold what the bitmaps hold."""
        rows = sorted(self.tables, key=lambda row: -row[0])
        above = Nodes(
            np.array([row[0] for row in rows], np.uint8),
            np.array([row[1] for row in rows], np.uint64),
            np.array([row[2] for row in rows], np.uint64),
            np.array([row[3] for row in rows], np.uint32),
        )
        nodes, leaves = self._read() if self.found else (above[:0], [])
        state = TreeState(self.root, problems=self.problems, problem_count=self.problem_count)
        return Tree(state, [part for part in (above, nodes) if len(part)], leaves)

    def _read(self) -> tuple[Nodes, list[Leaves]]:
        key, phys, table, slot = (np.concatenate(part) for part in zip(*self.found, strict=True))
        by = np.argsort(key, kind="stable")
        by = by[self._sound(key[by], phys[by], table[by], slot[by])]
        key, phys, table, slot = key[by], phys[by], table[by], slot[by]
        size = self.abi.bitmap_bytes
        parts = list(read_nodes(self.read, phys, size))
        there = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in parts)])
        raw = np.concatenate([np.zeros((0, size), np.uint8), *(part for _, part in parts)])
        lost = np.ones(len(phys), np.bool_)
        lost[there] = False
        self.refuse(lost, table, slot, phys, "node cannot be read")
        used = np.bitwise_count(raw.view(np.uint64)).sum(axis=1, dtype=np.uint32)
        nodes = Nodes(np.zeros(len(there), np.uint8), phys[there], key[there], used)
        return nodes, groups(leaves_of(self.abi, nodes.key, raw))

    def _sound(self, key: U64, phys: U64, table: U64, slot: I64) -> NDArray[np.bool_]:
        """Which bitmaps may be read; the entries that lead to the others are problems."""
        size = np.uint64(self.abi.bitmap_bytes)
        good = np.ones(len(phys), np.bool_)
        tables = np.fromiter(self.seen, np.uint64, len(self.seen))
        for bad, why in (
            (phys % size != 0, f"not aligned to {size:,} bytes"),
            (~in_ranges(self.ram, phys, phys + size), "not in RAM"),
            (_repeated(phys) | np.isin(phys, tables), "leads to a node reached before"),
            (_repeated(key), "a second bitmap for the same memory"),
        ):
            self.refuse(bad & good, table, slot, phys, why)
            good &= ~bad
        # Where a bitmap is a part of a leaf, others may each be in a leaf of their own.
        over = np.zeros(len(phys), np.bool_)
        leaf = np.unique(key[good] >> np.uint64(self.abi.bitmap_size_log2), return_inverse=True)[1]
        over[good] = leaf >= self._most(self.abi.bitmap_size_log2)
        self.refuse(over, table, slot, phys, _TOO_MANY)
        return good & ~over


def _repeated(values: U64) -> NDArray[np.bool_]:
    """Which values stand further in front, too."""
    again = np.ones(len(values), np.bool_)
    again[np.unique(values, return_index=True)[1]] = False
    return again


def leaves_of(abi: Abi, key: U64, raw: NDArray[np.uint8], empty: bool = False) -> Leaves:
    """
    The leaves that hold what bitmaps hold.

    :param key: u64, of each bitmap's bit 0.
    :param raw: u8, shape (n, :attr:`Abi.bitmap_bytes`).
    :param empty: also those that hold nothing.
    """
    inside = np.uint64(abi.leaf_bits - 1)
    base, row = np.unique(key & ~inside, return_inverse=True)
    bitmap = np.zeros((len(base), abi.page_size // abi.bitmap_bytes, abi.bitmap_bytes), np.uint8)
    bitmap[row, ((key & inside) >> np.uint64(abi.bitmap_log2)).astype(np.int64)] = raw
    leaves = Leaves(base, bitmap.reshape(len(base), abi.page_size))
    return leaves if empty else leaves[leaves.counts() > 0]


@dataclass
class _Xarrays:
    """The xarrays of a ``struct kho_mem_track``."""

    layout: TrackLayout
    to: _Bitmaps

    def orders(self, root: int, head: int) -> Iterator[tuple[int, int, int, int]]:
        """Each order: its number, its ``struct kho_mem_phys``, and the table and index of that."""
        for index, phys, table, slot in self._entries(root, head, None):
            columns = (index.tolist(), phys.tolist(), table.tolist(), slot.tolist())
            yield from zip(*columns, strict=True)

    def bitmaps(self, order: int, phys: int, table: int, slot: int) -> None:
        """The bitmaps that the ``struct kho_mem_phys`` of an order leads to."""
        at = self.layout.phys_bits + self.layout.head
        raw = self.to.read_table(1, phys, at + 8, 8, table, slot)
        if raw is not None:
            head = int.from_bytes(raw[at:], "little")
            for found in self._entries(phys + at, head, order):
                self.to.add(order, *found)

    def _entries(
        self, at: int, head: int, order: int | None
    ) -> Iterator[tuple[U64, U64, U64, I64]]:
        """
        What an xarray holds, in chunks: index, ``phys_addr_t`` of the target, table and slot.

        :param at: ``phys_addr_t`` of the xarray itself.
        :param head: its ``xa_head``.
        :param order: the order that it belongs to; its nodes are kept as nodes of the tree.
        """
        start = np.array([head], np.uint64)
        level = _Entries(np.zeros(1, np.uint64), start, np.full(1, at, np.uint64), np.zeros(1, int))
        yield from self._below(level, 64, order)

    def _below(
        self, level: _Entries, above: int, order: int | None
    ) -> Iterator[tuple[U64, U64, U64, I64]]:
        """
        :param above: ``shift`` of the node that the entries are in: that of a node below it must be
            smaller.
        """
        entry = level.entry
        internal = entry & np.uint64(3) == 2
        node = internal & (entry > XA_NOT_A_NODE)
        # A value, or an internal entry such as XA_RETRY_ENTRY: KHO stores pointers only.
        odd = (entry != 0) & ~node & (entry & np.uint64(3) != 0)
        self.to.refuse(odd, level.table, level.slot, entry, "not a pointer")
        data = np.flatnonzero((entry != 0) & ~node & ~odd)
        if len(data):
            found = level[data]
            yield found.index, self._phys(found.entry), found.table, found.slot
        for row in np.flatnonzero(node).tolist():
            yield from self._node(level[row : row + 1], above, order)

    def _node(
        self, entry: _Entries, above: int, order: int | None
    ) -> Iterator[tuple[U64, U64, U64, I64]]:
        layout, bits = self.layout, self.layout.chunk_log2
        phys = int(self._phys(entry.entry - np.uint64(2))[0])
        table, slot, base = int(entry.table[0]), int(entry.slot[0]), int(entry.index[0])
        level = -(-min(above, 64) // bits)
        raw = self.to.read_table(level, phys, layout.node, 8, table, slot)
        if raw is None:
            return
        shift = raw[layout.shift]
        if shift >= above or shift % bits:
            self.to.problem(level, table, slot, phys, f"a node of shift {shift} below {above}")
            return
        slots = np.frombuffer(raw, np.uint64, 1 << bits, layout.slots)
        index = np.uint64(base) + (np.arange(1 << bits, dtype=np.uint64) << np.uint64(shift))
        if order is not None:
            key = self.to.first_key(order) | base << self.to.abi.bitmap_log2
            self.to.table(shift // bits + 1, phys, key & 2**64 - 1, int((slots != 0).sum()))
        tables = np.full(1 << bits, phys, np.uint64)
        below = _Entries(index, slots, tables, np.arange(1 << bits))
        if shift:
            yield from self._below(below, shift, order)
            return
        # At the bottom, nothing is a node.
        node = (slots & np.uint64(3) == 2) & (slots > XA_NOT_A_NODE)
        self.to.refuse(node, tables, below.slot, slots, "a node below the last level")
        yield from self._below(below[np.flatnonzero(~node)], 0, order)

    def _phys(self, pointer: U64) -> U64:
        """``phys_addr_t`` of pointers into the direct map; that of others is not in RAM."""
        return pointer - np.uint64(self.layout.direct_map)


@dataclass(frozen=True)
class _Entries:
    """
    Entries of an xarray.

    :param index: u64, the first index of each.
    :param entry: u64.
    :param table: u64, ``phys_addr_t`` of the node that each is in.
    :param slot: its number there.
    """

    index: U64
    entry: U64
    table: U64
    slot: I64

    def __getitem__(self, rows: slice | I64) -> _Entries:
        return _Entries(self.index[rows], self.entry[rows], self.table[rows], self.slot[rows])
