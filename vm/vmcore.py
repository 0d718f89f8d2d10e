# SPDX-License-Identifier: LGPL-2.1-or-later
"""ELF vmcores: which pages of one are read, and another with those pages alone."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from drgn import Program

PAGE = 4096

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
_ET_CORE, _PT_LOAD, _PT_NOTE = 4, 1, 4
#: With more program headers than this, ELF would need another layout (PN_XNUM).
_MOST_SEGMENTS = 0xFFFE


class VmcoreError(Exception):
    """The file is not an ELF vmcore of the kind that QEMU writes."""


@dataclass(frozen=True)
class Load:
    """A run of memory in the file. QEMU writes no real virtual address without paging."""

    offset: int
    virtual: int
    physical: int
    size: int

    def pages(self) -> range:
        """The physical addresses of its pages."""
        return range(self.physical, self.physical + self.size, PAGE)

    def part(self, first: int, end: int) -> Load:
        """The part that has the physical addresses from `first` to before `end`."""
        skip = first - self.physical
        return Load(self.offset + skip, self.virtual + skip, first, end - first)


class Vmcore:
    """An ELF vmcore that is open for reading, and the pages of it that were read.

    :raise VmcoreError: if the file is none
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise VmcoreError(f"{path}: empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        #: Physical addresses of the pages that programs made by :meth:`program` have read.
        self.read: set[int] = set()
        try:
            self.machine, segments = _segments(self._map)
        except (struct.error, VmcoreError) as error:
            self._map.close()
            raise VmcoreError(f"{path}: {error}") from error
        self.loads = [
            Load(offset, virtual, physical, size)
            for kind, _, offset, virtual, physical, size, _, _ in segments
            if kind == _PT_LOAD
        ]
        #: The notes as they stand in the file, one after the other.
        self.notes = b"".join(
            self._map[offset : offset + size]
            for kind, _, offset, _, _, size, _, _ in segments
            if kind == _PT_NOTE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._map.close()

    def program(self) -> Program:
        """A drgn program on the file, without debug info, that notes each page that it reads.

        drgn reads virtual memory through page tables, so whatever it reads, it reads physical
        memory in the end, and page tables are noted, too.
        """
        prog = Program()
        prog.set_core_dump(self.path)
        for load in self.loads:
            prog.add_memory_segment(load.physical, load.size, self._reader(load), physical=True)
        return prog

    def _reader(self, load: Load) -> _Reader:
        return _Reader(self._map, load, self.read)

    def keep(self, pages: Iterable[int], to: Path) -> None:
        """Writes a vmcore that has these pages alone, with the same notes.

        :param pages: physical addresses
        """
        wanted = set(pages)
        runs = [run for load in self.loads for run in _runs(load, wanted)]
        write(to, self.machine, self.notes, runs, self._map)


@dataclass
class _Reader:
    """What drgn calls to read a run of memory."""

    memory: mmap.mmap
    load: Load
    read: set[int]

    def __call__(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        first = address // PAGE * PAGE
        self.read.update(range(first, address + count, PAGE))
        at = self.load.offset + offset
        return self.memory[at : at + count]


def _segments(raw: mmap.mmap) -> tuple[int, list[tuple[int, ...]]]:
    """The machine that the file is of, and its program headers."""
    ident, kind, machine, _, _, table, *_, size, count, _, _, _ = _HEADER.unpack_from(raw)
    if ident[:7] != _IDENT[:7] or kind != _ET_CORE or size != _SEGMENT.size:
        raise VmcoreError("not a little-endian ELF vmcore of 64 bits")
    return machine, [_SEGMENT.unpack_from(raw, table + size * i) for i in range(count)]


def _runs(load: Load, wanted: set[int]) -> Iterator[Load]:
    """The parts of a run of memory that are wanted, as long as they can be."""
    first: int | None = None
    end = load.physical + load.size
    for page in load.pages():
        if page in wanted and first is None:
            first = page
        elif page not in wanted and first is not None:
            yield load.part(first, page)
            first = None
    if first is not None:
        yield load.part(first, end)


def write(
    to: Path, machine: int, notes: bytes, loads: list[Load], memory: mmap.mmap | bytes
) -> None:
    """Writes an ELF vmcore: its header, its program headers, its notes, its memory.

    :param loads: runs of memory, by their offsets in `memory`
    :raise VmcoreError: if they are too many
    """
    count = 1 + len(loads)
    if count > _MOST_SEGMENTS:
        raise VmcoreError(f"{count} program headers are too many")
    table = _HEADER.size
    at = table + count * _SEGMENT.size
    segments = [_SEGMENT.pack(_PT_NOTE, 0, at, 0, 0, len(notes), len(notes), 0)]
    at += len(notes)
    for load in loads:
        segments.append(
            _SEGMENT.pack(_PT_LOAD, 0, at, load.virtual, load.physical, load.size, load.size, 0)
        )
        at += load.size
    sizes = (_HEADER.size, _SEGMENT.size, count, 0, 0, 0)
    with to.open("wb") as file:
        file.write(_HEADER.pack(_IDENT, _ET_CORE, machine, 1, 0, table, 0, 0, *sizes))
        file.writelines(segments)
        file.write(notes)
        for load in loads:
            file.write(memory[load.offset : load.offset + load.size])
