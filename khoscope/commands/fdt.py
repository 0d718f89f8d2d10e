# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope fdt``: the root FDT and what its subtrees point to."""

from __future__ import annotations

import argparse
import sys

from ..facts.blobs import Blob, Blobs
from ..facts.snapshot import Snapshot
from ..facts.status import no_kho
from ..views.fdt import FdtText, write_json
from ..words.errors import KhoscopeError
from ..words.printable import printable
from . import common

#: The two sides: as users name them, and in words.
SIDES = {"out": "outgoing", "in": "incoming"}


def add(fdt: argparse.ArgumentParser) -> None:
    fdt.description = (
        "Show the root FDT, then what its subtrees point to. FDTs are printed as device-tree "
        "source. Their values are bytes as they stand in memory; comments say what the bytes mean. "
        "Known structures are decoded. Anything else is printed as bytes."
    )
    fdt.set_defaults(run=_run, refuse=_refuse)
    fdt.add_argument(
        "side",
        nargs="?",
        metavar="in|out",
        help="in: what this kernel was handed; out: what it will hand over (default)",
    )
    fdt.add_argument("subtree", nargs="?", metavar="SUBTREE", help="show only this subtree")
    common.output(fdt).add_argument(
        "--raw", action="store_true", help="write the bytes of the root FDT or of the subtree"
    )


def _asked(args: argparse.Namespace) -> tuple[str, str | None]:
    """The side and the subtree; the user may leave out either."""
    return (args.side, args.subtree) if args.side in SIDES else ("out", args.side)


def _refuse(args: argparse.Namespace) -> str | None:
    if args.subtree is None or args.side in SIDES:
        return None
    return f"argument in|out: {args.side!r} is neither"


def _run(args: argparse.Namespace) -> int:
    side, subtree = _asked(args)
    if args.raw and sys.stdout.isatty():
        raise KhoscopeError(
            "these bytes are nothing for a terminal",
            "send them to a file or a program: khoscope fdt --raw | dtc -I dtb",
        )
    facts = common.facts(args, lambda source: source.clients())
    blobs = _blobs(facts, side)
    if subtree is not None:
        shown = [_subtree(blobs, side, subtree)]
    elif args.raw:
        shown = [blobs.root()]
    else:
        shown = [blobs.root(), *blobs.subtrees()]
    if args.raw:
        _write(shown[0])
    elif args.json:
        write_json(facts, side, shown, sys.stdout)
    else:
        FdtText(sys.stdout, args.limit).fdt(facts, side, shown)
    return common.FINE


def _blobs(facts: Snapshot, name: str) -> Blobs:
    side = facts.outgoing if name == "out" else facts.incoming
    if side is None:
        raise KhoscopeError(
            "this kernel was not handed anything: there is no incoming FDT",
            "ask in a kernel that was kexec'ed with KHO on, or for what goes out",
        )
    if not side.fdt.phys:
        raise no_kho(facts, "it has no root FDT")
    return Blobs(facts, side, outgoing=side is facts.outgoing)


def _subtree(blobs: Blobs, side: str, name: str) -> Blob:
    every = blobs.names()
    if name not in every:
        there = ", ".join(map(printable, every)) or "none"
        raise KhoscopeError(
            f"the {SIDES[side]} FDT has no subtree {name!r}", f"these are there: {there}"
        )
    return blobs.subtree(name)


def _write(blob: Blob) -> None:
    """Write the bytes, and raise an error if some of them are missing."""
    if blob.raw:
        sys.stdout.flush()
        sys.stdout.buffer.write(blob.raw)
    if not blob.raw or len(blob.raw) < (blob.size or 0):
        raise KhoscopeError(
            f"the bytes are not all there: {'; '.join(blob.problems)}",
            "without --raw it says what is known",
        )
