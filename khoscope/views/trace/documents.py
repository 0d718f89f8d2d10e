# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON views of a trace: a line for each call, or one document."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from ...abi.keys import BAD_ORDER, TYPE_NAMES
from ...checks import BatchFindings, Finding, Report
from ...facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    FUNCTIONS,
    NO_ARGUMENT,
    NO_PHYS,
    NUMBERS,
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
    distinct,
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
        touched = _touch_lines(batch.touches)
        for i, head in enumerate(self._heads(calls)):
            mine = islice(touched, calls.starts[i + 1] - calls.starts[i])
            self._object(head, mine, calls.findings[i])
        if len(batch.touches) > calls.starts[-1]:
            self._object('{"call": null', touched, calls.findings[-1])
        self._out.flush()

    def interval(self, losses: Losses) -> None:
        """Write nothing: losses are shown at the end."""

    def end(self, report: Report, losses: Losses) -> None:
        """Write the last object."""
        self._out.write(json.dumps({"call": None, **self._tail(report, losses)}) + "\n")
        self._out.flush()

    def _object(self, head: str, blocks: Iterator[str], findings: list[Finding]) -> None:
        """Write one object on a line, block by block, because there may be many blocks."""
        text = f'{self._before_object()}{head}, "blocks": ['
        separator = ""
        while some := list(islice(blocks, 1000)):
            self._out.write(text + separator + ", ".join(some))
            text, separator = "", ", "
        found = (
            json.dumps([documents.finding(finding) for finding in findings]) if findings else "[]"
        )
        self._out.write(f'{text}], "findings": {found}}}{self._after_object}')

    _after_object = "\n"

    def _before_object(self) -> str:
        return ""

    def _heads(self, calls: CallRows) -> Iterator[str]:
        """Calls without their blocks, encoded and not closed."""
        for i, function in enumerate(calls.function):
            caller, ret, phys = calls.caller[i], calls.ret[i], calls.phys[i]
            is_pointer = function.returns == "pointer" and ret != 0
            template = _head_template(
                function.name,
                calls.tgid[i],
                calls.tid[i],
                calls.comm[i],
                caller.client,
                caller.stack if self._stacks else None,
                phys != NO_PHYS,
                None if is_pointer else ret,
                calls.failed[i],
            )
            yield template % (
                (calls.enter[i] - self._began) / 1e9,
                calls.leave[i] - calls.enter[i],
                _arguments(function, calls.args[i], calls.name[i]),
                phys,
                calls.pages[i],
                ret & _U64,
            )

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

#: What takes more than a template.
_SPECIAL: Final = {"name", "order", *_NOT_EVERYWHERE}


@functools.lru_cache(maxsize=4096)
def _head_template(
    name: str,
    tgid: int,
    tid: int,
    comm: str,
    client: str,
    stack: tuple[str, ...] | None,
    has_phys: bool,
    ret: int | None,
    failed: bool,
) -> str:
    """
    A call, encoded and not closed, but for time, ns, arguments, address, pages and returned
    pointer.

    :param ret: None: a pointer.
    """
    returns = FUNCTIONS[NUMBERS[name]].returns
    value, errno = documents.address(True), None
    if ret is not None:
        # The pointer that there is not is not filled in.
        value, errno = f"{json.dumps(_value(returns, ret))}%.0s", _errno(returns, ret)
    stacks = {} if stack is None else {"stack": list(stack)}
    of = documents.members_of
    return (
        f'{{{of({"call": name})}, "time": %r, "ns": %d, '
        f'{of({"pid": tgid, "tid": tid, "comm": comm, "client": client})}, "args": {{%s}}, '
        f'"phys": {documents.address(has_phys)}, "pages": %d, "ret": {value}, '
        f"{of({'errno': errno, 'failed': failed, **stacks})}"
    )


@functools.cache
def _plain_arguments(function: str) -> str:
    """The template of its arguments; empty: they are not all addresses and counts of pages."""
    arguments = FUNCTIONS[NUMBERS[function]].arguments
    if not _SPECIAL.isdisjoint(arguments):
        return ""
    how = {"nr_pages": "%d"}
    return ", ".join(f'"{name}": {how.get(name, documents.address(True))}' for name in arguments)


def _arguments(function: Function, values: list[int], name: str) -> str:
    """The arguments that were passed, converted by their C types, encoded without braces."""
    plain = _plain_arguments(function.name)
    if plain:
        return plain % (*values[: len(function.arguments)],)
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
    return json.dumps(arguments)[1:-1]


def _value(returns: str, ret: int) -> int | str | None:
    if returns == "int" or (returns == "void" and ret):
        return ret
    return f"{ret & _U64:#x}" if returns == "pointer" and ret else None


def _errno(returns: str, ret: int) -> str | None:
    return returned(returns, ret) if returns != "pointer" and ret < 0 else None


def _touch_lines(touches: Touches) -> Iterator[str]:
    """Each touched block, encoded, with what became of it; many differ in nothing but address."""
    blocks, facts = touches.blocks, touches.blocks.facts
    restored = touches.action == Action.RESTORE
    columns: list[NDArray[Any]] = [
        touches.action,
        touches.function,
        touches.ret,
        touches.before,
        touches.after,
        touches.looked,
        np.where(restored, facts.private, 0),
        facts.head,
        facts.zeros,
        facts.ones,
        facts.others,
        facts.odd,
        blocks.order,
        blocks.type,
    ]
    first, kind = distinct(columns)
    templates = [
        _touch_template(*row) for row in zip(*(c[first].tolist() for c in columns), strict=True)
    ]
    rows = zip(kind.tolist(), blocks.phys.tolist(), blocks.key.tolist(), strict=True)
    return (templates[which] % (phys, key) for which, phys, key in rows)


@functools.lru_cache(maxsize=4096)
def _touch_template(
    action: int,
    number: int,
    ret: int,
    before: int,
    after: int,
    looked: int,
    stamp: int,
    head: int,
    zeros: int,
    ones: int,
    others: int,
    odd: int,
    order: int,
    kind: int,
) -> str:
    """A touched block, encoded, but for its address and its key."""
    restored = action == Action.RESTORE
    counts = {"head": head, "zeros": zeros, "ones": ones, "others": others, "odd": odd}
    more = {
        "action": ACTION_NAMES[action],
        "ret": _value(FUNCTIONS[number].returns, ret),
        "was_set": _BITS.get(before),
        "is_set": _BITS.get(after),
        "refcounts": None if action == Action.DELETE else {**counts, "looked": looked},
        "stamp": f"{stamp:#x}" if restored else None,
    }
    return documents.block_template(order, kind, more, keyed=not restored)


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
