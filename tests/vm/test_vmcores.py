# SPDX-License-Identifier: LGPL-2.1-or-later
"""
vmcores, from QEMU and from a crash kernel, ELF and kdump-compressed, without user pages: the whole
tree and all stamps, by DWARF and by the BTF in the vmcore itself.

What becomes of one without pages that it should have is in test_missing_pages.py.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.vm.test_khoscope import TIMEOUT, host
from vm.exercise import Exercise
from vm.machine import Machine

#: What makedumpfile makes of /proc/vmcore: without zero (1), cache (2, 4), user (8) and free (16)
#: pages.  What it takes for user pages on these kernels are some of the kernel's heap, too.
FORMATS = {"kdump": "-c -d 23", "lzo": "-l -d 23", "elf": "-E -d 23", "no-user": "-c -d 31"}
WHOLE = ("kdump", "lzo", "elf")


@dataclass
class Story:
    """A guest that was handed memory, then looked at, dumped, and crashed."""

    vmlinux: Path
    tree: Any = None
    verify: Any = None
    stamps: Any = None
    crash_image: Any = None
    core: Path = Path()
    flattened: Path = Path()
    #: By format.
    crashed: dict[str, Path] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("vmcores")
    with Machine("7.2-fixed", append="crashkernel=192M", memory=1536) as machine:
        story = Story(machine.kernel.share / "vmlinux")
        exercise = Exercise(machine)
        exercise.load()
        for name in ("contig", "split", "folio"):
            exercise.preserve(name)
        machine.load_kexec()
        machine.execute_kexec()
        # What came is stamped, and there is something to hand over again.
        exercise.load()
        for name in ("contig", "vmalloc"):
            exercise.preserve(name)
        machine.load_kexec(append="word=1")
        machine.load_crash_kernel()
        machine.run("cat /proc/sys/kernel/random/boot_id", check=True)
        # From here on nothing is to change.
        qemu = ("--qemu", str(machine.qmp_socket))
        story.tree = json.loads(host(*qemu, "tree", "--json"))
        story.verify = json.loads(host(*qemu, "verify", "--next", "loaded", "--json"))
        status = json.loads(host(*qemu, "status", "--json"))
        story.stamps, story.crash_image = status["unclaimed"], status["crash_image"]
        story.core = directory / "core"
        machine.dump(story.core)
        story.flattened = directory / "flattened"
        machine.qmp(
            "dump-guest-memory",
            timeout=300,
            paging=False,
            protocol=f"file:{story.flattened}",
            format="kdump-zlib",
        )
        machine.crash()
        for name, options in FORMATS.items():
            make = f"makedumpfile {options} /proc/vmcore /root/{name}"
            machine.run(make, timeout=TIMEOUT, check=True)
            story.crashed[name] = directory / name
            machine.copy_out(f"/root/{name}", story.crashed[name])
            machine.run(f"rm /root/{name}", check=True)
    yield story
    for path in (story.core, story.flattened, *story.crashed.values()):
        path.unlink()


def agrees(story: Story, core: Path, *options: str) -> None:
    """Tree, stamps, verdict and the image that is loaded are those of the running kernel."""
    where = ("--core", str(core), *options)
    tree = json.loads(host(*where, "tree", "--json"))
    for part in ("root", "totals", "blocks", "abi", "kernel", "unreadable"):
        assert tree[part] == story.tree[part], part
    found = json.loads(host(*where, "verify", "--next", "loaded", "--json"))
    for part in ("verdict", "counts", "blocks", "incomplete", "next"):
        assert found[part] == story.verify[part], part
    status = json.loads(host(*where, "status", "--json"))
    assert (status["unclaimed"], status["crash_image"]) == (story.stamps, story.crash_image)


def test_there_is_something_to_see(story: Story) -> None:
    assert len(story.tree["blocks"]) > 20
    assert sum(row["blocks"] for row in story.stamps) > 10
    assert story.verify["verdict"] == "pass"
    assert story.verify["next"]["command_line"].endswith(" word=1")
    assert story.crash_image == {
        "loaded": True,
        "file_mode": True,
        "kho_fdt": "0x0",
        "size": story.crash_image["size"],
    }
    assert story.crash_image["size"] > 8 << 20


def test_an_elf_from_qemu(story: Story) -> None:
    """By DWARF. By BTF, fossils are such vmcores."""
    agrees(story, story.core, "--vmlinux", str(story.vmlinux))


@pytest.mark.parametrize("kind", WHOLE)
def test_from_a_crash_kernel(story: Story, kind: str) -> None:
    """Without cached and free pages: KHO needs none of them. By the vmcore's own BTF."""
    core = story.crashed[kind]
    assert core.stat().st_size < story.core.stat().st_size // 4
    agrees(story, core)


def test_with_pages_of_the_kernel_missing(story: Story) -> None:
    """
    makedumpfile takes some of these kernels' own pages for user pages, others each time: resources,
    nodes of the tree.  What is there is shown, what is missing is said, and nothing passes.
    """
    where = ("--core", str(story.crashed["no-user"]))
    tree = json.loads(host(*where, "tree", "--json"))
    assert tree["root"] == story.tree["root"]
    blocks = [block for block in story.tree["blocks"] if block in tree["blocks"]]
    assert blocks == tree["blocks"]
    whole = tree["blocks"] == story.tree["blocks"]
    assert whole or tree["bad_entries"] > 0
    verdict = khoscope(*where, "verify")
    if tree["unreadable"] or not whole:
        assert "PASS" not in verdict.stdout
        assert verdict.returncode in (1, 2, 3)
    assert "Traceback" not in verdict.stderr


def test_a_kdump_from_qemu(story: Story, tmp_path: Path) -> None:
    """
    QEMU writes them flattened and without the kernel's name, by which libkdumpfile would know the
    architecture: refused, as they are and put in order.
    """
    for core in (story.flattened, rearranged(story.flattened, tmp_path / "kdump")):
        result = khoscope("--core", str(core), "tree")
        assert result.returncode == 2
        assert result.stdout == ""
        what, hint = result.stderr.splitlines()
        assert "not a vmcore that drgn can read" in what
        assert "makedumpfile" in hint


def rearranged(flattened: Path, to: Path) -> Path:
    """What makedumpfile -R does: records of offset, size (big endian) and data."""
    with open(flattened, "rb") as source, open(to, "wb") as target:
        source.seek(4096)
        while True:
            offset, size = struct.unpack(">qq", source.read(16))
            if offset < 0:
                return to
            target.seek(offset)
            target.write(source.read(size))


def khoscope(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "khoscope", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)


# A vmlinux without DWARF


def test_the_btf_of_a_vmlinux(story: Story, tmp_path: Path) -> None:
    """Stripped it will do, of another build it will not, nor with BTF that was written over."""
    stripped, broken, bare = (tmp_path / name for name in ("stripped", "broken", "bare"))
    objcopy(story.vmlinux, stripped, "--strip-debug")
    agrees(story, story.core, "--vmlinux", str(stripped))
    said = khoscope("--core", str(story.core), "--vmlinux", str(stripped), "-v", "tree")
    assert said.stderr == f"khoscope: types: BTF (khoscope), {stripped}\n"
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"\x9f\xeb\1\0" + bytes(1000))
    objcopy(stripped, broken, f"--update-section=.BTF={nonsense}")
    refused(story, broken, "BTF with a header of 0 bytes")
    objcopy(stripped, bare, "--remove-section=.BTF")
    refused(story, bare, "no BTF")
    refused(story, Path("/bin/true"), "another build")
    (tmp_path / "text").write_text("no ELF file at all")
    refused(story, tmp_path / "text", "build id")


def objcopy(source: Path, to: Path, *options: str) -> None:
    subprocess.run(["objcopy", *options, str(source), str(to)], check=True)


def refused(story: Story, vmlinux: Path, said: str) -> None:
    result = khoscope("--core", str(story.core), "--vmlinux", str(vmlinux), "tree")
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 2, result.stderr
    assert said in result.stderr
    assert result.stdout == ""
