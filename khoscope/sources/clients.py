# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Find out who owns the preserved memory of one kernel: follow everything that the root FDT, LUO and
the kernel's own vmalloc areas lead to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from drgn import FaultError, Object, Program
from drgn.helpers.linux.mm import for_each_vmap_area

from ..abi.keys import U64, Abi
from ..abi.serialized import LUO, unpack
from ..facts.clients import Luo, Owner, OwnerKind
from ..facts.owners import UNKNOWN, Owners
from ..facts.snapshot import Side
from ..facts.tree import KeySet
from .follow import ClientWalker
from .luo import From, Handed, read_incoming, read_outgoing, unknown
from .pages import PageLayout
from .probe import Parts, module_at, record_layout
from .walk import READS, ReadPhys


@dataclass(frozen=True)
class Where:
    """
    A kernel that is being read.

    :param ram: u64, shape (n, 2).
    :param moves: the kernel runs meanwhile: what cannot be read now may be readable at the next
        look.
    """

    prog: Program
    parts: Parts
    abi: Abi
    ram: U64
    read: ReadPhys
    moves: bool


def with_clients(at: Where, side: Side, outgoing: Side | None) -> tuple[Side, list[str]]:
    """
    The same side with what its clients' structures say, and which structures could not be read.

    :param outgoing: for an incoming side, the outgoing one with its clients; None: ``side`` is the
        outgoing one.  What LUO keeps in the kernel differs by direction.
    """
    following = ClientWalker(at.abi, at.ram, at.read, keys=KeySet(at.abi, side.tree.leaves))
    following.subtrees(side.fdt, side.blobs)
    luo: Luo | None = None
    unread: list[str] = []
    phys = next((subtree.phys for subtree in side.fdt.subtrees if subtree.name == LUO), None)
    if phys is not None:
        blob = side.blobs.get(f"subtree {LUO}")
        luo, unread = _luo(at, following, Handed(phys, blob), outgoing)
    found = replace(
        side,
        luo=luo,
        vmallocs=following.vmallocs,
        owners=following.owners,
        claims=following.claims(),
    )
    return found, unread


def _luo(
    at: Where, following: ClientWalker, handed: Handed, outgoing: Side | None
) -> tuple[Luo, list[str]]:
    kept = at.parts.sessions
    if kept is None:
        return unknown(following, handed), []
    kernel = From(at.prog, kept, at.moves)
    if outgoing is None:
        return read_outgoing(kernel, following, handed)
    # A kernel accepts the same ABI that it writes.
    its = outgoing.luo
    if its is not None and its.raw is not None:
        return unknown(following, handed), []
    return read_incoming(kernel, following, handed)


def with_vm_structs(at: Where, layout: PageLayout, side: Side) -> tuple[Side, list[str]]:
    """
    The same side with owners for preserved pages that vmalloc maps, named by who allocated the
    area; and what could not be read.

    If a client preserves such an area page by page, this is the only trace of it.
    """
    if not at.parts.vmalloc:
        return side, ["the areas of vmalloc: the debug info lacks their types"]
    found = _vm_structs(at, layout)
    for _ in range(READS - 1 if at.moves else 0):
        if not found.unread:
            break
        found = _vm_structs(at, layout)
    abi, caller, phys = at.abi, found.caller, found.phys
    mine = KeySet(abi, side.tree.leaves).covered(phys)
    caller, phys = caller[mine], phys[mine]
    owners = Owners.of_side(side, abi.page_shift)
    mine = owners.at(phys, phys + np.uint64(abi.page_size)) == UNKNOWN
    caller, phys = caller[mine], phys[mine]
    more = ClientWalker(abi, np.zeros((0, 2), np.uint64), lambda *_: None, list(side.owners))
    callers, number = np.unique(caller, return_inverse=True)

    def owner(each: int) -> Owner:
        name = f"vm_struct of {_symbol(at.prog, int(callers[each]))}"
        return Owner(OwnerKind.VM_STRUCT, name)

    # By caller, then by address, each page once.
    by = np.lexsort((phys, number))
    number, phys = number[by], phys[by]
    again = np.zeros(len(phys), np.bool_)
    again[1:] = (number[1:] == number[:-1]) & (phys[1:] == phys[:-1])
    number, phys = number[~again], phys[~again]
    more.claim_each(owner, number, phys, np.full(len(phys), abi.page_size, np.uint64))
    side = replace(side, owners=more.owners, claims=[*side.claims, *more.claims()])
    return side, found.unread


@dataclass(frozen=True)
class _VmStructs:
    """
    Each page of all vmalloc areas that have pages of their own.

    :param caller: u64, who allocated it.
    :param phys: u64, its address.
    :param unread: what could not be read.
    """

    caller: U64
    phys: U64
    unread: list[str]


def _vm_structs(at: Where, layout: PageLayout) -> _VmStructs:
    pages: list[bytes] = []
    callers: list[int] = []
    counts: list[int] = []
    most = int((at.ram[:, 1] - at.ram[:, 0]).sum()) >> at.abi.page_shift
    areas, whole = _vmap_areas(at)
    layout_of = record_layout(
        *(at.prog, "struct vm_struct"),
        **{name: name for name in ("caller", "nr_pages", "size", "pages")},
    )
    unread = 0
    for area in areas:
        try:
            where = area.vm.value_()
            if not where:
                continue
            vm = unpack(layout_of, at.prog.read(where, layout_of.itemsize))
            count = int(vm["nr_pages"])
            # If an area says it has more pages than it maps, somebody wrote over it.
            if not 0 < count <= min(int(vm["size"]) >> at.abi.page_shift, most):
                continue
            pages.append(at.prog.read(int(vm["pages"]), 8 * count))
        except FaultError:
            # The area went away meanwhile, or a vmcore lacks it.
            unread += 1
            continue
        callers.append(int(vm["caller"]))
        counts.append(count)
    page = np.frombuffer(b"".join(pages), np.uint64)
    pfn = (page - np.uint64(layout.vmemmap)) // np.uint64(layout.size)
    caller = np.repeat(np.array(callers, np.uint64), counts)
    missing = [] if whole else ["the list of vmalloc areas (struct vmap_area), whole"]
    if unread:
        missing.append(f"{unread:,} vmalloc areas (struct vm_struct)")
    return _VmStructs(caller, pfn << np.uint64(at.abi.page_shift), missing)


def _vmap_areas(at: Where) -> tuple[list[Object], bool]:
    """
    Every ``struct vmap_area``, once, and whether these are all.

    They hang on lists that move: an area that was taken off during the walk leads to itself for
    ever.  Then khoscope walks again, READS times, and keeps what it saw last.
    """
    found: dict[int, Object] = {}
    for _ in range(READS if at.moves else 1):
        found = {}
        try:
            for area in for_each_vmap_area(at.prog):
                if area.value_() in found:
                    break
                found[area.value_()] = area
            else:
                return list(found.values()), True
        except FaultError:
            continue
    return list(found.values()), False


def _symbol(prog: Program, address: int) -> str:
    """The function at an address; the address and its module if the symbol is not known."""
    try:
        return prog.symbol(address).name
    except LookupError:
        return f"{address:#x}" + module_at(prog, address)
