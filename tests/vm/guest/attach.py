# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaches and detaches again and again, in the guest; prints what was left behind each time."""

from __future__ import annotations

import ctypes
import json
import re
import time
from pathlib import Path
from typing import Any

from khoscope.facts.calls import NUMBERS
from khoscope.sources.kernel import KernelSource
from khoscope.sources.open import open_live
from khoscope.trace.call_filter import CallFilter
from khoscope.trace.probes import Probes

#: Cycles of some functions of one compiled program.
AGAIN = 48
SOME = ("kho_preserve_pages", "kho_radix_add_page")

LISTS = [
    Path("/sys/kernel/tracing/kprobe_events"),
    Path("/sys/kernel/tracing/enabled_functions"),
    Path("/sys/kernel/debug/kprobes/list"),
]

# BPF_PROG_GET_NEXT_ID of bpf(2), and its number on x86-64.
_NR_BPF, _GET_NEXT_ID = 321, 11


def programs() -> int:
    """How many BPF programs the kernel holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = (ctypes.c_uint32 * 3)()
    count = 0
    while libc.syscall(_NR_BPF, _GET_NEXT_ID, attributes, ctypes.sizeof(attributes)) == 0:
        attributes[0] = attributes[1]
        count += 1
    if ctypes.get_errno() != 2:  # ENOENT: that was the last one
        raise OSError(ctypes.get_errno(), "BPF_PROG_GET_NEXT_ID")
    return count


def traced() -> int:
    """How many functions of KHO something is attached to, by all that the kernel says of it."""
    lines = [line for file in LISTS for line in file.read_text().splitlines()]
    return sum(any(re.search(rf"\b{name}\b", line) for name in NUMBERS) for line in lines)


def left() -> list[int]:
    """Functions and programs that stay; a program goes when nobody can be running it any more."""
    deadline = time.monotonic() + 20
    while (now := [traced(), programs()]) != [0, 0] and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def main() -> None:
    seen: dict[str, Any] = {"before": left(), "on": [], "full": [], "again": []}
    source = KernelSource(open_live(), "live kernel", True)
    with Probes(source, CallFilter(), "fentry"):
        seen["on"].append([traced(), programs()])
    seen["full"].append(left())
    with Probes(source, CallFilter(), "kprobe") as probes:
        seen["on"].append([traced(), programs()])
        bpf = probes._bpf
        for name in probes.attached:
            bpf.detach_kprobe(event=name, fn_name=f"enter_{name}")
            bpf.detach_kretprobe(event=name, fn_name=f"leave_{name}")
        for _ in range(AGAIN):
            for name in SOME:
                bpf.attach_kretprobe(event=name, fn_name=f"leave_{name}")
                bpf.attach_kprobe(event=name, fn_name=f"enter_{name}")
            seen["on"].append([traced(), programs()])
            for name in SOME:
                bpf.detach_kprobe(event=name, fn_name=f"enter_{name}")
                bpf.detach_kretprobe(event=name, fn_name=f"leave_{name}")
            seen["again"].append(traced())
    seen["full"].append(left())
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
