# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The commands, one module for each.

A module's ``add`` describes the command's options. It sets ``run``, which runs the command and
returns the exit status. If options may contradict each other, it also sets ``refuse``, which says
so.
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
    scratch,
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
    *(status, scratch, tree, owners, pages, fdt, luo, vmalloc),
    *(verify, checks, snapshot, carry, diff, trace, shell, doctor, demo),
)

#: The commands that look at the program of a drgn session. The others are about this host, create
#: something, or start a session.
IN_DRGN: Final[tuple[ModuleType, ...]] = tuple(
    command for command in COMMANDS if command not in (carry, trace, shell, doctor, demo)
)
