# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope trace`` in a guest, beside what the guest is told to do."""

from __future__ import annotations

import shlex
from types import TracebackType
from typing import Self

from vm.machine import Machine, MachineError, Result

#: Compiling under TCG takes half a minute, several times that on a busy host.
START_TIMEOUT = 400.0
END_TIMEOUT = 300.0

# Job control, so that SIGINT is not ignored.
_START = """
directory=$1; shift
mkdir "$directory" && cd "$directory" || exit
set -m
(
    "$@" >out 2>err &
    echo $! >pid
    wait $!
    echo $? >status.new
    mv status.new status
) </dev/null >/dev/null 2>&1 &
until [ -s pid ]; do sleep 0.1; done
"""

_UNTIL_ON = "until [ -s out ] || [ -e status ]; do sleep 0.2; done; [ ! -e status ]"
_UNTIL_ENDED = "until [ -e status ]; do sleep 0.2; done; cat status"


class Trace:
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
        self.machine = machine
        self.directory = f"/root/trace-{name}"
        self.words = (*command, *options)
        #: The exit status, when it has ended: 128 + N if signal N has killed it.
        self.status: int | None = None
        machine.run(("bash", "-c", _START, "bash", self.directory, *self.words), check=True)

    def __enter__(self) -> Self:
        """:raise MachineError: it has ended instead."""
        if self._shell(_UNTIL_ON, START_TIMEOUT).returncode:
            raise MachineError(f"{shlex.join(self.words)} is not on:\n{self.errors()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.status is None:
            self.end()

    def end(self, signal: str = "INT") -> int:
        """Sends it a signal and waits until it has ended; returns its exit status."""
        self.machine.run(f"kill -{signal} $(cat {self.directory}/pid)", check=True)
        return self.wait()

    def wait(self) -> int:
        """Waits until it has ended by itself; returns its exit status."""
        self.status = int(self._shell(_UNTIL_ENDED, END_TIMEOUT).stdout)
        return self.status

    def output(self) -> str:
        """What it has printed."""
        return self._shell("cat out").stdout

    def errors(self) -> str:
        """What it has printed to stderr."""
        return self._shell("cat err").stdout

    def _shell(self, script: str, timeout: float = 60.0) -> Result:
        return self.machine.run(f"cd {self.directory} && {{ {script}; }}", timeout=timeout)
