# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tracker before the radix tree: against a plain model, and as no kernel makes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.keys import NO_TYPE, Abi
from khoscope.facts.columns import Leaves
from khoscope.facts.tree import Tree
from tests.synthetic import PLAIN, Memory, blocks_of
from tests.track_memory import DIRECT_MAP, LAYOUT, SMALL, XARRAY, TrackMemory

ABIS = [XARRAY, SMALL]

#: Whether it is preserved or unpreserved, its number at its order, the order.
Step = tuple[bool, int, int]


@st.composite
def some_steps(draw: st.DrawFn) -> list[Step]:
    """Preserving and unpreserving blocks of the first 4 GiB, in turn."""
    order = st.integers(0, 19)
    pool = draw(
        st.lists(
            order.flatmap(lambda n: st.tuples(st.integers(0, (1 << 20 >> n) - 1), st.just(n))),
            min_size=1,
            max_size=12,
        )
    )
    steps = draw(st.lists(st.tuples(st.booleans(), st.sampled_from(pool)), max_size=30))
    return [(preserved, *block) for preserved, block in steps]


def built(abi: Abi, steps: list[Step]) -> tuple[TrackMemory, set[tuple[int, int, int]]]:
    """Memory after some steps, and what is preserved then."""
    memory = TrackMemory(abi)
    model: set[tuple[int, int, int]] = set()
    for preserved, number, order in steps:
        phys = number * abi.page_size << order
        memory.preserve(phys, order, preserved)
        (model.add if preserved else model.discard)((phys, order, NO_TYPE))
    return memory, model


@pytest.mark.parametrize("abi", ABIS)
@given(steps=some_steps())
def test_a_track_is_what_was_preserved(abi: Abi, steps: list[Step]) -> None:
    memory, model = built(abi, steps)
    memory.finalize()
    for tree in (memory.walk(), memory.walk_chunks()):
        assert blocks_of(abi, tree) == model
        assert not tree.state.problem_count
        used = sum(int(nodes.used[nodes.level == 0].sum()) for nodes in tree.nodes)
        assert used == len(model)


@pytest.mark.parametrize("abi", ABIS)
@given(steps=some_steps())
def test_its_leaves_are_those_of_a_radix_tree(abi: Abi, steps: list[Step]) -> None:
    memory, model = built(abi, steps)
    radix = Memory(PLAIN)
    for phys, order, _ in model:
        radix.add_page(phys, order)
    found, wanted = (Leaves.concatenate(m.walk().leaves) for m in (memory, radix))
    assert len(found) == len(wanted)
    if len(wanted):
        assert (found.key == wanted.key).all()
        assert (found.bitmap == wanted.bitmap).all()


def test_nothing_was_ever_preserved() -> None:
    memory = TrackMemory(XARRAY)
    memory.finalize()
    assert not list(memory.walk().leaves)
    assert memory.walk_chunks().state.root == 0


def test_more_bitmaps_than_a_chunk_has_room_for() -> None:
    memory = TrackMemory(SMALL)
    model = {(i << 24, 0, NO_TYPE) for i in range(250)}
    for phys, order, _ in model:
        memory.preserve(phys, order)
    memory.finalize()
    tree = memory.walk_chunks()
    assert blocks_of(SMALL, tree) == model == blocks_of(SMALL, memory.walk())
    assert [nodes.level.tolist().count(1) for nodes in tree.nodes] == [1, 0]


def node_of(memory: TrackMemory, order: int) -> int:
    """The xa_node below the struct kho_mem_phys of an order."""
    return memory.word(memory.track(order) + LAYOUT.head) - 2 - DIRECT_MAP


def leads_to(slot: int, value: int) -> Callable[[TrackMemory], None]:
    return lambda memory: memory.set_word(node_of(memory, 0) + LAYOUT.slots + 8 * slot, value)


def own_child(memory: TrackMemory) -> None:
    node = node_of(memory, 0)
    leads_to(2, node + DIRECT_MAP + 2)(memory)


def high_shift(memory: TrackMemory) -> None:
    memory.pages[node_of(memory, 0) & -4096][node_of(memory, 0) % 4096 + LAYOUT.shift] = 61


def loop(memory: TrackMemory) -> None:
    """A node of a node leads to the upper one again."""
    node = node_of(memory, 0)
    memory.pages[node & -4096][node % 4096 + LAYOUT.shift] = 6
    leads_to(3, node + DIRECT_MAP + 2)(memory)


def first_bitmap(memory: TrackMemory) -> int:
    return memory.bitmaps[0, 0] + DIRECT_MAP


HOSTILE: dict[str, tuple[Callable[[TrackMemory], None], str]] = {
    "value": (leads_to(5, 0x1234_5671), "not a pointer"),
    "retry": (leads_to(5, 1026), "not a pointer"),
    "outside RAM": (leads_to(5, DIRECT_MAP + (1 << 40)), "not in RAM"),
    "user space": (leads_to(5, 0x1000), "not in RAM"),
    "odd": (leads_to(5, DIRECT_MAP + 0x1010), "not aligned to 4,096 bytes"),
    "twice": (lambda m: leads_to(5, first_bitmap(m))(m), "leads to a node reached before"),
    "node where a bitmap should be": (own_child, "a node below the last level"),
    "node that leads nowhere": (
        lambda m: m.set_word(m.track(0) + LAYOUT.head, DIRECT_MAP + (1 << 46) + 2),
        "not in RAM",
    ),
    "shift": (high_shift, "a node of shift 61 below 64"),
    "loop": (loop, "leads to a node reached before"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_track_that_no_kernel_makes(how: str) -> None:
    memory = TrackMemory(XARRAY)
    memory.preserve(0, 0)
    memory.preserve(1 << 28, 0)
    memory.preserve(1 << 21, 9)
    change, why = HOSTILE[how]
    change(memory)
    tree = memory.walk()
    assert why in {problem.why for problem in tree.state.problems}
    assert (1 << 21, 9, NO_TYPE) in blocks_of(XARRAY, tree)


def chunk_says(offset: int, value: int) -> Callable[[TrackMemory], None]:
    return lambda memory: memory.set_word(memory.first + offset, value)


HOSTILE_CHUNKS: dict[str, tuple[Callable[[TrackMemory], None], str]] = {
    "loop": (lambda m: m.set_word(m.word(m.first), m.first), "leads to a node reached before"),
    "itself": (lambda m: m.set_word(m.first, m.first), "leads to a node reached before"),
    "odd next": (chunk_says(0, 0x1008), "not aligned to 4,096 bytes"),
    "next outside RAM": (chunk_says(0, 1 << 44), "not in RAM"),
    "num_elms": (chunk_says(8, 4096 << 32), "num_elms, of 255 that fit into a chunk"),
    "order": (chunk_says(8, 2 << 32 | 60), "a bitmap of order 60"),
    "order of 32 bits": (chunk_says(8, 2 << 32 | 0xFFFF_FFFF), "a bitmap of order 4294967295"),
    "phys_start": (chunk_says(16, 0x1000), "phys_start, where no bitmap of its order begins"),
    "phys_start twice": (chunk_says(32, 0), "a second bitmap for the same memory"),
    "bitmap outside RAM": (chunk_says(24, 1 << 44), "not in RAM"),
    "bitmap twice": (
        lambda m: m.set_word(m.first + 40, m.word(m.first + 24)),
        "leads to a node reached before",
    ),
    "bitmap is a chunk": (
        lambda m: m.set_word(m.first + 40, m.first),
        "leads to a node reached before",
    ),
}


@pytest.mark.parametrize("how", HOSTILE_CHUNKS)
def test_a_chain_that_no_kernel_makes(how: str) -> None:
    memory = TrackMemory(XARRAY)
    for phys, order in ((0, 0), (1 << 28, 0), (1 << 21, 9)):
        memory.preserve(phys, order)
    memory.finalize()
    change, why = HOSTILE_CHUNKS[how]
    change(memory)
    assert why in {problem.why for problem in memory.walk_chunks().state.problems}


def hostile_chain(abi: Abi, spread: int) -> TrackMemory:
    """
    All RAM is chunks and the bitmaps that they lead to, in which every bit is set.

    :param spread: how many bitmaps apart the memory is that neighbours in a chunk stand for.
    """
    memory = TrackMemory(abi, size=1 << 24)
    size, per = abi.bitmap_bytes, 255
    chunks = (memory.size // size) // (per + abi.page_size // size)
    slots = np.arange(chunks * per, dtype=np.uint64)
    entries = np.zeros((len(slots), 2), np.uint64)
    entries[:, 0] = slots * np.uint64(spread << abi.page_shift + abi.bitmap_log2)
    entries[:, 1] = slots * np.uint64(size) + np.uint64(chunks * abi.page_size)
    for chunk in range(chunks):
        following = (chunk + 1) % chunks * abi.page_size
        header = following.to_bytes(8, "little") + bytes(4) + per.to_bytes(4, "little")
        rows = entries[chunk * per : (chunk + 1) * per].tobytes()
        memory.pages[chunk * abi.page_size] = bytearray(header + rows)
    for page in range(chunks * abi.page_size, memory.size, abi.page_size):
        memory.pages[page] = bytearray(b"\xff" * abi.page_size)
    # Address 0 is no chunk: begin with the second, and end where the first would be.
    memory.first = abi.page_size
    return memory


@pytest.mark.parametrize(("abi", "spread"), [(XARRAY, 1), (SMALL, 1), (SMALL, 8)])
def test_more_bitmaps_than_ram_could_need(abi: Abi, spread: int) -> None:
    """Reading them takes memory in proportion to what a kernel could preserve, not to all RAM."""
    memory = hostile_chain(abi, spread)
    tree = memory.walk_chunks()
    assert {problem.why for problem in tree.state.problems} == {
        "more nodes than this RAM could need"
    }
    bitmaps = sum(int((nodes.level == 0).sum()) for nodes in tree.nodes)
    pages = memory.size >> 12
    assert bitmaps <= 2 * (2 * (pages >> abi.bitmap_log2) + 53)
    assert sum(map(len, tree.leaves)) <= 2 * (2 * (pages >> abi.bitmap_size_log2) + 53)
    offered = sum(int(nodes.used[nodes.level == 1].sum()) for nodes in tree.nodes)
    assert tree.state.problem_count == offered - bitmaps


@pytest.mark.parametrize("abi", ABIS)
def test_as_many_bitmaps_as_ram_can_need(abi: Abi) -> None:
    """Bitmaps for all blocks that fit into RAM, at every order: none is refused."""
    memory = TrackMemory(abi, size=1 << 32, nodes_at=1 << 20)
    pages = memory.size >> 12
    blocks = {
        (number << order + 12, order, NO_TYPE)
        for order in range(pages.bit_length())
        for number in range(0, pages >> order, 1 << abi.bitmap_log2)
    }
    for phys, order, _ in blocks:
        memory.preserve(phys, order)
    memory.finalize()
    for tree in (memory.walk(), memory.walk_chunks()):
        assert not tree.state.problem_count
        assert blocks_of(abi, tree) == blocks


def test_what_cannot_be_read_is_a_problem() -> None:
    memory = TrackMemory(XARRAY)
    memory.preserve(0, 0)
    memory.preserve(1 << 28, 0)
    memory.finalize()
    memory.unreadable.add(memory.bitmaps[0, 2])
    for tree in (memory.walk(), memory.walk_chunks()):
        assert [p.why for p in tree.state.problems] == ["node cannot be read"]
        assert blocks_of(XARRAY, tree) == {(0, 0, NO_TYPE)}


@given(seed=st.integers(0, 2**32 - 1))
def test_walks_of_noise_end(seed: int) -> None:
    """Whatever memory holds: pages of noise, with pointers among it that lead back into it."""
    random = np.random.default_rng(seed)
    memory = TrackMemory(XARRAY, size=1 << 22, nodes_at=1 << 16)
    for page in range(0, 1 << 18, 4096):
        words = random.integers(0, 1 << 18, 512, np.uint64)
        words |= np.uint64(DIRECT_MAP) * random.integers(0, 2, 512, np.uint64)
        words &= ~np.uint64(3)
        words |= np.uint64(2) * random.integers(0, 2, 512, np.uint64)
        words[random.integers(0, 512, 300)] = 0
        memory.pages[page] = bytearray(words.tobytes())
    memory.head = DIRECT_MAP + int(random.integers(0, 1 << 15)) * 8 + 2
    memory.first = int(random.integers(0, 64)) * 4096
    for walk_it in (memory.walk, memory.walk_chunks):
        tree: Tree = walk_it()
        assert len(tree.state.problems) <= tree.state.problem_count
