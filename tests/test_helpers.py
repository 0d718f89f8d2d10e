# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The drgn helpers on memory as no kernel would leave it, and as kernels of other page sizes would.

On real kernels, against what was preserved: tests/vm/test_drgn.py.
"""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from drgn import FaultError, Object, Program, TypeMember
from drgn.helpers import ValidationError
from hypothesis import given
from hypothesis import strategies as st

from khoscope import helpers
from khoscope.abi.keys import Abi
from khoscope.helpers import kexec_handover, luo
from khoscope.helpers.kexec_handover import (
    KhoBlock,
    kho_decode_radix_key,
    kho_page_info,
    kho_radix_tree_for_each,
    kho_radix_tree_for_each_key,
    kho_restored,
    kho_scratch_for_each,
    kho_vmalloc_for_each_page,
)
from tests.program import DIRECT_MAP, Kernel, stamp
from tests.synthetic import FIXED, PLAIN, POSTED, Memory

MODULES = [kexec_handover, luo]
PAGE = 4096


def seen(block: KhoBlock) -> tuple[int, int, int | None]:
    return block.phys, block.order, None if block.type is None else block.type.value_()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_drgn_alone_is_imported(module: object) -> None:
    """So that it can be offered to drgn as it is."""
    tree = ast.parse(Path(str(module.__file__)).read_text())  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [str(node.module)]
        else:
            continue
        assert {name.partition(".")[0] for name in names} <= {
            *("drgn", "typing", "collections", "__future__")
        }


def test_khoscope_offers_them_all() -> None:
    """And importing khoscope alone does not import drgn."""
    words = (
        "import sys, khoscope; assert 'drgn' not in sys.modules;"
        "from khoscope import helpers;"
        "print(all(getattr(khoscope, name) is getattr(helpers, name) for name in helpers.__all__))"
    )
    result = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")
    assert len(set(helpers.__all__)) == len(helpers.__all__)


@pytest.mark.parametrize("shift", [12, 14, 16])
@pytest.mark.parametrize("constants", [True, False])
def test_blocks_come_back(shift: int, constants: bool) -> None:
    abi = Abi.for_page_shift(shift)
    memory = Memory(abi, size=1 << 40, nodes_at=1 << 30)
    blocks = [(5 << shift, 0), (4 << shift + 4, 4), (0, 9), ((1 << 40 - shift) - 1 << shift, 0)]
    for phys, order in blocks:
        memory.add_page(phys, order)
    kernel = Kernel(memory, constants=constants)
    kernel.program()
    found = [seen(block) for block in kho_radix_tree_for_each(kernel.tree())]
    assert sorted(found) == sorted((phys, order, None) for phys, order in blocks)
    assert [order for _, order, _ in found] == sorted((o for _, o in blocks), reverse=True)


@pytest.mark.parametrize(("abi", "kept"), [(FIXED, 1), (POSTED, 0)])
def test_types(abi: Abi, kept: int) -> None:
    """As posted, the tree has no room for them: what a walk gives is contig."""
    memory = Memory(abi)
    memory.add_page(1 << 20, 3, 0)
    memory.add_page(1 << 21, 3, 1)
    kernel = Kernel(memory, types=True)
    kernel.program()
    found = [seen(block) for block in kho_radix_tree_for_each(kernel.tree())]
    assert found == [(1 << 20, 3, 0), (1 << 21, 3, kept)]


def test_tree_that_is_not_there() -> None:
    kernel = Kernel(Memory(PLAIN))
    prog = kernel.program()
    assert list(kho_radix_tree_for_each(kernel.tree())) == []
    empty = Object.from_bytes_(prog, kernel.tree().type_, bytes(8))
    assert list(kho_radix_tree_for_each(empty)) == []


def test_other_keys() -> None:
    """Trees of others have keys that are no blocks."""
    memory = Memory(PLAIN)
    for key in (0, 77, 1 << 59):
        memory.add_key(key)
    kernel = Kernel(memory)
    kernel.program()
    assert list(kho_radix_tree_for_each_key(kernel.tree())) == [0, 77, 1 << 59]
    with pytest.raises(ValidationError, match="key 0x0 is not that of a block"):
        list(kho_radix_tree_for_each(kernel.tree()))


@pytest.mark.parametrize("key", [0, 1 << 53, (1 << 64) - 1])
def test_key_of_no_block(key: int) -> None:
    prog = Kernel(Memory(PLAIN)).program()
    with pytest.raises(ValueError, match=f"{key:#x}"):
        kho_decode_radix_key(prog, key)


@given(st.integers(0, 52), st.integers(0, 2**52 - 1))
def test_keys_are_decoded_as_they_are_coded(order: int, page: int) -> None:
    prog = Kernel(Memory(PLAIN)).program()
    phys = page >> order << order + 12
    assert seen(kho_decode_radix_key(prog, PLAIN.kho_radix_encode_key(phys, order))) == (
        *(phys, order),
        None,
    )


@pytest.mark.parametrize(
    ("entry", "error", "why"),
    [
        (8, ValidationError, "not aligned"),
        (1 << 40, FaultError, "could not find physical memory segment"),
        (None, ValidationError, "was there before"),
    ],
)
def test_tables_that_lead_astray(entry: int | None, error: type[Exception], why: str) -> None:
    memory = Memory(PLAIN)
    memory.add_page(1 << 20, 0)
    # A table that is full of itself would have 512 ** 5 paths.
    below = next(filter(None, (memory.entry(memory.root, i) for i in range(512))))
    for index in range(512):
        memory.set_entry(below, index, below if entry is None else entry)
    kernel = Kernel(memory)
    kernel.program()
    memory.reads = 0
    with pytest.raises(error, match=why):
        list(kho_radix_tree_for_each(kernel.tree()))
    # A page once, and not much more.
    assert memory.reads < 20


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8), st.integers(0, 511))
def test_garbage_ends(words: list[int], at: int) -> None:
    memory = Memory(PLAIN, size=1 << 24, nodes_at=1 << 20)
    for node in list(memory.pages):
        for i, word in enumerate(words):
            memory.set_entry(node, (at + i) % 512, word % memory.size & -PAGE if i % 2 else word)
    kernel = Kernel(memory)
    kernel.program()
    # Any outcome will do that comes.
    with contextlib.suppress(ValidationError, FaultError):
        list(kho_radix_tree_for_each(kernel.tree()))
    assert memory.reads <= (memory.size >> 12) + 1


# Pages


def test_page_info() -> None:
    kernel = Kernel(Memory(FIXED), pages={1: (stamp(4), 0), 2: (0, 1), 3: (stamp(4) >> 1, 1)})
    kernel.program()
    info = kho_page_info(kernel.page(1))
    assert info is not None
    assert (info.order.value_(), info.type.value_()) == (4, 0)
    assert kho_page_info(kernel.page(2)) is None
    assert kho_page_info(kernel.page(3)) is None


def test_restored() -> None:
    """In use, and without a stamp."""
    kernel = Kernel(Memory(PLAIN), pages={1: (stamp(4), 1), 2: (0, 1), 3: (0, 0), 4: (77, 5)})
    kernel.program()
    assert [kho_restored(kernel.page(pfn)) for pfn in (1, 2, 3, 4)] == [False, True, False, True]


# vmalloc


def chunks(memory: Memory, *listed: list[int]) -> int:
    """A chain of chunks; the address of the first."""
    at = [memory.new_node() for _ in listed]
    for i, entries in enumerate(listed):
        memory.set_entry(at[i], 0, at[i + 1] if i + 1 < len(at) else 0)
        for slot, entry in enumerate(entries):
            memory.set_entry(at[i], 1 + slot, entry)
    return at[0]


def pages_of(kernel: Kernel, desc: Object) -> list[int]:
    return [
        (page.value_() - kernel.page(0).value_()) // 64 << 12
        for page in kho_vmalloc_for_each_page(desc)
    ]


def test_vmalloc() -> None:
    memory = Memory(PLAIN)
    full = [(1000 - i) * PAGE for i in range(511)]
    first = chunks(memory, full, [7 * PAGE, 3 * PAGE])
    kernel = Kernel(memory)
    kernel.program()
    assert pages_of(kernel, kernel.desc(first, 513)) == [*full, 7 * PAGE, 3 * PAGE]


def test_vmalloc_of_huge_pages() -> None:
    memory = Memory(PLAIN)
    first = chunks(memory, [2 << 21, 1 << 21])
    kernel = Kernel(memory)
    kernel.program()
    expected = [at + i * PAGE for at in (2 << 21, 1 << 21) for i in range(512)]
    assert pages_of(kernel, kernel.desc(first, 1024, 9)) == expected


def test_vmalloc_without_chunks() -> None:
    kernel = Kernel(Memory(PLAIN))
    kernel.program()
    assert pages_of(kernel, kernel.desc(0, 0)) == []


@pytest.mark.parametrize(
    ("total", "order", "why"),
    [(1, 0, "more than total_pages, 1"), (3, 0, "2 pages, total_pages is 3"), (9, 0xFFFF, "more")],
)
def test_vmalloc_that_does_not_fit(total: int, order: int, why: str) -> None:
    memory = Memory(PLAIN)
    first = chunks(memory, [PAGE, 2 * PAGE])
    kernel = Kernel(memory)
    kernel.program()
    with pytest.raises(ValidationError, match=why):
        pages_of(kernel, kernel.desc(first, total, order))


@pytest.mark.parametrize(
    ("to", "error", "why"),
    [
        (None, ValidationError, "chunk 1 at .* was there before"),
        (12, ValidationError, "chunk 1 at 0xc is not aligned"),
        (1 << 40, FaultError, "could not find physical memory segment"),
    ],
)
def test_chain_that_leads_astray(to: int | None, error: type[Exception], why: str) -> None:
    memory = Memory(PLAIN)
    first = chunks(memory, [])
    memory.set_entry(first, 0, first if to is None else to)
    kernel = Kernel(memory)
    kernel.program()
    with pytest.raises(error, match=why):
        pages_of(kernel, kernel.desc(first, 1000))


# Scratch


def test_scratch() -> None:
    memory = Memory(PLAIN)
    at = memory.new_node()
    for i, word in enumerate((1 << 20, 1 << 21, 1 << 30, 1 << 24)):
        memory.set_entry(at, i, word)
    kernel = Kernel(memory)

    def areas(prog: Program) -> Object:
        type = prog.pointer_type(prog.type("struct kho_scratch"))
        return Object(prog, type, DIRECT_MAP + at)

    kernel.variables = {
        "kho_enable": lambda prog: Object(prog, "unsigned int", 1),
        "kho_scratch": areas,
        "kho_scratch_cnt": lambda prog: Object(prog, "unsigned int", 2),
    }
    prog = kernel.program()
    found = [(s.addr.value_(), s.size.value_()) for s in kho_scratch_for_each(prog)]
    assert found == [(1 << 20, 1 << 21), (1 << 30, 1 << 24)]
    # A kernel with KHO off keeps those that it was handed.
    kernel.variables["kho_enable"] = lambda prog: Object(prog, "unsigned int", 0)
    kernel.variables["kho_in"] = _kho_in(0x1000)
    assert len(list(kho_scratch_for_each(prog))) == 2
    kernel.variables["kho_scratch"] = lambda prog: Object(
        prog, prog.pointer_type(prog.type("struct kho_scratch")), 0
    )
    assert list(kho_scratch_for_each(prog)) == []


def _kho_in(scratch_phys: int) -> Callable[[Program], Object]:
    def variable(prog: Program) -> Object:
        member = TypeMember(prog.type("unsigned long"), "scratch_phys")
        kind = prog.struct_type("kho_in", 8, (member,))
        return Object(prog, kind, {"scratch_phys": scratch_phys})

    return variable


def test_scratch_of_a_set_up_that_failed() -> None:
    """The array was freed, and the pointer and the count are still there."""

    def dangling(prog: Program) -> Object:
        raise AssertionError("it was looked at")

    kernel = Kernel(Memory(PLAIN))
    kernel.variables = {
        "kho_enable": lambda prog: Object(prog, "unsigned int", 0),
        "kho_in": _kho_in(0),
        "kho_scratch": dangling,
        "kho_scratch_cnt": lambda prog: Object(prog, "unsigned int", 2),
    }
    assert list(kho_scratch_for_each(kernel.program())) == []
