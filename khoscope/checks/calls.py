# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about calls of KHO while they happen, and about what they do to blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, TYPE_NAMES, U64
from ..facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    ERRNO_NAMES,
    FUNCTIONS,
    NO_ORDER,
    Action,
    Calls,
    Losses,
    Places,
    Touches,
)
from ..facts.columns import Pages
from ..facts.nodes import Step, borders_of, steps_across
from ..facts.snapshot import Snapshot
from . import handover as _handover_rules  # noqa: F401 - registers what is looked for here, too
from .inplace import InPlace
from .nodes import STEPS_OVER
from .pattern import describe, differs, fits, named, readable, restores_split, type_name
from .rule import Marked, Message, Severity, also, rule


@rule(
    "preserved-twice",
    Severity.WARNING,
    "touches",
    """
    KHO has one bit for each block and counts nothing. The first unpreserve, by whichever owner,
    clears it for both; the memory is then lost at the kexec, silently. Let one owner preserve the
    block, once.
    """,
    kernel="kho_radix_add_page kho_radix_add_key __kho_preserve_order",
)
def preserved_twice(facts: Snapshot, touches: Touches) -> Marked:
    """A block was preserved that was preserved already: its single bit was set."""
    twice = (touches.action == Action.ADD) & touches.succeeded & (touches.before == BIT_SET)
    return Marked(
        twice,
        lambda row: f"its bit was set already{_key(touches, row)}",
    )


@rule(
    "unpreserved-unknown",
    Severity.WARNING,
    "touches",
    """
    The block's bit was clear. The kernel says nothing if the leaf or bitmap exists, and WARNs if it
    does not. Either the block was never preserved, or it was unpreserved twice, or it is still
    preserved under another key: with another order, because the range differs from the one that was
    preserved, or with another type, because the pages were split since then
    (kho_split_preserved_pages() is for that). That old entry then goes through the kexec.
    Unpreserve exactly what was preserved, as it was.
    """,
    kernel="kho_radix_del_page kho_radix_del_key __kho_unpreserve",
)
def unpreserved_unknown(facts: Snapshot, touches: Touches) -> Marked:
    """A block was unpreserved that was not preserved: its bit was clear."""
    unknown = (touches.action == Action.DELETE) & (touches.before == BIT_CLEAR)
    return Marked(
        unknown,
        lambda row: f"nothing to unpreserve, its bit was clear{_key(touches, row)}",
    )


@also("wrong-refcounts", "touches")
def restored_wrong(facts: Snapshot, touches: Touches) -> Marked:
    """Restored, and the refcounts do not fit the stamp, or are not what they were before."""
    blocks, was = touches.blocks, touches.was
    now = blocks.facts
    split = restores_split(facts.abi, blocks.type, touches.as_folio)
    # kho_init_folio() makes one compound page of every block that is not a single page.
    folio = touches.as_folio & (blocks.order > 0)
    right = fits(now, split) & (~folio | (now.compound == blocks.order))
    changed = touches.known & differs(was, now)

    def say(row: int) -> str:
        order = int(blocks.order[row])
        text = f"restored as {describe(now, row, order)}"
        if not right[row]:
            call = "kho_restore_folio" if touches.as_folio[row] else "kho_restore_pages"
            text += f", {call}() should give {named(order, bool(split[row]))}"
            text += f" compound order {order}" if folio[row] else ""
            if blocks.type[row] != NO_TYPE:
                text += f" to what is stamped {type_name(int(blocks.type[row]))}"
        if changed[row]:
            text += f", was {describe(was, row)}"
        return text

    judged = _restores(touches) & touches.succeeded & readable(now)
    return Marked(judged & (~right | changed), say)


@rule(
    "wrong-restore-call",
    Severity.ERROR,
    "touches",
    """
    kho_restore_page() goes by the stamp's order and by which function was called, and compares
    neither with what was preserved. A folio restored as pages is no compound page: the owner's
    folio_put() frees its first page, and leaks or corrupts the rest. Pages restored as a folio are
    all freed by the first put; kernels that store the type WARN and return NULL instead.
    kho_restore_pages() with another range than was preserved restores pages that somebody else may
    own, or skips blocks, which then leak. Restore with the function, the address and the count that
    the memory was preserved with.
    """,
    kernel="kho_restore_page kho_restore_pages kho_restore_folio",
)
def wrong_restore_call(facts: Snapshot, touches: Touches) -> Marked:
    """Pages were restored as a folio, a folio as pages, or another count than was preserved."""
    blocks, was, folio = touches.blocks, touches.was, touches.as_folio
    many = blocks.order > 0
    known = touches.known & readable(was) & (was.free == 0) & many
    split_as_folio = folio & many & (blocks.type == KHO_PAGE_SPLIT)
    folio_as_pages = ~folio & known & (was.compound > 0)
    pages_as_folio = folio & known & (was.compound <= 0) & (was.compound != Pages.COMPOUND_TAIL)
    miscounted = (touches.asked != NO_ORDER) & (touches.asked != blocks.order)
    miscounted &= ~_goes_on(facts, touches)
    cut = _cut_by_kernel(facts, touches, miscounted)

    def say(row: int) -> str:
        order, asked = int(blocks.order[row]), int(touches.asked[row])
        if split_as_folio[row]:
            outcome = "made one of it all the same" if touches.ret[row] else "refused"
            return f"stamped split, asked for as a folio: the kernel {outcome}"
        if folio_as_pages[row]:
            return f"was a folio of order {was.compound[row]}, restored as pages"
        if pages_as_folio[row]:
            return f"was {describe(was, row)} and no folio, restored as a folio of order {order}"
        if row in cut:
            return (
                f"kho_restore_pages() stepped over {cut[row].skipped:,} pages, which "
                f"kho_preserve_pages() had cut off at {cut[row].border.named(facts.abi.page_shift)}"
            )
        return (
            f"kho_restore_pages() asked for order {asked}, the stamp is of order {order}: "
            f"{1 << order:,} pages come back where {1 << asked:,} were asked for"
        )

    wrong = split_as_folio | folio_as_pages | pages_as_folio | miscounted
    by_kernel = miscounted & ~(split_as_folio | folio_as_pages | pages_as_folio)
    return Marked(
        _restores(touches) & wrong,
        say,
        explain=lambda row: STEPS_OVER if by_kernel[row] and row in cut else "",
    )


def _goes_on(facts: Snapshot, touches: Touches) -> NDArray[np.bool_]:
    """Restores after which the same call restored the block right behind: it goes by stamps."""
    goes_on = np.zeros(len(touches), np.bool_)
    if len(touches) > 1:
        end = touches.blocks.end(facts.abi.page_shift)
        goes_on[:-1] = (touches.call[1:] == touches.call[:-1]) & (
            touches.blocks.phys[1:] == end[:-1]
        )
    return goes_on


def _cut_by_kernel(
    facts: Snapshot, touches: Touches, miscounted: NDArray[np.bool_]
) -> dict[int, Step]:
    """Rows of restores that preserving had cut where two nodes meet, with the restore's step."""
    borders, shift, blocks = borders_of(facts), facts.abi.page_shift, touches.blocks
    found = {}
    for row in np.flatnonzero(miscounted & np.bool_(bool(borders))).tolist():
        pfn, order = int(blocks.phys[row]) >> shift, int(touches.asked[row])
        steps = steps_across(pfn, pfn + (1 << order), borders)
        if steps and steps[0].blocks[0] == (pfn, int(blocks.order[row])):
            found[row] = steps[0]
    return found


@rule(
    "wrong-preserve-call",
    Severity.WARNING,
    "touches",
    """
    kho_preserve_pages() makes the same entry for a folio as kho_preserve_folio() does. Its
    counterpart, kho_restore_pages(), makes no folio of it: the owner's folio_put() then frees the
    first page and leaks the others, or freeing them as one block trips "Bad page state" where the
    kernel has no page types. A part of a folio comes back without the rest. Preserve a folio with
    kho_preserve_folio(), and restore it with kho_restore_folio(); or allocate the memory without
    __GFP_COMP.
    """,
    kernel="kho_preserve_pages kho_preserve_folio kho_restore_pages",
)
def wrong_preserve_call(facts: Snapshot, touches: Touches) -> Marked:
    """A folio, or a part of one, was preserved as pages."""
    pages = touches.blocks.facts
    inside = pages.compound == Pages.COMPOUND_TAIL
    by_pages = (touches.action == Action.ADD) & touches.succeeded & (touches.asked != NO_ORDER)

    def say(row: int) -> str:
        if inside[row]:
            return "kho_preserve_pages() of pages in the middle of a folio"
        return f"kho_preserve_pages() of a folio of order {pages.compound[row]}"

    return Marked(by_pages & readable(pages) & ((pages.compound > 0) | inside), say)


@rule(
    "failed",
    Severity.WARNING,
    "calls",
    """
    The call did not do what it was asked for. After a failed preserve the memory will not survive
    the kexec, and its owner must not hand over state that points to it. After a failed
    kho_split_preserved_pages() the pages are split and no longer preserved. A restore returns NULL
    if no preserved block starts at the address (never preserved, already restored, or not its first
    page), or if the block's type does not match the call. Pages that kho_restore_pages() or
    kho_restore_vmalloc() restored before it failed leak. Look in dmesg for a WARN at the same time.
    """,
    kernel="kho_preserve_folio kho_preserve_pages kho_add_subtree kho_restore_page",
)
def failed(facts: Snapshot, calls: Calls) -> Marked:
    """A call returned an error or NULL."""

    def say(row: int) -> str:
        function, ret = FUNCTIONS[calls.function[row]], int(calls.ret[row])
        text = f"{function.name}()"
        if function.name == "kho_add_subtree":
            text += f" of {calls.name[row].decode(errors='replace')!r}"
        elif not {"nr_pages", "order"}.isdisjoint(function.arguments):
            pages = int(calls.pages[row])
            text += f" of {pages:,} page{'' if pages == 1 else 's'}"
        if function.returns == "pointer":
            return f"{text} returned NULL"
        return f"{text} returned {f'-{ERRNO_NAMES[-ret]}' if -ret in ERRNO_NAMES else ret}"

    return Marked(calls.failed, say)


@rule(
    "events-lost",
    Severity.WARNING,
    "losses",
    """
    khoscope did not check what it did not see: the verdict is incomplete, and calls may be shown
    without some of their blocks. Either calls came faster than khoscope read them and the buffer
    overran, or there were more kinds of them than khoscope counts, or tasks nested deeper, or were
    more, than khoscope follows. Trace fewer calls (--only, -p, -c), or take a larger buffer.
    """,
    kernel="bpf_ringbuf_output",
)
def events_lost(losses: Losses) -> Iterator[Message]:
    """Events were lost, or calls not followed to their end."""
    parts = []
    if losses.lost:
        parts.append(f"events lost: {losses.lost:,}")
    if losses.missed:
        parts.append(f"calls not followed to their end: {losses.missed:,}")
    if parts:
        yield Message(f"{', '.join(parts)}; the verdict is incomplete")


def places(facts: Snapshot) -> Places:
    """Where the rules may say other things of blocks: borders of what they ask for by address."""
    scratch = facts.scratch[facts.scratch[:, 1] > 0]
    offline = np.zeros((0, 2), np.uint64) if facts.offline is None else facts.offline
    scratch = np.stack([scratch[:, 0], scratch.sum(axis=1, dtype=np.uint64)], axis=1)
    borders = np.unique(
        np.concatenate([facts.ram, scratch, offline, InPlace(facts).claims]).reshape(-1)
    ).astype(np.uint64)
    # The rest of what is between two borders is like its first byte.
    ordinary = inside(facts.ram, borders) & ~inside(scratch, borders) & ~inside(offline, borders)
    return Places(borders, np.concatenate([np.zeros(1, np.bool_), ordinary]))


def inside(ranges: U64, phys: U64) -> NDArray[np.bool_]:
    """Which addresses lie in one of some ranges; u64, shape (n, 2): first, and first behind."""
    found = np.zeros(len(phys), np.bool_)
    for start, end in ranges.tolist():
        found |= (phys >= np.uint64(start)) & (phys < np.uint64(end))
    return found


def _restores(touches: Touches) -> NDArray[np.bool_]:
    """Restores that found a stamp; the others have no block to report."""
    return (touches.action == Action.RESTORE) & (touches.blocks.order != BAD_ORDER)


def _key(touches: Touches, row: int) -> str:
    """The key that was looked up in the tree, and its type if keys have one."""
    kind = TYPE_NAMES[int(touches.blocks.type[row])]
    return f" (key {touches.blocks.key[row]:#x}{f', type {kind}' if kind else ''})"
