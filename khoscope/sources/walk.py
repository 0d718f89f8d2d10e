# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Walk a ``struct kho_radix_tree`` in memory that may be moving, stale or hostile.

The walk goes level by level over all nodes at once.  It takes no lock and trusts no pointer: an
entry is followed only if it is aligned, in RAM and not reached before, and the number of nodes is
bounded by what RAM could need, so that it always ends.
Mirrors ``__kho_radix_walk_tree`` in kexec_handover.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64, Abi
from ..facts.columns import Leaves, Nodes, aligned
from ..facts.tree import NodeProblem, Tree, TreeState

#: Reads ``size`` bytes at a physical address; None: that memory cannot be read.
ReadPhys = Callable[[int, int], bytes | None]

#: How many problems are kept with their address; all are counted.
PROBLEMS_KEPT: Final = 256
#: Bytes read at once, at most.
READ_SIZE: Final = 1 << 20
#: Bytes between two pieces of memory that are read together with them: another read costs more.
NEAR: Final = 1 << 14
#: How often khoscope reads a moving tree again before it gives up.
READS: Final = 3

T = TypeVar("T")


def in_ranges(ranges: U64, first: U64, end: U64) -> NDArray[np.bool_]:
    """
    Which of the spans [first, end) lie wholly in one range.

    :param ranges: u64, shape (n, 2), sorted and disjoint.
    """
    if not len(ranges):
        return np.zeros(len(first), np.bool_)
    at = np.searchsorted(ranges[:, 0], first, "right").astype(np.int64) - 1
    inside = ranges[np.maximum(at, 0)]
    return (at >= 0) & (end <= inside[:, 1]) & (first < end)


def walk(abi: Abi, root: int, ram: U64, read: ReadPhys) -> Tree:
    """
    Read a whole tree once.

    :param root: ``phys_addr_t`` of the root node; 0: no tree.
    :param ram: u64, shape (n, 2): where nodes may be.
    """
    if root == 0:
        return Tree(TreeState(0))
    return _Walk(abi, root, ram, read).run()


@dataclass
class _Problems:
    kept: list[NodeProblem]
    count: int = 0

    def add(self, level: int, tables: U64, index: NDArray[np.int64], entry: U64, why: str) -> None:
        self.count += len(entry)
        for i in range(min(len(entry), PROBLEMS_KEPT - len(self.kept))):
            self.kept.append(NodeProblem(level, int(tables[i]), int(index[i]), int(entry[i]), why))


class _Walk:
    def __init__(self, abi: Abi, root: int, ram: U64, read: ReadPhys) -> None:
        self._abi = abi
        self._ram = ram
        self._read = read
        self._root = root
        self._problems = _Problems([])
        self._nodes: list[Nodes] = []
        self._leaves: list[Leaves] = []
        self._seen: U64 = np.zeros(0, np.uint64)

    def run(self) -> Tree:
        abi = self._abi
        phys = np.array([self._root], np.uint64)
        key = np.zeros(1, np.uint64)
        index = np.zeros(1, np.int64)
        table = np.zeros(1, np.uint64)
        for level in range(abi.tree_max_depth - 1, 0, -1):
            follow = self._sound(level, table, index, phys)
            phys, key = phys[follow], key[follow]
            table, index, entry, key = self._children(level, phys, key)
            phys = entry
        follow = self._sound(0, table, index, phys)
        self._read_leaves(phys[follow], key[follow])
        state = TreeState(
            self._root, problems=self._problems.kept, problem_count=self._problems.count
        )
        return Tree(state, self._nodes, self._leaves)

    def _sound(
        self, level: int, table: U64, index: NDArray[np.int64], entry: U64
    ) -> NDArray[np.bool_]:
        """Which entries lead to nodes that may be read; the others become problems."""
        size = np.uint64(self._abi.page_size)
        good = np.ones(len(entry), np.bool_)

        def refuse(bad: NDArray[np.bool_], why: str) -> None:
            bad &= good
            if bad.any():
                self._problems.add(level + 1, table[bad], index[bad], entry[bad], why)
                good[bad] = False

        refuse((entry & (size - np.uint64(1))) != 0, "not aligned to a page")
        refuse(~in_ranges(self._ram, entry, entry + size), "not in RAM")
        _, first = np.unique(entry, return_index=True)
        again = np.ones(len(entry), np.bool_)
        again[first] = False
        refuse(again | np.isin(entry, self._seen), "leads to a node reached before")
        budget = self._budget() - len(self._seen)
        over = np.zeros(len(entry), np.bool_)
        over[np.flatnonzero(good)[max(budget, 0) :]] = True
        refuse(over, "more nodes than this RAM could need")
        self._seen = np.concatenate([self._seen, entry[good]])
        return good

    def _budget(self) -> int:
        """
        More nodes than a tree over this RAM can have.

        Leaves of order n cover ``leaf_bits << n`` pages each and all orders (and types) may have
        their own; each leaf has at most one table of its own on each level above.
        """
        pages = int(self._ram[-1, 1]) >> self._abi.page_shift if len(self._ram) else 0
        leaves = 2 * (2 * (pages >> self._abi.bitmap_size_log2) + self._abi.order_0_log2 + 1)
        return leaves * self._abi.tree_max_depth

    def _children(self, level: int, phys: U64, key: U64) -> tuple[U64, NDArray[np.int64], U64, U64]:
        """The used entries of all tables of a level: table, index, entry, first key below."""
        found = []
        for at, raw in self._read_nodes(level, phys):
            entries = raw.view(np.uint64)
            row, index = np.nonzero(entries)
            below = key[at][row] | (
                index.astype(np.uint64) << np.uint64(self._abi.table_shift(level))
            )
            found.append((phys[at][row], index, entries[row, index], below))
            self._keep(level, phys[at], key[at], np.count_nonzero(entries, axis=1))
        if not found:
            none = np.zeros(0, np.uint64)
            return none, np.zeros(0, np.int64), none, none
        table, index, entry, below = (np.concatenate(part) for part in zip(*found, strict=True))
        return table, index, entry, below

    def _read_leaves(self, phys: U64, key: U64) -> None:
        for at, raw in self._read_nodes(0, phys):
            leaves = Leaves(key[at], raw)
            used = leaves.counts()
            self._keep(0, phys[at], key[at], used)
            # Deleting clears bits but frees nothing: empty leaves are normal.
            if used.any():
                self._leaves.append(leaves if used.all() else leaves[used > 0])

    def _keep(self, level: int, phys: U64, key: U64, used: NDArray[np.int64]) -> None:
        levels = np.full(len(phys), level, np.uint8)
        self._nodes.append(Nodes(levels, phys, key, used.astype(np.uint32)))

    def _read_nodes(
        self, level: int, phys: U64
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """:func:`read_nodes`; a node that cannot be read is a problem."""
        read = np.zeros(len(phys), np.bool_)
        for rows, raw in read_nodes(self._read, phys, self._abi.page_size):
            read[rows] = True
            yield rows, raw
        for row in np.flatnonzero(~read).tolist():
            self._unreadable(level, phys[row : row + 1])

    def _unreadable(self, level: int, phys: U64) -> None:
        self._problems.add(level, phys, np.zeros(1, np.int64), phys, "node cannot be read")


def read_nodes(
    read: ReadPhys, phys: U64, size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """
    The bytes of nodes, in groups of READ_SIZE; one read gets all neighbours in memory.

    :param phys: u64, ``phys_addr_t`` of each node.
    :param size: of a node, bytes.
    :return: pairs of rows of ``phys`` and their bytes, shape (n, size).  Nodes that cannot be read
        are left out.
    """
    group = READ_SIZE // size
    for start in range(0, len(phys), group):
        part = phys[start : start + group]
        breaks = np.flatnonzero(np.diff(part) != np.uint64(size)) + 1
        bounds = [0, *breaks.tolist(), len(part)]
        rows: list[int] = []
        pieces: list[bytes] = []
        for low, high in pairwise(bounds):
            data = read(int(part[low]), (high - low) * size)
            if data is not None:
                rows += range(start + low, start + high)
                pieces.append(data)
                continue
            for i in range(low, high):
                data = read(int(part[i]), size)
                if data is not None:
                    rows.append(start + i)
                    pieces.append(data)
        if rows:
            joined = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            raw = np.frombuffer(joined, np.uint8).reshape(-1, size)
            yield np.array(rows, np.int64), raw


def read_near(read: ReadPhys, phys: Sequence[int], size: Sequence[int]) -> list[bytes | None]:
    """
    Pieces of memory in any order; one read gets those that lie near each other.

    :param phys: ``phys_addr_t`` of each piece; it lies in RAM.
    :param size: of each, bytes.
    :return: their bytes; None: that piece cannot be read.
    """
    found: list[bytes | None] = [None] * len(phys)
    by = sorted(range(len(phys)), key=phys.__getitem__)
    at = 0
    while at < len(by):
        first = phys[by[at]]
        end, begin = first + size[by[at]], at
        at += 1
        while at < len(by):
            start = phys[by[at]]
            behind = start + size[by[at]]
            if start > end + NEAR or behind > first + READ_SIZE:
                break
            end = max(end, behind)
            at += 1
        data = read(first, end - first)
        for row in by[begin:at]:
            if data is not None:
                found[row] = data[phys[row] - first : phys[row] - first + size[row]]
            elif at - begin > 1:
                # One of them, or what lies between them, cannot be read.
                found[row] = read(phys[row], size[row])
    return found


def read_rows(read: ReadPhys, at: U64, size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """
    Pieces of memory of one size, in any order; one read gets those that lie near each other.

    :param at: u64, where each begins, in the addresses that ``read`` takes.
    :param size: of each, bytes.
    :return: their bytes, shape (n, size), and which of them could be read; the others are zeros.
    """
    rows = np.zeros((len(at), size), np.uint8)
    there = np.zeros(len(at), np.bool_)
    by = np.argsort(at)
    ordered = at[by]
    far = np.flatnonzero(np.diff(ordered) > np.uint64(size + NEAR)) + 1
    starts = np.concatenate([np.zeros(min(len(at), 1), np.int64), far])
    run = np.repeat(ordered[starts], np.diff(np.append(starts, len(at))))
    part = (ordered - run) // np.uint64(READ_SIZE)
    cut = np.flatnonzero((np.diff(run) != 0) | (np.diff(part) != 0)) + 1
    waiting = [*pairwise([0, *cut.tolist(), len(at)])] if len(at) else []
    while waiting:
        low, high = waiting.pop()
        first, end = int(ordered[low]), int(ordered[high - 1]) + size
        data = read(first, end - first)
        if data is not None:
            inside = (ordered[low:high] - np.uint64(first)).astype(np.int64)
            windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), size)
            rows[by[low:high]] = windows[inside]
            there[by[low:high]] = True
        elif high - low > 1:
            # One of them, or what lies between them, cannot be read.
            middle = (low + high) // 2
            waiting += (low, middle), (middle, high)
    return rows, there


def settle(walk_once: Callable[[], Tree], use: Callable[[Tree], T]) -> tuple[T, Tree]:
    """
    Read a tree that may move, until it is the same before and after its use, READS times at most.

    :param walk_once: reads the tree.
    :param use: reads what depends on the tree.
    :return: what ``use`` gave, and the tree.  If the tree never held still, it holds only what was
        there both before and after, and says how many blocks moved.
    """
    tree = walk_once()
    reads = 1
    while True:
        used = use(tree)
        again = walk_once()
        reads += 1
        moved = sum(starmap(_moved, aligned(tree.leaves, again.leaves)))
        same = moved == 0 and tree.state.problem_count == again.state.problem_count
        if same or reads > READS:
            worse = max(tree.state, again.state, key=lambda state: state.problem_count)
            state = replace(worse, reads=reads, moved=moved)
            stable = list(_stable(tree, again)) if moved else tree.leaves
            return used, replace(tree, leaves=stable, state=state)
        tree = again


def _moved(a: Leaves, b: Leaves) -> int:
    """How many blocks are in one of two groups of leaves only."""
    if len(a) == len(b) and (a.key == b.key).all():
        if np.array_equal(a.bitmap, b.bitmap):
            return 0
        return int(np.bitwise_count(a.bitmap ^ b.bitmap).sum())
    both = _both(a, b)
    return int(a.counts().sum() + b.counts().sum() - 2 * both.counts().sum())


def _both(a: Leaves, b: Leaves) -> Leaves:
    """The blocks that are in both."""
    key, i, j = np.intersect1d(a.key, b.key, assume_unique=True, return_indices=True)
    return Leaves(key, a.bitmap[i] & b.bitmap[j])


def _stable(a: Tree, b: Tree) -> Iterator[Leaves]:
    """The leaves of the blocks that are in both of two trees."""
    return filter(len, starmap(_both, aligned(a.leaves, b.leaves)))


def groups(leaves: Leaves) -> list[Leaves]:
    """The same leaves in chunks of READ_SIZE."""
    if not len(leaves):
        return []
    step = max(READ_SIZE // leaves.bitmap.shape[1], 1)
    return [leaves[at : at + step] for at in range(0, len(leaves), step)]
