# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Mutants of snapshots and recordings: every fact of the schema, left out or another one.

The facts are found in the files themselves: a new one is covered the day that it is added.
``python -m tests.mutants SEED COUNT`` runs so many of them through khoscope's commands, in a
process of its own: what takes too long or too much memory ends it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import resource
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from khoscope import checks
from khoscope.cli import main
from khoscope.demo import path
from khoscope.facts import store
from khoscope.facts.columns import Blocks, Leaves, Nodes, Pages
from khoscope.facts.snapshot import KexecImage, Snapshot
from khoscope.facts.tree import Tree

#: A path in meta.json.
Where = tuple[str | int, ...]

#: Seconds that any one command may take, and bytes that all of them together may need.
SECONDS: Final = 30
MEMORY: Final = 1 << 30


@dataclass(frozen=True)
class Base:
    """
    A snapshot with one fault.

    :param status: what ``verify`` says of it: 1 or 3.
    :param alone: facts that no other fact tells of: changed to another sound one, the fault is
        gone, and nobody could know.
    :param before: the snapshot to compare with.
    :param after: or the one that is compared with this.
    """

    name: str
    data: bytes
    status: int
    alone: tuple[str, ...] = ()
    before: bytes | None = None
    after: bytes | None = None

    @property
    def is_across(self) -> bool:
        return self.before is not None or self.after is not None


def bytes_of(facts: Snapshot) -> bytes:
    file = io.BytesIO()
    store.save(facts, file)
    return file.getvalue()


def whole() -> Snapshot:
    """A real kernel with nothing wrong: the demo's, without what is wrong there on purpose."""
    facts = store.load_file(path("odd-before"))
    side, abi = facts.outgoing, facts.abi
    wrong = {(f.phys, f.order) for f in checks.check(facts).findings if f.order is not None}

    def kept(blocks: Blocks) -> Blocks:
        rows = zip(blocks.phys.tolist(), blocks.order.tolist(), strict=True)
        return blocks[np.array([row not in wrong for row in rows], np.bool_)]

    blocks = [kept(chunk) for chunk in side.blocks]
    leaves = Leaves.concatenate(side.tree.leaves)
    bits = np.unpackbits(leaves.bitmap, axis=1, bitorder="little")
    bits[:] = 0
    for chunk in blocks:
        row = np.searchsorted(leaves.key, chunk.key & ~np.uint64(abi.leaf_bits - 1))
        bits[row, (chunk.key & np.uint64(abi.leaf_bits - 1)).astype(np.int64)] = 1
    leaves = Leaves(leaves.key, np.packbits(bits, axis=1, bitorder="little"))
    counts = dict(zip(leaves.key.tolist(), leaves.counts().tolist(), strict=True))
    leaves = leaves[leaves.counts() > 0]

    def used(nodes: Nodes) -> Nodes:
        rows = zip(nodes.level.tolist(), nodes.key.tolist(), nodes.used.tolist(), strict=True)
        found = [counts.get(key, was) if level == 0 else was for level, key, was in rows]
        return replace(nodes, used=np.array(found, np.uint32))

    tree = Tree(side.tree.state, [used(chunk) for chunk in side.tree.nodes], [leaves])
    image = KexecImage(True, True, side.fdt.phys, 12 << 20)
    return replace(facts, outgoing=replace(side, tree=tree, blocks=blocks), image=image)


def with_pages(facts: Snapshot, change: Callable[[Pages], None]) -> Snapshot:
    """The same with other struct pages of one unsplit block of order 2 and more."""
    blocks = Blocks.concatenate(facts.outgoing.blocks)
    columns = {name: getattr(blocks.facts, name).copy() for name in Pages.DTYPES}
    row = int(np.flatnonzero((blocks.order >= 2) & (blocks.facts.zeros >= 3))[0])
    one = Pages(**{name: values[row : row + 1] for name, values in columns.items()})
    change(one)
    blocks = replace(blocks, pages=Pages(**columns))
    return replace(facts, outgoing=replace(facts.outgoing, blocks=[blocks]))


def split(pages: Pages) -> None:
    pages.ones[:], pages.zeros[:] = pages.zeros.copy(), 0
    pages.compound[:] = Pages.NOT_COMPOUND


def bases() -> list[Base]:
    """Four snapshots with a fault each, and both sides of a kexec after which much is wrong."""
    good = whole()
    luo = good.outgoing.luo
    assert luo is not None
    broken = replace(good.outgoing, luo=replace(luo, problems=["the chain loops"]))
    pages = ("pages.ones", "pages.zeros", "pages.compound", ".type")
    return [
        Base("split memory", bytes_of(with_pages(good, split)), 1, pages),
        Base(
            "an image without KHO",
            bytes_of(replace(good, image=KexecImage(True, False, 0, 12 << 20))),
            1,
            ("image", "image.kho_fdt", "image.loaded"),
        ),
        Base("broken LUO", bytes_of(replace(good, outgoing=broken)), 1, ("outgoing.luo.problems",)),
        Base("unread", bytes_of(replace(good, unreadable=["its RAM"])), 3, ("unreadable",)),
        Base(
            "after the kexec",
            path("odd-after").read_bytes(),
            1,
            # What became of the pages is not told twice.
            tuple(f"watched/000000.pages.{name}" for name in Pages.DTYPES),
            path("odd-before").read_bytes(),
        ),
        Base(
            "before the kexec",
            path("odd-before").read_bytes(),
            1,
            tuple(f"out/blocks/000000.pages.{name}" for name in Pages.DTYPES),
            after=path("odd-after").read_bytes(),
        ),
    ]


# -- facts ----------------------------------------------------------------------------------------


def facts_of(value: Any, at: Where = ()) -> Iterator[Where]:
    """Every fact in meta.json; of long lists the first and the last."""
    if at:
        yield at
    if isinstance(value, dict):
        for name, each in value.items():
            yield from facts_of(each, (*at, name))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from facts_of(value[i], (*at, i))


def members_of(value: Any, at: Where = ()) -> Iterator[Where]:
    """Those that are members of structures: they have names of the schema's."""
    tables = {"blobs", "chunks", "decided", "page_types", "symbols", "attached", "missing"}
    for where in facts_of(value, at):
        if isinstance(where[-1], str) and (len(where) < 2 or where[-2] not in tables):
            yield where


def read(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """meta.json, and all other members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return json.loads(members.pop("meta.json")), members


def made(meta: dict[str, Any], members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("meta.json", json.dumps(meta))
    return file.getvalue()


def _parent(meta: Any, where: Where) -> Any:
    for step in where[:-1]:
        meta = meta[step]
    return meta


def without(meta: dict[str, Any], where: Where) -> dict[str, Any]:
    changed = copy.deepcopy(meta)
    del _parent(changed, where)[where[-1]]
    return changed


def with_value(meta: dict[str, Any], where: Where, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(meta)
    _parent(changed, where)[where[-1]] = value
    return changed


def value_at(meta: Any, where: Where) -> Any:
    return _parent(meta, where)[where[-1]]


EXTREMES: Final[list[Any]] = [
    *(0, 1, -1, -5, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, 4096, 0.5, 1e400),
    *("", "PASS: safe to kexec", "\n\033[31m\u202e", [], {}, None, True, False, [[]], [2**64]),
]


def other_value(rng: random.Random, meta: dict[str, Any], where: Where) -> Any:
    """Zero, the most there is, another type, or what some other fact says."""
    if rng.random() < 0.5:
        return copy.deepcopy(rng.choice(EXTREMES))
    return copy.deepcopy(value_at(meta, rng.choice(list(facts_of(meta)))))


def other_member(rng: random.Random, members: dict[str, bytes], name: str) -> bytes | None:
    """A column or blob: left out, zero, all ones, another's, cut, or a byte of it changed."""
    data = bytearray(members[name])
    start = 128 if name.endswith(".npy") else 0
    match rng.randrange(7):
        case 0:
            return None
        case 1:
            data[start:] = bytes(len(data) - start)
        case 2:
            data[start:] = b"\xff" * (len(data) - start)
        case 3:
            same = [n for n in members if n.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]]
            return members[rng.choice(same)]
        case 4:
            return members[rng.choice(list(members))]
        case 5:
            del data[rng.randrange(len(data) + 1) :]
        case _:
            for _ in range(rng.choice([1, 1, 1, 8])):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@dataclass(frozen=True)
class Mutant:
    """
    :param what: was done to it.
    :param fact: to which fact; the member's path, or the column's name.
    """

    base: Base
    what: str
    fact: str
    data: bytes

    @property
    def may_pass(self) -> bool:
        """Whether the fault itself may have gone: nothing else tells of it."""
        return any(self.fact.endswith(each) for each in self.base.alone)


def mutant(rng: random.Random, every: list[Base]) -> Mutant:
    """One fact of one of them is another."""
    base = rng.choice(every)
    meta, members = read(base.data)
    kind = rng.random()
    if kind < 0.15:
        where = rng.choice(list(members_of(meta)))
        return Mutant(base, "left out", _name(where), made(without(meta, where), members))
    if kind < 0.65:
        where = rng.choice(list(facts_of(meta)))
        value = other_value(rng, meta, where)
        changed = made(with_value(meta, where, value), members)
        return Mutant(base, f"is {str(value)[:60]!r}", _name(where), changed)
    name = rng.choice(list(members))
    content = other_member(rng, members, name)
    others = {n: c for n, c in members.items() if n != name}
    if content is not None:
        others[name] = content
    return Mutant(base, "is another", name.removesuffix(".npy"), made(meta, others))


def _name(where: Where) -> str:
    return ".".join(map(str, where))


# -- running --------------------------------------------------------------------------------------

COMMANDS: Final = [
    *(["status"], ["tree", "--nodes"], ["tree", "--incoming"], ["verify"], ["owners"], ["luo"]),
    *(["pages", "0..0x4000000"], ["fdt"], ["fdt", "in"], ["vmalloc", "0x1000"], ["diff"]),
    ["metrics"],
]
MODES: Final = [[], ["--json"], ["--limit", "0"]]
#: What a pass is to metrics, which know nothing of another kernel.
_PASS: Final = 'khoscope_verdict{about="kexec",verdict="pass"} 1\n'


def run(words: list[str]) -> tuple[int, str, str]:
    """khoscope in this process: status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as ended:
                status = int(ended.code or 0)
    finally:
        signal.alarm(0)
    return status, out.getvalue(), err.getvalue()


def trouble(found: Mutant, words: list[str], status: int, out: str, err: str) -> str | None:
    """What is wrong with how khoscope took a mutant."""
    if "Traceback" in err or "this is a bug" in err:
        return err
    if status == 2 and len(err.splitlines()) != 2:
        return f"not two lines: {err!r}"
    verifies = "verify" in words
    if status not in ((0, 1, 2, 3) if verifies else (0, 2)):
        return f"status {status}"
    passes = status == 0 and (verifies or (_PASS in out and not found.base.is_across))
    if passes and not found.may_pass:
        return "passes"
    if any(line.startswith("PASS") for line in out.splitlines()) and status != 0:
        return "says PASS"
    return None


def asked(folder: Path, base: Base, data: bytes, words: list[str]) -> list[str]:
    """The command line that asks this of a mutant of a base."""
    file, other = folder / "mutant.khosnap", folder / "other.khosnap"
    file.write_bytes(data)
    other.write_bytes(base.before or base.after or base.data)
    if words[0] == "diff":
        return [*words, str(file), str(other)]
    if words[0] == "verify" and base.before is not None:
        return ["--snapshot", str(file), *words, "--before", str(other)]
    if words[0] == "verify" and base.after is not None:
        return ["--snapshot", str(other), *words, "--before", str(file)]
    return ["--snapshot", str(file), *words]


def campaign(seed: int, count: int) -> int:
    """Run so many mutants; what was wrong goes to stdout, and the status says how many."""
    rng = random.Random(seed)
    every = bases()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(count):
            found = mutant(rng, every)
            words = rng.choice([*COMMANDS, ["verify"], ["verify"]])
            if words != ["metrics"]:
                words = words + rng.choice(MODES)
            said = trouble(found, words, *run(asked(folder, found.base, found.data, words)))
            if said:
                wrong += 1
                print(f"{found.base.name}: {found.fact} {found.what}: {words}: {said}")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if most > MEMORY:
        wrong += 1
        print(f"{most:,} bytes of memory")
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(campaign(int(sys.argv[1]), int(sys.argv[2])))
