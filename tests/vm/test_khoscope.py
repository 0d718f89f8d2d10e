# SPDX-License-Identifier: LGPL-2.1-or-later
"""
khoscope on real kernels, as a user types it: in the guest, from the host, on a vmcore.

What it says of each kind of memory is in test_scenario.py.  Here is that it says the same from
everywhere, on both sides of a kexec, and that it says clearly what it cannot do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vm.exercise import Exercise, Piece
from vm.kernel import one_of_each_series, series, what
from vm.machine import REPOSITORY, Machine, Result

#: Kinds of memory that come back right from the repaired kernels.
HEALTHY = ["contig", "split", "folio", "dma", "vmalloc", "vmalloc-huge"]
#: Those that come back right from kernels without patches.
HEALTHY_ON_BASE = ["split", "folio", "vmalloc", "vmalloc-huge"]
TIMEOUT = 300.0
#: Rules about what KHO costs, of which test_scratch.py speaks: they fire on any guest.
COST = {"phantom-cma", "kho-unused"}


def khoscope(*words: str) -> subprocess.CompletedProcess[str]:
    """Run khoscope on the host."""
    command = [sys.executable, "-m", "khoscope", *words]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )


def host(*words: str, status: int = 0) -> str:
    """Run khoscope on the host; its output."""
    result = khoscope(*words)
    assert result.returncode == status, (
        f"{words}: {result.returncode}\n{result.stderr}\n{result.stdout[-4000:]}"
    )
    return result.stdout


def guest(machine: Machine, *words: str, status: int = 0) -> str:
    """Run khoscope in the guest; its output."""
    result = machine.run(("khoscope", *words), timeout=TIMEOUT)
    assert result.returncode == status, f"{words}: {result.returncode}\n{result.stderr}"
    return result.stdout


@dataclass
class Story:
    """What was seen on the way of one machine through a kexec."""

    kernel: str
    pieces: list[Piece] = field(default_factory=list)
    restored: list[Piece] = field(default_factory=list)
    #: JSON documents by name.
    seen: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """base, rfc or fixed."""
        return what(self.kernel)

    @property
    def counts_kexecs(self) -> bool:
        """Whether this kernel tells the next one how many there were (linux 7.1)."""
        return series(self.kernel) != "6.18"


@pytest.fixture(scope="module", params=one_of_each_series())
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Preserve healthy memory, look, kexec, look, restore, look; from everywhere."""
    story = Story(request.param)
    directory = tmp_path_factory.mktemp(story.kernel)
    snapshot, core = directory / "before.khosnap", directory / "core"
    fixed = story.what == "fixed"
    with Machine(story.kernel, la57=story.what == "base") as machine:
        exercise = Exercise(machine)
        vmlinux = ("--vmlinux", str(machine.kernel.share / "vmlinux"))
        qemu = machine.source
        exercise.load()
        for name in HEALTHY:
            exercise.preserve(name)
        story.pieces = exercise.report()
        # Up to 7.0, a snapshot from before that lacks what is handed over.
        machine.finalize()
        # On the patched-as-posted and on the unpatched kernel some of it is an error, of course.
        wrong = 0 if fixed else 1
        story.seen["guest tree"] = json.loads(guest(machine, "tree", "--json"))
        story.seen["guest verify"] = json.loads(guest(machine, "verify", "--json", status=wrong))
        story.seen["qemu tree"] = json.loads(host(*qemu, "tree", "--json"))
        story.seen["qemu verify"] = json.loads(host(*qemu, "verify", "--json", status=wrong))
        machine.dump(core)
        try:
            at = ("--core", str(core), *vmlinux)
            story.seen["core tree"] = json.loads(host(*at, "tree", "--json"))
            story.seen["core verify"] = json.loads(host(*at, "verify", "--json", status=wrong))
            _truncated(core, vmlinux)
        finally:
            core.unlink()
        story.text["tree"] = host(*qemu, "tree", "--nodes")
        guest(machine, "snapshot", "/root/before.khosnap")
        machine.copy_out("/root/before.khosnap", snapshot)
        story.seen["snapshot tree"] = json.loads(
            host("--snapshot", str(snapshot), "tree", "--json")
        )

        machine.load_kexec()
        machine.execute_kexec()
        before = ("--before", str(snapshot))
        handed = 1 if story.what == "rfc" else 0
        story.seen["handed over"] = json.loads(
            host(*qemu, "verify", *before, "--json", status=handed)
        )
        exercise.load()
        for name in HEALTHY:
            exercise.restore(name)
        story.restored = exercise.report()
        in_guest = ("--before", "/root/before.khosnap")
        story.seen["guest after"] = json.loads(
            guest(machine, "verify", *in_guest, "--json", status=wrong)
        )
        story.seen["qemu after"] = json.loads(
            host(*qemu, "verify", *before, "--json", status=wrong)
        )
        story.text["incoming"] = host(*qemu, "tree", "--incoming")
        host(*qemu, "snapshot", *before, str(directory / "after.khosnap"))
        after = ("--snapshot", str(directory / "after.khosnap"))
        story.seen["offline after"] = json.loads(
            host(*after, "verify", *before, "--json", status=wrong)
        )
        story.seen["diff"] = json.loads(
            host("diff", str(snapshot), str(directory / "after.khosnap"), "--json")
        )
    return story


def _truncated(core: Path, vmlinux: tuple[str, ...]) -> None:
    """Half a vmcore: no traceback and no verdict."""
    half = core.with_name("half")
    try:
        with open(core, "rb") as whole, open(half, "wb") as part:
            part.write(whole.read(64 << 20))
        result = subprocess.run(
            [sys.executable, "-m", "khoscope", "--core", str(half), *vmlinux, "verify"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2, result
        assert len(result.stderr.splitlines()) == 2, result.stderr
        assert "PASS" not in result.stdout
    finally:
        half.unlink()


def _shell(machine: Machine) -> str:
    """The drgn session, on a terminal."""
    run = ("python3", "-c", "import pty; pty.spawn(['khoscope', 'shell'])")
    environment = {"PYTHON_BASIC_REPL": "1", "TERM": "dumb"}
    lines = b"print('enabled:', kho_is_enabled(prog))\nexit()\n"
    return machine.run(run, timeout=TIMEOUT, input=lines, env=environment, check=True).stdout


def test_every_source_sees_the_same_tree(story: Story) -> None:
    first = story.seen["guest tree"]
    for name in ("qemu tree", "core tree", "snapshot tree"):
        for part in ("root", "totals", "blocks", "abi"):
            assert story.seen[name][part] == first[part], (name, part)


def test_every_source_comes_to_the_same_verdict(story: Story) -> None:
    first = story.seen["guest verify"]
    for name in ("qemu verify", "core verify"):
        for part in ("verdict", "counts", "blocks"):
            assert story.seen[name][part] == first[part], (name, part)
        assert not_of_cost(story.seen[name]) == not_of_cost(first), name
    first = story.seen["guest after"]
    for name in ("qemu after", "offline after"):
        # Not the fates: pages that were restored and freed at boot change hands all the time.
        for part in ("verdict", "handover"):
            assert story.seen[name][part] == first[part], (name, part)
        assert errors(story.seen[name]) == errors(first), name


def not_of_cost(found: Any) -> list[Any]:
    """The findings but those that say how much is free, which changes all the time."""
    return [f for f in found["findings"] if f["rule"] not in COST]


def errors(found: Any) -> list[Any]:
    return [f for f in found["findings"] if f["severity"] == "error"]


def test_the_tree_is_what_the_module_preserved(story: Story) -> None:
    """Every page of every piece lies in exactly one block, and vice versa but for others'."""
    preserved = {
        page
        for block in story.seen["guest tree"]["blocks"]
        for page in range(
            int(block["phys"], 16) >> 12, (int(block["phys"], 16) >> 12) + block["pages"]
        )
    }
    for piece in story.pieces:
        assert piece.ret == 0
        pages = {p for first, end in piece.ranges for p in range(first >> 12, end >> 12)}
        assert len(pages) == piece.pages
        assert pages <= preserved, f"{piece} is not all in the tree"
    blocks = {(b["phys"], b["order"]): b for b in story.seen["guest tree"]["blocks"]}
    for piece in story.pieces:
        if piece.scenario in ("contig", "split"):
            order = piece.pages.bit_length() - 1
            block = blocks[f"{piece.ranges[0][0]:#x}", order]
            kinds = {"base": None, "rfc": "contig", "fixed": piece.scenario}
            assert block["type"] == kinds[story.what]


def test_the_text_is_for_people(story: Story) -> None:
    for name in ("tree", "incoming"):
        assert "\033" not in story.text[name]
        for line in story.text[name].splitlines():
            assert len(line) <= 80, line
    assert "evidence only" in story.text["incoming"]


def test_before_the_kexec(story: Story) -> None:
    found = story.seen["guest verify"]
    # On any of them: nothing is loaded yet, and nothing says how the module restores its folios.
    always = {"no-image": 1, "needs-folio-restore": 1}
    assert {name: found["counts"][name] for name in always} == always
    rules = found["counts"].keys() - always.keys() - COST
    assert (found["verdict"] == "pass") == (not rules) == (story.what == "fixed")


def test_after_the_kexec(story: Story) -> None:
    found = story.seen["handed over"]
    assert found["handover"]["is_kho_boot"]
    assert found["handover"]["kexec_count"] == (1 if story.counts_kexecs else None)
    assert found["fates"].get("lost", 0) == 0
    assert found["verdict"] == ("fail" if story.what == "rfc" else "pass")


def test_after_the_restore(story: Story) -> None:
    """What the module sees of its pages and what khoscope says of them is the same."""
    found = story.seen["guest after"]
    before = {(p.scenario, p.piece): p for p in story.pieces}
    restored = [p for p in story.restored if p.state == "restored"]
    assert len(restored) == len(story.pieces)
    changed = {
        f"{p.ranges[0][0]:#x}" for p in restored if p.shape != before[p.scenario, p.piece].shape
    }
    wrong = {f["phys"] for f in found["findings"] if f["rule"] == "wrong-refcounts"}
    assert wrong == changed
    assert bool(changed) == (story.what != "fixed")
    assert found["verdict"] == ("pass" if story.what == "fixed" else "fail")


def test_the_diff_knows_both_kernels(story: Story) -> None:
    facts = {f["what"]: (f["a"], f["b"]) for f in story.seen["diff"]["facts"]}
    assert facts["KHO boot"] == ("False", "True")
    assert facts.get("kexec count") == (("0", "1") if story.counts_kexecs else None)
    assert "boot id" in facts
    assert story.seen["diff"]["counts"]["removed"] > 0


@pytest.fixture(scope="module")
def odd() -> Iterator[Machine]:
    """A machine in which KHO is off."""
    with Machine("7.2-fixed", append="kho=off") as machine:
        yield machine


def _refused(result: Result, *said: str) -> None:
    assert result.returncode == 2, result
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    for words in said:
        assert words in result.stderr
    assert result.stdout == ""


def test_kho_is_off(odd: Machine) -> None:
    for command in ("tree", "snapshot /root/x.khosnap"):
        _refused(odd.run(f"khoscope {command}", timeout=TIMEOUT), "KHO is off", "kho=on")
    assert odd.run("test -e /root/x.khosnap").returncode == 1


def test_the_shell_has_the_helpers(odd: Machine) -> None:
    said = _shell(odd)
    assert "kho_radix_tree_for_each" in said
    assert "%kho" in said
    assert "enabled: False" in said


def test_not_root(odd: Machine) -> None:
    words = "setpriv --reuid 65534 --clear-groups khoscope tree"
    _refused(odd.run(words, timeout=TIMEOUT), "permission denied", "as root")


def test_no_debug_info(odd: Machine) -> None:
    """Without a vmlinux the kernel's BTF does, even if sysfs does not show it."""
    for paths in ("/usr/lib/debug", "/usr/lib/debug /sys/kernel/btf"):
        hide = "; ".join(f"mount -t tmpfs none {path}" for path in paths.split())
        run = f"unshare --mount sh -c '{hide}; khoscope -v tree'"
        hidden = odd.run(run, timeout=TIMEOUT)
        assert hidden.returncode == 2, hidden
        assert "BTF" in hidden.stderr.splitlines()[0]
        assert "KHO is off" in hidden.stderr
    wrong = odd.run("khoscope --vmlinux /bin/true tree", timeout=TIMEOUT)
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 2


def test_no_kexec_and_no_handover(tmp_path: Path) -> None:
    """A snapshot of this boot, then one of another machine: nothing came over, and it says so."""
    snapshot = tmp_path / "a.khosnap"

    def verify(machine: Machine) -> Any:
        where = machine.source
        return json.loads(host(*where, "verify", "--before", str(snapshot), "--json", status=1))

    with Machine("7.2-fixed") as machine:
        exercise = Exercise(machine)
        exercise.load()
        exercise.preserve("contig")
        # The kernel makes its boot id when it is first asked for it.
        machine.run("cat /proc/sys/kernel/random/boot_id", check=True)
        where = machine.source
        host(*where, "snapshot", str(snapshot))
        same = verify(machine)
    assert "this boot" in _message(same, "not-a-handover")
    with Machine("7.2-fixed") as machine:
        other = verify(machine)
    assert "not handed anything" in _message(other, "not-a-handover")
    recorded = sum(same["fates"].values())
    assert other["fates"] == {"lost": recorded}
    lost = [f for f in other["findings"] if f["rule"] == "lost"]
    assert len([f for f in lost if "order" in f]) == recorded
    assert {f["message"] for f in lost if "order" not in f} == {
        f"subtree {name!r} was not handed over"
        for name in ("LUO", "kexec-metadata", "kho_exercise", "kho_test")
    }


def _message(found: Any, rule: str) -> str:
    (finding,) = (f for f in found["findings"] if f["rule"] == rule)
    return str(finding["message"])


def test_a_tree_that_moves() -> None:
    """Clients preserve and unpreserve all the time while khoscope looks: no traceback, no lie."""
    with Machine("7.2-fixed") as machine:
        Exercise(machine).load()
        debugfs = "/sys/kernel/debug/kho_exercise"
        busy = (
            f"while :; do echo many 500 > {debugfs}/preserve; echo many > {debugfs}/free; done "
            ">/dev/null 2>&1 & echo $! > /run/busy"
        )
        machine.run(busy, check=True)
        for _ in range(2):
            result = machine.run(("khoscope", "verify"), timeout=TIMEOUT)
            assert result.returncode in (0, 1, 3), result
            assert "Traceback" not in result.stderr
            if result.returncode == 0:
                assert "PASS" in result.stdout
            else:
                assert "PASS" not in result.stdout
        machine.run("kill $(cat /run/busy)", check=True)
