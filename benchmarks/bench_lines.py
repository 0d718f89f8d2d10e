# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How long a trace takes for each event, and a tree for each block, until they are printed.

The records of the BPF program are made up: calls that preserve a single page, and return. All
times are of the processor, and go against those of ``json.dumps()`` of one member for each row.

    python -m benchmarks.bench_lines
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.bench_tree import machine
from benchmarks.bench_verify import cpu
from khoscope.checks import BatchFindings
from khoscope.facts.calls import Batch
from khoscope.facts.columns import Blocks
from khoscope.trace.summary import Callers, Summary
from khoscope.views import documents
from khoscope.views.trace.documents import JsonLines
from khoscope.views.trace.lines import Lines
from tests.synthetic import FIXED, PLAIN
from tests.test_trace_assemble import FRAMES, added, as_read, assembler, call, page_at, told_with
from tests.test_trace_views import symbols, tracing

#: What a poll carries: calls that preserve a page each.
CALLS: Final = 10_000
#: Touches of another call that wait while they come.
OPEN: Final = (0, 50_000, 250_000)
BLOCKS: Final = 1 << 15


class Nowhere:
    """Takes text, like a pipe."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""

    def isatty(self) -> bool:
        return False


def records(count: int, first_call: int) -> NDArray[np.uint8]:
    """Of calls that preserve a page each: the call, and the block that was added."""
    stack = np.arange(FRAMES, dtype=np.uint64)
    own = call(args=(page_at(0x1000), 1), comm=b"client", tgid=7, tid=7, stack=stack)
    many = np.tile(as_read([told_with(own, added(0x1000))]), (count, 1))
    number = np.arange(first_call, first_call + count, dtype=np.uint64)
    # struct call begins with its number.
    many[:, :8] = number.view(np.uint8).reshape(-1, 8)
    return many


def poll(waiting: int) -> float:
    """Seconds of a poll while the blocks of another call wait."""
    made = assembler()
    others = np.tile(as_read([added(0x2000, call=1 << 40)]), (10_000, 1))
    for _ in range(waiting // len(others)):
        made.feed(others)
    carried = records(CALLS, 1)
    return cpu(lambda: made.feed(carried))


def views(batch: Batch) -> dict[str, Callable[[], object]]:
    """What shows a batch, by name."""
    out, nothing = Nowhere(), BatchFindings()
    text, lines = Lines(out, symbols), JsonLines(out, symbols)  # type: ignore[arg-type]
    text.start(tracing(FIXED))
    lines.start(tracing(FIXED))
    sums = Summary(Callers(symbols))
    return {
        "lines": lambda: text.batch(batch, nothing),
        "--jsonl": lambda: lines.batch(batch, nothing),
        "--summary": lambda: sums.add(batch, nothing),
    }


def main() -> None:
    # What the tests' modules have brought along is not khoscope's.
    gc.freeze()
    out = Nowhere()
    rows: list[tuple[str, int, float]] = []
    for waiting in OPEN:
        rows.append((f"a poll, {waiting:,} blocks wait", 2 * CALLS, poll(waiting)))
    batch = assembler().feed(records(CALLS, 1))
    for name, show in views(batch).items():
        rows.append((f"trace: {name}", 2 * CALLS, cpu(show)))
    blocks = PLAIN.kho_radix_encode_keys(np.arange(BLOCKS, dtype=np.uint64) << np.uint64(12), 0, 0)
    chunk = Blocks(blocks, *PLAIN.kho_radix_decode_keys(blocks))
    write = documents.write_lines
    rows.append(("tree --jsonl", BLOCKS, cpu(lambda: write(documents.block_lines(chunk), out))))  # type: ignore[arg-type]
    bare = cpu(lambda: [out.write(json.dumps({"n": n}) + "\n") for n in range(BLOCKS)]) / BLOCKS
    print(
        tabulate(
            [
                (
                    name,
                    f"{took / count * 1e6:.2f}",
                    f"{count / took:,.0f}",
                    f"{took / count / bare:.2f}",
                )
                for name, count, took in rows
            ],
            ["", "µs", "a second", "×"],
            colalign=["left", "right", "right", "right"],
            disable_numparse=True,
        )
    )
    print(f"of an event or a block; × one member by json.dumps(), {bare * 1e6:.2f} µs; {machine()}")


if __name__ == "__main__":
    main()
