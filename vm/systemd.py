# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A guest whose PID 1 is systemd, and services in it that have systemd keep their files.

    with systemd.machine("7.2-fixed") as guest:
        systemd.start(guest, "keeper", "state:7:4096")  # words of vm/keeper.py
        guest.load_kexec()
        guest.execute_kexec(systemd.KEXEC)
        assert systemd.came_back(guest, "keeper")["state"]["same"]

vm/keeper.py is such a service. The guest boots as any other does, until its init becomes systemd
(vm/guest/init).
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from vm import root
from vm.machine import Machine, MachineError

INIT = "/usr/lib/systemd/systemd"
#: Command that goes down with all services, and jumps.
KEXEC = ("systemctl", "kexec")
#: Word for the kernel's command line: the next one is to have no systemd, as other guests.
WITHOUT = "khoscope.init="

_UNIT = """\
[Service]
Type=notify
FileDescriptorStoreMax=16
FileDescriptorStorePreserve=yes
Environment=PYTHONPATH=/khoscope
ExecStart=/usr/bin/python3 -m vm.keeper {words}

[Install]
WantedBy=multi-user.target
"""


def machine(kernel: str, *others: str, memory: int = 1024) -> Machine:
    """A machine that boots into systemd; ``others`` as :class:`Machine` has them."""
    image = root.find(root.SYSTEMD)
    if image is None:
        raise MachineError("the root with systemd is not built; run: python -m vm build")
    return Machine(kernel, *others, root=image, append=f"khoscope.init={INIT}", memory=memory)


def start(guest: Machine, name: str, *words: str) -> None:
    """Makes a service of vm/keeper.py, which is started at each boot, and starts it."""
    add(guest, name, _UNIT.format(words=shlex.join(words)))
    guest.run(f"systemctl enable --now {name}", check=True, timeout=120)


def add(guest: Machine, name: str, unit: str) -> None:
    """Makes a service, from the text of its unit."""
    path = f"/etc/systemd/system/{name}.service"
    guest.run(f"printf %s {shlex.quote(unit)} >{path} && systemctl daemon-reload", check=True)


def journal(guest: Machine, *matches: str) -> list[dict[str, Any]]:
    """What khoscope has written into the journal at this boot by itself, not by its output."""
    asked = ("journalctl", "-b", "-o", "json", "-t", "khoscope", "_TRANSPORT=journal", *matches)
    return [json.loads(line) for line in guest.run(asked, check=True).stdout.splitlines()]


def wait(guest: Machine) -> None:
    """Wait until systemd has started all that it is to start, for better or worse."""
    guest.run(("systemctl", "is-system-running", "--wait"), timeout=300)


def came_back(guest: Machine, name: str) -> dict[str, Any]:
    """What a service had when it was started at this boot, by names."""
    wait(guest)
    said = guest.run(("journalctl", "-b", "-o", "cat", "-t", "python3", "-u", name), check=True)
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def promtool(guest: Machine, metrics: str) -> str:
    """What promtool has to say of metrics that it takes: nothing.

    :raise CommandFailed: with what it finds wrong with them
    """
    judged = guest.run(("promtool", "check", "metrics"), input=metrics.encode(), check=True)
    return judged.stdout + judged.stderr
