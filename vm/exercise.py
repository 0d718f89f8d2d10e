# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's side of the exercise module, vm/kmod: makes scenarios, reads the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from vm.machine import Machine

#: The scenarios that `python -m vm scenario` takes across a kexec. The module knows more:
#:
#: - ``scratch`` needs an address of the running kernel, and all kernels but 7.2-nodebug refuse it;
#: - ``huge`` is a block above MAX_PAGE_ORDER;
#: - ``vmalloc-pages`` are the pages of an area, without ``kho_preserve_vmalloc()``;
#: - ``slab`` is the page of an object of ``kmalloc()``;
#: - ``blob`` is the blob of a subtree, ``blob-lost`` one that nobody has preserved, and ``blob-at``
#:   one at an address of the running kernel.
SCENARIOS = (
    "contig",
    "split",
    "folio",
    "dma",
    "vmalloc",
    "vmalloc-huge",
    "helper",
    "neighbours",
    "part",
    "late-split",
    "unpreserve",
    "freed",
    "leak",
    "wrong-call",
    "many",
)

#: What :meth:`Exercise.damage` can do to a ``struct kho_vmalloc`` and its chunks: the last one
#: leads to the first, or to where no memory is; the first page that is listed is not preserved; a
#: page is listed that ``total_pages`` does not count, or the other way round.
Damage = Literal["loop", "outside-ram", "unpreserved", "too-many", "too-few"]

_DEBUGFS = "/sys/kernel/debug/kho_exercise"
_SCRATCH = "/sys/kernel/debug/kho/out/scratch_"
_PAGE = 4096


class ExerciseError(Exception):
    """The module refused to do what it was told."""


class Unsupported(ExerciseError):
    """The running kernel has not what the scenario needs."""


class WriterDied(ExerciseError):
    """The kernel killed the writer: an oops."""


@dataclass(frozen=True)
class Piece:
    """The memory of one preserve call, or one vmalloc area, as the module sees it now."""

    scenario: str
    piece: int
    state: str
    call: str
    pages: int
    ret: int
    compound: bool
    #: Run lengths of the pages' reference counts: (value, count).
    refs: tuple[tuple[int, int], ...]
    #: Physical ranges, as (first byte, first byte after); none where the pages are scattered and
    #: too many for the report.
    ranges: tuple[tuple[int, int], ...]
    #: Physical address of the ``struct kho_vmalloc`` of an area that was preserved as such.
    descriptor: int | None
    #: The name of the subtree whose blob it is.
    subtree: str | None

    @classmethod
    def parse(cls, line: str) -> Piece:
        """One line of the report."""
        fields: dict[str, Any] = json.loads(line)
        if "physes" in fields:
            starts = [int(phys, 16) for phys in fields["physes"]]
            ranges = tuple((start, start + _PAGE) for start in starts)
        else:
            start = int(fields["phys"], 16)
            ranges = ((start, start + fields["pages"] * _PAGE),)
        return cls(
            scenario=fields["scenario"],
            piece=fields["piece"],
            state=fields["state"],
            call=fields["call"],
            pages=fields["pages"],
            ret=fields["ret"],
            compound=fields["compound"],
            refs=tuple((value, count) for value, count in fields["refs"]),
            ranges=ranges,
            descriptor=int(fields["descriptor"], 16) if "descriptor" in fields else None,
            subtree=fields.get("subtree"),
        )

    @property
    def shape(self) -> str:
        """The reference counts, head/tails: ``1/0``, ``1/1``, ``1``; else each run of them."""
        match self.refs:
            case ((head, 1),):
                return f"{head}"
            case ((value, _),):
                return f"{value}/{value}"
            case ((head, 1), (tail, _)):
                return f"{head}/{tail}"
        return " ".join(str(v) if n == 1 else f"{v}x{n}" for v, n in self.refs)


@dataclass(frozen=True)
class Timing:
    """What KHO took to preserve and unpreserve a block again and again."""

    order: int
    rounds: int
    #: The mean of a call of ``kho_preserve_pages()``, in nanoseconds; the clock's cost included.
    preserve_ns: float
    #: The same of ``kho_unpreserve_pages()``.
    unpreserve_ns: float


class Exercise:
    """The module in one machine; :meth:`load` it in each kernel."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def load(self) -> None:
        self.machine.run(("insmod", "/kernel/kho_exercise.ko"), check=True)

    def preserve(self, scenario: str, number: int | None = None, *, timeout: float = 60.0) -> None:
        """Makes a scenario; what KHO returned for each of its pieces is in the report.

        :param number: how many blocks, of the scenario's orders in turn (without it one of each);
            how many pages, for ``many``, ``vmalloc`` and ``vmalloc-pages``; how many subtrees, for
            ``blob``, which ends with the first that KHO refuses; the physical address, for
            ``scratch`` (a multiple of four pages) and ``blob-at`` (of one page)
        """
        words = scenario if number is None else f"{scenario} {number}"
        self._write("preserve", words, timeout)

    def damage(self, scenario: str, how: Damage) -> None:
        """Writes to what describes the scenario's preserved vmalloc areas.

        :meth:`free` mends them first. A kexec does not: then the next kernel gets them.
        """
        self._write("break", f"{scenario} {how}")

    def mend(self, scenario: str) -> None:
        """Takes back all that :meth:`damage` has done."""
        self._write("break", f"{scenario} mend")

    def restore(self, scenario: str) -> None:
        """Restores it, after the kexec; what KHO returned is in the report."""
        self._write("restore", scenario)

    def free(self, scenario: str, *, timeout: float = 60.0) -> None:
        """Frees its memory as its owner would; where that is an oops, the writer dies of it."""
        self._write("free", scenario, timeout)

    def report(self) -> list[Piece]:
        text = self.machine.run(("cat", f"{_DEBUGFS}/report"), check=True).stdout
        return [Piece.parse(line) for line in text.splitlines()]

    def scratch_areas(self) -> list[tuple[int, int]]:
        """The running kernel's scratch, as (first byte, first byte after), in the kernel's order.

        Areas of size 0 are left out: what is at their address is not scratch.
        """
        starts, sizes = (self._scratch(file) for file in ("phys", "len"))
        pairs = zip(starts, sizes, strict=True)
        return [(start, start + size) for start, size in pairs if size]

    def _scratch(self, file: str) -> list[int]:
        text = self.machine.run(("cat", f"{_SCRATCH}{file}"), check=True).stdout
        return [int(line, 16) for line in text.splitlines()]

    def time(self, order: int, rounds: int, *, timeout: float = 60.0) -> Timing:
        """Has the module preserve and unpreserve one block of 2 ** `order` pages, `rounds` times.

        :raise CommandTimeout: it was not done in `timeout` seconds
        """
        self._write("time", f"{order} {rounds}", timeout)
        text = self.machine.run(("cat", f"{_DEBUGFS}/time"), check=True).stdout
        fields: dict[str, int] = json.loads(text)
        return Timing(
            order=fields["order"],
            rounds=fields["rounds"],
            preserve_ns=fields["preserve_ns"] / fields["rounds"],
            unpreserve_ns=fields["unpreserve_ns"] / fields["rounds"],
        )

    def _write(self, file: str, words: str, timeout: float = 60.0) -> None:
        # Not sh: dash's echo does not say which error it was.
        write = ("bash", "-c", 'echo "$1" >"$2"', "bash", words, f"{_DEBUGFS}/{file}")
        result = self.machine.run(write, timeout=timeout, env={"LC_ALL": "C"})
        if result.returncode < 0:
            raise WriterDied(f"{file} {words}: the writer died of signal {-result.returncode}")
        if result.returncode:
            kind = Unsupported if "not supported" in result.stderr else ExerciseError
            raise kind(f"{file} {words}: {result.stderr.strip()}")


class KernelLog:
    """What the guest's kernel has said since :meth:`mark`."""

    _COMPLAINTS = (
        # The first that fits says it all: an oops comes with warnings, a bad page with "BUG:".
        ("oops", re.compile(r"kernel BUG at|Oops: ")),
        ("bad page", re.compile(r"BUG: Bad page")),
        ("WARN", re.compile(r"WARNING: ")),
        ("BUG", re.compile(r"BUG: ")),
    )

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._marks = 0

    def mark(self) -> None:
        self._marks += 1
        self.machine.run(f"echo '<5>{self._mark}' >/dev/kmsg", check=True)

    @property
    def _mark(self) -> str:
        return f"khoscope: mark {self._marks}"

    def since(self) -> str:
        text = self.machine.run(("dmesg", "--raw"), check=True).stdout
        _, mark, after = text.rpartition(self._mark)
        if not mark:
            raise ExerciseError("the kernel's log has overrun the mark")
        return after

    def complaint(self) -> str | None:
        """``oops``, ``bad page``, ``WARN`` or ``BUG``, or None where the kernel said none of it."""
        text = self.since()
        return next((name for name, sign in self._COMPLAINTS if sign.search(text)), None)


def by_scenario(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.scenario, []).append(piece)
    return found
