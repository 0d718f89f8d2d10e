# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Text views: 80 columns, tables by tabulate, colour only on a terminal.

Facts may come from anywhere and may hold any text. Every line goes through
:func:`khoscope.words.printable.printable` before it reaches the stream.
"""

from __future__ import annotations

import re
import secrets
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tabulate import tabulate

from ..abi.keys import BAD_ORDER, Abi, Tracker
from ..checks import RULES, About, Came, Finding, Report, Severity, Verdict
from ..checks.pattern import describe, type_name
from ..facts import diff
from ..facts.columns import Blocks
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Handover, Snapshot
from ..facts.tree import Tree
from ..words.printable import printable
from ..words.sizes import human
from .block_filter import BlockFilter

WIDTH = 80
#: Rows shown of each list unless --limit says otherwise.
LIMIT = 20

_COLOURS = {"red": "31", "yellow": "33", "green": "32", "bold": "1", "dim": "2"}
SEVERITY_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "dim"}


#: What to do if there is no verdict: for a trace (True), and for a kernel (False).
_WAY_OUT = {
    True: "trace less at a time (--only, -p, -c), or with a larger --buffer, and run it again",
    False: "let the clients of KHO come to rest, give a source that has all of the kernel's "
    "memory, or take the snapshot again with this khoscope, and run it again",
}


class Text:
    """Writes text views to a stream."""

    def __init__(self, out: IO[str], limit: int | None = LIMIT) -> None:
        self._out = out
        self._limit = limit
        self._colour = out.isatty()
        # This marks where a colour begins and ends, until the line is escaped.  No text from
        # elsewhere can contain the marker, because it is random and new for each stream.
        marker = secrets.token_hex(8)
        self._mark = f"<{marker}:{{}}>"
        self._marks = re.compile(f"<{marker}:([0-9]*)>")

    def paint(self, colour: str, text: str) -> str:
        """Mark text with a colour, for :meth:`line` and for the start of :meth:`wrapped`."""
        if not self._colour:
            return text
        return f"{self._mark.format(_COLOURS[colour])}{text}{self._mark.format('')}"

    def line(self, text: str = "") -> None:
        """Print exactly one line, whatever the text holds."""
        text = printable(text)
        if self._colour:
            text = self._marks.sub("\033[\\1m", text)
        self._out.write(text + "\n")

    def wrapped(
        self,
        text: str,
        indent: str = "",
        first: str | None = None,
        colour: str | None = None,
    ) -> None:
        """
        Print a paragraph.

        :param first: what the first line begins with, instead of the indent.
        :param colour: of the lines, without the indent or `first`.
        """
        start = printable(indent if first is None else first)
        plain = self._marks.sub("", start)
        lines = textwrap.wrap(
            printable(text),
            WIDTH,
            initial_indent=plain,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for i, line in enumerate(lines or [""]):
            before, words = (indent, line[len(indent) :]) if i else (start, line[len(plain) :])
            self.line(before + (self.paint(colour, words) if colour else words))

    def table(self, rows: Iterable[Iterable[Any]], headers: list[str], align: list[str]) -> None:
        """Print a table. If a cell is a list, its items are the cell's lines."""
        cells = [[_cell(cell) for cell in row] for row in rows]
        table = tabulate(cells, headers, tablefmt="simple", colalign=align, disable_numparse=True)
        for line in table.split("\n"):
            self.line(line)

    def header(self, facts: Snapshot) -> None:
        """Print which kernel khoscope read, when and how, and how that kernel was booted."""
        self.line(self.paint("bold", f"{word(facts.kernel.release)}, {facts.taken.source}"))
        self.line(f"read {facts.taken.time} by khoscope {facts.taken.khoscope}")
        boot = f"boot {facts.kernel.boot_id}" if facts.kernel.boot_id else "boot without an id yet"
        came = facts.handover
        if came.is_kho_boot:
            self.line(f"{boot}, {kexecs(came)}")
            self.line(f"handed over by {predecessor(came)}")
        else:
            self.line(f"{boot}, not a KHO boot")
        compatible = word(facts.abi.compatible) if facts.abi.compatible else "no compatible"
        if facts.finalized is not None:
            state = "finalized" if facts.finalized else "not finalized"
            compatible = f"{facts.abi.tracker}, {state}, {compatible}"
        self.line(f"{compatible}, {types_in_words(facts.abi)}")
        for said, every in (
            ("cannot be read", facts.unreadable),
            (f"not recorded by khoscope {facts.taken.khoscope}", facts.unrecorded),
            ("facts contradict each other", facts.contradictions),
        ):
            for what in islice(every, self._limit):
                self.wrapped(f"{said}: {what}", "  ", "")
            self._more(len(every), len(every), "of these")

    def tree(
        self,
        facts: Snapshot,
        tree: Tree,
        which: str,
        wanted: BlockFilter,
        nodes: bool,
        raw_keys: bool = False,
    ) -> None:
        """``khoscope tree``."""
        abi = facts.abi
        self.header(facts)
        self.line()
        state = tree.state
        if which == "incoming":
            self.wrapped(
                "Incoming tree: evidence only. Its pages went back to the page allocator after "
                "this kernel had walked it, and may hold anything by now."
            )
        self.line(_tree_in_words(abi, which, state.root))
        if state.problem_count and which == "incoming":
            self.line(f"{state.problem_count} entries make no sense any more, not followed")
        elif state.problem_count:
            self.line(self.paint("red", f"{state.problem_count} bad entries were not followed:"))
            for p in islice(state.problems, self._limit):
                self.line(f"  node {p.table:#x} entry {p.index} = {p.entry:#x}: {p.why}")
            self._more(len(state.problems), state.problem_count, "bad entries")
        if state.moved:
            self.wrapped(f"The tree moved while it was read: {state.moved} blocks left out.")
        if not raw_keys:
            self.line()
            self.totals(tree, abi)
        if nodes:
            self.line()
            self.nodes(tree)
        self.line()
        stream = wanted.apply(tree.blocks(abi), abi.page_shift)
        if raw_keys:
            self.keys(stream)
        else:
            self.blocks(stream)

    def totals(self, tree: Tree, abi: Abi) -> None:
        """Print the counts of a tree's blocks by order and type."""
        self.counts(tree.totals(abi), abi)

    def counts(self, totals: Mapping[tuple[int, int], int], abi: Abi) -> None:
        """Print counts of blocks by order and type."""
        rows: list[list[Any]] = []
        blocks = pages = 0
        for (order, kind), count in sorted(totals.items()):
            blocks += count
            if order == BAD_ORDER:
                rows.append(["bad key", "", f"{count:,}", "", ""])
                continue
            pages += count << order
            size = human(count << order + abi.page_shift)
            rows.append([order, type_name(kind), f"{count:,}", f"{count << order:,}", size])
        rows.append(["total", "", f"{blocks:,}", f"{pages:,}", human(pages << abi.page_shift)])
        self.table(
            rows,
            ["order", "type", "blocks", "pages", "bytes"],
            ["right", "left", "right", "right", "right"],
        )

    def nodes(self, tree: Tree) -> None:
        """Print the tree's own nodes."""
        rows = (
            [level, f"{phys:#014x}", f"{key:#018x}", used]
            for chunk in tree.nodes
            for level, phys, key, used in zip(
                chunk.level.tolist(),
                chunk.phys.tolist(),
                chunk.key.tolist(),
                chunk.used.tolist(),
                strict=True,
            )
        )
        self.table(
            islice(rows, self._limit),
            ["level", "node", "first key", "used"],
            ["right", "left", "left", "right"],
        )
        total = sum(len(chunk) for chunk in tree.nodes)
        self._more(total, total, "nodes")

    def blocks(self, stream: Iterable[Blocks]) -> None:
        """Print blocks, one per row."""
        rows: list[list[Any]] = []
        total = 0
        for chunk in stream:
            total += len(chunk)
            room = None if self._limit is None else max(self._limit - len(rows), 0)
            rows += _block_rows(chunk[:room])
        self.table(
            rows,
            ["phys", "order", "pages", "type", "key"],
            ["left", "right", "right", "left", "left"],
        )
        self._more(total, total, "blocks")

    def keys(self, stream: Iterable[Blocks]) -> None:
        """Print undecoded keys, one per row."""
        total = 0
        for chunk in stream:
            room = None if self._limit is None else max(self._limit - total, 0)
            for key in chunk.key[:room].tolist():
                self.line(f"{key:#018x}")
            total += len(chunk)
        self._more(total, total, "keys")
        self.line(f"{total:,} keys")

    def verify(
        self,
        facts: Snapshot,
        report: Report,
        next_kernel: NextKernel | None = None,
        came: list[Came] | None = None,
    ) -> None:
        """
        ``khoscope verify``.

        :param came: what came back to services; None: that is not known.
        """
        self.header(facts)
        if next_kernel is not None:
            self.wrapped(f"next kernel: {next_kernel.in_words}", "  ", "")
            if next_kernel.command_line is not None:
                line = next_kernel.command_line or "empty"
                self.wrapped(f"its command line: {line}", "    ", "  ")
        if report.blocks or not report.left_out:
            self.line(f"{report.blocks:,} outgoing blocks checked")
        if report.fates is not None:
            self.line(_fates(report))
        if report.owners:
            self._owners(report)
        if came:
            self._services(came)
        self.conclusion(report)

    def _services(self, came: list[Came]) -> None:
        """Print what systemd has given back to each service."""
        self.line()
        for each in islice(came, self._limit):
            self.wrapped(f"{each.unit}: {each.in_words}", "  ", "")
        self._more(len(came), len(came), "services")

    def _owners(self, report: Report) -> None:
        """Print what became of each owner's blocks."""
        names = list(report.fates or ())
        room = WIDTH - sum(len(name) + 4 for name in names)
        rows = [
            [shortened(printable(owner), room), *(f"{fates[name]:,}" for name in names)]
            for owner, fates in islice(report.owners.items(), self._limit)
        ]
        self.line()
        self.table(rows, ["owner", *names], ["left", *("right" for _ in names)])
        self._more(len(report.owners), len(report.owners), "owners")

    def conclusion(self, report: Report) -> None:
        """Print the findings, what khoscope could not see, and the verdict."""
        self.findings(report)
        self.line()
        for reason in report.incomplete:
            self.wrapped(reason, "  ", self.paint("red", "incomplete: "))
        if report.verdict == Verdict.INCOMPLETE:
            self.wrapped(_WAY_OUT[report.about == About.TRACE], "    ", "  → ")
        self.verdict(report)

    def scene(
        self, name: str, story: str, facts: Snapshot, report: Report, explained: set[str]
    ) -> None:
        """
        Print one scene of the demo: the tree's totals, and the findings without addresses.

        :param explained: rules that were explained already; this scene's rules are added.
        """
        self.line()
        self.line(self.paint("bold", f"{name} {'─' * (WIDTH - len(name) - 1)}"))
        self.wrapped(story)
        self.line()
        self.header(facts)
        self.line()
        self.totals(facts.outgoing.tree, facts.abi)
        self.line()
        if report.fates is not None:
            self.line(_fates(report))
        seen: set[str] = set()
        for found in report.findings:
            if found.follows or found.rule in seen:
                continue
            seen.add(found.rule)
            severity = self.paint(SEVERITY_COLOURS[found.severity], str(found.severity))
            count = f"{report.own(found.rule)} × "
            self.wrapped(f"{count}{found.rule}: {found.message}", "    ", f"{severity}: ")
            if found.rule not in explained:
                explained.add(found.rule)
                self.wrapped(found.explain, "    ", "  → ")
            if found.rule in report.follows:
                self.wrapped(_consequences(report.follows[found.rule]), "    ", "    and so: ")
        self.verdict(report)

    def findings(self, report: Report) -> None:
        """Print the findings by rule, and each explanation once."""
        by_rule: dict[str, list[Finding]] = {}
        for found in report.findings:
            if not found.follows:
                by_rule.setdefault(found.rule, []).append(found)
        for name, found_list in by_rule.items():
            rule = RULES[name]
            severity = self.paint(SEVERITY_COLOURS[rule.severity], str(rule.severity))
            count = report.own(name)
            self.line()
            self.line(f"{severity}: {self.paint('bold', name)} ({count:,})")
            self._rows(found_list, count)
            shown = islice(found_list, self._limit)
            for explain in dict.fromkeys(each.explain for each in shown):
                self.wrapped(explain, "    ", "  → ")
            if name in report.follows:
                self.line(f"  and so: {_consequences(report.follows[name])}")
                # If several rules fire on one block, print one line: the first, which says why.
                follow = {
                    (found.phys, found.order): found
                    for found in reversed(report.findings)
                    if found.follows == name
                }
                self._rows([*follow.values()][::-1], max(report.follows[name].values()))

    def _rows(self, found: list[Finding], count: int) -> None:
        """
        Print a line for each finding.

        :param count: how many findings there are, including those that were not kept.
        """
        shown = found[: self._limit]
        for each in shown:
            like = f"; {each.times:,} like this" if each.times > 1 else ""
            self.wrapped(each.message + like, "      ", f"  {where(each)}")
        kept, said = (sum(each.times for each in some) for some in (found, shown))
        self._more(kept, count, "", said)

    def verdict(self, report: Report) -> None:
        """Print the last line, unwrapped however long it is: the verdict, and the reason."""
        word, colon, why = verdict_in_words(report).partition(":")
        colour = "green" if report.verdict == Verdict.PASS else "red"
        self.line(f"{self.paint(colour, word)}{colon}{why}")

    def snapshot(self, facts: Snapshot, path: Path) -> None:
        """``khoscope snapshot``."""
        self.header(facts)
        self.totals(facts.outgoing.tree, facts.abi)
        self.line(f"wrote {path}, {path.stat().st_size:,} bytes")

    def diff(self, a: Snapshot, b: Snapshot) -> None:
        """``khoscope diff``."""
        for name, side in (("A", a), ("B", b)):
            self.line(
                f"{name}: {word(side.kernel.release)}, {side.taken.time}, {side.taken.source}"
            )
        self.line()
        changed = diff.facts(a, b)
        for fact in changed:
            self.wrapped(f"{fact.what}: {fact.a} → {fact.b}", "  ", "")
        if not changed:
            self.line("no single fact differs")
        counts = diff.count(diff.blocks(a, b))
        self.line()
        self.line(
            f"outgoing blocks: {counts['removed']:,} removed, {counts['added']:,} added, "
            f"{counts['pages']:,} with other struct pages"
        )
        shown = islice(_change_rows(a, b), self._limit)
        for row in shown:
            self.wrapped(row, "      ", "  ")
        self._more(counts.total(), counts.total(), "blocks")

    def _more(self, kept: int, total: int, what: str, shown: int | None = None) -> None:
        """
        Print the last line of a list if the list is longer than what is shown.

        :param kept: how many rows khoscope has.
        :param total: how many rows there really are.
        :param shown: how many of them the lines stand for, if not each for one.
        """
        if shown is None:
            shown = kept if self._limit is None else min(kept, self._limit)
        if total > shown:
            hint = "--limit 0 shows all" if kept == total else f"only {kept:,} are kept"
            hidden = f"{total - shown:,} more {what}".rstrip()
            self.line(self.paint("dim", f"  … {hidden} ({hint})"))


def _cell(cell: Any) -> str:
    return "\n".join(printable(str(line)) for line in (cell if isinstance(cell, list) else [cell]))


def word(text: str) -> str:
    """
    A name as it is, or quoted if it is empty or has blanks.

    A proper name has no blanks. Any other text must not look like a line of khoscope's own.
    """
    return text if text and " " not in text else repr(text)


def counted(number: int, what: str) -> str:
    """A number and a noun, in the plural if needed."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def shortened(text: str, room: int) -> str:
    """The text, cut to the room there is."""
    return text if len(text) <= room else text[: room - 1].rstrip() + "…"


def verdict_in_words(report: Report) -> str:
    """The verdict of a report, and why, in one line."""
    counts = f"{counted(report.errors, 'error')}, {counted(report.warnings, 'warning')}"
    if report.left_out:
        every = len(report.rules) + len(report.left_out)
        counts += f"; {len(report.rules)} of {every} rules"
    return f"{str(report.verdict).upper()}: {_verdict(report)} ({counts})"


def _verdict(report: Report) -> str:
    reason = report.reason
    if reason is not None:
        return f"{_failure(report, reason)}{reason.rule}"
    if report.incomplete:
        return f"no verdict: {counted(len(report.incomplete), 'thing')} could not be seen"
    if report.left_out:
        return "nothing found"
    if report.about == About.KEXEC:
        return "safe to kexec" + (", once an image is loaded" if report.counts["no-image"] else "")
    if report.about == About.ARRIVAL:
        return "everything that was recorded arrived"
    return "nothing wrong was seen"


def _failure(report: Report, reason: Finding) -> str:
    if report.about == About.TRACE:
        return ""
    if report.about == About.KEXEC:
        return "not safe to kexec: "
    if RULES[reason.rule].is_across:
        return "not intact: "
    seen = not report.incomplete and not report.left_out
    return f"{'intact, but ' if seen else ''}not safe to kexec: "


def _consequences(follow: Mapping[str, int]) -> str:
    """What follows from a finding: how often each rule fired because of it."""
    return ", ".join(f"{count:,} × {name}" for name, count in follow.items())


def _fates(report: Report) -> str:
    fates = ", ".join(f"{n:,} {name}" for name, n in (report.fates or {}).items())
    return f"of the recorded blocks: {fates or 'there are none'}"


def kexecs(came: Handover) -> str:
    """How many kexecs there were, in a kernel that was handed over to."""
    if came.kexec_count is None:
        return "a KHO boot"
    return f"{counted(came.kexec_count, 'kexec')} since the cold boot"


def predecessor(came: Handover) -> str:
    """Which kernel handed over."""
    if came.previous_release is None:
        return "a kernel whose name this one is not told"
    return came.previous_release or "an unnamed kernel"


def _tree_in_words(abi: Abi, which: str, root: int) -> str:
    if abi.tracker == Tracker.RADIX:
        return f"{which} tree, root {root:#x}"
    if which == "outgoing":
        return f"{which} {abi.tracker} at {root:#x}"
    return f"{which} chain of bitmaps, first chunk {root:#x}"


def types_in_words(abi: Abi) -> str:
    """What the kernel does with page types, in words."""
    if not abi.has_types:
        return "no page types"
    if abi.type_is_stored:
        return f"page type at key bit {abi.type_shift}"
    if abi.type_is_refused:
        return f"page type at key bit {abi.type_shift}, refused (keys have {abi.key_width} bits)"
    return f"page type at key bit {abi.type_shift}, not stored (tree keeps {abi.stored_bits - 1}:0)"


def _block_rows(blocks: Blocks) -> list[list[Any]]:
    rows: list[list[Any]] = []
    counts = blocks.page_count.tolist()
    for i, count in enumerate(counts):
        key = f"{blocks.key[i]:#018x}"
        if blocks.order[i] == BAD_ORDER:
            rows.append(["bad key", "", "", "", key])
            continue
        kind = type_name(int(blocks.type[i]))
        rows.append([f"{blocks.phys[i]:#014x}", blocks.order[i], f"{count:,}", kind, key])
    return rows


def where(finding: Finding) -> str:
    """The address and order to print before a finding's message, if the finding has them."""
    if finding.phys is None:
        return ""
    at = f"{finding.phys:#014x} "
    return at if finding.order is None else f"{at}order {finding.order}: "


def _change_rows(a: Snapshot, b: Snapshot) -> Iterator[str]:
    signs = {"removed": "-", "added": "+", "pages": "~"}
    for change in diff.blocks(a, b):
        for i in range(len(change.a)):
            kind = type_name(int(change.a.type[i]))
            pattern = describe(change.a.facts, i)
            if change.b is not None:
                pattern += f" → {describe(change.b, i)}"
            yield (
                f"{signs[change.how]} {change.a.phys[i]:#014x} order {change.a.order[i]} "
                f"{kind} {pattern}"
            )
