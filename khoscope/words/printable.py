# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text from elsewhere, made fit to be shown: names, logs, files and their errors are not ours."""

from __future__ import annotations

import unicodedata
from typing import Final

#: Letters and symbols that leave nothing to see: fillers of Hangul, and Braille without a dot.
_INVISIBLE: Final = frozenset("\u115f\u1160\u3164\uffa0\u2800")
#: Marks that are drawn over the letter before them; the variation selectors are among them.
_OVER_OTHERS: Final = frozenset({"Mn", "Me"})
#: What reorders a line: letters of scripts that run from right to left, and Arabic numbers.
_FROM_THE_RIGHT: Final = frozenset({"R", "AL", "AN"})


def printable(text: str) -> str:
    """
    Text that can neither steer a terminal nor end the line, nor reorder or hide what is on it.

    >>> printable("7.2\\n\\033[31mPASS")
    '7.2\\\\n\\\\x1b[31mPASS'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(c: str) -> bool:
    # Control and format characters (those for bidirectional text, and what has no width) and line
    # and paragraph separators are not printable in Python's sense.
    return (
        c.isprintable()
        and c not in _INVISIBLE
        and unicodedata.category(c) not in _OVER_OTHERS
        and unicodedata.bidirectional(c) not in _FROM_THE_RIGHT
    )
