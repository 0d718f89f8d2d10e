# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope carry``: hand a snapshot to the next kernel, in memory."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from ..carry.memfd import carry
from ..views import carry as view
from ..views.progress import Progress
from ..views.text import Text
from ..words.errors import say
from . import common


def add(commands: common.Commands) -> None:
    command = commands.add_parser(
        "carry",
        help="hand a snapshot to the next kernel, in memory",
        description="""\
Take a snapshot into a memfd, have LUO preserve that, and stay until the kexec.
After it, `khoscope verify --before carried` has the snapshot, without any disk.

All other commands only read. This one has the kernel preserve one memfd of its
own. It needs /dev/liveupdate: CONFIG_LIVEUPDATE, and kho=on liveupdate=on.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  khoscope carry &                     wait for what it prints, then
  kexec -e                             and in the next kernel
  khoscope verify --before carried

The session lives as long as khoscope does. `kexec -e` ends no process;
`systemctl kexec` ends all, but for a service that has DefaultDependencies=no
and SurviveFinalKillSignal=yes.""",
    )
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
                carried = stack.enter_context(carry(source.snapshot))
            stack.enter_context(_stoppable())
            if args.json:
                view.write_json(carried, sys.stdout)
            else:
                view.write_text(carried, Text(sys.stdout))
            sys.stdout.flush()
            while True:
                signal.pause()
    except _Stopped as stopped:
        say("nothing is carried any more")
        # Once more, without us in between.
        signal.raise_signal(stopped.number)
    return common.FINE


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise :class:`_Stopped`, once; a SIGTERM that is ignored stays so."""
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
