# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel images: what they say, in every format, and files that are none."""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import re
import shutil
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import libfdt
import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from khoscope.abi.compatibles import block_limits
from khoscope.abi.keys import Abi, Restore, Tracker
from khoscope.abi.kho_fdt import Fdt, Subtree
from khoscope.checks import RULES, RuleSelection, Severity, check
from khoscope.checks import next_kernel as image_rules
from khoscope.facts.clients import Luo, LuoFile, LuoSession
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.snapshot import Snapshot
from khoscope.sources import next_kernel as image
from khoscope.sources.decompress import LIMIT, PIECE
from khoscope.sources.next_kernel import read_image
from khoscope.words.errors import KhoscopeError
from tests.fuzz import fuzz
from tests.synthetic import FIXED, PLAIN, XARRAYS, Block, snapshot

RELEASE = "7.2.12-test"
BANNER = b"\0\0Linux version 7.2.12-test (root@host) (gcc) #1 SMP\n\0"
TEXT = BANNER + b"kho-v5\0kho\0luo-v5\0memfd-v2\0memfd-\0"
#: What is in the strings of code that only talks about these things.
DECOYS = (
    b"xkho-v1\0-luo-v1\0kho-v2 \0memfd-v1x\0luo-v\0kho-v1234567890\0%s version %s (%s)\0"
    b"kho-v4;\0kho-v4;radix\0kho-v4;radix-v\0luo-v5;Block-v1\0;radix-v1\0Failed to deserialize\0"
)

EXEC, CORE = 2, 4
LZ4_CHUNK = 8 << 20


# Images as the kernel's build makes them


def elf(loaded: Iterable[bytes], rest: bytes = b"", kind: int = EXEC) -> bytes:
    """A 64-bit ELF file with segments to load, and something else."""
    segments = list(loaded)
    at = 64 + 56 * (len(segments) + 1)
    # The first is a note that has the rest.
    headers = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(rest), 0, 1)
    data = rest
    for segment in segments:
        headers += struct.pack(
            "<IIQQQQQQ", 1, 5, at + len(data), 0, 0, len(segment), len(segment) + 99, 4096
        )
        data += segment
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\2\1\1", kind, 62, 1, 0, 64, 0, 0, 64, 56, len(segments) + 1, 64, 0, 0),
    )
    return header + headers + data


def lz4_legacy(data: bytes) -> bytes:
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), LZ4_CHUNK):
        block = lz4.block.compress(data[at : at + LZ4_CHUNK], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


def gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(data) + packer.flush()


X86 = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip,
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=X86),
    "lz4": lz4_legacy,
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
in_every_format = pytest.mark.parametrize("name", PACKERS)


def pack(name: str, data: bytes) -> bytes:
    """Without the size at the end, which gzip has there and others do not."""
    packed = PACKERS[name](data)
    return packed[:-4] if name == "gzip" else packed


def payload(name: str, data: bytes, size: int | None = None) -> bytes:
    """As ``size_append`` leaves it."""
    return pack(name, data) + struct.pack("<I", len(data) if size is None else size)


def bzimage(packed: bytes, sectors: int = 3, length: int | None = None) -> bytes:
    """A boot sector, the setup, some code, the payload, some more."""
    header = bytearray(((sectors or 4) + 1) * 512)
    header[0x1F1] = sectors
    header[0x1FE:0x200] = b"\x55\xaa"
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, 0x020F)
    length = len(packed) if length is None else length
    struct.pack_into("<II", header, 0x248, 0x40, length)
    return bytes(header) + b"\xcc" * 0x40 + packed + b"\xcc" * 0x80


VMLINUX = elf([b"\xcc" * 100, TEXT + DECOYS], b"kho-v9\0luo-v9\0" + BANNER.replace(b"7", b"6"))
#: An image is whole if it unpacks to this.
UNPACKED = elf([b"\xcc" * 5000, TEXT, DECOYS])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def written(data: bytes) -> Path:
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return written


Write = Callable[[bytes], Path]


def expected(path: Path, compression: str | None) -> NextKernel:
    return NextKernel(str(path), compression, RELEASE, ("kho-v5",), ("luo-v5",), ("memfd-v2",))


def unsized(path: Path) -> NextKernel:
    """What an image says, but for the memory that it takes."""
    return replace(read_image(path), size=None)


def refusal(path: Path) -> str:
    """What is said of a file that is refused, with a hint and on one line."""
    with pytest.raises(KhoscopeError) as caught:
        read_image(path)
    assert caught.value.hint
    assert str(path) in caught.value.what
    assert "\n" not in caught.value.what
    return caught.value.what


# What an image says


@in_every_format
@pytest.mark.parametrize("sectors", [0, 1, 64])
def test_bzimage(name: str, sectors: int, write: Write) -> None:
    path = write(bzimage(payload(name, UNPACKED), sectors))
    assert unsized(path) == expected(path, name)


@in_every_format
def test_more_than_one_block(name: str, write: Write) -> None:
    data = elf([os.urandom(256 << 10), bytes(LZ4_CHUNK), os.urandom(PIECE), TEXT])
    path = write(bzimage(payload(name, data)))
    assert unsized(path) == expected(path, name)


def test_vmlinux(write: Write) -> None:
    path = write(VMLINUX)
    assert unsized(path) == expected(path, None)


def test_what_a_vmlinux_takes(write: Write) -> None:
    """At least what it loads, by physical address; nothing that no kernel takes is believed."""

    def size(*loads: tuple[int, int]) -> int | None:
        data = bytearray(elf([UNPACKED, *(b"x" for _ in loads[1:])]))
        for i, (paddr, memsz) in enumerate(loads):
            # The first header is a note.
            struct.pack_into("<Q", data, 64 + 56 * (i + 1) + 24, paddr)
            struct.pack_into("<Q", data, 64 + 56 * (i + 1) + 40, memsz)
        return read_image(write(bytes(data))).size

    assert size((0x100_0000, 0x20_0000)) == 0x20_0000
    assert size((0x100_0000, 0x20_0000), (0x180_0000, 0x1000)) == 0x80_1000
    assert size((0, 1 << 63), (1 << 63, 1)) is None
    assert size((0, 0)) is None


def arm64_image(data: bytes) -> bytes:
    """The 64 bytes in front of an arm64 kernel, and the kernel as it is."""
    fields = (0x14000000, 0, 0, len(data), 10, 0, 0, 0, b"ARM\x64", 0)
    return struct.pack("<IIQQQQQQ4sI", *fields) + data


@pytest.mark.parametrize(("version", "size"), [(0x020F, 40 << 20), (0x0209, None), (0x020F, 0)])
def test_how_much_it_takes(write: Write, version: int, size: int | None) -> None:
    """``init_size``, which older boot protocols do not have."""
    image = bytearray(bzimage(payload("gzip", UNPACKED)))
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<I", image, 0x260, 40 << 20 if size is None else size)
    assert read_image(write(bytes(image))).size == (size or None)


def test_arm64_image(write: Write) -> None:
    path = write(arm64_image(bytes(99) + TEXT))
    size = len(bytes(99) + TEXT)
    assert read_image(path) == replace(expected(path, None), size=size)
    with pytest.raises(KhoscopeError, match="has none"):
        read_image(write(arm64_image(b"")))


def test_arm64_image_that_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "Image"
    path.write_bytes(arm64_image(TEXT))
    os.truncate(path, LIMIT + 1)
    with pytest.raises(KhoscopeError, match=f"{LIMIT + 1:,} bytes"):
        read_image(path)


def test_in_words() -> None:
    kernel = NextKernel("bzImage", "zstd", RELEASE, ("kho-v4", "kho-v5"), ("luo-v5",), ())
    assert kernel.in_words == f"{RELEASE}, bzImage (zstd), kho-v4 and kho-v5, luo-v5"
    assert NextKernel("v", None, RELEASE).in_words == f"{RELEASE}, not compressed, no KHO"


def test_none_and_several(write: Write) -> None:
    found = read_image(write(elf([BANNER + DECOYS])))
    assert (found.kho, found.luo, found.memfd) == ((), (), ())
    found = read_image(write(elf([TEXT, b"\0kho-v4\0", b"luo-v5\0kho-v5\0"])))
    assert (found.kho, found.luo) == (("kho-v4", "kho-v5"), ("luo-v5",))


#: Nodes of LUO's FDT, as linux 7.1 has them; what it says of files without a handler.
FDT_LUO = b"luo-v1\0luo-session-v2\0luo-flb-v1\0"
FAILS = b"\1\x34luo_session: Failed to deserialize files for session [%s] %pe\n\0"


def test_luo_with_an_fdt(write: Write) -> None:
    found = read_image(write(elf([BANNER + b"kho-v3\0memfd-v2\0" + FDT_LUO + FAILS + DECOYS])))
    assert (found.kho, found.luo, found.memfd) == (("kho-v3",), ("luo-v1",), ("memfd-v2",))
    assert (found.luo_session, found.luo_flb) == (("luo-session-v2",), ("luo-flb-v1",))
    assert found.misses_files
    found = read_image(write(elf([BANNER + b"kho-v1\0memfd-v1\0luo-v1\0luo-session-v2\0"])))
    assert (found.luo_session, found.luo_flb) == (("luo-session-v2",), ())
    assert not found.misses_files


@pytest.mark.parametrize("name", [b"kho_preserve_pages", b"kho_preserve_vmalloc"])
def test_functions_of_newer_kernels(name: bytes, write: Write) -> None:
    """Names as the symbols that are exported have them, and BTF; not parts of others."""
    old = (
        BANNER + b"kho-v1\0kho_preserve_phys\0kho_restore_folio\0x" + name + b"\0" + name + b"_x\0"
    )
    found = read_image(write(elf([old])))
    assert (found.newer_functions, found.has_page_bitmaps) == (False, False)
    found = read_image(write(elf([old + name + b"\0"])))
    assert (found.newer_functions, found.has_page_bitmaps) == (True, True)
    found = read_image(write(elf([old + b"luo-v1\0"])))
    assert (found.newer_functions, found.has_page_bitmaps) == (False, True)


def test_composite_compatibles(write: Write) -> None:
    """As a public series writes them: with the structures that they are made of."""
    text = b"kho-v4;radix-v1;vmalloc-v1\0luo-v5;block-v1\0memfd-v2;vmalloc-v1\0"
    found = read_image(write(elf([BANNER + text + DECOYS])))
    assert (found.kho, found.luo) == (("kho-v4;radix-v1;vmalloc-v1",), ("luo-v5;block-v1",))
    assert found.memfd == ("memfd-v2;vmalloc-v1",)
    assert "kho-v4;radix-v1;vmalloc-v1, luo-v5;block-v1, memfd-v2;vmalloc-v1" in found.in_words


@pytest.mark.parametrize("piece", [1, 2, 7, 16, 127, 128, 129, 255, 257, 1000])
def test_long_strings_across_pieces(
    piece: int, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = b"luo-session-v123456789" + b";abcdefghijklmnopqrstuvwx-v1234" * 6 + b"\0"
    monkeypatch.setattr(image, "PIECE", piece)
    for shift in (0, 1, 3, 100):
        found = read_image(write(elf([bytes(shift) + BANNER + FAILS + longest])))
        assert found.luo_session == (longest[:-1].decode(),)
        assert found.misses_files


@pytest.mark.parametrize("piece", [1, 2, 7, 16, 127, 128, 129, 1000])
def test_strings_across_pieces(piece: int, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "PIECE", piece)
    for shift in range(min(piece, 40)):
        path = write(elf([bytes(shift) + TEXT + DECOYS]))
        assert unsized(path) == expected(path, None)


# Directories


@pytest.mark.parametrize(
    "place",
    [
        "bzImage",
        "vmlinuz",
        "vmlinuz-7.2.12-test",
        "boot/vmlinuz-7.2.12-test",
        "lib/modules/7.2.12-test/vmlinuz",
        "usr/lib/modules/7.2.12-test/vmlinuz",
        "arch/x86/boot/bzImage",
        "vmlinux",
        "usr/lib/debug/boot/vmlinux-7.2.12-test",
        "usr/lib/debug/lib/modules/7.2.12-test/vmlinux",
    ],
)
def test_package(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = None if "vmlinux" in place else "zstd"
    path.write_bytes(bzimage(payload(compression, UNPACKED)) if compression else VMLINUX)
    (path.parent / "config-7.2.12-test").write_text("CONFIG_KEXEC_HANDOVER=y\n")
    assert unsized(tmp_path) == expected(path, compression)


def test_same_kernel_in_many_places(tmp_path: Path) -> None:
    """A build directory, or a package with copies and links."""
    (tmp_path / "vmlinux").write_bytes(VMLINUX)
    (tmp_path / "bzImage").write_bytes(bzimage(payload("xz", UNPACKED)))
    (tmp_path / "boot").mkdir()
    shutil.copy(tmp_path / "bzImage", tmp_path / "boot/vmlinuz-7.2.12-test")
    (tmp_path / "vmlinuz").symlink_to("boot/vmlinuz-7.2.12-test")
    (tmp_path / "vmlinuz-loop").symlink_to("vmlinuz-loop")
    (tmp_path / "vmlinuz-gone").symlink_to("nowhere")
    assert unsized(tmp_path) == expected(tmp_path / "bzImage", "xz")


def test_no_kernel_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").mkdir()
    assert "no kernel image in this directory" in refusal(tmp_path)


def test_several_kernels_in_a_directory(tmp_path: Path) -> None:
    for release in ("7.2.12-test", "7.3.4-other"):
        data = UNPACKED.replace(RELEASE.encode(), release.encode())
        (tmp_path / f"vmlinuz-{release}").write_bytes(bzimage(payload("gzip", data)))
    what = refusal(tmp_path)
    for release in ("7.2.12-test", "7.3.4-other"):
        assert f"{tmp_path}/vmlinuz-{release} ({release})" in what


def test_same_release_with_another_abi(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(VMLINUX)
    (tmp_path / "bzImage").write_bytes(
        bzimage(payload("gzip", UNPACKED.replace(b"kho-v5", b"kho-v4")))
    )
    assert "several kernels" in refusal(tmp_path)


def test_too_many_to_look_into(tmp_path: Path) -> None:
    for number in range(17):
        (tmp_path / f"vmlinuz-{number}").write_bytes(b"not looked into")
    assert "17 kernel images" in refusal(tmp_path)


def test_damaged_one_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(b"")
    assert str(tmp_path / "vmlinuz") in refusal(tmp_path)


# What is none


def test_no_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in refusal(tmp_path / "loop")


def test_no_regular_file(tmp_path: Path) -> None:
    """Neither is waited for, nor read for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "not a regular file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no bzImage, no arm64 Image and no vmlinux"),
        (b"Linux version 7.2 (", "no bzImage"),
        (PACKERS["gzip"](VMLINUX), "no bzImage"),
        (b"\x7fELF", "no 64-bit little-endian vmlinux"),
        (elf([TEXT])[:63], "no 64-bit"),
        (elf([TEXT], kind=CORE), "no 64-bit little-endian vmlinux"),
        (b"\x7fELF\1" + VMLINUX[5:], "no 64-bit"),
        (elf([]), "should have one Linux kernel in it, has none"),
        (elf([b"#!/bin/sh\0kho-v5\0"]), "should have one Linux kernel in it, has none"),
        (elf([TEXT, TEXT.replace(b"7.2", b"7.3")]), "has 7.2.12-test and 7.3.12-test"),
        (elf([TEXT, b"".join(b"\0kho-v%d\0" % n for n in range(20))]), "more than 16"),
        (elf([TEXT])[:-1], "it has"),
        (VMLINUX[:54] + b"\x40\0" + VMLINUX[56:], "program headers of 64 bytes"),
        (VMLINUX[:32] + b"\xff" * 8 + VMLINUX[40:], "it has"),
        (bzimage(b"")[:0x24F], "it ends in its header"),
        (bzimage(b""), "in no format"),
        (bzimage(b"\x7fELF"), "in no format"),
        (bzimage(b"\x1f"), "in no format"),
        (bzimage(b"\x1f\x8b"), "too early"),
        (bzimage(payload("xz", elf([]))), "should have one Linux kernel in it, has none"),
        (bzimage(b"", length=1 << 30), "its payload has 1,073,741,824 bytes"),
        (bzimage(b"", length=1 << 20), "it has"),
    ],
)
def test_no_image(data: bytes, what: str, write: Write) -> None:
    assert what in refusal(write(data))


def test_boot_protocol_that_has_no_payload(write: Write) -> None:
    data = bytearray(bzimage(payload("gzip", UNPACKED)))
    data[0x206:0x208] = b"\x07\x02"
    assert "boot protocol 0x0207" in refusal(write(bytes(data)))


def test_absurd_segment(tmp_path: Path) -> None:
    """A sparse file can have as many bytes as it likes."""
    path = tmp_path / "vmlinux"
    data = bytearray(elf([TEXT]))
    struct.pack_into("<Q", data, 64 + 56 + 32, LIMIT + 1)
    path.write_bytes(data)
    os.truncate(path, LIMIT * 2)
    assert f"{LIMIT + 1:,} bytes to load" in refusal(path)


@in_every_format
def test_absurd_size(name: str, write: Write) -> None:
    path = write(bzimage(payload(name, UNPACKED, LIMIT + 1)))
    assert f"says that it unpacks to {LIMIT + 1:,} bytes" in refusal(path)


@in_every_format
def test_bomb(name: str, write: Write) -> None:
    """It unpacks to more than it says: given up before it is in memory."""
    path = write(bzimage(payload(name, bytes(32 << 20), 1000)))
    tracemalloc.start()
    try:
        assert "more than the 1,000 bytes" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


@in_every_format
@pytest.mark.parametrize("wrong", [-1, 1])
def test_other_size_than_it_says(name: str, wrong: int, write: Write) -> None:
    packed = PACKERS[name](UNPACKED)
    packed = packed[:-4] if name == "gzip" else packed
    packed += struct.pack("<I", len(UNPACKED) + wrong)
    what = refusal(write(bzimage(packed)))
    assert (
        f"{len(UNPACKED) + wrong:,} that it says" in what
        or "more than the" in what
        or ("incorrect length check" in what)
    )


@in_every_format
def test_truncated_file(name: str, write: Write) -> None:
    """Cut anywhere up to the end of the payload."""
    whole = bzimage(payload(name, UNPACKED), sectors=1)
    for length in range(0, len(whole) - 0x80, 3):
        refusal(write(whole[:length]))


@in_every_format
def test_truncated_payload(name: str, write: Write) -> None:
    """Cut anywhere, and the header knows nothing of it."""
    packed = pack(name, UNPACKED)
    for length in range(2, len(packed)):
        refusal(write(bzimage(packed[:length] + struct.pack("<I", len(UNPACKED)), sectors=1)))


def test_truncated_vmlinux(write: Write) -> None:
    whole = elf([TEXT])
    for length in range(len(whole)):
        refusal(write(whole[:length]))


@pytest.mark.parametrize(
    ("blocks", "what"),
    [
        ([(5, b"")], "a block of 5 bytes"),
        ([(0, b"")], "a block of 0 bytes"),
        ([(2**32 - 1, b"x" * 20)], "a block of 4,294,967,295 bytes"),
        ([(4, b"\xff" * 4)], "Decompression failed"),
        ([(None, bytes(10)), (None, bytes(10))], "a short block is not the last one"),
    ],
)
def test_damaged_lz4(blocks: list[tuple[int | None, bytes]], what: str, write: Write) -> None:
    packed = b"\x02\x21\x4c\x18"
    for size, block in blocks:
        data = lz4.block.compress(block, store_size=False) if size is None else block
        packed += struct.pack("<I", len(data) if size is None else size) + data
    assert what in refusal(write(bzimage(packed + struct.pack("<I", 10))))


def test_lzo_is_named(write: Write) -> None:
    assert "LZO, which khoscope does not unpack" in refusal(write(bzimage(b"\x89LZO" + bytes(50))))


@pytest.mark.parametrize(("name", "package"), [("zstd", "zstandard"), ("lz4", "lz4")])
def test_package_that_is_not_there(
    name: str, package: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(bzimage(payload(name, UNPACKED)))
    monkeypatch.setitem(sys.modules, package, None)
    assert f"takes the Python package {package}" in refusal(path)


# Whatever a file holds: a kernel, or a refusal


def is_told(path: Path) -> None:
    """A kernel, or two lines; anything else that is raised is a failure."""
    with contextlib.suppress(KhoscopeError):
        assert re.fullmatch(r"[!-~]{1,64}", read_image(path).release)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "image"


IMAGES = [VMLINUX, *(bzimage(payload(name, UNPACKED), 1) for name in PACKERS)]


@fuzz
@given(
    which=st.sampled_from(IMAGES),
    changes=st.lists(
        st.tuples(st.integers(0, len(max(IMAGES, key=len)) - 1), st.integers(0, 255)), max_size=6
    ),
    length=st.none() | st.integers(0, len(max(IMAGES, key=len))),
)
def test_damaged(
    scratch: Path, which: bytes, changes: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(which)
    for at, value in changes:
        data[at % len(data)] = value
    scratch.write_bytes(data[:length])
    is_told(scratch)


@fuzz
@given(
    name=st.sampled_from(sorted(PACKERS)),
    kept=st.integers(2, 60),
    rest=st.binary(max_size=200),
    size=st.integers(0, 2**32 - 1) | st.integers(0, 300),
)
def test_garbage_after_a_magic(scratch: Path, name: str, kept: int, rest: bytes, size: int) -> None:
    packed = PACKERS[name](UNPACKED)[:kept] + rest + struct.pack("<I", size)
    scratch.write_bytes(bzimage(packed, 1))
    is_told(scratch)


@fuzz
@given(
    sectors=st.integers(0, 255),
    offset=st.integers(0, 2**32 - 1) | st.integers(0, 2000),
    length=st.integers(0, 2**32 - 1) | st.integers(0, 2000),
)
def test_damaged_setup_header(scratch: Path, sectors: int, offset: int, length: int) -> None:
    data = bytearray(IMAGES[1])
    data[0x1F1] = sectors
    struct.pack_into("<II", data, 0x248, offset, length)
    scratch.write_bytes(data)
    is_told(scratch)


@fuzz
@given(
    fields=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 2000), min_size=6, max_size=6),
    count=st.integers(0, 2**16 - 1) | st.integers(0, 5),
    table=st.integers(0, 2**64 - 1) | st.integers(0, 200),
)
def test_damaged_program_header(scratch: Path, fields: list[int], count: int, table: int) -> None:
    data = bytearray(VMLINUX)
    struct.pack_into("<Q", data, 32, table)
    struct.pack_into("<H", data, 56, count)
    struct.pack_into("<IIQQQQQQ", data, 64 + 56, 1, 5, *fields)
    scratch.write_bytes(data)
    is_told(scratch)


# image-abi-differs

NEXT = NextKernel(
    *("bzImage", "zstd", "7.3.4-next", ("kho-v4",), ("luo-v5",), ("memfd-v2",)), misses_files=True
)
NOTHING = "it boots as if nothing was handed over"


def handing_over(luo: Luo | None = None, fdt: Fdt | None = None) -> Snapshot:
    facts = snapshot(PLAIN, [], fdt=fdt)
    return replace(facts, outgoing=replace(facts.outgoing, luo=luo))


def session(*handlers: str) -> Luo:
    files = [LuoFile(handler, token, 0x1000) for token, handler in enumerate(handlers)]
    return Luo(0x9000, "luo-v5", 1, True, [LuoSession("vm", False, len(files), files)])


def messages(facts: Snapshot, kernel: NextKernel) -> list[str]:
    return [message.text for message in image_rules.image_abi_differs(facts, kernel)]


def test_rule_is_registered() -> None:
    rule = RULES["image-abi-differs"]
    assert rule.finders == {"next": image_rules.image_abi_differs}
    assert rule.severity == Severity.ERROR
    assert rule.sentence.endswith("than this one hands over.")


@pytest.mark.parametrize(
    "facts",
    [
        handing_over(),
        handing_over(session()),
        handing_over(session("memfd-v2", "vfio-v1")),
        handing_over(session("memfd-v2", "memfd-v2")),
    ],
)
def test_silent_if_the_next_kernel_takes_it(facts: Snapshot) -> None:
    assert messages(facts, NEXT) == []


def test_silent_without_luo_on_either_side() -> None:
    """What this kernel does not hand over the next one need not take."""
    assert messages(handing_over(), replace(NEXT, luo=(), memfd=())) == []
    assert messages(handing_over(), replace(NEXT, luo=("luo-v6",))) == []
    assert messages(handing_over(session()), replace(NEXT, memfd=("memfd-v3",))) == []


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (replace(NEXT, kho=()), f"7.3.4-next has no KHO: {NOTHING}"),
        (
            replace(NEXT, kho=("kho-v5",)),
            f"7.3.4-next takes kho-v5, this kernel hands over kho-v4: {NOTHING}",
        ),
        (
            replace(NEXT, kho=("kho-v5", "kho-v6")),
            f"7.3.4-next takes kho-v5 or kho-v6, this kernel hands over kho-v4: {NOTHING}",
        ),
        (
            replace(NEXT, kho=("kho-v4", "kho-v5")),
            "7.3.4-next has kho-v4 and kho-v5 in it: which it takes cannot be told",
        ),
        (
            replace(NEXT, luo=()),
            "7.3.4-next has no LUO: nobody retrieves what the sessions preserve, it stays "
            "reserved until the next boot",
        ),
        (
            replace(NEXT, luo=("luo-v6",)),
            "7.3.4-next takes luo-v6, this kernel hands over luo-v5: the next kernel panics",
        ),
        (
            replace(NEXT, memfd=()),
            "7.3.4-next has no memfd handler: no session can be retrieved",
        ),
        (
            replace(NEXT, memfd=("memfd-v3",)),
            "7.3.4-next takes memfd-v3, this kernel hands over memfd-v2: no session can be "
            "retrieved",
        ),
        (
            replace(NEXT, memfd=("memfd-v1",), misses_files=False),
            "7.3.4-next takes memfd-v1, this kernel hands over memfd-v2: sessions lose such files "
            "and those behind them, silently",
        ),
    ],
)
def test_fires(kernel: NextKernel, said: str) -> None:
    assert messages(handing_over(session("memfd-v2", "memfd-v2")), kernel) == [said]


@pytest.mark.parametrize(
    ("kernel", "explained"),
    [
        (replace(NEXT, kho=("kho-v5",)), "boots as after a cold start"),
        (replace(NEXT, kho=()), "boots as after a cold start"),
        (replace(NEXT, luo=()), "until a boot without a handover"),
        (replace(NEXT, luo=("luo-v6",)), "the kernel panics"),
        (replace(NEXT, memfd=()), "fails with EIO"),
        (replace(NEXT, memfd=(), misses_files=False), "looks whole"),
    ],
)
def test_only_what_happens_here_is_explained(kernel: NextKernel, explained: str) -> None:
    report = check(handing_over(session("memfd-v2")), kernel)
    (finding,) = [f for f in report.findings if f.rule == "image-abi-differs"]
    every = {"boots as after a cold start", "until a boot without a handover", "the kernel panics"}
    every |= {"fails with EIO", "looks whole"}
    assert [words for words in sorted(every) if words in finding.explain] == [explained]


def test_another_kho_does_not_get_to_luo() -> None:
    """A kernel that takes nothing has no LUO state to panic over."""
    said = messages(handing_over(session()), replace(NEXT, kho=("kho-v5",), luo=("luo-v6",)))
    assert len(said) == 1
    assert NOTHING in said[0]


OLDER = NextKernel("bzImage", "zstd", "6.17.3-next", ("kho-v1",))
LINUX_6_18 = replace(OLDER, release="6.18.15", newer_functions=True)
SMALL = replace(XARRAYS, preserve_bits=1 << 12)
#: With pages of 64 KiB.
LARGE = replace(
    Abi.for_page_shift(16, compatible="kho-v1"),
    **{name: getattr(XARRAYS, name) for name in ("tracker", "finalize", "restores_pages_as")},
    preserve_bits=1 << 19,
)


def finalized(abi: Abi, *blocks: Block) -> Snapshot:
    """All that such a kernel has to have done before a kexec."""
    facts = snapshot(abi, blocks, fdt=Fdt(0x2000, abi.compatible, 0x1000))
    if abi.tracker == Tracker.RADIX:
        return facts
    side = replace(facts.outgoing, serialized=facts.outgoing.tree)
    return replace(facts, finalized=True, outgoing=side)


@pytest.mark.parametrize(
    ("restore", "kernel", "verdict", "said"),
    [
        # Pages stay compound.
        (Restore.SPLIT_FOLIO, LINUX_6_18, "fail", "6.18.15-old as the next kernel will"),
        (Restore.SPLIT_FOLIO, replace(LINUX_6_18, luo=("luo-v1",)), "pass", ""),
        (Restore.PAGES, replace(LINUX_6_18, luo=("luo-v1",)), "pass", ""),
        (Restore.PAGES, LINUX_6_18, "incomplete", "how 6.18.15 restores pages cannot be told"),
        (Restore.PAGES, replace(LINUX_6_18, release="6.18.15-old"), "pass", ""),
        (Restore.FOLIO, replace(LINUX_6_18, luo=("luo-v1",)), "pass", ""),
    ],
)
def test_how_the_next_kernel_restores_pages(
    restore: Restore, kernel: NextKernel, verdict: str, said: str
) -> None:
    facts = finalized(replace(XARRAYS, restores_pages_as=restore), Block.split(0x40000, 2))
    facts = replace(facts, kernel=replace(facts.kernel, release="6.18.15-old"))
    report = check(facts, kernel)
    assert report.verdict == verdict
    wrong = [f.message for f in report.findings if f.rule == "wrong-after-restore"]
    assert any(said in text for text in [*wrong, *report.incomplete]) == bool(said)


@pytest.mark.parametrize(
    ("abi", "kernel", "verdict", "said"),
    [
        (XARRAYS, LINUX_6_18, "pass", ""),
        (LARGE, LINUX_6_18, "pass", ""),
        (SMALL, LINUX_6_18, "fail", "takes bitmaps of 4,096 bytes, this kernel hands over bitm"),
        (
            replace(LARGE, preserve_bits=1 << 12),
            LINUX_6_18,
            "fail",
            "takes bitmaps of 65,536 bytes",
        ),
        (SMALL, OLDER, "incomplete", "of 512 bytes, as this kernel hands over, or of 4,096"),
        (XARRAYS, OLDER, "incomplete", "of 4,096 bytes, as this kernel hands over, or of 512"),
        # It has LUO: linux 6.19 or later.
        (SMALL, replace(OLDER, luo=("luo-v1",)), "fail", "takes bitmaps of 4,096 bytes"),
        (XARRAYS, replace(OLDER, luo=("luo-v1",)), "pass", ""),
        # Nothing is handed over, of whatever size; a tree has no bitmaps.
        (SMALL, replace(OLDER, kho=("kho-v3",)), "fail", NOTHING),
        (PLAIN, replace(OLDER, kho=("kho-v4",)), "pass", ""),
    ],
)
def test_bitmaps_of_two_sizes(abi: Abi, kernel: NextKernel, verdict: str, said: str) -> None:
    """Kernels with the one and with the other call them the same."""
    facts = finalized(abi)
    report = check(facts, kernel)
    assert report.verdict == verdict
    about = [f.message for f in report.findings if f.rule == "image-abi-differs"]
    assert any(said in text for text in [*about, *report.incomplete]) == bool(said)
    alone = check(facts, kernel, RuleSelection(frozenset({"overlap"})))
    assert not alone.incomplete


def test_what_cannot_be_read_is_never_right() -> None:
    said = messages(handing_over(fdt=Fdt(0x2000, problems=["no compatible"])), NEXT)
    assert said == ["the KHO compatible of this kernel cannot be read, to compare it"]
    unread = ["the LUO compatible of this kernel cannot be read, to compare it"]
    assert messages(handing_over(Luo(0x9000, None)), NEXT) == unread
    # A subtree that was not decoded, as in an older snapshot.
    fdt = Fdt(0x2000, "kho-v4", 0x1000, [Subtree("LUO", 0x9000, 32)])
    assert messages(handing_over(fdt=fdt), NEXT) == unread


def test_the_fixed_kernel_after_the_series() -> None:
    fixed = replace(NEXT, kho=("kho-v5",))
    assert messages(snapshot(FIXED, []), fixed) == []
    assert len(messages(snapshot(PLAIN, []), fixed)) == 1


# Composite compatibles: compared as a whole, as the series that brings them does


def composite(kernel: NextKernel, suffix: str) -> NextKernel:
    return replace(kernel, kho=tuple(f"{each}{suffix}" for each in kernel.kho))


@pytest.mark.parametrize(
    ("ours", "theirs", "kinship"),
    [
        (
            "",
            ";radix-v1;vmalloc-v1",
            " (both are kho-v4, only one of them names radix-v1 and vmalloc-v1: the layouts may be "
            "the same, but kernels compare the whole string)",
        ),
        (
            ";radix-v1",
            "",
            " (both are kho-v4, only one of them names radix-v1: the layouts may be the same, but "
            "kernels compare the whole string)",
        ),
        (
            ";radix-v1;vmalloc-v1",
            ";radix-v2;vmalloc-v1",
            " (both are kho-v4, with different versions of radix)",
        ),
    ],
)
def test_composites_that_differ(ours: str, theirs: str, kinship: str) -> None:
    facts = handing_over(session(), Fdt(0x2000, f"kho-v4{ours}", 0x1000))
    (said,) = messages(facts, composite(NEXT, theirs))
    assert said == (
        f"7.3.4-next takes kho-v4{theirs}, this kernel hands over kho-v4{ours}: {NOTHING}{kinship}"
    )


def test_composites_that_agree() -> None:
    parts = ";radix-v1;vmalloc-v1"
    luo = replace(session("memfd-v2;vmalloc-v1"), compatible="luo-v5;block-v1")
    facts = handing_over(luo, Fdt(0x2000, f"kho-v4{parts}", 0x1000))
    kernel = replace(
        composite(NEXT, parts), luo=("luo-v5;block-v1",), memfd=("memfd-v2;vmalloc-v1",)
    )
    assert messages(facts, kernel) == []
    (said,) = messages(facts, replace(kernel, memfd=("memfd-v2",)))
    assert "(both are memfd-v2, only one of them names vmalloc-v1:" in said
    (said,) = messages(facts, replace(kernel, luo=("luo-v5",)))
    assert "the next kernel panics (both are luo-v5, only one of them names block-v1:" in said


def test_another_version_is_no_kin() -> None:
    facts = handing_over(fdt=Fdt(0x2000, "kho-v4;radix-v1", 0x1000))
    for theirs in ("kho-v5;radix-v1", "kho-v5", "kho-v3"):
        (said,) = messages(facts, replace(NEXT, kho=(theirs,)))
        assert said.endswith(NOTHING)


# LUO while it was an FDT


def luo_fdt(*nodes: str) -> bytes:
    """LUO's FDT in linux 6.19 to 7.1, with these children: "NAME COMPATIBLE"."""
    made = libfdt.FdtSw(1 << 12)
    made.finish_reservemap()
    with made.add_node(""):
        made.property_string("compatible", "luo-v1")
        for name, compatible in (each.split() for each in nodes):
            with made.add_node(name):
                made.property_string("compatible", compatible)
    return bytes(made.as_fdt().as_bytearray())


def with_luo_fdt(*nodes: str) -> Snapshot:
    """What such a kernel hands over."""
    blob = luo_fdt(*nodes)
    fdt = Fdt(0x2000, "kho-v1", 0x1000, [Subtree("LUO", 0x9000, len(blob))])
    facts = handing_over(Luo(0x9000, "luo-v1", raw="d00dfeed"), fdt)
    side = replace(facts.outgoing, blobs={**facts.outgoing.blobs, "subtree LUO": blob})
    return replace(facts, outgoing=side)


#: As read in linux 7.0, and in 6.19, which had no FLBs.
LINUX_7_0 = replace(
    NEXT,
    release="7.0",
    kho=("kho-v1",),
    luo=("luo-v1",),
    memfd=("memfd-v1",),
    luo_session=("luo-session-v2",),
    luo_flb=("luo-flb-v1",),
    misses_files=False,
)
LINUX_6_19 = replace(LINUX_7_0, release="6.19", luo_flb=())
SESSIONS, FLBS = "luo-session luo-session-v2", "luo-flb luo-flb-v1"


@pytest.mark.parametrize(
    ("nodes", "kernel", "said"),
    [
        ([SESSIONS, FLBS], LINUX_7_0, []),
        ([SESSIONS], LINUX_6_19, []),
        ([SESSIONS, FLBS], LINUX_6_19, []),
        (
            [SESSIONS],
            LINUX_7_0,
            ["7.0 looks for luo-flb-v1, this kernel hands over no luo-flb: the next kernel panics"],
        ),
        (
            ["luo-session luo-session-v1"],
            LINUX_6_19,
            [
                "6.19 takes luo-session-v2, this kernel hands over luo-session-v1: the next kernel "
                "panics"
            ],
        ),
        (
            ["luo-flb luo-flb-v2"],
            LINUX_7_0,
            [
                "7.0 looks for luo-session-v2, this kernel hands over no luo-session: the next "
                "kernel panics",
                "7.0 takes luo-flb-v1, this kernel hands over luo-flb-v2: the next kernel panics",
            ],
        ),
    ],
)
def test_nodes_of_luo(nodes: list[str], kernel: NextKernel, said: list[str]) -> None:
    assert messages(with_luo_fdt(*nodes), kernel) == said


def test_a_luo_without_an_fdt_has_no_nodes() -> None:
    facts = handing_over(session())
    assert messages(facts, replace(NEXT, luo_session=("luo-session-v2",))) == []


# block-too-large


def test_limits() -> None:
    two_gib = 1 << 31
    for compatible, size, order in (
        *(("kho-v1", two_gib, 10), ("kho-v2", two_gib, 10), ("kho-v3", two_gib, None)),
        *(("kho-v4", None, None), ("kho-v5", None, None), ("kho-v4;radix-v1", None, None)),
        *(("kho-v3;radix-v1", two_gib, None), (None, None, None)),
    ):
        limits = block_limits(compatible, 10)
        assert (limits.size, limits.order) == (size, order), compatible
