# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests write into memfds, so that they recognise each page later."""

from __future__ import annotations

import numpy as np


def content(token: int, size: int, offset: int = 0) -> bytes:
    """
    `size` bytes of the file with this token, from `offset` on.

    Each u64 of the file has the token's low half in its upper half, and its own number in the file
    in its lower half.

    :param offset: in bytes, a multiple of 8.
    """
    numbers = np.arange(offset // 8, (offset + size + 7) // 8, dtype=np.uint64)
    return (numbers | np.uint64((token & 0xFFFFFFFF) << 32)).tobytes()[:size]
