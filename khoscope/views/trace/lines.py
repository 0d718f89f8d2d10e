# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines of text, one or more for each call, as they happen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import IO

import numpy as np

from ...abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, TYPE_NAMES
from ...checks import BatchFindings, Finding, Report
from ...checks.pattern import describe
from ...facts.calls import (
    FUNCTIONS,
    NO_PHYS,
    Action,
    Batch,
    CallKind,
    Function,
    Losses,
    Symbols,
    Touches,
    Tracing,
)
from ...trace.summary import (
    alike,
    cut_short,
)
from ...words.printable import printable
from ..text import LIMIT, SEVERITY_COLOURS, WIDTH, where
from .common import CallRows, TraceText, returned

#: Where the columns of a line are: the first character of a left-aligned one, the last but one of
#: a right-aligned one.
_TIME, _CALL, _ADDRESS, _PAGES, _US, _RET, _BLOCKS = 8, 9, 28, 49, 56, 57, 64
_HEADINGS = ("TIME", "CALL", "ADDRESS", "PAGES", "US", "RET")


class Lines(TraceText):
    """
    One line per call, with what is wrong with it below.

    :param stacks: show the stack of each call, once.
    """

    def __init__(
        self, out: IO[str], symbols: Symbols, stacks: bool = False, limit: int | None = LIMIT
    ) -> None:
        super().__init__(out, symbols, limit)
        self._stacks = stacks
        self._stacks_shown: set[int] = set()
        self._last: tuple[str, int, str | int] | None = None

    def start(self, tracing: Tracing) -> None:
        super().start(tracing)
        self.line()
        self.line(self.paint("bold", _columns(*_HEADINGS) + "BLOCKS"))
        self._out.flush()

    def batch(self, batch: Batch, found: BatchFindings) -> None:
        """Calls that have returned."""
        self._sums.add(batch, found)
        calls = CallRows(batch, found, self._callers)
        folded = alike(batch)
        examples = batch.touches[np.array(folded.examples, np.int64)]
        words = [_block_words(examples, row) for row in range(len(examples))]
        for i, function in enumerate(calls.function):
            self._caller(calls, i)
            groups = [_group(function, *words[kind], count) for kind, count in folded.groups[i]]
            self._call(calls, i, groups)
            self._found(calls.findings[i])
        self._found(calls.findings[-1])
        for name in sorted(cut_short(found)):
            self.line(self.paint("dim", f"    … maybe more {name}, all are counted at the end"))
        self._out.flush()

    def interval(self, losses: Losses) -> None:
        """Some time has passed."""
        self.losses(losses)

    def end(self, report: Report, losses: Losses) -> None:
        """The trace is over."""
        self.line()
        self.close(report, losses)

    def _caller(self, calls: CallRows, i: int) -> None:
        """Who called, if it is another one than before."""
        caller = calls.caller[i]
        now = calls.comm[i], calls.tgid[i], caller.number if self._stacks else caller.client
        if now == self._last:
            return
        self._last = now
        who = f"{calls.comm[i]}[{calls.tgid[i]}] {caller.client}"
        if self._stacks:
            who += f" stack #{caller.number}"
        self.line(self.paint("bold", who))
        if self._stacks and caller.number not in self._stacks_shown:
            self._stacks_shown.add(caller.number)
            for frame in caller.stack:
                self.line(f"    {frame}")

    def _call(self, calls: CallRows, i: int, groups: list[str]) -> None:
        function = calls.function[i]
        ret = returned(function.returns, calls.ret[i])
        us = (calls.leave[i] - calls.enter[i]) / 1000
        start = _columns(
            f"{(calls.enter[i] - self._began) / 1e9:.3f}",
            function.short,
            _address(function, calls.args[i], calls.phys[i]),
            str(calls.pages[i]),
            f"{us:.1f}" if us < 1000 else f"{us:.0f}",
            ret,
        )
        if function.name == "kho_add_subtree":
            size = calls.args[i][2]
            groups = [printable(calls.name[i]), f"{size} bytes", *groups]
        shown = groups[: self._limit]
        if len(shown) < len(groups):
            shown.append(f"and {len(groups) - len(shown)} more")
        # Nobody asked for these, or the call had too many to keep them until it returned.
        untold = calls.blocks[i] - (calls.starts[i + 1] - calls.starts[i])
        if untold > 0:
            shown.append(f"{untold} not shown")
        for line in _wrapped_groups(start, shown):
            self.line(self.paint("yellow", line) if calls.failed[i] else line)

    def _found(self, findings: list[Finding]) -> None:
        """Below a line, what is wrong with it; explained at the end."""
        by_rule: dict[str, list[Finding]] = {}
        for finding in findings:
            by_rule.setdefault(finding.rule, []).append(finding)
        for name, some in by_rule.items():
            for finding in islice(some, self._limit):
                severity = self.paint(SEVERITY_COLOURS[finding.severity], str(finding.severity))
                text = f"{name}: {where(finding)}{finding.message}"
                self.wrapped(text, " " * 8, f"    {severity}: ")
            if self._limit is not None and len(some) > self._limit:
                self.line(self.paint("dim", f"    … {len(some) - self._limit:,} more {name}"))


def _columns(time: str, call: str, address: str, pages: str, us: str, ret: str) -> str:
    """
    A line up to its blocks.

    What is too long for its column takes from the blanks in front of those behind it.
    """
    text = f"{time:>{_TIME}} {call}"
    text = f"{text:<{_ADDRESS - 1}} {address}"
    for column, end in ((pages, _PAGES), (us, _US)):
        text += f" {column:>{max(end - len(text) - 1, 0)}}"
    text = f"{text:<{_RET - 1}} {ret}"
    return f"{text:<{_BLOCKS - 1}} "


def _wrapped_groups(start: str, groups: list[str]) -> Iterator[str]:
    """A line and its blocks, and as many more lines as these need."""
    line = start
    for i, group in enumerate(groups):
        word = group + ("," if i < len(groups) - 1 else "")
        longer = f"{line} {word}" if i else line + word
        if len(longer) > WIDTH:
            yield line.rstrip()
            longer = " " * max(min(_BLOCKS, WIDTH - len(word)), 0) + word
        line = longer
    yield line.rstrip()


def _address(function: Function, args: list[int], phys: int) -> str:
    """What the call was about."""
    if function.arguments[0] in ("ptr", "preservation"):
        return f"{args[0]:#x}"
    return f"{phys:#014x}" if phys != NO_PHYS else "-"


def _block_words(touches: Touches, row: int) -> tuple[str, bool]:
    """A block in a word or two, like ``4c 1/0``; and whether it was deleted."""
    blocks = touches.blocks
    order, kind = int(blocks.order[row]), TYPE_NAMES[int(blocks.type[row])]
    # A single page is recorded as contig, and is as well split.
    letter = kind[0] if kind and (order or int(blocks.type[row]) != KHO_PAGE_CONTIG) else ""
    text = f"{order}{letter}"
    action = touches.action[row]
    if order == BAD_ORDER:
        text = "no stamp" if action == Action.RESTORE else "bad key"
    elif action != Action.DELETE:
        unread = blocks.facts.unread[row] or not touches.looked[row]
        pattern = "?" if unread else describe(blocks.facts, row).partition(" ")[0]
        sampled = not unread and touches.sampled[row]
        text += f" {'~' if sampled else ''}{pattern}"
    if not touches.succeeded[row]:
        text += f" {returned(FUNCTIONS[touches.function[row]].returns, int(touches.ret[row]))}"
    return text, action == Action.DELETE


def _group(function: Function, words: str, deleted: bool, count: int) -> str:
    """Some blocks alike; deleted ones are marked where deleting is not what the call is for."""
    only_deletes = function.kind == CallKind.UNPRESERVE or function.action == Action.DELETE
    sign = "-" if deleted and not only_deletes else ""
    return f"{sign}{count}×{words}" if count > 1 else f"{sign}{words}"
