# SPDX-License-Identifier: LGPL-2.1-or-later
"""The subcommands `kernels` and `build`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vm import cache, kernel, root


def kernels() -> int:
    """List the kernels: built or not, release, size."""
    for name in kernel.NAMES:
        found = kernel.find(name)
        if found is None:
            print(f"{name:<12}not built")
        else:
            print(f"{name:<12}{found.release:<26}{_mib(cache.size(found.share)):>8}")
    return 0


def build(names: Sequence[str], source: Path | None) -> int:
    """Build the named kernels, or those that the environment's KERNELS says, and the guest's root.

    A source is for the kernels of its series; without names, these are built.
    """
    wanted = list(names) or kernel.chosen()
    if source is not None:
        with cache.locked():
            series = kernel.select(source)
        wanted = list(names) or [name for name in wanted if kernel.series(name) == series]
    if root.find() and all(map(kernel.find, wanted)):
        print(f"nothing to build: {', '.join(wanted)} and the guest's root are there")
    else:
        with cache.locked():
            for name in wanted:
                kernel.build(name)
            root.build()
            if all(map(kernel.find, kernel.chosen())):
                kernel.clean()
    print(f"cache: {cache.directory()}, {_mib(cache.size(cache.directory()))}")
    return 0


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
