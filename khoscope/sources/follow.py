# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Follow the structures that KHO's clients hand over, and note whose memory they lead to.

All of it is physical memory that may be stale, moving or hostile.  khoscope follows only addresses
that are aligned and in RAM, bounds every chain, and notes what is wrong as a problem in words.
Kernel sources: kexec_handover.c (vmalloc), kho_block.c, mm/memfd_luo.c, lib/test_kho.c and
mm/memblock.c (reserve_mem).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from .walk import READ_SIZE, ReadPhys, in_ranges

#: How many claims one chunk has: a snapshot file limits the size of chunks.
CLAIMS_KEPT: Final = 1 << 20


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

    def structure(self, phys: int, layout: np.dtype[np.void]) -> np.void | None:
        """The structure at an address; None: it is not in RAM, or cannot be read."""
        raw = self.bytes_at(phys, layout.itemsize)
        return None if raw is None else unpack(layout, raw)

    def bytes_at(self, phys: int, size: int) -> bytes | None:
        """The bytes at an address; None: they are not in RAM, or cannot be read."""
        return self.read(phys, size) if self.in_ram(phys, size) else None

    def in_ram(self, phys: int, size: int) -> bool:
        """Whether memory lies in RAM; addresses and bytes."""
        if phys + size >= 1 << 64:
            return False
        span = np.array([phys], np.uint64), np.array([phys + size], np.uint64)
        return bool(in_ranges(self.ram, *span)[0])

    def page(self, phys: int) -> bytes | None:
        """A page; None likewise, or if the address is not aligned to a page."""
        return None if phys % self.abi.page_size else self.bytes_at(phys, self.abi.page_size)

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
        first, total, order = (int(desc[name]) for name in ("first", "total_pages", "order"))
        problems: list[str] = []
        if order > self.abi.max_page_order:
            problems.append(f"order {order} is more than the page allocator has")
            order = 0
        unknown = int(desc["flags"]) & ~sum(KHO_VMALLOC_FLAGS)
        if unknown:
            problems.append(f"flags {unknown:#x} are unknown: they are not restored")
        # That of another area, if somebody has copied its descriptor: then both lead to it.
        followed = first in self._followed
        chunks, entries = self._chunks(first, total >> order, problems)
        size = self.abi.page_size << order
        good = self.are_pages(entries, size)
        if not good.all():
            bad = entries[~good]
            problems.append(f"{len(bad)} entries are no pages in RAM, the first {int(bad[0]):#x}")
        if twice := int((good & ~_apart(entries, size)).sum()):
            problems.append(f"{twice} entries list pages that another one lists, too")
            good &= _apart(entries, size)
        listed = len(entries) << order
        if listed != total:
            problems.append(f"lists {listed} pages, total_pages is {total}")
        area = Vmalloc(
            whose.name,
            phys,
            first,
            total,
            int(desc["flags"]),
            order,
            len(chunks),
            listed,
            problems,
        )
        self.vmallocs.append(area)
        mine = replace(whose, kind=OwnerKind.VMALLOC_CHUNK)
        self.claim(mine, first if followed else chunks, self.abi.page_size)
        self.claim(replace(whose, kind=OwnerKind.VMALLOC_PAGE), entries[good], size)
        return area, entries if good.all() else entries[: int(good.argmin())]

    def _chunks(self, first: int, entries: int, problems: list[str]) -> tuple[U64, U64]:
        """
        The chunks of a chain and what they list, as far as it can be followed.

        :param entries: how many entries it should have.
        """
        per_chunk = self.abi.page_size // 8 - 1
        # The kernel adds a chunk as soon as the last one is full, so the last may be empty.
        limit = min(entries, self.ram_pages) // per_chunk + 1
        chunks: dict[int, U64] = {}
        for at, raw in self._chain(first, "chunk", limit, problems):
            entry = np.frombuffer(raw, np.uint64, per_chunk, 8)
            ends = np.flatnonzero(entry == 0)
            chunks[at] = entry[: ends[0]] if len(ends) else entry
        listed = np.concatenate([np.zeros(0, np.uint64), *chunks.values()])
        return np.array(list(chunks), np.uint64), listed

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
        per_block = (self.abi.page_size - KHO_BLOCK_HEADER_SER.itemsize) // layout.itemsize
        blocks: dict[int, NDArray[Any]] = {}
        for at, raw in self._chain(head, "block", KHO_MAX_BLOCKS, problems):
            count = int(unpack(KHO_BLOCK_HEADER_SER, raw)["count"])
            if not written <= count <= per_block:
                problems.append(f"block {at:#x} says to have {count} entries, {per_block} fit")
                count = 0
            blocks[at] = np.frombuffer(raw, layout, count, KHO_BLOCK_HEADER_SER.itemsize)
        entries = np.concatenate([np.zeros(0, layout), *blocks.values()])
        return np.array(list(blocks), np.uint64), entries

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
        layout = MEMFDS[handler]
        ser = self.structure(phys, layout)
        if ser is None or phys % self.abi.page_size:
            return f"struct memfd_luo_ser at {phys:#x} is no readable page in RAM"
        self.claim(replace(whose, name=f"{whose.name}: memfd_luo_ser"), phys, layout.itemsize)
        sealed = "seals" in (layout.names or ())
        problems: list[str] = []
        folios, pages = None, 0
        if int(ser["nr_folios"]):
            listed = replace(whose, name=f"{whose.name}: folio list")
            at = phys + layout.itemsize - KHO_VMALLOC.itemsize
            folios, areas = self.vmalloc(ser["folios"], at, listed)
            data = replace(whose, kind=OwnerKind.MEMFD, name=f"{whose.name}: data")
            pages = self._folios(ser, areas, self.abi.page_size << folios.order, data, problems)
        elif int(ser["size"]):
            problems.append(f"{int(ser['size'])} bytes and no folio")
        return Memfd(
            phys,
            int(ser["pos"]),
            int(ser["size"]),
            # memfd-v1 hands over neither.
            int(ser["seals"]) if sealed else 0,
            int(ser["flags"]) if sealed else 0,
            int(ser["nr_folios"]),
            folios,
            pages,
            problems,
        )

    def _folios(
        self, ser: np.void, listed: U64, size: int, data: Owner, problems: list[str]
    ) -> int:
        """
        Claim the folios of a memfd.

        :param listed: addresses of the areas, all of one size, that hold the list of folios.
        :return: how many pages they have.
        """
        number = int(ser["nr_folios"])
        # No folio is in two files, so all files together have no more folios than RAM has pages.
        looked = min(number, self.ram_pages - self._folios_seen)
        self._folios_seen += looked
        raw = self._contents(listed, size, looked * MEMFD_LUO_FOLIO_SER.itemsize)
        shift = np.uint64(self.abi.page_shift)
        file_end = -(-int(ser["size"]) >> self.abi.page_shift)
        mine = len(self._claims)
        seen = pages = odd = behind = 0
        for entries, end in self._with_ends(raw, number, file_end):
            if not seen and len(entries) and entries["index"][0]:
                problems.append(f"its first folio is that of page {entries['index'][0]}")
            seen += len(entries)
            pfn = entries["pfn_and_flags"] & np.uint64((1 << MEMFD_PFN_BITS) - 1)
            # The kernel skips a pfn of 0.
            used = pfn != 0
            count = end - entries["index"]
            inside = entries["index"] < np.uint64(file_end)
            sound = (end > entries["index"]) & (count & (count - np.uint64(1)) == 0)
            sound &= pfn % np.maximum(count, np.uint64(1)) == 0
            sound &= self.are_pages(pfn << shift, count << shift)
            behind += int((used & ~inside).sum())
            odd += int((used & inside & ~sound).sum())
            good = used & sound
            self.claim(data, pfn[good] << shift, count[good] << shift)
            pages += int(count[good].sum())
        if seen < number:
            problems.append(f"of {number} folios only the first {seen} can be read")
        if odd:
            problems.append(f"{odd} folios are not in RAM, or do not end where the next one begins")
        if behind:
            problems.append(f"{behind} folios lie behind its end")
        claims = Claims.concatenate(self._claims[mine:])
        if not _apart(claims.phys, claims.size).all():
            problems.append("some of its folios are listed twice")
        return pages

    def _with_ends(
        self, raw: Iterable[bytes], number: int, file_end: int
    ) -> Iterator[tuple[NDArray[Any], U64]]:
        """
        The folios of a memfd in groups, and the index at which each folio ends.

        An entry does not say how large its folio is.  But the list has all of a file, so each folio
        ends where the next one begins.

        :param number: of folios; if ``raw`` has fewer, the end of the last one is not known.
        :param file_end: index behind the last page of the file.
        """
        waiting = np.zeros(0, MEMFD_LUO_FOLIO_SER)
        for part in raw:
            entries = np.concatenate([waiting, np.frombuffer(part, MEMFD_LUO_FOLIO_SER)])
            number -= len(entries) - len(waiting)
            yield entries[:-1], entries["index"][1:]
            waiting = entries[-1:]
        if not number:
            rest = max(file_end - int(waiting["index"][0]), 0)
            pfn = int(waiting["pfn_and_flags"][0]) & (1 << MEMFD_PFN_BITS) - 1
            yield waiting, waiting["index"] + np.uint64(self._last_folio(pfn, rest))

    def _last_folio(self, pfn: int, rest: int) -> int:
        """
        Pages of a file's last folio.

        :param rest: pages of the file that are left for it; the folio may reach beyond the file's
            end.
        """
        at_least = 1 << max(rest - 1, 0).bit_length() if rest else 0
        size = 0 if self.keys is None else self.keys.folio(pfn << self.abi.page_shift)
        return max(size, at_least) if rest else 0

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


def _apart(phys: U64, size: int | U64) -> NDArray[np.bool_]:
    """Which areas of memory begin behind the end of the area below; if all do, none overlap."""
    by = np.argsort(phys, kind="stable")
    end = (phys + np.asarray(size, np.uint64))[by]
    apart = np.ones(len(phys), np.bool_)
    apart[by[1:]] = phys[by][1:] >= end[:-1]
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
