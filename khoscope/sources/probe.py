# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Ask a kernel's debug info what the kernel is: once, before khoscope reads any of its memory.

Only here may a type, a member or a symbol be missing.  khoscope refuses a kernel that lacks what it
needs; what only some kernels have is one of the :class:`Parts`, which is there or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Final

import numpy as np
from drgn import (
    FaultError,
    Object,
    ObjectAbsentError,
    PlatformFlags,
    Program,
    Type,
    TypeKind,
    cast,
    offsetof,
    sizeof,
)
from drgn.helpers.linux.mm import for_each_vmap_area, phys_to_virt
from drgn.helpers.linux.mmzone import for_each_online_pgdat
from drgn.helpers.linux.module import address_to_module

from ..abi import compatibles
from ..abi.keys import (
    COMPATIBLES_WITHOUT_TYPES,
    POSTED_TYPE_SHIFT,
    Abi,
    BlockLimits,
    Finalize,
    Restore,
    Stamp,
    Tracker,
)
from ..abi.serialized import text
from ..words.errors import KhoscopeError, NoKho
from .pages import InvertedTypes, PageLayout
from .sections import PageBlockLayout, section_layout
from .track import TrackLayout
from .uses import UseLayout

#: What drgn raises if debug info has no such type, member, symbol or value.
_LACKING: Final = (LookupError, AttributeError, TypeError, ObjectAbsentError)

#: Variables, types and members by which khoscope reads KHO and the small facts: all kernels with
#: KHO have them.
_NEEDED: Final = (
    "kho_enable",
    "kho_in.fdt_phys",
    "kho_in.scratch_phys",
    "kho_scratch.addr",
    "kho_scratch.size",
    "kho_scratch_cnt",
    "init_mm.pgd",
    "init_uts_ns.name.release",
    "init_uts_ns.name.version",
    "iomem_resource.child",
    "iomem_resource.end",
    "iomem_resource.flags",
    "iomem_resource.sibling",
    "iomem_resource.start",
    "saved_command_line",
    "sysctl_bootid",
    "tainted_mask",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "__NR_PAGEFLAGS",
)
#: By which the two trackers are read.
_RADIX: Final = ("kho_out.radix_tree.root", "struct kho_radix_tree.root")
_XARRAY: Final = (
    "kho_out.finalized",
    "struct kho_mem_phys.phys_bits.xa_head",
    "struct kho_mem_phys_bits",
    "struct kho_mem_track.orders.xa_head",
    "struct xa_node.shift",
    "struct xa_node.slots",
)
_INCOMING_TREE: Final = ("kho_in.radix_tree.root",)
_PREDECESSOR: Final = ("kho_in.kexec_count", "kho_in.previous_release")
_IMAGE: Final = (
    "kexec_image.file_mode",
    "kexec_image.kho.fdt",
    "kexec_image.nr_segments",
    "kexec_image.segment.memsz",
)
#: With what else it takes to read the image itself.
_LOADED_IMAGE: Final = (
    *_IMAGE,
    "kexec_image.head",
    "kexec_image.segment.bufsz",
    "kexec_image.segment.mem",
    "kexec_image.start",
)
#: Segments that are in their places already (linux 6.17).
_SEGMENT_CMA: Final = ("kexec_image.segment_cma",)
_CRASH_IMAGE: Final = tuple(path.replace("kexec_", "kexec_crash_", 1) for path in _IMAGE)
_LIVEUPDATE: Final = (
    "luo_global.enabled",
    "luo_file_handler_list.next",
    "struct liveupdate_file_handler.compatible",
    "struct liveupdate_file_handler.list",
)
_SESSIONS: Final = (
    "luo_global.liveupdate_num",
    "luo_session_global.incoming.list",
    "luo_session_global.outgoing.list",
    "struct luo_session.file_set.count",
    "struct luo_session.file_set.files_list",
    "struct luo_session.list",
    "struct luo_session.name",
    "struct luo_session.retrieved",
    "struct luo_file.fh.compatible",
    "struct luo_file.list",
    "struct luo_file.serialized_data",
    "struct luo_file.token",
)
#: What the kernel keeps beside its lists, for the next kernel: chains of blocks, or arrays.
_BLOCKS: Final = (
    "luo_session_global.incoming.block_set.head_pa",
    "luo_session_global.outgoing.block_set.head_pa",
    "struct luo_session.file_set.block_set.head_pa",
)
_ARRAYS: Final = (
    "luo_session_global.incoming.header_ser",
    "luo_session_global.outgoing.header_ser",
    "struct luo_session.file_set.files",
)
#: Whether a file was retrieved: a status, or up to linux 6.19 a flag.
_RETRIEVE_STATUS: Final = ("struct luo_file.retrieve_status",)
_RETRIEVED: Final = ("struct luo_file.retrieved",)
_FLBS: Final = (
    "luo_flb_global.incoming.active",
    "luo_flb_global.incoming.header_ser",
    "luo_flb_global.list",
    "struct liveupdate_flb.compatible",
    "struct liveupdate_flb.private.list",
    "struct liveupdate_flb.private.outgoing.count",
    "struct liveupdate_flb.private.outgoing.data",
)
#: The count of an FLB was a number before it was a refcount_t.
_FLB_REFCOUNT: Final = ("struct liveupdate_flb.private.outgoing.count.refs.counter",)
#: drgn's get_printk_records() needs these, too.
_LOG: Final = (
    "LOG_CONT",
    "desc_committed",
    "desc_finalized",
    "prb.desc_ring.count_bits",
    "prb.desc_ring.descs.state_var.counter",
    "prb.desc_ring.descs.text_blk_lpos.begin",
    "prb.desc_ring.descs.text_blk_lpos.next",
    "prb.desc_ring.head_id.counter",
    "prb.desc_ring.infos.caller_id",
    "prb.desc_ring.infos.dev_info.device",
    "prb.desc_ring.infos.dev_info.subsystem",
    "prb.desc_ring.infos.facility",
    "prb.desc_ring.infos.flags",
    "prb.desc_ring.infos.level",
    "prb.desc_ring.infos.seq",
    "prb.desc_ring.infos.text_len",
    "prb.desc_ring.infos.ts_nsec",
    "prb.desc_ring.tail_id.counter",
    "prb.text_data_ring.data",
    "prb.text_data_ring.size_bits",
)
_VMALLOC: Final = (
    "struct vmap_area.vm",
    "struct vm_struct.caller",
    "struct vm_struct.nr_pages",
    "struct vm_struct.pages",
    "struct vm_struct.size",
)
_SECTIONS: Final = (
    "mem_section.section_mem_map",
    "struct mem_section.usage",
    "struct mem_section_usage.subsection_map",
    "SECTION_IS_ONLINE_BIT",
    "SECTION_SIZE_BITS",
)
_NODES: Final = (
    "struct pglist_data.node_spanned_pages",
    "struct pglist_data.node_start_pfn",
)
#: ``/dev/liveupdate`` (linux 6.19).
_DEVICE: Final = ("luo_dev.in_use",)
#: By which the holders of sessions and of the device are found.
_HOLDERS: Final = (
    "luo_fops",
    "luo_session_fops",
    "init_pid_ns.idr.idr_rt.xa_head",
    "struct file.f_op",
    "struct file.private_data",
    "struct files_struct.fdt.fd",
    "struct files_struct.fdt.max_fds",
    "struct luo_session.name",
    "struct luo_session.retrieved",
    "struct pid.tasks.first",
    "struct task_struct.comm",
    "struct task_struct.files",
    "struct task_struct.pid",
    "struct task_struct.pid_links",
    "struct task_struct.start_boottime",
    "struct task_struct.tgid",
    "struct xa_node.slots",
    "PIDTYPE_PID",
)
#: By which the memfds of a process are found.
_MEMFDS: Final = ("shmem_file_operations", "struct file.f_inode", "struct inode.i_nlink")
_CGROUPS: Final = ("struct task_struct.cgroups.dfl_cgrp.kn.name",)
#: What leads from a ``struct kernfs_node`` to the one above it (since linux 6.15, and before).
_KERNFS_PARENT: Final = ("__parent", "parent")
#: Where the timekeeper is (since linux 6.17, and before).
_TIMEKEEPERS: Final = ("timekeeper_data", "tk_core")
_MEMORY: Final = (
    "struct pglist_data.node_zones",
    "struct zone._watermark",
    "struct zone.cma_pages",
    "struct zone.lowmem_reserve",
    "struct zone.managed_pages",
    "struct zone.name",
    "struct zone.nr_free_highatomic",
    "struct zone.per_cpu_pageset.count",
    "struct zone.present_pages",
    "struct zone.spanned_pages",
    "struct zone.vm_stat",
    "struct zone.watermark_boost",
    "struct zone.zone_start_pfn",
    "totalcma_pages",
    "vm_node_stat",
    "NR_FREE_CMA_PAGES",
    "NR_FREE_PAGES",
    "NR_KERNEL_MISC_RECLAIMABLE",
    "NR_SLAB_RECLAIMABLE_B",
    "NR_ZONE_ACTIVE_FILE",
    "NR_ZONE_INACTIVE_FILE",
    "WMARK_LOW",
    "WMARK_MIN",
    "ZONE_NORMAL",
    "__cpu_online_mask",
)
_PAGE_BLOCKS: Final = ("struct mem_section_usage.pageblock_flags",)


@dataclass(frozen=True)
class KhoOut:
    """
    Where ``struct kho_out`` keeps what every kernel keeps somewhere else.

    :param tracker: ``struct kho_radix_tree`` or ``struct kho_mem_track``.
    :param fdt: ``void *``, or ``struct page *``.
    :param chunks: ``struct khoser_mem_chunk *``, if the kernel keeps it anywhere but in the FDT.
    """

    tracker: str
    fdt: str
    chunks: str | None = None

    @property
    def is_radix(self) -> bool:
        return self.tracker == "radix_tree"

    @property
    def finalize(self) -> Finalize:
        """Whether, and when, what is preserved must be finalized."""
        if self.is_radix:
            return Finalize.NEVER
        # Where finalizing makes chunks and FDT anew, an image can have them only afterwards.
        return Finalize.BEFORE_KEXEC if self.chunks is None else Finalize.BEFORE_LOAD


#: Linux 7.1 and later; 6.19, 7.0 and backports; 6.16 to 6.18.
_KHO_OUT: Final = (
    KhoOut("radix_tree", "fdt"),
    KhoOut("track", "fdt"),
    KhoOut("ser.track", "ser.fdt", "ser.preserved_mem_map"),
)


@dataclass(frozen=True)
class LuoLists:
    """
    How a kernel keeps LUO's sessions, files and FLBs.

    :param arrays: it writes them into arrays, to which an FDT leads (linux 6.19 to 7.1); else into
        chains of blocks, to which a ``struct luo_ser`` leads.
    :param retrieve_status: a ``struct luo_file`` knows how it was retrieved; else only whether it
        was (linux 6.19).
    :param flbs: it has FLBs (since linux 7.0).
    :param flb_refcount: an FLB's count is a ``refcount_t``; else a number.
    """

    arrays: bool
    retrieve_status: bool
    flbs: bool
    flb_refcount: bool


class Parts:
    """
    What only some kernels have, or only some debug info describes; looked up when it is needed.
    """

    def __init__(self, prog: Program, kho_out: KhoOut) -> None:
        self._prog = prog
        self.kho_out = kho_out

    @cached_property
    def incoming_tree(self) -> bool:
        """``kho_in.radix_tree`` (linux 7.3)."""
        return self._has(_INCOMING_TREE)

    @cached_property
    def predecessor(self) -> bool:
        """Who handed over, and how many kexecs there were (linux 7.1)."""
        return self._has(_PREDECESSOR)

    @cached_property
    def image(self) -> bool:
        """``kexec_image``, with the members that concern KHO."""
        return self._has(_IMAGE)

    @cached_property
    def loaded_image(self) -> bool:
        """``kexec_image``, with the members that lead to what is in it."""
        return self._has(_LOADED_IMAGE)

    @cached_property
    def segment_cma(self) -> bool:
        """``kexec_image->segment_cma`` (linux 6.17)."""
        return self._has(_SEGMENT_CMA)

    @cached_property
    def crash_image(self) -> bool:
        """``kexec_crash_image`` (``CONFIG_CRASH_DUMP``), likewise."""
        return self._has(_CRASH_IMAGE)

    @cached_property
    def liveupdate(self) -> bool:
        """``luo_global`` and the file handlers."""
        return self._has(_LIVEUPDATE)

    @cached_property
    def sessions(self) -> LuoLists | None:
        """How the kernel keeps LUO's sessions; None: in no way that khoscope knows."""
        status = self._has(_RETRIEVE_STATUS)
        flbs = self._has(_FLBS)
        if not self._has(_SESSIONS) or not (status or self._has(_RETRIEVED)):
            return None
        # A kernel that has FLBs, but keeps them in another way.
        if not flbs and self._has(("luo_flb_global",)):
            return None
        blocks = self._has(_BLOCKS)
        if not blocks and not self._has(_ARRAYS):
            return None
        return LuoLists(not blocks, status, flbs, self._has(_FLB_REFCOUNT))

    @cached_property
    def log(self) -> bool:
        """printk's ring buffer."""
        return self._has(_LOG)

    @cached_property
    def vmalloc(self) -> bool:
        """The areas of vmalloc."""
        first = lambda: next(for_each_vmap_area(self._prog), None)  # noqa: E731
        return self._has(_VMALLOC) and _works(first)

    @cached_property
    def nodes(self) -> bool:
        """``struct pglist_data`` of each NUMA node."""
        first = lambda: next(for_each_online_pgdat(self._prog), None)  # noqa: E731
        return self._has(_NODES) and _works(first)

    @cached_property
    def sections(self) -> bool:
        """The sections of sparse memory, found by pointers (``CONFIG_SPARSEMEM_EXTREME``)."""
        if not self._has(_SECTIONS):
            return False
        return bool(self._prog["mem_section"].type_.kind == TypeKind.POINTER)

    @cached_property
    def device(self) -> bool:
        """``/dev/liveupdate``, and whether it is open."""
        return self._has(_DEVICE)

    @cached_property
    def holders(self) -> bool:
        """Tasks, their files, and what tells those of LUO from others."""
        return self._has(_HOLDERS)

    @cached_property
    def memfds(self) -> bool:
        """What tells memfds from other files."""
        return self._has(_MEMFDS)

    @cached_property
    def kernfs_parent(self) -> str | None:
        """
        The member that leads from a ``struct kernfs_node`` to the one above it; None: tasks are in
        no cgroups.
        """
        if not self._has(_CGROUPS):
            return None
        has = (each for each in _KERNFS_PARENT if self._has((f"struct kernfs_node.{each}",)))
        return next(has, None)

    @cached_property
    def timekeeper(self) -> str | None:
        """The variable that has the ``struct timekeeper``; None: there is none that is known."""
        members = ("timekeeper.offs_real", "timekeeper.offs_boot")
        has = (v for v in _TIMEKEEPERS if self._has(tuple(f"{v}.{m}" for m in members)))
        return next(has, None)

    @cached_property
    def memory(self) -> bool:
        """What the page allocator has in each zone (``CONFIG_CMA``)."""
        return self.nodes and self._has(_MEMORY)

    @cached_property
    def page_blocks(self) -> bool:
        """The migrate type of each page block, which its section has."""
        return self.sections and self._has(_PAGE_BLOCKS)

    def _has(self, paths: tuple[str, ...]) -> bool:
        return _has(self._prog, paths)


@dataclass(frozen=True)
class Overrides:
    """
    What the user knows better than the kernel's debug info.

    :param type_shift: key bit of the page type; -1: the kernel has no types.
    """

    type_shift: int | None = None


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn what debug info lacks into a KhoscopeError; for code that asks only debug info."""
    try:
        yield
    except _LACKING as error:
        raise KhoscopeError(
            f"the kernel's debug info lacks what khoscope needs ({error})",
            "name the vmlinux of this very kernel, with DWARF, by --vmlinux",
        ) from error


def refuse_platform(prog: Program) -> None:
    """
    Require a 64-bit little-endian kernel: all code that reads relies on it.

    :raises KhoscopeError: if the kernel is not one.
    """
    known = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
    if prog.platform is None or prog.platform.flags & known != known:
        raise KhoscopeError(
            "this kernel is not a 64-bit little-endian one", "use khoscope on x86-64 or arm64"
        )


@guarded()
def probe(prog: Program) -> Parts:
    """
    Look up all types, members and variables that are going to be used.

    :raises KhoscopeError: if there is no KHO that khoscope knows, or the debug info lacks any of
        them.
    """
    try:
        prog["kho_out"]
    except KeyError:
        raise NoKho(
            "this kernel has no kexec handover (no kho_out in its debug info)",
            "boot a kernel that was built with CONFIG_KEXEC_HANDOVER=y",
        ) from None
    found = next((o for o in _KHO_OUT if _has(prog, (f"kho_out.{o.tracker}",))), None)
    if found is None:
        raise KhoscopeError(
            "this kernel keeps preserved memory neither in a radix tree nor in xarrays (kho_out "
            "has neither radix_tree nor track)",
            "use a khoscope that knows this kernel",
        )
    for path in (*_NEEDED, f"kho_out.{found.fdt}", *(_RADIX if found.is_radix else _XARRAY)):
        _look_up(prog, path)
    return Parts(prog, found)


def _has(prog: Program, paths: tuple[str, ...]) -> bool:
    """Whether debug info has all of these."""

    def look() -> None:
        for path in paths:
            _look_up(prog, path)

    return _works(look)


def _works(ask: Callable[[], object]) -> bool:
    """Whether debug info has all that a function asks it for."""
    try:
        ask()
    except FaultError:
        # Then debug info knew where to read.
        return True
    except _LACKING:
        return False
    return True


def _look_up(prog: Program, path: str) -> None:
    """
    Look up a variable, or a type, and its members.

    :param path: as in C, but with dots for members behind a pointer or in an array, too.
    :raises LookupError: if any part of it is not there.
    """
    name, *members = path.split(".")
    if " " in name:
        found = prog.type(name)
    else:
        variable = prog[name]
        if variable.absent_:
            raise LookupError(f"{name} has no address")
        found = variable.type_
    for member in members:
        while found.kind in (TypeKind.POINTER, TypeKind.ARRAY, TypeKind.TYPEDEF):
            found = found.type
        found = found.member(member).type


@guarded()
def probe_abi(prog: Program, parts: Parts, compatible: str | None, overrides: Overrides) -> Abi:
    """
    What this kernel does, from its types.

    :param compatible: of its own root FDT; None: there is none, or not yet.
    """
    decided: dict[str, str] = {}
    constants = enumerators(prog, "enum kho_radix_consts")
    page_shift = prog["PAGE_SHIFT"].value_()
    computed = Abi.for_page_shift(page_shift)
    is_radix = parts.kho_out.is_radix

    def constant(name: str, otherwise: int) -> int:
        if name in constants:
            decided[name] = "enum kho_radix_consts"
            return constants[name]
        if is_radix:
            decided[name] = "computed from PAGE_SHIFT: not in the debug info"
        return otherwise

    decided["tracker"] = f"kho_out.{parts.kho_out.tracker}"
    if not is_radix:
        # Of radix trees it is always kho_out.fdt.
        decided["root FDT"] = f"kho_out.{parts.kho_out.fdt}"
    if how := page_types(prog).decided:
        decided["page types"] = how
    stamp = probe_stamp(prog)
    order_0 = constant("KHO_ORDER_0_LOG2", computed.order_0_log2)
    max_page_order = prog.type("struct zone").member("free_area").type.length - 1
    return Abi(
        page_shift,
        order_0,
        constant("KHO_TABLE_SIZE_LOG2", computed.table_size_log2),
        constant("KHO_BITMAP_SIZE_LOG2", computed.bitmap_size_log2),
        constant("KHO_TREE_MAX_DEPTH", computed.tree_max_depth),
        max_page_order,
        _probe_type_shift(prog, constants, order_0, compatible, overrides, stamp, decided),
        stamp,
        compatible,
        # Trees of bare keys (linux 7.3) have this width, but no longer KHO_ORDER_0_LOG2.
        constants.get("KHO_RADIX_KEY_WIDTH"),
        Tracker.RADIX if is_radix else Tracker.XARRAY,
        None if is_radix else 8 * sizeof(prog.type("struct kho_mem_phys_bits")),
        parts.kho_out.finalize,
        _restores_pages_as(prog, parts.kho_out, decided),
        _probe_limits(prog, is_radix, compatible, max_page_order, decided),
        decided,
    )


def _restores_pages_as(prog: Program, kho_out: KhoOut, decided: dict[str, str]) -> Restore:
    name = "restored pages"
    if kho_out.is_radix:
        return Restore.PAGES
    if _parameters(prog, "kho_restore_pages") is None:
        decided[name] = "no kho_restore_pages()"
        return Restore.FOLIO
    count = _parameters(prog, "kho_restore_page")
    if count is not None:
        decided[name] = f"kho_restore_page() has {count} parameters"
        return Restore.PAGES if count > 1 else Restore.SPLIT_FOLIO
    decided[name] = f"kho_restore_page() is not in the debug info: as others with {kho_out.tracker}"
    return Restore.PAGES if kho_out.chunks is None else Restore.SPLIT_FOLIO


def _parameters(prog: Program, function: str) -> int | None:
    """How many parameters a function has; None: debug info knows no such function."""
    try:
        return len(prog.function(function).type_.parameters or ())
    except LookupError:
        return None


def track_layout(prog: Program, direct_map: int) -> TrackLayout:
    """Where a kernel of the xarray tracker keeps things."""
    node = prog.type("struct xa_node")
    slots = node.member("slots").type.length
    return TrackLayout(
        head=offsetof(prog.type("struct xarray"), "xa_head"),
        node=sizeof(node),
        shift=offsetof(node, "shift"),
        slots=offsetof(node, "slots"),
        chunk_log2=slots.bit_length() - 1,
        phys_bits=offsetof(prog.type("struct kho_mem_phys"), "phys_bits"),
        direct_map=direct_map,
    )


def _probe_type_shift(
    prog: Program,
    constants: dict[str, int],
    order_0: int,
    compatible: str | None,
    overrides: Overrides,
    stamp: Stamp,
    decided: dict[str, str],
) -> int | None:
    name = "KHO_KEY_TYPE_SHIFT"
    if overrides.type_shift is not None:
        if 0 <= overrides.type_shift <= order_0:
            raise KhoscopeError(
                f"key bit {overrides.type_shift} holds an order or an address, not a type",
                "give a bit above KHO_ORDER_0_LOG2, or none",
            )
        decided[name] = "--type-shift"
        return None if overrides.type_shift < 0 else overrides.type_shift
    if name in constants:
        decided[name] = "enum kho_radix_consts"
        return constants[name]
    if not enumerators(prog, "enum kho_page_type") and stamp.type_shift is None:
        decided[name] = "no enum kho_page_type, no type in union kho_page_info: no types"
        return None
    posted = compatibles.base(compatible or "") in COMPATIBLES_WITHOUT_TYPES
    decided[name] = (
        "there are page types, but the bit is a #define that debug info does not carry; "
        + (f"{compatible}: taken for the series as posted" if posted else "guessed as posted")
    )
    return POSTED_TYPE_SHIFT


def _probe_limits(
    prog: Program,
    is_radix: bool,
    compatible: str | None,
    max_page_order: int,
    decided: dict[str, str],
) -> BlockLimits:
    """
    Its compatible says it, unless there is a function that came with the repair.

    Kernels of the xarray tracker may have none before they are finalized, and that is when
    something can still be done about a block that is too large. They all have the same.
    """
    name = "limits"
    if is_radix:
        decided[name] = "its compatible" if compatible else "none: its compatible is not readable"
    else:
        compatible = compatibles.OF_XARRAYS
        decided[name] = f"its tracker: all with xarrays are {compatible}"
    limits = compatibles.block_limits(compatible, max_page_order)
    if limits != BlockLimits() and _has_function(prog, "kho_get_preserved_page"):
        # Linux 7.2; sizes have 64 bits there.  BTF does not know it: it is inlined.
        decided[name] = "there is a kho_get_preserved_page(): none"
        return BlockLimits()
    return limits


def _has_function(prog: Program, name: str) -> bool:
    """Whether a kernel has a function: DWARF knows it even if it is inlined everywhere."""
    for look in (prog.function, prog.symbol):
        with contextlib.suppress(LookupError):
            look(name)
            return True
    return False


def probe_stamp(prog: Program) -> Stamp:
    """The layout of ``union kho_page_info``; without one, stamps are the order alone."""
    try:
        info = prog.type("union kho_page_info")
    except LookupError:
        return Stamp(magic_shift=None)
    bits: dict[str, tuple[int, int]] = {}

    def collect(type_: Type, offset: int) -> None:
        for member in type_.members or ():
            at = offset + member.bit_offset
            if member.name is None:
                collect(member.type, at)
            else:
                bits[member.name] = at, member.bit_field_size or 8 * sizeof(member.type)

    collect(info, 0)
    return Stamp(bits["order"][1], bits["type"][0] if "type" in bits else None, bits["magic"][0])


@guarded()
def page_layout(prog: Program) -> PageLayout:
    """Where this kernel's ``struct page`` keeps things."""
    page = prog.type("struct page")
    types = page_types(prog)
    try:
        vmemmap = prog["vmemmap"]
    except KeyError:
        raise KhoscopeError(
            "this kernel's struct pages are not one array (no vmemmap)",
            "use a kernel that was built with CONFIG_SPARSEMEM_VMEMMAP=y",
        ) from None
    if page.has_member("memdesc") or not _is_folio(prog, page) or _stamp_is_too_large(prog, page):
        raise KhoscopeError(
            "what KHO keeps in a struct page is not in page->private of this kernel",
            "use a khoscope that knows this kernel",
        )
    # Since linux 7.1, the struct pages of an optimised hugetlb folio that share memory are those of
    # its tails alone; before, they are those of its head, too.
    newer = page.has_member("compound_info")
    flags = enumerators(prog, "enum pageflags")
    return PageLayout(
        vmemmap=cast("unsigned long", vmemmap).value_(),
        size=sizeof(page),
        flags=offsetof(page, "flags"),
        private=offsetof(page, "private"),
        refcount=offsetof(page, "_refcount"),
        page_type=offsetof(page, "page_type"),
        compound=offsetof(page, "compound_info" if newer else "compound_head"),
        lru=offsetof(page, "lru"),
        mapping=offsetof(page, "mapping"),
        head_bit=flags["PG_head"],
        buddy_type=types.numbers["buddy"],
        flag_count=flags["__NR_PAGEFLAGS"],
        untyped=types.numbers["mapcount_underflow"],
        fake_heads=not newer,
        inverted=types.inverted,
        hugetlb_type=types.numbers.get("hugetlb", 0),
        optimized=_bit(enumerators(prog, "enum hugetlb_page_flags").get("HPG_vmemmap_optimized")),
    )


def _bit(number: int | None) -> int:
    """A mask; 0: there is no such flag."""
    return 0 if number is None else 1 << number


@guarded()
def use_layout(prog: Program) -> UseLayout:
    """Where this kernel's struct pages say what a page is used for."""
    flags = enumerators(prog, "enum pageflags")
    folio = prog.type("struct folio")

    def bit(name: str) -> int:
        return 1 << flags[name] if name in flags else 0

    def member(name: str) -> int | None:
        return offsetof(folio, name) if folio.has_member(name) else None

    return UseLayout(
        reserved=bit("PG_reserved"),
        swapbacked=bit("PG_swapbacked"),
        swapcache=bit("PG_swapcache"),
        private=bit("PG_private"),
        mapcount=member("_large_mapcount"),
        pincount=member("_pincount"),
    )


def page_block_layout(prog: Program) -> PageBlockLayout:
    """How this kernel's sections keep the migrate types of page blocks."""
    bits = enumerators(prog, "enum pageblock_bits")
    count = bits.get("NR_PAGEBLOCK_BITS", bits.get("__NR_PAGEBLOCK_BITS", 4))
    return PageBlockLayout(
        section_layout(prog),
        offsetof(prog.type("struct mem_section_usage"), "pageblock_flags"),
        1 << (count - 1).bit_length(),
        bits.get("PB_migrate_isolate"),
        migrate_types(prog),
    )


def migrate_types(prog: Program) -> dict[int, str]:
    """The names of ``enum migratetype``, by number."""
    counts = {"MIGRATE_PCPTYPES", "MIGRATE_TYPES"}
    return {
        number: name.removeprefix("MIGRATE_").lower()
        for name, number in enumerators(prog, "enum migratetype").items()
        if name.startswith("MIGRATE_") and name not in counts
    }


#: ``enum pagetype`` since linux 6.12, as far as kernels before it have such types.
_NUMBERS: Final = {
    "buddy": 0xF0,
    "offline": 0xF1,
    "table": 0xF2,
    "guard": 0xF3,
    "hugetlb": 0xF4,
    "slab": 0xF5,
    "zsmalloc": 0xF6,
    "mapcount_underflow": 0xFF,
    "other": InvertedTypes.OTHER,
}
#: Macros of linux 6.6 to 6.9 for which debug info has nothing.
_MACROS: Final = {
    "PG_buddy": 0x80,
    "PG_offline": 0x100,
    "PG_table": 0x200,
    "PG_guard": 0x400,
    "PG_hugetlb": 0x800,
    "PAGE_TYPE_BASE": 0xF000_0000,
    "PAGE_MAPCOUNT_RESERVE": -128,
}


@dataclass(frozen=True)
class PageTypes:
    """
    What ``page_type`` means.

    :param numbers: the top byte of each type, by name.
    :param inverted: how the kernel has types in bits; None: as such numbers.
    :param decided: how that was decided, if debug info does not say it.
    """

    numbers: dict[str, int]
    inverted: InvertedTypes | None = None
    decided: str = ""

    @property
    def names(self) -> dict[int, str]:
        """The names of the types, by top byte."""
        return {number: name for name, number in self.numbers.items()}


@guarded()
def page_types(prog: Program) -> PageTypes:
    """
    The page types of this kernel: numbers since linux 6.12, before that bits that are cleared.

    :raises KhoscopeError: if it has them in another way.
    """
    found, decided = enumerators(prog, "enum pagetype"), ""
    if "PGTY_buddy" in found:
        return PageTypes({name.removeprefix("PGTY_"): value for name, value in found.items()})
    if not found and "PG_slab" in enumerators(prog, "enum pageflags"):
        # Slabs had a flag before they had a type (linux 6.10).  A kernel without it, and without
        # the enum, may as well be a later one whose debug info is poor.
        found, decided = _MACROS, "no enum pagetype, and slabs have a flag: as in linux 6.6"
    if not {"PG_buddy", "PAGE_TYPE_BASE", "PAGE_MAPCOUNT_RESERVE"} <= found.keys():
        raise KhoscopeError(
            "this kernel keeps the types of pages in a way that khoscope does not know (enum "
            "pagetype has neither PGTY_buddy nor PG_buddy with PAGE_TYPE_BASE)",
            "name the vmlinux of this very kernel, with DWARF, by --vmlinux, or use a khoscope "
            "that knows this kernel",
        )
    bits = {name.removeprefix("PG_"): value for name, value in found.items()}
    known = [name for name in _NUMBERS if name in bits]
    return PageTypes(
        {name: _NUMBERS[name] for name in (*known, "mapcount_underflow", "other")},
        InvertedTypes(
            found["PAGE_TYPE_BASE"] % (1 << 32),
            found["PAGE_MAPCOUNT_RESERVE"] % (1 << 32),
            {_NUMBERS[name]: bits[name] for name in known},
        ),
        decided,
    )


#: Members of ``struct folio``, and those of ``struct page`` that they are.
_FOLIO_IS_PAGE: Final = {
    "flags": "flags",
    "mapping": "mapping",
    "private": "private",
    "_mapcount": "page_type",
    "_refcount": "_refcount",
}


def _is_folio(prog: Program, page: Type) -> bool:
    """
    Whether a folio is its struct pages, so that what they say holds for it, and the low byte of the
    second one's flags is its order.

    It is so since linux 6.6; once folios are memory of their own, it is not.
    """
    folio = prog.type("struct folio")
    at = {name: offsetof(page, of_page) for name, of_page in _FOLIO_IS_PAGE.items()}
    at["_flags_1"] = sizeof(page) + at["flags"]
    return all(folio.has_member(name) and offsetof(folio, name) == at[name] for name in at)


def _stamp_is_too_large(prog: Program, page: Type) -> bool:
    try:
        stamp = sizeof(prog.type("union kho_page_info"))
    except LookupError:
        # Then it is one of those that had no magic yet.
        return False
    return stamp > sizeof(page.member("private").type)


@guarded()
def direct_map(prog: Program) -> int:
    """Virtual address at which physical address 0 is mapped."""
    return int(phys_to_virt(prog, 0).value_())


def record_layout(prog: Program, structure: str, /, **members: str) -> np.dtype[np.void]:
    """
    The layout of some members of a structure.

    :param members: path of each.
    """
    whole = Object(prog, structure, address=0)
    formats, offsets = [], []
    for path in members.values():
        found = reduce(Object.member_, path.split("."), whole)
        kind = found.type_
        while kind.kind == TypeKind.TYPEDEF:
            kind = kind.type
        signed = kind.kind == TypeKind.INT and kind.is_signed
        letter = "S" if kind.kind == TypeKind.ARRAY else "<i" if signed else "<u"
        formats.append(f"{letter}{sizeof(kind)}")
        offsets.append(found.address_)
    size = max(at + np.dtype(kind).itemsize for at, kind in zip(offsets, formats, strict=True))
    return np.dtype({"names": [*members], "formats": formats, "offsets": offsets, "itemsize": size})


def module_at(prog: Program, address: int) -> str:
    """The module that an address belongs to, in brackets; empty if that cannot be told."""
    try:
        module = address_to_module(prog, address)
        return f" [{text(bytes(module.name.string_()))}]" if module else ""
    except (FaultError, *_LACKING):
        return ""


def enumerators(prog: Program, name: str) -> dict[str, int]:
    """The constants of an enum; empty if the kernel has no such enum."""
    try:
        found = prog.type(name).enumerators
    except LookupError:
        return {}
    return {e.name: e.value for e in found or ()}
