# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that runs in a guest in the background, beside other commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vm.machine import Machine, MachineError, Result

# A shell makes background commands ignore SIGINT and SIGQUIT; env sets the default again.
_START = """
directory=$1; shift
mkdir "$directory" && cd "$directory" || exit
(
    env --default-signal=INT,QUIT "$@" >out 2>err &
    echo $! >pid
    wait $!
    echo $? >status.new
    mv status.new status
) </dev/null >/dev/null 2>&1 &
until [ -s pid ]; do sleep 0.1; done
"""

_UNTIL_ON = "until [ -s out ] || [ -e status ]; do sleep 0.2; done; [ ! -e status ]"
_UNTIL_ENDED = "until [ -e status ]; do sleep 0.2; done; cat status"


class Job:
    """
    A program that has been started. It counts as on as soon as it prints something.

    :param directory: a new directory in the guest, for the program's output.
    :param words: the command to run.
    """

    def __init__(self, machine: Machine, directory: str, words: Sequence[str]) -> None:
        self.machine = machine
        self.directory = directory
        self.words = tuple(words)
        #: The exit status once the program has ended: 128 + N if signal N killed it.
        self.status: int | None = None
        machine.run(("bash", "-c", _START, "bash", directory, *words), check=True)

    def until_on(self, timeout: float) -> None:
        """Waits until the program is on.

        :raise MachineError: if the program ends instead
        """
        if self._shell(_UNTIL_ON, timeout).returncode:
            raise MachineError(f"{shlex.join(self.words)} is not on:\n{self.errors()}")

    @property
    def pid(self) -> int:
        """The program's process, in the guest."""
        return int(self._shell("cat pid").stdout)

    def end(self, signal: str = "INT", *, timeout: float = 300.0) -> int:
        """Sends the program a signal, waits until it has ended, and returns its exit status."""
        self.machine.run(f"kill -{signal} $(cat {self.directory}/pid)", check=True)
        return self.wait(timeout=timeout)

    def wait(self, *, timeout: float = 300.0) -> int:
        """Waits until the program has ended by itself, and returns its exit status."""
        self.status = int(self._shell(_UNTIL_ENDED, timeout).stdout)
        return self.status

    def output(self) -> str:
        """What the program has printed."""
        return self._shell("cat out").stdout

    def errors(self) -> str:
        """What the program has printed to stderr."""
        return self._shell("cat err").stdout

    def _shell(self, script: str, timeout: float = 60.0) -> Result:
        return self.machine.run(f"cd {self.directory} && {{ {script}; }}", timeout=timeout)
