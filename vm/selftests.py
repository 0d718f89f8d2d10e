# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The kernel's own selftests of live update (tools/testing/selftests/liveupdate), compiled from its
source: programs that run in any guest of their series, as /kernel/selftests/NAME.
"""

from __future__ import annotations

import os
from pathlib import Path

from vm import cache
from vm.cache import Log

# Part of the key: increase it when the recipe below changes what it makes.
_RECIPE = "1"

_SELFTESTS = "tools/testing/selftests"
#: What the selftests are compiled of, besides the headers of the C library.
_FILES = [
    *(f"*/{_SELFTESTS}/liveupdate/*", f"*/{_SELFTESTS}/kselftest*.h", f"*/{_SELFTESTS}/lib.mk"),
    *("*/include/uapi/linux/liveupdate.h", "*/scripts/subarch.include"),
]


def entry(source: Path, compiler: str) -> Path:
    """The cache entry of the selftests, whether it exists or not.

    :param source: entry of the kernel's source
    :param compiler: the compiler's version text
    """
    return cache.entry("selftests", cache.digest(_RECIPE, compiler, source.name))


def build(source: Path, compiler: str) -> Path:
    """The entry, which is made now if it is missing. Call this inside `cache.locked()`.

    :param source: as of :func:`entry`
    :param compiler: as of :func:`entry`
    """
    final = entry(source, compiler)
    if not final.exists():
        with Log("selftests") as log:
            cache.make(final, lambda to: _compile(source, to, log))
    return final


def _compile(source: Path, to: Path, log: Log) -> None:
    tree, made = to / "linux", to / "made"
    for directory in (tree, made):
        directory.mkdir()
    archive, into = source / "linux.tar", ("-C", tree, "--strip-components=1")
    with log.step("unpacking the selftests of live update"):
        log.run(["tar", "-xf", archive, *into, "--wildcards", *_FILES])
    with log.step("compiling them"):
        # The kernel's Makefile expects what "make headers" makes of its own headers. The machine
        # has them all but for one, in which that changes the name of the guard alone.
        variables = [f"KHDR_INCLUDES=-isystem {tree / 'include/uapi'}", f"OUTPUT={made}"]
        # Static, as the guest's C library is another one.
        log.run(["make", "-C", tree / _SELFTESTS / "liveupdate", *variables, "LDFLAGS=-static"])
    for program in sorted(made.iterdir()):
        if program.is_file() and os.access(program, os.X_OK):
            program.rename(to / program.name)
    for directory in (tree, made):
        cache.remove(directory)
