# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``khoscope luo``, ``owners`` and ``vmalloc``, and what ``diff`` says of clients, on a snapshot.

What they say of real kernels is in tests/vm/test_clients.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khoscope.facts import diff, store
from khoscope.facts.calls import Action, Calls, Losses, Tracing
from khoscope.facts.clients import (
    Claims,
    Flb,
    Luo,
    LuoFile,
    LuoSession,
    LuoState,
    Memfd,
    Owner,
    OwnerKind,
    Vmalloc,
)
from khoscope.facts.owners import UNKNOWN, BlockOwners, ClaimsByOwner
from khoscope.facts.snapshot import Side, Snapshot
from khoscope.trace.preservers import preservers
from khoscope.trace.record import Recorder, load
from tests.command import Run
from tests.synthetic import FIXED, Block, Touch, batch_of, call_of, missing, snapshot

DATA, LIST, CHUNK, SLAB, SEEN, STRANGE = (
    Block(0x40000, 4),
    Block(0x60000, 0),
    Block(0x61000, 0),
    Block(0x70000, 0, page_type=0xF5 << 24),
    Block(0x80000, 1),
    Block(0x90000, 0),
)
BLOCKS = [DATA, LIST, CHUNK, SLAB, SEEN, STRANGE]

AREA = Vmalloc("memfd 0x7 of session vm: folio list", 0x62020, 0x61000, 1, 1, 0, 1, 1)
OWNERS = [
    Owner(OwnerKind.VMALLOC_CHUNK, AREA.name, "vm", 7),
    Owner(OwnerKind.VMALLOC_PAGE, AREA.name, "vm", 7),
    Owner(OwnerKind.MEMFD, "memfd 0x7 of session vm: data", "vm", 7),
]


def claims(*rows: tuple[int, int, int]) -> list[Claims]:
    columns = np.array(rows, np.uint64).reshape(-1, 3)
    return [Claims(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.uint32))]


def side(of: Side, memfd: Memfd | None, **luo: Any) -> Side:
    file = LuoFile("memfd-v2", 7, 0x62000, 0, memfd)
    return replace(
        of,
        luo=Luo(0x1000, "luo-v5", 3, True, [LuoSession("vm", False, 1, [file])], **luo),
        vmallocs=[AREA],
        owners=OWNERS,
        claims=claims((0x61000, 0x1000, 0), (0x60000, 0x1000, 1), (0x40000, 0xF800, 2)),
    )


@pytest.fixture
def facts() -> Snapshot:
    bare = snapshot(FIXED, BLOCKS)
    memfd = Memfd(0x62000, 10, 0xF800, 0x3, 0, 1, AREA, 16)
    return replace(
        bare,
        kernel=replace(bare.kernel, page_types={0xF5: "slab", 0xF0: "buddy"}),
        outgoing=side(bare.outgoing, memfd, flbs=[Flb("iommu-v1", 0x5000, 2)]),
        liveupdate=LuoState(True, ["memfd-v2"]),
    )


@pytest.fixture
def ask(tmp_path: Path, run: Run) -> Callable[..., str]:
    """Runs a command on a snapshot; its output, or what it says on stderr when it cannot."""

    def ask(facts: Snapshot, *words: str, status: int = 0) -> str:
        path = tmp_path / "facts.khosnap"
        store.save_file(facts, path)
        result = run("--snapshot", path, *words)
        assert result.status == status
        assert (result.err == "") == (status == 0)
        return result.out if status == 0 else result.err

    return ask


def test_luo_as_text(facts: Snapshot, ask: Callable[..., str]) -> None:
    text = ask(facts, "luo")
    assert "live update is on, file handlers: memfd-v2" in text
    assert "outgoing: luo-v5, live update 3, 1 session, struct luo_ser at 0x1000" in text
    # 16 pages of data, the list's page and its chunk.
    assert "session vm: 1 file, 72 KiB" in text
    assert "token 0x7: memfd-v2, data 0x62000" in text
    assert "63,488 bytes, position 10, seals SEAL SHRINK" in text
    assert "0x000000040000..0x00000004f800" in text
    assert "list of folios: 1 page in 1 chunk (khoscope vmalloc 0x62020)" in text
    assert "FLB iommu-v1: data 0x5000, 2 files" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("live", "retrieved", "words"),
    [
        (False, None, "session vm: 1 file, 72 KiB, not looked at by the kernel yet\n"),
        (True, None, "session vm: 1 file, 72 KiB, given up by the kernel\n"),
        (True, False, "session vm: 1 file, 72 KiB\n"),
        (True, True, "session vm: 1 file, 72 KiB, retrieved\n"),
    ],
)
def test_what_the_kernel_has_made_of_a_session(
    facts: Snapshot, ask: Callable[..., str], live: bool, retrieved: bool | None, words: str
) -> None:
    luo = facts.outgoing.luo
    assert luo is not None
    sessions = [replace(each, retrieved=retrieved) for each in luo.sessions]
    luo = replace(luo, live=live, sessions=sessions)
    assert words in ask(replace(facts, outgoing=replace(facts.outgoing, luo=luo)), "luo")


def test_luo_that_is_not_all_looked_at(facts: Snapshot, ask: Callable[..., str]) -> None:
    luo = facts.outgoing.luo
    assert luo is not None
    session = replace(luo.sessions[0], count=1235, left_out=1234)
    luo = replace(luo, sessions=[session], left_out=5)
    facts = replace(facts, outgoing=replace(facts.outgoing, luo=luo))
    text = ask(facts, "luo")
    assert "    at least 1,234 more files: not looked at\n" in text
    assert "  at least 5 more sessions or FLBs: not looked at\n" in text


def test_luo_that_an_fdt_leads_to(facts: Snapshot, ask: Callable[..., str]) -> None:
    luo = facts.outgoing.luo
    assert luo is not None
    old = replace(luo, compatible="luo-v1")
    text = ask(replace(facts, outgoing=replace(facts.outgoing, luo=old)), "luo")
    assert "outgoing: luo-v1, live update 3, 1 session, FDT at 0x1000" in text


def test_luo_as_json(facts: Snapshot, ask: Callable[..., str]) -> None:
    document = json.loads(ask(facts, "luo", "--json"))
    assert document["schema"] == "khoscope.luo/1"
    assert document["liveupdate"] == {"enabled": True, "handlers": ["memfd-v2"]}
    assert document["incoming"] is None
    (session,) = document["outgoing"]["sessions"]
    assert (session["name"], session["count"], session["bytes"]) == ("vm", 1, 18 << 12)
    memfd = session["files"][0]["memfd"]
    assert (memfd["size"], memfd["seals"]) == (0xF800, ["SEAL", "SHRINK"])
    assert memfd["ranges"] == [{"phys": "0x40000", "size": 0xF800}]
    assert memfd["folios"]["pages"] == [{"phys": "0x60000", "size": 0x1000}]
    assert memfd["folios"]["chunks"] == [{"phys": "0x61000", "size": 0x1000}]


def test_luo_of_an_unknown_abi_is_shown_raw(facts: Snapshot, ask: Callable[..., str]) -> None:
    luo = Luo(0x1000, "luo-v9", raw="6c756f2d76390000")
    strange = replace(facts, outgoing=replace(facts.outgoing, luo=luo))
    text = ask(strange, "luo")
    assert "luo-v9" in text
    assert "6c756f2d76390000" in text


def test_problems_are_shown(facts: Snapshot, ask: Callable[..., str]) -> None:
    luo = Luo(
        0x1000,
        "luo-v5",
        1,
        True,
        [LuoSession("a\x1b[2J", True, 2, [LuoFile("x-v1", 1, 2, -5, None, ["odd"])], ["worse"])],
        problems=["worst"],
    )
    text = ask(replace(facts, outgoing=replace(facts.outgoing, luo=luo)), "luo")
    assert "problem: worst" in text
    assert "problem: worse" in text
    assert "problem: odd" in text
    assert "retrieving it failed (-5)" in text
    assert "\x1b" not in text


def test_no_luo_in_the_kernel(facts: Snapshot, ask: Callable[..., str]) -> None:
    without = replace(facts, liveupdate=None)
    assert "no live update in this kernel" in ask(without, "luo", status=2)


def test_owners_by_all_that_tells(facts: Snapshot) -> None:
    holders = BlockOwners(facts)
    found = {}
    for blocks, owner in holders.blocks():
        for phys, whose in zip(blocks.phys.tolist(), owner.tolist(), strict=True):
            found[phys] = "unknown" if whose == UNKNOWN else str(holders.owners[whose])
    assert found == {
        0x40000: "memfd 0x7 of session vm: data",
        0x60000: f"{AREA.name}, pages",
        0x61000: f"{AREA.name}, chunks",
        0x70000: "slab",
        0x80000: "unknown",
        0x90000: "unknown",
    }
    totals = [(str(held.owner), held.blocks, held.pages) for held in holders.totals()]
    assert totals[0] == ("memfd 0x7 of session vm: data", 1, 16)
    assert totals[-1] == ("None", 2, 3)
    assert sum(pages for _, _, pages in totals) == 16 + 1 + 1 + 1 + 2 + 1


def test_owners_as_text_and_json(facts: Snapshot, ask: Callable[..., str]) -> None:
    text = ask(facts, "owners", "--limit", "2")
    assert "memfd 0x7 of session vm: data" in text
    assert "… 3 more owners (--limit 0 shows all)" in text
    assert "… 4 more blocks (--limit 0 shows all)" in text
    document = json.loads(ask(facts, "owners", "--json"))
    assert document["schema"] == "khoscope.owners/1"
    assert sum(total["blocks"] for total in document["totals"]) == len(document["blocks"]) == 6
    by_phys = {block["phys"]: block for block in document["blocks"]}
    data = by_phys["0x40000"]
    assert (data["kind"], data["session"], data["token"]) == ("memfd data", "vm", "0x7")
    assert by_phys["0x90000"]["kind"] == "unknown"
    lines = [json.loads(line) for line in ask(facts, "owners", "--jsonl").splitlines()]
    assert lines == document["blocks"]


CALLER = 0xFFFFFFFFC0001010


def recording(facts: Snapshot, path: Path) -> Path:
    """Somebody preserves two blocks, and unpreserves one of them again."""

    def touch(call: int, action: Action, block: Block, ret: int = 0) -> Touch:
        return Touch(block, call=call, action=action, ret=ret)

    def call(number: int) -> Calls:
        made = call_of("kho_preserve_pages", call=number)
        return replace(made, stack=np.full((1, 1), CALLER, np.uint64))

    batch = batch_of(
        FIXED,
        map(call, (1, 2, 3)),
        [
            touch(1, Action.ADD, SEEN),
            touch(1, Action.ADD, STRANGE),
            touch(2, Action.DELETE, STRANGE),
            touch(3, Action.ADD, STRANGE, ret=-12),
        ],
    )
    with Recorder(path, facts) as recorder:
        recorder.add(batch)
        symbols = {CALLER: "client_save+0x10 [client]"}
        attached = {"kho_preserve_pages": "fentry"}
        recorder.finish(Tracing(facts, attached, missing(attached), "16 MiB", 0), symbols, Losses())
    return path


def test_who_preserved_what_nothing_else_tells_of(facts: Snapshot, tmp_path: Path) -> None:
    callers = preservers(load(recording(facts, tmp_path / "a.khotrace")))
    totals = {
        str(held.owner): (held.blocks, held.pages) for held in BlockOwners(facts, callers).totals()
    }
    assert totals["preserved by client_save [client]"] == (1, 2)
    # Unpreserved again, and then not preserved after all.
    assert totals["None"] == (1, 1)


def test_owners_with_a_recording(facts: Snapshot, tmp_path: Path, ask: Callable[..., str]) -> None:
    path = recording(facts, tmp_path / "a.khotrace")
    assert "preserved by client_save [client]" in ask(facts, "owners", "--trace", str(path))
    other = replace(facts, kernel=replace(facts.kernel, boot_id="another"))
    said = ask(other, "owners", "--trace", str(path), status=2)
    assert "recorded in another boot" in said


def test_vmalloc_as_text_and_json(facts: Snapshot, ask: Callable[..., str]) -> None:
    text = ask(facts, "vmalloc", "0x62020")
    assert f"struct kho_vmalloc at 0x000000062020: {AREA.name}" in text
    assert "1 page of order 0, flags ALLOC, first chunk 0x61000" in text
    assert "0x000000061000..0x000000062000" in text
    assert "0x000000060000..0x000000061000" in text
    assert "error" not in text
    document = json.loads(ask(facts, "vmalloc", str(0x62020), "--json"))
    assert document["schema"] == "khoscope.vmalloc/1"
    assert [area["phys"] for area in document["areas"]] == ["0x62020"]
    assert document["findings"] == []


def test_vmalloc_whose_page_is_not_preserved(facts: Snapshot, ask: Callable[..., str]) -> None:
    bare = snapshot(FIXED, [block for block in BLOCKS if block != LIST])
    outgoing = replace(facts.outgoing, tree=bare.outgoing.tree, blocks=bare.outgoing.blocks)
    text = ask(replace(facts, outgoing=outgoing), "vmalloc", "0x62020")
    assert "error: broken-vmalloc" in text
    assert "1 page is not preserved" in " ".join(text.split())


@pytest.mark.parametrize("address", ["0x62021", "0xffff888000062020"])
def test_vmalloc_that_is_not_there(address: str, facts: Snapshot, ask: Callable[..., str]) -> None:
    said = ask(facts, "vmalloc", address, status=2)
    assert f"no struct kho_vmalloc at {address}" in said
    assert "0x62020" in said


@pytest.mark.parametrize("address", ["", "vm", "-1", str(1 << 64)])
def test_vmalloc_of_no_address(address: str, run: Run) -> None:
    result = run("vmalloc", "--", address)
    assert result.status == 2
    assert "ADDR" in result.err


def test_memory_of_a_session_is_whole_pages(facts: Snapshot) -> None:
    memory = ClaimsByOwner(facts.outgoing, FIXED.page_shift)
    assert memory.session_bytes("vm") == 18 << 12
    assert memory.session_bytes("nobody") == 0
    assert memory.folios("vm", 7).size.tolist() == [0xF800]


def test_diff_tells_what_clients_did(facts: Snapshot) -> None:
    memfd = Memfd(0x62000, 10, 0x1000, 0x3, 0, 1, AREA, 1)
    later = replace(facts, outgoing=side(facts.outgoing, memfd))
    session = LuoSession("new", False, 0)
    luo = later.outgoing.luo
    assert luo is not None
    luo = replace(luo, sessions=[*luo.sessions, session])
    later = replace(later, outgoing=replace(later.outgoing, luo=luo, claims=claims()))
    changed = {each.what: (each.a, each.b) for each in diff.facts(facts, later)}
    assert changed == {
        "outgoing session vm token 0x7": (
            "memfd-v2, data 0x62000, 63488 bytes",
            "memfd-v2, data 0x62000, 4096 bytes",
        ),
        "outgoing session new": ("absent", "0 files"),
        "outgoing FLB iommu-v1": ("data 0x5000, 2 files", "absent"),
        f"outgoing memory of {AREA.name}, chunks": ("4096 bytes", "0 bytes"),
        f"outgoing memory of {AREA.name}, pages": ("4096 bytes", "0 bytes"),
        "outgoing memory of memfd 0x7 of session vm: data": ("63488 bytes", "0 bytes"),
    }
