# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The snapshot file: a zip (:mod:`.archive`) of ``meta.json``, ``.npy`` columns and raw blobs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Generic, TypeVar

import numpy as np

from ..abi.compatibles import OF_XARRAYS, block_limits
from ..abi.keys import U64, Abi, Tracker
from ..abi.kho_fdt import Fdt, root_fdt
from ..words.errors import KhoscopeError
from . import budget, contents, invariants, listed
from .archive import SNAPSHOT, Archive, Writer
from .by_address import gathered
from .clients import Claims, Luo, LuoState, Owner, Vmalloc
from .columns import CHUNK_BLOCKS, Blocks, Columns, Leaves, Nodes
from .contents import Recorded
from .files import NewFile, open_file, temporary
from .listed import Lists
from .services import Services
from .snapshot import (
    Handover,
    Kernel,
    KexecImage,
    Memory,
    Node,
    Provenance,
    Scan,
    ScratchSetup,
    ScratchUse,
    Side,
    Snapshot,
    Watched,
)
from .tree import Tree, TreeState

#: Files of this schema may lack the streams of claims.
FIRST_SCHEMA: Final = f"{SNAPSHOT.name}/1"

#: The root FDT that a source gives if the kernel has none.
NO_FDT: Final = Fdt(0, problems=["there is none"])


C = TypeVar("C", bound=Columns)
T = TypeVar("T", Abi, Kernel, LuoState)


@dataclass(frozen=True)
class _SideMeta:
    fdt: Fdt
    tree: TreeState
    blobs: list[str]
    luo: Luo | None = None
    vmallocs: list[Vmalloc] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    serialized: TreeState | None = None
    #: Pieces that follow each of the lists above.
    lists: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Meta:
    schema: str
    taken: Provenance
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
    #: Of streams that were not written in order of key: the numbers of their chunks in that order.
    by_key: dict[str, list[int]] = field(default_factory=dict)
    scratch_free: list[int | None] = field(default_factory=list)
    image: KexecImage | None = None
    liveupdate: LuoState | None = None
    #: First and last-plus-one address of each range, as in ``ram``.
    offline: list[list[int]] | None = None
    unreadable: list[str] = field(default_factory=list)
    finalized: bool | None = None
    nodes: list[Node] | None = None
    crash_image: KexecImage | None = None
    scratch_setup: ScratchSetup | None = None
    scratch_use: list[ScratchUse] = field(default_factory=list)
    memory: Memory | None = None
    contents: list[Recorded] = field(default_factory=list)
    services: Services | None = None


#: Members that files of version 1 to 6 lack: khoscope did not look into files, not even systemd's,
#: and did not ask systemd.  Only a gate asks who holds a session.
UNRECORDED_6: Final[dict[str, str]] = {
    "_Meta.contents": "",
    "LuoFile.stored": "",
    "LuoSession.stored": "",
    "LuoSession.notes": "",
    "LuoState.holders": "",
    "_Meta.services": "",
}
#: Members that files of version 1 to 5 lack: all of their chunks are in order of key.
UNRECORDED_5: Final[dict[str, str]] = {**UNRECORDED_6, "_Meta.by_key": ""}
#: Members that files of version 1 to 4 lack: khoscope looked at fewer sessions and files, and told
#: of the others as problems.
UNRECORDED_4: Final[dict[str, str]] = {
    **UNRECORDED_5,
    "_SideMeta.lists": "",
    "Luo.left_out": "",
    "LuoSession.left_out": "",
}
#: Members that files of version 1 to 3 lack.  Only rules about what KHO costs need them, and they
#: are about the present.
UNRECORDED_3: Final[dict[str, str]] = {
    **UNRECORDED_4,
    "_Meta.scratch_setup": "",
    "_Meta.scratch_use": "",
    "_Meta.memory": "",
    "LuoState.in_use": "",
}
#: Members that files of version 1 and 2 lack: those who wrote them refused any kernel whose KHO is
#: older than the radix tree, and looked at no sections.  The verdict names the NUMA nodes where
#: there may be several.
UNRECORDED_2: Final[dict[str, str]] = {
    **UNRECORDED_3,
    "Abi.tracker": "",
    "Abi.preserve_bits": "",
    "Abi.finalize": "",
    "Abi.restores_pages_as": "",
    "_SideMeta.serialized": "",
    "_Meta.finalized": "",
    "_Meta.offline": "which memory is offline",
    "_Meta.nodes": "",
    # What was recorded of the kernel tells its limits.
    "Abi.limits": "",
    # Radix kernels hand crash kernels nothing, but for release candidates of linux 7.1.
    "_Meta.crash_image": "",
}
#: Members that files of version 1 may lack, since khoscope 0.1.0 recorded them only later: class
#: and member, and what the verdict then names as not recorded; "": no rule needs it.
UNRECORDED_1: Final[dict[str, str]] = {
    **UNRECORDED_2,
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
#: Members that any file may lack: the bytes of the FDT say the same.
DERIVED: Final = {f"Fdt.{f.name}": "" for f in dataclasses.fields(Fdt) if f.name != "phys"}


class _Parts:
    """
    What of a snapshot is written into a zip.

    :param lists: also what its clients hand over, and the owners: their lists may be long.
    """

    def __init__(self, writer: Writer, lists: bool = True) -> None:
        self._writer = writer
        self._with_lists = lists
        self._chunks: dict[str, int] = {}
        self._by_key: dict[str, list[int]] = {}
        #: What was written of each side's lists.
        self._lists: dict[str, tuple[Lists, dict[str, int]]] = {}
        self._contents: list[Recorded] = []

    def put(self, snapshot: Snapshot) -> None:
        """Write all that may be large, reading each stream once."""
        self._writer.array("ram", snapshot.ram)
        self._writer.array("scratch", snapshot.scratch)
        self._side("out", snapshot.outgoing)
        if snapshot.incoming is not None:
            self._side("in", snapshot.incoming)
        self._stream("stamps", snapshot.stamps)
        self._blocks("watched", snapshot.watched)
        self._stream("evidence", snapshot.evidence)
        self._contents = contents.put(self._writer, snapshot.contents)

    def _side(self, name: str, side: Side) -> None:
        self._stream(f"{name}/nodes", side.tree.nodes)
        self._stream(f"{name}/leaves", side.tree.leaves)
        self._blocks(f"{name}/blocks", side.blocks)
        self._stream(f"{name}/claims", side.claims)
        if side.serialized is not None:
            self._stream(f"{name}/serialized/nodes", side.serialized.nodes)
            self._stream(f"{name}/serialized/leaves", side.serialized.leaves)
        for i, blob in enumerate(side.blobs.values()):
            self._writer.member(f"{name}/blobs/{i:06d}.bin", blob[: budget.BLOB])
        self._lists[name] = listed.NOTHING, {}
        if self._with_lists:
            self._lists[name] = listed.put(self._writer, name, _lists(side))

    def _stream(self, name: str, stream: Iterable[Columns]) -> None:
        self._chunks[name] = self._writer.stream(name, stream)

    def _blocks(self, name: str, stream: Iterable[Blocks]) -> None:
        first: list[int] = []

        def noted() -> Iterator[Blocks]:
            for chunk in gathered(stream):
                first.append(int(chunk.key[0]))
                yield chunk

        self._stream(name, noted())
        numbers = sorted(range(len(first)), key=first.__getitem__)
        if numbers != [*range(len(first))]:
            self._by_key[name] = numbers

    def finish(self, snapshot: Snapshot) -> None:
        """
        Write the rest.

        :param snapshot: the same one, with what is known only after its streams were read.
        """
        incoming = snapshot.incoming
        meta = _Meta(
            SNAPSHOT.schema,
            snapshot.taken,
            snapshot.kernel,
            snapshot.abi,
            snapshot.kho_enable,
            snapshot.handover,
            self._side_meta("out", snapshot.outgoing),
            None if incoming is None else self._side_meta("in", incoming),
            snapshot.scan,
            snapshot.watching,
            self._chunks,
            self._by_key,
            snapshot.scratch_free,
            snapshot.image,
            snapshot.liveupdate,
            None if snapshot.offline is None else snapshot.offline.tolist(),
            snapshot.unreadable,
            snapshot.finalized,
            snapshot.nodes,
            snapshot.crash_image,
            snapshot.scratch_setup,
            snapshot.scratch_use,
            snapshot.memory,
            self._contents,
            snapshot.services,
        )
        self._writer.json("meta.json", meta)

    def _side_meta(self, name: str, side: Side) -> _SideMeta:
        begun, pieces = self._lists[name]
        return _SideMeta(
            side.fdt,
            side.tree.state,
            list(side.blobs),
            begun.luo,
            begun.vmallocs,
            begun.owners,
            side.serialized.state if side.serialized is not None else None,
            pieces,
        )


def write_snapshot(snapshot: Snapshot, writer: Writer) -> None:
    """Write a snapshot, reading each of its streams once."""
    parts = _Parts(writer)
    parts.put(snapshot)
    parts.finish(snapshot)


def _lists(side: Side) -> Lists:
    return Lists(side.luo, side.vmallocs, side.owners)


class Draft(contextlib.AbstractContextManager["Draft"]):
    """
    A snapshot that is written as a zip of its own while it is read from a kernel.

    :param file: takes it in place of what is there, and says itself what is wrong with it
        (:func:`.telling`); None: a temporary file does.
    """

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file or temporary()
        # The lists are in memory, and stay there if nobody else is to read the file.
        self._lists = file is not None
        self._zip: zipfile.ZipFile | None = None

    def __exit__(self, *_: object) -> None:
        self._drop()

    def _drop(self) -> None:
        """Close what was not finished: it would try to finish itself when it is collected."""
        if self._zip is not None:
            # The disk is full, or it was interrupted in the middle of a member.
            with contextlib.suppress(KhoscopeError, ValueError):
                self._zip.close()

    def put(self, snapshot: Snapshot) -> None:
        """Write all that may be large, reading each stream once, in place of what was put."""
        self._drop()
        self._file.seek(0)
        self._file.truncate()
        self._zip = zipfile.ZipFile(self._file, "w")
        self._parts = _Parts(Writer(self._zip), self._lists)
        self._parts.put(snapshot)

    def finish(self, snapshot: Snapshot) -> Snapshot:
        """
        The same facts, read back from the file.

        :param snapshot: what was put, with what is known only after its streams were read.
        """
        assert self._zip is not None, "nothing was put"
        self._parts.finish(snapshot)
        self._zip.close()
        return read_snapshot(Archive(self._file, "snapshot", SNAPSHOT, ours=True), snapshot)

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """Put and finish a snapshot that is read from this very file."""
        with Draft() as other:
            other.put(snapshot)
            kept = other.finish(snapshot)
            self.put(kept)
            return self.finish(kept)


def save(snapshot: Snapshot, file: IO[bytes]) -> None:
    """Write a snapshot as a zip of its own."""
    with zipfile.ZipFile(file, "w") as archive:
        write_snapshot(snapshot, Writer(archive))


def save_file(snapshot: Snapshot, path: Path) -> None:
    """
    Write a snapshot file, mode 0600, all of it or nothing.

    :raises KhoscopeError: if it cannot be written.
    """
    with NewFile(path) as new:
        with new.told():
            save(snapshot, new.file)
        new.finish()


def load_file(path: Path) -> Snapshot:
    """
    Open a snapshot file.  Its streams are read, and checked, when they are iterated.

    :raises KhoscopeError: if the file is missing, damaged, hostile or of a newer schema.
    """
    return _load(open_file(path, "name a file that `khoscope snapshot` wrote"), str(path))


def _load(file: IO[bytes], name: str) -> Snapshot:
    return read_snapshot(Archive(file, name, SNAPSHOT))


def read_snapshot(archive: Archive, spooled: Snapshot | None = None) -> Snapshot:
    """
    The snapshot that :func:`write_snapshot` wrote.

    :param spooled: has the lists, if they were not written.
    """
    may_lack = {
        1: UNRECORDED_1 | DERIVED,
        2: UNRECORDED_2 | DERIVED,
        3: UNRECORDED_3 | DERIVED,
        4: UNRECORDED_4 | DERIVED,
        5: UNRECORDED_5 | DERIVED,
        6: UNRECORDED_6 | DERIVED,
        7: DERIVED,
    }
    meta, lacking = archive.meta(SNAPSHOT, _Meta, may_lack)
    abi = _whole(meta.abi)
    if "Abi.limits" in lacking:
        abi = _with_limits(abi)
    with archive.damage():
        _check_abi(abi)
        offline = _ranges(meta.offline)
    streams = _Streams(archive, abi, meta.chunks, meta.by_key)
    wrong: list[str] = []

    def tree(name: str, state: TreeState) -> Tree:
        return Tree(state, streams.nodes(f"{name}/nodes"), streams.leaves(f"{name}/leaves"))

    def whole(name: str, of: _SideMeta) -> Lists:
        given = None if spooled is None else spooled.outgoing if name == "out" else spooled.incoming
        if given is not None:
            return _lists(given)
        found = listed.get(archive, name, Lists(of.luo, of.vmallocs, of.owners), of.lists)
        if not archive.ours:
            with archive.damage():
                listed.check(found, archive.size)
                if len(of.fdt.subtrees) > budget.SUBTREES:
                    raise ValueError("more sessions, files or subtrees than khoscope keeps")
        return found

    def side(name: str, of: _SideMeta) -> Side:
        blobs = archive.blobs(name, of.blobs)
        fdt = _derived(of.fdt, blobs)
        if not _same(of.fdt, fdt):
            wrong.append(f"{name}: its root FDT's bytes say something else than what is recorded")
        lists = whole(name, of)
        return Side(
            fdt,
            tree(name, of.tree),
            blobs,
            streams.blocks(f"{name}/blocks", "key"),
            lists.luo,
            lists.vmallocs,
            lists.owners,
            streams.claims(f"{name}/claims", len(lists.owners)),
            None if of.serialized is None else tree(f"{name}/serialized", of.serialized),
        )

    said = {(UNRECORDED_1 | DERIVED)[member]: member for member in lacking}
    if not abi.has_types:
        said.pop(UNRECORDED_1["Abi.key_width"], None)
    facts = Snapshot(
        meta.taken,
        _whole(meta.kernel),
        abi,
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
        None if meta.liveupdate is None else _whole(meta.liveupdate),
        offline,
        meta.unreadable,
        sorted(what for what in said if what),
        finalized=meta.finalized,
        nodes=meta.nodes,
        crash_image=meta.crash_image,
        scratch_setup=meta.scratch_setup,
        scratch_use=meta.scratch_use,
        memory=meta.memory,
        contents=contents.get(archive, meta.contents),
        services=meta.services,
    )
    _check_members(archive, meta)
    if not archive.ours:
        with archive.damage():
            _check_memory(facts)
    wrong += [*invariants.contradictions(facts), *invariants.of_scan(facts)]
    return dataclasses.replace(facts, contradictions=wrong)


def _with_limits(abi: Abi) -> Abi:
    """What khoscope would have recorded, had it known of limits."""
    compatible = abi.compatible if abi.tracker == Tracker.RADIX else OF_XARRAYS
    limits = block_limits(compatible, abi.max_page_order)
    return dataclasses.replace(abi, limits=limits)


def _whole(decoded: T) -> T:
    """
    The same with members of its own: msgspec leaves those that a file lacks to the class, and does
    not write them again.
    """
    return dataclasses.replace(decoded)


def _ranges(listed: list[list[int]] | None) -> U64 | None:
    """Ranges of memory; refuses what is none."""
    if listed is None:
        return None
    if any(len(each) != 2 for each in listed):
        raise ValueError("a range of offline memory has a beginning and an end")
    return np.array(listed, np.uint64).reshape(-1, 2)


def _derived(recorded: Fdt, blobs: dict[str, bytes]) -> Fdt:
    """What the bytes of a root FDT say, whatever was recorded of them."""
    return root_fdt(recorded.phys, blobs) if recorded.phys else NO_FDT


def _same(recorded: Fdt, derived: Fdt) -> bool:
    """Compare all but the problems: every khoscope tells those in its own words."""
    return dataclasses.replace(recorded, problems=[]) == dataclasses.replace(derived, problems=[])


def _check_memory(facts: Snapshot) -> None:
    """Refuse memory that no machine has."""
    if len(facts.ram) > budget.RAM_RANGES or len(facts.scratch) > budget.SCRATCH:
        raise ValueError("more ranges of RAM or scratch areas than any machine has")
    if len(facts.scratch_use) > budget.SCRATCH:
        raise ValueError("the use of more scratch areas than any machine has")
    if len(facts.ram) and int(facts.ram.max()) > budget.ADDRESSES:
        raise ValueError(f"RAM at {int(facts.ram.max()):#x}, where no processor has any")
    nodes = facts.nodes or []
    if len(nodes) > budget.NODES or max((n.end for n in nodes), default=0) > budget.ADDRESSES:
        raise ValueError("more NUMA nodes than any machine has, or in no memory")
    memory = facts.memory
    if memory is not None and (
        len(memory.zones) > budget.ZONES
        or not 0 <= memory.block_order <= 32
        or any(not 0 <= zone.start <= zone.end <= budget.ADDRESSES for zone in memory.zones)
    ):
        raise ValueError("more zones than any machine has, in no memory, or of absurd page blocks")


def _check_members(archive: Archive, meta: _Meta) -> None:
    """Require that ``meta.json`` counts each member and each stream."""
    sides = {"out": meta.outgoing} | ({"in": meta.incoming} if meta.incoming else {})
    streams = [f"{side}/{kind}" for side in sides for kind in ("nodes", "leaves", "blocks")]
    for side, of in sides.items():
        if of.serialized is not None:
            streams += [f"{side}/serialized/nodes", f"{side}/serialized/leaves"]
    streams += ["stamps", "watched", "evidence"]
    claims = [f"{side}/claims" for side in sides]
    counted = meta.chunks.keys()
    with archive.damage():
        if not {*streams} <= counted <= {*streams, *claims} or (
            meta.schema != FIRST_SCHEMA and not {*claims} <= counted
        ):
            raise ValueError("meta.json does not count the chunks of each stream")
        for name, numbers in meta.by_key.items():
            count = meta.chunks.get(name)
            if len(numbers) != count or sorted(numbers) != [*range(count)]:
                raise ValueError(f"{name}: not all of its chunks are in order")
    blobs = {
        f"{side}/blobs": len(of.blobs)
        for side, of in (("out", meta.outgoing), ("in", meta.incoming))
        if of is not None
    }
    pieces = {f"{side}/{kind}": n for side, of in sides.items() for kind, n in of.lists.items()}
    of_files = {contents.folder(i): each.pieces for i, each in enumerate(meta.contents)}
    counts = {**meta.chunks, **blobs, **pieces, **of_files}
    archive.require_members({"ram.npy", "scratch.npy", "meta.json"}, counts)


def _check_abi(abi: Abi) -> None:
    """Refuse a geometry that would make khoscope reserve absurd amounts of memory."""
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
        and (abi.limits.size is None or abi.page_size < abi.limits.size < 1 << 64)
        and (abi.limits.order is None or abi.limits.order <= 32)
        and 0 < abi.stamp.order_bits <= 32
        and (abi.stamp.type_shift is None or 0 <= abi.stamp.type_shift < 64)
        and (abi.stamp.magic_shift is None or 0 < abi.stamp.magic_shift < 64)
        and (abi.preserve_bits is None) == (abi.tracker == Tracker.RADIX)
        and (abi.preserve_bits is None or abi.preserve_bits in (1 << 12, abi.leaf_bits))
    )
    if not fits:
        raise ValueError("no kernel has such a tree geometry")


@dataclass(frozen=True)
class _Streams:
    """
    The streams of a stored snapshot.

    :param chunks: how many each has.
    :param by_key: as in :class:`_Meta`.
    """

    archive: Archive
    abi: Abi
    chunks: dict[str, int]
    by_key: dict[str, list[int]]

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
            return self.archive.blocks(at, highest, most=most)

        return self._stream(name, read, sorted_by)

    def claims(self, name: str, owners: int) -> Iterable[Claims]:
        def read(at: str) -> Claims:
            claims = Claims(**self.archive.columns(at, Claims))
            with self.archive.damage():
                if (claims.owner >= owners).any():
                    raise ValueError(f"{name}: a claim of nobody")
            return claims

        return self._stream(name, read)

    def _stream(
        self, name: str, read: Callable[[str], C], order: str | None = None
    ) -> _StoredChunks[C]:
        numbers = self.by_key.get(name, range(self.chunks.get(name, 0)))
        return _StoredChunks(self.archive, name, numbers, read, order)


@dataclass(frozen=True)
class _StoredChunks(Generic[C]):
    """
    A stored stream; its chunks are read anew whenever they are asked for.

    :param numbers: of its chunks, in their order.
    :param read: reads the members whose names begin so.
    :param order: the column by which it is sorted; None: it is not.
    """

    archive: Archive
    name: str
    numbers: Sequence[int]
    read: Callable[[str], C]
    order: str | None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> C:
        return self._chunk(self.numbers[at])

    def _chunk(self, number: int) -> C:
        chunk = self.read(f"{self.name}/{number:06d}.")
        if self.order is not None:
            column = getattr(chunk, self.order)
            self._require(len(column) > 0 and not (column[1:] <= column[:-1]).any())
        return chunk

    def __iter__(self) -> Iterator[C]:
        last = -1
        for chunk in map(self._chunk, self.numbers):
            if self.order is not None:
                column = getattr(chunk, self.order)
                self._require(int(column[0]) > last)
                last = int(column[-1])
            yield chunk

    def _require(self, sorted: bool) -> None:
        with self.archive.damage():
            if not sorted:
                raise ValueError(f"{self.name}: not in order of {self.order}")
