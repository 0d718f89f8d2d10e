# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception that means "could not do it" (exit status 2), and how it is reported."""

from __future__ import annotations

import contextlib
import sys

from .printable import printable


class KhoscopeError(Exception):
    """
    Something that khoscope cannot do, said in two lines.

    :param what: what is wrong.
    :param hint: what to do about it.
    """

    def __init__(self, what: str, hint: str) -> None:
        # The text may quote another library or a file's name, which may hold any character.
        self.what = printable(" ".join(what.split()))
        self.hint = printable(" ".join(hint.split()))
        super().__init__(self.what)


class NoKho(KhoscopeError):
    """The kernel was built without KHO: most commands cannot do anything, and that is a fact."""


def not_whole(error: ImportError) -> KhoscopeError:
    """What to say if khoscope lacks something that it needs."""
    return KhoscopeError(
        f"it is not whole: {error}", "install khoscope again, with all that it needs"
    )


def say(*lines: str) -> None:
    """Print lines to stderr, if stderr is open."""
    # A closed stderr is None, and print() would then write to stdout.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            for line in lines:
                print(f"khoscope: {printable(line)}", file=sys.stderr)
