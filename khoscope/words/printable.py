# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make text from elsewhere (names, logs, files and their errors) safe to show."""

from __future__ import annotations

import unicodedata
from typing import Final

#: Letters and symbols that are invisible: fillers of Hangul, and Braille without a dot.
_INVISIBLE: Final = frozenset("\u115f\u1160\u3164\uffa0\u2800")
#: Marks that are drawn over the letter before them. They include the variation selectors.
_OVER_OTHERS: Final = frozenset({"Mn", "Me"})
#: Characters that reorder a line: letters of right-to-left scripts, and Arabic numbers.
_FROM_THE_RIGHT: Final = frozenset({"R", "AL", "AN"})


def printable(text: str) -> str:
    """
    Escape text so that it cannot steer a terminal, end the line, or reorder or hide what is on it.

    >>> printable("7.2\\n\\033[31mPASS")
    '7.2\\\\n\\\\x1b[31mPASS'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(c: str) -> bool:
    # Python does not call these printable: control characters, format characters (for bidirectional
    # text, and characters without width), and line and paragraph separators.
    return (
        c.isprintable()
        and c not in _INVISIBLE
        and unicodedata.category(c) not in _OVER_OTHERS
        and unicodedata.bidirectional(c) not in _FROM_THE_RIGHT
    )
