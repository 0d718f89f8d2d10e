# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The lists of a side of which a kernel decides how long they are: sessions with their files, vmalloc
areas and owners.

The beginning of each is in ``meta.json``; if there are more, they follow in members of their own, a
piece at a time, so that no one needs memory for the JSON of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from . import budget
from .archive import Archive, Writer
from .clients import Luo, LuoSession, Owner, Vmalloc

#: Entries of a piece.
PIECE: Final = 1 << 13

T = TypeVar("T")


@dataclass(frozen=True)
class Lists:
    """The lists of a side."""

    luo: Luo | None
    vmallocs: list[Vmalloc]
    owners: list[Owner]


#: A side of which no lists are written.
NOTHING: Final = Lists(None, [], [])


def put(writer: Writer, name: str, lists: Lists) -> tuple[Lists, dict[str, int]]:
    """
    Write what follows the beginnings of a side's lists.

    :return: the beginnings, and how many pieces follow each of them.
    """
    counted: dict[str, int] = {}

    def rest(kind: str, pieces: Iterable[Sequence[object]]) -> None:
        count = 0
        for count, piece in enumerate(pieces, 1):
            writer.json(f"{name}/{kind}/{count - 1:06d}.json", piece)
        if count:
            counted[kind] = count

    luo = lists.luo
    if luo is not None:
        pieces = _pieces(luo.sessions)
        luo = replace(luo, sessions=next(pieces, []))
        rest("sessions", pieces)
    for kind, every in (("vmallocs", lists.vmallocs), ("owners", lists.owners)):
        rest(kind, (every[at : at + PIECE] for at in range(PIECE, len(every), PIECE)))
    return Lists(luo, lists.vmallocs[:PIECE], lists.owners[:PIECE]), counted


def get(archive: Archive, name: str, begun: Lists, counted: dict[str, int]) -> Lists:
    """
    The whole lists of a side.

    :param begun: their beginnings.
    :param counted: how many pieces follow each of them.
    """

    def rest(kind: str, of: type[T]) -> Iterator[T]:
        for number in range(counted.get(kind, 0)):
            piece = archive.json(f"{name}/{kind}/{number:06d}.json", list[of])  # type: ignore[valid-type]
            with archive.damage():
                if not 0 < len(piece) <= PIECE:
                    raise ValueError(f"{name}: a piece of {len(piece):,} {kind}")
            yield from piece

    luo = begun.luo
    with archive.damage():
        if not counted.keys() <= {"vmallocs", "owners", *(["sessions"] if luo else [])}:
            raise ValueError(f"{name}: pieces of no list")
    if luo is not None and "sessions" in counted:
        every = [*luo.sessions, *rest("sessions", LuoSession)]
        luo = replace(luo, sessions=list(_joined(every)))
    return Lists(
        luo,
        [*begun.vmallocs, *rest("vmallocs", Vmalloc)],
        [*begun.owners, *rest("owners", Owner)],
    )


def _pieces(sessions: Iterable[LuoSession]) -> Iterator[list[LuoSession]]:
    """Sessions in pieces; one that does not fit goes on in the next, by the same name."""
    piece: list[LuoSession] = []
    room = PIECE
    for session in sessions:
        at = 0
        while True:
            files = session.files[at : at + room - 1]
            piece.append(replace(session, files=files))
            at, room = at + len(files), room - 1 - len(files)
            if room <= 1:
                yield piece
                piece, room = [], PIECE
            if at == len(session.files):
                break
    if piece:
        yield piece


def _joined(sessions: Iterable[LuoSession]) -> Iterator[LuoSession]:
    """The same sessions, whole."""
    begun: LuoSession | None = None
    for session in sessions:
        if begun is not None and replace(session, files=[]) == replace(begun, files=[]):
            begun.files.extend(session.files)
            continue
        if begun is not None:
            yield begun
        begun = session
    if begun is not None:
        yield begun


def entries(luo: Luo | None) -> int:
    """Sessions and files."""
    return 0 if luo is None else len(luo.sessions) + sum(len(each.files) for each in luo.sessions)


def check(lists: Lists, size: int) -> None:
    """
    Refuse more entries than a file of this many bytes may have, and two of one name: khoscope finds
    by names what they own.
    """
    most = budget.entries(size)
    if entries(lists.luo) > most or max(len(lists.vmallocs), len(lists.owners) // 8) > most:
        raise ValueError("more sessions, files or subtrees than khoscope keeps")
    sessions = lists.luo.sessions if lists.luo else []
    files = [(session.name, file.token) for session in sessions for file in session.files]
    for named, names in (
        (len(sessions), {session.name for session in sessions}),
        (len(files), {*files}),
        (len(lists.vmallocs), {area.name for area in lists.vmallocs}),
    ):
        if len(names) < named:
            raise ValueError("sessions, files or vmalloc areas of one name")
