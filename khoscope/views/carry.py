# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope carry``."""

from __future__ import annotations

from typing import IO

from ..carry.memfd import Carried
from ..facts.carried import SESSION, TOKEN
from . import documents
from .text import Text


def write_text(carried: Carried, text: Text) -> None:
    """Print what is carried, and what would end that."""
    facts = carried.facts
    text.header(facts)
    text.totals(facts.outgoing.tree, facts.abi)
    text.wrapped(
        f"carrying a snapshot of {carried.size:,} bytes in a memfd of {carried.room:,}: LUO "
        f"session {SESSION}, token {TOKEN:#x}"
    )
    text.wrapped(
        "khoscope stays until the kexec. Ctrl-C, SIGTERM, or whatever else ends it, ends the "
        "session, and nothing is carried."
    )


def write_json(carried: Carried, out: IO[str]) -> None:
    """``carry --json``, schema khoscope.carry/1: what is carried."""
    facts = carried.facts
    document = {
        "schema": "khoscope.carry/1",
        "session": SESSION,
        "token": f"{TOKEN:#x}",
        "bytes": carried.size,
        "memfd_bytes": carried.room,
    }
    totals = documents.totals(facts.outgoing.tree, facts.abi)
    documents.write({**document, **documents.about(facts), "totals": totals}, out)
