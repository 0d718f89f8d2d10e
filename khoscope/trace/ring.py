# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A BPF ring buffer (kernel/bpf/ringbuf.c) read as an array.

bcc and libbpf call back for each record.  In Python, that costs more than it costs the kernel to
make the record.  Records of one size already are an array in memory.
"""

from __future__ import annotations

import mmap
import select
import threading
import time
from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: ``BPF_RINGBUF_HDR_SZ``: u32 length with the two flag bits, and u32 for the kernel's own use.
_HEADER: Final = 8
#: ``BPF_RINGBUF_BUSY_BIT``: being written.
_BUSY: Final = 1 << 31
#: How long a :class:`Reader` waits for the first record, ms, and for more after some, seconds.
_WAIT, _PAUSE = 200, 0.01


class Ring:
    """
    The consumer's side of a ring buffer; a ring buffer has only one consumer.

    :param fd: of the ``BPF_MAP_TYPE_RINGBUF`` map.
    :param size: its ``max_entries``, bytes.
    :param record: bytes of every record, a multiple of 8.
    :raises OSError: if it cannot be mapped.
    """

    def __init__(self, fd: int, size: int, record: int) -> None:
        self._size = size
        self.record = record
        page = mmap.PAGESIZE
        consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The kernel maps the data twice in a row, so no record is in two parts.
        producer = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumed = np.frombuffer(consumer, np.uint64, 1)
        self._produced = np.frombuffer(producer, np.uint64, 1)
        self._data = np.frombuffer(producer, np.uint8, 2 * size, page)
        self._events = select.poll()
        self._events.register(fd, select.POLLIN)

    def take(self, milliseconds: int, most: int) -> NDArray[np.uint8]:
        """
        The records that have come; wait if there are none yet.

        :param most: take no more than this many.
        :return: u8, shape (n, record).
        :raises ValueError: if a record has another size.
        """
        start = int(self._consumed[0])
        if start == int(self._produced[0]):
            self._events.poll(milliseconds)
        slots, length = self._whole(start, most)
        if not len(slots) and start != int(self._produced[0]):
            # The kernel is writing the first record.  That takes no longer than a program runs.
            time.sleep(milliseconds / 1000)
            slots, length = self._whole(start, most)
        if (length != self.record).any():
            raise ValueError(f"records of {np.unique(length)} bytes, expected {self.record}")
        records = slots[:, _HEADER:].copy()
        self._consumed[0] = start + len(records) * (_HEADER + self.record)
        return records

    def _whole(self, start: int, most: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The slots from ``start`` to the first that is being written, and their lengths."""
        stride = _HEADER + self.record
        count = min((int(self._produced[0]) - start) // stride, most)
        at = start % self._size
        slots = self._data[at : at + count * stride].reshape(count, stride)
        # Read each length only once: the kernel clears the bit when the record is whole.
        length = np.ascontiguousarray(slots[:, :4]).view(np.uint32)[:, 0]
        busy = np.flatnonzero(length & np.uint32(_BUSY))
        end = int(busy[0]) if len(busy) else count
        return slots[:end], length[:end]


class Reader:
    """
    Takes records out of a ring buffer as they come, and keeps them until somebody looks at them.

    Copying a record takes much less time than showing it.  So if a client is faster than whoever
    shows what it does, or if that one has to wait for something, it can make up for it later.

    A thread takes them out, until it is stopped.

    :param most: how many records are kept at most: then the ring buffer fills.
    """

    def __init__(self, ring: Ring, most: int) -> None:
        self._ring = ring
        self._most = most
        self._kept: deque[NDArray[np.uint8]] = deque()
        self._count = 0
        self._none = np.zeros((0, ring.record), np.uint8)
        self._change = threading.Condition()
        self._error: Exception | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on, records are taken out only by :meth:`poll`."""
        self._stopped = True
        self._thread.join()

    def poll(self, milliseconds: int, most: int) -> NDArray[np.uint8]:
        """
        The oldest records; wait if there are none yet.

        :param most: take no more than this many.
        :return: u8, shape (n, record); none if none have come.
        :raises ValueError: as of :meth:`Ring.take`.
        """
        if self._stopped:
            self._keep(
                self._ring.take(0 if self._count else milliseconds, self._most - self._count)
            )
        with self._change:
            if not self._stopped:
                self._change.wait_for(lambda: self._count or self._error, milliseconds / 1000)
            if self._error:
                raise self._error
            parts = [self._none]
            while self._kept and most:
                first = self._kept.popleft()
                if len(first) > most:
                    self._kept.appendleft(first[most:])
                parts.append(first[:most])
                most -= len(parts[-1])
                self._count -= len(parts[-1])
        return np.concatenate(parts)

    def _keep(self, records: NDArray[np.uint8]) -> None:
        if len(records):
            with self._change:
                self._kept.append(records)
                self._count += len(records)
                self._change.notify()

    def _run(self) -> None:
        try:
            while not self._stopped:
                records = self._ring.take(_WAIT, self._most - self._count)
                self._keep(records)
                if len(records):
                    # Who is always there for the next record has the kernel wake it for each.
                    time.sleep(_PAUSE)
        except Exception as error:
            with self._change:
                self._error = error
                self._change.notify()
