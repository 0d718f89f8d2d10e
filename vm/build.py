# SPDX-License-Identifier: LGPL-2.1-or-later
"""The subcommands `kernels` and `build`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vm import arm64, cache, kernel, root, stock

#: All kernels that are built.
NAMES = [*kernel.NAMES, *arm64.NAMES, kernel.STOCK]
#: What the images of the guest's root have besides the packages of all of them.
ROOTS = [(), root.SYSTEMD]


def kernels() -> int:
    """List the kernels: built or not, release, size."""
    for name in NAMES:
        found = _find(name)
        if found is None:
            print(f"{name:<20}not built")
        else:
            print(f"{name:<20}{found.release:<32}{_mib(cache.size(found.share)):>8}")
    return 0


def build(names: Sequence[str], source: Path | None) -> int:
    """Build kernels and the guest's roots.

    Without names, this builds the kernels that the environment variable KERNELS names. A source
    applies to the kernels of its series; with a source but no names, only those are built.
    """
    wanted = list(names) or kernel.chosen(NAMES)
    if source is not None:
        with cache.locked():
            series = kernel.select(source)
        wanted = list(names) or [name for name in wanted if kernel.series(name) == series]
    if all(map(root.find, ROOTS)) and all(map(_find, wanted)):
        print(f"nothing to build: {', '.join(wanted)} and the guest's roots are there")
    else:
        with cache.locked():
            for name in wanted:
                _maker(name).build(name)
            for more in ROOTS:
                root.build(more)
            if all(map(_find, kernel.chosen(NAMES))):
                kernel.clean()
                arm64.clean()
    print(f"cache: {cache.directory()}, {_mib(cache.size(cache.directory()))}")
    return 0


def _find(name: str) -> kernel.Kernel | None:
    found: kernel.Kernel | None = _maker(name).find(name)
    return found


def _maker(name: str) -> ModuleType:
    """The module that builds the kernel."""
    return stock if name == kernel.STOCK else arm64 if name in arm64.NAMES else kernel


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
