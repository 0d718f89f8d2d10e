# SPDX-License-Identifier: LGPL-2.1-or-later
"""The subcommand `record`: makes the snapshots that `khoscope demo` shows, from real guests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vm.exercise import SCENARIOS, Exercise
from vm.luo import Memfd, hold, retrieve
from vm.machine import REPOSITORY, Machine, MachineError
from vm.scenario import preserve, restore

DEMO = REPOSITORY / "khoscope" / "demo"

#: Memory with which nothing is wrong, if the kernel keeps its type.
HEALTHY = ("contig", "split", "folio", "dma", "vmalloc", "vmalloc-huge", "helper", "many")

#: The prefix of files in the demo, the kernel, and what is preserved there.
RECORDED: dict[str, tuple[str, Sequence[str]]] = {
    "rfc": ("7.2-rfc", HEALTHY),
    "fixed": ("7.2-fixed", HEALTHY),
    "odd": ("7.2-fixed", SCENARIOS),
}

#: What loads a kernel's debug information under TCG takes its time.
TIMEOUT = 300.0

#: A LUO session, and its memfds by token.
SESSION = "guest"
FILES = {1: Memfd(64 << 10), 2: Memfd(2 << 20, thp=True)}


def record(accel: str | None = None) -> int:
    """Record all, then replace the demo's files: a run that fails leaves them as they were."""
    with tempfile.TemporaryDirectory(prefix="khoscope-record-") as made:
        directory = Path(made)
        for prefix in RECORDED:
            _snapshots(prefix, directory, accel)
        findings = {
            f"{prefix}-{stage}": _findings(directory, prefix, stage)
            for prefix in RECORDED
            for stage in ("before", "after")
        }
        (directory / "findings.json").write_text(json.dumps(findings, indent=1) + "\n")
        DEMO.mkdir(exist_ok=True)
        for file in sorted(directory.iterdir()):
            # Snapshots are made 0600, as they hold addresses; these are for everybody.
            file.chmod(0o644)
            shutil.copy(file, DEMO)
            print(f"{file.stat().st_size:8} {(DEMO / file.name).relative_to(REPOSITORY)}")
    return 0


def _snapshots(prefix: str, directory: Path, accel: str | None) -> None:
    """Two snapshots of one guest: all preserved, and all taken back but what nobody claims."""
    kernel, scenarios = RECORDED[prefix]
    before, after = (f"{prefix}-{stage}.khosnap" for stage in ("before", "after"))
    with Machine(kernel, accel=accel) as machine:
        exercise = Exercise(machine)
        # With all its files in memory it allocates nothing that has been freed to be seen so.
        _khoscope(machine, "verify", "--json")
        names = preserve(exercise, scenarios)
        hold(machine, SESSION, FILES)
        machine.load_kexec()
        _khoscope(machine, "snapshot", f"/root/{before}")
        machine.execute_kexec()
        exercise.load()
        restore(exercise, names)
        retrieve(machine, SESSION, FILES)
        _khoscope(machine, "snapshot", "--before", f"/root/{before}", f"/root/{after}")
        for name in (before, after):
            machine.copy_out(f"/root/{name}", directory / name)


def _khoscope(machine: Machine, *words: str) -> None:
    """Runs it in the guest; 1 is the exit status of a verify that found something."""
    result = machine.run(("khoscope", *words), timeout=TIMEOUT)
    if result.returncode not in (0, 1):
        raise MachineError(f"khoscope {' '.join(words)} failed:\n{result.stderr}")


def _findings(directory: Path, prefix: str, stage: str) -> dict[str, Any]:
    """What `khoscope verify` says of a snapshot, on the host."""
    command = [sys.executable, "-m", "khoscope"]
    command += ["--snapshot", str(directory / f"{prefix}-{stage}.khosnap"), "verify", "--json"]
    if stage == "after":
        command += ["--before", str(directory / f"{prefix}-before.khosnap")]
    result = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    document: dict[str, Any] = json.loads(result.stdout)
    # Not the explanations: rewording one changes nothing that was found.
    findings = [{k: v for k, v in f.items() if k != "explain"} for f in document["findings"]]
    return {"verdict": document["verdict"], "findings": findings}
