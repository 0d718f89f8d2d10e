# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The subcommand `fossil`: vmcores of a real kernel, small enough for the repository.

A fossil is what is left of a dump of a guest's memory when all pages are gone that khoscope does
not read. There are two of each kernel: before its kexec, with everything preserved and the image
loaded, and after the kexec, when some of the memory has been restored. They are ELF vmcores with
QEMU's own notes, and hold the kernel's BTF and symbols, so nothing else is needed to open them.

tests/test_fossils.py runs the commands below on them.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from drgn import MissingDebugInfoError, Object, Program
from drgn.helpers.linux.mm import phys_to_page

from khoscope import helpers as kho
from khoscope.cli import parser_for, perform
from khoscope.sources import btf
from khoscope.sources.open import open_core
from vm.exercise import SCENARIOS, Exercise, Unsupported, by_scenario
from vm.luo import Memfd, hold, retrieve
from vm.machine import REPOSITORY, Machine, MachineError
from vm.scenario import preserve, restore
from vm.vmcore import Vmcore

#: The archives: one of each kernel, because its two vmcores have much in common.
FOSSILS = REPOSITORY / "tests" / "fossils"
SUFFIX = ".tar.xz"

#: MiB, and scratch areas that are just large enough to load a kernel into. Of 7.2's own choice,
#: they would take more than half of this memory.
_MEMORY, _SCRATCH = 320, "kho_scratch=16M,64M,16M"

#: Pages of the scenario ``many``. They are freed after the kexec.
_MANY = 8

#: LUO sessions: retrieved after the kexec, retrieved by nobody, gone before the kexec.
_RETRIEVED = {1: Memfd(64 << 10), 2: Memfd(2 << 20, thp=True)}
_KEPT = {7: Memfd(12 << 10)}
_GONE = {8: Memfd(8 << 10)}

#: What the archive's file of this name has is a :class:`Places`.
PLACES = "places.json"

#: khoscope's commands on a vmcore, by a name for each. A command may refuse what its kernel does
#: not have. Words in braces stand for all :class:`Places` of that name, one after the other.
COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "status": ("status",),
    "scratch": ("scratch",),
    "tree": ("tree", "--nodes"),
    "blocks": ("tree", "--jsonl", "--order", "2"),
    "keys": ("tree", "--raw-keys", "--jsonl"),
    "incoming": ("tree", "--incoming"),
    "serialized": ("tree", "--serialized"),
    "root": ("tree", "--root", "kho_out.radix_tree", "--jsonl", "--order", "1"),
    "owners": ("owners",),
    "pages": ("pages", "{pages}", "--jsonl"),
    "fdt": ("fdt",),
    "fdt-in": ("fdt", "in"),
    "luo": ("luo",),
    "vmalloc": ("vmalloc", "{vmallocs}"),
    "verify": ("verify",),
}
_BEFORE, _AFTER = "before.khosnap", "after.khosnap"
#: Further ones, by stage, in this order: those of the later stage read the snapshots.
OF_STAGE: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "before": {"snapshot": ("snapshot", _BEFORE)},
    "after": {
        "snapshot": ("snapshot", "--before", _BEFORE, _AFTER),
        "arrival": ("verify", "--before", _BEFORE),
        "diff": ("diff", _BEFORE, _AFTER),
    },
}
#: The two vmcores of a kernel, by their names in the archive.
STAGES: Final = tuple(OF_STAGE)


@dataclass(frozen=True)
class Places:
    """Addresses in the guest to look at, as words for khoscope."""

    #: The first pages of a piece of memory of each scenario.
    pages: tuple[str, ...]
    #: ``struct kho_vmalloc``: only the kernel that has handed them over has them.
    vmallocs: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> Places:
        fields: dict[str, list[str]] = json.loads(path.read_text())
        return cls(tuple(fields["pages"]), tuple(fields["vmallocs"]))


def fossil(name: str, accel: str | None = None) -> int:
    """Make the fossils of a kernel, and replace its archive in the repository."""
    with tempfile.TemporaryDirectory(prefix="khoscope-fossil-") as made:
        whole, kept = Path(made, "whole"), Path(made, "kept")
        for directory in (whole, kept):
            directory.mkdir()
        vmlinux, places = _dump(name, whole, accel)
        for stage in STAGES:
            with Vmcore(whole / stage) as core:
                _look(core, places, whole, vmlinux)
                core.keep(core.read, kept / stage)
            _note(f"{stage}: {len(core.read)} pages are read")
        _compare(whole, kept, places, vmlinux)
        (kept / PLACES).write_text(json.dumps(asdict(places), indent=1) + "\n")
        packed = Path(made, f"{name}{SUFFIX}")
        _pack([kept / file for file in (*STAGES, PLACES)], packed)
        FOSSILS.mkdir(exist_ok=True)
        archive = Path(shutil.copy(packed, FOSSILS))
    print(f"{archive.stat().st_size:8} {archive.relative_to(REPOSITORY)}")
    print(f"next: python -m tests.test_fossils {name}")
    return 0


def unpack(archive: Path, to: Path) -> Places:
    """Put the two vmcores of an archive into a directory, named as in STAGES."""
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    return Places.load(to / PLACES)


# -- the guest ------------------------------------------------------------------------------------


def _dump(name: str, to: Path, accel: str | None) -> tuple[Path, Places]:
    """Dump the guest twice; return the kernel's vmlinux, and where to look."""
    with Machine(name, accel=accel, memory=_MEMORY, append=_SCRATCH) as machine:
        exercise = Exercise(machine)
        # The kernel makes its boot id when it is first asked for it.
        machine.run("cat /proc/sys/kernel/random/boot_id", check=True)
        has_luo = machine.run("test -e /dev/liveupdate").returncode == 0
        if has_luo:
            hold(machine, "retrieved", _RETRIEVED)
            hold(machine, "kept", _KEPT)
            gone = hold(machine, "gone", _GONE)
        made = preserve(exercise, [scenario for scenario in SCENARIOS if scenario != "many"])
        with contextlib.suppress(Unsupported):
            exercise.preserve("blob")
            made.append("blob")
        exercise.preserve("many", _MANY)
        pieces = by_scenario(exercise.report())
        machine.load_kexec()
        _note("dump before the kexec")
        machine.dump(to / STAGES[0])
        if has_luo:
            gone.let_go()
        _note("kexec")
        machine.execute_kexec()
        machine.run("cat /proc/sys/kernel/random/boot_id", check=True)
        exercise.load()
        restore(exercise, [*made, "many"])
        exercise.free("many")
        if has_luo:
            retrieve(machine, "retrieved", _RETRIEVED)
        _note("dump after the kexec")
        machine.dump(to / STAGES[1])
        vmlinux = machine.kernel.share / "vmlinux"
    every = [piece for of_one in pieces.values() for piece in of_one]
    first = [of_one[-1].ranges[0] for of_one in pieces.values() if of_one[-1].ranges]
    return vmlinux, Places(
        tuple(f"{start:#x}..{end:#x}" for start, end in first),
        tuple(f"{piece.descriptor:#x}" for piece in every if piece.descriptor),
    )


# -- what is read, and what is said ---------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What khoscope said when it was run with some words, without what differs in each run."""

    words: tuple[str, ...]
    status: int
    errors: str
    #: JSON: a document, or what ``--jsonl`` prints.
    documents: tuple[Any, ...]


#: Runs khoscope with some words, in this process, and returns the exit status.
Run = Callable[[list[str]], int]


def said(run: Run, stage: str, places: Places, directory: Path) -> Iterator[tuple[str, list[Said]]]:
    """What all commands say about a vmcore, by their names.

    :param directory: where the commands write snapshots, and read them
    """
    with contextlib.chdir(directory):
        for name, words in {**COMMANDS, **OF_STAGE[stage]}.items():
            yield name, [_say_it(run, argv) for argv in _filled(words, places)]


def _filled(words: Sequence[str], places: Places) -> Iterator[list[str]]:
    """The words of a command, once for each place that it is to look at."""
    for name, values in asdict(places).items():
        if f"{{{name}}}" in words:
            at = words.index(f"{{{name}}}")
            yield from ([*words[:at], value, *words[at + 1 :]] for value in values)
            return
    yield list(words)


def _say_it(run: Run, words: list[str]) -> Said:
    out, errors = io.StringIO(), io.StringIO()
    as_json = [] if "--jsonl" in words else ["--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = run([*words, *as_json])
    lines = out.getvalue().splitlines() if "--jsonl" in words else [out.getvalue()]
    documents = tuple(_neutral(json.loads(line)) for line in lines if line)
    return Said(tuple(words), status, errors.getvalue(), documents)


def _neutral(document: Any) -> Any:
    """Without time and place, and without what explains rules rather than tells of this kernel."""
    if isinstance(document, list):
        return [_neutral(each) for each in document]
    if not isinstance(document, dict):
        return document
    left_out = {"taken", "rules", "explain"}
    # The size of a snapshot depends on its time and place.
    if document.get("schema", "").startswith("khoscope.snapshot/"):
        left_out.add("bytes")
    return {key: _neutral(value) for key, value in document.items() if key not in left_out}


def in_session(prog: Program) -> Run:
    """khoscope as ``%kho`` of a drgn session."""
    return lambda argv: perform(parser_for(prog), argv)


def helped(prog: Program) -> dict[str, Any]:
    """What khoscope's helpers give in a drgn session, as JSON."""
    out = prog["kho_out"]
    has_tree = out.type_.has_member("radix_tree")
    blocks = list(kho.kho_radix_tree_for_each(out.radix_tree)) if has_tree else []
    pages = [phys_to_page(prog, block.phys) for block in blocks]
    areas = list(kho.kho_scratch_for_each(prog))
    return {
        "enabled": kho.kho_is_enabled(prog),
        "KHO boot": kho.is_kho_boot(prog),
        "blocks": len(blocks),
        "restored": sum(map(kho.kho_restored, pages)),
        "with a stamp": sum(kho.kho_page_info(page) is not None for page in pages),
        "stamped": [[f"{b.phys:#x}", b.order] for b in kho.kho_for_each_stamped(prog)],
        "scratch": [[f"{area.addr.value_():#x}", int(area.size)] for area in areas],
        "sessions": {
            side: [session.name.string_().decode() for session in _sessions(prog, side)]
            for side in ("outgoing", "incoming")
        },
    }


def _sessions(prog: Program, side: str) -> Iterator[Object]:
    if "luo_session_global" in prog:
        yield from kho.luo_session_for_each(prog, incoming=side == "incoming")


def _look(core: Vmcore, places: Places, directory: Path, vmlinux: Path) -> None:
    """Have everything read that khoscope, its helpers and a session of drgn read."""
    for debug_info in ("BTF", "DWARF"):
        prog = core.program()
        # Without any debug info this reads which modules are loaded.
        with contextlib.suppress(MissingDebugInfoError):
            prog.load_default_debug_info()
        if debug_info == "DWARF":
            prog.load_debug_info([vmlinux], main=True)
        else:
            btf.register(prog)
        deque(said(in_session(prog), core.path.name, places, directory), maxlen=0)
        helped(prog)


def _compare(whole: Path, kept: Path, places: Places, vmlinux: Path) -> None:
    """A fossil says what the whole dump says.

    :raise MachineError: if it does not
    """
    for stage in STAGES:
        for debug_info in (None, vmlinux):
            of_whole, of_kept = (
                dict(said(in_session(open_core(at / stage, debug_info)), stage, places, at))
                for at in (whole, kept)
            )
            wrong = [name for name in of_whole if of_whole[name] != of_kept[name]]
            if wrong:
                raise MachineError(f"{stage}: the fossil says something else: {', '.join(wrong)}")


def _pack(files: Iterable[Path], to: Path) -> None:
    """An archive of the files alone: nothing in it tells who made it, or when."""
    with tarfile.open(to, "w:xz", preset=9) as tar:
        for file in files:
            member = tarfile.TarInfo(file.name)
            member.size = file.stat().st_size
            with file.open("rb") as content:
                tar.addfile(member, content)


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
