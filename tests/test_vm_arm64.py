# SPDX-License-Identifier: LGPL-2.1-or-later
"""What needs no guest of vm.arm64: its initramfs, and what goes into a kernel's name."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm import arm64, build, cache, kernel
from vm.arm64 import Arm64, cpio
from vm.machine import MachineError

names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=9)
modes = st.sampled_from([stat.S_IFREG | 0o644, stat.S_IFREG | 0o755])


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Documentation/driver-api/early-userspace/buffer-format.rst, read as the kernel does."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        start = at + 110 + length + (-(110 + length) % 4)
        content = archive[start : start + size]
        assert len(content) == size
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = mode, content
        at = start + size + -size % 4


@given(st.dictionaries(names, st.tuples(modes, st.binary(max_size=20)), max_size=4))
def test_initramfs(files: dict[str, tuple[int, bytes]]) -> None:
    assert unpacked(cpio(files)) == files


def test_all_that_goes_into_a_kernel_is_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path("source-1")
    entries = {arm64._entry(name, source) for name in arm64.NAMES}
    assert len(entries) == len(arm64.NAMES)
    assert entries.isdisjoint(arm64._entry(name, Path("source-2")) for name in arm64.NAMES)
    init = arm64._init_entry()
    for attribute, changed in (("_CONFIG", "kernels"), ("_INIT", "init")):
        other = tmp_path / attribute
        other.write_text(getattr(arm64, attribute).read_text() + "\n")
        with monkeypatch.context() as context:
            context.setattr(arm64, attribute, other)
            now = {arm64._entry(name, source) for name in arm64.NAMES}
            assert entries.isdisjoint(now) == (changed == "kernels")
            assert (arm64._init_entry() != init) == (changed == "init")


def test_patches_and_pages() -> None:
    assert set(build.NAMES) == {*kernel.NAMES, *arm64.NAMES, kernel.STOCK}
    for name in arm64.NAMES:
        wanted = arm64._wanted(name).splitlines()
        (pages,) = (size for size in ("4", "16", "64") if f"-{size}k" in name)
        assert f"CONFIG_ARM64_{pages}K_PAGES=y" in wanted
        assert kernel.ARM64[name][0] in kernel.KERNELS


def test_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with cache.locked():
        arm64.clean()
    with pytest.raises(MachineError, match="python -m vm build"):
        Arm64("7.2-arm64-4k")
    assert build.kernels() == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[n, "not built"] for n in build.NAMES]
