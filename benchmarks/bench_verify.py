# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long ``verify`` takes for preserved memory, against the bare read of its struct pages.

Struct pages and tree are made up. The struct pages lie in an ELF core, which drgn reads; that core
is sparse and repeats itself. All times are of the processor, and of one run: what counts are the
ratios.

    python -m benchmarks.bench_verify [millions of pages …]
"""

from __future__ import annotations

import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from drgn import FaultError, Program
from tabulate import tabulate

from benchmarks.bench_tree import machine
from khoscope.abi.keys import U64, Abi
from khoscope.checks.run import check, compare
from khoscope.facts import store
from khoscope.facts.columns import Blocks, Leaves
from khoscope.facts.snapshot import Handover
from khoscope.facts.tree import Tree, TreeState
from khoscope.sources.pages import WINDOW, PageReader
from tests.synthetic import FIXED, snapshot
from tests.test_pages import LAYOUT, NO_PAGE_TYPE, STRUCT_PAGE

MILLION: Final = 1 << 20
#: Of which the core repeats the struct pages.
PERIOD: Final = MILLION
#: By default; more with arguments.
SIZES: Final = (1, 4, 16)
MOST: Final = 10
CONTIG: Final = 1


@dataclass(frozen=True)
class Shape:
    """
    How memory is cut into blocks, over and over.

    :param order: of each block in a period.
    :param split: whether it is preserved split.
    """

    name: str
    order: U64
    split: U64


def shapes() -> Iterator[Shape]:
    for order in (0, 9):
        of = np.full(PERIOD >> order, order, np.uint64)
        yield Shape(f"order {order}", of, np.zeros(len(of), np.uint64))
    # Each region of the highest order is cut into blocks of a random one: as much memory of each.
    random = np.random.default_rng(1)
    each = random.integers(0, MOST + 1, PERIOD >> MOST).astype(np.uint64)
    of = np.repeat(each, (np.uint64(1) << np.uint64(MOST) - each).astype(np.int64))
    yield Shape("mix", of, random.integers(0, 2, len(of)).astype(np.uint64))


def struct_pages(shape: Shape) -> bytes:
    """Those of one period: in use, contig or split."""
    pages = np.zeros(PERIOD, STRUCT_PAGE)
    pages["page_type"] = NO_PAGE_TYPE
    pages["info"], pages["prev"] = 0xDEAD000000000100, 0xDEAD000000000122
    count = np.uint64(1) << shape.order
    start = np.cumsum(count) - count
    pages["refcount"] = np.repeat(shape.split, count.astype(np.int64))
    pages["refcount"][start.astype(np.int64)] = 1
    return pages.tobytes()


def core(directory: Path, raw: bytes, pages: int) -> Path:
    """An ELF core with struct pages for all of memory, and one more that belongs to nobody."""
    path, size = directory / "core", pages * LAYOUT.size
    count = -(-size // len(raw))
    at = -(-(64 + 56 * (count + 1)) // 4096) * 4096
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 4, 62, 1, 0, 64, 0, 0, 64, 56, count + 1, 0, 0, 0),
    )
    loads = [
        struct.pack("<IIQQQQQQ", 1, 4, at, LAYOUT.vmemmap + i * len(raw), 0, len(raw), len(raw), 1)
        for i in range(count)
    ]
    loads.append(struct.pack("<IIQQQQQQ", 1, 4, at, LAYOUT.vmemmap + size, 0, 64, 64, 1))
    path.write_bytes((header + b"".join(loads)).ljust(at, b"\0") + raw)
    return path


def leaves(abi: Abi, shape: Shape, pages: int) -> list[Leaves]:
    """The leaves of the tree that preserves all of memory."""
    count = np.uint64(1) << shape.order
    start = np.cumsum(count) - count
    first = np.concatenate([start + np.uint64(at) for at in range(0, pages, PERIOD)])
    order, split = (np.tile(each, pages // PERIOD) for each in (shape.order, shape.split))
    found: dict[int, Leaves] = {}
    for kind in range(2 * (MOST + 1)):
        mine = (order == kind >> 1) & (split == kind & 1)
        if not mine.any():
            continue
        phys = first[mine] << np.uint64(abi.page_shift)
        keys = abi.kho_radix_encode_keys(phys, kind >> 1, kind & 1)
        low = np.uint64(abi.leaf_bits - 1)
        # They are sorted.
        for here in np.split(keys, np.flatnonzero(np.diff(keys & ~low)) + 1):
            bits = np.zeros(abi.leaf_bits, np.uint8)
            bits[(here & low).astype(np.int64)] = 1
            key = here[:1] & ~low
            found[int(key[0])] = Leaves(key, np.packbits(bits, bitorder="little").reshape(1, -1))
    return [found[key] for key in sorted(found)]


def cpu(work: Callable[[], object]) -> float:
    """Seconds of the processor, the best of two."""
    took = []
    for _ in range(2):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def memory(work: Callable[[], object]) -> float:
    """MiB that it takes at most, beyond what was there before."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    # VmHWM begins anew (Documentation/filesystems/proc.rst).
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    work()
    return (read("VmHWM") - before) / 1024


class Stream:
    """Blocks with the facts of their struct pages, read anew whenever somebody asks."""

    def __init__(self, make: Callable[[], Iterator[Blocks]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Blocks]:
        return self.make()


def measure(shape: Shape, millions: int, directory: Path) -> list[object]:
    pages, abi = millions * MILLION, FIXED
    prog = Program()
    prog.set_core_dump(core(directory, struct_pages(shape), pages))
    looked = 0

    def read(address: int, size: int) -> bytes | None:
        nonlocal looked
        looked += size
        try:
            return prog.read(address, size)
        except FaultError:
            return None

    tree = Tree(TreeState(0x1000), leaves=leaves(abi, shape, pages))
    reader = PageReader(abi, LAYOUT, read, pages)
    blocks = sum(map(len, tree.blocks(abi)))

    def bare() -> None:
        for pfn in range(0, pages, WINDOW):
            prog.read(LAYOUT.vmemmap + pfn * LAYOUT.size, WINDOW * LAYOUT.size)

    stream = Stream(lambda: map(reader.with_pages, tree.by_address(abi)))
    facts = snapshot(abi, [], ram=((0, pages << abi.page_shift),), scratch=[(0, 0)])
    facts = replace(facts, outgoing=replace(facts.outgoing, tree=tree, blocks=stream))

    def all_facts() -> None:
        if sum(map(len, stream)) != blocks:
            raise SystemExit("blocks are missing")

    def verify() -> None:
        report = check(facts)
        if report.blocks != blocks or report.errors:
            raise SystemExit(f"{report.blocks} of {blocks} blocks, {report.counts}")

    # As `khoscope snapshot` reads them: in order of key.
    by_key = Stream(lambda: map(reader.with_pages, tree.blocks(abi)))
    kept = replace(facts, outgoing=replace(facts.outgoing, blocks=by_key))
    saved = directory / "before"

    def save() -> None:
        with saved.open("wb") as file:
            store.save(kept, file)

    def compare_both() -> None:
        """What `verify --before` does: a file is written of this kernel, too."""
        before = store.load_file(saved)
        recorded = before.outgoing.tree
        came, ram = Handover(True, before.kernel.release, 1), ((0, pages << abi.page_shift),)
        now = snapshot(abi, [], handover=came, incoming=[], ram=ram, watched=(before, []))
        now = replace(
            now,
            watched=Stream(lambda: map(reader.with_pages, recorded.blocks(abi))),
            evidence=recorded.leaves,
            stamps=Stream(lambda: reader.stamps(facts.ram, lambda _: None)),
        )
        report = compare(before, store.spool(now))
        if report.fates != {"restored": blocks}:
            raise SystemExit(f"{report.fates} of {blocks} blocks")

    took = cpu(bare)
    looked = 0
    all_facts()
    times = looked / (pages * LAYOUT.size)
    more = memory(verify)
    ratios = [cpu(work) / took for work in (all_facts, verify, save, compare_both)]
    size = saved.stat().st_size
    per_page = [took * 1e9 / pages, *(ratio * took * 1e9 / pages for ratio in ratios)]
    return [
        shape.name,
        f"{millions} M",
        f"{blocks:,}",
        f"{per_page[0]:.1f}",
        *(f"{r:.1f} × ({ns:.0f})" for r, ns in zip(ratios, per_page[1:], strict=True)),
        f"{times:.2f}",
        f"{more:.0f}",
        f"{size / blocks:.2f}",
    ]


def main(sizes: list[int]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for shape in shapes():
            for millions in sizes:
                rows.append(measure(shape, millions, Path(directory)))
    headers = [
        *("memory", "pages", "blocks", "bare read, ns", "facts", "verify", "snapshot", "--before"),
        *("pages read", "memory of verify, MiB", "file, bytes a block"),
    ]
    print(tabulate(rows, headers, colalign=["left", *["right"] * 10], disable_numparse=True))
    print(f"× the bare read (ns a page); {machine()}")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [*SIZES])
