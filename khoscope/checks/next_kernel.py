# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about the kernel that is to be booted next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..abi import fdt as fdts
from ..abi.compatibles import OF_XARRAYS, base, block_limits, parts
from ..abi.keys import BlockLimits, Finalize, Restore, Tracker
from ..abi.kho_fdt import compatibles_of
from ..abi.serialized import LUO
from ..facts.clients import Luo
from ..facts.columns import Blocks
from ..facts.command_line import switched
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Snapshot
from ..facts.status import kho_parameter
from .blocks import too_large
from .rule import Marked, Message, Severity, rule

#: Bytes of a bitmap up to linux 6.17.8.
_OLD_BITMAP: Final = 512

#: What :func:`image_abi_differs` says about the pair of kernels at hand.
_NOTHING_IS_TAKEN = """
    kho_populate() in the next kernel compares the whole of the root FDT's compatible. With another
    one it says in its log that the FDT is incompatible, and boots as after a cold start: all
    preserved memory is reused, LUO's state as well. Kexec into a kernel that takes what this one
    hands over. It needs kho=on on its command line, which no image tells: --next loaded looks.
    """
_PANICS = """
    luo_early_startup() in the next kernel looks at LUO's state early in the boot, even without
    liveupdate=on, and the kernel panics if the state has not the form that it knows. Kexec into a
    kernel that takes this form, or into one without LUO. A kernel that was booted without
    liveupdate=on hands over no LUO state.
    """
_NO_LUO = """
    The next kernel reserves what the sessions preserve, and has nothing that could give it back:
    the memory is lost until a boot without a handover, and the files are gone. Kexec into a kernel
    with CONFIG_LIVEUPDATE and liveupdate=on.
    """
_NO_SESSION = """
    luo_session_deserialize() in the next kernel fails as soon as a file has no handler. Every open
    of /dev/liveupdate fails with EIO from then on: no session comes back, whatever is in it. Kexec
    into a kernel with this handler, or close these sessions before.
    """
_FILES_ARE_LOST = """
    luo_session_deserialize() in the next kernel ignores that a file has no handler. The session
    can be retrieved and looks whole, but this file and those behind it are not in it. Kexec into a
    kernel with this handler, or close these sessions before.
    """
_GARBAGE = """
    Both kernels call it kho-v1. Linux 6.16 to 6.17.8 keeps what is preserved in bitmaps of 512
    bytes, later kernels in bitmaps of a page. deserialize_bitmap() in the next kernel does not
    know: it takes what lies behind the shorter bitmap for a part of it, and reserves memory that
    nobody has preserved. Kexec into a kernel with bitmaps of the same size.
    """


@rule(
    "image-abi-differs",
    Severity.ERROR,
    "next",
    """
    A kernel that takes another KHO compatible, and any kernel without KHO, boots as if nothing had
    been handed over and reuses the memory. One that takes another LUO compatible, or misses a node
    in LUO's FDT, panics in luo_early_startup(). One without LUO keeps reserved what the sessions
    preserve, and nobody gets it back. If the handler of a file is missing, every open of
    /dev/liveupdate fails with EIO and no session comes back; kernels up to 7.0 lose files without
    a word. Kernels compare the whole of a compatible, also of one that names common structures,
    like kho-v4;radix-v1. Bitmaps of 512 bytes (Linux 6.16 to 6.17.8) and of a page are both called
    kho-v1, and a kernel takes the one for the other. Kexec into a kernel that takes what this one
    hands over. It needs kho=on on its command line, which no image tells: --next loaded looks.
    """,
    kernel="kho_populate deserialize_bitmap luo_early_startup luo_session_deserialize",
)
def image_abi_differs(facts: Snapshot, kernel: NextKernel) -> Iterator[Message]:
    """The next kernel takes another KHO, LUO or memfd ABI than this one hands over."""
    luo = facts.outgoing.luo
    nothing = _Effect("it boots as if nothing was handed over", _NOTHING_IS_TAKEN)
    yield from _compare(kernel, "KHO", kernel.kho, _compatible(facts), nothing, nothing)
    if _reads_bitmaps(facts, kernel) and kernel.has_page_bitmaps and not _page_bitmaps(facts):
        yield Message(
            f"{kernel.release} takes bitmaps of {facts.abi.page_size:,} bytes, this kernel hands "
            f"over bitmaps of {facts.abi.bitmap_bytes}: what it reserves is garbage",
            explain=_GARBAGE,
        )
        return
    if not _is_taken(facts, kernel):
        # The next kernel does not get far enough to look at anything else.
        return
    if not _hands_over_luo(facts):
        return
    compatible = luo.compatible if luo else None
    without = _Effect(
        "nobody retrieves what the sessions preserve, it stays reserved until the next boot",
        _NO_LUO,
    )
    yield from _compare(kernel, "LUO", kernel.luo, compatible, without, _PANIC)
    if luo is None or compatible not in kernel.luo:
        return
    yield from _nodes(facts, kernel)
    yield from _files(luo, kernel)


@rule(
    "next-without-kho",
    Severity.ERROR,
    "next",
    """
    Even without KHO the next kernel reserves all that it is handed (kho_populate()). LUO gives up
    then, and so does every client that asks kho_is_enabled(): nobody retrieves the memory, and it
    is lost with the boot after that. Only reserve_mem= finds its own again. That kernel hands over
    nothing itself. The last kho= of a command line counts. Load the image again, with kho=on:
    kexec -s -l IMAGE --reuse-cmdline takes this kernel's command line.
    """,
    kernel="kho_parse_enable kho_is_enabled kho_populate luo_early_startup",
)
def next_without_kho(facts: Snapshot, kernel: NextKernel) -> Iterator[Message]:
    """The command line of the image that is loaded switches KHO off (--next loaded)."""
    asked = kho_parameter(kernel.command_line or "")
    if asked is not None and not asked[1] and _is_taken(facts, kernel):
        yield Message(
            f"{kernel.release} has {asked[0]} on its command line: it reserves what it is handed, "
            "and its clients leave it there"
        )


@rule(
    "next-without-liveupdate",
    Severity.ERROR,
    "next",
    """
    LUO is off unless the command line says liveupdate=on. The next kernel reserves what the
    sessions preserve, but it has no /dev/liveupdate: nobody can retrieve them, and they are lost
    with the boot after that. Sessions may come late: systemd makes its own right before the kexec.
    Load the image again, with liveupdate=on, or boot this kernel without it if no session is to be
    handed over.
    """,
    kernel="early_liveupdate_param luo_early_startup liveupdate_ioctl_init",
)
def next_without_liveupdate(facts: Snapshot, kernel: NextKernel) -> Iterator[Message]:
    """This kernel hands over LUO's sessions, and LUO is off in the next one (--next loaded)."""
    if kernel.command_line is None or not kernel.luo or not _is_taken(facts, kernel):
        return
    asked = switched(kernel.command_line, "liveupdate")
    if not _hands_over_luo(facts) or (asked is not None and asked[1]):
        return
    has = f"{asked[0]} on its" if asked else "no liveupdate=on on its"
    luo = facts.outgoing.luo
    count = len(luo.sessions) + luo.left_out if luo else 0
    what = {0: "sessions", 1: "the session"}.get(count, f"{count:,} sessions")
    yield Message(f"{kernel.release} has {has} command line: nobody there can retrieve {what}")


def untold(facts: Snapshot, kernel: NextKernel) -> Iterator[str]:
    """What the next kernel's image does not tell."""
    yield from _default(facts, kernel)
    yield from _alike(facts, kernel)


def _default(facts: Snapshot, kernel: NextKernel) -> Iterator[str]:
    """Whether KHO is on if nobody says so (``CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT``)."""
    line, ours = kernel.command_line, facts.kernel.command_line
    if line is None or kho_parameter(line) is not None or not _is_taken(facts, kernel):
        return
    is_default = facts.kho_enable and ours and kho_parameter(ours) is None
    if not is_default or kernel.release != facts.kernel.release:
        yield (
            f"whether KHO is on in {kernel.release} cannot be told: no image tells its default, "
            "and its command line does not have kho=on; load it again with that"
        )


def _alike(facts: Snapshot, kernel: NextKernel) -> Iterator[str]:
    """What differs in kernels that are all called kho-v1."""
    if not _reads_bitmaps(facts, kernel):
        return
    if not kernel.has_page_bitmaps:
        yield (
            f"which bitmaps {kernel.release} reads cannot be told from its image: of "
            f"{facts.abi.bitmap_bytes:,} bytes, as this kernel hands over, or of "
            f"{_OLD_BITMAP if _page_bitmaps(facts) else facts.abi.page_size:,}"
        )
    # With LUO it is 6.19 or later. Without, it may be 6.18, which has those functions, or older.
    alike = facts.abi.restores_pages_as == Restore.SPLIT_FOLIO and kernel.newer_functions
    if not kernel.luo and not alike and kernel.release != facts.kernel.release:
        yield (
            f"how {kernel.release} restores pages cannot be told from its image: as this kernel "
            "does, or as linux 6.18, which leaves them compound"
        )


def _reads_bitmaps(facts: Snapshot, kernel: NextKernel) -> bool:
    """Whether bitmaps are handed over, and the next kernel may follow the chain that has them."""
    return facts.abi.tracker == Tracker.XARRAY and OF_XARRAYS in kernel.kho


def _page_bitmaps(facts: Snapshot) -> bool:
    return facts.abi.bitmap_bytes == facts.abi.page_size


@dataclass(frozen=True)
class _Effect:
    """
    What happens in the next kernel.

    :param words: the end of a message.
    """

    words: str
    explain: str


_PANIC = _Effect("the next kernel panics", _PANICS)


def _is_taken(facts: Snapshot, kernel: NextKernel) -> bool:
    """Whether the next kernel takes what is handed over, as far as its image tells."""
    return _compatible(facts) in kernel.kho


def _hands_over_luo(facts: Snapshot) -> bool:
    """Whether this kernel hands over LUO's state, of sessions or of none."""
    subtrees = facts.outgoing.fdt.subtrees
    return facts.outgoing.luo is not None or any(each.name == LUO for each in subtrees)


def _compatible(facts: Snapshot) -> str | None:
    """Of the root FDT that the next kernel will find; None: not readable."""
    fdt = facts.outgoing.fdt
    if not fdt.phys and facts.abi.finalize == Finalize.BEFORE_LOAD:
        # It is yet to be written, as not-finalized says, and what it will say is known.
        return OF_XARRAYS
    return fdt.compatible


def _nodes(facts: Snapshot, kernel: NextKernel) -> Iterator[Message]:
    """What the next kernel looks for in LUO's FDT; a later LUO has none."""
    blob = facts.outgoing.blobs.get(f"subtree {LUO}", b"")
    if not blob.startswith(fdts.MAGIC):
        return
    nodes = compatibles_of(blob)
    for name, theirs in (("luo-session", kernel.luo_session), ("luo-flb", kernel.luo_flb)):
        if theirs and name not in nodes:
            yield Message(
                f"{kernel.release} looks for {' or '.join(theirs)}, this kernel hands over no "
                f"{name}: {_PANIC.words}",
                explain=_PANIC.explain,
            )
        elif theirs:
            yield from _compare(kernel, name, theirs, nodes[name], _PANIC, _PANIC)


def _files(luo: Luo, kernel: NextKernel) -> Iterator[Message]:
    """Whether the next kernel has a handler for each file."""
    files = {file.handler for session in luo.sessions for file in session.files}
    effect = (
        _Effect("no session can be retrieved", _NO_SESSION)
        if kernel.misses_files
        else _Effect("sessions lose such files and those behind them, silently", _FILES_ARE_LOST)
    )
    for handler in sorted(each for each in files if each.startswith("memfd-v")):
        yield from _compare(kernel, "memfd handler", kernel.memfd, handler, effect, effect)


def _compare(
    kernel: NextKernel,
    what: str,
    theirs: tuple[str, ...],
    ours: str | None,
    without: _Effect,
    other: _Effect,
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
        yield Message(f"{kernel.release} has no {what}: {without.words}", explain=without.explain)
    elif ours not in theirs:
        yield Message(
            f"{kernel.release} takes {' or '.join(theirs)}, this kernel hands over {ours}: "
            f"{other.words}{_kinship(theirs, ours)}",
            explain=other.explain,
        )
    elif len(theirs) > 1:
        yield Message(
            f"{kernel.release} has {' and '.join(theirs)} in it: which it takes cannot be told"
        )


def _kinship(theirs: tuple[str, ...], ours: str) -> str:
    """What two compatibles have in common that differ only in the structures that they name."""
    for other in theirs:
        alone = set(parts(other)) ^ set(parts(ours))
        if base(other) != base(ours) or not alone:
            continue
        names = Counter(part.rpartition("-v")[0] for part in alone)
        if changed := sorted(name for name, count in names.items() if count > 1):
            return f" (both are {base(ours)}, with different versions of {' and '.join(changed)})"
        return (
            f" (both are {base(ours)}, only one of them names {' and '.join(sorted(alone))}: the "
            "layouts may be the same, but kernels compare the whole string)"
        )
    return ""


@rule(
    "block-too-large",
    Severity.ERROR,
    "next-blocks",
    """
    Up to linux 7.1, the boot computes the size of a block as an int. 2 GiB become a negative
    number: all memory from the block on is reserved, for nobody. More becomes a few bytes, and the
    rest of the block is given to others, with what is in it. Up to linux 7.0, kho_restore_page()
    also refuses blocks above MAX_PAGE_ORDER: it warns, its caller gets NULL, and the memory stays
    reserved. Preserve the memory in smaller pieces, each with a call of its own, or kexec into a
    kernel without these limits.
    """,
    kernel="kho_preserved_memory_reserve deserialize_bitmap kho_restore_page",
)
def block_too_large(kernel: NextKernel | None, facts: Snapshot, blocks: Blocks) -> Marked:
    """A block that the next kernel's boot or restore cannot take; without --next, the next kernel
    is assumed to be the same."""
    limits = _limits(kernel, facts)
    who = f"{facts.kernel.release} as the next kernel" if kernel is None else kernel.release

    def say(row: int) -> str:
        size = 1 << int(blocks.order[row]) + facts.abi.page_shift
        if limits.size is None or size < limits.size:
            return f"{who} restores no block above order {limits.order}"
        becomes = (
            "a negative number, and all memory from there on is reserved"
            if size == limits.size
            else "a few bytes, and the rest of it is given away"
        )
        return f"{who} computes sizes as int: {size >> 30} GiB become {becomes}"

    return Marked(too_large(facts, limits, blocks), say)


def _limits(kernel: NextKernel | None, facts: Snapshot) -> BlockLimits:
    """What the next kernel can be handed."""
    if kernel is None:
        return facts.abi.limits
    if not _is_taken(facts, kernel):
        # Then it is handed nothing, as image-abi-differs says.
        return BlockLimits()
    return block_limits(_compatible(facts), facts.abi.max_page_order)
