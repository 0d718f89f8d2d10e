# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holds a hugetlb folio of each size given in bytes, and prints their physical addresses."""

from __future__ import annotations

import mmap
import signal
import struct
import sys
from pathlib import Path

PAGE = mmap.PAGESIZE
#: mmap(2): MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB; the size is in the bits from here on.
FLAGS = 0x1 | 0x20 | 0x40000
SIZE_SHIFT = 26


def hold(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, FLAGS | (size.bit_length() - 1) << SIZE_SHIFT)
    memory[0] = 1
    return memory


def phys(start: int) -> int:
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(start // PAGE * 8)
        (entry,) = struct.unpack("<Q", pagemap.read(8))
    return int(entry & (1 << 55) - 1) * PAGE


held = [hold(int(size)) for size in sys.argv[1:]]
maps = Path("/proc/self/maps").read_text().splitlines()
spans = [line.split()[0].split("-") for line in maps if "hugepage" in line]
found = {int(end, 16) - int(start, 16): phys(int(start, 16)) for start, end in spans}
print(*(found[int(size)] for size in sys.argv[1:]), flush=True)
signal.pause()
