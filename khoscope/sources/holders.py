# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Find out who holds LUO's sessions and ``/dev/liveupdate`` open.

Nothing leads from a session to its holders: all tasks have to be looked at, and all that they have
open.  A host may have hundreds of thousands of tasks and millions of open files, so these are
columns of addresses, and structures of a kind are read together.
Like the walks of trees, this takes no lock, trusts no pointer and always ends.  A task or a file
that is gone meanwhile holds nothing any more.
Kernel sources: ``kernel/liveupdate/luo_*.c``, ``kernel/pid.c``, ``fs/file.c``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Final

import numpy as np
from drgn import FaultError, Object, offsetof
from drgn.helpers.linux.fs import for_each_file
from drgn.helpers.linux.pid import find_task
from numpy.typing import NDArray

from ..abi.keys import U64
from ..abi.serialized import text
from ..facts import budget
from ..facts.clients import Held, Holder, Holders
from .clients import Where
from .probe import record_layout
from .track import XA_DEEPEST, XA_NOT_A_NODE
from .walk import READ_SIZE, in_ranges, read_rows

#: Structures that are read together.
TOGETHER: Final = 1 << 13
#: Slots of a table of file descriptors that are read as one piece: 1 MiB.
PIECE: Final = READ_SIZE // 8

#: Cgroups above each other, and bytes of a name: more than a path may have.
_DEEPEST: Final = 1 << 11
_NAME: Final = 1 << 8


@dataclass(frozen=True)
class _Tasks:
    """All tasks, a row each: threads may have tables of their own."""

    at: U64
    pid: NDArray[np.uint32]
    tgid: NDArray[np.uint32]
    files: U64


@dataclass(frozen=True)
class _Tables:
    """
    Tables of file descriptors, a row each: ``struct files_struct``, which tasks may share.

    :param fd: virtual address of the array of ``struct file *``.
    :param max_fds: u64.
    """

    at: U64
    fd: U64
    max_fds: U64


@dataclass(frozen=True)
class _Open:
    """
    Descriptors that lead to a file of LUO's, a row each.

    :param table: the ``struct files_struct``.
    :param file: the ``struct file``.
    """

    table: U64
    file: U64


#: What a file leads to: the name of a session and ``retrieved``, or None and false.
_Thing = tuple[str | None, bool]


def read_holders(at: Where, direct_map: int) -> Holders:
    """
    Who holds sessions or the device.

    :param direct_map: virtual address at which physical address 0 is mapped.
    """
    if not at.parts.holders:
        return Holders(unread=["tasks and their files: the debug info lacks their types"])
    return _Reader(at, direct_map).holders()


@dataclass
class _Reader:
    at: Where
    direct_map: int
    unread: list[str] = field(default_factory=list)
    #: How many structures could not be read, by what they are.
    lost: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    def holders(self) -> Holders:
        tasks = self._tasks(self._pids())
        tables = self._tables(np.unique(tasks.files[tasks.files != 0]))
        found = self._open(tables)
        things = self._things(np.unique(found.file))
        processes = list(self._processes(tasks, found, things))
        booted = self._booted()
        unread = [*self.unread, *(f"{count:,} of {what}" for what, count in self.lost.items())]
        return Holders(processes, booted, self.left_out, unread, self._systemd_memfds())

    # -- reading ----------------------------------------------------------------------------------

    def _read(self, address: int, size: int) -> bytes | None:
        """
        Memory at a virtual address.

        What is in the direct map is read by its physical address: over QMP, drgn would have to walk
        page tables.  Nothing but RAM is read there: what lies between two structures may be a
        device's.
        """
        phys = address - self.direct_map
        try:
            if 0 <= phys < int(self.at.ram[-1, 1]):
                span = (np.array([each], np.uint64) for each in (phys, phys + size))
                return self.at.read(phys, size) if in_ranges(self.at.ram, *span)[0] else None
            return self.at.prog.read(address, size)
        except FaultError:
            return None

    def _rows(self, at: U64, size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """As :func:`read_rows`; what is no address of the kernel's is not there."""
        rows = np.zeros((len(at), size), np.uint8)
        there = (at >= np.uint64(1 << 63)) & (at < np.uint64(2**64 - READ_SIZE))
        there &= at % np.uint64(8) == 0
        rows[there], read = read_rows(self._read, at[there], size)
        there[there] = read
        return rows, there

    def _words(self, at: U64) -> tuple[U64, NDArray[np.bool_]]:
        """The u64 at each address."""
        rows, there = self._rows(at, 8)
        return rows.view(np.uint64).reshape(-1), there

    def _cannot(self, there: NDArray[np.bool_], what: str) -> None:
        """Count what could not be read; in a kernel that runs meanwhile, it may be gone."""
        lost = len(there) - int(there.sum())
        if lost and not self.at.moves:
            self.lost[what] += lost

    def _records(self, at: U64, layout: np.dtype[np.void]) -> tuple[Any, NDArray[np.bool_]]:
        """Some members of structures, as far as these lie from each other; and which are there."""
        assert layout.fields is not None
        first = min(offset for _, offset in (each[:2] for each in layout.fields.values()))
        rows, there = self._rows(at + np.uint64(first), layout.itemsize - first)
        near = np.dtype(
            {
                "names": [*layout.fields],
                "formats": [each[0] for each in layout.fields.values()],
                "offsets": [each[1] - first for each in layout.fields.values()],
                "itemsize": layout.itemsize - first,
            }
        )
        return rows.view(near).reshape(-1), there

    # -- from pids to files -----------------------------------------------------------------------

    def _pids(self) -> U64:
        """The ``struct pid`` of each task (``init_pid_ns.idr``)."""
        prog = self.at.prog
        node = prog.type("struct xa_node")
        slots, count = offsetof(node, "slots"), node.member("slots").type.length or 1
        # More than it takes to have each in a node of its own among as many that are empty.
        left = 2 * budget.TASKS // count
        try:
            entry = np.array([prog["init_pid_ns"].idr.idr_rt.xa_head.value_()], np.uint64)
        except FaultError:
            entry = np.zeros(0, np.uint64)
        found: list[U64] = []
        for _ in range(XA_DEEPEST):
            is_node = (entry & np.uint64(3) == 2) & (entry > XA_NOT_A_NODE)
            found.append(entry[(entry & np.uint64(3) == 0) & (entry != 0)])
            nodes = np.unique(entry[is_node]) - np.uint64(2)
            left -= len(nodes)
            if not len(nodes) or left < 0:
                break
            below = []
            for start in range(0, len(nodes), TOGETHER):
                part = nodes[start : start + TOGETHER] + np.uint64(slots)
                rows, there = self._rows(part, 8 * count)
                self._cannot(there, "the nodes that lead to tasks (struct xa_node)")
                every = rows.view(np.uint64).reshape(-1)
                below.append(every[every != 0])
            entry = np.concatenate(below)
        else:
            left = -1
        pids = np.unique(np.concatenate(found))
        if not len(pids):
            self.unread.append("the tasks (init_pid_ns)")
        elif left < 0 or len(pids) > budget.TASKS:
            self.unread.append("the tasks (init_pid_ns): their tree is corrupt")
        return pids[: budget.TASKS]

    def _tasks(self, pids: U64) -> _Tasks:
        prog = self.at.prog
        kind = prog["PIDTYPE_PID"].value_()
        first = offsetof(prog.type("struct pid"), f"tasks[{kind}].first")
        link = offsetof(prog.type("struct task_struct"), f"pid_links[{kind}]")
        layout = record_layout(
            prog, "struct task_struct", **{name: name for name in ("pid", "tgid", "files")}
        )
        parts = []
        for start in range(0, len(pids), TOGETHER):
            at, there = self._words(pids[start : start + TOGETHER] + np.uint64(first))
            self._cannot(there, "the pids (struct pid)")
            # Of those of process groups and sessions alone, there is no task.
            at = at[at != 0] - np.uint64(link)
            tasks, there = self._records(at, layout)
            self._cannot(there, "the tasks (struct task_struct)")
            rows = tasks[there]
            parts.append(
                _Tasks(
                    at[there],
                    rows["pid"].astype(np.uint32),
                    rows["tgid"].astype(np.uint32),
                    rows["files"].copy(),
                )
            )
        return _Tasks(
            _joined([part.at for part in parts], np.uint64),
            _joined([part.pid for part in parts], np.uint32),
            _joined([part.tgid for part in parts], np.uint32),
            _joined([part.files for part in parts], np.uint64),
        )

    def _tables(self, files: U64) -> _Tables:
        prog = self.at.prog
        fdt = np.uint64(offsetof(prog.type("struct files_struct"), "fdt"))
        layout = record_layout(prog, "struct fdtable", fd="fd", max_fds="max_fds")
        what = "the tables of file descriptors (struct files_struct)"
        parts = []
        for start in range(0, len(files), TOGETHER):
            at = files[start : start + TOGETHER]
            table, there = self._words(at + fdt)
            self._cannot(there, what)
            at, table = at[there], table[there]
            rows, there = self._records(table, layout)
            self._cannot(there, what)
            rows = rows[there]
            parts.append(_Tables(at[there], rows["fd"].copy(), rows["max_fds"].astype(np.uint64)))
        return _Tables(
            _joined([part.at for part in parts], np.uint64),
            _joined([part.fd for part in parts], np.uint64),
            _joined([part.max_fds for part in parts], np.uint64),
        )

    def _open(self, tables: _Tables) -> _Open:
        """The descriptors of LUO's files in all tables."""
        # The small ones first: one that is corrupt may say that it is of any size.
        by = np.argsort(tables.max_fds, kind="stable")
        kept = by[np.cumsum(tables.max_fds[by]) <= budget.DESCRIPTORS]
        self.left_out += len(by) - len(kept)
        table, at, count = _pieces(tables, kept)
        found: list[_Open] = []
        for slots in np.unique(count).tolist():
            same = np.flatnonzero(count == slots)
            step = max(PIECE // slots, 1)
            for start in range(0, len(same), step):
                part = same[start : start + step]
                rows, there = self._rows(at[part], 8 * slots)
                self._cannot(there, "the arrays of file descriptors (struct fdtable)")
                files = rows.view(np.uint64)
                row, slot = np.nonzero(files)
                opened = _Open(table[part][row], files[row, slot])
                mine = self._of_luo(opened.file)
                found.append(_Open(opened.table[mine], opened.file[mine]))
        return _Open(
            _joined([part.table for part in found], np.uint64),
            _joined([part.file for part in found], np.uint64),
        )

    def _of_luo(self, files: U64) -> NDArray[np.bool_]:
        """Which files are sessions or the device."""
        each, row = np.unique(files, return_inverse=True)
        operations, there = self._words(each + self._f_op)
        self._cannot(there, "the open files (struct file)")
        mine = there & np.isin(operations, [self._session_fops, self._device_fops])
        return np.asarray(mine[row], np.bool_)

    @cached_property
    def _f_op(self) -> np.uint64:
        return np.uint64(offsetof(self.at.prog.type("struct file"), "f_op"))

    @cached_property
    def _session_fops(self) -> int:
        return self.at.prog["luo_session_fops"].address_ or 0

    @cached_property
    def _device_fops(self) -> int:
        return self.at.prog["luo_fops"].address_ or 0

    # -- what they hold ---------------------------------------------------------------------------

    def _things(self, files: U64) -> dict[int, _Thing]:
        """What each file leads to."""
        self.left_out += max(len(files) - budget.HELD, 0)
        files = files[: budget.HELD]
        layout = record_layout(
            self.at.prog, "struct file", operations="f_op", session="private_data"
        )
        before, _ = self._records(files, layout)
        session = record_layout(
            self.at.prog, "struct luo_session", name="name", retrieved="retrieved"
        )
        rows, there = self._records(before["session"].copy(), session)
        is_device = before["operations"] == self._device_fops
        is_session = before["operations"] == self._session_fops
        self._cannot(there | ~is_session, "the sessions that are held (struct luo_session)")
        # Another file may take the place of one that is closed meanwhile.
        stood = self._records(files, layout)[0] == before
        known = stood & (is_device | is_session & there)
        return {
            file: (None, False) if device else (text(bytes(row["name"])), bool(row["retrieved"]))
            for file, device, row in zip(
                files[known].tolist(), is_device[known].tolist(), rows[known], strict=True
            )
        }

    def _processes(
        self, tasks: _Tasks, found: _Open, things: dict[int, _Thing]
    ) -> Iterator[Holder]:
        whose = _processes_of(tasks, np.unique(found.table))
        count: dict[int, dict[_Thing, int]] = {}
        held = 0
        for table, file, fds in zip(*_counted(found), strict=True):
            if file not in things:
                continue
            for pid in whose[table]:
                if held == budget.HELD or (pid not in count and len(count) == budget.HOLDERS):
                    self.left_out += 1
                    continue
                its = count.setdefault(pid, {})
                held += things[file] not in its
                its[things[file]] = its.get(things[file], 0) + fds
        for pid in sorted(count):
            leader = tasks.at[tasks.pid == pid].tolist()
            yield self._process(pid, leader[0] if leader else 0, _in_order(count[pid]))

    def _process(self, pid: int, leader: int, held: list[Held]) -> Holder:
        """
        :param leader: its ``struct task_struct``; 0: it could not be read.
        """
        task = Object(self.at.prog, "struct task_struct *", leader)
        try:
            comm, started = text(bytes(task.comm.string_())), task.start_boottime.value_()
        except FaultError:
            return Holder(pid, "", None, None, held)
        return Holder(pid, comm, self._cgroup(task), started, held)

    def _cgroup(self, task: Object) -> str | None:
        """``cgroup_path()`` of a task, in the default hierarchy."""
        parent = self.at.parts.kernfs_parent
        if parent is None:
            return None
        names: list[str] = []
        try:
            node = task.cgroups.dfl_cgrp.kn.read_()
            for _ in range(_DEEPEST):
                above = node.member_(parent).read_()
                if not above:
                    return "/" + "/".join(reversed(names))
                names.append(text(self.at.prog.read_c_string(node.name.value_(), max_size=_NAME)))
                node = above
        except FaultError:
            pass
        return None

    def _systemd_memfds(self) -> int | None:
        """The files of PID 1 that ``memfd_luo_can_preserve()`` takes, if that is systemd."""
        if not self.at.parts.memfds:
            return None
        prog = self.at.prog
        operations = prog["shmem_file_operations"].address_of_()
        count = 0
        try:
            init = find_task(prog, 1)
            if not init or init.comm.string_() != b"systemd":
                return None
            for _, file in islice(for_each_file(init), budget.HELD):
                count += file.f_op == operations and not file.f_inode.i_nlink
        except FaultError:
            return None
        return count

    def _booted(self) -> int | None:
        """``getboottime64()``, ns."""
        variable = self.at.parts.timekeeper
        if variable is None:
            return None
        found = self.at.prog[variable]
        try:
            keeper = (found[0] if variable == "timekeeper_data" else found).timekeeper
            booted: int = keeper.offs_real.value_() - keeper.offs_boot.value_()
        except FaultError:
            self.unread.append(f"when it booted ({variable})")
            return None
        return booted if booted >= 0 else None


def _joined(parts: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *parts])


def _processes_of(tasks: _Tasks, tables: U64) -> dict[int, list[int]]:
    """The ``tgid`` of each process that has a table, by table."""
    by = np.argsort(tasks.files)
    files = tasks.files[by]
    bounds = (np.searchsorted(files, tables, side) for side in ("left", "right"))
    return {
        table: np.unique(tasks.tgid[by[first:end]]).tolist()
        for table, first, end in zip(tables.tolist(), *bounds, strict=True)
    }


def _in_order(held: dict[_Thing, int]) -> list[Held]:
    """What a process holds, the device first, and how many descriptors it has for each."""
    each = (Held(session, retrieved, fds) for (session, retrieved), fds in held.items())
    return sorted(each, key=lambda held: (held.session or "", held.retrieved))


def _pieces(tables: _Tables, kept: NDArray[np.int64]) -> tuple[U64, U64, NDArray[np.int64]]:
    """
    The arrays of tables, in pieces of PIECE slots.

    :return: of each piece the table, its address, and how many slots it has.
    """
    at, fd = tables.at[kept], tables.fd[kept]
    slots = tables.max_fds[kept].astype(np.int64)
    pieces = -(-slots // PIECE)
    row = np.repeat(np.arange(len(at)), pieces)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * PIECE
    count = np.minimum(slots[row] - start, PIECE)
    return at[row], fd[row] + 8 * start.astype(np.uint64), count


def _counted(found: _Open) -> tuple[list[int], list[int], list[int]]:
    """Each table and file once, and how many descriptors lead from the one to the other."""
    pairs = np.stack([found.table, found.file], axis=1)
    each, count = np.unique(pairs, axis=0, return_counts=True)
    return each[:, 0].tolist(), each[:, 1].tolist(), count.tolist()
