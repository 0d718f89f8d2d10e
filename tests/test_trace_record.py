# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recording of a trace: keeps everything, and is not believed when it is read."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khoscope.abi.keys import BAD_ORDER
from khoscope.facts import budget, store
from khoscope.facts.archive import RECORDING, SNAPSHOT
from khoscope.facts.calls import (
    FUNCTIONS,
    NO_ORDER,
    Action,
    Batch,
    Calls,
    Losses,
    Touches,
    Tracing,
    client,
    frames,
)
from khoscope.facts.columns import Blocks, Columns, Pages
from khoscope.trace import record
from khoscope.trace.record import Recorder, Recording, load
from khoscope.words.errors import KhoscopeError
from tests.synthetic import missing, rich, rich_before
from tests.test_store import bytes_of, npy, rewritten, same, same_columns

TRACING = Tracing(
    replace(rich_before(), watched=(), watching=None),
    {"kho_preserve_pages": "fentry", "kho_restore_folio": "kprobe"},
    missing(("kho_preserve_pages", "kho_restore_folio")),
    "16 MiB ring buffer",
    123_456_789,
)
LOSSES = Losses(lost=1, missed=2, sampled=3, unread=4, open=2**63)
SYMBOLS = {0xFFFFFFFF81000010: "kho_preserve_pages+0x10 [kernel]", 1: "init+0x1 [kho_test]"}


def random_columns(rng: np.random.Generator, kind: type[Columns], rows: int) -> dict[str, Any]:
    """Any bytes at all, and of bools true and false."""
    columns: dict[str, Any] = {}
    for name, text in kind.DTYPES.items():
        dtype = np.dtype(text)
        if dtype == np.bool_:
            columns[name] = rng.integers(0, 2, rows).astype(np.bool_)
        else:
            columns[name] = np.frombuffer(rng.bytes(rows * dtype.itemsize), dtype)
    return columns


def random_blocks(rng: np.random.Generator, rows: int) -> Blocks:
    columns = random_columns(rng, Blocks, rows)
    columns["order"] = rng.choice([*range(64), BAD_ORDER], rows).astype(np.uint8)
    columns["type"] = rng.integers(-1, 2, rows).astype(np.int8)
    return Blocks(**columns, pages=Pages(**random_columns(rng, Pages, rows)))


def random_touches(rng: np.random.Generator, calls: list[int]) -> Touches:
    """:param calls: the call of each."""
    rows = len(calls)
    columns = random_columns(rng, Touches, rows)
    columns["call"] = np.array(calls, np.uint64)
    columns["function"] = rng.integers(0, len(FUNCTIONS), rows).astype(np.uint8)
    columns["action"] = rng.integers(0, len(Action), rows).astype(np.int8)
    columns["before"] = rng.integers(0, 3, rows).astype(np.uint8)
    columns["after"] = rng.integers(0, 3, rows).astype(np.uint8)
    columns["asked"] = rng.choice([*range(64), NO_ORDER], rows).astype(np.uint8)
    blocks = random_blocks(rng, rows)
    return Touches(**columns, blocks=blocks, known=np.zeros(rows, np.bool_), was=Pages.blank(rows))


def random_batch(rng: np.random.Generator, depth: int, sizes: list[int], loose: int) -> Batch:
    """
    :param depth: of the stacks.
    :param sizes: touches of each call.
    :param loose: touches of other calls.
    """
    rows = len(sizes)
    columns = random_columns(rng, Calls, rows)
    columns["call"] = rng.choice(10**6, rows, replace=False).astype(np.uint64) << np.uint64(44)
    columns["function"] = rng.integers(0, len(FUNCTIONS), rows).astype(np.uint8)
    columns["enter"], columns["leave"] = (
        np.minimum(columns["enter"], columns["leave"]),
        np.maximum(columns["enter"], columns["leave"]),
    )
    columns["args"] = rng.integers(0, 2**64, (rows, 4), np.uint64)
    columns["stack"] = rng.integers(0, 2**64, (rows, depth), np.uint64)
    of = np.repeat(columns["call"], sizes).tolist()
    touches = random_touches(rng, [*of, *(2 * n + 1 for n in range(loose))])
    return Batch(Calls(**columns), touches)


def write(
    path: Path,
    batches: Iterable[Batch],
    tracing: Tracing = TRACING,
    symbols: dict[int, str] = SYMBOLS,
    losses: Losses = LOSSES,
) -> None:
    with Recorder(path, tracing.facts) as recorder:
        for batch in batches:
            recorder.add(batch)
        recorder.finish(tracing, symbols, losses)


def some_batches() -> list[Batch]:
    rng = np.random.default_rng(3)
    return [
        random_batch(rng, 5, [3, 0, 7, 1], 0),
        random_batch(rng, 5, [], 4),
        random_batch(rng, 5, [], 0),
        random_batch(rng, 5, [0, 0], 0),
        random_batch(rng, 5, [2], 2),
    ]


@contextlib.contextmanager
def limits(monkeypatch: pytest.MonkeyPatch, **values: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setattr(record, name, value)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A recording of two chunks."""
    path = tmp_path_factory.mktemp("whole") / "a.khotrace"
    with limits(pytest.MonkeyPatch(), ENOUGH=12):
        write(path, some_batches())
    return path.read_bytes()


def opened(data: bytes) -> Recording:
    return record._load(io.BytesIO(data), "test.khotrace")


def kept(batches: Iterable[Batch]) -> list[Batch]:
    """Those that say anything."""
    return [batch for batch in batches if len(batch.calls) or len(batch.touches)]


def same_batches(a: Iterable[Batch], b: Iterable[Batch]) -> None:
    for left, right in zip(a, b, strict=True):
        # Without calls there is no depth of stacks.
        if len(left.calls) or len(right.calls):
            same_columns(left.calls, right.calls)
        same_columns(left.touches, right.touches)


def same_recording(recording: Recording, batches: Iterable[Batch]) -> None:
    """It says what was recorded, with the facts that are always the same here."""
    same(recording.tracing.facts, TRACING.facts)
    assert replace(recording.tracing, facts=TRACING.facts) == TRACING
    assert recording.losses == LOSSES
    assert {address: recording.symbols(address) for address in SYMBOLS} == SYMBOLS
    same_batches(recording.batches, kept(batches))


def use(recording: Recording) -> None:
    """Whatever can be done with a recording here."""
    list(recording.tracing.facts.outgoing.blocks)
    for batch in recording.batches:
        starts = batch.starts()
        assert (np.diff(starts) >= 0).all()
        assert starts[-1] <= len(batch.touches)
        for function, stack in zip(batch.calls.function, batch.calls.stack, strict=True):
            assert FUNCTIONS[function].short
            assert frames(stack.tolist(), recording.symbols) is not None
            assert client(stack.tolist(), recording.symbols)
        assert len(batch.touches.succeeded) == len(batch.touches)
        assert batch.touches.blocks.end(12).dtype == np.uint64
        for action in batch.touches.action:
            Action(action)
        assert not batch.touches.known.any()
        assert not batch.touches.was.private.any()


def refused(data: bytes, match: str = "not a whole recording") -> str:
    """What is said of a file that must be refused, when it is opened or when it is used."""
    with pytest.raises(KhoscopeError, match=match) as caught:
        use(opened(data))
    assert "\n" not in caught.value.what
    assert caught.value.hint
    return caught.value.what


# A whole file


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.khotrace"
    write(path, some_batches())
    recording = load(path)
    same_recording(recording, some_batches())
    # As often as one likes.
    same_recording(recording, some_batches())
    use(recording)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(0, record.MOST_FRAMES),
    shape=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 4))),
    enough=st.sampled_from([1, 7, record.ENOUGH]),
    seed=st.integers(0, 2**32),
)
def test_any_batches(
    depth: int, shape: list[tuple[list[int], int]], enough: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = [random_batch(rng, depth, sizes, loose) for sizes, loose in shape]
    with TemporaryDirectory() as directory, limits(pytest.MonkeyPatch(), ENOUGH=enough):
        path = Path(directory) / "a.khotrace"
        write(path, batches)
        recording = load(path)
        same_recording(recording, batches)
        use(recording)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), max_size=12),
    loose=st.integers(0, 20),
    most_calls=st.integers(1, 5),
    most_touches=st.integers(1, 9),
)
def test_batch_that_is_too_large(
    sizes: list[int], loose: int, most_calls: int, most_touches: int
) -> None:
    batch = random_batch(np.random.default_rng(1), 2, sizes, loose)
    most = {"MOST_CALLS": most_calls, "MOST_TOUCHES": most_touches}
    with TemporaryDirectory() as directory, limits(pytest.MonkeyPatch(), **most):
        path = Path(directory) / "a.khotrace"
        write(path, [batch])
        parts = list(load(path).batches)
    assert all(len(part.calls) <= most_calls for part in parts)
    assert all(len(part.touches) <= most_touches for part in parts)
    if parts:
        same_columns(Touches.concatenate(part.touches for part in parts), batch.touches)
        found = Calls.concatenate(part.calls for part in parts)
        same_batches([Batch(found, Touches.empty())], [Batch(batch.calls, Touches.empty())])
    # A call that fits has all that it did with it.
    for part in parts:
        for call, count in zip(part.calls.call, np.diff(part.starts()), strict=True):
            size = sizes[batch.calls.call.tolist().index(call)]
            assert count == size or size > most_touches


def test_nothing_happened(tmp_path: Path) -> None:
    write(tmp_path / "a.khotrace", [], symbols={}, losses=Losses())
    recording = load(tmp_path / "a.khotrace")
    assert list(recording.batches) == []
    assert recording.losses == Losses()
    assert recording.symbols(0xFFFFFFFF81000010) == "[unknown]"


def test_facts_of_a_rich_kernel(tmp_path: Path) -> None:
    tracing = replace(TRACING, facts=rich())
    write(tmp_path / "a.khotrace", some_batches(), tracing)
    same(load(tmp_path / "a.khotrace").tracing.facts, rich())


def test_what_is_attached_is_said_at_the_end(tmp_path: Path) -> None:
    tracing = replace(TRACING, attached={**TRACING.attached, "kho_preserve_folio": "fentry"})
    with Recorder(tmp_path / "a.khotrace", TRACING.facts) as recorder:
        recorder.finish(tracing, {}, Losses())
    assert load(tmp_path / "a.khotrace").tracing.attached == tracing.attached


# Writing


def test_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a.khotrace"
    path.write_bytes(b"was here")
    path.chmod(0o666)
    with Recorder(path, TRACING.facts) as recorder:
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == b"was here"
        recorder.finish(TRACING, {}, Losses())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError(errno.EPIPE, "x"), None])
@pytest.mark.parametrize("enough", [1, record.ENOUGH])
def test_trace_that_dies_leaves_the_old_file(
    error: BaseException | None, enough: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.khotrace"
    path.write_bytes(b"was here")
    with limits(monkeypatch, ENOUGH=enough), contextlib.ExitStack() as stack:
        if error is not None:
            # As it is: what goes wrong elsewhere is not said of the file.
            stack.enter_context(pytest.raises(type(error)))
        recorder = stack.enter_context(Recorder(path, TRACING.facts))
        for batch in some_batches():
            recorder.add(batch)
        if error is not None:
            raise error
    assert path.read_bytes() == b"was here"
    assert list(tmp_path.iterdir()) == [path]


def test_facts_that_cannot_be_read_leave_nothing(tmp_path: Path) -> None:
    class Failing:
        def __iter__(self) -> Iterator[Blocks]:
            yield from rich().outgoing.blocks
            raise KeyboardInterrupt

    tracing = replace(TRACING, facts=replace(rich(), stamps=Failing()))
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path / "a.khotrace", tracing.facts):
        pytest.fail("began without its facts")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0, 0.1, 0.7, 0.99])
def test_full_disk(share: float, tmp_path: Path) -> None:
    """Whenever it is noticed: with the facts, a batch, or at the end."""
    path = tmp_path / "a.khotrace"
    write(path, some_batches())
    size = path.stat().st_size
    path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
    try:
        with pytest.raises(KhoscopeError, match="File too large") as caught:
            write(path, some_batches())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.what.startswith(str(path))
    assert "has space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("missing/a.khotrace", "file/a.khotrace", "x" * 300):
        with pytest.raises(KhoscopeError) as caught:
            Recorder(tmp_path / path, TRACING.facts)
        assert "directory that you can write to" in caught.value.hint


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """As root, `khoscope trace --record /dev/null` would put a file in its place."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    link.symlink_to(target)
    for path in (pipe, link, tmp_path):
        with pytest.raises(KhoscopeError, match="is not a file"):
            Recorder(path, TRACING.facts)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert not target.exists()


@pytest.mark.parametrize("depth", [4, 6, 200])
def test_stacks_of_another_depth(depth: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with Recorder(tmp_path / "a.khotrace", TRACING.facts) as recorder:
        recorder.add(random_batch(rng, 5, [1], 0))
        recorder.add(Batch(Calls.empty(), random_touches(rng, [1])))
        with pytest.raises(ValueError, match=f"stacks of {depth} frames after 5"):
            recorder.add(random_batch(rng, depth, [1], 0))
    assert list(tmp_path.iterdir()) == []


# Damage


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(KhoscopeError) as caught:
            load(path)
        assert "khoscope trace --record" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 5000, bytes(100_000)])
def test_not_a_recording(data: bytes) -> None:
    refused(data)


def test_snapshot_by_mistake(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes_of(rich()))
    with pytest.raises(KhoscopeError, match="a snapshot file, where a recording is") as caught:
        load(tmp_path / "a")
    assert "--snapshot" in caught.value.hint
    (tmp_path / "b").write_bytes(whole)
    with pytest.raises(KhoscopeError, match="a recording, where a snapshot file is") as caught:
        store.load_file(tmp_path / "b")
    assert "--replay" in caught.value.hint


def test_truncated_anywhere(whole: bytes) -> None:
    for length in range(0, len(whole), max(len(whole) // 300, 1)):
        refused(whole[:length])


def told_or_same(data: bytes) -> None:
    with contextlib.suppress(KhoscopeError):
        same_recording(opened(data), some_batches())


def test_flipped_bits(whole: bytes) -> None:
    rng = np.random.default_rng(1)
    # The members' own bytes, and those of the directory at the end.
    directory = whole.index(b"PK\x01\x02")
    for part in (range(directory), range(directory, len(whole))):
        for at in rng.choice(part, 500, replace=False).tolist():
            data = bytearray(whole)
            data[at] ^= 1 << int(rng.integers(8))
            told_or_same(bytes(data))  # some bits mean nothing, such as a time stamp


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_members_that_were_changed_by_somebody_who_fixed_the_checksums(
    whole: bytes, data: st.DataObject
) -> None:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        names = [name for name in archive.namelist() if not name.startswith("facts/")]
        name = data.draw(st.sampled_from([*names, "facts/meta.json"]))
        content = bytearray(archive.read(name))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(KhoscopeError):
        use(opened(rewritten({name: bytes(content)}, whole)))


def test_missing_members(whole: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        names = [n for n in archive.namelist() if not n.startswith("facts/") or "out/blocks" in n]
    assert len(names) > 60
    for name in names:
        refused(rewritten({name: None}, whole))


CALLS, TOUCHES = 4, 15  # of the first chunk


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("calls/000000.call", np.zeros(CALLS, "<u8")),
        ("calls/000000.call", np.arange(CALLS + 1, dtype="<u8")),
        ("calls/000000.call", np.arange(CALLS, dtype="<i8")),
        ("calls/000000.function", np.full(CALLS, len(FUNCTIONS), "|u1")),
        ("calls/000000.tid", np.zeros(CALLS - 1, "<u4")),
        ("calls/000000.comm", np.zeros(CALLS, "|S17")),
        ("calls/000000.comm", np.zeros(CALLS, "|S15")),
        ("calls/000000.comm", np.zeros(CALLS, "<U4")),
        ("calls/000000.comm", np.zeros((CALLS, 16), "|S1")),
        ("calls/000000.name", np.zeros(CALLS, "|V32")),
        ("calls/000000.name", np.zeros(CALLS, [("a", "<u8", 4)])),
        ("calls/000000.name", np.zeros(CALLS, object)),
        ("calls/000000.enter", np.full(CALLS, 2**64 - 1, "<u8")),
        ("calls/000000.args", np.zeros((CALLS, 5), "<u8")),
        ("calls/000000.args", np.zeros((CALLS, 3), "<u8")),
        ("calls/000000.args", np.zeros(4 * CALLS, "<u8")),
        ("calls/000000.args", np.asfortranarray(np.zeros((CALLS, 4), "<u8"))),
        ("calls/000000.stack", np.zeros((CALLS, 4), "<u8")),
        ("calls/000000.stack", np.zeros((CALLS, 6), "<u8")),
        ("calls/000000.stack", np.zeros((CALLS, 0), "<u8")),
        ("calls/000001.stack", np.zeros((3, 4), "<u8")),
        ("touches/000000.function", np.full(TOUCHES, 255, "|u1")),
        ("touches/000000.action", np.full(TOUCHES, -1, "|i1")),
        ("touches/000000.action", np.full(TOUCHES, len(Action), "|i1")),
        ("touches/000000.before", np.full(TOUCHES, 3, "|u1")),
        ("touches/000000.after", np.full(TOUCHES, 255, "|u1")),
        ("touches/000000.asked", np.full(TOUCHES, 64, "|u1")),
        ("touches/000000.as_folio", np.full(TOUCHES, 2, "|u1").view(np.bool_)),
        ("touches/000000.as_folio", np.zeros(TOUCHES, "|u1")),
        ("touches/000000.blocks.order", np.full(TOUCHES, 64, "|u1")),
        ("touches/000000.blocks.type", np.full(TOUCHES, 2, "|i1")),
        ("touches/000000.blocks.key", np.zeros(TOUCHES + 1, "<u8")),
        ("touches/000000.blocks.pages.head", np.zeros(TOUCHES - 1, "<i4")),
        ("batches/000000.calls", np.array([CALLS, 0, 0], "<u4")),
        ("batches/000000.calls", np.array([2**32 - 1, 1], "<u4")),
        ("batches/000000.touches", np.array([2**32 - 1, 1], "<u4")),
        ("batches/000000.touches", np.array([TOUCHES - 1, 0], "<u4")),
        ("batches/000000.touches", np.array([TOUCHES], "<i4")),
    ],
)
def test_column_that_is_not_ours(name: str, values: Any, whole: bytes) -> None:
    refused(rewritten({f"{name}.npy": npy(values, allow_pickle=True)}, whole))


def test_touches_in_another_order(whole: bytes) -> None:
    batch = some_batches()[0]
    loose = some_batches()[1].touches.call
    own = batch.touches.call
    for wrong in (np.roll(own, 1), own[::-1]):
        values = np.concatenate([wrong, loose])
        what = refused(rewritten({"touches/000000.call.npy": npy(values)}, whole))
        assert "calls and touches that do not fit" in what


def test_empty_batches_without_end(whole: bytes) -> None:
    """A few bytes, compressed, would be many million batches."""
    changes: dict[str, bytes | None] = {
        f"batches/000000.{name}.npy": npy(np.zeros(10**6, "<u4")) for name in ("calls", "touches")
    }
    assert "batches that khoscope does not write" in refused(rewritten(changes, whole))


@pytest.mark.parametrize("shape", ["(1152921504606846976, 4)", "(4, 4611686018427387904)", "(-4,)"])
def test_absurd_shape(shape: str, whole: bytes) -> None:
    header = f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}"
    raw = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n"
    for name in ("call", "args", "stack"):
        refused(rewritten({f"calls/000000.{name}.npy": raw + bytes(128)}, whole))


def test_pickle_in_an_array_is_not_run(whole: bytes) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("the file was unpickled",)

    for name in ("comm", "stack"):
        trap = npy(np.array([Trap()] * CALLS, object), allow_pickle=True)
        refused(rewritten({f"calls/000000.{name}.npy": trap}, whole))


def test_bomb(whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "META", 1 << 20)
    monkeypatch.setattr(budget, "MEMBER", 1 << 20)
    for name in ("meta.json", "facts/meta.json", "calls/000000.comm.npy"):
        file = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(whole)) as old,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for each in old.namelist():
                archive.writestr(each, bytes(1 << 26) if each == name else old.read(each))
        assert len(file.getvalue()) < len(whole) + (1 << 17)
        assert "larger than any chunk" in refused(file.getvalue())


def test_two_members_of_one_name(whole: bytes) -> None:
    file = io.BytesIO(whole)
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(file, "a") as archive,
    ):
        archive.writestr("meta.json", b"{}")
    assert "members of one name" in refused(file.getvalue())


def with_meta(whole: bytes, change: Callable[[dict[str, Any]], object], name: str = "") -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        meta = json.loads(archive.read(f"{name}meta.json"))
    change(meta)
    return rewritten({f"{name}meta.json": json.dumps(meta).encode()}, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": -1},
        {"chunks": 3},
        {"chunks": 10**18},
        {"chunks": 1.5},
        {"frames": 4},
        {"frames": -1},
        {"frames": 10**9},
        {"started": -1},
        {"started": 2**64},
        {"started": 10**400},
        {"losses": {"lost": -1}},
        {"losses": {"lost": 2**64}},
        {"losses": None},
        {"functions": [f.name for f in FUNCTIONS[1:]]},
        {"functions": {}},
        {"attached": {"do_exit": "fentry"}},
        {"attached": {"kho_preserve_folio": "magic"}},
        {"attached": {"kho_preserve_folio": 1}},
        {"missing": {"do_exit": "gone"}},
        {"missing": {"kho_preserve_folio": "\x1b[2J"}},
        {"buffer": "\x1b]0;title\x07"},
        {"buffer": "x" * 10_000},
        {"symbols": {"0x10": "two\nlines"}},
        {"symbols": {"0x10": "\x1b[31m"}},
        {"symbols": {"0x10": "x" * 10_000}},
        {"symbols": {"0x10": 5}},
        {"symbols": {"10": "x"}},
        {"symbols": {"0x10000000000000000": "x"}},
        {"symbols": {"-0x1": "x"}},
        {"symbols": ["x"]},
        {"schema": "khotrace"},
        {"schema": "khotrace/-1"},
        {"schema": "somethingelse/1"},
    ],
)
def test_meta_that_is_not_ours(change: dict[str, Any], whole: bytes) -> None:
    refused(with_meta(whole, lambda meta: meta.update(change)))


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'"khotrace/1"'])
def test_meta_that_is_none(content: bytes, whole: bytes) -> None:
    for name in ("meta.json", "facts/meta.json"):
        refused(rewritten({name: content}, whole))


def test_symbols_without_end(whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_SYMBOLS", 1)
    assert "more symbols" in refused(whole)


def test_newer_schema(whole: bytes) -> None:
    for name, known in (("", RECORDING), ("facts/", SNAPSHOT)):
        schema = f"{known.name}/{known.version + 1}"
        newer = {"schema": schema, "unheard_of": {}}
        data = with_meta(whole, lambda meta, newer=newer: meta.update(newer), name)  # type: ignore[misc]
        refused(data, rf"schema is {schema}, this .* reads up to {known.schema}")


@pytest.mark.parametrize("version", [1, 2])
def test_older_schema(version: int, whole: bytes) -> None:
    """Nobody counted what no kernel of then could hide."""

    def older(meta: dict[str, Any]) -> None:
        meta["schema"] = f"khotrace/{version}"
        del meta["losses"]["unseen"]

    assert opened(with_meta(whole, older)).losses.unseen == 0
    refused(with_meta(whole, lambda meta: meta["losses"].pop("unseen")))


def test_facts_of_another_kind(whole: bytes) -> None:
    data = with_meta(whole, lambda meta: meta.update(schema="khotrace/1"), "facts/")
    refused(data, "a recording, where a snapshot file is needed")


def test_facts_are_checked(whole: bytes) -> None:
    data = with_meta(whole, lambda meta: meta["abi"].update(page_shift=60), "facts/")
    refused(data)
