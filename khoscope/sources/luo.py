# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read what the Live Update Orchestrator hands over and was handed.

Sessions that a kernel knows of are read from its own lists (``luo_session_global``); those that it
was handed and has not looked at yet from their serialized form.
Kernel sources: ``kernel/liveupdate/luo_*.c``, ``include/linux/kho/abi/luo.h``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from drgn import FaultError, Object, Program
from drgn.helpers.linux.list import list_empty, list_for_each_entry
from drgn.helpers.linux.mm import virt_to_phys

from ..clients import Flb, Kind, Luo, LuoFile, LuoSession, Memfd, Owner
from ..serialized import (
    LUO_COMPATIBLE,
    LUO_FILE_SER,
    LUO_FLB_HEADER_SER,
    LUO_FLB_SER,
    LUO_SER,
    LUO_SESSION_SER,
    MEMFD_COMPATIBLE,
    text,
)
from .follow import Following

#: Entries of each kernel list that are kept: a list that is longer was written over, or loops.
LIST_KEPT: Final = 1 << 14


def read_outgoing(prog: Program, following: Following, phys: int) -> Luo:
    """
    What LUO would hand over.

    :param phys: of the outgoing ``struct luo_ser``, the blob of the subtree.
    """
    ser = following.structure(phys, LUO_SER)
    compatible = None if ser is None else text(bytes(ser["compatible"]))
    if ser is None or compatible != LUO_COMPATIBLE:
        return _unknown(following, phys, compatible)
    reader = _Reader(prog, following)
    header = prog["luo_session_global"].outgoing
    sessions = reader.listed(header)
    reader.blocks(header.block_set, LUO_SESSION_SER, Owner(Kind.LUO, "LUO: list of sessions"))
    flbs = reader.flbs()
    if int(ser["flbs_pa"]):
        reader.flb_header(int(ser["flbs_pa"]))
    return Luo(
        phys,
        compatible,
        int(ser["liveupdate_num"]),
        True,
        sessions,
        flbs,
        problems=reader.problems,
    )


def read_incoming(prog: Program, following: Following, phys: int) -> Luo:
    """
    What LUO was handed, as far as it is still there.

    :param phys: of the ``struct luo_ser`` that came; its page was given back early in the boot.
    """
    reader = _Reader(prog, following)
    header = prog["luo_session_global"].incoming
    head = header.block_set.head_pa.value_()
    live = not list_empty(header.list.address_of_()) or not head
    sessions = reader.listed(header) if live else reader.serialized(head)
    number = prog["luo_global"].liveupdate_num.value_()
    flbs = []
    incoming = prog["luo_flb_global"].incoming
    if incoming.active:
        flbs = reader.flb_header(int(virt_to_phys(incoming.header_ser)))
    # The kernel takes no other ABI than its own: it would not have booted.
    return Luo(
        phys,
        LUO_COMPATIBLE if number else None,
        number,
        live,
        sessions,
        flbs,
        problems=reader.problems,
    )


def _unknown(following: Following, phys: int, compatible: str | None) -> Luo:
    """An ABI that is not known: its first bytes, and no guess."""
    raw = following.bytes_at(phys, LUO_SER.itemsize)
    if raw is None:
        return Luo(phys, None, problems=[f"struct luo_ser at {phys:#x} cannot be read"])
    return Luo(phys, compatible, raw=raw.hex())


@dataclass
class _Reader:
    """Reads one side's sessions."""

    prog: Program
    following: Following

    def __post_init__(self) -> None:
        self.problems: list[str] = []

    # -- the kernel's own lists -------------------------------------------------------------------

    def listed(self, header: Object) -> list[LuoSession]:
        """The sessions of a ``struct luo_session_header``."""
        sessions: list[LuoSession] = []
        try:
            for session in self._entries("struct luo_session", header.list, "list", self.problems):
                sessions.append(self._session(session))
        except FaultError as error:
            self.problems.append(f"sessions cannot be read ({error}): they moved, or are corrupt")
        return sessions

    def _session(self, session: Object) -> LuoSession:
        name = text(_string(session.name))
        problems: list[str] = []
        file_set = session.file_set
        whose = Owner(Kind.SESSION, f"session {name}: list of files", name)
        self.blocks(file_set.block_set, LUO_FILE_SER, whose, problems)
        files = [
            self._file(
                name,
                text(_string(file.fh.compatible)),
                file.token.value_(),
                file.serialized_data.value_(),
                file.retrieve_status.value_(),
            )
            for file in self._entries("struct luo_file", file_set.files_list, "list", problems)
        ]
        count = file_set.count.value_()
        if count != len(files):
            problems.append(f"counts {count} files, lists {len(files)}")
        return LuoSession(name, bool(session.retrieved), count, files, problems)

    def _entries(
        self, kind: str, head: Object, member: str, problems: list[str]
    ) -> Iterator[Object]:
        """The entries of a kernel list, which may move meanwhile."""
        for number, entry in enumerate(list_for_each_entry(kind, head.address_of_(), member)):
            if number == LIST_KEPT:
                problems.append(f"more than {LIST_KEPT} entries of {kind}: not followed")
                return
            yield entry

    def blocks(
        self,
        block_set: Object,
        layout: np.dtype[np.void],
        whose: Owner,
        problems: list[str] | None = None,
    ) -> None:
        """Claim the blocks of a ``struct kho_block_set``."""
        found = self.problems if problems is None else problems
        head = block_set.head_pa.value_()
        blocks, _ = self.following.block_set(head, layout, found)
        self.following.claim(whose, blocks, self.following.abi.page_size)

    # -- the serialized form ----------------------------------------------------------------------

    def serialized(self, head: int) -> list[LuoSession]:
        """The sessions of a chain of blocks."""
        blocks, entries = self.following.block_set(head, LUO_SESSION_SER, self.problems)
        self.following.claim(
            Owner(Kind.LUO, "LUO: list of sessions"), blocks, self.following.abi.page_size
        )
        return [self._serialized(entry) for entry in self._kept(entries, self.problems)]

    def _serialized(self, ser: np.void) -> LuoSession:
        name, problems = text(bytes(ser["name"])), list[str]()
        blocks, entries = self.following.block_set(int(ser["files"]), LUO_FILE_SER, problems)
        whose = Owner(Kind.SESSION, f"session {name}: list of files", name)
        self.following.claim(whose, blocks, self.following.abi.page_size)
        files = [
            self._file(
                name,
                text(bytes(entry["compatible"])),
                int(entry["token"]),
                int(entry["data"]),
                None,
            )
            for entry in self._kept(entries, problems)
        ]
        if int(ser["count"]) != len(entries):
            problems.append(f"counts {int(ser['count'])} files, lists {len(entries)}")
        return LuoSession(name, None, int(ser["count"]), files, problems)

    def _kept(self, entries: np.ndarray[Any, Any], problems: list[str]) -> np.ndarray[Any, Any]:
        if len(entries) > LIST_KEPT:
            problems.append(f"{len(entries)} entries, only {LIST_KEPT} are looked at")
        return entries[:LIST_KEPT]

    def _file(
        self, session: str, handler: str, token: int, data: int, status: int | None
    ) -> LuoFile:
        found: Memfd | str | None = None
        # What was retrieved is a file again: what described it has been given back.
        if handler == MEMFD_COMPATIBLE and not status:
            whose = Owner(Kind.FILE, f"memfd {token:#x} of session {session}", session, token)
            found = self.following.memfd(data, whose)
        if isinstance(found, str):
            return LuoFile(handler, token, data, status, None, [found])
        return LuoFile(handler, token, data, status, found)

    # -- file-lifecycle-bound data ----------------------------------------------------------------

    def flbs(self) -> list[Flb]:
        """What would be handed over of ``luo_flb_global.list``."""
        head = self.prog["luo_flb_global"].list
        found = []
        for flb in self._entries("struct liveupdate_flb", head, "private.list", self.problems):
            state = flb.private.outgoing
            count = state.count.refs.counter.value_()
            if count > 0:
                found.append(Flb(text(_string(flb.compatible)), state.data.value_(), count))
        return found

    def flb_header(self, phys: int) -> list[Flb]:
        """A ``struct luo_flb_header_ser`` and its entries."""
        following = self.following
        header = following.structure(phys, LUO_FLB_HEADER_SER)
        if header is None:
            self.problems.append(f"struct luo_flb_header_ser at {phys:#x} cannot be read")
            return []
        pages, count = int(header["pgcnt"]), int(header["count"])
        size = pages * following.abi.page_size
        room = max(size - LUO_FLB_HEADER_SER.itemsize, 0) // LUO_FLB_SER.itemsize
        raw = following.bytes_at(phys, size) if 0 < pages <= LIST_KEPT else None
        if raw is None or count > room:
            self.problems.append(f"FLB header at {phys:#x}: {pages} pages, {count} entries")
            return []
        following.claim(Owner(Kind.LUO, "LUO: list of FLBs"), phys, size)
        entries = np.frombuffer(raw, LUO_FLB_SER, count, LUO_FLB_HEADER_SER.itemsize)
        return [
            Flb(text(bytes(entry["name"])), int(entry["data"]), int(entry["count"]))
            for entry in entries
        ]


def _string(characters: Object) -> bytes:
    """A ``char`` array of the kernel's, whole."""
    return bytes(characters.string_())
