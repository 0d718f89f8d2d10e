# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope tree``: what the radix tree holds."""

from __future__ import annotations

import argparse
import sys

from ..errors import KhoscopeError
from ..views import json as json_view
from ..views.select import Filter
from ..views.text import Text
from . import common


def add(commands: common.Commands) -> None:
    tree = commands.add_parser("tree", help="what the radix tree holds")
    tree.set_defaults(run=_run)
    common.output(tree, "block")
    tree.add_argument("--order", type=int, help="only blocks of this order")
    tree.add_argument("--type", choices=["contig", "split"], help="only blocks of this type")
    tree.add_argument(
        "--phys",
        type=common.physical_range,
        metavar="ADDR[..END]",
        help="only blocks that share this memory",
    )
    tree.add_argument("--nodes", action="store_true", help="show the tree's own nodes, too")
    tree.add_argument(
        "--incoming",
        action="store_true",
        help="the tree that this kernel was handed, as far as it is still there",
    )


def _run(args: argparse.Namespace) -> int:
    facts = common.facts(args, lambda source: source.tree())
    which = "incoming" if args.incoming else "outgoing"
    side = facts.incoming if args.incoming else facts.outgoing
    if side is None:
        raise KhoscopeError(
            "this kernel was not handed anything: there is no incoming tree",
            "ask in a kernel that was kexec'ed with KHO on, or leave --incoming out",
        )
    wanted = Filter(args.order, args.type, args.phys)
    if args.json:
        json_view.write_tree(facts, side.tree, which, wanted, args.nodes, sys.stdout)
    elif args.jsonl:
        json_view.write_block_lines(facts, side.tree, wanted, sys.stdout)
    else:
        Text(sys.stdout, args.limit).tree(facts, side.tree, which, wanted, args.nodes)
    return common.FINE
