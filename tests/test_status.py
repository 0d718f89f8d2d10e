# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of KHO in one screen."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from khoscope.abi.keys import BAD_ORDER
from khoscope.abi.kho_fdt import Fdt, Subtree
from khoscope.cli import main
from khoscope.facts import diff, store
from khoscope.facts.clients import Luo, LuoFile, LuoSession, LuoState
from khoscope.facts.columns import Nodes
from khoscope.facts.snapshot import (
    Handover,
    KexecImage,
    Node,
    Scan,
    ScratchSetup,
    Snapshot,
)
from khoscope.facts.status import kho_switch, read_from, status, taint_letters
from khoscope.facts.tree import TreeState
from khoscope.views.status import StatusText
from tests.synthetic import FIXED, PLAIN, Block, rich, snapshot


def text(facts: Snapshot, limit: int | None = 20) -> list[str]:
    out = io.StringIO()
    StatusText(out, limit).status(facts, status(facts))
    return out.getvalue().splitlines()


def with_kernel(facts: Snapshot, **more: Any) -> Snapshot:
    return replace(facts, kernel=replace(facts.kernel, **more))


def full() -> Snapshot:
    """A kernel with something to say on every line."""
    facts = rich()
    sessions = [
        LuoSession("guests", True, 2, [LuoFile("memfd-v2", 1, 0x1000)]),
        LuoSession("disks", False, 1),
    ]
    incoming = facts.incoming
    assert incoming is not None
    handed = replace(incoming, luo=Luo(0x7000, "luo-v4", 2, True, sessions))
    outgoing = replace(facts.outgoing, luo=Luo(0x5000, "luo-v5", 3, True, sessions[1:]))
    return replace(
        with_kernel(facts, command_line="root=/dev/vda kho=on liveupdate=on"),
        outgoing=outgoing,
        incoming=handed,
        scratch_free=[1 << 11, 1 << 12],
        nodes=[Node(0, 0, 3 << 29), Node(1, 3 << 29, 1 << 32)],
        image=KexecImage(True, True, 0x2000, 12 << 20),
        crash_image=KexecImage(True, True, 0, 180 << 20),
        liveupdate=LuoState(True, ["memfd-v2"]),
        offline=np.array([[1 << 30, 3 << 29]], np.uint64),
    )


def off(command_line: str = "quiet", **more: Any) -> Snapshot:
    none = Fdt(0, problems=["there is none"])
    facts = snapshot(PLAIN, [], state=TreeState(0), fdt=none, scratch=())
    return replace(with_kernel(facts, command_line=command_line, **more), kho_enable=False)


# On or off, and why


@pytest.mark.parametrize(
    ("command_line", "why"),
    [
        ("kho=on", "kho=on on the command line"),
        ("quiet kho=off kho=Y root=/dev/vda", "kho=Y on the command line"),
        ("kho=1", "kho=1 on the command line"),
        ("kho=enable", "kho=enable on the command line"),
        ("quiet", "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"),
        ("xkho=on init=/x kho=maybe", "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"),
        ("quiet -- kho=on", "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"),
        ("", "not recorded"),
    ],
)
def test_on(command_line: str, why: str) -> None:
    switch = kho_switch(with_kernel(snapshot(FIXED, []), command_line=command_line))
    assert switch.on
    assert why in switch.why


@pytest.mark.parametrize(
    ("command_line", "log", "why"),
    [
        ("quiet", [], "does not have kho=on"),
        ("quiet -- kho=on", [], "does not have kho=on"),
        ("kho=on kho=off", [], "kho=off on the command line"),
        ("kho=n", [], "kho=n on the command line"),
        ("kho=disable", [], "kho=disable on the command line"),
        ("kho=on", [], "its set-up failed"),
        ("", [], "not recorded"),
        (
            "kho=on",
            ["KHO: Failed to reserve scratch area, disabling kexec handover"],
            "no room for a scratch area",
        ),
        ("kho=off", ["KHO: exec from: 7.2.0 failed"], "kho=off on the command line"),
    ],
)
def test_off(command_line: str, log: list[str], why: str) -> None:
    switch = kho_switch(off(command_line, log=log))
    assert not switch.on
    assert why in switch.why


@pytest.mark.parametrize(
    ("command_line", "log", "setup", "why", "hint"),
    [
        ("quiet", [], ScratchSetup(0, False), "does not have kho=on", "boot it with kho=on"),
        (
            "kho=0",
            [],
            ScratchSetup(0, False),
            "kho=0 on the",
            "boot it with kho=on in place of kho=0",
        ),
        ("quiet", [], ScratchSetup(3, True), "by this kernel's default, but", "into 4 GiB of RAM"),
        ("kho=on", [], ScratchSetup(3, False), "no room for the list of", "into 4 GiB of RAM"),
        ("kho=on", [], ScratchSetup(0, False), "see the kernel's log", "into 4 GiB of RAM"),
        (
            "kho=on",
            ["KHO: Failed to reserve nid 1 scratch buffer"],
            None,
            "no room for the scratch area of NUMA node 1",
            "into 4 GiB of RAM, of which 1 GiB are in node 1",
        ),
        (
            "kho=1 kho_scratch=1G,1G,1G kho_scratch=9G,1M,1M",
            [
                "KHO: Failed to reserve lowmem scratch buffer",
                "KHO: Failed to reserve scratch area, disabling kexec handover",
            ],
            ScratchSetup(3, True),
            "the lowmem scratch area (below 4 GiB), with kho_scratch=9G,1M,1M on the command line",
            "into 4 GiB of RAM, of which 4 GiB are below 4 GiB",
        ),
    ],
)
def test_why_it_is_off(
    command_line: str, log: list[str], setup: ScratchSetup | None, why: str, hint: str
) -> None:
    """What the kernel's memory and log say, and what to do that was not done already."""
    nodes = [Node(0, 0, 3 << 30), Node(1, 3 << 30, 1 << 40)]
    facts = replace(off(command_line, log=log), scratch_setup=setup, nodes=nodes)
    switch = kho_switch(facts)
    assert not switch.on
    assert why in switch.why
    assert switch.hint.endswith(hint)


@pytest.mark.parametrize(
    ("command_line", "why"),
    [("kho=on kho=off", "kho=off on the command line"), ("quiet", "does not have kho=on")],
)
def test_off_in_a_kernel_that_was_handed_over_to(command_line: str, why: str) -> None:
    """It has scratch areas, but did not set any up."""
    facts = replace(off(command_line), scratch_setup=ScratchSetup(3, True))
    handed = replace(facts, handover=replace(facts.handover, is_kho_boot=True))
    assert kho_switch(handed).why.endswith(why)


def test_on_without_a_tree() -> None:
    facts = snapshot(FIXED, [], state=TreeState(0))
    assert not kho_switch(facts).on
    assert "no tree" in kho_switch(facts).why


# What is summed up


def test_totals_and_the_tree_s_cost() -> None:
    facts = rich()
    found = status(facts)
    assert found.preserved == facts.outgoing.tree.totals(FIXED)
    assert found.unclaimed == {(0, 1): 1, (1, 1): 1, (2, 0): 1}
    nodes = Nodes.concatenate(facts.outgoing.tree.nodes)
    assert found.tree_pages == len(nodes) > 0
    assert found.per_byte == pytest.approx(619 / len(nodes))


def test_bad_orders_have_no_pages() -> None:
    facts = snapshot(
        FIXED,
        [Block(0, BAD_ORDER, key=0)],
        handover=Handover(True, "", 1),
        stamps=[Block(0x1000, BAD_ORDER, key=0)],
    )
    found = status(facts)
    assert found.preserved == {(BAD_ORDER, 0): 1}
    assert found.unclaimed == {(BAD_ORDER, 0): 1}
    assert found.per_byte == 0
    assert sum("bad key" in line for line in text(facts)) == 2


def test_stamps_that_nobody_looked_for() -> None:
    handed = snapshot(FIXED, [], handover=Handover(True, "7.2.0", 1))
    assert status(replace(handed, scan=None)).unclaimed is None
    assert status(handed).unclaimed == {}
    # Without a handover there cannot be any.
    assert status(replace(snapshot(FIXED, []), scan=None)).unclaimed == {}
    assert status(replace(handed, scan=Scan(1, 0))).unclaimed == {}


def test_scratch_of_a_file_that_does_not_fit() -> None:
    facts = snapshot(FIXED, [], scratch=[(1 << 29, 1 << 24), (3 << 30, 1 << 24)])
    assert [area.free for area in status(facts).scratch] == [None, None]
    free = replace(facts, scratch_free=[16])
    assert [area.free for area in status(free).scratch] == [16 << 12, None]
    assert len(status(replace(facts, scratch_free=[1, 2, 3])).scratch) == 2


def test_subtrees_are_preserved_or_not() -> None:
    subtrees = [
        Subtree("whole", 0x100000, 8192),
        Subtree("half", 0x101000, 8192),
        Subtree("nowhere", None, 4),
        Subtree("above", 2**64 - 4096, 8192),
        Subtree("below", -4096, 8192),
        Subtree("less", 0x100000, -1),
    ]
    facts = snapshot(FIXED, [Block(0x100000, 1)])
    side = replace(facts.outgoing, fdt=replace(facts.outgoing.fdt, subtrees=subtrees))
    facts = replace(facts, outgoing=side)
    found = [preserved for _, preserved in status(facts).subtrees]
    assert found == [True, False, None, False, False, False]


def test_taint() -> None:
    assert taint_letters(0) == ""
    assert taint_letters(1 << 5 | 1 << 12) == "BO"
    assert taint_letters(1 << 19 | 1 << 20) == "J?"


# What is shown


def test_text() -> None:
    shown = text(full())
    assert max(map(len, shown)) <= 80
    words = "\n".join(shown)
    for line in (
        r"KHO         on: kho=on on the command line                          [kho_enable]",
        r"this boot   a handover from 7.2.0-test, 3 kexecs since the cold boot    [kho_in]",
        r"scratch     0x000020000000    16 MiB   50% in use                  [kho_scratch]",
        r"            0x0000c0000000    16 MiB    0% in use",
        r"offline     0x000040000000   512 MiB                               [mem_section]",
        r"NUMA nodes  0x000000000000   1.5 GiB  node 0                [struct pglist_data]",
        r"            0x000060000000   2.5 GiB  node 1",
        r"LUO ABI     luo-v5                                            [kho_out.fdt, LUO]",
        r"file ABIs   memfd-v2                                     [luo_file_handler_list]",
        r"sessions    disks: 1 file                          [luo_session_global.outgoing]",
        r"handed over guests: 2 files, retrieved             [luo_session_global.incoming]",
        r"            disks: 1 file, not retrieved",
        r"image       12 MiB, loaded by kexec_file_load, with the handover   [kexec_image]",
        r"crash image 180 MiB, loaded by kexec_file_load               [kexec_crash_image]",
        r"tainted     0x20 (B)                                              [tainted_mask]",
    ):
        assert line in words
    # Each place that is read from is named; this LUO has its sessions in its lists.
    named = {line[line.find("[") :] for line in shown}
    assert {f"[{source}]" for source in read_from(full()).values()} - named == {
        "[struct luo_session_ser]"
    }


def test_sessions_that_are_serialized() -> None:
    luo = Luo(0x7000, "luo-v5", 2, False, [LuoSession("guests", None, 2)])
    facts = full()
    assert facts.incoming is not None
    shown = text(replace(facts, incoming=replace(facts.incoming, luo=luo)))
    [line] = [line for line in shown if "guests" in line]
    assert line.split("[") == [f"{'handed over guests: 2 files':<56}", "struct luo_session_ser]"]


def test_text_when_off() -> None:
    shown = text(replace(off(), image=KexecImage(False), liveupdate=LuoState(False)))
    assert "KHO         off: the command line does not have kho=on" in "\n".join(shown)
    assert any(line.startswith("this boot   not a handover") for line in shown)
    assert any(line.startswith("LUO         off") for line in shown)
    assert any(line.startswith("scratch     none") for line in shown)
    assert any(line.startswith("tree        there is no tree") for line in shown)
    assert any(line.startswith("preserved   no blocks") for line in shown)
    assert any(line.startswith("image       none is loaded") for line in shown)
    assert not any("unclaimed" in line or "offline" in line for line in shown)


def test_an_image_that_hands_nothing_over() -> None:
    shown = text(replace(full(), image=KexecImage(True, False, 0, 4096)))
    assert any("kexec_load, without a handover: it would be" in line for line in shown)
    shown = text(replace(off(), image=KexecImage(True, True, 0, 4096)))
    assert any("kexec_file_load, without a handover" in line for line in shown)
    assert not any("lost" in line for line in shown)


def test_a_crash_kernel_that_is_handed_something() -> None:
    for image, words in (
        (KexecImage(True, True, 0x2000, 4096), "with a handover: it would die"),
        (KexecImage(False), "none is loaded"),
    ):
        shown = text(replace(full(), crash_image=image))
        at = next(i for i, line in enumerate(shown) if line.startswith("crash image"))
        assert words in " ".join(line.split("[")[0].strip() for line in shown[at : at + 2])
    shown = text(replace(full(), crash_image=None))
    assert not any(line.startswith("crash image") for line in shown)


def test_luo_that_is_not_all_decoded() -> None:
    facts = full()
    for luo, words in (
        (Luo(0x5000, "luo-v9", raw="00"), "not known: nothing of this ABI is decoded"),
        (Luo(0x5000, None, problems=["struct luo_ser cannot be read"]), "cannot be read"),
    ):
        shown = text(replace(facts, outgoing=replace(facts.outgoing, luo=luo)))
        [line] = [line for line in shown if line.startswith("sessions")]
        assert words in line


def test_many_are_cut_short() -> None:
    luo = Luo(0x5000, "luo-v5", 1, True, [LuoSession(f"s{n}", None, 1) for n in range(30)])
    facts = full()
    facts = replace(facts, outgoing=replace(facts.outgoing, luo=luo))
    assert sum("1 file" in line for line in text(facts, 5)) == 5 + 1
    assert any("25 more sessions (--limit 0 shows all)" in line for line in text(facts, 5))
    assert sum("1 file" in line for line in text(facts, None)) == 30 + 1


def test_names_cannot_steer_the_terminal() -> None:
    luo = Luo(0x5000, "luo\033[2J", 1, True, [LuoSession("\033]0;x\n" + "y" * 200, None, 1)])
    facts = full()
    facts = replace(facts, outgoing=replace(facts.outgoing, luo=luo))
    shown = text(facts)
    assert "\033" not in "".join(shown)
    assert max(map(len, shown)) <= 80


def document(facts: Snapshot, path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    store.save_file(facts, path)
    assert main(["--snapshot", str(path), "status", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(full(), tmp_path / "full", capsys)
    assert found["schema"] == "khoscope.status/1"
    assert found["kho"] == {"on": True, "why": "kho=on on the command line", "enabled": True}
    assert found["compatible"] == {
        "kho": "kho-v5",
        "kho_incoming": "kho-v5",
        "luo": "luo-v5",
        "luo_incoming": "luo-v4",
        "handlers": ["memfd-v2"],
    }
    assert found["scratch"][0] == {"phys": "0x20000000", "size": 1 << 24, "free": 1 << 23}
    assert found["offline"] == [{"phys": "0x40000000", "size": 1 << 29}]
    assert found["nodes"][1] == {"node": 1, "phys": "0x60000000", "size": 5 << 29}
    assert sum(total["blocks"] for total in found["preserved"]) == 41
    assert sum(total["blocks"] for total in found["unclaimed"]) == 3
    assert found["subtrees"][0] == {
        "name": "LUO",
        "phys": "0x5000",
        "size": 4096,
        "preserved": False,
    }
    assert found["sessions"] == [{"name": "disks", "files": 1, "retrieved": False, "unit": None}]
    assert found["sessions_incoming"][0]["retrieved"] is True
    assert found["image"] == {
        "loaded": True,
        "file_mode": True,
        "kho_fdt": "0x2000",
        "size": 12 << 20,
    }
    assert found["crash_image"] == {
        "loaded": True,
        "file_mode": True,
        "kho_fdt": "0x0",
        "size": 180 << 20,
    }
    assert found["taint"] == "B"
    assert found["read_from"] == read_from(full())


def test_json_of_what_is_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(
        replace(snapshot(PLAIN, [Block(0x1000)]), image=None), tmp_path / "bare", capsys
    )
    nothing = (
        "command_line",
        "liveupdate",
        "image",
        "crash_image",
        "sessions",
        "subtrees_incoming",
    )
    for name in nothing:
        assert found[name] is None
    assert found["compatible"]["handlers"] is None
    assert main(["--snapshot", str(tmp_path / "bare"), "status"]) == 0
    shown = capsys.readouterr().out
    assert "image       not recorded" in shown
    assert "sessions" not in shown
    store.save_file(rich(), tmp_path / "rich")
    assert main(["--snapshot", str(tmp_path / "rich"), "status"]) == 0
    assert "sessions    not recorded" in capsys.readouterr().out
    assert main(["--snapshot", str(tmp_path / "bare"), "status"]) == 0
    shown = capsys.readouterr().out
    assert "KHO         on: why is not recorded" in shown


def test_diff_compares_these_facts() -> None:
    a = full()
    b = replace(
        with_kernel(a, command_line="quiet"),
        image=KexecImage(False),
        crash_image=KexecImage(True, True, 0x2000, 1 << 20),
        liveupdate=LuoState(False),
    )
    assert diff.facts(a, a) == []
    assert {change.what: (change.a, change.b) for change in diff.facts(a, b)} == {
        "command line": ("root=/dev/vda kho=on liveupdate=on", "quiet"),
        "kexec image": ("12582912 bytes by kexec_file_load, KHO FDT 0x2000", "none"),
        "crash image": (
            "188743680 bytes by kexec_file_load, KHO FDT 0x0",
            "1048576 bytes by kexec_file_load, KHO FDT 0x2000",
        ),
        "LUO enabled": ("True", "False"),
        "LUO file handlers": ("memfd-v2", "none"),
    }
    old = replace(a, image=None, crash_image=None, liveupdate=None)
    assert {change.b for change in diff.facts(a, old)} == {"absent"}
