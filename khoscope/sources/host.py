# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Find out what this host offers to khoscope.

It must work even if nothing else does: that something cannot be read is a fact, too.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from drgn import Program

from ..abi.keys import Tracker
from ..facts.host_scratch import HostScratch
from ..facts.offers import Fact, State
from ..facts.scratch import users
from ..facts.snapshot import Snapshot
from ..facts.status import kho_switch
from ..words.errors import KhoscopeError
from ..words.sizes import human
from . import host_files
from .bcc import import_bcc
from .host_scratch import read_host_scratch
from .kernel import KernelSource
from .open import ANOTHER_WAY, DebugInfo, debug_info, lockdown_mode

#: Functions of the kernel that show that it was built with something; any one of them will do.
BUILT: Final = {
    "KHO": ("kho_preserve_folio", "kho_preserve_pages"),
    "LUO": ("liveupdate_register_file_handler", "liveupdate_enabled"),
    "kprobes": ("register_kprobe",),
}

#: Functions that show how the kernel keeps what is preserved; the compiler may have made others of
#: them, with a suffix.
TRACKERS: Final = {
    Tracker.RADIX: ("kho_radix_add_page", "kho_radix_add_key"),
    Tracker.XARRAY: ("__kho_preserve_order", "kho_out_finalize_set", "kho_finalize"),
}
#: What ``trace`` sees of the blocks that calls preserve and unpreserve.
_TRACED: Final = {
    Tracker.RADIX: "each block that is added or deleted, by the function that does it",
    Tracker.XARRAY: "the blocks that follow from the arguments of calls",
}

_AS_ROOT: Final = "run it as root (sudo khoscope doctor)"
#: What tells the size of scratch in a kernel that was handed over to, whose zones do not.
_SIZES: Final = f"{host_files.PAGETYPEINFO} tells, or a debugfs on {host_files.DEBUGFS}"


@dataclass(frozen=True)
class HostProbe:
    """
    What could be seen of the running kernel.

    :param unopened: why nothing could be seen.
    :param unread: why only its debug info could be seen.
    """

    debug_info: DebugInfo | None = None
    facts: Snapshot | None = None
    unopened: KhoscopeError | None = None
    unread: KhoscopeError | None = None


class Host:
    """
    This host.

    :param root: where its files are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def facts(
        self, open_kernel: Callable[[], Program], read: Callable[[Program], KernelSource]
    ) -> list[Fact]:
        """
        All facts about the host; those that all commands need come first.

        :param open_kernel: opens the running kernel, or raises why it cannot.
        :param read: reads what ``open_kernel`` opened, or raises why it cannot.
        """
        seen = _look(open_kernel, read)
        kho = self._built("KHO", seen, "CONFIG_KEXEC_HANDOVER=y")
        luo = self._luo(seen)
        # Without KHO, every part of KHO is missing: one line says so, and what to do.
        there = kho.state != State.NO
        tracker = self._tracker(seen)
        finalizes = tracker == Tracker.XARRAY and not (seen.facts and not seen.facts.kho_enable)
        return [
            kho,
            *([self._says_tracker(seen, tracker)] if there else []),
            _root_user(),
            self._kcore(),
            self._lockdown(),
            _debug_info(seen),
            *([_kernel(seen), self._kho_is_on(seen), self._says_scratch(seen)] if there else []),
            *([self._finalized(seen)] if there and finalizes else []),
            self._btf(),
            self._kptr_restrict(),
            luo,
            *([self._liveupdate()] if luo.state != State.NO else []),
            self._image(seen),
            _bcc(),
            self._headers(),
            self._kprobes(),
            *([self._fentry()] if there else []),
            *([_traced(tracker)] if there else []),
        ]

    # -- what all commands need -------------------------------------------------------------------

    def _built(self, name: str, seen: HostProbe, what: str) -> Fact:
        """Whether the kernel was built with something that every command needs."""
        if seen.facts:
            return Fact(name, State.OK, "built in", "kho_out", needed=True)
        return replace(self._has(name, what), needed=True)

    def _has(self, name: str, what: str) -> Fact:
        """Whether the kernel was built with something."""
        where = str(host_files.KALLSYMS)
        if not self._symbols:
            hint = "use a kernel with CONFIG_KALLSYMS=y, outside a container"
            return Fact(name, State.UNKNOWN, "the kernel lists no symbols", where, hint)
        if self._symbols.isdisjoint(BUILT[name]):
            return Fact(name, State.NO, "not in this kernel", where, f"boot a kernel with {what}")
        return Fact(name, State.OK, "built in", where)

    def _tracker(self, seen: HostProbe) -> Tracker | None:
        """How the kernel keeps what is preserved; None: it does not say."""
        if seen.facts:
            return seen.facts.abi.tracker
        names = {name.partition(".")[0] for name in self._symbols}
        return next((each for each, of in TRACKERS.items() if not names.isdisjoint(of)), None)

    def _says_tracker(self, seen: HostProbe, tracker: Tracker | None) -> Fact:
        name = "tracker"
        if tracker is None:
            hint = "see what is missing below: the kernel's memory tells"
            what = "none of its functions is among the symbols"
            return Fact(name, State.UNKNOWN, what, str(host_files.KALLSYMS), hint)
        where = str(host_files.KALLSYMS)
        if seen.facts:
            where = seen.facts.abi.decided.get("tracker", "kho_out")
        return Fact(name, State.OK, str(tracker), where)

    def _finalized(self, seen: HostProbe) -> Fact:
        """Whether what is preserved would be handed over, in kernels that must be told to do so."""
        name, where = "finalized", str(host_files.FINALIZE)
        said = (self._text(host_files.FINALIZE) or "").strip()
        done = {"0": False, "1": True}.get(said)
        facts = seen.facts
        if facts and done is None:
            done, where = facts.finalized, "kho_out.finalized"
        if done:
            return Fact(name, State.OK, "yes", where)
        if done is None:
            hint = f"as root, with a debugfs on {host_files.DEBUGFS}"
            return Fact(name, State.UNKNOWN, "cannot be read", where, hint)
        if facts and facts.finalizes_itself:
            return Fact(name, State.OK, "no: LUO does it on the way into the kexec", where)
        how = f"echo 1 >{host_files.FINALIZE}"
        if facts:
            hint = f"to hand something over, {facts.abi.finalize}: {how}"
            return Fact(name, State.NO, "no: nothing would be handed over", where, hint)
        # Without its memory, the kernel does not say whether LUO is on, or what an image has to
        # have; finalizing before the image is loaded suits all of them.
        what = "no; when it must be is not known"
        if not self._symbols.isdisjoint(BUILT["LUO"]):
            what += ", and LUO, if it is on, does it"
        hint = f"to hand something over in any case, before the image is loaded: {how}"
        return Fact(name, State.NO, what, where, hint)

    def _kho_is_on(self, seen: HostProbe) -> Fact:
        name = "KHO on"
        if seen.facts:
            switch = kho_switch(seen.facts)
            state = State.OK if switch.on else State.NO
            return Fact(name, state, switch.why, "kho_enable", switch.hint, True)
        said = self._scratch
        state = {True: State.OK, False: State.NO, None: State.UNKNOWN}[said.on]
        return Fact(name, state, said.why, said.why_from, said.hint, True)

    def _says_scratch(self, seen: HostProbe) -> Fact:
        """
        What the scratch areas take; that there are any is as it should be, and worth knowing where
        nobody has asked for them.
        """
        said, name = self._scratch, "scratch"
        on, size, where = said.on, said.size, said.size_from
        if seen.facts:
            on = kho_switch(seen.facts).on
            if len(seen.facts.scratch):
                size, where = int(seen.facts.scratch[:, 1].sum()), "kho_scratch"
        if size:
            what = f"{human(size)}, {_of_scratch(said)}"
            # What cannot be told is no reason to give anything back.
            used = on and seen.facts is not None and not users(seen.facts).nobody
            return Fact(name, State.OK, what, where, "" if used else _give_back(on))
        if size == 0 or (on is False and not said.phantom):
            what = "none: KHO is off" if on is False else "none"
            return Fact(name, State.OK, what, where or said.why_from)
        what = "how much is not known"
        if said.phantom:
            what += f", but there is some, {_of_scratch(said)}"
            where = str(host_files.MEMINFO)
        where = where or str(host_files.ZONEINFO)
        return Fact(name, State.UNKNOWN, what, where, f"as root, {_SIZES}")

    def _kcore(self) -> Fact:
        name, where = "kernel memory", str(host_files.KCORE)
        if not self._is_there(host_files.KCORE):
            hint = "use a kernel with CONFIG_PROC_KCORE=y, outside a container"
            return Fact(name, State.NO, "there is none", where, hint, True)
        try:
            self._at(host_files.KCORE).open("rb").close()
        except OSError as error:
            hint = ANOTHER_WAY if os.geteuid() == 0 else _AS_ROOT
            return Fact(name, State.NO, str(error.strerror), where, hint, True)
        return Fact(name, State.OK, "can be opened", where, needed=True)

    def _lockdown(self) -> Fact:
        name, where = "lockdown", str(host_files.LOCKDOWN)
        mode = lockdown_mode(self._at(host_files.LOCKDOWN))
        if mode is None:
            return Fact(name, State.OK, "this kernel has none, or does not say", where)
        if mode == "confidentiality":
            hint = "boot without lockdown, or look at a vmcore or from the host with --qemu"
            return Fact(name, State.NO, f"{mode}: memory and probes are denied", where, hint)
        return Fact(name, State.OK, mode, where)

    # -- what some need ---------------------------------------------------------------------------

    def _btf(self) -> Fact:
        name, where = "BTF", str(host_files.BTF)
        if self._is_there(host_files.BTF):
            return Fact(
                name, State.OK, f"{self._at(host_files.BTF).stat().st_size >> 10:,} KiB", where
            )
        hint = "without it a vmlinux is needed, and trace uses kprobes: CONFIG_DEBUG_INFO_BTF=y"
        return Fact(name, State.NO, "this kernel has none", where, hint)

    def _kptr_restrict(self) -> Fact:
        name, where = "kptr_restrict", str(host_files.KPTR_RESTRICT)
        value = self._text(host_files.KPTR_RESTRICT)
        if value is None:
            return Fact(name, State.UNKNOWN, "cannot be read", where, "see that /proc is mounted")
        if value.strip() == "2":
            hint = "sysctl -w kernel.kptr_restrict=1, for BTF in the place of a vmlinux"
            return Fact(name, State.NO, "2: addresses are hidden from root, too", where, hint)
        return Fact(name, State.OK, f"{value.strip()}: root sees addresses", where)

    def _luo(self, seen: HostProbe) -> Fact:
        built = self._has("LUO", "CONFIG_LIVEUPDATE=y, for luo and carry")
        if seen.facts is None or built.state != State.OK:
            return built
        hint = "boot with liveupdate=on, for luo and carry"
        if seen.facts.liveupdate is None:
            what = "built in; whether it is on cannot be read"
            return Fact("LUO", State.UNKNOWN, what, "luo_global.enabled", hint)
        if seen.facts.liveupdate.enabled:
            return Fact("LUO", State.OK, "on", "luo_global.enabled")
        return Fact("LUO", State.NO, "off", "luo_global.enabled", hint)

    def _liveupdate(self) -> Fact:
        name, where = "LUO's device", str(host_files.LIVEUPDATE)
        if self._is_there(host_files.LIVEUPDATE):
            return Fact(name, State.OK, "there", where)
        hint = "carry needs it: boot with liveupdate=on, and mount a devtmpfs on /dev"
        return Fact(name, State.NO, "there is none", where, hint)

    def _image(self, seen: HostProbe) -> Fact:
        name, where = "kexec image", str(host_files.KEXEC_LOADED)
        hint = "load one with the handover: kexec -s -l KERNEL --reuse-cmdline"
        image = seen.facts.image if seen.facts else None
        if image is None:
            loaded = self._text(host_files.KEXEC_LOADED)
            if loaded is None:
                hint = "kexec needs CONFIG_KEXEC_FILE=y"
                return Fact(name, State.UNKNOWN, "the kernel does not say", where, hint)
            if loaded.strip() == "1":
                what = "loaded; whether with the handover, the kernel's memory would tell"
                return Fact(name, State.UNKNOWN, what, where, "ask again when debug info is there")
            return Fact(name, State.NO, "none is loaded", where, hint)
        where = "kexec_image"
        if not image.loaded:
            return Fact(name, State.NO, "none is loaded", where, hint)
        how = "kexec_file_load" if image.file_mode else "kexec_load"
        if image.kho_fdt:
            return Fact(name, State.OK, f"loaded by {how}, with the handover", where)
        return Fact(name, State.NO, f"loaded by {how}, without the handover", where, hint)

    def _headers(self) -> Fact:
        """The kernel headers that bcc compiles with."""
        name, build = "headers", host_files.MODULES / platform.release() / "build"
        if self._is_there(build):
            return Fact(name, State.OK, "installed", str(build))
        hint = "trace needs them: install the kernel's headers package, or use CONFIG_IKHEADERS=y"
        if not self._is_there(host_files.KHEADERS):
            what = f"neither there nor in {build}"
            return Fact(name, State.NO, what, str(host_files.KHEADERS), hint)
        lacks = [tool for tool in ("tar", "xz") if shutil.which(tool) is None]
        if lacks:
            hint = f"install {' and '.join(lacks)}: bcc unpacks it with them"
            return Fact(
                name, State.NO, f"no {' and no '.join(lacks)}", str(host_files.KHEADERS), hint
            )
        return Fact(name, State.OK, "in the kernel", str(host_files.KHEADERS))

    def _kprobes(self) -> Fact:
        built = self._has("kprobes", "CONFIG_KPROBES=y, for trace")
        switch = self._text(host_files.KPROBES_ENABLED)
        if built.state != State.OK or switch is None:
            return built
        if switch.strip() == "1":
            return Fact("kprobes", State.OK, "on", str(host_files.KPROBES_ENABLED))
        hint = f"write 1 to {host_files.KPROBES_ENABLED}"
        return Fact("kprobes", State.NO, "switched off", str(host_files.KPROBES_ENABLED), hint)

    def _fentry(self) -> Fact:
        """Whether functions of KHO can be patched, which is cheaper than kprobes."""
        name = "fentry"
        if not self._is_there(host_files.BTF):
            hint = "trace uses kprobes without it"
            return Fact(name, State.NO, "needs BTF", str(host_files.BTF), hint)
        if (self._text(host_files.FTRACE_ENABLED) or "1").strip() != "1":
            hint = "sysctl -w kernel.ftrace_enabled=1"
            return Fact(
                name, State.NO, "ftrace is switched off", str(host_files.FTRACE_ENABLED), hint
            )
        functions = self._text(host_files.TRACEABLE)
        if functions is None:
            hint = f"{_AS_ROOT}; it needs CONFIG_FUNCTION_TRACER=y and tracefs"
            return Fact(name, State.UNKNOWN, "cannot be read", str(host_files.TRACEABLE), hint)
        names = {line.partition(" ")[0] for line in functions.splitlines()}
        if names.isdisjoint(BUILT["KHO"]):
            hint = "trace uses kprobes without it"
            return Fact(
                name, State.NO, "no function of KHO can be traced", str(host_files.TRACEABLE), hint
            )
        return Fact(name, State.OK, "functions of KHO can be traced", str(host_files.TRACEABLE))

    # -- files ------------------------------------------------------------------------------------

    def _is_there(self, path: Path) -> bool:
        return host_files.is_there(self._root, path)

    def _at(self, path: Path) -> Path:
        return host_files.at(self._root, path)

    def _text(self, path: Path) -> str | None:
        return host_files.text(self._root, path)

    @cached_property
    def _scratch(self) -> HostScratch:
        built = {State.OK: True, State.NO: False}.get(self._has("KHO", "").state)
        return read_host_scratch(self._root, built)

    @cached_property
    def _symbols(self) -> frozenset[str]:
        """Only the names: the addresses may be hidden."""
        lines = (self._text(host_files.KALLSYMS) or "").splitlines()
        return frozenset(words[2] for line in lines if len(words := line.split()) >= 3)


def _look(open_kernel: Callable[[], Program], read: Callable[[Program], KernelSource]) -> HostProbe:
    try:
        prog = open_kernel()
    except KhoscopeError as error:
        return HostProbe(unopened=error)
    found = debug_info(prog)
    try:
        return HostProbe(found, read(prog).outline())
    except KhoscopeError as error:
        return HostProbe(found, unread=error)


def _root_user() -> Fact:
    name, where = "root", "geteuid()"
    if os.geteuid() == 0:
        return Fact(name, State.OK, "yes", where)
    hint = "run khoscope as root (sudo khoscope …)"
    return Fact(name, State.NO, f"no, user {os.geteuid()}", where, hint)


def _debug_info(seen: HostProbe) -> Fact:
    name, where = "debug info", "drgn"
    if seen.debug_info:
        return Fact(name, State.OK, str(seen.debug_info), where, needed=True)
    error = seen.unopened
    assert error is not None
    if "debug info" in error.what:
        return Fact(name, State.NO, error.what, where, error.hint, True)
    return Fact(name, State.UNKNOWN, f"not looked for: {error.what}", where, error.hint, True)


def _kernel(seen: HostProbe) -> Fact:
    """Whether khoscope understands what it reads."""
    name, where = "KHO's state", "kho_out"
    if seen.facts:
        said = seen.facts.outgoing.fdt.compatible or "readable, no FDT"
        if not seen.facts.outgoing.fdt.phys and seen.facts.finalized is False:
            said += " before it is finalized"
        return Fact(name, State.OK, said, where, needed=True)
    if seen.unread:
        return Fact(name, State.NO, seen.unread.what, where, seen.unread.hint, True)
    return Fact(name, State.UNKNOWN, "not looked at", where, "see what is missing above", True)


def _of_scratch(said: HostScratch) -> str:
    """What it is to the host, and where /proc/meminfo has it."""
    what = "which only movable memory may use"
    if said.cma.free is None or said.cma.total is None:
        return what
    free, total = said.cma.free >> 10, said.cma.total >> 10
    return (
        f"{what}; /proc/meminfo has what is free of it in CmaFree ({free:,} kB), "
        f"and none of it in CmaTotal ({total:,} kB)"
    )


def _give_back(on: bool | None) -> str:
    """
    How a host without use for scratch gets rid of it.

    A kernel that a KHO kernel kexecs keeps the areas, even with ``kho=off``.
    """
    if on is False:
        return "the kernel before has handed it over: a cold boot with kho=off gives it back"
    costs = "khoscope scratch says what it costs"
    return f"{costs}; where nobody hands anything over, a cold boot with kho=off gives it back"


def _traced(tracker: Tracker | None) -> Fact:
    name, where = "traced blocks", "functions of KHO"
    if tracker is None:
        hint = "khoscope trace says it when it starts"
        return Fact(name, State.UNKNOWN, "not known without the tracker", where, hint)
    return Fact(name, State.OK, _TRACED[tracker], where)


def _bcc() -> Fact:
    name = "bcc"
    try:
        bcc = import_bcc()
    except KhoscopeError as error:
        return Fact(name, State.NO, error.what, "import bcc", f"trace needs it: {error.hint}")
    version = getattr(bcc, "__version__", "of an unknown version")
    return Fact(name, State.OK, version, f"{bcc.__file__}")
