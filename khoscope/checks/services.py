# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules about what systemd has kept for services, across a kexec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..facts.services import Service, Services
from ..facts.snapshot import Snapshot
from ..words.lists import listed
from .rule import Message, Severity, rule


@dataclass(frozen=True)
class Came:
    """
    What became of a service's store.

    :param names: of the descriptors that systemd was to hand over.
    :param lost: those that are not there any more, and were not given to the service.
    :param waiting: those that are there, and that the service was not started with.
    :param now: the service as it is; None: PID 1 knows of no such store.
    """

    unit: str
    names: list[str]
    lost: list[str]
    waiting: list[str]
    now: Service | None

    @property
    def back(self) -> list[str]:
        """The names of those that came."""
        return sorted((Counter(self.names) - Counter(self.lost)).elements())

    @property
    def in_words(self) -> str:
        """What became of them, and how the service is."""
        parts = (
            (self.back, "came back"),
            (self.waiting, "not taken yet"),
            (self.lost, "did not come back"),
        )
        told = [f"{listed(names)} {what}" for names, what in parts if names]
        return "; ".join([*told, self.how])

    @property
    def how(self) -> str:
        """How the service is, in words."""
        if self.now is None:
            return "there is no such service, or it may store nothing"
        return f"it is {self.now.state}"


def came_back(before: Snapshot, after: Snapshot) -> list[Came] | None:
    """
    What came back to each service that had stored something; None: PID 1 was not asked, then or
    now.  A service is left out if PID 1 did not say.

    A service that has removed a descriptor from its store was started with it.
    """
    if before.services is None or after.services is None:
        return None
    now = {service.unit: service for service in after.services.stores}
    found = []
    for was in before.services.handed_over:
        service = now.get(was.unit)
        if not _is_known(was, after.services, service):
            continue
        names = Counter(each.name for each in was.going)
        kept = Counter(each.name for each in (service and service.kept) or ())
        if service is not None and service.kept is None:
            kept = names
        given = Counter((service and service.given) or ())
        lost = names - (kept | given)
        waiting = names & (kept - given)
        # Where nobody can look at what a process was started with, one that is up has taken all.
        if service is not None and service.given is None and service.is_up:
            waiting.clear()
        came, missing, left = (sorted(each.elements()) for each in (names, lost, waiting))
        found.append(Came(was.unit, came, missing, left, service))
    return found


def untold(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """Of which services it is not known what came back to them."""
    if before.services is None:
        return
    silent = [s.unit for s in before.services.stores if s.hands_over and s.kept is None]
    if silent:
        yield f"the earlier snapshot: what systemd kept for {listed(silent)} is not known"
    stored = before.services.handed_over
    if after.services is None:
        if stored:
            yield f"what came back to {listed([each.unit for each in stored])}: PID 1 was not asked"
        return
    now = {service.unit: service for service in after.services.stores}
    lacking = [s.unit for s in stored if not _is_known(s, after.services, now.get(s.unit))]
    if lacking:
        why = "".join(f" ({what})" for what in after.services.unread[:1])
        yield f"what came back to {listed(lacking)}: PID 1 did not say{why}"


def _is_known(was: Service, services: Services, service: Service | None) -> bool:
    """
    Whether PID 1 has said what is in a service's store, or that it is no less than it was.

    :param service: None: it is not among those that may store something.
    """
    if service is None:
        return services.is_whole
    return service.kept is not None or service.unnamed >= len(was.kept or ())


@rule(
    "stored-fd-lost",
    Severity.ERROR,
    "handover",
    """
    systemd kept this descriptor for the service, and was to hand it over: a memfd, or a LUO
    session, of a unit with FileDescriptorStorePreserve=yes. It is not in the service's store, and
    the service was not started with it. systemd hands stores over on systemctl kexec alone, and
    takes them back where both kernels have liveupdate=on; it closes what belongs to a unit that may
    store nothing any more (FileDescriptorStoreMax=). The journal of this boot, and the end of that
    of the boot before, say what it did. If the service has removed it itself since
    the snapshot was taken, nothing is lost.
    """,
    kernel="luo_session_serialize luo_session_retrieve",
)
def stored_fd_lost(before: Snapshot, after: Snapshot) -> Iterator[Message]:
    """A descriptor that systemd kept for a service did not come back."""
    for each in came_back(before, after) or ():
        if each.lost:
            text = f"{each.unit}: {listed(each.lost)} did not come back; {each.how}"
            yield Message(text, units=(each.unit,))


@rule(
    "stored-fd-waits",
    Severity.WARNING,
    "handover",
    """
    The descriptor came, and is in the service's store; the service has not been started with it.
    systemd keeps it as long as the unit is there. Start the service, or find out why it did not
    start.
    """,
    kernel="luo_session_retrieve",
)
def stored_fd_waits(before: Snapshot, after: Snapshot) -> Iterator[Message]:
    """A service has not taken back a descriptor that systemd keeps for it."""
    for each in came_back(before, after) or ():
        if each.waiting:
            text = f"{each.unit} has not taken {listed(each.waiting)}; {each.how}"
            yield Message(text, units=(each.unit,))
