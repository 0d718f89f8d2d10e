# SPDX-License-Identifier: LGPL-2.1-or-later
"""
/dev/liveupdate, the Live Update Orchestrator's (LUO's) uapi: ``include/uapi/linux/liveupdate.h``.

A session holds files by token.  A session lives only as long as its file descriptor.  If the
descriptor is closed before the kexec, the old kernel unpreserves the session; if it is closed after
the kexec, the new kernel finishes the session (both ``luo_session_release()``).  System errors are
passed on unchanged, as :class:`OSError`.
"""

from __future__ import annotations

import fcntl
import os
import struct
from types import TracebackType
from typing import Any, Self

from ..sources import host_files

LIVEUPDATE_IOCTL_TYPE = 0xBA
#: Bytes, including the 0 at the end.
LIVEUPDATE_SESSION_NAME_LENGTH = 64

# _IO(type, nr): neither a direction nor a size.
LIVEUPDATE_IOCTL_CREATE_SESSION = LIVEUPDATE_IOCTL_TYPE << 8 | 0x00
LIVEUPDATE_IOCTL_RETRIEVE_SESSION = LIVEUPDATE_IOCTL_TYPE << 8 | 0x01
LIVEUPDATE_SESSION_PRESERVE_FD = LIVEUPDATE_IOCTL_TYPE << 8 | 0x40
LIVEUPDATE_SESSION_RETRIEVE_FD = LIVEUPDATE_IOCTL_TYPE << 8 | 0x41
LIVEUPDATE_SESSION_FINISH = LIVEUPDATE_IOCTL_TYPE << 8 | 0x42
LIVEUPDATE_SESSION_GET_NAME = LIVEUPDATE_IOCTL_TYPE << 8 | 0x43

# The first member of each is its own size.
#: ``struct liveupdate_ioctl_create_session``, ``struct liveupdate_ioctl_retrieve_session``
_OPEN = struct.Struct(f"=Ii{LIVEUPDATE_SESSION_NAME_LENGTH}s")
#: ``struct liveupdate_session_preserve_fd``, ``struct liveupdate_session_retrieve_fd``
_FD = struct.Struct("=IiQ")
#: ``struct liveupdate_session_finish``
_FINISH = struct.Struct("=II")
#: ``struct liveupdate_session_get_name``
_GET_NAME = struct.Struct(f"=II{LIVEUPDATE_SESSION_NAME_LENGTH}s")


class _Descriptor:
    """
    A file descriptor of LUO's.

    :param fd: an open descriptor; this object owns and closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _ioctl(self, request: int, layout: struct.Struct, *members: int | bytes) -> tuple[Any, ...]:
        """:return: the structure's members without its size, as the kernel left them."""
        argument = bytearray(layout.pack(layout.size, *members))
        fcntl.ioctl(self._fd, request, argument)
        return layout.unpack(argument)[1:]


class Session(_Descriptor):
    """A session: outgoing if it was created, incoming if it was retrieved."""

    def preserve_fd(self, fd: int, token: int) -> None:
        """
        ``luo_preserve_file()``: outgoing sessions only.

        :param fd: a memfd, or another file for which the kernel has a LUO file handler.
        :param token: u64, not used yet in this session.
        """
        self._ioctl(LIVEUPDATE_SESSION_PRESERVE_FD, _FD, fd, token)

    def retrieve_fd(self, token: int) -> int:
        """
        ``luo_retrieve_file()``: incoming sessions only.

        :return: a new file descriptor, which the caller owns.
        """
        fd, _ = self._ioctl(LIVEUPDATE_SESSION_RETRIEVE_FD, _FD, -1, token)
        return int(fd)

    def finish(self) -> None:
        """``luo_file_finish()``: incoming sessions only; files that were not retrieved are gone."""
        self._ioctl(LIVEUPDATE_SESSION_FINISH, _FINISH, 0)

    def name(self) -> str:
        _, name = self._ioctl(LIVEUPDATE_SESSION_GET_NAME, _GET_NAME, 0, b"")
        return os.fsdecode(name.partition(b"\0")[0])


class LiveUpdate(_Descriptor):
    """
    The device.  Only one process can have it open at a time.  Sessions outlive it.

    At the first open after a kexec, the kernel deserializes everything that was handed over
    (``luo_session_deserialize()``).  If a file's handler is in a module that is not loaded by then,
    this open and every later one fail with EIO.
    """

    def __init__(self) -> None:
        super().__init__(os.open(host_files.LIVEUPDATE, os.O_RDWR | os.O_CLOEXEC))

    def create_session(self, name: str) -> Session:
        """``luo_session_create()``: a new outgoing session; its name has at most 63 bytes."""
        return self._session(LIVEUPDATE_IOCTL_CREATE_SESSION, name)

    def retrieve_session(self, name: str) -> Session:
        """``luo_session_retrieve()``: the incoming session of that name; this works once."""
        return self._session(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, name)

    def _session(self, request: int, name: str) -> Session:
        fd, _ = self._ioctl(request, _OPEN, -1, os.fsencode(name))
        return Session(fd)
