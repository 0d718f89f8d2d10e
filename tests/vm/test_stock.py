# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The kernel of a distribution, as its users run it: KHO is not in it, debug info is not there.

khoscope finds its types and symbols all the same, and says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from drgn.helpers.linux.pid import for_each_task

from khoscope.sources.open import debug_info, open_qemu
from tests.vm.test_khoscope import TIMEOUT, host
from vm.kernel import STOCK, chosen
from vm.machine import Machine

COMMANDS = ("tree", "verify", "snapshot /root/x.khosnap", "status", "trace -d 1")
SAID = [
    "khoscope: this kernel has no kexec handover (no kho_out in its debug info)",
    "khoscope: boot a kernel that was built with CONFIG_KEXEC_HANDOVER=y",
]


@pytest.fixture(scope="module", params=chosen([STOCK]))
def stock(request: pytest.FixtureRequest) -> Iterator[Machine]:
    # Its initramfs alone is as large as our kernels' guests need.
    with Machine(request.param, memory=2048) as machine:
        machine.run("mount -t securityfs none /sys/kernel/security", check=True)
        yield machine


@pytest.mark.parametrize("command", COMMANDS)
def test_it_says_what_is_missing(stock: Machine, command: str) -> None:
    result = stock.run(f"khoscope {command}", timeout=TIMEOUT)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert "CONFIG_KEXEC_HANDOVER=y" in lines[1]
    if not command.startswith("trace"):
        assert lines == SAID
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
    """Its BTF and its kallsyms are read out of its memory, over QMP and of a vmcore."""
    where = ("--qemu", str(stock.qmp_socket))
    host(*where, "tree", status=2)
    prog = open_qemu(str(stock.qmp_socket))
    assert str(debug_info(prog)) == "BTF (khoscope), the kernel's memory"
    assert prog["init_uts_ns"].name.release.string_().decode() == stock.kernel.release
    assert "qemu-ga" in {task.comm.string_().decode() for task in for_each_task(prog)}
