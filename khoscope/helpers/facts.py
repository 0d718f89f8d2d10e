# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about a program's kernel, as khoscope's own commands read them."""

from __future__ import annotations

from collections.abc import Iterator

from drgn import Object, Program
from drgn.helpers.common.prog import takes_program_or_default

from ..abi.keys import BAD_ORDER, NO_TYPE
from ..facts.snapshot import Snapshot
from ..sources.kernel import KernelSource
from ..sources.open import how_it_is_read
from .kexec_handover import KhoBlock

__all__ = ("kho_for_each_stamped", "kho_snapshot")


@takes_program_or_default
def kho_for_each_stamped(prog: Program) -> Iterator[KhoBlock]:
    """
    Iterate over all blocks that were handed over and that nobody has restored yet.

    This searches every ``struct page`` of the kernel for ``KHO_PAGE_MAGIC``, and reads about 16 MiB
    for each GiB of RAM.
    """
    for chunk in _source(prog).stamps():
        good = chunk[chunk.order != BAD_ORDER]
        columns = good.phys.tolist(), good.order.tolist(), good.type.tolist()
        for phys, order, kind in zip(*columns, strict=True):
            known = kind != NO_TYPE
            yield KhoBlock(phys, order, Object(prog, "enum kho_page_type", kind) if known else None)


@takes_program_or_default
def kho_snapshot(prog: Program) -> Snapshot:
    """
    Read all facts, for :func:`khoscope.checks.check` and the like.

    >>> from khoscope.checks import check
    >>> check(kho_snapshot(prog)).passed
    True
    """
    return _source(prog).snapshot()


def _source(prog: Program) -> KernelSource:
    return KernelSource(prog, *how_it_is_read(prog))
