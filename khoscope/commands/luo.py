# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope luo``: sessions and files of the Live Update Orchestrator."""

from __future__ import annotations

import argparse
import sys

from ..views import luo as view
from ..words.errors import KhoscopeError
from . import common


def add(luo: argparse.ArgumentParser) -> None:
    luo.set_defaults(run=_run)
    common.output(luo)


def _run(args: argparse.Namespace) -> int:
    facts = common.facts(args, lambda source: source.clients())
    if facts.liveupdate is None:
        raise KhoscopeError(
            "there is no live update in this kernel (no luo_global in its debug info)",
            "use a kernel with CONFIG_LIVEUPDATE=y, booted with liveupdate=on",
        )
    if args.json:
        view.write_json(facts, sys.stdout)
    else:
        view.LuoText(sys.stdout, args.limit).luo(facts)
    return common.FINE
