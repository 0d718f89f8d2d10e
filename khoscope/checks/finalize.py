# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Rules about kernels in which nothing is handed over before it is finalized (linux 6.16 to 7.0): what
a kexec takes along then is not the tracker, but what was serialized of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..abi.keys import Finalize
from ..facts.columns import Blocks
from ..facts.snapshot import Snapshot
from ..facts.tree import KeySet
from .rule import Marked, Message, Severity, rule

#: The file that finalizes (``fops_kho_out_finalize``).
FINALIZE = "/sys/kernel/debug/kho/out/finalize"

_THEN_LOAD = f"""
    kho_finalize() writes the root FDT and serializes what is preserved, and kho_fill_kimage() gives
    the FDT only to an image that is loaded after that. Until then a kexec hands nothing over,
    without a word in the log, and the next kernel reuses all preserved memory. Finalize (echo 1 >
    {FINALIZE}), and load the image afterwards (kexec -s -l). Nothing can be preserved in between.
    """
_LOAD_AGAIN = f"""
    kho_fill_kimage() gives the root FDT only to an image that is loaded after KHO was finalized.
    This one hands nothing over, without a word in the log. Load it again (kexec -s -l). KHO is
    finalized as it should be: do not write 0 to {FINALIZE}, which drops all that is preserved.
    """
_UNDONE = f"""
    KHO was finalized, the image was loaded, and then finalizing was undone (kho_abort()), which
    drops all that was preserved and frees the chain that the image's FDT leads to: the next kernel
    reserves whatever is there by then. Have the clients preserve again, finalize (echo 1 >
    {FINALIZE}), and load the image again (kexec -s -l); or load it with kexec_load() (kexec -c -l)
    to hand nothing over.
    """
_BEFORE_KEXEC = f"""
    The next kernel finds preserved memory through the chain that kho_finalize() makes. There is
    none yet, so the next kernel refuses the handover and reuses all preserved memory. LUO would
    finalize on the way into the kexec, but it is off. Finalize before the kexec (echo 1 >
    {FINALIZE}).
    """
_AGAIN = f"""
    kho_finalize() may be called again, and replaces what was serialized. LUO would do it on the way
    into the kexec, but it is off. Finalize again right before the kexec (echo 1 > {FINALIZE}).
    """
_NOT_AGAIN = f"""
    This kernel finalizes once. Nothing can be preserved after that (EBUSY), and finalizing again
    fails (EEXIST). Aborting (echo 0 > {FINALIZE}) frees the tracker with all that is in it: what
    clients preserve anew in their notifiers comes back with the next finalizing, everything else is
    forgotten for good. Do not kexec if these blocks matter: in this kernel, nothing corrects what
    it hands over.
    """


@rule(
    "not-finalized",
    Severity.ERROR,
    "kexec",
    f"""
    Such a kernel hands over what kho_finalize() has serialized, not what is preserved. A kexec
    without it hands nothing over, and the next kernel reuses all preserved memory. Finalize (echo 1
    > {FINALIZE}), on Linux 6.16 to 6.18 before the image is loaded.
    """,
    kernel="kho_finalize kho_mem_serialize kho_fill_kimage",
)
def not_finalized(facts: Snapshot) -> Iterator[Message]:
    """A kernel that needs finalizing has blocks preserved and is not finalized, or its image was
    loaded before that, or before it was undone."""
    step, image = facts.abi.finalize, facts.image
    if step == Finalize.NEVER or facts.finalized is None:
        return
    # By kexec_load(), images hand nothing over, as image-without-kho says.
    loaded = image if step == Finalize.BEFORE_LOAD and image and image.file_mode else None
    if facts.finalized:
        if loaded and not loaded.kho_fdt:
            yield Message(
                "the kexec image was loaded before KHO was finalized: load it again",
                explain=_LOAD_AGAIN,
            )
        return
    count = _preserved(facts)
    if count and not facts.finalizes_itself:
        explain = _THEN_LOAD if step == Finalize.BEFORE_LOAD else _BEFORE_KEXEC
        blocks = "1 block is" if count == 1 else f"{count:,} blocks are"
        yield Message(f"{blocks} preserved, and KHO is not finalized", explain=explain)
    if loaded and loaded.kho_fdt:
        yield Message(
            "the kexec image is of a handover that is no more: finalizing was undone",
            explain=_UNDONE,
        )
    elif loaded and not count:
        yield Message(
            "the kexec image was loaded, and KHO is not finalized: nothing will be handed over",
            explain=_THEN_LOAD,
        )


def unsettled(facts: Snapshot) -> Iterator[str]:
    """Why it cannot be said yet what a kexec would hand over."""
    if facts.abi.finalize == Finalize.NEVER or not facts.kho_enable:
        return
    if facts.finalized is None:
        yield "whether KHO is finalized is not known"
    elif facts.abi.finalize == Finalize.BEFORE_LOAD and not facts.finalized:
        # register_kho_notifier(); reserve_mem= is one of them.
        yield (
            "KHO is not finalized, and its clients preserve memory when it is: finalize it (echo 1 "
            f">{FINALIZE}), look again, and load the image"
        )


def _preserved(facts: Snapshot) -> int:
    """Blocks that are preserved, but for the page of the root FDT."""
    side = facts.outgoing
    count = sum(int(group.counts().sum()) for group in side.tree.leaves)
    if count and side.fdt.phys:
        own = facts.abi.kho_radix_encode_key(side.fdt.phys, 0)
        count -= own in KeySet(facts.abi, side.tree.leaves)
    return count


@rule(
    "serialized-differs",
    Severity.ERROR,
    "tree",
    f"""
    The next kernel is handed what kho_mem_serialize() has listed, not what is preserved now. It
    does not hear of a block that was preserved after that, and reuses its memory. It reserves a
    block that is listed and no more preserved, and nobody restores it. On Linux 6.19 and 7.0,
    finalize again right before the kexec (echo 1 > {FINALIZE}); with LUO on, the kernel does it by
    itself. On Linux 6.16 to 6.18 that fails with EEXIST, and aborting (echo 0) forgets all that is
    preserved.
    """,
    kernel="kho_mem_serialize kho_mem_deserialize",
)
def serialized_differs(facts: Snapshot, keys: KeySet) -> Iterator[tuple[Blocks, Marked]]:
    """The serialized chain and the tracker disagree, and the kernel will not serialize anew."""
    chain = facts.outgoing.serialized
    # What was serialized does not matter if it will be replaced.
    if chain is None or facts.finalizes_itself:
        return
    listed = KeySet(facts.abi, chain.leaves)
    explain = _NOT_AGAIN if facts.abi.finalize == Finalize.BEFORE_LOAD else _AGAIN
    for blocks, what in (
        (keys.minus(listed), "not among what was serialized: not handed over"),
        (listed.minus(keys), "not preserved any more, but serialized: handed over"),
    ):
        yield from _differ(blocks, what, explain)


def _differ(blocks: Iterator[Blocks], what: str, explain: str) -> Iterator[tuple[Blocks, Marked]]:
    for chunk in blocks:
        yield chunk, Marked(np.ones(len(chunk), np.bool_), lambda _: what, explain=explain)
