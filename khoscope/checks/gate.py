# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about whether all are ready for a kexec that is about to come."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from ..facts import carried
from ..facts.clients import LuoSession
from ..facts.holders import INIT, by_thing
from ..facts.next_kernel import NextKernel
from ..facts.snapshot import Snapshot
from ..words.lists import listed
from .rule import Message, Severity, rule
from .sessions import named, units_of

#: Rules that close the gate though they are no errors: what they find is lost by a kexec, or keeps
#: it from coming.
CLOSING: Final = frozenset({"no-image", "orphaned-session", "scratch-too-small"})


class Question(StrEnum):
    """What has to be so."""

    KERNEL = "kernel"
    IMAGE = "image"
    SCRATCH = "scratch"
    SESSIONS = "sessions"
    SERVICES = "services"
    CARRIED = "carried"


def untold(facts: Snapshot, next_kernel: NextKernel | None) -> Iterator[tuple[Question, str]]:
    """What a gate has to know, and does not; and to which question that would be an answer."""
    # Of an image that is missing, no-image speaks.
    if next_kernel is None and (facts.image is None or facts.image.loaded):
        what = "whether the next kernel takes what is handed over is not known: name it (--next)"
        yield Question.IMAGE, what
    holders = facts.liveupdate.holders if facts.liveupdate is not None else None
    if facts.services is None and holders is not None and holders.systemd_memfds:
        what = "what systemd keeps for services is not known: only khoscope on that host asks PID 1"
        yield Question.SERVICES, what
    for what in facts.services.unread if facts.services is not None else ():
        yield Question.SERVICES, f"what systemd keeps for services may be missing: {what}"
    if not _sessions(facts):
        return
    if holders is None:
        yield Question.SESSIONS, "who holds the sessions was not looked at"
    elif _unheld(facts):
        for what in holders.unread:
            yield Question.SESSIONS, f"holders may be missing, as these cannot be read: {what}"
        if left_out := holders.left_out:
            what = f"holders may be missing: {left_out:,} descriptors were not looked at"
            yield Question.SESSIONS, what


@rule(
    "session-not-held",
    Severity.ERROR,
    "gate",
    """
    A session lives as long as its descriptor is open: luo_session_release() unpreserves all that is
    in it. Nobody has this one open, as far as the tables of file descriptors tell. It may be on its
    way from one process to another in a socket, and ends when that is closed. Look again; let
    somebody take it who lives until the kexec.
    """,
    kernel="luo_session_release luo_session_serialize",
)
def session_not_held(facts: Snapshot) -> Iterator[Message]:
    """A session that is to be handed over is held by nobody."""
    for session in _unheld(facts):
        yield Message(f"{named(session)} is held by nobody", units=units_of(session))


@rule(
    "session-not-kept",
    Severity.WARNING,
    "gate",
    """
    systemd ends all services on the way into its kexec, and with them the sessions that only they
    have open: luo_session_release() unpreserves all that is in them. `kexec -e` ends nobody. Let
    the service store the session's descriptor (FDSTORE=1 in sd_notify(3), with
    FileDescriptorStoreMax= and FileDescriptorStorePreserve=yes), or let its unit survive: [Unit]
    with DefaultDependencies=no, IgnoreOnIsolate=yes and SurviveFinalKillSignal=yes.
    """,
    kernel="luo_session_release",
)
def session_not_kept(facts: Snapshot) -> Iterator[Message]:
    """A session is held only by processes that systemd ends before its kexec."""
    holding, services = by_thing(facts.liveupdate), facts.services
    if holding is None or services is None or services.survivors is None:
        return
    staying = {INIT, *services.survivors}
    for session in _sessions(facts):
        held = holding[session.name, False]
        if held and not any(each.unit in staying for each in held):
            units = sorted({each.unit for each in held if each.unit})
            who = listed(units) or f"{held[0].process.comm} (pid {held[0].process.pid})"
            text = f"{named(session)} is held by {who} alone: systemctl kexec ends it"
            yield Message(text, units=(*units,))


@rule(
    "store-not-kept",
    Severity.WARNING,
    "gate",
    """
    systemd closes a service's stored descriptors when the service ends, unless its unit says
    FileDescriptorStorePreserve=yes; and it ends all services on the way into its kexec. Say so in
    the unit if the descriptors are to go along. khoscope luo lists all that systemd keeps.
    """,
    kernel="luo_preserve_file",
)
def store_not_kept(facts: Snapshot) -> Iterator[Message]:
    """systemd keeps descriptors for a service that it closes before its kexec."""
    for service in facts.services.stores if facts.services is not None else ():
        going = [each.name for each in service.going]
        if going and not service.hands_over:
            how = f"FileDescriptorStorePreserve={service.preserve}"
            text = f"{service.unit}: {listed(going)}: {how}, systemctl kexec closes them"
            yield Message(text, units=(service.unit,))


@rule(
    "nothing-carried",
    Severity.ERROR,
    "gate",
    """
    No snapshot of this kernel goes along, so that the next one has nothing to compare with: whether
    everything arrived could not be told. Start khoscope-carry.service, or run khoscope carry, and
    wait for its last line. Where a snapshot file does it, leave this check out (--skip).
    """,
    kernel="luo_preserve_file",
)
def nothing_carried(facts: Snapshot) -> Iterator[Message]:
    """khoscope carry does not run: no snapshot goes along."""
    luo = facts.outgoing.luo
    is_known = luo is None or luo.raw is None
    if is_known and carried.size_of_carried(facts.outgoing) is None:
        yield Message("no snapshot is carried to the next kernel")


def _sessions(facts: Snapshot) -> list[LuoSession]:
    return [] if facts.outgoing.luo is None else facts.outgoing.luo.sessions


def _unheld(facts: Snapshot) -> list[LuoSession]:
    """The outgoing sessions that nobody holds; empty if that was not looked at."""
    holding = by_thing(facts.liveupdate)
    if holding is None:
        return []
    return [each for each in _sessions(facts) if not holding[each.name, False]]
