# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope shell``: a drgn session."""

from __future__ import annotations

import argparse
import sys

from ..views.progress import Progress
from ..words.errors import KhoscopeError
from . import common


def add(shell: argparse.ArgumentParser) -> None:
    shell.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.snapshot:
        raise KhoscopeError(
            "a snapshot holds facts, not memory: drgn has nothing to look at",
            "give --live, --qemu or --core",
        )
    if not sys.stdin.isatty():
        raise KhoscopeError(
            "the shell needs a terminal", "for a script, run drgn and `import khoscope` in it"
        )
    from ..helpers.session import run

    with Progress(sys.stderr) as progress:
        source = common.kernel(args, progress)
    run(source.prog)
    return common.FINE
