# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON views of a trace: a line for each call, or one document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from ...abi.keys import BAD_ORDER, TYPE_NAMES
from ...checks import BatchFindings, Finding, Report
from ...facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    FUNCTIONS,
    NO_ARGUMENT,
    NO_PHYS,
    Action,
    Batch,
    Function,
    Losses,
    Symbols,
    Touches,
    Tracing,
)
from ...trace.summary import (
    Callers,
    Summary,
    Sums,
    bucket_range,
    pages,
)
from .. import documents
from .common import ACTION_NAMES, CallRows, returned

_U64 = 2**64 - 1
_BITS = {BIT_CLEAR: False, BIT_SET: True}


class JsonLines:
    """
    ``--jsonl``: one object per call, and one at the end.

    Every object has ``"call"``.  It is null if the object is not a call: for blocks whose call has
    not returned yet, and in the last object, which has ``"verdict"``.
    """

    def __init__(self, out: IO[str], symbols: Symbols, stacks: bool = False) -> None:
        self._out = out
        self._callers = Callers(symbols)
        self._sums = Summary(self._callers)
        self._stacks = stacks

    def start(self, tracing: Tracing) -> None:
        """Remember what the rows need but the calls do not hold."""
        self._began = tracing.started
        self._page_shift = tracing.facts.abi.page_shift

    def batch(self, batch: Batch, found: BatchFindings) -> None:
        """Write calls that have returned."""
        self._sums.add(batch, found)
        calls = CallRows(batch, found, self._callers)
        touched = _touch_rows(batch.touches)
        for i in range(len(calls)):
            mine = islice(touched, calls.starts[i + 1] - calls.starts[i])
            self._object(self._head(calls, i), mine, calls.findings[i])
        if len(batch.touches) > calls.starts[-1]:
            self._object({"call": None}, touched, calls.findings[-1])
        self._out.flush()

    def interval(self, losses: Losses) -> None:
        """Write nothing: losses are shown at the end."""

    def end(self, report: Report, losses: Losses) -> None:
        """Write the last object."""
        self._out.write(json.dumps({"call": None, **self._tail(report, losses)}) + "\n")
        self._out.flush()

    def _object(
        self, head: dict[str, Any], blocks: Iterator[dict[str, Any]], findings: list[Finding]
    ) -> None:
        """Write one object on a line, block by block, because there may be many blocks."""
        self._out.write(self._before_object() + json.dumps(head)[:-1] + ', "blocks": [')
        separator = ""
        while some := list(islice(blocks, 1000)):
            self._out.write(separator + json.dumps(some)[1:-1])
            separator = ", "
        found = (
            json.dumps([documents.finding(finding) for finding in findings]) if findings else "[]"
        )
        self._out.write(f'], "findings": {found}}}{self._after_object}')

    _after_object = "\n"

    def _before_object(self) -> str:
        return ""

    def _head(self, calls: CallRows, i: int) -> dict[str, Any]:
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
            **documents.verdict(report),
        }


class JsonView(JsonLines):
    """``--json``: one document, schema khoscope.trace/1, written as the calls come."""

    _after_object = ""

    def start(self, tracing: Tracing) -> None:
        """Write the head of the document."""
        super().start(tracing)
        head = {
            "schema": "khoscope.trace/1",
            **documents.about(tracing.facts),
            "attached": tracing.attached,
            "missing": tracing.missing,
            "buffer": tracing.buffer,
        }
        self._separator = "\n  "
        self._out.write(json.dumps(head, indent=1)[:-2] + ',\n "calls": [')
        self._out.flush()

    def end(self, report: Report, losses: Losses) -> None:
        """Write the tail of the document."""
        tail = json.dumps(self._tail(report, losses), indent=1)
        self._out.write(f"],{tail[1:]}\n")
        self._out.flush()

    def _before_object(self) -> str:
        separator, self._separator = self._separator, ",\n  "
        return separator


#: Arguments that are numbers. The others are addresses and keys.
_NUMBERS = {"nr_pages": _U64, "size": _U64, "order": 2**32 - 1, "type": 2**32 - 1}

#: Arguments that the functions of some kernels do not have.
_NOT_EVERYWHERE = {"is_folio", "size", "type"}


def _arguments(function: Function, values: list[int], name: str) -> dict[str, Any]:
    """The arguments that were passed, converted by their C types."""
    arguments: dict[str, Any] = {}
    for argument, value in zip(function.arguments, values, strict=False):
        if argument == "name":
            arguments[argument] = name
        elif argument in _NOT_EVERYWHERE and value == NO_ARGUMENT:
            arguments[argument] = None
        elif argument == "is_folio":
            arguments[argument] = bool(value & 0xFF)
        elif argument in _NUMBERS:
            arguments[argument] = value & _NUMBERS[argument]
        else:
            arguments[argument] = f"{value:#x}"
    return arguments


def _value(returns: str, ret: int) -> int | str | None:
    if returns == "int" or (returns == "void" and ret):
        return ret
    return f"{ret & _U64:#x}" if returns == "pointer" and ret else None


def _errno(returns: str, ret: int) -> str | None:
    return returned(returns, ret) if returns != "pointer" and ret < 0 else None


def _touch_rows(touches: Touches) -> Iterator[dict[str, Any]]:
    """One dict per touched block, with what became of the block."""
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
        documents.block_rows(touches.blocks), zip(*columns, strict=True), strict=True
    ):
        restored, deleted = action == Action.RESTORE, action == Action.DELETE
        if restored:
            block["key"] = None
        names = ("head", "zeros", "ones", "others", "odd")
        counts = dict(zip(names, refcounts, strict=True))
        block |= {
            "action": ACTION_NAMES[action],
            "ret": _value(FUNCTIONS[number].returns, ret),
            "was_set": _BITS.get(before),
            "is_set": _BITS.get(after),
            "refcounts": None if deleted else {**counts, "looked": looked},
            "stamp": f"{private:#x}" if restored else None,
        }
        yield block


def _summary(summary: Summary, page_shift: int) -> dict[str, Any]:
    """The sums as an object: the total, and one entry for each client."""
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
                "action": ACTION_NAMES[action],
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
