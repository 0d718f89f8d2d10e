# SPDX-License-Identifier: LGPL-2.1-or-later
"""
See what Kexec HandOver carries across a kexec, and check that it arrived intact.

In drgn, ``import khoscope`` offers the functions of :mod:`khoscope.helpers`, and the command
``%kho`` (:mod:`khoscope.plugin`).
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # On first use: looking at a snapshot file needs no drgn.
    if not {"kho", "luo"}.isdisjoint(name.split("_")) or name == "KhoBlock":
        helpers = importlib.import_module(".helpers", __name__)
        if name in helpers.__all__:
            return getattr(helpers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
