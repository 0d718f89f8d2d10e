# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope tree``: what the tracker holds."""

from __future__ import annotations

import argparse
import sys

from ..abi.keys import Finalize
from ..facts.snapshot import Snapshot
from ..facts.tree import Tree
from ..views import documents
from ..views.block_filter import BlockFilter
from ..views.progress import Progress, followed_tree
from ..views.text import Text
from ..words.errors import KhoscopeError
from . import common


def add(tree: argparse.ArgumentParser) -> None:
    tree.set_defaults(run=_run, refuse=_refuse)
    common.output(tree, "block")
    tree.add_argument("--order", type=int, help="show only blocks of this order")
    tree.add_argument("--type", choices=["contig", "split"], help="show only blocks of this type")
    tree.add_argument(
        "--phys",
        type=common.physical_range,
        metavar="ADDR[..END]",
        help="show only blocks that overlap this range",
    )
    tree.add_argument("--nodes", action="store_true", help="also show the tree's own nodes")
    tree.add_argument(
        "--incoming",
        action="store_true",
        help="show the tree that this kernel was handed, as far as it still exists",
    )
    tree.add_argument(
        "--serialized",
        action="store_true",
        help="show what finalizing has serialized, which is what a kernel before the radix tree"
        " hands over",
    )
    tree.add_argument(
        "--root",
        metavar="TREE",
        type=common.given,
        help="show any other struct kho_radix_tree, named by a symbol (with members, such as"
        " kho_out.radix_tree), its virtual address, or the physical address of its root node",
    )
    tree.add_argument(
        "--raw-keys",
        action="store_true",
        help="show undecoded keys, for trees whose keys do not stand for blocks",
    )


def _refuse(args: argparse.Namespace) -> str | None:
    if args.root and args.snapshot:
        return "--root is for kernels: a snapshot holds KHO's own trees"
    named = {"--root": args.root, "--incoming": args.incoming, "--serialized": args.serialized}
    asked = [name for name, given in named.items() if given]
    if len(asked) > 1:
        return f"{' and '.join(asked)} name {len(asked)} trees"
    if args.raw_keys and BlockFilter(args.order, args.type, args.phys):
        return "--order, --type and --phys are for blocks, not for raw keys"
    return None


def _run(args: argparse.Namespace) -> int:
    facts, tree, which = _read(args)
    wanted = BlockFilter(args.order, args.type, args.phys)
    with Progress(sys.stderr) as progress:
        out, tree = progress.beside(sys.stdout), followed_tree(tree, progress)
        if args.json:
            documents.write_tree(facts, tree, which, wanted, args.nodes, args.raw_keys, out)
        elif args.jsonl:
            documents.write_block_lines(facts, tree, wanted, args.raw_keys, out)
        else:
            text = Text(out, args.limit)
            text.tree(facts, tree, which, wanted, args.nodes, args.raw_keys)
    return common.FINE


def _read(args: argparse.Namespace) -> tuple[Snapshot, Tree, str]:
    """The facts about the kernel, the tree that was asked for, and the tree's name."""
    if args.root:
        with Progress(sys.stderr) as progress:
            source = common.kernel(args, progress)
            return source.outline(), source.radix_tree(args.root), args.root
    facts = common.facts(args, lambda source: source.tree())
    if args.serialized:
        if facts.outgoing.serialized is None:
            raise KhoscopeError(
                "nothing is serialized: "
                + (
                    "this kernel hands over its tree itself"
                    if facts.abi.finalize == Finalize.NEVER
                    else "KHO is not finalized in this kernel"
                ),
                "leave --serialized out to see what is preserved",
            )
        return facts, facts.outgoing.serialized, "serialized"
    if not args.incoming:
        return facts, facts.outgoing.tree, "outgoing"
    if facts.incoming is None:
        raise KhoscopeError(
            "this kernel was not handed anything: there is no incoming tree",
            "ask in a kernel that was kexec'ed with KHO on, or leave --incoming out",
        )
    return facts, facts.incoming.tree, "incoming"
