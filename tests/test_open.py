# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels that cannot be looked at: what is said of them."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from drgn import Architecture, FindObjectFlags, Object, Platform, Program, ProgramFlags

from khoscope.sources import btf, host_files
from khoscope.sources import open as open_module
from khoscope.sources.kernel import KernelSource, told
from khoscope.words.errors import KhoscopeError


class NoKcore:
    """A drgn program on a kernel that lets nobody read its memory."""

    def set_kernel(self) -> None:
        raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("none integrity [confidentiality]\n", "locked down (confidentiality)"),
        ("[none] integrity confidentiality\n", "even by root"),
    ],
)
def test_root_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, said: str
) -> None:
    lockdown = tmp_path / "lockdown"
    lockdown.write_text(mode)
    monkeypatch.setattr(host_files, "LOCKDOWN", lockdown)
    monkeypatch.setattr(open_module, "Program", NoKcore)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(KhoscopeError) as raised:
        open_module.open_live()
    assert said in raised.value.what
    assert "lockdown" in raised.value.hint
    assert ("locked down" in raised.value.what) == ("[none]" not in mode)


def test_kernel_without_kho() -> None:
    with pytest.raises(KhoscopeError, match="no kexec handover") as raised:
        KernelSource(Program(Platform(Architecture.X86_64)), "test", False)
    assert "CONFIG_KEXEC_HANDOVER" in raised.value.hint


def test_kernel_whose_kho_has_no_tracker_that_is_known() -> None:
    """Neither a radix tree nor xarrays."""
    prog = Program(Platform(Architecture.X86_64))
    state = prog.struct_type("kho_out", 0, ())

    def find(prog: Program, name: str, flags: FindObjectFlags, file: str | None) -> Object | None:
        del flags, file
        return Object(prog, state, address=0) if name in ("kho_out", "kho_in") else None

    prog.register_object_finder("test", find, enable_index=0)
    with pytest.raises(KhoscopeError, match="neither in a radix tree nor in xarrays"):
        KernelSource(prog, "test", False)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("gone"),
        BrokenPipeError("gone"),
        TimeoutError("gone"),
        Exception("gone"),
    ],
)
def test_kernel_that_goes_away_while_it_is_read(error: Exception) -> None:
    with pytest.raises(KhoscopeError, match=r"any more \(gone\)"), told():
        raise error


@pytest.mark.parametrize("error", [TypeError("ours"), KhoscopeError("said", "already")])
def test_what_is_no_reading_error_is_not_taken_for_one(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, told():
        raise error
    assert raised.value is error


def vmcore(path: Path) -> Path:
    """An ELF vmcore of nothing but a VMCOREINFO, which does not name where kallsyms are."""
    lines = [
        *("OSRELEASE=6.1.0-test", f"BUILD-ID={'12' * 20}", "PAGESIZE=4096", "KERNELOFFSET=0"),
        *("SYMBOL(init_uts_ns)=ffffffff82000000", "OFFSET(uts_namespace.name)=0"),
        *("SYMBOL(swapper_pg_dir)=ffffffff82010000", "NUMBER(phys_base)=0"),
        *("SYMBOL(_stext)=ffffffff81000000", "NUMBER(pgtable_l5_enabled)=0", ""),
    ]
    info, name = "\n".join(lines).encode(), b"VMCOREINFO\0\0"
    note = struct.pack("<III", len(name) - 1, len(info), 0) + name + info + bytes(-len(info) % 4)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4)
    path.write_bytes(ident + header + segment + note)
    return path


def test_vmcore_without_debug_info_and_without_kallsyms(tmp_path: Path) -> None:
    with pytest.raises(KhoscopeError, match="no debug info for the kernel of") as raised:
        open_module.open_core(vmcore(tmp_path / "core"))
    assert "build id 1212" in raised.value.what
    assert "symbols cannot be read" in raised.value.what
    assert "--vmlinux" in raised.value.hint


def test_what_is_no_kernel() -> None:
    """A program of user space has a main module, and no UTS_RELEASE."""

    class Prog:
        def main_module(self) -> object:
            return SimpleNamespace(build_id=b"\x12")

        def __getitem__(self, name: str) -> None:
            raise LookupError(name)

    prog: Any = Prog()
    assert "not a Linux kernel" in open_module._missing(prog, None)


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), IndexError("gone")])
def test_vmlinux_that_is_corrupt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    """pyelftools raises whatever a corrupt file makes it."""

    def fails(file: object) -> None:
        raise error

    monkeypatch.setattr("elftools.elf.elffile.ELFFile", fails)
    (tmp_path / "vmlinux").touch()
    with pytest.raises(btf.BtfError, match="no BTF can be read"):
        open_module._btf_section(tmp_path / "vmlinux", Program())


def test_vmlinux_without_pyelftools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(btf.BtfError, match=r"pip install pyelftools; khoscope\[images\] has it"):
        open_module._btf_section(tmp_path / "vmlinux", Program())


@pytest.mark.parametrize("wrong", [False, True])
def test_vmlinux_that_was_named_is_the_one_that_is_used(tmp_path: Path, wrong: bool) -> None:
    for name in ("vmlinux", "other"):
        (tmp_path / name).touch()
    (tmp_path / "same").symlink_to("other" if wrong else "vmlinux")
    module = SimpleNamespace(loaded_file_path=None, debug_file_path=str(tmp_path / "vmlinux"))
    prog: Any = SimpleNamespace(load_debug_info=lambda *_, **__: None, main_module=lambda: module)
    if not wrong:
        open_module._load_debug_info(prog, tmp_path / "same", "it")
        return
    with pytest.raises(KhoscopeError, match=r"same is not the vmlinux of it: .*vmlinux is"):
        open_module._load_debug_info(prog, tmp_path / "same", "it")
    open_module._load_debug_info(prog, None, "it")


def test_debug_info_of_a_program_of_others() -> None:
    prog = Program(Platform(Architecture.X86_64))
    prog.cache[btf.NAME] = "khoscope", "given"
    assert str(open_module.debug_info(prog)) == "BTF (khoscope), given"
    other = Program(Platform(Architecture.X86_64))
    assert str(open_module.debug_info(other)) == "DWARF, unknown"


@pytest.mark.parametrize(
    ("flags", "path", "said"),
    [
        (ProgramFlags.IS_LIVE | ProgramFlags.IS_LOCAL, "/proc/kcore", (open_module.LIVE, True)),
        (ProgramFlags.IS_LIVE, None, ("QEMU guest", True)),
        (ProgramFlags(0), "/var/crash/core", ("vmcore /var/crash/core", False)),
        (ProgramFlags(0), None, ("memory", False)),
    ],
)
def test_how_a_program_of_others_is_read(
    flags: ProgramFlags, path: str | None, said: tuple[str, bool]
) -> None:
    prog: Any = SimpleNamespace(flags=flags, core_dump_path=path)
    assert open_module.how_it_is_read(prog) == said
