# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A day in the guest, in little: a client that is loaded and unloaded, and another one in its place;
tasks that live for one write; a processor that goes and comes back.

    python3 come_and_go.py PID…

Prints what the processes hold after some rounds, and after all of them, and what their maps do.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Each client is loaded in every other round.
CLIENTS = ("kho_exercise", "kho_exercisf")
ROUNDS, FIRST_ROUNDS = 10, 4
#: Calls of each function in a round: by tasks of their own, with one processor, and on the other.
TASKS, OF_TASK, OF_CPU = 20, 5, 10
CALLS = TASKS * OF_TASK + 2 * OF_CPU

_MODULE = Path("/kernel/kho_exercise.ko")
_CPU = Path("/sys/devices/system/cpu/cpu1/online")
_MAPS = ("tasks", "call_kinds", "block_kinds")
#: Seconds: a trace looks every second, while the client has to be there.
_LOOK = 1.5


def main() -> None:
    pids = [int(word) for word in sys.argv[1:]]
    original = _MODULE.read_bytes()
    for name in CLIENTS:
        Path(f"/root/{name}.ko").write_bytes(original.replace(CLIENTS[0].encode(), name.encode()))
    seen: dict[str, Any] = {"addresses": [], "held": []}
    for number in range(ROUNDS):
        seen["addresses"].append(one_round(CLIENTS[number % len(CLIENTS)]))
        if number + 1 in (FIRST_ROUNDS, ROUNDS):
            seen["held"].append({"kib": [resident(pid) for pid in pids], "entries": entries()})
    print(json.dumps(seen))


def one_round(client: str) -> str:
    """:return: where the client was."""
    subprocess.run(["insmod", f"/root/{client}.ko"], check=True)
    (address,) = re.findall(rf"^{client} .* (0x\w+)", Path("/proc/modules").read_text(), re.M)
    write = f"echo 0 %d >/sys/kernel/debug/{client}/time"
    tasks = [subprocess.Popen(["sh", "-c", write % OF_TASK]) for _ in range(TASKS)]
    if sum(task.wait() for task in tasks):
        raise SystemExit(f"{client} refuses")
    _CPU.write_text("0")
    subprocess.run(["sh", "-c", write % OF_CPU], check=True)
    _CPU.write_text("1")
    subprocess.run(["taskset", "--cpu-list", "1", "sh", "-c", write % OF_CPU], check=True)
    time.sleep(_LOOK)
    subprocess.run(["rmmod", client], check=True)
    return str(address)


def resident(pid: int) -> int:
    """``VmRSS`` of a process, KiB."""
    (size,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(size)


def entries() -> list[tuple[str, int]]:
    """How many entries the maps have, of all traces."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    number, found = ctypes.c_uint32(), []
    while not libbpf.bpf_map_get_next_id(number, ctypes.byref(number)):
        fd = libbpf.bpf_map_get_fd_by_id(number)
        # struct bpf_map_info: type, id, size of keys, of values, entries at most, flags, name
        info = (ctypes.c_char * 88)()
        size = ctypes.c_uint32(len(info))
        if libbpf.bpf_map_get_info_by_fd(fd, info, ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), "BPF_OBJ_GET_INFO_BY_FD")
        name = info.raw[24:40].rstrip(b"\0").decode()
        if name in _MAPS:
            found.append((name, count(libbpf, fd, int.from_bytes(info.raw[8:12], "little"))))
    return found


def count(libbpf: ctypes.CDLL, fd: int, key_size: int) -> int:
    key, following = None, (ctypes.c_char * key_size)()
    keys = 0
    while not libbpf.bpf_map_get_next_key(fd, key, following):
        key = (ctypes.c_char * key_size).from_buffer_copy(following)
        keys += 1
    return keys


if __name__ == "__main__":
    main()
