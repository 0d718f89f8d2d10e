# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception that means: could not do it (exit status 2)."""

from __future__ import annotations

from .printable import printable


class KhoscopeError(Exception):
    """
    Something that khoscope cannot do, said in two lines.

    :param what: what is wrong.
    :param hint: what to do about it.
    """

    def __init__(self, what: str, hint: str) -> None:
        # Part of it may be another library's words, or a file's name, which may hold anything.
        self.what = printable(" ".join(what.split()))
        self.hint = printable(" ".join(hint.split()))
        super().__init__(self.what)
