# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope pages``: the struct pages of a range of memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from ..facts import budget, store
from ..facts.page_runs import PageRuns, recorded, runs
from ..facts.snapshot import Snapshot
from ..views import pages as view
from ..views.progress import Progress
from ..words.errors import KhoscopeError
from . import common


def add(commands: common.Commands) -> None:
    command = commands.add_parser(
        "pages",
        help="the struct pages of a range of memory",
        description="""\
The struct pages of a range of memory: refcount, flags, stamp, whether it is free,
and which preserved block covers it. Pages of which all is equal are one row.

A page on a per-cpu free list looks allocated. A snapshot file has the pages of
blocks only: all of the first one, of the others the refcount, where they agree.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  khoscope pages 0x3a200000                  the page that holds this address
  khoscope pages 0x3a200000..0x3a400000      those of 2 MiB
  khoscope pages 0..0x40000000 --jsonl       those of 1 GiB, a run a line""",
    )
    command.set_defaults(run=_run)
    common.output(command, "run of equal pages")
    command.add_argument(
        "range", metavar="PHYS[..PHYS]", type=common.physical_range, help="first address, and end"
    )


def _run(args: argparse.Namespace) -> int:
    first, end = args.range
    with Progress(sys.stderr) as progress:
        if args.snapshot:
            facts = store.load_file(args.snapshot)
            _require_few(facts, first, end)
            look = recorded(facts)
        else:
            source = common.kernel(args, progress)
            facts = source.clients()
            look = source.pages

        def looked(start: int, stop: int) -> Iterator[PageRuns]:
            last = min(end, int(facts.ram[-1, 1]))
            for window in look(start, stop):
                progress("looking at pages", int(window.phys[-1]) - first, last - first)
                yield window

        found = _cleared(runs(facts, first, end, looked), progress)
        if args.json:
            view.write_json(facts, args.range, found, sys.stdout)
        elif args.jsonl:
            view.write_lines(facts, found, sys.stdout)
        else:
            view.PagesText(sys.stdout, args.limit).pages(facts, found)
    return common.FINE


def _require_few(facts: Snapshot, first: int, end: int) -> None:
    """Of a file, RAM may be said to be anywhere."""
    low, high = (np.clip(facts.ram, first, end).T).tolist()
    pages = sum(end - start for start, end in zip(low, high, strict=True)) >> facts.abi.page_shift
    if pages > budget.PAGES:
        raise KhoscopeError(
            f"{pages:,} pages of RAM, more than {budget.PAGES:,}", "give a smaller range"
        )


def _cleared(found: Iterator[PageRuns], progress: Progress) -> Iterator[PageRuns]:
    """Runs are read while they are shown: the bar must not stand where they go."""
    for part in found:
        progress.clear()
        yield part
