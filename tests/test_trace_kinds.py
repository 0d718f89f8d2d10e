# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel has counted by kind: the same is found as if each call had been told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope import checks
from khoscope.abi.keys import BAD_ORDER, Abi
from khoscope.facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    BIT_UNKNOWN,
    NO_ORDER,
    Action,
    Batch,
    Calls,
    Places,
    Touches,
)
from khoscope.facts.snapshot import Snapshot
from khoscope.trace.kinds import Counted, Kinds
from khoscope.trace.summary import Callers, Summary, bucket, distinct
from khoscope.views.text import Text
from tests.synthetic import FIXED, PLAIN, POSTED, Block, Touch, call_of, snapshot, touches_of
from tests.test_trace_assemble import added, as_read, assembler, call, page_at

SCRATCH = np.array([[0x40000000, 0x100000], [0x50000000, 0]], np.uint64)
#: Blocks may begin in front of it and end in it: where it begins, only single pages do.
ODD_SCRATCH = SCRATCH + np.array([[0x3000, 0], [0, 0]], np.uint64)


def facts_of(abi: Abi) -> Snapshot:
    return replace(snapshot(abi, []), scratch=SCRATCH)


# Grouped or not, the findings are the same


def kinds_of_touches(touches: Touches, places: Places) -> Touches:
    """As bpf/kho_trace.c groups them (``struct block_kind``)."""
    blocks, pages, tails = touches.blocks, touches.blocks.facts, touches.blocks.facts.tails
    size = blocks.page_count << np.uint64(12)
    last = blocks.phys + size - np.uint64(1)
    first, kind = distinct(
        [
            touches.call,
            touches.function,
            touches.succeeded,
            np.where(touches.action == Action.RESTORE, 0, touches.ret),
            touches.before,
            touches.after,
            touches.as_folio,
            touches.asked,
            touches.looked > 0,
            touches.sampled,
            blocks.order,
            blocks.type,
            pages.zeros == tails,
            pages.zeros == 0,
            pages.ones == tails,
            np.clip(pages.head, 0, 2),
            pages.unread > 0,
            pages.free,
            pages.page_type,
            pages.compound,
            np.searchsorted(places.borders, blocks.phys, "right"),
            np.searchsorted(places.borders, last, "right"),
        ]
    )
    return replace(touches[first], count=np.bincount(kind).astype(np.uint64))


def kinds_of_calls(calls: Calls) -> Calls:
    """Likewise (``struct call_kind``)."""
    first, kind = distinct([calls.call, calls.function, calls.ret, bucket(calls.leave)])
    pages = np.zeros(len(first), np.uint64)
    np.add.at(pages, kind, calls.pages)
    return replace(calls[first], count=np.bincount(kind).astype(np.uint64), all_pages=pages)


ORDERS = st.sampled_from([0, 1, 3, 9])


@st.composite
def touches(draw: st.DrawFn) -> Touch:
    order = draw(ORDERS)
    near = draw(st.sampled_from([0x1000000, 0x40000000 - 0x200000, 0x40000000, 0xFFE00000]))
    phys = near + (draw(st.integers(0, 3)) << 12 + order)
    tails = (1 << order) - 1
    zeros = draw(st.sampled_from([0, tails, tails // 2]))
    ones = draw(st.sampled_from([0, tails - zeros]))
    block = Block(
        phys,
        order,
        draw(st.integers(0, 1)),
        head=draw(st.sampled_from([-1, 0, 1, 2, 700])),
        ones=ones,
        others=tails - zeros - ones,
        compound=draw(st.sampled_from([-1, -2, order or -1, 4])),
        free=draw(st.sampled_from([0, 0, 0, 1])),
    )
    action = draw(st.sampled_from([Action.ADD, Action.DELETE, Action.RESTORE]))
    bits = st.sampled_from([BIT_CLEAR, BIT_SET, BIT_UNKNOWN])
    # What was asked for, where that is another order, is told by itself.
    asked = draw(st.sampled_from([NO_ORDER, order]))
    return Touch(
        block,
        action,
        draw(st.sampled_from([0, 1, -12] if action != Action.RESTORE else [0, 1, 99])),
        draw(bits),
        draw(bits),
        as_folio=action == Action.RESTORE and draw(st.booleans()),
        asked=asked if action != Action.DELETE else NO_ORDER,
        call=draw(st.integers(1, 2)),
    )


@st.composite
def nearly_alike(draw: st.DrawFn) -> list[Touch]:
    """Touches that differ from the first in one thing each, or in none: so kinds have several."""
    base = draw(touches())
    order, tails = base.block.order, (1 << base.block.order) - 1
    found = [base]
    for other in draw(st.lists(touches(), min_size=1, max_size=30)):
        name = draw(st.sampled_from(["", "before", "as_folio", "ret", "block", "refcounts"]))
        changed: dict[str, Any] = {}
        if name == "refcounts":
            ones = draw(st.sampled_from([0, tails, tails // 2]))
            changed = {"ones": ones, "others": draw(st.sampled_from([0, tails - ones]))}
        elif name == "block":
            what = draw(st.sampled_from(["phys", "head", "type", "compound", "free"]))
            changed = {what: getattr(other.block, what)}
            if what == "phys":
                changed = {"phys": other.block.phys >> 12 + order << 12 + order}
        elif name and other.action == base.action:
            found.append(replace(base, **{name: getattr(other, name)}))
            continue
        found.append(replace(base, block=replace(base.block, **changed)))
    return found


@st.composite
def healthy(draw: st.DrawFn) -> list[Touch]:
    """Blocks with nothing wrong but that some reach into scratch, or have tails of both kinds."""
    tails = 7
    blocks = st.builds(
        lambda phys, ones: Block(phys, 3, ones=ones),
        st.sampled_from([0x1000000, 0x40000000]),
        st.sampled_from([0, tails // 2]),
    )
    return [
        Touch(block, Action.ADD, before=BIT_CLEAR, after=BIT_SET, call=1)
        for block in draw(st.lists(blocks, min_size=2, max_size=5))
    ]


MANY = st.lists(touches(), min_size=1, max_size=30) | nearly_alike() | healthy()


@pytest.mark.parametrize("abi", [PLAIN, POSTED, FIXED])
@given(many=MANY, data=st.data())
def test_kinds_are_judged_as_each_is(abi: Abi, many: list[Touch], data: st.DataObject) -> None:
    facts = replace(facts_of(abi), scratch=ODD_SCRATCH)
    each = touches_of(abi, *(sorted(many, key=lambda touch: touch.call)))
    made = data.draw(
        st.lists(st.tuples(st.sampled_from([0, -12]), st.integers(0, 9)), min_size=1, max_size=9)
    )
    calls = Calls.concatenate(
        [call_of("kho_preserve_folio", ret, call=1, pages=n) for ret, n in made]
        + [call_of("kho_preserve_folio", call=2)]
    )
    single = checks.start_trace(facts)
    checks.check_batch(facts, Batch(calls, each), single)
    grouped = checks.start_trace(facts)
    kinds = Batch(kinds_of_calls(calls), kinds_of_touches(each, checks.places(facts)))
    checks.check_batch(facts, kinds, grouped)
    assert grouped.counts == single.counts
    assert grouped.follows == single.follows
    assert grouped.blocks == single.blocks
    assert (grouped.verdict, grouped.errors) == (single.verdict, single.errors)
    for rule, kept in grouped.kept.items():
        assert sum(finding.times for finding in kept) == grouped.counts[rule]


def test_sums_are_those_of_each() -> None:
    many = [Touch(Block(0x1000 * n), before=BIT_CLEAR, after=BIT_SET, call=1) for n in range(9)]
    many += [Touch(Block(0x1000), Action.DELETE, before=BIT_SET, after=BIT_CLEAR, call=1)] * 4
    many += [Touch(Block(0, BAD_ORDER, key=0), ret=-34, call=1)]
    each = touches_of(FIXED, *many)
    calls = Calls.concatenate(
        [call_of("kho_preserve_pages", ret, pages=n) for ret, n in [(0, 5), (0, 4), (-12, 3)]]
    )
    facts = facts_of(FIXED)

    def summed(batch: Batch) -> Summary:
        summary = Summary(Callers(lambda address: "a+0x1 [b]"))
        summary.add(batch, checks.check_batch(facts, batch, checks.start_trace(facts)))
        return summary

    # Summaries ask whose call it was: once for all, as the ids of the calls are their clients here.
    single = summed(Batch(replace(calls, call=np.array([1, 2, 3], np.uint64)), each))
    kinds = kinds_of_calls(calls)
    kinds = replace(kinds, call=np.arange(1, len(kinds) + 1, dtype=np.uint64))
    grouped = summed(Batch(kinds, kinds_of_touches(each, checks.places(facts))))
    assert grouped.clients == single.clients
    assert grouped.balance == single.balance
    assert grouped.total.blocks.total() == 13
    assert grouped.total.rules["failed"] == 1


def test_places() -> None:
    facts = replace(facts_of(FIXED), ram=np.array([[0x1000, 0x9000], [0x20000000, 0x80000000]]))
    places = checks.places(facts)
    assert places.borders.tolist() == [
        0x1000,
        0x9000,
        0x20000000,
        0x40000000,
        0x40100000,
        0x80000000,
    ]
    assert places.ordinary.tolist() == [False, True, False, True, False, True, False]


# What is counted is told once


def counted(*kinds: tuple[bytes, int, int, bytes]) -> Counted:
    """As (key, count, pages, record)."""
    count, pages = (np.array([kind[i] for kind in kinds], np.uint64) for i in (1, 2))
    return Counted([kind[0] for kind in kinds], count, pages, as_read(kind[3] for kind in kinds))


ONE, OTHER = b"client 1", b"client 2"
CALL = call(args=(page_at(0x1000), 1), pages=1, blocks=1)


def test_only_what_is_new_is_told() -> None:
    kinds = Kinds(assembler())
    nothing = kinds.feed(counted(), counted())
    assert (len(nothing.calls), len(nothing.touches)) == (0, 0)
    first = kinds.feed(
        counted((ONE + b"a", 5, 50, CALL)), counted((ONE + b"x", 7, 0, added(0x1000)))
    )
    assert (first.calls.times.tolist(), first.calls.total.tolist()) == ([5], [50])
    assert first.touches.times.tolist() == [7]
    second = kinds.feed(
        counted((OTHER + b"a", 1, 1, CALL), (ONE + b"a", 8, 51, CALL)),
        counted((ONE + b"x", 7, 0, added(0x1000)), (OTHER + b"x", 2, 0, added(0x2000))),
    )
    assert (second.calls.times.tolist(), second.calls.total.tolist()) == ([1, 3], [1, 1])
    by_call = Counter(
        dict(zip(second.touches.call.tolist(), second.touches.times.tolist(), strict=True))
    )
    assert by_call == {1: 2, 2: 0}


def test_blocks_of_a_client_whose_call_has_not_returned_come_last() -> None:
    batch = Kinds(assembler()).feed(
        counted((ONE + b"a", 1, 1, CALL)),
        counted((OTHER, 1, 0, added(0x2000)), (ONE, 1, 0, added(0x1000))),
    )
    assert batch.touches.blocks.phys.tolist() == [0x1000000, 0x2000000]
    assert batch.starts().tolist() == [0, 1]


def test_what_was_found_again_is_shown_once() -> None:
    """Of a kind that comes again and again, with how often it came; what did not come is none."""
    facts = facts_of(FIXED)
    report = checks.start_trace(facts)
    wrong = touches_of(FIXED, Touch(Block(0x4000, 2, head=1, ones=3), before=BIT_SET))
    for times in (3, 0, 4):
        batch = Batch(Calls.empty(), replace(wrong, count=np.array([times], np.uint64)))
        checks.check_batch(facts, batch, report)
    assert report.counts["preserved-twice"] == report.counts["type-mismatch"] == 7
    (twice,) = report.kept["preserved-twice"]
    assert twice.times == 7
    out = StringIO()
    Text(out).findings(report)
    assert "7 like this" in out.getvalue()
    assert "more" not in out.getvalue().partition("type-mismatch")[2].partition("→")[0]
