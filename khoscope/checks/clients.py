# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about what KHO's clients hand over, and whether all of it is preserved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..abi.keys import U64
from ..abi.serialized import LUO_FDT_COMPATIBLE
from ..facts.clients import Claims, Luo, OwnerKind
from ..facts.columns import Leaves
from ..facts.owners import shared
from ..facts.snapshot import Snapshot
from ..facts.tree import KeySet, Run
from .kernel import misplaced
from .pattern import ORDER_LOST, lost_orders
from .rule import Message, Severity, rule

#: Owners whose memory the next kernel looks for.  The blobs of subtrees are checked separately,
#: vmalloc areas by broken-vmalloc.
NEEDED = {
    *(
        OwnerKind.FDT,
        OwnerKind.LUO,
        OwnerKind.SESSION,
        OwnerKind.FILE,
        OwnerKind.MEMFD,
        OwnerKind.RESERVE_MEM,
        OwnerKind.KHO_TEST,
    )
}


@rule(
    "blob-not-preserved",
    Severity.ERROR,
    "clients",
    """
    kho_add_subtree() records where a blob is, and preserves nothing; LUO's structures are
    addresses, too. The next kernel follows them to memory that it has given to somebody else by
    then: it reads garbage, and acts on it. Preserve all of the memory (kho_alloc_preserve(),
    kho_preserve_folio()) before handing out its address, and for as long as somebody has that
    address.
    """,
    kernel="kho_add_subtree kho_retrieve_subtree",
)
def blob_not_preserved(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """A subtree's blob, or memory that a client's structures lead to, is not wholly covered by
    preserved blocks."""
    fdt, meant = facts.outgoing.fdt, _as_added(facts, keys)
    for subtree in fdt.subtrees:
        start, size = subtree.phys, subtree.size
        if start is None or not size or misplaced(facts, fdt, subtree):
            continue
        if not keys.covers(start, size):
            what = f"the blob of subtree {subtree.name!r} ({size:,} bytes)"
            cause = ORDER_LOST if meant.covers(start, size) else ""
            yield Message(f"{what} is not, or not wholly, preserved", start, cause=cause)
    for owner, pages, first, cause in _uncovered(facts, keys, NEEDED):
        what = facts.outgoing.owners[owner].name
        yield Message(f"{what}: {_not_preserved(pages)}", first, cause=cause)


@rule(
    "broken-vmalloc",
    Severity.ERROR,
    "clients",
    """
    kho_restore_vmalloc() follows the chunks without a check, and restores each page that they list.
    A chain that leaves RAM crashes the next kernel. If the chain loops, lists another number of
    pages than it says, or lists a page that was not preserved, that kernel gives up the whole area,
    most often silently, and leaks what it had restored of it. Do not kexec; unpreserve the area
    (kho_unpreserve_vmalloc()) and preserve it again.
    """,
    kernel="kho_restore_vmalloc",
)
def broken_vmalloc(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """A vmalloc chunk chain that loops, leaves RAM, or lists pages that are not preserved."""
    for area in facts.outgoing.vmallocs:
        for problem in area.problems:
            yield Message(f"{area.name}: {problem}", area.phys)
    for owner, pages, first, cause in _uncovered(
        facts, keys, {OwnerKind.VMALLOC_CHUNK, OwnerKind.VMALLOC_PAGE}
    ):
        whose = facts.outgoing.owners[owner]
        yield Message(f"{whose.name}, {whose.kind}s: {_not_preserved(pages)}", first, cause=cause)


#: What :func:`claimed_twice` says of kernels whose stamps have no magic.
_RESTORED_TWICE = """
    Each of the two restores the memory, and a kernel whose stamps have no magic refuses neither of
    them: each restore sets the refcounts anew, and both owners think that the memory is theirs.
    Whoever frees it first gives it away while the other one uses it. In this kernel each block has
    one mark for both: as soon as one of them unpreserves it, it is not preserved for the other.
    Have one of the two give up its claim (unpreserve it).
    """


@rule(
    "claimed-twice",
    Severity.ERROR,
    "clients",
    """
    Each of the two restores the memory. Whoever comes first takes the stamps off its pages. The
    other one finds none: kho_restore_page() warns, which panics a kernel with panic_on_warn, and
    the restore fails (a memfd cannot be retrieved, an area of vmalloc is NULL). To finish a session
    whose files nobody has retrieved restores their memory, too, and frees it. In this kernel each
    block has one mark for both: as soon as one of them unpreserves it, it is not preserved for the
    other. Have one of the two give up its claim (unpreserve it, or close the session).
    """,
    kernel="kho_restore_page kho_restore_vmalloc memfd_luo_retrieve memfd_luo_finish",
)
def claimed_twice(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """Two owners lead to the same pages: each of them will restore these."""
    for both in shared(facts.outgoing, facts.abi.page_shift):
        if {both.one.kind, both.other.kind} == {OwnerKind.FDT, OwnerKind.SUBTREE}:
            # bad-fdt speaks of it.
            continue
        pages = "page" if both.pages == 1 else f"{both.pages:,} pages"
        said = f"{both.one} and {both.other} lead to the same {pages}"
        why = "" if facts.abi.stamp.has_magic else _RESTORED_TWICE
        yield Message(said, both.phys, explain=why)


#: What broken-luo means where an FDT leads to arrays.
_BROKEN_ARRAYS = """
    The next kernel reads the FDT early in its boot, and panics if a node or a property is missing.
    It follows the addresses and counts in the arrays without a check when /dev/liveupdate is opened
    first: it oopses, or takes garbage for sessions and files. A session or a file that it cannot
    read never comes back to whoever waits for it. Somebody wrote over LUO's memory. Do not kexec;
    close the session and make it again.
    """


@rule(
    "broken-luo",
    Severity.ERROR,
    "clients",
    """
    The next kernel reads these structures before anything else. kho_block_set_restore() panics it
    if a chain loops or its counts are wrong. A session or a file that it cannot read never comes
    back to whoever waits for it. Somebody wrote over LUO's memory. Do not kexec; close the session
    and make it again.
    """,
    kernel="luo_early_startup kho_block_set_restore luo_session_deserialize memfd_luo_retrieve",
)
def broken_luo(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """What LUO hands over is malformed: its lists, a session, a file or a memfd."""
    luo = facts.outgoing.luo
    if luo is None:
        return
    explain = _BROKEN_ARRAYS if luo.compatible == LUO_FDT_COMPATIBLE else ""
    for problem in luo.problems:
        yield Message(f"LUO: {problem}", luo.phys, explain)
    for message in _session_trouble(luo):
        yield replace(message, explain=explain)


def malformed(luo: Luo | None) -> Iterator[str]:
    """Which parts of LUO could not be followed to their end, in words."""
    if luo is not None:
        yield from luo.problems
        yield from (message.text for message in _session_trouble(luo))


def _session_trouble(luo: Luo) -> Iterator[Message]:
    for session in luo.sessions:
        yield from (Message(f"{session}: {problem}") for problem in session.problems)
        for file in session.files:
            token = f"{session}, {file}"
            yield from (Message(f"{token}: {problem}") for problem in file.problems)
            if file.memfd is not None:
                phys = file.memfd.phys
                yield from (Message(f"{token}: {each}", phys) for each in file.memfd.problems)


def _not_preserved(pages: int) -> str:
    return "1 page is not preserved" if pages == 1 else f"{pages:,} pages are not preserved"


def _as_added(facts: Snapshot, keys: KeySet) -> KeySet:
    """The tree as it would be if it had kept the order bits of single pages."""
    leaves = keys.leaves
    lost = lost_orders(facts, leaves)
    if not lost.any():
        return keys
    bit = np.uint64(1 << facts.abi.order_0_log2)
    with_bits = Leaves(leaves.key[lost] | bit, leaves.bitmap[lost])
    abi = replace(facts.abi, tree_max_depth=facts.abi.tree_max_depth + 1)
    return KeySet(abi, [leaves[~lost], with_bits])


def _uncovered(
    facts: Snapshot, keys: KeySet, kinds: set[OwnerKind]
) -> Iterator[tuple[int, int, int, str]]:
    """
    Memory of the owners of some kinds that lies in no preserved block.

    :return: owner, how many of its pages, the first one's address, and the rule that explains it.
    """
    meant = _as_added(facts, keys)
    bare = {owner for owner, *_ in _bare(facts, meant, kinds)} if meant is not keys else None
    for owner, pages, first in _bare(facts, keys, kinds):
        yield owner, pages, first, "" if bare is None or owner in bare else ORDER_LOST


def _bare(facts: Snapshot, keys: KeySet, kinds: set[OwnerKind]) -> Iterator[tuple[int, int, int]]:
    """
    Memory of the owners of some kinds that lies in no preserved block.

    :return: owner, how many of its pages, and the first one's address.
    """
    side = facts.outgoing
    wanted = np.array([owner.kind in kinds for owner in side.owners], np.bool_)
    if not wanted.any():
        return
    every = Claims.concatenate(claims[wanted[claims.owner]] for claims in side.claims)
    every = every[every.size > 0]
    every = every[np.argsort(every.phys, kind="stable")]
    shift = np.uint64(facts.abi.page_shift)
    start = every.phys >> shift
    last = every.phys + np.minimum(every.size - np.uint64(1), ~every.phys)
    end = (last >> shift) + np.uint64(1)
    reach = np.maximum.accumulate(end)
    covered = np.zeros(len(every), np.uint64)
    first = start.copy()
    for run in keys.runs():
        if not len(run[0]):
            continue
        low = int(np.searchsorted(reach, run[0][0], "right"))
        high = int(np.searchsorted(start, run[1][-1]))
        near = low + np.flatnonzero(end[low:high] > run[0][0])
        covered[near] += _below(run, end[near]) - _below(run, start[near])
        first[near] = _behind(run, first[near])
    missing = end - start - covered
    bare = missing > 0
    pages = np.zeros(len(side.owners), np.uint64)
    lowest = np.full(len(side.owners), np.uint64(2**64 - 1))
    np.add.at(pages, every.owner[bare], missing[bare])
    np.minimum.at(lowest, every.owner[bare], first[bare])
    for owner in np.flatnonzero(pages).tolist():
        yield owner, int(pages[owner]), int(lowest[owner]) << int(shift)


def _below(run: Run, pfn: U64) -> U64:
    """How many pages of some runs lie below each pfn."""
    start, end = run
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(end - start, dtype=np.uint64)])
    at = np.searchsorted(start, pfn, "right")
    within = np.maximum(at, 1) - 1
    over = np.where(at > 0, end[within] - np.minimum(end[within], pfn), np.uint64(0))
    return total[at] - over


def _behind(run: Run, pfn: U64) -> U64:
    """Each pfn, or the first one behind the run that it lies in."""
    start, end = run
    at = np.searchsorted(start, pfn, "right")
    within = np.maximum(at, 1) - 1
    return np.where((at > 0) & (end[within] > pfn), end[within], pfn)
