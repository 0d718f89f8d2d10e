# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parse, and run what :mod:`khoscope.commands` has for it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from . import __version__
from .commands import COMMANDS, IN_DRGN
from .commands.common import UNABLE
from .errors import KhoscopeError

if TYPE_CHECKING:
    from drgn import Program


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        return perform(parser(), argv)
    except BrokenPipeError:
        return _die_of(signal.SIGPIPE)
    except KeyboardInterrupt:
        print("khoscope: interrupted", file=sys.stderr)
        return _die_of(signal.SIGINT)


def perform(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """
    Parse, and run the command.

    :return: the exit status; what could not be done has been said on stderr.
    :raises SystemExit: for what argparse does by itself: usage errors, and help.
    :raises BrokenPipeError: if nobody reads what is printed.
    """
    try:
        with _any_character(sys.stdout):
            args = _parse(top, argv)
            run: Callable[[argparse.Namespace], int] = args.run
            status = run(args)
            sys.stdout.flush()
            return status
    except KhoscopeError as error:
        print(f"khoscope: {error.what}\nkhoscope: {error.hint}", file=sys.stderr)
        return UNABLE
    except BrokenPipeError:
        raise
    except OSError as error:
        # What reads and writes files says so itself: this is what we print to.
        print(f"khoscope: cannot write: {error.strerror or error}", file=sys.stderr)
        print("khoscope: see where the output goes", file=sys.stderr)
        return UNABLE


@contextlib.contextmanager
def _any_character(out: IO[str]) -> Iterator[None]:
    """A terminal without Unicode gets an arrow as \\u2192, not a traceback."""
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    errors = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        # It may be a session's, which goes on.
        out.reconfigure(errors=errors)


def _parse(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = top.parse_args(argv)
    if args.snapshot and args.type_shift is not None:
        top.error("--type-shift is for kernels: a snapshot's blocks are decoded already")
    if "refuse" in args and (reason := args.refuse(args)):
        top.error(reason)
    return args


def _die_of(number: signal.Signals) -> int:
    """End as the signal would have ended us, so that a shell sees what happened."""
    # What is still buffered has nobody to go to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return UNABLE


def parser() -> argparse.ArgumentParser:
    """The options and commands."""
    top = argparse.ArgumentParser(
        prog="khoscope",
        description="See what Kexec HandOver carries across a kexec, and check that it arrived.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  sudo khoscope status                        is KHO on, and what is there?
  sudo khoscope tree                          what this kernel would hand over
  sudo khoscope verify --next vmlinuz         is it safe to kexec into that?
  sudo khoscope carry &                       hand a snapshot over, kexec, then
  sudo khoscope verify --before carried       did everything arrive?
  sudo khoscope snapshot before.khosnap       the same by a file
  sudo khoscope trace                         calls of KHO as they happen
  khoscope --qemu guest.qmp --vmlinux vmlinux tree
  khoscope --core vmcore --vmlinux vmlinux verify

exit status: 0 fine, 1 verify or trace --check found an error, 2 could not do it,
3 no verdict: nothing wrong was found, and not everything could be seen""",
    )
    source = top.add_mutually_exclusive_group()
    source.add_argument(
        "--live", action="store_true", help="the running kernel, /proc/kcore (default)"
    )
    source.add_argument("--qemu", metavar="SOCKET", help="a QEMU guest, by its QMP socket")
    source.add_argument("--core", metavar="FILE", type=Path, help="a vmcore")
    source.add_argument("--snapshot", metavar="FILE", type=Path, help="a .khosnap file")
    top.add_argument("--vmlinux", metavar="FILE", type=Path, help="debug info of the kernel")
    top.set_defaults(program=None)
    _add_commands(top, COMMANDS)
    return top


def parser_for(prog: Program) -> argparse.ArgumentParser:
    """The options and commands of ``%kho`` in a drgn session, which look at its program."""
    top = argparse.ArgumentParser(
        prog="%kho",
        description="khoscope's command line, on the program of this drgn session.",
        epilog="khoscope COMMAND --help and man khoscope tell more.",
    )
    for option in ("--live", "--qemu", "--core", "--snapshot", "--vmlinux"):
        top.add_argument(option, action=_Refused, nargs=int(option != "--live"))
    top.set_defaults(program=prog)
    _add_commands(top, IN_DRGN)
    return top


class _Refused(argparse.Action):
    """An option that picks a source: in a drgn session there is one."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more, help=argparse.SUPPRESS)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string}: {parser.prog} looks at the program of this drgn session")


def _add_commands(top: argparse.ArgumentParser, commands: Sequence[ModuleType]) -> None:
    top.add_argument("--version", action="version", version=f"khoscope {__version__}")
    top.add_argument(
        "-v", "--verbose", action="store_true", help="say on stderr what types are known by"
    )
    top.add_argument(
        "--type-shift",
        metavar="BIT",
        type=_type_shift,
        help="key bit of the page type, or 'none': overrides what debug info says",
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        command.add(subparsers)


def _type_shift(text: str) -> int:
    number = -1 if text == "none" else int(text)
    if text != "none" and not 0 <= number < 64:
        raise ValueError(text)
    return number
