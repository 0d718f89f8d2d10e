# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The contents of memfds that LUO preserves.

Their folios are where their list says (``memfd_luo_preserve_folios()`` in mm/memfd_luo.c), before
the kexec and after it, until somebody retrieves the file.  The list has all of a file: holes are
filled when it is preserved.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64, Abi
from ..abi.serialized import MEMFD_LUO_FOLIO_SER, MEMFD_LUO_FOLIO_UPTODATE, MEMFD_PFN_BITS
from .follow import ClientWalker
from .walk import READ_SIZE, ReadPhys


def memfd_pieces(
    abi: Abi, ram: U64, read: ReadPhys, handler: str, phys: int
) -> Iterator[bytes | int]:
    """
    What is in a memfd, as :class:`~khoscope.facts.contents.Content` has it.

    :param handler: the compatible of its file handler, one of MEMFDS.
    :param phys: ``phys_addr_t`` of its ``struct memfd_luo_ser``.
    """
    following = ClientWalker(abi, ram, read)
    found = following.folio_list(handler, phys)
    if found is not None:
        ser, entries = found
        yield from _Pieces(following, int(ser["size"])).of(entries)


class _Pieces:
    """
    :param size: of the file, bytes.
    """

    def __init__(self, following: ClientWalker, size: int) -> None:
        self._following = following
        self._left = size
        self._page = following.abi.page_size
        self._end = -(-size // self._page)
        #: Index of the page that has to come next, and pages that may: no page is in two files,
        #: or in one twice, so that a file has no more of them than RAM.
        self._next, self._pages = 0, following.ram_pages

    def of(self, parts: Iterator[NDArray[np.void]]) -> Iterator[bytes | int]:
        """:param parts: the ``struct memfd_luo_folio_ser`` of a file."""
        held = np.zeros(0, MEMFD_LUO_FOLIO_SER)
        for part in parts:
            entries = np.concatenate([held, part])
            # Only the next entry says how large the folio of the last one is.
            held = entries[-1:]
            index, end = entries["index"][:-1], entries["index"][1:]
            count = end - index
            sound = count & (count - np.uint64(1)) == 0
            sound &= _pfn(entries[:-1]) % np.maximum(count, np.uint64(1)) == 0
            yield from self._some(entries[:-1], end, sound)
        # The last folio may reach beyond the end of the file.
        yield from self._some(
            held, np.full(len(held), self._end, np.uint64), np.ones(len(held), np.bool_)
        )

    def _some(
        self, entries: NDArray[np.void], end: U64, sound: NDArray[np.bool_]
    ) -> Iterator[bytes | int]:
        index, flags, pfn = entries["index"], entries["pfn_and_flags"], _pfn(entries)
        end = np.minimum(end, np.uint64(self._end))
        count = np.where(sound & (end > index), end - index, 0)
        size = np.minimum(count, np.uint64(self._pages)) * np.uint64(self._page)
        phys = pfn * np.uint64(self._page)
        good = (count > 0) & (count <= self._pages) & self._following.are_pages(phys, size)
        good[:1] &= index[:1] == self._next
        stop = len(good) if good.all() else int(np.argmin(good))
        # They follow on one another, as each ends where the next begins.
        total = np.cumsum(count[:stop])
        stop = int(np.searchsorted(total, self._pages, "right"))
        if stop < len(entries):
            self._end = 0
        if not stop:
            return
        self._next, self._pages = int(end[stop - 1]), self._pages - int(total[stop - 1])
        there = flags[:stop] & np.uint64(MEMFD_LUO_FOLIO_UPTODATE) != 0
        for at, length, whole in _runs(phys[:stop], size[:stop], there):
            yield from self._run(at, length, whole)

    def _run(self, at: int, length: int, whole: bool) -> Iterator[bytes | int]:
        """A run of memory; addresses and bytes."""
        length = min(length, self._left)
        self._left -= length
        for start in range(0, length, READ_SIZE):
            part = min(READ_SIZE, length - start)
            data = self._following.read(at + start, part) if whole else bytes(part)
            yield from self._by_page(at + start, part) if data is None else [data]

    def _by_page(self, at: int, length: int) -> Iterator[bytes | int]:
        """What there is of memory that cannot be read as a whole."""
        for start in range(0, length, self._page):
            part = min(self._page, length - start)
            data = self._following.read(at + start, part)
            yield part if data is None else data


def _pfn(entries: NDArray[np.void]) -> U64:
    pfn: U64 = entries["pfn_and_flags"] & np.uint64((1 << MEMFD_PFN_BITS) - 1)
    return pfn


def _runs(phys: U64, size: U64, there: NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """Neighbours joined: address, bytes, and whether that is what is in the file."""
    begins = np.ones(len(phys), np.bool_)
    begins[1:] = (phys[1:] != phys[:-1] + size[:-1]) | (there[1:] != there[:-1])
    first = np.flatnonzero(begins)
    joined = np.add.reduceat(size, first)
    yield from zip(phys[first].tolist(), joined.tolist(), there[first].tolist(), strict=True)
