# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pages are used for, as their struct pages tell, against a slow plain model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khoscope.facts.snapshot import PageUse
from khoscope.sources import pages as pages_module
from khoscope.sources.sections import PageBlockLayout, SectionLayout, page_blocks
from khoscope.sources.uses import UseLayout, UseReader
from tests.test_pages import BUDDY, HEAD, LAYOUT, NO_PAGE_TYPE, Vmemmap

RESERVED, SWAPBACKED, SWAPCACHE, PRIVATE = 1 << 14, 1 << 18, 1 << 10, 1 << 12
#: As on x86-64, linux 7.2.
USES = UseLayout(RESERVED, SWAPBACKED, SWAPCACHE, PRIVATE, mapcount=80, pincount=92)
NAMES = {0xF0: "buddy", 0xF4: "hugetlb", 0xF5: "slab"}
SLAB = 0xF5000000


def reader(memory: Vmemmap, moves: bool = False) -> UseReader:
    return UseReader(memory.reader(), USES, NAMES, moves)


def compound(memory: Vmemmap, pfn: int, order: int, mapcount: int = 0, pincount: int = 0) -> None:
    """Make a compound page; what is on its first page stays."""
    memory.pages["flags"][pfn] |= HEAD
    memory.pages["info"][pfn + 1 : pfn + (1 << order)] = 1
    memory.pages["flags"][pfn + 1] = order
    # _large_mapcount and _pincount lie in the second struct page.
    memory.pages["prev"][pfn + 1] = (mapcount - 1) % (1 << 32)
    memory.pages["mapping"][pfn + 1] = pincount << 32


def put(memory: Vmemmap, pfn: int, count: int = 1, **values: int) -> None:
    for name, value in values.items():
        memory.pages[name][pfn : pfn + count] = value


def used(memory: Vmemmap, start: int = 0, end: int = 64, moves: bool = False) -> dict[str, int]:
    free, use = reader(memory, moves).uses(start, end)
    return {"buddy": free} | use.pages


def test_each_use() -> None:
    memory = Vmemmap()
    put(memory, 0, 4, private=0)
    put(memory, 0, page_type=BUDDY, private=2)
    put(memory, 8, 3, mapping=0x1000, refcount=2, page_type=0)
    put(memory, 16, 2, mapping=0x1001, refcount=1, page_type=0, flags=SWAPBACKED)
    put(memory, 24, mapping=0x1000, refcount=2, page_type=0, flags=SWAPBACKED)
    put(memory, 32, 5, refcount=1, page_type=SLAB)
    put(memory, 40, 6, flags=RESERVED, refcount=1)
    put(memory, 48, 7, refcount=1)
    put(memory, 56, mapping=0x1002, refcount=1)
    put(memory, 57, page_type=0xE1000000)
    assert used(memory) == {
        "buddy": 4,
        PageUse.FILE: 3,
        PageUse.ANON: 2,
        PageUse.SHMEM: 1,
        "slab": 5,
        PageUse.RESERVED: 6,
        PageUse.KERNEL: 7,
        PageUse.DRIVER_MOVABLE: 1,
        "type 0xe1": 1,
        PageUse.PCP: 64 - 30,
    }


def test_compound_pages_are_what_their_first_page_is() -> None:
    memory = Vmemmap()
    put(memory, 0, mapping=0x1001, refcount=1)
    compound(memory, 0, 3, mapcount=1)
    put(memory, 8, page_type=SLAB)
    compound(memory, 8, 2)
    put(memory, 16, 48, refcount=1)
    assert used(memory) == {
        "buddy": 0,
        PageUse.ANON: 8,
        "slab": 4,
        PageUse.PCP: 4,
        PageUse.KERNEL: 48,
    }


@pytest.mark.parametrize("start", [1, 5, 300, 1024, 1030])
def test_an_area_that_begins_in_a_compound_page(start: int) -> None:
    """Even if it begins in another region, as that of a gigantic page may."""
    memory = Vmemmap()
    put(memory, 0, mapping=0x1000, refcount=2)
    compound(memory, 0, 11)
    assert used(memory, start, 2048) == {"buddy": 0, PageUse.FILE: 2048 - start}


def test_pinned_and_held() -> None:
    memory = Vmemmap()
    mapped = {"mapping": 0x1001, "page_type": 0, "refcount": 1}
    put(memory, 0, 8, **mapped)
    put(memory, 1, refcount=1 + 1024)
    # Mapped by very many, as a page of the C library.
    put(memory, 4, page_type=4999, refcount=5000)
    put(memory, 2, refcount=2)
    put(memory, 3, refcount=2, flags=SWAPCACHE)
    put(memory, 8, 4, mapping=0x1000, page_type=0, refcount=2)
    put(memory, 9, refcount=3)
    put(memory, 10, refcount=3, flags=PRIVATE)
    # Of a large one: one mapping, and one that is pinned; and one that somebody holds.
    for at, refcount, pincount in ((16, 1, 0), (24, 2, 1), (32, 2, 0)):
        put(memory, at, mapping=0x1001, refcount=refcount)
        compound(memory, at, 3, mapcount=1, pincount=pincount)
    # The kernel's own says nothing of mappings.
    put(memory, 40, refcount=5000)
    put(memory, 41, refcount=3, page_type=SLAB)
    _, use = reader(memory).uses(0, 64)
    assert (use.pinned, use.held) == (1 + 8, 2 + 8)


def test_what_cannot_be_read() -> None:
    memory = Vmemmap()
    put(memory, 0, 2048, refcount=1)
    memory.hide(1, 2)
    free, use = reader(memory).uses(0, 2048)
    assert (free, use.unread, use.pages) == (0, 128, {PageUse.KERNEL: 2048 - 128})
    # A tail whose head cannot be read: nobody knows.
    memory.hide(0, 3)
    memory.pages["info"][192:200] = 1
    assert used(memory, 0, 2048)[PageUse.KERNEL] == 2048 - 192
    assert reader(memory).uses(0, 0) == (0, replace(use, pages={}, unread=0))
    # Beyond what there is.
    assert reader(memory).uses(2048, 4096)[1].unread == 2048


def test_a_page_that_changes_hands() -> None:
    """It has references before it has an owner."""
    memory = Vmemmap()
    put(memory, 0, 64, refcount=1)
    read, reads = memory.read, 0

    def moving(address: int, size: int) -> bytes | None:
        nonlocal reads
        reads += 1
        if reads == 2:
            put(memory, 3, mapping=0x1001, page_type=0)
        return read(address, size)

    memory.read = moving  # type: ignore[method-assign]
    assert used(memory, 0, 64, moves=True) == {"buddy": 0, PageUse.KERNEL: 63, PageUse.TRANSIT: 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.sampled_from("afskrptb")), max_size=60))
def test_random_pages(parts: list[tuple[int, str]]) -> None:
    memory = Vmemmap(count=256)
    values: dict[str, tuple[str, dict[str, int]]] = {
        "a": (PageUse.ANON, {"mapping": 0x11, "refcount": 1, "page_type": 0}),
        "f": (PageUse.FILE, {"mapping": 0x10, "refcount": 2, "page_type": 0}),
        "s": ("slab", {"page_type": SLAB}),
        "k": (PageUse.KERNEL, {"refcount": 1}),
        "r": (PageUse.RESERVED, {"flags": RESERVED}),
        "p": (PageUse.PCP, {}),
        "t": (PageUse.SHMEM, {"mapping": 0x10, "refcount": 2, "page_type": 0, "flags": SWAPBACKED}),
        "b": ("buddy", {"page_type": BUDDY}),
    }
    expected = [str(PageUse.PCP)] * 256
    for pfn, kind in parts:
        blank = {"flags": 0, "mapping": 0, "refcount": 0, "page_type": NO_PAGE_TYPE}
        expected[pfn], changes = values[kind]
        put(memory, pfn, **blank | changes)
    found = used(memory, 0, 256)
    assert {name: count for name, count in found.items() if count} == dict(Counter(expected))


def test_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "WINDOW", 1024)
    memory = Vmemmap(abi=replace(Vmemmap().abi, max_page_order=6))
    put(memory, 0, 2048, mapping=0x1001, refcount=1, page_type=0)
    assert used(memory, 100, 2000) == {"buddy": 0, PageUse.ANON: 1900}


# Migrate types

BLOCK, SECTION = 1 << 21, 1 << 27
SECTIONS = SectionLayout(0x10000, 27, 16, 0, 8, 2, 0)
TYPES = {0: "unmovable", 1: "movable", 2: "reclaimable", 3: "highatomic", 4: "cma", 5: "isolate"}
FLAGS_AT = 16


class Sections:
    """Sections of 128 MiB, of which each block of 2 MiB has a type."""

    def __init__(
        self, layout: PageBlockLayout, types: list[int], gone: Container[int] = ()
    ) -> None:
        self.layout = layout
        self.memory: dict[int, bytes] = {0x10000: (0x20000).to_bytes(8, "little")}
        per = SECTION // BLOCK
        rows = np.zeros((256, 2), np.uint64)
        for number in range(len(types) // per):
            usage = 0x100000 + number * 0x1000
            if number not in gone:
                rows[number] = (1 << SECTIONS.online_bit, usage)
            bits = 0
            for i, kind in enumerate(types[number * per :][:per]):
                bits |= kind << i * layout.bits
            raw = bits.to_bytes(per * layout.bits // 8, "little")
            self.memory[usage + FLAGS_AT] = raw
        self.memory[0x20000] = rows.tobytes()

    def read(self, address: int, size: int) -> bytes:
        found = bytearray(size)
        for at, raw in self.memory.items():
            low, high = max(at, address), min(at + len(raw), address + size)
            if low < high:
                found[low - address : high - address] = raw[low - at : high - at]
        return bytes(found)

    def count(self, phys: int, size: int) -> dict[str, int]:
        return page_blocks(self.layout, phys, size, BLOCK, 4096, self.read)


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_migrate_types(bits: int, data: st.DataObject) -> None:
    layout = PageBlockLayout(SECTIONS, FLAGS_AT, bits, 4 if bits == 8 else None, TYPES)
    highest = (1 << min(bits, 5)) - 1
    types = data.draw(st.lists(st.integers(0, highest), min_size=192, max_size=192))
    first = data.draw(st.integers(0, 191))
    count = data.draw(st.integers(0, 192 - first))
    sections = Sections(layout, types)

    def name(kind: int) -> str:
        if bits == 8 and kind & 16:
            return "isolate"
        return TYPES.get(kind & 7, f"type {kind & 7}")

    expected = Counter(map(name, types[first : first + count]))
    assert sections.count(first * BLOCK, count * BLOCK) == dict(expected)


def test_a_section_that_is_offline() -> None:
    layout = PageBlockLayout(SECTIONS, FLAGS_AT, 4, None, TYPES)
    assert Sections(layout, [4] * 192, gone={1}).count(0, 192 * BLOCK) == {
        "cma": 128,
        "offline": 64,
    }


def test_memory_that_no_machine_has() -> None:
    layout = PageBlockLayout(SECTIONS, FLAGS_AT, 4, None, TYPES)
    with pytest.raises(ValueError, match="than any machine has"):
        Sections(layout, []).count(0, 1 << 60)


def test_struct_pages_of_another_layout() -> None:
    """A kernel whose folios have no such members."""
    memory = Vmemmap()
    put(memory, 0, mapping=0x1001, refcount=1030)
    compound(memory, 0, 3, mapcount=1, pincount=3)
    bare = UseReader(memory.reader(), replace(USES, mapcount=None, pincount=None), NAMES, False)
    assert bare.uses(0, 8)[1].pinned == 8
    assert LAYOUT.size == 64
