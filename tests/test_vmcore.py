# SPDX-License-Identifier: LGPL-2.1-or-later
"""vm/vmcore.py: what a cut-down vmcore holds, as drgn and this program read it back."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from drgn import FaultError, Program
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from vm.vmcore import PAGE, Load, Vmcore, VmcoreError, write

X86_64 = 62
#: Where physical memory is: 8 pages from 1 MiB on, 2 pages at 4 GiB, which QEMU gives a virtual
#: address.
LOW, HIGH = 1 << 20, 1 << 32
#: What drgn asks of a kernel's vmcore.
INFO = b"""OSRELEASE=7.2.0-test
PAGESIZE=4096
SYMBOL(swapper_pg_dir)=ffffffff82000000
KERNELOFFSET=0
"""


def note(name: bytes, kind: int, content: bytes) -> bytes:
    padded = [part.ljust(-(-len(part) // 4) * 4, b"\0") for part in (name + b"\0", content)]
    return struct.pack("<III", len(name) + 1, len(content), kind) + b"".join(padded)


NOTES = note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, INFO)


def page(number: int) -> bytes:
    """The content of a page, unlike that of any other."""
    return struct.pack("<Q", number) * (PAGE // 8)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    memory = b"".join(map(page, range(10)))
    path = tmp_path / "whole"
    loads = [Load(0, 0, LOW, 8 * PAGE), Load(8 * PAGE, HIGH, HIGH, 2 * PAGE)]
    write(path, X86_64, NOTES, loads, memory)
    return path


def segments(path: Path) -> list[tuple[str, int, int, int]]:
    with path.open("rb") as file:
        return [
            (each["p_type"], each["p_vaddr"], each["p_paddr"], each["p_memsz"])
            for each in ELFFile(file).iter_segments()
        ]


def opened(path: Path) -> Program:
    prog = Program()
    prog.set_core_dump(path)
    return prog


def test_a_whole_one_is_read_back(whole: Path) -> None:
    prog = opened(whole)
    assert prog.read(LOW, 8 * PAGE, physical=True) == b"".join(map(page, range(8)))
    assert prog.read(HIGH + PAGE, 8, physical=True) == page(9)[:8]
    with Vmcore(whole) as core:
        assert core.machine == X86_64
        assert core.notes == NOTES
        assert [(load.virtual, load.physical, load.size) for load in core.loads] == [
            (0, LOW, 8 * PAGE),
            (HIGH, HIGH, 2 * PAGE),
        ]


def test_what_is_kept_and_what_is_not(whole: Path, tmp_path: Path) -> None:
    """Neighbours are one run; runs keep the addresses that they had."""
    kept = tmp_path / "kept"
    with Vmcore(whole) as core:
        core.keep([LOW, LOW + 3 * PAGE, LOW + 4 * PAGE, LOW + 7 * PAGE, HIGH + PAGE], kept)
    assert segments(kept) == [
        ("PT_NOTE", 0, 0, len(NOTES)),
        ("PT_LOAD", 0, LOW, PAGE),
        ("PT_LOAD", 3 * PAGE, LOW + 3 * PAGE, 2 * PAGE),
        ("PT_LOAD", 7 * PAGE, LOW + 7 * PAGE, PAGE),
        ("PT_LOAD", HIGH + PAGE, HIGH + PAGE, PAGE),
    ]
    prog = opened(kept)
    assert prog.read(LOW + 3 * PAGE, 2 * PAGE, physical=True) == page(3) + page(4)
    assert prog.read(HIGH + PAGE, PAGE, physical=True) == page(9)
    for missing in (LOW + PAGE, LOW + 5 * PAGE - 1, HIGH):
        with pytest.raises(FaultError):
            prog.read(missing, 8, physical=True)


def test_the_notes_are_the_same(whole: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with Vmcore(whole) as core:
        core.keep([LOW], kept)
    with kept.open("rb") as file:
        (notes,) = (s for s in ELFFile(file).iter_segments() if isinstance(s, NoteSegment))
        assert [(each["n_name"], each["n_descsz"]) for each in notes.iter_notes()] == [
            ("CORE", 336),
            ("VMCOREINFO", len(INFO)),
        ]
    assert opened(kept)["UTS_RELEASE"].string_() == b"7.2.0-test"


def test_every_page_that_is_read_is_noted(whole: Path) -> None:
    with Vmcore(whole) as core:
        prog = core.program()
        assert core.read == set()
        assert prog.read(LOW + PAGE + 8, 8, physical=True) == page(1)[:8]
        assert core.read == {LOW + PAGE}
        # Across a border, and in another run of memory.
        assert prog.read(LOW + 3 * PAGE - 4, 8, physical=True) == page(2)[-4:] + page(3)[:4]
        assert prog.read(HIGH, 1, physical=True) == page(8)[:1]
        assert core.read == {LOW + at * PAGE for at in (1, 2, 3)} | {HIGH}
        with pytest.raises(FaultError):
            prog.read(0, 8, physical=True)
        assert len(core.read) == 4


def test_too_many_runs(whole: Path, tmp_path: Path) -> None:
    loads = [Load(0, 0, 2 * PAGE * number, PAGE) for number in range(1 << 16)]
    with pytest.raises(VmcoreError, match="65537 program headers"):
        write(tmp_path / "many", X86_64, NOTES, loads, page(0))


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x7fELF", b"no ELF file" * 100, b"\x7fELF\x02\x02\x01".ljust(4096, b"\0")],
    ids=["empty", "cut", "other", "big endian"],
)
def test_no_vmcore(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(damage)
    with pytest.raises(VmcoreError, match=str(path)):
        Vmcore(path)


def test_program_headers_beyond_the_end(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(VmcoreError, match="cut"):
        Vmcore(cut)
