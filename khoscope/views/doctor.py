# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope doctor``: one line for each fact, and what to do about it."""

from __future__ import annotations

import textwrap
from typing import IO

from .. import __version__
from ..facts.offers import Fact, State, missing
from ..words.printable import printable
from . import documents
from .text import WIDTH, Text

#: Widths of the state column and of the name column after it.
STATE, NAME = 4, 15

_COLOURS = {State.OK: "green", State.NO: "red", State.UNKNOWN: "yellow"}


def write_json(facts: list[Fact], release: str, out: IO[str]) -> None:
    """``doctor --json``, schema khoscope.doctor/1."""
    document = {
        "schema": "khoscope.doctor/1",
        "khoscope": __version__,
        "release": release,
        "ready": missing(facts) is None,
        "facts": [
            {
                "name": fact.name,
                "state": str(fact.state),
                "value": fact.value,
                "read_from": fact.read_from,
                "hint": fact.hint or None,
                "needed": fact.needed,
            }
            for fact in facts
        ],
    }
    documents.write(document, out)


class DoctorText(Text):
    """Prints the facts as text."""

    def doctor(self, facts: list[Fact], release: str) -> None:
        self.line(self.paint("bold", f"{release}, khoscope {__version__}"))
        self.line()
        for fact in facts:
            self._fact(fact)
        self.line()
        first = missing(facts)
        if first is None:
            self.line("all that is needed to look at this kernel is there")
        else:
            self.wrapped(f"this kernel cannot be looked at: see {first.name} above")

    def _fact(self, fact: Fact) -> None:
        """Print what was found, its source at the right, and what to do below."""
        indent = " " * (STATE + NAME)
        state = self.paint(_COLOURS[fact.state], f"{fact.state:<{STATE}}")
        source = f"[{fact.read_from}]"
        lines = textwrap.wrap(printable(fact.value), WIDTH - len(indent)) or [""]
        if len(lines[-1]) + len(source) >= WIDTH - len(indent):
            lines.append("")
        # A long path gets a line of its own, which may be wider than the others.
        room = max(WIDTH - len(indent) - len(source), 0)
        lines[-1] = f"{lines[-1]:<{room}}{self.paint('dim', source)}"
        for i, line in enumerate(lines):
            self.line(f"{state}{fact.name:<{NAME}}{line}" if i == 0 else indent + line)
        if fact.hint:
            self.wrapped(fact.hint, indent + "  ", f"{indent}→ ")
