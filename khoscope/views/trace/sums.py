# SPDX-License-Identifier: LGPL-2.1-or-later
"""Totals by client, printed at intervals and at the end."""

from __future__ import annotations

from itertools import islice
from typing import IO

from ...abi.keys import BAD_ORDER
from ...checks import BatchFindings, Report
from ...checks.pattern import type_name
from ...facts.calls import (
    FUNCTIONS,
    Batch,
    Losses,
    Symbols,
    Tracing,
)
from ...trace.summary import (
    Summary,
    Sums,
    bucket_range,
    pages,
)
from ...words.sizes import human
from ..text import LIMIT, counted
from .common import ACTION_NAMES, TraceText, returned


class SummaryView(TraceText):
    """Prints totals by client, at each interval and at the end."""

    def __init__(self, out: IO[str], symbols: Symbols, limit: int | None = LIMIT) -> None:
        super().__init__(out, symbols, limit)
        self._recent = Summary(self._callers)
        self._intervals = 0

    def start(self, tracing: Tracing) -> None:
        super().start(tracing)
        self._out.flush()

    def batch(self, batch: Batch, found: BatchFindings) -> None:
        """Add calls that have returned."""
        self._recent.add(batch, found)

    def interval(self, losses: Losses) -> None:
        """Print the totals since the last interval."""
        self._intervals += 1
        self.line()
        self.line(self.paint("bold", f"interval {self._intervals}"))
        self._clients(self._recent)
        self._sums.update(self._recent)
        self._recent.reset()
        self.losses(losses)

    def end(self, report: Report, losses: Losses) -> None:
        """Print the totals of the whole trace."""
        self._sums.update(self._recent)
        self.line()
        if self._intervals:
            self.line(self.paint("bold", "all together"))
        self._clients(self._sums)
        self._balance()
        self.line()
        self.close(report, losses)

    def _clients(self, summary: Summary) -> None:
        if not summary.clients:
            self.line("no calls")
        clients = sorted(
            summary.clients.items(), key=lambda item: (-item[1].calls.total(), item[0])
        )
        for name, sums in islice(clients, self._limit):
            self.line()
            self.line(self.paint("bold", name))
            self._client(sums, summary.cut_short)
        self._more(len(clients), len(clients), "clients")

    def _client(self, sums: Sums, cut: set[str]) -> None:
        if sums.calls:
            self.table(
                (
                    [
                        FUNCTIONS[number].short,
                        f"{count:,}",
                        f"{sums.failed_of(number):,}",
                        f"{sums.pages[number]:,}",
                    ]
                    for number, count in sorted(sums.calls.items())
                ),
                ["call", "calls", "failed", "pages"],
                ["left", "right", "right", "right"],
            )
        if sums.blocks:
            if sums.calls:
                self.line()
            self.table(
                (self._blocks_row(*key, count) for key, count in sorted(sums.blocks.items())),
                ["action", "order", "type", "blocks", "pages", "bytes"],
                ["left", "right", "left", "right", "right", "right"],
            )
        if sums.latency:
            self.line()
            self._histogram(sums)
        for (number, ret), count in sorted(sums.failed.items()):
            word = returned(FUNCTIONS[number].returns, ret)
            self.line(self.paint("yellow", f"{count:,} × {FUNCTIONS[number].short} → {word}"))
        for name, count in sorted(sums.rules.items()):
            most = "at least " if name in cut else ""
            self.line(self.paint("red", f"{most}{count:,} × {name}"))

    def _blocks_row(self, action: int, order: int, kind: int, count: int) -> list[str]:
        size = pages(order, count)
        row = [ACTION_NAMES[action], *_order_and_type(order, kind), f"{count:,}"]
        return [*row, f"{size:,}", human(size << self._page_shift)]

    def _histogram(self, sums: Sums) -> None:
        most = max(sums.latency.values())
        table = []
        for number in range(min(sums.latency), max(sums.latency) + 1):
            first, last = bucket_range(number)
            count = sums.latency[number]
            bar = "#" * -(-count * _BAR // most)
            between = f"{first}" if first == last else f"{first}-{last}"
            table.append([between, f"{count:,}", bar])
        self.table(table, ["us", "calls", ""], ["right", "right", "left"])

    def _balance(self) -> None:
        balance = self._sums.balance
        if not balance:
            return
        self.line()
        self.table(
            (
                [
                    *_order_and_type(order, kind),
                    f"{b.added:,}",
                    f"{b.deleted:,}",
                    f"{b.adds:+,}",
                    f"{b.distinct:+,}",
                ]
                for (order, kind), b in sorted(balance.items())
            ),
            ["order", "type", "adds", "deletes", "balance", "in the tree"],
            ["right", "left", "right", "right", "right", "right"],
        )
        unknown = sum(b.unknown for b in balance.values())
        if unknown:
            self.line(f"of {counted(unknown, 'block')} it is not known whether they were there")


#: Characters of the longest bar of a histogram.
_BAR = 40


def _order_and_type(order: int, kind: int) -> tuple[str, str]:
    return (str(order) if order != BAD_ORDER else "bad"), type_name(kind)
