# SPDX-License-Identifier: LGPL-2.1-or-later
"""The probes without a kernel: what is asked of bcc, and what is made of its refusals."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from khoscope.abi.keys import Abi, Stamp
from khoscope.facts.calls import (
    FUNCTIONS,
    NUMBERS,
    Action,
    Batch,
    CallKind,
    Calls,
    Function,
    Places,
    Touches,
    Use,
)
from khoscope.sources import host_files
from khoscope.sources.bcc import import_bcc
from khoscope.sources.kernel import KernelSource, Layout, Parameter, Signature
from khoscope.sources.track import TrackLayout
from khoscope.trace import probes as probes_module
from khoscope.trace.assemble import record_dtype
from khoscope.trace.call_filter import CallFilter
from khoscope.trace.probes import CLIENT_FRAMES, Counters, Probes
from khoscope.words.errors import KhoscopeError
from tests.synthetic import FIXED, PLAIN, REFUSED, XARRAYS, call_of
from tests.test_pages import LAYOUT

KERNEL = Layout(LAYOUT, direct_map=0xFFFF888000000000, tree=0xFFFFFFFF82000000, root=8)
C_SOURCE = resources.files("khoscope").joinpath("bpf/kho_trace.c").read_text()


def takes(*names: str, is_void: bool = False, **sizes: int) -> Signature:
    """A signature; :param sizes: of parameters that are no 8 bytes."""
    parameters = (Parameter(name, sizes.get(name, 8)) for name in names)
    return Signature(tuple(parameters), is_void)


def newest(function: Function) -> Signature:
    """As FUNCTIONS has it."""
    sizes = {"order": 4, "type": 4, "is_folio": 1}
    return takes(*function.arguments, is_void=function.returns == "void", **sizes)


#: Functions of a 7.2 kernel with the series.
NEWER = {"kho_radix_add_key", "kho_radix_del_key"}
OLDER = {"kho_preserve_phys"}
ALL = {f.name: newest(f) for f in FUNCTIONS if f.name not in NEWER | OLDER}
ABSENT = [f.name for f in FUNCTIONS if f.name not in ALL]


@dataclass
class Source:
    """The kernel as far as the probes ask."""

    abi: Abi = FIXED
    layout: Layout = KERNEL
    functions: dict[str, Signature] = field(default_factory=lambda: dict(ALL))

    def signature(self, function: str) -> Signature | None:
        return self.functions.get(function)


TRACK = TrackLayout(8, 576, 0, 40, 6, 16, 0xFFFF888000000000)
OF_6_18 = {
    "kho_preserve_folio": takes("folio"),
    "kho_preserve_pages": takes("page", "nr_pages", nr_pages=4),
    "kho_preserve_vmalloc": takes("ptr", "preservation"),
    "kho_restore_folio": takes("phys"),
    "kho_restore_pages": takes("phys", "nr_pages", nr_pages=4),
    "kho_restore_vmalloc": takes("preservation"),
    "kho_restore_page": takes("phys"),
    "kho_add_subtree": takes("ser", "name", "fdt"),
}


def of_xarrays(functions: dict[str, Signature] | None = None, abi: Abi = XARRAYS) -> Source:
    """A kernel before the radix tree."""
    layout = replace(KERNEL, tree=0, root=0, orders=0xFFFFFFFF82000040, track=TRACK)
    return Source(abi, layout, OF_6_18 if functions is None else functions)


class Table(dict[int, Any]):
    """A BPF map."""

    def __init__(self, bcc: FakeBcc, name: str) -> None:
        super().__init__()
        self.bcc = bcc
        self.name = name
        self.max_entries = 1024
        self.map_fd = 1234

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(getattr(key, "value", key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key.value, value.value)

    class Leaf:
        """The type of its values."""

        def __init__(self, value: bytes) -> None:
            self.value = value

        from_buffer_copy = classmethod(lambda cls, raw: cls(raw))

    def items_lookup_batch(self) -> Iterator[tuple[Any, Any]]:
        yield from self.items()


@dataclass
class FakeBcc:
    """
    What bcc was asked to do, and how it answers.

    :param fails: called with each step and what it is about; raises what bcc would.
    :param knows_may_goto: whether the kernel takes a program with that instruction.
    """

    kfunc: bool = True
    knows_may_goto: bool = True
    fails: Callable[[str, str], None] = lambda step, what: None
    done: list[tuple[str, str]] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)
    symbols: dict[int, tuple[bytes | None, int, bytes | None]] = field(default_factory=dict)
    caches: int = 0
    #: The file descriptor of the program that was loaded to see whether it can be.
    loaded: int = -1
    #: Caches of symbols that nobody has freed.
    held: int = 0
    #: What a poll gives.
    events: list[bytes] = field(default_factory=list)

    def do(self, step: str, what: str) -> None:
        self.done.append((step, what))
        self.fails(step, what)

    def steps(self, step: str) -> list[str]:
        return [what for each, what in self.done if each == step]

    @property
    def left(self) -> int:
        """Programs that are still in the kernel."""
        return len(self.made) - len(self.steps("cleanup"))

    def module(self) -> ModuleType:
        bcc = self

        class BPF:
            KPROBE = 2

            def __init__(self, text: str, cflags: list[str], debug: int) -> None:
                bcc.made.append(self)
                self.text, self.cflags, self.debug = text, cflags, debug
                self.funcs: dict[bytes, Any] = {}
                self.tables: dict[str, Table] = {}
                bcc.do("compile", text)
                for name in re.findall(r"^FENTRY\((\w+),", text, re.M):
                    bcc.do("load", name)

            def __getitem__(self, name: str) -> Table:
                return self.tables.setdefault(name, Table(bcc, name))

            def attach_kprobe(self, event: str, fn_name: str) -> None:
                assert fn_name == f"enter_{event}"
                bcc.do("kprobe", event)

            def attach_kretprobe(self, event: str, fn_name: str) -> None:
                assert fn_name == f"leave_{event}"
                bcc.do("kretprobe", event)

            def detach_kretprobe(self, event: str) -> None:
                bcc.do("detach", event)

            def cleanup(self) -> None:
                bcc.done.append(("cleanup", ""))

            def ring_buffer_poll(self, milliseconds: int) -> None:
                raise AssertionError("the ring is read by our own reader")

            @staticmethod
            def support_kfunc() -> bool:
                return bcc.kfunc

        class SymbolCache:
            def __init__(self, pid: int) -> None:
                assert pid == -1
                bcc.caches += 1
                bcc.held += 1
                self.cache = bcc.caches

            def resolve(
                self, address: int, demangle: bool
            ) -> tuple[bytes | None, int, bytes | None]:
                return bcc.symbols.get(address, (None, address, None))

        class Library:
            @staticmethod
            def bcc_prog_load(kind: int, name: bytes, code: bytes, size: int, *rest: object) -> int:
                """struct bpf_insn: may_goto, and a program's end."""
                assert (kind, size, rest) == (BPF.KPROBE, 24, (b"GPL", 0, 0, None, 0))
                assert code == bytes.fromhex("e5" + 7 * "00" + "b7" + 7 * "00" + "95" + 7 * "00")
                if not bcc.knows_may_goto:
                    complain("bpf: Failed to load program: Invalid argument")
                    return -1
                bcc.loaded = os.open(os.devnull, os.O_RDONLY)
                return bcc.loaded

            @staticmethod
            def bcc_free_symcache(cache: int, pid: int) -> None:
                # Only the last one is held.
                assert (cache, pid) == (bcc.caches, -1)
                bcc.held -= 1

        module = ModuleType("bcc")
        vars(module).update(
            lib=Library, BPF=BPF, SymbolCache=SymbolCache, DEBUG_BPF=2, __version__="0.35.0"
        )
        return module


class FakeRing:
    """The ring buffer: it is in no memory of this process."""

    def __init__(self, bcc: FakeBcc, fd: int, size: int, record: int) -> None:
        assert fd == 1234
        bcc.do("open", f"ring {size // mmap.PAGESIZE}")
        self.bcc = bcc
        self.record = record

    def take(self, milliseconds: int, most: int) -> NDArray[np.uint8]:
        self.bcc.do("poll", str(milliseconds))
        if not self.bcc.events:
            time.sleep(milliseconds / 1000)
        events, self.bcc.events = self.bcc.events[:most], self.bcc.events[most:]
        return np.frombuffer(b"".join(events), np.uint8).reshape(-1, self.record)


@pytest.fixture
def bcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeBcc:
    """A bcc, and a kernel that has everything."""
    fake = FakeBcc()
    monkeypatch.setitem(sys.modules, "bcc", fake.module())
    monkeypatch.setattr(probes_module, "Ring", partial(FakeRing, fake))
    files = {
        "BTF": b"\0" + b"".join(name.encode() + b"\0" for name in ALL),
        "TRACEABLE": "".join(f"{name}\n" for name in [*ALL, "other [kho_test]"]).encode(),
        "KPROBES_ENABLED": b"1\n",
        "LOADED_MODULES": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(host_files, name, tmp_path / name)
    return fake


def fake_probes(
    source: Source | None = None, wanted: CallFilter | None = None, **more: Any
) -> Probes:
    return Probes(cast(KernelSource, source or Source()), wanted or CallFilter(), **more)


def refused(*words: str, probes: Probes | None = None) -> KhoscopeError:
    """The probes are not attached, and what is said of it has these words."""
    with pytest.raises(KhoscopeError) as caught, probes or fake_probes():
        pytest.fail("attached")
    said = f"{caught.value.what}\n{caught.value.hint}"
    assert len(said.splitlines()) == 2
    for word in words:
        assert word in said
    return caught.value


@pytest.fixture(autouse=True)
def stderr_stays() -> Iterator[None]:
    """Whatever happens, stderr is what it was, and no file is left open."""

    def now() -> tuple[int, int, int]:
        stat = os.fstat(2)
        return stat.st_dev, stat.st_ino, len(os.listdir("/proc/self/fd"))

    before = now()
    yield
    assert now() == before


# bcc


def test_bcc_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(KhoscopeError) as caught:
        fake_probes()
    assert f"bcc is not there for {sys.executable}" in caught.value.what
    assert "python3-bpfcc" in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        OSError("libbcc.so.0: cannot open shared object file"),
        # The Python of one version with the library of another.
        AttributeError("libbcc.so.0: undefined symbol: bpf_attach_kfunc"),
    ],
)
def test_bcc_is_not_whole(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(KhoscopeError, match="libbcc"):
        import_bcc()


@pytest.mark.parametrize("lacks", ["ring_buffer_poll", "support_kfunc"])
def test_bcc_is_too_old(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = FakeBcc().module()
    module.__version__ = "0.12.0"
    delattr(module.BPF, lacks)
    monkeypatch.setitem(sys.modules, "bcc", module)
    with pytest.raises(KhoscopeError) as caught:
        import_bcc()
    assert caught.value.what == f"bcc 0.12.0 is too old: it has no BPF.{lacks}"
    assert "python3-bpfcc" in caught.value.hint


def test_another_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a package of that name on PyPI that is something else."""
    monkeypatch.setitem(sys.modules, "bcc", ModuleType("bcc"))
    with pytest.raises(KhoscopeError, match="bcc of an unknown version is too old"):
        import_bcc()


# What is attached, and how


def lines_of(bpf: Any) -> list[str]:
    """The lines behind bpf/kho_trace.c."""
    assert bpf.text.startswith(C_SOURCE)
    return cast(str, bpf.text)[len(C_SOURCE) :].splitlines()


def test_fentry(bcc: FakeBcc) -> None:
    with fake_probes() as probes:
        assert probes.attached == dict.fromkeys(ALL, "fentry")
        assert probes.missing == dict.fromkeys(ABSENT, "not in this kernel")
        assert probes.buffer == "ring buffer of 16 MiB"
        [bpf] = bcc.made
        assert bpf["armed"] == {0: 1}
        assert (bcc.steps("open"), bcc.steps("kprobe")) == (["ring 4096"], [])
        probes.arm(False)
        assert bpf["armed"] == {0: 0}
        assert bcc.left == 1
    assert bcc.left == 0
    lines = lines_of(bpf)
    assert len(lines) == 2 * len(ALL)
    assert lines[:2] == [
        "FENTRY(kho_preserve_folio, 0, 1, NO_BLOCK, 0, ctx[0], 0, 0, 0)",
        "FEXIT(kho_preserve_folio, 0, NO_BLOCK, 0, ctx[1], 0, PAGES_TOUCHED(ADD))",
    ]
    of_tree = "ctx[0], ctx[1], (u32)ctx[2], (u32)ctx[3]"
    assert f"FENTRY(kho_radix_add_page, 13, 32, BLOCK_BY_PFN, 1, {of_tree})" in lines
    assert "FEXIT(kho_radix_add_page, 13, BLOCK_BY_PFN, 1, ctx[4], 0, PAGES_TOUCHED(ADD))" in lines
    assert f"FENTRY(kho_radix_del_page, 14, 32, BLOCK_BY_PFN, 0, {of_tree})" in lines
    assert "FEXIT(kho_radix_del_page, 14, BLOCK_BY_PFN, 0, 0, 0, PAGES_TOUCHED(DELETE))" in lines
    assert "FENTRY(kho_restore_page, 10, 8, BLOCK_BY_STAMP, 0, ctx[0], ctx[1], 0, 0)" in lines
    assert "FENTRY(kho_restore_pages, 8, 8, NO_BLOCK, 0, ctx[0], ctx[1], 0, 0)" in lines
    assert "FENTRY(kho_add_subtree, 11, 16, NAMED, 0, ctx[0], ctx[1], ctx[2], 0)" in lines


def test_kprobe(bcc: FakeBcc) -> None:
    with fake_probes(how="kprobe") as probes:
        assert probes.attached == dict.fromkeys(ALL, "kprobe")
        [bpf] = bcc.made
    lines = lines_of(bpf)
    assert lines[:2] == [
        "KPROBE(kho_preserve_folio, 0, 1, NO_BLOCK, 0, PT_REGS_PARM1(ctx), 0, 0, 0)",
        "KRETPROBE(kho_preserve_folio, 0, NO_BLOCK, 0, PT_REGS_RC(ctx), 0, PAGES_TOUCHED(ADD))",
    ]
    registers = "PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), (u32)PT_REGS_PARM3(ctx)"
    registers += ", (u32)PT_REGS_PARM4(ctx)"
    assert f"KPROBE(kho_radix_add_page, 13, 32, BLOCK_BY_PFN, 1, {registers})" in lines
    assert (
        "KRETPROBE(kho_radix_del_page, 14, BLOCK_BY_PFN, 0, 0, 0, PAGES_TOUCHED(DELETE))" in lines
    )
    assert len(lines) == 2 * len(ALL)
    # Each return before its entry.
    steps = [step for step in bcc.done if step[0] in ("kprobe", "kretprobe")]
    assert steps == [(step, name) for name in ALL for step in ("kretprobe", "kprobe")]


def test_lines_fit_the_macros_of_the_c_source(bcc: FakeBcc) -> None:
    arities = {
        name: len(arguments.split(","))
        for name, arguments in re.findall(r"^#define (\w+)\(([^)]*)\)", C_SOURCE, re.M)
    }
    source = Source(functions={f.name: newest(f) for f in FUNCTIONS})
    for how in ("fentry", "kprobe"):
        with fake_probes(source, how=how):
            pass
        lines = lines_of(bcc.made[-1])
        assert len(lines) == 2 * len(FUNCTIONS)
        for line in lines:
            macro, arguments = re.fullmatch(r"(\w+)\((.*)\)", line).groups()  # type: ignore[union-attr]
            assert len(arguments.split(",")) == arities[macro]
            words = re.sub(r"PT_REGS_\w+\(ctx\)", "", arguments)
            known = {use.name for use in Use} | {action.name for action in Action}
            assert set(re.findall(r"\b[A-Z]\w+", words)) <= known | arities.keys()


def test_functions_with_fewer_arguments(bcc: FakeBcc) -> None:
    """An older kernel's; the result follows the last argument, and what it lacks is all ones."""
    functions = {
        **ALL,
        "kho_add_subtree": takes("name", "fdt"),
        "kho_radix_add_page": takes("tree", "pfn", "order", order=4),
        "kho_preserve_folio": takes("folio", "b", "c", "d", "e"),
    }
    with fake_probes(Source(functions=functions)):
        lines = lines_of(bcc.made[0])
    none = "0xffffffffffffffffULL"
    assert f"FENTRY(kho_add_subtree, 11, 16, NAMED, 0, ctx[0], ctx[1], {none}, 0)" in lines
    assert "FEXIT(kho_add_subtree, 11, NAMED, 0, ctx[2], 0, PAGES_OF_SIZE(2))" in lines
    without_type = f"ctx[0], ctx[1], (u32)ctx[2], {none}"
    assert f"FENTRY(kho_radix_add_page, 13, 32, BLOCK_BY_PFN, 1, {without_type})" in lines
    assert "FEXIT(kho_radix_add_page, 13, BLOCK_BY_PFN, 1, ctx[3], 0, PAGES_TOUCHED(ADD))" in lines
    assert "FENTRY(kho_preserve_folio, 0, 1, NO_BLOCK, 0, ctx[0], 0, 0, 0)" in lines
    assert "FEXIT(kho_preserve_folio, 0, NO_BLOCK, 0, ctx[5], 0, PAGES_TOUCHED(ADD))" in lines


def test_what_is_void_here_and_an_int_there(bcc: FakeBcc) -> None:
    """The kernel's own debug info decides, whatever FUNCTIONS has."""
    functions = {**ALL, "kho_unpreserve_pages": takes("page", "nr_pages", nr_pages=4)}
    for how, result in (("fentry", "ctx[2]"), ("kprobe", "PT_REGS_RC(ctx)")):
        with fake_probes(Source(functions=functions), how=how):
            lines = lines_of(bcc.made[-1])
        leave = {"fentry": "FEXIT", "kprobe": "KRETPROBE"}[how]
        assert (
            f"{leave}(kho_unpreserve_pages, 4, NO_BLOCK, 0, {result}, 0, PAGES_COUNTED(1))" in lines
        )
        assert (
            f"{leave}(kho_unpreserve_folio, 3, NO_BLOCK, 0, 0, 0, PAGES_TOUCHED(DELETE))" in lines
        )


@pytest.mark.parametrize(
    "signature",
    [
        None,
        # Linux 6.18; a tree that has another function of this name; 6.17, and 6.16.
        takes("phys"),
        takes("phys", "order"),
        takes("page", "order", is_void=True, order=4),
        takes("page", is_void=True),
    ],
)
def test_kho_restore_page_is_inlined_or_another(bcc: FakeBcc, signature: Signature | None) -> None:
    functions = {name: each for name, each in ALL.items() if name != "kho_restore_page"}
    if signature:
        functions["kho_restore_page"] = signature
    with fake_probes(Source(functions=functions)) as probes:
        assert probes.missing["kho_restore_page"] == "its callers tell what they restore"
        assert "kho_restore_page" not in probes.attached
        lines = lines_of(bcc.made[0])
    assert "FENTRY(kho_restore_folio, 7, 8, BLOCK_BY_STAMP, 0, ctx[0], 0, 0, 0)" in lines
    assert "FEXIT(kho_restore_pages, 8, BLOCKS_BY_STAMP, 0, ctx[2], 1, PAGES_COUNTED(1))" in lines
    # Blocks that are added have a function of their own.
    assert "FEXIT(kho_preserve_pages, 1, NO_BLOCK, 0, ctx[2], 0, PAGES_COUNTED(1))" in lines


def test_nothing_adds_blocks(bcc: FakeBcc) -> None:
    functions = {name: each for name, each in ALL.items() if "radix" not in name}
    refused("kho_radix_add_page", probes=fake_probes(Source(functions=functions)))
    functions = {n: each for n, each in OF_6_18.items() if n not in _PRESERVE}
    refused("kho_preserve_pages", probes=fake_probes(of_xarrays(functions)))
    assert bcc.made == []


_PRESERVE = ("kho_preserve_folio", "kho_preserve_pages")


def test_kernels_before_the_radix_tree(bcc: FakeBcc) -> None:
    """Blocks follow from the arguments; the name of a subtree is not the first of them."""
    with fake_probes(of_xarrays()) as probes:
        assert probes.attached.keys() == OF_6_18.keys() - {"kho_restore_page"}
        missing = {name for name, why in probes.missing.items() if why == "not in this kernel"}
        assert missing == {f.name for f in FUNCTIONS} - OF_6_18.keys()
        lines = lines_of(bcc.made[0])
    none = "0xffffffffffffffffULL"
    assert "FENTRY(kho_preserve_folio, 0, 1, BLOCK_OF_FOLIO, 1, ctx[0], 0, 0, 0)" in lines
    pages = "ctx[0], (u32)ctx[1], 0, 0"
    assert f"FENTRY(kho_preserve_pages, 1, 1, BLOCKS_OF_PAGES, 1, {pages})" in lines
    assert "FEXIT(kho_preserve_pages, 1, BLOCKS_OF_PAGES, 1, ctx[2], 0, PAGES_COUNTED(1))" in lines
    assert "FENTRY(kho_preserve_vmalloc, 2, 1, NO_BLOCK, 0, ctx[0], ctx[1], 0, 0)" in lines
    assert f"FENTRY(kho_restore_pages, 8, 8, BLOCKS_BY_STAMP, 0, {pages})" in lines
    assert f"FENTRY(kho_add_subtree, 11, 16, NAMED, 0, ctx[1], ctx[2], {none}, 0)" in lines
    assert "FEXIT(kho_add_subtree, 11, NAMED, 0, ctx[3], 0, PAGES_OF_SIZE(2))" in lines


def test_kernels_that_preserve_by_address(bcc: FakeBcc) -> None:
    """Linux 6.16 and 6.17: a range of bytes, and nothing but folios is restored."""
    functions = {
        "kho_preserve_folio": takes("folio"),
        "kho_preserve_phys": takes("phys", "size"),
        "kho_restore_folio": takes("phys"),
    }
    without_magic = replace(XARRAYS, stamp=Stamp(magic_shift=None), preserve_bits=1 << 12)
    # BTF does not know all of them here.
    with fake_probes(of_xarrays(functions, without_magic), how="fentry") as probes:
        assert probes.attached.keys() == functions.keys()
        lines = lines_of(bcc.made[0])
        made = defines(bcc.made[0])
    assert "FENTRY(kho_preserve_phys, 17, 1, BLOCKS_OF_PHYS, 1, ctx[0], ctx[1], 0, 0)" in lines
    assert "FENTRY(kho_restore_folio, 7, 8, BLOCK_BY_STAMP, 0, ctx[0], 0, 0, 0)" in lines
    assert (made["STAMP_MAGIC"], made["STAMP_MAGIC_SHIFT"]) == ("0", "32")
    assert made["PRESERVE_LOG2"] == "12"


def test_what_is_unpreserved_before_the_radix_tree(bcc: FakeBcc) -> None:
    """Linux 6.19: folios and pages are named; what a vmalloc area has is not."""
    functions = {
        **OF_6_18,
        "kho_unpreserve_folio": takes("folio", is_void=True),
        "kho_unpreserve_pages": takes("page", "nr_pages", nr_pages=4, is_void=True),
        "kho_unpreserve_vmalloc": takes("preservation", is_void=True),
        "kho_restore_page": takes("phys", "is_folio", is_folio=1),
    }
    with fake_probes(of_xarrays(functions)) as probes:
        assert probes.attached.keys() == functions.keys()
        untold = {name for name in probes.missing if name in probes.attached}
        assert untold == {"kho_unpreserve_vmalloc"}
        lines = lines_of(bcc.made[0])
    assert "FEXIT(kho_unpreserve_folio, 3, BLOCK_OF_FOLIO, 0, 0, 0, PAGES_TOUCHED(DELETE))" in lines
    assert "FEXIT(kho_unpreserve_pages, 4, BLOCKS_OF_PAGES, 0, 0, 0, PAGES_COUNTED(1))" in lines
    assert "FEXIT(kho_unpreserve_vmalloc, 5, NO_BLOCK, 0, 0, 0, PAGES_TOUCHED(DELETE))" in lines
    assert (
        "FEXIT(kho_restore_page, 10, BLOCK_BY_STAMP, 0, ctx[2], 1, PAGES_TOUCHED(RESTORE))" in lines
    )
    assert "FEXIT(kho_restore_pages, 8, NO_BLOCK, 0, ctx[2], 1, PAGES_COUNTED(1))" in lines


def test_other_names_of_the_newest_kernel(bcc: FakeBcc) -> None:
    functions = {name: each for name, each in ALL.items() if "radix" not in name}
    functions |= dict.fromkeys(NEWER, takes("tree", "key"))
    with fake_probes(Source(functions=functions)) as probes:
        # BTF does not know them here.
        assert {probes.attached[name] for name in NEWER} == {"kprobe"}
        lines = lines_of(bcc.made[0])
    key = "PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), 0, 0"
    assert f"KPROBE(kho_radix_add_key, 15, 32, BLOCK_BY_KEY, 1, {key})" in lines
    result = "PT_REGS_RC(ctx), 0, PAGES_TOUCHED(DELETE)"
    assert f"KRETPROBE(kho_radix_del_key, 16, BLOCK_BY_KEY, 0, {result})" in lines


def hows(probes: Probes) -> set[str]:
    with probes:
        return set(probes.attached.values())


def test_kernels_without_fentry(bcc: FakeBcc) -> None:
    assert hows(fake_probes()) == {"fentry"}
    bcc.kfunc = False
    assert hows(fake_probes()) == {"kprobe"}
    bcc.kfunc = True
    host_files.BTF.unlink()
    assert hows(fake_probes()) == {"kprobe"}


def test_functions_that_fentry_cannot_have(bcc: FakeBcc) -> None:
    # A name is whole in BTF, or not there.
    btf = host_files.BTF.read_bytes().replace(b"\0kho_restore_page\0", b"\0")
    host_files.BTF.write_bytes(btf)
    traceable = host_files.TRACEABLE.read_text().replace("kho_preserve_pages\n", "")
    host_files.TRACEABLE.write_text(traceable)
    with fake_probes() as probes:
        kprobes = {name for name, how in probes.attached.items() if how == "kprobe"}
        assert kprobes == {"kho_restore_page", "kho_preserve_pages"}
        assert bcc.steps("kprobe") == ["kho_preserve_pages", "kho_restore_page"]
    # Not to be had is no list.
    host_files.TRACEABLE.unlink()
    with fake_probes() as probes:
        assert probes.attached["kho_preserve_pages"] == "fentry"


# What is compiled


def defines(bpf: Any) -> dict[str, str]:
    made = dict(flag.removeprefix("-D").split("=", 1) for flag in bpf.cflags)
    assert len(made) == len(bpf.cflags)
    return made


def named_in_the_header() -> set[str]:
    """The macros that the comment at the head of bpf/kho_trace.c promises."""
    comment = C_SOURCE[: C_SOURCE.index("The functions to trace follow")]
    lists = re.findall(r"^ \*   ([A-Z0-9_]+(?:(?:, | or )[A-Z0-9_]+)*)\s{2,}", comment, re.M)
    return {name for names in lists for name in re.split(", | or ", names)}


def test_every_macro_is_defined_and_no_other(bcc: FakeBcc) -> None:
    with fake_probes(wanted=CallFilter(tgid=1, comm="x")):
        pass
    named = named_in_the_header()
    assert len(named) > 20
    made = set(defines(bcc.made[0]))
    assert made == named
    code = C_SOURCE[C_SOURCE.index("#include") :]
    for name in made:
        assert re.search(rf"\b{name}\b", code)


def test_defines(bcc: FakeBcc) -> None:
    wanted = CallFilter(frozenset({CallKind.PRESERVE, CallKind.RESTORE}), 1234, "a-comm-of-16-byt")
    with fake_probes(wanted=wanted, frames=40, buffer=100 << 10):
        pass
    with fake_probes(Source(abi=PLAIN)):
        pass
    with fake_probes(Source(abi=REFUSED)):
        pass
    with fake_probes(of_xarrays()):
        pass
    made, plain, narrow, older = map(defines, bcc.made)
    assert made["VMEMMAP"] == "0xffffea0000000000ULL"
    assert made["TREE"] == "0xffffffff82000000ULL"
    assert (made["ROOT_OFFSET"], made["DIRECT_MAP"]) == ("8", "0xffff888000000000ULL")
    assert (made["PAGE_STRUCT_SIZE"], made["REFCOUNT_OFFSET"]) == ("64", "52")
    assert (made["PRIVATE_OFFSET"], made["FLAGS_OFFSET"], made["HEAD_BIT"]) == ("40", "0", "6")
    names = ("XA_HEAD", "XA_SHIFT", "XA_SLOTS", "XA_CHUNK_LOG2", "PHYS_BITS", "PRESERVE_LOG2")
    assert made["ORDERS"] == "0x0ULL"
    assert [older[name] for name in names] == ["8", "0", "40", "6", "16", "15"]
    assert (older["ORDERS"], older["TREE"]) == ("0xffffffff82000040ULL", "0x0ULL")
    names = ("PAGE_SHIFT_BITS", "ORDER_0_LOG2", "TABLE_LOG2", "BITMAP_LOG2", "DEPTH", "STORED_BITS")
    assert [made[name] for name in names] == ["12", "52", "9", "15", "6", "60"]
    assert (made["TYPE_SHIFT"], plain["TYPE_SHIFT"]) == ("53", "64")
    assert (made["KEY_WIDTH"], narrow["KEY_WIDTH"]) == ("64", "53")
    assert (made["STAMP_MAGIC"], made["STAMP_MAGIC_SHIFT"]) == ("0x4b484f50", "32")
    assert made["STAMP_ORDER_MASK"] == "0x7fffffff"
    assert plain["STAMP_ORDER_MASK"] == "0xffffffff"
    assert (made["ONLY"], plain["ONLY"]) == (str(1 | 8), str(63))
    assert (made["STACK_FRAMES"], plain["STACK_FRAMES"]) == ("40", str(CLIENT_FRAMES))
    # 100 KiB are 25 pages; a ring has a power of two.
    assert (made["RING_PAGES"], plain["RING_PAGES"]) == ("16", "4096")
    assert made["WANTED_TGID"] == "1234"
    letters = [*b"a-comm-of-16-by", 0]
    assert made["WANTED_COMM"] == "{" + ",".join(map(str, letters)) + "}"
    assert {"WANTED_TGID", "WANTED_COMM"}.isdisjoint(plain)


@pytest.mark.parametrize("knows", [True, False])
def test_loops_are_as_long_as_the_verifier_lets_them_be(
    bcc: FakeBcc, knows: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    bcc.knows_may_goto = knows
    with fake_probes() as probes:
        assert {*probes.attached.values()} == {"fentry"}
        assert defines(bcc.made[0])["MAY_GOTO"] == str(int(knows))
        if knows:
            # It was loaded, and does not stay.
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(bcc.loaded)
    assert capfd.readouterr() == ("", "")


def test_kinds_are_bits_of_the_functions(bcc: FakeBcc) -> None:
    for kind in CallKind:
        with fake_probes(wanted=CallFilter(frozenset({kind}))):
            bpf = bcc.made[-1]
        of_kind = {function.name for function in FUNCTIONS if function.kind == kind}
        pattern = rf"FENTRY\((\w+), \d+, {defines(bpf)['ONLY']}, "
        assert set(re.findall(pattern, bpf.text)) == of_kind & ALL.keys() != set()


@pytest.mark.parametrize(
    ("size", "pages", "words"),
    [
        (4096, 1, "4 KiB"),
        (8191, 1, "4 KiB"),
        (1 << 20, 256, "1 MiB"),
        (1 << 30, 1 << 18, "1024 MiB"),
    ],
)
def test_buffers(bcc: FakeBcc, size: int, pages: int, words: str) -> None:
    with fake_probes(buffer=size) as probes:
        assert probes.buffer == f"ring buffer of {words}"
        assert defines(bcc.made[0])["RING_PAGES"] == str(pages)
    assert bcc.steps("open") == [f"ring {pages}"]


# Refusals


def complain(text: str) -> None:
    """As libbcc does, behind Python's back."""
    os.write(2, text.encode())


def failing(step: str, what: str, error: str, said: str = "") -> Callable[[str, str], None]:
    """Fail at a step that is about something (a part of it, or nothing in particular)."""

    def fails(at: str, about: str) -> None:
        if at == step and what in about:
            complain(said)
            raise Exception(error)

    return fails


COMPILING = "Failed to compile BPF module <text>"


@pytest.mark.parametrize(
    ("error", "said", "words"),
    [
        (
            COMPILING,
            "chdir(/lib/modules/7.2.0/build): No such file or directory\n",
            ["no kernel headers", "CONFIG_IKHEADERS"],
        ),
        (COMPILING, "Unable to find kernel headers. Try rebuilding\n", ["no kernel headers"]),
        ("Need super-user privileges to run", "", ["not permitted", "as root"]),
        (
            COMPILING,
            "could not open bpf map: counters, error: Operation not permitted\n",
            ["not permitted", "as root"],
        ),
        (
            COMPILING,
            "could not open bpf map: events, error: Cannot allocate memory\n",
            ["BPF map events", "Cannot allocate memory", "--buffer"],
        ),
        (COMPILING, "error: unknown type name\n", ["cannot compile", "-v shows its log"]),
    ],
)
def test_what_cannot_be_compiled(
    bcc: FakeBcc, error: str, said: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    bcc.fails = failing("compile", "", error, said)
    refused(*words)
    assert (len(bcc.made), bcc.left) == (1, 0)
    assert capfd.readouterr().err == ""


def test_no_room_for_the_buffer(bcc: FakeBcc) -> None:
    def fails(step: str, what: str) -> None:
        if step == "open":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    bcc.fails = fails
    refused("Cannot allocate memory", "--buffer")
    assert bcc.left == 0


def test_verbose_shows_what_is_said(bcc: FakeBcc, capfd: pytest.CaptureFixture[str]) -> None:
    bcc.fails = failing("compile", "", COMPILING, "error: unknown type name\n")
    error = refused("cannot compile", probes=fake_probes(verbose=True))
    assert "-v" not in error.what
    assert capfd.readouterr().err == "error: unknown type name\n"
    assert (bcc.made[0].debug, bcc.left) == (2, 0)
    # The ring is emptied from another thread, which says nothing.
    bcc.fails = lambda step, what: None if step == "poll" else complain(f"{step}\n")
    with fake_probes():
        pass
    assert bcc.made[1].debug == 0
    assert capfd.readouterr().err == ""


VERIFIER_LOG = "bpf: Failed to load program: Permission denied\n0: (79) r6\nR1 is bad\n"
LOADING = "Failed to load BPF program b'kfunc__{}': Permission denied"


def test_the_verifier_refuses_fentry(bcc: FakeBcc, capfd: pytest.CaptureFixture[str]) -> None:
    error = LOADING.format("kho_radix_add_page")
    bcc.fails = failing("load", "kho_radix_add_page", error, VERIFIER_LOG)
    with fake_probes() as probes:
        assert probes.attached == dict.fromkeys(ALL, "kprobe")
        # Only functions are missing: there is none that is not traced.
        assert list(probes.missing) == ABSENT
        first, second = bcc.made
        # What of the first had been attached, is not any more.
        assert bcc.left == 1
        assert "FENTRY(kho" in first.text
        assert "FENTRY(kho" not in second.text
    assert bcc.left == 0
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert "b'kfunc__kho_radix_add_page': Permission denied: R1 is bad" in said
    assert "kprobes are used" in said


def test_the_verifier_refuses_what_was_asked_for(bcc: FakeBcc) -> None:
    bcc.fails = failing("load", "", LOADING.format("x"), VERIFIER_LOG + "processed 5 insns\n")
    error = refused("R1 is bad", "-v shows its log", probes=fake_probes(how="fentry"))
    assert error.what.startswith("the kernel's BPF verifier refuses b'kfunc__x'")
    assert "--probe" in error.hint
    assert (len(bcc.made), bcc.left) == (1, 0)


def test_the_verifier_refuses_both(bcc: FakeBcc, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(step: str, what: str) -> None:
        failing("load", "", LOADING.format("x"), VERIFIER_LOG)(step, what)
        error = "Failed to load BPF program b'leave_x': Permission denied"
        failing("kretprobe", "", error, "R2 is bad\n")(step, what)

    bcc.fails = fails
    refused("b'leave_x'", "R2 is bad")
    assert (len(bcc.made), bcc.left) == (2, 0)
    assert capfd.readouterr().err == ""


def test_kprobes_cannot_be_compiled_after_all(bcc: FakeBcc) -> None:
    def fails(step: str, what: str) -> None:
        failing("load", "", LOADING.format("x"), VERIFIER_LOG)(step, what)
        if step == "compile" and "\nKPROBE(kho" in what:
            complain("Unable to find kernel headers\n")
            raise Exception(COMPILING)

    bcc.fails = fails
    refused("no kernel headers")
    assert (len(bcc.made), bcc.left) == (2, 0)


def test_trampolines_are_refused(bcc: FakeBcc) -> None:
    bcc.fails = failing("load", "", "Failed to attach BPF to entry kernel func")
    refused("does not attach", "--probe kprobe")
    assert (len(bcc.made), bcc.left) == (1, 0)


NOT_TRACEABLE = "Failed to attach BPF program b'x' to kprobe b'x', it's not traceable"


@pytest.mark.parametrize("step", ["kprobe", "kretprobe"])
def test_functions_that_cannot_be_probed(
    bcc: FakeBcc, step: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bcc.fails = failing(step, "kho_remove_subtree", NOT_TRACEABLE, "cannot attach kprobe\n")
    with fake_probes(how="kprobe") as probes:
        assert "cannot be probed" in probes.missing["kho_remove_subtree"]
        assert probes.attached.keys() == ALL.keys() - {"kho_remove_subtree"}
        # Returns of calls that nobody sees begin would be counted as missed.
        assert bcc.steps("detach") == (["kho_remove_subtree"] if step == "kprobe" else [])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("step", ["kprobe", "kretprobe"])
@pytest.mark.parametrize("name", ["kho_radix_add_page", "kho_radix_del_page", "kho_restore_page"])
def test_functions_that_are_needed_cannot_be_probed(bcc: FakeBcc, step: str, name: str) -> None:
    bcc.fails = lambda at, about: (
        failing(step, name, NOT_TRACEABLE)(at, f"{about}\n") if (about == name) else None
    )
    refused(f"{name}: cannot be probed", "CONFIG_KPROBES", probes=fake_probes(how="kprobe"))
    assert bcc.left == 0


def test_kprobes_are_not_permitted(bcc: FakeBcc) -> None:
    bcc.fails = failing("kretprobe", "", "Need super-user privileges to run")
    refused("not permitted", probes=fake_probes(how="kprobe"))
    assert bcc.left == 0


def test_kprobes_are_switched_off(bcc: FakeBcc) -> None:
    host_files.KPROBES_ENABLED.write_text("0\n")
    # A function that fentry cannot have is among them: those that it can have are taken back.
    host_files.TRACEABLE.write_text("kho_preserve_folio\n")
    refused("kprobes are switched off", f"write 1 to {host_files.KPROBES_ENABLED}")
    assert (len(bcc.made), bcc.left) == (1, 0)
    host_files.TRACEABLE.unlink()
    assert hows(fake_probes()) == {"fentry"}
    host_files.KPROBES_ENABLED.unlink()
    assert hows(fake_probes(how="kprobe")) == {"kprobe"}


@pytest.mark.parametrize("step", ["compile", "load", "kretprobe", "kprobe", "open"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_happens_nothing_is_left(
    bcc: FakeBcc, step: str, error: type[BaseException]
) -> None:
    def fails(at: str, about: str) -> None:
        if at == step:
            raise error

    bcc.fails = fails
    how = "kprobe" if "probe" in step else None
    with pytest.raises((error, KhoscopeError)), fake_probes(how=how):
        pytest.fail("attached")
    assert bcc.made
    assert bcc.left == 0


def test_errors_while_tracing_leave_nothing(bcc: FakeBcc) -> None:
    with pytest.raises(BrokenPipeError), fake_probes():
        raise BrokenPipeError
    assert bcc.left == 0


# Following


class FakeRecord(NamedTuple):
    """A ``struct record`` as bcc gives it."""

    raw: Any
    call: Any

    def __bytes__(self) -> bytes:
        return bytes(self.raw)


def one_event(**members: int) -> bytes:
    """``struct record`` of a call that has returned, or of what its members say."""
    raw = np.zeros(1, record_dtype(CLIENT_FRAMES))
    for name, value in (members or {"has_returned": 1}).items():
        raw["call"][name] = value
    return raw.tobytes()


def test_records(bcc: FakeBcc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_module, "ENOUGH", 3)
    size = record_dtype(40).itemsize
    with fake_probes(frames=40) as probes:
        assert probes.poll(1).shape == (0, size)
        probes.arm(False)
        bcc.events = [bytes([i]) * size for i in range(5)]
        first, second = probes.poll(7), probes.poll(8)
        assert [len(first), len(second)] == [3, 2]
        together = np.concatenate([first, second])
        assert together.tolist() == [[i] * size for i in range(5)]
        assert len(probes.poll(9)) == 0
    # While some wait to be shown, none are waited for.
    assert bcc.steps("poll")[-3:] == ["7", "0", "9"]


def test_the_ring_is_emptied_while_nobody_looks(
    bcc: FakeBcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as there is room for what it had: then it fills, and the kernel counts the losses."""
    monkeypatch.setattr(probes_module, "BACKLOG", 6 * record_dtype(CLIENT_FRAMES).itemsize)
    sent = [one_event(has_returned=1, call=i) for i in range(11)]
    with fake_probes() as probes:
        bcc.events = sent
        end = time.monotonic() + 20
        while len(bcc.events) > 5:
            assert time.monotonic() < end
        probes.arm(False)
        shown = [probes.poll(1) for _ in range(3)]
    assert [len(each) for each in shown] == [6, 5, 0]
    assert b"".join(map(bytes, shown)) == b"".join(sent)


def test_blocks_that_open_calls_hold(bcc: FakeBcc) -> None:
    def task(**members: int) -> SimpleNamespace:
        raw = one_event(**members)
        leaf = (ctypes.c_char * len(raw)).from_buffer_copy(raw)
        told = FakeRecord(leaf, SimpleNamespace(has_block=members["has_block"]))
        return SimpleNamespace(depth=1, muted=0, told=SimpleNamespace(record=told))

    with fake_probes() as probes:
        bpf = bcc.made[0]
        dict.update(bpf["counters"], {0: [3, 0], 1: [0, 0], 2: [0, 0], 3: [0, 0]})
        assert probes.held().shape == (0, record_dtype(CLIENT_FRAMES).itemsize)
        tasks = [task(has_block=1, call=7), task(has_block=0, call=8)]
        dict.update(bpf["tasks"], dict(enumerate(tasks)))
        assert bytes(probes.held()) == one_event(has_block=1, call=7)
        probes.arm(False)
        bcc.events = [one_event(has_block=1, has_returned=1)]
        probes.poll(1)
        # All three events have come, in two records.
        assert probes.drained() == Counters(3, 0, 0, 2)


def test_what_is_counted(bcc: FakeBcc) -> None:
    """What was counted by kind is not lost, although no record of it came."""
    places = Places(np.array([0x1000, 0x2000], np.uint64), np.array([False, True, False]))
    with fake_probes(wanted=CallFilter(min_order=3), places=places) as probes:
        bpf = bcc.made[0]
        assert {"-DKINDS=8192", "-DMIN_ORDER=3"} <= {*bpf.cflags}
        assert probes.buffer.startswith("counted by kind, up to 8,192 of calls and of blocks; ring")
        raw = bpf["places"][0]
        borders = np.frombuffer(raw[: 8 * 256], np.uint64)
        assert borders.tolist() == [0x1000, 0x2000] + [2**63 - 1] * 254
        assert [*raw[8 * 256 :]] == [0, 1, 0] + [0] * 253
        size = record_dtype(CLIENT_FRAMES).itemsize

        def told(count: int, pages: int, mark: int) -> bytes:
            return np.array([count, pages], np.uint64).tobytes() + bytes([mark]) * size

        dict.update(bpf["call_kinds"], {b"a": told(3, 30, 1), b"b": told(4, 0, 2)})
        dict.update(bpf["counters"], {0: [12, 0], 1: [0, 0], 2: [0, 0], 3: [0, 0]})
        calls, blocks = probes.kinds()
        assert (calls.keys, calls.count.tolist()) == ([b"a", b"b"], [3, 4])
        assert calls.pages.tolist() == [30, 0]
        assert calls.examples.tolist() == [[1] * size, [2] * size]
        assert (blocks.keys, blocks.examples.shape) == ([], (0, size))
        probes.arm(False)
        bcc.events = [one_event()] * 4
        probes.poll(1)
        assert probes.drained() == Counters(12, 1, 0, 0)


def test_each_is_told_unless_they_are_counted(bcc: FakeBcc) -> None:
    with fake_probes():
        [bpf] = bcc.made
        assert "-DKINDS=0" in bpf.cflags
        assert "places" not in bpf.tables


def test_counters(bcc: FakeBcc, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_probes() as probes:
        bpf = bcc.made[0]
        # By CPU: made, lost, missed, unseen.
        dict.update(bpf["counters"], {0: [10, 5], 1: [1, 2], 2: [3, 0], 3: [0, 4]})
        tasks = [(0, 0), (1, 0), (2, 1), (2, 0)]
        dict.update(
            bpf["tasks"],
            {
                tid: SimpleNamespace(depth=depth, muted=muted)
                for tid, (depth, muted) in enumerate(tasks)
            },
        )
        assert probes.counters() == Counters(15, 3, 7, 2)
        probes.arm(False)
        bcc.events = [one_event()] * 12
        probes.poll(1)
        assert probes.drained() == Counters(15, 3, 7, 2)
        # What was made and not taken is lost, whoever lost it.
        bpf["counters"][ctypes.c_int(0)][0] = 40
        assert probes.drained() == Counters(45, 33, 7, 2)

        # The kernel does not run a program inside of itself, and counts it.
        read, write = os.pipe()
        bpf.funcs = {b"a": SimpleNamespace(fd=read), b"b": SimpleNamespace(fd=write)}
        assert probes.counters().missed == 7
        fdinfo = Path.read_text
        texts = {f"/proc/self/fdinfo/{read}": "pos:\t0\nrecursion_misses:\t6\nmemlock:\t4096\n"}
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "read_text",
                lambda path, **more: texts.get(str(path)) or fdinfo(path, **more),
            )
            assert probes.counters().missed == 13
        os.close(read)
        os.close(write)


def test_tasks_that_end_while_they_are_counted(bcc: FakeBcc) -> None:
    class Vanishing(Table):
        def __iter__(self) -> Iterator[int]:
            for tid in range(5000):
                # bcc asks for the key behind one that is gone, and gets the first again.
                yield tid % 10

        def __getitem__(self, key: Any) -> Any:
            if key == 3:
                return SimpleNamespace(depth=1, muted=0)
            raise KeyError

    with fake_probes() as probes:
        bpf = bcc.made[0]
        dict.update(bpf["counters"], {i: [0] for i in range(4)})
        bpf.tables["tasks"] = Vanishing(bcc, "tasks")
        bpf.tables["tasks"].max_entries = 20
        assert probes.counters().open == 2


# Symbols


def batch(*stacks: tuple[int, int]) -> Batch:
    calls = Calls.concatenate([call_of("kho_preserve_pages")] * len(stacks))
    return Batch(replace(calls, stack=np.array(stacks, np.uint64)), Touches.empty())


def test_symbols(bcc: FakeBcc) -> None:
    bcc.symbols = {
        1: (b"init", 0x1F, b"/lib/modules/7.2.0/a_client"),
        2: (b"kho_preserve_pages", 0, b"kernel"),
        3: (None, 5, b"a_client"),
    }
    with fake_probes() as probes:
        probes.learn(Batch(Calls.empty(), Touches.empty()))
        assert (bcc.caches, probes.symbols) == (0, {})
        probes.learn(batch((1, 2), (1, 0)))
        assert probes.symbols == {1: "init+0x1f [a_client]", 2: "kho_preserve_pages+0x0 [kernel]"}
        bcc.symbols.clear()
        # What is known is not asked for again: its module may be gone.
        probes.learn(batch((2, 1), (3, 4)))
        assert probes.symbol(1) == "init+0x1f [a_client]"
        assert [probes.symbol(address) for address in (3, 4, 99)] == ["[unknown]"] * 3
        assert bcc.caches == 1
        host_files.LOADED_MODULES.write_text("another_client 16384 0 - Live 0xffffffffc0000000\n")
        address = 0xFFFFFFFFC0000005
        bcc.symbols = {address: (b"probe", 2, b"another_client")}
        probes.learn(batch((address, 0)))
        assert (probes.symbol(address), bcc.caches) == ("probe+0x2 [another_client]", 2)
        assert bcc.held == 1
    assert bcc.held == 0


def test_modules_that_come_and_go(bcc: FakeBcc) -> None:
    """An address keeps its name when its module goes, until another one is loaded there."""

    def load(*names: str) -> None:
        lines = (f"{name} 8192 0 - Live {0xC0000000:#x} (O)\n" for name in names)
        host_files.LOADED_MODULES.write_text("".join(lines))

    call, next_to, kernel = 0xC0001000, 0xC0001001, 0x1000
    with fake_probes() as probes:
        for number in range(20):
            name = f"client{number}"
            load(name)
            bcc.symbols = {call: (b"probe", 0x10, name.encode()), kernel: (b"work", 1, b"kernel")}
            probes.learn(batch((call, kernel)))
            assert probes.symbol(call) == f"probe+0x10 [{name}]"
            # Gone: bcc would name whatever is before it.
            load()
            bcc.symbols = {call: (b"end", 0xABC0000, b"kernel")}
            bcc.symbols[next_to] = (b"end", 0xABC0001, b"kernel")
            probes.learn(batch((call, next_to)))
            assert probes.symbol(call) == f"probe+0x10 [{name}]"
            assert probes.symbol(next_to) == "[unknown]"
        assert probes.symbol(kernel) == "work+0x1 [kernel]"
        assert len(probes.symbols) == 3
        assert bcc.held == 1
        # Nor is it that of a module that is loaded elsewhere.
        load("other")
        bcc.symbols = {0xD0000000: (b"last", 0x8000, b"other")}
        probes.learn(batch((0xD0000000, 0)))
        assert probes.symbol(0xD0000000) == "[unknown]"


def test_every_function_has_its_number() -> None:
    assert [NUMBERS[function.name] for function in FUNCTIONS] == list(range(len(FUNCTIONS)))
