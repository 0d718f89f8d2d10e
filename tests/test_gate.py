# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope verify --gate``: may the kexec come now, by facts made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khoscope.abi.kho_fdt import Fdt, Subtree
from khoscope.abi.serialized import LUO
from khoscope.checks import (
    CLOSING,
    RULES,
    WORDS,
    Question,
    Report,
    RuleSelection,
    Severity,
    answers,
    check,
    question,
)
from khoscope.checks.questions import _OF
from khoscope.facts import store
from khoscope.facts.carried import SESSION, TOKEN, size_of_carried
from khoscope.facts.clients import (
    Held,
    Holder,
    Holders,
    Luo,
    LuoFile,
    LuoSession,
    LuoState,
    Memfd,
    StoredFd,
)
from khoscope.facts.metrics import hands_over
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.services import KeptFd, Service, Services
from khoscope.facts.snapshot import KexecImage, Snapshot
from khoscope.facts.tree import TreeState
from khoscope.sources.next_kernel import read_image
from khoscope.views.text import WIDTH
from tests.command import Result, Run
from tests.synthetic import FIXED, POSTED, ROOT, Block, snapshot
from tests.test_image import TEXT, elf
from tests.test_store import as_version, bytes_of
from tests.test_verify import STALE

#: Its memfd is empty: what is in it is of no matter to a gate.
CARRIED = LuoSession(
    SESSION,
    False,
    1,
    [LuoFile("memfd-v2", TOKEN, 0x9000, memfd=Memfd(0x9000, 0, 0, 0, 0, 0, None, 0))],
)
#: What leads to LUO's sessions.
BLOB = Block(0x5000)
ROOT_FDT = Fdt(0x2000, FIXED.compatible, ROOT, [Subtree(LUO, BLOB.phys, 4096)])
VM = LuoSession("vm", False, 0)
AGENT = Holder(42, "agent", "/system.slice/agent.service", None, [Held("vm", False, 1)])
KEEPER = Holder(
    7, "khoscope", "/system.slice/khoscope-carry.service", None, [Held(SESSION, False, 1)]
)
PID_1 = Holder(1, "systemd", "/init.scope", None, [Held("vm", False, 1)])
RING = KeptFd("ring", "/memfd:ring (deleted)", 11)
OWN = KeptFd("luo", "anon_inode:[luo_session] vm", 12)
SOCKET = KeptFd("listen", "socket:[4711]", 13)
SERVICES = Services(
    [Service("agent.service", "active (running)", True, "yes", [RING, OWN, SOCKET])],
    ["khoscope-carry.service"],
)


def ready(
    *,
    sessions: list[LuoSession] | None = None,
    holders: Holders | None = None,
    services: Services | None = SERVICES,
    **changed: Any,
) -> Snapshot:
    """A host on which all are ready, but for what is given."""
    facts = snapshot(FIXED, [BLOB], fdt=ROOT_FDT)
    luo = Luo(BLOB.phys, "luo-v5", 1, True, [CARRIED, VM] if sessions is None else sessions)
    held = Holders([KEEPER, PID_1]) if holders is None else holders
    return replace(
        facts,
        outgoing=replace(facts.outgoing, luo=luo),
        liveupdate=LuoState(True, ["memfd-v2"], True, held),
        services=services,
        **changed,
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A next kernel that takes what is handed over."""
    path = tmp_path_factory.mktemp("next") / "vmlinux"
    path.write_bytes(elf([TEXT]))
    return path


@pytest.fixture
def kernel(image: Path) -> NextKernel:
    return read_image(image)


@pytest.fixture
def gate(run: Run, tmp_path: Path, image: Path) -> Callable[..., Result]:
    """``khoscope verify --gate``, of a snapshot file or what is to be in it."""

    def gate(facts: Snapshot | Path, *words: object) -> Result:
        path = tmp_path / "facts.khosnap"
        if isinstance(facts, Snapshot):
            store.save_file(facts, path)
        else:
            path = facts
        return run("--snapshot", path, "verify", "--gate", "--next", image, *words)

    return gate


Gate = Callable[..., Result]


def found(report: Report, rule: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.message, each.units) for each in report.findings if each.rule == rule]


# -- what it is made of ---------------------------------------------------------------------------


def test_every_name_is_one_of_a_rule() -> None:
    assert RULES.keys() >= CLOSING | _OF.keys()
    assert all(RULES[name].severity != Severity.ERROR for name in CLOSING)
    assert WORDS.keys() == set(Question)


def test_every_question_has_rules() -> None:
    assert {question(rule) for rule in RULES.values()} == set(Question)


# -- open, closed, no verdict ---------------------------------------------------------------------


def test_open(gate: Gate) -> None:
    result = gate(ready())
    assert (result.status, result.err) == (0, "")
    assert result.last == "GATE OPEN: the kexec may come"
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    said = [line.split()[:2] for line in lines if line[:1].isalpha() and " ok " in line]
    assert said == [[str(each), "ok"] for each in Question]
    assert "sessions  ok   somebody holds each session (4 checks)" in lines
    assert (
        "a kexec would hand over 4 KiB in 1 block, 2 sessions with 1 file, of\n"
        "  agent.service; systemctl kexec adds 1 memfd\n"
    ) in result.out


def test_open_as_json(gate: Gate) -> None:
    result = gate(ready(), "--json")
    assert result.status == 0
    document = result.document
    assert (document["schema"], document["verdict"]) == ("khoscope.verify/1", "pass")
    assert document["gate"]["state"] == "open"
    assert [each["question"] for each in document["gate"]["answers"]] == [*map(str, Question)]
    assert {each["verdict"] for each in document["gate"]["answers"]} == {"pass"}
    assert sum(each["checks"] for each in document["gate"]["answers"]) == len(document["rules"])
    assert document["gate"]["hands_over"] == {
        "bytes": 4096,
        "blocks": 1,
        "sessions": 2,
        "files": 1,
        "units": ["agent.service"],
        "systemd_memfds": 1,
    }


def test_closed(gate: Gate) -> None:
    facts = ready(sessions=[VM], holders=Holders())
    result = gate(facts)
    assert (result.status, result.err) == (1, "")
    assert result.last == "GATE CLOSED: do not kexec: session-not-held (2 reasons)"
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "sessions  NO   session-not-held: session 'vm' (0 files) is held by nobody" in lines
    assert "carried   NO   nothing-carried: no snapshot is carried to the next kernel" in lines
    document = gate(facts, "--json").document
    assert (document["verdict"], document["gate"]["state"]) == ("fail", "closed")
    verdicts = {each["question"]: each["verdict"] for each in document["gate"]["answers"]}
    assert [name for name, verdict in verdicts.items() if verdict == "fail"] == [
        "sessions",
        "carried",
    ]
    reasons = {each["question"]: each["reasons"] for each in document["gate"]["answers"]}
    assert reasons["carried"] == ["nothing-carried: no snapshot is carried to the next kernel"]


def test_no_verdict(run: Run, tmp_path: Path) -> None:
    """Nobody has named the next kernel."""
    path = tmp_path / "facts.khosnap"
    store.save_file(ready(), path)
    result = run("--snapshot", path, "verify", "--gate")
    assert (result.status, result.err) == (3, "")
    assert result.last == "GATE NO VERDICT: 1 thing could not be seen"
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    # The question that it concerns has no answer; the others have.
    assert [line.split()[0] for line in lines if line[10:11] == "?"][:1] == ["image"]
    assert sum(" ok " in line for line in lines) == len(Question) - 1
    assert "               ?" not in result.out
    assert "whether the next kernel takes what is handed over" in result.out
    document = run("--snapshot", path, "verify", "--gate", "--json").document
    assert (document["verdict"], document["gate"]["state"]) == ("incomplete", "no verdict")
    verdicts = {each["question"]: each["verdict"] for each in document["gate"]["answers"]}
    assert verdicts.pop("image") == "incomplete"
    assert set(verdicts.values()) == {"pass"}


def test_what_is_not_known_of_the_kernel_may_concern_anything(kernel: NextKernel) -> None:
    facts = replace(ready(), unreadable=["the root FDT"])
    report = check(facts, kernel, gate=True)
    assert report.verdict == "incomplete"
    assert {str(each.verdict) for each in answers(report)} == {"incomplete"}


def test_the_blocks_of_the_tree_are_counted(gate: Gate) -> None:
    facts = ready()
    blocks = snapshot(FIXED, [BLOB, Block(1 << 20, 2), Block(2 << 20, 9)], fdt=ROOT_FDT)
    side = replace(blocks.outgoing, luo=facts.outgoing.luo)
    facts = replace(facts, outgoing=side)
    over = hands_over(facts)
    assert (over.blocks, over.size) == (3, (1 + 4 + 512) * 4096)
    assert "would hand over 2.0 MiB in 3 blocks" in gate(facts).out


def test_a_reason_is_counted_as_often_as_it_is(gate: Gate) -> None:
    sessions = [CARRIED, *(LuoSession(f"s{n}", False, 0) for n in range(1500))]
    result = gate(ready(sessions=sessions, holders=Holders([KEEPER])))
    assert result.last == "GATE CLOSED: do not kexec: session-not-held (1,500 reasons)"
    assert "… 1,480 more of these (only 1,000 are kept)" in result.out
    assert sum("session-not-held" in line for line in result.out.splitlines()) == 21


def test_left_out_on_request(gate: Gate) -> None:
    result = gate(ready(sessions=[VM]), "--skip", "nothing-carried")
    assert result.status == 0
    assert result.last == "GATE OPEN: nothing found; 1 check left out on request"
    assert not any(line.startswith("carried") for line in result.out.splitlines())


# -- what closes it -------------------------------------------------------------------------------


def came(*sessions: LuoSession) -> dict[str, Any]:
    """What this kernel was handed."""
    side = snapshot(FIXED, [], fdt=ROOT_FDT).outgoing
    return {"incoming": replace(side, luo=Luo(BLOB.phys, "luo-v5", 1, True, [*sessions]))}


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"image": KexecImage(False)}, "no-image"),
        (came(LuoSession("old", False, 0)), "orphaned-session"),
    ],
)
def test_closed_by_what_is_no_error(
    changed: dict[str, Any], rule: str, kernel: NextKernel, gate: Gate
) -> None:
    assert RULES[rule].severity != Severity.ERROR
    facts = ready(**changed)
    assert not check(facts, kernel).failed
    result = gate(facts)
    assert result.status == 1
    assert result.last == f"GATE CLOSED: do not kexec: {rule} (1 reason)"
    document = gate(facts, "--json").document
    assert document["counts"] == {rule: 1}


def test_closed_by_scratch(kernel: NextKernel) -> None:
    """The image and its initrd do not fit."""
    assert "scratch-too-small" in CLOSING
    asked = RuleSelection(closing=CLOSING)
    report = Report(asked=asked)
    rule = RULES["scratch-too-small"]
    assert rule.severity == Severity.WARNING
    assert asked.fails(rule)
    assert not RuleSelection().fails(rule)
    report.counts[rule.name] = 1
    assert report.failed


def test_errors_come_first(gate: Gate) -> None:
    """The reason is an error, if there is one."""
    result = gate(ready(image=KexecImage(False), holders=Holders([KEEPER])))
    assert result.last == "GATE CLOSED: do not kexec: session-not-held (2 reasons)"


def test_closed_by_a_rule_that_somebody_names(gate: Gate) -> None:
    facts = ready(holders=Holders([KEEPER, AGENT]))
    result = gate(facts)
    assert result.status == 0
    assert "          note session-not-kept: session 'vm' (0 files) is held by" in result.out
    result = gate(facts, "--fail-on", "error,session-not-kept")
    assert result.status == 1
    assert result.last == "GATE CLOSED: do not kexec: session-not-kept (1 reason)"
    assert gate(facts, "--fail-on", "warning").status == 1
    # It closes the gate besides the others.
    no_image = replace(facts, image=KexecImage(False))
    assert gate(no_image, "--fail-on", "error,store-not-kept").status == 1


def test_fail_on_without_a_gate(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "facts.khosnap"
    store.save_file(ready(image=KexecImage(False)), path)
    assert run("--snapshot", path, "verify").status == 0
    result = run("--snapshot", path, "verify", "--fail-on", "error, no-image")
    assert result.status == 1
    assert result.last.startswith("FAIL: not safe to kexec: no-image (0 errors")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate", "--before", "x"], "--gate is for the kexec to come: leave --before out"),
        (["--only", "session-not-held"], "session-not-held needs --gate"),
        (["--only", "overlap,nothing-carried"], "nothing-carried needs --gate"),
        (["--fail-on", "error,store-not-kept"], "store-not-kept needs --gate"),
        (["--fail-on", "error,stored-fd-lost"], "stored-fd-lost needs --before"),
        (["--fail-on", "error,no-imag"], "did you mean no-image"),
        (["--fail-on", "error,"], "there is no check ''"),
        (["--fail-on", "no-image"], "error or warning come first"),
        (["--fail-on", "info"], "error or warning come first"),
        (["--gate", "--only", "no-imag"], "did you mean no-image"),
        (["--gate", "--only", "no-image", "--skip", "no-image"], "leave no check to run"),
    ],
)
def test_what_cannot_be_asked_for(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    path = tmp_path / "facts.khosnap"
    store.save_file(ready(), path)
    result = run("--snapshot", path, "verify", *words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate"], "--gate is for one moment: leave --watch out"),
        (["--journal"], "--journal is for one run: leave --watch out"),
    ],
)
def test_no_gate_is_watched(run: Run, words: list[str], said: str) -> None:
    result = run("verify", "--watch", "1", *words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err


# -- session-not-held -----------------------------------------------------------------------------


def test_a_session_that_nobody_holds(kernel: NextKernel) -> None:
    stored = LuoSession("kept", False, 0, stored=StoredFd("vm.service", "luo"))
    facts = ready(sessions=[CARRIED, stored, VM], holders=Holders([KEEPER]))
    report = check(facts, kernel, gate=True)
    [(kept, units), (vm, none)] = found(report, "session-not-held")
    assert "is held by nobody" in kept
    assert (units, none) == (("vm.service",), ())
    assert vm == "session 'vm' (0 files) is held by nobody"
    assert found(check(ready(), kernel, gate=True), "session-not-held") == []
    # It is asked only at the gate.
    assert "session-not-held" not in check(facts, kernel).rules


def test_holding_what_came_is_not_holding_what_goes(kernel: NextKernel) -> None:
    """There may be one of that name on either side."""
    retrieved = replace(AGENT, held=[Held("vm", True, 1)])
    report = check(ready(holders=Holders([KEEPER, retrieved])), kernel, gate=True)
    assert len(found(report, "session-not-held")) == 1


@pytest.mark.parametrize(
    ("holders", "said"),
    [
        (Holders([KEEPER], unread=["2 of the tasks"]), "cannot be read: 2 of the tasks"),
        (Holders([KEEPER], left_out=5000), "5,000 descriptors were not looked at"),
    ],
)
def test_holders_that_may_be_missing(holders: Holders, said: str, kernel: NextKernel) -> None:
    report = check(ready(holders=holders), kernel, gate=True)
    assert any(said in each for each in report.incomplete)
    assert report.verdict == "fail"
    # Not even without the check is it open.
    asked = RuleSelection(frozenset(RULES) - {"session-not-held"}, closing=CLOSING)
    assert check(ready(holders=holders), kernel, asked, gate=True).verdict == "incomplete"
    # Where each session has a holder, others do not matter.
    full = replace(holders, processes=[KEEPER, PID_1])
    assert check(ready(holders=full), kernel, gate=True).verdict == "pass"


def test_holders_that_were_not_looked_at(gate: Gate, tmp_path: Path) -> None:
    """As in a file of version 6."""

    def age(meta: dict[str, Any]) -> None:
        del meta["services"]
        del meta["liveupdate"]["holders"]

    path = tmp_path / "old.khosnap"
    path.write_bytes(as_version(6, bytes_of(ready()), age))
    result = gate(path)
    assert (result.status, result.err) == (3, "")
    assert "who holds the sessions was not looked at" in result.out
    assert "sessions  ?    nothing found (4 checks), but not all is known" in result.out
    assert result.last == "GATE NO VERDICT: 1 thing could not be seen"


def test_without_sessions_nobody_needs_to_hold_any(kernel: NextKernel) -> None:
    facts = replace(ready(sessions=[]), liveupdate=LuoState(True))
    report = check(facts, kernel, gate=True)
    assert report.incomplete == []
    assert [each.rule for each in report.findings] == ["nothing-carried"]


# -- session-not-kept -----------------------------------------------------------------------------


def test_a_session_that_systemd_ends(kernel: NextKernel) -> None:
    report = check(ready(holders=Holders([KEEPER, AGENT])), kernel, gate=True)
    assert found(report, "session-not-kept") == [
        (
            "session 'vm' (0 files) is held by agent.service alone: systemctl kexec ends it",
            ("agent.service",),
        )
    ]
    assert report.verdict == "pass"


def test_a_session_of_a_process_in_no_unit(kernel: NextKernel) -> None:
    shell = replace(AGENT, comm="sh", cgroup="/")
    report = check(ready(holders=Holders([KEEPER, shell])), kernel, gate=True)
    [(text, units)] = found(report, "session-not-kept")
    assert "is held by sh (pid 42) alone" in text
    assert units == ()


@pytest.mark.parametrize(
    "facts",
    [
        # systemd has it, too; its unit survives; nobody has asked systemd, or it did not say.
        ready(holders=Holders([KEEPER, AGENT, PID_1])),
        ready(
            holders=Holders([KEEPER, AGENT]),
            services=Services([], ["agent.service", "khoscope-carry.service"]),
        ),
        ready(holders=Holders([KEEPER, AGENT]), services=None),
        ready(
            holders=Holders([KEEPER, AGENT]),
            services=Services(survivors=None, unread=["no"], is_whole=False),
        ),
    ],
)
def test_no_session_that_systemd_ends(facts: Snapshot, kernel: NextKernel) -> None:
    assert found(check(facts, kernel, gate=True), "session-not-kept") == []


def test_systemd_did_not_say(gate: Gate) -> None:
    """Silence opens no gate."""
    services = Services(survivors=None, unread=["systemctl show: no"], is_whole=False)
    result = gate(ready(services=services))
    assert result.status == 3
    assert "services  ?    nothing found (1 check), but not all is known" in result.out
    assert "what systemd keeps for services may be missing: systemctl show: no" in " ".join(
        result.out.split()
    )


def test_many_units(gate: Gate) -> None:
    """A reason stays readable."""
    many = [replace(AGENT, pid=n, cgroup=f"/system.slice/a{n}.service") for n in range(100, 140)]
    report = check(ready(holders=Holders([KEEPER, *many])), gate=True)
    [(text, units)] = found(report, "session-not-kept")
    assert "a107.service and 32 more alone" in text
    assert len(units) == 40


# -- store-not-kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preserve", "kept", "said"),
    [
        ("restart", [RING, SOCKET, OWN], "ring, luo: FileDescriptorStorePreserve=restart"),
        ("no", [RING], "ring: FileDescriptorStorePreserve=no"),
        ("yes", [RING, OWN], None),
        ("restart", [SOCKET], None),
        ("restart", [], None),
        ("restart", None, None),
    ],
)
def test_a_store_that_systemd_closes(
    preserve: str, kept: list[KeptFd] | None, said: str | None, kernel: NextKernel
) -> None:
    services = Services([Service("a.service", "active (running)", True, preserve, kept)])
    stored = found(check(ready(services=services), kernel, gate=True), "store-not-kept")
    wanted = [] if said is None else [(f"a.service: {said}, systemctl kexec closes them",)]
    assert [each[:1] for each in stored] == wanted
    assert all(units == ("a.service",) for _, units in stored)
    over = hands_over(ready(services=services))
    assert over.units == (["a.service"] if preserve == "yes" else [])


# -- nothing-carried ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sessions", "carries"),
    [
        ([CARRIED], True),
        ([VM, CARRIED], True),
        ([VM], False),
        ([], False),
        ([replace(CARRIED, name="other")], False),
        ([replace(CARRIED, files=[])], False),
        ([replace(CARRIED, files=[replace(CARRIED.files[0], token=1)])], False),
    ],
)
def test_a_snapshot_that_goes_along(
    sessions: list[LuoSession], carries: bool, kernel: NextKernel
) -> None:
    facts = ready(sessions=sessions)
    assert size_of_carried(facts.outgoing) == (0 if carries else None)
    report = check(facts, kernel, gate=True)
    assert bool(found(report, "nothing-carried")) is not carries


def test_no_luo_carries_nothing(kernel: NextKernel) -> None:
    facts = ready()
    facts = replace(snapshot(FIXED, []), liveupdate=LuoState(False))
    report = check(facts, kernel, gate=True)
    assert [each.rule for each in report.findings] == ["nothing-carried"]
    # What cannot be decoded may carry it.
    raw = replace(facts, outgoing=replace(facts.outgoing, luo=Luo(1, "luo-v9", raw="00")))
    assert not found(check(raw, gate=True), "nothing-carried")
    assert check(raw, gate=True).verdict == "incomplete"


# -- hostile --------------------------------------------------------------------------------------


def test_names_cannot_forge_a_line(gate: Gate) -> None:
    evil = "a\nGATE OPEN: the kexec may come\x1b[2J"
    services = Services([Service(evil, evil, True, "restart", [replace(RING, name=evil)])], [evil])
    sessions = [CARRIED, LuoSession(evil, False, 0)]
    holders = Holders([KEEPER, replace(AGENT, comm=evil, cgroup=evil)], unread=[evil])
    facts = ready(sessions=sessions, services=services, holders=holders)
    for result in (gate(facts), gate(facts, "--fail-on", "warning")):
        assert "\x1b" not in result.out
        assert not any(line.startswith("GATE OPEN") for line in result.out.splitlines())
        assert result.last.startswith("GATE CLOSED")
    json.loads(gate(facts, "--json").out)


def test_many_findings_take_no_time(kernel: NextKernel) -> None:
    blocks = [replace(STALE, phys=n << 20) for n in range(1, 2000)]
    facts = snapshot(FIXED, blocks, state=TreeState(0x1000))
    report = check(facts, kernel, gate=True)
    (answer,) = (each for each in answers(report) if each.question == Question.KERNEL)
    assert (len(answer.failing), answer.failed) == (1000, 1999)


def test_what_follows_from_a_reason_is_none_of_its_own() -> None:
    blocks = [Block.split(n << 20, 2, type=0) for n in range(1, 6)]
    report = check(snapshot(POSTED, blocks), gate=True)
    assert report.counts["type-mismatch"] == 5
    (answer,) = (each for each in answers(report) if each.question == Question.KERNEL)
    assert [each.rule for each in answer.failing] == ["type-not-stored"]
    assert answer.failed == 1
