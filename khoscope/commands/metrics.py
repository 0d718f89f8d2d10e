# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope metrics``: the numbers of a kernel, for Prometheus."""

from __future__ import annotations

import argparse
import io
import sys
from typing import TYPE_CHECKING

from .. import checks
from ..facts.metrics import metrics
from ..facts.snapshot import Snapshot
from ..facts.status import kho_switch
from ..views import metrics as view
from ..words.errors import NoKho
from . import common

if TYPE_CHECKING:
    from ..sources.kernel import KernelSource


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Print the numbers of a kernel in Prometheus' text format: whether KHO is on,
what is preserved, sessions, scratch, and what the checks find. It reads what
khoscope verify reads.

That KHO is off, or that the kernel has none, is a number, too, and no error. A
verdict is not in the exit status, but in khoscope_verdict."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = """\
examples:
  khoscope metrics
  khoscope metrics --output /var/lib/prometheus/node-exporter/khoscope.prom

exit status: 0 the numbers are written, 2 khoscope could not do it, and an old
FILE is as it was"""
    command.set_defaults(run=_run)
    command.add_argument(
        "--output",
        metavar="FILE",
        type=common.path,
        help="write this file, all at once, for the node exporter's textfile collector (mode 0644)",
    )


def _run(args: argparse.Namespace) -> int:
    text = io.StringIO()
    try:
        facts, report = common.used(args, _judge, _read)
    except NoKho:
        view.write_metrics(None, None, None, text)
    else:
        view.write_metrics(facts, metrics(facts), report, text)
    if args.output:
        common.write_readable(args.output, text.getvalue())
    else:
        sys.stdout.write(text.getvalue())
    return common.FINE


def _judge(facts: Snapshot) -> checks.Report | None:
    return checks.check(facts) if kho_switch(facts).on else None


def _read(source: KernelSource) -> tuple[Snapshot, checks.Report | None]:
    if source.has_kho():
        return source.judge(lambda facts, _: checks.check(facts))
    return source.scratch(), None
