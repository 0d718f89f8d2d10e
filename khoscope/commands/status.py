# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope status``: the state of KHO on one screen."""

from __future__ import annotations

import argparse
import sys

from ..facts.status import status
from ..views import status as view
from . import common


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Show the state of KHO on one screen: whether KHO is on and why, what is
preserved, and what was handed over. Each line names the kernel variable that it
was read from.

After a KHO boot, status looks at all struct pages to find the blocks that
nobody has claimed yet."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.set_defaults(run=_run)
    common.output(command)


def _run(args: argparse.Namespace) -> int:
    facts, found = common.used(args, status, lambda source: source.status(status))
    if args.json:
        view.write_json(facts, found, sys.stdout)
    else:
        view.StatusText(sys.stdout, args.limit).status(facts, found)
    return common.FINE
