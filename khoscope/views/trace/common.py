# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the views of a trace share: calls as rows, and how a text begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from ...abi.keys import Tracker
from ...checks import BatchFindings, Report
from ...facts.calls import (
    ERRNO_NAMES,
    FUNCTIONS,
    Action,
    Batch,
    Losses,
    Symbols,
    Tracing,
)
from ...trace.summary import (
    Caller,
    Callers,
    Summary,
    findings_by_call,
    pages,
)
from ..text import Text, counted

ACTION_NAMES = {int(action): action.name.lower() for action in Action}


def returned(returns: str, ret: int) -> str:
    """The return value of a function, in a word."""
    if returns == "void" and not ret:
        return "-"
    if returns == "pointer":
        return "ok" if ret else "NULL"
    return ERRNO_NAMES.get(-ret, str(ret))


_ON_XARRAYS = (
    "no function of this kernel adds or deletes a single block: blocks are those that follow from "
    "the arguments of a call that succeeded"
)


class CallRows:
    """A batch as rows, for the views that show each call."""

    def __init__(self, batch: Batch, found: BatchFindings, callers: Callers) -> None:
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
    """Yield each value once, with the names of its functions."""
    for value in dict.fromkeys(functions.values()):
        names = [name.removeprefix("kho_") for name, said in functions.items() if said == value]
        yield value, ", ".join(names)


class TraceText(Text):
    """What both text views print at the start and at the end."""

    def __init__(self, out: IO[str], symbols: Symbols, limit: int | None) -> None:
        super().__init__(out, limit)
        self._callers = Callers(symbols)
        self._sums = Summary(self._callers)
        self._shown = Losses()

    def start(self, tracing: Tracing) -> None:
        """Print which kernel it is, what is attached and how, and what is left out and why."""
        self.header(tracing.facts)
        for how, names in _by_value(tracing.attached):
            self.wrapped(f"{how}: {names}", "  ", "")
        for why, names in _by_value(tracing.left_out):
            self.wrapped(f"left out: {names} ({why})", "  ", "")
        for why, names in _by_value(tracing.untold):
            self.wrapped(f"without their blocks: {names} ({why})", "  ", "")
        if tracing.facts.abi.tracker == Tracker.XARRAY:
            self.wrapped(_ON_XARRAYS, "  ", "")
        self.wrapped(tracing.buffer, "  ", "")
        self._page_shift = tracing.facts.abi.page_shift
        self._began = tracing.started

    def losses(self, losses: Losses) -> None:
        """Print what has been missed so far, if it has become more."""
        said = [
            f"{counted(losses.lost, 'event')} lost" if losses.lost else "",
            f"{counted(losses.missed, 'call')} not followed to the end" if losses.missed else "",
        ]
        if (losses.lost, losses.missed) != (self._shown.lost, self._shown.missed):
            self.line(self.paint("red", f"incomplete: {', '.join(filter(None, said))}"))
        self._shown = losses
        self._out.flush()

    def close(self, report: Report, losses: Losses) -> None:
        """Print the totals and the conclusion."""
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
