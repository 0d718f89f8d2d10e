# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope checks``: what verify and trace look for."""

from __future__ import annotations

import argparse
import difflib
import sys

from .. import checks
from ..views.checks import Checks, write_checks
from . import common


def add(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_run)
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.add_argument(
        "rule", nargs="?", type=rule_name, metavar="RULE", help="explain this check"
    )


def rule_name(text: str) -> str:
    """The name of a rule."""
    if text in checks.RULES:
        return text
    close = difflib.get_close_matches(text, checks.RULES)
    hint = f"did you mean {' or '.join(close)}?" if close else "khoscope checks lists them"
    raise argparse.ArgumentTypeError(f"there is no check {text!r}: {hint}")


def _run(args: argparse.Namespace) -> int:
    rules = [each for each in checks.in_order() if args.rule in (None, each.name)]
    if args.json:
        write_checks(rules, sys.stdout)
    elif args.rule:
        Checks(sys.stdout).explain(rules[0])
    else:
        Checks(sys.stdout).overview(rules)
    return common.FINE
