# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Facts about KHO's clients: the structures that lead to preserved memory, and who owns that memory.

The memory may be corrupt.  The ``problems`` of a structure say in words what is wrong with it; its
other members hold what could be read all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64
from .columns import Columns


class OwnerKind(StrEnum):
    """What kind of thing owns preserved memory."""

    FDT = "KHO FDT"
    SUBTREE = "subtree"
    LUO = "LUO"
    SESSION = "session"
    FILE = "file"
    MEMFD = "memfd data"
    VMALLOC_CHUNK = "vmalloc chunk"
    VMALLOC_PAGE = "vmalloc page"
    RESERVE_MEM = "reserve_mem"
    KHO_TEST = "kho_test"
    VM_STRUCT = "vm_struct"
    SLAB = "slab"
    CALLER = "caller"


@dataclass(frozen=True, slots=True)
class Owner:
    """
    Somebody whose memory is preserved.

    :param name: for people: which one of its kind, and what of it.
    :param session: LUO session that it belongs to.
    :param token: token of the file in that session.
    """

    kind: OwnerKind
    name: str
    session: str | None = None
    token: int | None = None

    def __str__(self) -> str:
        # A vmalloc area has two owners of its name.
        parts = {OwnerKind.VMALLOC_CHUNK: ", chunks", OwnerKind.VMALLOC_PAGE: ", pages"}
        return self.name + parts.get(self.kind, "")


#: Owner of LUO's ``struct luo_flb_header_ser`` and its entries.
FLB_LIST: Final = Owner(OwnerKind.LUO, "LUO: list of FLBs")


@dataclass(frozen=True, eq=False)
class Claims(Columns):
    """
    Memory that belongs to owners, sorted by address.

    :param phys: u64, ``phys_addr_t``.
    :param size: u64, bytes.
    :param owner: u32, index into :attr:`Side.owners <khoscope.facts.snapshot.Side.owners>`.
    """

    phys: U64
    size: U64
    owner: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Vmalloc:
    """
    A ``struct kho_vmalloc`` and its chain of ``struct kho_vmalloc_chunk``.

    The pages of both are claims of the owners of kind VMALLOC_CHUNK and VMALLOC_PAGE with the same
    name.

    :param name: whose it is.
    :param phys: ``phys_addr_t`` of the descriptor.
    :param first: ``phys_addr_t`` of the first chunk.
    :param flags: ``KHO_VMALLOC_*``.
    :param order: of each entry.
    :param chunks: chunks in the chain, as far as it could be followed.
    :param listed: pages that they list.
    """

    name: str
    phys: int
    first: int
    total_pages: int
    flags: int
    order: int
    chunks: int
    listed: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Memfd:
    """
    A ``struct memfd_luo_ser``.

    :param phys: ``phys_addr_t`` of the structure.
    :param pos: file position, bytes.
    :param size: of the file, bytes.
    :param seals: ``F_SEAL_*``.
    :param nr_folios: entries of the list of folios.
    :param folios: the list, as a vmalloc area; None: the file is empty.
    :param pages: pages of these folios.
    """

    phys: int
    pos: int
    size: int
    seals: int
    flags: int
    nr_folios: int
    folios: Vmalloc | None
    pages: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredFd:
    """
    A descriptor that systemd keeps for a service (``FileDescriptorStoreMax=`` in systemd.service).

    :param name: as the service calls it (``FDNAME=``).
    """

    unit: str
    name: str

    def __str__(self) -> str:
        return f"{self.unit} {self.name}"


def file_owner(session: str, token: int, stored: StoredFd | None) -> Owner:
    """Owner of what a memfd preserves."""
    name = f"memfd {token:#x} of session {session}"
    if stored is not None:
        name = f"{stored} (memfd {token:#x})"
    return Owner(OwnerKind.FILE, name, session, token)


@dataclass(frozen=True, slots=True)
class LuoFile:
    """
    A file in a session (``struct luo_file``, or ``struct luo_file_ser``).

    :param handler: ``compatible`` of its handler.
    :param data: ``serialized_data``: its meaning is up to the handler; mostly it is a physical
        address.
    :param retrieve_status: as in ``struct luo_file``, or 1 if that only says that it was retrieved;
        None if only the serialized form is there.
    :param memfd: what ``data`` leads to, if the handler is known and the structure is still there.
    :param stored: of which store it is, if it is in systemd's session.
    """

    handler: str
    token: int
    data: int
    retrieve_status: int | None = None
    memfd: Memfd | None = None
    problems: list[str] = field(default_factory=list)
    stored: StoredFd | None = None

    def __str__(self) -> str:
        return f"token {self.token:#x}" + (f" ({self.stored})" if self.stored else "")


@dataclass(frozen=True, slots=True)
class LuoSession:
    """
    A session (``struct luo_session``, or ``struct luo_session_ser``).

    :param retrieved: as in ``struct luo_session``; None if only the serialized form is there.
    :param count: how many files the session says it has.
    :param left_out: how many files khoscope has not looked at, at least: all have more than it
        keeps.
    :param stored: of which store it is, if systemd keeps its descriptor.
    :param notes: what is to be known of it that is not wrong with it, in words.
    """

    name: str
    retrieved: bool | None
    count: int
    files: list[LuoFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: int = 0
    stored: StoredFd | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"session {self.name!r}" + (f" of {self.stored}" if self.stored else "")


@dataclass(frozen=True)
class Content:
    """
    What is in a memfd.

    :param incoming: it is among what the kernel was handed, not what it hands over.
    :param size: of the file, bytes.
    :param pieces: in their order: bytes, or how many there are that cannot be read.  They end early
        where the list of folios does not make sense any more.
    """

    incoming: bool
    session: str
    token: int
    size: int
    pieces: Iterable[bytes | int]


@dataclass(frozen=True)
class Flb:
    """
    File-lifecycle-bound data (``struct liveupdate_flb``, or ``struct luo_flb_ser``).

    :param name: its ``compatible``.
    :param count: files that depend on it.
    """

    name: str
    data: int
    count: int


@dataclass(frozen=True)
class Luo:
    """
    What the Live Update Orchestrator hands over, or was handed.

    :param phys: ``phys_addr_t`` of the blob that leads to it: a ``struct luo_ser``, or an FDT.
    :param compatible: its ABI; None: not readable.
    :param liveupdate_num: live updates up to the next kernel, or up to this one.
    :param live: the sessions come from the kernel's lists, not from the serialized form.
    :param raw: the first bytes of the blob in hex if the ABI is not known.
    :param left_out: how many sessions and FLBs khoscope has not looked at, likewise.
    """

    phys: int
    compatible: str | None
    liveupdate_num: int | None = None
    live: bool = False
    sessions: list[LuoSession] = field(default_factory=list)
    flbs: list[Flb] = field(default_factory=list)
    raw: str | None = None
    problems: list[str] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """
    What of LUO's a process has open.

    :param session: name of the session; None: it is ``/dev/liveupdate``.
    :param retrieved: as in ``struct luo_session``: the session is one of the incoming side.
    :param fds: how many of the process's file descriptors lead to it.
    """

    session: str | None
    retrieved: bool
    fds: int


@dataclass(frozen=True, slots=True)
class Holder:
    """
    A process (thread group) that has something of LUO's open.

    :param pid: its ``tgid``, in the initial PID namespace.
    :param comm: of its leader; empty: not readable.
    :param cgroup: path in the default hierarchy; None: not readable, or the kernel has no cgroups.
    :param started: ``start_boottime`` of its leader, ns; None: not readable.
    """

    pid: int
    comm: str
    cgroup: str | None
    started: int | None
    held: list[Held]


@dataclass(frozen=True, slots=True)
class Holders:
    """
    Who holds sessions or ``/dev/liveupdate``, as far as the tables of file descriptors tell.

    :param processes: by pid.
    :param booted: when this kernel booted, by its own clocks (``offs_real - offs_boot``), ns since
        1970; None: not readable.
    :param left_out: how many more descriptors or tables khoscope has not looked at.
    :param unread: what could not be read, in words: a holder may be in there.
    :param systemd_memfds: how many memfds systemd has open, if that is PID 1: what it keeps for
        services is in no session yet.  None: it is not, or they cannot be read.
    """

    processes: list[Holder] = field(default_factory=list)
    booted: int | None = None
    left_out: int = 0
    unread: list[str] = field(default_factory=list)
    systemd_memfds: int | None = None


@dataclass(frozen=True)
class LuoState:
    """
    LUO in this kernel (``luo_global``).

    :param enabled: ``luo_global.enabled``.
    :param handlers: ``compatible`` of each registered file handler.
    :param in_use: whether somebody has opened ``/dev/liveupdate``; None: not readable.
    :param holders: None: not looked at.
    """

    enabled: bool
    handlers: list[str] = field(default_factory=list)
    in_use: bool | None = None
    holders: Holders | None = None
