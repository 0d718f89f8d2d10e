# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The commands, one module for each, which is imported only if that command is asked for.

A module's ``add`` describes the command and its options. It sets ``run``, which runs the command
and returns the exit status. If options may contradict each other, it also sets ``refuse``, which
says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from typing import Final

#: What each command does, in the order in which --help lists them.
COMMANDS: Final[Mapping[str, str]] = {
    "status": "show the state of KHO on one screen",
    "scratch": "show what KHO costs this host, and what could be given back",
    "tree": "show what is preserved: the radix tree, or the xarrays before it",
    "owners": "name the owner of each preserved block, as far as memory can tell",
    "pages": "show the struct pages of a range of memory",
    "fdt": "show the root FDT and its subtrees, decoded",
    "luo": "show live update sessions, their files and their memory",
    "vmalloc": "show a struct kho_vmalloc and its chain of chunks",
    "verify": "run the checks, and say whether it is safe to kexec",
    "metrics": "print the numbers of a kernel for Prometheus",
    "checks": "list what verify and trace look for, or explain one check",
    "snapshot": "write all facts to a file",
    "carry": "hand a snapshot to the next kernel, in memory",
    "install-units": "show or write units for systemd that run khoscope around a kexec",
    "diff": "show what changed between two snapshots",
    "trace": "follow preserve, unpreserve, split and restore as they happen",
    "shell": "start a drgn session with prog and the kho_* helpers",
    "doctor": "show what this host offers, and what to do about what is missing",
    "demo": "run the checks on snapshots of real guests; needs no root and no KHO",
}

#: The commands that look at the program of a drgn session. The others are about this host, create
#: something, or start a session.
IN_DRGN: Final[Mapping[str, str]] = {
    name: what
    for name, what in COMMANDS.items()
    if name not in ("carry", "install-units", "trace", "shell", "doctor", "demo")
}


def describe(name: str, command: argparse.ArgumentParser) -> None:
    """
    Give a command's parser its description and options.

    :raises ImportError: if something is missing that the command needs.
    """
    import_module(f"{__name__}.{name.replace('-', '_')}").add(command)
