# SPDX-License-Identifier: LGPL-2.1-or-later
"""
From the records of bpf/kho_trace.c to facts.

The kernel reports each outermost call when it returns, with the last block that it touched; the
other blocks of a call come before it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, U64, Abi
from ..facts.calls import (
    FUNCTIONS,
    NO_ARGUMENT,
    NO_ORDER,
    NO_PHYS,
    NUMBERS,
    Action,
    Batch,
    CallKind,
    Calls,
    Touches,
    Use,
    rows_of,
)
from ..facts.columns import Blocks, Pages
from ..sources.kernel import Layout
from ..sources.pages import PageLayout, StructPages

#: How many touches may wait for their calls to return: one call may preserve the memory of a whole
#: host.
WAITING = 1 << 18
#: How many calls the BPF program follows at once (``MAX_TASKS`` in bpf/kho_trace.c).
MOST_CALLS = 1024

_POINTER = np.array([f.returns == "pointer" for f in FUNCTIONS])
_OF_KIND = {
    CallKind.PRESERVE: Action.ADD,
    CallKind.UNPRESERVE: Action.DELETE,
    CallKind.RESTORE: Action.RESTORE,
}
# What a function does to the blocks that it tells of, by itself or where no other function does.
_ACTIONS = np.array([_OF_KIND[f.kind] if f.otherwise else f.action for f in FUNCTIONS], np.int8)
#: Functions that tell of the blocks that their arguments name.
_TELLS = np.array([f.otherwise > Use.NAMED for f in FUNCTIONS])
_NAMED = np.array([f.use == Use.NAMED for f in FUNCTIONS])
_PRESERVES = np.array([f.kind == CallKind.PRESERVE for f in FUNCTIONS])
_TREE = np.array([f.kind == CallKind.TREE for f in FUNCTIONS])
#: By function: the action of the touches that make up what a call was asked for.
MEANT = [_OF_KIND.get(f.kind, f.action) for f in FUNCTIONS]


#: ``struct touch``.
TOUCH = np.dtype(
    [
        ("args", "<u8", (2,)),
        ("ret", "<u8"),
        ("pfn", "<u8"),
        ("key", "<u8"),
        ("private", "<u8"),
        ("flags", "<u8"),
        ("compound", "<u8"),
        ("compound_behind", "<u8"),
        ("refcount", "<u4"),
        ("page_type", "<u4"),
        ("order", "<u4"),
        ("looked", "<u4"),
        ("unread", "<u4"),
        ("zeros", "<u4"),
        ("ones", "<u4"),
        ("odd", "<u4"),
        ("before", "u1"),
        ("after", "u1"),
        ("function", "u1"),
        ("outer", "u1"),
        ("as_folio", "u1"),
        ("compound_order", "u1"),
        ("spare", "u1", (2,)),
    ]
)


def call_dtype(frames: int) -> np.dtype[np.void]:
    """``struct call``."""
    return np.dtype(
        [
            ("call", "<u8"),
            ("enter", "<u8"),
            ("leave", "<u8"),
            ("args", "<u8", (4,)),
            ("ret", "<u8"),
            ("tid", "<u4"),
            ("tgid", "<u4"),
            ("function", "u1"),
            ("has_returned", "u1"),
            ("has_block", "u1"),
            ("spare", "u1", (5,)),
            ("comm", "S16"),
            ("blocks", "<u8"),
            ("pages", "<u8"),
            ("stack", "<u8", (frames,)),
        ]
    )


def record_dtype(frames: int) -> np.dtype[np.void]:
    """``struct record``: a subtree's ``name`` is where a ``touch`` would be."""
    call = call_dtype(frames)
    return np.dtype(
        {
            "names": ["call", "touch", "name"],
            "formats": [call, TOUCH, "S32"],
            "offsets": [0, call.itemsize, call.itemsize],
        }
    )


class _Waiting:
    """
    Touches whose calls have not returned, by call.

    So a poll goes through what it carries and what its calls have waited for, whatever else waits.
    """

    def __init__(self) -> None:
        #: Of each call: parts, each with the numbers of its touches as they came.
        self._parts: dict[int, list[tuple[NDArray[np.int64], Touches]]] = {}
        self._count = 0
        self._came = 0

    def __len__(self) -> int:
        return self._count

    def add(self, touches: Touches) -> None:
        """Have touches wait."""
        number = np.arange(self._came, self._came + len(touches))
        by = np.argsort(touches.call, kind="stable")
        begins = np.flatnonzero(np.diff(touches.call[by])) + 1
        for rows in np.split(by, begins) if len(by) else ():
            part = touches[rows]
            self._parts.setdefault(int(part.call[0]), []).append((number[rows], part))
        self._count += len(touches)
        self._came += len(touches)

    def of(self, calls: U64) -> list[Touches]:
        """What has waited for some calls, in order within each of them."""
        waiting = np.fromiter(self._parts, np.uint64, len(self._parts))
        returned = waiting[rows_of(calls, waiting) >= 0].tolist()
        found = [part for call in returned for _, part in self._parts.pop(call)]
        self._count -= sum(map(len, found))
        return found

    def all(self) -> Touches:
        """All that have waited, in the order in which they came."""
        parts = [part for parts in self._parts.values() for part in parts]
        self._parts, self._count = {}, 0
        if not parts:
            return Touches.empty()
        number = np.concatenate([number for number, _ in parts])
        return Touches.concatenate(part for _, part in parts)[np.argsort(number)]


class Assembler:
    """
    Turns records into batches.

    :param frames: stack frames in each ``struct call``.
    :param counted: records are of what is odd alone, and all else is counted by kind: how many
        blocks and pages a call has touched is in its own record.
    """

    def __init__(self, abi: Abi, layout: Layout, frames: int, counted: bool = False) -> None:
        self._counted = counted
        self._abi = abi
        self._layout = layout
        self._record = record_dtype(frames)
        self._page_pair = _page_pair(layout.pages)
        self._waiting = _Waiting()
        #: By call: the tally of touches that could not wait for it.  The call that was active last
        #: comes last.
        self._gone: dict[int, U64] = {}

    def feed(self, records: NDArray[np.uint8]) -> Batch:
        """
        The calls among the records, with their touches.  Touches whose call has not returned wait.

        :param records: u8, shape (n, size of :func:`record_dtype`).
        """
        new = self._touches(records)
        returned = self._viewed(records)["call"]["has_returned"] != 0
        raw = self._viewed(_picked(records, returned))
        call = raw["call"]
        open_ = rows_of(call["call"], new.call) < 0
        touches = Touches.concatenate([*self._waiting.of(call["call"]), new[~open_]])
        self._waiting.add(new[open_])
        loose = Touches.empty()
        if len(self._waiting) > WAITING:
            loose = self._waiting.all()
            self._remember(loose)
        row = rows_of(call["call"], touches.call)
        done = np.argsort(row, kind="stable")
        mine = _undone(touches[done], call, row[done])
        calls = self._calls(raw, mine, row[done])
        if self._counted:
            calls = dataclasses.replace(calls, pages=call["pages"], blocks=call["blocks"])
        return Batch(calls, Touches.concatenate([mine, loose]))

    def of_kinds(self, calls: NDArray[np.uint8], blocks: NDArray[np.uint8]) -> Batch:
        """
        What the examples of some kinds say, each for itself: whose call did that to a block is not
        known of examples.
        """
        raw, none = self._viewed(calls), np.zeros(0, np.int64)
        own = self._calls(raw, Touches.empty(), none)
        call = raw["call"]
        return Batch(
            dataclasses.replace(own, pages=call["pages"], blocks=call["blocks"]),
            self._touches(blocks),
        )

    def end(self) -> Batch:
        """The touches that are still waiting for their calls."""
        return Batch(Calls.empty(), self._waiting.all())

    def _remember(self, loose: Touches) -> None:
        """
        Keep the tally of these touches until their calls return, for as many calls as can be open.
        """
        calls, last, row = np.unique(loose.call[::-1], return_index=True, return_inverse=True)
        tally = _tally(loose[::-1], row, len(calls))
        for i in np.argsort(-last, kind="stable").tolist():
            call = int(calls[i])
            self._gone[call] = self._gone.pop(call, 0) + tally[i]
        for call in list(self._gone)[:-MOST_CALLS]:
            del self._gone[call]

    def _viewed(self, records: NDArray[np.uint8]) -> NDArray[np.void]:
        """``struct record``, to look into; rows are picked much faster while they are bytes."""
        viewed: NDArray[np.void] = records.view(self._record)[:, 0]
        return viewed

    def _touches(self, records: NDArray[np.uint8]) -> Touches:
        """What the records tell of blocks, if they do."""
        told = self._viewed(records)
        stands = told["call"]["has_block"] != 0
        action = _ACTIONS[np.where(stands, told["touch"]["function"], 0)]
        # Other trees of the same kind have keys that do not stand for blocks.
        stands &= (action == Action.RESTORE) | (told["touch"]["order"] != NO_ORDER)
        told = self._viewed(_picked(records, stands))
        call, raw = told["call"]["call"], told["touch"]
        function = raw["function"]
        action = _ACTIONS[function]
        restored = action == Action.RESTORE
        blocks = self._blocks(raw, restored)
        by_page = function == NUMBERS["kho_restore_page"]
        as_folio = np.where(by_page, raw["as_folio"] != 0, function == NUMBERS["kho_restore_folio"])
        return Touches(
            call,
            function,
            action,
            _returned(function, raw["ret"]),
            raw["before"],
            raw["after"],
            restored & as_folio,
            self._asked(raw, by_page),
            np.where(action == Action.DELETE, 0, self._looked(raw, blocks)).astype(np.uint32),
            blocks,
            np.zeros(len(raw), np.bool_),
            Pages.blank(len(raw)),
        )

    def _looked(self, raw: NDArray[np.void], blocks: Blocks) -> NDArray[np.uint32]:
        """
        How many pages of each block were looked at: also those that share their struct pages with
        others, of which there is nothing to be seen (``own_pages()``).
        """
        facts, looked = blocks.facts, raw["looked"]
        shares = self._layout.pages.is_optimized(facts.page_type, facts.private)
        shares &= (facts.compound >= blocks.order) & (blocks.page_count > facts.unread)
        every = np.minimum(blocks.page_count, 2**32 - 1) - facts.unread
        return np.where(shares & (looked > 0), every, looked).astype(np.uint32)

    def _blocks(self, raw: NDArray[np.void], restored: NDArray[np.bool_]) -> Blocks:
        abi = self._abi
        key = np.where(restored, 0, raw["key"] & np.uint64((1 << abi.stored_bits) - 1))
        key = key.astype(np.uint64)
        phys, order, kind = abi.kho_radix_decode_keys(key)
        if abi.type_shift is not None and abi.type_is_refused:
            # A key that the tree refused still had a type.
            split = (raw["key"] >> np.uint64(abi.type_shift)) & np.uint64(1)
            refused = ~restored & (split != 0)
            kind = np.where(refused, KHO_PAGE_SPLIT, kind).astype(np.int8)
            key = np.where(refused, raw["key"], key).astype(np.uint64)
        stamp = raw["private"]
        phys = np.where(restored, raw["pfn"] << np.uint64(abi.page_shift), phys)
        stamped = np.where(raw["order"] < 64, raw["order"], BAD_ORDER)
        order = np.where(restored, stamped, order).astype(np.uint8)
        types = abi.stamp.type(stamp) if abi.has_types else np.full(len(raw), NO_TYPE, np.int8)
        return Blocks(key, phys, order, np.where(restored, types, kind), self._pages(raw, restored))

    def _pages(self, raw: NDArray[np.void], restored: NDArray[np.bool_]) -> Pages:
        # Of each block, the first two, with what was told of them.
        pair = np.zeros(len(raw), self._page_pair)
        for name in self._page_pair.names or ():
            pair[name] = raw[name]
        pfn = np.stack([raw["pfn"], raw["pfn"] + np.uint64(1)], axis=1).reshape(-1)
        pages = StructPages(self._layout.pages, pair.tobytes(), pfn, self._abi.page_size)
        head = pages.refcount[0::2]
        looked = raw["looked"].astype(np.int64)
        # The counts include the first page.  The kernel reads that page a second time for them, and
        # its refcount may have changed in between.
        tails = np.maximum(looked - 1, 0)
        some = looked > 0
        zeros = np.clip(raw["zeros"].astype(np.int64) - (some & (head == 0)), 0, tails)
        ones = np.clip(raw["ones"].astype(np.int64) - (some & (head == 1)), 0, tails - zeros)
        page_type = pages.page_type[0::2]
        # Each block comes with two struct pages: the second one holds the order of a compound page.
        compound = pages.compound_order()[0::2] if len(raw) else np.zeros(0, np.int8)
        return Pages(
            private=np.where(restored, raw["private"], pages.private[0::2]),
            head=head.copy(),
            zeros=zeros.astype(np.uint32),
            ones=ones.astype(np.uint32),
            others=(tails - zeros - ones).astype(np.uint32),
            odd=raw["odd"].copy(),
            free=(page_type >> np.uint32(24) == self._layout.pages.buddy_type).astype(np.uint32),
            flags=pages.flags[0::2].copy(),
            page_type=page_type.copy(),
            compound=compound.copy(),
            unread=raw["unread"].copy(),
            pristine=np.zeros(len(raw), np.uint32),
        )

    def _asked(self, raw: NDArray[np.void], by_page: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """
        The order by the arithmetic of ``kho_preserve_pages`` or ``kho_restore_pages``, if that was
        the caller; else ``NO_ORDER``.
        """
        told = raw["function"] == NUMBERS["kho_preserve_pages"]
        pages = NUMBERS["kho_restore_pages"]
        inner = by_page & (raw["outer"] == pages)
        preserved = (_ACTIONS[raw["function"]] == Action.ADD) & (
            raw["outer"] == NUMBERS["kho_preserve_pages"]
        )
        args = raw["args"]
        shift = np.uint64(self._abi.page_shift)
        first = np.where(preserved, self._pfn_of(args[:, 0]), args[:, 0] >> shift)
        left = first + args[:, 1] - raw["pfn"]
        known = (inner | preserved | (raw["function"] == pages)) & (left > 0) & (left < 1 << 52)
        left = np.where(known, left, 1)
        # Below 2^53 a float is exact: frexp gives ilog2() + 1.
        most = np.frexp(left.astype(np.float64))[1] - 1
        lowest = raw["pfn"] & (~raw["pfn"] + np.uint64(1))
        ctz = np.where(lowest == 0, 64, np.frexp(lowest.astype(np.float64))[1] - 1)
        asked = np.where(known, np.minimum(ctz, most), NO_ORDER)
        return np.where(told, raw["order"], asked).astype(np.uint8)

    def _pfn_of(self, page: U64) -> U64:
        """``page_to_pfn()``."""
        layout = self._layout.pages
        return (page - np.uint64(layout.vmemmap)) // np.uint64(layout.size)

    def _calls(self, records: NDArray[np.void], touches: Touches, of: NDArray[np.int64]) -> Calls:
        raw = records["call"]
        function = raw["function"]
        tally = _tally(touches, of, len(raw))
        if self._gone:
            for row, call in enumerate(raw["call"].tolist()):
                tally[row] += self._gone.pop(call, 0)
        phys = np.full(len(raw), NO_PHYS, np.uint64)
        pages = np.zeros(len(raw), np.uint64)
        for number in np.unique(function).tolist():
            rows = function == number
            phys[rows], asked = self._named(FUNCTIONS[number].arguments, raw["args"][rows])
            pages[rows] = tally[rows, MEANT[number], 1] if asked is None else asked
        of_tree = _TREE[function[of]]
        phys[of[of_tree]] = touches.blocks.phys[of_tree]
        return Calls(
            raw["call"],
            function,
            raw["tid"],
            raw["tgid"],
            raw["comm"],
            raw["enter"],
            raw["leave"],
            raw["args"],
            _returned(function, raw["ret"]),
            phys,
            pages,
            tally[:, :, 0].sum(axis=1, dtype=np.uint64),
            np.where(_NAMED[function], records["name"], b"").astype("S32"),
            raw["stack"],
        )

    def _named(self, names: tuple[str, ...], args: U64) -> tuple[U64, U64 | None]:
        """
        The address and the number of pages that the arguments name; None: they name no number.
        """
        shift = np.uint64(self._abi.page_shift)
        by_name = dict(zip(names, args.T, strict=False))
        phys = np.full(len(args), NO_PHYS, np.uint64)
        if "phys" in by_name:
            phys = by_name["phys"]
        elif "blob" in by_name:
            phys = by_name["blob"] - np.uint64(self._layout.direct_map)
        elif "page" in by_name or "folio" in by_name:
            phys = self._pfn_of(by_name.get("page", by_name.get("folio", args[:, 0]))) << shift
        if "nr_pages" in by_name:
            return phys, by_name["nr_pages"]
        if "order" in by_name and "page" in by_name:
            return phys, np.uint64(1) << np.minimum(by_name["order"] & 0xFF, 63).astype(np.uint64)
        if "size" in by_name:
            size = np.where(by_name["size"] == np.uint64(NO_ARGUMENT), 0, by_name["size"])
            return phys, (size + np.uint64(self._abi.page_size - 1)) >> shift
        return phys, None


def _undone(touches: Touches, raw: NDArray[np.void], of: NDArray[np.int64]) -> Touches:
    """
    The touches of some calls; what a call that failed had preserved before it did is not preserved
    any more.

    Where a function of its own deletes single blocks, its touches tell.
    """
    ret = _returned(raw["function"], raw["ret"])[of]
    failed = _PRESERVES[raw["function"]][of] & _TELLS[touches.function] & (ret < 0)
    failed &= (touches.action == Action.ADD) & (touches.ret >= 0)
    return dataclasses.replace(touches, ret=np.where(failed, ret, touches.ret))


def _picked(records: NDArray[np.uint8], rows: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Some records, which are mostly all: then nothing is copied."""
    return records if rows.all() else records[rows]


def events_in(records: NDArray[np.uint8]) -> int:
    """How many events are told by records: calls that have returned, and blocks."""
    call = call_dtype(0).fields
    assert call is not None
    return int(records[:, [call["has_returned"][1], call["has_block"][1]]].sum())


def _page_pair(layout: PageLayout) -> np.dtype[np.void]:
    """Two ``struct page``, with the places of what ``struct touch`` has of them."""
    places = {
        "flags": ("<u8", layout.flags),
        "private": ("<u8", layout.private),
        "refcount": ("<u4", layout.refcount),
        "page_type": ("<u4", layout.page_type),
        "compound": ("<u8", layout.compound),
        "compound_behind": ("<u8", layout.size + layout.compound),
        "compound_order": ("u1", layout.size + layout.flags),
    }
    formats, offsets = zip(*places.values(), strict=True)
    return np.dtype(
        {
            "names": [*places],
            "formats": formats,
            "offsets": offsets,
            "itemsize": 2 * layout.size,
        }
    )


def _returned(function: NDArray[np.uint8], ret: U64) -> NDArray[np.int64]:
    """
    The return value, by the C type that the function returns; of a function that is void in some
    kernels and not in others, it is 0 if it is void in this one.
    """
    signed = ret.astype(np.uint32).view(np.int32).astype(np.int64)
    return np.where(_POINTER[function], ret.view(np.int64), signed)


def _tally(touches: Touches, of: NDArray[np.int64], rows: int) -> U64:
    """
    u64, shape (rows, actions, 2): blocks and their pages, by the row that each block belongs to.
    """
    at = of * len(Action) + touches.action
    blocks = np.bincount(at, minlength=rows * len(Action)).astype(np.uint64)
    pages = np.zeros_like(blocks)
    np.add.at(pages, at, touches.blocks.page_count)
    return np.stack([blocks, pages], axis=1).reshape(rows, len(Action), 2)
