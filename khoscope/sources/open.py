# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a kernel with drgn and find its debug info, or say in two lines why not."""

from __future__ import annotations

import errno
import logging
import os
import platform
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from drgn import MissingDebugInfoError, Program

from ..errors import KhoscopeError

# What drgn logs about missing debug info is in the error that it raises, too.
logging.getLogger("drgn").setLevel(logging.CRITICAL)

#: The longest wait for one answer of QEMU.
ANSWER_SECONDS = 10.0

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOCKDOWN = Path("/sys/kernel/security/lockdown")

#: Under this name in ``Program.cache``.
_CACHED = "khoscope_debug_info"


@dataclass(frozen=True)
class DebugInfo:
    """
    What a program knows types by.

    :param kind: ``DWARF``, ``BTF (drgn)`` or ``BTF (khoscope)``: by whose reader.
    :param where: the file, or the kernel's memory.
    """

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.where}"


def debug_info(prog: Program) -> DebugInfo:
    """What was found when the program was opened here, or what a program of others has."""
    if _CACHED not in prog.cache:
        prog.cache[_CACHED] = DebugInfo("DWARF", prog.main_module().debug_file_path or "unknown")
    found: DebugInfo = prog.cache[_CACHED]
    return found


def open_live(vmlinux: Path | None = None) -> Program:
    """
    The running kernel, through ``/proc/kcore``.

    :raises KhoscopeError: without the permission, ``/proc/kcore`` or debug info.
    """
    prog = Program()
    # The kernel makes its boot id when it is first asked for it.
    if BOOT_ID.exists():
        BOOT_ID.read_text()
    try:
        prog.set_kernel()
    except PermissionError as error:
        if os.geteuid() != 0:
            raise KhoscopeError(
                "/proc/kcore: permission denied", "run khoscope as root (sudo khoscope …)"
            ) from error
        raise KhoscopeError(
            f"/proc/kcore cannot be opened even by root{_lockdown()}",
            "boot without lockdown (and without a seccomp or container policy that hides kernel"
            " memory), or look at a vmcore or from the host with --qemu",
        ) from error
    except (OSError, ValueError) as error:
        raise KhoscopeError(
            f"/proc/kcore: {error}", "use a kernel with CONFIG_PROC_KCORE=y, outside a container"
        ) from error
    _load_debug_info(prog, vmlinux, f"the running kernel {platform.release()}")
    return prog


def open_qemu(address: str, vmlinux: Path | None = None) -> Program:
    """
    A QEMU guest, from the host, over QMP.

    :param address: path of QEMU's QMP socket, or HOST:PORT.
    :raises KhoscopeError: if nothing answers there, or without debug info.
    """
    prog = Program()
    try:
        prog.set_qemu_qmp(_connect(address))
    except Exception as error:  # what drgn raises when a server hangs up is just that
        what = "it does not answer: is another tool attached?" if _is_silence(error) else error
        raise KhoscopeError(
            f"{address}: no QEMU guest to look at ({what})",
            "start QEMU with -qmp unix:PATH,server=on,wait=off -device vmcoreinfo, a guest kernel"
            " with CONFIG_FW_CFG_SYSFS=y, and attach one tool at a time",
        ) from error
    _load_debug_info(prog, vmlinux, f"the guest at {address}")
    return prog


def _connect(address: str) -> int:
    """
    A connection to a QMP server, for drgn, on which no wait is for ever.

    QEMU serves one client at a time and leaves the next one waiting; a QEMU that is stopped
    leaves everybody waiting.

    :raises OSError: if there is nobody to connect to.
    """
    host, colon, port = address.rpartition(":")
    if colon and not address.startswith(("/", ".")) and port.isdecimal():
        client = socket.create_connection((host or "localhost", int(port)), ANSWER_SECONDS)
        client.settimeout(None)
    else:
        client = socket.socket(socket.AF_UNIX)
    limit = struct.pack("ll", int(ANSWER_SECONDS), int(ANSWER_SECONDS % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        client.setsockopt(socket.SOL_SOCKET, option, limit)
    if client.family == socket.AF_UNIX:
        try:
            client.connect(address)
        except OSError:
            client.close()
            raise
    return client.detach()


def _is_silence(error: Exception) -> bool:
    """Whether a wait on the connection came to its end."""
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) == errno.EAGAIN


def open_core(path: Path, vmlinux: Path | None = None) -> Program:
    """
    A vmcore: ELF or kdump-compressed, or QEMU's dump-guest-memory.

    :raises KhoscopeError: if it is no whole vmcore, or without debug info.
    """
    prog = Program()
    try:
        prog.set_core_dump(path)
    except OSError as error:
        raise KhoscopeError(
            f"{path}: {error.strerror or error}", "name a vmcore that you can read"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise KhoscopeError(
            f"{path}: not a vmcore that drgn can read ({error})",
            "give an ELF or kdump-compressed vmcore, whole; a flattened one needs makedumpfile -R"
            " first",
        ) from error
    _load_debug_info(prog, vmlinux, f"the kernel of {path}")
    return prog


def _load_debug_info(prog: Program, vmlinux: Path | None, whose: str) -> None:
    if vmlinux is not None and not os.access(vmlinux, os.R_OK):
        raise KhoscopeError(f"{vmlinux}: cannot be read", "name the vmlinux with --vmlinux")
    try:
        prog.load_debug_info([] if vmlinux is None else [vmlinux], main=True)
    except MissingDebugInfoError as error:
        raise KhoscopeError(
            f"no debug info for {whose}: {_missing(prog, vmlinux)}",
            "name its vmlinux with --vmlinux, or install the kernel's debug symbols package",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise KhoscopeError(
            f"the debug info of {whose} cannot be used ({error})",
            "name the right vmlinux with --vmlinux",
        ) from error


def _missing(prog: Program, vmlinux: Path | None) -> str:
    """Which file is needed, and where drgn looked for it."""
    try:
        module = prog.main_module()
        build_id = module.build_id.hex() if module.build_id else "unknown"
    except LookupError:
        return "this is not a Linux kernel, or its vmcoreinfo is missing"
    needed = f"needs the vmlinux with build id {build_id}"
    if vmlinux is not None:
        return f"{vmlinux} is not it; {needed}"
    options = prog.debug_info_options
    places = [*(options.directories or ()), *(options.kernel_directories or ())]
    looked = ", ".join(place or "the standard places" for place in places)
    release = prog["UTS_RELEASE"].string_().decode()
    return f"{needed}, looked in {looked} for {release}"


def lockdown_mode(path: Path) -> str | None:
    """``none``, ``integrity`` or ``confidentiality``; None: it cannot be read."""
    if not os.access(path, os.R_OK):
        return None
    return path.read_text().split("[")[-1].split("]")[0]


def _lockdown() -> str:
    """The kernel's lockdown mode, if it can be read and is not none."""
    mode = lockdown_mode(LOCKDOWN)
    return "" if mode in (None, "none") else f": the kernel is locked down ({mode})"
