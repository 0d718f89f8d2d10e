# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Flattened device trees (FDT) of any kind: structure and strings are big endian, values are bytes.

The reader refuses what ``fdt_check_full`` refuses (libfdt/fdt_check.c in dtc), for the same
reasons.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

#: ``FDT_MAGIC``, as it stands in memory.
MAGIC: Final = bytes.fromhex("d00dfeed")
#: ``struct fdt_header``.
_HEADER: Final = struct.Struct(">10I")
#: ``struct fdt_reserve_entry``: address and size.
_RESERVE_ENTRY: Final = struct.Struct(">QQ")
#: The tag that begins each item of the structure block.
_TAG: Final = struct.Struct(">I")
#: ``struct fdt_property`` up to the value: tag, length, and offset of the name in the strings.
_PROPERTY: Final = struct.Struct(">III")
FDT_BEGIN_NODE: Final = 1
FDT_END_NODE: Final = 2
FDT_PROP: Final = 3
FDT_NOP: Final = 4
FDT_END: Final = 9
#: The version that kernels write: older ones keep names and values in other places.
_VERSION: Final = 17
#: No known client's state is larger.
_SIZE_LIMIT: Final = 1 << 20
#: ``FDT_MAX_DEPTH`` (drivers/of/fdt.c): the kernel's own limit of depth.
_DEPTH_LIMIT: Final = 64
#: The specification allows 31.  Properties share names, so one long name could appear many times.
_NAME_LIMIT: Final = 255
#: How many problems are kept for one FDT: paths are long, and there may be many nodes.
PROBLEMS_KEPT: Final = 256


class Unreadable(ValueError):
    """The bytes are not an FDT.  The message says why, by libfdt's name if libfdt has one."""


@dataclass(frozen=True)
class Property:
    """
    A property.

    :param name: non-ASCII bytes are escaped.
    :param offset: of the value in the FDT, bytes.
    """

    name: str
    value: bytes
    offset: int


@dataclass(frozen=True)
class Node:
    """A node.  Names and order are those of the FDT."""

    name: str
    properties: list[Property] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def property(self, name: str) -> Property | None:
        """The first property of that name, as :c:func:`fdt_getprop` finds it."""
        return next((p for p in self.properties if p.name == name), None)

    def child(self, name: str) -> Node | None:
        """The first child of that name."""
        return next((node for node in self.children if node.name == name), None)


@dataclass(frozen=True)
class DeviceTree:
    """
    An FDT.

    :param size: ``totalsize``, bytes.
    :param reserved: its memory reservations, ``phys_addr_t`` and size.
    :param problems: what no kernel would write, in words.
    """

    root: Node
    size: int
    reserved: list[tuple[int, int]]
    problems: list[str]


def read(blob: bytes) -> DeviceTree:
    """
    Read an FDT.

    :raises Unreadable: if the bytes are not an FDT, or the FDT reaches beyond them.
    """
    header = _fdt_check_header(blob)
    if header.totalsize > _SIZE_LIMIT:
        raise Unreadable(f"it says to have {header.totalsize:,} bytes")
    if header.totalsize > len(blob):
        raise Unreadable("FDT_ERR_TRUNCATED")
    problems = Problems()
    reserved = _mem_rsv(header, blob)
    root = _nodes(header, blob, problems)
    for each in _names_twice(root, ""):
        problems.add(each)
    return DeviceTree(root, header.totalsize, reserved, problems.all())


def is_too_large(blob: bytes, size: int) -> bool:
    """
    Whether :func:`read` refuses an FDT only because it reads none that large, or for want of bytes
    that were not kept.

    :param blob: its bytes, as far as they were kept.
    :param size: bytes of the memory that it is in.
    """
    if len(blob) < 8 <= size:
        return True
    return min(_SIZE_LIMIT, len(blob)) < (total_size(blob) or 0) <= size


@dataclass
class Problems:
    """The first PROBLEMS_KEPT problems, each once, and how many more there are."""

    _kept: dict[str, None] = field(default_factory=dict)
    _more: int = 0

    def add(self, problem: str) -> None:
        if len(self._kept) < PROBLEMS_KEPT:
            self._kept[problem] = None
        elif problem not in self._kept:
            self._more += 1

    def all(self) -> list[str]:
        more = [f"{self._more:,} more problems like these"] if self._more else []
        return [*self._kept, *more]


class _Header(NamedTuple):
    """``struct fdt_header``; offsets and sizes in bytes, offsets from its beginning."""

    magic: int
    totalsize: int
    off_dt_struct: int
    off_dt_strings: int
    off_mem_rsvmap: int
    version: int
    last_comp_version: int
    boot_cpuid_phys: int
    size_dt_strings: int
    size_dt_struct: int


def _fdt_check_header(blob: bytes) -> _Header:
    """
    Read the header, and require that its blocks lie within ``totalsize``, in any order.

    Source: ``fdt_check_header`` in scripts/dtc/libfdt/fdt.c.
    """
    if len(blob) < _HEADER.size:
        raise Unreadable(f"{len(blob)} bytes hold no header")
    header = _Header(*_HEADER.unpack_from(blob))
    if not blob.startswith(MAGIC):
        raise Unreadable("FDT_ERR_BADMAGIC")
    if header.version < _VERSION:
        raise Unreadable(f"version {header.version}, kernels write {_VERSION}")
    if header.last_comp_version > _VERSION:
        raise Unreadable("FDT_ERR_BADVERSION")
    for offset, size in (
        (header.off_mem_rsvmap, 0),
        (header.off_dt_struct, header.size_dt_struct),
        (header.off_dt_strings, header.size_dt_strings),
    ):
        if offset < _HEADER.size or offset + size > header.totalsize:
            raise Unreadable("FDT_ERR_TRUNCATED")
    return header


def _mem_rsv(header: _Header, blob: bytes) -> list[tuple[int, int]]:
    """
    The memory reservations.  Their block has no size field: an entry of size 0 ends it.

    Source: ``fdt_num_mem_rsv`` and ``fdt_get_mem_rsv`` in scripts/dtc/libfdt/fdt_ro.c.
    """
    found: list[tuple[int, int]] = []
    at = header.off_mem_rsvmap
    while at + _RESERVE_ENTRY.size <= header.totalsize:
        address, size = _RESERVE_ENTRY.unpack_from(blob, at)
        if size == 0:
            return found
        found.append((address, size))
        at += _RESERVE_ENTRY.size
    raise Unreadable("FDT_ERR_TRUNCATED")


def _nodes(header: _Header, blob: bytes, problems: Problems) -> Node:
    """
    The root node of an FDT with all below it.

    Source: ``fdt_check_full`` in libfdt/fdt_check.c of dtc.
    """
    start = header.off_dt_struct
    structure = blob[start : start + header.size_dt_struct]
    strings = blob[header.off_dt_strings : header.off_dt_strings + header.size_dt_strings]
    # Many properties may share a long name: do not search for its end each time.
    last_name_ends = strings.rfind(b"\0")
    # A parent for the root, then the open nodes, except those below _DEPTH_LIMIT.
    way = [Node("")]
    offset = depth = left_out = 0
    in_properties = False
    while True:
        tag, end = _fdt_next_tag(structure, offset)
        if depth == 0 and way[0].children and tag != FDT_END:
            raise Unreadable("FDT_ERR_BADSTRUCTURE")
        if tag == FDT_BEGIN_NODE:
            first = offset + _TAG.size
            if depth == 0 and structure[first]:
                # The root has no name.
                raise Unreadable("FDT_ERR_BADSTRUCTURE")
            depth += 1
            in_properties = depth <= _DEPTH_LIMIT
            if in_properties:
                node = Node(_name(structure, first, "node", problems))
                way[-1].children.append(node)
                way.append(node)
            else:
                left_out += 1
        elif tag == FDT_PROP:
            _, length, name = _PROPERTY.unpack_from(structure, offset)
            if name >= len(strings):
                raise Unreadable("FDT_ERR_BADOFFSET")
            if name > last_name_ends:
                raise Unreadable("FDT_ERR_TRUNCATED")
            # fdt_getprop() and the kernel do not find properties that follow a node's children.
            if in_properties:
                value = offset + _PROPERTY.size
                way[-1].properties.append(
                    Property(
                        _name(strings, name, "property", problems),
                        structure[value : value + length],
                        start + value,
                    )
                )
        elif tag == FDT_END_NODE:
            if depth == 0:
                raise Unreadable("FDT_ERR_BADSTRUCTURE")
            if depth <= _DEPTH_LIMIT:
                way.pop()
            depth -= 1
            in_properties = False
        elif tag == FDT_END:
            break
        offset = end
    if depth:
        raise Unreadable("FDT_ERR_BADSTRUCTURE")
    # libfdt accepts an empty structure, but finds a root only at the beginning.
    if _fdt_next_tag(structure, 0)[0] != FDT_BEGIN_NODE:
        raise Unreadable("no root node")
    if left_out:
        problems.add(f"{left_out:,} nodes below the {_DEPTH_LIMIT}th level are left out")
    return way[0].children[0]


def _fdt_next_tag(structure: bytes, offset: int) -> tuple[int, int]:
    """
    The tag at an offset of the structure block, and the offset of the next tag.

    Source: ``fdt_next_tag`` in scripts/dtc/libfdt/fdt.c.
    """
    end = offset + _TAG.size
    if end > len(structure):
        raise Unreadable("FDT_ERR_TRUNCATED")
    (tag,) = _TAG.unpack_from(structure, offset)
    if tag == FDT_BEGIN_NODE:
        end = structure.find(b"\0", end) + 1
    elif tag == FDT_PROP:
        end = offset + _PROPERTY.size + int.from_bytes(structure[end : end + 4], "big")
    elif tag not in (FDT_END_NODE, FDT_NOP, FDT_END):
        raise Unreadable("FDT_ERR_BADSTRUCTURE")
    if not offset < end <= len(structure):
        raise Unreadable("FDT_ERR_BADSTRUCTURE")
    return tag, end + -end % _TAG.size


def _name(block: bytes, at: int, what: str, problems: Problems) -> str:
    """The name that begins at ``at`` and ends in the block, as text."""
    limit = at + _NAME_LIMIT
    end = block.find(b"\0", at, limit + 1)
    if end < 0:
        problems.add(f"the name of a {what} has more than {_NAME_LIMIT} bytes: cut")
        end = limit
    raw = block[at:end]
    name = escaped(raw)
    if not raw.isascii():
        problems.add(f"{what} {name!r}: its name is not ASCII")
    return name


def total_size(blob: bytes) -> int | None:
    """``totalsize``, bytes, if these are the first eight bytes of an FDT, or more of it."""
    if len(blob) < 8 or not blob.startswith(MAGIC):
        return None
    return int.from_bytes(blob[4:8], "big")


def escaped(raw: bytes) -> str:
    """Decode text that should be ASCII but may hold anything."""
    return raw.decode("ascii", "backslashreplace")


def _names_twice(node: Node, path: str) -> Iterator[str]:
    """Names that one node has twice: the kernel finds the first, whatever the second holds."""
    for what, names in (
        ("property", [p.name for p in node.properties]),
        ("node", [child.name for child in node.children]),
    ):
        for name, times in Counter(names).items():
            if times > 1:
                yield f"{what} {path + '/' + name!r} is there {times} times"
    for child in node.children:
        yield from _names_twice(child, f"{path}/{child.name}")
