# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope trace`` in the background of a guest, beside other commands."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from vm.job import Job
from vm.machine import Machine

#: Seconds. Compiling under TCG takes half a minute, or several times that on a busy host.
START_TIMEOUT = 400.0


class Trace(Job):
    """
    A trace that has been started. It follows calls from the start of ``with`` until it is ended.

    A trace counts as on as soon as it prints something. All views but ``--jsonl`` print at once
    what is attached.

    :param name: the trace's new directory in the guest is /root/trace-NAME.
    :param options: options of ``khoscope trace``.
    :param command: what to run instead; it must print something as soon as it is on.
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
        """Waits until the trace is on.

        :raise MachineError: if the trace ends instead
        """
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
