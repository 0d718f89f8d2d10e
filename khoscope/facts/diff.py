# SPDX-License-Identifier: LGPL-2.1-or-later
"""What changed between two snapshots: facts, no opinion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..words.errors import KhoscopeError
from .clients import Luo
from .columns import Blocks, Pages, aligned, distinct
from .owners import claimed
from .scratch import is_movable
from .snapshot import KexecImage, Side, Snapshot


@dataclass(frozen=True)
class Changed:
    """A single fact that differs."""

    what: str
    a: str
    b: str


@dataclass(frozen=True, eq=False)
class BlockChanges:
    """
    Blocks of one stretch of keys that differ.

    :param how: "removed" (in A only), "added" (in B only) or "pages" (in both, but the facts of
        their struct pages differ).
    :param a: the blocks with A's facts; B's if ``how`` is "added".
    :param b: B's facts of the same blocks, if ``how`` is "pages".
    """

    how: str
    a: Blocks
    b: Pages | None = None


def facts(a: Snapshot, b: Snapshot) -> list[Changed]:
    """The single facts that differ."""
    left, right = _single_facts(a), _single_facts(b)
    return [
        Changed(what, left.get(what, "absent"), right.get(what, "absent"))
        for what in dict.fromkeys([*left, *right])
        if left.get(what) != right.get(what)
    ]


def _single_facts(s: Snapshot) -> dict[str, str]:
    found = {
        "kernel release": s.kernel.release,
        "kernel version": s.kernel.version,
        "boot id": s.kernel.boot_id or "not made yet",
        "tainted": f"{s.kernel.tainted:#x}",
        "log lines about trouble": str(len(s.kernel.log)),
        "KHO enabled": str(s.kho_enable),
        "KHO boot": str(s.handover.is_kho_boot),
        "previous release": s.handover.previous_release or "none",
        "kexec count": str(s.handover.kexec_count),
        "tracker": s.abi.tracker,
        "finalized": str(s.finalized),
        "page size": str(s.abi.page_size),
        "type bit": str(s.abi.type_shift),
        "stored key bits": str(s.abi.stored_bits),
        "key width": str(s.abi.key_width),
        "stamp type bit": str(s.abi.stamp.type_shift),
        "RAM": ", ".join(f"{x:#x}..{y:#x}" for x, y in s.ram.tolist()),
        "scratch": ", ".join(f"{x:#x}+{y:#x}" for x, y in s.scratch.tolist()),
    }
    if s.nodes is not None:
        found["NUMA nodes"] = ", ".join(f"{n.number}: {n.start:#x}..{n.end:#x}" for n in s.nodes)
    found |= _memory_facts(s)
    if s.kernel.command_line:
        found["command line"] = s.kernel.command_line
    if s.image is not None:
        found["kexec image"] = _image(s.image)
    if s.crash_image is not None:
        found["crash image"] = _image(s.crash_image)
    if s.liveupdate is not None:
        found["LUO enabled"] = str(s.liveupdate.enabled)
        if s.liveupdate.in_use is not None:
            found["/dev/liveupdate"] = "open" if s.liveupdate.in_use else "not open"
        found["LUO file handlers"] = ", ".join(s.liveupdate.handlers) or "none"
    found |= _side_facts("outgoing", s.outgoing)
    if s.incoming is not None:
        found |= _side_facts("incoming", s.incoming)
    return found


def _memory_facts(s: Snapshot) -> dict[str, str]:
    """
    What zones and scratch areas have, without what is free or movable in them: that changes all the
    time.
    """
    found = {}
    for zone in s.memory.zones if s.memory else []:
        found[f"node {zone.node} zone {zone.name}"] = (
            f"{zone.present} pages, {zone.managed} managed, {zone.cma} CMA"
        )
    for (phys, _), use in zip(s.scratch.tolist(), s.scratch_use, strict=False):
        if use.blocks is not None:
            blocks = (f"{count} {kind}" for kind, count in use.blocks.items())
            found[f"page blocks of scratch {phys:#x}"] = ", ".join(blocks)
        stays = {name: n for name, n in use.pages.items() if not is_movable(name)}
        stays |= {"pinned": use.pinned} if use.pinned else {}
        here = (f"{name} {count}" for name, count in sorted(stays.items()))
        found[f"pages in scratch {phys:#x} that cannot be moved"] = ", ".join(here) or "none"
    return found


def _image(image: KexecImage) -> str:
    if not image.loaded:
        return "none"
    call = "kexec_file_load" if image.file_mode else "kexec_load"
    return f"{image.size} bytes by {call}, KHO FDT {image.kho_fdt:#x}"


def _side_facts(which: str, side: Side) -> dict[str, str]:
    found = {
        f"{which} FDT": f"{side.fdt.phys:#x}",
        f"{which} compatible": str(side.fdt.compatible),
        f"{which} tree root": f"{side.tree.state.root:#x}",
        f"{which} bad tree entries": str(side.tree.state.problem_count),
    }
    for subtree in side.fdt.subtrees:
        where = "nowhere" if subtree.phys is None else f"{subtree.phys:#x}"
        found[f"{which} subtree {subtree.name}"] = f"{where}, {subtree.size} bytes"
    if side.luo is not None:
        found |= _luo_facts(which, side.luo)
    for area in side.vmallocs:
        found[f"{which} vmalloc area {area.name}"] = (
            f"{area.total_pages} pages in {area.chunks} chunks from {area.first:#x}"
        )
    for owner, size in claimed(side):
        found[f"{which} memory of {owner}"] = f"{size} bytes"
    return found


def _luo_facts(which: str, luo: Luo) -> dict[str, str]:
    found = {f"{which} LUO": f"{luo.compatible}, live update {luo.liveupdate_num}"}
    for session in luo.sessions:
        retrieved = ", retrieved" if session.retrieved else ""
        found[f"{which} session {session.name}"] = f"{session.count} files{retrieved}"
        for file in session.files:
            size = f", {file.memfd.size} bytes" if file.memfd else ""
            name = f"{which} session {session.name} {file}"
            found[name] = f"{file.handler}, data {file.data:#x}{size}"
    for flb in luo.flbs:
        found[f"{which} FLB {flb.name}"] = f"data {flb.data:#x}, {flb.count} files"
    return found


def blocks(a: Snapshot, b: Snapshot) -> Iterator[BlockChanges]:
    """
    The outgoing blocks that differ, stretch by stretch.

    :raises KhoscopeError: if keys mean something else in the other kernel.
    """
    if (a.abi.page_shift, a.abi.order_0_log2) != (b.abi.page_shift, b.abi.order_0_log2):
        raise KhoscopeError(
            f"the snapshots have pages of {a.abi.page_size} and {b.abi.page_size} bytes",
            "compare snapshots of kernels with the same page size",
        )
    for left, right in aligned(a.outgoing.blocks, b.outgoing.blocks):
        if len(left) == len(right) and (left.key == right.key).all():
            # Most chunks are so.
            yield from _with_other_pages(left, right)
            continue
        _, i, j = np.intersect1d(left.key, right.key, assume_unique=True, return_indices=True)
        for how, part, common in (("removed", left, i), ("added", right, j)):
            alone = np.ones(len(part), np.bool_)
            alone[common] = False
            if alone.any():
                yield BlockChanges(how, part[alone])
        yield from _with_other_pages(left[i], right[j])


def _with_other_pages(was: Blocks, now: Blocks) -> Iterator[BlockChanges]:
    """Those of the same blocks whose facts differ."""
    differ = _pages_differ(was.facts, now.facts)
    if differ.any():
        yield BlockChanges("pages", was[differ], now.facts[differ])


def _pages_differ(a: Pages, b: Pages) -> NDArray[np.bool_]:
    differ = np.zeros(len(a), np.bool_)
    for column in Pages.DTYPES:
        changed = distinct(getattr(a, column)) != distinct(getattr(b, column))
        if column == "pristine":
            # An older file does not have it.
            known = (a.pristine != Pages.UNRECORDED) & (b.pristine != Pages.UNRECORDED)
            changed = changed & known
        differ |= changed
    return differ


def count(changes: Iterator[BlockChanges]) -> Counter[str]:
    """How many blocks changed in which way."""
    counted: Counter[str] = Counter()
    for change in changes:
        counted[change.how] += len(change.a)
    return counted
