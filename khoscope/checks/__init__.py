# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Checks: pure functions from facts to findings.  Nothing else decides what is wrong.

A rule about the kernel as a whole takes the snapshot and yields messages; a rule about blocks
or calls takes a chunk of them and marks rows.  The name, the severity, the sentence and the
explanation stand with the function, so that a new check is one function.
"""

from __future__ import annotations

from .rule import RULES, Finding, Rule, Severity
from .run import Found, Report, check, check_batch, compare, end_trace, start_trace

__all__ = [
    "RULES",
    "Finding",
    "Found",
    "Report",
    "Rule",
    "Severity",
    "check",
    "check_batch",
    "compare",
    "end_trace",
    "start_trace",
]
