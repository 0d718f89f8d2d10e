# SPDX-License-Identifier: LGPL-2.1-or-later
"""The subcommand `record`: make the snapshots of `khoscope demo` from real guests."""

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

#: Scenarios with healthy memory, provided that the kernel keeps the memory's type.
HEALTHY = ("contig", "split", "folio", "dma", "vmalloc", "vmalloc-huge", "helper", "many")

#: By the prefix of the demo's files: the kernel, and the scenarios that are preserved on it.
RECORDED: dict[str, tuple[str, Sequence[str]]] = {
    "rfc": ("7.2-rfc", HEALTHY),
    "fixed": ("7.2-fixed", HEALTHY),
    "odd": ("7.2-fixed", SCENARIOS),
}

#: Seconds. It takes long to load a kernel's debug info under TCG.
TIMEOUT = 300.0

#: A LUO session, and its memfds by token.
SESSION = "guest"
FILES = {1: Memfd(64 << 10), 2: Memfd(2 << 20, thp=True)}


def record(accel: str | None = None) -> int:
    """Record everything, then replace the demo's files. A run that fails leaves them unchanged."""
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
            # khoscope makes snapshots 0600, because they hold addresses. These are for everybody.
            file.chmod(0o644)
            shutil.copy(file, DEMO)
            print(f"{file.stat().st_size:8} {(DEMO / file.name).relative_to(REPOSITORY)}")
    return 0


def _snapshots(prefix: str, directory: Path, accel: str | None) -> None:
    """Take two snapshots of one guest: all memory preserved, then all but the leak restored."""
    kernel, scenarios = RECORDED[prefix]
    before, after = (f"{prefix}-{stage}.khosnap" for stage in ("before", "after"))
    with Machine(kernel, accel=accel) as machine:
        exercise = Exercise(machine)
        # This brings khoscope's files into memory. Otherwise, the snapshot would allocate pages
        # that a scenario has freed so that khoscope sees them free.
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
    """Run khoscope in the guest. A verify that found something has the exit status 1."""
    result = machine.run(("khoscope", *words), timeout=TIMEOUT)
    if result.returncode not in (0, 1):
        raise MachineError(f"khoscope {' '.join(words)} failed:\n{result.stderr}")


def _findings(directory: Path, prefix: str, stage: str) -> dict[str, Any]:
    """What `khoscope verify` finds in a snapshot. It runs on the host."""
    command = [sys.executable, "-m", "khoscope"]
    command += ["--snapshot", str(directory / f"{prefix}-{stage}.khosnap"), "verify", "--json"]
    if stage == "after":
        command += ["--before", str(directory / f"{prefix}-before.khosnap")]
    result = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    document: dict[str, Any] = json.loads(result.stdout)
    # Explanations are left out, because rewording one does not change what was found.
    findings = [{k: v for k, v in f.items() if k != "explain"} for f in document["findings"]]
    return {"verdict": document["verdict"], "findings": findings}
