# SPDX-License-Identifier: LGPL-2.1-or-later
"""What options take, as far as all commands share it; this is imported with every command."""

from __future__ import annotations

import argparse
from pathlib import Path


def given(text: str) -> str:
    """
    Any text but an empty one.

    A shell variable that is not set gives an empty text, which would mean something else.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the option out")
    return text


def path(text: str) -> Path:
    """A file's name."""
    return Path(given(text))
