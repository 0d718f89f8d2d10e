# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about preserved blocks in one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import (
    BAD_ORDER,
    KHO_PAGE_CONTIG,
    KHO_PAGE_SPLIT,
    U64,
    Abi,
    BlockLimits,
    Restore,
    Tracker,
)
from ..facts.clients import OwnerKind
from ..facts.columns import Blocks, Leaves, Pages
from ..facts.next_kernel import NextKernel
from ..facts.owners import FolioTotal
from ..facts.snapshot import Snapshot
from ..facts.tree import KeySet, Tree, TreeState, decode_leaves
from .inplace import InPlace
from .pattern import (
    ORDER_LOST,
    describe,
    fits,
    is_contig,
    is_split,
    lost_orders,
    lost_type,
    named,
    readable,
    restores_split,
    stays_compound,
    type_name,
    typed,
)
from .rule import Marked, Message, Severity, also, rule


@rule(
    "type-mismatch",
    Severity.ERROR,
    "blocks",
    """
    The next kernel restores refcounts by the recorded type, whatever the pages were. Recorded
    contig but split: the tails come back at 0, and freeing one hits VM_BUG_ON_PAGE. Recorded split
    but contig: the tails come back at 1, and freeing the block trips "Bad page state" and leaks it.
    Either the kernel cannot store the type, or the block was split after it was preserved.
    Unpreserve it, and preserve it again as it is now (kho_split_preserved_pages() does both).
    """,
    kernel="kho_preserve_pages kho_restore_page",
)
def type_mismatch(facts: Snapshot, blocks: Blocks) -> Marked:
    """The recorded type says one refcount pattern and the struct pages show the other."""
    return Marked(
        blocks.by_look(_other_type),
        lambda row: (
            f"recorded {type_name(int(blocks.type[row]))}, the pages are {_describe(blocks, row)}"
        ),
        "type-not-stored",
        lost_type(facts.abi, blocks),
    )


def _other_type(blocks: Blocks) -> NDArray[np.bool_]:
    pages = blocks.facts
    wrong = (blocks.type == KHO_PAGE_CONTIG) & is_split(pages)
    wrong |= (blocks.type == KHO_PAGE_SPLIT) & is_contig(pages)
    return wrong & (pages.tails > 0) & typed(blocks)


@rule(
    "mixed-refcounts",
    Severity.ERROR,
    "blocks",
    """
    Restore knows two patterns: 1 on the first page and 0 on the others, or 1 on every page. Two
    unsplit blocks that were preserved with one call, or a part of a block, come back wrong under
    either type, in every kernel. Preserve each block by itself, and whole.
    """,
    kernel="kho_restore_page kho_init_pages kho_init_folio",
)
def mixed_refcounts(facts: Snapshot, blocks: Blocks) -> Marked:
    """No type describes the block: neither 1/0 nor 1/1, heads at 0 included."""

    def mixed(blocks: Blocks) -> NDArray[np.bool_]:
        return _judged(blocks) & ~is_contig(blocks.facts) & ~is_split(blocks.facts)

    return Marked(
        blocks.by_look(mixed),
        lambda row: f"no type fits: the pages are {_describe(blocks, row)}",
    )


#: What :func:`wrong_after_restore` says about a kernel that splits what it has made compound.
_STAYS_COMPOUND = """
    In a next kernel like this one, kho_restore_pages() makes a compound page of each block and
    hands it to split_page(), which is not made for compound pages: it sets the refcounts and leaves
    the flags. With CONFIG_DEBUG_VM that is a BUG in the restore. Without, freeing one of the pages
    trips "Bad page state", and the memory leaks. Do not kexec with this memory preserved, restore
    it and never free it, or preserve and restore it as a folio.
    """


@rule(
    "wrong-after-restore",
    Severity.ERROR,
    "next-blocks",
    """
    In a next kernel like this one, kho_restore_pages() or kho_restore_folio() will give these pages
    other refcounts than they have now. Tails that come back at 1 instead of 0 trip "Bad page state"
    when the block is freed, and leak. Tails that come back at 0 instead of 1 hit VM_BUG_ON_PAGE. Do
    not kexec with this memory preserved, or restore it and never free it.
    """,
    kernel="kho_restore_page kho_init_pages kho_init_folio",
)
def wrong_after_restore(kernel: NextKernel | None, facts: Snapshot, blocks: Blocks) -> Marked:
    """What the next kernel's restore will set differs from what is there now; it is assumed to
    do what this kernel does, unless its image tells."""
    abi, who = _restored_by(kernel, facts)

    # Assume that clients restore a folio with kho_restore_folio(); where that is not known,
    # needs-folio-restore says so.
    def split(blocks: Blocks) -> NDArray[np.bool_]:
        return restores_split(abi, blocks.type, blocks.facts.compound > 0)

    def compound(blocks: Blocks) -> NDArray[np.bool_]:
        return stays_compound(abi, blocks.order, blocks.facts.compound > 0)

    def other(blocks: Blocks) -> NDArray[np.bool_]:
        return _judged(blocks) & (~fits(blocks.facts, split(blocks)) | compound(blocks))

    def say(row: int) -> str:
        block = blocks[row : row + 1]
        how = ", and leave it a compound page" if compound(block)[0] else ""
        return (
            f"{_describe(blocks, row)} now, {who} will restore it as "
            f"{named(int(block.order[0]), bool(split(block)[0]))}{how}"
        )

    wrong = blocks.by_look(other)
    if wrong.any():
        # Nobody restores what is used in place.
        wrong &= ~InPlace(facts).claimed(blocks)
    return Marked(
        wrong,
        say,
        "type-not-stored",
        lost_type(facts.abi, blocks),
        _STAYS_COMPOUND if blocks.by_look(compound).any() else "",
    )


def _restored_by(kernel: NextKernel | None, facts: Snapshot) -> tuple[Abi, str]:
    """The ABI of the kernel that restores, and its name."""
    if kernel is None or facts.abi.tracker != Tracker.XARRAY or not kernel.luo:
        return facts.abi, f"{facts.kernel.release} as the next kernel"
    # Kernels that take kho-v1 and have LUO are linux 6.19 and 7.0.
    return replace(facts.abi, restores_pages_as=Restore.PAGES), kernel.release


@also("wrong-after-restore", "folios")
def folios_in_vmalloc(facts: Snapshot, folios: list[FolioTotal]) -> Iterator[Message]:
    """A vmalloc area has folios among its pages, which it gets back as single pages."""
    for each in folios:
        if each.owner is not None and each.owner.kind == OwnerKind.VMALLOC_PAGE:
            yield Message(
                f"{each.owner.name} has {_folios(each)} among its pages; "
                f"kho_restore_vmalloc() restores no folio",
                each.first[0],
                """
                kho_restore_vmalloc() restores the area by kho_restore_pages(), which makes no folio
                of what was one. Whoever takes these pages for folios then frees the first of each
                and leaks the others, or trips "Bad page state". Do not put folios into an area that
                is handed over.
                """,
            )


@rule(
    "needs-folio-restore",
    Severity.WARNING,
    "folios",
    """
    Nothing in memory says how their owner will restore these compound pages: kho_preserve_folio()
    and kho_preserve_pages() make the same entries. They come back as they are only by
    kho_restore_folio(). kho_restore_pages() makes no folio of them: where the kernel has no page
    types, each page has a refcount of 1 then, and freeing the block trips "Bad page state"; where
    it has them, folio_put() frees the first page and leaks the rest. Look at the owner's code, or
    at its calls (khoscope trace, wrong-preserve-call).
    """,
    kernel="kho_preserve_folio kho_restore_folio kho_restore_pages",
)
def needs_folio_restore(facts: Snapshot, folios: list[FolioTotal]) -> Iterator[Message]:
    """Folios whose owner is not known, or does not say how they will be restored: they come back
    as they are only if they are restored as folios."""
    if facts.abi.restores_pages_as == Restore.FOLIO:
        # This kernel has no other way to restore memory.
        return
    for each in folios:
        if each.owner is not None and each.owner.kind == OwnerKind.VMALLOC_PAGE:
            continue
        whose = "of an unknown owner" if each.owner is None else f"of {each.owner}"
        first = ", ".join(f"{phys:#x}" for phys in each.first)
        more = ", …" if each.folios > len(each.first) else ""
        yield Message(f"{_folios(each)} {whose}, at {first}{more}")


def _folios(total: FolioTotal) -> str:
    count = "1 folio" if total.folios == 1 else f"{total.folios:,} folios"
    shared = f", {total.shared:,} tail struct pages shared by HVO" if total.shared else ""
    return f"{count} ({total.pages:,} pages{shared})"


@rule(
    "stale-entry",
    Severity.ERROR,
    "blocks",
    """
    The owner freed the memory, or changed it, and did not unpreserve it. The next kernel reserves
    the block all the same: nobody restores it and it leaks, or the wrong owner restores what
    somebody else is using now. Unpreserve memory before freeing, splitting or resizing it.
    """,
    kernel="kho_preserved_memory_reserve kho_restore_page",
)
def stale_entry(facts: Snapshot, blocks: Blocks) -> Marked:
    """The block's pages are free or no longer what was preserved; a folio whose order changed."""
    pages = blocks.facts

    def say(row: int) -> str:
        if pages.free[row]:
            return "its pages are free"
        if pages.compound[row] == Pages.COMPOUND_TAIL:
            return "it now lies inside a compound page that begins before it"
        return f"is now a folio of order {pages.compound[row]}"

    return Marked(blocks.by_look(_stale), say)


def _stale(blocks: Blocks) -> NDArray[np.bool_]:
    pages = blocks.facts
    inside = pages.compound == Pages.COMPOUND_TAIL
    resized = (pages.compound > 0) & (pages.compound != blocks.order)
    return readable(pages) & ((pages.free > 0) | inside | resized)


def _describe(blocks: Blocks, row: int) -> str:
    return describe(blocks.facts, row, int(blocks.order[row]))


def _judged(blocks: Blocks) -> NDArray[np.bool_]:
    """Blocks whose refcounts mean something: they are still what was preserved."""
    return readable(blocks.facts) & ~_stale(blocks) & (blocks.order != BAD_ORDER)


@rule(
    "in-scratch",
    Severity.ERROR,
    "blocks",
    """
    The next kernel boots in the scratch areas, and uses them before anything is restored: it will
    overwrite this memory. A kernel without CONFIG_KEXEC_HANDOVER_DEBUG does not refuse it. Preserve
    memory that was not allocated from scratch (CMA, movable).
    """,
    kernel="kho_populate kho_scratch_overlap",
)
def in_scratch(facts: Snapshot, blocks: Blocks) -> Marked:
    """A preserved block or a subtree blob lies in a scratch area."""
    start, end = blocks.phys, blocks.end(facts.abi.page_shift)
    hit = _in_areas(facts.scratch, start, end)

    def say(row: int) -> str:
        for address, size in facts.scratch.tolist():
            if size and int(start[row]) < address + size and int(end[row]) > address:
                return f"lies in the scratch area {address:#x}..{address + size:#x}"
        raise AssertionError("a marked block lies in an area")

    return Marked(hit, say)


def _in_areas(areas: U64, start: U64, end: U64) -> NDArray[np.bool_]:
    """Which of the spans [start, end) share memory with an area; areas as Snapshot.scratch."""
    areas = areas[areas[:, 1] > 0]
    if not len(areas):
        return np.zeros(len(start), np.bool_)
    areas = areas[np.argsort(areas[:, 0], kind="stable")]
    reach = np.maximum.accumulate(areas[:, 0] + np.minimum(areas[:, 1], ~areas[:, 0]))
    # Of the areas that begin before the span's end, take the one that reaches furthest.
    at = np.searchsorted(areas[:, 0], end).astype(np.int64) - 1
    hit = (at >= 0) & (end > start)
    hit[hit] = reach[at[hit]] > start[hit]
    return hit


@also("in-scratch", "kernel")
def subtree_in_scratch(facts: Snapshot) -> Iterator[Message]:
    """A subtree blob lies in a scratch area."""
    for subtree in facts.outgoing.fdt.subtrees:
        if subtree.phys is None or not subtree.size:
            continue
        last = min(subtree.phys + subtree.size, 2**64 - 1)
        span = np.array([subtree.phys], np.uint64), np.array([last], np.uint64)
        if not _in_areas(facts.scratch, *span)[0]:
            continue
        for address, size in facts.scratch.tolist():
            if size and subtree.phys < address + size and subtree.phys + subtree.size > address:
                yield Message(
                    f"the blob of subtree {subtree.name!r} ({subtree.size} bytes) lies in the "
                    f"scratch area {address:#x}..{address + size:#x}",
                    subtree.phys,
                )


@rule(
    "metadata-in-scratch",
    Severity.ERROR,
    "kernel",
    """
    The next kernel boots in the scratch areas: it allocates memory there before it has read these
    pages, which say what is preserved. Whatever it has put there by then, it takes for that: it
    reserves other memory than was preserved, or crashes, a different one each time. Do not kexec
    with this handover. If kfence is on, its pool may lie in scratch, and kernels up to 6.17.8 take
    these pages from that pool: boot them with kfence.sample_interval=0.
    """,
    kernel="kho_memory_init kho_mem_retrieve kho_mem_deserialize",
)
def metadata_in_scratch(facts: Snapshot) -> Iterator[Message]:
    """The kernel's own record of what is preserved lies in a scratch area."""
    abi, side = facts.abi, facts.outgoing
    # Of xarrays, the next kernel reads what finalizing makes of them: chunks, and the same bitmaps.
    is_radix = abi.tracker == Tracker.RADIX
    tree = side.tree if is_radix or side.serialized is None else side.serialized
    count, first = 0, 2**64
    for nodes in tree.nodes:
        if tree is side.tree and not is_radix:
            nodes = nodes[nodes.level == 0]
        size = np.where(nodes.level == 0, np.uint64(abi.bitmap_bytes), np.uint64(abi.page_size))
        end = nodes.phys + np.minimum(size, ~nodes.phys)
        hit = nodes.phys[_in_areas(facts.scratch, nodes.phys, end)]
        if len(hit):
            count, first = count + len(hit), min(first, int(hit.min()))
    if count:
        nodes_lie = "1 node lies" if count == 1 else f"{count:,} nodes lie"
        yield Message(f"{nodes_lie} in scratch, the first at {first:#x}", first)


@rule(
    "outside-ram",
    Severity.ERROR,
    "blocks",
    """
    There is no memory at this address, or not for all of the block. kho_preserved_memory_reserve()
    in the next kernel would reserve it and write a stamp into a struct page that may not exist:
    expect a crash early in the boot. Either somebody wrote over the tree, or a device's memory was
    preserved as if it were RAM. Do not kexec with this handover.
    """,
    kernel="kho_preserved_memory_reserve kho_get_preserved_page",
)
def outside_ram(facts: Snapshot, blocks: Blocks) -> Marked:
    """The address is beyond or between RAM, or in a hole."""
    start, end = blocks.phys, blocks.end(facts.abi.page_shift)
    outside = np.zeros(len(blocks), np.bool_)
    # Neighbours mostly lie in one range.
    span = (start.min(initial=2**64 - 1), end.max(initial=0))
    if not ((facts.ram[:, 0] <= span[0]) & (span[1] <= facts.ram[:, 1])).any():
        at = np.searchsorted(facts.ram[:, 0], start, "right").astype(np.int64) - 1
        inside = np.zeros(len(blocks), np.bool_)
        if len(facts.ram):
            inside = (at >= 0) & (end <= facts.ram[np.maximum(at, 0), 1])
        outside = (blocks.order != BAD_ORDER) & ~inside
    return Marked(
        outside,
        lambda row: f"{start[row]:#x}..{end[row]:#x} is not all RAM",
    )


@rule(
    "preserved-offline",
    Severity.ERROR,
    "blocks",
    """
    kho_restore_page() looks the block up with pfn_to_online_page(), which has no page where memory
    is offline: kho_restore_folio() and kho_restore_pages() return NULL, and the owner does not get
    the block back. Before a kexec it also means that the block is not what was preserved: a kernel
    takes memory offline only once all its pages were freed or moved elsewhere. Unpreserve memory
    before taking it offline, or keep it online. After a kexec, bring it online before its owner
    restores it (echo online >/sys/devices/system/memory/memoryN/state).
    """,
    kernel="kho_restore_page pfn_to_online_page offline_pages",
)
def preserved_offline(facts: Snapshot, blocks: Blocks) -> Marked:
    """A preserved block lies in memory that is offline."""
    return Marked(
        offline(facts.offline, blocks, facts.abi.page_shift),
        lambda row: "its memory, or some of it, is offline",
    )


def offline(ranges: U64 | None, blocks: Blocks, page_shift: int) -> NDArray[np.bool_]:
    """
    Blocks that share memory with what is offline.

    :param ranges: as Snapshot.offline; None, as if nothing was: it is a gap then.
    """
    if ranges is None or not len(ranges):
        return np.zeros(len(blocks), np.bool_)
    areas = np.stack([ranges[:, 0], ranges[:, 1] - ranges[:, 0]], axis=1)
    return _in_areas(areas, blocks.phys, blocks.end(page_shift)) & (blocks.order != BAD_ORDER)


@rule(
    "bad-key",
    Severity.ERROR,
    "blocks",
    """
    kho_radix_decode_key() in the next kernel takes the highest bit for the order, without a check.
    The order and address of such a key are nonsense, and that is what the next kernel will reserve.
    Either somebody wrote over a page of the tree, or another kernel's keys are in it. Do not kexec
    with this handover.
    """,
    kernel="kho_radix_decode_key",
)
def bad_key(facts: Snapshot, blocks: Blocks) -> Marked:
    """No order bit, two meanings, or an order out of range."""

    def say(row: int) -> str:
        if blocks.order[row] == BAD_ORDER:
            return f"key {blocks.key[row]:#x} has no order bit that this kernel knows"
        return f"key {blocks.key[row]:#x}: order {blocks.order[row]} is more than all RAM"

    return Marked(blocks.by_look(lambda blocks: blocks.order > _order_limit(facts)), say)


def _order_limit(facts: Snapshot) -> int:
    """The highest order whose blocks fit into RAM."""
    return facts.abi.order_limit(int(facts.ram[-1, 1]) if len(facts.ram) else 0)


@rule(
    "huge-order",
    Severity.WARNING,
    "blocks",
    """
    The page allocator has no block of this order. Either kho_preserve_pages() merged adjacent
    blocks, or this is a gigantic folio. If the blocks were never split, restore sets only the first
    block's refcount; if they are restored as a folio, it is larger than the page allocator can
    free. Restore them with the address and the count that they were preserved with, and free them
    in the blocks that they were allocated in. (Memory from reserve_mem= is exempt: nobody frees
    it.)
    """,
    kernel="__kho_preserve_pages_order kho_restore_page",
)
def huge_order(facts: Snapshot, blocks: Blocks) -> Marked:
    """A block above MAX_PAGE_ORDER."""
    most = facts.abi.max_page_order
    limit = _order_limit(facts)
    huge = blocks.by_look(lambda blocks: (blocks.order > most) & (blocks.order <= limit))
    if huge.any():
        # Of those that a next kernel like this one cannot take, block-too-large speaks.
        huge &= ~InPlace(facts).claimed(blocks) & ~too_large(facts, facts.abi.limits, blocks)
    return Marked(
        huge,
        lambda row: (
            f"the page allocator has no block above order {most}; "
            f"the pages are {_describe(blocks, row)}"
        ),
    )


def too_large(facts: Snapshot, limits: BlockLimits, blocks: Blocks) -> NDArray[np.bool_]:
    """Blocks that a kernel with such limits cannot take, and that have an order at all."""
    wrong = np.zeros(len(blocks), np.bool_)
    if limits.size is not None:
        wrong |= blocks.order >= np.uint8(limits.size.bit_length() - 1 - facts.abi.page_shift)
    if limits.order is not None and (blocks.order > limits.order).any():
        # What nobody restores, no restore refuses.
        wrong |= (blocks.order > limits.order) & ~InPlace(facts).claimed(blocks)
    return wrong & (blocks.order <= _order_limit(facts))


@rule(
    "both-types",
    Severity.ERROR,
    "tree",
    """
    The next kernel walks both entries, and the later one, split, overwrites the stamp of the other.
    The pattern that wins may not be that of the owner who preserved the block last. This is what
    becomes of a block that was split and preserved again without kho_split_preserved_pages().
    Unpreserve it as what it was.
    """,
    kernel="kho_radix_walk_tree kho_preserved_memory_reserve",
)
def both_types(facts: Snapshot, every: KeySet) -> Iterator[tuple[Blocks, Marked]]:
    """The same block is recorded as contig and as split."""
    bit = np.uint64(facts.abi.type_bit)
    if not bit:
        return
    contig = np.flatnonzero((every.leaves.key & bit) == 0)
    twins = every.leaf(every.leaves.key[contig] | bit)
    for i, twin in zip(contig[twins >= 0].tolist(), twins[twins >= 0].tolist(), strict=True):
        leaf = every.leaves[i : i + 1]
        both = leaf.bitmap & every.leaves.bitmap[twin]
        if both.any():
            blocks = decode_leaves(facts.abi, Leaves(leaf.key, both))
            yield (
                blocks,
                Marked(np.ones(len(blocks), np.bool_), lambda row: "recorded contig and split"),
            )


@rule(
    "overlap",
    Severity.ERROR,
    "tree",
    """
    The next kernel stamps the first page of each block. Restoring the larger block sets the
    refcounts of all its pages, including those of the smaller one, and the other way round: the
    later restore destroys what the earlier one set, and both owners think that the memory is
    theirs. Either two clients preserve the same pages, or one preserved a part and the whole.
    Unpreserve one of the two.
    """,
    kernel="kho_preserved_memory_reserve kho_restore_page",
)
def overlap(facts: Snapshot, every: KeySet) -> Iterator[tuple[Blocks, Marked]]:
    """Two recorded blocks share pages."""
    abi, leaves = facts.abi, every.leaves
    _, orders, _ = abi.kho_radix_decode_keys(leaves.key)
    # The one leaf whose bits include order bits holds blocks of 2^38 pages and more at 4 KiB:
    # outside-ram and bad-key report those.
    regular = (leaves.key & ~np.uint64(abi.type_bit)) != 0
    regular &= orders != BAD_ORDER
    if len(np.unique(orders[regular])) < 2:
        return
    lost = np.unique(orders[regular & lost_orders(facts, leaves)])
    reach, reach_of_real = _Reach(abi), _Reach(abi)
    for chunk in Tree(TreeState(0), leaves=[leaves[regular]]).by_address(abi):
        blocks = chunk.in_order_of("phys")
        hit = reach.covered(blocks, np.ones(len(blocks), np.bool_))
        inside = hit
        if len(lost):
            inside = reach_of_real.covered(blocks, ~np.isin(blocks.order, lost))
        if hit.any():
            yield (
                blocks[hit],
                Marked(
                    np.ones(int(hit.sum()), np.bool_),
                    lambda row: "lies inside a larger block that is preserved too",
                    ORDER_LOST,
                    ~inside[hit],
                ),
            )


class _Reach:
    """Finds the blocks that lie inside larger ones, in chunks that are sorted by address."""

    def __init__(self, abi: Abi) -> None:
        self._shift = abi.page_shift
        self._reach = np.uint64(0)

    def covered(self, blocks: Blocks, larger: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """
        Which blocks of the next chunk lie inside a larger one.

        :param larger: which of them count as that.

        A block begins at a multiple of its size.  So what reaches over a block's first page and
        begins in front of it is larger, and holds all of it.
        """
        begins = np.flatnonzero(np.append(True, blocks.phys[1:] != blocks.phys[:-1]))
        end = np.where(larger, blocks.end(self._shift), np.uint64(0))
        reach = np.maximum(np.maximum.accumulate(end), self._reach)
        before = np.append(self._reach, reach[begins[1:] - 1])
        self._reach = reach[-1]
        count = np.diff(np.append(begins, len(blocks)))
        found: NDArray[np.bool_] = np.repeat(before, count) > blocks.phys
        if len(begins) < len(blocks):
            order = np.where(larger, blocks.order, np.uint8(0))
            found |= blocks.order < np.repeat(np.maximum.reduceat(order, begins), count)
        return found


def unjudged(facts: Snapshot, blocks: Blocks) -> int:
    """Blocks whose struct pages could not be read although they lie in RAM."""
    lost = blocks.by_look(lambda blocks: ~readable(blocks.facts))
    if not lost.any():
        return 0
    lost &= ~outside_ram(facts, blocks).rows
    return int((lost & (blocks.order != BAD_ORDER)).sum())
