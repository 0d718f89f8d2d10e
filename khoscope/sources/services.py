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
from pathlib import Path
from typing import Any, Final

import msgspec

from ..facts import budget
from ..facts.services import KeptFd, Service, Services
from . import host_files

#: Seconds that one answer may take.
PATIENCE: Final = 30
_PROPERTIES: Final = (
    *("Id", "ActiveState", "SubState", "MainPID", "SurviveFinalKillSignal"),
    *("FileDescriptorStoreMax", "NFileDescriptorStore", "FileDescriptorStorePreserve"),
)
_UP: Final = ("active", "activating", "reloading")


class _Row(msgspec.Struct):
    """A row of ``systemd-analyze fdstore --json``."""

    fdname: str
    inode: int
    path: str


class _Silent(Exception):
    """PID 1 did not answer."""


def read_services() -> Services | None:
    """What systemd keeps for services; None: it is not what runs as PID 1 (sd_booted(3))."""
    if not host_files.SYSTEMD.is_dir():
        return None
    try:
        asked = ["systemctl", "show", "*.service", "--property", ",".join(_PROPERTIES)]
        rows = [*_shown(_answer(asked))]
    except _Silent as error:
        return Services(unread=[str(error)])
    found = Services(
        survivors=sorted(
            row["Id"]
            for row in rows
            if row.get("SurviveFinalKillSignal") == "yes" and row["ActiveState"] in _UP
        )
    )
    stores = sorted((row for row in rows if _number(row, "FileDescriptorStoreMax")), key=_unit)
    for row in stores[: budget.SERVICES]:
        kept = []
        if _number(row, "NFileDescriptorStore"):
            try:
                kept = _kept(row["Id"])
            except _Silent as error:
                found.unread.append(str(error))
        found.stores.append(
            Service(
                row["Id"],
                f"{row['ActiveState']} ({row['SubState']})",
                row["ActiveState"] in _UP,
                row["FileDescriptorStorePreserve"],
                kept,
                _given(_number(row, "MainPID")),
            )
        )
    if left_out := len(stores) - len(found.stores):
        found.unread.append(f"the stores of {left_out:,} more services")
    return found


def _unit(row: Mapping[str, str]) -> str:
    return row["Id"]


def _number(row: Mapping[str, str], name: str) -> int:
    text = row.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _shown(text: str) -> Iterator[dict[str, str]]:
    """The units that ``systemctl show`` has shown; an older systemd lacks some properties."""
    for block in text.split("\n\n"):
        pairs = (line.partition("=") for line in block.splitlines())
        row = {
            "FileDescriptorStorePreserve": "restart",
            **{name: value for name, _, value in pairs},
        }
        if row.keys() >= {"Id", "ActiveState", "SubState"}:
            yield row


def _kept(unit: str) -> list[KeptFd]:
    asked = ["systemd-analyze", "fdstore", "--json=short", unit]
    try:
        rows = msgspec.json.decode(_answer(asked), type=list[_Row])
    except msgspec.MsgspecError as error:
        raise _Silent(f"{' '.join(asked)}: {error}") from error
    return [KeptFd(row.fdname, row.path, row.inode) for row in rows]


def _given(pid: int) -> list[str] | None:
    """The names in ``LISTEN_FDNAMES`` of a process (sd_listen_fds_with_names(3))."""
    if not pid:
        return None
    content = host_files.content(Path("/"), Path(f"/proc/{pid}/environ"))
    if content is None:
        return None
    variables = dict(
        os.fsdecode(each).partition("=")[::2] for each in content.split(b"\0") if b"=" in each
    )
    # Children inherit the variables.
    if variables.get("LISTEN_PID") != str(pid):
        return []
    return [name for name in variables.get("LISTEN_FDNAMES", "").split(":") if name]


def _answer(argv: list[str]) -> str:
    """
    What a tool of systemd's prints.

    :raises _Silent: if it does not answer.
    """
    environment: dict[str, Any] = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    asked = " ".join(argv[:2])
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=PATIENCE, env=environment, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise _Silent(f"{argv[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise _Silent(f"{asked} has not answered within {PATIENCE} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _Silent(f"{asked}: {said[-1] if said else f'status {done.returncode}'}")
    return done.stdout.decode(errors="replace")
