# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How fast a big tree is read: 1 TiB preserved in 4 KiB blocks, 8,192 leaves.

The tree is synthetic and served by a drgn memory callback; no such memory is needed.  Everything
is measured in one run, and what counts are the ratios.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from drgn import Architecture, Platform, Program
from tabulate import tabulate

from khoscope.abi.keys import Abi
from khoscope.sources.walk import walk

ABI = Abi.for_page_shift(12)
BLOCKS = (1 << 40) >> ABI.page_shift
LEAVES = BLOCKS >> ABI.bitmap_size_log2
ROOT = 1 << 41
RAM = np.array([[0, 1 << 42]], np.uint64)
PLAIN_SHARE = 100


def build() -> tuple[Program, list[int]]:
    """A program whose memory holds the tree, and the addresses of its nodes."""
    size = ABI.page_size
    first_key = ABI.kho_radix_encode_key(0, 0)
    levels: dict[int, dict[int, int]] = {0: {}}
    at = ROOT + size
    for leaf in range(LEAVES):
        levels[0][first_key + (leaf << ABI.bitmap_size_log2)] = at
        at += size
    tables: dict[int, np.ndarray[tuple[int], np.dtype[np.uint64]]] = {}
    for level in range(1, ABI.tree_max_depth):
        levels[level] = {}
        shift = ABI.table_shift(level)
        for key, node in levels[level - 1].items():
            base = key >> (shift + ABI.table_size_log2) << (shift + ABI.table_size_log2)
            if base not in levels[level]:
                top = level == ABI.tree_max_depth - 1
                levels[level][base] = ROOT if top else at
                tables[levels[level][base]] = np.zeros(ABI.table_entries, np.uint64)
                at += 0 if top else size
            index = key >> shift & (ABI.table_entries - 1)
            tables[levels[level][base]][index] = node
    memory = np.full(at - ROOT, 0xFF, np.uint8)
    for address, table in tables.items():
        memory[address - ROOT : address - ROOT + size] = table.view(np.uint8)
    raw = memory.tobytes()

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        del address, physical
        return raw[offset : offset + count]

    prog = Program(Platform(Architecture.X86_64))
    prog.add_memory_segment(ROOT, len(raw), lambda a, n, o, p: read(a, n, a - ROOT, p), True)
    return prog, sorted([*levels[0].values(), *tables])


def timed(what: Callable[[], object]) -> float:
    """Seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    prog, nodes = build()

    def read(address: int, size: int) -> bytes:
        return prog.read(address, size, physical=True)

    def bare() -> None:
        # The same bytes in the same pieces of up to 1 MiB.
        for address in range(nodes[0], nodes[-1] + 1, 1 << 20):
            read(address, min(1 << 20, nodes[-1] + ABI.page_size - address))

    def totals() -> None:
        found = walk(ABI, ROOT, RAM, read).totals(ABI)
        if found != {(0, -1): BLOCKS}:
            raise SystemExit(f"wrong totals: {found}")

    def columns() -> None:
        found = sum(len(chunk) for chunk in walk(ABI, ROOT, RAM, read).blocks(ABI))
        if found != BLOCKS:
            raise SystemExit(f"wrong number of blocks: {found}")

    def write() -> None:
        # Chunk by chunk, each held until the next is there, as one who iterates holds them.
        held = np.zeros(0, np.uint64)
        for i in range(0, BLOCKS, ABI.leaf_bits):
            held = np.arange(i, i + ABI.leaf_bits, dtype=np.uint64)
        del held

    def plain() -> None:
        """Bit by bit, as one would write it down from the kernel's loop."""
        found = []
        for i in range(LEAVES // PLAIN_SHARE):
            leaf = read(nodes[0] + ABI.page_size * (i + 1), ABI.page_size)
            base = ABI.kho_radix_encode_key(0, 0) + (i << ABI.bitmap_size_log2)
            for bit in range(ABI.leaf_bits):
                if leaf[bit >> 3] >> (bit & 7) & 1:
                    key = base | bit
                    order = ABI.order_0_log2 - (key.bit_length() - 1)
                    found.append((key << (ABI.page_shift + order) & (1 << 64) - 1, order))
            found.clear()

    seconds = {
        "bare read of the nodes": timed(bare),
        "tree totals": timed(totals),
        "bare write of as many u64": timed(write),
        "tree as columns": timed(columns),
    }
    start = time.perf_counter()
    plain()
    share = (LEAVES // PLAIN_SHARE) / LEAVES
    seconds["plain walk, bit by bit (scaled)"] = (time.perf_counter() - start) / share
    slow = seconds["plain walk, bit by bit (scaled)"]
    rows = [
        ["bare read of the nodes", seconds["bare read of the nodes"], ""],
        [
            "tree totals",
            seconds["tree totals"],
            f"{seconds['tree totals'] / seconds['bare read of the nodes']:.1f} × bare read, "
            f"plain / {slow / seconds['tree totals']:.0f}",
        ],
        ["bare write of as many u64", seconds["bare write of as many u64"], ""],
        [
            "tree as columns, chunk by chunk",
            seconds["tree as columns"],
            f"{seconds['tree as columns'] / seconds['bare write of as many u64']:.1f} × bare "
            f"write, plain / {slow / seconds['tree as columns']:.0f}",
        ],
        ["plain walk, bit by bit (1 % scaled)", slow, ""],
    ]
    print(f"{BLOCKS:,} blocks of 4 KiB in {LEAVES:,} leaves")
    print(tabulate(rows, ["", "seconds", "ratio"], floatfmt=".4f"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1024:.0f} MiB; {machine()}")


def machine() -> str:
    """The processor, for the record."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{os.cpu_count()} × {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} × {platform.processor()}"


if __name__ == "__main__":
    main()
