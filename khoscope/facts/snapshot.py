# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A Snapshot: facts about KHO in one kernel at one time, but no opinions.

Small facts are plain values.  Facts whose size a kernel decides are streams of column chunks
(:mod:`khoscope.facts.columns`).  Iterate a stream as often as needed; it is never whole in memory
unless it is small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from ..abi.keys import U64, Abi, Finalize
from ..abi.kho_fdt import Fdt
from .clients import Claims, Content, Luo, LuoState, Owner, Vmalloc
from .columns import Blocks, Columns, Leaves
from .services import Services
from .tree import Tree


@dataclass(frozen=True)
class Provenance:
    """When and how the facts were read."""

    khoscope: str
    time: str
    source: str


@dataclass(frozen=True)
class Kernel:
    """
    The kernel that was read.

    :param release: ``init_uts_ns.name.release``.
    :param version: ``init_uts_ns.name.version``.
    :param boot_id: ``/proc/sys/kernel/random/boot_id``; None if the kernel has not made it yet.
    :param tainted: ``tainted_mask``.
    :param log: lines of the kernel log about failures of KHO and about bad pages (kernel/printk).
    :param page_flags: names of the ``enum pageflags`` bits, by bit.
    :param page_types: names of the ``enum pagetype`` values, by the top byte of ``page_type``.
    :param command_line: ``saved_command_line``.
    """

    release: str
    version: str
    boot_id: str | None
    tainted: int
    log: list[str]
    page_flags: list[str] = field(default_factory=list)
    page_types: dict[int, str] = field(default_factory=dict)
    command_line: str = ""


@dataclass(frozen=True)
class Side:
    """
    What one direction holds: outgoing (``struct kho_out``) or incoming (``struct kho_in``).

    :param blobs: the FDT ("fdt") and the subtrees (by name) as they were, where readable.
    :param blocks: the tree's blocks with the facts of their struct pages; empty if these were not
        read.  In order of key if they come from a file, else as :mod:`.by_address` has it.
    :param luo: what LUO has in it; None: nothing, or not looked at.
    :param vmallocs: the vmalloc areas that known structures lead to.
    :param owners: whose memory this is, as far as memory can tell.
    :param claims: stream of the memory of each.
    :param serialized: the chain that is handed over in place of the tracker, decoded as a tree;
        None: there is none, as with a radix tree, which is handed over itself, or nothing was
        finalized.  What an incoming side was handed is its ``tree``.
    """

    fdt: Fdt
    tree: Tree
    blobs: dict[str, bytes] = field(default_factory=dict)
    blocks: Iterable[Blocks] = ()
    luo: Luo | None = None
    vmallocs: list[Vmalloc] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    claims: Iterable[Claims] = ()
    serialized: Tree | None = None


@dataclass(frozen=True)
class KexecImage:
    """
    What the next kexec starts (``struct kimage *kexec_image``), or a panic
    (``kexec_crash_image``).

    :param loaded: whether there is one.
    :param file_mode: loaded with kexec_file_load(), not with kexec_load().
    :param kho_fdt: ``kho.fdt``, ``phys_addr_t``; 0: it will be handed nothing.
    :param size: of its segments in memory, bytes.
    """

    loaded: bool
    file_mode: bool = False
    kho_fdt: int = 0
    size: int = 0


@dataclass(frozen=True)
class Handover:
    """
    How this kernel came to be (``struct kho_in``).

    :param is_kho_boot: as the kernel's function of that name.
    :param previous_release: release of the kernel that handed over; None: this kernel, older than
        linux 7.1, is not told.
    :param kexec_count: kexecs since the last cold boot; None likewise.
    """

    is_kho_boot: bool
    previous_release: str | None
    kexec_count: int | None


@dataclass
class Scan:
    """How the search for stamps went, in pages; complete as soon as all stamps were iterated."""

    scanned: int = 0
    unread: int = 0


@dataclass(frozen=True)
class Watched:
    """
    Pages of the blocks that another kernel had recorded, as they are now.

    :param time: when the snapshot that recorded them was taken.
    :param boot_id: the boot it was taken from.
    """

    time: str
    boot_id: str | None


@dataclass(frozen=True)
class Node:
    """
    A NUMA node that has memory (``struct pglist_data``).

    :param number: the kernel's.
    :param start: ``phys_addr_t`` of its first page.
    :param end: last-plus-one physical address.  Pages in between may be another node's.
    """

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class ScratchSetup:
    """
    What ``kho_reserve_scratch()`` has left behind, whether it came to its end or not.

    :param count: ``kho_scratch_cnt``: the areas that it reserved, or was to reserve; 0: nobody
        asked for KHO.
    :param array: whether ``kho_scratch`` is not NULL.  If KHO is off, it dangles: memblock has got
        the array back.
    """

    count: int
    array: bool


@dataclass(frozen=True)
class Zone:
    """
    A zone of the page allocator (``struct zone``); all sizes in pages.

    :param node: NUMA node.
    :param name: ``DMA32``, ``Normal``, ``Movable`` and so on.
    :param start: ``phys_addr_t`` of its first page; pages behind it may be another zone's.
    :param end: last-plus-one physical address.
    :param present: pages that are memory.
    :param managed: those of them that the page allocator has: the boot reserved the others.
    :param cma: those of them that lie in page blocks of type MIGRATE_CMA.
    :param free: ``NR_FREE_PAGES``.
    :param free_cma: ``NR_FREE_CMA_PAGES``.
    :param kept_back: free pages that an allocation of user memory must leave: the min watermark
        with its boost, ``lowmem_reserve`` and what is free for atomic allocations.
    :param low: the low watermark.
    :param pcp: free pages on lists of processors, which ``free`` does not count.
    :param file: pages of files on the LRU lists.
    """

    node: int
    name: str
    start: int
    end: int
    present: int
    managed: int
    cma: int
    free: int
    free_cma: int
    kept_back: int
    low: int
    pcp: int
    file: int


@dataclass(frozen=True)
class Memory:
    """
    What the page allocator has.

    :param zones: those that have memory, by node.
    :param cma_total: ``totalcma_pages``, which /proc/meminfo has as CmaTotal: pages of ``cma=`` and
        the like.
    :param reclaimable: pages of the kernel's own caches that it can free
        (``NR_SLAB_RECLAIMABLE_B``, ``NR_KERNEL_MISC_RECLAIMABLE``).
    :param block_order: ``pageblock_order``.
    """

    zones: list[Zone]
    cma_total: int
    reclaimable: int
    block_order: int


@dataclass(frozen=True)
class ScratchUse:
    """
    What a scratch area is used for.

    :param blocks: its page blocks by ``enum migratetype``; None: they cannot be read.
    :param pages: its pages by what they are used for: a :class:`PageUse`, or the name of a page
        type.  Those that the buddy allocator has are in :attr:`Snapshot.scratch_free`.
    :param pinned: how many of them ``FOLL_PIN`` holds where they are.
    :param held: how many of the others have more references than their mappings and caches take.
    :param unread: pages whose struct page cannot be read.
    """

    blocks: dict[str, int] | None
    pages: dict[str, int]
    pinned: int
    held: int
    unread: int


class PageUse(StrEnum):
    """What a page is used for, if it has no page type that says it."""

    FILE = "page cache"
    ANON = "anonymous"
    SHMEM = "shmem"
    #: ``struct movable_operations``: a driver's, but it can be migrated.
    DRIVER_MOVABLE = "movable driver memory"
    #: On a list of free pages of a processor.
    PCP = "free per CPU"
    RESERVED = "reserved"
    #: It has references, and nothing says whose.
    KERNEL = "kernel or driver"
    #: Used in another way a moment later.
    TRANSIT = "in transit"


@dataclass(frozen=True)
class Snapshot:
    """
    Everything that was read from one kernel.

    :param ram: u64, shape (n, 2): first and last-plus-one physical address of each range of
        System RAM (``iomem_resource``).
    :param scratch: u64, shape (n, 2): address and size of each area (``kho_scratch``).
    :param scratch_setup: None: it cannot be read, or was not recorded.
    :param scratch_free: pages of each area that the buddy allocator holds, None if their struct
        pages cannot be read; empty: not counted.
    :param scratch_use: what each area is used for; empty: not counted.
    :param memory: the page allocator's; None: it cannot be read, or was not recorded.
    :param nodes: the NUMA nodes, in order of their first pages; None: they cannot be read, or were
        not recorded.
    :param image: the kexec image; None: not looked at.
    :param crash_image: the crash kernel; None: not looked at, or this kernel can have none.
    :param liveupdate: LUO in this kernel; None: it has none, or was not looked at.
    :param offline: u64, likewise: the parts of RAM for which ``pfn_to_online_page()`` has no page;
        None: not known.
    :param unreadable: what else of the kernel's memory could not be read, in words: a vmcore may
        lack pages.
    :param unrecorded: what the version of khoscope that took it did not record yet, in words.
    :param contradictions: facts that contradict each other, in words, as found when a file was
        opened (:mod:`khoscope.facts.invariants`).
    :param finalized: ``kho_out.finalized``; None: this kernel does not finalize
        (:attr:`Abi.finalize`), or that could not be read.
    :param outgoing: what this kernel is about to hand over.
    :param incoming: what it was handed; its tree is evidence, never proof.  None: not a KHO boot.
    :param stamps: stream of the stamped pages, found by scanning all struct pages; sorted by
        address.
    :param watched: stream of the blocks of another snapshot, in its order, with the page facts
        of this kernel.
    :param contents: what is in the memfds that LUO preserves; empty: not looked at.
    :param services: what systemd keeps for services; None: it is not PID 1, or was not asked.
    :param evidence: what memory holds now where the other snapshot's leaves were, sorted by key:
        those leaves, or anything else.
    """

    taken: Provenance
    kernel: Kernel
    abi: Abi
    kho_enable: bool
    handover: Handover
    ram: U64
    scratch: U64
    outgoing: Side
    incoming: Side | None = None
    scan: Scan | None = None
    stamps: Iterable[Blocks] = ()
    watching: Watched | None = None
    watched: Iterable[Blocks] = ()
    evidence: Iterable[Leaves] = ()
    scratch_free: list[int | None] = field(default_factory=list)
    image: KexecImage | None = None
    liveupdate: LuoState | None = None
    offline: U64 | None = None
    unreadable: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    finalized: bool | None = None
    nodes: list[Node] | None = None
    crash_image: KexecImage | None = None
    scratch_setup: ScratchSetup | None = None
    scratch_use: list[ScratchUse] = field(default_factory=list)
    memory: Memory | None = None
    contents: Iterable[Content] = ()
    services: Services | None = None

    @property
    def finalizes_itself(self) -> bool:
        """
        Whether the kernel serializes on the way into a kexec whatever is preserved then.

        ``liveupdate_reboot()`` calls ``kho_finalize()``, which replaces what was serialized before
        (linux 6.19 and 7.0).
        """
        is_on = self.liveupdate is not None and self.liveupdate.enabled
        return is_on and self.abi.finalize == Finalize.BEFORE_KEXEC


def in_ram(ram: U64, phys: int, size: int) -> bool:
    """
    Whether memory lies in one range of RAM.

    :param ram: as :attr:`Snapshot.ram`.
    :param phys: any number, since it may come from a file; ``size`` likewise.
    """
    if not 0 <= phys < 1 << 64 or not len(ram):
        return False
    at = int(np.searchsorted(ram[:, 0], np.uint64(phys), "right")) - 1
    return at >= 0 and phys + size <= int(ram[at, 1])


def rows(stream: Iterable[Columns]) -> int:
    """How many rows a stream has."""
    return sum(len(chunk) for chunk in stream)
