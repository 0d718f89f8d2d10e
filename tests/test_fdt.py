# SPDX-License-Identifier: LGPL-2.1-or-later
"""The root FDT: what it says, and what is wrong with it."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Final

import libfdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.fdt import PROBLEMS_KEPT, Node, Unreadable, read
from khoscope.abi.kho_fdt import Fdt, Subtree, kho_test_folios, parse_root_fdt, reserve_mem_areas
from tests.fuzz import fuzz

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


@fuzz
@given(st.binary(max_size=200))
def test_garbage(raw: bytes) -> None:
    found = parse_root_fdt(AT, raw)
    assert found.phys == AT
    assert found.problems


@fuzz
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


@fuzz
@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_damaged_header(field: int, value: int) -> None:
    """The header's fields say where everything is."""
    raw = bytearray(GOOD)
    raw[4 * field : 4 * field + 4] = value.to_bytes(4, "big")
    assert is_told(parse_root_fdt(AT, bytes(raw)))


def test_two_subtrees_of_a_name() -> None:
    raw = blob(subtrees={"LUO": data(1, 2), "LUX": data(3, 4)}).replace(b"LUX\0", b"LUO\0")
    found = parse_root_fdt(AT, raw)
    assert [each.name for each in found.subtrees] == ["LUO", "LUO"]
    assert found.problems == ["node '/LUO' is there 2 times"]


# Any FDT

BEGIN_NODE, END_NODE, PROP, NOP, END = (struct.pack(">I", tag) for tag in (1, 2, 3, 4, 9))
ROOT: Final = BEGIN_NODE + bytes(4)


def encode(structure: bytes, strings: bytes = b"", version: int = 17) -> bytes:
    """An FDT with the structure block as it is given, closed."""
    structure += END_NODE + END
    at = 40 + 16
    header = (
        0xD00DFEED,
        at + len(structure) + len(strings),
        at,
        at + len(structure),
        40,
        version,
        16,
        0,
        len(strings),
        len(structure),
    )
    return struct.pack(">10I", *header) + bytes(16) + structure + strings


def prop(name: int, value: bytes = b"") -> bytes:
    """:param name: its offset in the strings."""
    return PROP + struct.pack(">II", len(value), name) + value + bytes(-len(value) % 4)


def nodes(root: Node) -> Iterator[Node]:
    yield root
    for child in root.children:
        yield from nodes(child)


def test_offsets_are_those_of_the_values() -> None:
    raw = encode(ROOT + prop(0, b"one") + NOP + prop(2) + prop(2, b"four!"), b"a\0b\0")
    tree = read(raw)
    assert [(p.name, p.value) for p in tree.root.properties] == [
        ("a", b"one"),
        ("b", b""),
        ("b", b"four!"),
    ]
    for each in tree.root.properties:
        assert raw[each.offset : each.offset + len(each.value)] == each.value
    assert tree.root.property("b") == tree.root.properties[1]
    assert tree.problems == ["property '/b' is there 2 times"]
    assert tree.size == len(raw)
    assert read(raw + b"more") == tree


def test_what_is_nested_too_deep() -> None:
    """libfdt follows any depth; recursion and indentation do not."""
    deep = 87_000
    tree = read(encode(ROOT + (BEGIN_NODE + b"a\0\0\0") * deep + END_NODE * deep))
    assert len(list(nodes(tree.root))) == 64
    assert tree.problems == [f"{deep - 63:,} nodes below the 64th level are left out"]


def test_a_mebibyte_of_nodes() -> None:
    many = 87_000
    tree = read(encode(ROOT + (BEGIN_NODE + b"a\0\0\0" + END_NODE) * many))
    assert len(tree.root.children) == many
    assert tree.problems == [f"node '/a' is there {many} times"]


def test_more_than_a_mebibyte() -> None:
    with pytest.raises(Unreadable, match="it says to have 1,200,072 bytes"):
        read(encode(ROOT + (BEGIN_NODE + b"a\0\0\0" + END_NODE) * 100_000))


def test_an_old_version() -> None:
    with pytest.raises(Unreadable, match="version 16, kernels write 17"):
        read(encode(ROOT, version=16))


def test_long_names() -> None:
    """Properties share their names: the tree would be much larger than the FDT."""
    name = b"n" * (1 << 19)
    raw = encode(
        ROOT + prop(0) * 40_000 + BEGIN_NODE + name[:1000] + bytes(4) + END_NODE, name + b"\0"
    )
    tree = read(raw)
    assert {each.name for each in tree.root.properties} == {"n" * 255}
    assert [child.name for child in tree.root.children] == ["n" * 255]
    assert "the name of a property has more than 255 bytes: cut" in tree.problems
    assert "the name of a node has more than 255 bytes: cut" in tree.problems
    limit = encode(ROOT + prop(0), name[:255] + b"\0")
    assert read(limit).problems == []


def test_property_name_that_is_no_text() -> None:
    tree = read(encode(ROOT + prop(0, b"x"), b"\xfe\xff\0"))
    assert [each.name for each in tree.root.properties] == ["\\xfe\\xff"]
    assert tree.problems == ["property '\\\\xfe\\\\xff': its name is not ASCII"]


SOME = encode(
    ROOT + prop(0, b"one") + BEGIN_NODE + b"x\0\0\0" + prop(2, u64(5)) + END_NODE + NOP,
    b"a\0b\0",
)


@given(
    st.lists(st.tuples(st.integers(0, len(SOME) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 8),
)
def test_any_damaged_fdt(changes: list[tuple[int, int]], missing: int) -> None:
    """Either it is no FDT, or all of it lies within the bytes."""
    raw = bytearray(SOME)
    for at, value in changes:
        raw[at] = value
    raw = raw[: len(raw) - missing]
    try:
        tree = read(bytes(raw))
    except Unreadable:
        return
    assert tree.size <= len(raw)
    for node in nodes(tree.root):
        for each in node.properties:
            assert raw[each.offset : each.offset + len(each.value)] == each.value


@pytest.mark.parametrize("structure", [END, NOP + END, NOP * 3 + ROOT + END_NODE + END])
def test_no_root_node(structure: bytes) -> None:
    """libfdt takes the first two for whole, and finds no root in any of them."""
    raw = bytearray(encode(ROOT + NOP * len(structure)))
    raw[56 : 56 + len(structure)] = structure
    with pytest.raises(Unreadable, match="no root node"):
        read(bytes(raw))
    found = parse_root_fdt(AT, bytes(raw))
    assert found.problems == ["not a readable FDT (no root node)"]
    assert kho_test_folios({"subtree kho_test": bytes(raw)}) is None


def test_problems_are_not_as_many_as_nodes() -> None:
    """Each has its path, which may be long."""
    twice = b"".join(BEGIN_NODE + b"%07d\0" % n + prop(0) * 2 + END_NODE for n in range(18_000))
    deep = (BEGIN_NODE + b"n" * 251 + bytes(1)) * 60
    tree = read(encode(ROOT + deep + twice + END_NODE * 60, b"a\0"))
    assert len(tree.problems) == PROBLEMS_KEPT + 1
    assert tree.problems[-1] == f"{18_000 - PROBLEMS_KEPT:,} more problems like these"


def test_the_worst_of_a_mebibyte() -> None:
    """Half of it is one name, which all properties have: nobody looks for the end of each."""
    raw = encode(ROOT + prop(0) * 43_000, b"n" * (1 << 19) + b"\0")
    start = time.process_time()
    read(raw)
    assert time.process_time() - start < 5


#: What stands at offsets in an FDT: tags, sizes and offsets, sane and not.
_WORDS = st.sampled_from([0, 1, 2, 3, 4, 9, 40, 56, PAGE, 2**31 - 1, 2**31, 2**32 - 1])
_VALID = st.sampled_from([GOOD, SOME, blob({}), encode(ROOT + prop(0), b"a\0")])


@fuzz
@given(_VALID, st.lists(st.tuples(st.integers(0, 75), _WORDS | st.integers(0, 400)), max_size=5))
def test_words_of_a_valid_fdt_changed(raw: bytes, changes: list[tuple[int, int]]) -> None:
    """Nothing is raised but that it is none, and all of it lies within the bytes."""
    data = bytearray(raw)
    for at, word in changes:
        if 4 * at + 4 <= len(data):
            struct.pack_into(">I", data, 4 * at, word)
    try:
        tree = read(bytes(data))
    except Unreadable:
        return
    every = list(nodes(tree.root))
    assert len(every) <= len(data) // 12
    assert sum(len(p.value) for node in every for p in node.properties) <= len(data)


# What known subtrees lead to

DESC = u64(0x7000) + (5).to_bytes(4, "little") + b"\1\0\0\0"


def kho_test(data: dict[str, bytes], compatible: bytes = b"kho-test-v1\0") -> dict[str, bytes]:
    return {"subtree kho_test": blob({"compatible": compatible}, {"data": data})}


def test_kho_test_folios() -> None:
    blobs = kho_test({"nr_folios": b"\3\0\0\0", "folios_info": DESC})
    found = kho_test_folios(blobs)
    assert found is not None
    desc, offset, count = found
    assert (desc["first"], desc["total_pages"], desc["flags"], desc["order"]) == (0x7000, 5, 1, 0)
    assert blobs["subtree kho_test"][offset : offset + 16] == DESC
    assert count == 3


@pytest.mark.parametrize(
    "blobs",
    [
        {},
        {"subtree kho_test": b"\xd0\x0d\xfe\xed"},
        {"subtree kho_test": blob({"compatible": b"kho-test-v1\0"})},
        kho_test({"nr_folios": b"\3\0\0\0"}),
        kho_test({"folios_info": DESC}),
        kho_test({"nr_folios": b"\3\0\0\0", "folios_info": DESC[:-1]}),
        kho_test({"nr_folios": b"\3\0\0\0", "folios_info": DESC}, b"kho-test-v2\0"),
    ],
)
def test_no_kho_test_folios(blobs: dict[str, bytes]) -> None:
    assert kho_test_folios(blobs) is None


def test_reserve_mem_areas() -> None:
    areas = {
        "one": {"start": u64(0x1000), "size": u64(0x2000)},
        "empty": {"start": u64(0x1000), "size": u64(0)},
        "odd": {"start": u64(0x1000), "size": bytes(7)},
        "none": {},
    }
    raw = blob({"compatible": b"memblock-v1\0"}, areas)
    assert reserve_mem_areas({"subtree memblock": raw}) == [("one", 0x1000, 0x2000)]
    assert reserve_mem_areas({"subtree memblock": raw[:50]}) == []
    assert reserve_mem_areas({}) == []
