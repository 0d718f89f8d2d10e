# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The snapshot file: a zip of ``meta.json``, ``.npy`` columns and raw blobs.

Streams are kept chunk by chunk as ``STREAM/NNNNNN.COLUMN.npy`` and are read back the same way, so
neither side ever holds more than a chunk.  A file may come from anywhere: sizes, shapes, types
and order are checked before they are believed, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .abi import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, Abi
from .columns import Blocks, Columns, Leaves, Nodes, Pages
from .errors import KhoscopeError
from .snapshot import (
    Fdt,
    Handover,
    Kernel,
    Scan,
    Side,
    Snapshot,
    Taken,
    Tree,
    TreeState,
    Watched,
)

SCHEMA_NAME = "khosnap"
SCHEMA_VERSION = 1
SCHEMA = f"{SCHEMA_NAME}/{SCHEMA_VERSION}"

#: An array as numpy writes it.  numpy's own reader would evaluate the header as Python.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']*)', 'fortran_order': False, "
    rb"'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)

#: No member is larger when unpacked: chunks are a few MiB, blobs are cut at BLOB_LIMIT.
MEMBER_LIMIT = 64 << 20
#: Subtree blobs are small structures; what is larger is kept up to here.
BLOB_LIMIT = 16 << 20
#: All blobs of a side together.
BLOBS_SIZE = 64 << 20
#: Snapshots up to this size stay in memory, larger ones go to an unnamed temporary file.
SPOOL_MEMORY = 64 << 20


C = TypeVar("C", bound=Columns)


@dataclass(frozen=True)
class _SideMeta:
    fdt: Fdt
    tree: TreeState
    blobs: list[str]


@dataclass(frozen=True)
class _Meta:
    schema: str
    taken: Taken
    kernel: Kernel
    abi: Abi
    kho_enable: bool
    handover: Handover
    outgoing: _SideMeta
    incoming: _SideMeta | None
    scan: Scan | None
    watching: Watched | None
    #: Chunks of each stream.
    chunks: dict[str, int]


@dataclass(frozen=True)
class _SchemaOnly:
    schema: str


def save(snapshot: Snapshot, file: IO[bytes]) -> None:
    """Write a snapshot, reading each of its streams once."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        chunks: dict[str, int] = {}

        def put_stream(name: str, stream: Iterable[Columns]) -> None:
            chunks[name] = 0
            for chunk in stream:
                for column, values in _flat(chunk):
                    put_array(f"{name}/{chunks[name]:06d}.{column}", values)
                chunks[name] += 1

        def put_array(name: str, values: NDArray[Any]) -> None:
            data = io.BytesIO()
            npy.write_array(data, np.ascontiguousarray(values), allow_pickle=False)
            archive.writestr(f"{name}.npy", data.getbuffer())

        def put_side(name: str, side: Side) -> _SideMeta:
            put_stream(f"{name}/nodes", side.tree.nodes)
            put_stream(f"{name}/leaves", side.tree.leaves)
            put_stream(f"{name}/blocks", side.blocks)
            for i, blob in enumerate(side.blobs.values()):
                archive.writestr(f"{name}/blobs/{i:06d}.bin", blob[:BLOB_LIMIT])
            return _SideMeta(side.fdt, side.tree.state, list(side.blobs))

        put_array("ram", snapshot.ram)
        put_array("scratch", snapshot.scratch)
        outgoing = put_side("out", snapshot.outgoing)
        incoming = put_side("in", snapshot.incoming) if snapshot.incoming else None
        put_stream("stamps", snapshot.stamps)
        put_stream("watched", snapshot.watched)
        put_stream("evidence", snapshot.evidence)
        meta = _Meta(
            SCHEMA,
            snapshot.taken,
            snapshot.kernel,
            snapshot.abi,
            snapshot.kho_enable,
            snapshot.handover,
            outgoing,
            incoming,
            snapshot.scan,
            snapshot.watching,
            chunks,
        )
        archive.writestr("meta.json", msgspec.json.format(msgspec.json.encode(meta), indent=1))


def save_file(snapshot: Snapshot, path: Path) -> None:
    """
    Write a snapshot file, mode 0600, all of it or nothing.

    :raises KhoscopeError: if it cannot be written.
    """
    hint = "choose a directory that you can write to and that has space"
    # Replacing what is there would put a file in the place of /dev/null or of a link.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise KhoscopeError(f"{path}: is not a file", "name a new file, or one to replace")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise KhoscopeError(f"{path}: {error.strerror}", hint) from error
    try:
        with open(handle, "wb") as file:
            save(snapshot, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise KhoscopeError(f"{path}: {error.strerror}", hint) from error
        raise


def spool(snapshot: Snapshot) -> Snapshot:
    """
    The same facts, read once and kept: what a source reads lazily becomes a fixed snapshot.
    """
    file = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY)  # noqa: SIM115 - lives on in it
    save(snapshot, file)
    return _load(file, "spooled snapshot")


def load_file(path: Path) -> Snapshot:
    """
    Open a snapshot file.  Its streams are read, and checked, when they are iterated.

    :raises KhoscopeError: if it is not there, damaged, hostile or of a newer schema.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the streams keep it open
    except OSError as error:
        raise KhoscopeError(
            f"{path}: {error.strerror}", "name a file that `khoscope snapshot` wrote"
        ) from error
    return _load(file, str(path))


def _load(file: IO[bytes], name: str) -> Snapshot:
    archive = _Archive(file, name)
    raw = archive.member("meta.json")
    with archive.damage():
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
        family, _, version = schema.partition("/")
        if family != SCHEMA_NAME or not version.isdecimal():
            raise ValueError(f"schema {schema!r}")
        newer = int(version) > SCHEMA_VERSION
    if newer:
        raise KhoscopeError(
            f"{name}: its schema is {schema}, this khoscope reads up to {SCHEMA}",
            "use the khoscope that wrote it, or a newer one",
        )
    with archive.damage():
        meta = msgspec.json.decode(raw, type=_Meta)
        _check_abi(meta.abi)
    archive.abi = meta.abi
    archive.chunks = meta.chunks

    def side(name: str, of: _SideMeta) -> Side:
        return Side(
            of.fdt,
            Tree(
                of.tree,
                archive.stream(f"{name}/nodes", Nodes),
                archive.stream(f"{name}/leaves", Leaves),
            ),
            archive.blobs(name, of.blobs),
            archive.stream(f"{name}/blocks", Blocks, sorted_by="key"),
        )

    return Snapshot(
        meta.taken,
        meta.kernel,
        meta.abi,
        meta.kho_enable,
        meta.handover,
        archive.array("ram", "<u8", (None, 2)),
        archive.array("scratch", "<u8", (None, 2)),
        side("out", meta.outgoing),
        side("in", meta.incoming) if meta.incoming else None,
        meta.scan,
        archive.stream("stamps", Blocks, sorted_by="phys"),
        meta.watching,
        archive.stream("watched", Blocks, sorted_by="key"),
        archive.stream("evidence", Leaves),
    )


def _flat(chunk: Columns) -> Iterator[tuple[str, NDArray[Any]]]:
    """Columns of a set and of the sets in it."""
    for f in dataclasses.fields(chunk):  # type: ignore[arg-type]
        value = getattr(chunk, f.name)
        if isinstance(value, Columns):
            for column, values in _flat(value):
                yield f"{f.name}.{column}", values
        elif value is not None:
            yield f.name, value


def _check_abi(abi: Abi) -> None:
    """Refuse a geometry that would make us reserve absurd amounts of memory."""
    fits = (
        abi.page_shift in (12, 14, 16)
        and abi.table_size_log2 == abi.page_shift - 3
        and abi.bitmap_size_log2 == abi.page_shift + 3
        and abi.bitmap_size_log2 < abi.order_0_log2 <= 64 - abi.page_shift
        and 2 <= abi.tree_max_depth
        and abi.table_shift(abi.tree_max_depth - 1) < 64
        and 0 <= abi.max_page_order <= 32
        and (abi.type_shift is None or abi.order_0_log2 < abi.type_shift < 64)
        and 0 < abi.stamp.order_bits <= 32
        and (abi.stamp.type_shift is None or 0 <= abi.stamp.type_shift < 64)
        and 0 < abi.stamp.magic_shift < 64
    )
    if not fits:
        raise ValueError("no kernel has such a tree geometry")


@dataclass
class _Stream(Generic[C]):
    """A stored stream; each iteration reads it anew."""

    read: Callable[[], Iterator[C]]

    def __iter__(self) -> Iterator[C]:
        return self.read()


class _Archive:
    """A zip that is not believed."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._name = name
        self.abi: Abi | None = None
        self.chunks: dict[str, int] = {}
        with self.damage():
            self._zip = zipfile.ZipFile(file)

    @contextlib.contextmanager
    def damage(self) -> Iterator[None]:
        """Whatever zipfile, numpy or msgspec say of bad bytes becomes one clear line."""
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
                f"{self._name}: not a whole snapshot file ({error or type(error).__name__})",
                "take the snapshot again, or copy the file again",
            ) from error

    def member(self, name: str) -> bytes:
        with self.damage():
            if self._zip.getinfo(name).compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise ValueError(f"{name} is not compressed as khoscope does")
        with self.damage(), self._zip.open(name) as file:
            data = file.read(MEMBER_LIMIT + 1)
            if len(data) > MEMBER_LIMIT:
                raise ValueError(f"{name} is larger than any chunk")
            return data

    def blobs(self, side: str, names: list[str]) -> dict[str, bytes]:
        members = {blob: f"{side}/blobs/{i:06d}.bin" for i, blob in enumerate(names)}
        with self.damage():
            if sum(self._zip.getinfo(m).file_size for m in members.values()) > BLOBS_SIZE:
                raise ValueError("more blobs than khoscope keeps")
        return {blob: self.member(member) for blob, member in members.items()}

    def array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
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
            # Python's integers: a shape that overflows 64 bits is no match either.
            size = np.dtype(dtype).itemsize * math.prod(found)
            if size != len(values):
                raise ValueError(f"{name}: {len(values)} bytes, not {size}")
            return np.frombuffer(values, dtype).reshape(found)

    def stream(self, name: str, kind: type[C], sorted_by: str | None = None) -> Iterable[C]:
        if kind is Leaves:
            sorted_by = "key"
        return _Stream(lambda: self._chunks(name, kind, sorted_by))

    def _chunks(self, name: str, kind: type[C], order: str | None) -> Iterator[C]:
        last = -1
        for i in range(self.chunks.get(name, 0)):
            chunk = self._columns(f"{name}/{i:06d}.", kind)
            with self.damage():
                if order is not None:
                    column = getattr(chunk, order)
                    if (
                        not len(column)
                        or int(column[0]) <= last
                        or (column[1:] <= column[:-1]).any()
                    ):
                        raise ValueError(f"{name}: not in order of {order}")
                    last = int(column[-1])
                    mask = np.uint64(self.abi.leaf_bits - 1 if self.abi else 0)
                    if isinstance(chunk, Leaves) and (column & mask).any():
                        raise ValueError(f"{name}: no leaf begins at such a key")
            yield chunk

    def _columns(self, prefix: str, kind: type[C]) -> C:
        columns: dict[str, Any] = {}
        length: int | None = None
        for column, dtype in kind.DTYPES.items():
            shape: tuple[int | None, ...] = (length,)
            if column == "bitmap" and self.abi is not None:
                shape = (length, self.abi.page_size)
            columns[column] = self.array(f"{prefix}{column}", dtype, shape)
            length = len(columns[column])
        if kind is Blocks:
            columns["pages"] = self._columns(f"{prefix}pages.", Pages)
            with self.damage():
                if len(columns["pages"]) != length:
                    raise ValueError(f"{prefix}: columns differ in length")
                order, types = columns["order"], columns["type"]
                highest = self.abi.order_0_log2 if self.abi else 0
                known = (order <= highest) | (order == BAD_ORDER)
                if not (known & (NO_TYPE <= types) & (types <= KHO_PAGE_SPLIT)).all():
                    raise ValueError(f"{prefix}: no block has such an order or type")
        return kind(**columns)
