# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel that is made up, with all that khoscope reads of one, for what no kernel would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
from drgn import (
    Architecture,
    FaultError,
    FindObjectFlags,
    Object,
    Platform,
    PlatformFlags,
    Program,
    Type,
    TypeEnumerator,
    TypeKind,
    TypeKindSet,
    TypeMember,
    TypeParameter,
    sizeof,
)

from khoscope.helpers import kexec_handover as helpers_module
from khoscope.sources import kernel as kernel_module
from khoscope.sources import luo as luo_module
from khoscope.sources import probe as probe_module
from khoscope.sources.kernel import KernelSource
from tests.synthetic import PLAIN, Memory

#: Where physical memory is mapped, where variables are, and where struct pages.
DIRECT_MAP = 0xFFFF_8880_0000_0000
DATA = 0xFFFF_FFFF_8100_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
RAM = 1 << 26

#: Structures by name, members in their order: packed as C would.
STRUCTS: dict[str, str] = {
    "list_head": "list_head *next; list_head *prev",
    "resource": "u64 start; u64 end; u64 flags; resource *sibling; resource *child",
    "kho_radix_node": "u64 table[512]",
    "kho_radix_tree": "kho_radix_node *root",
    "kho_out": "void *fdt; kho_radix_tree radix_tree",
    "kho_in": "u64 fdt_phys; u64 scratch_phys; char previous_release[65]; u32 kexec_count; "
    "kho_radix_tree radix_tree",
    "kho_scratch": "u64 addr; u64 size",
    "new_utsname": "char release[65]; char version[65]",
    "uts_namespace": "new_utsname name",
    "mm_struct": "void *pgd",
    "kimage_kho": "u64 fdt",
    "kexec_segment": "u64 mem; u64 memsz",
    "kimage": "u32 nr_segments; u32 file_mode; kexec_segment segment[16]; kimage_kho kho",
    "free_area": "u64 nr_free",
    "zone": "free_area free_area[11]",
    "kho_page_info": "u32 order; u32 magic",
    "atomic": "s32 counter",
    # Of compound_info and lru, one is in the other in real kernels.
    "page": "u64 flags; u64 compound_info; list_head lru; u64 mapping; u64 private; u32 page_type;"
    " atomic _refcount; u64 rest",
    "folio": "u64 flags; u64 more[3]; u64 mapping; u64 private; u32 _mapcount; atomic _refcount;"
    " u64 rest; u64 _flags_1",
    "luo_state": "u64 enabled; u64 liveupdate_num",
    "liveupdate_file_handler": "char compatible[48]; list_head list",
    "kho_block_set": "u64 head_pa",
    "luo_session_header": "list_head list; kho_block_set block_set",
    "luo_session_global": "luo_session_header incoming; luo_session_header outgoing",
    "luo_file_set": "list_head files_list; kho_block_set block_set; u64 count",
    "luo_session": "char name[64]; u64 retrieved; list_head list; luo_file_set file_set",
    "luo_file": "liveupdate_file_handler *fh; u64 token; u64 serialized_data; s32 retrieve_status;"
    " list_head list",
    "luo_flb_in": "u64 active; void *header_ser",
    "luo_flb_global": "list_head list; luo_flb_in incoming",
    "refs": "atomic refs",
    "flb_state": "u64 data; refs count",
    "flb_private": "list_head list; flb_state outgoing",
    "liveupdate_flb": "char compatible[48]; flb_private private",
    "vm_struct": "void *caller; u32 nr_pages; u64 size; void *pages",
    "vmap_area": "list_head list; vm_struct *vm",
    "mem_section_usage": "u64 rcu[2]; u64 subsection_map[1]",
    "mem_section": "u64 section_mem_map; mem_section_usage *usage",
    "pglist_data": "u64 node_start_pfn; u64 node_spanned_pages",
    "nodemask": "u64 bits[1]",
    "dev_info": "char subsystem[16]; char device[48]",
    "printk_info": "u64 seq; u64 ts_nsec; u16 text_len; u8 facility; u8 flags; u32 level;"
    " u32 caller_id; dev_info dev_info",
    "lpos": "u64 begin; u64 next",
    "long_atomic": "s64 counter",
    "prb_desc": "long_atomic state_var; lpos text_blk_lpos",
    "desc_ring": "u32 count_bits; prb_desc *descs; printk_info *infos; long_atomic head_id;"
    " long_atomic tail_id",
    "text_ring": "u32 size_bits; char *data",
    "printk_ringbuffer": "desc_ring desc_ring; text_ring text_data_ring",
}
_VARIABLES: dict[str, str] = {
    "kho_enable": "u8",
    "kho_in": "kho_in",
    "kho_out": "kho_out",
    "kho_scratch": "kho_scratch *",
    "kho_scratch_cnt": "u32",
    "init_mm": "mm_struct",
    "init_uts_ns": "uts_namespace",
    "iomem_resource": "resource",
    "saved_command_line": "char *",
    "sysctl_bootid": "u8[16]",
    "tainted_mask": "u64",
    "kexec_image": "kimage *",
    "kexec_crash_image": "kimage *",
    "luo_global": "luo_state",
    "luo_file_handler_list": "list_head",
    "luo_session_global": "luo_session_global",
    "luo_flb_global": "luo_flb_global",
    "vmap_area_list": "list_head",
    "mem_section": "mem_section **",
    "node_data": "pglist_data *[4]",
    "node_states": "nodemask[2]",
    "nr_node_ids": "u32",
    "prb": "printk_ringbuffer *",
}
_CONSTANTS = {"PAGE_SHIFT": 12, "PAGE_SIZE": 4096, "LOG_CONT": 8, "SECTION_SIZE_BITS": 27}
_ENUMS: dict[str, dict[str, int]] = {
    "pageflags": {"PG_locked": 0, "PG_head": 6, "__NR_PAGEFLAGS": 7},
    "pagetype": {"PGTY_buddy": 0xF0, "PGTY_mapcount_underflow": 0xFF},
    "kho_radix_consts": {},
    "section_flags": {"SECTION_IS_ONLINE_BIT": 2},
    "node_states": {"N_POSSIBLE": 0, "N_ONLINE": 1},
    "desc_state": {"desc_committed": 1, "desc_finalized": 2},
}
#: Room for each variable.
_SLOT = 0x1000


@dataclass
class MadeUp:
    """
    A kernel on which nothing is preserved.

    :param lacks: variables and structures that its debug info does not have.
    :param members: of structures, as above, where they are others.
    :param faults: virtual addresses of pages, and names of variables, that cannot be read.
    :param functions: how many parameters each function has.
    :param enums: constants of enums, as above, where they are others.
    """

    lacks: set[str] = field(default_factory=set)
    members: dict[str, str] = field(default_factory=dict)
    memory: Memory = field(default_factory=lambda: Memory(PLAIN, RAM, RAM // 2))
    faults: set[str | int] = field(default_factory=set)
    functions: dict[str, int] = field(default_factory=dict)
    platform: Platform = field(default_factory=lambda: Platform(Architecture.X86_64))
    enums: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = bytearray(_SLOT * (len(_VARIABLES) + 1))
        self._next = RAM // 4
        self.prog = prog = Program(self.platform)
        self._types = dict(self._make_types(prog))
        prog.add_memory_segment(0, RAM, self._read_physical, True)
        prog.add_memory_segment(DIRECT_MAP, RAM, self._read_mapped)
        prog.add_memory_segment(DATA, len(self.data), self._read_data)
        prog.add_memory_segment(VMEMMAP, 1 << 40, lambda _, count, *__: bytes(count))
        prog.register_type_finder("test", self._find_type, enable_index=0)
        prog.register_object_finder("test", self._find_object, enable_index=0)
        self._boot()

    def _boot(self) -> None:
        """What every kernel sets."""
        self.set("kho_enable", 1)
        self.set("kho_out", 0, DIRECT_MAP + self.memory.root)
        self.areas((0x100_0000, 0x10_0000))
        self.set("sysctl_bootid", 1, 1)
        self.set("saved_command_line", self.new(b"kho=on\0"))
        self.ram((0, RAM))
        self.sections({0: 2**64 - 1})
        self.nodes((0, RAM))
        for name in ("luo_file_handler_list", "luo_flb_global", "vmap_area_list"):
            self.link(self.address(name))
        sessions = self.address("luo_session_global")
        self.link(sessions)
        self.link(sessions + 24)
        at = self.address("init_uts_ns")
        self.write(at, b"7.2.0-made-up\0".ljust(65, b"\0") + b"#1\0")
        self.log()

    # Memory

    def address(self, name: str) -> int:
        """Where a variable is."""
        return DATA + _SLOT * list(_VARIABLES).index(name)

    def new(self, raw: bytes) -> int:
        """Put bytes into pages of their own; their virtual address."""
        at, self._next = self._next, self._next + max(-(-len(raw) // 4096), 1) * 4096
        self.write(DIRECT_MAP + at, raw)
        return DIRECT_MAP + at

    def write(self, address: int, raw: bytes) -> None:
        if address >= DATA:
            self.data[address - DATA : address - DATA + len(raw)] = raw
            return
        for at, byte in enumerate(raw, address - DIRECT_MAP):
            page = self.memory.pages.setdefault(at & -4096, bytearray(4096))
            page[at & 4095] = byte

    def words(self, address: int, *values: int) -> None:
        self.write(address, b"".join((v % 2**64).to_bytes(8, "little") for v in values))

    def set(self, name: str, *values: int) -> None:
        self.words(self.address(name), *values)

    def link(self, head: int, *nodes: int) -> None:
        """Make a ``struct list_head`` lead to others, and back."""
        ring = [head, *nodes]
        for i, at in enumerate(ring):
            self.words(at, ring[(i + 1) % len(ring)], ring[i - 1])

    # Facts

    def ram(self, *ranges: tuple[int, int]) -> None:
        """System RAM, as the children of ``iomem_resource``."""
        following = 0
        for start, end in reversed(ranges):
            raw = [start, end - 1, 0x0100_0200, following, 0]
            following = self.new(b"".join(v.to_bytes(8, "little") for v in raw))
        self.set("iomem_resource", 0, 2**64 - 1, 0, 0, following)

    def sections(self, maps: dict[int, int], offline: tuple[int, ...] = ()) -> None:
        """
        ``mem_section``: the map of subsections of each section, and which of them are offline.
        """
        found: dict[int, bytearray] = {}
        for number, bits in maps.items():
            usage = self.new(bytes(16) + bits.to_bytes(8, "little"))
            flags = 0b1011 if number in offline else 0b1111
            raw = found.setdefault(number // 256, bytearray(4096))
            at = number % 256 * 16
            raw[at : at + 16] = flags.to_bytes(8, "little") + usage.to_bytes(8, "little")
        roots = [0] * (max(found, default=0) + 1)
        for root, raw in found.items():
            roots[root] = self.new(bytes(raw))
        self.set("mem_section", self.new(b"".join(v.to_bytes(8, "little") for v in roots)))

    def nodes(self, *spans: tuple[int, int]) -> None:
        """NUMA nodes; an empty span: one without memory."""
        made = [self.new(b"".join(v.to_bytes(8, "little") for v in self._pages(*s))) for s in spans]
        self.set("node_data", *made)
        self.set("node_states", 0, (1 << len(spans)) - 1)
        self.set("nr_node_ids", len(spans))

    @staticmethod
    def _pages(start: int, end: int) -> tuple[int, int]:
        return start >> 12, end - start >> 12

    def areas(self, *areas: tuple[int, int]) -> None:
        """Scratch areas."""
        raw = b"".join(v.to_bytes(8, "little") for area in areas for v in area)
        self.set("kho_scratch", self.new(raw))
        self.set("kho_scratch_cnt", len(areas))

    def log(self, *lines: str) -> int:
        """printk's ring buffer, with these; where its descriptors are."""
        bits = max(len(lines), 1).bit_length()
        text = b"".join(bytes(8) + line.encode() for line in lines)
        infos, descs, at = b"", b"", 0
        first = 1 << bits
        for number, line in enumerate(lines):
            end = at + 8 + len(line)
            state = (first + number) | 2 << 62
            descs += b"".join(v.to_bytes(8, "little") for v in (state, at, end))
            info = number.to_bytes(8, "little") + bytes(8) + len(line).to_bytes(2, "little")
            infos += info.ljust(sizeof(self._types["printk_info"]), b"\0")
            at = end
        where = self.new(descs)
        last = first + max(len(lines) - 1, 0)
        ring = [bits, where, self.new(infos), last, first, 20, self.new(text)]
        self.set("prb", self.new(b"".join(v.to_bytes(8, "little") for v in ring)))
        return where

    def handlers(self, *compatibles: str) -> list[int]:
        """LUO's file handlers; where they are."""
        made = [self.new(name.encode()) for name in compatibles]
        self.link(self.address("luo_file_handler_list"), *(at + 48 for at in made))
        return made

    # drgn

    def _read_physical(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        start = address & -4096
        raw = self.memory.read(start, address + count - start)
        if raw is None or any(DIRECT_MAP + at in self.faults for at in range(start, address + 1)):
            raise FaultError("no memory", address)
        return raw[address - start :][:count]

    def _read_mapped(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        pages = range(address & -4096, address + count, 4096)
        if any(page in self.faults for page in pages):
            raise FaultError("no memory", address)
        return self._read_physical(address - DIRECT_MAP, count, offset, physical)

    def _read_data(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        if list(_VARIABLES)[(address - DATA) // _SLOT] in self.faults:
            raise FaultError("no memory", address)
        return bytes(self.data[address - DATA :][:count])

    def _make_types(self, prog: Program) -> Iterator[tuple[str, Type]]:
        known: dict[str, Type] = {"void": prog.void_type(), "char": prog.int_type("char", 1, True)}
        for bits in (8, 16, 32, 64):
            known[f"u{bits}"] = prog.int_type(f"u{bits}", bits // 8, False)
            known[f"s{bits}"] = prog.int_type(f"s{bits}", bits // 8, True)

        def found(text: str) -> Type:
            """As in "u64", "u64[4]" and "list_head *"."""
            name, _, length = text.partition("[")
            if length:
                return prog.array_type(found(name), int(length[:-1]))
            if name.endswith("*"):
                return prog.pointer_type(found(name[:-1].rstrip()))
            return known[name]

        structs = {**STRUCTS, **self.members}

        def make(name: str) -> Type:
            """A structure, after those that are members of it."""
            members, at = [], 0
            for each in structs[name].split(";"):
                kind, _, member = each.strip().partition(" ")
                if member.startswith("*"):
                    # What it points to may not have been made yet.
                    at = -(-at // 8) * 8
                    later = partial(found, f"{kind} *")
                    members.append(TypeMember(later, member[1:], 8 * at))
                    at += 8
                    continue
                member, _, length = member.partition("[")
                if kind not in known:
                    known[kind] = make(kind)
                align = _alignment(known[kind])
                at = -(-at // align) * align
                whole = found(f"{kind}[{length}" if length else kind)
                members.append(TypeMember(whole, member, 8 * at))
                at += sizeof(whole)
            kind_of = prog.union_type if name == "kho_page_info" else prog.struct_type
            return kind_of(name, -(-at // 8) * 8 if at > 8 else at, tuple(members))

        for name in structs:
            if name not in known:
                known[name] = make(name)
        for name, values in {**_ENUMS, **self.enums}.items():
            listed = tuple(TypeEnumerator(*each) for each in values.items())
            known[name] = prog.enum_type(name, known["u32"], listed)
        self._variables = {name: found(text) for name, text in _VARIABLES.items()}
        yield from known.items()

    def _find_type(
        self, prog: Program, kinds: TypeKindSet, name: str, file: str | None
    ) -> Type | None:
        found = None if name in self.lacks else self._types.get(name)
        return found if found is not None and found.kind in kinds else None

    def _find_object(
        self, prog: Program, name: str, flags: FindObjectFlags, file: str | None
    ) -> Object | None:
        if name in self.lacks:
            return None
        enums = {**_ENUMS, **self.enums}
        there = [each for name, each in enums.items() if name not in self.lacks]
        constants = {**_CONSTANTS, **{k: v for enum in there for k, v in enum.items()}}
        if name in constants:
            return Object(prog, self._types["u64"], constants[name])
        if name == "vmemmap":
            return Object(prog, prog.pointer_type(self._types["page"]), VMEMMAP)
        if name in self.functions:
            parameters = (TypeParameter(self._types["u64"]),) * self.functions[name]
            return Object(prog, prog.function_type(prog.void_type(), parameters), address=DATA)
        if name in self._variables:
            return Object(prog, self._variables[name], address=self.address(name))
        return None

    def source(self, moves: bool = False) -> KernelSource:
        return KernelSource(self.prog, "made up", moves)


def _alignment(kind: Type) -> int:
    size = sizeof(kind)
    if kind.kind != TypeKind.STRUCT:
        return size
    return 8 if size % 8 == 0 else 4 if size % 4 == 0 else 1


@contextmanager
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """drgn's helpers for the direct map ask the page tables of a real kernel."""

    def virt_to_phys(pointer: Object) -> Object:
        return Object(pointer.prog_, "unsigned long", pointer.value_() - DIRECT_MAP)

    def follow_phys(mm: Object, address: int) -> Object:
        return Object(mm.prog_, "unsigned long", address - DATA)

    def page_to_phys(page: Object) -> Object:
        pfn = (page.value_() - VMEMMAP) // sizeof(page.type_.type)
        return Object(page.prog_, "unsigned long", pfn << 12)

    def phys_to_virt(prog: Program, address: int) -> Object:
        return Object(prog, "unsigned long", DIRECT_MAP + address)

    with monkeypatch.context() as patch:
        patch.setattr(kernel_module, "virt_to_phys", virt_to_phys)
        patch.setattr(luo_module, "virt_to_phys", virt_to_phys)
        patch.setattr(kernel_module, "follow_phys", follow_phys)
        patch.setattr(kernel_module, "page_to_phys", page_to_phys)
        patch.setattr(probe_module, "phys_to_virt", phys_to_virt)
        patch.setattr(helpers_module, "phys_to_virt", phys_to_virt)
        patch.setattr(helpers_module, "virt_to_phys", virt_to_phys)
        yield


BIG_ENDIAN = Platform(Architecture.X86_64, PlatformFlags.IS_64_BIT)

BITS_32 = Platform(Architecture.ARM, PlatformFlags.IS_LITTLE_ENDIAN)
