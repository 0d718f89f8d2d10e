# SPDX-License-Identifier: LGPL-2.1-or-later
"""
LUO sessions in a guest, real ones: memfds of known content, across a kexec.

    held = hold(machine, "vm", {1: Memfd(4096), 2: Memfd(64 << 20, thp=True)})
    machine.load_kexec()
    machine.execute_kexec()
    assert retrieve(machine, "vm", [1, 2])[2].same

vm/sessions.py does it, inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vm.job import Job
from vm.machine import Machine

_SESSIONS = ("env", "PYTHONPATH=/khoscope", "python3", "-m", "vm.sessions")

#: Writing and comparing 64 MiB under TCG takes seconds.
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Memfd:
    """A memfd to be made."""

    #: In bytes.
    size: int
    #: Of transparent huge pages, where the kernel has some; else of single pages.
    thp: bool = False


@dataclass(frozen=True)
class File:
    """A memfd as a process in the guest has seen it."""

    size: int
    #: Is the content :func:`vm.content.content` of its token?
    same: bool
    #: Where its pages are, as (first byte, first byte after), in the file's order.
    ranges: tuple[tuple[int, int], ...]


class Held(Job):
    """A session and the process that holds it, until it is let go or the kexec takes over."""

    def __init__(self, machine: Machine, name: str, files: Mapping[int, Memfd]) -> None:
        words = [
            f"{token}:{file.size}:{'always' if file.thp else 'never'}"
            for token, file in files.items()
        ]
        # A name may be that of a session before the kexec, and any text that fits.
        directory = f"/root/luo-{machine.boots}-{name.encode().hex()}"
        super().__init__(machine, directory, (*_SESSIONS, "hold", name, *words))
        self.until_on(_TIMEOUT)
        #: By token.
        self.files = _parse(self.output())

    def let_go(self) -> None:
        """Ends the process, and with it the session: it will not be there after a kexec."""
        self.end("TERM")


def hold(machine: Machine, name: str, files: Mapping[int, Memfd]) -> Held:
    """Makes an outgoing session with these memfds by token, and holds it.

    :raise MachineError: LUO refused; its last lines say what
    """
    return Held(machine, name, files)


def retrieve(machine: Machine, name: str, tokens: Iterable[int]) -> dict[int, File]:
    """Retrieves these files of an incoming session, by token; finishes it.

    :raise CommandFailed: LUO refused; its last lines say what
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
