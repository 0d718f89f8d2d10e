# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that are read are regular ones, and files that are written are whole, or not there."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drgn import Program

from khoscope import demo
from khoscope.facts import files, store
from khoscope.facts.files import NewFile, open_file, require_regular
from khoscope.sources.open import _load_debug_info
from khoscope.words.errors import KhoscopeError
from tests.command import Result, Run
from tests.synthetic import rich

REPOSITORY = Path(__file__).parent.parent
SNAPSHOT = demo.path("odd-after")


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With O_TMPFILE, and on a file system that has no such thing."""
    if request.param == "named":
        monkeypatch.setattr(files, "_unnamed", lambda directory: None)


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """What is no regular file."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        yield {
            "a FIFO": tmp_path / "fifo",
            "a FIFO by a link": tmp_path / "link",
            "a directory": tmp_path,
            "a device": Path("/dev/zero"),
            "a socket": tmp_path / "socket",
        }


# Reading


def test_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"is here")
    (tmp_path / "link").symlink_to(path)
    for name in ("file", "link"):
        with open_file(tmp_path / name, "hint") as file:
            assert file.read() == b"is here"
            assert not os.get_inheritable(file.fileno())


def test_a_memfd() -> None:
    """carry reads back what it has written."""
    handle = os.memfd_create("test")
    with open(handle, "wb") as memfd:
        memfd.write(b"is here")
        memfd.flush()
        with open_file(Path(f"/proc/self/fd/{handle}"), "hint") as file:
            assert file.read() == b"is here"


def test_what_is_none(odd: dict[str, Path]) -> None:
    for what, path in odd.items():
        for use in (open_file, require_regular):
            with pytest.raises(KhoscopeError, match="not a regular file") as caught:
                use(path, "a hint")
            assert caught.value.what.endswith(what.removesuffix(" by a link"))
            assert caught.value.hint == "a hint"
    for use in (open_file, require_regular):
        with pytest.raises(KhoscopeError, match="missing: No such file or directory"):
            use(odd["a directory"] / "missing", "a hint")


def test_what_becomes_another_file(odd: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening."""
    monkeypatch.setattr(files, "require_regular", lambda path, hint: None)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KhoscopeError, match="not a regular file, but a FIFO"):
        open_file(odd["a FIFO"], "a hint")
    assert os.listdir("/proc/self/fd") == before


OPTIONS = [
    "--snapshot ODD status",
    "--core ODD status",
    "--snapshot FILE verify --before ODD",
    "--core FILE snapshot --before ODD NEW",
    "--snapshot FILE owners --trace ODD",
    "--snapshot FILE verify --next ODD",
    "trace --replay ODD",
    "diff ODD FILE",
    "diff FILE ODD",
]


def words(command: str, odd: Path, directory: Path) -> list[str]:
    names = {"ODD": str(odd), "FILE": str(SNAPSHOT), "NEW": str(directory / "new")}
    return [names.get(word, word) for word in command.split()]


@pytest.mark.parametrize("command", OPTIONS)
def test_options_that_name_a_file(
    command: str, odd: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    """In processes of their own where we might wait for ever."""
    for what in ("a FIFO", "a device"):
        result = khoscope(*words(command, odd[what], tmp_path))
        result.refused(f"not a regular file, but {what}")
        assert result.out == ""
    run(*words(command, odd["a socket"], tmp_path)).refused("not a regular file, but a socket")
    # A directory may have one kernel in it.
    if "--next" not in command:
        result = run(*words(command, odd["a directory"], tmp_path))
        result.refused("not a regular file, but a directory")


def test_debug_info_that_is_no_file(odd: dict[str, Path]) -> None:
    for path in odd.values():
        with pytest.raises(KhoscopeError, match="not a regular file") as caught:
            _load_debug_info(Program(), path, "a kernel")
        assert "--vmlinux" in caught.value.hint


def khoscope(*words: object) -> Result:
    result = subprocess.run(
        [sys.executable, "-m", "khoscope", *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Result(result.returncode, result.stdout, result.stderr)


# Writing


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
@pytest.mark.parametrize("there", [False, True])
def test_private_under_any_umask(umask: int, there: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.khosnap"
    if there:
        path.write_bytes(b"was here")
        path.chmod(0o666)
    before = os.umask(umask)
    try:
        with NewFile(path) as new:
            new.file.write(b"is here")
            assert mode(Path(f"/proc/self/fd/{new.file.fileno()}")) == 0o600
            assert path.exists() == there
            new.finish()
            assert mode(path) == 0o600
    finally:
        os.umask(before)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"is here", [path])


@pytest.mark.usefixtures("way")
def test_what_is_not_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.khosnap"
    with NewFile(path) as new:
        new.file.write(b"is here")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), NewFile(path) as new:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("way")
def test_somebody_was_faster(tmp_path: Path) -> None:
    path = tmp_path / "a.khosnap"
    with NewFile(path) as new:
        new.file.write(b"is here")
        path.write_bytes(b"was faster")
        new.finish()
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"is here", [path])


@pytest.mark.usefixtures("way")
def test_a_name_that_cannot_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.khosnap"
    with NewFile(path) as new:
        path.mkdir()
        with pytest.raises(KhoscopeError, match="Is a directory"):
            new.finish()
    assert [each.is_dir() for each in tmp_path.iterdir()] == [True]


@pytest.mark.usefixtures("way")
def test_the_longest_name(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{GRINNING FACE}" * 63):
        path = tmp_path / name
        for _ in range(2):
            with NewFile(path) as new:
                new.finish()
        assert path.is_file()


@pytest.mark.usefixtures("way")
def test_the_directory_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last of all: when the file has its name."""
    synced: list[tuple[bool, bool]] = []
    path = tmp_path / "a.khosnap"

    def fsync(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with NewFile(path) as new:
        new.finish()
    assert synced == [(False, False), (True, True)]


#: Writes a snapshot, and stops in the middle until it is ended.
SLOW = """
import sys, time
from dataclasses import replace
from pathlib import Path
from typing import Any
from khoscope import cli
from khoscope.facts import files, store
from khoscope.commands import common
from tests.synthetic import rich

class Endless:
    def __iter__(self):
        yield from rich().outgoing.blocks
        print("writing", flush=True)
        # Python 3.14 may look for a signal that came before a sleep only after it.
        for _ in range(600):
            time.sleep(0.1)

if sys.argv[1] == "named":
    files._unnamed = lambda directory: None

class Source:
    def snapshot(self, before, file, contents):
        store.save(replace(rich(), stamps=Endless()), file)

common.kernel = lambda args, progress: Source()
sys.exit(cli.main(["snapshot", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("way", "number"),
    [
        *((way, n) for way in ("unnamed", "named") for n in ("INT", "TERM", "HUP")),
        ("unnamed", "KILL"),
        ("unnamed", "QUIT"),
    ],
)
def test_a_signal_leaves_nothing(way: str, number: str, tmp_path: Path) -> None:
    path = tmp_path / "a.khosnap"
    path.write_bytes(b"was here")
    with slow(way, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == (2 if way == "named" else 1)
        process.send_signal(signal.Signals[f"SIG{number}"])
        out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.Signals[f"SIG{number}"]
    assert (out, err) == ("", "khoscope: interrupted\n" if number == "INT" else "")
    assert path.read_bytes() == b"was here"
    assert list(tmp_path.iterdir()) == [path]


def slow(way: str, path: Path, *env: str) -> subprocess.Popen[str]:
    defaults = [f"--default-signal={name}" for name in ("INT", "TERM", "HUP", "QUIT")]
    return subprocess.Popen(
        ["env", *(env or defaults), sys.executable, "-c", SLOW, way, str(path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_that_is_ignored(tmp_path: Path) -> None:
    """nohup: the terminal goes away, and the file is written to its end."""
    with slow("unnamed", tmp_path / "a", "--ignore-signal=HUP", "--default-signal=TERM") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


def write(path: Path) -> None:
    with NewFile(path) as new:
        new.file.write(b"is here")
        new.finish()


def test_a_signal_while_the_name_is_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until that is done: between the link and the rename there are two names."""
    path = tmp_path / "a.khosnap"
    path.write_bytes(b"was here")
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert len(list(tmp_path.iterdir())) == 2
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"is here", [path])


def test_a_signal_that_another_thread_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it does not wait, and the second name goes all the same."""
    path = tmp_path / "a.khosnap"
    path.write_bytes(b"was here")

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"was here", [path])


def test_what_was_written_can_be_read(tmp_path: Path) -> None:
    store.save_file(rich(), tmp_path / "a.khosnap")
    assert store.load_file(tmp_path / "a.khosnap").taken == rich().taken


class Full(io.BytesIO):
    """A file on a disk that is full as soon as it has some bytes."""

    def write(self, data: Any) -> int:
        if self.tell() > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_is_full_is_told_by_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever reads a kernel meanwhile would take it for the kernel's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda size: Full())
    with (
        pytest.raises(KhoscopeError, match=f"{tmp_path}: No space left") as caught,
        store.Draft() as draft,
    ):
        draft.put(rich())
    assert "TMPDIR" in caught.value.hint
    monkeypatch.undo()
    with NewFile(tmp_path / "a.khosnap") as new:
        full = files.telling(Full(), new.told)
        with (
            pytest.raises(KhoscopeError, match=r"a\.khosnap: No space left"),
            store.Draft(full) as draft,
        ):
            draft.put(rich())
    assert list(tmp_path.iterdir()) == []
