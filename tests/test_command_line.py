# SPDX-License-Identifier: LGPL-2.1-or-later
"""Command lines, taken apart as the kernel does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.facts.command_line import parameters, switched


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        (" \t ", []),
        ("quiet a=b", [("quiet", None), ("a", "b")]),
        ("a= b==c", [("a", ""), ("b", "=c")]),
        ('a="b c" d', [("a", "b c"), ("d", None)]),
        ('"a=b c" d', [("a", "b c"), ("d", None)]),
        ('a="b kho=off', [("a", "b kho=off")]),
        ('a=b" "c', [("a", 'b" "c')]),
        ("a\tb\nc", [("a", None), ("b", None), ("c", None)]),
        ("a -- b", [("a", None)]),
        ("a --b c=-- d", [("a", None), ("--b", None), ("c", "--"), ("d", None)]),
    ],
)
def test_parameters(line: str, found: list[tuple[str, str | None]]) -> None:
    assert list(parameters(line)) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kho=on", ("kho=on", True)),
        ("kho=ok kho=o kho= kho", None),
        ("kho=on kho=off", ("kho=off", False)),
        ("kho=off kho=Yes kho=maybe", ("kho=Yes", True)),
        ("kho=1 kho_scratch=0 xkho=0 KHO=0", ("kho=1", True)),
        ('kho="on"', ("kho=on", True)),
        ('"kho=off"', ("kho=off", False)),
        ('kho=on dyndbg="file a kho=off"', ("kho=on", True)),
        ("kho=off -- kho=on", ("kho=off", False)),
        ("kho=enabled", ("kho=enabled", True)),
        ("kho=Disabled", ("kho=Disabled", False)),
    ],
)
def test_switched(line: str, found: tuple[str, bool] | None) -> None:
    assert switched(line, "kho") == found


@given(st.text(alphabet='kho=nf" -\t', max_size=60))
def test_any_line(line: str) -> None:
    """It is taken apart without a word lost that has neither blanks nor quotation marks."""
    words = line.split()
    if '"' not in line and "--" not in words:
        assert [name + ("" if v is None else f"={v}") for name, v in parameters(line)] == words
    else:
        list(parameters(line))
