# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoscope carry, through a real kexec and against a real LUO."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from khoscope.facts.carried import SESSION, TOKEN
from tests.vm.test_clients import KERNELS
from tests.vm.test_khoscope import COST, HEALTHY, HEALTHY_ON_BASE, TIMEOUT, _refused, guest
from vm.exercise import Exercise
from vm.kernel import what
from vm.machine import Machine


@pytest.fixture(scope="module", params=KERNELS)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(request.param) as machine:
        yield machine


def tree(machine: Machine) -> Any:
    return json.loads(guest(machine, "tree", "--json"))["blocks"]


def start(machine: Machine) -> Any:
    """Carry in the background; what it says of it."""
    # A background job ignores Ctrl-C, and so would all that it starts.
    script = """
    rm -f /run/carry.*
    env --default-signal=INT khoscope carry --json >/run/carry.out 2>/run/carry.err </dev/null &
    echo $! >/run/carry.pid
    until grep -qx } /run/carry.out; do kill -0 $! || exit 1; sleep 0.2; done
    cat /run/carry.out
    """
    return json.loads(machine.run(script, timeout=TIMEOUT, check=True).stdout)


def stop(machine: Machine, signal: str) -> str:
    """What it says when a signal ends it."""
    script = f"""
    kill -{signal} $(cat /run/carry.pid)
    while kill -0 $(cat /run/carry.pid) 2>/dev/null; do sleep 0.2; done
    cat /run/carry.err
    """
    return machine.run(script, timeout=TIMEOUT, check=True).stdout


def test_nothing_is_carried_to_a_cold_boot(machine: Machine) -> None:
    result = machine.run("khoscope verify --before carried", timeout=TIMEOUT)
    _refused(result, "nothing was carried", "khoscope carry")


def test_one_carries_and_leaves_nothing_behind(machine: Machine) -> None:
    before = tree(machine)
    document = start(machine)
    assert document["session"] == SESSION
    assert document["token"] == f"{TOKEN:#x}"
    meanwhile = tree(machine)
    assert {b["key"] for b in before} < {b["key"] for b in meanwhile}
    pages = sum(b["pages"] for b in meanwhile) - sum(b["pages"] for b in before)
    assert pages * 4096 > document["memfd_bytes"]
    # It has recorded itself.
    assert sum(row["blocks"] for row in document["totals"]) == len(meanwhile)
    # With a session of LUO's that is really there, nothing is wrong.
    verdict = json.loads(guest(machine, "verify", "--json"))
    assert verdict["verdict"] == "pass"
    assert {f["rule"] for f in verdict["findings"]} <= {"no-image", *COST}
    second = machine.run("khoscope carry", timeout=TIMEOUT)
    _refused(second, "another khoscope carry runs", "end that one first")
    said = stop(machine, "INT")
    assert said == "khoscope: nothing is carried any more\nkhoscope: interrupted\n"
    assert tree(machine) == before


def test_the_device_is_busy(machine: Machine) -> None:
    hold = "exec 9<>/dev/liveupdate; khoscope carry 9>&-"
    _refused(machine.run(hold, timeout=TIMEOUT), "/dev/liveupdate is busy", "`khoscope luo`")
    hold = "exec 9<>/dev/liveupdate; khoscope verify --before carried 9>&-"
    _refused(machine.run(hold, timeout=TIMEOUT), "/dev/liveupdate is busy", "`khoscope luo`")


def test_not_root(machine: Machine) -> None:
    words = "setpriv --reuid 65534 --clear-groups khoscope verify --before carried"
    _refused(machine.run(words, timeout=TIMEOUT), "/dev/liveupdate: permission denied", "as root")


@pytest.mark.parametrize("kernel", KERNELS)
def test_luo_is_off(kernel: str) -> None:
    with Machine(kernel, append="liveupdate=off") as machine:
        for command in ("carry", "verify --before carried"):
            result = machine.run(f"khoscope {command}", timeout=TIMEOUT)
            _refused(result, "LUO is off", "CONFIG_LIVEUPDATE", "liveupdate=on")


@pytest.mark.parametrize("kernel", KERNELS)
def test_across_a_kexec(kernel: str) -> None:
    """The carried snapshot says what a file says, before the clients restore and after it."""
    healthy = HEALTHY if what(kernel) == "fixed" else HEALTHY_ON_BASE
    with Machine(kernel) as machine:
        exercise = Exercise(machine)
        exercise.load()
        for name in healthy:
            exercise.preserve(name)
        pieces = {f"{p.ranges[0][0]:#x}" for p in exercise.report()}
        start(machine)
        # While it carries: both have recorded the same blocks.
        guest(machine, "snapshot", "/root/before.khosnap")
        machine.load_kexec()
        machine.execute_kexec()

        handed = verify(machine, "carried")
        assert handed["handover"]["is_kho_boot"]
        assert handed["verdict"] == "pass"
        assert handed["fates"].get("lost", 0) == 0
        assert pieces <= unclaimed(handed)
        of_file = verify(machine, "/root/before.khosnap")
        for part in ("verdict", "counts", "findings"):
            assert of_file[part] == handed[part], part
        assert sum(of_file["fates"].values()) == sum(handed["fates"].values())

        modes = machine.run("stat -c '%a %F' /run/khoscope /run/khoscope/*", check=True).stdout
        assert modes.splitlines() == ["700 directory", "600 regular file"]
        exercise.load()
        for name in healthy:
            exercise.restore(name)
        restored = verify(machine, "carried")
        assert restored["verdict"] == "pass"
        assert not pieces & unclaimed(restored)
        # LUO has let go of it.
        machine.run("rm /run/khoscope/*", check=True)
        again = machine.run("khoscope verify --before carried", timeout=TIMEOUT)
        _refused(again, "nothing was carried")
        # And this kernel carries for the next.
        start(machine)
        assert stop(machine, "TERM") == "khoscope: nothing is carried any more\n"


def verify(machine: Machine, before: str) -> Any:
    return json.loads(guest(machine, "verify", "--json", "--before", before))


def unclaimed(found: Any) -> set[str]:
    return {f["phys"] for f in found["findings"] if f["rule"] == "not-restored"}
