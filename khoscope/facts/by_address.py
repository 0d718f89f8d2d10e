# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Blocks in order of address, and back in order of key.

Keys sort blocks by type and order first.  Whoever reads struct pages in that order reads those of
the same memory once for each order there, so streams of a kernel's blocks are in order of address:
each chunk begins behind all blocks of the one before it, and is sorted by key.  Files have them in
order of key.  Within one order and type ("kind") both orders are the same.
"""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol, TypeVar, runtime_checkable

import numpy as np

from ..abi.keys import BAD_ORDER, U64
from .columns import CHUNK_BLOCKS, Blocks, distinct

C = TypeVar("C", covariant=True)

#: How many kinds of blocks are merged.
MOST_KINDS: Final = 64


@runtime_checkable
class Chunks(Protocol[C]):
    """A stream whose chunks can be read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> C: ...

    def __iter__(self) -> Iterator[C]: ...


def by_address(stream: Iterable[Blocks]) -> Iterator[Blocks]:
    """
    A stream in order of key, in order of address.

    Blocks of a bad order come first: their keys mean no address.
    """
    kinds = of_kinds(stream)
    for kind in [kind for kind in kinds if _is_bad(kind)]:
        yield from kinds.pop(kind)
    # No kernel has so many kinds, but a file may: of each, a chunk would be in memory.
    if len(kinds) > MOST_KINDS:
        yield from itertools.chain.from_iterable(kinds.values())
    else:
        yield from merged(kinds.values())


def of_kinds(stream: Iterable[Blocks]) -> dict[int, Chunks[Blocks]]:
    """
    The blocks of each order and type, as a stream of its own: they have the order of the stream.
    """
    every = stream if isinstance(stream, Chunks) else [*stream]
    chunks: dict[int, list[int]] = {}
    for number, chunk in enumerate(every):
        for kind, _ in _kinds(chunk):
            numbers = chunks.setdefault(kind, [])
            if numbers[-1:] != [number]:
                numbers.append(number)
    return {kind: _OfKind(every, kind, numbers) for kind, numbers in chunks.items()}


@dataclass(frozen=True)
class _OfKind:
    """
    The blocks of one kind.

    :param numbers: of the chunks that have some.
    """

    every: Chunks[Blocks]
    kind: int
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> Blocks:
        chunk = self.every[self.numbers[at]]
        return Blocks.concatenate(part for kind, part in _kinds(chunk) if kind == self.kind)

    def __iter__(self) -> Iterator[Blocks]:
        return map(self.__getitem__, range(len(self)))


def _kinds(chunk: Blocks) -> Iterator[tuple[int, Blocks]]:
    """
    A chunk, cut where order or type changes: parts with their kind, a number.
    """
    kind = distinct(chunk.order).astype(np.int16) * 4 + distinct(chunk.type)
    begins = (np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist()
    if not begins:
        yield from [(int(kind[0]), chunk)] if len(chunk) else []
    elif len(begins) < MOST_KINDS:
        for low, high in pairwise([0, *begins, len(chunk)]):
            yield int(kind[low]), chunk[low:high]
    else:
        # They are not in order of key.
        for each in np.unique(kind).tolist():
            yield each, chunk[kind == each]


def _is_bad(kind: int) -> bool:
    # A type is -1, 0 or 1.
    return kind + 1 >> 2 == BAD_ORDER


def merged(streams: Iterable[Chunks[Blocks]]) -> Iterator[Blocks]:
    """
    The blocks of several streams, each in order of address, in that order.

    Chunks hold CHUNK_BLOCKS at most, but for blocks that begin at one address, and what they have
    of one stream before what they have of the next.
    """
    ahead = [_Ahead(stream) for stream in streams if len(stream)]
    while ahead:
        until = min(each.limit for each in ahead)
        for end in _ends([each.begins(until) for each in ahead], until):
            parts = [part for each in ahead if len(part := each.until(end))]
            if parts:
                yield Blocks.concatenate(parts)
        ahead = [each for each in ahead if not each.done]


class _Ahead:
    """A stream of which one chunk was read, and is not merged yet."""

    def __init__(self, stream: Chunks[Blocks]) -> None:
        self._stream = stream
        self._next = 0
        self._blocks = Blocks.empty()
        self._read()

    def _read(self) -> None:
        while not len(self._blocks) and self._next < len(self._stream):
            self._blocks = self._stream[self._next]
            self._next += 1
        #: Nothing that is not read yet begins in front of this address.
        self.limit = 1 << 64
        if self._next < len(self._stream):
            self.limit = int(self._blocks.phys[-1]) + 1

    @property
    def done(self) -> bool:
        """Whether there are no more; reads the next chunk if need be."""
        if not len(self._blocks):
            self._read()
        return not len(self._blocks)

    def begins(self, phys: int) -> U64:
        """The addresses of those that begin in front of another one."""
        return self._blocks.phys[: self._until(phys)]

    def until(self, phys: int) -> Blocks:
        """Those that begin in front of an address."""
        at = self._until(phys)
        found, self._blocks = self._blocks[:at], self._blocks[at:]
        return found

    def _until(self, phys: int) -> int:
        # A file's addresses may be in no order: whoever asks for all of them gets them.
        if phys >= self.limit:
            return len(self._blocks)
        return int(np.searchsorted(self._blocks.phys, np.uint64(phys)))


def _ends(begins: list[U64], until: int) -> list[int]:
    """
    Addresses that cut blocks into chunks; the last is ``until``.

    :param begins: where the blocks of each stream begin, all in front of ``until``.
    """
    count = sum(map(len, begins))
    if count <= CHUNK_BLOCKS:
        return [until]
    ranks = range(CHUNK_BLOCKS, count, CHUNK_BLOCKS)
    return [*np.partition(np.concatenate(begins), ranks)[ranks].tolist(), until]


def gathered(stream: Iterable[Blocks]) -> Iterator[Blocks]:
    """
    A stream in order of address, or of key, in other chunks: those, sorted by their first key, have
    all blocks in order of key.

    As many blocks of each kind as a chunk has are in memory.
    """
    kinds: dict[int, list[Blocks]] = {}
    given: list[int] = []
    for chunk in stream:
        for kind, part in _kinds(chunk):
            if _is_bad(kind):
                # Keys of any kind may lie between these and the next.
                given.append(int(part.key[0]))
                yield part
                continue
            held = kinds.setdefault(kind, [])
            # A view would keep all of its chunk.
            held.append(part if part is chunk else part[np.arange(len(part))])
            if sum(map(len, held)) < CHUNK_BLOCKS:
                continue
            whole = Blocks.concatenate(held)
            cut = len(whole) // CHUNK_BLOCKS * CHUNK_BLOCKS
            for at in range(0, cut, CHUNK_BLOCKS):
                given.append(int(whole.key[at]))
                yield whole[at : at + CHUNK_BLOCKS]
            kinds[kind] = [whole[cut:]] if cut < len(whole) else []
    given.sort()
    left = sorted(map(Blocks.concatenate, filter(None, kinds.values())), key=_first_key)
    yield from map(Blocks.concatenate, _neighbours(left, given))


def _neighbours(parts: list[Blocks], given: list[int]) -> Iterator[list[Blocks]]:
    """
    Put parts together, as far as no chunk belongs between them and CHUNK_BLOCKS allow it.

    :param given: the first keys of all other chunks, sorted.
    """
    found: list[Blocks] = []
    for part in parts:
        if found and (
            bisect(given, _first_key(found[0])) != bisect(given, _first_key(part))
            or sum(map(len, found)) + len(part) > CHUNK_BLOCKS
        ):
            yield found
            found = []
        found.append(part)
    if found:
        yield found


def _first_key(blocks: Blocks) -> int:
    return int(blocks.key[0])
