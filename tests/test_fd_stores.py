# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd writes about its services' descriptors, and what anybody may write in its place."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.serialized import LUO_FILE_SER, LUO_SESSION_SER
from khoscope.facts.clients import Luo, LuoSession, OwnerKind, StoredFd
from khoscope.facts.fd_stores import FdStores, fd_stores
from khoscope.sources.luo import Serialized
from tests.fuzz import fuzz
from tests.test_follow import DATA, PAGE, PFN, Machine, holds
from tests.test_luo import file_ser, session_ser

#: As systemd 262 has written it.
MAPPING: dict[str, Any] = {
    "version": 1,
    "state": {"KExecCount": 0, "ShutdownStartTimestamp": {"realtime": 1795875104807750}},
    "units": {
        "keeper.service": {
            "fdstore": [
                {"type": "fd", "name": "ring", "token": 1},
                {"type": "fd", "name": "state", "token": 2},
            ]
        },
        "holder.service": {
            "fdstore": [
                {"type": "luo_session", "name": "luo", "sessionName": "holder-own"},
                {"type": "fd", "name": "ring", "token": 3},
            ]
        },
    },
}
FILES = {
    1: StoredFd("keeper.service", "ring"),
    2: StoredFd("keeper.service", "state"),
    3: StoredFd("holder.service", "ring"),
}
SESSIONS = {"holder-own": StoredFd("holder.service", "luo")}


def raw(**changed: Any) -> bytes:
    return json.dumps({**MAPPING, **changed}).encode()


def test_as_systemd_writes_it() -> None:
    assert fd_stores(raw()) == FdStores(FILES, SESSIONS)


def test_what_is_added_is_left_alone() -> None:
    entry = {"type": "fd", "name": "a", "token": 9, "fresh": [1]}
    other = {"type": "mount", "name": "b", "path": "/"}
    units = {"a.service": {"fdstore": [entry, other], "fresh": {}}}
    assert fd_stores(raw(units=units, fresh=1)) == FdStores({9: StoredFd("a.service", "a")}, {})


def test_nothing_is_stored() -> None:
    assert fd_stores(b'{"version": 1}') == FdStores()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (raw(version=2), "it is of version 2, only 1 is known"),
        (b"", "Input data was truncated"),
        (raw()[:-1], "Input data was truncated"),
        (b"\xff\xfe", "invalid"),
        (b'{"version": 1, "units": {"\xff": {}}}', "can't decode byte 0xff"),
        (raw(units=[]), "Expected `object`, got `array` - at `$.units`"),
        (raw(units={"a": {"fdstore": [{"type": "fd", "name": 1}]}}), "Expected `str`, got `int`"),
        (raw(version="1"), "Expected `int`, got `str` - at `$.version`"),
        (b'{"units": {}}', "missing required field `version`"),
        (
            raw(units={"a" * 256: {"fdstore": [{"type": "fd", "name": "b"}]}}),
            "more than 255 letters",
        ),
        (b"[" * 1_000_000, "Expected `object`, got `array`"),
        (b'{"x": ' + b"[" * 1_000_000, "recursion"),
    ],
)
def test_of_no_use(text: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        fd_stores(text)


@fuzz
@given(
    st.binary(max_size=64)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
        lambda value: raw(units=value)
    )
)
def test_anything(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        found = fd_stores(text)
        assert all(isinstance(token, int) for token in found.files)


# -- in memory -------------------------------------------------------------------------------------


def sessions(mapping: bytes, token: int = 0, handler: bytes = b"memfd-v2") -> list[LuoSession]:
    """systemd's session with its mapping, and another one."""
    return read(mapping, token, handler)[0]


def read(
    mapping: bytes, token: int = 0, handler: bytes = b"memfd-v2"
) -> tuple[list[LuoSession], list[str]]:
    machine = Machine()
    for at in range(0, len(mapping), PAGE):
        machine.write(PFN * PAGE + at, mapping[at : at + PAGE])
    pages = -(-len(mapping) // PAGE)
    at = machine.memfd([(PFN + number, number) for number in range(pages)], len(mapping))
    entries = [file_ser(at, token, handler)]
    for number in (1, 2, 3):
        data = machine.memfd([(PFN + 100 + number, 0)], PAGE)
        entries.append(file_ser(data, number))
    (files,) = machine.blocks(LUO_FILE_SER, entries)
    (own,) = machine.blocks(LUO_FILE_SER, [file_ser(machine.memfd([(PFN + 200, 0)], PAGE), 7)])
    made = [session_ser(b"holder-own", own, 1), session_ser(b"systemd", files, 4)]
    (head,) = machine.blocks(LUO_SESSION_SER, made)
    following = machine.following()
    found = Serialized(following).sessions(head)
    holds(following, Luo(DATA, "luo-v5", 1, False, found))
    return found, [owner.name for owner in following.owners if owner.kind == OwnerKind.MEMFD]


def test_sessions_and_files_by_the_names_of_stores() -> None:
    (own, systemd), owners = read(raw())
    assert own.stored == SESSIONS["holder-own"]
    assert [file.stored for file in own.files] == [None]
    assert systemd.stored is None
    assert {file.token: file.stored for file in systemd.files} == {0: None, **FILES}
    assert (own.problems, systemd.problems, own.notes, systemd.notes) == ([], [], [], [])
    assert owners == [
        "memfd 0x7 of session holder-own: data",
        "memfd 0x0 of session systemd: data",
        "keeper.service ring (memfd 0x1): data",
        "keeper.service state (memfd 0x2): data",
        "holder.service ring (memfd 0x3): data",
    ]


def test_a_mapping_of_many_pages() -> None:
    more = [{"type": "fd", "name": f"fd{n}", "token": n} for n in range(10, 1000)]
    units = {**MAPPING["units"], "many.service": {"fdstore": more}}
    (_, systemd), _ = read(raw(units=units))
    assert {file.token: file.stored for file in systemd.files} == {0: None, **FILES}


WHAT = "what it says of services (token 0x0) is of no use: "


@pytest.mark.parametrize(
    ("mapping", "token", "handler", "why"),
    [
        (raw(version=3), 0, b"memfd-v2", "it is of version 3, only 1 is known"),
        (raw()[:-9], 0, b"memfd-v2", "Input data was truncated"),
        (raw(), 9, b"memfd-v2", "there is no such file"),
        (raw(), 0, b"vfio-v1", "it is no memfd"),
    ],
)
def test_tokens_where_there_are_no_names(
    mapping: bytes, token: int, handler: bytes, why: str
) -> None:
    """Nothing is wrong with the kernel: it is a note."""
    own, systemd = sessions(mapping, token, handler)
    assert (own.stored, systemd.problems, own.notes) == (None, [], [])
    assert [file.stored for file in systemd.files] == [None] * 4
    assert systemd.notes == [WHAT + why]
