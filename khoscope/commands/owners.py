# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope owners``: who owns the preserved blocks."""

from __future__ import annotations

import argparse
import sys

from ..facts.owners import NOBODY, BlockOwners, Preservers
from ..facts.snapshot import Snapshot
from ..views import owners as view
from ..views.progress import Progress, followed
from ..words.errors import KhoscopeError
from . import common


def add(owners: argparse.ArgumentParser) -> None:
    owners.set_defaults(run=_run)
    common.output(owners, "block")
    owners.add_argument(
        "--trace",
        metavar="FILE",
        type=common.path,
        help="attribute unknown blocks to the callers in a recording of khoscope trace",
    )


def _run(args: argparse.Namespace) -> int:
    facts = common.facts(args, lambda source: source.snapshot(stamps=False))
    callers = _callers(args, facts)
    with Progress(sys.stderr) as progress:
        out = progress.beside(sys.stdout)
        holders = BlockOwners(followed(facts, progress, common.READ_BACK), callers)
        if args.json:
            view.write_json(facts, holders, out)
        elif args.jsonl:
            view.write_lines(holders, out)
        else:
            view.OwnersText(out, args.limit).owners(facts, holders)
    return common.FINE


def _callers(args: argparse.Namespace, facts: Snapshot) -> Preservers:
    if args.trace is None:
        return NOBODY
    from ..trace.preservers import preservers
    from ..trace.record import load

    recording = load(args.trace)
    if recording.tracing.facts.kernel.boot_id != facts.kernel.boot_id:
        raise KhoscopeError(
            f"{args.trace}: recorded in another boot",
            "record in this one: khoscope trace --record FILE, before the clients preserve",
        )
    return preservers(recording)
