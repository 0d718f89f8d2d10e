# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is new in a report since an earlier one on the same kernel."""

from __future__ import annotations

from dataclasses import dataclass

from .rule import Finding, in_order
from .run import Report


@dataclass(frozen=True)
class Changes:
    """
    What differs between two reports.

    :param came: findings that are new.
    :param went: findings that are gone.
    :param counts: how many findings a rule had and has, if not all of them were kept: then khoscope
        cannot tell which ones changed.
    :param verdict: whether the verdict changed.
    """

    came: list[Finding]
    went: list[Finding]
    counts: dict[str, tuple[int, int]]
    verdict: bool

    def __bool__(self) -> bool:
        return bool(self.came or self.went or self.counts or self.verdict)


def changes(was: Report, now: Report) -> Changes:
    """What differs between two reports that were asked for the same rules."""
    came: list[Finding] = []
    went: list[Finding] = []
    counts: dict[str, tuple[int, int]] = {}
    for name in (rule.name for rule in in_order()):
        old, new = was.kept.get(name, []), now.kept.get(name, [])
        number = was.counts[name], now.counts[name]
        if number == (len(old), len(new)):
            before, after = set(old), set(new)
            came += [finding for finding in new if finding not in before]
            went += [finding for finding in old if finding not in after]
        elif number[0] != number[1]:
            counts[name] = number
    return Changes(came, went, counts, _sum(was) != _sum(now))


def _sum(report: Report) -> tuple[object, ...]:
    """What the last line of a report is made of."""
    reason = report.reason
    first = None if reason is None else reason.rule
    return report.errors, report.warnings, first, report.incomplete
