# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Zips of columns: what snapshot files (:mod:`.store`) and recordings of a trace
(:mod:`khoscope.trace.record`) are made of.

Streams are kept chunk by chunk as ``STREAM/NNNNNN.COLUMN.npy`` and are read back the same way, so
neither side ever holds more than a chunk.  Of a large chunk of blocks, the columns that rise evenly
are in ``STREAM/NNNNNN.even.json`` instead: how many rows there are, and of each such column the
first value and the step.  A file may come from anywhere: sizes, shapes, types and order are checked
before they are believed, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import (
    IO,
    Any,
    Final,
    Generic,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..abi.keys import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE
from ..words.errors import KhoscopeError
from . import budget
from .columns import Blocks, Columns, Pages, distinct


@dataclass(frozen=True)
class Format:
    """
    A kind of file.

    :param noun: what to call one.
    :param again: what to do if a file is damaged.
    :param opened: how khoscope opens such a file.
    """

    name: str
    version: int
    noun: str
    again: str
    opened: str

    @property
    def schema(self) -> str:
        return f"{self.name}/{self.version}"


SNAPSHOT: Final = Format(
    "khosnap",
    7,
    "snapshot file",
    "take the snapshot again, or copy the file again",
    "khoscope --snapshot FILE opens it",
)


RECORDING: Final = Format(
    "khotrace",
    4,
    "recording",
    "record the trace again, or copy the file again",
    "khoscope trace --replay FILE shows it",
)


#: An array as numpy writes it.  numpy's own reader parses the header as Python.  A hostile header
#: makes that reader fail in ways (``tokenize.TokenError``, ``RecursionError``) that numpy does not
#: document.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']*)', 'fortran_order': False, "
    rb"'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)


#: No column of the set has two dimensions.
NARROW: Final[Mapping[str, int]] = {}


#: Columns that files lack below this version, and what then stands in them.  None is the first of
#: its set.
LATER: Final[Mapping[str, tuple[int, int]]] = {"pristine": (3, Pages.UNRECORDED)}


#: The column that tells how many claims a chunk has.
CLAIMED: Final = re.compile(r"/claims/[0-9]+\.phys\.npy$")


#: A member of a stream, or a blob, with its number.
NUMBERED: Final = re.compile(r"(.*)/([0-9]{6,})\.[a-z_.]+")


T = TypeVar("T")


@dataclass(frozen=True)
class _SchemaOnly:
    schema: str


#: Members of ``meta.json`` that may be negative: an errno.
SIGNED: Final = frozenset({"LuoFile.retrieve_status"})


class _Shape:
    """
    Check that JSON has all members of a dataclass, and that nothing in it is too large.

    :param may_lack: members that may be missing, each as ``Class.member``.
    :raises ValueError: from :meth:`of`, with the path of what is wrong.
    """

    def __init__(self, may_lack: Collection[str]) -> None:
        self._may_lack = may_lack
        #: The members of ``may_lack`` that were missing.
        self.lacking: set[str] = set()

    def of(self, raw: Any, kind: Any, path: str, member: str = "") -> None:
        """
        Look at a value.

        :param kind: what it should be; msgspec checks that later, with better messages.
        :param member: the ``Class.member`` that it belongs to.
        """
        origin, inner = _generic(kind)
        if origin in (Union, UnionType):
            if raw is not None:
                self.of(raw, next(each for each in inner if each is not NoneType), path, member)
        elif dataclasses.is_dataclass(kind) and isinstance(raw, dict):
            self._members(raw, kind, path)
        elif isinstance(raw, list | dict) and len(raw) > budget.LIST:
            raise ValueError(f"{path}: {len(raw):,} entries")
        elif origin is list and isinstance(raw, list):
            for i, each in enumerate(raw):
                self.of(each, inner[0], f"{path}[{i}]", member)
        elif origin is dict and isinstance(raw, dict):
            for name, each in raw.items():
                self.of(name, str, path, member)
                self.of(each, inner[1], f"{path}[{name[:20]!r}]", member)
        elif isinstance(raw, str) and len(raw) > budget.TEXT:
            raise ValueError(f"{path}: {len(raw):,} letters")
        elif isinstance(raw, int) and not isinstance(raw, bool):
            low, end = (-(1 << 31), 1 << 31) if member in SIGNED else (0, 1 << 64)
            if not low <= raw < end:
                raise ValueError(f"{path}: no address or count is {raw:#x}")

    def _members(self, raw: dict[str, Any], kind: Any, path: str) -> None:
        for name, hint, member in _hints(kind):
            value = raw.get(name, _MISSING)
            # Most are so; there may be millions.
            if value is None or (type(value) is str and len(value) <= budget.TEXT):
                continue
            if type(value) is int and 0 <= value < 1 << 64 and member not in SIGNED:
                continue
            if value is not _MISSING:
                self.of(value, hint, f"{path}.{name}".lstrip("."), member)
            elif member in self._may_lack:
                self.lacking.add(member)
            else:
                raise ValueError(f"{path}.{name}".lstrip(".") + " is not there")


_MISSING: Final = object()


@functools.cache
def _generic(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


@functools.cache
def _hints(kind: Any) -> list[tuple[str, Any, str]]:
    """The members of a dataclass: name, type, and ``Class.member``."""
    hints = get_type_hints(kind)
    return [(f.name, hints[f.name], f"{kind.__name__}.{f.name}") for f in dataclasses.fields(kind)]


#: A chunk of fewer blocks is kept as it is: it has room.
EVEN_ROWS: Final = 1024


@dataclass(frozen=True)
class _Even:
    """
    Columns of a chunk each of whose values is as much above the one before it.

    :param columns: the first value and the step, by name.
    """

    rows: int
    columns: dict[str, tuple[int, int]]


def _step(column: NDArray[Any]) -> int | None:
    """By how much each value is above the one before it, if that is the same for all."""
    first, step = int(column[0]), int(column[1]) - int(column[0])
    if step < 0 or int(column[-1]) != first + step * (len(column) - 1):
        return None
    if not step:
        return 0 if (column == column[0]).all() else None
    return step if (np.diff(column) == column.dtype.type(step)).all() else None


class Writer:
    """
    Puts members into a zip.

    :param prefix: of their names.
    """

    def __init__(self, archive: zipfile.ZipFile, prefix: str = "") -> None:
        self._zip = archive
        self._prefix = prefix

    def under(self, folder: str) -> Writer:
        return Writer(self._zip, f"{self._prefix}{folder}/")

    def member(self, name: str, data: Any) -> None:
        # Store no time: a zip cannot hold times before 1980, but a host whose clock is not set has
        # them.
        info = zipfile.ZipInfo(f"{self._prefix}{name}")
        info.external_attr = 0o600 << 16
        self._zip.writestr(info, data, zipfile.ZIP_DEFLATED, compresslevel=1)

    def json(self, name: str, value: Any) -> None:
        self.member(name, msgspec.json.format(msgspec.json.encode(value), indent=1))

    def array(self, name: str, values: NDArray[Any]) -> None:
        data = io.BytesIO()
        npy.write_array(data, np.ascontiguousarray(values), allow_pickle=False)
        self.member(f"{name}.npy", data.getvalue())

    def columns(self, prefix: str, chunk: Columns, without: Collection[str] = ()) -> None:
        """Write the columns of a set and of the sets in it."""
        for f in dataclasses.fields(chunk):  # type: ignore[arg-type]
            value = getattr(chunk, f.name)
            if f.name in without or value is None:
                continue
            if isinstance(value, Columns):
                self.columns(f"{prefix}{f.name}.", value)
            else:
                self.array(f"{prefix}{f.name}", value)

    def blocks(self, prefix: str, chunk: Blocks) -> None:
        """
        Blocks with the facts of their struct pages.  Of a large chunk, columns that rise evenly are
        kept as :class:`_Even`: most of a full leaf's do, and most others do not rise at all.
        """
        if len(chunk) < EVEN_ROWS:
            self.columns(prefix, chunk)
            return
        every = {name: getattr(chunk, name) for name in Blocks.DTYPES}
        every |= {f"pages.{name}": getattr(chunk.facts, name) for name in Pages.DTYPES}
        even: dict[str, tuple[int, int]] = {}
        for name, column in every.items():
            step = _step(column)
            if step is None:
                self.array(f"{prefix}{name}", column)
            else:
                even[name] = int(column[0]), step
        self.json(f"{prefix}even.json", _Even(len(chunk), even))

    def stream(self, name: str, stream: Iterable[Columns]) -> int:
        """:return: how many chunks it has."""
        count = 0
        for chunk in stream:
            prefix = f"{name}/{count:06d}."
            if isinstance(chunk, Blocks) and chunk.pages is not None:
                self.blocks(prefix, chunk)
            else:
                self.columns(prefix, chunk)
            count += 1
        return count


@dataclass
class Stored(Generic[T]):
    """A stored stream; each iteration reads it anew."""

    read: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.read()


class Archive:
    """
    A zip that is not trusted.

    :param format: what it should be.
    :param ours: khoscope has just written it from a kernel, so it may have any size.
    """

    def __init__(self, file: IO[bytes], name: str, format: Format, ours: bool = False) -> None:
        self._name = name
        self._format = format
        self._version = format.version
        self._prefix = ""
        self._may_lack: Collection[str] = ()
        self.ours = ours
        #: Bytes of the file.
        self.size = file.seek(0, os.SEEK_END)
        with self.damage():
            self._zip = zipfile.ZipFile(file)
            names = self._zip.namelist()
            self._names = {*names}
            if len(self._names) < len(names):
                raise ValueError("members of one name")
            if not ours:
                self._check_sizes(self.size)

    def _check_sizes(self, size: int) -> None:
        """Refuse contents that would take more memory than a file of this many bytes may take."""
        every = self._zip.infolist()
        leaves = claims = 0
        for member in every:
            leaves += member.file_size if member.filename.endswith(".bitmap.npy") else 0
            claims += member.file_size // 8 if CLAIMED.search(member.filename) else 0
        if len(every) > budget.members(size):
            raise ValueError(f"{len(every):,} members")
        if leaves > budget.leaves(size):
            raise ValueError(f"{leaves:,} bytes of leaves")
        if claims > budget.claims(size):
            raise ValueError(f"{claims:,} claims")

    def under(self, folder: str) -> Archive:
        """The members in a folder."""
        inner = copy.copy(self)
        inner._prefix += f"{folder}/"
        return inner

    @contextlib.contextmanager
    def damage(self) -> Iterator[None]:
        """Turn whatever zipfile, numpy or msgspec say about bad bytes into one clear line."""
        try:
            yield
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            KeyError,
            NotImplementedError,
            OSError,
            OverflowError,
            RuntimeError,
            UnicodeError,
            ValueError,
            msgspec.MsgspecError,
        ) as error:
            raise KhoscopeError(
                f"{self._name}: not a whole {self._format.noun} ({error or type(error).__name__})",
                self._format.again,
            ) from error

    def meta(
        self, format: Format, kind: type[T], may_lack: Mapping[int, Collection[str]]
    ) -> tuple[T, set[str]]:
        """
        ``meta.json``, if khoscope knows its schema, and which members it lacks.

        :param may_lack: by version, the members that such a file may lack, as ``Class.member``.
        """
        raw = self.member("meta.json", budget.META)
        with self.damage():
            schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
            family, _, version = schema.partition("/")
            other = {SNAPSHOT.name: SNAPSHOT, RECORDING.name: RECORDING}.get(family)
            if other is None or not version.isdecimal():
                raise ValueError(f"schema {schema!r}")
            newer = int(version) > format.version
        if other is not format:
            raise KhoscopeError(
                f"{self._name}: a {other.noun}, where a {format.noun} is needed", other.opened
            )
        if newer:
            raise KhoscopeError(
                f"{self._name}: its schema is {schema}, this khoscope reads up to {format.schema}",
                "use the khoscope that wrote it, or a newer one",
            )
        with self.damage():
            self._version = int(version)
            self._may_lack = may_lack.get(self._version, ())
            return self._decoded(raw, kind)

    def json(self, name: str, kind: type[T]) -> T:
        """Another member that is JSON, of the same schema."""
        raw = self.member(name)
        with self.damage():
            return self._decoded(raw, kind)[0]

    def _decoded(self, raw: bytes, kind: type[T]) -> tuple[T, set[str]]:
        shape = _Shape(self._may_lack)
        shape.of(msgspec.json.decode(raw), kind, "")
        return msgspec.json.decode(raw, type=kind), shape.lacking

    def names(self) -> list[str]:
        """The names of all members."""
        return self._zip.namelist()

    def require_members(self, names: Collection[str], numbered: Mapping[str, int]) -> None:
        """
        Refuse members that ``meta.json`` does not account for: then its counts are too low.

        :param numbered: how many numbers each folder has; a number may lack some of its members.
        """
        with self.damage():
            for name in self._zip.namelist():
                inner = name.removeprefix(self._prefix)
                if not name.startswith(self._prefix) or inner in names:
                    continue
                found = NUMBERED.fullmatch(inner)
                if found is None or int(found[2]) >= numbered.get(found[1], 0):
                    raise ValueError(f"{name} is not among what it says to have")

    def member(self, name: str, limit: int | None = None) -> bytes:
        limit = budget.MEMBER if limit is None else limit
        name = f"{self._prefix}{name}"
        with self.damage():
            if self._zip.getinfo(name).compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise ValueError(f"{name} is not compressed as khoscope does")
        with self.damage(), self._zip.open(name) as file:
            data = file.read(-1 if self.ours else limit + 1)
            if len(data) > limit and not self.ours:
                raise ValueError(f"{name} is larger than any chunk")
            return data

    def sizes(self, names: Iterable[str]) -> Iterator[int]:
        """Bytes of members when unpacked, as the zip says."""
        return (self._zip.getinfo(f"{self._prefix}{name}").file_size for name in names)

    def blobs(self, side: str, names: list[str]) -> dict[str, bytes]:
        members = {blob: f"{side}/blobs/{i:06d}.bin" for i, blob in enumerate(names)}
        with self.damage():
            if sum(self.sizes(members.values())) > budget.BLOBS:
                raise ValueError("more blobs than khoscope keeps")
        return {blob: self.member(member) for blob, member in members.items()}

    def array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """
        :param dtype: as numpy writes it, including bytes of a fixed length (``|S16``) and bool.
        :param shape: None: any length.
        """
        data = self.member(f"{name}.npy")
        with self.damage():
            header = NPY_HEADER.match(data)
            if header is None or int.from_bytes(data[8:10], "little") != header.end() - 10:
                raise ValueError(f"{name}: not a column")
            found = tuple(int(length) for length in header[2].split(b",") if length.strip())
            wanted = len(found) == len(shape) and all(
                want in (None, have) for want, have in zip(shape, found, strict=True)
            )
            if header[1] != dtype.encode() or not wanted:
                raise ValueError(f"{name}: {header[1].decode()} {found} is not a column of it")
            values = data[header.end() :]
            # Python's integers do not overflow: a shape beyond 64 bits does not match, either.
            size = np.dtype(dtype).itemsize * math.prod(found)
            if size != len(values):
                raise ValueError(f"{name}: {len(values)} bytes, not {size}")
            if dtype == "|b1" and values.strip(b"\0\1"):
                raise ValueError(f"{name}: neither true nor false")
            return np.frombuffer(values, dtype).reshape(found)

    def columns(
        self,
        prefix: str,
        kind: type[Columns],
        length: int | None = None,
        width: Mapping[str, int] = NARROW,
    ) -> dict[str, NDArray[Any]]:
        """
        The columns of a set, without those of the sets in it.

        :param length: rows that it must have.
        :param width: of the columns that have two dimensions.
        """
        columns: dict[str, NDArray[Any]] = {}
        for column, dtype in kind.DTYPES.items():
            wide = (width[column],) if column in width else ()
            since, unrecorded = LATER.get(column, (0, 0))
            if self._version < since:
                columns[column] = np.full(length or 0, unrecorded, dtype)
            else:
                columns[column] = self.array(f"{prefix}{column}", dtype, (length, *wide))
            length = len(columns[column])
        return columns

    def blocks(self, prefix: str, highest: int, length: int | None = None, most: int = 0) -> Blocks:
        """
        Blocks with the facts of their struct pages.

        :param highest: the highest order that a block may have.
        :param most: how many blocks a chunk of a stream has at most; 0: it is not part of a stream.
        """
        if most and f"{self._prefix}{prefix}even.json" in self._names:
            columns, pages = self._even(prefix, most)
        else:
            columns = self.columns(prefix, Blocks, length)
            pages = self.columns(f"{prefix}pages.", Pages, len(columns["order"]))
        order, types = columns["order"], columns["type"]
        with self.damage():
            if most and len(order) > most:
                raise ValueError(f"{prefix}: {len(order):,} blocks in one chunk")
            order, types = distinct(order), distinct(types)
            known = (order <= highest) | (order == BAD_ORDER)
            if not known.all() or not ((NO_TYPE <= types) & (types <= KHO_PAGE_SPLIT)).all():
                raise ValueError(f"{prefix}: no block has such an order or type")
        return Blocks(**columns, pages=Pages(**pages))

    def _even(
        self, prefix: str, most: int
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """What :meth:`Writer.blocks` has made of a large chunk: columns of blocks, and of pages."""
        raw = self.member(f"{prefix}even.json")
        with self.damage():
            even = msgspec.json.decode(raw, type=_Even)
            if not EVEN_ROWS <= even.rows <= most:
                raise ValueError(f"{prefix}: {even.rows:,} blocks in one chunk")
        known = {*Blocks.DTYPES, *(f"pages.{name}" for name in Pages.DTYPES)}
        with self.damage():
            if not known >= even.columns.keys():
                raise ValueError(f"{prefix}: columns that no block has")
        found = []
        for kind, inner in ((Blocks, ""), (Pages, "pages.")):
            columns = {}
            for name, dtype in kind.DTYPES.items():
                if (rises := even.columns.get(f"{inner}{name}")) is None:
                    columns[name] = self.array(f"{prefix}{inner}{name}", dtype, (even.rows,))
                    continue
                with self.damage():
                    columns[name] = _risen(*rises, even.rows, dtype)
            found.append(columns)
        return found[0], found[1]


#: The lowest and the highest value of each dtype that a column of blocks has.
_LIMITS: Final = {
    dtype: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for dtype in {*Blocks.DTYPES.values(), *Pages.DTYPES.values()}
}


def _risen(first: int, step: int, rows: int, dtype: str) -> NDArray[Any]:
    """
    A column that rises evenly; if it does not rise at all, it has one value in memory.

    :raises ValueError: if the values are beyond the dtype.
    """
    low, high = _LIMITS[dtype]
    if not (low <= first and 0 <= step and first + step * (rows - 1) <= high):
        raise ValueError(f"no such column: {first:#x}, each {step:#x} above the one before")
    if not step:
        return np.ndarray((rows,), dtype, np.array(first, dtype).tobytes(), strides=(0,))
    return np.arange(rows, dtype=dtype) * np.array(step, dtype) + np.array(first, dtype)
