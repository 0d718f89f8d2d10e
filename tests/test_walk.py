# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree walk: against a plain model, on trees that no kernel makes, and on moving ones."""

from __future__ import annotations

import struct
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import khoscope.facts.by_address
import khoscope.facts.tree
from khoscope.abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, NO_TYPE, Abi
from khoscope.facts.by_address import by_address, gathered
from khoscope.facts.columns import CHUNK_BLOCKS, Blocks, Leaves
from khoscope.facts.tree import KeySet, NodeProblem, Tree, TreeState
from khoscope.sources import walk as walk_module
from khoscope.sources.walk import (
    NEAR,
    PROBLEMS_KEPT,
    READ_SIZE,
    READS,
    in_ranges,
    read_near,
    read_rows,
    settle,
    walk,
)
from khoscope.views.block_filter import BlockFilter
from tests.synthetic import FIXED, PLAIN, POSTED, Memory, blocks_of

ABIS = [
    abi
    for shift in (12, 14, 16)
    for abi in (
        Abi.for_page_shift(shift),
        Abi.for_page_shift(shift, type_shift=63),
        Abi.for_page_shift(shift, type_shift=64 - shift + 1),
    )
]
abis = st.sampled_from(ABIS)

#: (phys, order, type)
Block = tuple[int, int, int]


@st.composite
def some_block(draw: st.DrawFn, abi: Abi) -> Block:
    """Mostly blocks as kernels have them, in the first GiB, and sometimes anything."""
    order = draw(st.integers(0, 11) | st.integers(0, abi.order_0_log2))
    limit = draw(st.sampled_from([1 << 30, 1 << 64]))
    size = abi.page_size << order
    index = draw(st.integers(0, max(limit // size - 1, 0)))
    return index * size, order, draw(st.sampled_from([0, 1]))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Abi, list[tuple[bool, Block]]]:
    """A kernel, and blocks that are preserved (True) and unpreserved in turn."""
    abi = draw(abis)
    pool = draw(st.lists(some_block(abi), min_size=1, max_size=12))
    step = st.tuples(st.booleans(), st.sampled_from(pool))
    return abi, draw(st.lists(step, max_size=30))


def seen_as(abi: Abi, block: Block) -> Block:
    """The block as a walk gives it back."""
    phys, order, page_type = block
    if not abi.has_types:
        return phys, order, NO_TYPE
    return phys, order, page_type if abi.type_is_stored else KHO_PAGE_CONTIG


def built(abi: Abi, steps: list[tuple[bool, Block]]) -> tuple[Memory, set[Block]]:
    """Memory with a tree after some changes, and what is preserved then."""
    memory = Memory(abi)
    model: set[Block] = set()
    for preserve, block in steps:
        phys, order, page_type = block
        if preserve:
            memory.add_page(phys, order, page_type)
            model.add(seen_as(abi, block))
        else:
            memory.del_key(abi.kho_radix_encode_key(phys, order, page_type))
            model.discard(seen_as(abi, block))
    return memory, model


def listed(chunks: Iterable[Blocks]) -> list[Block]:
    return [
        block
        for c in chunks
        for block in zip(c.phys.tolist(), c.order.tolist(), c.type.tolist(), strict=True)
    ]


@given(changes())
def test_walk_gives_what_was_preserved(made: tuple[Abi, list[tuple[bool, Block]]]) -> None:
    abi, steps = made
    memory, model = built(abi, steps)
    tree = memory.walk()
    assert blocks_of(abi, tree) == model
    assert tree.totals(abi) == Counter((order, kind) for _, order, kind in model)
    assert tree.state.root == memory.root
    assert (tree.state.problem_count, tree.state.problems) == (0, [])
    # Every node that was made is there, empty leaves included, and no other.
    nodes = [phys for chunk in tree.nodes for phys in chunk.phys.tolist()]
    assert sorted(nodes) == sorted(memory.pages)
    keys = [key for chunk in tree.blocks(abi) for key in chunk.key.tolist()]
    assert keys == sorted(set(keys))
    assert all(len(group) and group.counts().all() for group in tree.leaves)


@given(changes(), st.integers(1, 4))
def test_blocks_by_address(made: tuple[Abi, list[tuple[bool, Block]]], chunk: int) -> None:
    """Whatever the orders, and wherever chunks end: never between two blocks of one address.

    Chunks are in order of address, and each is in order of key.
    """
    abi, steps = made
    memory, model = built(abi, steps)
    tree = memory.walk()
    with pytest.MonkeyPatch.context() as patch:
        for module in (khoscope.facts.tree, khoscope.facts.by_address):
            patch.setattr(module, "CHUNK_BLOCKS", chunk)
        chunks = list(tree.by_address(abi))
        # And back again, as files have them.
        again = sorted(gathered(chunks), key=lambda part: int(part.key[0]))
        turned = list(by_address(again))
    by_key = [key for part in tree.blocks(abi) for key in part.key.tolist()]
    found = [key for part in chunks for key in part.key.tolist()]
    assert sorted(found) == by_key
    assert {*listed(chunks)} == model
    for part, behind in pairwise(chunks):
        assert part.phys.max() < behind.phys.min()
    for part in [*chunks, *turned]:
        assert len(part)
        assert (part.key[1:] > part.key[:-1]).all()
    assert [key for part in again for key in part.key.tolist()] == by_key
    assert all(len(part) <= chunk for part in again)
    assert sorted(key for part in turned for key in part.key.tolist()) == by_key
    for part, behind in pairwise(turned):
        assert part.phys.max() < behind.phys.min()


def test_blocks_whose_addresses_are_in_no_order() -> None:
    """A file may have any: each block comes once, and there is an end."""
    random = np.random.default_rng(1)
    for most in (5, 60, 250):
        chunks = []
        for _ in range(7):
            rows = int(random.integers(1, 40))
            key, phys = random.integers(0, 1 << 62, (2, rows)).astype(np.uint64)
            order = random.integers(0, most, rows).astype(np.uint8)
            order[random.integers(0, 9, rows) == 0] = BAD_ORDER
            chunks.append(Blocks(np.sort(key), phys, order, np.zeros(rows, np.int8)))
        wanted = sorted(key for part in chunks for key in part.key.tolist())
        for found in (by_address(chunks), by_address(iter(chunks)), gathered(chunks)):
            assert sorted(key for part in found for key in part.key.tolist()) == wanted


def test_what_waits_for_its_chunk_keeps_no_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of a kind in each chunk: those wait to the end, and the others are let go."""
    monkeypatch.setattr(khoscope.facts.by_address, "CHUNK_BLOCKS", 40)
    seen: list[weakref.ref[Any]] = []

    def stream() -> Iterator[Blocks]:
        for at in range(10):
            phys = np.arange(50, dtype=np.uint64) * np.uint64(4096) + np.uint64(at << 32)
            keys = [PLAIN.kho_radix_encode_keys(phys[:1], 9, KHO_PAGE_CONTIG)]
            key = np.concatenate([*keys, PLAIN.kho_radix_encode_keys(phys, 0, KHO_PAGE_CONTIG)])
            seen.append(weakref.ref(key))
            yield Blocks(key, *PLAIN.kho_radix_decode_keys(key))
            del key
            assert sum(each() is not None for each in seen) <= 2

    assert sum(map(len, list(gathered(stream())))) == 10 * 51


@pytest.mark.parametrize("abi", [PLAIN, FIXED])
def test_keys_without_an_address_come_first(abi: Abi) -> None:
    """Each is there once, though no address is behind any of them."""
    leaf = np.zeros((1, abi.page_size), np.uint8)
    leaf[0, 0] = 0b11
    good = abi.kho_radix_encode_key(0x8000_0000, 0) & ~(abi.leaf_bits - 1)
    beyond = [1 << 56, (1 << 56) + abi.leaf_bits]
    leaves = [Leaves(np.array([key], np.uint64), leaf) for key in (0, good, *beyond)]
    tree = Tree(TreeState(0x1000), leaves=leaves)
    found = [key for part in tree.by_address(abi) for key in part.key.tolist()]
    assert sorted(found) == sorted(key + bit for key in (0, good, *beyond) for bit in (0, 1))
    assert found[: 2 * len(beyond)] == [key + bit for key in beyond for bit in (0, 1)]


@given(changes())
def test_key_set_holds_the_keys_of_the_tree(made: tuple[Abi, list[tuple[bool, Block]]]) -> None:
    abi, steps = made
    memory, model = built(abi, steps)
    keys = KeySet(abi, memory.walk().leaves)
    for _, block in steps:
        assert (abi.kho_radix_encode_key(*block) in keys) == (seen_as(abi, block) in model)
    assert abi.stored_bits - 1 not in keys or (0, abi.order_0_log2 - 5, 0) in model


@given(
    changes(),
    st.none() | st.integers(0, 12),
    st.none() | st.sampled_from(["contig", "split"]),
    st.none() | st.tuples(st.integers(0, 1 << 31), st.integers(1, 1 << 31)),
)
def test_filters(
    made: tuple[Abi, list[tuple[bool, Block]]],
    order: int | None,
    kind: str | None,
    span: tuple[int, int] | None,
) -> None:
    abi, steps = made
    memory, model = built(abi, steps)
    phys = None if span is None else (span[0], span[0] + span[1])
    chunks = BlockFilter(order, kind, phys).apply(memory.walk().blocks(abi), abi.page_shift)
    found = listed(chunks)
    assert len(found) == len(set(found))

    def wanted(block: Block) -> bool:
        at, of_order, of_type = block
        end = at + (abi.page_size << of_order)
        return (
            order in (None, of_order)
            and (kind is None or of_type == {"contig": 0, "split": 1}[kind])
            and (phys is None or (at < phys[1] and end > phys[0]))
        )

    assert set(found) == set(filter(wanted, model))


@pytest.mark.parametrize("abi", [PLAIN, FIXED])
@pytest.mark.parametrize("chunk", [1, 1000, CHUNK_BLOCKS])
def test_full_leaves_come_in_chunks(abi: Abi, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(khoscope.facts.tree, "CHUNK_BLOCKS", chunk)
    memory = Memory(abi)
    # Order 0: a full leaf, then a leaf with 3 blocks, a full one and an empty one; and order 1.
    span = abi.leaf_bits * abi.page_size
    for i in (0, 2):
        memory.pages[memory.leaf_of(abi.kho_radix_encode_key(i * span, 0))][:] = b"\xff" * 4096
    model = {(i * span + page * 4096, 0) for i in (0, 2) for page in range(abi.leaf_bits)}
    for page in (0, 5, abi.leaf_bits - 1):
        memory.add_page(span + page * 4096, 0)
        model.add((span + page * 4096, 0))
    memory.leaf_of(abi.kho_radix_encode_key(3 * span, 0))
    memory.add_page(0x6000, 1)
    model.add((0x6000, 1))
    tree = memory.walk()
    chunks = list(tree.blocks(abi))
    assert all(0 < len(part) <= chunk + abi.leaf_bits for part in chunks)
    found = [(phys, order) for phys, order, _ in listed(chunks)]
    assert len(found) == len(model)
    assert set(found) == model
    kind = NO_TYPE if abi is PLAIN else KHO_PAGE_CONTIG
    assert tree.totals(abi) == {(0, kind): 2 * abi.leaf_bits + 3, (1, kind): 1}


def test_end_of_blocks() -> None:
    top = 2**64 - 1
    for abi in ABIS:
        limit = abi.order_0_log2
        keys = [
            abi.kho_radix_encode_key(phys, order)
            for phys, order in ((0, 0), (2**64 - abi.page_size, 0), (0, limit), (0, limit - 1))
        ]
        columns = abi.kho_radix_decode_keys(np.array([*keys, 0], np.uint64))
        ends = Blocks(np.array([*keys, 0], np.uint64), *columns).end(abi.page_shift)
        assert ends.tolist() == [abi.page_size, top, top, 2**63, 0]


def test_no_tree() -> None:
    memory = Memory(PLAIN)
    tree = walk(PLAIN, 0, memory.ram, memory.read)
    assert (tree.state.root, blocks_of(PLAIN, tree), list(tree.nodes)) == (0, set(), [])
    assert memory.reads == 0


# Trees that were written over


def plain_walk(memory: Memory, ram: list[tuple[int, int]]) -> tuple[list[Block], list[int], int]:
    """
    The walk as one would write it down: node by node, level by level.

    :return: blocks, nodes, and the number of entries that lead nowhere.
    """
    abi = memory.abi
    size = abi.page_size
    seen: set[int] = set()
    problems = 0

    def sound(at: int) -> bool:
        nonlocal problems
        inside = any(first <= at and at + size <= end for first, end in ram)
        good = at % size == 0 and inside and at not in seen and len(seen) < budget(abi, ram)
        if good:
            seen.add(at)
        else:
            problems += 1
        return good

    def content(at: int) -> bytes:
        nonlocal problems
        data = memory.read(at, size)
        if data is None:
            problems += 1
            return bytes(size)
        nodes.append(at)
        return data

    nodes: list[int] = []
    here = [(memory.root, 0)] if sound(memory.root) else []
    for level in range(abi.tree_max_depth - 1, 0, -1):
        below = []
        for at, key in here:
            data = content(at)
            if not any(data):
                continue
            for index, entry in enumerate(struct.unpack(f"<{size // 8}Q", data)):
                if entry:
                    below.append((entry, key | index << abi.table_shift(level)))
        here = [(entry, key) for entry, key in below if sound(entry)]
    # Keys without an order are blocks that nothing tells apart: each counts.
    found = []
    for at, key in here:
        for index, byte in enumerate(content(at)):
            for bit in range(8) if byte else ():
                if byte >> bit & 1:
                    found.append(abi.kho_radix_decode_key(key | 8 * index + bit))
    return found, nodes, problems


def budget(abi: Abi, ram: list[tuple[int, int]]) -> int:
    """More nodes than a tree over this RAM can have: types, orders, a path for each leaf."""
    pages = ram[-1][1] // abi.page_size
    leaves = sum(pages // (abi.leaf_bits << order) + 1 for order in range(abi.order_0_log2 + 1))
    limit = walk_module._Walk(abi, 0, np.array(ram, np.uint64), lambda a, s: None)._budget()
    assert limit >= 2 * leaves * abi.tree_max_depth
    return limit


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Memory, list[tuple[int, int]]]:
    """A tree of which some pages were written over, and RAM that may have a hole."""
    abi, steps = draw(changes())
    memory, _ = built(abi, steps)
    size = abi.page_size
    entries = abi.table_entries
    nodes = sorted(memory.pages)
    anywhere = st.one_of(
        st.sampled_from(nodes),  # a cycle, a sibling, another level's node
        st.integers(0, 2**64 - 1),
        st.integers(0, memory.size // size - 1).map(lambda page: page * size),
        st.integers(memory.size // size, 2**64 // size - 1).map(lambda page: page * size),
        st.sampled_from(nodes).map(lambda node: node + 8),
    )
    for _ in range(draw(st.integers(1, 4))):
        node = draw(st.sampled_from(nodes))
        match draw(st.sampled_from(["entries", "garbage", "pointers", "unreadable"])):
            case "entries":
                for _ in range(draw(st.integers(1, 4))):
                    memory.set_entry(node, draw(st.integers(0, entries - 1)), draw(anywhere))
            case "garbage":
                at = draw(st.integers(0, size - 64))
                memory.pages[node][at : at + 64] = draw(st.binary(min_size=64, max_size=64))
            case "pointers":
                # Every entry leads to a page that may be read: they must not all be followed.
                first = draw(st.integers(0, memory.size // size - entries)) * size
                memory.pages[node][:] = np.arange(
                    first, first + entries * size, size, dtype=np.uint64
                ).tobytes()
            case "unreadable":
                memory.unreadable.add(node)
    hole = draw(st.none() | st.sampled_from(nodes))
    if hole is None:
        return memory, [(0, memory.size)]
    return memory, [(0, hole), (hole + size, memory.size)]


@given(damaged())
def test_damaged_trees(made: tuple[Memory, list[tuple[int, int]]]) -> None:
    memory, ram = made
    abi = memory.abi
    memory.reads = 0
    tree = walk(abi, memory.root, np.array(ram, np.uint64), memory.read)
    reads = memory.reads
    blocks, nodes, problems = plain_walk(memory, ram)
    assert [phys for chunk in tree.nodes for phys in chunk.phys.tolist()] == nodes
    assert tree.state.problem_count == problems
    assert len(tree.state.problems) == min(problems, PROBLEMS_KEPT)
    assert reads <= 2 * budget(abi, ram)
    assert blocks_of(abi, tree) == {*blocks}
    assert tree.totals(abi) == Counter((order, kind) for _, order, kind in blocks)


@pytest.mark.parametrize("abi", ABIS)
def test_hall_of_mirrors_ends(abi: Abi) -> None:
    """Memory all of which looks like nodes that are full of good pointers."""
    size, end = abi.page_size, 1 << 34
    rng = np.random.default_rng(1)
    reads = 0

    def read(at: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        pages = rng.integers(0, end // size, length // 8, dtype=np.uint64)
        return (pages * np.uint64(size)).tobytes()

    ram = [(0, end)]
    tree = walk(abi, size, np.array(ram, np.uint64), read)
    limit = budget(abi, ram)
    assert sum(len(chunk) for chunk in tree.nodes) == limit
    assert reads <= limit
    assert tree.state.problem_count > PROBLEMS_KEPT == len(tree.state.problems)


def two_leaves() -> tuple[Memory, int, int, int]:
    """Order-0 blocks at 0 and 1 GiB; the level 1 table above their leaves, and its two indices."""
    memory = Memory(PLAIN)
    memory.add_page(0, 0)
    memory.add_page(1 << 30, 0)
    first = memory.leaf_of(PLAIN.kho_radix_encode_key(0, 0))
    tables = [t for t in memory.pages if any(memory.entry(t, i) == first for i in range(512))]
    assert len(tables) == 1
    first_index, second_index = (i for i in range(512) if memory.entry(tables[0], i))
    return memory, tables[0], first_index, second_index


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("root", "leads to a node reached before"),
        ("table", "leads to a node reached before"),
        ("sibling", "leads to a node reached before"),
        (0x10000008, "not aligned to a page"),
        (1, "not aligned to a page"),
        (1 << 32, "not in RAM"),
        ((1 << 64) - 4096, "not in RAM"),
        (1 << 63, "not in RAM"),
    ],
)
def test_bad_entry_is_told_and_the_rest_is_read(entry: int | str, why: str) -> None:
    memory, table, first, second = two_leaves()
    named = {"root": memory.root, "table": table, "sibling": memory.entry(table, first)}
    value = named[entry] if isinstance(entry, str) else entry
    memory.set_entry(table, second, value)
    tree = memory.walk()
    assert blocks_of(PLAIN, tree) == {(0, 0, NO_TYPE)}
    assert tree.state.problems == [NodeProblem(1, table, second, value, why)]
    assert tree.state.problem_count == 1


@pytest.mark.parametrize("root", [12, 1 << 32, (1 << 28) + 4])
def test_bad_root(root: int) -> None:
    memory = Memory(PLAIN)
    tree = walk(PLAIN, root, memory.ram, memory.read)
    assert blocks_of(PLAIN, tree) == set()
    assert tree.state.problem_count == 1
    assert tree.state.problems[0].entry == root
    assert memory.reads == 0


def test_unreadable_leaf_between_readable_ones() -> None:
    memory = Memory(PLAIN)
    span = PLAIN.leaf_bits * PLAIN.page_size
    for i in range(3):
        memory.add_page(i * span, 0)
    leaf = memory.leaf_of(PLAIN.kho_radix_encode_key(span, 0))
    memory.unreadable.add(leaf)
    tree = memory.walk()
    assert blocks_of(PLAIN, tree) == {(0, 0, NO_TYPE), (2 * span, 0, NO_TYPE)}
    assert tree.state.problems == [NodeProblem(0, leaf, 0, leaf, "node cannot be read")]


def test_no_ram_at_all() -> None:
    memory = Memory(PLAIN)
    memory.add_page(0, 0)
    tree = walk(PLAIN, memory.root, np.zeros((0, 2), np.uint64), memory.read)
    assert (tree.state.problem_count, memory.reads) == (1, 0)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=4),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=20),
)
def test_in_ranges(gaps: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    ranges, at = [], 0
    for gap, length in gaps:
        # Sorted, disjoint and not touching, as RAM is.
        ranges.append((at + gap + 1, at + gap + 1 + length))
        at = ranges[-1][1]
    first, end = (np.array([span[i] for span in spans], np.uint64) for i in (0, 1))
    found = in_ranges(np.array(ranges, np.uint64).reshape(-1, 2), first, end)
    assert found.tolist() == [
        first < end and any(low <= first and end <= high for low, high in ranges)
        for first, end in spans
    ]


# Trees that move while they are read


def settled(walk_once: Callable[[], Tree]) -> tuple[list[set[Block]], Tree]:
    """What each use of a settling tree saw, the last one's being the result; and the tree."""
    used: list[set[Block]] = []

    def use(tree: Tree) -> int:
        used.append(blocks_of(FIXED, tree))
        return len(used)

    last, tree = settle(walk_once, use)
    assert last == len(used)
    return used, tree


fixed_blocks = st.sets(
    st.tuples(
        st.integers(0, 40).map(lambda n: n << 26),
        st.sampled_from([0, 1, 9]),
        st.sampled_from([0, 1]),
    ),
    max_size=6,
)


def holding(blocks: set[Block]) -> Memory:
    memory = Memory(FIXED)
    for block in sorted(blocks):
        memory.add_page(*block)
    return memory


@given(st.lists(fixed_blocks, min_size=READS + 1, max_size=READS + 1))
def test_settle_against_a_model(states: list[set[Block]]) -> None:
    """The tree holds one set of blocks at each read."""
    memories = iter([holding(blocks) for blocks in states])
    used, tree = settled(lambda: next(memories).walk())
    for at in range(READS):
        was, now = states[at : at + 2]
        if was == now:
            break
    assert tree.state.reads == at + 2
    assert used == states[: at + 1]
    assert tree.state.moved == len(was ^ now)
    assert blocks_of(FIXED, tree) == was & now


def test_settle_waits_for_a_tree_that_comes_to_rest() -> None:
    memory = Memory(FIXED)
    memory.add_page(0, 0)
    late = [(0x2000, 0, 1)]

    def walk_once() -> Tree:
        tree = memory.walk()
        if late:
            memory.add_page(*late.pop())
        return tree

    used, tree = settled(walk_once)
    assert used == [{(0, 0, 0)}, {(0, 0, 0), (0x2000, 0, 1)}]
    assert (tree.state.reads, tree.state.moved) == (3, 0)
    assert blocks_of(FIXED, tree) == used[-1]


def test_settle_of_a_tree_that_never_rests() -> None:
    memory = Memory(FIXED)
    memory.add_page(0, 0)
    pages = iter(range(1, 100))

    def walk_once() -> Tree:
        memory.add_page(next(pages) << 12, 0)
        return memory.walk()

    used, tree = settled(walk_once)
    assert tree.state.reads == READS + 1 == len(used) + 1
    assert tree.state.moved == 1
    assert blocks_of(FIXED, tree) == used[-1]


@given(fixed_blocks, fixed_blocks, st.integers(1, 6))
def test_tree_that_moves_between_reads_of_its_nodes(
    resting: set[Block], moving: set[Block], every: int
) -> None:
    """Blocks come and go in the middle of each walk."""
    moving -= resting
    memory = holding(resting)
    inside = False

    def read(at: int, size: int) -> bytes | None:
        nonlocal inside
        if memory.reads % every == 0:
            inside = not inside
            for block in moving:
                key = FIXED.kho_radix_encode_key(*block)
                (memory.add_key if inside else memory.del_key)(key)
        return memory.read(at, size)

    _, tree = settled(lambda: walk(FIXED, memory.root, memory.ram, read))
    assert resting <= blocks_of(FIXED, tree) <= resting | moving
    assert tree.state.problem_count == 0
    assert tree.state.reads <= READS + 1


def test_settle_keeps_a_problem_that_only_one_read_saw() -> None:
    memory, table, _, second = two_leaves()
    good = memory.entry(table, second)
    memory.del_key(PLAIN.kho_radix_encode_key(1 << 30, 0))
    walks = 0

    def walk_once() -> Tree:
        nonlocal walks
        walks += 1
        # Written over in every second read; the blocks are the same each time.
        memory.set_entry(table, second, good if walks % 2 else 12)
        return memory.walk()

    _, tree = settle(walk_once, lambda _: None)
    assert tree.state.reads == READS + 1
    assert tree.state.problem_count == 1
    assert len(tree.state.problems) == 1


def test_types_as_posted_do_not_come_back() -> None:
    memory = Memory(POSTED)
    memory.add_page(0x1000, 0, 1)
    memory.add_page(0x1000, 0, 0)
    assert blocks_of(POSTED, memory.walk()) == {(0x1000, 0, KHO_PAGE_CONTIG)}


# Pieces of memory


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3 * NEAR)), max_size=12),
    st.sets(st.integers(0, 80), max_size=4),
)
def test_pieces_that_lie_near_each_other(pieces: list[tuple[int, int]], missing: set[int]) -> None:
    """In any order; each is there, unless some of itself is missing."""
    memory = np.arange(1 << 17, dtype=np.uint32).tobytes()
    step = 1 << 13

    def read(at: int, size: int) -> bytes | None:
        assert size <= READ_SIZE
        there = missing.isdisjoint(range(at // step, (at + size - 1) // step + 1))
        return memory[at : at + size] if there else None

    phys, size = [step * at for at, _ in pieces], [size for _, size in pieces]
    assert read_near(read, phys, size) == [
        read(at, count) for at, count in zip(phys, size, strict=True)
    ]


def test_pieces_are_read_together() -> None:
    reads: list[tuple[int, int]] = []

    def read(at: int, size: int) -> bytes:
        reads.append((at, size))
        return bytes(size)

    far = 3 * NEAR
    read_near(read, [far + 64, 0, far, 2 * READ_SIZE, NEAR], [64, 8, 64, 8, 8])
    assert reads == [(0, NEAR + 8), (far, 128), (2 * READ_SIZE, 8)]
    reads.clear()
    # One read has a limit.
    read_near(read, list(range(0, 3 * READ_SIZE, 4096)), [4096] * (3 * READ_SIZE // 4096))
    assert reads == [(at, READ_SIZE) for at in range(0, 3 * READ_SIZE, READ_SIZE)]


@given(
    st.lists(st.integers(0, 1 << 18), max_size=40),
    st.integers(1, 600),
    st.sets(st.integers(0, 80), max_size=4),
)
def test_rows_are_what_single_reads_give(at: list[int], size: int, missing: set[int]) -> None:
    """In any order, several times, across each other; each is there, unless some of it is not."""
    memory = np.arange(1 << 17, dtype=np.uint32).tobytes()
    step = 1 << 13

    def read(at: int, size: int) -> bytes | None:
        there = missing.isdisjoint(range(at // step, (at + size - 1) // step + 1))
        return memory[at : at + size] if there else None

    rows, there = read_rows(read, np.array(at, np.uint64), size)
    assert rows.shape == (len(at), size)
    single = [read(each, size) for each in at]
    assert there.tolist() == [each is not None for each in single]
    assert [row.tobytes() for row in rows] == [each or bytes(size) for each in single]


def test_rows_are_read_together() -> None:
    reads: list[tuple[int, int]] = []

    def read(at: int, size: int) -> bytes:
        reads.append((at, size))
        return bytes(size)

    far = 3 * NEAR
    at = [far + 64, 0, far, 2 * READ_SIZE, NEAR, 2**64 - 64]
    read_rows(read, np.array(at, np.uint64), 8)
    assert sorted(reads) == [(0, NEAR + 8), (far, 72), (2 * READ_SIZE, 8), (2**64 - 64, 8)]
    reads.clear()
    # One read has a limit, but for what begins before it.
    read_rows(read, np.arange(0, 3 * READ_SIZE, 4096, dtype=np.uint64), 8192)
    assert sorted(reads) == [(at, READ_SIZE + 4096) for at in range(0, 3 * READ_SIZE, READ_SIZE)]
    reads.clear()
    read_rows(read, np.zeros(0, np.uint64), 8)
    assert reads == []
