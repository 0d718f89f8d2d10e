# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a snapshot file keeps what is in the memfds that LUO preserves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from . import budget
from .archive import Archive, Stored, Writer
from .clients import Content

#: Bytes of a piece in a file.
PIECE: Final = 4 << 20


@dataclass(frozen=True)
class Recorded:
    """
    What ``meta.json`` has of it.

    :param pieces: how many there are.
    :param gaps: numbers of those that could not be read, each with its bytes.
    """

    incoming: bool
    session: str
    token: int
    size: int
    pieces: int
    gaps: list[list[int]]


def put(writer: Writer, contents: Iterable[Content]) -> list[Recorded]:
    """Write contents, reading each once."""
    return [_put(writer, number, content) for number, content in enumerate(contents)]


def _put(writer: Writer, number: int, content: Content) -> Recorded:
    count, gaps = 0, []
    for piece in _joined(content.pieces):
        if isinstance(piece, int):
            gaps.append([count, piece])
        else:
            writer.member(_member(number, count), piece)
        count += 1
    return Recorded(content.incoming, content.session, content.token, content.size, count, gaps)


def folder(number: int) -> str:
    """Where the pieces of some contents are."""
    return f"contents/{number:06d}"


def _member(number: int, piece: int) -> str:
    return f"{folder(number)}/{piece:06d}.bin"


def _joined(pieces: Iterable[bytes | int]) -> Iterator[bytes | int]:
    """Small pieces joined: a folio may be a page, and a file has millions of them."""
    held, gap = bytearray(), 0
    for piece in pieces:
        if isinstance(piece, int):
            if held:
                yield bytes(held)
                held.clear()
            gap += piece
            continue
        if gap:
            yield gap
            gap = 0
        held += piece
        if len(held) >= PIECE:
            yield bytes(held)
            held.clear()
    if held or gap:
        yield bytes(held) or gap


def get(archive: Archive, recorded: Sequence[Recorded]) -> list[Content]:
    """The contents that :func:`put` wrote; each is read anew whenever its pieces are iterated."""
    found = []
    for number, each in enumerate(recorded):
        with archive.damage():
            gaps: dict[int, int] = dict(each.gaps)  # type: ignore[arg-type]
            if not 0 <= each.size <= budget.ADDRESSES or not 0 <= each.pieces <= budget.PIECES:
                raise ValueError(f"{folder(number)}: contents that no memory has room for")
            if len(gaps) < len(each.gaps) or not all(
                0 <= at < each.pieces and size > 0 for at, size in gaps.items()
            ):
                raise ValueError(f"{folder(number)}: gaps where there can be none")
            sizes = archive.sizes(
                _member(number, at) for at in range(each.pieces) if at not in gaps
            )
            if sum(sizes) + sum(gaps.values()) > each.size:
                raise ValueError(f"{folder(number)}: more than there is in the file")
        found.append(
            Content(
                each.incoming,
                each.session,
                each.token,
                each.size,
                Stored(_reader(archive, number, each.pieces, gaps)),
            )
        )
    with archive.damage():
        if len({(each.incoming, each.session, each.token) for each in found}) < len(found):
            raise ValueError("contents of one file twice")
    return found


def _reader(
    archive: Archive, number: int, pieces: int, gaps: dict[int, int]
) -> Callable[[], Iterator[bytes | int]]:
    def read() -> Iterator[bytes | int]:
        for at in range(pieces):
            yield gaps[at] if at in gaps else archive.member(_member(number, at))

    return read
