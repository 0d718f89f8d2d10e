# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Synthetic memory: trees as a kernel would build them, and as no kernel would.

Real kernels are what khoscope is shown on (tests/vm).  This is for what no kernel would do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import libfdt
import numpy as np

from khoscope.abi.keys import (
    BAD_ORDER,
    NO_TYPE,
    U64,
    Abi,
    Finalize,
    Restore,
    Stamp,
    Tracker,
)
from khoscope.abi.kho_fdt import Fdt, Subtree, parse_root_fdt
from khoscope.facts.calls import (
    BIT_UNKNOWN,
    FUNCTIONS,
    NO_ORDER,
    NO_PHYS,
    NUMBERS,
    Action,
    Batch,
    Calls,
    Touches,
)
from khoscope.facts.clients import Claims, Owner
from khoscope.facts.columns import Blocks, Leaves, Nodes, Pages
from khoscope.facts.snapshot import (
    Handover,
    Kernel,
    KexecImage,
    Node,
    Provenance,
    Scan,
    Side,
    Snapshot,
    Watched,
)
from khoscope.facts.store import Draft
from khoscope.facts.tree import Tree, TreeState
from khoscope.sources.walk import walk

PLAIN = Abi.for_page_shift(12, compatible="kho-v4")
#: Bitmaps of a page below xarrays, as in linux 6.18.
XARRAYS = Abi.for_page_shift(
    12,
    compatible="kho-v1",
    tracker=Tracker.XARRAY,
    preserve_bits=1 << 15,
    finalize=Finalize.BEFORE_LOAD,
    restores_pages_as=Restore.SPLIT_FOLIO,
)
POSTED = Abi.for_page_shift(12, type_shift=63, stamp=Stamp(31, 31), compatible="kho-v4")
#: The same on a tree of bare keys.
REFUSED = replace(POSTED, key_width=53)
#: Where the root node of hand-made trees is.
ROOT = 0x1000
#: ``enum pagetype``, likewise.
PAGE_TYPES = {0xF0: "buddy", 0xF5: "slab"}
#: Names of page->flags bits, as far as they matter.
PAGE_FLAGS = ["locked", "referenced", "uptodate", "dirty", "lru"]
FIXED = Abi.for_page_shift(12, type_shift=53, stamp=Stamp(31, 31), compatible="kho-v5")


@dataclass
class Memory:
    """
    Physical memory with a radix tree in it, built page by page as ``kho_radix_add_page`` does.

    Nodes are allocated from ``nodes_at`` upwards.
    """

    abi: Abi
    size: int = 1 << 32
    nodes_at: int = 1 << 28
    pages: dict[int, bytearray] = field(default_factory=dict)
    #: Pages that cannot be read.
    unreadable: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._next = self.nodes_at
        self.root = self.new_node()
        self.reads = 0

    @property
    def ram(self) -> U64:
        return np.array([[0, self.size]], np.uint64)

    def new_node(self) -> int:
        at = self._next
        self._next += self.abi.page_size
        self.pages[at] = bytearray(self.abi.page_size)
        return at

    def entry(self, table: int, index: int) -> int:
        return int.from_bytes(self.pages[table][8 * index : 8 * index + 8], "little")

    def set_entry(self, table: int, index: int, value: int) -> None:
        self.pages[table][8 * index : 8 * index + 8] = value.to_bytes(8, "little")

    def leaf_of(self, key: int) -> int:
        """The leaf that holds a key, made if it is not there."""
        abi = self.abi
        node = self.root
        for level in range(abi.tree_max_depth - 1, 0, -1):
            index = key >> abi.table_shift(level) & (abi.table_entries - 1)
            below = self.entry(node, index)
            if not below:
                below = self.new_node()
                self.set_entry(node, index, below)
            node = below
        return node

    def add_key(self, key: int) -> None:
        bit = key & (self.abi.leaf_bits - 1)
        self.pages[self.leaf_of(key)][bit >> 3] |= 1 << (bit & 7)

    def del_key(self, key: int) -> None:
        bit = key & (self.abi.leaf_bits - 1)
        self.pages[self.leaf_of(key)][bit >> 3] &= ~(1 << (bit & 7))

    def add_page(self, phys: int, order: int, page_type: int = 0) -> None:
        self.add_key(self.abi.kho_radix_encode_key(phys, order, page_type))

    def read(self, address: int, size: int) -> bytes | None:
        """As a source reads it: None where there is no memory."""
        self.reads += 1
        if address + size > self.size:
            return None
        page = self.abi.page_size
        asked = range(address, address + size, page)
        if not self.unreadable.isdisjoint(asked):
            return None
        return b"".join(bytes(self.pages.get(at, bytes(page))) for at in asked)

    def walk(self) -> Tree:
        return walk(self.abi, self.root, self.ram, self.read)


def blocks_of(abi: Abi, tree: Tree) -> set[tuple[int, int, int]]:
    """All blocks of a tree as (phys, order, type), for comparing with a model."""
    return {
        block
        for chunk in tree.blocks(abi)
        for block in zip(
            chunk.phys.tolist(), chunk.order.tolist(), chunk.type.tolist(), strict=True
        )
    }


@dataclass(frozen=True)
class Block:
    """A block and what its struct pages say, for snapshots that are built by hand."""

    phys: int
    order: int = 0
    type: int = 0
    head: int = 1
    ones: int = 0
    others: int = 0
    odd: int = 0
    free: int = 0
    private: int = 0
    flags: int = 0
    compound: int = Pages.NOT_COMPOUND
    page_type: int = 0xFFFFFFFF
    unread: int = 0
    pristine: int = 0
    key: int | None = None
    #: Tails that are in no count, since they have no struct pages of their own.
    shared: int = 0

    @classmethod
    def split(cls, phys: int, order: int, **more: int) -> Block:
        return cls(phys, order, ones=(1 << order) - 1, **more)


def columns(abi: Abi, blocks: Iterable[Block]) -> Blocks:
    """Blocks as columns, sorted by key."""
    rows = []
    for b in blocks:
        key = abi.kho_radix_encode_key(b.phys, b.order, b.type) if b.key is None else b.key
        rows.append((key, b))
    rows.sort(key=lambda row: row[0])
    keys = np.array([key for key, _ in rows], np.uint64)
    return Blocks(keys, *abi.kho_radix_decode_keys(keys), page_facts(b for _, b in rows))


def page_facts(blocks: Iterable[Block]) -> Pages:
    """What the struct pages of blocks say: those that are not said to be otherwise are at 0."""
    listed = list(blocks)
    facts = Pages.blank(len(listed))
    for i, b in enumerate(listed):
        for name in Pages.DTYPES.keys() - {"zeros"}:
            getattr(facts, name)[i] = getattr(b, name)
        if b.order != BAD_ORDER:
            counted = b.ones + b.others + b.unread + b.shared
            facts.zeros[i] = max((1 << b.order) - 1 - counted, 0)
        tails = facts.zeros[i] + facts.ones[i] + facts.others[i]
        if not facts.odd[i] and tails not in (facts.zeros[i], facts.ones[i], facts.others[i]):
            facts.odd[i] = 2
    return facts


def tree_of(abi: Abi, blocks: Blocks) -> Tree:
    """The tree that holds the keys of some blocks, its nodes side by side."""
    base = blocks.key & ~np.uint64(abi.leaf_bits - 1)
    leaves = []
    for key in np.unique(base):
        bits = np.zeros(abi.leaf_bits, np.uint8)
        bits[(blocks.key[base == key] & np.uint64(abi.leaf_bits - 1)).astype(np.int64)] = 1
        bitmap = np.packbits(bits, bitorder="little").reshape(1, -1)
        leaves.append(Leaves(np.array([key], np.uint64), bitmap))
    every = Leaves.concatenate(leaves) if leaves else None
    return Tree(TreeState(ROOT), nodes_of(abi, every), [every] if every else [])


def nodes_of(abi: Abi, leaves: Leaves | None) -> list[Nodes]:
    """The nodes above some leaves, the root at :data:`ROOT`, and the leaves themselves."""
    keys = np.zeros(0, np.uint64) if leaves is None else leaves.key
    used = np.zeros(0, np.int64) if leaves is None else leaves.counts()
    levels = []
    for level in range(abi.tree_max_depth):
        levels.append((level, keys, used))
        above = ~np.uint64((1 << min(abi.table_shift(level + 1) + abi.table_size_log2, 63)) - 1)
        keys, used = np.unique(keys & above, return_counts=True)
    found = []
    at = ROOT
    for level, keys, used in reversed(levels):
        if level == abi.tree_max_depth - 1 and not len(keys):
            keys, used = np.zeros(1, np.uint64), np.zeros(1, np.int64)
        phys = at + np.arange(len(keys), dtype=np.uint64) * np.uint64(abi.page_size)
        at += len(keys) * abi.page_size
        levels_of = np.full(len(keys), level, np.uint8)
        if len(keys):
            found.append(Nodes(levels_of, phys, keys, used.astype(np.uint32)))
    return found


def fdt_blob(fdt: Fdt) -> bytes:
    """A root FDT that says so, without what is None."""
    made = libfdt.FdtSw(1 << 16)
    made.finish_reservemap()

    def u64(name: str, value: int | None) -> None:
        if value is not None:
            made.property(name, value.to_bytes(8, "little"))

    with made.add_node(""):
        if fdt.compatible is not None:
            made.property_string("compatible", fdt.compatible)
        u64("preserved-memory-map", fdt.memory_map)
        for subtree in fdt.subtrees:
            with made.add_node(subtree.name):
                u64("preserved-data", subtree.phys)
                u64("blob-size", subtree.size)
    return bytes(made.as_fdt().as_bytearray()).ljust(PLAIN.page_size, b"\0")


def claims_of(*memory: tuple[Owner, int, int]) -> tuple[list[Owner], list[Claims]]:
    """Owners, and what they own: address and bytes."""
    every = sorted(enumerate(memory), key=lambda row: row[1][1])
    columns = [[phys for _, (_, phys, _) in every], [size for _, (_, _, size) in every]]
    phys, size = (np.array(column, np.uint64) for column in columns)
    index = np.array([i for i, _ in every], np.uint32)
    return [owner for owner, _, _ in memory], [Claims(phys, size, index)]


def side_of(tree: Tree, fdt: Fdt, blocks: Iterable[Blocks] = ()) -> Side:
    """A side that hands over what its tree and root FDT say; nobody has looked for owners."""
    return Side(fdt, tree, {"fdt": fdt_blob(fdt)} if fdt.phys else {}, blocks)


def snapshot(
    abi: Abi,
    blocks: Iterable[Block],
    *,
    boot_id: str = "00000000-0000-0000-0000-000000000001",
    release: str = "7.2.0-test",
    handover: Handover | None = None,
    incoming: Iterable[Block] | None = None,
    stamps: Iterable[Block] = (),
    watched: tuple[Snapshot, Iterable[Block]] | None = None,
    evidence: Iterable[Block] | None = None,
    scratch: Iterable[tuple[int, int]] | None = None,
    log: Iterable[str] = (),
    tainted: int = 0,
    fdt: Fdt | None = None,
    state: TreeState | None = None,
    ram: Iterable[tuple[int, int]] = ((0, 1 << 32),),
    offline: Iterable[tuple[int, int]] = (),
    borders: Iterable[int] = (),
) -> Snapshot:
    """
    A snapshot built by hand.

    :param watched: the earlier snapshot and what became of its blocks.
    :param evidence: the blocks of the earlier tree's leaves as they are now; None: all of them.
    :param borders: where a NUMA node ends and the next one begins.
    """
    out = columns(abi, blocks)
    tree = tree_of(abi, out)
    if state is not None:
        tree = Tree(state, tree.nodes if state.root else [], tree.leaves)
    found = Fdt(0x2000, abi.compatible, tree.state.root) if fdt is None else fdt
    came = handover or Handover(False, "", 0)
    areas = np.array(list(ram), np.uint64).reshape(-1, 2)
    end = int(areas[-1, 1]) if len(areas) else 0
    # Where nothing else is.
    kept = list(scratch or ())
    if scratch is None and end > abi.page_size:
        kept = [(end - abi.page_size, abi.page_size)]
    incoming_side = None
    if came.is_kho_boot:
        handed = tree_of(abi, columns(abi, incoming or ()))
        incoming_side = side_of(handed, Fdt(0x2000, abi.compatible, handed.state.root))
    left = tree_of(abi, columns(abi, evidence or ())).leaves
    if evidence is None and watched:
        left = watched[0].outgoing.tree.leaves
    stamped = sorted(stamps, key=lambda b: b.phys)
    # What is known by its stamp has no key.
    stamp_chunks = [replace(columns(abi, [b]), key=np.zeros(1, np.uint64)) for b in stamped]
    return Snapshot(
        Provenance("test", f"2026-01-01T00:00:0{boot_id[-1]}Z", "by hand"),
        Kernel(release, "#1", boot_id, tainted, list(log), PAGE_FLAGS, PAGE_TYPES),
        abi,
        True,
        came,
        areas,
        np.array(kept, np.uint64).reshape(-1, 2),
        side_of(tree, found, [out] if len(out) else []),
        incoming_side,
        Scan(sum(int(last - first) for first, last in areas) >> abi.page_shift, 0),
        stamp_chunks,
        Watched(watched[0].taken.time, watched[0].kernel.boot_id) if watched else None,
        list(filter(len, [columns(watched[0].abi, watched[1])])) if watched else [],
        left,
        image=KexecImage(True, True, found.phys, 1 << 20),
        offline=np.array(list(offline), np.uint64).reshape(-1, 2),
        nodes=numa_nodes(areas, borders),
    )


def numa_nodes(ram: U64, borders: Iterable[int]) -> list[Node]:
    """NUMA nodes that have all of RAM, and meet at the borders."""
    if not len(ram):
        return []
    edges = [int(ram[0, 0]), *borders, int(ram[-1, 1])]
    return [Node(i, *span) for i, span in enumerate(itertools.pairwise(edges))]


def some_blocks() -> list[Block]:
    blocks = [Block(n << 20, n % 3, n % 2) for n in range(1, 40)]
    return [*blocks, Block.split(1 << 30, 9, type=1), Block(1 << 31, 4, others=3, odd=7, unread=2)]


def rich_before(abi: Abi = FIXED) -> Snapshot:
    """The snapshot that :func:`rich` was taken with an eye on."""
    return snapshot(abi, some_blocks()[:20], handover=Handover(True, "7.2.0-test", 2))


def spooled(facts: Snapshot) -> Snapshot:
    """The same facts, kept as a source keeps them."""
    with Draft() as draft:
        draft.put(facts)
        return draft.finish(facts)


def rich(abi: Abi = FIXED) -> Snapshot:
    """A snapshot with something of everything: both trees, problems, stamps, another's blocks."""
    memory = Memory(abi)
    blocks = some_blocks()
    for block in blocks:
        memory.add_page(block.phys, block.order, block.type)
    memory.set_entry(memory.root, 511, 12)
    out = columns(abi, blocks)
    tree = memory.walk()
    facts = snapshot(
        abi,
        blocks,
        boot_id="00000000-0000-0000-0000-000000000002",
        handover=Handover(True, "7.2.0-test", 3),
        incoming=blocks[5:30],
        stamps=[replace(b, private=abi.stamp.encode(b.order)) for b in blocks[:3]],
        watched=(rich_before(abi), blocks[:20]),
        evidence=blocks[:20],
        scratch=[(1 << 29, 1 << 24), (3 << 30, 1 << 24)],
        log=["BUG: Bad page state in process init  pfn:00001"],
        tainted=1 << 5,
    )
    subtrees = [Subtree("LUO", 0x5000, 4096), Subtree("memblock", None, 7)]
    raw = fdt_blob(Fdt(0x2000, abi.compatible, memory.root, subtrees))
    fdt = parse_root_fdt(0x2000, raw)
    blobs = {"fdt": raw, "subtree LUO": bytes(range(256)) * 16}
    # Two chunks, so that what stands between them is seen, too.
    side = Side(fdt, tree, blobs, [out[:7], out[7:]])
    return replace(facts, outgoing=side)


# Calls


def missing(attached: Iterable[str]) -> dict[str, str]:
    """All functions but those that are attached, as of a kernel that has no others."""
    every = {function.name: "not in this kernel" for function in FUNCTIONS}
    return {name: why for name, why in every.items() if name not in {*attached}}


@dataclass(frozen=True)
class Touch:
    """
    What a call did to a block, for batches that are built by hand.

    :param block: with the pages as they were read; of a restore with the stamp's order and type.
    :param looked: pages of which the refcount was read; None: all.
    :param was: the block in the kernel that handed over.
    """

    block: Block
    action: Action = Action.ADD
    ret: int = 0
    before: int = BIT_UNKNOWN
    after: int = BIT_UNKNOWN
    as_folio: bool = False
    asked: int = NO_ORDER
    looked: int | None = None
    was: Block | None = None
    call: int = 1


_DOES = {
    Action.ADD: "kho_radix_add_page",
    Action.DELETE: "kho_radix_del_page",
    Action.RESTORE: "kho_restore_page",
}


def touches_of(abi: Abi, *touches: Touch) -> Touches:
    """Touches as columns."""
    return Touches.concatenate([_touch(abi, each) for each in touches])


def _touch(abi: Abi, t: Touch) -> Touches:
    pages = page_facts([t.block])
    looked = 1 << t.block.order if t.block.order != BAD_ORDER else 0
    if t.looked is not None:
        pages.zeros[0] -= looked - t.looked
        looked = t.looked
    if t.action == Action.RESTORE:
        stamp_type = t.block.type if abi.stamp.type_shift is not None else NO_TYPE
        if t.block.order != BAD_ORDER:
            pages.private[0] = abi.stamp.encode(t.block.order, t.block.type)
        blocks = Blocks(
            np.zeros(1, np.uint64),
            np.array([t.block.phys], np.uint64),
            np.array([t.block.order], np.uint8),
            np.array([stamp_type], np.int8),
            pages,
        )
    else:
        blocks = replace(columns(abi, [t.block]), pages=pages)
    columns_of = {
        "call": t.call,
        "function": NUMBERS[_DOES[t.action]],
        "action": t.action,
        "ret": t.ret,
        "before": t.before,
        "after": t.after,
        "as_folio": t.as_folio,
        "asked": t.asked,
        "looked": looked,
    }
    was = Pages.blank(1) if t.was is None else page_facts([t.was])
    return Touches(
        **{name: np.array([columns_of[name]], dtype) for name, dtype in Touches.DTYPES.items()},
        blocks=blocks,
        known=np.array([t.was is not None]),
        was=was,
    )


def call_of(
    name: str,
    ret: int = 0,
    *,
    call: int = 1,
    phys: int = NO_PHYS,
    pages: int = 0,
    blocks: int = 0,
    subtree: bytes = b"",
) -> Calls:
    """A call that has returned."""
    values = {
        "call": call,
        "function": NUMBERS[name],
        "tid": 42,
        "tgid": 42,
        "comm": b"modprobe",
        "enter": 1000,
        "leave": 2000,
        "args": [0] * 4,
        "ret": ret,
        "phys": phys,
        "pages": pages,
        "blocks": blocks,
        "name": subtree,
        "stack": [0] * 8,
    }
    return Calls(**{column: np.array([values[column]], t) for column, t in Calls.DTYPES.items()})


def batch_of(abi: Abi, calls: Iterable[Calls] = (), touches: Iterable[Touch] = ()) -> Batch:
    """A batch of calls that do not have to have anything to do with the touches."""
    listed = list(calls) or [call_of(FUNCTIONS[0].name)]
    return Batch(Calls.concatenate(listed), touches_of(abi, *touches))
