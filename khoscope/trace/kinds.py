# SPDX-License-Identifier: LGPL-2.1-or-later
"""
From what bpf/kho_trace.c has counted by kind to facts: a row stands for all that is alike.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64
from ..facts.calls import Batch
from .assemble import Assembler

#: Bytes of the client's hash, with which ``struct call_kind`` and ``struct block_kind`` begin.
_CLIENT = 8


@dataclass(frozen=True)
class Counted:
    """
    What the kernel has counted of each kind of call, or of block, since the trace began.

    :param keys: ``struct call_kind`` or ``struct block_kind``.
    :param count: u64, how many there were.
    :param pages: u64, how many pages these calls were asked for.
    :param examples: u8, shape (n, record): the first of each kind.
    """

    keys: list[bytes]
    count: U64
    pages: U64
    examples: NDArray[np.uint8]


@dataclass
class _Before:
    """What had been counted by kind when it was last looked at."""

    count: dict[bytes, int] = field(default_factory=dict)
    pages: dict[bytes, int] = field(default_factory=dict)

    def more(self, now: Counted) -> tuple[U64, U64]:
        """How many more there are, and how many more pages they were asked for."""
        count, pages = (
            _more(self.count, now.keys, now.count),
            _more(self.pages, now.keys, now.pages),
        )
        return count, pages


def _more(before: dict[bytes, int], keys: list[bytes], now: U64) -> U64:
    had = np.array([before.get(key, 0) for key in keys], np.uint64)
    before.update(zip(keys, now.tolist(), strict=True))
    return now - had


class Kinds:
    """Turns what has been counted into batches of what is new since the last one."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler
        self._calls, self._blocks = _Before(), _Before()

    def feed(self, calls: Counted, blocks: Counted) -> Batch:
        """
        The kinds that are known by now, with how many there are more; a count may be 0.

        The blocks of a client come with one of the kinds of its calls.  Those of a client whose
        first call has not returned come last.
        """
        batch = self._assembler.of_kinds(calls.examples, blocks.examples)
        count, pages = self._calls.more(calls)
        number = np.arange(1, len(count) + 1, dtype=np.uint64)
        first: dict[bytes, int] = {}
        for key, name in zip(calls.keys, number.tolist(), strict=True):
            first.setdefault(key[:_CLIENT], name)
        of = np.array([first.get(key[:_CLIENT], 0) for key in blocks.keys], np.uint64)
        # 0 - 1 is the highest of all.
        order = np.argsort(of - np.uint64(1), kind="stable")
        touches = dataclasses.replace(batch.touches, call=of, count=self._blocks.more(blocks)[0])
        return Batch(
            dataclasses.replace(batch.calls, call=number, count=count, all_pages=pages),
            touches[order],
        )
