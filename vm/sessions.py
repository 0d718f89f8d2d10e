# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A LUO session with memfds of known content. vm/luo.py runs this inside the guest.

    python3 -m vm.sessions hold NAME TOKEN:SIZE:THP ...      hold it until a signal or the kexec
    python3 -m vm.sessions retrieve NAME TOKEN ...           and finish the session

THP says how the memfd uses transparent huge pages; it is a word for `shmem_enabled`. Both commands
print one line of JSON, an object that has for each token

    size    the size of the file, in bytes
    same    is the content what was written?
    ranges  its physical ranges, in the file's order: [[first byte, first byte after], ...]
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from khoscope.carry.liveupdate import LiveUpdate
from vm.content import content

PAGE = mmap.PAGESIZE
#: How much of a file is in memory at once. A huge page of our own takes TCG a second.
CHUNK = 1 << 20
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

# The bits of an entry of /proc/PID/pagemap that hold the page frame number.
_PFN = np.uint64((1 << 55) - 1)


def make(token: int, size: int, thp: str) -> int:
    """A memfd with the token's content."""
    fd = os.memfd_create(f"token-{token}", os.MFD_ALLOW_SEALING)
    SHMEM_ENABLED.write_text(thp)
    with open(fd, "wb", closefd=False) as file:
        for at in range(0, size, CHUNK):
            file.write(content(token, min(CHUNK, size - at), at))
    return fd


def describe(fd: int, token: int) -> dict[str, Any]:
    size = os.fstat(fd).st_size
    if not size:
        return {"size": 0, "same": True, "ranges": []}
    # Do not use mmap.mmap() here: the mmap would hold the file, and the array would hold the mmap.
    data = np.memmap(os.fdopen(os.dup(fd), "rb"), np.uint8, "r")
    # The comparison brings every page into the page table, even after one that differs.
    same = [
        data[at : at + CHUNK].tobytes() == content(token, min(CHUNK, size - at), at)
        for at in range(0, size, CHUNK)
    ]
    return {"size": size, "same": all(same), "ranges": ranges(data)}


def ranges(data: np.memmap[Any, Any]) -> list[tuple[int, int]]:
    """The physical ranges of mapped data, in the order of the data."""
    first = data.ctypes.data // PAGE
    count = -(-data.size // PAGE)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        pfns = np.frombuffer(file.read(8 * count), np.uint64) & _PFN
    pieces = np.split(pfns, np.flatnonzero(np.diff(pfns) != 1) + 1)
    return [(int(piece[0]) * PAGE, (int(piece[-1]) + 1) * PAGE) for piece in pieces]


def say(described: dict[int, dict[str, Any]]) -> None:
    print(json.dumps(described), flush=True)


def hold(name: str, *files: str) -> None:
    with LiveUpdate() as device:
        session = device.create_session(name)
    described = {}
    for word in files:
        token, size, thp = word.split(":")
        fd = make(int(token), int(size), thp)
        session.preserve_fd(fd, int(token))
        # Pages may move when they are preserved, so describe the file only now.
        described[int(token)] = describe(fd, int(token))
    say(described)
    signal.pause()


def retrieve(name: str, *tokens: str) -> None:
    with LiveUpdate() as device, device.retrieve_session(name) as session:
        fds = {int(token): session.retrieve_fd(int(token)) for token in tokens}
        session.finish()
        say({token: describe(fd, token) for token, fd in fds.items()})


if __name__ == "__main__":
    {"hold": hold, "retrieve": retrieve}[sys.argv[1]](*sys.argv[2:])
