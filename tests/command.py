# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line in a test: what it said, and with which status it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def last(self) -> str:
        return self.out.splitlines()[-1]

    def refused(self, *words: str) -> None:
        """It could not be done, and that was said in two lines."""
        assert self.status == 2
        first, second = self.err.splitlines()
        assert first.startswith("khoscope: ")
        assert second.startswith("khoscope: ")
        for word in words:
            assert word in self.err


#: Runs khoscope with some words: the fixture ``run``.
Run = Callable[..., Result]
