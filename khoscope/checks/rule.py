# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rule is, and the register of all rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Finding:
    """
    Something a rule found.

    :param phys: ``phys_addr_t`` of the block, or None if the finding is about the kernel.
    :param order: the block's order, likewise.
    :param follows: the rule whose finding is the cause of this one; empty: it stands for itself.
    :param key: radix key of the block; 0: the finding is about none.
    :param times: how often it was so; the block, or the call, is the first of these.
    :param units: units of systemd's that it is about.
    """

    rule: str
    severity: Severity
    message: str
    explain: str
    phys: int | None = None
    order: int | None = None
    follows: str = ""
    key: int = field(default=0, compare=False)
    times: int = field(default=1, compare=False)
    units: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """
    What a rule about the kernel has to say.

    :param phys: the address, if there is one.
    :param explain: what will happen here, if the rule's own explanation is about other kernels too.
    :param cause: the rule whose finding, if there is one, explains this one.
    :param units: units of systemd's that it is about.
    """

    text: str
    phys: int | None = None
    explain: str = ""
    cause: str = ""
    units: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marked:
    """
    The rows of a chunk that a rule is about.

    :param rows: mask.
    :param say: the message for one row; called for rows that are shown, not for all.
    :param cause: the rule whose finding, if there is one, explains the rows of ``follows``.
    :param follows: mask; None: no row.
    :param explain: what explains this kernel's rows, or a single row, in place of the rule's
        explanation; "": nothing.
    """

    rows: NDArray[np.bool_]
    say: Callable[[int], str]
    cause: str = ""
    follows: NDArray[np.bool_] | None = None
    explain: str | Callable[[int], str] = ""

    def explanation(self, row: int) -> str:
        """What explains a row; "": the rule's explanation."""
        return self.explain if isinstance(self.explain, str) else self.explain(row)


@dataclass(frozen=True)
class Rule:
    """
    A check.

    :param sentence: when it fires; the docstring of its function.
    :param explain: what will happen, in which kernel, and what to do.
    :param kernel: functions of the kernel that make it so.
    :param finders: its functions by scope, one of SCOPES.
    """

    name: str
    severity: Severity
    sentence: str
    explain: str
    kernel: tuple[str, ...]
    finders: dict[ScopeName, Callable[..., Any]]

    @property
    def reads(self) -> list[str]:
        """The facts that the rule looks at, in words."""
        return [SCOPES[scope].reads for scope in self.finders]

    @property
    def is_across(self) -> bool:
        """Whether the rule compares what is before a kexec with what is after it."""
        return not ACROSS.isdisjoint(self.finders)

    def finding(
        self,
        message: str,
        phys: int | None = None,
        order: int | None = None,
        *,
        explain: str = "",
        follows: str = "",
        key: int = 0,
        times: int = 1,
        units: tuple[str, ...] = (),
    ) -> Finding:
        why = " ".join(explain.split()) or self.explain
        return Finding(
            self.name, self.severity, message, why, phys, order, follows, key, times, units
        )


@dataclass(frozen=True)
class RuleSelection:
    """
    Which rules to run, and what counts as a failure.

    :param rules: names of the rules that are to run; None: all.
    :param fail_on: the least severity that makes a report a failure.
    :param closing: names of rules that make it one whatever their severity.
    """

    rules: frozenset[str] | None = None
    fail_on: Severity = Severity.ERROR
    closing: frozenset[str] = frozenset()

    def fails(self, rule: Rule) -> bool:
        """Whether what this rule finds makes a report a failure."""
        severities = list(Severity)
        is_bad = severities.index(rule.severity) <= severities.index(self.fail_on)
        return is_bad or rule.name in self.closing


#: The default: run every rule, fail on errors.
EVERYTHING = RuleSelection()

#: All rules by name.
RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Scope:
    """
    What a rule looks at.

    :param takes: what its function is given and gives back.
    :param reads: the facts, in words.
    """

    takes: str
    reads: str


#: What a rule may look at.
ScopeName = Literal[
    "handover",
    "next",
    "gate",
    "abi",
    "kexec",
    "kernel",
    "clients",
    "tree",
    "blocks",
    "folios",
    "next-blocks",
    "pairs",
    "stamps",
    "calls",
    "touches",
    "losses",
]

SCOPES: dict[ScopeName, Scope] = {
    "handover": Scope(
        "(before, after) → messages", "what one kernel handed over and the other got"
    ),
    "next": Scope("(snapshot, NextKernel) → messages", "the next kernel's image (--next)"),
    "gate": Scope(
        "(snapshot) → messages, where the kexec is about to come (--gate)",
        "who holds sessions, what systemd keeps for services",
    ),
    "abi": Scope("(abi) → messages, whatever the tree holds", "the key layout, KHO's ABI"),
    "kexec": Scope(
        "(snapshot) → messages, where a kexec is to come", "the kexec image, incoming sessions"
    ),
    "kernel": Scope(
        "(snapshot) → messages", "root FDT, tree entries, incoming sessions, kernel log"
    ),
    "clients": Scope(
        "(snapshot, KeySet of its tree) → messages", "what the clients hand over, the tree"
    ),
    "tree": Scope(
        "(snapshot, KeySet of its tree) → blocks with marked rows, for what no chunk shows",
        "the tree",
    ),
    "blocks": Scope("(snapshot, a chunk of blocks) → marked rows", "blocks and their struct pages"),
    "folios": Scope(
        "(snapshot, FolioTotals) → messages", "which of the blocks are folios, and whose"
    ),
    "next-blocks": Scope(
        "(NextKernel or None, snapshot, a chunk of blocks) → marked rows",
        "blocks, and the next kernel's image if there is --next",
    ),
    "pairs": Scope("(handover.Pairs) → marked rows", "struct pages before and after the kexec"),
    "stamps": Scope("(before, its keys, a chunk of stamps) → marked rows", "stamped pages"),
    "calls": Scope("(snapshot, a chunk of Calls) → marked rows", "calls (trace)"),
    "touches": Scope(
        "(snapshot, a chunk of Touches) → marked rows of its blocks",
        "what calls do to blocks (trace)",
    ),
    "losses": Scope("(Losses) → messages", "what trace did not see"),
}

#: Scopes that every kernel has; scopes before a kexec; scopes of the gate right before it; scopes
#: that need the image of the next kernel; scopes that need an earlier snapshot, too; scopes of a
#: trace.
ONE_KERNEL: set[ScopeName] = {
    "abi",
    "kernel",
    "clients",
    "tree",
    "blocks",
    "folios",
    "next-blocks",
}
KEXEC: set[ScopeName] = {"kexec"}
GATE: set[ScopeName] = {"gate"}
NEXT: set[ScopeName] = {"next"}
ACROSS: set[ScopeName] = {"handover", "pairs", "stamps"}
TRACE: set[ScopeName] = {"calls", "touches", "losses"}

F = TypeVar("F", bound=Callable[..., Any])


def rule(
    name: str, severity: Severity, scope: ScopeName, explain: str, *, kernel: str
) -> Callable[[F], F]:
    """
    Register a function as a rule; its docstring is the rule's sentence.

    :param kernel: functions of the kernel behind it, separated by blanks.
    :raises ValueError: if nothing looks at that scope: the rule would never run.
    """
    _require_scope(name, scope)

    def register(find: F) -> F:
        sentence, why = (" ".join(text.split()) for text in (find.__doc__ or "", explain))
        RULES[name] = Rule(name, severity, sentence, why, tuple(kernel.split()), {scope: find})
        return find

    return register


def also(name: str, scope: ScopeName) -> Callable[[F], F]:
    """
    Register what a rule looks for in another scope.

    :raises ValueError: likewise.
    """
    _require_scope(name, scope)

    def register(find: F) -> F:
        RULES[name].finders[scope] = find
        return find

    return register


def _require_scope(name: str, scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"rule {name}: nothing looks at {scope!r}")


def in_order() -> list[Rule]:
    """
    All rules: errors first, and rules about the whole kernel before rules about single blocks.
    """
    scopes, severities = list(SCOPES), list(Severity)
    return sorted(
        RULES.values(),
        key=lambda r: (severities.index(r.severity), scopes.index(next(iter(r.finders)))),
    )


def of_scopes(scopes: Iterable[ScopeName]) -> set[str]:
    """The names of the rules that look for something in at least one of some scopes."""
    return {name for name, each in RULES.items() if not each.finders.keys().isdisjoint(scopes)}
