# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ring buffer, written as kernel/bpf/ringbuf.c writes it."""

from __future__ import annotations

import gc
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.trace.ring import Reader, Ring

SIZE = mmap.PAGESIZE
RECORD = 280
STRIDE = RECORD + 8
BUSY = 1 << 31


class Kernel:
    """The producer, on a file in memory; it writes twice what the kernel maps twice."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.truncate(self.fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.memory = mmap.mmap(self.fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.made = 0

    @property
    def consumed(self) -> int:
        return int(struct.unpack_from("<Q", self.memory)[0])

    def put(self, record: bytes, busy: bool = False) -> bool:
        """Whether there was room."""
        stride = 8 + -(-len(record) // 8) * 8
        if self.made + stride - self.consumed > SIZE:
            return False
        self._write(self.made, struct.pack("<II", len(record) | busy * BUSY, 0) + record)
        self.made += stride
        struct.pack_into("<Q", self.memory, mmap.PAGESIZE, self.made)
        return True

    def commit(self, position: int) -> None:
        self._write(position, struct.pack("<I", RECORD))

    def _write(self, position: int, data: bytes) -> None:
        for offset, byte in enumerate(data):
            at = (position + offset) % SIZE
            for copy in (0, SIZE):
                self.memory[2 * mmap.PAGESIZE + copy + at] = byte


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Other tests count the files that are open: none is closed while they run."""
    yield
    gc.collect()


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def record(number: int) -> bytes:
    return struct.pack("<Q", number) * (RECORD // 8)


def numbers(ring: Ring, most: int = 1000) -> list[int]:
    taken = ring.take(0, most)
    assert taken.shape[1] == RECORD
    values = np.ascontiguousarray(taken).view(np.uint64)
    assert (values == values[:, :1]).all()
    return [int(value) for value in values[:, 0]]


def test_nothing_has_come(kernel: Kernel) -> None:
    assert numbers(Ring(kernel.fd, SIZE, RECORD)) == []


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=20))
def test_all_records_in_their_order(rounds: list[tuple[int, int]]) -> None:
    """However many come between two looks, over the end of the buffer and on."""
    kernel = Kernel()
    ring = Ring(kernel.fd, SIZE, RECORD)
    sent: list[int] = []
    seen: list[int] = []
    for put, most in rounds:
        for _ in range(put):
            if kernel.put(record(len(sent))):
                sent.append(len(sent))
        taken = numbers(ring, most)
        assert len(taken) <= most
        seen += taken
    while taken := numbers(ring):
        seen += taken
    assert seen == sent
    assert kernel.consumed == kernel.made == len(sent) * STRIDE


def test_a_record_that_is_being_written_stops_the_reader(kernel: Kernel) -> None:
    ring = Ring(kernel.fd, SIZE, RECORD)
    kernel.put(record(1))
    kernel.put(record(2), busy=True)
    kernel.put(record(3))
    assert numbers(ring) == [1]
    assert numbers(ring) == []
    kernel.commit(STRIDE)
    assert numbers(ring) == [2, 3]


def test_what_is_taken_stays(kernel: Kernel) -> None:
    """The kernel may write over it at once."""
    ring = Ring(kernel.fd, SIZE, RECORD)
    kernel.put(record(7))
    taken = ring.take(0, 1000)
    for number in range(100, 100 + SIZE // STRIDE):
        kernel.put(record(number))
    assert bytes(taken[0]) == record(7)


def test_a_record_of_another_size(kernel: Kernel) -> None:
    ring = Ring(kernel.fd, SIZE, RECORD)
    kernel.put(bytes(RECORD - 8))
    kernel.put(bytes(RECORD))
    with pytest.raises(ValueError, match="expected 280"):
        ring.take(0, 1000)


def test_a_first_record_that_is_being_written_is_waited_for(kernel: Kernel) -> None:
    """Else the end of a trace would take it for lost."""
    ring = Ring(kernel.fd, SIZE, RECORD)
    kernel.put(record(5), busy=True)
    writer = threading.Timer(0.1, kernel.commit, [0])
    writer.start()
    assert len(ring.take(2000, 1000)) == 1
    writer.join()


# Records that wait until somebody looks at them


def polled(reader: Reader, milliseconds: int = 0, most: int = 1000) -> list[int]:
    taken = reader.poll(milliseconds, most)
    assert taken.shape == (len(taken), RECORD)
    return [int(value) for value in np.ascontiguousarray(taken).view(np.uint64)[:, 0]]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def start(kernel: Kernel) -> Iterator[Callable[[int], Reader]]:
    """Begin to read the kernel's ring."""
    started = []

    def start(most: int) -> Reader:
        started.append(Reader(Ring(kernel.fd, SIZE, RECORD), most))
        return started[-1]

    yield start
    for reader in started:
        reader.stop()


def test_records_are_taken_out_while_nobody_looks(
    kernel: Kernel, start: Callable[[int], Reader]
) -> None:
    """More than the ring has room for."""
    reader = start(1000)
    for number in range(3 * SIZE // STRIDE):
        until(lambda: kernel.put(record(number)))  # noqa: B023
    until(lambda: kernel.consumed == kernel.made)
    assert polled(reader, most=7) == [*range(7)]
    assert polled(reader) == [*range(7, 3 * SIZE // STRIDE)]
    assert polled(reader) == []


def test_no_more_are_kept_than_there_is_room_for(
    kernel: Kernel, start: Callable[[int], Reader]
) -> None:
    reader = start(5)
    for number in range(12):
        assert kernel.put(record(number))
    until(lambda: kernel.consumed == 5 * STRIDE)
    time.sleep(0.3)
    assert kernel.consumed == 5 * STRIDE
    assert polled(reader, most=2) == [0, 1]
    until(lambda: kernel.consumed == 7 * STRIDE)
    reader.stop()
    seen: list[int] = []
    while some := polled(reader):
        seen += some
    assert seen == [*range(2, 12)]


def test_what_has_come_is_waited_for(kernel: Kernel, start: Callable[[int], Reader]) -> None:
    reader = start(1000)
    writer = threading.Timer(0.1, kernel.put, [record(3)])
    writer.start()
    assert polled(reader, 20_000) == [3]
    writer.join()


def test_a_reader_that_has_stopped_leaves_nothing(
    kernel: Kernel, start: Callable[[int], Reader]
) -> None:
    reader = start(1000)
    reader.stop()
    for number in range(9):
        kernel.put(record(number))
    assert polled(reader, most=4) == [*range(4)]
    assert polled(reader) == [*range(4, 9)]
    assert polled(reader) == []


def test_what_the_reader_cannot_read(kernel: Kernel, start: Callable[[int], Reader]) -> None:
    reader = start(1000)
    kernel.put(bytes(RECORD - 8))
    kernel.put(bytes(RECORD))
    with pytest.raises(ValueError, match="expected 280"):
        polled(reader, 20_000)
