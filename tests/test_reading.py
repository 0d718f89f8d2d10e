# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What is read of a made-up kernel: each fact is there or is named, and a bug of ours gets out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from khoscope.abi.keys import BlockLimits
from khoscope.facts.columns import Leaves
from khoscope.facts.snapshot import KexecImage, Snapshot
from khoscope.sources import probe
from khoscope.sources import reading as reading_module
from khoscope.sources.kernel import KernelSource
from khoscope.words.errors import KhoscopeError
from tests.made_up import BIG_ENDIAN, DIRECT_MAP, RAM, MadeUp, mapped
from tests.test_fdt import blob, data


@pytest.fixture(autouse=True)
def _mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with mapped(monkeypatch):
        yield


def every(source: KernelSource) -> list[Snapshot]:
    """What each kind of look gives."""
    return [source.tree(), source.clients(), source.status(), source.snapshot()]


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
    for look in (source.tree, source.clients, source.status, source.snapshot):
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
        ({"pglist_data"}, []),
    ],
)
def test_parts_that_not_all_kernels_have(lacks: set[str], named: list[str]) -> None:
    facts = MadeUp(lacks).source().snapshot()
    assert facts.unreadable == named
    assert (facts.image is None) == ("kexec_image" in lacks)
    assert (facts.crash_image is None) == ("kexec_crash_image" in lacks)
    assert (facts.liveupdate is None) == ("luo_global" in lacks)


def test_kernels_that_keep_it_elsewhere() -> None:
    page = "u64 flags; u64 compound_info; u64 lru; u64 private; u32 page_type; atomic _refcount"
    for other, said in (
        (page.replace("compound_info", "compound_head"), "no compound_info"),
        (page + "; u64 memdesc", "not in page->private"),
        (page.replace("u64 private", "u32 private"), "not in page->private"),
    ):
        with pytest.raises(KhoscopeError, match=said):
            MadeUp(members={"page": other}).source()


def test_big_endian() -> None:
    with pytest.raises(KhoscopeError, match="64-bit little-endian"):
        MadeUp(platform=BIG_ENDIAN).source()


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
    free = KernelSource._scratch_free

    def moving(self: KernelSource, facts: Snapshot) -> list[int | None]:
        nonlocal attempts
        attempts += 1
        machine.faults.clear()
        if attempts == 1:
            machine.memory.add_page(0x20_0000, 0)
        return free(self, facts)

    machine.faults.add("kho_scratch_cnt")
    monkeypatch.setattr(KernelSource, "_scratch_free", moving)
    facts = source.snapshot()
    assert attempts == 2
    assert facts.outgoing.tree.state.moved == 0
    assert facts.unreadable == []


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
    assert named == "the scratch areas (kho_scratch): there are none, though KHO is on"
    # With KHO off there are none.
    machine.set("kho_enable", 0)
    assert machine.source().outline().unreadable == []


def test_handlers_that_loop() -> None:
    machine = MadeUp()
    (handler,) = machine.handlers("memfd-v2")
    machine.words(handler + 48, handler + 48)
    (named,) = machine.source().tree().unreadable
    assert "the list does not end after 256" in named


def test_resources_that_loop() -> None:
    """Nodes are of no help here: there are none."""
    machine = MadeUp()
    child = machine.prog["iomem_resource"].child.value_()
    machine.words(child + 24, child)
    with pytest.raises(KhoscopeError, match="no System RAM"):
        machine.source()


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
