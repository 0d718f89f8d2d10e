# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One reading of a kernel: where its RAM is, and all small facts.

Each fact is there, or is named as unreadable: a vmcore may lack any page, and memory may hold
anything.  The facts and the faults belong to one reading: the next reading looks anew.
"""

from __future__ import annotations

import re
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeVar

import numpy as np
from drgn import FaultError, Object, Program
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mmzone import NODE_DATA
from drgn.helpers.linux.nodemask import for_each_online_node, nr_node_ids
from drgn.helpers.linux.percpu import per_cpu_ptr
from drgn.helpers.linux.printk import get_printk_records

from ..abi.fdt import total_size
from ..abi.keys import U64
from ..abi.kho_fdt import Fdt, parse_root_fdt, root_fdt
from ..abi.serialized import text
from ..facts import budget
from ..facts.clients import LuoState
from ..facts.snapshot import (
    Handover,
    Kernel,
    KexecImage,
    Memory,
    Node,
    ScratchSetup,
    Zone,
)
from ..words.errors import KhoscopeError
from .probe import Parts, enumerators, page_block_layout, page_types
from .sections import offline, page_blocks, section_layout
from .walk import READS, in_ranges

#: ``IORESOURCE_SYSRAM`` (include/linux/ioport.h, a #define).
IORESOURCE_SYSRAM: Final = 0x01000000
#: More resources than any machine has.
RESOURCE_LIMIT: Final = 1 << 16
#: More file handlers than any kernel has.
HANDLER_LIMIT: Final = 1 << 8
#: More than any command line has, bytes.
COMMAND_LINE_LIMIT: Final = 1 << 16
#: Letters of a zone's name that are kept.
ZONE_NAME: Final = 32
#: The largest log that can be configured has 2^25 bytes (CONFIG_LOG_BUF_SHIFT), or what
#: log_buf_len= says: a ring with more records than this is corrupt.
LOG_COUNT_BITS: Final = 26

#: What a kernel says when KHO, LUO or the page allocator finds something broken.
TROUBLE = re.compile(
    r"KHO: .*(fail|disabl|incompatib|invalid|broken|too small|not supported)"
    r"|luo: .*(fail|unable|no registered|mismatch|incompatib)"
    r"|Bad page state|page dumped because"
    r"|(WARNING|kernel BUG).*(kexec_handover|kho_)",
    re.IGNORECASE,
)
#: How many of these lines are kept: the newest.
TROUBLE_KEPT: Final = 64

T = TypeVar("T")


class _Corrupt(Exception):
    """Memory can be read, but does not hold what it should; says why."""


@dataclass
class Reading:
    """
    What is read of a kernel at one time.

    :param ram: u64, shape (n, 2), sorted and disjoint: System RAM.
    :param unreadable: what could not be read, in words.
    """

    prog: Program
    parts: Parts
    ram: U64 = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, prog: Program, parts: Parts) -> Reading:
        """A new reading that knows where RAM is."""
        reading = cls(prog, parts)
        reading.ram = reading._read_ram()
        return reading

    def attempt(self) -> Reading:
        """A copy to go on from: if the attempt is thrown away, so is what was unreadable in it."""
        return Reading(self.prog, self.parts, self.ram, list(self.unreadable))

    def cannot(self, what: str) -> None:
        """Name what cannot be read."""
        if what not in self.unreadable:
            self.unreadable.append(what)

    def fact(self, what: str, read: Callable[[], T], otherwise: T) -> T:
        """Read a fact; if that fails, name it as unreadable and return ``otherwise``."""
        try:
            return read()
        except FaultError:
            self.cannot(what)
        except _Corrupt as error:
            self.cannot(f"{what}: {error}")
        return otherwise

    # -- the kernel -------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        """Which kernel it is, and what it says of itself."""
        prog = self.prog
        name = prog["init_uts_ns"].name
        flags: dict[int, str] = {}
        for flag, bit in enumerators(prog, "enum pageflags").items():
            flags.setdefault(bit, flag.removeprefix("PG_"))
        return Kernel(
            # Without the release, nothing else would be of use.
            text(bytes(name.release.string_())),
            self.fact(
                "the kernel's version (init_uts_ns)",
                lambda: text(bytes(name.version.string_())),
                "",
            ),
            self.fact("the boot id (sysctl_bootid)", self._boot_id, None),
            self.fact(
                "whether the kernel is tainted (tainted_mask)",
                lambda: int(prog["tainted_mask"].value_()),
                0,
            ),
            self.fact("the kernel log (prb)", self._trouble, []),
            [flags.get(bit, "") for bit in range(prog["__NR_PAGEFLAGS"].value_())],
            page_types(prog).names,
            self.fact("the command line (saved_command_line)", self._command_line, ""),
        )

    def _boot_id(self) -> str | None:
        boot_id = uuid.UUID(bytes=bytes(self.prog["sysctl_bootid"].value_()))
        return str(boot_id) if boot_id.int else None

    def _command_line(self) -> str:
        at = self.prog["saved_command_line"].value_()
        line = self.prog.read_c_string(at, max_size=COMMAND_LINE_LIMIT)
        return line.decode("utf-8", "backslashreplace")

    def _trouble(self) -> list[str]:
        """The newest lines of the log that say that something is broken."""
        if not self.parts.log:
            raise _Corrupt("the debug info lacks its types")
        self._check_log()
        kept: deque[str] = deque(maxlen=TROUBLE_KEPT)
        for record in get_printk_records(self.prog):
            line = record.text.decode("utf-8", "backslashreplace")
            if TROUBLE.search(line):
                kept.append(line)
        return list(kept)

    def _check_log(self) -> None:
        """
        Refuse a corrupt ring: drgn would walk all of its descriptors, however many it says it has.
        """
        ring = self.prog["prb"].desc_ring
        bits = ring.count_bits.value_()
        if bits > LOG_COUNT_BITS or self.prog["prb"].text_data_ring.size_bits.value_() > 32:
            raise _Corrupt("its ring buffer is corrupt")
        # The two highest bits are not part of a descriptor's id (DESC_ID_MASK).
        first, last = ring.tail_id.counter.value_(), ring.head_id.counter.value_()
        if (last - first) % (1 << 62) >= 1 << bits or max(first, last) >> 62 or first < 0:
            raise _Corrupt("its ring buffer is corrupt")

    # -- RAM --------------------------------------------------------------------------------------

    def _read_ram(self) -> U64:
        """
        System RAM from ``iomem_resource``, adjacent ranges joined.

        Resources are in the kernel's heap, and a vmcore may lack pages of it.  Then take what nodes
        span, including the holes.
        """
        what = "where RAM is (iomem_resource): what nodes span is taken for it"
        ranges = self.fact(what, self._resources, None)
        if ranges is None:
            ranges = [(node.start, node.end) for node in self.nodes() or ()]
        joined: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        if not joined:
            raise KhoscopeError(
                "this kernel lists no System RAM in iomem_resource",
                "check that the debug info belongs to this kernel",
            )
        return np.array(joined, np.uint64)

    def _resources(self) -> list[tuple[int, int]] | None:
        """Like drgn's :func:`for_each_resource`, but it stops at a corrupt tree."""
        found: list[tuple[int, int]] = []
        waiting = [self.prog["iomem_resource"].address_of_()]
        seen: set[int] = set()
        while waiting:
            resource = waiting.pop()
            if not resource:
                continue
            if resource.value_() in seen:
                raise _Corrupt("its list is corrupt")
            if len(seen) == RESOURCE_LIMIT:
                raise _Corrupt(f"it has more than the {RESOURCE_LIMIT:,} that khoscope looks at")
            seen.add(resource.value_())
            start, end = resource.start.value_(), resource.end.value_()
            if resource.flags.value_() & IORESOURCE_SYSRAM and start <= end < 2**64 - 1:
                found.append((start, end + 1))
            waiting += resource.sibling.read_(), resource.child.read_()
        return found

    def nodes(self) -> list[Node] | None:
        """The NUMA nodes that have memory; None: they cannot be read."""
        return self.fact("the NUMA nodes (struct pglist_data)", self._nodes, None)

    def _nodes(self) -> list[Node] | None:
        if not self.parts.nodes:
            raise _Corrupt("the debug info lacks them")
        if nr_node_ids(self.prog) > budget.NODES:
            raise _Corrupt("more than any kernel has")
        shift = self.prog["PAGE_SHIFT"].value_()
        found = []
        for number in for_each_online_node(self.prog):
            node = NODE_DATA(self.prog, number)
            first, pages = node.node_start_pfn.value_(), node.node_spanned_pages.value_()
            if (first + pages) << shift > budget.ADDRESSES:
                raise _Corrupt(f"node {number} has memory where no processor has any")
            if pages:
                found.append(Node(number, first << shift, first + pages << shift))
        return sorted(found, key=lambda node: node.start)

    def memory(self, scratch: U64) -> Memory | None:
        """What the page allocator has; None: it cannot be read, or this kernel lacks it."""
        if not self.parts.memory:
            return None
        return self.fact("the zones (struct zone)", lambda: self._memory(scratch), None)

    def _memory(self, scratch: U64) -> Memory:
        prog = self.prog
        shift = prog["PAGE_SHIFT"].value_()
        zones = []
        for number in for_each_online_node(prog):
            for zone in NODE_DATA(prog, number).node_zones:
                if zone.present_pages:
                    zones.append(self._zone(number, zone, shift))
                if len(zones) > budget.ZONES:
                    raise _Corrupt("more than any kernel has")
        caches = (
            prog["vm_node_stat"][prog[item]].counter.value_()
            for item in ("NR_SLAB_RECLAIMABLE_B", "NR_KERNEL_MISC_RECLAIMABLE")
        )
        reclaimable = sum(max(pages, 0) for pages in caches)
        total = prog["totalcma_pages"].value_()
        if max(reclaimable, total) << shift > budget.ADDRESSES:
            raise _Corrupt("more is counted than any machine has")
        return Memory(zones, total, reclaimable, self._block_order(shift, scratch))

    def _block_order(self, shift: int, scratch: U64) -> int:
        """
        ``pageblock_order``, mostly a #define: that of a huge page, or less where the page allocator
        has no such blocks or was configured otherwise (``CONFIG_PAGE_BLOCK_MAX_ORDER``).

        The scratch areas tell which: with the right one all their blocks are of type CMA.
        """
        most = (self.prog.type("struct zone").member("free_area").type.length or 1) - 1
        usual = min(shift - 3, most)
        areas = [(phys, size) for phys, size in scratch.tolist() if self._in_ram(phys, size)]
        areas = [(phys, size) for phys, size in areas if size]
        if not areas or not self.parts.page_blocks:
            return usual
        try:
            for order in (usual, *(order for order in range(most, 8, -1) if order != usual)):
                if all({*self._page_blocks(*area, order)} == {"cma"} for area in areas):
                    return order
        except (FaultError, _Corrupt):
            # Who asks for the blocks themselves is told.
            return usual
        return usual

    def _zone(self, node: int, zone: Object, shift: int) -> Zone:
        prog = self.prog

        def stat(item: str) -> int:
            # A count of each processor is added to it only now and then.
            return max(zone.vm_stat[prog[item]].counter.value_(), 0)

        first, pages = zone.zone_start_pfn.value_(), zone.spanned_pages.value_()
        if (first + pages) << shift > budget.ADDRESSES:
            raise _Corrupt(f"node {node} has memory where no processor has any")
        kept_back = (
            zone._watermark[prog["WMARK_MIN"]].value_()
            + zone.watermark_boost.value_()
            + zone.lowmem_reserve[prog["ZONE_NORMAL"]].value_()
            + zone.nr_free_highatomic.value_()
        )
        counts = (
            zone.present_pages.value_(),
            zone.managed_pages.counter.value_(),
            zone.cma_pages.value_(),
            stat("NR_FREE_PAGES"),
            stat("NR_FREE_CMA_PAGES"),
            kept_back,
            zone._watermark[prog["WMARK_LOW"]].value_(),
            sum(
                max(per_cpu_ptr(zone.per_cpu_pageset, cpu).count.value_(), 0)
                for cpu in for_each_online_cpu(prog)
            ),
            stat("NR_ZONE_INACTIVE_FILE") + stat("NR_ZONE_ACTIVE_FILE"),
        )
        if not 0 <= min(counts) <= max(counts) <= budget.ADDRESSES >> shift:
            raise _Corrupt(f"a zone of node {node} counts more pages than any machine has")
        name = text(prog.read_c_string(zone.name.value_(), max_size=ZONE_NAME))
        return Zone(node, name, first << shift, first + pages << shift, *counts)

    def page_blocks(self, phys: int, size: int, order: int) -> dict[str, int] | None:
        """
        How many page blocks of some memory have which migrate type; None: they cannot be read, or
        this kernel keeps them in a way that khoscope does not know.

        :param order: of a block.
        """
        if not self.parts.page_blocks or not size:
            return None
        what = "the migrate types of page blocks (struct mem_section_usage)"
        return self.fact(what, lambda: self._page_blocks(phys, size, order), None)

    def _page_blocks(self, phys: int, size: int, order: int) -> dict[str, int]:
        shift = self.prog["PAGE_SHIFT"].value_()
        layout = page_block_layout(self.prog)
        try:
            return page_blocks(layout, phys, size, 1 << order + shift, 1 << shift, self.prog.read)
        except (ValueError, OverflowError) as error:
            raise _Corrupt(str(error)) from error

    def offline(self) -> U64 | None:
        """The parts of RAM that are offline, as RAM; None: they are not known."""
        what = "which memory is offline (mem_section)"
        if not self.parts.sections:
            self.cannot(f"{what}: the debug info lacks its types")
            return None
        return self.fact(what, self._offline, None)

    def _offline(self) -> U64:
        size = self.prog["PAGE_SIZE"].value_()
        try:
            return offline(section_layout(self.prog), self.ram, size, self.prog.read)
        except (ValueError, OverflowError) as error:
            raise _Corrupt(str(error)) from error

    # -- KHO --------------------------------------------------------------------------------------

    def handover(self) -> Handover:
        """How this kernel came to be."""
        return self.fact(
            "how this kernel came to be (kho_in)", self._handover, Handover(False, "", 0)
        )

    def _handover(self) -> Handover:
        kho_in = self.prog["kho_in"]
        if not self.parts.predecessor:
            return Handover(bool(kho_in.fdt_phys), None, None)
        return Handover(
            bool(kho_in.fdt_phys),
            kho_in.previous_release.string_().decode("ascii", "backslashreplace"),
            kho_in.kexec_count.value_(),
        )

    def incoming_fdt(self) -> int:
        """Where the incoming FDT is, ``phys_addr_t``; 0: there is none."""
        what = "how this kernel came to be (kho_in)"
        return self.fact(what, lambda: int(self.prog["kho_in"].fdt_phys.value_()), 0)

    def finalized(self) -> bool | None:
        """``kho_out.finalized``; None: this kernel does not finalize."""
        if self.parts.kho_out.is_radix:
            return None
        return self.fact(
            "whether KHO is finalized (kho_out)",
            lambda: bool(self.prog["kho_out"].finalized),
            None,
        )

    def scratch(self, enabled: bool) -> U64:
        """
        ``kho_scratch``: u64, shape (n, 2), address and size of each area.

        :param enabled: KHO is on, so there must be some.  If it is off, there are those that the
            previous kernel handed over, or none, whatever ``kho_scratch`` and its count say: a
            set-up that failed gives the array back to memblock and leaves both as they are.
        """
        nothing: list[tuple[int, int]] = []
        what = "the scratch areas (kho_scratch)"
        found = self.fact(what, lambda: list(self._scratch(enabled)), nothing)
        return np.array(found, np.uint64).reshape(-1, 2)

    def _scratch(self, enabled: bool) -> Iterator[tuple[int, int]]:
        if not enabled and not self.prog["kho_in"].scratch_phys:
            return
        count = self.prog["kho_scratch_cnt"].value_()
        areas = self.prog["kho_scratch"].read_()
        if not areas:
            raise _Corrupt("there are none, though there should be")
        if count > budget.SCRATCH:
            raise _Corrupt(f"{count} are more than any kernel has")
        for i in range(count):
            yield areas[i].addr.value_(), areas[i].size.value_()

    def scratch_setup(self) -> ScratchSetup | None:
        """``kho_scratch_cnt`` and whether there is a ``kho_scratch``; None: not readable."""
        return self.fact(
            "the scratch areas (kho_scratch)",
            lambda: ScratchSetup(
                int(self.prog["kho_scratch_cnt"].value_()), bool(self.prog["kho_scratch"].read_())
            ),
            None,
        )

    def image(self) -> KexecImage | None:
        """``kexec_image``; None: this kernel lacks it, or one of its members that concern KHO."""
        if not self.parts.image:
            return None
        what = "the loaded kexec image (kexec_image)"
        return self.fact(what, lambda: self._image("kexec_image"), None)

    def crash_image(self) -> KexecImage | None:
        """``kexec_crash_image``; None likewise."""
        if not self.parts.crash_image:
            return None
        what = "the loaded crash kernel (kexec_crash_image)"
        return self.fact(what, lambda: self._image("kexec_crash_image"), None)

    def _image(self, variable: str) -> KexecImage:
        image = self.prog[variable].read_()
        if not image:
            return KexecImage(False)
        known = min(image.nr_segments.value_(), image.segment.type_.length or 0)
        return KexecImage(
            True,
            bool(image.file_mode),
            image.kho.fdt.value_(),
            sum(image.segment[i].memsz.value_() for i in range(known)),
        )

    def liveupdate(self) -> LuoState | None:
        """``luo_global`` and the file handlers; None: this kernel has no LUO."""
        if not self.parts.liveupdate:
            return None
        handlers: list[str] = []
        what = "LUO's file handlers (luo_file_handler_list)"
        self.fact(what, lambda: self._handlers(handlers), None)
        return self.fact(
            "LUO's state (luo_global)",
            lambda: LuoState(
                bool(self.prog["luo_global"].enabled),
                handlers,
                bool(self.prog["luo_dev"].in_use.counter) if self.parts.device else None,
            ),
            None,
        )

    def _handlers(self, found: list[str]) -> None:
        head = self.prog["luo_file_handler_list"].address_of_()
        listed = list_for_each_entry("struct liveupdate_file_handler", head, "list")
        for handler in islice(listed, HANDLER_LIMIT + 1):
            if len(found) == HANDLER_LIMIT:
                raise _Corrupt(f"the list does not end after {HANDLER_LIMIT}")
            found.append(handler.compatible.string_().decode("ascii", "backslashreplace"))

    # -- FDTs -------------------------------------------------------------------------------------

    def fdt(self, phys: int, outgoing: bool) -> tuple[Fdt, dict[str, bytes]]:
        """
        A root FDT and the blobs: itself as "fdt", subtrees by name as far as readable.

        :param outgoing: its blobs must be there.  Incoming blobs may have been given back since,
            and a vmcore without free pages lacks them.
        """
        fdt, blob = self.root_fdt(phys)
        blobs = {} if blob is None else {"fdt": blob}
        for subtree in fdt.subtrees:
            if subtree.phys is None:
                continue
            size = subtree.size or self._total_size(subtree.phys)
            # bad-fdt reports a blob that is not in RAM.
            if not size or not self._in_ram(subtree.phys, size):
                continue
            kept = min(size, budget.BLOB, budget.BLOBS - sum(map(len, blobs.values())))
            data = self.read_phys(subtree.phys, kept)
            if data:
                blobs[f"subtree {subtree.name}"] = data
            elif outgoing:
                self.cannot(f"the outgoing subtree {subtree.name!r}")
        return root_fdt(phys, blobs) if phys else fdt, blobs

    def _total_size(self, phys: int) -> int | None:
        """The size of an FDT, according to itself."""
        header = self.read_phys(phys, 8) if self._in_ram(phys, 8) else None
        return total_size(header) if header else None

    def _in_ram(self, phys: int, size: int) -> bool:
        span = (np.array([at], np.uint64) for at in (phys, min(phys + size, 2**64 - 1)))
        return bool(in_ranges(self.ram, *span)[0])

    def root_fdt(self, phys: int) -> tuple[Fdt, bytes | None]:
        """A root FDT, and its page."""
        if not phys:
            return Fdt(0, problems=["there is none"]), None
        size = self.prog["PAGE_SIZE"].value_()
        blob = self.read_phys(phys, size)
        # kho_add_subtree() may be moving things in the FDT: read until two reads agree.
        for _ in range(READS):
            again = self.read_phys(phys, size)
            if again == blob:
                break
            blob = again
        return parse_root_fdt(phys, blob), blob

    def read_phys(self, address: int, size: int) -> bytes | None:
        try:
            return self.prog.read(address, size, physical=True)
        except FaultError:
            return None
