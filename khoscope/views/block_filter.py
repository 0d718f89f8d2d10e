# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which blocks the user asked to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..abi.keys import TYPE_NAMES
from ..facts.columns import Blocks


@dataclass(frozen=True)
class BlockFilter:
    """
    :param order: only blocks of this order.
    :param type: only ``contig`` or ``split``.
    :param phys: only blocks that share memory with [first, end), physical.
    """

    order: int | None = None
    type: str | None = None
    phys: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return (self.order, self.type, self.phys) != (None, None, None)

    def apply(self, stream: Iterable[Blocks], page_shift: int) -> Iterator[Blocks]:
        """Yield the chunks of a stream, reduced to the blocks that were asked for."""
        for blocks in stream:
            wanted = np.ones(len(blocks), np.bool_)
            if self.order is not None:
                wanted &= blocks.order == self.order
            if self.type is not None:
                number = next(n for n, name in TYPE_NAMES.items() if name == self.type)
                wanted &= blocks.type == number
            if self.phys is not None:
                first, end = self.phys
                wanted &= blocks.end(page_shift) > np.uint64(first)
                wanted &= blocks.phys < np.uint64(min(end, 2**64 - 1))
            if wanted.any():
                yield blocks[wanted]
