# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the next kernel uses where it is: nobody restores it, and nobody is to blame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..clients import Claims, Kind
from ..columns import Blocks
from ..serialized import KEXEC_METADATA, MEMBLOCK
from ..snapshot import Snapshot

#: Subtrees that are read in place (``kho_in_kexec_metadata``, ``reserve_mem_kho_retrieve_fdt``).
READ_IN_PLACE = {KEXEC_METADATA, MEMBLOCK}


class InPlace:
    """
    The root FDT, the kernel's own subtrees, and what ``reserve_mem=`` has set aside.

    Neither 7.2 nor 7.3 restores any of it: the stamps stay.
    """

    def __init__(self, facts: Snapshot) -> None:
        side = facts.outgoing
        self._page_shift = facts.abi.page_shift
        self._spots = [side.fdt.phys] if side.fdt.phys else []
        for subtree in side.fdt.subtrees:
            if subtree.name in READ_IN_PLACE and subtree.phys is not None:
                self._spots.append(subtree.phys)
        reserved = np.array([owner.kind == Kind.RESERVE_MEM for owner in side.owners], np.bool_)
        areas = Claims.empty()
        if reserved.any():
            areas = Claims.concatenate(c[reserved[c.owner]] for c in side.claims)
        self._start, self._size = areas.phys, areas.size

    def of(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Which blocks are such memory."""
        found = self.reserved(blocks)
        start, end = blocks.phys, blocks.end(self._page_shift)
        for spot in self._spots:
            found |= (start <= np.uint64(spot)) & (np.uint64(spot) < end)
        return found

    def reserved(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Which blocks begin in what ``reserve_mem=`` has set aside."""
        at = np.searchsorted(self._start, blocks.phys, "right").astype(np.int64) - 1
        found = at >= 0
        at = at[found]
        found[found] = blocks.phys[found] - self._start[at] < self._size[at]
        return found
