# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Reads the struct pages of a hugetlb folio, and of what lies around it, in the guest; prints what
khoscope says of them, what drgn's helpers say, and how much of them the kernel has given back.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from drgn import Program
from drgn.helpers.linux.mm import (
    PageHead,
    PageTail,
    compound_order,
    follow_phys,
    page_to_pfn,
    pfn_to_page,
)

from khoscope.abi.keys import Abi
from khoscope.facts.columns import Blocks, Pages
from khoscope.sources.open import open_live
from khoscope.sources.pages import PageReader
from khoscope.sources.probe import page_layout

PAGE = mmap.PAGESIZE
SIZE = 2 << 20
#: mmap(2): MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB.
FLAGS = 0x1 | 0x20 | 0x40000
TRIES = 10


def folio() -> Iterator[int]:
    """The pfn of a page of a new hugetlb folio, which stays while this generator does."""
    Path("/proc/sys/vm/nr_hugepages").write_text("2")
    with mmap.mmap(-1, SIZE, FLAGS) as memory:
        memory[0] = 1
        start = next(
            int(line.partition("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "hugepage" in line
        )
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(start // PAGE * 8)
            (entry,) = struct.unpack("<Q", pagemap.read(8))
        yield entry & (1 << 55) - 1
    Path("/proc/sys/vm/nr_hugepages").write_text("0")


def as_drgn_says(prog: Program, pfn: int) -> dict[str, Any]:
    page = pfn_to_page(prog, pfn)
    tail = bool(PageTail(page))
    head = not tail and bool(PageHead(page))
    order = int(compound_order(page).value_()) if head else Pages.NOT_COMPOUND
    return {
        "compound": Pages.COMPOUND_TAIL if tail else order,
        # A fake head has the refcount of the head, and drgn does not mind that.
        "refcount": 0 if tail else int(page._refcount.counter.value_()),
    }


def both(prog: Program, reader: PageReader, pfns: range) -> tuple[list[Any], list[Any]]:
    """What khoscope and drgn say of the same pages.

    What lies around the folio is others' memory, and may change hands between the two: look again
    until drgn says the same before and after khoscope.
    """
    for _ in range(TRIES):
        before = [as_drgn_says(prog, pfn) for pfn in pfns]
        khoscope = [
            {"compound": compound, "refcount": refcount}
            for runs in reader.pages(pfns.start, pfns.stop)
            for compound, refcount in zip(
                runs.compound.tolist(), runs.refcount.tolist(), strict=True
            )
        ]
        if before == [as_drgn_says(prog, pfn) for pfn in pfns]:
            return khoscope, before
    raise RuntimeError(f"the pages changed during each of {TRIES} looks")


def given_back(prog: Program, pfn: int, count: int) -> int:
    """Pages of struct pages whose memory is also that of others."""
    per_page = PAGE // prog.type("struct page").size
    init_mm = prog["init_mm"].address_of_()
    places = [
        follow_phys(init_mm, pfn_to_page(prog, at).value_()).value_()
        for at in range(pfn, pfn + count, per_page)
    ]
    return len(places) - len({*places})


def look(optimise: bool) -> dict[str, Any]:
    Path("/proc/sys/vm/hugetlb_optimize_vmemmap").write_text(str(int(optimise)))
    prog = open_live()
    held = folio()
    pfn = next(held)
    count = SIZE // PAGE
    abi = Abi.for_page_shift(12)
    layout = page_layout(prog)
    reader = PageReader(abi, layout, lambda at, size: prog.read(at, size), pfn + 2 * count)
    khoscope, drgn = both(prog, reader, range(pfn - count, pfn + 2 * count))
    nothing = np.zeros(1, np.uint64)
    blocks = Blocks(
        nothing, np.array([pfn * PAGE], np.uint64), np.array([9], np.uint8), np.zeros(1, np.int8)
    )
    facts = reader.with_pages(blocks).facts
    found = {
        "head": int(page_to_pfn(pfn_to_page(prog, pfn)).value_()) == pfn,
        "fake_heads": layout.fake_heads,
        "given_back": given_back(prog, pfn, count),
        "khoscope": khoscope,
        "drgn": drgn,
        "block": {
            name: int(getattr(facts, name)[0])
            for name in ("head", "zeros", "ones", "others", "compound", "unread", "free")
        },
    }
    # Unmap it, and give it back.
    for _ in held:
        raise RuntimeError("one folio is enough")
    return found


for optimise in (False, True):
    print(json.dumps(look(optimise)), flush=True)
