# SPDX-License-Identifier: LGPL-2.1-or-later
"""
4, 16 and 64 KiB pages: trees of a model that owes nothing to khoscope.abi, read back.

The model takes a key apart bit by bit, after the table of radix tree constants in
``include/linux/kho/abi/kexec_handover.h``, and keeps its nodes as dicts and sets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope import checks
from khoscope.abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, NO_TYPE, Abi, Stamp
from khoscope.facts import store
from khoscope.sources.walk import walk
from khoscope.words.errors import KhoscopeError
from tests.synthetic import blocks_of, rich, snapshot

#: (phys, order, type)
Block = tuple[int, int, int]

RAM_END = 1 << 36
NODES_AT = 1 << 34


@dataclass(frozen=True)
class Size:
    """One page size as the kernel's enum kho_radix_consts has it, worked out by hand."""

    page_shift: int
    order_0: int
    table: int
    bitmap: int
    depth: int
    stored: int
    plain: int

    @property
    def fixed_type(self) -> int:
        return self.order_0 + 1


SIZES = [
    Size(12, 52, 9, 15, 6, 60, 53),
    Size(14, 50, 11, 17, 5, 61, 51),
    Size(16, 48, 13, 19, 4, 58, 49),
]
ids = [f"{1 << size.page_shift - 10}K" for size in SIZES]
each_size = pytest.mark.parametrize("size", SIZES, ids=ids)


def abi_of(size: Size, type_shift: int | None) -> Abi:
    """What khoscope makes of a kernel with these pages."""
    if type_shift is None:
        return Abi.for_page_shift(size.page_shift, compatible="kho-v4")
    compatible = "kho-v5" if type_shift == size.fixed_type else "kho-v4"
    known = {"type_shift": type_shift, "stamp": Stamp(31, 31), "compatible": compatible}
    return Abi.for_page_shift(size.page_shift, **known)


def key_bits(size: Size, block: Block, type_shift: int | None) -> list[int]:
    """The 64 bits of a block's key, lowest first, as kho_radix_encode_key() sets them."""
    phys, order, page_type = block
    bits = [0] * 64
    for i in range(size.page_shift + order, 64):
        bits[i - size.page_shift - order] = phys >> i & 1
    assert bits[size.order_0 - order] == 0, "no address reaches the order bit"
    bits[size.order_0 - order] = 1
    if type_shift is not None:
        bits[type_shift] = page_type
    return bits


def number(bits: list[int]) -> int:
    return sum(bit << i for i, bit in enumerate(bits))


@dataclass
class Node:
    """A page of the tree: entries by index, or (at level 0) the bits that are set."""

    entries: dict[int, Node] = field(default_factory=dict)
    bits: set[int] = field(default_factory=set)


@dataclass
class Model:
    """``struct kho_radix_tree``."""

    size: Size
    root: Node = field(default_factory=Node)

    def leaf(self, bits: list[int]) -> Node:
        """Down from the root: the highest digit first, of the bits that there are digits for."""
        digits = [
            number(bits[self.size.bitmap + i * self.size.table :][: self.size.table])
            for i in range(self.size.depth - 1)
        ]
        node = self.root
        for digit in reversed(digits):
            node = node.entries.setdefault(digit, Node())
        return node

    def add(self, bits: list[int]) -> None:
        self.leaf(bits).bits.add(number(bits[: self.size.bitmap]))

    def delete(self, bits: list[int]) -> None:
        self.leaf(bits).bits.discard(number(bits[: self.size.bitmap]))

    def walked(self) -> set[int]:
        """kho_radix_walk_tree(): each key put together again, digit by digit."""

        def below(node: Node, level: int, key: int) -> Iterator[int]:
            if level == 0:
                yield from (key * 2**self.size.bitmap + bit for bit in node.bits)
            for index, child in node.entries.items():
                yield from below(child, level - 1, key * 2**self.size.table + index)

        return set(below(self.root, self.size.depth - 1, 0))

    def memory(self) -> tuple[int, dict[int, bytes]]:
        """The root's address and the pages that the tree lies in, children before parents."""
        page = 1 << self.size.page_shift
        pages: dict[int, bytes] = {}

        def write(node: Node, level: int) -> int:
            raw = bytearray(page)
            for index, child in node.entries.items():
                struct.pack_into("<Q", raw, 8 * index, write(child, level - 1))
            for bit in node.bits:
                raw[bit // 8] |= 1 << bit % 8
            at = NODES_AT + len(pages) * page
            pages[at] = bytes(raw)
            return at

        return write(self.root, self.size.depth - 1), pages


def decoded(size: Size, key: int, type_shift: int | None) -> Block:
    """kho_radix_decode_key() of a key that a walk gave."""
    page_type = NO_TYPE
    if type_shift is not None:
        page_type, key = key >> type_shift & 1, key & ~(1 << type_shift)
    order = size.order_0 - max(i for i in range(64) if key >> i & 1)
    return key << size.page_shift + order & 2**64 - 1, order, page_type


def read_back(size: Size, model: Model, abi: Abi) -> tuple[set[Block], set[int], int]:
    """Blocks and keys that khoscope's walk finds in the model's memory, and nodes."""
    root, pages = model.memory()

    def read(at: int, length: int) -> bytes | None:
        parts = [pages.get(each) for each in range(at, at + length, 1 << size.page_shift)]
        return None if None in parts else b"".join(part for part in parts if part)

    tree = walk(abi, root, np.array([[0, RAM_END]], np.uint64), read)
    assert tree.state.problem_count == 0
    keys = {int(key) for chunk in tree.blocks(abi) for key in chunk.key}
    nodes = sorted(int(phys) for chunk in tree.nodes for phys in chunk.phys)
    assert nodes == sorted(pages)
    return blocks_of(abi, tree), keys, len(nodes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Size, int | None, list[tuple[bool, Block]]]:
    """A kernel, and blocks that are preserved (True) and unpreserved."""
    size = draw(st.sampled_from(SIZES))
    type_shift = draw(st.sampled_from([None, 63, size.fixed_type]))

    def block() -> Block:
        order = draw(st.integers(0, 13) | st.integers(0, size.order_0))
        span = draw(st.sampled_from([32, 44, 64]))
        index = draw(st.integers(0, (1 << max(span - size.page_shift - order, 0)) - 1))
        return index << size.page_shift + order, order, draw(st.sampled_from([0, 1]))

    pool = [block() for _ in range(draw(st.integers(1, 6)))]
    steps = st.tuples(st.booleans() | st.just(True), st.sampled_from(pool))
    return size, type_shift, draw(st.lists(steps, max_size=12))


@given(cases())
def test_trees_of_the_model(case: tuple[Size, int | None, list[tuple[bool, Block]]]) -> None:
    size, type_shift, steps = case
    model = Model(size)
    for preserve, block in steps:
        bits = key_bits(size, block, type_shift)
        (model.add if preserve else model.delete)(bits)
    abi = abi_of(size, type_shift)
    blocks, keys, _ = read_back(size, model, abi)
    assert keys == model.walked()
    assert blocks == {decoded(size, key, type_shift) for key in model.walked()}


@each_size
def test_what_survives_the_tree(size: Size) -> None:
    """Each of the 64 key bits alone, put in and looked for: the table's last three columns."""
    survives = []
    for bit in range(64):
        model = Model(size)
        model.add([int(i in (0, bit)) for i in range(64)])
        (back,) = model.walked()
        assert back in (1, 1 << bit | 1)
        survives.append(bit == 0 or back != 1)
    assert survives == [bit < size.stored for bit in range(64)]
    abi = abi_of(size, None)
    assert abi.stored_bits == size.stored
    assert abi.page_size == 1 << size.page_shift
    highest = key_bits(size, (0, 0, 0), None)
    assert number(highest).bit_length() == size.plain == abi.order_0_log2 + 1


@each_size
@pytest.mark.parametrize("order", [0, 1, 5, 13])
def test_types_come_back_where_the_tree_stores_them(size: Size, order: int) -> None:
    at = 3 << 30
    for page_type in (KHO_PAGE_CONTIG, KHO_PAGE_SPLIT):
        for type_shift, survives in ((63, False), (size.fixed_type, True)):
            model = Model(size)
            model.add(key_bits(size, (at, order, page_type), type_shift))
            blocks, keys, nodes = read_back(size, model, abi_of(size, type_shift))
            assert blocks == {(at, order, page_type if survives else KHO_PAGE_CONTIG)}
            assert nodes == size.depth
            whole = number(key_bits(size, (at, order, page_type), type_shift))
            assert (keys == {whole}) == (survives or page_type == KHO_PAGE_CONTIG)


@each_size
def test_type_not_stored_at_every_bit(size: Size) -> None:
    """The rule fires at the bits that the model's tree drops, and at no other."""
    for bit in range(size.fixed_type, 64):
        model = Model(size)
        model.add(key_bits(size, (0, 0, KHO_PAGE_SPLIT), bit))
        (key,) = model.walked()
        abi = replace(abi_of(size, size.fixed_type), type_shift=bit)
        report = checks.check(snapshot(abi, []))
        found = [f.message for f in report.findings if f.rule == "type-not-stored"]
        wanted = f"the page type is key bit {bit}, the tree stores bits {size.stored - 1}:0"
        dropped = not key >> bit & 1
        assert found == ([f"{wanted}: no type survives"] if dropped else [])
        assert dropped == (bit >= size.stored)
    assert not checks.check(snapshot(abi_of(size, None), [])).counts


def early(size: Size) -> Size:
    """
    The same in the first kernels that had trees: as many levels as all bits below the order bit of
    order 0 need, but not that bit.
    """
    levels, digits = 1, size.bitmap
    while digits < size.order_0:
        levels, digits = levels + 1, digits + size.table
    return replace(size, depth=levels, stored=digits)


def test_levels_of_early_kernels() -> None:
    """Only 16 KiB pages had one too few."""
    assert [early(size).depth for size in SIZES] == [6, 4, 4]
    assert [early(size).stored for size in SIZES] == [60, 50, 58]


@each_size
@given(st.sets(st.integers(0, (1 << 20) - 1), min_size=1, max_size=20), st.integers(1, 11))
def test_order_0_in_early_kernels(size: Size, pages: set[int], order: int) -> None:
    """The blocks are those that the model's walk gives; a single page comes back as it went in
    where there is a level for its order bit."""
    size = early(size)
    model = Model(size)
    larger = (1 << 34, order, NO_TYPE)
    model.add(key_bits(size, larger, None))
    single = {(page << size.page_shift, 0, NO_TYPE) for page in pages}
    for block in single:
        model.add(key_bits(size, block, None))
    abi = replace(abi_of(size, None), compatible="kho-v2", tree_max_depth=size.depth)
    blocks, keys, _ = read_back(size, model, abi)
    assert keys == model.walked()
    assert keys == {abi.kho_radix_encode_key(phys, at) for phys, at, _ in {larger, *single}}
    walked = {decoded(size, key, None) for key in keys if key}
    assert {block for block in blocks if block[1] != BAD_ORDER} == walked
    assert larger in blocks
    report = checks.check(snapshot(abi, []))
    assert report.incomplete == []
    found = [f.message for f in report.findings if f.rule == "order-not-stored"]
    if size.stored > size.order_0:
        assert found == []
        assert blocks == {larger, *single}
        return
    assert (len(found), size.page_shift) == (1, 14)
    assert not blocks & single
    # Of a number of a page, the highest bit is taken for the order.
    for block in walked - {larger}:
        assert block[1] >= 50 - 19


@each_size
@pytest.mark.parametrize("kind", ["none", "posted", "fixed"])
def test_stamps_and_snapshot_files(size: Size, kind: str, tmp_path: Path) -> None:
    """What a file of such a kernel gives back: the tree, each block, each stamp."""
    abi = abi_of(size, {"none": None, "posted": 63, "fixed": size.fixed_type}[kind])
    facts = rich(abi)
    store.save_file(facts, tmp_path / "a.khosnap")
    loaded = store.load_file(tmp_path / "a.khosnap")
    assert loaded.abi == abi
    tree = loaded.outgoing.tree
    assert blocks_of(abi, tree) == blocks_of(abi, facts.outgoing.tree)
    assert {leaf.bitmap.shape[1] for leaf in tree.leaves} == {1 << size.page_shift}
    assert {entry.index for entry in tree.state.problems} == {511}
    stamps: list[tuple[int, int, int]] = []
    for chunk in loaded.stamps:
        assert chunk.pages is not None
        columns = (chunk.phys, chunk.pages.private, chunk.order)
        stamps += zip(*(column.tolist() for column in columns), strict=True)
    # struct { order; magic; }: the order in the low half, "KHOP" in the high.
    assert [word for _, word, _ in stamps] == [0x4B484F50 << 32 | order for *_, order in stamps]
    assert [phys % (1 << size.page_shift) for phys, *_ in stamps] == [0, 0, 0]
    assert BAD_ORDER not in {order for *_, order in stamps}


@pytest.mark.parametrize("mine", SIZES, ids=ids)
@pytest.mark.parametrize("theirs", SIZES, ids=ids)
def test_only_snapshots_of_one_page_size_are_compared(mine: Size, theirs: Size) -> None:
    before, after_abi = snapshot(abi_of(mine, None), []), abi_of(theirs, None)
    after = snapshot(after_abi, [], watched=(before, []))
    if mine is theirs:
        assert checks.compare(before, after).blocks == 0
        return
    with pytest.raises(KhoscopeError, match=f"pages of {1 << mine.page_shift} and "):
        checks.compare(before, after)
