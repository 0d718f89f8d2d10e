# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each rule on facts on which it fires, and on facts that are nearly the same on which not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.fdt import MAGIC
from khoscope.abi.keys import (
    KHO_PAGE_CONTIG,
    KHO_PAGE_SPLIT,
    Abi,
    BlockLimits,
    Finalize,
    Restore,
    Stamp,
)
from khoscope.abi.kho_fdt import Fdt, Subtree
from khoscope.checks import (
    RULES,
    Report,
    RuleSelection,
    Severity,
    Verdict,
    check,
    compare,
    handover,
    run,
)
from khoscope.checks.clients import NEEDED
from khoscope.checks.rule import SCOPES, TRACE, of_scopes
from khoscope.facts import columns
from khoscope.facts.clients import (
    FLB_LIST,
    Claims,
    Holders,
    Luo,
    LuoFile,
    LuoSession,
    LuoState,
    Memfd,
    Owner,
    OwnerKind,
    Vmalloc,
)
from khoscope.facts.columns import Pages
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.services import Services
from khoscope.facts.snapshot import (
    Handover,
    KexecImage,
    Memory,
    Node,
    PageUse,
    Scan,
    ScratchUse,
    Snapshot,
    Zone,
)
from khoscope.facts.tree import NodeProblem, Tree, TreeState
from khoscope.words.errors import KhoscopeError
from tests.synthetic import (
    FIXED,
    PAGE_FLAGS,
    PLAIN,
    POSTED,
    REFUSED,
    Block,
    claims_of,
    snapshot,
)
from tests.test_gate import AGENT, KEEPER, VM, ready
from tests.test_services import store, stored
from tests.track_memory import SMALL, XARRAY

CONTIG, SPLIT = KHO_PAGE_CONTIG, KHO_PAGE_SPLIT
AT = 0x40000
#: Pages of 16 KiB in a tree that lacks a level, as in the first kernels that had trees.
EARLY = replace(Abi.for_page_shift(14, compatible="kho-v2"), tree_max_depth=4)
NEXT_BOOT = "00000000-0000-0000-0000-000000000002"
HANDED_OVER = Handover(True, "7.2.0-test", 1)
LRU = 1 << PAGE_FLAGS.index("lru")
SLAB = 0xF5000000


def split(order: int, kind: int = SPLIT, phys: int = AT, **more: int) -> Block:
    return Block.split(phys, order, type=kind, **more)


def contig(order: int, kind: int = CONTIG, phys: int = AT, **more: int) -> Block:
    return Block(phys, order, kind, **more)


def folio(order: int, phys: int = AT, **more: int) -> Block:
    return replace(contig(order, phys=phys, compound=order), **more)


def one(abi: Abi, *blocks: Block, **facts: object) -> Report:
    """The report about one kernel."""
    return check(snapshot(abi, blocks, **facts))  # type: ignore[arg-type]


def across(
    before: Iterable[Block],
    after: Iterable[Block],
    *,
    abi: Abi = FIXED,
    boot_id: str = NEXT_BOOT,
    handover: Handover = HANDED_OVER,
    stamps: Iterable[Block] = (),
    evidence: Iterable[Block] | None = None,
    offline: Iterable[tuple[int, int]] = (),
) -> Report:
    """The report across a kexec: what was recorded, and the same pages now."""
    was = snapshot(abi, before)
    now = snapshot(
        abi,
        [],
        boot_id=boot_id,
        handover=handover,
        stamps=stamps,
        watched=(was, after),
        evidence=before if evidence is None else evidence,
        offline=offline,
    )
    return compare(was, now)


def stamped(block: Block, order: int | None = None, page_type: int | None = None) -> Block:
    """The block as a new kernel has it before anybody restores it."""
    order = block.order if order is None else order
    page_type = block.type if page_type is None else page_type
    private = FIXED.stamp.encode(order, page_type)
    return replace(block, head=0, ones=0, others=0, private=private)


def fdt(**changes: object) -> Fdt:
    return replace(Fdt(0x2000, "kho-v5", 0x1000), **changes)  # type: ignore[arg-type]


# What clients hand over


def out(*blocks: Block, abi: Abi = FIXED, fdt: Fdt | None = None, **side: object) -> Snapshot:
    """A snapshot with more than blocks in its outgoing side."""
    facts = snapshot(abi, blocks, fdt=fdt)
    return replace(facts, outgoing=replace(facts.outgoing, **side))  # type: ignore[arg-type]


def subtrees(*found: Subtree) -> Fdt:
    return fdt(subtrees=list(found))


def with_blob(name: str, blob: bytes) -> Snapshot:
    root = subtrees(Subtree(name, AT, len(blob)))
    return out(contig(2), fdt=root, blobs={f"subtree {name}": blob})


def claimed(
    owner: Owner, phys: int, size: int, *blocks: Block, more: int = 0, abi: Abi = FIXED
) -> Report:
    """The report on what somebody else, and then an owner, has claimed."""
    owners = [Owner(OwnerKind.VM_STRUCT, "vm_struct of nobody"), owner]
    rows = [(1 << 30, 1 << 20, 0), (phys, size, 1), *((phys + size, more, 1),) * bool(more)]
    columns = zip(*rows, strict=True)
    claims = [
        Claims(*(np.array(c, t) for c, t in zip(columns, Claims.DTYPES.values(), strict=True)))
    ]
    return check(out(*blocks, abi=abi, owners=owners, claims=claims))


def claims(*memory: tuple[Owner, int, int], fdt: Fdt | None = None) -> Report:
    """The report on what owners claim: address and bytes."""
    owners, claimed = claims_of(*memory)
    return check(out(fdt=fdt, owners=owners, claims=claimed))


def owner(kind: OwnerKind, name: str = "session 'vm1', token 0x1") -> Owner:
    return Owner(kind, name)


def vmalloc(*problems: str) -> Vmalloc:
    return Vmalloc("memfd", AT, 0x5000, 4, 1, 0, 1, 4, list(problems))


def luo(*sessions: LuoSession, **more: object) -> Luo:
    known: dict[str, object] = {"liveupdate_num": 2, "live": True, "sessions": list(sessions)}
    return Luo(0x6000, "luo-v5", **{**known, **more})  # type: ignore[arg-type]


def luo_v1(*sessions: LuoSession, **more: object) -> Luo:
    return replace(luo(*sessions, **more), compatible="luo-v1")


def came(luo: Luo | None, *said: str, on: bool = True, name: str = "vm1") -> Snapshot:
    """A kernel that was handed this, and has said that of a session."""
    facts = snapshot(
        FIXED,
        [],
        boot_id=NEXT_BOOT,
        handover=HANDED_OVER,
        incoming=[],
        log=[f"luo: {what} session [{name}] on release" for what in said],
    )
    assert facts.incoming is not None
    incoming = replace(facts.incoming, luo=luo)
    return replace(facts, incoming=incoming, liveupdate=LuoState(on))


def session(name: str = "vm1", files: int = 2, **more: object) -> LuoSession:
    listed = [LuoFile("memfd-v2", token, 0x7000) for token in range(files)]
    known: dict[str, object] = {"retrieved": False, "count": files, "files": listed}
    return LuoSession(name, **{**known, **more})  # type: ignore[arg-type]


def broken_memfd() -> LuoSession:
    memfd = Memfd(0x7000, 0, 1, 0, 0, 1, None, 0, ["shorter than its folios"])
    return replace(session(), files=[LuoFile("memfd-v2", 1, 0x7000, memfd=memfd)])


def broken_file() -> LuoSession:
    return replace(
        session(), files=[LuoFile("memfd-v2", 1, 0, problems=["its data is no address"])]
    )


def image(loaded: bool, kho_fdt: int = 0) -> Report:
    return check(replace(snapshot(FIXED, []), image=KexecImage(loaded, False, kho_fdt)))


def next_kernel(*kho: str) -> Report:
    return check(snapshot(FIXED, []), NextKernel("bzImage", "gzip", "7.3", kho))


def loaded_next(
    line: str | None, hands_over: Luo | None = None, ours: str = "kho=on", **changes: Any
) -> Report:
    """The report on a kernel that hands this over, and on an image with this command line."""
    facts = out(luo=hands_over)
    facts = replace(facts, kernel=replace(facts.kernel, command_line=ours))
    kernel = NextKernel(
        *("loaded", "zstd", "7.3", ("kho-v5",), ("luo-v5",), ("memfd-v2",)), command_line=line
    )
    return check(facts, replace(kernel, **changes))


def crash_image(loaded: bool, kho_fdt: int = 0) -> Report:
    image = KexecImage(loaded, loaded, kho_fdt, 1 << 20 if loaded else 0)
    return check(replace(snapshot(FIXED, []), crash_image=image))


NONE = BlockLimits()
#: Kernels with limits: as linux 7.1.13, and as 6.18.15 if it had a radix tree.
INT_SIZES = replace(PLAIN, compatible="kho-v3", limits=BlockLimits(1 << 31))
OLD = replace(PLAIN, compatible="kho-v1", limits=BlockLimits(1 << 31, 10))


def carried(abi: Abi, block: Block, *kho: str) -> Report:
    """The report on a block, and on a next kernel."""
    facts = snapshot(abi, [block], fdt=fdt(compatible=abi.compatible))
    return check(facts, NextKernel("bzImage", "gzip", "7.1.99", kho))


def full_fdt(used: int) -> Report:
    header = b"\xd0\x0d\xfe\xed" + used.to_bytes(4, "big")
    return check(out(blobs={"fdt": header}))


def handed(
    before: Luo | None,
    after: Luo | None,
    *,
    had: Iterable[str] = ("LUO",),
    came: Iterable[str] = ("LUO",),
    problems: Iterable[str] = (),
    kho_boot: bool = True,
    came_from: int | None = None,
) -> Report:
    """
    The report across a kexec on LUO and subtrees.

    :param came_from: address of the incoming root FDT; None: where it was.
    """
    was = out(contig(0, phys=0x5000), fdt=subtrees(*(Subtree(n, 0x5000, 4096) for n in had)))
    was = replace(was, outgoing=replace(was.outgoing, luo=before))
    now = snapshot(
        FIXED,
        [],
        boot_id=NEXT_BOOT,
        handover=HANDED_OVER if kho_boot else Handover(False, "", 0),
        incoming=[] if kho_boot else None,
        watched=(was, [contig(0, phys=0x5000)]),
    )
    if now.incoming is not None:
        at = was.outgoing.fdt.phys if came_from is None else came_from
        root = Fdt(at, "kho-v5", 0x1000, problems=list(problems))
        root.subtrees.extend(Subtree(name, 0x5000, 4096) for name in came)
        now = replace(now, incoming=replace(now.incoming, fdt=root, luo=after))
    return compare(was, now)


def gate(**changed: Any) -> Report:
    """The report to who is about to kexec, where all are ready but for this."""
    return check(ready(**changed), gate=True)


FAILED = LuoFile("memfd-v2", 9, 0, retrieve_status=-22)


def older(
    *blocks: Block,
    finalized: bool | None = True,
    listed: Iterable[Block] | None = None,
    abi: Abi = XARRAY,
    **facts: object,
) -> Report:
    """
    The report on a kernel before the radix tree.

    :param listed: what was serialized; None: all that is preserved.
    """
    made = snapshot(abi, blocks)
    fdt = made.outgoing.fdt if finalized or abi.finalize == Finalize.BEFORE_KEXEC else Fdt(0)
    chain = snapshot(abi, blocks if listed is None else listed).outgoing.tree if finalized else None
    outgoing = replace(made.outgoing, fdt=fdt, serialized=chain)
    made = replace(made, abi=replace(abi, compatible=fdt.compatible), outgoing=outgoing)
    return check(replace(made, finalized=finalized, **facts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fires:
    """
    What a rule must find in some facts: one thing, at this block.

    :param here: the explanation is not the rule's own, but of what is at hand.
    """

    report: Callable[[], Report]
    phys: int | None = AT
    order: int | None = None
    here: bool = False


#: More blocks in the same leaf.
OTHER = contig(2, phys=AT + 0x10000)
THIRD = contig(2, phys=AT + 0x20000)
OTHER_FOLIO = replace(folio(2), phys=AT + 0x10000)
#: Like linux 7.0.
NO_LOAD_FIRST = replace(XARRAY, finalize=Finalize.BEFORE_KEXEC, restores_pages_as=Restore.PAGES)
OTHER_SPLIT = split(2, phys=AT + 0x10000)
NEXT_FOLIO = folio(2, phys=AT + 0x4000)
#: Each page held, and a compound page.
HALF = split(2, CONTIG, compound=2)
BAD_ENTRY = TreeState(0x1000, problems=[NodeProblem(5, 0x1000, 7, 12, "odd")], problem_count=1)

#: The folios of two memfds, and what else may lead to them.
ONE, TWO, THREE = (Owner(OwnerKind.MEMFD, f"memfd {n}: data", "vm1", n) for n in (1, 2, 3))
AREA, CHUNKS = (Owner(kind, "area") for kind in (OwnerKind.VMALLOC_PAGE, OwnerKind.VMALLOC_CHUNK))
BLOB = Owner(OwnerKind.SUBTREE, "subtree x")
# Two nodes: blocks on both sides of the border, and what becomes of a block of 8 pages around one

BORDER = 0x404_4000
ODD = 0x404_5000
SIDES = (contig(2, phys=BORDER - 0x4000), contig(2, phys=BORDER))
CUT = (
    contig(2, phys=ODD - 0x5000),
    contig(0, phys=ODD - 0x1000),
    contig(0, phys=ODD),
    contig(1, phys=ODD + 0x1000),
)


def border(
    *blocks: Block,
    abi: Abi = PLAIN,
    borders: Iterable[int] = (BORDER,),
    owner: OwnerKind | None = None,
    at: int = BORDER,
) -> Report:
    """
    The report on blocks, and on where nodes meet.

    :param owner: of the memory from this address on, for 8 pages.
    """
    facts = snapshot(abi, [replace(b, ones=(1 << b.order) - 1) for b in blocks], borders=borders)
    side = facts.outgoing
    if owner is not None:
        columns = ([at], [0x8000], [0])
        claims = Claims(
            *(np.array(c, t) for c, t in zip(columns, Claims.DTYPES.values(), strict=True))
        )
        side = replace(side, owners=[Owner(owner, "somebody")], claims=[claims])
    return check(replace(facts, outgoing=side))


#: Scratch, and how many of its pages are what.
SCRATCH = (1 << 29, 1 << 24)


def scratch_of(
    *blocks: Block,
    pages: dict[str, int] | None = None,
    pinned: int = 0,
    cma: tuple[int, int] = (4096, 0),
    came: Handover | None = None,
    next_kernel: NextKernel | None = None,
    owned: int | None = None,
    **changes: Any,
) -> Report:
    """
    The report on a kernel with a scratch area of 16 MiB.

    :param pages: of the area, by use.
    :param cma: pages in page blocks of type MIGRATE_CMA, and those that CmaTotal counts.
    :param owned: a page that is KHO's own.
    """
    facts = snapshot(PLAIN, blocks, scratch=[SCRATCH], handover=came)
    if owned is not None:
        whose = Claims(
            *(np.array([n], t) for n, t in zip((owned, 64, 0), Claims.DTYPES.values(), strict=True))
        )
        side = replace(facts.outgoing, owners=[Owner(OwnerKind.FDT, "KHO FDT")], claims=[whose])
        facts = replace(facts, outgoing=side)
    zone = Zone(
        0, "Normal", 0, 1 << 32, 1 << 20, (1 << 20) - 2560, cma[0], 9000, 4000, 100, 120, 7, 50
    )
    facts = replace(
        facts,
        memory=Memory([zone], cma[1], 10, 9),
        scratch_use=[ScratchUse({"cma": 8}, pages or {}, pinned, 0, 0)],
        scratch_free=[0],
        liveupdate=LuoState(True, [], False),
    )
    return check(replace(facts, **changes), next_kernel)


def takes(size: int | None, initrd: int | None = None) -> NextKernel:
    """A kernel that takes so much memory, with its initrd."""
    return NextKernel("bzImage", "zstd", "7.2.0-next", ("kho-v4",), size=size, initrd=initrd)


FIRES: dict[str, list[Fires]] = {
    "phantom-cma": [
        Fires(scratch_of, None),
        # cma= has some of it.
        Fires(lambda: scratch_of(cma=(9000, 3000)), None),
        # Of 4096 pages of cma= and as many of scratch, 4000 are free: that changes all the time.
        Fires(lambda: scratch_of(cma=(8192, 4096)), None),
        # A kernel that was handed over to does not count its scratch in its zones.
        Fires(lambda: scratch_of(cma=(0, 0), came=HANDED_OVER), None),
    ],
    "scratch-unmovable": [
        Fires(lambda: scratch_of(pages={"slab": 3, "anonymous": 70}), SCRATCH[0]),
        Fires(lambda: scratch_of(pages={PageUse.KERNEL: 3}), SCRATCH[0]),
        Fires(lambda: scratch_of(pages={PageUse.RESERVED: 3}), SCRATCH[0]),
        Fires(lambda: scratch_of(pages={PageUse.ANON: 3}, pinned=1), SCRATCH[0]),
    ],
    "scratch-too-small": [
        Fires(lambda: scratch_of(next_kernel=takes(17 << 20)), None),
        # Each would fit, but not both of them.
        Fires(lambda: scratch_of(next_kernel=takes(10 << 20, 10 << 20)), None),
        Fires(lambda: scratch_of(next_kernel=takes(None, 17 << 20)), None),
        # The boot takes 10 MiB, and there are 16.
        Fires(lambda: scratch_of(next_kernel=takes(7 << 20)), None),
        # With its initrd the loaded image takes more than a bzImage says.
        Fires(
            lambda: scratch_of(
                next_kernel=takes(1 << 20), image=KexecImage(True, True, 0x2000, 7 << 20)
            ),
            None,
        ),
    ],
    "kho-unused": [
        Fires(scratch_of, None),
        # Every kexec is a handover as long as KHO is on.
        Fires(lambda: scratch_of(came=HANDED_OVER), None),
        # Nobody but KHO itself has preserved anything: its root FDT.
        Fires(lambda: scratch_of(replace(contig(0), phys=0x2000), owned=0x2000), None),
    ],
    "not-finalized": [
        Fires(lambda: older(folio(2), finalized=False, image=KexecImage(False)), None, here=True),
        Fires(lambda: older(folio(2), finalized=False, abi=NO_LOAD_FIRST), None, here=True),
        Fires(
            lambda: older(
                folio(2), finalized=False, abi=NO_LOAD_FIRST, liveupdate=LuoState(False, [])
            ),
            None,
            here=True,
        ),
        Fires(lambda: older(folio(2), image=KexecImage(True, True, 0, 4096)), None, here=True),
        # Clients that preserve when they are told that KHO is finalized have nothing preserved yet.
        Fires(
            lambda: older(finalized=False, image=KexecImage(True, True, 0, 4096)), None, here=True
        ),
        # kho_abort() has dropped all that was preserved.
        Fires(
            lambda: older(finalized=False, image=KexecImage(True, True, 0x2000, 4096)),
            None,
            here=True,
        ),
    ],
    "serialized-differs": [
        Fires(lambda: older(folio(2), listed=[]), AT, 2, here=True),
        Fires(lambda: older(listed=[folio(2)]), AT, 2, here=True),
        Fires(lambda: older(folio(2), OTHER_FOLIO, listed=[folio(2)]), AT + 0x10000, 2, here=True),
        # LUO serializes anew only if it is on, and not in kernels that have no LUO.
        Fires(lambda: older(folio(2), listed=[], abi=NO_LOAD_FIRST), AT, 2, here=True),
        Fires(
            lambda: older(folio(2), listed=[], abi=NO_LOAD_FIRST, liveupdate=LuoState(False, [])),
            AT,
            2,
            here=True,
        ),
        Fires(lambda: older(folio(2), listed=[], liveupdate=LuoState(True, [])), AT, 2, here=True),
    ],
    "order-not-stored": [
        Fires(lambda: one(EARLY), None),
        Fires(lambda: one(EARLY, Block(1 << 30, 2, compound=2)), None),
    ],
    "metadata-in-scratch": [
        # The root, and the lowest of all nodes; by their last byte, and by their first.
        Fires(lambda: one(FIXED, scratch=[(0x1FFF, 0x1000)]), 0x1000),
        Fires(lambda: one(FIXED, contig(0), contig(1), scratch=[(0, 0x1001)]), 0x1000),
        Fires(lambda: one(FIXED, contig(0), scratch=[(3 << 30, 1), (0x5000, 0x2000)]), 0x5000),
    ],
    "claimed-twice": [
        Fires(lambda: claims((ONE, AT, 0x4000), (TWO, AT, 0x4000))),
        # A part of it, of the first, the last, and between.
        Fires(lambda: claims((ONE, AT, 0x4000), (TWO, AT + 0x3000, 0x4000)), AT + 0x3000),
        Fires(lambda: claims((AREA, AT + 0x3000, 0x4000), (ONE, AT, 0x4000)), AT + 0x3000),
        Fires(lambda: claims((ONE, AT, 0x4000), (CHUNKS, AT + 0x1000, 0x1000)), AT + 0x1000),
        Fires(lambda: claims((BLOB, AT + 0x10, 8), (ONE, AT, 0x1000)), AT + 0x10),
        # Behind others that are shorter, and where a claim reaches beyond all memory.
        Fires(
            lambda: claims((ONE, 0, 1 << 30), (THREE, 1 << 31, 0x1000), (TWO, AT, 0x1000)),
        ),
        Fires(lambda: claims((ONE, 2**64 - 8, 2**64 - 1), (TWO, 2**64 - 2, 1)), 2**64 - 2),
        # Each pair is one thing to say, however often they meet.
        Fires(
            lambda: claims(
                *((who, AT + (n << 13), 0x1000) for n in range(9) for who in (ONE, TWO))
            ),
        ),
    ],
    "type-not-stored": [
        Fires(lambda: one(POSTED), None, here=True),
        Fires(lambda: one(REFUSED), None, here=True),
    ],
    "abi-not-bumped": [
        Fires(lambda: one(POSTED), None),
        Fires(lambda: one(replace(FIXED, compatible="kho-v3")), None),
    ],
    "bad-fdt": [
        Fires(lambda: one(FIXED, fdt=fdt(problems=["its page cannot be read"])), 0x2000),
        Fires(lambda: one(FIXED, fdt=fdt(compatible="luo-v5")), 0x2000),
        Fires(lambda: one(FIXED, fdt=fdt(memory_map=0x9000)), 0x2000),
        Fires(lambda: check(with_incoming_fdt(problems=["no compatible"])), 0x3000),
        # Outside RAM, its end or all of it; in the FDT, its end or all of it.
        Fires(lambda: one(FIXED, fdt=subtrees(Subtree("x", (1 << 32) - 1, 2))), (1 << 32) - 1),
        Fires(lambda: one(FIXED, fdt=subtrees(Subtree("x", 2**64 - 1, 2**64 - 1))), 2**64 - 1),
        Fires(lambda: one(FIXED, fdt=subtrees(Subtree("x", 0x1FFF, 2))), 0x1FFF),
        Fires(lambda: one(FIXED, fdt=subtrees(Subtree("x", 0x2FFF, 1))), 0x2FFF),
        Fires(lambda: check(with_incoming_fdt(subtrees=[Subtree("x", 1 << 40, 2)])), 1 << 40),
        # LUO's blob that was an FDT, by its first bytes.
        Fires(lambda: check(with_blob("LUO", MAGIC + bytes(60)))),
        Fires(lambda: check(with_blob("kho_test", bytes(60)))),
    ],
    "fdt-nearly-full": [
        Fires(lambda: full_fdt(3687), 0x2000),
        Fires(lambda: full_fdt(9999), 0x2000),
    ],
    "blob-not-preserved": [
        Fires(lambda: one(FIXED, fdt=subtrees(Subtree("x", AT, 1)))),
        # All but the last byte.
        Fires(lambda: one(FIXED, contig(2), fdt=subtrees(Subtree("x", AT + 1, 0x4000))), AT + 1),
        Fires(lambda: one(FIXED, fdt=subtrees(Subtree("x", 0x3000, 1 << 31))), 0x3000),
        *(
            Fires(lambda kind=kind: claimed(owner(kind), AT, 0x2000))  # type: ignore[misc]
            for kind in sorted(NEEDED)
        ),
        # The first page that is not, of two runs; a part of a page is the page.
        Fires(
            lambda: claimed(owner(OwnerKind.FILE), AT + 8, 0x7FF8, contig(2), more=0x2000),
            AT + 0x4000,
        ),
        Fires(lambda: claimed(owner(OwnerKind.FILE), 0, 1 << 62), 0),
        Fires(lambda: claimed(owner(OwnerKind.FILE), 2**64 - 1, 2**64 - 1), 2**64 - 4096),
    ],
    "broken-vmalloc": [
        Fires(lambda: check(out(vmallocs=[vmalloc("its chunks loop")]))),
        Fires(lambda: claimed(owner(OwnerKind.VMALLOC_CHUNK), AT, 0x1000)),
        Fires(lambda: claimed(owner(OwnerKind.VMALLOC_PAGE), AT, 0x5000, contig(2)), AT + 0x4000),
    ],
    "broken-luo": [
        Fires(lambda: check(out(luo=luo(problems=["its sessions loop"]))), 0x6000),
        Fires(lambda: check(out(luo=luo(session(problems=["count is wrong"])))), None),
        Fires(lambda: check(out(luo=luo(broken_file()))), None),
        Fires(lambda: check(out(luo=luo(broken_memfd()))), 0x7000),
        Fires(lambda: check(out(luo=luo_v1(problems=["its FDT: odd"]))), 0x6000, here=True),
        Fires(lambda: check(out(luo=luo_v1(broken_memfd()))), 0x7000, here=True),
    ],
    "orphaned-session": [
        Fires(lambda: check(came(luo(session()))), None),
        Fires(lambda: check(came(luo(session(retrieved=None), live=False))), None),
        # It was in the snapshot.
        Fires(lambda: handed(luo(session()), luo(session())), None),
        Fires(lambda: handed(luo(session()), luo(session(retrieved=None), live=False)), None),
        # Nobody can retrieve it.
        Fires(lambda: check(came(luo(session()), on=False)), None, here=True),
        Fires(lambda: check(came(luo(session(files=1, count=2)))), None, here=True),
        Fires(lambda: check(came(luo(session(files=1, count=2, retrieved=True)))), None, here=True),
        Fires(lambda: check(came(luo(session(retrieved=None)))), None, here=True),
        Fires(
            lambda: check(came(luo(session(files=0, count=0)), "Failed to deserialize files for")),
            None,
            here=True,
        ),
        Fires(
            lambda: check(came(luo(session(retrieved=True)), "Unable to finish")), None, here=True
        ),
    ],
    "image-without-kho": [Fires(lambda: image(True), None)],
    "no-image": [Fires(lambda: image(False), None)],
    "image-abi-differs": [
        Fires(lambda: next_kernel("kho-v4"), None, here=True),
        Fires(lambda: next_kernel(), None, here=True),
    ],
    "next-without-kho": [
        Fires(lambda: loaded_next("quiet kho=off liveupdate=on"), None),
        Fires(lambda: loaded_next("kho=on kho=n kho=maybe"), None),
        Fires(lambda: loaded_next('kho="0" -- kho=on'), None),
    ],
    "next-without-liveupdate": [
        Fires(lambda: loaded_next("kho=on", luo(session())), None),
        Fires(lambda: loaded_next("kho=on liveupdate=on liveupdate=off", luo(session())), None),
        Fires(lambda: loaded_next("kho=on liveupdate", luo(session(), session("vm2"))), None),
        # Sessions may still come.
        Fires(lambda: loaded_next("kho=on", luo()), None),
    ],
    "crash-image-with-kho": [Fires(lambda: crash_image(True, 0x2000), 0x2000)],
    "block-too-large": [
        Fires(lambda: one(INT_SIZES, contig(19, phys=0)), 0, 19),
        Fires(lambda: one(INT_SIZES, contig(20, phys=1 << 32), ram=[(0, 1 << 34)]), 1 << 32, 20),
        Fires(lambda: one(OLD, contig(11, phys=0)), 0, 11),
        Fires(
            lambda: carried(replace(INT_SIZES, limits=NONE), contig(19, phys=0), "kho-v3"), 0, 19
        ),
        Fires(lambda: carried(OLD, contig(11, phys=0), "kho-v1"), 0, 11),
        # What nobody restores is reserved all the same.
        Fires(
            lambda: claimed(
                owner(OwnerKind.RESERVE_MEM), 0, 1 << 31, contig(19, phys=0), abi=INT_SIZES
            ),
            *(0, 19),
        ),
    ],
    "cut-at-node": [
        Fires(lambda: border(*SIDES), BORDER, 2),
        Fires(lambda: border(split(2, phys=BORDER - 0x4000), SIDES[1], abi=FIXED), BORDER, 2),
        Fires(lambda: border(SIDES[0], split(2, phys=BORDER), abi=FIXED), BORDER, 2),
        # Twice the size: the first page that is skipped lies in front of the border.
        Fires(lambda: border(*CUT, borders=[ODD]), ODD - 0x1000, 0),
        # Of two borders, one has all its blocks.
        Fires(lambda: border(*SIDES, borders=[BORDER, BORDER + (1 << 24)]), BORDER, 2),
        # Two borders in one block: one finding.
        Fires(lambda: border(*CUT, borders=[ODD, ODD + 0x1000]), ODD - 0x1000, 0),
        # A client that is known has one of the blocks that a larger step would have.
        Fires(
            lambda: border(*CUT, borders=[ODD], owner=OwnerKind.VMALLOC_PAGE, at=ODD + 0x1000),
            ODD,
            0,
        ),
    ],
    "huge-order": [
        Fires(lambda: one(FIXED, contig(11, phys=0)), 0, 11),
        Fires(lambda: one(PLAIN, contig(18, phys=0, compound=18)), 0, 18),
        Fires(lambda: one(FIXED, split(11, phys=0)), 0, 11),
        Fires(lambda: claimed(owner(OwnerKind.FILE), 0, 1 << 23, contig(11, phys=0)), 0, 11),
    ],
    "bad-node": [Fires(lambda: one(FIXED, state=BAD_ENTRY), 0x1000)],
    "kernel-tainted": [
        Fires(lambda: one(FIXED, tainted=1 << 5), None),
        Fires(lambda: one(FIXED, log=["BUG: Bad page state in process init"]), None),
    ],
    "both-types": [Fires(lambda: one(FIXED, split(3, CONTIG), split(3, SPLIT)), AT, 3)],
    "overlap": [
        Fires(lambda: one(FIXED, contig(3), contig(0, phys=AT + 0x3000)), AT + 0x3000, 0),
        Fires(lambda: one(FIXED, split(9, phys=0), contig(1)), AT, 1),
        Fires(lambda: one(FIXED, contig(3), split(2)), AT, 2),
    ],
    "type-mismatch": [
        Fires(lambda: one(FIXED, split(2, CONTIG)), AT, 2),
        Fires(lambda: one(FIXED, contig(2, SPLIT)), AT, 2),
        Fires(lambda: one(POSTED, split(2, SPLIT)), AT, 2),
        # A folio is no split memory, whatever its other pages' refcounts are.
        Fires(lambda: one(FIXED, contig(2, SPLIT, compound=2)), AT, 2),
    ],
    "mixed-refcounts": [
        Fires(lambda: one(FIXED, contig(3, ones=1, odd=4)), AT, 3),
        Fires(lambda: one(FIXED, contig(0, head=0)), AT, 0),
        Fires(lambda: one(PLAIN, split(2, head=0)), AT, 2),
        Fires(lambda: one(FIXED, split(2, CONTIG, compound=2)), AT, 2),
    ],
    "wrong-after-restore": [
        Fires(lambda: one(PLAIN, contig(2)), AT, 2),
        Fires(lambda: one(POSTED, split(2)), AT, 2),
        Fires(lambda: one(FIXED, contig(2, SPLIT)), AT, 2),
        Fires(lambda: one(FIXED, split(2, CONTIG)), AT, 2),
        Fires(lambda: one(FIXED, contig(3, ones=1, odd=4)), AT, 3),
        Fires(lambda: one(FIXED, contig(0, head=0)), AT, 0),
        # kho_restore_vmalloc() restores no folio.
        Fires(
            lambda: claimed(owner(OwnerKind.VMALLOC_PAGE), AT, 0x8000, folio(2), NEXT_FOLIO),
            here=True,
        ),
    ],
    "needs-folio-restore": [
        Fires(lambda: one(FIXED, folio(2)), None),
        Fires(lambda: one(PLAIN, *(folio(2, phys=n << 20) for n in range(100))), None),
        Fires(lambda: one(FIXED, folio(1, page_type=SLAB)), None),
        Fires(lambda: claimed(owner(OwnerKind.VM_STRUCT), AT, 0x4000, folio(2)), None),
        # Of two folios, one is somebody's who restores a folio.
        Fires(lambda: claimed(owner(OwnerKind.MEMFD), AT, 0x4000, folio(2), NEXT_FOLIO), None),
    ],
    "stale-entry": [
        Fires(lambda: one(FIXED, contig(2, head=0, free=1)), AT, 2),
        Fires(lambda: one(FIXED, contig(2, compound=3)), AT, 2),
        Fires(lambda: one(FIXED, contig(2, compound=Pages.COMPOUND_TAIL)), AT, 2),
    ],
    "in-scratch": [
        Fires(lambda: one(FIXED, contig(2), scratch=[(AT + 0x3000, 0x1000)]), AT, 2),
        Fires(lambda: one(FIXED, contig(2), scratch=[(0, 1), (0, AT + 1)]), AT, 2),
        Fires(
            lambda: one(
                FIXED, fdt=fdt(subtrees=[Subtree("LUO", AT, 2)]), scratch=[(AT + 1, 0x1000)]
            ),
        ),
    ],
    "outside-ram": [
        Fires(lambda: one(FIXED, contig(2), ram=[(0, AT), (AT + 0x1000, 1 << 32)]), AT, 2),
        Fires(lambda: one(FIXED, contig(0, phys=1 << 40)), 1 << 40, 0),
        Fires(lambda: one(FIXED, contig(0), ram=[]), AT, 0),
        Fires(lambda: one(PLAIN, contig(0, key=1)), 0, 52),
    ],
    "preserved-offline": [
        Fires(lambda: one(FIXED, contig(2), offline=[(AT, AT + 0x4000)]), AT, 2),
        # Its last page, and its first one.
        Fires(lambda: one(FIXED, contig(2), offline=[(AT + 0x3000, AT + 0x4000)]), AT, 2),
        Fires(lambda: one(FIXED, contig(2), offline=[(0, 0x1000), (AT - 0x1000, AT + 1)]), AT, 2),
        Fires(lambda: across([contig(2)], [contig(2)], offline=[(AT, AT + 0x4000)]), AT, 2),
        Fires(lambda: across([contig(2)], [stamped(contig(2))], offline=[(AT, AT + 1)]), AT, 2),
    ],
    "bad-key": [
        Fires(lambda: one(FIXED, contig(0, key=0)), None),
        Fires(lambda: one(PLAIN, contig(0, key=1 << 53)), None),
        Fires(lambda: one(FIXED, contig(0, key=1 << 54)), None),
        Fires(lambda: one(PLAIN, contig(21, phys=0), ram=[(0, 1 << 32)]), 0, 21),
    ],
    "not-a-handover": [
        Fires(lambda: across([], [], handover=Handover(False, "", 0)), None),
        Fires(lambda: across([], [], handover=Handover(True, "6.1.0", 1)), None),
        Fires(lambda: across([], [], handover=Handover(True, "", 1)), None),
        Fires(lambda: across([], [], handover=Handover(True, "7.2.0-test", 2)), None),
        Fires(lambda: across([], [], boot_id="00000000-0000-0000-0000-000000000001"), None),
        Fires(lambda: handed(luo(), luo(liveupdate_num=3)), None),
        # Another machine with the same kernel, after as many kexecs.
        Fires(lambda: handed(None, None, came_from=0x9000), None),
    ],
    "lost": [
        Fires(lambda: across([contig(2)], [contig(2)], handover=Handover(False, "", 0)), AT, 2),
        Fires(
            lambda: across([contig(2), OTHER], [contig(2), OTHER], evidence=[OTHER]),
            AT,
            2,
        ),
        Fires(lambda: handed(None, None, had=["LUO", "x"]), 0x5000),
        # Nobody has opened /dev/liveupdate, and it is not in what came.
        Fires(lambda: handed(luo(session()), luo(live=False)), None),
        Fires(lambda: handed(luo(session()), None, had=[], came=[]), None),
        Fires(lambda: handed(luo(session()), luo(session(files=1))), None),
        # It has lost a file, and still counts it.
        Fires(lambda: handed(luo(session()), luo(session(files=1, count=2))), None, here=True),
        Fires(
            lambda: handed(luo(session()), luo(session(files=0, retrieved=None), live=False)), None
        ),
    ],
    "order-changed": [Fires(lambda: across([contig(2)], [stamped(contig(2), order=3)]), AT, 2)],
    "type-changed": [
        Fires(lambda: across([split(2)], [stamped(split(2), page_type=CONTIG)]), AT, 2),
        Fires(lambda: across([contig(2)], [stamped(contig(2), page_type=SPLIT)]), AT, 2),
        # As posted both agree on contig, and the pages did not.
        Fires(lambda: across([split(2)], [stamped(split(2), page_type=0)], abi=POSTED), AT, 2),
    ],
    "wrong-refcounts": [
        Fires(lambda: across([split(2)], [contig(2, SPLIT)]), AT, 2),
        Fires(lambda: across([contig(2)], [split(2, CONTIG)]), AT, 2),
        Fires(lambda: across([contig(3, ones=1, odd=4)], [contig(3)]), AT, 3),
        # A folio restored as pages.
        Fires(lambda: across([folio(2)], [split(2, CONTIG, pristine=4)], abi=PLAIN), AT, 2),
        # In linux 6.18, whatever it was.
        Fires(lambda: across([folio(2)], [HALF], abi=XARRAY), AT, 2, True),
        Fires(lambda: across([contig(2)], [HALF], abi=XARRAY), AT, 2, True),
        Fires(lambda: across([split(2)], [HALF], abi=XARRAY), AT, 2, True),
    ],
    "not-restored": [
        Fires(lambda: across([contig(2)], [stamped(contig(2))]), AT, 2),
        Fires(
            lambda: handed(luo(session()), luo(replace(session(retrieved=True), files=[FAILED]))),
            None,
        ),
    ],
    "session-not-held": [Fires(lambda: gate(holders=Holders([KEEPER])), None)],
    "session-not-kept": [Fires(lambda: gate(holders=Holders([KEEPER, AGENT])), None)],
    "store-not-kept": [Fires(lambda: gate(services=Services([store(preserve="no")])), None)],
    "nothing-carried": [Fires(lambda: gate(sessions=[VM]), None)],
    "stored-fd-lost": [
        Fires(lambda: stored(store(kept=[], given=[])), None),
        # There is no such unit any more.
        Fires(stored, None),
    ],
    "stored-fd-waits": [Fires(lambda: stored(store(given=[])), None)],
    "unexpected": [
        Fires(lambda: across([], [], stamps=[stamped(contig(2))]), AT, 2),
        # Another order's block may begin where this one's stamp is, but this one was recorded.
        Fires(
            lambda: across(
                [contig(2)], [stamped(contig(2))], stamps=[stamped(contig(0, phys=AT + 0x1000))]
            ),
            AT + 0x1000,
            0,
        ),
    ],
}


def with_incoming_fdt(**changes: object) -> Snapshot:
    facts = snapshot(FIXED, [], incoming=[], handover=HANDED_OVER)
    assert facts.incoming is not None
    root = fdt(phys=0x3000, **changes)
    return replace(facts, incoming=replace(facts.incoming, fdt=root))


SILENT: dict[str, list[Callable[[], Report]]] = {
    "phantom-cma": [
        lambda: scratch_of(cma=(4096, 4096), scratch_use=[]),
        # An older snapshot does not know of zones.
        lambda: scratch_of(memory=None),
        lambda: one(FIXED),
    ],
    "scratch-unmovable": [
        lambda: scratch_of(pages={PageUse.ANON: 9, PageUse.FILE: 9, "hugetlb": 9, "zsmalloc": 1}),
        lambda: scratch_of(pages={PageUse.PCP: 9, PageUse.TRANSIT: 9}),
        # A kernel that was handed over to has booted there.
        lambda: scratch_of(pages={PageUse.RESERVED: 9}, came=HANDED_OVER),
        lambda: scratch_of(scratch_use=[]),
    ],
    "scratch-too-small": [
        lambda: scratch_of(next_kernel=takes(6 << 20)),
        lambda: scratch_of(next_kernel=takes(None)),
        lambda: scratch_of(next_kernel=takes(3 << 20, 3 << 20)),
        lambda: scratch_of(next_kernel=takes(1 << 30), scratch=np.zeros((0, 2), np.uint64)),
        lambda: scratch_of(next_kernel=takes(7 << 20), memory=None),
    ],
    "kho-unused": [
        lambda: scratch_of(contig(2)),
        lambda: scratch_of(liveupdate=LuoState(True, [], True)),
        lambda: scratch_of(kho_enable=False, scratch=np.zeros((0, 2), np.uint64)),
        lambda: scratch_of(memory=None),
    ],
    "not-finalized": [
        lambda: older(folio(2)),
        lambda: older(finalized=False, image=KexecImage(False)),
        lambda: older(folio(2), finalized=None),
        # LUO finalizes by itself, on the way into the kexec.
        lambda: older(folio(2), finalized=False, abi=NO_LOAD_FIRST, liveupdate=LuoState(True, [])),
        # Nobody but KHO itself has preserved anything: its root FDT.
        lambda: older(replace(folio(0), phys=0x2000), finalized=False, abi=NO_LOAD_FIRST),
        lambda: older(folio(2), image=KexecImage(True, True, 0x2000, 4096)),
        # Of this, image-without-kho speaks.
        lambda: older(folio(2), image=KexecImage(True, False, 0, 4096)),
        lambda: one(FIXED, split(2)),
    ],
    "serialized-differs": [
        lambda: older(folio(2), OTHER_FOLIO),
        lambda: older(folio(2), finalized=False),
        # LUO serializes anew, on the way into the kexec.
        lambda: older(folio(2), listed=[], abi=NO_LOAD_FIRST, liveupdate=LuoState(True, [])),
        lambda: older(listed=[folio(2)], abi=NO_LOAD_FIRST, liveupdate=LuoState(True, [])),
        lambda: one(FIXED, split(2)),
    ],
    "order-not-stored": [
        *(lambda shift=shift: one(Abi.for_page_shift(shift)) for shift in (12, 14, 16)),
        lambda: one(FIXED, contig(0)),
    ],
    "metadata-in-scratch": [
        lambda: one(FIXED, contig(0), scratch=[(0, 0x1000), (0x7000, 0x1000)]),
        lambda: one(FIXED, scratch=[(0x2000, 0x1000), (0x1800, 0)]),
        # What was handed over has been read.
        lambda: check(
            replace(
                with_incoming_fdt(),
                outgoing=snapshot(FIXED, [], state=TreeState(0)).outgoing,
                scratch=np.array([[0x1000, 0x1000]], np.uint64),
            )
        ),
    ],
    "claimed-twice": [
        lambda: claims((ONE, AT, 0x4000), (TWO, AT + 0x4000, 0x4000), (THREE, AT - 0x1000, 0x1000)),
        # Two small blobs in a page; nothing.
        lambda: claims((BLOB, AT, 8), (replace(BLOB, name="subtree y"), AT + 8, 8)),
        lambda: claims((ONE, AT, 0x1000), (TWO, AT, 0)),
        # broken-luo and broken-vmalloc speak of what one owner lists twice.
        lambda: claims((ONE, AT, 0x4000), (ONE, AT, 0x4000), (ONE, AT + 0x1000, 0x9000)),
        # Who maps an area of vmalloc leads nobody to it.
        lambda: claims((ONE, AT, 0x4000), (Owner(OwnerKind.VM_STRUCT, "vm_struct"), AT, 0x4000)),
        # bad-fdt speaks of a blob in the FDT.
        lambda: claims(
            (Owner(OwnerKind.FDT, "root FDT"), 0x2000, 0x1000),
            (BLOB, 0x2000, 8),
            fdt=subtrees(Subtree("x", 0x2000, 8)),
        ),
    ],
    "type-not-stored": [
        lambda: one(FIXED),
        lambda: one(PLAIN),
        lambda: one(replace(FIXED, key_width=54)),
        lambda: one(replace(PLAIN, key_width=53)),
    ],
    "abi-not-bumped": [lambda: one(FIXED), lambda: one(PLAIN)],
    "bad-fdt": [
        lambda: one(FIXED),
        lambda: check(with_incoming_fdt()),
        lambda: one(
            FIXED,
            fdt=subtrees(
                Subtree("a", 0x1000, 0x1000),
                Subtree("b", 0x3000, (1 << 32) - 0x3000),
                Subtree("empty", 1 << 40, 0),
                Subtree("unknown", None, 8),
            ),
        ),
        lambda: check(with_blob("LUO", b"luo-v5\0\0" + bytes(56))),
        lambda: check(with_blob("x", MAGIC + bytes(60))),
    ],
    "fdt-nearly-full": [
        lambda: full_fdt(3686),
        lambda: check(out(blobs={"fdt": b"\xd0\x0d\xfe"})),
        # What is in a header that makes no sense is nothing to speak of.
        lambda: check(out(fdt=fdt(problems=["not an FDT"]), blobs={"fdt": b"\xff" * 40})),
    ],
    "blob-not-preserved": [
        lambda: one(FIXED, contig(2), fdt=subtrees(Subtree("x", AT + 1, 0x3FFF))),
        lambda: one(FIXED, contig(2), OTHER, fdt=subtrees(Subtree("x", AT, 1), Subtree("y", 0, 0))),
        # bad-fdt has spoken of it.
        lambda: one(FIXED, fdt=subtrees(Subtree("x", 1 << 40, 1), Subtree("y", None, 8))),
        lambda: claimed(owner(OwnerKind.FILE), AT + 8, 0x3FF8, contig(2)),
        lambda: claimed(owner(OwnerKind.FILE), AT, 0x8000, contig(2), split(2, phys=AT + 0x4000)),
        lambda: claimed(owner(OwnerKind.FILE), AT, 0),
        *(
            lambda kind=kind: claimed(owner(kind), AT, 0x1000)
            for kind in sorted(set(OwnerKind) - NEEDED)
        ),
    ],
    "broken-vmalloc": [
        lambda: check(out(vmallocs=[vmalloc()])),
        lambda: claimed(owner(OwnerKind.VMALLOC_PAGE), AT, 0x4000, contig(2)),
        lambda: claimed(owner(OwnerKind.FILE), AT, 0x1000),
    ],
    "broken-luo": [
        lambda: check(out()),
        lambda: check(out(luo=luo(session(), session("vm2", 0)))),
        lambda: check(out(luo=luo_v1(session(), session("vm2", 0)))),
        # What came is for others to judge.
        lambda: check(came(luo(broken_file(), problems=["its sessions loop"]))),
        # Nor is what khoscope has not looked at.
        lambda: check(out(luo=luo(session(count=9, left_out=7), left_out=3))),
    ],
    "orphaned-session": [
        lambda: check(came(None)),
        lambda: check(came(luo())),
        lambda: check(came(luo(session(retrieved=True)))),
        # It was finished, and waits to be closed.
        lambda: check(came(luo(session(files=0, retrieved=True)))),
        # Another one could not be finished, or it could in the end.
        lambda: check(came(luo(session(retrieved=True)), "Unable to finish", name="vm2")),
        lambda: check(came(luo(), "Unable to finish")),
        # No kexec is to come, and it was not there before.
        lambda: handed(luo(), luo(session())),
        lambda: handed(luo(session()), luo(session(retrieved=True))),
        # Nor is a session that this kernel has made.
        lambda: check(out(luo=luo(session()))),
        # Files that khoscope has not looked at are not missing.
        lambda: check(came(luo(session(count=9, left_out=7, retrieved=True)))),
    ],
    "image-without-kho": [lambda: image(False), lambda: image(True, 0x2000), lambda: one(FIXED)],
    "no-image": [lambda: image(True), lambda: image(True, 0x2000), lambda: one(FIXED)],
    "image-abi-differs": [lambda: next_kernel("kho-v5"), lambda: one(FIXED)],
    "next-without-kho": [
        lambda: loaded_next("kho=on"),
        lambda: loaded_next("kho=off kho=on"),
        # Whether it is on by default is not told, which is no error.
        lambda: loaded_next("quiet"),
        lambda: loaded_next("quiet -- kho=off"),
        # A file does not say.
        lambda: loaded_next(None),
        # Nothing is taken at all, as image-abi-differs says.
        lambda: loaded_next("kho=off", kho=("kho-v4",)),
        lambda: loaded_next("kho=off", kho=()),
    ],
    "next-without-liveupdate": [
        lambda: loaded_next("kho=on liveupdate=1", luo(session())),
        lambda: loaded_next(None, luo(session())),
        # This kernel's LUO is off, too.
        lambda: loaded_next("kho=on"),
        lambda: loaded_next("kho=on", luo(session()), luo=()),
        lambda: loaded_next("kho=on", luo(session()), kho=("kho-v4",)),
    ],
    "crash-image-with-kho": [
        lambda: crash_image(True),
        lambda: crash_image(False),
        lambda: image(True, 0x2000),
    ],
    "block-too-large": [
        lambda: one(FIXED, contig(19, phys=0)),
        lambda: one(INT_SIZES, contig(18, phys=0)),
        lambda: one(OLD, contig(10, phys=0)),
        lambda: claimed(
            owner(OwnerKind.RESERVE_MEM), 0, 1 << 24, contig(11, phys=1 << 23), abi=OLD
        ),
        # The next kernel is handed nothing, or has no limits.
        lambda: carried(INT_SIZES, contig(19, phys=0), "kho-v4"),
        lambda: carried(PLAIN, contig(19, phys=0), "kho-v4"),
        # bad-key speaks of those.
        lambda: one(INT_SIZES, contig(21, phys=0), ram=[(0, 1 << 32)]),
        lambda: one(OLD, contig(0, key=0)),
    ],
    "huge-order": [
        # An error is enough.
        lambda: one(INT_SIZES, contig(19, phys=0)),
        lambda: one(OLD, contig(11, phys=0)),
        lambda: one(FIXED, contig(10, phys=0), split(10, phys=1 << 30)),
        lambda: claimed(owner(OwnerKind.RESERVE_MEM), 0, 1 << 24, contig(11, phys=1 << 23)),
        # bad-key speaks of those.
        lambda: one(PLAIN, contig(21, phys=0), ram=[(0, 1 << 32)]),
        lambda: one(FIXED, contig(0, key=0)),
    ],
    "cut-at-node": [
        lambda: border(*SIDES, borders=[]),
        lambda: border(*SIDES, borders=[BORDER - 0x1000, BORDER + 0x1000]),
        # Smaller than the border's alignment: no block would have reached across.
        lambda: border(contig(0, phys=BORDER - 0x1000), contig(0, phys=BORDER)),
        lambda: border(contig(1, phys=BORDER - 0x2000), SIDES[1]),
        lambda: border(SIDES[0]),
        lambda: border(SIDES[1]),
        lambda: border(SIDES[0], contig(1, phys=BORDER), contig(1, phys=BORDER + 0x2000)),
        # One block: the kernel that made it does not cut.
        lambda: border(contig(3, phys=BORDER - 0x4000)),
        # Folios, each of which is restored by itself, and a part of one.
        lambda: border(replace(SIDES[0], compound=2), SIDES[1]),
        lambda: border(SIDES[0], replace(SIDES[1], compound=2)),
        lambda: border(SIDES[0], replace(SIDES[1], compound=-2)),
        # A client that is known restores what it has preserved.
        lambda: border(*SIDES, owner=OwnerKind.VMALLOC_PAGE),
        lambda: border(*SIDES, owner=OwnerKind.RESERVE_MEM),
        # Kernels before the radix tree do not cut.
        lambda: border(*SIDES, abi=XARRAY),
        # Nobody knows.
        lambda: check(replace(snapshot(PLAIN, SIDES, borders=[BORDER]), nodes=None)),
    ],
    "bad-node": [
        lambda: one(FIXED),
        # What became of the tree that was handed over is nobody's fault.
        lambda: check(with_incoming_problems()),
    ],
    "kernel-tainted": [lambda: one(FIXED, tainted=~(1 << 5) & 0xFFFF)],
    "both-types": [
        lambda: one(FIXED, split(3), split(2, CONTIG), contig(3, phys=AT + 0x8000)),
        lambda: one(POSTED, split(3)),
    ],
    "overlap": [
        lambda: one(FIXED, contig(3), contig(3, phys=AT + 0x8000), contig(0, phys=AT - 0x1000)),
        lambda: one(FIXED, split(3, CONTIG), split(3, SPLIT)),
    ],
    "type-mismatch": [
        lambda: one(FIXED, split(2), contig(3, phys=0), contig(0, CONTIG, 0x1000000)),
        # One page is both.
        lambda: one(FIXED, contig(0, SPLIT)),
        lambda: one(PLAIN, split(2)),
        # Nobody knows.
        lambda: one(FIXED, split(2, CONTIG, unread=1)),
        lambda: one(FIXED, contig(3, ones=1, odd=4)),
    ],
    "mixed-refcounts": [
        lambda: one(FIXED, contig(3), split(2, phys=0), folio(1), contig(3, head=5, phys=1 << 24)),
        lambda: one(FIXED, split(3, head=2)),
        lambda: one(FIXED, contig(3, head=0, free=8)),
        lambda: one(FIXED, contig(3, ones=1, odd=4, unread=1)),
    ],
    "wrong-after-restore": [
        lambda: one(PLAIN, split(2), contig(0, phys=0), replace(folio(3), phys=1 << 24)),
        lambda: one(POSTED, contig(2), contig(0, phys=0), replace(folio(3), phys=1 << 24)),
        lambda: one(FIXED, split(2), contig(3, phys=0), replace(folio(3), phys=1 << 24)),
        lambda: one(FIXED, contig(2, head=0, free=4)),
        *(
            lambda kind=kind: claimed(owner(kind), AT, 0x4000, folio(2))
            for kind in sorted(set(OwnerKind) - {OwnerKind.VMALLOC_PAGE})
        ),
        lambda: claimed(owner(OwnerKind.VMALLOC_PAGE), AT, 0x4000, split(2), NEXT_FOLIO),
    ],
    "needs-folio-restore": [
        lambda: one(FIXED, contig(2), split(2, phys=1 << 24), contig(0, phys=0)),
        *(
            lambda kind=kind: claimed(owner(kind), AT, 0x4000, folio(2))
            for kind in sorted(set(OwnerKind) - {OwnerKind.SLAB, OwnerKind.VM_STRUCT})
        ),
        # stale-entry speaks of those: they are no longer what was preserved.
        lambda: one(FIXED, contig(2, compound=3)),
        lambda: one(FIXED, contig(2, compound=Pages.COMPOUND_TAIL)),
        lambda: one(FIXED, folio(2, head=0, free=1)),
        lambda: one(FIXED, folio(2, unread=1)),
        # A kernel that makes a folio of whatever it restores.
        lambda: older(folio(2), abi=SMALL),
    ],
    "stale-entry": [lambda: one(FIXED, folio(3), split(2, phys=0), contig(2, phys=1 << 24))],
    "in-scratch": [
        lambda: one(FIXED, contig(2), scratch=[(AT + 0x4000, 0x1000), (AT - 0x1000, 0x1000)]),
        lambda: one(
            FIXED,
            fdt=fdt(subtrees=[Subtree("LUO", AT, 4), Subtree("x", None, 4), Subtree("y", AT, 0)]),
            scratch=[(AT + 4, 0x1000), (0, AT)],
        ),
        # An area of nothing, as a node without memory has one.
        lambda: one(FIXED, contig(2), scratch=[(AT + 0x1000, 0)]),
    ],
    "outside-ram": [lambda: one(FIXED, contig(2), ram=[(AT, AT + 0x4000), (1 << 32, 1 << 33)])],
    "preserved-offline": [
        lambda: one(FIXED, contig(2)),
        lambda: one(FIXED, contig(2), offline=[(AT - 0x1000, AT), (AT + 0x4000, AT + 0x5000)]),
        lambda: across([contig(2)], [contig(2)], offline=[(AT + 0x4000, AT + 0x5000)]),
        # Nobody knows where it is.
        lambda: one(FIXED, contig(0, key=0), offline=[(0, 0x1000)]),
    ],
    "bad-key": [lambda: one(FIXED, contig(20, phys=0), contig(0, SPLIT), ram=[(0, 1 << 32)])],
    "not-a-handover": [
        lambda: across([], []),
        lambda: handed(luo(), luo()),
        lambda: handed(luo(), luo(liveupdate_num=None)),
        lambda: handed(luo(), None),
        lambda: handed(None, luo()),
    ],
    "lost": [
        lambda: handed(luo(session()), luo(session())),
        lambda: handed(None, None, had=["x"], came=["x", "y"]),
        # It may be finished, or its files may be.
        lambda: handed(luo(session()), luo()),
        lambda: handed(luo(session()), luo(session(files=1, retrieved=True))),
        # Nobody knows what came.
        lambda: handed(luo(session()), None),
        lambda: handed(luo(session()), luo(live=False, problems=["a loop"])),
        lambda: handed(luo(session()), luo(live=False, raw="00")),
        lambda: handed(luo(session()), None, came=[], problems=["no FDT"]),
        lambda: across([contig(2)], [contig(2)]),
        # A leaf that has lost most of what was in it is no evidence, and neither is none.
        lambda: across([contig(2), OTHER, THIRD], [contig(2), OTHER, THIRD], evidence=[OTHER]),
        lambda: across([contig(2)], [contig(2)], evidence=[]),
        # A stamp is proof.
        lambda: across([contig(2), OTHER], [stamped(contig(2)), OTHER], evidence=[OTHER]),
    ],
    "order-changed": [lambda: across([contig(2)], [stamped(contig(2))])],
    "type-changed": [
        lambda: across([contig(2), OTHER_SPLIT], [stamped(contig(2)), stamped(OTHER_SPLIT)]),
        lambda: across([contig(0)], [stamped(contig(0))], abi=POSTED),
        lambda: across([split(2)], [contig(2, SPLIT)]),
    ],
    "wrong-refcounts": [
        lambda: across([contig(2), OTHER_SPLIT], [contig(2), OTHER_SPLIT]),
        # Its owner has put a reference more on it.
        lambda: across([contig(2)], [contig(2, head=3)]),
        lambda: across([contig(0)], [contig(0)]),
        lambda: across([split(2)], [stamped(split(2))]),
        # It was free when it was recorded: stale-entry spoke of it.
        lambda: across([contig(2, head=0, free=4)], [split(2, CONTIG)]),
        # Its pages were freed, and one of them, at least, was allocated again since.
        lambda: across([folio(2)], [split(2, CONTIG, pristine=3)], abi=PLAIN),
        # Its refcounts are what they were.
        lambda: across([folio(2)], [contig(2, pristine=4)]),
        # No other kernel leaves that, so it is somebody else's.
        lambda: across([folio(2)], [HALF], abi=PLAIN),
        lambda: across([contig(3)], [replace(HALF, order=3, compound=2)], abi=XARRAY),
    ],
    "not-restored": [
        lambda: across([contig(2)], [contig(2, private=1 << 40)]),
        lambda: handed(luo(session()), luo(session(retrieved=True))),
        lambda: handed(luo(session()), luo()),
        # orphaned-session says it.
        lambda: handed(luo(session()), luo(session())),
        # The root FDT, which the new kernel reads where it is.
        lambda: across([contig(0, phys=0x2000)], [stamped(contig(0, phys=0x2000))]),
    ],
    # Without a gate, nobody asks.
    "session-not-held": [gate, lambda: check(ready(holders=Holders()))],
    "session-not-kept": [gate, lambda: check(ready(holders=Holders([KEEPER, AGENT])))],
    "store-not-kept": [gate, lambda: check(ready(services=Services([store(preserve="no")])))],
    "nothing-carried": [gate, lambda: check(ready(sessions=[VM]))],
    "stored-fd-lost": [
        lambda: stored(store()),
        lambda: stored(store(kept=[], given=["ring"])),
        # PID 1 did not say.
        lambda: stored(store(kept=None)),
    ],
    "stored-fd-waits": [lambda: stored(store()), lambda: stored(store(kept=[]))],
    "unexpected": [
        lambda: across([split(2)], [stamped(split(2))], stamps=[stamped(split(2))]),
        # Two types of one block.
        lambda: across([split(2)], [stamped(split(2))], stamps=[stamped(contig(2))]),
    ],
}


def with_incoming_problems() -> Snapshot:
    facts = with_incoming_fdt()
    assert facts.incoming is not None
    state = replace(facts.incoming.tree.state, problems=BAD_ENTRY.problems, problem_count=1)
    tree = replace(facts.incoming.tree, state=state)
    return replace(facts, incoming=replace(facts.incoming, tree=tree))


def test_the_rules_are_those_that_were_asked_for() -> None:
    assert set(RULES) == {
        *("order-not-stored", "metadata-in-scratch", "claimed-twice"),
        *("type-not-stored", "type-mismatch", "mixed-refcounts", "wrong-after-restore"),
        *("stale-entry", "both-types", "overlap", "in-scratch", "outside-ram", "bad-key"),
        *("bad-node", "bad-fdt", "abi-not-bumped", "kernel-tainted", "huge-order", "cut-at-node"),
        *("blob-not-preserved", "fdt-nearly-full", "broken-vmalloc", "broken-luo"),
        *("image-without-kho", "no-image", "image-abi-differs", "block-too-large"),
        *("next-without-kho", "next-without-liveupdate"),
        *("orphaned-session", "session-not-held", "session-not-kept"),
        *("store-not-kept", "nothing-carried", "stored-fd-lost", "stored-fd-waits"),
        "crash-image-with-kho",
        *("phantom-cma", "scratch-unmovable", "scratch-too-small", "kho-unused"),
        *("not-finalized", "serialized-differs"),
        *("lost", "order-changed", "type-changed", "wrong-refcounts", "not-restored"),
        *("unexpected", "not-a-handover", "preserved-offline", "needs-folio-restore"),
        *("preserved-twice", "unpreserved-unknown", "wrong-restore-call", "failed", "events-lost"),
        "wrong-preserve-call",
    }
    warnings = {name for name, rule in RULES.items() if rule.severity == Severity.WARNING}
    assert warnings == {
        *("abi-not-bumped", "kernel-tainted", "not-restored", "unexpected"),
        *("huge-order", "fdt-nearly-full", "orphaned-session", "cut-at-node"),
        *("needs-folio-restore", "wrong-preserve-call"),
        *("phantom-cma", "scratch-unmovable", "scratch-too-small"),
        *("preserved-twice", "unpreserved-unknown", "failed", "events-lost"),
        *("session-not-kept", "store-not-kept", "stored-fd-waits"),
    }


def test_every_scope_is_known() -> None:
    assert {scope for rule in RULES.values() for scope in rule.finders} == SCOPES.keys()


def assert_fires(name: str, case: Fires) -> None:
    """One finding of this rule, at the place that the case says."""
    rule = RULES[name]
    assert rule.sentence
    report = case.report()
    found = [f for f in report.findings if f.rule == name]
    assert [(f.phys, f.order) for f in found] == [(case.phys, case.order)]
    assert report.counts[name] == 1
    assert found[0].severity == rule.severity
    assert found[0].message
    # What one rule says of two kernels is too much for somebody who has one of them.
    assert (found[0].explain != rule.explain) == case.here
    assert report.passed == (report.errors == 0 and not report.incomplete)
    assert (report.errors > 0) >= (rule.severity == Severity.ERROR)


def assert_silent(name: str, make: Callable[[], Report]) -> None:
    report = make()
    assert report.counts[name] == 0
    assert name not in {f.rule for f in report.findings}


@pytest.mark.parametrize("name", sorted(of_scopes(SCOPES.keys() - TRACE)))
def test_rule_fires(name: str) -> None:
    assert FIRES[name]
    for case in FIRES[name]:
        assert_fires(name, case)


@pytest.mark.parametrize("name", sorted(of_scopes(SCOPES.keys() - TRACE)))
def test_rule_is_silent(name: str) -> None:
    assert SILENT[name]
    for make in SILENT[name]:
        assert_silent(name, make)


@pytest.mark.parametrize(
    ("line", "ours", "release", "is_told"),
    [
        ("kho=on", "kho=on", "7.3", True),
        ("kho=off", "kho=on", "7.3", True),
        (None, "kho=on", "7.3", True),
        ("quiet", "kho=on", "7.3", False),
        ("", "kho=on", "7.3", False),
        ("quiet", "quiet", "7.3", False),
        # This very kernel, which is on without the word.
        ("quiet", "quiet", "7.2.0-test", True),
        ("quiet", "kho=on", "7.2.0-test", False),
        ("quiet", "", "7.2.0-test", False),
    ],
)
def test_a_default_that_no_image_tells(
    line: str | None, ours: str, release: str, is_told: bool
) -> None:
    report = loaded_next(line, ours=ours, release=release)
    said = [what for what in report.incomplete if "no image tells its default" in what]
    assert len(said) == (not is_told)
    assert not said or report.verdict == Verdict.INCOMPLETE


def test_which_sessions_nobody_can_retrieve() -> None:
    def said(*sessions: LuoSession, line: str = "kho=on") -> str:
        [found] = loaded_next(line, luo(*sessions)).findings
        return found.message

    missing = "7.3 has no liveupdate=on on its command line: nobody there can retrieve"
    assert said() == f"{missing} sessions"
    assert said(session()) == f"{missing} the session"
    assert said(session(), session("vm2")) == f"{missing} 2 sessions"
    assert "has liveupdate=n on its" in said(session(), line="kho=on liveupdate=n")


@pytest.mark.parametrize("block", [contig(2), split(2), contig(0)])
def test_what_the_oldest_kernels_restore(block: Block) -> None:
    """Of linux 6.18, pages stay compound; linux 6.17 has nothing but folios."""

    def said(abi: Abi, block: Block) -> list[str]:
        found = [f for f in older(block, abi=abi).findings if f.rule == "wrong-after-restore"]
        assert all("split_page()" in f.explain for f in found) or abi != XARRAY
        return [f.message for f in found]

    many = block.order > 0
    assert [text.endswith("and leave it a compound page") for text in said(XARRAY, block)] == (
        [True] * many
    )
    assert said(XARRAY, folio(2)) == []
    wrong = many and block == split(2)
    assert [text.endswith("restore it as 1/0") for text in said(SMALL, block)] == [True] * wrong
    assert bool(said(NO_LOAD_FIRST, block)) == (block == contig(2))


@pytest.mark.parametrize(
    ("finalized", "said"),
    [(None, "whether KHO is finalized is not known"), (False, "its clients preserve memory when")],
)
def test_what_is_not_finalized_yet_is_no_pass(finalized: bool | None, said: str) -> None:
    report = older(finalized=finalized, image=KexecImage(False))
    assert report.verdict == Verdict.INCOMPLETE
    assert any(said in why for why in report.incomplete)
    assert older(finalized=True).passed


@pytest.mark.parametrize("abi", [XARRAY, SMALL])
def test_what_is_used_in_place_is_not_restored(abi: Abi) -> None:
    """Whatever restoring would make of it: reserve_mem= only looks at its memory."""
    area = Owner(OwnerKind.RESERVE_MEM, "reserve_mem x")
    report = claimed(area, AT, 16 << 10, split(2), abi=abi)
    assert "wrong-after-restore" not in report.counts
    report = claimed(area, AT, 16 << 10, split(2, phys=AT + 0x10000), abi=abi)
    assert report.counts["wrong-after-restore"] == 1


def arrival_of(abi: Abi, before: Snapshot, *after: Block) -> Report:
    """The report across a kexec, of whose tree nothing is left."""
    now = snapshot(
        abi, [], boot_id=NEXT_BOOT, handover=HANDED_OVER, watched=(before, after), evidence=[]
    )
    return compare(before, now)


@pytest.mark.parametrize("finalizes", [False, True])
def test_what_was_not_serialized_is_lost(finalizes: bool) -> None:
    """Unless LUO serializes once more on the way into the kexec."""
    both = [folio(2), OTHER_FOLIO]
    made = snapshot(NO_LOAD_FIRST, both)
    chain = snapshot(NO_LOAD_FIRST, [folio(2)]).outgoing.tree
    before = replace(
        made,
        finalized=True,
        outgoing=replace(made.outgoing, serialized=chain),
        liveupdate=LuoState(finalizes, []),
    )
    report = arrival_of(NO_LOAD_FIRST, before, *both)
    assert report.fates == ({"restored": 2} if finalizes else {"restored": 1, "lost": 1})
    lost = [f.phys for f in report.findings if f.rule == "lost"]
    assert lost == ([] if finalizes else [OTHER_FOLIO.phys])
    bad = replace(chain, state=BAD_ENTRY)
    before = replace(before, outgoing=replace(before.outgoing, serialized=bad))
    said = "the earlier snapshot: 1 bad tree entries"
    assert said in arrival_of(NO_LOAD_FIRST, before, *both).incomplete


def test_stamps_that_are_orders_alone() -> None:
    """A block as the boot leaves it may be restored still, and nobody is blamed for it."""
    waiting = split(2, pristine=4, private=2)
    report = arrival_of(SMALL, snapshot(SMALL, [folio(2)]), waiting)
    assert (report.fates, report.counts["wrong-refcounts"]) == ({"not-known": 1}, 0)
    assert report.verdict == Verdict.INCOMPLETE
    restored = folio(2, pristine=4)
    assert arrival_of(SMALL, snapshot(SMALL, [folio(2)]), restored).fates == {"restored": 1}


@pytest.mark.parametrize(
    ("abi", "says", "not_says"),
    [(NO_LOAD_FIRST, "may be called again", "EEXIST"), (XARRAY, "EEXIST", "right before")],
)
def test_what_can_be_done_about_an_old_list(abi: Abi, says: str, not_says: str) -> None:
    """Up to linux 6.18, nothing: aborting forgets what is preserved."""
    (found,) = [
        f for f in older(folio(2), listed=[], abi=abi).findings if f.rule == "serialized-differs"
    ]
    assert says in found.explain
    assert not_says not in found.explain


def test_where_the_chain_is_said_to_be() -> None:
    """The root FDT leads to the first chunk, and not to the xarrays."""
    report = older(folio(2))
    assert "bad-fdt" not in report.counts
    made = snapshot(XARRAY, [folio(2)])
    chain = Tree(TreeState(0x7000), [], made.outgoing.tree.leaves)
    facts = replace(made, finalized=True, outgoing=replace(made.outgoing, serialized=chain))
    (found,) = [f for f in check(facts).findings if f.rule == "bad-fdt"]
    assert "preserved-memory-map is 0x1000, the first chunk is 0x7000" in found.message


@pytest.mark.parametrize(
    ("says", "kept", "size", "is_wrong"),
    [
        (2 << 20, 40, 2 << 20, False),
        (2 << 20, 40, 1 << 20, True),
        # khoscope keeps 64 MiB of all blobs together.
        (100, 60, 100, False),
        (100, 4, 100, False),
        (100, 60, 60, True),
    ],
)
def test_an_fdt_of_which_khoscope_has_not_all(
    says: int, kept: int, size: int, is_wrong: bool
) -> None:
    """A limit of khoscope's is no fault of the kernel's, but no verdict passes either."""
    blob = (bytes.fromhex("d00dfeed") + says.to_bytes(4, "big")).ljust(60, b"\0")[:kept]
    report = check(
        out(fdt=subtrees(Subtree("memblock", AT, size)), blobs={"subtree memblock": blob})
    )
    assert report.counts["bad-fdt"] == is_wrong
    said = f"outgoing subtree memblock: an FDT, of whose {size:,} bytes not all were looked at"
    assert (said in report.incomplete) == (not is_wrong)


@pytest.mark.parametrize("abi", [PLAIN, POSTED, FIXED])
def test_nothing_is_wrong_with_good_memory(abi: Abi) -> None:
    blocks = [contig(0)]
    if abi is not POSTED:
        blocks.append(split(4, phys=1 << 25))
    if abi is not PLAIN:
        blocks.append(contig(4, phys=1 << 26))
    report = one(abi, *blocks)
    wanted = {"type-not-stored", "abi-not-bumped"} if abi is POSTED else set()
    assert set(report.counts) == wanted
    assert report.passed == (abi is not POSTED)
    assert report.blocks == len(blocks)


def test_messages_name_what_matters() -> None:
    def message(report: Report, name: str) -> str:
        return next(f.message for f in report.findings if f.rule == name)

    assert "key bit 63, the tree stores bits 59:0" in message(one(POSTED), "type-not-stored")
    assert message(one(REFUSED), "type-not-stored") == (
        "the page type is key bit 63, the tree takes keys of 53 bits: "
        "preserving split memory fails with -ERANGE"
    )
    for abi, here, elsewhere in (
        (POSTED, "kho_radix_add_page() drops it", "ERANGE"),
        (REFUSED, "fails with -ERANGE", "contig"),
    ):
        (explain,) = (f.explain for f in one(abi).findings if f.rule == "type-not-stored")
        assert here in explain
        assert elsewhere not in explain
    forecast = message(one(PLAIN, contig(2)), "wrong-after-restore")
    assert forecast == "1/0 now, 7.2.0-test as the next kernel will restore it as 1/1"
    assert message(one(FIXED, split(2, CONTIG)), "type-mismatch").startswith("recorded contig")
    mixed = message(one(FIXED, contig(3, ones=1, odd=4)), "mixed-refcounts")
    assert "first odd page 4" in mixed
    assert message(across([split(2)], [contig(2, SPLIT)]), "wrong-refcounts") == (
        "restored as 1/0, was 1/1"
    )
    many = replace(BAD_ENTRY, problem_count=10)
    assert [f.message for f in one(FIXED, state=many).findings][-1] == "and 9 more bad entries"


def test_folios_are_summed_up_by_owner() -> None:
    """However many there are: those of one owner are one finding."""
    owners = [Owner(OwnerKind.VM_STRUCT, "vm_struct of a"), Owner(OwnerKind.MEMFD, "memfd b")]
    claims = Claims(
        np.array([AT, AT + 0x10000], np.uint64),
        np.array([0x10000, 0x10000], np.uint64),
        np.array([0, 1], np.uint32),
    )
    blocks = [
        *(folio(1, phys=AT + n * 0x2000) for n in range(16)),
        folio(3, phys=1 << 24),
        *(folio(2, phys=(1 << 25) + n * 0x4000) for n in range(5)),
        folio(0, phys=1 << 26, compound=Pages.NOT_COMPOUND),
    ]
    facts = out(*blocks, owners=owners, claims=[claims])
    chunk = next(iter(facts.outgoing.blocks))
    side = replace(facts.outgoing, blocks=[chunk[:3], chunk[3:10], chunk[10:]])
    report = check(replace(facts, outgoing=side))
    found = [f.message for f in report.findings if f.rule == "needs-folio-restore"]
    assert found == [
        "8 folios (16 pages) of vm_struct of a, at 0x40000, 0x42000, 0x44000, …",
        "6 folios (28 pages) of an unknown owner, at 0x1000000, 0x2000000, 0x2004000, …",
    ]
    assert report.errors == 0


HUGETLB = {"page_type": 0xF4000000, "private": 0x12}


def test_tails_that_share_struct_pages_are_told() -> None:
    shares = {**HUGETLB, "shared": (1 << 18) - 64}
    report = check(out(folio(18, phys=1 << 30, **shares), folio(9, phys=1 << 26, **HUGETLB)))
    [found] = [f.message for f in report.findings if f.rule == "needs-folio-restore"]
    assert found == (
        "2 folios (262,656 pages, 262,080 tail struct pages shared by HVO) of an unknown owner,"
        " at 0x4000000, 0x40000000"
    )
    [huge] = [f.message for f in report.findings if f.rule == "huge-order"]
    assert huge.endswith("the pages are 1/0 compound order 18 in the 64 pages looked at")
    assert not report.incomplete
    # Only tails of a folio with a page type have no facts of their own.
    shares = {**HUGETLB, "shared": 7}
    for lacking in (folio(4, shared=7), contig(4, **shares), folio(4, **shares, unread=1)):
        said = check(out(lacking)).incomplete
        assert any("have other pages than their order says" in each for each in said)


def test_folios_that_were_freed_or_not_in_an_older_file() -> None:
    """It does not say which, and so there is no verdict."""
    old = Pages.UNRECORDED
    for now, lacking in (
        (split(2, CONTIG, pristine=old), True),
        (contig(2, pristine=old), True),
        # What became of these is known all the same.
        (split(2, CONTIG, pristine=old, free=1), False),
        (folio(2, pristine=old), False),
        (contig(2, head=0, pristine=old), False),
    ):
        report = across([folio(2)], [now], abi=PLAIN)
        assert bool(report.incomplete) == lacking
        assert report.counts["wrong-refcounts"] == 0
    report = across([contig(2)], [contig(2, pristine=old)])
    assert report.passed


@pytest.mark.parametrize(
    ("offline", "said"),
    [
        ([(0x2000, 0x1000)], "are empty, or not in order"),
        ([(0, 0x1000), (0x1000, 0x2000)], "are empty, or not in order"),
        ([(0, 1 << 40)], "not all of it is RAM"),
        ([(1 << 40, 1 << 41)], "not all of it is RAM"),
    ],
)
def test_offline_memory_that_cannot_be(offline: list[tuple[int, int]], said: str) -> None:
    report = one(FIXED, contig(0), offline=offline)
    assert [said in what for what in report.incomplete] == [True]


def test_offline_memory_that_is_not_known() -> None:
    facts = replace(snapshot(FIXED, [contig(0)]), offline=None)
    assert check(facts).incomplete == ["which memory is offline is not known"]
    read = replace(facts, unreadable=["which memory is offline (mem_section)"])
    assert check(read).incomplete == ["cannot be read: which memory is offline (mem_section)"]


# Trees against slow models

places = st.tuples(
    st.sampled_from([0, 1 << 15, 1 << 18]), st.integers(0, 31), st.sampled_from([0, 0, 1, 2, 4, 16])
)


@given(st.sets(st.tuples(places, st.sampled_from([CONTIG, SPLIT])), max_size=14))
def test_overlap_and_both_types_against_a_model(
    made: set[tuple[tuple[int, int, int], int]],
) -> None:
    blocks = {((base + page >> order << order, order), kind) for (base, page, order), kind in made}
    report = one(
        FIXED,
        *(Block(pfn << 12, order, kind) for (pfn, order), kind in blocks),
        ram=[(0, 1 << 40)],
    )
    inside = {
        (pfn << 12, order)
        for (pfn, order), _ in blocks
        if any(o > order and p <= pfn < p + (1 << o) for (p, o), _ in blocks)
    }
    count = sum((at << 12, order) in inside for (at, order), _ in blocks)
    assert report.counts["overlap"] == count
    assert {(f.phys, f.order) for f in report.findings if f.rule == "overlap"} == inside
    both = [place for place, kind in blocks if kind == CONTIG and (place, SPLIT) in blocks]
    found = [(f.phys, f.order) for f in report.findings if f.rule == "both-types"]
    assert sorted(found) == sorted((pfn << 12, order) for pfn, order in both)


# What is kept, and what is not the whole truth


def test_findings_have_a_limit_and_counts_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "KEPT", 3)
    facts = snapshot(
        FIXED,
        [split(2, CONTIG, phys=n << 20) for n in range(10)],
        log=[f"line {n}" for n in range(5)],
    )
    chunk = next(iter(facts.outgoing.blocks))
    side = replace(facts.outgoing, blocks=[chunk[:2], chunk[2:4], chunk[4:]])
    report = check(replace(facts, outgoing=side))
    assert report.counts["type-mismatch"] == 10
    assert report.counts["kernel-tainted"] == 5
    kept = [f.phys for f in report.findings if f.rule == "type-mismatch"]
    assert kept == [0, 1 << 20, 2 << 20]
    assert len(report.kept["kernel-tainted"]) == 3
    assert (report.errors, report.warnings, report.blocks) == (20, 5, 10)


def test_what_follows_from_a_lost_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted like all else, and kept beside what stands for itself, however much there is."""
    monkeypatch.setattr(run, "KEPT", 2)
    lost = [split(2, CONTIG, phys=n << 20) for n in range(5)]
    own = [contig(3, ones=1, odd=4, phys=(10 + n) << 20) for n in range(3)]
    report = one(POSTED, *lost, *own)
    assert report.follows == {"type-not-stored": {"type-mismatch": 5, "wrong-after-restore": 5}}
    assert report.counts["wrong-after-restore"] == 8
    kept = [(f.phys, f.follows) for f in report.findings if f.rule == "wrong-after-restore"]
    first, second = [(n << 20, "type-not-stored") for n in range(2)]
    assert kept == [(10 << 20, ""), (11 << 20, ""), first, second]


@pytest.mark.parametrize("abi", [FIXED, REFUSED])
def test_what_follows_from_no_lost_type(abi: Abi) -> None:
    """Where the type is kept, or refused, somebody has split the block afterwards."""
    report = one(abi, split(2, CONTIG))
    assert report.counts["type-mismatch"] == 1
    assert report.follows == {}


def test_what_follows_from_a_lost_order() -> None:
    """Whatever rule speaks of a block that is none; and what is wrong besides stands for itself."""
    beyond = 1 << 31  # as a kernel says it: no struct pages are there
    ram = [(1 << 30, 5 << 30)]
    pages = [Block(at, unread=beyond) for at in (1 << 32, (1 << 32) + (1 << 14), 3 << 30)]
    own = [Block(1 << 31, 2, compound=2, head=0, free=1), Block(6 << 30, 1)]
    report = one(EARLY, *pages, *own, ram=ram)
    # One of the pages begins at 0 now, and is larger than all memory.
    assert report.follows == {
        "order-not-stored": {"outside-ram": 3, "bad-key": 3, "in-scratch": 1, "overlap": 2}
    }
    assert report.own("stale-entry") == report.own("outside-ram") == 1
    assert (report.own("bad-key"), report.own("overlap"), report.incomplete) == (0, 0, [])
    first = report.reason
    assert first is not None
    assert first.message == (
        "order 0 is key bit 50, the tree stores bits 49:0: each single page is handed over as "
        "another block"
    )
    # A real one is covered by a real one.
    inside = one(EARLY, Block(1 << 31, 4), Block((1 << 31) + (1 << 15), 1), ram=ram)
    assert (inside.own("overlap"), inside.follows) == (1, {})


def test_clients_of_a_kernel_that_loses_the_order() -> None:
    """What they did preserve is not preserved: not their fault.  What they did not is."""
    at, bare = (1 << 30) + (5 << 14), (1 << 30) + (99 << 14)
    root = fdt(compatible="kho-v2", subtrees=[Subtree("x", at, 64), Subtree("y", bare, 64)])
    owners, claimed = claims_of(
        (AREA, at, 1 << 14), (ONE, at + (1 << 14), 1 << 14), (TWO, bare + (1 << 14), 1 << 14)
    )
    blocks = [Block(each, unread=1 << 31) for each in (at, at + (1 << 14))]
    for abi, wanted in ((EARLY, "order-not-stored"), (Abi.for_page_shift(14), None)):
        facts = out(*blocks, abi=abi, fdt=root, owners=owners, claims=claimed)
        report = check(replace(facts, ram=np.array([[1 << 30, 5 << 30]], np.uint64)))
        found = {(f.rule, f.phys): f.follows for f in report.findings}
        assert found["blob-not-preserved", bare] == ""
        assert found["blob-not-preserved", bare + (1 << 14)] == ""
        for name, phys in (
            ("blob-not-preserved", at),
            ("blob-not-preserved", at + (1 << 14)),
            ("broken-vmalloc", at),
        ):
            assert found.get((name, phys)) == wanted
        assert report.own("blob-not-preserved") == 2


@pytest.mark.parametrize(("magic", "says"), [(32, "warns"), (None, "gives it away")])
def test_what_becomes_of_the_second_restore(magic: int | None, says: str) -> None:
    owners, claimed = claims_of((ONE, AT, 0x3000), (TWO, AT, 0x1000), (THREE, AT + 0x2000, 0x1000))
    abi = replace(PLAIN, stamp=Stamp(magic_shift=magic))
    found = check(out(abi=abi, owners=owners, claims=claimed)).findings
    said = [f for f in found if f.rule == "claimed-twice"]
    assert [(f.message, f.phys) for f in said] == [
        (f"{ONE} and {TWO} lead to the same page", AT),
        (f"{ONE} and {THREE} lead to the same page", AT + 0x2000),
    ]
    for finding in said:
        assert says in finding.explain
        assert ("warns" in finding.explain) == bool(magic)


def test_nothing_follows_from_what_was_not_asked() -> None:
    asked = RuleSelection(frozenset({"type-mismatch"}))
    report = check(snapshot(POSTED, [split(2, CONTIG)]), asked=asked)
    assert (report.errors, report.follows) == (1, {})


def test_errors_come_first_and_the_kernel_before_blocks() -> None:
    report = one(POSTED, split(2), tainted=1 << 5)
    names = [f.rule for f in report.findings]
    assert names[0] == "type-not-stored"
    assert set(names[-2:]) == {"abi-not-bumped", "kernel-tainted"}


def test_unread_pages_are_no_pass() -> None:
    report = one(FIXED, contig(2, unread=1), contig(0, phys=0))
    assert report.incomplete == ["the struct pages of 1 blocks could not be read"]
    assert (report.errors, report.passed) == (0, False)


def test_pages_outside_ram_are_no_excuse() -> None:
    report = one(FIXED, contig(2, phys=1 << 40, unread=4))
    assert report.incomplete == []
    assert set(report.counts) == {"outside-ram"}


def test_tree_that_moved_is_no_pass() -> None:
    report = one(FIXED, contig(2), state=TreeState(0x1000, reads=4, moved=2))
    assert report.incomplete == ["2 blocks came or went while the tree was read"]
    assert not report.passed


def test_scan_that_did_not_see_everything_is_no_pass() -> None:
    was = snapshot(FIXED, [])
    now = snapshot(FIXED, [], boot_id=NEXT_BOOT, handover=HANDED_OVER, watched=(was, []))
    assert compare(was, now).passed
    every = (1 << 32) // FIXED.page_size
    for scan, what in ((None, "all"), (Scan(every - 7, 7), "7")):
        report = compare(was, replace(now, scan=scan))
        assert report.incomplete == [f"{what} struct pages could not be searched for stamps"]
        assert not report.passed


def test_recorded_blocks_that_cannot_be_read_are_no_pass() -> None:
    report = across([contig(2), OTHER], [contig(2, unread=1), OTHER])
    assert report.fates == {"unread": 1, "restored": 1}
    assert report.incomplete == ["the pages of 1 recorded blocks could not be read"]
    assert not report.passed


# Across the kexec


def fate(before: Block, after: Block, **more: object) -> str:
    report = across([before], [after], **more)  # type: ignore[arg-type]
    assert report.fates is not None
    [(name, count)] = report.fates.items()
    assert count == 1
    return name


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (split(2), split(2), "restored"),
        (contig(2), contig(2), "restored"),
        (contig(2), split(2, CONTIG), "restored"),
        (folio(2), folio(2), "restored"),
        (contig(0), contig(0, head=4), "restored"),
        (contig(2), stamped(contig(2)), "not-restored"),
        (contig(2), contig(2, head=0), "released"),
        (contig(2), contig(2, free=1), "released"),
        (contig(2), contig(2, head=-1), "released"),
        (contig(2), contig(2, flags=LRU), "released"),
        (folio(2), replace(folio(2), flags=LRU), "restored"),
        (contig(2), contig(2, compound=3), "released"),
        (contig(2), contig(2, compound=Pages.COMPOUND_TAIL), "released"),
        (folio(2), contig(2), "released"),
        (folio(2), split(2, CONTIG), "released"),
        (folio(2), split(2, CONTIG, pristine=3), "released"),
        (folio(2), split(2, CONTIG, pristine=4), "restored"),
        (folio(2), contig(2, pristine=4), "restored"),
        (folio(2), contig(2, pristine=4, head=0), "released"),
        (contig(2), split(2, CONTIG, pristine=4), "restored"),
        (contig(2), contig(2, page_type=SLAB), "released"),
        (contig(3), contig(3, ones=1, odd=4), "released"),
        (contig(2), contig(2, unread=1), "unread"),
    ],
)
def test_fate(before: Block, after: Block, wanted: str) -> None:
    assert fate(before, after) == wanted
    lost = fate(before, after, handover=Handover(False, "", 0))
    assert lost == (wanted if wanted in ("not-restored", "unread") else "lost")


RESERVE_MEM = Owner(OwnerKind.RESERVE_MEM, "reserve_mem x")


def in_place(
    *spots: Subtree,
    claimed: int | None = None,
    owner: Owner = RESERVE_MEM,
    luo: Luo | None = None,
) -> Counter[str] | None:
    """What becomes of a block that keeps its stamp."""
    was = out(contig(2), fdt=subtrees(*spots), luo=luo)
    if claimed is not None:
        owners = [Owner(OwnerKind.FILE, "x"), owner]
        rows = ([0, claimed], [0x1000, 0x2000], [0, 1])
        claims = Claims(
            *(np.array(c, t) for c, t in zip(rows, Claims.DTYPES.values(), strict=True))
        )
        was = replace(was, outgoing=replace(was.outgoing, owners=owners, claims=[claims]))
    now = snapshot(
        FIXED,
        [],
        boot_id=NEXT_BOOT,
        handover=HANDED_OVER,
        incoming=[],
        watched=(was, [stamped(contig(2))]),
    )
    return compare(was, now).fates


@pytest.mark.parametrize(
    ("fates", "wanted"),
    [
        (in_place(), "not-restored"),
        (in_place(Subtree("LUO", AT, 8)), "not-restored"),
        (in_place(Subtree("LUO", AT, 8), luo=luo()), "not-restored"),
        (in_place(Subtree("LUO", AT, 8), luo=luo_v1()), "in-place"),
        (in_place(Subtree("x", AT, 8), luo=luo_v1()), "not-restored"),
        (in_place(Subtree("kexec-metadata", AT + 0x3FFF, 1)), "in-place"),
        (in_place(Subtree("kexec-metadata", AT + 0x4000, 1)), "not-restored"),
        (in_place(Subtree("memblock", None, 1), Subtree("memblock", AT, 1)), "in-place"),
        (in_place(claimed=AT), "in-place"),
        (in_place(claimed=AT - 0x1000), "in-place"),
        (in_place(claimed=AT - 0x2000), "not-restored"),
        (in_place(claimed=AT + 0x1000), "not-restored"),
        (in_place(claimed=AT, owner=FLB_LIST), "in-place"),
        (in_place(claimed=AT, owner=Owner(OwnerKind.LUO, "LUO: list of sessions")), "not-restored"),
    ],
)
def test_what_is_used_in_place_is_not_missed(fates: Counter[str], wanted: str) -> None:
    assert fates == {wanted: 1}


def test_what_is_used_in_place_is_compared() -> None:
    at = contig(2, phys=0x2000)
    report = across([at], [stamped(at, order=3)])
    assert report.fates == {"in-place": 1}
    assert set(report.counts) == {"order-changed"}


def test_what_was_released_is_no_finding() -> None:
    report = across([split(2)], [split(2, head=0, free=4)])
    assert (dict(report.counts), report.passed) == ({}, True)


def test_all_is_well() -> None:
    blocks = [contig(2), OTHER_SPLIT, replace(folio(3), phys=1 << 24)]
    report = across(blocks, blocks)
    assert (dict(report.counts), report.fates, report.passed) == ({}, {"restored": 3}, True)


def test_not_restored_alone_passes() -> None:
    report = across([contig(2)], [stamped(contig(2))], stamps=[stamped(contig(2))])
    assert (dict(report.counts), report.passed) == ({"not-restored": 1}, True)


@pytest.mark.parametrize("boot_id", [None, "00000000-0000-0000-0000-000000000009"])
def test_other_blocks_than_recorded_were_looked_at(boot_id: str | None) -> None:
    was, other = snapshot(FIXED, [contig(2)]), snapshot(FIXED, [contig(2)])
    other = replace(other, kernel=replace(other.kernel, boot_id=boot_id))
    now = snapshot(FIXED, [], boot_id=NEXT_BOOT, watched=(other, [contig(2)]))
    for after in (now, replace(now, watching=None)):
        with pytest.raises(KhoscopeError, match="does not hold the pages"):
            compare(was, after)


@pytest.mark.parametrize("watched", [[], [contig(1)], [contig(2), OTHER]])
def test_lists_of_recorded_blocks_that_differ(watched: list[Block]) -> None:
    was = snapshot(FIXED, [contig(2)])
    now = snapshot(FIXED, [], boot_id=NEXT_BOOT, watched=(was, watched))
    with pytest.raises(KhoscopeError, match="do not list the same recorded blocks"):
        compare(was, now)


def test_other_page_size() -> None:
    was = snapshot(Abi.for_page_shift(14), [])
    now = snapshot(FIXED, [], boot_id=NEXT_BOOT, watched=(was, []))
    with pytest.raises(KhoscopeError, match="pages of 16384 and 4096 bytes"):
        compare(was, now)


def test_what_could_not_be_read_is_incomplete() -> None:
    """A vmcore may lack pages of the kernel's heap."""
    facts = snapshot(FIXED, [contig(2)])
    report = check(replace(facts, unreadable=["where RAM is"]))
    assert report.incomplete == ["cannot be read: where RAM is"]
    assert not report.passed
    assert check(facts).passed


def test_facts_without_the_blocks_of_the_tree_are_incomplete() -> None:
    whole = snapshot(PLAIN, [Block(0x1000)])
    assert check(whole).passed
    report = check(replace(whole, outgoing=replace(whole.outgoing, blocks=[])))
    assert not report.passed
    assert "the facts are of 0" in report.incomplete[0]


def test_an_earlier_snapshot_that_moved_is_incomplete() -> None:
    before = snapshot(PLAIN, [Block(0x1000)], state=TreeState(0x1000, moved=5))
    after = snapshot(
        PLAIN,
        [],
        boot_id="00000000-0000-0000-0000-000000000002",
        handover=Handover(True, before.kernel.release, 1),
        watched=(before, [Block(0x1000)]),
    )
    report = compare(before, after)
    assert not report.errors
    assert not report.passed
    assert report.incomplete == [
        "the earlier snapshot: 5 blocks came or went while the tree was read"
    ]


# Where NUMA nodes meet


def arrival_across_nodes(
    blocks: Iterable[Block], left: Iterable[int], borders: Iterable[int]
) -> list[tuple[str, int | None, str, bool]]:
    """
    What is found after a kexec when some blocks still have their stamps.

    :return: rule, address, message, and whether the explanation is about the kernel.
    """
    every = [replace(block, ones=(1 << block.order) - 1) for block in blocks]
    was = snapshot(PLAIN, every, borders=borders)
    gone = {*left}
    now = [
        replace(b, private=PLAIN.stamp.encode(b.order)) if i in gone else b
        for i, b in enumerate(every)
    ]
    after = snapshot(
        PLAIN, [], boot_id=NEXT_BOOT, handover=HANDED_OVER, watched=(was, now), incoming=every
    )
    return [
        (f.rule, f.phys, f.message, "The kernel is wrong here" in f.explain)
        for f in compare(was, after).findings
    ]


SKIPPED = (
    "skipped at the border of nodes 0 and 1 ({border:#x}): the block at {first:#x} was restored, "
    "and kho_restore_pages() steps over this one; the pages are {pages}"
)


def test_what_restore_has_stepped_over() -> None:
    said = SKIPPED.format(border=BORDER, first=BORDER - 0x4000, pages="1/1")
    assert arrival_across_nodes(SIDES, [1], [BORDER]) == [("not-restored", BORDER, said, True)]
    # Of a larger block, all but the first part, on either side of the border.
    found = arrival_across_nodes(CUT, [1, 2, 3], [ODD])
    assert {phys for _, phys, _, _ in found} == {block.phys for block in CUT[1:]}
    assert len(found) == 3
    for _, _, message, kernels in found:
        assert message.startswith(
            f"skipped at the border of nodes 0 and 1 ({ODD:#x}): the block at {CUT[0].phys:#x} was"
        )
        assert kernels


@pytest.mark.parametrize(
    ("blocks", "left", "borders"),
    [
        # Nothing was restored, or the second part alone.
        (SIDES, [0, 1], [BORDER]),
        (SIDES, [0], [BORDER]),
        # There is no border, or another.
        (SIDES, [1], []),
        (SIDES, [1], [BORDER + 0x1000]),
        # The parts are not those of one block.
        ((SIDES[0], contig(1, phys=BORDER)), [1], [BORDER]),
        # A part of what restore would have stepped over was restored, or is not there.
        (CUT, [1, 2], [ODD]),
        ((CUT[0], CUT[2], CUT[3]), [1, 2], [ODD]),
    ],
)
def test_what_restore_has_not_stepped_over(
    blocks: Iterable[Block], left: list[int], borders: list[int]
) -> None:
    found = arrival_across_nodes(blocks, left, borders)
    assert len(found) == len(left)
    for rule, _, message, kernels in found:
        assert (rule, kernels) == ("not-restored", False)
        assert message.startswith("not claimed by anybody")


def test_the_forecast_counts_pages() -> None:
    (found,) = border(*CUT, borders=[ODD]).findings
    assert found.message == (
        "one kho_restore_pages() of 0x4040000..0x4048000 will restore 4 pages and skip 4 pages: "
        "the blocks are cut at the border of nodes 0 and 1 (0x4045000)"
    )
    (found,) = border(contig(0, phys=ODD - 0x1000), contig(0, phys=ODD), borders=[ODD]).findings
    assert "will restore 1 page and skip 1 page" in found.message


def test_nodes_that_are_not_known_are_no_pass() -> None:
    facts = snapshot(FIXED, [contig(2)])
    assert check(facts).passed
    report = check(replace(facts, nodes=None))
    assert report.incomplete == ["where NUMA nodes meet is not known"]
    assert not report.passed


def test_nodes_that_contradict_each_other() -> None:
    facts = snapshot(FIXED, [contig(2)])
    order = "NUMA nodes: there are none, two of one number, or they are not in order"
    for nodes, said in (
        ([], order),
        ([Node(0, 0, 1 << 30), Node(0, 1 << 30, 1 << 31)], order),
        ([Node(0, 1 << 30, 1 << 31), Node(1, 0, 1 << 30)], order),
        ([Node(0, 1 << 30, 1 << 30)], "NUMA nodes: one without memory"),
    ):
        report = check(replace(facts, nodes=nodes))
        assert report.incomplete == [f"facts contradict each other: {said}"]


#: Looks of blocks of order 2: every rule that judges them by their looks has something to find.
LOOKS: list[dict[str, Any]] = [
    {},
    {"ones": 3},
    {"type": KHO_PAGE_SPLIT, "ones": 3},
    {"type": KHO_PAGE_SPLIT},
    {"ones": 1},
    {"others": 2, "odd": 2},
    {"head": 0},
    {"free": 4},
    {"compound": 2},
    {"compound": 5},
    {"compound": Pages.COMPOUND_TAIL},
    {"unread": 1},
    {"pristine": 7},
    {"page_type": 0xF5000000},
    {"flags": 16},
    {"private": FIXED.stamp.encode(2, KHO_PAGE_CONTIG)},
    {"private": FIXED.stamp.encode(2, KHO_PAGE_SPLIT), "ones": 3},
    {"private": FIXED.stamp.encode(3)},
]


def in_stretches(was: list[int], now: list[int], runs: list[int]) -> list[Block]:
    """Blocks of order 2 side by side, so many of each look; recorded as they were."""
    every = [
        pair for pair, run in zip(zip(was, now, strict=True), runs, strict=True) for _ in range(run)
    ]
    return [
        Block((i + 1) << 14, 2, **{**LOOKS[new], "type": LOOKS[old].get("type", 0)})
        for i, (old, new) in enumerate(every)
    ]


def told(report: Report) -> object:
    found = [(f.rule, f.phys, f.order, f.message, f.explain, f.follows) for f in report.findings]
    return found, report.counts, report.follows, report.fates, report.incomplete


@given(
    st.lists(st.integers(0, len(LOOKS) - 1), min_size=6, max_size=6),
    st.lists(st.integers(0, len(LOOKS) - 1), min_size=6, max_size=6),
    st.lists(st.integers(5, 20), min_size=6, max_size=6),
    st.sampled_from([FIXED, POSTED]),
)
def test_what_looks_alike_is_judged_once(
    was: list[int], now: list[int], runs: list[int], abi: Abi
) -> None:
    """It is told as if each block were judged by itself: by nothing that tells them apart."""
    scratch, offline = [(20 << 14, 5 << 14)], [(50 << 14, 52 << 14)]
    came = Handover(True, "7.2.0-test", 1)

    def reports(alike: bool) -> list[object]:
        with pytest.MonkeyPatch.context() as patch:
            counted: list[int] = []
            for module in (columns, handover):
                real = module.stretches

                def seen(every: Any, real: Any = real) -> Any:
                    found = real(every)
                    counted.append(0 if found is None else len(found[0]))
                    return found if alike else None

                patch.setattr(module, "stretches", seen)
            blocks = in_stretches(was, was, runs)
            before = snapshot(abi, blocks, scratch=scratch, offline=offline)
            after = snapshot(
                abi,
                [],
                boot_id="00000000-0000-0000-0000-000000000002",
                handover=came,
                incoming=[],
                watched=(before, in_stretches(was, now, runs)),
            )
            found = [told(check(before)), told(compare(before, after))]
            assert any(counted)
            return found

    assert reports(alike=True) == reports(alike=False)
