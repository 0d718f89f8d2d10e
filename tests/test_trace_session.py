# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a trace is asked for, what was there before the kexec, and how a trace goes on."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from khoscope import checks
from khoscope.abi.keys import BAD_ORDER, Abi
from khoscope.facts.calls import Action, Batch, CallKind, Calls, Losses, Touches, Tracing
from khoscope.facts.snapshot import Snapshot
from khoscope.trace import before as before_module
from khoscope.trace import session as session_module
from khoscope.trace.before import Before
from khoscope.trace.call_filter import CallFilter
from khoscope.trace.kinds import Counted, Kinds
from khoscope.trace.probes import Counters, Probes
from khoscope.trace.record import Recorder, load
from khoscope.trace.session import POLL, TraceSession
from khoscope.views.trace.documents import JsonView
from khoscope.views.trace.lines import Lines
from khoscope.words.errors import KhoscopeError
from tests.synthetic import (
    FIXED,
    PLAIN,
    POSTED,
    Block,
    Touch,
    call_of,
    missing,
    snapshot,
    touches_of,
)
from tests.test_trace_assemble import (
    added,
    as_read,
    assembler,
    block,
    call,
    page_at,
    restored,
)

CALLERS = {0xFFFFFFFFC0000010: "a_client_init+0x10 [a_client]"}


def only(batch: Batch, **wanted: object) -> tuple[list[int], list[int]]:
    """Which calls are left, and the addresses of which blocks."""
    left = CallFilter(**wanted).apply(batch)  # type: ignore[arg-type]
    return left.calls.call.tolist(), left.touches.blocks.phys.tolist()


# What is asked for


def several() -> Batch:
    """Four calls by two processes, and a block of a call that has not returned."""
    names = ["kho_preserve_pages", "kho_unpreserve_pages", "kho_restore_folio", "kho_add_subtree"]
    calls = Calls.concatenate(
        call_of(name, ret=-12 if number == 4 else 1, call=number)
        for number, name in enumerate(names, 1)
    )
    calls = replace(
        calls,
        tgid=np.array([10, 10, 20, 20], np.uint32),
        comm=np.array([b"kexecd", b"modprobe", b"kexecd", b"abcdefghijklmno"]),
    )
    touches = touches_of(
        FIXED,
        Touch(Block(0x1000), call=1),
        Touch(Block(0x8000, 3), call=1),
        Touch(Block(0x2000), Action.DELETE, call=2),
        Touch(Block(0x10000, 4), Action.RESTORE, ret=1, call=3),
        Touch(Block(0x3000), call=9),
    )
    return Batch(calls, touches)


def test_everything_is_asked_for() -> None:
    batch = several()
    assert CallFilter().apply(batch).calls is batch.calls
    assert only(batch) == ([1, 2, 3, 4], [0x1000, 0x8000, 0x2000, 0x10000, 0x3000])


@pytest.mark.parametrize(
    ("kinds", "calls", "blocks"),
    [
        ([CallKind.PRESERVE], [1], [0x1000, 0x8000, 0x3000]),
        ([CallKind.UNPRESERVE, CallKind.SUBTREE], [2, 4], [0x2000, 0x3000]),
        ([CallKind.RESTORE], [3], [0x10000, 0x3000]),
        ([CallKind.SPLIT], [], [0x3000]),
        (list(CallKind), [1, 2, 3, 4], [0x1000, 0x8000, 0x2000, 0x10000, 0x3000]),
    ],
)
def test_kinds(kinds: list[CallKind], calls: list[int], blocks: list[int]) -> None:
    """Of a call that has not returned it is not known: its blocks stay."""
    assert only(several(), kinds=frozenset(kinds)) == (calls, blocks)


def test_processes() -> None:
    batch = several()
    assert only(batch, tgid=20) == ([3, 4], [0x10000, 0x3000])
    assert only(batch, tgid=5) == ([], [0x3000])
    assert only(batch, comm="kexecd") == ([1, 3], [0x1000, 0x8000, 0x10000, 0x3000])
    assert only(batch, comm="kexec") == ([], [0x3000])
    # The kernel keeps 15 bytes.
    assert only(batch, comm="abcdefghijklmnop")[0] == [4]
    assert only(batch, comm="kexecd", tgid=10, kinds=frozenset({CallKind.PRESERVE}))[0] == [1]


def test_names_of_processes_are_bytes() -> None:
    assert CallFilter(comm="é" * 10).comm_bytes == ("é" * 7).encode() + b"\xc3"
    # As Python hands over an argument that is no UTF-8.
    assert CallFilter(comm=os.fsdecode(b"\xff\xfe")).comm_bytes == b"\xff\xfe"
    assert CallFilter().comm_bytes is None


def test_orders() -> None:
    batch = several()
    # A call that failed stays, whatever it has touched.
    assert only(batch, min_order=1) == ([1, 3, 4], [0x8000, 0x10000])
    assert only(batch, min_order=4) == ([3, 4], [0x10000])
    assert only(batch, min_order=11) == ([4], [])
    nonsense = Touch(Block(0x1000, BAD_ORDER), Action.RESTORE, call=3)
    assert only(replace(batch, touches=touches_of(FIXED, nonsense)), min_order=11)[0] == [3, 4]


def test_nothing_is_left_of_nothing() -> None:
    empty = Batch(Calls.empty(), Touches.empty())
    assert only(empty, kinds=frozenset({CallKind.SPLIT}), tgid=1, comm="x", min_order=3) == ([], [])


# What was there before


def restores(abi: Abi, *blocks: tuple[int, int]) -> Touches:
    """Restores of blocks that are given as (phys, stamped order)."""
    touches = touches_of(abi, *(Touch(Block(phys), Action.RESTORE, ret=1) for phys, _ in blocks))
    order = np.array([order for _, order in blocks], np.uint8)
    return replace(touches, blocks=replace(touches.blocks, order=order))


@pytest.mark.parametrize("abi", [PLAIN, POSTED, FIXED])
def test_what_blocks_were(abi: Abi) -> None:
    recorded = [
        Block(0x1000, head=1, private=5),
        Block(0x8000, 3, head=1, private=6),
        Block.split(0x40000000, 9, private=7, type=1),
        Block(0, 0, head=3, private=8),
    ]
    touches = restores(
        abi,
        (0x40000000, 9),
        (0x2000, 0),  # of nobody
        (0x1000, 0),
        (0x8000, 2),  # of another order
        (0x8000, 3),
        (0, 0),
    )
    joined = Before(snapshot(abi, recorded)).join(touches)
    assert joined.known.tolist() == [True, False, True, False, True, True]
    assert joined.was.private.tolist() == [7, 0, 5, 0, 6, 8]
    assert joined.was.head.tolist() == [1, 0, 1, 0, 1, 3]
    assert joined.was.ones.tolist() == [511, 0, 0, 0, 0, 0]
    assert joined.blocks is touches.blocks


def test_only_what_is_restored_was_anything() -> None:
    facts = Before(snapshot(FIXED, [Block(0x1000)]))
    touches = touches_of(
        FIXED,
        Touch(Block(0x1000)),
        Touch(Block(0x1000), Action.DELETE),
        Touch(Block(0x1000), Action.RESTORE),
    )
    assert facts.join(touches).known.tolist() == [False, False, True]
    assert len(facts.join(Touches.empty())) == 0


def test_stamps_that_are_nonsense() -> None:
    """Whatever a stamp says, it is another block than the recorded one."""
    keys = [FIXED.kho_radix_encode_key(0, order) for order in (51, 52)]
    huge = [Block(0, BAD_ORDER, key=key) for key in keys]
    facts = Before(snapshot(FIXED, [Block(0x4000, 2), *huge]))
    touches = restores(
        FIXED, (0x4000, BAD_ORDER), (0x4000, 63), (0x4000, 53), (0x5000, 2), (0x4000, 51)
    )
    assert not facts.join(touches).known.any()
    assert facts.join(restores(FIXED, (0x4000, 2), (0, 52), (0, 51))).known.all()


def test_a_block_that_is_recorded_as_both_types() -> None:
    facts = Before(snapshot(FIXED, [Block(0x4000, 2, private=1), Block(0x4000, 2, 1, private=1)]))
    joined = facts.join(restores(FIXED, (0x4000, 2)))
    assert (joined.known.tolist(), joined.was.private.tolist()) == ([True], [1])


def test_a_snapshot_of_nothing() -> None:
    assert not Before(snapshot(FIXED, [])).join(restores(FIXED, (0x1000, 0))).known.any()


def test_a_snapshot_without_struct_pages() -> None:
    facts = snapshot(FIXED, [Block(0x1000)])
    facts = replace(facts, outgoing=replace(facts.outgoing, blocks=[]))
    with pytest.raises(KhoscopeError, match="does not hold the struct pages"):
        Before(facts)


def test_a_snapshot_with_too_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_module, "MOST", 2)
    Before(snapshot(FIXED, [Block(0x1000), Block(0x2000)]))
    with pytest.raises(KhoscopeError, match="more than 2 blocks"):
        Before(snapshot(FIXED, [Block(0x1000), Block(0x2000), Block(0x3000)]))


# Sessions


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    return clock


NOTHING = Counters(0, 0, 0, 0)
EVERYTHING = CallFilter()

Step = Sequence[bytes] | Callable[[], None]


class FakeProbes(Probes):
    """
    Gives out canned records.

    :param steps: what each poll gives, or does before it gives nothing; afterwards there is
        nothing.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        counters: Counters = NOTHING,
        clock: Clock | None = None,
    ) -> None:
        self.steps = list(steps)
        self.clock = clock
        self._counters = counters
        self._symbols = dict(CALLERS)
        self.polled: list[int] = []
        #: How many polls there had been at each arm(False).
        self.disarmed: list[int] = []
        self.learnt = 0
        #: The records of calls that have not returned.
        self.open: list[bytes] = []
        #: Events that are found to be lost when all is over.
        self.late = 0

    def poll(self, milliseconds: int) -> NDArray[np.uint8]:
        self.polled.append(milliseconds)
        if self.clock:
            self.clock.now += milliseconds / 1000
        step = self.steps.pop(0) if self.steps else ()
        if callable(step):
            step()
            step = ()
        return as_read(step)

    def held(self) -> NDArray[np.uint8]:
        # Else calls might tell it, too.
        assert self.steps == []
        return as_read(self.open)

    def arm(self, on: bool) -> None:
        assert not on
        self.disarmed.append(len(self.polled))

    def learn(self, batch: Batch) -> None:
        self.learnt += len(batch.calls)

    def counters(self) -> Counters:
        return self._counters

    def drained(self) -> Counters:
        # Only when there is nothing left.
        assert self.steps == []
        assert self.disarmed
        return replace(self._counters, lost=self._counters.lost + self.late)


class Seen:
    """A view that remembers."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.batches: list[Batch] = []
        self.found: list[checks.BatchFindings] = []
        self.losses: list[Losses] = []

    def start(self, tracing: Tracing) -> None:
        self.order.append("start")

    def batch(self, batch: Batch, found: checks.BatchFindings) -> None:
        self.order.append("batch")
        self.batches.append(batch)
        self.found.append(found)

    def interval(self, losses: Losses) -> None:
        self.order.append("interval")
        self.losses.append(losses)

    def end(self, report: checks.Report, losses: Losses) -> None:
        self.order.append("end")
        self.losses.append(losses)


def tracing(facts: Snapshot | None = None, **untraced: str) -> Tracing:
    attached = {"kho_preserve_pages": "fentry"}
    attached |= {} if untraced else {"kho_restore_page": "fentry"}
    facts = facts or snapshot(FIXED, [])
    return Tracing(facts, attached, missing(attached) | untraced, "16 MiB ring buffer", 50)


def interrupt(number: int = signal.SIGINT) -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), number)


def live(
    steps: Iterable[Step],
    wanted: CallFilter = EVERYTHING,
    before: Before | None = None,
    traced: Tracing | None = None,
    recorder: Recorder | None = None,
) -> tuple[Seen, checks.Report]:
    """A trace that ends after some steps, by Ctrl-C."""
    view = Seen()
    session = TraceSession(traced or tracing(), wanted, view, before)
    probes = FakeProbes([*steps, interrupt])
    return view, session.live(probes, assembler(), recorder, None, None)


GOOD = [added(0x1000), call(args=(page_at(0x1000), 1), stack=(*CALLERS, 0, 0))]
#: The type says contig, the refcounts split.
WRONG = [added(0x100, 2, [1, 1, 1, 1], call=2), call("kho_preserve_folio", call=2)]


class Counting(FakeProbes):
    """Probes that count; :param sights: how many calls there are whenever they are looked at."""

    def __init__(self, sights: Sequence[int], clock: Clock) -> None:
        super().__init__([], Counters(2 * sights[-1], 0, 0, 0), clock)
        self.sights = [*sights]

    def kinds(self) -> tuple[Counted, Counted]:
        so_far = self.sights.pop(0) if len(self.sights) > 1 else self.sights[0]
        count = np.array([so_far], np.uint64)
        calls = Counted([b"client 1"], count, count, as_read([GOOD[1]]))
        return calls, Counted([b"client 1"], count, count, as_read([WRONG[0]]))


def test_what_is_counted_is_looked_at_while_it_goes_on(clock: Clock) -> None:
    """Once a second, as modules may go away, and at the end: each call is told once."""
    view, probes = Seen(), Counting([2, 2, 7, 9], clock)
    session = TraceSession(tracing(), CallFilter(), view, None)
    taker = assembler()
    report = session.live(probes, taker, None, 3.5, None, Kinds(taker))
    assert probes.sights == [9]
    assert "interval" not in view.order
    assert report.blocks == 9
    assert report.counts["type-mismatch"] == 9
    (finding,) = report.kept["type-mismatch"]
    assert finding.times == 9
    assert report.verdict == checks.Verdict.FAIL


def test_a_trace_ends_by_itself(clock: Clock) -> None:
    view = Seen()
    probes = FakeProbes([GOOD, [], WRONG], Counters(4, 0, 0, 0), clock)
    TraceSession(tracing(), CallFilter(), view, None).live(probes, assembler(), None, 0.65, None)
    # Polls are cut so that it ends in time; then comes what has begun by then.
    assert probes.polled[:3] == [POLL] * 3
    assert 0.65 <= sum(probes.polled[: probes.disarmed[0]]) / 1000 <= 0.66
    assert len(probes.polled) == probes.disarmed[0] + 1
    assert view.order == ["start", "batch", "batch", "end"]
    assert probes.learnt == 2


def test_what_has_begun_is_followed_to_its_end(clock: Clock) -> None:
    view = Seen()
    # The call returns after the time is over.
    steps = [GOOD[:1], GOOD[1:], WRONG[:1]]
    probes = FakeProbes(steps, Counters(4, 0, 0, 1), clock)
    report = TraceSession(tracing(), CallFilter(), view, None).live(
        probes, assembler(), None, 0.1, None
    )
    assert probes.disarmed == [1]
    assert [len(batch.calls) for batch in view.batches] == [1, 0]
    assert [len(batch.touches) for batch in view.batches] == [1, 1]
    assert report.counts["type-mismatch"] == 1
    assert view.losses == [Losses(open=1, made=4)]


def test_blocks_of_calls_that_do_not_return(clock: Clock) -> None:
    """The last one would be told with its call; it is not lost."""
    view = Seen()
    probes = FakeProbes([WRONG[:1]], Counters(2, 0, 0, 1), clock)
    probes.open = [added(0x200, call=2)]
    TraceSession(tracing(), CallFilter(), view, None).live(probes, assembler(), None, 0.1, None)
    [batch] = view.batches
    assert (len(batch.calls), batch.touches.call.tolist()) == (0, [2, 2])
    assert batch.touches.blocks.phys.tolist() == [0x100000, 0x200000]


def test_intervals(clock: Clock) -> None:
    view = Seen()
    probes = FakeProbes([GOOD], Counters(9, 2, 3, 4), clock)
    probes.late = 1
    TraceSession(tracing(), CallFilter(), view, None).live(probes, assembler(), None, 2.1, 0.5)
    # Each in its time, though that is no multiple of a poll's.
    assert view.order == ["start", "batch", *["interval"] * 4, "end"]
    said = Losses(lost=2, missed=3, open=4, made=9)
    assert view.losses == [*[said] * 4, replace(said, lost=3)]


def test_time_that_is_too_short_for_a_poll(clock: Clock) -> None:
    probes = FakeProbes([], clock=clock)
    TraceSession(tracing(), CallFilter(), Seen(), None).live(probes, assembler(), None, 1e-9, 1e-9)
    assert probes.polled == [1, POLL]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_trace_in_good_order(number: int) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    view = Seen()
    probes = FakeProbes([GOOD, lambda: interrupt(number), WRONG])
    report = TraceSession(tracing(), CallFilter(), view, None).live(
        probes, assembler(), None, None, None
    )
    assert view.order == ["start", "batch", "batch", "end"]
    assert probes.disarmed == [2]
    assert report.counts["type-mismatch"] == 1
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_khoscope(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    view = Seen()
    traced = tracing()
    probes = FakeProbes([GOOD, interrupt, interrupt])
    session = TraceSession(traced, CallFilter(), view, None)
    with (
        pytest.raises(KeyboardInterrupt),
        Recorder(tmp_path / "a.khotrace", traced.facts) as recorder,
    ):
        session.live(probes, assembler(), recorder, None, None)
    assert view.order == ["start", "batch"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_no_handler() -> None:
    class Broken(Seen):
        def batch(self, batch: Batch, found: checks.BatchFindings) -> None:
            raise BrokenPipeError

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(BrokenPipeError):
        TraceSession(tracing(), CallFilter(), Broken(), None).live(
            FakeProbes([GOOD]), assembler(), None, None, None
        )
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_is_not_asked_for_is_neither_shown_nor_checked() -> None:
    steps = [[*GOOD, *WRONG]]
    view, report = live(steps, CallFilter(kinds=frozenset({CallKind.RESTORE})))
    assert view.order == ["start", "end"]
    assert (report.blocks, report.counts) == (0, {})
    view, report = live(steps)
    assert (report.blocks, dict(report.counts)) == (
        2,
        {"type-mismatch": 1, "wrong-after-restore": 1},
    )
    [batch] = view.batches
    assert {finding.rule for finding in view.found[0].touches[1]} == report.counts.keys()
    assert view.found[0].touches.keys() == {1}
    assert batch.calls.call.tolist() == [1, 2]


def test_what_was_there_before_is_known() -> None:
    facts = Before(snapshot(FIXED, [Block.split(0x40000, 2, type=0, private=9)]))
    stamp = FIXED.stamp.encode(2)
    steps = [[restored(0x40, stamp, True), call("kho_restore_folio", args=(0x40000,), ret=1)]]
    view, _ = live(steps, before=facts)
    assert view.batches[0].touches.known.tolist() == [True]
    assert view.batches[0].touches.was.private.tolist() == [9]
    view, _ = live(steps)
    assert view.batches[0].touches.known.tolist() == [False]


# What was not seen


def test_blocks_of_which_not_all_was_read() -> None:
    large = added(1 << 11, 11, [1] * 1024)
    steps = [
        [
            added(8, 3),
            large,
            added(64, 6, [1] * 32, unread=32),
            # Nobody looks at what is deleted, or judges what is refused.
            block("kho_radix_del_page", 8, 3, key=1 << 49 | 1),
            added(1 << 11, 11, [1], ret=2**32 - 12),
            restored(4, 0, ret=0),
            call("kho_preserve_vmalloc"),
        ]
    ]
    view, report = live(steps)
    assert view.losses == [Losses(sampled=1, unread=1)]
    assert [line.partition(":")[0] for line in report.incomplete] == [
        "blocks of which not all refcounts were read",
        "blocks of which some struct pages could not be read",
    ]
    assert not report.passed


def pages_of_two_orders() -> list[bytes]:
    """Three pages from an odd one on: an order-0 block and one of order 1."""
    outer = {"outer": 8, "outer_args": (0x41000, 3)}
    blocks = [restored(0x41 + i, FIXED.stamp.encode(i), **outer) for i in range(2)]  # type: ignore[arg-type]
    return [*blocks, call("kho_restore_pages", args=(0x41000, 3), ret=page_at(0x41))]


def test_what_is_not_asked_for_is_no_loss() -> None:
    for wanted in (CallFilter(), CallFilter(min_order=1)):
        view, _ = live([pages_of_two_orders()], wanted)
        assert view.losses == [Losses()]


def test_stamps_of_too_few_pages_are_no_loss() -> None:
    """The restore itself is wrong; all that it did was seen."""
    first, _, last = pages_of_two_orders()
    view, _ = live([[first, last]])
    assert view.losses == [Losses()]


def test_where_kho_restore_page_was_inlined_the_first_block_was_all_that_was_seen() -> None:
    """In recordings of earlier versions."""
    first = block(
        "kho_restore_pages",
        0x41,
        0,
        [1],
        stamp=FIXED.stamp.encode(0),
        args=(0x41000, 3),
        ret=page_at(0x41),
    )
    last = pages_of_two_orders()[-1]
    one = [replace_args(each) for each in (first, last)]
    failed = call("kho_restore_pages", args=(0x41000, 3), call=3)
    steps = [[first, last], one, [failed]]
    view, _ = live(steps, traced=tracing(kho_restore_page="inlined"))
    assert view.losses == [Losses(sampled=1)]


def test_callers_that_tell_what_they_restore_tell_all() -> None:
    """Where kho_restore_page() is inlined, or another function."""
    told = [
        block(
            "kho_restore_pages",
            0x41 + i,
            i,
            [1] * (1 << i),
            stamp=FIXED.stamp.encode(i),
            args=(0x41000, 3),
            ret=page_at(0x41 + i),
        )
        for i in range(2)
    ]
    view, _ = live([[*told, pages_of_two_orders()[-1]]], traced=tracing(kho_restore_page="told"))
    assert view.losses == [Losses()]


def test_vmalloc_areas_of_which_no_block_is_seen() -> None:
    """No area is without pages: something that they are preserved with is inlined."""
    steps = [
        [call("kho_preserve_vmalloc"), call("kho_unpreserve_vmalloc", call=2)],
        [call("kho_restore_vmalloc", call=3, ret=0xFFFFC90000000000)],
        [call("kho_preserve_vmalloc", call=4, ret=(1 << 32) - 12)],
        [call("kho_restore_vmalloc", call=5, ret=0)],
        [added(8, 0, call=6), call("kho_preserve_vmalloc", call=6)],
    ]
    view, report = live(steps)
    assert view.losses == [Losses(unseen=3)]
    assert report.incomplete == ["calls whose blocks were not seen: 3"]


def replace_args(record: bytes) -> bytes:
    """The same record, of another call of one page only."""
    header = np.frombuffer(record[:64], "<u8").copy()
    header[0], header[4] = 2, 1
    return header.tobytes() + record[64:]


# Recordings


def recorded(path: Path, steps: Iterable[Step], traced: Tracing) -> tuple[Seen, checks.Report]:
    with Recorder(path, traced.facts) as recorder:
        return live(steps, CallFilter(kinds=frozenset({CallKind.RESTORE})), None, traced, recorder)


def rows(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    return [
        row
        for batch in batches
        for row in zip(batch.touches.call.tolist(), batch.touches.blocks.phys.tolist(), strict=True)
    ]


def test_everything_is_recorded(tmp_path: Path) -> None:
    """What is shown is what is asked for; a recording is asked later."""
    path = tmp_path / "a.khotrace"
    view, _ = recorded(path, [GOOD, WRONG, GOOD[:1]], tracing())
    # Of the block without a call it is not known.
    assert [len(batch.calls) for batch in view.batches] == [0]
    recording = load(path)
    assert rows(recording.batches) == [(1, 0x1000000), (2, 0x100000), (1, 0x1000000)]
    assert recording.losses == Losses()
    assert recording.symbols(next(iter(CALLERS))) == CALLERS[next(iter(CALLERS))]


@pytest.mark.parametrize("kind", [Lines, JsonView])
@pytest.mark.parametrize(
    "wanted", [CallFilter(), CallFilter(min_order=1), CallFilter(comm="nobody")]
)
def test_a_replay_is_as_the_trace_was(
    kind: type[Lines] | type[JsonView], wanted: CallFilter, tmp_path: Path
) -> None:
    large = added(1 << 11, 11, [1] * 1024, call=3)
    steps: list[Step] = [
        GOOD,
        [],
        [*WRONG, large],
        pages_of_two_orders(),
        [added(7, call=4)],
        interrupt,
    ]
    facts = snapshot(FIXED, [Block(0x5000)])
    before = Before(snapshot(FIXED, [Block(0x41000), Block.split(0x42000, 1, type=1)]))
    traced = tracing(facts, kho_radix_add_key="not in this kernel")
    path = tmp_path / "a.khotrace"
    probes = FakeProbes(steps, Counters(10, 0, 2, 1))

    def view(out: io.StringIO, symbols: Callable[[int], str]) -> Lines | JsonView:
        if kind is Lines:
            return Lines(out, symbols, True, None)
        return JsonView(out, symbols, True)

    first, second = io.StringIO(), io.StringIO()
    with Recorder(path, traced.facts) as recorder:
        session = TraceSession(traced, wanted, view(first, probes.symbol), before)
        report = session.live(probes, assembler(), recorder, None, None)
    recording = load(path)
    session = TraceSession(recording.tracing, wanted, view(second, recording.symbols), before)
    again = session.replay(recording)
    assert (again.findings, again.counts) == (report.findings, report.counts)
    assert (again.incomplete, again.blocks) == (report.incomplete, report.blocks)
    assert not again.passed
    assert second.getvalue() == first.getvalue() != ""


def test_a_snapshot_of_a_kernel_with_other_pages() -> None:
    before = Before(snapshot(Abi.for_page_shift(14), []))
    with pytest.raises(KhoscopeError, match="16384 byte pages, this kernel has 4096"):
        TraceSession(tracing(), CallFilter(), Lines(io.StringIO(), str), before)
