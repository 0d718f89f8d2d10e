# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khoscope prints, kept in files: to change it on purpose, write them anew and look."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kept:
    """A directory of JSON files, each with what was printed once, by its name."""

    directory: Path

    def text(self, name: str) -> str:
        return (self.directory / f"{name}.json").read_text()

    def names(self) -> set[str]:
        return {path.stem for path in self.directory.iterdir()}

    def replace(self, printed: Iterable[tuple[str, str]], prefix: str = "") -> None:
        """Keeps this in place of all that was kept under names with the prefix."""
        texts = dict(printed)
        self.directory.mkdir(exist_ok=True)
        for old in self.directory.glob(f"{prefix}*.json"):
            old.unlink()
        for name, text in texts.items():
            (self.directory / f"{name}.json").write_text(text)
