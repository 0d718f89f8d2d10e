# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope trace`` in a guest, beside what the guest is told to do."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from vm.job import Job
from vm.machine import Machine

#: Compiling under TCG takes half a minute, several times that on a busy host.
START_TIMEOUT = 400.0


class Trace(Job):
    """
    A trace that has been started, and follows calls from ``with`` on until it is ended.

    Its views say at once what is attached, but for ``--jsonl``: that it prints is the sign that it
    is on.

    :param name: of its directory in the guest, /root/trace-NAME, which must be new.
    :param options: of ``khoscope trace``.
    :param command: what to run instead, if it says something when it is on, too.
    """

    def __init__(
        self,
        machine: Machine,
        name: str,
        *options: str,
        command: tuple[str, ...] = ("khoscope", "trace"),
    ) -> None:
        super().__init__(machine, f"/root/trace-{name}", (*command, *options))

    def __enter__(self) -> Self:
        """:raise MachineError: it has ended instead."""
        self.until_on(START_TIMEOUT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.status is None:
            self.end()
