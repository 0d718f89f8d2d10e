# SPDX-License-Identifier: LGPL-2.1-or-later
"""
khoscope in the guest, on a kernel that has less than this one.

It is made to believe that kho_restore_page() is inlined, and that there is no
kho_unpreserve_folio() and no BPF instruction may_goto.
"""

from __future__ import annotations

import sys

from khoscope.cli import main
from khoscope.sources.kernel import KernelSource, Signature
from khoscope.trace.probes import Probes

_ABSENT = {"kho_restore_page", "kho_unpreserve_folio"}
_signature = KernelSource.signature


def signature(self: KernelSource, function: str) -> Signature | None:
    return None if function in _ABSENT else _signature(self, function)


if __name__ == "__main__":
    KernelSource.signature = signature  # type: ignore[method-assign]
    Probes._has_may_goto = False  # type: ignore[assignment]
    sys.exit(main())
