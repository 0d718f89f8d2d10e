# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about the kernel that is to be booted next."""

from __future__ import annotations

from collections.abc import Iterator

from ..abi.serialized import LUO
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Snapshot
from .rule import Message, Severity, rule


@rule(
    "image-abi-differs",
    Severity.ERROR,
    "next",
    """
    A kernel that takes another KHO compatible, and any kernel without KHO, boots as if nothing had
    been handed over and reuses the memory. One that takes another LUO compatible panics in
    luo_early_startup(). One without LUO keeps reserved what the sessions preserve, and nobody gets
    it back. If the handler of a file is missing, every open of /dev/liveupdate fails with EIO and
    no session comes back. Kexec into a kernel that takes what this one hands over. It needs kho=on
    on its command line, which no image tells.
    """,
    kernel="kho_populate luo_early_startup",
)
def image_abi_differs(facts: Snapshot, kernel: NextKernel) -> Iterator[Message]:
    """The next kernel takes another KHO, LUO or memfd ABI than this one hands over."""
    fdt, luo = facts.outgoing.fdt, facts.outgoing.luo
    effect = "it boots as if nothing was handed over"
    yield from _compare(kernel, "KHO", kernel.kho, fdt.compatible, effect, effect)
    if fdt.compatible not in kernel.kho:
        # The next kernel does not get far enough to look at anything else.
        return
    if luo is None and not any(subtree.name == LUO for subtree in fdt.subtrees):
        return
    compatible = luo.compatible if luo else None
    yield from _compare(
        kernel,
        "LUO",
        kernel.luo,
        compatible,
        "nobody retrieves what the sessions preserve, it stays reserved until the next boot",
        "the next kernel panics",
    )
    if luo is None or compatible not in kernel.luo:
        return
    files = {file.handler for session in luo.sessions for file in session.files}
    effect = "no session can be retrieved"
    for handler in sorted(each for each in files if each.startswith("memfd-v")):
        yield from _compare(kernel, "memfd handler", kernel.memfd, handler, effect, effect)


def _compare(
    kernel: NextKernel,
    what: str,
    theirs: tuple[str, ...],
    ours: str | None,
    without: str,
    other: str,
) -> Iterator[Message]:
    """
    Whether a kernel takes what this one hands over.

    :param theirs: every compatible that the next kernel may take.
    :param ours: that of this kernel; None: not readable.
    :param without: what happens if it takes none.
    :param other: what happens if it takes another.
    """
    if ours is None:
        yield Message(f"the {what} compatible of this kernel cannot be read, to compare it")
    elif not theirs:
        yield Message(f"{kernel.release} has no {what}: {without}")
    elif ours not in theirs:
        yield Message(
            f"{kernel.release} takes {' or '.join(theirs)}, this kernel hands over {ours}: {other}"
        )
    elif len(theirs) > 1:
        yield Message(
            f"{kernel.release} has {' and '.join(theirs)} in it: which it takes cannot be told"
        )
