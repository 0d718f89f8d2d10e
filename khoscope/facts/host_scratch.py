# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a host's files say of KHO's scratch areas, where nobody may read the kernel's memory.

The kernel hands the areas to the page allocator as page blocks of type CMA.  A cold boot counts
them in its zones (``init_cma_reserved_pageblock()``), a kernel that another one has handed over to
does not (``kho_scratch_migratetype()``), and no kernel counts them in CmaTotal, which has the areas
of ``cma=`` and the like alone.  What is free of them is in CmaFree all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..words.sizes import human
from .status import BY_DEFAULT, Switch, asked_by, kho_parameter, not_asked, switched_off

#: How far CmaFree may be from the truth, bytes: each processor keeps some of the counting to itself
#: (``vm_stat_threshold``).
_DRIFT: Final = 16 << 20

_SEE: Final = "see what is missing above"
_NO_KHO: Final = Switch(
    False, "this kernel has no KHO", "boot a kernel with CONFIG_KEXEC_HANDOVER=y"
)


@dataclass(frozen=True)
class CmaCounts:
    """
    What the kernel counts of memory of type CMA; each is None if it cannot be read.

    :param total: bytes, CmaTotal of /proc/meminfo.
    :param free: bytes, CmaFree.
    :param zones: bytes in all zones, the lines "cma" of /proc/zoneinfo.
    :param blocks: page blocks of type CMA (/proc/pagetypeinfo).
    :param block_size: bytes of a page block.
    """

    total: int | None = None
    free: int | None = None
    zones: int | None = None
    blocks: int | None = None
    block_size: int | None = None

    @property
    def counted(self) -> int | None:
        """Bytes in zones beyond CmaTotal: after a cold boot, the scratch areas."""
        return _beyond(self.zones, self.total)

    @property
    def in_blocks(self) -> int | None:
        """Bytes in page blocks beyond CmaTotal: the scratch areas, after any boot."""
        if self.blocks is None or self.block_size is None:
            return None
        return _beyond(self.blocks * self.block_size, self.total)

    @property
    def free_beyond(self) -> bool:
        """Whether more is free than CmaTotal has, and more than counting late explains."""
        if self.free is None or self.total is None:
            return False
        return self.free > (self.total + _DRIFT if self.total else 0)


@dataclass(frozen=True)
class Told:
    """
    What the host's files say of the switch; None: they do not say.

    :param command_line: of the running kernel.
    :param built: whether the kernel has KHO.
    :param default: CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT; False, too, in kernels before it.
    :param lacking: what could not be reserved, according to the log (``not_reserved()``).
    :param out: debugfs has what KHO makes there when it is on.
    :param took_over: another kernel has handed over to this one.
    :param ram: bytes, MemTotal of /proc/meminfo.
    """

    command_line: str | None = None
    built: bool | None = None
    default: bool | None = None
    lacking: tuple[str, int | None] | None = None
    out: bool = False
    took_over: bool | None = None
    ram: int | None = None


@dataclass(frozen=True)
class HostSwitch:
    """
    Whether KHO is on, as far as files say.

    :param on: None: they do not.
    :param hint: what to do to have it on, or to learn more; "": it is on.
    :param by: which of the files decided: a name of a field of :class:`Told` or :class:`CmaCounts`,
        or "size".
    """

    on: bool | None
    why: str
    hint: str
    by: str


@dataclass(frozen=True)
class HostScratch:
    """
    A host's scratch areas and what /proc/meminfo makes of them; None: it cannot be read.

    :param on: whether KHO is on.
    :param why: in words, whichever it is.
    :param why_from: the file that decided.
    :param hint: what to do to have it on, or to learn more; "": it is on.
    :param size: bytes of scratch; 0: there is none.
    :param size_from: where that was read, "" if nowhere.
    :param cma: what the kernel counts of memory of this type, scratch or not.
    """

    on: bool | None
    why: str
    why_from: str = ""
    hint: str = ""
    size: int | None = None
    size_from: str = ""
    cma: CmaCounts = CmaCounts()

    @property
    def phantom(self) -> bool:
        """Whether CmaFree has, or could have, memory that CmaTotal does not have: scratch."""
        return self.size > 0 if self.size is not None else self.cma.free_beyond


def scratch_size(
    areas: list[tuple[int, int]] | None, cma: CmaCounts, took_over: bool | None
) -> tuple[int | None, str]:
    """
    Bytes of scratch, and which of "areas", "zones" and "blocks" says so.

    That zones count none does not say that there is none, unless this was a cold boot.

    :param areas: None: debugfs does not say.
    """
    if areas is not None:
        return sum(size for _, size in areas), "areas"
    if cma.counted:
        return cma.counted, "zones"
    if cma.in_blocks is not None:
        return cma.in_blocks, "blocks"
    if cma.counted == 0 and took_over is False and not cma.free_beyond:
        return 0, "zones"
    return None, ""


def host_switch(told: Told, size: int | None, cma: CmaCounts) -> HostSwitch:
    """
    Whether KHO is on, and why.

    A kernel that was handed over to keeps its scratch areas even if KHO is off in it, so that only
    what zones count proves that it is on: the last step of setting it up does that.
    """
    line = told.command_line or ""
    asked = kho_parameter(line)
    wanted = asked[1] if asked else told.default
    if told.out:
        return HostSwitch(True, _why_on(told), "", "out")
    if cma.counted:
        return HostSwitch(True, _why_on(told), "", "zones")
    if told.lacking and not size:
        return _off(switched_off(line, told.lacking, _ram(told)), "lacking")
    if told.built is False:
        return _off(_NO_KHO, "built")
    if asked and not asked[1]:
        return _off(not_asked(line), "command_line")
    if wanted:
        return _wanted(told, size, cma)
    if told.default is False and line:
        return _off(not_asked(line), "command_line")
    return _unknown(told, size)


def _wanted(told: Told, size: int | None, cma: CmaCounts) -> HostSwitch:
    """It was asked for; what became of that?"""
    by = asked_by(told.command_line or "")
    if size or (size is None and cma.free_beyond):
        return HostSwitch(True, _why_on(told), "", "size" if size else "free")
    if size is None:
        what = f"{by}; whether that went well, no file says that can be read"
        return HostSwitch(None, what, _SEE, "command_line")
    if told.built:
        return _off(switched_off(told.command_line or "", None, _ram(told)), "size")
    what = f"{by}, but there is no scratch: it switched itself off, or this kernel has no KHO"
    return HostSwitch(False, what, "see what the kernel's log says of KHO", "size")


def _unknown(told: Told, size: int | None) -> HostSwitch:
    """Nobody asked for it on the command line, and the kernel's default is not known."""
    if not told.command_line:
        return HostSwitch(None, "neither the command line nor a default says", _SEE, "command_line")
    if size == 0:
        return _off(not_asked(told.command_line), "size")
    what = "no kho=on on the command line, and this kernel's default is not known"
    return HostSwitch(None, what, f"boot it with kho=on, or {_SEE}", "command_line")


def _why_on(told: Told) -> str:
    asked = kho_parameter(told.command_line or "")
    if asked and asked[1]:
        return f"{asked[0]} on the command line"
    # A configuration of this name may be another build's.
    if asked or told.default is False or told.command_line is None:
        return "why is not recorded"
    return BY_DEFAULT


def _off(switch: Switch, by: str) -> HostSwitch:
    return HostSwitch(False, switch.why, switch.hint, by)


def _ram(told: Told) -> str:
    return "this host's RAM" if told.ram is None else f"{human(told.ram)} of RAM"


def _beyond(bytes_: int | None, total: int | None) -> int | None:
    """None, too, if there is less than CmaTotal: they are of two moments, or made up."""
    if bytes_ is None or total is None or bytes_ < total:
        return None
    return bytes_ - total
