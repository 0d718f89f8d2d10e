# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope verify``: run the checks."""

from __future__ import annotations

import argparse
import sys

from .. import checks
from ..errors import KhoscopeError
from ..views import json as json_view
from ..views.text import Text
from . import common


def add(commands: common.Commands) -> None:
    verify = commands.add_parser("verify", help="run the checks")
    verify.set_defaults(run=_run)
    common.output(verify)
    common.before_option(verify, "snapshot of the kernel that handed over")


def _run(args: argparse.Namespace) -> int:
    before = common.load_before(args)
    facts = common.facts(args, before)
    report = checks.check(facts) if before is None else checks.compare(before, facts)
    if args.json:
        json_view.write_verify(facts, report, sys.stdout)
    else:
        Text(sys.stdout, args.limit).verify(facts, report)
    if report.errors:
        return common.FOUND
    if report.incomplete:
        raise KhoscopeError(
            f"no verdict: {'; '.join(report.incomplete)}",
            "let the clients of KHO come to rest, or give a source that has all struct pages, and "
            "run it again",
        )
    return common.FINE
