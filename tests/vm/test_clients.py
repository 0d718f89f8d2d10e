# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What clients hand over, as khoscope reads it out of the kernel's structures, against what they have
put in; and that nothing is found wrong with clients that do it right, on both sides of a kexec.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from khoscope.sources.open import open_qemu
from tests.vm.test_exercise import memory
from tests.vm.test_khoscope import COST, HEALTHY, HEALTHY_ON_BASE, guest, host
from tests.vm.test_rules import Look
from vm.content import content
from vm.exercise import Exercise, Piece
from vm.job import Job
from vm.kernel import series, under_test, what
from vm.luo import File, Memfd, hold, retrieve
from vm.machine import Machine
from vm.trace import Trace

PAGE = 4096
#: Clients are looked at on these: each has another LUO.
KERNELS = [name for name in under_test() if name in ("7.1-base", "7.2-fixed")] or ["7.2-fixed"]
#: The ABI of LUO by series.
LUO = {"7.1": "luo-v1", "7.2": "luo-v5"}
RESERVED = "reserve_mem=4M:4096:khoscope"

#: Sessions, and their files by token.
SESSIONS = {
    "small": {1: Memfd(PAGE), 2: Memfd(4 << 20), 3: Memfd(10_000), 4: Memfd(0)},
    "large, é": {2**64 - 1: Memfd(64 << 20, thp=True)},
}

#: Objects of slabs: enough for one to be in the first page of its slab.
SLABS = 24

#: One more, whose file is sealed and not at its end.
SEALED, TOKEN, SIZE, POSITION = "sealed", 5, 5 * PAGE, 1234

_HOLD = f"""
import fcntl, os, signal
from khoscope.carry.liveupdate import LiveUpdate
from vm.content import content
from vm.sessions import SHMEM_ENABLED
SHMEM_ENABLED.write_text("never")
with LiveUpdate() as device:
    session = device.create_session({SEALED!r})
fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.write(fd, content({TOKEN}, {SIZE}))
os.lseek(fd, {POSITION}, os.SEEK_SET)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
session.preserve_fd(fd, {TOKEN})
print("held", flush=True)
signal.pause()
"""

_RETRIEVE = f"""
import fcntl, os, signal
from khoscope.carry.liveupdate import LiveUpdate
from vm.content import content
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with LiveUpdate() as device, device.retrieve_session({SEALED!r}) as session:
    print("retrieved", flush=True)
    signal.sigwait([signal.SIGUSR1])
    fd = session.retrieve_fd({TOKEN})
    session.finish()
assert os.lseek(fd, 0, os.SEEK_CUR) == {POSITION}
assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
assert os.pread(fd, {SIZE} + 1, 0) == content({TOKEN}, {SIZE})
"""

#: A unit, as systemd would make it, with a process whose name is hostile.  Of its sessions, it
#: shares one with a child, and the only descriptor of the other one is on its way through a socket.
SHARED, FLYING, UNIT, COMM = "shared", "flying", "system.slice/agent.service", "ag\x1b[1mnt"

_AGENT = f"""
import os, signal, socket
from pathlib import Path
from khoscope.carry.liveupdate import LiveUpdate

def fds(what):
    links = {{int(fd): os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{{fd}}")}}
    return [fd for fd, link in links.items() if link.endswith(what)]

Path("/sys/fs/cgroup/{UNIT}/cgroup.procs").write_text("0")
Path("/proc/self/comm").write_text({COMM!r})
device = LiveUpdate()
flying = device.create_session({FLYING!r})
sockets = socket.socketpair()
socket.send_fds(sockets[0], [b"x"], fds({FLYING!r}))
flying.close()
shared = device.create_session({SHARED!r})
child = os.fork()
if not child:
    device.close()
    signal.pause()
os.dup(*fds("/dev/liveupdate"))
started = [Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[19]
           for pid in (os.getpid(), child)]
print(os.getpid(), child, *started, flush=True)
signal.pause()
"""

#: Hertz of the times in /proc (USER_HZ).
HERTZ = 100

_PYTHON = ("env", "PYTHONPATH=/khoscope", "python3", "-c")


@dataclass
class Story:
    """What was seen on the way of a kernel through a kexec."""

    kernel: str
    pieces: list[Piece] = field(default_factory=list)
    restored: list[Piece] = field(default_factory=list)
    held: dict[str, dict[int, File]] = field(default_factory=dict)
    #: The process that holds each session, by its name.
    holder: dict[str, int] = field(default_factory=dict)
    #: What ``luo`` says while the agent holds sessions, by how it reads the kernel.
    agent: dict[str, Any] = field(default_factory=dict)
    #: By the guest's own /proc: the agent and its child, when each was started since the boot (in
    #: HERTZ), and when that was.
    proc: dict[str, Any] = field(default_factory=dict)
    retrieved: dict[str, dict[int, File]] = field(default_factory=dict)
    #: JSON documents, and text, by name.
    seen: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    #: By stage: where in its file each page is, by session and token.
    offsets: dict[str, dict[tuple[str, int], list[int]]] = field(default_factory=dict)

    @property
    def healthy(self) -> list[str]:
        """Kinds of memory that come back right."""
        return HEALTHY if what(self.kernel) == "fixed" else HEALTHY_ON_BASE


@pytest.fixture(scope="module", params=KERNELS)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    story = Story(request.param)
    directory = tmp_path_factory.mktemp("clients")
    empty, before = directory / "empty.khosnap", directory / "before.khosnap"
    with Machine(story.kernel, append=RESERVED) as machine:
        look = Look(machine)
        look.exercise.load()
        host(*look.source, "snapshot", str(empty))
        recording = "/root/calls.khotrace"
        with Trace(machine, "clients", "--summary", "--record", recording):
            _preserve(look.exercise, story.healthy)
            story.pieces = look.exercise.report()
            # Only the first page of a slab tells that it is one.
            for _ in range(SLABS):
                look.exercise.preserve("slab")
            story.seen["owners with slab"] = look.ask("owners")
            look.exercise.free("slab")
        _hold(machine, story)
        _agent(look, story, directory / "core")
        machine.load_kexec()
        _before(look, story, recording)
        host(*look.source, "snapshot", str(before))
        _offline(story, empty, before)

        machine.execute_kexec()
        _after(look, story, ("--before", str(before)))
    return story


def _preserve(exercise: Exercise, healthy: list[str]) -> None:
    for scenario in healthy:
        # An area with two chunks.
        exercise.preserve(scenario, 600 if scenario == "vmalloc" else None)
    exercise.preserve("vmalloc-pages", 70)
    exercise.preserve("blob", 2)


def _hold(machine: Machine, story: Story) -> None:
    holders = {name: hold(machine, name, files) for name, files in SESSIONS.items()}
    story.held = {name: held.files for name, held in holders.items()}
    sealed = Job(machine, "/root/sealed", (*_PYTHON, _HOLD))
    sealed.until_on(300.0)
    story.holder = {name: job.pid for name, job in (holders | {SEALED: sealed}).items()}


def _agent(look: Look, story: Story, core: Path) -> None:
    """See from everywhere who holds what, while there is more to see."""
    machine, vmlinux = look.machine, look.machine.kernel.share / "vmlinux"
    cgroup = f"/sys/fs/cgroup/{UNIT}"
    mounted = f"mount -t cgroup2 none /sys/fs/cgroup && mkdir -p {cgroup}"
    machine.run(mounted, check=True)
    agent = Job(machine, "/root/agent", (*_PYTHON, _AGENT))
    agent.until_on(300.0)
    words = agent.output().split()
    booted = machine.run("sed -n 's/^btime //p' /proc/stat", check=True).stdout
    story.proc = {"booted": int(booted)}
    for name, pid, started in zip(("agent", "child"), words[:2], words[2:], strict=True):
        story.proc[name] = (int(pid), int(started))
    machine.dump(core)
    sources = {
        "QMP, DWARF": look.source,
        "QMP, BTF": look.source[:2],
        "vmcore, DWARF": ("--core", str(core), "--vmlinux", str(vmlinux)),
        "vmcore, BTF": ("--core", str(core)),
    }
    story.agent = {how: json.loads(host(*words, "luo", "--json")) for how, words in sources.items()}
    story.agent["live"] = json.loads(guest(machine, "luo", "--json"))
    story.text["agent"] = host(*look.source, "luo")
    # What it holds is gone when it has no descriptors any more.
    child, _ = story.proc["child"]
    gone = f'until [ -z "$(ls /proc/{child}/fd 2>/dev/null)" ]; do sleep 0.1; done'
    machine.run(f"kill {child}; {gone}", check=True)
    agent.end("TERM")
    core.unlink()


def area(story: Story) -> Piece:
    """The area with two chunks."""
    (piece,) = (p for p in story.pieces if p.scenario == "vmalloc")
    return piece


def sixteen_pages(story: Story) -> Piece:
    """A block that comes back as it is: contig, or split where that is all that does."""
    kind = "contig" if "contig" in story.healthy else "split"
    (piece,) = (p for p in story.pieces if p.scenario == kind and p.pages == 16)
    return piece


def _before(look: Look, story: Story, recording: str) -> None:
    """Look, in the guest and from the host; and at the memory that is named."""
    machine, descriptor = look.machine, area(story).descriptor
    assert descriptor is not None
    story.seen["verify before"] = look.ask("verify")
    story.seen["luo before"] = json.loads(guest(machine, "luo", "--json"))
    story.text["luo"] = host(*look.source, "luo")
    story.offsets["before"] = _offsets(machine, story.seen["luo before"]["outgoing"])
    story.seen["owners"] = look.ask("owners")
    story.text["owners"] = host(*look.source, "owners")
    traced = ("owners", "--trace", recording, "--json")
    story.seen["owners with trace"] = json.loads(guest(machine, *traced))
    story.seen["vmalloc"] = look.ask("vmalloc", f"{descriptor:#x}")
    story.text["vmalloc"] = host(*look.source, "vmalloc", f"{descriptor:#x}")
    virtual = f"{_virtual(look, descriptor):#x}"
    story.seen["vmalloc, virtual"] = json.loads(guest(machine, "vmalloc", virtual, "--json"))
    (first, end), *_ = sixteen_pages(story).ranges
    pages = f"{first:#x}..{end:#x}"
    story.text["pages"] = guest(machine, "pages", pages)
    story.seen["pages"] = look.ask("pages", pages)
    story.seen["tree"] = look.ask("tree")
    story.seen["fdt"] = look.ask("fdt")


def _virtual(look: Look, phys: int) -> int:
    """``phys_to_virt()``."""
    prog = open_qemu(str(look.machine.qmp_socket), look.machine.kernel.share / "vmlinux")
    return int(prog["page_offset_base"].value_()) + phys


def _offline(story: Story, empty: Path, before: Path) -> None:
    for command in ("luo", "owners", "fdt"):
        offline = host("--snapshot", str(before), command, "--json")
        story.seen[f"{command} offline"] = json.loads(offline)
    story.seen["diff"] = json.loads(host("diff", str(empty), str(before), "--json"))


def _after(look: Look, story: Story, before: tuple[str, str]) -> None:
    machine = look.machine
    story.seen["verify handed over"] = look.ask("verify", *before)
    story.seen["luo serialized"] = look.ask("luo")
    story.offsets["serialized"] = _offsets(machine, story.seen["luo serialized"]["incoming"])
    # Whoever opens it has the kernel read what LUO was handed.
    machine.run(": >/dev/liveupdate", check=True)
    story.seen["luo listed"] = look.ask("luo")
    story.offsets["listed"] = _offsets(machine, story.seen["luo listed"]["incoming"])
    look.exercise.load()
    for scenario in dict.fromkeys(piece.scenario for piece in story.pieces):
        look.exercise.restore(scenario)
    story.restored = look.exercise.report()
    story.retrieved = {name: retrieve(machine, name, files) for name, files in SESSIONS.items()}
    story.seen["luo half retrieved"] = look.ask("luo")
    retriever = Job(machine, "/root/retrieve", (*_PYTHON, _RETRIEVE))
    retriever.until_on(120.0)
    story.holder["retrieved"] = retriever.pid
    story.seen["luo retrieved"] = look.ask("luo")
    assert retriever.end("USR1") == 0, retriever.errors()
    story.seen["verify after"] = look.ask("verify", *before)
    story.text["verify after"] = host(*look.source, "verify", *before)
    story.seen["luo after"] = look.ask("luo")


def _offsets(machine: Machine, side: Any) -> dict[tuple[str, int], list[int]]:
    """
    Where in its file each page is that khoscope names, by what is in it.

    -1: its content is not what was written.
    """
    return {
        (session["name"], int(file["token"], 16)): [
            offset
            for part in file["memfd"]["ranges"]
            for offset in _pages_of(machine, part, int(file["token"], 16), file["memfd"]["size"])
        ]
        for session in side["sessions"]
        for file in session["files"]
    }


def _pages_of(machine: Machine, part: Any, token: int, size: int) -> list[int]:
    data = memory(machine, int(part["phys"], 16), part["size"])
    found = []
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        offset = 8 * int.from_bytes(page[:4], "little")
        written = content(token, max(min(PAGE, size - offset), 0), offset)
        found.append(offset if page == written.ljust(PAGE, b"\0") else -1)
    return found


def sizes() -> dict[tuple[str, int], int]:
    """What was put in."""
    files = {
        (name, token): memfd.size
        for name, files in SESSIONS.items()
        for token, memfd in files.items()
    }
    return {**files, (SEALED, TOKEN): SIZE}


def files(side: Any) -> dict[tuple[str, int], Any]:
    return {
        (session["name"], int(file["token"], 16)): file
        for session in side["sessions"]
        for file in session["files"]
    }


# -- nothing is wrong -------------------------------------------------------------------------


def test_nothing_is_wrong_before_the_kexec(story: Story) -> None:
    found = story.seen["verify before"]
    assert found["verdict"] == "pass"
    # The module's own folios, and no memfd's: those of orders 1 to 3.
    (folios,) = (f for f in found["findings"] if f["rule"] not in COST)
    assert (folios["rule"], folios["severity"]) == ("needs-folio-restore", "warning")
    assert folios["message"].startswith("3 folios (14 pages) of an unknown owner, at 0x")


def test_everything_arrives(story: Story) -> None:
    found = story.seen["verify handed over"]
    assert found["verdict"] == "pass"
    waiting = {"not-restored", "orphaned-session"}
    assert {f["rule"] for f in found["findings"]} <= {*waiting, "no-image", *COST}
    assert "lost" not in found["fates"]


def test_nothing_is_wrong_after_the_kexec(story: Story) -> None:
    assert {p.state for p in story.restored if p.scenario != "slab"} == {"restored"}
    found = story.seen["verify after"]
    assert found["verdict"] == "pass"
    # kho_test forgets its own FDT.
    (left,) = (f for f in found["findings"] if f["rule"] not in {"no-image", *COST})
    assert left["rule"] == "not-restored"
    assert left["message"].startswith("subtree kho_test: ")
    assert found["fates"]["not-restored"] == 1
    last = story.text["verify after"].splitlines()[-1]
    assert last == "PASS: everything that was recorded arrived (0 errors, 2 warnings)"


# -- live update ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["before", "serialized", "listed"])
def test_sessions_are_what_was_put_in(story: Story, stage: str) -> None:
    document = story.seen[f"luo {stage}"]
    side = document["outgoing" if stage == "before" else "incoming"]
    assert (side["compatible"], side["liveupdate_num"]) == (LUO[series(story.kernel)], 1)
    assert side["live"] == (stage != "serialized")
    assert side["problems"] == []
    counts = {session["name"]: session["count"] for session in side["sessions"]}
    assert counts == Counter(name for name, _ in sizes())
    assert {key: file["memfd"]["size"] for key, file in files(side).items()} == sizes()
    for (name, token), file in files(side).items():
        memfd = file["memfd"]
        assert file["handler"] == "memfd-v2"
        assert file["problems"] == memfd["problems"] == []
        assert memfd["nr_folios"] == (32 if name == "large, é" else memfd["pages"])
        sealed = (name, token) == (SEALED, TOKEN)
        # What has been written is read from the end on.
        assert memfd["pos"] == (POSITION if sealed else memfd["size"])
        assert memfd["seals"] == (["SHRINK", "GROW"] if sealed else [])


@pytest.mark.parametrize("stage", ["before", "serialized", "listed"])
def test_the_content_is_where_khoscope_says(story: Story, stage: str) -> None:
    """Every page of each file, once, byte by byte."""
    seen = {key: sorted(offsets) for key, offsets in story.offsets[stage].items()}
    assert seen == {key: list(range(0, size, PAGE)) for key, size in sizes().items()}


def test_the_ranges_are_those_of_the_page_tables(story: Story) -> None:
    for (name, token), file in files(story.seen["luo before"]["outgoing"]).items():
        if name == SEALED:
            continue
        ranges = file["memfd"]["ranges"]
        named = {
            phys
            for part in ranges
            for phys in range(int(part["phys"], 16), int(part["phys"], 16) + part["size"], PAGE)
        }
        mapped = {
            phys
            for first, end in story.held[name][token].ranges
            for phys in range(first, end, PAGE)
        }
        assert named == mapped
        assert story.retrieved[name][token] == story.held[name][token]


def test_what_was_retrieved_is_done(story: Story) -> None:
    """A session that is finished and closed is not there any more."""
    names = [
        session["name"] for session in story.seen["luo half retrieved"]["incoming"]["sessions"]
    ]
    assert names == [SEALED]
    assert story.seen["luo after"]["incoming"]["sessions"] == []


def who(held_by: Any) -> dict[int, int]:
    """Descriptors by pid."""
    return {each["pid"]: each["fds"] for each in held_by}


#: Of a guest without systemd.
ALL_SEEN = {"left_out": 0, "unread": [], "systemd_memfds": None}


def holders(side: Any) -> dict[str, dict[int, int]]:
    return {session["name"]: who(session["held_by"]) for session in side["sessions"]}


def test_sessions_are_held_by_who_made_them(story: Story) -> None:
    for name in ("luo before", "luo offline"):
        document = story.seen[name]
        assert document["device"] == {"in_use": False, "held_by": []}
        assert document["holders"] == ALL_SEEN
        assert holders(document["outgoing"]) == {
            name: {pid: 1} for name, pid in story.holder.items() if name != "retrieved"
        }


def test_a_retrieved_session_is_held(story: Story) -> None:
    document = story.seen["luo retrieved"]
    retriever = {story.holder["retrieved"]: 1}
    assert who(document["device"]["held_by"]) == retriever
    assert holders(document["incoming"]) == {SEALED: retriever}
    assert holders(story.seen["luo half retrieved"]["incoming"]) == {SEALED: {}}


HOW = ("QMP, DWARF", "QMP, BTF", "vmcore, DWARF", "vmcore, BTF", "live")


@pytest.mark.parametrize("how", HOW)
def test_who_holds_what(story: Story, how: str) -> None:
    document = story.agent[how]
    (agent, _), (child, _) = story.proc["agent"], story.proc["child"]
    assert document["holders"] == ALL_SEEN
    assert document["device"]["in_use"] is True
    assert who(document["device"]["held_by"]) == {agent: 2}
    found = holders(document["outgoing"])
    assert found[SHARED] == {agent: 1, child: 1}
    assert found[FLYING] == {}
    assert found[SEALED] == {story.holder[SEALED]: 1}


@pytest.mark.parametrize("how", HOW)
def test_holders_are_what_proc_says(story: Story, how: str) -> None:
    (shared,) = (s for s in story.agent[how]["outgoing"]["sessions"] if s["name"] == SHARED)
    agent, child = sorted(shared["held_by"], key=lambda each: int(each["pid"]))
    for name, found in (("agent", agent), ("child", child)):
        pid, started = story.proc[name]
        assert (found["pid"], found["comm"]) == (pid, COMM)
        assert (found["cgroup"], found["unit"]) == (f"/{UNIT}", "agent.service")
        assert int(found["started"] * HERTZ) == started
        since = datetime.datetime.fromisoformat(found["since"]).timestamp()
        # Either has dropped a part of a second.
        assert 0 <= since - story.proc["booted"] - started // HERTZ <= 1
    (sealed,) = (s for s in story.agent[how]["outgoing"]["sessions"] if s["name"] == SEALED)
    (holder,) = sealed["held_by"]
    assert (holder["comm"], holder["cgroup"], holder["unit"]) == ("python3", "/", None)


def test_holders_for_people(story: Story) -> None:
    text = story.text["agent"]
    assert "\x1b" not in text
    agent, _ = story.proc["agent"]
    name = f"ag\\x1b[1mnt (pid {agent}), unit agent.service, running"
    said = " ".join(text.split())
    assert f"/dev/liveupdate is held by {name} since 2" in said
    sessions = {part.partition(":")[0]: part for part in said.split(" session ")}
    assert f" held by {name} since 2" in sessions[SHARED]
    assert sessions[FLYING].endswith(" held by nobody that khoscope can see")


def test_luo_for_people(story: Story) -> None:
    text = story.text["luo"]
    assert max(map(len, text.splitlines())) <= 80
    assert "session large, é: 1 file" in text
    assert f"{SIZE:,} bytes, position {POSITION:,}, seals SHRINK GROW" in text


# -- owners -----------------------------------------------------------------------------------


def test_memfds_have_owners(story: Story) -> None:
    """All that a session preserves is its own, and nothing else is."""
    totals = story.seen["owners"]["totals"]
    for (name, token), size in sizes().items():
        data = [
            t["bytes"]
            for t in totals
            if t["kind"] == "memfd data" and (t["session"], t["token"]) == (name, f"{token:#x}")
        ]
        assert sum(data) == -(-size // PAGE) * PAGE
    for session in story.seen["luo before"]["outgoing"]["sessions"]:
        owned = sum(t["bytes"] for t in totals if t.get("session") == session["name"])
        assert owned == session["bytes"]


def test_every_block_is_counted(story: Story) -> None:
    found = story.seen["owners"]
    for count in ("blocks", "pages"):
        one_by_one = Counter[str]()
        for block in found["blocks"]:
            one_by_one[block["owner"]] += 1 if count == "blocks" else block["pages"]
        assert {t["owner"]: t[count] for t in found["totals"]} == one_by_one
        in_tree = sum(row[count] for row in story.seen["tree"]["totals"])
        assert sum(t[count] for t in found["totals"]) == in_tree


def test_unknown_is_what_nothing_leads_to(story: Story) -> None:
    """The module's own memory: its blocks, and the chunks of its vmalloc areas and lists."""
    blocks = {int(b["phys"], 16): b for b in story.seen["owners"]["blocks"]}
    unknown = {phys for phys, b in blocks.items() if b["kind"] == "unknown"}
    nobodys = {
        p.ranges[0][0] for p in story.pieces if p.scenario in ("contig", "split", "folio", "dma")
    }
    (chain,) = story.seen["vmalloc"]["areas"]
    chunks = {int(part["phys"], 16) for part in chain["chunks"]}
    assert nobodys <= unknown
    assert chunks <= unknown
    rest = [blocks[phys] for phys in unknown - nobodys - chunks]
    assert {(block["order"], block["pages"]) for block in rest} <= {(0, 1)}
    assert len(rest) < 8
    # What is mapped by vmalloc is known by that, and slab pages by their type.
    mapped = {
        first
        for p in story.pieces
        if p.scenario in ("vmalloc", "vmalloc-pages", "vmalloc-huge")
        for first, _ in p.ranges
    }
    assert {blocks[phys]["kind"] for phys in mapped} == {"vm_struct"}
    assert "slab" in {b["kind"] for b in story.seen["owners with slab"]["blocks"]}
    assert "slab" not in {b["kind"] for b in blocks.values()}


def test_a_recording_knows_the_rest(story: Story) -> None:
    blocks = {int(b["phys"], 16): b for b in story.seen["owners with trace"]["blocks"]}
    for piece in story.pieces:
        if piece.scenario in ("contig", "split", "folio", "dma"):
            block = blocks[piece.ranges[0][0]]
            assert block["kind"] == "caller"
            assert "kho_exercise" in block["owner"]
    assert not [b for b in blocks.values() if b["kind"] == "unknown"]


def test_owners_for_people(story: Story) -> None:
    assert "memfd 0x2 of session small: data" in story.text["owners"]


# -- vmalloc areas and pages ------------------------------------------------------------------


def test_a_vmalloc_area(story: Story) -> None:
    piece = area(story)
    (found,) = story.seen["vmalloc"]["areas"]
    assert story.seen["vmalloc"]["findings"] == []
    assert (found["total_pages"], found["listed"], found["problems"]) == (600, 600, [])
    assert (int(found["phys"], 16), found["order"]) == (piece.descriptor, 0)
    assert sum(part["size"] for part in found["chunks"]) == 2 * PAGE
    listed = {
        phys
        for part in found["pages"]
        for phys in range(int(part["phys"], 16), int(part["phys"], 16) + part["size"], PAGE)
    }
    assert listed == {first for first, _ in piece.ranges}
    # It is all the same by which of its addresses.
    for member in ("total_pages", "listed", "problems", "phys", "chunks", "pages"):
        assert story.seen["vmalloc, virtual"]["areas"][0][member] == found[member]
    assert "2 chunks:" in story.text["vmalloc"]


def test_pages(story: Story) -> None:
    piece = sixteen_pages(story)
    runs = story.seen["pages"]["runs"]
    assert [(run["refcount"], run["pages"]) for run in runs] == list(piece.refs)
    kind = "contig" if what(story.kernel) == "fixed" else None
    for run in runs:
        assert (run["block"]["order"], run["block"]["type"]) == (4, kind)
        assert (run["free"], run["compound"], run["owner"]) == (None, None, None)
    (refcount, pages), *_ = piece.refs
    line = f"{piece.ranges[0][0]:#014x} {pages:11} {refcount:5}  allocated"
    assert line in story.text["pages"]
    assert f"{len(runs)} run{'s' * (len(runs) > 1)}, 16 pages" in story.text["pages"]


# -- snapshots --------------------------------------------------------------------------------


def test_a_snapshot_says_the_same(story: Story) -> None:
    for part in ("liveupdate", "outgoing", "incoming"):
        assert story.seen["luo offline"][part] == story.seen["luo before"][part]
    assert story.seen["fdt offline"]["fdt"] == story.seen["fdt"]["fdt"]
    assert story.seen["fdt offline"]["subtrees"] == story.seen["fdt"]["subtrees"]
    blocks, offline = (
        [(b["key"], b["kind"]) for b in story.seen[name]["blocks"]]
        for name in ("owners", "owners offline")
    )
    assert offline == blocks


def test_the_fdt_has_the_blobs(story: Story) -> None:
    subtrees = {row["name"]: row for row in story.seen["fdt"]["subtrees"]}
    blobs = {p.subtree: p for p in story.pieces if p.scenario == "blob"}
    for name, piece in blobs.items():
        assert name is not None
        assert int(subtrees[name]["phys"], 16) == piece.ranges[0][0]
        assert subtrees[name]["preserved"] is True


def test_the_diff_shows_the_sessions_that_came(story: Story) -> None:
    facts = {f["what"]: (f["a"], f["b"]) for f in story.seen["diff"]["facts"]}
    for name, files in SESSIONS.items():
        assert facts[f"outgoing session {name}"] == ("absent", f"{len(files)} files")
        for token, memfd in files.items():
            _, there = facts[f"outgoing session {name} token {token:#x}"]
            assert there.endswith(f"{memfd.size} bytes")
    assert facts[f"outgoing memory of memfd {TOKEN:#x} of session {SEALED}: data"] == (
        "absent",
        f"{SIZE} bytes",
    )
    assert story.seen["diff"]["counts"]["added"] > 1000


# -- what is off ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_live_update_is_off(kernel: str) -> None:
    """KHO without LUO, in a kernel that was not handed anything."""
    with Machine(kernel, append="liveupdate=off") as machine:
        look = Look(machine)
        status = look.ask("status")
        text = guest(machine, "status")
        luo = host(*look.source, "luo")
    assert status["kho"]["on"] is True
    assert status["liveupdate"] is False
    assert status["handover"]["is_kho_boot"] is False
    assert "LUO" not in {subtree["name"] for subtree in status["subtrees"]}
    assert "LUO         off" in text
    assert "live update is off (liveupdate=on turns it on)" in luo
