# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine, with guests that behave and with guests that do not; and that nothing stays."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import vm.machine
from vm import root as roots
from vm.exercise import Exercise, KernelLog, Unsupported, by_scenario
from vm.machine import (
    REPOSITORY,
    CommandFailed,
    CommandTimeout,
    GuestDied,
    GuestError,
    GuestHung,
    Machine,
    MachineError,
)

T = TypeVar("T")

KERNEL = "7.2-base"


# -- a guest that behaves ---------------------------------------------------------------------


def test_boots_the_kernel_with_kho(machine: Machine) -> None:
    assert machine.accel in ("kvm", "tcg")
    assert machine.boots == 1
    assert machine.run("uname -r").stdout.strip() == machine.kernel.release
    assert machine.run("test -d /sys/kernel/debug/kho/out").returncode == 0
    assert {"kho=on", "liveupdate=on", "khoscope.boot=1"} <= set(machine.command_line())
    assert machine.run("ls /kernel/vmlinux /khoscope/vm").returncode == 0


def test_shares_cannot_be_written(machine: Machine) -> None:
    assert machine.run(("touch", "/kernel/x")).returncode == 1
    # What is written to the tree stays in the guest.
    machine.run(("touch", "/khoscope/x"), check=True)
    assert not (REPOSITORY / "x").exists()
    machine.run(("rm", "/khoscope/x"), check=True)


def test_status_and_output(machine: Machine) -> None:
    result = machine.run("echo out; echo err >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert machine.run(("echo", "a b", "$HOME")).stdout == "a b $HOME\n"
    assert machine.run("kill -TERM $$").returncode == -signal.SIGTERM
    assert machine.run(("no-such-command",)).returncode == 127


def test_input_and_environment(machine: Machine) -> None:
    data = bytes(range(256)) * 64
    result = machine.run("sha256sum; echo $WORD", input=data, env={"WORD": "a b"})
    assert result.stdout.split()[0] == hashlib.sha256(data).hexdigest()
    assert result.stdout.endswith("\na b\n")


def test_output_that_is_not_text_survives(machine: Machine) -> None:
    result = machine.run(r"printf 'a\377\200\n'")
    assert result.stdout.encode(errors="surrogateescape") == b"a\xff\x80\n"


def test_check_raises_with_the_output(machine: Machine) -> None:
    with pytest.raises(CommandFailed, match="status 3") as caught:
        machine.run("echo what it said; exit 3", check=True)
    assert caught.value.result.returncode == 3
    assert "what it said" in str(caught.value)


def test_large_output(machine: Machine) -> None:
    assert len(machine.run("yes | head -c 3000000").stdout) == 3_000_000


def test_too_large_output_is_an_error_not_cut_off(machine: Machine) -> None:
    with pytest.raises(MachineError, match="redirect it to a file"):
        machine.run("head -c 17000000 /dev/zero")


def test_a_command_over_time_is_killed_with_its_children(machine: Machine) -> None:
    started = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        machine.run("echo first; sleep 1111 & sleep 1111", timeout=5)
    assert time.monotonic() - started < 120
    assert caught.value.result.stdout == "first\n"
    assert machine.run("pgrep -f 'sleep [1]111'").returncode == 1


def test_copies_files_both_ways(machine: Machine, tmp_path: Path) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(2_500_000))
    machine.copy_in(sent, "/tmp/file")
    machine.copy_out("/tmp/file", received)
    assert received.read_bytes() == sent.read_bytes()
    sent.write_bytes(b"")
    machine.copy_in(sent, "/tmp/file")
    machine.copy_out("/tmp/file", received)
    assert received.read_bytes() == b""


def test_copying_what_is_not_there(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="No such file"):
        machine.copy_out("/no/such/file", tmp_path / "received")
    assert not (tmp_path / "received").exists()


def test_init_reaps_orphans_and_restarts_the_agent(machine: Machine) -> None:
    machine.run("(setsid sleep 0.1 &) ; sleep 0.5")
    assert machine.run("ps -eo stat,args | grep '^Z'").stdout == ""
    # The answer to the killing command is lost with the agent.
    with pytest.raises(GuestError):
        machine.run("pkill -KILL qemu-ga; sleep 10", timeout=60)
    assert machine.run("echo back").stdout == "back\n"


def test_other_programs_get_a_monitor_again_and_again(machine: Machine) -> None:
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(machine.qmp_socket))
            assert monitor.recv(4096).startswith(b'{"QMP"')


def test_dump(machine: Machine, tmp_path: Path) -> None:
    core = tmp_path / "core"
    machine.dump(core)
    assert core.read_bytes()[:4] == b"\x7fELF"
    assert core.stat().st_size > 1 << 30
    core.unlink()
    with pytest.raises(GuestError):
        machine.dump(tmp_path / "no" / "core")


# -- kexec ------------------------------------------------------------------------------------


def test_kexec_hands_over(tmp_path: Path) -> None:
    with Machine(KERNEL) as machine:
        with pytest.raises(MachineError, match="load_kexec first"):
            machine.execute_kexec()
        machine.run("echo kept >/root/file", check=True)
        boot_ids = [machine.run("cat /proc/sys/kernel/random/boot_id").stdout]
        for boot in (2, 3):
            machine.load_kexec(append=f"word={boot}")
            machine.execute_kexec()
            assert machine.boots == boot
            assert f"word={boot}" in machine.command_line()
            assert machine.run("cat /root/file").stdout == "kept\n"
            assert machine.run("ls /sys/kernel/debug/kho/in").stdout
            boot_ids.append(machine.run("cat /proc/sys/kernel/random/boot_id").stdout)
        assert len(set(boot_ids)) == 3
        assert machine.console().count("Linux version") == 3
        with pytest.raises(MachineError, match="not made with"):
            machine.load_kexec("7.2-rfc")
        # Of what the old system call loads, nothing is handed over.
        machine.load_kexec(handover=False)
        machine.execute_kexec()
        assert "khoscope.boot=4" in machine.command_line()
        assert machine.run("ls /sys/kernel/debug/kho", check=True).stdout == "out\n"


# -- the exercise module ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def exercise() -> Iterator[Exercise]:
    """The module in a guest with memory for 200,000 pages; the tests free what they make."""
    with Machine("7.2-fixed", memory=2048) as machine:
        exercise = Exercise(machine)
        exercise.load()
        yield exercise


@pytest.mark.parametrize(
    ("scenario", "number", "orders", "call"),
    [
        ("contig", 23, {1: 6, 2: 6, 3: 6, 4: 5}, "kho_preserve_pages"),
        ("split", 29, {1: 8, 2: 7, 3: 7, 4: 7}, "kho_preserve_pages"),
        ("folio", 31, {0: 8, 1: 8, 2: 8, 3: 7}, "kho_preserve_folio"),
        ("unpreserve", 7, {2: 7}, "kho_unpreserve_pages"),
        ("helper", 5, {1: 2, 2: 2, 3: 1}, "kho_split_preserved_pages"),
        ("contig", None, {1: 1, 2: 1, 3: 1, 4: 1}, "kho_preserve_pages"),
    ],
)
def test_number_of_blocks(
    exercise: Exercise, scenario: str, number: int | None, orders: dict[int, int], call: str
) -> None:
    before = len(by_scenario(exercise.report()).get(scenario, []))
    exercise.preserve(scenario, number)
    pieces = by_scenario(exercise.report())[scenario][before:]
    assert [piece.piece for piece in pieces] == list(range(before, before + sum(orders.values())))
    assert Counter(piece.pages for piece in pieces) == {1 << o: n for o, n in orders.items()}
    assert {piece.state for piece in pieces} == {
        "unpreserved" if scenario == "unpreserve" else "preserved"
    }
    assert {(piece.call, piece.ret) for piece in pieces} == {(call, 0)}
    exercise.free(scenario)
    assert {piece.state for piece in by_scenario(exercise.report())[scenario]} == {"freed"}


def test_many_pages(exercise: Exercise) -> None:
    exercise.preserve("many", 200_000)
    (piece,) = by_scenario(exercise.report())["many"]
    assert (piece.state, piece.pages, piece.ret) == ("preserved", 200_000, 0)
    exercise.free("many")


def test_scratch_is_refused(exercise: Exercise) -> None:
    log = KernelLog(exercise.machine)
    for start, end in exercise.scratch_areas():
        log.mark()
        exercise.preserve("scratch", start)
        pieces = by_scenario(exercise.report())["scratch"][-3:]
        assert [piece.ranges for piece in pieces] == [
            ((start, start + size),) for size in (0x1000, 0x2000, 0x4000)
        ]
        assert all(piece.ranges[0][1] <= end for piece in pieces)
        assert {(p.call, p.ret, p.state) for p in pieces} == {
            ("kho_preserve_pages", -22, "unpreserved")
        }
        assert log.since().count("WARNING: ") == 3
    exercise.free("scratch")


def test_what_is_not_scratch_is_unpreserved(exercise: Exercise) -> None:
    (lowest, _) = min(exercise.scratch_areas())
    # Where the kernel's own scratch begins, other memory ends.
    exercise.preserve("scratch", lowest - 0x4000)
    pieces = by_scenario(exercise.report())["scratch"][-3:]
    assert [(piece.ret, piece.state) for piece in pieces] == [(0, "preserved")] * 3
    log = KernelLog(exercise.machine)
    log.mark()
    exercise.free("scratch")
    pieces = by_scenario(exercise.report())["scratch"][-3:]
    assert {(p.call, p.state) for p in pieces} == {("kho_unpreserve_pages", "freed")}
    assert log.complaint() is None


def test_time(exercise: Exercise) -> None:
    for order in (0, 10):
        timing = exercise.time(order, 1000)
        assert (timing.order, timing.rounds) == (order, 1000)
        assert timing.preserve_ns > 0
        assert timing.unpreserve_ns > 0
    # What was killed does not count.
    with pytest.raises(CommandTimeout):
        exercise.time(0, 10**9, timeout=2)
    text = exercise.machine.run("cat /sys/kernel/debug/kho_exercise/time", check=True).stdout
    assert text.startswith('{"order":10,"rounds":1000,"preserve_ns":')


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("preserve", ""),
        ("preserve", "nothing"),
        ("preserve", "contig 0"),
        ("preserve", "contig -1"),
        ("preserve", "contig two"),
        ("preserve", "contig 1 1"),
        ("preserve", "many"),
        ("preserve", "many 0"),
        *[
            ("preserve", f"{name} 2")
            for name in ("dma", "vmalloc-huge", "neighbours", "part", "wrong-call")
        ],
        ("preserve", "scratch"),
        # Not aligned, and no memory.
        ("preserve", "scratch 0x1000"),
        ("preserve", "scratch 0x7fffffffc000"),
        ("preserve", "scratch 0xffffffffffffc000"),
        ("restore", "contig 1"),
        ("free", "contig 1"),
        ("time", ""),
        ("time", "0"),
        ("time", "0 0"),
        ("time", "-1 1"),
        ("time", "11 1"),
        ("time", "0 1 1"),
        ("time", "0 many"),
    ],
)
def test_bad_input(exercise: Exercise, file: str, words: str) -> None:
    before = [(p.scenario, p.piece, p.state) for p in exercise.report()]
    write = f"echo '{words}' >/sys/kernel/debug/kho_exercise/{file}"
    result = exercise.machine.run(("bash", "-c", write), env={"LC_ALL": "C"})
    assert result.stderr.endswith("write error: Invalid argument\n")
    assert [(p.scenario, p.piece, p.state) for p in exercise.report()] == before


def test_a_kernel_without_the_helper() -> None:
    with Machine(KERNEL) as machine:
        exercise = Exercise(machine)
        exercise.load()
        with pytest.raises(Unsupported):
            exercise.preserve("helper", 5)
        assert exercise.report() == []
        # Nor has anything been timed yet.
        assert machine.run("cat /sys/kernel/debug/kho_exercise/time", check=True).stdout == ""


# -- a guest that does not behave -------------------------------------------------------------


def test_panic() -> None:
    with Machine(KERNEL) as machine:
        started = time.monotonic()
        with pytest.raises(GuestDied, match="panicked") as caught:
            machine.run("echo c >/proc/sysrq-trigger", timeout=300)
        assert time.monotonic() - started < 30
        assert "Kernel panic" in str(caught.value)
        # And whoever asks later hears the same.
        with pytest.raises(GuestDied, match="panicked"):
            machine.run("true")


def test_panic_of_the_next_kernel() -> None:
    with Machine(KERNEL) as machine:
        machine.load_kexec(append="root=/dev/nothing")
        started = time.monotonic()
        with pytest.raises(GuestDied, match="panicked") as caught:
            machine.execute_kexec()
        assert time.monotonic() - started < 60
        assert "Unable to mount root" in str(caught.value)


def test_crash_of_qemu() -> None:
    with Machine(KERNEL) as machine:
        machine._qemu.send_signal(signal.SIGSEGV)
        with pytest.raises(GuestDied, match="QEMU has ended by SIGSEGV"):
            machine.run("sleep 60", timeout=300)


def test_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine(KERNEL) as machine:
        monkeypatch.setattr(vm.machine, "REPLY_TIMEOUT", 3.0)
        started = time.monotonic()
        with pytest.raises(GuestHung, match="did not answer"):
            machine.run("pkill -STOP qemu-ga; sleep 600", timeout=300)
        assert time.monotonic() - started < 20


def test_power_off() -> None:
    with Machine(KERNEL) as machine, pytest.raises(GuestDied, match="guest-shutdown"):
        machine.run("echo o >/proc/sysrq-trigger; sleep 600", timeout=300)


def test_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MachineError, match=rf"python -m vm build {KERNEL}"):
        Machine(KERNEL)
    with pytest.raises(MachineError, match="no kernel is called"):
        Machine("7.2-none")


def test_root_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "find", lambda: None)
    with pytest.raises(MachineError, match="python -m vm build"):
        Machine(KERNEL)


def test_no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="apt-get install qemu-system-x86"), Machine(KERNEL):
        pass


def test_qemu_that_does_not_start() -> None:
    machine = Machine(KERNEL, accel="nonsense")
    with pytest.raises(MachineError, match="nonsense"), machine:
        pass
    assert not machine.directory.exists()


# -- nothing stays ----------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of temporary files, for machines of this process and of its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_two_at_once(scratch: Path) -> None:
    with Machine(KERNEL) as first, Machine(KERNEL) as second:
        first.run("echo first >/root/name", check=True)
        assert second.run("cat /root/name").returncode == 1
        assert first.run("cat /root/name").stdout == "first\n"
        assert len(list(scratch.iterdir())) == 2
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_takes_its_machine_along(scratch: Path, stop: signal.Signals) -> None:
    with _command("run", KERNEL, "--", "sh", "-c", "echo up >/dev/console; sleep 600") as process:
        (directory,) = _until(lambda: list(scratch.iterdir()))
        console = directory / "console"
        _until(
            lambda: console.exists() and re.search(r"^up\r?$", console.read_text(), re.MULTILINE)
        )
        qemu = _children(process.pid)
        assert qemu
        process.send_signal(stop)
        status = process.wait(timeout=120)
    assert (
        status
        == {
            signal.SIGINT: 130,
            signal.SIGTERM: 143,
            signal.SIGKILL: -signal.SIGKILL,
        }[stop]
    )
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in qemu))
    if stop == signal.SIGKILL:
        # Only the next start can remove what it left.
        os.utime(directory, (0, 0))
        with Machine(KERNEL):
            assert not directory.exists()
    assert list(scratch.iterdir()) == []


def test_run_passes_output_and_status_on() -> None:
    with _command("run", KERNEL, "--", "sh", "-c", "echo out; echo err >&2; exit 5") as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (5, b"out\n")
    assert errors.endswith(b"err\n")


# -- the shell --------------------------------------------------------------------------------


def test_shell_on_a_terminal(scratch: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (33, 111))
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "vm", "shell", KERNEL]
    with subprocess.Popen(
        # For a change of its size to be heard, the terminal is the process's own.
        ["setsid", "--ctty", *command],
        cwd=REPOSITORY,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        try:
            screen = _Screen(ours)
            screen.wait_for(r"drgn --qemu \S+ -s \S+")
            screen.wait_for(_PROMPT)
            os.write(ours, b"stty size; echo $TERM $((6*7))\n")
            screen.wait_for(r"33 111\r?\n\w+ 42\r?\n")
            # Job control: Ctrl-C ends the command, not the shell, nor us.
            os.write(ours, b"sleep 600\n")
            time.sleep(1)
            os.write(ours, b"\x03")
            os.write(ours, b"echo st${x}ill here\n")
            screen.wait_for(r"still here\r?\n")
            # The window's size follows, and a kexec leads to a shell in the next kernel.
            screen.wait_for(_PROMPT)
            termios.tcsetwinsize(theirs, (40, 99))
            time.sleep(1)
            os.write(ours, b"stty size\n")
            screen.wait_for(r"40 99\r?\n")
            screen.wait_for(_PROMPT)
            os.write(ours, b"kexec -s -l /kernel/bzImage --reuse-cmdline && kexec -e\n")
            screen.wait_for(r"kexec -e\r?\n")
            screen.wait_for(_PROMPT)
            os.write(ours, b"ls -d /sys/kernel/debug/kho/in\n")
            screen.wait_for(r"[^ ]/sys/kernel/debug/kho/in\r?\n")
            screen.wait_for(_PROMPT)
            os.write(ours, b"\x04")
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
    assert termios.tcgetattr(theirs) == before
    assert list(scratch.iterdir()) == []
    os.close(ours)
    os.close(theirs)


_PROMPT = r"root@[^#]*# "


class _Screen:
    """What has been printed on a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.text = ""

    def wait_for(self, pattern: str, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.descriptor], [], [], deadline - time.monotonic())
            assert ready, f"no {pattern!r} in: {self.text}"
            self.text += os.read(self.descriptor, 65536).decode(errors="replace")
        self.text = self.text[found.end() :]


@contextlib.contextmanager
def _command(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "vm", *words],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _until(condition: Callable[[], T], timeout: float = 180.0) -> T:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value
