# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find bcc, which is not on PyPI, or say in two lines why it cannot be used."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ..words.errors import KhoscopeError

#: What bcc must have; the message names what a version lacks.
_NEEDED = ("ring_buffer_poll", "support_kfunc")


def import_bcc() -> Any:
    """
    bcc's Python module, a distribution package.

    :raises KhoscopeError: if it is not there or lacks what khoscope needs.
    """
    try:
        bcc = importlib.import_module("bcc")
    except (ImportError, OSError, AttributeError) as error:
        # A library of another version may lack functions, and then the import fails.
        raise KhoscopeError(
            f"bcc is not there for {sys.executable} ({error})",
            "install python3-bpfcc (it is not on PyPI), and make khoscope's virtual environment"
            " with --system-site-packages",
        ) from error
    lacks = [name for name in _NEEDED if not hasattr(getattr(bcc, "BPF", None), name)]
    if lacks:
        version = getattr(bcc, "__version__", "of an unknown version")
        raise KhoscopeError(
            f"bcc {version} is too old: it has no BPF.{lacks[0]}",
            "install a newer python3-bpfcc; 0.35 is known to work",
        )
    return bcc
