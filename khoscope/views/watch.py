# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope verify --watch``: print all findings first, and then what changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

from ..checks import RULES, Changes, Finding, Report
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Provenance, Snapshot
from . import documents
from .text import SEVERITY_COLOURS, Text, where


class Watch(Text):
    """Prints text: everything first, then a paragraph each time that something has changed."""

    def start(self, facts: Snapshot, report: Report, next_kernel: NextKernel | None) -> None:
        """Show the first round."""
        self.verify(facts, report, next_kernel)

    def changed(self, taken: Provenance, report: Report, changes: Changes) -> None:
        """Show what changed in another round."""
        self.line()
        self.line(self.paint("bold", taken.time))
        self._findings("+", changes.came)
        self._findings("-", changes.went)
        for name, (was, now) in changes.counts.items():
            self.line(f"  ~ {RULES[name].severity}: {name}: {was:,} → {now:,}")
        if changes.verdict:
            self.verdict(report)

    def _findings(self, sign: str, findings: list[Finding]) -> None:
        for finding in islice(findings, self._limit):
            severity = self.paint(SEVERITY_COLOURS[finding.severity], str(finding.severity))
            text = f"{finding.rule}: {where(finding)}{finding.message}"
            self.wrapped(text, "      ", f"  {sign} {severity}: ")
        self._more(len(findings), len(findings), sign)


class Lines:
    """
    Writes JSON, one object per line.

    The first object is the document of ``verify --json``. The objects after it have ``time`` and
    ``change``. A ``change`` of ``"+"`` or ``"-"`` comes with a finding that appeared or went away.
    ``"count"`` comes with ``rule``, ``was`` and ``now``, if a rule has more findings than are kept.
    ``"verdict"`` comes with the verdict of ``verify --json``, but without the findings.
    """

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def start(self, facts: Snapshot, report: Report, next_kernel: NextKernel | None) -> None:
        """Show the first round."""
        self._write([documents.verify(facts, report, next_kernel)])

    def changed(self, taken: Provenance, report: Report, changes: Changes) -> None:
        """Show what changed in another round."""
        for sign, findings in (("+", changes.came), ("-", changes.went)):
            self._changes(taken, sign, map(documents.finding, findings))
        counts = (
            {"rule": name, "was": was, "now": now} for name, (was, now) in changes.counts.items()
        )
        self._changes(taken, "count", counts)
        if changes.verdict:
            verdict = documents.verdict(report)
            del verdict["findings"]
            self._changes(taken, "verdict", [verdict])

    def _changes(self, taken: Provenance, change: str, found: Iterable[dict[str, Any]]) -> None:
        self._write({"time": taken.time, "change": change, **row} for row in found)

    def _write(self, objects: Iterable[dict[str, Any]]) -> None:
        self._out.writelines(json.dumps(each) + "\n" for each in objects)
