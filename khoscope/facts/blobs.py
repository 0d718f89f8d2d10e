# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The blobs of a side, decoded: KHO's root FDT and what its subtrees lead to.

This module reads no memory: a Snapshot holds the blobs as they were.  A blob that is unknown, or of
another version, stays bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

import numpy as np

from ..abi import serialized
from ..abi.fdt import MAGIC, DeviceTree, Node, Problems, Property, Unreadable, read
from ..abi.kho_fdt import Subtree
from ..abi.serialized import KHO_VMALLOC, KHO_VMALLOC_FLAGS
from .clients import Vmalloc
from .snapshot import Side, Snapshot, in_ram
from .tree import KeySet

#: How many bytes of FDTs are decoded for all subtrees together: a hostile FDT takes long.
DECODED: Final = 4 << 20

#: Counts are numbers, addresses and patterns of bits are "0x…", structures are dicts.
Value = int | str | list[str] | dict[str, "Value"]

_U32: Final = np.dtype("<u4")
_U64: Final = np.dtype("<u8")

#: Properties of the root FDT, in CPU byte order (abi/kexec_handover.h).
_ROOT: Final[Mapping[str, np.dtype[Any]]] = {
    "preserved-memory-map": _U64,
    "preserved-data": _U64,
    "blob-size": _U64,
}
#: Properties of FDTs by the compatible of their root, in CPU byte order.
_PROPERTIES: Final[Mapping[str, Mapping[str, np.dtype[Any]]]] = {
    serialized.MEMBLOCK_COMPATIBLE: {"start": _U64, "size": _U64},
    serialized.KHO_TEST_COMPATIBLE: {
        "magic": _U32,
        "nr_folios": _U32,
        "folios_info": KHO_VMALLOC,
        "csum": _U32,
    },
    serialized.LUO_FDT_COMPATIBLE: {
        serialized.LUO_FDT_LIVEUPDATE_NUM: _U64,
        serialized.LUO_FDT_SESSION[2]: _U64,
        serialized.LUO_FDT_FLB[2]: _U64,
    },
}
#: Members that are not counts but addresses or patterns of bits.
_HEX: Final = frozenset(
    {
        "preserved-memory-map",
        "preserved-data",
        "start",
        "magic",
        "csum",
        "first",
        "sessions_pa",
        "flbs_pa",
        serialized.LUO_FDT_SESSION[2],
        serialized.LUO_FDT_FLB[2],
    }
)


class BlobKind(StrEnum):
    """What a blob is."""

    ROOT = "KHO root FDT"
    FDT = "FDT"
    LUO = "struct luo_ser"
    KEXEC_METADATA = "struct kho_kexec_metadata"
    UNKNOWN = "unknown"


#: Structures by the names of their subtrees: kind, layout, the member that says which version it
#: is, and the version that is known.
_STRUCTURES: Final[Mapping[str, tuple[BlobKind, np.dtype[Any], str, Value]]] = {
    serialized.LUO: (BlobKind.LUO, serialized.LUO_SER, "compatible", serialized.LUO_COMPATIBLE),
    serialized.KEXEC_METADATA: (
        BlobKind.KEXEC_METADATA,
        serialized.KHO_KEXEC_METADATA,
        "version",
        serialized.KEXEC_METADATA_VERSION,
    ),
}


@dataclass(frozen=True)
class Area:
    """
    A ``struct kho_vmalloc`` in a blob.

    :param where: path of the property that holds it.
    :param chain: what it leads to; None: not followed.
    """

    where: str
    decoded: dict[str, Value]
    chain: Vmalloc | None


@dataclass(frozen=True)
class Blob:
    """
    A blob.

    :param name: of the subtree; None: the root FDT.
    :param phys: ``phys_addr_t``; None: not known.
    :param size: bytes; None: not known.
    :param raw: as far as it was kept; None: not at all.
    :param preserved: whether preserved blocks hold all of it; None: that is not known.
    :param fields: of the structure that it is.
    :param tree: the FDT that it is.
    :param values: what the FDT's properties mean, by their offsets.
    :param areas: each vmalloc area that it describes.
    """

    name: str | None
    phys: int | None
    size: int | None
    raw: bytes | None
    preserved: bool | None
    kind: BlobKind = BlobKind.UNKNOWN
    fields: dict[str, Value] | None = None
    tree: DeviceTree | None = None
    values: dict[int, Value] = field(default_factory=dict)
    areas: list[Area] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Blobs:
    """
    The blobs of a side of a snapshot.

    :param outgoing: it is the outgoing side.  The tree of the incoming side is only evidence:
        memory that it does not hold may still have been preserved.
    """

    def __init__(self, facts: Snapshot, side: Side, outgoing: bool) -> None:
        self._facts = facts
        self._side = side
        self._outgoing = outgoing
        self._keys = KeySet(facts.abi, side.tree.leaves)
        self._times = Counter(subtree.name for subtree in side.fdt.subtrees)

    def root(self) -> Blob:
        """The root FDT."""
        fdt, raw = self._side.fdt, self._side.blobs.get("fdt")
        try:
            tree = None if raw is None else read(raw)
        except Unreadable:
            # ``problems`` says so.
            tree = None
        size = None if raw is None else len(raw)
        return Blob(
            None,
            fdt.phys or None,
            tree.size if tree else size,
            raw[: tree.size] if raw and tree else raw,
            self._preserved(fdt.phys or None, size),
            BlobKind.ROOT,
            tree=tree,
            values=_values(tree.root, _ROOT) if tree else {},
            problems=list(fdt.problems),
        )

    def names(self) -> list[str]:
        """The names of the subtrees, in the root FDT's order."""
        return [subtree.name for subtree in self._side.fdt.subtrees]

    def subtrees(self) -> Iterator[Blob]:
        """The blobs of all subtrees, in the root FDT's order."""
        return map(self._subtree, self._side.fdt.subtrees)

    def subtree(self, name: str) -> Blob:
        """
        A subtree's blob.

        :param name: one of :meth:`names`.
        """
        return self._subtree(self._side.fdt.subtrees[self.names().index(name)])

    def _subtree(self, subtree: Subtree) -> Blob:
        raw, problems = self._raw(subtree)
        blob = Blob(
            subtree.name,
            subtree.phys,
            subtree.size,
            raw,
            self._preserved(subtree.phys, subtree.size),
            problems=problems,
        )
        return blob if raw is None else self._decode(blob, raw)

    def _raw(self, subtree: Subtree) -> tuple[bytes | None, list[str]]:
        """The bytes that were kept of a subtree's blob, and why some are missing."""
        phys, size = subtree.phys, subtree.size
        if phys is None or size is None:
            return None, ["the root FDT does not say where it is, or how large"]
        if size == 0:
            return None, ["empty: blob-size is 0"]
        if self._times[subtree.name] > 1:
            return None, ["not the only subtree of this name: which bytes are whose is not known"]
        raw = self._side.blobs.get(f"subtree {subtree.name}")
        if raw is None:
            return None, [
                "it could not be read"
                if in_ram(self._facts.ram, phys, size)
                else "it is not in RAM: not read"
            ]
        if len(raw) < size:
            return raw, [f"only the first {len(raw):,} of {size:,} bytes were kept"]
        return raw, []

    @cached_property
    def _decoded(self) -> frozenset[str]:
        """The subtrees whose FDTs are decoded: the first ones, as far as DECODED reaches."""
        names: list[str] = []
        left = DECODED
        for subtree in self._side.fdt.subtrees:
            raw = self._side.blobs.get(f"subtree {subtree.name}")
            if raw is None or self._times[subtree.name] > 1 or not _is_fdt(subtree.name, raw):
                continue
            left -= len(raw)
            if left < 0:
                break
            names.append(subtree.name)
        return frozenset(names)

    def _preserved(self, phys: int | None, size: int | None) -> bool | None:
        if phys is None or not size:
            return None
        covered = self._keys.covers(phys, size)
        return covered if covered or self._outgoing else None

    def _decode(self, blob: Blob, raw: bytes) -> Blob:
        if _is_fdt(blob.name, raw):
            if blob.name in self._decoded:
                return self._fdt(blob, raw)
            problem = f"not decoded: more than {DECODED >> 20} MiB of FDTs in all"
            return replace(blob, problems=[*blob.problems, problem])
        known = _STRUCTURES.get(blob.name or "")
        return _structure(blob, raw, known) if known else blob

    def _fdt(self, blob: Blob, raw: bytes) -> Blob:
        try:
            tree = read(raw)
        except Unreadable as error:
            return replace(blob, problems=[*blob.problems, f"not a readable FDT ({error})"])
        found = tree.root.property("compatible")
        compatible = "" if found is None else serialized.text(found.value)
        known = _PROPERTIES.get(compatible, {})
        odd = Problems()
        for each in _odd(tree.root, known):
            odd.add(each)
        problems = [*blob.problems, *tree.problems, *odd.all()]
        if not known and blob.name in (serialized.MEMBLOCK, serialized.KHO_TEST):
            problems.append(f"compatible {compatible!r} is not known: values as they stand")
        return replace(
            blob,
            kind=BlobKind.FDT,
            tree=tree,
            values=_values(tree.root, known),
            areas=list(self._areas(tree.root, known)),
            problems=problems,
        )

    def _areas(self, root: Node, known: Mapping[str, np.dtype[Any]]) -> Iterator[Area]:
        for path, found in _properties(root):
            if known.get(found.name) == KHO_VMALLOC == _layout(known, found):
                desc = serialized.unpack(KHO_VMALLOC, found.value)
                chain = self._chains.get((int(desc["first"]), int(desc["total_pages"])))
                yield Area(path, fields(KHO_VMALLOC, found.value), chain)

    @cached_property
    def _chains(self) -> dict[tuple[int, int], Vmalloc]:
        """The vmalloc areas that were followed, by where they begin and their pages."""
        first_comes_last = reversed(self._side.vmallocs)
        return {(chain.first, chain.total_pages): chain for chain in first_comes_last}


def _is_fdt(name: str | None, raw: bytes) -> bool:
    # Show every FDT as one, whatever its name: up to Linux 7.1, LUO's blob is an FDT.
    return raw.startswith(MAGIC) or name in (serialized.MEMBLOCK, serialized.KHO_TEST)


def fields(layout: np.dtype[Any], raw: bytes) -> dict[str, Value]:
    """The members of the structure at the beginning of some bytes."""
    record = serialized.unpack(layout, raw)
    found: dict[str, Value] = {}
    for name in layout.names or ():
        value = record[name].item()
        if isinstance(value, bytes):
            found[name] = serialized.text(value)
        elif name == "flags":
            found[name] = serialized.bits(value, KHO_VMALLOC_FLAGS)
        else:
            found[name] = _number(name, value)
    return found


def _structure(blob: Blob, raw: bytes, known: tuple[BlobKind, np.dtype[Any], str, Value]) -> Blob:
    kind, layout, version, supported = known
    if len(raw) < layout.itemsize:
        problem = f"{len(raw)} bytes are no {kind}: that has {layout.itemsize}"
        return replace(blob, problems=[*blob.problems, problem])
    found = fields(layout, raw)
    if found[version] != supported:
        problem = f"{version} is {found[version]!r}, only {supported!r} is known: not decoded"
        return replace(blob, problems=[*blob.problems, problem])
    return replace(blob, kind=kind, fields=found)


def _properties(node: Node, path: str = "") -> Iterator[tuple[str, Property]]:
    """All properties of a tree, with their paths."""
    for found in node.properties:
        yield f"{path}/{found.name}", found
    for child in node.children:
        yield from _properties(child, f"{path}/{child.name}")


def _layout(known: Mapping[str, np.dtype[Any]], found: Property) -> np.dtype[Any] | None:
    """What a property holds; None: not known, or it has another length."""
    layout = known.get(found.name)
    return layout if layout is not None and layout.itemsize == len(found.value) else None


def _odd(root: Node, known: Mapping[str, np.dtype[Any]]) -> Iterator[str]:
    """Known properties whose values have the wrong length."""
    for path, found in _properties(root):
        layout = known.get(found.name)
        if layout is not None and layout.itemsize != len(found.value):
            yield f"property {path!r} has {len(found.value)} bytes, not {layout.itemsize}"


def _values(root: Node, known: Mapping[str, np.dtype[Any]]) -> dict[int, Value]:
    """What properties mean, by their offsets."""
    values = {found.offset: _value(known, found) for _, found in _properties(root)}
    return {offset: value for offset, value in values.items() if value is not None}


def _value(known: Mapping[str, np.dtype[Any]], found: Property) -> Value | None:
    layout = _layout(known, found)
    if layout is None:
        return _guess(found.value)
    if layout.names:
        return fields(layout, found.value)
    return _number(found.name, int.from_bytes(found.value, "little"))


def _guess(raw: bytes) -> Value | None:
    """
    What an unknown value looks like: strings as dtc recognises them, or a number of 4 or 8 bytes,
    in CPU byte order like all numbers of KHO.
    """
    parts = raw[:-1].split(b"\0")
    if raw.endswith(b"\0") and all(part and part.isascii() for part in parts):
        texts = [part.decode("ascii") for part in parts]
        if all(text.isprintable() for text in texts):
            return texts if len(texts) > 1 else texts[0]
    if len(raw) in (4, 8):
        return f"{int.from_bytes(raw, 'little'):#x}"
    return None


def _number(name: str, value: int) -> Value:
    return f"{value:#x}" if name in _HEX else value
