# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The KHO root FDT, read with libfdt: one page, values in CPU byte order (not big endian).

Kernel source: ``kho_out_fdt_setup`` and ``kho_add_subtree`` in kexec_handover.c.
"""

from __future__ import annotations

import libfdt

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
            # libfdt gives bytes that are no text as surrogates, which nothing can print or keep.
            raw_name = fdt.get_name(node).encode("utf-8", "surrogateescape")
            name = raw_name.decode("ascii", "backslashreplace")
            found: list[str] = [] if raw_name.isascii() else ["its name is not ASCII"]
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
