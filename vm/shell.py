# SPDX-License-Identifier: LGPL-2.1-or-later
"""A root shell in the guest on this terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator

from vm import kernel as kernels
from vm.machine import FINALIZE, GuestError, Machine, MachineError


def shell(kernel: kernels.Kernel | str, accel: str | None = None) -> None:
    """Boots a root shell, and returns when the shell, and thus the VM, has ended."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise MachineError("shell needs a terminal; for one command there is: python -m vm run")
    size = os.get_terminal_size()
    # vm/guest/init reads this. kexec keeps it, so the next kernel has a shell here, too.
    append = f"khoscope.shell={os.environ.get('TERM', 'dumb')},{size.lines},{size.columns}"
    with Machine(kernel, accel=accel, append=append) as machine:
        vmlinux = shlex.quote(str(machine.kernel.share / "vmlinux"))
        first = f"echo 1 >{FINALIZE} && " if machine.must_finalize() else ""
        print(
            f"{machine.kernel.name} ({machine.kernel.release}) booted in"
            f" {machine.boot_seconds:.1f} s with {machine.accel}. From the host:\n"
            f"  khoscope --qemu {machine.qmp_socket} --vmlinux {vmlinux} tree\n"
            f"  drgn --qemu {machine.qmp_socket} -s {vmlinux}\n"
            f"Kexec in the guest: {first}kexec -s -l /kernel/bzImage --reuse-cmdline && kexec -e\n"
            "Ctrl-D ends the VM.",
            flush=True,
        )
        with _raw(sys.stdin.fileno()):
            end = machine.wait(_relay(machine))
    # When the shell ends, the guest resets. That is the regular end.
    if "guest-reset" not in end and "guest-shutdown" not in end:
        raise MachineError(end)


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


async def _relay(machine: Machine) -> None:
    """Relays bytes and changes of the window's size until it is cancelled."""
    loop = asyncio.get_running_loop()
    machine.terminal.setblocking(False)
    typed: asyncio.Queue[bytes] = asyncio.Queue()
    keyboard = sys.stdin.fileno()
    resized = asyncio.Event()
    loop.add_reader(keyboard, lambda: typed.put_nowait(os.read(keyboard, 4096)))
    loop.add_signal_handler(signal.SIGWINCH, resized.set)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_to_guest(machine.terminal, typed))
            tasks.create_task(_to_screen(machine.terminal))
            tasks.create_task(_resize(machine, resized))
    finally:
        loop.remove_reader(keyboard)
        loop.remove_signal_handler(signal.SIGWINCH)


async def _to_guest(guest: socket.socket, typed: asyncio.Queue[bytes]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await loop.sock_sendall(guest, await typed.get())


async def _to_screen(guest: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(guest, 65536):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


async def _resize(machine: Machine, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        size = os.get_terminal_size()
        command = f"stty -F /dev/hvc0 rows {size.lines} cols {size.columns}".split()
        # This fails while the guest is between two kernels. The next change will get through.
        with contextlib.suppress(GuestError):
            await machine.spawn(command)
