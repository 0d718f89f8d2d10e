# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How often a folio that was freed is taken for one that was restored as pages, on a busy guest.

    python -m benchmarks.restored_as_pages [KERNEL]

Folios go across a kexec, are restored as folios and freed; others are restored as pages.  Then the
guest allocates memory page by page, of several kinds and in turn, and of each folio it is asked
what the memory alone says: each page held once; no flag, page type or mapping, either; each page as
the boot left it, which is what ``verify`` goes by.  The first and the second are often wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from drgn import Program
from numpy.typing import NDArray
from tabulate import tabulate

from khoscope import checks
from khoscope.facts import store
from khoscope.facts.columns import Blocks
from khoscope.sources.open import open_qemu
from khoscope.sources.pages import PageLayout, StructPages
from khoscope.sources.probe import page_layout
from vm.exercise import Exercise, by_scenario
from vm.job import Job
from vm.machine import REPOSITORY, Machine

#: Folios that are freed, a quarter of them single pages, and folios that are restored as pages.
FREED, AS_PAGES = 2000, 400
PAGE_SHIFT = 12

#: What runs in the guest: it takes pages until the number is reached or memory is short, says so,
#: and keeps them until it is ended.
LOAD = """
import mmap, os, random, resource, signal, sys, threading
what, number = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
held = []
def short():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemFree")) < 80 << 10
def pipes():
    for n in range(number):
        held.append(os.pipe())
        os.set_blocking(held[-1][1], False)
        os.write(held[-1][1], bytes(65536))
        if n % 64 == 0 and short():
            break
if what == "pipes":
    pipes()
elif what == "pipes that come and go":
    for _ in range(3):
        pipes()
        random.Random(1).shuffle(held)
        while len(held) > number // 2:
            for end in held.pop():
                os.close(end)
elif what == "anonymous memory":
    held.append(mmap.mmap(-1, number << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    held[0].madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, number << 20, 4096):
        held[0][at] = 1
elif what == "files":
    for n in range(number):
        with open(f"/root/file-{n}", "wb") as file:
            file.write(bytes([1]) * (1 << 20))
elif what == "threads":
    threading.stack_size(65536)
    for _ in range(number):
        threading.Thread(target=signal.pause, daemon=True).start()
print("on", flush=True)
signal.pause()
"""
LOADS = {
    "pipes": 6000,
    "pipes that come and go": 3000,
    "anonymous memory": 500,
    "files": 250,
    "threads": 1500,
    "pipes, once more": 8000,
}


class Run:
    """A guest with its folios."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.exercise = Exercise(machine)
        self.before = machine.directory / "before.khosnap"
        self.freed: set[int] = set()
        self.as_pages: set[int] = set()

    def across(self) -> None:
        """Through the kexec, until all is restored."""
        self.exercise.load()
        self.exercise.preserve("folio", FREED, timeout=300)
        self.exercise.preserve("compound", AS_PAGES, timeout=300)
        pieces = by_scenario(self.exercise.report())
        # A single page is no folio of several.
        self.freed = {p.ranges[0][0] for p in pieces["folio"] if p.pages > 1}
        self.as_pages = {p.ranges[0][0] for p in pieces["compound"]}
        self._khoscope("snapshot", str(self.before))
        self.machine.load_kexec()
        self.machine.execute_kexec()
        self.exercise.load()
        self.exercise.restore("folio")
        self.exercise.restore("compound")

    def _khoscope(self, *words: str) -> None:
        command = (sys.executable, "-m", "khoscope", *self.machine.source, *words)
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE)

    def rows(self) -> Iterator[list[object]]:
        """A row each time that the folios are looked at."""
        self.exercise.free("folio", timeout=300)
        yield self._row("freed")
        self.machine.run("cat >/root/load.py", input=LOAD.encode(), check=True)
        for number, (what, count) in enumerate(LOADS.items()):
            words = ("python3", "/root/load.py", what.partition(",")[0], str(count))
            load = Job(self.machine, f"/root/load-{number}", words)
            load.until_on(600)
            yield self._row(what)
            load.end("KILL")
            yield self._row(f"{what}: freed again")
            self.machine.run("rm -f /root/file-*", check=True)

    def _row(self, when: str) -> list[object]:
        after = self.machine.directory / "after.khosnap"
        self._khoscope("snapshot", "--before", str(self.before), str(after))
        found = self._count(after)
        print(f"{when}: {dict(found)}", file=sys.stderr)
        names = ("held once", "and unused", "restored as pages")
        return [
            when,
            *(f"{found[name]} of {len(self.freed)}" for name in names),
            f"{found['told']} of {len(self.as_pages)}",
        ]

    def _count(self, path: Path) -> Counter[str]:
        before, after = store.load_file(self.before), store.load_file(path)
        report = checks.compare(before, after)
        wrong = {finding.phys for finding in report.kept.get("wrong-refcounts", ())}
        found = Counter({"told": len(wrong & self.as_pages)})
        found["restored as pages"] = len(wrong & self.freed)
        prog = open_qemu(str(self.machine.qmp_socket), self.machine.kernel.share / "vmlinux")
        layout = page_layout(prog)
        for blocks in after.watched:
            for row in np.flatnonzero(self._held_once(blocks)).tolist():
                found["held once"] += 1
                found["and unused"] += unused(
                    prog, layout, int(blocks.phys[row]) >> PAGE_SHIFT, 1 << int(blocks.order[row])
                )
        return found

    def _held_once(self, blocks: Blocks) -> NDArray[np.bool_]:
        """Freed folios all of whose pages somebody holds, and nobody as a compound page."""
        pages = blocks.facts
        tails = (blocks.page_count - np.uint64(1)).astype(np.int64)
        return (
            np.isin(blocks.phys, np.array(sorted(self.freed), np.uint64))
            & (blocks.order > 0)
            & (pages.head == 1)
            & (pages.ones == tails)
            & (pages.free == 0)
            & (pages.compound < 0)
        )


def unused(prog: Program, layout: PageLayout, pfn: int, count: int) -> bool:
    """Whether no page has a flag, a page type or a mapping."""
    raw = prog.read(layout.vmemmap + pfn * layout.size, count * layout.size)
    pages = StructPages(layout, raw, pfn, 1 << PAGE_SHIFT)
    mapping = np.frombuffer(raw, np.uint64)[layout.mapping // 8 :: layout.size // 8]
    flags = pages.flags & np.uint64((1 << layout.flag_count) - 1)
    return not (mapping.any() or flags.any() or (pages.page_type != 2**32 - 1).any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", default="7.2-base")
    with Machine(parser.parse_args().kernel) as machine:
        run = Run(machine)
        run.across()
        headers = ["the guest holds", "each page held once", "and unused", "verify: restored as"]
        headers[-1] += " pages"
        print(tabulate(run.rows(), [*headers, "of those that were"], tablefmt="github"))


if __name__ == "__main__":
    main()
