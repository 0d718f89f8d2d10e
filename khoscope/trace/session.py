# SPDX-License-Identifier: LGPL-2.1-or-later
"""One trace, live or replayed: batches come, are recorded, checked and shown."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import numpy as np

from .. import checks
from ..facts.calls import FUNCTIONS, NUMBERS, Action, Batch, Losses, Tracing
from ..words.errors import KhoscopeError
from .assemble import Assembler
from .before import Before
from .call_filter import CallFilter
from .kinds import Kinds
from .probes import Counters, Probes
from .record import Recorder, Recording

#: Functions that preserve, unpreserve or restore a vmalloc area.
_OF_VMALLOC = np.array([function.name.endswith("_vmalloc") for function in FUNCTIONS])
#: How long a poll waits for the first record, ms.
POLL = 200
#: How often is looked at what the kernel has counted, seconds: while the modules of its callers are
#: loaded.
LOOK = 1.0


class View(Protocol):
    """Shows a trace while it goes on."""

    def start(self, tracing: Tracing) -> None:
        """What is traced, and how."""

    def batch(self, batch: Batch, found: checks.BatchFindings) -> None:
        """Calls that have returned, and what is wrong with them."""

    def interval(self, losses: Losses) -> None:
        """Some time has passed."""

    def end(self, report: checks.Report, losses: Losses) -> None:
        """The trace is over."""


class TraceSession:
    """
    A trace.

    :param before: snapshot of the kernel that handed over.
    :raises KhoscopeError: if that kernel has pages of another size.
    """

    def __init__(
        self, tracing: Tracing, wanted: CallFilter, view: View, before: Before | None
    ) -> None:
        if before and before.page_size != tracing.facts.abi.page_size:
            raise KhoscopeError(
                f"the earlier snapshot has {before.page_size} byte pages, "
                f"this kernel has {tracing.facts.abi.page_size}",
                "compare with a snapshot of the kernel that handed over",
            )
        self._tracing = tracing
        self._wanted = wanted
        self._view = view
        self._before = before
        self._report = checks.start_trace(tracing.facts, before.snapshot if before else None)
        self._losses = Losses()
        self._by_kind = False

    def live(
        self,
        probes: Probes,
        assembler: Assembler,
        recorder: Recorder | None,
        duration: float | None,
        interval: float | None,
        kinds: Kinds | None = None,
    ) -> checks.Report:
        """
        Follow the running kernel until Ctrl-C.

        :param duration: seconds until it ends by itself.
        :param interval: seconds between two calls of the view's ``interval``.
        :param kinds: what the kernel counts; None: it tells each call.
        """
        self._by_kind = kinds is not None
        self._view.start(self._tracing)
        began = time.monotonic()
        step = interval or math.inf
        end, due = began + (duration or math.inf), began + step
        look = min(step, LOOK) if kinds else math.inf
        sight = began + look

        def take(batch: Batch) -> None:
            probes.learn(batch)
            if recorder:
                recorder.add(batch)
            self._show(batch)

        def count() -> None:
            if kinds:
                take(kinds.feed(*probes.kinds()))

        with _until_stopped() as stopped:
            while not stopped() and (now := time.monotonic()) < end:
                left = min((min(due, end, sight) - now) * 1000, POLL)
                if len(records := probes.poll(max(int(left), 1))):
                    take(assembler.feed(records))
                if (now := time.monotonic()) >= min(due, sight):
                    sight = now + look
                    count()
                if now >= due:
                    due = now + step
                    self._count(probes.counters())
                    self._view.interval(self._losses)
            # Follow calls that have begun to their end, if they end soon.
            probes.arm(False)
            while len(records := probes.poll(POLL)):
                take(assembler.feed(records))
            if not kinds:
                take(assembler.feed(probes.held()))
            take(assembler.end())
            count()
            self._count(probes.drained())
            if recorder:
                recorder.finish(self._tracing, probes.symbols, self._losses)
            return self._end()

    def replay(self, recording: Recording) -> checks.Report:
        """Show and check what was recorded."""
        self._view.start(self._tracing)
        for batch in recording.batches:
            self._show(batch)
        self._losses = dataclasses.replace(
            recording.losses,
            sampled=self._losses.sampled,
            unread=self._losses.unread,
            unseen=self._losses.unseen,
        )
        return self._end()

    def _show(self, batch: Batch) -> None:
        batch = self._wanted.apply(batch)
        if self._before:
            batch = dataclasses.replace(batch, touches=self._before.join(batch.touches))
        self._look(batch)
        found = checks.check_batch(self._tracing.facts, batch, self._report)
        if len(batch.calls) or len(batch.touches):
            self._view.batch(batch, found)

    def _look(self, batch: Batch) -> None:
        """
        Count the blocks of which the kernel did not look at every page, and the calls whose blocks
        it did not see.
        """
        touches, calls = batch.touches, batch.calls
        judged = touches.succeeded & (touches.action != Action.DELETE)
        pages = touches.blocks.page_count
        times = touches.times
        sampled = int(times[judged & touches.sampled].sum())
        if "kho_restore_page" in self._tracing.missing and not self._by_kind:
            # Before khotrace/3, the trace saw only the first block of kho_restore_pages() then.
            starts = batch.starts()
            total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(pages, dtype=np.uint64)])
            touched = total[starts[1:]] - total[starts[:-1]]
            restored = (calls.function == NUMBERS["kho_restore_pages"]) & ~calls.failed
            sampled += int((restored & (touched < calls.pages)).sum())
        # Blocks of a vmalloc area are those of functions that are called in turn.
        unseen = _OF_VMALLOC[calls.function] & ~calls.failed & (calls.blocks == 0)
        self._losses = dataclasses.replace(
            self._losses,
            sampled=self._losses.sampled + sampled,
            unread=self._losses.unread
            + int(times[judged & (touches.blocks.facts.unread > 0)].sum()),
            unseen=self._losses.unseen + int(calls.times[unseen].sum()),
        )

    def _count(self, counters: Counters) -> None:
        self._losses = dataclasses.replace(
            self._losses,
            made=counters.made,
            lost=counters.lost,
            missed=counters.missed,
            open=counters.open,
        )

    def _end(self) -> checks.Report:
        checks.end_trace(self._report, self._losses)
        self._view.end(self._report, self._losses)
        return self._report


@contextmanager
def _until_stopped() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the trace in good order; a second one ends khoscope."""
    come: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        come.append(number)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield lambda: bool(come)
    finally:
        restore()
