# SPDX-License-Identifier: LGPL-2.1-or-later
"""
See what Kexec HandOver carries across a kexec, and check that it arrived intact.

In drgn, ``import khoscope`` offers the functions of :mod:`khoscope.helpers`, and the command
``%kho`` (:mod:`khoscope.plugin`).
"""

import sys


def _is_started() -> bool:
    """Whether this process runs ``khoscope`` itself, rather than a program that imports it."""
    if sys.argv[:1] == ["-m"]:
        # Python is still looking for the module to run, and has not put its name there yet.
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return sys.argv[:1] != [] and sys.argv[0].rpartition("/")[2] == __name__


if _is_started():
    # Until everything is imported there is nothing to tidy up, so Ctrl-C just ends the process,
    # without a traceback. If a script starts a job in the background, the shell makes the job
    # ignore SIGINT. Whoever sends SIGINT to such a job still wants the job to end.
    # _signal is built in and takes no time to import; signal does.
    import _signal  # type: ignore[import-not-found]

    if _signal.getsignal(_signal.SIGINT) in (_signal.default_int_handler, _signal.SIG_IGN):
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

#: khoscope's command line in a drgn session (:mod:`khoscope.plugin`), without its ``%``.
DRGN_COMMAND = "kho"


def __getattr__(name: str) -> "Any":
    # drgn is imported on first use, because looking at a snapshot file does not need it.
    from importlib import import_module

    if name == "btf":
        return import_module(".sources.btf", __name__)
    if not {"kho", "khoser", "luo"}.isdisjoint(name.split("_")) or name == "KhoBlock":
        helpers = import_module(".helpers", __name__)
        if name in helpers.__all__:
            return getattr(helpers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
