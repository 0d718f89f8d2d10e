# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope diff``: what changed between two snapshots."""

from __future__ import annotations

import argparse
import sys

from ..facts import store
from ..views import documents
from ..views.progress import Progress, followed
from ..views.text import Text
from . import common


def add(diff: argparse.ArgumentParser) -> None:
    diff.set_defaults(run=_run)
    common.output(diff, "block")
    diff.add_argument("a", metavar="A", type=common.path)
    diff.add_argument("b", metavar="B", type=common.path)


def _run(args: argparse.Namespace) -> int:
    a, b = store.load_file(args.a), store.load_file(args.b)
    with Progress(sys.stderr) as progress:
        out = progress.beside(sys.stdout)
        # Both are read side by side.
        a = followed(a, progress, common.READ_BACK)
        if args.json:
            documents.write_diff(a, b, out)
        elif args.jsonl:
            documents.write_diff_lines(a, b, out)
        else:
            Text(out, args.limit).diff(a, b)
    return common.FINE
