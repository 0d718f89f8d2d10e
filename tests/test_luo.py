# SPDX-License-Identifier: LGPL-2.1-or-later
"""What LUO has serialized: sessions, files and FLBs, right, broken and hostile."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.serialized import (
    LUO_FILE_SER,
    LUO_FILES,
    LUO_FLB_HEADER_SER,
    LUO_FLB_SER,
    LUO_SESSION_SER,
    LUO_SESSIONS,
    MEMFD_COMPATIBLE,
    MEMFD_V1,
)
from khoscope.facts import budget, listed, store
from khoscope.facts.clients import Flb, Luo, LuoFile, LuoSession, Memfd, OwnerKind
from khoscope.sources.luo import Serialized
from tests.fuzz import fuzz
from tests.test_follow import (
    DATA,
    END,
    PAGE,
    PFN,
    RAM,
    WORDS,
    Machine,
    bound,
    claimed,
    facts_of,
    holds,
    scribbled,
)

HANDLER = MEMFD_COMPATIBLE.encode()


def file_ser(data: int, token: int, handler: bytes = HANDLER) -> bytes:
    return np.array([(handler, data, token)], LUO_FILE_SER).tobytes()


def session_ser(name: bytes, files: int, count: int) -> bytes:
    return np.array([(name, files, count)], LUO_SESSION_SER).tobytes()


@dataclass
class Handed:
    """
    A machine with what LUO hands over: sessions with a memfd of a page each.

    :param head: ``phys_addr_t`` of the sessions' first block, or of their array.
    :param files: of each session's first block, or of its array.
    """

    machine: Machine
    head: int
    files: list[int]
    arrays: bool = False


def handed_over(*files: int, arrays: bool = False, handler: str = MEMFD_COMPATIBLE) -> Handed:
    """:param files: how many each session has."""
    machine = Machine()
    sessions: list[bytes] = []
    heads: list[int] = []
    memfds = 0
    for number, count in enumerate(files):
        entries = []
        for token in range(count):
            ser = machine.memfd([(PFN + 2 * memfds, 0)], PAGE, handler=handler)
            entries.append(file_ser(ser, token, handler.encode()))
            memfds += 1
        if arrays:
            heads.append(machine.array(LUO_FILES, entries) if entries else 0)
        else:
            heads.append(next(iter(machine.blocks(LUO_FILE_SER, entries)), 0))
        sessions.append(session_ser(b"session %d" % number, heads[-1], count))
    if arrays:
        return Handed(machine, machine.array(LUO_SESSIONS, sessions), heads, True)
    blocks = machine.blocks(LUO_SESSION_SER, sessions)
    return Handed(machine, blocks[0] if blocks else 0, heads)


def read(handed: Handed, kept: int = budget.ENTRIES) -> tuple[list[LuoSession], list[str]]:
    """The sessions, and what is wrong with the list of them."""
    following = handed.machine.following()
    serialized = Serialized(following, arrays=handed.arrays, _left=kept)
    sessions = serialized.sessions(handed.head)
    abi = "luo-v1" if handed.arrays else "luo-v5"
    holds(following, Luo(DATA, abi, 1, False, sessions, problems=serialized.problems))
    return sessions, serialized.problems


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("files", [(), (0,), (1,), (3, 0, 2), (70,), (1,) * 60])
def test_sessions(files: tuple[int, ...], arrays: bool) -> None:
    handed = handed_over(*files, arrays=arrays)
    sessions, problems = read(handed)
    assert problems == []
    assert [(s.name, s.retrieved, s.count, s.problems) for s in sessions] == [
        (f"session {n}", None, count, []) for n, count in enumerate(files)
    ]
    for session, count in zip(sessions, files, strict=True):
        assert [file.token for file in session.files] == list(range(count))
        for file in session.files:
            assert (file.handler, file.retrieve_status, file.problems) == ("memfd-v2", None, [])
            assert isinstance(file.memfd, Memfd)
            assert (file.memfd.phys, file.memfd.pages, file.memfd.problems) == (file.data, 1, [])


def test_whose_what_they_preserve_is() -> None:
    handed = handed_over(1, 1)
    following = handed.machine.following()
    Serialized(following).sessions(handed.head)
    data = [o for o in following.owners if o.kind == OwnerKind.MEMFD]
    assert [(owner.session, owner.token) for owner in data] == [("session 0", 0), ("session 1", 0)]
    assert claimed(following, OwnerKind.MEMFD) == [
        (DATA, DATA + PAGE),
        (DATA + 2 * PAGE, DATA + 3 * PAGE),
    ]
    assert claimed(following, OwnerKind.LUO) == [(handed.head, handed.head + PAGE)]
    assert claimed(following, OwnerKind.SESSION) == [(at, at + PAGE) for at in sorted(handed.files)]


def test_whose_the_arrays_are() -> None:
    """All of their memory, whether or not it is in use."""
    handed = handed_over(1, 0, 2, arrays=True)
    following = handed.machine.following()
    Serialized(following, arrays=True).sessions(handed.head)
    assert claimed(following, OwnerKind.LUO) == [(handed.head, handed.head + 16 * PAGE)]
    assert claimed(following, OwnerKind.SESSION) == [
        (at, at + 2 * PAGE) for at in sorted(filter(None, handed.files))
    ]


def test_memfds_of_linux_6_19() -> None:
    (session,), problems = read(handed_over(2, arrays=True, handler=MEMFD_V1))
    assert (problems, session.problems) == ([], [])
    for file in session.files:
        assert (file.handler, file.problems) == ("memfd-v1", [])
        assert file.memfd is not None
        assert (file.memfd.phys, file.memfd.pages, file.memfd.problems) == (file.data, 1, [])


def test_files_of_another_handler_are_not_followed() -> None:
    machine = Machine()
    (files,) = machine.blocks(LUO_FILE_SER, [file_ser(2**64 - 1, 2**64 - 1, b"vfio-v9")])
    (head,) = machine.blocks(LUO_SESSION_SER, [session_ser(b"a", files, 1)])
    sessions, _ = read(Handed(machine, head, []))
    assert sessions == [
        LuoSession("a", None, 1, [LuoFile("vfio-v9", 2**64 - 1, 2**64 - 1, None, None, [])], [])
    ]


def test_names_that_are_no_text() -> None:
    """A name may fill its place, and hold anything."""
    machine = Machine()
    raw = b"\xff\n\x1b[2J" + b"x" * 58
    (head,) = machine.blocks(LUO_SESSION_SER, [session_ser(raw, 0, 0)])
    ((session,), problems) = read(Handed(machine, head, []))
    assert session.name.startswith("\\xff")
    assert session.name.endswith("x" * 58)
    assert problems == []


def test_a_count_that_is_not_that_of_the_list() -> None:
    handed = handed_over(2)
    handed.machine.words(handed.head + 16 + 64 + 8, 2**64 - 1)
    ((session,), _) = read(handed)
    assert session.problems == [f"counts {2**64 - 1} files, lists 2"]


@pytest.mark.parametrize("at", [8, END, 2**64 - 1])
def test_a_list_of_files_that_is_nowhere(at: int) -> None:
    handed = handed_over(2, 1)
    handed.machine.words(handed.head + 16 + 64, at)
    sessions, _ = read(handed)
    assert sessions[0].problems == [
        f"block 0 at {at:#x} is no readable page in RAM",
        "counts 2 files, lists 0",
    ]
    assert sessions[1].problems == []


def test_a_file_that_is_nowhere() -> None:
    handed = handed_over(1)
    handed.machine.words(handed.files[0] + 16 + 48, END)
    ((session,), _) = read(handed)
    assert session.files[0].memfd is None
    assert session.files[0].problems == [
        f"struct memfd_luo_ser at {END:#x} is no readable page in RAM"
    ]


def test_sessions_that_share_a_list_of_files() -> None:
    handed = handed_over(2, 2)
    handed.machine.words(handed.head + 16 + 80 + 64, handed.files[0])
    sessions, _ = read(handed)
    assert sessions[0].problems == []
    assert sessions[1].problems == [
        f"block 0 at {handed.files[0]:#x} was there before: the chain loops",
        "counts 2 files, lists 0",
    ]


def test_a_list_of_sessions_that_loops() -> None:
    handed = handed_over(0, 0)
    handed.machine.words(handed.head, handed.head)
    sessions, problems = read(handed)
    assert len(sessions) == 2
    assert problems == [f"block 1 at {handed.head:#x} was there before: the chain loops"]


@pytest.mark.parametrize("arrays", [False, True])
def test_more_than_is_looked_at(arrays: bool) -> None:
    """Sessions and files together.  A limit of khoscope's is no fault of the kernel's."""
    handed = handed_over(3, 3, 3, arrays=arrays)
    sessions, problems = read(handed, kept=7)
    assert [problems, *(session.problems for session in sessions)] == [[]] * 4
    assert [len(session.files) for session in sessions] == [3, 1, 0]
    assert [session.left_out for session in sessions] == [0, 2, 3]
    following = handed.machine.following()
    serialized = Serialized(following, arrays=arrays, _left=2)
    assert len(serialized.sessions(handed.head)) == 2
    assert (serialized.problems, serialized.left_out) == ([], 1)


def test_more_flbs_than_are_looked_at() -> None:
    machine = Machine()
    serialized = Serialized(machine.following(), _left=2)
    assert len(serialized.flbs(flbs(machine, 5))) == 2
    assert (serialized.problems, serialized.left_out) == ([], 3)


def test_long_lists_can_be_stored() -> None:
    """With names and numbers that take the most room; one session is longer than a piece."""
    machine = Machine()
    ser = machine.memfd([(PFN, 0)], 2**64 - 1, 2**64 - 1)
    entries = [file_ser(ser, 2**64 - 1 - n) for n in range(15_000)]
    sessions = []
    start = 0
    for number, size in enumerate([listed.PIECE + 100, *[60] * 100]):
        part = entries[start : start + size]
        head = machine.blocks(LUO_FILE_SER, part)[0]
        sessions.append(session_ser(b"\xff" * 59 + b"%05d" % number, head, len(part)))
        start += size
    following = machine.following()
    serialized = Serialized(following)
    found = serialized.sessions(machine.blocks(LUO_SESSION_SER, sessions)[0])
    assert sum(len(session.files) for session in found) == start
    file = io.BytesIO()
    side = facts_of(following, Luo(DATA, "luo-v5", sessions=found))
    store.save(side, file)
    again = store._load(file, "test.khosnap").outgoing
    assert again.luo is not None
    assert again.luo.sessions == found
    assert again.owners == following.owners
    assert again.vmallocs == following.vmallocs


# Arrays

#: ``LUO_SESSION_MAX`` and ``LUO_FILE_MAX``, for pages of 4 KiB.
SESSION_MAX, FILE_MAX = 819, 128


def test_arrays_that_are_full() -> None:
    assert (LUO_SESSIONS.room(PAGE), LUO_FILES.room(PAGE)) == (SESSION_MAX, FILE_MAX)
    sessions, problems = read(handed_over(*[0] * (SESSION_MAX - 1), FILE_MAX, arrays=True))
    assert problems == []
    assert len(sessions) == SESSION_MAX
    assert sessions[-1].problems == []
    assert len(sessions[-1].files) == FILE_MAX


@pytest.mark.parametrize("count", [SESSION_MAX + 1, 2**63, 2**64 - 1])
def test_more_sessions_than_an_array_has_room_for(count: int) -> None:
    handed = handed_over(1, arrays=True)
    handed.machine.words(handed.head, count)
    assert read(handed) == (
        [],
        [f"the array at {handed.head:#x} says to have {count} entries, {SESSION_MAX} fit"],
    )


@pytest.mark.parametrize("count", [FILE_MAX + 1, 2**63, 2**64 - 1])
def test_more_files_than_an_array_has_room_for(count: int) -> None:
    handed = handed_over(1, 1, arrays=True)
    handed.machine.words(handed.head + 8 + 64 + 8, count)
    first, second = read(handed)[0]
    assert first.problems == [
        f"the array at {handed.files[0]:#x} says to have {count} entries, {FILE_MAX} fit",
        f"counts {count} files, lists 0",
    ]
    assert (second.problems, len(second.files)) == ([], 1)


def test_a_count_without_an_array() -> None:
    """The kernel warns, and takes the session for an empty one."""
    handed = handed_over(0, arrays=True)
    handed.machine.words(handed.head + 8 + 64 + 8, 3)
    ((session,), _) = read(handed)
    assert session.problems == ["counts 3 files, lists 0"]


@pytest.mark.parametrize("at", [8, DATA + 8, END, END - PAGE, RAM[0][1] - PAGE, 2**64 - PAGE])
def test_arrays_that_do_not_lie_in_ram(at: int) -> None:
    handed = handed_over(2, 1, arrays=True)
    handed.machine.words(handed.head + 8 + 64, at)
    said = f"the array at {at:#x} does not lie in RAM"
    sessions, _ = read(handed)
    assert sessions[0].problems == [said, "counts 2 files, lists 0"]
    assert sessions[1].problems == []
    handed.head = at
    assert read(handed) == ([], [said])


@pytest.mark.parametrize("shared", ["files", "sessions", "half"])
def test_arrays_that_lie_in_each_other(shared: str) -> None:
    """Each is restored, and freed, on its own."""
    handed = handed_over(2, 2, arrays=True)
    at = {"files": handed.files[0], "sessions": handed.head + 4 * PAGE}.get(shared)
    at = handed.files[0] + PAGE if at is None else at
    handed.machine.words(handed.head + 8 + 80 + 64, at)
    sessions, problems = read(handed)
    assert problems == sessions[0].problems == []
    assert sessions[1].problems == [
        f"the array at {at:#x} lies where another list is",
        "counts 2 files, lists 0",
    ]


@pytest.mark.parametrize("which", ["sessions", "files"])
def test_arrays_that_cannot_be_read(which: str) -> None:
    handed = handed_over(1, arrays=True)
    at = handed.head if which == "sessions" else handed.files[0]
    handed.machine.unreadable.add(at)
    sessions, problems = read(handed)
    said = f"the array at {at:#x} cannot be read"
    if which == "sessions":
        assert (sessions, problems) == ([], [said])
    else:
        assert sessions[0].problems == [said, "counts 1 files, lists 0"]


def test_sessions_that_are_left_out() -> None:
    """The kernel has read them: what they lead to is followed from its own lists."""
    handed = handed_over(1, 2, 1, arrays=True)
    following = handed.machine.following()
    sessions = Serialized(following, arrays=True).sessions(handed.head, {"session 1"})
    assert [session.name for session in sessions] == ["session 0", "session 2"]
    assert {owner.session for owner in following.owners} == {None, "session 0", "session 2"}


# FLBs


def flbs(machine: Machine, number: int, pages: int = 1, count: int | None = None) -> int:
    ser = machine.page()
    said = number if count is None else count
    machine.write(ser, np.array([(pages, said)], LUO_FLB_HEADER_SER).tobytes())
    entries = [np.array([(b"flb %d" % n, n, n + 1)], LUO_FLB_SER).tobytes() for n in range(number)]
    machine.write(ser + 16, b"".join(entries))
    return ser


def read_flbs(machine: Machine, ser: int) -> tuple[list[Flb], list[str]]:
    following = machine.following()
    serialized = Serialized(following)
    found = serialized.flbs(ser)
    holds(following, Luo(DATA, "luo-v5", flbs=found))
    assert claimed(following) in ([], [(ser, ser + PAGE)])
    return found, serialized.problems


@pytest.mark.parametrize("number", [0, 1, 63])
def test_flbs(number: int) -> None:
    machine = Machine()
    found = read_flbs(machine, flbs(machine, number))
    assert found == ([Flb(f"flb {n}", n, n + 1) for n in range(number)], [])


@pytest.mark.parametrize(
    ("pages", "count"),
    [(0, 0), (0, 1), (1, 64), (1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (2**40, 1), (2**32, 2**30)],
)
def test_broken_flbs(pages: int, count: int) -> None:
    machine = Machine()
    ser = flbs(machine, 3, pages, count)
    assert read_flbs(machine, ser) == (
        [],
        [f"FLB header at {ser:#x}: {pages} pages, {count} entries"],
    )


@pytest.mark.parametrize("ser", [END, END - 8, 2**64 - 1])
def test_flbs_that_are_nowhere(ser: int) -> None:
    assert read_flbs(Machine(), ser)[1] == [f"struct luo_flb_header_ser at {ser:#x} cannot be read"]


# Whatever memory holds


@fuzz
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
    st.sampled_from([MEMFD_COMPATIBLE, MEMFD_V1]),
    st.none() | WORDS,
    st.data(),
)
def test_any_sessions(
    files: list[int], arrays: bool, handler: str, head: int | None, data: st.DataObject
) -> None:
    handed = handed_over(*files, arrays=arrays, handler=handler)
    if handed.machine.pages:
        data.draw(scribbled(handed.machine))
    following = handed.machine.following()
    serialized = Serialized(following, arrays=arrays)
    sessions = serialized.sessions(handed.head if head is None else head)
    bound(
        handed.machine,
        following,
        Luo(DATA, "luo-v5", sessions=sessions, problems=serialized.problems),
    )


@fuzz
@given(
    st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), max_size=6),
    st.booleans(),
)
def test_any_bytes(pages: list[bytes], chain: list[int], arrays: bool) -> None:
    """Pages of garbage, chained."""
    machine = Machine()
    made = [machine.page() for _ in pages]
    for at, raw in zip(made, pages, strict=True):
        machine.write(at, raw)
    for before, after in pairwise(chain):
        machine.words(made[before % len(made)], made[after % len(made)], 1 + after)
    following = machine.following()
    serialized = Serialized(following, arrays=arrays)
    found = serialized.sessions(made[0])
    flbs = serialized.flbs(made[-1])
    bound(machine, following, Luo(DATA, "luo-v5", sessions=found, flbs=flbs))


@fuzz
@given(st.integers(0, 63), WORDS, WORDS, st.integers(0, PAGE) | WORDS)
def test_any_flbs(number: int, pages: int, count: int, away: int) -> None:
    machine = Machine()
    ser = flbs(machine, number, pages, count)
    following = machine.following()
    serialized = Serialized(following)
    found = serialized.flbs((ser + away) % 2**64)
    assert found or serialized.problems or count == 0 or away
    bound(machine, following, Luo(DATA, "luo-v5", flbs=found, problems=serialized.problems))


# What is there twice


def test_a_session_and_a_token_that_are_there_twice() -> None:
    """Names and tokens are what tells them apart: the second is left out, with all it leads to."""
    machine = Machine()
    handler = b"vfio-v9"
    (files,) = machine.blocks(LUO_FILE_SER, [file_ser(0, t, handler) for t in (7, 8, 7)])
    more = machine.blocks(LUO_FILE_SER, [file_ser(0, 9, handler)])
    entries = [session_ser(b"a", files, 3), session_ser(b"a", more[0], 1)]
    (head,) = machine.blocks(LUO_SESSION_SER, entries)
    ((session,), problems) = read(Handed(machine, head, []))
    assert problems == ["session name 'a' is there twice"]
    assert [file.token for file in session.files] == [7, 8]
    assert session.problems == ["token 0x7 is there twice"]
