# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How much of anything a file may hold: the one place for what bounds the work on facts that anybody
may have written.

Each is far above what a host has, and such that no file of less than 64 MiB makes any command
need more than 1 GiB.  A file beyond them is refused.  What a kernel's own memory says is bounded
by the same numbers where a corrupt list or count could be of any length.
"""

from __future__ import annotations

from typing import Final

#: Bytes of ``meta.json``: 16,384 files of sessions take 15 MiB.
META: Final = 32 << 20
#: Bytes of any other member when unpacked: chunks are a few MiB, blobs are cut at BLOB.
MEMBER: Final = 64 << 20
#: Subtree blobs are small structures; what is larger is kept up to here.
BLOB: Final = 16 << 20
#: All blobs of a side together.
BLOBS: Final = 64 << 20

#: Letters of any text: a command line has 4,096 bytes, which escaped are four times as many.
TEXT: Final = 1 << 14
#: Entries of any list, or names of any table, in ``meta.json``.
LIST: Final = 1 << 17

#: Ranges of System RAM, and bytes of address space that any processor has (52 bits).
RAM_RANGES: Final = 1 << 14
ADDRESSES: Final = 1 << 52
#: More scratch areas than nodes any kernel supports (MAX_NUMNODES is 1024).
SCRATCH: Final = 1 << 12
#: Subtrees of a root FDT: 64 KiB have room for 1,200.
SUBTREES: Final = 1 << 12
#: Sessions, files and FLBs that are kept, all together: where there are more, something was
#: written over, or a list loops.
ENTRIES: Final = 1 << 14
#: Pages of a file that are shown one by one: 1 TiB of 4 KiB.
PAGES: Final = 1 << 28


def members(size: int) -> int:
    """Members of a zip of so many bytes: each takes hundreds to tell of."""
    return max(1 << 16, size // 128)


def leaves(size: int) -> int:
    """
    Bytes of leaves in a file of so many bytes: they are looked up in memory.

    A leaf is 128 MiB of 4 KiB blocks or more, and the facts about these take as much in the file.
    """
    return max(128 << 20, 2 * size)


def claims(size: int) -> int:
    """Claims in a file of so many bytes: these, too."""
    return max(1 << 22, size // 16)
