# SPDX-License-Identifier: LGPL-2.1-or-later
"""A progress bar on stderr, shown on a terminal for work that takes longer than a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Final, Generic, Self, TypeVar, cast

from ..facts.columns import Columns
from ..facts.snapshot import Snapshot
from ..facts.tree import Tree

C = TypeVar("C", bound=Columns)

#: Seconds of work without a bar, and then between one look of it and the next.
DELAY: Final = 1.0
INTERVAL: Final = 0.1


class Progress:
    """
    Call it with a description of the work, how much is done, and how much there is in all; 0: that
    is not known, and there is no bar.

    The bar has the rate since this work began, and the time that is left at that rate.

    :param clock: gives seconds.
    """

    WIDTH = 20

    def __init__(self, err: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._err = err
        self._clock = clock
        self._started = clock()
        self._due = self._started + DELAY
        self._is_drawn = False
        self._work = ""
        self._begun = self._started
        self._first = self._done = 0
        #: Whether there is anybody to see it.
        self.shows = err.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.shows:
            return
        now = self._clock()
        # What is read again begins anew.
        if what != self._work or done < self._done:
            self._work, self._begun, self._first = what, now, done
        self._done = done
        if now < self._due:
            return
        self._due = now + INTERVAL
        self._is_drawn = True
        self._err.write(f"\r{self._line(now, total)}\033[K")
        self._err.flush()

    def _line(self, now: float, total: int) -> str:
        more, seconds = self._done - self._first, now - self._begun
        rate = more / seconds if seconds else 0.0
        speed = f"  {_rate(rate)}" if rate else ""
        if not total:
            return f"{self._work} {self._done:,}{speed}"
        share = min(self._done / total, 1)
        bar = "#" * int(share * self.WIDTH)
        left = f"  {_duration(max(total - self._done, 0) / rate)} left" if rate else ""
        return f"{self._work} [{bar:<{self.WIDTH}}] {share:4.0%}{speed}{left}"

    def clear(self) -> None:
        """Remove the bar before other output goes to the terminal."""
        if self._is_drawn:
            self._is_drawn = False
            self._err.write("\r\033[K")
            self._err.flush()

    def beside(self, out: IO[str]) -> IO[str]:
        """``out``, for output while the work goes on: on a terminal it clears the bar first."""
        clearing = self.shows and out.isatty()
        return cast("IO[str]", _Clearing(out, self)) if clearing else out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.clear()


def _rate(rate: float) -> str:
    """Per second."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= scale:
            return f"{rate / scale:.1f} {unit}/s"
    return f"{rate:.0f}/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass(frozen=True)
class _Clearing:
    """What :meth:`Progress.beside` gives."""

    out: IO[str]
    progress: Progress

    def write(self, text: str) -> int:
        self.progress.clear()
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class _Followed(Generic[C]):
    """A stream that says how much of it was read, whenever it is read."""

    stream: Iterable[C]
    progress: Progress
    what: str
    count: Callable[[], int]

    def __iter__(self) -> Iterator[C]:
        total, done = self.count(), 0
        for part in self.stream:
            yield part
            done += len(part)
            self.progress(self.what, done, total)


def followed(facts: Snapshot, progress: Progress, what: str) -> Snapshot:
    """
    The same facts, whose outgoing blocks and stamps say how much of them was read.

    :param facts: from a file, or kept: a source itself says how far it has read a kernel.
    """
    if not progress.shows:
        return facts
    tree = facts.outgoing.tree

    def count() -> int:
        return sum(int(leaves.counts().sum()) for leaves in tree.leaves)

    blocks = _Followed(facts.outgoing.blocks, progress, what, count)
    # No fact says how many stamps there are.
    stamps = _Followed(facts.stamps, progress, "going through stamps", lambda: 0)
    return replace(facts, outgoing=replace(facts.outgoing, blocks=blocks), stamps=stamps)


def followed_tree(tree: Tree, progress: Progress) -> Tree:
    """The same tree, whose leaves say how many of them were read."""
    if not progress.shows:
        return tree

    def count() -> int:
        return sum(map(len, tree.leaves))

    return replace(tree, leaves=_Followed(tree.leaves, progress, "going through leaves", count))
