# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read what the Live Update Orchestrator hands over and was handed.

Sessions that a kernel knows of are read from its own lists (``luo_session_global``); those that it
was handed and has not looked at yet from their serialized form.
Kernel sources: ``kernel/liveupdate/luo_*.c``, ``include/linux/kho/abi/luo.h``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from drgn import FaultError, Object, Program
from drgn.helpers.linux.list import list_empty, list_for_each_entry
from drgn.helpers.linux.mm import virt_to_phys
from numpy.typing import NDArray

from ..clients import FLB_LIST, Flb, Kind, Luo, LuoFile, LuoSession, Memfd, Owner
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

#: Sessions, files and FLBs that are kept, all together: where there are more, something was
#: written over, or a list loops.
ENTRIES_KEPT: Final = 1 << 14

LIST_OF_SESSIONS: Final = Owner(Kind.LUO, "LUO: list of sessions")


def read_outgoing(prog: Program, following: Following, phys: int) -> Luo:
    """
    What LUO would hand over.

    :param phys: of the outgoing ``struct luo_ser``, the blob of the subtree.
    """
    ser = following.structure(phys, LUO_SER)
    compatible = None if ser is None else text(bytes(ser["compatible"]))
    if ser is None or compatible != LUO_COMPATIBLE:
        return _unknown(following, phys, compatible)
    lists = _Lists(following, prog=prog)
    header = prog["luo_session_global"].outgoing
    sessions = lists.listed(header)
    lists.blocks(header.block_set, LUO_SESSION_SER, LIST_OF_SESSIONS, lists.problems)
    flbs = lists.listed_flbs()
    if int(ser["flbs_pa"]):
        lists.flbs(int(ser["flbs_pa"]))
    return Luo(
        phys,
        compatible,
        int(ser["liveupdate_num"]),
        True,
        sessions,
        flbs,
        problems=lists.problems,
    )


def read_incoming(prog: Program, following: Following, phys: int) -> Luo:
    """
    What LUO was handed, as far as it is still there.

    :param phys: of the ``struct luo_ser`` that came; its page was given back early in the boot.
    """
    lists = _Lists(following, prog=prog)
    header = prog["luo_session_global"].incoming
    head = header.block_set.head_pa.value_()
    live = not list_empty(header.list.address_of_()) or not head
    sessions = lists.listed(header) if live else lists.sessions(head)
    number = prog["luo_global"].liveupdate_num.value_()
    flbs = []
    incoming = prog["luo_flb_global"].incoming
    if incoming.active:
        flbs = lists.flbs(int(virt_to_phys(incoming.header_ser)))
    # The kernel takes no other ABI than its own: it would not have booted.
    return Luo(
        phys,
        LUO_COMPATIBLE if number else None,
        number,
        live,
        sessions,
        flbs,
        problems=lists.problems,
    )


def _unknown(following: Following, phys: int, compatible: str | None) -> Luo:
    """An ABI that is not known: its first bytes, and no guess."""
    raw = following.bytes_at(phys, LUO_SER.itemsize)
    if raw is None:
        return Luo(phys, None, problems=[f"struct luo_ser at {phys:#x} cannot be read"])
    return Luo(phys, compatible, raw=raw.hex())


@dataclass
class Serialized:
    """
    What one kernel has serialized for the next, as far as it is sound.

    :param problems: what is wrong with it, in words, but for what is a session's or a file's own.
    """

    following: Following
    problems: list[str] = field(default_factory=list)
    _left: int = ENTRIES_KEPT

    def sessions(self, head: int) -> list[LuoSession]:
        """
        The ``struct luo_session_ser`` of a chain of blocks.

        :param head: ``phys_addr_t`` of the first block.
        """
        entries = self._entries(head, LUO_SESSION_SER, LIST_OF_SESSIONS, self.problems)
        return [self._session_ser(ser) for ser in entries]

    def _session_ser(self, ser: np.void) -> LuoSession:
        name, count = text(bytes(ser["name"])), int(ser["count"])
        problems: list[str] = []
        entries = self._entries(int(ser["files"]), LUO_FILE_SER, _list_of_files(name), problems)
        files = [
            self._file(
                name,
                text(bytes(entry["compatible"])),
                int(entry["token"]),
                int(entry["data"]),
                None,
            )
            for entry in entries
        ]
        if count != len(files):
            problems.append(f"counts {count} files, lists {len(files)}")
        return LuoSession(name, None, count, files, problems)

    def _entries(
        self, head: int, layout: np.dtype[np.void], whose: Owner, problems: list[str]
    ) -> NDArray[Any]:
        """The entries of a chain of blocks, which are claimed."""
        blocks, entries = self.following.block_set(head, layout, problems, written=True)
        self.following.claim(whose, blocks, self.following.abi.page_size)
        return self._kept(entries, problems)

    def _kept(self, entries: NDArray[Any], problems: list[str]) -> NDArray[Any]:
        kept = entries[: self._left]
        if len(kept) < len(entries):
            problems.append(f"{len(entries)} entries, only {len(kept)} are looked at")
        self._left -= len(kept)
        return kept

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

    def flbs(self, phys: int) -> list[Flb]:
        """A ``struct luo_flb_header_ser`` and its entries."""
        following = self.following
        header = following.structure(phys, LUO_FLB_HEADER_SER)
        if header is None:
            self.problems.append(f"struct luo_flb_header_ser at {phys:#x} cannot be read")
            return []
        pages, count = int(header["pgcnt"]), int(header["count"])
        used = LUO_FLB_HEADER_SER.itemsize + count * LUO_FLB_SER.itemsize
        size = pages * following.abi.page_size
        sound = used <= size and count <= ENTRIES_KEPT and following.in_ram(phys, size)
        raw = following.bytes_at(phys, used) if sound else None
        if raw is None:
            self.problems.append(f"FLB header at {phys:#x}: {pages} pages, {count} entries")
            return []
        following.claim(FLB_LIST, phys, size)
        entries = np.frombuffer(raw, LUO_FLB_SER, count, LUO_FLB_HEADER_SER.itemsize)
        return [
            Flb(text(bytes(entry["name"])), int(entry["data"]), int(entry["count"]))
            for entry in self._kept(entries, self.problems)
        ]


@dataclass
class _Lists(Serialized):
    """A kernel's own lists, too."""

    prog: Program = field(kw_only=True)

    def listed(self, header: Object) -> list[LuoSession]:
        """The sessions of a ``struct luo_session_header``."""
        sessions: list[LuoSession] = []
        try:
            for session in self._walk("struct luo_session", header.list, "list", self.problems):
                sessions.append(self._session(session))
        except FaultError as error:
            self.problems.append(f"sessions cannot be read ({error}): they moved, or are corrupt")
        return sessions

    def _session(self, session: Object) -> LuoSession:
        name = text(_string(session.name))
        problems: list[str] = []
        file_set = session.file_set
        self.blocks(file_set.block_set, LUO_FILE_SER, _list_of_files(name), problems)
        files = [
            self._file(
                name,
                text(_string(file.fh.compatible)),
                file.token.value_(),
                file.serialized_data.value_(),
                file.retrieve_status.value_(),
            )
            for file in self._walk("struct luo_file", file_set.files_list, "list", problems)
        ]
        count = file_set.count.value_()
        if count != len(files):
            problems.append(f"counts {count} files, lists {len(files)}")
        return LuoSession(name, bool(session.retrieved), count, files, problems)

    def _walk(self, kind: str, head: Object, member: str, problems: list[str]) -> Iterator[Object]:
        """The entries of a kernel list, which may move meanwhile."""
        for entry in list_for_each_entry(kind, head.address_of_(), member):
            if not self._left:
                problems.append(f"more than {ENTRIES_KEPT} entries: not followed")
                return
            self._left -= 1
            yield entry

    def blocks(
        self, block_set: Object, layout: np.dtype[np.void], whose: Owner, problems: list[str]
    ) -> None:
        """Claim the blocks of a ``struct kho_block_set``."""
        head = block_set.head_pa.value_()
        blocks, _ = self.following.block_set(head, layout, problems, written=False)
        self.following.claim(whose, blocks, self.following.abi.page_size)

    def listed_flbs(self) -> list[Flb]:
        """What would be handed over of ``luo_flb_global.list``."""
        head = self.prog["luo_flb_global"].list
        found = []
        for flb in self._walk("struct liveupdate_flb", head, "private.list", self.problems):
            state = flb.private.outgoing
            count = state.count.refs.counter.value_()
            if count > 0:
                found.append(Flb(text(_string(flb.compatible)), state.data.value_(), count))
        return found


def _list_of_files(session: str) -> Owner:
    return Owner(Kind.SESSION, f"session {session}: list of files", session)


def _string(characters: Object) -> bytes:
    """A ``char`` array of the kernel's, whole."""
    return bytes(characters.string_())
