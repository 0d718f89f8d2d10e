# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What KHO costs, as ``khoscope scratch`` says and as /proc and debugfs of real kernels say; and
whether the sizes that it suggests will do.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from khoscope.words.sizes import human
from tests.vm.test_khoscope import guest, host, khoscope
from vm.job import Job
from vm.kernel import chosen
from vm.machine import Machine, Result

MIB = 1 << 20
PAGE = 4096
#: What may change between two looks: a few pages of each processor's lists.
SLACK = 6 * MIB

#: Take memory of a kind, and keep it: how much, in MiB, follows the kind.
_FILL = """
import mmap, sys
kind, size = sys.argv[1], int(sys.argv[2]) << 20
if kind == "anonymous":
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
else:
    file = open({"shmem": "/dev/shm/khoscope", "page cache": "/var/tmp/khoscope"}[kind], "w+b")
    file.truncate(size)
    for _ in range(size >> 20):
        file.write(bytes(1 << 20))
    file.flush()
    memory = bytearray(1)
if kind == "anonymous":
    for at in range(0, size, 4096):
        memory[at] = 1
print("there", flush=True)
sys.stdin.close()
import time
time.sleep(10000)
"""
#: Have a pipe hold pages of memory that is mapped, too; say how many of them lie in scratch.
_HOLD = """
import ctypes, fcntl, mmap, os, pathlib, struct, time
size, page = 8 << 20, mmap.PAGESIZE
out = pathlib.Path("/sys/kernel/debug/kho/out")
areas = [
    [int(word, 0) // page for word in (out / name).read_text().split()]
    for name in ("scratch_phys", "scratch_len")
]
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, size, page):
    memory[at] = 1
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
read, write = os.pipe()
fcntl.fcntl(write, 1031, size)
iovec = ctypes.create_string_buffer(struct.pack("=QQ", start, size))
held = ctypes.CDLL(None).vmsplice(write, iovec, ctypes.c_ulong(1), 0)
assert held == size, held
with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
    pagemap.seek(start // page * 8)
    entries = struct.unpack(f"={size // page}Q", pagemap.read(size // page * 8))
pfns = [entry & (1 << 55) - 1 for entry in entries]
print(sum(first <= pfn < first + n for pfn in pfns for first, n in zip(*areas)), flush=True)
time.sleep(10000)
"""
#: In this order, in MiB: once what others may have is used up, everything goes into scratch, too.
FILLS = {"anonymous": 620, "shmem": 60, "page cache": 60}

BRIEF = ("khoscope", "scratch", "--brief")
USERS: dict[str, tuple[str, ...]] = {
    "root": (),
    "nobody": ("setpriv", "--reuid=1000", "--clear-groups"),
}


@dataclass
class Look:
    """What khoscope and the kernel say at one time, in bytes."""

    scratch: Any
    meminfo: dict[str, int]
    vmstat: dict[str, int]

    @property
    def in_scratch(self) -> Counter[str]:
        """Bytes of scratch by use."""
        found: Counter[str] = Counter()
        for area in self.scratch["areas"]:
            found.update({use: count * PAGE for use, count in area["pages"].items()})
            found["free"] += area["free"]
        return found


@dataclass
class Story:
    """What was seen of one machine, through a kexec."""

    looks: dict[str, Look] = field(default_factory=dict)
    debugfs: list[tuple[int, int]] = field(default_factory=list)
    cma_blocks: dict[int, int] = field(default_factory=dict)
    zoneinfo: str = ""
    #: Pages of scratch that a pipe held.
    held: int = 0
    text: dict[str, str] = field(default_factory=dict)
    findings: dict[str, list[Any]] = field(default_factory=dict)
    #: ``scratch --brief``, by stage and user.
    brief: dict[str, Result] = field(default_factory=dict)


def look(machine: Machine) -> Look:
    """A look while the guest is at rest: just after a boot, it is not yet."""
    for _ in range(20):
        was = meminfo(machine)
        said = json.loads(host(*machine.source, "scratch", "--json"))
        now = meminfo(machine)
        if all(abs(was[name] - now[name]) < MIB for name in ("MemFree", "CmaFree")):
            return Look(said, now, vmstat(machine))
    raise AssertionError(f"the guest does not come to rest: {was}, {now}")


def meminfo(machine: Machine) -> dict[str, int]:
    """/proc/meminfo, in bytes."""
    lines = machine.run(("cat", "/proc/meminfo"), check=True).stdout.splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}


def vmstat(machine: Machine) -> dict[str, int]:
    """Lines of /proc/vmstat about what is free, in bytes."""
    lines = machine.run(("cat", "/proc/vmstat"), check=True).stdout.splitlines()
    pages = dict(line.split() for line in lines if line.startswith("nr_free"))
    return {name: int(count) * PAGE for name, count in pages.items()}


def areas_of(look: Look) -> list[tuple[int, int]]:
    return [(int(area["phys"], 16), area["size"]) for area in look.scratch["areas"]]


def debugfs_areas(machine: Machine) -> list[tuple[int, int]]:
    """Those that have memory."""
    columns = [
        [int(word, 0) for word in machine.run(f"cat {path}", check=True).stdout.split()]
        for path in (
            "/sys/kernel/debug/kho/out/scratch_phys",
            "/sys/kernel/debug/kho/out/scratch_len",
        )
    ]
    return [(phys, size) for phys, size in zip(*columns, strict=True) if size]


def cma_blocks(machine: Machine) -> dict[int, int]:
    """Page blocks of type CMA by node, as /proc/pagetypeinfo has them."""
    text = machine.run("cat /proc/pagetypeinfo", check=True).stdout
    text = text[text.index("Number of blocks type") :]
    # Each node has a table of its own, with the same columns.
    names = re.findall(r"^Number of blocks type +(.*)$", text, re.M)
    column = names[0].split().index("CMA")
    found: Counter[int] = Counter()
    for node, counts in re.findall(r"^Node (\d+), zone +\w+ +([\d ]+)$", text, re.M):
        found[int(node)] += int(counts.split()[column])
    return dict(found)


def zones(zoneinfo: str) -> dict[tuple[int, str], dict[str, int]]:
    """What /proc/zoneinfo says of each zone that has memory."""
    found = {}
    for part in re.split(r"^(?=Node )", zoneinfo, flags=re.M):
        if head := re.match(r"Node (\d+), zone +(\w+)", part):
            values = {name: int(n) for name, n in re.findall(r"^ +(\w+) +(\d+)$", part, re.M)}
            if values["present"]:
                found[int(head[1]), head[2]] = values
    return found


def compare_with_the_kernel(machine: Machine, seen: Look) -> None:
    """Areas, nodes and migrate types are those of debugfs and /proc."""
    assert areas_of(seen) == debugfs_areas(machine)
    blocks: Counter[int] = Counter()
    for area in seen.scratch["areas"]:
        assert set(area["page_blocks"]) == {"cma"}
        assert area["page_blocks"]["cma"] * 512 * PAGE == area["size"]
        blocks[area["node"]] += area["page_blocks"]["cma"]
    assert {n: c for n, c in cma_blocks(machine).items() if c} == dict(blocks)
    info = zones(machine.run("cat /proc/zoneinfo", check=True).stdout)
    said = {(zone["node"], zone["zone"]): zone for zone in seen.scratch["zones"]}
    assert said.keys() == info.keys()
    # Between the two looks, this one has run programs in the guest.
    for at, zone in said.items():
        assert abs(zone["free"] - info[at]["nr_free_pages"] * PAGE) < 4 * SLACK
        assert abs(zone["free_for_movable"] - info[at]["nr_free_cma"] * PAGE) < 4 * SLACK


@pytest.fixture(scope="module", params=chosen(["6.18-base", "7.1-base", "7.2-base"]))
def story(request: pytest.FixtureRequest) -> Story:
    """A guest that fills up, with one kind of memory after the other; and goes through a kexec."""
    seen = Story()
    with Machine(request.param) as machine:
        machine.finalize()
        machine.load_kexec()
        seen.looks["cold"] = look(machine)
        compare_with_the_kernel(machine, seen.looks["cold"])
        seen.text["cold"] = guest(machine, "scratch")
        seen.findings["cold"] = _findings(machine)
        for user, words in USERS.items():
            seen.brief[f"cold, {user}"] = machine.run((*words, *BRIEF), timeout=300)
        jobs = []
        for kind, size in FILLS.items():
            words = ("python3", "-c", _FILL, kind, str(size))
            jobs.append(Job(machine, f"/root/{kind.replace(' ', '-')}", words))
            jobs[-1].until_on(120)
            seen.looks[kind] = look(machine)
            if kind == "anonymous":
                jobs.append(Job(machine, "/root/hold", ("python3", "-c", _HOLD)))
                jobs[-1].until_on(120)
                seen.looks["held"] = look(machine)
                seen.held = int(jobs[-1].output())
        for job in jobs:
            job.end("KILL")
        machine.run("rm /dev/shm/khoscope /var/tmp/khoscope", check=True)
        machine.execute_kexec()
        seen.looks["after"] = look(machine)
        seen.debugfs = debugfs_areas(machine)
        seen.cma_blocks = cma_blocks(machine)
        seen.text["after"] = host(*machine.source, "scratch")
        seen.findings["after"] = _findings(machine)
        for user, words in USERS.items():
            seen.brief[f"after, {user}"] = machine.run((*words, *BRIEF), timeout=300)
    return seen


def _findings(machine: Machine) -> list[Any]:
    rules = "phantom-cma,scratch-unmovable,kho-unused"
    said = host(*machine.source, "verify", "--json", "--only", rules)
    found: list[Any] = json.loads(said)["findings"]
    return found


@pytest.mark.parametrize("when", ["cold", *FILLS, "held", "after"])
def test_what_is_free_is_what_meminfo_says(story: Story, when: str) -> None:
    seen = story.looks[when]
    assert seen.scratch["cma"]["total"] == seen.meminfo["CmaTotal"] == 0
    assert abs(seen.scratch["cma"]["free"] - seen.meminfo["CmaFree"]) < SLACK
    assert abs(seen.in_scratch["free"] - seen.meminfo["CmaFree"]) < SLACK
    assert abs(seen.scratch["cma"]["free"] - seen.vmstat["nr_free_cma"]) < SLACK
    free = sum(zone["free"] for zone in seen.scratch["zones"])
    assert abs(free - seen.meminfo["MemFree"]) < SLACK
    assert abs(free - seen.vmstat["nr_free_pages"]) < SLACK
    assert seen.in_scratch.total() == seen.scratch["scratch"]


def test_each_kind_of_memory_is_seen_in_scratch(story: Story) -> None:
    """What the kernel says is no longer free there is what somebody has just taken."""
    for before, kind in zip(("cold", "held", "shmem"), FILLS, strict=True):
        was, now = story.looks[before], story.looks[kind]
        taken = was.meminfo["CmaFree"] - now.meminfo["CmaFree"]
        assert taken > 2 * MIB, kind
        # Pages that lie on lists of processors come and go with it.
        lists = was.in_scratch["free per CPU"] - now.in_scratch["free per CPU"]
        more = now.in_scratch[kind] - was.in_scratch[kind]
        # So do libraries, and what others have in the page cache.
        assert abs(more - taken - lists) < 2 * SLACK, kind
        assert more < FILLS[kind] * MIB + SLACK


def test_what_is_held_beyond_its_mappings(story: Story) -> None:
    """Pages of a pipe that are mapped as well; others come and go."""
    was, now = (
        sum(area["held"] for area in story.looks[when].scratch["areas"])
        for when in ("anonymous", "held")
    )
    assert story.held > 256
    assert now - was == pytest.approx(story.held, abs=64)


def test_phantom_cma(story: Story) -> None:
    for when in ("cold", "after"):
        seen = story.looks[when]
        assert seen.scratch["cma"]["phantom"] == seen.scratch["scratch"]
        (found,) = [f for f in story.findings[when] if f["rule"] == "phantom-cma"]
        assert "CmaTotal (0 kB) does not count them" in found["message"]
    assert "scratch-unmovable" not in {f["rule"] for when in story.findings.values() for f in when}


def test_after_a_kexec(story: Story) -> None:
    """The areas are the same, and the kernel's own boot memory lies in them."""
    cold, after = story.looks["cold"], story.looks["after"]
    assert areas_of(after) == areas_of(cold) == story.debugfs
    assert sum(story.cma_blocks.values()) * 512 * PAGE == after.scratch["scratch"]
    assert after.in_scratch["reserved"] > 4 * MIB
    assert after.scratch["given_back"]["kho_off"] == (
        after.scratch["scratch"] - after.in_scratch["reserved"]
    )
    # kho_test has freed what it was handed, but that it was handed something shows.
    assert (after.scratch["users"]["blocks"], after.scratch["users"]["handed_over"]) == (0, True)
    assert "what was handed over to this kernel" in story.text["after"]
    assert "not known after a handover" in story.text["after"]
    rules = {found["rule"] for found in story.findings["after"] + story.findings["cold"]}
    assert "kho-unused" not in rules


def test_off_but_handed_over() -> None:
    """With kho=off, a kernel keeps the areas that it was handed, and they are as dear as before."""
    with Machine("7.2-base") as machine:
        cold = look(machine)
        machine.load_kexec(append="kho=off")
        machine.execute_kexec()
        off = look(machine)
        text = guest(machine, "scratch")
        briefs = [machine.run((*words, *BRIEF), timeout=300) for words in USERS.values()]
    assert not off.scratch["kho"]["on"]
    assert abs(off.scratch["cma"]["free"] - off.meminfo["CmaFree"]) < SLACK
    assert areas_of(off) == areas_of(cold)
    assert {kind for area in off.scratch["areas"] for kind in area["page_blocks"]} == {"cma"}
    assert off.scratch["cma"]["phantom"] == cold.scratch["scratch"]
    assert off.scratch["pinnable"] < off.meminfo["MemAvailable"] - cold.scratch["scratch"] // 2
    assert "KHO is off here: the kernel before has left" in text
    assert "Nobody uses KHO" not in text
    for result in briefs:
        assert result.returncode == 1
        assert result.stdout.startswith("KHO off: kho=off on the command line; ")
        assert "a cold boot with kho=off gives it back" in result.stdout


def test_one_line_for_an_agent(story: Story) -> None:
    """With root it knows that kho_test has preserved something; without it, what zones show."""
    statuses = {name: result.returncode for name, result in story.brief.items()}
    assert statuses == {
        "cold, root": 0,
        "cold, nobody": 1,
        "after, root": 0,
        # CmaFree is above CmaTotal there, too, though no zone counts scratch.
        "after, nobody": 1,
    }
    for name, result in story.brief.items():
        (line,) = result.stdout.splitlines()
        assert line.startswith("KHO on: kho=on on the command line; "), name
        assert ("used by" in line) == name.endswith("root")
    size = story.looks["cold"].scratch["scratch"]
    assert f"; {human(size)} that only movable memory may use" in story.brief["cold, nobody"].stdout


def test_text_fits_a_terminal(story: Story) -> None:
    for text in story.text.values():
        assert max(map(len, text.splitlines())) <= 80
        assert "only movable memory may be there" in text


def test_two_nodes() -> None:
    with Machine("7.2-base", memory=4096, borders=[2 << 20]) as machine:
        seen = look(machine)
        compare_with_the_kernel(machine, seen)
        purposes = {area["purpose"]: area["node"] for area in seen.scratch["areas"]}
        assert purposes == {"lowmem": 0, "global": 1, "node 0": 0, "node 1": 1}
        assert {zone["zone"] for zone in seen.scratch["zones"]} == {"DMA32", "Normal"}


# Why it is off, and sizes that will do


def _boots_with(sizes: str, memory: int) -> None:
    """A kernel with these sizes hands over, and the next one comes up in its areas."""
    with Machine("7.2-fixed", append=sizes, memory=memory) as machine:
        said = look(machine).scratch
        assert said["kho"]["on"]
        assert said["sizes"] == f"{sizes} on the command line"
        wanted = [int(word) * MIB for word in re.findall(r"(\d+)M", sizes)]
        assert [area["size"] for area in said["areas"]] == [size for size in wanted if size]
        _does_not_fit(machine, max(wanted) + MIB)
        machine.load_kexec()
        machine.execute_kexec()
        assert look(machine).scratch["handover"]["is_kho_boot"]


def _does_not_fit(machine: Machine, size: int) -> None:
    """With an initrd of this size, kexec refuses to load the kernel, as khoscope has said."""
    kernel = str(machine.kernel.share / "bzImage")
    with tempfile.NamedTemporaryFile() as initrd:
        initrd.truncate(size)
        rule = ("--only", "scratch-too-small", "--next", kernel)
        assert json.loads(host(*machine.source, "verify", "--json", *rule))["findings"] == []
        said = host(*machine.source, "verify", "--json", *rule, "--initrd", initrd.name)
    (found,) = json.loads(said)["findings"]
    assert f"its initrd takes {human(size)} in one piece" in found["message"]
    words = f"truncate -s {size} initrd; kexec -s -l /kernel/bzImage --initrd=initrd"
    refused = machine.run(words, timeout=120)
    assert refused.returncode != 0
    assert "Cannot assign requested address" in refused.stderr


def test_kho_has_switched_itself_off() -> None:
    """Asked for, and without room: nobody is told to ask for it once more, or shown areas."""
    asked = "kho_scratch=64G,1M,1M"
    with Machine("7.2-fixed", append=asked) as machine:
        source = machine.source
        status = json.loads(host(*source, "status", "--json"))
        scratch = json.loads(host(*source, "scratch", "--json"))
        refused = [khoscope(*source, command) for command in ("tree", "verify", "owners")]
        doctor = machine.run(("khoscope", "doctor", "--json"))
        brief = machine.run(BRIEF)
    assert (status["kho"]["on"], status["scratch"], scratch["areas"]) == (False, [], [])
    hint = scratch["kho"]["hint"]
    (doctors,) = [f for f in json.loads(doctor.stdout)["facts"] if f["name"] == "KHO on"]
    for result in refused:
        assert result.returncode == 2
        what, advice = result.stderr.splitlines()
        assert "KHO is off in this kernel: kho=on on the command line, but it switched" in what
        assert advice == f"khoscope: {hint}"
    assert doctors["hint"] == hint
    assert (brief.returncode, brief.stdout) == (0, f"KHO off: {scratch['kho']['why']}\n")
    for why in (status["kho"]["why"], scratch["kho"]["why"], doctors["value"]):
        assert why == (
            "kho=on on the command line, but it switched itself off: no room for the lowmem "
            f"scratch area (below 4 GiB), with {asked} on the command line"
        )
    sizes = re.match(r"boot it with (kho_scratch=\S+) in place of kho_scratch=64G,1M,1M: ", hint)
    assert sizes, hint
    _boots_with(sizes[1], memory=1024)


def test_sizes_that_are_suggested_will_do() -> None:
    """On a host that nobody has use for KHO on, which it is told, too."""
    nobody = "initcall_blacklist=kho_test_init"
    with Machine("7.2-fixed", append=nobody, memory=2048) as machine:
        machine.load_kexec()
        said = look(machine).scratch
        rules = {found["rule"] for found in _findings(machine)}
        brief = machine.run(BRIEF, timeout=300)
        text = host(*machine.source, "scratch")
    assert rules == {"phantom-cma", "kho-unused"}
    assert (brief.returncode, "; used by: nobody: " in brief.stdout) == (1, True)
    assert "Nobody uses KHO here." in text
    assert "replace kho=on by it in GRUB_CMDLINE_LINUX" in text
    advice = said["given_back"]["kho_scratch"]
    assert advice["bytes"] > 64 * MIB
    _boots_with(advice["parameter"], memory=2048)
