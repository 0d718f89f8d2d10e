# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What KHO costs a host: the scratch areas, who may use them, and what could be given back.

The kernel gives its scratch areas to the page allocator as page blocks of type MIGRATE_CMA
(``kho_init()``): only memory that can be moved away may be there.
Kernel sources: ``kernel/liveupdate/kexec_handover.c``, ``mm/gup.c``, ``mm/page_alloc.c``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ..abi import serialized
from ..abi.keys import BAD_ORDER, U64, Tracker
from ..words.sizes import human
from .clients import Claims, OwnerKind
from .snapshot import Memory, Node, PageUse, ScratchUse, Snapshot, Zone, rows
from .tree import KeySet

#: ``scratch_scale``, per cent, unless ``kho_scratch=`` says otherwise.
DEFAULT_SCALE: Final = 200
#: ``ARCH_LOW_ADDRESS_LIMIT`` of x86-64 and arm64: where the lowmem area ends at the latest.
LOW_END: Final = 1 << 32
#: Page types whose memory can be migrated all the same, since drivers help: ballooned memory, and
#: that of zsmalloc.
_MOVABLE_TYPES: Final = {"offline", "zsmalloc", "hugetlb"}
_MOVABLE: Final = {
    *(PageUse.FILE, PageUse.ANON, PageUse.SHMEM, PageUse.DRIVER_MOVABLE),
    *(PageUse.PCP, PageUse.TRANSIT),
    *_MOVABLE_TYPES,
}
#: Whose memory is KHO's own: not the reason why somebody has KHO on.  Of the subtrees, the others
#: are their clients'.
_OWN: Final = {OwnerKind.FDT, OwnerKind.LUO}
_OWN_SUBTREES: Final = {serialized.LUO, serialized.KEXEC_METADATA}
#: Sizes that are suggested are multiples of this, or of what the kernel rounds to if that is more.
_GRAIN: Final = 16 << 20
#: The least that is suggested for lowmem: drivers of the next kernel may take memory there alone.
_LOWMEM: Final = 64 << 20
#: Added to what the boot took, as a fraction: the next kernel may take a little more.
_MARGIN: Final = (5, 4)
#: Taken for the image and its initrd as long as none is loaded, bytes.
_IMAGE: Final = 160 << 20


def is_movable(use: str) -> bool:
    """Whether memory of this use can be moved out of scratch; ``use`` as in ScratchUse.pages."""
    return use in _MOVABLE


@dataclass(frozen=True)
class Area:
    """
    A scratch area.

    :param own: bytes in it that are KHO's own; there should be none before a handover.
    :param purpose: ``lowmem``, ``global`` or ``node N``, as the kernel meant it.
    :param node: the NUMA node that it lies in; None: not known.
    :param zones: the zones that it lies in.
    :param free: bytes that the buddy allocator holds; None: not counted.
    """

    purpose: str
    phys: int
    size: int
    node: int | None
    zones: tuple[str, ...]
    free: int | None
    use: ScratchUse | None
    own: int = 0


@dataclass(frozen=True)
class ZoneFree:
    """
    What is free in a zone, in bytes.

    :param anybody: what user memory that is pinned for long, and the kernel, can get.
    :param movable: what only movable memory can get.
    :param kept_back: what is left of it: the kernel's reserve for itself.
    """

    node: int
    name: str
    free: int
    anybody: int
    movable: int
    kept_back: int


@dataclass(frozen=True)
class Sizes:
    """What ``kho_scratch=`` asks for, in bytes; ``per_node`` for each node that has memory."""

    lowmem: int
    rest: int
    per_node: int

    def total(self, nodes: int) -> int:
        return self.lowmem + self.rest + nodes * self.per_node

    def total_of(self, facts: Snapshot) -> int:
        """Of the areas that a kernel on this host makes of it."""
        return self.total(max(len(facts.nodes or ()), 1))

    def __str__(self) -> str:
        return f"kho_scratch={self.lowmem >> 20}M,{self.rest >> 20}M,{self.per_node >> 20}M"


@dataclass(frozen=True)
class Needs:
    """
    What the boot of a kernel like this one needs, in bytes.

    :param low: reserved below 4 GiB while it booted.
    :param nodes: reserved while it booted, by node.
    :param image: the segments of the loaded image, initrd included; None: none is loaded.
    :param how: where the numbers come from.
    """

    low: int
    nodes: dict[int, int]
    image: int | None
    how: str


@dataclass(frozen=True)
class Users:
    """
    Who uses KHO.

    :param blocks: preserved by others than KHO and LUO themselves.
    :param size: of these blocks, bytes.
    :param sessions: of LUO.
    :param open: whether somebody has ``/dev/liveupdate`` open; None: not known.
    :param came: sessions, or subtrees of clients, were handed over to this kernel.
    :param unknown: why there may be others, in words; "": there are none.
    :param services: for which systemd keeps what it hands over when it is told to kexec.
    """

    blocks: int
    size: int
    sessions: int
    open: bool | None
    came: bool
    unknown: str = ""
    services: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return bool(self.blocks or self.sessions or self.open or self.came or self.services)

    @property
    def nobody(self) -> bool:
        """Whether it is sure that there is nobody."""
        return not self.any and not self.unknown


@dataclass(frozen=True)
class Cost:
    """
    What KHO costs this host; sizes in bytes.

    :param asked: what decided the sizes of the areas.
    :param scratch: of all areas.
    :param ram: of the host.
    :param off: what everybody could have of them if KHO were off: all that is not reserved.
    :param own: what KHO and LUO have for themselves, and nobody else can use: FDT, blobs, tree.
    :param zones: what is free now; empty: not known.
    :param pinnable: what memory that is pinned for long can get, reclaim included; None: not known.
    :param cma_total: as /proc/meminfo has it; None: not known.  ``cma_free`` likewise.
    :param phantom: of page blocks of type MIGRATE_CMA that CmaTotal does not count: scratch.
    :param needs: None: not known.
    :param advice: smaller areas that would do; None: there are none.
    :param no_advice: why there are none, in words.
    :param given_back: what they would give back.
    """

    areas: list[Area]
    asked: str
    scratch: int
    off: int
    ram: int
    own: int
    zones: list[ZoneFree]
    pinnable: int | None
    cma_total: int | None
    cma_free: int | None
    phantom: int
    users: Users
    needs: Needs | None
    advice: Sizes | None
    no_advice: str
    given_back: int


def cost(facts: Snapshot) -> Cost:
    """What KHO costs the host that a snapshot is of."""
    memory, page = facts.memory, facts.abi.page_size
    own = _own_pages(facts)
    listed = [
        replace(area, own=page * _between(own, area.phys, area.phys + area.size))
        for area in areas(facts)
    ]
    total = sum(area.size for area in listed)
    reserved = sum(use.pages.get(PageUse.RESERVED, 0) for use in facts.scratch_use)
    needed, sizes = needs(facts), enough(facts)
    why_not = _no_advice(facts, needed, sizes, total)
    if why_not:
        sizes = None
    return Cost(
        areas=listed,
        asked=asked_for(facts),
        scratch=total,
        off=max(total - reserved * page, 0),
        ram=size_of(facts.ram),
        own=_own(facts)[1] + _tree_size(facts),
        zones=[_free(zone, page) for zone in memory.zones] if memory else [],
        pinnable=pinnable(facts),
        cma_total=memory.cma_total * page if memory else None,
        cma_free=sum(zone.free_cma for zone in memory.zones) * page if memory else None,
        phantom=phantom(facts),
        users=users(facts),
        needs=needed,
        advice=sizes,
        no_advice=why_not,
        given_back=total - sizes.total_of(facts) if sizes else 0,
    )


def _no_advice(facts: Snapshot, needed: Needs | None, sizes: Sizes | None, total: int) -> str:
    """Why these sizes are no advice, to a host whose areas have so many bytes; "": they are."""
    if needed is None:
        if facts.handover.is_kho_boot:
            return "what a boot needs is not known after a handover: ask after a cold boot"
        return "what a boot needs is not known"
    why = ""
    if sizes is None:
        why = "there is no room for areas that would surely do"
    elif sizes.total_of(facts) > total:
        why = f"a next kernel may need {human(sizes.total_of(facts))}, more than there is"
    elif 10 * sizes.total_of(facts) > 9 * total:
        # Sizes that are hardly smaller are not worth it.
        why = "a next kernel would need nearly as much"
    if why and needed.image is None:
        why += f", if its image takes {human(_IMAGE)}: load it, and ask again"
    return why


def areas(facts: Snapshot) -> list[Area]:
    """The scratch areas that have memory, with what is known of each."""
    numbers = sorted(node.number for node in facts.nodes or ())
    purposes = ["lowmem", "global", *(f"node {number}" for number in numbers)]
    if len(purposes) != len(facts.scratch):
        purposes = [f"area {i}" for i in range(len(facts.scratch))]
    found = []
    for i, (phys, size) in enumerate(facts.scratch.tolist()):
        free = facts.scratch_free[i] if i < len(facts.scratch_free) else None
        zones = [zone for zone in _zones(facts.memory) if _overlap(zone, phys, phys + size)]
        nodes = {zone.node for zone in zones}
        if size:
            found.append(
                Area(
                    purposes[i],
                    phys,
                    size,
                    nodes.pop() if len(nodes) == 1 else None,
                    tuple(dict.fromkeys(zone.name for zone in zones)),
                    None if free is None else free << facts.abi.page_shift,
                    facts.scratch_use[i] if i < len(facts.scratch_use) else None,
                )
            )
    return found


def _zones(memory: Memory | None) -> list[Zone]:
    return memory.zones if memory else []


def _overlap(zone: Zone, start: int, end: int) -> bool:
    return zone.start < end and start < zone.end


def _free(zone: Zone, page: int) -> ZoneFree:
    """What is free in a zone, as ``__zone_watermark_ok()`` counts."""
    movable = zone.free if zone.name == "Movable" else min(zone.free_cma, zone.free)
    others = zone.free - movable
    anybody = max(others - zone.kept_back, 0)
    return ZoneFree(
        zone.node,
        zone.name,
        zone.free * page,
        anybody * page,
        movable * page,
        (others - anybody) * page,
    )


def phantom(facts: Snapshot) -> int:
    """Bytes of page blocks of type MIGRATE_CMA that CmaTotal does not count: scratch."""
    memory = facts.memory
    if memory is None:
        return 0
    # A kernel that was handed over to does not count its scratch as a zone's either.
    blocks = sum((use.blocks or {}).get("cma", 0) for use in facts.scratch_use)
    counted = max(sum(zone.cma for zone in memory.zones) - memory.cma_total, 0)
    return max(blocks << memory.block_order, counted) * facts.abi.page_size


def pinnable(facts: Snapshot) -> int | None:
    """
    Bytes that user memory can get that is pinned for long (``FOLL_LONGTERM``): what is free
    outside scratch and ``cma=``, and what the kernel can free there first.

    That is ``si_mem_available()`` (mm/show_mem.c) without what is movable alone, and down to the
    watermark at which user memory is refused.
    """
    memory = facts.memory
    if memory is None or len(facts.scratch_use) != len(facts.scratch):
        return None
    zones = [zone for zone in memory.zones if zone.name != "Movable"]
    pages = sum(
        max(zone.free - zone.free_cma - zone.kept_back + zone.pcp + zone.file, 0) for zone in zones
    )
    in_scratch = Counter[str]()
    for use in facts.scratch_use:
        # What cannot be read may be page cache, too: what is left is the least.
        in_scratch.update(use.pages)
        in_scratch[PageUse.FILE] += use.unread
    pages -= in_scratch[PageUse.FILE] + in_scratch[PageUse.PCP]
    files = sum(zone.file for zone in zones) - in_scratch[PageUse.FILE]
    low = sum(zone.low for zone in memory.zones)
    # The kernel keeps some of its caches whatever happens.
    pages += memory.reclaimable
    pages -= sum(min(cache // 2, low) for cache in (memory.reclaimable, max(files, 0)))
    return max(pages, 0) * facts.abi.page_size


def users(facts: Snapshot) -> Users:
    """Who uses KHO, but for itself."""
    totals = facts.outgoing.tree.totals(facts.abi)
    good = {order: 0 for order, _ in totals if order != BAD_ORDER}
    for (order, _), count in totals.items():
        if order != BAD_ORDER:
            good[order] += count
    blocks, size = _own(facts)
    pages = sum(count << order for order, count in good.items())
    luo, came = facts.outgoing.luo, facts.incoming
    return Users(
        max(sum(good.values()) - blocks, 0),
        max((pages << facts.abi.page_shift) - size, 0),
        len(luo.sessions) if luo else 0,
        facts.liveupdate.in_use if facts.liveupdate else None,
        came is not None
        and (
            bool(came.luo and came.luo.sessions)
            or not {subtree.name for subtree in came.fdt.subtrees} <= _OWN_SUBTREES
        ),
        _unknown_users(facts),
        () if facts.services is None else tuple(each.unit for each in facts.services.handed_over),
    )


def _unknown_users(facts: Snapshot) -> str:
    """Why there may be users that facts do not show; "": there are none."""
    state = facts.outgoing.tree.state
    if state.problem_count:
        return "the tree cannot be read whole"
    if state.moved:
        return "blocks came and went meanwhile"
    if facts.unreadable:
        return "not all that tells can be read"
    if facts.liveupdate is not None and facts.liveupdate.in_use is None:
        return "whether /dev/liveupdate is open is not recorded"
    if facts.services is not None and facts.services.unread:
        return "systemd did not say all that it keeps for services"
    return ""


def _own(facts: Snapshot) -> tuple[int, int]:
    """How many of the preserved blocks are KHO's and LUO's own, and their bytes."""
    keys = KeySet(facts.abi, facts.outgoing.tree.leaves)
    pages = _claimed_pages(facts)
    blocks = size = 0
    for order in keys.orders:
        for page_type in facts.abi.key_types:
            wanted = facts.abi.kho_radix_encode_keys(pages, order, page_type)
            found = len(np.unique(wanted[keys.contains(wanted)]))
            blocks += found
            size += found << order + facts.abi.page_shift
    return blocks, size


def _claimed_pages(facts: Snapshot) -> U64:
    """The addresses of the pages that KHO's and LUO's own structures lead to."""
    subtrees = {f"subtree {name}" for name in _OWN_SUBTREES}
    own = [
        i
        for i, owner in enumerate(facts.outgoing.owners)
        if owner.kind in _OWN or (owner.kind == OwnerKind.SUBTREE and owner.name in subtrees)
    ]
    every = Claims.concatenate(facts.outgoing.claims)
    every = every[np.isin(every.owner, np.array(own, np.uint32)) & (every.size > 0)]
    return _pages(every, facts.abi.page_shift)


def _own_pages(facts: Snapshot) -> U64:
    """These, and a radix tree's nodes; sorted."""
    tree = facts.outgoing.tree.nodes if facts.abi.tracker == Tracker.RADIX else ()
    return np.unique(np.concatenate([_claimed_pages(facts), *(nodes.phys for nodes in tree)]))


def _between(addresses: U64, start: int, end: int) -> int:
    """How many of some addresses, sorted, lie in [start, end)."""
    bounds = np.array([start, min(end, 2**64 - 1)], np.uint64)
    first, last = np.searchsorted(addresses, bounds).tolist()
    return int(last - first)


def _tree_size(facts: Snapshot) -> int:
    """Bytes of a radix tree's nodes; those of xarrays are slab objects, of a size not known."""
    if facts.abi.tracker != Tracker.RADIX:
        return 0
    return rows(facts.outgoing.tree.nodes) * facts.abi.page_size


#: Pages of KHO's own claims that are looked up: a corrupt structure may claim any number.
_LOOKED_UP: Final = 1 << 16


def _pages(claims: Claims, shift: int) -> U64:
    """The addresses of the pages of some claims."""
    found: list[U64] = [np.zeros(0, np.uint64)]
    room = _LOOKED_UP
    for phys, size in zip(claims.phys.tolist(), claims.size.tolist(), strict=True):
        first, last = phys >> shift, -(-(phys + size) >> shift)
        taken = np.arange(first, min(last, first + room, 1 << 64 - shift), dtype=np.uint64)
        found.append(taken << np.uint64(shift))
        room -= len(taken)
    return np.unique(np.concatenate(found))


# -- what decides the sizes -----------------------------------------------------------------------


def scratch_parameters(command_line: str) -> list[str]:
    """Every ``kho_scratch=`` of a command line; what follows " -- " is init's."""
    words, _, _ = f" {command_line} ".partition(" -- ")
    return re.findall(r"(?<=\s)kho_scratch=\S*", f"{words} ")


def scratch_sizes(command_line: str) -> Sizes | int:
    """
    The sizes that a command line asks for, or the scale in per cent
    (``kho_parse_scratch_size()``): words that the kernel does not understand change nothing.
    """
    found: Sizes | int = DEFAULT_SCALE
    for word in scratch_parameters(command_line):
        value = word.removeprefix("kho_scratch=")
        if re.fullmatch(r"\+?\d{1,10}%", value, re.ASCII):
            scale = int(value[:-1])
            # With a scale of 0, the sizes are those that were given before, or none.
            if 0 < scale < 1 << 32:
                found = scale
            continue
        parts = [_memparse(part) for part in value.split(",")]
        if len(parts) == 3 and None not in parts and any(parts):
            found = Sizes(*(part or 0 for part in parts))
    return found


def _memparse(text: str) -> int | None:
    """As the kernel's function of that name, of a whole word."""
    found = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)([kKmMgGtTpPeE]?)", text, re.ASCII)
    if found is None:
        return None
    digits, unit = found.groups()
    if digits[:2] in ("0x", "0X"):
        number = int(digits, 16)
    elif digits[0] == "0":
        if not re.fullmatch(r"[0-7]+", digits):
            return None
        number = int(digits, 8)
    else:
        number = int(digits)
    return (number << (10 * (" KMGTPE".index(unit.upper() or " ")))) % (1 << 64)


def asked_for(facts: Snapshot) -> str:
    """What decided the sizes of the scratch areas, in words."""
    command_line = facts.kernel.command_line
    if facts.handover.is_kho_boot:
        return "handed over by the kernel before, which may have been handed them itself"
    if not command_line:
        return "what decided their sizes is not recorded"
    words, sizes = scratch_parameters(command_line), scratch_sizes(command_line)
    if isinstance(sizes, Sizes):
        return f"{words[-1]} on the command line"
    if sizes == DEFAULT_SCALE and not words:
        return f"{sizes} % of what the boot reserved, as nothing else was asked for"
    return f"{sizes} % of what the boot reserved: {words[-1]} on the command line"


def needs(facts: Snapshot) -> Needs | None:
    """
    What the boot of a kernel like this one reserves, and its image; None: not known.

    The kernel has measured it: its areas are a multiple of it
    (``memblock_reserved_kern_size()``).  If they were given, what the page allocator did not get
    of each zone is what was reserved, with the kernel itself; what was reserved for ``cma=`` it got
    later.  A kernel that was handed over to has also reserved what nobody has restored yet.
    """
    if facts.handover.is_kho_boot:
        return None
    image = facts.image
    size = image.size if image is not None and image.loaded and image.file_mode else None
    sizes = scratch_sizes(facts.kernel.command_line)
    numbers = sorted(node.number for node in facts.nodes or ())
    page = facts.abi.page_size
    measured = bool(facts.kernel.command_line) and len(facts.scratch) == len(numbers) + 2
    if measured and not isinstance(sizes, Sizes):
        by_area = [area * 100 // sizes for area in facts.scratch[:, 1].tolist()]
        nodes = dict(zip(numbers, by_area[2:], strict=True))
        how = f"what the kernel found to be reserved when it sized the areas at {sizes} %"
        return Needs(by_area[0], nodes, size, how)
    if facts.memory is None:
        return None
    reserved: dict[int, int] = {}
    low = 0
    for zone in facts.memory.zones:
        missing = max(zone.present - zone.managed, 0) * page
        reserved[zone.node] = reserved.get(zone.node, 0) + missing
        low += missing if zone.end <= LOW_END else 0
    first = min(reserved, default=0)
    reserved[first] = reserved.get(first, 0) + facts.memory.cma_total * page
    how = "what the page allocator did not get of each zone, and has in CmaTotal"
    return Needs(low, reserved, size, how)


def enough(facts: Snapshot) -> Sizes | None:
    """Sizes that should do for a kernel like this one; None: not known."""
    needed = needs(facts)
    if needed is None or not needed.nodes:
        return None
    per_node = max(needed.nodes.values())
    if len(needed.nodes) == 1:
        # What is not reserved below 4 GiB.
        per_node = max(per_node - needed.low, 0)
    image = 2 * (_IMAGE if needed.image is None else needed.image)
    # SCRATCH_ALIGNMENT_BYTES, a #define.
    grain = max(_GRAIN, facts.abi.page_size << facts.abi.max_page_order)
    low = max(_with_margin(needed.low), _LOWMEM)
    sizes = Sizes(*(_up(size, grain) for size in (low, image, _with_margin(per_node))))
    return sizes if _have_room(facts, sizes) else None


def _have_room(facts: Snapshot, sizes: Sizes) -> bool:
    """Whether there is memory for such areas, and as much for the kernel and others."""
    nodes = facts.nodes or ()
    return (
        2 * sizes.lowmem < below_4_gib(facts.ram)
        and 2 * sizes.total_of(facts) < size_of(facts.ram)
        and all(2 * sizes.per_node <= size_of(within(facts.ram, node)) for node in nodes)
    )


def within(ram: U64, node: Node) -> U64:
    """The parts of ranges of memory that lie in the span of a node."""
    return np.clip(ram, np.uint64(node.start), np.uint64(node.end))


def size_of(ranges: U64) -> int:
    """Bytes of ranges of memory."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def below_4_gib(ram: U64) -> int:
    """Bytes of some ranges of memory that lie below 4 GiB."""
    low = np.minimum(ram, np.uint64(LOW_END))
    return int((low[:, 1] - low[:, 0]).sum())


def _with_margin(size: int) -> int:
    return size * _MARGIN[0] // _MARGIN[1]


def _up(size: int, grain: int) -> int:
    return -(-size // grain) * grain


def unmovable(facts: Snapshot) -> Iterator[tuple[Area, dict[str, int]]]:
    """
    The areas with memory that cannot be moved away: pages by use.

    What the boot of a kernel reserved in scratch is no surprise if it was handed over to: it had
    nothing else to boot in.
    """
    for area in areas(facts):
        if area.use is None:
            continue
        found = {use: count for use, count in area.use.pages.items() if not is_movable(use)}
        if facts.handover.is_kho_boot:
            found.pop(PageUse.RESERVED, None)
        if area.use.pinned:
            found["pinned"] = area.use.pinned
        if found:
            yield area, found
