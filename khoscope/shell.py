# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope shell``: drgn's own session, with the KHO helpers loaded."""

from __future__ import annotations

from typing import Any

from drgn.cli import run_interactive

from . import helpers
from .sources.kernel import KernelSource


def run(source: KernelSource) -> None:
    """Until the user leaves."""
    helpers.use(source)

    def banner(text: str) -> str:
        names = ", ".join(helpers.__all__)
        return f"{text}\nKHO helpers (help(NAME) explains each): {names}"

    def names(existing: dict[str, Any]) -> dict[str, Any]:
        return existing | {name: getattr(helpers, name) for name in helpers.__all__}

    run_interactive(source.prog, banner_func=banner, globals_func=names)
