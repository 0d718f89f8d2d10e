# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope verify --gate``: an answer to each question, and a reason per line."""

from __future__ import annotations

from itertools import islice
from typing import IO, Any, Final

from ..checks import WORDS, Answer, Finding, Report, Verdict, answers
from ..facts.metrics import HandsOver
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Snapshot
from ..words.lists import listed
from ..words.sizes import human
from . import documents
from .text import Text, counted, where

#: What the gate is, by the verdict.
STATES: Final = {
    Verdict.PASS: "OPEN",
    Verdict.FAIL: "CLOSED",
    Verdict.INCOMPLETE: "NO VERDICT",
}
_COLOURS: Final = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCOMPLETE: "yellow"}
_COLUMN: Final = 15


class GateText(Text):
    """Prints the gate as text."""

    def gate(
        self,
        facts: Snapshot,
        report: Report,
        over: HandsOver,
        next_kernel: NextKernel | None,
        seconds: float,
    ) -> None:
        self.header(facts)
        if next_kernel is not None:
            self.wrapped(f"next kernel: {next_kernel.in_words}", "  ", "")
        self.line()
        for answer in answers(report):
            self._answer(answer)
        for reason in report.incomplete:
            self._row("", "?", "yellow", reason)
        self.line()
        self.wrapped(f"a kexec would hand over {in_words(over)}", "  ", "")
        self.line(f"it took {seconds:.1f} s")
        self.line(
            self.paint(_COLOURS[report.verdict], f"GATE {STATES[report.verdict]}: {why(report)}")
        )

    def _answer(self, answer: Answer) -> None:
        name = str(answer.question)
        checks = counted(answer.rules, "check")
        if answer.verdict == Verdict.PASS:
            self._row(name, "ok", "green", f"{WORDS[answer.question]} ({checks})")
            name = ""
        elif answer.verdict == Verdict.INCOMPLETE:
            self._row(name, "?", "yellow", f"nothing found ({checks}), but not all is known")
            name = ""
        for state, colour, found, count in (
            ("NO", "red", answer.failing, answer.failed),
            ("note", "dim", answer.others, answer.noted),
        ):
            for each in islice(found, self._limit):
                self._row(name, state, colour, reason_of(each))
                name = ""
            self._more(len(found), count, "of these")

    def _row(self, name: str, state: str, colour: str, text: str) -> None:
        first = f"{name:<9} {self.paint(colour, state)}{' ' * (_COLUMN - 10 - len(state))}"
        self.wrapped(text, " " * _COLUMN, first)


def reason_of(found: Finding) -> str:
    """A finding in one line."""
    return f"{found.rule}: {where(found)}{found.message}"


def why(report: Report) -> str:
    """What the gate says, in one line."""
    if report.reason is not None:
        reasons = sum(answer.failed for answer in answers(report))
        return f"do not kexec: {report.reason.rule} ({counted(reasons, 'reason')})"
    if report.incomplete:
        return f"{counted(len(report.incomplete), 'thing')} could not be seen"
    if report.left_out:
        return f"nothing found; {counted(len(report.left_out), 'check')} left out on request"
    return "the kexec may come"


def in_words(over: HandsOver) -> str:
    """What would be handed over."""
    text = f"{human(over.size)} in {counted(over.blocks, 'block')}"
    if over.sessions is not None:
        sessions, files = over.sessions.sessions, over.sessions.files
        text += f", {counted(sessions, 'session')} with {counted(files, 'file')}"
    if over.units:
        text += f", of {listed(over.units)}"
    if over.kept:
        text += f"; systemctl kexec adds {counted(over.kept, 'memfd')}"
    return text


def write_json(
    facts: Snapshot,
    report: Report,
    over: HandsOver,
    next_kernel: NextKernel | None,
    seconds: float,
    out: IO[str],
) -> None:
    """``verify --gate --json``, schema khoscope.verify/1 with a member ``gate``."""
    gate: dict[str, Any] = {
        "state": STATES[report.verdict].lower(),
        "seconds": round(seconds, 3),
        "answers": [
            {
                "question": str(answer.question),
                "verdict": str(answer.verdict),
                "checks": answer.rules,
                "reasons": [reason_of(each) for each in answer.failing],
                "notes": [reason_of(each) for each in answer.others],
            }
            for answer in answers(report)
        ],
        "hands_over": {
            "bytes": over.size,
            "blocks": over.blocks,
            "sessions": over.sessions and over.sessions.sessions,
            "files": over.sessions and over.sessions.files,
            "units": over.units,
            "systemd_memfds": over.kept,
        },
    }
    documents.write({**documents.verify(facts, report, next_kernel), "gate": gate}, out)
