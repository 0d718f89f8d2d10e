# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How wrong a kernel lets itself be, and what real clients of KHO hand over: that the exercise module
and the LUO sessions do what they say, by what the guest's memory holds.
"""

from __future__ import annotations

import errno
import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import pytest

from tests.vm.test_khoscope import host
from vm.content import content
from vm.exercise import Damage, Exercise, KernelLog, Piece, Unsupported, by_scenario
from vm.kernel import ARCHIVED, SERIES, series, under_test
from vm.luo import File, Memfd, hold, retrieve
from vm.machine import FINALIZE, CommandFailed, Machine, MachineError

PAGE = 4096

#: One kernel that is always there, and the older ones if they are asked for.
STORIES = ["7.2-fixed", *(name for name in under_test() if series(name) in ARCHIVED)]

#: Those with live update.
LUO = [name for name in STORIES if "CONFIG_LIVEUPDATE=n" not in SERIES[series(name)]]

#: Kernels that do not restore a block above MAX_PAGE_ORDER.
REFUSES_HUGE = [name for name in STORIES if series(name) == "6.18"]

#: Kernels that cannot unpreserve, and take subtrees only while somebody finalizes KHO.
NOTIFIED = [name for name in STORIES if series(name) == "6.18"]
UNNOTIFIED = [name for name in STORIES if name not in NOTIFIED]

#: What is made before the kexec: scenario and number.
MADE = [("huge", None), ("slab", None), ("vmalloc", 1100), ("vmalloc-pages", 70), ("blob", 3)]

#: Sessions, and their files by token.
SESSIONS = {
    "small": {1: Memfd(PAGE), 2: Memfd(4 << 20), 2**64 - 1: Memfd(0)},
    "a name with spaces, é": {7: Memfd(64 << 20, thp=True), 8: Memfd(10_000)},
}

RESERVED = "reserve_mem=4M:4096:khoscope"


@dataclass
class Story:
    """What was seen on the way of a kernel through a kexec."""

    kernel: str
    made: list[Piece] = field(default_factory=list)
    restored: list[Piece] = field(default_factory=list)
    freed: list[Piece] = field(default_factory=list)
    held: dict[str, dict[int, File]] = field(default_factory=dict)
    retrieved: dict[str, dict[int, File]] = field(default_factory=dict)
    #: The first bytes of some pages of each memfd, by session, token and offset in the file.
    pages: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    #: Names of subtrees, outgoing and incoming.
    subtrees: list[set[str]] = field(default_factory=list)
    complaints: list[str | None] = field(default_factory=list)
    dmesg: str = ""


def memory(machine: Machine, phys: int, size: int) -> bytes:
    """The guest's physical memory."""
    path = machine.directory / "memory"
    machine.qmp("pmemsave", val=phys, size=size, filename=str(path))
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def samples(file: File) -> list[tuple[int, int]]:
    """Some of a memfd's pages: offset in the file, physical address."""
    sizes = (end - first for first, end in file.ranges)
    offsets = itertools.accumulate(sizes, initial=0)
    starts = (first for first, _ in file.ranges)
    return list(itertools.islice(zip(offsets, starts, strict=False), 5))


def subtrees(machine: Machine, direction: str) -> set[str]:
    listing = f"/sys/kernel/debug/kho/{direction}/sub_fdts"
    return set(machine.run(("ls", listing), check=True).stdout.split())


@pytest.fixture(scope="module", params=STORIES)
def story(request: pytest.FixtureRequest) -> Story:
    story = Story(request.param)
    with Machine(story.kernel, append=RESERVED) as machine:
        exercise = Exercise(machine)
        log = KernelLog(machine)
        log.mark()
        exercise.load()
        for scenario, number in MADE:
            exercise.preserve(scenario, number)
        story.made = exercise.report()
        sessions = {
            name: hold(machine, name, files)
            for name, files in (SESSIONS if story.kernel in LUO else {}).items()
        }
        story.held = {name: session.files for name, session in sessions.items()}
        for name, files in story.held.items():
            for token, file in files.items():
                story.pages |= {
                    (name, token, offset): memory(machine, phys, 512)
                    for offset, phys in samples(file)
                }
        if story.kernel in LUO:
            hold(machine, "gone", {1: Memfd(PAGE)}).let_go()
        machine.finalize()
        story.subtrees.append(subtrees(machine, "out"))
        story.complaints.append(log.complaint())

        machine.load_kexec()
        machine.execute_kexec()
        story.dmesg = machine.run("dmesg", check=True).stdout
        story.subtrees.append(subtrees(machine, "in"))
        log.mark()
        exercise.load()
        for scenario, _ in MADE:
            if scenario != "slab":
                exercise.restore(scenario)
        story.restored = exercise.report()
        for scenario, pieces in by_scenario(story.restored).items():
            if {p.state for p in pieces} == {"restored"}:
                exercise.free(scenario)
        story.freed = exercise.report()
        story.retrieved = {name: retrieve(machine, name, SESSIONS[name]) for name in sessions}
        if story.kernel in LUO:
            with pytest.raises(MachineError, match="No such file"):
                retrieve(machine, "gone", [1])
        story.complaints.append(log.complaint())
    return story


def test_what_was_made(story: Story) -> None:
    pieces = by_scenario(story.made)
    assert {(p.state, p.ret) for p in story.made} == {("preserved", 0)}
    (huge,) = pieces["huge"]
    assert (huge.pages, huge.shape) == (2048, "1/1")
    assert huge.ranges[0][0] % (2048 * PAGE) == 0
    (slab,) = pieces["slab"]
    assert (slab.pages, slab.shape, slab.compound) == (1, "0", True)
    (area,), (single,) = pieces["vmalloc"], pieces["vmalloc-pages"]
    assert (area.pages, len(set(area.ranges))) == (1100, 1100)
    assert (single.pages, len(set(single.ranges))) == (70, 70)
    assert (area.call, single.call) == ("kho_preserve_vmalloc", "kho_preserve_pages")
    assert area.descriptor is not None
    assert {p.descriptor for p in story.made if p is not area} == {None}
    blobs = {f"kho_exercise-blob-{i}" for i in range(3)}
    assert {p.subtree for p in pieces["blob"]} == blobs
    assert all(blobs <= names for names in story.subtrees)


def test_it_comes_through_the_kexec(story: Story) -> None:
    before = {(p.scenario, p.piece): p for p in story.made}
    for piece in story.restored:
        made = before[piece.scenario, piece.piece]
        assert piece.ranges == made.ranges
        if piece.scenario == "slab":
            assert piece.state == "handed-over"
        elif piece.scenario == "huge" and story.kernel in REFUSES_HUGE:
            assert (piece.state, piece.ret) == ("restore-failed", -errno.ENOENT)
        else:
            assert (piece.state, piece.ret, piece.shape) == ("restored", 0, made.shape)
    refused = story.kernel in REFUSES_HUGE
    left = {"slab", "huge"} if refused else {"slab"}
    assert {p.state for p in story.freed if p.scenario not in left} == {"freed"}
    assert story.complaints == [None, "WARN" if refused else None]


@pytest.mark.parametrize("story", LUO, indirect=True)
def test_sessions_come_through_the_kexec(story: Story) -> None:
    for name, files in SESSIONS.items():
        for token, memfd in files.items():
            file = story.held[name][token]
            assert file.same
            assert file.size == memfd.size
            assert sum(end - first for first, end in file.ranges) == -(-file.size // PAGE) * PAGE
            assert story.retrieved[name][token] == file
    thp = story.held["a name with spaces, é"][7].ranges
    assert all(address % (2 << 20) == 0 for range in thp for address in range)


@pytest.mark.parametrize("story", LUO, indirect=True)
def test_the_content_is_where_the_process_says(story: Story) -> None:
    assert {(name, token) for name, token, _ in story.pages} == {
        (name, token) for name, files in SESSIONS.items() for token in files if files[token].size
    }
    for (name, token, offset), seen in story.pages.items():
        assert seen == content(token, 512, offset), (name, token, offset)


def test_reserve_mem_comes_through_the_kexec(story: Story) -> None:
    assert all("memblock" in names for names in story.subtrees)
    assert "Revived memory reservation 'khoscope' from KHO" in story.dmesg


# -- before a kexec ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=STORIES)
def exercise(request: pytest.FixtureRequest) -> Iterator[Exercise]:
    """The module in a guest; the tests free what they make."""
    with Machine(request.param) as machine:
        exercise = Exercise(machine)
        exercise.load()
        yield exercise


@dataclass
class Chain:
    """A ``struct kho_vmalloc`` and the chunks that it leads to, as far as there is memory."""

    total_pages: int
    chunks: list[int]
    listed: list[int]
    #: Where the last chunk leads: nowhere, to one of the chunks, or out of memory.
    end: int


def chain(exercise: Exercise, descriptor: int) -> Chain:
    first, total_pages, _, _ = struct.unpack("<QIHH", memory(exercise.machine, descriptor, 16))
    found = Chain(total_pages, [], [], first)
    while 0 < found.end < 1 << 30 and found.end not in found.chunks:
        found.chunks.append(found.end)
        found.end, *listed = struct.unpack("<512Q", memory(exercise.machine, found.end, PAGE))
        found.listed += [phys for phys in listed if phys]
    return found


def test_a_chain_is_broken_and_mended(exercise: Exercise) -> None:
    exercise.preserve("vmalloc", 1100)
    (piece,) = by_scenario(exercise.report())["vmalloc"]
    assert piece.descriptor is not None
    whole = chain(exercise, piece.descriptor)
    assert (whole.total_pages, len(whole.chunks), whole.end) == (1100, 3, 0)
    assert whole.listed == [first for first, _ in piece.ranges]
    seen = {}
    hows = list(get_args(Damage))
    if exercise.machine.kernel.name in NOTIFIED:
        hows.remove("unpreserved")
        with pytest.raises(Unsupported):
            exercise.damage("vmalloc", "unpreserved")
    for how in hows:
        exercise.damage("vmalloc", how)
        seen[how] = chain(exercise, piece.descriptor)
        exercise.mend("vmalloc")
        assert chain(exercise, piece.descriptor) == whole
    assert (seen["loop"].end, seen["loop"].chunks) == (whole.chunks[0], whole.chunks)
    assert (seen["outside-ram"].end, seen["outside-ram"].chunks) == (1 << 45, whole.chunks)
    assert seen.get("unpreserved", whole) == whole
    assert (seen["too-many"].total_pages, seen["too-few"].total_pages) == (1099, 1101)
    # What frees it does not follow a broken chain.
    log = KernelLog(exercise.machine)
    log.mark()
    exercise.damage("vmalloc", "loop")
    exercise.free("vmalloc")
    assert log.complaint() is None


@pytest.mark.parametrize("exercise", UNNOTIFIED, indirect=True)
def test_the_fdt_is_filled_and_emptied(exercise: Exercise) -> None:
    before = subtrees(exercise.machine, "out") | {"kho_exercise"}
    exercise.preserve("blob", 200)
    *added, refused = by_scenario(exercise.report())["blob"]
    assert {(p.call, p.ret, p.state) for p in added} == {("kho_add_subtree", 0, "preserved")}
    assert (refused.call, refused.ret, refused.state) == (
        "kho_add_subtree",
        -errno.ENOMEM,
        "unpreserved",
    )
    assert subtrees(exercise.machine, "out") == before | {str(p.subtree) for p in added}
    fdt = exercise.machine.run("od -An -tx1 -N8 /sys/kernel/debug/kho/out/fdt", check=True).stdout
    assert 4096 - 128 < int("".join(fdt.split()[4:]), 16) <= 4096
    exercise.free("blob")
    assert subtrees(exercise.machine, "out") == before


@pytest.mark.parametrize("exercise", UNNOTIFIED, indirect=True)
def test_blobs_that_nobody_preserves(exercise: Exercise) -> None:
    (scratch, _), *_ = exercise.scratch_areas()
    exercise.preserve("blob-lost")
    exercise.preserve("blob-at", scratch)
    pieces = by_scenario(exercise.report())
    (lost,), (at,) = pieces["blob-lost"], pieces["blob-at"]
    assert (lost.call, lost.ret, lost.shape) == ("kho_add_subtree", 0, "1")
    assert (at.call, at.ret, at.ranges) == (
        "kho_add_subtree",
        0,
        ((scratch, scratch + PAGE),),
    )
    assert {lost.subtree, at.subtree} <= subtrees(exercise.machine, "out")
    exercise.free("blob-lost")
    exercise.free("blob-at")
    assert not {lost.subtree, at.subtree} & subtrees(exercise.machine, "out")


@pytest.mark.older_kernels
@pytest.mark.parametrize("exercise", REFUSES_HUGE, indirect=True)
def test_a_block_that_restore_refuses(exercise: Exercise) -> None:
    """khoscope says so while it can still be preserved otherwise: before KHO is finalized."""
    exercise.preserve("huge")
    (huge,) = by_scenario(exercise.report())["huge"]
    asked = ("verify", "--json", "--only", "block-too-large,huge-order")
    (found,) = json.loads(host(*exercise.machine.source, *asked, status=1))["findings"]
    assert (found["rule"], found["order"]) == ("block-too-large", 11)
    assert int(found["phys"], 16) == huge.ranges[0][0]
    assert found["message"].endswith("restores no block above order 10")
    exercise.free("huge")


@pytest.mark.older_kernels
@pytest.mark.parametrize("kernel", NOTIFIED)
def test_finalizing_is_the_end_and_aborting_drops_all(kernel: str) -> None:
    with Machine(kernel) as machine:
        exercise = Exercise(machine)
        exercise.load()
        exercise.preserve("blob-lost")
        exercise.preserve("blob-at", exercise.scratch_areas()[0][0])
        made = {p.subtree for p in exercise.report()}
        assert not made & subtrees(machine, "out")
        machine.finalize()
        assert made | {"kho_exercise"} <= subtrees(machine, "out")
        exercise.preserve("contig")
        pieces = by_scenario(exercise.report())
        assert {(p.state, p.ret) for p in pieces["contig"]} == {("unpreserved", -errno.EBUSY)}
        assert {p.state for p in pieces["blob-lost"] + pieces["blob-at"]} == {"preserved"}
        machine.load_kexec()
        machine.run(f"echo 0 >{FINALIZE}", check=True)
        assert {p.state for p in exercise.report()} == {"unpreserved"}
        asked = ("verify", "--json", "--only", "not-finalized")
        (found,) = json.loads(host(*machine.source, *asked, status=1))["findings"]
        assert found["message"].endswith("finalizing was undone")
        # More subtrees than the root FDT has room for. KHO fails, and drops all once more.
        exercise.preserve("blob", 200)
        with pytest.raises(CommandFailed, match="I/O error"):
            machine.finalize()
        assert {p.state for p in exercise.report()} == {"unpreserved"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("preserve", "blob 0"),
        ("preserve", "blob-lost 2"),
        ("preserve", "blob-at"),
        ("preserve", "blob-at 0x1001"),
        ("preserve", "blob-at 0x7fffffffc000"),
        ("preserve", "folio-at"),
        ("preserve", "folio-at 0x1001"),
        ("preserve", "folio-at 0x7fffffffc000"),
        ("preserve", "huge 2"),
        ("preserve", "slab 2"),
        ("break", ""),
        ("break", "vmalloc"),
        ("break", "vmalloc nothing"),
        ("break", "vmalloc loop loop"),
        ("break", "contig loop"),
        ("break", "nothing loop"),
    ],
)
def test_bad_input(exercise: Exercise, file: str, words: str) -> None:
    before = [(p.scenario, p.piece, p.state) for p in exercise.report()]
    write = f"echo '{words}' >/sys/kernel/debug/kho_exercise/{file}"
    result = exercise.machine.run(("bash", "-c", write), env={"LC_ALL": "C"})
    assert result.stderr.endswith("write error: Invalid argument\n")
    assert [(p.scenario, p.piece, p.state) for p in exercise.report()] == before


def test_there_is_nothing_to_break(exercise: Exercise) -> None:
    write = "echo 'vmalloc-huge loop' >/sys/kernel/debug/kho_exercise/break"
    result = exercise.machine.run(("bash", "-c", write), env={"LC_ALL": "C"})
    assert "No such file" in result.stderr


@pytest.mark.parametrize("exercise", LUO, indirect=True)
def test_hugetlb_is_refused(exercise: Exercise) -> None:
    """So huge pages in sessions are transparent ones."""
    script = """
import os
from khoscope.carry.liveupdate import LiveUpdate
with LiveUpdate() as device, device.create_session("a") as session:
    session.preserve_fd(os.memfd_create("b", os.MFD_HUGETLB), 1)
"""
    refused = exercise.machine.run(
        ("python3", "-c", script), env={"PYTHONPATH": "/khoscope"}, timeout=60
    )
    assert refused.stderr.splitlines()[-1].startswith(f"FileNotFoundError: [Errno {errno.ENOENT}]")


def test_without_its_debugging_kho_takes_scratch() -> None:
    with Machine("7.2-nodebug") as machine:
        exercise = Exercise(machine)
        exercise.load()
        log = KernelLog(machine)
        log.mark()
        (first, _), *_ = exercise.scratch_areas()
        exercise.preserve("scratch", first)
        pieces = by_scenario(exercise.report())["scratch"]
        assert [(p.ranges, p.ret, p.state) for p in pieces] == [
            (((first, first + size),), 0, "preserved") for size in (0x1000, 0x2000, 0x4000)
        ]
        exercise.free("scratch")
        assert {p.state for p in by_scenario(exercise.report())["scratch"]} == {"freed"}
        assert log.complaint() is None
