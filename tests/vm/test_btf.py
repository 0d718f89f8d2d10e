# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernels without any vmlinux: what khoscope says of them is what it says with one.  And trees that
are not KHO's, whose keys are no blocks.

In the guest types come from sysfs and symbols from /proc/kallsyms; on the host, over QMP and of a
vmcore, both come out of the guest's memory.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from drgn import Program, Type, TypeKind, sizeof

from khoscope.sources.open import debug_info, open_qemu
from tests.vm.test_khoscope import TIMEOUT, guest, host
from vm.exercise import Exercise
from vm.kernel import one_of_each_series, series
from vm.luo import Memfd, hold
from vm.machine import Machine
from vm.trace import Trace

#: What differs between any two runs.
TIMES = ("taken",)
COMMANDS = ("tree", "verify", "status")

#: Structures of KHO, LUO, kexec and memory management; those that they lead to are compared, too.
SEEDS = [
    *("kho_out", "kho_in", "kho_scratch", "kho_radix_tree", "kho_radix_node", "kho_radix_leaf"),
    *("kho_vmalloc", "kho_vmalloc_chunk", "kimage", "page", "folio", "zone", "pglist_data"),
    *("luo_session", "luo_file", "luo_session_global", "luo_flb_global", "liveupdate_flb"),
    *("liveupdate_file_handler", "vm_struct", "vmap_area", "vmap_node", "mm_struct", "resource"),
    *("printk_ringbuffer", "uts_namespace", "module"),
]
COMPARED = 200

#: In a guest: away with all that has DWARF, and back.
HIDE = "mkdir -p /run/none; for d in /usr/lib/debug /kernel; do mount --bind /run/none $d; done"
SHOW = "umount /usr/lib/debug /kernel"


@pytest.fixture(scope="module", params=one_of_each_series())
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A guest with something to see."""
    with Machine(request.param) as machine:
        exercise = Exercise(machine)
        exercise.load()
        for name in ("contig", "folio", "dma", "vmalloc"):
            exercise.preserve(name)
        if has_luo(machine):
            hold(machine, "a session", {1: Memfd(4096), 2: Memfd(0)})
        # The kernel makes its boot id when it is first asked for it.
        machine.run("cat /proc/sys/kernel/random/boot_id", check=True)
        yield machine


@pytest.fixture
def bare(machine: Machine) -> Iterator[Machine]:
    """The same without debug info: nothing in the guest has DWARF."""
    machine.run(HIDE, check=True)
    try:
        yield machine
    finally:
        machine.run(SHOW, check=True)


def has_luo(machine: Machine) -> bool:
    return machine.run("test -e /dev/liveupdate").returncode == 0


def documents(run: Any, luo: bool) -> dict[str, Any]:
    commands = (*COMMANDS, "luo") if luo else COMMANDS
    found = {command: json.loads(run(command, "--json")) for command in commands}
    for document in found.values():
        for name in TIMES:
            document.pop(name, None)
    # What is free changes all the time.
    for area in found["status"]["scratch"]:
        area.pop("free")
    return found


def in_guest(machine: Machine, types: str) -> dict[str, Any]:
    """
    :param types: what khoscope says that it has them from.
    """

    def run(*words: str) -> str:
        result = machine.run(("khoscope", "-v", *words), timeout=TIMEOUT)
        assert result.returncode in (0, 1), result
        assert result.stderr.startswith(f"khoscope: types: {types}"), result
        return result.stdout

    return documents(run, has_luo(machine))


def test_the_guest_needs_no_vmlinux(machine: Machine, request: pytest.FixtureRequest) -> None:
    with_dwarf = in_guest(machine, "DWARF")
    request.getfixturevalue("bare")
    without = in_guest(machine, "BTF (khoscope), /sys/kernel/btf/vmlinux\n")
    for command in with_dwarf:
        assert without[command] == with_dwarf[command], command
    if "luo" in with_dwarf:
        (session,) = with_dwarf["luo"]["outgoing"]["sessions"]
        assert [file["memfd"]["pages"] for file in session["files"]] == [1, 0]
    assert len(with_dwarf["tree"]["blocks"]) > 20


def test_the_host_needs_no_vmlinux(machine: Machine) -> None:
    """Over QMP, BTF and kallsyms are read out of the guest's memory."""
    qemu = ("--qemu", str(machine.qmp_socket))
    vmlinux = ("--vmlinux", str(machine.kernel.share / "vmlinux"))

    def run(*where: str) -> dict[str, Any]:
        def one(command: str, *options: str) -> str:
            status = int(command == "verify" and failing(machine))
            return host(*where, command, *options, status=status)

        return documents(one, has_luo(machine))

    assert run(*qemu) == run(*qemu, *vmlinux)


def failing(machine: Machine) -> bool:
    """Whether verify finds errors: unsplit memory on unpatched kernels, types not stored."""
    return not machine.kernel.name.endswith("-fixed")


def test_hidden_symbols(bare: Machine) -> None:
    """What no address can be known of is not read: two lines, and how to mend it."""
    bare.run("sysctl -qw kernel.kptr_restrict=2", check=True)
    try:
        result = bare.run(("khoscope", "tree"), timeout=TIMEOUT)
    finally:
        bare.run("sysctl -qw kernel.kptr_restrict=0", check=True)
    assert result.returncode == 2
    assert result.stdout == ""
    what, hint = result.stderr.splitlines()
    assert "kernel.kptr_restrict" in what
    assert "kernel.kptr_restrict=1" in hint
    # That much root may see.
    bare.run("sysctl -qw kernel.kptr_restrict=1", check=True)
    guest(bare, "tree")


# Types


def structures(prog: Program) -> Iterator[tuple[str, Type]]:
    """COMPARED structures, from the seeds on to whatever their members are made of."""
    names = deque(f"struct {name}" for name in SEEDS)
    seen = set(names)
    count = 0
    while count < COMPARED:
        name = names.popleft()
        try:
            type_ = prog.type(name)
        except LookupError:
            # Not in this kernel, or only ever pointed to.
            continue
        if not type_.is_complete():
            continue
        count += 1
        yield name, type_
        for inner in made_of(type_):
            if inner not in seen:
                seen.add(inner)
                names.append(inner)


def made_of(type_: Type) -> Iterator[str]:
    for member in type_.members or ():
        inner = member.type
        while inner.kind in (TypeKind.POINTER, TypeKind.ARRAY, TypeKind.TYPEDEF):
            inner = inner.type
        if inner.kind in (TypeKind.STRUCT, TypeKind.UNION):
            if inner.tag is None:
                yield from made_of(inner)
            else:
                yield f"{'struct' if inner.kind == TypeKind.STRUCT else 'union'} {inner.tag}"


def described(type_: Type) -> list[Any]:
    """Of every member, those of members without a name among them: name, where, and what."""
    found: list[Any] = [type_.kind, sizeof(type_)]
    for member in type_.members or ():
        kind = member.type
        complete = kind.kind not in (TypeKind.FUNCTION, TypeKind.VOID) and (
            kind.is_complete() if kind.kind in (TypeKind.STRUCT, TypeKind.UNION) else True
        )
        flexible = kind.kind == TypeKind.ARRAY and not kind.length
        size = sizeof(kind) if complete and not flexible else None
        # BTF does not tell [0] from [].
        name = kind.type_name().replace("[0]", "[]")
        found.append((member.name, member.bit_offset, member.bit_field_size, kind.kind, name, size))
        if member.name is None:
            found.append(described(kind))
    return found


def test_every_member_is_where_dwarf_has_it(machine: Machine) -> None:
    vmlinux = machine.kernel.share / "vmlinux"
    # One tool at a time is served.
    dwarf = open_qemu(str(machine.qmp_socket), vmlinux)
    expected = [(name, described(type_)) for name, type_ in structures(dwarf)]
    constants = {e.name: e.value for e in dwarf.type("enum pageflags").enumerators or ()}
    assert debug_info(dwarf).kind == "DWARF"
    del dwarf
    other = open_qemu(str(machine.qmp_socket))
    assert debug_info(other).kind == "BTF (khoscope)"
    assert len(expected) == COMPARED
    for name, members in expected:
        assert described(other.type(name)) == members, name
    for name, value in constants.items():
        assert other[name].value_() == value


ONE = one_of_each_series()[-1:]


@pytest.mark.parametrize("machine", ONE, indirect=True)
def test_drgns_own_helpers(machine: Machine) -> None:
    """After register() all of drgn works; types of modules are there, too."""
    lines = [
        "from drgn import Program",
        "from drgn.helpers.linux import *",
        "from khoscope import btf",
        "prog = Program()",
        "prog.set_kernel()",
        "print(btf.register(prog))",
        "print(prog['init_task'].comm.string_().decode())",
        "print('qemu-ga' in {t.comm.string_().decode() for t in for_each_task(prog)})",
        "print([m.name.string_().decode() for m in for_each_module(prog)])",
        "print(prog['kho_preserve_pages'].type_.type_name())",
        "print([m.name for m in prog.type('struct scenario').members][:2])",
    ]
    machine.run("cat > /run/script.py", input="\n".join([*lines, ""]).encode(), check=True)
    run = "PYTHONPATH=/khoscope python3 /run/script.py"
    said = machine.run(run, timeout=TIMEOUT, check=True).stdout.splitlines()
    assert said == [
        "('khoscope', '/sys/kernel/btf/vmlinux')",
        "swapper/0",
        "True",
        "['kho_exercise']",
        "int (struct page *page, unsigned long nr_pages)",
        "['name', 'kind']",
    ]


@pytest.mark.parametrize("machine", ONE, indirect=True)
def test_snapshots_and_traces(bare: Machine) -> None:
    guest(bare, "snapshot", "/run/btf.khosnap")
    tree = json.loads(guest(bare, "--snapshot", "/run/btf.khosnap", "tree", "--json"))
    live = json.loads(guest(bare, "tree", "--json"))
    assert tree["blocks"] == live["blocks"]
    with Trace(bare, "btf", "--json", command=("khoscope", "-v", "trace")) as trace:
        Exercise(bare).preserve("contig")
    assert "khoscope: types: BTF (khoscope)" in trace.errors()
    traced = json.loads(trace.output())
    assert traced["schema"] == "khoscope.trace/1"
    assert traced["summary"]["total"]["functions"]["kho_preserve_pages"]["calls"] == 4


# Trees that are not KHO's

#: What stands for nothing that the page allocator could know of: no order bit, or too many pages.
KEYS = [0x0, 0x7, 0x1234_5678, 0xABC_DEF0_1234, 0x1F_FFFF_FFFF_FFFF]


@pytest.mark.parametrize(
    "machine", [name for name in one_of_each_series() if series(name) == "7.3"], indirect=True
)
def test_keys_that_are_no_blocks(machine: Machine) -> None:
    """On kernels that take bare keys the module has such a tree."""
    for key in KEYS:
        machine.run(f"echo {key:#x} > /sys/kernel/debug/kho_exercise/keys", check=True)
    where = (*machine.source, "tree", "--root", "kho_exercise_keys", "--raw-keys")
    found = json.loads(host(*where, "--json"))
    assert [int(row["key"], 16) for row in found["keys"]] == KEYS
    assert found["bad_entries"] == 0
    lines = host(*where, "--jsonl").splitlines()
    assert [int(json.loads(line)["key"], 16) for line in lines] == KEYS
    text = host(*where)
    assert "5 keys" in text
    assert "0x00000abcdef01234" in text
    # What KHO hands over is as it was.
    host(*machine.source, "verify")
