# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rule is, and the register of all rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

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

    :param phys: ``phys_addr_t`` of the block, or None where the finding is about the kernel.
    :param order: the block's order, likewise.
    """

    rule: str
    severity: Severity
    message: str
    explain: str
    phys: int | None = None
    order: int | None = None


@dataclass(frozen=True)
class Message:
    """What a rule about the kernel has to say; the address where there is one."""

    text: str
    phys: int | None = None


@dataclass(frozen=True)
class Marked:
    """
    The rows of a chunk that a rule is about.

    :param rows: mask.
    :param say: the message for one row; called for rows that are shown, not for all.
    """

    rows: NDArray[np.bool_]
    say: Callable[[int], str]


@dataclass(frozen=True)
class Rule:
    """
    A check.

    :param sentence: when it fires; the docstring of its function.
    :param explain: what will happen, in which kernel, and what to do.
    :param finders: its functions by scope, one of SCOPES.
    """

    name: str
    severity: Severity
    sentence: str
    explain: str
    finders: dict[str, Callable[..., Any]]

    def finding(self, message: str, phys: int | None = None, order: int | None = None) -> Finding:
        return Finding(self.name, self.severity, message, self.explain, phys, order)


#: All rules by name.
RULES: dict[str, Rule] = {}

#: What a rule's function is given and gives back, by scope.
SCOPES = {
    "handover": "(before, after) → messages",
    "abi": "(abi) → messages, for what a kernel does whatever its tree holds",
    "kernel": "(snapshot) → messages",
    "next": "(snapshot, NextKernel) → messages, for what the next kernel makes of it",
    "tree": "(snapshot) → blocks with marked rows, for what no single chunk shows",
    "blocks": "(snapshot, a chunk of blocks) → marked rows",
    "pairs": "(handover.Pairs) → marked rows",
    "stamps": "(before, its keys, a chunk of stamps) → marked rows",
    "calls": "(snapshot, a chunk of Calls) → marked rows",
    "touches": "(snapshot, a chunk of Touches) → marked rows of its blocks",
    "losses": "(Losses) → messages",
}

F = TypeVar("F", bound=Callable[..., Any])


def rule(name: str, severity: Severity, scope: str, explain: str) -> Callable[[F], F]:
    """Register a function as a rule; its docstring is the rule's sentence."""

    def register(find: F) -> F:
        sentence = " ".join((find.__doc__ or "").split())
        RULES[name] = Rule(name, severity, sentence, " ".join(explain.split()), {scope: find})
        return find

    return register


def also(name: str, scope: str) -> Callable[[F], F]:
    """Register what a rule looks for in another scope."""

    def register(find: F) -> F:
        RULES[name].finders[scope] = find
        return find

    return register


def of_scope(scope: str) -> Iterator[tuple[Rule, Callable[..., Any]]]:
    """The rules that have something to look for in a scope, in their order."""
    for each in RULES.values():
        if scope in each.finders:
            yield each, each.finders[scope]
