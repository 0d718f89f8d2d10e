# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose memory is whose, and what is covered, against models that look at every page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.keys import Abi
from khoscope.facts.clients import Claims, Owner, OwnerKind
from khoscope.facts.owners import UNKNOWN, Owners, shared
from khoscope.facts.tree import KeySet
from tests.synthetic import FIXED, Block, Memory, columns, snapshot
from tests.test_walk import ABIS

#: (start, size, owner)
Claim = tuple[int, int, int]

NAMES = [Owner(OwnerKind.FILE, str(n)) for n in range(6)]


def columns_of(claims: list[Claim], chunks: int = 1) -> list[Claims]:
    return [
        Claims(
            np.array([start for start, _, _ in part], np.uint64),
            np.array([size for _, size, _ in part], np.uint64),
            np.array([owner for _, _, owner in part], np.uint32),
        )
        for part in (claims[n::chunks] for n in range(chunks))
    ]


def owners(claims: list[Claim], chunks: int = 1) -> Owners:
    return Owners(NAMES, columns_of(claims, chunks), 12)


def at(found: Owners, start: int, end: int) -> int:
    return int(found.at(np.array([start], np.uint64), np.array([end], np.uint64))[0])


places = st.integers(0, 40)
some_claims = st.lists(st.tuples(places, st.integers(0, 12), st.integers(0, 5)), max_size=12)


@given(some_claims, places, st.integers(1, 10), st.integers(1, 3))
def test_lookup(claims: list[Claim], start: int, size: int, chunks: int) -> None:
    end = start + size
    model = [
        claim for claim in claims if claim[1] and claim[0] < end and claim[0] + claim[1] > start
    ]
    found = at(owners(claims, chunks), start, end)
    assert found in {owner for _, _, owner in model} or (not model and found == UNKNOWN)


@given(some_claims, st.lists(st.tuples(places, st.integers(1, 9)), max_size=9))
def test_lookup_of_many(claims: list[Claim], spans: list[tuple[int, int]]) -> None:
    found = owners(claims)
    start = np.array([first for first, _ in spans], np.uint64)
    size = np.array([length for _, length in spans], np.uint64)
    assert found.at(start, start + size).tolist() == [
        at(found, first, first + length) for first, length in spans
    ]


def test_a_claim_within_another_is_not_lost() -> None:
    found = owners([(0, 1000, 0), (100, 10, 1), (200, 10, 2)])
    for start, owner in ((0, 0), (99, 0), (100, 1), (109, 1), (110, 0), (205, 2), (999, 0)):
        assert at(found, start, start + 1) == owner
    assert at(found, 1000, 1001) == UNKNOWN


def test_a_claim_beyond_all_memory() -> None:
    """Out of a corrupt structure, or out of a file."""
    found = owners([(0x1000, 2**64 - 1, 0), (0x2000, 0x1000, 1), (0x9000, 0, 2)])
    assert at(found, 0, 0x1000) == UNKNOWN
    assert at(found, 0x2000, 0x3000) == 1
    assert at(found, 0x9000, 0xA000) == 0
    assert at(found, 2**63, 2**64 - 1) == 0


def test_no_claims() -> None:
    assert at(owners([]), 0, 2**64 - 1) == UNKNOWN
    found = owners([(5, 5, 1)])
    assert len(found.at(np.zeros(0, np.uint64), np.zeros(0, np.uint64))) == 0


@pytest.mark.parametrize(("phys", "owner"), [(0, UNKNOWN), (0x20_0000, 1), (0x60_0000, UNKNOWN)])
def test_owner_of_a_block(phys: int, owner: int) -> None:
    """Any of its pages will do."""
    blocks = columns(FIXED, [Block(phys, 9)])
    found = owners([(0x3F_F000, 1, 1), (0x40_0000, 0x1000, 2)])
    assert found.of(blocks).tolist() == [owner]
    side = replace(
        snapshot(FIXED, []).outgoing,
        owners=NAMES,
        claims=[
            Claims(
                np.array([0x3F_F000], np.uint64),
                np.array([1], np.uint64),
                np.array([1], np.uint32),
            )
        ],
    )
    assert Owners.of_side(side, 12).of(blocks).tolist() == [owner]


# What two owners claim


@given(some_claims, st.integers(1, 3))
def test_shared(claims: list[Claim], chunks: int) -> None:
    """Pages that two owners claim, page by page; here an owner may be listed twice."""
    listed = [NAMES[owner % 4] for owner in range(6)]
    rows = columns_of([(start << 12, size << 12, owner) for start, size, owner in claims], chunks)
    side = replace(snapshot(FIXED, []).outgoing, owners=listed, claims=rows)
    found = shared(side, 12)
    whose: dict[int, set[Owner]] = {}
    for start, size, owner in claims:
        for page in range(start, start + size):
            whose.setdefault(page, set()).add(listed[owner])
    twice = {page: owners for page, owners in whose.items() if len(owners) > 1}
    # All that is claimed twice is reported, and nothing else.
    assert bool(found) == bool(twice)
    assert {each.phys >> 12 for each in found} <= twice.keys()
    assert min((each.phys >> 12 for each in found), default=0) == min(twice, default=0)
    assert [each.phys for each in found] == sorted(each.phys for each in found)
    pairs = [{each.one, each.other} for each in found]
    assert all(len(pair) == 2 and pairs.count(pair) == 1 for pair in pairs)
    for each in found:
        both = [page for page, owners in twice.items() if {each.one, each.other} <= owners]
        assert each.phys >> 12 in both
        assert 1 <= each.pages <= len(both)
    # Of two owners, nothing is left out.
    if len({owner for owners in whose.values() for owner in owners}) == 2 and twice:
        (each,) = found
        assert each.pages == len(twice)
    # Nobody who shares memory goes unnamed.
    assert {owner for owners in twice.values() for owner in owners} == set().union(*pairs, set())


# KeySet


@st.composite
def preserved(draw: st.DrawFn) -> tuple[Abi, set[tuple[int, int, int]], int]:
    """A kernel, blocks as (index, order, type), and the page that all of them are near."""
    abi = draw(st.sampled_from(ABIS))
    last = (1 << (64 - abi.page_shift)) - 64
    # Around the place where a leaf ends, low, and at the end of all memory.
    base = draw(st.sampled_from([0, (1 << abi.bitmap_size_log2) - 32, 1 << 30, last]))
    block = st.tuples(st.integers(0, 63), st.integers(0, 6), st.sampled_from([0, 1]))
    found = draw(st.sets(block, max_size=10))
    return abi, {((base + page) >> order, order, kind) for page, order, kind in found}, base


def keys_of(abi: Abi, blocks: set[tuple[int, int, int]]) -> KeySet:
    memory = Memory(abi, size=1 << 40)
    for index, order, kind in blocks:
        memory.add_page(index << abi.page_shift + order, order, kind)
    return KeySet(abi, memory.walk().leaves)


def pages_of(blocks: set[tuple[int, int, int]]) -> set[int]:
    return {
        page for index, order, _ in blocks for page in range(index << order, (index + 1) << order)
    }


@given(preserved())
def test_covered(made: tuple[Abi, set[tuple[int, int, int]], int]) -> None:
    abi, blocks, base = made
    pages = range(base, base + 64)
    addresses = np.array(pages, np.uint64) << np.uint64(abi.page_shift)
    # Any address within a page.
    addresses += np.uint64(abi.page_size - 1)
    covered = keys_of(abi, blocks).covered(addresses)
    assert covered.tolist() == [page in pages_of(blocks) for page in pages]


@given(preserved(), st.integers(0, 63), st.integers(0, 2000), st.integers(0, 64), st.data())
def test_covers(
    made: tuple[Abi, set[tuple[int, int, int]], int],
    first: int,
    offset: int,
    pages: int,
    data: st.DataObject,
) -> None:
    abi, blocks, base = made
    start = ((base + first) << abi.page_shift) + offset
    size = (pages << abi.page_shift) + data.draw(st.integers(1, 5000))
    end = start + size
    touched = set(range(start >> abi.page_shift, -(-end >> abi.page_shift)))
    wanted = end <= 1 << 64 and touched <= pages_of(blocks)
    assert keys_of(abi, blocks).covers(start, size) == wanted


@pytest.mark.parametrize("shift", [12, 14, 16])
def test_all_of_the_address_space(shift: int) -> None:
    """One bit covers it: it is not looked at page by page."""
    abi = Abi.for_page_shift(shift)
    keys = keys_of(abi, {(0, abi.order_0_log2, 0)})
    assert keys.covers(0, 1 << 64)
    assert keys.covers(4097, 2**64 - 4097)
    assert not keys.covers(4097, 1 << 64)
    half = keys_of(abi, {(0, abi.order_0_log2 - 1, 0)})
    assert half.covers(0, 1 << 63)
    assert not half.covers(0, (1 << 63) + 1)
    assert not half.covers(0, 1 << 64)


@pytest.mark.parametrize(("phys", "size"), [(-1, 1), (0, -1), (2**64, 1), (2**70, 5), (5, 2**70)])
def test_what_is_no_memory(phys: int, size: int) -> None:
    keys = keys_of(FIXED, {(0, 52, 0)})
    assert not keys.covers(phys, size)


def test_an_empty_tree() -> None:
    keys = KeySet(FIXED, [])
    assert not keys.covers(0x1000, 1)
    assert keys.covered(np.array([0, 0x1000], np.uint64)).tolist() == [False, False]
