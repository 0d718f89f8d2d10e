# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope status``: one screen, on which each line says where it was read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import islice
from typing import IO, Any

from ..abi.keys import Finalize, Tracker
from ..abi.kho_fdt import Subtree
from ..abi.serialized import LUO
from ..facts.clients import Luo
from ..facts.snapshot import KexecImage, Node, Side, Snapshot
from ..facts.status import Status, read_from
from ..words.printable import printable
from ..words.sizes import human
from . import documents
from .text import WIDTH, Text, counted, kexecs, predecessor, types_in_words, word

#: Width of the column with a fact's name.
NAME = 12
NOT_RECORDED = "not recorded"


def write_json(facts: Snapshot, status: Status, out: IO[str]) -> None:
    """``status --json``, schema khoscope.status/1."""
    incoming = facts.incoming
    live = facts.liveupdate
    totals = documents.counts
    document: dict[str, Any] = {
        "schema": "khoscope.status/1",
        **documents.about(facts),
        "kho": {"on": status.kho.on, "why": status.kho.why, "enabled": facts.kho_enable},
        "command_line": facts.kernel.command_line or None,
        "compatible": {
            "kho": facts.outgoing.fdt.compatible,
            "kho_incoming": incoming.fdt.compatible if incoming else None,
            "luo": _luo_compatible(facts.outgoing),
            "luo_incoming": _luo_compatible(incoming),
            "handlers": live.handlers if live else None,
        },
        "liveupdate": live.enabled if live else None,
        "scratch": [
            {"phys": f"{area.phys:#x}", "size": area.size, "free": area.free}
            for area in status.scratch
        ],
        "offline": _offline(facts),
        "nodes": _nodes(facts.nodes),
        "preserved": totals(status.preserved, facts.abi),
        "unclaimed": None if status.unclaimed is None else totals(status.unclaimed, facts.abi),
        "tree": {"pages": status.tree_pages, "preserved_per_byte": status.per_byte},
        "subtrees": [{**_subtree(s), "preserved": preserved} for s, preserved in status.subtrees],
        "subtrees_incoming": [_subtree(s) for s in incoming.fdt.subtrees] if incoming else None,
        "sessions": _sessions(facts.outgoing.luo),
        "sessions_incoming": _sessions(incoming.luo if incoming else None),
        "image": _image(facts.image),
        "crash_image": _image(facts.crash_image),
        "taint": status.taint,
        "read_from": read_from(facts),
    }
    documents.write(document, out)


def _offline(facts: Snapshot) -> list[dict[str, Any]] | None:
    """Ranges of RAM that are offline; None: not known."""
    if facts.offline is None:
        return None
    return [{"phys": f"{first:#x}", "size": end - first} for first, end in facts.offline.tolist()]


def _nodes(nodes: list[Node] | None) -> list[dict[str, Any]] | None:
    if nodes is None:
        return None
    return [
        {"node": node.number, "phys": f"{node.start:#x}", "size": node.end - node.start}
        for node in nodes
    ]


def _luo_compatible(side: Side | None) -> str | None:
    return side.luo.compatible if side and side.luo else None


def _subtree(subtree: Subtree) -> dict[str, Any]:
    phys = None if subtree.phys is None else f"{subtree.phys:#x}"
    return {"name": subtree.name, "phys": phys, "size": subtree.size}


def _sessions(luo: Luo | None) -> list[dict[str, Any]] | None:
    if luo is None:
        return None
    return [
        {
            "name": session.name,
            "files": session.count,
            "retrieved": session.retrieved,
            "unit": session.stored and session.stored.unit,
        }
        for session in luo.sessions
    ]


def _image(image: KexecImage | None) -> dict[str, Any] | None:
    if image is None:
        return None
    return {
        "loaded": image.loaded,
        "file_mode": image.file_mode,
        "kho_fdt": f"{image.kho_fdt:#x}",
        "size": image.size,
    }


class FactLines(Text):
    """
    Prints facts, one per line, each with where it was read.

    :cvar read_from: where, by the name of a fact.
    """

    read_from: Mapping[str, str] = {}

    def fact(self, name: str, value: str, read_from: str) -> None:
        """Print a fact, with its source at the right."""
        self.facts(name, [value], read_from)

    def facts(self, name: str, values: list[str], read_from: str) -> None:
        """Print facts from one source, one fact per line."""
        source = f"[{self.read_from[read_from]}]"
        lines: list[str] = []
        # The source stands beside the end of a value, and not in the middle of one.
        ends = []
        for value in values:
            lines += textwrap.wrap(printable(value), WIDTH - NAME) or [""]
            ends.append(len(lines) - 1)
        room = WIDTH - NAME - len(source)
        at = next((i for i in ends if len(lines[i]) < room), len(lines))
        for i, line in enumerate([*lines, ""] if at == len(lines) else lines):
            text = f"{name if i == 0 else '':<{NAME}}{line}"
            if i == at:
                text = f"{text:<{NAME + room}}{self.paint('dim', source)}"
            self.line(text)

    def some(self, values: list[str], what: str) -> list[str]:
        """The values, cut to the limit."""
        shown = list(islice(values, self._limit))
        if len(values) > len(shown):
            hidden = f"{len(values) - len(shown):,} more {what}"
            shown.append(f"… {hidden} (--limit 0 shows all)")
        return shown


class StatusText(FactLines):
    """Prints the status as text."""

    def status(self, facts: Snapshot, status: Status) -> None:
        self.read_from = read_from(facts)
        self.line(self.paint("bold", f"{word(facts.kernel.release)}, {facts.taken.source}"))
        self.line(f"read {facts.taken.time} by khoscope {facts.taken.khoscope}")
        self.line()
        self.fact("KHO", f"{'on' if status.kho.on else 'off'}: {status.kho.why}", "kho")
        self.fact("this boot", _boot(facts), "handover")
        self._abi(facts)
        self._scratch(status)
        self._offline(facts)
        self._nodes(facts.nodes or [])
        self._finalized(facts)
        self._blocks(facts, status)
        self._subtrees(facts, status)
        self._luo(facts)
        self.fact("image", _image_in_words(facts.image, status.kho.on), "image")
        if facts.crash_image is not None:
            self.fact("crash image", _crash_image_in_words(facts.crash_image), "crash_image")
        taint = f"{facts.kernel.tainted:#x} ({status.taint})" if status.taint else "no"
        self.fact("tainted", taint, "taint")

    def _abi(self, facts: Snapshot) -> None:
        out = facts.outgoing.fdt
        own = _named(out.compatible) if out.phys else "no FDT"
        if facts.finalized is False and not out.phys:
            own = "no FDT before it is finalized"
        self.fact("KHO ABI", f"{own}, {types_in_words(facts.abi)}", "kho_abi")
        if facts.incoming:
            self.fact("", f"{_named(facts.incoming.fdt.compatible)} handed over", "kho_abi_in")
        live = facts.liveupdate
        state = "this kernel has none, or it is not recorded"
        if live:
            state = "on" if live.enabled else "off"
        self.fact("LUO", state, "liveupdate")
        if facts.outgoing.luo:
            self.fact("LUO ABI", _named(facts.outgoing.luo.compatible), "luo_abi")
        if facts.incoming and facts.incoming.luo:
            self.fact("", f"{_named(facts.incoming.luo.compatible)} handed over", "luo_abi_in")
        if live:
            files = ", ".join(live.handlers) or "none"
            self.fact("file ABIs", files, "handlers")

    def _finalized(self, facts: Snapshot) -> None:
        if facts.abi.finalize == Finalize.NEVER or not facts.kho_enable:
            return
        state = "not known"
        if facts.finalized is not None:
            state = "yes" if facts.finalized else f"no: to be done {facts.abi.finalize}"
            if not facts.finalized and facts.finalizes_itself:
                state = "no: LUO does it on the way into the kexec"
        self.fact("finalized", state, "finalized")

    def _scratch(self, status: Status) -> None:
        areas = []
        for area in filter(lambda area: area.size, status.scratch):
            full = "how full is not known"
            if area.free is not None:
                used = area.size - area.free
                full = f"{used / area.size:4.0%} in use"
            areas.append(f"{area.phys:#014x} {human(area.size):>9}  {full}")
        self.facts("scratch", self.some(areas, "areas") or ["none"], "scratch")
        if areas:
            self.fact("cost", status.cost, "cost")

    def _offline(self, facts: Snapshot) -> None:
        """Most kernels have no offline memory, and then there is no line about it."""
        ranges = _offline(facts) or []
        lines = [f"{int(each['phys'], 16):#014x} {human(each['size']):>9}" for each in ranges]
        if lines:
            self.facts("offline", self.some(lines, "ranges"), "offline")

    def _nodes(self, nodes: list[Node]) -> None:
        """The NUMA nodes, if there are several."""
        if len(nodes) > 1:
            spans = [f"{n.start:#014x} {human(n.end - n.start):>9}  node {n.number}" for n in nodes]
            self.facts("NUMA nodes", self.some(spans, "nodes"), "nodes")

    def _blocks(self, facts: Snapshot, status: Status) -> None:
        cost = "there is no tree"
        if status.tree_pages:
            nodes = "node" if facts.abi.tracker == Tracker.XARRAY else "page"
            cost = counted(status.tree_pages, nodes)
        if status.per_byte is not None:
            cost += f", {status.per_byte:,.1f} bytes preserved per byte of it"
        self.fact("tree", cost, "tree")
        self._totals("preserved", status.preserved, facts, "preserved")
        if not facts.abi.stamp.has_magic and facts.handover.is_kho_boot:
            self.fact("unclaimed", "not known: stamps of this kernel have no magic", "unclaimed")
        elif status.unclaimed is None:
            self.fact("unclaimed", NOT_RECORDED, "unclaimed")
        elif facts.handover.is_kho_boot:
            self._totals("unclaimed", status.unclaimed, facts, "unclaimed")

    def _totals(
        self, name: str, totals: Mapping[tuple[int, int], int], facts: Snapshot, read_from: str
    ) -> None:
        if not totals:
            self.fact(name, "no blocks", read_from)
            return
        self.fact(name, "", read_from)
        self.counts(totals, facts.abi)

    def _subtrees(self, facts: Snapshot, status: Status) -> None:
        words = {True: "preserved", False: "not preserved", None: ""}
        out = [f"{_place(s)}  {words[preserved]}" for s, preserved in status.subtrees]
        self.facts("subtrees", self.some(out, "subtrees") or ["none"], "subtrees")
        if facts.incoming:
            handed = [_place(subtree) for subtree in facts.incoming.fdt.subtrees]
            shown = self.some(handed, "subtrees") or ["none"]
            self.facts("handed over", shown, "subtrees_in")

    def _luo(self, facts: Snapshot) -> None:
        self._sessions("sessions", facts.outgoing, "sessions")
        if facts.incoming:
            self._sessions("handed over", facts.incoming, "sessions_in")

    def _sessions(self, name: str, side: Side, read_from: str) -> None:
        luo = side.luo
        if luo is None:
            if any(subtree.name == LUO for subtree in side.fdt.subtrees):
                self.fact(name, NOT_RECORDED, read_from)
            return
        states = {None: "", True: ", retrieved", False: ", not retrieved"}
        incoming = read_from == "sessions_in"
        sessions = [
            f"{session.name}{f' of {session.stored}' if session.stored else ''}: "
            f"{counted(session.count, 'file')}" + (states[session.retrieved] if incoming else "")
            for session in luo.sessions
        ]
        sessions += luo.problems
        if luo.raw is not None:
            sessions.append("not known: nothing of this ABI is decoded")
        # Until somebody opens /dev/liveupdate, the serialized form is all there is.
        source = read_from if luo.live else "sessions_ser"
        self.facts(name, self.some(sessions, "sessions") or ["none"], source)


def _boot(facts: Snapshot) -> str:
    came = facts.handover
    if not came.is_kho_boot:
        return "not a handover"
    return f"a handover from {predecessor(came)}, {kexecs(came)}"


def _named(compatible: str | None) -> str:
    return compatible or "no compatible"


def _place(subtree: Subtree) -> str:
    where = "no address" if subtree.phys is None else f"{subtree.phys:#014x}"
    size = "no size" if subtree.size is None else human(subtree.size)
    return f"{printable(subtree.name):<16} {where} {size:>8}"


def _crash_image_in_words(image: KexecImage) -> str:
    if not image.loaded:
        return "none is loaded"
    how = "kexec_file_load" if image.file_mode else "kexec_load"
    handed = ", with a handover: it would die" if image.kho_fdt else ""
    return f"{human(image.size)}, loaded by {how}{handed}"


def _image_in_words(image: KexecImage | None, kho_is_on: bool) -> str:
    if image is None:
        return NOT_RECORDED
    if not image.loaded:
        return "none is loaded"
    how = "kexec_file_load" if image.file_mode else "kexec_load"
    handed = "with the handover" if image.kho_fdt else "without a handover"
    if kho_is_on and not image.kho_fdt:
        handed += ": it would be lost"
    return f"{human(image.size)}, loaded by {how}, {handed}"
