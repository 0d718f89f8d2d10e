# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read what the Live Update Orchestrator hands over and was handed.

Sessions that a kernel knows of are read from its own lists (``luo_session_global``); sessions that
it was handed but has not looked at yet are read from their serialized form.  That form is arrays up
to Linux 7.1, to which an FDT leads, and chains of blocks since.
Kernel sources: ``kernel/liveupdate/luo_*.c``, ``include/linux/kho/abi/luo.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
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
from ..facts import budget, fd_stores
from ..facts.clients import (
    FLB_LIST,
    Flb,
    Luo,
    LuoFile,
    LuoSession,
    Memfd,
    Owner,
    OwnerKind,
    StoredFd,
    file_owner,
)
from .content import memfd_pieces
from .follow import ClientWalker
from .probe import LuoLists, record_layout
from .walk import READS

#: How many memfds are followed together.
TOGETHER: Final = 1 << 12

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
        left_out=lists.left_out,
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
        left_out=lists.left_out,
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


@dataclass(frozen=True)
class _Files:
    """
    Files of a session, each a row.

    :param handler: ``compatible`` of each one's handler.
    :param status: ``retrieve_status``, as in :class:`~khoscope.facts.clients.LuoFile`.
    """

    handler: list[str]
    token: list[int]
    data: list[int]
    status: list[int | None]


@dataclass
class _Session:
    """
    A session whose files are not followed yet.

    :param room: where its files are written: ``phys_addr_t`` of the first block, or the virtual
        address of the array.
    :param found: what each file leads to, or why it cannot be followed.
    :param stored: of which store each file is, by its token.
    :param whole_of: of which store the session is.
    """

    name: str
    retrieved: bool | None
    count: int
    files: _Files
    problems: list[str]
    left_out: int = 0
    room: int = 0
    found: list[Memfd | str | None] = field(default_factory=list)
    stored: dict[int, StoredFd] = field(default_factory=dict)
    whole_of: StoredFd | None = None
    notes: list[str] = field(default_factory=list)

    def whole(self) -> LuoSession:
        of = self.files
        files = [
            LuoFile(handler, token, data, status, None, [found], self.stored.get(token))
            if isinstance(found, str)
            else LuoFile(handler, token, data, status, found, stored=self.stored.get(token))
            for handler, token, data, status, found in zip(
                of.handler, of.token, of.data, of.status, self.found, strict=True
            )
        ]
        return LuoSession(
            self.name,
            self.retrieved,
            self.count,
            files,
            self.problems,
            self.left_out,
            self.whole_of,
            self.notes,
        )

    def owner(self, row: int) -> Owner:
        """Of what that file preserves."""
        token = self.files.token[row]
        return file_owner(self.name, token, self.stored.get(token))


@dataclass
class Serialized:
    """
    What one kernel has serialized for the next, as far as it is sound.

    :param arrays: its lists are arrays; else chains of blocks.
    :param problems: what is wrong with it, in words, except the problems of single sessions and
        files.
    :param left_out: sessions and FLBs that are not looked at.
    """

    following: ClientWalker
    problems: list[str] = field(default_factory=list)
    arrays: bool = False
    left_out: int = 0
    _left: int = field(default_factory=lambda: budget.ENTRIES)

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
        kept = self._kept(entries)
        self.left_out += len(entries) - len(kept)
        names = _Once("session name", problems)
        named = [(text(name), *rest) for name, *rest in kept.tolist()]
        return self._followed(
            self._session_ser(name, files, count)
            for name, files, count in named
            if name not in without and names.is_new(name)
        )

    def _session_ser(self, name: str, at: int, count: int) -> _Session:
        problems: list[str] = []
        whose = _list_of_files(name)
        entries = (
            self._array(at, LUO_FILES, count, whose, problems)
            if self.arrays
            else self._chain(at, LUO_FILE_SER, whose, problems)
        )
        kept = self._kept(entries)
        files = _Files(
            [_text(each) for each in kept["compatible"].tolist()],
            kept["token"].tolist(),
            kept["data"].tolist(),
            [None] * len(kept),
        )
        session = _Session(name, None, count, _once(files, problems), problems)
        session.left_out = len(entries) - len(kept)
        if count != len(entries):
            problems.append(f"counts {count} files, lists {len(entries)}")
        return session

    def _followed(self, sessions: Iterable[_Session]) -> list[LuoSession]:
        """The same sessions with what their files lead to."""
        owners = len(self.following.owners)
        every = list(sessions)
        self._name_stored(every)
        wanted: dict[str, list[tuple[_Session, int]]] = {}
        for session in every:
            files = session.files
            session.found = [None] * len(files.token)
            for row, (handler, status) in enumerate(zip(files.handler, files.status, strict=True)):
                # A retrieved memfd is a file again: the kernel has given back the memory that
                # described it.
                if handler in MEMFDS and not status:
                    wanted.setdefault(handler, []).append((session, row))
        for handler, rows in wanted.items():
            for start in range(0, len(rows), TOGETHER):
                self._follow(handler, rows[start : start + TOGETHER])
        if len(every) > 1:
            rank = {session.name: number for number, session in enumerate(every)}
            self.following.sort_owners(owners, lambda owner: rank[owner.session or ""])
        return [session.whole() for session in every]

    def _name_stored(self, sessions: list[_Session]) -> None:
        """Find out from systemd's session of whose stores files and sessions are."""
        systemd = next((each for each in sessions if each.name == fd_stores.SESSION), None)
        if systemd is None:
            return
        try:
            stores = self._fd_stores(systemd.files)
        except ValueError as error:
            what = f"what it says of services (token {fd_stores.TOKEN:#x}) is of no use"
            systemd.notes.append(f"{what}: {error}")
            return
        systemd.stored = stores.files
        for each in sessions:
            each.whole_of = stores.sessions.get(each.name)

    def _fd_stores(self, files: _Files) -> fd_stores.FdStores:
        """:raises ValueError: if systemd's mapping cannot be read, or makes no sense."""
        try:
            row = files.token.index(fd_stores.TOKEN)
        except ValueError:
            raise ValueError("there is no such file") from None
        if files.status[row]:
            raise ValueError("somebody has retrieved it")
        if files.handler[row] not in MEMFDS:
            raise ValueError("it is no memfd")
        following = self.following
        at = following.abi, following.ram, following.read
        raw = bytearray()
        for piece in memfd_pieces(*at, files.handler[row], files.data[row]):
            if isinstance(piece, int):
                raise ValueError("not all of it can be read")
            raw += piece
            if len(raw) > budget.FD_STORES:
                raise ValueError(f"it has more than {budget.FD_STORES:,} bytes")
        return fd_stores.fd_stores(bytes(raw))

    def _follow(self, handler: str, rows: list[tuple[_Session, int]]) -> None:
        whose = [session.owner(row) for session, row in rows]
        data = [session.files.data[row] for session, row in rows]
        memfds = self.following.memfds(handler, data, whose)
        for (session, row), found in zip(rows, memfds, strict=True):
            session.found[row] = found

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

    def _kept(self, entries: NDArray[Any]) -> NDArray[Any]:
        """The first entries, as many as are still looked at."""
        kept = entries[: self._left]
        self._left -= len(kept)
        return kept

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
        sound = used <= size and following.in_ram(phys, size)
        raw = following.bytes_at(phys, used) if sound else None
        if raw is None:
            self.problems.append(f"FLB header at {phys:#x}: {pages} pages, {count} entries")
            return []
        following.claim(FLB_LIST, phys, size)
        entries = np.frombuffer(raw, LUO_FLB_SER, count, LUO_FLB_HEADER_SER.itemsize)
        kept = self._kept(entries)
        self.left_out += len(entries) - len(kept)
        return [Flb(text(name), data, count) for name, data, count in kept.tolist()]


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
            self._cannot(what, error)

    def _cannot(self, what: str, error: FaultError) -> None:
        if self.luo.moves:
            self.problems.append(f"{what} cannot be read ({error}): they moved, or are corrupt")
        else:
            # A vmcore may lack pages although nothing is wrong with them.
            self.unread.append(what)

    def listed(self, header: Object) -> list[LuoSession]:
        """The sessions of a ``struct luo_session_header``."""
        head = header.list.address_of_().value_()
        look = _Look(self.luo, self._left)
        for _ in range(READS if self.luo.moves else 1):
            look = _Look(self.luo, self._left)
            look.at(head)
            if look.is_sound:
                break
        self._left, self.left_out = look.left, self.left_out + look.left_out
        self.problems += look.problems
        if look.fault is not None:
            self._cannot("LUO's sessions", look.fault)

        def claimed() -> Iterator[_Session]:
            what = "the memory for LUO's sessions"
            for session in look.sessions:
                self.try_to(what, partial(self._room_for_files, session))
                yield session

        return self._followed(claimed())

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
            head = header.block_set.head_pa.value_()
            self._blocks(head, LUO_SESSION_SER, LIST_OF_SESSIONS, self.problems)
            return
        self._room(leads, LUO_SESSIONS, LIST_OF_SESSIONS, self.problems)
        written = self.waiting(header)
        if leads and written != leads:
            self.problems.append(
                f"its FDT leads to sessions at {leads:#x}, the kernel writes them to {written:#x}"
            )

    def _room_for_files(self, session: _Session) -> None:
        """Claim where the files of a session are written."""
        whose, problems = _list_of_files(session.name), session.problems
        if not self.arrays:
            self._blocks(session.room, LUO_FILE_SER, whose, problems)
        elif session.room:
            pointer = Object(self.luo.prog, "void *", session.room)
            self._room(int(virt_to_phys(pointer)), LUO_FILES, whose, problems)

    def _room(self, at: int, of: Array, whose: Owner, problems: list[str]) -> None:
        """Claim the memory of an array."""
        size = self.following.room(at, of, problems)
        if size:
            self.following.claim(whose, at, size)

    def _blocks(
        self, head: int, layout: np.dtype[np.void], whose: Owner, problems: list[str]
    ) -> None:
        """Claim the blocks of a ``struct kho_block_set``; ``phys_addr_t`` of the first."""
        blocks, _ = self.following.block_set(head, layout, problems, written=False)
        self.following.claim(whose, blocks, self.following.abi.page_size)

    def listed_flbs(self) -> list[Flb]:
        """The FLBs on ``luo_flb_global.list`` that would be handed over."""
        if not self.luo.kept.flbs:
            return []
        head = self.luo.prog["luo_flb_global"].list
        found = []
        for flb in self._flbs(head):
            state = flb.private.outgoing
            counted = state.count.refs.counter if self.luo.kept.flb_refcount else state.count
            count = counted.value_()
            if count > 0:
                found.append(Flb(text(_string(flb.compatible)), state.data.value_(), count))
        return found

    def _flbs(self, head: Object) -> Iterator[Object]:
        """Each ``struct liveupdate_flb`` of a list, as far as it can be followed."""
        seen: set[int] = set()
        kind = "struct liveupdate_flb"
        for flb in list_for_each_entry(kind, head.address_of_(), "private.list"):
            if flb.value_() in seen:
                self.problems.append(f"the list of FLBs loops at {flb.value_():#x}")
                return
            if not self._left:
                self.left_out += 1
                return
            seen.add(flb.value_())
            self._left -= 1
            yield flb


@dataclass
class _Look:
    """
    One look at a kernel's own list of sessions, which may move meanwhile.

    :param left: how many entries are still looked at.
    :param fault: what ended it.
    """

    luo: From
    left: int
    left_out: int = 0
    sessions: list[_Session] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fault: FaultError | None = None
    _handlers: dict[int, str] = field(default_factory=dict)

    @cached_property
    def _session(self) -> np.dtype[np.void]:
        file_set = "files" if self.luo.kept.arrays else "block_set.head_pa"
        return record_layout(
            self.luo.prog,
            "struct luo_session",
            next="list.next",
            name="name",
            retrieved="retrieved",
            count="file_set.count",
            room=f"file_set.{file_set}",
            files="file_set.files_list.next",
        )

    @cached_property
    def _file(self) -> np.dtype[np.void]:
        return record_layout(
            self.luo.prog,
            "struct luo_file",
            next="list.next",
            handler="fh",
            token="token",
            data="serialized_data",
            status="retrieve_status" if self.luo.kept.retrieve_status else "retrieved",
        )

    @property
    def is_sound(self) -> bool:
        """Whether nothing seems to have come between."""
        return self.fault is None and not (
            self.problems or any(session.problems for session in self.sessions)
        )

    def at(self, head: int) -> None:
        """Look at a ``struct list_head`` of sessions."""
        names = _Once("session name", self.problems)
        where, found, self.fault = self._walk(head, self._session, self.problems)
        self.left_out = len(where) - len(found) if self.fault is None else 0
        offset = self._session.fields["files"][1]  # type: ignore[index]
        for at, row in zip(where, found, strict=False):
            name = text(bytes(row["name"]))
            if not names.is_new(name):
                continue
            session = self._with_files(name, row, at + offset)
            if session is None:
                return
            self.sessions.append(session)

    def _with_files(self, name: str, row: np.void, head: int) -> _Session | None:
        """None: the list of its files cannot be read."""
        problems: list[str] = []
        where, found, fault = self._walk(head, self._file, problems)
        if fault is not None:
            self.fault = fault
            return None
        try:
            handlers = [self._handler(each) for each in found["handler"].tolist()]
        except FaultError as error:
            self.fault = error
            return None
        files = _Files(
            handlers, found["token"].tolist(), found["data"].tolist(), found["status"].tolist()
        )
        # A long, which the kernel hands over as u64.
        count = int(row["count"]) % 2**64
        session = _Session(name, bool(row["retrieved"]), count, _once(files, problems), problems)
        session.room = int(row["room"])
        if len(where) > len(found):
            session.left_out = max(count - len(found), 1)
        elif count != len(found):
            problems.append(f"counts {count} files, lists {len(found)}")
        return session

    def _handler(self, at: int) -> str:
        """``compatible`` of a ``struct liveupdate_file_handler``."""
        if at not in self._handlers:
            handler = Object(self.luo.prog, "struct liveupdate_file_handler *", at)
            self._handlers[at] = text(_string(handler.compatible))
        return self._handlers[at]

    def _walk(
        self, head: int, layout: np.dtype[np.void], problems: list[str]
    ) -> tuple[list[int], NDArray[np.void], FaultError | None]:
        """
        The entries of a ``struct list_head``, each read whole.

        :return: where they are, with that of the first that is left out; as many of them as are
            still looked at; and what ended it.
        """
        read, size, link = self.luo.prog.read, layout.itemsize, layout.fields["next"][1]  # type: ignore[index]
        where: list[int] = []
        raw: list[bytes] = []
        fault, seen = None, set()
        try:
            at = int.from_bytes(read(head, 8), "little")
            while at != head:
                entry = (at - link) % 2**64
                if at in seen:
                    problems.append(f"the list loops: {entry:#x} was there before")
                    break
                where.append(entry)
                if not self.left:
                    break
                seen.add(at)
                raw.append(read(entry, size))
                self.left -= 1
                at = int.from_bytes(raw[-1][link : link + 8], "little")
        except FaultError as error:
            fault = error
        return where, np.frombuffer(b"".join(raw), layout), fault


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


def _once(files: _Files, problems: list[str]) -> _Files:
    """Files without those whose token another one has had before."""
    if len({*files.token}) == len(files.token):
        return files
    tokens = _Once("token", problems)
    rows = [row for row, token in enumerate(files.token) if tokens.is_new(token)]
    return _Files(
        [files.handler[row] for row in rows],
        [files.token[row] for row in rows],
        [files.data[row] for row in rows],
        [files.status[row] for row in rows],
    )


@lru_cache(1 << 10)
def _text(raw: bytes) -> str:
    """The compatible of a handler: many files have the same one."""
    return text(raw)


def _list_of_files(session: str) -> Owner:
    return Owner(OwnerKind.SESSION, f"session {session}: list of files", session)


def _string(characters: Object) -> bytes:
    """All of a ``char`` array of the kernel."""
    return bytes(characters.string_())
