# SPDX-License-Identifier: LGPL-2.1-or-later
"""The catalogue of checks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import IO

from ..checks import Rule
from . import documents
from .text import SEVERITY_COLOURS, Text

#: Widths of the columns that hold sentences.
_SENTENCE, _READS = 23, 18


class Checks(Text):
    """Prints the catalogue as text."""

    def overview(self, rules: Iterable[Rule]) -> None:
        """Print all checks in a table."""
        self.table(
            (
                [
                    rule.name,
                    str(rule.severity),
                    textwrap.wrap(rule.sentence, _SENTENCE),
                    textwrap.wrap("; ".join(rule.reads), _READS),
                ]
                for rule in rules
            ),
            ["check", "severity", "fires when", "reads"],
            ["left"] * 4,
        )
        self.line()
        self.line("khoscope checks CHECK explains one.")

    def explain(self, rule: Rule) -> None:
        """Print one check, with everything that is known about it."""
        severity = self.paint(SEVERITY_COLOURS[rule.severity], str(rule.severity))
        self.line(f"{self.paint('bold', rule.name)}, {severity}")
        self.line()
        for head, text in (
            ("fires when", rule.sentence),
            ("reads", "; ".join(rule.reads)),
            ("kernel", ", ".join(f"{function}()" for function in rule.kernel)),
        ):
            self.wrapped(text, " " * 12, f"{head:12}")
        self.line()
        self.wrapped(rule.explain)


def write_checks(rules: Iterable[Rule], out: IO[str]) -> None:
    """Write the checks as JSON, schema khoscope.checks/1."""
    documents.write(
        {
            "schema": "khoscope.checks/1",
            "checks": [
                {
                    "rule": rule.name,
                    "severity": str(rule.severity),
                    "sentence": rule.sentence,
                    "reads": rule.reads,
                    "kernel": list(rule.kernel),
                    "explain": rule.explain,
                }
                for rule in rules
            ],
        },
        out,
    )
