# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Follow the structures that KHO's clients hand over, and note whose memory they lead to.

All of it is physical memory that may be stale, moving or hostile.  khoscope follows only addresses
that are aligned and in RAM, bounds every chain, and notes what is wrong as a problem in words.
Kernel sources: kexec_handover.c (vmalloc), kho_block.c, mm/memfd_luo.c, lib/test_kho.c and
mm/memblock.c (reserve_mem).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64, Abi
from ..abi.kho_fdt import Fdt, kho_test_folios, reserve_mem_areas
from ..abi.serialized import (
    KHO_BLOCK_HEADER_SER,
    KHO_MAX_BLOCKS,
    KHO_TEST,
    KHO_VMALLOC,
    KHO_VMALLOC_FLAGS,
    MEMFD_COMPATIBLE,
    MEMFD_LUO_FOLIO_SER,
    MEMFD_PFN_BITS,
    MEMFDS,
    Array,
    unpack,
)
from ..facts.clients import Claims, Memfd, Owner, OwnerKind, Vmalloc
from ..facts.tree import KeySet
from .walk import READ_SIZE, ReadPhys, in_ranges, read_near

I64 = NDArray[np.int64]

#: How many claims one chunk has: a snapshot file limits the size of chunks.
CLAIMS_KEPT: Final = 1 << 20

_KNOWN_FLAGS: Final = sum(KHO_VMALLOC_FLAGS)

#: What of a memfd has owners of its own: their kinds, and what they are.
_PARTS: Final = (
    (None, "memfd_luo_ser"),
    (OwnerKind.VMALLOC_CHUNK, "folio list"),
    (OwnerKind.VMALLOC_PAGE, "folio list"),
    (OwnerKind.MEMFD, "data"),
)


@dataclass(frozen=True)
class _Areas:
    """
    Areas of vmalloc, and what their chunks list.

    :param listed: u64, addresses, area after area: those in front of the first that is no page.
    :param of: i64, which area each of them is of.
    :param size: u64, bytes of an entry of each area.
    :param claims: number, address and size of each claim: the chunks of area n have the number 2n,
        its pages 2n + 1.
    """

    areas: list[Vmalloc]
    listed: U64
    of: I64
    size: U64
    claims: tuple[I64, U64, U64]


@dataclass(frozen=True)
class _Chunks:
    """
    The chunks of several chains, chain after chain.

    :param pages: the bytes of each.
    :param count: how many each chain has.
    :param phys: u64, ``phys_addr_t`` of those that belong to it.
    :param of: i64, which chain each of these is of.
    """

    pages: list[bytes]
    count: list[int]
    phys: U64
    of: I64


@dataclass(frozen=True)
class _Folios:
    """
    The folios of memfds.

    :param of: i64, which memfd each piece of memory is of.
    :param phys: u64, address of each piece.
    :param size: u64, its bytes.
    :param pages: pages of each memfd.
    :param problems: of those that have some.
    """

    of: I64
    phys: U64
    size: U64
    pages: list[int]
    problems: dict[int, list[str]]


@dataclass
class ClientWalker:
    """
    The memory of one side's clients.

    The size of RAM bounds the work, whatever memory holds: no page is followed twice, and no more
    folios are looked at than RAM has pages.

    :param ram: u64, shape (n, 2): where structures may be.
    :param owners: the owners that were found.
    :param keys: of the tree, which knows how large a folio is; None: not available.
    """

    abi: Abi
    ram: U64
    read: ReadPhys
    owners: list[Owner] = field(default_factory=list)
    vmallocs: list[Vmalloc] = field(default_factory=list)
    keys: KeySet | None = None
    _claims: list[Claims] = field(default_factory=list)
    #: Pages of chains that were followed: no page is in two chains, or twice in one.
    _followed: set[int] = field(default_factory=set)
    #: Pages that were read before somebody asks for them.
    _ahead: dict[int, bytes | None] = field(default_factory=dict)
    #: Folios of files that were looked at.
    _folios_seen: int = 0

    @cached_property
    def ram_pages(self) -> int:
        """Pages of RAM."""
        return int((self.ram[:, 1] - self.ram[:, 0]).sum()) >> self.abi.page_shift

    def claims(self) -> list[Claims]:
        """What the owners have, sorted by address, neighbours of one owner joined; in chunks."""
        every = Claims.concatenate(self._claims)
        joined = join(every[np.lexsort((every.owner, every.phys))])
        return [joined[at : at + CLAIMS_KEPT] for at in range(0, len(joined), CLAIMS_KEPT)]

    def claim(self, owner: Owner, phys: int | U64, size: int | U64) -> None:
        """
        Note who owns this memory; addresses and bytes.  Successive claims may have the same owner.
        """
        if not np.size(phys):
            return
        if not self.owners or self.owners[-1] != owner:
            self.owners.append(owner)
        at, length = np.broadcast_arrays(
            np.atleast_1d(np.asarray(phys, np.uint64)), np.asarray(size, np.uint64)
        )
        index = np.full(len(at), len(self.owners) - 1, np.uint32)
        self._claims.append(join(Claims(at, length, index)))

    def claim_each(self, owner: Callable[[int], Owner], number: I64, phys: U64, size: U64) -> None:
        """
        Note whose many pieces of memory are.

        :param owner: the owner of a number.  They are listed in the order of their numbers.
        :param number: of the owner of each piece.
        """
        if not len(number):
            return
        has = np.flatnonzero(np.bincount(number))
        index = np.zeros(int(number.max()) + 1, np.uint32)
        index[has] = len(self.owners) + np.arange(len(has))
        self.owners += map(owner, has.tolist())
        self._claims.append(join(Claims(phys, size, index[number])))

    def sort_owners(self, start: int, key: Callable[[Owner], int]) -> None:
        """List the owners from the start-th on in another order."""
        by = sorted(range(start, len(self.owners)), key=lambda number: key(self.owners[number]))
        number = np.arange(len(self.owners), dtype=np.uint32)
        number[by] = number[start:].copy()
        self.owners[start:] = [self.owners[each] for each in by]
        self._claims = [replace(each, owner=number[each.owner]) for each in self._claims]

    def structure(self, phys: int, layout: np.dtype[np.void]) -> np.void | None:
        """The structure at an address; None: it is not in RAM, or cannot be read."""
        raw = self.bytes_at(phys, layout.itemsize)
        return None if raw is None else unpack(layout, raw)

    def bytes_at(self, phys: int, size: int) -> bytes | None:
        """The bytes at an address; None: they are not in RAM, or cannot be read."""
        return self.read(phys, size) if self.in_ram(phys, size) else None

    def in_ram(self, phys: int, size: int) -> bool:
        """Whether memory lies in RAM; addresses and bytes."""
        starts, ends = self._ram_bounds
        at = bisect_right(starts, phys) - 1
        return at >= 0 and phys < phys + size <= ends[at]

    @cached_property
    def _ram_bounds(self) -> tuple[list[int], list[int]]:
        return self.ram[:, 0].tolist(), self.ram[:, 1].tolist()

    def page(self, phys: int) -> bytes | None:
        """A page; None likewise, or if the address is not aligned to a page."""
        if phys % self.abi.page_size:
            return None
        ahead = self._ahead.pop(phys, None)
        return self.bytes_at(phys, self.abi.page_size) if ahead is None else ahead

    def _read_ahead(self, phys: U64) -> None:
        """Read pages together that :meth:`page` is going to be asked for one by one."""
        size = self.abi.page_size
        at = np.unique(phys[self.are_pages(phys, size)]).tolist()
        self._ahead = dict(zip(at, read_near(self.read, at, [size] * len(at)), strict=True))

    def are_pages(self, phys: U64, size: int | U64) -> NDArray[np.bool_]:
        """Which addresses are aligned to pages and begin this much memory in RAM."""
        end = phys + np.asarray(size, np.uint64)
        return in_ranges(self.ram, phys, end) & (phys % np.uint64(self.abi.page_size) == 0)

    def _chain(
        self, first: int, what: str, limit: int, problems: list[str]
    ) -> Iterator[tuple[int, bytes]]:
        """
        The pages of a chain, as far as it can be followed, each with its address.

        :param first: ``phys_addr_t``; 0: there is none.  Each page begins with the address of the
            next.
        :param what: what its pages are, for problems.
        :param limit: how many pages it may have.
        """
        at, count = first, 0
        while at:
            if at in self._followed:
                problems.append(f"{what} {count} at {at:#x} was there before: the chain loops")
                return
            if count == limit:
                problems.append(f"the chain goes on after {limit} {what}s: it can have no more")
                return
            raw = self.page(at)
            if raw is None:
                problems.append(f"{what} {count} at {at:#x} is no readable page in RAM")
                return
            self._followed.add(at)
            yield at, raw
            at = int.from_bytes(raw[:8], "little")
            count += 1

    # -- vmalloc ----------------------------------------------------------------------------------

    def vmalloc(self, desc: np.void, phys: int, whose: Owner) -> tuple[Vmalloc, U64]:
        """
        Follow a ``struct kho_vmalloc``, as ``kho_restore_vmalloc`` does.

        :param phys: where the structure is.
        :param whose: its owner; what it leads to gets owners of its own, named after this one.
        :return: the area, and the addresses that its chunks list, u64, up to the first that is no
            page.
        """
        areas = self._areas(np.array([desc], KHO_VMALLOC), [phys], [whose])
        kinds = (OwnerKind.VMALLOC_CHUNK, OwnerKind.VMALLOC_PAGE)
        self.claim_each(lambda kind: replace(whose, kind=kinds[kind]), *areas.claims)
        return areas.areas[0], areas.listed

    def _areas(self, descs: NDArray[np.void], phys: list[int], whose: list[Owner]) -> _Areas:
        """Follow each ``struct kho_vmalloc`` of an array, one after the other."""
        number = len(descs)
        problems: list[list[str]] = [[] for _ in range(number)]
        order = descs["order"].astype(np.int64)
        for i in np.flatnonzero(order > self.abi.max_page_order).tolist():
            problems[i].append(f"order {order[i]} is more than the page allocator has")
            order[i] = 0
        for i in np.flatnonzero(descs["flags"] & ~np.uint16(_KNOWN_FLAGS)).tolist():
            unknown = int(descs["flags"][i]) & ~_KNOWN_FLAGS
            problems[i].append(f"flags {unknown:#x} are unknown: they are not restored")
        per_chunk = self.abi.page_size // 8 - 1
        # The kernel adds a chunk as soon as the last one is full, so the last may be empty.
        limit = np.minimum(descs["total_pages"] >> order, self.ram_pages) // per_chunk + 1
        chunks = self._chunks(descs["first"], limit.tolist(), problems)
        of, entries = _entries(chunks.pages, np.repeat(np.arange(number), chunks.count), per_chunk)
        size = np.uint64(self.abi.page_size) << order.astype(np.uint64)
        good = self._good(of, entries, size[of], problems)
        listed = np.bincount(of, minlength=number) << order
        for i in np.flatnonzero(listed != descs["total_pages"]).tolist():
            total = descs["total_pages"][i]
            problems[i].append(f"lists {listed[i]} pages, total_pages is {total}")
        chunk_size = np.full(len(chunks.phys), self.abi.page_size, np.uint64)
        claims = (
            np.concatenate([2 * chunks.of, 2 * of[good] + 1]),
            np.concatenate([chunks.phys, entries[good]]),
            np.concatenate([chunk_size, size[of[good]]]),
        )
        first, total, flags = (descs[name].tolist() for name in ("first", "total_pages", "flags"))
        names = [owner.name for owner in whose]
        said = (first, total, flags, order.tolist(), chunks.count, listed.tolist(), problems)
        areas = list(map(Vmalloc, names, phys, *said))
        self.vmallocs += areas
        sound = _in_front(of, ~good, number)
        return _Areas(areas, entries[sound], of[sound], size, claims)

    def _chunks(self, first: U64, limit: list[int], problems: list[list[str]]) -> _Chunks:
        """
        Follow chains of ``struct kho_vmalloc_chunk``, one after the other.

        :param first: u64, ``phys_addr_t`` of the first chunk of each.
        :param limit: how many chunks each may have.
        """
        if len(first) > 1:
            self._read_ahead(first)
        pages: list[bytes] = []
        count: list[int] = []
        phys: list[int] = []
        of: list[int] = []
        for i, begin in enumerate(first.tolist()):
            # That of another area, if somebody has copied its descriptor: then both lead to it.
            followed = begin in self._followed
            chain = list(self._chain(begin, "chunk", limit[i], problems[i]))
            pages += [raw for _, raw in chain]
            count.append(len(chain))
            mine = [begin] if followed else [at for at, _ in chain]
            phys += mine
            of += [i] * len(mine)
        return _Chunks(pages, count, np.array(phys, np.uint64), np.array(of, np.int64))

    def _good(
        self, of: I64, entries: U64, size: U64, problems: list[list[str]]
    ) -> NDArray[np.bool_]:
        """Which entries are pages in RAM that no other one of the same area lists."""
        good = self.are_pages(entries, size)
        outside, first = entries[~good], of[~good]
        for i, at, count in zip(*_runs(first), strict=True):
            said = f"{count} entries are no pages in RAM, the first {outside[at]:#x}"
            problems[i].append(said)
        apart = _apart(entries, size, of)
        twice = np.bincount(of[good & ~apart])
        for i in np.flatnonzero(twice).tolist():
            problems[i].append(f"{twice[i]} entries list pages that another one lists, too")
        return good & apart

    # -- blocks of entries ------------------------------------------------------------------------

    def block_set(
        self, head: int, layout: np.dtype[np.void], problems: list[str], written: bool
    ) -> tuple[U64, NDArray[Any]]:
        """
        Follow a chain of ``struct kho_block_header_ser``, as ``kho_block_set_restore`` does.

        :param head: ``phys_addr_t`` of the first; 0: there is none.
        :param layout: of its entries.
        :param written: the kernel has written the entries, as it does at the kexec; then no block
            is empty.
        :return: addresses of the blocks, and the entries that they say they have.
        """
        header = KHO_BLOCK_HEADER_SER.itemsize
        per_block = (self.abi.page_size - header) // layout.itemsize
        blocks: list[int] = []
        used: list[bytes] = []
        for at, raw in self._chain(head, "block", KHO_MAX_BLOCKS, problems):
            count = int.from_bytes(raw[8:header], "little")
            if not written <= count <= per_block:
                problems.append(f"block {at:#x} says to have {count} entries, {per_block} fit")
                count = 0
            blocks.append(at)
            used.append(raw[header : header + count * layout.itemsize])
        return np.array(blocks, np.uint64), np.frombuffer(b"".join(used), layout)

    # -- arrays of entries ------------------------------------------------------------------------

    def array(
        self, at: int, of: Array, count: int | None, problems: list[str]
    ) -> tuple[int, NDArray[Any]]:
        """
        The entries of a list that is one piece of memory.

        :param at: ``phys_addr_t``; 0: there is none.
        :param count: how many entries it has; None: its header says so.
        :return: bytes of the memory, and the entries; 0 and none if it is no memory in RAM, or was
            there before.
        """
        none = np.zeros(0, of.entry)
        size = self.room(at, of, problems)
        if not size:
            return 0, none
        if count is None:
            header = self.bytes_at(at, of.header)
            count = 0 if header is None else int.from_bytes(header, "little")
        fit = of.room(self.abi.page_size)
        if count > fit:
            problems.append(f"the array at {at:#x} says to have {count} entries, {fit} fit")
            return size, none
        raw = self.bytes_at(at, of.header + count * of.entry.itemsize)
        if raw is None:
            problems.append(f"the array at {at:#x} cannot be read")
            return size, none
        return size, np.frombuffer(raw, of.entry, count, of.header)

    def room(self, at: int, of: Array, problems: list[str]) -> int:
        """
        How many bytes the memory of an array has; 0: there is none.

        :param at: ``phys_addr_t``; 0: there is none.
        """
        size = of.pages * self.abi.page_size
        if not at:
            return 0
        if at % self.abi.page_size or not self.in_ram(at, size):
            problems.append(f"the array at {at:#x} does not lie in RAM")
            return 0
        pages = range(at, at + size, self.abi.page_size)
        # The kernel allocates, restores and frees each of them on its own.
        if not self._followed.isdisjoint(pages):
            problems.append(f"the array at {at:#x} lies where another list is")
            return 0
        self._followed.update(pages)
        return size

    # -- memfd ------------------------------------------------------------------------------------

    def memfd(self, phys: int, whose: Owner, handler: str = MEMFD_COMPATIBLE) -> Memfd | str:
        """
        Follow a ``struct memfd_luo_ser``.

        :param handler: the compatible of its file handler, one of MEMFDS.
        :return: the memfd, or why it cannot be read.
        """
        return self.memfds(handler, [phys], [whose])[0]

    def memfds(self, handler: str, phys: list[int], whose: list[Owner]) -> list[Memfd | str]:
        """Follow each ``struct memfd_luo_ser`` of a list, as :meth:`memfd` does."""
        layout = MEMFDS[handler]
        at = np.array(phys, np.uint64)
        there = np.flatnonzero(self.are_pages(at, layout.itemsize))
        raw = read_near(self.read, at[there].tolist(), [layout.itemsize] * len(there))
        there = there[[each is not None for each in raw]]
        ser = np.frombuffer(b"".join(filter(None, raw)), layout)
        at, owner = at[there], [whose[i] for i in there.tolist()]
        lists = np.flatnonzero(ser["nr_folios"])
        areas = self._areas(
            ser["folios"][lists],
            (at[lists] + np.uint64(layout.itemsize - KHO_VMALLOC.itemsize)).tolist(),
            [_named(owner[i], "folio list") for i in lists.tolist()],
        )
        folios = self._folios(ser[lists], areas)
        # Four owners: the structure, the chunks and pages of the list, and what it lists.
        number, claimed, size = areas.claims
        self.claim_each(
            lambda each: _owner_of(owner[each >> 2], each & 3),
            np.concatenate(
                [
                    4 * np.arange(len(ser)),
                    4 * lists[number >> 1] + 1 + (number & 1),
                    4 * lists[folios.of] + 3,
                ]
            ),
            np.concatenate([at, claimed, folios.phys]),
            np.concatenate([np.full(len(ser), layout.itemsize, np.uint64), size, folios.size]),
        )
        found: list[Memfd | str] = [
            f"struct memfd_luo_ser at {each:#x} is no readable page in RAM" for each in phys
        ]
        for i, memfd in zip(
            there.tolist(), _memfds(ser, at.tolist(), lists, areas.areas, folios), strict=True
        ):
            found[i] = memfd
        return found

    def folio_list(
        self, handler: str, phys: int
    ) -> tuple[np.void, Iterator[NDArray[np.void]]] | None:
        """
        A ``struct memfd_luo_ser``, and its ``struct memfd_luo_folio_ser``, some at a time.

        :param handler: the compatible of its file handler, one of MEMFDS.
        :param phys: ``phys_addr_t`` of the structure, whose memory has not been followed yet.
        :return: None: it cannot be read.
        """
        layout = MEMFDS[handler]
        if not self.are_pages(np.array([phys], np.uint64), layout.itemsize)[0]:
            return None
        ser = self.structure(phys, layout)
        if ser is None:
            return None
        lists = np.array([ser] if ser["nr_folios"] else [], layout)
        at = [phys + layout.itemsize - KHO_VMALLOC.itemsize] * len(lists)
        areas = self._areas(lists["folios"], at, [Owner(OwnerKind.FILE, "memfd")] * len(lists))
        looked = self._looked(lists["nr_folios"])
        return ser, (entries for entries, *_ in self._lists(areas, looked))

    def _folios(self, ser: NDArray[np.void], areas: _Areas) -> _Folios:
        """
        The folios of memfds.

        :param areas: that hold the lists of folios.
        """
        tally = _FolioTally(self, ser)
        for part in self._lists(areas, self._looked(ser["nr_folios"])):
            tally.add(*part)
        return tally.folios()

    def _looked(self, number: U64) -> I64:
        """
        How many folios of each file to look at.

        No folio is in two files, so all files together have no more folios than RAM has pages.
        """
        looked = []
        for count in number.tolist():
            looked.append(min(count, self.ram_pages - self._folios_seen))
            self._folios_seen += looked[-1]
        return np.array(looked, np.int64)

    def _lists(self, areas: _Areas, looked: I64) -> Iterator[tuple[NDArray[np.void], I64, bool]]:
        """
        The ``struct memfd_luo_folio_ser`` of each area, one area after the other, some at a time.

        :param looked: how many of each are wanted.
        :return: the entries, which area each is of, and whether more follow.
        """
        of, phys, size = areas.of, areas.listed, areas.size[areas.of].astype(np.int64)
        item = MEMFD_LUO_FOLIO_SER.itemsize
        within = np.arange(len(of)) - np.searchsorted(of, of)
        take = np.minimum(looked[of] * item - within * size, size)
        of, phys, take = of[take > 0], phys[take > 0], take[take > 0]
        # Cut what is larger than one read.
        parts = -(-take // READ_SIZE)
        which = np.repeat(np.arange(len(of)), parts)
        at = READ_SIZE * (np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts))
        of, phys = of[which], phys[which] + at.astype(np.uint64)
        take = np.minimum(take[which] - at, READ_SIZE)
        group = (np.cumsum(take) - take) // READ_SIZE
        bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(of)]
        ended = np.zeros(len(looked), np.bool_)
        for low, high in pairwise(bounds):
            raw = read_near(self.read, phys[low:high].tolist(), take[low:high].tolist())
            there = np.array([each is not None for each in raw], np.bool_)
            here = _in_front(of[low:high], ~there, len(looked)) & ~ended[of[low:high]]
            ended[of[low:high][~there]] = True
            kept = [each for each, keep in zip(raw, here.tolist(), strict=True) if keep and each]
            whose = np.repeat(of[low:high][here], take[low:high][here] // item)
            yield np.frombuffer(b"".join(kept), MEMFD_LUO_FOLIO_SER), whose, high < len(of)

    def _contents(self, phys: U64, size: int, length: int) -> Iterator[bytes]:
        """
        The contents of memory areas of one size, in their order, up to the first unreadable one.

        :param length: bytes that are wanted.
        """
        breaks = np.flatnonzero(np.diff(phys) != np.uint64(size)) + 1
        for low, high in pairwise([0, *breaks.tolist(), len(phys)]):
            run = min((high - low) * size, length)
            for at in range(0, run, READ_SIZE):
                data = self.read(int(phys[low]) + at, min(READ_SIZE, run - at))
                if data is None:
                    return
                yield data
            length -= run

    # -- what the root FDT leads to ---------------------------------------------------------------

    def subtrees(self, fdt: Fdt, blobs: dict[str, bytes]) -> None:
        """Claim the root FDT, the subtrees, and what known subtrees lead to."""
        if fdt.phys:
            self.claim(Owner(OwnerKind.FDT, "root FDT"), fdt.phys, self.abi.page_size)
        for subtree in fdt.subtrees:
            # A blob outside RAM has nothing that could be preserved; bad-fdt reports it.
            at, size = subtree.phys, subtree.size
            if at is not None and size and self.in_ram(at, size):
                self.claim(Owner(OwnerKind.SUBTREE, f"subtree {subtree.name}"), at, size)
        for name, start, length in reserve_mem_areas(blobs):
            self.claim(Owner(OwnerKind.RESERVE_MEM, f"reserve_mem {name}"), start, length)
        found = kho_test_folios(blobs)
        if found is not None:
            desc, offset, count = found
            blob = next(s.phys for s in fdt.subtrees if s.name == KHO_TEST) or 0
            whose = Owner(OwnerKind.KHO_TEST, "kho_test: folios_info")
            area, listed = self.vmalloc(desc, blob + offset, whose)
            self._kho_test(listed, self.abi.page_size << area.order, count, area.problems)

    def _kho_test(self, listed: U64, size: int, count: int, problems: list[str]) -> None:
        """The folios of kho_test: each entry is an address, with the order in its low bits."""
        looked = min(count, self.ram_pages)
        entries = np.frombuffer(b"".join(self._contents(listed, size, 8 * looked)), np.uint64)
        low = np.uint64(self.abi.page_size - 1)
        order = entries & low
        known = order <= np.uint64(self.abi.max_page_order)
        sizes = np.uint64(self.abi.page_size) << np.where(known, order, np.uint64(0))
        phys = entries & ~low
        good = known & self.are_pages(phys, sizes)
        if len(entries) < count:
            problems.append(f"of {count} folios only the first {len(entries)} can be read")
        if not good.all():
            problems.append(f"{int((~good).sum())} of the folios in it are not in RAM")
        if not _apart(phys[good], sizes[good]).all():
            problems.append("some of the folios in it are listed twice")
        self.claim(Owner(OwnerKind.KHO_TEST, "kho_test: folios"), phys[good], sizes[good])


class _FolioTally:
    """
    The folios that the lists of memfds have, part by part.

    An entry does not say how large its folio is.  But the list has all of a file, so each folio
    ends where the next one begins.

    :param ser: each file's ``struct memfd_luo_ser``.
    """

    def __init__(self, following: ClientWalker, ser: NDArray[np.void]) -> None:
        self._following = following
        self._shift = np.uint64(following.abi.page_shift)
        self._number = ser["nr_folios"]
        #: Index behind the last page of each file.
        self._end = ser["size"] >> self._shift
        self._end += ser["size"] % np.uint64(following.abi.page_size) != 0
        #: Of each file: entries that were read; those whose folios end somewhere, and where the
        #: first of these begins; folios that are odd, and behind the end; pages.
        self._read, self._first, self._pages = np.zeros((3, len(ser)), np.uint64)
        self._seen, self._odd, self._behind = np.zeros((3, len(ser)), np.int64)
        self._claims: list[Claims] = []
        #: The last entry, whose folio ends in the next part.
        self._held = np.zeros(0, MEMFD_LUO_FOLIO_SER), np.zeros(0, np.int64)

    def add(self, entries: NDArray[np.void], of: I64, more: bool) -> None:
        """
        Look at the next part.

        :param of: which file each entry is of.
        :param more: another part follows.
        """
        self._read += self._count(of).astype(np.uint64)
        entries, of = (np.concatenate(pair) for pair in zip(self._held, (entries, of), strict=True))
        index = entries["index"]
        pfn = entries["pfn_and_flags"] & np.uint64((1 << MEMFD_PFN_BITS) - 1)
        end, known = np.zeros(len(of), np.uint64), np.zeros(len(of), np.bool_)
        end[:-1], known[:-1] = index[1:], of[1:] == of[:-1]
        last = np.flatnonzero(~known[: len(of) - more])
        last = last[self._read[of[last]] == self._number[of[last]]]
        rest = self._end[of[last]] - np.minimum(index[last], self._end[of[last]])
        end[last] = index[last] + self._last(pfn[last], rest)
        known[last] = True
        self._held = (entries[-1:], of[-1:]) if more else (entries[:0], of[:0])
        self._judge(pfn[known], index[known], end[known], of[known])

    def _judge(self, pfn: U64, index: U64, end: U64, of: I64) -> None:
        """Look at folios of which it is known where in their files they begin and end."""
        begins = self._seen[of] == 0
        begins[1:] &= of[1:] != of[:-1]
        self._first[of[begins]] = index[begins]
        self._seen += self._count(of)
        # The kernel skips a pfn of 0.
        used, inside = pfn != 0, index < self._end[of]
        count, one = end - index, np.uint64(1)
        sound = (end > index) & (count & (count - one) == 0) & (pfn % np.maximum(count, one) == 0)
        sound &= pfn <= np.uint64((1 << 64) - 1) >> self._shift
        phys, size = pfn << self._shift, count << self._shift
        sound &= self._following.are_pages(phys, size)
        self._behind += self._count(of[used & ~inside])
        self._odd += self._count(of[used & inside & ~sound])
        good = used & sound
        self._claims.append(join(Claims(phys[good], size[good], of[good].astype(np.uint32))))
        np.add.at(self._pages, of[good], count[good])

    def _count(self, of: I64) -> I64:
        return np.bincount(of, minlength=len(self._number))

    def _last(self, pfn: U64, rest: U64) -> U64:
        """
        Pages of files' last folios.

        :param rest: pages of the file that are left for it; the folio may reach beyond the file's
            end.
        """
        # frexp() gives the bit length: there are fewer than 2^53 pages.
        bits = np.frexp((np.maximum(rest, np.uint64(1)) - np.uint64(1)).astype(np.float64))[1]
        size = np.uint64(1) << bits.astype(np.uint64)
        if self._following.keys is not None:
            size = np.maximum(size, self._following.keys.folios(pfn << self._shift))
        return np.where(rest > 0, size, np.uint64(0))

    def folios(self) -> _Folios:
        """What there was in all parts."""
        every = Claims.concatenate(self._claims)
        of = every.owner.astype(np.int64)
        twice = self._count(of[~_apart(every.phys, every.size, of)])
        problems = self._problems(twice)
        return _Folios(of, every.phys, every.size, self._pages.tolist(), problems)

    def _problems(self, twice: I64) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        first = np.where(self._seen > 0, self._first, 0)
        for counts, said in (
            (first, "its first folio is that of page {first}"),
            (
                self._number > self._seen.view(np.uint64),
                "of {number} folios only the first {seen} can be read",
            ),
            (self._odd, "{odd} folios are not in RAM, or do not end where the next one begins"),
            (self._behind, "{behind} folios lie behind its end"),
            (twice, "some of its folios are listed twice"),
        ):
            for i in np.flatnonzero(counts).tolist():
                numbers = {
                    "first": first[i],
                    "number": self._number[i],
                    "seen": self._seen[i],
                    "odd": self._odd[i],
                    "behind": self._behind[i],
                }
                found.setdefault(i, []).append(said.format(**numbers))
        return found


def _memfds(
    ser: NDArray[np.void], phys: list[int], lists: I64, areas: list[Vmalloc], folios: _Folios
) -> Iterator[Memfd]:
    """
    :param lists: which of them have a list of folios.
    """
    number = len(ser)
    listed: list[Vmalloc | None] = [None] * number
    pages = [0] * number
    problems: list[list[str]] = [[] for _ in range(number)]
    for i, area, has in zip(lists.tolist(), areas, folios.pages, strict=True):
        listed[i], pages[i] = area, has
    for n, said in folios.problems.items():
        problems[int(lists[n])] = said
    for i in np.flatnonzero((ser["nr_folios"] == 0) & (ser["size"] > 0)).tolist():
        problems[i].append(f"{ser['size'][i]} bytes and no folio")
    names = ser.dtype.names or ()
    # memfd-v1 hands over neither.
    zeros = [0] * number
    seals, flags = (ser[n].tolist() if n in names else zeros for n in ("seals", "flags"))
    pos, size, nr_folios = (ser[name].tolist() for name in ("pos", "size", "nr_folios"))
    return map(Memfd, phys, pos, size, seals, flags, nr_folios, listed, pages, problems)


def _named(whose: Owner, what: str) -> Owner:
    """An owner of something of a file."""
    return Owner(whose.kind, f"{whose.name}: {what}", whose.session, whose.token)


def _owner_of(whose: Owner, part: int) -> Owner:
    """The owner of a part of a memfd."""
    kind, what = _PARTS[part]
    return Owner(kind or whose.kind, f"{whose.name}: {what}", whose.session, whose.token)


def _entries(pages: list[bytes], of: I64, per_chunk: int) -> tuple[I64, U64]:
    """
    What chunks list, and of which area each entry is.

    :param of: which area each chunk is of.
    """
    raw = np.frombuffer(b"".join(pages), np.uint64).reshape(len(pages), per_chunk + 1)[:, 1:]
    ends = raw == 0
    length = np.where(ends.any(axis=1), ends.argmax(axis=1), per_chunk)
    return np.repeat(of, length), raw[np.arange(per_chunk) < length[:, None]]


def _runs(of: I64) -> tuple[list[int], list[int], list[int]]:
    """The numbers in a sorted column, the first row of each, and how many it has."""
    number, first, count = np.unique(of, return_index=True, return_counts=True)
    return number.tolist(), first.tolist(), count.tolist()


def _in_front(of: I64, bad: NDArray[np.bool_], number: int) -> NDArray[np.bool_]:
    """Which rows lie in front of the first bad one that is of the same area; sorted by area."""
    if not bad.any():
        return ~bad
    first = np.full(number, len(of))
    np.minimum.at(first, of[bad], np.flatnonzero(bad))
    return np.arange(len(of)) < first[of]


def _apart(phys: U64, size: int | U64, of: I64 | None = None) -> NDArray[np.bool_]:
    """
    Which areas of memory begin behind the end of the area below; if all do, none overlap.

    :param of: areas of different numbers do not count.
    """
    end = phys + np.asarray(size, np.uint64)
    of = np.zeros(len(phys), np.int64) if of is None else of
    apart = np.ones(len(phys), np.bool_)
    by = np.lexsort((phys, of))
    apart[by[1:]] = (phys[by][1:] >= end[by][:-1]) | (of[by][1:] != of[by][:-1])
    return apart


def join(claims: Claims) -> Claims:
    """Join neighbouring claims of one owner; sorted claims stay sorted."""
    if not len(claims):
        return claims
    end = claims.phys + claims.size
    apart = (claims.phys[1:] != end[:-1]) | (claims.owner[1:] != claims.owner[:-1])
    first = np.append(0, np.flatnonzero(apart) + 1)
    last = np.append(first[1:], len(claims)) - 1
    phys = claims.phys[first]
    return Claims(phys, end[last] - phys, claims.owner[first])
