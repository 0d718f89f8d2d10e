# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the records of bpf/kho_trace.c to facts, with records that are built by hand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from khoscope.abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, NO_TYPE, Abi
from khoscope.facts import calls as calls_module
from khoscope.facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    BIT_UNKNOWN,
    FUNCTIONS,
    NO_ARGUMENT,
    NO_ORDER,
    NO_PHYS,
    NUMBERS,
    Action,
    Batch,
    Calls,
    Touches,
    Use,
)
from khoscope.facts.columns import Pages
from khoscope.sources.kernel import Layout
from khoscope.trace import assemble
from khoscope.trace.assemble import TOUCH, Assembler, call_dtype, events_in, record_dtype
from tests.synthetic import FIXED, PLAIN, POSTED, REFUSED, XARRAYS
from tests.test_pages import HEAD, LAYOUT, STRUCT_PAGE

KERNEL = Layout(LAYOUT, direct_map=0xFFFF888000000000, tree=0xFFFFFFFF82000000, root=8)
FRAMES = 3
RECORD = record_dtype(FRAMES)
C_SOURCE = resources.files("khoscope").joinpath("bpf/kho_trace.c").read_text()


def as_read(records: Iterable[bytes]) -> NDArray[np.uint8]:
    """Records as they come out of the kernel."""
    return np.frombuffer(b"".join(records), np.uint8).reshape(-1, RECORD.itemsize)


class Fed(Assembler):
    """Takes records one by one, as the tests make them."""

    def feed_all(self, records: Iterable[bytes]) -> Batch:
        return self.feed(as_read(records))


def assembler(abi: Abi = FIXED) -> Fed:
    return Fed(abi, KERNEL, FRAMES)


def page_at(pfn: int) -> int:
    """``pfn_to_page()``."""
    return (LAYOUT.vmemmap + pfn * LAYOUT.size) & (1 << 64) - 1


def put(into: NDArray[np.void], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name == "args":
            into[name][0, : len(value)] = value
        else:
            into[name] = value


def call(function: str = "kho_preserve_pages", name: bytes = b"", **values: Any) -> bytes:
    """``struct record`` of a call that has touched no block, or whose blocks went ahead."""
    raw = np.zeros(1, RECORD)
    times = {"call": 1, "enter": 100, "leave": 200, "has_returned": 1}
    put(raw["call"], {"function": NUMBERS[function], **times, **values})
    raw["name"] = name
    return raw.tobytes()


def told_with(call: bytes, block: bytes) -> bytes:
    """``struct record`` of a call with the last block that it touched."""
    both, last = np.frombuffer(call, RECORD).copy(), np.frombuffer(block, RECORD)
    both["touch"] = last["touch"]
    both["call"]["has_block"] = 1
    return both.tobytes()


def block(
    function: str,
    pfn: int,
    order: int,
    refcounts: Sequence[int] = (),
    pages: NDArray[np.void] | None = None,
    **values: Any,
) -> bytes:
    """
    ``struct record`` of a block that goes ahead of its call, as look() and keep_block() of
    kho_trace.c fill it.

    :param refcounts: of the pages that were looked at.
    :param pages: the first two struct pages; None: plain ones with those refcounts.
    """
    if pages is None:
        pages = np.zeros(2, STRUCT_PAGE)
        pages["page_type"] = 0xFFFFFFFF
        pages["refcount"][: len(refcounts)] = refcounts[:2]
    odd = [i for i, refs in enumerate(refcounts) if i > 1 and refs != refcounts[1]]
    head, behind = pages[:1], pages[1:]
    args, outer_args = values.pop("args", (0, 0)), values.pop("outer_args", (0, 0))
    outer = values.get("outer", 255)
    facts = {
        "function": NUMBERS[function],
        "pfn": pfn,
        "order": order,
        "before": BIT_UNKNOWN,
        "after": BIT_UNKNOWN,
        "outer": outer,
        "args": args[:2] if outer == 255 else outer_args,
        "as_folio": function == "kho_restore_page" and args[1] & 0xFF != 0,
        "looked": len(refcounts),
        "zeros": sum(refs == 0 for refs in refcounts),
        "ones": sum(refs == 1 for refs in refcounts),
        "odd": odd[0] if odd else 0,
        "private": values.pop("stamp", head["private"]),
        "flags": head["flags"],
        "refcount": head["refcount"].view(np.uint32),
        "page_type": head["page_type"],
        "compound": head["info"],
        "compound_behind": behind["info"],
        "compound_order": (behind["flags"] & 0xFF).astype(np.uint8),
    }
    raw = np.zeros(1, RECORD)
    put(raw["call"], {"call": values.pop("call", 1), "has_block": 1})
    put(raw["touch"], {**facts, **values})
    return raw.tobytes()


def added(
    pfn: int,
    order: int = 0,
    refcounts: Sequence[int] | None = None,
    abi: Abi = FIXED,
    page_type: int = KHO_PAGE_CONTIG,
    **values: Any,
) -> bytes:
    """A block that kho_radix_add_page() added; its key as the kernel builds it, all 64 bits."""
    key = 1 << (abi.order_0_log2 - order) | pfn >> order
    if abi.type_shift is not None:
        key |= page_type << abi.type_shift
    if refcounts is None:
        refcounts = [1] + [page_type] * min((1 << order) - 1, 63)
    args = (KERNEL.tree, pfn, order, page_type)
    return block("kho_radix_add_page", pfn, order, refcounts, key=key, args=args, **values)


def restored(pfn: int, stamp: int, is_folio: bool = False, **values: Any) -> bytes:
    """A block that kho_restore_page() restored."""
    order = stamp & 0x7FFFFFFF if stamp >> 32 == 0x4B484F50 else 255
    # As it is right for the stamp's type.
    refcounts = [1] + [stamp >> 31 & 1] * ((1 << min(order, 10)) - 1)
    # A bool: whatever else is in the register.
    args = (pfn << 12, 0xDEADBEEF00 | is_folio)
    whole = {"stamp": stamp, "args": args, "ret": page_at(pfn), **values}
    return block("kho_restore_page", pfn, order, refcounts, **whole)


def touches_of(*records: bytes, abi: Abi = FIXED) -> Touches:
    """What some blocks become, in the order in which they are given."""
    batch = assembler(abi).feed_all([*records, call()])
    assert len(batch.calls) == 1
    return batch.touches


def calls_of(*records: bytes, abi: Abi = FIXED) -> Calls:
    return assembler(abi).feed_all(records).calls


# The C and the Python


def c_struct(name: str) -> dict[str, tuple[int, int]]:
    """Offsets and sizes of the members of a struct in kho_trace.c, in bytes."""
    sizes = {"u64": 8, "u32": 4, "u8": 1, "char": 1}
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", C_SOURCE, re.M | re.S)
    assert body
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    text = text.replace("STACK_FRAMES", str(FRAMES))
    members: dict[str, tuple[int, int]] = {}
    at = 0
    for kind, names in re.findall(r"^\t(\w+) (\w[^;]*);", text, re.M):
        for each, _, count in re.findall(r"(\w+)(\[([^]]+)\])?", names):
            factors = [int(factor) for factor in (count or "1").split("*")]
            size = sizes[kind] * int(np.prod(factors))
            at = -(-at // sizes[kind]) * sizes[kind]
            members[each] = (at, size)
            at += size
    assert at % 8 == 0
    return members


@pytest.mark.parametrize(("name", "dtype"), [("call", call_dtype(FRAMES)), ("touch", TOUCH)])
def test_structs_are_those_of_the_c_source(name: str, dtype: np.dtype[np.void]) -> None:
    fields = dtype.fields
    assert fields is not None
    ours = {each: (int(at[1]), at[0].itemsize) for each, at in fields.items()}
    theirs = c_struct(name)
    assert ours == theirs
    assert dtype.itemsize == max(sum(place) for place in theirs.values())


def c_enum(name: str) -> list[str]:
    body = re.search(rf"^enum {name} {{\n(.*?)^}};", C_SOURCE, re.M | re.S)
    assert body
    return re.findall(r"^\t(\w+),", body[1], re.M)


def test_numbers_are_those_of_the_c_source() -> None:
    assert c_enum("block_use") == [use.name for use in sorted(Use)]
    bits = [getattr(calls_module, name) for name in c_enum("bit")]
    assert bits == [BIT_CLEAR, BIT_SET, BIT_UNKNOWN] == list(range(3))
    defined = dict(re.findall(r"^#define (\w+) (\d+)$", C_SOURCE, re.M))
    assert int(defined["MAX_TASKS"]) == assemble.MOST_CALLS
    assert int(defined["NO_ORDER"]) == NO_ORDER == BAD_ORDER
    assert int(defined["NO_FUNCTION"]) >= len(FUNCTIONS)


# Refcounts


@pytest.mark.parametrize(
    ("refcounts", "wanted"),
    [
        ([1], (1, 0, 0, 0, 0)),
        ([0], (0, 0, 0, 0, 0)),
        ([7], (7, 0, 0, 0, 0)),
        ([1, 0, 0, 0], (1, 3, 0, 0, 0)),
        ([1, 1, 1, 1], (1, 0, 3, 0, 0)),
        ([0, 0, 0, 0], (0, 3, 0, 0, 0)),
        ([0, 1, 1, 1], (0, 0, 3, 0, 0)),
        ([2, 1, 0, 5], (2, 1, 1, 1, 2)),
        ([-1, 5, 5, 5], (-1, 0, 0, 3, 0)),
        ([1, 0, 0, 1], (1, 2, 1, 0, 3)),
        ([0, 1, 1, 0], (0, 1, 2, 0, 3)),
    ],
)
def test_the_first_page_is_no_tail(
    refcounts: list[int], wanted: tuple[int, int, int, int, int]
) -> None:
    order = len(refcounts).bit_length() - 1
    touches = touches_of(added(0x100, order, refcounts))
    facts = touches.blocks.facts
    names = ("head", "zeros", "ones", "others", "odd")
    assert tuple(int(getattr(facts, name)[0]) for name in names) == wanted
    assert touches.looked.tolist() == [len(refcounts)]
    assert facts.unread.tolist() == [0]


@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("counted", [[0], [1], [2], [0, 0], [1, 1], [2, 2], [0, 1, 1, 1]])
def test_a_first_page_that_changes_while_it_is_read(head: int, counted: list[int]) -> None:
    """It is read once by itself and once among the others: somebody may take it in between."""
    pages = np.zeros(2, STRUCT_PAGE)
    pages["refcount"] = head
    order = len(counted).bit_length() - 1
    facts = touches_of(added(8, order, counted, pages=pages)).blocks.facts
    assert facts.head.tolist() == [head]
    tails = [int(getattr(facts, name)[0]) for name in ("zeros", "ones", "others")]
    assert sum(tails) == len(counted) - 1


def test_blocks_that_were_not_read_or_not_all() -> None:
    unread = block("kho_radix_add_page", 8, 3, [], key=1 << 49 | 1, unread=8)
    # Of 2048 pages, 1024 are looked at; of those, the first 16 could not be read.
    sampled = added(1 << 11, 11, [1] * 1008, unread=16, pages=np.zeros(2, STRUCT_PAGE))
    touches = touches_of(unread, sampled)
    facts = touches.blocks.facts
    assert touches.looked.tolist() == [0, 1008]
    assert facts.unread.tolist() == [8, 16]
    assert (facts.zeros + facts.ones + facts.others).tolist() == [0, 1007]
    assert facts.odd.tolist() == [0, 0]


def test_a_far_odd_page() -> None:
    assert touches_of(added(0, 40, [1], odd=2**32 - 1)).blocks.facts.odd.tolist() == [2**32 - 1]


def test_struct_pages() -> None:
    pages = np.zeros(2, STRUCT_PAGE)
    pages["page_type"] = 0xFFFFFFFF
    pages["refcount"] = [1, 0]
    pages["private"] = [0x1234, 7]
    pages["flags"] = [HEAD | 3, 2]
    pages["info"] = [0, LAYOUT.vmemmap + 1]
    tail = pages.copy()
    tail["info"][0] = LAYOUT.vmemmap + 1
    buddy = pages.copy()
    buddy["info"] = 0
    buddy["page_type"][0] = 0xF0000005
    records = [added(16 * i, 2, pages=each) for i, each in enumerate([pages, tail, buddy])]
    facts = touches_of(*records).blocks.facts
    assert facts.compound.tolist() == [2, Pages.COMPOUND_TAIL, Pages.NOT_COMPOUND]
    assert facts.private.tolist() == [0x1234] * 3
    assert facts.flags.tolist() == [HEAD | 3] * 3
    assert facts.page_type.tolist() == [0xFFFFFFFF, 0xFFFFFFFF, 0xF0000005]
    assert facts.free.tolist() == [0, 0, 1]


# Blocks


@pytest.mark.parametrize(
    ("abi", "wanted"),
    [
        (PLAIN, [NO_TYPE, NO_TYPE]),
        # Bit 63 is none of the 60 that the tree stores: what comes back is contig.
        (POSTED, [KHO_PAGE_CONTIG, KHO_PAGE_CONTIG]),
        (FIXED, [KHO_PAGE_CONTIG, KHO_PAGE_SPLIT]),
    ],
)
def test_keys_are_those_that_the_tree_stores(abi: Abi, wanted: list[int]) -> None:
    records = [added(0x1230 + i, 0, abi=abi, page_type=i) for i in range(2)]
    deleted = block("kho_radix_del_page", 0x1230, 4, key=1 << 48 | 0x123, looked=99)
    touches = touches_of(*records, deleted, abi=abi)
    blocks = touches.blocks
    assert blocks.type.tolist() == [*wanted, wanted[0]]
    assert blocks.phys.tolist() == [0x1230000, 0x1231000, 0x1230000]
    assert blocks.order.tolist() == [0, 0, 4]
    keys = [abi.kho_radix_encode_key(0x1230000 + (i << 12), 0, i) for i in range(2)]
    assert blocks.key.tolist() == [*keys, abi.kho_radix_encode_key(0x1230000, 4)]
    assert touches.action.tolist() == [Action.ADD, Action.ADD, Action.DELETE]
    # Nobody looks at what is deleted; what stands there is of an earlier block.
    assert touches.looked.tolist() == [1, 1, 0]


def test_a_key_that_the_tree_refused_is_shown_as_it_was() -> None:
    key = 1 << 63 | REFUSED.kho_radix_encode_key(0x40000000, 9)
    taken = REFUSED.kho_radix_encode_key(0x50000000, 9)
    records = [
        block(
            "kho_radix_add_key", 0x40000, 9, [1] * 512, key=key, before=0, after=0, ret=2**64 - 34
        ),
        block("kho_radix_add_key", 0x50000, 9, [1], key=taken, before=0, after=1),
        restored(0x60000, REFUSED.stamp.encode(9, KHO_PAGE_CONTIG)),
    ]
    blocks = touches_of(*records, abi=REFUSED).blocks
    assert blocks.key.tolist() == [key, taken, 0]
    assert blocks.phys.tolist() == [0x40000000, 0x50000000, 0x60000000]
    assert blocks.order.tolist() == [9, 9, 9]
    assert blocks.type.tolist() == [KHO_PAGE_SPLIT, KHO_PAGE_CONTIG, KHO_PAGE_CONTIG]


def test_keys_of_the_newest_kernels() -> None:
    key = FIXED.kho_radix_encode_key(0x40000000, 9, KHO_PAGE_SPLIT)
    record = block("kho_radix_add_key", 0x40000, 9, [1] * 512, key=key, before=1, after=1)
    touches = touches_of(record)
    assert (touches.blocks.phys.tolist(), touches.blocks.order.tolist()) == ([0x40000000], [9])
    assert touches.blocks.type.tolist() == [KHO_PAGE_SPLIT]
    assert (touches.before.tolist(), touches.after.tolist()) == ([BIT_SET], [BIT_SET])
    assert touches.function.tolist() == [NUMBERS["kho_radix_add_key"]]


def test_keys_of_other_trees_are_no_blocks() -> None:
    other = block("kho_radix_add_key", 0, NO_ORDER, key=0)
    touches = touches_of(other, added(5))
    assert touches.blocks.phys.tolist() == [0x5000]
    batch = assembler().feed_all([other, call("kho_radix_add_key", args=(1, 2))])
    assert (len(batch.touches), batch.calls.blocks.tolist()) == (0, [0])
    assert batch.calls.phys.tolist() == [NO_PHYS]


@pytest.mark.parametrize(
    ("abi", "types"),
    [(PLAIN, [NO_TYPE, NO_TYPE]), (FIXED, [KHO_PAGE_CONTIG, KHO_PAGE_SPLIT])],
)
def test_stamps(abi: Abi, types: list[int]) -> None:
    stamps = [abi.stamp.encode(3, 0), abi.stamp.encode(3, 1)]
    touches = touches_of(
        *(restored(8 << i, stamp, bool(i)) for i, stamp in enumerate(stamps)), abi=abi
    )
    blocks = touches.blocks
    assert blocks.order.tolist() == [3, 3]
    assert blocks.type.tolist() == types
    assert blocks.phys.tolist() == [0x8000, 0x10000]
    assert blocks.key.tolist() == [0, 0]
    # The stamp is what stood there at entry: the restore has cleared it.
    assert blocks.facts.private.tolist() == stamps
    assert touches.as_folio.tolist() == [False, True]
    assert touches.action.tolist() == [Action.RESTORE] * 2
    assert touches.ret.tolist() == [page_at(8) - 2**64, page_at(16) - 2**64]
    assert touches.succeeded.tolist() == [True, True]
    assert not touches.known.any()
    assert not touches.was.head.any()


@pytest.mark.parametrize("stamp", [0, 7, 0x4B484F50, FIXED.stamp.encode(64), 2**64 - 1])
def test_no_stamp(stamp: int) -> None:
    touches = touches_of(restored(8, stamp, ret=0))
    assert touches.blocks.order.tolist() == [BAD_ORDER]
    assert touches.blocks.page_count.tolist() == [0]
    assert touches.blocks.phys.tolist() == [0x8000]
    assert touches.blocks.facts.private.tolist() == [stamp]
    assert touches.succeeded.tolist() == [False]


def test_restores_where_kho_restore_page_is_inlined() -> None:
    stamp = FIXED.stamp.encode(2)
    records = [
        block(name, 0x40, 2, [1, 0, 0, 0], stamp=stamp, args=(0x40000, 11), ret=page_at(0x40))
        for name in ("kho_restore_folio", "kho_restore_pages")
    ]
    touches = touches_of(*records)
    assert touches.action.tolist() == [Action.RESTORE] * 2
    assert touches.as_folio.tolist() == [True, False]
    assert touches.asked.tolist() == [NO_ORDER, 3]
    assert touches.blocks.order.tolist() == [2, 2]


# Kernels that have no function for a single block


def told(function: str, pfn: int, order: int, **values: Any) -> bytes:
    """A block that a call tells of by its arguments."""
    key = XARRAYS.kho_radix_encode_key(pfn << 12, order)
    refcounts = [1] * min(1 << order, 64)
    return block(function, pfn, order, refcounts, **{"key": key, **values})


def test_blocks_that_calls_tell_of() -> None:
    bits = {"before": BIT_CLEAR, "after": BIT_SET}
    records = [
        told("kho_preserve_folio", 0x200, 9, args=(page_at(0x200),), **bits),
        told("kho_preserve_pages", 0x101, 0, args=(page_at(0x101), 3), **bits),
        told("kho_preserve_pages", 0x102, 1, args=(page_at(0x101), 3), **bits),
        told("kho_preserve_phys", 0x40, 3, args=(0x40000, 0x8000), **bits),
        told("kho_unpreserve_folio", 0x200, 9, before=BIT_SET, after=BIT_CLEAR),
        told("kho_unpreserve_pages", 0x101, 0, before=BIT_CLEAR, after=BIT_CLEAR),
    ]
    touches = touches_of(*records, abi=XARRAYS)
    assert touches.action.tolist() == [Action.ADD] * 4 + [Action.DELETE] * 2
    assert touches.blocks.phys.tolist() == [
        0x200000,
        0x101000,
        0x102000,
        0x40000,
        0x200000,
        0x101000,
    ]
    assert touches.blocks.order.tolist() == [9, 0, 1, 3, 9, 0]
    assert set(touches.blocks.type.tolist()) == {NO_TYPE}
    keys = [1 << 43 | 1, 1 << 52 | 0x101, 1 << 51 | 0x81, 1 << 49 | 8, 1 << 43 | 1, 1 << 52 | 0x101]
    assert touches.blocks.key.tolist() == keys
    assert touches.before.tolist() == [BIT_CLEAR] * 4 + [BIT_SET, BIT_CLEAR]
    assert touches.after.tolist() == [BIT_SET] * 4 + [BIT_CLEAR] * 2
    assert touches.blocks.facts.ones.tolist()[1:4] == [0, 1, 7]
    assert touches.looked.tolist() == [64, 1, 2, 8, 0, 0]
    # Only pages are cut into blocks, each restored as it was cut.
    assert touches.asked.tolist() == [NO_ORDER, 0, 1, NO_ORDER, NO_ORDER, NO_ORDER]
    assert touches.succeeded.all()


def test_pages_of_calls_that_tell_of_their_blocks() -> None:
    for function, args, blocks, pages in (
        ("kho_preserve_folio", (page_at(0x200),), [(0x200, 9)], 512),
        ("kho_preserve_pages", (page_at(0x101), 3), [(0x101, 0), (0x102, 1)], 3),
        ("kho_preserve_phys", (0x101000, 0x3000), [(0x101, 0), (0x102, 1)], 3),
        ("kho_unpreserve_folio", (page_at(0x200),), [(0x200, 9)], 512),
    ):
        records = [told(function, *each, args=args) for each in blocks]
        calls = assembler(XARRAYS).feed_all([*records, call(function, args=args)]).calls
        assert (calls.pages.tolist(), calls.blocks.tolist()) == ([pages], [len(blocks)])
        assert calls.phys.tolist() == [blocks[0][0] << 12]


def test_what_a_vmalloc_call_that_failed_has_undone() -> None:
    """What it had preserved before it did; no function of its own takes that back."""
    nomem = (1 << 32) - 12
    records = [
        told("kho_preserve_pages", 8, 0, call=1),
        told("kho_preserve_pages", 9, 0, call=2),
        told("kho_preserve_pages", 10, 0, call=1),
        call("kho_preserve_vmalloc", call=1, ret=nomem),
        call("kho_preserve_vmalloc", call=2),
    ]
    touches = assembler(XARRAYS).feed_all(records).touches
    assert touches.call.tolist() == [1, 1, 2]
    assert touches.ret.tolist() == [-12, -12, 0]
    assert touches.succeeded.tolist() == [False, False, True]
    # Where a function deletes single blocks, its blocks are there.
    records = [added(8), call("kho_preserve_vmalloc", ret=nomem)]
    of_tree = assembler().feed_all(records).touches
    assert of_tree.succeeded.tolist() == [True]


# What kho_restore_pages() asks for


def kho_restore_pages(pfn: int, nr_pages: int) -> list[tuple[int, int]]:
    """The blocks (pfn, order) that it steps through, by its own loop."""
    end = pfn + nr_pages
    steps = []
    while pfn < end:
        trailing_zeros = (pfn & -pfn).bit_length() - 1 if pfn else 64
        order = min(trailing_zeros, (end - pfn).bit_length() - 1)
        steps.append((pfn, order))
        pfn += 1 << order
    return steps


@given(
    st.integers(0, 1 << 20)
    | st.integers(0, (1 << 52) - 1)
    | st.integers(0, 51).map(lambda n: 1 << n),
    st.integers(1, 5000) | st.integers(1, (1 << 52) - 1),
)
@example(0, 1)
@example(0, (1 << 52) - 1)
@example((1 << 52) - 1, 1)
@example(1, (1 << 52) - 2)
def test_orders_as_kho_restore_pages_asks_for_them(pfn: int, nr_pages: int) -> None:
    nr_pages = min(nr_pages, (1 << 52) - pfn)
    steps = kho_restore_pages(pfn, nr_pages)
    outer: dict[str, Any] = {
        "outer": NUMBERS["kho_restore_pages"],
        "outer_args": (pfn << 12, nr_pages),
    }
    records = [restored(at, FIXED.stamp.encode(0), **outer) for at, _ in steps]
    touches = touches_of(*records)
    assert touches.asked.tolist() == [order for _, order in steps]


@given(st.integers(0, 1 << 20), st.integers(1, 5000))
def test_orders_as_kho_preserve_pages_asks_for_them(pfn: int, nr_pages: int) -> None:
    """The arithmetic is that of restoring, on a struct page."""
    steps = kho_restore_pages(pfn, nr_pages)
    outer: dict[str, Any] = {
        "outer": NUMBERS["kho_preserve_pages"],
        "outer_args": (page_at(pfn), nr_pages),
    }
    records = [added(at, order, **outer) for at, order in steps]
    touches = touches_of(*records)
    assert touches.asked.tolist() == [order for _, order in steps]
    assert not touches.as_folio.any()


def test_nobody_else_asks_for_an_order() -> None:
    """A folio's order is in its stamp alone."""
    stamp = FIXED.stamp.encode(0)
    outside: dict[str, Any] = {
        "outer": NUMBERS["kho_restore_pages"],
        "outer_args": (0x100000, 4),
    }
    records = [
        restored(0x100, stamp, True, outer=NUMBERS["kho_restore_folio"], outer_args=(1 << 20, 4)),
        restored(0x100, stamp, outer=NUMBERS["kho_restore_vmalloc"], outer_args=(1 << 20, 4)),
        restored(0x100, stamp),
        # No loop goes there.
        restored(0x104, stamp, **outside),
        restored(0x1000, stamp, **outside),
        added(0x100, outer=NUMBERS["kho_preserve_folio"], outer_args=(page_at(0x100), 1)),
        added(0x100, outer=NUMBERS["kho_split_preserved_pages"], outer_args=(page_at(0x100), 1)),
        added(0x100),
        added(0x104, outer=NUMBERS["kho_preserve_pages"], outer_args=(page_at(0x100), 4)),
        # What is deleted was asked for when it was preserved.
        block(
            "kho_radix_del_page",
            0x100,
            0,
            [1],
            key=1 << 52 | 0x100,
            outer=NUMBERS["kho_preserve_pages"],
            outer_args=(page_at(0x100), 1),
        ),
    ]
    assert touches_of(*records).asked.tolist() == [NO_ORDER] * len(records)


# Calls


@pytest.mark.parametrize(
    ("function", "ret", "wanted", "failed"),
    [
        ("kho_preserve_pages", 0, 0, False),
        ("kho_preserve_pages", (1 << 32) - 22, -22, True),
        # Above an int a register holds anything.
        ("kho_preserve_pages", 0xDEADBEEF00000000, 0, False),
        ("kho_preserve_folio", 0xDEADBEEFFFFFFFF4, -12, True),
        ("kho_preserve_vmalloc", 2**64 - 12, -12, True),
        ("kho_unpreserve_pages", 0, 0, False),
        # It is an int in some kernels; where it is void, 0 is reported.
        ("kho_unpreserve_pages", (1 << 32) - 16, -16, True),
        ("kho_radix_del_page", 0, 0, False),
        ("kho_restore_pages", 0, 0, True),
        ("kho_restore_pages", 0xFFFFEA0000000040, 0xFFFFEA0000000040 - 2**64, False),
        ("kho_restore_vmalloc", 0x100000000, 0x100000000, False),
    ],
)
def test_what_comes_back(function: str, ret: int, wanted: int, failed: bool) -> None:
    calls = calls_of(call(function, ret=ret))
    assert calls.ret.tolist() == [wanted]
    assert calls.failed.tolist() == [failed]


@pytest.mark.parametrize(
    ("function", "args", "phys", "pages"),
    [
        ("kho_preserve_pages", (page_at(0x1234), 23), 0x1234000, 23),
        ("kho_unpreserve_pages", (page_at(0), 1), 0, 1),
        ("kho_preserve_folio", (page_at(0x1234),), 0x1234000, 0),
        ("kho_unpreserve_folio", (page_at(1 << 30),), 1 << 42, 0),
        ("kho_restore_folio", (0x5000,), 0x5000, 0),
        ("kho_restore_pages", (0x5000, 1 << 33), 0x5000, 1 << 33),
        ("kho_restore_page", (0x5000, 1), 0x5000, 0),
        ("kho_preserve_vmalloc", (0xFFFFC90000000000, 5), NO_PHYS, 0),
        ("kho_unpreserve_vmalloc", (5,), NO_PHYS, 0),
        ("kho_restore_vmalloc", (5,), NO_PHYS, 0),
        ("kho_split_preserved_pages", (page_at(16), 4), 0x10000, 16),
        ("kho_split_preserved_pages", (page_at(16), 0xBAD00000000), 0x10000, 1),
        ("kho_add_subtree", (1, KERNEL.direct_map + 0x7000, 4097), 0x7000, 2),
        ("kho_add_subtree", (1, KERNEL.direct_map + 0x7000, 0), 0x7000, 0),
        ("kho_add_subtree", (1, KERNEL.direct_map + 0x7000, NO_ARGUMENT), 0x7000, 0),
        ("kho_preserve_phys", (0x7000, 0x5000), 0x7000, 5),
        ("kho_remove_subtree", (KERNEL.direct_map + 0x7000,), 0x7000, 0),
        ("kho_radix_add_page", (KERNEL.tree, 0x5, 0, 0), NO_PHYS, 0),
    ],
)
def test_what_the_arguments_name(
    function: str, args: tuple[int, ...], phys: int, pages: int
) -> None:
    calls = calls_of(call(function, args=args))
    assert (calls.phys.tolist(), calls.pages.tolist()) == ([phys], [pages])
    assert calls.args[0].tolist() == [*args, 0, 0, 0, 0][:4]


def test_what_calls_are() -> None:
    stack = (0xFFFFFFFF81000000, 0xFFFFFFFFC0000000, 0)
    record = call(
        "kho_add_subtree",
        call=77,
        tid=5,
        tgid=4,
        comm=b"a-comm-of-15-by",
        name=b"memblock",
        stack=stack,
    )
    calls = calls_of(record)
    assert (calls.call.tolist(), calls.tid.tolist(), calls.tgid.tolist()) == ([77], [5], [4])
    assert (calls.comm.tolist(), calls.name.tolist()) == ([b"a-comm-of-15-by"], [b"memblock"])
    assert (calls.enter.tolist(), calls.leave.tolist()) == ([100], [200])
    assert calls.stack.tolist() == [list(stack)]


def test_pages_of_what_names_no_number() -> None:
    """Folios and vmalloc have as many pages as were touched in the way that was asked for."""
    stamp = FIXED.stamp.encode(2)
    for function, blocks, pages in (
        ("kho_preserve_folio", [added(8, 3)], 8),
        ("kho_preserve_vmalloc", [added(8, 3), added(64, 4), added(1)], 25),
        # One that fails takes back what it has done.
        ("kho_preserve_vmalloc", [added(8, 3), block("kho_radix_del_page", 8, 3, key=1 << 49)], 8),
        ("kho_unpreserve_vmalloc", [block("kho_radix_del_page", 8, 3, key=1 << 49 | 1)], 8),
        ("kho_restore_folio", [restored(4, stamp, True)], 4),
        ("kho_restore_vmalloc", [restored(4, stamp), restored(8, stamp)], 8),
        ("kho_restore_folio", [restored(4, 0, True)], 0),
        ("kho_radix_add_page", [added(8, 3)], 8),
    ):
        calls = calls_of(*blocks, call(function))
        assert (calls.pages.tolist(), calls.blocks.tolist()) == ([pages], [len(blocks)])


def test_a_call_of_the_tree_names_its_block() -> None:
    calls = calls_of(
        added(8, 3, call=1),
        added(5, call=2),
        call("kho_radix_add_page", call=2),
        call("kho_radix_add_page", call=1),
    )
    assert calls.phys.tolist() == [0x5000, 0x8000]
    assert calls.pages.tolist() == [1, 8]


# Records as they come


def seen(batches: Iterable[Batch]) -> Counter[tuple[int, ...]]:
    """All (call, phys) of touches, and (call, blocks, pages) of calls."""
    rows: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        touches, calls = batch.touches, batch.calls
        rows.update(zip(touches.call.tolist(), touches.blocks.phys.tolist(), strict=True))
        columns = (calls.call, calls.blocks, calls.pages)
        rows.update(zip(*(column.tolist() for column in columns), strict=True))
    return rows


def test_nothing() -> None:
    made = assembler()
    for batch in (made.feed_all([]), made.end(), made.feed_all(iter(())), made.end()):
        assert (len(batch.calls), len(batch.touches)) == (0, 0)


def test_touches_wait_for_their_call() -> None:
    made = assembler()
    first = made.feed_all([added(1), added(2, call=2)])
    assert (len(first.calls), len(first.touches)) == (0, 0)
    second = made.feed_all([added(3), call("kho_preserve_vmalloc"), added(4, call=2)])
    assert second.touches.blocks.phys.tolist() == [0x1000, 0x3000]
    assert (second.calls.blocks.tolist(), second.calls.pages.tolist()) == ([2], [2])
    third = made.feed_all([call(call=2)])
    assert third.touches.blocks.phys.tolist() == [0x2000, 0x4000]
    assert len(made.end().touches) == 0


def test_a_call_comes_with_its_last_block() -> None:
    """Most calls touch one: that makes one record of two events."""
    one = told_with(call(call=2), added(7, call=2))
    last = told_with(call("kho_preserve_vmalloc"), added(3))
    name = call("kho_add_subtree", call=3, name=b"memfd")
    records = as_read([added(1), one, added(2), last, name])
    assert [events_in(records[i : i + 1]) for i in range(5)] == [1, 2, 1, 2, 1]
    assert events_in(records) == 7
    batch = assembler().feed(records)
    assert batch.calls.call.tolist() == [2, 1, 3]
    assert batch.calls.blocks.tolist() == [1, 3, 0]
    assert batch.starts().tolist() == [0, 1, 4, 4]
    assert batch.touches.blocks.phys.tolist() == [0x7000, 0x1000, 0x2000, 0x3000]
    # Only a subtree has a name where others have a block.
    assert batch.calls.name.tolist() == [b"", b"", b"memfd"]


def test_touches_stand_in_the_order_of_their_calls() -> None:
    """Calls in the order in which they return, blocks in the order in which they are touched."""
    batch = assembler().feed_all(
        [added(1, call=9), added(2, call=3), added(3, call=9), call(call=3), call(call=9)]
    )
    assert batch.calls.call.tolist() == [3, 9]
    assert batch.touches.blocks.phys.tolist() == [0x2000, 0x1000, 0x3000]
    assert batch.starts().tolist() == [0, 1, 3]


def test_a_call_of_which_the_end_was_lost() -> None:
    made = assembler()
    made.feed_all([added(1), added(2, call=2)])
    assert made.feed_all([call(call=2)]).touches.blocks.phys.tolist() == [0x2000]
    rest = made.end()
    assert (len(rest.calls), rest.touches.blocks.phys.tolist()) == (0, [0x1000])
    assert rest.starts().tolist() == [0]
    assert len(made.end().touches) == 0


def test_calls_with_too_many_blocks_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "WAITING", 2)
    made = assembler()
    vmalloc = call("kho_preserve_vmalloc", call=1)
    assert len(made.feed_all([added(8, 3), added(2, call=2)]).touches) == 0
    # Three of them are too many; the call that returns meanwhile has its own.
    loose = made.feed_all([added(16, 4), added(5, call=3), call(call=3)])
    assert loose.touches.call.tolist() == [3, 1, 2, 1]
    assert loose.starts().tolist() == [0, 1]
    assert len(made.feed_all([added(1), added(3)]).touches) == 0
    last = made.feed_all([vmalloc, call(call=2, args=(page_at(2), 1))])
    assert last.touches.blocks.phys.tolist() == [0x1000, 0x3000]
    assert last.starts().tolist() == [0, 2, 2]
    # The totals know of those that went before.
    assert last.calls.blocks.tolist() == [4, 1]
    assert last.calls.pages.tolist() == [26, 1]
    # A name may come again, when nothing is left of the first call.
    again = made.feed_all([added(7), vmalloc]).calls
    assert (again.blocks.tolist(), again.pages.tolist()) == ([1], [1])


def test_what_waits_is_left_as_it_is() -> None:
    """A poll goes through what it carries, and not through what waits for other calls."""
    made = assembler()
    made.feed_all([added(i, call=1) for i in range(50)])
    before = list(made._waiting._parts[1])
    made.feed_all([added(1, call=2)])
    batch = made.feed_all([added(3, call=2), call(call=2), added(60, call=1)])
    assert batch.touches.blocks.phys.tolist() == [0x1000, 0x3000]
    assert made._waiting._parts[1][:-1] == before
    assert len(made._waiting) == 51
    assert len(made.feed_all([call("kho_preserve_vmalloc", call=1)]).touches) == 51
    assert (len(made._waiting), made._waiting._parts) == (0, {})


def tasks() -> st.SearchStrategy[list[list[bytes]]]:
    """The calls of some tasks, one after the other: blocks, and mostly the call at the end."""
    functions = st.sampled_from(["kho_preserve_vmalloc", "kho_unpreserve_vmalloc"])
    one = st.tuples(functions, st.integers(0, 5), st.sampled_from([True, True, True, False]))

    def build(wanted: list[list[tuple[str, int, bool]]]) -> list[list[bytes]]:
        made = []
        number = 0
        for task in wanted:
            records: list[bytes] = []
            for function, blocks, ends in task:
                number += 1
                records += [added(100 * number + i, i % 2, call=number) for i in range(blocks)]
                if ends:
                    own = call(function, call=number)
                    records.append(told_with(own, records.pop()) if blocks else own)
            made.append(records)
        return made

    return st.lists(st.lists(one, max_size=4), max_size=4).map(build)


@given(tasks(), st.randoms(use_true_random=False), st.sampled_from([0, 1, 3, 1000]))
def test_however_records_come(tasks: list[list[bytes]], random: Any, waiting: int) -> None:
    """Tasks interleave as they like, and records are taken out whenever there is time."""
    together = assembler()
    whole = seen([together.feed_all([each for task in tasks for each in task]), together.end()])

    queues = [list(task) for task in tasks]
    made = assembler()
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "WAITING", waiting)
        taken: list[bytes] = []
        while any(queues):
            queue = random.choice([queue for queue in queues if queue])
            taken.append(queue.pop(0))
            if random.random() < 0.3:
                batches.append(made.feed_all(taken))
                taken = []
        batches += [made.feed_all(taken), made.end()]
    assert seen(batches) == whole
    for batch in batches:
        starts = batch.starts()
        owners = np.repeat(batch.calls.call, np.diff(starts))
        assert np.array_equal(batch.touches.call[: starts[-1]], owners)
        assert not np.isin(batch.touches.call[starts[-1] :], batch.calls.call).any()


def test_what_never_ends_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of calls may be lost all the time; one call goes on and is not forgotten."""
    monkeypatch.setattr(assemble, "WAITING", 40)
    monkeypatch.setattr(assemble, "MOST_CALLS", 10)
    made = assembler()
    loose = 0
    for round_ in range(1, 50):
        others = [added(7, call=100 * round_ + i) for i in range(30)]
        loose += len(made.feed_all([*others, added(1, call=1)]).touches)
        assert len(made._waiting) <= 40
        assert len(made._gone) <= 10
    last = made.feed_all([call("kho_preserve_vmalloc", call=1)])
    assert last.calls.blocks.tolist() == last.calls.pages.tolist() == [49]
    assert loose + len(last.touches) + len(made.end().touches) == 49 * 31
