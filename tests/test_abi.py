# SPDX-License-Identifier: LGPL-2.1-or-later
"""Geometry, keys and stamps, against the kernel's arithmetic written out in plain Python."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from khoscope.abi.keys import (
    BAD_ORDER,
    KHO_PAGE_CONTIG,
    KHO_PAGE_MAGIC,
    KHO_PAGE_SPLIT,
    NO_TYPE,
    Abi,
    Stamp,
)
from tests.synthetic import FIXED, PLAIN, POSTED

U64_MAX = 2**64 - 1
PAGE_SHIFTS = [12, 14, 16]

#: One kernel of each kind for each page size: no types, types as posted, types repaired.
ABIS = [
    abi
    for shift in PAGE_SHIFTS
    for abi in (
        Abi.for_page_shift(shift),
        Abi.for_page_shift(shift, type_shift=63),
        Abi.for_page_shift(shift, type_shift=64 - shift + 1),
    )
]
abis = st.sampled_from(ABIS)
u64 = st.integers(0, U64_MAX)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Abi, int, int, int]:
    """A kernel, and a block (phys, order, type) that it can have."""
    abi = draw(abis)
    order = draw(st.integers(0, abi.order_0_log2))
    index = draw(st.integers(0, (1 << abi.order_0_log2 - order) - 1))
    page_type = draw(st.sampled_from([KHO_PAGE_CONTIG, KHO_PAGE_SPLIT]))
    return abi, index << abi.page_shift + order, order, page_type


def kernel_encode(abi: Abi, phys: int, order: int, page_type: int) -> int:
    """``kho_radix_encode_key``: what the caller passes to the tree."""
    key = 1 << (64 - abi.page_shift - order)
    key |= phys >> (abi.page_shift + order)
    if abi.type_shift is not None:
        key |= page_type << abi.type_shift
    return key


def kernel_stores(abi: Abi, key: int) -> int:
    """The key that a walk gives back, put together from the indices that an add takes."""
    back = key % (1 << abi.bitmap_size_log2)
    for level in range(1, abi.tree_max_depth):
        shift = (level - 1) * abi.table_size_log2 + abi.bitmap_size_log2
        back |= (key >> shift) % (1 << abi.table_size_log2) << shift
    return back


def kernel_decode(abi: Abi, key: int) -> tuple[int, int, int]:
    """``kho_radix_decode_key``, with the checks that the kernel does not make."""
    page_type = NO_TYPE if abi.type_shift is None else KHO_PAGE_CONTIG
    # A type bit that the tree drops can be in no key that a walk gives.
    if abi.type_shift is not None and abi.type_shift < abi.stored_bits:
        page_type = key >> abi.type_shift & 1
        key &= ~(1 << abi.type_shift)
    fls = key.bit_length()
    order = 64 - abi.page_shift - (fls - 1)
    if fls == 0 or order < 0:
        return 0, BAD_ORDER, page_type
    return key << (abi.page_shift + order) & U64_MAX, order, page_type


@pytest.mark.parametrize(
    ("page_shift", "order_0", "table", "bitmap", "depth", "stored", "used"),
    [
        (12, 52, 9, 15, 6, 60, 53),
        (14, 50, 11, 17, 5, 61, 51),
        (16, 48, 13, 19, 4, 58, 49),
    ],
)
def test_geometry(
    page_shift: int, order_0: int, table: int, bitmap: int, depth: int, stored: int, used: int
) -> None:
    abi = Abi.for_page_shift(page_shift)
    assert abi.order_0_log2 == order_0
    assert abi.table_size_log2 == table
    assert abi.bitmap_size_log2 == bitmap
    assert abi.tree_max_depth == depth
    assert abi.stored_bits == stored
    assert abi.kho_radix_encode_key(0, 0).bit_length() == used
    # A node is a page: of u64 entries, or of bits.
    assert abi.page_size == 1 << page_shift
    assert abi.table_entries * 8 == abi.page_size
    assert abi.leaf_bits == abi.page_size * 8
    assert abi.table_shift(1) == bitmap
    assert abi.table_shift(depth - 1) + table == stored


@given(blocks())
@example((PLAIN, 0, 0, KHO_PAGE_CONTIG))
@example((PLAIN, 2**64 - 4096, 0, KHO_PAGE_CONTIG))
@example((PLAIN, 0, 52, KHO_PAGE_CONTIG))
@example((PLAIN, 1 << 63, 51, KHO_PAGE_CONTIG))
@example((FIXED, 0, 52, KHO_PAGE_SPLIT))
@example((FIXED, 0x1234000, 0, KHO_PAGE_SPLIT))
def test_round_trip(block: tuple[Abi, int, int, int]) -> None:
    abi, phys, order, page_type = block
    key = abi.kho_radix_encode_key(phys, order, page_type)
    assert key == kernel_stores(abi, kernel_encode(abi, phys, order, page_type))
    survives = {True: page_type, False: KHO_PAGE_CONTIG}[abi.type_is_stored]
    wanted = (phys, order, survives if abi.has_types else NO_TYPE)
    assert abi.kho_radix_decode_key(key) == wanted
    assert kernel_decode(abi, key) == wanted


@given(blocks())
def test_many_keys_are_encoded_like_one(block: tuple[Abi, int, int, int]) -> None:
    abi, phys, order, page_type = block
    keys = abi.kho_radix_encode_keys(np.array([phys, 0], np.uint64), order, page_type)
    assert keys.dtype == np.uint64
    assert keys.tolist() == [abi.kho_radix_encode_key(at, order, page_type) for at in (phys, 0)]


def decode_all(abi: Abi, keys: list[int]) -> list[tuple[int, int, int]]:
    phys, order, types = abi.kho_radix_decode_keys(np.array(keys, np.uint64))
    assert [str(column.dtype) for column in (phys, order, types)] == ["uint64", "uint8", "int8"]
    return list(zip(phys.tolist(), order.tolist(), types.tolist(), strict=True))


@given(abis, st.lists(u64, max_size=20))
@example(PLAIN, [0, U64_MAX, 2**53 - 1, 2**53, 2**53 + 1, 2**52, 1, 2])
@example(FIXED, [0, U64_MAX, 2**53, 2**53 + 1, 2**54, 2**54 - 1, 2**63])
@example(POSTED, [0, U64_MAX, 2**63, 2**63 + 1, 2**52 + 2**63])
def test_decoding_any_key_at_all(abi: Abi, keys: list[int]) -> None:
    wanted = [kernel_decode(abi, key) for key in keys]
    assert decode_all(abi, keys) == wanted
    assert decode_all(abi, sorted(keys)) == [kernel_decode(abi, key) for key in sorted(keys)]
    assert [abi.kho_radix_decode_key(key) for key in keys] == wanted


@pytest.mark.parametrize("abi", ABIS)
def test_decoding_each_power_of_two_and_its_neighbours(abi: Abi) -> None:
    # Where a float64, which holds 53 bits, would round to the next power of two.
    keys = [(1 << bit) + d & U64_MAX for bit in range(64) for d in (-1, 0, 1)]
    assert decode_all(abi, keys) == [kernel_decode(abi, key) for key in keys]


@pytest.mark.parametrize("page_shift", PAGE_SHIFTS)
def test_type_bit_is_stored_above_the_order_bits_and_not_at_63(page_shift: int) -> None:
    order_0 = 64 - page_shift
    plain = Abi.for_page_shift(page_shift)
    posted = Abi.for_page_shift(page_shift, type_shift=63)
    fixed = Abi.for_page_shift(page_shift, type_shift=order_0 + 1)

    assert (plain.has_types, plain.type_is_stored, plain.type_bit) == (False, False, 0)
    assert (posted.has_types, posted.type_is_stored, posted.type_bit) == (True, False, 0)
    assert (fixed.has_types, fixed.type_is_stored) == (True, True)
    assert fixed.type_bit == 1 << order_0 + 1

    at = 5 << page_shift
    key = plain.kho_radix_encode_key(at, 0)
    # As posted, both types end up under the key of a kernel without types, and read as contig.
    for page_type in (KHO_PAGE_CONTIG, KHO_PAGE_SPLIT):
        assert posted.kho_radix_encode_key(at, 0, page_type) == key
    assert posted.kho_radix_decode_key(key) == (at, 0, KHO_PAGE_CONTIG)
    assert fixed.kho_radix_encode_key(at, 0, KHO_PAGE_CONTIG) == key
    assert fixed.kho_radix_encode_key(at, 0, KHO_PAGE_SPLIT) == key | fixed.type_bit


@pytest.mark.parametrize("page_shift", PAGE_SHIFTS)
def test_trees_of_bare_keys_refuse_what_is_wider(page_shift: int) -> None:
    width = 64 - page_shift + 1
    for type_shift, key_width, refused in (
        (None, width, False),
        (63, None, False),
        (63, width, True),
        # Where the tree has room for it.
        (width, width, True),
        (width, width + 1, False),
    ):
        abi = Abi.for_page_shift(page_shift, type_shift=type_shift, key_width=key_width)
        assert abi.type_is_refused == refused
        assert abi.type_is_stored == (type_shift == width and not refused)


@pytest.mark.parametrize("page_shift", PAGE_SHIFTS)
def test_order_limit(page_shift: int) -> None:
    abi = Abi.for_page_shift(page_shift)
    assert abi.order_limit(0) == 0
    assert abi.order_limit(abi.page_size) == 0
    assert abi.order_limit(2 * abi.page_size - 1) == 0
    assert abi.order_limit(2 * abi.page_size) == 1
    assert abi.order_limit(abi.page_size << 20) == 20


#: The layouts of union kho_page_info: ``order, magic`` and ``order:31, type:1, magic:32``.
STAMPS = [Stamp(), Stamp(order_bits=31, type_shift=31)]


@given(st.sampled_from(STAMPS), st.integers(0, 2**31 - 1), st.sampled_from([0, 1]))
def test_stamp(stamp: Stamp, order: int, page_type: int) -> None:
    word = stamp.encode(order, page_type)
    assert word >> 32 == KHO_PAGE_MAGIC == int.from_bytes(b"KHOP")
    private = np.array([word], np.uint64)
    assert stamp.is_stamp(private).tolist() == [True]
    assert stamp.order(private).tolist() == [order]
    has_types = stamp.type_shift is not None
    assert stamp.type(private).tolist() == [page_type if has_types else NO_TYPE]
    assert word & 0xFFFFFFFF == order | (page_type << 31 if has_types else 0)


@given(st.sampled_from(STAMPS), u64)
@example(STAMPS[0], KHO_PAGE_MAGIC)
@example(STAMPS[0], KHO_PAGE_MAGIC << 32 | 0xFFFFFFFF)
def test_only_the_magic_makes_a_stamp(stamp: Stamp, word: int) -> None:
    found = stamp.is_stamp(np.array([word], np.uint64)).tolist()
    assert found == [word >> 32 == KHO_PAGE_MAGIC]


def test_what_was_decided_does_not_make_two_kernels_differ() -> None:
    assert dataclasses.replace(PLAIN, decided={"KHO_ORDER_0_LOG2": "computed"}) == PLAIN
    assert POSTED != FIXED
