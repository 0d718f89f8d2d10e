# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in the guest: fills memory, and pins what is left of it for long, as far as the kernel lets.

    pin.py fill anon|thp|shmem|file MIB           fill memory; a child keeps it, if need be
    pin.py pin touched|untouched [thp|hugetlb]    pin until the kernel refuses; print JSON

What is pinned is anonymous memory, as fixed buffers of io_uring: FOLL_LONGTERM. ``touched`` memory
is there before it is pinned, wherever the kernel has put it. ``untouched`` memory is allocated
while it is pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

MIB = 1 << 20

# arch/x86/entry/syscalls/syscall_64.tbl
SYS_IO_URING_SETUP = 425
SYS_IO_URING_REGISTER = 427
# include/uapi/linux/io_uring.h
IORING_REGISTER_BUFFERS2 = 15
IORING_REGISTER_BUFFERS_UPDATE = 16
IORING_RSRC_REGISTER_SPARSE = 1
SIZEOF_IO_URING_PARAMS = 120
#: IORING_MAX_REG_BUFFERS of io_uring/rsrc.c
MAX_BUFFERS = 1 << 14
# include/uapi/asm-generic/mman-common.h
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_POPULATE_WRITE = 23
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000

#: Size of one buffer, a huge page.
STEP = 2 * MIB

libc = ctypes.CDLL(None, use_errno=True)
#: Memory that stays mapped.
kept: list[mmap.mmap] = []


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def oom_score_adj(value: int) -> None:
    Path("/proc/self/oom_score_adj").write_text(str(value))


def aligned(memory: mmap.mmap) -> int:
    """The first address in some memory where a huge page may be."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return -(-start // STEP) * STEP


def populate(start: int, size: int) -> None:
    advice = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_POPULATE_WRITE)
    checked(advice, "MADV_POPULATE_WRITE")


# -- fill -----------------------------------------------------------------------------------------


def fill_cache(size: int) -> None:
    # A hole takes as much page cache as data, and no disk.
    with open("/root/filler", "wb") as file:
        file.truncate(size)
    with open("/root/filler", "rb", buffering=0) as file:
        while file.read(4 * MIB):
            pass


def fill_memory(kind: str, size: int) -> int:
    """The child that holds the memory."""
    ready, is_ready = os.pipe()
    if child := os.fork():
        os.close(is_ready)
        if not os.read(ready, 1):
            raise SystemExit("the memory does not suffice")
        return child
    oom_score_adj(-1000)
    how = mmap.MAP_SHARED if kind == "shmem" else mmap.MAP_PRIVATE
    memory = mmap.mmap(-1, size + STEP, how | mmap.MAP_ANONYMOUS)
    if kind != "shmem":
        memory.madvise(MADV_HUGEPAGE if kind == "thp" else MADV_NOHUGEPAGE)
    populate(aligned(memory), size)
    os.write(is_ready, b"x")
    # Nobody waits for the end of this output.
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    while True:
        signal.pause()


def fill(kind: str, mib: str) -> None:
    size = int(mib) * MIB
    if kind == "file":
        fill_cache(size)
        print(f"filled {mib} MiB: page cache")
    else:
        print(f"filled {mib} MiB: {kind}, held by process {fill_memory(kind, size)}")


# -- pin ------------------------------------------------------------------------------------------


class Ring:
    """An io_uring with room for many fixed buffers."""

    def __init__(self) -> None:
        params = ctypes.create_string_buffer(SIZEOF_IO_URING_PARAMS)
        self.fd = checked(libc.syscall(SYS_IO_URING_SETUP, 1, params), "io_uring_setup")
        # struct io_uring_rsrc_register: nr, flags, resv2, data, tags
        room = struct.pack("=IIQQQ", MAX_BUFFERS, IORING_RSRC_REGISTER_SPARSE, 0, 0, 0)
        self._register(IORING_REGISTER_BUFFERS2, room)

    def _register(self, code: int, argument: bytes) -> None:
        call = libc.syscall(SYS_IO_URING_REGISTER, self.fd, code, argument, len(argument))
        checked(call, "io_uring_register")

    def pin(self, place: int, start: int, size: int) -> None:
        iovec = ctypes.create_string_buffer(struct.pack("=QQ", start, size))
        # struct io_uring_rsrc_update2: offset, resv, data, tags, nr, resv2
        update = struct.pack("=IIQQII", place, 0, ctypes.addressof(iovec), 0, 1, 0)
        self._register(IORING_REGISTER_BUFFERS_UPDATE, update)


def memory_to_pin(pages: str) -> tuple[int, int]:
    """Address and size of all that may be pinned; there is no memory behind it yet."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    if pages == "hugetlb":
        size = int(Path("/proc/sys/vm/nr_hugepages").read_text()) * STEP
        memory = mmap.mmap(-1, size, flags | MAP_HUGETLB)
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = mmap.mmap(-1, size, flags)
        memory.madvise(MADV_HUGEPAGE if pages == "thp" else MADV_NOHUGEPAGE)
    kept.append(memory)
    return aligned(memory), size


def pin_all(progress: mmap.mmap, how: str, pages: str) -> int:
    """Pins until the kernel refuses. Returns the error; ``progress`` has the number of bytes."""
    start, size = memory_to_pin(pages)
    ring = Ring()
    if how == "touched" and pages == "hugetlb":
        populate(start, size)
    for place in range(size // STEP):
        try:
            if how == "touched" and pages != "hugetlb":
                populate(start + place * STEP, STEP)
            ring.pin(place, start + place * STEP, STEP)
        except OSError as error:
            return error.errno or errno.EIO
        progress[:8] = struct.pack("=Q", (place + 1) * STEP)
    return 0


def protect_all() -> None:
    """Nobody who runs now is to be killed for lack of memory."""
    for path in Path("/proc").glob("[0-9]*/oom_score_adj"):
        with contextlib.suppress(OSError):
            path.write_text("-1000")


def spare() -> int:
    """A process to be killed in place of others.

    What a killed process has pinned is free only when its io_uring is gone. Whoever needs memory
    before that has the next process killed, and if there is none, the kernel panics.
    """
    child = os.fork()
    if child == 0:
        oom_score_adj(500)
        signal.pause()
    return child


def free_outside() -> int:
    """Free memory outside of CMA, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, cma = (int(lines[name].split()[0]) << 10 for name in ("MemFree", "CmaFree"))
    return free - cma


def pin(how: str, pages: str = "small") -> None:
    """A child pins, and may be killed for it. It leaves how far it got in a page that we share."""
    protect_all()
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    spares = [spare() for _ in range(8)]
    answer, give = os.pipe()
    child = os.fork()
    if child == 0:
        oom_score_adj(1000)
        number = pin_all(progress, how, pages)
        os.write(give, struct.pack("=i", number))
        signal.pause()
    os.close(give)
    said = os.read(answer, 4)
    (number,) = struct.unpack("=i", said) if said else (None,)
    end = "SIGKILL" if number is None else errno.errorcode.get(number, "nothing")
    for each in (child, *spares):
        os.kill(each, signal.SIGKILL)
        os.waitpid(each, 0)
    (pinned,) = struct.unpack("=Q", progress[:8])
    deadline = time.monotonic() + 20
    while pages != "hugetlb" and free_outside() < pinned * 0.9 and time.monotonic() < deadline:
        time.sleep(0.1)
    print(json.dumps({"pinned": pinned, "end": end}))


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "fill":
        fill(*words)
    else:
        pin(*words)
