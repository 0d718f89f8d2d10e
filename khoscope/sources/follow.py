# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Follow the structures that KHO's clients hand over, and note whose memory they lead to.

All of it is physical memory that may be stale, moving or hostile: nothing is followed that is not
aligned and in RAM, chains end, and what is wrong becomes a problem in words.
Kernel sources: kexec_handover.c (vmalloc), kho_block.c, mm/memfd_luo.c, lib/test_kho.c and
mm/memblock.c (reserve_mem).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..abi import U64, Abi
from ..clients import Claims, Kind, Memfd, Owner, Vmalloc
from ..fdt import kho_test_folios, reserve_mem_areas
from ..serialized import (
    KHO_BLOCK_HEADER_SER,
    KHO_MAX_BLOCKS,
    KHO_VMALLOC_FLAGS,
    MEMFD_FOLIOS_AT,
    MEMFD_LUO_FOLIO_SER,
    MEMFD_LUO_SER,
    MEMFD_PFN_BITS,
    one,
)
from ..snapshot import Fdt
from .walk import ReadPhys, in_ranges

#: Pages whose contents are read at once, at most.
READ_PAGES: Final = 256


@dataclass
class Following:
    """
    The memory of one side's clients.

    :param ram: u64, shape (n, 2): where structures may be.
    :param owners: those that were found.
    """

    abi: Abi
    ram: U64
    read: ReadPhys
    owners: list[Owner] = field(default_factory=list)
    vmallocs: list[Vmalloc] = field(default_factory=list)
    _claims: list[Claims] = field(default_factory=list)

    def claims(self) -> Claims:
        """What the owners have, sorted by address, neighbours of one owner joined."""
        every = Claims.concatenate(self._claims)
        return join(every[np.lexsort((every.owner, every.phys))])

    def claim(self, owner: Owner, phys: int | U64, size: int | U64) -> None:
        """Note whose memory this is; addresses and bytes.  Claims in a row may be of one owner."""
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
        return None if raw is None else one(layout, raw)

    def bytes_at(self, phys: int, size: int) -> bytes | None:
        """Memory that lies in RAM; None where it does not, or cannot be read."""
        if not 0 <= phys < phys + size < 1 << 64:
            return None
        span = np.array([phys], np.uint64), np.array([phys + size], np.uint64)
        return self.read(phys, size) if in_ranges(self.ram, *span)[0] else None

    def page(self, phys: int) -> bytes | None:
        """A page; None likewise, or if the address is not one of a page."""
        return None if phys % self.abi.page_size else self.bytes_at(phys, self.abi.page_size)

    def are_pages(self, phys: U64, size: int | U64) -> NDArray[np.bool_]:
        """Which addresses are those of so much memory in RAM, aligned to pages."""
        end = phys + np.asarray(size, np.uint64)
        return in_ranges(self.ram, phys, end) & (phys % np.uint64(self.abi.page_size) == 0)

    # -- vmalloc ----------------------------------------------------------------------------------

    def vmalloc(self, desc: np.void, phys: int, whose: Owner) -> tuple[Vmalloc, U64]:
        """
        Follow a ``struct kho_vmalloc``, as ``kho_restore_vmalloc`` does.

        :param phys: where it stands.
        :param whose: it is; what it leads to gets owners of their own, named after this one.
        :return: it, and the addresses that its chunks list, u64: as many as make sense.
        """
        order, total = int(desc["order"]), int(desc["total_pages"])
        problems: list[str] = []
        if order > self.abi.max_page_order:
            problems.append(f"order {order} is more than the page allocator has")
            order = 0
        unknown = int(desc["flags"]) & ~sum(KHO_VMALLOC_FLAGS)
        if unknown:
            problems.append(f"flags {unknown:#x} are unknown: it will not be restored")
        chunks, entries = self._chunks(int(desc["first"]), total >> order, problems)
        size = self.abi.page_size << order
        good = self.are_pages(entries, size)
        if not good.all():
            bad = entries[~good]
            problems.append(f"{len(bad)} entries are no pages in RAM, the first {int(bad[0]):#x}")
        listed = len(entries) << order
        if listed != total:
            problems.append(f"lists {listed} pages, total_pages is {total}")
        area = Vmalloc(
            whose.name,
            phys,
            int(desc["first"]),
            total,
            int(desc["flags"]),
            order,
            len(chunks),
            listed,
            problems,
        )
        self.vmallocs.append(area)
        self.claim(replace(whose, kind=Kind.VMALLOC_CHUNK), chunks, self.abi.page_size)
        self.claim(replace(whose, kind=Kind.VMALLOC_PAGE), entries[good], size)
        return area, entries[good]

    def _chunks(self, first: int, entries: int, problems: list[str]) -> tuple[U64, U64]:
        """
        The chunks of a chain and what they list, as far as it can be followed.

        :param entries: that it should have.
        """
        per_chunk = self.abi.page_size // 8 - 1
        ram_pages = int((self.ram[:, 1] - self.ram[:, 0]).sum()) >> self.abi.page_shift
        # The kernel adds a chunk as soon as one is full: the last may be empty.
        limit = min(entries, ram_pages) // per_chunk + 2
        chunks: dict[int, U64] = {}
        at = first
        while at:
            if at in chunks:
                problems.append(
                    f"the chain loops: after {len(chunks)} chunks it is at {at:#x} again"
                )
                break
            if len(chunks) == limit:
                problems.append(f"the chain goes on after the {limit} chunks that it can need")
                break
            raw = self.page(at)
            if raw is None:
                problems.append(f"chunk {len(chunks)} at {at:#x} is no readable page in RAM")
                break
            words = np.frombuffer(raw, np.uint64)
            ends = np.flatnonzero(words[1:] == 0)
            chunks[at] = words[1 : 1 + (int(ends[0]) if len(ends) else per_chunk)]
            at = int(words[0])
        listed = np.concatenate([np.zeros(0, np.uint64), *chunks.values()])
        return np.array(list(chunks), np.uint64), listed

    # -- blocks of entries ------------------------------------------------------------------------

    def block_set(
        self, head: int, layout: np.dtype[np.void], problems: list[str]
    ) -> tuple[U64, NDArray[Any]]:
        """
        Follow a chain of ``struct kho_block_header_ser``, as ``kho_block_set_restore`` does.

        :param head: ``phys_addr_t`` of the first; 0: there is none.
        :param layout: of its entries.
        :return: addresses of the blocks, and the entries that they say to have.
        """
        per_block = (self.abi.page_size - KHO_BLOCK_HEADER_SER.itemsize) // layout.itemsize
        blocks: dict[int, NDArray[Any]] = {}
        at = head
        while at:
            if at in blocks:
                problems.append(f"the chain of blocks loops at {at:#x}")
                break
            if len(blocks) == KHO_MAX_BLOCKS:
                problems.append(f"more than {KHO_MAX_BLOCKS} blocks: the kernel takes no more")
                break
            raw = self.page(at)
            if raw is None:
                problems.append(f"block {len(blocks)} at {at:#x} is no readable page in RAM")
                break
            header = one(KHO_BLOCK_HEADER_SER, raw)
            count = int(header["count"])
            if count > per_block:
                problems.append(f"block {at:#x} says to have {count} entries, {per_block} fit")
                count = 0
            blocks[at] = np.frombuffer(raw, layout, count, KHO_BLOCK_HEADER_SER.itemsize)
            at = int(header["next"])
        entries = np.concatenate([np.zeros(0, layout), *blocks.values()])
        return np.array(list(blocks), np.uint64), entries

    # -- memfd ------------------------------------------------------------------------------------

    def memfd(self, phys: int, whose: Owner) -> Memfd | str:
        """
        Follow a ``struct memfd_luo_ser``.

        :return: it, or why there is none to see.
        """
        ser = self.structure(phys, MEMFD_LUO_SER)
        if ser is None or phys % self.abi.page_size:
            return f"struct memfd_luo_ser at {phys:#x} is no readable page in RAM"
        self.claim(
            replace(whose, name=f"{whose.name}: memfd_luo_ser"), phys, MEMFD_LUO_SER.itemsize
        )
        problems: list[str] = []
        folios, pages = None, 0
        if int(ser["nr_folios"]):
            listed = replace(whose, name=f"{whose.name}: folio list")
            folios, areas = self.vmalloc(ser["folios"], phys + MEMFD_FOLIOS_AT, listed)
            data = replace(whose, kind=Kind.MEMFD, name=f"{whose.name}: data")
            raw = self._contents(areas, self.abi.page_size << folios.order)
            pages = self._folios(ser, raw, data, problems)
        elif int(ser["size"]):
            problems.append(f"{int(ser['size'])} bytes and no folio")
        return Memfd(
            phys,
            int(ser["pos"]),
            int(ser["size"]),
            int(ser["seals"]),
            int(ser["flags"]),
            int(ser["nr_folios"]),
            folios,
            pages,
            problems,
        )

    def _folios(self, ser: np.void, raw: Iterable[bytes], data: Owner, problems: list[str]) -> int:
        """
        Claim the folios of a memfd.

        :param raw: the ``struct memfd_luo_folio_ser`` of all of them.
        :return: their pages.
        """
        shift = np.uint64(self.abi.page_shift)
        file_end = -(-int(ser["size"]) >> self.abi.page_shift)
        seen = pages = odd = 0
        for entries, end in _with_ends(raw, int(ser["nr_folios"]), file_end):
            seen += len(entries)
            pfn = entries["pfn_and_flags"] & np.uint64((1 << MEMFD_PFN_BITS) - 1)
            # The kernel steps over a pfn of 0.
            used = pfn != 0
            count = end - entries["index"]
            sound = (end > entries["index"]) & (count & (count - np.uint64(1)) == 0)
            sound &= pfn % np.maximum(count, np.uint64(1)) == 0
            sound &= self.are_pages(pfn << shift, count << shift)
            odd += int((used & ~sound).sum())
            good = used & sound
            self.claim(data, pfn[good] << shift, count[good] << shift)
            pages += int(count[good].sum())
        if seen < int(ser["nr_folios"]):
            problems.append(f"only {seen} of {int(ser['nr_folios'])} folios can be read")
        if odd:
            problems.append(f"{odd} folios are not in RAM, or do not end where the next one begins")
        return pages

    def _contents(self, phys: U64, size: int) -> Iterator[bytes]:
        """What stands in memory areas of one size, in their order; ends at one unreadable."""
        step = max(READ_PAGES * self.abi.page_size // size, 1)
        breaks = np.flatnonzero(np.diff(phys) != np.uint64(size)) + 1
        for low, high in pairwise([0, *breaks.tolist(), len(phys)]):
            for start in range(low, high, step):
                data = self.read(int(phys[start]), (min(start + step, high) - start) * size)
                if data is None:
                    return
                yield data

    # -- what the root FDT leads to ---------------------------------------------------------------

    def subtrees(self, fdt: Fdt, blobs: dict[str, bytes]) -> None:
        """Claim the root FDT, the subtrees, and what those lead to that are known."""
        if fdt.phys:
            self.claim(Owner(Kind.FDT, "root FDT"), fdt.phys, self.abi.page_size)
        for subtree in fdt.subtrees:
            if subtree.phys is None or not subtree.size:
                continue
            self.claim(Owner(Kind.SUBTREE, f"subtree {subtree.name}"), subtree.phys, subtree.size)
        for name, phys, size in reserve_mem_areas(blobs):
            self.claim(Owner(Kind.RESERVE_MEM, f"reserve_mem {name}"), phys, size)
        found = kho_test_folios(blobs)
        if found is not None:
            desc, offset, count = found
            at = next(s.phys for s in fdt.subtrees if s.name == "kho_test") or 0
            whose = Owner(Kind.KHO_TEST, "kho_test: folios_info")
            area, listed = self.vmalloc(desc, at + offset, whose)
            self._kho_test(listed, self.abi.page_size << area.order, count)

    def _kho_test(self, listed: U64, size: int, count: int) -> None:
        """The folios of kho_test: each entry is an address, with the order in its low bits."""
        raw = b"".join(self._contents(listed, size))
        entries = np.frombuffer(raw, np.uint64)[:count]
        low = np.uint64(self.abi.page_size - 1)
        order = entries & low
        order = np.where(order <= self.abi.max_page_order, order, 0).astype(np.uint64)
        sizes = np.uint64(self.abi.page_size) << order
        phys = entries & ~low
        good = self.are_pages(phys, sizes)
        self.claim(Owner(Kind.KHO_TEST, "kho_test: folios"), phys[good], sizes[good])


def _with_ends(
    raw: Iterable[bytes], count: int, file_end: int
) -> Iterator[tuple[NDArray[Any], U64]]:
    """
    The folios of a memfd in groups, and the index behind each.

    An entry does not say how large its folio is; but all of a file is there, so that each ends
    where the next one begins.

    :param count: how many there are.
    :param file_end: index behind the last page of the file.
    """
    waiting = np.zeros(0, MEMFD_LUO_FOLIO_SER)
    left = count
    for part in raw:
        entries = np.frombuffer(part, MEMFD_LUO_FOLIO_SER)[:left]
        left -= len(entries)
        entries = np.concatenate([waiting, entries])
        yield entries[:-1], entries["index"][1:]
        waiting = entries[-1:]
        if not left:
            break
    if len(waiting):
        # The last folio is as large as it is, even if the file ends within it.
        rest = max(file_end - int(waiting["index"][0]), 0)
        whole = 1 << max(rest - 1, 0).bit_length() if rest else 0
        yield waiting, waiting["index"] + np.uint64(whole)


def join(claims: Claims) -> Claims:
    """The same with neighbours of one owner made one; sorted ones stay sorted."""
    if not len(claims):
        return claims
    end = claims.phys + claims.size
    apart = (claims.phys[1:] != end[:-1]) | (claims.owner[1:] != claims.owner[:-1])
    first = np.append(0, np.flatnonzero(apart) + 1)
    last = np.append(first[1:], len(claims)) - 1
    phys = claims.phys[first]
    return Claims(phys, end[last] - phys, claims.owner[first])
