# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a host's files say of scratch, on hosts that are made up of files.

The files in tests/recorded/host are those of guests with 1 GiB, as root reads them, each under its
path: of the log only what is about KHO, of the configuration what is about kexec and CMA.
"""

from __future__ import annotations

import gzip
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.facts.host_scratch import CmaCounts, HostScratch, Told, host_switch, scratch_size
from khoscope.sources import host_scratch as module
from khoscope.sources.host_scratch import read_host_scratch

RECORDED = Path(__file__).parent / "recorded" / "host"
MIB = 1 << 20
#: What only root may read.
ROOTS = ("/proc/pagetypeinfo", "/sys/kernel/debug/", "/dev/kmsg")
PAGE = 4096

Files = dict[str, str]


@pytest.fixture(autouse=True)
def page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the guests."""
    monkeypatch.setattr(os, "sysconf", lambda name: PAGE)


def recorded(name: str) -> Files:
    """The files of a guest; a path that ends in / is a directory."""
    text = (RECORDED / f"{name}.txt").read_text()
    parts = text.removeprefix("=== ").split("\n=== ")
    return {
        path: f"{said.rstrip()}\n" for path, _, said in (part.partition("\n") for part in parts)
    }


def without(files: Files, *starts: str) -> Files:
    return {path: said for path, said in files.items() if not path.startswith(starts)}


def nobody(files: Files) -> Files:
    """What others than root read."""
    return without(files, *ROOTS)


def at(root: Path, files: Files) -> Path:
    for path, said in files.items():
        file = root / path.removeprefix("/")
        if path.endswith("/"):
            file.mkdir(parents=True, exist_ok=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(said.encode()) if path.endswith(".gz") else said.encode())
    return root


def look(root: Path, files: Files, built: bool | None = None) -> HostScratch:
    return read_host_scratch(at(root, files), built)


# Real kernels


@pytest.mark.parametrize("name", ["7.2-on", "7.2-on-kexec", "6.18-on", "6.18-on-kexec"])
def test_on(tmp_path: Path, name: str) -> None:
    """Root reads the areas; page blocks tell as much, before and after a kexec."""
    found = look(tmp_path, recorded(name))
    assert (found.on, found.why, found.hint) == (True, "kho=on on the command line", "")
    assert (found.size, found.size_from) == (184 * MIB, "/sys/kernel/debug/kho/out/scratch_len")
    assert (found.cma.blocks, found.cma.block_size) == (92, 2 * MIB)
    assert found.cma.zones == (0 if name.endswith("kexec") else 184 * MIB)
    assert found.phantom
    assert found.cma.free is not None
    assert found.cma.total == 0 < found.cma.free <= 184 * MIB
    assert found.why_from == "/sys/kernel/debug/kho/out"


@pytest.mark.parametrize("name", ["7.2-on", "6.18-on"])
def test_on_for_others_than_root(tmp_path: Path, name: str) -> None:
    found = look(tmp_path, nobody(recorded(name)))
    assert (found.on, found.why) == (True, "kho=on on the command line")
    assert (found.size, found.size_from) == (184 * MIB, "/proc/zoneinfo")
    assert (found.why_from, found.cma.blocks) == ("/proc/zoneinfo", None)
    assert found.phantom


@pytest.mark.parametrize("name", ["7.2-on-kexec", "6.18-on-kexec"])
def test_handed_over_for_others_than_root(tmp_path: Path, name: str) -> None:
    """Zones count nothing; that more is free than CmaTotal has shows that there is scratch."""
    found = look(tmp_path, nobody(recorded(name)))
    assert (found.on, found.why) == (True, "kho=on on the command line")
    assert (found.size, found.size_from) == (None, "")
    assert found.phantom
    assert found.why_from == "/proc/meminfo"


@pytest.mark.parametrize("name", ["7.2-on-kexec", "6.18-on-kexec"])
def test_handed_over_without_debugfs(tmp_path: Path, name: str) -> None:
    found = look(tmp_path, without(recorded(name), "/sys/kernel/debug"))
    assert (found.on, found.size) == (True, 184 * MIB)
    assert found.size_from == found.why_from == "/proc/pagetypeinfo"


def test_handed_over_to_a_kernel_that_has_it_off(tmp_path: Path) -> None:
    """It keeps the areas."""
    found = look(tmp_path, recorded("7.2-on-kexec-off"))
    assert (found.on, found.why) == (False, "kho=off on the command line")
    assert found.hint == "boot it with kho=on in place of kho=off"
    assert (found.size, found.size_from) == (184 * MIB, "/proc/pagetypeinfo")
    assert found.phantom
    found = look(tmp_path / "nobody", nobody(recorded("7.2-on-kexec-off")))
    assert (found.on, found.size) == (False, None)
    assert found.phantom


@pytest.mark.parametrize("name", ["7.2-off", "6.18-off"])
@pytest.mark.parametrize("root", [True, False])
def test_off(tmp_path: Path, name: str, root: bool) -> None:
    files = recorded(name)
    found = look(tmp_path, files if root else nobody(files))
    assert (found.on, found.why) == (False, "kho=off on the command line")
    assert found.why_from == "/proc/cmdline"
    assert (found.size, found.cma.free, found.cma.total) == (0, 0, 0)
    assert not found.phantom


@pytest.mark.parametrize(
    ("name", "part"), [("7.2-failed", "the lowmem scratch area"), ("6.18-failed", "a scratch area")]
)
def test_switched_itself_off(tmp_path: Path, name: str, part: str) -> None:
    """Others than root see that it did, but not for want of what."""
    found = look(tmp_path, recorded(name))
    start = "kho=on on the command line, but it switched itself off: "
    assert not found.on
    assert found.why.startswith(f"{start}no room for {part}")
    assert found.why.endswith(", with kho_scratch=64G,1M,1M on the command line")
    assert found.hint.startswith("boot it with a kho_scratch= that fits into 98")
    assert (found.size, found.why_from) == (0, "/dev/kmsg")
    found = look(tmp_path / "nobody", nobody(recorded(name)))
    assert found.on is False
    assert found.why == f"{start}its set-up failed, see the kernel's log"
    assert "boot it with kho=on" not in found.hint
    assert (found.size, found.why_from) == (0, "/proc/zoneinfo")


# Kernels whose files were changed by hand


def by_default(name: str) -> Files:
    """A distribution's kernel that has KHO on by default."""
    files = recorded(name)
    files["/proc/cmdline"] = files["/proc/cmdline"].replace("kho=on", "").replace("kho=off", "")
    symbol = "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"
    lines = files["/proc/config.gz"].replace(f"# {symbol} is not set", f"{symbol}=y")
    assert f"{symbol}=y" in lines
    return {**files, "/proc/config.gz": lines}


def test_nobody_asked_for_it(tmp_path: Path) -> None:
    default = "the default of this kernel (CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT)"
    for name in ("7.2-on", "7.2-on-kexec"):
        found = look(tmp_path / name, nobody(by_default(name)))
        assert (found.on, found.why) == (True, default)
    found = look(tmp_path, nobody(by_default("7.2-failed")))
    assert found.on is False
    assert found.why.startswith("asked for by this kernel's default, but it switched itself off")
    # No file has its configuration, and what the zones count shows that it is on.
    unconfigured = without(nobody(by_default("7.2-on")), "/proc/config.gz")
    found = look(tmp_path / "unconfigured", unconfigured)
    assert (found.on, found.why) == (True, default)


def plain(name: str) -> Files:
    """The same, without any word of KHO on the command line."""
    return {**recorded(name), "/proc/cmdline": "root=/dev/vda quiet\n"}


def test_off_by_default(tmp_path: Path) -> None:
    for name in ("7.2-off", "6.18-off"):
        found = look(tmp_path / name, nobody(plain(name)))
        assert (found.on, found.hint) == (False, "boot it with kho=on")
        assert found.why == "the command line does not have kho=on"
    # A kernel of that default keeps what it was handed.
    found = look(tmp_path, nobody(plain("7.2-on-kexec-off")))
    assert (found.on, found.size, found.phantom) == (False, None, True)


@pytest.mark.parametrize(
    "place", ["/boot/config-{}", "/lib/modules/{}/config", "/proc/config.gz of another kind"]
)
def test_where_the_configuration_is(tmp_path: Path, place: str) -> None:
    files = nobody(plain("7.2-off"))
    lines = files.pop("/proc/config.gz")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/config.gz").write_bytes(b"\x1f\x8b damaged")
    place = place if "{}" in place else "/boot/config-{}"
    path = place.format(platform.release())
    files[path] = lines.replace("CONFIG_KEXEC_HANDOVER=y", "# CONFIG_KEXEC_HANDOVER is not set")
    found = look(tmp_path, files)
    assert (found.on, found.why) == (False, "this kernel has no KHO")
    assert found.why_from == path
    assert look(tmp_path, files, built=True).why == "the command line does not have kho=on"


def test_what_nobody_knows(tmp_path: Path) -> None:
    """It is asked for, or not, and there is nothing that shows what became of that."""
    found = look(tmp_path / "asked", {"/proc/cmdline": "kho=on\n"})
    assert (found.on, found.size, found.phantom) == (None, None, False)
    assert "boot it with" not in found.hint
    assert found.why.startswith("kho=on on the command line; whether")
    found = look(tmp_path / "not asked", {"/proc/cmdline": "quiet\n"})
    assert found.on is None
    assert found.hint.startswith("boot it with kho=on, or see")
    found = look(tmp_path / "nothing", {})
    assert (found.on, found.size, found.cma) == (None, None, CmaCounts())
    assert found.why_from == "/proc/cmdline"


def test_areas_of_cma_are_not_scratch(tmp_path: Path) -> None:
    """A host with cma=64M: what is free of it is in CmaFree, and all of it in CmaTotal."""
    files = recorded("7.2-on")
    files["/proc/meminfo"] = (
        files["/proc/meminfo"]
        .replace("CmaTotal:              0 kB", "CmaTotal:          65536 kB")
        .replace("CmaFree:          178176 kB", "CmaFree:           243712 kB")
    )
    files["/proc/zoneinfo"] = files["/proc/zoneinfo"].replace("cma      47104", "cma      63488")
    files["/proc/pagetypeinfo"] = files["/proc/pagetypeinfo"].replace(" 92 ", " 124 ")
    unseen = without(files, "/sys/kernel/debug")
    found = look(tmp_path, unseen)
    assert (found.size, found.size_from, found.cma.total) == (184 * MIB, "/proc/zoneinfo", 64 * MIB)
    found = look(tmp_path / "blocks", without(unseen, "/proc/zoneinfo"))
    assert (found.size, found.size_from) == (184 * MIB, "/proc/pagetypeinfo")


def test_counting_late_is_not_scratch() -> None:
    """CmaFree of a host with areas of CMA that are all free may be off by some pages."""
    assert not CmaCounts(64 * MIB, 65 * MIB).free_beyond
    assert CmaCounts(64 * MIB, 96 * MIB).free_beyond
    assert CmaCounts(0, PAGE).free_beyond
    assert not CmaCounts(None, MIB).free_beyond
    assert CmaCounts(zones=4, total=8).counted is None


def test_several_nodes(tmp_path: Path) -> None:
    """Each has its own zones, and its own tables of page blocks; mixed blocks are none of them."""
    blocks = recorded("7.2-on")["/proc/pagetypeinfo"]
    mixed = blocks.partition("Number of blocks type")[2].splitlines()[1]
    blocks += f"\nNumber of mixed blocks    Unmovable   Movable   CMA \n{mixed}\n"
    zones = recorded("7.2-on")["/proc/zoneinfo"]
    files = {**plain("7.2-on"), "/proc/zoneinfo": zones * 2, "/proc/pagetypeinfo": blocks * 2}
    found = look(tmp_path, without(files, "/sys/kernel/debug"))
    assert (found.size, found.cma.blocks) == (2 * 184 * MIB, 2 * 92)


def test_programs_write_to_the_log_too(tmp_path: Path) -> None:
    """What they write has another facility than the kernel's own lines."""
    files = without(recorded("7.2-off"), "/sys", "/proc/zoneinfo", "/proc/pagetypeinfo")
    said = "99,1,-;KHO: Failed to reserve lowmem scratch buffer\n"
    files["/proc/cmdline"] = "kho=on\n"
    assert look(tmp_path, {**files, "/dev/kmsg": f"12,{said}"}).on is None
    found = look(tmp_path, {**files, "/dev/kmsg": f"3,{said}"})
    assert found.on is False
    assert "no room for the lowmem" in found.why


@pytest.mark.parametrize(
    "answers",
    [
        [b"6,1,0,-;x\n", BrokenPipeError(), b"3,2,0,-;KHO: x\n", BlockingIOError()],
        [b"6,1,0,-;x\n", b"3,2,0,-;KHO: x\n", OSError(22, "too long")],
        [b"3,2,0,-;KHO: x\n", *[b"6,1,0,-;x\n"] * 1000],
    ],
)
def test_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bytes | OSError]
) -> None:
    """Reading it ends: where it ends, where it fails, and where it grows as fast as it is read."""
    left = iter(answers)

    def read(fd: int, size: int) -> bytes:
        answer = next(left)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(module, "_RECORDS", 100)
    monkeypatch.setattr(os, "read", read)
    assert module._log(at(tmp_path, {"/dev/kmsg": ""})) == ["KHO: x"]


@pytest.mark.parametrize(
    ("phys", "sizes"),
    [
        ("0x1000\n", "0x1000\n0x2000\n"),
        ("", ""),
        ("0x1000\n", "-1\n"),
        ("0x1000\n", "0xffffffffffffffff\n"),
        ("0x1000\n" * 5000, "0x1000\n" * 5000),
    ],
)
def test_areas_that_are_none(tmp_path: Path, phys: str, sizes: str) -> None:
    """The next best file has the size."""
    files = recorded("7.2-on")
    files["/sys/kernel/debug/kho/out/scratch_phys"] = phys
    files["/sys/kernel/debug/kho/out/scratch_len"] = sizes
    found = look(tmp_path, files)
    assert (found.size, found.size_from) == (184 * MIB, "/proc/zoneinfo")


def test_arm64(tmp_path: Path) -> None:
    """Its device tree tells of a handover."""
    chosen = "/proc/device-tree/chosen/"
    files = without(nobody(recorded("7.2-off")), "/sys")
    assert look(tmp_path / "none", files).size is None
    files[f"{chosen}bootargs"] = "x"
    assert look(tmp_path / "cold", files).size == 0
    files[f"{chosen}linux,kho-fdt"] = "x"
    assert look(tmp_path / "handed", files).size is None


def test_what_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a debugfs that only root may enter."""
    stat = os.stat

    def refuse(path: Any, **more: Any) -> os.stat_result:
        if "/sys/kernel" in str(path):
            raise PermissionError(13, "Permission denied")
        return stat(path, **more)

    at(tmp_path, nobody(recorded("7.2-on")))
    monkeypatch.setattr(os, "stat", refuse)
    found = read_host_scratch(tmp_path)
    assert (found.on, found.size) == (True, 184 * MIB)


PATHS = sorted(path for path in recorded("7.2-on-kexec") if not path.endswith("/"))


@given(st.sampled_from(PATHS), st.binary(max_size=200), st.integers(0, 4000))
def test_odd_files(
    tmp_path_factory: pytest.TempPathFactory, path: str, odd: bytes, place: int
) -> None:
    """Whatever they hold, something is said."""
    root = at(tmp_path_factory.mktemp("odd"), recorded("7.2-on-kexec"))
    file = root / path.removeprefix("/")
    content = file.read_bytes()
    file.write_bytes(content[:place] + odd + content[place + len(odd) :])
    found = read_host_scratch(root)
    assert found.why
    assert found.why_from


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("odd", ["9" * 5000, "\0", "=== cma 1\n", " cma " + "9" * 5000 + "\n"])
def test_files_of_one_odd_line(tmp_path: Path, path: str, odd: str) -> None:
    found = look(tmp_path, {**recorded("7.2-on-kexec"), path: odd})
    assert found.why


# What follows from what


def test_trust() -> None:
    """Debugfs before zones before page blocks; zones that count none say so on a cold boot only."""
    all_ = CmaCounts(total=0, free=0, zones=8 * MIB, blocks=3, block_size=2 * MIB)
    assert scratch_size([(0, MIB), (MIB, 2 * MIB)], all_, False) == (3 * MIB, "areas")
    assert scratch_size(None, all_, False) == (8 * MIB, "zones")
    assert scratch_size(None, replace(all_, zones=0), True) == (6 * MIB, "blocks")
    none = CmaCounts(total=0, free=0, zones=0)
    assert scratch_size(None, none, False) == (0, "zones")
    assert scratch_size(None, none, True) == scratch_size(None, none, None) == (None, "")
    assert scratch_size(None, replace(none, free=MIB), False) == (None, "")


@pytest.mark.parametrize(
    ("told", "size", "on", "why"),
    [
        (Told("kho=on", built=None), 0, False, "this kernel has no KHO"),
        (Told("kho=on", built=False), 0, False, "this kernel has no KHO"),
        (Told("quiet"), 0, False, "does not have kho=on"),
        (Told("", default=False), 0, None, "neither"),
        (Told(None, out=True), None, True, "not recorded"),
        (Told("kho=off", out=True), None, True, "not recorded"),
        (Told("quiet", default=False, out=True), None, True, "not recorded"),
        (Told("kho=on", lacking=("area", None)), None, False, "no room for a scratch area"),
    ],
)
def test_switch(told: Told, size: int | None, on: bool | None, why: str) -> None:
    found = host_switch(told, size, CmaCounts())
    assert found.on is on
    assert why in found.why
    assert bool(found.hint) == (on is not True)
    if told.command_line == "kho=on":
        assert "kho=on" not in found.hint
