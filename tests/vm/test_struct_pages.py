# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Struct pages of hugetlb folios whose struct pages the kernel has given back, or not (HVO).

No kernel hands over such a folio by itself: memfds of huge pages are refused by LUO.  A driver that
pins one and calls kho_preserve_folio() does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vm.test_khoscope import TIMEOUT, guest
from tests.vm.test_rules import of
from vm.exercise import Exercise
from vm.job import Job
from vm.kernel import one_of_each_series, series
from vm.machine import Machine
from vm.trace import Trace

_GUEST = Path(__file__).parent / "guest"
SCRIPT, HOLD, CRIPPLED = (_GUEST / f"{name}.py" for name in ("hugetlb", "hold_hugetlb", "crippled"))
#: Bytes of the folios, with their orders.
SIZES = {9: 2 << 20, 18: 1 << 30}
#: Scratch is of no use for what the command line reserves, and would be twice as large as that.
HUGE = (
    "hugetlb_free_vmemmap=on hugepagesz=2M hugepages=1 hugepagesz=1G hugepages=1"
    " kho_scratch=64M,256M,256M"
)
OWN = 64
#: What LUO says of a memfd of huge pages: no handler takes it.
REFUSED = """
import errno, os
from khoscope.carry.liveupdate import LiveUpdate
memfd = os.memfd_create("huge", os.MFD_HUGETLB)
os.ftruncate(memfd, 2 << 20)
with LiveUpdate() as luo, luo.create_session("huge") as session:
    try:
        session.preserve_fd(memfd, 1)
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("kernel", one_of_each_series())
def test_hugetlb_folios_are_read_as_drgn_reads_them(kernel: str) -> None:
    with Machine(kernel) as machine:
        said = machine.run(
            "PYTHONPATH=/khoscope python3 -",
            input=SCRIPT.read_bytes(),
            timeout=TIMEOUT,
            check=True,
        ).stdout
    whole, optimised = map(json.loads, said.splitlines())
    # What tails share is not counted: the rest of the first page of struct pages is left.
    for each, own in ((whole, 511), (optimised, 63)):
        assert each["head"]
        assert each["khoscope"] == each["drgn"]
        assert len(each["khoscope"]) == 3 * 512
        assert each["khoscope"][512]["compound"] == 9
        block = each["block"]
        refcount = block.pop("head")
        assert refcount >= 1
        assert block == {
            "zeros": own,
            "ones": 0,
            "others": 0,
            "compound": 9,
            "unread": 0,
            "free": 0,
        }
    # Of eight pages of struct pages, one is left.
    assert (whole["given_back"], optimised["given_back"]) == (0, 7 if series(kernel) < "7" else 6)
    assert optimised["fake_heads"] == (series(kernel) == "6.18")


def test_optimised_folios_are_handed_over(tmp_path: Path) -> None:
    snapshot = tmp_path / "before.khosnap"
    with Machine("7.2-fixed", append=HUGE, memory=5120) as machine:
        exercise = Exercise(machine)
        exercise.load()
        machine.copy_in(HOLD, "/root/hold.py")
        words = ("python3", "/root/hold.py", *map(str, SIZES.values()))
        holder = Job(machine, "/root/hold", words)
        holder.until_on(TIMEOUT)
        at = dict(zip(SIZES, map(int, holder.output().split()), strict=True))
        with Trace(machine, "preserving", "--json", "--check") as trace:
            for phys in at.values():
                exercise.preserve("folio-at", phys)
        preserving, preserved = json.loads(trace.output()), trace.status
        assert [(p.ret, p.pages) for p in exercise.report()] == [(0, 1 << order) for order in SIZES]

        script = ("env", "PYTHONPATH=/khoscope", "python3", "-c", REFUSED)
        refused = machine.run(script, timeout=TIMEOUT, check=True).stdout.strip()
        before = json.loads(guest(machine, "verify", "--json"))["findings"]
        guest(machine, "snapshot", "/root/before.khosnap")
        machine.copy_out("/root/before.khosnap", snapshot)
        look = {order: _runs(machine, "--live", at[order], order) for order in SIZES}
        kept = {
            order: _runs(machine, "--snapshot /root/before.khosnap", at[order], order)
            for order in SIZES
        }
        machine.load_kexec()
        machine.execute_kexec()
        exercise.load()
        machine.copy_in(CRIPPLED, "/root/crippled.py")
        crippled = ("env", "PYTHONPATH=/khoscope", "python3", "/root/crippled.py", "trace")
        with Trace(machine, "restoring", "--json", "--check", command=crippled) as trace:
            exercise.restore("folio-at")
        restoring, status = json.loads(trace.output()), trace.status
        machine.copy_in(snapshot, "/root/before.khosnap")
        after = json.loads(guest(machine, "verify", "--before", "/root/before.khosnap", "--json"))
        restored = {order: _runs(machine, "--live", at[order], order) for order in SIZES}

    # Shared struct pages say nothing. Else each page of 1 GiB is looked at; where loops must
    # be short, some of all parts of it.
    assert _looked(preserving, at) == {order: (OWN - 1, 1 << order) for order in SIZES}
    assert (preserving["losses"]["sampled"], preserving["verdict"], preserved) == (0, "pass", 0)
    assert _looked(restoring, at) == {9: (511, 512), 18: (1023, 1024)}
    assert (restoring["losses"]["sampled"], restoring["verdict"], status) == (1, "incomplete", 3)

    assert refused == "ENOENT"
    pages = sum(1 << order for order in SIZES)
    shared = pages - OWN * len(SIZES)
    said = f"2 folios ({pages:,} pages, {shared:,} tail struct pages shared by HVO)"
    [folios] = of(before, "needs-folio-restore")
    assert folios["message"].startswith(said)
    for order in SIZES:
        rows = [("read", 1), ("read", OWN - 1), ("shared", (1 << order) - OWN)]
        assert look[order] == rows
        assert kept[order] == [rows[0], ("refcount", OWN - 1), rows[2]]
        # The next kernel has a struct page for each, and no hugetlb folio.
        assert restored[order] == [("read", 1), ("read", (1 << order) - 1)]
    assert after["verdict"] == "pass"
    found = {f.get("phys") for f in after["findings"]}
    assert not found & {f"{phys:#x}" for phys in at.values()}


def _looked(trace: dict[str, Any], at: dict[int, int]) -> dict[int, tuple[int, int]]:
    """By order, how many tails have refcount 0, and how many pages were looked at."""
    orders = {f"{phys:#x}": order for order, phys in at.items()}
    return {
        orders[block["phys"]]: (block["refcounts"]["zeros"], block["refcounts"]["looked"])
        for call in trace["calls"]
        for block in call["blocks"]
        if block["phys"] in orders
    }


def _runs(machine: Machine, source: str, phys: int, order: int) -> list[tuple[str, int]]:
    """How much is known of the pages of a folio, run by run."""
    span = f"{phys:#x}..{phys + SIZES[order]:#x}"
    found = json.loads(guest(machine, *source.split(), "pages", span, "--json"))
    return [(run["seen"], run["pages"]) for run in found["runs"]]
