# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read of struct pages, against a slow plain model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from khoscope.abi.keys import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, Abi, Stamp
from khoscope.facts.columns import Blocks, Pages
from khoscope.facts.invariants import of_blocks
from khoscope.facts.page_runs import PageKnowledge, PageRuns
from khoscope.sources import pages as pages_module
from khoscope.sources.pages import InvertedTypes, PageLayout, PageReader
from tests.synthetic import FIXED, PLAIN

#: As on x86-64, linux 7.2.
LAYOUT = PageLayout(
    vmemmap=0xFFFFEA0000000000,
    size=64,
    flags=0,
    private=40,
    refcount=52,
    page_type=48,
    compound=8,
    lru=8,
    mapping=24,
    head_bit=6,
    buddy_type=0xF0,
    flag_count=23,
)
STRUCT_PAGE = np.dtype(
    {
        "names": ["flags", "info", "prev", "mapping", "private", "page_type", "refcount"],
        "formats": ["<u8", "<u8", "<u8", "<u8", "<u8", "<u4", "<i4"],
        "offsets": [0, 8, 16, 24, 40, 48, 52],
        "itemsize": 64,
    }
)
HEAD = 1 << 6
BUDDY = 0xF0000000
NO_PAGE_TYPE = 0xFFFFFFFF
#: struct pages in a page.
TOGETHER = 64


@dataclass
class Vmemmap:
    """The struct pages of a small machine."""

    abi: Abi = FIXED
    count: int = 2048
    #: pfns whose struct pages cannot be read; whole pages of them, as hide() makes them.
    unreadable: set[int] = field(default_factory=set)
    layout: PageLayout = LAYOUT

    def __post_init__(self) -> None:
        self.pages = np.zeros(self.count, STRUCT_PAGE)
        self.pages["page_type"] = NO_PAGE_TYPE
        self.reads = 0

    def read(self, address: int, size: int) -> bytes | None:
        self.reads += 1
        offset = address - LAYOUT.vmemmap
        if offset < 0 or offset + size > self.count * 64:
            return None
        asked = range(offset // 64, (offset + size - 1) // 64 + 1)
        if not self.unreadable.isdisjoint(asked):
            return None
        return self.pages.tobytes()[offset : offset + size]

    def reader(self) -> PageReader:
        return PageReader(self.abi, self.layout, self.read, self.count)

    def hide(self, first: int, count: int) -> None:
        """Make struct pages unreadable: memory is there, or not, by the page that holds them."""
        self.unreadable |= set(range(first * TOGETHER, (first + count) * TOGETHER))

    def facts(self, *blocks: tuple[int, int]) -> Pages:
        """The facts of some blocks, given as (pfn, order)."""
        return self.reader().with_pages(columns(blocks)).facts

    def node(self, pfn: int) -> int:
        """The address of a page's ``lru``."""
        return LAYOUT.vmemmap + pfn * 64 + LAYOUT.lru

    def is_pristine(self, pfn: int) -> bool:
        page = self.pages[pfn]
        return (
            {int(page["info"]), int(page["prev"])} == {self.node(pfn)}
            and not page["mapping"]
            and page["page_type"] == NO_PAGE_TYPE
            and not int(page["flags"]) % (1 << LAYOUT.flag_count)
        )

    def is_free(self, pfn: int) -> bool:
        """Whether the buddy allocator holds a page: in any free block around it."""
        region = pfn >> self.abi.max_page_order << self.abi.max_page_order
        return any(
            at not in self.unreadable
            and int(self.pages["page_type"][at]) >> 24 == 0xF0
            and pfn < at + (1 << min(int(self.pages["private"][at]), self.abi.max_page_order))
            for at in range(region, pfn + 1)
        )


def columns(blocks: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> Blocks:
    pfns = np.array([pfn for pfn, _ in blocks], np.uint64)
    orders = np.array([order for _, order in blocks], np.uint8)
    nothing = np.zeros(len(blocks), np.uint64)
    return Blocks(nothing, pfns << np.uint64(12), orders, nothing.astype(np.int8))


def plain_facts(memory: Vmemmap, pfn: int, order: int) -> dict[str, int]:
    """A row of facts, page by page.  What the model does not know is left out."""
    names = ["zeros", "ones", "others", "odd", "free", "head", "private", "flags", "page_type"]
    names.append("pristine")
    row = {"unread": 0, "compound": Pages.NOT_COMPOUND, **dict.fromkeys(names, 0)}
    if order == BAD_ORDER:
        return row
    there = range(pfn, max(pfn, min(pfn + (1 << order), memory.count)))
    readable = [at for at in there if at not in memory.unreadable]
    row["unread"] = min((1 << order) - len(there), 1 << 31) + len(there) - len(readable)
    refcounts = memory.pages["refcount"].tolist()
    for at in readable:
        if at > pfn:
            count = refcounts[at]
            row["zeros" if count == 0 else "ones" if count == 1 else "others"] += 1
        row["free"] += int(memory.pages["page_type"][at]) >> 24 == 0xF0
        row["pristine"] += memory.is_pristine(at)
    if len(readable) == len(there):
        odd = [at - pfn for at in there[2:] if refcounts[at] != refcounts[pfn + 1]]
        row["odd"] = odd[0] if odd else 0
    else:
        del row["odd"]
    if pfn in readable:
        page = memory.pages[pfn]
        for name, column in (("head", "refcount"), ("private", "private"), ("flags", "flags")):
            row[name] = int(page[column])
        row["page_type"] = int(page["page_type"])
        if pfn + 1 < memory.count and pfn + 1 not in memory.unreadable:
            if page["info"] & 1:
                row["compound"] = Pages.COMPOUND_TAIL
            elif page["flags"] & HEAD and memory.pages["info"][pfn + 1] & 1:
                row["compound"] = min(int(memory.pages["flags"][pfn + 1]) & 0xFF, 127)
        suspect = row["head"] == 0 and row["free"] == 0 and row["unread"] == 0
        if suspect and row["compound"] == Pages.NOT_COMPOUND and row["page_type"] >> 24 == 0xFF:
            row["free"] = int(memory.is_free(pfn))
    return row


@st.composite
def machines(draw: st.DrawFn) -> Vmemmap:
    """Struct pages with long and short runs of refcounts, and everything else now and then."""
    memory = Vmemmap(draw(st.sampled_from([PLAIN, FIXED])), draw(st.sampled_from([1024, 1500])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = memory.count
    lengths = rng.choice([1, 2, 7, 60, 300], n)
    counts = rng.choice(np.array([0, 0, 1, 1, 2, -1, 4096], np.int32), n)
    memory.pages["refcount"] = np.repeat(counts, lengths)[:n]
    if draw(st.booleans()):
        nodes = np.arange(n, dtype=np.uint64) * np.uint64(64) + np.uint64(memory.node(0))
        memory.pages["info"] = memory.pages["prev"] = nodes
        memory.pages["flags"] = 1 << 56
    odd = draw(st.sampled_from([0.0, 0.05, 0.5]))

    def sometimes(column: str, values: list[int]) -> None:
        pick = rng.random(n) < odd
        memory.pages[column][pick] = rng.choice(np.array(values, np.uint64), int(pick.sum()))

    sometimes("flags", [HEAD, HEAD | 3, 3, 9, 0xFFFF, 1 << 56])
    sometimes("prev", [0, 0xDEAD000000000122])
    sometimes("mapping", [0, 0x400])
    sometimes("info", [1, 1, 2, 64])
    sometimes("private", [0, 1, 3, 10, 11, 1 << 40])
    sometimes("page_type", [BUDDY, BUDDY | 5, 0xF5000000, 7, 0])
    for _ in range(draw(st.integers(0, 2))):
        first = draw(st.integers(0, n // TOGETHER))
        memory.hide(first, draw(st.integers(1, 4)))
    return memory


def with_a_hole() -> Vmemmap:
    """
    The head of a free block in a page that cannot be read, and one right behind it.

    The first covers both pages that test_facts_against_a_model asks for, the second one of them.
    """
    memory = Vmemmap(PLAIN, 1024)
    for head, order in ((60, 10), (TOGETHER, 8)):
        memory.pages["page_type"][head] = BUDDY
        memory.pages["private"][head] = order
    memory.hide(0, 1)
    return memory


@settings(max_examples=100)
@given(
    machines(),
    st.lists(
        st.tuples(
            st.integers(0, 1600),
            st.integers(0, 6) | st.sampled_from([9, 11, 32, 40, BAD_ORDER]),
        ),
        max_size=12,
    ),
    st.sampled_from([1, 2, 3, 16, 64, 1 << 15]),
    st.sampled_from([0, 1, 10, 1 << 10]),
)
@example(with_a_hole(), [(370, 0), (300, 0), (63, 0)], 1, 0)
def test_facts_against_a_model(
    memory: Vmemmap, blocks: list[tuple[int, int]], window: int, gap: int
) -> None:
    """Blocks of all sizes, which may overlap and leave RAM, in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_module, "WINDOW", window)
        patch.setattr(pages_module, "GAP", gap)
        facts = memory.facts(*blocks)
    assert len(facts) == len(blocks)
    for i, (pfn, order) in enumerate(blocks):
        wanted = plain_facts(memory, pfn, order)
        assert {name: int(getattr(facts, name)[i]) for name in wanted} == wanted


def test_what_is_known_of_blocks_stays() -> None:
    memory = Vmemmap()
    key = np.array([7, 8], np.uint64)
    blocks = Blocks(
        key, key << np.uint64(12), np.array([0, 0], np.uint8), np.array([0, 1], np.int8)
    )
    with_pages = memory.reader().with_pages(blocks)
    for name in Blocks.DTYPES:
        assert getattr(with_pages, name) is getattr(blocks, name)
    assert len(memory.facts()) == 0


def test_compound_pages() -> None:
    memory = Vmemmap()
    memory.pages["flags"][8] = HEAD
    memory.pages["flags"][9] = 3
    memory.pages["info"][9:16] = LAYOUT.vmemmap + 8 * 64 + 1
    facts = memory.facts((8, 3), (9, 0), (12, 2), (16, 0))
    tail = Pages.COMPOUND_TAIL
    assert facts.compound.tolist() == [3, tail, tail, Pages.NOT_COMPOUND]
    memory.pages["flags"][9] = 0xFE
    assert memory.facts((8, 3)).compound.tolist() == [127]


def optimised(memory: Vmemmap, head: int, order: int, kept: int) -> None:
    """
    A hugetlb folio as the kernel before linux 7.1 has it: behind the first ones, the struct pages
    of each page of them are those of the first.

    :param kept: struct pages that it has.
    """
    at = LAYOUT.vmemmap + head * 64
    pages = memory.pages[head : head + (1 << order)]
    pages["flags"] = 1 << 56
    pages["info"] = at + 1
    pages["prev"] = 0xDEAD000000000122
    pages["refcount"] = 0
    pages["info"][0] = at + LAYOUT.lru
    pages["flags"][0] |= HEAD
    pages["refcount"][0] = 3
    pages["private"][0] = 0xAAAA
    pages["page_type"][0] = HUGETLB
    pages["flags"][1] |= order
    for first in range(kept, 1 << order, TOGETHER):
        pages[first : first + TOGETHER] = pages[kept - TOGETHER : kept]


HUGETLB = 0xF4000000
OLDER = replace(LAYOUT, fake_heads=True)


@pytest.mark.parametrize("kept", [64, 128])
@pytest.mark.parametrize("window", [1, 63, 64, 65, 1 << 15])
def test_fake_heads(kept: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page of struct pages is left of a folio, or two; all others are the last one again."""
    monkeypatch.setattr(pages_module, "WINDOW", window)
    tail = Pages.COMPOUND_TAIL
    plain, memory = Vmemmap(layout=OLDER), Vmemmap(layout=OLDER)
    # The struct pages of neighbours are their own, and one is a folio, too.
    for each in (plain, memory):
        each.pages["flags"][1024] = HEAD
        each.pages["flags"][1025] = 1
        each.pages["info"][1025] = LAYOUT.vmemmap + 1024 * 64 + 1
        each.pages["refcount"][1024] = 1
    optimised(plain, 512, 9, 512)
    optimised(memory, 512, 9, kept)
    blocks = [(512, 9), (512, 8), (576, 6), (640, 0), (639, 0), (1024, 1), (448, 7), (500, 10)]
    blocks += [(1000, 5)]
    facts = memory.facts(*blocks)
    assert facts.head.tolist() == [3, 3, 0, 0, 0, 1, 0, 0, 0]
    assert facts.zeros.tolist() == [511, 255, 63, 0, 0, 1, 126, 1021, 30]
    assert facts.ones.tolist() == [0] * 6 + [0, 1, 1]
    assert facts.compound.tolist() == [9, 9, tail, tail, tail, 1, *[Pages.NOT_COMPOUND] * 2, tail]
    wanted = plain.facts(*blocks)
    for name in Pages.DTYPES:
        assert getattr(facts, name).tolist() == getattr(wanted, name).tolist(), name
    # As a kernel from linux 7.1 on would be read, the pages look like heads that are held.
    newer = replace(memory, layout=LAYOUT)
    newer.pages[:] = memory.pages
    if kept == 64:
        assert newer.facts((512, 9)).others.tolist() == [7]


#: Bit 4 of ``private``, as on linux 6.16 to 7.3.
SHARING = replace(LAYOUT, hugetlb_type=HUGETLB >> 24, optimized=1 << 4)
#: Where a large folio begins and ends.
FOLIO = (4096, 8192)


def sharing(older: bool) -> Vmemmap:
    """
    Memory with an optimised hugetlb folio at ``FOLIO``.

    Since linux 7.1 the struct pages that tails share are not those of their head; here one in each
    page of them is odd.
    """
    memory = Vmemmap(count=12288, layout=replace(SHARING, fake_heads=older))
    head, end = FOLIO
    optimised(memory, head, 12, TOGETHER if older else end - head)
    memory.pages["private"][head] = 0x12
    if older:
        memory.pages["private"][head:end:TOGETHER] = 0x12
    else:
        # Of the mask of the folio's addresses, which the tails of all folios share.
        memory.pages["info"][head + 1 : end] = (-(64 << 12)) % (1 << 64) + 1
        memory.pages["refcount"][head + TOGETHER + 5 : end : TOGETHER] = 7
    return memory


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("window", [1, 63, 64, 65, 1000, 1 << 15])
def test_tails_that_share_struct_pages_are_not_counted(
    older: bool, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_module, "WINDOW", window)
    memory = sharing(older)
    # The folio; its first half; a block with pages behind it, which are their own.
    blocks = columns([(4096, 12), (4096, 11), (0, 13)])
    blocks = memory.reader().with_pages(blocks)
    facts = blocks.facts
    assert facts.zeros.tolist()[:2] == [63, 63]
    assert (
        facts.odd.tolist()[:2] == facts.others.tolist()[:2] == facts.unread.tolist()[:2] == [0, 0]
    )
    assert blocks.shared.tolist() == [(1 << 12) - 64, (1 << 11) - 64, 0]
    assert int(facts.tails[2]) == (1 << 13) - 1
    assert not of_blocks(FIXED, replace_keys(blocks))
    # Without the flag, each of them is taken for its own.
    memory.pages["private"][FOLIO[0] : FOLIO[1]] = 0x2
    facts = memory.facts((4096, 12))
    assert int(facts.tails[0]) == (1 << 12) - 1
    assert (int(facts.others[0]) > 0) == (not older)


def replace_keys(blocks: Blocks) -> Blocks:
    """The same with the keys that they have in a tree."""
    rows = zip(blocks.phys.tolist(), blocks.order.tolist(), strict=True)
    keys = [FIXED.kho_radix_encode_key(phys, order, 0) for phys, order in rows]
    return replace(blocks, key=np.array(keys, np.uint64))


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("first", [0, 4096, 6000, 8191])
def test_tails_that_share_struct_pages_page_by_page(
    older: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever one begins to look, and wherever a window begins."""
    monkeypatch.setattr(pages_module, "WINDOW", 1024)
    memory = sharing(older)
    found = PageRuns.concatenate(memory.reader().pages(first, 12288))
    pfns = np.arange(first, 12288)
    shared = (pfns >= FOLIO[0] + TOGETHER) & (pfns < FOLIO[1])
    assert ((found.seen == PageKnowledge.SHARED) == shared).all()
    assert set(found.compound[shared].tolist()) <= {Pages.COMPOUND_TAIL}
    assert not found.refcount[pfns != FOLIO[0]].any()


def test_a_folio_that_leads_nowhere() -> None:
    """Struct pages may hold anything: tails of a head outside RAM, of one that is a tail itself."""
    memory = sharing(False)
    for head in (-(1 << 20), 1 << 20, 0, 4096, 6143):
        memory.pages["info"][6144:8192] = (LAYOUT.vmemmap + head * 64) % (1 << 64) + 1
        memory.pages["info"][4096] = 1
        found = PageRuns.concatenate(memory.reader().pages(6144, 12288))
        assert (found.seen == PageKnowledge.READ).all()


def test_fake_heads_page_by_page() -> None:
    plain, memory = Vmemmap(layout=OLDER), Vmemmap(layout=OLDER)
    for each, kept in ((plain, 512), (memory, 64)):
        each.pages["page_type"][100] = BUDDY
        each.pages["private"][100] = 2
        optimised(each, 512, 9, kept)
        # The head is stamped; a stamp of a tail is none.
        each.pages["private"][512::64] = FIXED.stamp.encode(9)
        each.pages["private"][513 if kept == 512 else 1024 :] = 0
    first, second = (
        [runs for runs in each.reader().pages(64, 1100) if len(runs)] for each in (plain, memory)
    )
    for one, other in zip(first, second, strict=True):
        for name, values in vars(one).items():
            assert values.tolist() == getattr(other, name).tolist(), name
    [stamps], scanned, _ = stamped(memory, [(0, 2048 * 4096)])
    assert (stamps.phys.tolist(), scanned) == ([512 * 4096], 2048)


@pytest.mark.parametrize(
    ("flags", "info", "fake"),
    [
        (HEAD, 1 + 64 * 64, True),
        # A folio of its own; no head; a page that is followed by no tail; leads to nowhere.
        (HEAD, 1 + 128 * 64, False),
        (3, 1 + 64 * 64, False),
        (HEAD, 64 * 64, False),
    ],
)
def test_what_a_fake_head_is(flags: int, info: int, fake: bool) -> None:
    """The one at 128 says that it is a head; the page behind it says whose."""
    memory = Vmemmap(layout=OLDER)
    memory.pages["refcount"] = 1
    memory.pages["flags"][128] = flags
    memory.pages["info"][129] = info + LAYOUT.vmemmap
    tail = memory.facts((128, 0)).compound.tolist() == [Pages.COMPOUND_TAIL]
    assert (tail, memory.facts((128, 0)).head.tolist()) == (fake, [0 if fake else 1])
    # Only the first struct page of a page of them can be one.
    memory.pages["flags"][130] = HEAD
    memory.pages["info"][131] = LAYOUT.vmemmap + 64 * 64 + 1
    assert memory.facts((130, 0)).head.tolist() == [1]


def test_pages_as_the_boot_left_them() -> None:
    memory = Vmemmap()
    memory.pages["info"] = [memory.node(pfn) for pfn in range(memory.count)]
    memory.pages["prev"] = memory.pages["info"]
    # Whom a page belongs to by number, its refcount and what KHO wrote into it do not matter.
    memory.pages["flags"] = 0xFFFF << 48
    memory.pages["refcount"] = 1
    memory.pages["private"] = 7
    assert memory.facts((0, 4), (16, 0), (17, 0)).pristine.tolist() == [16, 1, 1]
    for n, (column, value) in enumerate(
        [
            ("flags", 1),
            ("flags", 1 << 22),
            ("info", 0xDEAD000000000100),
            ("prev", 0xDEAD000000000122),
            ("info", 0),
            ("mapping", 0x400),
            ("page_type", 0),
            ("page_type", BUDDY),
        ]
    ):
        memory.pages[column][16 * n + 3] = value
    assert memory.facts(*((16 * n, 4) for n in range(9))).pristine.tolist() == [15] * 8 + [16]


def test_inside_a_free_block() -> None:
    """The allocator marks the first page of its block only."""
    memory = Vmemmap()
    memory.pages["page_type"][1024] = BUDDY
    memory.pages["private"][1024] = 9
    held = 1024 + 40
    memory.pages["refcount"][held] = 1
    blocks = [(1023, 0), (1024, 0), (1025, 0), (1024 + 256, 4), (1024 + 512, 0), (1024, 5)]
    assert memory.facts(*blocks).free.tolist() == [0, 1, 1, 1, 0, 1]
    # Who holds a page is believed.
    assert memory.facts((held, 0)).free.tolist() == [0]
    # The head of a free block may stand in the middle of what was preserved.
    assert memory.facts((1020, 3)).free.tolist() == [1]


def test_on_a_free_list() -> None:
    memory = Vmemmap()
    node = {pfn: LAYOUT.vmemmap + pfn * 64 + LAYOUT.lru for pfn in (10, 11, 12, 13)}
    # 10 and 11 hang on each other; 12 points at 11, which does not point back; 13 at itself.
    for pfn, neighbour in ((10, 11), (11, 10), (12, 11), (13, 13)):
        memory.pages["info"][pfn] = memory.pages["prev"][pfn] = node[neighbour]
    blocks = [(10, 0), (11, 0), (12, 0), (13, 0), (14, 0)]
    assert memory.facts(*blocks).free.tolist() == [1, 1, 0, 0, 0]
    memory.pages["refcount"][10] = 1
    assert memory.facts((10, 0)).free.tolist() == [0]


def test_looking_at_lists_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "LIST_LOOKS", 5)
    memory = Vmemmap()
    memory.facts(*((pfn, 0) for pfn in range(1024)))
    # The struct pages and their region once, and the list words of five of them.
    assert memory.reads <= 2 + 2 + 5


def test_large_blocks_are_read_in_few_reads() -> None:
    memory = Vmemmap()
    memory.pages["refcount"] = 1
    memory.facts((0, 10), (1024, 9), (1536, 8))
    assert memory.reads == 1


# Stamps


def stamped(memory: Vmemmap, ram: list[tuple[int, int]]) -> tuple[list[Blocks], int, int]:
    """Chunks of stamps, and how many pages were and were not looked at."""
    seen: list[int] = []
    chunks = list(memory.reader().stamps(np.array(ram, np.uint64).reshape(-1, 2), seen.append))
    return chunks, sum(n for n in seen if n > 0), -sum(n for n in seen if n < 0)


@given(
    st.dictionaries(st.integers(0, 2047), st.integers(0, 70), max_size=40),
    st.lists(st.integers(0, 2048 * 4096), max_size=6).map(sorted),
    st.sets(st.integers(0, 2048 // TOGETHER - 1), max_size=4),
    st.sampled_from([1, 7, 64, 100, 1 << 15]),
    st.sampled_from([1, 5, 1 << 15]),
)
def test_stamps_are_found_exactly(
    stamps: dict[int, int], bounds: list[int], holes: set[int], window: int, chunk: int
) -> None:
    memory = Vmemmap(Abi.for_page_shift(12, type_shift=53, stamp=Stamp(31, 31)))
    stamp = memory.abi.stamp
    rng = np.random.default_rng(len(stamps))
    memory.pages["private"] = rng.integers(0, 2**62, memory.count)
    for pfn, order in stamps.items():
        memory.pages["private"][pfn] = stamp.encode(order, pfn & 1)
    ram = list(zip(bounds[::2], bounds[1::2], strict=False))
    for hole in holes:
        memory.hide(hole, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_module, "WINDOW", window)
        patch.setattr(pages_module, "CHUNK_BLOCKS", chunk)
        chunks, scanned, unread = stamped(memory, ram)

    pfns = [pfn for first, end in ram for pfn in range(-(-first // 4096), end // 4096)]
    readable = [pfn for pfn in pfns if pfn not in memory.unreadable]
    assert (scanned, unread) == (len(readable), len(pfns) - len(readable))
    found = Blocks.concatenate(chunks)
    wanted = [pfn for pfn in readable if pfn in stamps]
    assert (found.phys >> np.uint64(12)).tolist() == wanted
    limit = memory.abi.order_limit(memory.count * 4096)
    orders = [stamps[pfn] if stamps[pfn] <= limit else BAD_ORDER for pfn in wanted]
    assert found.order.tolist() == orders
    assert found.type.tolist() == [pfn & 1 for pfn in wanted]
    assert found.key.tolist() == [0] * len(wanted)
    assert all(len(part) for part in chunks)
    # An order that makes no sense says nothing about which pages belong to it.
    private = [
        stamp.encode(order, pfn & 1) if order != BAD_ORDER else 0
        for pfn, order in zip(wanted, orders, strict=True)
    ]
    assert not wanted or found.facts.private.tolist() == private


def test_stamps_of_a_kernel_without_types() -> None:
    memory = Vmemmap(PLAIN)
    memory.pages["private"][5] = PLAIN.stamp.encode(2)
    memory.pages["refcount"][5] = 1
    [blocks], scanned, unread = stamped(memory, [(0, 2048 * 4096)])
    assert (scanned, unread) == (2048, 0)
    assert (blocks.phys.tolist(), blocks.order.tolist()) == ([0x5000], [2])
    assert blocks.type.tolist() == [NO_TYPE] != [KHO_PAGE_SPLIT]
    assert (blocks.facts.head.tolist(), blocks.facts.zeros.tolist()) == ([1], [3])


def test_no_stamps() -> None:
    assert stamped(Vmemmap(), [(0, 2048 * 4096)]) == ([], 2048, 0)
    assert stamped(Vmemmap(), []) == ([], 0, 0)
    everything = Vmemmap(unreadable=set(range(2048)))
    assert stamped(everything, [(0, 2048 * 4096)]) == ([], 0, 2048)


def test_odd_layouts_are_refused() -> None:
    page = pages_module.StructPages(replace(LAYOUT, refcount=51), bytes(64), 0, 4096)
    with pytest.raises(ValueError, match="odd offset 51"):
        _ = page.refcount


#: As in linux 6.6, and in 6.11.
INVERTED = [
    InvertedTypes(0xF0000000, 0xFFFFFF80, {0xF0: 0x80, 0xF1: 0x100, 0xF2: 0x200, 0xF4: 0x800}),
    InvertedTypes(0x80000000, 0xFFFF0000, {0xF0: 1 << 30, 0xF2: 1 << 28, 0xF5: 1 << 25}),
]


@pytest.mark.parametrize("types", INVERTED)
@given(
    words=st.lists(
        st.integers(0, 2**32 - 1)
        | st.sets(st.integers(0, 31), max_size=3).map(lambda off: ~sum(1 << b for b in off) % 2**32)
        | st.integers(0xFFFEFF00, 2**32 - 1),
        min_size=1,
    )
)
@example(words=[0xFFFFFFFF, 0xFFFFFF80, 0xFFFFFF7F, 0xFFFFFF00, 0xFFFF0000, 0xFFFEFFFF, 0, 7])
def test_types_in_bits(types: InvertedTypes, words: list[int]) -> None:
    """``PageType()`` and ``page_type_has_type()``, word by word."""
    found = types.as_numbers(np.array(words, np.uint32)).tolist()
    for word, number in zip(words, found, strict=True):
        of = [n for n, bit in types.bits.items() if word & (types.base | bit) == types.base]
        has_type = word - 2**32 < types.reserve - 2**32 and word >> 31
        if of and has_type:
            assert number == of[0] << 24 | word & 0xFFFFFF
        elif has_type and word & types.base == types.base:
            assert number == InvertedTypes.OTHER << 24 | word & 0xFFFFFF
        else:
            assert number == word


def test_what_is_free_by_bits() -> None:
    """The same memory, as an old kernel and as a new one keep it."""
    new, old = Vmemmap(), Vmemmap(layout=replace(LAYOUT, inverted=INVERTED[0]))
    words = {100: (BUDDY, 0xFFFFFF7F), 200: (0xF2000000, 0xFFFFFDFF), 300: (3, 3)}
    for pfn, pair in words.items():
        for memory, word in zip((new, old), pair, strict=True):
            memory.pages["page_type"][pfn] = word
            memory.pages["private"][pfn] = 2 * (pfn == 100)
    blocks = ((100, 0), (101, 0), (103, 0), (104, 0), (200, 0), (300, 0), (96, 4))
    assert new.facts(*blocks).free.tolist() == [1, 1, 1, 0, 0, 0, 1]
    assert old.facts(*blocks).free.tolist() == new.facts(*blocks).free.tolist()
    for one, other in zip(new.reader().pages(0, 1024), old.reader().pages(0, 1024), strict=True):
        assert one.buddy.tolist() == other.buddy.tolist()
        assert one.page_type.tolist() == other.page_type.tolist()
        assert one.page_type[[100, 200, 300]].tolist() == [0xF0, 0xF2, 0]
