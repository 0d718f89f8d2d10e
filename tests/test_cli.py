# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line, as a user or a script meets it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khoscope import __version__
from khoscope.cli import parser
from khoscope.facts import store
from khoscope.facts.calls import Losses, Tracing
from khoscope.facts.columns import Leaves
from khoscope.facts.snapshot import Handover, Scan, Snapshot
from khoscope.facts.tree import Tree
from khoscope.trace.kinds import Counted
from khoscope.trace.record import Recorder
from tests.command import Result, Run
from tests.synthetic import FIXED, PLAIN, Block, missing, rich, rich_before, snapshot
from tests.test_trace_assemble import (
    FRAMES,
    added,
    as_read,
    assembler,
    call,
    page_at,
    restored,
)
from tests.test_trace_session import CALLERS, FakeProbes

REPOSITORY = Path(__file__).parent.parent
NEXT_BOOT = "00000000-0000-0000-0000-000000000002"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Snapshot files by name."""
    good_blocks = [Block(n << 20, n % 4) for n in range(1, 31)]
    good_blocks += [Block.split(1 << 30, 9, type=1), Block.split(3 << 29, 2, type=1)]
    good = snapshot(FIXED, good_blocks)
    moved = replace(good.outgoing.tree, state=replace(good.outgoing.tree.state, moved=3))
    after = snapshot(
        FIXED,
        [],
        boot_id=NEXT_BOOT,
        handover=Handover(True, "7.2.0-test", 1),
        watched=(good, good_blocks),
        evidence=good_blocks,
    )
    made = {
        "good": good,
        "empty": snapshot(FIXED, []),
        "plain": snapshot(PLAIN, good_blocks),
        "moved": replace(good, outgoing=replace(good.outgoing, tree=moved)),
        "after": after,
        "unseen": replace(after, scan=Scan((1 << 20) - 1, 1)),
        "rich": rich(),
        "before": rich_before(),
        "fewer": snapshot(FIXED, [*good_blocks[1:], Block(5 << 28, 0)], boot_id=NEXT_BOOT),
        "large": large(good),
    }
    directory = tmp_path_factory.mktemp("snapshots")
    for name, facts in made.items():
        store.save_file(facts, directory / name)
    return {name: directory / name for name in made}


def large(like: Snapshot) -> Snapshot:
    """More blocks than a pipe holds."""
    full = Leaves(np.array([1 << 52], np.uint64), np.full((1, 4096), 0xFF, np.uint8))
    return replace(
        like,
        outgoing=replace(like.outgoing, tree=Tree(like.outgoing.tree.state, [], [full]), blocks=[]),
    )


# tree


def test_tree_text(run: Run, files: dict[str, Path]) -> None:
    result = run("--snapshot", files["good"], "tree")
    assert (result.status, result.err) == (0, "")
    assert "7.2.0-test, by hand" in result.out
    assert "kho-v5, page type at key bit 53" in result.out
    totals = [line.split() for line in result.out.splitlines() if line.split()[:1] == ["total"]]
    assert totals == [["total", "32", "627", "2.4", "MiB"]]
    assert "… 12 more blocks (--limit 0 shows all)" in result.out
    every = run("--snapshot", files["good"], "tree", "--limit", 0).out
    assert "more blocks" not in every
    assert sum(line.startswith("0x") for line in every.splitlines()) == 32
    three = run("--snapshot", files["good"], "tree", "--limit", 3).out
    assert sum(line.startswith("0x") for line in three.splitlines()) == 3
    assert "… 29 more blocks" in three


def test_tree_that_is_empty(run: Run, files: dict[str, Path]) -> None:
    result = run("--snapshot", files["empty"], "tree")
    assert result.status == 0
    assert any(line.split() == ["total", "0", "0", "0", "B"] for line in result.out.splitlines())
    assert run("--snapshot", files["empty"], "tree", "--json").document["blocks"] == []
    assert run("--snapshot", files["empty"], "tree", "--jsonl").out == ""


def is_address(value: object) -> bool:
    return isinstance(value, str) and value == f"{int(value, 16):#x}"


def test_tree_json(run: Run, files: dict[str, Path]) -> None:
    document = run("--snapshot", files["good"], "tree", "--json").document
    assert document["schema"] == "khoscope.tree/1"
    assert (document["tree"], document["evidence_only"]) == ("outgoing", False)
    assert (document["moved"], document["bad_entries"], document["problems"]) == (0, 0, [])
    assert is_address(document["root"])
    assert document["kernel"]["release"] == "7.2.0-test"
    assert document["abi"]["type_bit"] == 53
    assert "nodes" not in document
    assert len(document["blocks"]) == 32
    assert all(
        is_address(block["phys"]) and is_address(block["key"]) for block in document["blocks"]
    )
    assert document["blocks"][-1] == {
        "phys": "0x60000000",
        "order": 2,
        "pages": 4,
        "type": "split",
        "key": hex(FIXED.kho_radix_encode_key(0x60000000, 2, 1)),
    }
    assert sum(total["blocks"] for total in document["totals"]) == 32
    assert sum(total["pages"] for total in document["totals"]) == 627
    assert sum(total["bytes"] for total in document["totals"]) == 627 * 4096


def test_tree_lines_are_the_blocks_of_the_document(run: Run, files: dict[str, Path]) -> None:
    for which in ([], ["--incoming"], ["--order", "1"]):
        document = run("--snapshot", files["rich"], "tree", *which, "--json").document
        lines = run("--snapshot", files["rich"], "tree", *which, "--jsonl").lines
        assert lines == document["blocks"] != []


def test_tree_with_problems_and_nodes(run: Run, files: dict[str, Path]) -> None:
    document = run("--snapshot", files["rich"], "tree", "--json", "--nodes").document
    assert document["bad_entries"] == 1
    [problem] = document["problems"]
    assert (problem["index"], problem["entry"]) == (511, "0xc")
    assert is_address(problem["table"])
    assert document["nodes"][0]["level"] == FIXED.tree_max_depth - 1
    assert all(is_address(node["phys"]) and is_address(node["key"]) for node in document["nodes"])
    text = run("--snapshot", files["rich"], "tree", "--nodes").out
    assert "1 bad entries were not followed" in text
    assert "entry 511 = 0xc: not aligned to a page" in text
    assert "first key" in text


def test_tree_that_moved(run: Run, files: dict[str, Path]) -> None:
    assert "3 blocks left out" in run("--snapshot", files["moved"], "tree").out
    assert run("--snapshot", files["moved"], "tree", "--json").document["moved"] == 3


def test_incoming(run: Run, files: dict[str, Path]) -> None:
    text = run("--snapshot", files["rich"], "tree", "--incoming")
    assert text.status == 0
    assert "evidence only" in text.out
    document = run("--snapshot", files["rich"], "tree", "--incoming", "--json").document
    assert (document["tree"], document["evidence_only"]) == ("incoming", True)
    assert len(document["blocks"]) == 25


def test_incoming_without_a_handover(run: Run, files: dict[str, Path]) -> None:
    for way in ([], ["--json"], ["--jsonl"]):
        result = run("--snapshot", files["good"], "tree", "--incoming", *way)
        result.refused("not handed anything")
        assert result.out == ""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--order", "9"], [(1 << 30, 9)]),
        (["--order", "63"], []),
        (["--type", "split", "--order", "2"], [(3 << 29, 2)]),
        (["--phys", "0x300000"], [(3 << 20, 3)]),
        (["--phys", "0x307fff"], [(3 << 20, 3)]),
        (["--phys", "0x308000"], []),
        (["--phys", "0x307fff..0x400001"], [(4 << 20, 0), (3 << 20, 3)]),
        (["--phys", "1073745920"], [(1 << 30, 9)]),
        (["--phys", "0x40000000..0x10000000000000000"], [(1 << 30, 9), (3 << 29, 2)]),
        (["--phys", "0xffffffffffffffff"], []),
    ],
)
def test_filters(
    run: Run, files: dict[str, Path], words: list[str], wanted: list[tuple[int, int]]
) -> None:
    lines = run("--snapshot", files["good"], "tree", "--jsonl", *words).lines
    assert sorted((int(b["phys"], 16), b["order"]) for b in lines) == sorted(wanted)


# verify


def test_verify_passes(run: Run, files: dict[str, Path]) -> None:
    result = run("--snapshot", files["good"], "verify")
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "PASS: safe to kexec (0 errors, 0 warnings)"
    result = run("--snapshot", files["good"], "verify", "--json")
    assert result.status == 0
    document = result.document
    assert document["schema"] == "khoscope.verify/1"
    assert (document["verdict"], document["blocks"], document["findings"]) == ("pass", 32, [])
    assert (document["incomplete"], document["fates"], document["counts"]) == ([], None, {})


def test_verify_finds(run: Run, files: dict[str, Path]) -> None:
    result = run("--snapshot", files["plain"], "verify", "--limit", 2)
    assert (result.status, result.err) == (1, "")
    assert "error: wrong-after-restore (23)" in result.out
    assert "1/0 now, 7.2.0-test as the next kernel" in result.out
    assert "… 21 more" in result.out
    assert result.out.splitlines()[-1] == (
        "FAIL: not safe to kexec: wrong-after-restore (23 errors, 0 warnings)"
    )
    result = run("--snapshot", files["plain"], "verify", "--json")
    assert result.status == 1
    assert result.document["verdict"] == "fail"
    assert result.document["counts"] == {"wrong-after-restore": 23}
    first = result.document["findings"][0]
    assert first.keys() == {"rule", "severity", "phys", "order", "message", "explain"}
    assert is_address(first["phys"])


def test_verify_across_the_kexec(run: Run, files: dict[str, Path]) -> None:
    result = run("--snapshot", files["after"], "verify", "--before", files["good"])
    assert result.status == 0
    assert "of the recorded blocks: 32 restored" in result.out
    document = run(
        "--snapshot", files["after"], "verify", "--before", files["good"], "--json"
    ).document
    assert (document["verdict"], document["fates"]) == ("pass", {"restored": 32})


def test_verify_of_what_was_not_all_seen(run: Run, files: dict[str, Path]) -> None:
    for words in (
        ["--snapshot", files["moved"], "verify"],
        ["--snapshot", files["unseen"], "verify", "--before", files["good"]],
    ):
        result = run(*words)
        assert (result.status, result.err) == (3, "")
        assert result.out.splitlines()[-1].startswith("INCOMPLETE: no verdict: 1 thing ")
        assert "incomplete: " in result.out
        result = run(*words, "--json")
        assert (result.status, result.err) == (3, "")
        assert result.document["verdict"] == "incomplete"
        assert len(result.document["incomplete"]) == 1


def test_verify_of_other_kernels(run: Run, files: dict[str, Path]) -> None:
    result = run("--snapshot", files["after"], "verify", "--before", files["fewer"])
    result.refused("does not hold the pages", "khoscope snapshot --before")
    result = run("--snapshot", files["good"], "verify", "--before", files["good"])
    result.refused("does not hold the pages")


# snapshot, diff, demo and the rest


def test_snapshot(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    result = run("--snapshot", files["good"], "snapshot", copy)
    assert result.status == 0
    assert f"wrote {copy}" in result.out
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert run("diff", files["good"], copy).status == 0
    document = run("--snapshot", files["good"], "snapshot", copy, "--json").document
    assert document["schema"] == "khoscope.snapshot/1"
    assert (document["file"], document["bytes"]) == (str(copy), copy.stat().st_size)
    result = run("--snapshot", files["good"], "snapshot", tmp_path / "no" / "copy")
    result.refused("No such file or directory")


def test_diff(run: Run, files: dict[str, Path]) -> None:
    same = run("diff", files["good"], files["good"])
    assert (same.status, same.err) == (0, "")
    assert "no single fact differs" in same.out
    assert "0 removed, 0 added, 0 with other struct pages" in same.out
    assert run("diff", files["good"], files["good"], "--jsonl").out == ""

    other = run("diff", files["good"], files["fewer"])
    assert other.status == 0
    assert "boot id: 00000000-0000-0000-0000-000000000001" in other.out
    assert "1 removed, 1 added, 0 with other struct pages" in other.out
    document = run("diff", files["good"], files["fewer"], "--json").document
    assert document["schema"] == "khoscope.diff/1"
    assert document["counts"] == {"removed": 1, "added": 1}
    assert document["facts"] == [
        {"what": "boot id", "a": NEXT_BOOT[:-1] + "1", "b": NEXT_BOOT},
    ]
    changes = {(block["change"], block["phys"]) for block in document["blocks"]}
    assert changes == {("removed", hex(1 << 20)), ("added", hex(5 << 28))}
    lines = run("diff", files["good"], files["fewer"], "--jsonl").lines
    assert lines == document["blocks"]


def test_diff_of_struct_pages(run: Run, tmp_path: Path) -> None:
    for name, block in (("a", Block(0x4000, 2)), ("b", Block.split(0x4000, 2))):
        store.save_file(snapshot(FIXED, [block]), tmp_path / name)
    [line] = run("diff", tmp_path / "a", tmp_path / "b", "--jsonl").lines
    assert (line["change"], line["phys"]) == ("pages", "0x4000")
    assert line["facts"] == {"zeros": [3, 0], "ones": [0, 3]}
    assert "contig 1/0 → 1/1" in run("diff", tmp_path / "a", tmp_path / "b").out


def test_diff_of_other_page_sizes(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    from khoscope.abi.keys import Abi

    store.save_file(snapshot(Abi.for_page_shift(16), []), tmp_path / "b")
    run("diff", files["good"], tmp_path / "b").refused("65536 bytes", "same page size")


def test_shell_needs_memory(run: Run, files: dict[str, Path]) -> None:
    run("--snapshot", files["good"], "shell").refused("facts, not memory")


def test_shell_needs_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    run("shell").refused("needs a terminal")


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"khoscope {__version__}\n"
    result = run("--help")
    assert result.status == 0
    assert "exit status: 0 fine" in result.out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["tree", "--order", "x"],
        ["tree", "--type", "wrong"],
        ["tree", "--phys", "x"],
        ["tree", "--phys", "5..5"],
        ["tree", "--phys", "9..5"],
        ["tree", "--phys", "-1"],
        ["tree", "--phys", "0..0x10000000000000001"],
        ["tree", "--limit", "-1"],
        ["tree", "--limit", "many"],
        ["tree", "--json", "--jsonl"],
        ["verify", "--jsonl"],
        ["snapshot"],
        ["diff", "one"],
        ["--live", "--snapshot", "x", "tree"],
        ["--type-shift", "64", "tree"],
        ["--type-shift", "-1", "tree"],
        ["--type-shift", "some", "tree"],
        ["tree", "extra"],
    ],
)
def test_wrong_arguments(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert "usage: khoscope" in result.err
    assert "Traceback" not in result.err


def every_text(run: Run, files: dict[str, Path]) -> Iterator[Result]:
    for name in files.keys() - {"large"}:
        for words in (["tree"], ["tree", "--nodes", "--limit", "0"], ["verify"]):
            yield run("--snapshot", files[name], *words)
    yield run("--snapshot", files["rich"], "tree", "--incoming")
    yield run("--snapshot", files["rich"], "verify", "--before", files["before"])
    yield run("diff", files["good"], files["rich"], "--limit", 0)


def test_text_fits_and_has_no_colour_outside_a_terminal(run: Run, files: dict[str, Path]) -> None:
    for result in every_text(run, files):
        assert result.out
        assert "\033" not in result.out + result.err
        assert [line for line in result.out.splitlines() if len(line) > 80] == []


# trace


#: Two calls of which all is well: 4 pages that are preserved, an order-3 folio that is restored.
GOOD = [
    added(0x100, 2),
    call(args=(page_at(0x100), 4), tgid=7, tid=8, comm=b"kexecd", stack=(*CALLERS, 0, 0)),
    restored(0x208, FIXED.stamp.encode(3), call=2, pages=None),
    call("kho_restore_folio", call=2, args=(0x208000,), ret=page_at(0x208), comm=b"modprobe"),
]
#: A block whose refcounts are those of a split one and whose type says contig.
WRONG = [added(0x300, 2, [1, 1, 1, 1], call=3), call(call=3, args=(page_at(0x300), 4))]
FAILED = [call("kho_preserve_folio", call=4, args=(page_at(0x400),), ret=2**32 - 12)]


def tracing() -> Tracing:
    attached = {"kho_preserve_pages": "fentry", "kho_restore_folio": "kprobe"}
    return Tracing(snapshot(FIXED, []), attached, missing(attached), "ring buffer of 16 MiB", 50)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recordings by name."""
    many = [
        each
        for number in range(1, 3000)
        for each in (
            added(number, call=number),
            call(call=number, args=(page_at(number), 1), stack=(*CALLERS, 0, 0)),
        )
    ]
    made = {
        "good": ([GOOD], Losses(made=4)),
        "wrong": ([GOOD, WRONG, FAILED], Losses(made=7)),
        "lost": ([GOOD], Losses(made=6, lost=2)),
        "empty": ([], Losses()),
        "many": ([many], Losses(made=5998)),
    }
    directory = tmp_path_factory.mktemp("traces")
    for name, (feeds, losses) in made.items():
        make = assembler()
        with Recorder(directory / name, tracing().facts) as recorder:
            for feed in feeds:
                recorder.add(make.feed_all(feed))
            recorder.finish(tracing(), CALLERS, losses)
    return {name: directory / name for name in made}


@pytest.mark.parametrize(
    "words",
    [
        ["--snapshot", "x", "trace"],
        ["--qemu", "x", "trace"],
        ["--core", "x", "trace"],
        ["--snapshot", "x", "trace", "--replay", "y"],
        ["trace", "--record", "x", "--replay", "y"],
        ["trace", "--replay", "x", "-d", "5"],
        ["trace", "--replay", "x", "-i", "5"],
        ["trace", "--replay", "x", "--probe", "kprobe"],
        ["trace", "--replay", "x", "--buffer", "64"],
        ["--type-shift", "53", "trace", "--replay", "x"],
        ["trace", "--only", "preserve,nonsense"],
        ["trace", "--only", ""],
        ["trace", "--only", "preserve,"],
        ["trace", "--buffer", "0"],
        ["trace", "--buffer", "3"],
        ["trace", "--buffer", "1048577"],
        ["trace", "--buffer", "16M"],
        ["trace", "-d", "0"],
        ["trace", "-d", "-1"],
        ["trace", "-d", "nan"],
        ["trace", "-d", "inf"],
        ["trace", "-d", "soon"],
        ["trace", "-i", "0"],
        ["trace", "-p", "init"],
        ["trace", "--min-order", "x"],
        ["trace", "--limit", "-1"],
        ["trace", "--probe", "uprobe"],
        ["trace", "--json", "--jsonl"],
        ["trace", "--json", "--summary"],
        ["trace", "--jsonl", "--summary"],
        ["trace", "--before"],
        ["trace", "extra"],
    ],
)
def test_wrong_arguments_of_trace(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert "usage: khoscope" in result.err
    assert "Traceback" not in result.err


def test_help_of_trace_has_examples_that_work(run: Run) -> None:
    result = run("trace", "--help")
    assert result.status == 0
    assert [line for line in result.out.splitlines() if len(line) > 80] == []
    _, _, epilog = result.out.partition("\nexamples:\n")
    examples = re.findall(r"^  khoscope (trace.*?)(?:  |$)", epilog, re.M)
    assert len(examples) >= 6
    options = {word for example in examples for word in shlex.split(example) if word[0] == "-"}
    assert options >= {"--check", "-d", "--stacks", "--summary", "--record", "--replay", "--before"}
    for example in examples:
        parser().parse_args(shlex.split(example))
    assert "exit status: 0 fine, 1 --check found" in epilog


def test_replay(run: Run, traces: dict[str, Path]) -> None:
    result = run("trace", "--replay", traces["wrong"])
    assert (result.status, result.err) == (0, "")
    assert "7.2.0-test, by hand" in result.out
    assert "fentry: preserve_pages" in result.out
    assert "kprobe: restore_folio" in result.out
    assert "left out: preserve_folio, " in result.out
    assert "ring buffer of 16 MiB" in result.out
    assert "a_client_init" in result.out
    assert "type-mismatch" in result.out
    assert "ENOMEM" in result.out
    assert "\033" not in result.out
    assert "a_client_init" in run("trace", "--replay", traces["good"], "--stacks").out


def test_replay_as_json(run: Run, traces: dict[str, Path]) -> None:
    result = run("trace", "--replay", traces["wrong"], "--json")
    assert (result.status, result.err) == (0, "")
    document = result.document
    assert document["schema"] == "khoscope.trace/1"
    assert document["kernel"]["release"] == "7.2.0-test"
    assert document["attached"] == tracing().attached
    assert document["missing"] == tracing().missing
    assert document["losses"] == vars(Losses(made=7))
    assert document["verdict"] == "fail"
    assert document["counts"] == {"type-mismatch": 1, "wrong-after-restore": 1, "failed": 1}
    assert len(document["calls"]) == 4
    lines = run("trace", "--replay", traces["wrong"], "--jsonl").lines
    assert [line for line in lines if "call" in line][:4] == document["calls"]
    stacks = run("trace", "--replay", traces["good"], "--json", "--stacks").document["calls"]
    assert "a_client_init+0x10 [a_client]" in json.dumps(stacks)


def test_replay_of_nothing(run: Run, traces: dict[str, Path]) -> None:
    document = run("trace", "--replay", traces["empty"], "--json").document
    assert (document["calls"], document["verdict"]) == ([], "pass")
    for way in ([], ["--summary"], ["--jsonl"]):
        result = run("trace", "--replay", traces["empty"], *way)
        assert (result.status, result.err) == (0, "")
        assert result.out != ""


def test_replay_of_totals(run: Run, traces: dict[str, Path]) -> None:
    result = run("trace", "--replay", traces["wrong"], "--summary")
    assert (result.status, result.err) == (0, "")
    assert "a_client_init" in result.out
    assert "4 calls (1 failed), 3 blocks, 16 pages" in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("name", "status"), [("good", 0), ("empty", 0), ("wrong", 1), ("lost", 3), ("many", 0)]
)
@pytest.mark.parametrize("way", [[], ["--json"], ["--jsonl"], ["--summary"]])
def test_status_of_a_trace(
    run: Run, traces: dict[str, Path], name: str, status: int, way: list[str]
) -> None:
    """Without --check it is no verdict that is asked for."""
    result = run("trace", "--replay", traces[name], "--check", *way)
    assert (result.status, result.err) == (status, "")
    assert run("trace", "--replay", traces[name], *way).status == 0


def test_what_was_lost_fails(run: Run, traces: dict[str, Path]) -> None:
    document = run("trace", "--replay", traces["lost"], "--check", "--json").document
    assert document["counts"] == {"events-lost": 1}
    assert document["incomplete"] == ["events lost for want of room in the buffer: 2"]
    assert document["verdict"] == "incomplete"
    text = run("trace", "--replay", traces["lost"], "--check").out
    assert "→ trace less at a time" in text
    assert "events lost for want of room in the buffer: 2" in text
    assert "INCOMPLETE" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "calls", "status"),
    [
        ([], 4, 1),
        (["--only", "restore"], 1, 0),
        (["--only", "restore, preserve"], 4, 1),
        (["--only", "split,subtree,tree,unpreserve"], 0, 0),
        (["-p", "7"], 1, 0),
        (["-p", "8"], 0, 0),
        (["-c", "modprobe"], 1, 0),
        (["--comm", os.fsdecode(b"\xff")], 0, 0),
        # What fails is shown whatever it was about.
        (["--min-order", "3"], 2, 0),
        (["--min-order", "3", "--only", "restore"], 1, 0),
    ],
)
def test_what_is_asked_for(
    run: Run, traces: dict[str, Path], words: list[str], calls: int, status: int
) -> None:
    result = run("trace", "--replay", traces["wrong"], "--json", "--check", *words)
    assert len(result.document["calls"]) == calls
    assert result.status == status


def test_trace_across_the_kexec(run: Run, traces: dict[str, Path], tmp_path: Path) -> None:
    """What is restored is compared with what was recorded."""
    for name, block in (("same", Block(0x208000, 3)), ("split", Block.split(0x208000, 3, type=1))):
        store.save_file(snapshot(FIXED, [block]), tmp_path / name)
    for name, status in (("same", 0), ("split", 1)):
        result = run("trace", "--replay", traces["good"], "--check", "--before", tmp_path / name)
        assert result.status == status
    run("trace", "--replay", traces["good"], "--before", tmp_path / "no").refused("No such file")
    result = run("trace", "--replay", traces["good"], "--before", traces["good"])
    result.refused(str(traces["good"]))


def test_text_of_trace_fits(run: Run, traces: dict[str, Path]) -> None:
    for name in traces:
        for words in ([], ["--summary"], ["--stacks"]):
            result = run("trace", "--replay", traces[name], *words)
            assert "\033" not in result.out
            assert [line for line in result.out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("content", [None, b"", b"x" * 100, "truncated", "late", "snapshot"])
@pytest.mark.parametrize("way", [[], ["--json"], ["--jsonl"], ["--summary", "--check"]])
def test_bad_recording(
    run: Run,
    files: dict[str, Path],
    traces: dict[str, Path],
    tmp_path: Path,
    content: bytes | str | None,
    way: list[str],
) -> None:
    path = tmp_path / "bad"
    whole = traces["good"].read_bytes()
    if content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "late":
        # Damage that is only seen when a batch is read.
        at = whole.index(b"touches/000000.call.npy") + 60
        path.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    elif content == "snapshot":
        path.write_bytes(files["good"].read_bytes())
    elif isinstance(content, bytes):
        path.write_bytes(content)
    result = run("trace", "--replay", path, *way)
    result.refused(str(path))
    assert "Traceback" not in result.err
    run("trace", "--replay", tmp_path).refused(str(tmp_path))


# trace, of a kernel that is not there


class Live(FakeProbes):
    """Probes that are told what to give, and say when they are attached."""

    buffer = "ring buffer of 16 MiB"

    def __init__(self, source: object, *options: object) -> None:
        steps = type(self).steps_of_all
        super().__init__([*steps, lambda: os.kill(os.getpid(), signal.SIGINT)])
        self.attached, self.missing = tracing().attached, tracing().missing
        type(self).options = options

    def kinds(self) -> tuple[Counted, Counted]:
        nothing = np.zeros(0, np.uint64)
        none = Counted([], nothing, nothing, as_read([]))
        return none, none

    steps_of_all: list[list[bytes]]
    options: tuple[object, ...]
    came = went = 0

    def __enter__(self) -> Live:
        type(self).came += 1
        return self

    def __exit__(self, *error: object) -> None:
        type(self).went += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> type[Live]:
    """A running kernel that is traced."""

    class Source:
        def __init__(self, *options: object) -> None:
            self.abi = FIXED
            self.layout = assembler()._layout

        def tree(self) -> Snapshot:
            return tracing().facts

    class OfThisTest(Live):
        pass

    OfThisTest.steps_of_all = [GOOD, WRONG]
    monkeypatch.setattr("khoscope.commands.common._program", lambda args: (None, "test", True))
    monkeypatch.setattr("khoscope.sources.kernel.KernelSource", Source)
    monkeypatch.setattr("khoscope.trace.probes.Probes", OfThisTest)
    for name in ("CLIENT_FRAMES", "STACK_FRAMES"):
        monkeypatch.setattr(f"khoscope.trace.probes.{name}", FRAMES)
    return OfThisTest


def test_trace(run: Run, kernel: type[Live], tmp_path: Path) -> None:
    result = run("trace", "--check", "--json", "--record", tmp_path / "a.khotrace")
    assert (result.status, result.err) == (1, "")
    assert len(result.document["calls"]) == 3
    assert (kernel.came, kernel.went) == (1, 1)
    again = run("trace", "--check", "--json", "--replay", tmp_path / "a.khotrace")
    assert (again.status, again.out) == (1, result.out)
    kernel.steps_of_all = [GOOD]
    assert run("trace", "--check", "--stacks").status == 0


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (["--check"], True),
        (["--summary"], True),
        (["--summary", "--check", "-i", "1", "--min-order", "2", "--only", "preserve"], True),
        ([], False),
        (["--check", "--stacks"], False),
        (["--check", "--json"], False),
        (["--check", "--jsonl"], False),
        (["--summary", "--record", "a.khotrace"], False),
    ],
)
def test_what_is_counted_in_the_kernel(
    run: Run, kernel: type[Live], tmp_path: Path, options: list[str], counts: bool
) -> None:
    kernel.steps_of_all = []
    words = [tmp_path / word if word.endswith("khotrace") else word for word in options]
    result = run("trace", *words)
    assert (result.status, result.err) == (0, "")
    assert (kernel.options[-1] is not None) == counts
    if counts:
        assert "calls (0 failed)" in result.out


def test_too_many_borders_to_count(
    run: Run, kernel: type[Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.steps_of_all = [GOOD]
    monkeypatch.setattr("khoscope.trace.probes.MOST_BORDERS", 1)
    result = run("trace", "--check")
    assert (result.status, kernel.options[-1]) == (0, None)
    assert "balance" in result.out


def test_options_of_trace(run: Run, kernel: type[Live]) -> None:
    kernel.steps_of_all = []
    run("trace", "--probe", "kprobe", "--buffer", "64", "-v", "-p", "5", "-c", "x")
    wanted, how, _, buffer, verbose, _ = kernel.options
    assert (how, buffer, verbose) == ("kprobe", 64 << 10, True)
    assert (getattr(wanted, "tgid", 0), getattr(wanted, "comm", "")) == (5, "x")
    run("trace")
    assert kernel.options[1:] == (None, FRAMES, 16 << 20, False, None)


def test_nowhere_to_record(run: Run, kernel: type[Live], tmp_path: Path) -> None:
    """Nothing is attached for a file that cannot be written."""
    run("trace", "--record", tmp_path / "no" / "a").refused("No such file or directory")
    assert kernel.came == 0


def test_trace_that_nobody_reads(traces: dict[str, Path]) -> None:
    for way in ([], ["--json"], ["--jsonl"]):
        with khoscope("trace", "--replay", traces["many"], *way) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == -signal.SIGPIPE


# Files that are not what they should be


@pytest.mark.parametrize(
    "words",
    [
        ["--snapshot", "{}", "tree"],
        ["--snapshot", "{}", "verify"],
        ["--snapshot", "{after}", "verify", "--before", "{}"],
        ["--snapshot", "{}", "snapshot", "{}.copy"],
        ["diff", "{}", "{good}"],
        ["diff", "{good}", "{}"],
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"x" * 100, "truncated", "late"])
def test_bad_snapshot_file(
    run: Run, files: dict[str, Path], tmp_path: Path, words: list[str], content: bytes | str | None
) -> None:
    path = tmp_path / "bad"
    whole = files["good"].read_bytes()
    if content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "late":
        # Damage that is only seen when a stream is read.
        for name in (b"out/leaves/000000.bitmap.npy", b"out/blocks/000000.phys.npy"):
            at = whole.index(name) + 60
            whole = whole[:at] + bytes(8) + whole[at + 8 :]
        path.write_bytes(whole)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    result = run(*(word.format(path, **files) for word in words))
    result.refused(str(path), "No such file" if content is None else "not a whole snapshot file")
    assert "Traceback" not in result.err
    assert not (tmp_path / "bad.copy").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 1000,
        b"\x7fELF",
        b"\x7fELF\x02\x01\x01" + bytes(57),
        b"KDUMP   " + bytes(4096),
        b"makedumpfile\0" + bytes(4096),
    ],
)
def test_bad_core(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vmcore"
    path.write_bytes(content)
    for words in (["tree"], ["verify"], ["snapshot", tmp_path / "copy"]):
        run("--core", path, *words).refused(str(path))


def test_truncated_core(run: Run, tmp_path: Path) -> None:
    """The running process is an ELF file as good as any; half of it is missing."""
    path = tmp_path / "vmcore"
    whole = Path(sys.executable).resolve().read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run("--core", path, "tree").refused(str(path))


def test_no_core(run: Run, tmp_path: Path) -> None:
    run("--core", tmp_path / "missing", "tree").refused("No such file or directory")
    run("--core", tmp_path, "tree").refused(str(tmp_path))


# Processes


def khoscope(*words: object, **more: Any) -> subprocess.Popen[str]:
    # What runs in the background of a script ignores Ctrl-C, and so would all that it starts.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "khoscope", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finished(process: subprocess.Popen[str]) -> Result:
    with process:
        out, err = process.communicate(timeout=60)
        return Result(process.returncode, out, err)


def test_output_that_nobody_reads(files: dict[str, Path]) -> None:
    with khoscope("--snapshot", files["large"], "tree", "--jsonl") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["order"] == 0
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE


def test_interrupt(files: dict[str, Path]) -> None:
    with khoscope("--snapshot", files["large"], "tree", "--jsonl") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # There is more to come than the pipe holds: it cannot be done.
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "khoscope: interrupted\n"
    assert process.returncode == -signal.SIGINT


AS_NOBODY = """
import os, sys
import khoscope.sources.kernel, khoscope.sources.open
import khoscope.trace.probes, khoscope.trace.record, khoscope.trace.session
import khoscope.commands.metrics, khoscope.commands.trace, khoscope.commands.tree
from khoscope.cli import main
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    open("/proc/kcore", "rb").close()
    print("can be read")
except OSError as error:
    print(type(error).__name__)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["tree", "trace", "metrics"])
def test_not_root(name: str) -> None:
    command = [sys.executable, "-c", AS_NOBODY, name]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    # A container may hide the file altogether.
    denied = result.out == "PermissionError\n"
    result.refused(*(["permission denied", "sudo khoscope"] if denied else ["/proc/kcore"]))


@contextmanager
def server(path: Path, says: bytes) -> Iterator[None]:
    """Somebody at a socket who says something to whoever comes, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    client.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"{",
        b"{}\r\n",
        b'{"QMP": {"version": {}, "capabilities": []}}\r\n',
        b'{"QMP": {"version": {}, "capabilities": []}}\r\n{"return": 5}\r\n',
        b"{" * 100_000,
    ],
    ids=["nothing", "http", "half", "empty", "greeting", "odd", "endless"],
)
def test_qemu_that_is_none(tmp_path: Path, says: bytes) -> None:
    path = tmp_path / "qmp"
    with server(path, says):
        finished(khoscope("--qemu", path, "tree")).refused(str(path))


def test_qemu_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with server(path, b""):
        pass
    for address in (path, tmp_path / "missing", tmp_path, "127.0.0.1:1", "x:99999"):
        finished(khoscope("--qemu", address, "tree")).refused(str(address))


def test_qemu_that_is_busy(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU lets a second client connect and says nothing to it."""
    monkeypatch.setattr("khoscope.sources.open.ANSWER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "qmp"))
        listening.listen()
        run("--qemu", tmp_path / "qmp", "tree").refused("does not answer", "one tool at a time")


def test_environment_without_utf8(files: dict[str, Path]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = finished(khoscope("--snapshot", files["plain"], "verify", env=environment))
    assert "Traceback" not in result.err
    assert result.status == 1


def test_ctrl_c_while_it_is_imported() -> None:
    """It ends of the signal, and says nothing."""
    slow = "import sys, signal; sys.argv = ['khoscope']\n"
    slow += "import importlib.abc\n"
    slow += "class Interrupt(importlib.abc.MetaPathFinder):\n"
    slow += " def find_spec(self, name, path, target=None):\n"
    slow += "  if name == 'khoscope.cli': signal.raise_signal(signal.SIGINT)\n"
    slow += "sys.meta_path.insert(0, Interrupt())\n"
    slow += "from khoscope.__main__ import main\nmain()\n"
    result = subprocess.run(
        [sys.executable, "-c", slow], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")
