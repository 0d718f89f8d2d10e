# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text lines, one or more for each call, printed as the calls happen."""

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
    NO_ARGUMENT,
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

#: Positions of a line's columns: the first character of a left-aligned column, the last but one of
#: a right-aligned column.
_TIME, _CALL, _ADDRESS, _PAGES, _US, _RET, _BLOCKS = 8, 9, 28, 49, 56, 57, 64
#: Of a function.
_NAME = _ADDRESS - _CALL - 1
_HEADINGS = ("TIME", "CALL", "ADDRESS", "PAGES", "US", "RET")


class Lines(TraceText):
    """
    Prints one line per call, with its findings below.

    :param stacks: print the kernel stack of each call; each stack is printed once.
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
        """Print calls that have returned."""
        self._sums.add(batch, found)
        calls = CallRows(batch, found, self._callers)
        folded = alike(batch)
        examples = batch.touches[np.array(folded.examples, np.int64)]
        words = [_block_words(examples, row) for row in range(len(examples))]
        # Most calls touch the same blocks as others.
        known: dict[tuple[str, int, int], str] = {}
        for i, function in enumerate(calls.function):
            self._caller(calls, i)
            groups = []
            for kind, count in folded.groups[i]:
                key = function.name, kind, count
                group = known.get(key)
                if group is None:
                    group = known[key] = _group(function, *words[kind], count)
                groups.append(group)
            self._call(calls, i, groups)
            if calls.findings[i]:
                self._found(calls.findings[i])
        self._found(calls.findings[-1])
        for name in sorted(cut_short(found)):
            self.line(self.paint("dim", f"    … maybe more {name}, all are counted at the end"))
        self._out.flush()

    def interval(self, losses: Losses) -> None:
        """Print losses, after some time has passed."""
        self.losses(losses)

    def end(self, report: Report, losses: Losses) -> None:
        """Print the conclusion."""
        self.line()
        self.close(report, losses)

    def _caller(self, calls: CallRows, i: int) -> None:
        """Print the caller, if it is not the same as before."""
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
            _pages(function, calls.args[i], calls.pages[i]),
            f"{us:.1f}" if us < 1000 else f"{us:.0f}",
            ret,
        )
        if function.name == "kho_add_subtree":
            size = calls.args[i][2]
            said = [f"{size} bytes"] if size != NO_ARGUMENT else []
            groups = [printable(calls.name[i]), *said, *groups]
        shown = groups[: self._limit]
        if len(shown) < len(groups):
            shown.append(f"and {len(groups) - len(shown)} more")
        # The user did not ask for these blocks, or there were too many to keep them until the call
        # returned.
        untold = calls.blocks[i] - (calls.starts[i + 1] - calls.starts[i])
        if untold > 0:
            shown.append(f"{untold} not shown")
        for line in _wrapped_groups(start, shown):
            self.line(self.paint("yellow", line) if calls.failed[i] else line)

    def _found(self, findings: list[Finding]) -> None:
        """Print findings below a call's line; the explanations come at the end."""
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

    If a text is too long for its column, it takes blanks from the columns behind it.
    """
    room = _PAGES - _ADDRESS - len(address)
    if len(time) <= _TIME and len(call) <= _NAME and len(pages) < room and len(us) < _US - _PAGES:
        # Nearly always: no text is too long.
        start = f"{time:>{_TIME}} {call:<{_NAME}} {address}{pages:>{room}}"
        return f"{start}{us:>{_US - _PAGES}} {ret:<{_BLOCKS - _RET - 1}} "
    text = f"{time:>{_TIME}} {call}"
    text = f"{text:<{_ADDRESS - 1}} {address}"
    for column, end in ((pages, _PAGES), (us, _US)):
        text += f" {column:>{max(end - len(text) - 1, 0)}}"
    text = f"{text:<{_RET - 1}} {ret}"
    return f"{text:<{_BLOCKS - 1}} "


def _wrapped_groups(start: str, groups: list[str]) -> Iterator[str]:
    """A line with its blocks, and as many more lines as the blocks need."""
    line = start
    if len(groups) == 1 and len(start) + len(groups[0]) <= WIDTH:
        yield start + groups[0]
        return
    for i, group in enumerate(groups):
        word = group + ("," if i < len(groups) - 1 else "")
        longer = f"{line} {word}" if i else line + word
        if len(longer) > WIDTH:
            yield line.rstrip()
            longer = " " * max(min(_BLOCKS, WIDTH - len(word)), 0) + word
        line = longer
    yield line.rstrip()


def _address(function: Function, args: list[int], phys: int) -> str:
    """The address that the call was about."""
    if function.arguments[0] in ("ptr", "preservation"):
        return f"{args[0]:#x}"
    return f"{phys:#014x}" if phys != NO_PHYS else "-"


def _pages(function: Function, args: list[int], pages: int) -> str:
    """How many pages the call was about."""
    unknown = "size" in function.arguments and args[function.arguments.index("size")] == NO_ARGUMENT
    return "-" if unknown else str(pages)


def _block_words(touches: Touches, row: int) -> tuple[str, bool]:
    """A block in a word or two, like ``4c 1/0``, and whether the block was deleted."""
    blocks = touches.blocks
    order, kind = int(blocks.order[row]), TYPE_NAMES[int(blocks.type[row])]
    # A single page is recorded as contig, but could as well be split.
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
    """Blocks that look alike. A minus marks deleted blocks, unless deleting is the call's job."""
    only_deletes = function.kind == CallKind.UNPRESERVE or function.action == Action.DELETE
    sign = "-" if deleted and not only_deletes else ""
    return f"{sign}{count}×{words}" if count > 1 else f"{sign}{words}"
