# SPDX-License-Identifier: LGPL-2.1-or-later
"""``%kho`` on programs that are no kernels; on real ones: tests/vm/test_drgn.py."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from drgn import Architecture, Platform, Program, ProgramFlags
from drgn.commands import DEFAULT_COMMAND_NAMESPACE, CommandNotFoundError, run_command

from khoscope import DRGN_COMMAND, cli, plugin
from khoscope.commands import common
from khoscope.sources.btf import BtfError

ROOT = Path(__file__).parent.parent
#: The source's options, with as many words as each takes.
SOURCES = ["--live", "--qemu x", "--core x", "--snapshot x", "--vmlinux x"]


@pytest.fixture
def prog(monkeypatch: pytest.MonkeyPatch) -> Program:
    """A program without KHO, on which the command is there all the same."""
    command = DEFAULT_COMMAND_NAMESPACE._commands[DRGN_COMMAND]
    monkeypatch.setattr(command, "enabled", lambda prog: True)
    return Program(Platform(Architecture.X86_64))


def commands(top: argparse.ArgumentParser) -> dict[str, set[str]]:
    """The options of each command."""
    (action,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    for each in action.choices.values():
        each.describe()
    return {
        name: {option for a in each._actions for option in a.option_strings}
        for name, each in action.choices.items()
    }


def test_drgn_finds_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = project["entry-points"]["drgn.plugins"].values()
    assert importlib.import_module(name) is plugin


def test_it_costs_no_session_anything() -> None:
    """drgn imports it with every program: nothing else of ours, and no numpy."""
    words = "import drgn.commands, sys; old = set(sys.modules); import khoscope.plugin; "
    words += "print(*sorted(set(sys.modules) - old))"
    result = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {name for name in result.stdout.split() if not name.startswith("drgn")} == {
        "khoscope",
        "khoscope.plugin",
    }


class Other:
    """As much of a program as the command asks of it before it is there."""

    def __init__(self, flags: ProgramFlags, *names: str) -> None:
        self.flags = flags
        self._names = names

    def __contains__(self, name: str) -> bool:
        return name in self._names


@pytest.mark.parametrize(
    ("flags", "names", "there"),
    [
        (ProgramFlags.IS_LINUX_KERNEL, ("kho_out",), True),
        (ProgramFlags.IS_LINUX_KERNEL | ProgramFlags.IS_LIVE, ("kho_out",), True),
        (ProgramFlags.IS_LINUX_KERNEL, ("init_task",), False),
        (ProgramFlags.IS_LIVE, ("kho_out",), False),
    ],
)
def test_kernels_with_kho_have_it(flags: ProgramFlags, names: tuple[str, ...], there: bool) -> None:
    other: Any = Other(flags, *names)
    assert (DRGN_COMMAND in dict(DEFAULT_COMMAND_NAMESPACE.enabled(other))) == there


def test_broken_btf_is_heard_of_when_it_is_used() -> None:
    """drgn asks all commands before it runs any."""

    class Broken(Other):
        def __contains__(self, name: str) -> bool:
            raise BtfError("BTF has no string at 9999")

    other: Any = Broken(ProgramFlags.IS_LINUX_KERNEL)
    assert DRGN_COMMAND in dict(DEFAULT_COMMAND_NAMESPACE.enabled(other))


def test_other_programs_do_not() -> None:
    with pytest.raises(CommandNotFoundError):
        run_command(Program(Platform(Architecture.X86_64)), "kho checks")


def test_it_has_the_options_of_the_command_line(prog: Program) -> None:
    here, there = commands(cli.parser_for(prog)), commands(cli.parser())
    missing = {"carry", "install-units", "trace", "shell", "doctor", "demo"}
    assert there.keys() - here.keys() == missing
    assert here == {name: there[name] for name in here}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_refused(prog: Program, capfd: pytest.CaptureFixture[str], source: str) -> None:
    assert run_command(prog, f"kho {source} tree") == 2
    out, err = capfd.readouterr()
    assert out == ""
    option = source.split()[0]
    assert err.splitlines()[-1] == (
        f"%kho: error: {option}: %kho looks at the program of this drgn session"
    )


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("", 2, "required: COMMAND"),
        ("trace", 2, "invalid choice: 'trace'"),
        ("tree --order x", 2, "--order: invalid int value"),
        ("verify --watch 1", 2, "a file does not change"),
        ("-h", 0, "usage: %kho"),
        ("verify -h", 0, "usage: %kho verify"),
        ("--version", 0, "khoscope "),
    ],
)
def test_what_ends_the_command_line_does_not_end_the_session(
    prog: Program, capfd: pytest.CaptureFixture[str], words: str, status: int, said: str
) -> None:
    assert run_command(prog, f"kho {words}") == status
    out, err = capfd.readouterr()
    assert said in (err if status else out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tree", "no kexec handover"),
        ("verify --before carried", "what this host was handed"),
        ("diff /nowhere /nowhere", "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_two_lines(
    prog: Program, capfd: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert run_command(prog, f"kho {words}") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.startswith("khoscope: ") for line in err.splitlines()] == [True, True]
    assert said in err


def test_output_is_that_of_the_command_line(
    prog: Program, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also in a file, and in a pipe."""
    assert cli.main(["checks", "--json"]) == 0
    expected = capfd.readouterr().out
    assert run_command(prog, "kho checks --json") == 0
    assert capfd.readouterr().out == expected
    assert run_command(prog, f"kho checks --json > {tmp_path / 'a'}") == 0
    assert (tmp_path / "a").read_text() == expected
    assert run_command(prog, "kho checks --json | cat") == 0
    assert capfd.readouterr().out == expected


def test_nobody_reads_it(prog: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a pager is left: the command is over, the session is not."""

    def nobody(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("khoscope.commands.checks.write_checks", nobody)
    assert run_command(prog, "kho checks --json") is None


def test_ctrl_c_ends_the_command_alone(prog: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """drgn's session knows what to do then."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "kernel", interrupted)
    before = sys.stdout.errors
    with pytest.raises(KeyboardInterrupt):
        run_command(prog, "kho tree")
    assert sys.stdout.errors == before
