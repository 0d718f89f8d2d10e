# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: How many names a sentence has room for.
_NAMED: Final = 8


def listed(names: Sequence[str]) -> str:
    """
    Some names, of many the first.

    >>> listed(["a", "b"])
    'a, b'
    """
    text = ", ".join(names[:_NAMED])
    more = len(names) - _NAMED
    return f"{text} and {more:,} more" if more > 0 else text
