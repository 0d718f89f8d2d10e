# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about what the scratch areas cost, and whether they will do."""

from __future__ import annotations

from collections.abc import Iterator

from ..facts import scratch
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Snapshot
from ..words.sizes import human
from .rule import Message, Severity, rule


@rule(
    "phantom-cma",
    Severity.WARNING,
    "kernel",
    """
    kho_init() gives the scratch areas to the page allocator as page blocks of type MIGRATE_CMA.
    /proc/meminfo counts what is free of them in CmaFree and in MemFree, but not in CmaTotal. Only
    memory that can be moved may be there: memory that is pinned for long (RDMA, VFIO, buffers of
    io_uring) and the kernel's own are refused with much memory free. Nothing is broken. If that is
    too dear, kho=off or smaller areas help from the next cold boot on: khoscope scratch has the
    numbers.
    """,
    kernel="kho_init init_cma_reserved_pageblock migrate_longterm_unpinnable_folios",
)
def phantom_cma(facts: Snapshot) -> Iterator[Message]:
    """/proc/meminfo counts more CMA memory as free than there is in total: KHO's scratch."""
    memory, size = facts.memory, scratch.phantom(facts)
    if memory is not None and size:
        # What is free just now would make another finding of it at each look.
        total = memory.cma_total * facts.abi.page_size >> 10
        yield Message(
            f"{human(size)} that only movable memory may use: CmaTotal ({total:,} kB) does not "
            "count them, CmaFree counts what is free of them"
        )


@rule(
    "scratch-unmovable",
    Severity.WARNING,
    "kernel",
    """
    The image of the next kexec goes into scratch, and the next kernel boots there: what is in
    scratch is overwritten. Nobody misses it then, but a device that goes on writing to memory that
    is pinned there writes into the next kernel. Memory that cannot be moved should not be in page
    blocks of type MIGRATE_CMA at all. A pin may be one of the moment: look again. Find out whose it
    is (khoscope pages with the area's range), and stop it before the kexec.
    """,
    kernel="kho_init kho_populate kimage_load_segment",
)
def scratch_unmovable(facts: Snapshot) -> Iterator[Message]:
    """Memory in scratch that cannot be moved away."""
    # With KHO off, the next kernel is loaded and boots elsewhere.
    for area, found in scratch.unmovable(facts) if facts.kho_enable else ():
        sizes = (f"{use} {human(count * facts.abi.page_size)}" for use, count in found.items())
        yield Message(f"{area.purpose}: {', '.join(sizes)}", area.phys)


@rule(
    "scratch-too-small",
    Severity.WARNING,
    "next",
    """
    kexec_file_load() puts the image and its initrd into the scratch areas, each into the first one
    that has room for it, and the next kernel boots there: all that it allocates before its page
    allocator is up has to fit in as well. If one of them does not fit, loading fails. If the boot
    does not, the next kernel panics early, mostly without a word. Boot this kernel with a larger
    kho_scratch=, or without one.
    """,
    kernel="kho_locate_mem_hole memblock_alloc_range_nid kho_populate",
)
def scratch_too_small(facts: Snapshot, kernel: NextKernel) -> Iterator[Message]:
    """The next kernel's image, or its boot, does not fit into the scratch areas."""
    room = [area.size for area in scratch.areas(facts)]
    total = sum(room)
    segments = {"kernel": kernel.size or 0, "initrd": kernel.initrd or 0}
    if not room or not facts.kho_enable:
        return
    for what, size in segments.items():
        first = next((i for i, left in enumerate(room) if size <= left), None)
        if first is None:
            yield Message(
                f"{kernel.release}: its {what} takes {human(size)} in one piece, and no area has "
                f"more than {human(max(room))} left"
            )
            return
        room[first] -= size
    needed = scratch.needs(facts)
    if needed is None or kernel.size is None:
        return
    image = max(sum(segments.values()), needed.image or 0)
    boot = sum(needed.nodes.values())
    if image + boot > total:
        yield Message(
            f"{kernel.release} takes {human(image)}, and a boot like this one's {human(boot)}: the "
            f"areas have {human(total)}"
        )


@rule(
    "kho-unused",
    Severity.INFO,
    "kernel",
    """
    KHO is on, perhaps only because that is this kernel's default, and its scratch areas are memory
    that only movable memory may use. If no handover is planned, boot with kho=off: khoscope
    scratch says what that gives back, and how.
    """,
    kernel="kho_reserve_scratch",
)
def kho_unused(facts: Snapshot) -> Iterator[Message]:
    """KHO is on, and nobody but KHO itself preserves anything."""
    size = sum(area.size for area in scratch.areas(facts))
    # Older snapshots do not say whether /dev/liveupdate is open.
    if facts.kho_enable and size and facts.memory is not None and scratch.users(facts).nobody:
        yield Message(f"nobody uses KHO here, and {human(size)} are set aside for it")
