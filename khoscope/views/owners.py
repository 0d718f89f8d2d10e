# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope owners``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from ..abi.keys import BAD_ORDER
from ..facts.clients import Owner
from ..facts.owners import UNKNOWN, BlockOwners
from ..facts.snapshot import Snapshot
from ..words.sizes import human
from . import documents
from .text import Text


class OwnersText(Text):
    """Prints owners as text."""

    def owners(self, facts: Snapshot, holders: BlockOwners) -> None:
        """Print totals by owner, then the blocks."""
        self.header(facts)
        self.line()
        totals = holders.totals()
        shown = totals[: self._limit]
        rows = [
            [
                _name(held.owner),
                f"{held.blocks:,}",
                f"{held.pages:,}",
                human(held.pages << facts.abi.page_shift),
            ]
            for held in shown
        ]
        self.table(rows, ["owner", "blocks", "pages", "bytes"], ["left", *["right"] * 3])
        self._more(len(totals), len(totals), "owners")
        self.line()
        self._blocks(holders)

    def _blocks(self, holders: BlockOwners) -> None:
        rows: list[list[Any]] = []
        total = 0
        for blocks, owner in holders.blocks():
            total += len(blocks)
            room = len(blocks) if self._limit is None else max(self._limit - len(rows), 0)
            for phys, order, whose in zip(
                blocks.phys[:room].tolist(),
                blocks.order[:room].tolist(),
                owner[:room].tolist(),
                strict=True,
            ):
                at = ["bad key", ""] if order == BAD_ORDER else [f"{phys:#014x}", order]
                rows.append([*at, _name(_owner(holders, whose))])
        self.table(rows, ["phys", "order", "owner"], ["left", "right", "left"])
        self._more(total, total, "blocks")


def _owner(holders: BlockOwners, index: int) -> Owner | None:
    return None if index == UNKNOWN else holders.owners[index]


def _name(owner: Owner | None) -> str:
    return "unknown" if owner is None else str(owner)


def _row(owner: Owner | None) -> dict[str, Any]:
    """An owner, with session and token if the owner has them."""
    if owner is None:
        return {"kind": "unknown", "owner": None}
    row: dict[str, Any] = {"kind": str(owner.kind), "owner": str(owner)}
    if owner.session is not None:
        row["session"] = owner.session
    if owner.token is not None:
        row["token"] = f"{owner.token:#x}"
    return row


def _block_lines(holders: BlockOwners) -> Iterator[Iterator[str]]:
    for blocks, owner in holders.blocks():
        yield documents.block_lines(blocks, owner, lambda whose: _row(_owner(holders, whose)))


def write_json(facts: Snapshot, holders: BlockOwners, out: IO[str]) -> None:
    """``owners --json``, schema khoscope.owners/1."""
    shift = facts.abi.page_shift
    head = {
        "schema": "khoscope.owners/1",
        **documents.about(facts),
        "totals": [
            {
                **_row(held.owner),
                "blocks": held.blocks,
                "pages": held.pages,
                "bytes": held.pages << shift,
            }
            for held in holders.totals()
        ],
    }
    lines = chain.from_iterable(_block_lines(holders))
    documents.write_document(head, {"blocks": lines}, out)


def write_lines(holders: BlockOwners, out: IO[str]) -> None:
    """``owners --jsonl``: one block per line."""
    for lines in _block_lines(holders):
        documents.write_lines(lines, out)
