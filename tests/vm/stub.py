# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's gdb stub: writes into the memory of a guest, which no kernel lets itself be written."""

from __future__ import annotations

import re
import socket
from typing import Any

from vm.machine import Machine

#: Seconds.
_TIMEOUT = 30.0


def poke(machine: Machine, phys: int, old: bytes, new: bytes) -> None:
    """Replace bytes at a physical address; the guest stands still meanwhile."""
    assert len(old) == len(new)
    path = machine.qmp_socket.with_name("gdb")
    _monitor(machine, f"gdbserver unix:{path},server=on,wait=off")
    with socket.socket(socket.AF_UNIX) as stub:
        stub.settimeout(_TIMEOUT)
        stub.connect(str(path))
        _ask(stub, "?")
        assert _ask(stub, "Qqemu.PhyMemMode:1") == "OK"
        assert bytes.fromhex(_ask(stub, f"m{phys:x},{len(old):x}")) == old
        assert _ask(stub, f"M{phys:x},{len(new):x}:{new.hex()}") == "OK"
        assert _ask(stub, "D") == "OK"
    _monitor(machine, "gdbserver none")
    path.unlink(missing_ok=True)


def _monitor(machine: Machine, command: str) -> None:
    words: dict[str, Any] = {"command-line": command}
    machine.qmp("human-monitor-command", **words)


def _ask(stub: socket.socket, packet: str) -> str:
    """The answer to a packet of gdb's remote protocol: ``$…#`` and a sum."""
    data = packet.encode()
    stub.sendall(b"$%b#%02x" % (data, sum(data) % 256))
    answer = b""
    while True:
        while not (whole := re.search(rb"\$([^#]*)#..", answer)):
            piece = stub.recv(4096)
            assert piece, f"QEMU hung up after {packet!r}"
            answer += piece
        stub.sendall(b"+")
        answer = answer[whole.end() :]
        # That the guest has stopped may be said once more.
        if packet == "?" or not whole[1].startswith(b"T"):
            return whole[1].decode("ascii")
