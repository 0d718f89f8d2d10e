# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about the sessions that LUO was handed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from ..facts import fd_stores
from ..facts.clients import Luo, LuoSession
from ..facts.snapshot import Snapshot
from .rule import Message, Severity, also, rule

#: What LUO says of a session that it cannot take, or cannot let go (luo_session.c).
_SAID: Final = re.compile(
    r"luo: (?:(?P<unread>Failed to (?:allocate|insert|deserialize files for) session)"
    r"|Unable to finish session) \[(?P<name>.*)\]"
)

#: How many units are named.
_UNITS: Final = 3

#: What happens to a session of which a file is missing.
_HALF_READ = """
    luo_session_deserialize() came upon a file for which no handler was registered, or ran out of
    memory. A kernel that minds fails every open of /dev/liveupdate with EIO from then on, and no
    session comes back. Another one hands out the session as if nothing were missing. What the
    missing files hold stays reserved until the next boot, and is lost then. Boot a kernel that has
    the handlers of all files; load modules with handlers before anything opens /dev/liveupdate.
    """
_SYSTEMDS = """
    systemd keeps what its services have stored (FileDescriptorStorePreserve=) in this session, and
    retrieves it as soon as it is started, from version 261 on and with /dev/liveupdate there. What
    runs as PID 1 here has not. What the services had stored stays reserved until the next boot, and
    is lost then. Boot a root whose systemd knows LUO.
    """
_UNFINISHED = """
    The process that had retrieved the session closed it, and a file's handler refused to finish
    (can_finish()). luo_session_release() leaves such a session on the list as retrieved: nobody can
    retrieve it again, and nobody can finish it. Its files and their memory stay until the next
    boot. Let a program finish its session (LIVEUPDATE_SESSION_FINISH) and look at the result before
    it closes the descriptor.
    """
_OFF = """
    Without liveupdate=on there is no /dev/liveupdate, so nobody can retrieve what the kernel before
    this one has handed over. It stays reserved until the next boot, and is lost then. Boot with
    liveupdate=on on the command line of every kernel that a session is handed to.
    """


@rule(
    "orphaned-session",
    Severity.WARNING,
    "kernel",
    """
    A session that this kernel was handed is there until somebody retrieves and finishes it. Its
    memory stays reserved until then. LUO hands over only sessions that were created in this
    kernel: a kexec loses this one, with all that its files hold. Retrieve it by its name and finish
    it, or find out which program has not come back for it. Then preserve its files anew, in a new
    session.
    """,
    kernel="luo_session_deserialize luo_session_retrieve luo_session_release luo_session_serialize",
)
def orphaned_session(facts: Snapshot) -> Iterator[Message]:
    """A session that this kernel was handed is nobody's: nobody has retrieved it, or nobody can."""
    yield from nobodys(facts).values()


@also("orphaned-session", "kexec")
def not_retrieved(facts: Snapshot) -> Iterator[Message]:
    """Nobody has retrieved a session, and a kexec is to come."""
    told = nobodys(facts)
    for session in _sessions(facts):
        if not session.retrieved and session.name not in told:
            explain = _SYSTEMDS if session.name == fd_stores.SESSION else ""
            what = f"{named(session)} was handed over, and nobody has retrieved it"
            yield Message(what, explain=explain, units=units_of(session))


def nobodys(facts: Snapshot) -> dict[str, Message]:
    """What there is to say of each session that nobody can retrieve, or get whole; by name."""
    luo = facts.incoming.luo if facts.incoming is not None else None
    if luo is None:
        return {}
    if facts.liveupdate is not None and not facts.liveupdate.enabled:
        why = "cannot be retrieved: LUO is off in this kernel"
        return {
            each.name: Message(f"{named(each)} {why}", explain=_OFF, units=units_of(each))
            for each in luo.sessions
        }
    unread, unfinished = _said(facts)
    found: dict[str, Message] = {}
    for session in luo.sessions:
        name, there = session.name, files_that_came(luo, session)
        if luo.live and session.retrieved is None:
            why, explain = "the kernel gave up before it came to this one", _HALF_READ
        elif there < session.count:
            some = f"only {there:,}" if there else "none"
            why, explain = f"the kernel has {some} of them", _HALF_READ
        elif name in unread:
            why, explain = f"the log says: {unread[name]}", _HALF_READ
        elif name in unfinished and session.retrieved:
            why, explain = "it was closed, and could not be finished", _UNFINISHED
        else:
            continue
        text = f"{named(session)}: {why}"
        found[name] = Message(text, explain=explain, units=units_of(session))
    return found


def files_that_came(luo: Luo, session: LuoSession) -> int:
    """
    How many files of an incoming session the kernel has.

    Up to linux 7.1, a session that has lost files on the way still counts them.
    """
    # What khoscope has left out of a long list is there.
    there = len(session.files) + session.left_out
    return min(session.count, there) if luo.live else session.count


def units_of(session: LuoSession) -> tuple[str, ...]:
    """The units for which systemd keeps a session, or files in it."""
    stored = {file.stored.unit for file in session.files if file.stored}
    if session.stored is not None:
        stored.add(session.stored.unit)
    return tuple(sorted(stored))


def named(session: LuoSession) -> str:
    """A session, for people."""
    files = "1 file" if session.count == 1 else f"{session.count:,} files"
    if units := sorted({file.stored.unit for file in session.files if file.stored}):
        files += f" of {', '.join(units[:_UNITS])}{', …' if units[_UNITS:] else ''}"
    return f"{session} ({files})"


def _sessions(facts: Snapshot) -> list[LuoSession]:
    luo = facts.incoming.luo if facts.incoming is not None else None
    return [] if luo is None else luo.sessions


def _said(facts: Snapshot) -> tuple[dict[str, str], set[str]]:
    """
    What the log says: the lines about sessions that LUO could not read, by their names; and the
    names of those that it could not finish.
    """
    unread: dict[str, str] = {}
    unfinished: set[str] = set()
    for line in facts.kernel.log:
        found = _SAID.search(line)
        if found and found["unread"]:
            unread[found["name"]] = line
        elif found:
            unfinished.add(found["name"])
    return unread, unfinished
