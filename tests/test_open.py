# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels that cannot be looked at: what is said of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from drgn import Architecture, FindObjectFlags, Object, Platform, Program

from khoscope.errors import KhoscopeError
from khoscope.sources import open as open_module
from khoscope.sources.kernel import KernelSource, told


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
    monkeypatch.setattr(open_module, "LOCKDOWN", lockdown)
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


def test_kernel_whose_kho_has_no_radix_tree() -> None:
    """KHO as it was when preserved memory was kept otherwise."""
    prog = Program(Platform(Architecture.X86_64))
    state = prog.struct_type("kho_out", 0, ())

    def find(prog: Program, name: str, flags: FindObjectFlags, file: str | None) -> Object | None:
        del flags, file
        return Object(prog, state, address=0) if name in ("kho_out", "kho_in") else None

    prog.register_object_finder("test", find, enable_index=0)
    with pytest.raises(KhoscopeError, match="older than the radix tree"):
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
