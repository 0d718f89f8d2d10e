# SPDX-License-Identifier: LGPL-2.1-or-later
"""
vmcores that are damaged: whatever drgn makes of them, it is said in two lines.

They are opened in a process of their own: what drgn, libelf or libkdumpfile do with them may be
worse than an exception.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from drgn import BadDataError, FaultError, MissingDebugInfoError

from khoscope.sources import open as open_module
from khoscope.sources.kernel import KernelSource
from khoscope.sources.open import open_core
from khoscope.words.errors import KhoscopeError

MUTANTS: Final = 200
SEED: Final = 11
TIMEOUT: Final = 120.0

_INFO: Final = "\n".join(
    [
        *("OSRELEASE=7.2.0-test", f"BUILD-ID={'12' * 20}", "PAGESIZE=4096", "KERNELOFFSET=0"),
        *("SYMBOL(init_uts_ns)=ffffffff82000000", "OFFSET(uts_namespace.name)=0"),
        *("SYMBOL(swapper_pg_dir)=ffffffff82001000", "NUMBER(phys_base)=0"),
        *("SYMBOL(_stext)=ffffffff81000000", "NUMBER(pgtable_l5_enabled)=0"),
        *("SYMBOL(kallsyms_names)=ffffffff82002000", "SYMBOL(kallsyms_num_syms)=ffffffff82002100"),
        *("SYMBOL(kallsyms_token_table)=ffffffff82002200", "SYMBOL(mem_section)=ffffffff82002300"),
        *("SYMBOL(kallsyms_token_index)=ffffffff82002400", "LENGTH(mem_section)=2048"),
        *("SYMBOL(kallsyms_offsets)=ffffffff82002600", "NUMBER(SECTION_SIZE_BITS)=27"),
        "",
    ]
)
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_PAGES: Final = 8


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    padded = name + bytes(-len(name) % 4)
    return struct.pack("<III", len(name), len(data), kind) + padded + data + bytes(-len(data) % 4)


def vmcore() -> bytes:
    """An ELF vmcore of some pages, in which everything points to something."""
    notes = _note(b"CORE\0", 1, bytes(32) + struct.pack("<I", 7) + bytes(300))
    notes += _note(b"VMCOREINFO\0", 0, _INFO.encode())
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header = _HEADER.pack(ident, 4, 62, 1, 0, _HEADER.size, 0, 0, _HEADER.size, 56, 2, 0, 0, 0)
    at = _HEADER.size + 2 * _SEGMENT.size
    pages = (at + len(notes) + 4095) & -4096
    size = _PAGES * 4096
    segments = _SEGMENT.pack(4, 0, at, 0, 0, len(notes), len(notes), 4)
    virtual = 0xFFFF_FFFF_8200_0000
    segments += _SEGMENT.pack(1, 7, pages, virtual, 0x200_0000, size, size, 4096)
    return (header + segments + notes).ljust(pages, b"\0") + bytes(range(256)) * (size // 256)


def mutants(whole: bytes) -> Iterator[bytes]:
    """Headers and notes with changes, and files that end too early."""
    dice = random.Random(SEED)
    front = len(whole) - _PAGES * 4096
    words = (0, 1, 4, 4096, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    for number in range(MUTANTS):
        raw = bytearray(whole)
        if number % 5 == 0:
            yield bytes(raw[: dice.randrange(len(raw) if number % 2 else front)])
            continue
        for _ in range(dice.choice((1, 1, 2, 5))):
            at = dice.randrange(dice.choice((_HEADER.size, 180, front)))
            if dice.random() < 0.5:
                raw[at] = dice.randrange(256)
            else:
                struct.pack_into("<Q", raw, at & -8, dice.choice(words))
        yield bytes(raw)


def open_all(directory: Path) -> None:
    """Open all of them, and say which could be."""
    core = directory / "core"
    for number, raw in enumerate(mutants(vmcore())):
        core.write_bytes(raw)
        print(number, end=" ", flush=True)
        try:
            prog = open_core(core)
            KernelSource(prog, "a mutant", False)
            print("opened", flush=True)
        except KhoscopeError as error:
            print("said", error.what.count("\n"), error.hint.count("\n"), flush=True)


def test_damaged_vmcores(tmp_path: Path) -> None:
    where = f"Path({str(tmp_path)!r})"
    command = f"from tests.{Path(__file__).stem} import *; open_all({where})"
    result = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, (result.stdout[-60:], result.stderr)
    lines = result.stdout.splitlines()
    assert len(lines) == MUTANTS
    # Without debug info, none can be read.
    assert [line.split(" ", 1)[1] for line in lines] == ["said 0 0"] * MUTANTS


@pytest.mark.parametrize("error", [BadDataError("missing NT_AUXV"), FaultError("no memory", 1)])
def test_what_drgn_raises_when_it_looks_for_debug_info(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    class Prog:
        def set_core_dump(self, path: Path) -> None:
            pass

        def load_debug_info(self, *_: object, **__: object) -> None:
            raise error

    (tmp_path / "core").touch()
    monkeypatch.setattr(open_module, "Program", Prog)
    with pytest.raises(KhoscopeError, match="cannot be made out"):
        open_core(tmp_path / "core")


@pytest.mark.parametrize("error", [KeyError("ours"), AttributeError("ours"), TypeError("ours")])
def test_a_bug_of_ours_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    class Prog:
        def set_core_dump(self, path: Path) -> None:
            raise error

    (tmp_path / "core").touch()
    monkeypatch.setattr(open_module, "Program", Prog)
    with pytest.raises(type(error)):
        open_core(tmp_path / "core")


def test_it_is_one_that_drgn_knows(tmp_path: Path) -> None:
    """Undamaged, it lacks its debug info alone."""
    (tmp_path / "core").write_bytes(vmcore())
    with pytest.raises(KhoscopeError, match=f"build id {'12' * 20}") as raised:
        open_core(tmp_path / "core")
    assert isinstance(raised.value.__cause__, Exception)
    assert not isinstance(raised.value.__cause__, MissingDebugInfoError)
