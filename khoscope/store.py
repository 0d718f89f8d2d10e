# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The snapshot file: a zip of ``meta.json``, ``.npy`` columns and raw blobs.

Streams are kept chunk by chunk as ``STREAM/NNNNNN.COLUMN.npy`` and are read back the same way, so
neither side ever holds more than a chunk.  A file may come from anywhere: sizes, shapes, types
and order are checked before they are believed, and nothing is unpickled.

A recording of ``khoscope trace`` is such a file, too (:mod:`khoscope.trace.record`): what writes
and reads members is for both.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Generic, TypeVar

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .abi import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, Abi
from .clients import Claims, Liveupdate, Luo, Owner, Vmalloc
from .columns import Blocks, Columns, Leaves, Nodes, Pages
from .errors import KhoscopeError
from .files import NewFile, open_file
from .snapshot import (
    Fdt,
    Handover,
    Kernel,
    KexecImage,
    Scan,
    Side,
    Snapshot,
    Taken,
    Tree,
    TreeState,
    Watched,
)


@dataclass(frozen=True)
class Format:
    """
    A kind of file.

    :param noun: what to call one.
    :param again: what to do about one that is damaged.
    :param opened: how khoscope opens one.
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
    1,
    "snapshot file",
    "take the snapshot again, or copy the file again",
    "khoscope --snapshot FILE opens it",
)
RECORDING: Final = Format(
    "khotrace",
    1,
    "recording",
    "record the trace again, or copy the file again",
    "khoscope trace --replay FILE shows it",
)

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


#: No column of the set has two dimensions.
NARROW: Final[Mapping[str, int]] = {}

C = TypeVar("C", bound=Columns)
T = TypeVar("T")


@dataclass(frozen=True)
class _SideMeta:
    fdt: Fdt
    tree: TreeState
    blobs: list[str]
    luo: Luo | None = None
    vmallocs: list[Vmalloc] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)


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
    scratch_free: list[int | None] = field(default_factory=list)
    image: KexecImage | None = None
    liveupdate: Liveupdate | None = None
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _SchemaOnly:
    schema: str


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
        # Without a time: a zip has none before 1980, but hosts whose clock is not set do.
        info = zipfile.ZipInfo(f"{self._prefix}{name}")
        info.external_attr = 0o600 << 16
        self._zip.writestr(info, data, zipfile.ZIP_DEFLATED, compresslevel=1)

    def json(self, name: str, value: Any) -> None:
        self.member(name, msgspec.json.format(msgspec.json.encode(value), indent=1))

    def array(self, name: str, values: NDArray[Any]) -> None:
        data = io.BytesIO()
        npy.write_array(data, np.ascontiguousarray(values), allow_pickle=False)
        self.member(f"{name}.npy", data.getbuffer())

    def columns(self, prefix: str, chunk: Columns, without: Collection[str] = ()) -> None:
        """The columns of a set and of the sets in it."""
        for f in dataclasses.fields(chunk):  # type: ignore[arg-type]
            value = getattr(chunk, f.name)
            if f.name in without or value is None:
                continue
            if isinstance(value, Columns):
                self.columns(f"{prefix}{f.name}.", value)
            else:
                self.array(f"{prefix}{f.name}", value)

    def stream(self, name: str, stream: Iterable[Columns]) -> int:
        """:return: how many chunks it has."""
        count = 0
        for chunk in stream:
            self.columns(f"{name}/{count:06d}.", chunk)
            count += 1
        return count


def put(snapshot: Snapshot, writer: Writer) -> None:
    """Write a snapshot, reading each of its streams once."""
    chunks: dict[str, int] = {}

    def put_side(name: str, side: Side) -> _SideMeta:
        put_stream(f"{name}/nodes", side.tree.nodes)
        put_stream(f"{name}/leaves", side.tree.leaves)
        put_stream(f"{name}/blocks", side.blocks)
        put_stream(f"{name}/claims", side.claims)
        for i, blob in enumerate(side.blobs.values()):
            writer.member(f"{name}/blobs/{i:06d}.bin", blob[:BLOB_LIMIT])
        return _SideMeta(
            side.fdt, side.tree.state, list(side.blobs), side.luo, side.vmallocs, side.owners
        )

    def put_stream(name: str, stream: Iterable[Columns]) -> None:
        chunks[name] = writer.stream(name, stream)

    writer.array("ram", snapshot.ram)
    writer.array("scratch", snapshot.scratch)
    outgoing = put_side("out", snapshot.outgoing)
    incoming = put_side("in", snapshot.incoming) if snapshot.incoming else None
    put_stream("stamps", snapshot.stamps)
    put_stream("watched", snapshot.watched)
    put_stream("evidence", snapshot.evidence)
    meta = _Meta(
        SNAPSHOT.schema,
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
        snapshot.scratch_free,
        snapshot.image,
        snapshot.liveupdate,
        snapshot.unreadable,
    )
    writer.json("meta.json", meta)


def save(snapshot: Snapshot, file: IO[bytes]) -> None:
    """Write a snapshot as a zip of its own."""
    with zipfile.ZipFile(file, "w") as archive:
        put(snapshot, Writer(archive))


def save_file(snapshot: Snapshot, path: Path) -> None:
    """
    Write a snapshot file, mode 0600, all of it or nothing.

    :raises KhoscopeError: if it cannot be written.
    """
    with NewFile(path) as new:
        with new.told():
            save(snapshot, new.file)
        new.finish()


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
    return _load(open_file(path, "name a file that `khoscope snapshot` wrote"), str(path))


def _load(file: IO[bytes], name: str) -> Snapshot:
    return get(Archive(file, name, SNAPSHOT))


def get(archive: Archive) -> Snapshot:
    """The snapshot that :func:`put` wrote."""
    meta = archive.meta(SNAPSHOT, _Meta)
    with archive.damage():
        _check_abi(meta.abi)
    streams = _Streams(archive, meta.abi, meta.chunks)

    def side(name: str, of: _SideMeta) -> Side:
        return Side(
            of.fdt,
            Tree(of.tree, streams.nodes(f"{name}/nodes"), streams.leaves(f"{name}/leaves")),
            archive.blobs(name, of.blobs),
            streams.blocks(f"{name}/blocks", "key"),
            of.luo,
            of.vmallocs,
            of.owners,
            streams.claims(f"{name}/claims", len(of.owners)),
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
        streams.blocks("stamps", "phys"),
        meta.watching,
        streams.blocks("watched", "key"),
        streams.leaves("evidence"),
        meta.scratch_free,
        meta.image,
        meta.liveupdate,
        meta.unreadable,
    )


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
        and (abi.key_width is None or abi.order_0_log2 < abi.key_width <= 64)
        and 0 < abi.stamp.order_bits <= 32
        and (abi.stamp.type_shift is None or 0 <= abi.stamp.type_shift < 64)
        and 0 < abi.stamp.magic_shift < 64
    )
    if not fits:
        raise ValueError("no kernel has such a tree geometry")


@dataclass
class Stored(Generic[T]):
    """A stored stream; each iteration reads it anew."""

    read: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.read()


class Archive:
    """
    A zip that is not believed.

    :param format: what it should be.
    """

    def __init__(self, file: IO[bytes], name: str, format: Format) -> None:
        self._name = name
        self._format = format
        self._prefix = ""
        with self.damage():
            self._zip = zipfile.ZipFile(file)

    def under(self, folder: str) -> Archive:
        """The members whose names begin so."""
        inner = copy.copy(self)
        inner._prefix += f"{folder}/"
        return inner

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
                f"{self._name}: not a whole {self._format.noun} ({error or type(error).__name__})",
                self._format.again,
            ) from error

    def meta(self, format: Format, kind: type[T]) -> T:
        """``meta.json``, of a schema that we know."""
        raw = self.member("meta.json")
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
            return msgspec.json.decode(raw, type=kind)

    def member(self, name: str) -> bytes:
        name = f"{self._prefix}{name}"
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
            sizes = (self._zip.getinfo(f"{self._prefix}{m}").file_size for m in members.values())
            if sum(sizes) > BLOBS_SIZE:
                raise ValueError("more blobs than khoscope keeps")
        return {blob: self.member(member) for blob, member in members.items()}

    def array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """
        :param dtype: as numpy writes it; bytes of a fixed length (``|S16``) and bool are such.
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
            # Python's integers: a shape that overflows 64 bits is no match either.
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
            columns[column] = self.array(f"{prefix}{column}", dtype, (length, *wide))
            length = len(columns[column])
        return columns

    def blocks(self, prefix: str, highest: int, length: int | None = None) -> Blocks:
        """
        Blocks with the facts of their struct pages.

        :param highest: no order above this is one.
        """
        columns = self.columns(prefix, Blocks, length)
        order, types = columns["order"], columns["type"]
        pages = Pages(**self.columns(f"{prefix}pages.", Pages, len(order)))
        with self.damage():
            known = (order <= highest) | (order == BAD_ORDER)
            if not (known & (NO_TYPE <= types) & (types <= KHO_PAGE_SPLIT)).all():
                raise ValueError(f"{prefix}: no block has such an order or type")
        return Blocks(**columns, pages=pages)


@dataclass(frozen=True)
class _Streams:
    """
    The streams of a stored snapshot.

    :param chunks: how many each has.
    """

    archive: Archive
    abi: Abi
    chunks: dict[str, int]

    def nodes(self, name: str) -> Iterable[Nodes]:
        return self._stream(name, lambda at: Nodes(**self.archive.columns(at, Nodes)))

    def leaves(self, name: str) -> Iterable[Leaves]:
        width = {"bitmap": self.abi.page_size}

        def read(at: str) -> Leaves:
            leaves = Leaves(**self.archive.columns(at, Leaves, width=width))
            with self.archive.damage():
                if (leaves.key & np.uint64(self.abi.leaf_bits - 1)).any():
                    raise ValueError(f"{name}: no leaf begins at such a key")
            return leaves

        return self._stream(name, read, "key")

    def blocks(self, name: str, sorted_by: str) -> Iterable[Blocks]:
        highest = self.abi.order_0_log2
        return self._stream(name, lambda at: self.archive.blocks(at, highest), sorted_by)

    def claims(self, name: str, owners: int) -> Iterable[Claims]:
        def read(at: str) -> Claims:
            claims = Claims(**self.archive.columns(at, Claims))
            with self.archive.damage():
                if (claims.owner >= owners).any():
                    raise ValueError(f"{name}: a claim of nobody")
            return claims

        return self._stream(name, read)

    def _stream(self, name: str, read: Callable[[str], C], order: str | None = None) -> Stored[C]:
        return Stored(lambda: self._chunks(name, read, order))

    def _chunks(self, name: str, read: Callable[[str], C], order: str | None) -> Iterator[C]:
        last = -1
        for i in range(self.chunks.get(name, 0)):
            chunk = read(f"{name}/{i:06d}.")
            if order is not None:
                column = getattr(chunk, order)
                with self.archive.damage():
                    rises = len(column) and int(column[0]) > last
                    if not rises or (column[1:] <= column[:-1]).any():
                        raise ValueError(f"{name}: not in order of {order}")
                last = int(column[-1])
            yield chunk
