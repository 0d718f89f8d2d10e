# SPDX-License-Identifier: LGPL-2.1-or-later
"""What restored blocks were in the kernel that handed them over."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..facts.calls import Action, Touches
from ..facts.columns import Blocks, Pages
from ..facts.snapshot import Snapshot, rows
from ..words.errors import KhoscopeError

#: How many blocks of a snapshot may be kept in memory, 67 bytes each.
MOST = 1 << 24


class Before:
    """
    The recorded blocks of a snapshot, by key.

    :raises KhoscopeError: if the snapshot holds no struct pages, or too many blocks.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._abi = snapshot.abi
        recorded = rows(snapshot.outgoing.blocks)
        if not recorded and rows(snapshot.outgoing.tree.leaves):
            raise KhoscopeError(
                "the snapshot does not hold the struct pages of what it records",
                "take it with `khoscope snapshot`, in the kernel that hands over",
            )
        if recorded > MOST:
            raise KhoscopeError(
                f"the snapshot records more than {MOST:,} blocks",
                "leave --before out, and run khoscope verify --before when the clients are done",
            )
        self._blocks = Blocks.concatenate(snapshot.outgoing.blocks)

    @property
    def page_size(self) -> int:
        """Of the kernel that handed over, bytes."""
        return self._abi.page_size

    def join(self, touches: Touches) -> Touches:
        """
        The same touches; for each restore of a recorded block, ``was`` says what the block was.
        """
        known = np.zeros(len(touches), np.bool_)
        was = Pages.blank(len(touches))
        restores = np.flatnonzero(touches.action == Action.RESTORE)
        phys, order = touches.blocks.phys[restores], touches.blocks.order[restores]
        for each in np.unique(order).tolist():
            # A stamp's order may be any nonsense.
            if not len(self._blocks) or each > self._abi.order_0_log2:
                continue
            of_order = restores[order == each]
            for page_type in self._abi.key_types:
                keys = self._abi.kho_radix_encode_keys(phys[order == each], each, page_type)
                at = np.searchsorted(self._blocks.key, keys)
                at = np.minimum(at, len(self._blocks) - 1)
                # A key drops the address bits below its order: compare the addresses, too.
                found = self._blocks.key[at] == keys
                found &= self._blocks.phys[at] == phys[order == each]
                known[of_order[found]] = True
                for name in Pages.DTYPES:
                    recorded = getattr(self._blocks.facts, name)
                    getattr(was, name)[of_order[found]] = recorded[at[found]]
        return dataclasses.replace(touches, known=known, was=was)
