# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run rules over facts and collect what they find, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..abi import BAD_ORDER, Abi
from ..calls import NO_PHYS, Action, Batch, Calls, Losses
from ..columns import Blocks, aligned
from ..errors import KhoscopeError
from ..snapshot import KeySet, Snapshot
from . import blocks as blocks_rules
from . import calls as _calls_rules  # noqa: F401 - registers its rules
from . import handover as handover_rules
from . import kernel as _kernel_rules  # noqa: F401 - registers its rules
from .rule import RULES, SCOPES, Finding, Marked, Message, Rule, Severity, of_scope

#: Findings that are kept of each rule; all are counted.
KEPT = 1000


@dataclass
class Report:
    """
    What the rules found.

    :param findings: the first KEPT of each rule, in the order of the rules.
    :param counts: how many each rule has, all of them.
    :param blocks: blocks that were looked at: outgoing ones, or those that calls touched.
    :param fates: across a kexec, how many of the recorded blocks were restored and so on.
    :param incomplete: why this is not the whole truth; a report with any is never a pass.
    """

    kept: dict[str, list[Finding]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    blocks: int = 0
    fates: Counter[str] | None = None
    incomplete: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        return [f for rule in self._ordered() for f in self.kept.get(rule.name, ())]

    def _ordered(self) -> list[Rule]:
        """Errors first; what concerns the whole kernel before single blocks."""
        scopes, severities = list(SCOPES), list(Severity)
        return sorted(
            RULES.values(),
            key=lambda r: (severities.index(r.severity), scopes.index(next(iter(r.finders)))),
        )

    @property
    def errors(self) -> int:
        return sum(n for name, n in self.counts.items() if RULES[name].severity == Severity.ERROR)

    @property
    def warnings(self) -> int:
        return sum(n for name, n in self.counts.items() if RULES[name].severity == Severity.WARNING)

    @property
    def passed(self) -> bool:
        return not self.errors and not self.incomplete

    def add_messages(self, rule: Rule, messages: Iterable[Message]) -> None:
        for message in messages:
            self.counts[rule.name] += 1
            if self._room(rule):
                self._keep(rule, [rule.finding(message.text, message.phys)])

    def add_marked(
        self, rule: Rule, chunk: Blocks | Calls, marked: Marked, shown: int = 0
    ) -> dict[int, Finding]:
        """
        Count the marked rows of a chunk, and keep what there is room for.

        :param shown: make findings of this many, even if they are not kept.
        :return: the findings that were made, by row.
        """
        rows = np.flatnonzero(marked.rows)
        if not len(rows):
            return {}
        room = self._room(rule)
        found = {
            row: rule.finding(marked.say(row), *_where(chunk, row))
            for row in rows[: max(room, shown)].tolist()
        }
        self.counts[rule.name] += len(rows)
        self._keep(rule, list(found.values())[:room])
        return found

    def _room(self, rule: Rule) -> int:
        return KEPT - len(self.kept.get(rule.name, ()))

    def _keep(self, rule: Rule, findings: list[Finding]) -> None:
        self.kept.setdefault(rule.name, []).extend(findings)


def _where(chunk: Blocks | Calls, row: int) -> tuple[int | None, int | None]:
    """Address and order of a row, where it has them."""
    phys = int(chunk.phys[row])
    if isinstance(chunk, Calls):
        return (None if phys == NO_PHYS else phys), None
    order = int(chunk.order[row])
    return (None, None) if order == BAD_ORDER else (phys, order)


@dataclass
class Found:
    """
    What the rules found in one batch of calls, KEPT of each rule at most.

    :param calls: findings by row of the batch's calls.
    :param touches: findings by row of its touches.
    """

    calls: dict[int, list[Finding]] = field(default_factory=dict)
    touches: dict[int, list[Finding]] = field(default_factory=dict)


def _start(abi: Abi) -> Report:
    """A report that says what is wrong with the kernel itself."""
    report = Report()
    for rule, find in of_scope("abi"):
        report.add_messages(rule, find(abi))
    return report


def check(facts: Snapshot) -> Report:
    """Run the rules about one kernel."""
    report = _start(facts.abi)
    for rule, find in of_scope("kernel"):
        report.add_messages(rule, find(facts))
    for rule, find in of_scope("tree"):
        for blocks, marked in find(facts):
            report.add_marked(rule, blocks, marked)
    unjudged = 0
    for blocks in facts.outgoing.blocks:
        report.blocks += len(blocks)
        for rule, find in of_scope("blocks"):
            report.add_marked(rule, blocks, find(facts, blocks))
        unjudged += blocks_rules.unjudged(facts, blocks)
    if unjudged:
        report.incomplete.append(f"the struct pages of {unjudged} blocks could not be read")
    held = sum(int(leaves.counts().sum()) for leaves in facts.outgoing.tree.leaves)
    if held != report.blocks:
        report.incomplete.append(f"the tree holds {held} blocks, the facts are of {report.blocks}")
    moved = facts.outgoing.tree.state.moved
    if moved:
        report.incomplete.append(f"{moved} blocks came or went while the tree was read")
    return report


def compare(before: Snapshot, after: Snapshot) -> Report:
    """
    Run the rules about one kernel on the new one, and those across the kexec on both.

    :raises KhoscopeError: if ``after`` was not taken with an eye on ``before``'s blocks.
    """
    watching = after.watching
    if watching is None or (watching.time, watching.boot_id) != (
        before.taken.time,
        before.kernel.boot_id,
    ):
        raise KhoscopeError(
            "the later snapshot does not hold the pages that the earlier one recorded",
            "take it with `khoscope snapshot --before EARLIER LATER`, in the new kernel",
        )
    if before.abi.page_shift != after.abi.page_shift:
        raise KhoscopeError(
            f"the snapshots have pages of {before.abi.page_size} and {after.abi.page_size} bytes",
            "compare with a snapshot of the kernel that handed over",
        )
    report = check(after)
    for rule, find in of_scope("handover"):
        report.add_messages(rule, find(before, after))
    report.fates = Counter()
    evidence = handover_rules.Evidence(before, after)
    unjudged = 0
    for was, now in aligned(before.outgoing.blocks, after.watched):
        if len(was) != len(now) or (was.key != now.key).any():
            raise KhoscopeError(
                "the two snapshots do not list the same recorded blocks",
                "one of them is damaged: take the later one again",
            )
        unjudged += blocks_rules.unjudged(before, was)
        pairs = handover_rules.pair(was, now, after, evidence)
        for fate, count in zip(*np.unique(pairs.fate, return_counts=True), strict=True):
            report.fates[handover_rules.FATE_NAMES[handover_rules.Fate(fate)]] += int(count)
        for rule, find in of_scope("pairs"):
            report.add_marked(rule, was, find(pairs))
    recorded = KeySet(before.abi, before.outgoing.tree.leaves)
    for stamps in after.stamps:
        for rule, find in of_scope("stamps"):
            report.add_marked(rule, stamps, find(before, recorded, stamps))
    state = before.outgoing.tree.state
    if unjudged or state.moved or state.problem_count:
        report.incomplete.append(
            f"the earlier snapshot is not whole: {unjudged} blocks without struct pages, "
            f"{state.moved} that moved, {state.problem_count} bad tree entries"
        )
    if report.fates["unread"]:
        report.incomplete.append(
            f"the pages of {report.fates['unread']} recorded blocks could not be read"
        )
    if after.scan is None or after.scan.unread:
        unread = after.scan.unread if after.scan else "all"
        report.incomplete.append(f"{unread} struct pages could not be searched for stamps")
    return report


def start_trace(facts: Snapshot) -> Report:
    """A report on a trace of this kernel; what is in its tree already is not looked at."""
    return _start(facts.abi)


def check_batch(facts: Snapshot, batch: Batch, report: Report) -> Found:
    """
    Run the rules about calls, and those about blocks on the blocks that were added.

    :param facts: of the kernel, when tracing began.
    :param report: what is found is added to it.
    """
    found = Found()
    calls, touches = batch.calls, batch.touches
    report.blocks += len(touches)
    for rule, find in of_scope("calls"):
        for row, each in report.add_marked(rule, calls, find(facts, calls), KEPT).items():
            found.calls.setdefault(row, []).append(each)
    for rule, find in of_scope("touches"):
        marked = find(facts, touches)
        for row, each in report.add_marked(rule, touches.blocks, marked, KEPT).items():
            found.touches.setdefault(row, []).append(each)
    rows = np.flatnonzero((touches.action == Action.ADD) & touches.succeeded)
    added = touches.blocks[rows]
    for rule, find in of_scope("blocks"):
        for at, each in report.add_marked(rule, added, find(facts, added), KEPT).items():
            found.touches.setdefault(int(rows[at]), []).append(each)
    return found


def end_trace(report: Report, losses: Losses) -> None:
    """Add what was not seen: any of it, and the report is not the whole truth."""
    for rule, find in of_scope("losses"):
        report.add_messages(rule, find(losses))
    for count, what in (
        (losses.lost, "events lost for want of room in the buffer"),
        (losses.missed, "calls that could not be followed from entry to return"),
        (losses.sampled, "blocks of which not all refcounts were read"),
        (losses.unread, "blocks of which some struct pages could not be read"),
        (losses.open, "calls that had not returned when the trace ended"),
    ):
        if count:
            report.incomplete.append(f"{what}: {count:,}")
