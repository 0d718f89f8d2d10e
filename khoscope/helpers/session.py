# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope shell``: drgn's own session, with the KHO helpers loaded."""

from __future__ import annotations

from typing import Any

from drgn import Program
from drgn.cli import run_interactive

from .. import DRGN_COMMAND, helpers


def run(prog: Program) -> None:
    """Run the session until the user leaves."""

    def banner(text: str) -> str:
        names = ", ".join(helpers.__all__)
        return (
            f"{text}\nKHO helpers (help(NAME) explains each): {names}"
            f"\nkhoscope's command line: %{DRGN_COMMAND}"
        )

    def names(existing: dict[str, Any]) -> dict[str, Any]:
        return existing | {name: getattr(helpers, name) for name in helpers.__all__}

    run_interactive(prog, banner_func=banner, globals_func=names)
