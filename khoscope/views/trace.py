# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``khoscope trace`` prints while it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import numpy as np

from ..abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, TYPE_NAMES
from ..checks import Finding, Found, Report
from ..checks.pattern import describe, type_name
from ..facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    ERRNO_NAMES,
    FUNCTIONS,
    NO_PHYS,
    Action,
    Batch,
    Function,
    Kind,
    Losses,
    Symbols,
    Touches,
    Tracing,
)
from ..trace.summary import (
    Caller,
    Callers,
    Summary,
    Sums,
    alike,
    bucket_range,
    cut_short,
    findings_by_call,
    pages,
)
from ..words.printable import printable
from . import json as rows
from .text import LIMIT, SEVERITY_COLOURS, WIDTH, Text, counted, human, where

#: Where the columns of a line are: the first character of a left-aligned one, the last but one of
#: a right-aligned one.
_TIME, _CALL, _ADDRESS, _PAGES, _US, _RET, _BLOCKS = 8, 9, 28, 49, 56, 57, 64
_HEADINGS = ("TIME", "CALL", "ADDRESS", "PAGES", "US", "RET")

_U64 = 2**64 - 1
_ACTION_NAMES = {int(action): action.name.lower() for action in Action}
_BITS = {BIT_CLEAR: False, BIT_SET: True}


def returned(returns: str, ret: int) -> str:
    """What came back of a function, in a word."""
    if returns == "void":
        return "-"
    if returns == "pointer":
        return "ok" if ret else "NULL"
    return ERRNO_NAMES.get(-ret, str(ret))


class _Calls:
    """A batch as rows, for those who show each call."""

    def __init__(self, batch: Batch, found: Found, callers: Callers) -> None:
        calls = batch.calls
        self.function = [FUNCTIONS[number] for number in calls.function.tolist()]
        self.tid, self.tgid = calls.tid.tolist(), calls.tgid.tolist()
        self.comm = [_decoded(comm) for comm in calls.comm.tolist()]
        self.enter, self.leave = calls.enter.tolist(), calls.leave.tolist()
        self.args, self.ret = calls.args.tolist(), calls.ret.tolist()
        self.phys, self.pages = calls.phys.tolist(), calls.pages.tolist()
        self.blocks, self.failed = calls.blocks.tolist(), calls.failed.tolist()
        self.name = [_decoded(name) for name in calls.name.tolist()]
        self.starts: list[int] = batch.starts().tolist()
        known, which = callers.of(calls)
        self.caller: list[Caller] = [known[number] for number in which.tolist()]
        self.findings = findings_by_call(batch, found)

    def __len__(self) -> int:
        return len(self.function)


def _decoded(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _by_value(functions: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What is said of functions, and of which."""
    for value in dict.fromkeys(functions.values()):
        names = [name.removeprefix("kho_") for name, said in functions.items() if said == value]
        yield value, ", ".join(names)


class _TraceText(Text):
    """What both text views say at the start and at the end."""

    def __init__(self, out: IO[str], symbols: Symbols, limit: int | None) -> None:
        super().__init__(out, limit)
        self._callers = Callers(symbols)
        self._sums = Summary(self._callers)
        self._shown = Losses()

    def start(self, tracing: Tracing) -> None:
        """Which kernel, what is attached and how, what is not and why."""
        self.header(tracing.facts)
        for how, names in _by_value(tracing.attached):
            self.wrapped(f"{how}: {names}", "  ", "")
        for why, names in _by_value(tracing.missing):
            self.wrapped(f"left out: {names} ({why})", "  ", "")
        self.line(tracing.buffer)
        self._page_shift = tracing.facts.abi.page_shift
        self._began = tracing.started

    def losses(self, losses: Losses) -> None:
        """What was not seen until now, if that has become more."""
        said = [
            f"{counted(losses.lost, 'event')} lost" if losses.lost else "",
            f"{counted(losses.missed, 'call')} not followed to the end" if losses.missed else "",
        ]
        if (losses.lost, losses.missed) != (self._shown.lost, self._shown.missed):
            self.line(self.paint("red", f"incomplete: {', '.join(filter(None, said))}"))
        self._shown = losses
        self._out.flush()

    def close(self, report: Report, losses: Losses) -> None:
        """Totals, and what is to be said of them."""
        total = self._sums.total
        touched = sum(pages(order, count) for (_, order, _), count in total.blocks.items())
        self.line(
            f"{counted(total.calls.total(), 'call')} ({total.failed.total():,} failed), "
            f"{counted(total.blocks.total(), 'block')}, {counted(touched, 'page')}"
        )
        if not losses:
            self.line("every event was seen, every refcount was read")
        if losses.lost:
            seen = losses.made - losses.lost
            self.line(f"{counted(losses.made, 'event')}: {seen:,} seen, {losses.lost:,} lost")
        self.conclusion(report)
        self._out.flush()


class Lines(_TraceText):
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

    def batch(self, batch: Batch, found: Found) -> None:
        """Calls that have returned."""
        self._sums.add(batch, found)
        calls = _Calls(batch, found, self._callers)
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

    def _caller(self, calls: _Calls, i: int) -> None:
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

    def _call(self, calls: _Calls, i: int, groups: list[str]) -> None:
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
    only_deletes = function.kind == Kind.UNPRESERVE or function.action == Action.DELETE
    sign = "-" if deleted and not only_deletes else ""
    return f"{sign}{count}×{words}" if count > 1 else f"{sign}{words}"


class SummaryView(_TraceText):
    """Sums by client, at each interval and at the end."""

    def __init__(self, out: IO[str], symbols: Symbols, limit: int | None = LIMIT) -> None:
        super().__init__(out, symbols, limit)
        self._recent = Summary(self._callers)
        self._intervals = 0

    def start(self, tracing: Tracing) -> None:
        super().start(tracing)
        self._out.flush()

    def batch(self, batch: Batch, found: Found) -> None:
        """Calls that have returned."""
        self._recent.add(batch, found)

    def interval(self, losses: Losses) -> None:
        """Show what has come since the last time."""
        self._intervals += 1
        self.line()
        self.line(self.paint("bold", f"interval {self._intervals}"))
        self._clients(self._recent)
        self._sums.update(self._recent)
        self._recent.reset()
        self.losses(losses)

    def end(self, report: Report, losses: Losses) -> None:
        """Show all that has come."""
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
        row = [_ACTION_NAMES[action], *_order_and_type(order, kind), f"{count:,}"]
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


class JsonLines:
    """
    ``--jsonl``: one object per call, and one at the end.

    All have ``"call"``.  It is null where there is no call: for blocks whose call has not returned
    yet, and at the end, with ``"verdict"``.
    """

    def __init__(self, out: IO[str], symbols: Symbols, stacks: bool = False) -> None:
        self._out = out
        self._callers = Callers(symbols)
        self._sums = Summary(self._callers)
        self._stacks = stacks

    def start(self, tracing: Tracing) -> None:
        """Remember what the calls do not say by themselves."""
        self._began = tracing.started
        self._page_shift = tracing.facts.abi.page_shift

    def batch(self, batch: Batch, found: Found) -> None:
        """Calls that have returned."""
        self._sums.add(batch, found)
        calls = _Calls(batch, found, self._callers)
        touched = _touch_rows(batch.touches)
        for i in range(len(calls)):
            mine = islice(touched, calls.starts[i + 1] - calls.starts[i])
            self._object(self._head(calls, i), mine, calls.findings[i])
        if len(batch.touches) > calls.starts[-1]:
            self._object({"call": None}, touched, calls.findings[-1])
        self._out.flush()

    def interval(self, losses: Losses) -> None:
        """Nothing is shown before the end."""

    def end(self, report: Report, losses: Losses) -> None:
        """The trace is over."""
        self._out.write(json.dumps({"call": None, **self._tail(report, losses)}) + "\n")
        self._out.flush()

    def _object(
        self, head: dict[str, Any], blocks: Iterator[dict[str, Any]], findings: list[Finding]
    ) -> None:
        """One object in a line; its blocks may be many."""
        self._out.write(self._before_object() + json.dumps(head)[:-1] + ', "blocks": [')
        separator = ""
        while some := list(islice(blocks, 1000)):
            self._out.write(separator + json.dumps(some)[1:-1])
            separator = ", "
        found = json.dumps([rows.finding(finding) for finding in findings]) if findings else "[]"
        self._out.write(f'], "findings": {found}}}{self._after_object}')

    _after_object = "\n"

    def _before_object(self) -> str:
        return ""

    def _head(self, calls: _Calls, i: int) -> dict[str, Any]:
        """A call without its blocks."""
        function, ret, caller = calls.function[i], calls.ret[i], calls.caller[i]
        phys = calls.phys[i]
        head: dict[str, Any] = {
            "call": function.name,
            "time": (calls.enter[i] - self._began) / 1e9,
            "ns": calls.leave[i] - calls.enter[i],
            "pid": calls.tgid[i],
            "tid": calls.tid[i],
            "comm": calls.comm[i],
            "client": caller.client,
            "args": _arguments(function, calls.args[i], calls.name[i]),
            "phys": f"{phys:#x}" if phys != NO_PHYS else None,
            "pages": calls.pages[i],
            "ret": _value(function.returns, ret),
            "errno": _errno(function.returns, ret),
            "failed": calls.failed[i],
        }
        if self._stacks:
            head["stack"] = list(caller.stack)
        return head

    def _tail(self, report: Report, losses: Losses) -> dict[str, Any]:
        return {
            "summary": _summary(self._sums, self._page_shift),
            "losses": dict(vars(losses)),
            **rows.verdict(report),
        }


class JsonView(JsonLines):
    """``--json``: one document, schema khoscope.trace/1, written as the calls come."""

    _after_object = ""

    def start(self, tracing: Tracing) -> None:
        """The head of the document."""
        super().start(tracing)
        head = {
            "schema": "khoscope.trace/1",
            **rows.about(tracing.facts),
            "attached": tracing.attached,
            "missing": tracing.missing,
            "buffer": tracing.buffer,
        }
        self._separator = "\n  "
        self._out.write(json.dumps(head, indent=1)[:-2] + ',\n "calls": [')
        self._out.flush()

    def end(self, report: Report, losses: Losses) -> None:
        """The tail of the document."""
        tail = json.dumps(self._tail(report, losses), indent=1)
        self._out.write(f"],{tail[1:]}\n")
        self._out.flush()

    def _before_object(self) -> str:
        separator, self._separator = self._separator, ",\n  "
        return separator


#: Arguments that count something; the others are addresses and keys.
_NUMBERS = {"nr_pages": _U64, "size": _U64, "order": 2**32 - 1, "type": 2**32 - 1}


def _arguments(function: Function, values: list[int], name: str) -> dict[str, Any]:
    """What was passed, by the C types of the arguments."""
    arguments: dict[str, Any] = {}
    for argument, value in zip(function.arguments, values, strict=False):
        if argument == "name":
            arguments[argument] = name
        elif argument == "is_folio":
            arguments[argument] = bool(value & 0xFF)
        elif argument in _NUMBERS:
            arguments[argument] = value & _NUMBERS[argument]
        else:
            arguments[argument] = f"{value:#x}"
    return arguments


def _value(returns: str, ret: int) -> int | str | None:
    if returns == "int":
        return ret
    return f"{ret & _U64:#x}" if returns == "pointer" and ret else None


def _errno(returns: str, ret: int) -> str | None:
    return returned(returns, ret) if returns == "int" and ret < 0 else None


def _touch_rows(touches: Touches) -> Iterator[dict[str, Any]]:
    """What became of each block."""
    facts = touches.blocks.facts
    columns = (
        touches.action.tolist(),
        touches.function.tolist(),
        touches.ret.tolist(),
        touches.before.tolist(),
        touches.after.tolist(),
        touches.looked.tolist(),
        facts.private.tolist(),
        facts.head.tolist(),
        facts.zeros.tolist(),
        facts.ones.tolist(),
        facts.others.tolist(),
        facts.odd.tolist(),
    )
    for block, (action, number, ret, before, after, looked, private, *refcounts) in zip(
        rows.block_rows(touches.blocks), zip(*columns, strict=True), strict=True
    ):
        restored, deleted = action == Action.RESTORE, action == Action.DELETE
        if restored:
            block["key"] = None
        names = ("head", "zeros", "ones", "others", "odd")
        counts = dict(zip(names, refcounts, strict=True))
        block |= {
            "action": _ACTION_NAMES[action],
            "ret": _value(FUNCTIONS[number].returns, ret),
            "was_set": _BITS.get(before),
            "is_set": _BITS.get(after),
            "refcounts": None if deleted else {**counts, "looked": looked},
            "stamp": f"{private:#x}" if restored else None,
        }
        yield block


def _summary(summary: Summary, page_shift: int) -> dict[str, Any]:
    """The sums as an object; with those of all clients together."""
    return {
        "total": _sums(summary.total, page_shift),
        "cut_short": sorted(summary.cut_short),
        "clients": {name: _sums(sums, page_shift) for name, sums in summary.clients.items()},
        "balance": [
            {
                "order": order if order != BAD_ORDER else None,
                "type": TYPE_NAMES[kind],
                **vars(balance),
                "adds": balance.adds,
                "distinct": balance.distinct,
            }
            for (order, kind), balance in sorted(summary.balance.items())
        ],
    }


def _sums(sums: Sums, page_shift: int) -> dict[str, Any]:
    return {
        "calls": sums.calls.total(),
        "failed": sums.failed.total(),
        "functions": {
            FUNCTIONS[number].name: {
                "calls": count,
                "failed": sums.failed_of(number),
                "pages": sums.pages[number],
            }
            for number, count in sorted(sums.calls.items())
        },
        "errors": [
            {
                "call": FUNCTIONS[number].name,
                "ret": _value(FUNCTIONS[number].returns, ret),
                "errno": _errno(FUNCTIONS[number].returns, ret),
                "count": count,
            }
            for (number, ret), count in sorted(sums.failed.items())
        ],
        "blocks": [
            {
                "action": _ACTION_NAMES[action],
                "order": order if order != BAD_ORDER else None,
                "type": TYPE_NAMES[kind],
                "blocks": count,
                "pages": pages(order, count) if order != BAD_ORDER else None,
                "bytes": pages(order, count) << page_shift if order != BAD_ORDER else None,
            }
            for (action, order, kind), count in sorted(sums.blocks.items())
        ],
        "latency": [
            {"us": list(bucket_range(number)), "calls": count}
            for number, count in sorted(sums.latency.items())
        ],
        "rules": dict(sums.rules),
    }
