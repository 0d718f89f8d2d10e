# SPDX-License-Identifier: LGPL-2.1-or-later
"""The findings of a report, by the question that they answer to who is about to kexec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .gate import Question
from .rule import Finding, Rule, in_order
from .run import Report, Verdict

#: What each is about, in words.
WORDS: Final = {
    Question.KERNEL: "what is preserved is as it should be",
    Question.IMAGE: "the next kernel is loaded, and takes what it is handed",
    Question.SCRATCH: "scratch has room for the next kernel",
    Question.SESSIONS: "somebody holds each session",
    Question.SERVICES: "what systemd keeps for services goes along",
    Question.CARRIED: "a snapshot goes along",
}
_OF: Final = {
    "no-image": Question.IMAGE,
    "image-without-kho": Question.IMAGE,
    "not-finalized": Question.IMAGE,
    "scratch-too-small": Question.SCRATCH,
    "scratch-unmovable": Question.SCRATCH,
    "in-scratch": Question.SCRATCH,
    "metadata-in-scratch": Question.SCRATCH,
    "broken-luo": Question.SESSIONS,
    "orphaned-session": Question.SESSIONS,
    "session-not-held": Question.SESSIONS,
    "session-not-kept": Question.SESSIONS,
    "store-not-kept": Question.SERVICES,
    "nothing-carried": Question.CARRIED,
}


def question(rule: Rule) -> Question:
    """The question that a rule's findings answer."""
    if rule.name in _OF:
        return _OF[rule.name]
    return Question.IMAGE if "next" in rule.finders else Question.KERNEL


@dataclass(frozen=True)
class Answer:
    """
    What the rules found that concern a question.

    :param rules: how many of them have run.
    :param failing: findings for which the report fails, those that are kept; ``failed``: how many
        there are.
    :param others: the others that stand for themselves; ``noted``: likewise.
    :param is_doubtful: not everything is known that concerns it.
    """

    question: Question
    rules: int
    failing: list[Finding]
    failed: int
    others: list[Finding]
    noted: int
    is_doubtful: bool

    @property
    def verdict(self) -> Verdict:
        if self.failed:
            return Verdict.FAIL
        return Verdict.INCOMPLETE if self.is_doubtful else Verdict.PASS


def answers(report: Report) -> Iterator[Answer]:
    """Answer each question, whose rules have run."""
    for each in Question:
        rules = [r for r in in_order() if r.name in report.rules and question(r) == each]
        if not rules:
            continue
        failing, others = (
            [rule for rule in rules if report.asked.fails(rule) == fails] for fails in (True, False)
        )
        yield Answer(
            each,
            len(rules),
            *_found(report, failing),
            *_found(report, others),
            each in report.doubtful,
        )


def _found(report: Report, rules: list[Rule]) -> tuple[list[Finding], int]:
    """What some rules found that stands for itself: what is kept of it, and how much there is."""
    kept = [f for rule in rules for f in report.kept.get(rule.name, ()) if not f.follows]
    return kept, sum(report.own(rule.name) for rule in rules)
