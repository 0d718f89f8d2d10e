# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about what KHO's clients hand over, and whether all of it is preserved."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..abi import U64
from ..clients import Claims, Kind, Luo
from ..columns import CHUNK_BLOCKS
from ..snapshot import KeySet, Snapshot
from .kernel import misplaced
from .rule import Message, Severity, rule

#: Owners whose memory the next kernel looks for.  The blobs of subtrees are looked at by
#: themselves, vmalloc areas by broken-vmalloc.
NEEDED = {
    *(Kind.FDT, Kind.LUO, Kind.SESSION, Kind.FILE, Kind.MEMFD, Kind.RESERVE_MEM, Kind.KHO_TEST)
}


@rule(
    "blob-not-preserved",
    Severity.ERROR,
    "clients",
    """
    kho_add_subtree() records where a blob is and preserves nothing, and LUO's structures are
    addresses, too. The next kernel follows them to memory that it has given to somebody else by
    then: it reads garbage, and acts on it. Preserve all of it (kho_alloc_preserve(),
    kho_preserve_folio()) before handing out its address, and as long as that is known.
    """,
    kernel="kho_add_subtree kho_retrieve_subtree",
)
def blob_not_preserved(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """A subtree's blob, or memory that a client's structures lead to, is not wholly covered by
    preserved blocks."""
    fdt = facts.outgoing.fdt
    for subtree in fdt.subtrees:
        start, size = subtree.phys, subtree.size
        if start is None or not size or misplaced(facts, fdt, subtree):
            continue
        if not keys.covers(start, size):
            what = f"the blob of subtree {subtree.name!r} ({size:,} bytes)"
            yield Message(f"{what} is not, or not wholly, preserved", start)
    for owner, pages, first in _uncovered(facts, keys, NEEDED):
        yield Message(f"{facts.outgoing.owners[owner].name}: {_not_preserved(pages)}", first)


@rule(
    "broken-vmalloc",
    Severity.ERROR,
    "clients",
    """
    kho_restore_vmalloc() follows the chunks without a check and restores each page that they list.
    A chain that leaves RAM crashes the next kernel. If it loops, lists other pages than it says, or
    one that was not preserved, the whole area is given up, most often without a word, and what was
    restored of it until then leaks. Do not kexec; unpreserve the area (kho_unpreserve_vmalloc())
    and preserve it again.
    """,
    kernel="kho_restore_vmalloc",
)
def broken_vmalloc(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """A vmalloc chunk chain that loops, leaves RAM, or lists pages that are not preserved."""
    for area in facts.outgoing.vmallocs:
        for problem in area.problems:
            yield Message(f"{area.name}: {problem}", area.phys)
    for owner, pages, first in _uncovered(facts, keys, {Kind.VMALLOC_CHUNK, Kind.VMALLOC_PAGE}):
        whose = facts.outgoing.owners[owner]
        yield Message(f"{whose.name}, {whose.kind}s: {_not_preserved(pages)}", first)


@rule(
    "broken-luo",
    Severity.ERROR,
    "clients",
    """
    The next kernel reads these structures first of all: kho_block_set_restore() panics it over a
    chain that loops or whose counts are wrong, and a session or a file that cannot be read is never
    given back to whoever waits for it. Somebody wrote over LUO's memory. Do not kexec; close the
    session and make it again.
    """,
    kernel="luo_early_startup kho_block_set_restore luo_session_deserialize memfd_luo_retrieve",
)
def broken_luo(facts: Snapshot, keys: KeySet) -> Iterator[Message]:
    """What LUO hands over is malformed: its chains, a session, a file or a memfd."""
    luo = facts.outgoing.luo
    if luo is not None:
        yield from (Message(f"LUO: {problem}", luo.phys) for problem in luo.problems)
        yield from _session_trouble(luo)


def _session_trouble(luo: Luo) -> Iterator[Message]:
    for session in luo.sessions:
        name = f"session {session.name!r}"
        yield from (Message(f"{name}: {problem}") for problem in session.problems)
        for file in session.files:
            token = f"{name}, token {file.token:#x}"
            yield from (Message(f"{token}: {problem}") for problem in file.problems)
            if file.memfd is not None:
                phys = file.memfd.phys
                yield from (Message(f"{token}: {each}", phys) for each in file.memfd.problems)


def _not_preserved(pages: int) -> str:
    return "1 page is not preserved" if pages == 1 else f"{pages:,} pages are not preserved"


def _uncovered(facts: Snapshot, keys: KeySet, kinds: set[Kind]) -> Iterator[tuple[int, int, int]]:
    """
    Memory of the owners of some kinds that lies in no preserved block.

    :return: owner, how many of its pages, and the first one's address.
    """
    side = facts.outgoing
    wanted = np.array([owner.kind in kinds for owner in side.owners], np.bool_)
    if not wanted.any():
        return
    found: dict[int, tuple[int, int]] = {}
    for claims in side.claims:
        for owner, phys in _pages(facts, claims[wanted[claims.owner]]):
            bare = ~keys.covered(phys)
            whose, at, counts = np.unique(owner[bare], return_index=True, return_counts=True)
            for index, first, count in zip(
                whose.tolist(), phys[bare][at].tolist(), counts.tolist(), strict=True
            ):
                pages, lowest = found.get(index, (0, first))
                found[index] = pages + count, lowest
    for index, (pages, first) in sorted(found.items()):
        yield index, pages, first


def _pages(facts: Snapshot, claims: Claims) -> Iterator[tuple[NDArray[np.uint32], U64]]:
    """The pages of some claims with their owners, CHUNK_BLOCKS at a time."""
    shift = np.uint64(facts.abi.page_shift)
    claims = claims[claims.size > 0]
    last = claims.phys + np.minimum(claims.size - np.uint64(1), ~claims.phys)
    # Nobody has more than all there is: a corrupt size must not keep us for ever.
    most = np.uint64(int((facts.ram[:, 1] - facts.ram[:, 0]).sum()) >> facts.abi.page_shift)
    count = np.minimum((last >> shift) - (claims.phys >> shift) + np.uint64(1), most)
    ends = np.cumsum(count.astype(np.int64))
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, CHUNK_BLOCKS):
        page = np.arange(start, min(start + CHUNK_BLOCKS, total), dtype=np.int64)
        row = np.searchsorted(ends, page, "right")
        index = (page - (ends[row] - count[row].astype(np.int64))).astype(np.uint64)
        yield claims.owner[row], ((claims.phys[row] >> shift) + index) << shift
