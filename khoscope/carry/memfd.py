# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Evidence without a disk: a snapshot in a memfd that LUO hands to the next kernel.

khoscope is read-only, with this exception: :func:`carry` creates a memfd and asks the kernel to
preserve it for as long as khoscope keeps the session open.  :func:`retrieve` takes the memfd out of
LUO again.  khoscope trusts the retrieved snapshot as little as any other file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from ..facts import store
from ..facts.carried import SESSION, TOKEN
from ..facts.files import NewFile, temporary
from ..facts.snapshot import Snapshot
from ..sources import host_files
from ..words.errors import KhoscopeError
from .liveupdate import LiveUpdate, Session

#: Where :func:`retrieve` keeps the snapshot for this boot: a session can be retrieved only once.
DIRECTORY = Path("/run/khoscope")

#: ``include/uapi/linux/memfd.h``; Python has no name for this flag.  Hardened systems ask for it
#: (``vm.memfd_noexec``), and LUO preserves the seal.
MFD_NOEXEC_SEAL = 0x0008

#: Bytes, enough for most snapshots. Only a larger snapshot has to be taken twice.
SLACK = 256 << 10
#: Bytes that are written at once.
PIECE = 1 << 20
#: How many times a memfd may turn out to be too small.
ATTEMPTS = 3

Said = Mapping[int | None, tuple[str, str]]

_NOT_PERMITTED = (f"{host_files.LIVEUPDATE}: permission denied", "run khoscope as root")
_OPEN: Final[Said] = {
    errno.ENOENT: (
        f"LUO is off: there is no {host_files.LIVEUPDATE}",
        "boot a kernel that has CONFIG_LIVEUPDATE, with kho=on liveupdate=on",
    ),
    errno.EACCES: _NOT_PERMITTED,
    errno.EPERM: _NOT_PERMITTED,
    errno.EBUSY: (
        f"{host_files.LIVEUPDATE} is busy: only one process may have it open",
        "`khoscope luo` says which one; run khoscope again when that has closed it",
    ),
    errno.EIO: (
        "the kernel could not read the LUO sessions that it was handed, and refuses LUO since",
        "the kernel's log says what was wrong; only a reboot gets LUO back",
    ),
}
_CREATE: Final[Said] = {
    errno.EEXIST: (
        f"there is a LUO session {SESSION} already: another khoscope carry runs",
        "end that one first, or leave it to carry what it has",
    ),
}
_PRESERVE: Final[Said] = {
    errno.ENOENT: (
        "this kernel's LUO does not preserve memfds",
        "it needs CONFIG_LIVEUPDATE_MEMFD; use `khoscope snapshot` and a disk",
    ),
    errno.ENOMEM: (
        "there is not enough memory for the snapshot",
        "free some, or use `khoscope snapshot` and a disk",
    ),
}
_RETRIEVE: Final[Said] = {
    errno.ENOENT: (
        "nothing was carried: this kernel was not handed a LUO session of khoscope's",
        "before the kexec, run `khoscope carry` and see that nothing ends it",
    ),
    errno.EINVAL: (
        "somebody else is retrieving what was carried",
        "run khoscope again in a moment",
    ),
}
_RETRIEVE_FD: Final[Said] = {
    errno.ENOENT: (
        f"the LUO session {SESSION} holds no snapshot",
        "it was not made by khoscope carry; it has been finished",
    ),
}
_DIRECTORY: Final[Said] = {
    errno.EACCES: (f"{DIRECTORY}: permission denied", "run khoscope as root"),
}
_COPY: Final[Said] = {
    errno.ENOSPC: (
        f"{DIRECTORY} has no space for what was carried, and LUO hands it over only once",
        "it is lost; next time make room in /run before --before carried",
    ),
}


@dataclass(frozen=True)
class Carried:
    """
    What the next kernel will get.

    :param facts: the snapshot, read back from the memfd.
    :param size: size of the snapshot in bytes.
    :param room: size of the memfd in bytes.
    """

    facts: Snapshot
    size: int
    room: int


@contextlib.contextmanager
def carry(take: Callable[[IO[bytes]], None]) -> Iterator[Carried]:
    """
    Preserve a snapshot for as long as the context lasts.

    The memfd is preserved first and written afterwards, so that the snapshot holds the memfd's own
    blocks, too.  This works because a preserved memfd keeps its size and its folios, but may still
    be written (``shmem_freeze()``).

    :param take: takes a new snapshot each time it is called, and writes it to a file.
    :raises KhoscopeError: if LUO does not take the memfd, or if the tree grows faster than khoscope
        reads it.
    """
    size = 0
    for _ in range(ATTEMPTS):
        room = _room(size)
        with (
            _session() as session,
            _memfd(room) as memfd,
            contextlib.closing(temporary()) as file,
        ):
            with _told("cannot preserve a memfd", _PRESERVE):
                session.preserve_fd(memfd.fileno(), TOKEN)
            take(file)
            size = file.seek(0, os.SEEK_END)
            if size <= room:
                _fill(memfd, room - size, file)
                facts = store.load_file(Path(f"/proc/self/fd/{memfd.fileno()}"))
                yield Carried(facts, size, room)
                return
    raise KhoscopeError(
        f"what is preserved grows faster than khoscope can read it ({ATTEMPTS} attempts)",
        "let the clients of KHO come to rest, and run it again",
    )


def _room(size: int) -> int:
    """
    How many bytes a memfd needs for a snapshot that had `size` bytes last time.

    A larger memfd has more blocks itself, and other clients may preserve more meanwhile.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-(size * 5 // 4 + SLACK) // page) * page


def _session() -> Session:
    with _told(f"cannot create the LUO session {SESSION}", _CREATE), _device() as device:
        return device.create_session(SESSION)


def _device() -> LiveUpdate:
    with _told(f"cannot open {host_files.LIVEUPDATE}", _OPEN):
        return LiveUpdate()


def _memfd(room: int) -> IO[bytes]:
    """
    A memfd of that size, all of it written.

    memfd-v1 (linux 6.19 and 7.0) records whether a page is up to date when it preserves the page.
    A hole is not, and the next kernel gives back zeros for what is written into it later.
    """
    with _told("cannot make a memfd", _PRESERVE):
        fd = os.memfd_create(SESSION, os.MFD_CLOEXEC | MFD_NOEXEC_SEAL)
        memfd = open(fd, "r+b")  # noqa: SIM115 - the caller closes it
        for at in range(0, room, PIECE):
            memfd.write(bytes(min(PIECE, room - at)))
        memfd.flush()
    return memfd


def _fill(memfd: IO[bytes], at: int, file: IO[bytes]) -> None:
    """
    Write the file so that it ends where the memfd ends.

    A zip's directory is at its end, and readers ignore bytes in front of the zip.
    """
    file.seek(0)
    memfd.seek(at)
    with _told("cannot write to the memfd", {}):
        shutil.copyfileobj(file, memfd)
        memfd.flush()


def retrieve() -> Path:
    """
    The snapshot file that the previous kernel's :func:`carry` handed to this one.

    The first call takes the file out of LUO, where it is then gone for good.  khoscope keeps it in
    :data:`DIRECTORY`, mode 0600, until this kernel ends.

    :raises KhoscopeError: if there is no such file, or LUO does not hand it out.
    """
    path = DIRECTORY / f"carried-{host_files.BOOT_ID.read_text().strip()}.khosnap"
    with _told(f"cannot keep anything in {DIRECTORY}", _DIRECTORY):
        there = path.exists()
    if not there:
        # The kernel hands the memfd back only once, so the place for the file is made before the
        # session is retrieved.  Only one process can have the device open, so only one gets here.
        with _device() as device, _directory(), NewFile(path) as new:
            _copy(device, new)
    return path


@contextlib.contextmanager
def _directory() -> Iterator[None]:
    """Make :data:`DIRECTORY`, and remove it again if nothing was put into it."""
    with _told(f"cannot keep anything in {DIRECTORY}", _DIRECTORY):
        was_there = DIRECTORY.is_dir()
        DIRECTORY.mkdir(exist_ok=True)
        if not was_there:
            # The mode must not depend on the umask.
            DIRECTORY.chmod(0o700)
    try:
        yield
    finally:
        if not was_there and not any(DIRECTORY.iterdir()):
            DIRECTORY.rmdir()


def _copy(device: LiveUpdate, new: NewFile) -> None:
    with _told(f"cannot retrieve the LUO session {SESSION}", _RETRIEVE):
        session = device.retrieve_session(SESSION)
    with session:
        with _told("cannot retrieve the snapshot", _RETRIEVE_FD):
            fd = session.retrieve_fd(TOKEN)
        with open(fd, "rb") as memfd, _told("cannot copy the snapshot", _COPY):
            # The memfd still has the file position that it had when it was handed over.
            memfd.seek(0)
            shutil.copyfileobj(memfd, new.file)
            new.file.flush()
        new.finish()
        with _told(f"cannot finish the LUO session {SESSION}", {}):
            session.finish()


@contextlib.contextmanager
def _told(what: str, said: Said) -> Iterator[None]:
    """
    Turn a system error into two clear lines.

    :param what: what could not be done.
    :param said: for each errno, what it means and what to do.
    """
    try:
        yield
    except OSError as error:
        other = (f"{what}: {error.strerror}", "the kernel's log may say why")
        raise KhoscopeError(*said.get(error.errno, other)) from error
