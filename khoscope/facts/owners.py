# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who owns the preserved blocks: each block against what the owners claim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64
from .clients import Claims, Owner, OwnerKind, Vmalloc
from .columns import Blocks
from .snapshot import Side, Snapshot

K = TypeVar("K")

#: In place of an owner: the owner is not known.
UNKNOWN: Final = -1


class Owners:
    """
    Looks up owners by address.

    All claims are in memory: 20 bytes for each run of neighbouring pages of one owner.
    """

    def __init__(self, owners: Sequence[Owner], claims: Iterable[Claims], page_shift: int) -> None:
        self.owners = owners
        self._page_shift = page_shift
        every = Claims.concatenate(claims)
        every = every[every.size > 0]
        every = every[np.argsort(every.phys, kind="stable")]
        self._start = every.phys
        # The claims of a corrupt structure may reach beyond all memory.
        self._end = every.phys + np.minimum(every.size, ~every.phys)
        self._owner = every.owner.astype(np.int64)
        # Claims may overlap.  Of those that begin before an address, take the one that reaches
        # furthest.
        self._reach = np.maximum.accumulate(self._end) if len(every) else self._end
        furthest = np.where(self._end == self._reach, np.arange(len(every)), 0)
        self._furthest = self._owner[np.maximum.accumulate(furthest)]

    @classmethod
    def of_side(cls, side: Side, page_shift: int) -> Owners:
        return cls(side.owners, side.claims, page_shift)

    def at(self, start: U64, end: U64) -> NDArray[np.int64]:
        """
        For each span [start, end), the index of an owner that claims some of it, or UNKNOWN.

        If several do, take the one whose claim begins last, if that claim reaches into the span: so
        one wrong size does not take away what others have.
        """
        last = np.searchsorted(self._start, end, "left").astype(np.int64) - 1
        owner = np.full(len(start), UNKNOWN, np.int64)
        # A span in front of all claims has -1.
        found = last >= 0
        found[found] = self._reach[last[found]] > start[found]
        last = last[found]
        near = self._end[last] > start[found]
        owner[found] = np.where(near, self._owner[last], self._furthest[last])
        return owner

    def of(self, blocks: Blocks) -> NDArray[np.int64]:
        """The owner of each block: its index, or UNKNOWN."""
        return self.at(blocks.phys, blocks.end(self._page_shift))

    def name(self, owner: int) -> str:
        """An owner for people."""
        return "unknown" if owner == UNKNOWN else str(self.owners[owner])


@dataclass(frozen=True)
class Preservers:
    """
    Who was seen preserving blocks.

    :param owners: of kind CALLER.
    :param key: u64, radix keys, sorted.
    :param owner: i64, index into ``owners`` for each key.
    """

    owners: Sequence[Owner]
    key: U64
    owner: NDArray[np.int64]


NOBODY: Final = Preservers((), np.zeros(0, np.uint64), np.zeros(0, np.int64))


class BlockOwners:
    """
    Who owns each outgoing block, from all sources.

    The sources are, in this order: the structures that lead to it, the type of its first page
    (slab), and who was seen preserving it.
    """

    def __init__(self, facts: Snapshot, callers: Preservers = NOBODY) -> None:
        self._facts = facts
        self._claimed = Owners.of_side(facts.outgoing, facts.abi.page_shift)
        self._callers = callers
        self._slab = len(self._claimed.owners)
        #: All possible owners.
        self.owners = [*self._claimed.owners, Owner(OwnerKind.SLAB, "slab"), *callers.owners]

    def of(self, blocks: Blocks) -> NDArray[np.int64]:
        """The owner of each block: its index in :attr:`owners`, or UNKNOWN."""
        owner = self._claimed.of(blocks)
        types = self._facts.kernel.page_types
        slab = [number for number, name in types.items() if name == "slab"]
        top = blocks.facts.page_type >> np.uint32(24)
        owner[(owner == UNKNOWN) & np.isin(top, slab) & (blocks.facts.unread == 0)] = self._slab
        seen = np.searchsorted(self._callers.key, blocks.key)
        there = (owner == UNKNOWN) & (seen < len(self._callers.key))
        there[there] = self._callers.key[seen[there]] == blocks.key[there]
        owner[there] = self._slab + 1 + self._callers.owner[seen[there]]
        return owner

    def blocks(self) -> Iterator[tuple[Blocks, NDArray[np.int64]]]:
        """All outgoing blocks with their owners, chunk by chunk."""
        for blocks in self._facts.outgoing.blocks:
            yield blocks, self.of(blocks)

    def totals(self) -> list[OwnerTotal]:
        """What each owner has, the largest first; blocks whose owner is not known come last."""
        count = np.zeros(len(self.owners) + 1, np.int64)
        pages = np.zeros(len(self.owners) + 1, np.uint64)
        for blocks, owner in self.blocks():
            np.add.at(count, owner, 1)
            np.add.at(pages, owner, blocks.page_count)
        # UNKNOWN (-1) indexes the last entry.
        found = [
            OwnerTotal(
                self.owners[i] if i < len(self.owners) else None, int(count[i]), int(pages[i])
            )
            for i in np.flatnonzero(count).tolist()
        ]
        return sorted(found, key=lambda holding: (holding.owner is None, -holding.pages))


@dataclass(frozen=True)
class OwnerTotal:
    """
    What an owner has.

    :param owner: None: not known.
    """

    owner: Owner | None
    blocks: int
    pages: int


@dataclass(frozen=True)
class FolioTotal:
    """
    Folios of several pages that are preserved and that one owner has.

    :param owner: None: not known.
    :param shared: how many of the pages share their struct pages with others (HVO).
    :param first: the lowest of their addresses, a few of them.
    """

    owner: Owner | None
    folios: int
    pages: int
    shared: int
    first: list[int]


#: Owners of which it matters that they have folios: nothing says that they restore folios.
#: Memfds, LUO, KHO's own client and whoever has a blob made by ``kho_alloc_preserve()`` do.
FOLIOS_OF: Final = frozenset({OwnerKind.SLAB, OwnerKind.VM_STRUCT, OwnerKind.VMALLOC_PAGE})


class FolioTally:
    """Counts the folios among preserved blocks, chunk by chunk, for :data:`FOLIOS_OF`."""

    #: How many addresses are kept of each owner.
    KEPT: Final = 3

    def __init__(self, facts: Snapshot) -> None:
        self._owners = BlockOwners(facts)
        every = self._owners.owners
        # UNKNOWN (-1) indexes the last entry.
        self._counts = np.array([*(owner.kind in FOLIOS_OF for owner in every), True], np.bool_)
        self._folios = np.zeros(len(self._counts), np.int64)
        self._pages = np.zeros(len(self._counts), np.uint64)
        self._shared = np.zeros(len(self._counts), np.int64)
        self._first: dict[int, U64] = {}

    def add(self, blocks: Blocks) -> None:
        """Look at the next chunk."""
        folios = blocks.by_look(_are_folios)
        if not folios.any():
            return
        blocks = blocks[folios]
        owner = self._owners.of(blocks)
        counts = self._counts[owner]
        blocks, owner = blocks[counts], owner[counts]
        np.add.at(self._folios, owner, 1)
        np.add.at(self._pages, owner, blocks.page_count)
        np.add.at(self._shared, owner, blocks.shared)
        for each in np.unique(owner).tolist():
            known = self._first.get(each, np.zeros(0, np.uint64))
            phys = np.append(known, blocks.phys[owner == each])
            self._first[each] = np.sort(phys)[: self.KEPT]

    def totals(self) -> list[FolioTotal]:
        """One for each owner that has folios; those whose owner is not known come last."""
        return [
            FolioTotal(
                None if owner == UNKNOWN else self._owners.owners[owner],
                int(self._folios[owner]),
                int(self._pages[owner]),
                int(self._shared[owner]),
                self._first[owner].tolist(),
            )
            for owner in sorted(self._first, key=lambda owner: (owner == UNKNOWN, owner))
        ]


def _are_folios(blocks: Blocks) -> NDArray[np.bool_]:
    facts = blocks.facts
    folio = (facts.compound > 0) & (facts.compound == blocks.order)
    return folio & (facts.unread == 0) & (facts.free == 0)


def claimed(side: Side) -> list[tuple[Owner, int]]:
    """How many bytes each owner claims."""
    sizes = np.zeros(len(side.owners), np.uint64)
    for claims in side.claims:
        np.add.at(sizes, claims.owner, claims.size)
    return list(zip(side.owners, sizes.tolist(), strict=True))


@dataclass(frozen=True)
class Shared:
    """
    Memory that two owners lead to.

    :param phys: ``phys_addr_t`` of the first byte.
    :param pages: how many pages it has.
    """

    one: Owner
    other: Owner
    phys: int
    pages: int


def shared(side: Side, page_shift: int) -> list[Shared]:
    """
    What owners claim that somebody else claims, too, each pair of owners once, sorted by address.

    If more than two claim the same, each of them is in a pair, but not with all others.  Areas of
    vmalloc are left out: who maps memory does not lead the next kernel to it.
    """
    # An owner may be listed more than once.
    number: dict[Owner, int] = {}
    same = [number.setdefault(owner, i) for i, owner in enumerate(side.owners)]
    leads = np.array([owner.kind != OwnerKind.VM_STRUCT for owner in side.owners], np.bool_)
    every = Claims.concatenate(side.claims)
    every = every[leads[every.owner] & (every.size > 0)]
    start, end, owner = _united(every, np.array(same, np.int64)[every.owner])
    by = np.argsort(start, kind="stable")
    start, end, owner = start[by], end[by], owner[by]
    # Of the claims that begin before another one, take the one that reaches furthest.
    reach = np.maximum.accumulate(end)
    furthest = np.maximum.accumulate(np.where(end == reach, np.arange(len(end)), 0))
    late = np.flatnonzero(start[1:] < reach[:-1]) + 1
    early = furthest[late - 1]
    shift = np.uint64(page_shift)
    last = np.minimum(end[late], reach[late - 1]) - np.uint64(1)
    pages = (last >> shift) - (start[late] >> shift) + np.uint64(1)
    pair = np.minimum(owner[early], owner[late]) << 32 | np.maximum(owner[early], owner[late])
    pairs, first, where = np.unique(pair, return_index=True, return_inverse=True)
    total = np.zeros(len(pairs), np.uint64)
    np.add.at(total, where, pages)
    found = zip(pairs.tolist(), start[late][first].tolist(), total.tolist(), strict=True)
    return sorted(
        (
            Shared(side.owners[both >> 32], side.owners[both & (1 << 32) - 1], phys, count)
            for both, phys, count in found
        ),
        key=lambda each: each.phys,
    )


def _united(claims: Claims, owner: NDArray[np.int64]) -> tuple[U64, U64, NDArray[np.int64]]:
    """Start, end and owner of claims, sorted by owner; those of one owner are apart."""
    by = np.lexsort((claims.phys, owner))
    start, owner = claims.phys[by], owner[by]
    # The claims of a corrupt structure may reach beyond all memory.
    end = start + np.minimum(claims.size[by], ~start)
    # The furthest end so far of this owner: the ends' ranks are higher for each next owner.
    ends, rank = np.unique(end, return_inverse=True)
    reach = np.maximum.accumulate(owner * len(end) + rank) - owner * len(end)
    begins = np.ones(len(start), np.bool_)
    begins[1:] = (owner[1:] != owner[:-1]) | (start[1:] > ends[reach[:-1]])
    closes = np.append(begins[1:], np.ones(min(len(start), 1), np.bool_))
    return start[begins], ends[reach[closes]], owner[begins]


class ClaimsByOwner:
    """The memory of a side's owners, by owner."""

    def __init__(self, side: Side, page_shift: int) -> None:
        self._page_shift = page_shift
        every = Claims.concatenate(side.claims)
        self._claims = every[np.argsort(every.owner, kind="stable")]
        self._starts = np.searchsorted(self._claims.owner, np.arange(len(side.owners) + 1))
        self._owners = side.owners

    @cached_property
    def _by_name(self) -> dict[tuple[OwnerKind, str], list[int]]:
        return self._numbers(lambda owner: (owner.kind, owner.name))

    @cached_property
    def _by_token(self) -> dict[tuple[OwnerKind, str | None, int | None], list[int]]:
        return self._numbers(lambda owner: (owner.kind, owner.session, owner.token))

    @cached_property
    def _by_session(self) -> dict[str | None, list[int]]:
        return self._numbers(lambda owner: owner.session)

    def _numbers(self, key: Callable[[Owner], K]) -> dict[K, list[int]]:
        found: dict[K, list[int]] = {}
        for number, each in enumerate(map(key, self._owners)):
            found.setdefault(each, []).append(number)
        return found

    def chunks(self, area: Vmalloc) -> Claims:
        """The chunks of a vmalloc area."""
        return self._of(self._by_name.get((OwnerKind.VMALLOC_CHUNK, area.name)))

    def pages(self, area: Vmalloc) -> Claims:
        """The pages that the chunks of a vmalloc area list."""
        return self._of(self._by_name.get((OwnerKind.VMALLOC_PAGE, area.name)))

    def folios(self, session: str, token: int) -> Claims:
        """The folios of a memfd."""
        return self._of(self._by_token.get((OwnerKind.MEMFD, session, token)))

    def session_bytes(self, session: str) -> int:
        """How many bytes of whole pages a LUO session preserves, its own lists included."""
        return int(self._bytes[self._by_session.get(session, [])].sum())

    @cached_property
    def _bytes(self) -> U64:
        """u64, bytes of the whole pages that each owner claims."""
        low = np.uint64((1 << self._page_shift) - 1)
        claims = self._claims
        end = (claims.phys + claims.size + low) & ~low
        found = np.zeros(len(self._owners), np.uint64)
        np.add.at(found, claims.owner, end - (claims.phys & ~low))
        return found

    def _of(self, owners: Sequence[int] | None) -> Claims:
        return Claims.concatenate(
            self._claims[self._starts[i] : self._starts[i + 1]] for i in owners or ()
        )
