# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The commands, a module each: ``add`` describes its options, and sets what runs it (``run``, which
returns the exit status) and, where options may contradict each other, what says so (``refuse``).
"""

from __future__ import annotations

from types import ModuleType
from typing import Final

from . import (
    carry,
    checks,
    demo,
    diff,
    doctor,
    fdt,
    luo,
    owners,
    pages,
    shell,
    snapshot,
    status,
    trace,
    tree,
    verify,
    vmalloc,
)

#: In the order in which --help lists them.
COMMANDS: Final[tuple[ModuleType, ...]] = (
    *(status, tree, owners, pages, fdt, luo, vmalloc),
    *(verify, checks, snapshot, carry, diff, trace, shell, doctor, demo),
)

#: Those that look at the program of a drgn session: the others are about this host, make something,
#: or are what one has there.
IN_DRGN: Final[tuple[ModuleType, ...]] = tuple(
    command for command in COMMANDS if command not in (carry, trace, shell, doctor, demo)
)
