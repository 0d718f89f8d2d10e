# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What ``khoscope trace`` costs those who call KHO: time per kho_preserve_pages(), traced or not.

    python -m benchmarks.trace_overhead [KERNEL]

The exercise module takes the times in a guest that this boots: of a call with no probe at all; with
``--check``, which reads and judges all refcounts and counts in the kernel; with a line for each
call; with what people would type instead, bpftrace that counts stacks by kprobe or by fentry; and
with a bpftrace program that reads the refcounts and judges nothing.  The passes are interleaved,
and of each measurement the median over the passes counts.  bpftrace is Debian's, in an image of the
guest's root that has it besides, which the first run makes.  Under TCG, without KVM, all times are
many times those of a real machine; the ratios are a rough guide there, too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from tabulate import tabulate

from vm import cache, root
from vm.exercise import Exercise
from vm.machine import Machine
from vm.trace import Trace

#: Orders of the blocks; the refcounts of all pages of a block are read.
ORDERS = (0, 4, 9, 10)
ROUNDS_UNTRACED = 100_000
#: All events of a pass have to fit into the buffer of who shows lines: one that is lost costs less.
ROUNDS = 1000
PASSES = 3
#: What the guest has besides.
_PACKAGES = ("bpftrace",)


def _bpftrace(program: str) -> tuple[str, ...]:
    """The command that runs it; bpftrace says on stderr that it has attached."""
    return ("sh", "-c", 'exec bpftrace -e "$1" 2>&1', "sh", program)


#: What is on meanwhile.
TRACED: dict[str, tuple[str, ...]] = {
    "stacks, kprobe": _bpftrace("kprobe:kho_preserve_pages { @[kstack] = count(); }"),
    "stacks, fentry": _bpftrace("fentry:kho_preserve_pages { @[kstack] = count(); }"),
    "refcounts alone": _bpftrace(Path(__file__).with_name("read_refcounts.bt").read_text()),
    "--check": ("khoscope", "trace", "--check"),
    "lines": ("khoscope", "trace"),
}


def measure(kernel: str, passes: int) -> dict[tuple[str, int], float]:
    """Nanoseconds per call, by what is on (``untraced``: nothing) and order."""
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with Machine(kernel, root=_root()) as machine:
        exercise = Exercise(machine)
        exercise.load()
        print(f"{machine.kernel.name}, {machine.accel}", file=sys.stderr)

        def take(how: str, rounds: int) -> None:
            for order in ORDERS:
                # The first rounds find cold caches, and the tree without its nodes.
                exercise.time(order, rounds // 10)
                timing = exercise.time(order, rounds, timeout=300)
                times[how, order].append(timing.preserve_ns)
            print(f"{how}: {[round(times[how, o][-1]) for o in ORDERS]}", file=sys.stderr)

        for number in range(passes):
            take("untraced", ROUNDS_UNTRACED)
            for i, (how, command) in enumerate(TRACED.items()):
                with Trace(machine, f"{number}-{i}", command=command) as trace:
                    take(how, ROUNDS)
                if trace.status or (command[0] == "sh" and not _saw_all(trace.output())):
                    raise SystemExit(f"{how}:\n{trace.output()}{trace.errors()}")
    return {key: median(values) for key, values in times.items()}


def _root() -> Path:
    if found := root.find(_PACKAGES):
        return found
    with cache.locked():
        return root.build(_PACKAGES)


def _saw_all(said: str) -> bool:
    """Whether bpftrace, by what it has printed, was on in every call that was timed."""
    counts = map(int, re.findall(r"^(?:@calls|\]): (\d+)$", said, re.MULTILINE))
    return sum(counts) == len(ORDERS) * (ROUNDS + ROUNDS // 10)


def table(times: dict[tuple[str, int], float]) -> str:
    """As Markdown: how many times as long as a call that is not traced, and aims."""
    rows = []
    for order in ORDERS:
        untraced = times["untraced", order]
        fewest = min(times["stacks, kprobe", order], times["stacks, fentry", order])
        check = times["--check", order]
        rows.append(
            [
                order,
                f"{1 << order:,}",
                f"{untraced:,.0f}",
                *(f"{times[how, order] / untraced:.1f} ×" for how in TRACED),
                f"{(check - untraced) / (fewest - untraced):.1f} ×",
                f"{(check - untraced) / (times['refcounts alone', order] - untraced):.1f} ×",
            ]
        )
    headers = ["order", "pages", "untraced, ns", *TRACED]
    headers += ["--check / stacks", "--check / refcounts"]
    return tabulate(rows, headers, tablefmt="github", colalign=("right",) * len(headers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", default="7.2-fixed")
    parser.add_argument("--passes", type=int, default=PASSES)
    args = parser.parse_args()
    print(table(measure(args.kernel, args.passes)))


if __name__ == "__main__":
    main()
