# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Ask PID 1 what it keeps for services.

Only the host's own systemd can be asked, by its own tools: what it keeps is in its memory, and in
no structure of the kernel's that has the services' names.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from ..facts import budget
from ..facts.services import KeptFd, Service, Services
from . import host_files

#: Seconds that one answer may take.
PATIENCE: Final = 30
_PROPERTIES: Final = (
    *("Id", "LoadState", "ActiveState", "SubState", "MainPID", "SurviveFinalKillSignal"),
    *("FileDescriptorStoreMax", "NFileDescriptorStore", "FileDescriptorStorePreserve"),
)
_UP: Final = ("active", "activating", "reloading")
#: Digits of a number: systemd has none of more than 64 bits.
_DIGITS: Final = 20
#: Letters of a descriptor's name (``FDNAME_MAX``), and those that are kept of a path and of what a
#: tool says: a memfd's name has 249.
_NAME: Final = 255
_KEPT: Final = 300
#: Bytes of an environment: exec() takes no larger one (``bprm_stack_limits()``).
_ENVIRONMENT: Final = 6 << 20


class _Row(msgspec.Struct):
    """A row of ``systemd-analyze fdstore --json``."""

    fdname: str
    inode: int
    path: str


class _Silent(Exception):
    """PID 1 did not answer."""


class _Useless(_Silent):
    """It has not answered in time, or cannot be asked: nobody need ask again."""


def read_services() -> Services | None:
    """What systemd keeps for services; None: it is not what runs as PID 1 (sd_booted(3))."""
    if not host_files.SYSTEMD.is_dir():
        return None
    try:
        # --all: also those that do not run.
        asked = ["systemctl", "show", "--all", "*.service", "--property", ",".join(_PROPERTIES)]
        rows = [*_shown(_answer(asked))]
    except _Silent as error:
        return Services(survivors=None, unread=[str(error)], is_whole=False)
    survivors = sorted(
        row["Id"]
        for row in rows
        if row.get("SurviveFinalKillSignal") == "yes" and row["ActiveState"] in _UP
    )
    stores = sorted((row for row in rows if _number(row, "FileDescriptorStoreMax")), key=_unit)
    reader = _Reader(budget.STORED)
    found = [reader.service(row) for row in stores[: budget.SERVICES]]
    left_out = len(stores) - len(found)
    if more := left_out + reader.not_asked:
        reader.unread.append(f"the stores of {more:,} more services")
    return Services(found, survivors, reader.unread, is_whole=not left_out)


def _unit(row: Mapping[str, str]) -> str:
    return row["Id"]


def _number(row: Mapping[str, str], name: str) -> int:
    text = row.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else 0


def _shown(text: str) -> Iterator[dict[str, str]]:
    """The units that ``systemctl show`` has shown; an older systemd lacks some properties."""
    for block in text.split("\n\n"):
        pairs = (line.partition("=") for line in block.splitlines())
        row = {
            "LoadState": "loaded",
            "FileDescriptorStorePreserve": "restart",
            **{name: value for name, _, value in pairs},
        }
        if row.keys() >= {"Id", "ActiveState", "SubState"}:
            yield row


@dataclass
class _Reader:
    """
    Looks at one service after the other.

    :param room: how many more descriptors and names may be kept.
    :param gave_up: it is of no use to ask again; ``not_asked``: of how many services it was not.
    """

    room: int
    unread: list[str] = field(default_factory=list)
    gave_up: bool = False
    not_asked: int = 0

    def service(self, row: Mapping[str, str]) -> Service:
        """A service that may store descriptors."""
        number, is_loaded = _number(row, "NFileDescriptorStore"), row["LoadState"] == "loaded"
        state = f"{row['ActiveState']} ({row['SubState']})"
        return Service(
            row["Id"],
            state if is_loaded else row["LoadState"],
            row["ActiveState"] in _UP,
            row["FileDescriptorStorePreserve"],
            self._kept(row["Id"], number) if is_loaded or not number else None,
            self._given(_number(row, "MainPID")),
            0 if is_loaded else number,
        )

    def _kept(self, unit: str, count: int) -> list[KeptFd] | None:
        """
        What is in a store; None: PID 1 did not say.

        :param count: how many descriptors there should be.
        """
        if not count:
            return []
        if self.gave_up:
            self.not_asked += 1
            return None
        try:
            if unit.startswith("-"):
                raise _Silent("systemd-analyze would take that for an option")
            if count > self.room:
                raise _Silent(f"it stores {count:,} descriptors")
            rows = _rows(_answer(["systemd-analyze", "fdstore", "--json=short", unit]))
            if len(rows) > self.room:
                raise _Silent(f"it stores {len(rows):,} descriptors")
        except _Silent as error:
            self.gave_up = isinstance(error, _Useless)
            self.unread.append(f"{unit}: {error}")
            return None
        self.room -= len(rows)
        return [KeptFd(row.fdname[:_NAME], row.path[:_KEPT], row.inode) for row in rows]

    def _given(self, pid: int) -> list[str] | None:
        """
        The names in ``LISTEN_FDNAMES`` of a process (sd_listen_fds_with_names(3)).

        ``LISTEN_PID`` is another process if this one was forked by the one that systemd started.
        """
        if not pid:
            return None
        content = host_files.content(Path("/"), Path(f"/proc/{pid}/environ"), _ENVIRONMENT)
        if content is None:
            return None
        variable = b"LISTEN_FDNAMES="
        texts = (each for each in content.split(b"\0") if each.startswith(variable))
        text = next(texts, variable)[len(variable) :].decode(errors="replace")
        names = [name for name in text.split(":") if name]
        # A process can write anything there.
        if len(names) > self.room or max(map(len, names), default=0) > _NAME:
            return None
        self.room -= len(names)
        return names


def _rows(text: str) -> list[_Row]:
    try:
        return msgspec.json.decode(text, type=list[_Row])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _Silent(f"systemd-analyze fdstore: {error}") from error


def _answer(argv: list[str]) -> str:
    """
    What a tool of systemd's prints.

    :raises _Silent: if it does not answer.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    asked = " ".join(argv[:2])
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=PATIENCE, env=environment, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise _Useless(f"{argv[0]} is not installed") from error
    except OSError as error:
        raise _Useless(f"{argv[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise _Useless(f"{asked} has not answered within {PATIENCE} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _Silent(f"{asked}: {said[-1][:_KEPT] if said else f'status {done.returncode}'}")
    return done.stdout.decode(errors="replace")
