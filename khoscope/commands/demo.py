# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope demo``: show khoscope at work on recorded guests."""

from __future__ import annotations

import argparse
import sys

from . import common


def add(demo: argparse.ArgumentParser) -> None:
    demo.set_defaults(run=_run)
    demo.add_argument("--json", action="store_true", help="one JSON document")


def _run(args: argparse.Namespace) -> int:
    from ..demo import show

    show(sys.stdout, args.json)
    return common.FINE
