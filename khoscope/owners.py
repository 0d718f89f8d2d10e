# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose the preserved blocks are: each block against what the owners claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .abi import U64
from .clients import Claims, Owner
from .columns import Blocks
from .snapshot import Side

#: In place of an owner: memory does not tell.
UNKNOWN: Final = -1


class Owners:
    """
    Looks up owners by address.

    All claims are in memory: 20 bytes for each run of neighbouring pages of one owner.
    """

    def __init__(self, owners: Sequence[Owner], claims: Iterable[Claims], page_shift: int) -> None:
        self.owners = owners
        self._page_shift = page_shift
        every = Claims.concatenate(claims)
        every = every[np.argsort(every.phys, kind="stable")]
        end = every.phys + every.size
        self._start = every.phys
        # Claims may overlap: of those that begin before an address, the one that reaches furthest.
        self._reach = np.maximum.accumulate(end) if len(end) else end
        furthest = np.where(end == self._reach, np.arange(len(end)), 0)
        self._owner = every.owner[np.maximum.accumulate(furthest)].astype(np.int64)

    @classmethod
    def of_side(cls, side: Side, page_shift: int) -> Owners:
        return cls(side.owners, side.claims, page_shift)

    def at(self, start: U64, end: U64) -> NDArray[np.int64]:
        """An owner that claims some of each span [start, end): its index, or UNKNOWN."""
        last = np.searchsorted(self._start, end, "left").astype(np.int64) - 1
        owner = np.full(len(start), UNKNOWN, np.int64)
        # A span in front of all claims has -1.
        found = last >= 0
        found[found] = self._reach[last[found]] > start[found]
        owner[found] = self._owner[last[found]]
        return owner

    def of(self, blocks: Blocks) -> NDArray[np.int64]:
        """The owner of each block: its index, or UNKNOWN."""
        return self.at(blocks.phys, blocks.end(self._page_shift))

    def name(self, owner: int) -> str:
        """An owner for people."""
        return "unknown" if owner == UNKNOWN else self.owners[owner].name
