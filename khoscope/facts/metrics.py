# SPDX-License-Identifier: LGPL-2.1-or-later
"""The numbers of a kernel that monitoring keeps."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ..abi.keys import BAD_ORDER
from ..abi.serialized import LUO
from . import scratch
from .snapshot import Provenance, Side, Snapshot


@dataclass(frozen=True)
class Sessions:
    """
    What LUO hands over, or was handed.

    :param sessions: that khoscope has looked at.
    :param files: that these sessions say they have.
    """

    sessions: int
    files: int


@dataclass(frozen=True)
class ScratchArea:
    """
    A scratch area, in bytes.

    :param purpose: as :attr:`.scratch.Area.purpose` has it.
    :param free: that the buddy allocator holds; None: not counted.
    :param unmovable: that :func:`.scratch.unmovable` counts; None: not all pages were looked at.
    """

    purpose: str
    size: int
    free: int | None
    unmovable: int | None


@dataclass(frozen=True)
class Metrics:
    """
    The numbers of a kernel.

    :param preserved: outgoing blocks by (order, type).
    :param outgoing: None: not recorded, or nothing that khoscope can decode; ``incoming`` likewise.
    """

    preserved: dict[tuple[int, int], int]
    outgoing: Sessions | None
    incoming: Sessions | None
    scratch: list[ScratchArea]


def metrics(facts: Snapshot) -> Metrics:
    """Count what there is."""
    return Metrics(
        facts.outgoing.tree.totals(facts.abi),
        _sessions(facts.outgoing),
        _sessions(facts.incoming),
        _scratch(facts),
    )


def taken_at(taken: Provenance) -> int | None:
    """When that was, in seconds since 1970; None: a file has something else in its place."""
    try:
        time = datetime.datetime.fromisoformat(taken.time)
    except ValueError:
        return None
    return int(time.timestamp()) if time.tzinfo else None


def _sessions(side: Side | None) -> Sessions | None:
    luo = side.luo if side is not None else None
    if luo is None:
        is_there = side is not None and any(each.name == LUO for each in side.fdt.subtrees)
        return None if is_there else Sessions(0, 0)
    if luo.raw is not None or (luo.compatible is None and not luo.live):
        return None
    return Sessions(len(luo.sessions), sum(session.count for session in luo.sessions))


def _scratch(facts: Snapshot) -> list[ScratchArea]:
    stays = {area.phys: sum(pages.values()) for area, pages in scratch.unmovable(facts)}
    return [
        ScratchArea(
            area.purpose,
            area.size,
            area.free,
            None
            if area.use is None or area.use.unread
            else stays.get(area.phys, 0) * facts.abi.page_size,
        )
        for area in scratch.areas(facts)
    ]


@dataclass(frozen=True)
class HandsOver:
    """
    What a kexec would hand over now.

    :param size: of the blocks, bytes.
    :param sessions: None: not known.
    :param units: services for which systemd keeps what can go along.
    :param kept: memfds among that: systemd adds them, if it is told to kexec.
    """

    blocks: int
    size: int
    sessions: Sessions | None
    units: list[str]
    kept: int


def hands_over(facts: Snapshot) -> HandsOver:
    """Count what would be handed over."""
    totals = facts.outgoing.tree.totals(facts.abi)
    size = sum(
        count << order + facts.abi.page_shift
        for (order, _), count in totals.items()
        if order != BAD_ORDER
    )
    stored = facts.services.handed_over if facts.services is not None else []
    return HandsOver(
        sum(totals.values()),
        size,
        _sessions(facts.outgoing),
        [each.unit for each in stored],
        sum(fd.session is None for each in stored for fd in each.going),
    )
