# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files in which a host's kernel answers khoscope: the one place for these paths."""

from __future__ import annotations

from pathlib import Path
from typing import Final

COMMAND_LINE: Final = Path("/proc/cmdline")
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

#: The Live Update Orchestrator's device.
LIVEUPDATE: Final = Path("/dev/liveupdate")

#: Built modules and headers, a directory per release.
MODULES: Final = Path("/lib/modules")
