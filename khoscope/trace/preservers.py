# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who preserved what, according to a recording."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64
from ..facts.calls import Action, rows_of
from ..facts.clients import Owner, OwnerKind
from ..facts.owners import UNKNOWN, Preservers
from .record import Recording
from .summary import Callers


def preservers(recording: Recording) -> Preservers:
    """
    The callers of the preserve calls whose blocks were preserved when the recording ended.

    This takes 16 bytes of memory for each block that was preserved or unpreserved meanwhile.
    """
    stacks = Callers(recording.symbols)
    numbers: dict[str, int] = {}
    keys: list[U64] = [np.zeros(0, np.uint64)]
    owners: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for batch in recording.batches:
        touches = batch.touches
        touches = touches[(touches.action != Action.RESTORE) & touches.succeeded]
        callers, which = stacks.of(batch.calls)
        number = [numbers.setdefault(caller.client, len(numbers)) for caller in callers]
        # The last entry is for calls that had not returned.
        by_call = np.append(np.array(number, np.int64)[which], UNKNOWN)
        owner = by_call[rows_of(batch.calls.call, touches.call)]
        keys.append(touches.blocks.key)
        owners.append(np.where(touches.action == Action.ADD, owner, UNKNOWN))
    key, owner = np.concatenate(keys), np.concatenate(owners)
    # Keep what was done last to each key: its first entry from the end.
    last, at = np.unique(key[::-1], return_index=True)
    owner = owner[::-1][at]
    known = owner != UNKNOWN
    names = [Owner(OwnerKind.CALLER, f"preserved by {name}") for name in numbers]
    return Preservers(names, last[known], owner[known])
