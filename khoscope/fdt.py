# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The KHO root FDT, read with libfdt: one page, values in CPU byte order (not big endian).

Kernel source: ``kho_out_fdt_setup`` and ``kho_add_subtree`` in kexec_handover.c.
"""

from __future__ import annotations

import libfdt
import numpy as np

from . import serialized
from .snapshot import Fdt, Subtree

#: sizeof(struct fdt_header): libfdt reads that much without asking.
_HEADER_SIZE = 40


def parse_root_fdt(phys: int, blob: bytes | None) -> Fdt:
    """
    Read a root FDT.

    :param phys: where it was read from, ``phys_addr_t``.
    :param blob: its page; None: not readable.
    :return: what it says, with everything that is wrong with it in ``problems``.
    """
    if blob is None:
        return Fdt(phys, problems=["its page cannot be read"])
    problems: list[str] = []
    compatible = memory_map = None
    subtrees: list[Subtree] = []
    try:
        fdt = _open(blob)
        raw = _property(fdt, 0, "compatible")
        if raw is None:
            problems.append("no compatible")
        else:
            compatible = raw.rstrip(b"\0").decode("ascii", "backslashreplace")
        memory_map = _u64(fdt, 0, "preserved-memory-map", problems)
        node = fdt.first_subnode(0, [libfdt.FDT_ERR_NOTFOUND])
        while node >= 0:
            name, is_ascii = _name(fdt, node)
            found: list[str] = [] if is_ascii else ["its name is not ASCII"]
            subtrees.append(
                Subtree(
                    name,
                    _u64(fdt, node, "preserved-data", found),
                    _u64(fdt, node, "blob-size", found),
                )
            )
            problems += [f"subtree {name!r}: {problem}" for problem in found]
            node = fdt.next_subnode(node, [libfdt.FDT_ERR_NOTFOUND])
    except libfdt.FdtException as error:
        problems.append(f"not a readable FDT ({libfdt.strerror(error.err)})")
    return Fdt(phys, compatible, memory_map, subtrees, problems)


def _open(blob: bytes) -> libfdt.FdtRo:
    """An FDT of which libfdt has checked that it stays within what was read."""
    if len(blob) < _HEADER_SIZE:
        raise libfdt.FdtException(-libfdt.FDT_ERR_TRUNCATED)
    fdt = libfdt.FdtRo(blob)
    libfdt.check_err(libfdt.fdt_check_full(fdt.as_bytearray(), len(blob)))
    return fdt


def _name(fdt: libfdt.FdtRo, node: int) -> tuple[str, bool]:
    """A node's name, and whether it is ASCII; what is not is escaped."""
    # libfdt gives bytes that are no text as surrogates, which nothing can print or keep.
    raw = fdt.get_name(node).encode("utf-8", "surrogateescape")
    return raw.decode("ascii", "backslashreplace"), raw.isascii()


def _property(fdt: libfdt.FdtRo, node: int, name: str) -> bytes | None:
    value = fdt.getprop(node, name, [libfdt.FDT_ERR_NOTFOUND])
    return None if isinstance(value, int) else bytes(value)


def _u64(fdt: libfdt.FdtRo, node: int, name: str, problems: list[str]) -> int | None:
    raw = _property(fdt, node, name)
    if raw is None:
        problems.append(f"no {name}")
    elif len(raw) != 8:
        problems.append(f"{name} has {len(raw)} bytes, not 8")
    else:
        return int.from_bytes(raw, "little")
    return None


def reserve_mem_areas(blobs: dict[str, bytes]) -> list[tuple[str, int, int]]:
    """
    What the ``memblock`` subtree hands over (``prepare_kho_fdt`` in mm/memblock.c).

    :param blobs: of a side.
    :return: name, ``phys_addr_t`` and size in bytes of each area; nothing where it is unreadable.
    """
    fdt = _known(blobs, serialized.MEMBLOCK, serialized.MEMBLOCK_COMPATIBLE)
    found: list[tuple[str, int, int]] = []
    if fdt is None:
        return found
    node = fdt.first_subnode(0, [libfdt.FDT_ERR_NOTFOUND])
    while node >= 0:
        start, size = (_u64(fdt, node, name, []) for name in ("start", "size"))
        if start is not None and size:
            found.append((_name(fdt, node)[0], start, size))
        node = fdt.next_subnode(node, [libfdt.FDT_ERR_NOTFOUND])
    return found


def kho_test_folios(blobs: dict[str, bytes]) -> tuple[np.void, int, int] | None:
    """
    What the kernel's own test hands over (``kho_test_prepare_fdt`` in lib/test_kho.c).

    :param blobs: of a side.
    :return: the ``struct kho_vmalloc`` of its list of folios, the descriptor's offset in the blob,
        and how many folios there are; None: it is not there, or unreadable.
    """
    fdt = _known(blobs, serialized.KHO_TEST, serialized.KHO_TEST_COMPATIBLE)
    if fdt is None:
        return None
    node = fdt.path_offset("/data", [libfdt.FDT_ERR_NOTFOUND])
    if node < 0:
        return None
    desc, count = _property(fdt, node, "folios_info"), _property(fdt, node, "nr_folios")
    if desc is None or count is None or len(desc) != serialized.KHO_VMALLOC.itemsize:
        return None
    offset = bytes(fdt.as_bytearray()).find(desc)
    number = int.from_bytes(count, "little")
    return serialized.one(serialized.KHO_VMALLOC, desc), offset, number


def _known(blobs: dict[str, bytes], name: str, compatible: str) -> libfdt.FdtRo | None:
    """The FDT of a subtree whose layout is known; None: it is not there, or another."""
    blob = blobs.get(f"subtree {name}")
    if blob is None:
        return None
    try:
        fdt = _open(blob)
        raw = _property(fdt, 0, "compatible")
    except libfdt.FdtException:
        # Whoever asks what it says gets it shown as what it is: unknown bytes.
        return None
    return fdt if raw is not None and serialized.text(raw) == compatible else None
