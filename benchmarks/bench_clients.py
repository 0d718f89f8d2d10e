# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long what KHO's clients hand over takes, in units of which a kernel decides how many there are.

Memory and types are made up, and served to drgn by callbacks, whose time counts, too. Each row is
measured at two sizes: the time of a unit must not grow with their number.

    python -m benchmarks.bench_clients
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from drgn import sizeof
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.bench_tree import machine as processor
from benchmarks.bench_verify import cpu
from khoscope.abi.keys import U64
from khoscope.abi.kho_fdt import Fdt
from khoscope.abi.serialized import (
    KHO_BLOCK_HEADER_SER,
    KHO_VMALLOC,
    LUO_COMPATIBLE,
    LUO_FILE_SER,
    LUO_SER,
    LUO_SESSION_SER,
    MEMFD_LUO_SER,
)
from khoscope.checks import RULES, check
from khoscope.checks.rule import Marked, Message
from khoscope.checks.run import Report
from khoscope.facts import store
from khoscope.facts.clients import Claims, Owner, OwnerKind
from khoscope.facts.columns import CHUNK_BLOCKS, Leaves
from khoscope.facts.owners import Owners, shared
from khoscope.facts.snapshot import Snapshot
from khoscope.facts.tree import KeySet, Tree, TreeState
from khoscope.sources.clients import Where, with_vm_structs
from khoscope.sources.follow import ClientWalker
from khoscope.sources.luo import Serialized
from khoscope.sources.walk import groups, settle
from khoscope.views.luo import LuoText
from tests.made_up import DATA, DIRECT_MAP, RAM, VMEMMAP, MadeUp, mapped
from tests.synthetic import FIXED, PLAIN, Block, columns, snapshot
from tests.test_fdt import blob
from tests.test_fdt import data as node

PAGE: Final = 4096
#: Where memory of clients begins.
BASE: Final = 1 << 32
#: Bytes of each page that hold anything.
KEPT: Final = 64
#: Bytes of a ``struct luo_file`` and what kmalloc adds to it.
SLOT: Final = 128


class Sparse:
    """Pages of which only the first bytes hold anything."""

    def __init__(self, base: int, pages: int) -> None:
        self.base = base
        self.head = np.zeros((pages, KEPT // 8), np.uint64)

    def read(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        first, skip = divmod(offset, PAGE)
        if skip + count <= KEPT:
            return self.head[first].tobytes()[skip : skip + count]
        end = -(-(offset + count) // PAGE)
        raw = np.zeros((end - first, PAGE // 8), np.uint64)
        raw[:, : KEPT // 8] = self.head[first:end]
        return raw.tobytes()[skip : skip + count]


@dataclass
class Session:
    """A kernel with a session of memfds of a page each, and what it will hand over."""

    machine: MadeUp
    #: ``phys_addr_t`` of its ``struct luo_session_ser``'s block.
    head: int


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


def session(files: int) -> Session:
    machine = MadeUp()
    per_block = (PAGE - KHO_BLOCK_HEADER_SER.itemsize) // LUO_FILE_SER.itemsize
    blocks = -(-files // per_block)
    # Of each file: its memfd_luo_ser, a chunk, the list of folios, and its page.
    sparse = Sparse(BASE, 4 * files)
    ser = BASE + 4 * PAGE * np.arange(files, dtype=np.uint64)
    head = sparse.head.reshape(files, 4, -1)
    desc = np.array([(0, 1, 1, 0)], KHO_VMALLOC).view(np.uint64)
    head[:, 0, 1] = PAGE
    head[:, 0, 3] = 1
    head[:, 0, 4] = ser + np.uint64(PAGE)
    head[:, 0, 5] = desc[1]
    head[:, 1, 1] = ser + np.uint64(2 * PAGE)
    head[:, 2, 0] = (ser >> np.uint64(12)) + np.uint64(3)
    assert MEMFD_LUO_SER.itemsize == 48
    # The blocks, written as at the kexec, and the block of sessions in front of them.
    lists = BASE + 4 * PAGE * files
    raw = np.zeros((blocks + 1, PAGE), np.uint8)
    words = raw.view(np.uint64)
    words[0, 1] = 1
    raw[0, 16:96] = np.frombuffer(
        np.array([(b"vm", lists + PAGE, files)], LUO_SESSION_SER).tobytes(), np.uint8
    )
    words[1:-1, 0] = lists + PAGE * np.arange(2, blocks + 1, dtype=np.uint64)
    entries = np.zeros(files, LUO_FILE_SER)
    entries["compatible"], entries["data"], entries["token"] = b"memfd-v2", ser, np.arange(files)
    for block in range(blocks):
        part = entries[block * per_block : (block + 1) * per_block]
        words[block + 1, 1] = len(part)
        raw[block + 1, 16 : 16 + part.nbytes] = np.frombuffer(part.tobytes(), np.uint8)
    listed = raw.tobytes()
    # The same as the kernel's own lists.
    structs = lists + len(listed)
    live = np.zeros((files, SLOT // 8), np.uint64)
    at = DIRECT_MAP + structs + SLOT * np.arange(files, dtype=np.uint64)
    (handler,) = machine.handlers("memfd-v2")
    link = 32
    assert sizeof(machine.prog.type("struct luo_file")) == 48
    live[:, 0], live[:, 1], live[:, 2] = handler, np.arange(files), ser
    whose = machine.new(b"vm".ljust(64, b"\0"))
    files_list = whose + 88
    live[:-1, link // 8] = at[1:] + np.uint64(link)
    live[-1, link // 8] = files_list
    machine.words(files_list, int(at[0]) + link, int(at[-1]) + link, lists + PAGE, files)
    outgoing = machine.address("luo_session_global") + 24
    machine.link(outgoing, whose + 72)
    machine.words(outgoing + 16, lists)
    kept = live.tobytes()
    for shift in (0, DIRECT_MAP):
        physical = not shift
        prog = machine.prog
        prog.add_memory_segment(shift + BASE, len(sparse.head) * PAGE, sparse.read, physical)
        for base, data in ((lists, listed), (structs, kept)):
            prog.add_memory_segment(
                shift + base, len(data), lambda _, n, o, __, d=data: d[o : o + n], physical
            )
    machine.ram((0, RAM), (BASE, BASE + (1 << 40)))
    luo = machine.new(np.array([(LUO_COMPATIBLE.encode(), 1, lists, 0)], LUO_SER).tobytes())
    subtrees = {"LUO": node(luo - DIRECT_MAP, LUO_SER.itemsize)}
    fdt = machine.new(blob(subtrees=subtrees))
    machine.set("kho_out", fdt, DIRECT_MAP + machine.memory.root)
    return Session(machine, lists)


@dataclass(frozen=True)
class Row:
    """
    What is measured.

    :param make: what it takes, for so many units, and the work itself; the first is not measured.
    :param aim: microseconds for a unit.
    """

    what: str
    units: str
    sizes: tuple[int, int]
    make: Callable[[int], Callable[[], object]]
    aim: float | None = None


def read_live(files: int) -> Callable[[], object]:
    """The kernel's own list of files, all that they lead to, and whose it is."""
    source = session(files).machine.source()

    def work() -> None:
        luo = source.clients().outgoing.luo
        if luo is None or len(luo.sessions[0].files) != files or luo.sessions[0].problems:
            raise SystemExit("files are missing")

    return work


def read_serialized(files: int) -> Callable[[], object]:
    """What the next kernel finds."""
    made = session(files)
    prog = made.machine.prog

    def work() -> None:
        ram = np.array([(BASE, BASE + (1 << 40))], np.uint64)
        following = ClientWalker(
            PLAIN, ram, lambda at, size: prog.read(at, size, physical=True), keys=KeySet(PLAIN, [])
        )
        (found,) = Serialized(following).sessions(made.head)
        if len(found.files) != files or found.problems:
            raise SystemExit("files are missing")
        following.claims()

    return work


def facts_of(files: int) -> Snapshot:
    return session(files).machine.source().clients()


def rules(files: int) -> Callable[[], object]:
    """All rules; as nothing is preserved, four findings for each file."""
    facts = facts_of(files)
    return lambda: check(facts)


def save(files: int) -> Callable[[], object]:
    facts = facts_of(files)
    return lambda: store.save(facts, io.BytesIO())


def load(files: int) -> Callable[[], object]:
    file = io.BytesIO()
    store.save(facts_of(files), file)
    return lambda: store._load(file, "a snapshot")


def show(files: int) -> Callable[[], object]:
    """``khoscope luo --limit 0``."""
    facts = facts_of(files)
    return lambda: LuoText(io.StringIO(), None).luo(facts)


def chains(pages: int) -> Callable[[], object]:
    """An area of vmalloc, no two of whose pages are neighbours."""
    per_chunk = PAGE // 8 - 1
    chunks = pages // per_chunk + 1
    words = np.zeros((chunks, per_chunk + 1), np.uint64)
    words[:-1, 0] = BASE + PAGE * np.arange(1, chunks, dtype=np.uint64)
    listed = np.zeros(chunks * per_chunk, np.uint64)
    listed[:pages] = BASE + PAGE * (chunks + 2 * np.arange(pages, dtype=np.uint64))
    words[:, 1:] = listed.reshape(chunks, per_chunk)
    raw = words.tobytes()
    desc = np.array([(BASE, pages, 1, 0)], KHO_VMALLOC)[0]

    def work() -> None:
        ram = np.array([(BASE, BASE + (1 << 40))], np.uint64)
        following = ClientWalker(PLAIN, ram, lambda at, n: raw[at - BASE : at - BASE + n])
        area, _ = following.vmalloc(desc, 0, Owner(OwnerKind.FILE, "a"))
        if area.problems or sum(map(len, following.claims())) < pages:
            raise SystemExit("pages are missing")

    return work


def vm_structs(pages: int) -> Callable[[], object]:
    """Areas of four pages by 256 callers, all preserved."""
    machine, areas = MadeUp(), pages // 4
    link = np.arange(areas, dtype=np.uint64)
    # struct vmap_area, struct vm_struct and the array of pages of each area, one after the other.
    raw = np.zeros((areas, 16), np.uint64)
    at = DIRECT_MAP + BASE + np.uint64(raw[0].nbytes) * link
    head = machine.address("vmap_area_list")
    raw[:, 0] = np.append(at[1:], np.uint64(head))
    raw[:, 2] = at + np.uint64(24)
    raw[:, 3] = DATA + 16 * (link % 256)
    raw[:, 4], raw[:, 5] = 4, 4 * PAGE
    raw[:, 6] = at + np.uint64(64)
    pfn = (BASE >> 12) + np.arange(pages, dtype=np.uint64)
    raw[:, 8:12] = (VMEMMAP + np.uint64(sizeof(machine.prog.type("struct page"))) * pfn).reshape(
        -1, 4
    )
    data = raw.tobytes()
    machine.words(head, int(at[0]), int(at[-1]))
    machine.prog.add_memory_segment(
        DIRECT_MAP + BASE, len(data), lambda _, n, offset, __: data[offset : offset + n]
    )
    source = machine.source()
    side = replace(snapshot(PLAIN, []).outgoing, tree=preserved(pages))
    ram = np.array([(0, 1 << 40)], np.uint64)
    where = Where(machine.prog, source._parts, PLAIN, ram, lambda *_: None, False)

    def work() -> None:
        found, unread = with_vm_structs(where, source.layout.pages, side)
        if unread or len(found.owners) != 256:
            raise SystemExit(f"{len(found.owners)} owners, {unread}")

    return work


def preserved(pages: int) -> Tree:
    """A tree that holds so many single pages from BASE on."""
    pfn = (BASE >> 12) + np.arange(0, pages, PLAIN.leaf_bits, dtype=np.uint64)
    bitmap = np.full((len(pfn), PAGE), 255, np.uint8)
    keys = PLAIN.kho_radix_encode_keys(pfn << np.uint64(12), 0, 0)
    return Tree(TreeState(0x1000), leaves=groups(Leaves(keys, bitmap)))


def claimed(number: int) -> tuple[Snapshot, U64, NDArray[np.uint32]]:
    """A kernel with so many claims of a thousand owners, the pages and whose they are."""
    owners = [Owner(OwnerKind.FILE, str(each)) for each in range(1000)]
    phys = BASE + 2 * PAGE * np.arange(number, dtype=np.uint64)
    whose = np.random.default_rng(1).integers(0, 1000, number).astype(np.uint32)
    every = Claims(phys, np.full(number, PAGE, np.uint64), whose)
    facts = snapshot(PLAIN, [])
    side = replace(
        facts.outgoing, owners=owners, claims=[every], tree=preserved(2 * number), fdt=Fdt(0)
    )
    return replace(facts, outgoing=side), phys, whose


def in_tree(number: int) -> Callable[[], object]:
    """Whether all that is claimed is preserved."""
    facts, _, _ = claimed(number)
    keys = KeySet(PLAIN, facts.outgoing.tree.leaves)
    find = RULES["blob-not-preserved"].finders["clients"]

    def work() -> None:
        if list(find(facts, keys)):
            raise SystemExit("a claim is not in the tree")

    return work


def claims(number: int) -> Callable[[], object]:
    """Who has each page, and what two have."""
    facts, phys, whose = claimed(number)
    side = facts.outgoing

    def work() -> None:
        found = Owners.of_side(side, 12).at(phys, phys + np.uint64(PAGE))
        if (found != whose).any() or shared(side, 12):
            raise SystemExit("a claim is another's")

    return work


def findings(number: int) -> Callable[[], object]:
    """As many blocks and messages in which rules find something, in chunks of a leaf."""
    blocks = columns(FIXED, [Block(PAGE, 0)])[np.zeros(CHUNK_BLOCKS, np.int64)]
    everything = Marked(np.ones(len(blocks), np.bool_), lambda row: f"block {row} is odd")

    def work() -> None:
        report = Report()
        for _ in range(number // CHUNK_BLOCKS):
            report.add_marked(RULES["mixed-refcounts"], blocks, everything)
        report.add_messages(RULES["broken-luo"], (Message(f"{n}") for n in range(number)))
        if report.errors < number:
            raise SystemExit("findings are missing")

    return work


def settled(leaves: int) -> Callable[[], object]:
    """A tree with a bit in each leaf, read twice."""
    bitmap = np.zeros((leaves, PAGE), np.uint8)
    bitmap[:, 7] = 1
    first = PLAIN.kho_radix_encode_key(0, 0)
    key = first + np.uint64(PLAIN.leaf_bits) * np.arange(leaves, dtype=np.uint64)

    def walk_once() -> Tree:
        # As a walk does: what it has read is its own.
        return Tree(TreeState(0x1000), leaves=groups(Leaves(key, bitmap.copy())))

    return lambda: settle(walk_once, lambda _: None)


def overlapping(leaves: int) -> Callable[[], object]:
    """A tree with a bit in each leaf, of all orders of the page allocator, each in its own area."""
    bitmap = np.zeros((leaves, PAGE), np.uint8)
    bitmap[:, 0] = 1
    orders = PLAIN.max_page_order + 1
    span = np.arange(leaves // orders, dtype=np.uint64) * np.uint64(PLAIN.leaf_bits * PAGE)
    keys = [
        PLAIN.kho_radix_encode_keys(np.uint64(order << 48) + (span << np.uint64(order)), order, 0)
        for order in reversed(range(orders))
    ]
    every = np.concatenate(keys)
    facts = snapshot(PLAIN, [])
    tree = KeySet(PLAIN, groups(Leaves(every, bitmap[: len(every)])))
    find = RULES["overlap"].finders["tree"]

    def work() -> None:
        if list(find(facts, tree)):
            raise SystemExit("none of them overlap")

    return work


ROWS: Final = (
    Row("LUO, the kernel's own lists", "files", (25_000, 100_000), read_live, 40),
    Row("LUO, serialized", "files", (25_000, 100_000), read_serialized, 40),
    Row("LUO, all rules", "files", (25_000, 100_000), rules),
    Row("LUO, written to a snapshot", "files", (25_000, 100_000), save),
    Row("LUO, read from a snapshot", "files", (25_000, 100_000), load),
    Row("`luo --limit 0`", "files", (25_000, 100_000), show),
    Row("vm_structs", "pages", (1 << 18, 1 << 20), vm_structs),
    Row("vmalloc chains", "pages", (1 << 18, 1 << 20), chains),
    Row("claims", "claims", (1 << 18, 1 << 20), claims),
    Row("claims, in the tree?", "claims", (1 << 18, 1 << 20), in_tree),
    Row("findings", "findings", (1 << 18, 1 << 20), findings),
    Row("settle()", "leaves", (1 << 13, 1 << 15), settled),
    Row("overlap, of all orders", "leaves", (1 << 13, 1 << 15), overlapping),
)


def measure(row: Row) -> list[object]:
    per_unit = []
    for size in row.sizes:
        work = row.make(size)
        more = memory(work)
        per_unit.append(cpu(work) * 1e6 / size)
    return [
        row.what,
        " and ".join(f"{size:,}" for size in row.sizes) + f" {row.units}",
        *(f"{each:.2f}" for each in per_unit),
        f"{per_unit[1] / per_unit[0]:.2f}",
        "" if row.aim is None else f"{row.aim:g}",
        f"{more:.0f}",
    ]


def main() -> None:
    # Each in a process of its own: what one has freed, another one would take for nothing.
    fork = multiprocessing.get_context("fork")
    with (
        pytest.MonkeyPatch.context() as patch,
        mapped(patch),
        fork.Pool(1, maxtasksperchild=1) as pool,
    ):
        rows = pool.map(measure, ROWS, chunksize=1)
    headers = ["what", "units", "µs a unit", "and", "ratio", "aim", "memory, MiB"]
    print(tabulate(rows, headers, colalign=["left", "left", *["right"] * 5], disable_numparse=True))
    print(processor())


if __name__ == "__main__":
    main()
