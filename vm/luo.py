# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Real LUO sessions in a guest: memfds of known content that go across a kexec.

    held = hold(machine, "vm", {1: Memfd(4096), 2: Memfd(64 << 20, thp=True)})
    machine.load_kexec()
    machine.execute_kexec()
    assert retrieve(machine, "vm", [1, 2])[2].same

vm/sessions.py does the work inside the guest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vm.job import Job
from vm.machine import Machine

_SESSIONS = ("env", "PYTHONPATH=/khoscope", "python3", "-m", "vm.sessions")

#: Seconds. Under TCG, it takes several to write and compare 64 MiB.
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Memfd:
    """A memfd to make."""

    #: In bytes.
    size: int
    #: Use transparent huge pages if the kernel has some; else use single pages.
    thp: bool = False


@dataclass(frozen=True)
class File:
    """A memfd as a process in the guest has seen it."""

    size: int
    #: Is the content :func:`vm.content.content` of its token?
    same: bool
    #: Physical ranges of its pages, as (first byte, first byte after), in the file's order.
    ranges: tuple[tuple[int, int], ...]


class Held(Job):
    """A session and the process that holds it, until :meth:`let_go` or the kexec."""

    def __init__(self, machine: Machine, name: str, files: Mapping[int, Memfd]) -> None:
        words = [
            f"{token}:{file.size}:{'always' if file.thp else 'never'}"
            for token, file in files.items()
        ]
        # A session before the kexec may have had the same name, and a name may be any text.
        directory = f"/root/luo-{machine.boots}-{name.encode().hex()}"
        super().__init__(machine, directory, (*_SESSIONS, "hold", name, *words))
        self.until_on(_TIMEOUT)
        #: By token.
        self.files = _parse(self.output())

    def let_go(self) -> None:
        """Ends the process and thus the session, which will not be there after a kexec."""
        self.end("TERM")


def hold(machine: Machine, name: str, files: Mapping[int, Memfd]) -> Held:
    """Makes an outgoing session with these memfds by token, and holds it.

    :raise MachineError: if LUO refuses; the message ends in the error
    """
    return Held(machine, name, files)


def retrieve(machine: Machine, name: str, tokens: Iterable[int]) -> dict[int, File]:
    """Retrieves files of an incoming session by token, and finishes the session.

    :raise CommandFailed: if LUO refuses; the message ends in the error
    """
    words = (*_SESSIONS, "retrieve", name, *map(str, tokens))
    return _parse(machine.run(words, timeout=_TIMEOUT, check=True).stdout)


def _parse(text: str) -> dict[int, File]:
    return {
        int(token): File(
            fields["size"], fields["same"], tuple((first, end) for first, end in fields["ranges"])
        )
        for token, fields in json.loads(text).items()
    }
