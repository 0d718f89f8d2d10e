# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Find out, in one kernel, whose the preserved memory is: everything that the root FDT, LUO and the
kernel's own vmalloc areas lead to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from drgn import FaultError, Program
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
from .walk import ReadPhys


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
    keys = KeySet(abi, side.tree.leaves)
    owners = Owners.of_side(side, abi.page_shift)
    found: dict[int, list[U64]] = {}
    for caller, phys in _vm_structs(prog, abi, layout):
        mine = phys[keys.covered(phys)]
        mine = mine[owners.at(mine, mine + np.uint64(abi.page_size)) == UNKNOWN]
        if len(mine):
            found.setdefault(caller, []).append(mine)
    more = Following(abi, np.zeros((0, 2), np.uint64), lambda *_: None, list(side.owners))
    for caller, pages in found.items():
        owner = Owner(Kind.VM_STRUCT, f"vm_struct of {_symbol(prog, caller)}")
        more.claim(owner, np.unique(np.concatenate(pages)), abi.page_size)
    return replace(side, owners=more.owners, claims=[*side.claims, *more.claims()])


def _vm_structs(prog: Program, abi: Abi, layout: PageLayout) -> Iterator[tuple[int, U64]]:
    """Who allocated each vmalloc area with pages of its own, and their addresses."""
    for area in for_each_vmap_area(prog):
        try:
            vm = area.vm
            count = vm.nr_pages.value_() if vm else 0
            # One that says to have more pages than it maps was written over.
            if not 0 < count <= vm.size.value_() >> abi.page_shift:
                continue
            raw = prog.read(vm.pages.value_(), 8 * count)
            caller = vm.caller.value_()
        except FaultError:
            # The area went while it was looked at: it is nobody's any more.
            continue
        pfn = (np.frombuffer(raw, np.uint64) - np.uint64(layout.vmemmap)) // np.uint64(layout.size)
        yield caller, pfn << np.uint64(abi.page_shift)


def _symbol(prog: Program, address: int) -> str:
    """The function at an address; the module where debug info of modules is not loaded."""
    try:
        return prog.symbol(address).name
    except LookupError:
        module = address_to_module(prog, address)
        return f"{address:#x}" + (f" [{module.name.string_().decode()}]" if module else "")
