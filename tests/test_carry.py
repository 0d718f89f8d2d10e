# SPDX-License-Identifier: LGPL-2.1-or-later
"""A snapshot's way through LUO, with real memfds and everything else of LUO's made up."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pytest

from khoscope.carry import memfd as carry
from khoscope.carry.memfd import retrieve
from khoscope.cli import main
from khoscope.facts import store
from khoscope.facts.carried import SESSION, TOKEN
from khoscope.facts.snapshot import Snapshot
from khoscope.sources import host_files
from khoscope.words.errors import KhoscopeError
from tests.synthetic import FIXED, Block, rich, rich_before, snapshot

REPOSITORY = Path(__file__).parent.parent
BOOT_ID = "00000000-0000-0000-0000-000000000001"


class Luo:
    """Sessions by name, files by token; each step fails with the errno that it is told to."""

    def __init__(self) -> None:
        self.outgoing: dict[str, FakeSession] = {}
        self.incoming: dict[str, FakeSession] = {}
        self.fails: dict[str, int] = {}
        self.devices = 0
        #: Bytes of each preserved file that were never written.
        self.holes: list[int] = []

    def step(self, name: str) -> None:
        if name in self.fails:
            raise OSError(self.fails[name], os.strerror(self.fails[name]))

    def kexec(self) -> None:
        """What is preserved now will be retrieved; the sessions' owner does not live to end it."""
        for session in self.outgoing.values():
            self.incoming[session.name] = handed = FakeSession(self, session.name)
            handed.files = {token: os.dup(fd) for token, fd in session.files.items()}

    def preserved(self) -> bool:
        return any(session.files for session in self.outgoing.values())

    def open(self) -> FakeDevice:
        self.step("open")
        assert not self.devices, "busy"
        self.devices += 1
        return FakeDevice(self)


@dataclass
class FakeDevice:
    luo: Luo

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.luo.devices -= 1

    def create_session(self, name: str) -> FakeSession:
        self.luo.step("create")
        assert name not in self.luo.outgoing
        self.luo.outgoing[name] = FakeSession(self.luo, name)
        return self.luo.outgoing[name]

    def retrieve_session(self, name: str) -> FakeSession:
        self.luo.step("retrieve")
        if name not in self.luo.incoming:
            raise OSError(errno.ENOENT, "No such file or directory")
        return self.luo.incoming[name]


@dataclass
class FakeSession:
    luo: Luo
    name: str
    files: dict[int, int] = field(default_factory=dict)
    finished: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for fd in self.files.values():
            os.close(fd)
        self.files = {}
        for sessions in (self.luo.outgoing, self.luo.incoming):
            if sessions.get(self.name) is self:
                del sessions[self.name]

    def preserve_fd(self, fd: int, token: int) -> None:
        self.luo.step("preserve")
        stat = os.fstat(fd)
        self.luo.holes.append(max(stat.st_size - 512 * stat.st_blocks, 0))
        # As shmem_freeze(): no other size from now on.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self.files[token] = os.dup(fd)

    def retrieve_fd(self, token: int) -> int:
        self.luo.step("retrieve file")
        # LUO preserves the position, too.
        return os.dup(self.files[token])

    def finish(self) -> None:
        self.luo.step("finish")
        self.finished = True


@pytest.fixture
def luo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Luo:
    luo = Luo()
    (tmp_path / "boot_id").write_text(f"{BOOT_ID}\n")
    monkeypatch.setattr(carry, "LiveUpdate", luo.open)
    monkeypatch.setattr(carry, "DIRECTORY", tmp_path / "khoscope")
    monkeypatch.setattr(host_files, "BOOT_ID", tmp_path / "boot_id")
    return luo


def contents(facts: Snapshot) -> bytes:
    file = io.BytesIO()
    store.save(facts, file)
    return file.getvalue()


def writing(take: Callable[[], Snapshot]) -> Callable[[IO[bytes]], None]:
    return lambda file: store.save(take(), file)


def blocks(count: int) -> Snapshot:
    return snapshot(FIXED, [Block(0x1000000 + 0x2000 * i, 0) for i in range(count)])


def test_to_the_next_kernel(luo: Luo) -> None:
    facts = rich_before()
    with carry.carry(writing(lambda: facts)) as carried:
        assert luo.devices == 0, "others must be able to open it"
        assert list(luo.outgoing) == [SESSION]
        (memfd,) = luo.outgoing[SESSION].files.values()
        whole = os.pread(memfd, carried.room + 1, 0)
        assert len(whole) == carried.room
        assert len(contents(facts)) == carried.size
        assert whole.endswith(contents(facts))
        assert not any(whole[: -carried.size])
        assert contents(carried.facts) == contents(facts)
        luo.kexec()
    assert luo.outgoing == {}
    session = luo.incoming[SESSION]
    path = retrieve()
    assert session.finished
    assert luo.incoming == {}
    assert contents(store.load_file(path)) == contents(facts)
    assert path.name == f"carried-{BOOT_ID}.khosnap"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    # LUO has it no more, and is not asked.
    luo.fails["open"] = errno.EBUSY
    assert retrieve() == path


def test_the_snapshot_is_taken_when_the_memfd_is_preserved(luo: Luo) -> None:
    seen: list[bool] = []

    def take() -> Snapshot:
        seen.append(luo.preserved())
        return rich_before()

    with carry.carry(writing(take)):
        assert seen == [True]


def test_the_memfd_has_no_holes_when_it_is_preserved(
    luo: Luo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """memfd-v1 forgets what is written into a hole afterwards."""
    monkeypatch.setattr(carry, "_room", lambda _: 3 * carry.PIECE + 5 * 4096)
    with carry.carry(writing(rich_before)) as carried:
        assert carried.room > 3 * carry.PIECE
    assert luo.holes == [0]


def test_a_snapshot_that_is_too_large_at_first(luo: Luo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "SLACK", 4096)
    facts = rich_before()
    assert len(contents(facts)) > 4096
    with carry.carry(writing(lambda: facts)) as carried:
        assert carried.room % 4096 == 0
        assert carried.size < carried.room <= 2 * len(contents(facts)) + 4096
        assert list(luo.outgoing) == [SESSION]
        assert contents(carried.facts) == contents(facts)


def test_a_tree_that_grows_too_fast(luo: Luo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "_room", lambda size: size // 2)
    taken: list[Snapshot] = []

    def take() -> Snapshot:
        taken.append(blocks(100))
        return taken[-1]

    with pytest.raises(KhoscopeError, match="grows faster") as caught, carry.carry(writing(take)):
        pass
    assert "come to rest" in caught.value.hint
    assert len(taken) == carry.ATTEMPTS
    assert luo.outgoing == {}


def test_what_fits_exactly(luo: Luo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zip fills the memfd from its first byte to its last."""
    facts = rich_before()
    size = len(contents(facts))
    monkeypatch.setattr(carry, "_room", lambda _: size)
    with carry.carry(writing(lambda: facts)) as carried:
        assert carried.size == carried.room == size
        assert contents(carried.facts) == contents(facts)


def test_nothing_is_left_when_it_ends_in_between(luo: Luo) -> None:
    def take() -> Snapshot:
        assert luo.preserved()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), carry.carry(writing(take)):
        pass
    assert luo.outgoing == {}


WRITING = [
    ("open", errno.ENOENT, "LUO is off", "liveupdate=on"),
    ("open", errno.EACCES, "permission denied", "root"),
    ("open", errno.EPERM, "permission denied", "root"),
    ("open", errno.EBUSY, "busy", "`khoscope luo`"),
    ("open", errno.EIO, "could not read the LUO sessions", "reboot"),
    ("open", errno.ENFILE, "cannot open /dev/liveupdate: Too many open files", "log"),
    ("create", errno.EEXIST, "another khoscope carry runs", "end that one"),
    ("create", errno.ENOTTY, "cannot create the LUO session", "log"),
    ("preserve", errno.ENOENT, "does not preserve memfds", "CONFIG_LIVEUPDATE_MEMFD"),
    ("preserve", errno.ENOMEM, "not enough memory", "free some"),
    ("preserve", errno.EOPNOTSUPP, "cannot preserve a memfd", "log"),
]


@pytest.mark.parametrize(("step", "number", "what", "hint"), WRITING)
def test_luo_refuses_to_carry(luo: Luo, step: str, number: int, what: str, hint: str) -> None:
    luo.fails[step] = number
    with pytest.raises(KhoscopeError) as caught, carry.carry(writing(rich_before)):
        pass
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert luo.outgoing == {}
    assert luo.devices == 0


READING = [
    *WRITING[:5],
    ("retrieve", errno.ENOENT, "nothing was carried", "khoscope carry"),
    ("retrieve", errno.EINVAL, "somebody else is retrieving", "again in a moment"),
    ("retrieve", errno.ENOTTY, "cannot retrieve the LUO session", "log"),
    ("retrieve file", errno.ENOENT, "holds no snapshot", "not made by khoscope"),
    ("retrieve file", errno.ENOMEM, "cannot retrieve the snapshot", "log"),
]


@pytest.mark.parametrize(("step", "number", "what", "hint"), READING)
def test_luo_refuses_to_give_back(luo: Luo, step: str, number: int, what: str, hint: str) -> None:
    with carry.carry(writing(rich_before)):
        luo.kexec()
    luo.fails[step] = number
    with pytest.raises(KhoscopeError) as caught:
        retrieve()
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert luo.devices == 0
    assert not carry.DIRECTORY.exists()


def test_a_directory_that_was_there_stays(luo: Luo) -> None:
    carry.DIRECTORY.mkdir()
    with pytest.raises(KhoscopeError, match="nothing was carried"):
        retrieve()
    assert list(carry.DIRECTORY.iterdir()) == []


def test_a_directory_that_nobody_else_enters(luo: Luo) -> None:
    with carry.carry(writing(rich_before)):
        luo.kexec()
    mask = os.umask(0o777)
    try:
        path = retrieve()
    finally:
        os.umask(mask)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (carry.DIRECTORY, path)]
    assert modes == [0o700, 0o600]


def test_no_space_for_it(luo: Luo, monkeypatch: pytest.MonkeyPatch) -> None:
    with carry.carry(writing(rich_before)):
        luo.kexec()

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(KhoscopeError, match="no space for what was carried, and LUO hands") as c:
        retrieve()
    assert "/run" in c.value.hint
    assert not carry.DIRECTORY.exists()


def test_a_place_for_it_is_there_before_it_is_taken(luo: Luo) -> None:
    with carry.carry(writing(rich_before)):
        luo.kexec()
    carry.DIRECTORY.write_text("in the way")
    with pytest.raises(KhoscopeError, match=r"cannot keep anything in .*: File exists"):
        retrieve()
    assert SESSION in luo.incoming
    carry.DIRECTORY.unlink()
    retrieve()


@pytest.fixture
def garbage(luo: Luo) -> Iterator[None]:
    """A kexec between the preserve and the end of the snapshot: zeros."""
    with os.fdopen(os.memfd_create("zeros"), "r+b") as memfd:
        memfd.truncate(1 << 20)
        luo.incoming[SESSION] = FakeSession(luo, SESSION, {TOKEN: os.dup(memfd.fileno())})
        yield


@pytest.mark.usefixtures("garbage")
def test_what_comes_back_is_not_believed(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["verify", "--before", "carried"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        first, _ = said.err.splitlines()
        assert "not a whole snapshot file" in first


def test_the_word_and_a_file_of_that_name(
    luo: Luo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store.save_file(rich(), Path("after"))
    store.save_file(rich_before(), Path("carried"))
    arguments = ["--snapshot", "after", "verify", "--json", "--before"]
    assert main([*arguments, "./carried"]) == 1
    assert json.loads(capsys.readouterr().out)["schema"] == "khoscope.verify/1"
    assert main([*arguments, "carried"]) == 2
    assert "nothing was carried" in capsys.readouterr().err


#: khoscope as it is, but for the kernel.
COMMAND = """
import sys
from khoscope.carry import memfd as carry
from khoscope.__main__ import main
from khoscope.commands import common
from khoscope.facts import store
from tests.synthetic import rich_before
from tests.test_carry import Luo

class Source:
    def snapshot(self, file):
        store.save(rich_before(), file)

luo = Luo()
carry.LiveUpdate = luo.open
common.kernel = lambda args, progress: Source()
try:
    sys.exit(main())
finally:
    assert not luo.outgoing
"""


def running(*words: str, ignored: str = "") -> subprocess.Popen[str]:
    # What runs in the background of a script ignores Ctrl-C, and so would all that it starts.
    signals = ["--default-signal=INT"] if not ignored else [f"--ignore-signal={ignored}"]
    return subprocess.Popen(
        ["env", *signals, sys.executable, "-c", COMMAND, *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "more", "ignored"),
    [
        (signal.SIGINT, "khoscope: interrupted\n", ""),
        (signal.SIGTERM, "", ""),
        # A script's job in the background.
        (signal.SIGINT, "khoscope: interrupted\n", "INT"),
    ],
)
def test_it_stays_until_it_is_ended(number: signal.Signals, more: str, ignored: str) -> None:
    with running("carry", ignored=ignored) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        shown = [process.stdout.readline()]
        while not shown[-1].startswith("khoscope stays"):
            shown.append(process.stdout.readline())
            assert shown[-1], process.stderr.read()
        process.send_signal(number)
        assert process.stderr.read() == f"khoscope: nothing is carried any more\n{more}"
    assert process.returncode == -number
    assert all(len(line) <= 81 for line in shown), shown
    assert "session khoscope, token 0x6b686f73636f7065" in "".join(shown).replace("\n", " ")


def test_json_is_one_document(luo: Luo) -> None:
    """And a signal that is ignored ends nothing: nohup."""
    with running("carry", "--json", ignored="TERM") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1]
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGINT
    document = json.loads("".join(lines))
    assert document["schema"] == "khoscope.carry/1"
    assert document["session"] == SESSION
    assert document["token"] == f"{TOKEN:#x}"
    assert document["bytes"] == len(contents(rich_before()))
    assert document["memfd_bytes"] > document["bytes"]
    assert document["kernel"]["release"]
    assert document["totals"]


@pytest.mark.parametrize("source", ["--snapshot", "--qemu", "--core"])
def test_only_the_running_kernel_carries(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([source, "x", "carry"])
    assert caught.value.code == 2
    assert "the running kernel" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["--qemu", "--core"])
def test_carried_is_of_this_host(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([source, "guest", "verify", "--before", "carried"]) == 2
    assert "what this host was handed" in capsys.readouterr().err
