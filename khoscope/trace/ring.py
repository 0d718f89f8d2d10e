# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A BPF ring buffer (kernel/bpf/ringbuf.c) read as an array.

bcc and libbpf call back for each record.  In Python, that costs more than it costs the kernel to
make the record.  Records of one size already are an array in memory.
"""

from __future__ import annotations

import mmap
import select
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: ``BPF_RINGBUF_HDR_SZ``: u32 length with the two flag bits, and u32 for the kernel's own use.
_HEADER: Final = 8
#: ``BPF_RINGBUF_BUSY_BIT``: being written.
_BUSY: Final = 1 << 31


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
        self._record = record
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
        if (length != self._record).any():
            raise ValueError(f"records of {np.unique(length)} bytes, expected {self._record}")
        records = slots[:, _HEADER:].copy()
        self._consumed[0] = start + len(records) * (_HEADER + self._record)
        return records

    def _whole(self, start: int, most: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The slots from ``start`` to the first that is being written, and their lengths."""
        stride = _HEADER + self._record
        count = min((int(self._produced[0]) - start) // stride, most)
        at = start % self._size
        slots = self._data[at : at + count * stride].reshape(count, stride)
        # Read each length only once: the kernel clears the bit when the record is whole.
        length = np.ascontiguousarray(slots[:, :4]).view(np.uint32)[:, 0]
        busy = np.flatnonzero(length & np.uint32(_BUSY))
        end = int(busy[0]) if len(busy) else count
        return slots[:end], length[:end]
