# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The KHO ABI: tree geometry, keys of blocks, page stamps, and what kernels do differently.

Pure arithmetic on ints and numpy arrays.  It does not use drgn and imports no other module of
khoscope.
Kernel sources: ``include/linux/kho/abi/kexec_handover.h`` and
``kernel/liveupdate/kexec_handover.c``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

#: ``KHO_PAGE_MAGIC``, "KHOP": the high half of a stamp (kexec_handover.c).
KHO_PAGE_MAGIC: Final = 0x4B484F50

#: ``enum kho_page_type`` of the patch series.
KHO_PAGE_CONTIG: Final = 0
KHO_PAGE_SPLIT: Final = 1
#: In a type column: the kernel records no types.
NO_TYPE: Final = -1

#: In an order column: the key or the stamp has no order that a block could have.
BAD_ORDER: Final = 255

#: Where the series as posted puts the type (a #define, which debug info does not carry).
POSTED_TYPE_SHIFT: Final = 63

#: Root FDT ``compatible`` strings that kernels without page types accept.
COMPATIBLES_WITHOUT_TYPES: Final = frozenset({"kho-v1", "kho-v2", "kho-v3", "kho-v4"})

#: The compatibles that khoscope knows, without types and with: v1 is that of the xarray tracker,
#: the others are those of radix trees.
COMPATIBLES: Final = COMPATIBLES_WITHOUT_TYPES | {"kho-v5"}

TYPE_NAMES: Final = {NO_TYPE: None, KHO_PAGE_CONTIG: "contig", KHO_PAGE_SPLIT: "split"}


class Tracker(StrEnum):
    """How a kernel keeps what is preserved."""

    #: ``struct kho_radix_tree`` (since linux 7.1).
    RADIX = "radix tree"
    #: ``struct kho_mem_track``: bitmaps below an xarray for each order (linux 6.16 to 7.0).
    XARRAY = "xarrays of bitmaps"


class Finalize(StrEnum):
    """When what is preserved must be finalized for a kexec to hand it over."""

    #: There is no such step: the tree is handed over as it is (since linux 7.1).
    NEVER = "never"
    #: Before the kexec (linux 6.19 and 7.0).
    BEFORE_KEXEC = "before the kexec"
    #: Before the image is loaded, too: ``kho_fill_kimage`` asks (linux 6.16 to 6.18).
    BEFORE_LOAD = "before the image is loaded"


class Restore(StrEnum):
    """What ``kho_restore_page`` makes of a block that is restored as pages."""

    #: Pages, each with a refcount (since linux 6.19).
    PAGES = "pages"
    #: A compound page that ``split_page`` then takes apart, which is not made for that: each page
    #: has a refcount, and head and tails keep their flags (linux 6.18).
    SPLIT_FOLIO = "a folio, split"
    #: A folio: there is nothing else to restore (linux 6.16 and 6.17).
    FOLIO = "a folio"


@dataclass(frozen=True)
class Stamp:
    """
    Layout of ``union kho_page_info``, the stamp in ``page->private`` of a block's first page.

    Bit offsets and widths within the u64.  ``type_shift`` is None if stamps have no type.
    ``magic_shift`` is None if they have no magic (linux 6.16 and 6.17): such a stamp is the order
    alone, and nothing tells that of a single page, 0, from a page without one.
    """

    order_bits: int = 32
    type_shift: int | None = None
    magic_shift: int | None = 32

    @property
    def has_magic(self) -> bool:
        """Whether a stamp can be told from any other word."""
        return self.magic_shift is not None

    def encode(self, order: int, page_type: int = KHO_PAGE_CONTIG) -> int:
        """The ``page->private`` word of a stamp."""
        word = order
        if self.magic_shift is not None:
            word |= KHO_PAGE_MAGIC << self.magic_shift
        if self.type_shift is not None:
            word |= page_type << self.type_shift
        return word

    def is_stamp(self, private: U64) -> NDArray[np.bool_]:
        """Which ``page->private`` words carry the magic; none if there is no magic."""
        if self.magic_shift is None:
            return np.zeros(private.shape, np.bool_)
        return (private >> np.uint64(self.magic_shift)) == np.uint64(KHO_PAGE_MAGIC)

    def order(self, private: U64) -> U64:
        """The order of each stamp, even if it is nonsense."""
        return private & np.uint64((1 << self.order_bits) - 1)

    def type(self, private: U64) -> NDArray[np.int8]:
        """The type of each stamp; ``NO_TYPE`` if stamps have no type."""
        if self.type_shift is None:
            return np.full(private.shape, NO_TYPE, np.int8)
        return ((private >> np.uint64(self.type_shift)) & np.uint64(1)).astype(np.int8)


@dataclass(frozen=True)
class BlockLimits:
    """
    The largest blocks that a kernel can be handed.

    :param size: bytes; its boot does not reserve blocks of this size and above as they are.  None:
        it reserves all of them.
    :param order: the highest order that its restore gives back.  None: any.
    """

    size: int | None = None
    order: int | None = None


@dataclass(frozen=True)
class Abi:
    """
    What one kernel does: sizes in bits (log2), depth in levels.

    :param page_shift: ``PAGE_SHIFT``.
    :param order_0_log2: ``KHO_ORDER_0_LOG2``, the order bit of an order-0 block.
    :param table_size_log2: ``KHO_TABLE_SIZE_LOG2``, entries in a ``struct kho_radix_node``.
    :param bitmap_size_log2: ``KHO_BITMAP_SIZE_LOG2``, bits in a ``struct kho_radix_leaf``.
    :param tree_max_depth: ``KHO_TREE_MAX_DEPTH``, table levels and the leaf.
    :param max_page_order: ``MAX_PAGE_ORDER`` of the buddy allocator.
    :param type_shift: key bit of ``enum kho_page_type``; None: no types.
    :param compatible: ``compatible`` of the kernel's own root FDT; None: not readable.
    :param key_width: ``KHO_RADIX_KEY_WIDTH``, bits of the widest key that an add accepts; wider
        keys fail with -ERANGE.  None: an add accepts any key and drops the bits that the tree does
        not store.
    :param tracker: how it keeps what is preserved.
    :param preserve_bits: ``PRESERVE_BITS``, in each bitmap of the xarray tracker; None for a radix
        tree, whose bitmaps are leaves.
    :param finalize: whether, and when, what is preserved must be finalized.
    :param restores_pages_as: what a restore as pages makes of a block.
    :param limits: what a next kernel like this one can be handed; none since linux 7.2.
    :param decided: how each of these was decided, for people.
    """

    page_shift: int
    order_0_log2: int
    table_size_log2: int
    bitmap_size_log2: int
    tree_max_depth: int
    max_page_order: int = 10
    type_shift: int | None = None
    stamp: Stamp = Stamp()
    compatible: str | None = None
    key_width: int | None = None
    tracker: Tracker = Tracker.RADIX
    preserve_bits: int | None = None
    finalize: Finalize = Finalize.NEVER
    restores_pages_as: Restore = Restore.PAGES
    limits: BlockLimits = BlockLimits()
    decided: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def for_page_shift(cls, page_shift: int, **known: Any) -> Abi:
        """The geometry that ``enum kho_radix_consts`` gives for a page size."""
        order_0 = 64 - page_shift
        table = page_shift - 3
        bitmap = page_shift + 3
        depth = -(-(order_0 - bitmap + 1) // table) + 1
        return cls(page_shift, order_0, table, bitmap, depth, **known)

    @property
    def page_size(self) -> int:
        """``PAGE_SIZE``, bytes."""
        return 1 << self.page_shift

    @property
    def table_entries(self) -> int:
        return 1 << self.table_size_log2

    @property
    def leaf_bits(self) -> int:
        return 1 << self.bitmap_size_log2

    @property
    def bitmap_log2(self) -> int:
        """Bits in a bitmap as it is in memory: a leaf, or the part of one that an xarray keeps."""
        if self.preserve_bits is None:
            return self.bitmap_size_log2
        return self.preserve_bits.bit_length() - 1

    @property
    def bitmap_bytes(self) -> int:
        """Size of a bitmap as it is in memory."""
        return 1 << (self.bitmap_log2 - 3)

    @property
    def stored_bits(self) -> int:
        """
        How many low key bits the tree has levels for.  An add that accepts wider keys silently
        drops the higher bits.
        """
        return self.bitmap_size_log2 + (self.tree_max_depth - 1) * self.table_size_log2

    @property
    def order_is_stored(self) -> bool:
        """Whether the tree has a level for the order bit of order 0, the highest of all orders."""
        return self.order_0_log2 < self.stored_bits

    @property
    def has_types(self) -> bool:
        return self.type_shift is not None

    @property
    def type_is_refused(self) -> bool:
        """Whether a key with the type bit is wider than an add accepts."""
        if self.type_shift is None or self.key_width is None:
            return False
        return self.type_shift >= self.key_width

    @property
    def type_is_stored(self) -> bool:
        """Whether the type bit lies inside the key bits that the tree stores."""
        stored = self.type_shift is not None and self.type_shift < self.stored_bits
        return stored and not self.type_is_refused

    @property
    def type_bit(self) -> int:
        """The type's bit in a stored key; 0 if the tree does not store the type."""
        return 1 << self.type_shift if self.type_shift is not None and self.type_is_stored else 0

    @property
    def key_types(self) -> tuple[int, ...]:
        """The types that stored keys tell apart; as the kernel's walk sees it, contig alone if the
        tree does not store them."""
        if self.type_bit:
            return KHO_PAGE_CONTIG, KHO_PAGE_SPLIT
        return (KHO_PAGE_CONTIG if self.has_types else NO_TYPE,)

    def table_shift(self, level: int) -> int:
        """The key bit at which the index into a table of ``level`` (1 and up) begins."""
        return (level - 1) * self.table_size_log2 + self.bitmap_size_log2

    def kho_radix_encode_key(self, phys: int, order: int, page_type: int = KHO_PAGE_CONTIG) -> int:
        """
        The key under which the tree holds a block, as far as the tree stores it.

        :param phys: ``phys_addr_t`` of the block's first page.
        """
        key = 1 << (self.order_0_log2 - order) | phys >> (self.page_shift + order)
        key |= self.type_bit if page_type == KHO_PAGE_SPLIT else 0
        return key & (1 << self.stored_bits) - 1

    def kho_radix_encode_keys(self, phys: U64, order: int, page_type: int) -> U64:
        """:meth:`kho_radix_encode_key` for many addresses of one order and type."""
        high = self.kho_radix_encode_key(0, order, page_type)
        return (phys >> np.uint64(self.page_shift + order)) | np.uint64(high)

    def kho_radix_decode_keys(self, keys: U64) -> tuple[U64, NDArray[np.uint8], NDArray[np.int8]]:
        """
        Physical addresses, orders and types of stored keys.

        A key without an order bit, or with bits above those that order and type use, has
        ``BAD_ORDER`` and address 0.
        """
        plain = keys & np.uint64(~self.type_bit & (1 << 64) - 1)
        if len(keys) and self._is_one_kind(keys):
            # At scale: all keys of a leaf, or of many, have one order and type.
            _, same, kind = self.kho_radix_decode_key(int(keys[0]))
            phys = plain << np.uint64(self.page_shift + same)
            return phys, np.full(len(keys), same, np.uint8), np.full(len(keys), kind, np.int8)
        if self.type_bit:
            types = ((keys & np.uint64(self.type_bit)) != 0).astype(np.int8)
        else:
            # As the kernel's own walk sees it: a type that is not stored reads as contig.
            types = np.full(keys.shape, KHO_PAGE_CONTIG if self.has_types else NO_TYPE, np.int8)
        if (keys[1:] >= keys[:-1]).all():
            return *self._decode_sorted(keys, plain), types
        bit = _highest_bit(plain)
        good = (bit >= 0) & (bit <= self.order_0_log2)
        order = np.where(good, self.order_0_log2 - bit, 0)
        # At order 52 the shift would be 64, which C and numpy leave undefined; the order bit is
        # then bit 0, and nothing of the address is left.
        shift = np.minimum(order + self.page_shift, 63).astype(np.uint64)
        phys = np.where(good & (bit > 0), plain << shift, 0).astype(np.uint64)
        return phys, np.where(good, order, BAD_ORDER).astype(np.uint8), types

    def _decode_sorted(self, keys: U64, plain: U64) -> tuple[U64, NDArray[np.uint8]]:
        """
        Addresses and orders of sorted keys: those of one order and type are neighbours.

        :param plain: the keys without their type bit.
        """
        phys = np.zeros(len(keys), np.uint64)
        order = np.full(len(keys), BAD_ORDER, np.uint8)
        bits = np.uint64(1) << np.arange(self.order_0_log2 + 2, dtype=np.uint64)
        for base in {0, self.type_bit}:
            begins = np.searchsorted(keys, bits + np.uint64(base)).tolist()
            for bit, (low, high) in enumerate(pairwise(begins)):
                if low == high:
                    continue
                order[low:high] = self.order_0_log2 - bit
                # At order 52 nothing of the address is left, and the shift would be 64.
                if bit:
                    shift = self.order_0_log2 - bit + self.page_shift
                    phys[low:high] = plain[low:high] << np.uint64(shift)
        return phys, order

    def _is_one_kind(self, keys: U64) -> bool:
        """Whether keys have the same order, below 52, and type."""
        low, high = int(keys.min()), int(keys.max())
        bit = (low & ~self.type_bit).bit_length() - 1
        if not 0 < bit <= self.order_0_log2:
            return False
        return (low ^ high) & ~((1 << bit) - 1) == 0

    def kho_radix_decode_key(self, key: int) -> tuple[int, int, int]:
        """:meth:`kho_radix_decode_keys` for a single key, without numpy's cost for small arrays."""
        plain = key & ~self.type_bit
        page_type = KHO_PAGE_SPLIT if key & self.type_bit else KHO_PAGE_CONTIG
        order = self.order_0_log2 - (plain.bit_length() - 1)
        good = 0 <= order <= self.order_0_log2
        phys = (plain << self.page_shift + order) & (1 << 64) - 1 if good else 0
        return phys, order if good else BAD_ORDER, page_type if self.has_types else NO_TYPE

    def order_limit(self, span: int) -> int:
        """The highest order whose blocks fit into ``span`` bytes of address space."""
        return max((span >> self.page_shift).bit_length() - 1, 0)


def _highest_bit(values: U64) -> NDArray[np.int64]:
    """``fls64() - 1`` for each value; -1 for 0."""
    # A float64 holds 53 bits, so a large value might round up to the next power of two.  Each half
    # is exact.
    high = (values >> np.uint64(32)).astype(np.float64)
    low = (values & np.uint64(0xFFFFFFFF)).astype(np.float64)
    bit = np.where(high > 0, np.frexp(high)[1] + 31, np.frexp(low)[1] - 1)
    return np.where(values == 0, -1, bit).astype(np.int64)
