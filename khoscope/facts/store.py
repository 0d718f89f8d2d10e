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
import functools
import io
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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

from ..abi.keys import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, Abi
from ..abi.kho_fdt import Fdt, parse_root_fdt
from ..words.errors import KhoscopeError
from . import budget, invariants
from .clients import Claims, Liveupdate, Luo, Owner, Vmalloc
from .columns import CHUNK_BLOCKS, Blocks, Columns, Leaves, Nodes, Pages
from .files import NewFile, open_file
from .snapshot import (
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
    2,
    "snapshot file",
    "take the snapshot again, or copy the file again",
    "khoscope --snapshot FILE opens it",
)
RECORDING: Final = Format(
    "khotrace",
    2,
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

#: Snapshots up to this size stay in memory, larger ones go to an unnamed temporary file.
SPOOL_MEMORY = 64 << 20


#: As a source has it where the kernel has none.
NO_FDT: Final = Fdt(0, problems=["there is none"])

#: No column of the set has two dimensions.
NARROW: Final[Mapping[str, int]] = {}

#: The column of a chunk of claims that tells how many they are.
CLAIMED: Final = re.compile(r"/claims/[0-9]+\.phys\.npy$")
#: A member of a stream, or a blob, with its number.
NUMBERED: Final = re.compile(r"(.*)/([0-9]{6,})\.[a-z_.]+")

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


#: What files of version 1 may lack, since khoscope 0.1.0 recorded it only later: class and member,
#: and what the verdict says then; "": no rule needs it.
UNRECORDED_1: Final[dict[str, str]] = {
    "Abi.decided": "",
    "Abi.key_width": "how wide a key may be",
    "Kernel.command_line": "",
    "Kernel.page_flags": "what page flags mean",
    "Kernel.page_types": "what page types mean",
    "_SideMeta.luo": "live update sessions",
    "_SideMeta.vmallocs": "vmalloc areas",
    "_SideMeta.owners": "owners",
    "_Meta.scratch_free": "",
    "_Meta.image": "the kexec image",
    "_Meta.liveupdate": "",
    "_Meta.unreadable": "what could not be read",
}
#: What need not be in any file: the bytes of the FDT say it.
DERIVED: Final = {f"Fdt.{f.name}": "" for f in dataclasses.fields(Fdt) if f.name != "phys"}
#: Members of ``meta.json`` that may be negative: an errno.
SIGNED: Final = frozenset({"LuoFile.retrieve_status"})


class _Shape:
    """
    Whether JSON has all that a dataclass has, and nothing beyond measure.

    :param may_lack: class and member, ``Class.member``, of what need not be there.
    :raises ValueError: from :meth:`of`, with the path of what is wrong.
    """

    def __init__(self, may_lack: Collection[str]) -> None:
        self._may_lack = may_lack
        #: What of it was lacking.
        self.lacking: set[str] = set()

    def of(self, raw: Any, kind: Any, path: str, member: str = "") -> None:
        """
        Look at a value.

        :param kind: what it should be; that it is, msgspec says better.
        :param member: of which class it is.
        """
        origin, inner = get_origin(kind), get_args(kind)
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
        hints = _hints(kind)
        for f in dataclasses.fields(kind):
            member = f"{kind.__name__}.{f.name}"
            if f.name in raw:
                self.of(raw[f.name], hints[f.name], f"{path}.{f.name}".lstrip("."), member)
            elif member in self._may_lack:
                self.lacking.add(member)
            else:
                raise ValueError(f"{path}.{f.name}".lstrip(".") + " is not there")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


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
            writer.member(f"{name}/blobs/{i:06d}.bin", blob[: budget.BLOB])
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
    return _load(file, "spooled snapshot", ours=True)


def load_file(path: Path) -> Snapshot:
    """
    Open a snapshot file.  Its streams are read, and checked, when they are iterated.

    :raises KhoscopeError: if it is not there, damaged, hostile or of a newer schema.
    """
    return _load(open_file(path, "name a file that `khoscope snapshot` wrote"), str(path))


def _load(file: IO[bytes], name: str, ours: bool = False) -> Snapshot:
    return get(Archive(file, name, SNAPSHOT, ours))


def get(archive: Archive) -> Snapshot:
    """The snapshot that :func:`put` wrote."""
    meta, lacking = archive.meta(SNAPSHOT, _Meta, {1: UNRECORDED_1 | DERIVED, 2: DERIVED})
    with archive.damage():
        _check_abi(meta.abi)
        if not archive.ours:
            _check_lists(meta)
    streams = _Streams(archive, meta.abi, meta.chunks)
    wrong: list[str] = []

    def side(name: str, of: _SideMeta) -> Side:
        blobs = archive.blobs(name, of.blobs)
        fdt = _derived(of.fdt, blobs)
        if not _same(of.fdt, fdt):
            wrong.append(f"{name}: its root FDT's bytes say something else than what is recorded")
        return Side(
            fdt,
            Tree(of.tree, streams.nodes(f"{name}/nodes"), streams.leaves(f"{name}/leaves")),
            blobs,
            streams.blocks(f"{name}/blocks", "key"),
            of.luo,
            of.vmallocs,
            of.owners,
            streams.claims(f"{name}/claims", len(of.owners)),
        )

    said = {(UNRECORDED_1 | DERIVED)[member]: member for member in lacking}
    if not meta.abi.has_types:
        said.pop(UNRECORDED_1["Abi.key_width"], None)
    facts = Snapshot(
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
        sorted(what for what in said if what),
    )
    _check_members(archive, meta)
    if not archive.ours:
        with archive.damage():
            _check_memory(facts)
    return dataclasses.replace(facts, contradictions=[*wrong, *invariants.contradictions(facts)])


def _derived(recorded: Fdt, blobs: dict[str, bytes]) -> Fdt:
    """What the bytes of a root FDT say, whatever was recorded of them."""
    return parse_root_fdt(recorded.phys, blobs.get("fdt")) if recorded.phys else NO_FDT


def _same(recorded: Fdt, derived: Fdt) -> bool:
    """Problems are told in the words of whoever reads it."""
    return dataclasses.replace(recorded, problems=[]) == dataclasses.replace(derived, problems=[])


def _check_lists(meta: _Meta) -> None:
    """Refuse more than any kernel has, where each entry costs more than its room in the file."""
    for side in filter(None, (meta.outgoing, meta.incoming)):
        sessions = side.luo.sessions if side.luo else []
        entries = len(sessions) + sum(len(session.files) for session in sessions)
        if entries > budget.ENTRIES or len(side.fdt.subtrees) > budget.SUBTREES:
            raise ValueError("more sessions, files or subtrees than khoscope keeps")
        # Whatever these own is found by their names.
        files = [(session.name, file.token) for session in sessions for file in session.files]
        for named, names in (
            (len(sessions), {session.name for session in sessions}),
            (len(files), {*files}),
            (len(side.vmallocs), {area.name for area in side.vmallocs}),
        ):
            if len(names) < named:
                raise ValueError("sessions, files or vmalloc areas of one name")


def _check_memory(facts: Snapshot) -> None:
    """Refuse memory that no machine has."""
    if len(facts.ram) > budget.RAM_RANGES or len(facts.scratch) > budget.SCRATCH:
        raise ValueError("more ranges of RAM or scratch areas than any machine has")
    if len(facts.ram) and int(facts.ram.max()) > budget.ADDRESSES:
        raise ValueError(f"RAM at {int(facts.ram.max()):#x}, where no processor has any")


def _check_members(archive: Archive, meta: _Meta) -> None:
    """Each member is one of those that ``meta.json`` counts, and each stream is counted."""
    sides = ["out", *(["in"] if meta.incoming else [])]
    streams = [f"{side}/{kind}" for side in sides for kind in ("nodes", "leaves", "blocks")]
    streams += ["stamps", "watched", "evidence"]
    claims = [f"{side}/claims" for side in sides]
    counted = meta.chunks.keys()
    with archive.damage():
        if not {*streams} <= counted <= {*streams, *claims} or (
            meta.schema == SNAPSHOT.schema and not {*claims} <= counted
        ):
            raise ValueError("meta.json does not count the chunks of each stream")
    blobs = {
        f"{side}/blobs": len(of.blobs)
        for side, of in (("out", meta.outgoing), ("in", meta.incoming))
        if of is not None
    }
    archive.require_members({"ram.npy", "scratch.npy", "meta.json"}, {**meta.chunks, **blobs})


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
    :param ours: khoscope has written it just now, of a kernel: that may be of any size.
    """

    def __init__(self, file: IO[bytes], name: str, format: Format, ours: bool = False) -> None:
        self._name = name
        self._format = format
        self._prefix = ""
        self.ours = ours
        with self.damage():
            self._zip = zipfile.ZipFile(file)
            names = self._zip.namelist()
            if len({*names}) < len(names):
                raise ValueError("members of one name")
            if not ours:
                self._check_sizes(file.seek(0, os.SEEK_END))

    def _check_sizes(self, size: int) -> None:
        """Refuse what would take more memory than a file of that many bytes is worth."""
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

    def meta(
        self, format: Format, kind: type[T], may_lack: Mapping[int, Collection[str]]
    ) -> tuple[T, set[str]]:
        """
        ``meta.json``, of a schema that we know, and what of it is not there.

        :param may_lack: by version, what such a file need not have: class and member.
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
            shape = _Shape(may_lack.get(int(version), ()))
            shape.of(msgspec.json.decode(raw), kind, "")
            return msgspec.json.decode(raw, type=kind), shape.lacking

    def names(self) -> list[str]:
        """Of all members."""
        return self._zip.namelist()

    def require_members(self, names: Collection[str], numbered: Mapping[str, int]) -> None:
        """
        Refuse members that nothing tells of: whatever counts them says too little.

        :param numbered: how many there are in each folder; some may lack members.
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

    def blobs(self, side: str, names: list[str]) -> dict[str, bytes]:
        members = {blob: f"{side}/blobs/{i:06d}.bin" for i, blob in enumerate(names)}
        with self.damage():
            sizes = (self._zip.getinfo(f"{self._prefix}{m}").file_size for m in members.values())
            if sum(sizes) > budget.BLOBS:
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
        most = CHUNK_BLOCKS + self.abi.leaf_bits

        def read(at: str) -> Blocks:
            blocks = self.archive.blocks(at, highest)
            with self.archive.damage():
                if len(blocks) > most:
                    raise ValueError(f"{name}: {len(blocks):,} blocks in one chunk")
            return blocks

        return self._stream(name, read, sorted_by)

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
