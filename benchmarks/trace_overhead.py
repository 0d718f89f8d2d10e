# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What ``khoscope trace`` costs those who call KHO: time per kho_preserve_pages(), traced or not.

    python -m benchmarks.trace_overhead [KERNEL]

The exercise module takes the times in a guest that this boots: of a call with all its probes, while
a ``khoscope trace --summary`` reads what comes.  The passes are interleaved, and of each
measurement the median over the passes counts.  Under TCG, without KVM, all times are many times
those of a real machine; the ratios are a rough guide there, too.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from statistics import median

from tabulate import tabulate

from vm.exercise import Exercise
from vm.machine import Machine
from vm.trace import Trace

#: Orders of the blocks; the refcounts of all pages of a block are read.
ORDERS = (0, 4, 9, 10)
PROBES = ("fentry", "kprobe")
#: All events of a pass have to fit into the buffer: one that is lost costs less.
ROUNDS = {"untraced": 100_000, **dict.fromkeys(PROBES, 1000)}
PASSES = 3


def measure(kernel: str) -> dict[tuple[str, int], float]:
    """Nanoseconds per call, by kind of probe (``untraced``: none) and order."""
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with Machine(kernel) as machine:
        exercise = Exercise(machine)
        exercise.load()
        print(f"{machine.kernel.name}, {machine.accel}", file=sys.stderr)

        def take(how: str) -> None:
            for order in ORDERS:
                # The first rounds find cold caches, and the tree without its nodes.
                exercise.time(order, ROUNDS[how] // 10)
                timing = exercise.time(order, ROUNDS[how], timeout=300)
                times[how, order].append(timing.preserve_ns)
            print(f"{how}: {[round(times[how, o][-1]) for o in ORDERS]}", file=sys.stderr)

        for number in range(PASSES):
            for how in PROBES:
                take("untraced")
                with Trace(machine, f"{how}-{number}", "--summary", "--probe", how) as trace:
                    take(how)
                if trace.status:
                    raise SystemExit(trace.errors())
    return {key: median(values) for key, values in times.items()}


def table(times: dict[tuple[str, int], float]) -> str:
    """As Markdown."""
    rows = [
        [
            order,
            f"{1 << order:,}",
            f"{times['untraced', order]:,.0f}",
            *(f"{times[how, order]:,.0f}" for how in PROBES),
            *(f"{times[how, order] / times['untraced', order]:.1f}" for how in PROBES),
        ]
        for order in ORDERS
    ]
    headers = ["order", "pages", "untraced, ns", *(f"{how}, ns" for how in PROBES)]
    headers += [f"{how}, ratio" for how in PROBES]
    return tabulate(rows, headers, tablefmt="github", colalign=("right",) * len(headers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", default="7.2-fixed")
    print(table(measure(parser.parse_args().kernel)))


if __name__ == "__main__":
    main()
