# SPDX-License-Identifier: LGPL-2.1-or-later
"""What commands share: options, the kernel or file that they read, and exit statuses."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..facts import store
from ..facts.files import NewFile
from ..facts.snapshot import Snapshot
from ..views.progress import Progress, followed
from ..views.text import LIMIT
from ..words.errors import KhoscopeError, say
from ..words.statuses import FINE as FINE
from ..words.statuses import FOUND as FOUND
from ..words.statuses import NO_VERDICT as NO_VERDICT
from ..words.statuses import UNABLE as UNABLE
from .arguments import given as given
from .arguments import path as path

if TYPE_CHECKING:
    from drgn import Program

    from ..checks import Report
    from ..sources.kernel import KernelSource

T = TypeVar("T")

#: What is done with the blocks of a snapshot.
READ_BACK = "going through blocks"

#: This word stands for the carried snapshot after --before. A file of that name is ``./carried``.
CARRIED = "carried"


def output(
    command: argparse.ArgumentParser, lines: str | None = None
) -> argparse._MutuallyExclusiveGroup:
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="one JSON document")
    if lines:
        kind.add_argument("--jsonl", action="store_true", help=f"one JSON object per {lines}")
    command.add_argument(
        "--limit",
        type=_limit,
        default=LIMIT,
        metavar="N",
        help=f"show at most N rows of each list as text, 0 for all (default {LIMIT})",
    )
    return kind


def _limit(text: str) -> int | None:
    number = int(text)
    # Python's lists cannot be longer.
    if not 0 <= number < 1 << 63:
        raise ValueError(text)
    return number or None


def judged(report: Report) -> int:
    """The exit status for a report's verdict."""
    from ..checks import Verdict

    statuses = {Verdict.PASS: FINE, Verdict.FAIL: FOUND, Verdict.INCOMPLETE: NO_VERDICT}
    return statuses[report.verdict]


def before_option(command: argparse.ArgumentParser, help: str) -> None:
    """Add ``--before FILE``, where FILE may be the snapshot that ``khoscope carry`` handed over."""
    command.add_argument(
        "--before",
        metavar="FILE",
        type=given,
        help=f"{help}; {CARRIED!r} means the snapshot that khoscope carry handed over",
    )


def load_before(args: argparse.Namespace) -> Snapshot | None:
    """The snapshot that ``--before`` names, or None if the option was not given."""
    if args.before is None:
        return None
    if args.before != CARRIED:
        return store.load_file(Path(args.before))
    from ..carry.memfd import retrieve
    from ..sources.open import is_this_host

    if args.qemu or args.core or (args.program and not is_this_host(args.program)):
        raise KhoscopeError(
            "--before carried is what this host was handed, not that guest or vmcore",
            "name a snapshot file of the kernel that handed over to it",
        )
    try:
        return store.load_file(retrieve())
    except KhoscopeError:
        _require_kho(args)
        raise


def _require_kho(args: argparse.Namespace) -> None:
    """
    If KHO is off, say so: it says more than that there is nothing to be had from LUO.

    :raises KhoscopeError: if it is off; a kernel that cannot be read may have it.
    """
    try:
        source = kernel(args, Progress(io.StringIO()))
    except KhoscopeError:
        return
    if not source.has_kho():
        source.tree()


def address(text: str) -> int:
    """An address, in hex or decimal."""
    number = int(text, 0)
    if not 0 <= number < 1 << 64:
        raise ValueError(text)
    return number


def physical_range(text: str) -> tuple[int, int]:
    """``ADDR[..END]``, physical."""
    first, dots, end = text.partition("..")
    start = int(first, 0)
    stop = int(end, 0) if dots else start + 1
    if not 0 <= start < stop <= 1 << 64:
        raise ValueError(text)
    return start, stop


def write_readable(path: Path, text: str) -> None:
    """Write a small ASCII file that everybody may read, all at once."""
    with NewFile(path, 0o644) as new:
        new.telling.write(text.encode("ascii"))
        new.finish()


def is_file(args: argparse.Namespace) -> bool:
    """Whether the source is a file, a snapshot or a vmcore, and cannot change."""
    if args.program is None:
        return bool(args.snapshot or args.core)
    from drgn import ProgramFlags

    return not args.program.flags & ProgramFlags.IS_LIVE


def _program(args: argparse.Namespace) -> tuple[Program, str, bool]:
    """The kernel that was asked for, how khoscope reads it, and whether it runs meanwhile."""
    from ..sources.open import LIVE, debug_info, how_it_is_read, open_core, open_live, open_qemu

    if args.program:
        opened = args.program, *how_it_is_read(args.program)
    elif args.qemu:
        opened = open_qemu(args.qemu, args.vmlinux), f"QEMU guest at {args.qemu}", True
    elif args.core:
        opened = open_core(args.core, args.vmlinux), f"vmcore {args.core}", False
    else:
        opened = open_live(args.vmlinux), LIVE, True
    if args.verbose:
        say(f"types: {debug_info(opened[0])}")
    return opened


def kernel(args: argparse.Namespace, progress: Progress) -> KernelSource:
    """The kernel that was asked for."""
    from ..sources.kernel import KernelSource, Overrides

    return KernelSource(*_program(args), Overrides(args.type_shift), progress)


def used(
    args: argparse.Namespace,
    use: Callable[[Snapshot], T],
    read: Callable[[KernelSource], tuple[Snapshot, T]],
) -> tuple[Snapshot, T]:
    """
    The facts of the snapshot file or kernel that was asked for, and what ``use`` makes of them.

    :param read: has a kernel's facts used while they are read, as :meth:`KernelSource.judge` does.
    """
    with Progress(sys.stderr) as progress:
        if args.snapshot:
            found = store.load_file(args.snapshot)
            return found, use(followed(found, progress, READ_BACK))
        return read(kernel(args, progress))


def facts(args: argparse.Namespace, read: Callable[[KernelSource], Snapshot]) -> Snapshot:
    """
    Load the snapshot file that was asked for, or read the facts from the kernel.

    :param read: reads as much of the kernel as the command shows.
    """
    if args.snapshot:
        return store.load_file(args.snapshot)
    with Progress(sys.stderr) as progress:
        return read(kernel(args, progress))
