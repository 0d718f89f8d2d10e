# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope carry``: hand a snapshot to the next kernel, in memory."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO

from ..carry.memfd import carry
from ..carry.systemd import notify
from ..views import carry as view
from ..views.progress import Progress
from ..views.text import Text
from ..words.errors import say
from . import common


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Write a snapshot into a memfd, ask LUO to preserve the memfd, and keep running
until the kexec. In the next kernel, `khoscope verify --before carried` reads
that snapshot. No disk is involved.

khoscope is read-only, with this one exception: carry creates a memfd and asks
the kernel to preserve it. carry needs /dev/liveupdate: a kernel with
CONFIG_LIVEUPDATE, booted with kho=on liveupdate=on."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = """\
examples:
  khoscope carry &                     wait for its last line
  kexec -e
  khoscope verify --before carried     in the next kernel

The LUO session ends when carry ends, and the snapshot is then not carried.
`kexec -e` ends no process. `systemctl kexec` ends every process except those of
a service whose [Unit] has DefaultDependencies=no, IgnoreOnIsolate=yes and
SurviveFinalKillSignal=yes."""
    command.set_defaults(run=_run, refuse=_refuse)
    command.add_argument("--json", action="store_true", help="one JSON document")


def _refuse(args: argparse.Namespace) -> str | None:
    if args.snapshot or args.qemu or args.core:
        return "carry takes its snapshot from the running kernel"
    return None


def _run(args: argparse.Namespace) -> int:
    try:
        with contextlib.ExitStack() as stack:
            with Progress(sys.stderr) as progress:
                source = common.kernel(args, progress)

                def take(file: IO[bytes]) -> None:
                    source.snapshot(file=file)

                carried = stack.enter_context(carry(take))
            stack.enter_context(_stoppable())
            if args.json:
                view.write_json(carried, sys.stdout)
            else:
                view.write_text(carried, Text(sys.stdout))
            sys.stdout.flush()
            notify("READY=1")
            while True:
                # Not signal.pause(): a signal just before it would wait for the next one.
                time.sleep(1)
    except _Stopped as stopped:
        say("nothing is carried any more")
        # Raise the signal again, now without our handler.
        signal.raise_signal(stopped.number)
    return common.FINE


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise :class:`_Stopped` once; an ignored signal stays ignored."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        raise _Stopped(number)

    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
