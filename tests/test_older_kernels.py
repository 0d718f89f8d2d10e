# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernels before the radix tree, as types say what they are: linux 6.18 was booted (tests/vm), those
that cannot be had here are made up with the types that their sources have.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from drgn import Object, offsetof, sizeof
from drgn.helpers import ValidationError

from khoscope.abi.keys import NO_TYPE, Abi, BlockLimits, Finalize, Restore, Stamp, Tracker
from khoscope.abi.kho_fdt import Fdt
from khoscope.checks import check, compare
from khoscope.facts.columns import Blocks
from khoscope.facts.invariants import contradictions
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.page_runs import PageRuns, page_types
from khoscope.facts.snapshot import Snapshot
from khoscope.facts.status import read_from, status
from khoscope.helpers.kexec_handover import (
    kho_mem_track_for_each,
    kho_page_info,
    kho_restored,
    khoser_mem_chunk_for_each,
)
from khoscope.sources.kernel import KernelSource
from khoscope.words.errors import KhoscopeError
from tests.made_up import DIRECT_MAP, RAM, VMEMMAP, MadeUp, mapped
from tests.synthetic import blocks_of, fdt_blob
from tests.test_status import text
from tests.track_memory import LAYOUT, TrackMemory, xarray_abi

#: Where the page of the root FDT is.
FDT = 0x20_0000

_TRACK = {
    "xarray": "u64 xa_lock; u64 xa_head",
    "xa_node": "u8 shift; u8 offset; u8 count; u8 nr_values; u64 parent; u64 array;"
    " list_head private_list; u64 slots[64]",
    "kho_mem_phys": "xarray phys_bits",
    "kho_mem_phys_bits": "u64 preserve[512]",
    "kho_mem_track": "xarray orders",
    "kho_in": "u64 fdt_phys; u64 scratch_phys",
    # Until 7.0: a tail leads to its head.
    "page": "u64 flags; u64 compound_head; list_head lru; u64 mapping; u64 private;"
    " u32 page_type; atomic _refcount; u64 rest",
    "khoser_ptr": "u64 phys",
    "khoser_mem_bitmap_ptr": "u64 phys_start; khoser_ptr bitmap",
    "khoser_mem_chunk_hdr": "khoser_ptr next; u32 order; u32 num_elms",
    "khoser_mem_chunk": "khoser_mem_chunk_hdr hdr; khoser_mem_bitmap_ptr bitmaps[255]",
}
_SER = {
    **_TRACK,
    "kho_serialization": "page *fdt; list_head fdt_list; kho_mem_track track;"
    " khoser_mem_chunk *preserved_mem_map",
    "kho_out": "u64 chain_head; kho_serialization ser; u8 finalized",
}
_LACKS = {"kho_radix_tree", "kho_radix_node", "kho_radix_consts"}


@dataclass(frozen=True)
class Kind:
    """
    A kernel.

    :param members: of its structures.
    :param abi: what khoscope should take it for.
    """

    members: dict[str, str]
    abi: Abi
    lacks: set[str] = field(default_factory=lambda: _LACKS)
    functions: dict[str, int] = field(default_factory=dict)
    release: str = "7.2.0-made-up"
    enums: dict[str, dict[str, int]] = field(default_factory=dict)

    def made(self) -> Kernel:
        kernel = MadeUp(
            self.lacks,
            self.members,
            TrackMemory(self.abi, RAM, RAM // 2),
            functions=self.functions,
            enums=self.enums,
        )
        kernel.write(kernel.address("init_uts_ns"), self.release.encode().ljust(65, b"\0"))
        return Kernel(kernel, self)


@dataclass
class Kernel:
    """One of them, with KHO on."""

    made: MadeUp
    kind: Kind

    def __post_init__(self) -> None:
        self.made.set("kho_out", *[0] * 32)
        if "ser" in self._members:
            self._set("ser.fdt", VMEMMAP + sizeof(self.made.prog.type("struct page")) * (FDT >> 12))
        else:
            self._set("fdt", DIRECT_MAP + FDT)
        if self.kind.abi.finalize == Finalize.BEFORE_LOAD:
            # Finalizing writes the FDT. Until then its page holds what the last owner left there.
            self.memory.pages[FDT] = bytearray(b"\x5a" * 4096)
        else:
            self.root_fdt(0)

    @property
    def _members(self) -> set[str | None]:
        return {member.name for member in self.made.prog.type("struct kho_out").members or ()}

    @property
    def memory(self) -> TrackMemory:
        assert isinstance(self.made.memory, TrackMemory)
        return self.made.memory

    def _set(self, path: str, value: int) -> None:
        at = offsetof(self.made.prog.type("struct kho_out"), path)
        self.made.words(self.made.address("kho_out") + at, value)

    def preserve(self, phys: int, order: int) -> None:
        self.memory.preserve(phys, order)
        track = "ser.track" if "ser" in self._members else "track"
        self._set(f"{track}.orders.xa_head", self.memory.head)

    def root_fdt(self, memory_map: int) -> None:
        root = fdt_blob(Fdt(FDT, "kho-v1", memory_map))
        self.memory.pages[FDT] = bytearray(root.ljust(4096, b"\0"))

    def finalize(self) -> None:
        self.memory.finalize()
        self._set("finalized", 1)
        self.root_fdt(self.memory.first)
        if "ser" in self._members:
            self._set("ser.preserved_mem_map", DIRECT_MAP + self.memory.first)

    def abort(self) -> None:
        """``kho_abort``: the FDT's page keeps what was written there."""
        self._set("finalized", 0)
        if "ser" in self._members:
            self._set("ser.preserved_mem_map", 0)

    def track(self) -> Object:
        """``struct kho_mem_track``."""
        found = self.made.prog["kho_out"]
        return found.ser.track if "ser" in self._members else found.track

    def source(self, moves: bool = False) -> KernelSource:
        return self.made.source(moves)


LINUX_6_17 = Kind(
    {**_SER, "kho_mem_phys_bits": "u64 preserve[64]"},
    xarray_abi(1 << 12, stamp=Stamp(magic_shift=None), restores_pages_as=Restore.FOLIO),
    _LACKS | {"kho_page_info"},
)
#: Since 6.17.9.
LINUX_6_17_9 = replace(LINUX_6_17, members=_SER, abi=replace(LINUX_6_17.abi, preserve_bits=1 << 15))
LINUX_6_18 = Kind(_SER, xarray_abi(), functions={"kho_restore_pages": 2, "kho_restore_page": 1})
#: With the fix of restored pages, as a stable kernel may get it.
LINUX_6_18_FIXED = replace(
    LINUX_6_18,
    abi=xarray_abi(restores_pages_as=Restore.PAGES),
    functions={"kho_restore_pages": 2, "kho_restore_page": 2},
)
#: Also 6.19.
LINUX_7_0 = Kind(
    {**_TRACK, "kho_out": "void *fdt; u8 finalized; u64 lock; kho_mem_track track"},
    xarray_abi(finalize=Finalize.BEFORE_KEXEC, restores_pages_as=Restore.PAGES),
    functions={"kho_restore_pages": 2, "kho_restore_page": 2},
)
#: A cloud distribution's backport to a kernel that had no KHO of its own; its compiler has inlined
#: kho_restore_page().  The types of pages are macros there, and slabs have a flag.
BACKPORT = replace(
    LINUX_7_0,
    functions={"kho_restore_pages": 2},
    release="6.6.102-cloud",
    lacks=_LACKS | {"pagetype"},
    enums={"pageflags": {"PG_locked": 0, "PG_head": 6, "PG_slab": 9, "__NR_PAGEFLAGS": 10}},
)
#: The same of linux 6.11, which has them as constants.
BACKPORT_6_11 = replace(
    BACKPORT,
    release="6.11.0-cloud",
    lacks=_LACKS,
    enums={
        "pagetype": {
            "PG_buddy": 1 << 30,
            "PG_offline": 1 << 29,
            "PG_table": 1 << 28,
            "PG_guard": 1 << 27,
            "PG_hugetlb": 1 << 26,
            "PG_slab": 1 << 25,
            "PG_zsmalloc": 1 << 24,
            "PAGE_TYPE_BASE": 1 << 31,
            "PAGE_MAPCOUNT_RESERVE": 0xFFFF0000,
        }
    },
)
KINDS = {
    "6.17": LINUX_6_17,
    "6.17.9": LINUX_6_17_9,
    "6.18": LINUX_6_18,
    "6.18-fixed": LINUX_6_18_FIXED,
    "7.0": LINUX_7_0,
    "backport": BACKPORT,
    "backport-6.11": BACKPORT_6_11,
}
BLOCKS = {(0x10_0000, 0, NO_TYPE), (0x18_0000, 3, NO_TYPE), (0x100_0000, 9, NO_TYPE)}


@pytest.fixture(autouse=True)
def _mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with mapped(monkeypatch):
        yield


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def kernel(kind: Kind) -> Kernel:
    made = kind.made()
    for phys, order, _ in BLOCKS:
        made.preserve(phys, order)
    return made


def test_types_say_what_it_is(kind: Kind) -> None:
    abi = kind.made().source().abi
    no_fdt_yet = kind.abi.finalize == Finalize.BEFORE_LOAD
    assert replace(abi, compatible="kho-v1", decided={}, limits=BlockLimits()) == kind.abi
    assert abi.compatible == (None if no_fdt_yet else "kho-v1")
    # None of them takes a block of 2 GiB, or one that the page allocator would not have.
    assert abi.limits == BlockLimits(1 << 31, 10)
    assert abi.tracker == Tracker.XARRAY
    assert abi.decided["tracker"] in ("kho_out.ser.track", "kho_out.track")
    assert no_fdt_yet == (abi.decided["tracker"] == "kho_out.ser.track")


@pytest.mark.parametrize("moves", [False, True])
def test_what_is_preserved(kernel: Kernel, moves: bool) -> None:
    facts = kernel.source(moves).tree()
    assert blocks_of(facts.abi, facts.outgoing.tree) == BLOCKS
    assert facts.finalized is False
    assert facts.outgoing.serialized is None
    report = check(facts)
    assert report.counts["not-finalized"] == 1
    assert not report.counts["bad-fdt"]


def test_what_is_handed_over(kernel: Kernel) -> None:
    kernel.finalize()
    facts = kernel.source().tree()
    assert facts.finalized
    chain = facts.outgoing.serialized
    assert chain is not None
    assert blocks_of(facts.abi, chain) == BLOCKS
    assert chain.state.root == kernel.memory.first == facts.outgoing.fdt.memory_map
    report = check(facts)
    assert not {"not-finalized", "serialized-differs", "bad-fdt"} & report.counts.keys()


def test_one_source_before_and_after_finalizing(kernel: Kernel) -> None:
    """As verify --watch has it; and when it was undone, as kho_abort() does."""
    source = kernel.source()
    assert not source.snapshot().contradictions
    kernel.finalize()
    assert not source.snapshot().contradictions


def test_what_was_preserved_after_finalizing(kernel: Kernel) -> None:
    """As 6.19 and 7.0 permit; in a bitmap that is serialized, it is handed over all the same."""
    kernel.finalize()
    kernel.preserve(0x10_1000, 0)
    kernel.preserve(0x200_0000, 2)
    found = serialized_differs(kernel.source().tree())
    assert found == [(0x200_0000, 2)]


def test_a_chain_without_a_block(kernel: Kernel) -> None:
    kernel.finalize()
    at = kernel.memory.bitmaps[9, 0]
    # Not the bitmap itself, to which both lead.
    copy = kernel.memory.new_node()
    kernel.memory.set_word(kernel.memory.first, kernel.memory.word(kernel.memory.first))
    for chunk in (page for page in kernel.memory.pages if page >= kernel.memory.first):
        for slot in range(24, 4096, 16):
            if kernel.memory.word(chunk + slot) == at:
                kernel.memory.set_word(chunk + slot, copy)
    assert serialized_differs(kernel.source().tree()) == [(0x100_0000, 9)]


def test_finalizing_comes_and_goes(kernel: Kernel) -> None:
    """Also while a source is in use. What an abort leaves where the FDT was is no FDT."""
    source = kernel.source()
    written = kernel.kind.abi.finalize != Finalize.BEFORE_LOAD
    for step, compatible in (
        (None, "kho-v1" if written else None),
        (kernel.finalize, "kho-v1"),
        (kernel.abort, "kho-v1" if written else None),
    ):
        if step is not None:
            step()
        for each in (source, kernel.source()):
            facts = each.snapshot()
            assert facts.abi.compatible == facts.outgoing.fdt.compatible == compatible
            assert not list(contradictions(facts))
            assert not any("contradict" in why for why in check(facts).incomplete)


def test_blocks_too_large_before_finalizing(kernel: Kernel) -> None:
    """When something can still be done about them."""
    kernel.preserve(0x100_0000, 11)
    for next_kernel in (None, NextKernel("/boot/vmlinuz", "gzip", "6.18.15", ("kho-v1",))):
        found = check(kernel.source().snapshot(), next_kernel).findings
        too_large = [(f.phys, f.order) for f in found if f.rule == "block-too-large"]
        assert too_large == [(0x100_0000, 11)]


def test_status(kernel: Kernel) -> None:
    """Where things were read, as this kernel names it; nodes that are no pages have no price."""
    kernel.finalize()
    facts = kernel.source().status(lambda _: None)[0]
    says = read_from(facts)
    ser = ".ser" if kernel.kind.abi.finalize == Finalize.BEFORE_LOAD else ""
    assert says["kho_abi"] == says["subtrees"] == f"kho_out{ser}.fdt"
    assert says["luo_abi"] == f"kho_out{ser}.fdt, LUO"
    assert says["kho_abi_in"] == "kho_in.fdt_phys"
    assert says["tree"] == f"kho_out{ser}.track"
    found = status(facts)
    assert found.tree_pages > 0
    assert found.per_byte is None
    assert any(re.match(rf"tree +{found.tree_pages} nodes +\[", line) for line in text(facts))
    # As a khoscope that did not record it.
    older = replace(facts, abi=replace(facts.abi, decided={}))
    assert read_from(older)["kho_abi"] == "kho_out.fdt"


def test_the_next_kernel_before_finalizing(kernel: Kernel) -> None:
    """What the root FDT will say is known before it is written."""
    facts = kernel.source().tree()

    def said(*kho: str) -> list[str]:
        report = check(facts, NextKernel("/boot/vmlinuz", "gzip", "the next", kho))
        assert report.counts["not-finalized"] == 1
        return [f.message for f in report.findings if f.rule == "image-abi-differs"]

    assert not said("kho-v1")
    (differs,) = said("kho-v4")
    assert "takes kho-v4, this kernel hands over kho-v1" in differs


def serialized_differs(facts: Snapshot) -> list[tuple[int | None, int | None]]:
    found = check(facts).findings
    return [(f.phys, f.order) for f in found if f.rule == "serialized-differs"]


def test_a_boot_by_such_a_kernel(kernel: Kernel) -> None:
    """Its incoming side is the chain that it was handed."""
    kernel.finalize()
    kernel.made.set("kho_in", FDT)
    facts = kernel.source().tree()
    assert facts.incoming is not None
    assert blocks_of(facts.abi, facts.incoming.tree) == BLOCKS
    came = facts.handover
    assert (came.is_kho_boot, came.previous_release, came.kexec_count) == (True, None, None)


def test_all_facts(kernel: Kernel) -> None:
    kernel.finalize()
    facts = kernel.source().snapshot()
    assert not facts.contradictions
    assert not facts.unreadable
    assert sum(map(len, facts.outgoing.blocks)) == len(BLOCKS)


@pytest.mark.parametrize(
    ("kind", "buddy", "table", "slab"),
    [
        (LINUX_7_0, 0xF0000000, 0xF2000000, 0xF5000003),
        (BACKPORT, 0xFFFFFF7F, 0xFFFFFDFF, 0xFFFFEFFF),
        (BACKPORT_6_11, 0xBFFFFFFF, 0xEFFFFFFF, 0xFDFF0003),
    ],
)
def test_types_of_pages(kind: Kind, buddy: int, table: int, slab: int) -> None:
    """However the kernel keeps them, free blocks are free, and what has a type has it."""
    kernel = kind.made()
    words = {0x10_0000: buddy, 0x20_1000: table, 0x30_0000: slab, 0x40_0000: 0xFFFFFFFF}
    for phys in (*words, 0x10_1000):
        kernel.preserve(phys, 0)
    page = kernel.made.prog.type("struct page")
    size, at = sizeof(page), {n: offsetof(page, n) for n in ("page_type", "private", "_refcount")}
    pages = bytearray(size * (0x50_0000 >> 12))
    for pfn in range(0x50_0000 >> 12):
        word = words.get(pfn << 12, 0xFFFFFFFF)
        struct.pack_into("<I", pages, pfn * size + at["page_type"], word)
        # A free block of two pages.
        struct.pack_into("<I", pages, pfn * size + at["_refcount"], pfn not in (0x100, 0x101))
        struct.pack_into("<Q", pages, pfn * size + at["private"], word == buddy)
    kernel.made.prog.add_memory_segment(
        VMEMMAP, len(pages), lambda _, count, offset, __: bytes(pages[offset:][:count])
    )
    facts = kernel.source().snapshot()
    blocks = Blocks.concatenate(list(facts.outgoing.blocks))
    free = dict(zip(blocks.phys.tolist(), blocks.facts.free.tolist(), strict=True))
    assert free == {0x10_0000: 1, 0x10_1000: 1, 0x20_1000: 0, 0x30_0000: 0, 0x40_0000: 0}
    found = dict(zip(blocks.phys.tolist(), page_types(blocks.facts.page_type), strict=True))
    # Linux 6.6 has no type for slabs; whatever that bit is there, it is a type.
    of_slab = 0x80 if kind is BACKPORT else 0xF5
    typed = {0x10_0000: 0xF0, 0x20_1000: 0xF2, 0x30_0000: of_slab}
    assert {phys: top for phys, top in found.items() if top != PageRuns.UNTYPED} == typed
    assert facts.kernel.page_types[0xF0] == "buddy"
    assert not facts.contradictions
    stale = [f.phys for f in check(facts).findings if f.rule == "stale-entry"]
    assert stale == [0x10_0000, 0x10_1000]


@pytest.mark.parametrize("lacks", ["PG_buddy", "PAGE_TYPE_BASE", "PAGE_MAPCOUNT_RESERVE"])
def test_types_of_pages_that_nobody_knows(lacks: str) -> None:
    types = {k: v for k, v in BACKPORT_6_11.enums["pagetype"].items() if k != lacks}
    with pytest.raises(KhoscopeError, match="types of pages") as caught:
        replace(BACKPORT_6_11, enums={"pagetype": types}).made().source()
    assert "a khoscope that knows this kernel" in caught.value.hint


def test_types_of_pages_that_debug_info_does_not_have() -> None:
    """Those of linux 6.6 are known, where slabs have a flag; no later kernel is taken for it."""
    source = BACKPORT.made().source()
    assert source.outline().kernel.page_types[0xF2] == "table"
    assert "as in linux 6.6" in source.abi.decided["page types"]
    assert "page types" not in BACKPORT_6_11.made().source().abi.decided
    with pytest.raises(KhoscopeError, match="types of pages"):
        replace(BACKPORT, enums={}).made().source()


def test_a_track_that_cannot_be_read(kernel: Kernel) -> None:
    kernel.finalize()
    head = kernel.memory.track(0) + LAYOUT.head
    kernel.memory.set_word(head, DIRECT_MAP + (1 << 45) + 2)
    facts = kernel.source().tree()
    assert facts.outgoing.tree.state.problem_count
    report = check(facts)
    assert report.counts["bad-node"]
    assert not report.passed


def test_stamps_without_a_magic(kernel: Kernel) -> None:
    """Whatever a snapshot finds of the blocks that another has recorded, it is no pass."""
    kernel.finalize()
    before = kernel.source().snapshot()
    kernel.made.set("sysctl_bootid", 2, 2)
    kernel.made.set("kho_in", FDT)
    after = kernel.source().snapshot(before)
    report = compare(before, after)
    without = not kernel.kind.abi.stamp.has_magic
    assert any("have no magic" in why for why in report.incomplete) == without
    assert (after.scan is None) == without
    if without:
        assert not report.passed
        assert kernel.source().status(lambda _: None)[0].scan is None
        with pytest.raises(KhoscopeError, match="cannot be searched for"):
            kernel.source().stamps()


def test_the_helpers(kernel: Kernel) -> None:
    """Those that name what the kernel names."""
    kernel.finalize()
    prog = kernel.made.prog
    chunk = Object(prog, "struct khoser_mem_chunk *", DIRECT_MAP + kernel.memory.first)
    for found in (kho_mem_track_for_each(kernel.track()), khoser_mem_chunk_for_each(chunk)):
        assert [(b.phys, b.order, NO_TYPE) for b in found] == sorted(BLOCKS, key=lambda b: b[1])
    assert not list(khoser_mem_chunk_for_each(Object(prog, "struct khoser_mem_chunk *", 0)))


def test_the_helpers_end_whatever_memory_holds(kernel: Kernel) -> None:
    kernel.finalize()
    prog, memory = kernel.made.prog, kernel.memory
    chunk = Object(prog, "struct khoser_mem_chunk *", DIRECT_MAP + memory.first)
    memory.set_word(memory.first, memory.first)
    with pytest.raises(ValidationError, match="was there before"):
        list(khoser_mem_chunk_for_each(chunk))
    memory.set_word(memory.first, memory.first + 8)
    with pytest.raises(ValidationError, match="is not aligned"):
        list(khoser_mem_chunk_for_each(chunk))
    memory.set_word(memory.first + 8, 256 << 32)
    with pytest.raises(ValidationError, match="256 bitmaps, room for 255"):
        list(khoser_mem_chunk_for_each(chunk))
    node = memory.head - 2
    memory.set_word(node - DIRECT_MAP + LAYOUT.slots, memory.head)
    with pytest.raises(ValidationError, match=r"xarray node .* was there before"):
        list(kho_mem_track_for_each(kernel.track()))
    memory.set_word(node - DIRECT_MAP + LAYOUT.slots, 17)
    with pytest.raises(ValidationError, match="not a pointer"):
        list(kho_mem_track_for_each(kernel.track()))


def test_the_helpers_check_bitmaps(kernel: Kernel) -> None:
    """Blocks that no kernel could mean are not given, whatever leads to them."""
    kernel.finalize()
    prog, memory = kernel.made.prog, kernel.memory
    chunk = Object(prog, "struct khoser_mem_chunk *", DIRECT_MAP + memory.first)
    # Shifting by such an order takes 256 MiB.
    for order in (52, 0x7FFF_FFFF):
        memory.set_word(memory.first + 8, 1 << 32 | order)
        with pytest.raises(ValidationError, match=f"a bitmap of order {order}"):
            next(khoser_mem_chunk_for_each(chunk))
    bitmap = memory.bitmaps[0, 0]
    memory.set_word(memory.first + 8, 2 << 32)
    for second, why in ((bitmap + 8, "is not aligned"), (bitmap, "was there before")):
        memory.set_word(memory.first + 40, second)
        with pytest.raises(ValidationError, match=f"bitmap of order 0 .* {why}"):
            list(khoser_mem_chunk_for_each(chunk))
    node = memory.word(memory.track(9) + LAYOUT.head)
    for entry, why in ((bitmap + 8, "is not aligned"), (bitmap, "was there before")):
        memory.set_word(memory.track(9) + LAYOUT.head, entry + DIRECT_MAP)
        with pytest.raises(ValidationError, match=f"bitmap of order 9 .* {why}"):
            list(kho_mem_track_for_each(kernel.track()))
    memory.set_word(memory.track(9) + LAYOUT.head, node)
    memory.preserve(0, 52)
    with pytest.raises(ValidationError, match="a bitmap of order 52"):
        list(kho_mem_track_for_each(kernel.track()))


@pytest.mark.parametrize("helper", [kho_page_info, kho_restored])
def test_the_helpers_for_pages(kernel: Kernel, helper: Callable[[Object], object]) -> None:
    """Without a magic, they say why there is no answer."""
    page = Object(kernel.made.prog, "struct page *", VMEMMAP)
    if kernel.kind.abi.stamp.has_magic:
        assert not helper(page)
        return
    with pytest.raises(LookupError, match="cannot be told from other words in page->private"):
        helper(page)


def test_bitmaps_in_scratch(kernel: Kernel) -> None:
    """They, and the chunks, are what the next kernel reads; the nodes of xarrays are not."""
    memory = kernel.memory
    bitmap = memory.bitmaps[9, 0]
    node = memory.head - 2 - DIRECT_MAP

    def said(start: int, size: int) -> list[int | None]:
        kernel.made.areas((start, size))
        found = check(kernel.source().tree()).findings
        return [f.phys for f in found if f.rule == "metadata-in-scratch"]

    size = kernel.kind.abi.bitmap_bytes
    assert said(bitmap + size - 1, 1) == [bitmap]
    assert said(bitmap - 1, 1) == said(bitmap + size, 8) == said(node, 8) == []
    kernel.finalize()
    assert said(bitmap, 1) == [bitmap]
    assert said(memory.first + 4095, 1) == [memory.first]
    assert said(node, 8) == []
