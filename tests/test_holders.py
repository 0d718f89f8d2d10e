# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Who holds sessions of LUO: what follows from it, how it is shown, and tasks and files as no kernel
has them, made by hand in the memory of a real one.

Holders on booted kernels are in tests/vm/test_clients.py.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drgn import Program, offsetof, sizeof

from khoscope.facts import budget, store
from khoscope.facts.clients import Held, Holder, Holders, Luo, LuoSession, LuoState
from khoscope.facts.holders import DEVICE, by_thing, unit_of
from khoscope.facts.snapshot import Snapshot
from khoscope.sources.clients import Where
from khoscope.sources.holders import PIECE, read_holders
from khoscope.sources.kernel import KernelSource
from khoscope.sources.open import open_core
from tests.command import Run
from tests.synthetic import FIXED, snapshot
from tests.test_store import as_version, bytes_of, load
from vm.fossil import FOSSILS, SUFFIX, unpack

# -- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/init.scope", "init.scope"),
        ("/system.slice/ssh.service", "ssh.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/system.slice/docker-0123abcd.scope", "docker-0123abcd.scope"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/machine.slice/machine-qemu\\x2d1\\x2dweb.scope", "machine-qemu\\x2d1\\x2dweb.scope"),
        ("/machine.slice/machine-qemu\\x2d1.scope/libvirt/emulator", "machine-qemu\\x2d1.scope"),
        # What is below a unit is the unit's own business.
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/a.service",
            "user@1000.service",
        ),
        (
            "/machine.slice/systemd-nspawn@web.service/payload/system.slice/ssh.service",
            "systemd-nspawn@web.service",
        ),
        # systemd escapes names that could be those of the kernel's own files.
        ("/system.slice/_cpu.service", "cpu.service"),
        ("/_cpu.slice/a.service", "a.service"),
        # No units.
        (None, None),
        ("", None),
        ("/", None),
        ("/system.slice", None),
        ("/kubepods/pod1/c1", None),
        ("/lxc/a.service", None),
        ("/system.slice/getty@.service", None),
        ("/system.slice/.service", None),
        ("/system.slice/a b.service", None),
        ("/system.slice/a.service\n", None),
        ("/system.slice/\x1b[2Ja.service", None),
        (f"/system.slice/{'a' * 248}.service", None),
        ("/.slice/a.service", None),
    ],
)
def test_units(cgroup: str | None, unit: str | None) -> None:
    assert unit_of(cgroup) == unit


# -- facts ------------------------------------------------------------------------------------

BOOTED = 1_700_000_000 * 10**9
PID_1 = Holder(1, "systemd", "/init.scope", 1_500_000_000, [Held("vm", False, 2)])
AGENT = Holder(
    4242,
    "agent",
    "/system.slice/agent.service",
    90 * 10**9,
    [Held(None, False, 1), Held("vm", False, 1), Held("vm", True, 1)],
)
GONE = Holder(7, "", None, None, [Held("old", True, 1)])
HOLDERS = Holders([PID_1, GONE, AGENT], BOOTED)


def with_holders(holders: Holders | None, in_use: bool | None = True) -> Snapshot:
    facts = snapshot(FIXED, [])
    sessions = [LuoSession("vm", False, 0), LuoSession("lost", False, 0)]
    came = [LuoSession("vm", True, 0), LuoSession("old", True, 0), LuoSession("new", False, 0)]
    outgoing = replace(facts.outgoing, luo=Luo(0x1000, "luo-v5", 3, True, sessions))
    return replace(
        facts,
        outgoing=outgoing,
        incoming=replace(facts.outgoing, luo=Luo(0x1000, "luo-v5", 2, True, came)),
        liveupdate=LuoState(True, ["memfd-v2"], in_use, holders),
    )


def test_by_what_they_hold() -> None:
    found = by_thing(LuoState(True, [], True, HOLDERS))
    assert found is not None
    pids = {thing: [(each.process.pid, each.fds) for each in held] for thing, held in found.items()}
    assert pids == {
        DEVICE: [(4242, 1)],
        ("vm", False): [(1, 2), (4242, 1)],
        ("vm", True): [(4242, 1)],
        ("old", True): [(7, 1)],
    }
    (agent,) = found[DEVICE]
    assert agent.unit == "agent.service"
    assert agent.since == datetime.datetime(2023, 11, 14, 22, 14, 50, tzinfo=datetime.UTC)
    assert found["nobody's", False] == []
    for without in (None, LuoState(True)):
        assert by_thing(without) is None


@pytest.mark.parametrize("holders", [None, Holders(), replace(HOLDERS, booted=None, left_out=3)])
def test_files_keep_them(holders: Holders | None) -> None:
    facts = with_holders(holders)
    again = load(bytes_of(facts))
    assert again.liveupdate == facts.liveupdate
    assert again.unrecorded == []


def test_files_of_an_older_khoscope() -> None:
    """They have no holders, and that is no hole in any verdict."""

    def age(meta: dict[str, Any]) -> None:
        del meta["liveupdate"]["holders"]

    facts = load(as_version(6, bytes_of(with_holders(HOLDERS)), age))
    assert facts.liveupdate == LuoState(True, ["memfd-v2"], True)
    assert facts.unrecorded == []


# -- views ------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path: Path, run: Run) -> Callable[..., str]:
    """What ``khoscope luo`` prints of a snapshot."""

    def ask(facts: Snapshot, *words: str) -> str:
        path = tmp_path / "facts.khosnap"
        store.save_file(facts, path)
        result = run("--snapshot", path, "luo", *words)
        assert (result.status, result.err) == (0, "")
        return result.out

    return ask


def test_as_text(ask: Callable[..., str]) -> None:
    text = ask(with_holders(HOLDERS))
    assert (
        "/dev/liveupdate is held by agent (pid 4242), unit agent.service, running since\n"
        "  2023-11-14 22:14:50Z\n"
    ) in text
    assert (
        "  session vm: 0 files, 0 B\n"
        "    held by systemd (pid 1), unit init.scope, running since 2023-11-14\n"
        "      22:13:21Z, 2 descriptors\n"
        "    held by agent (pid 4242), unit agent.service, running since 2023-11-14\n"
        "      22:14:50Z\n"
    ) in text
    assert "  session lost: 0 files, 0 B\n    held by nobody that khoscope can see\n" in text
    _, _, incoming = text.partition("incoming: ")
    assert (
        "  session old: 0 files, 0 B, retrieved\n"
        "    held by a process that cannot be read (pid 7)\n"
    ) in incoming
    # Nobody can hold what nobody has retrieved.
    assert incoming.endswith("  session new: 0 files, 0 B\n")
    assert max(map(len, text.splitlines())) <= 80


def test_without_the_clock(ask: Callable[..., str]) -> None:
    text = ask(with_holders(replace(HOLDERS, booted=None)))
    assert "running since 90 s after the boot" in " ".join(text.split())


def test_a_cgroup_that_is_no_unit(ask: Callable[..., str]) -> None:
    holder = replace(PID_1, cgroup="/lxc/web")
    assert "held by systemd (pid 1), cgroup /lxc/web, running" in ask(
        with_holders(replace(HOLDERS, processes=[holder]))
    )


def test_what_could_not_be_seen(ask: Callable[..., str]) -> None:
    text = ask(with_holders(Holders(unread=["3 of the open files (struct file)"], left_out=5)))
    assert "/dev/liveupdate is open, held by nobody that khoscope can see" in text
    assert "cannot be read: 3 of the open files" in " ".join(text.split())
    assert "at least 5 more file descriptors, or tables of them: not looked at" in text
    text = ask(with_holders(None))
    assert "held by" not in text
    assert "/dev/liveupdate" not in text


def test_what_systemd_keeps(ask: Callable[..., str]) -> None:
    """It is in no session until the kexec begins: to say nothing of it would mislead."""
    said = "systemd has 2 memfds open: what it keeps for services is in no session before"
    assert said in " ".join(ask(with_holders(Holders(systemd_memfds=2))).split())
    for other in (0, None):
        assert "systemd has" not in ask(with_holders(Holders(systemd_memfds=other)))


def test_many_holders_are_limited(ask: Callable[..., str]) -> None:
    many = [replace(PID_1, pid=pid) for pid in range(1, 31)]
    text = ask(with_holders(Holders(many, BOOTED)), "--limit", "3")
    assert text.count("held by systemd") == 3
    assert "27 more processes" in text


def test_as_json(ask: Callable[..., str]) -> None:
    document = json.loads(ask(with_holders(replace(HOLDERS, left_out=1)), "--json"))
    agent = {
        "pid": 4242,
        "comm": "agent",
        "cgroup": "/system.slice/agent.service",
        "unit": "agent.service",
        "started": 90.0,
        "since": "2023-11-14T22:14:50Z",
        "fds": 1,
    }
    assert document["device"] == {"in_use": True, "held_by": [agent]}
    assert document["holders"] == {"left_out": 1, "unread": [], "systemd_memfds": None}
    vm, lost = document["outgoing"]["sessions"]
    assert [each["pid"] for each in vm["held_by"]] == [1, 4242]
    assert lost["held_by"] == []
    vm, old, new = document["incoming"]["sessions"]
    assert vm["held_by"] == [agent]
    assert [(each["pid"], each["since"], each["started"]) for each in old["held_by"]] == [
        (7, None, None)
    ]
    assert new["held_by"] == []
    document = json.loads(ask(with_holders(None), "--json"))
    assert document["device"] == {"in_use": True, "held_by": None}
    assert document["holders"] is None
    assert {each["held_by"] for each in document["outgoing"]["sessions"]} == {None}


# -- memory -----------------------------------------------------------------------------------

#: ``phys_addr_t`` of memory that the fossil lacks, and its size.
BASE, SIZE = 0x8000000, 1 << 21


class Made:
    """Tasks and files in a kernel's memory, made by hand with its own types."""

    def __init__(self, core: Path) -> None:
        self.prog: Program = open_core(core)
        source = KernelSource(self.prog, "made", moves=False)
        self.direct_map = source.layout.direct_map
        self.where: Where = source._where(source._begin())
        self._memory = bytearray(SIZE)
        self._used = 0
        self._root = self.prog["init_pid_ns"].idr.idr_rt.address_of_().value_()
        self._head = 0
        for address in (BASE, self.direct_map + BASE):
            physical = address == BASE
            self.prog.add_memory_segment(address, SIZE, self._read(address), physical)
        xa_head = offsetof(self.prog.type("struct xarray"), "xa_head")
        self.prog.add_memory_segment(self._root + xa_head, 8, self._read_head)
        self.root = self.new("struct xa_node")
        self._tasks = 0
        self._head = self.root | 2

    def _read(self, begin: int) -> Callable[[int, int, int, bool], bytes]:
        def read(address: int, count: int, offset: int, physical: bool) -> bytes:
            return bytes(self._memory[address - begin : address - begin + count])

        return read

    def _read_head(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        return self._head.to_bytes(8, "little")[offset : offset + count]

    def holders(self, moves: bool = False) -> Holders:
        return read_holders(replace(self.where, moves=moves), self.direct_map)

    def room(self, size: int) -> int:
        """The virtual address of new memory, all zeros."""
        at = self._used
        self._used += -(-size // 64) * 64
        assert self._used <= SIZE
        return self.direct_map + BASE + at

    def put(self, at: int, data: bytes) -> None:
        begin = at - self.direct_map - BASE
        self._memory[begin : begin + len(data)] = data

    def new(self, structure: str, **members: int | bytes) -> int:
        """The address of a new structure."""
        at = self.room(sizeof(self.prog.type(structure)))
        for path, value in members.items():
            self.set(at, structure, path, value)
        return at

    def set(self, at: int, structure: str, path: str, value: int | bytes) -> None:
        of = self.prog.type(structure)
        if isinstance(value, int):
            # What is in an array here is a pointer.
            size = 8 if "[" in path else sizeof(of.member(path).type)
            value = value.to_bytes(size, "little")
        self.put(at + offsetof(of, path), value)

    def task(self, pid: int, files: int, tgid: int | None = None, comm: bytes = b"some") -> int:
        task = self.new(
            "struct task_struct",
            pid=pid,
            tgid=pid if tgid is None else tgid,
            files=files,
            comm=comm,
            start_boottime=pid * 10**9,
        )
        link = task + offsetof(self.prog.type("struct task_struct"), "pid_links[0]")
        entry = self.new("struct pid")
        self.set(entry, "struct pid", "tasks[0].first", link)
        self.set(self.root, "struct xa_node", f"slots[{self._tasks}]", entry)
        self._tasks += 1
        return task

    def table(self, *files: int, max_fds: int = 64) -> int:
        fd = self.room(8 * 64)
        self.put(fd, b"".join(each.to_bytes(8, "little") for each in files))
        fdt = self.new("struct fdtable", max_fds=max_fds, fd=fd)
        return self.new("struct files_struct", fdt=fdt)

    def file(self, fops: str = "", private: int = 0) -> int:
        operations = self.prog.symbol(fops).address if fops else 0
        return self.new("struct file", f_op=operations, private_data=private)

    def session(self, name: bytes, retrieved: bool = False) -> int:
        at = self.new("struct luo_session", name=name, retrieved=int(retrieved))
        return self.file("luo_session_fops", at)

    def device(self) -> int:
        return self.file("luo_fops")


@pytest.fixture(scope="module")
def fossil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("holders")
    unpack(FOSSILS / f"7.2-fixed{SUFFIX}", directory)
    return directory / "before"


@pytest.fixture
def made(fossil: Path) -> Made:
    return Made(fossil)


def held(holders: Holders) -> dict[int, list[tuple[str | None, bool, int]]]:
    return {p.pid: [(h.session, h.retrieved, h.fds) for h in p.held] for p in holders.processes}


def test_processes_and_threads(made: Made) -> None:
    """Tables may be shared by processes, and a thread may have one of its own."""
    other, vm, old = made.file(), made.session(b"vm"), made.session(b"old", retrieved=True)
    shared = made.table(other, vm, 0, vm, made.device())
    made.task(1, shared, comm=b"init")
    made.task(20, shared)
    made.task(30, made.table(other))
    made.task(31, made.table(0, old), tgid=30)
    made.task(40, 0)
    # A leader that has ended, and whose thread goes on.
    made.task(50, 0, comm=b"leader")
    made.task(51, made.table(vm), tgid=50, comm=b"thread")
    found = made.holders()
    both = [(None, False, 1), ("vm", False, 2)]
    assert held(found) == {1: both, 20: both, 30: [("old", True, 1)], 50: [("vm", False, 1)]}
    assert (found.unread, found.left_out) == ([], 0)
    assert [each.comm for each in found.processes] == ["init", "some", "some", "leader"]
    assert [each.started for each in found.processes] == [pid * 10**9 for pid in (1, 20, 30, 50)]


def test_a_name_that_is_not_text(made: Made) -> None:
    made.task(1, made.table(made.session(b"\xff\x1b[2J")), comm=b"\x1b\n\xfe")
    (process,) = made.holders().processes
    assert (process.comm, process.held[0].session) == ("\x1b\n\\xfe", "\\xff\x1b[2J")


def test_cgroups(made: Made) -> None:
    root = made.new("struct kernfs_node", name=made.room(8))
    at = root
    for name in (b"system.slice", b"a.service"):
        text = made.room(64)
        made.put(text, name)
        at = made.new("struct kernfs_node", name=text, __parent=at)
    groups = [
        made.new("struct css_set", dfl_cgrp=made.new("struct cgroup", kn=node))
        for node in (root, at)
    ]
    for pid, group in enumerate(groups, 1):
        made.set(made.task(pid, made.table(made.device())), "struct task_struct", "cgroups", group)
    processes = made.holders().processes
    assert [each.cgroup for each in processes] == ["/", "/system.slice/a.service"]
    # No path is so long.
    made.set(root, "struct kernfs_node", "__parent", at)
    assert {each.cgroup for each in made.holders().processes} == {None}


def test_a_tree_that_leads_into_itself(made: Made) -> None:
    made.task(1, made.table(made.device()))
    made.set(made.root, "struct xa_node", "slots[63]", made.root | 2)
    found = made.holders()
    assert held(found) == {1: [(None, False, 1)]}
    assert found.unread == ["the tasks (init_pid_ns): their tree is corrupt"]


def test_more_nodes_than_any_kernel_has(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "TASKS", 32)
    made.task(1, made.table(made.device()))
    for slot in range(60, 63):
        made.set(made.root, "struct xa_node", f"slots[{slot}]", made.new("struct xa_node") | 2)
    assert made.holders().unread == ["the tasks (init_pid_ns): their tree is corrupt"]


def test_no_tasks(made: Made) -> None:
    assert made.holders().unread == ["the tasks (init_pid_ns)"]


def test_a_table_of_any_size(made: Made) -> None:
    """It is left out, and those of others are not."""
    made.task(1, made.table(made.device(), max_fds=2**32 - 1))
    made.task(2, made.table(made.session(b"vm")))
    found = made.holders()
    assert held(found) == {2: [("vm", False, 1)]}
    assert found.left_out == 1


def test_a_table_of_several_pieces(made: Made) -> None:
    slots = PIECE + 100
    fd = made.room(8 * slots)
    for slot in (0, PIECE - 1, PIECE, slots - 1):
        made.put(fd + 8 * slot, made.device().to_bytes(8, "little"))
    fdt = made.new("struct fdtable", max_fds=slots, fd=fd)
    made.task(1, made.new("struct files_struct", fdt=fdt))
    assert held(made.holders()) == {1: [(None, False, 4)]}


WILD = (0x123456, 2**64 - 8, 0xFFFF888000000001, 0xDEAD000000000100)


@pytest.mark.parametrize("moves", [False, True])
def test_pointers_that_lead_nowhere(made: Made, moves: bool) -> None:
    """In a kernel that runs they are of what is gone; else they are named."""
    made.task(1, made.table(made.device(), *WILD))
    for pid, wild in enumerate(WILD, 2):
        made.task(pid, wild)
        made.task(pid + 10, made.new("struct files_struct", fdt=wild))
        fdt = made.new("struct fdtable", max_fds=64, fd=wild)
        made.task(pid + 20, made.new("struct files_struct", fdt=fdt))
        made.task(pid + 30, made.table(made.file("luo_session_fops", wild)))
    found = made.holders(moves)
    assert held(found) == {1: [(None, False, 1)]}
    assert found.unread == (
        []
        if moves
        else [
            "8 of the tables of file descriptors (struct files_struct)",
            "4 of the arrays of file descriptors (struct fdtable)",
            "4 of the open files (struct file)",
            "4 of the sessions that are held (struct luo_session)",
        ]
    )


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_a_file_that_is_closed_meanwhile(made: Made, reads: int) -> None:
    """Its memory is another file's after so many reads; then it is not a session's any more."""
    file = made.session(b"vm")
    made.task(1, made.table(file))
    place = file - made.direct_map + offsetof(made.prog.type("struct file"), "f_op")
    count = 0

    def read(phys: int, size: int) -> bytes | None:
        nonlocal count
        found = made.where.read(phys, size)
        if phys <= place < phys + size:
            count += 1
            if count == reads:
                made.set(file, "struct file", "f_op", 0)
        return found

    found = read_holders(replace(made.where, read=read), made.direct_map)
    assert count == 3
    assert held(found) == ({} if reads < 3 else {1: [("vm", False, 1)]})


def test_no_more_is_kept_than_a_file_may_hold(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "HOLDERS", 2)
    table = made.table(made.session(b"a"), made.session(b"b"))
    for pid in (1, 2, 3):
        made.task(pid, table)
    found = made.holders()
    both = [("a", False, 1), ("b", False, 1)]
    assert (held(found), found.left_out) == ({1: both, 2: both}, 2)
    monkeypatch.setattr(budget, "HELD", 1)
    found = made.holders()
    assert held(found) == {1: [("a", False, 1)]}
    assert found.left_out == 1 + 2
