# SPDX-License-Identifier: LGPL-2.1-or-later
"""
KHO helpers for drgn sessions and scripts.

Every function takes the program as drgn's own helpers do (explicitly, or the default program) or
an object that belongs to one.  ``khoscope shell`` has them loaded; elsewhere ``import khoscope``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from drgn import Object, Program
from drgn.helpers.common.prog import takes_program_or_default
from drgn.helpers.linux.mm import phys_to_page

from .abi import BAD_ORDER, KHO_PAGE_MAGIC, TYPE_NAMES
from .columns import Blocks
from .snapshot import Snapshot
from .sources.kernel import KernelSource, probe_stamp
from .sources.walk import walk

__all__ = (
    "is_kho_boot",
    "kho_for_each_preserved",
    "kho_for_each_stamped",
    "kho_is_enabled",
    "kho_page_info",
    "kho_radix_walk_tree",
    "kho_scratch_for_each",
    "kho_snapshot",
)


class PreservedBlock(NamedTuple):
    """A block of pages that KHO preserves, or has stamped."""

    page: Object
    """The first page: ``struct page *``"""
    phys: int
    """Its address: ``phys_addr_t``"""
    order: int
    """log2 of the pages in the block"""
    type: str | None
    """``"contig"``, ``"split"``, or ``None`` where the kernel records no types"""


class KhoPageInfo(NamedTuple):
    """A decoded ``union kho_page_info``."""

    order: int
    type: str | None


def use(source: KernelSource) -> None:
    """Let the helpers read a program through this source."""
    source.prog.cache["khoscope_source"] = source


def _source(prog: Program) -> KernelSource:
    if "khoscope_source" not in prog.cache:
        use(KernelSource(prog, "drgn session", True))
    found: KernelSource = prog.cache["khoscope_source"]
    return found


@takes_program_or_default
def kho_is_enabled(prog: Program) -> bool:
    """
    Return whether KHO is on, as the kernel function of this name does.

    >>> kho_is_enabled(prog)
    True
    """
    return bool(prog["kho_enable"])


@takes_program_or_default
def is_kho_boot(prog: Program) -> bool:
    """
    Return whether this kernel was booted by a kexec with KHO, as the kernel function of this name
    does.
    """
    return bool(prog["kho_in"].fdt_phys)


@takes_program_or_default
def kho_for_each_preserved(prog: Program) -> Iterator[PreservedBlock]:
    """
    Iterate over all blocks that the running kernel would hand over (``kho_out.radix_tree``).

    The tree is read without its lock, until two reads agree, a few times at most.  Keys that no
    kernel would make are left out; ``khoscope verify`` shows them.

    >>> block = next(kho_for_each_preserved(prog))
    >>> block.page
    *(struct page *)0xffffea0000b5a500 = {
            ...
    >>> hex(block.phys), block.order, block.type
    ('0x2d694000', 4, 'contig')
    """
    source = _source(prog)
    for chunk in source.tree().outgoing.tree.blocks(source.abi):
        yield from _each(prog, chunk)


def kho_radix_walk_tree(tree: Object) -> Iterator[PreservedBlock]:
    """
    Iterate over the blocks of any KHO radix tree, as the kernel function of this name does, but
    without its lock, and past entries that lead nowhere.

    :param tree: ``struct kho_radix_tree *`` (or the struct itself)
    """
    prog = tree.prog_
    source = _source(prog)
    found = walk(source.abi, source.phys(tree.root), source.ram, source.read_phys)
    for chunk in found.blocks(source.abi):
        yield from _each(prog, chunk)


@takes_program_or_default
def kho_for_each_stamped(prog: Program) -> Iterator[PreservedBlock]:
    """
    Iterate over all blocks that were handed over and that nobody has restored yet.

    All of the kernel's ``struct page`` are searched for ``KHO_PAGE_MAGIC``: about 16 MiB are read
    for each GiB of RAM.
    """
    for chunk in _source(prog).stamps():
        yield from _each(prog, chunk)


def kho_page_info(page: Object) -> KhoPageInfo | None:
    """
    Decode the stamp in ``page->private``.

    :param page: ``struct page *``
    :return: ``None`` if the page carries none, which is what a restored page looks like.
    """
    stamp = probe_stamp(page.prog_)
    private = page.private.value_()
    if private >> stamp.magic_shift != KHO_PAGE_MAGIC:
        return None
    kind = None if stamp.type_shift is None else TYPE_NAMES[private >> stamp.type_shift & 1]
    return KhoPageInfo(private & (1 << stamp.order_bits) - 1, kind)


@takes_program_or_default
def kho_scratch_for_each(prog: Program) -> Iterator[Object]:
    """
    Iterate over the scratch areas.

    :return: Iterator of ``struct kho_scratch`` objects.
    """
    for i in range(len(_source(prog).scratch())):
        yield prog["kho_scratch"][i]


@takes_program_or_default
def kho_snapshot(prog: Program) -> Snapshot:
    """
    Read all facts, for :func:`khoscope.checks.check` and the like.

    >>> from khoscope.checks import check
    >>> check(kho_snapshot(prog)).passed
    True
    """
    return _source(prog).snapshot()


def _each(prog: Program, blocks: Blocks) -> Iterator[PreservedBlock]:
    good = blocks[blocks.order != BAD_ORDER]
    for phys, order, kind in zip(
        good.phys.tolist(), good.order.tolist(), good.type.tolist(), strict=True
    ):
        yield PreservedBlock(phys_to_page(prog, phys), phys, order, TYPE_NAMES[kind])
