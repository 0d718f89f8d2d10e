# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Any radix tree, from the host: KHO's own by name and address, and one of a module's whose keys are
no blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.test_khoscope import host, khoscope
from vm.exercise import Exercise
from vm.kernel import series, under_test
from vm.machine import Machine

#: What stands for nothing that the page allocator could know of: no order bit, or too many pages.
KEYS = [0x0, 0x7, 0x1234_5678, 0xABC_DEF0_1234, 0x1F_FFFF_FFFF_FFFF]


@pytest.fixture(scope="module", params=[n for n in under_test() if n.endswith("-fixed")])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(request.param) as machine:
        exercise = Exercise(machine)
        exercise.load()
        exercise.preserve("contig")
        yield machine


def tree(machine: Machine, *words: str) -> Any:
    return json.loads(host(*machine.source, "tree", "--json", *words))


def refused(machine: Machine, said: str, *words: str) -> None:
    result = khoscope(*machine.source, "tree", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_khos_own_by_name_and_address(machine: Machine) -> None:
    own = tree(machine)
    named = tree(machine, "--root", "kho_out.radix_tree")
    assert named["tree"] == "kho_out.radix_tree"
    by_address = tree(machine, "--root", own["root"])
    for found in (named, by_address):
        for part in ("root", "totals", "blocks", "bad_entries"):
            assert found[part] == own[part], part
    raw = tree(machine, "--root", "kho_out.radix_tree", "--raw-keys")
    assert [row["key"] for row in raw["keys"]] == [block["key"] for block in own["blocks"]]
    assert "totals" not in raw
    assert "blocks" not in raw


def test_keys_that_are_no_blocks(machine: Machine) -> None:
    """Kernels that take bare keys; on the others the module has no such tree, and it is said."""
    where = ("--root", "kho_exercise_keys", "--raw-keys")
    if series(machine.kernel.name) == "7.2":
        refused(machine, "kho_exercise_keys", *where)
        return
    for key in KEYS:
        machine.run(f"echo {key:#x} > /sys/kernel/debug/kho_exercise/keys", check=True)
    found = tree(machine, *where)
    assert [int(row["key"], 16) for row in found["keys"]] == KEYS
    assert found["bad_entries"] == 0
    lines = host(*machine.source, "tree", "--jsonl", *where).splitlines()
    assert [int(json.loads(line)["key"], 16) for line in lines] == KEYS
    text = host(*machine.source, "tree", *where)
    assert "5 keys" in text
    assert "0x00000abcdef01234" in text
    # What KHO hands over is as it was.
    host(*machine.source, "verify")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--root", "kho_out"], "not a struct kho_radix_tree"),
        (["--root", "no_such_symbol"], "no_such_symbol"),
        (["--root", "kho_out.nothing"], "no member"),
        (["--root", "0xffffffffffffff00"], "cannot be read"),
        (["--root", "kho_out.radix_tree", "--incoming"], "two trees"),
        (["--raw-keys", "--order", "3"], "raw keys"),
    ],
)
def test_what_is_no_tree(machine: Machine, words: list[str], said: str) -> None:
    refused(machine, said, *words)
