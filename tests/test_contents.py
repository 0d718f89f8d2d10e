# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in preserved memfds: kept in snapshot files, and written out by ``khoscope luo``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khoscope.facts import contents, store
from khoscope.facts.clients import Content, Luo, LuoFile, LuoSession, LuoState, Memfd, StoredFd
from khoscope.facts.snapshot import Snapshot
from khoscope.words.errors import KhoscopeError
from tests.command import Run
from tests.synthetic import FIXED, snapshot
from tests.test_store import bytes_of, load

PAGE = 4096
RING = StoredFd("keeper.service", "ring")


def memfd(size: int) -> Memfd:
    return Memfd(0x62000, 0, size, 0, 0, 0, None, 0)


def made(*files: Content, stored: StoredFd | None = None) -> Snapshot:
    """A kernel with sessions of these files."""
    bare = snapshot(FIXED, [])
    sessions: dict[str, list[LuoFile]] = {}
    for each in files:
        file = LuoFile("memfd-v2", each.token, 0x62000, 0, memfd(each.size), stored=stored)
        sessions.setdefault(each.session, []).append(file)
    found = [LuoSession(name, False, len(of), of) for name, of in sessions.items()]
    return replace(
        bare,
        outgoing=replace(bare.outgoing, luo=Luo(0x1000, "luo-v5", 1, True, found)),
        liveupdate=LuoState(True, ["memfd-v2"]),
        contents=files,
    )


WHOLE = Content(False, "vm", 7, 10000, [b"a" * PAGE, b"b" * PAGE, b"c" * 1808])
PARTS = Content(False, "vm", 8, 4 * PAGE, [b"a" * PAGE, PAGE, PAGE, b"d" * PAGE])
SHORT = Content(False, "vm", 9, 4 * PAGE, [b"a" * PAGE])
EMPTY = Content(False, "vm", 10, 0, [])
TEXT = Content(False, "vm", 11, 5, ["{}\né".encode()])
EVERY = [WHOLE, PARTS, SHORT, EMPTY, TEXT]


# -- in a file -------------------------------------------------------------------------------------


def test_files_keep_them() -> None:
    found = list(load(bytes_of(made(*EVERY))).contents)
    assert [(c.incoming, c.session, c.token, c.size) for c in found] == [
        (False, "vm", c.token, c.size) for c in EVERY
    ]
    # Small pieces are joined, and so are those that cannot be read.
    for again in range(2):
        assert [list(c.pieces) for c in found] == [
            [b"a" * PAGE + b"b" * PAGE + b"c" * 1808],
            [b"a" * PAGE, 2 * PAGE, b"d" * PAGE],
            [b"a" * PAGE],
            [],
            ["{}\né".encode()],
        ], again


def test_pieces_of_a_large_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "PIECE", 2 * PAGE)
    many = replace(WHOLE, size=9 * PAGE, pieces=[bytes([n]) * PAGE for n in range(9)])
    data = bytes_of(made(many))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        sizes = [i.file_size for i in file.infolist() if i.filename.startswith("contents/")]
    assert sizes == [2 * PAGE] * 4 + [PAGE]
    (found,) = load(data).contents
    assert b"".join(map(bytes, found.pieces)) == b"".join(map(bytes, many.pieces))


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file of which somebody has changed what it says of contents."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bytes_of(made(*EVERY)))) as old:
        meta = json.loads(old.read("meta.json"))
        change(meta["contents"][1])
        with zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                data = json.dumps(meta).encode() if name == "meta.json" else old.read(name)
                new.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"size": 2**53},
        {"size": PAGE},
        {"pieces": -1},
        {"pieces": 2},
        {"pieces": 4},
        {"pieces": 2**40},
        {"gaps": []},
        {"gaps": [[1, 2**52]]},
        {"gaps": [[1, 0]]},
        {"gaps": [[1, -PAGE]]},
        {"gaps": [[3, PAGE]]},
        {"gaps": [[1, PAGE], [1, PAGE]]},
        {"gaps": [[1]]},
        {"gaps": [[1, 2, 3]]},
        {"token": 7},
    ],
)
def test_files_that_say_something_else(change: dict[str, Any]) -> None:
    with pytest.raises(KhoscopeError, match="not a whole snapshot file"):
        load(changed(lambda meta: meta.update(change)))


def test_an_older_file_has_none() -> None:
    """The demo's were written before."""
    path = Path(store.__file__).parent.parent / "demo" / "fixed-before.khosnap"
    assert list(store.load_file(path).contents) == []


# -- written out -----------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path: Path, run: Run) -> Callable[..., Any]:
    """Writes out what is in a file, to ``out``."""

    def ask(facts: Snapshot, *words: str) -> Any:
        path = tmp_path / "facts.khosnap"
        store.save_file(facts, path)
        return run("--snapshot", path, "luo", "--output", tmp_path / "out", "--content", *words)

    return ask


def test_whole(ask: Callable[..., Any], tmp_path: Path) -> None:
    result = ask(made(*EVERY), "7")
    assert (result.status, result.out, result.err) == (0, "", "")
    assert (tmp_path / "out").read_bytes() == b"".join(map(bytes, WHOLE.pieces))
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("token", "data", "missing"),
    [
        ("8", b"a" * PAGE + bytes(2 * PAGE) + b"d" * PAGE, "8,192 of 16,384"),
        ("0x9", b"a" * PAGE, "12,288 of 16,384"),
    ],
    ids=["unreadable", "no list"],
)
def test_what_is_missing_is_said(
    ask: Callable[..., Any], tmp_path: Path, token: str, data: bytes, missing: str
) -> None:
    result = ask(made(*EVERY), token)
    assert result.status == 3
    assert (tmp_path / "out").read_bytes() == data
    assert f"session vm, outgoing: {missing} bytes cannot be read" in result.err


def test_by_the_name_of_a_store(ask: Callable[..., Any], tmp_path: Path) -> None:
    assert ask(made(TEXT, stored=RING), "keeper.service ring").status == 0
    assert (tmp_path / "out").read_bytes() == "{}\né".encode()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("7", "--session", "none"), "no session has such a file: 7"),
        (("99",), "no session has such a file: 99"),
        (("keeper.service ring",), "no session has such a file: keeper.service ring"),
        (("7", "--incoming"), "no session has such a file: 7"),
        (("\x1b[2J",), "no session has such a file: \\x1b[2J"),
    ],
)
def test_no_such_file(ask: Callable[..., Any], words: tuple[str, ...], said: str) -> None:
    ask(made(*EVERY), *words).refused(said)


def test_which_of_several(ask: Callable[..., Any], tmp_path: Path) -> None:
    other = replace(TEXT, session="other", token=7)
    facts = made(WHOLE, other)
    ask(facts, "7").refused("there are several", "vm", "other", "--session")
    assert ask(facts, "7", "--session", "other").status == 0
    assert (tmp_path / "out").read_bytes() == "{}\né".encode()


def test_a_snapshot_without_them(ask: Callable[..., Any], tmp_path: Path) -> None:
    ask(replace(made(*EVERY), contents=()), "7").refused("does not have what is in files")
    assert not (tmp_path / "out").exists()


def test_what_goes_together(run: Run) -> None:
    for words, said in (
        (("luo", "--session", "vm"), "go with --content"),
        (("luo", "--json", "--content", "7"), "not allowed with argument"),
        (("--snapshot", "a", "snapshot", "b", "--with-content"), "--with-content needs a kernel"),
    ):
        result = run(*words)
        assert (result.status, result.out) == (2, "")
        assert said in result.err


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (TEXT, 0),
        (WHOLE, 0),
        (EMPTY, 0),
        (replace(TEXT, pieces=[b"\x1b[2J "]), 2),
        (replace(TEXT, pieces=[b"\0\0\0\0\0"]), 2),
        (replace(TEXT, pieces=[b"\xff\xff\xff\xff\xff"]), 2),
        (replace(TEXT, size=1 << 20, pieces=[b"a" * (1 << 20)]), 2),
    ],
    ids=["text", "lines", "empty", "escape", "zeros", "no text", "long"],
)
def test_a_terminal_gets_short_text(content: Content, status: int, tmp_path: Path) -> None:
    path = tmp_path / "facts.khosnap"
    store.save_file(made(content), path)
    terminal, theirs = pty.openpty()
    words = (sys.executable, "-m", "khoscope", "--snapshot", path, "luo", "--content")
    with open(terminal, "rb", buffering=0) as ours:
        command = subprocess.Popen([*words, f"{content.token}"], stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        # A terminal whose other end is closed gives an error.
        with contextlib.suppress(OSError):
            while part := ours.read(1 << 16):
                shown += part
    assert command.wait() == status
    if status:
        assert b"do not go to a terminal" in shown
    else:
        assert shown.replace(b"\r\n", b"\n") == b"".join(map(bytes, content.pieces))
