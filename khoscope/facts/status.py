# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of KHO in one kernel, summed up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ..abi.keys import BAD_ORDER, KHO_PAGE_SPLIT, NO_TYPE, Tracker
from ..abi.kho_fdt import Subtree
from ..words.errors import KhoscopeError
from ..words.sizes import human
from . import scratch
from .columns import Blocks
from .command_line import switched
from .snapshot import Side, Snapshot, rows
from .tree import KeySet

#: Where each fact was read, in the kernel's own names.
READ_FROM: Final = {
    "kho": "kho_enable",
    "handover": "kho_in",
    "kho_abi": "kho_out.fdt",
    "kho_abi_in": "kho_in.fdt_phys",
    "liveupdate": "luo_global.enabled",
    "luo_abi": "kho_out.fdt, LUO",
    "luo_abi_in": "kho_in.fdt_phys, LUO",
    "handlers": "luo_file_handler_list",
    "scratch": "kho_scratch",
    "cost": "kho_scratch, kho_out",
    "offline": "mem_section",
    "nodes": "struct pglist_data",
    "preserved": "kho_out.radix_tree",
    "unclaimed": "page->private",
    "tree": "kho_out.radix_tree",
    "subtrees": "kho_out.fdt",
    "subtrees_in": "kho_in.fdt_phys",
    "sessions": "luo_session_global.outgoing",
    "sessions_in": "luo_session_global.incoming",
    "sessions_ser": "struct luo_session_ser",
    "image": "kexec_image",
    "crash_image": "kexec_crash_image",
    "taint": "tainted_mask",
    "finalized": "kho_out.finalized",
}


def read_from(facts: Snapshot) -> dict[str, str]:
    """Where each fact of a kernel was read."""
    if facts.abi.tracker == Tracker.RADIX:
        return {name: where for name, where in READ_FROM.items() if name != "finalized"}
    # How the source found out is where it is.
    decided, usual = facts.abi.decided, READ_FROM["kho_abi"]
    tracker, fdt = decided.get("tracker", "kho_out"), decided.get("root FDT", usual)
    moved = {name: where.replace(usual, fdt) for name, where in READ_FROM.items() if usual in where}
    return {**READ_FROM, **moved, "preserved": tracker, "tree": tracker}


#: A letter for each bit of ``tainted_mask`` (``taint_flags`` in kernel/panic.c).
TAINTS: Final = "PFSRMBUDAWCIOELKXTNJ"

#: Why KHO is on where nobody asked for it.
BY_DEFAULT: Final = "the default of this kernel (CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT)"

#: The kernel's own names of what it could not reserve (``kho_reserve_scratch``), and ours.  It
#: says the last of these in any case, after another one.
_NOT_RESERVED = re.compile(
    r"KHO: Failed to reserve (?:scratch )?(array|lowmem|global|nid (\d+)|area)", re.ASCII
)
_PARTS: Final = {
    "array": "the list of scratch areas",
    "lowmem": "the lowmem scratch area (below 4 GiB)",
    "global": "the global scratch area",
    "nid": "the scratch area of NUMA node {}",
    "area": "a scratch area",
}
#: ``NO_TYPE``, contig and split.
_TYPES: Final = KHO_PAGE_SPLIT - NO_TYPE + 1
_SEE_THE_LOG: Final = "see what the kernel's log says of KHO"


@dataclass(frozen=True)
class Switch:
    """
    Whether KHO is on, and why.

    :param hint: what to do to have it on; "": it is on.
    """

    on: bool
    why: str
    hint: str = ""


@dataclass(frozen=True)
class Scratch:
    """
    A scratch area.

    :param free: bytes that the buddy allocator holds; None: not counted.
    """

    phys: int
    size: int
    free: int | None


@dataclass(frozen=True)
class Status:
    """
    The state of KHO as one screen shows it.

    :param cost: what scratch costs, in words.
    :param preserved: outgoing blocks by (order, type).
    :param unclaimed: stamped blocks by (order, type); None: this is a KHO boot, but they were not
        looked for.
    :param tree_pages: the outgoing tree's own nodes; those of a radix tree are pages.
    :param per_byte: bytes preserved per byte of tree; None: there is no tree, or it is xarrays,
        whose nodes are slab objects: facts do not tell their size.
    :param subtrees: outgoing subtrees, and whether blocks cover all of each blob; None: the FDT
        does not say where it is.
    :param taint: letters, as in the kernel's own messages.
    """

    kho: Switch
    scratch: list[Scratch]
    cost: str
    preserved: dict[tuple[int, int], int]
    unclaimed: dict[tuple[int, int], int] | None
    tree_pages: int
    per_byte: float | None
    subtrees: list[tuple[Subtree, bool | None]]
    taint: str


def status(facts: Snapshot) -> Status:
    """Sum up what is known of a kernel."""
    side = facts.outgoing
    preserved = side.tree.totals(facts.abi)
    tree_pages = rows(side.tree.nodes)
    are_pages = facts.abi.tracker == Tracker.RADIX
    pages = sum(count << order for (order, _), count in preserved.items() if order != BAD_ORDER)
    looked = facts.scan is not None or not facts.handover.is_kho_boot
    return Status(
        kho_switch(facts),
        _scratch(facts),
        _cost(facts),
        preserved,
        blocks_by_kind(facts.stamps) if looked else None,
        tree_pages,
        pages / tree_pages if tree_pages and are_pages else None,
        _subtrees(facts, side),
        taint_letters(facts.kernel.tainted),
    )


def kho_switch(facts: Snapshot) -> Switch:
    """Whether KHO is on: ``kho_enable``, which ``kho=`` sets and a failing set-up clears."""
    if not facts.kho_enable:
        return _off(facts)
    if not facts.outgoing.tree.state.root:
        why = "enabled, but there is no tree: it was not, or not yet, set up"
        return Switch(False, why, _SEE_THE_LOG)
    if not facts.kernel.command_line:
        return Switch(True, "why is not recorded")
    asked = kho_parameter(facts.kernel.command_line)
    if asked is not None and asked[1]:
        return Switch(True, f"{asked[0]} on the command line")
    return Switch(True, BY_DEFAULT)


def no_kho(facts: Snapshot, lacks: str) -> KhoscopeError:
    """
    What to tell somebody who asks for what only a kernel with KHO on has.

    :param lacks: what is missing.
    """
    switch = kho_switch(facts)
    if switch.on:
        switch = Switch(False, f"it is not, or not yet, set up ({lacks})", _SEE_THE_LOG)
    return KhoscopeError(f"KHO is off in this kernel: {switch.why}", switch.hint)


def _off(facts: Snapshot) -> Switch:
    """
    Why KHO is off: nobody asked for it, or its set-up failed.

    The number of areas tells which, as it is set before any is reserved.  The command line and the
    log say more, and have to do for files that lack that number, and for kernels that were handed
    over to: those have the number of what they were handed, and keep the areas, on or off.
    """
    line = facts.kernel.command_line
    asked = kho_parameter(line)
    lacking = not_reserved(facts.kernel.log)
    setup = None if facts.handover.is_kho_boot else facts.scratch_setup
    failed = lacking is not None if setup is None else setup.count > 0
    if setup is not None and failed and lacking is None and not setup.array:
        lacking = "array", None
    failed |= asked is not None and asked[1]
    if failed:
        return _failed(facts, lacking)
    return not_asked(line)


def not_asked(command_line: str) -> Switch:
    """KHO is off because nobody asked for it; ``""``: the command line is not known."""
    asked = kho_parameter(command_line)
    if asked is not None and not asked[1]:
        return Switch(
            False, f"{asked[0]} on the command line", f"boot it with kho=on in place of {asked[0]}"
        )
    if not command_line:
        return Switch(False, "why is not recorded", "boot it with kho=on")
    return Switch(False, "the command line does not have kho=on", "boot it with kho=on")


def switched_off(command_line: str, lacking: tuple[str, int | None] | None, has: str) -> Switch:
    """
    KHO was asked for, and has switched itself off.

    :param lacking: what there was no room for (:func:`not_reserved`); None: the log does not say.
    :param has: the memory that scratch areas have to fit into, in words.
    """
    what = "its set-up failed, see the kernel's log"
    if lacking:
        part, number = lacking
        what = f"no room for {_PARTS[part].format(number)}"
        if sizes := scratch.scratch_parameters(command_line):
            what += f", with {sizes[-1]} on the command line"
    why = f"{asked_by(command_line)}, but it switched itself off: {what}"
    return Switch(False, why, f"boot it with a kho_scratch= that fits into {has}")


def asked_by(command_line: str) -> str:
    """Who asked for KHO, in a kernel that was asked for it."""
    asked = kho_parameter(command_line)
    return f"{asked[0]} on the command line" if asked else "asked for by this kernel's default"


def _failed(facts: Snapshot, lacking: tuple[str, int | None] | None) -> Switch:
    """KHO has switched itself off in a kernel whose memory is known."""
    has = f"{human(scratch.size_of(facts.ram))} of RAM"
    if lacking:
        part, number = lacking
        if part == "lowmem":
            has += f", of which {human(scratch.below_4_gib(facts.ram))} are below 4 GiB"
        for node in facts.nodes or []:
            if node.number == number:
                own = scratch.within(facts.ram, node)
                has += f", of which {human(scratch.size_of(own))} are in node {number}"
    switch = switched_off(facts.kernel.command_line, lacking, has)
    if lacking and facts.nodes and number not in {None, *(n.number for n in facts.nodes)}:
        return replace(
            switch,
            hint=f"no kho_scratch= helps: node {number} has no memory, and this kernel wants an "
            "area there, which linux 7.0 and later do not",
        )
    if not lacking:
        # kho_init() may have failed, which no other size would help.
        return replace(switch, hint=f"{_SEE_THE_LOG}; if there was no room, {switch.hint}")
    return replace(switch, hint=_smaller(facts, has) or switch.hint)


def _smaller(facts: Snapshot, has: str) -> str:
    """
    What to boot with so that the areas fit; "": it is not known.

    :param has: how much memory there is, in words.
    """
    sizes = scratch.enough(facts)
    if sizes is not None:
        asked = scratch.scratch_parameters(facts.kernel.command_line)
        place = f" in place of {asked[-1]}" if asked else ""
        return (
            f"boot it with {sizes}{place}: it takes {human(sizes.total_of(facts))} (there are "
            f"{has}), and should do for a kernel like this one"
        )
    return ""


def not_reserved(log: Iterable[str]) -> tuple[str, int | None] | None:
    """
    What the kernel could not reserve, according to its log: one of :data:`_PARTS`, and the NUMA
    node; None: it does not say.
    """
    for line in log:
        if found := _NOT_RESERVED.search(line):
            part, number = found.groups()
            return part.partition(" ")[0], None if number is None else int(number)
    return None


def kho_parameter(command_line: str) -> tuple[str, bool] | None:
    """The last ``kho=`` that ``kstrtobool()`` understands, and what it says; None: none."""
    return switched(command_line, "kho")


def _scratch(facts: Snapshot) -> list[Scratch]:
    free = [n if n is None else n << facts.abi.page_shift for n in facts.scratch_free]
    # In a file, the two lists may have different lengths.
    free += [None] * len(facts.scratch)
    return [Scratch(phys, size, free[i]) for i, (phys, size) in enumerate(facts.scratch.tolist())]


def _cost(facts: Snapshot) -> str:
    """What scratch costs this host, and for whom."""
    size = sum(area.size for area in scratch.areas(facts))
    used = "; nobody uses KHO" if scratch.users(facts).nobody else ""
    return f"{human(size)} that only movable memory may use{used} (khoscope scratch)"


def blocks_by_kind(stream: Iterable[Blocks]) -> dict[tuple[int, int], int]:
    """Blocks by (order, type)."""
    counts = np.zeros(256 * _TYPES, np.int64)
    for chunk in stream:
        kind = chunk.order.astype(np.int64) * _TYPES + chunk.type - NO_TYPE
        counts += np.bincount(kind, minlength=len(counts))
    return {
        (kind // _TYPES, kind % _TYPES + NO_TYPE): int(counts[kind])
        for kind in np.flatnonzero(counts).tolist()
    }


def _subtrees(facts: Snapshot, side: Side) -> list[tuple[Subtree, bool | None]]:
    keys = KeySet(facts.abi, side.tree.leaves)
    return [
        (
            subtree,
            None
            if subtree.phys is None or subtree.size is None
            else keys.covers(subtree.phys, subtree.size),
        )
        for subtree in side.fdt.subtrees
    ]


def taint_letters(mask: int) -> str:
    """As in ``print_tainted()``, without the blanks; a bit without a letter is a ?."""
    return "".join(
        TAINTS[bit] if bit < len(TAINTS) else "?"
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    )
