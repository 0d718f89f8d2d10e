# SPDX-License-Identifier: LGPL-2.1-or-later
"""A progress bar on stderr, shown on a terminal for work that takes longer than a second."""

from __future__ import annotations

import time
from types import TracebackType
from typing import IO, Self


class Progress:
    """Call it with a description of the work, how much is done, and how much there is in all."""

    WIDTH = 30

    def __init__(self, err: IO[str]) -> None:
        self._err = err
        self._shows = err.isatty()
        self._started = time.monotonic()
        self._drawn = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._shows or now - self._started < 1 or now - self._drawn < 0.1:
            return
        self._drawn = now
        share = min(done / total, 1) if total else 1
        bar = "#" * int(share * self.WIDTH)
        self._err.write(f"\r{what} [{bar:<{self.WIDTH}}] {share:4.0%}")
        self._err.flush()

    def clear(self) -> None:
        """Remove the bar before other output goes to the terminal."""
        if self._drawn:
            self._err.write("\r\033[K")
            self._err.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.clear()
