# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long it takes to find who holds LUO's sessions, by open files, against drgn's own helpers.

    python -m benchmarks.holders [KERNEL]

A guest has many processes and open files, and khoscope reads it over QMP.  drgn's helpers go
through the files of two of these processes.  CPU time, in one run: what counts is the ratio.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from drgn import Program
from drgn.helpers.linux.fs import for_each_file
from drgn.helpers.linux.pid import for_each_task
from tabulate import tabulate

from khoscope.facts.clients import Holders
from khoscope.sources.holders import read_holders
from khoscope.sources.kernel import KernelSource
from khoscope.sources.open import open_qemu
from vm.job import Job
from vm.luo import hold
from vm.machine import Machine

#: Processes that have little open, processes that have much open, and how much these have each.
IDLE, BUSY, FILES = 1000, 25, 20_000
#: How many of the latter drgn's helpers go through.
SOME = 2

_MANY = f"""
import os, resource, signal
resource.setrlimit(resource.RLIMIT_NOFILE, ({2 * FILES}, {2 * FILES}))
for _ in range({IDLE}):
    if not os.fork():
        signal.pause()
for _ in range({BUSY}):
    ready, done = os.pipe()
    if not os.fork():
        for _ in range({FILES}):
            os.open("/dev/null", os.O_RDONLY)
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
print("on", flush=True)
signal.pause()
"""


def found_by_drgn(prog: Program) -> int:
    """How many files some processes have open, each looked at."""
    count = processes = 0
    for task in for_each_task(prog):
        if not task.files or task.files.fdt.max_fds.value_() < FILES:
            continue
        count += sum(file.f_op.value_() != 0 for _, file in for_each_file(task))
        processes += 1
        if processes == SOME:
            break
    return count


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """CPU seconds, and what there was."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def main(kernel: str = "7.2-fixed") -> None:
    with Machine(kernel) as machine:
        held = hold(machine, "benchmark", {})
        Job(machine, "/root/many", ("python3", "-c", _MANY)).until_on(600.0)
        files = int(machine.run("cut -f1 /proc/sys/fs/file-nr", check=True).stdout)
        prog = open_qemu(str(machine.qmp_socket), machine.kernel.share / "vmlinux")
        source = KernelSource(prog, "benchmark", moves=True)
        where = source._where(source._begin())
        seen: list[Holders] = []

        def by_columns() -> int:
            seen.append(read_holders(where, source.layout.direct_map))
            return files

        # The first look fills caches.
        found_by_drgn(prog), by_columns()
        seconds, count = timed(lambda: found_by_drgn(prog))
        rows = [["drgn's helpers", count, seconds, seconds / count * 1e6]]
        seconds, count = timed(by_columns)
        rows.append(["khoscope", count, seconds, seconds / count * 1e6])
        for holders in seen:
            assert [each.pid for each in holders.processes] == [held.pid]
    print(tabulate(rows, ["", "files", "seconds", "µs a file"], floatfmt=".2f", intfmt=","))
    print(f"ratio: {rows[0][3] / rows[1][3]:.0f}")  # type: ignore[operator]


if __name__ == "__main__":
    main(*sys.argv[1:])
