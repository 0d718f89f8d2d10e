# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parse it, and run the command from :mod:`khoscope.commands`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from . import DRGN_COMMAND, __version__
from .commands import COMMANDS, IN_DRGN, arguments, describe
from .words.errors import KhoscopeError, not_whole, say
from .words.printable import printable
from .words.statuses import UNABLE

if TYPE_CHECKING:
    from _typeshed import SupportsWrite
    from drgn import Program


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if sys.stderr is None:
        # stderr is closed. Without this, a file that is opened later could get its number, and
        # other libraries would write their messages into that file.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it stays open
    if sys.stdout is None:
        say("cannot write: stdout is closed", "see where the output goes")
        return UNABLE
    try:
        with _signals():
            return perform(parser(), argv)
    except BrokenPipeError:
        return _die_of(signal.SIGPIPE)
    except KeyboardInterrupt:
        say("interrupted")
        return _die_of(signal.SIGINT)
    except Ended as ended:
        return _die_of(ended.number)
    except Exception:
        return _bug()
    finally:
        _settle()


class Ended(BaseException):
    """A signal has come that ends khoscope; open files are put in order on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """
    Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP raise :class:`Ended`.

    Signals that are ignored stay ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        # A second signal ends khoscope at once.
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: end, signal.SIGHUP: end}
    taken = [number for number in ours if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, ours[number])
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _bug() -> int:
    """Say where an unexpected exception came from."""
    # The last lines of a traceback may hold any text. The indent keeps them from looking like
    # khoscope's own lines.
    say(*(f"  {line}" for line in traceback.format_exc().splitlines()))
    say(
        "this is a bug in khoscope",
        f"please report it with the lines above; this is khoscope {__version__}",
    )
    return UNABLE


def _settle() -> None:
    """
    Flush the streams, and discard what cannot be written.

    Python would try again at exit, fail, and set an exit status of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: IO[str]) -> None:
    """Send what is still buffered nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def perform(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """
    Parse, and run the command.

    :return: the exit status; if the command failed, stderr already says why.
    :raises SystemExit: if argparse ends the program by itself, for usage errors and help.
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
        say(error.what, error.hint)
        return UNABLE
    except BrokenPipeError:
        raise
    except OSError as error:
        # Code that reads and writes files reports its own errors. This one is about stdout.
        say(f"cannot write: {error.strerror or error}", "see where the output goes")
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
        # The stream may belong to a drgn session, which goes on.
        out.reconfigure(errors=errors)


def _parse(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = top.parse_args(argv)
    if args.snapshot and args.type_shift is not None:
        top.error("--type-shift is for kernels: a snapshot's blocks are decoded already")
    if "refuse" in args and (reason := args.refuse(args)):
        top.error(reason)
    return args


def _die_of(number: signal.Signals) -> int:
    """End as the signal would have ended khoscope, so that a shell sees what happened."""
    _discard(sys.stdout)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return UNABLE


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with its own handling of usage errors and of help it cannot write."""

    def error(self, message: str) -> NoReturn:
        """Report a usage error; the words that the user typed may hold any character."""
        super().error(printable(message))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        is_data = file is sys.stdout
        if is_data:
            # If help cannot be written, khoscope reports that as for any other output.
            sys.stdout.write(message)
            sys.stdout.flush()
        else:
            super()._print_message(message, file)


class _Command(_Parser):
    """
    The parser of one command; it learns what the command takes as soon as it has to parse.

    :param command: the command's name.
    """

    def __init__(self, *, command: str, **more: Any) -> None:
        super().__init__(**more)
        self._unknown = command

    def describe(self) -> None:
        """Import the command, if that was not done yet."""
        if self._unknown:
            try:
                describe(self._unknown, self)
            except ImportError as error:
                raise not_whole(error) from error
            self._unknown = ""

    def parse_known_args(self, *words: Any, **more: Any) -> Any:
        self.describe()
        return super().parse_known_args(*words, **more)


def parser() -> argparse.ArgumentParser:
    """The options and commands."""
    top = _Parser(
        prog="khoscope",
        description="See what Kexec HandOver carries across a kexec, and check that it arrived.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  sudo khoscope status                        is KHO on, and what is there?
  sudo khoscope tree                          what this kernel would hand over
  sudo khoscope verify --next vmlinuz         is it safe to kexec into that?
  sudo khoscope carry &                       hand over a snapshot, then kexec
  sudo khoscope verify --before carried       did everything arrive?
  sudo khoscope snapshot before.khosnap       write it to a file instead
  sudo khoscope trace                         show calls of KHO as they happen
  khoscope --qemu guest.qmp --vmlinux vmlinux tree
  khoscope --core vmcore --vmlinux vmlinux verify

exit status: 0 fine, 1 verify or trace --check found an error, 2 khoscope could
not do it, 3 no verdict: khoscope found nothing wrong, but could not see
everything""",
    )
    source = top.add_mutually_exclusive_group()
    source.add_argument(
        "--live", action="store_true", help="read the running kernel, /proc/kcore (default)"
    )
    source.add_argument(
        "--qemu",
        metavar="SOCKET",
        type=arguments.given,
        help="read a QEMU guest through its QMP socket",
    )
    source.add_argument("--core", metavar="FILE", type=arguments.path, help="read a vmcore")
    source.add_argument(
        "--snapshot", metavar="FILE", type=arguments.path, help="read a .khosnap file"
    )
    top.add_argument(
        "--vmlinux", metavar="FILE", type=arguments.path, help="the kernel's debug info"
    )
    top.set_defaults(program=None)
    _add_commands(top, COMMANDS)
    return top


def parser_for(prog: Program) -> argparse.ArgumentParser:
    """The options and commands of ``%kho``, which looks at the program of a drgn session."""
    top = _Parser(
        prog=f"%{DRGN_COMMAND}",
        description="Run khoscope's commands on the program of this drgn session.",
        epilog="For more, see khoscope COMMAND --help and man khoscope.",
    )
    for option in ("--live", "--qemu", "--core", "--snapshot", "--vmlinux"):
        top.add_argument(option, action=_Refused, nargs=int(option != "--live"))
    top.set_defaults(program=prog)
    _add_commands(top, IN_DRGN)
    return top


class _Refused(argparse.Action):
    """An option that picks a source; `%kho` refuses it, because a session has a source."""

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


def _add_commands(top: argparse.ArgumentParser, commands: Mapping[str, str]) -> None:
    top.add_argument("--version", action="version", version=f"khoscope {__version__}")
    top.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print on stderr which debug info khoscope uses",
    )
    top.add_argument(
        "--type-shift",
        metavar="BIT",
        type=_type_shift,
        help="the key bit of the page type, or 'none'; overrides the debug info",
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    for name, what in commands.items():
        subparsers.add_parser(name, help=what, command=name)


def _type_shift(text: str) -> int:
    number = -1 if text == "none" else int(text)
    if text != "none" and not 0 <= number < 64:
        raise ValueError(text)
    return number
