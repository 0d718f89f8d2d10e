# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Types, objects and symbols for drgn from a kernel's BTF and kallsyms, where there is no DWARF.

After :func:`register`, ``prog.type("struct page")``, ``prog["kho_out"]``, ``prog["PG_head"]`` and
``prog.symbol("kho_preserve_pages")`` are answered from what every kernel with
``CONFIG_DEBUG_INFO_BTF`` and ``CONFIG_KALLSYMS_ALL`` carries with it:

>>> from drgn import Program
>>> from khoscope import btf
>>> prog = Program()
>>> prog.set_kernel()
>>> btf.register(prog)
('khoscope', '/sys/kernel/btf/vmlinux')
>>> prog["kho_out"].radix_tree.root
(struct kho_radix_node *)0xffff8e0d81234000

Of the global variables, BTF names only per-CPU ones.  :data:`VARIABLES` has the types of the others
that drgn's helpers and khoscope ask for.  BTF has no macros and no source files, and its arrays of
arrays are flat: ``x[4][8]`` is ``x[32]``.

This module is for versions of drgn that cannot read BTF.  It stands alone: it imports no other
module of khoscope.
Kernel sources: ``Documentation/bpf/btf.rst``, ``include/uapi/linux/btf.h``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import numpy as np
from drgn import (
    BadDataError,
    FaultError,
    FindObjectFlags,
    MissingDebugInfoError,
    Module,
    Object,
    Program,
    ProgramFlags,
    Qualifiers,
    SymbolIndex,
    Type,
    TypeEnumerator,
    TypeKind,
    TypeKindSet,
    TypeMember,
    TypeParameter,
)
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms
from numpy.typing import NDArray

__all__ = ("NAME", "VARIABLES", "Btf", "BtfError", "SymbolsHidden", "register")

#: Name of the registered finders, and key in ``Program.cache`` of what :func:`register` returned.
NAME: Final = "khoscope_btf"

#: Where a running kernel shows its BTF, ``vmlinux`` and one file for each module.
SYSFS: Final = Path("/sys/kernel/btf")

#: The C types of variables, by their name.  Callers may add what is missing here.
VARIABLES: dict[str, str] = {
    # KHO, LUO, kexec
    "kho_enable": "_Bool",
    "kho_in": "struct kho_in",
    "kho_out": "struct kho_out",
    "kho_scratch": "struct kho_scratch *",
    "kho_scratch_cnt": "unsigned int",
    "kexec_crash_image": "struct kimage *",
    "kexec_image": "struct kimage *",
    "luo_dev": "struct luo_device_state",
    "luo_file_handler_list": "struct list_head",
    "luo_flb_global": "struct luo_flb_global",
    "luo_fops": "struct file_operations",
    "luo_session_fops": "struct file_operations",
    "shmem_file_operations": "struct file_operations",
    "luo_session_global": "struct luo_session_global",
    # Memory
    "contig_page_data": "struct pglist_data",
    "high_memory": "void *",
    "init_mm": "struct mm_struct",
    "iomem_resource": "struct resource",
    "max_low_pfn": "unsigned long",
    "max_pfn": "unsigned long",
    "mem_section": "struct mem_section **",
    "min_low_pfn": "unsigned long",
    "node_data": "struct pglist_data *[]",
    "node_states": "nodemask_t []",
    "nr_node_ids": "unsigned int",
    "page_offset_base": "unsigned long",
    "slab_caches": "struct list_head",
    "totalcma_pages": "unsigned long",
    "vm_node_stat": "atomic_long_t []",
    "vmalloc_base": "unsigned long",
    "vmemmap_base": "unsigned long",
    "_totalram_pages": "atomic_long_t",
    # vmalloc: vmap_nodes since 6.9, a list and a tree before
    "nr_vmap_nodes": "unsigned int",
    "vmap_area_list": "struct list_head",
    "vmap_area_root": "struct rb_root",
    "vmap_nodes": "struct vmap_node *",
    # arm64
    "kimage_voffset": "u64",
    "memstart_addr": "s64",
    "vabits_actual": "u64",
    # The rest
    "__cpu_online_mask": "struct cpumask",
    "__per_cpu_offset": "unsigned long []",
    "init_net": "struct net",
    "init_pid_ns": "struct pid_namespace",
    "init_task": "struct task_struct",
    "init_uts_ns": "struct uts_namespace",
    "modules": "struct list_head",
    "prb": "struct printk_ringbuffer *",
    "saved_command_line": "char *",
    "sysctl_bootid": "u8 [16]",
    "tainted_mask": "unsigned long",
    # The clocks: timekeeper_data since 6.17
    "timekeeper_data": "struct tk_data []",
    "tk_core": "struct tk_data",
}

#: Variables whose structure has no name, and the members that identify it.
UNNAMED: dict[str, tuple[str, ...]] = {
    "luo_global": ("enabled", "liveupdate_num"),
}

_MAGIC: Final = 0xEB9F
_HEADER: Final = np.dtype(
    [("magic", "<u2"), ("version", "u1"), ("flags", "u1")]
    + [(name, "<u4") for name in ("hdr_len", "type_off", "type_len", "str_off", "str_len")]
)
#: Since 7.1: the sizes of kinds, for readers that do not know them (``struct btf_layout``).
_LAYOUT: Final = np.dtype([("info_sz", "u1"), ("elem_sz", "u1"), ("flags", "<u2")])

# BTF_KIND_*
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF = range(1, 9)
_VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO, _VAR, _DATASEC = range(9, 16)
_FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = range(16, 20)
_KINDS: Final = 128

#: Words that follow a ``struct btf_type`` (three words), and words of each of its vlen elements.
_EXTRA: Final = {_INT: 1, _ARRAY: 3, _VAR: 1, _DECL_TAG: 1}
_ELEMENT: Final = {_STRUCT: 3, _UNION: 3, _ENUM: 2, _FUNC_PROTO: 2, _DATASEC: 3, _ENUM64: 3}

#: Kinds that wrap one other type, and drgn's names for those that qualify it.
_QUALIFIERS: Final = {
    _CONST: Qualifiers.CONST,
    _VOLATILE: Qualifiers.VOLATILE,
    _RESTRICT: Qualifiers.RESTRICT,
}
_WRAPPERS: Final = {*_QUALIFIERS, _PTR, _ARRAY, _TYPEDEF, _FUNC, _FUNC_PROTO, _TYPE_TAG}

#: The kinds of BTF in which to find each kind of type that drgn looks for by name.
_NAMED: Final = {
    TypeKind.STRUCT: {_STRUCT},
    TypeKind.UNION: {_UNION},
    TypeKind.ENUM: {_ENUM, _ENUM64},
    TypeKind.TYPEDEF: {_TYPEDEF},
    TypeKind.INT: {_INT},
    TypeKind.BOOL: {_INT},
    TypeKind.FLOAT: {_FLOAT},
}

#: A deeper nesting of pointers to arrays of pointers …, or of unnamed members, than C code has.
_NESTING: Final = 64
#: More members, with those of unnamed members, than a structure has.
_MEMBERS: Final = 1 << 16
#: Where the addresses of 64-bit kernels begin, and the size of a page that is mapped as a whole.
_KERNEL: Final = 1 << 63
_PAGE: Final = 4096
#: How many names are remembered with their offsets.
_NAMES_KEPT: Final = 256

U32 = NDArray[np.uint32]
P = ParamSpec("P")
T = TypeVar("T")


class BtfError(ValueError):
    """BTF is missing, is not whole, or makes no sense."""


class SymbolsHidden(BtfError):
    """``kernel.kptr_restrict`` keeps the addresses in /proc/kallsyms even from root."""


@dataclass(frozen=True)
class _Record:
    """A ``struct btf_type``, and the words that follow it."""

    number: int
    name: str
    kind: int
    flag: bool
    #: ``size`` or ``type``.
    value: int
    #: Shape (extra,) or (vlen, words of an element).
    more: U32


class Btf:
    """
    The types of one BTF blob, as they stand there.

    Type ids are looked up in numpy columns; a type is built only when somebody asks for it.

    :param data: the content of a ``.BTF`` section.
    :param base: for split BTF, the BTF that it builds upon.
    :raises BtfError: if it is no BTF, or not whole.
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        self.base = base
        self._first_id: int = base._end_id if base else 1
        self._first_string: int = base._end_string if base else 0
        types, self._strings, sizes = _sections(data, base is None)
        self._words = np.frombuffer(types, "<u4")
        self._at = _records(self._words, *sizes)
        self._end_id: int = self._first_id + len(self._at)
        self._end_string: int = self._first_string + len(self._strings)
        self._name_off = self._words[self._at]
        self._info = self._words[self._at + 1]
        self._kind = (self._info >> np.uint32(24) & np.uint32(0x7F)).astype(np.uint8)
        self._known_offsets: dict[str, list[int]] = {}
        self._known_elements: dict[frozenset[int], tuple[NDArray[np.int64], U32]] = {}

    def owner(self, number: int) -> Btf:
        """The BTF that has the type of that id: this one, or the one it builds upon."""
        if number < self._first_id and self.base is not None:
            return self.base.owner(number)
        if not self._first_id <= number < self._end_id:
            raise BtfError(f"BTF has no type {number}")
        return self

    def record(self, number: int) -> _Record:
        """The type of an id that is this BTF's own."""
        row = number - self._first_id
        at, info, kind = int(self._at[row]), int(self._info[row]), int(self._kind[row])
        start, count = at + 3, info & 0xFFFFFF
        if kind in _ELEMENT:
            width = _ELEMENT[kind]
            more = self._words[start : start + width * count].reshape(count, width)
        else:
            more = self._words[start : start + _EXTRA.get(kind, 0)]
        name = self.string(int(self._name_off[row]))
        return _Record(number, name, kind, bool(info >> 31), int(self._words[at + 2]), more)

    def string(self, offset: int) -> str:
        """A string; names are ASCII."""
        if offset < self._first_string and self.base is not None:
            return self.base.string(offset)
        start = offset - self._first_string
        end = self._strings.find(b"\0", start) if 0 <= start < len(self._strings) else -1
        if end < 0:
            raise BtfError(f"BTF has no string at {offset}")
        return self._strings[start:end].decode("ascii", "backslashreplace")

    def named(self, name: str, kinds: Container[int]) -> list[int]:
        """The ids of this BTF's own types of that name."""
        order, names = self._by_name
        offsets = np.array(self.offsets(name), np.uint32)
        bounds = zip(
            np.searchsorted(names, offsets, "left").tolist(),
            np.searchsorted(names, offsets, "right").tolist(),
            strict=True,
        )
        rows = [row for low, high in bounds for row in order[low:high].tolist()]
        return sorted(row + self._first_id for row in rows if int(self._kind[row]) in kinds)

    @functools.cached_property
    def _by_name(self) -> tuple[NDArray[np.int64], U32]:
        """
        The rows of all types in the order of their ``name_off``, and each ``name_off`` in that
        order.
        """
        order = np.argsort(self._name_off, kind="stable")
        return order, self._name_off[order]

    def offsets(self, name: str) -> list[int]:
        """The offsets at which a name may be: as a whole string, or as the end of a longer one."""
        known = self._known_offsets.get(name)
        if known is None:
            known = self._find_offsets(name)
            if len(self._known_offsets) >= _NAMES_KEPT:
                self._known_offsets.clear()
            self._known_offsets[name] = known
        return known

    def _find_offsets(self, name: str) -> list[int]:
        found = list(self.base.offsets(name)) if self.base else []
        text = name.encode("ascii", "backslashreplace") + b"\0"
        at = self._strings.find(text)
        while at >= 0:
            found.append(at + self._first_string)
            at = self._strings.find(text, at + 1)
        return found

    def with_elements(self, kinds: Iterable[int], name: str) -> list[int]:
        """
        The ids of types of these kinds that have an element (member, enumerator) of that name.
        """
        owner, names = self._elements(frozenset(kinds))
        return np.unique(owner[np.isin(names, self.offsets(name))]).tolist()

    def _elements(self, kinds: frozenset[int]) -> tuple[NDArray[np.int64], U32]:
        """For each element of all types of these kinds: the type's id, and the ``name_off``."""
        if kinds not in self._known_elements:
            self._known_elements[kinds] = self._find_elements(kinds)
        return self._known_elements[kinds]

    def _find_elements(self, kinds: frozenset[int]) -> tuple[NDArray[np.int64], U32]:
        owners, names = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
        for kind in kinds:
            rows = np.flatnonzero(self._kind == kind)
            counts = (self._info[rows] & np.uint32(0xFFFFFF)).astype(np.int64)
            # The number of each element within its type.
            within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            at = np.repeat(self._at[rows] + 3, counts) + _ELEMENT[kind] * within
            owners.append(np.repeat(rows + self._first_id, counts))
            names.append(self._words[at])
        return np.concatenate(owners), np.concatenate(names)

    def unnamed_with(self, members: Iterable[str]) -> list[int]:
        """The ids of structures without a name that have all these members."""
        sets = [set(self.with_elements([_STRUCT], member)) for member in members]
        common = sorted(set.intersection(*sets))
        return [number for number in common if not self.record(number).name]


def _sections(
    data: bytes, whole: bool
) -> tuple[bytes, bytes, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The types, the strings, and by kind the numbers of extra words and of words per element."""
    if len(data) < _HEADER.itemsize:
        raise BtfError(f"BTF is cut short: {len(data)} bytes")
    header = np.frombuffer(data, _HEADER, 1)[0]
    if int(header["magic"]) == int.from_bytes(_MAGIC.to_bytes(2, "little"), "big"):
        raise BtfError("BTF of the other byte order")
    if int(header["magic"]) != _MAGIC:
        raise BtfError(f"not BTF: begins with {data[:4].hex(' ')}")
    if int(header["version"]) != 1:
        raise BtfError(f"BTF of version {int(header['version'])}, of which nothing is known")
    length = int(header["hdr_len"])
    if length < _HEADER.itemsize:
        raise BtfError(f"BTF with a header of {length} bytes")

    def section(what: str, offset: int, size: int) -> bytes:
        start = length + offset
        if start + size > len(data):
            raise BtfError(f"BTF is cut short: {what} end at {start + size} of {len(data)} bytes")
        return data[start : start + size]

    types = section("types", int(header["type_off"]), int(header["type_len"]))
    strings = section("strings", int(header["str_off"]), int(header["str_len"]))
    if len(types) % 4 or int(header["type_off"]) % 4:
        raise BtfError("BTF whose types are not aligned")
    if not strings.endswith(b"\0") or (whole and not strings.startswith(b"\0")):
        raise BtfError("BTF whose strings do not begin and end as they should")
    layout = b""
    if length >= _HEADER.itemsize + 8:
        offset, size = np.frombuffer(data, "<u4", 2, _HEADER.itemsize).tolist()
        layout = section("layouts", offset, size)
    return types, strings, _sizes(layout)


def _sizes(layout: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    By kind, the words that follow a ``struct btf_type``, and those of each element.

    Unknown kinds are negative, unless BTF describes its own kinds.
    """
    extra, element = np.full(_KINDS, -1), np.zeros(_KINDS, np.int64)
    described = np.frombuffer(layout[: len(layout) // 4 * 4], _LAYOUT)[:_KINDS]
    for kind, each in enumerate(described):
        if each["info_sz"] % 4 == 0 and each["elem_sz"] % 4 == 0:
            extra[kind], element[kind] = each["info_sz"] // 4, each["elem_sz"] // 4
    extra[1 : _ENUM64 + 1] = [_EXTRA.get(kind, 0) for kind in range(1, _ENUM64 + 1)]
    element[1 : _ENUM64 + 1] = [_ELEMENT.get(kind, 0) for kind in range(1, _ENUM64 + 1)]
    return extra, element


def _records(words: U32, extra: NDArray[np.int64], element: NDArray[np.int64]) -> NDArray[np.int64]:
    """
    The word at which each type begins.

    Each type says how long it is.  So, for every word, compute where the next type would begin if
    one began there; then follow that chain from the first word.
    """
    if len(words) < 3:
        return np.zeros(0, np.int64)
    info = words[1:-1]
    kind = info >> np.uint32(24) & np.uint32(0x7F)
    known = extra[kind]
    following = (info & np.uint32(0xFFFFFF)) * element[kind]
    following += 3 + known + np.arange(len(info))
    following[known < 0] = np.flatnonzero(known < 0)
    # The chain visits only some of the many words: do not make a list of them all.
    ahead = memoryview(following)
    starts: list[int] = []
    at, end = 0, len(words)
    while at < len(ahead):
        if ahead[at] == at:
            raise BtfError(f"type {len(starts) + 1} is of kind {int(kind[at])}, not known")
        starts.append(at)
        at = ahead[at]
    if at != end:
        raise BtfError(f"BTF is cut short: type {len(starts)} ends at word {at} of {end}")
    return np.array(starts, np.int64)


def _sound(make: Callable[P, T]) -> Callable[P, T]:
    """
    Turn drgn's refusal to make something (a type of no size, a shift too far) into a BtfError.
    """

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return make(*args, **kwargs)
        except BtfError:
            raise
        except (ValueError, OverflowError, TypeError) as error:
            raise BtfError(f"BTF makes no sense: {error}") from error

    return checked


class _Types:
    """drgn's types, each made from BTF when somebody first asks for it."""

    def __init__(self, prog: Program, btf: Btf, base: _Types | None = None) -> None:
        self._prog = prog
        self.btf = btf
        self._base = base
        self._made: dict[int, Type] = {}
        self._widths: dict[int, int] = {}

    @_sound
    def of(self, number: int) -> Type:
        """The type of an id."""
        chain: list[_Record] = []
        while (found := self._there(number)) is None:
            record = self._record(number)
            if record.kind not in _WRAPPERS:
                found = self._make(record)
                self._made[number] = found
                break
            chain.append(record)
            if len(chain) > _NESTING:
                raise BtfError(f"type {chain[0].number} leads from type to type without an end")
            number = int(record.more[0]) if record.kind == _ARRAY else record.value
        for record in reversed(chain):
            found = self._wrap(record, found)
            self._made[record.number] = found
        return found

    def _there(self, number: int) -> Type | None:
        if number == 0:
            return self._prog.void_type()
        if self.btf.owner(number) is not self.btf:
            assert self._base is not None
            return self._base.of(number)
        return self._made.get(number)

    def _record(self, number: int) -> _Record:
        return self.btf.owner(number).record(number)

    def _wrap(self, record: _Record, inner: Type) -> Type:
        prog = self._prog
        if record.kind == _PTR:
            return prog.pointer_type(inner)
        if record.kind == _TYPEDEF:
            return prog.typedef_type(record.name, inner)
        if record.kind == _ARRAY:
            count = int(record.more[2])
            # A flexible array of C has 0 elements in BTF, like an array that has 0 elements in C.
            return prog.array_type(inner, count) if count else prog.array_type(inner)
        if record.kind == _FUNC_PROTO:
            return self._function(record, inner)
        if record.kind in _QUALIFIERS:
            return inner.qualified(inner.qualifiers | _QUALIFIERS[record.kind])
        # A type tag means nothing in C; a function is its prototype.
        return inner

    def _function(self, record: _Record, returns: Type) -> Type:
        parameters = record.more.tolist()
        # A last parameter without name and type means that any others may follow.
        variadic = bool(parameters) and parameters[-1] == [0, 0]
        return self._prog.function_type(
            returns,
            [
                TypeParameter(self._lazily(number), self.btf.string(name) or None)
                for name, number in parameters[: len(parameters) - variadic]
            ],
            variadic,
        )

    def _make(self, record: _Record) -> Type:
        if record.kind == _INT:
            return self._int(record)
        if record.kind in (_STRUCT, _UNION):
            return self._structure(record)
        if record.kind in (_ENUM, _ENUM64):
            return self._enum(record)
        if record.kind == _FWD:
            return self._forward(record)
        if record.kind == _FLOAT:
            return self._prog.float_type(record.name, record.value)
        raise BtfError(f"type {record.number} of kind {record.kind} where a C type should be")

    def _int(self, record: _Record) -> Type:
        encoding = int(record.more[0]) >> 24 & 0xF
        if encoding & 4:
            return self._prog.bool_type(record.name, record.value)
        return self._prog.int_type(record.name, record.value, bool(encoding & 1))

    def _structure(self, record: _Record) -> Type:
        self._width(record.number, 0)
        count = len(record.more)
        members = [
            self._member(self.btf.string(name), number, offset, record.flag, row + 1 < count)
            for row, (name, number, offset) in enumerate(record.more.tolist())
        ]
        make = self._prog.struct_type if record.kind == _STRUCT else self._prog.union_type
        return make(record.name or None, record.value, members)

    def _member(
        self, name: str, number: int, offset: int, flag: bool, followed: bool
    ) -> TypeMember:
        bits = 0
        if flag:
            bits, offset = offset >> 24, offset & 0xFFFFFF
        elif number:
            # The older form of bit-fields: integers of that many bits.
            record = self._record(number)
            if record.kind == _INT:
                encoding = int(record.more[0])
                if encoding & 0xFF != 8 * record.value:
                    bits, offset = encoding & 0xFF, offset + (encoding >> 16 & 0xFF)
        return TypeMember(self._lazily(number, bits, followed), name or None, offset)

    def _lazily(self, number: int, bits: int = 0, followed: bool = False) -> Callable[[], Object]:
        return lambda: self._absent(number, bits, followed)

    @_sound
    def _absent(self, number: int, bits: int, followed: bool) -> Object:
        type_ = self.of(number)
        if followed and type_.kind == TypeKind.ARRAY and type_.length is None:
            # Only the last member can be a flexible array.
            type_ = self._prog.array_type(type_.type, 0)
        return Object(self._prog, type_, bit_field_size=bits or None)

    def _width(self, number: int, depth: int) -> int:
        """
        How many members a structure has, including those of unnamed members.

        drgn looks for a name in unnamed members, so their nesting must end.
        """
        if depth > _NESTING:
            raise BtfError(f"unnamed members of type {number} are in one another without an end")
        known = self._widths.get(number)
        if known is None:
            # An unnamed member is a structure, plain or qualified.
            record = self._record(number)
            if record.kind in {*_QUALIFIERS, _TYPE_TAG, _TYPEDEF}:
                return self._width(record.value, depth + 1)
            if record.kind not in (_STRUCT, _UNION):
                return 1
            string = self.btf.owner(number).string
            known = sum(
                1 if string(name) or not inner else self._width(inner, depth + 1)
                for name, inner, _ in record.more.tolist()
            )
            if known > _MEMBERS:
                raise BtfError(f"type {number} has more members than any structure")
            self._widths[number] = known
        return known

    def _enum(self, record: _Record) -> Type:
        name = record.name or None
        if not len(record.more):
            return self._prog.enum_type(name)
        names = [self.btf.string(offset) for offset in record.more[:, 0].tolist()]
        values = record.more[:, 1].astype(np.uint64)
        if record.kind == _ENUM64:
            values |= record.more[:, 2].astype(np.uint64) << np.uint64(32)
        elif record.flag:
            values = record.more[:, 1].astype(np.int32).astype(np.uint64)
        signed = values.astype(np.int64) if record.flag else values
        enumerators = map(TypeEnumerator, names, signed.tolist())
        return self._prog.enum_type(name, self._compatible(record), list(enumerators))

    def _compatible(self, record: _Record) -> Type:
        """The integer type of an enum, which BTF does not name."""
        kinds = {1: "char", 2: "short", 4: "int", 8: "long"}
        name = kinds.get(record.value)
        if name is None:
            raise BtfError(f"enum {record.name} of {record.value} bytes")
        prefix = "" if record.flag else "unsigned "
        return self._prog.int_type(prefix + name, record.value, record.flag)

    def _forward(self, record: _Record) -> Type:
        """The type that a forward declaration stands for, if it is here."""
        kind = _UNION if record.flag else _STRUCT
        found = self.btf.named(record.name, [kind])
        if len(found) == 1:
            return self.of(found[0])
        if not found and self._base is not None and self._base.btf.named(record.name, [kind]):
            return self._base.of(self._base.btf.named(record.name, [kind])[0])
        make = self._prog.union_type if record.flag else self._prog.struct_type
        return make(record.name)

    # -- by name ----------------------------------------------------------------------------------

    @_sound
    def named(self, kinds: TypeKindSet, name: str) -> Type | None:
        """A type of one of these kinds that is defined here."""
        wanted = [number for kind in kinds for number in self.btf.named(name, _NAMED.get(kind, ()))]
        return self._first_of(wanted, kinds)

    @_sound
    def forward(self, kinds: TypeKindSet, name: str) -> Type | None:
        """A type of one of these kinds that is only declared here."""
        return self._first_of(self.btf.named(name, [_FWD]), kinds)

    def _first_of(self, numbers: Iterable[int], kinds: TypeKindSet) -> Type | None:
        return next((type_ for type_ in map(self.of, numbers) if type_.kind in kinds), None)

    @_sound
    def constant(self, name: str) -> Object | None:
        """An enumerator."""
        for number in self.btf.with_elements([_ENUM, _ENUM64], name):
            enum = self.of(number)
            for enumerator in enum.enumerators or ():
                if enumerator.name == name:
                    return Object(self._prog, enum, enumerator.value)
        return None

    @_sound
    def declared(self, name: str, kind: int) -> Type | None:
        """The type of a function or a variable that BTF names."""
        found = self.btf.named(name, [kind])
        return self.of(self.btf.record(found[0]).value) if found else None

    @_sound
    def unnamed(self, members: Iterable[str]) -> Type | None:
        """The structure without a name that has these members, if there is just one."""
        found = self.btf.unnamed_with(members)
        return self.of(found[0]) if len(found) == 1 else None


@dataclass
class _Finder:
    """Answers drgn's questions for types and objects."""

    kernel: _Types
    modules: _Modules | None
    _absent: set[tuple[str, str]] = field(default_factory=set)

    def type(
        self, prog: Program, kinds: TypeKindSet, name: str, filename: str | None
    ) -> Type | None:
        # BTF does not know in which file anything is declared.
        if filename is not None:
            return None
        # A module may define a type that the kernel only declares.
        found = self._first(f"{kinds}", name, lambda types: types.named(kinds, name))
        return self.kernel.forward(kinds, name) if found is None else found

    def object(
        self, prog: Program, name: str, flags: FindObjectFlags, filename: str | None
    ) -> Object | None:
        if filename is not None:
            return None
        if flags & FindObjectFlags.CONSTANT:
            found = self._first("constant", name, lambda types: types.constant(name))
            if found is not None:
                return found
        if flags & FindObjectFlags.FUNCTION:
            address = _address(prog, name)
            type_ = None if address is None else self.kernel.declared(name, _FUNC)
            if type_ is not None:
                return Object(prog, type_, address=address)
        if flags & FindObjectFlags.VARIABLE:
            address = _address(prog, name)
            type_ = None if address is None else self._variable(prog, name)
            if type_ is not None:
                return Object(prog, type_, address=address)
        return None

    def _variable(self, prog: Program, name: str) -> Type | None:
        found = self.kernel.declared(name, _VAR)
        if found is None and name in UNNAMED:
            return self.kernel.unnamed(UNNAMED[name])
        if found is None and name in VARIABLES:
            try:
                return prog.type(VARIABLES[name])
            except LookupError:
                return None
        return found

    def _first(self, what: str, name: str, find: Callable[[_Types], T | None]) -> T | None:
        """
        The kernel's, or a module's.  If there is none, that is remembered until a module is loaded.
        """
        found = find(self.kernel)
        if found is not None or self.modules is None:
            return found
        if self.modules.look():
            self._absent.clear()
        if (what, name) not in self._absent:
            each = map(find, self.modules.with_name(name))
            found = next((one for one in each if one is not None), None)
            if found is None:
                self._absent.add((what, name))
        return found


def _address(prog: Program, name: str) -> int | None:
    """
    The address of a symbol; None: there is none, or several, as with static symbols.

    kallsyms does not tell what kind of symbol it is: some data are ``T``.
    """
    found = {symbol.address for symbol in prog.symbols(name)}
    return found.pop() if len(found) == 1 else None


class _Modules:
    """
    The split BTF of a running kernel's modules, read when somebody looks for a name that the kernel
    itself does not have.
    """

    def __init__(self, prog: Program, kernel: _Types, directory: Path) -> None:
        self._prog = prog
        self._kernel = kernel
        self._directory = directory
        #: By the module's name: which file it was, and what was in it.
        self._read: dict[str, tuple[tuple[int, int], bytes]] = {}
        self._types: dict[str, _Types] = {}

    def look(self) -> bool:
        """Read the modules that were loaded since the last look; say whether there were any."""
        changed = False
        for path in sorted(self._directory.glob("*")):
            if path.name == "vmlinux":
                continue
            try:
                status = path.stat()
                # A module that is loaded again is another file.
                which = status.st_ino, status.st_mtime_ns
                if path.name in self._read and self._read[path.name][0] == which:
                    continue
                self._read[path.name] = which, path.read_bytes()
            except FileNotFoundError:
                # The module has been unloaded.
                continue
            self._types.pop(path.name, None)
            changed = True
        return changed

    def with_name(self, name: str) -> Iterator[_Types]:
        """The types of the modules that may have the name."""
        wanted = name.encode("ascii", "backslashreplace") + b"\0"
        # Split BTF does not repeat the strings of the BTF that it builds upon.
        anywhere = bool(self._kernel.btf.offsets(name))
        for module, (_, data) in self._read.items():
            if wanted not in data and not anywhere:
                continue
            try:
                types = self._of(module, data)
            except BtfError:
                # Report a module's broken BTF only to lookups of that module's own names.
                if wanted in data:
                    raise
                continue
            yield types

    def _of(self, module: str, data: bytes) -> _Types:
        if module not in self._types:
            split = Btf(data, self._kernel.btf)
            self._types[module] = _Types(self._prog, split, self._kernel)
        return self._types[module]


@contextlib.contextmanager
def _unreadable(what: str) -> Iterator[None]:
    """Turn what drgn raises if it cannot read into a BtfError."""
    try:
        yield
    except BtfError:
        raise
    except Exception as error:
        # drgn raises a bare Exception when a QMP server hangs up. Anything else is a bug.
        if not isinstance(error, _FAILURES) and type(error) is not Exception:
            raise
        raise BtfError(f"{what} cannot be read ({error})") from error


_FAILURES: Final = (
    *(BadDataError, FaultError, LookupError, MissingDebugInfoError),
    *(MemoryError, OSError, OverflowError, ValueError),
)


def register(prog: Program, data: bytes | None = None) -> tuple[str, str]:
    """
    Let drgn find types, objects and symbols in a kernel's BTF and kallsyms; one call is enough.

    :param prog: a Linux kernel, live or not.  If it has other debug info, drgn asks that first.
    :param data: BTF to use, such as the ``.BTF`` section of the very vmlinux; None: the BTF that
        the running kernel shows in sysfs, or the BTF in the kernel's memory.
    :return: which reader of BTF is used, ``drgn`` or ``khoscope``, and where the BTF is from.
    :raises BtfError: if there is none, or it cannot be read.
    :raises SymbolsHidden: if the kernel hides the addresses of its symbols.
    """
    if NAME in prog.cache:
        known: tuple[str, str] = prog.cache[NAME]
        return known
    # Register nothing until everything is there.
    symbols = _symbols(prog)
    local = _is_this_host(prog) and SYSFS.is_dir()
    where = "given"
    if data is None:
        where, data = _find(prog, symbols, local)
    kernel = _Types(prog, Btf(data))
    finder = _Finder(kernel, _Modules(prog, kernel, SYSFS) if local else None)
    reader = "khoscope"
    if hasattr(Module, "load_btf"):
        # osandov/drgn pull request 625. It still lacks the global variables.
        prog.main_module().load_btf(data)
        reader = "drgn"
    else:
        prog.register_type_finder(NAME, finder.type, enable_index=-1)
    prog.register_object_finder(NAME, finder.object, enable_index=-1)
    prog.register_symbol_finder(NAME, symbols, enable_index=-1)
    prog.cache[NAME] = reader, where
    return reader, where


def _symbols(prog: Program) -> SymbolIndex:
    with _unreadable("the kernel's symbols"):
        symbols = load_vmlinux_kallsyms(prog if _is_this_host(prog) else _by_pages(prog))
    if not _symbol(prog, symbols, "_stext"):
        raise SymbolsHidden("/proc/kallsyms shows no addresses (kernel.kptr_restrict)")
    return symbols


def _is_this_host(prog: Program) -> bool:
    """Whether it is the running kernel, whose symbols are in /proc/kallsyms."""
    live = ProgramFlags.IS_LIVE | ProgramFlags.IS_LOCAL
    return prog.flags & live == live


def _by_pages(prog: Program) -> Program:
    """
    The same kernel's memory, read page by page and kept.

    drgn reads the length of each of the kernel's names separately, through the kernel's page
    tables.  That would take most of the time until the first result.
    """
    pages: dict[int, bytes] = {}

    def read(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        start = address & -_PAGE
        if address + count > start + _PAGE:
            return prog.read(address, count)
        if start not in pages:
            pages[start] = prog.read(start, _PAGE)
        return pages[start][address - start :][:count]

    copy = Program(prog.platform)
    copy.set_linux_kernel_custom(prog["VMCOREINFO"].string_(), False)
    copy.add_memory_segment(_KERNEL, (1 << 64) - 1 - _KERNEL, read)
    return copy


def _symbol(prog: Program, symbols: SymbolIndex, name: str) -> int:
    """The address of a symbol; 0: it is not there, or hidden."""
    return next((symbol.address for symbol in symbols(prog, name, None, True)), 0)


def _find(prog: Program, symbols: SymbolIndex, local: bool) -> tuple[str, bytes]:
    """Where the BTF is from, and the BTF."""
    path = SYSFS / "vmlinux"
    with _unreadable(f"the BTF in {path}"):
        if local and path.exists():
            return str(path), path.read_bytes()
    start, end = (_symbol(prog, symbols, name) for name in ("__start_BTF", "__stop_BTF"))
    if not start or not end:
        raise BtfError("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)")
    with _unreadable("the BTF in the kernel's memory"):
        return "the kernel's memory", prog.read(start, end - start)
