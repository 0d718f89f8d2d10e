# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope trace`` under load, attached many times, killed, and with less than it is used to."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest import come_and_go
from vm.exercise import Exercise, KernelLog, Piece
from vm.machine import Machine
from vm.trace import Trace

#: Pages of the load, of the load on a tiny buffer, and of what goes across the kexec.
MANY, SOME, FEW = 200_000, 5_000, 1_000
#: So long may preserving or freeing them take while khoscope wants the processors, too.
TIMEOUT = 300.0

_GUEST = Path(__file__).parent / "guest"
PYTHON = ("env", "PYTHONPATH=/khoscope", "python3")


def list_blocks(pages: int) -> int:
    """Blocks of the list of addresses that the module preserves with so many pages: a vmalloc area
    of 8 bytes for each, and a chunk for each 511 pages of that."""
    area = -(-pages * 8 // 4096)
    return area + -(-area // 511)


def events_of(pages: int) -> int:
    """Events of preserving, or of unpreserving, so many pages one by one, and their list."""
    return 2 * pages + 1 + list_blocks(pages)


#: Events of the module's first piece: a page for its record, and the subtree.
FIRST = 3

#: Of each of the clients that come and go, calls of each function; and all their events.
OF_CLIENT = come_and_go.ROUNDS // len(come_and_go.CLIENTS) * come_and_go.CALLS
COME_AND_GO = len(come_and_go.CLIENTS) * OF_CLIENT * 4
#: Not more than this may the memory of a trace grow, KiB: the symbols of this kernel take 4 MiB,
#: and are read again whenever another client is there.
GROWTH = 4 << 10


@dataclass
class Story:
    """What was seen."""

    #: What ``--check`` says of clients that come and go, and of the load.
    load: str = ""
    #: What the recording of a load does.
    recorded: str = ""
    #: What lines say of these clients, and what the two traces hold meanwhile.
    lines: str = ""
    held: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    status: int | None = None
    #: What the kernel complained of, and what is attached, when all have ended.
    complaint: str | None = None
    left: list[int] = field(default_factory=list)
    killed: int | None = None
    attached: dict[str, Any] = field(default_factory=dict)
    crippled: dict[str, Any] = field(default_factory=dict)
    crippled_status: int | None = None
    restored: list[Piece] = field(default_factory=list)


@pytest.fixture(scope="module")
def story() -> Story:
    """All of it on one machine, as each trace takes its time to start."""
    story = Story()
    with Machine("7.2-fixed", memory=3072) as machine:
        exercise, log = Exercise(machine), KernelLog(machine)
        for script in ("attach.py", "come_and_go.py", "crippled.py"):
            machine.copy_in(_GUEST / script, f"/root/{script}")
        log.mark()
        lines = Trace(machine, "lines")
        with Trace(machine, "load", "--check") as load:
            with lines:
                pids = f"$(cat {load.directory}/pid {lines.directory}/pid)"
                words = f"python3 /root/come_and_go.py {pids}"
                story.held = json.loads(machine.run(words, timeout=TIMEOUT, check=True).stdout)
            story.lines = lines.output()
            exercise.load()
            exercise.preserve("many", MANY, timeout=TIMEOUT)
            exercise.free("many", timeout=TIMEOUT)
        story.load = load.output()
        assert load.status == 0, story.load + load.errors()

        with Trace(machine, "record", "--record", "/root/load.khotrace", "--summary") as record:
            exercise.preserve("many", MANY, timeout=TIMEOUT)
            exercise.free("many", timeout=TIMEOUT)
            # Much of it still waits to be written.
            record.end(timeout=3 * TIMEOUT)
        replay = ("khoscope", "trace", "--replay", "/root/load.khotrace", "--summary")
        story.recorded = machine.run(replay, timeout=TIMEOUT, check=True).stdout

        tiny = Trace(machine, "tiny", "--json", "--check", "--buffer", "4", "--probe", "kprobe")
        killed = Trace(machine, "killed", "--summary")
        with tiny, killed:
            busy = f"echo many {SOME} >/sys/kernel/debug/kho_exercise/preserve"
            machine.run(f"{busy} & kill -KILL $(cat {killed.directory}/pid); wait $!", check=True)
            story.killed = killed.wait()
            story.status = tiny.end()
        story.tiny = json.loads(tiny.output())
        exercise.free("many")
        story.attached = json.loads(
            machine.run((*PYTHON, "/root/attach.py"), timeout=600, check=True).stdout
        )
        story.left = story.attached["before"]
        story.complaint = log.complaint()

        exercise.preserve("many", FEW)
        for name in ("contig", "split"):
            exercise.preserve(name)
        exercise.preserve("part")
        machine.load_kexec()
        machine.execute_kexec()
        crippled = (*PYTHON, "/root/crippled.py", "trace")
        options = ("--json", "--check", "--only", "restore,preserve", "--buffer", "1024")
        with Trace(machine, "crippled", *options, command=crippled) as trace:
            exercise.load()
            for name in ("many", "contig", "split", "part"):
                exercise.restore(name)
            exercise.preserve("many", FEW)
        story.crippled, story.crippled_status = json.loads(trace.output()), trace.status
        story.restored = exercise.report()
    return story


def number(text: str) -> int:
    return int(text.replace(",", ""))


def totals(summary: str) -> tuple[int, int]:
    """Calls, and blocks of a page each."""
    line = r"^([\d,]+) calls \(0 failed\), ([\d,]+) blocks, ([\d,]+) pages$"
    found = re.search(line, summary, re.MULTILINE)
    assert found, summary
    calls, blocks, pages = map(number, found.groups())
    assert blocks == pages
    return calls, blocks


# -- every event is accounted for ------------------------------------------------------------------


def test_load_under_default_settings(story: Story) -> None:
    """400,000 calls, counted by kind in the kernel: not one of them is lost, nor any block."""
    calls, blocks = totals(story.load)
    assert calls + blocks == FIRST + 2 * events_of(MANY) + COME_AND_GO
    assert "\nevery event was seen, every refcount was read\n" in story.load
    for name in ("preserve_pages", "unpreserve_pages"):
        assert re.search(rf"^{name} +{MANY:,} +0 +{MANY:,}$", story.load, re.MULTILINE)
    assert story.load.splitlines()[-1] == "PASS: nothing wrong was seen (0 errors, 0 warnings)"


def test_load_that_is_recorded(story: Story) -> None:
    """Each call by itself, and its line: less than one of a hundred events is lost, and counted."""
    made = 2 * events_of(MANY)
    calls, blocks = totals(story.recorded)
    said = re.search(r"events lost: ([\d,]+)", story.recorded)
    lost = number(said[1]) if said else 0
    assert calls + blocks + lost == made
    assert lost < made / 100


def test_tiny_buffer_loses_and_says_how_much(story: Story) -> None:
    """4 KiB hold a dozen calls: what is not there is counted, and no --check passes then."""
    made, losses = events_of(SOME), story.tiny["losses"]
    assert story.tiny["buffer"] == "ring buffer of 4 KiB"
    assert losses["lost"] > 0
    assert losses["made"] == made
    seen = story.tiny["summary"]["total"]["calls"] + story.tiny["blocks"]
    assert seen + losses["lost"] == made
    assert losses["missed"] == 0
    assert story.tiny["verdict"] == "incomplete"
    assert story.tiny["counts"] == {"events-lost": 1}
    (finding,) = story.tiny["findings"]
    assert f"{losses['lost']:,}" in finding["message"]
    assert story.status == 3


# -- clients that come and go, and processors ------------------------------------------------------


@pytest.mark.parametrize("client", come_and_go.CLIENTS)
def test_clients_that_come_and_go(story: Story, client: str) -> None:
    """
    Each has all its calls and no others, although the two are in the same place; as do tasks that
    live for one write, and a processor before and after it was away.
    """
    assert len(set(story.held["addresses"])) == 1
    (sums,) = re.findall(rf"\ntime_\w+ \[{client}\]\n(.*?)\n\n", story.load, re.DOTALL)
    for name in ("preserve_pages", "unpreserve_pages"):
        assert re.search(rf"^{name} +{OF_CLIENT:,} +0 +{OF_CLIENT:,}$", sums, re.MULTILINE)
    of_client = re.findall(rf"^\S+\[\d+\] time_\w+ \[{client}\]\n((?: .*\n)+)", story.lines, re.M)
    calls = "".join(of_client)
    assert len(re.findall(r" preserve_pages ", calls)) == OF_CLIENT
    assert len(re.findall(r" unpreserve_pages ", calls)) == OF_CLIENT


def test_no_line_is_lost_or_of_others(story: Story) -> None:
    assert "[unknown]" not in story.lines
    total = len(come_and_go.CLIENTS) * 2 * OF_CLIENT
    assert re.search(rf"^{total:,} calls \(0 failed\), {total:,} blocks", story.lines, re.MULTILINE)
    assert "lost" not in story.lines


def test_a_trace_does_not_grow(story: Story) -> None:
    """Neither its memory nor its maps, after more of the same: rounds are counted, not time."""
    first, last = story.held["held"]
    for before, after in zip(first["kib"], last["kib"], strict=True):
        assert after - before < GROWTH, story.held
    for name, entries in last["entries"]:
        # No task is in a call; kinds of calls differ by their latency.
        assert entries <= {"tasks": 0, "call_kinds": 64, "block_kinds": 32}[name], story.held
    assert sorted(name for name, _ in last["entries"]) == [
        "block_kinds",
        "call_kinds",
        "tasks",
        "tasks",
    ]


# -- nothing stays behind --------------------------------------------------------------------------


def test_killed_in_the_middle(story: Story) -> None:
    """kill -9 while the calls come: the kernel takes its probes away, and the other trace goes on
    (see above: it has counted every event)."""
    assert story.killed == 128 + 9
    assert story.left == [0, 0]


def test_attached_and_detached_fifty_times(story: Story) -> None:
    """
    No probe is left, nor any BPF program, and the kernel has nothing to complain of.

    Compiling takes a minute, so that of the fifty only two are whole: by fentry and by kprobes.
    The others attach and detach the kprobes of one compiled program.
    """
    cycles, again = story.attached["full"], story.attached["again"]
    assert len(cycles) + len(again) >= 50
    assert cycles == [[0, 0]] * len(cycles)
    assert again == [0] * len(again)
    # That it looked in the right places: while they are attached they are seen there.
    assert all(functions and programs for functions, programs in story.attached["on"])
    assert story.complaint is None


# -- a kernel that has less ------------------------------------------------------------------------


def test_calls_are_counted_all_the_same(story: Story) -> None:
    """1,000 pages each restored and preserved, none more, none less."""
    found = story.crippled
    assert found["buffer"] == "ring buffer of 1 MiB"
    functions = found["summary"]["total"]["functions"]
    part = 1
    restored = FEW + 4 + 4 + part
    assert functions["kho_restore_pages"] == {
        "calls": restored,
        "failed": 0,
        "pages": FEW + 2 * 30 + 5,
    }
    assert functions["kho_preserve_pages"] == {"calls": FEW, "failed": 0, "pages": FEW}
    losses = found["losses"]
    assert (losses["lost"], losses["missed"], losses["open"]) == (0, 0, 0)
    assert losses["made"] == found["summary"]["total"]["calls"] + found["blocks"]


def test_restore_page_that_is_inlined(story: Story) -> None:
    """The calls that it is inlined into tell of their blocks, and each is checked."""
    found = story.crippled
    assert found["missing"]["kho_restore_page"] == "its callers tell what they restore"
    assert found["missing"]["kho_unpreserve_folio"] == "not in this kernel"
    calls = {
        call["phys"]: call
        for call in found["calls"]
        if call["call"] == "kho_restore_pages" and call["pages"] > 1
    }
    for piece in story.restored:
        if piece.scenario not in ("contig", "split", "part") or piece.state != "restored":
            continue
        call = calls[f"{piece.ranges[0][0]:#x}"]
        sizes = [block["pages"] for block in call["blocks"]]
        assert sizes == ([4, 1] if piece.scenario == "part" else [piece.pages])
        first, *_ = call["blocks"]
        tails = first["refcounts"]["zeros"], first["refcounts"]["ones"]
        whole = sizes[0] - 1
        assert tails == ((0, whole) if piece.scenario == "split" else (whole, 0))
        assert call["findings"] == []
    assert found["losses"]["sampled"] == 0
    assert found["counts"] == {}
    assert found["verdict"] == "pass"
    assert story.crippled_status == 0
