# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What ``compatible`` strings say about the kernels that write and take them.

Every kernel from 6.19 to 7.3 compares the whole of a string: ``fdt_node_check_compatible`` for the
root FDT and for LUO while it was an FDT, ``strncmp`` for ``struct luo_ser``, ``strcmp`` for files.
A public series ("kho: introduce compatibility helpers and decouple block version", June 2026)
appends the versions of common structures, in alphabetical order: ``kho-v4;radix-v1;vmalloc-v1``.
It compares the whole of such a string, too.
Kernel sources: ``include/linux/kho/abi/`` and ``kernel/liveupdate/`` of Linux 6.18, 7.1, 7.2, 7.3,
and public copies of those of 6.19 and 7.0.
"""

from __future__ import annotations

from typing import Final

from .keys import BlockLimits

#: What separates the parts of a composite one (``KHO_SUB_COMPAT``).
SEPARATOR: Final = ";"

#: What every kernel of the xarray tracker writes (linux 6.16 to 7.0): known even where the root FDT
#: is not written yet.
OF_XARRAYS: Final = "kho-v1"

#: Common structures that composite ones name, in the layout that khoscope reads.
COMMON: Final = frozenset({"block-v1", "radix-v1", "vmalloc-v1"})

#: Root FDTs of kernels whose boot computes the size of a block as an ``int``:
#: ``sz = 1 << (order + PAGE_SHIFT)`` (linux 6.16 to 7.1.13).
_SIZES_ARE_INTS: Final = frozenset({"kho-v1", "kho-v2", "kho-v3"})
#: The size that is no positive ``int`` any more, bytes.
INT_SIZE_LIMIT: Final = 1 << 31
#: Root FDTs of kernels whose ``kho_restore_page`` refuses orders above ``MAX_PAGE_ORDER``, before
#: "kho: drop restriction on maximum page order" (linux 7.1).  v2 was in release candidates alone.
_RESTORE_IS_LIMITED: Final = frozenset({"kho-v1", "kho-v2"})


def base(compatible: str) -> str:
    """The first part of a composite one: its own version."""
    return compatible.partition(SEPARATOR)[0]


def parts(compatible: str) -> list[str]:
    """The others: the structures that it names."""
    return compatible.split(SEPARATOR)[1:]


def is_known(compatible: str, bases: frozenset[str]) -> bool:
    """Whether khoscope knows every part of it."""
    return base(compatible) in bases and COMMON.issuperset(parts(compatible))


def block_limits(compatible: str | None, max_page_order: int) -> BlockLimits:
    """
    The limits of a kernel.

    :param compatible: of its root FDT; None: not known, so that no limit is.
    """
    version = base(compatible or "")
    return BlockLimits(
        INT_SIZE_LIMIT if version in _SIZES_ARE_INTS else None,
        max_page_order if version in _RESTORE_IS_LIMITED else None,
    )
