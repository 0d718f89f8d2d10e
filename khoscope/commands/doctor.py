# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope doctor``: what this host offers."""

from __future__ import annotations

import argparse
import platform
import sys

from ..facts.offers import missing
from ..views import doctor as view
from ..words.errors import KhoscopeError
from . import common


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Show what this host offers: one line for each thing that khoscope can use, where
khoscope looked for it, and what to do if it is missing. doctor has no
requirements of its own: without root it says what it can."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = """\
exit status: 0 if this host has everything that commands need in order to read
this kernel, 2 otherwise; stderr then names the first thing that is missing"""
    command.set_defaults(run=_run, refuse=_refuse)
    command.add_argument("--json", action="store_true", help="one JSON document")


def _refuse(args: argparse.Namespace) -> str | None:
    if args.snapshot or args.qemu or args.core:
        return "doctor is about this host"
    return None


def _run(args: argparse.Namespace) -> int:
    from ..sources.host import Host
    from ..sources.kernel import KernelSource, Overrides
    from ..sources.open import LIVE, open_live

    overrides = Overrides(args.type_shift)
    facts = Host().facts(
        lambda: open_live(args.vmlinux),
        lambda prog: KernelSource(prog, LIVE, True, overrides),
    )
    release = platform.release()
    if args.json:
        view.write_json(facts, release, sys.stdout)
    else:
        view.DoctorText(sys.stdout).doctor(facts, release)
    first = missing(facts)
    if first:
        sys.stdout.flush()
        raise KhoscopeError(f"{first.name}: {first.value}", first.hint)
    return common.FINE
