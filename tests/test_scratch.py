# SPDX-License-Identifier: LGPL-2.1-or-later
"""What KHO costs a host: what follows from facts, and how it is shown."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khoscope.abi.kho_fdt import Subtree
from khoscope.checks import check
from khoscope.cli import main
from khoscope.facts import diff, store
from khoscope.facts.brief import of_kernel
from khoscope.facts.clients import Claims, Luo, LuoSession, LuoState, Owner, OwnerKind
from khoscope.facts.scratch import (
    Sizes,
    areas,
    asked_for,
    cost,
    enough,
    needs,
    pinnable,
    scratch_sizes,
    users,
)
from khoscope.facts.services import KeptFd, Service, Services
from khoscope.facts.snapshot import (
    Handover,
    KexecImage,
    Memory,
    Node,
    PageUse,
    ScratchUse,
    Snapshot,
    Zone,
)
from khoscope.views.scratch import ScratchText, write_json
from tests.synthetic import PLAIN, Block, snapshot

MIB, GIB = 1 << 20, 1 << 30
#: KHO's own page: its root FDT.
OWN = Block(0x2000)


def page(size: int) -> int:
    return size >> 12


def host(*blocks: Block, command_line: str = "quiet", **more: Any) -> Snapshot:
    """
    Two nodes of 4 GiB, of which the second reaches above 4 GiB: 512 MiB of scratch, of which an
    eighth is in use.
    """
    facts = snapshot(
        PLAIN,
        [OWN, *blocks],
        ram=((0, 3 * GIB), (4 * GIB, 9 * GIB)),
        scratch=[(GIB, 64 * MIB), (6 * GIB, 192 * MIB), (2 * GIB, 128 * MIB), (7 * GIB, 128 * MIB)],
    )
    zones = [
        zone(0, "DMA32", 0, 3 * GIB, reserved=40 * MIB, cma=192 * MIB, free=900, free_cma=160),
        zone(0, "Normal", 4 * GIB, 5 * GIB, reserved=24 * MIB, cma=0, free=30, free_cma=0),
        zone(
            1, "Normal", 5 * GIB, 9 * GIB, reserved=64 * MIB, cma=320 * MIB, free=500, free_cma=300
        ),
    ]
    whose = (
        np.array([n], t) for n, t in zip((OWN.phys, 64, 0), Claims.DTYPES.values(), strict=True)
    )
    side = replace(
        facts.outgoing, owners=[Owner(OwnerKind.FDT, "KHO FDT")], claims=[Claims(*whose)]
    )
    return replace(
        facts,
        kernel=replace(facts.kernel, command_line=command_line),
        outgoing=side,
        nodes=[Node(0, 0, 5 * GIB), Node(1, 5 * GIB, 9 * GIB)],
        memory=Memory(zones, page(32 * MIB), page(8 * MIB), 9),
        scratch_free=[page(56 * MIB), page(168 * MIB), page(112 * MIB), page(112 * MIB)],
        scratch_use=[
            ScratchUse({"cma": 32}, {PageUse.FILE: page(8 * MIB)}, 0, 0, 0),
            ScratchUse({"cma": 95, "movable": 1}, {PageUse.ANON: page(24 * MIB)}, 3, 2, 0),
            ScratchUse({"cma": 64}, {"slab": page(4 * MIB), PageUse.FILE: page(12 * MIB)}, 0, 0, 0),
            ScratchUse(None, {PageUse.SHMEM: page(15 * MIB)}, 0, 0, page(MIB)),
        ],
        liveupdate=LuoState(True, [], False),
        image=KexecImage(False),
        **more,
    )


def zone(
    node: int, name: str, start: int, end: int, *, reserved: int, cma: int, free: int, free_cma: int
) -> Zone:
    """
    A zone; ``free`` and ``free_cma`` in MiB.  10 MiB are kept back, 12 are the low watermark, 5 are
    free per CPU, 100 of files.
    """
    present = page(end - start)
    return Zone(
        node,
        name,
        start,
        end,
        present,
        present - page(reserved),
        page(cma),
        page(free * MIB),
        page(free_cma * MIB),
        page(10 * MIB),
        page(12 * MIB),
        page(5 * MIB),
        page(100 * MIB),
    )


# What the areas are


def test_areas() -> None:
    found = areas(host())
    assert [(a.purpose, a.node, a.zones, a.free) for a in found] == [
        ("lowmem", 0, ("DMA32",), 56 * MIB),
        ("global", 1, ("Normal",), 168 * MIB),
        ("node 0", 0, ("DMA32",), 112 * MIB),
        ("node 1", 1, ("Normal",), 112 * MIB),
    ]


def test_areas_that_nothing_is_known_of() -> None:
    facts = replace(host(), memory=None, nodes=None, scratch_use=[], scratch_free=[])
    found = areas(facts)
    assert [(a.purpose, a.node, a.zones, a.free, a.use) for a in found] == [
        (f"area {i}", None, (), None, None) for i in range(4)
    ]


def test_an_area_without_memory_is_none() -> None:
    """The global one, where all that was reserved is below 4 GiB."""
    facts = host()
    scratch = facts.scratch.copy()
    scratch[1, 1] = 0
    assert [a.purpose for a in areas(replace(facts, scratch=scratch))] == [
        "lowmem",
        "node 0",
        "node 1",
    ]


# Why they are that large


@pytest.mark.parametrize(
    ("command_line", "found"),
    [
        ("quiet", 200),
        ("kho_scratch=50%", 50),
        ("kho_scratch=50% kho_scratch=75%", 75),
        ("kho_scratch=1M,2G,0x10k", Sizes(MIB, 2 * GIB, 16 << 10)),
        ("kho_scratch=0,0,8M", Sizes(0, 0, 8 * MIB)),
        ("kho_scratch=010,0,8M", Sizes(8, 0, 8 * MIB)),
        ("kho_scratch=08,0,8M", 200),
        # The last one counts, if it is one.
        ("kho_scratch=1M,2M,3M kho_scratch=50%", 50),
        ("kho_scratch=50% kho_scratch=1M,2M,3M", Sizes(MIB, 2 * MIB, 3 * MIB)),
        ("kho_scratch=50% kho_scratch=1M,2M", 50),
        ("kho_scratch=50% kho_scratch=1M,2M,3M,", 50),
        ("kho_scratch=50% kho_scratch=1M,2M,3Q", 50),
        ("kho_scratch=50% kho_scratch=0,0,0", 50),
        ("kho_scratch=x%", 200),
        ("kho_scratch=99999999999%", 200),
        ("kho_scratch=", 200),
        ("quiet -- kho_scratch=50%", 200),
        ("xkho_scratch=50%", 200),
    ],
)
def test_what_the_command_line_asks_for(command_line: str, found: object) -> None:
    assert scratch_sizes(command_line) == found


@pytest.mark.parametrize(
    ("command_line", "said"),
    [
        ("quiet", "200 % of what the boot reserved, as nothing else was asked for"),
        ("kho_scratch=50%", "50 % of what the boot reserved: kho_scratch=50% on the command line"),
        ("kho_scratch=1M,2M,3M", "kho_scratch=1M,2M,3M on the command line"),
        ("", "what decided their sizes is not recorded"),
    ],
)
def test_why_they_are_that_large(command_line: str, said: str) -> None:
    assert asked_for(host(command_line=command_line)) == said


def test_areas_that_were_handed_over() -> None:
    """The command line of this kernel says nothing of them."""
    facts = replace(host(), handover=Handover(True, "7.2.0-test", 1))
    assert "handed over" in asked_for(facts)
    # Nor do zones of what a boot needs: what nobody has restored is reserved, too.
    assert needs(facts) is None


# What the next kernel needs


def test_what_the_boot_needed() -> None:
    """The kernel has measured it, or the zones tell."""
    found = needs(host())
    assert found is not None
    assert (found.low, found.nodes, found.image) == (32 * MIB, {0: 64 * MIB, 1: 64 * MIB}, None)
    found = needs(host(command_line="kho_scratch=64M,192M,128M"))
    assert found is not None
    # What CmaTotal has was reserved, too, somewhere.
    assert (found.low, found.nodes) == (40 * MIB, {0: 96 * MIB, 1: 64 * MIB})
    assert needs(replace(host(command_line="kho_scratch=1M,1M,1M"), memory=None)) is None


def test_sizes_that_a_kernel_with_large_blocks_can_have() -> None:
    """It rounds all of them up to its largest block."""
    facts = host()
    large = replace(facts.abi, page_shift=16, max_page_order=13)
    sizes = enough(replace(facts, abi=large))
    assert sizes is not None
    assert {each % (512 * MIB) for each in (sizes.lowmem, sizes.rest, sizes.per_node)} == {0}


def test_advice() -> None:
    facts = host(command_line="kho_scratch=64M,192M,128M")
    facts = replace(facts, image=KexecImage(True, True, 0x2000, 50 * MIB))
    found = cost(facts)
    # A quarter more, and twice the image, each a multiple of 16 MiB: 64 + 112 + 2 * 128.
    assert str(found.advice) == "kho_scratch=64M,112M,128M"
    assert found.given_back == (512 - 64 - 112 - 256) * MIB
    # Without an image more is taken for it, and then it is not worth it.
    assert cost(host()).advice is None
    assert cost(host()).given_back == 0


# What is free, and for whom


def test_what_is_free() -> None:
    found = cost(host())
    assert [(z.node, z.name, z.free, z.anybody, z.movable, z.kept_back) for z in found.zones] == [
        (0, "DMA32", 900 * MIB, 730 * MIB, 160 * MIB, 10 * MIB),
        (0, "Normal", 30 * MIB, 20 * MIB, 0, 10 * MIB),
        (1, "Normal", 500 * MIB, 190 * MIB, 300 * MIB, 10 * MIB),
    ]
    # Of 300 MiB of files, 20 lie in scratch, and perhaps 1 that cannot be read; 36 are kept, as is
    # half of 8 MiB of slabs.
    assert found.pinnable == (730 + 20 + 190 + 15 + 279 - 36 + 4) * MIB
    assert (found.cma_total, found.cma_free) == (32 * MIB, 460 * MIB)
    assert found.phantom == 480 * MIB
    assert (found.scratch, found.ram) == (512 * MIB, 8 * GIB)
    assert pinnable(replace(host(), scratch_use=[])) is None


def test_memory_that_is_movable_alone() -> None:
    facts = host()
    assert facts.memory is not None
    zones = [replace(each, name="Movable") for each in facts.memory.zones]
    found = cost(replace(facts, memory=replace(facts.memory, zones=zones)))
    assert {each.anybody for each in found.zones} == {0}
    assert [each.movable for each in found.zones] == [each.free for each in found.zones]
    # All files that are counted lie in scratch, or so it seems.
    assert found.pinnable == 0


def test_reserved_pages_of_scratch_come_back_to_nobody() -> None:
    facts = host()
    uses = [replace(facts.scratch_use[0], pages={PageUse.RESERVED: page(8 * MIB)})]
    assert cost(replace(facts, scratch_use=uses + facts.scratch_use[1:])).off == 504 * MIB


# Who uses it


def test_users() -> None:
    assert users(host()).nobody
    found = users(host(Block(0x400000, 9), Block(0x800000, 0)))
    assert (found.blocks, found.size, found.any) == (2, 2 * MIB + 4096, True)
    facts = host()
    luo = Luo(0x5000, "luo-v5", sessions=[LuoSession("systemd", None, 1)])
    assert users(replace(facts, outgoing=replace(facts.outgoing, luo=luo))).sessions == 1
    assert users(replace(facts, liveupdate=LuoState(True, [], True))).any
    assert users(replace(facts, liveupdate=None)).nobody
    # Every kexec is a handover while KHO is on; sessions and clients' subtrees say that somebody
    # meant it.
    fdt = replace(facts.outgoing.fdt, subtrees=[Subtree("LUO", 0x5000, 64)])
    came = replace(facts.outgoing, fdt=fdt)
    handed = replace(facts, handover=Handover(True, "7.2.0-test", 1), incoming=came)
    assert users(handed).nobody
    assert users(replace(handed, incoming=replace(came, luo=luo))).any
    fdt = replace(fdt, subtrees=[*fdt.subtrees, Subtree("ima-kexec", 0x6000, 64)])
    assert users(replace(handed, incoming=replace(came, fdt=fdt))).any


def test_services_of_systemds_are_users() -> None:
    """Before the kexec, nothing of what systemd keeps for them is in KHO yet."""
    kept = [KeptFd("ring", "/memfd:ring (deleted)", 11)]
    keeper = Service("keeper.service", "active (running)", True, "yes", kept)
    for services, any_ in (
        ([keeper], True),
        # It closes these, or no kexec hands them over.
        ([replace(keeper, preserve="restart")], False),
        ([replace(keeper, kept=[replace(kept[0], path="socket:[1]")])], False),
    ):
        facts = replace(host(), services=Services(services))
        found = users(facts)
        assert (found.any, found.nobody) == (any_, not any_)
        assert bool(check(facts).counts["kho-unused"]) != any_
        said = "used by what systemd keeps for keeper.service"
        assert (said in " ".join(text(facts).split())) == any_
        out = io.StringIO()
        write_json(facts, cost(facts), out)
        document = json.loads(out.getvalue())
        assert document["users"]["services"] == (["keeper.service"] if any_ else [])
    unread = Services(unread=["systemctl show has not answered within 30 s"])
    assert not users(replace(host(), services=unread)).nobody


def test_subtrees_of_clients_are_not_khos_own() -> None:
    facts = host()
    for name, any_ in (("LUO", False), ("ima-kexec", True)):
        owners = [Owner(OwnerKind.SUBTREE, f"subtree {name}")]
        side = replace(facts.outgoing, owners=owners)
        assert users(replace(facts, outgoing=side)).any == any_


def test_users_that_nothing_is_known_of() -> None:
    """Where not all can be read, nobody is told that nobody is there."""
    facts = host()
    tree = facts.outgoing.tree
    for state in (replace(tree.state, problem_count=1), replace(tree.state, moved=1)):
        side = replace(facts.outgoing, tree=replace(tree, state=state))
        found = users(replace(facts, outgoing=side))
        assert (found.any, found.nobody) == (False, False)
    for unknown in (
        replace(facts, unreadable=["the zones"]),
        replace(facts, liveupdate=LuoState(True, [], None)),
    ):
        assert not users(unknown).nobody
        assert "Nobody uses KHO" not in text(unknown)
        assert "nobody that is known of, but" in text(unknown)
        assert not check(unknown).counts["kho-unused"]
        brief = of_kernel(unknown)
        assert (brief.is_wasted, brief.users) == (False, users(unknown))


def test_sizes_for_which_a_node_has_no_room() -> None:
    facts = replace(host(), image=KexecImage(True, True, 0x2000, 50 * MIB))
    assert enough(facts) is not None
    small = replace(facts, nodes=[Node(0, 0, 8 * GIB), Node(1, 8 * GIB, 8 * GIB + 96 * MIB)])
    assert enough(small) is None
    assert cost(small).no_advice == "there is no room for areas that would surely do"


def test_khos_own_pages_in_an_area() -> None:
    """Its root FDT lies in the lowmem area."""
    facts = host()
    facts = replace(facts, scratch=facts.scratch.copy())
    facts.scratch[0] = 0, 64 * MIB
    (lowmem, *others) = cost(facts).areas
    assert lowmem.own >= 4096
    assert not any(area.own for area in others)
    assert "lowmem, KHO's own: " in text(facts)


# What is shown


def text(facts: Snapshot) -> str:
    out = io.StringIO()
    ScratchText(out).scratch(facts, cost(facts))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    return " ".join(shown.split())


def test_text() -> None:
    shown = text(host(command_line="kho=on kho_scratch=64M,192M,128M"))
    for said in (
        "KHO on: kho=on on the command line [kho_enable]",
        "sizes kho_scratch=64M,192M,128M on the command line [saved_command_line]",
        "used by nobody: no blocks but KHO's own, no sessions, and /dev/liveupdate is not open",
        "itself 28 KiB that nobody else can use: KHO's own FDT, blobs and tree [kho_out]",
        "scratch 512 MiB (6.2% of 8 GiB): only movable memory may be there [kho_scratch]",
        "global 0x000180000000 192 MiB 1 Normal 95 cma, 1 movable 168 MiB",
        "node 0, movable: page cache 12 MiB",
        "node 0, cannot be moved: slab 4 MiB",
        "global, page blocks that should be of type cma: 1 movable",
        "global, pinned: 12 KiB",
        "global, held by more than mappings: 8 KiB",
        "node 1, not readable: 1 MiB",
        "0 DMA32 900 MiB 730 MiB 160 MiB 10 MiB",
        "At least 1.2 GiB can be pinned for long",
        "/proc/meminfo: CmaTotal 32,768 kB, CmaFree 471,040 kB.",
        "The other 480 MiB are scratch.",
        "kho=off 512 MiB no handover, no live update",
        "No kho_scratch= is suggested: a next kernel may need ",
        "more than there is, if its image takes 160 MiB: load it, and ask again.",
        "GRUB replace kho=on by it in GRUB_CMDLINE_LINUX (or GRUB_CMDLINE_LINUX_DEFAULT)",
        "systemd-boot replace kho=on by it in /etc/kernel/cmdline",
        "Nobody uses KHO here.",
    ):
        assert said in shown


def test_text_with_advice() -> None:
    facts = host(Block(0x400000), command_line="kho=on kho_scratch=64M,192M,128M")
    shown = text(replace(facts, image=KexecImage(True, True, 0x2000, 50 * MIB)))
    assert "used by 1 block of others than KHO itself (4 KiB)" in shown
    assert "kho_scratch=64M,112M,128M 80 MiB see below" in shown
    assert "twice the loaded image and its initrd, 50 MiB" in shown
    # Who uses it is not told how to switch it off.
    assert "GRUB" not in shown


def test_text_when_off() -> None:
    facts = replace(
        host(command_line="quiet"),
        kho_enable=False,
        scratch=np.zeros((0, 2), np.uint64),
        scratch_use=[],
        scratch_free=[],
    )
    shown = text(facts)
    assert "KHO off: the command line does not have kho=on" in shown
    assert "scratch none" in shown
    assert "To have it in this kernel: boot it with kho=on." in shown
    assert "GRUB" not in shown
    assert "used by" not in shown


def test_text_of_an_older_snapshot() -> None:
    facts = replace(host(), memory=None, scratch_use=[], nodes=None)
    shown = text(facts)
    assert "area 0" in shown
    assert "what is free in which zone is not known" in shown
    assert "can be pinned" not in shown


def test_json() -> None:
    out = io.StringIO()
    facts = host()
    write_json(facts, cost(facts), out)
    document = json.loads(out.getvalue())
    assert document["schema"] == "khoscope.scratch/1"
    assert document["areas"][1]["page_blocks"] == {"cma": 95, "movable": 1}
    assert document["areas"][3]["page_blocks"] is None
    assert document["cma"]["phantom"] == 480 * MIB
    assert document["given_back"]["kho_off"] == 512 * MIB
    assert document["given_back"]["kho_scratch"] is None
    assert document["given_back"]["why_not"].startswith("a next kernel may need")
    assert document["users"]["any"] is False


def test_a_file_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is stored of it is read again, and what differs between two files is told."""
    a, b = tmp_path / "a.khosnap", tmp_path / "b.khosnap"
    facts = host()
    store.save_file(facts, a)
    assert cost(store.load_file(a)) == cost(facts)
    assert main(["--snapshot", str(a), "scratch"]) == 0
    assert "512 MiB" in capsys.readouterr().out
    uses = [replace(facts.scratch_use[0], blocks={"cma": 31, "movable": 1}, pinned=7)]
    store.save_file(replace(facts, scratch_use=uses + facts.scratch_use[1:]), b)
    changed = {each.what: (each.a, each.b) for each in diff.facts(facts, store.load_file(b))}
    assert changed == {
        "page blocks of scratch 0x40000000": ("32 cma", "31 cma, 1 movable"),
        "pages in scratch 0x40000000 that cannot be moved": ("none", "pinned 7"),
    }
