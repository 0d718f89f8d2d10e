# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read the kexec image that is loaded: the kernel that the next kexec starts, and its command line.

``kexec_file_load()`` copies the segments of an image into pages anywhere in memory, and lists these
in ``struct kimage``; they come to their places on the jump.
Kernel source: ``kimage_load_segment``, ``kimage_add_entry`` and ``for_each_kimage_entry`` in
kexec_core.c.  What is in the segments: ``bzImage64_load`` in kexec-bzimage64.c of x86; of arm64,
``image_load`` in kexec_image.c, and ``of_kexec_alloc_and_setup_fdt`` in drivers/of/kexec.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from drgn import Program

from ..abi import fdt as fdts
from ..abi.keys import U64
from ..facts.next_kernel import LOADED, NextKernel
from ..words.errors import KhoscopeError
from . import next_kernel as images
from .decompress import LIMIT, Damaged, decompress
from .probe import Parts
from .reading import COMMAND_LINE_LIMIT
from .walk import READS, ReadPhys, in_ranges, read_nodes

#: ``IND_*`` (include/linux/kexec.h): what an entry is, in its lowest bits.
IND_DESTINATION: Final = 1
IND_INDIRECTION: Final = 2
IND_DONE: Final = 4
IND_SOURCE: Final = 8

#: The most bytes that segments may have together; the kernel reads files of 4 GiB at most
#: (``KEXEC_FILE_SIZE_MAX``), a kernel and its initrd.
_LARGEST: Final = 1 << 34

#: The most bytes that an arm64 kernel takes for a device tree (``MAX_FDT_SIZE``).
_TREE: Final = 2 << 20

_NAME: Final = "the loaded image"
_HINT: Final = "load it again, with kexec -s -l, or give its FILE"

T = TypeVar("T")


@dataclass(frozen=True)
class Segment:
    """
    A ``struct kexec_segment``.

    :param mem: ``phys_addr_t`` that it is for.
    :param bufsz: bytes that it has, of ``memsz``; the rest are zeros.
    :param in_place: it is already there (``segment_cma``).
    """

    mem: int
    bufsz: int
    memsz: int
    in_place: bool = False


@dataclass(frozen=True)
class Kimage:
    """
    A ``struct kimage``.

    :param address: of the structure itself.
    :param head: its first ``kimage_entry_t``.
    :param start: ``phys_addr_t`` that is jumped to.
    :param file_mode: loaded with kexec_file_load(), not with kexec_load().
    """

    address: int
    head: int
    start: int
    file_mode: bool
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Memory:
    """
    The memory that an image is in.

    :param ram: u64, shape (n, 2), sorted and disjoint: System RAM.
    :param page_size: bytes.
    """

    ram: U64
    page_size: int
    read: ReadPhys

    def pages(self, phys: U64) -> Iterator[bytes]:
        """
        Whole pages, as many as are read at once.

        :param phys: u64, ``phys_addr_t`` of each.
        :raises Damaged: if one of them is not in RAM; :class:`KhoscopeError`: if one cannot be
            read.
        """
        outside = ~in_ranges(self.ram, phys, phys + np.uint64(self.page_size))
        if outside.any():
            raise Damaged(f"a page of it is at {int(phys[outside][0]):#x}, where no RAM is")
        done = 0
        for rows, raw in read_nodes(self.read, phys, self.page_size):
            missing = np.flatnonzero(rows != np.arange(done, done + len(rows)))
            done += int(missing[0]) if len(missing) else len(rows)
            if len(missing):
                break
            yield raw.tobytes()
        if done < len(phys):
            raise KhoscopeError(
                f"{_NAME}: its page at {int(phys[done]):#x} cannot be read",
                "give its FILE, or a vmcore with all kernel pages (makedumpfile -d 23 keeps them)",
            )


def read_loaded_image(
    prog: Program, parts: Parts, ram: U64, read: ReadPhys, moves: bool
) -> NextKernel:
    """
    The kernel that ``kexec_image`` would start, as it would start it.

    :param moves: the kernel runs meanwhile, and somebody may load another image.
    :raises KhoscopeError: if there is none, or it is none that khoscope can read.
    """
    memory = Memory(ram, prog["PAGE_SIZE"].value_(), read)
    for _ in range(READS if moves else 1):
        image = read_kimage(prog, parts)
        try:
            with images.told(_NAME, _HINT):
                listed = entries(image, memory)
                found = kernel_in(image, Contents(image, listed, memory))
                # Another image may be in the same place by now.
                if not moves or (
                    read_kimage(prog, parts) == image
                    and np.array_equal(entries(image, memory), listed)
                ):
                    return found
        except KhoscopeError:
            if not moves or read_kimage(prog, parts) == image:
                raise
    raise KhoscopeError(
        f"{_NAME}: another one was loaded, or this one unloaded, while khoscope read it",
        "look again once nothing loads images any more",
    )


def read_kimage(prog: Program, parts: Parts) -> Kimage:
    """
    Read ``*kexec_image``.

    :raises KhoscopeError: if nothing is loaded, or the debug info does not describe it.
    """
    if not parts.loaded_image:
        raise KhoscopeError(
            "this kernel's debug info does not tell how it keeps a kexec image",
            "give the image's FILE",
        )
    image = prog["kexec_image"].read_()
    if not image:
        raise KhoscopeError("no kexec image is loaded", "load the next kernel: kexec -s -l FILE")
    count, length = image.nr_segments.value_(), image.segment.type_.length or 0
    if count > length:
        raise KhoscopeError(f"{_NAME} has {count:,} segments, and room for {length}", _HINT)
    in_place = [bool(parts.segment_cma and image.segment_cma[i]) for i in range(count)]
    sizes = (
        (each.mem.value_(), each.bufsz.value_(), each.memsz.value_())
        for each in (image.segment[i] for i in range(count))
    )
    return Kimage(
        image.value_(),
        image.head.value_(),
        image.start.value_(),
        bool(image.file_mode),
        tuple(Segment(*each, there) for each, there in zip(sizes, in_place, strict=True)),
    )


def entries(image: Kimage, memory: Memory) -> U64:
    """
    All ``kimage_entry_t`` of an image, but for those that only lead to more of them.

    Mirrors ``for_each_kimage_entry``.

    :raises Damaged: if they do not end, or are not what the kernel writes.
    """
    page = memory.page_size
    sizes = [segment.memsz for segment in image.segments]
    if sum(sizes) > _LARGEST:
        raise Damaged(f"its segments have {sum(sizes):,} bytes")
    # Each segment has an entry for its destination, and one for each page.
    most = sum(-(-size // page) + 1 for size in sizes)
    found: list[U64] = []
    count, seen, entry = 0, set[int](), image.head
    while not entry & IND_DONE:
        if entry % page != IND_INDIRECTION:
            raise Damaged(f"the entry {entry:#x} is in the place of one that ends its list")
        at = entry - IND_INDIRECTION
        if at in seen:
            raise Damaged(f"its list comes to {at:#x} again")
        seen.add(at)
        words = np.frombuffer(b"".join(memory.pages(np.array([at], np.uint64))), "<u8")
        ends = np.flatnonzero((words == 0) | (words & np.uint64(IND_INDIRECTION | IND_DONE) != 0))
        if not len(ends):
            raise Damaged(f"the part of its list at {at:#x} does not end")
        found.append(words[: ends[0]])
        count += int(ends[0])
        if count > most or len(seen) > most:
            raise Damaged("its list has more pages than its segments")
        entry = int(words[ends[0]])
    return np.concatenate([np.zeros(0, np.uint64), *found])


class Contents:
    """
    What is in the segments of an image.

    :param listed: as from :func:`entries`.
    :raises Damaged: if they are not what the kernel writes.
    """

    def __init__(self, image: Kimage, listed: U64, memory: Memory) -> None:
        self._memory = memory
        self._page = np.uint64(memory.page_size)
        bits = listed % self._page
        if not np.isin(bits, (IND_DESTINATION, IND_SOURCE)).all():
            raise Damaged("its list has entries that are neither destinations nor pages")
        starts = np.flatnonzero(bits == IND_DESTINATION)
        if len(listed) and (not len(starts) or starts[0]):
            raise Damaged("its list has pages without a destination")
        row = np.flatnonzero(bits == IND_SOURCE)
        start = starts[np.searchsorted(starts, row) - 1] if len(row) else row
        to = (listed[start] - bits[start]) + (row - start - 1).astype(np.uint64) * self._page
        order = np.argsort(to, kind="stable")
        self._to = to[order]
        if len(again := np.flatnonzero(self._to[1:] == self._to[:-1])):
            raise Damaged(f"its list has two pages for {int(self._to[again[0]]):#x}")
        self._from = (listed[row] - bits[row])[order]

    def read(self, segment: Segment, offset: int, size: int) -> Iterator[bytes]:
        """
        A part of a segment, piece by piece.

        :raises Damaged: here or later, if it has no such part, or its pages are not all there.
        """
        if offset + size > segment.bufsz:
            raise Damaged(f"a segment of {segment.bufsz:,} bytes should have {offset + size:,}")
        before = offset % self._memory.page_size
        first, end = segment.mem + offset - before, segment.mem + offset + size
        left = size
        for piece in self._memory.pages(self._pages(segment, first, end)):
            part = piece[before : before + left]
            before, left = 0, left - len(part)
            yield part

    def _pages(self, segment: Segment, first: int, end: int) -> U64:
        """The pages that are for [first, end), which begins with a page."""
        if first % self._memory.page_size or end > 1 << 63:
            raise Damaged(f"a segment is for {segment.mem:#x}")
        wanted = np.arange(first, end, self._memory.page_size, dtype=np.uint64)
        if segment.in_place:
            return wanted
        at = int(np.searchsorted(self._to, np.uint64(first)))
        if not np.array_equal(self._to[at : at + len(wanted)], wanted):
            raise Damaged(f"its list lacks pages of the segment for {segment.mem:#x}")
        return self._from[at : at + len(wanted)]


def kernel_in(image: Kimage, contents: Contents) -> NextKernel:
    """
    The kernel in an image.

    :raises Damaged: if it is not whole; :class:`KhoscopeError`: if khoscope does not know it.
    """
    starts = [
        (segment, b"".join(contents.read(segment, 0, min(segment.bufsz, images.HEADER))))
        for segment in image.segments
    ]
    parameters = [each for each in starts if images.is_bzimage(each[1])]
    if parameters:
        return _bzimage(*_only("struct boot_params", parameters), image, contents)
    kernels = [each for each in starts if images.is_arm64(each[1]) and each[0].mem == image.start]
    if kernels:
        trees = [segment for segment, start in starts if start.startswith(fdts.MAGIC)]
        return _arm64(*_only("kernel", kernels), _only("device tree", trees), contents)
    by = "kexec_file_load()" if image.file_mode else "kexec_load()"
    raise KhoscopeError(
        f"{_NAME}, loaded with {by}, is neither of a bzImage nor of an arm64 Image",
        "give its FILE" if image.file_mode else "load it with kexec -s -l, or give its FILE",
    )


def _only(what: str, found: list[T]) -> T:
    if len(found) != 1:
        raise Damaged(f"{len(found)} of its segments look like its {what}")
    return found[0]


def _bzimage(segment: Segment, parameters: bytes, image: Kimage, contents: Contents) -> NextKernel:
    """
    As ``bzImage64_load()`` has it: the ``struct boot_params`` with the image's setup header, and
    the command line behind it; the rest of the image is a segment of its own.
    """
    if len(parameters) < images.HEADER:
        raise Damaged("its struct boot_params is not whole")

    def field(low: int, high: int) -> int:
        """A number, and the upper half of it: hdr.… and ext_…."""
        (value,), (upper,) = (struct.unpack_from("<I", parameters, at) for at in (low, high))
        return value | upper << 32

    initrd_at, initrd = field(0x218, 0xC0), field(0x21C, 0xC4)
    line = field(0x228, 0xC8) - segment.mem
    if not 0 <= line < segment.bufsz:
        raise Damaged(f"its command line is at {line + segment.mem:#x}, in another segment")
    size = images.takes(parameters)
    offset, length = images.payload_at(parameters)
    code = _only(
        "kernel",
        [
            each
            for each in image.segments
            if each is not segment
            and not (initrd and each.mem == initrd_at)
            and each.bufsz >= offset + length
            and each.memsz >= (size or 0)
        ],
    )
    payload = b"".join(contents.read(code, offset, length))
    compression, pieces = decompress(payload)
    text = b"".join(contents.read(segment, line, min(segment.bufsz - line, COMMAND_LINE_LIMIT)))
    kernel = NextKernel(
        LOADED,
        compression,
        "",
        size=size,
        initrd=initrd or None,
        command_line=_command_line(text),
    )
    return images.described(kernel, pieces, _HINT)


def _arm64(segment: Segment, start: bytes, tree: Segment, contents: Contents) -> NextKernel:
    """As ``image_load()`` has it: the Image as it is, and what it is to do in a device tree."""
    if segment.bufsz > LIMIT:
        raise Damaged(f"{segment.bufsz:,} bytes")
    line, initrd = _chosen(b"".join(contents.read(tree, 0, min(tree.bufsz, _TREE))))
    kernel = NextKernel(
        LOADED,
        None,
        "",
        size=images.takes(start),
        initrd=initrd,
        command_line=_command_line(line),
    )
    return images.described(kernel, contents.read(segment, 0, segment.bufsz), _HINT)


def _chosen(blob: bytes) -> tuple[bytes, int | None]:
    """What ``/chosen`` of a device tree says: the command line, and the size of the initrd."""
    try:
        chosen = fdts.read(blob).root.child("chosen")
    except fdts.Unreadable as error:
        raise Damaged(f"its device tree cannot be read: {error}") from error
    if chosen is None:
        raise Damaged("its device tree has no /chosen")
    line = chosen.property("bootargs")
    ends = [chosen.property(f"linux,initrd-{name}") for name in ("start", "end")]
    at = [int.from_bytes(each.value, "big") for each in ends if each is not None]
    return b"\0" if line is None else line.value, at[1] - at[0] if len(at) == 2 else None


def _command_line(raw: bytes) -> str:
    line, end, _ = raw.partition(b"\0")
    if not end:
        raise Damaged("its command line does not end")
    return line.decode("utf-8", "backslashreplace")
