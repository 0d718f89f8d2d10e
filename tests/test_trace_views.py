# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``khoscope trace`` prints, of batches built by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from khoscope.abi.keys import BAD_ORDER, Abi
from khoscope.checks import RULES, About, BatchFindings, Report
from khoscope.checks.run import KEPT
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
    Losses,
    Touches,
    Tracing,
)
from khoscope.facts.columns import Blocks, Pages
from khoscope.trace.summary import NOT_RETURNED, Callers, Summary, bucket, bucket_range
from khoscope.views.trace.documents import JsonLines, JsonView
from khoscope.views.trace.lines import Lines
from khoscope.views.trace.sums import SummaryView
from tests.synthetic import FIXED, PLAIN, XARRAYS, snapshot

STARTED = 1_000_000_000_000
SYMBOLS = {
    0x10: "bpf_prog_1234_enter [bpf]",
    0x20: "kho_preserve_pages+0x5 [kernel]",
    0x30: "fill+0x1f [kho_exercise]",
    0x31: "scenario_run+0x8 [kho_exercise]",
    0x40: "memfd_luo_preserve+0x2a0 [kernel]",
}


def symbols(address: int) -> str:
    return SYMBOLS.get(address, "[unknown]")


@dataclass
class Touch:
    """What one call did to one block."""

    phys: int
    order: int = 0
    type: int = 0
    action: Action = Action.ADD
    ret: int = 0
    head: int = 1
    ones: int = 0
    others: int = 0
    looked: int | None = None
    unread: int = 0
    before: int | None = None
    after: int | None = None
    private: int = 0

    @property
    def function(self) -> int:
        return {
            Action.ADD: NUMBERS["kho_radix_add_page"],
            Action.DELETE: NUMBERS["kho_radix_del_page"],
            Action.RESTORE: NUMBERS["kho_restore_page"],
        }[self.action]


@dataclass
class Call:
    """A call; its number in the batch is its name."""

    function: str
    args: tuple[int, ...] = ()
    phys: int = NO_PHYS
    pages: int = 0
    ret: int = 0
    touches: list[Touch] = field(default_factory=list)
    comm: bytes = b"bash"
    tgid: int = 412
    at: int = 1_500_000
    ns: int = 2_340
    name: bytes = b""
    stack: tuple[int, ...] = (0x10, 0x20, 0x30, 0x31)
    untold: int = 0


def batch_of(calls: Sequence[Call], loose: Sequence[Touch] = (), abi: Abi = FIXED) -> Batch:
    """The columns of calls, and of blocks whose call has not returned."""
    all_touches = [(i, t) for i, call in enumerate(calls) for t in call.touches]
    all_touches += [(1 << 40, t) for t in loose]
    columns: dict[str, list[Any]] = {
        "call": list(range(len(calls))),
        "function": [NUMBERS[c.function] for c in calls],
        "tid": [c.tgid + 1 for c in calls],
        "tgid": [c.tgid for c in calls],
        "comm": [c.comm for c in calls],
        "enter": [STARTED + c.at for c in calls],
        "leave": [STARTED + c.at + c.ns for c in calls],
        "args": [[*c.args, 0, 0, 0, 0][:4] for c in calls],
        "ret": [c.ret for c in calls],
        "phys": [c.phys for c in calls],
        "pages": [c.pages for c in calls],
        "blocks": [len(c.touches) + c.untold for c in calls],
        "name": [c.name for c in calls],
        "stack": [[*c.stack, 0, 0, 0, 0, 0, 0, 0, 0][:8] for c in calls],
    }
    made = {name: np.array(columns[name], dtype) for name, dtype in Calls.DTYPES.items()}
    made["args"] = made["args"].reshape(-1, 4)
    made["stack"] = made["stack"].reshape(-1, 8)
    return Batch(Calls(**made), touches_of(all_touches, abi))


def touches_of(touched: Sequence[tuple[int, Touch]], abi: Abi) -> Touches:
    facts = Pages.blank(len(touched))
    keys = []
    for i, (_, t) in enumerate(touched):
        looked = (1 << t.order) - t.unread if t.looked is None else t.looked
        facts.head[i], facts.ones[i], facts.others[i] = t.head, t.ones, t.others
        facts.zeros[i] = max(looked - 1, 0) - t.ones - t.others
        facts.unread[i], facts.private[i] = t.unread, t.private
        restored = t.action == Action.RESTORE
        keys.append(0 if restored else abi.kho_radix_encode_key(t.phys, t.order, t.type))

    def column(name: str, of: Any) -> Any:
        return np.array([of(t) for _, t in touched], Touches.DTYPES[name])

    def bit(t: Touch, given: int | None, adds: int, deletes: int) -> int:
        usual = {Action.ADD: adds, Action.DELETE: deletes}.get(t.action, BIT_UNKNOWN)
        return usual if given is None else given

    return Touches(
        np.array([call for call, _ in touched], np.uint64),
        column("function", lambda t: t.function),
        column("action", lambda t: t.action),
        column("ret", lambda t: t.ret),
        column("before", lambda t: bit(t, t.before, BIT_CLEAR, BIT_SET)),
        column("after", lambda t: bit(t, t.after, BIT_SET, BIT_CLEAR)),
        column("as_folio", lambda t: False),
        column("asked", lambda t: NO_ORDER),
        column(
            "looked",
            lambda t: (
                0
                if t.action == Action.DELETE
                else (1 << t.order) - t.unread
                if t.looked is None
                else t.looked
            ),
        ),
        Blocks(
            np.array(keys, np.uint64),
            np.array([t.phys for _, t in touched], np.uint64),
            np.array([t.order for _, t in touched], np.uint8),
            np.array([t.type for _, t in touched], np.int8),
            facts,
        ),
        np.zeros(len(touched), np.bool_),
        Pages.blank(len(touched)),
    )


def tracing(abi: Abi = FIXED) -> Tracing:
    attached = {f.name: "fentry" for f in FUNCTIONS[:13]}
    attached["kho_radix_del_page"] = "kprobe"
    missing = {
        "kho_radix_add_key": "not in this kernel",
        "kho_radix_del_key": "not in this kernel",
        "kho_restore_page": "inlined: of a restore its first block is seen",
    }
    del attached["kho_restore_page"]
    return Tracing(snapshot(abi, []), attached, missing, "16 MiB ring buffer", STARTED)


ERROR = RULES["mixed-refcounts"]
WARNING = RULES["failed"]


def found_of(
    calls: dict[int, int] | None = None, touches: dict[int, int] | None = None
) -> tuple[BatchFindings, Report]:
    """So many findings by row of calls, and of touches; and the report that has them all."""
    found, report = BatchFindings(), Report(About.TRACE)
    for rule, wanted, rows in (
        (ERROR, touches or {}, found.touches),
        (WARNING, calls or {}, found.calls),
    ):
        for row, count in wanted.items():
            message = "no type fits: the pages are 1/mixed (tails: 13 at 0, 2 at more)"
            rows[row] = [rule.finding(message, 0x123456790000 + n, 4) for n in range(count)]
            report.kept.setdefault(rule.name, []).extend(rows[row])
            report.counts[rule.name] += count
    return found, report


def lines(calls: Sequence[Call], abi: Abi = FIXED, **how: Any) -> list[str]:
    """What the calls look like, without start and end."""
    out = io.StringIO()
    view = Lines(out, symbols, **how)
    view.start(tracing(abi))
    before = len(out.getvalue())
    view.batch(batch_of(calls, abi=abi), BatchFindings())
    return out.getvalue()[before:].splitlines()


def one(*touches: Touch, function: str = "kho_preserve_pages", **how: Any) -> list[str]:
    """The lines of one call without its heading, from the blocks on."""
    call = Call(function, (0xFFFFEA0000000000, 1), 0x1000, 1, touches=list(touches))
    return [line[64:] for line in lines([call], **how)[1:]]


def split(phys: int, order: int, **more: Any) -> Touch:
    return Touch(phys, order, type=1, ones=(1 << order) - 1, **more)


def deleted(phys: int, order: int = 0, **more: Any) -> Touch:
    return Touch(phys, order, action=Action.DELETE, **more)


def restored(phys: int, order: int = 0, ret: int = -0x1000, **more: Any) -> Touch:
    return Touch(phys, order, action=Action.RESTORE, ret=ret, **more)


PAGE, AREA, DESCRIPTOR = 0xFFFFEA0000040000, 0xFFFFC90000123000, 0xFFFF888012345678


def each_function() -> list[Call]:
    """A call of each function that can be outermost."""
    folio = (PAGE,), 0x123456780000, 8
    some = (PAGE, 7), 0x123456789000, 7
    area, descriptor = (AREA, DESCRIPTOR), (DESCRIPTOR,)
    low = 0x10000
    return [
        Call("kho_preserve_folio", *folio, touches=[Touch(0x123456780000, 3)]),
        Call(
            "kho_preserve_pages",
            *some,
            touches=[Touch(low), Touch(low * 2, 1), split(low * 4, 2)],
            at=12_345_678_901,
        ),
        Call(
            "kho_preserve_vmalloc",
            area,
            pages=65,
            touches=[Touch(low + (n << 12)) for n in range(65)],
            ns=1_234_567,
        ),
        Call("kho_unpreserve_folio", *folio, touches=[deleted(0x123456780000, 3)]),
        Call("kho_unpreserve_pages", *some, touches=[deleted(low), deleted(low * 4, 2, type=1)]),
        Call(
            "kho_unpreserve_vmalloc",
            descriptor,
            pages=65,
            touches=[deleted(low + (n << 12)) for n in range(65)],
        ),
        Call(
            "kho_split_preserved_pages",
            (PAGE, 4),
            0x123456780000,
            16,
            touches=[deleted(0x123456780000, 4), split(0x123456780000, 4)],
        ),
        Call("kho_restore_folio", (0x9000,), 0x9000, 1, ret=-4096, touches=[restored(0x9000)]),
        Call("kho_restore_pages", (0x9000, 1), 0x9000, 1, touches=[restored(0x9000, ret=0)]),
        Call("kho_restore_vmalloc", descriptor, pages=2, ret=-4096, touches=[restored(0x9000)] * 2),
        Call("kho_restore_page", (0x9000, 1), 0x9000, 1, ret=-4096, touches=[restored(0x9000)]),
        Call("kho_add_subtree", (1, 2, 4096), 0x5000, 1, name=b"LUO"),
        Call("kho_remove_subtree", (2,), 0x5000),
        Call("kho_radix_add_page", (1, 2, 0, 0), 0x2000, 1, touches=[Touch(0x2000)]),
        Call("kho_radix_del_page", (1, 2, 0, 0), 0x2000, 1, touches=[deleted(0x2000)]),
        Call("kho_radix_add_key", (1, 2), ret=-34),
        Call("kho_radix_del_key", (1, 2)),
        Call("kho_preserve_phys", (low, 0x3000), low, 3, touches=[Touch(low), Touch(low * 2, 1)]),
    ]


GOLDEN = """\
bash[412] fill [kho_exercise]
   0.002 preserve_folio     0x123456780000      8    2.3 0      3c 1/0
  12.346 preserve_pages     0x123456789000      7    2.3 0      0 1, 1c 1/0,
                                                                2s 1/1
   0.002 preserve_vmalloc   0xffffc90000123000 65   1235 0      65×0 1
   0.002 unpreserve_folio   0x123456780000      8    2.3 -      3c
   0.002 unpreserve_pages   0x123456789000      7    2.3 -      0, 2s
   0.002 unpreserve_vmalloc 0xffff888012345678 65    2.3 -      65×0
   0.002 split_preserved_pages 0x123456780000  16    2.3 0      -4c, 4s 1/1
   0.002 restore_folio      0x000000009000      1    2.3 ok     0 1
   0.002 restore_pages      0x000000009000      1    2.3 NULL   0 1 NULL
   0.002 restore_vmalloc    0xffff888012345678  2    2.3 ok     2×0 1
   0.002 restore_page       0x000000009000      1    2.3 ok     0 1
   0.002 add_subtree        0x000000005000      1    2.3 0      LUO, 4096 bytes
   0.002 remove_subtree     0x000000005000      0    2.3 -
   0.002 radix_add_page     0x000000002000      1    2.3 0      0 1
   0.002 radix_del_page     0x000000002000      1    2.3 -      0
   0.002 radix_add_key      -                   0    2.3 ERANGE
   0.002 radix_del_key      -                   0    2.3 -
   0.002 preserve_phys      0x000000010000      3    2.3 0      0 1, 1c 1/0
"""


def test_each_function_has_its_line() -> None:
    calls = each_function()
    assert {call.function for call in calls} == {function.name for function in FUNCTIONS}
    assert lines(calls) == GOLDEN.splitlines()


def test_start_says_what_is_attached_and_how() -> None:
    out = io.StringIO()
    Lines(out, symbols).start(tracing())
    assert (
        out.getvalue()
        == """\
7.2.0-test, by hand
read 2026-01-01T00:00:01Z by khoscope test
boot 00000000-0000-0000-0000-000000000001, not a KHO boot
kho-v5, page type at key bit 53
fentry: preserve_folio, preserve_pages, preserve_vmalloc, unpreserve_folio,
  unpreserve_pages, unpreserve_vmalloc, split_preserved_pages, restore_folio,
  restore_pages, restore_vmalloc, add_subtree, remove_subtree
kprobe: radix_del_page
left out: radix_add_key, radix_del_key (not in this kernel)
left out: restore_page (inlined: of a restore its first block is seen)
16 MiB ring buffer

    TIME CALL               ADDRESS         PAGES     US RET    BLOCKS
"""
    )


def test_start_says_what_is_not_seen_before_the_radix_tree() -> None:
    out = io.StringIO()
    traced = tracing(XARRAYS)
    attached = {"kho_preserve_pages": "fentry", "kho_unpreserve_vmalloc": "fentry"}
    missing = {
        "kho_restore_page": "its callers tell what they restore",
        "kho_unpreserve_vmalloc": "this kernel has no function that tells of them",
    }
    traced = dataclasses.replace(traced, attached=attached, missing=missing)
    Lines(out, symbols).start(traced)
    assert (
        out.getvalue().partition("no page types\n")[2].partition("\n\n")[0]
        == """\
fentry: preserve_pages, unpreserve_vmalloc
left out: restore_page (its callers tell what they restore)
without their blocks: unpreserve_vmalloc (this kernel has no function that tells
  of them)
no function of this kernel adds or deletes a single block: blocks are those that
  follow from the arguments of a call that succeeded
16 MiB ring buffer"""
    )


def test_subtrees_whose_size_the_kernel_is_not_told() -> None:
    """Until linux 7.0 they are FDTs, and say it themselves."""
    args = (1, 2, NO_ARGUMENT)
    line = "   0.002 add_subtree        0x000000005000      -    2.3 0      LUO"
    assert lines([Call("kho_add_subtree", args, 0x5000, 0, name=b"LUO")], XARRAYS)[1:] == [line]
    shown = document(batch_of([Call("kho_add_subtree", args, 0x5000, 0, name=b"LUO")]))
    assert shown["calls"][0]["args"] == {"name": "LUO", "blob": "0x2", "size": None}


def test_what_is_void_elsewhere_has_failed() -> None:
    """Some kernels say whether they could unpreserve something."""
    refused = Call("kho_unpreserve_pages", (PAGE, 7), 0x9000, 7, ret=-16)
    line = "   0.002 unpreserve_pages   0x000000009000      7    2.3 EBUSY"
    assert lines([refused])[1] == line
    shown = document(batch_of([refused]))["calls"][0]
    assert (shown["ret"], shown["errno"], shown["failed"]) == (-16, "EBUSY", True)


def test_lines_stay_in_80_columns() -> None:
    calls = [
        dataclasses.replace(call, phys=0xFFFF_FFFF_F000, pages=100_000, at=n * 10**9, ns=ns)
        for call in each_function()
        for n, ns in ((0, 999_949), (9_999, 999_999_000))
    ]
    many = lines(calls)
    assert max(map(len, many)) <= 80
    assert "9999.000 preserve_pages     0xfffffffff000 100000 999999 0      0 1, 1c 1/0," in many
    long = one(*(Touch(n << 30, n % 30, others=1 if n % 30 else 0) for n in range(1, 60)))
    assert max(map(len, long)) <= 16


def test_alike_blocks_are_told_once() -> None:
    same = [Touch(n << 20, 4) for n in range(3)]
    assert one(*same, split(1 << 30, 2), *same) == ["6×4c 1/0, 2s 1/1"]
    # What is found does not depend on where in the call it was.
    assert one(Touch(0, 1), Touch(8192, 1, others=1), Touch(16384, 1)) == [
        "2×1c 1/0,",
        "1c 1/mixed",
    ]


def test_no_more_groups_than_asked_for() -> None:
    touches = [Touch(n << 30, n) for n in range(10)]
    assert one(*touches, limit=3) == ["0 1, 1c 1/0,", "2c 1/0,", "and 7 more"]
    everything = ", ".join(["0 1", *(f"{order}c 1/0" for order in range(1, 10))])
    assert " ".join(one(*touches, limit=None)) == everything


@pytest.mark.parametrize(
    ("touch", "words"),
    [
        (Touch(0), "0 1"),
        (Touch(0, head=0), "0 0"),
        (Touch(0, 3), "3c 1/0"),
        (split(0, 3), "3s 1/1"),
        (Touch(0, 3, ones=2), "3c 1/mixed"),
        (Touch(0, 12, looked=1024), "12c ~1/0"),
        (Touch(0, 5, unread=16), "5c ?"),
        (Touch(0, 3, ret=-34), "3c 1/0 ERANGE"),
        (Touch(0, 3, ret=-524), "3c 1/0 -524"),
        (restored(0, 3, head=2, private=7), "3c 2/0"),
        (restored(0, 3, ret=0), "3c 1/0 NULL"),
        (restored(0, BAD_ORDER, ret=0, looked=0), "no stamp NULL"),
    ],
)
def test_a_block_in_a_word(touch: Touch, words: str) -> None:
    assert one(touch, function="kho_restore_pages") == [words]


def test_blocks_of_a_kernel_without_types_have_no_letter() -> None:
    assert one(Touch(0, 3, type=-1), split(0, 2), abi=PLAIN) == ["3 1/0, 2s 1/1"]


def test_blocks_that_are_not_there_are_counted() -> None:
    call = Call("kho_preserve_pages", (PAGE, 300_000), 0x1000, touches=[Touch(0)], untold=300_000)
    assert [line[64:] for line in lines([call])[1:]] == ["0 1,", "300000 not shown"]


def test_names_cannot_steer_the_terminal() -> None:
    comm = "a\n\033[8m\u202eb\x9b\r".encode()
    call = Call("kho_add_subtree", (1, 2, 3), 0, comm=comm[:15], name=b"n\n\033[31m\xff")
    text = lines([call])
    assert text[0] == "a\\n\\x1b[8m\\u202eb\\x9b\\r[412] fill [kho_exercise]"
    assert [line[64:] for line in text[-2:]] == ["n\\n\\x1b[31m\\xff,", "3 bytes"]
    assert all(line.isprintable() for line in text)


def test_who_called_is_said_when_it_changes() -> None:
    folio = Call("kho_preserve_folio", (PAGE,), 0x1000, 1)
    other = dataclasses.replace(folio, stack=(0x20, 0x40))
    text = lines([folio, folio, other, dataclasses.replace(other, tgid=7), folio])
    assert [line for line in text if not line.startswith(" ")] == [
        "bash[412] fill [kho_exercise]",
        "bash[412] memfd_luo_preserve [kernel]",
        "bash[7] memfd_luo_preserve [kernel]",
        "bash[412] fill [kho_exercise]",
    ]
    assert lines([dataclasses.replace(folio, stack=())])[0] == "bash[412] [unknown]"


def test_each_stack_is_shown_once() -> None:
    folio = Call("kho_preserve_folio", (PAGE,), 0x1000, 1)
    other = dataclasses.replace(folio, stack=(0x20, 0x40))
    # The same stack, but for what traces.
    same = dataclasses.replace(folio, stack=(0x20, 0x30, 0x31))
    text = lines([other, folio, other, same], stacks=True)
    assert [line for line in text if "preserve_folio" not in line] == [
        "bash[412] memfd_luo_preserve [kernel] stack #1",
        "    memfd_luo_preserve+0x2a0 [kernel]",
        "bash[412] fill [kho_exercise] stack #2",
        "    fill+0x1f [kho_exercise]",
        "    scenario_run+0x8 [kho_exercise]",
        "bash[412] memfd_luo_preserve [kernel] stack #1",
        "bash[412] fill [kho_exercise] stack #2",
    ]


def test_findings_stand_below_their_call() -> None:
    calls = [
        Call("kho_preserve_pages", (PAGE, 2), 0x1000, 2, touches=[Touch(0x1000), Touch(0x2000)]),
        Call("kho_preserve_pages", (PAGE, 1), 0x9000, 1, ret=-22),
    ]
    batch = batch_of(calls, loose=[Touch(0x7000)])
    found, report = found_of(calls={1: 1}, touches={1: 3, 2: 1})
    out = io.StringIO()
    view = Lines(out, symbols, limit=2)
    view.start(tracing())
    start = len(out.getvalue())
    view.batch(batch, found)
    assert (
        out.getvalue()[start:]
        == """\
bash[412] fill [kho_exercise]
   0.002 preserve_pages     0x000000001000      2    2.3 0      2×0 1
    error: mixed-refcounts: 0x123456790000 order 4: no type fits: the pages are
        1/mixed (tails: 13 at 0, 2 at more)
    error: mixed-refcounts: 0x123456790001 order 4: no type fits: the pages are
        1/mixed (tails: 13 at 0, 2 at more)
    … 1 more mixed-refcounts
   0.002 preserve_pages     0x000000009000      1    2.3 EINVAL
    warning: failed: 0x123456790000 order 4: no type fits: the pages are 1/mixed
        (tails: 13 at 0, 2 at more)
    error: mixed-refcounts: 0x123456790000 order 4: no type fits: the pages are
        1/mixed (tails: 13 at 0, 2 at more)
"""
    )
    start = len(out.getvalue())
    view.interval(Losses(lost=3, missed=1))
    view.interval(Losses(lost=3, missed=1))
    report.incomplete.append("events lost for want of room in the buffer: 3")
    view.end(report, Losses(lost=3, missed=1, made=1234))
    end = out.getvalue()[start:].splitlines()
    assert end[:4] == [
        "incomplete: 3 events lost, 1 call not followed to the end",
        "",
        "2 calls (1 failed), 3 blocks, 3 pages",
        "1,234 events: 1,231 seen, 3 lost",
    ]
    assert end[5] == "error: mixed-refcounts (4)"
    assert sum(line.startswith("  → ") for line in end) == 2
    assert end[-2:] == [
        "incomplete: events lost for want of room in the buffer: 3",
        "FAIL: mixed-refcounts (4 errors, 1 warning)",
    ]


def test_an_empty_trace_passes() -> None:
    for kind in (Lines, SummaryView):
        out = io.StringIO()
        view = kind(out, symbols)
        view.start(tracing())
        view.end(Report(About.TRACE), Losses())
        assert out.getvalue().endswith(
            "\n0 calls (0 failed), 0 blocks, 0 pages\n"
            "every event was seen, every refcount was read\n\n"
            "PASS: nothing wrong was seen (0 errors, 0 warnings)\n"
        )


def test_colour_only_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    batch = batch_of([Call("kho_preserve_pages", (PAGE, 1), 0x9000, 1, ret=-22)])
    found, report = found_of(calls={0: 1})
    texts = []
    for out in (io.StringIO(), Terminal()):
        view = Lines(out, symbols)
        view.start(tracing())
        view.batch(batch, found)
        view.end(report, Losses())
        texts.append(out.getvalue())
    assert "\033" not in texts[0]
    assert "\033[33mwarning\033[m: failed" in texts[1]
    assert re.sub(r"\033\[\d*m", "", texts[1]) == texts[0]


# -- sums -----------------------------------------------------------------------------------------


def summary_of(*batches: Batch, found: BatchFindings | None = None) -> Summary:
    summary = Summary(Callers(symbols))
    for batch in batches:
        summary.add(batch, found or BatchFindings())
    return summary


def test_sums_by_client() -> None:
    calls = [
        Call("kho_preserve_pages", (PAGE, 3), 0, 3, touches=[Touch(0), Touch(8192, 1)], ns=900),
        Call("kho_preserve_pages", (PAGE, 3), 0, 3, ret=-22, touches=[Touch(0, ret=-22)], ns=1000),
        Call("kho_preserve_folio", (PAGE,), 0, 1, touches=[Touch(0)], ns=7_999, stack=(0x20, 0x40)),
        Call("kho_restore_pages", (0, 1), 0, 1, ret=0, touches=[restored(0, ret=0)], ns=8_000),
    ]
    found, _ = found_of(calls={1: 1}, touches={3: 1, 5: 1})
    summary = summary_of(batch_of(calls, loose=[split(0, 2)]), found=found)
    assert set(summary.clients) == {
        "fill [kho_exercise]",
        "memfd_luo_preserve [kernel]",
        NOT_RETURNED,
    }
    fill = summary.clients["fill [kho_exercise]"]
    preserve, restore = NUMBERS["kho_preserve_pages"], NUMBERS["kho_restore_pages"]
    assert fill.calls == {preserve: 2, restore: 1}
    assert fill.pages == {preserve: 6, restore: 1}
    assert fill.failed == {(preserve, -22): 1, (restore, 0): 1}
    assert fill.blocks == {(Action.ADD, 0, 0): 1, (Action.ADD, 1, 0): 1}
    assert fill.latency == {0: 1, 1: 1, 4: 1}
    assert fill.rules == {"failed": 1}
    other = summary.clients["memfd_luo_preserve [kernel]"]
    assert other.latency == {3: 1}
    assert other.rules == {"mixed-refcounts": 1}
    assert summary.clients[NOT_RETURNED].blocks == {(Action.ADD, 2, 1): 1}
    assert summary.clients[NOT_RETURNED].rules == {"mixed-refcounts": 1}
    assert summary.total.calls.total() == 4


def test_findings_that_are_not_all_there_are_said_to_be_so() -> None:
    call = Call("kho_preserve_pages", (PAGE, 1), 0, 1, touches=[Touch(0)])
    found, _ = found_of(touches={0: KEPT})
    summary = summary_of(batch_of([call]), found=found)
    assert summary.cut_short == {"mixed-refcounts"}
    for kind, said in (
        (SummaryView, "at least 1,000 × mixed-refcounts\n"),
        (Lines, "… maybe more mixed-refcounts, all are counted at the end\n"),
    ):
        out = io.StringIO()
        view = kind(out, symbols)
        view.start(tracing())
        view.batch(batch_of([call]), found)
        view.end(Report(About.TRACE), Losses())
        assert said in out.getvalue()
    summary.reset()
    assert not summary.cut_short


def test_balance_counts_what_changes_the_tree() -> None:
    touches = [
        Touch(0, 2),
        Touch(0, 2, before=BIT_SET),
        Touch(4096 * 4, 2, ret=-12, after=BIT_CLEAR),
        deleted(0, 2),
        deleted(0, 2, before=BIT_CLEAR),
        split(0, 2, before=BIT_UNKNOWN),
        restored(0, 2),
    ]
    call = Call("kho_preserve_pages", (PAGE, 1), 0, 1, touches=touches)
    balance = summary_of(batch_of([call])).balance
    assert set(balance) == {(2, 0), (2, 1)}
    contig = balance[2, 0]
    assert (contig.added, contig.deleted, contig.set, contig.cleared) == (2, 2, 1, 1)
    assert (contig.adds, contig.distinct, contig.unknown) == (0, 0, 0)
    assert (balance[2, 1].adds, balance[2, 1].distinct, balance[2, 1].unknown) == (1, 0, 1)


def test_sums_of_a_load() -> None:
    """10^5 calls in batches: the sums come out, whatever the order and the batches are."""
    some = [
        Call("kho_preserve_pages", (PAGE, 5), 0, 5, touches=[Touch(0, 2), Touch(1 << 14)], ns=1500),
        Call("kho_unpreserve_pages", (PAGE, 5), 0, 5, touches=[deleted(0, 2)], stack=(0x20, 0x40)),
        Call("kho_preserve_pages", (PAGE, 5), 0, 5, ret=-12),
        Call("kho_preserve_folio", (PAGE,), 0, 16, touches=[split(0, 4)], ns=70_000),
    ]
    small = batch_of(some)
    times = 5_000
    calls = small.calls[np.tile(np.arange(4), times)]
    touches = small.touches[np.tile(np.arange(4), times)]
    calls = dataclasses.replace(calls, call=np.arange(4 * times, dtype=np.uint64))
    touches = dataclasses.replace(
        touches,
        call=np.repeat(np.arange(4 * times), np.tile([2, 1, 0, 1], times)).astype(np.uint64),
    )
    looked_up: list[int] = []

    def counting(address: int) -> str:
        looked_up.append(address)
        return symbols(address)

    summary = Summary(Callers(counting))
    for _ in range(5):
        summary.add(Batch(calls, touches), BatchFindings())
    fill, kernel = (
        summary.clients[name] for name in ("fill [kho_exercise]", "memfd_luo_preserve [kernel]")
    )
    n = 5 * times
    preserve, folio = NUMBERS["kho_preserve_pages"], NUMBERS["kho_preserve_folio"]
    assert fill.calls == {preserve: 2 * n, folio: n}
    assert fill.pages == {preserve: 10 * n, folio: 16 * n}
    assert fill.failed == {(preserve, -12): n}
    assert fill.blocks == {
        (Action.ADD, 2, 0): n,
        (Action.ADD, 0, 0): n,
        (Action.ADD, 4, 1): n,
    }
    assert fill.latency == {1: n, 2: n, 7: n}
    assert kernel.calls == {NUMBERS["kho_unpreserve_pages"]: n}
    assert kernel.blocks == {(Action.DELETE, 2, 0): n}
    assert summary.balance[2, 0].distinct == 0
    assert summary.balance[4, 1].adds == n
    # Stacks are looked up once in each batch, not with each call.
    assert len(looked_up) <= 5 * 16


def test_another_module_at_the_same_address() -> None:
    """Its calls are its own, and those of before stay those of the one that is gone."""
    names = {0x10: "kho_preserve_pages+0x1 [kernel]", 0x20: "fill+0x1 [a_client]"}
    summary = Summary(Callers(names.__getitem__))
    small = batch_of([Call("kho_preserve_pages", (PAGE, 1), 0, 1, stack=(0x10, 0x20))])
    summary.add(small, BatchFindings())
    names[0x20] = "load+0x1 [b_client]"
    for _ in range(2):
        summary.add(small, BatchFindings())
    calls = {name: sums.calls.total() for name, sums in summary.clients.items()}
    assert calls == {"fill [a_client]": 1, "load [b_client]": 2}


def test_buckets_are_powers_of_two() -> None:
    us = np.array([0, 1, 2, 3, 4, 1023, 1024, 2**40])
    numbers = bucket((us * 1000 + 999).astype(np.uint64)).tolist()
    assert numbers == [0, 1, 2, 2, 3, 10, 11, 41]
    for number, value in zip(numbers, us.tolist(), strict=True):
        first, last = bucket_range(number)
        assert first <= value <= last


def test_summary_view() -> None:
    calls = [
        Call("kho_preserve_pages", (PAGE, 5), 0, 5, touches=[Touch(0, 2), Touch(1 << 14)]),
        Call("kho_preserve_pages", (PAGE, 5), 0, 5, ret=-12, ns=20_000),
    ]
    out = io.StringIO()
    view = SummaryView(out, symbols)
    view.start(tracing())
    start = len(out.getvalue())
    view.batch(batch_of(calls), BatchFindings())
    view.interval(Losses())
    view.batch(batch_of(calls[1:]), BatchFindings())
    view.interval(Losses(lost=1))
    view.end(Report(About.TRACE), Losses(lost=1, made=5))
    assert out.getvalue()[start:] == SUMMARY
    assert max(map(len, out.getvalue().splitlines())) <= 80


SUMMARY = """\

interval 1

fill [kho_exercise]
call              calls    failed    pages
--------------  -------  --------  -------
preserve_pages        2         1       10

action      order  type      blocks    pages    bytes
--------  -------  ------  --------  -------  -------
add             0  contig         1        1    4 KiB
add             2  contig         1        4   16 KiB

   us    calls
-----  -------  ----------------------------------------
  2-3        1  ########################################
  4-7        0
 8-15        0
16-31        1  ########################################
1 × preserve_pages → ENOMEM

interval 2

fill [kho_exercise]
call              calls    failed    pages
--------------  -------  --------  -------
preserve_pages        1         1        5

   us    calls
-----  -------  ----------------------------------------
16-31        1  ########################################
1 × preserve_pages → ENOMEM
incomplete: 1 event lost

all together

fill [kho_exercise]
call              calls    failed    pages
--------------  -------  --------  -------
preserve_pages        3         2       15

action      order  type      blocks    pages    bytes
--------  -------  ------  --------  -------  -------
add             0  contig         1        1    4 KiB
add             2  contig         1        4   16 KiB

   us    calls
-----  -------  ----------------------------------------
  2-3        1  ####################
  4-7        0
 8-15        0
16-31        2  ########################################
2 × preserve_pages → ENOMEM

  order  type      adds    deletes    balance    in the tree
-------  ------  ------  ---------  ---------  -------------
      0  contig       1          0         +1             +1
      2  contig       1          0         +1             +1

3 calls (2 failed), 2 blocks, 5 pages
5 events: 4 seen, 1 lost

PASS: nothing wrong was seen (0 errors, 0 warnings)
"""


# -- JSON -----------------------------------------------------------------------------------------


def document(*batches: Batch, stacks: bool = False) -> dict[str, Any]:
    out = io.StringIO()
    view = JsonView(out, symbols, stacks)
    view.start(tracing())
    for batch in batches:
        view.batch(batch, BatchFindings())
        view.interval(Losses())
    view.end(Report(blocks=3), Losses(open=2))
    parsed: dict[str, Any] = json.loads(out.getvalue())
    return parsed


def test_json_is_one_document_however_it_ends() -> None:
    empty = document()
    assert empty["schema"] == "khoscope.trace/1"
    assert empty["calls"] == []
    assert empty["buffer"] == "16 MiB ring buffer"
    assert empty["attached"]["kho_radix_del_page"] == "kprobe"
    assert empty["missing"]["kho_radix_add_key"] == "not in this kernel"
    assert empty["losses"] == vars(Losses(open=2))
    assert (empty["verdict"], empty["findings"], empty["counts"]) == ("pass", [], {})
    assert empty["summary"]["clients"] == {}
    assert {"taken", "kernel", "abi", "handover"} <= empty.keys()
    batch = batch_of(each_function())
    full = document(batch, batch)
    assert [call["call"] for call in full["calls"]] == [c.function for c in each_function()] * 2


def test_json_says_what_was_passed_and_what_came_back() -> None:
    calls = {call["call"]: call for call in document(batch_of(each_function()))["calls"]}
    args = {name: call["args"] for name, call in calls.items()}
    page, area, descriptor = f"{PAGE:#x}", f"{AREA:#x}", f"{DESCRIPTOR:#x}"
    assert args["kho_preserve_folio"] == {"folio": page}
    assert args["kho_preserve_pages"] == {"page": page, "nr_pages": 7}
    assert args["kho_preserve_vmalloc"] == {"ptr": area, "preservation": descriptor}
    assert args["kho_split_preserved_pages"] == {"page": page, "order": 4}
    assert args["kho_restore_page"] == {"phys": "0x9000", "is_folio": True}
    assert args["kho_add_subtree"] == {"name": "LUO", "blob": "0x2", "size": 4096}
    assert args["kho_radix_add_page"] == {"tree": "0x1", "pfn": "0x2", "order": 0, "type": 0}
    assert args["kho_radix_add_key"] == {"tree": "0x1", "key": "0x2"}

    def outcome(name: str) -> tuple[Any, ...]:
        return tuple(calls[name][key] for key in ("ret", "errno", "failed"))

    assert outcome("kho_preserve_pages") == (0, None, False)
    assert outcome("kho_radix_add_key") == (-34, "ERANGE", True)
    assert outcome("kho_restore_folio") == ("0xfffffffffffff000", None, False)
    assert outcome("kho_restore_pages") == (None, None, True)
    assert outcome("kho_unpreserve_pages") == (None, None, False)
    assert calls["kho_preserve_vmalloc"]["phys"] is None
    preserve = calls["kho_preserve_pages"]
    assert preserve["time"] == pytest.approx(12.345678901)
    assert (preserve["ns"], preserve["pid"], preserve["tid"]) == (2_340, 412, 413)
    assert (preserve["comm"], preserve["client"]) == ("bash", "fill [kho_exercise]")
    assert (preserve["phys"], preserve["pages"]) == ("0x123456789000", 7)
    assert "stack" not in preserve


def test_json_blocks() -> None:
    stamp = FIXED.stamp.encode(3)
    call = Call(
        "kho_restore_pages",
        (0x8000, 8),
        0x8000,
        8,
        touches=[
            restored(0x8000, 3, private=stamp, ones=7),
            deleted(0x10000, 4),
            Touch(0x20000, 4, ret=-34, before=BIT_UNKNOWN, after=BIT_CLEAR, looked=4, others=1),
        ],
    )
    (row,) = document(batch_of([call]), stacks=True)["calls"]
    assert row["stack"] == ["fill+0x1f [kho_exercise]", "scenario_run+0x8 [kho_exercise]"]
    assert row["findings"] == []
    counts = {"others": 0, "odd": 0, "head": 1}
    assert row["blocks"] == [
        {
            "phys": "0x8000",
            "order": 3,
            "pages": 8,
            "type": "contig",
            "key": None,
            "action": "restore",
            "ret": "0xfffffffffffff000",
            "was_set": None,
            "is_set": None,
            "refcounts": {**counts, "zeros": 0, "ones": 7, "looked": 8},
            "stamp": f"{stamp:#x}",
        },
        {
            "phys": "0x10000",
            "order": 4,
            "pages": 16,
            "type": "contig",
            "key": f"{FIXED.kho_radix_encode_key(0x10000, 4, 0):#x}",
            "action": "delete",
            "ret": None,
            "was_set": True,
            "is_set": False,
            "refcounts": None,
            "stamp": None,
        },
        {
            "phys": "0x20000",
            "order": 4,
            "pages": 16,
            "type": "contig",
            "key": f"{FIXED.kho_radix_encode_key(0x20000, 4, 0):#x}",
            "action": "add",
            "ret": -34,
            "was_set": None,
            "is_set": False,
            "refcounts": {**counts, "zeros": 2, "ones": 0, "others": 1, "looked": 4},
            "stamp": None,
        },
    ]


def test_json_lines() -> None:
    many = Call(
        "kho_preserve_pages", (PAGE, 1), 0, 1, touches=[Touch(n << 12) for n in range(2500)]
    )
    hostile = Call("kho_preserve_folio", (PAGE,), 0, 1, comm=b"a\n\x9b\033[m", touches=[Touch(0)])
    found, report = found_of(touches={2501: 1})
    out = io.StringIO()
    view = JsonLines(out, symbols)
    view.start(tracing())
    view.batch(batch_of([many, hostile], loose=[Touch(0x7000)]), found)
    view.end(report, Losses())
    assert out.getvalue().isascii()
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [row["call"] for row in rows] == ["kho_preserve_pages", "kho_preserve_folio", None, None]
    assert [int(b["phys"], 16) >> 12 for b in rows[0]["blocks"]] == list(range(2500))
    assert rows[1]["comm"] == "a\n\\x9b\033[m"
    assert [block["phys"] for block in rows[1]["blocks"]] == ["0x0"]
    assert [block["phys"] for block in rows[2]["blocks"]] == ["0x7000"]
    assert [finding["rule"] for finding in rows[2]["findings"]] == ["mixed-refcounts"]
    assert rows[3]["verdict"] == "fail"
    assert rows[3]["summary"]["total"]["calls"] == 2


def test_json_summary() -> None:
    calls = [
        Call("kho_preserve_pages", (PAGE, 5), 0, 5, touches=[Touch(0, 2), Touch(1 << 14)]),
        Call("kho_preserve_pages", (PAGE, 5), 0, 5, ret=-12, ns=20_000),
        Call("kho_restore_folio", (0,), 0, 5, ret=0, touches=[restored(0, BAD_ORDER, 0, looked=0)]),
    ]
    summary = document(batch_of(calls))["summary"]
    assert summary["total"] == summary["clients"]["fill [kho_exercise]"]
    assert summary["total"] == {
        "calls": 3,
        "failed": 2,
        "functions": {
            "kho_preserve_pages": {"calls": 2, "failed": 1, "pages": 10},
            "kho_restore_folio": {"calls": 1, "failed": 1, "pages": 5},
        },
        "errors": [
            {"call": "kho_preserve_pages", "ret": -12, "errno": "ENOMEM", "count": 1},
            {"call": "kho_restore_folio", "ret": None, "errno": None, "count": 1},
        ],
        "blocks": [
            {"action": "add", "order": 0, "type": "contig", "blocks": 1, "pages": 1, "bytes": 4096},
            {
                "action": "add",
                "order": 2,
                "type": "contig",
                "blocks": 1,
                "pages": 4,
                "bytes": 16384,
            },
        ],
        "latency": [{"us": [2, 3], "calls": 2}, {"us": [16, 31], "calls": 1}],
        "rules": {},
    }
    assert summary["balance"][1] == {
        "order": 2,
        "type": "contig",
        "added": 1,
        "deleted": 0,
        "set": 1,
        "cleared": 0,
        "unknown": 0,
        "adds": 1,
        "distinct": 1,
    }
