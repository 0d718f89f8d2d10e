# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Flattened device trees (FDT), read with libfdt: KHO's own, and those of its clients.

What FDT itself has is big endian; the values of KHO's properties are in CPU byte order.
Kernel source: ``kho_out_fdt_setup`` and ``kho_add_subtree`` in kexec_handover.c.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import libfdt
import numpy as np

from . import serialized
from .snapshot import Fdt, Subtree

#: ``FDT_MAGIC``, as it stands in memory.
MAGIC: Final = bytes.fromhex("d00dfeed")
#: sizeof(struct fdt_header): libfdt reads that much without asking.
_HEADER_SIZE: Final = 40
#: sizeof(struct fdt_property): tag, length and offset of the name, before the value.
_PROPERTY: Final = struct.Struct(">III")
#: The version that kernels write: older ones keep names and values in other places.
_VERSION: Final = 17
#: What is larger is no client's state, and libfdt's checks take minutes if it is hostile.
_SIZE_LIMIT: Final = 1 << 20
#: ``FDT_MAX_DEPTH`` (drivers/of/fdt.c): what the kernel itself takes for too deep.
_DEPTH_LIMIT: Final = 64
#: The specification has 31.  Properties share their names: long ones would come many times.
_NAME_LIMIT: Final = 255
#: Problems that are kept of an FDT: paths are long, and nodes many.
PROBLEMS_KEPT: Final = 256


class Unreadable(ValueError):
    """Bytes that are no FDT; says why."""


@dataclass(frozen=True)
class Property:
    """
    A property.

    :param name: with what is not ASCII escaped.
    :param offset: of the value in the FDT, bytes.
    """

    name: str
    value: bytes
    offset: int


@dataclass(frozen=True)
class Node:
    """A node; names and order as they stand in the FDT."""

    name: str
    properties: list[Property] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def property(self, name: str) -> Property | None:
        """As :c:func:`fdt_getprop` finds it: the first of that name."""
        return next((p for p in self.properties if p.name == name), None)

    def child(self, name: str) -> Node | None:
        """The first of that name."""
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

    :raises Unreadable: if it is none, or reaches beyond the bytes that are there.
    """
    fdt = _open(blob)
    problems = Problems()
    try:
        root = _nodes(fdt, problems)
        reserved = [tuple(fdt.get_mem_rsv(i)) for i in range(fdt.num_mem_rsv())]
    except libfdt.FdtException as error:
        raise Unreadable(libfdt.strerror(error.err)) from None
    for each in _names_twice(root, ""):
        problems.add(each)
    return DeviceTree(root, fdt.totalsize(), reserved, problems.all())


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


def parse_root_fdt(phys: int, blob: bytes | None) -> Fdt:
    """
    Read a root FDT.

    :param phys: where it was read from, ``phys_addr_t``.
    :param blob: its page; None: not readable.
    :return: what it says, with everything that is wrong with it in ``problems``.
    """
    if blob is None:
        return Fdt(phys, problems=["its page cannot be read"])
    try:
        tree = read(blob)
    except Unreadable as error:
        return Fdt(phys, problems=[f"not a readable FDT ({error})"])
    problems: list[str] = []
    compatible = tree.root.property("compatible")
    if compatible is None:
        problems.append("no compatible")
    memory_map = _u64(tree.root, "preserved-memory-map", problems)
    subtrees: list[Subtree] = []
    for node in tree.root.children:
        found: list[str] = []
        at, size = _u64(node, "preserved-data", found), _u64(node, "blob-size", found)
        subtrees.append(Subtree(node.name, at, size))
        problems += [f"subtree {node.name!r}: {problem}" for problem in found]
    return Fdt(
        phys,
        None if compatible is None else _escaped(compatible.value.rstrip(b"\0")),
        memory_map,
        subtrees,
        problems + tree.problems,
    )


def compatible_of(blob: bytes) -> str | None:
    """What an FDT says that it is; None: it is none that can be read, or does not say."""
    try:
        found = read(blob).root.property("compatible")
    except Unreadable:
        return None
    return None if found is None else serialized.text(found.value)


def reserve_mem_areas(blobs: dict[str, bytes]) -> list[tuple[str, int, int]]:
    """
    What the ``memblock`` subtree hands over (``prepare_kho_fdt`` in mm/memblock.c).

    :param blobs: of a side.
    :return: name, ``phys_addr_t`` and size in bytes of each area; nothing where it is unreadable.
    """
    root = _known(blobs, serialized.MEMBLOCK, serialized.MEMBLOCK_COMPATIBLE)
    found: list[tuple[str, int, int]] = []
    for node in root.children if root else ():
        start, size = (_u64(node, name, []) for name in ("start", "size"))
        if start is not None and size:
            found.append((node.name, start, size))
    return found


def kho_test_folios(blobs: dict[str, bytes]) -> tuple[np.void, int, int] | None:
    """
    What the kernel's own test hands over (``kho_test_prepare_fdt`` in lib/test_kho.c).

    :param blobs: of a side.
    :return: the ``struct kho_vmalloc`` of its list of folios, the descriptor's offset in the blob,
        and how many folios there are; None: it is not there, or unreadable.
    """
    root = _known(blobs, serialized.KHO_TEST, serialized.KHO_TEST_COMPATIBLE)
    data = root.child("data") if root else None
    if data is None:
        return None
    desc, count = data.property("folios_info"), data.property("nr_folios")
    if desc is None or count is None:
        return None
    if len(desc.value) != serialized.KHO_VMALLOC.itemsize or len(count.value) != 4:
        return None
    number = int.from_bytes(count.value, "little")
    return serialized.one(serialized.KHO_VMALLOC, desc.value), desc.offset, number


def _open(blob: bytes) -> libfdt.FdtRo:
    """An FDT of which libfdt has checked that it stays within what was read."""
    if len(blob) < _HEADER_SIZE:
        raise Unreadable(f"{len(blob)} bytes hold no header")
    try:
        fdt = libfdt.FdtRo(blob)
        if fdt.totalsize() > _SIZE_LIMIT:
            raise Unreadable(f"it says to have {fdt.totalsize():,} bytes")
        if fdt.version() < _VERSION:
            raise Unreadable(f"version {fdt.version()}, kernels write {_VERSION}")
        libfdt.check_err(libfdt.fdt_check_full(fdt.as_bytearray(), len(blob)))
        # libfdt takes an empty structure for a whole one.
        if libfdt.fdt_next_node(fdt.as_bytearray(), -1, 0)[0] != 0:
            raise Unreadable("no root node")
    except libfdt.FdtException as error:
        raise Unreadable(libfdt.strerror(error.err)) from None
    return fdt


def _nodes(fdt: libfdt.FdtRo, problems: Problems) -> Node:
    """The root node of an FDT with all below it."""
    blob = fdt.as_bytearray()
    way: list[Node] = []
    left_out = at = depth = 0
    while at >= 0 and depth >= 0:
        if depth < _DEPTH_LIMIT:
            # libfdt gives bytes that are no text as surrogates, which nothing can print or keep.
            name = _name(fdt.get_name(at).encode("utf-8", "surrogateescape"), "node", problems)
            node = Node(name, list(_properties(fdt, blob, at, problems)))
            del way[depth:]
            if way:
                way[-1].children.append(node)
            way.append(node)
        else:
            left_out += 1
        at, depth = libfdt.fdt_next_node(blob, at, depth)
    if left_out:
        problems.add(f"{left_out:,} nodes below the {_DEPTH_LIMIT}th level are left out")
    return way[0]


def _properties(
    fdt: libfdt.FdtRo, blob: bytearray, node: int, problems: Problems
) -> Iterator[Property]:
    """
    The properties of a node.

    :param blob: the FDT's bytes: the binding makes a new copy whenever it is asked for them.
    :param node: its offset in the structure block.
    """
    strings = fdt.off_dt_strings()
    at = fdt.first_property_offset(node, [libfdt.FDT_ERR_NOTFOUND])
    while at >= 0:
        # The binding has no answer to a property whose name is not UTF-8.
        start = fdt.off_dt_struct() + at
        _, length, name = _PROPERTY.unpack_from(blob, start)
        value = start + _PROPERTY.size
        first = strings + name
        end = blob.find(b"\0", first, first + _NAME_LIMIT + 1)
        raw = bytes(blob[first : end if end >= 0 else first + _NAME_LIMIT + 1])
        yield Property(_name(raw, "property", problems), bytes(blob[value : value + length]), value)
        at = fdt.next_property_offset(at, [libfdt.FDT_ERR_NOTFOUND])


def _name(raw: bytes, what: str, problems: Problems) -> str:
    """What a name reads like."""
    if len(raw) > _NAME_LIMIT:
        problems.add(f"the name of a {what} has more than {_NAME_LIMIT} bytes: cut")
        raw = raw[:_NAME_LIMIT]
    name = _escaped(raw)
    if not raw.isascii():
        problems.add(f"{what} {name!r}: its name is not ASCII")
    return name


def _escaped(raw: bytes) -> str:
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


def _u64(node: Node, name: str, problems: list[str]) -> int | None:
    """A value in CPU byte order."""
    found = node.property(name)
    if found is None:
        problems.append(f"no {name}")
    elif len(found.value) != 8:
        problems.append(f"{name} has {len(found.value)} bytes, not 8")
    else:
        return int.from_bytes(found.value, "little")
    return None


def _known(blobs: dict[str, bytes], name: str, compatible: str) -> Node | None:
    """The root of a subtree whose layout is known; None: it is not there, or another."""
    blob = blobs.get(f"subtree {name}")
    if blob is None:
        return None
    try:
        root = read(blob).root
    except Unreadable:
        # Whoever asks what it says gets it shown as what it is: unknown bytes.
        return None
    found = root.property("compatible")
    return root if found is not None and serialized.text(found.value) == compatible else None
