# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the next kernel uses in place: nobody restores it, and that is not an error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64
from ..abi.serialized import KEXEC_METADATA, LUO, LUO_FDT_COMPATIBLE, MEMBLOCK
from ..facts.clients import FLB_LIST, Claims, OwnerKind
from ..facts.columns import Blocks
from ..facts.snapshot import Snapshot

#: Subtrees that are read in place (``kho_in_kexec_metadata``, ``reserve_mem_kho_retrieve_fdt``).
READ_IN_PLACE = {KEXEC_METADATA, MEMBLOCK}


class InPlace:
    """
    The root FDT, the kernel's own subtrees, LUO's list of FLBs (``luo_flb_setup_incoming``), LUO's
    blob if it is an FDT (``luo_early_startup`` up to linux 7.1), and what ``reserve_mem=`` has set
    aside.

    No kernel from 7.1 to 7.3 restores any of it: the stamps stay.
    """

    def __init__(self, facts: Snapshot) -> None:
        side = facts.outgoing
        self._page_shift = facts.abi.page_shift
        self._spots = [side.fdt.phys] if side.fdt.phys else []
        keeps_luo = side.luo is not None and side.luo.compatible == LUO_FDT_COMPATIBLE
        names = {*READ_IN_PLACE, LUO} if keeps_luo else READ_IN_PLACE
        for subtree in side.fdt.subtrees:
            if subtree.name in names and subtree.phys is not None:
                self._spots.append(subtree.phys)
        theirs = [owner == FLB_LIST or owner.kind == OwnerKind.RESERVE_MEM for owner in side.owners]
        areas = Claims.empty()
        if any(theirs):
            areas = Claims.concatenate(c[np.array(theirs)[c.owner]] for c in side.claims)
        self._start, self._size = areas.phys, areas.size

    @property
    def claims(self) -> U64:
        """u64, shape (n, 2): what :meth:`claimed` goes by; first address, and first behind."""
        return np.stack([self._start, self._start + self._size], axis=1)

    def of(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Which blocks the next kernel uses in place."""
        found = self.claimed(blocks)
        start, end = blocks.phys, blocks.end(self._page_shift)
        for spot in self._spots:
            found |= (start <= np.uint64(spot)) & (np.uint64(spot) < end)
        return found

    def claimed(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Which blocks begin in LUO's list of FLBs, or what ``reserve_mem=`` has set aside."""
        at = np.searchsorted(self._start, blocks.phys, "right").astype(np.int64) - 1
        found = at >= 0
        at = at[found]
        found[found] = blocks.phys[found] - self._start[at] < self._size[at]
        return found
