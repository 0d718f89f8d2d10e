# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How fast struct pages are read in pieces of several sizes: from ``/proc/kcore`` in a guest, over QMP
from the host, and out of the guest's ELF vmcore.

    python -m benchmarks.kcore_pieces

All of the guest's struct pages are read, through drgn.  What counts are the ratios within a column,
and how long a single read takes: the kernel holds locks meanwhile.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from benchmarks import pieces
from benchmarks.bench_tree import machine as this_machine
from benchmarks.pieces import Took
from khoscope.sources.open import open_core, open_qemu
from vm.machine import Machine

KERNEL = "7.2-fixed"
#: MiB: a million struct pages.
MEMORY = 4096


def in_guest(machine: Machine) -> list[Took]:
    said = machine.run(
        "PYTHONPATH=/khoscope python3 -",
        input=Path(pieces.__file__).read_bytes(),
        timeout=600,
        check=True,
    ).stdout
    return [Took(**row) for row in json.loads(said)]


def rows(where: str, took: list[Took]) -> Iterator[list[str]]:
    fastest = min(each.all for each in took)
    for each in took:
        yield [
            where,
            f"{each.piece >> 10:,} KiB",
            f"{each.all / each.pages * 1e9:.1f}",
            f"{each.all / fastest:.2f}",
            f"{each.one * 1e3:.2f}",
            f"{each.longest * 1e3:.2f}",
        ]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, Machine(KERNEL, memory=MEMORY) as machine:
        vmlinux = machine.kernel.share / "vmlinux"
        core = Path(directory) / "core"
        machine.dump(core)
        table = [
            *rows("/proc/kcore", in_guest(machine)),
            *rows("QMP", pieces.measure(open_qemu(str(machine.qmp_socket), vmlinux))),
            *rows("ELF core", pieces.measure(open_core(core, vmlinux))),
        ]
        accel = machine.accel
    headers = ["", "piece", "ns a page", "× the fastest", "one read, ms", "longest"]
    print(tabulate(table, headers, colalign=["left", *["right"] * 5], disable_numparse=True))
    print(f"{KERNEL}, {MEMORY:,} MiB, {accel}; {this_machine()}")


if __name__ == "__main__":
    main()
