# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How much of anything a file may hold: the one place for limits on facts that anybody may have
written.

Each limit is far above what a host has, but low enough that no file of less than 64 MiB makes any
command need more than 1 GiB, or 2 GiB if it lists a million files of sessions.  khoscope refuses a
file beyond a limit.  The same limits apply to lists and counts in a kernel's own memory that could
have any length if they are corrupt: there, what lies beyond is told as not looked at.
"""

from __future__ import annotations

from typing import Final

#: Bytes of ``meta.json``: the first 8,192 files of sessions, with their owners, take 8 MiB.
META: Final = 32 << 20
#: Bytes of any other member when unpacked: chunks are a few MiB, blobs are cut at BLOB.
MEMBER: Final = 64 << 20
#: Bytes kept of a subtree blob: blobs are small structures, and larger ones are cut here.
BLOB: Final = 16 << 20
#: All blobs of a side together.
BLOBS: Final = 64 << 20

#: Letters of any text: a command line has 4,096 bytes, which take four times as many letters when
#: escaped.
TEXT: Final = 1 << 14
#: Entries of any list, or names of any table, in ``meta.json``.
LIST: Final = 1 << 17

#: Ranges of System RAM, and bytes of address space that any processor has (52 bits).
RAM_RANGES: Final = 1 << 14
ADDRESSES: Final = 1 << 52
#: NUMA nodes: no kernel can be configured for more (NODES_SHIFT).
NODES: Final = 1 << 10
#: Zones that have memory: a node has one or two, and a few nodes have more.
ZONES: Final = NODES * 2
#: Scratch areas: more than any kernel supports nodes (MAX_NUMNODES is 1024).
SCRATCH: Final = 1 << 12
#: Subtrees of a root FDT: 64 KiB have room for 1,200.
SUBTREES: Final = 1 << 12
#: Sessions, files and FLBs of a kernel that are looked at, all together.  KHO allows 630,000 files
#: in each session (``KHO_MAX_BLOCKS``); those beyond are told as not looked at.
ENTRIES: Final = 1 << 20
#: Bytes of what systemd writes about the descriptors that it keeps for services: 100 for each.
FD_STORES: Final = 16 << 20
#: Services that may store descriptors.  What they have stored, and what they were started with, all
#: together: all are kept in ``meta.json``.
SERVICES: Final = 1 << 12
STORED: Final = 1 << 14
#: Pieces of what is in a memfd: 4 TiB of 4 MiB.
PIECES: Final = 1 << 20
#: Tasks: no kernel has more (PID_MAX_LIMIT).
TASKS: Final = 1 << 22
#: Slots of all tables of file descriptors together: 2 GiB of pointers to look at.
DESCRIPTORS: Final = 1 << 28
#: Processes that hold sessions, and descriptors by which they do: all are kept in ``meta.json``.
HOLDERS: Final = 1 << 12
HELD: Final = 1 << 16
#: Pages of a file that are shown one by one: 1 TiB of 4 KiB.
PAGES: Final = 1 << 28


def members(size: int) -> int:
    """
    The most members in a zip of this many bytes: a zip needs hundreds of bytes to describe one.
    """
    return max(1 << 16, size // 128)


def entries(size: int) -> int:
    """
    The most sessions and files of LUO in a file of this many bytes.

    Each takes 100 bytes in the file, and 2 KiB in memory with what it owns.
    """
    return max(1 << 14, size // 64)


def leaves(size: int) -> int:
    """
    The most bytes of leaves in a file of this many bytes: look-ups hold all leaves in memory.

    A leaf is 128 MiB of 4 KiB blocks or more, and the facts about these take as much in the file.
    """
    return max(128 << 20, 2 * size)


def claims(size: int) -> int:
    """The most claims in a file of this many bytes: look-ups hold all claims in memory, too."""
    return max(1 << 22, size // 16)
