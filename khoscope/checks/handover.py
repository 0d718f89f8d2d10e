# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules across a kexec: what the old kernel recorded against what the new one has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, U64, Abi
from ..abi.serialized import LUO
from ..facts.clients import LuoSession
from ..facts.columns import Blocks, Pages, page_type_has_type, spread, stretches
from ..facts.holders import units_holding
from ..facts.nodes import Border
from ..facts.snapshot import Snapshot
from ..facts.tree import KeySet
from ..words.lists import listed
from .blocks import offline
from .inplace import InPlace
from .nodes import STEPS_OVER, stepped_over
from .pattern import (
    describe,
    differs,
    is_contig,
    is_split,
    readable,
    stays_compound,
    type_name,
    typed,
)
from .rule import Marked, Message, Severity, also, rule
from .sessions import files_that_came, named, nobodys, units_of


class Fate(IntEnum):
    """What became of a block."""

    UNREAD = 0
    NOT_RESTORED = 1
    RESTORED = 2
    RELEASED = 3
    LOST = 4
    IN_PLACE = 5
    UNKNOWN = 6


#: In words, for totals.
FATE_NAMES = {
    Fate.RESTORED: "restored",
    Fate.IN_PLACE: "in-place",
    Fate.NOT_RESTORED: "not-restored",
    Fate.RELEASED: "released",
    Fate.LOST: "lost",
    Fate.UNREAD: "unread",
    Fate.UNKNOWN: "not-known",
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """
    A chunk of blocks, before and after.

    :param before: what was recorded, with the old kernel's page facts.
    :param after: the new kernel's facts of the same pages.
    :param fate: what became of each, :class:`Fate`.
    :param abi: the new kernel's.
    :param offline: the new kernel's memory that is offline, as in Snapshot.
    :param borders: where NUMA nodes met in the old kernel.
    """

    before: Blocks
    after: Pages
    fate: NDArray[np.int8]
    abi: Abi
    offline: U64 | None
    borders: Sequence[Border] = ()
    #: The first pair of each stretch that look alike, and how many each has; None: too many.
    looks: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def __getitem__(self, rows: NDArray[np.int64]) -> Pairs:
        """Some of the pairs."""
        return replace(
            self,
            before=self.before[rows],
            after=self.after[rows],
            fate=self.fate[rows],
            looks=None,
        )

    @functools.cached_property
    def _firsts(self) -> Pairs:
        return self if self.looks is None else self[self.looks[0]]

    def by_look(self, find: Callable[[Pairs], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """:meth:`.Blocks.by_look` of both sides and their fate."""
        return find(self) if self.looks is None else spread(find(self._firsts), self.looks[1])

    @property
    def stamped(self) -> NDArray[np.bool_]:
        """Blocks that still have their stamp, whether or not anybody should claim them."""
        return (self.fate == Fate.NOT_RESTORED) | (self.fate == Fate.IN_PLACE)


class Evidence:
    """
    What is left of the tree that was handed over.

    Its pages went back to the page allocator when the new kernel had walked it, so they may hold
    anything.  khoscope believes a leaf only if it still has at least half of the bits that the old
    kernel had set in it, but no new ones: other data has a few of the old bits by chance, and many
    others.

    :param recorded: what the old kernel had recorded.
    """

    def __init__(self, before: Snapshot, after: Snapshot, recorded: KeySet) -> None:
        self._left = KeySet(after.abi, after.evidence)
        #: What the old kernel had serialized, if that is what it handed over.
        self._serialized: KeySet | None = None
        chain = before.outgoing.serialized
        if chain is not None and before.finalized and not before.finalizes_itself:
            self._serialized = KeySet(before.abi, chain.leaves)
        row = recorded.leaf(self._left.leaves.key)
        known = row >= 0
        was = recorded.counts[row[known]]
        shared = self._left.leaves.bitmap[known] & recorded.leaves.bitmap[row[known]]
        left = np.bitwise_count(shared.view(np.uint64)).sum(axis=1, dtype=np.int64)
        known[known] = (2 * left >= was) & (self._left.counts[known] == left)
        self._believed = known

    def says_absent(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """
        Blocks that were not handed over, according to a leaf that is believed, or because they were
        preserved after everything was serialized.
        """
        leaf = self._left.leaf(keys)
        absent = leaf >= 0
        absent[absent] = self._believed[leaf[absent]]
        absent &= ~self._left.contains(keys)
        return absent if self._serialized is None else absent | ~self._serialized.contains(keys)


def pair(
    before: Blocks,
    after: Blocks,
    now: Snapshot,
    evidence: Evidence,
    in_place: InPlace,
    borders: Sequence[Border] = (),
) -> Pairs:
    """Decide the fate of each block of a chunk."""
    # What depends on the place; all else is worked out by look.
    absent = evidence.says_absent(before.key)
    in_use = in_place.of(before)
    columns = [before.order, before.type, *before.facts.columns, *after.facts.columns]
    looks = stretches([*columns, absent, in_use])
    if looks is None:
        fate = _fates(before, after, now, absent, in_use)
    else:
        first, count = looks
        fate = spread(_fates(before[first], after[first], now, absent[first], in_use[first]), count)
    return Pairs(before, after.facts, fate, now.abi, now.offline, borders, looks)


def _fates(
    before: Blocks,
    after: Blocks,
    now: Snapshot,
    absent: NDArray[np.bool_],
    in_use: NDArray[np.bool_],
) -> NDArray[np.int8]:
    """
    The fate of each block.

    :param absent: according to the evidence, it was not handed over.
    :param in_use: the next kernel uses it in place.
    """
    pages = after.facts
    stamped = now.abi.stamp.is_stamp(pages.private)
    fate = np.select(
        [
            ~readable(pages) | (before.order == BAD_ORDER),
            stamped & in_use,
            stamped,
            ~stamped & (absent | ~np.bool_(now.handover.is_kho_boot)),
            _may_be_waiting(before, now, pages),
            _reused(before, after, now),
        ],
        [
            Fate.UNREAD,
            Fate.IN_PLACE,
            Fate.NOT_RESTORED,
            Fate.LOST,
            Fate.UNKNOWN,
            Fate.RELEASED,
        ],
        Fate.RESTORED,
    )
    return fate.astype(np.int8)


def _may_be_waiting(before: Blocks, now: Snapshot, pages: Pages) -> NDArray[np.bool_]:
    """
    Blocks that look as the boot leaves them, on kernels whose stamp is the order alone.

    Nothing tells whether such a block is still to be restored.
    """
    if now.abi.stamp.has_magic:
        return np.zeros(len(before), np.bool_)
    stamp = pages.private == before.order
    return stamp & never_freed(before, pages) & (pages.compound <= 0)


def undecided(pairs: Pairs) -> NDArray[np.bool_]:
    """
    Blocks that were folios, and of which an older file does not say whether they were freed or
    restored as pages.
    """

    def are(pairs: Pairs) -> NDArray[np.bool_]:
        was, now = pairs.before.facts, pairs.after
        alike = is_contig(now) | is_split(now)
        unknown = (now.pristine == Pages.UNRECORDED) & (now.compound <= 0)
        return unknown & (was.compound > 0) & alike & (pairs.fate == Fate.RELEASED)

    return pairs.by_look(are)


def _reused(before: Blocks, after: Blocks, now: Snapshot) -> NDArray[np.bool_]:
    """
    Blocks that are free or somebody else's now, so their owner must have let them go.

    ``kho_restore_page`` leaves either a folio of the block's order, or pages with the same refcount
    on all but the first, none of which is on an LRU list or has a page type.  A block that was a
    folio but no longer is one counts as freed: kho_test frees its folios at every boot, and pages
    that were allocated anew one by one have the refcounts of a folio that was restored as pages.
    But none of its pages has been in the page allocator if they all are as the boot left them.
    """
    pages = after.facts
    folio = pages.compound > 0
    other_folio = (pages.compound == Pages.COMPOUND_TAIL) | (
        folio & (pages.compound != before.order)
    )
    was_folio = before.facts.compound > 0
    flags = now.kernel.page_flags
    lru = np.uint64(1 << flags.index("lru") if "lru" in flags[:64] else 0)
    return (
        (pages.head <= 0)
        | (pages.free > 0)
        | other_folio
        | (was_folio & ~folio & ~never_freed(before, pages))
        | (~folio & ((pages.flags & lru) != 0))
        | page_type_has_type(pages.page_type)
        | ~(is_contig(pages) | is_split(pages) | _half_a_folio(before, pages, now.abi))
    )


def _half_a_folio(before: Blocks, now: Pages, abi: Abi) -> NDArray[np.bool_]:
    """
    Blocks that the oldest kernels restored as pages: compound, and each page held.

    Nothing else leaves such a block.
    """
    every = (now.head == 1) & (now.ones == now.tails) & (now.compound == before.order)
    as_pages = np.zeros(len(before), np.bool_)
    return every & stays_compound(abi, before.order, as_pages)


def never_freed(before: Blocks, after: Pages) -> NDArray[np.bool_]:
    """Blocks none of whose pages can have been in the page allocator since the boot."""
    return after.pristine == before.page_count


@rule(
    "not-a-handover",
    Severity.ERROR,
    "handover",
    """
    This kernel was given nothing that the snapshot recorded, or something else. Either the firmware
    booted it, or the kexec was without KHO, or it refused the handover (dmesg | grep KHO), or
    another kexec came in between. The other findings across the kexec mean little then. Compare
    with the snapshot of the kernel that ran last.
    """,
    kernel="kho_populate kho_in_kexec_metadata luo_early_startup",
)
def not_a_handover(before: Snapshot, after: Snapshot) -> Iterator[Message]:
    """This kernel did not come from a handover, or not from the snapshot's kernel."""
    was, now = before.kernel, after.kernel
    if was.boot_id is not None and was.boot_id == now.boot_id:
        yield Message("the snapshot is of this boot: no kexec has happened since")
        return
    if not after.handover.is_kho_boot:
        yield Message("this kernel was not handed anything (kho_in.fdt_phys is 0)")
        return
    told = after.handover.previous_release
    if told is not None and told != was.release:
        yield Message(
            f"handed over by {told or 'an unnamed kernel'}, the snapshot is of {was.release}"
        )
    counted, came = before.handover.kexec_count, after.handover.kexec_count
    if counted is not None and came is not None and came != counted + 1:
        yield Message(f"kexec_count is {came}, expected {counted + 1} after the snapshot's kernel")
    if after.incoming is None:
        return
    # The address of the old kernel's root FDT is as good as a name: another machine has another
    # one.
    sent, got = before.outgoing.fdt.phys, after.incoming.fdt.phys
    # A kernel that was not finalized yet had no root FDT.
    if sent and sent != got:
        yield Message(f"the root FDT came from {got:#x}, the snapshot's kernel had it at {sent:#x}")
    if before.outgoing.luo is None or after.incoming.luo is None:
        return
    number, now_at = before.outgoing.luo.liveupdate_num, after.incoming.luo.liveupdate_num
    if None not in (number, now_at) and now_at != number:
        yield Message(
            f"LUO counts live update {now_at}, the snapshot's kernel had made it {number}"
        )


@rule(
    "lost",
    Severity.ERROR,
    "pairs",
    """
    The new kernel never got this block, subtree or session. Its memory has gone to the page
    allocator and holds other data by now. It was unpreserved, removed or closed after the snapshot,
    or the tree or the FDT was damaged on the way. Take the snapshot as late as possible, and look
    for what its owner did since then.
    """,
    kernel="kho_mem_retrieve kho_retrieve_subtree luo_session_deserialize",
)
def lost(pairs: Pairs) -> Marked:
    """A block of the snapshot has neither a stamp nor a sign of having been restored; or a subtree,
    session or file of it did not come."""
    return Marked(
        pairs.fate == Fate.LOST,
        lambda row: (
            f"recorded {type_name(int(pairs.before.type[row]))}, not handed over; "
            f"its pages are {describe(pairs.after, row)}"
        ),
    )


@rule(
    "order-changed",
    Severity.ERROR,
    "pairs",
    """
    kho_restore_page() goes by the stamp's order alone: it will set the refcounts of more or fewer
    pages than were preserved. The two kernels do not agree on the key layout, or somebody wrote
    over the stamp. Do not let the owner restore the block.
    """,
    kernel="kho_restore_page",
)
def order_changed(pairs: Pairs) -> Marked:
    """The stamp's order differs from the recorded order."""

    stamp, was = pairs.abi.stamp, pairs.before.order

    def changed(pairs: Pairs) -> NDArray[np.bool_]:
        return pairs.stamped & (stamp.order(pairs.after.private) != pairs.before.order)

    def say(row: int) -> str:
        came = stamp.order(pairs.after.private[row : row + 1])[0]
        return f"recorded order {was[row]}, stamped order {came}"

    return Marked(pairs.by_look(changed), say)


@rule(
    "type-changed",
    Severity.ERROR,
    "pairs",
    """
    The block is stamped with another type than it had, and restore goes by the stamp. Stamped
    contig but split: the tails come back at 0, and freeing one hits VM_BUG_ON_PAGE. Stamped split
    but contig: the tails come back at 1, and freeing the block trips "Bad page state". Do not let
    its owner restore it; if it is restored already, do not free it.
    """,
    kernel="kho_restore_page",
)
def type_changed(pairs: Pairs) -> Marked:
    """The stamp's type differs from the recorded type, or from the pattern the pages had."""
    stamp = pairs.abi.stamp

    def changed(pairs: Pairs) -> NDArray[np.bool_]:
        came, was = stamp.type(pairs.after.private), pairs.before.facts
        other = typed(pairs.before) & (came != pairs.before.type)
        many = was.tails > 0
        other |= many & (came == KHO_PAGE_CONTIG) & is_split(was)
        other |= many & (came == KHO_PAGE_SPLIT) & is_contig(was)
        return pairs.stamped & other & np.bool_(stamp.type_shift is not None)

    def say(row: int) -> str:
        came = int(stamp.type(pairs.after.private[row : row + 1])[0])
        return (
            f"stamped {type_name(came)}, was recorded {type_name(int(pairs.before.type[row]))} "
            f"with pages {describe(pairs.before.facts, row)}"
        )

    return Marked(pairs.by_look(changed), say)


#: What :func:`wrong_refcounts` says about a kernel that splits what it has made compound.
_STAYED_COMPOUND = """
    kho_restore_pages() of this kernel made a compound page of the block and handed it to
    split_page(), which is not made for compound pages: each page got a refcount of 1, and all kept
    the flags of a compound page. Freeing the block, or one of its pages, trips "Bad page state",
    taints the kernel and leaks the memory. Keep the owner from freeing the block until the next
    cold boot.
    """


@rule(
    "wrong-refcounts",
    Severity.ERROR,
    "pairs",
    """
    The block was restored with refcounts that it never had. Tails at 1 instead of 0: freeing the
    block trips "Bad page state", taints the kernel and leaks the block. Tails at 0 instead of 1:
    freeing a tail hits VM_BUG_ON_PAGE, or frees memory that somebody still uses. Keep the owner
    from freeing the block until the next cold boot.
    """,
    kernel="kho_restore_page kho_init_pages kho_init_folio",
)
def wrong_refcounts(pairs: Pairs) -> Marked:
    """Restored, and the refcounts are not what they were before, or are of what is now a compound
    page."""

    def wrong(pairs: Pairs) -> NDArray[np.bool_]:
        return (pairs.fate == Fate.RESTORED) & differs(pairs.before.facts, pairs.after)

    def explain(row: int) -> str:
        one = pairs[np.array([row])]
        return _STAYED_COMPOUND if _half_a_folio(one.before, one.after, one.abi)[0] else ""

    was, now = pairs.before.facts, pairs.after
    return Marked(
        pairs.by_look(wrong),
        lambda row: f"restored as {describe(now, row)}, was {describe(was, row)}",
        explain=explain,
    )


@also("preserved-offline", "pairs")
def handed_over_offline(pairs: Pairs) -> Marked:
    """A block that was handed over lies in memory that is offline in the new kernel."""
    return Marked(
        offline(pairs.offline, pairs.before, pairs.abi.page_shift),
        lambda row: "the new kernel has its memory, or some of it, offline",
    )


@rule(
    "not-restored",
    Severity.WARNING,
    "pairs",
    """
    No client has asked for the block: its stamp is still there. What is left once all clients are
    done leaks until the next reboot. Wait for the clients, or find out which one did not come back.
    """,
    kernel="kho_preserved_memory_reserve kho_restore_page",
)
def not_restored(pairs: Pairs) -> Marked:
    """The stamp is still there: nobody has claimed the block."""
    left = pairs.fate == Fate.NOT_RESTORED
    came = (pairs.fate == Fate.RESTORED) | (pairs.fate == Fate.RELEASED)
    shift = pairs.abi.page_shift
    over = stepped_over(pairs.before, came, left, pairs.borders, shift)

    def say(row: int) -> str:
        pages = describe(pairs.after, row)
        if row not in over:
            return f"not claimed by anybody; the pages are {pages}"
        step = over[row]
        return (
            f"skipped at {step.border.named(shift)}: the block at {step.pfn << shift:#x} was "
            f"restored, and kho_restore_pages() steps over this one; the pages are {pages}"
        )

    return Marked(left, say, explain=lambda row: STEPS_OVER if row in over else "")


@also("lost", "handover")
def client_lost(before: Snapshot, after: Snapshot) -> Iterator[Message]:
    """A subtree, a session or a file of the snapshot did not come."""
    if after.incoming is not None and after.incoming.fdt.problems:
        # Nobody knows what is in this FDT; bad-fdt reports that.
        return
    came = set() if after.incoming is None else {s.name for s in after.incoming.fdt.subtrees}
    for subtree in before.outgoing.fdt.subtrees:
        if subtree.name not in came:
            yield Message(f"subtree {subtree.name!r} was not handed over", subtree.phys)
    told = nobodys(after)
    for was, now in _sessions(before, after):
        units = units_holding(before.liveupdate, was.name)
        if now is None:
            yield Message(f"{named(was)} was not handed over{_held(units)}", units=units)
            continue
        luo = after.incoming.luo if after.incoming is not None else None
        count = now.count if luo is None else files_that_came(luo, now)
        # Files of a session that was retrieved may be finished and gone.
        if not now.retrieved and count < was.count:
            # If the kernel could not read it, nobody has taken its memory.
            explain = told[was.name].explain if was.name in told else ""
            text = f"{was} came with {count:,} of {_files(was.count)}{_held(units)}"
            yield Message(text, explain=explain, units=units)


@also("orphaned-session", "handover")
def session_not_retrieved(before: Snapshot, after: Snapshot) -> Iterator[Message]:
    """A session of the snapshot came, and nobody has retrieved it."""
    told = nobodys(after)
    for was, now in _sessions(before, after):
        if now is not None and not now.retrieved and now.name not in told:
            units = _units(before, was, now)
            text = f"{named(now)} came, and nobody has retrieved it{_held(units)}"
            yield Message(text, units=units)


@also("not-restored", "handover")
def file_not_retrieved(before: Snapshot, after: Snapshot) -> Iterator[Message]:
    """A file of a session could not be retrieved."""
    for was, now in _sessions(before, after):
        if now is None:
            continue
        for file in now.files:
            if file.retrieve_status is not None and file.retrieve_status < 0:
                yield Message(
                    f"{now}, {file}: its handler {file.handler} "
                    f"failed to retrieve it ({file.retrieve_status})",
                    units=_units(before, was, now),
                )


def _units(before: Snapshot, was: LuoSession, now: LuoSession) -> tuple[str, ...]:
    """The units that held a session before the kexec, and for which systemd kept it."""
    return tuple(sorted({*units_holding(before.liveupdate, was.name), *units_of(now)}))


def _held(units: tuple[str, ...]) -> str:
    return f"; {listed(units)} had it before" if units else ""


def _sessions(before: Snapshot, after: Snapshot) -> Iterator[tuple[LuoSession, LuoSession | None]]:
    """
    The sessions of the snapshot, each with the session that came; None: it did not come.

    Sessions whose fate is not known are left out: once LUO has read what it was handed, a session
    that it does not have may simply be finished and gone.
    """
    if before.outgoing.luo is None:
        return
    handed = after.incoming
    luo = None if handed is None else handed.luo
    sessions = {} if luo is None else {session.name: session for session in luo.sessions}
    if luo is None:
        none = handed is None or LUO not in {subtree.name for subtree in handed.fdt.subtrees}
    else:
        none = not (luo.live or luo.raw is not None or luo.problems or luo.left_out)
    for session in before.outgoing.luo.sessions:
        now = sessions.get(session.name)
        if now is not None or none:
            yield session, now


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


@rule(
    "unexpected",
    Severity.WARNING,
    "stamps",
    """
    The block was preserved after the snapshot was taken, or the tree was damaged between the
    snapshot and the kexec. khoscope cannot tell what it was. Take the snapshot as late as possible
    before the kexec.
    """,
    kernel="kho_preserved_memory_reserve",
)
def unexpected(before: Snapshot, recorded: KeySet, stamps: Blocks) -> Marked:
    """A stamped page that no snapshot block accounts for."""
    known = np.zeros(len(stamps), np.bool_)
    abi = before.abi
    for order in recorded_orders(before, recorded):
        size = np.uint64(abi.page_size << order)
        aligned = stamps.phys % size == 0
        for page_type in abi.key_types:
            keys = abi.kho_radix_encode_keys(stamps.phys, order, page_type)
            known |= aligned & recorded.contains(keys)
    return Marked(~known, lambda row: "stamped, but not in the snapshot")


def recorded_orders(before: Snapshot, recorded: KeySet) -> list[int]:
    """The orders that the leaves of a tree hold."""
    _, orders, _ = before.abi.kho_radix_decode_keys(recorded.leaves.key)
    return sorted({o for o in orders.tolist() if o < 64 - before.abi.page_shift})
