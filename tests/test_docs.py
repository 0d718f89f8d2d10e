# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documents say of rules, commands and options: that it is all there, and no more."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from khoscope.checks import RULES
from khoscope.cli import parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CHECKS = ROOT / "docs" / "checks.md"
MANUALS = sorted((ROOT / "docs").glob("*.8"))

#: Options of other programs: kexec, venv, and `python -m vm`.
OTHERS = {"--reuse-cmdline", "--system-site-packages", "--source"}

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
#: As a paragraph of code, after a prompt or not, or in a line of text.
_COMMAND = re.compile(r"^    (?:[#$] )?(khoscope .*)|`(khoscope [^`]*)`", re.MULTILINE)


def rows(text: str) -> Iterator[list[str]]:
    """The cells of all tables but their heads."""
    for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if cells[0].startswith(("`", "-")) or not cells[0]:
            yield cells


def commands() -> dict[str, argparse.ArgumentParser]:
    """Their parsers by name."""
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def options(each: argparse.ArgumentParser) -> set[str]:
    return {o for action in each._actions for o in action.option_strings if o.startswith("--")}


def all_options() -> set[str]:
    return set().union(*map(options, (parser(), *commands().values())))


def test_every_check_has_its_row() -> None:
    found = [cells[:2] for cells in rows(CHECKS.read_text()) if cells[0].startswith("`")]
    assert sorted(found) == sorted([f"`{r.name}`", str(r.severity)] for r in RULES.values())


def test_every_check_is_shown_and_compared() -> None:
    for cells in rows(CHECKS.read_text()):
        assert len(cells) == 4, cells
        assert all(cells), cells


def test_every_command_is_in_the_table() -> None:
    table = README.read_text().partition("| command | does | example |")[2].partition("\n\n")[0]
    found = {cells[0].strip("`") for cells in rows(table) if cells[0].startswith("`")}
    assert found == commands().keys()


@pytest.mark.parametrize("path", [README, CHECKS, *MANUALS], ids=lambda path: path.name)
def test_every_option_is_there(path: Path) -> None:
    mentioned = set(_OPTION.findall(path.read_text().replace("\\-", "-")))
    assert mentioned - OTHERS <= all_options()


@pytest.mark.parametrize("path", [README, CHECKS], ids=lambda path: path.name)
def test_every_command_line_is_accepted(path: Path) -> None:
    lines = ["".join(groups) for groups in _COMMAND.findall(path.read_text())]
    assert lines
    for line in lines:
        words = shlex.split(re.split(r" (?:&&|&|\||>) ?|   +", line)[0], comments=True)[1:]
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{path.name}: {line}")


def test_every_option_of_verify_is_told() -> None:
    """It is what an operator runs."""
    told = set(_OPTION.findall(README.read_text()))
    assert options(commands()["verify"]) - {"--help"} <= told
