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
PAGE, HUGE = 4096, 2 << 20
#: The guest's memory, and how much of it others fill with what the kernel may move, in MiB.
MEMORY, FILLED = 2048, 900
#: As many as leave the guest some 70 MiB, and scratch as much.
HUGE_PAGES = 855


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
    hugetlb: Hugetlb


@dataclass(frozen=True)
class Hugetlb:
    """
    The same with huge pages of hugetlb.

    :param pool: bytes of all of them.
    :param in_scratch: of these, bytes in scratch, as khoscope says.
    """

    pool: int
    in_scratch: int
    pinned: int
    end: str


def pin(append: str) -> Pinned:
    with Machine("7.2-base", append=append, memory=MEMORY) as machine:
        machine.copy_in(PROGRAM, "/root/pin.py")
        filled = machine.run(f"python3 pin.py fill anon {FILLED}", check=True).stdout
        said = json.loads(host(*machine.source, "scratch", "--json"))
        report = machine.run("python3 pin.py pin touched", check=True, timeout=300)
        pinned = json.loads(report.stdout)
        log = machine.run(("dmesg",), check=True).stdout
        machine.run(f"kill -KILL {filled.split()[-1]}", check=True)
        hugetlb = pin_hugetlb(machine)
    dump = re.search(r"\bfree:(\d+) free_pcp:\d+ free_cma:(\d+)", log)
    assert dump is not None, log
    free, free_cma = map(int, dump.groups())
    return Pinned(said, pinned["pinned"], pinned["end"], free, free_cma, hugetlb)


def pin_hugetlb(machine: Machine) -> Hugetlb:
    pages = machine.run(
        "echo 3 >/proc/sys/vm/drop_caches; "
        f"echo {HUGE_PAGES} >/proc/sys/vm/nr_hugepages; cat /proc/sys/vm/nr_hugepages",
        check=True,
        timeout=120,
    )
    said = json.loads(host(*machine.source, "scratch", "--json"))
    report = machine.run("python3 pin.py pin touched hugetlb", check=True, timeout=300)
    pinned = json.loads(report.stdout)
    in_scratch = sum(area["pages"].get("hugetlb", 0) for area in said["areas"]) * PAGE
    return Hugetlb(int(pages.stdout) * HUGE, in_scratch, pinned["pinned"], pinned["end"])


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
    given_back = on.said["given_back"]["kho_off"]
    assert off.pinned - on.pinned == pytest.approx(given_back, rel=0.1)
    assert off.pinned == pytest.approx(on.said["pinnable"] + given_back, rel=0.05)


def test_huge_pages_in_scratch_cannot_be_pinned(on: Pinned, off: Pinned) -> None:
    """The kernel refuses one as soon as it has no other one to move it to."""
    assert on.hugetlb.end == "ENOMEM"
    assert on.hugetlb.in_scratch > 64 << 20
    assert on.hugetlb.pinned < on.hugetlb.pool
    assert (off.hugetlb.end, off.hugetlb.in_scratch) == ("nothing", 0)
    assert off.hugetlb.pinned == off.hugetlb.pool
