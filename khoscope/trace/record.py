# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The recording of a trace, ``.khotrace``: a zip like the snapshot file (:mod:`khoscope.facts.store`).

- ``facts/…``: the snapshot of the traced kernel, member by member as in a snapshot file.
- ``calls/NNNNNN.COLUMN.npy`` and ``touches/NNNNNN.COLUMN.npy``: the columns of
  :class:`~khoscope.facts.calls.Calls` and :class:`~khoscope.facts.calls.Touches`, chunk by chunk;
  without ``known`` and ``was``, which come from another kernel's snapshot.  A chunk may lack
  calls or touches.
- ``batches/NNNNNN.calls.npy`` and ``….touches.npy``: how many rows of the chunk belong to each
  batch.
- ``meta.json``: everything else.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..facts import store
from ..facts.archive import RECORDING, Archive, Stored, Writer
from ..facts.calls import (
    BIT_UNKNOWN,
    FUNCTIONS,
    NO_ORDER,
    NUMBERS,
    Action,
    Batch,
    Calls,
    Losses,
    Symbols,
    Touches,
    Tracing,
)
from ..facts.columns import CHUNK_BLOCKS, Columns, Pages
from ..facts.files import NewFile, open_file
from ..facts.snapshot import Snapshot

#: A chunk is written when it has this many calls, touches or batches.  Each member costs memory
#: until the file is finished, so small batches share members.
ENOUGH: Final = CHUNK_BLOCKS
ENOUGH_BATCHES: Final = 1 << 12
#: No chunk has more.  A trace takes fewer at once, so batches are cut only in theory.
MOST_CALLS: Final = CHUNK_BLOCKS
MOST_TOUCHES: Final = 16 * CHUNK_BLOCKS
#: The kernel records no deeper stack (``PERF_MAX_STACK_DEPTH``).
MOST_FRAMES: Final = 127
#: Symbols of one recording, and letters of any text in it (``KSYM_NAME_LEN`` and a module's name).
MOST_SYMBOLS: Final = 1 << 20
MOST_LETTERS: Final = 1 << 10

#: Members that files of versions 1 and 2 lack: in the kernels that they are of, all is seen.
_MAY_LACK: Final = {1: {"Losses.unseen"}, 2: {"Losses.unseen"}}

_ADDRESS: Final = re.compile("0x[0-9a-f]{1,16}")
#: Log2 of how many pages there can be.
_HIGHEST_ORDER: Final = 63


@dataclass(frozen=True)
class Recording:
    """
    A trace that was recorded.

    :param batches: as they were recorded, read from the file and checked whenever they are
        iterated; ``known`` is False and ``was`` blank.
    :param symbols: of the traced kernel; ``[unknown]`` for addresses that are in no stack of the
        trace.
    """

    tracing: Tracing
    losses: Losses
    symbols: Symbols
    batches: Iterable[Batch]


@dataclass(frozen=True, eq=False)
class _Sizes(Columns):
    """Rows of each batch in a chunk."""

    calls: NDArray[np.uint32]
    touches: NDArray[np.uint32]


@dataclass(frozen=True)
class _Meta:
    """
    :param functions: names of the function numbers.
    :param frames: of each stack.
    :param symbols: ``function+0x1f [module]`` by ``0x…``.
    """

    schema: str
    functions: list[str]
    attached: dict[str, str]
    missing: dict[str, str]
    buffer: str
    started: int
    frames: int
    chunks: int
    losses: Losses
    symbols: dict[str, str]


class Recorder:
    """
    Writes a recording, mode 0600, all of it or nothing: if it is not finished at the end of
    ``with``, nothing is left behind.

    :param facts: of the kernel that is traced.
    :raises KhoscopeError: if the file cannot be written; every method may raise it.
    """

    def __init__(self, path: Path, facts: Snapshot) -> None:
        self._facts = facts
        #: The batches that wait for their chunk, and how many rows they have.
        self._batches: list[Batch] = []
        self._calls = self._touches = 0
        self._chunks = 0
        self._frames: int | None = None
        self._new = NewFile(path)
        self._zip = zipfile.ZipFile(self._new.file, "w")
        self._writer = Writer(self._zip)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.push(self.__exit__)
            with self._new.told():
                store.write_snapshot(self._facts, self._writer.under("facts"))
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # A zip that is not closed tries to finish itself when it is collected.  Closing it fails if
        # the disk is full, or after an interrupt in the middle of a member (ValueError).
        with self._new, contextlib.suppress(OSError, ValueError):
            self._zip.close()

    def add(self, batch: Batch) -> None:
        """
        Append a batch.  A batch without rows is not kept.

        :raises ValueError: if its stacks are not as deep as those of earlier batches.
        """
        if len(batch.calls):
            frames = batch.calls.stack.shape[1]
            if frames not in range(MOST_FRAMES + 1) or self._frames not in (None, frames):
                raise ValueError(f"stacks of {frames} frames after {self._frames}")
            self._frames = frames
        for part in _cut(batch):
            calls, touches = len(part.calls), len(part.touches)
            if self._calls + calls > MOST_CALLS or self._touches + touches > MOST_TOUCHES:
                self._flush()
            self._batches.append(part)
            self._calls += calls
            self._touches += touches
            enough = max(self._calls, self._touches) >= ENOUGH
            if enough or len(self._batches) >= ENOUGH_BATCHES:
                self._flush()

    def finish(self, tracing: Tracing, symbols: dict[int, str], losses: Losses) -> None:
        """
        Put the file in its place.

        :param tracing: what was traced, and how; its facts have been written.
        :param symbols: of all addresses in the stacks.
        """
        self._flush()
        meta = _Meta(
            RECORDING.schema,
            [function.name for function in FUNCTIONS],
            tracing.attached,
            tracing.missing,
            tracing.buffer,
            tracing.started,
            self._frames or 0,
            self._chunks,
            losses,
            {f"{address:#x}": symbol for address, symbol in symbols.items()},
        )
        with self._new.told():
            self._writer.json("meta.json", meta)
            self._zip.close()
        self._new.finish()

    def _flush(self) -> None:
        batches, self._batches = self._batches, []
        self._calls = self._touches = 0
        if not batches:
            return
        calls = [batch.calls for batch in batches]
        touches = [batch.touches for batch in batches]
        sizes = _Sizes(
            np.array([len(part) for part in calls], np.uint32),
            np.array([len(part) for part in touches], np.uint32),
        )
        at = f"{self._chunks:06d}."
        with self._new.told():
            self._writer.columns(f"batches/{at}", sizes)
            if sizes.calls.any():
                self._writer.columns(f"calls/{at}", Calls.concatenate(filter(len, calls)))
            if sizes.touches.any():
                together = Touches.concatenate(filter(len, touches))
                self._writer.columns(f"touches/{at}", together, without=("known", "was"))
        self._chunks += 1


def _cut(batch: Batch) -> Iterator[Batch]:
    """
    Cut a batch into parts that fit into a chunk.  If a call has too many touches, some come before
    it, like those of a call that has not returned yet.
    """
    starts = batch.starts()
    call, touch = 0, 0
    while call < len(batch.calls) or touch < len(batch.touches):
        # As many calls as fit with all their touches.
        until = int(np.searchsorted(starts, touch + MOST_TOUCHES, "right")) - 1
        until = min(until, call + MOST_CALLS)
        if until > call:
            end = int(starts[until])
            if until == len(batch.calls) and len(batch.touches) - touch <= MOST_TOUCHES:
                end = len(batch.touches)
            yield Batch(batch.calls[call:until], batch.touches[touch:end])
            call = until
        else:
            end = touch + MOST_TOUCHES
            yield Batch(batch.calls[:0], batch.touches[touch:end])
        touch = end


def load(path: Path) -> Recording:
    """
    Open a recording.  Its batches are read, and checked, when they are iterated.

    :raises KhoscopeError: if the file is missing, damaged, hostile, of a newer schema or not a
        recording.
    """
    hint = "name a file that `khoscope trace --record` wrote"
    return _load(open_file(path, hint), str(path))


def _load(file: IO[bytes], name: str) -> Recording:
    archive = Archive(file, name, RECORDING)
    meta, _ = archive.meta(RECORDING, _Meta, _MAY_LACK)
    with archive.damage():
        _check(meta)
        symbols = {_address(text): symbol for text, symbol in meta.symbols.items()}
    archive.require_members(
        {"meta.json", *(n for n in archive.names() if n.startswith("facts/"))},
        dict.fromkeys(("batches", "calls", "touches"), meta.chunks),
    )
    facts = store.read_snapshot(archive.under("facts"))
    return Recording(
        Tracing(facts, meta.attached, meta.missing, meta.buffer, meta.started),
        meta.losses,
        lambda address: symbols.get(address, "[unknown]"),
        Stored(lambda: _batches(archive, meta)),
    )


def _check(meta: _Meta) -> None:
    """Refuse what khoscope would not write, and text that would control a terminal."""
    numbers = [meta.started, meta.frames, meta.chunks, *vars(meta.losses).values()]
    names = [function.name for function in FUNCTIONS]
    texts = [meta.buffer, *meta.missing.values(), *meta.symbols.values()]
    if not 0 <= min(numbers) <= max(numbers) < 1 << 64 or meta.frames > MOST_FRAMES:
        raise ValueError("meta.json: no trace has such numbers")
    if any(ours != its for ours, its in zip(names, meta.functions, strict=False)):
        raise ValueError("meta.json: other functions")
    if not NUMBERS.keys() >= {*meta.attached, *meta.missing}:
        raise ValueError("meta.json: functions that khoscope does not trace")
    if {*meta.functions} - {*meta.attached} - {*meta.missing} or not meta.attached:
        raise ValueError("meta.json: functions of which it does not say whether they were traced")
    if not {"fentry", "kprobe"} >= {*meta.attached.values()}:
        raise ValueError("meta.json: functions that are attached in no way that khoscope knows")
    if len(meta.symbols) > MOST_SYMBOLS:
        raise ValueError("meta.json: more symbols than a kernel has callers")
    if any(len(text) > MOST_LETTERS or not text.isprintable() for text in texts):
        raise ValueError("meta.json: text that is none")


def _address(text: str) -> int:
    if not _ADDRESS.fullmatch(text):
        raise ValueError(f"meta.json: {text[:20]!r} is no address")
    return int(text, 16)


def _batches(archive: Archive, meta: _Meta) -> Iterator[Batch]:
    for chunk in range(meta.chunks):
        at = f"{chunk:06d}."
        sizes = _Sizes(**archive.columns(f"batches/{at}", _Sizes))
        counts = np.stack([sizes.calls, sizes.touches], axis=1).astype(np.int64)
        with archive.damage():
            rows = counts.sum(axis=0).tolist()
            if rows[0] > MOST_CALLS or rows[1] > MOST_TOUCHES or not counts.any(axis=1).all():
                raise ValueError(f"batches/{at}: batches that khoscope does not write")
        calls = _calls(archive, f"calls/{at}", rows[0], meta.frames)
        touches = _touches(archive, f"touches/{at}", rows[1])
        for end, size in zip(counts.cumsum(axis=0), counts, strict=True):
            start = end - size
            batch = Batch(calls[start[0] : end[0]], touches[start[1] : end[1]])
            with archive.damage():
                _check_order(batch, f"batches/{at}")
            yield batch


def _calls(archive: Archive, prefix: str, rows: int, frames: int) -> Calls:
    if not rows:
        widths = {"args": (0, 4), "stack": (0, frames)}
        return Calls(
            **{name: np.zeros(widths.get(name, 0), dtype) for name, dtype in Calls.DTYPES.items()}
        )
    width = {"args": 4, "stack": frames}
    calls = Calls(**archive.columns(prefix, Calls, rows, width))
    with archive.damage():
        if (calls.function >= len(FUNCTIONS)).any():
            raise ValueError(f"{prefix}: a function that khoscope does not trace")
        if (calls.leave < calls.enter).any():
            raise ValueError(f"{prefix}: a call that returned before it began")
    return calls


def _touches(archive: Archive, prefix: str, rows: int) -> Touches:
    if not rows:
        return Touches.empty()
    columns: dict[str, Any] = archive.columns(prefix, Touches, rows)
    touches = Touches(
        **columns,
        blocks=archive.blocks(f"{prefix}blocks.", _HIGHEST_ORDER, rows),
        known=np.zeros(rows, np.bool_),
        was=Pages.blank(rows),
    )
    asked = touches.asked
    with archive.damage():
        if (touches.function >= len(FUNCTIONS)).any():
            raise ValueError(f"{prefix}: a function that khoscope does not trace")
        if not ((min(Action) <= touches.action) & (touches.action <= max(Action))).all():
            raise ValueError(f"{prefix}: nothing that becomes of a block")
        if (np.maximum(touches.before, touches.after) > BIT_UNKNOWN).any():
            raise ValueError(f"{prefix}: no bit is like that")
        if not ((asked <= _HIGHEST_ORDER) | (asked == NO_ORDER)).all():
            raise ValueError(f"{prefix}: no block has such an order")
    return touches


def _check_order(batch: Batch, name: str) -> None:
    """
    Require that each call is there once, that touches come in the order of their calls, and that
    touches of other calls come last.
    """
    call, of = batch.calls.call, batch.touches.call
    starts = batch.starts()
    owner = np.repeat(call, np.diff(starts))
    mine = of[: len(owner)]
    if len(np.unique(call)) < len(call) or not np.array_equal(mine, owner):
        raise ValueError(f"{name}: calls and touches that do not fit")
