# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What ``khoscope trace`` costs those who call KHO: time per kho_preserve_pages(), traced or not.

    python -m benchmarks.trace_overhead [KERNEL]

The exercise module takes the times in a guest that this boots: of a call with no probe at all; with
``--check``, by fentry and by kprobes, which counts in the kernel; with a line for each call;
and with a program that only counts the stacks of kho_preserve_pages(), by kprobe and by fentry, as
one would type it for bpftrace (here it is bcc's, which khoscope needs anyway).  The passes are
interleaved, and of each measurement the median over the passes counts.  Under TCG, without KVM, all
times are many times those of a real machine; the ratios are a rough guide there, too.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from tabulate import tabulate

from vm.exercise import Exercise
from vm.machine import Machine
from vm.trace import Trace

#: Orders of the blocks; the refcounts of all pages of a block are read.
ORDERS = (0, 4, 9, 10)
_STACKS = ("python3", "/root/count_stacks.py")
_KHOSCOPE = ("khoscope", "trace")
#: What is on meanwhile: a command and its options.
TRACED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "stacks, kprobe": (_STACKS, ("kprobe",)),
    "stacks, fentry": (_STACKS, ("fentry",)),
    "--check": (_KHOSCOPE, ("--check",)),
    "--check, kprobes": (_KHOSCOPE, ("--check", "--probe", "kprobe")),
    "lines": (_KHOSCOPE, ()),
}
#: All events of a pass have to fit into the buffer of who shows lines: one that is lost costs less.
ROUNDS = {"untraced": 100_000, **dict.fromkeys(TRACED, 1000)}
PASSES = 3


def measure(kernel: str, passes: int) -> dict[tuple[str, int], float]:
    """Nanoseconds per call, by what is on (``untraced``: nothing) and order."""
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with Machine(kernel) as machine:
        exercise = Exercise(machine)
        exercise.load()
        machine.copy_in(Path(__file__).parent / "count_stacks.py", _STACKS[1])
        print(f"{machine.kernel.name}, {machine.accel}", file=sys.stderr)

        def take(how: str) -> None:
            for order in ORDERS:
                # The first rounds find cold caches, and the tree without its nodes.
                exercise.time(order, ROUNDS[how] // 10)
                timing = exercise.time(order, ROUNDS[how], timeout=300)
                times[how, order].append(timing.preserve_ns)
            print(f"{how}: {[round(times[how, o][-1]) for o in ORDERS]}", file=sys.stderr)

        for number in range(passes):
            for i, (how, (command, options)) in enumerate(TRACED.items()):
                take("untraced")
                with Trace(machine, f"{number}-{i}", *options, command=command) as trace:
                    take(how)
                if trace.status:
                    raise SystemExit(trace.errors())
    return {key: median(values) for key, values in times.items()}


def table(times: dict[tuple[str, int], float]) -> str:
    """As Markdown: how many times as long as a call that is not traced."""
    rows = [
        [
            order,
            f"{1 << order:,}",
            f"{times['untraced', order]:,.0f}",
            *(f"{times[how, order] / times['untraced', order]:.1f} ×" for how in TRACED),
        ]
        for order in ORDERS
    ]
    headers = ["order", "pages", "untraced, ns", *TRACED]
    return tabulate(rows, headers, tablefmt="github", colalign=("right",) * len(headers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", default="7.2-fixed")
    parser.add_argument("--passes", type=int, default=PASSES)
    args = parser.parse_args()
    print(table(measure(args.kernel, args.passes)))


if __name__ == "__main__":
    main()
