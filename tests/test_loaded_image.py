# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image that is loaded: read out of memory as kexec_file_load() leaves it, sound or broken."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import libfdt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.facts.next_kernel import LOADED, NextKernel
from khoscope.sources.loaded_image import (
    IND_DESTINATION,
    IND_DONE,
    IND_INDIRECTION,
    IND_SOURCE,
    Contents,
    Kimage,
    Memory,
    Segment,
    entries,
    kernel_in,
)
from khoscope.sources.next_kernel import read_image, told
from khoscope.words.errors import KhoscopeError
from tests.fuzz import fuzz
from tests.made_up import DATA, DIRECT_MAP, MadeUp, mapped
from tests.test_image import UNPACKED, arm64_image, bzimage, in_every_format, payload

PAGE = 4096
RAM = 1 << 30
#: Entries in a page of them, without the one that leads on.
PER_PAGE = PAGE // 8 - 1

PARAMETERS, CODE, INITRD, TREE = 0x3000_0000, 0x2000_0000, 0x1000_0000, 0x3800_0000
LINE = b"root=/dev/vda kho=on caf\xc3\xa9 \xff"
LINE_AT = 0x1000
MEMSZ = 3 << 20


@dataclass
class Made:
    """An image in memory; its pages are anywhere, and all that was never written is zeros."""

    segments: list[Segment] = field(default_factory=list)
    #: ``kimage_entry_t``, but for those that lead to more of them.
    words: list[int] = field(default_factory=list)
    pages: dict[int, bytes] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)
    start: int = 0
    file_mode: bool = True
    #: Changes the pages of entries, by their address.
    damage: Callable[[dict[int, list[int]]], None] = lambda _: None
    head: int | None = None
    _next: int = 0x40_0000

    def page(self) -> int:
        """A page; some are neighbours, others are not."""
        self._next += PAGE * (1 if self._next // PAGE % 5 else 3)
        return self._next

    def segment(self, mem: int, data: bytes, memsz: int = 0, in_place: bool = False) -> None:
        memsz = max(memsz, -(-len(data) // PAGE) * PAGE)
        self.segments.append(Segment(mem, len(data), memsz, in_place))
        if not in_place:
            self.words.append(mem | IND_DESTINATION)
        for at in range(0, memsz, PAGE):
            page = mem + at if in_place else self.page()
            if at < len(data):
                self.pages[page] = data[at : at + PAGE].ljust(PAGE, b"\0")
            if not in_place:
                self.words.append(page | IND_SOURCE)

    def kimage(self) -> Kimage:
        lists = {}
        parts = [self.words[at : at + PER_PAGE] for at in range(0, len(self.words), PER_PAGE)]
        addresses = [self.page() for _ in parts]
        ends = [*(at | IND_INDIRECTION for at in addresses[1:]), IND_DONE]
        for at, part, end in zip(addresses, parts, ends, strict=bool(parts)):
            lists[at] = [*part, end]
        self.damage(lists)
        for at, part in lists.items():
            self.pages[at] = b"".join(word.to_bytes(8, "little") for word in part).ljust(
                PAGE, b"\0"
            )
        head = addresses[0] | IND_INDIRECTION if addresses else IND_DONE
        return Kimage(
            DIRECT_MAP,
            head if self.head is None else self.head,
            self.start,
            self.file_mode,
            tuple(self.segments),
        )

    def read(self, address: int, size: int) -> bytes | None:
        assert 0 <= address <= address + size <= RAM, "this is not RAM"
        pages = range(address & -PAGE, address + size, PAGE)
        if self.unreadable & set(pages):
            return None
        raw = b"".join(self.pages.get(page, bytes(PAGE)) for page in pages)
        return raw[address % PAGE :][:size]

    @property
    def memory(self) -> Memory:
        return Memory(np.array([[0, RAM]], np.uint64), PAGE, self.read)

    def kernel(self) -> NextKernel:
        image = self.kimage()
        with told("the loaded image", "load it again"):
            return kernel_in(image, Contents(image, entries(image, self.memory), self.memory))

    def refusal(self) -> str:
        with pytest.raises(KhoscopeError) as caught:
            self.kernel()
        assert caught.value.hint
        assert caught.value.what.startswith("the loaded image")
        assert "\n" not in caught.value.what
        return caught.value.what


def image_of(compression: str = "zstd") -> bytes:
    image = bytearray(bzimage(payload(compression, UNPACKED)))
    struct.pack_into("<I", image, 0x260, MEMSZ)
    return bytes(image)


def boot_params(image: bytes, line: bytes = LINE, initrd: int = 0, at: int = LINE_AT) -> bytes:
    """``struct boot_params`` with the command line behind it, as setup_cmdline() has it."""
    raw = bytearray(0x1000)
    raw[0x1F1:0x264] = image[0x1F1:0x264]
    for low, high, value in (
        (0x218, 0xC0, INITRD if initrd else 0),
        (0x21C, 0xC4, initrd),
        (0x228, 0xC8, PARAMETERS + at),
    ):
        struct.pack_into("<I", raw, low, value & 0xFFFF_FFFF)
        struct.pack_into("<I", raw, high, value >> 32)
    return bytes(raw) + line + bytes(60)


def made(image: bytes, parameters: bytes | None = None, initrd: int = 0, **more: bool) -> Made:
    """As ``bzImage64_load()`` makes it: scratch, purgatory, parameters, kernel, initrd."""
    loaded = Made()
    loaded.segment(0x3F00_0000, bytes(48), **more)
    loaded.segment(0x3E00_0000, b"\x90" * 17_000, **more)
    if parameters is None:
        parameters = boot_params(image, initrd=initrd)
    loaded.segment(PARAMETERS, parameters, **more)
    loaded.segment(CODE, image[4 * 512 :], MEMSZ, **more)
    if initrd:
        loaded.segment(INITRD, b"\xee" * initrd, **more)
    return loaded


def whole() -> Made:
    """One in which nothing is wrong; its list has two pages."""
    loaded = made(image_of(), initrd=70_000)
    assert PER_PAGE < len(loaded.words) < 2 * PER_PAGE
    return loaded


def told_by_file(image: bytes, tmp_path: Path) -> NextKernel:
    path = tmp_path / "bzImage"
    path.write_bytes(image)
    return read_image(path)


@in_every_format
@pytest.mark.parametrize("in_place", [False, True])
def test_bzimage(name: str, in_place: bool, tmp_path: Path) -> None:
    """The same as the file says, and the command line; also where no page has to be moved."""
    image = image_of(name)
    found = made(image, initrd=70_000, in_place=in_place).kernel()
    assert found == replace(
        told_by_file(image, tmp_path),
        path=LOADED,
        initrd=70_000,
        command_line="root=/dev/vda kho=on café \\xff",
    )
    assert (found.size, found.compression) == (MEMSZ, name)


def test_without_an_initrd() -> None:
    found = made(image_of()).kernel()
    assert (found.initrd, found.is_loaded) == (None, True)


def test_an_empty_command_line() -> None:
    found = made(image_of(), boot_params(image_of(), b"")).kernel()
    assert (found.command_line, found.is_loaded) == ("", True)


def test_what_is_above_4_gib() -> None:
    """An initrd may be; its size and the command line's address have upper halves, too."""
    parameters = bytearray(boot_params(image_of()))
    struct.pack_into("<I", parameters, 0xC4, 1)
    struct.pack_into("<I", parameters, 0x21C, 5)
    assert made(image_of(), bytes(parameters)).kernel().initrd == (1 << 32) + 5
    struct.pack_into("<I", parameters, 0xC8, 1)
    assert "command line is at 0x130001000" in made(image_of(), bytes(parameters)).refusal()


def test_segments_in_any_order() -> None:
    """As kexec_load() may have them, whose program makes the same segments."""
    loaded = made(image_of(), initrd=70_000)
    backwards = Made(file_mode=False)
    contents = {s.mem: b"" for s in loaded.segments}
    image = loaded.kimage()
    parts = Contents(image, entries(image, loaded.memory), loaded.memory)
    for each in loaded.segments:
        contents[each.mem] = b"".join(parts.read(each, 0, each.bufsz))
    for each in reversed(loaded.segments):
        backwards.segment(each.mem, contents[each.mem], each.memsz)
    assert backwards.kernel() == loaded.kernel()


def test_parts_of_segments() -> None:
    data = bytes(range(256)) * 100
    loaded = Made()
    loaded.segment(CODE, data)
    image = loaded.kimage()
    parts = Contents(image, entries(image, loaded.memory), loaded.memory)
    for offset, size in ((0, 25_600), (1, 1), (4095, 2), (4096, 4096), (5000, 20_600), (25_600, 0)):
        found = b"".join(parts.read(image.segments[0], offset, size))
        assert found == data[offset : offset + size]


# arm64


def device_tree(line: str | None = "kho=on", initrd: tuple[int, int] | None = None) -> bytes:
    made = libfdt.FdtSw(1 << 12)
    made.finish_reservemap()
    with made.add_node(""), made.add_node("chosen"):
        if line is not None:
            made.property_string("bootargs", line)
        for name, at in zip(("start", "end"), initrd or (), strict=False):
            made.property_u64(f"linux,initrd-{name}", at)
    return bytes(made.as_fdt().as_bytearray())


def arm64(tree: bytes) -> Made:
    image = arm64_image(UNPACKED)
    loaded = Made(start=CODE)
    loaded.segment(0x3F00_0000, bytes(48))
    loaded.segment(CODE, image, MEMSZ)
    loaded.segment(INITRD, bytes(9000))
    loaded.segment(TREE, tree)
    return loaded


def test_arm64(tmp_path: Path) -> None:
    image = arm64_image(UNPACKED)
    found = arm64(device_tree("kho=on a b", (INITRD, INITRD + 9000))).kernel()
    said = told_by_file(image, tmp_path)
    assert found == replace(said, path=LOADED, initrd=9000, command_line="kho=on a b")


def test_arm64_without_a_command_line() -> None:
    found = arm64(device_tree(None)).kernel()
    assert (found.command_line, found.initrd) == ("", None)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (b"nothing", "0 of its segments look like its device tree"),
        (device_tree()[:60], "its device tree cannot be read"),
        (bytes(device_tree()).replace(b"chosen", b"choses"), "no /chosen"),
    ],
)
def test_arm64_with_a_broken_tree(tree: bytes, said: str) -> None:
    assert said in arm64(tree).refusal()


def test_arm64_that_is_not_started() -> None:
    loaded = arm64(device_tree())
    loaded.start = INITRD
    assert "neither of a bzImage nor of an arm64 Image" in loaded.refusal()


# Lists that no kernel writes


#: The entry of the kernel's first page.
FIRST = 12


def outside(loaded: Made) -> None:
    loaded.words[FIRST] = RAM | IND_SOURCE


def straddling(loaded: Made) -> None:
    loaded.words[FIRST] = (1 << 64) - PAGE | IND_SOURCE


def lacking(loaded: Made) -> None:
    # The kernel's pages follow those of the parameters, then.
    del loaded.words[FIRST - 1]


def no_destination(loaded: Made) -> None:
    del loaded.words[0]


def of_no_kind(loaded: Made) -> None:
    loaded.words[FIRST] &= -PAGE
    loaded.words[FIRST] |= 16


def of_two_kinds(loaded: Made) -> None:
    loaded.words[FIRST] |= IND_DESTINATION


def too_many(loaded: Made) -> None:
    loaded.words += [loaded.page() | IND_SOURCE for _ in range(9)]


def at_two_places(loaded: Made) -> None:
    loaded.words[0] = CODE | IND_DESTINATION


def unreadable(loaded: Made) -> None:
    at = [w - IND_SOURCE for w in loaded.words if w & IND_SOURCE]
    loaded.unreadable.add(at[8])


def unending(loaded: Made) -> None:
    loaded.segments[0] = replace(loaded.segments[0], memsz=1 << 40)


def loop(loaded: Made) -> None:
    def damage(lists: dict[int, list[int]]) -> None:
        first, second = lists
        lists[second][-1] = first | IND_INDIRECTION

    loaded.damage = damage


def loop_of_one(loaded: Made) -> None:
    def damage(lists: dict[int, list[int]]) -> None:
        first, _ = lists
        lists[first][-1] = first | IND_INDIRECTION

    loaded.damage = damage


def full_page(loaded: Made) -> None:
    def damage(lists: dict[int, list[int]]) -> None:
        first, _ = lists
        lists[first][-1] = lists[first][-2]

    loaded.damage = damage


def cut_off(loaded: Made) -> None:
    def damage(lists: dict[int, list[int]]) -> None:
        _, second = lists
        lists[second][-1] = 0

    loaded.damage = damage


def leads_away(loaded: Made) -> None:
    def damage(lists: dict[int, list[int]]) -> None:
        first, _ = lists
        lists[first][-1] = RAM + PAGE | IND_INDIRECTION

    loaded.damage = damage


def empty_pages_without_end(loaded: Made) -> None:
    """Each leads to the next, and none has an entry."""

    def damage(lists: dict[int, list[int]]) -> None:
        at = 0x800_0000
        _, second = lists
        lists[second][-1] = at | IND_INDIRECTION
        for _ in range(5000):
            lists[at] = [at + PAGE | IND_INDIRECTION]
            at += PAGE

    loaded.damage = damage


def no_list(loaded: Made) -> None:
    loaded.head = IND_DONE


def not_finished(loaded: Made) -> None:
    loaded.head = 0


def head_leads_away(loaded: Made) -> None:
    loaded.head = 1 << 52 | IND_INDIRECTION


def odd_place(loaded: Made) -> None:
    loaded.segments[2] = replace(loaded.segments[2], mem=PARAMETERS + 8)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (outside, "a page of it is at 0x40000000, where no RAM is"),
        (straddling, "a page of it is at 0xfffffffffffff000, where no RAM is"),
        (lacking, "its list lacks pages of the segment for 0x20000000"),
        (no_destination, "its list has pages without a destination"),
        (of_no_kind, "neither destinations nor pages"),
        (of_two_kinds, "neither destinations nor pages"),
        (too_many, "its list has more pages than its segments"),
        (at_two_places, "its list has two pages for 0x20000000"),
        (unreadable, "cannot be read"),
        (unending, "its segments have 1,0"),
        (loop, "its list comes to"),
        (loop_of_one, "its list comes to"),
        (full_page, "does not end"),
        (cut_off, "the entry 0x0 is in the place of one that ends its list"),
        (leads_away, "a page of it is at 0x40001000, where no RAM is"),
        (empty_pages_without_end, "its list has more pages than its segments"),
        (no_list, "its list lacks pages of the segment for 0x3f000000"),
        (not_finished, "the entry 0x0 is in the place of one that ends its list"),
        (head_leads_away, "a page of it is at 0x10000000000000, where no RAM is"),
        (odd_place, "a segment is for 0x30000008"),
    ],
)
def test_broken_lists(damage: Callable[[Made], None], said: str) -> None:
    loaded = whole()
    loaded.kernel()
    loaded = whole()
    damage(loaded)
    assert said in loaded.refusal()


@fuzz
@given(
    row=st.integers(0, 500),
    word=st.integers(0, 2**64 - 1)
    | st.builds(
        lambda page, bits: page * PAGE | bits, st.integers(0, RAM // PAGE), st.integers(0, 15)
    ),
)
def test_a_damaged_entry(row: int, word: int) -> None:
    """It is refused, or is of a page that nobody looks at."""
    loaded, sound = whole(), whole().kernel()

    def damage(lists: dict[int, list[int]]) -> None:
        lists[next(iter(lists))][row] = word

    loaded.damage = damage
    with contextlib.suppress(KhoscopeError):
        found = loaded.kernel()
        assert (found.release, found.kho) == (sound.release, sound.kho)


# Images that none would load


def parameters(image: bytes, **fields: tuple[int, str, int]) -> bytes:
    raw = bytearray(boot_params(image))
    for at, layout, value in fields.values():
        struct.pack_into(layout, raw, at, value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ((0x202, "<I", 0), "neither of a bzImage nor of an arm64 Image"),
        ((0x228, "<I", PARAMETERS - 1), "its command line is at 0x2fffffff, in another segment"),
        ((0x228, "<I", PARAMETERS + (1 << 20)), "in another segment"),
        ((0x206, "<H", 0x207), "boot protocol 0x0207"),
        ((0x248, "<I", 1 << 31), "0 of its segments look like its kernel"),
        ((0x24C, "<I", 1 << 31), "its payload has"),
        ((0x24C, "<I", 1 << 20), "0 of its segments look like its kernel"),
        ((0x260, "<I", MEMSZ + PAGE), "0 of its segments look like its kernel"),
        ((0x248, "<I", 1), "compressed in no format that Linux knows"),
    ],
)
def test_damaged_parameters(field: tuple[int, str, int], said: str) -> None:
    image = image_of()
    assert said in made(image, parameters(image, field=field)).refusal()


def test_a_command_line_without_an_end() -> None:
    raw = boot_params(image_of()).rstrip(b"\0")
    assert "its command line does not end" in made(image_of(), raw).refusal()


def test_parameters_that_end_early() -> None:
    raw = boot_params(image_of())[:0x250]
    assert "struct boot_params is not whole" in made(image_of(), raw).refusal()


def test_two_of_a_kind() -> None:
    loaded = made(image_of())
    loaded.segment(TREE, boot_params(image_of()))
    assert "2 of its segments look like its struct boot_params" in loaded.refusal()
    loaded = made(image_of())
    loaded.segment(TREE, image_of()[4 * 512 :], MEMSZ)
    assert "2 of its segments look like its kernel" in loaded.refusal()


def test_a_damaged_payload() -> None:
    image = bytearray(image_of())
    image[-500:-300] = bytes(200)
    made(bytes(image)).refusal()


def test_nothing_in_it() -> None:
    assert "loaded with kexec_file_load()" in Made().refusal()
    assert "loaded with kexec_load()" in Made(file_mode=False).refusal()


# struct kimage


KIMAGE = (
    "u64 head; u64 start; u64 nr_segments; kexec_segment segment[16]; u64 segment_cma[16];"
    " u32 file_mode; kimage_kho kho"
)
MEMBERS = {"kexec_segment": "u64 buf; u64 bufsz; u64 mem; u64 memsz", "kimage": KIMAGE}


def struct_kimage(image: Kimage, cma: bool = True) -> bytes:
    raw = struct.pack("<QQQ", image.head, image.start, len(image.segments))
    for each in image.segments:
        raw += struct.pack("<QQQQ", 0, each.bufsz, each.mem, each.memsz)
    raw += bytes(32 * (16 - len(image.segments)))
    if cma:
        places = [bool(each.in_place) for each in image.segments]
        raw += b"".join(place.to_bytes(8, "little") for place in places).ljust(128, b"\0")
    return raw + struct.pack("<IIQ", image.file_mode, 0, 0x5000)


def put(machine: MadeUp, loaded: Made, cma: bool = True) -> int:
    """An image in a machine's memory; where its structure is."""
    image = loaded.kimage()
    for page, data in loaded.pages.items():
        machine.memory.pages[page] = bytearray(data)
    return machine.new(struct_kimage(image, cma))


def small(line: bytes = LINE, at: int = 0x10_0000, in_place: bool = False) -> Made:
    """One that fits into a machine that is made up."""
    image = bytearray(image_of())
    struct.pack_into("<I", image, 0x260, 1 << 16)
    parameters = bytearray(boot_params(bytes(image), line))
    struct.pack_into("<I", parameters, 0x228, 0x300_0000 + LINE_AT)
    loaded = Made(_next=at)
    loaded.segment(0x300_0000, bytes(parameters), in_place=in_place)
    loaded.segment(0x200_0000, bytes(image[4 * 512 :]), 1 << 16, in_place=in_place)
    return loaded


@pytest.fixture(autouse=True)
def _mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with mapped(monkeypatch):
        yield


@pytest.mark.parametrize("in_place", [False, True])
def test_a_kernel_source(in_place: bool) -> None:
    machine = MadeUp(members=MEMBERS)
    machine.set("kexec_image", put(machine, small(in_place=in_place)))
    found = machine.source(moves=True).loaded_image()
    assert found == small().kernel()
    assert found.command_line is not None


def test_before_there_was_cma() -> None:
    """Up to linux 6.16."""
    machine = MadeUp(members={**MEMBERS, "kimage": KIMAGE.replace(" u64 segment_cma[16];", "")})
    machine.set("kexec_image", put(machine, small(), cma=False))
    assert machine.source(moves=True).loaded_image() == small().kernel()


def refusal(machine: MadeUp) -> str:
    with pytest.raises(KhoscopeError) as caught:
        machine.source(moves=True).loaded_image()
    assert caught.value.hint
    return caught.value.what


def test_nothing_is_loaded() -> None:
    assert refusal(MadeUp(members=MEMBERS)) == "no kexec image is loaded"


def test_debug_info_that_does_not_tell() -> None:
    assert "does not tell how it keeps a kexec image" in refusal(MadeUp())


def test_more_segments_than_there_is_room_for() -> None:
    machine = MadeUp(members=MEMBERS)
    at = put(machine, small())
    machine.words(at + 16, 17)
    machine.set("kexec_image", at)
    assert refusal(machine) == "the loaded image has 17 segments, and room for 16"


def test_memory_that_is_not_there() -> None:
    machine = MadeUp(members=MEMBERS, faults={DIRECT_MAP + 0x3F0_0000})
    machine.set("kexec_image", DIRECT_MAP + 0x3F0_0000)
    assert "kernel memory cannot be read" in refusal(machine)


class Loading:
    """Puts images in the place of one another, as soon as khoscope reads the list of one."""

    def __init__(self, machine: MadeUp, *following: int) -> None:
        self._machine, self._following = machine, list(following)
        self._read = machine.memory.read
        machine.memory.read = self.read  # type: ignore[method-assign]

    def read(self, address: int, size: int) -> bytes | None:
        raw = self._read(address, size)
        variable = self._machine.address("kexec_image") - DATA
        at = int.from_bytes(self._machine.data[variable : variable + 8], "little")
        head = (self._read(at - DIRECT_MAP, 8) or b"")[:8] if at else b""
        if address == int.from_bytes(head, "little") - IND_INDIRECTION and self._following:
            self._machine.set("kexec_image", self._following.pop(0))
        return raw


def test_another_is_loaded_meanwhile() -> None:
    machine = MadeUp(members=MEMBERS)
    images = [put(machine, small(b"number=%d" % n, n << 20)) for n in range(1, 6)]
    machine.set("kexec_image", images[0])
    Loading(machine, images[1])
    assert machine.source(moves=True).loaded_image().command_line == "number=2"
    # It never comes to an end.
    machine.set("kexec_image", images[0])
    Loading(machine, *images[1:])
    assert "another one was loaded" in refusal(machine)


def test_it_is_unloaded_meanwhile() -> None:
    machine = MadeUp(members=MEMBERS)
    machine.set("kexec_image", put(machine, small()))
    Loading(machine, 0)
    assert refusal(machine) == "no kexec image is loaded"


def test_a_broken_one_is_replaced_meanwhile() -> None:
    machine = MadeUp(members=MEMBERS)
    broken = small(at=1 << 20)
    broken.words[0] |= 32
    at, sound = put(machine, broken), put(machine, small(at=2 << 20))
    machine.set("kexec_image", at)
    assert "neither destinations nor pages" in refusal(machine)
    Loading(machine, sound)
    assert machine.source(moves=True).loaded_image() == small().kernel()
