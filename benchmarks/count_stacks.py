# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Count the kernel stacks of kho_preserve_pages(), in a guest, until Ctrl-C:

    python3 count_stacks.py kprobe|fentry

It does what ``bpftrace -e 'kprobe:kho_preserve_pages { @[kstack] = count(); }'`` does.
"""

from __future__ import annotations

import signal
import sys

from bcc import BPF  # type: ignore[import-not-found]

BEGIN = {
    "kprobe": "int enter(struct pt_regs *ctx)",
    "fentry": "KFUNC_PROBE(kho_preserve_pages)",
}
SOURCE = """
#include <uapi/linux/ptrace.h>

BPF_STACK_TRACE(stacks, 4096);
BPF_HASH(counts, int, u64);

BEGIN
{
	counts.increment(stacks.get_stackid(ctx, 0));
	return 0;
}
"""

how = sys.argv[1]
bpf = BPF(text=SOURCE.replace("BEGIN", BEGIN[how]))
if how == "kprobe":
    bpf.attach_kprobe(event="kho_preserve_pages", fn_name="enter")
signal.signal(signal.SIGINT, lambda number, frame: None)
print("on", flush=True)
signal.pause()
print({key.value: value.value for key, value in bpf["counts"].items()})
