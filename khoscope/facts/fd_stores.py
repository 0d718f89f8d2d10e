# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Whose the files of systemd's session are.

systemd (since 261) hands the descriptors that it keeps for services to the next kernel in a LUO
session of its own.  Token 0 is a memfd with JSON, which it reads after the kexec::

    {"version": 1, "state": {...}, "units": {UNIT: {"fdstore": [
        {"type": "fd", "name": NAME, "token": TOKEN},
        {"type": "luo_session", "name": NAME, "sessionName": SESSION}]}}}

Sources: ``src/core/luo.c`` and ``src/shared/luo-util.h`` of systemd 262, and what it has written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from .clients import StoredFd

#: ``LUO_SESSION_NAME``, ``LUO_MAPPING_INDEX`` and ``LUO_PROTOCOL_VERSION``.
SESSION: Final = "systemd"
TOKEN: Final = 0
VERSION: Final = 1

#: Letters of a unit's name (``UNIT_NAME_MAX``) and of a descriptor's (``FDNAME_MAX``).
_NAME: Final = 255


@dataclass(frozen=True)
class FdStores:
    """
    What services have stored.

    :param files: by token in systemd's session.
    :param sessions: by the names of sessions that are stored as a whole.
    """

    files: dict[int, StoredFd] = field(default_factory=dict)
    sessions: dict[str, StoredFd] = field(default_factory=dict)


class _Entry(msgspec.Struct):
    type: str
    name: str
    token: int | None = None
    session: str | None = msgspec.field(name="sessionName", default=None)


class _Unit(msgspec.Struct):
    fdstore: list[_Entry] = []


class _Version(msgspec.Struct):
    version: int


class _Mapping(msgspec.Struct):
    units: dict[str, _Unit] = {}


def fd_stores(raw: bytes) -> FdStores:
    """
    Read the JSON, which may be anything.

    :raises ValueError: if it is of a version that is not known, or makes no sense.
    """
    try:
        version = msgspec.json.decode(raw, type=_Version).version
        if version > VERSION:
            raise ValueError(f"it is of version {version}, only {VERSION} is known")
        units = msgspec.json.decode(raw, type=_Mapping).units
    # Of text that is no UTF-8, and of depth.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    found = FdStores()
    for unit, of in units.items():
        for entry in of.fdstore:
            if max(map(len, (unit, entry.name, entry.session or ""))) > _NAME:
                raise ValueError(f"it has names of more than {_NAME} letters")
            stored = StoredFd(unit, entry.name)
            if entry.type == "fd" and entry.token is not None:
                found.files[entry.token] = stored
            elif entry.type == "luo_session" and entry.session is not None:
                found.sessions[entry.session] = stored
    return found
