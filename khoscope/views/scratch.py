# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope scratch``: what KHO costs this host, in plain words."""

from __future__ import annotations

from itertools import islice
from typing import IO, Any, Final

from ..facts.brief import Brief
from ..facts.scratch import Area, Cost, Needs, Users, is_movable
from ..facts.snapshot import Snapshot
from ..facts.status import kho_parameter, kho_switch
from ..words.lists import listed
from ..words.sizes import human
from . import documents
from .status import FactLines
from .text import WIDTH, counted, word

#: Where what is shown was read, in the kernel's own names.
READ_FROM: Final = {
    "kho": "kho_enable",
    "asked": "saved_command_line",
    "handover": "kho_in",
    "users": "kho_out, luo_dev",
    "own": "kho_out",
    "scratch": "kho_scratch",
    "page_blocks": "struct mem_section_usage",
    "use": "struct page",
    "zones": "struct zone",
    "cma_total": "totalcma_pages",
    "caches": "vm_node_stat",
    "needs": "kho_scratch, struct zone, kexec_image",
}
_NOT_KNOWN: Final = "not known"


def write_json(facts: Snapshot, cost: Cost, out: IO[str]) -> None:
    """``scratch --json``, schema khoscope.scratch/1."""
    switch = kho_switch(facts)
    users, needs, advice = cost.users, cost.needs, cost.advice
    document: dict[str, Any] = {
        "schema": "khoscope.scratch/1",
        **documents.about(facts),
        "kho": {"on": switch.on, "why": switch.why, "hint": switch.hint or None},
        "sizes": cost.asked,
        "scratch": cost.scratch,
        "ram": cost.ram,
        "own": cost.own,
        "areas": [_area(area) for area in cost.areas],
        "zones": [
            {
                "node": zone.node,
                "zone": zone.name,
                "free": zone.free,
                "free_for_anybody": zone.anybody,
                "free_for_movable": zone.movable,
                "kept_back": zone.kept_back,
            }
            for zone in cost.zones
        ],
        "pinnable": cost.pinnable,
        "cma": {
            "total": cost.cma_total,
            "free": cost.cma_free,
            "phantom": cost.phantom,
        },
        "users": {
            "any": users.any,
            "blocks": users.blocks,
            "size": users.size,
            "sessions": users.sessions,
            "liveupdate_open": users.open,
            "handed_over": users.came,
            "services": list(users.services),
            "not_known": users.unknown or None,
        },
        "needs": None
        if needs is None
        else {
            "lowmem": needs.low,
            "nodes": {str(node): size for node, size in needs.nodes.items()},
            "image": needs.image,
            "how": needs.how,
        },
        "given_back": {
            "kho_off": cost.off,
            "kho_scratch": None
            if advice is None
            else {"parameter": str(advice), "bytes": cost.given_back},
            "why_not": cost.no_advice or None,
        },
        "read_from": READ_FROM,
    }
    documents.write(document, out)


def _area(area: Area) -> dict[str, Any]:
    use = area.use
    return {
        "purpose": area.purpose,
        "phys": f"{area.phys:#x}",
        "size": area.size,
        "node": area.node,
        "zones": list(area.zones),
        "page_blocks": use.blocks if use else None,
        "free": area.free,
        "pages": use.pages if use else None,
        "pinned": use.pinned if use else None,
        "held": use.held if use else None,
        "unread": use.unread if use else None,
        "own": area.own,
    }


class ScratchText(FactLines):
    """Prints the cost as text."""

    read_from = READ_FROM

    def scratch(self, facts: Snapshot, cost: Cost) -> None:
        switch = kho_switch(facts)
        self.line(self.paint("bold", f"{word(facts.kernel.release)}, {facts.taken.source}"))
        self.line(f"read {facts.taken.time} by khoscope {facts.taken.khoscope}")
        for what in islice(facts.unreadable, self._limit):
            self.wrapped(f"cannot be read: {what}", "  ", "")
        for what in islice(facts.contradictions, self._limit):
            self.wrapped(f"facts contradict each other: {what}", "  ", "")
        self.line()
        self.fact("KHO", f"{'on' if switch.on else 'off'}: {switch.why}", "kho")
        if switch.on:
            came = facts.handover.is_kho_boot
            self.fact("sizes", cost.asked, "handover" if came else "asked")
            self.fact("used by", in_words(cost.users), "users")
        if switch.on and cost.own:
            own = f"{human(cost.own)} that nobody else can use: KHO's own FDT, blobs and tree"
            self.fact("itself", own, "own")
        share = f" ({cost.scratch / cost.ram:.1%} of {human(cost.ram)})" if cost.ram else ""
        taken = f"{human(cost.scratch)}{share}: only movable memory may be there"
        if not cost.areas:
            # KHO has areas if it is on, so that they cannot be read.
            taken = _NOT_KNOWN if switch.on else "none"
        self.fact("scratch", taken, "scratch")
        if cost.areas:
            self._areas(cost.areas, facts.abi.page_size)
        self._free(cost)
        if cost.areas:
            self._cma(cost)
        if cost.areas and switch.on:
            self._ways_out(facts, cost)
        elif cost.areas:
            self.line()
            self.wrapped(
                "KHO is off here: the kernel before has left these areas. A cold boot with kho=off "
                f"gives {human(cost.off)} of them back to everybody."
            )
        elif switch.hint:
            self.line()
            self.wrapped(
                "Nothing but handovers to a next kernel (live update) needs KHO. To have it "
                f"in this kernel: {switch.hint}."
            )

    def brief(self, found: Brief) -> None:
        """One line."""
        state = {True: "on", False: "off", None: "not known"}[found.on]
        parts = [f"KHO {state}: {found.why}"]
        if found.on or found.misleads:
            size = "scratch of unknown size" if found.size is None else human(found.size)
            parts.append(f"{size} that only movable memory may use")
        if found.on is False and found.misleads:
            parts.append(
                "the kernel before has left it, and a cold boot with kho=off gives it back"
            )
        if found.on:
            whose = "who uses it is not known without root and debug info"
            if found.users is not None:
                whose = f"used by: {in_words(found.users)}"
            parts.append(whose)
        if found.misleads:
            parts.append("/proc/meminfo has it in CmaFree, not in CmaTotal")
        self.line("; ".join(parts))

    def _areas(self, areas: list[Area], page: int) -> None:
        self.line()
        rows = [
            [
                area.purpose,
                f"{area.phys:#014x}",
                human(area.size),
                _NOT_KNOWN if area.node is None else area.node,
                ", ".join(area.zones) or _NOT_KNOWN,
                _blocks(area),
                _NOT_KNOWN if area.free is None else human(area.free),
            ]
            for area in areas[: self._limit]
        ]
        headers = ["area", "phys", "size", "node", "zone", "page blocks", "free"]
        align = ["left", "left", "right", "right", "left", "left", "right"]
        self.table(rows, headers, align)
        self._more(len(areas), len(areas), "areas")
        self._source("page_blocks", "use")
        for area in areas[: self._limit]:
            for kind, said in _uses(area, page):
                self.wrapped(f"{area.purpose}, {kind}: {said}", "  ", "")

    def _source(self, *names: str) -> None:
        """Where what was just shown was read."""
        source = f"[{', '.join(READ_FROM[name] for name in names)}]"
        self.line(self.paint("dim", f"{source:>{WIDTH}}"))

    def _free(self, cost: Cost) -> None:
        self.line()
        if not cost.zones:
            self.line("what is free in which zone is not known")
            return
        rows = [
            [
                zone.node,
                zone.name,
                *map(human, (zone.free, zone.anybody, zone.movable, zone.kept_back)),
            ]
            for zone in cost.zones
        ]
        headers = ["node", "zone", "free now", "for anybody", "only movable", "kept back"]
        self.table(rows, headers, ["right", "left", *["right"] * 4])
        self._source("zones")
        self.wrapped(
            "Anybody: the kernel's own memory, and memory that is pinned for long (RDMA, VFIO, "
            "buffers of io_uring). Movable: programs' memory and page cache, and only as long as "
            "nobody pins it."
        )
        if cost.pinnable is not None:
            unread = any(area.use and area.use.unread for area in cost.areas)
            least = "At least" if unread else "About"
            self.wrapped(
                f"{least} {human(cost.pinnable)} can be pinned for long: what is free for anybody, "
                "and the page cache and slab memory that the kernel can free for it."
            )
            self._source("zones", "caches", "use")

    def _cma(self, cost: Cost) -> None:
        if cost.cma_total is None or cost.cma_free is None or not cost.phantom:
            return
        self.line()
        meminfo = f"CmaTotal {cost.cma_total >> 10:,} kB, CmaFree {cost.cma_free >> 10:,} kB"
        self.wrapped(
            f"/proc/meminfo: {meminfo}. CmaFree counts what is free in page blocks of type CMA, "
            f"CmaTotal what cma= and drivers have of them. The other {human(cost.phantom)} are "
            "scratch."
        )
        self._source("zones", "cma_total", "page_blocks")

    def _ways_out(self, facts: Snapshot, cost: Cost) -> None:
        self.line()
        rows = [["kho=off", human(cost.off), "no handover, no live update"]]
        if cost.advice is not None:
            rows.append([str(cost.advice), human(cost.given_back), "see below"])
        self.table(rows, ["on the command line", "gives back", "at the price of"], ["left"] * 3)
        self._source("needs")
        if cost.advice is not None and cost.needs is not None:
            self._risk(cost.needs)
        else:
            self.wrapped(f"No kho_scratch= is suggested: {cost.no_advice}.")
        if cost.users.nobody:
            self._switch_off(kho_parameter(facts.kernel.command_line))

    def _risk(self, needs: Needs) -> None:
        image = "an image of 160 MiB, a guess: none is loaded"
        if needs.image is not None:
            image = f"the loaded image and its initrd, {human(needs.image)}"
        nodes = ", ".join(f"node {n} {human(size)}" for n, size in needs.nodes.items())
        self.wrapped(
            "The next kernel boots inside the areas: if they are too small, it panics early, often "
            f"without a word. The sizes are {needs.how} (below 4 GiB {human(needs.low)}; {nodes}), "
            f"a quarter more; and twice {image}. A larger kernel or initrd, crashkernel=, cma= or "
            "huge pages on the command line need more. Try a kexec with nothing to lose."
        )

    def _switch_off(self, asked: tuple[str, bool] | None) -> None:
        """
        How to do that.

        :param asked: the word that asks for it now; it may stand behind one that is added.
        """
        self.line()
        put = f"replace {asked[0]} by it in" if asked else "add it to"
        self.wrapped(
            "Nobody uses KHO here. To switch it off, boot with kho=off, and not by a kexec: that "
            "keeps the areas."
        )
        for where, how in (
            (
                "GRUB",
                f"{put} GRUB_CMDLINE_LINUX (or GRUB_CMDLINE_LINUX_DEFAULT) in /etc/default/grub or "
                "/etc/default/grub.d, then update-grub (Fedora: grubby --update-kernel=ALL "
                "--args=kho=off)",
            ),
            (
                "systemd-boot",
                f"{put} /etc/kernel/cmdline, then kernel-install add-all; or {put} the options of "
                "the entry in loader/entries",
            ),
        ):
            self.wrapped(how, " " * 16, f"  {where:<14}")
        self.line("khoscope changes nothing.")


def in_words(users: Users) -> str:
    """Who uses KHO."""
    parts = []
    if users.blocks:
        parts.append(
            f"{counted(users.blocks, 'block')} of others than KHO itself ({human(users.size)})"
        )
    if users.sessions:
        parts.append(counted(users.sessions, "session"))
    if users.open:
        parts.append("whoever has /dev/liveupdate open")
    if users.came:
        parts.append("what was handed over to this kernel")
    if users.services:
        parts.append(f"what systemd keeps for {listed(users.services)}")
    if parts:
        return ", ".join(parts)
    if users.unknown:
        return f"nobody that is known of, but {users.unknown}"
    known = "" if users.open is None else ", and /dev/liveupdate is not open"
    return f"nobody: no blocks but KHO's own, no sessions{known}"


def _blocks(area: Area) -> str:
    if area.use is None or area.use.blocks is None:
        return _NOT_KNOWN
    return ", ".join(f"{count:,} {kind}" for kind, count in area.use.blocks.items())


def _uses(area: Area, page: int) -> list[tuple[str, str]]:
    """What is in an area, in two lines: what can be moved, and what cannot."""
    use = area.use
    if use is None:
        return [("in use", _NOT_KNOWN)]
    found = []
    if odd := {kind: n for kind, n in (use.blocks or {}).items() if kind != "cma"}:
        blocks = ", ".join(f"{n:,} {kind}" for kind, n in odd.items())
        found.append(("page blocks that should be of type cma", blocks))
    if area.own:
        found.append(("KHO's own", human(area.own)))
    for kind, movable in (("movable", True), ("cannot be moved", False)):
        sizes = [
            f"{name} {human(count * page)}"
            for name, count in sorted(use.pages.items(), key=lambda item: -item[1])
            if is_movable(name) == movable
        ]
        if sizes:
            found.append((kind, ", ".join(sizes)))
    for kind, count in (
        ("pinned", use.pinned),
        ("held by more than mappings", use.held),
        ("not readable", use.unread),
    ):
        if count:
            found.append((kind, human(count * page)))
    return found
