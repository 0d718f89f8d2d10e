# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which calls a person asked for."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import numpy as np

from ..facts.calls import FUNCTIONS, Batch, CallKind


@dataclass(frozen=True)
class CallFilter:
    """
    Which calls are asked for; the others are neither shown nor checked.

    :param kinds: of outermost calls.
    :param tgid: ``task_struct.tgid`` of the caller.
    :param comm: ``task_struct.comm`` of the caller.
    :param min_order: only blocks of this order and above, and calls that touch one, or failed.
    """

    kinds: frozenset[CallKind] = frozenset(CallKind)
    tgid: int | None = None
    comm: str | None = None
    min_order: int = 0

    @property
    def comm_bytes(self) -> bytes | None:
        """As the kernel keeps it: 15 bytes at most."""
        return None if self.comm is None else os.fsencode(self.comm)[:15]

    def apply(self, batch: Batch) -> Batch:
        """The batch without the calls and touches that were not asked for."""
        calls, touches = batch.calls, batch.touches
        if self.kinds != frozenset(CallKind):
            kinds = np.array([function.kind in self.kinds for function in FUNCTIONS])
            calls = calls[kinds[calls.function]]
        if self.tgid is not None:
            calls = calls[calls.tgid == self.tgid]
        if self.comm_bytes is not None:
            calls = calls[calls.comm == self.comm_bytes]
        # Keep touches whose call is not in this batch: that call has not returned yet.
        left_out = batch.calls.call[~np.isin(batch.calls.call, calls.call)]
        touches = touches[~np.isin(touches.call, left_out)]
        if self.min_order:
            touches = touches[touches.blocks.order >= self.min_order]
            calls = calls[np.isin(calls.call, touches.call) | calls.failed]
        return dataclasses.replace(batch, calls=calls, touches=touches)
