# SPDX-License-Identifier: LGPL-2.1-or-later
"""
LUO up to Linux 7.1, of a made-up kernel: an FDT leads to arrays, beside the kernel's own lists.

What the arrays hold is in test_luo.py.  Which members a kernel has says which LUO it has: nothing
here has a version, and 6.19, 7.0 and 7.1 differ in theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from khoscope.abi.kho_fdt import LuoFdt, parse_luo_fdt
from khoscope.abi.serialized import LUO_FLB_HEADER_SER, LUO_FLB_SER
from khoscope.checks import check
from khoscope.facts import budget, invariants
from khoscope.facts.clients import Claims, Flb, Luo, OwnerKind
from khoscope.facts.snapshot import Side, Snapshot
from khoscope.sources import luo as luo_module
from khoscope.sources.probe import KhoOut, LuoLists, Parts
from tests.made_up import DIRECT_MAP, RAM, MadeUp, mapped
from tests.synthetic import spooled
from tests.test_fdt import blob, data, u64
from tests.test_luo import file_ser, session_ser

PAGE = 4096

#: What is different from Linux 7.2.
LINUX_7_1 = {
    "luo_session_header": "list_head list; void *header_ser",
    "luo_file_set": "list_head files_list; void *files; s64 count",
}
LINUX_7_0 = {**LINUX_7_1, "flb_state": "u64 data; s64 count"}
LINUX_6_19 = {
    **LINUX_7_1,
    "luo_file": "liveupdate_file_handler *fh; u64 token; u64 serialized_data; u8 retrieved;"
    " list_head list",
}
#: FLBs came with Linux 7.0.
WITHOUT_FLBS = {"luo_flb_global", "liveupdate_flb"}


@pytest.fixture(autouse=True)
def _mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with mapped(monkeypatch):
        yield


def luo_fdt(sessions: int, flbs: int | None, number: int = 3) -> bytes:
    """As ``luo_fdt_setup`` makes it."""
    nodes = {
        "luo-session": {"compatible": b"luo-session-v2\0", "luo-session-header": u64(sessions)}
    }
    if flbs is not None:
        nodes["luo-flb"] = {"compatible": b"luo-flb-v1\0", "luo-flb-header": u64(flbs)}
    return blob({"compatible": b"luo-v1\0", "liveupdate-number": u64(number)}, nodes)


@dataclass
class Kernel:
    """
    A kernel with LUO up to Linux 7.1, which hands over no session.

    :param room: virtual address of the array for its sessions.
    """

    members: dict[str, str] = field(default_factory=lambda: dict(LINUX_7_1))
    lacks: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.machine = MadeUp(self.lacks, self.members)
        self.room = self.machine.new(bytes(16 * PAGE))
        self.flbs = self.machine.new(np.array([(1, 0)], LUO_FLB_HEADER_SER).tobytes())
        self.header(24, self.room)
        without = "luo_flb_global" in self.lacks
        self.hand(luo_fdt(self.room - DIRECT_MAP, None if without else self.flbs - DIRECT_MAP))

    def header(self, at: int, room: int) -> None:
        """``header_ser`` of the ``struct luo_session_header`` there: 0 incoming, 24 outgoing."""
        self.machine.words(self.machine.address("luo_session_global") + at + 16, room)

    def hand(self, luo: bytes) -> None:
        """Hand this over as LUO's blob."""
        self.blob = self.machine.new(luo)
        subtrees = {"LUO": data(self.blob - DIRECT_MAP, len(luo))}
        self.machine.set("kho_out", self.machine.new(blob(subtrees=subtrees)))

    def came(self, *, number: int = 2) -> None:
        """It was handed something."""
        fdt = self.machine.prog["kho_out"].fdt.value_()
        self.machine.set("kho_in", fdt - DIRECT_MAP)
        self.machine.set("luo_global", 1, number)

    def session(self, name: str, *tokens: int, count: int | None = None, got: int = 0) -> int:
        """A ``struct luo_session`` with an array for its files; where its link is."""
        machine = self.machine
        handler = machine.new(b"vfio-v9")
        at = machine.new(name.encode())
        links = []
        for token in tokens:
            file = machine.new(bytes(56))
            machine.words(file, handler, token, 0x7000 + token, got)
            links.append(file + 32)
        machine.link(at + 88, *links)
        room = machine.new(bytes(2 * PAGE)) if tokens or count else 0
        machine.words(at + 88 + 16, room, len(tokens) if count is None else count)
        return at + 72

    def listed(self, at: int, *links: int) -> None:
        """Put sessions on the list of the ``struct luo_session_header`` there."""
        head = self.machine.address("luo_session_global") + at
        self.machine.link(head, *links)

    def serialize(self, *sessions: tuple[str, list[int]]) -> int:
        """The array of a kernel that hands over sessions with files of these tokens."""
        entries = []
        for name, tokens in sessions:
            raw = b"".join(file_ser(0x7000 + t, t, b"vfio-v9") for t in tokens)
            files = self.machine.new(raw.ljust(2 * PAGE, b"\0")) - DIRECT_MAP if tokens else 0
            entries.append(session_ser(name.encode(), files, len(tokens)))
        raw = u64(len(entries)) + b"".join(entries)
        return self.machine.new(raw.ljust(16 * PAGE, b"\0"))

    def facts(self, moves: bool = False) -> Snapshot:
        return self.machine.source(moves).clients()

    def outgoing(self) -> Luo:
        found = self.facts().outgoing.luo
        assert found is not None
        return found

    def incoming(self) -> Luo:
        side = self.facts().incoming
        assert side is not None
        assert side.luo is not None
        return side.luo


def seen(luo: Luo) -> dict[str, tuple[bool | None, int, list[int]]]:
    """Sessions by name: retrieved, their own count, and the tokens of their files."""
    return {s.name: (s.retrieved, s.count, [f.token for f in s.files]) for s in luo.sessions}


def claimed(side: Side, kind: OwnerKind) -> set[tuple[int, int]]:
    claims = Claims.concatenate(side.claims)
    rows = zip(claims.phys.tolist(), claims.size.tolist(), claims.owner.tolist(), strict=True)
    return {(phys, size) for phys, size, owner in rows if side.owners[owner].kind == kind}


# What the kernel is


@pytest.mark.parametrize(
    ("members", "lacks", "wanted"),
    [
        ({}, set(), LuoLists(False, True, True, True)),
        (LINUX_7_1, set(), LuoLists(True, True, True, True)),
        (LINUX_7_0, set(), LuoLists(True, True, True, False)),
        (LINUX_6_19, WITHOUT_FLBS, LuoLists(True, False, False, False)),
        # The first LUO had no files; another one may keep its sessions or FLBs in its own way.
        (LINUX_7_1, {"luo_file"}, None),
        (LINUX_7_1, {"luo_session"}, None),
        (LINUX_7_1, {"liveupdate_flb"}, None),
        ({**LINUX_7_1, "luo_file_set": "list_head files_list; u64 count"}, set(), None),
        (
            {**LINUX_7_1, "luo_session": "char name[64]; list_head list; luo_file_set file_set"},
            set(),
            None,
        ),
    ],
)
def test_which_luo_a_kernel_has(
    members: dict[str, str], lacks: set[str], wanted: LuoLists | None
) -> None:
    assert Parts(MadeUp(lacks, members).prog, KhoOut("radix_tree", "fdt")).sessions == wanted


# The FDT


def test_the_fdt() -> None:
    assert parse_luo_fdt(luo_fdt(0x1000, 0x2000)) == LuoFdt("luo-v1", 3, 0x1000, 0x2000)
    assert parse_luo_fdt(luo_fdt(0x1000, None), flbs=False) == LuoFdt("luo-v1", 3, 0x1000, None)
    without = parse_luo_fdt(luo_fdt(0x1000, None))
    assert without.problems == ["no node luo-flb"]
    assert without.is_known


@pytest.mark.parametrize(
    ("raw", "compatible", "unknown", "problems"),
    [
        (b"", None, {}, ["not a readable FDT (0 bytes hold no header)"]),
        (blob({"compatible": b"luo-v2\0"}), "luo-v2", {}, []),
        (blob({}), None, {}, []),
        (
            blob({"compatible": b"luo-v1\0"}),
            "luo-v1",
            {},
            ["no liveupdate-number", "no node luo-session", "no node luo-flb"],
        ),
        (
            blob(
                {"compatible": b"luo-v1\0", "liveupdate-number": bytes(4)},
                {
                    "luo-session": {"luo-session-header": u64(1)},
                    "luo-flb": {"compatible": b"luo-flb-v1\0", "luo-flb-header": b"\1"},
                },
            ),
            "luo-v1",
            {},
            [
                "liveupdate-number has 4 bytes, not 8",
                "node luo-session: no compatible",
                "node luo-flb: luo-flb-header has 1 bytes, not 8",
            ],
        ),
        (
            blob(
                {"compatible": b"luo-v1\0", "liveupdate-number": u64(1)},
                {
                    "luo-session": {"compatible": b"luo-session-v1\0"},
                    "luo-flb": {"compatible": b"x"},
                },
            ),
            "luo-v1",
            {"luo-session": "luo-session-v1", "luo-flb": "x"},
            [],
        ),
    ],
)
def test_an_fdt_that_says_something_else(
    raw: bytes, compatible: str | None, unknown: dict[str, str], problems: list[str]
) -> None:
    found = parse_luo_fdt(raw)
    assert (found.compatible, found.unknown, found.problems) == (compatible, unknown, problems)
    assert found.is_known == (compatible == "luo-v1" and not unknown)


@pytest.mark.parametrize("length", range(0, 300, 7))
def test_an_fdt_that_is_cut_off(length: int) -> None:
    raw = luo_fdt(0x1000, 0x2000)
    assert int.from_bytes(raw[4:8], "big") > 300
    found = parse_luo_fdt(raw[:length])
    assert (found.compatible, found.sessions, len(found.problems)) == (None, None, 1)


# What it hands over


@pytest.mark.parametrize(
    ("members", "lacks"),
    [(LINUX_7_1, set()), (LINUX_7_0, set()), (LINUX_6_19, WITHOUT_FLBS)],
)
def test_what_is_handed_over(members: dict[str, str], lacks: set[str]) -> None:
    kernel = Kernel(members, lacks)
    kernel.listed(24, kernel.session("a", 7, 8), kernel.session("b"))
    facts = kernel.facts()
    luo = facts.outgoing.luo
    assert luo is not None
    assert (luo.phys, luo.compatible, luo.liveupdate_num) == (
        kernel.blob - DIRECT_MAP,
        "luo-v1",
        3,
    )
    assert (luo.live, luo.raw, luo.problems, luo.flbs) == (True, None, [], [])
    assert seen(luo) == {"a": (False, 2, [7, 8]), "b": (False, 0, [])}
    assert [file.data for file in luo.sessions[0].files] == [0x7007, 0x7008]
    assert [file.retrieve_status for file in luo.sessions[0].files] == [0, 0]
    assert facts.unreadable == []
    assert list(invariants.contradictions(facts)) == []
    lists = {(kernel.room - DIRECT_MAP, 16 * PAGE)}
    if "luo_flb_global" not in lacks:
        lists.add((kernel.flbs - DIRECT_MAP, PAGE))
    assert claimed(facts.outgoing, OwnerKind.LUO) == lists
    ((_, size),) = claimed(facts.outgoing, OwnerKind.SESSION)
    assert size == 2 * PAGE


@pytest.mark.parametrize("members", [LINUX_7_1, LINUX_7_0])
def test_flbs_that_are_handed_over(members: dict[str, str]) -> None:
    """The count is a number, or a refcount_t; either is in the same place."""
    kernel = Kernel(members)
    flbs = []
    for name, count in ((b"iommu-v1", 2), (b"unused-v1", 0)):
        flb = kernel.machine.new(name)
        kernel.machine.words(flb + 48 + 16, 0x5000, count)
        flbs.append(flb + 48)
    kernel.machine.link(kernel.machine.address("luo_flb_global"), *flbs)
    assert kernel.outgoing().flbs == [Flb("iommu-v1", 0x5000, 2)]


def test_facts_that_are_not_what_the_fdt_says() -> None:
    kernel = Kernel()
    facts = kernel.facts()
    luo = facts.outgoing.luo
    assert luo is not None
    for changes in ({"liveupdate_num": 9}, {"compatible": "luo-v5"}):
        side = replace(facts.outgoing, luo=replace(luo, **changes))
        (said,) = invariants.contradictions(replace(facts, outgoing=side))
        assert said.endswith("its bytes say ('luo-v1', 3)")


def test_an_fdt_that_leads_elsewhere() -> None:
    """The next kernel goes by the FDT, this one writes to where it has allocated the array."""
    kernel = Kernel()
    other = kernel.machine.new(bytes(16 * PAGE))
    kernel.header(24, other)
    assert kernel.outgoing().problems == [
        f"its FDT leads to sessions at {kernel.room - DIRECT_MAP:#x}, "
        f"the kernel writes them to {other - DIRECT_MAP:#x}"
    ]
    (finding,) = (f for f in check(kernel.facts()).findings if f.rule == "broken-luo")
    assert "panics" in finding.explain
    assert "kho_block_set_restore" not in finding.explain


@pytest.mark.parametrize("away", [RAM, RAM - 8 * PAGE, 2**64 - PAGE, 12])
def test_an_fdt_that_leads_out_of_memory(away: int) -> None:
    kernel = Kernel()
    kernel.hand(luo_fdt(away, away))
    kernel.header(24, (DIRECT_MAP + away) % 2**64)
    problems = kernel.outgoing().problems
    assert problems[0] == f"the array at {away:#x} does not lie in RAM"
    if away >= RAM:
        assert problems[1] == f"struct luo_flb_header_ser at {away:#x} cannot be read"


def test_an_fdt_that_lacks_a_node() -> None:
    kernel = Kernel()
    kernel.hand(luo_fdt(kernel.room - DIRECT_MAP, None))
    assert kernel.outgoing().problems == ["its FDT: no node luo-flb"]
    kernel.hand(blob({"compatible": b"luo-v1\0"}))
    assert kernel.outgoing().problems == [
        "its FDT: no liveupdate-number",
        "its FDT: no node luo-session",
        "its FDT: no node luo-flb",
    ]


def test_nodes_that_are_not_known() -> None:
    kernel = Kernel()
    kernel.listed(24, kernel.session("a", 7))
    kernel.hand(
        blob(
            {"compatible": b"luo-v1\0", "liveupdate-number": u64(1)},
            {"luo-session": {"compatible": b"luo-session-v9\0"}},
        )
    )
    luo = kernel.outgoing()
    assert (luo.compatible, luo.sessions, luo.problems) == ("luo-v1", [], [])
    assert luo.raw is not None
    assert [
        what for what in check(kernel.facts()).incomplete if what.startswith("outgoing LUO")
    ] == [
        "outgoing LUO: node luo-session: 'luo-session-v9' is an ABI that khoscope does not know: "
        "its sessions were not looked at"
    ]


def test_what_another_luo_writes_is_not_taken_for_its_own() -> None:
    kernel = Kernel()
    kernel.hand(b"luo-v5\0\0" + bytes(24))
    assert (kernel.outgoing().compatible, kernel.outgoing().raw) == (
        "luo-v5",
        (b"luo-v5\0\0" + bytes(24)).hex(),
    )


def test_arrays_that_are_nowhere() -> None:
    """Pointers of the kernel's own that lead anywhere."""
    kernel = Kernel()
    link = kernel.session("a", 7)
    for at in (8, DIRECT_MAP - PAGE, 2**64 - 8):
        kernel.machine.words(link - 72 + 88 + 16, at)
        kernel.listed(24, link)
        (session,) = kernel.outgoing().sessions
        phys = (at - DIRECT_MAP) % 2**64
        assert session.problems == [f"the array at {phys:#x} does not lie in RAM"]
        assert [file.token for file in session.files] == [7]


def test_a_count_that_is_negative() -> None:
    kernel = Kernel()
    kernel.listed(24, kernel.session("a", 7, count=2**64 - 1))
    facts = spooled(kernel.facts())
    assert facts.outgoing.luo is not None
    (session,) = facts.outgoing.luo.sessions
    assert session.problems == [f"counts {2**64 - 1} files, lists 1"]


def test_two_sessions_with_one_array() -> None:
    kernel = Kernel()
    links = [kernel.session(name, 7) for name in ("a", "b")]
    (files,) = np.frombuffer(kernel.machine.prog.read(links[0] + 32, 8), np.uint64).tolist()
    kernel.machine.words(links[1] + 32, files)
    kernel.listed(24, *links)
    first, second = kernel.outgoing().sessions
    assert first.problems == []
    assert second.problems == [f"the array at {files - DIRECT_MAP:#x} lies where another list is"]


def test_what_a_vmcore_lacks_is_named() -> None:
    for moves in (False, True):
        kernel = Kernel()
        link = kernel.session("a", 7)
        kernel.listed(24, link)
        source = kernel.machine.source(moves)
        kernel.machine.faults.add(link & -PAGE)
        facts = source.clients()
        assert facts.outgoing.luo is not None
        assert bool(facts.outgoing.luo.problems) == moves
        assert facts.unreadable == ([] if moves else ["LUO's sessions (outgoing)"])


def test_more_files_than_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of khoscope's is no fault of the kernel's, but no verdict passes either."""
    kernel = Kernel()
    kernel.listed(24, kernel.session("a", *range(5)), kernel.session("b", 7), kernel.session("c"))
    monkeypatch.setattr(budget, "ENTRIES", 6)
    luo = kernel.outgoing()
    # All sessions are found first.
    assert [(s.count, len(s.files), s.left_out, s.problems) for s in luo.sessions] == [
        *((5, 3, 2, []), (1, 0, 1, []), (0, 0, 0, []))
    ]
    report = check(kernel.facts())
    assert report.counts["broken-luo"] == 0
    assert [each for each in report.incomplete if "beyond" in each] == [
        "outgoing LUO: session 'a': at least 2 files beyond the 6 entries that khoscope looks at",
        "outgoing LUO: session 'b': at least 1 files beyond the 6 entries that khoscope looks at",
    ]
    monkeypatch.setattr(budget, "ENTRIES", 2)
    luo = kernel.outgoing()
    assert ([s.name for s in luo.sessions], luo.left_out, luo.problems) == (["a", "b"], 1, [])


def test_lists_that_loop() -> None:
    """They end, and nothing on them is there twice."""
    kernel = Kernel()
    links = [kernel.session(name, 7, 8) for name in ("a", "b")]
    kernel.listed(24, *links)
    machine = kernel.machine
    (first,) = np.frombuffer(machine.prog.read(links[0] + 16, 8), np.uint64).tolist()
    (second,) = np.frombuffer(machine.prog.read(first, 8), np.uint64).tolist()
    machine.words(second, first)
    machine.words(links[1], links[0])
    luo = kernel.outgoing()
    assert luo.problems == [f"the list loops: {links[0] - 72:#x} was there before"]
    assert seen(luo) == {"a": (False, 2, [7, 8]), "b": (False, 2, [7, 8])}
    assert luo.sessions[0].problems == [f"the list loops: {first - 32:#x} was there before"]


def test_a_list_that_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """khoscope came upon a file that was just taken off its list."""
    kernel = Kernel()
    link = kernel.session("a", 7, 8)
    kernel.listed(24, link)
    source = kernel.machine.source(moves=True)
    at = luo_module._Look.at

    def moving(look: luo_module._Look, head: int) -> None:
        at(look, head)
        kernel.machine.words(link + 16 + 24, 2)

    kernel.machine.words(link + 16 + 24, 3)
    monkeypatch.setattr(luo_module._Look, "at", moving)
    luo = source.clients().outgoing.luo
    assert luo is not None
    assert (luo.sessions[0].count, luo.sessions[0].problems) == (2, [])


# What it was handed


def test_nothing_was_handed_over() -> None:
    kernel = Kernel()
    kernel.came(number=0)
    luo = kernel.incoming()
    assert (luo.compatible, luo.live, luo.sessions, luo.problems) == (None, True, [], [])


@pytest.mark.parametrize(("members", "lacks"), [(LINUX_7_1, set()), (LINUX_6_19, WITHOUT_FLBS)])
def test_what_the_kernel_has_not_looked_at(members: dict[str, str], lacks: set[str]) -> None:
    kernel = Kernel(members, lacks)
    at = kernel.serialize(("a", [7, 8]), ("b", []))
    kernel.header(0, at)
    kernel.came()
    facts = kernel.facts()
    assert facts.incoming is not None
    luo = facts.incoming.luo
    assert luo is not None
    assert (luo.compatible, luo.liveupdate_num, luo.live) == ("luo-v1", 2, False)
    assert seen(luo) == {"a": (None, 2, [7, 8]), "b": (None, 0, [])}
    assert luo.problems == []
    assert claimed(facts.incoming, OwnerKind.LUO) == {(at - DIRECT_MAP, 16 * PAGE)}
    found = [f.message for f in check(facts).findings if f.rule == "orphaned-session"]
    assert found == [
        "session 'a' (2 files) was handed over, and nobody has retrieved it",
        "session 'b' (0 files) was handed over, and nobody has retrieved it",
    ]


def test_what_the_kernel_has_read() -> None:
    """Then it gave back the array of sessions; those of files stay until the session is done."""
    kernel = Kernel()
    kernel.listed(0, kernel.session("a", 7, 8))
    kernel.came()
    facts = kernel.facts()
    assert facts.incoming is not None
    luo = facts.incoming.luo
    assert luo is not None
    assert (luo.live, seen(luo)) == (True, {"a": (False, 2, [7, 8])})
    assert claimed(facts.incoming, OwnerKind.LUO) == set()
    assert {size for _, size in claimed(facts.incoming, OwnerKind.SESSION)} == {2 * PAGE}


@pytest.mark.parametrize("status", [1, 2**64 - 22])
def test_how_a_file_was_retrieved(status: int) -> None:
    kernel = Kernel()
    kernel.listed(0, kernel.session("a", 7, got=status))
    kernel.came()
    assert kernel.incoming().sessions[0].files[0].retrieve_status == (1 if status == 1 else -22)
    old = Kernel(LINUX_6_19, WITHOUT_FLBS)
    old.listed(0, old.session("a", 7, got=1), old.session("b", 8, got=0))
    old.came()
    assert [s.files[0].retrieve_status for s in old.incoming().sessions] == [1, 0]


def test_a_kernel_that_gave_up_half_way() -> None:
    """It keeps the array, and what it has made of it until then."""
    kernel = Kernel()
    at = kernel.serialize(("a", [7]), ("b", [8, 9, 10]), ("c", [11]))
    kernel.header(0, at)
    kernel.listed(0, kernel.session("a", 7), kernel.session("b", 8, count=3))
    kernel.came()
    luo = kernel.incoming()
    assert luo.live
    assert seen(luo) == {
        "a": (False, 1, [7]),
        "b": (False, 3, [8]),
        "c": (None, 1, [11]),
    }
    assert luo.problems == []
    assert [s.problems for s in luo.sessions] == [[], ["counts 3 files, lists 1"], []]
    report = check(kernel.facts())
    found = {f.message: f.explain for f in report.findings if f.rule == "orphaned-session"}
    assert list(found) == [
        "session 'b' (3 files): the kernel has only 1 of them",
        "session 'c' (1 file): the kernel gave up before it came to this one",
        "session 'a' (1 file) was handed over, and nobody has retrieved it",
    ]
    assert all("EIO" in why for message, why in found.items() if "'a'" not in message)


def test_flbs_that_came() -> None:
    kernel = Kernel()
    raw = np.array([(1, 1)], LUO_FLB_HEADER_SER).tobytes()
    raw += np.array([(b"iommu-v1", 0x5000, 2)], LUO_FLB_SER).tobytes()
    kernel.machine.set("luo_flb_global", *[0] * 4)
    kernel.machine.link(kernel.machine.address("luo_flb_global"))
    kernel.machine.words(kernel.machine.address("luo_flb_global") + 16, 1, kernel.machine.new(raw))
    kernel.came()
    assert kernel.incoming().flbs == [Flb("iommu-v1", 0x5000, 2)]


@pytest.mark.parametrize("at", [12, DIRECT_MAP + RAM, DIRECT_MAP - 8 * PAGE, 2**64 - 8])
def test_pointers_to_nowhere(at: int) -> None:
    kernel = Kernel()
    kernel.header(0, at)
    kernel.machine.words(kernel.machine.address("luo_flb_global") + 16, 1, at)
    kernel.came()
    luo = kernel.incoming()
    phys = (at - DIRECT_MAP) % 2**64
    assert (luo.sessions, luo.flbs) == ([], [])
    assert luo.problems == [
        f"the array at {phys:#x} does not lie in RAM",
        f"struct luo_flb_header_ser at {phys:#x} cannot be read",
    ]
