# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The images of the kernels that are built: what each says, which may follow which, and what becomes
of what is handed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drgn import TypeKind
from drgn.helpers.linux.mm import follow_phys

from khoscope.abi.fdt import MAGIC
from khoscope.abi.kho_fdt import Fdt
from khoscope.checks.next_kernel import image_abi_differs
from khoscope.facts.clients import Luo, LuoFile, LuoSession
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.snapshot import Snapshot
from khoscope.sources.next_kernel import read_image
from khoscope.sources.open import open_qemu
from khoscope.words.errors import KhoscopeError
from tests.synthetic import PLAIN, snapshot
from tests.test_image import luo_fdt
from tests.vm.stub import poke
from tests.vm.test_khoscope import host, khoscope
from vm.kernel import ARCHIVED, Kernel, find, series, under_test, what
from vm.luo import Memfd, hold, retrieve
from vm.machine import CommandFailed, GuestDied, GuestHung, Machine

KHO = {"base": "kho-v4", "rfc": "kho-v4", "fixed": "kho-v5"}
#: What images of older kernels say.
OLDER: dict[str, dict[str, Any]] = {
    "6.18-base": {"kho": ("kho-v1",)},
    "7.1-base": {
        "kho": ("kho-v3",),
        "luo": ("luo-v1",),
        "memfd": ("memfd-v2",),
        "luo_session": ("luo-session-v2",),
        "luo_flb": ("luo-flb-v1",),
        "misses_files": True,
    },
}
#: One kernel of each series.
BASES = [name for name in under_test() if what(name) == "base"]
PAIRS = [(before, after) for before in BASES for after in BASES if before != after]
#: The newest of them stands for all that take what it takes; each older one takes something else.
DIFFERENT = [name for name in BASES if series(name) in ARCHIVED or name == BASES[-1]]


def says(name: str) -> dict[str, Any]:
    """What a kernel's image says."""
    newer = {"luo": ("luo-v5",), "memfd": ("memfd-v2",), "misses_files": True}
    of_kho = OLDER[name] if name in OLDER else {"kho": (KHO[what(name)],), **newer}
    return {**of_kho, "newer_functions": True}


WITH_LUO = [name for name in DIFFERENT if "luo" in says(name)]


def built(name: str) -> Kernel:
    kernel = find(name)
    assert kernel is not None, f"{name} is not built: python -m vm build"
    return kernel


def handed_over_by(kernel: NextKernel) -> Snapshot:
    """What a kernel hands over that has one memfd in a session, if it has sessions."""
    (kho,) = kernel.kho
    facts = snapshot(PLAIN, [], fdt=Fdt(0x2000, kho, 0x1000))
    if not kernel.luo:
        return facts
    (luo,), (memfd,) = kernel.luo, kernel.memfd
    sessions = [LuoSession("vm", False, 1, [LuoFile(memfd, 1, 0x1000)])]
    side = replace(facts.outgoing, luo=Luo(0x9000, luo, 1, True, sessions))
    if kernel.luo_session:
        nodes = [f"luo-session {kernel.luo_session[0]}", f"luo-flb {kernel.luo_flb[0]}"]
        side = replace(side, blobs={**side.blobs, "subtree LUO": luo_fdt(*nodes)})
    return replace(facts, outgoing=side)


@pytest.mark.parametrize("name", under_test())
def test_image(name: str) -> None:
    kernel = built(name)
    path = kernel.share / "bzImage"
    found = read_image(path)
    # It unpacks itself in the memory that it takes.
    assert found.size is not None
    assert found.size > path.stat().st_size
    expected = NextKernel(str(path), "zstd", kernel.release, **says(name))
    assert replace(found, size=None) == expected
    vmlinux = kernel.share / "vmlinux"
    unpacked = read_image(vmlinux)
    as_expected = replace(expected, path=str(vmlinux), compression=None)
    assert replace(unpacked, size=None) == as_expected
    # A bzImage unpacks itself in some more memory than the kernel takes.
    assert found.size is not None
    assert unpacked.size is not None
    assert found.size // 2 < unpacked.size <= found.size
    # Both are in the one directory: the same kernel.
    assert read_image(kernel.share) == found


@pytest.mark.parametrize("before", under_test())
@pytest.mark.parametrize("after", under_test())
def test_which_may_follow_which(before: str, after: str) -> None:
    facts = handed_over_by(read_image(built(before).share))
    following = read_image(built(after).share)
    said = [message.text for message in image_abi_differs(facts, following)]
    (old,), (new,) = says(before)["kho"], says(after)["kho"]
    if old == new:
        assert said == []
    else:
        assert said == [
            f"{built(after).release} takes {new}, this kernel hands over {old}: "
            "it boots as if nothing was handed over"
        ]


def test_truncated_image(tmp_path: Path) -> None:
    """A download that was cut short is no kernel without KHO."""
    whole = (built("7.2-fixed").share / "bzImage").read_bytes()
    path = tmp_path / "bzImage"
    for length in (0, 0x24F, 0x4000, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(KhoscopeError):
            read_image(path)


# What becomes of it


def findings(machine: Machine, rules: Iterable[str], *words: str) -> list[dict[str, Any]]:
    """What these rules find in a guest, as seen from the host."""
    asked = ("verify", "--json", "--only", ",".join(rules), *words)
    result = khoscope(*machine.source, *asked)
    # Whether there is a verdict depends on all that can be read.
    assert result.returncode in (0, 1, 3), result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["findings"]
    return found


def says_of(machine: Machine, name: str) -> list[str]:
    """What is said of the next kernel."""
    image = machine.kernels[name].share / "bzImage"
    return [f["message"] for f in findings(machine, ["image-abi-differs"], "--next", str(image))]


def log(machine: Machine) -> str:
    return machine.run("dmesg", check=True).stdout


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_kexec_into_another_kernel(before: str, after: str) -> None:
    with Machine(before, after) as machine:
        machine.finalize()
        said = says_of(machine, after)
        machine.load_kexec(after)
        machine.execute_kexec()
        came = "in" in machine.run("ls /sys/kernel/debug/kho", check=True).stdout.split()
        now = log(machine)
    is_taken = says(before)["kho"] == says(after)["kho"]
    assert came == is_taken
    assert ("found kexec handover data" in now) == is_taken
    assert ("is incompatible with" in now and "disabling KHO revival" in now) != is_taken
    assert "WARNING" not in now
    if is_taken:
        assert said == []
    else:
        (message,) = said
        assert message.endswith("it boots as if nothing was handed over")


def luo_subtree(machine: Machine) -> tuple[int, bytes]:
    """Where LUO's subtree is, and its bytes."""
    phys = subtree(machine, "LUO")
    prog = open_qemu(str(machine.qmp_socket), machine.kernel.share / "vmlinux")
    return phys, prog.read(phys, 4096, physical=True)


def subtree(machine: Machine, name: str) -> int:
    status = json.loads(host(*machine.source, "status", "--json"))
    return next(int(s["phys"], 16) for s in status["subtrees"] if s["name"] == name)


#: What to write over what, in LUO's state; of nodes only where it is an FDT.
OTHERS = {
    "compatible": (rb"luo-v\d\0", b"luo-v9\0"),
    "session": (rb"luo-session-v2\0", b"luo-session-v9\0"),
    "flb": (rb"luo-flb-v1\0", b"luo-flb-v9\0"),
    "no-flb": (rb"luo-flb\0", b"luo-xyz\0"),
}


def luos() -> Iterator[tuple[str, str]]:
    for name in WITH_LUO:
        yield from ((name, o) for o in OTHERS if o == "compatible" or "luo_session" in says(name))


@pytest.mark.parametrize(("name", "other"), list(luos()))
def test_another_luo(name: str, other: str) -> None:
    """As a patched kernel might hand it over."""
    old, new = OTHERS[other]
    with Machine(name) as machine:
        phys, blob = luo_subtree(machine)
        assert blob.startswith(MAGIC) == ("luo_session" in says(name))
        found = re.search(old, blob)
        assert found is not None
        machine.load_kexec()
        assert says_of(machine, name) == []
        poke(machine, phys + found.start(), found[0], new)
        (message,) = says_of(machine, name)
        assert message.endswith("the next kernel panics")
        with pytest.raises(GuestDied, match="The incoming tree failed to initialize properly"):
            machine.execute_kexec()


def handler_of_memfds(machine: Machine) -> int:
    """Where the name of the kernel's handler of memfds is, ``phys_addr_t``."""
    prog = open_qemu(str(machine.qmp_socket), machine.kernel.share / "vmlinux")
    name = prog["memfd_luo_handler"].compatible
    at = name.address_ if name.type_.kind == TypeKind.ARRAY else name.value_()
    return int(follow_phys(prog["init_mm"].address_of_(), at).value_())


@pytest.mark.parametrize("name", WITH_LUO)
def test_a_file_without_a_handler(name: str) -> None:
    """LUO takes the handler's name as the machine goes down."""
    with Machine(name) as machine:
        hold(machine, "vm", {1: Memfd(4096)})
        phys = handler_of_memfds(machine)
        assert says_of(machine, name) == []
        poke(machine, phys, b"memfd-v2", b"memfd-v9")
        (message,) = says_of(machine, name)
        assert message == (
            f"{machine.kernel.release} takes memfd-v2, this kernel hands over memfd-v9: "
            "no session can be retrieved"
        )
        machine.load_kexec()
        machine.execute_kexec()
        for _ in range(2):
            with pytest.raises(CommandFailed, match="Input/output error"):
                retrieve(machine, "vm", [1])
        assert "No registered handler for compatible 'memfd-v9'" in log(machine)


# Blocks that are too large


def total_memory(machine: Machine) -> int:
    """``MemTotal``, KiB."""
    return int(machine.run("grep MemTotal /proc/meminfo", check=True).stdout.split()[1])


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_block_of_two_gib(name: str) -> None:
    """Where sizes are ints, it is more than 2 GiB that are gone afterwards."""
    # There is one place for it: the kernel is not to be there.
    append = "nokaslr reserve_mem=2G:2G:khoscope kho_scratch=64M,64M,64M"
    with Machine(name, memory=6144, append=append) as machine:
        before = total_memory(machine)
        machine.finalize()
        found = findings(machine, ["block-too-large", "huge-order"])
        image = ("--next", str(machine.kernel.share / "bzImage"))
        told = findings(machine, ["block-too-large", "huge-order"], *image)
        machine.load_kexec()
        machine.execute_kexec()
        now = log(machine)
        after = total_memory(machine)
    assert "Revived memory reservation 'khoscope'" in now
    if series(name) in ("6.18", "7.1"):
        for finding in (*found, *told):
            assert (finding["rule"], finding["order"]) == ("block-too-large", 19)
            assert "2 GiB become a negative number" in finding["message"]
        assert (len(found), len(told)) == (1, 1)
        assert "as the next kernel" in found[0]["message"]
        assert "memblock_add_range" in now
        assert after < before - (1 << 20)
    else:
        assert (found, told) == ([], [])
        assert "WARNING" not in now
        assert abs(after - before) < 1 << 18


# Crash kernels


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_crash_kernel(name: str) -> None:
    """On linux 6.18, if KHO was finalized before it was loaded."""
    dies = series(name) == "6.18"
    with Machine(name, memory=1536, append="crashkernel=192M") as machine:
        machine.finalize()
        machine.load_crash_kernel()
        fdt = json.loads(host(*machine.source, "status", "--json"))["crash_image"]["kho_fdt"]
        found = findings(machine, ["crash-image-with-kho"])
        assert [f["phys"] for f in found] == ([fdt] if dies else [])
        assert (int(fdt, 16) != 0) == dies
        if dies:
            with pytest.raises(GuestHung):
                machine.crash()
        else:
            machine.crash()
            assert machine.run("test -s /proc/vmcore").returncode == 0
