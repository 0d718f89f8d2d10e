# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read what the Live Update Orchestrator hands over and was handed.

Sessions that a kernel knows of are read from its own lists (``luo_session_global``); sessions that
it was handed but has not looked at yet are read from their serialized form.  That form is arrays up
to Linux 7.1, to which an FDT leads, and chains of blocks since.
Kernel sources: ``kernel/liveupdate/luo_*.c``, ``include/linux/kho/abi/luo.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from drgn import FaultError, Object, Program
from drgn.helpers.linux.list import list_empty, list_for_each_entry
from drgn.helpers.linux.mm import virt_to_phys
from numpy.typing import NDArray

from ..abi.fdt import MAGIC
from ..abi.kho_fdt import LuoFdt, compatible_of, parse_luo_fdt
from ..abi.serialized import (
    LUO_COMPATIBLE,
    LUO_FDT_COMPATIBLE,
    LUO_FILE_SER,
    LUO_FILES,
    LUO_FLB_HEADER_SER,
    LUO_FLB_SER,
    LUO_SER,
    LUO_SESSION_SER,
    LUO_SESSIONS,
    MEMFDS,
    Array,
    text,
    unpack,
)
from ..facts import budget
from ..facts.clients import FLB_LIST, Flb, Luo, LuoFile, LuoSession, Memfd, Owner, OwnerKind
from .follow import ClientWalker
from .probe import LuoLists

LIST_OF_SESSIONS: Final = Owner(OwnerKind.LUO, "LUO: list of sessions")


@dataclass(frozen=True)
class Handed:
    """
    The blob of LUO's subtree: a ``struct luo_ser`` or an FDT, if its ABI is known.

    :param phys: ``phys_addr_t``.
    :param blob: its bytes, as far as they could be read.
    """

    phys: int
    blob: bytes | None


@dataclass(frozen=True)
class From:
    """
    A kernel's LUO.

    :param kept: how it keeps its sessions.
    :param moves: the kernel runs meanwhile: what cannot be read now may be readable at the next
        look.
    """

    prog: Program
    kept: LuoLists
    moves: bool


@dataclass(frozen=True)
class _Leads:
    """
    Where LUO's blob leads.

    :param sessions: ``phys_addr_t`` of the array of sessions, 0: there is none; None: the kernel's
        own lists say where its sessions are written.
    :param flbs: ``phys_addr_t`` of the ``struct luo_flb_header_ser``; 0: there is none.
    """

    compatible: str
    number: int | None
    sessions: int | None
    flbs: int
    problems: list[str]


def read_outgoing(luo: From, following: ClientWalker, handed: Handed) -> tuple[Luo, list[str]]:
    """What LUO would hand over, and which parts could not be read."""
    leads = _leads(luo, following, handed)
    if leads is None:
        return unknown(following, handed), []
    lists = _Lists(following, arrays=luo.kept.arrays, luo=luo, problems=list(leads.problems))
    header = luo.prog["luo_session_global"].outgoing
    sessions = lists.listed(header)
    lists.try_to(
        "the memory for LUO's sessions", lambda: lists.room_for_sessions(header, leads.sessions)
    )
    flbs: list[Flb] = []
    lists.try_to("LUO's FLBs", lambda: flbs.extend(lists.listed_flbs()))
    if leads.flbs:
        lists.flbs(leads.flbs)
    found = Luo(
        handed.phys,
        leads.compatible,
        leads.number,
        True,
        sessions,
        flbs,
        problems=lists.problems,
    )
    return found, lists.unread


def _leads(luo: From, following: ClientWalker, handed: Handed) -> _Leads | None:
    """None: the blob is of another ABI than this kernel's, or cannot be read."""
    if luo.kept.arrays:
        fdt = LuoFdt(None) if handed.blob is None else parse_luo_fdt(handed.blob, luo.kept.flbs)
        if not fdt.is_known or fdt.compatible is None:
            return None
        problems = [f"its FDT: {problem}" for problem in fdt.problems]
        return _Leads(
            fdt.compatible, fdt.liveupdate_num, fdt.sessions or 0, fdt.flbs or 0, problems
        )
    ser = following.structure(handed.phys, LUO_SER)
    if ser is None or text(bytes(ser["compatible"])) != LUO_COMPATIBLE:
        return None
    return _Leads(LUO_COMPATIBLE, int(ser["liveupdate_num"]), None, int(ser["flbs_pa"]), [])


def read_incoming(luo: From, following: ClientWalker, handed: Handed) -> tuple[Luo, list[str]]:
    """
    What LUO was handed, as far as it is still there, and which parts could not be read.

    The page of the blob is of no use: the kernel gave back that of a ``struct luo_ser`` early in
    the boot, and has taken from an FDT what it needs.
    """
    prog = luo.prog
    lists = _Lists(following, arrays=luo.kept.arrays, luo=luo)
    header = prog["luo_session_global"].incoming
    sessions: list[LuoSession] = []
    flbs: list[Flb] = []
    live, number = False, 0

    def read_sessions() -> None:
        nonlocal live
        waiting, listed = lists.waiting(header), not list_empty(header.list.address_of_())
        live = listed or not waiting
        if listed:
            sessions.extend(lists.listed(header))
        # A kernel that gave up half-way still has what it has not read.
        if waiting and (luo.kept.arrays or not listed):
            sessions.extend(lists.sessions(waiting, {each.name for each in sessions}))

    def read_number() -> None:
        nonlocal number
        number = prog["luo_global"].liveupdate_num.value_()

    def read_flbs() -> None:
        incoming = prog["luo_flb_global"].incoming
        if incoming.active:
            flbs.extend(lists.flbs(int(virt_to_phys(incoming.header_ser))))

    lists.try_to("LUO's sessions", read_sessions)
    lists.try_to("LUO's number of live updates", read_number)
    if luo.kept.flbs:
        lists.try_to("LUO's FLBs", read_flbs)
    # The kernel accepts only its own ABI: with another one, it would not have booted.
    compatible = LUO_FDT_COMPATIBLE if luo.kept.arrays else LUO_COMPATIBLE
    found = Luo(
        handed.phys,
        compatible if number else None,
        number,
        live,
        sessions,
        flbs,
        problems=lists.problems,
    )
    return found, lists.unread


def unknown(following: ClientWalker, handed: Handed) -> Luo:
    """For an ABI that is not known: the first bytes, but no guess."""
    phys = handed.phys
    raw = following.bytes_at(phys, LUO_SER.itemsize)
    if raw is None:
        return Luo(phys, None, problems=[f"LUO's blob at {phys:#x} cannot be read"])
    if raw.startswith(MAGIC):
        return Luo(phys, compatible_of(handed.blob or raw), raw=raw.hex())
    ser = unpack(LUO_SER, raw)
    return Luo(phys, text(bytes(ser["compatible"])), raw=raw.hex())


@dataclass
class Serialized:
    """
    What one kernel has serialized for the next, as far as it is sound.

    :param arrays: its lists are arrays; else chains of blocks.
    :param problems: what is wrong with it, in words, except the problems of single sessions and
        files.
    """

    following: ClientWalker
    problems: list[str] = field(default_factory=list)
    arrays: bool = False
    _left: int = budget.ENTRIES

    def sessions(self, at: int, without: Collection[str] = ()) -> list[LuoSession]:
        """
        The ``struct luo_session_ser`` of a list.

        :param at: ``phys_addr_t`` of its first block, or of its array.
        :param without: names of sessions to leave out.
        """
        whose, problems = LIST_OF_SESSIONS, self.problems
        entries = (
            self._array(at, LUO_SESSIONS, None, whose, problems)
            if self.arrays
            else self._chain(at, LUO_SESSION_SER, whose, problems)
        )
        names = _Once("session name", problems)
        named = [(text(bytes(ser["name"])), ser) for ser in self._kept(entries, problems)]
        return [
            self._session_ser(name, ser)
            for name, ser in named
            if name not in without and names.is_new(name)
        ]

    def _session_ser(self, name: str, ser: np.void) -> LuoSession:
        at, count = int(ser["files"]), int(ser["count"])
        problems: list[str] = []
        whose = _list_of_files(name)
        entries = self._kept(
            self._array(at, LUO_FILES, count, whose, problems)
            if self.arrays
            else self._chain(at, LUO_FILE_SER, whose, problems),
            problems,
        )
        tokens = _Once("token", problems)
        files = [
            self._file(
                name,
                text(bytes(entry["compatible"])),
                int(entry["token"]),
                int(entry["data"]),
                None,
            )
            for entry in entries
            if tokens.is_new(int(entry["token"]))
        ]
        if count != len(entries):
            problems.append(f"counts {count} files, lists {len(entries)}")
        return LuoSession(name, None, count, files, problems)

    def _chain(
        self, head: int, layout: np.dtype[np.void], whose: Owner, problems: list[str]
    ) -> NDArray[Any]:
        """The entries of a chain of blocks; claims the blocks."""
        blocks, entries = self.following.block_set(head, layout, problems, written=True)
        self.following.claim(whose, blocks, self.following.abi.page_size)
        return entries

    def _array(
        self, at: int, of: Array, count: int | None, whose: Owner, problems: list[str]
    ) -> NDArray[Any]:
        """The entries of an array; claims its memory."""
        size, entries = self.following.array(at, of, count, problems)
        if size:
            self.following.claim(whose, at, size)
        return entries

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
        # A retrieved memfd is a file again: the kernel has given back the memory that described it.
        if handler in MEMFDS and not status:
            whose = Owner(OwnerKind.FILE, f"memfd {token:#x} of session {session}", session, token)
            found = self.following.memfd(data, whose, handler)
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
        sound = used <= size and count <= budget.ENTRIES and following.in_ram(phys, size)
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
    """
    Also reads a kernel's own lists.

    :param unread: what could not be read of a kernel that stands still, in words.
    """

    luo: From = field(kw_only=True)
    unread: list[str] = field(default_factory=list)

    def try_to(self, what: str, read: Callable[[], None]) -> None:
        """Read something, or note that it cannot be read."""
        try:
            read()
        except FaultError as error:
            if self.luo.moves:
                self.problems.append(f"{what} cannot be read ({error}): they moved, or are corrupt")
            else:
                # A vmcore may lack pages although nothing is wrong with them.
                self.unread.append(what)

    def listed(self, header: Object) -> list[LuoSession]:
        """The sessions of a ``struct luo_session_header``."""
        sessions: list[LuoSession] = []
        names = _Once("session name", self.problems)

        def read() -> None:
            for session in self._walk("struct luo_session", header.list, "list", self.problems):
                if names.is_new(text(_string(session.name))):
                    sessions.append(self._session(session))

        self.try_to("LUO's sessions", read)
        return sessions

    def _session(self, session: Object) -> LuoSession:
        name = text(_string(session.name))
        problems: list[str] = []
        file_set = session.file_set
        self._room_for_files(file_set, _list_of_files(name), problems)
        tokens = _Once("token", problems)
        files: list[LuoFile] = []
        listed = 0
        for file in self._walk("struct luo_file", file_set.files_list, "list", problems):
            listed += 1
            if tokens.is_new(file.token.value_()):
                files.append(self._listed_file(name, file))
        # A long, which the kernel hands over as u64.
        count = file_set.count.value_() % 2**64
        if count != listed:
            problems.append(f"counts {count} files, lists {listed}")
        return LuoSession(name, bool(session.retrieved), count, files, problems)

    def _listed_file(self, session: str, file: Object) -> LuoFile:
        return self._file(
            session,
            text(_string(file.fh.compatible)),
            file.token.value_(),
            file.serialized_data.value_(),
            file.retrieve_status.value_()
            if self.luo.kept.retrieve_status
            else int(file.retrieved.value_()),
        )

    def _walk(self, kind: str, head: Object, member: str, problems: list[str]) -> Iterator[Object]:
        """The entries of a kernel list, which may move meanwhile."""
        for entry in list_for_each_entry(kind, head.address_of_(), member):
            if not self._left:
                problems.append(f"more than {budget.ENTRIES} entries: not followed")
                return
            self._left -= 1
            yield entry

    def waiting(self, header: Object) -> int:
        """
        ``phys_addr_t`` of the serialized sessions that the kernel has not read, or gave up on.

        0: there are none.
        """
        if not self.arrays:
            return int(header.block_set.head_pa.value_())
        return int(virt_to_phys(header.header_ser)) if header.header_ser else 0

    def room_for_sessions(self, header: Object, leads: int | None) -> None:
        """
        Claim where the sessions of a ``struct luo_session_header`` are going to be written.

        :param leads: where the next kernel will look for them; None: where they are written.
        """
        if leads is None:
            self._blocks(header.block_set, LUO_SESSION_SER, LIST_OF_SESSIONS, self.problems)
            return
        self._room(leads, LUO_SESSIONS, LIST_OF_SESSIONS, self.problems)
        written = self.waiting(header)
        if leads and written != leads:
            self.problems.append(
                f"its FDT leads to sessions at {leads:#x}, the kernel writes them to {written:#x}"
            )

    def _room_for_files(self, file_set: Object, whose: Owner, problems: list[str]) -> None:
        """Claim where the files of a ``struct luo_file_set`` are written."""
        if not self.arrays:
            self._blocks(file_set.block_set, LUO_FILE_SER, whose, problems)
        elif file_set.files:
            self._room(int(virt_to_phys(file_set.files)), LUO_FILES, whose, problems)

    def _room(self, at: int, of: Array, whose: Owner, problems: list[str]) -> None:
        """Claim the memory of an array."""
        size = self.following.room(at, of, problems)
        if size:
            self.following.claim(whose, at, size)

    def _blocks(
        self, block_set: Object, layout: np.dtype[np.void], whose: Owner, problems: list[str]
    ) -> None:
        """Claim the blocks of a ``struct kho_block_set``."""
        head = block_set.head_pa.value_()
        blocks, _ = self.following.block_set(head, layout, problems, written=False)
        self.following.claim(whose, blocks, self.following.abi.page_size)

    def listed_flbs(self) -> list[Flb]:
        """The FLBs on ``luo_flb_global.list`` that would be handed over."""
        if not self.luo.kept.flbs:
            return []
        head = self.luo.prog["luo_flb_global"].list
        found = []
        for flb in self._walk("struct liveupdate_flb", head, "private.list", self.problems):
            state = flb.private.outgoing
            counted = state.count.refs.counter if self.luo.kept.flb_refcount else state.count
            count = counted.value_()
            if count > 0:
                found.append(Flb(text(_string(flb.compatible)), state.data.value_(), count))
        return found


@dataclass
class _Once:
    """
    Names that must be unique: whatever comes under the same name again is left out and reported.
    """

    what: str
    problems: list[str]
    _seen: set[str | int] = field(default_factory=set)
    _told: set[str | int] = field(default_factory=set)

    def is_new(self, name: str | int) -> bool:
        if name not in self._seen:
            self._seen.add(name)
            return True
        if name not in self._told:
            self._told.add(name)
            shown = f"{name:#x}" if isinstance(name, int) else repr(name)
            self.problems.append(f"{self.what} {shown} is there twice")
        return False


def _list_of_files(session: str) -> Owner:
    return Owner(OwnerKind.SESSION, f"session {session}: list of files", session)


def _string(characters: Object) -> bytes:
    """All of a ``char`` array of the kernel."""
    return bytes(characters.string_())
