# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about one kernel as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..abi import COMPATIBLES_WITHOUT_TYPES, Abi
from ..snapshot import Side, Snapshot
from .rule import Message, Severity, rule

#: ``TAINT_BAD_PAGE`` (include/linux/panic.h), a bit of ``tainted_mask``.
TAINT_BAD_PAGE = 5


@rule(
    "type-not-stored",
    Severity.ERROR,
    "abi",
    """
    kho_radix_add_page() drops the key bits that the tree has no level for. Every block is walked
    as contig in the next kernel: split memory comes back with refcount 0 on all pages but the
    first, and freeing one of those pages hits VM_BUG_ON_PAGE or frees memory in use. Preserve no
    split memory with this kernel; use one that keeps the type inside the stored bits
    (kernel-patches/7.2/fix).
    """,
)
def type_not_stored(abi: Abi) -> Iterator[Message]:
    """The kernel puts a type bit where its tree cannot store it."""
    if abi.has_types and not abi.type_is_stored:
        yield Message(
            f"the page type is key bit {abi.type_shift}, the tree stores bits "
            f"{abi.stored_bits - 1}:0: no type survives"
        )


@rule(
    "abi-not-bumped",
    Severity.WARNING,
    "abi",
    """
    Kernels with and without page types accept each other's trees without a word. A kernel without
    types that is handed such a tree restores every block its own way; one with types takes all
    blocks of an old tree for contig. Kexec only into a kernel with the same patches.
    """,
)
def abi_not_bumped(abi: Abi) -> Iterator[Message]:
    """The kernel's key layout has a type but its compatible is one that kernels without types
    accept."""
    if abi.has_types and abi.compatible in COMPATIBLES_WITHOUT_TYPES:
        yield Message(f"this kernel records page types under compatible {abi.compatible!r}")


@rule(
    "bad-fdt",
    Severity.ERROR,
    "kernel",
    """
    kho_populate() in the next kernel reads this FDT first. If it is unreadable or has another
    compatible, that kernel boots as if nothing had been handed over and reuses all preserved
    memory; if a subtree is malformed, its owner does not find its state. Do not kexec; find who
    wrote over the page.
    """,
)
def bad_fdt(facts: Snapshot) -> Iterator[Message]:
    """Root FDT unreadable, wrong compatible, missing or malformed properties."""
    yield from _fdt_trouble("outgoing", facts.outgoing)
    if facts.incoming is not None:
        yield from _fdt_trouble("incoming", facts.incoming)


def _fdt_trouble(which: str, side: Side) -> Iterator[Message]:
    fdt = side.fdt
    for problem in fdt.problems:
        yield Message(f"{which} root FDT: {problem}", fdt.phys)
    if fdt.compatible is not None and not re.fullmatch(r"kho-v\d+", fdt.compatible):
        yield Message(f"{which} root FDT: compatible is {fdt.compatible!r}", fdt.phys)
    if fdt.memory_map is not None and fdt.memory_map != side.tree.state.root:
        yield Message(
            f"{which} root FDT: preserved-memory-map is {fdt.memory_map:#x}, "
            f"the tree's root is {side.tree.state.root:#x}",
            fdt.phys,
        )


@rule(
    "bad-node",
    Severity.ERROR,
    "kernel",
    """
    kho_radix_walk_tree() follows every entry without a check: the next kernel would read it as a
    node very early in its boot, reserve whatever its bits say, or crash. Somebody wrote over a
    page of the tree. Do not kexec with handover.
    """,
)
def bad_node(facts: Snapshot) -> Iterator[Message]:
    """A table entry that is unaligned, outside RAM, or reaches a node already visited."""
    state = facts.outgoing.tree.state
    for p in state.problems:
        yield Message(f"level {p.level} node, entry {p.index} = {p.entry:#x}: {p.why}", p.table)
    if state.problem_count > len(state.problems):
        yield Message(f"and {state.problem_count - len(state.problems)} more bad entries")


@rule(
    "kernel-tainted",
    Severity.WARNING,
    "kernel",
    """
    The kernel itself has complained about pages or about KHO. After a kexec this is what wrong
    refcounts end in: bad pages leak, and what was freed wrongly may be in use twice. Read the log
    (dmesg) around these lines.
    """,
)
def kernel_tainted(facts: Snapshot) -> Iterator[Message]:
    """Bad-page taint, or "Bad page state" / KHO warnings in the log."""
    if facts.kernel.tainted >> TAINT_BAD_PAGE & 1:
        yield Message(f"tainted: bad page (tainted_mask {facts.kernel.tainted:#x})")
    for line in facts.kernel.log:
        yield Message(f"log: {line}")
