# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contents of memfds, whole, in part and of hostile lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.serialized import MEMFD_COMPATIBLE, MEMFD_V1, MEMFDS
from khoscope.sources.content import memfd_pieces
from tests.fuzz import fuzz
from tests.test_fdt import u64
from tests.test_follow import END, PAGE, PFN, RAM, Machine, memfds


def pieces(machine: Machine, ser: int, handler: str = MEMFD_COMPATIBLE) -> list[bytes | int]:
    ram = np.array(RAM, np.uint64)
    return list(memfd_pieces(machine.abi, ram, machine.read, handler, ser))


def whole(read: list[bytes | int]) -> bytes:
    """What was read, all of it."""
    assert all(isinstance(each, bytes) for each in read)
    return b"".join(map(bytes, read))


def length(read: list[bytes | int]) -> int:
    return sum(len(each) if isinstance(each, bytes) else each for each in read)


def page_of(number: int) -> bytes:
    return bytes([number]) * PAGE


def filled(*folios: tuple[int, int]) -> Machine:
    """Memory in which the page of index n of a file is full of n + 1; pfn and index of each."""
    machine = Machine()
    for (pfn, index), (_, end) in zip(folios, [*folios[1:], (0, folios[-1][1] + 1)], strict=True):
        for number in range(end - index):
            machine.write((pfn + number) * PAGE, page_of(index + number + 1))
    return machine


FOLIOS = [(PFN + 8, 0), (PFN + 4, 4), (PFN + 32, 6), (PFN + 33, 7)]
WHOLE = b"".join(page_of(number) for number in range(1, 9))


@pytest.mark.parametrize("handler", [MEMFD_COMPATIBLE, MEMFD_V1])
@pytest.mark.parametrize("size", [0, 1, PAGE, 7 * PAGE + 5, 8 * PAGE])
def test_whole(size: int, handler: str) -> None:
    """Folios are anywhere, and of any order; the last page of a file is not full."""
    machine = filled(*FOLIOS)
    ser = machine.memfd(FOLIOS, size, handler=handler)
    assert whole(pieces(machine, ser, handler)) == WHOLE[:size]


def test_a_long_list_in_parts() -> None:
    """More entries than a page has room for, each a page."""
    folios = [(PFN + 2 * number, number) for number in range(600)]
    machine = Machine()
    for pfn, index in folios:
        machine.write(pfn * PAGE, u64(index))
    read = b"".join(
        each
        for each in pieces(machine, machine.memfd(folios, 600 * PAGE))
        if isinstance(each, bytes)
    )
    assert [int.from_bytes(read[at : at + 8], "little") for at in range(0, len(read), PAGE)] == [
        *range(600)
    ]


def test_what_is_not_up_to_date_is_zeros() -> None:
    """A page that was allocated and never written, as memfd-v1 may hand over."""
    machine = filled(*FOLIOS)
    ser = machine.memfd(FOLIOS, 8 * PAGE, handler=MEMFD_V1)
    first = int(
        np.frombuffer(machine.read(ser, MEMFDS[MEMFD_V1].itemsize) or b"", MEMFDS[MEMFD_V1])[0][
            "folios"
        ]["first"]
    )
    (listed,) = np.frombuffer(machine.read(first + 8, 8) or b"", "<u8").tolist()
    machine.words(listed + 16, PFN + 4 | 1 << 52)
    read = pieces(machine, ser, MEMFD_V1)
    assert b"".join(each for each in read if isinstance(each, bytes)) == (
        WHOLE[: 4 * PAGE] + bytes(2 * PAGE) + WHOLE[6 * PAGE :]
    )


def test_pages_that_a_vmcore_lacks() -> None:
    machine = filled(*FOLIOS)
    ser = machine.memfd(FOLIOS, 8 * PAGE)
    machine.unreadable.add((PFN + 5) * PAGE)
    there = [WHOLE[: 4 * PAGE], page_of(5), PAGE, page_of(7), page_of(8)]
    assert pieces(machine, ser) == there


@pytest.mark.parametrize(
    ("folios", "sound"),
    [
        ([(PFN, 1)], 0),
        ([(PFN, 0), (END // PAGE, 1), (PFN + 1, 2)], 1),
        ([(PFN, 0), (PFN + 1, 1), (PFN + 2, 1)], 1),
        ([(PFN, 0), (PFN + 1, 2**52)], 0),
        ([(PFN, 0), (PFN, 1), (PFN + 1, 5), (PFN + 2, 3)], 5),
    ],
)
def test_a_list_that_makes_no_sense(folios: list[tuple[int, int]], sound: int) -> None:
    """What follows is anybody's guess, and is left out."""
    machine = Machine()
    assert length(pieces(machine, machine.memfd(folios, 8 * PAGE))) == sound * PAGE


@pytest.mark.parametrize("at", [0, 8, END, 2**64 - PAGE])
def test_nowhere(at: int) -> None:
    assert pieces(Machine(), at) == []


def test_no_more_than_there_is_ram() -> None:
    """A list may name the same memory again and again."""
    machine = Machine()
    ram = sum(end - start for start, end in RAM)
    folios = [(PFN, number * 512) for number in range(2000)]
    assert 0 < length(pieces(machine, machine.memfd(folios, 2**63))) <= ram


@fuzz
@given(memfds(), st.sampled_from([MEMFD_COMPATIBLE, MEMFD_V1]))
def test_any_list(made: tuple[Machine, int], handler: str) -> None:
    machine, ser = made
    read = length(pieces(machine, ser, handler))
    assert read <= sum(end - start for start, end in RAM)
    ser_of = machine.following().structure(ser, MEMFDS[handler])
    assert not read or (ser_of is not None and read <= ser_of["size"])
