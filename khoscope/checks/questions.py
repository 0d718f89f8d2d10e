# SPDX-License-Identifier: LGPL-2.1-or-later
"""The findings of a report, by the question that they answer to who is about to kexec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .rule import RULES, Finding, Rule
from .run import Report, Verdict


class Question(StrEnum):
    """What has to be so."""

    KERNEL = "kernel"
    IMAGE = "image"
    SCRATCH = "scratch"
    SESSIONS = "sessions"
    SERVICES = "services"
    CARRIED = "carried"


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
    :param failing: findings for which the report fails.
    :param others: the others that stand for themselves.
    """

    question: Question
    rules: int
    failing: list[Finding]
    others: list[Finding]

    @property
    def verdict(self) -> Verdict:
        return Verdict.FAIL if self.failing else Verdict.PASS


def answers(report: Report) -> Iterator[Answer]:
    """Answer each question, whose rules have run."""
    for each in Question:
        rules = [RULES[name] for name in report.rules if question(RULES[name]) == each]
        if not rules:
            continue
        names = {rule.name for rule in rules}
        found = [f for f in report.findings if f.rule in names and not f.follows]
        failing = [f for f in found if report.asked.fails(RULES[f.rule])]
        yield Answer(each, len(rules), failing, [f for f in found if f not in failing])
