# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope vmalloc``: a struct kho_vmalloc and its chain of chunks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from .. import checks
from ..facts import store
from ..facts.snapshot import Snapshot
from ..views import vmalloc as view
from ..views.progress import Progress
from ..words.errors import KhoscopeError
from . import common

_ONE_RULE = checks.RuleSelection(frozenset({"broken-vmalloc"}))


def add(vmalloc: argparse.ArgumentParser) -> None:
    vmalloc.set_defaults(run=_run)
    common.output(vmalloc)
    vmalloc.add_argument(
        "address",
        metavar="ADDR",
        type=common.address,
        help="address of the structure, physical or kernel virtual",
    )


def _run(args: argparse.Namespace) -> int:
    facts = _facts(args)
    findings = checks.check(facts, asked=_ONE_RULE).findings
    if args.json:
        view.write_json(facts, findings, sys.stdout)
    else:
        view.VmallocText(sys.stdout, args.limit).vmalloc(facts, findings)
    return common.FINE


def _facts(args: argparse.Namespace) -> Snapshot:
    """A snapshot whose outgoing side has only this area."""
    if not args.snapshot:
        with Progress(sys.stderr) as progress:
            return common.kernel(args, progress).vmalloc(args.address)
    facts = store.load_file(args.snapshot)
    for area in facts.outgoing.vmallocs:
        if area.phys == args.address:
            return replace(facts, outgoing=replace(facts.outgoing, vmallocs=[area]))
    known = ", ".join(f"{area.phys:#x}" for area in facts.outgoing.vmallocs[:8]) or "none"
    raise KhoscopeError(
        f"the snapshot has no struct kho_vmalloc at {args.address:#x}",
        f"those that it has are at (physical): {known}",
    )
