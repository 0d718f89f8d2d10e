# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What clients of KHO write into preserved memory for the next kernel: layouts, as numpy types.

Each layout is a contract between kernels, named by a ``compatible`` string or a version.  khoscope
does not decode structures with another name.  All are packed and in CPU byte order.
Kernel sources: ``include/linux/kho/abi/``, the same in Linux 7.2 and 7.3.
"""

from __future__ import annotations

from typing import Final

import numpy as np

#: Names of the subtrees whose blobs are known (``LUO_KHO_ENTRY_NAME`` and so on).
LUO: Final = "LUO"
KEXEC_METADATA: Final = "kexec-metadata"
MEMBLOCK: Final = "memblock"
KHO_TEST: Final = "kho_test"

#: The ``LUO_ABI_COMPATIBLE`` of these layouts (luo.h).
LUO_COMPATIBLE: Final = "luo-v5"
#: ``MEMFD_LUO_FH_COMPATIBLE`` (memfd.h).
MEMFD_COMPATIBLE: Final = "memfd-v2"
#: ``MEMBLOCK_KHO_NODE_COMPATIBLE`` and ``RESERVE_MEM_KHO_NODE_COMPATIBLE`` (memblock.h).
MEMBLOCK_COMPATIBLE: Final = "memblock-v1"
RESERVE_MEM_COMPATIBLE: Final = "reserve-mem-v1"
#: ``KHO_TEST_COMPAT`` (lib/test_kho.c).
KHO_TEST_COMPATIBLE: Final = "kho-test-v1"
#: The compatibles that FDTs in subtrees should have, by the names of the subtrees.
SUBTREE_COMPATIBLES: Final = {MEMBLOCK: MEMBLOCK_COMPATIBLE, KHO_TEST: KHO_TEST_COMPATIBLE}
#: ``KHO_KEXEC_METADATA_VERSION`` (kexec_metadata.h).
KEXEC_METADATA_VERSION: Final = 1

#: ``struct luo_ser``.
LUO_SER: Final = np.dtype(
    [
        ("compatible", "S8"),
        ("liveupdate_num", "<u8"),
        ("sessions_pa", "<u8"),
        ("flbs_pa", "<u8"),
    ]
)
#: ``struct luo_session_ser``, with its ``struct luo_file_set_ser``.
LUO_SESSION_SER: Final = np.dtype([("name", "S64"), ("files", "<u8"), ("count", "<u8")])
#: ``struct luo_file_ser``.
LUO_FILE_SER: Final = np.dtype([("compatible", "S48"), ("data", "<u8"), ("token", "<u8")])
#: ``struct luo_flb_header_ser``.
LUO_FLB_HEADER_SER: Final = np.dtype([("pgcnt", "<u8"), ("count", "<u8")])
#: ``struct luo_flb_ser``.
LUO_FLB_SER: Final = np.dtype([("name", "S48"), ("data", "<u8"), ("count", "<u8")])

#: ``struct kho_block_header_ser``; the entries of a block follow it within its page.
KHO_BLOCK_HEADER_SER: Final = np.dtype([("next", "<u8"), ("count", "<u8")])
#: ``KHO_MAX_BLOCKS`` (kho_block.c): the kernel treats a longer chain as corrupt.
KHO_MAX_BLOCKS: Final = 10000

#: ``struct khoser_mem_chunk_hdr``, before the radix tree; its bitmaps follow it within its page.
KHOSER_MEM_CHUNK_HDR: Final = np.dtype([("next", "<u8"), ("order", "<u4"), ("num_elms", "<u4")])
#: ``struct khoser_mem_bitmap_ptr``.
KHOSER_MEM_BITMAP_PTR: Final = np.dtype([("phys_start", "<u8"), ("bitmap", "<u8")])

#: ``struct kho_vmalloc`` (kexec_handover.h).
KHO_VMALLOC: Final = np.dtype(
    [("first", "<u8"), ("total_pages", "<u4"), ("flags", "<u2"), ("order", "<u2")]
)
#: Flags that kho_restore_vmalloc() knows (kexec_handover.c).
KHO_VMALLOC_FLAGS: Final = {0x0001: "ALLOC", 0x0002: "HUGE_VMAP"}

#: ``struct memfd_luo_ser``.
MEMFD_LUO_SER: Final = np.dtype(
    [
        ("pos", "<u8"),
        ("size", "<u8"),
        ("seals", "<u4"),
        ("flags", "<u4"),
        ("nr_folios", "<u8"),
        ("folios", KHO_VMALLOC),
    ]
)
#: Offset of ``folios`` in it, bytes.
MEMFD_FOLIOS_AT: Final = MEMFD_LUO_SER.itemsize - KHO_VMALLOC.itemsize
#: ``struct memfd_luo_folio_ser``: the pfn in the low 52 bits, flags in the high 12.
MEMFD_LUO_FOLIO_SER: Final = np.dtype([("pfn_and_flags", "<u8"), ("index", "<u8")])
MEMFD_PFN_BITS: Final = 52

#: ``F_SEAL_*`` (include/uapi/linux/fcntl.h).
SEALS: Final = {
    0x01: "SEAL",
    0x02: "SHRINK",
    0x04: "GROW",
    0x08: "WRITE",
    0x10: "FUTURE_WRITE",
    0x20: "EXEC",
}

#: ``struct kho_kexec_metadata``.
KHO_KEXEC_METADATA: Final = np.dtype(
    [("version", "<u4"), ("previous_release", "S65"), ("kexec_count", "<u4")]
)


def unpack(layout: np.dtype[np.void], raw: bytes) -> np.void:
    """
    The structure at the beginning of some bytes.

    :raises ValueError: if there are too few bytes.
    """
    return np.frombuffer(raw, layout, 1)[0]


def text(raw: bytes) -> str:
    """Decode a C string that may hold anything; bytes that are not UTF-8 are escaped."""
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def bits(value: int, names: dict[int, str]) -> list[str]:
    """The names of the bits that are set, then the bits without a name as one number."""
    rest = value & ~sum(names)
    return [name for bit, name in names.items() if value & bit] + ([f"{rest:#x}"] if rest else [])
