# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What systemd keeps for services: how PID 1 is asked, what files keep of it, what became of it across
a kexec, and how it is shown.

systemd itself is in tests/vm/test_systemd.py.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.checks import Came, Report, came_back, compare
from khoscope.facts import budget
from khoscope.facts import store as files
from khoscope.facts.clients import Holders, LuoState
from khoscope.facts.services import KeptFd, Service, Services
from khoscope.facts.snapshot import Handover, Snapshot
from khoscope.sources import host_files
from khoscope.sources import services as source
from khoscope.sources.kernel import KernelSource
from khoscope.sources.open import open_core
from khoscope.sources.reading import Reading
from khoscope.sources.services import read_services
from khoscope.views.text import WIDTH
from tests.command import Run
from tests.fuzz import fuzz
from tests.synthetic import FIXED, snapshot
from tests.test_store import as_version, bytes_of, load, refused, rewritten
from vm.fossil import FOSSILS, SUFFIX, unpack

RING = KeptFd("ring", "/memfd:ring (deleted)", 11)
CAME = replace(RING, path="/ (deleted)", inode=2049)
OWN = KeptFd("luo", "anon_inode:[luo_session] vm", 12)
SOCKET = KeptFd("listen", "socket:[4711]", 13)
NEXT_BOOT = "00000000-0000-0000-0000-000000000002"


def store(
    unit: str = "keeper.service",
    state: str = "active (running)",
    preserve: str = "yes",
    kept: list[KeptFd] | None = [CAME],  # noqa: B006 - nobody writes to it
    given: list[str] | None = ["ring"],  # noqa: B006 - likewise
) -> Service:
    """A service whose descriptor came, and that was started with it."""
    return Service(unit, state, state.startswith("active"), preserve, kept, given)


def across(before: Services | None, now: Services | None) -> tuple[Snapshot, Snapshot]:
    was = replace(snapshot(FIXED, []), services=before)
    handover = Handover(True, "7.2.0-test", 1)
    facts = snapshot(FIXED, [], boot_id=NEXT_BOOT, handover=handover, watched=(was, []))
    return was, replace(facts, services=now)


def stored(*now: Service, **services: Any) -> Report:
    """The report across a kexec, before which a service had a memfd in its store."""
    before = Services([store(kept=[RING], given=None)])
    return compare(*across(before, Services([*now], **services)))


# -- asking PID 1 ---------------------------------------------------------------------------------

#: What a script of ours prints, by the last of its words.
_TOOL = """\
#!{python} -S
import json, sys, time
said = json.load(open({answers!r}))
answer = said[sys.argv[1]] if sys.argv[1] == "show" else said[sys.argv[-1]]
with open({asked!r}, "a") as file:
    print(*sys.argv, file=file)
time.sleep(answer.get("sleep", 0))
sys.stderr.write(answer.get("err", ""))
sys.stdout.buffer.write(answer.get("out", "").encode("utf-8", "surrogateescape"))
sys.exit(answer.get("status", 0))
"""


class Pid1:
    """Made-up tools of systemd's, and what they answer."""

    def __init__(self, path: Path) -> None:
        self.path = path / "bin"
        self.path.mkdir()
        self._answers, self._asked = path / "answers.json", path / "asked"
        self._asked.touch()
        self.answers: dict[str, dict[str, Any]] = {"show": {"out": ""}}
        for name in ("systemctl", "systemd-analyze"):
            tool = self.path / name
            how = {"answers": str(self._answers), "asked": str(self._asked)}
            tool.write_text(_TOOL.format(python=sys.executable, **how))
            tool.chmod(0o755)

    def unit(self, name: str, kept: Any = None, **properties: object) -> None:
        """Have one more unit, and what is in its store."""
        row = {
            "Id": name,
            "ActiveState": "active",
            "SubState": "running",
            "MainPID": 0,
            "SurviveFinalKillSignal": "no",
            "FileDescriptorStoreMax": 0 if kept is None else 16,
            "NFileDescriptorStore": 0 if kept is None else len(kept),
            "FileDescriptorStorePreserve": "yes",
            **properties,
        }
        text = "".join(f"{key}={value}\n" for key, value in row.items() if value is not None)
        shown = self.answers["show"]
        shown["out"] += ("\n" if shown["out"] else "") + text
        self.answers[name] = {"out": json.dumps(kept)}

    def read(self) -> Services:
        self._answers.write_text(json.dumps(self.answers))
        found = read_services()
        assert found is not None
        return found

    @property
    def asked(self) -> list[list[str]]:
        return [line.split() for line in self._asked.read_text().splitlines()]


@pytest.fixture
def pid_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pid1:
    made = Pid1(tmp_path)
    monkeypatch.setenv("PATH", str(made.path))
    booted = tmp_path / "system"
    booted.mkdir()
    monkeypatch.setattr(host_files, "SYSTEMD", booted)
    return made


def row(fd: KeptFd) -> dict[str, Any]:
    """As systemd 262 prints it."""
    return {
        "fdname": fd.name,
        "type": "reg",
        "devno": [0, 1],
        "inode": fd.inode,
        "rdevno": None,
        "path": fd.path,
        "flags": "rw",
    }


def test_what_pid_1_says(pid_1: Pid1) -> None:
    pid_1.unit("a.service")
    pid_1.unit("khoscope-carry.service", SurviveFinalKillSignal="yes")
    pid_1.unit("ended.service", SurviveFinalKillSignal="yes", ActiveState="inactive")
    pid_1.unit("web.service", [row(SOCKET)], FileDescriptorStorePreserve="restart")
    pid_1.unit("keeper.service", [row(RING), row(OWN), row(RING)])
    pid_1.unit("empty.service", [], ActiveState="failed", SubState="failed")
    found = pid_1.read()
    assert found == Services(
        [
            Service("empty.service", "failed (failed)", False, "yes", []),
            Service("keeper.service", "active (running)", True, "yes", [RING, OWN, RING]),
            Service("web.service", "active (running)", True, "restart", [SOCKET]),
        ],
        ["khoscope-carry.service"],
    )
    # What is empty need not be asked for.
    shown, *stores = pid_1.asked
    assert shown[1:5] == ["show", "--all", "*.service", "--property"]
    asked = ["fdstore", "--json=short"]
    assert [words[1:] for words in stores] == [[*asked, "keeper.service"], [*asked, "web.service"]]
    assert [fd.session for fd in found.stores[1].going] == [None, "vm", None]


def test_a_unit_that_is_not_there(pid_1: Pid1) -> None:
    """systemd goes on keeping what it had stored, says how much, and not what."""
    dead = {"ActiveState": "inactive", "SubState": "dead-resources-pinned"}
    pid_1.unit("gone.service", [row(CAME)], LoadState="not-found", **dead)
    [found] = pid_1.read().stores
    assert len(pid_1.asked) == 1
    assert (found.state, found.is_up) == ("not-found", False)
    assert (found.kept, found.unnamed) == (None, 1)
    gone = replace(found, unit="keeper.service")
    report = stored(gone)
    assert not report.incomplete
    assert [each.message for each in report.findings] == [
        "keeper.service has not taken ring; it is not-found"
    ]
    # With fewer of them, some are lost, and nobody knows which.
    report = stored(replace(gone, unnamed=0))
    assert "PID 1 did not say" in report.incomplete[0]
    assert not report.findings


def test_systemd_is_not_pid_1(pid_1: Pid1) -> None:
    host_files.SYSTEMD.rmdir()
    assert read_services() is None
    assert pid_1.asked == []


def test_an_older_systemd(pid_1: Pid1) -> None:
    """It knows neither whether a store is preserved nor who survives."""
    missing = {"FileDescriptorStorePreserve": None, "SurviveFinalKillSignal": None}
    pid_1.unit("keeper.service", [row(RING)], **missing)
    found = pid_1.read()
    assert [service.preserve for service in found.stores] == ["restart"]
    assert (found.survivors, found.unread) == ([], [])


def test_no_units_at_all(pid_1: Pid1) -> None:
    assert pid_1.read() == Services()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "systemctl is not installed"),
        (lambda path: path.chmod(0o644), "systemctl: Permission denied"),
        (lambda path: path.write_text("#!/no/such/interpreter\n"), "systemctl is not installed"),
        (lambda path: path.write_bytes(b"\x7fELF?"), "systemctl: Exec format error"),
    ],
)
def test_tools_that_cannot_be_run(pid_1: Pid1, change: Callable[[Path], object], said: str) -> None:
    change(pid_1.path / "systemctl")
    assert pid_1.read() == Services(survivors=None, unread=[said], is_whole=False)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 1, "err": "one\nFailed to connect to bus\n"}, "Failed to connect to bus"),
        ({"status": 3}, "status 3"),
        ({"status": 1, "err": "x" * 9999}, "x" * 300),
    ],
)
def test_pid_1_refuses(pid_1: Pid1, answer: dict[str, Any], said: str) -> None:
    pid_1.answers["show"] = answer
    assert pid_1.read() == Services(
        survivors=None, unread=[f"systemctl show: {said}"], is_whole=False
    )


def test_a_store_that_is_refused(pid_1: Pid1) -> None:
    """The others are asked for, all the same."""
    pid_1.unit("a.service", [row(RING)])
    pid_1.unit("b.service", [row(RING)])
    pid_1.answers["a.service"] = {"status": 1, "err": "Unit a.service not found.\n"}
    found = pid_1.read()
    assert [service.kept for service in found.stores] == [None, [RING]]
    assert found.unread == ["a.service: systemd-analyze fdstore: Unit a.service not found."]
    assert found.is_whole


def test_a_name_that_looks_like_an_option(pid_1: Pid1) -> None:
    """``-H`` would ask another host."""
    pid_1.unit("-Hother.service", [row(RING)])
    found = pid_1.read()
    assert [service.kept for service in found.stores] == [None]
    assert len(pid_1.asked) == len(found.unread) == 1


def test_a_missing_tool_is_missed_once(pid_1: Pid1) -> None:
    for name in "abc":
        pid_1.unit(f"{name}.service", [row(RING)])
    (pid_1.path / "systemd-analyze").unlink()
    found = pid_1.read()
    assert [service.kept for service in found.stores] == [None] * 3
    assert found.unread == [
        "a.service: systemd-analyze is not installed",
        "the stores of 2 more services",
    ]


@pytest.mark.parametrize("which", ["show", "a.service"])
def test_pid_1_hangs(pid_1: Pid1, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """khoscope waits once, and not for each service."""
    monkeypatch.setattr(source, "PATIENCE", 2)
    for name in "abcd":
        pid_1.unit(f"{name}.service", [row(RING)])
    pid_1.answers[which]["sleep"] = 600
    found = pid_1.read()
    assert "has not answered within 2 s" in found.unread[0]
    assert len(pid_1.asked) == (1 if which == "show" else 2)
    if which == "show":
        assert (found.is_whole, found.survivors) == (False, None)
    else:
        assert [service.kept for service in found.stores] == [None] * 4
        assert found.unread[1:] == ["the stores of 3 more services"]


def test_too_many_services(pid_1: Pid1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SERVICES", 2)
    for name in "abc":
        pid_1.unit(f"{name}.service", [])
    found = pid_1.read()
    assert [service.unit for service in found.stores] == ["a.service", "b.service"]
    assert (found.unread, found.is_whole) == (["the stores of 1 more services"], False)


@pytest.mark.parametrize("count", [4, 1])
def test_too_many_descriptors(pid_1: Pid1, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all services together, whatever systemctl says of their number."""
    monkeypatch.setattr(budget, "STORED", 4)
    pid_1.unit("a.service", [row(RING)])
    pid_1.unit("b.service", [row(RING)] * 4, NFileDescriptorStore=count)
    pid_1.unit("c.service", [row(RING)] * 2)
    found = pid_1.read()
    assert [service.kept for service in found.stores] == [[RING], None, [RING, RING]]
    assert found.unread == ["b.service: it stores 4 descriptors"]


def test_names_that_are_too_long(pid_1: Pid1) -> None:
    pid_1.unit("a.service", [row(KeptFd("n" * 9999, "/memfd:" + "p" * 9999, 1))])
    [service] = pid_1.read().stores
    assert service.kept == [KeptFd("n" * 255, ("/memfd:" + "p" * 300)[:300], 1)]


@pytest.mark.parametrize(
    "out",
    [
        "",
        "nonsense",
        "{}",
        "[[]]",
        '[{"fdname": "ring"}]',
        '[{"fdname": 1, "inode": 1, "path": "/"}]',
        '[{"fdname": "ring", "inode": "1", "path": "/"}]',
        '[{"fdname": "ring", "inode": 1, "path": null}]',
        '[{"fdname": "ring", "inode": 1, "path": "/", "x": ' + "[" * 100_000,
        "\udcff\udcfe",
    ],
)
def test_a_store_that_makes_no_sense(pid_1: Pid1, out: str) -> None:
    pid_1.unit("a.service", [row(RING)])
    pid_1.answers["a.service"] = {"out": out}
    found = pid_1.read()
    assert [service.kept for service in found.stores] == [None]
    [said] = found.unread
    assert said.startswith("a.service: systemd-analyze fdstore: ")


@pytest.mark.parametrize("number", ["-1", "1.5", "٣", "", "[not set]", "9" * 5000, "infinity"])
def test_numbers_that_are_none(pid_1: Pid1, number: str) -> None:
    pid_1.unit("a.service", [row(RING)], NFileDescriptorStore=number, MainPID=number)
    pid_1.unit("b.service", [row(RING)], FileDescriptorStoreMax=number)
    found = pid_1.read()
    assert [(s.unit, s.kept, s.given) for s in found.stores] == [("a.service", [], None)]


@fuzz
@given(st.text(alphabet="Id=ActiveState\nSubFileDscrptorMxN19\0 \xff", max_size=300))
def test_anything_systemctl_may_print(text: str) -> None:
    rows = [*source._shown(text)]
    assert all(row.keys() >= {"Id", "ActiveState", "SubState"} for row in rows)
    assert all(source._number(row, name) >= 0 for row in rows for name in row)


# -- what a service was started with --------------------------------------------------------------


@pytest.fixture
def process() -> Iterator[Callable[[dict[bytes, bytes]], int]]:
    """Starts processes with an environment, and nothing else in it."""
    started = []

    def start(environment: dict[bytes, bytes]) -> int:
        argv = [sys.executable, "-S", "-c", "print(1, flush=True); import time; time.sleep(600)"]
        child = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout is not None
        # It is what it will be once it has said something.
        assert child.stdout.readline() == b"1\n"
        return child.pid

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, []),
        ({b"LISTEN_FDS": b"2", b"LISTEN_FDNAMES": b"ring:state"}, ["ring", "state"]),
        ({b"LISTEN_FDNAMES": b"ring:ring"}, ["ring", "ring"]),
        ({b"LISTEN_FDNAMES": b""}, []),
        ({b"LISTEN_FDNAMES": b"::ring:"}, ["ring"]),
        # It was forked by the process that systemd had started.
        ({b"LISTEN_PID": b"1", b"LISTEN_FDNAMES": b"ring"}, ["ring"]),
        ({b"XLISTEN_FDNAMES": b"ring"}, []),
        ({b"LISTEN_FDNAMES": b"r\xffng"}, ["r\ufffdng"]),
        # A process can write anything there.
        ({b"LISTEN_FDNAMES": b"r" * 256}, None),
        ({b"LISTEN_FDNAMES": b"r:" * (budget.STORED + 1)}, None),
    ],
)
def test_what_it_was_given(
    pid_1: Pid1,
    process: Callable[[dict[bytes, bytes]], int],
    environment: dict[bytes, bytes],
    names: list[str] | None,
) -> None:
    pid_1.unit("a.service", [], MainPID=process(environment))
    [service] = pid_1.read().stores
    assert service.given == names
    # It can be written, and read again.
    facts = replace(snapshot(FIXED, []), services=Services([service]))
    assert load(bytes_of(facts)).services == facts.services


def test_a_process_that_is_gone(pid_1: Pid1) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    pid_1.unit("a.service", [], MainPID=child.pid)
    assert pid_1.read().stores[0].given is None
    assert os.getpid() != child.pid


# -- files ----------------------------------------------------------------------------------------

SERVICES = Services(
    [
        store(kept=[RING, OWN, SOCKET], given=None),
        store("silent.service", "failed (failed)", "restart", None, []),
    ],
    ["khoscope-carry.service"],
    ["something"],
    False,
)


@pytest.mark.parametrize(
    "services", [None, Services(), SERVICES, replace(SERVICES, survivors=None)]
)
def test_files_keep_them(services: Services | None) -> None:
    again = load(bytes_of(replace(snapshot(FIXED, []), services=services)))
    assert again.services == services
    assert again.unrecorded == []


def test_files_of_an_older_khoscope() -> None:
    """They know nothing of services, and that is no hole in any verdict."""

    def age(meta: dict[str, Any]) -> None:
        del meta["services"]

    facts = load(as_version(6, bytes_of(replace(snapshot(FIXED, []), services=SERVICES)), age))
    assert facts.services is None
    assert facts.unrecorded == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda services: services.update(stores=1), "array"),
        (lambda services: services.update(survivors="a"), "survivors"),
        (lambda services: services.update(is_whole=1), "bool"),
        (lambda services: services.pop("unread"), "unread"),
        (lambda services: services["stores"][0].update(kept=[{}]), "kept"),
        (lambda services: services["stores"][0]["kept"][0].update(inode="1"), "inode"),
        (lambda services: services["stores"][0]["kept"][0].update(inode=1.5), "inode"),
        (lambda services: services["stores"][0].update(unit=None), "unit"),
        (lambda services: services["stores"][0].update(given=[1]), "given"),
        (lambda services: services["stores"][0].update(unit="x" * (budget.TEXT + 1)), ""),
        (lambda services: services.update(survivors=["x"] * (budget.LIST + 1)), ""),
    ],
)
def test_files_that_were_changed(change: Callable[[dict[str, Any]], object], said: str) -> None:
    data = bytes_of(replace(snapshot(FIXED, []), services=SERVICES))
    meta = meta_of(data)
    change(meta["services"])
    assert said in refused(rewritten({"meta.json": json.dumps(meta).encode()}, data), ".")


def meta_of(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("meta.json"))
    return found


# -- across a kexec -------------------------------------------------------------------------------


def came(*now: Service, kept: list[KeptFd] | None = None, **services: Any) -> Came:
    """What became of the only store."""
    before = Services([store(kept=[RING] if kept is None else kept, given=None)])
    found = came_back(*across(before, Services([*now], **services)))
    assert found is not None
    [one] = found
    return one


UP, DOWN = "active (running)", "inactive (dead)"
TWO = [RING, replace(RING, inode=14)]
TWO_CAME = [CAME, replace(CAME, inode=2050)]


@pytest.mark.parametrize(
    ("now", "kept", "lost", "waiting"),
    [
        # Given, and still in the store; given, and removed from it.
        (store(), [RING], [], []),
        (store(kept=[]), [RING], [], []),
        # It was not started with it, or is not started at all.
        (store(given=[]), [RING], [], ["ring"]),
        (store(state=DOWN, given=None), [RING], [], ["ring"]),
        # It is gone: nobody has it, or the unit is not there.
        (store(kept=[], given=[]), [RING], ["ring"], []),
        (store(kept=[], given=None), [RING], ["ring"], []),
        (store(state=DOWN, kept=[], given=None), [RING], ["ring"], []),
        (store("other.service"), [RING], ["ring"], []),
        # What it was started with cannot be looked at, and it is up.
        (store(given=None), [RING], [], []),
        # Of several with a name.
        (store(kept=TWO_CAME, given=["ring", "ring"]), TWO, [], []),
        (store(kept=TWO_CAME, given=["ring"]), TWO, [], ["ring"]),
        (store(kept=TWO_CAME, given=[]), TWO, [], ["ring", "ring"]),
        (store(kept=[CAME], given=["ring"]), TWO, ["ring"], []),
        (store(kept=[CAME], given=["ring", "ring"]), TWO, [], []),
        (store(kept=[], given=[]), TWO, ["ring", "ring"], []),
        # A session that it has stored, and what no kexec hands over.
        (store(kept=[OWN], given=["luo"]), [OWN, SOCKET], [], []),
        (store(kept=[], given=[]), [OWN, SOCKET], ["luo"], []),
        # What it has stored since is its own.
        (store(kept=[CAME, replace(CAME, name="new")]), [RING], [], []),
    ],
)
def test_what_became_of_a_store(
    now: Service, kept: list[KeptFd], lost: list[str], waiting: list[str]
) -> None:
    found = came(now, kept=kept)
    assert (found.unit, found.lost, found.waiting) == ("keeper.service", lost, waiting)
    names = sorted(fd.name for fd in kept if fd.can_go_along)
    assert found.names == names
    assert sorted([*found.back, *found.lost]) == names


def test_stores_that_systemd_closes() -> None:
    """They were not to come."""
    for was in (store(preserve="restart"), store(preserve="no"), store(kept=[SOCKET])):
        assert came_back(*across(Services([was]), Services())) == []


def test_nobody_has_asked() -> None:
    some = Services([store(kept=[RING])])
    assert came_back(*across(None, some)) is None
    assert came_back(*across(some, None)) is None


def test_in_words() -> None:
    assert came(store()).in_words == "ring came back; it is active (running)"
    assert came(store(state=DOWN, given=None)).in_words == (
        "ring came back; ring not taken yet; it is inactive (dead)"
    )
    assert (
        came().in_words
        == "ring did not come back; there is no such service, or it may store nothing"
    )
    many = [replace(RING, name=f"fd{n:02}") for n in range(40)]
    assert came(kept=many).in_words.startswith("fd00, fd01, ")
    assert ", fd07 and 32 more did not come back" in came(kept=many).in_words


def test_rules() -> None:
    report = stored(store(kept=[], given=[]))
    assert [(f.rule, f.units) for f in report.findings] == [("stored-fd-lost", ("keeper.service",))]
    assert (report.verdict, report.incomplete) == ("fail", [])
    report = stored(store(state=DOWN, given=None))
    assert [(f.rule, f.units) for f in report.findings] == [
        ("stored-fd-waits", ("keeper.service",))
    ]
    assert report.verdict == "pass"
    assert stored(store()).findings == []


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        # Of a vmcore or a guest, say.
        (Services([store(kept=[RING])]), None, "back to keeper.service: PID 1 was not asked"),
        (
            Services([store(kept=[RING])]),
            Services(survivors=None, unread=["no bus"], is_whole=False),
            "what came back to keeper.service: PID 1 did not say (no bus)",
        ),
        (
            Services([store(kept=[RING])]),
            Services([store(kept=None)], unread=["keeper.service: no"]),
            "PID 1 did not say (keeper.service: no)",
        ),
        (
            Services([store(kept=None)]),
            Services([store()]),
            "the earlier snapshot: what systemd kept for keeper.service is not known",
        ),
    ],
)
def test_what_pid_1_did_not_say_is_no_pass(
    before: Services, now: Services | None, said: str
) -> None:
    report = compare(*across(before, now))
    assert report.findings == []
    assert report.verdict == "incomplete"
    [what] = report.incomplete
    assert said in what


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, None),
        (Services(), None),
        (Services([store(preserve="restart", kept=None)]), None),
        (Services([store(kept=[SOCKET])]), None),
        # Another service's store could not be read.
        (Services([store(kept=[RING])]), Services([store(), store("b.service", kept=None)])),
    ],
)
def test_what_nobody_needs_to_know(before: Services | None, now: Services | None) -> None:
    assert compare(*across(before, now)).verdict == "pass"


@given(
    st.lists(st.sampled_from("abc"), max_size=6),
    st.lists(st.sampled_from("abc"), max_size=6),
    st.none() | st.lists(st.sampled_from("abc"), max_size=6),
    st.sampled_from([UP, DOWN]),
)
def test_nothing_is_counted_twice(
    had: list[str], kept: list[str], given: list[str] | None, state: str
) -> None:
    before = Services([store(kept=[replace(RING, name=name) for name in had], given=None)])
    now = store(state=state, kept=[replace(CAME, name=name) for name in kept], given=given)
    for each in came_back(*across(before, Services([now]))) or ():
        assert sorted([*each.back, *each.lost]) == sorted(had)
        assert len(each.waiting) <= len(each.back)
        assert not [name for name in each.waiting if name not in kept]


def test_verify_tells_of_services(run: Run, tmp_path: Path) -> None:
    before, now = across(
        Services([store(kept=[RING], given=None), store("lost.service", kept=[RING, OWN])]),
        Services([store()]),
    )
    paths = [tmp_path / "now.khosnap", tmp_path / "before.khosnap"]
    for path, facts in zip(paths, (now, before), strict=True):
        files.save_file(facts, path)
    result = run("--snapshot", paths[0], "verify", "--before", paths[1])
    assert (result.status, result.err) == (1, "")
    assert "keeper.service: ring came back; it is active (running)\n" in result.out
    assert (
        "lost.service: luo, ring did not come back; there is no such service, or it" in result.out
    )
    assert result.last == "FAIL: not intact: stored-fd-lost (1 error, 0 warnings)"
    assert max(map(len, result.out.splitlines())) <= WIDTH
    document = run("--snapshot", paths[0], "verify", "--before", paths[1], "--json").document
    assert document["services"] == [
        {
            "unit": "keeper.service",
            "came": ["ring"],
            "lost": [],
            "waits": [],
            "state": "active (running)",
        },
        {
            "unit": "lost.service",
            "came": [],
            "lost": ["luo", "ring"],
            "waits": [],
            "state": None,
        },
    ]
    [found] = document["findings"]
    assert (found["rule"], found["units"]) == ("stored-fd-lost", ["lost.service"])
    # Where PID 1 was not asked, nothing is said.
    files.save_file(replace(before, services=None), paths[1])
    document = run("--snapshot", paths[0], "verify", "--before", paths[1], "--json").document
    assert "services" not in document
    result = run("--snapshot", paths[0], "verify", "--before", paths[1], "--limit", 1)
    assert "keeper.service" not in result.out


# -- luo ------------------------------------------------------------------------------------------


@pytest.fixture
def luo(run: Run, tmp_path: Path) -> Callable[..., str]:
    """What ``khoscope luo`` prints of services."""

    def luo(services: Services | None, *words: object, memfds: int | None = 3) -> str:
        facts = replace(
            snapshot(FIXED, []),
            liveupdate=LuoState(True, ["memfd-v2"], True, Holders(systemd_memfds=memfds)),
            services=services,
        )
        path = tmp_path / "facts.khosnap"
        files.save_file(facts, path)
        result = run("--snapshot", path, "luo", *words)
        assert (result.status, result.err) == (0, "")
        return result.out

    return luo


def test_luo_as_text(luo: Callable[..., str]) -> None:
    stores = [
        store(kept=[RING, OWN, SOCKET]),
        store("web.service", preserve="restart", kept=[RING]),
        store("log.service", preserve="restart", kept=[SOCKET, SOCKET]),
        store("none.service", kept=[]),
        replace(store("gone.service", "not-found", kept=None), unnamed=2),
    ]
    text = luo(Services(stores))
    assert (
        textwrap.dedent("""\
        systemd keeps these for services; memfds are in no session before the kexec
        begins:
          keeper.service: ring, luo (session vm) and 1 that no kexec hands over
          web.service: ring, and closes them when the service ends
          log.service: 2 that no kexec hands over, and closes them when the service ends
          gone.service: 2 descriptors of a unit that is not-found
        """)
        in text
    )
    assert max(map(len, text.splitlines())) <= WIDTH
    # What is there by name need not be counted.
    assert "3 memfds" not in text
    assert "none.service" not in text


def test_luo_is_limited(luo: Callable[..., str]) -> None:
    many = [replace(RING, name=f"fd{n}") for n in range(30)]
    stores = [store(f"s{n}.service", kept=many) for n in range(5)]
    text = luo(Services(stores), "--limit", 2)
    assert "  s0.service: fd0, fd1 and 28 more\n" in text
    assert "… 3 more services" in text
    assert "s2.service" not in text
    assert "fd29" in luo(Services(stores), "--limit", 0)


def test_luo_where_pid_1_did_not_say(luo: Callable[..., str]) -> None:
    text = luo(Services(survivors=None, unread=["systemctl is not installed"], is_whole=False))
    assert "systemd has 3 memfds open" in text
    assert "systemd was asked, and did not say all: systemctl is not installed" in text
    assert "systemd has 3 memfds open" in luo(None)
    text = luo(Services())
    assert "systemd has" not in text
    assert "systemd keeps" not in text


def test_luo_as_json(luo: Callable[..., str]) -> None:
    found = Services([store(kept=[RING, SOCKET]), store("b.service", kept=None)], unread=["b"])
    document = json.loads(luo(found, "--json"))
    assert document["services"] == {
        "unread": ["b"],
        "stores": [
            {
                "unit": "keeper.service",
                "state": "active (running)",
                "preserve": "yes",
                "fds": [
                    {
                        "name": "ring",
                        "path": "/memfd:ring (deleted)",
                        "session": None,
                        "goes_along": True,
                    },
                    {
                        "name": "listen",
                        "path": "socket:[4711]",
                        "session": None,
                        "goes_along": False,
                    },
                ],
                "unnamed_fds": 0,
            },
            {
                "unit": "b.service",
                "state": "active (running)",
                "preserve": "yes",
                "fds": None,
                "unnamed_fds": 0,
            },
        ],
    }
    assert json.loads(luo(None, "--json"))["services"] is None


def test_names_cannot_forge_a_line(luo: Callable[..., str]) -> None:
    evil = "a\nsession 'vm'\x1b[2J"
    text = luo(Services([store(evil, evil, evil, [replace(RING, name=evil)])], unread=[evil]))
    assert "\x1b" not in text
    assert not any(line.startswith("session 'vm'") for line in text.splitlines())


# -- when it is asked -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fossil")
    unpack(FOSSILS / f"7.2-fixed{SUFFIX}", directory)
    return directory


@pytest.fixture
def kernel(cores: Path, monkeypatch: pytest.MonkeyPatch) -> KernelSource:
    """A real kernel that takes itself for the running one, where PID 1 says little."""
    monkeypatch.setattr("khoscope.sources.kernel.is_this_host", lambda prog: True)
    monkeypatch.setattr("khoscope.sources.kernel.read_services", lambda: SERVICES)
    return KernelSource(open_core(cores / "before"), "made", moves=False)


def judged(kernel: KernelSource, **options: Any) -> Snapshot:
    return kernel.judge(lambda facts, before: None, **options)[0]


def test_who_asks(kernel: KernelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.luo().services == SERVICES
    assert kernel.snapshot(stamps=False).services == SERVICES
    gate = judged(kernel, gate=True)
    assert gate.services == SERVICES
    assert gate.liveupdate is not None
    assert gate.liveupdate.holders is not None
    # Any verdict needs it: such services use KHO.
    assert judged(kernel).services == SERVICES
    # Nor is there anything to ask of another host.
    monkeypatch.setattr("khoscope.sources.kernel.is_this_host", lambda prog: False)
    assert kernel.luo().services is None
    assert judged(kernel, gate=True).services is None


@pytest.mark.parametrize(
    ("was", "wanted"), [(None, None), (Services(), SERVICES), (SERVICES, SERVICES)]
)
def test_what_is_lost_where_luo_is_off(
    kernel: KernelSource,
    was: Services | None,
    wanted: Services | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """systemd keeps nothing of before there: who had something has to be told."""
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "liveupdate", lambda self: LuoState(False))
        before = replace(kernel.snapshot(stamps=False), services=was)
        assert kernel.luo().services is None
        assert judged(kernel, before=before).services == wanted
        assert kernel.snapshot(before).services == wanted
