# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The kernel of a distribution, as its users run it: KHO is not in it, debug info is not there.

khoscope finds its types and symbols all the same, and says what is missing.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator

import pytest
from drgn.helpers.linux.pid import for_each_task

from khoscope.sources.open import debug_info, open_qemu
from tests.vm.test_khoscope import TIMEOUT, host
from vm.kernel import STOCK, chosen
from vm.machine import GuestDied, Machine

COMMANDS = ("tree", "verify", "snapshot /root/x.khosnap", "status", "trace -d 1")
SAID = [
    "khoscope: this kernel has no kexec handover (no kho_out in its debug info)",
    "khoscope: boot a kernel that was built with CONFIG_KEXEC_HANDOVER=y",
]


def boot(stack: contextlib.ExitStack, name: str) -> Machine:
    """
    The machine, running.

    Of some fifty boots of this kernel under QEMU 7.2's TCG one ended in a panic in its first two
    seconds, long before there is anything of ours: it may try once more, and says so.
    """
    try:
        return stack.enter_context(Machine(name))
    except GuestDied as error:
        warnings.warn(f"{name} did not boot at first: {error}", stacklevel=2)
    return stack.enter_context(Machine(name))


@pytest.fixture(scope="module", params=chosen([STOCK]))
def stock(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        machine = boot(stack, request.param)
        machine.run("mount -t securityfs none /sys/kernel/security", check=True)
        yield machine


@pytest.mark.parametrize("command", COMMANDS)
def test_it_says_what_is_missing(stock: Machine, command: str) -> None:
    result = stock.run(f"khoscope {command}", timeout=TIMEOUT)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == SAID
    assert stock.run("test -e /root/x.khosnap").returncode == 1


def test_doctor(stock: Machine) -> None:
    result = stock.run("khoscope doctor --json", timeout=TIMEOUT)
    assert result.returncode == 2, result
    found = json.loads(result.stdout)
    assert found["ready"] is False
    assert found["release"] == stock.kernel.release
    states = {fact["name"]: fact["state"] for fact in found["facts"]}
    assert (states["KHO"], states["LUO"]) == ("no", "no")
    for name in ("kernel memory", "lockdown", "debug info", "BTF", "kprobes", "bcc"):
        assert states[name] == "ok", name
    (info,) = (fact for fact in found["facts"] if fact["name"] == "debug info")
    assert info["value"] == "BTF (khoscope), /sys/kernel/btf/vmlinux"


def test_from_the_host(stock: Machine) -> None:
    """Its BTF and its kallsyms are read out of its memory, over QMP."""
    where = ("--qemu", str(stock.qmp_socket))
    host(*where, "tree", status=2)
    prog = open_qemu(str(stock.qmp_socket))
    assert str(debug_info(prog)) == "BTF (khoscope), the kernel's memory"
    assert prog["init_uts_ns"].name.release.string_().decode() == stock.kernel.release
    assert "qemu-ga" in {task.comm.string_().decode() for task in for_each_task(prog)}
