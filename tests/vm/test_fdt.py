# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoscope fdt on a real kernel: what debugfs has, reserve_mem, and both sides of a kexec."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from khoscope.abi.fdt import read
from tests.vm.test_khoscope import TIMEOUT, guest, host
from vm.machine import REPOSITORY, Machine

RESERVED = 4 << 20
DEBUGFS = "/sys/kernel/debug/kho/out"
#: Whose blobs are there once the kernel is up.
NAMES = {"LUO", "kho_test", "memblock", "kexec-metadata"}


@dataclass
class Story:
    """What was seen on both sides of a kexec."""

    before: Any = None
    after: Any = None
    #: What debugfs has, by path.
    debugfs: dict[str, bytes] = field(default_factory=dict)
    #: What --raw wrote, likewise.
    raw: dict[str, bytes] = field(default_factory=dict)
    offline: Any = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""


def contents(machine: Machine, path: str) -> bytes:
    return bytes.fromhex(machine.run(f"od -An -v -tx1 {path}", check=True).stdout)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    seen = Story()
    snapshot = tmp_path_factory.mktemp("fdt") / "before.khosnap"
    with Machine("7.2-fixed", append=f"reserve_mem={RESERVED}:4096:khoscope") as machine:
        seen.before = json.loads(guest(machine, "fdt", "--json"))
        seen.blocks = json.loads(host(*machine.source, "tree", "--json"))["blocks"]
        host(*machine.source, "snapshot", str(snapshot))
        for name in ("fdt", *(f"sub_fdts/{name}" for name in sorted(NAMES))):
            seen.debugfs[name] = contents(machine, f"{DEBUGFS}/{name}")
        machine.load_kexec()
        machine.execute_kexec()
        seen.after = json.loads(host(*machine.source, "fdt", "in", "--json"))
        seen.log = machine.run("dmesg", check=True).stdout
    seen.offline = json.loads(host("--snapshot", str(snapshot), "fdt", "--json"))
    seen.raw = {name: raw(snapshot, name) for name in seen.debugfs}
    return seen


def raw(snapshot: Path, name: str) -> bytes:
    """What --raw writes, of a name as debugfs has it."""
    subtree = ["out", Path(name).name] if "/" in name else []
    command = [sys.executable, "-m", "khoscope", "--snapshot", str(snapshot), "fdt"]
    return subprocess.run(
        [*command, *subtree, "--raw"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        timeout=TIMEOUT,
    ).stdout


def subtrees(document: Any) -> dict[str, Any]:
    return {row["name"]: row for row in document["subtrees"]}


def test_blobs_are_those_of_debugfs(story: Story) -> None:
    assert subtrees(story.before).keys() == NAMES
    for name in NAMES:
        assert story.raw[f"sub_fdts/{name}"] == story.debugfs[f"sub_fdts/{name}"], name


def test_the_root_fdt_is_whole(story: Story) -> None:
    """debugfs has as many bytes of it as there were when its file was made."""
    whole, part = story.raw["fdt"], story.debugfs["fdt"]
    assert whole.startswith(part)
    tree = read(whole)
    assert tree.size == len(whole)
    assert {child.name for child in tree.root.children} == NAMES


def test_everything_is_preserved_and_known(story: Story) -> None:
    for row in (story.before["fdt"], *story.before["subtrees"]):
        assert row["preserved"] is True
        assert row["problems"] == []
        assert row["kind"] != "unknown"


def test_reserve_mem(story: Story) -> None:
    area = subtrees(story.before)["memblock"]["tree"]["nodes"]["khoscope"]["properties"]
    assert area["size"]["decoded"] == RESERVED
    start = int(area["start"]["decoded"], 16)
    pages = sum(
        block["pages"]
        for block in story.blocks
        if start <= int(block["phys"], 16) < start + RESERVED
    )
    assert pages * 4096 == RESERVED


def test_the_chain_of_kho_test(story: Story) -> None:
    (area,) = subtrees(story.before)["kho_test"]["vmallocs"]
    assert area["property"] == "/data/folios_info"
    assert area["chain"] == {
        "chunks": 1,
        "listed": area["decoded"]["total_pages"],
        "problems": [],
    }


def test_a_snapshot_says_the_same(story: Story) -> None:
    for part in ("fdt", "subtrees", "side"):
        assert story.offline[part] == story.before[part]


def test_what_was_handed_over(story: Story) -> None:
    assert "Revived memory reservation 'khoscope' from KHO" in story.log
    before, after = subtrees(story.before), subtrees(story.after)
    assert story.after["side"] == "in"
    assert story.after["fdt"]["tree"] == story.before["fdt"]["tree"]
    assert after["memblock"]["tree"] == before["memblock"]["tree"]
    assert after["kexec-metadata"]["decoded"] == before["kexec-metadata"]["decoded"]
    assert after["kexec-metadata"]["decoded"]["kexec_count"] == 1
    assert all(row["preserved"] is not False for row in after.values())
