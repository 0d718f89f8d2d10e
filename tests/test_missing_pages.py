# SPDX-License-Identifier: LGPL-2.1-or-later
"""
vmcores without some pages: the tree is whole, what is missing is named, and nothing passes.

They are made of a fossil, on which khoscope verify passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from drgn import Object, Program
from drgn.helpers.linux.mm import follow_phys

from khoscope.cli import main
from khoscope.sources.open import open_core
from khoscope.sources.probe import page_layout
from vm.fossil import FOSSILS, SUFFIX, unpack
from vm.vmcore import PAGE, Vmcore

#: Memory of the guest, bytes, and what one entry of a page table maps of its struct pages.
MEMORY, HUGE = 320 << 20, 2 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    unpack(FOSSILS / f"7.2-fixed{SUFFIX}", directory)
    return directory / "after"


def without(whole: Path, missing: Iterable[int], to: Path) -> Path:
    """The vmcore without pages, by their physical addresses."""
    gone = set(missing)
    with Vmcore(whole) as core:
        pages = {page for load in core.loads for page in load.pages()}
        assert pages & gone
        core.keep(pages - gone, to)
    return to


def physical(prog: Program, address: int) -> int:
    """The page at an address of the kernel's."""
    # init_mm is not in fossils: drgn goes by the same page tables without it.
    tables = prog.symbol("init_top_pgt").address
    found = follow_phys(Object(prog, "struct mm_struct", {"pgd": tables}), address)
    return int(found.value_()) // PAGE * PAGE


def said(capsys: pytest.CaptureFixture[str], core: Path, *words: str) -> tuple[int, str]:
    """The exit status and the output."""
    status = main(["--core", str(core), *words])
    return status, capsys.readouterr().out


def blocks(capsys: pytest.CaptureFixture[str], core: Path) -> Any:
    status, document = said(capsys, core, "tree", "--json")
    assert status == 0
    return json.loads(document)["blocks"]


def test_nothing_is_missing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, whole, "verify")
    assert status == 0
    assert "PASS" in text


def test_without_struct_pages(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prog = open_core(whole)
    layout = page_layout(prog)
    size = MEMORY // PAGE * layout.size
    parts = [physical(prog, layout.vmemmap + at) for at in range(0, size, HUGE)]
    gone = (page for part in parts for page in range(part, part + HUGE, PAGE))
    core = without(whole, gone, tmp_path / "cut")
    found = blocks(capsys, core)
    assert found == blocks(capsys, whole)
    status, text = said(capsys, core, "verify")
    assert status == 3
    assert "PASS" not in text
    assert f"the struct pages of {len(found)} blocks could not be read" in text
    assert "how full is not known" in said(capsys, core, "status")[1]


#: What cannot be read without a page, and where that is in the kernel.
FACTS: dict[str, Callable[[Program], Object]] = {
    "the kernel log (prb)": lambda prog: prog["prb"].desc_ring.descs,
    "the scratch areas (kho_scratch)": lambda prog: prog["kho_scratch"],
    "LUO's file handlers (luo_file_handler_list)": lambda p: p["luo_file_handler_list"].next,
    "the list of vmalloc areas (struct vmap_area), whole": (
        lambda prog: prog["vmap_nodes"][0].busy.head.next
    ),
}


@pytest.mark.parametrize("fact", FACTS)
def test_without_a_page(
    whole: Path, tmp_path: Path, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fact is named where it was looked for."""
    prog = open_core(whole)
    page = physical(prog, FACTS[fact](prog).value_())
    core = without(whole, [page], tmp_path / "cut")
    assert blocks(capsys, core) == blocks(capsys, whole)
    status, text = said(capsys, core, "verify")
    assert status in (2, 3)
    assert "PASS" not in text
    assert f"cannot be read: {fact}" in text
