# SPDX-License-Identifier: LGPL-2.1-or-later
"""What KHO costs a host, for those who ask many hosts: whether it is for nothing."""

from __future__ import annotations

from dataclasses import dataclass

from .host_scratch import HostScratch
from .scratch import Users, areas, phantom, users
from .snapshot import Snapshot
from .status import kho_switch


@dataclass(frozen=True)
class Brief:
    """
    Whether KHO is on, and for whom.

    :param on: None: that cannot be told.
    :param why: it is on or off.
    :param size: of scratch, bytes; None: not known.
    :param users: None: that cannot be told.
    :param misleads: whether /proc/meminfo has scratch in CmaFree, and not in CmaTotal.
    """

    on: bool | None
    why: str
    size: int | None = None
    users: Users | None = None
    misleads: bool = False

    @property
    def is_wasted(self) -> bool:
        """Whether there is scratch, and as far as can be told for nothing, or in the way."""
        if self.on and self.users is not None:
            return self.users.nobody
        return self.misleads


def of_kernel(facts: Snapshot) -> Brief:
    """What the kernel's memory says."""
    switch = kho_switch(facts)
    size: int | None = sum(area.size for area in areas(facts))
    if switch.on and not size:
        # KHO has areas, so that they cannot be read.
        size = None
    misleads = bool(size or phantom(facts))
    return Brief(switch.on, switch.why, size, users(facts) if switch.on else None, misleads)


def of_files(found: HostScratch) -> Brief:
    """What a host's files say."""
    return Brief(found.on, found.why, found.size, None, found.phantom)
