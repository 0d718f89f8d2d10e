# SPDX-License-Identifier: LGPL-2.1-or-later
"""The builders' cache: directories that are named by a hash of everything that went into them.

An entry appears complete or not at all: a builder fills it under a name that starts with
``PARTIAL``, and renames it when it is finished. Only one build at a time works on a cache. So the
build that holds the lock can assume that a killed build left every partial entry behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

PARTIAL = ".partial-"

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BuildError(Exception):
    """A step failed. The text says which step, why, and what to do."""


def directory() -> Path:
    """The cache's directory, which need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "khoscope"


def digest(*parts: str | bytes | Path | Mapping[str, bytes]) -> str:
    """The hash of texts, bytes, the content of files, and named contents."""
    total = hashlib.sha256()

    def add(data: bytes) -> None:
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)

    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                add(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, Mapping):
            add(len(part).to_bytes(8, "little"))
            for name, content in part.items():
                add(name.encode())
                add(content)
        else:
            add(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:16]


def entry(name: str, key: str) -> Path:
    """The path of the entry `name` with this key, whether it exists or not."""
    return directory() / f"{name}-{key}"


def make(final: Path, fill: Callable[[Path], None]) -> Path:
    """The entry, which `fill(directory)` makes if it is missing. Call this inside `locked()`."""
    if final.exists():
        return final
    with scratch(final.name) as partial:
        fill(partial)
        partial.rename(final)
    return final


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A directory in the cache that is removed afterwards, unless it was renamed."""
    path = directory() / f"{PARTIAL}{name}"
    path.mkdir()
    try:
        yield path
    finally:
        if path.exists():
            remove(path)


def remove(path: Path) -> None:
    """Delete a link, or a directory tree that may hold read-only directories."""
    if path.is_symlink():
        path.unlink()
        return
    for parent, directories, _ in os.walk(path):
        for name in directories:
            child = Path(parent, name)
            if not child.is_symlink() and not os.access(child, os.W_OK | os.X_OK):
                child.chmod(0o700)
    shutil.rmtree(path)


def size(path: Path) -> int:
    """Bytes on disk below `path`; a file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, files in os.walk(path):
        for name in files:
            stat = os.lstat(os.path.join(parent, name))
            seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(seen.values())


_lock_fd = -1


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Lock the cache, after any other build has ended. SIGTERM ends the block like Ctrl-C."""
    global _lock_fd
    root = directory()
    root.mkdir(parents=True, exist_ok=True)
    _lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            fcntl.flock(_lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the build that holds {root / 'lock'}", file=sys.stderr)
            fcntl.flock(_lock_fd, fcntl.LOCK_EX)
        for stale in root.glob(f"{PARTIAL}*"):
            remove(stale)
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        os.close(_lock_fd)
        _lock_fd = -1


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Log:
    """A file with the output of a build's commands; the terminal shows each step and its time."""

    def __init__(self, name: str) -> None:
        self.path = directory() / "log" / f"{name}.log"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("")
        self._name = name
        self._file = self.path.open("ab")
        self._what = ""  # while a step runs: its line
        self._start = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Print the step and how long it took; on a terminal, also the time so far."""
        if not self._start:
            print(f"{self._name}: the log is {self.path}", file=sys.stderr)
        self._what, self._start = f"{self._name}: {what} … ", time.monotonic()
        print(self._what, end="", file=sys.stderr, flush=True)
        try:
            yield
        except BaseException as error:
            stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            print(f"{stopped} after {self._elapsed()}", file=sys.stderr)
            raise
        else:
            print(self._elapsed(), file=sys.stderr)
        finally:
            self._what = ""

    def _elapsed(self) -> str:
        seconds = time.monotonic() - self._start
        if seconds < 60:
            return f"{seconds:.1f} s"
        return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while self._what and sys.stderr.isatty():
            try:
                return process.wait(1)
            except subprocess.TimeoutExpired:
                line = f"\r{self._what}{self._elapsed()}\r{self._what}"
                print(line, end="", file=sys.stderr, flush=True)
        return process.wait()

    def run(
        self,
        command: Sequence[str | Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Path | None = None,
    ) -> None:
        """Run a command, its output into the log (or its stdout into a file).

        The command gets a process group of its own, which ends with this call, however the call
        ends. The command also inherits the lock: if this process is killed, the next build waits
        until the command has ended.
        """
        self._file.write(f"$ {' '.join(map(str, command))}\n".encode())
        self._file.flush()
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(stdout.open("wb")) if stdout else self._file
            # An interrupt inside Popen would leave a command behind that nobody would end.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
            try:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=cwd,
                    env={**_environment(), **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=self._file,
                    process_group=0,
                    pass_fds=[_lock_fd] if _lock_fd >= 0 else [],
                    # This is safe, because nothing here has threads.
                    preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
                )
            except BaseException:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                raise
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                status = self._wait(process)
            except BaseException:
                _end(process)
                raise
        if status:
            raise self.error(f"{command[0]} failed with status {status}")

    def error(self, message: str) -> BuildError:
        """The exception to raise, with the last lines of the log."""
        self._file.flush()
        tail = self.path.read_text(errors="replace").splitlines()[-20:]
        lines = [f"{self._name}: {message}", *(f"  {line}" for line in tail)]
        return BuildError("\n".join([*lines, f"The whole log: {self.path}"]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process group, with SIGTERM first, because mmdebstrap has mounts to undo."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass  # it has ended already, or ignores SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """Our environment without the variables of a make that called us, and with English output."""
    dropped = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "LC_ALL": "C.UTF-8"}
