# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What is read of a made-up kernel: each fact is there or is named, and a bug of ours gets out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from drgn import Platform, Program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khoscope.abi.keys import BlockLimits
from khoscope.checks import check
from khoscope.facts import store
from khoscope.facts.columns import Leaves
from khoscope.facts.snapshot import KexecImage, Node, Snapshot
from khoscope.facts.tree import Tree
from khoscope.sources import probe
from khoscope.sources import reading as reading_module
from khoscope.sources.kernel import KernelSource
from khoscope.sources.probe import refuse_platform
from khoscope.sources.reading import Reading
from khoscope.words.errors import KhoscopeError
from tests.made_up import BIG_ENDIAN, BITS_32, DIRECT_MAP, RAM, STRUCTS, MadeUp, mapped
from tests.test_fdt import blob, data


@pytest.fixture(autouse=True)
def _mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with mapped(monkeypatch):
        yield


def every(source: KernelSource) -> list[Snapshot]:
    """What each kind of look gives."""
    return [source.tree(), source.clients(), source.status(lambda _: None)[0], source.snapshot()]


def test_all_is_there() -> None:
    machine = MadeUp()
    machine.handlers("memfd-v2", "vfio-v1")
    for facts in every(machine.source()):
        assert facts.unreadable == []
        assert facts.kernel.release == "7.2.0-made-up"
        assert facts.kernel.command_line == "kho=on"
        assert facts.scratch.tolist() == [[0x100_0000, 0x10_0000]]
        assert facts.liveupdate is not None
        assert facts.liveupdate.handlers == ["memfd-v2", "vfio-v1"]
        assert facts.image is not None
        assert not facts.image.loaded
        assert facts.crash_image == KexecImage(False)


def test_a_crash_kernel() -> None:
    """A struct kimage as made_up.py has it: nr_segments, file_mode, one segment, kho.fdt."""
    machine = MadeUp()
    segments = (0x100_0000).to_bytes(8, "little") + (3 << 20).to_bytes(8, "little") + bytes(15 * 16)
    kimage = b"\1\0\0\0\1\0\0\0" + segments + (0x5000).to_bytes(8, "little")
    machine.set("kexec_crash_image", machine.new(kimage))
    for facts in every(machine.source()):
        assert facts.crash_image == KexecImage(True, True, 0x5000, 3 << 20)
        assert facts.image == KexecImage(False)


@pytest.mark.parametrize(
    ("compatible", "limits"),
    [
        ("kho-v3", BlockLimits(1 << 31)),
        ("kho-v2", BlockLimits(1 << 31, 10)),
        ("kho-v4", BlockLimits()),
        ("kho-v4;radix-v1;vmalloc-v1", BlockLimits()),
    ],
)
def test_limits_of_blocks(compatible: str, limits: BlockLimits) -> None:
    machine = MadeUp()
    root = {"compatible": f"{compatible}\0".encode(), "preserved-memory-map": bytes(8)}
    machine.set("kho_out", machine.new(blob(root)))
    abi = machine.source().abi
    assert (abi.compatible, abi.limits) == (compatible, limits)
    assert abi.decided["limits"] == "its compatible"


def test_limits_of_a_kernel_with_a_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another compatible than the kernels that came with it."""
    machine = MadeUp()
    root = {"compatible": b"kho-v3\0", "preserved-memory-map": bytes(8)}
    machine.set("kho_out", machine.new(blob(root)))
    monkeypatch.setattr(probe, "_has_function", lambda _, name: name == "kho_get_preserved_page")
    assert machine.source().abi.limits == BlockLimits()


def test_limits_of_a_kernel_that_does_not_say_what_it_is() -> None:
    abi = MadeUp().source().abi
    assert (abi.compatible, abi.limits) == (None, BlockLimits())
    assert abi.decided["limits"] == "none: its compatible is not readable"


# Debug info


@pytest.mark.parametrize("error", [KeyError, IndexError, AttributeError])
def test_a_bug_of_ours_gets_out(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    source = MadeUp().source()

    def fails(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr("khoscope.sources.reading.parse_root_fdt", fails)
    monkeypatch.setattr("khoscope.sources.kernel.walk", fails)
    looks = [source.tree, source.clients, source.snapshot]
    looks += [lambda: source.status(lambda _: None)[0], lambda: source.judge(lambda *_: None)[0]]
    for look in looks:
        with pytest.raises(error, match="ours"):
            look()


@pytest.mark.parametrize(
    "lacks",
    ["kho_in", "kho_scratch", "kho_radix_tree", "page", "zone", "sysctl_bootid", "pageflags"],
)
def test_debug_info_that_lacks_what_is_needed(lacks: str) -> None:
    with pytest.raises(KhoscopeError, match="debug info lacks") as raised:
        MadeUp({lacks}).source()
    assert "--vmlinux" in raised.value.hint


@pytest.mark.parametrize(
    ("lacks", "named"),
    [
        ({"kexec_image"}, []),
        ({"kexec_crash_image"}, []),
        ({"luo_global"}, []),
        ({"luo_session"}, []),
        ({"liveupdate_flb", "luo_file"}, []),
        ({"prb"}, ["the kernel log (prb): the debug info lacks its types"]),
        ({"desc_committed"}, ["the kernel log (prb): the debug info lacks its types"]),
        ({"vm_struct"}, ["the areas of vmalloc: the debug info lacks their types"]),
        ({"vmap_area_list"}, ["the areas of vmalloc: the debug info lacks their types"]),
        ({"pglist_data"}, ["the NUMA nodes (struct pglist_data): the debug info lacks them"]),
    ],
)
def test_parts_that_not_all_kernels_have(lacks: set[str], named: list[str]) -> None:
    facts = MadeUp(lacks).source().snapshot()
    assert facts.unreadable == named
    assert (facts.image is None) == ("kexec_image" in lacks)
    assert (facts.crash_image is None) == ("kexec_crash_image" in lacks)
    assert (facts.liveupdate is None) == ("luo_global" in lacks)
    assert (facts.nodes is None) == ("pglist_data" in lacks)


def test_kernels_that_keep_it_elsewhere() -> None:
    page, folio = STRUCTS["page"], STRUCTS["folio"]
    for members, said in (
        ({"page": page + "; u64 memdesc"}, "not in page->private"),
        ({"page": page.replace("u64 private", "u32 private; u32 pad")}, "not in page->private"),
        # A folio is memory of its own, with members at other places, or without some.
        ({"folio": "u64 more; " + folio}, "not in page->private"),
        ({"folio": folio.replace("_refcount", "_count")}, "not in page->private"),
        ({"folio": folio.replace("u64 rest; u64 _flags_1", "u64 _flags_1")}, "not in page"),
        ({"folio": folio.replace("_flags_1", "_folio_order")}, "not in page->private"),
        ({"page": page.replace("_refcount", "_count")}, "debug info lacks .*_refcount"),
        ({"page": page.replace("compound_info", "compound")}, "debug info lacks .*compound_head"),
    ):
        with pytest.raises(KhoscopeError, match=said):
            MadeUp(members=members).source()


def test_where_heads_may_be_fake() -> None:
    """What leads from a tail to its head has another name in kernels where they may be."""
    newer = MadeUp().source().layout.pages
    older = MadeUp(
        members={"page": STRUCTS["page"].replace("compound_info", "compound_head")}
    ).source()
    assert (newer.fake_heads, older.layout.pages.fake_heads) == (False, True)
    assert replace(older.layout.pages, fake_heads=False) == newer
    assert older.snapshot().unreadable == []


@pytest.mark.parametrize("platform", [BIG_ENDIAN, BITS_32, None])
def test_other_platforms(platform: Platform | None) -> None:
    with pytest.raises(KhoscopeError, match="64-bit little-endian") as raised:
        refuse_platform(Program(platform))
    assert "x86-64 or arm64" in raised.value.hint
    if platform is not None:
        # Before anything else is asked of it.
        with pytest.raises(KhoscopeError, match="64-bit little-endian"):
            KernelSource(Program(platform), "made up", False)


def test_big_endian() -> None:
    with pytest.raises(KhoscopeError, match="64-bit little-endian"):
        MadeUp(platform=BIG_ENDIAN).source()


# Sections


def offline_of(
    ram: list[tuple[int, int]], maps: dict[int, int], gone: tuple[int, ...]
) -> list[list[int]]:
    machine = MadeUp()
    machine.ram(*ram)
    machine.sections(maps, gone)
    facts = machine.source().tree()
    assert facts.unreadable == []
    assert facts.offline is not None
    found: list[list[int]] = facts.offline.tolist()
    return found


FULL = 2**64 - 1
SECTION, SUBSECTION = 1 << 27, 1 << 21


@pytest.mark.parametrize(
    ("ram", "maps", "gone", "wanted"),
    [
        ([(0, RAM)], {0: FULL}, (), []),
        ([(0, RAM)], {0: FULL}, (0,), [[0, RAM]]),
        ([(0, 4 * SECTION)], dict.fromkeys(range(4), FULL), (1, 2), [[SECTION, 3 * SECTION]]),
        # Only what is RAM matters.
        (
            [(0, RAM), (SECTION + 0x5000, SECTION + 0x9000), (3 * SECTION, 4 * SECTION)],
            {0: FULL, 1: FULL, 3: FULL},
            (1,),
            [[SECTION + 0x5000, SECTION + 0x9000]],
        ),
        # A part of a section, at its beginning, its end and in between; and one without a map.
        ([(0, RAM)], {0: FULL << 3 & FULL}, (), [[0, 3 * SUBSECTION]]),
        ([(0, SECTION)], {0: FULL >> 1}, (), [[63 * SUBSECTION, SECTION]]),
        ([(0, SECTION)], {0: FULL ^ 6}, (), [[SUBSECTION, 3 * SUBSECTION]]),
        ([(0, 3 * SECTION)], {0: FULL >> 1, 2: FULL}, (), [[63 * SUBSECTION, 2 * SECTION]]),
        # Sections of another root, and one whose root is not there.
        ([(0, RAM), (300 * SECTION, 301 * SECTION)], {0: FULL, 300: FULL}, (), []),
        (
            [(0, RAM), (300 * SECTION, 301 * SECTION), (600 * SECTION, 601 * SECTION)],
            {0: FULL, 600: FULL},
            (),
            [[300 * SECTION, 301 * SECTION]],
        ),
    ],
)
def test_what_is_offline(
    ram: list[tuple[int, int]], maps: dict[int, int], gone: tuple[int, ...], wanted: list[list[int]]
) -> None:
    assert offline_of(ram, maps, gone) == wanted


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.lists(st.integers(0, 6 * 64), min_size=2, max_size=8, unique=True).map(sorted),
    st.dictionaries(
        st.integers(0, 5), st.sampled_from([FULL, 0, 1, FULL >> 7, 0x5555]), max_size=6
    ),
    st.sets(st.integers(0, 5), max_size=3),
)
def test_what_is_offline_against_a_model(
    bounds: list[int], maps: dict[int, int], gone: set[int]
) -> None:
    """RAM begins and ends anywhere in subsections."""
    ram = [
        (first * SUBSECTION + 0x1000, last * SUBSECTION)
        for first, last in zip(bounds[::2], bounds[1::2], strict=False)
    ]
    # Of each subsection that RAM reaches into, the first page of RAM in it.
    reached = {
        max(at, first) for first, last in ram for at in range(first & -SUBSECTION, last, SUBSECTION)
    }
    wanted = {
        at
        for at in reached
        if at // SECTION in gone or not maps.get(at // SECTION, 0) >> at // SUBSECTION % 64 & 1
    }
    found = offline_of(ram, maps, tuple(gone))
    assert wanted == {at for at in reached if any(first <= at < end for first, end in found)}
    # No more, and nothing twice.
    parts = [end - first for first, end in found]
    sizes = [
        min(at - at % SUBSECTION + SUBSECTION, last) - at
        for at in wanted
        for first, last in ram
        if first <= at < last
    ]
    assert sum(parts) == sum(sizes)


def test_sections_that_cannot_be_read() -> None:
    machine = MadeUp()
    machine.faults.add("mem_section")
    facts = machine.source().snapshot()
    assert (facts.offline, facts.unreadable) == (None, ["which memory is offline (mem_section)"])
    machine = MadeUp({"mem_section_usage"})
    facts = machine.source().snapshot()
    assert facts.offline is None
    assert facts.unreadable == [
        "which memory is offline (mem_section): the debug info lacks its types"
    ]
    machine = MadeUp()
    machine.ram((0, 1 << 60))
    assert machine.source().tree().unreadable == [
        "which memory is offline (mem_section): there is more RAM than any machine has"
    ]


# One reading and the next


def test_ram_is_read_anew() -> None:
    machine = MadeUp()
    source = machine.source(moves=True)
    assert source.tree().ram.tolist() == [[0, RAM]]
    machine.ram((0, RAM), (1 << 32, 1 << 33))
    for facts in every(source):
        assert facts.ram.tolist() == [[0, RAM], [1 << 32, 1 << 33]]


def test_a_transient_fault_is_forgotten() -> None:
    machine = MadeUp()
    source = machine.source(moves=True)
    machine.faults.add("tainted_mask")
    for facts in every(source):
        assert facts.unreadable == ["whether the kernel is tainted (tainted_mask)"]
    machine.faults.clear()
    for facts in every(source):
        assert facts.unreadable == []


def test_a_fault_of_an_attempt_that_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree moves during the first attempt, in which something cannot be read."""
    machine = MadeUp()
    source = machine.source(moves=True)
    attempts = 0
    look = KernelSource._with_scratch

    def moving(self: KernelSource, reading: Reading, facts: Snapshot) -> Snapshot:
        nonlocal attempts
        attempts += 1
        machine.faults.clear()
        if attempts == 1:
            machine.memory.add_page(0x20_0000, 0)
        return look(self, reading, facts)

    machine.faults.add("kho_scratch_cnt")
    monkeypatch.setattr(KernelSource, "_with_scratch", moving)
    facts = source.snapshot()
    assert attempts == 2
    assert facts.outgoing.tree.state.moved == 0
    assert facts.unreadable == []


def keys(facts: Snapshot) -> list[int]:
    return [key for chunk in facts.outgoing.blocks for key in chunk.key.tolist()]


def test_judging_reads_no_struct_page_but_those_of_blocks() -> None:
    """And those only if somebody iterates the blocks; nothing is looked for."""
    machine = MadeUp()
    machine.areas()
    machine.memory.add_page(0x20_0000, 0)
    source = machine.source()
    asked: list[int] = []
    read = source._read_virt

    def counting(address: int, size: int) -> bytes | None:
        asked.append(address)
        return read(address, size)

    source._read_virt = counting  # type: ignore[method-assign]
    facts, nothing = source.judge(lambda *_: None)
    assert (nothing, asked, facts.scan, list(facts.stamps)) == (None, [], None, [])
    _, found = source.judge(lambda facts, _: keys(facts))
    assert found == [source.abi.kho_radix_encode_key(0x20_0000, 0)]
    size = source.layout.pages.size
    assert asked == [source.layout.pages.vmemmap + (0x20_0000 >> 12) * size]


def test_what_moves_is_judged_anew() -> None:
    """What was made of a tree that moved meanwhile does not count."""
    machine = MadeUp()
    source = machine.source(moves=True)
    seen: list[int] = []

    def use(facts: Snapshot, _: Snapshot | None) -> int:
        seen.append(len(keys(facts)))
        if len(seen) == 1:
            machine.memory.add_page(0x20_0000, 0)
        return seen[-1]

    facts, last = source.judge(use)
    assert (seen, last) == ([0, 1], 1)
    assert (facts.outgoing.tree.state.moved, facts.outgoing.tree.state.reads) == (0, 3)


def test_a_problem_that_only_the_last_look_sees_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks come during two looks, and then the tree is damaged: no verdict is without that."""
    machine = MadeUp()
    source = machine.source(moves=True)
    walk, walks = source._walk_outgoing, 0

    def moving(reading: Reading) -> Tree:
        nonlocal walks
        walks += 1
        if walks in (2, 3):
            machine.memory.add_page(0x20_0000 + 0x1000 * walks, 0)
        if walks == 4:
            machine.memory.set_entry(machine.memory.root, 12, 0x123)
        return walk(reading)

    monkeypatch.setattr(source, "_walk_outgoing", moving)
    facts, report = source.judge(lambda facts, _: check(facts))
    assert facts.outgoing.tree.state.problem_count == 1
    assert report.counts["bad-node"] == 1


def test_what_never_stands_still_is_judged_as_far_as_it_did() -> None:
    machine = MadeUp()
    machine.memory.add_page(0x20_0000, 0)
    source = machine.source(moves=True)
    look = source._with_scratch
    seen: list[Snapshot] = []

    def moving(reading: Reading, facts: Snapshot) -> Snapshot:
        machine.memory.add_page(0x30_0000 + 0x1000 * len(seen), 0)
        seen.append(facts)
        return look(reading, facts)

    source._with_scratch = moving  # type: ignore[method-assign]
    facts, found = source.judge(lambda facts, _: keys(facts))
    assert facts.outgoing.tree.state.moved == 1
    # All but the one that came during the last look.
    assert len(found) == len(seen)
    # A file of it has no other blocks, either.
    file = io.BytesIO()
    kept = source.snapshot(file=file)
    loaded = store._load(io.BytesIO(file.getvalue()), "a.khosnap")
    assert kept.outgoing.tree.state == loaded.outgoing.tree.state
    assert loaded.outgoing.tree.state.moved == 1
    assert len(keys(loaded)) == len(seen)
    assert keys(kept) == keys(loaded)
    assert sum(int(leaves.counts().sum()) for leaves in loaded.outgoing.tree.leaves) == len(seen)


# Each small fact


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("sysctl_bootid", "the boot id (sysctl_bootid)"),
        ("tainted_mask", "whether the kernel is tainted (tainted_mask)"),
        ("saved_command_line", "the command line (saved_command_line)"),
        ("prb", "the kernel log (prb)"),
        ("kexec_image", "the loaded kexec image (kexec_image)"),
        ("kexec_crash_image", "the loaded crash kernel (kexec_crash_image)"),
        ("luo_global", "LUO's state (luo_global)"),
        ("luo_file_handler_list", "LUO's file handlers (luo_file_handler_list)"),
        ("kho_scratch", "the scratch areas (kho_scratch)"),
        ("node_states", "the NUMA nodes (struct pglist_data)"),
        ("node_data", "the NUMA nodes (struct pglist_data)"),
        ("kho_scratch_cnt", "the scratch areas (kho_scratch)"),
        ("kho_in", "how this kernel came to be (kho_in)"),
    ],
)
def test_a_fact_that_cannot_be_read_is_named(variable: str, named: str) -> None:
    machine = MadeUp()
    source = machine.source()
    machine.faults.add(variable)
    for facts in every(source):
        assert facts.unreadable == [named]


def test_vmalloc_areas_that_cannot_be_read_are_named() -> None:
    for moves in (False, True):
        machine = MadeUp()
        gone = 0xFFFF_C900_0000_0000
        areas = [machine.new(bytes(16) + gone.to_bytes(8, "little")) for _ in range(2)]
        machine.link(machine.address("vmap_area_list"), *areas)
        facts = machine.source(moves).snapshot()
        assert facts.unreadable == ["2 vmalloc areas (struct vm_struct)"]
        machine.words(areas[1], areas[1])
        unreadable = machine.source(moves).snapshot().unreadable
        assert unreadable[0] == "the list of vmalloc areas (struct vmap_area), whole"


def test_scratch_that_makes_no_sense() -> None:
    machine = MadeUp()
    machine.set("kho_scratch_cnt", 5000)
    (named,) = machine.source().tree().unreadable
    assert named == "the scratch areas (kho_scratch): 5000 are more than any kernel has"
    machine.set("kho_scratch", 0)
    (named,) = machine.source().tree().unreadable
    assert named == "the scratch areas (kho_scratch): there are none, though there should be"
    # With KHO off there are none.
    machine.set("kho_enable", 0)
    assert machine.source().outline().unreadable == []


def test_scratch_of_a_set_up_that_failed() -> None:
    """memblock has the array again, and may have unmapped it; the count is as it was."""
    machine = MadeUp()
    machine.set("kho_enable", 0)
    for gone in (DIRECT_MAP + (1 << 44), DIRECT_MAP + RAM // 4):
        machine.set("kho_scratch", gone)
        facts = machine.source().outline()
        assert facts.scratch.tolist() == []
        assert not facts.unreadable


def test_scratch_that_was_handed_over() -> None:
    """A kernel with KHO off keeps it."""
    machine = MadeUp()
    areas = machine.source().outline().scratch.tolist()
    assert areas
    machine.set("kho_enable", 0)
    assert machine.source().outline().scratch.tolist() == []
    machine.set("kho_in", 0, 0x1000)
    assert machine.source().outline().scratch.tolist() == areas


def test_handlers_that_loop() -> None:
    machine = MadeUp()
    (handler,) = machine.handlers("memfd-v2")
    machine.words(handler + 48, handler + 48)
    (named,) = machine.source().tree().unreadable
    assert "the list does not end after 256" in named


def test_resources_that_loop() -> None:
    """What nodes span is taken for RAM, if there are any."""
    machine = MadeUp()
    child = machine.prog["iomem_resource"].child.value_()
    machine.words(child + 24, child)
    facts = machine.source().tree()
    assert facts.ram.tolist() == [[0, RAM]]
    assert facts.unreadable == [
        "where RAM is (iomem_resource): what nodes span is taken for it: its list is corrupt"
    ]
    machine.nodes()
    with pytest.raises(KhoscopeError, match="no System RAM"):
        machine.source()


def test_nodes() -> None:
    """Those that have memory, in the order of their memory."""
    machine = MadeUp()
    machine.nodes((RAM // 2, RAM), (0, 0), (0x1000, RAM // 2))
    for facts in every(machine.source()):
        assert facts.nodes == [Node(2, 0x1000, RAM // 2), Node(0, RAM // 2, RAM)]
        assert facts.unreadable == []


def test_nodes_that_make_no_sense() -> None:
    machine = MadeUp()
    source = machine.source()
    machine.nodes((0, RAM), (1 << 52, 1 << 53))
    facts = source.tree()
    assert facts.nodes is None
    assert facts.unreadable == [
        "the NUMA nodes (struct pglist_data): node 1 has memory where no processor has any"
    ]
    machine.set("nr_node_ids", 1 << 31)
    assert source.tree().unreadable == [
        "the NUMA nodes (struct pglist_data): more than any kernel has"
    ]


def test_a_subtree_that_cannot_be_read_is_named() -> None:
    machine = MadeUp()
    at = machine.new(b"what it is")
    subtrees = {"some\nthing": data(at - DIRECT_MAP, 10), "away": data(RAM, 10)}
    fdt = machine.new(blob(subtrees=subtrees))
    machine.set("kho_out", fdt)
    # What came may have been given back: it is not missed.
    machine.set("kho_in", fdt - DIRECT_MAP)
    source = machine.source()
    assert source.tree().unreadable == []
    machine.faults.add(at)
    assert source.tree().unreadable == ["the outgoing subtree 'some\\nthing'"]


def test_leaves_that_cannot_be_read_any_more_are_named() -> None:
    machine = MadeUp()
    for phys in (0x20_0000, 0x30_0000):
        machine.memory.add_page(phys, 0)
    source = machine.source()
    before = source.snapshot()
    (leaf,) = [
        int(phys) for nodes in before.outgoing.tree.nodes for phys in nodes[nodes.level == 0].phys
    ]
    assert source.snapshot(before).unreadable == []
    nothing = MadeUp()
    source = nothing.source()
    nothing.memory.unreadable.add(leaf)
    facts = source.snapshot(before)
    assert facts.unreadable == ["1 of the pages where the earlier snapshot's leaves were"]
    assert not len(Leaves.concatenate(facts.evidence))


# The log


def test_the_newest_lines_of_the_log_are_kept() -> None:
    machine = MadeUp()
    lines = [f"KHO: {n} failed" for n in range(100)]
    machine.log(*lines, "nothing of note")
    assert machine.source().tree().kernel.log == lines[-reading_module.TROUBLE_KEPT :]


@pytest.mark.parametrize("word", [0, 24, 32])
def test_a_log_that_is_corrupt(word: int) -> None:
    """Its size, the first and the last of its records."""
    machine = MadeUp()
    machine.log("KHO: failed")
    ring = int(machine.prog["prb"].value_())
    machine.words(ring + word, 2**61)
    if word == 0:
        machine.words(ring, 40)
    facts = machine.source().tree()
    assert facts.unreadable == ["the kernel log (prb): its ring buffer is corrupt"]
    assert facts.kernel.log == []


# LUO


LUO_V1 = blob({"compatible": b"luo-v1\0"})


def with_luo(machine: MadeUp, raw: bytes) -> int:
    """Hand over and be handed these bytes as LUO's subtree."""
    at = machine.new(raw)
    fdt = machine.new(blob(subtrees={"LUO": data(at - DIRECT_MAP, len(raw))}))
    machine.set("kho_out", fdt)
    machine.set("kho_in", fdt - DIRECT_MAP)
    return at - DIRECT_MAP


@pytest.mark.parametrize("lacks", ["luo_global", "luo_session", "luo_flb_global", "nothing"])
@pytest.mark.parametrize(
    ("raw", "compatible"),
    [
        (LUO_V1, "luo-v1"),
        (LUO_V1[:64] + bytes(4032), None),
        (b"luo-v9\0\0" + bytes(24), "luo-v9"),
    ],
)
def test_luo_of_an_abi_that_is_not_known(lacks: str, raw: bytes, compatible: str | None) -> None:
    machine = MadeUp({lacks})
    phys = with_luo(machine, raw)
    facts = machine.source().snapshot()
    assert facts.incoming is not None
    for side in (facts.outgoing, facts.incoming):
        assert side.luo is not None
        assert (side.luo.phys, side.luo.compatible) == (phys, compatible)
        assert side.luo.raw == raw[:32].hex()
    assert facts.unreadable == []


def test_luo_without_its_kernels_lists_is_not_left_out() -> None:
    machine = MadeUp({"luo_global"})
    raw = b"luo-v5\0\0" + bytes(24)
    with_luo(machine, raw)
    luo = machine.source().clients().outgoing.luo
    assert luo is not None
    assert (luo.compatible, luo.raw, luo.sessions) == ("luo-v5", raw.hex(), [])


def session(machine: MadeUp, name: str, *tokens: int) -> int:
    """A ``struct luo_session`` with a file for each token; where its link is."""
    handler = machine.new(b"vfio-v9")
    at = machine.new(name.encode())
    files = []
    for token in tokens:
        file = machine.new(bytes(56))
        machine.words(file, handler, token)
        files.append(file + 32)
    machine.link(at + 88 - 8, 0)
    machine.link(at + 72)
    machine.link(at + 88, *files)
    machine.words(at + 88 + 24, len(tokens))
    return at + 72


def listed(machine: MadeUp, *links: int) -> None:
    machine.link(machine.address("luo_session_global") + 24, *links)


def test_sessions_and_tokens_that_are_there_twice() -> None:
    machine = MadeUp()
    with_luo(machine, b"luo-v5\0\0" + bytes(24))
    listed(machine, *(session(machine, name, 7, 8, 7, 7) for name in ("a", "b", "a", "a")))
    luo = machine.source().clients().outgoing.luo
    assert luo is not None
    assert [each.name for each in luo.sessions] == ["a", "b"]
    assert luo.problems == ["session name 'a' is there twice"]
    for each in luo.sessions:
        assert [file.token for file in each.files] == [7, 8]
        assert each.problems == ["token 0x7 is there twice"]


def test_sessions_that_a_vmcore_lacks_are_named() -> None:
    for moves in (False, True):
        machine = MadeUp()
        with_luo(machine, b"luo-v5\0\0" + bytes(24))
        link = session(machine, "a")
        listed(machine, link)
        machine.faults.add(link & -4096)
        facts = machine.source(moves).clients()
        assert facts.outgoing.luo is not None
        assert bool(facts.outgoing.luo.problems) == moves
        assert facts.unreadable == ([] if moves else ["LUO's sessions (outgoing)"])
