# SPDX-License-Identifier: LGPL-2.1-or-later
"""
As wrong as a kernel lets itself be: which rules fire on it, and whose memory they name.

What fires on each kind of memory across a kexec is in test_scenario.py, that nothing fires without
a reason in test_clients.py.  What no kernel lets itself do is done to snapshots in the unit tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.vm.test_khoscope import COST, guest, host, khoscope
from vm.exercise import Damage, Exercise, Piece
from vm.kernel import find
from vm.luo import Memfd, hold, retrieve
from vm.machine import Machine
from vm.scenario import MANY

PAGE = 4096
#: The ISA hole: struct pages are there, memory is not.
HOLE = 0xA0000


class Look:
    """The exercise module in a running machine, and khoscope that looks into it from the host."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.exercise = Exercise(machine)
        self.source = machine.source

    def ask(self, *words: str, status: int = 0) -> Any:
        """The JSON that a command prints."""
        return json.loads(host(*self.source, *words, "--json", status=status))

    def verify(self, *options: str, status: int = 0) -> list[Any]:
        """The findings, but for what KHO costs."""
        findings: list[Any] = self.ask("verify", *options, status=status)["findings"]
        return [found for found in findings if found["rule"] not in COST]

    @contextmanager
    def made(self, scenario: str, number: int | None = None) -> Iterator[list[Piece]]:
        """A scenario, as long as it is looked at."""
        self.exercise.preserve(scenario, number)
        yield [
            p for p in self.exercise.report() if p.scenario == scenario and p.state == "preserved"
        ]
        self.exercise.free(scenario)


def rules(findings: list[Any]) -> set[str]:
    return {found["rule"] for found in findings}


def of(findings: list[Any], rule: str) -> list[Any]:
    return [found for found in findings if found["rule"] == rule]


def said(findings: list[Any], rule: str) -> str:
    """All that a rule has to say, a line each."""
    return "\n".join(found["message"] for found in of(findings, rule))


def phys(piece: Piece) -> str:
    return f"{piece.ranges[0][0]:#x}"


# -- before a kexec ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed() -> Iterator[Look]:
    """
    A kernel with an image for the next one, in which nothing is wrong.

    The tests leave it so: each says all the rules that fire, so that none is left from another.
    """
    with Machine("7.2-fixed") as machine:
        look = Look(machine)
        look.exercise.load()
        machine.load_kexec()
        yield look


def test_images(fixed: Look) -> None:
    machine = fixed.machine
    machine.run("kexec -u", check=True)
    findings = fixed.verify()
    assert [(f["rule"], f["severity"]) for f in findings] == [("no-image", "info")]
    machine.load_kexec(handover=False)
    findings = fixed.verify(status=1)
    assert [(f["rule"], f["severity"]) for f in findings] == [("image-without-kho", "error")]
    assert "kexec_load()" in findings[0]["message"]
    machine.run("kexec -u", check=True)
    machine.load_kexec()
    assert fixed.verify() == []


def test_blobs_that_nobody_preserves(fixed: Look) -> None:
    (scratch, _), *_ = fixed.exercise.scratch_areas()
    with fixed.made("blob-lost") as [lost], fixed.made("blob-at", scratch) as [at]:
        findings = fixed.verify(status=1)
        # Once as a user sees it.
        text = guest(fixed.machine, "verify", status=1)
    assert rules(findings) == {"blob-not-preserved", "in-scratch"}
    for piece in (lost, at):
        assert repr(piece.subtree) in said(findings, "blob-not-preserved")
    assert {f["phys"] for f in of(findings, "blob-not-preserved")} == {phys(lost), phys(at)}
    (finding,) = of(findings, "in-scratch")
    assert finding["phys"] == f"{scratch:#x}"
    assert repr(at.subtree) in finding["message"]
    assert text.splitlines()[-1].startswith("FAIL: not safe to kexec: blob-not-preserved (")


def test_a_blob_in_the_fdt(fixed: Look) -> None:
    """The kernel takes the root FDT's own page for a subtree's blob."""
    fdt = int(fixed.ask("fdt")["fdt"]["phys"], 16)
    with fixed.made("blob-at", fdt) as [at]:
        (finding,) = fixed.verify(status=1)
    assert (finding["rule"], finding["phys"]) == ("bad-fdt", f"{fdt:#x}")
    assert repr(at.subtree) in finding["message"]
    assert "lies in the FDT itself" in finding["message"]


def test_two_owners_of_the_same_pages(fixed: Look) -> None:
    """A subtree whose blob lies in a memfd; what sound clients have is nobody else's."""
    held = hold(fixed.machine, "two", {1: Memfd(3 * PAGE), 2: Memfd(3 * PAGE)})
    assert fixed.verify() == []
    (first, _), *_ = held.files[2].ranges
    with fixed.made("blob-at", first) as [at]:
        (finding,) = fixed.verify(status=1)
    held.let_go()
    assert (finding["rule"], finding["phys"]) == ("claimed-twice", f"{first:#x}")
    assert finding["message"] == (
        f"subtree {at.subtree} and memfd 0x2 of session two: data lead to the same page"
    )


def test_a_full_fdt(fixed: Look) -> None:
    with fixed.made("blob", 200) as blobs:
        (finding,) = fixed.verify()
        fixed.verify("--fail-on", "warning", status=1)
    assert (finding["rule"], finding["severity"]) == ("fdt-nearly-full", "warning")
    others = ("LUO", "kho_test", "kexec-metadata", "kho_exercise")
    assert f"by {len(blobs) + len(others)} subtrees" in finding["message"]


def test_a_block_that_the_allocator_has_none_of(fixed: Look) -> None:
    with fixed.made("huge") as [huge]:
        (finding,) = fixed.verify()
    assert (finding["rule"], finding["severity"]) == ("huge-order", "warning")
    assert finding["phys"] == phys(huge)
    assert finding["order"] == 11


def test_where_there_is_no_memory(fixed: Look) -> None:
    """The kernel goes by its struct pages; three blocks, in one another."""
    with fixed.made("scratch", HOLE):
        findings = fixed.verify(status=1)
    assert rules(findings) == {"outside-ram", "overlap"}
    assert {f["phys"] for f in findings} == {f"{HOLE:#x}"}
    assert {f["order"] for f in of(findings, "outside-ram")} == {0, 1, 2}


def test_blocks_that_share_pages(fixed: Look) -> None:
    with fixed.made("contig") as pieces:
        (four_pages,) = (p for p in pieces if p.pages == 4)
        with fixed.made("scratch", four_pages.ranges[0][0]):
            findings = fixed.verify(status=1)
    assert rules(findings) == {"overlap"}
    assert {f["phys"] for f in findings} == {phys(four_pages)}
    assert {f["order"] for f in findings} == {0, 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("loop", "was there before: the chain loops"),
        ("outside-ram", "the chain goes on after 3 chunks"),
        ("unpreserved", "vmalloc pages: 1 page is not preserved"),
        ("too-many", "lists 1100 pages, total_pages is 1099"),
        ("too-few", "lists 1100 pages, total_pages is 1101"),
    ],
)
def test_broken_chains(fixed: Look, damage: Damage, message: str) -> None:
    """Nothing leads to the module's own area: who knows its address asks for it."""
    with fixed.made("vmalloc", 1100) as [area]:
        assert area.descriptor is not None
        ask = ("vmalloc", f"{area.descriptor:#x}")
        assert fixed.ask(*ask)["findings"] == []
        fixed.exercise.damage("vmalloc", damage)
        (finding,) = fixed.ask(*ask)["findings"]
    assert (finding["rule"], finding["severity"]) == ("broken-vmalloc", "error")
    assert message in finding["message"]
    first, _ = area.ranges[0]
    assert int(finding["phys"], 16) == (first if damage == "unpreserved" else area.descriptor)


@pytest.mark.parametrize("kernel", ["7.2-base", "7.2-rfc"])
def test_the_next_kernel_takes_something_else(fixed: Look, kernel: str) -> None:
    built = find(kernel)
    assert built is not None, f"{kernel} is not built: python -m vm build"
    (finding,) = fixed.verify("--next", str(built.share / "bzImage"), status=1)
    assert (finding["rule"], finding["severity"]) == ("image-abi-differs", "error")
    assert finding["message"] == (
        f"{built.release} takes kho-v4, this kernel hands over kho-v5: "
        "it boots as if nothing was handed over"
    )


def test_the_next_kernel_takes_it(fixed: Look) -> None:
    text = guest(fixed.machine, "verify", "--next", "/kernel/bzImage")
    assert text.splitlines()[-1] == "PASS: safe to kexec (0 errors, 1 warning)"


def test_the_image_that_is_loaded(fixed: Look) -> None:
    """In the guest and from its host: what the file says, and the command line."""
    machine = fixed.machine
    machine.load_kexec(append='dyndbg="file kho.c +p" x=1')
    line = " ".join(machine.command_line()).replace("khoscope.boot=1", "khoscope.boot=2")
    text = guest(machine, "verify", "--next", "loaded")
    release = machine.kernel.release
    said = " ".join(text.split())
    assert f"next kernel: as loaded, {release}, bzImage (zstd), kho-v5, luo-v5, memfd-v2" in said
    assert f'its command line: {line} dyndbg="file kho.c +p" x=1 ' in said
    assert text.splitlines()[-1] == "PASS: safe to kexec (0 errors, 1 warning)"
    image = fixed.ask("verify", "--next", str(machine.kernel.share / "bzImage"))
    loaded = fixed.ask("verify", "--next", "loaded")
    assert loaded["next"].pop("command_line") == f'{line} dyndbg="file kho.c +p" x=1'
    assert image["next"].pop("command_line") is None
    assert loaded["next"].pop("path") == "loaded"
    assert image["next"].pop("path").endswith("/bzImage")
    assert loaded["next"] == image["next"]
    assert (loaded["findings"], loaded["verdict"]) == (image["findings"], image["verdict"])
    machine.load_kexec()


def test_its_initrd(fixed: Look) -> None:
    machine = fixed.machine
    words = "truncate -s 12345678 initrd; kexec -s -l /kernel/bzImage --initrd=initrd"
    machine.run(f"{words} --command-line='kho=on liveupdate=on'; rm initrd", check=True)
    assert fixed.ask("verify", "--next", "loaded")["next"]["initrd"] == 12_345_678
    machine.load_kexec()


def test_what_its_command_line_switches_off(fixed: Look) -> None:
    machine = fixed.machine
    held = hold(machine, "vm", {1: Memfd(PAGE)})
    machine.load_kexec(append="kho=off liveupdate=0")
    text = host(*fixed.source, "verify", "--next", "loaded", status=1)
    assert text.splitlines()[-1].startswith("FAIL: not safe to kexec: next-without-kho (2 errors")
    findings = fixed.verify("--next", "loaded", status=1)
    assert rules(findings) == {"next-without-kho", "next-without-liveupdate"}
    assert "has kho=off on its command line" in said(findings, "next-without-kho")
    assert said(findings, "next-without-liveupdate").endswith("can retrieve the session")
    # Nobody says so, and whether it is on by default no image tells.
    machine.run("kexec -s -l /kernel/bzImage --command-line=liveupdate=on", check=True)
    found = fixed.ask("verify", "--next", "loaded", status=3)
    assert [f for f in found["findings"] if f["rule"] not in COST] == []
    (told,) = found["incomplete"]
    assert "no image tells its default" in told
    held.let_go()
    machine.run("kexec -u", check=True)
    result = khoscope(*fixed.source, "verify", "--next", "loaded")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("khoscope: no kexec image is loaded\n")
    # The program that has loaded it made the same segments; it hands nothing over.
    machine.load_kexec(handover=False)
    assert rules(fixed.verify("--next", "loaded", status=1)) == {"image-without-kho"}
    machine.load_kexec()


def test_without_its_debugging_kho_takes_scratch() -> None:
    with Machine("7.2-nodebug") as machine:
        look = Look(machine)
        look.exercise.load()
        (first, end), *_ = look.exercise.scratch_areas()
        machine.load_kexec()
        with look.made("scratch", first):
            findings = look.verify(status=1)
        assert look.verify() == []
    # Whose pages these are now is somebody else's business: they may be free.
    assert {f["order"] for f in of(findings, "in-scratch")} == {0, 1, 2}
    for finding in of(findings, "in-scratch"):
        assert finding["phys"] == f"{first:#x}"
        assert f"{first:#x}..{end:#x}" in finding["message"]


# -- across a kexec ---------------------------------------------------------------------------


def test_it_boots_as_if_nothing_was_handed_over(tmp_path: Path) -> None:
    """What image-abi-differs says, and what then becomes of it."""
    snapshot = tmp_path / "before.khosnap"
    with Machine("7.2-fixed", "7.2-base") as machine:
        look = Look(machine)
        look.exercise.load()
        look.exercise.preserve("contig")
        machine.load_kexec("7.2-base")
        image = "/run/next-7.2-base/bzImage"
        refused = guest(machine, "verify", "--next", image, status=1)
        assert "boots as if nothing was handed over" in " ".join(refused.split())
        host(*look.source, "snapshot", str(snapshot))
        machine.execute_kexec()
        vmlinux = str(machine.kernels["7.2-base"].share / "vmlinux")
        source = ("--qemu", str(machine.qmp_socket), "--vmlinux", vmlinux)
        found = json.loads(host(*source, "verify", "--before", str(snapshot), "--json", status=1))
    assert "not handed anything" in said(found["findings"], "not-a-handover")
    assert set(found["fates"]) == {"lost"}


@dataclass
class Story:
    """What was seen of a kernel that hands over something else than the snapshot has."""

    #: The module's pieces when the snapshot was taken.
    pieces: list[Piece] = field(default_factory=list)
    #: The blocks that the snapshot has.
    recorded: list[Any] = field(default_factory=list)
    #: Those that came later.
    late: list[Piece] = field(default_factory=list)
    #: Findings by stage.
    findings: dict[str, list[Any]] = field(default_factory=dict)
    text: str = ""


KEPT, GONE = "kept", "gone, é"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    seen = Story()
    snapshot = tmp_path_factory.mktemp("rules") / "before.khosnap"
    with Machine("7.2-fixed") as machine:
        look = Look(machine)
        exercise = look.exercise
        exercise.load()
        for scenario in ("wrong-call", "blob", "contig"):
            exercise.preserve(scenario)
        hold(machine, KEPT, {1: Memfd(3 * PAGE), 2: Memfd(PAGE)})
        gone = hold(machine, GONE, {7: Memfd(PAGE), 8: Memfd(PAGE)})
        seen.pieces = exercise.report()
        host(*look.source, "snapshot", str(snapshot))
        seen.recorded = [
            json.loads(line)
            for line in host("--snapshot", str(snapshot), "tree", "--jsonl").splitlines()
        ]
        machine.copy_in(snapshot, "/root/before.khosnap")
        gone.let_go()
        exercise.free("blob")
        # More than the page allocator can give back of what has just been let go.
        exercise.preserve("many", MANY)
        seen.late = [p for p in exercise.report() if p.scenario == "many"]
        machine.load_kexec()
        machine.execute_kexec()

        before = ("--before", str(snapshot))
        seen.findings["handed over"] = look.verify(*before, status=1)
        # Whoever opens it has the kernel read what LUO was handed.
        machine.run(": >/dev/liveupdate", check=True)
        seen.findings["read by LUO"] = look.verify(*before, status=1)
        exercise.load()
        for scenario in ("contig", "many", "wrong-call"):
            exercise.restore(scenario)
        assert all(file.same for file in retrieve(machine, KEPT, [1, 2]).values())
        seen.findings["retrieved"] = look.verify(*before, status=1)
        seen.text = guest(machine, "verify", "--before", "/root/before.khosnap", status=1)
    return seen


def test_what_did_not_come(story: Story) -> None:
    """A subtree, a session and their memory that were there when the snapshot was taken."""
    findings = story.findings["handed over"]
    (blob,) = (p for p in story.pieces if p.scenario == "blob")
    lost = said(findings, "lost")
    assert f"subtree {blob.subtree!r} was not handed over" in lost
    assert f"session {GONE!r} (2 files) was not handed over" in lost
    assert KEPT not in lost
    # Once LUO has read it all, what it does not have may as well be finished.
    assert GONE not in said(story.findings["read by LUO"], "lost")


def test_what_nobody_has_retrieved(story: Story) -> None:
    for stage in ("handed over", "read by LUO"):
        orphans = said(story.findings[stage], "orphaned-session")
        assert f"session {KEPT!r} (2 files) came, and nobody has retrieved it" in orphans
        # Its memory is named, too.
        assert f"memfd 0x1 of session {KEPT}" in said(story.findings[stage], "not-restored")
    for rule in ("orphaned-session", "not-restored"):
        assert KEPT not in said(story.findings["retrieved"], rule)


def test_what_the_snapshot_does_not_have(story: Story) -> None:
    late = {first for piece in story.late for first, _ in piece.ranges}
    assert len(late) == MANY
    # What was let go after the snapshot is free to be handed out again: those pages it knows.
    known = {
        page
        for block in story.recorded
        for page in (int(block["phys"], 16) + n * PAGE for n in range(block["pages"]))
    }
    pages = {f"{page:#x}" for page in late - known}
    assert len(pages) > MANY / 2
    assert pages <= {f["phys"] for f in of(story.findings["handed over"], "unexpected")}
    assert not pages & {f["phys"] for f in of(story.findings["retrieved"], "unexpected")}


def test_the_kernel_complains(story: Story) -> None:
    """KHO refuses to restore a block as something else, and warns of it."""
    assert "kernel-tainted" not in rules(story.findings["handed over"])
    assert "kho_restore_page" in said(story.findings["retrieved"], "kernel-tainted")


def test_the_last_line_says_it(story: Story) -> None:
    (blob,) = (p for p in story.pieces if p.scenario == "blob")
    assert f"'{blob.subtree}'" in story.text
    assert story.text.splitlines()[-1].startswith("FAIL: not intact: lost (")
