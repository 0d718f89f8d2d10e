# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope luo``."""

from __future__ import annotations

from itertools import islice
from typing import IO, Any, Final

from ..abi.serialized import LUO_FDT_COMPATIBLE, SEALS, bits
from ..facts.clients import Luo, LuoFile, LuoSession, LuoState, Memfd, StoredFd
from ..facts.holders import DEVICE, HeldBy, Holding, Thing, by_thing
from ..facts.owners import ClaimsByOwner
from ..facts.services import KeptFd, Service
from ..facts.snapshot import Side, Snapshot
from ..words.sizes import human
from . import documents
from .text import counted
from .vmalloc import VmallocText, area_row, range_rows

#: A file may be in flight in a socket, or held by the kernel itself.
_NOBODY: Final = "held by nobody that khoscope can see"


class LuoText(VmallocText):
    """Prints what LUO hands over as text."""

    def luo(self, facts: Snapshot) -> None:
        """Print the outgoing and the incoming side."""
        self.header(facts)
        if facts.liveupdate is not None:
            on = "on" if facts.liveupdate.enabled else "off (liveupdate=on turns it on)"
            handlers = ", ".join(facts.liveupdate.handlers) or "none"
            self.line(f"live update is {on}, file handlers: {handlers}")
            self._device(facts.liveupdate)
            self._stores(facts)
        shift = facts.abi.page_shift
        holders = by_thing(facts.liveupdate)
        self._side("outgoing", facts.outgoing, shift, holders)
        if facts.incoming is not None:
            self._side("incoming", facts.incoming, shift, holders)

    def _device(self, state: LuoState) -> None:
        """Print who holds the device, and what khoscope could not see of any holders."""
        found = by_thing(state)
        if state.holders is None or found is None:
            return
        self._held_by(found[DEVICE], "/dev/liveupdate is ", "")
        if state.in_use and not found[DEVICE]:
            self.line(f"/dev/liveupdate is open, {_NOBODY}")
        for what in state.holders.unread:
            self.wrapped(f"holders may be missing, as these cannot be read: {what}", "  ", "")
        self._left_out(state.holders.left_out, "file descriptors, or tables of them", "")

    def _stores(self, facts: Snapshot) -> None:
        """Print what systemd keeps for services: by names if it was asked, else how much."""
        services, state = facts.services, facts.liveupdate
        stores = [
            each
            for each in (services.stores if services is not None else ())
            if each.kept or each.unnamed
        ]
        memfds = state.holders.systemd_memfds if state is not None and state.holders else None
        if stores:
            self.wrapped(
                "systemd keeps these for services; memfds are in no session before the kexec "
                "begins:"
            )
        elif memfds and (services is None or services.unread):
            self.wrapped(
                f"systemd has {counted(memfds, 'memfd')} open: what it keeps for services is in no "
                "session before the kexec begins",
                "  ",
            )
        for each in islice(stores, self._limit):
            names = ", ".join(_kept(fd) for fd in islice(each.going, self._limit))
            if self._limit is not None and (more := len(each.going) - self._limit) > 0:
                names += f" and {more:,} more"
            if others := len(each.kept or ()) - len(each.going):
                names = f"{names}{' and ' if names else ''}{others:,} that no kexec hands over"
            goes = "" if each.hands_over else ", and closes them when the service ends"
            if each.unnamed:
                names, goes = (
                    counted(each.unnamed, "descriptor"),
                    f" of a unit that is {each.state}",
                )
            self.wrapped(f"{each.unit}: {names}{goes}", "    ", "  ")
        self._more(len(stores), len(stores), "services")
        for what in services.unread if services is not None else ():
            self.wrapped(f"systemd was asked, and did not say all: {what}", "  ", "")

    def _held_by(self, found: list[HeldBy], first: str, indent: str) -> None:
        for each in islice(found, self._limit):
            self.wrapped(_held(each), f"{indent}  ", f"{indent}{first}")
        self._more(len(found), len(found), "processes")

    def _side(self, which: str, side: Side, shift: int, holders: Holding | None) -> None:
        self.line()
        luo = side.luo
        if luo is None:
            self.line(f"{which}: nothing of LUO")
            return
        self.line(self.paint("bold", f"{which}: {_title(luo)}"))
        self._problems(luo.problems, "")
        if luo.raw is not None:
            self.line(f"  not an ABI that khoscope knows; it begins with {luo.raw}")
            return
        memory = ClaimsByOwner(side, shift)
        for session in islice(luo.sessions, self._limit):
            self._session(memory, session, luo.live)
            # Nobody has opened a session of the incoming side that was not retrieved.
            incoming = which == "incoming"
            if holders is not None and (session.retrieved or not incoming):
                found = holders[session.name, incoming]
                self._held_by(found, "", "    ")
                if not found:
                    self.line(f"    {_NOBODY}")
            self._files(memory, session)
        self._more(len(luo.sessions), len(luo.sessions), "sessions")
        self._left_out(luo.left_out, "sessions or FLBs", "  ")
        for flb in islice(luo.flbs, self._limit):
            self.line(f"  FLB {flb.name}: data {flb.data:#x}, {counted(flb.count, 'file')}")
        self._more(len(luo.flbs), len(luo.flbs), "FLBs")

    def _session(self, memory: ClaimsByOwner, session: LuoSession, live: bool) -> None:
        self.line()
        unread = "given up by the kernel" if live else "not looked at by the kernel yet"
        state = {True: ", retrieved", False: "", None: f", {unread}"}
        of = f" of {session.stored}" if session.stored else ""
        self.line(
            f"  session {session.name}{of}: {counted(session.count, 'file')}, "
            f"{human(memory.session_bytes(session.name))}{state[session.retrieved]}"
        )
        self._problems(session.problems, "  ")
        for note in session.notes:
            self.wrapped(note, "      ", "    ")

    def _files(self, memory: ClaimsByOwner, session: LuoSession) -> None:
        for file in islice(session.files, self._limit):
            self._file(memory, session, file)
        self._more(len(session.files), len(session.files), "files")
        self._left_out(session.left_out, "files", "    ")

    def _left_out(self, number: int, what: str, indent: str) -> None:
        if number:
            self.line(f"{indent}at least {number:,} more {what}: not looked at")

    def _file(self, memory: ClaimsByOwner, session: LuoSession, file: LuoFile) -> None:
        self.line(f"    {file}: {file.handler}, data {file.data:#x}{_status(file.retrieve_status)}")
        self._problems(file.problems, "    ")
        if file.memfd is not None:
            self._memfd(memory, session, file.token, file.memfd)

    def _memfd(self, memory: ClaimsByOwner, session: LuoSession, token: int, memfd: Memfd) -> None:
        seals = " ".join(bits(memfd.seals, SEALS)) or "none"
        self.line(f"      {memfd.size:,} bytes, position {memfd.pos:,}, seals {seals}")
        self._problems(memfd.problems, "      ")
        self.line(
            f"      {counted(memfd.nr_folios, 'folio')}, {counted(memfd.pages, 'page')}"
            f"{':' if memfd.pages else ''}"
        )
        self.ranges(memory.folios(session.name, token), "        ")
        if memfd.folios is not None:
            area = memfd.folios
            self.line(
                f"      list of folios: {counted(area.listed, 'page')} in "
                f"{counted(area.chunks, 'chunk')} (khoscope vmalloc {area.phys:#x})"
            )
            self._problems(area.problems, "        ")

    def _problems(self, problems: list[str], indent: str) -> None:
        for problem in problems:
            self.wrapped(problem, f"{indent}    ", f"{indent}  {self.paint('red', 'problem')}: ")


def _kept(fd: KeptFd) -> str:
    """A descriptor that systemd keeps."""
    return fd.name if fd.session is None else f"{fd.name} (session {fd.session})"


def _held(by: HeldBy) -> str:
    process = by.process
    unit = f"unit {by.unit}" if by.unit else ""
    if not unit and process.cgroup not in (None, "/"):
        unit = f"cgroup {process.cgroup}"
    since = ""
    if by.since is not None:
        since = f"running since {by.since:%Y-%m-%d %H:%M:%SZ}"
    elif process.started is not None:
        since = f"running since {process.started // 10**9} s after the boot"
    fds = f"{by.fds} descriptors" if by.fds > 1 else ""
    name = process.comm or "a process that cannot be read"
    return ", ".join(filter(None, (f"held by {name} (pid {process.pid})", unit, since, fds)))


def _title(luo: Luo) -> str:
    number = "" if luo.liveupdate_num is None else f", live update {luo.liveupdate_num}"
    compatible = luo.compatible or "nothing that can be read"
    sessions = counted(len(luo.sessions), "session")
    blob = "FDT" if luo.compatible == LUO_FDT_COMPATIBLE else "struct luo_ser"
    return f"{compatible}{number}, {sessions}, {blob} at {luo.phys:#x}"


def _status(retrieve_status: int | None) -> str:
    if not retrieve_status:
        return ""
    return ", retrieved" if retrieve_status > 0 else f", retrieving it failed ({retrieve_status})"


def write_json(facts: Snapshot, out: IO[str]) -> None:
    """``luo --json``, schema khoscope.luo/1."""
    state, shift = facts.liveupdate, facts.abi.page_shift
    holders, seen = by_thing(state), state and state.holders
    document = {
        "schema": "khoscope.luo/1",
        **documents.about(facts),
        "liveupdate": state and {"enabled": state.enabled, "handlers": state.handlers},
        "device": state and {"in_use": state.in_use, "held_by": _held_rows(holders, DEVICE)},
        "holders": seen
        and {
            "left_out": seen.left_out,
            "unread": seen.unread,
            "systemd_memfds": seen.systemd_memfds,
        },
        "services": facts.services
        and {
            "unread": facts.services.unread,
            "stores": [_store_row(each) for each in facts.services.stores],
        },
        "outgoing": _side_row(facts.outgoing, shift, holders, incoming=False),
        "incoming": facts.incoming and _side_row(facts.incoming, shift, holders, incoming=True),
    }
    documents.write(document, out)


def _store_row(service: Service) -> dict[str, Any]:
    return {
        "unit": service.unit,
        "state": service.state,
        "preserve": service.preserve,
        "fds": None
        if service.kept is None
        else [
            {
                "name": each.name,
                "path": each.path,
                "session": each.session,
                "goes_along": each.can_go_along and service.hands_over,
            }
            for each in service.kept
        ],
        "unnamed_fds": service.unnamed,
    }


def _held_rows(holders: Holding | None, thing: Thing) -> list[dict[str, Any]] | None:
    if holders is None:
        return None
    return [
        {
            "pid": each.process.pid,
            "comm": each.process.comm,
            "cgroup": each.process.cgroup,
            "unit": each.unit,
            "started": None if each.process.started is None else each.process.started / 10**9,
            "since": each.since and f"{each.since:%Y-%m-%dT%H:%M:%SZ}",
            "fds": each.fds,
        }
        for each in holders[thing]
    ]


def _side_row(
    side: Side, shift: int, holders: Holding | None, incoming: bool
) -> dict[str, Any] | None:
    luo = side.luo
    if luo is None:
        return None
    memory = ClaimsByOwner(side, shift)
    return {
        "phys": f"{luo.phys:#x}",
        "compatible": luo.compatible,
        "liveupdate_num": luo.liveupdate_num,
        "live": luo.live,
        "raw": luo.raw,
        "problems": luo.problems,
        "sessions": [
            {
                **_session_row(memory, session),
                "held_by": _held_rows(holders, (session.name, incoming)),
            }
            for session in luo.sessions
        ],
        "flbs": [
            {"name": flb.name, "data": f"{flb.data:#x}", "count": flb.count} for flb in luo.flbs
        ],
    }


def _session_row(memory: ClaimsByOwner, session: LuoSession) -> dict[str, Any]:
    return {
        "name": session.name,
        "retrieved": session.retrieved,
        "count": session.count,
        "bytes": memory.session_bytes(session.name),
        "problems": session.problems,
        "notes": session.notes,
        **_stored_row(session.stored),
        "files": [_file_row(memory, session, file) for file in session.files],
    }


def _stored_row(stored: StoredFd | None) -> dict[str, Any]:
    return {"unit": stored and stored.unit, "fd_name": stored and stored.name}


def _file_row(memory: ClaimsByOwner, session: LuoSession, file: LuoFile) -> dict[str, Any]:
    memfd = file.memfd
    return {
        "token": f"{file.token:#x}",
        **_stored_row(file.stored),
        "handler": file.handler,
        "data": f"{file.data:#x}",
        "retrieve_status": file.retrieve_status,
        "problems": file.problems,
        "memfd": memfd
        and {
            "phys": f"{memfd.phys:#x}",
            "size": memfd.size,
            "pos": memfd.pos,
            "seals": bits(memfd.seals, SEALS),
            "flags": f"{memfd.flags:#x}",
            "nr_folios": memfd.nr_folios,
            "pages": memfd.pages,
            "ranges": range_rows(memory.folios(session.name, file.token)),
            "folios": memfd.folios and area_row(memory, memfd.folios),
            "problems": memfd.problems,
        },
    }
