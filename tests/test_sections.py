# SPDX-License-Identifier: LGPL-2.1-or-later
"""The migrate types of page blocks, in sections that are made up."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from khoscope.sources import sections
from khoscope.sources.sections import PageBlockLayout, SectionLayout, page_blocks

PAGE, BLOCK, SECTION = 4096, 2 << 20, 128 << 20
#: A section's blocks, and the bytes of its ``struct mem_section_usage`` in front of their types.
BLOCKS, FLAGS = SECTION // BLOCK, 8
ROOTS, ROOT, USAGES = 0x1000, 0x2000, 0x10000
TYPES = {0: "unmovable", 1: "movable", 4: "cma"}
LAYOUT = PageBlockLayout(SectionLayout(ROOTS, 27, 16, 0, 8, 2, 0), FLAGS, 4, 3, TYPES)


class Sections:
    """
    Memory with the types of some sections' page blocks: a nibble each, ``None`` for a section that
    is offline.
    """

    def __init__(self, *types: list[int] | None) -> None:
        self.reads = 0
        self.memory = bytearray(1 << 20)
        struct.pack_into("<Q", self.memory, ROOTS, ROOT)
        for n, nibbles in enumerate(types):
            usage = USAGES + n * 0x2000
            online = 0 if nibbles is None else 1 << 2
            struct.pack_into("<QQ", self.memory, ROOT + 16 * n, online, usage)
            pairs = np.array(nibbles or [0] * BLOCKS, np.uint8).reshape(-1, 2)
            self.memory[usage + FLAGS : usage + FLAGS + BLOCKS // 2] = bytes(
                pairs[:, 0] | pairs[:, 1] << 4
            )

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        return bytes(self.memory[address : address + size])

    def blocks(self, phys: int, size: int, layout: PageBlockLayout = LAYOUT) -> dict[str, int]:
        return page_blocks(layout, phys, size, BLOCK, PAGE, self.read)


def test_types() -> None:
    """Of the blocks asked for alone, across sections; a section that is offline has none."""
    three = Sections([1] * 60 + [4] * 4, [4] * 2 + [0] * 62, None)
    assert three.blocks(60 * BLOCK, 6 * BLOCK) == {"cma": 6}
    assert three.blocks(59 * BLOCK, 8 * BLOCK) == {"unmovable": 1, "movable": 1, "cma": 6}
    assert three.blocks(126 * BLOCK, 5 * BLOCK) == {"unmovable": 2, "offline": 3}
    assert three.blocks(0, 0) == {}


def test_isolated_blocks() -> None:
    """A bit of its own says it, whatever their type; or a type does (linux 6.18)."""
    one = Sections([4, 4 | 8, 1 | 8, 7, *[0] * 60])
    assert one.blocks(0, 4 * BLOCK) == {"cma": 1, "isolate": 2, "type 7": 1}
    older = replace(LAYOUT, isolate=None, types={**TYPES, 7: "isolate"})
    assert one.blocks(0, 4 * BLOCK, older) == {"cma": 2, "movable": 1, "isolate": 1}


def test_memory_that_nobody_has() -> None:
    for size in (1 << 50, 1 << 60):
        with pytest.raises(ValueError, match="more memory than any machine has"):
            Sections().blocks(0, size)


def test_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies near is read in one go, but never all at once, however much there is."""
    many = Sections(*[[4] * BLOCKS] * 20)
    monkeypatch.setattr(sections, "NEAR", 0x2000)
    assert many.blocks(0, 20 * SECTION) == {"cma": 20 * BLOCKS}
    together = many.reads
    monkeypatch.setattr(sections, "TOGETHER", 5)
    assert many.blocks(0, 20 * SECTION) == {"cma": 20 * BLOCKS}
    assert many.reads - together == together + 3
