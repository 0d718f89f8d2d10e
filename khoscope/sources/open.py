# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a kernel with drgn and find its debug info, or say in two lines why that failed."""

from __future__ import annotations

import errno
import logging
import os
import platform
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from drgn import BadDataError, FaultError, MissingDebugInfoError, Program, ProgramFlags

from ..facts.files import require_regular
from ..words.errors import KhoscopeError
from . import btf, host_files

# The error that drgn raises repeats what drgn logs about missing debug info.
logging.getLogger("drgn").setLevel(logging.CRITICAL)

#: The longest wait for one answer of QEMU.
ANSWER_SECONDS = 10.0


#: How the running kernel is read.
LIVE = "live kernel, /proc/kcore"

#: What to do if the kernel denies its memory even to root.
ANOTHER_WAY = (
    "boot without lockdown (and without a seccomp or container policy that hides kernel memory),"
    " or look at a vmcore or from the host with --qemu"
)

#: What drgn raises over the headers and notes of a damaged vmcore.
_DAMAGED = (BadDataError, ValueError, RuntimeError)

#: The key of the debug info in ``Program.cache``.
_CACHED = "khoscope_debug_info"


@dataclass(frozen=True)
class DebugInfo:
    """
    The debug info that a program gets its types from.

    :param kind: ``DWARF``, ``BTF (drgn)`` or ``BTF (khoscope)``, by the reader.
    :param where: the file, or the kernel's memory.
    """

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.where}"


def debug_info(prog: Program) -> DebugInfo:
    """What was found when khoscope opened the program, or what a program opened by others has."""
    if _CACHED not in prog.cache:
        prog.cache[_CACHED] = _debug_info_of_others(prog)
    found: DebugInfo = prog.cache[_CACHED]
    return found


def _debug_info_of_others(prog: Program) -> DebugInfo:
    try:
        path = prog.main_module().debug_file_path
    except LookupError:
        path = None
    # drgn asks BTF only after other debug info.
    if path is None and btf.NAME in prog.cache:
        reader, where = prog.cache[btf.NAME]
        return DebugInfo(f"BTF ({reader})", where)
    return DebugInfo("DWARF", path or "unknown")


def is_this_host(prog: Program) -> bool:
    """Whether a program is the running kernel."""
    this = ProgramFlags.IS_LIVE | ProgramFlags.IS_LOCAL
    return prog.flags & this == this


def how_it_is_read(prog: Program) -> tuple[str, bool]:
    """
    For a program that others have opened: how it is read, and whether the kernel runs meanwhile.
    """
    if is_this_host(prog):
        ask_for_boot_id()
        return LIVE, True
    if prog.flags & ProgramFlags.IS_LIVE:
        return "QEMU guest", True
    return f"vmcore {prog.core_dump_path}" if prog.core_dump_path else "memory", False


def ask_for_boot_id() -> None:
    """The running kernel makes its boot id only when somebody first asks for it."""
    if host_files.BOOT_ID.exists():
        host_files.BOOT_ID.read_text()


def open_live(vmlinux: Path | None = None) -> Program:
    """
    The running kernel, through ``/proc/kcore``.

    :raises KhoscopeError: if the permission, ``/proc/kcore`` or debug info is missing.
    """
    prog = Program()
    ask_for_boot_id()
    try:
        prog.set_kernel()
    except PermissionError as error:
        if os.geteuid() != 0:
            raise KhoscopeError(
                "/proc/kcore: permission denied", "run khoscope as root (sudo khoscope …)"
            ) from error
        what = f"/proc/kcore cannot be opened even by root{_lockdown()}"
        raise KhoscopeError(what, ANOTHER_WAY) from error
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
    :raises KhoscopeError: if nothing answers there, or debug info is missing.
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
    Connect to a QMP server, for drgn; no wait on the connection lasts for ever.

    QEMU serves one client at a time and leaves the next one waiting.  A stopped QEMU leaves
    everybody waiting.

    :raises OSError: if nobody listens there.
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
    """Whether a wait on the connection timed out."""
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) == errno.EAGAIN


def open_core(path: Path, vmlinux: Path | None = None) -> Program:
    """
    A vmcore: ELF or kdump-compressed, or QEMU's dump-guest-memory.

    :raises KhoscopeError: if it is not a whole vmcore, or debug info is missing.
    """
    require_regular(path, "name a vmcore that you can read")
    prog = Program()
    try:
        prog.set_core_dump(path)
    except OSError as error:
        raise KhoscopeError(
            f"{path}: {error.strerror or error}", "name a vmcore that you can read"
        ) from error
    except Exception as error:
        # libkdumpfile refuses with bare Exceptions, libelf and drgn itself with these types.
        if not isinstance(error, _DAMAGED) and type(error) is not Exception:
            raise
        raise KhoscopeError(
            f"{path}: not a vmcore that drgn can read ({error})",
            "give an ELF or kdump-compressed vmcore, whole; a flattened one needs makedumpfile -R"
            " first, and of QEMU's dumps only the ELF ones name their architecture",
        ) from error
    _load_debug_info(prog, vmlinux, f"the kernel of {path}")
    return prog


def _load_debug_info(prog: Program, vmlinux: Path | None, whose: str) -> None:
    """Load the DWARF that drgn finds, else BTF."""
    if vmlinux is not None:
        require_regular(vmlinux, "name the vmlinux with --vmlinux")
        if not os.access(vmlinux, os.R_OK):
            raise KhoscopeError(f"{vmlinux}: cannot be read", "name the vmlinux with --vmlinux")
    try:
        prog.load_debug_info([] if vmlinux is None else [vmlinux], main=True)
        _refuse_another(prog, vmlinux, whose)
    except MissingDebugInfoError:
        missing = _missing(prog, vmlinux)
        try:
            prog.cache[_CACHED] = _load_btf(prog, vmlinux)
        except btf.SymbolsHidden as hidden:
            raise KhoscopeError(
                f"no debug info for {whose}: {missing}; BTF alone will not do: {hidden}",
                "sysctl -w kernel.kptr_restrict=1, or name its vmlinux with --vmlinux",
            ) from hidden
        except btf.BtfError as unusable:
            raise KhoscopeError(
                f"no debug info for {whose}: {missing}; {unusable}",
                "name its vmlinux with --vmlinux, install the kernel's debug symbols package, or"
                " use a kernel with CONFIG_DEBUG_INFO_BTF=y",
            ) from unusable
    except (BadDataError, FaultError) as error:
        # Without a VMCOREINFO, drgn takes a vmcore for that of a process, and then misses more.
        raise KhoscopeError(
            f"{whose} cannot be made out ({error})",
            "give a whole vmcore, with its VMCOREINFO: this one is damaged, or not of a kernel",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise KhoscopeError(
            f"the debug info of {whose} cannot be used ({error})",
            "name the right vmlinux with --vmlinux",
        ) from error


def _refuse_another(prog: Program, vmlinux: Path | None, whose: str) -> None:
    """drgn silently ignores a wrong --vmlinux if it found the right one elsewhere."""
    module = prog.main_module()
    taken = [path for path in (module.loaded_file_path, module.debug_file_path) if path]
    if vmlinux is not None and not any(os.path.samefile(path, vmlinux) for path in taken):
        raise KhoscopeError(
            f"{vmlinux} is not the vmlinux of {whose}: {' or '.join(taken)} is",
            "name that one with --vmlinux, or none",
        )


def _load_btf(prog: Program, vmlinux: Path | None) -> DebugInfo:
    """
    Load the BTF of the vmlinux if one was named, else that of the kernel itself.

    :raises btf.BtfError: if there is no BTF that can be used.
    """
    data = None if vmlinux is None else _btf_section(vmlinux, prog)
    reader, where = btf.register(prog, data)
    return DebugInfo(f"BTF ({reader})", where if vmlinux is None else str(vmlinux))


def _btf_section(vmlinux: Path, prog: Program) -> bytes:
    """
    The BTF of a vmlinux without DWARF, if that is the vmlinux of this kernel.

    :raises btf.BtfError: if it is not, or has none.
    """
    try:
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import NoteSection
    except ModuleNotFoundError as error:
        raise btf.BtfError(
            "without DWARF its BTF would do, but to read that takes the Python package pyelftools"
            " (pip install pyelftools; khoscope[images] has it)"
        ) from error

    try:
        with vmlinux.open("rb") as file:
            elf = ELFFile(file)
            section = elf.get_section_by_name(".BTF")
            build_ids = [
                note["n_desc"]
                for notes in elf.iter_sections()
                if isinstance(notes, NoteSection)
                for note in notes.iter_notes()
                if note["n_type"] == "NT_GNU_BUILD_ID"
            ]
            data = None if section is None else bytes(section.data())
    except Exception as error:
        # pyelftools may raise anything on a corrupt file, even MemoryError.
        said = str(error) or type(error).__name__
        raise btf.BtfError(f"no BTF can be read from it ({said})") from error
    build_id = prog.main_module().build_id
    if build_id is None or build_id.hex() not in build_ids:
        raise btf.BtfError("its BTF is of another build")
    if data is None:
        raise btf.BtfError("it has no BTF, either")
    return data


def _missing(prog: Program, vmlinux: Path | None) -> str:
    """Which file is needed, and where drgn looked for it."""
    try:
        module = prog.main_module()
        build_id = module.build_id.hex() if module.build_id else "unknown"
        release = prog["UTS_RELEASE"].string_().decode()
    except LookupError:
        return "this is not a Linux kernel, or its vmcoreinfo is missing"
    needed = f"needs the vmlinux with build id {build_id}"
    if vmlinux is not None:
        return f"{vmlinux} is not it; {needed}"
    options = prog.debug_info_options
    places = [*(options.directories or ()), *(options.kernel_directories or ())]
    looked = ", ".join(place or "the standard places" for place in places)
    return f"{needed}, looked in {looked} for {release}"


def lockdown_mode(path: Path) -> str | None:
    """``none``, ``integrity`` or ``confidentiality``; None: it cannot be read."""
    if not os.access(path, os.R_OK):
        return None
    return path.read_text().split("[")[-1].split("]")[0]


def _lockdown() -> str:
    """The kernel's lockdown mode, if it can be read and is not none."""
    mode = lockdown_mode(host_files.LOCKDOWN)
    return "" if mode in (None, "none") else f": the kernel is locked down ({mode})"
