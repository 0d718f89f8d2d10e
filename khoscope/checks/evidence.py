# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a snapshot does not show: no report passes while there is any such gap.

khoscope asks the same of the one snapshot that it judges, and of both sides of a kexec.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..abi import serialized
from ..abi.compatibles import is_known
from ..abi.fdt import is_too_large
from ..abi.keys import COMPATIBLES
from ..abi.kho_fdt import compatible_of, parse_luo_fdt
from ..facts import budget, invariants
from ..facts.clients import Luo
from ..facts.columns import Blocks
from ..facts.nodes import are_known
from ..facts.snapshot import Side, Snapshot
from ..facts.tree import KeySet
from . import blocks as blocks_rules


def gaps(facts: Snapshot, clients: bool) -> list[str]:
    """
    What is not known about a kernel, in words, as far as single facts tell.

    :param clients: whether it also matters what clients own.
    """
    found = [f"cannot be read: {what}" for what in facts.unreadable]
    found += [f"not recorded by khoscope {facts.taken.khoscope}: {w}" for w in facts.unrecorded]
    every = [*facts.contradictions, *invariants.contradictions(facts)]
    every += invariants.of_claims(facts) if clients else ()
    found += [f"facts contradict each other: {what}" for what in every]
    found += _off(facts)
    for which, side in (("outgoing", facts.outgoing), ("incoming", facts.incoming)):
        if side is not None:
            found += [f"{which} {what}" for what in _unknown(side, side is facts.outgoing)]
    return list(dict.fromkeys(found))


def _off(facts: Snapshot) -> Iterator[str]:
    if not facts.kho_enable or not facts.outgoing.tree.state.root:
        yield "KHO is off, or has no tree: there is nothing to judge"
    elif not len(facts.scratch):
        yield "KHO is on, and where its scratch areas are is not known"
    elif not are_known(facts):
        yield "where NUMA nodes meet is not known"
    if facts.offline is None and not facts.unreadable and not facts.unrecorded:
        yield "which memory is offline is not known"


def _unknown(side: Side, outgoing: bool) -> Iterator[str]:
    """What is handed over in a form that khoscope does not know, or that could not be read."""
    fdt = side.fdt
    if fdt.phys and "fdt" not in side.blobs:
        yield "root FDT: it could not be read"
    elif fdt.compatible is not None and not is_known(fdt.compatible, COMPATIBLES):
        yield f"root FDT: {fdt.compatible!r} is an ABI that khoscope does not know"
    there = {subtree.name: subtree.size for subtree in fdt.subtrees}
    luo = side.luo
    if luo is None:
        if serialized.LUO in there:
            yield "LUO: what it hands over was not looked at"
    elif luo.raw is not None or luo.compatible is None:
        yield f"LUO: {_luo_named(side, luo)}: its sessions were not looked at"
    else:
        yield from _unknown_files(luo)
        yield from _left_out(luo)
    for name, known in serialized.SUBTREE_COMPATIBLES.items():
        blob, size = side.blobs.get(f"subtree {name}"), there.get(name) or 0
        if blob is None:
            continue
        if is_too_large(blob, size):
            yield f"subtree {name}: an FDT, of whose {size:,} bytes not all were looked at"
        # bad-fdt reports a blob that is not an FDT; an incoming blob may have been freed since.
        says = compatible_of(blob)
        if says is not None and says != known:
            yield f"subtree {name}: {_named(says)}: not looked at"
    if outgoing:
        yield from _unknown_metadata(side)


def _named(compatible: str | None) -> str:
    if compatible is None:
        return "its ABI could not be read"
    return f"{compatible!r} is an ABI that khoscope does not know"


def _luo_named(side: Side, luo: Luo) -> str:
    """What of LUO's ABI is not known."""
    blob = side.blobs.get(f"subtree {serialized.LUO}", b"")
    nodes = parse_luo_fdt(blob).unknown.items()
    return ", ".join(f"node {node}: {_named(says)}" for node, says in nodes) or _named(
        luo.compatible
    )


def _unknown_files(luo: Luo) -> Iterator[str]:
    handlers = Counter(file.handler for session in luo.sessions for file in session.files)
    for handler, count in handlers.items():
        if handler not in serialized.MEMFDS:
            yield f"LUO: {count:,} files of handler {handler!r}: their memory was not looked at"


def _left_out(luo: Luo) -> Iterator[str]:
    """What khoscope has not looked at because all have more than it keeps."""
    beyond = f"beyond the {budget.ENTRIES:,} entries that khoscope looks at"
    if luo.left_out:
        yield f"LUO: at least {luo.left_out:,} sessions or FLBs {beyond}"
    for session in luo.sessions:
        if session.left_out:
            yield f"LUO: {session}: at least {session.left_out:,} files {beyond}"


def _unknown_metadata(side: Side) -> Iterator[str]:
    raw = side.blobs.get(f"subtree {serialized.KEXEC_METADATA}")
    if raw is None:
        return
    version = int.from_bytes(raw[:4], "little")
    if version != serialized.KEXEC_METADATA_VERSION:
        yield f"{serialized.KEXEC_METADATA}: version {version}, khoscope knows another"


def all_gaps(facts: Snapshot) -> list[str]:
    """What is not known about a kernel and the blocks of its tree."""
    rows = Rows(facts, KeySet(facts.abi, facts.outgoing.tree.leaves))
    for blocks in facts.outgoing.blocks:
        rows.add(blocks)
    return gaps(facts, clients=False) + rows.gaps()


class Rows:
    """
    What is not known about the blocks of a kernel's tree, chunk by chunk.

    :param keys: of the outgoing tree.
    """

    def __init__(self, facts: Snapshot, keys: KeySet) -> None:
        self._facts = facts
        self._keys = keys
        self._wrong: Counter[str] = Counter()
        self._unjudged = self._strange = 0
        self.count = 0

    def add(self, blocks: Blocks) -> None:
        """Look at the next chunk."""
        self.count += len(blocks)
        self._unjudged += blocks_rules.unjudged(self._facts, blocks)
        self._wrong += invariants.of_blocks(self._facts.abi, blocks)
        self._strange += int((~self._keys.contains(blocks.key)).sum())

    def gaps(self) -> list[str]:
        """The gaps that were found, in words."""
        facts = self._facts
        found = [
            f"facts contradict each other: {count:,} blocks {what}"
            for what, count in self._wrong.items()
        ]
        if self._strange:
            found.append(f"facts contradict each other: {self._strange:,} blocks are in no leaf")
        if self._unjudged:
            found.append(f"the struct pages of {self._unjudged} blocks could not be read")
        moved = facts.outgoing.tree.state.moved
        if moved:
            found.append(f"{moved} blocks came or went while the tree was read")
        held = int(self._keys.counts.sum())
        if held != self.count:
            found.append(f"the tree holds {held} blocks, the facts are of {self.count}")
        tree = invariants.of_tree(facts, facts.outgoing, self._keys)
        return found + [f"facts contradict each other: tree: {what}" for what in tree]
