# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The sections of sparse memory: which memory is online, as ``pfn_to_online_page()`` sees it, and of
which migrate type each page block is.

A section is online or not as a whole, and each of its subsections has memory or has none.
Kernel sources: ``include/linux/mmzone.h``, ``mm/memory_hotplug.c``, ``mm/page_alloc.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from drgn import Program, offsetof, sizeof
from numpy.typing import NDArray

from ..abi.keys import U64

#: Reads ``size`` bytes at a kernel virtual address, or raises.
Read = Callable[[int, int], bytes]

#: ``SUBSECTION_SHIFT``, a #define: 2 MiB on every architecture.
SUBSECTION_SHIFT: Final = 21
#: More sections than any machine has, 512 TiB of 128 MiB: what says where RAM is, is corrupt.
SECTIONS: Final = 1 << 22
#: Likewise page blocks in scratch: 64 TiB of 2 MiB.
PAGE_BLOCKS: Final = 1 << 25
#: Maps of subsections closer than this, in bytes, are read in one go,
#: but not more than so many.
NEAR: Final = 1 << 12
TOGETHER: Final = 1 << 12


@dataclass(frozen=True)
class SectionLayout:
    """
    Where a kernel keeps its sections (``CONFIG_SPARSEMEM_EXTREME``).

    :param roots: virtual address of the array of pointers to pages of ``struct mem_section``.
    :param section_shift: ``SECTION_SIZE_BITS``.
    :param size: ``sizeof(struct mem_section)``.
    :param flags: offset of ``section_mem_map``, whose lowest bits are flags; ``usage`` likewise.
    :param online_bit: ``SECTION_IS_ONLINE_BIT``.
    :param subsections: offset of ``subsection_map`` in ``struct mem_section_usage``.
    """

    roots: int
    section_shift: int
    size: int
    flags: int
    usage: int
    online_bit: int
    subsections: int

    @property
    def subsection_words(self) -> int:
        """u64 of a section's map of subsections."""
        return -(-(1 << self.section_shift - SUBSECTION_SHIFT) // 64)


def section_layout(prog: Program) -> SectionLayout:
    """Where a kernel keeps its sections; its debug info has what is asked for here."""
    section = prog.type("struct mem_section")
    return SectionLayout(
        prog["mem_section"].value_(),
        prog["SECTION_SIZE_BITS"].value_(),
        sizeof(section),
        offsetof(section, "section_mem_map"),
        offsetof(section, "usage"),
        prog["SECTION_IS_ONLINE_BIT"].value_(),
        offsetof(prog.type("struct mem_section_usage"), "subsection_map"),
    )


def offline(layout: SectionLayout, ram: U64, page_size: int, read: Read) -> U64:
    """
    The parts of RAM that are not online: u64, shape (n, 2), sorted, adjacent ones joined.

    :param ram: likewise, physical.
    :raises ValueError: if it is more than any machine has.
    """
    shift = layout.section_shift
    if sum((end >> shift) - (first >> shift) + 1 for first, end in ram.tolist()) > SECTIONS:
        raise ValueError("there is more RAM than any machine has")
    parts = [
        np.arange(first >> shift, -(-end >> shift), dtype=np.uint64) for first, end in ram.tolist()
    ]
    sections = np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
    maps = _subsection_maps(layout, sections, page_size, read)
    whole = np.flatnonzero((maps == 0).all(axis=1))
    start = [sections[whole] << np.uint64(shift)]
    size = [np.full(len(whole), 1 << shift, np.uint64)]
    bits = 1 << shift - SUBSECTION_SHIFT
    full = np.packbits(np.ones(bits, np.uint8), bitorder="little")
    full = np.append(full, np.zeros(8 * maps.shape[1] - len(full), np.uint8)).view(np.uint64)
    partly = np.flatnonzero((maps != 0).any(axis=1) & (maps != full).any(axis=1))
    present = np.unpackbits(maps[partly].view(np.uint8), axis=1, bitorder="little")[:, :bits]
    row, bit = np.nonzero(present == 0)
    first = (sections[partly][row] << np.uint64(shift)) + (
        bit.astype(np.uint64) << np.uint64(SUBSECTION_SHIFT)
    )
    start.append(first)
    size.append(np.full(len(first), 1 << SUBSECTION_SHIFT, np.uint64))
    return _within(ram, *_joined(np.concatenate(start), np.concatenate(size)))


def _joined(start: U64, size: U64) -> tuple[U64, U64]:
    """First and last-plus-one addresses of disjoint spans, sorted, adjacent ones joined."""
    by = np.argsort(start, kind="stable")
    start, end = start[by], start[by] + size[by]
    begins = np.ones(len(start), np.bool_)
    begins[1:] = start[1:] != end[:-1]
    ends = np.append(begins[1:], np.ones(min(len(start), 1), np.bool_))
    return start[begins], end[ends]


@dataclass(frozen=True)
class PageBlockLayout:
    """
    Where the sections keep the migrate type of each page block (``get_pfnblock_flags_mask()``).

    :param flags: offset of ``pageblock_flags`` in ``struct mem_section_usage``.
    :param bits: ``NR_PAGEBLOCK_BITS``, a #define, from ``enum pageblock_bits``.
    :param isolate: bit of a block that is isolated; None: a type of its own says it (linux 6.18).
    :param types: names of ``enum migratetype``.
    """

    sections: SectionLayout
    flags: int
    bits: int
    isolate: int | None
    types: dict[int, str]


def page_blocks(
    layout: PageBlockLayout, phys: int, size: int, block: int, page_size: int, read: Read
) -> dict[str, int]:
    """
    How many page blocks of some memory have which migrate type; memory without struct pages has
    blocks that are "offline".

    :param phys: where it begins, ``phys_addr_t``.
    :param block: bytes of a page block.
    :param read: raises where nothing can be read.
    :raises ValueError: if it is more than any machine has.
    """
    shift = layout.sections.section_shift
    first, last = phys >> shift, -(-(phys + size) >> shift)
    if last - first > SECTIONS or size // block > PAGE_BLOCKS:
        raise ValueError("there is more memory than any machine has")
    numbers = np.arange(first, last, dtype=np.uint64)
    usage = _usages(layout.sections, numbers, page_size, read)
    per_section = (1 << shift) // block
    words = -(-per_section * layout.bits // 64)
    flags = np.zeros((len(numbers), words), np.uint64)
    there = np.flatnonzero(usage)
    flags[there] = _gather(usage[there] + np.uint64(layout.flags), words, read)
    each = np.unpackbits(flags.view(np.uint8), axis=1, bitorder="little")
    each = each[:, : per_section * layout.bits].reshape(-1, layout.bits)
    low = -(-phys // block) - first * per_section
    each = each[low : low + size // block]
    online = np.repeat(usage != 0, per_section)[low : low + size // block]
    # PAGEBLOCK_MIGRATETYPE_MASK, a #define.
    kind = each[:, :3] @ np.array([1, 2, 4], np.uint8)
    isolated = np.zeros(len(kind), np.bool_)
    if layout.isolate is not None:
        isolated = each[:, layout.isolate] != 0
    counts = np.bincount(kind[online & ~isolated], minlength=8).tolist()
    found = {layout.types.get(n, f"type {n}"): count for n, count in enumerate(counts) if count}
    if isolated.any():
        found["isolate"] = found.get("isolate", 0) + int(isolated.sum())
    if not online.all():
        found["offline"] = int((~online).sum())
    return found


def _subsection_maps(layout: SectionLayout, sections: U64, page_size: int, read: Read) -> U64:
    """u64, shape (n, words): the subsections of each section that are there and online."""
    maps = np.zeros((len(sections), layout.subsection_words), np.uint64)
    usage = _usages(layout, sections, page_size, read)
    used = np.flatnonzero(usage)
    maps[used] = _gather(usage[used] + np.uint64(layout.subsections), maps.shape[1], read)
    return maps


def _usages(layout: SectionLayout, sections: U64, page_size: int, read: Read) -> U64:
    """
    u64, shape (n,): virtual address of each section's ``struct mem_section_usage``; 0: it is
    offline.
    """
    usage = np.zeros(len(sections), np.uint64)
    per_root = np.uint64(page_size // layout.size)
    roots, of = np.unique(sections // per_root, return_inverse=True)
    for i, root in enumerate(roots.tolist()):
        page = int.from_bytes(read(layout.roots + 8 * root, 8), "little") if layout.roots else 0
        if not page:
            continue
        words = np.frombuffer(read(page, page_size), np.uint64).reshape(int(per_root), -1)
        here = np.flatnonzero(of == i)
        mine = words[(sections[here] % per_root).astype(np.int64)]
        online = (mine[:, layout.flags // 8] >> np.uint64(layout.online_bit)) & np.uint64(1) != 0
        usage[here] = np.where(online, mine[:, layout.usage // 8], 0)
    return usage


def _gather(at: U64, words: int, read: Read) -> U64:
    """u64, shape (n, words): what is at some addresses, those that are near with one read."""
    found = np.zeros((len(at), words), np.uint64)
    by = np.argsort(at, kind="stable")
    apart = np.flatnonzero(np.diff(at[by]) > np.uint64(NEAR)) + 1
    for rows in np.split(by, np.union1d(apart, np.arange(TOGETHER, len(by), TOGETHER))):
        if not len(rows):
            continue
        first, last = int(at[rows[0]]), int(at[rows[-1]])
        raw = np.frombuffer(read(first, last - first + 8 * words), np.uint8)
        offset = (at[rows] - np.uint64(first)).astype(np.int64)
        each: NDArray[np.int64] = offset[:, None] + np.arange(8 * words)
        found[rows] = raw[each].view(np.uint64)
    return found


def _within(ram: U64, start: U64, end: U64) -> U64:
    """The parts of some spans that lie in RAM."""
    found = []
    for first, last in ram.tolist():
        at = slice(np.searchsorted(end, first, "right"), np.searchsorted(start, last, "left"))
        low, high = np.uint64(first), np.uint64(last)
        found.append(np.stack([np.maximum(start[at], low), np.minimum(end[at], high)], axis=1))
    return np.concatenate([np.zeros((0, 2), np.uint64), *found])
