# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in a file, as it is: the view of ``khoscope luo --content``."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import IO, Final

from ..facts.clients import Content
from ..words.errors import KhoscopeError
from ..words.printable import printable

#: Bytes of a file that may go to a terminal, if all of it is text.
_SHORT: Final = 64 << 10
#: Bytes of zeros that are written at once.
_ZEROS: Final = 1 << 20


def write_content(content: Content, to: IO[bytes]) -> int:
    """:return: bytes that are missing; there are zeros in place of those that cannot be read."""
    written = missing = 0
    for piece in content.pieces:
        if isinstance(piece, bytes):
            to.write(piece)
            written += len(piece)
        else:
            for at in range(0, piece, _ZEROS):
                to.write(bytes(min(_ZEROS, piece - at)))
            written, missing = written + piece, missing + piece
    return missing + content.size - written


def for_stdout(content: Content, name: str) -> Content:
    """
    The same; but a terminal gets only what is short and does not steer it.

    :param name: of the file, for people.
    :raises KhoscopeError: if it is something else.
    """
    if not sys.stdout.isatty():
        return content
    pieces = list(content.pieces) if content.size <= _SHORT else []
    text = b"".join(piece for piece in pieces if isinstance(piece, bytes))
    if content.size > _SHORT or not _is_text(text):
        raise KhoscopeError(
            f"{name}: its {content.size:,} bytes do not go to a terminal",
            "name a file with --output FILE, or send them to one",
        )
    return replace(content, pieces=iter(pieces))


def _is_text(raw: bytes) -> bool:
    try:
        words = raw.decode().split()
    except UnicodeDecodeError:
        return False
    return all(printable(word) == word for word in words)
