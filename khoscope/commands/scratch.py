# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope scratch``: what KHO costs this host."""

from __future__ import annotations

import argparse
import os
import sys

from ..facts.brief import Brief, of_files, of_kernel
from ..facts.scratch import cost
from ..views import scratch as view
from ..words.errors import KhoscopeError
from . import common


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Show what KHO costs this host: the scratch areas and what is in them, how much of
what is free can be pinned, who uses KHO at all, and what kho=off or smaller
areas would give back. khoscope changes nothing."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = """\
exit status of --brief: 0 if KHO is off or in use, 1 if it is on and nobody uses
it, or takes memory and only root could tell who uses it, or if it is off and the
kernel before has left its areas; 3 if that cannot be told"""
    command.set_defaults(run=_run)
    kind = common.output(command)
    kind.add_argument(
        "--brief", action="store_true", help="one line and an exit status, without root if need be"
    )


def _run(args: argparse.Namespace) -> int:
    if args.brief:
        return _brief(args)
    try:
        facts = common.facts(args, lambda source: source.scratch())
    except KhoscopeError as error:
        if _elsewhere(args):
            raise
        hint = f"{error.hint}; khoscope scratch --brief goes by this host's files alone"
        raise KhoscopeError(error.what, hint) from error
    if args.json:
        view.write_json(facts, cost(facts), sys.stdout)
    else:
        view.ScratchText(sys.stdout, args.limit).scratch(facts, cost(facts))
    return common.FINE


def _brief(args: argparse.Namespace) -> int:
    found = _look(args)
    view.ScratchText(sys.stdout).brief(found)
    if found.is_wasted:
        return common.FOUND
    told = found.on is False or (found.users is not None and found.users.any)
    return common.FINE if told else common.NO_VERDICT


def _look(args: argparse.Namespace) -> Brief:
    """Ask the kernel's memory, or the host's files where that cannot be."""
    if _elsewhere(args) or os.geteuid() == 0:
        try:
            return of_kernel(common.facts(args, lambda source: source.clients()))
        except KhoscopeError:
            if _elsewhere(args):
                raise
    from ..sources.host_scratch import read_host_scratch

    return of_files(read_host_scratch())


def _elsewhere(args: argparse.Namespace) -> bool:
    """Whether something else than this host was asked for."""
    return bool(args.snapshot or args.qemu or args.core or args.program)
