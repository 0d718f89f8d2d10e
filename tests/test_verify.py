# SPDX-License-Identifier: LGPL-2.1-or-later
"""What verify says, and what it was asked for; the catalogue; and watching a kernel."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.checks import (
    RULES,
    About,
    Report,
    RuleSelection,
    Severity,
    changes,
    check,
    compare,
    in_order,
)
from khoscope.checks.rule import SCOPES
from khoscope.facts import store
from khoscope.facts.clients import Claims, Owner, OwnerKind
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.snapshot import Handover, KexecImage, Snapshot
from khoscope.facts.tree import TreeState
from khoscope.views.text import WIDTH, Text
from khoscope.words.errors import KhoscopeError
from tests.command import Result, Run
from tests.synthetic import FIXED, POSTED, Block, fdt_blob, snapshot
from tests.test_image import TEXT, elf

NEXT_BOOT = "00000000-0000-0000-0000-000000000002"
AT = 0x40000
GOOD = Block(AT, 2)
WRONG = Block.split(AT, 2, type=0)
STALE = Block(AT + 0x10000, 3, head=0, free=1)
HANDED_OVER = Handover(True, "7.2.0-test", 1)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Snapshot], Path]:
    def save(facts: Snapshot) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.khosnap"
        store.save_file(facts, path)
        return path

    return save


Saved = Callable[[Snapshot], Path]


def after(before: Snapshot, *blocks: Block, **more: Any) -> Snapshot:
    """The same blocks in the next kernel."""
    known: dict[str, Any] = {"boot_id": NEXT_BOOT, "handover": HANDED_OVER}
    return snapshot(FIXED, more.pop("own", ()), watched=(before, blocks), **known, **more)


def last_line(report: Report) -> str:
    out = io.StringIO()
    Text(out).verdict(report)
    [line] = out.getvalue().splitlines()
    return line


# The last line


def no_image(*blocks: Block, **more: Any) -> Snapshot:
    return replace(snapshot(FIXED, blocks, **more), image=KexecImage(False))


BEFORE = snapshot(FIXED, [GOOD])


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        (check(BEFORE), "PASS: safe to kexec (0 errors, 0 warnings)"),
        (
            check(no_image(GOOD)),
            "PASS: safe to kexec, once an image is loaded (0 errors, 0 warnings)",
        ),
        (check(snapshot(FIXED, [GOOD], tainted=32)), "PASS: safe to kexec (0 errors, 1 warning)"),
        (
            check(snapshot(POSTED, [])),
            "FAIL: not safe to kexec: type-not-stored (1 error, 1 warning)",
        ),
        (
            check(no_image(STALE)),
            "FAIL: not safe to kexec: stale-entry (1 error, 0 warnings)",
        ),
        (
            check(snapshot(FIXED, [], state=TreeState(0x1000, moved=2))),
            "INCOMPLETE: no verdict: 1 thing could not be seen (0 errors, 0 warnings)",
        ),
        (
            check(snapshot(FIXED, [STALE], state=TreeState(0x1000, moved=2))),
            "FAIL: not safe to kexec: stale-entry (1 error, 0 warnings)",
        ),
        (
            compare(BEFORE, after(BEFORE, GOOD)),
            "PASS: everything that was recorded arrived (0 errors, 0 warnings)",
        ),
        (
            compare(BEFORE, after(BEFORE, WRONG)),
            "FAIL: not intact: wrong-refcounts (1 error, 0 warnings)",
        ),
        # What is wrong with the new kernel's own tree does not take back what arrived.
        (
            compare(BEFORE, after(BEFORE, GOOD, own=[STALE])),
            "FAIL: intact, but not safe to kexec: stale-entry (1 error, 0 warnings)",
        ),
        # But what the kexec did comes first.
        (
            compare(BEFORE, after(BEFORE, WRONG, own=[STALE])),
            "FAIL: not intact: wrong-refcounts (2 errors, 0 warnings)",
        ),
        (
            compare(BEFORE, after(BEFORE, GOOD, own=[STALE], state=TreeState(0x1000, moved=2))),
            "FAIL: not safe to kexec: stale-entry (1 error, 0 warnings)",
        ),
        (Report(About.TRACE), "PASS: nothing wrong was seen (0 errors, 0 warnings)"),
        (
            check(
                snapshot(FIXED, [GOOD], tainted=32), asked=RuleSelection(fail_on=Severity.WARNING)
            ),
            "FAIL: not safe to kexec: kernel-tainted (0 errors, 1 warning)",
        ),
    ],
)
def test_last_line(report: Report, wanted: str) -> None:
    assert last_line(report) == wanted


@given(st.text(), st.integers(1, 10**7))
def test_last_line_is_one_line(text: str, count: int) -> None:
    """Whatever a name may do: here one of the log."""
    report = check(snapshot(FIXED, [], log=[text]), asked=RuleSelection(fail_on=Severity.WARNING))
    report.counts["kernel-tainted"] = count
    assert last_line(report) == (
        f"FAIL: not safe to kexec: kernel-tainted (0 errors, {count:,} warning"
        f"{'' if count == 1 else 's'})"
    )


def test_last_line_counts_what_was_not_seen() -> None:
    report = Report(incomplete=["one", "another", "and a third\nPASS: safe to kexec"])
    assert report.verdict == "incomplete"
    assert last_line(report) == (
        "INCOMPLETE: no verdict: 3 things could not be seen (0 errors, 0 warnings)"
    )


def test_an_error_is_one_whatever_was_not_seen() -> None:
    report = check(snapshot(FIXED, [STALE], state=TreeState(0x1000, moved=2)))
    assert (report.verdict, bool(report.incomplete)) == ("fail", True)


def test_no_verdict(run: Run, saved: Saved) -> None:
    """Its own status, and what to do about it below what could not be seen."""
    path = saved(snapshot(FIXED, [GOOD], state=TreeState(0x1000, moved=2)))
    result = run("--snapshot", path, "verify")
    assert (result.status, result.err) == (3, "")
    lines = result.out.splitlines()
    at = lines.index("incomplete: 2 blocks came or went while the tree was read")
    assert lines[at + 1].startswith("  → let the clients of KHO come to rest")
    assert result.last == last_line(check(store.load_file(path)))
    result = run("--snapshot", path, "verify", "--json")
    assert (result.status, result.err) == (3, "")
    assert result.document["verdict"] == "incomplete"


# Which rules, and what fails


def test_only(run: Run, saved: Saved) -> None:
    path = saved(snapshot(FIXED, [WRONG, STALE]))
    every = len(run("--snapshot", path, "verify", "--json").document["rules"])
    result = run("--snapshot", path, "verify", "--only", "stale-entry, overlap", "--json")
    assert result.status == 1
    assert result.document["counts"] == {"stale-entry": 1}
    assert result.document["rules"] == ["overlap", "stale-entry"]
    result = run("--snapshot", path, "verify", "--only", "overlap")
    assert (result.status, result.err) == (0, "")
    assert result.last == f"PASS: nothing found (0 errors, 0 warnings; 1 of {every} rules)"


def test_skip(run: Run, saved: Saved) -> None:
    path = saved(snapshot(FIXED, [STALE]))
    every = run("--snapshot", path, "verify", "--json").document["rules"]
    result = run("--snapshot", path, "verify", "--skip", "stale-entry,lost")
    assert result.status == 0
    assert result.last.endswith(f"; {len(every) - 1} of {len(every)} rules)")
    assert "safe" not in result.last
    document = run("--snapshot", path, "verify", "--skip", "stale-entry", "--json").document
    assert document["rules"] == [name for name in every if name != "stale-entry"]
    result = run("--snapshot", path, "verify", "--only", "overlap", "--skip", "overlap")
    assert result.status == 2
    assert "leave no check to run" in result.err


def test_rules_that_run(run: Run, saved: Saved) -> None:
    before, now = saved(BEFORE), saved(after(BEFORE, GOOD))
    rules = run("--snapshot", before, "verify", "--json").document["rules"]
    assert {"type-not-stored", "bad-fdt", "overlap", "stale-entry", "broken-luo"} <= set(rules)
    assert not {"lost", "image-abi-differs", "failed", "events-lost"} & set(rules)
    across = run("--snapshot", now, "verify", "--before", before, "--json").document["rules"]
    new = {"lost", "not-restored", "not-a-handover", "unexpected"}
    new |= {"order-changed", "type-changed", "wrong-refcounts"}
    new |= {"stored-fd-lost", "stored-fd-waits"}
    assert set(across) - set(rules) == new


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "stale-entri"], "did you mean stale-entry"),
        (["--skip", "lost,"], "there is no check ''"),
        (["--skip", "xyzzy"], "khoscope checks lists them"),
        (["--only", "lost"], "lost needs --before"),
        (["--only", "overlap,wrong-refcounts"], "wrong-refcounts needs --before"),
        (["--only", "image-abi-differs"], "image-abi-differs needs --next"),
        (["--only", "next-without-kho"], "next-without-kho needs --next"),
        (["--initrd", "initrd"], "--initrd needs --next"),
        (["--next", "loaded", "--initrd", "initrd"], "--next loaded knows its own"),
        (["--next", ""], "it is empty"),
        (["--only", "failed"], "failed is a check of khoscope trace"),
        (["--watch", "1"], "a file does not change"),
        (["--watch", "0"], "not a time to wait"),
        (["--watch", "nan"], "not a time to wait"),
        (["--fail-on", "info"], "error or warning come first"),
    ],
)
def test_what_cannot_be_asked_for(run: Run, saved: Saved, words: list[str], said: str) -> None:
    result = run("--snapshot", saved(BEFORE), "verify", *words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err


def test_watch_of_a_vmcore(run: Run) -> None:
    result = run("--core", "vmcore", "verify", "--watch", "1")
    assert (result.status, result.out) == (2, "")
    assert "a file does not change" in result.err


class Untouched:
    """A stream that nobody may look at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a rule that was not asked for has read this")


def test_rules_that_do_not_run_cost_nothing() -> None:
    facts = snapshot(FIXED, [GOOD], state=TreeState(0x1000, moved=1))
    tree = replace(facts.outgoing.tree, leaves=Untouched())
    side = replace(facts.outgoing, tree=tree, blocks=Untouched(), claims=Untouched())
    facts = replace(facts, outgoing=side, stamps=Untouched(), watched=Untouched())
    report = check(facts, asked=RuleSelection(frozenset({"type-not-stored", "kernel-tainted"})))
    assert report.passed
    assert report.rules == {"type-not-stored", "kernel-tainted"}
    later = after(BEFORE, GOOD)
    now = replace(facts, watching=later.watching, handover=HANDED_OVER, incoming=later.incoming)
    report = compare(BEFORE, now, asked=RuleSelection(frozenset({"not-a-handover"})))
    assert report.rules == {"not-a-handover"}
    assert report.incomplete == []


def test_fail_on_warning(run: Run, saved: Saved) -> None:
    path = saved(snapshot(FIXED, [GOOD], tainted=32))
    assert run("--snapshot", path, "verify").status == 0
    for more in ([], ["--json"]):
        result = run("--snapshot", path, "verify", "--fail-on", "warning", *more)
        assert (result.status, result.err) == (1, "")
    assert result.document["verdict"] == "fail"
    assert run("--snapshot", saved(BEFORE), "verify", "--fail-on", "warning").status == 0
    # What is only said is nothing to fail on.
    result = run("--snapshot", saved(no_image(GOOD)), "verify", "--fail-on", "warning")
    assert (result.status, "info: no-image (1)" in result.out) == (0, True)


def test_next(run: Run, saved: Saved, tmp_path: Path) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(elf([TEXT]))
    good = snapshot(FIXED, [GOOD])
    result = run("--snapshot", saved(good), "verify", "--next", image)
    assert (result.status, result.err) == (0, "")
    assert "next kernel: 7.2.12-test, not compressed, kho-v5, luo-v5, memfd-v2" in result.out
    fdt = replace(good.outgoing.fdt, compatible="kho-v4")
    other = replace(good.outgoing, fdt=fdt, blobs={"fdt": fdt_blob(fdt)})
    path = saved(replace(good, outgoing=other))
    for more in ([], ["--only", "image-abi-differs"]):
        result = run("--snapshot", path, "verify", "--next", image, "--json", *more)
        assert result.status == 1
        assert result.document["counts"] == {"image-abi-differs": 1}
        assert result.document["next"]["kho"] == ["kho-v5"]
    image.write_bytes(b"nothing")
    result = run("--snapshot", path, "verify", "--next", image)
    assert (result.status, len(result.err.splitlines())) == (2, 2)


AS_LOADED = NextKernel(
    *("loaded", "zstd", "7.3.4-next", ("kho-v5",), ("luo-v5",), ("memfd-v2",)),
    command_line="kho=on",
)


def test_a_snapshot_does_not_hold_the_loaded_image(run: Run, saved: Saved) -> None:
    for more in ([], ["--before", saved(BEFORE)]):
        result = run("--snapshot", saved(BEFORE), "verify", "--next", "loaded", *more)
        result.refused("a snapshot does not hold the image that was loaded", "name its FILE")
        assert result.out == ""


def test_a_file_named_loaded(
    run: Run, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loaded").write_bytes(elf([TEXT]))
    path = saved(snapshot(FIXED, [GOOD]))
    monkeypatch.chdir(tmp_path)
    result = run("--snapshot", path, "verify", "--next", "./loaded", "--json")
    assert (result.status, result.document["next"]["release"]) == (0, "7.2.12-test")
    assert result.document["next"]["command_line"] is None


@pytest.mark.parametrize("line", ["root=/dev/vda kho=on \033[31m", ""])
def test_next_loaded(run: Run, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """What it says of the image, whatever is on the command line."""
    kernel = Kernel([snapshot(FIXED, [GOOD]), snapshot(FIXED, [GOOD])])
    kernel.images = [replace(AS_LOADED, command_line=line)] * 2
    monkeypatch.setattr("khoscope.commands.common.kernel", lambda args, progress: kernel)
    status = 0 if line else 3
    result = run("verify", "--next", "loaded")
    assert (result.status, result.err) == (status, "")
    assert "next kernel: as loaded, 7.3.4-next, bzImage (zstd), kho-v5, luo-v5" in result.out
    shown = "root=/dev/vda kho=on \\x1b[31m" if line else "empty"
    assert f"\n  its command line: {shown}\n" in result.out
    result = run("verify", "--next", "loaded", "--json")
    assert result.status == status
    assert result.document["next"]["command_line"] == line
    # Nothing is loaded any more.
    run("verify", "--next", "loaded").refused("no kexec image is loaded")


# Owners


def owned(*blocks: Block) -> Snapshot:
    """The first page of each block is of an owner of its own, but for the last."""
    facts = snapshot(FIXED, blocks)
    owners = [
        Owner(OwnerKind.FILE, f"session 'vm{n}', token {n:#x}") for n in range(len(blocks) - 1)
    ]
    columns = [[b.phys for b in blocks[:-1]], [4096] * len(owners), range(len(owners))]
    claims = Claims(*(np.array(c, t) for c, t in zip(columns, Claims.DTYPES.values(), strict=True)))
    return replace(facts, outgoing=replace(facts.outgoing, owners=owners, claims=[claims]))


def test_what_became_of_whose_blocks(run: Run, saved: Saved) -> None:
    blocks = [Block(n << 20, 2) for n in range(1, 5)]
    before = owned(*blocks)
    stamped = replace(blocks[1], head=0, private=FIXED.stamp.encode(2, 0))
    freed = replace(blocks[2], head=0, free=4)
    now = after(before, blocks[0], stamped, freed, blocks[3])
    report = compare(before, now)
    assert report.owners == {
        "session 'vm0', token 0x0": {"restored": 1},
        "session 'vm1', token 0x1": {"not-restored": 1},
        "session 'vm2', token 0x2": {"released": 1},
        "unknown": {"restored": 1},
    }
    [finding] = report.findings
    assert finding.message.startswith("session 'vm1', token 0x1: not claimed by anybody")
    paths = saved(now), saved(before)
    result = run("--snapshot", paths[0], "verify", "--before", paths[1])
    table = [re.split(" {2,}", line) for line in result.out.splitlines() if "token 0x2" in line]
    assert table == [["session 'vm2', token 0x2", "0", "0", "1"]]
    assert re.search(r"^owner +restored +not-restored +released$", result.out, re.MULTILINE)
    assert all(len(line) <= WIDTH for line in result.out.splitlines())
    result = run("--snapshot", paths[0], "verify", "--before", paths[1], "--limit", 1)
    assert "… 3 more owners" in result.out
    document = run("--snapshot", paths[0], "verify", "--before", paths[1], "--json").document
    assert document["owners"] == {name: dict(fates) for name, fates in report.owners.items()}


def test_a_block_that_another_owner_has_preserved_again() -> None:
    """What came knows better than a snapshot of before: it is the new owner's to restore."""
    blocks = [Block(n << 20, 2) for n in range(1, 5)]
    before = owned(*blocks)
    stamps = [replace(block, head=0, private=FIXED.stamp.encode(2, 0)) for block in blocks]
    now = after(before, *stamps)
    assert now.incoming is not None
    # The first is another's by now, the second still its own; the last was nobody's.
    came = [Owner(OwnerKind.FILE, "session 'late', token 0x9"), before.outgoing.owners[1]]
    claims = [[1 << 20, 2 << 20, 4 << 20], [4096] * 3, [0, 1, 0]]
    columns = (np.array(c, t) for c, t in zip(claims, Claims.DTYPES.values(), strict=True))
    incoming = replace(now.incoming, owners=came, claims=[Claims(*columns)])
    report = compare(before, replace(now, incoming=incoming))
    assert {name: fates["not-restored"] for name, fates in report.owners.items()} == {
        "session 'late', token 0x9": 1,
        "session 'vm1', token 0x1": 1,
        "session 'vm2', token 0x2": 1,
        "unknown": 1,
    }
    first, second, *_ = (f.message for f in report.findings if f.rule == "not-restored")
    assert first.startswith(
        "session 'late', token 0x9 (in the snapshot still session 'vm0', token 0x0): not claimed"
    )
    assert second.startswith("session 'vm1', token 0x1: not claimed")


def test_who_has_most_comes_first() -> None:
    blocks = [Block(n << 20, 2) for n in range(1, 6)]
    before = owned(*blocks)
    names = [owner.name for owner in before.outgoing.owners]
    twice = [replace(before.outgoing.owners[0], name=name) for name in (*names[:2], *names[1:3])]
    before = replace(before, outgoing=replace(before.outgoing, owners=twice))
    found = compare(before, after(before, *blocks)).owners
    assert [fates.total() for fates in found.values()] == [2, 1, 1, 1]
    assert next(iter(found)) == names[1]


def test_no_owners_no_table(run: Run, saved: Saved) -> None:
    result = run("--snapshot", saved(after(BEFORE, GOOD)), "verify", "--before", saved(BEFORE))
    assert "owner" not in result.out


# The catalogue


def test_catalogue(run: Run) -> None:
    result = run("checks")
    assert (result.status, result.err) == (0, "")
    assert all(len(line) <= WIDTH for line in result.out.splitlines())
    first = [line.split()[0] for line in result.out.splitlines()[2:] if line[:1].strip()]
    assert first[:-1] == [rule.name for rule in in_order()]
    document = run("checks", "--json").document
    assert document["schema"] == "khoscope.checks/1"
    assert [rule["rule"] for rule in document["checks"]] == first[:-1]


@pytest.mark.parametrize("name", RULES)
def test_rule_explained(run: Run, name: str) -> None:
    rule = RULES[name]
    assert rule.kernel
    assert all(re.fullmatch("[a-z_]+", function) for function in rule.kernel)
    assert rule.reads == [SCOPES[scope].reads for scope in rule.finders]
    result = run("checks", name)
    assert (result.status, result.err) == (0, "")
    assert all(len(line) <= WIDTH for line in result.out.splitlines())
    said = " ".join(result.out.split())
    for text in (rule.sentence, rule.explain, *rule.reads, *rule.kernel):
        assert text in said
    [document] = run("checks", name, "--json").document["checks"]
    assert document == {
        "rule": name,
        "severity": str(rule.severity),
        "sentence": rule.sentence,
        "reads": rule.reads,
        "kernel": list(rule.kernel),
        "explain": rule.explain,
    }


def test_no_such_rule(run: Run) -> None:
    result = run("checks", "overlaps")
    assert (result.status, result.out) == (2, "")
    assert "did you mean overlap?" in result.err


# Watching


class Kernel:
    """A kernel that is in another state each time; then somebody presses Ctrl-C."""

    def __init__(self, states: Iterable[Snapshot | type[BaseException]]) -> None:
        self.states(*states)
        self.images: list[NextKernel] = []
        self.waited: list[float] = []
        self.before: Snapshot | None = None

    def states(self, *states: Snapshot | type[BaseException]) -> None:
        self._states = iter(states)

    def loaded_image(self) -> NextKernel:
        if not self.images:
            raise KhoscopeError("no kexec image is loaded", "load the next kernel")
        return self.images.pop(0)

    def judge(
        self,
        use: Callable[[Snapshot, Snapshot | None], Report],
        before: Snapshot | None = None,
        gate: bool = False,
    ) -> tuple[Snapshot, Report]:
        assert not gate
        self.before = before
        state = next(self._states, KeyboardInterrupt)
        if isinstance(state, Snapshot):
            return state, use(state, before)
        raise state("kernel memory cannot be read", "see whether it is still there")


Watch = Callable[..., tuple[Kernel, Result]]


@pytest.fixture
def watch(run: Run, monkeypatch: pytest.MonkeyPatch) -> Watch:
    def watch(
        states: Iterable[Snapshot | type[BaseException]],
        *words: object,
        images: Iterable[NextKernel] = (),
    ) -> tuple[Kernel, Result]:
        kernel = Kernel(states)
        kernel.images += images
        monkeypatch.setattr("khoscope.commands.common.kernel", lambda args, progress: kernel)
        monkeypatch.setattr("time.sleep", kernel.waited.append)
        return kernel, run("verify", "--watch", "2.5", *words)

    return watch


def test_watch_reads_the_loaded_image_each_time(watch: Watch) -> None:
    off = replace(AS_LOADED, command_line="kho=off")
    images = [AS_LOADED, off, off, AS_LOADED]
    _, result = watch([at(n, GOOD) for n in range(1, 6)], "--next", "loaded", images=images)
    # Then it is unloaded.
    assert result.err.splitlines()[0] == "khoscope: no kexec image is loaded"
    assert result.status == 2
    changes = [line for line in result.out.splitlines() if re.match(r"  [+-] ", line)]
    assert ["next-without-kho" in line for line in changes] == [True, True]
    assert [line[2] for line in changes] == ["+", "-"]


def at(second: int, *blocks: Block, **more: Any) -> Snapshot:
    """A snapshot taken at some time."""
    facts = snapshot(FIXED, blocks, **more)
    return replace(facts, taken=replace(facts.taken, time=f"2026-01-01T00:00:{second:02}Z"))


def test_watch_prints_changes_only(watch: Watch) -> None:
    kernel, result = watch(
        [at(1, GOOD), at(2, GOOD), at(3, WRONG), at(4, WRONG, STALE), at(5, STALE), at(6, STALE)]
    )
    assert kernel.waited == [2.5] * 6
    assert (result.status, result.err) == (1, "")
    start = result.out.index("PASS")
    assert result.out[start:].splitlines() == [
        "PASS: safe to kexec (0 errors, 0 warnings)",
        "",
        "2026-01-01T00:00:03Z",
        "  + error: type-mismatch: 0x000000040000 order 2: recorded contig, the pages are",
        "      1/1",
        "  + error: wrong-after-restore: 0x000000040000 order 2: 1/1 now, 7.2.0-test as",
        "      the next kernel will restore it as 1/0",
        last_line(check(at(3, WRONG))),
        "",
        "2026-01-01T00:00:04Z",
        "  + error: stale-entry: 0x000000050000 order 3: its pages are free",
        last_line(check(at(4, WRONG, STALE))),
        "",
        "2026-01-01T00:00:05Z",
        "  - error: type-mismatch: 0x000000040000 order 2: recorded contig, the pages are",
        "      1/1",
        "  - error: wrong-after-restore: 0x000000040000 order 2: 1/1 now, 7.2.0-test as",
        "      the next kernel will restore it as 1/0",
        last_line(check(at(5, STALE))),
    ]
    assert "2026-01-01T00:00:01Z" in result.out[:start]


def test_watch_as_json(watch: Watch) -> None:
    _, result = watch([at(1, STALE), at(2, STALE), at(3)], "--json")
    assert (result.status, result.err) == (0, "")
    first, went, verdict = map(json.loads, result.out.splitlines())
    assert (first["schema"], first["verdict"]) == ("khoscope.verify/1", "fail")
    assert (went["time"], went["change"], went["rule"]) == (
        "2026-01-01T00:00:03Z",
        "-",
        "stale-entry",
    )
    assert (went["phys"], went["order"]) == ("0x50000", 3)
    assert (verdict["change"], verdict["verdict"], verdict["counts"]) == ("verdict", "pass", {})


def test_watch_ends_as_the_last_round_did(watch: Watch) -> None:
    moving = at(2, state=TreeState(0x1000, moved=2))
    _, result = watch([at(1, STALE), moving])
    assert (result.status, result.err) == (3, "")
    assert result.last.startswith("INCOMPLETE: no verdict: 1 thing could not be seen")
    _, result = watch([moving, at(3, tainted=32)], "--fail-on", "warning")
    assert (result.status, result.err) == (1, "")


def test_watch_of_a_kernel_that_goes_away(watch: Watch) -> None:
    kernel, result = watch([at(1), KhoscopeError])
    assert (result.status, len(kernel.waited)) == (2, 1)
    assert "PASS: safe to kexec" in result.out
    assert result.err.splitlines() == [
        "khoscope: kernel memory cannot be read",
        "khoscope: see whether it is still there",
    ]


def test_watch_against_an_earlier_kernel(watch: Watch, saved: Saved) -> None:
    before = store.load_file(path := saved(BEFORE))
    kernel, result = watch([after(before, GOOD), after(before, WRONG)], "--before", path)
    assert result.status == 1
    assert result.last.startswith("FAIL: not intact: wrong-refcounts")
    assert kernel.before is not None
    assert kernel.before.taken == before.taken


def test_watch_of_more_than_is_kept(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows which of them are new: their number is told."""
    monkeypatch.setattr("khoscope.checks.run.KEPT", 2)
    some = [replace(STALE, phys=n << 20) for n in range(1, 5)]
    states = [at(1, *some[:3]), at(2, *some[1:]), at(3, *some), at(4, *some[:2])]
    _, result = watch(states)
    assert "2026-01-01T00:00:02Z" not in result.out
    assert "  ~ error: stale-entry: 3 → 4" in result.out
    assert "  ~ error: stale-entry: 4 → 2" in result.out
    _, result = watch(states, "--json")
    counts = [json.loads(line) for line in result.out.splitlines() if '"count"' in line]
    assert [(c["rule"], c["was"], c["now"]) for c in counts] == [
        ("stale-entry", 3, 4),
        ("stale-entry", 4, 2),
    ]


def test_long_lists_of_changes_are_cut(watch: Watch) -> None:
    many = [replace(STALE, phys=n << 20) for n in range(1, 8)]
    _, result = watch([at(1), at(2, *many)], "--limit", "3")
    assert result.out.count("  + error: ") == 3
    assert "… 4 more +" in result.out


findings = st.lists(st.integers(1, 12), unique=True)


@given(findings, findings)
def test_changes_against_a_model(was: list[int], now: list[int]) -> None:
    def report(which: list[int]) -> Report:
        return check(snapshot(FIXED, [replace(STALE, phys=n << 20) for n in which]))

    found = changes(report(was), report(now))
    assert {f.phys for f in found.came} == {n << 20 for n in set(now) - set(was)}
    assert {f.phys for f in found.went} == {n << 20 for n in set(was) - set(now)}
    assert found.counts == {}
    assert bool(found) == (set(was) != set(now))
