# SPDX-License-Identifier: LGPL-2.1-or-later
"""What follows from who holds sessions of LUO and its device: by session, by unit, since when."""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Final

from .clients import Holder, LuoState

#: A unit that has processes (``unit_name_is_valid()``); of a template, an instance of it.
_UNIT: Final = re.compile(
    r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\@-]+)?\.(service|scope|socket|mount|swap)"
)
_SLICE: Final = re.compile(r"[A-Za-z0-9:_.\\-]+\.slice")
#: Characters of a unit's name, at most (UNIT_NAME_MAX).
_UNIT_NAME: Final = 255

#: A session's name, and whether it is one of the incoming side.
Thing = tuple[str | None, bool]
DEVICE: Final[Thing] = (None, False)
#: The unit of PID 1 (SPECIAL_INIT_SCOPE).
INIT: Final = "init.scope"


@dataclass(frozen=True)
class HeldBy:
    """
    A process that holds one thing.

    :param unit: its systemd unit; None: it is in none, or its cgroup is not known.
    :param since: when the process was started; None: not known.
    :param fds: descriptors by which it holds it.
    """

    process: Holder
    unit: str | None
    since: datetime.datetime | None
    fds: int


Holding = Mapping[Thing, list[HeldBy]]


def by_thing(state: LuoState | None) -> Holding | None:
    """
    Who holds each session, and ``/dev/liveupdate`` (:data:`DEVICE`), by pid.

    What nobody holds has an empty list.  None: that was not looked at.
    """
    if state is None or state.holders is None:
        return None
    found: defaultdict[Thing, list[HeldBy]] = defaultdict(list)
    for each in state.holders.processes:
        unit, since = unit_of(each.cgroup), _since(each, state.holders.booted)
        for held in each.held:
            found[held.session, held.retrieved].append(HeldBy(each, unit, since, held.fds))
    return found


def units_holding(state: LuoState | None, session: str) -> tuple[str, ...]:
    """The units whose processes hold an outgoing session, without systemd's own."""
    holding = by_thing(state)
    if holding is None:
        return ()
    units = {each.unit for each in holding[session, False]}
    return tuple(sorted(unit for unit in units if unit not in (None, INIT)))


def unit_of(cgroup: str | None) -> str | None:
    """
    The system unit that a cgroup belongs to, as ``cg_path_get_unit()`` of systemd has it: the first
    part of its path that is no slice.

    What is below it is the unit's own business: cgroups of a container, or of a user's manager.

    >>> unit_of("/machine.slice/systemd-nspawn@web.service/payload/system.slice/ssh.service")
    'systemd-nspawn@web.service'
    """
    parts = (_unescaped(part) for part in (cgroup or "").split("/") if part)
    unit = next(dropwhile(_SLICE.fullmatch, parts), "")
    return unit if len(unit) <= _UNIT_NAME and _UNIT.fullmatch(unit) else None


def _unescaped(part: str) -> str:
    """``cg_unescape()``: systemd escapes what looks like a file of the kernel's."""
    return part.removeprefix("_")


def _since(process: Holder, booted: int | None) -> datetime.datetime | None:
    if process.started is None or booted is None:
        return None
    return datetime.datetime.fromtimestamp((booted + process.started) // 10**9, datetime.UTC)
