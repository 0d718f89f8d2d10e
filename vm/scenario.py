# SPDX-License-Identifier: LGPL-2.1-or-later
"""The subcommand `scenario`: take each kind of memory across a kexec, and show the findings."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from vm.exercise import (
    SCENARIOS,
    Exercise,
    KernelLog,
    Piece,
    Unsupported,
    WriterDied,
    by_scenario,
)
from vm.kernel import patched_as
from vm.machine import REPOSITORY, Machine, MachineError

#: Pages of the scenario ``many``. The module must be able to report the address of each; otherwise
#: nobody could tell which findings are about these pages.
MANY = 64

#: The known results of each kernel.
EXPECTED = Path(__file__).with_name("expected.md")


@dataclass(frozen=True)
class Row:
    """The result of one scenario. Reference counts are head/tails."""

    scenario: str
    #: The reference counts after the preserve.
    before: str
    #: The types of its blocks in the tree, and the errors with which KHO refused other blocks.
    recorded: str
    #: The reference counts after the restore in the next kernel, or what happened instead.
    restored: str
    #: What the next kernel said when the owner freed the memory.
    freeing: str
    #: The khoscope rules that fired before the kexec, after the kexec, and after the restore.
    rules: str
    rules_handed_over: str
    rules_restored: str


_HEADERS = {
    "scenario": "scenario",
    "before": "before",
    "recorded": "recorded",
    "restored": "after\nrestore",
    "freeing": "freeing",
    "rules": "khoscope\nbefore the kexec",
    "rules_handed_over": "khoscope\nafter the kexec",
    "rules_restored": "khoscope\nafter restoring",
}


def scenario(kernel: str, names: Sequence[str], accel: str | None = None) -> int:
    """Run the scenarios (default: all) and print the table. Return 1 if it is not as expected."""
    names = [name for name in SCENARIOS if name in (names or SCENARIOS)]
    with Machine(kernel, accel=accel) as machine:
        _say(f"{kernel} booted in {machine.boot_seconds:.1f} s with {machine.accel}")
        run = Run(machine, names)
        rows = run.rows()
    table = [[_cell(value) for value in astuple(row)] for row in rows]
    print(tabulate(table, [_HEADERS[field.name] for field in fields(Row)], tablefmt="simple"))
    for stage, lines in run.elsewhere.items():
        print(f"\nkhoscope {stage}, on no scenario's memory:")
        for line in lines or ["nothing"]:
            print(f"  {line}")
    differences = _differences(kernel, rows, names)
    print(f"\n{kernel}: {'differs from' if differences else 'as in'} {EXPECTED.name}")
    for line in differences:
        print(f"  {line}")
    return 1 if differences else 0


def expected(kernel: str) -> dict[str, Row]:
    """The expected rows of a kernel, by scenario. A variant has the rows of its base kernel."""
    _, _, section = EXPECTED.read_text().partition(f"\n## {patched_as(kernel)}\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: Row(*("" if cell == "–" else cell for cell in row)) for row in cells}


def _differences(kernel: str, rows: Iterable[Row], names: Sequence[str]) -> list[str]:
    known = expected(kernel)
    seen = {row.scenario: row for row in rows}
    found = []
    for name in names:
        want, have = known.get(name), seen.get(name)
        if want is None or have is None:
            if want != have:
                found.append(f"{name}: {'not expected' if have else 'missing'} on {kernel}")
            continue
        for field in fields(Row):
            wanted, had = getattr(want, field.name), getattr(have, field.name)
            if wanted != had:
                found.append(
                    f"{name}: {field.name}: expected {wanted or 'nothing'}, seen {had or 'nothing'}"
                )
    return found


def _cell(text: str) -> str:
    return text.replace(", ", "\n") or "-"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Run:
    """One run: a kernel, the kernel after it, and what is known about each scenario so far."""

    def __init__(self, machine: Machine, names: Sequence[str]) -> None:
        self.machine = machine
        self.exercise = Exercise(machine)
        self.log = KernelLog(machine)
        self.names = list(names)
        #: Findings that are not about any scenario's memory, by stage.
        self.elsewhere: dict[str, list[str]] = {}

    def rows(self) -> list[Row]:
        """Run everything."""
        made = preserve(self.exercise, self.names)
        self.names = [name for name in self.names if name in made]
        self.machine.finalize()
        memory = by_scenario(self.exercise.report())
        recorded = self._recorded(memory)
        rules = self._verify("before the kexec", memory)
        snapshot = str(self.machine.directory / "before.khosnap")
        khoscope(self.machine, "snapshot", snapshot)

        _say("kexec")
        self.machine.load_kexec()
        self.machine.execute_kexec()
        self.exercise.load()
        before = ("--before", snapshot)
        rules_handed_over = self._verify("after the kexec", memory, *before)
        restored = self._restore()
        rules_restored = self._verify("after restoring", memory, *before)
        states = by_scenario(self.exercise.report())
        freeing = {
            name: self._free(name) if any(p.state == "restored" for p in states[name]) else ""
            for name in self.names
        }
        return [
            Row(
                name,
                _shapes(memory[name]),
                recorded[name],
                restored[name],
                freeing[name],
                rules[name],
                rules_handed_over[name],
                rules_restored[name],
            )
            for name in self.names
        ]

    def _restore(self) -> dict[str, str]:
        said = restore(self.exercise, self.names)
        pieces = by_scenario(self.exercise.report())
        return {
            name: ", ".join(filter(None, (_outcome(pieces.get(name, [])), said.get(name))))
            for name in self.names
        }

    def _free(self, name: str) -> str:
        self.log.mark()
        try:
            self.exercise.free(name)
        except WriterDied:
            _say(f"  the writer of free {name} died")
        return self.log.complaint() or "fine"

    # -- khoscope on the guest --------------------------------------------------------------------

    def _recorded(self, memory: dict[str, list[Piece]]) -> dict[str, str]:
        """The types of each scenario's blocks in the tree, and the errors of refused blocks."""
        found = {name: set(map(_error, filter(_refused, memory[name]))) for name in memory}
        for line in khoscope(self.machine, "tree", "--jsonl").splitlines():
            block: dict[str, Any] = json.loads(line)
            for name in _owners(memory, int(block["phys"], 16)):
                found[name].add(block["type"] or "no type")
        return {name: ", ".join(sorted(types)) for name, types in found.items()}

    def _verify(self, stage: str, memory: dict[str, list[Piece]], *options: str) -> dict[str, str]:
        """The rules that fire on the memory of each scenario."""
        found: dict[str, set[str]] = {name: set() for name in memory}
        elsewhere: dict[str, list[str]] = {}
        document = json.loads(khoscope(self.machine, "verify", "--json", *options))
        for finding in document["findings"]:
            phys = finding.get("phys")
            owners = [] if phys is None else _owners(memory, int(phys, 16))
            for name in owners:
                found[name].add(finding["rule"])
            if not owners:
                rule = f"{finding['severity']}: {finding['rule']}"
                elsewhere.setdefault(rule, []).append(finding["message"])
        self.elsewhere[stage] = [
            *(f"{rule}: {len(said)}, first: {said[0]}" for rule, said in elsewhere.items()),
            *(f"not seen: {what}" for what in document["incomplete"]),
        ]
        return {name: ", ".join(sorted(rules)) for name, rules in found.items()}


def khoscope(machine: Machine, *words: str) -> str:
    """What khoscope prints about the guest. A verify that found something has the exit status 1,
    and one that found nothing but could not see everything has 3.

    khoscope runs on the host, over QMP. In the guest it would allocate memory that a scenario has
    just freed, and take twenty times as long.
    """
    _say(f"khoscope {' '.join(words)}")
    result = subprocess.run(
        [sys.executable, "-m", "khoscope", *machine.source, *words],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode not in (0, 1, 3):
        raise MachineError(f"khoscope {' '.join(words)} failed:\n{result.stderr}")
    return result.stdout


def preserve(exercise: Exercise, names: Iterable[str]) -> list[str]:
    """Load the module, preserve the scenarios, and return those that this kernel supports.

    ``freed`` comes last. Its free memory must not be allocated again before khoscope has seen it.
    """
    exercise.load()
    made = []
    for name in sorted(names, key="freed".__eq__):
        _say(f"preserve {name}")
        try:
            exercise.preserve(name, MANY if name == "many" else None)
        except Unsupported as error:
            _say(f"  not in this kernel: {error}")
            continue
        made.append(name)
    return made


def restore(exercise: Exercise, names: Iterable[str]) -> dict[str, str]:
    """Restore all scenarios but ``leak``, and return the kernel's complaints."""
    said = {}
    log = KernelLog(exercise.machine)
    for name in names:
        if name == "leak":
            continue
        _say(f"restore {name}")
        log.mark()
        exercise.restore(name)
        if complaint := log.complaint():
            said[name] = complaint
    return said


def _owners(memory: dict[str, list[Piece]], phys: int) -> list[str]:
    return [
        name
        for name, pieces in memory.items()
        if any(start <= phys < end for piece in pieces for start, end in piece.ranges)
    ]


def _refused(piece: Piece) -> bool:
    return piece.ret < 0


def _error(piece: Piece) -> str:
    return f"-{errno.errorcode[-piece.ret]}"


def _shapes(pieces: Sequence[Piece]) -> str:
    return ", ".join(dict.fromkeys(piece.shape for piece in pieces))


def _outcome(pieces: Sequence[Piece]) -> str:
    """The reference counts of restored pieces, and the state of the others."""
    outcomes = (p.shape if p.state == "restored" else p.state for p in pieces)
    return ", ".join(dict.fromkeys(outcomes))
