# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Where drgn people are: %kho and the helpers in real sessions, with DWARF and with BTF alone.

What %kho says besides is in test_fossils.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.vm.test_btf import HIDE, SHOW
from tests.vm.test_khoscope import TIMEOUT, guest
from vm.exercise import Exercise, Piece, by_scenario
from vm.luo import Memfd, hold
from vm.machine import REPOSITORY, Machine, Result

ENVIRONMENT = {
    "PYTHONPATH": "/khoscope",
    # As the entry point of an installed khoscope does.
    "DRGN_PLUGINS": "khoscope=khoscope.plugin",
}
PAGE = 4096


@dataclass
class Story:
    """A guest with memory of each kind that the helpers know of, before a kexec and after it."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    #: What scripts have printed.
    before: list[Any] = field(default_factory=list)
    by_btf: list[Any] = field(default_factory=list)
    handed_over: list[Any] = field(default_factory=list)
    restored: list[Any] = field(default_factory=list)
    scratch: list[tuple[int, int]] = field(default_factory=list)
    tree: Any = None
    #: Results of sessions that were typed.
    sessions: dict[str, Result] = field(default_factory=dict)
    #: What ``%kho tree`` has said, with DWARF and with BTF.
    documents: dict[str, Any] = field(default_factory=dict)


def script(machine: Machine, *lines: str) -> list[Any]:
    """Run a drgn script in the guest; the JSON values that it prints."""
    text = "\n".join(["import json, khoscope", *lines, ""])
    machine.run("cat > /run/script.py", input=text.encode(), check=True)
    command = "drgn -q /run/script.py"
    said = machine.run(command, timeout=TIMEOUT, env=ENVIRONMENT, check=True).stdout
    return [json.loads(line) for line in said.splitlines()]


def from_host(machine: Machine, *lines: str) -> list[Any]:
    """The same from the host, without a vmlinux."""
    first = "import json, khoscope; from khoscope.sources.open import open_qemu"
    prog = f"prog = open_qemu({str(machine.qmp_socket)!r})"
    command = [sys.executable, "-c", "\n".join([first, prog, *lines])]
    said = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=TIMEOUT
    ).stdout
    return [json.loads(line) for line in said.splitlines()]


def session(machine: Machine, *lines: str, options: str = "") -> Result:
    """An interactive drgn session, on a terminal: what it prints is all in ``stdout``."""
    typed = "\n".join([*lines, "print('still', 'here')", "exit()", ""])
    environment = {**ENVIRONMENT, "PYTHON_BASIC_REPL": "1", "TERM": "dumb"}
    spawn = f"import pty; pty.spawn(['drgn', '-q', *{options.split()}])"
    run = ("python3", "-c", spawn)
    return machine.run(run, timeout=TIMEOUT, env=environment, input=typed.encode())


BLOCKS = (
    "blocks = list(khoscope.kho_radix_tree_for_each(prog['kho_out'].radix_tree))",
    "types = [None if b.type is None else b.type.format_(type_name=False) for b in blocks]",
    "print(json.dumps([[b.phys, b.order, t] for b, t in zip(blocks, types)]))",
)


def heads(addresses: list[int]) -> tuple[str, ...]:
    """Of each page: the order in its stamp, and whether it looks restored."""
    return (
        "from drgn.helpers.linux.mm import phys_to_page",
        f"pages = [phys_to_page(prog, phys) for phys in {addresses}]",
        "infos = [khoscope.kho_page_info(page) for page in pages]",
        "print(json.dumps([None if i is None else i.order.value_() for i in infos]))",
        "print(json.dumps([khoscope.kho_restored(page) for page in pages]))",
    )


@pytest.fixture(scope="module")
def story() -> Story:
    story = Story()
    with Machine("7.2-fixed") as machine:
        exercise = Exercise(machine)
        exercise.load()
        exercise.preserve("contig")
        exercise.preserve("split")
        exercise.preserve("vmalloc", 600)
        held = hold(machine, "vm1", {1: Memfd(PAGE), 2: Memfd(3 * PAGE)})
        story.pieces = by_scenario(exercise.report())
        story.scratch = exercise.scratch_areas()
        (area,) = story.pieces["vmalloc"]
        firsts = [piece.ranges[0][0] for piece in story.pieces["contig"]]
        look = (
            *BLOCKS,
            "scratch = khoscope.kho_scratch_for_each(prog)",
            "print(json.dumps([[int(s.addr), int(s.size)] for s in scratch]))",
            "from drgn import Object",
            "from drgn.helpers.linux.mm import page_to_phys, phys_to_virt",
            f"at = phys_to_virt(prog, {area.descriptor}).value_()",
            "desc = Object(prog, 'struct kho_vmalloc', address=at)",
            "pages = khoscope.kho_vmalloc_for_each_page(desc)",
            "print(json.dumps([int(page_to_phys(page)) for page in pages]))",
            "sessions = khoscope.luo_session_for_each(prog)",
            "counts = [[s.name.string_().decode(), int(s.file_set.count)] for s in sessions]",
            "print(json.dumps(counts))",
            *heads(firsts),
        )
        story.tree = json.loads(guest(machine, "tree", "--json"))
        story.before = script(machine, *look)
        story.by_btf = from_host(machine, *look)
        story.sessions["dwarf"] = session(
            machine,
            "%kho tree --json > /run/dwarf",
            "%kho tree --no-such-option",
            "%kho --core x tree",
            "%kho trace",
            "%kho tree --root no_such_symbol",
            "%kho tree --limit 0 | grep contig | head -n 1",
            "%kho verify --only overlap",
        )
        story.sessions["no kernel"] = session(machine, "%kho tree", options="-p 1")
        machine.run(HIDE, check=True)
        register = "from khoscope import btf; btf.register(prog)"
        story.sessions["btf"] = session(machine, register, "%kho tree --json > /run/btf")
        machine.run(SHOW, check=True)
        for name in ("dwarf", "btf"):
            document = machine.run(f"cat /run/{name}", check=True).stdout
            story.documents[name] = json.loads(document)
        held.let_go()

        machine.load_kexec()
        machine.execute_kexec()
        exercise.load()
        story.handed_over = from_host(machine, *heads(firsts))
        exercise.restore("contig")
        story.restored = from_host(machine, *heads(firsts))
    return story


def test_the_tree(story: Story) -> None:
    """The same blocks as khoscope's own reader has, types included."""
    expected = [
        [int(b["phys"], 16), b["order"], f"KHO_PAGE_{b['type'].upper()}"]
        for b in story.tree["blocks"]
    ]
    assert story.before[0] == expected
    pages = {
        page
        for phys, order, _ in story.before[0]
        for page in range(phys, phys + (PAGE << order), PAGE)
    }
    for pieces in story.pieces.values():
        for piece in pieces:
            assert all(first in pages for first, _ in piece.ranges)


def test_scratch_vmalloc_and_sessions(story: Story) -> None:
    _, scratch, listed, sessions, *_ = story.before
    assert [(first, first + size) for first, size in scratch if size] == story.scratch
    (area,) = story.pieces["vmalloc"]
    assert area.pages == len(listed) == 600
    assert set(listed) == {page for first, end in area.ranges for page in range(first, end, PAGE)}
    assert sessions == [["vm1", 2]]


def test_stamps(story: Story) -> None:
    """None before the kexec, one until the block is restored, none again."""
    orders = [piece.pages.bit_length() - 1 for piece in story.pieces["contig"]]
    nothing = [None] * len(orders)
    in_use = [True] * len(orders)
    assert story.before[-2:] == [nothing, in_use]
    assert story.handed_over == [orders, [False] * len(orders)]
    assert story.restored == [nothing, in_use]


def test_the_helpers_by_btf(story: Story) -> None:
    assert story.by_btf == story.before


@pytest.mark.parametrize("name", ["dwarf", "btf"])
def test_kho_is_the_command_line(story: Story, name: str) -> None:
    for part in story.tree.keys() - {"taken"}:
        assert story.documents[name][part] == story.tree[part], part
    result = story.sessions[name]
    assert result.returncode == 0, result.stderr
    assert "still here" in result.stdout


def test_what_goes_wrong_does_not_end_the_session(story: Story) -> None:
    result = story.sessions["dwarf"]
    assert result.returncode == 0, result
    assert "still here" in result.stdout
    for words in (
        "--no-such-option",
        "looks at the program of this drgn session",
        "invalid choice: 'trace'",
        "no_such_symbol",
    ):
        assert words in result.stdout, result.stdout
    # The pipe, and what comes after it.
    assert "contig" in result.stdout
    assert "PASS" in result.stdout
    assert "Traceback" not in result.stdout


def test_no_kernel_no_kho(story: Story) -> None:
    result = story.sessions["no kernel"]
    assert "still here" in result.stdout
    assert "root 0x" not in result.stdout


# doctor


@pytest.fixture(scope="module")
def hosts() -> dict[str, Result]:
    """khoscope doctor on hosts that lack this or that."""
    found: dict[str, Result] = {}
    plain, document = ("khoscope", "doctor"), ("khoscope", "doctor", "--json")
    with Machine("7.2-fixed") as machine:
        found["whole"] = machine.run(plain, timeout=TIMEOUT)
        found["whole, json"] = machine.run(document, timeout=TIMEOUT)
        nobody = ("setpriv", "--reuid=1000", "--clear-groups", *document)
        found["nobody"] = machine.run(nobody, timeout=TIMEOUT)
        machine.run(HIDE, check=True)
        found["btf"] = machine.run(document, timeout=TIMEOUT)
        machine.run("sysctl -qw kernel.kptr_restrict=2", check=True)
        found["hidden"] = machine.run(document, timeout=TIMEOUT)
        found["hidden, text"] = machine.run(plain, timeout=TIMEOUT)
    with Machine("7.2-fixed", append="kho=off") as machine:
        found["off"] = machine.run(document, timeout=TIMEOUT)
    return found


def states(result: Result) -> dict[str, str]:
    document = json.loads(result.stdout)
    assert document["schema"] == "khoscope.doctor/1"
    assert document["ready"] == (result.returncode == 0)
    return {fact["name"]: fact["state"] for fact in document["facts"]}


def test_doctor_on_a_host_that_has_all(hosts: dict[str, Result]) -> None:
    assert hosts["whole"].returncode == 0
    assert hosts["whole"].stderr == ""
    for line in hosts["whole"].stdout.splitlines():
        assert len(line) <= 80, line
    found = states(hosts["whole, json"])
    # No image is loaded; all else is there.
    assert {name for name, state in found.items() if state != "ok"} == {"kexec image"}


def test_doctor_without_a_vmlinux(hosts: dict[str, Result]) -> None:
    assert hosts["btf"].returncode == 0
    assert "BTF (khoscope), /sys/kernel/btf/vmlinux" in hosts["btf"].stdout


def test_doctor_where_symbols_are_hidden(hosts: dict[str, Result]) -> None:
    found = states(hosts["hidden"])
    assert (found["debug info"], found["kptr_restrict"]) == ("no", "no")
    what, hint = hosts["hidden, text"].stderr.splitlines()
    assert "debug info" in what
    assert "kernel.kptr_restrict=1" in hint
    assert hosts["hidden, text"].returncode == 2


def test_doctor_for_others_than_root(hosts: dict[str, Result]) -> None:
    found = states(hosts["nobody"])
    assert hosts["nobody"].returncode == 2
    assert (found["root"], found["KHO"], found["kernel memory"]) == ("no", "ok", "no")
    assert len(hosts["nobody"].stderr.splitlines()) == 2


def test_doctor_where_kho_is_off(hosts: dict[str, Result]) -> None:
    found = states(hosts["off"])
    assert (found["KHO"], found["KHO on"]) == ("ok", "no")
    assert hosts["off"].returncode == 2
    assert "kho=on" in hosts["off"].stderr
