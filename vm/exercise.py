# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's side of the exercise module, vm/kmod: it makes scenarios and reads the report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from vm.machine import Machine

#: The scenarios that `python -m vm scenario` takes across a kexec. The module has more:
#:
#: - ``scratch`` preserves at an address that only the running kernel tells, and all kernels but
#:   7.2-nodebug refuse it;
#: - ``node-border`` and ``node-halves`` preserve what lies around the border of two NUMA nodes, one
#:   of those of ``Machine(borders=…)``, and restore it with one call, or with one for each node;
#: - ``huge`` preserves a block above MAX_PAGE_ORDER;
#: - ``vmalloc-pages`` preserves the pages of an area, without ``kho_preserve_vmalloc()``;
#: - ``slab`` preserves the page of an object of ``kmalloc()``;
#: - ``blob`` adds a subtree with a blob, ``blob-lost`` adds one with a blob that nobody preserved,
#:   and ``blob-at`` adds one with a blob at an address that only the running kernel tells;
#: - ``folio-at`` preserves a folio of others, at such an address.
SCENARIOS = (
    "contig",
    "split",
    "folio",
    "compound",
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

#: What :meth:`Exercise.damage` can do to a ``struct kho_vmalloc`` and its chunks: the last chunk
#: points to the first, or to an address without memory; the first listed page is not preserved; the
#: chunks list more pages than ``total_pages`` says, or fewer.
Damage = Literal["loop", "outside-ram", "unpreserved", "too-many", "too-few"]

_DEBUGFS = "/sys/kernel/debug/kho_exercise"
_SCRATCH = "/sys/kernel/debug/kho/out/scratch_"
_PAGE = 4096

# What bad_page() in mm/page_alloc.c reports, and for how long from the first one on it is silent.
_BAD_PAGES = 60
_BAD_PAGES_SECONDS = 60.0


class ExerciseError(Exception):
    """The module refused to do what it was told."""


class Unsupported(ExerciseError):
    """The running kernel lacks something that the scenario needs."""


class WriterDied(ExerciseError):
    """The kernel killed the writer with an oops."""


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
    #: Physical ranges, as (first byte, first byte after). There are none if the pages are scattered
    #: and too many for the report.
    ranges: tuple[tuple[int, int], ...]
    #: Physical address of the ``struct kho_vmalloc``, for an area preserved as a vmalloc area.
    descriptor: int | None
    #: The name of the subtree, if this is the blob of one.
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
        """The reference counts as head/tails (``1/0``, ``1/1``, ``1``), or else every run.

        Where the pages are a compound one and a tail of it has another count than 0, ``compound``
        follows: they are two things at once.
        """
        tails = any(value for at, (value, n) in enumerate(self.refs) if at or n > 1)
        return f"{self._counts} compound" if self.compound and tails else self._counts

    @property
    def _counts(self) -> str:
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
    """How long KHO took to preserve and unpreserve a block again and again."""

    order: int
    rounds: int
    #: The mean of a ``kho_preserve_pages()`` call in nanoseconds, including the clock's own cost.
    preserve_ns: float
    #: The same for ``kho_unpreserve_pages()``.
    unpreserve_ns: float


class Exercise:
    """The module in one machine. Call :meth:`load` in each kernel."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def load(self) -> None:
        self.machine.run(("insmod", "/kernel/kho_exercise.ko"), check=True)

    def preserve(self, scenario: str, number: int | None = None, *, timeout: float = 60.0) -> None:
        """Makes a scenario. The report has what KHO returned for each of its pieces.

        :param number: how many blocks to make, of the scenario's orders in turn (without it, one of
            each order). For ``many``, ``vmalloc`` and ``vmalloc-pages`` it is the number of pages.
            For ``blob`` it is the number of subtrees; the scenario ends with the first subtree that
            KHO refuses. For ``scratch`` and ``blob-at`` it is the physical address, a multiple of
            four pages or of one page; for ``folio-at`` that of a folio; for ``node-border`` and
            ``node-halves`` that of the border
        """
        words = scenario if number is None else f"{scenario} {number}"
        self._write("preserve", words, timeout)

    def damage(self, scenario: str, how: Damage) -> None:
        """Damages the structures that describe the scenario's preserved vmalloc areas.

        :meth:`free` mends them first. A kexec does not: the next kernel gets them damaged.
        """
        self._write("break", f"{scenario} {how}")

    def mend(self, scenario: str) -> None:
        """Undoes everything that :meth:`damage` has done."""
        self._write("break", f"{scenario} mend")

    def restore(self, scenario: str) -> None:
        """Restores the scenario after the kexec. The report has what KHO returned."""
        self._write("restore", scenario)

    def free(self, scenario: str, *, timeout: float = 60.0) -> None:
        """Frees the scenario's memory as its owner would. An oops kills the writer."""
        self._write("free", scenario, timeout)

    def report(self) -> list[Piece]:
        text = self.machine.run(("cat", f"{_DEBUGFS}/report"), check=True).stdout
        return [Piece.parse(line) for line in text.splitlines()]

    def scratch_areas(self) -> list[tuple[int, int]]:
        """The running kernel's scratch areas, as (first byte, first byte after), in its order.

        This leaves out areas of size 0, because the memory at their address is not scratch.
        """
        starts, sizes = (self._scratch(file) for file in ("phys", "len"))
        pairs = zip(starts, sizes, strict=True)
        return [(start, start + size) for start, size in pairs if size]

    def _scratch(self, file: str) -> list[int]:
        text = self.machine.run(("cat", f"{_SCRATCH}{file}"), check=True).stdout
        return [int(line, 16) for line in text.splitlines()]

    def time(self, order: int, rounds: int, *, timeout: float = 60.0) -> Timing:
        """Has the module preserve and unpreserve one block of 2 ** `order` pages, `rounds` times.

        :raise CommandTimeout: if this takes longer than `timeout` seconds
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
        # This needs bash, because dash's echo does not say which error it was.
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
        # The first match counts: an oops also prints warnings, and a bad page also prints "BUG:".
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

    def listen(self) -> None:
        """Waits until the kernel would report a bad page.

        It reports 60 of them, and then none until a minute after the first of these.
        """
        text = self.machine.run(("dmesg", "--raw"), check=True).stdout
        times = [float(at) for at in re.findall(r"\[ *([\d.]+)\] BUG: Bad page state in", text)]
        if times and len(times) % _BAD_PAGES == 0:
            now = float(self.machine.run(("cat", "/proc/uptime"), check=True).stdout.split()[0])
            quiet = times[-_BAD_PAGES] + _BAD_PAGES_SECONDS - now
            time.sleep(max(0.0, quiet))

    def complaint(self) -> str | None:
        """``oops``, ``bad page``, ``WARN`` or ``BUG``, or None if the kernel logged none."""
        text = self.since()
        return next((name for name, sign in self._COMPLAINTS if sign.search(text)), None)


def by_scenario(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.scenario, []).append(piece)
    return found
