# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope luo``: sessions and files of the Live Update Orchestrator, and what is in a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

from ..facts import store
from ..facts.clients import Content, LuoFile, LuoSession
from ..facts.files import NewFile
from ..facts.snapshot import Snapshot
from ..views import luo as view
from ..views.content import for_stdout, write_content
from ..views.progress import Progress
from ..words.errors import KhoscopeError, say
from . import common


def add(luo: argparse.ArgumentParser) -> None:
    luo.set_defaults(run=_run, refuse=_refuse)
    kind = common.output(luo)
    kind.add_argument(
        "--content",
        metavar="FILE",
        type=common.given,
        help="write what is in a preserved memfd: its token, or 'UNIT FDNAME' of a service's",
    )
    luo.add_argument(
        "--session", metavar="NAME", type=common.given, help="of the session with this name"
    )
    luo.add_argument(
        "--incoming",
        action="store_true",
        help="of what this kernel was handed, not of what it hands on",
    )
    luo.add_argument(
        "--output", metavar="FILE", type=common.path, help="write it there, not to stdout"
    )


def _refuse(args: argparse.Namespace) -> str | None:
    if args.content is None and (args.session or args.incoming or args.output):
        return "--session, --incoming and --output go with --content"
    return None


def _run(args: argparse.Namespace) -> int:
    if args.content is not None:
        return _content(args)
    facts = common.facts(args, lambda source: source.luo())
    _require_luo(facts)
    if args.json:
        view.write_json(facts, sys.stdout)
    else:
        view.LuoText(sys.stdout, args.limit).luo(facts)
    return common.FINE


def _require_luo(facts: Snapshot) -> None:
    if facts.liveupdate is None:
        raise KhoscopeError(
            "there is no live update in this kernel (no luo_global in its debug info)",
            "use a kernel with CONFIG_LIVEUPDATE=y, booted with liveupdate=on",
        )


@dataclass(frozen=True)
class _Found:
    session: LuoSession
    file: LuoFile
    incoming: bool

    def __str__(self) -> str:
        side = "incoming" if self.incoming else "outgoing"
        return f"{self.file} of session {self.session.name}, {side}"

    def content(self, facts: Snapshot) -> Content:
        """
        What is in it.

        :raises KhoscopeError: if that is not among the facts.
        """
        where = self.incoming, self.session.name, self.file.token
        for content in facts.contents:
            if (content.incoming, content.session, content.token) == where:
                return content
        if self.file.memfd is None:
            raise KhoscopeError(
                f"{self}: there is no memfd any more (handler {self.file.handler})"
                if self.file.retrieve_status
                else f"{self}: it is no memfd that can be read (handler {self.file.handler})",
                "khoscope luo says what is known of it",
            )
        raise KhoscopeError(
            f"{self}: the snapshot does not have what is in files",
            "take it with --with-content",
        )


def _content(args: argparse.Namespace) -> int:
    """Write what is in a file."""
    with Progress(sys.stderr) as progress:
        read = (
            partial(store.load_file, args.snapshot)
            if args.snapshot
            else common.kernel(args, progress).clients
        )
        facts = read()
        _require_luo(facts)
        found = _the_file(facts, args)
        content = found.content(facts)

        def write(content: Content, to: IO[bytes]) -> int:
            missing = write_content(content, to)
            if not common.is_file(args):
                _require_still_there(found, read())
            return missing

        if args.output is not None:
            with NewFile(args.output) as new:
                missing = write(content, new.telling)
                new.finish()
        else:
            missing = write(for_stdout(content, str(found)), sys.stdout.buffer)
            sys.stdout.buffer.flush()
    if missing:
        say(f"{found}: {missing:,} of {content.size:,} bytes cannot be read: zeros, or left out")
        return common.NO_VERDICT
    return common.FINE


def _the_file(facts: Snapshot, args: argparse.Namespace) -> _Found:
    """The only file that fits."""
    every = [
        found
        for found in _named(facts, args.content)
        if args.session in (None, found.session.name) and found.incoming >= args.incoming
    ]
    if not every:
        raise KhoscopeError(
            f"no session has such a file: {args.content}",
            "khoscope luo shows the sessions and their files",
        )
    if len(every) > 1:
        raise KhoscopeError(
            f"there are several: {'; '.join(map(str, every[:4]))}{'; …' if every[4:] else ''}",
            "say which one with --session NAME, or --incoming",
        )
    return every[0]


def _named(facts: Snapshot, name: str) -> Iterator[_Found]:
    """:param name: a token, or the unit and the name that it is stored by."""
    try:
        token: int | None = int(name, 0)
    except ValueError:
        token = None
    for side in filter(None, (facts.outgoing, facts.incoming)):
        for session in side.luo.sessions if side.luo is not None else []:
            for file in session.files:
                if file.token == token or (file.stored is not None and str(file.stored) == name):
                    yield _Found(session, file, side is facts.incoming)


def _require_still_there(found: _Found, now: Snapshot) -> None:
    """Memory of a session that has ended meanwhile belongs to others."""
    where = found.incoming, found.session.name, found.file.data
    every = _named(now, f"{found.file.token:#x}")
    if where not in [(each.incoming, each.session.name, each.file.data) for each in every]:
        raise KhoscopeError(
            f"{found}: it went away while it was read",
            "what was written is of no use",
        )
