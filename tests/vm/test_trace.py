# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``khoscope trace`` on real kernels: what it says is what happened, no more and no less.

The exercise module knows what it did: every call that it made, with its address, its pages and
what came back, and the refcounts of its pages.  All of it has to be in the trace.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.vm.test_khoscope import host
from vm.exercise import Exercise, Piece, by_scenario
from vm.kernel import series, under_test, what
from vm.machine import Machine
from vm.trace import Trace

#: How many pieces of each scenario, in the order in which they are made; None: as many as it has.
MADE = {
    "contig": 23,
    "split": 29,
    "folio": 31,
    "compound": 5,
    "vmalloc": None,
    "unpreserve": 7,
    "helper": 5,
    "wrong-call": None,
}
PIECES = {**MADE, "vmalloc": 1, "wrong-call": 2, "scratch": 3}

#: What goes across the kexec and is restored as it was preserved.
RESTORED = ("contig", "split", "folio", "vmalloc", "helper")

#: Functions of the module that call KHO for its pieces; the others do it for its own records.
FOR_PIECES = frozenset(
    f"{name} [kho_exercise]"
    for name in (
        "preserve_pages",
        "preserve_folio",
        "preserve_area",
        "unpreserve_pages",
        "split_with_helper",
        "restore_pages",
        "restore_folio",
        "restore_area",
        "restore_mistaken",
    )
)

Document = dict[str, Any]

#: Compiling takes a minute in a guest: those of 7.3 stand for those of 7.2, but for the series as
#: posted, which loses the type in one way on each.
KERNELS = [
    name
    for name in under_test()
    if series(name) != "7.2" or what(name) == "rfc" or f"7.3-{what(name)}" not in under_test()
]


def lacking(kernel: str) -> set[str]:
    """Scenarios for which the kernel has no functions."""
    helper = {"helper"} if what(kernel) == "base" else set()
    return helper | ({"unpreserve"} if by_arguments(kernel) else set())


def by_arguments(kernel: str) -> bool:
    """No function adds a block: what is preserved follows from the calls' arguments."""
    return series(kernel) == "6.18"


def refuses_split(kernel: str) -> bool:
    """Trees of bare keys refuse the type where the posted series has it."""
    return kernel == "7.3-rfc"


@dataclass
class Story:
    """What was seen on the way of one machine through a kexec."""

    kernel: str
    #: What the module says when all is preserved, and when all is restored.
    pieces: list[Piece] = field(default_factory=list)
    restored: list[Piece] = field(default_factory=list)
    #: Keys of the tree before and after the preserving.
    empty: frozenset[int] = frozenset()
    full: frozenset[int] = frozenset()
    #: The documents of ``--json``.
    preserving: Document = field(default_factory=dict)
    restoring: Document = field(default_factory=dict)
    #: Those of kprobes, on the kernels that have them (:func:`by_kprobes`).  Of the restoring, it
    #: ends before the wrong calls.
    preserving_by_kprobes: Document = field(default_factory=dict)
    restoring_by_kprobes: Document = field(default_factory=dict)
    #: Exit statuses of the traces with ``--check``, and of the replay.
    statuses: dict[str, int] = field(default_factory=dict)
    #: The lines of ``--replay FILE --jsonl``.
    replayed: list[Document] = field(default_factory=list)

    @property
    def wrong_calls(self) -> list[Piece]:
        """The pieces that were restored by the wrong call, last of all."""
        pages, block = [p for p in self.restored if p.scenario == "wrong-call"]
        return [block] if refuses_split(self.kernel) else [pages, block]

    def of(self, *scenarios: str) -> set[str]:
        """Addresses of all pieces of some scenarios."""
        return {address(piece) for piece in self.pieces if piece.scenario in scenarios}


def by_kprobes(kernel: str) -> bool:
    """A second trace, by kprobes: on two kinds of kernels alone, as compiling takes its time."""
    healthy = (name for name in KERNELS if what(name) == "fixed")
    return kernel == next(healthy, None) or by_arguments(kernel)


def address(piece: Piece) -> str:
    return f"{piece.ranges[0][0]:#x}"


@pytest.fixture(scope="module", params=KERNELS)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Preserve each kind of memory, kexec, restore it; traced, on some twice at the same time."""
    story = Story(request.param)
    directory = tmp_path_factory.mktemp(story.kernel)
    snapshot, recording = directory / "before.khosnap", directory / "a.khotrace"
    wrong = 0 if what(story.kernel) == "fixed" else 1
    with Machine(story.kernel) as machine:
        exercise = Exercise(machine)
        qemu = machine.source

        def tree() -> frozenset[int]:
            lines = host(*qemu, "tree", "--jsonl").splitlines()
            return frozenset(int(json.loads(line)["key"], 16) for line in lines)

        exercise.load()
        recorded = ("--record", "/root/a.khotrace")
        first = Trace(machine, "preserving", "--json", "--check", *recorded)
        with ExitStack() as traces:
            if by_kprobes(story.kernel):
                second = Trace(machine, "preserving-kprobes", "--json", "--probe", "kprobe")
            traces.enter_context(first)
            if by_kprobes(story.kernel):
                traces.enter_context(second)
            story.empty = tree()
            for name, number in MADE.items():
                if name not in lacking(story.kernel):
                    exercise.preserve(name, number)
            exercise.preserve("scratch", exercise.scratch_areas()[0][0])
        story.full = tree()
        story.pieces = exercise.report()
        story.preserving = json.loads(first.output())
        if by_kprobes(story.kernel):
            story.preserving_by_kprobes = json.loads(second.output())
        assert first.status is not None
        story.statuses["preserving"] = first.status
        machine.copy_out("/root/a.khotrace", recording)
        replay = ("trace", "--replay", str(recording), "--jsonl", "--check")
        lines = host(*replay, status=wrong).splitlines()
        story.replayed = [json.loads(line) for line in lines]

        host(*qemu, "snapshot", str(snapshot))
        machine.load_kexec()
        machine.execute_kexec()
        machine.copy_in(snapshot, "/root/before.khosnap")
        before = ("--before", "/root/before.khosnap")
        first = Trace(machine, "restoring", "--json", *before)
        kprobes = ("--json", "--check", "--probe", "kprobe", *before)
        with ExitStack() as traces:
            if by_kprobes(story.kernel):
                second = Trace(machine, "restoring-kprobes", *kprobes)
            traces.enter_context(first)
            if by_kprobes(story.kernel):
                traces.enter_context(second)
            exercise.load()
            for name in RESTORED:
                if name not in lacking(story.kernel):
                    exercise.restore(name)
            if by_kprobes(story.kernel):
                story.statuses["restoring"] = second.end()
            exercise.restore("wrong-call")
        story.restored = exercise.report()
        story.restoring = json.loads(first.output())
        if by_kprobes(story.kernel):
            story.restoring_by_kprobes = json.loads(second.output())
    return story


# -- what was called, and what came back -----------------------------------------------------------


def for_pieces(document: Document) -> list[Document]:
    return [call for call in document["calls"] if call["client"] in FOR_PIECES]


Call = tuple[str, str | None, int, int | bool | None]


def seen_calls(document: Document) -> list[Call]:
    """The calls for pieces: function, address, pages, and what came back."""
    return [
        (
            call["call"],
            call["phys"],
            call["pages"],
            call["ret"] is not None if call["call"].startswith("kho_restore") else call["ret"],
        )
        for call in for_pieces(document)
    ]


def made_calls(pieces: Iterable[Piece]) -> Iterator[Call]:
    """What the module did to have its pieces preserved, in the order in which it did it."""
    first = {"folio": "kho_preserve_folio", "vmalloc": "kho_preserve_vmalloc"}
    for piece in pieces:
        call = first.get(piece.scenario, "kho_preserve_pages")
        again = piece.call != call
        if piece.scenario == "vmalloc":
            # An area has no address; one page more is its struct kho_vmalloc_chunk.
            yield call, None, piece.pages + 1, piece.ret
        else:
            yield call, address(piece), piece.pages, 0 if again else piece.ret
        if again:
            void = piece.call.startswith("kho_unpreserve")
            yield piece.call, address(piece), piece.pages, None if void else piece.ret


def restored_calls(pieces: Iterable[Piece]) -> Iterator[Call]:
    """What the module did to have its pieces restored."""
    for piece in pieces:
        if piece.scenario == "vmalloc":
            yield piece.call, None, piece.pages + 1, piece.ret == 0
        else:
            # A folio's order is that of its stamp, even of one that was refused.
            single = piece.scenario == "wrong-call" and piece.call == "kho_restore_pages"
            yield piece.call, address(piece), 1 if single else piece.pages, piece.ret == 0


def test_as_many_pieces_as_asked_for(story: Story) -> None:
    made = {name: len(pieces) for name, pieces in by_scenario(story.pieces).items()}
    lacks = lacking(story.kernel)
    assert made == {name: count for name, count in PIECES.items() if name not in lacks}
    refused = [piece.ret for piece in story.pieces if piece.scenario == "scratch"]
    assert refused == [-22] * 3


def test_every_call_that_preserves(story: Story) -> None:
    """Functions, addresses, pages and results, call by call, are those that the module reports."""
    assert seen_calls(story.preserving) == list(made_calls(story.pieces))


def test_counts_of_what_preserves(story: Story) -> None:
    """The same once more in plain numbers: they would show calls that both have not."""
    lacks = lacking(story.kernel)
    helper, undone = 5 * ("helper" not in lacks), 7 * ("unpreserve" not in lacks)
    expected = {
        "kho_preserve_pages": 23 + 29 + 5 + undone + helper + 2 + 3,
        "kho_preserve_folio": 31,
        "kho_preserve_vmalloc": 1,
        "kho_unpreserve_pages": undone,
        "kho_split_preserved_pages": helper,
    }
    seen = Counter(call["call"] for call in for_pieces(story.preserving))
    assert seen == Counter(expected)
    # Orders 1 to 4 in turn, then 0 to 3, then 1 to 4 again, then 2, then 1 to 3.
    contig, split = 23 // 4 * 30 + 2 + 4 + 8, 29 // 4 * 30 + 2
    folios, helpers = 31 // 4 * 15 + 1 + 2 + 4, (2 + 4 + 8 + 2 + 4 if helper else 0)
    pages: Counter[str] = Counter()
    for call in for_pieces(story.preserving):
        pages[call["call"]] += call["pages"]
    compound = 2 + 4 + 8 + 16 + 2
    others = undone * 4 + helpers + 2 * 4 + 1 + 2 + 4
    assert pages["kho_preserve_pages"] == contig + split + compound + others
    assert pages["kho_preserve_folio"] == folios
    assert pages["kho_preserve_vmalloc"] == 64 + 1
    assert pages["kho_unpreserve_pages"] == undone * 4
    assert pages["kho_split_preserved_pages"] == helpers


def test_errors_by_name(story: Story) -> None:
    failed = [call for call in story.preserving["calls"] if call["failed"]]
    names = {-22: "EINVAL", -34: "ERANGE"}
    rets = [piece.ret for piece in story.pieces if piece.ret]
    assert [(call["ret"], call["errno"]) for call in failed] == [(ret, names[ret]) for ret in rets]
    assert Counter(rets) == {-22: 3} | ({-34: 29 + 5 + 1} if refuses_split(story.kernel) else {})
    assert all(call["blocks"] == [] for call in failed if call["ret"] == -22)
    assert story.preserving["counts"]["failed"] == len(rets)


def test_blocks_that_were_refused(story: Story) -> None:
    """The tree did not take them, and the trace says as what they were offered."""
    refused = [
        block
        for call in for_pieces(story.preserving)
        for block in call["blocks"]
        if block["ret"] is not None and block["ret"] < 0
    ]
    assert len(refused) == (29 + 5 + 1 if refuses_split(story.kernel) else 0)
    for block in refused:
        assert (block["action"], block["type"], block["ret"]) == ("add", "split", -34)
        assert (block["was_set"], block["is_set"]) == (False, False)
        assert int(block["key"], 16) >> 63 == 1


def test_sums_are_those_of_the_calls(story: Story) -> None:
    for document in (story.preserving, story.restoring):
        total = document["summary"]["total"]
        calls = document["calls"]
        assert total["calls"] == len(calls)
        assert total["failed"] == sum(call["failed"] for call in calls)
        for name, sums in total["functions"].items():
            mine = [call for call in calls if call["call"] == name]
            assert sums["calls"] == len(mine)
            assert sums["pages"] == sum(call["pages"] for call in mine)
        assert document["blocks"] == sum(len(call["blocks"]) for call in calls)
        assert document["losses"]["made"] == len(calls) + document["blocks"]
        assert not any(n for name, n in document["losses"].items() if name != "made")


# -- what became of the blocks ---------------------------------------------------------------------


def refcounts(piece: Piece) -> dict[str, int]:
    """As the module has counted them."""
    values = [value for value, count in piece.refs for _ in range(count)]
    tails = Counter(values[1:])
    others = sum(count for value, count in tails.items() if value not in (0, 1))
    return {"head": values[0], "zeros": tails[0], "ones": tails[1], "others": others}


def blocks_at(
    document: Document, piece: Piece, action: str, function: str | None = None
) -> list[Document]:
    """Blocks of calls for the piece, in its memory."""
    spans = piece.ranges
    return [
        block
        for call in for_pieces(document)
        if function in (None, call["call"])
        for block in call["blocks"]
        if block["action"] == action
        and any(start <= int(block["phys"], 16) < end for start, end in spans)
    ]


def stored_type(kernel: str, kind: str) -> str | None:
    """What the tree of the kernel says, or is to say, of a block that is contig or split."""
    posted = kind if refuses_split(kernel) else "contig"
    return {"base": None, "rfc": posted, "fixed": kind}[what(kernel)]


def test_blocks_that_were_added(story: Story) -> None:
    """Order, type and refcounts of each block are those of the piece that it is."""
    kinds = {"contig": "contig", "unpreserve": "contig", "folio": "contig", "split": "split"}
    for piece in story.pieces:
        if piece.scenario not in kinds:
            continue
        (block,) = blocks_at(story.preserving, piece, "add")
        assert block["phys"] == address(piece)
        assert 1 << block["order"] == block["pages"] == piece.pages
        assert block["type"] == stored_type(story.kernel, kinds[piece.scenario]), piece
        taken = piece.ret == 0
        assert (block["ret"], block["was_set"], block["is_set"]) == (piece.ret, False, taken)
        assert refcounts(piece).items() <= block["refcounts"].items(), piece
        assert block["refcounts"]["looked"] == piece.pages


def test_blocks_that_were_deleted(story: Story) -> None:
    deleted = [p for p in story.pieces if p.scenario in ("unpreserve", "helper")]
    for piece in deleted:
        (added, *_) = blocks_at(story.preserving, piece, "add")
        (block,) = blocks_at(story.preserving, piece, "delete")
        assert (block["was_set"], block["is_set"]) == (True, False)
        assert (block["key"], block["order"]) == (added["key"], added["order"])
        assert block["refcounts"] is None


def test_helper_adds_what_it_has_split(story: Story) -> None:
    for piece in story.pieces:
        if piece.scenario == "helper":
            first, second = blocks_at(story.preserving, piece, "add")
            assert first["refcounts"]["zeros"] == piece.pages - 1
            assert refcounts(piece).items() <= second["refcounts"].items()
            assert second["refcounts"]["ones"] == piece.pages - 1
            assert first["type"] == "contig"
            assert second["type"] == stored_type(story.kernel, "split")


def test_pages_of_the_area(story: Story) -> None:
    (piece,) = (p for p in story.pieces if p.scenario == "vmalloc")
    (call,) = (c for c in for_pieces(story.preserving) if c["call"] == "kho_preserve_vmalloc")
    seen = Counter(int(block["phys"], 16) for block in call["blocks"])
    pages = {p for start, end in piece.ranges for p in range(start, end, 4096)}
    assert len(pages) == 64
    assert pages < seen.keys()
    assert seen.total() == 65
    assert {block["order"] for block in call["blocks"]} == {0}


def test_balance_is_what_became_of_the_tree(story: Story) -> None:
    """Key by key: what drgn finds in the tree is what the calls have added and not deleted."""
    balance: Counter[int] = Counter()
    for call in story.preserving["calls"]:
        for block in call["blocks"]:
            bits = (block["was_set"], block["is_set"])
            change = {(False, True): 1, (True, False): -1, (False, False): 0}[bits]
            assert change or block["ret"] < 0
            balance[int(block["key"], 16)] += change
    assert set(balance.values()) <= {0, 1}
    assert {key for key, count in balance.items() if count} == story.full - story.empty
    assert story.empty < story.full
    sums = story.preserving["summary"]["balance"]
    assert sum(each["distinct"] for each in sums) == len(story.full) - len(story.empty)
    assert not any(each["unknown"] for each in sums)


# -- every way to see the same ---------------------------------------------------------------------


def untimed(document: Document) -> list[Document]:
    """The calls without their times."""
    return [
        {name: value for name, value in call.items() if name not in ("time", "ns")}
        for call in document["calls"]
    ]


def test_what_is_attached(story: Story) -> None:
    other = "page" if series(story.kernel) == "7.3" else "key"
    # The last is that of linux 6.16 and 6.17.
    absent = {f"kho_radix_add_{other}", f"kho_radix_del_{other}", "kho_preserve_phys"}
    if "helper" in lacking(story.kernel):
        absent.add("kho_split_preserved_pages")
    missing = {}
    if by_arguments(story.kernel):
        absent |= {"kho_radix_add_page", "kho_radix_del_page", "kho_remove_subtree"}
        absent |= {f"kho_unpreserve_{what}" for what in ("folio", "pages", "vmalloc")}
        missing = {"kho_restore_page": "its callers tell what they restore"}
    for document in (story.preserving, story.restoring):
        assert set(document["attached"].values()) == {"fentry"}
        assert document["missing"] == missing | dict.fromkeys(absent, "not in this kernel")
        assert document["buffer"] == "ring buffer of 16 MiB"


@pytest.mark.parametrize("story", [name for name in KERNELS if by_kprobes(name)], indirect=True)
def test_kprobes_see_the_same(story: Story) -> None:
    """Two traces at once, of which neither disturbs the other."""
    assert untimed(story.preserving_by_kprobes) == untimed(story.preserving)
    both = untimed(story.restoring)
    assert untimed(story.restoring_by_kprobes) == both[: -len(story.wrong_calls)]
    for document in (story.preserving_by_kprobes, story.restoring_by_kprobes):
        assert set(document["attached"].values()) == {"kprobe"}
        assert len(document["attached"]) == len(story.preserving["attached"])
        assert document["losses"]["made"] == len(document["calls"]) + document["blocks"]
        assert not any(n for name, n in document["losses"].items() if name != "made")
    if what(story.kernel) == "fixed":
        assert story.restoring_by_kprobes["verdict"] == "pass"
        assert story.restoring_by_kprobes["counts"] == {}
        assert story.statuses["restoring"] == 0


def test_replay_is_the_live_trace(story: Story) -> None:
    *calls, last = story.replayed
    assert calls == story.preserving["calls"]
    assert last.pop("call") is None
    assert last.items() <= story.preserving.items()


# -- the restoring ---------------------------------------------------------------------------------


def test_every_call_that_restores(story: Story) -> None:
    preserved = {(p.scenario, p.piece) for p in story.pieces if p.ret == 0}
    pieces = [p for p in story.restored if p.scenario in RESTORED]
    assert all((p.state == "restored") == ((p.scenario, p.piece) in preserved) for p in pieces)
    pieces = [piece for piece in pieces if piece.state == "restored"]
    made = restored_calls([*pieces, *story.wrong_calls])
    assert seen_calls(story.restoring) == list(made)
    calls = for_pieces(story.restoring)[: -len(story.wrong_calls)]
    counts = Counter(call["call"] for call in calls)
    helper = 0 if "helper" in lacking(story.kernel) else 5
    split = 0 if refuses_split(story.kernel) else 29 + helper
    assert counts == {
        "kho_restore_pages": 23 + split,
        "kho_restore_folio": 31,
        "kho_restore_vmalloc": 1,
    }


def test_blocks_that_were_restored(story: Story) -> None:
    """Order and type of the stamp, and the refcounts that the module sees now."""
    kinds = {"contig": "contig", "folio": "contig", "split": "split", "helper": "split"}
    for piece in story.restored:
        if piece.scenario in kinds and piece.state == "restored":
            (block,) = blocks_at(story.restoring, piece, "restore")
            assert block["phys"] == address(piece)
            assert 1 << block["order"] == piece.pages
            assert block["type"] == stored_type(story.kernel, kinds[piece.scenario])
            assert int(block["stamp"], 16) >> 32 == 0x4B484F50
            assert refcounts(piece).items() <= block["refcounts"].items(), piece


# -- what is wrong ---------------------------------------------------------------------------------


def addresses(document: Document, rule: str) -> set[str]:
    """Of all findings by a rule; each is also under the call that it is about."""
    found = {f["phys"] for f in document["findings"] if f["rule"] == rule}
    below = {f["phys"] for call in document["calls"] for f in call["findings"] if f["rule"] == rule}
    assert found == below
    return found


def test_findings_at_the_preserve(story: Story) -> None:
    found = story.preserving
    fixed = what(story.kernel) == "fixed"
    assert found["verdict"] == ("pass" if fixed else "fail")
    assert story.statuses["preserving"] == (0 if fixed else 1)
    counts = {rule: n for rule, n in found["counts"].items() if rule != "wrong-preserve-call"}
    split = story.of("split", "helper")
    # The first piece of wrong-call is split, the second is not.
    (pages, block) = [address(p) for p in story.pieces if p.scenario == "wrong-call"]
    if fixed:
        assert counts == {"failed": 3}
    elif refuses_split(story.kernel):
        refused = 29 + 5 + 1
        assert counts == {"type-not-stored": 1, "abi-not-bumped": 1, "failed": refused + 3}
        assert addresses(found, "failed") >= split | {pages}
    elif what(story.kernel) == "rfc":
        assert addresses(found, "type-mismatch") == split | {pages}
        assert addresses(found, "wrong-after-restore") == split | {pages}
        assert counts == {
            "type-not-stored": 1,
            "abi-not-bumped": 1,
            "type-mismatch": 29 + 5 + 1,
            "wrong-after-restore": 29 + 5 + 1,
            "failed": 3,
        }
    else:
        wrong = story.of("contig", "unpreserve") | {block}
        if by_arguments(story.kernel):
            # There they all come back as one compound page.
            wrong |= split | {pages}
        assert addresses(found, "wrong-after-restore") == wrong
        assert counts == {"wrong-after-restore": len(wrong), "failed": 3}


def test_folios_that_are_preserved_as_pages(story: Story) -> None:
    """Those alone: neither what kho_preserve_folio() preserved, nor what is no folio."""
    compound = story.of("compound")
    assert len(compound) == 5
    assert addresses(story.preserving, "wrong-preserve-call") == compound
    assert story.preserving["counts"]["wrong-preserve-call"] == 5
    assert all(piece.compound for piece in story.pieces if piece.scenario == "compound")


def test_findings_at_the_restore(story: Story) -> None:
    found = story.restoring
    before = {(p.scenario, p.piece): p.shape for p in story.pieces}
    changed = {
        address(piece)
        for piece in story.restored
        if piece.scenario in RESTORED
        and piece.state == "restored"
        and piece.shape != before[piece.scenario, piece.piece]
    }
    posted = () if refuses_split(story.kernel) else ("split", "helper")
    base = ("contig", "split") if by_arguments(story.kernel) else ("contig",)
    sick = {"base": base, "rfc": posted, "fixed": ()}
    assert changed == story.of(*sick[what(story.kernel)])
    wrong_calls = set(map(address, story.wrong_calls))
    assert addresses(found, "wrong-refcounts") - wrong_calls == changed
    known = {"type-not-stored": 1, "abi-not-bumped": 1} if what(story.kernel) == "rfc" else {}
    wrong = {"wrong-refcounts": len(changed)} if changed else {}
    counts = Counter(f["rule"] for f in found["findings"] if f.get("phys") not in wrong_calls)
    assert counts == known | wrong
    assert found["verdict"] == "fail"


def test_wrong_calls_are_flagged_on_every_kernel(story: Story) -> None:
    """Pages as a folio, and a block as a single page; nothing else."""
    found, asked = story.restoring, story.wrong_calls
    pages, block = [p for p in story.restored if p.scenario == "wrong-call"]
    assert addresses(found, "wrong-restore-call") == set(map(address, asked))
    assert found["counts"]["wrong-restore-call"] == len(asked)
    assert seen_calls(found)[-len(asked) :] == list(restored_calls(asked))
    # Where the stamp says that they are split, the kernel refuses to make a folio of them.
    refused = what(story.kernel) == "fixed"
    states = {"base": "restored", "rfc": "restored", "fixed": "restore-failed"}
    became = states[what(story.kernel)] if pages in asked else "unpreserved"
    assert (pages.state, block.state) == (became, "restored")
    assert found["counts"].get("failed", 0) == int(refused)
