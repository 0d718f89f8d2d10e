# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Find out, in one kernel, whose the preserved memory is: everything that the root FDT, LUO and the
kernel's own vmalloc areas lead to.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from drgn import FaultError, Object, Program
from drgn.helpers.linux.mm import for_each_vmap_area
from drgn.helpers.linux.module import address_to_module

from ..abi import U64, Abi
from ..clients import Kind, Luo, Owner
from ..owners import UNKNOWN, Owners
from ..serialized import LUO
from ..snapshot import KeySet, Side
from .follow import Following
from .luo import read_incoming, read_outgoing
from .pages import PageLayout
from .walk import READS, ReadPhys


def with_clients(
    prog: Program, abi: Abi, ram: U64, read: ReadPhys, side: Side, outgoing: bool
) -> Side:
    """
    The same with what its clients' structures say.

    :param outgoing: what LUO keeps of it in the kernel differs by direction.
    """
    following = Following(abi, ram, read, keys=KeySet(abi, side.tree.leaves))
    following.subtrees(side.fdt, side.blobs)
    luo: Luo | None = None
    phys = next((subtree.phys for subtree in side.fdt.subtrees if subtree.name == LUO), None)
    if phys is not None and "luo_global" in prog:
        luo = (read_outgoing if outgoing else read_incoming)(prog, following, phys)
    return replace(
        side,
        luo=luo,
        vmallocs=following.vmallocs,
        owners=following.owners,
        claims=following.claims(),
    )


def with_vm_structs(prog: Program, abi: Abi, layout: PageLayout, side: Side) -> Side:
    """
    The same with owners for preserved pages that are mapped by vmalloc, by who allocated the area.

    Whoever preserves such an area page by page leaves no trace of it but this.
    """
    caller, phys = _vm_structs(prog, abi, layout)
    mine = KeySet(abi, side.tree.leaves).covered(phys)
    caller, phys = caller[mine], phys[mine]
    owners = Owners.of_side(side, abi.page_shift)
    mine = owners.at(phys, phys + np.uint64(abi.page_size)) == UNKNOWN
    caller, phys = caller[mine], phys[mine]
    more = Following(abi, np.zeros((0, 2), np.uint64), lambda *_: None, list(side.owners))
    for each in np.unique(caller).tolist():
        owner = Owner(Kind.VM_STRUCT, f"vm_struct of {_symbol(prog, each)}")
        more.claim(owner, np.unique(phys[caller == each]), abi.page_size)
    return replace(side, owners=more.owners, claims=[*side.claims, *more.claims()])


def _vm_structs(prog: Program, abi: Abi, layout: PageLayout) -> tuple[U64, U64]:
    """Of each page of all vmalloc areas that have pages of their own: who allocated it, and its
    address."""
    callers = [np.zeros(0, np.uint64)]
    pages = [np.zeros(0, np.uint64)]
    for area in _vmap_areas(prog):
        try:
            vm = area.vm
            count = vm.nr_pages.value_() if vm else 0
            # One that says to have more pages than it maps was written over.
            if not 0 < count <= vm.size.value_() >> abi.page_shift:
                continue
            raw = prog.read(vm.pages.value_(), 8 * count)
            callers.append(np.full(count, vm.caller.value_(), np.uint64))
        except FaultError:
            # The area went while it was looked at: it is nobody's any more.
            continue
        pages.append(np.frombuffer(raw, np.uint64))
    pfn = (np.concatenate(pages) - np.uint64(layout.vmemmap)) // np.uint64(layout.size)
    return np.concatenate(callers), pfn << np.uint64(abi.page_shift)


def _vmap_areas(prog: Program) -> list[Object]:
    """
    Every ``struct vmap_area``, once.

    They hang on lists that move: an area that was taken off while it was looked at leads to itself
    for ever. Then it is tried again, READS times, and what was seen last is what there is.
    """
    found: dict[int, Object] = {}
    for _ in range(READS):
        found = {}
        try:
            for area in for_each_vmap_area(prog):
                if area.value_() in found:
                    break
                found[area.value_()] = area
            else:
                break
        except FaultError:
            continue
    return list(found.values())


def _symbol(prog: Program, address: int) -> str:
    """The function at an address; the module where debug info of modules is not loaded."""
    try:
        return prog.symbol(address).name
    except LookupError:
        module = address_to_module(prog, address)
        return f"{address:#x}" + (f" [{module.name.string_().decode()}]" if module else "")
