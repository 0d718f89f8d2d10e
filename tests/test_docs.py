# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the documents say of rules, commands and options: that it is all there, and no more; and that
what they show is what khoscope prints.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from khoscope.checks import RULES
from khoscope.cli import parser
from khoscope.demo import SCENES
from khoscope.demo import path as demo_file
from tests.command import Run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CHECKS = ROOT / "docs" / "checks.md"
GUIDE = ROOT / "docs" / "guide.md"
MANUALS = sorted((ROOT / "docs").glob("*.8"))
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

#: What the transcripts look at, besides the demo's snapshots.
RECORDED = ROOT / "tests" / "recorded"

#: Options of other programs: kexec, venv, and `python -m vm`.
OTHERS = {"--reuse-cmdline", "--system-site-packages", "--source", "--failed"}

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
#: As a paragraph of code, after a prompt or not, or in a line of text.
_COMMAND = re.compile(r"^    (?:[#$] )?(khoscope .*)|`(khoscope [^`]*)`", re.MULTILINE)
#: A paragraph of code that begins with a command after a prompt; blank lines are of it.
_TRANSCRIPT = re.compile(r"^    \$ khoscope (.*)\n((?:    .*\n|\n(?=    ))*)", re.MULTILINE)


def rows(text: str) -> Iterator[list[str]]:
    """The cells of all tables but their heads."""
    for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if cells[0].startswith(("`", "-")) or not cells[0]:
            yield cells


def commands() -> dict[str, argparse.ArgumentParser]:
    """Their parsers by name."""
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for each in action.choices.values():
        each.describe()
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
    table = README.read_text().partition("| command | shows |")[2].partition("\n\n")[0]
    found = {cells[0].strip("`") for cells in rows(table) if cells[0].startswith("`")}
    assert found == commands().keys()


@pytest.mark.parametrize("path", [*DOCUMENTS, *MANUALS], ids=lambda path: path.name)
def test_every_option_is_there(path: Path) -> None:
    mentioned = set(_OPTION.findall(path.read_text().replace("\\-", "-")))
    assert mentioned - OTHERS <= all_options()


def test_there_are_command_lines() -> None:
    found = {path.name for path in DOCUMENTS if _COMMAND.search(path.read_text())}
    assert found >= {"README.md", "guide.md", "checks.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_is_accepted(path: Path) -> None:
    for line in ("".join(groups) for groups in _COMMAND.findall(path.read_text())):
        words = shlex.split(re.split(r" (?:&&|&|\||>) ?|   +", line)[0], comments=True)[1:]
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{path.name}: {line}")


def test_every_option_of_verify_is_told() -> None:
    """It is what an operator runs."""
    told = set(_OPTION.findall(GUIDE.read_text()))
    assert options(commands()["verify"]) - {"--help"} <= told


def test_the_entrance_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def transcripts() -> Iterator[tuple[str, str, str]]:
    """By the document: a command's words, and what is shown of its output."""
    for path in DOCUMENTS:
        for words, shown in _TRANSCRIPT.findall(path.read_text()):
            yield path.name, words, shown


def test_there_are_transcripts() -> None:
    assert {name for name, _, _ in transcripts()} == {"README.md", "guide.md"}
    assert all(shown.strip() for _, _, shown in transcripts())


@pytest.mark.parametrize(("name", "words", "shown"), list(transcripts()))
def test_transcripts_are_what_is_printed(
    name: str, words: str, shown: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of "…" stands for any lines."""
    for file in (*(demo_file(scene.name) for scene in SCENES), *RECORDED.iterdir()):
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    result = run(*shlex.split(words))
    assert result.err == ""
    lines = shown.rstrip("\n").split("\n")
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line.removeprefix("    ")) + r"\n"
        for line in lines
    )
    assert re.fullmatch(pattern, result.out), f"{name}: khoscope {words}\n{result.out}"


def test_links_lead_somewhere() -> None:
    for path in (*DOCUMENTS, ROOT / "kernel-patches" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), f"{path.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else []
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, f"{path.name}: {target}"
