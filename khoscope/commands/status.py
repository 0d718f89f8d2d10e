# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope status``: the state of KHO in one screen."""

from __future__ import annotations

import argparse
import sys

from ..facts.status import status
from ..views import status as view
from . import common


def add(commands: common.Commands) -> None:
    command = commands.add_parser(
        "status",
        help="the state of KHO in one screen",
        description="""\
The state of KHO in one screen: whether it is on and why, what is preserved, and
what was handed over. Each line says where in the kernel it was read.

After a KHO boot all struct pages are looked at, for what nobody has claimed.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    common.output(command)


def _run(args: argparse.Namespace) -> int:
    facts = common.facts(args, lambda source: source.status())
    if args.json:
        view.write_json(facts, status(facts), sys.stdout)
    else:
        view.StatusText(sys.stdout, args.limit).status(facts, status(facts))
    return common.FINE
