# SPDX-License-Identifier: LGPL-2.1-or-later
"""The progress bar: what it says, when it is there, and that stdout has nothing of it."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from khoscope.cli import main
from khoscope.facts import store
from khoscope.facts.snapshot import Snapshot
from khoscope.views import progress as progress_module
from khoscope.views.progress import Progress, followed, followed_tree
from tests.synthetic import FIXED, Block, snapshot


class Terminal(io.StringIO):
    """Keeps what is written to it."""

    def isatty(self) -> bool:
        return True

    def looks(self) -> list[str]:
        """What its line showed, one after another."""
        return [look for look in re.split(r"\r|\033\[K", self.getvalue()) if look]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def at(clock: Clock, seconds: float, progress: Progress, done: int, total: int = 1000) -> None:
    clock.now = 100.0 + seconds
    progress("checking blocks", done, total)


def test_rate_and_time_left(clock: Clock) -> None:
    err = Terminal()
    progress = Progress(err, clock)
    at(clock, 0, progress, 0, 100_000)
    at(clock, 0.9, progress, 9_000, 100_000)
    assert err.getvalue() == ""
    at(clock, 2, progress, 25_000, 100_000)
    # Too soon for another look.
    at(clock, 2.05, progress, 26_000, 100_000)
    at(clock, 4, progress, 100_000, 100_000)
    assert err.looks() == [
        "checking blocks [#####               ]  25%  12.5 k/s  0:06 left",
        "checking blocks [####################] 100%  25.0 k/s  0:00 left",
    ]
    progress.clear()
    assert err.getvalue().endswith("\r\033[K")
    length = len(err.getvalue())
    progress.clear()
    assert len(err.getvalue()) == length


@pytest.mark.parametrize(
    ("seconds", "done", "total", "shown"),
    [
        (2.0, 1, 4, "25%  0/s  0:06 left"),
        (2.0, 20, 40, "50%  10/s  0:02 left"),
        (2.0, 2_500_000, 10_000_000, "25%  1.2 M/s  0:06 left"),
        (1.0, 1 << 32, 1 << 33, "50%  4.3 G/s  0:01 left"),
        (10.0, 1, 1000, "0%  0/s  2:46:30 left"),
        # More than there was to be, and nothing at all: the tree grows while it is read.
        (2.0, 20, 10, "100%  10/s  0:00 left"),
        (2.0, 0, 10, "0%"),
    ],
)
def test_numbers(clock: Clock, seconds: float, done: int, total: int, shown: str) -> None:
    err = Terminal()
    progress = Progress(err, clock)
    at(clock, 0, progress, 0, total)
    at(clock, seconds, progress, done, total)
    [look] = err.looks()
    assert look.partition("] ")[2].strip() == shown
    assert len(look) < 80


def test_a_total_that_is_not_known(clock: Clock) -> None:
    err = Terminal()
    progress = Progress(err, clock)
    at(clock, 0, progress, 0, 0)
    at(clock, 2, progress, 12_345, 0)
    assert err.looks() == ["checking blocks 12,345  6.2 k/s"]


def test_work_that_begins_anew(clock: Clock) -> None:
    """The time left is that of what is going on, whether it is something else or done again."""
    err = Terminal()
    progress = Progress(err, clock)
    at(clock, 0, progress, 0)
    at(clock, 10, progress, 1000)
    at(clock, 11, progress, 100)
    at(clock, 12, progress, 300)
    clock.now += 1
    progress("scanning struct pages", 5, 10)
    clock.now += 1
    progress("scanning struct pages", 6, 10)
    numbers = [look.rpartition("%")[2].strip() for look in err.looks()]
    assert numbers == ["100/s  0:00 left", "", "200/s  0:04 left", "", "1/s  0:04 left"]


def test_only_on_a_terminal(clock: Clock) -> None:
    err = io.StringIO()
    with Progress(err, clock) as progress:
        at(clock, 0, progress, 0)
        at(clock, 5, progress, 10)
        facts = facts_with_blocks()
        assert followed(facts, progress, "reading") is facts
        assert followed_tree(facts.outgoing.tree, progress) is facts.outgoing.tree
        out = Terminal()
        assert progress.beside(out) is out
    assert err.getvalue() == ""


def test_output_clears_the_bar(clock: Clock) -> None:
    both = Terminal()
    with Progress(both, clock) as progress:
        out = progress.beside(both)
        assert out.isatty()
        at(clock, 0, progress, 0)
        at(clock, 5, progress, 10)
        out.write("a row\n")
        out.write("another\n")
        # Into a file it goes as it is.
        file = io.StringIO()
        assert progress.beside(file) is file
    bar, rest = both.getvalue().split("left\033[K")
    assert bar.startswith("\rchecking blocks")
    assert rest == "\r\033[Ka row\nanother\n"


def facts_with_blocks() -> Snapshot:
    blocks = [Block(n << 21, 9) for n in range(1, 7)]
    stamps = [Block(9 << 21, 9, private=FIXED.stamp.encode(9))]
    return snapshot(FIXED, blocks, ram=[(0, 1 << 30)], stamps=stamps)


def test_streams_say_how_far_they_were_read(clock: Clock) -> None:
    class Kept(Progress):
        def __call__(self, what: str, done: int, total: int) -> None:
            said.append((what, done, total))

    said: list[tuple[str, int, int]] = []
    facts = facts_with_blocks()
    with Kept(Terminal(), clock) as progress:
        watched = followed(facts, progress, "reading blocks")
        # Each time anew.
        for _ in range(2):
            assert sum(map(len, watched.outgoing.blocks)) == 6
        leaves = sum(map(len, facts.outgoing.tree.leaves))
        assert sum(map(len, followed_tree(facts.outgoing.tree, progress).leaves)) == leaves
    assert said == [("reading blocks", 6, 6)] * 2 + [("going through leaves", leaves, leaves)]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["verify"], "going through blocks"),
        (["status"], "going through stamps"),
        (["owners", "--jsonl"], "going through blocks"),
        (["owners"], "going through blocks"),
        (["tree"], "going through leaves"),
        (["tree", "--jsonl"], "going through leaves"),
        (["pages", "0..0x40000000"], "looking at pages"),
        (["diff"], "going through blocks"),
    ],
)
def test_commands(
    words: list[str],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their bar is on stderr alone."""
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    path = str(tmp_path / "facts.khosnap")
    store.save_file(facts_with_blocks(), Path(path))
    line = [*words, path, path] if words == ["diff"] else ["--snapshot", path, *words]
    status = main(line)
    plain = capsys.readouterr().out
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    assert main(line) == status
    assert capsys.readouterr().out == plain
    assert any(look.startswith(f"{what} ") for look in err.looks())
    assert err.getvalue().endswith("\r\033[K")
