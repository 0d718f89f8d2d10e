# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Nothing passes on thin evidence, and no file brings khoscope down.

``tests/hostile/`` has files that once did either, made of the demo's snapshots of that time;
:mod:`tests.mutants` makes their kinds.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from khoscope.demo import path
from khoscope.facts import store
from khoscope.facts.calls import Losses, Tracing
from khoscope.facts.clients import Claims, LuoSession
from khoscope.facts.columns import Blocks, Leaves, Pages
from khoscope.facts.snapshot import Snapshot
from khoscope.trace.record import Recorder
from tests import mutants
from tests.command import Result, Run
from tests.mutants import Base, made, members_of, read, value_at, with_value, without
from tests.synthetic import FIXED, batch_of, missing, snapshot

HOSTILE: Final = Path(__file__).parent / "hostile"
AFTER: Final = path("odd-after")

#: File, what is asked of it, the exit status, and words that are said.
TABLE: Final[list[tuple[str, list[str], int, str]]] = [
    ("tail-counts-left-out", ["verify"], 3, "have other pages than their order says"),
    ("key-not-in-tree", ["verify"], 3, "1 blocks are in no leaf"),
    ("fdt-blob-is-zeros", ["verify"], 1, "not a readable FDT"),
    ("session-lists-no-files", ["verify"], 2, "luo.problems is not there"),
    ("image-left-out", ["verify"], 3, "whether a kexec image is loaded"),
    ("before-unreadable", [], 3, "the earlier snapshot: cannot be read: the kernel's list of RAM"),
    ("before-luo-unreadable", [], 3, "the earlier snapshot: LUO: sessions cannot be read"),
    ("fdt-begins-with-end", ["fdt"], 0, "not a readable FDT"),
    ("fdt-begins-with-end", ["verify"], 1, "subtree 'kho_test': not a readable FDT"),
    ("subtrees-x-ram", ["verify"], 2, "more sessions, files or subtrees"),
    ("claims-x-ram", ["verify"], 2, "where no processor has any"),
    ("log-line-30-mb", ["verify"], 2, "30,000,000 letters"),
    ("release-forges-PASS", ["verify"], 1, r"\nPASS: safe to kexec"),
    ("dtype-with-escapes", ["status"], 2, r"\x1b]0;pwned\x07\x1b[8m"),
]


def limits(seconds: int, memory: int) -> Callable[[], None]:
    """For a process that is about to start."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    return limit


@pytest.mark.parametrize(("name", "words", "status", "said"), TABLE)
def test_the_table(name: str, words: list[str], status: int, said: str) -> None:
    """Each in a process of its own, which ends at 30 seconds or 1.5 GiB, libraries included."""
    file = HOSTILE / f"{name}.khosnap"
    if name.startswith("before"):
        file = HOSTILE / f"{name}.after.khosnap"
        words = ["verify", "--before", str(HOSTILE / f"{name}.before.khosnap")]
    command = [sys.executable, "-m", "khoscope", "--snapshot", str(file), *words]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limits(30, 3 << 29),
    )
    assert result.returncode == status, result
    assert said in " ".join(f"{result.stdout} {result.stderr}".split())
    assert not any(line.startswith("PASS") for line in result.stdout.splitlines())
    assert "\033" not in result.stdout + result.stderr
    if status == 2:
        assert len(result.stderr.splitlines()) == 2


def test_the_earlier_one_has_an_address_that_is_none(run: Run) -> None:
    before = HOSTILE / "fdt-phys-2-70.khosnap"
    result = run("--snapshot", AFTER, "verify", "--before", before)
    result.refused("outgoing.fdt.phys: no address or count")


def test_a_recording_that_denies_its_chunks(run: Run, tmp_path: Path) -> None:
    run("trace", "--check", "--replay", HOSTILE / "chunks-0.khotrace").refused("meta.json")
    meta, members = read(recording(tmp_path))
    assert meta["chunks"] == 1
    file = tmp_path / "b.khotrace"
    file.write_bytes(made(with_value(meta, ("chunks",), 0), members))
    result = run("trace", "--check", "--replay", file)
    result.refused("is not among what it says to have")


def recording(tmp_path: Path) -> bytes:
    """Of a trace that lost an event."""
    attached = {"kho_preserve_pages": "fentry"}
    facts = snapshot(FIXED, [])
    with Recorder(tmp_path / "a.khotrace", facts) as recorder:
        recorder.add(batch_of(FIXED))
        tracing = Tracing(facts, attached, missing(attached), "16 MiB", 1)
        recorder.finish(tracing, {0: "client+0x1 [client]"}, Losses(lost=1, made=3))
    return (tmp_path / "a.khotrace").read_bytes()


# Left out is not fine


@pytest.fixture(scope="module")
def every() -> list[Base]:
    return mutants.bases()


def verify(run: Run, tmp_path: Path, base: Base, data: bytes) -> Result:
    return run(*mutants.asked(tmp_path, base, data, ["verify", "--limit", "0"]))


@pytest.mark.parametrize("number", range(6))
def test_no_fact_may_be_left_out(run: Run, tmp_path: Path, every: list[Base], number: int) -> None:
    """Made from the schema itself, as the file has it: whatever is left out, it is no pass."""
    base = every[number]
    assert verify(run, tmp_path, base, base.data).status == base.status
    meta, members = read(base.data)
    paths = list(members_of(meta))
    assert len(paths) > 100
    for where in paths:
        result = verify(run, tmp_path, base, made(without(meta, where), members))
        # The bytes of a root FDT say all that is recorded of it.
        derived = where[-2] == "fdt" and where[-1] != "phys" if len(where) > 1 else False
        assert result.status == (base.status if derived else 2), (where, result)


def test_no_chunk_may_be_denied(run: Run, tmp_path: Path, every: list[Base]) -> None:
    for base in every:
        meta, members = read(base.data)
        for name, count in meta["chunks"].items():
            where = ("chunks", name)
            for changed in (
                without(meta, where),
                *([with_value(meta, where, count - 1)] if count else []),
                *([with_value(meta, where, 0)] if count else []),
            ):
                result = verify(run, tmp_path, base, made(changed, members))
                assert result.status == 2, (base.name, where, result)


def test_no_member_of_a_recording_may_be_left_out(run: Run, tmp_path: Path) -> None:
    data = recording(tmp_path)
    file = tmp_path / "b.khotrace"
    file.write_bytes(data)
    assert run("trace", "--check", "--replay", file).status == 3
    meta, members = read(data)
    for where in members_of(meta):
        file.write_bytes(made(without(meta, where), members))
        run("trace", "--check", "--replay", file).refused("not a whole recording", str(where[-1]))


def test_values_of_a_recording(run: Run, tmp_path: Path) -> None:
    meta, members = read(recording(tmp_path))
    file = tmp_path / "b.khotrace"
    for where in mutants.facts_of(meta):
        for value in mutants.EXTREMES:
            if value == value_at(meta, where) or where[-1] in ("lost", "losses", "buffer"):
                continue
            file.write_bytes(made(with_value(meta, where, value), members))
            result = run("trace", "--check", "--replay", file)
            assert result.status in (2, 3), (where, value, result)


# Whatever else a file says


def campaign(seed: int, count: int) -> str:
    """Mutants in a process that has so much time and memory."""
    words: list[Any] = [sys.executable, "-m", "tests.mutants", seed, count]
    result = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        preexec_fn=limits(60 + count, 4 << 30),
    )
    return result.stdout + (result.stderr if result.returncode else "")


@pytest.mark.parametrize("seed", range(4))
def test_mutants(seed: int) -> None:
    """The same 2,000 each time; a mutant that ends the process is one, too."""
    assert campaign(seed, 500) == ""


@pytest.mark.fuzz
def test_more_mutants(request: pytest.FixtureRequest) -> None:
    """In `make fuzz`, 50,000 others."""
    many = request.config.getoption("--hypothesis-profile") == "long"
    seed = time.time_ns() if many else 4
    assert campaign(seed, 50_000 if many else 100) == "", f"seed {seed}"


# Large when it is unpacked


def large(tmp_path: Path, facts: Snapshot) -> Path:
    file = tmp_path / "large.khosnap"
    store.save_file(facts, file)
    assert file.stat().st_size < 8 << 20
    return file


def measured(file: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """khoscope on a file, in a process that may take 120 seconds, and the bytes that it needed."""
    code = "import resource, sys\nfrom khoscope.cli import main\nstatus = main(sys.argv[1:])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, file=sys.stderr)\n"
    code += "sys.exit(status)"
    result = subprocess.run(
        [sys.executable, "-c", code, "--snapshot", str(file), *words],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limits(120, 4 << 30),
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result, int(result.stderr.splitlines()[-1])


def base() -> Snapshot:
    return mutants.whole()


def with_leaves() -> Snapshot:
    """As many full leaves as a file may have, and no facts about their blocks."""
    facts = base()
    count = (128 << 20) // facts.abi.page_size - 8
    key = facts.abi.kho_radix_encode_key(0, 0)
    keys = np.uint64(key) + np.arange(count, dtype=np.uint64) * np.uint64(facts.abi.leaf_bits)
    full = np.full((256, facts.abi.page_size), 0xFF, np.uint8)
    leaves = [Leaves(keys[at : at + 256], full[: count - at]) for at in range(0, count, 256)]
    tree = replace(facts.outgoing.tree, leaves=leaves)
    return replace(facts, outgoing=replace(facts.outgoing, tree=tree))


def with_claims() -> Snapshot:
    """Four million claims of one owner."""
    facts = base()
    rows = 1 << 20
    phys = np.arange(rows, dtype=np.uint64) * np.uint64(8192)
    size = np.full(rows, 4096, np.uint64)
    chunks = [Claims(phys, size, np.zeros(rows, np.uint32)) for _ in range(3)]
    return replace(facts, outgoing=replace(facts.outgoing, claims=chunks))


def with_stamps() -> Snapshot:
    """Stamps of blocks each of which reaches to the end of RAM."""
    facts = base()
    rows = 1 << 15
    stamps = []
    for chunk in range(8):
        phys = np.arange(chunk * rows, (chunk + 1) * rows, dtype=np.uint64) << np.uint64(12)
        pages = Pages.blank(rows)
        pages.zeros[:] = (1 << 30) - 1
        pages.private[:] = facts.abi.stamp.encode(30)
        order, kind = np.full(rows, 30, np.uint8), np.zeros(rows, np.int8)
        stamps.append(Blocks(np.zeros(rows, np.uint64), phys, order, kind, pages))
    return replace(facts, stamps=stamps)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (with_leaves, ["verify"]),
        (with_leaves, ["owners"]),
        (with_claims, ["verify"]),
        (with_claims, ["owners"]),
        (with_stamps, ["pages", "0..0x40000000", "--json"]),
        (with_stamps, ["status"]),
    ],
)
def test_what_is_large_when_it_is_unpacked(
    tmp_path: Path, make: Callable[[], Snapshot], words: list[str]
) -> None:
    result, memory = measured(large(tmp_path, make()), *words)
    assert result.returncode in ((1, 3) if words == ["verify"] else (0,)), result.stderr
    assert memory < 1 << 30


def test_areas_and_sessions_without_end(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.khosnap"
    facts = base()
    store.save_file(replace(facts, scratch=np.zeros((1 << 20, 2), np.uint64)), file)
    run("--snapshot", file, "verify").refused("more ranges of RAM or scratch areas")
    luo = facts.outgoing.luo
    assert luo is not None
    twice = replace(luo, sessions=[LuoSession("a", None, 0)] * 4000)
    store.save_file(replace(facts, outgoing=replace(facts.outgoing, luo=twice)), file)
    run("--snapshot", file, "luo", "--json").refused("of one name")
