# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scenarios on real kernels, and the parts of them that need none."""

from __future__ import annotations

import pytest

from vm.exercise import SCENARIOS, Piece
from vm.kernel import KERNELS, under_test
from vm.scenario import expected, scenario

_LINE = (
    '{"scenario":"part","piece":0,"state":"preserved","call":"kho_preserve_pages",'
    '"phys":"0x1e88000","pages":5,"order":3,"ret":0,"compound":false,"refs":%s}'
)


@pytest.mark.parametrize("kernel", under_test())
def test_each_kernel_does_what_is_known_of_it(kernel: str) -> None:
    assert scenario(kernel, []) == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_something_is_known_of_every_scenario(kernel: str) -> None:
    lacking = {"helper"} if kernel.endswith("-base") else set()
    if kernel == "6.18-base":
        lacking |= {"unpreserve"}
    assert list(expected(kernel)) == [name for name in SCENARIOS if name not in lacking]


@pytest.mark.parametrize(
    ("refs", "shape"),
    [
        ("[[1,1]]", "1"),
        ("[[1,5]]", "1/1"),
        ("[[1,1],[0,4]]", "1/0"),
        ("[[1,1],[0,3],[1,1]]", "1 0x3 1"),
        ("[[0,1],[1,4]]", "0/1"),
        ("[[1,2],[0,3]]", "1x2 0x3"),
    ],
)
def test_shape_of_reference_counts(refs: str, shape: str) -> None:
    assert Piece.parse(_LINE % refs).shape == shape


@pytest.mark.parametrize(
    ("refs", "shape"),
    [
        ("[[1,1]]", "1"),
        ("[[1,1],[0,4]]", "1/0"),
        ("[[1,5]]", "1/1 compound"),
        ("[[0,4],[1,1]]", "0x4 1 compound"),
        ("[]", ""),
    ],
)
def test_shape_of_compound_pages(refs: str, shape: str) -> None:
    line = _LINE.replace('"compound":false', '"compound":true')
    assert Piece.parse(line % refs).shape == shape


def test_ranges_of_a_piece() -> None:
    piece = Piece.parse(_LINE % "[[1,5]]")
    assert piece.ranges == ((0x1E88000, 0x1E8D000),)
    scattered = _LINE.replace('"phys":"0x1e88000"', '"phys":"0x1000","physes":["0x1000","0x5000"]')
    assert Piece.parse(scattered % "[[1,2]]").ranges == ((0x1000, 0x2000), (0x5000, 0x6000))
    unknown = _LINE.replace('"phys":"0x1e88000"', '"phys":"0x1000","physes":[]')
    assert Piece.parse(unknown % "[[1,5]]").ranges == ()
