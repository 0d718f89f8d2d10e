# SPDX-License-Identifier: LGPL-2.1-or-later
"""Struct pages of hugetlb folios whose struct pages the kernel has given back, or not (HVO)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vm.test_khoscope import TIMEOUT
from vm.kernel import one_of_each_series, series
from vm.machine import Machine

SCRIPT = Path(__file__).parent / "guest" / "hugetlb.py"


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
    for each in (whole, optimised):
        assert each["head"]
        assert each["khoscope"] == each["drgn"]
        assert len(each["khoscope"]) == 3 * 512
        assert each["khoscope"][512]["compound"] == 9
        block = each["block"]
        refcount = block.pop("head")
        assert refcount >= 1
        assert block == {
            "zeros": 511,
            "ones": 0,
            "others": 0,
            "compound": 9,
            "unread": 0,
            "free": 0,
        }
    # Of eight pages of struct pages, one is left.
    assert (whole["given_back"], optimised["given_back"]) == (0, 7 if series(kernel) < "7" else 6)
    assert optimised["fake_heads"] == (series(kernel) == "6.18")
