# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long ``verify`` and others take for preserved memory, against the bare read of its struct pages.

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
import tracemalloc
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
from khoscope.facts import diff, store
from khoscope.facts.by_address import by_address
from khoscope.facts.columns import Blocks, ChunkByChunk, Leaves
from khoscope.facts.owners import BlockOwners
from khoscope.facts.snapshot import Handover, Snapshot
from khoscope.facts.status import blocks_by_kind
from khoscope.facts.tree import Tree, TreeState
from khoscope.sources.pages import WINDOW, PageReader
from khoscope.sources.walk import groups
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


def struct_pages(shape: Shape, stamped: bool = False) -> bytes:
    """Those of one period: in use, contig or split; or stamped, and as the boot left them."""
    pages = np.zeros(PERIOD, STRUCT_PAGE)
    pages["page_type"] = NO_PAGE_TYPE
    pages["info"], pages["prev"] = 0xDEAD000000000100, 0xDEAD000000000122
    count = np.uint64(1) << shape.order
    start = np.cumsum(count) - count
    first = start.astype(np.int64)
    if stamped:
        for kind in (0, 1):
            mine = shape.split == kind
            stamps = [FIXED.stamp.encode(order, kind) for order in range(MOST + 1)]
            pages["private"][first[mine]] = np.array(stamps, np.uint64)[shape.order[mine]]
        return pages.tobytes()
    pages["refcount"] = np.repeat(shape.split, count.astype(np.int64))
    pages["refcount"][first] = 1
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
    return groups(Leaves.concatenate(found[key] for key in sorted(found)))


def cpu(work: Callable[[], object]) -> float:
    """Seconds of the processor, the best of two."""
    took = []
    for _ in range(2):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def at_most(work: Callable[[], object]) -> float:
    """MiB of Python and numpy that it takes at most."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / MILLION


class Stream:
    """Blocks with the facts of their struct pages, read anew whenever somebody asks."""

    def __init__(self, make: Callable[[], Iterator[Blocks]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Blocks]:
        return self.make()


class Kernel:
    """
    A kernel all of whose memory is preserved.

    :param raw: the struct pages of one period.
    """

    def __init__(self, shape: Shape, millions: int, directory: Path, raw: bytes) -> None:
        self.pages, self.shape = millions * MILLION, shape
        self.prog = Program()
        self.prog.set_core_dump(core(directory, raw, self.pages))
        self.reader = PageReader(FIXED, LAYOUT, self._read, self.pages)
        #: Bytes of struct pages that were read.
        self.looked = 0
        self.tree = Tree(TreeState(0x1000), leaves=leaves(FIXED, shape, self.pages))
        self.blocks = sum(map(len, self.tree.blocks(FIXED)))
        self.ram = ((0, self.pages << FIXED.page_shift),)

    def _read(self, address: int, size: int) -> bytes | None:
        self.looked += size
        try:
            return self.prog.read(address, size)
        except FaultError:
            return None

    def bare(self) -> None:
        for pfn in range(0, self.pages, WINDOW):
            self.prog.read(LAYOUT.vmemmap + pfn * LAYOUT.size, WINDOW * LAYOUT.size)

    def facts(self) -> Snapshot:
        """As :meth:`KernelSource.judge` has them: read while they are used."""
        stream = Stream(lambda: map(self.reader.with_pages, self.tree.by_address(FIXED)))
        facts = snapshot(FIXED, [], ram=self.ram, scratch=[(0, 0)])
        return replace(facts, outgoing=replace(facts.outgoing, tree=self.tree, blocks=stream))

    def stamps(self, bare: bool) -> Iterator[Blocks]:
        ram = np.array(self.ram, np.uint64)
        return self.reader.stamps(ram, lambda _: None, bare)

    def arrived(self, before: Snapshot) -> tuple[Snapshot, Snapshot]:
        """What came of another one's blocks, and that one, as :meth:`KernelSource.judge` does."""
        blocks = Stream(lambda: by_address(before.outgoing.blocks))
        turned = replace(before, outgoing=replace(before.outgoing, blocks=blocks))
        came = Handover(True, before.kernel.release, 1)
        now = snapshot(FIXED, [], handover=came, incoming=[], ram=self.ram, watched=(before, []))
        return turned, replace(
            now,
            watched=ChunkByChunk(blocks, self.reader.with_pages),
            evidence=before.outgoing.tree.leaves,
            stamps=Stream(lambda: self.stamps(bare=False)),
        )


@dataclass(frozen=True)
class Measured:
    """
    :param ratios: to the bare read, by what was done.
    :param look: how often each struct page was read for ``verify``.
    :param memory: MiB at most, by what was done.
    """

    shape: Shape
    millions: int
    blocks: int
    bare_ns: float
    ratios: dict[str, float]
    look: float
    memory: dict[str, float]
    file_bytes: int


def measure(shape: Shape, millions: int, directory: Path) -> Measured:
    kernel = Kernel(shape, millions, directory, struct_pages(shape))
    facts, saved = kernel.facts(), directory / "before"

    def require(found: object, wanted: object) -> None:
        if found != wanted:
            raise SystemExit(f"{found}, not {wanted}")

    def all_facts() -> None:
        require(sum(map(len, facts.outgoing.blocks)), kernel.blocks)

    def verify() -> None:
        report = check(facts)
        require((report.blocks, report.errors), (kernel.blocks, 0))

    def save() -> None:
        with saved.open("w+b") as file, store.Draft(file) as draft:
            draft.put(facts)
            draft.finish(facts)

    def compare_both() -> None:
        report = compare(*kernel.arrived(store.load_file(saved)))
        require(report.fates, {"restored": kernel.blocks})

    def differ() -> None:
        a, b = store.load_file(saved), store.load_file(saved)
        require(diff.count(diff.blocks(a, b)), {})

    def owners() -> None:
        (total,) = BlockOwners(store.load_file(saved)).totals()
        require(total.blocks, kernel.blocks)

    def search() -> None:
        require([*kernel.stamps(bare=False)], [])

    took = cpu(kernel.bare)
    kernel.looked = 0
    all_facts()
    look = kernel.looked / (kernel.pages * LAYOUT.size)
    works = {
        "facts": all_facts,
        "verify": verify,
        "snapshot": save,
        "--before": compare_both,
        "no stamps": search,
        "diff": differ,
        "owners": owners,
    }
    more = {name: at_most(works[name]) for name in ("verify", "snapshot", "--before", "diff")}
    ratios = {name: cpu(work) / took for name, work in works.items()}
    size = saved.stat().st_size
    stamped = Kernel(shape, millions, directory, struct_pages(shape, stamped=True))

    def status() -> None:
        require(sum(blocks_by_kind(stamped.stamps(bare=True)).values()), kernel.blocks)

    ratios["status"] = cpu(status) / took
    return Measured(
        shape, millions, kernel.blocks, took * 1e9 / kernel.pages, ratios, look, more, size
    )


#: What reads struct pages, and what only reads files of them.
LIVE: Final = ("facts", "verify", "snapshot", "--before", "no stamps", "status")
FILES: Final = ("diff", "owners")


def table(
    every: list[Measured], works: tuple[str, ...], more: dict[str, Callable[[Measured], str]]
) -> str:
    rows = [
        [
            each.shape.name,
            f"{each.millions} M",
            f"{each.blocks:,}",
            f"{each.bare_ns:.1f}",
            *(f"{each.ratios[w]:.1f} × ({each.ratios[w] * each.bare_ns:.0f})" for w in works),
            *(say(each) for say in more.values()),
        ]
        for each in every
    ]
    headers = ["memory", "pages", "blocks", "bare read, ns", *works, *more]
    return tabulate(
        rows, headers, colalign=["left", *["right"] * (len(headers) - 1)], disable_numparse=True
    )


def main(sizes: list[int]) -> None:
    every = []
    with tempfile.TemporaryDirectory() as directory:
        for shape in shapes():
            for millions in sizes:
                every.append(measure(shape, millions, Path(directory)))
    more: dict[str, Callable[[Measured], str]] = {
        "pages read": lambda each: f"{each.look:.2f}",
        "MiB: verify": lambda each: f"{each.memory['verify']:.0f}",
        "snapshot": lambda each: f"{each.memory['snapshot']:.0f}",
        "--before": lambda each: f"{each.memory['--before']:.0f}",
        "diff": lambda each: f"{each.memory['diff']:.0f}",
        "file, bytes a block": lambda each: f"{each.file_bytes / each.blocks:.2f}",
    }
    print(table(every, LIVE, {}))
    print(table(every, FILES, more))
    print(f"× the bare read (ns a page); {machine()}")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [*SIZES])
