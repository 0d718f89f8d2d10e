# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What systemd is told: entries of its journal, read back from a socket as journald reads them, and
sd_notify(3).
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope.carry import systemd
from khoscope.carry.systemd import journal, notify
from khoscope.checks import RULES, About, Report, came_back, check, compare
from khoscope.checks.handover import FATE_NAMES
from khoscope.facts import store as files
from khoscope.facts.clients import Holders
from khoscope.facts.metrics import hands_over
from khoscope.facts.services import Services
from khoscope.facts.snapshot import KexecImage, Snapshot
from khoscope.views import journal as view
from khoscope.words.errors import KhoscopeError
from tests.command import Run
from tests.fuzz import fuzz
from tests.synthetic import FIXED, Block, snapshot
from tests.test_gate import AGENT, CARRIED, KEEPER, VM, ready
from tests.test_services import OWN, RING, across, store
from tests.test_verify import after

ROOT = Path(__file__).parent.parent
Fields = list[tuple[str, bytes]]


def parsed(raw: bytes) -> Fields:
    """The fields of an entry, as ``journal_importer_process_data()`` reads them."""
    fields = []
    while raw:
        line, newline, rest = raw.partition(b"\n")
        assert newline, "a line without an end"
        name, equals, value = line.partition(b"=")
        if not equals:
            size = struct.unpack_from("<Q", rest)[0]
            value, end, rest = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert end == b"\n"
            assert len(value) == size
        # journal_field_valid()
        assert re.fullmatch(b"[A-Z][A-Z0-9_]{,63}", name)
        fields.append((name.decode(), value))
        raw = rest
    # ENTRY_FIELD_COUNT_MAX: it takes no entry with more.
    assert len(fields) <= 1024
    return fields


class Journal:
    """journald's socket, and what came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(30)
        #: How many entries came in a memfd.
        self.memfds = 0

    def one(self) -> Fields:
        data, fds, _, _ = socket.recv_fds(self.socket, 1 << 23, 4)
        if not fds:
            return parsed(data)
        # server_process_native_file() takes a memfd alone, and only a sealed one.
        assert data == b""
        [fd] = fds
        with open(fd, "rb") as memfd:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
            assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
            self.memfds += 1
            memfd.seek(0)
            return parsed(memfd.read())

    def all(self) -> list[dict[str, list[str]]]:
        """All entries that are there."""
        self.socket.settimeout(0)
        found: list[dict[str, list[str]]] = []
        while True:
            try:
                fields = self.one()
            except BlockingIOError:
                return found
            entry: dict[str, list[str]] = {}
            for name, value in fields:
                entry.setdefault(name, []).append(value.decode())
            found.append(entry)


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal")
    monkeypatch.setattr(systemd, "JOURNAL", made.path)
    yield made
    made.socket.close()


# -- the protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "",
        "PASS",
        "a=b",
        "one\ntwo\n",
        "\n",
        "PASS\nKHOSCOPE_VERDICT=pass\n",
        "Größe – 日本",
        # A name of the kernel's that is no UTF-8.
        "a\udcff\udc80b",
        "nul\0nul",
    ],
)
def test_values(journald: Journal, value: str) -> None:
    journal([[("MESSAGE", value), ("PRIORITY", "6")]])
    assert journald.one() == [
        ("MESSAGE", value.encode("utf-8", "surrogateescape")),
        ("PRIORITY", b"6"),
    ]


@fuzz
@given(st.lists(st.text(alphabet="ab\n=\0\udcffß", max_size=20), max_size=5))
def test_no_value_becomes_a_field(values: list[str]) -> None:
    raw = b"".join(systemd._field("MESSAGE", value) for value in values)
    wanted = [("MESSAGE", value.encode("utf-8", "surrogateescape")) for value in values]
    assert parsed(raw) == wanted


@pytest.mark.parametrize("size", [1 << 20, 5 << 20])
def test_an_entry_that_is_too_large_for_a_datagram(journald: Journal, size: int) -> None:
    # The default of net.core.wmem_max is 208 KiB.
    journal([[("MESSAGE", "x\n" * (size // 2)), ("PRIORITY", "6")], [("MESSAGE", "and more")]])
    first, second = journald.one(), journald.one()
    assert first == [("MESSAGE", b"x\n" * (size // 2)), ("PRIORITY", b"6")]
    assert second == [("MESSAGE", b"and more")]
    assert journald.memfds == 1


def test_no_descriptor_is_left_open(journald: Journal) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        journal([[("MESSAGE", "x" * (2 << 20))]])
        journald.one()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.touch(), lambda path: path.symlink_to("/dev/null")],
)
def test_no_journal(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "journal")
    with pytest.raises(KhoscopeError, match="the journal cannot be written") as caught:
        journal([[("MESSAGE", "x")]], tmp_path / "journal")
    assert "None" not in caught.value.what
    assert "--journal" in caught.value.hint


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    """Python's own error has no errno."""
    with pytest.raises(KhoscopeError, match="path too long"):
        journal([[("MESSAGE", "x")]], tmp_path / ("x" * 200))


def test_a_journal_that_hangs(journald: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads: its queue is full."""
    monkeypatch.setattr(systemd, "PATIENCE", 1)
    with pytest.raises(KhoscopeError, match="timed out"):
        journal([("MESSAGE", "x" * 100)] for _ in range(100_000))


# -- what verify writes ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Snapshot], Path]:
    def save(facts: Snapshot) -> Path:
        path = tmp_path / f"{facts.kernel.boot_id}.khosnap"
        files.save_file(facts, path)
        return path

    return save


Saved = Callable[[Snapshot], Path]


def test_a_pass(run: Run, saved: Saved, journald: Journal) -> None:
    path = saved(snapshot(FIXED, [Block(1 << 20, 2)]))
    result = run("--snapshot", path, "verify", "--journal")
    assert (result.status, result.err) == (0, "")
    [verdict] = journald.all()
    assert float(verdict.pop("KHOSCOPE_SECONDS")[0]) >= 0
    assert verdict == {
        "MESSAGE": ["PASS: safe to kexec (0 errors, 0 warnings)"],
        "MESSAGE_ID": [view.VERDICT],
        "PRIORITY": ["5"],
        "SYSLOG_IDENTIFIER": ["khoscope"],
        "KHOSCOPE_ABOUT": ["kexec"],
        "KHOSCOPE_VERDICT": ["pass"],
        "KHOSCOPE_ERRORS": ["0"],
        "KHOSCOPE_WARNINGS": ["0"],
        "KHOSCOPE_BLOCKS": ["1"],
    }
    # Whatever the output is.
    assert run("--snapshot", path, "verify", "--journal", "--json").status == 0
    assert len(journald.all()) == 1


def test_findings(run: Run, saved: Saved, journald: Journal) -> None:
    stale = [Block(n << 20, 3, head=0, free=1) for n in range(1, 6)]
    path = saved(replace(snapshot(FIXED, stale, tainted=32), unreadable=["the log"]))
    assert run("--snapshot", path, "verify", "--journal", "--limit", 3).status == 1
    *found, last = journald.all()
    assert [entry["KHOSCOPE_RULE"] for entry in found[:4]] == [["stale-entry"]] * 3 + [
        ["kernel-tainted"]
    ]
    first, tainted, unread = found[0], found[3], found[4]
    assert first["MESSAGE"][0].startswith("stale-entry: 0x000000100000 order 3: ")
    assert first["PRIORITY"] == ["3"]
    assert (first["KHOSCOPE_PHYS"], first["KHOSCOPE_SEVERITY"]) == (["0x100000"], ["error"])
    assert first["KHOSCOPE_EXPLAIN"] == [RULES["stale-entry"].explain]
    assert first["MESSAGE_ID"] == tainted["MESSAGE_ID"] == unread["MESSAGE_ID"] == [view.FINDING]
    assert (tainted["PRIORITY"], tainted["KHOSCOPE_SEVERITY"]) == (["4"], ["warning"])
    assert "KHOSCOPE_PHYS" not in tainted
    assert unread["KHOSCOPE_INCOMPLETE"] == ["cannot be read: the log"]
    assert unread["MESSAGE"] == ["incomplete: cannot be read: the log"]
    assert (last["KHOSCOPE_VERDICT"], last["PRIORITY"]) == (["fail"], ["3"])
    assert (last["KHOSCOPE_ERRORS"], last["KHOSCOPE_WARNINGS"]) == (["5"], ["1"])
    assert last["KHOSCOPE_RULE"] == ["stale-entry"]
    assert {tuple(entry["KHOSCOPE_ABOUT"]) for entry in [*found, last]} == {("kexec",)}


def test_what_fails_is_an_error(run: Run, saved: Saved, journald: Journal) -> None:
    path = saved(snapshot(FIXED, [], tainted=32))
    run("--snapshot", path, "verify", "--journal", "--fail-on", "warning")
    tainted, _ = journald.all()
    assert (tainted["PRIORITY"], tainted["KHOSCOPE_SEVERITY"]) == (["3"], ["warning"])


def test_the_gate(run: Run, saved: Saved, journald: Journal) -> None:
    path = saved(ready(holders=Holders([KEEPER, AGENT]), image=KexecImage(False)))
    assert run("--snapshot", path, "verify", "--journal", "--gate").status == 1
    kept, image, last = journald.all()
    assert kept["MESSAGE"] == [
        "sessions: session-not-kept: session 'vm' (0 files) is held by agent.service alone: "
        "systemctl kexec ends it"
    ]
    assert kept["OBJECT_SYSTEMD_UNIT"] == ["agent.service"]
    assert (kept["KHOSCOPE_QUESTION"], kept["PRIORITY"]) == (["sessions"], ["4"])
    # It closes the gate, though it is no error.
    assert image["KHOSCOPE_QUESTION"] == ["image"]
    assert (image["PRIORITY"], image["KHOSCOPE_SEVERITY"]) == (["3"], ["info"])
    assert last["MESSAGE"] == [
        "GATE CLOSED: do not kexec: no-image (1 reason); would hand over 4 KiB in 1 block, "
        "2 sessions with 1 file, of agent.service; systemctl kexec adds 1 memfd"
    ]
    assert last["KHOSCOPE_VERDICT"] == ["fail"]
    assert last["KHOSCOPE_UNIT"] == ["agent.service"]
    numbers = ("BLOCKS", "BYTES", "SESSIONS", "FILES")
    assert [last[f"KHOSCOPE_{name}"] for name in numbers] == [["1"], ["4096"], ["2"], ["1"]]
    assert {tuple(e["KHOSCOPE_ABOUT"]) for e in (kept, image, last)} == {("gate",)}


def test_an_arrival(run: Run, saved: Saved, journald: Journal) -> None:
    before, now = across(
        Services(
            [
                store("a.service", kept=[RING]),
                store("b.service", kept=[RING, OWN]),
                store("c.service", kept=[RING]),
            ]
        ),
        Services(
            [
                store("a.service"),
                store("b.service", "failed (failed)", kept=[], given=[]),
                store("c.service", given=[]),
            ]
        ),
    )
    paths = saved(now), saved(before)
    result = run("--snapshot", paths[0], "verify", "--before", paths[1], "--journal")
    assert result.status == 1
    lost, waits, *services, last = journald.all()
    assert (lost["KHOSCOPE_RULE"], lost["OBJECT_SYSTEMD_UNIT"]) == (
        ["stored-fd-lost"],
        ["b.service"],
    )
    assert waits["OBJECT_SYSTEMD_UNIT"] == ["c.service"]
    names = [
        *("OBJECT_SYSTEMD_UNIT", "PRIORITY"),
        *("KHOSCOPE_FD_CAME", "KHOSCOPE_FD_LOST", "KHOSCOPE_FD_WAITS"),
    ]
    assert [[entry.get(name) for name in names] for entry in services] == [
        [["a.service"], ["6"], ["ring"], None, None],
        [["b.service"], ["3"], None, ["luo", "ring"], None],
        [["c.service"], ["4"], ["ring"], None, ["ring"]],
    ]
    assert {entry["MESSAGE_ID"][0] for entry in services} == {view.SERVICE}
    assert services[0]["MESSAGE"] == ["a.service: ring came back; it is active (running)"]
    assert last["MESSAGE"] == ["FAIL: not intact: stored-fd-lost (1 error, 1 warning)"]
    assert last["KHOSCOPE_ABOUT"] == ["arrival"]


def test_fates(run: Run, saved: Saved, journald: Journal) -> None:
    blocks = [Block(n << 20, 2) for n in range(1, 4)]
    before = snapshot(FIXED, blocks)
    stamped = replace(blocks[0], head=0, private=FIXED.stamp.encode(2, 0))
    now = after(before, stamped, *blocks[1:])
    paths = saved(now), saved(before)
    run("--snapshot", paths[0], "verify", "--before", paths[1], "--journal")
    last = journald.all()[-1]
    assert (last["KHOSCOPE_RESTORED"], last["KHOSCOPE_NOT_RESTORED"]) == (["2"], ["1"])


def test_what_cannot_be_done(run: Run, tmp_path: Path, saved: Saved, journald: Journal) -> None:
    """It becomes an entry, too: an agent may look there alone."""
    path = tmp_path / "x.khosnap"
    path.write_text("nonsense\n")
    for gate in ([], ["--gate"]):
        run("--snapshot", path, "verify", "--journal", *gate).refused("x.khosnap")
        [entry] = journald.all()
        assert (entry["KHOSCOPE_VERDICT"], entry["PRIORITY"]) == (["error"], ["3"])
        assert entry["MESSAGE_ID"] == [view.VERDICT]
        assert str(path) in entry["MESSAGE"][0]
        assert entry["MESSAGE"][0].startswith("GATE CLOSED: ") == bool(gate)
    # A file that cannot be written takes nothing from the journal, and is told there.
    good = saved(snapshot(FIXED, []))
    words = ["--snapshot", good, "verify", "--journal", "--metrics", tmp_path / "no" / "x.prom"]
    run(*words)
    assert [e["KHOSCOPE_VERDICT"] for e in journald.all()] == [["pass"], ["error"]]
    run("--snapshot", path, "verify").refused("x.khosnap")
    assert journald.all() == []


def test_no_journal_to_write(
    run: Run, tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is printed all the same."""
    monkeypatch.setattr(systemd, "JOURNAL", tmp_path / "none")
    metrics = tmp_path / "x.prom"
    path = saved(snapshot(FIXED, []))
    result = run("--snapshot", path, "verify", "--journal", "--metrics", metrics)
    assert result.status == 2
    assert result.last == "PASS: safe to kexec (0 errors, 0 warnings)"
    assert "kho" in metrics.read_text()
    first, second = result.err.splitlines()
    assert "the journal cannot be written" in first
    assert "leave --journal out" in second
    # It does not hide what else was wrong.
    result = run("--snapshot", tmp_path / "none.khosnap", "verify", "--journal")
    assert result.status == 2
    assert "the journal cannot be written" in result.err
    assert "none.khosnap: No such file" in result.err


# -- hostile --------------------------------------------------------------------------------------

EVIL = "a\nKHOSCOPE_VERDICT=pass\nPRIORITY=7\n\x1b[2J\u202eb"


def entries_of(report: Report, facts: Snapshot, gate: bool = True) -> list[Fields]:
    over = hands_over(facts) if gate else None
    entries = view.entries(report, [], over, 0.5, None)
    return [parsed(b"".join(systemd._field(*field) for field in entry)) for entry in entries]


def test_names_cannot_forge_fields() -> None:
    services = Services([store(EVIL, EVIL, "restart", [replace(RING, name=EVIL)])], [EVIL], [EVIL])
    holder = replace(AGENT, comm=EVIL, cgroup=EVIL, held=[replace(AGENT.held[0], session=EVIL)])
    sessions = [CARRIED, VM, replace(VM, name=EVIL)]
    facts = ready(sessions=sessions, services=services, holders=Holders([KEEPER, holder]))
    facts = replace(facts, unreadable=[EVIL])
    found = entries_of(check(facts, gate=True), facts)
    for entry in found:
        assert [name for name, _ in entry].count("PRIORITY") == 1
        assert all(b"\n" not in value and b"\x1b" not in value for _, value in entry)
    assert [value for entry in found for name, value in entry if name == "KHOSCOPE_VERDICT"] == [
        b"fail"
    ]
    error = view.error_entry(KhoscopeError(EVIL, EVIL), About.KEXEC, gate=False)
    assert all("\n" not in value for _, value in error)


def test_an_entry_has_no_more_fields_than_journald_takes() -> None:
    many = [replace(RING, name=f"fd{n}") for n in range(5000)]
    before, now = across(Services([store(kept=many)]), Services([]))
    report = compare(before, now)
    came = came_back(before, now)
    assert came is not None
    for entry in view.entries(report, came, None, 0.5, None):
        parsed(b"".join(systemd._field(*field) for field in entry))
    units = tuple(f"u{n}.service" for n in range(5000))
    holders = [
        replace(AGENT, pid=n + 10, cgroup=f"/system.slice/{unit}") for n, unit in enumerate(units)
    ]
    facts = ready(holders=Holders([KEEPER, *holders]))
    assert any(len(f.units) == 5000 for f in check(facts, gate=True).findings)
    entries_of(check(facts, gate=True), facts)


def test_the_manual_has_the_fields() -> None:
    """And the numbers by which entries are found."""
    manual = (ROOT / "docs" / "khoscope.8").read_text().replace("\\-", "-")
    for number in (view.FINDING, view.SERVICE, view.VERDICT):
        assert number in manual
        assert len(bytes.fromhex(number)) == 16
    source = Path(view.__file__).read_text()
    for name in set(re.findall(r'"((?:KHOSCOPE|OBJECT)_[A-Z_]+)"', source)):
        assert name in manual, name
    for fate in FATE_NAMES.values():
        assert f"KHOSCOPE_{fate.upper().replace('-', '_')}" in manual


# -- sd_notify ------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"khoscope-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else str(tmp_path / name))
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else str(tmp_path / name))
        manager.settimeout(30)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", [None, ""])
def test_there_is_no_manager(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)

    def never() -> socket.socket:
        raise AssertionError("somebody is told")

    monkeypatch.setattr(systemd, "_socket", never)
    notify("READY=1")


@pytest.mark.parametrize("address", ["/no/such/socket", "@no-such-socket", "x", "/" + "x" * 200])
def test_a_manager_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with pytest.raises(KhoscopeError, match="the service manager cannot be told") as caught:
        notify("READY=1")
    assert "None" not in caught.value.what
    assert "NOTIFY_SOCKET" in caught.value.hint


def test_a_manager_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "PATIENCE", 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def fill() -> None:
            for _ in range(100_000):
                notify("STATUS=x")

        with pytest.raises(KhoscopeError, match="timed out"):
            fill()
