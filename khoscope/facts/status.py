# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of KHO in one kernel, summed up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..abi.keys import BAD_ORDER, Tracker
from ..abi.kho_fdt import Subtree
from .columns import Blocks
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

#: What the kernel says when it turns KHO off by itself.
_DISABLED = re.compile(r"KHO: .*disabling", re.IGNORECASE)


@dataclass(frozen=True)
class Switch:
    """Whether KHO is on, and why."""

    on: bool
    why: str


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
        preserved,
        _totals(facts.stamps) if looked else None,
        tree_pages,
        pages / tree_pages if tree_pages and are_pages else None,
        _subtrees(facts, side),
        taint_letters(facts.kernel.tainted),
    )


def kho_switch(facts: Snapshot) -> Switch:
    """Whether KHO is on: ``kho_enable``, which ``kho=`` sets and a failing set-up clears."""
    if not facts.kho_enable:
        return Switch(False, _why_off(facts))
    if not facts.outgoing.tree.state.root:
        return Switch(False, "enabled, but there is no tree: it was not, or not yet, set up")
    if not facts.kernel.command_line:
        return Switch(True, "why is not recorded")
    asked = kho_parameter(facts.kernel.command_line)
    if asked is not None and asked[1]:
        return Switch(True, f"{asked[0]} on the command line")
    return Switch(True, "the default of this kernel (CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT)")


def _why_off(facts: Snapshot) -> str:
    for line in facts.kernel.log:
        if _DISABLED.search(line):
            return f"the kernel says {line!r}"
    if not facts.kernel.command_line:
        return "why is not recorded"
    asked = kho_parameter(facts.kernel.command_line)
    if asked is None:
        return "the command line does not have kho=on"
    word, on = asked
    if on:
        return f"although {word} is on the command line: its set-up failed, see the kernel's log"
    return f"{word} on the command line"


def kho_parameter(command_line: str) -> tuple[str, bool] | None:
    """The last ``kho=`` that ``kstrtobool()`` understands, and what it says; None: none."""
    # Everything after "--" is for init.
    words, _, _ = f" {command_line} ".partition(" -- ")
    asked = None
    for word in re.findall(r"(?<=\s)kho=\S*", f"{words} "):
        if re.match(r"kho=([yYtT1]|[oO][nN])", word):
            asked = word, True
        elif re.match(r"kho=([nNfF0]|[oO][fF])", word):
            asked = word, False
    return asked


def _scratch(facts: Snapshot) -> list[Scratch]:
    free = [n if n is None else n << facts.abi.page_shift for n in facts.scratch_free]
    # In a file, the two lists may have different lengths.
    free += [None] * len(facts.scratch)
    return [Scratch(phys, size, free[i]) for i, (phys, size) in enumerate(facts.scratch.tolist())]


def _totals(stream: Iterable[Blocks]) -> dict[tuple[int, int], int]:
    """Blocks by (order, type)."""
    counted: Counter[tuple[int, int]] = Counter()
    for chunk in stream:
        both = np.stack([chunk.order.astype(np.int16), chunk.type.astype(np.int16)])
        kinds, counts = np.unique(both, axis=1, return_counts=True)
        for order, kind, count in zip(*kinds.tolist(), counts.tolist(), strict=True):
            counted[order, kind] += count
    return dict(counted)


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
