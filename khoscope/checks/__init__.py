# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Checks: pure functions from facts to findings.  Nothing else decides what is wrong.

A rule about the kernel as a whole takes the snapshot and yields messages; a rule about blocks or
calls takes a chunk of them and marks rows.  The name, the severity, the sentence and the
explanation stand next to the function, so a new check is one function.
"""

from __future__ import annotations

from .calls import places
from .changes import Changes, changes
from .gate import CLOSING, Question
from .questions import WORDS, Answer, answers, question
from .rule import (
    ACROSS,
    EVERYTHING,
    GATE,
    KEXEC,
    NEXT,
    ONE_KERNEL,
    RULES,
    Finding,
    Rule,
    RuleSelection,
    Severity,
    in_order,
    of_scopes,
)
from .run import (
    About,
    BatchFindings,
    Report,
    Verdict,
    check,
    check_batch,
    compare,
    end_trace,
    start_trace,
)
from .services import Came, came_back

__all__ = [
    "ACROSS",
    "CLOSING",
    "EVERYTHING",
    "GATE",
    "KEXEC",
    "NEXT",
    "ONE_KERNEL",
    "RULES",
    "WORDS",
    "About",
    "Answer",
    "BatchFindings",
    "Came",
    "Changes",
    "Finding",
    "Question",
    "Report",
    "Rule",
    "RuleSelection",
    "Severity",
    "Verdict",
    "answers",
    "came_back",
    "changes",
    "check",
    "check_batch",
    "compare",
    "end_trace",
    "in_order",
    "of_scopes",
    "places",
    "question",
    "start_trace",
]
