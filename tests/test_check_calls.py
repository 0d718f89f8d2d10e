# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules about calls of KHO: on calls on which each fires, and on others on which not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from khoscope.abi import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, Abi
from khoscope.calls import BIT_CLEAR, BIT_SET, BIT_UNKNOWN, Action, Calls, Losses
from khoscope.checks import (
    Report,
    check_batch,
    end_trace,
    start_trace,
)
from tests.synthetic import (
    FIXED,
    PLAIN,
    POSTED,
    Block,
    Touch,
    batch_of,
    call_of,
    snapshot,
)
from tests.test_checks import TRACE_SCOPES, Fires, assert_fires, assert_silent, rules_in

CONTIG, SPLIT = KHO_PAGE_CONTIG, KHO_PAGE_SPLIT
AT = 0x40000


def split(order: int, kind: int = SPLIT, **more: int) -> Block:
    return Block.split(AT, order, type=kind, **more)


def contig(order: int, kind: int = CONTIG, **more: int) -> Block:
    return Block(AT, order, kind, **more)


def folio(order: int) -> Block:
    return contig(order, compound=order)


def add(block: Block, before: int = BIT_CLEAR, ret: int = 0) -> Touch:
    return Touch(block, before=before, after=BIT_SET, ret=ret)


def delete(block: Block, before: int = BIT_SET) -> Touch:
    return Touch(block, Action.DELETE, before=before, after=BIT_CLEAR)


def pages_restored(block: Block, asked: int | None = None, was: Block | None = None) -> Touch:
    """A step of ``kho_restore_pages``."""
    asked = block.order if asked is None else asked
    return Touch(block, Action.RESTORE, 0x1000, asked=asked, was=was)


def folio_restored(block: Block, ret: int = 0x1000, was: Block | None = None) -> Touch:
    """``kho_restore_folio``."""
    return Touch(block, Action.RESTORE, ret, as_folio=True, was=was)


def stamped(block: Block) -> Block:
    """A block whose restore was refused."""
    return replace(block, head=0, ones=0)


UNSTAMPED = Block(AT, BAD_ORDER, head=0)


def trace(
    abi: Abi,
    *touches: Touch,
    calls: Iterable[Calls] = (),
    losses: Losses | None = None,
    **facts: object,
) -> Report:
    """The report about a trace of one batch."""
    known = snapshot(abi, [], **facts)  # type: ignore[arg-type]
    report = start_trace(known)
    check_batch(known, batch_of(abi, calls, touches), report)
    end_trace(report, losses or Losses())
    return report


def calling(name: str, ret: int = 0, **more: object) -> Callable[[], Report]:
    return lambda: trace(FIXED, calls=[call_of(name, ret, **more)])  # type: ignore[arg-type]


FIRES: dict[str, list[Fires]] = {
    "preserved-twice": [
        Fires(lambda: trace(FIXED, add(contig(2), BIT_SET)), AT, 2),
        Fires(lambda: trace(PLAIN, add(split(2), BIT_SET)), AT, 2),
        Fires(lambda: trace(FIXED, add(contig(2)), add(contig(2), BIT_SET)), AT, 2),
    ],
    "unpreserved-unknown": [
        Fires(lambda: trace(FIXED, delete(split(2), BIT_CLEAR)), AT, 2),
        Fires(lambda: trace(PLAIN, delete(contig(0), BIT_CLEAR)), AT, 0),
    ],
    "wrong-refcounts": [
        # By the stamp's type.
        Fires(lambda: trace(FIXED, pages_restored(contig(2, SPLIT))), AT, 2),
        Fires(lambda: trace(FIXED, pages_restored(split(2, CONTIG))), AT, 2),
        Fires(lambda: trace(POSTED, pages_restored(split(2, CONTIG))), AT, 2),
        Fires(lambda: trace(FIXED, pages_restored(contig(3, ones=1, odd=4))), AT, 3),
        Fires(lambda: trace(FIXED, pages_restored(contig(0, head=0))), AT, 0),
        # By the function, where there are no types.
        Fires(lambda: trace(PLAIN, pages_restored(contig(2))), AT, 2),
        Fires(lambda: trace(PLAIN, folio_restored(split(2))), AT, 2),
        # No compound page, or another.
        Fires(lambda: trace(PLAIN, folio_restored(contig(2))), AT, 2),
        Fires(lambda: trace(FIXED, folio_restored(contig(2, compound=3))), AT, 2),
        # By what it was: as posted, the stamp says contig of what was split.
        Fires(lambda: trace(POSTED, pages_restored(contig(2), was=split(2))), AT, 2),
        # Without types, what was never split comes back as if it had been.
        Fires(lambda: trace(PLAIN, pages_restored(split(2), was=contig(2))), AT, 2),
        # Two unsplit blocks that became one come back wrong everywhere.
        Fires(lambda: trace(FIXED, pages_restored(contig(3), was=contig(3, ones=1, odd=4))), AT, 3),
    ],
    "wrong-restore-call": [
        Fires(lambda: trace(FIXED, folio_restored(stamped(split(2)), ret=0)), AT, 2),
        Fires(lambda: trace(FIXED, folio_restored(replace(folio(2), type=SPLIT))), AT, 2),
        Fires(lambda: trace(FIXED, pages_restored(contig(3), asked=2)), AT, 3),
        Fires(lambda: trace(PLAIN, pages_restored(split(0), asked=1)), AT, 0),
        Fires(lambda: trace(FIXED, pages_restored(contig(2), was=folio(2))), AT, 2),
        Fires(lambda: trace(PLAIN, pages_restored(split(2), was=folio(2))), AT, 2),
        Fires(lambda: trace(PLAIN, folio_restored(folio(2), was=split(2))), AT, 2),
        Fires(lambda: trace(FIXED, folio_restored(folio(2), was=contig(2))), AT, 2),
        # Wrong in two ways: one finding.
        Fires(lambda: trace(PLAIN, pages_restored(split(2), asked=1, was=folio(2))), AT, 2),
        Fires(lambda: trace(FIXED, folio_restored(stamped(split(2)), 0, was=split(2))), AT, 2),
    ],
    "failed": [
        Fires(calling("kho_preserve_pages", -22, phys=AT, pages=16)),
        Fires(calling("kho_preserve_vmalloc", -95), None),
        Fires(calling("kho_restore_pages", 0, phys=AT, pages=16)),
        Fires(calling("kho_restore_vmalloc", 0), None),
        Fires(calling("kho_add_subtree", -17, phys=AT, subtree=b"LUO")),
    ],
    "events-lost": [
        Fires(lambda: trace(FIXED, losses=Losses(lost=1)), None),
        Fires(lambda: trace(FIXED, losses=Losses(missed=1)), None),
        Fires(lambda: trace(FIXED, losses=Losses(lost=1, missed=1)), None),
    ],
}

SILENT: dict[str, list[Callable[[], Report]]] = {
    "preserved-twice": [
        lambda: trace(FIXED, add(contig(2))),
        lambda: trace(FIXED, add(contig(2), BIT_UNKNOWN)),
        lambda: trace(FIXED, add(contig(2), BIT_SET, ret=-12)),
        lambda: trace(FIXED, delete(contig(2), BIT_SET)),
    ],
    "unpreserved-unknown": [
        lambda: trace(FIXED, delete(contig(2))),
        lambda: trace(FIXED, delete(contig(2), BIT_UNKNOWN)),
        lambda: trace(FIXED, add(contig(2), BIT_CLEAR)),
    ],
    "wrong-refcounts": [
        lambda: trace(FIXED, pages_restored(contig(2)), pages_restored(split(2))),
        lambda: trace(FIXED, folio_restored(folio(2)), folio_restored(contig(0))),
        lambda: trace(FIXED, pages_restored(contig(0)), pages_restored(contig(0, SPLIT))),
        lambda: trace(PLAIN, pages_restored(split(2)), folio_restored(folio(2))),
        # The stamp says contig of what was split: nothing here tells.
        lambda: trace(POSTED, pages_restored(contig(2))),
        lambda: trace(PLAIN, pages_restored(split(2))),
        lambda: trace(PLAIN, pages_restored(split(2), was=split(2))),
        lambda: trace(FIXED, pages_restored(contig(2), was=contig(2, head=3))),
        lambda: trace(FIXED, folio_restored(folio(2), was=folio(2))),
        # Refused, and nothing to restore.
        lambda: trace(FIXED, folio_restored(stamped(split(2)), ret=0)),
        lambda: trace(FIXED, Touch(UNSTAMPED, Action.RESTORE)),
        # Nobody knows what they are, or were.
        lambda: trace(FIXED, pages_restored(contig(2, SPLIT, unread=1))),
        lambda: trace(PLAIN, pages_restored(split(2), was=contig(2, unread=1))),
        lambda: trace(PLAIN, pages_restored(split(2), was=contig(2, head=0, free=4))),
        # Only what is restored has to fit.
        lambda: trace(FIXED, add(split(2, CONTIG)), delete(split(2, CONTIG))),
    ],
    "wrong-restore-call": [
        lambda: trace(FIXED, pages_restored(contig(2)), pages_restored(split(2))),
        lambda: trace(FIXED, folio_restored(folio(2))),
        # The caller has no order of its own.
        lambda: trace(FIXED, Touch(contig(2), Action.RESTORE, 0x1000)),
        # One page is one page.
        lambda: trace(FIXED, folio_restored(contig(0, SPLIT), was=contig(0, SPLIT))),
        lambda: trace(PLAIN, pages_restored(contig(0), was=contig(0))),
        lambda: trace(PLAIN, folio_restored(folio(2), was=folio(2))),
        lambda: trace(PLAIN, pages_restored(split(2), was=split(2))),
        # Nobody knows what it was.
        lambda: trace(PLAIN, folio_restored(folio(2))),
        lambda: trace(PLAIN, folio_restored(folio(2), was=contig(2, unread=4))),
        lambda: trace(PLAIN, folio_restored(folio(2), was=contig(2, head=0, free=4))),
        lambda: trace(PLAIN, folio_restored(folio(2), was=contig(2, compound=-2))),
        lambda: trace(FIXED, Touch(UNSTAMPED, Action.RESTORE, asked=2)),
        lambda: trace(FIXED, Touch(UNSTAMPED, Action.RESTORE, as_folio=True)),
    ],
    "failed": [
        calling("kho_preserve_pages", 0, phys=AT, pages=16),
        # A kernel address is negative as an i64; void returns nothing.
        calling("kho_restore_pages", -(1 << 46), phys=AT, pages=16),
        calling("kho_unpreserve_pages", 0, phys=AT, pages=16),
    ],
    "events-lost": [
        lambda: trace(FIXED),
        lambda: trace(FIXED, losses=Losses(sampled=1, unread=1, open=1)),
    ],
}


def test_every_rule_of_a_trace_has_cases() -> None:
    assert FIRES.keys() == SILENT.keys() == set(rules_in(TRACE_SCOPES))


@pytest.mark.parametrize("name", rules_in(TRACE_SCOPES))
def test_rule_fires(name: str) -> None:
    assert FIRES[name]
    for case in FIRES[name]:
        assert_fires(name, case)


@pytest.mark.parametrize("name", rules_in(TRACE_SCOPES))
def test_rule_is_silent(name: str) -> None:
    assert SILENT[name]
    for make in SILENT[name]:
        assert_silent(name, make)
