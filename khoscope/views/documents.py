# SPDX-License-Identifier: LGPL-2.1-or-later
"""
JSON views: one document with a schema, or one line per block.

Addresses and keys are "0x…" strings; counts are numbers.  Lists of blocks are written while they
are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, TYPE_NAMES, Abi
from ..checks import Came, Finding, Report, in_order
from ..facts import diff
from ..facts.columns import Blocks, Nodes
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Snapshot
from ..facts.tree import Tree
from .block_filter import BlockFilter


def block_rows(blocks: Blocks) -> Iterator[dict[str, Any]]:
    """One dict per block, for the rows that the user asked to see."""
    for key, phys, order, kind in zip(
        blocks.key.tolist(),
        blocks.phys.tolist(),
        blocks.order.tolist(),
        blocks.type.tolist(),
        strict=True,
    ):
        at = f"{phys:#x}" if order != BAD_ORDER else None
        yield {"phys": at, **_of_kind(order, kind), "key": f"{key:#x}"}


def _of_kind(order: int, kind: int) -> dict[str, Any]:
    """What the rows of all blocks of an order and type have."""
    good = order != BAD_ORDER
    pages = 1 << order if order < 64 else 0
    return {
        "order": order if good else None,
        "pages": pages if good else None,
        "type": TYPE_NAMES[kind],
    }


def block_lines(
    blocks: Blocks,
    other: NDArray[np.int64] | None = None,
    members: Callable[[int], dict[str, Any]] | None = None,
) -> Iterator[str]:
    """
    :func:`block_rows`, encoded.  Blocks that differ only in key and address share a template: a
    tree may have 10^8 of them.

    :param other: what else tells blocks apart, and of what ``members`` makes more members.
    """
    kind = blocks.order.astype(np.int64) << 8 | blocks.type.view(np.uint8)
    if other is not None:
        kind |= other << 16
    kinds, at = np.unique(kind, return_inverse=True)
    templates = []
    for each in kinds.tolist():
        block_type = each & 0xFF if each & 0xFF < 0x80 else (each & 0xFF) - 0x100
        more = members(each >> 16) if members is not None else {}
        templates.append(block_template(each >> 8 & 0xFF, block_type, more))
    rows = zip(at.tolist(), blocks.phys.tolist(), blocks.key.tolist(), strict=True)
    return (templates[which] % (phys, key) for which, phys, key in rows)


def block_template(order: int, kind: int, more: dict[str, Any], keyed: bool = True) -> str:
    """
    A block's row, encoded, but for its address and its key, in this order.

    :param more: members of the row that stand behind the key.
    :param keyed: it has a key.
    """
    members = (
        f'"phys": {address(order != BAD_ORDER)}',
        members_of(_of_kind(order, kind)),
        f'"key": {address(keyed)}',
        members_of(more),
    )
    return f"{{{', '.join(filter(None, members))}}}"


def address(there: bool) -> str:
    """The template of an address; null, whatever is filled in, if it is not there."""
    return '"%#x"' if there else "null%.0s"


def members_of(row: dict[str, Any]) -> str:
    """Members of an object, encoded, as part of a template."""
    return json.dumps(row)[1:-1].replace("%", "%%")


def about(facts: Snapshot) -> dict[str, Any]:
    """What khoscope read, when and how."""
    abi = facts.abi
    return {
        "taken": {
            "khoscope": facts.taken.khoscope,
            "time": facts.taken.time,
            "source": facts.taken.source,
        },
        "kernel": {
            "release": facts.kernel.release,
            "boot_id": facts.kernel.boot_id,
            "tainted": f"{facts.kernel.tainted:#x}",
        },
        "abi": {
            "compatible": abi.compatible,
            "page_size": abi.page_size,
            "depth": abi.tree_max_depth,
            "stored_bits": abi.stored_bits,
            "key_width": abi.key_width,
            "type_bit": abi.type_shift,
            "type_is_stored": abi.type_is_stored if abi.has_types else None,
            "tracker": abi.tracker,
            "finalize": abi.finalize,
            "limits": {"size": abi.limits.size, "order": abi.limits.order},
            "decided": abi.decided,
        },
        "finalized": facts.finalized,
        "unreadable": facts.unreadable,
        "unrecorded": facts.unrecorded,
        "contradictions": facts.contradictions,
        "handover": {
            "is_kho_boot": facts.handover.is_kho_boot,
            "previous_release": facts.handover.previous_release or None,
            "kexec_count": facts.handover.kexec_count,
        },
    }


def totals(tree: Tree, abi: Abi) -> list[dict[str, Any]]:
    """A tree's blocks, pages and bytes by order and type."""
    return counts(tree.totals(abi), abi)


def counts(totals: Mapping[tuple[int, int], int], abi: Abi) -> list[dict[str, Any]]:
    """Blocks, pages and bytes by order and type."""
    return [
        {
            "order": order if order != BAD_ORDER else None,
            "type": TYPE_NAMES[kind],
            "blocks": blocks,
            "pages": blocks << order if order != BAD_ORDER else None,
            "bytes": blocks << order + abi.page_shift if order != BAD_ORDER else None,
        }
        for (order, kind), blocks in sorted(totals.items())
    ]


def key_lines(blocks: Blocks) -> Iterator[str]:
    """One line per key, undecoded."""
    return map('{{"key": "{:#x}"}}'.format, blocks.key.tolist())


def write_tree(
    facts: Snapshot,
    tree: Tree,
    which: str,
    wanted: BlockFilter,
    nodes: bool,
    raw_keys: bool,
    out: IO[str],
) -> None:
    """``tree --json``, schema khoscope.tree/1. With raw keys, there are no totals by order."""
    state = tree.state
    head = {
        "schema": "khoscope.tree/1",
        **about(facts),
        "tree": which,
        "evidence_only": which == "incoming",
        "root": f"{state.root:#x}",
        "moved": state.moved,
        "bad_entries": state.problem_count,
        "problems": [
            {
                "table": f"{p.table:#x}",
                "level": p.level,
                "index": p.index,
                "entry": f"{p.entry:#x}",
                "why": p.why,
            }
            for p in state.problems
        ],
        **({} if raw_keys else {"totals": totals(tree, facts.abi)}),
    }
    chunks = _tree_lines(facts, tree, wanted, raw_keys)
    lists: dict[str, Iterable[str]] = {
        "keys" if raw_keys else "blocks": chain.from_iterable(chunks)
    }
    if nodes:
        lists["nodes"] = encoded(row for chunk in tree.nodes for row in node_rows(chunk))
    write_document(head, lists, out)


def node_rows(nodes: Nodes) -> Iterator[dict[str, Any]]:
    """One dict per node of the tree."""
    for level, phys, key, used in zip(
        nodes.level.tolist(),
        nodes.phys.tolist(),
        nodes.key.tolist(),
        nodes.used.tolist(),
        strict=True,
    ):
        yield {"level": level, "phys": f"{phys:#x}", "key": f"{key:#x}", "used": used}


def _tree_lines(
    facts: Snapshot, tree: Tree, wanted: BlockFilter, raw_keys: bool
) -> Iterator[Iterator[str]]:
    """A tree's blocks, or its keys, chunk by chunk."""
    lines = key_lines if raw_keys else block_lines
    return map(lines, wanted.apply(tree.blocks(facts.abi), facts.abi.page_shift))


def write_block_lines(
    facts: Snapshot, tree: Tree, wanted: BlockFilter, raw_keys: bool, out: IO[str]
) -> None:
    """``tree --jsonl``: one block or key per line."""
    for lines in _tree_lines(facts, tree, wanted, raw_keys):
        write_lines(lines, out)


def encoded(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Rows as they stand in a document or on a line of their own."""
    return map(json.dumps, rows)


def write_lines(lines: Iterable[str], out: IO[str]) -> None:
    """Write rows, a thousand at a time."""
    for batch in _batches(lines):
        out.write("\n".join(batch) + "\n")


def _batches(lines: Iterable[str]) -> Iterator[list[str]]:
    lines = iter(lines)
    while batch := list(islice(lines, 1000)):
        yield batch


def finding(f: Finding) -> dict[str, Any]:
    """A finding, with address and order if they apply."""
    row: dict[str, Any] = {"rule": f.rule, "severity": str(f.severity)}
    if f.phys is not None:
        row["phys"] = f"{f.phys:#x}"
    if f.order is not None:
        row["order"] = f.order
    if f.units:
        row["units"] = list(f.units)
    return {**row, "message": f.message, "explain": f.explain}


def verdict(report: Report) -> dict[str, Any]:
    """The part of ``verify --json`` with the verdict and the findings."""
    return {
        "verdict": str(report.verdict),
        "incomplete": report.incomplete,
        "blocks": report.blocks,
        "fates": None if report.fates is None else dict(report.fates),
        "owners": {owner: dict(fates) for owner, fates in report.owners.items()},
        "rules": [rule.name for rule in in_order() if rule.name in report.rules],
        "counts": dict(report.counts),
        "findings": [finding(f) for f in report.findings],
    }


def verify(facts: Snapshot, report: Report, next_kernel: NextKernel | None) -> dict[str, Any]:
    """The document of ``verify --json``, schema khoscope.verify/1."""
    document = {"schema": "khoscope.verify/1", **about(facts)}
    if next_kernel is not None:
        document["next"] = vars(next_kernel)
    return {**document, **verdict(report)}


def write_verify(
    facts: Snapshot,
    report: Report,
    out: IO[str],
    next_kernel: NextKernel | None = None,
    came: list[Came] | None = None,
) -> None:
    """``verify --json``, schema khoscope.verify/1."""
    document = verify(facts, report, next_kernel)
    if came is not None:
        document["services"] = [
            {
                "unit": each.unit,
                "came": each.back,
                "lost": each.lost,
                "waits": each.waiting,
                "state": each.now and each.now.state,
            }
            for each in came
        ]
    write(document, out)


def write_snapshot(facts: Snapshot, path: Path, out: IO[str]) -> None:
    """``snapshot --json``, schema khoscope.snapshot/1: what was written."""
    size = path.stat().st_size
    document = {"schema": "khoscope.snapshot/1", "file": str(path), "bytes": size}
    write({**document, **about(facts), "totals": totals(facts.outgoing.tree, facts.abi)}, out)


def _change_rows(change: diff.BlockChanges) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(block_rows(change.a)):
        row["change"] = change.how
        if change.b is not None:
            was, now = change.a.facts, change.b
            row["facts"] = {
                name: [int(getattr(was, name)[i]), int(getattr(now, name)[i])]
                for name in was.DTYPES
                if getattr(was, name)[i] != getattr(now, name)[i]
            }
        yield row


def write_diff(a: Snapshot, b: Snapshot, out: IO[str]) -> None:
    """``diff --json``, schema khoscope.diff/1."""
    head = {
        "schema": "khoscope.diff/1",
        "a": about(a),
        "b": about(b),
        "facts": [{"what": c.what, "a": c.a, "b": c.b} for c in diff.facts(a, b)],
        "counts": dict(diff.count(diff.blocks(a, b))),
    }
    rows = (row for change in diff.blocks(a, b) for row in _change_rows(change))
    write_document(head, {"blocks": encoded(rows)}, out)


def write_diff_lines(a: Snapshot, b: Snapshot, out: IO[str]) -> None:
    """``diff --jsonl``: one changed block per line."""
    for change in diff.blocks(a, b):
        write_lines(encoded(_change_rows(change)), out)


def write(document: dict[str, Any], out: IO[str]) -> None:
    json.dump(document, out, indent=1)
    out.write("\n")


def write_document(head: dict[str, Any], lists: dict[str, Iterable[str]], out: IO[str]) -> None:
    """Write a document; its lists are encoded rows, written as they come."""
    out.write(json.dumps(head, indent=1)[:-2])
    for name, lines in lists.items():
        out.write(f',\n "{name}": [')
        separator = "\n  "
        for batch in _batches(lines):
            out.write(separator + ",\n  ".join(batch))
            separator = ",\n  "
        out.write("]")
    out.write("\n}\n")
