# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope doctor`` on hosts that are made up of files; on real ones: tests/vm/test_drgn.py."""

from __future__ import annotations

import io
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from drgn import Program

from khoscope.abi.keys import Finalize
from khoscope.facts.clients import LuoState
from khoscope.facts.offers import Fact, State, missing
from khoscope.facts.snapshot import KexecImage, ScratchSetup, Snapshot
from khoscope.sources import host as module
from khoscope.sources import open as open_module
from khoscope.sources.kernel import KernelSource
from khoscope.sources.open import DebugInfo
from khoscope.views.doctor import DoctorText
from khoscope.words.errors import KhoscopeError
from tests.command import Run
from tests.synthetic import FIXED, XARRAYS, Block, snapshot

WITH_KHO = """\
0000000000000000 T kho_preserve_pages
0000000000000000 T kho_radix_add_key
0000000000000000 T register_kprobe
0000000000000000 T liveupdate_enabled\t[luo]
"""
#: All that a host can offer, by file.
ALL = {
    "proc/kallsyms": WITH_KHO,
    "proc/kcore": "",
    "proc/cmdline": "console=ttyS0 kho=on",
    "proc/sys/kernel/kptr_restrict": "1\n",
    "proc/sys/kernel/ftrace_enabled": "1\n",
    "sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
    "sys/kernel/btf/vmlinux": "\x9f\xeb",
    "sys/kernel/kheaders.tar.xz": "",
    "sys/kernel/kexec_loaded": "1\n",
    "sys/kernel/debug/kprobes/enabled": "1\n",
    "sys/kernel/tracing/available_filter_functions": "schedule\nkho_preserve_pages [kho]\n",
    "dev/liveupdate": "",
}
UNOPENED = KhoscopeError("/proc/kcore: no", "make it yes")


def never() -> Program:
    raise UNOPENED


def unread(prog: Program) -> KernelSource:
    raise AssertionError("there is no program")


@pytest.fixture
def bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """bcc is there."""
    there = SimpleNamespace(__version__="0.35.0", __file__="/lib/bcc.py")
    monkeypatch.setattr(module, "import_bcc", lambda: there)


def host(tmp_path: Path, without: tuple[str, ...] = (), **other: str) -> module.Host:
    """A host with all but some files, or with other words in some (by their last name)."""
    for name, text in ALL.items():
        if name in without:
            continue
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(other.get(path.name.partition(".")[0], text))
    return module.Host(tmp_path)


def by_name(facts: list[Fact]) -> dict[str, Fact]:
    assert len({fact.name for fact in facts}) == len(facts)
    return {fact.name: fact for fact in facts}


def look(it: module.Host) -> dict[str, Fact]:
    """What is said where the kernel's memory cannot be read."""
    return by_name(it.facts(never, unread))


class Source:
    """A kernel that was read already."""

    def __init__(self, facts: Snapshot) -> None:
        self._facts = facts

    def outline(self) -> Snapshot:
        return self._facts


def look_inside(
    it: module.Host, facts: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Fact]:
    """What is said where it can be."""
    monkeypatch.setattr(module, "debug_info", lambda prog: DebugInfo("DWARF", "/boot/vmlinux"))
    read: Callable[[Program], KernelSource] = lambda prog: Source(facts)  # type: ignore  # noqa: E731
    return by_name(it.facts(Program, read))


def kernel() -> Snapshot:
    facts = snapshot(FIXED, [Block(0x100000)])
    told = replace(facts.kernel, command_line="kho=on")
    return replace(facts, kernel=told, image=KexecImage(True, True, 0x5000, 1 << 20))


def test_what_is_not_there_is_said_once(tmp_path: Path) -> None:
    """Of a kernel without KHO there is no more to say of KHO; and so of LUO."""
    without = host(tmp_path, ("dev/liveupdate",), kallsyms="0000000000000000 T register_kprobe\n")
    found = look(without)
    assert (found["KHO"].state, found["LUO"].state) == (State.NO, State.NO)
    assert "CONFIG_KEXEC_HANDOVER=y" in found["KHO"].hint
    of_them = {"tracker", "KHO's state", "KHO on", "fentry", "traced blocks", "finalized"}
    assert not (of_them | {"scratch"}) & set(found)
    assert "LUO's device" not in found
    assert missing(list(found.values())) == found["KHO"]


@pytest.mark.usefixtures("bcc")
def test_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda tool: f"/bin/{tool}")  # type: ignore[attr-defined]
    found = look_inside(host(tmp_path), kernel(), monkeypatch)
    # The kernel that was made by hand does not say whether LUO is on.
    assert [(f.name, f.state) for f in found.values() if f.hint] == [("LUO", State.UNKNOWN)]
    assert [f.name for f in found.values() if f.state != State.OK] == ["LUO"]
    assert missing(list(found.values())) is None
    assert found["debug info"].value == "DWARF, /boot/vmlinux"
    assert found["kexec image"].value == "loaded by kexec_file_load, with the handover"
    assert found["KHO's state"].value == "kho-v5"


def test_nothing_is_there(tmp_path: Path) -> None:
    """A container without /proc and /sys: nothing is said to be there, and each has a hint."""
    found = look(module.Host(tmp_path))
    about_host = [f for f in found.values() if f.name not in ("root", "bcc", "lockdown")]
    assert {f.state for f in about_host} == {State.NO, State.UNKNOWN}
    assert all(f.hint for f in about_host)
    first = missing(list(found.values()))
    assert first is not None
    assert first.name == "KHO"
    assert found["debug info"].value == "not looked for: /proc/kcore: no"
    assert found["debug info"].hint == "make it yes"


@pytest.mark.parametrize(
    ("name", "without", "other", "state", "said"),
    [
        ("KHO", (), {"kallsyms": "0 T schedule\n"}, "no", "CONFIG_KEXEC_HANDOVER"),
        ("KHO", (), {"kallsyms": ""}, "?", "CONFIG_KALLSYMS"),
        ("tracker", (), {}, "ok", "radix tree"),
        ("tracker", (), {"kallsyms": "0 T kho_preserve_pages\n"}, "?", "memory tells"),
        ("traced blocks", (), {}, "ok", "each block that is added"),
        ("traced blocks", (), {"kallsyms": "0 T kho_preserve_pages\n"}, "?", "trace says it"),
        ("KHO on", (), {}, "?", "kho=on on the command line"),
        ("KHO on", (), {"cmdline": "kho=off"}, "no", "boot it with kho=on in place of kho=off"),
        ("KHO on", (), {"cmdline": "quiet"}, "?", "boot it with kho=on, or see"),
        ("KHO on", (), {"cmdline": ""}, "?", "see what is missing"),
        ("scratch", (), {}, "?", "how much is not known as root, /proc/pagetypeinfo tells"),
        ("kernel memory", ("proc/kcore",), {}, "no", "CONFIG_PROC_KCORE"),
        ("lockdown", (), {"lockdown": "none [integrity] confidentiality"}, "ok", "integrity"),
        ("lockdown", (), {"lockdown": "none integrity [confidentiality]"}, "no", "--qemu"),
        ("BTF", ("sys/kernel/btf/vmlinux",), {}, "no", "CONFIG_DEBUG_INFO_BTF"),
        ("kptr_restrict", (), {"kptr_restrict": "2\n"}, "no", "kernel.kptr_restrict=1"),
        ("LUO", (), {}, "ok", "built in"),
        ("LUO's device", ("dev/liveupdate",), {}, "no", "liveupdate=on"),
        ("kexec image", (), {}, "?", "loaded"),
        ("kexec image", (), {"kexec_loaded": "0\n"}, "no", "kexec -s -l"),
        ("kexec image", ("sys/kernel/kexec_loaded",), {}, "?", "CONFIG_KEXEC_FILE"),
        ("headers", ("sys/kernel/kheaders.tar.xz",), {}, "no", "CONFIG_IKHEADERS"),
        ("kprobes", (), {"enabled": "0\n"}, "no", "write 1"),
        ("kprobes", ("sys/kernel/debug/kprobes/enabled",), {}, "ok", "built in"),
        ("fentry", ("sys/kernel/btf/vmlinux",), {}, "no", "needs BTF"),
        ("fentry", (), {"ftrace_enabled": "0\n"}, "no", "kernel.ftrace_enabled=1"),
        ("fentry", (), {"available_filter_functions": "schedule\n"}, "no", "no function of KHO"),
        ("fentry", ("sys/kernel/tracing/available_filter_functions",), {}, "?", "FUNCTION_TRACER"),
    ],
)
def test_one_is_not_as_it_should_be(
    tmp_path: Path,
    name: str,
    without: tuple[str, ...],
    other: dict[str, str],
    state: str,
    said: str,
) -> None:
    fact = look(host(tmp_path, without, **other))[name]
    assert fact.state == state
    assert said in f"{fact.value} {fact.hint}"
    assert bool(fact.hint) == (state != State.OK)


OF_6_18 = """\
0000000000000000 T kho_preserve_pages
0000000000000000 t __kho_preserve_order.constprop.0
0000000000000000 T register_kprobe
"""


@pytest.mark.parametrize(
    ("finalize", "state", "said"),
    [
        ("1\n", State.OK, "yes"),
        ("0\n", State.NO, "no; when it must be is not known"),
        (None, State.UNKNOWN, "cannot be read"),
        ("", State.UNKNOWN, "cannot be read"),
    ],
)
def test_kernels_before_the_radix_tree(
    tmp_path: Path, finalize: str | None, state: State, said: str
) -> None:
    """What they are, and whether they are finalized, is known without their memory."""
    it = host(tmp_path, kallsyms=OF_6_18)
    if finalize is not None:
        path = tmp_path / "sys/kernel/debug/kho/out/finalize"
        path.parent.mkdir(parents=True)
        path.write_text(finalize)
    found = look(it)
    assert (found["tracker"].state, found["tracker"].value) == (State.OK, "xarrays of bitmaps")
    assert "arguments" in found["traced blocks"].value
    assert (found["finalized"].state, found["finalized"].value) == (state, said)
    assert found["finalized"].read_from == "/sys/kernel/debug/kho/out/finalize"
    assert ("before the image is loaded" in found["finalized"].hint) == (state == State.NO)
    assert not found["finalized"].needed


@pytest.mark.parametrize("finalized", [False, True, None])
def test_kernels_whose_memory_says_whether_they_are_finalized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finalized: bool | None
) -> None:
    """The kernel has no debugfs; it was made to look like one without functions of its tracker."""
    abi = replace(XARRAYS, finalize=Finalize.BEFORE_KEXEC, decided={"tracker": "kho_out.track"})
    facts = snapshot(abi, [Block(0x100000)])
    no_fdt = replace(facts.outgoing, fdt=replace(facts.outgoing.fdt, phys=0, compatible=None))
    facts = replace(facts, outgoing=no_fdt, finalized=finalized)
    it = host(tmp_path, kallsyms="0 T kho_preserve_pages\n")
    found = look_inside(it, facts, monkeypatch)
    assert (found["tracker"].value, found["tracker"].read_from) == (
        "xarrays of bitmaps",
        "kho_out.track",
    )
    fact = found["finalized"]
    state = {True: State.OK, False: State.NO, None: State.UNKNOWN}[finalized]
    assert (fact.state, fact.read_from) == (state, "kho_out.finalized")
    assert ("before the kexec" in fact.hint) == (finalized is False)
    early = finalized is False
    assert found["KHO's state"].value == "readable, no FDT" + " before it is finalized" * early
    # With KHO off, there is nothing to finalize.
    off = look_inside(it, replace(facts, kho_enable=False), monkeypatch)
    assert "finalized" not in off


def test_kernels_whose_luo_finalizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to be done, whatever debugfs says; LUO that is off does not do it."""
    it = host(tmp_path, kallsyms="0 T kho_preserve_pages\n0 T liveupdate_enabled\n")
    path = tmp_path / "sys/kernel/debug/kho/out/finalize"
    path.parent.mkdir(parents=True)
    path.write_text("0\n")
    abi = replace(XARRAYS, finalize=Finalize.BEFORE_KEXEC)
    facts = replace(snapshot(abi, [Block(0x100000)]), finalized=False)
    for on, state in ((True, State.OK), (False, State.NO)):
        luo = replace(facts, liveupdate=LuoState(on, []))
        fact = look_inside(it, luo, monkeypatch)["finalized"]
        assert fact.state == state
        assert bool(fact.hint) != on
        assert ("LUO does it" in fact.value) == on


def test_kernels_that_may_have_luo(tmp_path: Path) -> None:
    """Without their memory it is not known whether LUO is on."""
    it = host(
        tmp_path, kallsyms="0 T kho_finalize\n0 T kho_preserve_pages\n0 T liveupdate_enabled\n"
    )
    path = tmp_path / "sys/kernel/debug/kho/out/finalize"
    path.parent.mkdir(parents=True)
    path.write_text("0\n")
    fact = look(it)["finalized"]
    assert fact.state == State.NO
    assert fact.value.endswith("not known, and LUO, if it is on, does it")
    assert "nothing would be handed over" not in fact.value


def test_kernels_that_do_not_finalize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "finalized" not in look(host(tmp_path))
    assert "finalized" not in look_inside(host(tmp_path), kernel(), monkeypatch)


def test_headers_of_a_package(tmp_path: Path) -> None:
    it = host(tmp_path, ("sys/kernel/kheaders.tar.xz",))
    (tmp_path / "lib/modules" / platform.release() / "build").mkdir(parents=True)
    assert look(it)["headers"].state == State.OK


def test_headers_that_nobody_can_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda tool: None if tool == "xz" else tool)  # type: ignore[attr-defined]
    fact = look(host(tmp_path))["headers"]
    assert (fact.state, fact.value) == (State.NO, "no xz")


@pytest.mark.parametrize(
    ("image", "state", "said"),
    [
        (KexecImage(False), State.NO, "none is loaded"),
        (KexecImage(True, False, 0, 1), State.NO, "loaded by kexec_load, without the handover"),
    ],
)
def test_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: KexecImage, state: State, said: str
) -> None:
    found = look_inside(host(tmp_path), replace(kernel(), image=image), monkeypatch)
    assert (found["kexec image"].state, found["kexec image"].value) == (state, said)


@pytest.mark.parametrize(
    ("command_line", "areas", "hint"),
    [
        ("quiet", 0, "boot it with kho=on"),
        ("kho=on", 3, "see what the kernel's log says of KHO; if there was no room"),
    ],
)
def test_kho_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: str, areas: int, hint: str
) -> None:
    """Nobody is told to boot with what the kernel was booted with."""
    facts = kernel()
    told = replace(facts.kernel, command_line=command_line)
    setup = ScratchSetup(areas, areas > 0)
    facts = replace(facts, kernel=told, kho_enable=False, scratch_setup=setup)
    found = list(look_inside(host(tmp_path), facts, monkeypatch).values())
    first = missing(found)
    assert first is not None
    assert (first.name, first.state) == ("KHO on", State.NO)
    assert first.hint.startswith(hint)


MEMINFO = "MemTotal: 1004036 kB\nCmaTotal: {} kB\nCmaFree: {} kB\n"
ZONES = "Node 0, zone   Normal\n        cma      {}\n"
COLD = "sys/kernel/boot_params/version"


def with_files(tmp_path: Path, files: dict[str, str], **other: str) -> module.Host:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return host(tmp_path, (), **other)


def test_scratch_is_seen_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zones have and CmaTotal has not shows that KHO is on, and what it takes."""
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)
    files = {"proc/meminfo": MEMINFO.format(0, 262144), "proc/zoneinfo": ZONES.format(1 << 17)}
    facts = with_files(tmp_path, files, cmdline="quiet").facts(never, unread)
    names = [fact.name for fact in facts]
    assert names.index("scratch") == names.index("KHO on") + 1
    found = by_name(facts)
    on, scratch = found["KHO on"], found["scratch"]
    assert (on.state, on.hint, on.read_from) == (State.OK, "", "/proc/zoneinfo")
    assert on.value == "the default of this kernel (CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT)"
    assert (scratch.state, scratch.read_from) == (State.OK, "/proc/zoneinfo")
    assert scratch.value == (
        "512 MiB, which only movable memory may use; /proc/meminfo has what is free of it in "
        "CmaFree (262,144 kB), and none of it in CmaTotal (0 kB)"
    )
    assert "kho=off" in scratch.hint
    assert not scratch.needed


@pytest.mark.parametrize(
    ("cmdline", "free", "zones", "cold", "on", "scratch", "said"),
    [
        ("kho=off", 0, 0, True, State.NO, State.OK, "none: KHO is off"),
        ("kho=off", 0, 0, False, State.NO, State.OK, "none: KHO is off"),
        ("kho=on", 0, 0, True, State.NO, State.OK, "none: KHO is off"),
        ("kho=on", 0, 0, False, State.UNKNOWN, State.UNKNOWN, "how much is not known"),
        ("kho=on", 141528, 0, False, State.OK, State.UNKNOWN, "but there is some, which"),
        ("kho=off", 141528, 0, False, State.NO, State.UNKNOWN, "but there is some, which"),
    ],
)
def test_scratch_and_the_switch(
    tmp_path: Path,
    cmdline: str,
    free: int,
    zones: int,
    cold: bool,
    on: State,
    scratch: State,
    said: str,
) -> None:
    """After a kexec with a handover, zones count none of it."""
    files = {"proc/meminfo": MEMINFO.format(0, free), "proc/zoneinfo": ZONES.format(zones)}
    found = look(with_files(tmp_path, files | ({COLD: "0x020f"} if cold else {}), cmdline=cmdline))
    assert (found["KHO on"].state, found["scratch"].state) == (on, scratch)
    assert said in found["scratch"].value
    assert bool(found["scratch"].hint) == (scratch != State.OK)
    if cmdline == "kho=on":
        assert "kho=on" not in found["KHO on"].hint


def test_scratch_of_a_kernel_whose_memory_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(kernel(), scratch=np.array([[1 << 30, 1 << 28], [2 << 30, 1 << 28]], np.uint64))
    found = look_inside(host(tmp_path), facts, monkeypatch)["scratch"]
    assert (found.state, found.read_from) == (State.OK, "kho_scratch")
    assert found.value == "512 MiB, which only movable memory may use"
    # Somebody uses it.
    assert found.hint == ""
    unused = replace(snapshot(FIXED, []), scratch=facts.scratch)
    hint = look_inside(host(tmp_path), unused, monkeypatch)["scratch"].hint
    assert "khoscope scratch says" in hint
    assert "kho=off" in hint
    # One that has it off keeps what it was handed, and does not know of it.
    off = replace(kernel(), kho_enable=False, scratch=np.empty((0, 2), np.uint64))
    blocks = "Pages per block:  512\nNumber of blocks type  CMA\nNode 0, zone Normal 8\n"
    files = {"proc/meminfo": MEMINFO.format(0, 4096), "proc/pagetypeinfo": blocks}
    found = look_inside(with_files(tmp_path, files), off, monkeypatch)["scratch"]
    assert (found.state, found.read_from) == (State.OK, "/proc/pagetypeinfo")
    assert "a cold boot with kho=off gives it back" in found.hint


def test_debug_info_is_there_and_the_kernel_is_not_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "debug_info", lambda prog: DebugInfo("DWARF", "/boot/vmlinux"))

    def read(prog: Program) -> KernelSource:
        raise KhoscopeError("older than the radix tree", "use another")

    found = by_name(host(tmp_path).facts(Program, read))
    assert found["debug info"].state == State.OK
    assert (found["KHO's state"].state, found["KHO's state"].hint) == (State.NO, "use another")


def test_no_debug_info(tmp_path: Path) -> None:
    def no_debug_info() -> Program:
        raise KhoscopeError("no debug info for it", "name its vmlinux")

    found = by_name(host(tmp_path).facts(no_debug_info, unread))
    assert (found["debug info"].state, found["debug info"].hint) == (State.NO, "name its vmlinux")


def test_command_without_anything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what there is on stdout, and on stderr why that is not enough."""
    monkeypatch.setattr(open_module, "Program", NoKcore)
    text = run("doctor")
    text.refused()
    first = text.err.splitlines()[0].removeprefix("khoscope: ").partition(":")[0]
    assert text.last == f"this kernel cannot be looked at: see {first} above"
    assert all(len(line) <= 80 for line in text.out.splitlines())
    document = run("doctor", "--json").document
    assert document["schema"] == "khoscope.doctor/1"
    assert document["ready"] is False
    needed = next(f for f in document["facts"] if f["needed"] and f["state"] != "ok")
    assert needed["name"] == first
    others = [fact for fact in document["facts"] if fact["name"] != "scratch"]
    assert all((f["state"] == "ok") == (f["hint"] is None) for f in others)


class NoKcore:
    """A drgn program on a host that lets nobody read its memory."""

    def set_kernel(self) -> None:
        raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize("source", [("--qemu", "x"), ("--core", "x"), ("--snapshot", "x")])
def test_it_is_about_this_host(run: Run, source: tuple[str, str]) -> None:
    result = run(*source, "doctor")
    assert result.status == 2
    assert "about this host" in result.err


def test_bcc_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", ModuleType("bcc"))
    fact = look(host(tmp_path))["bcc"]
    assert fact.state == State.NO
    assert "too old" in fact.value
    assert fact.hint.startswith("trace needs it")


def test_a_long_path_stands_alone() -> None:
    out = io.StringIO()
    path = "/" + "a" * 100
    DoctorText(out).doctor([Fact("bcc", State.OK, "0.35.0", path)], "7.2")
    assert f"\n{' ' * 19}[{path}]\n" in out.getvalue()


def test_root_is_refused_memory_without_lockdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    there = host(tmp_path, ("proc/kcore",))
    (tmp_path / "proc/kcore").mkdir()
    found = look(there)
    assert found["lockdown"].state == State.OK
    assert "container" in found["kernel memory"].hint


def test_lines_that_are_none(tmp_path: Path) -> None:
    symbols = "\n  \n0 T\n0 T kho_preserve_pages\n"
    found = look(host(tmp_path, kallsyms=symbols, available_filter_functions="\n\n"))
    assert found["KHO"].state == State.OK
    assert found["fentry"].state == State.NO
