# SPDX-License-Identifier: LGPL-2.1-or-later
"""How khoscope ends: by a verdict, in two lines, or of the signal that ends it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from khoscope import cli, demo
from khoscope.commands import common
from khoscope.words.errors import KhoscopeError
from tests.command import Result, Run

REPOSITORY = Path(__file__).parent.parent
SNAPSHOT = demo.path("odd-after")
HERE = [sys.executable, "-m", "khoscope"]


def shell(redirection: str, *words: object) -> Result:
    """Run khoscope in a shell that redirects its output."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *HERE, *map(str, words)]
    return finished(command)


def finished(command: list[str], **more: Any) -> Result:
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False, **more
    )
    return Result(result.returncode, result.stdout, result.stderr)


# Output that goes nowhere

WORDS: list[list[object]] = [
    ["--help"],
    ["--version"],
    ["verify", "--help"],
    ["demo"],
    ["--snapshot", SNAPSHOT, "status"],
    ["--snapshot", SNAPSHOT, "tree", "--json"],
    ["--snapshot", SNAPSHOT, "fdt", "--raw"],
]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: str(words[-1]))
def test_a_full_disk(words: list[object]) -> None:
    result = shell(">/dev/full", *words)
    result.refused("cannot write: No space left on device", "where the output goes")


@pytest.mark.parametrize("words", WORDS[1:5], ids=lambda words: str(words[-1]))
def test_stdout_that_is_closed(words: list[object]) -> None:
    result = shell(">&-", *words)
    result.refused("cannot write: stdout is closed", "where the output goes")


def test_stderr_that_is_closed() -> None:
    """What would be said there is not said elsewhere; what is printed is."""
    for words in (
        ["--snapshot", "missing", "status"],
        ["no-such-command"],
        ["tree", "--limit", "x"],
    ):
        result = shell("2>&-", *words)
        assert (result.status, result.out) == (2, "")
    result = shell("2>&-", "--version")
    assert (result.status, result.out) == (0, "khoscope 0.1.0\n")


def test_nobody_to_tell() -> None:
    for redirection in (">&- 2>&-", ">/dev/full 2>/dev/full", ">/dev/full 2>&-"):
        result = shell(redirection, "--snapshot", SNAPSHOT, "status")
        assert (result.status, result.out, result.err) == (2, "", "")
    result = shell("2>/dev/full", "--snapshot", "missing", "status")
    assert (result.status, result.out) == (2, "")
    result = shell("2>/dev/full", "no-such-command")
    assert (result.status, result.out) == (2, "")


# Values that are none


@pytest.mark.parametrize(
    "words",
    [
        ["--qemu", "", "status"],
        ["--core", "", "status"],
        ["--snapshot", "", "status"],
        ["--vmlinux", "", "status"],
        ["tree", "--root", ""],
        ["verify", "--next", ""],
        ["verify", "--before", ""],
        ["verify", "--metrics", ""],
        ["metrics", "--output", ""],
        ["snapshot", ""],
        ["snapshot", "--before", "", "new"],
        ["owners", "--trace", ""],
        ["diff", "", "b"],
        ["diff", "a", ""],
        ["trace", "--replay", ""],
        ["trace", "--record", ""],
        ["trace", "--before", ""],
        ["trace", "-c", ""],
    ],
)
def test_empty_values(run: Run, words: list[str]) -> None:
    """An unset variable: not this host, and not a file of no name."""
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert "it is empty" in result.err.splitlines()[-1]


@pytest.mark.parametrize("number", [2**63, 2**64, 10**30, -1])
def test_limits_that_are_none(run: Run, number: int) -> None:
    for command in (["tree"], ["verify"], ["fdt"], ["owners"], ["luo"]):
        result = run("--snapshot", SNAPSHOT, *command, "--limit", number)
        assert (result.status, result.out) == (2, "")
        assert "--limit" in result.err.splitlines()[-1]


def test_the_largest_limit(run: Run) -> None:
    for command in ("tree", "verify", "fdt", "owners", "luo", "status"):
        most = run("--snapshot", SNAPSHOT, command, "--limit", 2**63 - 1)
        every = run("--snapshot", SNAPSHOT, command, "--limit", 0)
        assert (most.status, most.out) == (every.status, every.out)


# Bugs


@pytest.mark.parametrize(
    "error", [ValueError("x\n\x1b[31mPASS"), KeyError("x"), MemoryError(), RecursionError("deep")]
)
def test_a_bug_is_no_verdict(run: Run, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*any: object) -> None:
        raise error

    monkeypatch.setattr(common, "facts", fails)
    result = run("--snapshot", SNAPSHOT, "luo")
    assert (result.status, result.out) == (2, "")
    lines = result.err.splitlines()
    assert all(line.startswith("khoscope: ") for line in lines)
    assert lines[0] == "khoscope:   Traceback (most recent call last):"
    assert type(error).__name__ in lines[-4] + lines[-3]
    assert lines[-2] == "khoscope: this is a bug in khoscope"
    assert "report it" in lines[-1]
    assert "\x1b" not in result.err


def test_a_khoscope_that_is_not_whole() -> None:
    for module, word in (("argparse", "--version"), ("msgspec", "checks")):
        code = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['khoscope', {word!r}];"
        code += "from khoscope.__main__ import main; sys.exit(main())"
        finished([sys.executable, "-c", code]).refused("it is not whole", module, "install")


# Signals

#: Raises Ctrl-C when a module is looked for, and runs khoscope in one of two ways.
INTERRUPTED = """
import sys, runpy, _signal

class Interrupt:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == MODULE:
            _signal.raise_signal(_signal.SIGINT)

MODULE, way, word = sys.argv[1:4]
sys.meta_path.insert(0, Interrupt)
sys.argv = ["/usr/bin/khoscope", word]
if way == "script":
    from khoscope.__main__ import main
    sys.exit(main())
sys.argv[0] = "-m"
sys.orig_argv = [sys.executable, "-m", "khoscope", word]
runpy.run_module("khoscope", run_name="__main__", alter_sys=True)
"""

#: What every command imports, and what a command does.
EARLY = [
    *("khoscope.__main__", "khoscope.cli", "khoscope.words.errors", "khoscope.words.printable"),
    *("khoscope.commands", "argparse"),
]
LATE = ["khoscope.commands.checks", "khoscope.facts.store", "numpy", "msgspec", "tabulate"]


@pytest.mark.parametrize("way", ["script", "module"])
@pytest.mark.parametrize("module", [*EARLY, *LATE])
def test_ctrl_c_during_any_import(module: str, way: str) -> None:
    interrupted = [INTERRUPTED, module, way, "checks"]
    result = finished(["env", "--default-signal=INT", sys.executable, "-c", *interrupted])
    said = "khoscope: interrupted\n" if module in LATE else ""
    assert (result.status, result.out, result.err) == (-signal.SIGINT, "", said)


@pytest.mark.parametrize("way", ["script", "module"])
def test_the_version_takes_no_command(way: str) -> None:
    for module in ("no.such.module", *LATE):
        result = finished([sys.executable, "-c", INTERRUPTED, module, way, "--version"])
        assert (result.status, result.out, result.err) == (0, "khoscope 0.1.0\n", "")


@pytest.mark.parametrize("way", ["script", "module"])
@pytest.mark.parametrize("module", ["khoscope.cli", "numpy"])
def test_ctrl_c_ends_a_job_in_the_background(module: str, way: str) -> None:
    """A script's shell has it ignore SIGINT; ``kill -INT`` ends it all the same, at any moment."""
    interrupted = [INTERRUPTED, module, way, "checks"]
    result = finished(["env", "--ignore-signal=INT", sys.executable, "-c", *interrupted])
    said = "khoscope: interrupted\n" if module in LATE else ""
    assert result == Result(-signal.SIGINT, "", said)


@pytest.mark.parametrize("program", ["drgn", "-c", "script.py", "-m", "/opt/khoscope/x.py"])
def test_importing_khoscope_changes_nothing(program: str) -> None:
    """A drgn session, or anybody's script: Ctrl-C is theirs."""
    code = (
        f"import sys, signal; sys.argv[0] = {program!r}; import khoscope;"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]
    assert finished(command) == Result(0, "", "")


def handlers() -> list[Any]:
    return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_handlers_are_put_back(run: Run) -> None:
    before = handlers()
    assert run("--version").status == 0
    assert handlers() == before


def test_in_a_session_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """%kho runs perform() alone: what ends a session is not ours to say."""
    seen: list[list[Any]] = []

    def facts(args: argparse.Namespace, read: object) -> None:
        seen.append(handlers())
        raise KhoscopeError("what", "hint")

    before = handlers()
    monkeypatch.setattr(common, "facts", facts)
    words = ["--snapshot", str(SNAPSHOT), "luo"]
    assert cli.perform(cli.parser(), words) == 2
    assert cli.main(words) == 2
    session, program = seen
    assert session == handlers() == before
    assert program[1:] != before[1:]


#: Stops where a command reads its facts, in a `with` block.
STOPS = """
import contextlib, sys, time
from khoscope import cli
from khoscope.commands import common

@contextlib.contextmanager
def tidy():
    try:
        yield
    finally:
        print("tidy", flush=True)

def facts(args, read):
    with tidy():
        print("reading", flush=True)
        # Python 3.14 may look for a signal that came before a sleep only after it.
        for _ in range(600):
            time.sleep(0.1)

common.facts = facts
sys.exit(cli.main(["luo"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_what_is_open(number: signal.Signals) -> None:
    defaults = [f"--default-signal={name}" for name in ("INT", "TERM", "HUP")]
    with subprocess.Popen(
        ["env", *defaults, sys.executable, "-c", STOPS],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert out == "tidy\n"
    assert err == ("khoscope: interrupted\n" if number == signal.SIGINT else "")
