# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What KHO and its clients write into FDTs: the root FDT, and subtrees that are FDTs themselves.

Values of properties are in CPU byte order.
Kernel source: ``kho_out_fdt_setup`` and ``kho_add_subtree`` in kexec_handover.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from . import serialized
from .fdt import Node, Unreadable, escaped, read, total_size


@dataclass(frozen=True)
class Subtree:
    """
    A child of the root FDT.

    :param phys: ``preserved-data``, ``phys_addr_t``; None: property missing or malformed.
    :param size: ``blob-size``, bytes; None likewise.  Where root FDTs have no such property, the
        blob is an FDT and says its size itself; then None: it could not be read.
    """

    name: str
    phys: int | None
    size: int | None


@dataclass(frozen=True)
class Fdt:
    """
    A root FDT and what it says.

    :param phys: ``phys_addr_t``; 0: there is none.
    :param compatible: its ``compatible``.
    :param memory_map: ``preserved-memory-map``, ``phys_addr_t`` of the tree's root.
    :param problems: what is missing or malformed, in words.
    """

    phys: int
    compatible: str | None = None
    memory_map: int | None = None
    subtrees: list[Subtree] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


#: How ``kho_add_subtree`` called the address before it was ``preserved-data``.
_ADDRESS: Final = {"kho-v1": "fdt"}
#: Root FDTs without ``blob-size``: then all subtrees are FDTs.
_UNSIZED: Final = frozenset({"kho-v1", "kho-v2"})


def root_fdt(phys: int, blobs: dict[str, bytes]) -> Fdt:
    """
    A root FDT, from its own bytes and from those of its subtrees.

    :param blobs: as :attr:`Side.blobs`.
    """
    fdt = parse_root_fdt(phys, blobs.get("fdt"))
    if fdt.compatible not in _UNSIZED:
        return fdt
    sizes = (total_size(blobs.get(f"subtree {each.name}", b"")) for each in fdt.subtrees)
    subtrees = [replace(each, size=n) for each, n in zip(fdt.subtrees, sizes, strict=True)]
    return replace(fdt, subtrees=subtrees)


def parse_root_fdt(phys: int, blob: bytes | None) -> Fdt:
    """
    Read a root FDT, without a look at its subtrees.

    :param phys: where it was read from, ``phys_addr_t``.
    :param blob: its page; None: not readable.
    :return: its contents; ``problems`` lists everything that is wrong with them.
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
    name = None if compatible is None else escaped(compatible.value.rstrip(b"\0"))
    memory_map = _u64(tree.root, "preserved-memory-map", problems)
    subtrees: list[Subtree] = []
    for node in tree.root.children:
        found: list[str] = []
        at = _u64(node, _ADDRESS.get(name or "", "preserved-data"), found)
        size = None if name in _UNSIZED else _u64(node, "blob-size", found)
        subtrees.append(Subtree(node.name, at, size))
        problems += [f"subtree {node.name!r}: {problem}" for problem in found]
    return Fdt(
        phys,
        name,
        memory_map,
        subtrees,
        problems + tree.problems,
    )


def compatible_of(blob: bytes) -> str | None:
    """The ``compatible`` of an FDT; None: it has none, or the bytes are not a readable FDT."""
    try:
        found = read(blob).root.property("compatible")
    except Unreadable:
        return None
    return None if found is None else serialized.text(found.value)


@dataclass(frozen=True)
class LuoFdt:
    """
    The FDT of luo-v1, to which LUO's subtree leads up to Linux 7.1.

    :param compatible: of its root; None: the bytes are not a readable FDT, or it has none.
    :param liveupdate_num: ``liveupdate-number``.
    :param sessions: ``phys_addr_t`` of the ``struct luo_session_header_ser``.
    :param flbs: ``phys_addr_t`` of the ``struct luo_flb_header_ser``.
    :param unknown: nodes of another version than the one that is known: names and compatibles.
    :param problems: what is missing or malformed, in words.
    """

    compatible: str | None
    liveupdate_num: int | None = None
    sessions: int | None = None
    flbs: int | None = None
    unknown: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        """Whether all of it is of the version that is known."""
        return self.compatible == serialized.LUO_FDT_COMPATIBLE and not self.unknown


def parse_luo_fdt(blob: bytes, flbs: bool = True) -> LuoFdt:
    """
    Read what ``luo_fdt_setup`` writes (kernel/liveupdate/luo_core.c).

    :param flbs: there must be a node for FLBs.
    """
    try:
        tree = read(blob)
    except Unreadable as error:
        return LuoFdt(None, problems=[f"not a readable FDT ({error})"])
    compatible = _text(tree.root, "compatible")
    if compatible != serialized.LUO_FDT_COMPATIBLE:
        return LuoFdt(compatible)
    problems: list[str] = []
    unknown: dict[str, str] = {}

    def header(of: tuple[str, str, str], needed: bool) -> int | None:
        name, known, leads = of
        node = tree.root.child(name)
        if node is None:
            problems.extend([f"no node {name}"] if needed else [])
            return None
        version = _text(node, "compatible")
        if version is not None and version != known:
            unknown[name] = version
            return None
        found = ["no compatible"] if version is None else []
        at = _u64(node, leads, found)
        problems.extend(f"node {name}: {problem}" for problem in found)
        return at

    number = _u64(tree.root, serialized.LUO_FDT_LIVEUPDATE_NUM, problems)
    sessions = header(serialized.LUO_FDT_SESSION, True)
    lists = header(serialized.LUO_FDT_FLB, flbs)
    return LuoFdt(compatible, number, sessions, lists, unknown, problems + tree.problems)


def _text(node: Node, name: str) -> str | None:
    found = node.property(name)
    return None if found is None else serialized.text(found.value)


def reserve_mem_areas(blobs: dict[str, bytes]) -> list[tuple[str, int, int]]:
    """
    What the ``memblock`` subtree hands over (``prepare_kho_fdt`` in mm/memblock.c).

    :param blobs: of a side.
    :return: name, ``phys_addr_t`` and size in bytes of each area; empty if the subtree is
        unreadable.
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
    return serialized.unpack(serialized.KHO_VMALLOC, desc.value), desc.offset, number


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
    """
    The root of a subtree if its layout is known; None: it is absent, unreadable or of another
    layout.
    """
    blob = blobs.get(f"subtree {name}")
    if blob is None:
        return None
    try:
        root = read(blob).root
    except Unreadable:
        # khoscope shows such a blob as unknown bytes.
        return None
    found = root.property("compatible")
    return root if found is not None and serialized.text(found.value) == compatible else None
