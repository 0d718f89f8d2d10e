# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope snapshot``: write all facts to a file."""

from __future__ import annotations

import argparse
import sys

from ..facts import store
from ..facts.files import NewFile
from ..views import documents
from ..views.progress import Progress, followed
from ..views.text import Text
from . import common


def add(snapshot: argparse.ArgumentParser) -> None:
    snapshot.set_defaults(run=_run, refuse=_refuse)
    common.output(snapshot)
    snapshot.add_argument("file", metavar="FILE", type=common.path)
    snapshot.add_argument(
        "--with-content",
        action="store_true",
        help="also record what is in the memfds that LUO preserves",
    )
    common.before_option(snapshot, "also record the pages of the blocks in this earlier snapshot")


def _refuse(args: argparse.Namespace) -> str | None:
    if args.snapshot and args.before:
        return "a snapshot does not hold the pages of another: --before needs a kernel"
    if args.snapshot and args.with_content:
        return "what is in files is kept if it is there: --with-content needs a kernel"
    return None


def _run(args: argparse.Namespace) -> int:
    before = common.load_before(args)
    with Progress(sys.stderr) as progress:
        if args.snapshot:
            facts = followed(store.load_file(args.snapshot), progress, "writing blocks")
            store.save_file(facts, args.file)
        else:
            with NewFile(args.file) as new:
                common.kernel(args, progress).snapshot(
                    before, file=new.telling, contents=args.with_content
                )
                new.finish()
    facts = store.load_file(args.file)
    if args.json:
        documents.write_snapshot(facts, args.file, sys.stdout)
    else:
        Text(sys.stdout, args.limit).snapshot(facts, args.file)
    return common.FINE
