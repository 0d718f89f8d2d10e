# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read files, which may be anything, and write files, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, cast

from ..words.errors import KhoscopeError

#: The open files of this process, by number.
_OPEN_FILES: Final = Path("/proc/self/fd")
#: Errors that mean: a directory's file system, or the kernel, has no unnamed files.
_NO_UNNAMED: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
#: Errors that mean: a file system cannot write out a directory, or khoscope may not ask for that.
_NO_SYNC: Final = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}
#: Signals that would end khoscope.
_ENDING: Final = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

#: Temporary files up to this size stay in memory.
SPOOL_MEMORY: Final = 64 << 20

#: What a file may be instead of a regular one.
_OTHERS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path, hint: str) -> None:
    """
    Refuse what is not a regular file: a pipe would keep khoscope waiting, and a device has no end.

    :raises KhoscopeError: with that hint, if it is not a regular file, or not there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise KhoscopeError(f"{path}: {error.strerror}", hint) from error
    _require_regular(path, mode, hint)


def _require_regular(path: Path, mode: int, hint: str) -> None:
    if not stat.S_ISREG(mode):
        what = _OTHERS.get(stat.S_IFMT(mode), "something else")
        raise KhoscopeError(f"{path}: not a regular file, but {what}", hint)


def open_file(path: Path, hint: str) -> IO[bytes]:
    """
    Open a regular file to read, without waiting; the caller closes it.

    :raises KhoscopeError: with that hint, if it cannot be opened, or is something else.
    """
    # Merely opening a device may do something.
    require_regular(path, hint)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise KhoscopeError(f"{path}: {error.strerror}", hint) from error
    file = open(handle, "rb")  # noqa: SIM115 - the caller closes it
    try:
        # The path may name another file by now.
        _require_regular(path, os.fstat(handle).st_mode, hint)
    except BaseException:
        file.close()
        raise
    return file


class _Telling:
    """What :func:`telling` gives."""

    def __init__(
        self, file: IO[bytes], told: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._file = file
        self._told = told

    def write(self, data: bytes) -> int:
        with self._told():
            return self._file.write(data)

    def flush(self) -> None:
        with self._told():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def telling(
    file: IO[bytes], told: Callable[[], contextlib.AbstractContextManager[None]]
) -> IO[bytes]:
    """
    The same file: whatever else goes on while it is written, it says itself what is wrong with it.

    :param told: turns an OSError into one clear line.
    """
    return cast("IO[bytes]", _Telling(file, told))


def temporary() -> IO[bytes]:
    """A temporary file without a name, in memory as long as it is small."""
    return telling(tempfile.SpooledTemporaryFile(SPOOL_MEMORY), _temporary_told)


@contextlib.contextmanager
def _temporary_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KhoscopeError(
            f"{tempfile.gettempdir()}: {error.strerror}",
            "make room there, or name a directory that has space by TMPDIR",
        ) from error


class NewFile:
    """
    A file that appears only once all of it is written.  Until :meth:`finish` it has no name: if
    khoscope ends before, nothing is left behind, and an old file of that name stays.

    :param mode: who may read it, whatever the umask is.
    :param replace: it may take the place of an old file of that name.
    :raises KhoscopeError: if it cannot be written.
    """

    def __init__(self, path: Path, mode: int = 0o600, *, replace: bool = True) -> None:
        self._path = path
        self._replace = replace
        #: The name that it has meanwhile if the file system has no unnamed files.
        self._temporary: Path | None = None
        with self.told():
            # Replacing what is there would put a file in the place of /dev/null or of a link.
            if _is_taken(path):
                raise KhoscopeError(f"{path}: is not a file", "name a new file, or one to replace")
            handle = _unnamed(path.parent)
            if handle is None:
                handle, name = tempfile.mkstemp(prefix=self._prefix(), dir=path.parent)
                self._temporary = Path(name)
            self.file = open(handle, "w+b")  # noqa: SIM115 - __exit__ closes it
            os.fchmod(handle, mode)

    def _prefix(self) -> str:
        # A name has at most 255 bytes, and a letter may take four.
        return f".{self._path.name[:50]}."

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # Data that could not be written goes with the file.
        with contextlib.suppress(OSError):
            self.file.close()
        self._forget()

    def _forget(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turn what the system says about the file into one clear line."""
        try:
            yield
        except OSError as error:
            raise KhoscopeError(
                f"{self._path}: {error.strerror}",
                "choose a directory that you can write to and that has space",
            ) from error

    @property
    def telling(self) -> IO[bytes]:
        """The file, as :func:`telling` gives it."""
        return telling(self.file, self.told)

    def finish(self) -> None:
        """Give the file its name, when all of it is on the disk."""
        with self.told():
            self.file.flush()
            os.fsync(self.file.fileno())
            with _undisturbed():
                self._put_in_place()
            self.file.close()
            _sync_directory(self._path.parent)

    def _put_in_place(self) -> None:
        if self._temporary is None:
            if _link(self.file.fileno(), self._path):
                return
            if not self._replace:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            # A link cannot replace a file; only a rename can.
            self._temporary = self._path.with_name(f"{self._prefix()}{secrets.token_hex(8)}")
            if not _link(self.file.fileno(), self._temporary):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if self._replace:
            os.replace(self._temporary, self._path)
        else:
            os.link(self._temporary, self._path)
            self._temporary.unlink()
        self._temporary = None


def _is_taken(path: Path) -> bool:
    """Whether the name belongs to something other than a regular file."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _unnamed(directory: Path) -> int | None:
    """An unnamed file; None: there is no such thing here, or no way to name it later."""
    if not _OPEN_FILES.is_dir():
        return None
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_UNNAMED:
            raise
        return None


def _link(handle: int, path: Path) -> bool:
    """Give an unnamed file a name; False: another file has that name already."""
    # Python follows the link to the file only if it is given a directory.
    directory = os.open(_OPEN_FILES, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(handle), path, src_dir_fd=directory, follow_symlinks=True)
    except FileExistsError:
        return False
    finally:
        os.close(directory)
    return True


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Make signals wait that would end khoscope."""
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)


def _sync_directory(directory: Path) -> None:
    """Write out a directory, so that a new name in it outlives a kexec."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        # A user may be allowed to write to a directory but not to read it.
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)
