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


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Show the struct pages of a range of memory: refcount, flags, stamp, whether the
page is free, and which preserved block covers it. A run of equal pages is one
row.

A page on a per-cpu free list looks allocated. A snapshot file holds only the
pages of blocks: the whole struct page of a block's first page, and the refcount
of the other pages if they all have the same one."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = """\
examples:
  khoscope pages 0x3a200000                  the page that holds this address
  khoscope pages 0x3a200000..0x3a400000      the pages of 2 MiB
  khoscope pages 0..0x40000000 --jsonl       1 GiB, one run per line"""
    command.set_defaults(run=_run)
    common.output(command, "run of equal pages")
    command.add_argument(
        "range", metavar="PHYS[..PHYS]", type=common.physical_range, help="first address and end"
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
            shift = facts.abi.page_shift
            last = min(end, int(facts.ram[-1, 1]))
            for window in look(start, stop):
                yield window
                done = int(window.phys[-1]) - first >> shift
                progress("looking at pages", done, last - first >> shift)

        found, out = runs(facts, first, end, looked), progress.beside(sys.stdout)
        if args.json:
            view.write_json(facts, args.range, found, out)
        elif args.jsonl:
            view.write_lines(facts, found, out)
        else:
            view.PagesText(out, args.limit).pages(facts, found)
    return common.FINE


def _require_few(facts: Snapshot, first: int, end: int) -> None:
    """Refuse a range with too much RAM; a file may claim that RAM is anywhere."""
    low, high = (np.clip(facts.ram, first, end).T).tolist()
    pages = sum(end - start for start, end in zip(low, high, strict=True)) >> facts.abi.page_shift
    if pages > budget.PAGES:
        raise KhoscopeError(
            f"{pages:,} pages of RAM, more than {budget.PAGES:,}", "give a smaller range"
        )
