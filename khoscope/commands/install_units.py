# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope install-units``: the units with which systemd runs khoscope around a kexec."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from ..facts.files import NewFile, open_file
from ..views.text import Text
from ..words.errors import KhoscopeError
from . import common

UNITS: Final = ("khoscope-carry.service", "khoscope-clients.target", "khoscope-verify.service")
#: Where Debian's node exporter looks for files (``--collector.textfile.directory``).
_TEXTFILES: Final = Path("/var/lib/prometheus/node-exporter")
_STATE: Final = Path("/var/lib/khoscope")
#: What a unit takes as it is: no quotes, no blanks, no specifiers.
_PLAIN: Final = re.compile(r"/[A-Za-z0-9/._@:+-]*")


def add(command: argparse.ArgumentParser) -> None:
    command.description = """\
Show the units with which systemd runs khoscope around a kexec, and, with
--write, put them into DIR:

  khoscope-carry.service    has a snapshot go along
  khoscope-verify.service   says in the next kernel whether all came: in the
                            journal, in systemctl --failed, and in FILE
  khoscope-clients.target   what khoscope-verify.service waits for: a service
                            that restores memory orders itself before it

Nothing is overwritten, enabled or started."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = """\
examples:
  khoscope install-units /etc/systemd/system            what would be written
  khoscope install-units --write /etc/systemd/system
  systemctl daemon-reload
  systemctl enable khoscope-carry khoscope-verify

exit status: 0 the units are there, or would be; 2 they are not, and none was
written"""
    command.set_defaults(run=_run)
    command.add_argument("directory", metavar="DIR", type=common.path, help="where units are")
    command.add_argument("--write", action="store_true", help="write them")
    command.add_argument(
        "--khoscope",
        metavar="PATH",
        type=common.path,
        help="the khoscope that they run (default: the one in PATH)",
    )
    command.add_argument(
        "--metrics",
        metavar="FILE",
        type=common.path,
        help=f"where the result goes for the node exporter (default: khoscope.prom in {_TEXTFILES} "
        f"if that is there, else in {_STATE})",
    )


@dataclass(frozen=True)
class _Unit:
    """
    A unit, and where it belongs.

    :param is_there: the file is there, with that text.
    """

    path: Path
    text: str
    is_there: bool


def _run(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.directory):
        raise KhoscopeError(
            f"{args.directory}: is not a directory", "name one of those in which systemd has units"
        )
    units = [*_units(args)]
    if args.write:
        _write([unit for unit in units if not unit.is_there])
    text = Text(sys.stdout)
    for unit in units:
        if not args.write:
            for line in unit.text.splitlines():
                text.line(line)
            text.line()
    for unit in units:
        done = "is there already" if unit.is_there else "written" if args.write else "not written"
        text.line(f"{unit.path}: {done}")
    if not args.write:
        text.line("nothing was written: --write does that")
    else:
        text.line(
            "next: systemctl daemon-reload && systemctl enable khoscope-carry khoscope-verify"
        )
    return common.FINE


def _write(units: list[_Unit]) -> None:
    """Write units: none gets its name before there is room for all."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(NewFile(unit.path, 0o644, replace=False)) for unit in units]
        for unit, new in zip(units, files, strict=True):
            new.telling.write(unit.text.encode())
            new.telling.flush()
        for new in files:
            new.finish()


def _units(args: argparse.Namespace) -> Iterator[_Unit]:
    """
    The units.

    :raises KhoscopeError: if one would overwrite another file.
    """
    metrics = args.metrics or (_TEXTFILES if _TEXTFILES.is_dir() else _STATE) / "khoscope.prom"
    templates = resources.files("khoscope") / "units"
    for name in UNITS:
        text = (templates / name).read_text()
        values = {
            "@HARDENING@": (templates / "hardening.conf").read_text().rstrip(),
            "@KHOSCOPE@": _plain(args.khoscope or _ours()),
            "@METRICS@": _plain(metrics),
            "@METRICS_DIRECTORY@": _plain(metrics.parent),
        }
        for mark, value in values.items():
            text = text.replace(mark, value)
        path = args.directory / name
        yield _Unit(path, text, _is_there(path, text))


def _ours() -> Path:
    found = shutil.which("khoscope")
    if found is None:
        raise KhoscopeError(
            "there is no khoscope in PATH", "name the one that units run: --khoscope"
        )
    return Path(found)


def _plain(path: Path) -> str:
    """
    A path as units have it.

    :raises KhoscopeError: if systemd would read something else in it.
    """
    if not _PLAIN.fullmatch(str(path)):
        raise KhoscopeError(
            f"{path}: not a path for a unit",
            "name an absolute path of letters, digits and the like",
        )
    return str(path)


def _is_there(path: Path, text: str) -> bool:
    if not os.path.lexists(path):
        return False
    hint = "nothing is overwritten: move it away, or name another directory"
    with open_file(path, hint) as file:
        if file.read(len(text.encode()) + 1) != text.encode():
            raise KhoscopeError(f"{path}: there is another file of that name", hint)
    return True
