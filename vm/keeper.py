# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A service that has systemd keep its files for it. vm/systemd.py runs this inside the guest.

    python3 -m vm.keeper NAME:TOKEN:SIZE ... [SESSION TOKEN:SIZE ...]

At its first start it stores a memfd by each name, with the content of its token. At each start, it
makes a LUO session with memfds, and stores that as `session`. When it is started again, it prints
what has come back, one line of JSON: for each name what vm/sessions.py prints of a file, and for
the session that of each of its tokens.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

from khoscope.carry.liveupdate import LiveUpdate, Session
from vm.sessions import describe, make

#: The first descriptor that a service is started with (``SD_LISTEN_FDS_START``).
_FIRST = 3


def notify(text: str, *fds: int) -> None:
    """sd_notify(3), with descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        socket.send_fds(manager, [text.encode()], fds)


def store(fd: int, name: str) -> None:
    notify(f"FDSTORE=1\nFDNAME={name}", fd)


def stored() -> dict[str, int]:
    """What systemd has kept, by name: sd_listen_fds_with_names(3)."""
    names = os.environ.get("LISTEN_FDNAMES", "")
    return {name: _FIRST + n for n, name in enumerate(names.split(":")) if name}


def keep(files: list[tuple[str, int, int]]) -> None:
    for name, token, size in files:
        store(make(token, size, "never"), name)


def keep_session(name: str, files: list[tuple[int, int]]) -> None:
    """A session goes into the next kernel if it was made in this one."""
    with LiveUpdate() as device:
        session = device.create_session(name)
    for token, size in files:
        session.preserve_fd(make(token, size, "never"), token)
    notify("FDSTOREREMOVE=1\nFDNAME=session")
    store(session.fileno(), "session")


def take_back(
    fds: dict[str, int], files: list[tuple[str, int, int]], inside: list[tuple[int, int]]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: describe(fds[name], token) for name, token, _ in files if name in fds
    }
    if "session" in fds:
        own = Session(fds["session"])
        retrieved = {token: own.retrieve_fd(token) for token, _ in inside}
        own.finish()
        found["session"] = {token: describe(fd, token) for token, fd in retrieved.items()}
    return found


def main(words: list[str]) -> None:
    files, inside, session = [], [], ""
    for word in words:
        parts = word.split(":")
        if len(parts) == 3:
            files.append((parts[0], int(parts[1]), int(parts[2])))
        elif len(parts) == 2:
            inside.append((int(parts[0]), int(parts[1])))
        else:
            session = word
    fds = stored()
    if fds:
        print(json.dumps(take_back(fds, files, inside)), flush=True)
    else:
        keep(files)
    if session:
        keep_session(session, inside)
    notify("READY=1")
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
