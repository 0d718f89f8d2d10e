# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a kernel's command line switches on and off.

Kernel source: ``next_arg`` in lib/cmdline.c, ``parse_args`` in kernel/params.c, ``kstrtobool`` in
lib/kstrtox.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

#: What the kernel takes for a blank (``isspace()``), as far as a command line may have it.
_BLANKS: Final = " \t\n\v\f\r"
#: Blanks within quotation marks do not end a word.
_WORD: Final = re.compile(rf'(?:[^{_BLANKS}"]|"[^"]*(?:"|$))+')


def parameters(command_line: str) -> Iterator[tuple[str, str | None]]:
    """Names and values, if they have any; what comes after "--" is init's."""
    for found in _WORD.finditer(command_line):
        word = found[0]
        if word.startswith('"'):
            word = word[1:].removesuffix('"')
        name, equals, value = word.partition("=")
        if value.startswith('"'):
            value = value[1:].removesuffix('"')
        if word == "--":
            return
        yield name, value if equals else None


def switched(command_line: str, name: str) -> tuple[str, bool] | None:
    """
    The last setting of a parameter that ``kstrtobool()`` understands, and what it says; None: none.
    """
    found = None
    for each, value in parameters(command_line):
        if each == name and value is not None and (says := _kstrtobool(value)) is not None:
            found = f"{name}={value}", says
    return found


def _kstrtobool(text: str) -> bool | None:
    if re.match(r"[eEyYtT1]|[oO][nN]", text):
        return True
    if re.match(r"[dDnNfF0]|[oO][fF]", text):
        return False
    return None
