# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Sum up many calls: who calls, which blocks are alike, sums by client, latencies.

A load makes 10^5 calls a second.  So khoscope sums whole columns: an object stands for a client, a
stack or a kind of block, never for a single call or block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, U64
from ..checks import BatchFindings, Finding
from ..checks.run import KEPT
from ..facts.calls import (
    BIT_CLEAR,
    BIT_SET,
    BIT_UNKNOWN,
    Action,
    Batch,
    Calls,
    Symbols,
    client,
    frames,
)

#: The client of blocks whose call has not returned: who made the call is not known yet.
NOT_RETURNED = "[not returned]"


def distinct(columns: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    Tell rows apart by some columns.

    :return: the first row of each kind, and the kind of each row.
    """
    kind = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        if not len(column) or (column == column[0]).all():
            continue
        values, value = np.unique(column, return_inverse=True)
        kind = np.unique(kind * len(values) + value, return_inverse=True)[1]
    first = np.unique(kind, return_index=True)[1]
    return first, kind


def _sums(
    columns: Sequence[NDArray[Any]], weights: U64 | None = None
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """
    For each combination of values, how many rows have it, or the sum of their weights if that is
    not 0.
    """
    first, kind = distinct(columns)
    if weights is None:
        sums = np.bincount(kind, minlength=len(first)).tolist()
    else:
        total = np.zeros(len(first), np.uint64)
        np.add.at(total, kind, weights)
        sums = total.tolist()
    values = zip(*(c[first].tolist() for c in columns), strict=True)
    yield from ((each, total) for each, total in zip(values, sums, strict=True) if total)


@dataclass(frozen=True)
class Caller:
    """
    Where calls come from.

    :param client: as :func:`khoscope.facts.calls.client` names it.
    :param stack: as :func:`khoscope.facts.calls.frames` lists it.
    :param number: of the stack, from 1 in the order in which they appear.
    """

    client: str
    stack: tuple[str, ...]
    number: int


class Callers:
    """
    Finds callers by stack.  Of each distinct stack of a batch, the symbols are looked up once; not
    of all batches, as another module may be loaded where one was.
    """

    def __init__(self, symbols: Symbols) -> None:
        self._symbols = symbols
        self._numbers: dict[tuple[str, ...], int] = {}

    def of(self, calls: Calls) -> tuple[list[Caller], NDArray[np.int64]]:
        """
        The callers of a batch.

        :return: the distinct callers, and which of them made each call.
        """
        first, which = distinct(list(calls.stack.T))
        # Number the stacks in the order in which they appear.
        callers = {row: self._caller(calls.stack[row]) for row in sorted(first.tolist())}
        return [callers[row] for row in first.tolist()], which

    def _caller(self, stack: U64) -> Caller:
        addresses = stack.tolist()
        # Stacks that differ only in frames of the tracing or of KHO count as one.
        above = tuple(frames(addresses, self._symbols))
        number = self._numbers.setdefault(above, len(self._numbers) + 1)
        return Caller(client(addresses, self._symbols), above, number)


@dataclass(frozen=True)
class Alike:
    """
    The blocks of a batch; blocks of one call that look the same are folded into one.

    :param examples: a row of the touches for each kind of block.
    :param groups: for each call, the kinds that it touched and how many blocks of each, in the
        order in which they came.
    """

    examples: list[int]
    groups: list[list[tuple[int, int]]]


def alike(batch: Batch) -> Alike:
    """Fold blocks with the same order, type, refcount pattern and outcome."""
    starts = batch.starts()
    touches = batch.touches[: starts[-1]]
    groups: list[list[tuple[int, int]]] = [[] for _ in range(len(batch.calls))]
    if not len(touches):
        return Alike([], groups)
    blocks, pages = touches.blocks, touches.blocks.facts
    looked = touches.action != Action.DELETE
    rest = pages.tails
    examples, kind = distinct(
        [
            touches.action,
            blocks.order,
            blocks.type,
            np.where(touches.succeeded, 1, touches.ret),
            looked & touches.sampled,
            *(
                np.where(looked, column, 0)
                for column in (
                    pages.unread,
                    pages.head,
                    rest > 0,
                    pages.zeros == rest,
                    pages.ones == rest,
                )
            ),
        ]
    )
    call = np.repeat(np.arange(len(batch.calls)), np.diff(starts))
    first, group = distinct([call, kind])
    counts = np.bincount(group)
    order = np.argsort(first, kind="stable")
    for row, count in zip(first[order].tolist(), counts[order].tolist(), strict=True):
        groups[call[row]].append((int(kind[row]), count))
    return Alike(examples.tolist(), groups)


def findings_by_call(batch: Batch, found: BatchFindings) -> list[list[Finding]]:
    """The findings of each call and its blocks; the last entry is for blocks without a call."""
    findings: list[list[Finding]] = [[] for _ in range(len(batch.calls) + 1)]
    for row, some in found.calls.items():
        findings[row] += some
    rows = sorted(found.touches)
    calls = np.searchsorted(batch.starts(), rows, "right") - 1
    for row, call in zip(rows, calls.tolist(), strict=True):
        findings[call] += found.touches[row]
    return findings


def cut_short(found: BatchFindings) -> set[str]:
    """Rules that reached the limit of findings in a batch, and may have more."""
    every = (*found.calls.values(), *found.touches.values())
    counts = Counter(finding.rule for some in every for finding in some)
    return {rule for rule, count in counts.items() if count >= KEPT}


@dataclass
class Balance:
    """
    Sums of the adds and deletes of one order and type.

    :param added: blocks that were added with success.
    :param deleted: blocks that were deleted, whether they were there or not.
    :param set: adds that set a bit of the tree that was clear.
    :param cleared: deletes that cleared a bit that was set.
    :param unknown: adds and deletes whose bit could not be read before or after.
    """

    added: int = 0
    deleted: int = 0
    set: int = 0
    cleared: int = 0
    unknown: int = 0

    @property
    def adds(self) -> int:
        """Adds minus deletes."""
        return self.added - self.deleted

    @property
    def distinct(self) -> int:
        """How many more blocks the tree holds, each counted once."""
        return self.set - self.cleared


@dataclass
class Sums:
    """
    The sums of one client, or of all.

    :param calls: by function.
    :param failed: calls by function and what came back: a negative errno, or 0 for NULL.
    :param pages: pages that were asked for, by function.
    :param blocks: by action, order and type, without those that failed.
    :param latency: calls by bucket, see :func:`bucket`.
    :param rules: findings by rule.
    """

    calls: Counter[int] = field(default_factory=Counter)
    failed: Counter[tuple[int, int]] = field(default_factory=Counter)
    pages: Counter[int] = field(default_factory=Counter)
    blocks: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    latency: Counter[int] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)

    def update(self, other: Sums) -> None:
        for name, counter in vars(self).items():
            counter.update(getattr(other, name))

    def failed_of(self, function: int) -> int:
        return sum(n for (number, _), n in self.failed.items() if number == function)


def pages(order: int, blocks: int) -> int:
    """Pages of some blocks; 0 if their key or stamp is nonsense."""
    return blocks << order if order != BAD_ORDER else 0


def bucket(ns: U64) -> NDArray[np.int64]:
    """Bits of the latency in whole µs: 0 for less than 1 µs, 1 for 1, 2 for 2 and 3 and so on."""
    # A float is exact below 2^53, frexp() gives the bits.
    return np.frexp((ns // np.uint64(1000)).astype(np.float64))[1].astype(np.int64)


def bucket_range(number: int) -> tuple[int, int]:
    """The µs of a bucket, first and last."""
    return (1 << number) >> 1, (1 << number) - 1


class Summary:
    """
    Sums over the calls of a trace, by client.

    Failures and findings count for the client that made the call.  Blocks whose call has not
    returned count for ``NOT_RETURNED``.

    ``cut_short`` names the rules that may have more findings than are counted here; a
    :class:`~khoscope.checks.Report` counts them all.
    """

    def __init__(self, callers: Callers) -> None:
        self._callers = callers
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.clients: dict[str, Sums] = {}
        self.balance: dict[tuple[int, int], Balance] = {}
        self.cut_short: set[str] = set()

    @property
    def total(self) -> Sums:
        """Of all clients."""
        total = Sums()
        for sums in self.clients.values():
            total.update(sums)
        return total

    def add(self, batch: Batch, found: BatchFindings) -> None:
        """Count a batch in."""
        callers, which = self._callers.of(batch.calls)
        # Several stacks may belong to one client.  The last name is for blocks without a call.
        names = [*(caller.client for caller in callers), NOT_RETURNED]
        self._calls(batch.calls, which, lambda number: self._sums(names[number]))
        self._touches(batch, which, lambda number: self._sums(names[number]))
        self.cut_short |= cut_short(found)
        for row, findings in enumerate(findings_by_call(batch, found)):
            if findings:
                name = names[which[row]] if row < len(which) else NOT_RETURNED
                for finding in findings:
                    self._sums(name).rules[finding.rule] += finding.times

    def _sums(self, name: str) -> Sums:
        return self.clients.setdefault(name, Sums())

    def _calls(self, calls: Calls, which: NDArray[np.int64], sums: Callable[[int], Sums]) -> None:
        for (who, function), count in _sums([which, calls.function], calls.count):
            sums(who).calls[function] += count
        for (who, function), count in _sums([which, calls.function], calls.total):
            sums(who).pages[function] += count
        latency = bucket(calls.leave - calls.enter)
        for (who, number), count in _sums([which, latency], calls.count):
            sums(who).latency[number] += count
        failed = calls.failed
        for (who, function, ret), count in _sums(
            [which[failed], calls.function[failed], calls.ret[failed]],
            None if calls.count is None else calls.count[failed],
        ):
            sums(who).failed[function, ret] += count

    def _touches(self, batch: Batch, which: NDArray[np.int64], sums: Callable[[int], Sums]) -> None:
        touches, starts = batch.touches, batch.starts()
        who = np.full(len(touches), -1, np.int64)
        who[: starts[-1]] = np.repeat(which, np.diff(starts))
        blocks, good = touches.blocks, touches.succeeded
        facts: Sequence[NDArray[Any]] = (who, touches.action, blocks.order, blocks.type)
        times = touches.count
        of_good = None if times is None else times[good]
        for (number, action, order, kind), count in _sums([f[good] for f in facts], of_good):
            sums(number).blocks[action, order, kind] += count
        tree = good & (touches.action != Action.RESTORE)
        bits: Sequence[NDArray[Any]] = (
            blocks.order,
            blocks.type,
            touches.action,
            touches.before,
            touches.after,
        )
        of_tree = None if times is None else times[tree]
        for (order, kind, action, before, after), count in _sums([b[tree] for b in bits], of_tree):
            balance = self.balance.setdefault((order, kind), Balance())
            if action == Action.ADD:
                balance.added += count
            else:
                balance.deleted += count
            if BIT_UNKNOWN in (before, after):
                balance.unknown += count
            elif (before, after) == (BIT_CLEAR, BIT_SET):
                balance.set += count
            elif (before, after) == (BIT_SET, BIT_CLEAR):
                balance.cleared += count

    def update(self, other: Summary) -> None:
        """Add the sums of another."""
        self.cut_short |= other.cut_short
        for name, sums in other.clients.items():
            self._sums(name).update(sums)
        for key, balance in other.balance.items():
            mine = self.balance.setdefault(key, Balance())
            for name, count in vars(balance).items():
                setattr(mine, name, getattr(mine, name) + count)
