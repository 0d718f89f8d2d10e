# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope pages``: each run of equal pages is a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, Any

from ..abi.keys import BAD_ORDER, TYPE_NAMES
from ..facts.columns import Pages
from ..facts.owners import UNKNOWN
from ..facts.page_runs import PageKnowledge, PageRuns
from ..facts.snapshot import Snapshot
from . import documents
from .text import Text, counted

#: Why khoscope can say nothing about a page.
SILENT = {
    PageKnowledge.UNREAD: "its struct page cannot be read",
    PageKnowledge.UNRECORDED: "not in the snapshot",
    PageKnowledge.OUTSIDE_RAM: "outside RAM",
    PageKnowledge.SHARED: "tail struct page shared by HVO",
}


def run_rows(facts: Snapshot, runs: PageRuns) -> Iterator[dict[str, Any]]:
    """One dict per run. None means that something does not apply or is not known."""
    for i in range(len(runs)):
        run = {name: int(getattr(runs, name)[i]) for name in runs.DTYPES}
        seen = PageKnowledge(run["seen"])
        yield {
            "phys": f"{run['phys']:#x}",
            "pages": run["pages"],
            "seen": seen.name.lower(),
            "refcount": run["refcount"]
            if seen in (PageKnowledge.READ, PageKnowledge.REFCOUNT)
            else None,
            "flags": _flags(facts, run["flags"]) if seen == PageKnowledge.READ else None,
            "page_type": _page_type(facts, run["page_type"]),
            "compound": _compound(run["compound"]),
            "free": _free(run["buddy"]),
            "stamp": _stamp(facts, runs[i : i + 1]) if run["stamp"] else None,
            "block": _block(run) if run["order"] != BAD_ORDER else None,
            "owner": None if run["owner"] == UNKNOWN else facts.outgoing.owners[run["owner"]].name,
        }


def _flags(facts: Snapshot, flags: int) -> list[str]:
    names = facts.kernel.page_flags
    return [name or f"bit {bit}" for bit, name in enumerate(names) if flags >> bit & 1]


def _page_type(facts: Snapshot, page_type: int) -> str | None:
    if page_type == PageRuns.UNTYPED:
        return None
    return facts.kernel.page_types.get(page_type, f"{page_type:#x}")


def _compound(compound: int) -> str | int | None:
    """The order of the compound page that begins here, "tail" inside one, or None outside."""
    if compound == Pages.COMPOUND_TAIL:
        return "tail"
    return None if compound == Pages.NOT_COMPOUND else compound


def _free(buddy: int) -> str | int | None:
    """The order of the free block, "yes" if it is not known, or None if the page is allocated."""
    if buddy == PageRuns.FREE:
        return "yes"
    return None if buddy == PageRuns.ALLOCATED else buddy


def _stamp(facts: Snapshot, run: PageRuns) -> dict[str, Any]:
    stamp = facts.abi.stamp
    order, kind = int(stamp.order(run.stamp)[0]), int(stamp.type(run.stamp)[0])
    return {"order": order, "type": TYPE_NAMES[kind]}


def _block(run: dict[str, int]) -> dict[str, Any]:
    """The preserved block of a run's first page."""
    shown = {"order": run["order"], "type": TYPE_NAMES[run["type"]]}
    return {**shown, "key": f"{run['key']:#x}"}


def write_json(
    facts: Snapshot, span: tuple[int, int], runs: Iterable[PageRuns], out: IO[str]
) -> None:
    """``pages --json``, schema khoscope.pages/1."""
    head = {
        "schema": "khoscope.pages/1",
        **documents.about(facts),
        "range": [f"{bound:#x}" for bound in span],
    }
    rows = (row for part in runs for row in run_rows(facts, part))
    documents.write_document(head, {"runs": documents.encoded(rows)}, out)


def write_lines(facts: Snapshot, runs: Iterable[PageRuns], out: IO[str]) -> None:
    """``pages --jsonl``: one run per line."""
    for part in runs:
        documents.write_lines(documents.encoded(run_rows(facts, part)), out)


class PagesText(Text):
    """Prints the runs as text."""

    def pages(self, facts: Snapshot, runs: Iterable[PageRuns]) -> None:
        self.header(facts)
        self.line()
        self.line(f"{'PHYS':<14} {'PAGES':>11}  {'REF':>4}  PAGE")
        total = pages = 0
        for part in runs:
            room = len(part) if self._limit is None else max(self._limit - total, 0)
            for row in run_rows(facts, part[:room]):
                self._run(row)
            total += len(part)
            pages += int(part.pages.sum())
        self._more(total, total, "runs")
        self.line(f"{counted(total, 'run')}, {counted(pages, 'page')}")

    def _run(self, row: dict[str, Any]) -> None:
        count = "1" if row["pages"] == 1 else f"{row['pages']:,}"
        refcount = "" if row["refcount"] is None else str(row["refcount"])
        head = f"{int(row['phys'], 16):#014x} {count:>11}  {refcount:>4}  "
        self.wrapped("; ".join(_words(row)), " " * len(head), head)


def _words(row: dict[str, Any]) -> Iterator[str]:
    """What khoscope can say about a run, in words."""
    seen = PageKnowledge[row["seen"].upper()]
    if seen in SILENT:
        yield SILENT[seen]
    else:
        yield from _state(row)
    if row["compound"] == "tail":
        yield "compound tail"
    elif row["compound"] is not None:
        yield f"compound head of order {row['compound']}"
    if row["flags"]:
        yield " ".join(row["flags"])
    if row["stamp"]:
        yield f"stamp {_kind(row['stamp'])}"
    if row["block"]:
        yield f"in block {_kind(row['block'])}"
    if row["owner"]:
        yield f"owner {row['owner']}"


def _state(row: dict[str, Any]) -> Iterator[str]:
    if row["free"] is None:
        yield "allocated"
    else:
        yield "free" if row["free"] == "yes" else f"free, buddy order {row['free']}"
    if row["page_type"] not in (None, "buddy"):
        yield row["page_type"]
    if row["refcount"] is None:
        yield "refcounts of the block's pages differ"


def _kind(what: dict[str, Any]) -> str:
    return f"order {what['order']} {what['type'] or ''}".rstrip()
