# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64 kernels of 4, 16 and 64 KiB pages, looked at over QMP on both sides of a kexec."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from drgn.helpers.linux.mm import compound_order, page_to_phys, virt_to_phys

from khoscope.abi.keys import KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, Abi
from khoscope.facts import store
from khoscope.facts.snapshot import Snapshot
from khoscope.sources.open import open_qemu
from tests.synthetic import blocks_of
from tests.vm.test_khoscope import COST, host
from vm import arm64, kernel
from vm.arm64 import Arm64
from vm.machine import GuestDied, GuestError, GuestHung

#: (phys, order, type)
Block = tuple[int, int, int]

KHO_TEST = 16 << 20
RESERVED = 8 << 20
MEMFD = 200_000
#: kho_test takes two blocks of MAX_PAGE_ORDER, 1 GiB with 64 KiB pages, if it is not told.
APPEND = f"test_kho.max_mem={KHO_TEST} reserve_mem={RESERVED}:65536:khoscope"

#: Page shift, and the tree's depth, order-0 bit, stored bits and type bit: see kho.h's enum
#: kho_radix_consts and the series.
GEOMETRY = {
    "7.2-arm64-4k": (12, 6, 52, 60, 53),
    "7.2-arm64-16k": (14, 5, 50, 61, 51),
    "7.2-arm64-64k": (16, 4, 48, 58, 49),
    "7.2-arm64-64k-rfc": (16, 4, 48, 58, 63),
}


@dataclass
class Story:
    """What was seen on the way of one machine through a kexec."""

    kernel: str
    #: What the guest's init answered.
    answers: dict[str, int] = field(default_factory=dict)
    #: JSON documents by name.
    seen: dict[str, Any] = field(default_factory=dict)
    #: What drgn alone says.
    root: int = 0
    folios: set[tuple[int, int]] = field(default_factory=set)
    console: str = ""
    #: Of the kernel that is loaded.
    command_line: str = ""

    def __post_init__(self) -> None:
        shift, self.depth, self.order_0, self.stored, self.type_bit = GEOMETRY[self.kernel]
        self.shift = shift
        self.posted = self.type_bit == 63

    def snapshot(self, name: str) -> Snapshot:
        found = self.seen[name]
        assert isinstance(found, Snapshot)
        return found


def look(story: Story, machine: Arm64) -> None:
    """What kho_test and the kernel have, without any of khoscope's own reading."""
    prog = open_qemu(str(machine.qmp_socket), machine.kernel.share / "vmlinux")
    story.root = virt_to_phys(prog["kho_out"].radix_tree.root).value_()
    state = prog["kho_test_state"]
    for i in range(state.nr_folios.value_()):
        page = state.folios[i].page.address_of_()
        story.folios.add((page_to_phys(page).value_(), compound_order(page).value_()))


@pytest.fixture(scope="module", params=kernel.chosen(arm64.NAMES))
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Boot, look, preserve a memfd, load, look, kexec, look."""
    story = Story(request.param)
    directory = tmp_path_factory.mktemp(story.kernel)
    before, after = directory / "before.khosnap", directory / "after.khosnap"
    wrong = 1 if story.posted else 0
    with Arm64(story.kernel, append=APPEND) as machine:
        vmlinux = str(machine.kernel.share / "vmlinux")
        qemu = ("--qemu", str(machine.qmp_socket), "--vmlinux", vmlinux)

        def say(name: str, *words: str, status: int = 0) -> None:
            story.seen[name] = json.loads(host(*qemu, *words, "--json", status=status))

        look(story, machine)
        # QEMU serves one client at a time: this one has to hang up.
        gc.collect()
        say("no image", "verify", status=wrong)
        story.answers["memfd"] = machine.ask("memfd", str(MEMFD))
        story.command_line = machine.command_line(2)
        story.answers["load"] = machine.ask("load", story.command_line)
        for name in ("tree", "fdt", "luo", "status", "owners", "scratch"):
            say(name, name, *(("--limit", "0") if name in ("tree", "owners") else ()))
        for each in kernel.chosen(arm64.NAMES):
            found = arm64.find(each)
            assert found is not None, f"run: python -m vm build {each}"
            same = kernel.ARM64[each][0] == kernel.ARM64[story.kernel][0]
            image = str(found.share / "Image")
            say(f"into {each}", "verify", "--next", image, status=wrong if same else 1)
        say("into what is loaded", "verify", "--next", "loaded", status=wrong)
        host(*qemu, "snapshot", str(before))
        machine.kexec()
        say("after", "verify", "--before", str(before), status=wrong)
        say("status after", "status")
        say("luo after", "luo")
        host(*qemu, "snapshot", "--before", str(before), str(after))
        story.console = machine.console()
    story.seen["snapshot"] = store.load_file(before)
    story.seen["snapshot after"] = store.load_file(after)
    return story


def rules(document: Any) -> set[str]:
    return {finding["rule"] for finding in document["findings"]} - COST


def blocks(facts: Snapshot) -> set[Block]:
    return blocks_of(facts.abi, facts.outgoing.tree)


def reserved(story: Story) -> set[Block]:
    """The blocks into which kho_preserve_pages() cuts what reserve_mem= has reserved."""
    (row,) = (row for row in story.seen["fdt"]["subtrees"] if row["name"] == "memblock")
    area = row["tree"]["nodes"]["khoscope"]["properties"]
    assert area["size"]["decoded"] == RESERVED
    pfn = int(area["start"]["decoded"], 16) >> story.shift
    end = pfn + (RESERVED >> story.shift)
    found = set()
    while pfn < end:
        order = min((pfn & -pfn).bit_length() - 1, (end - pfn).bit_length() - 1)
        # Pages that memblock handed out have a reference each; one page has no second one to tell.
        split = order > 0 and not story.posted
        found.add((pfn << story.shift, order, KHO_PAGE_SPLIT if split else KHO_PAGE_CONTIG))
        pfn += 1 << order
    return found


def test_geometry(story: Story) -> None:
    facts = story.snapshot("snapshot")
    assert facts.abi == Abi(
        story.shift,
        story.order_0,
        story.shift - 3,
        story.shift + 3,
        story.depth,
        facts.abi.max_page_order,
        story.type_bit,
        facts.abi.stamp,
        "kho-v4" if story.posted else "kho-v5",
    )
    assert facts.abi.stored_bits == story.stored
    # A block of MAX_PAGE_ORDER: 4 MiB with 4 KiB pages, 32 MiB with 16 KiB, 512 MiB with 64 KiB.
    largest = facts.abi.page_size << facts.abi.max_page_order
    assert largest == {12: 4 << 20, 14: 32 << 20, 16: 512 << 20}[story.shift]
    decided = facts.abi.decided
    from_enum = [name for name, how in decided.items() if how == "enum kho_radix_consts"]
    assert len(from_enum) == (4 if story.posted else 5)
    assert {leaf.bitmap.shape[1] for leaf in facts.outgoing.tree.leaves} == {1 << story.shift}


def test_root_and_totals(story: Story) -> None:
    tree = story.seen["tree"]
    assert int(tree["root"], 16) == story.root
    found = story.snapshot("snapshot")
    assert found.outgoing.tree.state.root == story.root
    rows = {(int(b["phys"], 16), b["order"], b["type"]) for b in tree["blocks"]}
    assert {(phys, order) for phys, order, _ in rows} == {b[:2] for b in blocks(found)}
    assert sum(row["blocks"] for row in tree["totals"]) == len(rows)
    assert all(phys % (1 << story.shift + order) == 0 for phys, order, _ in rows)


def test_folios_of_kho_test(story: Story) -> None:
    """Each folio is a block of its order; and the owners, who come from the FDT, know it."""
    # Of orders at random, until it has what it was told to take.
    taken = sum(1 << story.shift + order for _, order in story.folios)
    assert taken == KHO_TEST
    preserved = blocks(story.snapshot("snapshot"))
    assert {(*folio, KHO_PAGE_CONTIG) for folio in story.folios} <= preserved
    rows = [row for row in story.seen["owners"]["totals"] if row["owner"] == "kho_test: folios"]
    assert [row["bytes"] for row in rows] == [taken]


def test_reserve_mem(story: Story) -> None:
    """Memory that is in pages of its own: split, where the tree keeps that."""
    cut = reserved(story)
    assert {page_type for _, _, page_type in cut} >= {
        KHO_PAGE_CONTIG if story.posted else KHO_PAGE_SPLIT
    }
    assert cut <= blocks(story.snapshot("snapshot"))


def test_memfd(story: Story) -> None:
    assert story.answers == {"memfd": 0, "load": 0}
    (session,) = story.seen["luo"]["outgoing"]["sessions"]
    (file,) = session["files"]
    assert (session["name"], file["memfd"]["size"]) == ("arm64", MEMFD)
    assert file["memfd"]["pages"] == -(-MEMFD >> story.shift)
    (session,) = story.seen["luo after"]["incoming"]["sessions"]
    assert session["files"][0]["memfd"] == file["memfd"]


def test_scratch(story: Story) -> None:
    """Page blocks of any size: of 512 MiB with 64 KiB pages, of 16 MiB with 16 KiB pages."""
    found = story.seen["scratch"]
    for area in found["areas"]:
        blocks = {12: 2 << 20, 14: 16 << 20, 16: 512 << 20}[story.shift]
        assert area["page_blocks"] == {"cma": area["size"] // blocks}
    assert found["cma"]["phantom"] == found["scratch"] > 0
    assert found["users"]["blocks"] > 0


def test_verdicts(story: Story) -> None:
    """type-not-stored fires for bit 63 with 64 KiB pages, too, and not for the repaired one."""
    found = story.seen["no image"]
    if not story.posted:
        assert (found["verdict"], rules(found)) == ("pass", {"no-image"})
        assert rules(story.seen[f"into {story.kernel}"]) == set()
        return
    assert found["verdict"] == "fail"
    (finding,) = (f for f in found["findings"] if f["rule"] == "type-not-stored")
    assert "key bit 63, the tree stores bits 57:0" in finding["message"]
    assert "abi-not-bumped" in rules(found)
    # Split memory, walked as contig.
    assert found["counts"]["type-mismatch"] == sum(order > 0 for _, order, _ in reserved(story))


def test_next_kernels(story: Story) -> None:
    """An arm64 Image says which handovers its kernel takes."""
    for name in kernel.chosen(arm64.NAMES):
        found = story.seen[f"into {name}"]
        same = kernel.ARM64[name][0] == kernel.ARM64[story.kernel][0]
        assert ("image-abi-differs" in rules(found)) != same


def test_the_image_that_is_loaded(story: Story) -> None:
    """The same as the Image says, with the command line that it is given in a device tree."""
    loaded, image = story.seen["into what is loaded"], story.seen[f"into {story.kernel}"]
    assert loaded["next"]["command_line"] == story.command_line
    assert loaded["next"]["initrd"] > 0
    assert {**loaded["next"], "path": "", "command_line": None, "initrd": None} == {
        **image["next"],
        "path": "",
    }
    assert rules(loaded) == rules(image)


def test_the_other_side(story: Story) -> None:
    """Each block that was handed over has its stamp, unless its owner has claimed it since."""
    assert "KHO: found kexec handover data" in story.console
    assert "test_kho: KHO restore succeeded" in story.console
    assert "Revived memory reservation 'khoscope' from KHO" in story.console
    before, after = story.snapshot("snapshot"), story.snapshot("snapshot after")
    handed = blocks(before)
    stamps = {
        block
        for chunk in after.stamps
        for block in zip(
            chunk.phys.tolist(), chunk.order.tolist(), chunk.type.tolist(), strict=True
        )
    }
    assert stamps <= handed
    # At boot kho_test takes back its folios and their list, and LUO what leads to the rest.
    owners = {
        (int(row["phys"], 16), row["order"]): row["owner"] for row in story.seen["owners"]["blocks"]
    }
    assert "unknown" not in owners.values()
    assert {owners[block[:2]] for block in handed - stamps} == {
        "kho_test: folios",
        "kho_test: folios_info, pages",
        "kho_test: folios_info, chunks",
        "subtree LUO",
    }
    assert reserved(story) <= stamps
    assert not {block[:2] for block in stamps} & story.folios
    handover = story.seen["status after"]["handover"]
    assert (handover["is_kho_boot"], handover["kexec_count"]) == (True, 1)
    assert handover["previous_release"] == before.kernel.release
    # The new kernel preserves it again, with types as it now sees them.
    assert reserved(story) <= blocks(after)


def test_verdict_of_the_other_side(story: Story) -> None:
    found = story.seen["after"]
    if story.posted:
        assert found["verdict"] == "fail"
        assert "type-not-stored" in rules(found)
        # The stamp says contig, and the pages were split.
        assert found["counts"]["type-changed"] == sum(order > 0 for _, order, _ in reserved(story))
        return
    assert found["verdict"] == "pass"
    # kho_test leaves its FDT, and nobody has asked for the session.
    assert rules(found) <= {"not-restored", "orphaned-session"}
    assert found["fates"]["in-place"] >= len(reserved(story))
    assert sum(found["fates"].values()) == len(blocks(story.snapshot("snapshot")))


@pytest.mark.parametrize("name", kernel.chosen(arm64.NAMES)[:1])
def test_a_guest_that_dies_and_one_that_says_nothing(name: str) -> None:
    with (
        pytest.raises(GuestDied, match="QEMU has ended") as died,
        Arm64(name, append="rdinit=/nothing"),
    ):
        pass
    assert "Kernel panic" in str(died.value)
    with Arm64(name) as machine:
        directory = machine.qmp_socket.parent
        with pytest.raises(GuestError, match="juggle: the guest's answer is unknown -1"):
            machine.ask("juggle")
        # No kernel is loaded.
        with pytest.raises(GuestError, match="boot: the guest's answer is kexec -22"):
            machine.kexec()
        with pytest.raises(GuestHung, match="no answer"):
            machine.ask("load", "x", timeout=0)
        assert directory.exists()
    assert not directory.exists()
