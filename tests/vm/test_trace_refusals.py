# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope trace`` where it cannot be done: status 2, one line what, one line what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.test_khoscope import TIMEOUT, _refused
from vm.exercise import KernelLog
from vm.machine import Machine, Result

Document = dict[str, Any]

HEADERS = "/sys/kernel/kheaders.tar.xz"
BTF = "/sys/kernel/btf/vmlinux"
KPROBES = "/sys/kernel/debug/kprobes/enabled"


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    """A machine on which trace works, unless something is taken away from it."""
    with Machine("7.2-fixed") as machine:
        machine.run("touch /root/empty", check=True)
        yield machine


@pytest.fixture(scope="module", autouse=True)
def log(guest: Machine) -> KernelLog:
    """What the kernel says meanwhile."""
    log = KernelLog(guest)
    log.mark()
    return log


def trace(machine: Machine, *options: str, before: str = "true", after: str = "true") -> Result:
    """Run it, with shell commands before and behind it."""
    words = " ".join(("trace", "--jsonl", *options))
    script = f"{before} || exit 99; khoscope {words}; e=$?; {after} || exit 99; exit $e"
    return machine.run(("bash", "-c", script), timeout=TIMEOUT)


def module_path(directory: str) -> str:
    """Have ``khoscope`` find another module first."""
    return f'khoscope() {{ PYTHONPATH={directory}:/khoscope python3 -m khoscope "$@"; }}'


def hidden(file: str) -> dict[str, str]:
    """Have a file empty for a while."""
    return {"before": f"mount --bind /root/empty {file}", "after": f"umount {file}"}


def test_not_root(guest: Machine) -> None:
    words = "setpriv --reuid 65534 --clear-groups khoscope trace"
    _refused(guest.run(words, timeout=TIMEOUT), "permission denied", "as root")


def test_kho_is_off() -> None:
    with Machine("7.2-fixed", append="kho=off") as machine:
        _refused(trace(machine), "KHO is off", "kho=on")


def test_no_bcc(guest: Machine) -> None:
    guest.run(
        "mkdir -p /root/none /root/old;"
        " echo 'raise ImportError(\"No module named bcc\")' >/root/none/bcc.py;"
        " printf '__version__ = \"0.10.0\"\\nclass BPF: pass\\n' >/root/old/bcc.py",
        check=True,
    )
    missing = trace(guest, before=module_path("/root/none"))
    _refused(missing, "bcc is not there", "python3-bpfcc")
    old = trace(guest, before=module_path("/root/old"))
    _refused(old, "bcc 0.10.0 is too old: it has no BPF.", "python3-bpfcc")


def test_no_kernel_headers(guest: Machine) -> None:
    guest.run("rm -rf /tmp/kheaders-*", check=True)
    _refused(trace(guest, **hidden(HEADERS)), "no kernel headers", "CONFIG_IKHEADERS")


def test_no_btf(guest: Machine) -> None:
    """Then kprobes have to do, and it says so."""
    script = f"mount --bind /root/empty {BTF} && khoscope trace -d 1 --json; umount {BTF}"
    document = json.loads(guest.run(script, timeout=TIMEOUT, check=True).stdout)
    assert set(document["attached"].values()) == {"kprobe"}
    assert document["verdict"] == "pass"


def test_kprobes_are_off(guest: Machine) -> None:
    off = {"before": f"echo 0 >{KPROBES}", "after": f"echo 1 >{KPROBES}"}
    _refused(trace(guest, "--probe", "kprobe", **off), "kprobes are switched off", KPROBES)


def test_verifier_refuses(guest: Machine) -> None:
    """The verifier's log, as it was asked for, and the two lines behind it."""
    # As is, but for a write to an address that no program may write to.
    guest.run(
        "mkdir -p /root/broken && cp -rL /khoscope/khoscope /root/broken/ &&"
        " sed -i 's/^\\tcount(MADE, t->made);$/& *(volatile u64 *)8 = 0;/'"
        " /root/broken/khoscope/bpf/kho_trace.c &&"
        " ! cmp -s /root/broken/khoscope/bpf/kho_trace.c /khoscope/bpf/kho_trace.c",
        check=True,
    )
    broken = {"before": 'khoscope() { PYTHONPATH=/root/broken python3 -m khoscope "$@"; }'}
    verbose = trace(guest, "--probe", "kprobe", "-v", **broken)
    assert verbose.returncode == 2
    assert "invalid mem access" in verbose.stderr
    *_, what, hint = verbose.stderr.splitlines()
    assert what.startswith("khoscope: the kernel's BPF verifier refuses")
    assert hint.startswith("khoscope: ")
    assert "Traceback" not in verbose.stderr


def test_recording_that_cannot_be_written(guest: Machine) -> None:
    """It says so before it compiles, where it can know, and leaves nothing half done."""
    _refused(trace(guest, "--record", "/proc/a.khotrace"), "/proc/a.khotrace")
    small = {
        "before": "mkdir -p /root/small && mount -t tmpfs -o size=4k none /root/small",
        "after": 'test -z "$(ls -A /root/small)" && umount /root/small',
    }
    full = trace(guest, "--duration", "1", "--record", "/root/small/a.khotrace", **small)
    _refused(full, "a.khotrace", "No space left")


def test_kernel_has_not_minded(log: KernelLog) -> None:
    """All of the above, and nothing bad in its log."""
    assert log.complaint() is None
