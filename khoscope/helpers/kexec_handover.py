# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kexec HandOver
--------------

Helpers for Kexec HandOver (KHO): ``kernel/liveupdate/kexec_handover.c``,
``include/linux/kho_radix_tree.h`` and ``include/linux/kho/abi/kexec_handover.h``.

This module depends on nothing but drgn.  Like drgn's own helpers, it takes no lock, and raises
:class:`drgn.FaultError` for memory that cannot be read.  By the time somebody looks at memory that
KHO handed over, the memory may hold anything.  These helpers therefore validate each pointer before
they follow it, and every iteration ends whatever the memory holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from drgn import IntegerLike, Object, Program, reinterpret, sizeof
from drgn.helpers import ValidationError
from drgn.helpers.common.prog import takes_program_or_default
from drgn.helpers.linux.mm import phys_to_page, phys_to_virt, virt_to_phys

__all__ = (
    "KhoBlock",
    "is_kho_boot",
    "kho_decode_radix_key",
    "kho_is_enabled",
    "kho_mem_track_for_each",
    "kho_page_info",
    "kho_radix_tree_for_each",
    "kho_radix_tree_for_each_key",
    "kho_restored",
    "kho_scratch_for_each",
    "kho_vmalloc_for_each_page",
    "khoser_mem_chunk_for_each",
)

# "KHOP", a #define in kernel/liveupdate/kexec_handover.c, which debug info does not have.
_KHO_PAGE_MAGIC = 0x4B484F50


class KhoBlock(NamedTuple):
    """A block of pages that KHO preserves: ``1 << order`` pages, beginning at *phys*."""

    phys: int
    """Physical address: ``phys_addr_t``"""
    order: int
    """log2 of the number of pages: ``unsigned int``"""
    type: Object | None
    """``enum kho_page_type``, or ``None`` in kernels that do not have it"""


@takes_program_or_default
def kho_is_enabled(prog: Program) -> bool:
    """
    Return whether KHO is enabled.

    >>> kho_is_enabled()
    True
    """
    return bool(prog["kho_enable"])


@takes_program_or_default
def is_kho_boot(prog: Program) -> bool:
    """Return whether this kernel was booted by a kexec with KHO."""
    return bool(prog["kho_in"].fdt_phys)


@takes_program_or_default
def kho_scratch_for_each(prog: Program) -> Iterator[Object]:
    """
    Iterate over the scratch areas.

    A kernel that is booted with KHO allocates from these areas until it has seen which memory is
    preserved.

    >>> for scratch in kho_scratch_for_each():
    ...     print(hex(scratch.addr), hex(scratch.size))
    ...
    0x37c00000 0x6800000
    0x36200000 0x1a00000
    0x27a00000 0xe800000

    :return: Iterator of ``struct kho_scratch`` objects. If KHO is not enabled, there are those that
        the previous kernel handed over, or none.
    """
    # If reserving an area fails, the kernel disables KHO and frees the array, but keeps the pointer
    # and the number of areas.
    if not prog["kho_enable"] and not prog["kho_in"].scratch_phys:
        return
    areas = prog["kho_scratch"].read_()
    if areas:
        for i in range(prog["kho_scratch_cnt"].value_()):
            yield areas[i]


def kho_radix_tree_for_each(tree: Object) -> Iterator[KhoBlock]:
    """
    Iterate over the blocks of pages in a KHO radix tree.

    >>> for block in kho_radix_tree_for_each(prog["kho_out"].radix_tree):
    ...     print(hex(block.phys), block.order)
    ...
    0x2d694000 4
    0x2d690000 0
    ...
    >>> phys_to_page(block.phys)
    *(struct page *)0xffffea0000b5a400 = {
    ...

    :param tree: ``struct kho_radix_tree *`` (or the ``struct kho_radix_tree`` itself)
    :return: Iterator of blocks, by descending order, then by ascending address. If the kernel has
        types, blocks that are not split come first.
    :raises ValidationError: if a table points to an address that is not a page's, or to a page that
        was visited before, or if a key does not stand for a block. Some radix trees have other
        keys; see :func:`kho_radix_tree_for_each_key()`.
    """
    for key in kho_radix_tree_for_each_key(tree):
        try:
            yield kho_decode_radix_key(tree.prog_, key)
        except ValueError as e:
            raise ValidationError(str(e)) from None


def kho_radix_tree_for_each_key(tree: Object) -> Iterator[int]:
    """
    Iterate over the keys in a KHO radix tree, in ascending order.

    :param tree: ``struct kho_radix_tree *`` (or the ``struct kho_radix_tree`` itself)
    :raises ValidationError: if a table points to an address that is not a page's, or to a page that
        was visited before
    """
    root = tree.root.read_()
    if root:
        depth, table_log2, bitmap_log2 = _radix_geometry(tree.prog_)
        yield from _radix_keys(root[0].read_(), depth - 1, 0, table_log2, bitmap_log2, set())


def _radix_geometry(prog: Program) -> tuple[int, int, int]:
    table = prog.type("struct kho_radix_node").member("table").type
    table_log2 = (table.length or 0).bit_length() - 1
    bitmap_log2 = (8 * sizeof(prog.type("struct kho_radix_leaf"))).bit_length() - 1
    try:
        depth = prog.constant("KHO_TREE_MAX_DEPTH").value_()
    except LookupError:
        # Debug info may lack enumerators that no code uses. This is the kernel's own arithmetic,
        # which gives the tree enough levels for each key of an order-0 block.
        bits = _order_0_log2(prog) + 1 - bitmap_log2
        depth = -(-bits // table_log2) + 1
    return depth, table_log2, bitmap_log2


def _order_0_log2(prog: Program) -> int:
    # This is KHO_ORDER_0_LOG2 up to Linux 7.2. Later kernels have no such enumerator.
    return 64 - prog["PAGE_SHIFT"].value_()


def _radix_keys(
    node: Object, level: int, base: int, table_log2: int, bitmap_log2: int, seen: set[int]
) -> Iterator[int]:
    # This visits a page at a time, and each page at most once. So the number of pages bounds the
    # walk, whatever the tables hold.
    prog = node.prog_
    type_name = "struct kho_radix_node" if level > 1 else "struct kho_radix_leaf"
    shift = bitmap_log2 + (level - 1) * table_log2
    for index, phys in enumerate(node.table.value_()):
        if not phys:
            continue
        if phys % prog["PAGE_SIZE"].value_() or phys in seen:
            why = "was there before" if phys in seen else "is not aligned"
            raise ValidationError(f"entry {index} of a table at level {level}: {phys:#x} {why}")
        seen.add(phys)
        type = prog.type(type_name)
        below = Object.from_bytes_(prog, type, prog.read(phys, sizeof(type), physical=True))
        key = base | index << shift
        if level > 1:
            yield from _radix_keys(below, level - 1, key, table_log2, bitmap_log2, seen)
        else:
            yield from _set_bits(below.bitmap, key)


def _set_bits(bitmap: Object, base: int) -> Iterator[int]:
    # for_each_set_bit() would create an object for each word.
    bits = 8 * sizeof(bitmap[0])
    for i, word in enumerate(bitmap.value_()):
        while word:
            yield base + i * bits + (word & -word).bit_length() - 1
            word &= word - 1


def kho_mem_track_for_each(track: Object) -> Iterator[KhoBlock]:
    """
    Iterate over the blocks of pages in the xarrays that kernels had before the radix tree (linux
    6.16 to 7.0).

    >>> for block in kho_mem_track_for_each(prog["kho_out"].ser.track):
    ...     print(hex(block.phys), block.order)
    ...
    0xcf1000 0
    0x6b8000 1
    ...

    :param track: ``struct kho_mem_track *`` (or the ``struct kho_mem_track`` itself)
    :return: Iterator of blocks, by ascending order, then by ascending address.
    :raises ValidationError: if a node of an xarray was visited before, or is not below the node
        that leads to it, if an entry is not a pointer, if there are no blocks of an order, or if a
        bitmap is not aligned or was visited before
    """
    prog, seen = track.prog_, set[int]()
    for order, physxa in _xa_for_each(track.orders):
        phys_bits = Object(prog, "struct kho_mem_phys", address=physxa).phys_bits
        for index, bits in _xa_for_each(phys_bits):
            bitmap = Object(prog, "struct kho_mem_phys_bits", address=bits)
            _check_bitmap(bitmap, order, seen)
            yield from _bitmap_blocks(bitmap, order, index * 8 * sizeof(bitmap) << order)


def khoser_mem_chunk_for_each(chunk: Object) -> Iterator[KhoBlock]:
    """
    Iterate over the blocks of pages that such a kernel hands over once it is finalized.

    >>> chunk = prog["kho_out"].ser.preserved_mem_map
    >>> sum(1 for block in khoser_mem_chunk_for_each(chunk))
    17

    :param chunk: ``struct khoser_mem_chunk *``, the first of the chain, or ``NULL``
    :return: Iterator of blocks, in the order in which the next kernel reserves them.
    :raises ValidationError: if a chunk is not at the address of a page, was visited before, or says
        to have more bitmaps than fit into it, if there are no blocks of its order, or if a bitmap
        is not aligned or was visited before
    """
    prog, seen, bitmaps = chunk.prog_, set[int](), set[int]()
    page_shift = prog["PAGE_SHIFT"].value_()
    at = virt_to_phys(chunk).value_() if chunk else 0
    while at:
        if at % prog["PAGE_SIZE"] or at in seen:
            why = "was there before" if at in seen else "is not aligned"
            raise ValidationError(f"chunk {len(seen)} at {at:#x} {why}")
        seen.add(at)
        found = Object(prog, chunk.type_.type, address=phys_to_virt(prog, at).value_())
        header = found.hdr.read_()
        order, count = header.order.value_(), header.num_elms.value_()
        if count > (capacity := found.bitmaps.type_.length or 0):
            raise ValidationError(f"chunk at {at:#x}: {count} bitmaps, room for {capacity}")
        for i in range(count):
            where = phys_to_virt(prog, found.bitmaps[i].bitmap.phys).value_()
            bitmap = Object(prog, "struct kho_mem_phys_bits", address=where)
            _check_bitmap(bitmap, order, bitmaps)
            first = found.bitmaps[i].phys_start.value_() >> page_shift
            yield from _bitmap_blocks(bitmap, order, first)
        at = header.next.phys.value_()


def _check_bitmap(bitmap: Object, order: int, seen: set[int]) -> None:
    # An order from memory may be any number, and shifting by that may take all memory there is.
    if order >= _order_0_log2(bitmap.prog_):
        raise ValidationError(f"a bitmap of order {order}: there are no such blocks")
    at = bitmap.address_ or 0
    if at % sizeof(bitmap) or at in seen:
        why = "was there before" if at in seen else "is not aligned"
        raise ValidationError(f"bitmap of order {order} at {at:#x} {why}")
    seen.add(at)


def _bitmap_blocks(bitmap: Object, order: int, first: int) -> Iterator[KhoBlock]:
    """
    :param bitmap: ``struct kho_mem_phys_bits``
    :param first: pfn that bit 0 stands for
    """
    page_shift = bitmap.prog_["PAGE_SHIFT"].value_()
    bits = int.from_bytes(bitmap.to_bytes_(), "little")
    while bits:
        bit = (bits & -bits).bit_length() - 1
        bits &= bits - 1
        yield KhoBlock(first + (bit << order) << page_shift, order, None)


def _xa_for_each(xa: Object) -> Iterator[tuple[int, int]]:
    """
    Like :func:`drgn.helpers.linux.xarray.xa_for_each()` for xarrays of pointers, but it ends
    whatever the nodes hold.

    :return: Iterator of index and pointer
    """
    seen: set[int] = set()

    def entries(entry: int, index: int, above: int) -> Iterator[tuple[int, int]]:
        if not entry & 3:
            if entry:
                yield index, entry
            return
        # See xa_is_node().
        if entry & 3 != 2 or entry <= 4096:
            raise ValidationError(f"xarray entry {entry:#x} is not a pointer")
        node = Object(xa.prog_, "struct xa_node", address=entry - 2).read_()
        shift = node.shift.value_()
        if entry in seen or shift >= above:
            why = "was there before" if entry in seen else f"has shift {shift} below {above}"
            raise ValidationError(f"xarray node at {entry - 2:#x} {why}")
        seen.add(entry)
        for i, slot in enumerate(node.slots):
            yield from entries(slot.value_(), index + (i << shift), shift)

    yield from entries(xa.xa_head.value_(), 0, 64)


@takes_program_or_default
def kho_decode_radix_key(prog: Program, key: IntegerLike) -> KhoBlock:
    """
    Return the block of pages that a key of a KHO radix tree stands for.

    :param key: ``u64``
    :raises ValueError: if the key stands for no block
    """
    key = encoded = int(key)
    order_0_log2 = _order_0_log2(prog)
    type = None
    try:
        name = "enum kho_page_type"
        type = Object(prog, prog.type(name), 0)
        # Without this constant, the type is in a bit that the tree does not store, so the type that
        # is read is 0.
        shift = prog.constant("KHO_KEY_TYPE_SHIFT").value_()
        type = Object(prog, prog.type(name), encoded >> shift & 1)
        encoded &= ~(1 << shift)
    except LookupError:
        pass
    order = order_0_log2 - (encoded.bit_length() - 1)
    if not 0 <= order <= order_0_log2:
        raise ValueError(f"radix key {key:#x} is not that of a block of pages")
    page_shift = prog["PAGE_SHIFT"].value_()
    phys = (encoded ^ 1 << order_0_log2 - order) << page_shift + order
    return KhoBlock(phys, order, type)


def kho_page_info(page: Object) -> Object | None:
    """
    Return KHO's note in a page, if the page is the first of a block that was handed to this kernel
    and that nobody has restored since.

    >>> kho_page_info(phys_to_page(0x2d694000))
    (union kho_page_info){
            .page_private = (unsigned long)5424707219120881668,
            .order = (unsigned int)4,
            .magic = (unsigned int)1263030096,
    }

    :param page: ``struct page *``
    :return: ``union kho_page_info``, or ``None`` if the page has none
    :raises LookupError: if the kernel's notes have no magic (linux 6.16 and 6.17). Then they are an
        order alone, and cannot be told from whatever else is in ``page->private``.
    """
    try:
        note = page.prog_.type("union kho_page_info")
    except LookupError:
        raise LookupError(
            "this kernel has no union kho_page_info: KHO's notes have no magic, and cannot be told "
            "from other words in page->private"
        ) from None
    # Read the note only once, because somebody may restore the page meanwhile.
    info = reinterpret(note, page.private).read_()
    return info if info.magic == _KHO_PAGE_MAGIC else None


def kho_restored(page: Object) -> bool:
    """
    Return whether a block that was handed to this kernel looks restored: its first page is in use,
    and KHO's note is gone.

    Restoring leaves no trace, and a restored page looks like any other page that is in use.  So the
    answer means nothing for a page that was not the first page of a handed-over block.  The answer
    is false if the block was restored and has been freed since, and true again after another owner
    has allocated the page.  A block with a :func:`kho_page_info()` has certainly not been restored
    yet.

    :param page: ``struct page *``, the first page of the block
    :raises LookupError: as :func:`kho_page_info()`. Without a note, nothing else tells: the page
        has a reference before it is restored, too.
    """
    return kho_page_info(page) is None and page._refcount.counter.value_() > 0


def kho_vmalloc_for_each_page(desc: Object) -> Iterator[Object]:
    """
    Iterate over the pages of a preserved vmalloc area, in the order in which they were mapped.

    >>> desc = Object(prog, "struct kho_vmalloc", address=0xffff888001898768)
    >>> [hex(page_to_phys(page)) for page in kho_vmalloc_for_each_page(desc)]
    ['0x2a5f000', '0x2a63000', '0x2a62000']

    :param desc: ``struct kho_vmalloc *`` (or the ``struct kho_vmalloc`` itself)
    :return: Iterator of ``struct page *`` objects.
    :raises ValidationError: if a chunk is not at the address of a page, or was visited before, or
        if the chunks do not list as many pages as the area has
    """
    prog = desc.prog_
    total, order = desc.total_pages.value_(), desc.order.value_()
    left = total
    for phys in _vmalloc_entries(prog, desc.first.phys.value_()):
        first = phys_to_page(prog, phys)
        for i in range(1 << order):
            if not left:
                raise ValidationError(f"the chunks list more than total_pages, {total}")
            left -= 1
            yield first + i
    if left:
        raise ValidationError(f"the chunks list {total - left} pages, total_pages is {total}")


def _vmalloc_entries(prog: Program, at: int) -> Iterator[int]:
    type = prog.type("struct kho_vmalloc_chunk")
    seen: set[int] = set()
    while at:
        if at % sizeof(type) or at in seen:
            why = "was there before" if at in seen else "is not aligned"
            raise ValidationError(f"chunk {len(seen)} at {at:#x} {why}")
        seen.add(at)
        raw = prog.read(at, sizeof(type), physical=True)
        chunk = Object.from_bytes_(prog, type, raw)
        for phys in chunk.phys.value_():
            # The first entry that is zero ends the chunk.
            if not phys:
                break
            yield phys
        at = chunk.hdr.next.phys.value_()
