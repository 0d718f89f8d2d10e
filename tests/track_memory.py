# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Memory of a kernel before the radix tree: a ``struct kho_mem_track``, built as ``xa_store`` does,
and the chain that finalizing makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from khoscope.abi.keys import Abi, Finalize, Restore, Stamp, Tracker
from khoscope.facts.tree import Tree
from khoscope.sources.track import TrackLayout, walk_chunks, walk_track
from tests.synthetic import Memory

DIRECT_MAP: Final = 0xFFFF_8880_0000_0000
#: As in linux 6.18 on x86-64.
LAYOUT: Final = TrackLayout(
    head=8, node=576, shift=0, slots=40, chunk_log2=6, phys_bits=0, direct_map=DIRECT_MAP
)


def xarray_abi(preserve_bits: int = 1 << 15, **known: object) -> Abi:
    """A kernel like linux 6.18 (bitmaps of a page), or 6.17 (of 512 bytes)."""
    return Abi.for_page_shift(
        12,
        **{
            "compatible": "kho-v1",
            "tracker": Tracker.XARRAY,
            "preserve_bits": preserve_bits,
            "finalize": Finalize.BEFORE_LOAD,
            "restores_pages_as": Restore.SPLIT_FOLIO,
            **known,
        },
    )


#: Linux 6.18, and 6.17 before 6.17.9.
XARRAY: Final = xarray_abi()
SMALL: Final = xarray_abi(1 << 12, stamp=Stamp(magic_shift=None), restores_pages_as=Restore.FOLIO)


@dataclass
class TrackMemory(Memory):
    """
    :param head: ``orders.xa_head``.
    :param first: ``phys_addr_t`` of the first chunk, once it was finalized.
    """

    head: int = 0
    first: int = 0
    bitmaps: dict[tuple[int, int], int] = field(default_factory=dict)

    def new(self, size: int) -> int:
        """Room for a slab object, which does not cross a page."""
        if self._next % self.abi.page_size + size > self.abi.page_size:
            self._next = -(-self._next // self.abi.page_size) * self.abi.page_size
        at = self._next
        self._next += size
        page = at & -self.abi.page_size
        self.pages.setdefault(page, bytearray(self.abi.page_size))
        return at

    def new_node(self) -> int:
        self._next = -(-self._next // self.abi.page_size) * self.abi.page_size
        return super().new_node()

    def word(self, phys: int) -> int:
        page, at = divmod(phys, self.abi.page_size)
        return int.from_bytes(self.pages[page * self.abi.page_size][at : at + 8], "little")

    def set_word(self, phys: int, value: int) -> None:
        page, at = divmod(phys, self.abi.page_size)
        self.pages[page * self.abi.page_size][at : at + 8] = value.to_bytes(8, "little")

    def store(self, head: int, index: int, pointer: int) -> int:
        """``xa_store``: the new head of an xarray, given as an entry."""
        shift = 0
        node = self._node(head)
        if node is None and (head or index):
            node = self._new_node(0)
            self.set_word(node + LAYOUT.slots, head)
            head = node + DIRECT_MAP + 2
        if node is None:
            return pointer
        shift = self._shift(node)
        while index >> shift + LAYOUT.chunk_log2:
            above = self._new_node(shift + LAYOUT.chunk_log2)
            self.set_word(above + LAYOUT.slots, head)
            node, shift, head = above, shift + LAYOUT.chunk_log2, above + DIRECT_MAP + 2
        while shift:
            slot = node + LAYOUT.slots + 8 * (index >> shift & (1 << LAYOUT.chunk_log2) - 1)
            below = self._node(self.word(slot))
            shift -= LAYOUT.chunk_log2
            if below is None:
                below = self._new_node(shift)
                self.set_word(slot, below + DIRECT_MAP + 2)
            node = below
        self.set_word(node + LAYOUT.slots + 8 * (index & (1 << LAYOUT.chunk_log2) - 1), pointer)
        return head

    def _node(self, entry: int) -> int | None:
        return entry - 2 - DIRECT_MAP if entry & 3 == 2 else None

    def _new_node(self, shift: int) -> int:
        at = self.new(LAYOUT.node)
        page, offset = divmod(at, self.abi.page_size)
        self.pages[page * self.abi.page_size][offset + LAYOUT.shift] = shift
        return at

    def _shift(self, node: int) -> int:
        page, offset = divmod(node, self.abi.page_size)
        return self.pages[page * self.abi.page_size][offset + LAYOUT.shift]

    def preserve(self, phys: int, order: int, value: bool = True) -> None:
        """``__kho_preserve_order``, or the contrary."""
        bits = self.abi.preserve_bits
        assert bits is not None
        index, bit = divmod(phys >> self.abi.page_shift + order, bits)
        at = self.bitmaps.get((order, index))
        if at is None:
            at = self.bitmaps[order, index] = self._bitmap(order, index)
        page, offset = divmod(at + bit // 8, self.abi.page_size)
        mask = 1 << bit % 8
        if value:
            self.pages[page * self.abi.page_size][offset] |= mask
        else:
            self.pages[page * self.abi.page_size][offset] &= ~mask

    def _bitmap(self, order: int, index: int) -> int:
        size = self.abi.bitmap_bytes
        self._next = -(-self._next // size) * size
        at = self.new(size)
        track = self.track(order)
        head = self.word(track + LAYOUT.head)
        self.set_word(track + LAYOUT.head, self.store(head, index, at + DIRECT_MAP))
        return at

    def track(self, order: int) -> int:
        """The ``struct kho_mem_phys`` of an order, made if it is not there."""
        tracks: dict[int, int] = self.__dict__.setdefault("tracks", {})
        if order not in tracks:
            tracks[order] = self.new(16)
            self.head = self.store(self.head, order, tracks[order] + DIRECT_MAP)
        return tracks[order]

    def finalize(self) -> None:
        """``kho_mem_serialize``."""
        self.first = chunk = count = 0
        last: int | None = None
        for order, index in sorted(self.bitmaps):
            if order != last or count == (self.abi.page_size - 16) // 16:
                new = self.new_node()
                if chunk:
                    self.set_word(chunk, new)
                self.first = self.first or new
                chunk, count, last = new, 0, order
            assert self.abi.preserve_bits is not None
            start = index * self.abi.preserve_bits << order + self.abi.page_shift
            self.set_word(chunk + 16 + 16 * count, start)
            self.set_word(chunk + 24 + 16 * count, self.bitmaps[order, index])
            count += 1
            self.set_word(chunk + 8, order | count << 32)

    def read(self, address: int, size: int) -> bytes | None:
        page = address & -self.abi.page_size
        data = super().read(
            page, -(-(address + size - page) // self.abi.page_size) * self.abi.page_size
        )
        return None if data is None else data[address - page : address - page + size]

    def walk(self) -> Tree:
        return walk_track(self.abi, LAYOUT, 0x1000, self.head, self.ram, self.read)

    def walk_chunks(self) -> Tree:
        return walk_chunks(self.abi, self.first, self.ram, self.read)
