# SPDX-License-Identifier: LGPL-2.1-or-later
"""
How much of what is free can be pinned for long: foretold by ``khoscope scratch``, and then pinned.

Scratch is free memory in page blocks of MIGRATE_CMA. What is pinned for long must not stay there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vm.test_khoscope import host
from vm.machine import Machine

PROGRAM = Path(__file__).parent / "guest" / "pin.py"
PAGE = 4096
#: The guest's memory, and how much of it others fill with what the kernel may move, in MiB.
MEMORY, FILLED = 2048, 900


@dataclass(frozen=True)
class Pinned:
    """
    What khoscope said, what was pinned, in bytes, and how it ended.

    :param free: pages, when the kernel refused; ``free_cma`` likewise.
    """

    said: Any
    pinned: int
    end: str
    free: int
    free_cma: int


def pin(append: str) -> Pinned:
    with Machine("7.2-base", append=append, memory=MEMORY) as machine:
        machine.copy_in(PROGRAM, "/root/pin.py")
        machine.run(f"python3 pin.py fill anon {FILLED}", check=True)
        said = json.loads(host(*machine.source, "scratch", "--json"))
        report = machine.run("python3 pin.py pin touched", check=True, timeout=300)
        pinned = json.loads(report.stdout)
        log = machine.run(("dmesg",), check=True).stdout
    dump = re.search(r"\bfree:(\d+) free_pcp:\d+ free_cma:(\d+)", log)
    assert dump is not None, log
    free, free_cma = map(int, dump.groups())
    return Pinned(said, pinned["pinned"], pinned["end"], free, free_cma)


@pytest.fixture(scope="module")
def on() -> Pinned:
    return pin("")


@pytest.fixture(scope="module")
def off() -> Pinned:
    return pin("kho=off")


def test_with_scratch(on: Pinned) -> None:
    # Who pins needs memory of his own, too: more is foretold than can be pinned.
    assert on.said["pinnable"] == pytest.approx(on.pinned, rel=0.05)
    assert on.end == "SIGKILL"
    # Nearly all that was free then was scratch.
    assert on.free_cma > 0.85 * on.free
    assert on.free_cma * PAGE > 200 << 20


def test_without_scratch(off: Pinned) -> None:
    assert off.said["pinnable"] == pytest.approx(off.pinned, rel=0.05)
    assert (off.end, off.free_cma) == ("SIGKILL", 0)


def test_what_kho_off_gives_back(on: Pinned, off: Pinned) -> None:
    """With it, the same program gets what was said that it would."""
    given_back = on.said["given_back"]["kho=off"]
    assert off.pinned - on.pinned == pytest.approx(given_back, rel=0.1)
    assert off.pinned == pytest.approx(on.said["pinnable"] + given_back, rel=0.05)
