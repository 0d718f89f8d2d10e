# SPDX-License-Identifier: LGPL-2.1-or-later
"""The root FDT: what it says, and what is wrong with it."""

from __future__ import annotations

import libfdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.fdt import parse_root_fdt
from khoscope.snapshot import Fdt, Subtree

PAGE = 4096
AT = 0x2000


def u64(value: int) -> bytes:
    """In CPU byte order, as KHO has it."""
    return value.to_bytes(8, "little")


def blob(
    root: dict[str, bytes] | None = None, subtrees: dict[str, dict[str, bytes]] | None = None
) -> bytes:
    """A root FDT as ``kho_out_fdt_setup`` and ``kho_add_subtree`` make it, one page."""
    if root is None:
        root = {"compatible": b"kho-v4\0", "preserved-memory-map": u64(0x12345000)}
    fdt = libfdt.FdtSw()
    fdt.finish_reservemap()
    with fdt.add_node(""):
        for name, value in root.items():
            fdt.property(name, value)
        for child, properties in (subtrees or {}).items():
            with fdt.add_node(child):
                for name, value in properties.items():
                    fdt.property(name, value)
    raw = bytes(fdt.as_fdt().as_bytearray())
    return raw.ljust(PAGE, b"\0")


def data(phys: int, size: int) -> dict[str, bytes]:
    return {"preserved-data": u64(phys), "blob-size": u64(size)}


GOOD = blob(subtrees={"LUO": data(0x9000, 4096), "kexec-metadata": data(0xA000, 73)})


def test_good() -> None:
    subtrees = [Subtree("LUO", 0x9000, 4096), Subtree("kexec-metadata", 0xA000, 73)]
    assert parse_root_fdt(AT, GOOD) == Fdt(AT, "kho-v4", 0x12345000, subtrees, [])


def test_no_subtrees() -> None:
    assert parse_root_fdt(AT, blob()) == Fdt(AT, "kho-v4", 0x12345000, [], [])


def test_values_are_not_big_endian() -> None:
    found = parse_root_fdt(AT, blob(subtrees={"LUO": data(1, 2 << 40)}))
    assert found.subtrees == [Subtree("LUO", 1, 2 << 40)]


@pytest.mark.parametrize(
    ("root", "compatible", "memory_map", "problems"),
    [
        ({}, None, None, ["no compatible", "no preserved-memory-map"]),
        ({"compatible": b"kho-v9\0"}, "kho-v9", None, ["no preserved-memory-map"]),
        ({"preserved-memory-map": u64(0x1000)}, None, 0x1000, ["no compatible"]),
        (
            {"compatible": b"kho-v4\0", "preserved-memory-map": bytes(4)},
            "kho-v4",
            None,
            ["preserved-memory-map has 4 bytes, not 8"],
        ),
        (
            {"compatible": b"\xff\x00x\0", "preserved-memory-map": b""},
            "\\xff\0x",
            None,
            ["preserved-memory-map has 0 bytes, not 8"],
        ),
    ],
)
def test_root_properties(
    root: dict[str, bytes], compatible: str | None, memory_map: int | None, problems: list[str]
) -> None:
    assert parse_root_fdt(AT, blob(root)) == Fdt(AT, compatible, memory_map, [], problems)


def test_subtree_properties() -> None:
    found = parse_root_fdt(
        AT,
        blob(
            subtrees={
                "empty": {},
                "short": {"preserved-data": bytes(3), "blob-size": u64(5)},
                "long": {"preserved-data": u64(4), "blob-size": bytes(9)},
                "good": data(1, 2),
            }
        ),
    )
    assert sorted(found.subtrees, key=lambda s: s.name) == [
        Subtree("empty", None, None),
        Subtree("good", 1, 2),
        Subtree("long", 4, None),
        Subtree("short", None, 5),
    ]
    assert sorted(found.problems) == [
        "subtree 'empty': no blob-size",
        "subtree 'empty': no preserved-data",
        "subtree 'long': blob-size has 9 bytes, not 8",
        "subtree 'short': preserved-data has 3 bytes, not 8",
    ]


def test_not_readable() -> None:
    assert parse_root_fdt(AT, None) == Fdt(AT, problems=["its page cannot be read"])


@pytest.mark.parametrize("raw", [b"", b"\xd0\x0d\xfe\xed", bytes(39), bytes(PAGE), b"\xff" * PAGE])
def test_no_fdt_at_all(raw: bytes) -> None:
    found = parse_root_fdt(AT, raw)
    assert (found.compatible, found.memory_map, found.subtrees) == (None, None, [])
    assert len(found.problems) == 1
    assert found.problems[0].startswith("not a readable FDT (")


def test_truncated() -> None:
    size = int.from_bytes(GOOD[4:8], "big")
    for length in range(size):
        found = parse_root_fdt(AT, GOOD[:length])
        assert found.problems, length
        assert found.memory_map is None


def test_node_name_that_is_no_text() -> None:
    raw = blob(subtrees={"LUO": data(1, 2)}).replace(b"LUO\0", b"L\xffO\0")
    found = parse_root_fdt(AT, raw)
    assert found.subtrees == [Subtree("L\\xffO", 1, 2)]
    assert found.problems == ["node 'L\\\\xffO': its name is not ASCII"]


def is_told(found: Fdt) -> bool:
    """Whatever is not there is a problem that was told."""
    whole = found.compatible is not None and found.memory_map is not None
    whole = whole and all(None not in (s.phys, s.size) for s in found.subtrees)
    return whole or bool(found.problems)


@given(st.binary(max_size=200))
def test_garbage(raw: bytes) -> None:
    found = parse_root_fdt(AT, raw)
    assert found.phys == AT
    assert found.problems


@given(
    st.lists(
        st.tuples(st.integers(0, int.from_bytes(GOOD[4:8], "big") - 1), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    )
)
def test_damaged(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(GOOD)
    for at, value in changes:
        raw[at] = value
    assert is_told(parse_root_fdt(AT, bytes(raw)))


@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_damaged_header(field: int, value: int) -> None:
    """The header's fields say where everything is."""
    raw = bytearray(GOOD)
    raw[4 * field : 4 * field + 4] = value.to_bytes(4, "big")
    assert is_told(parse_root_fdt(AT, bytes(raw)))
