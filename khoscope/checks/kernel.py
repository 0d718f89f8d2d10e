# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about one kernel as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..abi.compatibles import base
from ..abi.fdt import MAGIC, Unreadable, is_too_large, read
from ..abi.keys import COMPATIBLES_WITHOUT_TYPES, Abi, Finalize, Tracker
from ..abi.kho_fdt import Fdt, Subtree
from ..abi.serialized import LUO, SUBTREE_COMPATIBLES
from ..facts.snapshot import Side, Snapshot, in_ram
from ..facts.tree import Tree, TreeState
from .rule import Message, Severity, rule

NO_TREE = Tree(TreeState(0))

#: ``TAINT_BAD_PAGE`` (include/linux/panic.h), a bit of ``tainted_mask``.
TAINT_BAD_PAGE = 5


#: What :func:`type_not_stored` says about the kernel at hand.
_DROPPED = """
    The tree has no level for the key bit of the type, and kho_radix_add_page() drops it. The next
    kernel takes every block for contig and restores split memory with refcount 0 on all pages but
    the first. Freeing one of those pages hits VM_BUG_ON_PAGE or frees memory in use. Preserve no
    split memory with this kernel, or use one that keeps the type inside the stored bits.
    """
_REFUSED = """
    kho_radix_add_key() refuses a key with the bit of the type. Preserving split memory, including
    huge vmalloc areas, fails with -ERANGE, and kho_split_preserved_pages() leaves what it has split
    no longer preserved. Preserve no split memory with this kernel, or use one that keeps the type
    inside the stored bits.
    """


@rule(
    "type-not-stored",
    Severity.ERROR,
    "abi",
    """
    The tree has no level for the key bit of the type. A kernel that adds blocks with
    kho_radix_add_page() drops the bit, and split memory comes back contig. One that adds them with
    kho_radix_add_key() refuses to preserve split memory. Preserve no split memory with such a
    kernel, or use one that keeps the type inside the stored bits.
    """,
    kernel="kho_radix_add_page kho_radix_add_key kho_radix_walk_tree",
)
def type_not_stored(abi: Abi) -> Iterator[Message]:
    """The kernel puts a type bit where its tree cannot store it."""
    if abi.type_is_refused:
        yield Message(
            f"the page type is key bit {abi.type_shift}, the tree takes keys of {abi.key_width} "
            "bits: preserving split memory fails with -ERANGE",
            explain=_REFUSED,
        )
    elif abi.has_types and not abi.type_is_stored:
        yield Message(
            f"the page type is key bit {abi.type_shift}, the tree stores bits "
            f"{abi.stored_bits - 1}:0: no type survives",
            explain=_DROPPED,
        )


@rule(
    "order-not-stored",
    Severity.ERROR,
    "abi",
    """
    The tree has one level too few: kho_radix_add_page() drops the key bit that says order 0, and of
    the key of a single page only the page's number is left. The walk of the next kernel takes the
    highest bit of that number for the order. Instead of the page it reserves memory of another
    order at another address, where mostly no RAM is, and writes a stamp into a struct page that
    does not exist: expect a crash early in the boot. The page itself is not reserved, and is lost.
    Do not kexec with this handover. Use a kernel with d64b0372760e (linux 7.1), or one whose pages
    are not of 16 KiB.
    """,
    kernel="kho_radix_add_page kho_radix_walk_tree kho_radix_decode_key",
)
def order_not_stored(abi: Abi) -> Iterator[Message]:
    """The tree has no level for the key bit that says order 0."""
    if not abi.order_is_stored:
        yield Message(
            f"order 0 is key bit {abi.order_0_log2}, the tree stores bits "
            f"{abi.stored_bits - 1}:0: each single page is handed over as another block"
        )


@rule(
    "abi-not-bumped",
    Severity.WARNING,
    "abi",
    """
    Kernels with and without page types accept each other's trees silently. A kernel without types
    that is handed such a tree restores every block in its own way. A kernel with types that is
    handed an old tree takes all blocks for contig. Kexec only into a kernel with the same patches.
    """,
    kernel="kho_populate",
)
def abi_not_bumped(abi: Abi) -> Iterator[Message]:
    """The kernel's key layout has a type but its compatible is one that kernels without types
    accept."""
    if abi.has_types and base(abi.compatible or "") in COMPATIBLES_WITHOUT_TYPES:
        yield Message(f"this kernel records page types under compatible {abi.compatible!r}")


@rule(
    "bad-fdt",
    Severity.ERROR,
    "kernel",
    """
    kho_populate() in the next kernel reads this FDT first. If it is unreadable or has another
    compatible, that kernel boots as if nothing had been handed over, and reuses all preserved
    memory. If a subtree is malformed, its owner does not find its state. Do not kexec; find out who
    wrote over the page.
    """,
    kernel="kho_populate kho_mem_retrieve kho_retrieve_subtree",
)
def bad_fdt(facts: Snapshot) -> Iterator[Message]:
    """Root FDT unreadable, wrong compatible, missing or malformed properties."""
    # Where finalizing writes the FDT, there is none before that.
    if facts.finalized or facts.abi.finalize != Finalize.BEFORE_LOAD:
        yield from _fdt_trouble(facts, "outgoing", facts.outgoing)
        yield from _subtree_trouble(facts.outgoing)
    if facts.incoming is not None:
        yield from _fdt_trouble(facts, "incoming", facts.incoming)


def _fdt_trouble(facts: Snapshot, which: str, side: Side) -> Iterator[Message]:
    fdt = side.fdt
    for subtree in fdt.subtrees:
        if astray := misplaced(facts, fdt, subtree):
            yield Message(f"{which} root FDT: subtree {subtree.name!r}: {astray}", subtree.phys)
    for problem in fdt.problems:
        yield Message(f"{which} root FDT: {problem}", fdt.phys)
    if fdt.compatible is not None and not re.fullmatch(r"kho-v\d+", base(fdt.compatible)):
        yield Message(f"{which} root FDT: compatible is {fdt.compatible!r}", fdt.phys)
    tree, what = side.tree, "the tree's root"
    if facts.abi.tracker == Tracker.XARRAY:
        what = "the first chunk"
        if side is facts.outgoing:
            tree = side.serialized or NO_TREE
    if fdt.memory_map is not None and fdt.memory_map != tree.state.root:
        yield Message(
            f"{which} root FDT: preserved-memory-map is {fdt.memory_map:#x}, "
            f"{what} is {tree.state.root:#x}",
            fdt.phys,
        )


def _subtree_trouble(side: Side) -> Iterator[Message]:
    """Subtrees whose blobs should be FDTs, by their names or beginnings, but are not."""
    for subtree in side.fdt.subtrees:
        blob = side.blobs.get(f"subtree {subtree.name}")
        if blob is None or not _should_be_fdt(subtree.name, blob):
            continue
        if is_too_large(blob, subtree.size or 0):
            # The verdict says that it was not looked at.
            continue
        try:
            read(blob)
        except Unreadable as error:
            yield Message(f"subtree {subtree.name!r}: not a readable FDT ({error})", subtree.phys)


def _should_be_fdt(name: str, blob: bytes) -> bool:
    # LUO's blob is an FDT up to linux 7.1, and a struct since.
    return name in SUBTREE_COMPATIBLES or (name == LUO and blob.startswith(MAGIC))


def misplaced(facts: Snapshot, fdt: Fdt, subtree: Subtree) -> str | None:
    """Why a subtree's blob cannot be where it is said to be, in words."""
    start, size = subtree.phys, subtree.size
    if start is None or not size:
        return None
    where = f"its blob, {start:#x} and {size:,} bytes,"
    if fdt.phys and start < fdt.phys + facts.abi.page_size and start + size > fdt.phys:
        return f"{where} lies in the FDT itself"
    if not in_ram(facts.ram, start, size):
        return f"{where} is not all in RAM"
    return None


@rule(
    "fdt-nearly-full",
    Severity.WARNING,
    "kernel",
    """
    The root FDT has one page. Once it is full, kho_add_subtree() returns -ENOMEM: the client that
    comes last hands nothing over, and not every client says so. Find out who adds so many subtrees,
    or such long names.
    """,
    kernel="kho_add_subtree",
)
def fdt_nearly_full(facts: Snapshot) -> Iterator[Message]:
    """The one-page root FDT has less than 10 % left."""
    fdt, page = facts.outgoing.fdt, facts.abi.page_size
    # struct fdt_header: magic, totalsize, both big-endian. The kernel packs the FDT after each
    # change.
    header = facts.outgoing.blobs.get("fdt", b"")[:8]
    if fdt.problems or len(header) < 8:
        return
    used = int.from_bytes(header[4:], "big")
    if 10 * (page - used) < page:
        yield Message(
            f"{used:,} of its {page:,} bytes are used, by {len(fdt.subtrees)} subtrees", fdt.phys
        )


@rule(
    "image-without-kho",
    Severity.ERROR,
    "kexec",
    """
    The next kernel will not be told that anything was handed over. It boots as after a cold start,
    and reuses all preserved memory. kho_fill_kimage() gives the FDT only to images that
    kexec_file_load() loads while KHO is on. Load the image again, with kexec -s -l.
    """,
    kernel="kho_fill_kimage",
)
def image_without_kho(facts: Snapshot) -> Iterator[Message]:
    """A kexec image is loaded with kho.fdt = 0: the handover would be lost."""
    image = facts.image
    # Of an image that was loaded too early, not-finalized speaks.
    early = facts.abi.finalize == Finalize.BEFORE_LOAD and image is not None and image.file_mode
    if image is not None and image.loaded and not image.kho_fdt and facts.kho_enable and not early:
        how = "kexec_file_load(), before KHO was on" if image.file_mode else "kexec_load()"
        yield Message(f"the image was loaded with {how}: nothing will be handed over")


@rule(
    "no-image",
    Severity.INFO,
    "kexec",
    """
    kexec has nothing to boot. Load the next kernel with kexec_file_load() (kexec -s -l) and check
    again: whether the handover arrives depends on what is loaded.
    """,
    kernel="kernel_kexec",
)
def no_image(facts: Snapshot) -> Iterator[Message]:
    """Nothing is loaded yet."""
    if facts.image is not None and not facts.image.loaded:
        yield Message("no kexec image is loaded yet")


@rule(
    "crash-image-with-kho",
    Severity.ERROR,
    "kernel",
    """
    Memory is handed over by kexec alone, not by a crash. A crash kernel that is told of a handover
    puts itself into the scratch areas, which are memory of the kernel that crashed, and dies early,
    mostly without a word: there will be no dump. kho_fill_kimage() spares crash kernels since linux
    7.1. Load the crash kernel again with kexec_load() (kexec -c -p): then nothing is handed over.
    If this kernel hands over only what is finalized before an image is loaded (up to linux 6.18),
    loading the crash kernel before that helps, too. A crash kernel without KHO, or with another KHO
    compatible, does not die of it.
    """,
    kernel="kho_fill_kimage kho_populate kho_memory_init",
)
def crash_image_with_kho(facts: Snapshot) -> Iterator[Message]:
    """A crash kernel is loaded with kho.fdt other than 0: it dies, and writes no dump."""
    image = facts.crash_image
    if image is not None and image.kho_fdt:
        yield Message(f"the crash kernel is handed the FDT at {image.kho_fdt:#x}", image.kho_fdt)


@rule(
    "bad-node",
    Severity.ERROR,
    "kernel",
    """
    kho_radix_walk_tree(), and before the radix tree kho_mem_deserialize(), follows every entry
    without a check. The next kernel would read it as a node very early in its boot, and reserve
    whatever its bits say, or crash. Somebody wrote over a page of the tree. Do not kexec with this
    handover.
    """,
    kernel="kho_radix_walk_tree kho_mem_deserialize",
)
def bad_node(facts: Snapshot) -> Iterator[Message]:
    """A table entry that is unaligned, outside RAM, or reaches a node already visited."""
    for tree in (facts.outgoing.tree, facts.outgoing.serialized or NO_TREE):
        state = tree.state
        for p in state.problems:
            yield Message(f"level {p.level} node, entry {p.index} = {p.entry:#x}: {p.why}", p.table)
        if state.problem_count > len(state.problems):
            yield Message(f"and {state.problem_count - len(state.problems)} more bad entries")


@rule(
    "kernel-tainted",
    Severity.WARNING,
    "kernel",
    """
    The kernel itself has complained about pages, KHO or LUO. Wrong refcounts lead to this after a
    kexec: bad pages leak, and a page that was freed wrongly may be in use twice. Read the log
    (dmesg) around these lines.
    """,
    kernel="bad_page",
)
def kernel_tainted(facts: Snapshot) -> Iterator[Message]:
    """Bad-page taint, or "Bad page state" / KHO and LUO warnings in the log."""
    if facts.kernel.tainted >> TAINT_BAD_PAGE & 1:
        yield Message(f"tainted: bad page (tainted_mask {facts.kernel.tainted:#x})")
    for line in facts.kernel.log:
        yield Message(f"log: {line}")
