# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Reports as entries of systemd's journal.

Each finding is an entry, what systemd has given back to a service is one, and the verdict is the
last.  ``OBJECT_SYSTEMD_UNIT`` names the units that an entry is about, so that ``journalctl -u``
shows it.  docs/khoscope.8 has the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from ..carry.systemd import Entry
from ..checks import RULES, About, Came, Finding, Report, Severity, Verdict, question
from ..facts.metrics import HandsOver
from ..words.errors import KhoscopeError
from ..words.printable import printable
from .gate import STATES, in_words, reason_of, why
from .text import verdict_in_words

#: ``MESSAGE_ID`` of a finding, of what came back to a service, and of a verdict or its absence.
FINDING: Final = "1511498035cf409cb6f0022c929fccb9"
SERVICE: Final = "0346929f0b334e5998d2d447d74b3e80"
VERDICT: Final = "773ff50ce1214185ae2b1c8b8f7f5777"

#: ``PRIORITY`` as in syslog(3).
_ERR, _WARNING, _NOTICE, _INFO = "3", "4", "5", "6"
_OF_VERDICT: Final = {
    Verdict.PASS: _NOTICE,
    Verdict.FAIL: _ERR,
    Verdict.INCOMPLETE: _WARNING,
}
_ABOUT: Final = {About.KEXEC: "kexec", About.ARRIVAL: "arrival"}
#: Values of a field: journald drops an entry of more than 1,024 fields (ENTRY_FIELD_COUNT_MAX).
_VALUES: Final = 256


def entries(
    report: Report,
    came: list[Came],
    over: HandsOver | None,
    seconds: float,
    limit: int | None,
) -> Iterator[Entry]:
    """
    A report.

    :param came: what came back to services, after a kexec.
    :param over: what a kexec would hand over; None: nobody asks for the gate.
    :param limit: findings of a rule, at most; None: all that are kept.
    """
    gate = over is not None
    about = ("KHOSCOPE_ABOUT", "gate" if gate else _ABOUT[report.about])
    by_rule: dict[str, list[Finding]] = {}
    for found in report.findings:
        if not found.follows:
            by_rule.setdefault(found.rule, []).append(found)
    for each in by_rule.values():
        for found in islice(each, limit):
            yield [*_finding(report, found, gate), about]
    for what in report.incomplete:
        text = f"incomplete: {what}"
        yield [*_entry(FINDING, _WARNING, text), about, ("KHOSCOPE_INCOMPLETE", printable(what))]
    for service in came:
        yield [*_service(service), about]
    yield [*_verdict(report, over, seconds), about]


def error_entry(error: KhoscopeError, about: About, gate: bool) -> Entry:
    """That khoscope could not do it (exit status 2)."""
    return [
        *_entry(VERDICT, _ERR, f"{'GATE CLOSED: ' if gate else ''}{error.what}: {error.hint}"),
        ("KHOSCOPE_VERDICT", "error"),
        ("KHOSCOPE_ABOUT", "gate" if gate else _ABOUT[about]),
    ]


def _entry(message_id: str, priority: str, message: str) -> Entry:
    return [
        ("MESSAGE", printable(message)),
        ("MESSAGE_ID", message_id),
        ("PRIORITY", priority),
        ("SYSLOG_IDENTIFIER", "khoscope"),
    ]


def _finding(report: Report, found: Finding, gate: bool) -> Entry:
    rule = RULES[found.rule]
    if report.asked.fails(rule):
        priority = _ERR
    else:
        priority = {Severity.ERROR: _ERR, Severity.WARNING: _WARNING}.get(rule.severity, _INFO)
    prefix = f"{question(rule)}: " if gate else ""
    entry = [
        *_entry(FINDING, priority, f"{prefix}{reason_of(found)}"),
        ("KHOSCOPE_RULE", found.rule),
        ("KHOSCOPE_SEVERITY", str(found.severity)),
        ("KHOSCOPE_EXPLAIN", printable(found.explain)),
    ]
    if gate:
        entry.append(("KHOSCOPE_QUESTION", str(question(rule))))
    if found.phys is not None:
        entry.append(("KHOSCOPE_PHYS", f"{found.phys:#x}"))
    return entry + _values("OBJECT_SYSTEMD_UNIT", found.units)


def _service(came: Came) -> Entry:
    text = f"{came.unit}: {came.in_words}"
    priority = _ERR if came.lost else _WARNING if came.waiting else _INFO
    return [
        *_entry(SERVICE, priority, text),
        ("OBJECT_SYSTEMD_UNIT", printable(came.unit)),
        *_values("KHOSCOPE_FD_CAME", came.back),
        *_values("KHOSCOPE_FD_LOST", came.lost),
        *_values("KHOSCOPE_FD_WAITS", came.waiting),
    ]


def _values(name: str, values: Sequence[str]) -> Entry:
    return [(name, printable(value)) for value in values[:_VALUES]]


def _verdict(report: Report, over: HandsOver | None, seconds: float) -> Entry:
    text = verdict_in_words(report)
    numbers = [("KHOSCOPE_BLOCKS", report.blocks)]
    if over is not None:
        text = f"GATE {STATES[report.verdict]}: {why(report)}; would hand over {in_words(over)}"
        numbers = [("KHOSCOPE_BLOCKS", over.blocks), ("KHOSCOPE_BYTES", over.size)]
        if over.sessions is not None:
            numbers.append(("KHOSCOPE_SESSIONS", over.sessions.sessions))
            numbers.append(("KHOSCOPE_FILES", over.sessions.files))
    elif report.fates is not None:
        numbers += [
            (f"KHOSCOPE_{fate.upper().replace('-', '_')}", count)
            for fate, count in report.fates.items()
        ]
    entry = [
        *_entry(VERDICT, _OF_VERDICT[report.verdict], text),
        ("KHOSCOPE_VERDICT", str(report.verdict)),
        ("KHOSCOPE_SECONDS", f"{seconds:.3f}"),
        ("KHOSCOPE_ERRORS", str(report.errors)),
        ("KHOSCOPE_WARNINGS", str(report.warnings)),
        *((name, str(number)) for name, number in numbers),
        *_values("KHOSCOPE_UNIT", over.units if over is not None else ()),
    ]
    if report.reason is not None:
        entry.append(("KHOSCOPE_RULE", report.reason.rule))
    return entry
