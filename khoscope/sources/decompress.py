# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Unpack the payload of a bzImage, piece by piece: it is never whole in memory, whatever size it says.

Kernel source: ``lib/decompress*.c``, whose functions these are named after, and ``size_append`` of
``scripts/Makefile.lib``: the payload's last four bytes are the unpacked size (gzip has it there
anyway).
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final

#: The most bytes that a kernel may unpack to.  Large kernels have 100 MiB.
LIMIT: Final = 512 << 20
#: How many bytes are unpacked or read at once; LZ4's blocks are larger.
PIECE: Final = 1 << 20
#: The most memory for a decompressor's dictionary, bytes.
_MEMORY: Final = 256 << 20

#: ``LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE`` (decompress_unlz4.c).
_LZ4_CHUNK: Final = 8 << 20
#: What lzop writes.  No distribution packs its kernels like that, and Python's library for it needs
#: a compiler: give the vmlinux of such a kernel instead.
_LZO: Final = b"\x89L"

_ENDS: Final = "its payload ends too early"


class Damaged(Exception):
    """A kernel image that no boot loader could start, or that unpacks to absurd sizes."""


def decompress(payload: bytes) -> tuple[str, Iterator[bytes]]:
    """
    Unpack a payload.

    :return: name of its format, and what is in it.
    :raises Damaged: here or later, if it is not whole.
    :raises ModuleNotFoundError: if the Python package for its format is not there.
    """
    if payload[:2] == _LZO:
        raise Damaged("its payload is compressed with LZO, which khoscope does not unpack")
    name, unpack = _FORMATS.get(payload[:2], ("", None))
    if unpack is None:
        raise Damaged("its payload is compressed in no format that Linux knows")
    size = int.from_bytes(payload[-4:], "little")
    if size > LIMIT:
        raise Damaged(f"says that it unpacks to {size:,} bytes")
    return name, _measured(unpack(payload), size)


def _measured(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The pieces, if they add up to exactly this size."""
    left = size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise Damaged(f"unpacks to more than the {size:,} bytes that it says")
        yield piece
    if left:
        raise Damaged(f"unpacks to {size - left:,} bytes, not to the {size:,} that it says")


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[at : at + PIECE] for at in range(0, len(data), PIECE))


def gunzip(data: bytes) -> Iterator[bytes]:
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        for piece in _cut(data):
            while piece and not inflate.eof:
                yield inflate.decompress(piece, PIECE)
                piece = inflate.unconsumed_tail
        yield inflate.flush()
    except zlib.error as error:
        raise Damaged(str(error)) from error
    if not inflate.eof:
        raise Damaged(_ENDS)


def bunzip2(data: bytes) -> Iterator[bytes]:
    return _fed(bz2.BZ2Decompressor(), data)


def unlzma(data: bytes) -> Iterator[bytes]:
    return _fed(lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MEMORY), data)


def unxz(data: bytes) -> Iterator[bytes]:
    return _fed(lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY), data)


def _fed(unpack: bz2.BZ2Decompressor | lzma.LZMADecompressor, data: bytes) -> Iterator[bytes]:
    try:
        for piece in _cut(data):
            yield unpack.decompress(piece, PIECE)
            while not (unpack.needs_input or unpack.eof):
                yield unpack.decompress(b"", PIECE)
            if unpack.eof:
                return
    # bz2's own error is a bare OSError.
    except (OSError, lzma.LZMAError) as error:
        raise Damaged(str(error)) from error
    raise Damaged(_ENDS)


def unzstd(data: bytes) -> Iterator[bytes]:
    import zstandard

    try:
        yield from zstandard.ZstdDecompressor(max_window_size=_MEMORY).read_to_iter(
            data, write_size=PIECE
        )
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error


def unlz4(data: bytes) -> Iterator[bytes]:
    """
    The legacy format: blocks, each after its packed size, u32.  Only the end of the data ends them.
    """
    import lz4.block

    at, end = 4, len(data) - 4
    chunk = _LZ4_CHUNK
    while at < end:
        # Many small blocks would be a way to keep khoscope busy.
        if chunk < _LZ4_CHUNK:
            raise Damaged("a short block is not the last one")
        (packed,) = _fields("<I", data, at)
        at += 4 + packed
        if not packed or at > end:
            raise Damaged(f"a block of {packed:,} bytes, of which {end - at + packed:,} are there")
        try:
            block = lz4.block.decompress(data[at - packed : at], uncompressed_size=_LZ4_CHUNK)
        except lz4.block.LZ4BlockError as error:
            raise Damaged(str(error)) from error
        chunk = len(block)
        yield block


def _fields(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error as error:
        raise Damaged(_ENDS) from error


#: By the magic numbers of ``compressed_formats`` (decompress.c).
_FORMATS: Final[dict[bytes, tuple[str, Callable[[bytes], Iterator[bytes]]]]] = {
    b"\x1f\x8b": ("gzip", gunzip),
    b"BZ": ("bzip2", bunzip2),
    b"\x5d\0": ("lzma", unlzma),
    b"\xfd7": ("xz", unxz),
    b"\x02!": ("lz4", unlz4),
    b"\x28\xb5": ("zstd", unzstd),
}
