# SPDX-License-Identifier: LGPL-2.1-or-later
"""
BTF as drgn's types: every kind, split BTF, names, variables; and BTF that is none.

That real kernels' BTF says what their DWARF does is in tests/vm/test_btf.py.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from drgn import (
    Architecture,
    BadDataError,
    FaultError,
    MissingDebugInfoError,
    Platform,
    Program,
    Qualifiers,
    Symbol,
    SymbolBinding,
    SymbolIndex,
    SymbolKind,
    Type,
    TypeKind,
    TypeKindSet,
    offsetof,
    sizeof,
)
from hypothesis import given
from hypothesis import strategies as st

from khoscope.sources import btf
from khoscope.sources.btf import Btf, BtfError
from tests.btf_writer import (
    ARRAY,
    BOOL,
    CONST,
    DATASEC,
    DECL_TAG,
    FLOAT,
    FWD,
    PTR,
    RESTRICT,
    SIGNED,
    STRUCT,
    TYPE_TAG,
    TYPEDEF,
    UNION,
    VAR,
    VOLATILE,
    Writer,
)
from tests.fuzz import fuzz

TEXT = 0xFFFFFFFF81000000
VMCOREINFO = """\
OSRELEASE=7.2.0
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffff82000000
OFFSET(uts_namespace.name)=0
SYMBOL(swapper_pg_dir)=ffffffff82010000
SYMBOL(_stext)=ffffffff81000000
NUMBER(phys_base)=0
NUMBER(pgtable_l5_enabled)=0
KERNELOFFSET=0
"""


def program(data: bytes, symbols: dict[str, int] | None = None) -> Program:
    """A program with these types, and symbols, as `register()` leaves one."""
    prog = Program(Platform(Architecture.X86_64))
    finder = btf._Finder(btf._Types(prog, Btf(data)), None)
    prog.register_type_finder("btf", finder.type, enable_index=0)
    prog.register_object_finder("btf", finder.object, enable_index=0)
    known = [
        Symbol(name, address, 8, SymbolBinding.GLOBAL, SymbolKind.FUNC)
        for name, address in (symbols or {}).items()
    ]
    prog.register_symbol_finder("kallsyms", SymbolIndex(known), enable_index=0)
    return prog


def every_kind() -> Writer:
    """A type of each kind, wide enough to be a kernel's."""
    w = Writer()
    char = w.integer("char", 1)
    integer = w.integer("int", 4, SIGNED)
    boolean = w.integer("_Bool", 1, BOOL)
    u64 = w.integer("long unsigned int", 8)
    w.add(FLOAT, "double", 8)
    link = w.next
    w.add(PTR, "", link + 1)
    head = w.struct("list_head", 16, [("next", link, 0), ("prev", link, 64)])
    inner = w.struct("", 8, [("low", integer, 0), ("high", integer, 32)])
    union = w.struct("", 8, [("whole", u64, 0), ("", inner, 0)], UNION)
    volatile = w.add(VOLATILE, "", integer)
    tag = w.add(TYPE_TAG, "rcu", head)
    tagged = w.add(PTR, "", tag)
    name = w.array(char, 12)
    flexible = w.array(integer, 0)
    w.struct(
        "thing",
        56,
        [
            ("name", name, 0),
            ("flag", boolean, 96),
            ("", union, 128),
            ("state", volatile, 192),
            ("none", flexible, 224),
            ("list", tagged, 256),
            ("rest", flexible, 448),
        ],
    )
    w.struct("bits", 4, [("a", integer, 3 << 24), ("b", integer, 5 << 24 | 3)], flag=True)
    old = w.integer("unsigned int", 4, bits=7, at=2)
    w.struct("old_bits", 4, [("c", old, 8)])
    w.enum("colour", {"RED": 0, "GREEN": 7})
    w.enum("sign", {"MINUS": -1, "PLUS": 1}, signed=True)
    w.enum("wide", {"ALL": 2**64 - 1, "ONE": 1}, 8, wide=True)
    w.enum("deep", {"LOW": -(2**63)}, 8, signed=True, wide=True)
    w.enum("", {"LOOSE": 42})
    w.enum("later", {})
    w.add(FWD, "opaque")
    w.add(FWD, "either", flag=True)
    w.add(FWD, "thing")
    const = w.add(CONST, "", char)
    string = w.add(PTR, "", const)
    restrict = w.add(RESTRICT, "", string)
    w.add(TYPEDEF, "text_t", restrict)
    w.add(TYPEDEF, "u64", u64)
    w.function("show", integer, [("format", string), ("", 0)])
    variable = w.add(VAR, "per_cpu_thing", integer, [1])
    w.add(DATASEC, ".data..percpu", 4, [variable, 0, 4], 1)
    w.add(DECL_TAG, "kfunc", variable, [0xFFFFFFFF])
    w.add(PTR)
    return w


def members(type_: Type) -> list[tuple[Any, ...]]:
    return [
        (m.name, m.bit_offset, m.bit_field_size, m.type.type_name()) for m in type_.members or ()
    ]


def test_every_kind() -> None:
    prog = program(every_kind().data(), {"show": TEXT, "per_cpu_thing": 0x1000})
    thing = prog.type("struct thing")
    assert sizeof(thing) == 56
    assert members(thing)[:2] == [
        ("name", 0, None, "char [12]"),
        ("flag", 96, None, "_Bool"),
    ]
    assert members(thing)[3:] == [
        ("state", 192, None, "volatile int"),
        ("none", 224, None, "int [0]"),
        ("list", 256, None, "struct list_head *"),
        ("rest", 448, None, "int []"),
    ]
    # What is in members without a name is found as C finds it.
    assert offsetof(thing, "high") == 20
    assert offsetof(thing, "whole") == 16
    assert prog.type("struct list_head *").type.member("next").type.type.tag == "list_head"
    assert members(prog.type("struct bits")) == [("a", 0, 3, "int"), ("b", 3, 5, "int")]
    assert members(prog.type("struct old_bits")) == [("c", 10, 7, "unsigned int")]
    assert prog.type("long").kind == TypeKind.INT
    assert sizeof(prog.type("double")) == 8
    assert prog.type("_Bool").kind == TypeKind.BOOL
    text = prog.type("text_t").type
    assert text.qualifiers == Qualifiers.RESTRICT
    assert text.type.qualifiers == Qualifiers.CONST
    assert prog.type("u64").type.type_name() == "unsigned long"
    show = prog.function("show")
    assert show.address_ == TEXT
    assert show.type_.type_name() == "int (const char *format, ...)"
    assert prog["per_cpu_thing"].type_.type_name() == "int"


def test_enums_and_their_constants() -> None:
    prog = program(every_kind().data())
    assert [tuple(e) for e in prog.type("enum colour").enumerators or ()] == [
        ("RED", 0),
        ("GREEN", 7),
    ]
    values = {"GREEN": 7, "MINUS": -1, "ALL": 2**64 - 1, "LOW": -(2**63), "LOOSE": 42}
    assert {name: prog[name].value_() for name in values} == values
    assert prog["GREEN"].type_.type_name() == "enum colour"
    assert not prog.type("enum later").is_complete()
    with pytest.raises(LookupError):
        prog["PURPLE"]


def test_forward_declarations() -> None:
    w = every_kind()
    data = w.data()
    prog = program(data)
    assert not prog.type("struct opaque").is_complete()
    assert not prog.type("union either").is_complete()
    # One whose definition is there is that.
    types = btf._Types(prog, Btf(data))
    (forward,) = types.btf.named("thing", {FWD})
    assert types.of(forward).is_complete()
    with pytest.raises(LookupError):
        prog.type("struct either")


def test_a_name_at_the_end_of_another() -> None:
    """Whoever writes BTF may let strings share their ends."""
    w = Writer()
    w.integer("int", 4, SIGNED)
    w.struct("super_block", 4, [("first", 1, 0)])
    end = w.string("super_block") + len("super_")
    w.add(STRUCT, "", 8)
    w._types[-1] = struct.pack("<III", end, STRUCT << 24, 8)
    prog = program(w.data())
    assert sizeof(prog.type("struct block")) == 8
    assert sizeof(prog.type("struct super_block")) == 4


def test_variables_by_symbol_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    w = every_kind()
    number = w.integer("unsigned long long", 8)
    w.struct("", 16, [("enabled", 3, 0), ("liveupdate_num", number, 64)])
    w.struct("", 16, [("enabled", 3, 0), ("other", number, 64)])
    monkeypatch.setitem(btf.VARIABLES, "one_thing", "struct thing")
    monkeypatch.setitem(btf.VARIABLES, "gone", "struct not_in_this_kernel")
    prog = program(
        w.data(), {"one_thing": 0x1000, "gone": 0x2000, "luo_global": 0x3000, "init_mm": 0x4000}
    )
    assert prog["one_thing"].address_ == 0x1000
    assert prog["one_thing"].type_.type_name() == "struct thing"
    assert [m.name for m in prog["luo_global"].type_.members or ()] == ["enabled", "liveupdate_num"]
    for name in ("gone", "init_mm", "kho_out", "show"):
        with pytest.raises(LookupError):
            prog[name]
    assert "kho_out" not in prog


def test_a_static_name_twice_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(btf.VARIABLES, "one_thing", "struct thing")
    prog = program(every_kind().data())
    twice = [
        Symbol("one_thing", address, 8, SymbolBinding.LOCAL, SymbolKind.OBJECT)
        for address in (0x1000, 0x2000)
    ]
    prog.register_symbol_finder("twice", SymbolIndex(twice), enable_index=0)
    with pytest.raises(LookupError):
        prog["one_thing"]


def test_split_btf(tmp_path: Path) -> None:
    """A module's BTF goes on where the kernel's ends; it is read when a name asks for it."""
    base = every_kind()
    split = Writer(base.next, base.end_string)
    (thing,) = Btf(base.data()).named("thing", {STRUCT})
    split.struct("of_module", 64, [("thing", thing, 0), ("next", base.next + 1, 448)])
    split.add(PTR, "", base.next)
    split.enum("", {"OF_MODULE": 3})
    # Names that the kernel's strings have: of something else, and of what it has only declared.
    split._types.append(struct.pack("<III", base.string("colour"), STRUCT << 24, 1))
    split._types.append(struct.pack("<III", base.string("opaque"), STRUCT << 24, 2))
    (tmp_path / "vmlinux").write_bytes(base.data())
    (tmp_path / "module").write_bytes(split.data())
    (tmp_path / "broken").write_bytes(b"of_nothing\0")
    prog = Program(Platform(Architecture.X86_64))
    kernel = btf._Types(prog, Btf(base.data()))
    modules = btf._Modules(prog, kernel, tmp_path)
    finder = btf._Finder(kernel, modules)
    prog.register_type_finder("btf", finder.type, enable_index=0)
    prog.register_object_finder("btf", finder.object, enable_index=0)
    assert sizeof(prog.type("struct thing")) == 56
    assert modules._read == {}
    found = prog.type("struct of_module")
    assert members(found) == [
        ("thing", 0, None, "struct thing"),
        ("next", 448, None, "struct of_module *"),
    ]
    assert prog["OF_MODULE"].value_() == 3
    assert sizeof(prog.type("struct colour")) == 1
    assert sizeof(prog.type("struct opaque")) == 2
    # Of a broken module only those hear who ask for what is in it.
    with pytest.raises(LookupError):
        prog.type("struct nowhere")
    with pytest.raises(BtfError):
        prog.type("struct of_nothing")


def test_modules_that_come_and_go(tmp_path: Path) -> None:
    """One that is loaded later is found, even by those who have asked; and so is its next build."""
    base = every_kind()
    prog = Program(Platform(Architecture.X86_64))
    kernel = btf._Types(prog, Btf(base.data()))
    finder = btf._Finder(kernel, btf._Modules(prog, kernel, tmp_path))
    prog.register_type_finder("btf", finder.type, enable_index=0)
    with pytest.raises(LookupError):
        prog.type("struct late")
    for size, when in ((4, 1), (8, 2)):
        late = Writer(base.next, base.end_string)
        late.struct("late", size, [("a", 2, 0)])
        (tmp_path / "late").write_bytes(late.data())
        os.utime(tmp_path / "late", (when, when))
        # What a program knows already it keeps: finders are asked by others.
        found = finder.type(prog, TypeKindSet([TypeKind.STRUCT]), "late", None)
        assert found is not None
        assert sizeof(found) == size


# What is wrong


def refused(data: bytes, *said: str) -> None:
    with pytest.raises(BtfError) as error:
        Btf(data)
    for words in said:
        assert words in str(error.value)


def test_what_is_no_btf() -> None:
    data = every_kind().data()
    refused(b"", "cut short")
    refused(data[:20], "cut short")
    refused(data[:-1], "cut short")
    refused(b"\x7fELF" + bytes(60), "not BTF", "7f 45 4c 46")
    refused(b"\xeb\x9f" + data[2:], "other byte order")
    refused(data[:2] + b"\2" + data[3:], "version 2")
    refused(data[:4] + struct.pack("<I", 8) + data[8:], "header of 8 bytes")
    refused(data[:4] + struct.pack("<I", 1 << 31) + data[8:], "cut short")
    refused(data[:-1] + b"x", "strings")


def test_types_that_are_cut_short() -> None:
    w = Writer()
    w.integer("int", 4)
    w.add(STRUCT, "thing", 4, [0, 1], 1)
    refused(w.data(), "cut short", "type 2")
    w = Writer()
    w._types.append(b"\0" * 6)
    refused(w.data(), "aligned")


def test_kinds_of_which_nothing_is_known() -> None:
    w = Writer()
    w.integer("int", 4)
    w.add(77, "new", 0, [1, 2, 3], 1)
    w.struct("after", 4, [("a", 1, 0)])
    refused(w.data(), "type 2", "kind 77")
    # Unless the BTF describes them: one word of its own, and two for each element.
    layout = bytes(77 * 4) + bytes([4, 8, 0, 0])
    prog = program(w.data(layout))
    assert sizeof(prog.type("struct after")) == 4


def test_ids_and_names_out_of_range() -> None:
    w = Writer()
    w.struct("thing", 8, [("a", 99, 0)])
    w.add(TYPEDEF, "lost_t", 77)
    prog = program(w.data())
    with pytest.raises(BtfError, match="no type 99"):
        prog.type("struct thing").member("a").type  # noqa: B018
    with pytest.raises(BtfError, match="no type 77"):
        prog.type("lost_t")
    w = Writer()
    w.integer("int", 4)
    w.add(STRUCT, "thing", 4, [9999, 1, 0], 1)
    with pytest.raises(BtfError, match="no string at 9999"):
        program(w.data()).type("struct thing")


def test_loops() -> None:
    w = Writer()
    w.add(TYPEDEF, "a_t", 2)
    w.add(TYPEDEF, "b_t", 1)
    w.add(PTR, "", 3)
    w.add(TYPEDEF, "c_t", 3)
    w.add(ARRAY, "", 0, [5, 5, 2])
    w.add(TYPEDEF, "d_t", 5)
    prog = program(w.data())
    for name in ("a_t", "b_t", "c_t", "d_t"):
        with pytest.raises(BtfError, match="without an end"):
            prog.type(name)
    w = Writer()
    w.struct("within", 8, [("", 2, 0)])
    w.struct("", 8, [("", 1, 0), ("a", 1, 0)])
    with pytest.raises(BtfError, match="without an end"):
        program(w.data()).type("struct within")


def test_more_members_than_memory() -> None:
    """Each structure has the one before it twice, without a name."""
    w = Writer()
    w.integer("int", 4)
    w.struct("s", 4, [("a", 1, 0), ("b", 1, 0)])
    for _ in range(40):
        w.struct("s", 4, [("", w.next - 1, 0), ("", w.next - 1, 0)])
    types = btf._Types(Program(Platform(Architecture.X86_64)), Btf(w.data()))
    with pytest.raises(BtfError, match="more members"):
        types.of(w.next - 1)


def test_where_a_type_should_be() -> None:
    w = Writer()
    w.integer("int", 4)
    w.add(DATASEC, "data", 0)
    w.add(TYPEDEF, "data_t", 2)
    w.add(STRUCT, "ok", 0)
    prog = program(w.data())
    with pytest.raises(BtfError, match="kind 15"):
        prog.type("data_t")
    assert sizeof(prog.type("struct ok")) == 0
    w = Writer()
    w.enum("odd", {"A": 1}, 3)
    with pytest.raises(BtfError, match="3 bytes"):
        program(w.data()).type("enum odd")


def look_at_everything(data: bytes) -> None:
    """Ask for all that there is, as drgn would."""
    prog = Program(Platform(Architecture.X86_64))
    try:
        blob = Btf(data)
    except BtfError:
        return
    types = btf._Types(prog, blob)
    for number in range(1, blob._end_id):
        try:
            type_ = types.of(number)
            for member in (type_.members or ()) if hasattr(type_, "members") else ():
                sizeof(member.type)
        except (BtfError, TypeError):
            # TypeError: drgn knows no size of a type that is incomplete or a function.
            continue
    for name in ("thing", "int", "colour", ""):
        for kind in ("struct", "enum", ""):
            try:
                btf._Finder(types, None).type(prog, prog_kinds(kind), name, None)
            except BtfError:
                continue
    try:
        types.constant("GREEN")
        types.unnamed(["low", "high"])
    except BtfError:
        return


def prog_kinds(word: str) -> Any:
    from drgn import TypeKindSet

    kinds = {"struct": TypeKind.STRUCT, "enum": TypeKind.ENUM, "": TypeKind.INT}
    return TypeKindSet([kinds[word]])


@fuzz
@given(st.data())
def test_btf_that_was_written_over(data: st.DataObject) -> None:
    raw = bytearray(every_kind().data())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 0xFF, 0x80])))
    look_at_everything(bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))]))


WORDS = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))


@fuzz
@given(
    st.lists(
        st.tuples(
            st.integers(1, 19), WORDS, st.lists(WORDS, max_size=6), st.integers(0, 3), st.booleans()
        ),
        max_size=12,
    )
)
def test_types_at_random(types: list[tuple[int, int, list[int], int, bool]]) -> None:
    """Types that hang together in any way, each as long as it says to be."""
    w = Writer()
    w.integer("int", 4)
    w.string("thing")
    for kind, value, more, count, flag in types:
        extra = {1: 1, 3: 3, 14: 1, 17: 1}.get(kind, 0)
        element = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}.get(kind, 0)
        words = (more * 12)[: extra + element * count] if more else [0] * (extra + element * count)
        w.add(kind, "thing" if flag else "", value, words, count, flag)
    look_at_everything(w.data())


# register()


def live_program(symbols: dict[str, int], memory: dict[int, bytes]) -> Program:
    prog = Program(Platform(Architecture.X86_64))
    prog.set_linux_kernel_custom(VMCOREINFO, True)
    for start, data in memory.items():
        prog.add_memory_segment(
            start,
            len(data),
            lambda address, count, _, __, d=data, s=start: d[address - s :][:count],
        )
    return prog


def kallsyms(monkeypatch: pytest.MonkeyPatch, symbols: dict[str, int]) -> None:
    known = [
        Symbol(name, address, 8, SymbolBinding.GLOBAL, SymbolKind.FUNC)
        for name, address in symbols.items()
    ]
    monkeypatch.setattr(btf, "load_vmlinux_kallsyms", lambda prog: SymbolIndex(known))


def test_symbols_are_read_by_pages() -> None:
    """Each page once, whatever is asked for; what is not there is not there."""
    prog = Program(Platform(Architecture.X86_64))
    prog.set_linux_kernel_custom(VMCOREINFO, True)
    data = bytes(range(256)) * 32
    reads = []

    def read(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        reads.append((address - TEXT, count))
        return data[address - TEXT :][:count]

    prog.add_memory_segment(TEXT, len(data), read)
    copy = btf._by_pages(prog)
    assert [copy.read(TEXT + at, 1)[0] for at in (0, 1, 4095, 5000)] == [0, 1, 255, 5000 % 256]
    assert reads == [(0, 4096), (4096, 4096)]
    assert copy.read(TEXT + 100, 6000) == data[100:6100]
    assert copy["VMCOREINFO"].string_().decode() == VMCOREINFO
    with pytest.raises(FaultError):
        copy.read(TEXT + len(data), 1)


def test_register_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = every_kind().data()
    start = TEXT + 0x1000
    symbols = {"_stext": TEXT, "__start_BTF": start, "__stop_BTF": start + len(data)}
    kallsyms(monkeypatch, symbols)
    prog = live_program(symbols, {start: data})
    assert btf.register(prog) == ("khoscope", "the kernel's memory")
    assert btf.register(prog) == ("khoscope", "the kernel's memory")
    assert sizeof(prog.type("struct thing")) == 56


def test_register_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    kallsyms(monkeypatch, {"_stext": TEXT})
    prog = live_program({}, {})
    assert btf.register(prog, every_kind().data()) == ("khoscope", "given")
    assert sizeof(prog.type("struct thing")) == 56


def test_register_on_a_drgn_that_reads_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As osandov/drgn pull request 625 would have it: types are drgn's, variables ours."""
    given_to_drgn = []

    class Main:
        def load_btf(self, data: bytes) -> None:
            given_to_drgn.append(data)

    class Its:
        """A program with a main module that has the method."""

        def __init__(self, prog: Program) -> None:
            self._prog = prog

        def main_module(self) -> Main:
            return Main()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._prog, name)

        def __getitem__(self, name: str) -> Any:
            return self._prog[name]

    kallsyms(monkeypatch, {"_stext": TEXT})
    monkeypatch.setattr(btf, "Module", Main)
    prog = live_program({}, {})
    data = every_kind().data()
    assert btf.register(Its(prog), data) == ("drgn", "given")
    assert given_to_drgn == [data]
    assert btf.NAME not in prog.registered_type_finders()
    assert btf.NAME in prog.registered_object_finders()


@pytest.mark.parametrize(
    ("symbols", "memory", "said"),
    [
        ({}, {}, "no addresses"),
        ({"_stext": 0}, {}, "no addresses"),
        ({"_stext": TEXT}, {}, "has no BTF"),
        ({"_stext": TEXT, "__start_BTF": TEXT, "__stop_BTF": TEXT + 64}, {}, "cannot be read"),
        ({"_stext": TEXT, "__start_BTF": TEXT + 64, "__stop_BTF": TEXT}, {}, "cannot be read"),
        (
            {"_stext": TEXT, "__start_BTF": TEXT, "__stop_BTF": TEXT + 64},
            {TEXT: bytes(64)},
            "not BTF",
        ),
    ],
)
def test_register_finds_nothing(
    symbols: dict[str, int],
    memory: dict[int, bytes],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kallsyms(monkeypatch, symbols)
    with pytest.raises(BtfError, match=said):
        btf.register(live_program(symbols, memory))


@pytest.mark.parametrize(
    "error",
    [
        FaultError("no memory", 0),
        MissingDebugInfoError("not in VMCOREINFO"),
        BadDataError("corrupt"),
        FileNotFoundError("/proc/kallsyms"),
        TimeoutError(),
        OverflowError(),
        MemoryError(),
        # As drgn says that QEMU has hung up.
        Exception("end of file"),
    ],
)
def test_register_without_kallsyms(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(prog: Program) -> SymbolIndex:
        raise error

    monkeypatch.setattr(btf, "load_vmlinux_kallsyms", fails)
    with pytest.raises(BtfError, match="symbols cannot be read"):
        btf.register(live_program({}, {}))


def test_register_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has failed has left nothing behind, and a bug of ours is not hidden."""
    kallsyms(monkeypatch, {"_stext": TEXT})
    prog = live_program({}, {})
    with pytest.raises(BtfError, match="has no BTF"):
        btf.register(prog)
    assert btf.register(prog, every_kind().data()) == ("khoscope", "given")
    monkeypatch.setattr(btf, "load_vmlinux_kallsyms", lambda: None)
    with pytest.raises(TypeError):
        btf.register(live_program({}, {}))


def test_many_strings_that_end_in_a_name() -> None:
    """As many as a blob has are found in no time, and those that stand in the base only once."""
    writer = Writer()
    writer.string("a")
    blob = bytearray(writer.data())
    data = bytes(blob) + b"a\0" * 200_000
    (length,) = struct.unpack_from("<I", data, 20)
    data = data[:20] + struct.pack("<I", length + 400_000) + data[24:]
    assert len(Btf(data).offsets("a")) == 200_001
