# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What holds for the facts of any snapshot: if they say a thing twice, they say the same.

Facts that contradict each other were forged, damaged, or read wrongly.  Whichever it was, no check
may pass on the strength of them.  khoscope looks for contradictions when it opens a file and when
it judges facts, read live or not, and says which facts contradict each other.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..abi import serialized
from ..abi.fdt import MAGIC
from ..abi.keys import BAD_ORDER, NO_TYPE, Abi, Finalize, Tracker
from ..abi.kho_fdt import kho_test_folios, parse_luo_fdt, reserve_mem_areas, root_fdt
from .clients import Luo, LuoFile, LuoSession, Memfd, Owner, OwnerKind, Vmalloc, file_owner
from .columns import Blocks, Pages
from .owners import claimed
from .snapshot import KexecImage, Memory, Node, Side, Snapshot, in_ram
from .tree import KeySet

#: How ``--type-shift`` shows in ``Abi.decided``.
OVERRIDDEN: Final = "--type-shift"


def contradictions(facts: Snapshot) -> Iterator[str]:
    """Single facts that contradict each other, in words, but for those of :func:`of_scan`."""
    yield from _abi(facts.abi)
    yield from _kernel(facts)
    yield from _memory(facts)
    if facts.nodes is not None:
        yield from _nodes(facts.nodes)
    for which, image in (("kexec", facts.image), ("crash", facts.crash_image)):
        if image is not None:
            yield from _image(which, image, facts.outgoing.fdt.phys)
    for which, side in (("outgoing", facts.outgoing), ("incoming", facts.incoming)):
        if side is not None:
            yield from (f"{which} {said}" for said in _side(side, side is facts.outgoing))


def _abi(abi: Abi) -> Iterator[str]:
    usual = Abi.for_page_shift(abi.page_shift)
    for name in ("order_0_log2", "table_size_log2", "bitmap_size_log2", "tree_max_depth"):
        says, fits = getattr(abi, name), getattr(usual, name)
        # Early kernels with the tree have no level for the order bit: order-not-stored reports it.
        short = name == "tree_max_depth" and says == fits - 1 and not abi.order_is_stored
        if says != fits and not short:
            yield f"ABI: {name} is {says}, pages of {abi.page_size} bytes make it {fits}"
    stamp, said = abi.stamp, abi.decided.get("KHO_KEY_TYPE_SHIFT")
    if (abi.type_shift is None) != (stamp.type_shift is None) and said != OVERRIDDEN:
        yield f"ABI: keys have their type at bit {abi.type_shift}, stamps at {stamp.type_shift}"
    typed = 0 if stamp.type_shift is None else 1
    fits_below = stamp.magic_shift is None or stamp.order_bits + typed <= stamp.magic_shift
    if not fits_below or stamp.type_shift not in (None, stamp.order_bits):
        yield f"ABI: a stamp's order, type and magic overlap ({stamp})"


def _kernel(facts: Snapshot) -> Iterator[str]:
    kernel, came = facts.kernel, facts.handover
    if not kernel.release or not kernel.page_flags or not kernel.page_types:
        yield "the kernel has no release, or no names for page flags and types"
    if came.is_kho_boot != (facts.incoming is not None):
        yield f"a KHO boot: {came.is_kho_boot}, but there is {_there(facts.incoming)} incoming side"
    if not came.is_kho_boot and (came.previous_release or came.kexec_count):
        yield "not a KHO boot, but there is a kernel that handed over, or a count of kexecs"
    if facts.incoming is not None:
        yield from _metadata(facts, facts.incoming)
    said = {facts.abi.compatible, facts.outgoing.fdt.compatible}
    # Such a kernel has no root FDT while it is not finalized; who watches it has probed it once.
    if facts.abi.finalize == Finalize.BEFORE_LOAD:
        said.discard(None)
    if len(said) > 1:
        yield (
            f"the ABI's compatible is {facts.abi.compatible!r}, the root FDT's "
            f"{facts.outgoing.fdt.compatible!r}"
        )
    if facts.liveupdate is None and facts.outgoing.luo is not None:
        yield "LUO hands something over, and the kernel has no LUO"


def _there(what: object) -> str:
    return "no" if what is None else "an"


def _metadata(facts: Snapshot, side: Side) -> Iterator[str]:
    """``struct kho_kexec_metadata``, against what the kernel has taken from it."""
    layout = serialized.KHO_KEXEC_METADATA
    raw = side.blobs.get(f"subtree {serialized.KEXEC_METADATA}", b"")
    if len(raw) < layout.itemsize:
        return
    found = serialized.unpack(layout, raw)
    if int(found["version"]) != serialized.KEXEC_METADATA_VERSION:
        return
    release, count = serialized.text(bytes(found["previous_release"])), int(found["kexec_count"])
    came = facts.handover
    if (came.previous_release, came.kexec_count) != (release, count):
        yield (
            f"handed over by {came.previous_release!r}, kexec {came.kexec_count}: "
            f"{serialized.KEXEC_METADATA} says {release!r}, {count}"
        )


def _memory(facts: Snapshot) -> Iterator[str]:
    ram, shift = facts.ram, facts.abi.page_shift
    if not len(ram) or (ram[:, 0] >= ram[:, 1]).any() or (ram[1:, 0] < ram[:-1, 1]).any():
        yield "RAM: its ranges are none, empty, or not in order"
        return
    off = np.zeros((0, 2), np.uint64) if facts.offline is None else facts.offline
    if (off[:, 0] >= off[:, 1]).any() or (off[1:, 0] <= off[:-1, 1]).any():
        yield "offline memory: its ranges are empty, or not in order"
    elif not all(in_ram(ram, first, end - first) for first, end in off.tolist()):
        yield "offline memory: not all of it is RAM"
    areas, free = facts.scratch.tolist(), facts.scratch_free
    if any(size and not in_ram(ram, phys, size) for phys, size in areas):
        yield "scratch: an area is not in RAM"
    if free and len(free) != len(areas):
        yield f"scratch: {len(areas)} areas, and of {len(free)} how much is free"
    elif any(
        n is not None and n > size >> shift for n, (_, size) in zip(free, areas, strict=False)
    ):
        yield "scratch: more pages of an area are free than it has"
    yield from _scratch_use(facts)
    if facts.memory is not None:
        yield from _zones(facts.memory, shift)


def of_scan(facts: Snapshot) -> Iterator[str]:
    """The same of the search for stamps, as soon as all stamps were iterated."""
    if facts.scan is not None:
        looked, pages = facts.scan.scanned + facts.scan.unread, ram_pages(facts)
        if looked != pages:
            yield f"the search for stamps looked at {looked:,} struct pages, RAM has {pages:,}"


def _scratch_use(facts: Snapshot) -> Iterator[str]:
    """Every page of an area is free, is used for something, or could not be read."""
    areas, uses, shift = facts.scratch.tolist(), facts.scratch_use, facts.abi.page_shift
    if uses and not len(uses) == len(areas) == len(facts.scratch_free):
        yield f"scratch: {len(areas)} areas, and of {len(uses)} what they are used for"
        return
    for (phys, size), use, free in zip(areas, uses, facts.scratch_free, strict=False):
        counts = [*use.pages.values(), *(use.blocks or {}).values(), use.pinned, use.held]
        total = sum(use.pages.values()) + use.unread + (free or 0)
        if min(*counts, use.unread, 0) < 0 or use.pinned + use.held > size >> shift:
            yield f"scratch: no area has so many pages of a kind as that at {phys:#x}"
        elif (free is None) != (use.unread > 0):
            yield f"scratch: how much is free at {phys:#x} is not known, or all of it was read"
        elif free is not None and total != size >> shift and in_ram(facts.ram, phys, size):
            yield f"scratch: {total:,} pages at {phys:#x} are counted, and {size >> shift:,} there"


def _zones(memory: Memory, shift: int) -> Iterator[str]:
    """What holds of counters, however late their processors add to them."""
    for zone in memory.zones:
        counts = (zone.managed, zone.cma, zone.free, zone.free_cma, zone.kept_back, zone.low)
        if min(*counts, zone.pcp, zone.file, memory.cma_total, memory.reclaimable) < 0:
            yield f"zone {zone.name} of node {zone.node}: there are less than no pages"
        elif not zone.managed <= zone.present <= zone.end - zone.start >> shift:
            yield f"zone {zone.name} of node {zone.node}: more pages than there is room for"


def _nodes(nodes: list[Node]) -> Iterator[str]:
    numbers, starts = [n.number for n in nodes], [n.start for n in nodes]
    if not nodes or len({*numbers}) < len(nodes) or sorted(starts) != starts:
        yield "NUMA nodes: there are none, two of one number, or they are not in order"
    if any(node.start >= node.end for node in nodes):
        yield "NUMA nodes: one without memory"


def ram_pages(facts: Snapshot) -> int:
    """Whole pages of RAM: those whose struct page belongs to the page allocator."""
    shift = facts.abi.page_shift
    return sum(max((end >> shift) - -(-first >> shift), 0) for first, end in facts.ram.tolist())


def _image(which: str, image: KexecImage, fdt: int) -> Iterator[str]:
    if image.kho_fdt and fdt and image.kho_fdt != fdt:
        yield f"the {which} image is handed the FDT at {image.kho_fdt:#x}, KHO's is at {fdt:#x}"
    if image.loaded != (image.size > 0) or (not image.loaded and image.kho_fdt):
        yield f"a {which} image is loaded: {image.loaded}, of {image.size:,} bytes"


def _side(side: Side, outgoing: bool) -> Iterator[str]:
    state, fdt = side.tree.state, side.fdt
    if len(state.problems) > state.problem_count or (state.problem_count and not state.problems):
        yield f"tree: {state.problem_count} bad entries, {len(state.problems)} are listed"
    if not fdt.phys and not outgoing:
        yield "root FDT: it was handed over, and is nowhere"
    if fdt.phys and fdt != root_fdt(fdt.phys, side.blobs):
        yield "root FDT: its bytes say something else than what was recorded of it"
    yield from _blobs(side)
    if side.luo is not None:
        yield from (f"LUO: {said}" for said in _luo(side, side.luo, outgoing))


def _blobs(side: Side) -> Iterator[str]:
    known = {f"subtree {s.name}": s.size for s in side.fdt.subtrees}
    for name, blob in side.blobs.items():
        if name == "fdt":
            continue
        size = known.get(name)
        if size is None or len(blob) > size:
            yield f"{name}: {len(blob):,} bytes were kept, the root FDT has {size or 0:,}"


def _luo(side: Side, luo: Luo, outgoing: bool) -> Iterator[str]:
    named = {s.name: s.phys for s in side.fdt.subtrees}
    if named.get(serialized.LUO) != luo.phys:
        yield f"its blob is at {luo.phys:#x}, the root FDT does not have it there"
    raw = side.blobs.get(f"subtree {serialized.LUO}", b"")
    says = _luo_says(raw) if outgoing and luo.raw is None and not luo.problems else None
    if says not in (None, (luo.compatible, luo.liveupdate_num)):
        yield f"{luo.compatible}, live update {luo.liveupdate_num}: its bytes say {says}"
    if luo.raw is not None and (luo.sessions or luo.flbs):
        yield "sessions of an ABI that is not known"
    names = Counter(session.name for session in luo.sessions)
    if names and max(names.values()) > 1:
        yield "two sessions of one name"
    for session in luo.sessions:
        yield from (f"session {session.name!r}: {said}" for said in _session(session))


def _luo_says(raw: bytes) -> tuple[str | None, int | None] | None:
    """Compatible and number of LUO's blob; None: there is too little of it."""
    if raw.startswith(MAGIC):
        fdt = parse_luo_fdt(raw)
        return fdt.compatible, fdt.liveupdate_num
    if len(raw) < serialized.LUO_SER.itemsize:
        return None
    ser = serialized.unpack(serialized.LUO_SER, raw)
    return serialized.text(bytes(ser["compatible"])), int(ser["liveupdate_num"])


def _session(session: LuoSession) -> Iterator[str]:
    if session.count != len(session.files) and not (session.problems or session.left_out):
        yield f"counts {session.count} files, {len(session.files)} are listed"
    if len({file.token for file in session.files}) < len(session.files):
        yield "two files with one token"
    for file in session.files:
        yield from (f"token {file.token:#x}: {said}" for said in _file(file))


def _file(file: LuoFile) -> Iterator[str]:
    known = file.handler in serialized.MEMFDS and not file.retrieve_status
    if file.memfd is None:
        if known and not file.problems:
            yield "a memfd of which nothing was recorded"
        return
    if not known:
        yield f"a memfd under the handler {file.handler!r}"
    if file.memfd.phys != file.data:
        yield f"its memfd_luo_ser is at {file.memfd.phys:#x}, its data at {file.data:#x}"
    yield from _memfd(file.memfd)


def _memfd(memfd: Memfd) -> Iterator[str]:
    if (memfd.folios is None) != (memfd.nr_folios == 0):
        yield f"{memfd.nr_folios} folios, and {_there(memfd.folios)} list of them"
    if memfd.size and not memfd.nr_folios and not memfd.problems:
        yield f"{memfd.size:,} bytes and no folio"


def of_claims(facts: Snapshot) -> Iterator[str]:
    """Contradictions between what clients' structures say and what they lead to, in words."""
    for which, side in (("outgoing", facts.outgoing), ("incoming", facts.incoming)):
        if side is not None:
            said = _claims(facts, side, side is facts.outgoing)
            yield from (f"{which} {what}" for what in said)


def _claims(facts: Snapshot, side: Side, outgoing: bool) -> Iterator[str]:
    size = facts.abi.page_size
    named: Counter[tuple[OwnerKind, str]] = Counter()
    data: Counter[tuple[str | None, int | None]] = Counter()
    for owner, has in claimed(side):
        named[owner.kind, owner.name] += has
        if owner.kind == OwnerKind.MEMFD:
            data[owner.session, owner.token] += has
        if not has:
            yield f"{owner} owns nothing"
    # If there is no owner at all, khoscope has not looked for owners.
    for owner in _expected(facts, side) if side.owners else ():
        if not named[owner.kind, owner.name]:
            yield f"nothing is recorded of the memory of {owner}"
    for area in side.vmallocs:
        yield from (f"{area.name}: {said}" for said in _vmalloc(area, size, named))
    listed = {(area.name, area.phys) for area in side.vmallocs}
    for session, file, memfd in _memfds(side):
        name = f"{session}, {file}"
        if memfd.folios and (memfd.folios.name, memfd.folios.phys) not in listed:
            yield f"{name}: its list of folios is no vmalloc area"
        has = data[session.name, file.token]
        if has != memfd.pages * size:
            yield f"{name}: {memfd.pages:,} pages, and {has:,} bytes are recorded"
    folios = kho_test_folios(side.blobs) if outgoing else None
    if folios and int(folios[0]["first"]) not in [area.first for area in side.vmallocs]:
        yield "kho_test: its list of folios is no vmalloc area"


def _expected(facts: Snapshot, side: Side) -> Iterator[Owner]:
    """Owners that must exist, because something leads to their memory."""
    if side.fdt.phys:
        yield Owner(OwnerKind.FDT, "root FDT")
    for subtree in side.fdt.subtrees:
        if subtree.phys and subtree.size and in_ram(facts.ram, subtree.phys, subtree.size):
            yield Owner(OwnerKind.SUBTREE, f"subtree {subtree.name}")
    for name, _, _ in reserve_mem_areas(side.blobs):
        yield Owner(OwnerKind.RESERVE_MEM, f"reserve_mem {name}")
    for session, file, _ in _memfds(side):
        whose = file_owner(session.name, file.token, file.stored)
        yield replace(whose, name=f"{whose.name}: memfd_luo_ser")


def _memfds(side: Side) -> Iterator[tuple[LuoSession, LuoFile, Memfd]]:
    for session in side.luo.sessions if side.luo else ():
        for file in session.files:
            if file.memfd is not None:
                yield session, file, file.memfd


def _vmalloc(area: Vmalloc, size: int, sums: Counter[tuple[OwnerKind, str]]) -> Iterator[str]:
    if area.problems:
        return
    if area.listed != area.total_pages or (area.total_pages and not area.chunks):
        yield f"{area.total_pages} pages, {area.listed} in {area.chunks} chunks"
    for kind, pages in (
        (OwnerKind.VMALLOC_CHUNK, area.chunks),
        (OwnerKind.VMALLOC_PAGE, area.listed),
    ):
        if sums[kind, area.name] != pages * size:
            yield f"{pages:,} {kind}s, they have {sums[kind, area.name]:,} bytes"


# -- columns --------------------------------------------------------------------------------------

Rows = Callable[[Abi, Blocks], NDArray[np.bool_]]


def _other_key(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    phys, order, types = abi.kho_radix_decode_keys(blocks.key)
    return (phys != blocks.phys) | (order != blocks.order) | (types != blocks.type)


def _other_stamp(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    private = blocks.facts.private
    types = abi.stamp.type(private) if abi.has_types else np.full(len(blocks), NO_TYPE, np.int8)
    order = abi.stamp.order(private)
    nonsense = blocks.order == BAD_ORDER
    other = ~nonsense & (order != blocks.order) | (types != blocks.type)
    return ~abi.stamp.is_stamp(private) | other | (blocks.key != 0)


def _not_all_pages(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    pages = blocks.facts
    seen = (pages.tails + pages.unread).view(np.uint64)
    count = blocks.page_count
    # The sum leaves out the head, unless the head is unread, too.  The count of unread pages beyond
    # all memory is capped.
    head_unread = (pages.unread > 0) & (seen == count)
    endless = pages.unread >= np.uint32(1 << 31)
    whole = (seen + np.uint64(1) == count) | head_unread | endless
    if not whole.all():
        whole |= blocks.shared > 0
    return (blocks.order != BAD_ORDER) & ~whole | (blocks.order == BAD_ORDER) & (seen > 0)


def _more_than_all(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    pages, count = blocks.facts, blocks.page_count
    # A compound page may have any order: its folio was resized, or memory holds anything.
    compound = pages.compound < Pages.COMPOUND_TAIL
    compound |= (pages.pristine > count) & (pages.pristine != Pages.UNRECORDED)
    return compound | (pages.free > count) | ((pages.odd > 0) & (pages.odd >= count))


def _other_odd(abi: Abi, blocks: Blocks) -> NDArray[np.bool_]:
    pages = blocks.facts
    tails = pages.tails
    alike = (pages.zeros == tails) | (pages.ones == tails)
    mixed = ~alike & (pages.others != tails)
    wrong = np.where(pages.odd > 0, alike | (pages.odd < 2), mixed)
    return wrong & (pages.unread == 0)


def _by_look(find: Rows) -> Rows:
    """The same, of what has nothing to do with keys and addresses."""
    return lambda abi, blocks: blocks.by_look(functools.partial(find, abi))


_PAGES: Final[dict[str, Rows]] = {
    "have other pages than their order says": _by_look(_not_all_pages),
    "have more free or odd pages than pages": _by_look(_more_than_all),
    "have a first odd page, and no odd pages, or the other way round": _by_look(_other_odd),
}
_KEYS: Final[dict[str, Rows]] = {"are not what their keys say": _other_key, **_PAGES}
_STAMPS: Final[dict[str, Rows]] = {"are not what their stamps say": _other_stamp, **_PAGES}


def of_blocks(abi: Abi, blocks: Blocks) -> Counter[str]:
    """How many blocks of a tree have facts that contradict each other, by the contradiction."""
    return _counted(_KEYS, abi, blocks)


def of_stamps(abi: Abi, stamps: Blocks) -> Counter[str]:
    """The same for stamped blocks."""
    return _counted(_STAMPS, abi, stamps)


def _counted(what: dict[str, Rows], abi: Abi, blocks: Blocks) -> Counter[str]:
    found = {said: int(wrong(abi, blocks).sum()) for said, wrong in what.items()}
    return Counter({said: count for said, count in found.items() if count})


def of_tree(facts: Snapshot, side: Side, keys: KeySet) -> Iterator[str]:
    """
    Contradictions between the nodes of a tree and the leaves, and among the nodes.

    :param keys: of the side's leaves.
    """
    if facts.abi.tracker == Tracker.RADIX:
        yield from _of_radix_tree(facts, side)
    state = side.tree.state
    held = np.zeros(len(keys.leaves), np.int64)
    other = used = 0
    for chunk in side.tree.nodes:
        leaves = chunk[(chunk.level == 0) & (chunk.used > 0)]
        # A leaf may have several bitmaps in memory.
        row = keys.leaf(leaves.key)
        np.add.at(held, row[row >= 0], leaves.used[row >= 0])
        other += int((row < 0).sum())
        used += int(leaves.used.sum())
    # Blocks that moved are in the nodes but not in the leaves, or the other way round.
    if not state.moved and (other or (held != keys.counts).any()):
        total = int(keys.counts.sum())
        yield f"the leaves hold {total:,} blocks, the nodes say {used:,}"


def _of_radix_tree(facts: Snapshot, side: Side) -> Iterator[str]:
    """What holds for the tables of a radix tree, and its root."""
    state, depth = side.tree.state, facts.abi.tree_max_depth
    nodes, used = np.zeros(depth, np.int64), np.zeros(depth, np.int64)
    first = True
    for chunk in side.tree.nodes:
        if (chunk.level >= depth).any():
            yield f"nodes above level {depth - 1}"
            return
        if first and (int(chunk.phys[0]), int(chunk.level[0])) != (state.root, depth - 1):
            yield f"the root is at {state.root:#x}, the first node at {int(chunk.phys[0]):#x}"
        first = False
        np.add.at(nodes, chunk.level, 1)
        np.add.at(used, chunk.level, chunk.used)
    if state.root and first:
        yield f"the root is at {state.root:#x}, and there is no node"
    if not state.problem_count and not state.moved and (used[1:] != nodes[:-1]).any():
        yield "tables have more or fewer entries than there are nodes below them"


def of_evidence(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """Leaves of the earlier tree that the later snapshot did not read again."""
    size, inside = before.abi.bitmap_bytes, np.uint64(before.abi.leaf_bits - 1)
    wanted: set[int] = set()
    for nodes in before.outgoing.tree.nodes:
        leaves = nodes[(nodes.level == 0) & (nodes.used > 0)]
        wanted |= {
            key
            for phys, key in zip(leaves.phys.tolist(), (leaves.key & ~inside).tolist(), strict=True)
            if in_ram(after.ram, phys, size) and phys % size == 0
        }
    found = sum(map(len, after.evidence))
    if found < len(wanted):
        yield f"of {len(wanted):,} leaves of the earlier tree {found:,} were read again"
