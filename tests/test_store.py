# SPDX-License-Identifier: LGPL-2.1-or-later
"""The snapshot file: keeps everything, and is not believed when it is read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khoscope import checks, demo
from khoscope.abi.keys import NO_TYPE, Abi, BlockLimits, Tracker
from khoscope.facts import archive, budget, by_address, listed, store
from khoscope.facts.clients import (
    Claims,
    Flb,
    Held,
    Holder,
    Holders,
    Luo,
    LuoFile,
    LuoSession,
    LuoState,
    Memfd,
    Owner,
    OwnerKind,
    Vmalloc,
)
from khoscope.facts.columns import Blocks, Columns, Pages
from khoscope.facts.snapshot import KexecImage, Snapshot
from khoscope.views import documents
from khoscope.views.block_filter import BlockFilter
from khoscope.views.text import Text
from khoscope.words.errors import KhoscopeError
from tests.synthetic import FIXED, PLAIN, POSTED, rich, rich_before, snapshot, spooled


def bytes_of(facts: Snapshot) -> bytes:
    file = io.BytesIO()
    store.save(facts, file)
    return file.getvalue()


def in_small_chunks(facts: Snapshot) -> bytes:
    """A file that has several chunks of blocks, as only large ones have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_address, "CHUNK_BLOCKS", 7)
        return bytes_of(facts)


WHOLE = in_small_chunks(rich())


def load(data: bytes) -> Snapshot:
    return store._load(io.BytesIO(data), "test.khosnap")


def use(facts: Snapshot) -> None:
    """Whatever khoscope does with a snapshot."""
    for stream in streams(facts).values():
        for _ in stream:
            pass
    report = checks.check(facts)
    out = io.StringIO()
    for side in filter(None, (facts.outgoing, facts.incoming)):
        Text(out).tree(facts, side.tree, "outgoing", BlockFilter(), True)
        wanted = BlockFilter(phys=(0, 1))
        documents.write_tree(facts, side.tree, "outgoing", wanted, True, False, out)
    Text(out).verify(facts, report)
    documents.write_verify(facts, report, out)
    for a, b in ((facts, rich()), (rich(), facts)):
        Text(out).diff(a, b)
        documents.write_diff(a, b, out)
    report = checks.compare(rich_before(), facts)
    Text(out).verify(facts, report)
    documents.write_verify(facts, report, out)


def told_or_used(data: bytes) -> None:
    """A file that may be whole: whatever is wrong with it is told, in no other way than one."""
    with contextlib.suppress(KhoscopeError):
        use(load(data))


def streams(facts: Snapshot) -> dict[str, Any]:
    found = {
        "out/nodes": facts.outgoing.tree.nodes,
        "out/leaves": facts.outgoing.tree.leaves,
        "out/blocks": facts.outgoing.blocks,
        "stamps": facts.stamps,
        "watched": facts.watched,
        "evidence": facts.evidence,
    }
    if facts.incoming is not None:
        found["in/nodes"] = facts.incoming.tree.nodes
        found["in/leaves"] = facts.incoming.tree.leaves
        found["in/blocks"] = facts.incoming.blocks
    return found


def refused(data: bytes, match: str = "not a whole snapshot file") -> str:
    """What is said of a file that must be refused, when it is opened or when it is used."""
    with pytest.raises(KhoscopeError, match=match) as caught:
        use(load(data))
    assert "\n" not in caught.value.what
    assert caught.value.hint
    return caught.value.what


def rewritten(changes: dict[str, bytes | None], data: bytes = WHOLE) -> bytes:
    """The file with some members replaced (None: left out), its checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        assert changes.keys() <= {*old.namelist()}
        for name in old.namelist():
            content = changes.get(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def member(name: str, data: bytes = WHOLE) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return file.read(name)


def members() -> list[str]:
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as file:
        return file.namelist()


def npy(values: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **more)
    return file.getvalue()


def column(name: str) -> Any:
    return np.load(io.BytesIO(member(name)), allow_pickle=False)


def with_meta(change: Callable[[dict[str, Any]], None]) -> bytes:
    meta = json.loads(member("meta.json"))
    change(meta)
    return rewritten({"meta.json": json.dumps(meta).encode()})


# A whole file


def same_columns(a: Columns | None, b: Columns | None) -> None:
    if a is None or b is None:
        assert a is b
        return
    assert type(a) is type(b)
    for f in fields(a):  # type: ignore[arg-type]
        left, right = getattr(a, f.name), getattr(b, f.name)
        if left is None or isinstance(left, Columns):
            same_columns(left, right)
        else:
            assert left.dtype == right.dtype
            assert np.array_equal(left, right)


def same(a: Snapshot, b: Snapshot) -> None:
    for name in ("taken", "kernel", "abi", "kho_enable", "handover", "scan", "watching", "image"):
        assert getattr(a, name) == getattr(b, name)
    assert a.abi.decided == b.abi.decided
    for name in ("ram", "scratch"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    sides = [(a.outgoing, b.outgoing)]
    if a.incoming is not None and b.incoming is not None:
        sides.append((a.incoming, b.incoming))
    else:
        assert a.incoming is b.incoming
    for left, right in sides:
        assert (left.fdt, left.tree.state, left.blobs) == (right.fdt, right.tree.state, right.blobs)
    mine, others = streams(a), streams(b)
    assert mine.keys() == others.keys()
    for name in mine:
        # Chunks of blocks may have other borders.
        same_columns(joined(mine[name]), joined(others[name]))


def joined(stream: Any) -> Columns | None:
    parts = [*stream]
    return type(parts[0]).concatenate(parts) if parts else None


@pytest.mark.parametrize(
    "make",
    [
        rich,
        lambda: rich(PLAIN),
        lambda: rich(POSTED),
        lambda: snapshot(FIXED, []),
        lambda: replace(snapshot(PLAIN, []), scan=None),
        lambda: rich(
            Abi.for_page_shift(14, compatible="kho-v4", decided={"KHO_ORDER_0_LOG2": "computed"})
        ),
        lambda: rich(Abi.for_page_shift(16, compatible="kho-v5", type_shift=49)),
    ],
)
def test_round_trip_keeps_everything(make: Callable[[], Snapshot], tmp_path: Path) -> None:
    facts = make()
    store.save_file(facts, tmp_path / "a.khosnap")
    loaded = store.load_file(tmp_path / "a.khosnap")
    same(facts, loaded)
    # A stream may be read as often as one likes, and what was loaded may be saved.
    same(facts, loaded)
    same(facts, spooled(loaded))


def test_whole_file_is_used() -> None:
    use(load(WHOLE))


def test_large_blob_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BLOB", 10)
    assert load(bytes_of(rich())).outgoing.blobs["subtree LUO"] == bytes(range(10))


def test_clock_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip has no time before 1980; a host whose clock is not set does."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert in_small_chunks(rich()) == WHOLE


def test_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a.khosnap"
    path.write_bytes(b"was here")
    path.chmod(0o666)
    store.save_file(rich(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_failed_save_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    class Failing:
        def __iter__(self) -> Iterator[Blocks]:
            yield from rich().outgoing.blocks
            raise error

    path = tmp_path / "a.khosnap"
    path.write_bytes(b"was here")
    facts = replace(rich(), stamps=Failing())
    expected = KhoscopeError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        store.save_file(facts, path)
    assert path.read_bytes() == b"was here"
    assert list(tmp_path.iterdir()) == [path]


def test_nowhere_to_save(tmp_path: Path) -> None:
    with pytest.raises(KhoscopeError, match="No such file or directory"):
        store.save_file(rich(), tmp_path / "missing" / "a.khosnap")
    with pytest.raises(KhoscopeError, match="File name too long"):
        store.save_file(rich(), tmp_path / ("x" * 300))


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(KhoscopeError):
            store.load_file(path)


# Damage


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 5000, pickle.dumps({"a": 1}), bytes(100_000)])
def test_not_a_snapshot(data: bytes) -> None:
    refused(data)


def test_truncated_anywhere() -> None:
    for length in range(0, len(WHOLE), max(len(WHOLE) // 200, 1)):
        refused(WHOLE[:length])


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_flipped_bits(at: int, bits: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= bits
    told_or_used(bytes(data))  # some bytes mean nothing, such as a time stamp


@settings(max_examples=150)
@given(st.data())
def test_members_that_were_changed_by_somebody_who_fixed_the_checksums(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(members()))
    content = bytearray(member(name))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    told_or_used(rewritten({name: bytes(content)}))


@pytest.mark.parametrize("name", members())
def test_missing_member(name: str) -> None:
    refused(rewritten({name: None}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out/blocks/000000.phys.npy", npy(np.zeros(3, "<u8"))),
        ("out/blocks/000000.phys.npy", npy(np.zeros(7, "<u4"))),
        ("out/blocks/000000.phys.npy", npy(np.zeros(7, ">u8"))),
        ("out/blocks/000000.phys.npy", npy(np.zeros(7, "<f8"))),
        ("out/blocks/000000.phys.npy", npy(np.zeros((7, 1), "<u8"))),
        ("out/blocks/000000.phys.npy", npy(np.zeros((), "<u8"))),
        ("out/blocks/000000.phys.npy", b""),
        ("out/blocks/000000.phys.npy", b"\x93NUMPY\x01\x00"),
        ("out/blocks/000000.phys.npy", npy(np.zeros(7, "<u8"))[:-1]),
        ("out/blocks/000000.phys.npy", npy(np.zeros(7, "<u8")) + b"\0"),
        ("out/blocks/000000.pages.zeros.npy", npy(np.zeros(6, "<u4"))),
        ("out/blocks/000000.type.npy", npy(np.full(7, 2, "|i1"))),
        ("out/blocks/000000.type.npy", npy(np.full(7, -2, "|i1"))),
        ("out/leaves/000000.bitmap.npy", npy(np.zeros((1, 4096), "|u1"))),
        ("ram.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<u8', 'fortran_order': (\n"),
        ("out/leaves/000000.bitmap.npy", npy(np.asfortranarray(np.ones((9, 4096), "|u1")))),
        ("out/leaves/000000.bitmap.npy", npy(np.zeros((9, 8), "|u1"))),
        ("ram.npy", npy(np.zeros(2, "<u8"))),
        ("ram.npy", npy(np.zeros((1, 3), "<u8"))),
        ("ram.npy", npy(np.array([[print, print]], object), allow_pickle=True)),
        ("meta.json", b""),
        ("meta.json", b"{}"),
        ("meta.json", b"[" * 100_000),
        ("meta.json", b'{"schema": "khosnap/1"}'),
        ("meta.json", b'{"schema": "somethingelse/1"}'),
        ("meta.json", b'{"schema": "khosnap/-1"}'),
        ("meta.json", b'{"schema": "khosnap"}'),
        ("meta.json", b"\xff\xfe"),
    ],
)
def test_content_that_is_not_ours(name: str, content: bytes) -> None:
    refused(rewritten({name: content}))


@pytest.mark.parametrize("shape", ["(1152921504606846976,)", "(4294967296, 4294967296)", "(-7,)"])
def test_absurd_shape(shape: str) -> None:
    name = "out/blocks/000000.phys.npy"
    header = f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}"
    raw = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n"
    refused(rewritten({name: raw + bytes(56)}))


def large(rows: int = archive.EVEN_ROWS) -> Blocks:
    """Blocks in one chunk with columns of each kind: even, rising, negative, and neither."""
    pages = Pages.blank(rows)
    pages.compound[:] = Pages.NOT_COMPOUND
    pages.head[:] = np.arange(rows) - 5
    pages.private[:] = 2**64 - 1
    pages.flags[:] = np.arange(rows) % 7
    # Even but for the last, the first and one in the middle.
    pages.zeros[-1], pages.ones[0], pages.others[rows // 2] = 1, 1, 1
    pages.odd[:] = np.arange(rows)[::-1]
    key = np.arange(rows, dtype=np.uint64) + np.uint64(1 << 52)
    types = np.full(rows, NO_TYPE, np.int8)
    phys = np.arange(rows, dtype=np.uint64) << np.uint64(12)
    return Blocks(key, phys, np.zeros(rows, np.uint8), types, pages)


def stored(blocks: Blocks) -> bytes:
    facts = snapshot(PLAIN, [])
    file = io.BytesIO()
    store.save(replace(facts, outgoing=replace(facts.outgoing, blocks=[blocks])), file)
    return file.getvalue()


@pytest.mark.parametrize("rows", [archive.EVEN_ROWS - 1, archive.EVEN_ROWS, 5000])
def test_columns_that_rise_evenly(rows: int) -> None:
    """They come back as they were, and have no member of their own in a large chunk."""
    blocks = large(rows)
    data = stored(blocks)
    (found,) = load(data).outgoing.blocks
    for name in Blocks.DTYPES:
        values = getattr(found, name)
        assert values.dtype == getattr(blocks, name).dtype
        assert np.array_equal(values, getattr(blocks, name))
    for name in Pages.DTYPES:
        assert np.array_equal(getattr(found.facts, name), getattr(blocks.facts, name))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        names = {n for n in file.namelist() if n.startswith("out/blocks/000000.")}
    others = ("flags", "zeros", "ones", "others", "odd")
    uneven = {f"out/blocks/000000.pages.{name}.npy" for name in others}
    if rows < archive.EVEN_ROWS:
        assert len(names) == len(Blocks.DTYPES) + len(Pages.DTYPES)
    else:
        assert names == {"out/blocks/000000.even.json", *uneven}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1 << 40},
        {"rows": archive.EVEN_ROWS + 1},
        {"rows": archive.EVEN_ROWS - 1},
        {"rows": -1},
        {"rows": "many"},
        {"key": [1 << 52, 0]},
        {"key": [1 << 52, -1]},
        {"key": [1 << 64, 1]},
        {"key": [0, 1 << 63]},
        {"key": [0.5, 1]},
        {"key": [1]},
        {"order": [256, 0]},
        {"type": [-3, 0]},
        {"pages.head": [2**31 - 1, 1]},
        {"pages.unknown": [0, 0]},
        {"pages.head": None},
    ],
)
def test_columns_that_cannot_rise_so(change: dict[str, Any]) -> None:
    name = "out/blocks/000000.even.json"
    whole = stored(large())
    even = json.loads(member(name, whole))
    for what, value in change.items():
        place = even if what == "rows" else even["columns"]
        place[what] = value
        if value is None:
            del place[what]
    refused(rewritten({name: json.dumps(even).encode()}, whole))


def test_pickle_in_an_array_is_not_run() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("the file was unpickled",)

    refused(rewritten({"scratch.npy": npy(np.array([[Trap(), 1]], object), allow_pickle=True)}))


@pytest.mark.parametrize(
    ("stream", "order"),
    [("out/blocks", "key"), ("out/leaves", "key"), ("stamps", "phys"), ("watched", "key")],
)
def test_order_of_rows(stream: str, order: str) -> None:
    name = f"{stream}/000000.{order}.npy"
    values = column(name)
    for wrong in (values[::-1], np.full_like(values, values[0])):
        if len(values) > 1:
            assert "not in order" in refused(rewritten({name: npy(wrong)}))


def test_order_of_chunks() -> None:
    last = column("out/blocks/000000.key.npy")[-1]
    values = column("out/blocks/000001.key.npy")
    values[0] = last
    refused(rewritten({"out/blocks/000001.key.npy": npy(values)}), "not in order of key")


def test_blocks_in_order_of_address() -> None:
    """They come back in order of key, though each chunk was written as soon as it was whole."""
    facts = rich()
    blocks = Blocks.concatenate(facts.outgoing.blocks).in_order_of("phys")
    parts = [blocks[at : at + 10] for at in range(0, len(blocks), 10)]
    turned = [part.in_order_of("key") for part in parts]
    data = in_small_chunks(replace(facts, outgoing=replace(facts.outgoing, blocks=turned)))
    numbers = json.loads(member("meta.json", data))["by_key"]["out/blocks"]
    assert numbers != sorted(numbers)
    same(facts, load(data))


@pytest.mark.parametrize("change", [lambda n: n[:-1], lambda n: [*n, 0], lambda n: [*n[:-1], n[0]]])
def test_chunks_that_are_not_in_order(change: Callable[[list[int]], list[int]]) -> None:
    def wrong(meta: dict[str, Any]) -> None:
        meta["by_key"]["out/blocks"] = change([*range(meta["chunks"]["out/blocks"])])

    refused(with_meta(wrong), "out/blocks: not all of its chunks are in order")


def test_leaf_that_begins_between_leaves() -> None:
    values = column("out/leaves/000000.key.npy") + np.uint64(1)
    what = refused(rewritten({"out/leaves/000000.key.npy": npy(values)}))
    assert "no leaf begins at such a key" in what


def test_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "META", 1 << 20)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.json", bytes(1 << 26))
    assert len(file.getvalue()) < 1 << 18
    assert "larger than any chunk" in refused(file.getvalue())


def test_newer_schema() -> None:
    data = with_meta(lambda meta: meta.update(schema="khosnap/8", unheard_of={}))
    with pytest.raises(KhoscopeError, match=r"schema is khosnap/8, this .* reads up to khosnap/7"):
        load(data)


@pytest.mark.parametrize(
    "change",
    [
        {"page_shift": 13},
        {"page_shift": 60},
        {"page_shift": -1},
        {"page_shift": 12.5},
        {"tree_max_depth": 1},
        {"tree_max_depth": 10**6},
        {"table_size_log2": 40},
        {"bitmap_size_log2": 60},
        {"order_0_log2": 0},
        {"order_0_log2": 64},
        {"max_page_order": 63},
        {"max_page_order": -1},
        {"type_shift": 3},
        {"type_shift": 64},
        {"key_width": 52},
        {"key_width": 65},
        {"limits": {"size": 4096, "order": None}},
        {"limits": {"size": None, "order": 33}},
        {"limits": {"size": 1 << 31}},
        {"limits": None},
        {"stamp": {"order_bits": 64, "type_shift": None, "magic_shift": 32}},
        {"stamp": {"order_bits": 32, "type_shift": 99, "magic_shift": 32}},
        {"stamp": {"order_bits": 32, "type_shift": None, "magic_shift": 64}},
        {"stamp": None},
    ],
)
def test_geometry_that_no_kernel_has(change: dict[str, Any]) -> None:
    refused(with_meta(lambda meta: meta["abi"].update(change)))


def test_chunks_that_are_not_there() -> None:
    refused(with_meta(lambda meta: meta["chunks"].update({"out/blocks": 3})))
    for name in ("out/blocks", "stamps"):
        for many in (10**18, 2**64 - 1):
            meta = json.loads(member("meta.json"))
            meta["chunks"][name] = many
            refused(rewritten({"meta.json": json.dumps(meta).encode()}))


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """As root, `khoscope snapshot /dev/null` would put a file in its place."""
    facts = snapshot(PLAIN, [])
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    link.symlink_to(target)
    for path in (pipe, link, tmp_path):
        with pytest.raises(KhoscopeError, match="is not a file"):
            store.save_file(facts, path)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert not target.exists()


# KHO's clients


def with_clients() -> Snapshot:
    area = Vmalloc("somebody", 0x5008, 0x6000, 2, 1, 0, 1, 2, ["a problem"])
    memfd = Memfd(0x5000, 5, 2**64 - 1, 1, 0, 1, area, 2, ["another"])
    files = [LuoFile("memfd-v2", 2**64 - 1, 0x5000, -5, memfd), LuoFile("\\xff", 0, 2**64 - 1)]
    sessions = [LuoSession("a", True, 2, files), LuoSession("b", None, 2**64 - 1, [], ["odd"])]
    luo = Luo(0x4000, "luo-v5", 3, True, sessions, [Flb("iommu", 0x7000, 1)], None, ["odd"])
    owners = [
        Owner(OwnerKind.FILE, "somebody", "a", 2**64 - 1),
        Owner(OwnerKind.SUBTREE, "subtree LUO"),
    ]
    process = Holder(2**32 - 1, "a process", "/a.slice/b.service", 2**63, [Held("a", False, 2)])
    holders = Holders([process, Holder(1, "", None, None, [])], 2**63, 3, ["a thing"])
    facts = rich()
    claims = [
        Claims(np.array(phys, "<u8"), np.array(size, "<u8"), np.array(owner, "<u4"))
        for phys, size, owner in (([0x4000, 0x5000], [32, 56], [1, 0]), ([2**64 - 1], [1], [0]))
    ]
    side = replace(facts.outgoing, luo=luo, vmallocs=[area], owners=owners, claims=claims)
    return replace(
        facts,
        outgoing=side,
        incoming=replace(side, luo=Luo(0x4000, "luo-v9", raw="6c756f")),
        scratch_free=[7, None],
        unreadable=["the loaded kexec image (kexec_image)"],
        image=KexecImage(True, True, 0x9000, 2**40),
        liveupdate=LuoState(True, ["memfd-v2"], True, holders),
    )


DEMO = Path(str(demo.__file__)).parent
CLIENTS = bytes_of(with_clients())


def test_clients_survive() -> None:
    facts, again = with_clients(), load(CLIENTS)
    for name in ("scratch_free", "image", "liveupdate", "unreadable"):
        assert getattr(again, name) == getattr(facts, name)
    for side, loaded in ((facts.outgoing, again.outgoing), (facts.incoming, again.incoming)):
        assert side is not None
        assert loaded is not None
        for name in ("luo", "vmallocs", "owners"):
            assert getattr(loaded, name) == getattr(side, name)
        for before, after in zip(side.claims, loaded.claims, strict=True):
            for column in Claims.DTYPES:
                assert getattr(after, column).tolist() == getattr(before, column).tolist()
    use(again)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("owner", [2, 2**32 - 1])
def test_a_claim_of_nobody(side: str, owner: int) -> None:
    data = rewritten({f"{side}/claims/000001.owner.npy": npy(np.array([owner], "<u4"))}, CLIENTS)
    facts = load(data)
    claims = facts.outgoing.claims if side == "out" else facts.incoming and facts.incoming.claims
    with pytest.raises(KhoscopeError, match="a claim of nobody"):
        list(claims or ())


@pytest.mark.parametrize(
    "content", [npy(np.zeros(2, "<u8")), npy(np.zeros(1, "<u4")), npy(np.zeros((1, 1), "<u8"))]
)
def test_claims_that_are_not_ours(content: bytes) -> None:
    facts = load(rewritten({"out/claims/000001.size.npy": content}, CLIENTS))
    with pytest.raises(KhoscopeError, match="not a whole snapshot file"):
        list(facts.outgoing.claims)


@given(st.data())
def test_clients_that_were_changed(data: st.DataObject) -> None:
    """Numbers and names of any kind, which the checks and the views meet."""
    content = bytearray(zipfile.ZipFile(io.BytesIO(CLIENTS)).read("meta.json"))
    places = [m.start(1) for m in re.finditer(rb": (-?\d)", content)]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(places))
        content[at : at + 1] = data.draw(st.sampled_from([b"-1", b"0", b"null", b"9" * 20, b"1"]))
        places = [place for place in places if place < at]
        if not places:
            break
    told_or_used(rewritten({"meta.json": bytes(content)}, CLIENTS))


def test_a_file_of_an_older_khoscope_is_written_again() -> None:
    """
    Version 2 had nothing of kernels before the radix tree, of which it wrote none, nothing of
    sections, and did not look whether pages are as the boot left them.
    """
    facts = load(as_version_2((DEMO / "fixed-after.khosnap").read_bytes()))
    assert facts.unrecorded == ["which memory is offline"]
    again = load(bytes_of(facts))
    assert (again.abi, again.kernel) == (facts.abi, facts.kernel)
    assert again.abi.tracker == Tracker.RADIX
    # Written again, it does not know more.
    assert again.offline is None
    assert "which memory is offline is not known" in checks.check(again).incomplete
    for old in (facts, again):
        for stream in (old.outgoing.blocks, old.stamps, old.watched):
            pristine = np.concatenate([blocks.facts.pristine for blocks in stream])
            assert set(pristine.tolist()) == {Pages.UNRECORDED}


def as_version(version: int, data: bytes, age: Callable[[dict[str, Any]], None]) -> bytes:
    """A file as an older khoscope has written it, by what it did not write."""
    meta = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("meta.json"))
    meta["schema"] = f"khosnap/{version}"
    age(meta)
    return rewritten({"meta.json": json.dumps(meta).encode()}, data)


def as_version_2(data: bytes) -> bytes:
    archive = zipfile.ZipFile(io.BytesIO(data))
    meta = json.loads(archive.read("meta.json"))
    meta["schema"] = "khosnap/2"
    for name in ("tracker", "preserve_bits", "finalize", "restores_pages_as"):
        meta["abi"].pop(name, None)
    for of in filter(None, (meta, meta["outgoing"], meta["incoming"])):
        for name in ("finalized", "offline", "serialized"):
            of.pop(name, None)
    changes: dict[str, bytes | None] = {
        name: None for name in archive.namelist() if name.endswith(".pristine.npy")
    }
    return rewritten({"meta.json": json.dumps(meta).encode(), **changes}, data)


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.khosnap")), ids=lambda path: str(path.name))
def test_files_of_an_older_khoscope(path: Path, tmp_path: Path) -> None:
    """As they were written before there was anything about clients in them: nothing passes."""
    meta = json.loads(zipfile.ZipFile(path).read("meta.json"))
    meta["schema"] = "khosnap/1"
    for name in ("image", "liveupdate", "scratch_free"):
        del meta[name]
    for name in ("page_types", "command_line"):
        del meta["kernel"][name]
    for side in filter(None, (meta["outgoing"], meta["incoming"])):
        for name in ("luo", "vmallocs", "owners"):
            del side[name]
    meta["chunks"] = {k: v for k, v in meta["chunks"].items() if not k.endswith("/claims")}
    without: dict[str, bytes | None] = {
        name: None for name in zipfile.ZipFile(path).namelist() if "/claims/" in name
    }
    old = tmp_path / path.name
    changes = {"meta.json": json.dumps(meta).encode(), **without}
    old.write_bytes(rewritten(changes, path.read_bytes()))
    facts = store.load_file(old)
    assert (facts.image, facts.liveupdate, facts.scratch_free) == (None, None, [])
    for side in filter(None, (facts.outgoing, facts.incoming)):
        assert (side.luo, side.vmallocs, side.owners, list(side.claims)) == (None, [], [], [])
    assert {"owners", "the kexec image"} <= {*facts.unrecorded}
    report = checks.check(facts)
    assert "not recorded by khoscope 0.1.0: the kexec image" in report.incomplete
    Text(io.StringIO()).verify(facts, report)


@pytest.mark.parametrize(
    ("compatible", "limits"),
    [("kho-v3", BlockLimits(1 << 31)), ("kho-v4", BlockLimits()), (None, BlockLimits())],
)
def test_limits_that_an_older_khoscope_did_not_record(
    compatible: str | None, limits: BlockLimits
) -> None:
    """Its files are of kernels that have them all the same."""

    def age(meta: dict[str, Any]) -> None:
        meta["schema"] = "khosnap/2"
        meta["abi"]["compatible"] = compatible
        del meta["abi"]["limits"]
        del meta["crash_image"]

    facts = load(with_meta(age))
    assert facts.abi.limits == limits
    assert facts.crash_image is None
    assert facts.unrecorded == []


def test_limits_and_the_crash_image_are_kept() -> None:
    abi = replace(PLAIN, limits=BlockLimits(1 << 31, 10))
    image = KexecImage(True, True, 0x2000, 1 << 20)
    facts = load(bytes_of(replace(snapshot(abi, []), crash_image=image)))
    assert (facts.abi.limits, facts.crash_image) == (abi.limits, image)


# Long lists


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> tuple[Snapshot, bytes]:
    """A snapshot with lists of several pieces, and its file."""
    monkeypatch.setattr(listed, "PIECE", 3)
    files = [LuoFile("vfio-v9", token, 0) for token in range(8)]
    sessions = [
        LuoSession("a", False, 8, files),
        LuoSession("b", False, 9, left_out=9),
        *(LuoSession(f"c{n}", True, 1, files[n : n + 1], ["a problem"]) for n in range(4)),
    ]
    made = snapshot(PLAIN, [])
    side = replace(
        made.outgoing,
        luo=Luo(0x6000, "luo-v5", 1, True, sessions),
        vmallocs=[Vmalloc(f"area {n}", n, n, 1, 1, 0, 1, 1) for n in range(7)],
        owners=[Owner(OwnerKind.FILE, f"owner {n}") for n in range(4)],
    )
    facts = replace(made, outgoing=side)
    return facts, bytes_of(facts)


def test_long_lists(pieces: tuple[Snapshot, bytes]) -> None:
    facts, data = pieces
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        meta = json.loads(archive.read("meta.json"))
        listed_in_meta = meta["outgoing"]["luo"]["sessions"]
        names = {*archive.namelist()}
    assert sum(1 + len(session["files"]) for session in listed_in_meta) == 3
    assert meta["outgoing"]["lists"] == {"sessions": 7, "vmallocs": 2, "owners": 1}
    assert {"out/sessions/000006.json", "out/vmallocs/000001.json"} <= names
    for again in (load(data), spooled(facts)):
        for name in ("luo", "vmallocs", "owners"):
            assert getattr(again.outgoing, name) == getattr(facts.outgoing, name)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"sessions": 7, "vmallocs": 2}, "is not among what it says to have"),
        ({"sessions": 7, "vmallocs": 3, "owners": 1}, "There is no item named"),
        ({"sessions": 7, "vmallocs": 2, "owners": 1, "flbs": 1}, "pieces of no list"),
        ({"sessions": 2**63, "vmallocs": 2, "owners": 1}, "There is no item named"),
    ],
)
def test_pieces_that_are_not_there(
    pieces: tuple[Snapshot, bytes], lists: dict[str, int], said: str
) -> None:
    with zipfile.ZipFile(io.BytesIO(pieces[1])) as archive:
        meta = json.loads(archive.read("meta.json"))
    meta["outgoing"]["lists"] = lists
    assert said in refused(rewritten({"meta.json": json.dumps(meta).encode()}, pieces[1]))


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (b"[]", "a piece of 0 owners"),
        (b'[{"kind":"file","name":"x","session":null,"token":null}]' * 2, "trailing"),
        (b'[{"kind":"file","name":"x","session":null}]', "token is not there"),
        (b'[{"kind":"LUO","name":"' + b"x" * (budget.TEXT + 1) + b'"}]', "letters"),
        (
            json.dumps([{"kind": "LUO", "name": "x", "session": None, "token": None}] * 4).encode(),
            "a piece of 4 owners",
        ),
    ],
)
def test_pieces_that_hold_anything(pieces: tuple[Snapshot, bytes], piece: bytes, said: str) -> None:
    assert said in refused(rewritten({"out/owners/000000.json": piece}, pieces[1]))


def test_more_files_than_a_file_has_room_for(
    pieces: tuple[Snapshot, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "entries", lambda size: 17)
    assert "more sessions, files or subtrees" in refused(pieces[1])
    monkeypatch.setattr(budget, "entries", lambda size: 18)
    load(pieces[1])
