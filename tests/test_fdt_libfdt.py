# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our reader of FDTs against libfdt: the same tree, or refused for the same reason."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import libfdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope import demo
from khoscope.abi.fdt import MAGIC, Node, Property, Unreadable, read
from khoscope.facts import store
from tests.fuzz import fuzz
from tests.test_fdt import BEGIN_NODE, END_NODE, NOP, PROP, ROOT, encode, prop

REPOSITORY: Final = Path(__file__).parent.parent

#: A node by libfdt: its level, its name, and names, values and offsets of its properties.
Row = tuple[int, bytes, list[tuple[bytes, bytes, int]]]

#: What libfdt reads and we refuse: other versions keep names elsewhere, its checks of a large FDT
#: take minutes, and it takes an FDT without a root for whole.
OURS: Final = ("version ", "it says to have ", "no root node")


def libfdt_rows(blob: bytes) -> tuple[list[Row], list[tuple[int, int]]]:
    """
    All nodes in their order, and the memory reservations.

    :raises libfdt.FdtException: if it is no FDT.
    """
    fdt = libfdt.FdtRo(blob)
    libfdt.check_err(libfdt.fdt_check_full(fdt.as_bytearray(), len(blob)))
    rows = []
    at, depth = 0, 0
    while depth >= 0:
        name = fdt.get_name(at).encode("utf-8", "surrogateescape")
        rows.append((depth, name, list(libfdt_properties(fdt, blob, at))))
        at, depth = libfdt.fdt_next_node(fdt.as_bytearray(), at, depth)
    return rows, [tuple(fdt.get_mem_rsv(i)) for i in range(fdt.num_mem_rsv())]


def libfdt_properties(
    fdt: libfdt.FdtRo, blob: bytes, node: int
) -> Iterator[tuple[bytes, bytes, int]]:
    at = fdt.first_property_offset(node, [libfdt.FDT_ERR_NOTFOUND])
    while at >= 0:
        # The binding raises UnicodeDecodeError for a name that is not UTF-8.
        start = fdt.off_dt_struct() + at
        _, length, offset = struct.unpack_from(">III", blob, start)
        name = blob[fdt.off_dt_strings() + offset :].partition(b"\0")[0]
        yield name, blob[start + 12 : start + 12 + length], start + 12
        at = fdt.next_property_offset(at, [libfdt.FDT_ERR_NOTFOUND])


def tree_of(rows: list[Row]) -> Node:
    """The tree as we keep it: names cut and escaped, and nothing below the 64th level."""

    def text(name: bytes) -> str:
        return name[:255].decode("ascii", "backslashreplace")

    way: list[Node] = []
    for depth, name, properties in rows:
        if depth >= 64:
            continue
        node = Node(text(name), [Property(text(n), value, at) for n, value, at in properties])
        del way[depth:]
        if way:
            way[-1].children.append(node)
        way.append(node)
    return way[0]


def agrees(blob: bytes) -> bool:
    """:return: whether it is an FDT, to both."""
    try:
        tree = read(blob)
    except Unreadable as error:
        reason = str(error)
    else:
        rows, reserved = libfdt_rows(blob)
        assert tree.root == tree_of(rows)
        assert tree.reserved == reserved
        assert tree.size == libfdt.FdtRo(blob).totalsize()
        return True
    # The binding reads a whole header without asking whether there is one.
    if len(blob) >= 40 and not reason.startswith(OURS):
        with pytest.raises(libfdt.FdtException) as refused:
            libfdt_rows(blob)
        assert libfdt.strerror(refused.value.err) == reason
    return False


def whole(blob: bytes) -> bytes:
    """Without what comes after it."""
    return blob[: libfdt.FdtRo(blob).totalsize()]


def recorded() -> Iterator[bytes]:
    """The FDTs of the demo's snapshots."""
    for scene in demo.SCENES:
        facts = store.load_file(demo.path(scene.name))
        for side in (facts.outgoing, facts.incoming):
            blobs = side.blobs.values() if side else ()
            yield from (whole(blob) for blob in blobs if blob.startswith(MAGIC))


RECORDED: Final = sorted(set(recorded()))

_NAMES = st.text("abz-_,.@019", min_size=1, max_size=12)
_PROPERTIES = st.lists(st.builds(Property, _NAMES, st.binary(max_size=20), st.just(0)), max_size=4)
_NODES = st.recursive(
    st.builds(Node, _NAMES, _PROPERTIES),
    lambda nodes: st.builds(Node, _NAMES, _PROPERTIES, st.lists(nodes, max_size=4)),
    max_leaves=12,
)
_U64 = st.integers(0, 2**64 - 1)


@st.composite
def built(draw: st.DrawFn) -> bytes:
    """What libfdt builds."""
    fdt = libfdt.FdtSw(1 << 16)
    for address, size in draw(st.lists(st.tuples(_U64, _U64), max_size=3)):
        fdt.add_reservemap_entry(address, size)
    fdt.finish_reservemap()

    def add(node: Node, name: str) -> None:
        with fdt.add_node(name):
            for each in node.properties:
                fdt.property(each.name, each.value)
            for child in node.children:
                add(child, child.name)

    add(draw(_NODES), "")
    return whole(bytes(fdt.as_fdt().as_bytearray()))


#: NOPs, names that share bytes, and a property after the children of its node.
ODD: Final = encode(
    ROOT
    + NOP
    + prop(0, b"abc")
    + prop(1)
    + BEGIN_NODE
    + b"x\xff\0\0"
    + NOP
    + prop(3, b"x")
    + END_NODE
    + prop(3, bytes(8)),
    b"ab\0c\0",
)

#: Tags, sizes and offsets, sane and not.
_WORDS = st.sampled_from([0, 1, 2, 3, 4, 9, 16, 17, 40, 2**31 - 1, 2**31, 2**32 - 1])
_WORDS |= st.integers(0, 600)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Some of the bytes of an FDT changed, left out, or there once more."""
    raw = bytearray(draw(st.sampled_from([*RECORDED, ODD]) | built()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        how = draw(st.sampled_from(["header", "word", "byte", "left out", "again", "cut"]))
        if how == "header":
            struct.pack_into(">I", raw, 4 * (at % 10), draw(_WORDS))
        elif how == "word":
            raw[at & ~3 : (at & ~3) + 4] = struct.pack(">I", draw(_WORDS))
        elif how == "byte":
            raw[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "left out":
            del raw[at & ~3 : (at & ~3) + 4 * draw(st.integers(1, 5))]
        elif how == "again":
            raw[at & ~3 : at & ~3] = raw[at & ~3 :][: 4 * draw(st.integers(1, 5))]
        else:
            del raw[at:]
        raw += bytes(max(0, 40 - len(raw)))
    return bytes(raw)


def test_the_demo_has_fdts() -> None:
    assert len(RECORDED) >= 4
    assert all(map(agrees, RECORDED))
    assert agrees(ODD)


@given(built())
def test_what_libfdt_builds(blob: bytes) -> None:
    assert agrees(blob)


@fuzz
@given(mutated())
def test_mutants(blob: bytes) -> None:
    agrees(blob)


@fuzz
@given(st.lists(_WORDS, max_size=24), st.binary(max_size=9))
def test_any_structure(words: list[int], strings: bytes) -> None:
    agrees(encode(b"".join(struct.pack(">I", word) for word in words), strings))


@pytest.mark.parametrize(
    ("structure", "strings", "reason"),
    [
        (b"", b"", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + BEGIN_NODE + b"x\0\0\0", b"", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + END_NODE + ROOT, b"", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + END_NODE + NOP, b"", "FDT_ERR_BADSTRUCTURE"),
        (BEGIN_NODE + b"x\0\0\0", b"", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + bytes(4), b"", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + BEGIN_NODE + b"x" * 8, b"", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + prop(0)[:-4] + b"\xff" * 4, b"a\0", "FDT_ERR_BADOFFSET"),
        (ROOT + prop(2), b"a\0", "FDT_ERR_BADOFFSET"),
        (ROOT + prop(2), b"a\0b", "FDT_ERR_TRUNCATED"),
        (ROOT + PROP + struct.pack(">II", 9, 0), b"a\0", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + PROP + struct.pack(">II", 2**32 - 1, 0), b"a\0", "FDT_ERR_BADSTRUCTURE"),
        (ROOT + PROP + struct.pack(">II", 8, 0), b"a\0", "FDT_ERR_TRUNCATED"),
        (ROOT + PROP, b"a\0", "FDT_ERR_BADSTRUCTURE"),
    ],
)
def test_refused_structures(structure: bytes, strings: bytes, reason: str) -> None:
    """What is given is followed by the end of a node and FDT_END."""
    raw = encode(structure, strings)
    with pytest.raises(Unreadable, match=reason):
        read(raw)
    assert not agrees(raw)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (0, 0xD00DFEEE, "FDT_ERR_BADMAGIC"),
        (1, 39, "FDT_ERR_TRUNCATED"),
        (1, len(ODD) + 1, "FDT_ERR_TRUNCATED"),
        (2, 39, "FDT_ERR_TRUNCATED"),
        (2, 2**32 - 1, "FDT_ERR_TRUNCATED"),
        (3, len(ODD) + 1, "FDT_ERR_TRUNCATED"),
        (4, 36, "FDT_ERR_TRUNCATED"),
        (4, len(ODD) - 15, "FDT_ERR_TRUNCATED"),
        (6, 18, "FDT_ERR_BADVERSION"),
        (8, 2**32 - 1, "FDT_ERR_TRUNCATED"),
        (8, 6, "FDT_ERR_TRUNCATED"),
        (9, 2**32 - 1, "FDT_ERR_TRUNCATED"),
        (9, 0, "FDT_ERR_TRUNCATED"),
    ],
)
def test_refused_headers(field: int, value: int, reason: str) -> None:
    raw = bytearray(ODD)
    struct.pack_into(">I", raw, 4 * field, value)
    with pytest.raises(Unreadable, match=reason):
        read(bytes(raw))
    assert not agrees(bytes(raw))


@pytest.mark.parametrize(("field", "value"), [(5, 18), (5, 2**32 - 1), (6, 0), (7, 5)])
def test_headers_that_are_taken(field: int, value: int) -> None:
    """A later version that says to be compatible, and whichever processor boots."""
    raw = bytearray(ODD)
    struct.pack_into(">I", raw, 4 * field, value)
    assert agrees(bytes(raw))


def test_properties_after_children_are_not_found() -> None:
    """As in libfdt, and in the kernel, which reads with it."""
    assert [each.name for each in read(ODD).root.properties] == ["ab", "b"]


WITHOUT_LIBFDT: Final = """
import importlib, pkgutil, sys
sys.modules["libfdt"] = None
import khoscope
for module in pkgutil.walk_packages(khoscope.__path__, "khoscope."):
    importlib.import_module(module.name)
from khoscope.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_khoscope_needs_no_libfdt() -> None:
    words = ["--snapshot", str(demo.path("odd-before")), "fdt"]
    command = [sys.executable, "-c", WITHOUT_LIBFDT, *words]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "preserved-memory-map" in result.stdout
