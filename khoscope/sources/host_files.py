# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The files in which a host's kernel answers khoscope: the one place for these paths.

A root is where a host's files are: ``/``, or where a test has made some up.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

COMMAND_LINE: Final = Path("/proc/cmdline")
MEMINFO: Final = Path("/proc/meminfo")
#: Of each zone of each NUMA node, how many of its pages are CMA's.
ZONEINFO: Final = Path("/proc/zoneinfo")
#: Page blocks by their type (``enum migratetype``); only root may read it.
PAGETYPEINFO: Final = Path("/proc/pagetypeinfo")
#: The kernel's log, a record per read.
LOG: Final = Path("/dev/kmsg")
KALLSYMS: Final = Path("/proc/kallsyms")
KCORE: Final = Path("/proc/kcore")
#: Modules that are loaded, with their sizes.
LOADED_MODULES: Final = Path("/proc/modules")
KPTR_RESTRICT: Final = Path("/proc/sys/kernel/kptr_restrict")
FTRACE_ENABLED: Final = Path("/proc/sys/kernel/ftrace_enabled")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

BTF: Final = Path("/sys/kernel/btf/vmlinux")
KHEADERS: Final = Path("/sys/kernel/kheaders.tar.xz")
KEXEC_LOADED: Final = Path("/sys/kernel/kexec_loaded")
LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
#: Functions that ftrace can patch, so that a BPF trampoline can be attached to them.
TRACEABLE: Final = Path("/sys/kernel/tracing/available_filter_functions")
#: "0": kprobes are attached but never hit.
KPROBES_ENABLED: Final = Path("/sys/kernel/debug/kprobes/enabled")

#: "1" once KHO is finalized, of kernels that have such a step; writing 1 finalizes.
FINALIZE: Final = Path("/sys/kernel/debug/kho/out/finalize")
DEBUGFS: Final = Path("/sys/kernel/debug")
#: There while KHO is on (kernel/liveupdate/kexec_handover_debugfs.c).
KHO_OUT: Final = Path("/sys/kernel/debug/kho/out")
#: There if KHO is on and another kernel has handed over to this one.
KHO_IN: Final = Path("/sys/kernel/debug/kho/in")
#: A line for each scratch area: its physical address, and its bytes.
SCRATCH_PHYS: Final = KHO_OUT / "scratch_phys"
SCRATCH_LEN: Final = KHO_OUT / "scratch_len"

#: What the boot loader, or the kernel before, has told this one: on x86, directories with a "type",
#: whether or not there are any, and on arm64 properties of the device tree.
BOOT_PARAMS: Final = Path("/sys/kernel/boot_params")
SETUP_DATA: Final = BOOT_PARAMS / "setup_data"
CHOSEN: Final = Path("/proc/device-tree/chosen")
CHOSEN_KHO: Final = CHOSEN / "linux,kho-fdt"

#: The Live Update Orchestrator's device.
LIVEUPDATE: Final = Path("/dev/liveupdate")

#: There if PID 1 is systemd (sd_booted(3)).
SYSTEMD: Final = Path("/run/systemd/system")

#: Built modules and headers, a directory per release.
MODULES: Final = Path("/lib/modules")


def configurations(release: str) -> list[Path]:
    """Where the configuration of a kernel may be; the first is the running kernel's own."""
    return [
        Path("/proc/config.gz"),
        Path(f"/boot/config-{release}"),
        MODULES / release / "config",
    ]


def at(root: Path, path: Path) -> Path:
    """Where a file of a host is."""
    return root / path.relative_to("/")


def is_there(root: Path, path: Path) -> bool:
    """False, too, if khoscope may not look there."""
    return os.path.exists(at(root, path))


def content(root: Path, path: Path, most: int = -1) -> bytes | None:
    """
    What a file holds; None: it is not there, or khoscope may not read it.

    :param most: bytes from its beginning, at most.
    """
    try:
        with at(root, path).open("rb") as file:
            return file.read(most)
    except OSError:
        return None


def text(root: Path, path: Path) -> str | None:
    """What a file says; None likewise."""
    found = content(root, path)
    return None if found is None else found.decode(errors="replace")
