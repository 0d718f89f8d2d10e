# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run rules over facts and collect what they find, in bounded memory."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, U64, Abi
from ..facts import invariants
from ..facts.calls import NO_PHYS, Action, Batch, Calls, Losses
from ..facts.columns import Blocks, paired
from ..facts.next_kernel import NextKernel
from ..facts.nodes import borders_of
from ..facts.owners import UNKNOWN, FolioTally, Owners
from ..facts.snapshot import Snapshot
from ..facts.tree import KeySet
from ..words.errors import KhoscopeError
from . import calls as _calls_rules  # noqa: F401 - registers its rules
from . import finalize as finalize_rules
from . import gate as gate_rules
from . import handover as handover_rules
from . import kernel as _kernel_rules  # noqa: F401 - registers its rules
from . import next_kernel as image_rules
from . import nodes as _node_rules  # noqa: F401 - registers its rules
from . import scratch as _scratch_rules  # noqa: F401 - registers its rules
from . import services as service_rules
from . import sessions as _session_rules  # noqa: F401 - registers its rules
from .clients import malformed
from .evidence import Rows, all_gaps, gaps
from .inplace import InPlace
from .pattern import ORDER_LOST, lost_order
from .rule import (
    EVERYTHING,
    RULES,
    Finding,
    Marked,
    Message,
    Rule,
    RuleSelection,
    ScopeName,
    Severity,
    in_order,
)

#: How many findings of each rule are kept; all are counted.
KEPT = 1000


class About(Enum):
    """The question that a report answers."""

    KEXEC = "is it safe to kexec"
    ARRIVAL = "did everything arrive"
    TRACE = "was anything wrong while it was traced"


class Verdict(StrEnum):
    """The outcome of a report."""

    PASS = "pass"
    FAIL = "fail"
    INCOMPLETE = "incomplete"


@dataclass
class Report:
    """
    What the rules found.

    :param kept: for each rule, the first KEPT findings that stand for themselves, and the first
        KEPT that follow from another, in the order in which the blocks were read.
    :param counts: how many findings each rule has, kept or not.
    :param follows: how many of them follow from another finding, by the rule of that finding, then
        by their own rule.
    :param blocks: blocks that were looked at: outgoing ones, or those that calls touched.
    :param fates: across a kexec, how many of the recorded blocks were restored and so on.
    :param owners: the same by owner; empty if the earlier snapshot knows no owner.
    :param incomplete: why the report is not the whole truth; a report with any such reason never
        passes.
    :param rules: names of the rules that have run.
    :param left_out: names of the rules that would have run but were not asked for.
    :param doubtful: questions of a gate that something concerns that is not known.
    """

    about: About = About.KEXEC
    asked: RuleSelection = EVERYTHING
    kept: dict[str, list[Finding]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    follows: dict[str, Counter[str]] = field(default_factory=dict)
    blocks: int = 0
    fates: Counter[str] | None = None
    owners: dict[str, Counter[str]] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    rules: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    doubtful: set[gate_rules.Question] = field(default_factory=set)
    #: How many findings are kept of each rule, by the rule that they follow from.
    _kept: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def findings(self) -> list[Finding]:
        """
        The findings that are kept: errors first, and those about the whole kernel before blocks.
        """
        return [f for rule in in_order() for f in self.kept.get(rule.name, ())]

    @property
    def errors(self) -> int:
        return self._count(Severity.ERROR)

    @property
    def warnings(self) -> int:
        return self._count(Severity.WARNING)

    def _count(self, severity: Severity) -> int:
        return sum(n for name, n in self.counts.items() if RULES[name].severity == severity)

    def own(self, rule: str) -> int:
        """How many findings of a rule stand for themselves: they follow from no other."""
        return self.counts[rule] - sum(each[rule] for each in self.follows.values())

    @property
    def failed(self) -> bool:
        return any(n and self.asked.fails(RULES[name]) for name, n in self.counts.items())

    @property
    def passed(self) -> bool:
        return self.verdict == Verdict.PASS

    @property
    def verdict(self) -> Verdict:
        """A failure is a failure, even if the report is incomplete."""
        if self.failed:
            return Verdict.FAIL
        return Verdict.INCOMPLETE if self.incomplete else Verdict.PASS

    @property
    def reason(self) -> Finding | None:
        """The finding that explains a failure; after a kexec, preferably one about that kexec."""
        if not self.failed:
            return None
        found = [f for f in self.findings if self.asked.fails(RULES[f.rule])]
        found = [f for f in found if f.severity == found[0].severity]
        if self.about == About.ARRIVAL:
            return next((f for f in found if RULES[f.rule].is_across), found[0])
        return found[0]

    def finders(self, scope: ScopeName) -> list[tuple[Rule, Callable[..., Any]]]:
        """The rules that have something to look for in a scope and were asked for."""
        found = []
        for each in RULES.values():
            if scope in each.finders:
                wanted = self.asked.rules is None or each.name in self.asked.rules
                (self.rules if wanted else self.left_out).add(each.name)
                if wanted:
                    found.append((each, each.finders[scope]))
        return found

    def add_messages(self, rule: Rule, messages: Iterable[Message]) -> None:
        for message in messages:
            self.counts[rule.name] += 1
            cause = message.cause if self.counts[message.cause] else ""
            if cause:
                self.follows.setdefault(cause, Counter())[rule.name] += 1
            if self._room(rule, cause):
                found = rule.finding(
                    message.text,
                    message.phys,
                    explain=message.explain,
                    follows=cause,
                    units=message.units,
                )
                self._keep(rule, [found])

    def add_marked(
        self,
        rule: Rule,
        chunk: Blocks | Calls,
        marked: Marked,
        shown: int = 0,
        times: U64 | None = None,
    ) -> dict[int, Finding]:
        """
        Count the marked rows of a chunk, and keep what there is room for.

        :param shown: make findings of this many, even if they are not kept.
        :param times: how many blocks or calls each row stands for; None: for itself.
        :return: the findings that were made, by row.
        """
        rows = np.flatnonzero(marked.rows if times is None else marked.rows & (times > 0))
        if not len(rows):
            return {}
        each = np.ones(len(rows), np.uint64) if times is None else times[rows]
        cause = marked.cause if self.counts[marked.cause] and marked.follows is not None else ""
        follows = np.zeros(len(rows), np.bool_)
        if cause and marked.follows is not None:
            follows = marked.follows[rows]
            if follows.any():
                self.follows.setdefault(cause, Counter())[rule.name] += int(each[follows].sum())
        # Keep the first of the findings that follow, and the first of the others.
        number = np.where(follows, np.cumsum(follows), np.cumsum(~follows))
        keep = number <= np.where(follows, self._room(rule, cause), self._room(rule))
        made = keep | (np.arange(len(rows)) < shown)
        found = {
            row: rule.finding(
                marked.say(row),
                *_where(chunk, row),
                explain=marked.explanation(row),
                follows=cause if so else "",
                key=int(chunk.key[row]) if isinstance(chunk, Blocks) else 0,
                times=count,
            )
            for row, so, count in zip(
                rows[made].tolist(), follows[made].tolist(), each[made].tolist(), strict=True
            )
        }
        self.counts[rule.name] += int(each.sum())
        kept = [found[row] for row in rows[keep].tolist()]
        self._keep(rule, kept if times is None else self._not_known(rule, kept))
        return found

    def _not_known(self, rule: Rule, findings: list[Finding]) -> list[Finding]:
        """The findings that are not kept yet; those that are were so more often."""
        kept = self.kept.setdefault(rule.name, [])
        at = {finding: number for number, finding in enumerate(kept)}
        for finding in findings:
            if finding in at:
                known = kept[at[finding]]
                again = dataclasses.replace(known, times=known.times + finding.times)
                kept[at[finding]] = again
        return [finding for finding in findings if finding not in at]

    def sort(self, rule: Rule) -> None:
        """Have a rule's findings about blocks in order of key, whatever order they came in."""
        self.kept.get(rule.name, []).sort(key=lambda finding: finding.key)

    def _room(self, rule: Rule, follows: str = "") -> int:
        """How many more findings may be kept that follow from this rule; empty: from none."""
        return KEPT - self._kept[rule.name, follows]

    def _keep(self, rule: Rule, findings: list[Finding]) -> None:
        self.kept.setdefault(rule.name, []).extend(findings)
        self._kept.update((rule.name, each.follows) for each in findings)


def _where(chunk: Blocks | Calls, row: int) -> tuple[int | None, int | None]:
    """Address and order of a row, if it has them."""
    phys = int(chunk.phys[row])
    if isinstance(chunk, Calls):
        return (None if phys == NO_PHYS else phys), None
    order = int(chunk.order[row])
    return (None, None) if order == BAD_ORDER else (phys, order)


@dataclass
class BatchFindings:
    """
    What the rules found in one batch of calls, at most KEPT findings per rule.

    :param calls: findings by row of the batch's calls.
    :param touches: findings by row of its touches.
    """

    calls: dict[int, list[Finding]] = field(default_factory=dict)
    touches: dict[int, list[Finding]] = field(default_factory=dict)


def _start(abi: Abi, about: About, asked: RuleSelection) -> Report:
    """A report that says what is wrong with the kernel itself."""
    report = Report(about, asked)
    for rule, find in report.finders("abi"):
        report.add_messages(rule, find(abi))
    return report


def check(
    facts: Snapshot,
    next_kernel: NextKernel | None = None,
    asked: RuleSelection = EVERYTHING,
    gate: bool = False,
) -> Report:
    """
    Run the rules about one kernel, and about the next one if that is known.

    :param gate: the kexec is about to come: also those that say whether all are ready for it.
    """
    report = _check(facts, next_kernel, About.KEXEC, asked)
    if gate:
        for rule, find in report.finders("gate"):
            report.add_messages(rule, find(facts))
        # What is not known of a kernel may concern anything.
        report.doubtful = set(gate_rules.Question) if report.incomplete else set()
        for question, what in gate_rules.untold(facts, next_kernel):
            report.doubtful.add(question)
            report.incomplete.append(what)
    return report


def _check(
    facts: Snapshot, next_kernel: NextKernel | None, about: About, asked: RuleSelection
) -> Report:
    report = _start(facts.abi, about, asked)
    for rule, find in report.finders("kernel"):
        report.add_messages(rule, find(facts))
    if about == About.KEXEC:
        for rule, find in report.finders("kexec"):
            report.add_messages(rule, find(facts))
    if next_kernel is not None:
        for rule, find in report.finders("next"):
            report.add_messages(rule, find(facts, next_kernel))
        if report.finders("next"):
            report.incomplete += image_rules.untold(facts, next_kernel)
    keys = functools.cache(lambda: KeySet(facts.abi, facts.outgoing.tree.leaves))
    _check_tree(facts, keys, report)
    _check_blocks(facts, next_kernel, keys, report)
    report.incomplete += gaps(facts, clients=bool(report.finders("clients")))
    if about == About.KEXEC and report.finders("kexec"):
        if facts.image is None:
            report.incomplete.append("whether a kexec image is loaded, and with what, is not known")
        report.incomplete += finalize_rules.unsettled(facts)
    return report


def _check_tree(facts: Snapshot, keys: Callable[[], KeySet], report: Report) -> None:
    """Run the rules that look something up in the tree."""
    for rule, find in report.finders("clients"):
        report.add_messages(rule, find(facts, keys()))
    for rule, find in report.finders("tree"):
        for blocks, marked in find(facts, keys()):
            report.add_marked(rule, blocks, marked)
        report.sort(rule)


def _block_rules(
    report: Report, next_kernel: NextKernel | None
) -> list[tuple[Rule, Callable[[Snapshot, Blocks], Marked]]]:
    """The rules about blocks, those that depend on the next kernel among them."""
    carried = report.finders("next-blocks")
    return [
        *report.finders("blocks"),
        *((rule, functools.partial(find, next_kernel)) for rule, find in carried),
    ]


def _check_blocks(
    facts: Snapshot,
    next_kernel: NextKernel | None,
    keys: Callable[[], KeySet],
    report: Report,
) -> None:
    """Run the rules about blocks."""
    rules = _block_rules(report, next_kernel)
    of_folios = report.finders("folios")
    if not rules and not of_folios:
        return
    rows, folios = Rows(facts, keys()), FolioTally(facts)
    for blocks in facts.outgoing.blocks:
        rows.add(blocks)
        lost = lost_order(facts, blocks)
        for rule, find in rules:
            marked = find(facts, blocks)
            if lost.any():
                theirs = marked.rows & lost
                because = dataclasses.replace(marked, rows=theirs, cause=ORDER_LOST, follows=lost)
                report.add_marked(rule, blocks, because)
                marked = dataclasses.replace(marked, rows=marked.rows & ~lost)
            report.add_marked(rule, blocks, marked)
        if of_folios:
            folios.add(blocks)
    for rule, _ in rules:
        report.sort(rule)
    for rule, find in of_folios:
        report.add_messages(rule, find(facts, folios.totals()))
    report.blocks = rows.count
    report.incomplete += rows.gaps()


def compare(
    before: Snapshot,
    after: Snapshot,
    next_kernel: NextKernel | None = None,
    asked: RuleSelection = EVERYTHING,
) -> Report:
    """
    Run the rules about one kernel on the new one, and those across the kexec on both.

    :raises KhoscopeError: if ``after`` does not hold the pages of ``before``'s blocks.
    """
    _require_comparable(before, after)
    report = _check(after, next_kernel, About.ARRIVAL, asked)
    for rule, find in report.finders("handover"):
        report.add_messages(rule, find(before, after))
    if "stored-fd-lost" in report.rules:
        report.incomplete += service_rules.untold(before, after)
    missing = gaps(before, clients=bool(report.finders("pairs")))
    # What the old kernel had recorded.
    recorded = functools.cache(lambda: KeySet(before.abi, before.outgoing.tree.leaves))
    missing += _compare_blocks(before, after, recorded, report)
    _compare_stamps(before, after, recorded, report)
    for tree in (before.outgoing.tree, before.outgoing.serialized):
        if tree is not None and (bad := tree.state.problem_count):
            missing.append(f"{bad} bad tree entries")
    missing += _malformed(before)
    report.incomplete += [f"the earlier snapshot: {what}" for what in dict.fromkeys(missing)]
    if after.incoming is not None and after.incoming.luo is not None:
        report.incomplete += [f"incoming LUO: {what}" for what in after.incoming.luo.problems]
    return report


def _malformed(before: Snapshot) -> Iterator[str]:
    """Parts of the earlier kernel's handover that could not be followed to their end."""
    side = before.outgoing
    yield from (f"root FDT: {what}" for what in side.fdt.problems)
    yield from (f"LUO: {what}" for what in malformed(side.luo))
    for area in side.vmallocs:
        yield from (f"{area.name}: {what}" for what in area.problems)


def _require_comparable(before: Snapshot, after: Snapshot) -> None:
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


def _compare_blocks(
    before: Snapshot, after: Snapshot, recorded: Callable[[], KeySet], report: Report
) -> list[str]:
    """
    Run the rules about what became of each block; return what is not known about blocks before.
    """
    rules = report.finders("pairs")
    if not rules:
        return []
    report.fates = Counter()
    owners = _OwnersNow(before, after)
    evidence, in_place = handover_rules.Evidence(before, after, recorded()), InPlace(before)
    borders = borders_of(before)
    rows, wrong = Rows(before, recorded()), Counter[str]()
    undecided = 0
    for was, now in paired(before.outgoing.blocks, after.watched):
        if len(was) != len(now) or (was.key != now.key).any():
            raise KhoscopeError(
                "the two snapshots do not list the same recorded blocks",
                "one of them is damaged: take the later one again",
            )
        rows.add(was)
        wrong += invariants.of_blocks(before.abi, now)
        pairs = handover_rules.pair(was, now, after, evidence, in_place, borders)
        whose = owners.of(was)
        _add_fates(report, pairs.fate, whose, owners)
        undecided += int(handover_rules.undecided(pairs).sum())
        for rule, find in rules:
            report.add_marked(rule, was, owners.named(find(pairs), was, whose))
    for rule, _ in rules:
        report.sort(rule)
    # The owner with the most blocks comes first.
    report.owners = dict(sorted(report.owners.items(), key=lambda item: -item[1].total()))
    if report.fates["unread"]:
        report.incomplete.append(
            f"the pages of {report.fates['unread']} recorded blocks could not be read"
        )
    if undecided:
        report.incomplete.append(
            f"not recorded by khoscope {after.taken.khoscope}: whether {undecided:,} folios were "
            "freed, or restored as pages"
        )
    report.incomplete += [
        f"facts contradict each other: {count:,} recorded blocks, as they are now, {what}"
        for what, count in wrong.items()
    ]
    report.incomplete += invariants.of_evidence(before, after)
    return rows.gaps()


def _add_fates(
    report: Report, fates: NDArray[np.int8], whose: NDArray[np.int64], owners: _OwnersNow
) -> None:
    """Count the fates of some blocks, all together and by owner."""
    assert report.fates is not None
    for fate, name in handover_rules.FATE_NAMES.items():
        theirs = whose[fates == fate]
        if not len(theirs):
            continue
        report.fates[name] += len(theirs)
        if owners.are_known:
            for owner, count in zip(*np.unique(theirs, return_counts=True), strict=True):
                report.owners.setdefault(owners.name(int(owner)), Counter())[name] += int(count)


class _OwnersNow:
    """
    Who owns the recorded blocks: the owner when the snapshot was taken, unless what came names
    another owner.  That owner has preserved them in between.
    """

    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self._then = Owners.of_side(before.outgoing, before.abi.page_shift)
        self._came: Owners | None = None
        if after.incoming is not None:
            self._came = Owners.of_side(after.incoming, after.abi.page_shift)
            numbers = {owner: number for number, owner in enumerate(self._came.owners)}
            # UNKNOWN (-1) indexes the last entry.
            same = [*(numbers.get(owner, UNKNOWN) for owner in self._then.owners), UNKNOWN]
            self._same = np.array(same, np.int64)

    @property
    def are_known(self) -> bool:
        return bool(self._then.owners)

    def of(self, blocks: Blocks) -> NDArray[np.int64]:
        """The owner of each block: a number that :meth:`name` knows, or UNKNOWN."""
        then = self._then.of(blocks)
        if self._came is None:
            return then
        came = self._came.of(blocks)
        other = (then != UNKNOWN) & (came != UNKNOWN) & (came != self._same[then])
        return np.where(other, came + len(self._then.owners), then)

    def name(self, owner: int) -> str:
        """An owner for people."""
        first = len(self._then.owners)
        if owner < first or self._came is None:
            return self._then.name(owner)
        return self._came.name(owner - first)

    def named(self, marked: Marked, blocks: Blocks, whose: NDArray[np.int64]) -> Marked:
        """The same rows, with the owner's name in front of each message."""

        def say(row: int) -> str:
            owner = int(whose[row])
            if owner == UNKNOWN:
                return marked.say(row)
            name = self.name(owner)
            if owner >= len(self._then.owners):
                was = self._then.name(int(self._then.of(blocks[row : row + 1])[0]))
                name = f"{name} (in the snapshot still {was})"
            return f"{name}: {marked.say(row)}"

        return dataclasses.replace(marked, say=say)


def _compare_stamps(
    before: Snapshot, after: Snapshot, recorded: Callable[[], KeySet], report: Report
) -> None:
    """Run the rules about stamps."""
    rules = report.finders("stamps")
    if not after.abi.stamp.has_magic:
        report.incomplete.append(
            "stamps of this kernel have no magic: khoscope has looked at the recorded blocks "
            "alone, and cannot tell those that nobody has restored"
        )
        return
    if not rules:
        return
    wrong = Counter[str]()
    for stamps in after.stamps:
        wrong += invariants.of_stamps(after.abi, stamps)
        for rule, find in rules:
            report.add_marked(rule, stamps, find(before, recorded(), stamps))
    report.incomplete += [
        f"facts contradict each other: {count:,} stamped blocks {what}"
        for what, count in wrong.items()
    ]
    report.incomplete += [
        f"facts contradict each other: {what}"
        for what in invariants.of_scan(after)
        if what not in after.contradictions
    ]
    if after.scan is None or after.scan.unread:
        unread = after.scan.unread if after.scan else "all"
        report.incomplete.append(f"{unread} struct pages could not be searched for stamps")


def start_trace(facts: Snapshot, before: Snapshot | None = None) -> Report:
    """
    Start a report on a trace of this kernel; blocks that are already in its tree are not checked.

    :param before: the snapshot that says what blocks were before the kexec.
    """
    report = _start(facts.abi, About.TRACE, EVERYTHING)
    report.incomplete += [f"facts contradict each other: {each}" for each in facts.contradictions]
    if before is not None:
        report.incomplete += [f"the earlier snapshot: {each}" for each in all_gaps(before)]
    return report


def check_batch(facts: Snapshot, batch: Batch, report: Report) -> BatchFindings:
    """
    Run the rules about calls, and those about blocks on the blocks that were added.

    :param facts: of the kernel, when tracing began.
    :param report: the findings are added to it.
    """
    found = BatchFindings()
    calls, touches = batch.calls, batch.touches
    times = touches.count
    report.blocks += len(touches) if times is None else int(times.sum())
    for rule, find in report.finders("calls"):
        marked = find(facts, calls)
        for row, each in report.add_marked(rule, calls, marked, KEPT, calls.count).items():
            found.calls.setdefault(row, []).append(each)
    for rule, find in report.finders("touches"):
        marked = find(facts, touches)
        for row, each in report.add_marked(rule, touches.blocks, marked, KEPT, times).items():
            found.touches.setdefault(row, []).append(each)
    rows = np.flatnonzero((touches.action == Action.ADD) & touches.succeeded)
    added, of_added = touches.blocks[rows], None if times is None else times[rows]
    for rule, find in _block_rules(report, None):
        marked = find(facts, added)
        for at, each in report.add_marked(rule, added, marked, KEPT, of_added).items():
            found.touches.setdefault(int(rows[at]), []).append(each)
    return found


def end_trace(report: Report, losses: Losses) -> None:
    """Add what the trace did not see; if there is any, the report is not the whole truth."""
    for rule, find in report.finders("losses"):
        report.add_messages(rule, find(losses))
    for count, what in (
        (losses.lost, "events lost for want of room in the buffer"),
        (losses.missed, "calls that could not be followed from entry to return"),
        (losses.sampled, "blocks of which not all refcounts were read"),
        (losses.unread, "blocks of which some struct pages could not be read"),
        (losses.unseen, "calls whose blocks were not seen"),
        (losses.open, "calls that had not returned when the trace ended"),
    ):
        if count:
            report.incomplete.append(f"{what}: {count:,}")
