# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long it takes from nothing to `khoscope tree`, with BTF against a vmlinux with DWARF.

    python -m benchmarks.startup

In a guest (sysfs and /proc/kallsyms; a vmlinux on a file share) and on the host over QMP (out of
the guest's memory; a local vmlinux): with all files in memory, and in the guest also with none.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from tabulate import tabulate

from vm.machine import REPOSITORY, Machine

KERNEL = "7.2-fixed"
ROUNDS = 5

HIDE = "mkdir -p /run/none; for d in /usr/lib/debug /kernel; do mount --bind /run/none $d; done"
SHOW = "umount /usr/lib/debug /kernel"
DROP = "sync; echo 3 > /proc/sys/vm/drop_caches"
TIMED = "a=$(date +%s%N); khoscope tree >/dev/null; b=$(date +%s%N); echo $((b - a))"


def in_guest(machine: Machine, cold: bool) -> tuple[float, float]:
    """Median seconds with BTF and with DWARF, turn by turn."""
    btf: list[float] = []
    dwarf: list[float] = []
    for _ in range(ROUNDS):
        for prepare, times, tidy in ((HIDE, btf, SHOW), ("true", dwarf, "true")):
            machine.run(prepare, check=True)
            # What is not being measured, Python and drgn, is in memory.
            machine.run("khoscope tree >/dev/null", timeout=300, check=True)
            if cold:
                machine.run(f"{DROP}; khoscope checks >/dev/null", timeout=300, check=True)
                machine.run("python3 -c 'import drgn, numpy, msgspec'", timeout=300, check=True)
            times.append(int(machine.run(TIMED, timeout=300, check=True).stdout) / 1e9)
            machine.run(tidy, check=True)
    return statistics.median(btf), statistics.median(dwarf)


def on_host(machine: Machine) -> tuple[float, float]:
    """The same over QMP."""
    btf: list[float] = []
    dwarf: list[float] = []
    vmlinux = ["--vmlinux", str(machine.kernel.share / "vmlinux")]
    for _ in range(ROUNDS + 1):
        for options, times in (([], btf), (vmlinux, dwarf)):
            where = ["--qemu", str(machine.qmp_socket), *options]
            started = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "khoscope", *where, "tree"],
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            times.append(time.monotonic() - started)
    # The first of each has read the files.
    return statistics.median(btf[1:]), statistics.median(dwarf[1:])


def main() -> None:
    rows = []
    with Machine(KERNEL) as machine:
        measured = {
            "guest, files in memory": in_guest(machine, cold=False),
            "guest, debug info not read yet": in_guest(machine, cold=True),
            "host over QMP": on_host(machine),
        }
        size = os.stat(machine.kernel.share / "vmlinux").st_size >> 20
    for what, (btf, dwarf) in measured.items():
        rows.append([what, f"{btf:.2f}", f"{dwarf:.2f}", f"{btf / dwarf:.2f}"])
    print(f"khoscope tree on {KERNEL}, vmlinux of {size} MiB, {machine.accel}, seconds, medians")
    print(tabulate(rows, ["", "BTF", "DWARF", "BTF / DWARF"], disable_numparse=True))


if __name__ == "__main__":
    main()
