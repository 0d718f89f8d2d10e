# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read the struct pages of all RAM through drgn, in pieces of several sizes.

Run in a guest, it reads the running kernel and prints what :func:`measure` returns, as JSON; see
kcore_pieces.py.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

from drgn import Program

from khoscope.sources.open import open_live
from khoscope.sources.probe import page_layout, probe
from khoscope.sources.reading import Reading

#: Bytes of struct pages.
PIECES: Final = tuple(kib << 10 for kib in (128, 512, 1024, 2048, 4096, 16384))
ROUNDS: Final = 5
PAGE_SHIFT: Final = 12


@dataclass(frozen=True)
class Took:
    """
    What reading in pieces took, in seconds.

    :param piece: bytes of a piece.
    :param pages: how many struct pages were read in all.
    :param all: the best round.
    :param one: the median of its whole pieces.
    :param longest: of its pieces.
    """

    piece: int
    pages: int
    all: float
    one: float
    longest: float


def measure(prog: Program, rounds: int = ROUNDS) -> list[Took]:
    """Each size in turn, so that what else runs slows down all of them."""
    layout = page_layout(prog)
    ram = Reading.begin(prog, probe(prog)).ram.tolist()
    spans = [
        (layout.vmemmap + (start >> PAGE_SHIFT) * layout.size, (end - start >> PAGE_SHIFT))
        for start, end in ram
    ]
    best: dict[int, Took] = {}
    for _ in range(rounds):
        for piece in PIECES:
            found = _read(prog, [(at, count * layout.size) for at, count in spans], piece)
            pages = sum(count for _, count in spans)
            took = Took(piece, pages, sum(found), median(found), max(found))
            if piece not in best or took.all < best[piece].all:
                best[piece] = took
    return list(best.values())


def _read(prog: Program, spans: list[tuple[int, int]], piece: int) -> list[float]:
    """Seconds for each piece."""
    found = []
    for start, size in spans:
        for at in range(start, start + size, piece):
            begun = time.perf_counter()
            prog.read(at, min(piece, start + size - at))
            found.append(time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(took) for took in measure(open_live())]))
