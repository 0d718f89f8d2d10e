# SPDX-License-Identifier: LGPL-2.1-or-later
"""By what a carried snapshot is known: the session of LUO's that :mod:`khoscope.carry` makes."""

from __future__ import annotations

from typing import Final

from .snapshot import Side

#: The name of the session.
SESSION: Final = "khoscope"
#: u64, the memfd's token in the session: the session's name in ASCII.
TOKEN: Final = int.from_bytes(b"khoscope", "big")


def size_of_carried(side: Side) -> int | None:
    """Bytes of the memfd with the snapshot that a side holds; None: it holds none."""
    for session in side.luo.sessions if side.luo is not None else ():
        if session.name == SESSION:
            for file in session.files:
                if file.token == TOKEN and file.memfd is not None:
                    return file.memfd.size
    return None
