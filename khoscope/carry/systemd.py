# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Tell systemd: sd_notify(3), and the journal in its own fields.

The journal's protocol is that of systemd's "Native Journal Protocol": a datagram has a line for
each field, or, of a value with newlines, its length in between.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..words.errors import KhoscopeError

#: Of an entry: names of fields with their values; a field may have several.
Entry = list[tuple[str, str]]

JOURNAL: Final = Path("/run/systemd/journal/socket")
#: Seconds that either may take to make room for a message.
PATIENCE: Final = 30
_HINT: Final = "see whether systemd-journald.service runs; leave --journal out where there is none"


class NoJournal(KhoscopeError):
    """There is no journal, or it does not take entries."""


def notify(state: str) -> None:
    """
    Tell the service manager, if one has started this process and wants to know.

    :param state: as in ``READY=1``.
    :raises KhoscopeError: if it cannot be told.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with _socket() as manager:
            # A name that begins with @ is an abstract one.
            manager.connect(f"\0{address[1:]}" if address[0] == "@" else address)
            manager.sendall(state.encode())
    except OSError as error:
        raise KhoscopeError(
            f"the service manager cannot be told ({address}: {error.strerror or error})",
            "start khoscope without NOTIFY_SOCKET in its environment",
        ) from error


def journal(entries: Iterable[Entry], path: Path | None = None) -> None:
    """
    Write entries into the journal.

    :param path: the journal's socket, if it is another one.
    :raises NoJournal: if there is no journal, or it does not take them.
    """
    path = path or JOURNAL
    try:
        with _socket() as to:
            to.connect(str(path))
            for entry in entries:
                _send(to, b"".join(_field(name, value) for name, value in entry))
    except OSError as error:
        raise NoJournal(
            f"the journal cannot be written ({path}: {error.strerror or error})", _HINT
        ) from error


def _socket() -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    found.settimeout(PATIENCE)
    return found


def _field(name: str, value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    if b"\n" not in raw:
        return b"%b=%b\n" % (name.encode(), raw)
    return b"%b\n%b%b\n" % (name.encode(), struct.pack("<Q", len(raw)), raw)


def _send(to: socket.socket, entry: bytes) -> None:
    try:
        to.sendall(entry)
    except OSError as error:
        if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
            raise
        # What a datagram has no room for goes in a sealed memfd.
        fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(fd, "wb") as memfd:
            memfd.write(entry)
            memfd.flush()
            _seal(fd)
            socket.send_fds(to, [b""], [fd])


def _seal(fd: int) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
