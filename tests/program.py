# SPDX-License-Identifier: LGPL-2.1-or-later
"""A drgn program on synthetic memory, with KHO's types: for what no kernel would hand over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from drgn import (
    AbsenceReason,
    Architecture,
    FaultError,
    FindObjectFlags,
    Object,
    Platform,
    Program,
    Type,
    TypeEnumerator,
    TypeKind,
    TypeKindSet,
    TypeMember,
)

from khoscope.abi.keys import KHO_PAGE_MAGIC
from tests.synthetic import Memory

#: Where physical memory is mapped.
DIRECT_MAP = 0xFFFF_8880_0000_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
PAGE_SIZE_OF_STRUCT = 64


@dataclass
class Kernel:
    """
    A program whose physical memory is ``memory``, with KHO's types and those variables that are
    set.

    :param types: the kernel has ``enum kho_page_type``.
    :param constants: the kernel's debug info has ``enum kho_radix_consts``.
    :param pages: of ``struct page`` by pfn: private, refcount.
    """

    memory: Memory
    types: bool = False
    constants: bool = True
    pages: dict[int, tuple[int, int]] = field(default_factory=dict)
    variables: dict[str, Callable[[Program], Object]] = field(default_factory=dict)

    def program(self) -> Program:
        self.prog = prog = Program(Platform(Architecture.X86_64))
        self._known = self._all_types(prog)
        prog.add_memory_segment(0, self.memory.size, self._read_physical, True)
        prog.add_memory_segment(DIRECT_MAP, self.memory.size, self._read_virtual)
        prog.add_memory_segment(VMEMMAP, 1 << 40, self._read_pages)
        prog.register_type_finder("test", self._find_type, enable_index=0)
        prog.register_object_finder("test", self._find_object, enable_index=0)
        return prog

    def tree(self) -> Object:
        """``struct kho_radix_tree *``, which leads to the memory's."""
        raw = (DIRECT_MAP + self.memory.root).to_bytes(8, "little")
        return Object.from_bytes_(self.prog, self._known["kho_radix_tree"], raw)

    def desc(self, first: int, pages: int, order: int = 0) -> Object:
        """``struct kho_vmalloc``."""
        raw = first.to_bytes(8, "little") + pages.to_bytes(4, "little") + bytes(2)
        raw += order.to_bytes(2, "little")
        return Object.from_bytes_(self.prog, self._known["kho_vmalloc"], raw)

    def page(self, pfn: int) -> Object:
        """``struct page *``."""
        type = self.prog.pointer_type(self._known["page"])
        return Object(self.prog, type, VMEMMAP + pfn * PAGE_SIZE_OF_STRUCT)

    def _read_physical(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        start = address & -self.memory.abi.page_size
        raw = self.memory.read(start, address + count - start)
        if raw is None:
            raise FaultError("no memory", address)
        return raw[address - start :][:count]

    def _read_virtual(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        return self._read_physical(address - DIRECT_MAP, count, offset, physical)

    def _read_pages(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        pfn, at = divmod(address - VMEMMAP, PAGE_SIZE_OF_STRUCT)
        private, refcount = self.pages[pfn]
        raw = private.to_bytes(8, "little") + refcount.to_bytes(4, "little", signed=True)
        return raw.ljust(PAGE_SIZE_OF_STRUCT, b"\0")[at:][:count]

    def _all_types(self, prog: Program) -> dict[str, Type]:
        """By name, without ``struct`` and the like."""
        abi = self.memory.abi
        u64, u32 = prog.int_type("u64", 8, False), prog.int_type("unsigned int", 4, False)
        u16, atomic = prog.int_type("unsigned short", 2, False), prog.int_type("int", 4, True)

        def struct(name: str | None, size: int, *members: tuple[Type, str, int]) -> Type:
            listed = tuple(TypeMember(kind, each, 8 * at) for kind, each, at in members)
            return prog.struct_type(name, size, listed)

        node = struct(
            "kho_radix_node", abi.page_size, (prog.array_type(u64, abi.table_entries), "table", 0)
        )
        leaf = struct(
            "kho_radix_leaf",
            abi.page_size,
            (prog.array_type(u64, abi.page_size // 8), "bitmap", 0),
        )
        chunk_entries = prog.array_type(u64, abi.page_size // 8 - 1)
        link = prog.union_type(None, 8, (TypeMember(u64, "phys"),))
        header = struct("kho_vmalloc_hdr", 8, (link, "next", 0))
        bits = self.memory.abi.stamp.order_bits
        info = [
            TypeMember(
                Object(prog, u32, bit_field_size=bits, absence_reason=AbsenceReason.OTHER),
                "order",
                0,
            ),
            TypeMember(u32, "magic", 32),
        ]
        if bits < 32:
            type_bit = Object(prog, u32, bit_field_size=1, absence_reason=AbsenceReason.OTHER)
            info.append(TypeMember(type_bit, "type", bits))
        return {
            "u64": u64,
            "unsigned int": u32,
            "kho_radix_node": node,
            "kho_radix_leaf": leaf,
            "kho_radix_tree": struct("kho_radix_tree", 8, (prog.pointer_type(node), "root", 0)),
            "kho_vmalloc": struct(
                "kho_vmalloc",
                16,
                (link, "first", 0),
                (u32, "total_pages", 8),
                (u16, "flags", 12),
                (u16, "order", 14),
            ),
            "kho_vmalloc_chunk": struct(
                "kho_vmalloc_chunk", abi.page_size, (header, "hdr", 0), (chunk_entries, "phys", 8)
            ),
            "kho_page_info": prog.union_type(
                "kho_page_info", 8, (TypeMember(prog.struct_type(None, 8, info)),)
            ),
            "page": struct(
                "page",
                PAGE_SIZE_OF_STRUCT,
                (u64, "private", 0),
                (struct("refcount", 4, (atomic, "counter", 0)), "_refcount", 8),
            ),
            "kho_scratch": struct("kho_scratch", 16, (u64, "addr", 0), (u64, "size", 8)),
            "kho_page_type": prog.enum_type(
                "kho_page_type",
                u32,
                (TypeEnumerator("KHO_PAGE_CONTIG", 0), TypeEnumerator("KHO_PAGE_SPLIT", 1)),
            ),
        }

    def _find_type(
        self, prog: Program, kinds: TypeKindSet, name: str, file: str | None
    ) -> Type | None:
        found = self._known.get(name)
        if found is None or found.kind not in kinds:
            return None
        return found if self.types or found.kind != TypeKind.ENUM else None

    def _find_object(
        self, prog: Program, name: str, flags: FindObjectFlags, file: str | None
    ) -> Object | None:
        abi = self.memory.abi
        known = {"PAGE_SHIFT": abi.page_shift, "PAGE_SIZE": abi.page_size}
        if self.constants:
            known["KHO_TREE_MAX_DEPTH"] = abi.tree_max_depth
            if abi.type_shift is not None and abi.type_shift < abi.stored_bits:
                known["KHO_KEY_TYPE_SHIFT"] = abi.type_shift
        if name in known and flags & FindObjectFlags.CONSTANT:
            return Object(prog, self._known["u64"], known[name])
        if name == "vmemmap":
            return Object(prog, prog.pointer_type(self._known["page"]), VMEMMAP)
        return self.variables[name](prog) if name in self.variables else None


def stamp(order: int) -> int:
    """``page->private`` of a block's first page."""
    return KHO_PAGE_MAGIC << 32 | order
