# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What clients of KHO write into preserved memory for the next kernel: layouts, as numpy types.

Each layout is a contract between kernels, named by a ``compatible`` string or a version.  khoscope
does not decode structures with another name.  All are packed and in CPU byte order.
Kernel sources: ``include/linux/kho/abi/``.  What has no older form beside it here is the same in
Linux 6.19 to 7.3, or appeared in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

#: Names of the subtrees whose blobs are known (``LUO_KHO_ENTRY_NAME`` and so on).
LUO: Final = "LUO"
KEXEC_METADATA: Final = "kexec-metadata"
MEMBLOCK: Final = "memblock"
KHO_TEST: Final = "kho_test"

#: The ``LUO_ABI_COMPATIBLE`` of a blob that is a ``struct luo_ser`` (luo.h, since Linux 7.2).
LUO_COMPATIBLE: Final = "luo-v5"
#: ``LUO_FDT_COMPATIBLE``: the blob is an FDT (luo.h, Linux 6.19 to 7.1).
LUO_FDT_COMPATIBLE: Final = "luo-v1"
#: ``LUO_FDT_LIVEUPDATE_NUM``, a property of its root.
LUO_FDT_LIVEUPDATE_NUM: Final = "liveupdate-number"
#: The nodes below its root: their names, their compatibles, and the property in each that is the
#: address of a header (``LUO_FDT_SESSION_*``; ``LUO_FDT_FLB_*`` since Linux 7.0).
LUO_FDT_SESSION: Final = ("luo-session", "luo-session-v2", "luo-session-header")
LUO_FDT_FLB: Final = ("luo-flb", "luo-flb-v1", "luo-flb-header")
#: ``MEMFD_LUO_FH_COMPATIBLE`` (memfd.h) since Linux 7.1, and before.
MEMFD_COMPATIBLE: Final = "memfd-v2"
MEMFD_V1: Final = "memfd-v1"
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

#: ``struct luo_session_header_ser`` of luo-v1; the entries follow it.
LUO_SESSION_HEADER_SER: Final = np.dtype([("count", "<u8")])


@dataclass(frozen=True)
class Array:
    """
    A list of luo-v1, in memory that the kernel allocates in one piece.

    :param entry: the layout of its entries.
    :param pages: of that memory.
    :param header: bytes in front of the first entry.
    """

    entry: np.dtype[np.void]
    pages: int
    header: int = 0

    def room(self, page_size: int) -> int:
        """How many entries it can have."""
        return (self.pages * page_size - self.header) // self.entry.itemsize


#: The sessions of luo-v1 (``LUO_SESSION_PGCNT``), and the files of a session (``LUO_FILE_PGCNT``).
LUO_SESSIONS: Final = Array(LUO_SESSION_SER, 16, LUO_SESSION_HEADER_SER.itemsize)
LUO_FILES: Final = Array(LUO_FILE_SER, 2)

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
#: The same of memfd-v1, which forgets the seals.
MEMFD_LUO_SER_V1: Final = np.dtype(
    [("pos", "<u8"), ("size", "<u8"), ("nr_folios", "<u8"), ("folios", KHO_VMALLOC)]
)
#: ``struct memfd_luo_ser`` by the compatible of its handler.  In all of them, ``folios`` is last.
MEMFDS: Final[Mapping[str, np.dtype[np.void]]] = {
    MEMFD_COMPATIBLE: MEMFD_LUO_SER,
    MEMFD_V1: MEMFD_LUO_SER_V1,
}
#: ``struct memfd_luo_folio_ser``: the pfn in the low 52 bits, flags in the high 12.
MEMFD_LUO_FOLIO_SER: Final = np.dtype([("pfn_and_flags", "<u8"), ("index", "<u8")])
MEMFD_PFN_BITS: Final = 52
#: Of these flags: the folio has the file's contents; else that is zeros.
MEMFD_LUO_FOLIO_UPTODATE: Final = 1 << 1 << MEMFD_PFN_BITS

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
