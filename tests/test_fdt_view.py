# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope fdt``: blobs as device-tree source and structures, whatever they hold."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import libfdt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi import serialized
from khoscope.abi.fdt import Node, Property, read
from khoscope.abi.kho_fdt import Fdt, parse_root_fdt
from khoscope.cli import main
from khoscope.facts import store
from khoscope.facts.blobs import DECODED, Blob, BlobKind, Blobs
from khoscope.facts.clients import Vmalloc
from khoscope.facts.snapshot import Side, Snapshot, in_ram
from khoscope.views.fdt import FdtText, write_json
from tests.fuzz import fuzz
from tests.synthetic import FIXED, PLAIN, Block, snapshot
from tests.test_fdt import BEGIN_NODE, END_NODE, ROOT, data, encode, u64
from tests.test_fdt import blob as root_fdt

DEMO = Path(__file__).parent.parent / "khoscope" / "demo"
ROOT_AT = 0x2000
AT = 0x10_0000

METADATA = (1).to_bytes(4, "little") + b"7.2.0-old".ljust(65, b"\0") + (3).to_bytes(4, "little")
LUO = b"luo-v5\0\0" + u64(2) + u64(0x5000) + u64(0)
FOLIOS = u64(0x7000) + (600).to_bytes(4, "little") + b"\x03\x00" + b"\x00\x00"


def fdt(root: Node) -> bytes:
    """The FDT of a tree."""
    # With room from the beginning: libfdt's binding does not grow it when it is finished.
    made = libfdt.FdtSw(1 << 16)
    made.finish_reservemap()

    def add(node: Node) -> None:
        with made.add_node(node.name):
            for each in node.properties:
                made.property(each.name, each.value)
            for child in node.children:
                add(child)

    add(root)
    done = made.as_fdt()
    return bytes(done.as_bytearray())[: done.totalsize()]


def node(name: str, properties: dict[str, bytes], *children: Node) -> Node:
    return Node(name, [Property(key, value, 0) for key, value in properties.items()], [*children])


KHO_TEST = fdt(
    node(
        "",
        {"compatible": b"kho-test-v1\0", "magic": bytes.fromhex("214f484b")},
        node("data", {"nr_folios": b"\x10\0\0\0", "folios_info": FOLIOS, "csum": bytes(4)}),
    )
)
MEMBLOCK = fdt(
    node(
        "",
        {"compatible": b"memblock-v1\0"},
        node(
            "area",
            {"compatible": b"reserve-mem-v1\0", "start": u64(0x40000000), "size": u64(4 << 20)},
        ),
    )
)


def facts_of(
    blobs: dict[str, bytes],
    *,
    sizes: dict[str, int] | None = None,
    preserved: Iterable[Block] = (Block(AT, 8),),
    root: bytes | None = None,
) -> Snapshot:
    """A snapshot whose root FDT leads to these blobs, at ``AT`` a page after the other."""
    if root is None:
        asked = {name: (sizes or {}).get(name, len(raw)) for name, raw in blobs.items()}
        places = {name: data(AT + 0x1000 * i, size) for i, (name, size) in enumerate(asked.items())}
        root = root_fdt(subtrees=places)
    facts = snapshot(FIXED, preserved, fdt=parse_root_fdt(ROOT_AT, root))
    kept = {"fdt": root, **{f"subtree {name}": raw for name, raw in blobs.items() if raw}}
    return replace(facts, outgoing=replace(facts.outgoing, blobs=kept))


def blobs_of(facts: Snapshot) -> list[Blob]:
    blobs = Blobs(facts, facts.outgoing, outgoing=True)
    return [blobs.root(), *blobs.subtrees()]


def only(facts: Snapshot) -> Blob:
    """The one subtree's blob."""
    (found,) = Blobs(facts, facts.outgoing, outgoing=True).subtrees()
    return found


def text_of(facts: Snapshot, blobs: list[Blob], limit: int | None = 20) -> str:
    out = io.StringIO()
    FdtText(out, limit).fdt(facts, "out", blobs)
    return out.getvalue()


def json_of(facts: Snapshot, blobs: list[Blob]) -> dict[str, Any]:
    out = io.StringIO()
    write_json(facts, "out", blobs, out)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


# Device-tree source


def parse_source(text: str) -> Node:
    """The tree of device-tree source, as far as khoscope writes it: numbers are byte strings."""
    # Comments, and not what looks like one in a string.
    text = re.sub(r'("(?:\\.|[^"\\])*")|//.*|/\*.*?\*/', lambda found: found[1] or "", text)
    assert text.split(None, 1)[0] == "/dts-v1/;"
    way = [Node("")]
    for name, begins, value in re.findall(
        r'([\w,.+*#?@/-]+)\s*(?:(\{)|(?:=\s*((?:"(?:\\.|[^"])*"|\[[^]]*\]|,\s*)+))?;)|\};', text
    )[1:]:
        if begins:
            child = Node("" if name == "/" else name)
            way[-1].children.append(child)
            way.append(child)
        elif name:
            way[-1].properties.append(Property(name, source_bytes(value), 0))
        else:
            way.pop()
    return way[0].children[0]


def source_bytes(value: str) -> bytes:
    found = b""
    for text, numbers in re.findall(r'"((?:\\.|[^"])*)"|\[([^]]*)\]', value):
        found += (
            bytes.fromhex(numbers) if numbers else re.sub(r"\\(.)", r"\1", text).encode() + b"\0"
        )
    return found


def contents(tree: Node) -> Any:
    """A tree without offsets, for comparing."""
    return (
        tree.name,
        [(each.name, each.value) for each in tree.properties],
        [contents(child) for child in tree.children],
    )


NAMES = st.text("abcXYZ09,._+*#?@-", min_size=1, max_size=12).filter(
    lambda name: name[0] not in ",._+*#?@-"
)
VALUES = (
    st.binary(max_size=40)
    | st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1)).map(
        lambda texts: "".join(f"{text}\0" for text in texts).encode()
    )
    | st.integers(0, 2**64 - 1).map(u64)
)
PROPERTIES = st.dictionaries(NAMES, VALUES, max_size=4)
TREES = st.recursive(
    st.builds(node, NAMES, PROPERTIES),
    lambda below: st.builds(
        lambda name, properties, children: node(name, properties, *children),
        NAMES,
        PROPERTIES,
        st.lists(below, max_size=3, unique_by=lambda child: child.name),
    ),
    max_leaves=6,
)


@given(TREES)
def test_the_source_has_the_bytes_of_the_tree(tree: Node) -> None:
    raw = fdt(replace(tree, name=""))
    facts = facts_of({"some": raw})
    found = only(facts)
    assert found.tree is not None
    assert found.problems == []
    source = text_of(facts, [found])
    assert contents(parse_source(source)) == contents(read(raw).root)
    row = json_of(facts, [found])["subtrees"][0]["tree"]
    for each in tree.properties:
        assert bytes.fromhex(row["properties"][each.name]["raw"]) == each.value
    assert list(row["nodes"]) == [child.name for child in read(raw).root.children]


def test_values_are_in_cpu_byte_order() -> None:
    facts = facts_of({"LUO": LUO})
    (root, _) = blobs_of(facts)
    source = text_of(facts, [root])
    assert '    compatible = "kho-v4";\n' in source
    assert "    preserved-memory-map = [00 50 34 12 00 00 00 00]; /* 0x12345000 */\n" in source
    assert "        preserved-data = [00 00 10 00 00 00 00 00]; /* 0x100000 */\n" in source
    assert "        blob-size = [20 00 00 00 00 00 00 00]; /* 32 */\n" in source
    tree = json_of(facts, [root])["fdt"]["tree"]
    assert tree["properties"]["preserved-memory-map"] == {
        "raw": "0050341200000000",
        "decoded": "0x12345000",
    }
    assert tree["nodes"]["LUO"]["properties"]["blob-size"]["decoded"] == 32


def test_memory_reservations() -> None:
    made = libfdt.FdtSw()
    made.add_reservemap_entry(0x1000, 0x2000)
    made.finish_reservemap()
    with made.add_node(""):
        made.property("empty", b"")
    facts = facts_of({"x": bytes(made.as_fdt().as_bytearray())})
    source = text_of(facts, [only(facts)])
    assert "/dts-v1/;\n/memreserve/ 0x1000 0x2000;\n\n/ {\n    empty;\n};\n" in source


# What is known


def test_kexec_metadata() -> None:
    found = only(facts_of({"kexec-metadata": METADATA}))
    assert found.kind == BlobKind.KEXEC_METADATA
    assert found.fields == {"version": 1, "previous_release": "7.2.0-old", "kexec_count": 3}
    assert found.problems == []


def test_luo() -> None:
    facts = facts_of({"LUO": LUO})
    found = only(facts)
    assert found.kind == BlobKind.LUO
    assert found.fields == {
        "compatible": "luo-v5",
        "liveupdate_num": 2,
        "sessions_pa": "0x5000",
        "flbs_pa": "0x0",
    }
    text = text_of(facts, [found])
    assert "// LUO: struct luo_ser, 32 bytes at 0x100000, preserved\n" in text
    assert "sessions_pa       0x5000\n" in text


def test_luo_that_is_an_fdt() -> None:
    nodes = [
        node("luo-session", {"luo-session-header": u64(0x50000)}),
        node("luo-flb", {"luo-flb-header": bytes(4)}),
    ]
    root = node("", {"compatible": b"luo-v1\0", "liveupdate-number": u64(3)}, *nodes)
    facts = facts_of({"LUO": fdt(root)})
    found = only(facts)
    assert found.kind == BlobKind.FDT
    assert found.problems == ["property '/luo-flb/luo-flb-header' has 4 bytes, not 8"]
    text = text_of(facts, [found])
    assert "liveupdate-number = [03 00 00 00 00 00 00 00]; /* 3 */" in text
    assert "luo-session-header = [00 00 05 00 00 00 00 00]; /* 0x50000 */" in text


def test_memblock() -> None:
    facts = facts_of({"memblock": MEMBLOCK})
    text = text_of(facts, [only(facts)])
    assert "start = [00 00 00 40 00 00 00 00]; /* 0x40000000 */" in text
    assert "size = [00 00 40 00 00 00 00 00]; /* 4194304 */" in text


@pytest.mark.parametrize("followed", [True, False])
def test_kho_test(followed: bool) -> None:
    facts = facts_of({"kho_test": KHO_TEST})
    chains = [
        Vmalloc("another", 0, 0x7000, 1, 0, 0, 0, 0),
        Vmalloc("kho_test", AT, 0x7000, 600, 3, 0, 2, 599, ["ends too early"]),
    ]
    facts = replace(facts, outgoing=replace(facts.outgoing, vmallocs=chains[: 1 + followed]))
    found = only(facts)
    (area,) = found.areas
    assert area.where == "/data/folios_info"
    assert area.decoded == {
        "first": "0x7000",
        "total_pages": 600,
        "flags": ["ALLOC", "HUGE_VMAP"],
        "order": 0,
    }
    assert area.chain == (chains[1] if followed else None)
    text = text_of(facts, [found])
    words = "first 0x7000, total_pages 600, flags ALLOC HUGE_VMAP, order 0"
    assert f"        /* {words} */\n        folios_info = [00 70" in text
    assert ("its chain: 2 chunks, 599 pages listed" in text) == followed
    assert ("problem: ends too early" in text) == followed
    assert ("its chain was not followed" in text) != followed
    (row,) = json_of(facts, [found])["subtrees"][0]["vmallocs"]
    chain = {"chunks": 2, "listed": 599, "problems": ["ends too early"]}
    assert row["chain"] == (chain if followed else None)


def test_an_fdt_is_shown_as_one_whatever_its_name() -> None:
    for name in ("driver", "LUO", "kexec-metadata"):
        found = only(facts_of({name: MEMBLOCK}))
        assert found.kind == BlobKind.FDT
        assert found.tree is not None


def test_unknown_bytes() -> None:
    raw = bytes(range(256)) * 2
    facts = facts_of({"driver": raw})
    found = only(facts)
    assert (found.kind, found.tree, found.fields) == (BlobKind.UNKNOWN, None, None)
    text = text_of(facts, [found])
    assert "// driver: unknown, 512 bytes at 0x100000, preserved\n" in text
    assert "00000040  40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f  @ABCDEFGHIJKLMNO\n" in text
    assert "12 more rows of 16 bytes" in text
    assert dumped(text_of(facts, [found], None)) == raw
    assert json_of(facts, [found])["subtrees"][0]["raw"] == raw.hex()


# What is not as it should be


def dumped(text: str) -> bytes:
    """The bytes of a dump."""
    rows = re.findall(r"^[0-9a-f]{8}  ([0-9a-f ]{47})  ", text, re.MULTILINE)
    return bytes.fromhex("".join(rows))


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("LUO", b"luo-v6\0\0" + LUO[8:], "compatible is 'luo-v6', only 'luo-v5' is known"),
        ("LUO", LUO[:31], "31 bytes are no struct luo_ser: that has 32"),
        ("kexec-metadata", b"\2" + METADATA[1:], "version is 2, only 1 is known"),
        ("kexec-metadata", METADATA[:72], "72 bytes are no struct kho_kexec_metadata"),
        ("memblock", MEMBLOCK[:-1], "not a readable FDT ("),
        ("memblock", bytes(100), "not a readable FDT ("),
        ("kho_test", b"short", "not a readable FDT (5 bytes hold no header)"),
        ("driver", b"\xd0\x0d\xfe\xed" + bytes(100), "not a readable FDT ("),
    ],
)
def test_what_is_not_known_stays_bytes(name: str, raw: bytes, problem: str) -> None:
    facts = facts_of({name: raw})
    found = only(facts)
    assert (found.kind, found.tree, found.fields) == (BlobKind.UNKNOWN, None, None)
    (said,) = found.problems
    assert said.startswith(problem)
    text = text_of(facts, [found], None)
    assert "// problem: " in text
    assert dumped(text) == raw


def test_known_names_of_another_version() -> None:
    facts = facts_of({"memblock": MEMBLOCK.replace(b"memblock-v1", b"memblock-v2")})
    found = only(facts)
    assert found.problems == ["compatible 'memblock-v2' is not known: values as they stand"]
    assert "size = [00 00 40 00 00 00 00 00]; /* 0x400000 */" in text_of(facts, [found])


def test_properties_of_odd_length() -> None:
    properties = {"compatible": b"reserve-mem-v1\0", "start": bytes(7), "size": bytes(9)}
    odd = node("", {"compatible": b"memblock-v1\0"}, node("area", properties))
    facts = facts_of({"memblock": fdt(odd)})
    found = only(facts)
    assert found.problems == [
        "property '/area/start' has 7 bytes, not 8",
        "property '/area/size' has 9 bytes, not 8",
    ]
    assert "start = [00 00 00 00 00 00 00];\n" in text_of(facts, [found])


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_vmalloc_descriptor_of_odd_length(size: int) -> None:
    odd = node("", {"compatible": b"kho-test-v1\0"}, node("data", {"folios_info": bytes(size)}))
    found = only(facts_of({"kho_test": fdt(odd)}))
    assert found.areas == []
    assert found.problems == [f"property '/data/folios_info' has {size} bytes, not 16"]


def test_kept_in_part() -> None:
    facts = facts_of({"driver": b"abc"}, sizes={"driver": 1 << 30})
    found = only(facts)
    assert found.problems == ["only the first 3 of 1,073,741,824 bytes were kept"]
    assert found.preserved is False
    assert dumped(text_of(facts, [found])) == b"abc"


@pytest.mark.parametrize(
    ("place", "problem", "preserved"),
    [
        (data(AT, 16), "it could not be read", True),
        (data(0, 16), "it could not be read", False),
        (data(1 << 40, 16), "it is not in RAM: not read", False),
        (data(AT, 1 << 40), "it is not in RAM: not read", False),
        (data(2**64 - 8, 2**64 - 1), "it is not in RAM: not read", False),
        (data(AT, 0), "empty: blob-size is 0", None),
        ({}, "the root FDT does not say where it is, or how large", None),
        ({"preserved-data": bytes(3), "blob-size": u64(1)}, "the root FDT does not say", None),
    ],
)
def test_not_there(place: dict[str, bytes], problem: str, preserved: bool | None) -> None:
    facts = facts_of({}, root=root_fdt(subtrees={"driver": place}))
    found = only(facts)
    assert found.raw is None
    assert found.preserved is preserved
    assert found.problems[0].startswith(problem)
    assert f"// problem: {problem}" in text_of(facts, [found])


def test_not_preserved() -> None:
    facts = facts_of({"LUO": LUO, "driver": b"x"}, preserved=[Block(AT)])
    root, luo, driver = blobs_of(facts)
    assert (root.preserved, luo.preserved, driver.preserved) == (False, True, False)
    text = text_of(facts, [root, luo, driver])
    assert text.count("// not preserved: the next kernel may find anything") == 2
    rows = json_of(facts, [root, luo, driver])
    assert rows["fdt"]["preserved"] is False
    assert [row["preserved"] for row in rows["subtrees"]] == [True, False]


def test_what_the_incoming_tree_does_not_hold_is_not_known() -> None:
    facts = facts_of({"LUO": LUO, "driver": b"x"}, preserved=[Block(AT)])
    blobs = Blobs(facts, facts.outgoing, outgoing=False)
    assert [each.preserved for each in blobs.subtrees()] == [True, None]


def test_two_subtrees_of_a_name() -> None:
    root = root_fdt(subtrees={"LUO": data(AT, 32), "LUX": data(AT + 64, 4)})
    facts = facts_of({"LUO": LUO}, root=root.replace(b"LUX\0", b"LUO\0"))
    top, first, second = blobs_of(facts)
    assert "node '/LUO' is there 2 times" in top.problems
    for each in (first, second):
        assert each.raw is None
        assert "not the only subtree of this name" in each.problems[0]
    text_of(facts, [top, first, second])


@pytest.mark.parametrize("raw", [None, b"", bytes(4096), b"\xd0\x0d\xfe\xed" * 1024])
def test_no_root_fdt_to_speak_of(raw: bytes | None) -> None:
    facts = snapshot(FIXED, [], fdt=parse_root_fdt(ROOT_AT, raw))
    facts = replace(
        facts, outgoing=replace(facts.outgoing, blobs={} if raw is None else {"fdt": raw})
    )
    (root,) = blobs_of(facts)
    assert root.tree is None
    assert len(root.problems) == 1
    assert f"// problem: {root.problems[0][:20]}" in text_of(facts, [root])
    assert json_of(facts, [root])["fdt"]["problems"] == root.problems


def test_names_cannot_steer_the_terminal() -> None:
    hostile = node("", {'a\n"': b"\x1b]0;x\0", "b": b'"\\\0'}, node("\033[2J\n*/ {", {}))
    facts = facts_of({"n": fdt(hostile)})
    facts = replace(
        facts,
        outgoing=replace(
            facts.outgoing,
            fdt=parse_root_fdt(ROOT_AT, root_fdt(subtrees={"n": data(AT, 100), "\r\x9b": {}})),
        ),
    )
    text = text_of(facts, blobs_of(facts))
    assert not set(text) & set(map(chr, {*range(32), *range(127, 160)} - {10}))
    assert r'b = "\"\\";' in text


# The command


def khoscope(path: Path, *words: str) -> int:
    return main(["--snapshot", str(path), "fdt", *words])


BEFORE, AFTER = DEMO / "odd-before.khosnap", DEMO / "odd-after.khosnap"
SUBTREES = ["kho_exercise", "LUO", "kho_test", "kexec-metadata"]


def side_of(path: Path, which: str) -> Side:
    facts = store.load_file(path)
    side = facts.outgoing if which == "out" else facts.incoming
    assert side is not None
    return side


@pytest.mark.parametrize(
    ("words", "which", "path"),
    [
        ((), "out", BEFORE),
        (("out",), "out", BEFORE),
        (("in",), "in", AFTER),
    ],
)
def test_a_real_handover(
    words: tuple[str, ...], which: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert khoscope(path, *words) == 0
    text = capsys.readouterr().out
    for name in SUBTREES:
        assert f"\n// {name}: " in text
        assert f"\n    {name} {{\n" in text
    assert max(map(len, text.splitlines())) <= 80
    assert khoscope(path, *words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    side = side_of(path, which)
    assert document["schema"] == "khoscope.fdt/1"
    assert document["side"] == which
    assert [row["name"] for row in document["subtrees"]] == SUBTREES
    for row, subtree in zip(document["subtrees"], side.fdt.subtrees, strict=True):
        assert (int(row["phys"], 0), row["size"]) == (subtree.phys, subtree.size)
    test = document["subtrees"][2]["tree"]
    assert test["properties"]["magic"]["decoded"] == "0x4b484f21"
    assert document["subtrees"][3]["decoded"]["version"] == serialized.KEXEC_METADATA_VERSION


def test_one_subtree(capsys: pytest.CaptureFixture[str]) -> None:
    assert khoscope(BEFORE, "out", "LUO") == 0
    text = capsys.readouterr().out
    assert khoscope(BEFORE, "LUO") == 0
    assert capsys.readouterr().out == text
    assert "luo-v5" in text
    assert "kho_test" not in text
    assert khoscope(BEFORE, "LUO", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fdt"] is None
    assert [row["name"] for row in document["subtrees"]] == ["LUO"]


def test_raw(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    side = side_of(BEFORE, "out")
    page = side.blobs["fdt"]
    assert khoscope(BEFORE, "--raw") == 0
    raw = capfdbinary.readouterr().out
    assert raw == page[: int.from_bytes(page[4:8], "big")]
    assert libfdt.FdtRo(raw).totalsize() == len(raw)
    assert khoscope(BEFORE, "kexec-metadata", "--raw") == 0
    assert capfdbinary.readouterr().out == side.blobs["subtree kexec-metadata"]


def test_raw_is_nothing_for_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert khoscope(BEFORE, "--raw") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("khoscope: these bytes are nothing for a terminal\nkhoscope: ")


def test_raw_of_what_was_kept_in_part(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    facts = facts_of({"part": b"abc", "none": b""}, sizes={"part": 9, "none": 9})
    path = tmp_path / "a.khosnap"
    with path.open("wb") as file:
        store.save(facts, file)
    assert khoscope(path, "part", "--raw") == 2
    out, err = capfdbinary.readouterr()
    assert out == b"abc"
    assert b"only the first 3 of 9 bytes were kept" in err
    assert khoscope(path, "none", "--raw") == 2
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert err.count(b"\n") == 2


def test_unknown_subtree(capsys: pytest.CaptureFixture[str]) -> None:
    assert khoscope(BEFORE, "nope\033") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "khoscope: the outgoing FDT has no subtree 'nope\\x1b'"
    assert second == f"khoscope: these are there: {', '.join(SUBTREES)}"


def test_nothing_was_handed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert khoscope(BEFORE, "in") == 2
    assert "there is no incoming FDT" in capsys.readouterr().err


def test_kho_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.khosnap"
    with path.open("wb") as file:
        store.save(snapshot(PLAIN, [], fdt=Fdt(0, problems=["there is none"])), file)
    assert khoscope(path) == 2
    assert (
        "KHO is off in this kernel: it is not, or not yet, set up (it has no root FDT)"
        in capsys.readouterr().err
    )


def test_two_words_of_which_none_is_a_side(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        khoscope(BEFORE, "LUO", "out")
    assert ended.value.code == 2
    assert "in|out: 'LUO' is neither" in capsys.readouterr().err


# Anything


def views_hold(facts: Snapshot) -> None:
    """Both views show it, in lines that a terminal takes, and as a document."""
    blobs = blobs_of(facts)
    text = text_of(facts, blobs)
    assert not set(text) & set(map(chr, {*range(32), *range(127, 160)} - {10}))
    document = json_of(facts, blobs)
    assert len(document["subtrees"]) == len(blobs) - 1
    for each in blobs:
        assert each.tree or each.fields or each.problems or each.kind == BlobKind.UNKNOWN


BLOB_NAMES = st.sampled_from(["LUO", "kexec-metadata", "memblock", "kho_test", "other"])
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)


def changed(raw: bytes, changes: list[tuple[float, int]]) -> bytes:
    """A few bytes of it others."""
    found = bytearray(raw)
    for where, value in changes:
        found[int(where * len(found))] = value
    return bytes(found)


@fuzz
@given(BLOB_NAMES, st.binary(min_size=1, max_size=200))
def test_any_bytes(name: str, raw: bytes) -> None:
    views_hold(facts_of({name: raw}))


@fuzz
@given(BLOB_NAMES, st.sampled_from([KHO_TEST, MEMBLOCK, LUO, METADATA]), CHANGES, st.integers(0, 9))
def test_damaged_blobs(
    name: str, raw: bytes, changes: list[tuple[float, int]], missing: int
) -> None:
    views_hold(facts_of({name: changed(raw, changes)[: len(raw) - missing]}))


@fuzz
@given(CHANGES)
def test_a_damaged_root_fdt(changes: list[tuple[float, int]]) -> None:
    blobs = {"LUO": LUO, "kho_test": KHO_TEST}
    page = facts_of(blobs).outgoing.blobs["fdt"]
    used = int.from_bytes(page[4:8], "big")
    views_hold(facts_of(blobs, root=changed(page[:used], changes).ljust(4096, b"\0")))


def test_more_fdts_than_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones are, whichever is asked for; what is no FDT costs nothing."""
    raw = fdt(node("", {"compatible": b"x\0"})).ljust(1000, b"\0")
    monkeypatch.setattr("khoscope.facts.blobs.DECODED", 2500)
    facts = facts_of({"a": raw, "b": raw, "none": bytes(9000), "c": raw, "d": raw})
    found = {blob.name: blob for blob in blobs_of(facts)[1:]}
    assert [name for name, blob in found.items() if blob.tree is not None] == ["a", "b"]
    for name in ("c", "d"):
        assert found[name].raw == raw
        assert found[name].problems == ["not decoded: more than 0 MiB of FDTs in all"]
    assert Blobs(facts, facts.outgoing, outgoing=True).subtree("c") == found["c"]


def test_many_large_fdts_take_no_minutes() -> None:
    raw = encode(ROOT + (BEGIN_NODE + b"a\0\0\0" + END_NODE) * 78_000)
    facts = facts_of({f"{n}": raw for n in range(60)})
    start = time.process_time()
    found = blobs_of(facts)[1:]
    assert time.process_time() - start < 60
    assert 0 < sum(blob.tree is not None for blob in found) * len(raw) <= DECODED
    assert all(blob.tree is not None or blob.problems for blob in found)


def test_where_ram_is() -> None:
    """Ranges out of a file need be in no order, and addresses may be any numbers."""
    facts = facts_of({"a": b""}, sizes={"a": 8})
    for ram, inside in (
        ([[0, 1 << 40]], True),
        ([[0, 4096], [AT, AT + 8], [1 << 30, 1 << 31]], True),
        ([[0, AT + 4], [AT + 1, 1 << 40]], False),
    ):
        there = replace(facts, ram=np.array(ram, np.uint64))
        problem = "it could not be read" if inside else "it is not in RAM: not read"
        assert only(there).problems == [problem]
    for phys, size in ((2**70, 8), (-5, 8), (2**64 - 4, 8)):
        assert not in_ram(facts.ram, phys, size)
