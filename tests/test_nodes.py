# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where NUMA nodes meet, against a model that asks every page for its node, as the kernel does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.facts.nodes import (
    Border,
    are_known,
    borders_of,
    kho_preserve_pages,
    step_across,
    steps_across,
)
from khoscope.facts.snapshot import Node
from tests.synthetic import PLAIN, snapshot
from tests.track_memory import XARRAY

#: Pages of the model's memory.
PAGES = 128
PAGE = 4096

edges = st.sets(st.integers(1, PAGES - 1), max_size=5)
spans = st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGES)).filter(lambda s: s[0] < s[1])


def nid_of(pages: set[int]) -> list[int]:
    """``pfn_to_nid`` of every page, of nodes that begin at some pages."""
    return [sum(edge <= pfn for edge in pages) for pfn in range(PAGES)]


def facts_of(*nodes: Node) -> list[Border]:
    return borders_of(replace(snapshot(PLAIN, []), nodes=list(nodes)))


def borders_between(pages: set[int]) -> list[Border]:
    every = [0, *sorted(pages), PAGES]
    nodes = [Node(i, every[i] * PAGE, every[i + 1] * PAGE) for i in range(len(every) - 1)]
    return facts_of(*nodes)


def model_order(pfn: int, end: int) -> int:
    """``min(count_trailing_zeros(pfn), ilog2(end - pfn))``."""
    order = 0
    while pfn % (2 << order) == 0 and (2 << order) <= end - pfn:
        order += 1
    return order


def model_preserve(pfn: int, end: int, nid: list[int]) -> list[tuple[int, int]]:
    """What ``kho_preserve_pages`` adds to the tree."""
    found = []
    while pfn < end:
        order = model_order(pfn, end)
        while nid[pfn] != nid[pfn + (1 << order) - 1]:
            order -= 1
        found.append((pfn, order))
        pfn += 1 << order
    return found


def model_restore(pfn: int, end: int, stamps: dict[int, int]) -> set[int]:
    """The pages that ``kho_restore_pages`` restores, by the stamps of the blocks."""
    restored: set[int] = set()
    while pfn < end:
        restored |= {*range(pfn, pfn + (1 << stamps[pfn]))}
        pfn += 1 << model_order(pfn, end)
    return restored


@given(edges)
def test_borders(pages: set[int]) -> None:
    nid = nid_of(pages)
    borders = borders_between(pages)
    assert [b.pfn for b in borders] == sorted(pages)
    assert [(b.below, b.above) for b in borders] == [(nid[b.pfn - 1], nid[b.pfn]) for b in borders]


@given(edges, spans)
def test_blocks_and_steps(pages: set[int], span: tuple[int, int]) -> None:
    """What the kernel cuts, and what its restore then skips, page by page."""
    pfn, end = span
    borders = borders_between(pages)
    blocks = model_preserve(pfn, end, nid_of(pages))
    assert list(kho_preserve_pages(pfn, end, borders)) == blocks
    restored = model_restore(pfn, end, dict(blocks))
    steps = steps_across(pfn, end, borders)
    skipped = {
        page
        for step in steps
        for at, order in step.blocks[1:]
        for page in range(at, at + (1 << order))
    }
    assert skipped == {*range(pfn, end)} - restored
    assert sum(step.skipped for step in steps) == len(skipped)
    for step in steps:
        assert {*step.blocks} <= {*blocks}
        assert step.restored == 1 << dict(blocks)[step.pfn]
        assert step.pfn < step.border.pfn < step.pfn + (1 << step.order)


@given(edges.filter(bool), st.data())
def test_larger_steps_have_the_blocks_of_smaller_ones(pages: set[int], data: st.DataObject) -> None:
    borders = borders_between(pages)
    border = data.draw(st.sampled_from(borders))
    alignment = (border.pfn & -border.pfn).bit_length() - 1
    smaller: set[tuple[int, int]] = set()
    for order in range(alignment + 1, 7):
        step = step_across(border, order, borders)
        assert smaller < {*step.blocks}
        assert border.pfn in dict(step.blocks)
        smaller = {*step.blocks}


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([], []),
        ([Node(0, 0, 8)], []),
        # A hole between two nodes is no border: no block reaches across.
        ([Node(0, 0, 8), Node(1, 9, 16)], []),
        ([Node(0, 0, 8), Node(3, 8, 16)], [Border(8, 0, 3)]),
        # One node inside another.
        ([Node(0, 0, 16), Node(1, 4, 8)], [Border(4, 0, 1), Border(8, 1, 0)]),
        # They take turns; where is known as far as the ends of each go.
        ([Node(0, 0, 12), Node(1, 4, 16)], [Border(4, 0, 1), Border(12, 0, 1)]),
    ],
)
def test_nodes_that_do_not_simply_follow_each_other(
    nodes: list[Node], wanted: list[Border]
) -> None:
    pages = [Node(n.number, n.start * PAGE, n.end * PAGE) for n in nodes]
    assert facts_of(*pages) == wanted


def test_a_border_in_words() -> None:
    assert Border(0x20104, 0, 1).named(12) == "the border of nodes 0 and 1 (0x20104000)"


def test_what_is_not_known() -> None:
    """Three areas of scratch are those of a machine with one node."""
    facts = snapshot(PLAIN, [], scratch=[(n << 24, 1 << 20) for n in range(4)])
    assert are_known(facts)
    unknown = replace(facts, nodes=None)
    assert borders_of(unknown) == []
    assert not are_known(unknown)
    assert are_known(replace(unknown, scratch=facts.scratch[:3]))


def test_kernels_that_do_not_cut() -> None:
    facts = snapshot(XARRAY, [], borders=[1 << 20])
    assert len(facts.nodes or ()) == 2
    assert borders_of(facts) == []
    assert are_known(replace(facts, nodes=None))
