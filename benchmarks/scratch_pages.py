# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long it takes to find out what 10 GiB of scratch are used for, against the bare read of their
struct pages.

The struct pages are made up, a mix as on a host that is in use, and served by a drgn memory
callback.  Everything is measured in one run, and what counts is the ratio.
"""

from __future__ import annotations

import resource

import numpy as np
from drgn import Architecture, Platform, Program
from tabulate import tabulate

from benchmarks.bench_tree import timed
from khoscope.abi.keys import Abi
from khoscope.facts.snapshot import ScratchUse
from khoscope.sources.pages import WINDOW, PageReader
from khoscope.sources.uses import UseLayout, UseReader
from tests.test_pages import BUDDY, HEAD, LAYOUT, NO_PAGE_TYPE, STRUCT_PAGE

ABI = Abi.for_page_shift(12)
PAGES = (10 << 30) >> ABI.page_shift
#: As on x86-64, linux 7.2.
USES = UseLayout(1 << 14, 1 << 18, 1 << 10, 1 << 12, mapcount=80, pincount=92)


def struct_pages() -> bytes:
    """Regions of 4 MiB: free, page cache and anonymous memory in single pages, huge pages."""
    pages = np.zeros(PAGES, STRUCT_PAGE)
    pages["page_type"] = NO_PAGE_TYPE
    region = 1 << ABI.max_page_order
    kind = np.random.default_rng(1).integers(0, 4, PAGES // region)
    for number, of in enumerate(kind.tolist()):
        part = pages[number * region :][:region]
        if of == 0:
            part["page_type"][0], part["private"][0] = BUDDY, ABI.max_page_order
        elif of == 3:
            part["mapping"][::512], part["refcount"][::512] = 0x1001, 1
            part["flags"][::512] = HEAD
            part["info"] = 1
            part["info"][::512] = 0
            part["flags"][1::512] = 9
            part["mapping"][1::512] = 0
        else:
            part["mapping"], part["refcount"] = 0x1000 + (of == 2), 2 - (of == 2)
            part["page_type"] = 0
    return pages.tobytes()


def main() -> None:
    raw = struct_pages()

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        at = address - LAYOUT.vmemmap
        return raw[at : at + count]

    prog = Program(Platform(Architecture.X86_64))
    prog.add_memory_segment(LAYOUT.vmemmap, len(raw), read)

    def bare() -> None:
        for pfn in range(0, PAGES, WINDOW):
            prog.read(LAYOUT.vmemmap + pfn * LAYOUT.size, WINDOW * LAYOUT.size)

    reader = UseReader(PageReader(ABI, LAYOUT, prog.read, PAGES), USES, {}, True)

    def used() -> tuple[int, ScratchUse]:
        return reader.uses(0, PAGES)

    free, use = used()
    assert free + sum(use.pages.values()) == PAGES
    reading, finding = timed(bare), timed(used)
    rows = [
        ["bare read", f"{reading:.2f}", "1"],
        ["what they are used for", f"{finding:.2f}", f"{finding / reading:.1f}"],
    ]
    print(f"{PAGES:,} struct pages, 10 GiB of scratch")
    print(tabulate(rows, ["", "seconds", "ratio"], disable_numparse=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak memory {peak} MiB, of which {len(raw) >> 20} are the struct pages")


if __name__ == "__main__":
    main()
