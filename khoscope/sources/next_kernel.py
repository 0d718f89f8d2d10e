# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read what a kernel image says about the handovers that its kernel takes.

Kernel source: ``Documentation/arch/x86/boot.rst`` for the bzImage and
``Documentation/arch/arm64/booting.rst`` for the Image; the strings are those of
``include/linux/kho/abi/`` and ``linux_banner``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from ..facts.files import open_file
from ..facts.next_kernel import NextKernel
from ..words.errors import KhoscopeError
from .decompress import LIMIT, PIECE, Damaged, decompress

#: Where kernels are in a package, a root, /boot or a build directory.
_PLACES: Final = [
    *("bzImage", "vmlinuz", "vmlinuz-*", "vmlinux", "arch/x86/boot/bzImage"),
    *("Image", "arch/arm64/boot/Image"),
    *("boot/vmlinuz-*", "lib/modules/*/vmlinuz", "usr/lib/modules/*/vmlinuz"),
    *("usr/lib/debug/boot/vmlinux-*", "usr/lib/debug/lib/modules/*/vmlinux"),
]
#: The most images in one directory, and the most different strings of a kind in one image.
_MANY: Final = 16

#: The boot sector and the setup header up to init_size, and up to payload_length; an ELF header is
#: shorter.
HEADER: Final = 0x264
_SHORT_HEADER: Final = 0x250

_HINT: Final = (
    "give a bzImage (vmlinuz), an arm64 Image or a vmlinux, or a directory with one kernel in it"
)

#: What follows in a composite compatible: other structures (:mod:`khoscope.abi.compatibles`).
_PARTS: Final = rb"(?:;[a-z][a-z0-9_-]{0,23}-v[0-9]{1,4}){0,6}"
#: In the middle of C strings: what luo_session_deserialize() says as it fails is the second.
_INSIDE: Final = {
    "release": re.compile(rb"Linux version ([!-~]{1,64}) \("),
    "misses_files": re.compile(rb"(Failed to deserialize files for session)"),
}
#: Each is a whole C string.  Names of functions are those of exported ones, or of BTF; kallsyms
#: keeps names compressed.
_WHOLE: Final = {
    **{
        kind: re.compile(rb"(%b-v[0-9]{1,9}%b)\0" % (kind.replace("_", "-").encode(), _PARTS))
        for kind in ("kho", "luo", "memfd", "luo_session", "luo_flb")
    },
    "newer_functions": re.compile(rb"(kho_preserve_(?:pages|vmalloc))\0"),
}
#: No match is longer, even with the byte before it.
_LONGEST: Final = 256


def read_image(path: Path) -> NextKernel:
    """
    The kernel in a bzImage, an arm64 Image, a vmlinux, or a directory that has one kernel in it.

    :raises KhoscopeError: if there is none, or several, or it is damaged or cannot be read.
    """
    with told(str(path), _HINT):
        images = _images(path) if path.is_dir() else [path]
    if not images:
        raise KhoscopeError(f"{path}: no kernel image in this directory", _HINT)
    if len(images) > _MANY:
        raise KhoscopeError(f"{path}: {len(images)} kernel images", "give one of them")
    kernels: dict[NextKernel, NextKernel] = {}
    for kernel in map(_read, images):
        # A vmlinux next to its bzImage is the same kernel.
        same = dataclasses.replace(kernel, path="", compression=None, size=None)
        first = kernels.setdefault(same, kernel)
        # The bzImage takes more than the vmlinux in it.
        most = max(first.size or 0, kernel.size or 0) or None
        kernels[same] = dataclasses.replace(first, size=most)
    if len(kernels) > 1:
        which = ", ".join(f"{k.path} ({k.release})" for k in kernels.values())
        raise KhoscopeError(f"{path}: several kernels: {which}", "give one of these files")
    return next(iter(kernels.values()))


def with_initrd(kernel: NextKernel, path: Path) -> NextKernel:
    """
    The kernel with the size of its initrd.

    :raises KhoscopeError: if that is no file that can be read.
    """
    with open_file(path, "give the initrd (initramfs) that is loaded with the kernel") as file:
        return dataclasses.replace(kernel, initrd=os.fstat(file.fileno()).st_size)


@contextmanager
def told(name: str, hint: str) -> Iterator[None]:
    """
    Turn whatever keeps an image from being read into two lines.

    :param name: of the image, for people.
    """
    try:
        yield
    except OSError as error:
        raise KhoscopeError(f"{name}: {error.strerror}", hint) from error
    except Damaged as error:
        raise KhoscopeError(f"{name}: no kernel image to read: {error}", hint) from error
    except ModuleNotFoundError as error:
        raise KhoscopeError(
            f"{name}: to unpack it takes the Python package {error.name}",
            f"pip install {error.name} (khoscope[images] has all of these), or give the kernel's"
            " vmlinux",
        ) from error


def _images(directory: Path) -> list[Path]:
    """The kernel images in a directory, each file once."""
    found: dict[Path, Path] = {}
    for place in _PLACES:
        for path in sorted(directory.glob(place)):
            if path.is_file():
                found.setdefault(path.resolve(), path)
    return list(found.values())


def _read(path: Path) -> NextKernel:
    with told(str(path), _HINT), open_file(path, _HINT) as file:
        start = file.read(HEADER)
        size = takes(start)
        pieces: Iterable[bytes]
        if start.startswith(b"\x7fELF"):
            loads = _loads(file, start)
            compression, size = None, _span(loads)
            pieces = (each for load in loads for each in _range(file, load.offset, load.filesz))
        elif is_bzimage(start):
            compression, pieces = decompress(_payload(file, start))
        elif is_arm64(start):
            compression, pieces = None, _whole(file)
        else:
            raise KhoscopeError(f"{path}: no bzImage, no arm64 Image and no vmlinux", _HINT)
        return described(NextKernel(str(path), compression, "", size=size), pieces, _HINT)


def described(kernel: NextKernel, pieces: Iterable[bytes], hint: str) -> NextKernel:
    """
    A kernel with all that its strings say.

    :param kernel: what is known of it otherwise.
    :param pieces: the kernel, unpacked.
    :raises KhoscopeError: if there is none in them, or several; :class:`Damaged` likewise.
    """
    found = _strings(pieces)
    releases = found["release"]
    if len(releases) != 1:
        which = " and ".join(releases) or "none"
        raise KhoscopeError(f"{kernel.path}: should have one Linux kernel in it, has {which}", hint)
    return dataclasses.replace(
        kernel,
        release=releases[0],
        kho=found["kho"],
        luo=found["luo"],
        memfd=found["memfd"],
        luo_session=found["luo_session"],
        luo_flb=found["luo_flb"],
        misses_files=bool(found["misses_files"]),
        newer_functions=bool(found["newer_functions"]),
    )


def is_bzimage(start: bytes) -> bool:
    """Whether a setup header is there, in a bzImage or in a ``struct boot_params``."""
    return start[0x202:0x206] == b"HdrS"


def is_arm64(start: bytes) -> bool:
    """Whether an arm64 Image begins so (``struct arm64_image_header``)."""
    return start[0x38:0x3C] == b"ARM\x64"


def takes(start: bytes) -> int | None:
    """Bytes that a kernel takes in one piece while it starts; None: it does not say."""
    if is_bzimage(start) and len(start) >= HEADER:
        (version,) = struct.unpack_from("<H", start, 0x206)
        # A vmlinux has no such header, and older protocols no init_size.
        return struct.unpack_from("<I", start, 0x260)[0] or None if version >= 0x020A else None
    if is_arm64(start):
        return struct.unpack_from("<Q", start, 16)[0] or None
    return None


def payload_at(start: bytes) -> tuple[int, int]:
    """
    Where the compressed kernel is in a bzImage's protected-mode part, and how many bytes it has.

    :param start: with the setup header.
    :raises Damaged: if it does not say.
    """
    if len(start) < _SHORT_HEADER:
        raise Damaged("it ends in its header")
    (version,) = struct.unpack_from("<H", start, 0x206)
    if version < 0x0208:
        raise Damaged(f"boot protocol {version:#06x} does not say where the payload is")
    offset, length = struct.unpack_from("<II", start, 0x248)
    if length > LIMIT:
        raise Damaged(f"its payload has {length:,} bytes")
    return offset, length


def _payload(file: IO[bytes], start: bytes) -> bytes:
    """The compressed kernel in a bzImage."""
    offset, length = payload_at(start)
    # setup_sects, where 0 means 4, does not count the boot sector.
    setup = ((start[0x1F1] or 4) + 1) * 512
    return b"".join(_range(file, setup + offset, length))


@dataclass(frozen=True)
class _Load:
    """What an ELF file loads (``Elf64_Phdr``): from where in the file, and to where in memory."""

    offset: int
    filesz: int
    paddr: int
    memsz: int


def _loads(file: IO[bytes], start: bytes) -> list[_Load]:
    """What an ELF file loads, which leaves its debug info out."""
    # 64 bit, little endian, ET_EXEC or ET_DYN: not an object file, and not a memory dump, which
    # contains the strings of everybody.
    if start[4:6] != b"\2\1" or start[16:18] not in (b"\2\0", b"\3\0") or len(start) < 64:
        raise Damaged("an ELF file, but no 64-bit little-endian vmlinux")
    (table,) = struct.unpack_from("<Q", start, 32)
    size, count = struct.unpack_from("<HH", start, 54)
    if size != 56:
        raise Damaged(f"program headers of {size} bytes")
    headers = b"".join(_range(file, table, size * count))
    loads = [
        _Load(offset, filesz, paddr, memsz)
        for kind, _, offset, _, paddr, filesz, memsz, _ in struct.iter_unpack("<IIQQQQQQ", headers)
        if kind == 1
    ]
    total = sum(load.filesz for load in loads)
    if total > LIMIT:
        raise Damaged(f"{total:,} bytes to load")
    return loads


def _span(loads: list[_Load]) -> int | None:
    """Bytes of memory from the first to the last that is loaded; None: more than a kernel has."""
    end = max((load.paddr + load.memsz for load in loads), default=0)
    span = end - min((load.paddr for load in loads), default=0)
    return span if 0 < span <= LIMIT else None


def _whole(file: IO[bytes]) -> Iterator[bytes]:
    """An arm64 Image: it is not packed."""
    size = os.fstat(file.fileno()).st_size
    if size > LIMIT:
        raise Damaged(f"{size:,} bytes")
    yield from _range(file, 0, size)


def _range(file: IO[bytes], offset: int, length: int) -> Iterator[bytes]:
    """A range of a file, piece by piece, if all of it is there."""
    size = os.fstat(file.fileno()).st_size
    if offset + length > size:
        raise Damaged(f"it has {size:,} bytes, and needs {offset + length:,}")
    file.seek(offset)
    while length:
        piece = file.read(min(length, PIECE))
        if not piece:
            raise Damaged("it shrank while it was read")
        length -= len(piece)
        yield piece


def _strings(pieces: Iterable[bytes]) -> dict[str, tuple[str, ...]]:
    """The strings that tell about a kernel, each once, by kind."""
    patterns = _INSIDE | _WHOLE
    found: dict[str, set[str]] = {name: set() for name in patterns}
    before = b"\0"
    for piece in pieces:
        text = before + piece
        for name, pattern in patterns.items():
            for match in pattern.finditer(text):
                if name in _INSIDE or _begins(text, match.start()):
                    found[name].add(match[1].decode("ascii"))
            if len(found[name]) > _MANY:
                raise Damaged(f"more than {_MANY} different {name} strings")
        before = text[-_LONGEST:]
    return {name: tuple(sorted(each)) for name, each in found.items()}


def _begins(text: bytes, at: int) -> bool:
    """
    Whether a string begins there; one at the very start was already seen with what precedes it.
    """
    return at > 0 and not 0x20 <= text[at - 1] < 0x7F
