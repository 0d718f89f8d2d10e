# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules about calls of KHO: on calls on which each fires, and on others on which not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

from khoscope.abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, Abi
from khoscope.checks import BatchFindings, Finding, Report, check_batch, end_trace, run, start_trace
from khoscope.checks.rule import RULES, TRACE, of_scopes
from khoscope.facts.calls import BIT_CLEAR, BIT_SET, BIT_UNKNOWN, Action, Batch, Calls, Losses
from khoscope.facts.columns import Pages
from tests.synthetic import (
    FIXED,
    PLAIN,
    POSTED,
    Block,
    Touch,
    batch_of,
    call_of,
    snapshot,
    touches_of,
)
from tests.test_checks import Fires, assert_fires, assert_silent

CONTIG, SPLIT = KHO_PAGE_CONTIG, KHO_PAGE_SPLIT
AT = 0x40000
TAIL = Pages.COMPOUND_TAIL


def split(order: int, kind: int = SPLIT, **more: int) -> Block:
    return Block.split(AT, order, type=kind, **more)


def contig(order: int, kind: int = CONTIG, **more: int) -> Block:
    return Block(AT, order, kind, **more)


def folio(order: int, **more: int) -> Block:
    """A single page is a folio, and no compound page."""
    return contig(order, compound=order if order else Pages.NOT_COMPOUND, **more)


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


def preserved_as_pages(block: Block, ret: int = 0) -> Touch:
    """``kho_preserve_pages``, which asks for an order of its own."""
    return replace(add(block, BIT_CLEAR), asked=block.order, ret=ret)


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


def calling(
    name: str, ret: int = 0, borders: Iterable[int] = (), **more: object
) -> Callable[[], Report]:
    call = call_of(name, ret, **more)  # type: ignore[arg-type]
    return lambda: trace(FIXED, calls=[call], borders=borders)


# A block of order 3, of which each half is in another node

BORDER = AT + 0x4000


def preserving(phys: int, pages: int, ret: int = 0, borders: Iterable[int] = (BORDER,)) -> Report:
    call = call_of("kho_preserve_pages", ret, phys=phys, pages=pages)
    return trace(PLAIN, calls=[call], borders=borders)


def half(second: bool = False) -> Block:
    return replace(split(2), phys=BORDER if second else AT)


FIRES: dict[str, list[Fires]] = {
    "cut-at-node": [
        Fires(lambda: preserving(AT, 8), AT),
        Fires(lambda: preserving(AT - 0x1000, 20), AT - 0x1000),
        # A small part of the memory is in another node.
        Fires(lambda: preserving(AT, 8, borders=[AT + 0x7000]), AT),
        # Two borders, one finding for the call.
        Fires(lambda: preserving(AT, 16, borders=[BORDER, AT + 0xC000]), AT),
    ],
    "preserved-twice": [
        Fires(lambda: trace(FIXED, add(contig(2), BIT_SET)), AT, 2),
        Fires(lambda: trace(PLAIN, add(split(2), BIT_SET)), AT, 2),
        Fires(lambda: trace(FIXED, add(contig(2)), add(contig(2), BIT_SET)), AT, 2),
    ],
    "unpreserved-unknown": [
        Fires(lambda: trace(FIXED, delete(split(2), BIT_CLEAR)), AT, 2),
        Fires(lambda: trace(PLAIN, delete(contig(0), BIT_CLEAR)), AT, 0),
        # What is no block's key is nobody's either.
        Fires(lambda: trace(FIXED, delete(contig(0, key=1 << 54), BIT_CLEAR)), None),
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
    "wrong-preserve-call": [
        Fires(lambda: trace(FIXED, preserved_as_pages(folio(2))), AT, 2),
        Fires(lambda: trace(PLAIN, preserved_as_pages(folio(4))), AT, 4),
        # Two pages of it, and more than it.
        Fires(lambda: trace(PLAIN, preserved_as_pages(contig(1, compound=3))), AT, 1),
        Fires(lambda: trace(PLAIN, preserved_as_pages(contig(3, compound=2))), AT, 3),
        Fires(lambda: trace(PLAIN, preserved_as_pages(contig(0, compound=TAIL))), AT, 0),
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
    "cut-at-node": [
        lambda: preserving(AT, 8, borders=[]),
        lambda: preserving(AT, 8, borders=[AT, AT + 0x8000]),
        # Restore's steps end at the border.
        lambda: preserving(AT, 7),
        lambda: preserving(AT + 0x1000, 7),
        lambda: preserving(AT, 8, ret=-12),
        # Each page is restored by itself; where the memory is, the arguments do not say.
        calling("kho_preserve_vmalloc", pages=8, borders=[BORDER]),
        calling("kho_unpreserve_pages", phys=AT, pages=8, borders=[BORDER]),
    ],
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
    "wrong-preserve-call": [
        # By kho_preserve_folio().
        lambda: trace(FIXED, add(folio(2))),
        lambda: trace(FIXED, preserved_as_pages(contig(2)), preserved_as_pages(split(2))),
        lambda: trace(FIXED, preserved_as_pages(folio(0))),
        # It is not preserved.
        lambda: trace(FIXED, preserved_as_pages(folio(2), ret=-34)),
        lambda: trace(FIXED, delete(folio(2), BIT_SET)),
        lambda: trace(FIXED, preserved_as_pages(folio(2, unread=4))),
        # wrong-restore-call speaks of that.
        lambda: trace(PLAIN, pages_restored(folio(2))),
    ],
    "events-lost": [
        lambda: trace(FIXED),
        lambda: trace(FIXED, losses=Losses(sampled=1, unread=1, open=1)),
    ],
}


def test_every_rule_of_a_trace_has_cases() -> None:
    assert FIRES.keys() == SILENT.keys() == of_scopes(TRACE)


@pytest.mark.parametrize("name", sorted(of_scopes(TRACE)))
def test_rule_fires(name: str) -> None:
    assert FIRES[name]
    for case in FIRES[name]:
        assert_fires(name, case)


@pytest.mark.parametrize("name", sorted(of_scopes(TRACE)))
def test_rule_is_silent(name: str) -> None:
    assert SILENT[name]
    for make in SILENT[name]:
        assert_silent(name, make)


def messages(report: Report, name: str) -> list[str]:
    return [f.message for f in report.findings if f.rule == name]


@pytest.mark.parametrize(
    ("abi", "touch", "wanted"),
    [
        (FIXED, pages_restored(split(2, CONTIG)), "1/0 to what is stamped contig"),
        (FIXED, pages_restored(contig(2, SPLIT)), "1/1 to what is stamped split"),
        (PLAIN, pages_restored(contig(2)), "restored as 1/0, kho_restore_pages() should give 1/1"),
        (
            PLAIN,
            folio_restored(contig(2)),
            "restored as 1/0, kho_restore_folio() should give 1/0 compound order 2",
        ),
        (POSTED, pages_restored(contig(2), was=split(2)), "restored as 1/0, was 1/1"),
        (
            FIXED,
            pages_restored(split(2, CONTIG), was=contig(2)),
            "restored as 1/1, kho_restore_pages() should give 1/0 to what is stamped contig, "
            "was 1/0",
        ),
    ],
)
def test_wrong_refcounts_says_what_was_expected(abi: Abi, touch: Touch, wanted: str) -> None:
    [message] = messages(trace(abi, touch), "wrong-refcounts")
    assert message.endswith(wanted)


@pytest.mark.parametrize(
    ("touch", "wanted"),
    [
        (
            pages_restored(contig(3), asked=1),
            "kho_restore_pages() asked for order 1, the stamp is of order 3: "
            "8 pages come back where 2 were asked for",
        ),
        (
            folio_restored(stamped(split(2)), ret=0, was=split(2)),
            "stamped split, asked for as a folio: the kernel refused",
        ),
        (
            folio_restored(replace(folio(2), type=SPLIT)),
            "stamped split, asked for as a folio: the kernel made one of it all the same",
        ),
        (
            pages_restored(contig(2), asked=1, was=folio(2)),
            "was a folio of order 2, restored as pages",
        ),
        (
            folio_restored(folio(2), was=contig(2)),
            "was 1/0 and no folio, restored as a folio of order 2",
        ),
    ],
)
def test_wrong_restore_call_says_the_most_that_is_known(touch: Touch, wanted: str) -> None:
    assert messages(trace(FIXED, touch), "wrong-restore-call") == [wanted]


def test_what_preserving_has_cut() -> None:
    assert messages(preserving(AT, 16, borders=[BORDER, AT + 0xD000]), "cut-at-node") == [
        f"kho_preserve_pages() of 16 pages has cut them at the border of nodes 0 and 1 "
        f"({BORDER:#x}): kho_restore_pages() will skip 12 pages"
    ]


def test_a_restore_that_the_kernel_gets_wrong() -> None:
    """The stamp is smaller than the step, and the client is not at fault."""
    step = pages_restored(half(), asked=3)
    (found,) = trace(PLAIN, step, borders=[BORDER]).findings
    assert (found.rule, found.phys, found.order) == ("wrong-restore-call", AT, 2)
    assert found.message == (
        "kho_restore_pages() stepped over 4 pages, which kho_preserve_pages() had cut off at the "
        f"border of nodes 0 and 1 ({BORDER:#x})"
    )
    assert "The kernel is wrong here, and not the client" in found.explain
    # Who knows of no border, or of another one, has to take it for the client's.
    for borders in ([], [BORDER - 0x1000], [BORDER + 0x4000]):
        (found,) = trace(PLAIN, step, borders=borders).findings
        assert "asked for order 3, the stamp is of order 2" in found.message
        assert found.explain == RULES["wrong-restore-call"].explain


def test_a_restore_that_goes_by_stamps() -> None:
    """A kernel that does not step over the second part, and one step of two calls."""
    first, second = pages_restored(half(), asked=3), pages_restored(half(second=True))
    assert trace(PLAIN, first, second, borders=[BORDER]).findings == []
    (found,) = trace(PLAIN, first, replace(second, call=2), borders=[BORDER]).findings
    assert (found.rule, found.phys) == ("wrong-restore-call", AT)
    further = replace(second, block=replace(second.block, phys=BORDER + 0x4000))
    (found,) = trace(PLAIN, first, further, borders=[BORDER]).findings
    assert (found.rule, found.phys) == ("wrong-restore-call", AT)


def test_a_folio_at_a_border_is_the_clients() -> None:
    step = pages_restored(half(), asked=3, was=folio(2))
    report = trace(PLAIN, step, borders=[BORDER])
    (found,) = (f for f in report.findings if f.rule == "wrong-restore-call")
    assert found.message == "was a folio of order 2, restored as pages"
    assert found.explain == RULES["wrong-restore-call"].explain


def test_tree_keys_are_said_with_their_type() -> None:
    key = FIXED.kho_radix_encode_key(AT, 2, SPLIT)
    report = trace(FIXED, delete(split(2), BIT_CLEAR), add(split(2), BIT_SET))
    assert messages(report, "unpreserved-unknown") == [
        f"nothing to unpreserve, its bit was clear (key {key:#x}, type split)"
    ]
    assert messages(report, "preserved-twice") == [
        f"its bit was set already (key {key:#x}, type split)"
    ]
    [untyped] = messages(trace(PLAIN, add(split(2), BIT_SET)), "preserved-twice")
    assert "type" not in untyped
    # What the tree cannot store was not looked up.
    [posted] = messages(trace(POSTED, delete(split(2), BIT_CLEAR)), "unpreserved-unknown")
    assert posted.endswith("type contig)")


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (
            call_of("kho_preserve_pages", -22, phys=AT, pages=1600),
            "kho_preserve_pages() of 1,600 pages returned -EINVAL",
        ),
        (
            call_of("kho_preserve_folio", -22, phys=AT, pages=0),
            "kho_preserve_folio() returned -EINVAL",
        ),
        (
            call_of("kho_preserve_vmalloc", -95, pages=3),
            "kho_preserve_vmalloc() returned -EOPNOTSUPP",
        ),
        (
            call_of("kho_split_preserved_pages", -12, phys=AT, pages=8),
            "kho_split_preserved_pages() of 8 pages returned -ENOMEM",
        ),
        (
            call_of("kho_add_subtree", -17, phys=AT, pages=1, subtree=b"LUO"),
            "kho_add_subtree() of 'LUO' returned -EEXIST",
        ),
        # An error of the kernel's own.
        (call_of("kho_preserve_vmalloc", -524), "kho_preserve_vmalloc() returned -524"),
        (call_of("kho_restore_folio", 0, phys=0), "kho_restore_folio() returned NULL"),
    ],
)
def test_failed_says_what_was_asked(call: Calls, wanted: str) -> None:
    assert messages(trace(FIXED, calls=[call]), "failed") == [wanted]


def test_lost_events_are_counted() -> None:
    report = trace(FIXED, losses=Losses(lost=70000, missed=2))
    assert messages(report, "events-lost") == [
        "events lost: 70,000, calls not followed to their end: 2; the verdict is incomplete"
    ]


@pytest.mark.parametrize("name", ["lost", "missed", "sampled", "unread", "open"])
def test_what_was_not_seen_is_no_pass(name: str) -> None:
    report = trace(FIXED, losses=Losses(**{name: 1234}))
    assert len(report.incomplete) == 1
    assert "1,234" in report.incomplete[0]
    assert (report.errors, report.passed) == (0, False)
    assert trace(FIXED).incomplete == []
    assert len(trace(FIXED, losses=Losses(1, 2, 3, 4, 5)).incomplete) == 5


# The rules about blocks, asked while they are preserved


def names(report: Report) -> set[str]:
    return set(report.counts) - {"type-not-stored", "abi-not-bumped"}


@pytest.mark.parametrize("abi", [PLAIN, POSTED, FIXED])
def test_a_trace_begins_with_what_is_wrong_with_the_kernel(abi: Abi) -> None:
    wanted = {"type-not-stored", "abi-not-bumped"} if abi is POSTED else set()
    # What is in the tree already, and in the log, is not what happens now.
    facts = snapshot(abi, [split(2, CONTIG)], tainted=1 << 5, log=["BUG: Bad page state"])
    assert set(start_trace(facts).counts) == wanted


@pytest.mark.parametrize(
    ("abi", "block", "wanted"),
    [
        (PLAIN, split(2), set()),
        (PLAIN, folio(2), set()),
        (PLAIN, contig(2), {"wrong-after-restore"}),
        (POSTED, contig(2), set()),
        (POSTED, split(2), {"type-mismatch", "wrong-after-restore"}),
        (FIXED, split(2), set()),
        (FIXED, contig(2), set()),
        (FIXED, folio(2), set()),
        (FIXED, contig(0), set()),
        (FIXED, contig(3, ones=1, odd=4), {"mixed-refcounts", "wrong-after-restore"}),
        (FIXED, contig(2, head=0, free=1), {"stale-entry"}),
        (FIXED, contig(2, unread=1), set()),
    ],
)
def test_blocks_are_judged_when_they_are_preserved(
    abi: Abi, block: Block, wanted: set[str]
) -> None:
    assert names(trace(abi, add(block))) == wanted
    # Not when that failed, and not when they go.
    assert names(trace(abi, add(block, ret=-12))) == set()
    assert names(trace(abi, delete(block))) == set()


def test_preserved_blocks_in_scratch_and_outside_ram() -> None:
    report = trace(FIXED, add(contig(2)), scratch=[(AT, 0x1000)])
    assert names(report) == {"in-scratch"}
    assert names(trace(FIXED, add(contig(2)), ram=[(0, AT)])) == {"outside-ram"}


def test_sampled_blocks_are_judged_by_what_was_looked_at() -> None:
    sample = replace(add(contig(11, SPLIT, ones=1023)), looked=1024)
    assert names(trace(FIXED, sample)) == {"huge-order"}
    report = trace(POSTED, sample)
    assert messages(report, "type-mismatch") == [
        "recorded contig, the pages are 1/1 in the 1,024 pages looked at"
    ]
    mixed = replace(add(contig(11, ones=3, odd=7)), looked=1024)
    [message] = messages(trace(FIXED, mixed), "mixed-refcounts")
    assert message.endswith("first odd page 7) in the 1,024 pages looked at")
    restored = replace(pages_restored(contig(11)), looked=1024)
    assert names(trace(FIXED, restored)) == set()
    [message] = messages(trace(PLAIN, restored), "wrong-refcounts")
    assert message.startswith("restored as 1/0 in the 1,024 pages looked at, ")
    # What it was is known to the last page.
    report = trace(POSTED, replace(restored, was=split(11)))
    assert messages(report, "wrong-refcounts") == [
        "restored as 1/0 in the 1,024 pages looked at, was 1/1"
    ]


# What real kernels do, by the table of the series


def restored_by(abi: Abi, recorded: Block, *, as_folio: bool = False) -> Touch:
    """What ``kho_restore_page`` makes of a block that was preserved as it is."""
    by_type = as_folio or (abi.has_types and recorded.type == CONTIG)
    now = replace(
        contig(recorded.order) if by_type else split(recorded.order),
        type=recorded.type,
        compound=recorded.order if as_folio and recorded.order else Pages.NOT_COMPOUND,
    )
    return replace(
        folio_restored(now) if as_folio else pages_restored(now),
        was=recorded,
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("was", "as_folio", "wrong_on"),
    [
        (contig(2), False, [PLAIN]),
        (split(2), False, [POSTED]),
        (folio(2), True, []),
        (folio(0), True, []),
        (contig(0), False, []),
        # Neighbours, and a split behind the kernel's back.
        (contig(3, ones=1, odd=4), False, [PLAIN, POSTED, FIXED]),
        (split(3, CONTIG), False, [POSTED, FIXED]),
    ],
)
@pytest.mark.parametrize("abi", [PLAIN, POSTED, FIXED], ids=["base", "rfc", "fixed"])
def test_restores_of_real_kernels(
    abi: Abi, was: Block, as_folio: bool, wrong_on: list[Abi], known: bool
) -> None:
    stored = replace(was, type=was.type if abi is FIXED else CONTIG)
    touch = restored_by(abi, stored, as_folio=as_folio)
    report = trace(abi, touch if known else replace(touch, was=None))
    # Without the other kernel's snapshot there is only the stamp, which these kernels obey.
    assert names(report) == ({"wrong-refcounts"} if known and abi in wrong_on else set())


# What is kept


def found_in(abi: Abi, batch: Batch, report: Report | None = None) -> BatchFindings:
    facts = snapshot(abi, [])
    return check_batch(facts, batch, report or start_trace(facts))


def rules_by_row(found: dict[int, list[Finding]]) -> dict[int, list[str]]:
    return {row: [f.rule for f in findings] for row, findings in found.items()}


def test_findings_are_given_back_by_row() -> None:
    batch = batch_of(
        FIXED,
        [
            call_of("kho_preserve_pages"),
            call_of("kho_preserve_pages", -12, call=2),
            call_of("kho_restore_folio", 0, call=3),
        ],
        [
            delete(contig(2)),
            add(contig(2), ret=-12),
            add(contig(2)),
            add(split(2, CONTIG), BIT_SET),
            pages_restored(contig(3, SPLIT), asked=1),
            add(split(2, CONTIG)),
        ],
    )
    report = start_trace(snapshot(FIXED, []))
    found = found_in(FIXED, batch, report)
    assert rules_by_row(found.calls) == {1: ["failed"], 2: ["failed"]}
    assert rules_by_row(found.touches) == {
        3: ["preserved-twice", "type-mismatch", "wrong-after-restore"],
        4: ["wrong-refcounts", "wrong-restore-call"],
        5: ["type-mismatch", "wrong-after-restore"],
    }
    given = [f for part in (found.calls, found.touches) for fs in part.values() for f in fs]
    assert len(given) == report.counts.total() == len(report.findings) == 9
    assert {id(f) for f in given} == {id(f) for f in report.findings}
    assert report.blocks == 6


def test_an_empty_batch_is_checked() -> None:
    report = start_trace(snapshot(FIXED, []))
    found = found_in(FIXED, batch_of(FIXED), report)
    assert (found.calls, found.touches, dict(report.counts)) == ({}, {}, {})
    found = found_in(FIXED, Batch(Calls.empty(), touches_of(FIXED)), report)
    assert (found.calls, found.touches, report.passed) == ({}, {}, True)


def test_each_batch_has_findings_when_the_report_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "KEPT", 3)
    touches = [add(replace(split(2, CONTIG), phys=n << 20)) for n in range(5)]
    batch = batch_of(FIXED, [call_of("kho_restore_folio")] * 5, touches)
    report = start_trace(snapshot(FIXED, []))
    for batches in range(1, 4):
        found = found_in(FIXED, batch, report)
        assert rules_by_row(found.calls) == {row: ["failed"] for row in range(3)}
        assert rules_by_row(found.touches) == {
            row: ["type-mismatch", "wrong-after-restore"] for row in range(3)
        }
        assert [f.phys for fs in found.touches.values() for f in fs[:1]] == [0, 1 << 20, 2 << 20]
        assert report.counts == dict.fromkeys(
            ["failed", "type-mismatch", "wrong-after-restore"], 5 * batches
        )
        assert {name: len(kept) for name, kept in report.kept.items()} == dict.fromkeys(
            report.counts, 3
        )


@pytest.mark.parametrize("abi", [PLAIN, FIXED])
def test_many_rows_make_few_objects(abi: Abi) -> None:
    rows = 100_000
    kinds = [
        add(contig(2), BIT_SET),
        delete(contig(2), BIT_CLEAR),
        pages_restored(contig(3, SPLIT), asked=1),
    ]
    touches = touches_of(abi, *kinds)[np.arange(rows) % 3]
    calls = call_of("kho_preserve_pages", -22)[np.zeros(rows, np.int64)]
    facts = snapshot(abi, [])
    report = start_trace(facts)
    gc.collect()
    before = len(gc.get_objects())
    found = check_batch(facts, Batch(calls, touches), report)
    made = len(gc.get_objects()) - before
    assert report.counts["failed"] == rows
    for name in ("wrong-refcounts", "wrong-restore-call", "unpreserved-unknown"):
        assert abs(report.counts[name] - rows / 3) < 1
    assert report.blocks == rows
    assert len(found.calls) == run.KEPT
    assert len(found.touches) <= run.KEPT * len(report.counts)
    # A finding and the list that it stands in, and no more.
    assert made < 3 * run.KEPT * len(report.counts)
