# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope pages``: runs of equal pages, against a slow plain model of single pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khoscope.abi.keys import BAD_ORDER, NO_TYPE
from khoscope.cli import main
from khoscope.facts import page_runs as runs_module
from khoscope.facts import store
from khoscope.facts.clients import Claims, Owner, OwnerKind
from khoscope.facts.columns import Blocks, Pages
from khoscope.facts.page_runs import Look, PageKnowledge, PageRuns, page_types, recorded, runs
from khoscope.facts.snapshot import Snapshot
from khoscope.sources import pages as pages_module
from khoscope.words.errors import KhoscopeError
from tests.synthetic import FIXED, PLAIN, Block, columns, rich, snapshot
from tests.test_pages import BUDDY, HEAD, Vmemmap, machines

Page = dict[str, int]


def pages_of(found: PageRuns) -> Iterator[Page]:
    """Each page of some runs."""
    for i in range(len(found)):
        row = {name: int(getattr(found, name)[i]) for name in PageRuns.DTYPES}
        for page in range(row.pop("pages")):
            yield {**row, "phys": row["phys"] + page * 4096}


def look_at(facts: Snapshot, look: Look, first: int, end: int) -> PageRuns:
    return PageRuns.concatenate(runs(facts, first, end, look))


def with_names(facts: Snapshot) -> Snapshot:
    kernel = replace(facts.kernel, page_flags=["bit"] * 8, page_types={0xF0: "buddy", 0xF5: "slab"})
    return replace(facts, kernel=kernel)


def plain_page(memory: Vmemmap, pfn: int) -> Page:
    """What a page says, where what it says does not depend on the preserved blocks."""
    nothing = PageRuns.nothing(np.array([pfn << 12], np.uint64), PageKnowledge.UNREAD)
    [page] = pages_of(nothing)
    if pfn in memory.unreadable:
        return page
    struct = memory.pages[pfn]
    tail = bool(struct["info"] & 1)
    readable_next = pfn + 1 < memory.count and pfn + 1 not in memory.unreadable
    page["seen"] = PageKnowledge.READ
    page["stamp"] = int(struct["private"]) if int(struct["private"]) >> 32 == 0x4B484F50 else 0
    page["flags"] = 0 if tail else int(struct["flags"]) & 0xFF
    page["refcount"] = int(struct["refcount"])
    top = int(struct["page_type"]) >> 24
    page["page_type"] = top if 0x80 <= top < 0xFF else 0
    if tail:
        page["compound"] = Pages.COMPOUND_TAIL
    elif readable_next and int(struct["flags"]) & HEAD and int(memory.pages["info"][pfn + 1]) & 1:
        page["compound"] = min(int(memory.pages["flags"][pfn + 1]) & 0xFF, 127)
    page["buddy"] = 0 if memory.is_free(pfn) else PageRuns.ALLOCATED
    return page


@settings(max_examples=60)
@given(
    machines(),
    st.lists(st.tuples(st.integers(0, 1600), st.integers(0, 6), st.integers(0, 1)), max_size=8),
    st.lists(st.integers(0, 1700 * 4096), min_size=2, max_size=2, unique=True).map(sorted),
    st.lists(st.integers(0, 1500 * 4096), max_size=4).map(sorted),
)
def test_runs_against_a_model(
    memory: Vmemmap,
    preserved: list[tuple[int, int, int]],
    span: list[int],
    bounds: list[int],
) -> None:
    """Any range, over RAM with holes, struct pages with holes, and blocks that may overlap."""
    memory.abi = FIXED
    bounds = [min(bound, memory.count << 12) for bound in bounds]
    ram = [(low, high) for low, high in zip(bounds[::2], bounds[1::2], strict=False) if low < high]
    made = {(pfn >> order << order, order, kind) for pfn, order, kind in preserved}
    blocks = [Block(pfn << 12, order, kind) for pfn, order, kind in sorted(made)]
    facts = with_names(snapshot(FIXED, blocks, ram=ram))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_module, "WINDOW", 1)
        found = look_at(facts, memory.reader().pages, *span)

    shown = list(pages_of(found))
    pfns = range(span[0] >> 12, -(-span[1] >> 12))
    assert [page["phys"] >> 12 for page in shown] == list(pfns)
    in_ram = {pfn for low, high in ram for pfn in range(-(-low >> 12), high >> 12)}
    for page in shown:
        pfn = page["phys"] >> 12
        if pfn not in in_ram:
            assert page["seen"] == PageKnowledge.OUTSIDE_RAM
            continue
        page["buddy"] = min(page["buddy"], 0)
        wanted = plain_page(memory, pfn)
        around = {(order, kind) for at, order, kind in made if at <= pfn < at + (1 << order)}
        page.pop("key")
        block = (page.pop("order"), page.pop("type"))
        assert block in around if around else block == (BAD_ORDER, NO_TYPE)
        assert page == {name: wanted[name] for name in page}
    equal = [name for name in PageRuns.DTYPES if name not in ("phys", "pages", "key")]
    kinds = [tuple(int(getattr(found, name)[i]) for name in equal) for i in range(len(found))]
    assert len(list(groupby(kinds))) == len(kinds)


def test_free_blocks_have_their_order() -> None:
    memory = Vmemmap()
    for head, order in ((0, 10), (1024, 3), (1032, 0)):
        memory.pages["page_type"][head] = BUDDY
        memory.pages["private"][head] = order
    memory.hide(1, 1)
    facts = with_names(snapshot(FIXED, [], ram=[(0, 2048 * 4096)]))
    found = look_at(facts, memory.reader().pages, 0, 2048 * 4096)
    shown = [
        (int(phys) >> 12, int(count), int(buddy), int(kind), int(seen))
        for phys, count, buddy, kind, seen in zip(
            found.phys, found.pages, found.buddy, found.page_type, found.seen, strict=True
        )
    ]
    assert shown == [
        (0, 1, 10, 0xF0, PageKnowledge.READ),
        (1, 63, 10, 0, PageKnowledge.READ),
        (64, 64, PageRuns.ALLOCATED, 0, PageKnowledge.UNREAD),
        (128, 896, 10, 0, PageKnowledge.READ),
        (1024, 1, 3, 0xF0, PageKnowledge.READ),
        (1025, 7, 3, 0, PageKnowledge.READ),
        (1032, 1, 0, 0xF0, PageKnowledge.READ),
        (1033, 1015, PageRuns.ALLOCATED, 0, PageKnowledge.READ),
    ]
    # A part of a free block knows what it is part of.
    assert look_at(facts, memory.reader().pages, 512 * 4096, 513 * 4096).buddy.tolist() == [10]


def test_mappings_are_no_type() -> None:
    words = np.array([0xFFFFFFFF, 0, 3, 0xF5000000, 0xF0001234, 0xFF000000], np.uint32)
    assert page_types(words).tolist() == [0, 0, 0, 0xF5, 0xF0, 0]


def test_all_of_a_large_machine_in_few_reads() -> None:
    """Equal pages are one run, however many windows they span."""
    memory = Vmemmap(count=1 << 18)
    facts = with_names(snapshot(FIXED, [], ram=[(0, 1 << 30)]))
    found = look_at(facts, memory.reader().pages, 0, 1 << 64)
    assert found.pages.tolist() == [1 << 18, (1 << 52) - (1 << 18)]
    assert found.seen.tolist() == [PageKnowledge.READ, PageKnowledge.OUTSIDE_RAM]
    assert memory.reads < 32


def test_owners() -> None:
    facts = snapshot(FIXED, [Block(0x100000, 2)], ram=[(0, 2048 * 4096)])
    claims = Claims(
        np.array([0x101000], np.uint64), np.array([8192], np.uint64), np.array([1], np.uint32)
    )
    owners = [Owner(OwnerKind.FDT, "FDT"), Owner(OwnerKind.SESSION, "guests")]
    facts = replace(facts, outgoing=replace(facts.outgoing, owners=owners, claims=[claims]))
    found = look_at(facts, Vmemmap().reader().pages, 0x100000, 0x104000)
    assert found.owner.tolist() == [-1, 1, -1]
    assert found.pages.tolist() == [1, 2, 1]


# What a snapshot recorded


def plain_recorded(facts: Snapshot, blocks: Blocks, page: Page) -> bool:
    """Whether a page of a snapshot is what one of its blocks says."""
    pfn = page["phys"] >> 12
    for i in range(len(blocks)):
        index = pfn - (int(blocks.phys[i]) >> 12)
        if blocks.order[i] == BAD_ORDER or not 0 <= index < 1 << int(blocks.order[i]):
            continue
        of = blocks.facts
        tails = (1 << int(blocks.order[i])) - 1
        if of.unread[i]:
            return page["seen"] == PageKnowledge.UNREAD
        if index == 0:
            return (page["seen"], page["refcount"]) == (PageKnowledge.READ, int(of.head[i]))
        if int(of.zeros[i]) == tails or int(of.ones[i]) == tails:
            return (page["seen"], page["refcount"]) == (PageKnowledge.REFCOUNT, int(of.ones[i] > 0))
        return (page["seen"], page["refcount"]) == (PageKnowledge.COUNTED, 0)
    return page["seen"] == PageKnowledge.UNRECORDED


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 6), st.integers(0, 1), st.integers(0, 3)),
        max_size=12,
    ),
    st.sampled_from([1, 3, 64, 1 << 15]),
    st.sampled_from([1, 2, 50]),
)
def test_recorded_against_a_model(
    made: list[tuple[int, int, int, int]], window: int, chunk: int
) -> None:
    taken: set[int] = set()
    blocks = []
    for pfn, order, kind, pattern in made:
        first = pfn >> order << order
        if not taken.isdisjoint(range(first, first + (1 << order))):
            continue
        taken |= set(range(first, first + (1 << order)))
        tails = (1 << order) - 1
        more = ({}, {"ones": tails}, {"others": min(1, tails)}, {"unread": 1})[pattern]
        blocks.append(Block(first << 12, order, kind, **more))
    facts = snapshot(FIXED, blocks, ram=[(0, 300 << 12)])
    every = columns(FIXED, blocks)
    parts = [every[at : at + chunk] for at in range(0, len(every), chunk)]
    facts = replace(facts, outgoing=replace(facts.outgoing, blocks=parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "WINDOW", window)
        found = look_at(facts, recorded(facts), 0, 300 << 12)
    shown = list(pages_of(found))
    assert [page["phys"] >> 12 for page in shown] == list(range(300))
    for page in shown:
        assert plain_recorded(facts, every, page), page
        assert (page["order"] != BAD_ORDER) == (page["phys"] >> 12 in taken)


def test_recorded_heads() -> None:
    stamp = FIXED.stamp.encode(2)
    blocks = [
        Block(0x10000, 2, head=0, free=4, page_type=BUDDY, private=4),
        Block(0x20000, 0, head=0, free=1),
        Block(0x30000, 2, compound=1, flags=1),
        Block(0x40000, 1, compound=Pages.COMPOUND_TAIL, flags=1),
    ]
    facts = snapshot(
        FIXED,
        blocks,
        stamps=[Block(0x50000, 2, private=stamp)],
        watched=(snapshot(FIXED, []), [Block(0x60000, 0, head=7), Block(0, BAD_ORDER, key=0)]),
    )
    facts = with_names(facts)

    def at(phys: int) -> Page:
        [page] = pages_of(look_at(facts, recorded(facts), phys, phys + 1))
        return page

    assert (at(0x10000)["buddy"], at(0x10000)["page_type"]) == (4, 0xF0)
    assert at(0x11000)["buddy"] == PageRuns.FREE
    assert at(0x20000)["buddy"] == PageRuns.FREE
    assert (at(0x30000)["compound"], at(0x30000)["flags"]) == (1, 1)
    tail, none = Pages.COMPOUND_TAIL, Pages.NOT_COMPOUND
    assert [at(0x30000 + n * 4096)["compound"] for n in (1, 2, 3)] == [tail, none, none]
    assert (at(0x40000)["compound"], at(0x40000)["flags"]) == (tail, 0)
    assert (at(0x50000)["stamp"], at(0x50000)["order"]) == (stamp, BAD_ORDER)
    assert at(0x60000)["refcount"] == 7
    assert at(0x0)["seen"] == PageKnowledge.UNRECORDED


def test_tails_that_share_struct_pages_have_no_facts() -> None:
    folio = Block(0x200000, 9, head=3, compound=9, page_type=0xF4000000, shared=448)
    facts = snapshot(FIXED, [folio])
    found = look_at(facts, recorded(facts), 0x200000, 0x400000)
    seen = [PageKnowledge.READ, PageKnowledge.REFCOUNT, PageKnowledge.SHARED]
    assert found.seen.tolist() == seen
    assert found.pages.tolist() == [1, 63, 448]
    assert found.refcount.tolist() == [3, 0, 0]
    assert found.compound.tolist() == [9, Pages.COMPOUND_TAIL, Pages.COMPOUND_TAIL]


def test_blocks_out_of_order_are_refused() -> None:
    facts = snapshot(FIXED, [])
    one, other = (columns(FIXED, [Block(phys)]) for phys in (0x1000, 0x2000))
    for stream in ([other, one], [one, one]):
        odd = replace(facts, outgoing=replace(facts.outgoing, blocks=stream))
        with pytest.raises(KhoscopeError, match="not in order"):
            look_at(odd, recorded(odd), 0, 1 << 20)


def test_a_block_larger_than_ram() -> None:
    facts = snapshot(FIXED, [Block(0, 31)], ram=[(0, 1 << 28)])
    found = look_at(facts, recorded(facts), 0, 1 << 28)
    assert found.pages.tolist() == [1, (1 << 16) - 1]
    assert found.order.tolist() == [31, 31]


# The command


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(facts: Snapshot, *words: str) -> str:
        store.save_file(facts, tmp_path / "facts")
        assert main(["--snapshot", str(tmp_path / "facts"), "pages", *words]) == 0
        return capsys.readouterr().out

    return run


def shown_facts() -> Snapshot:
    stamp = FIXED.stamp.encode(9, 1)
    facts = snapshot(
        FIXED,
        [
            Block(0x10000, 4, 1, ones=15, flags=0b11),
            Block(0x20000, 3, head=0, free=8, page_type=BUDDY, private=3),
            Block(0x30000, 2, others=1),
            Block(0x40000, 2, unread=1),
            Block(0x50000, 1, page_type=0xF5000000, compound=1),
        ],
        stamps=[Block(0x200000, 9, 1, private=stamp, ones=511)],
        ram=[(0, 0x400000)],
    )
    kernel = replace(facts.kernel, page_types={0xF0: "buddy", 0xF5: "slab"})
    owners = [Owner(OwnerKind.SESSION, "session\033[2J guests")]
    claims = Claims(
        np.array([0x10000], np.uint64), np.array([1 << 16], np.uint64), np.zeros(1, np.uint32)
    )
    outgoing = replace(facts.outgoing, owners=owners, claims=[claims])
    return replace(facts, kernel=kernel, outgoing=outgoing)


def test_text(run: Run) -> None:
    shown = run(shown_facts(), "0x0f000..0x500000", "--limit", "0").splitlines()
    table = [" ".join(line.split()) for line in shown[shown.index("") + 1 :]]
    assert table == [
        "PHYS PAGES REF PAGE",
        "0x00000000f000 1 not in the snapshot",
        "0x000000010000 1 1 allocated; locked referenced; in block order 4",
        r"split; owner session\x1b[2J guests",
        "0x000000011000 15 1 allocated; in block order 4 split; owner",
        r"session\x1b[2J guests",
        "0x000000020000 1 0 free, buddy order 3; in block order 3 contig",
        "0x000000021000 7 0 free; in block order 3 contig",
        "0x000000028000 8 not in the snapshot",
        "0x000000030000 1 1 allocated; in block order 2 contig",
        "0x000000031000 3 allocated; refcounts of the block's pages",
        "differ; in block order 2 contig",
        "0x000000034000 12 not in the snapshot",
        "0x000000040000 4 its struct page cannot be read; in block order",
        "2 contig",
        "0x000000044000 12 not in the snapshot",
        "0x000000050000 1 1 allocated; slab; compound head of order 1; in",
        "block order 1 contig",
        "0x000000051000 1 0 allocated; compound tail; in block order 1",
        "contig",
        "0x000000052000 430 not in the snapshot",
        "0x000000200000 1 1 allocated; stamp order 9 split",
        "0x000000201000 511 1 allocated",
        "0x000000400000 256 outside RAM",
        "17 runs, 1,265 pages",
    ]
    assert max(map(len, shown)) <= 80


def test_limit(run: Run) -> None:
    shown = run(shown_facts(), "0x0..0x500000", "--limit", "3").splitlines()
    assert sum(line.startswith("0x") for line in shown) == 3
    assert "14 more runs (--limit 0 shows all)" in shown[-2]
    assert shown[-1] == "17 runs, 1,280 pages"


def test_json(run: Run) -> None:
    document: dict[str, Any] = json.loads(run(shown_facts(), "0x10fff..0x11001", "--json"))
    assert document["schema"] == "khoscope.pages/1"
    assert document["range"] == ["0x10fff", "0x11001"]
    head, tail = document["runs"]
    block = {
        "order": 4,
        "type": "split",
        "key": hex(FIXED.kho_radix_encode_key(0x10000, 4, 1)),
    }
    assert head == {
        "phys": "0x10000",
        "pages": 1,
        "seen": "read",
        "refcount": 1,
        "flags": ["locked", "referenced"],
        "page_type": None,
        "compound": None,
        "free": None,
        "stamp": None,
        "block": block,
        "owner": "session\033[2J guests",
    }
    assert (tail["seen"], tail["refcount"], tail["flags"]) == ("refcount", 1, None)
    lines = run(shown_facts(), "0x10fff..0x11001", "--jsonl").splitlines()
    assert [json.loads(line) for line in lines] == document["runs"]


def test_one_address_is_the_page_that_holds_it(run: Run) -> None:
    [page] = json.loads(run(shown_facts(), "0x200fff", "--json"))["runs"]
    assert (page["phys"], page["pages"]) == ("0x200000", 1)
    assert page["stamp"] == {"order": 9, "type": "split"}


def test_a_kernel_without_types_and_an_old_file(run: Run) -> None:
    facts = snapshot(PLAIN, [Block(0x1000, page_type=BUDDY, private=3)])
    facts = replace(facts, kernel=replace(facts.kernel, page_flags=[], page_types={}))
    [page] = json.loads(run(facts, "0x1000", "--json"))["runs"]
    assert page["block"]["type"] is None
    assert (page["page_type"], page["flags"]) == ("0xf0", [])


def test_names_of_more_flags_than_there_are(run: Run) -> None:
    facts = shown_facts()
    facts = replace(facts, kernel=replace(facts.kernel, page_flags=["x"] * 100))
    [page] = json.loads(run(facts, "0x10000", "--json"))["runs"]
    assert page["flags"] == ["x", "x"]


@pytest.mark.parametrize("span", ["", "x", "5..5", "6..5", "-1", "0..0x10000000000000001"])
def test_ranges_that_are_none(span: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pages", "--", span])
    assert exit_.value.code == 2
    assert "PHYS" in capsys.readouterr().err


def test_all_memory_of_something_of_everything(run: Run) -> None:
    rows = [
        json.loads(line) for line in run(rich(), "0..0x10000000000000000", "--jsonl").splitlines()
    ]
    assert sum(row["pages"] for row in rows) == 1 << 52
    at = [int(row["phys"], 16) for row in rows]
    assert at == sorted(set(at))
    preserved = sum(row["pages"] for row in rows if row["block"])
    assert preserved == 619
