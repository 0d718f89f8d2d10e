# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics: Prometheus reads what the other commands say, and a file is whole, or as it was."""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from khoscope import __version__, demo
from khoscope.abi.keys import BAD_ORDER
from khoscope.abi.kho_fdt import Subtree
from khoscope.checks import RULES, check
from khoscope.demo import SCENES
from khoscope.facts import store
from khoscope.facts.clients import Luo, LuoSession
from khoscope.facts.metrics import Sessions, metrics, taken_at
from khoscope.facts.snapshot import Node, PageUse, Snapshot
from khoscope.facts.tree import TreeState
from khoscope.views.metrics import Exposition, write_metrics, write_report
from khoscope.words.errors import KhoscopeError
from khoscope.words.printable import printable
from tests.command import Run
from tests.made_up import MadeUp, mapped
from tests.synthetic import FIXED, PLAIN, Block, rich, snapshot
from tests.test_files import REPOSITORY, mode
from tests.test_scratch import MIB, host
from tests.test_status import off
from vm.fossil import FOSSILS, SUFFIX, unpack

NAMES = [scene.name for scene in SCENES]
ODD = demo.path("odd-before")


def parsed(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """
    As Prometheus has it: values by the values of labels, by name.

    No sample, and no HELP, is there twice: the node exporter would refuse all of it.
    """
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith(".")
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            key = tuple(sample.labels.values())
            assert key not in values, sample
            values[key] = sample.value
    helps = re.findall(r"^# HELP (\S+)", text, re.MULTILINE)
    assert len(helps) == len(set(helps)) == len(found)
    return found


def text_of(facts: Snapshot) -> str:
    out = io.StringIO()
    write_metrics(facts, metrics(facts), check(facts), out)
    return out.getvalue()


def shown(facts: Snapshot) -> dict[str, dict[tuple[str, ...], float]]:
    return parsed(text_of(facts))


# What is said is what the other commands say


@pytest.mark.parametrize("name", NAMES)
def test_as_the_other_commands_have_it(name: str, run: Run) -> None:
    words = ("--snapshot", demo.path(name))
    result = run(*words, "metrics")
    assert (result.status, result.err) == (0, "")
    found = parsed(result.out)
    verify, tree, status, scratch = (
        run(*words, command, "--json").document
        for command in ("verify", "tree", "status", "scratch")
    )
    kinds = {(str(each["order"]), each["type"] or "none"): each for each in tree["totals"]}
    assert kinds
    assert found["khoscope_preserved_blocks"] == {k: v["blocks"] for k, v in kinds.items()}
    assert found["khoscope_preserved_bytes"] == {k: v["bytes"] for k, v in kinds.items()}
    for column in ("size", "free"):
        metric = "khoscope_scratch_bytes" if column == "size" else "khoscope_scratch_free_bytes"
        areas = {(each["purpose"],): each[column] for each in scratch["areas"]}
        assert found[metric] == areas
    sessions = {"outgoing": status["sessions"], "incoming": status["sessions_incoming"]}
    assert found["khoscope_luo_sessions"] == {(k,): len(v or []) for k, v in sessions.items()}
    files = {(k,): sum(each["files"] for each in v or []) for k, v in sessions.items()}
    assert found["khoscope_luo_files"] == files
    counts = {rule: verify["counts"].get(rule, 0) for rule in verify["rules"]}
    assert found["khoscope_findings"] == {
        ("kexec", rule, RULES[rule].severity): count for rule, count in counts.items()
    }
    assert [k for k, v in found["khoscope_verdict"].items() if v] == [("kexec", verify["verdict"])]
    assert len(found["khoscope_verdict"]) == 3
    assert found["khoscope_skipped_rules"] == {("kexec",): 0}
    assert found["khoscope_handovers_total"] == {(): verify["handover"]["kexec_count"]}
    assert found["khoscope_kho_enabled"] == {(): 1}
    assert found["khoscope_build_info"] == {(__version__,): 1}
    [(release, kho, luo)] = found["khoscope_kernel_info"]
    compatible = status["compatible"]
    assert release == status["kernel"]["release"]
    assert (kho, luo) == (compatible["kho"], compatible["luo"] or "")


@pytest.mark.parametrize("stage", ["before", "after"])
def test_of_a_vmcore(stage: str, run: Run, tmp_path: Path) -> None:
    """A real kernel's, which is read while it is judged."""
    unpack(FOSSILS / f"7.2-fixed{SUFFIX}", tmp_path)
    core = ("--core", tmp_path / stage)
    result = run(*core, "metrics")
    assert (result.status, result.err) == (0, "")
    found = parsed(result.out)
    verify = run(*core, "verify", "--json").document
    assert {k[1]: v for k, v in found["khoscope_findings"].items() if v} == verify["counts"]
    assert found["khoscope_verdict"]["kexec", verify["verdict"]] == 1
    scratch = run(*core, "scratch", "--json").document
    assert found["khoscope_scratch_free_bytes"] == {
        (each["purpose"],): each["free"] for each in scratch["areas"]
    }
    assert set(found["khoscope_scratch_unmovable_bytes"].values()) == {0}


def test_when(run: Run) -> None:
    """Seconds since 1970, of the reading: a file is no younger than what is in it."""
    facts = snapshot(FIXED, [Block(0x1000)])
    found = shown(facts)
    assert facts.taken.time == "2026-01-01T00:00:01Z"
    assert found["khoscope_facts_timestamp_seconds"] == {(): 1767225601}
    assert found["khoscope_verdict_timestamp_seconds"] == {("kexec",): 1767225601}


@pytest.mark.parametrize("time", ["", "yesterday", "2026-01-01T00:00:01", "9" * 400, "\ud800"])
def test_a_time_that_is_none(time: str) -> None:
    facts = snapshot(FIXED, [])
    facts = replace(facts, taken=replace(facts.taken, time=time))
    assert taken_at(facts.taken) is None
    assert not [name for name in shown(facts) if "timestamp" in name]


def test_scratch() -> None:
    """Slab memory cannot be moved away, and pinned memory neither; a page is left unread."""
    found = shown(host())
    assert found["khoscope_scratch_bytes"] == {
        ("lowmem",): 64 * MIB,
        ("global",): 192 * MIB,
        ("node 0",): 128 * MIB,
        ("node 1",): 128 * MIB,
    }
    assert found["khoscope_scratch_unmovable_bytes"] == {
        ("lowmem",): 0,
        ("global",): 3 << 12,
        ("node 0",): 4 * MIB,
    }
    unread = replace(host(), scratch_free=[1, None, 1, 1])
    assert ("global",) not in shown(unread)["khoscope_scratch_free_bytes"]
    assert "khoscope_scratch_unmovable_bytes" not in shown(replace(host(), scratch_use=[]))


def test_what_the_boot_reserved_in_scratch() -> None:
    """It is no surprise after a handover, as with the check."""
    facts = host()
    use = replace(facts.scratch_use[0], pages={PageUse.RESERVED: 7})
    facts = replace(facts, scratch_use=[use, *facts.scratch_use[1:]])
    assert shown(facts)["khoscope_scratch_unmovable_bytes"]["lowmem",] == 7 << 12
    facts = replace(facts, handover=replace(facts.handover, is_kho_boot=True))
    assert shown(facts)["khoscope_scratch_unmovable_bytes"]["lowmem",] == 0


def test_sessions() -> None:
    facts = rich()
    luo = Luo(0x7000, "luo-v5", 2, True, [LuoSession("a", True, 2), LuoSession("b", False, 1)])
    found = metrics(replace(facts, outgoing=replace(facts.outgoing, luo=luo)))
    assert found.outgoing == Sessions(2, 3)
    # There is none without a handover, or without LUO.
    assert metrics(snapshot(PLAIN, [])).incoming == Sessions(0, 0)
    assert metrics(snapshot(PLAIN, [])).outgoing == Sessions(0, 0)


@pytest.mark.parametrize(
    "luo",
    [None, Luo(0x7000, "luo-v9", raw="00"), Luo(0x7000, None)],
    ids=["not recorded", "not known", "not readable"],
)
def test_sessions_that_are_not_known(luo: Luo | None) -> None:
    """They are not none."""
    facts = snapshot(PLAIN, [])
    fdt = replace(facts.outgoing.fdt, subtrees=[Subtree("LUO", 0x7000, 4096)])
    found = shown(replace(facts, outgoing=replace(facts.outgoing, fdt=fdt, luo=luo)))
    assert found["khoscope_luo_sessions"] == {("incoming",): 0}
    assert found["khoscope_luo_files"] == {("incoming",): 0}


def test_kinds_of_blocks() -> None:
    """Without types, and with a key that is none."""
    found = shown(snapshot(PLAIN, [Block(0x1000), Block(0x4000, 2), Block(0, BAD_ORDER, key=0)]))
    blocks = {("0", "none"): 1, ("2", "none"): 1}
    assert found["khoscope_preserved_blocks"] == {**blocks, ("bad", "none"): 1}
    assert found["khoscope_preserved_bytes"] == {("0", "none"): 4096, ("2", "none"): 16384}


def test_a_handover_that_says_no_number() -> None:
    """Kernels before 7.1."""
    facts = snapshot(PLAIN, [])
    handover = replace(facts.handover, kexec_count=None)
    assert "khoscope_handovers_total" not in shown(replace(facts, handover=handover))


def test_no_verdict() -> None:
    found = shown(snapshot(FIXED, [], state=TreeState(0x1000, moved=2)))
    assert found["khoscope_verdict"]["kexec", "incomplete"] == 1
    assert found["khoscope_verdict"]["kexec", "pass"] == 0


# KHO is off


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[MadeUp], None]]:
    """Has khoscope read a made-up kernel."""
    with mapped(monkeypatch):
        yield lambda machine: monkeypatch.setattr(
            "khoscope.commands.common.kernel", lambda args, progress: machine.source()
        )


def test_off_in_a_file(run: Run, tmp_path: Path) -> None:
    store.save_file(off(), tmp_path / "off")
    result = run("--snapshot", tmp_path / "off", "metrics")
    assert (result.status, result.err) == (0, "")
    is_off(parsed(result.out))


def test_off_in_a_kernel(run: Run, made_up: Callable[[MadeUp], None]) -> None:
    machine = MadeUp()
    machine.set("kho_enable", 0)
    made_up(machine)
    result = run("metrics")
    assert (result.status, result.err) == (0, "")
    found = parsed(result.out)
    is_off(found)
    assert ("7.2.0-made-up", "", "") in found["khoscope_kernel_info"]
    # verify cannot do anything there.
    run("verify").refused("KHO is off")


def test_on_in_a_kernel(run: Run, made_up: Callable[[MadeUp], None]) -> None:
    made_up(MadeUp())
    found = parsed(run("metrics").out)
    assert found["khoscope_kho_enabled"] == {(): 1}
    assert found["khoscope_scratch_bytes"] == {("area 0",): 0x10_0000}
    assert sum(found["khoscope_verdict"].values()) == 1


def is_off(found: Mapping[str, Mapping[tuple[str, ...], float]]) -> None:
    """Which is no verdict, and not that nothing was found."""
    assert found["khoscope_kho_enabled"] == {(): 0}
    assert not {"khoscope_verdict", "khoscope_findings", "khoscope_preserved_blocks"} & set(found)
    assert found["khoscope_luo_sessions"] == {("outgoing",): 0, ("incoming",): 0}


def test_a_kernel_without_kho(run: Run, made_up: Callable[[MadeUp], None], tmp_path: Path) -> None:
    made_up(MadeUp(lacks={"kho_out"}))
    path = tmp_path / "khoscope.prom"
    path.write_text("khoscope_kho_enabled 1\n")
    result = run("metrics", "--output", path)
    assert (result.status, result.out, result.err) == (0, "", "")
    assert parsed(path.read_text()) == {
        "khoscope_build_info": {(__version__,): 1},
        "khoscope_kho_enabled": {(): 0},
    }
    run("verify").refused("this kernel has no kexec handover")


# Names, units, and whatever a label may hold


def test_conventions() -> None:
    """What promtool check metrics looks for."""
    text = text_of(host()) + reported(rich())
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert len(kinds) == 16
    for name, kind in kinds.items():
        assert re.fullmatch(r"khoscope(_[a-z]+)+", name)
        assert name.endswith("_total") == (kind == "counter")
        assert not name.endswith(("_count", "_sum", "_bucket"))
    for line in text.splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9]+', line), line


def test_no_name_of_a_session(run: Run) -> None:
    """Whoever makes sessions would make time series."""
    facts = snapshot(FIXED, [])
    luo = Luo(0x7000, "luo-v5", 1, True, [LuoSession(f"vm{n}", None, 1) for n in range(100)])
    with_luo = replace(facts, outgoing=replace(facts.outgoing, luo=luo))
    assert text_of(with_luo).count("\n") == text_of(facts).count("\n")
    assert "vm1" not in text_of(with_luo)


@given(st.text(), st.text(st.sampled_from('\\"n\n{},= #\x1b\u202eé\ud800')))
def test_any_text_is_a_label(release: str, compatible: str) -> None:
    facts = snapshot(FIXED, [])
    fdt = replace(facts.outgoing.fdt, compatible=compatible)
    facts = replace(
        facts,
        kernel=replace(facts.kernel, release=release),
        outgoing=replace(facts.outgoing, fdt=fdt),
    )
    # Checks have something to say of such a compatible, which is not what this is about.
    report, plain, out = check(snapshot(FIXED, [])), io.StringIO(), io.StringIO()
    write_metrics(snapshot(FIXED, []), metrics(facts), report, plain)
    write_metrics(facts, metrics(facts), report, out)
    text = out.getvalue()
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    both = zip(text.split("\n"), plain.getvalue().split("\n"), strict=True)
    [line] = {line for line, other in both if line != other or "kernel_info{" in line}
    values = re.fullmatch(
        r'khoscope_kernel_info\{release="((?:[^"\\]|\\.)*)",kho="((?:[^"\\]|\\.)*)",luo=""\} 1',
        line,
    )
    assert values
    for value, meant in zip(values.groups(), (release, compatible), strict=True):
        ascii_ = printable(meant).encode("ascii", "backslashreplace").decode()
        assert re.sub(r"\\(.)", r"\1", value) == ascii_
    [sample] = samples(text, "khoscope_kernel_info")
    assert (sample.value, set(sample.labels)) == (1, {"release", "kho", "luo"})


def samples(text: str, name: str) -> list[Sample]:
    every = (each for family in text_string_to_metric_families(text) for each in family.samples)
    return [each for each in every if each.name == name]


def test_two_areas_of_one_name() -> None:
    """A file may say so; Prometheus takes no sample twice."""
    facts = host()
    found = shown(replace(facts, nodes=[Node(3, 0, 1 << 32), Node(3, 1 << 32, 2 << 32)]))
    assert found["khoscope_scratch_bytes"]["node 3",] == 128 * MIB


def test_samples_that_are_not_known() -> None:
    out = io.StringIO()
    Exposition(out).family("a", "gauge", "A.", [({"b": "c"}, None), ({}, 2**63)])
    Exposition(out).family("d", "counter", "D.", [({}, None)])
    assert out.getvalue() == "# HELP a A.\n# TYPE a gauge\na 9223372036854775808\n"


# What it costs


class Untouched:
    """A stream that nobody may look at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all of memory would have to be scanned for this")


def test_no_scan_of_all_pages(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel that was handed over to: status would look for stamps."""
    facts = replace(rich(), stamps=Untouched())
    monkeypatch.setattr(store, "load_file", lambda path: facts)
    result = run("--snapshot", "file", "metrics")
    assert (result.status, parsed(result.out)["khoscope_handovers_total"]) == (0, {(): 3})


def test_of_a_file_without_drgn() -> None:
    """And without a library that users need not have."""
    program = (
        "import sys; from khoscope.cli import main; status = main(sys.argv[1:]);"
        "print(*sorted({'drgn', 'prometheus_client'} & set(sys.modules)), file=sys.stderr)"
    )
    words = ["--snapshot", str(ODD), "metrics"]
    found = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("# HELP khoscope_build_info")
    assert found.stderr == "\n"


# The file


def test_a_file(run: Run, tmp_path: Path) -> None:
    """Everybody may read it: the node exporter is another user."""
    path = tmp_path / "khoscope.prom"
    for umask in (0o077, 0):
        before = os.umask(umask)
        try:
            result = run("--snapshot", ODD, "metrics", "--output", path)
        finally:
            os.umask(before)
        assert (result.status, result.out, result.err) == (0, "", "")
        assert (mode(path), list(tmp_path.iterdir())) == (0o644, [path])
    assert path.read_text() == run("--snapshot", ODD, "metrics").out


def test_a_reader_sees_all_of_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "khoscope.prom"
    words = ("--snapshot", demo.path("fixed-before"), "metrics", "--output", path)
    run(*words)
    whole, seen, done = path.read_bytes(), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())
            assert [each.name for each in tmp_path.glob("*.prom")] == [path.name]

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20):
            run(*words)
    finally:
        done.set()
        reader.join()
    assert seen == {whole}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/khoscope.prom", "No such file or directory"),
        ("directory", "is not a file"),
        ("link", "is not a file"),
    ],
)
def test_no_such_place(name: str, said: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for words in (["metrics", "--output"], ["verify", "--metrics"]):
        result = run("--snapshot", demo.path("fixed-before"), *words, tmp_path / name)
        result.refused(str(tmp_path / name), said)
    assert {each.name for each in tmp_path.iterdir()} == {"directory", "link"}


def test_what_cannot_be_read_leaves_the_old_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "khoscope.prom"
    path.write_text("was here\n")

    def refuse(*_: object) -> None:
        raise KhoscopeError("/proc/kcore: permission denied", "run khoscope as root")

    run("--snapshot", tmp_path / "missing", "metrics", "--output", path).refused("missing")
    monkeypatch.setattr("khoscope.sources.open.open_live", refuse)
    run("metrics", "--output", path).refused("permission denied")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("was here\n", [path])


def test_no_room_leaves_the_old_file(tmp_path: Path) -> None:
    """The kernel itself refuses what is longer than a few bytes."""
    path = tmp_path / "khoscope.prom"
    path.write_text("was here\n")

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    for words in (["metrics", "--output"], ["verify", "--metrics"]):
        found = subprocess.run(
            [sys.executable, "-B", "-m", "khoscope", "--snapshot", ODD, *words, path],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            preexec_fn=narrow,
            check=False,
        )
        assert found.returncode == 2
        first, _ = found.stderr.splitlines()
        assert first == f"khoscope: {path}: File too large"
        assert (path.read_text(), list(tmp_path.iterdir())) == ("was here\n", [path])


# verify --metrics


def reported(facts: Snapshot) -> str:
    out = io.StringIO()
    write_report(facts, check(facts), out)
    return out.getvalue()


def test_of_verify(run: Run, tmp_path: Path) -> None:
    """Its output and its status are what they were."""
    path = tmp_path / "verify.prom"
    words = ("--snapshot", demo.path("odd-after"), "verify", "--before", ODD)
    plain = run(*words)
    result = run(*words, "--metrics", path)
    assert (result.status, result.out, result.err) == (1, plain.out, "")
    found = parsed(path.read_text())
    assert found["khoscope_verdict"]["arrival", "fail"] == 1
    document = run(*words, "--json", "--metrics", path).document
    counts = {rule: n for (_, rule, _), n in found["khoscope_findings"].items() if n}
    assert counts == document["counts"]
    assert {rule for _, rule, _ in found["khoscope_findings"]} == set(document["rules"])
    assert mode(path) == 0o644


def test_two_files_for_one_exporter(run: Run, tmp_path: Path) -> None:
    """It takes both: no sample is in both, and a name has one HELP."""
    one, other = tmp_path / "khoscope.prom", tmp_path / "verify.prom"
    words = ("--snapshot", demo.path("odd-after"))
    run(*words, "metrics", "--output", one)
    run(*words, "verify", "--before", ODD, "--metrics", other)
    heads = [set(re.findall(r"^# .*", path.read_text(), re.MULTILINE)) for path in (one, other)]
    assert heads[1] < heads[0]
    found = [parsed(path.read_text()) for path in (one, other)]
    for name, values in found[1].items():
        assert not values.keys() & found[0][name].keys()


def test_rules_that_were_left_out(run: Run, tmp_path: Path) -> None:
    """The verdict of one check is not that of all."""
    path = tmp_path / "verify.prom"
    result = run("--snapshot", ODD, "verify", "--only", "overlap", "--metrics", path)
    assert result.status == 0
    found = parsed(path.read_text())
    assert found["khoscope_findings"] == {("kexec", "overlap", "error"): 0}
    assert found["khoscope_skipped_rules"]["kexec",] > 30


def test_not_while_it_watches(run: Run, tmp_path: Path) -> None:
    result = run("verify", "--watch", "1", "--metrics", tmp_path / "verify.prom")
    assert (result.status, result.out) == (2, "")
    assert "khoscope metrics run at an interval" in result.err
