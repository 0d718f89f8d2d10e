# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What systemd keeps for services, as PID 1 says: before a kexec it is in no session yet, and after it
LUO has given it away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

#: How ``/proc/PID/fd`` names a session (``luo_session_getfile()``), and memfds: those that LUO has
#: given back have no name.
_SESSION: Final = "anon_inode:[luo_session] "
_MEMFDS: Final = ("/memfd:", "/ (deleted)")


@dataclass(frozen=True, slots=True)
class KeptFd:
    """
    A descriptor in the store of a service.

    :param name: as the service calls it (``FDNAME=``); several may have the same.
    :param path: what the kernel calls the file (``/proc/PID/fd``).
    :param inode: its number.
    """

    name: str
    path: str
    inode: int

    @property
    def session(self) -> str | None:
        """The LUO session that it is; None: it is none."""
        found = self.path.removeprefix(_SESSION)
        return found if found != self.path else None

    @property
    def can_go_along(self) -> bool:
        """Whether it is of a kind that systemd hands over: a LUO session, or a memfd."""
        return self.session is not None or self.path.startswith(_MEMFDS)


@dataclass(frozen=True, slots=True)
class Service:
    """
    A service that may store descriptors (``FileDescriptorStoreMax=``).

    :param state: ``ActiveState`` and ``SubState``, as in ``active (running)``; of a unit that is
        not loaded ``LoadState``, as in ``not-found``: systemd goes on keeping what is in its store.
    :param is_up: it is active, or is just being started.
    :param preserve: ``FileDescriptorStorePreserve``: ``yes``, ``no`` or ``restart``.
    :param kept: what is in its store; None: PID 1 did not say.
    :param given: names of the descriptors that its main process was started with
        (``LISTEN_FDNAMES``); None: not known.
    :param unnamed: how many descriptors are in the store of a unit that is not loaded: PID 1 says
        no more of them.
    """

    unit: str
    state: str
    is_up: bool
    preserve: str
    kept: list[KeptFd] | None = None
    given: list[str] | None = None
    unnamed: int = 0

    @property
    def going(self) -> list[KeptFd]:
        """What is in its store that a kexec can hand over."""
        return [fd for fd in self.kept or () if fd.can_go_along]

    @property
    def hands_over(self) -> bool:
        """Whether systemd hands that over, rather than closes it when the service ends."""
        return self.preserve == "yes"


@dataclass(frozen=True, slots=True)
class Services:
    """
    Services, as far as a live update concerns them.

    :param stores: those that may store descriptors, by name.
    :param survivors: units whose processes systemd does not end on the way into a kexec
        (``SurviveFinalKillSignal=yes``); None: not known.
    :param unread: what PID 1 did not say, in words.
    :param is_whole: no service is missing in ``stores``.
    """

    stores: list[Service] = field(default_factory=list)
    survivors: list[str] | None = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    is_whole: bool = True

    @property
    def handed_over(self) -> list[Service]:
        """Those for which systemd keeps what it hands over when it is told to kexec."""
        return [each for each in self.stores if each.hands_over and each.going]
