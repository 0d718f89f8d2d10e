# SPDX-License-Identifier: LGPL-2.1-or-later
"""What KHO's clients hand over, followed in memory: right, broken and hostile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.keys import Abi
from khoscope.abi.kho_fdt import Fdt, Subtree
from khoscope.abi.serialized import (
    KHO_BLOCK_HEADER_SER,
    KHO_MAX_BLOCKS,
    KHO_VMALLOC,
    LUO_FILE_SER,
    MEMFD_COMPATIBLE,
    MEMFD_LUO_SER,
    MEMFD_LUO_SER_V1,
    MEMFD_V1,
    MEMFDS,
    Array,
)
from khoscope.facts.clients import Claims, Luo, Memfd, Owner, OwnerKind
from khoscope.facts.columns import Leaves
from khoscope.facts.snapshot import Snapshot
from khoscope.facts.tree import KeySet
from khoscope.sources import follow
from khoscope.sources.follow import ClientWalker
from tests.fuzz import fuzz
from tests.synthetic import PLAIN, snapshot, spooled
from tests.test_fdt import blob, u64

PAGE = 4096
#: Entries of a ``struct kho_vmalloc_chunk``.
PER_CHUNK = 511
SOMEBODY = Owner(OwnerKind.FILE, "somebody", "a session", 7)
#: RAM has a hole; what is allocated for structures lies in front of it, data behind.
RAM = [(0x10_0000, 0x400_0000), (0x1000_0000, 0x4000_0000)]
DATA = RAM[1][0]
END = RAM[1][1]


@dataclass
class Machine:
    """Physical memory; what nobody wrote to is 0."""

    abi: Abi = PLAIN
    pages: dict[int, bytearray] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)
    bytes_read: int = 0

    def __post_init__(self) -> None:
        self._next = RAM[0][0]

    def page(self) -> int:
        """A new page."""
        at, self._next = self._next, self._next + self.abi.page_size
        self.write(at, b"")
        return at

    def write(self, at: int, data: bytes) -> None:
        size = self.abi.page_size
        page = self.pages.setdefault(at - at % size, bytearray(size))
        page[at % size : at % size + len(data)] = data

    def words(self, at: int, *values: int) -> None:
        for number, value in enumerate(values):
            self.write(at + 8 * number, u64(value))

    def record(self, layout: np.dtype[np.void], *values: Any) -> bytes:
        return np.array([values], layout).tobytes()

    def read(self, at: int, size: int) -> bytes | None:
        self.bytes_read += size
        step = self.abi.page_size
        first, end = at - at % step, at + size
        pages = range(first, end, step)
        if not self.unreadable.isdisjoint(pages):
            return None
        raw = b"".join(bytes(self.pages.get(page, bytes(step))) for page in pages)
        return raw[at - first : end - first]

    def following(self) -> ClientWalker:
        return ClientWalker(self.abi, np.array(RAM, np.uint64), self.read)

    # As the kernel writes them

    def chain(self, entries: list[int]) -> list[int]:
        """The chunks of :c:func:`kho_preserve_vmalloc`: a new one as soon as one is full."""
        chunks = [self.page()]
        per_chunk = self.abi.page_size // 8 - 1
        for start in range(0, len(entries), per_chunk):
            part = entries[start : start + per_chunk]
            self.words(chunks[-1] + 8, *part)
            if len(part) == per_chunk:
                chunks.append(self.page())
                self.words(chunks[-2], chunks[-1])
        return chunks

    def blocks(self, layout: np.dtype[np.void], entries: list[bytes]) -> list[int]:
        """The blocks of a ``struct kho_block_set``."""
        per_block = (self.abi.page_size - KHO_BLOCK_HEADER_SER.itemsize) // layout.itemsize
        made: list[int] = []
        for start in range(0, len(entries), per_block):
            part = entries[start : start + per_block]
            made.append(self.page())
            self.words(made[-1], 0, len(part))
            self.write(made[-1] + 16, b"".join(part))
            if len(made) > 1:
                self.words(made[-2], made[-1])
        return made

    def array(self, of: Array, entries: list[bytes]) -> int:
        """A list of luo-v1; its header counts the entries if they fit."""
        made = [self.page() for _ in range(of.pages)]
        raw = b"".join([u64(len(entries))[: of.header], *entries])
        for number, at in enumerate(made):
            self.write(at, raw[number * self.abi.page_size :][: self.abi.page_size])
        return made[0]

    def memfd(
        self,
        folios: list[tuple[int, int]],
        size: int,
        nr: int | None = None,
        handler: str = MEMFD_COMPATIBLE,
    ) -> int:
        """
        A ``struct memfd_luo_ser``.

        :param folios: pfn and index of each.
        """
        raw = b"".join(u64(pfn | 3 << 52) + u64(index) for pfn, index in folios)
        listed = [self.page() for _ in range(-(-len(raw) // self.abi.page_size))]
        for number, at in enumerate(listed):
            self.write(at, raw[number * self.abi.page_size :][: self.abi.page_size])
        first = self.chain(listed)[0] if folios else 0
        number = len(folios) if nr is None else nr
        ser = self.page()
        desc = (first, len(listed), 1, 0)
        seals = (0, 0) if handler == MEMFD_COMPATIBLE else ()
        self.write(ser, self.record(MEMFDS[handler], 5, size, *seals, number, desc))
        return ser


def desc(first: int, total: int, order: int = 0, flags: int = 1) -> np.void:
    return np.array([(first, total, flags, order)], KHO_VMALLOC)[0]


def claimed(following: ClientWalker, kind: OwnerKind | None = None) -> list[tuple[int, int]]:
    """First and last-plus-one address of each claim."""
    every = Claims.concatenate(following.claims())
    return [
        (phys, phys + size)
        for phys, size, owner in zip(
            every.phys.tolist(), every.size.tolist(), every.owner.tolist(), strict=True
        )
        if kind is None or following.owners[owner].kind == kind
    ]


def facts_of(following: ClientWalker, luo: Luo | None = None) -> Snapshot:
    facts = snapshot(following.abi, [])
    side = replace(
        facts.outgoing,
        luo=luo,
        vmallocs=following.vmallocs,
        owners=following.owners,
        claims=following.claims(),
    )
    return replace(facts, outgoing=side)


def holds(following: ClientWalker, luo: Luo | None = None) -> None:
    """What is true whatever memory holds: claims lie in RAM, and all of it can be stored."""
    claims = Claims.concatenate(following.claims())
    assert (claims.phys[1:] >= claims.phys[:-1]).all()
    for start, end in claimed(following):
        assert start < end
        assert any(first <= start and end <= last for first, last in RAM)
    again = spooled(facts_of(following, luo)).outgoing
    assert (again.luo, again.vmallocs, again.owners) == (
        luo,
        following.vmallocs,
        following.owners,
    )
    loaded = Claims.concatenate(again.claims)
    for name in Claims.DTYPES:
        assert (getattr(loaded, name) == getattr(claims, name)).all()


# vmalloc


def areas(number: int, order: int = 0, apart: int = 2) -> list[int]:
    """Data of one size, not neighbours."""
    return [DATA + n * apart * (PAGE << order) for n in range(number)]


@pytest.mark.parametrize(
    ("entries", "chunks"), [(0, 1), (1, 1), (510, 1), (511, 2), (512, 2), (1022, 3), (1500, 3)]
)
def test_vmalloc(entries: int, chunks: int) -> None:
    machine = Machine()
    pages = areas(entries)
    chain = machine.chain(pages)
    assert len(chain) == chunks
    following = machine.following()
    area, listed = following.vmalloc(desc(chain[0], entries), 0x5008, SOMEBODY)
    assert (area.name, area.phys, area.first, area.flags) == ("somebody", 0x5008, chain[0], 1)
    assert (area.total_pages, area.order, area.chunks, area.listed) == (entries, 0, chunks, entries)
    assert area.problems == []
    assert following.vmallocs == [area]
    assert listed.tolist() == pages
    assert claimed(following, OwnerKind.VMALLOC_PAGE) == [(at, at + PAGE) for at in pages]
    assert claimed(following, OwnerKind.VMALLOC_CHUNK) == [(chain[0], chain[-1] + PAGE)]
    assert {(o.name, o.session, o.token) for o in following.owners} == {
        ("somebody", "a session", 7)
    }
    holds(following)


def test_vmalloc_of_huge_pages() -> None:
    machine = Machine()
    pages = areas(5, order=9, apart=1)
    following = machine.following()
    first = machine.chain(pages)[0]
    area, listed = following.vmalloc(desc(first, 5 << 9, 9, 3), 0, SOMEBODY)
    assert (area.order, area.listed, area.problems) == (9, 5 << 9, [])
    assert listed.tolist() == pages
    # Neighbours are one claim.
    assert claimed(following, OwnerKind.VMALLOC_PAGE) == [(DATA, DATA + 5 * (PAGE << 9))]


@pytest.mark.parametrize("shift", [12, 14, 16])
def test_vmalloc_of_other_page_sizes(shift: int) -> None:
    machine = Machine(Abi.for_page_shift(shift))
    per_chunk = (1 << shift) // 8 - 1
    pages = [DATA + (n << shift) for n in range(per_chunk)]
    chain = machine.chain(pages)
    area, listed = machine.following().vmalloc(desc(chain[0], per_chunk), 0, SOMEBODY)
    assert (area.chunks, area.listed, area.problems) == (2, per_chunk, [])
    assert listed.tolist() == pages


def test_order_of_the_pages_is_kept() -> None:
    machine = Machine()
    pages = areas(20)[::-1]
    following = machine.following()
    _, listed = following.vmalloc(desc(machine.chain(pages)[0], 20), 0, SOMEBODY)
    assert listed.tolist() == pages
    assert claimed(following, OwnerKind.VMALLOC_PAGE) == sorted((at, at + PAGE) for at in pages)


def problems_of(machine: Machine, described: np.void) -> list[str]:
    following = machine.following()
    area, listed = following.vmalloc(described, 0, SOMEBODY)
    assert following.are_pages(listed, PAGE << area.order).all()
    holds(following)
    return area.problems


def test_no_chain() -> None:
    assert problems_of(Machine(), desc(0, 3)) == ["lists 0 pages, total_pages is 3"]


@pytest.mark.parametrize("back", [0, 1, 2])
def test_chain_that_loops(back: int) -> None:
    machine = Machine()
    chain = machine.chain(areas(1200))
    assert len(chain) == 3
    machine.words(chain[-1], chain[back])
    assert problems_of(machine, desc(chain[0], 1200)) == [
        f"chunk 3 at {chain[back]:#x} was there before: the chain loops"
    ]


def test_chain_of_another_area() -> None:
    """The next kernel restores its pages once: the second area is lost."""
    machine = Machine()
    first = machine.chain(areas(3))[0]
    following = machine.following()
    assert following.vmalloc(desc(first, 3), 0, SOMEBODY)[0].problems == []
    area, listed = following.vmalloc(desc(first, 3), 16, replace(SOMEBODY, name="another"))
    assert area.problems[0] == f"chunk 0 at {first:#x} was there before: the chain loops"
    assert (area.chunks, len(listed)) == (0, 0)
    # Both lead to it.
    assert claimed(following, OwnerKind.VMALLOC_CHUNK) == [(first, first + PAGE)] * 2


@pytest.mark.parametrize(
    "at", [RAM[0][1], RAM[0][0] - PAGE, END, DATA + 1, DATA + 8, 2**64 - PAGE, 2**64 - 1, 1]
)
def test_chunk_that_is_no_page_in_ram(at: int) -> None:
    machine = Machine()
    chain = machine.chain(areas(511))
    machine.words(chain[0], at)
    said = [f"chunk 1 at {at:#x} is no readable page in RAM"]
    assert problems_of(machine, desc(chain[0], 511)) == said
    assert problems_of(machine, desc(at, 0)) == [said[0].replace("1", "0", 1)]


def test_chunk_that_cannot_be_read() -> None:
    machine = Machine()
    chain = machine.chain(areas(600))
    machine.unreadable.add(chain[1])
    assert problems_of(machine, desc(chain[0], 600)) == [
        f"chunk 1 at {chain[1]:#x} is no readable page in RAM",
        "lists 511 pages, total_pages is 600",
    ]


def test_chain_that_goes_on() -> None:
    machine = Machine()
    chain = machine.chain(areas(20))
    machine.words(chain[-1], machine.page())
    assert problems_of(machine, desc(chain[0], 20)) == [
        "the chain goes on after 1 chunks: it can have no more"
    ]


@pytest.mark.parametrize("bad", [[END], [DATA + 8], [1, 2**64 - 8], [END - PAGE + 1]])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_entries_that_are_no_pages_in_ram(bad: list[int], place: int) -> None:
    machine = Machine()
    pages = areas(4)
    entries = pages[:place] + bad + pages[place:]
    following = machine.following()
    area, listed = following.vmalloc(desc(machine.chain(entries)[0], len(entries)), 0, SOMEBODY)
    assert area.problems == [f"{len(bad)} entries are no pages in RAM, the first {bad[0]:#x}"]
    # What stands behind a gap is not what it would be taken for.
    assert listed.tolist() == pages[:place]
    assert claimed(following, OwnerKind.VMALLOC_PAGE) == [(at, at + PAGE) for at in pages]
    holds(following)


def test_huge_entry_that_ends_outside_ram() -> None:
    machine = Machine()
    first = machine.chain([END - PAGE])[0]
    assert problems_of(machine, desc(first, 2, 1)) == [
        f"1 entries are no pages in RAM, the first {END - PAGE:#x}"
    ]


@pytest.mark.parametrize(
    ("entries", "order", "twice"),
    [
        ([DATA, DATA], 0, 1),
        ([DATA, DATA + PAGE, DATA, DATA], 0, 2),
        ([DATA, DATA + PAGE], 1, 1),
        ([DATA + PAGE, DATA + 4 * PAGE, DATA], 1, 1),
    ],
)
def test_pages_that_are_listed_twice(entries: list[int], order: int, twice: int) -> None:
    machine = Machine()
    described = desc(machine.chain(entries)[0], len(entries) << order, order)
    assert problems_of(machine, described) == [
        f"{twice} entries list pages that another one lists, too"
    ]


@pytest.mark.parametrize("total", [0, 19, 21, 511, 2**32 - 1])
def test_wrong_number_of_pages(total: int) -> None:
    machine = Machine()
    said = problems_of(machine, desc(machine.chain(areas(20))[0], total))
    assert said == [f"lists 20 pages, total_pages is {total}"]


def test_part_of_an_entry() -> None:
    machine = Machine()
    said = problems_of(machine, desc(machine.chain([DATA])[0], 3, 1))
    assert said == ["lists 2 pages, total_pages is 3"]


@pytest.mark.parametrize("order", [11, 31, 64, 2**16 - 1])
def test_absurd_order(order: int) -> None:
    machine = Machine()
    said = problems_of(machine, desc(machine.chain([DATA])[0], 1, order))
    assert said == [f"order {order} is more than the page allocator has"]


def test_unknown_flags() -> None:
    machine = Machine()
    said = problems_of(machine, desc(machine.chain([DATA])[0], 1, 0, 0xFFFF))
    assert said == ["flags 0xfffc are unknown: they are not restored"]


def test_a_hostile_chain_is_followed_as_far_as_ram_could_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of RAM is one chain of full chunks, and says to list 16 TiB."""
    machine = Machine()
    step = PAGE * PER_CHUNK

    def read(at: int, size: int) -> bytes | None:
        assert size == PAGE
        entries = np.full(PER_CHUNK + 1, DATA + at % step, np.uint64)
        entries[0] = at + PAGE if at + PAGE < END else DATA
        return entries.tobytes()

    monkeypatch.setattr(machine, "read", read)
    following = machine.following()
    area, _ = following.vmalloc(desc(DATA, 2**32 - 1), 0, SOMEBODY)
    assert area.chunks == following.ram_pages // PER_CHUNK + 1
    assert f"the chain goes on after {area.chunks} chunks: it can have no more" in area.problems
    holds(following)


# Blocks


def files(number: int) -> list[bytes]:
    return [np.array([(b"handler", n, n + 1)], LUO_FILE_SER).tobytes() for n in range(number)]


def follow_blocks(machine: Machine, head: int) -> tuple[list[int], list[int], list[str]]:
    """Addresses of the blocks, data of the entries, problems."""
    problems: list[str] = []
    at, entries = machine.following().block_set(head, LUO_FILE_SER, problems, written=True)
    return at.tolist(), entries["data"].tolist(), problems


@pytest.mark.parametrize(("entries", "blocks"), [(0, 0), (1, 1), (63, 1), (64, 2), (200, 4)])
def test_blocks(entries: int, blocks: int) -> None:
    machine = Machine()
    chain = machine.blocks(LUO_FILE_SER, files(entries))
    assert len(chain) == blocks
    found = follow_blocks(machine, chain[0] if chain else 0)
    assert found == (chain, list(range(entries)), [])


@pytest.mark.parametrize("count", [0, 64, 2**32, 2**64 - 1])
def test_block_with_a_wrong_count(count: int) -> None:
    machine = Machine()
    chain = machine.blocks(LUO_FILE_SER, files(70))
    machine.words(chain[0] + 8, count)
    assert follow_blocks(machine, chain[0]) == (
        chain,
        list(range(63, 70)),
        [f"block {chain[0]:#x} says to have {count} entries, 63 fit"],
    )


def test_blocks_that_are_not_written_yet() -> None:
    machine = Machine()
    chain = [machine.page(), machine.page()]
    machine.words(chain[0], chain[1])
    problems: list[str] = []
    at, entries = machine.following().block_set(chain[0], LUO_FILE_SER, problems, written=False)
    assert (at.tolist(), len(entries), problems) == (chain, 0, [])


@pytest.mark.parametrize("back", [0, 1, 2])
def test_blocks_that_loop(back: int) -> None:
    machine = Machine()
    chain = machine.blocks(LUO_FILE_SER, files(150))
    machine.words(chain[-1], chain[back])
    at, entries, problems = follow_blocks(machine, chain[0])
    assert (at, entries) == (chain, list(range(150)))
    assert problems == [f"block 3 at {chain[back]:#x} was there before: the chain loops"]


def test_more_blocks_than_the_kernel_takes() -> None:
    machine = Machine()
    chain = [machine.page() for _ in range(KHO_MAX_BLOCKS + 1)]
    for at, after in zip(chain, [*chain[1:], 0], strict=True):
        machine.words(at, after, 1)
    blocks, entries, problems = follow_blocks(machine, chain[0])
    assert len(blocks) == len(entries) == KHO_MAX_BLOCKS
    assert problems == ["the chain goes on after 10000 blocks: it can have no more"]
    assert follow_blocks(machine, chain[1])[2] == []


@pytest.mark.parametrize("at", [END, DATA + 8, 2**64 - PAGE, 5])
def test_block_that_is_no_page_in_ram(at: int) -> None:
    machine = Machine()
    chain = machine.blocks(LUO_FILE_SER, files(3))
    machine.words(chain[0], at)
    said = [f"block 1 at {at:#x} is no readable page in RAM"]
    assert follow_blocks(machine, chain[0]) == (chain, [0, 1, 2], said)


# memfd

PFN = DATA // PAGE


def follow_memfd(machine: Machine, ser: int) -> tuple[Memfd, list[tuple[int, int]], list[str]]:
    """It, where its data are, and its problems, but for those of the list's own chain."""
    following = machine.following()
    found = following.memfd(ser, SOMEBODY)
    assert isinstance(found, Memfd)
    holds(following)
    return found, claimed(following, OwnerKind.MEMFD), found.problems


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE])
def test_memfd_of_a_page(size: int) -> None:
    machine = Machine()
    ser = machine.memfd([(PFN, 0)], size)
    following = machine.following()
    found = following.memfd(ser, SOMEBODY)
    assert isinstance(found, Memfd)
    assert (found.phys, found.pos, found.size, found.nr_folios) == (ser, 5, size, 1)
    assert (found.pages, found.problems) == (1, [])
    assert found.folios in following.vmallocs
    assert claimed(following, OwnerKind.MEMFD) == [(DATA, DATA + PAGE)]
    assert claimed(following, OwnerKind.FILE) == [(ser, ser + MEMFD_LUO_SER.itemsize)]
    assert [owner.name for owner in following.owners] == [
        "somebody: memfd_luo_ser",
        "somebody: folio list",
        "somebody: folio list",
        "somebody: data",
    ]
    holds(following)


@pytest.mark.parametrize("number", [2, 255, 256, 257, 3000])
def test_memfd_of_many_pages(number: int) -> None:
    """A page of the list holds 256 of them."""
    machine = Machine()
    ser = machine.memfd([(PFN + 2 * n, n) for n in range(number)], number * PAGE)
    found, data, problems = follow_memfd(machine, ser)
    assert (found.pages, problems) == (number, [])
    assert data == [(DATA + 2 * n * PAGE, DATA + (2 * n + 1) * PAGE) for n in range(number)]


def test_memfd_of_folios_of_all_sizes() -> None:
    machine = Machine()
    folios: list[tuple[int, int]] = []
    index = 0
    for order in (9, 0, 0, 4, 1, 9):
        folios.append((PFN + 1024 * len(folios), index))
        index += 1 << order
    found, data, problems = follow_memfd(machine, machine.memfd(folios, index * PAGE))
    assert (found.pages, problems) == (index, [])
    assert sum(end - start for start, end in data) == index * PAGE


@pytest.mark.parametrize(("pages", "seen"), [(1, 1), (2, 2), (3, 4), (300, 512), (512, 512)])
def test_memfd_that_ends_within_its_last_folio(pages: int, seen: int) -> None:
    machine = Machine()
    ser = machine.memfd([(PFN + 1024, 0), (PFN, 1)], (1 + pages) * PAGE - 7)
    found, data, problems = follow_memfd(machine, ser)
    assert (found.pages, problems) == (1 + seen, [])
    assert data[0] == (DATA, DATA + seen * PAGE)


@pytest.mark.parametrize(("order", "seen"), [(9, 512), (3, 8), (0, 4)])
def test_memfd_whose_last_folio_the_tree_knows(order: int, seen: int) -> None:
    """A file of 4 pages, of which the tree says how large their folio is, or has only a part."""
    machine = Machine()
    key = machine.abi.kho_radix_encode_key(DATA, order)
    bitmap = np.zeros((1, PAGE), np.uint8)
    bit = key % machine.abi.leaf_bits
    bitmap[0, bit >> 3] = 1 << (bit & 7)
    following = machine.following()
    following.keys = KeySet(machine.abi, [Leaves(np.array([key - bit], np.uint64), bitmap)])
    found = following.memfd(machine.memfd([(PFN, 0)], 4 * PAGE), SOMEBODY)
    assert isinstance(found, Memfd)
    assert (found.pages, found.problems) == (seen, [])


def test_memfd_without_contents() -> None:
    found, data, problems = follow_memfd(machine := Machine(), machine.memfd([], 0))
    assert (found.folios, found.pages, data, problems) == (None, 0, [], [])


def test_memfd_without_folios() -> None:
    machine = Machine()
    found, _, problems = follow_memfd(machine, machine.memfd([], PAGE))
    assert (found.folios, problems) == (None, [f"{PAGE} bytes and no folio"])


def test_memfd_with_holes() -> None:
    """The kernel steps over a pfn of 0."""
    machine = Machine()
    ser = machine.memfd([(PFN, 0), (0, 1), (PFN + 8, 2)], 3 * PAGE)
    found, data, problems = follow_memfd(machine, ser)
    assert (found.pages, problems) == (2, [])
    assert data == [(DATA, DATA + PAGE), (DATA + 8 * PAGE, DATA + 9 * PAGE)]


@pytest.mark.parametrize(
    ("folios", "size", "said"),
    [
        # pfn outside RAM
        ([(1, 0)], PAGE, "1 folios are not in RAM, or do not end where the next one begins"),
        ([(END // PAGE, 0), (PFN, 1)], 2 * PAGE, "1 folios are not in RAM,"),
        ([(2**52 - 1, 0)], PAGE, "1 folios are not in RAM,"),
        # not aligned to its size, or of a size that no folio has
        ([(PFN + 1, 0)], 2 * PAGE, "1 folios are not in RAM,"),
        ([(PFN, 0), (PFN + 8, 3)], 4 * PAGE, "1 folios are not in RAM,"),
        # not in the order of the file
        ([(PFN, 0), (PFN + 2, 0)], PAGE, "1 folios are not in RAM,"),
        ([(PFN, 0), (PFN + 2, 2**64 - 1)], PAGE, "1 folios lie behind its end"),
        ([(PFN, 4)], 5 * PAGE, "its first folio is that of page 4"),
        # twice
        ([(PFN, 0), (PFN, 1)], 2 * PAGE, "some of its folios are listed twice"),
        ([(PFN + 1, 0), (PFN, 1)], 3 * PAGE, "some of its folios are listed twice"),
        # it shrank
        ([(PFN, 0), (PFN + 1, 1), (PFN + 2, 2)], PAGE, "2 folios lie behind its end"),
        ([(PFN, 0)], 0, "1 folios lie behind its end"),
        # it grew
        ([(PFN, 0), (PFN + 2, 1)], 2**63, "1 folios are not in RAM,"),
        ([(PFN, 0)], 2**64 - 1, "1 folios are not in RAM,"),
    ],
)
def test_broken_memfd(folios: list[tuple[int, int]], size: int, said: str) -> None:
    machine = Machine()
    _, _, problems = follow_memfd(machine, machine.memfd(folios, size))
    assert any(problem.startswith(said) for problem in problems), problems


@pytest.mark.parametrize("number", [4, 257, 2**32, 2**63, 2**64 - 1])
def test_more_folios_than_the_list_has(number: int) -> None:
    machine = Machine()
    ser = machine.memfd([(PFN + n, n) for n in range(3)], 3 * PAGE, number)
    found, data, problems = follow_memfd(machine, ser)
    assert found.nr_folios == number
    # The rest of its page is 0.  Where the last one ends is not known.
    assert data[0][0] == DATA
    assert found.pages <= 256
    assert problems


def test_list_that_cannot_be_read_in_the_middle() -> None:
    machine = Machine()
    machine.memfd([(PFN + n, n) for n in range(1024)], 1024 * PAGE)
    ser = max(machine.pages)
    chunk = ser - PAGE
    listed = np.frombuffer(machine.pages[chunk], np.uint64)[1:5].tolist()
    # Neighbours in memory are read together: apart they are read one by one.
    moved = machine.page()
    machine.write(machine.page(), b"")
    machine.words(chunk + 8 + 16, moved)
    machine.write(moved, bytes(machine.pages[listed[2]]))
    machine.unreadable.add(moved)
    _, data, problems = follow_memfd(machine, ser)
    assert problems == ["of 1024 folios only the first 511 can be read"]
    assert data == [(DATA, DATA + 511 * PAGE)]


def test_list_with_a_gap_is_read_up_to_it() -> None:
    machine = Machine()
    ser = machine.memfd([(PFN + n, n) for n in range(1024)], 1024 * PAGE)
    machine.words(ser - PAGE + 16, END)
    found, data, problems = follow_memfd(machine, ser)
    assert problems == ["of 1024 folios only the first 255 can be read"]
    assert data == [(DATA, DATA + 255 * PAGE)]
    assert found.folios is not None
    assert found.folios.problems == [f"1 entries are no pages in RAM, the first {END:#x}"]


def test_list_of_huge_pages() -> None:
    machine = Machine()
    machine.write(DATA, b"".join(u64(PFN + 1024 + n) + u64(n) for n in range(200)))
    first = machine.chain([DATA])[0]
    ser = machine.page()
    machine.write(ser, machine.record(MEMFD_LUO_SER, 0, 200 * PAGE, 0, 0, 200, (first, 512, 3, 9)))
    found, data, problems = follow_memfd(machine, ser)
    assert (found.pages, problems) == (200, [])
    assert data == [(DATA + 1024 * PAGE, DATA + 1224 * PAGE)]
    # As much as is wanted of it.
    assert machine.bytes_read == MEMFD_LUO_SER.itemsize + PAGE + 200 * 16


def test_memfd_v1() -> None:
    """It has no room for seals, so all else lies in front of where it is in memfd-v2."""
    machine = Machine()
    ser = machine.memfd([(PFN, 0), (PFN + 8, 1)], PAGE + 1, handler=MEMFD_V1)
    following = machine.following()
    found = following.memfd(ser, SOMEBODY, MEMFD_V1)
    assert isinstance(found, Memfd)
    assert (found.pos, found.size, found.seals, found.flags) == (5, PAGE + 1, 0, 0)
    assert (found.nr_folios, found.pages, found.problems) == (2, 2, [])
    assert found.folios is not None
    assert (found.folios.phys, found.folios.problems) == (ser + 24, [])
    assert claimed(following, OwnerKind.FILE) == [(ser, ser + MEMFD_LUO_SER_V1.itemsize)]
    assert len(claimed(following, OwnerKind.MEMFD)) == 2
    holds(following)
    # Whoever takes one for the other finds something wrong.
    other = machine.following().memfd(ser, SOMEBODY)
    assert isinstance(other, Memfd)
    assert other.problems


def test_memfd_v1_that_is_empty() -> None:
    machine = Machine()
    found = machine.following().memfd(machine.memfd([], 0, handler=MEMFD_V1), SOMEBODY, MEMFD_V1)
    assert isinstance(found, Memfd)
    assert (found.size, found.folios, found.pages, found.problems) == (0, None, 0, [])


@pytest.mark.parametrize("at", [0, 8, END, DATA + 8, 2**64 - 1, 2**63])
def test_no_memfd_there(at: int) -> None:
    said = f"struct memfd_luo_ser at {at:#x} is no readable page in RAM"
    assert Machine().following().memfd(at, SOMEBODY) == said


def test_all_files_together_have_no_more_folios_than_ram_has_pages() -> None:
    """Every file lists all of RAM anew: what it takes is not files times RAM."""
    machine = Machine()
    lists = list(range(DATA, DATA + (4 << 20), PAGE))
    following = machine.following()
    most = following.ram_pages
    for _ in range(8):
        first = machine.chain(lists)[0]
        ser = machine.page()
        machine.write(
            ser,
            machine.record(MEMFD_LUO_SER, 0, 2**63, 0, 0, 2**63, (first, len(lists), 1, 0)),
        )
        assert isinstance(following.memfd(ser, SOMEBODY), Memfd)
    assert machine.bytes_read < most * 16 + 8 * (len(lists) // PER_CHUNK + 3) * PAGE
    holds(following)


# What the root FDT leads to


def test_subtree_blobs() -> None:
    fdt = Fdt(
        DATA,
        "kho-v4",
        0x1000,
        [
            Subtree("LUO", DATA + PAGE, 32),
            Subtree("odd", None, 8),
            Subtree("empty", DATA, 0),
            Subtree("nameless", DATA, None),
            Subtree("outside", END - 8, 16),
            Subtree("endless", DATA, 2**64 - 1),
            Subtree("nowhere", 2**64 - 1, 2**64 - 1),
        ],
    )
    following = Machine().following()
    following.subtrees(fdt, {})
    assert claimed(following) == [(DATA, DATA + PAGE), (DATA + PAGE, DATA + PAGE + 32)]
    assert [owner.name for owner in following.owners] == ["root FDT", "subtree LUO"]
    holds(following)


def memblock(*reserved: tuple[str, int, int]) -> dict[str, bytes]:
    nodes = {
        name: {"compatible": b"reserve-mem-v1\0", "start": u64(start), "size": u64(size)}
        for name, start, size in reserved
    }
    return {"subtree memblock": blob({"compatible": b"memblock-v1\0"}, nodes)}


def test_reserve_mem() -> None:
    following = Machine().following()
    following.subtrees(Fdt(0), memblock(("oops", DATA, 0x5000), ("trace", DATA + 0x8000, 1)))
    assert claimed(following, OwnerKind.RESERVE_MEM) == [
        (DATA, DATA + 0x5000),
        (DATA + 0x8000, DATA + 0x8001),
    ]
    assert [owner.name for owner in following.owners] == ["reserve_mem oops", "reserve_mem trace"]


def test_reserve_mem_is_claimed_wherever_it_is_said_to_be() -> None:
    """That is how it is told that it is not preserved."""
    following = Machine().following()
    following.subtrees(Fdt(0), memblock(("oops", 2**64 - 1, 2**64 - 1), ("none", DATA, 0)))
    assert [claims.phys.tolist() for claims in following.claims()] == [[2**64 - 1]]
    assert spooled(facts_of(following)).outgoing.owners == following.owners


def kho_test(
    machine: Machine, entries: list[int], count: int | None = None, **other: bytes
) -> tuple[Fdt, dict[str, bytes]]:
    listed = machine.page()
    machine.words(listed, *entries)
    folios = np.array([(machine.chain([listed])[0], 1, 1, 0)], KHO_VMALLOC).tobytes()
    number = len(entries) if count is None else count
    properties = {"nr_folios": number.to_bytes(4, "little"), "folios_info": folios, **other}
    tree = blob({"compatible": b"kho-test-v1\0"}, {"data": properties})
    return Fdt(0, subtrees=[Subtree("kho_test", DATA, 1024)]), {"subtree kho_test": tree}


def follow_kho_test(machine: Machine, *made: Any, **other: Any) -> tuple[Any, list[str]]:
    """Its folios and its problems."""
    following = machine.following()
    following.subtrees(*kho_test(machine, *made, **other))
    holds(following)
    folios = [
        owner
        for owner in following.owners
        if owner == Owner(OwnerKind.KHO_TEST, "kho_test: folios")
    ]
    found = claimed(following, OwnerKind.KHO_TEST) if folios else []
    return found, [problem for area in following.vmallocs for problem in area.problems]


def test_kho_test() -> None:
    machine = Machine()
    found = follow_kho_test(machine, [DATA + (8 << 20) | 3, DATA, DATA + (4 << 20) | 10])
    assert found == (
        [
            (DATA, DATA + PAGE),
            (DATA + (4 << 20), DATA + (8 << 20) + (PAGE << 3)),
        ],
        [],
    )


@pytest.mark.parametrize(
    ("entries", "count", "said"),
    [
        ([DATA | 11], 1, "1 of the folios in it are not in RAM"),
        ([DATA, END], 2, "1 of the folios in it are not in RAM"),
        ([DATA, END - PAGE | 1], 2, "1 of the folios in it are not in RAM"),
        ([DATA, DATA], 2, "some of the folios in it are listed twice"),
        ([DATA, DATA | 1], 2, "some of the folios in it are listed twice"),
        ([DATA], 513, "of 513 folios only the first 512 can be read"),
        ([DATA], 2**32 - 1, "of 4294967295 folios only the first 512 can be read"),
    ],
)
def test_broken_kho_test(entries: list[int], count: int, said: str) -> None:
    found, problems = follow_kho_test(Machine(), entries, count)
    assert said in problems
    assert all(end - start <= 2 * PAGE for start, end in found)


@pytest.mark.parametrize(
    "other", [{"nr_folios": b"\xff" * 5000}, {"nr_folios": b""}, {"folios_info": bytes(15)}]
)
def test_kho_test_properties_of_odd_length(other: dict[str, bytes]) -> None:
    assert follow_kho_test(Machine(), [DATA], **other) == ([], [])


def test_kho_test_of_two_subtrees_of_that_name() -> None:
    machine = Machine()
    fdt, blobs = kho_test(machine, [DATA])
    twice = replace(fdt, subtrees=[Subtree("kho_test", None, None), *fdt.subtrees])
    following = machine.following()
    following.subtrees(twice, blobs)
    assert [area.problems for area in following.vmallocs] == [[]]


# Claims


def test_claims_are_sorted_and_joined() -> None:
    following = Machine().following()
    a, b = Owner(OwnerKind.FILE, "a"), Owner(OwnerKind.FILE, "b")
    following.claim(a, np.array([DATA + 3 * PAGE, DATA + 4 * PAGE], np.uint64), PAGE)
    following.claim(b, DATA + PAGE, PAGE)
    following.claim(b, DATA + 2 * PAGE, 5)
    following.claim(a, DATA, PAGE)
    following.claim(a, np.zeros(0, np.uint64), PAGE)
    assert following.owners == [a, b, a]
    (claims,) = following.claims()
    rows = zip(claims.phys.tolist(), claims.size.tolist(), claims.owner.tolist(), strict=True)
    assert list(rows) == [
        (DATA, PAGE, 2),
        (DATA + PAGE, PAGE + 5, 1),
        (DATA + 3 * PAGE, 2 * PAGE, 0),
    ]


def test_no_claims() -> None:
    assert Machine().following().claims() == []


def test_many_claims_are_kept_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 4 KiB folios far apart has one each: more than a member of a file may hold."""
    monkeypatch.setattr(follow, "CLAIMS_KEPT", 4)
    following = Machine().following()
    following.claim(SOMEBODY, np.array(areas(10), np.uint64), PAGE)
    assert [len(claims) for claims in following.claims()] == [4, 4, 2]
    holds(following)


# Whatever memory holds


def bound(machine: Machine, following: ClientWalker, luo: Luo | None = None) -> None:
    assert machine.bytes_read < 64 << 20
    holds(following, luo)


#: Words that chains are made of, and that break them.
WORDS = st.sampled_from(
    [
        *(RAM[0][0] + n * PAGE for n in range(12)),
        *(DATA + n * PAGE for n in range(4)),
        RAM[0][0] + 8,
        RAM[0][1],
        RAM[0][1] - PAGE,
        END - PAGE,
        END,
        *range(8),
        63,
        64,
        511,
        512,
        2**32,
        2**63,
        2**64 - PAGE,
        2**64 - 1,
    ]
) | st.integers(0, 2**64 - 1)


@st.composite
def scribbled(draw: st.DrawFn, machine: Machine) -> Machine:
    """The same memory with some words of it written over, and some pages unreadable."""
    used = sorted(machine.pages)
    for _ in range(draw(st.integers(0, 8))):
        # Most of a page is not looked at: mostly where it begins.
        word = draw(st.integers(0, 9) | st.integers(0, PAGE // 8 - 1))
        machine.words(draw(st.sampled_from(used)) + 8 * word, draw(WORDS))
    machine.unreadable |= draw(st.sets(st.sampled_from(used), max_size=1))
    return machine


@st.composite
def vmallocs(draw: st.DrawFn) -> tuple[Machine, list[np.void]]:
    """Areas that may be broken, and share what is theirs."""
    machine = Machine()
    found = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.sampled_from([0, 0, 1, 9, 10, 11, 2**16 - 1]))
        number = draw(st.integers(0, 5) | st.sampled_from([511, 600]))
        first = machine.chain(areas(number, min(order, 9)))[0]
        total = draw(st.just(number << min(order, 9)) | st.integers(0, 2**32 - 1))
        flags = draw(st.just(1) | st.integers(0, 2**16 - 1))
        found.append(desc(draw(st.just(first) | WORDS), total, order, flags))
    return draw(scribbled(machine)), found


@fuzz
@given(vmallocs())
def test_any_vmalloc(made: tuple[Machine, list[np.void]]) -> None:
    machine, described = made
    following = machine.following()
    for number, each in enumerate(described):
        area, listed = following.vmalloc(each, 16 * number, SOMEBODY)
        assert following.are_pages(listed, PAGE << area.order).all()
        assert area.problems or area.total_pages == len(listed) << area.order
    bound(machine, following)


@st.composite
def memfds(draw: st.DrawFn) -> tuple[Machine, int]:
    machine = Machine()
    orders = draw(st.lists(st.sampled_from([0, 0, 1, 9]), max_size=8))
    folios, index = [], 0
    for number, order in enumerate(orders):
        folios.append((PFN + 1024 * number, index))
        index += 1 << order
    size = draw(st.just(index * PAGE) | st.integers(0, index * PAGE) | WORDS)
    ser = machine.memfd(folios, size, draw(st.none() | st.integers(0, 9) | WORDS))
    return draw(scribbled(machine)), ser


@fuzz
@given(memfds())
def test_any_memfd(made: tuple[Machine, int]) -> None:
    machine, ser = made
    following = machine.following()
    found = following.memfd(ser, SOMEBODY)
    if isinstance(found, Memfd):
        data = sum(end - start for start, end in claimed(following, OwnerKind.MEMFD))
        assert data <= found.pages * PAGE
        assert found.problems or data == found.pages * PAGE
    bound(machine, following)


@fuzz
@given(
    st.lists(st.tuples(WORDS, st.integers(0, 12)), max_size=6),
    st.just(None) | st.integers(0, 2**32 - 1),
    st.data(),
)
def test_any_kho_test(
    entries: list[tuple[int, int]], count: int | None, data: st.DataObject
) -> None:
    machine = Machine()
    words = [word & ~(PAGE - 1) | order for word, order in entries]
    made = kho_test(machine, words, count)
    data.draw(scribbled(machine))
    following = machine.following()
    following.subtrees(*made)
    bound(machine, following)
