# SPDX-License-Identifier: LGPL-2.1-or-later
"""
See what Kexec HandOver carries across a kexec, and check that it arrived intact.

In drgn, ``import khoscope`` offers the functions of :mod:`khoscope.helpers`, and the command
``%kho`` (:mod:`khoscope.plugin`).
"""

import sys


def _is_started() -> bool:
    """Whether this process is ``khoscope``, and not somebody's who imports it."""
    if sys.argv[:1] == ["-m"]:
        # Python looks for the module to run, and has not named it yet.
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return sys.argv[:1] != [] and sys.argv[0].rpartition("/")[2] == __name__


if _is_started():
    # Until all is imported there is nothing to tidy up: Ctrl-C just ends it, without a traceback.
    # A shell has the jobs that a script starts in the background ignore it; whoever sends it to
    # such a job wants it to end like any other.
    # What is built in takes no time to import; signal itself does.
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
    # On first use: looking at a snapshot file needs no drgn.
    if name == "btf":
        import importlib

        return importlib.import_module(".sources.btf", __name__)
    if not {"kho", "luo"}.isdisjoint(name.split("_")) or name == "KhoBlock":
        import importlib

        helpers = importlib.import_module(".helpers", __name__)
        if name in helpers.__all__:
            return getattr(helpers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
