# SPDX-License-Identifier: LGPL-2.1-or-later
"""
drgn's plugin: ``%kho``, khoscope's command line on the program of a drgn session.

drgn imports this module whenever it opens a program of any kind. The module imports the rest of
khoscope only when the command is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drgn import Program, ProgramFlags
from drgn.commands import custom_command, parse_shell_command

from . import DRGN_COMMAND


def _has_kho(prog: Program) -> bool:
    try:
        return bool(prog.flags & ProgramFlags.IS_LINUX_KERNEL) and "kho_out" in prog
    except ValueError:
        # The BTF makes no sense (BtfError). The command says so when it is used.
        return True


@custom_command(
    name=DRGN_COMMAND,
    description="what Kexec HandOver carries across a kexec, and whether it is right (khoscope)",
    usage=f"**{DRGN_COMMAND}** [**-h**] *COMMAND* ...",
    long_description=f"""
    Run khoscope's command line on the program of this session, with the same commands, options and
    output. %{DRGN_COMMAND} -h lists the commands; %{DRGN_COMMAND} *COMMAND* -h lists the options of
    one command.

    Return the exit status: 0 fine, 1 verify found an error, 2 khoscope could not do it, 3 no
    verdict: verify found nothing wrong, but could not see everything.
    """,
    parse=parse_shell_command,
    enabled=_has_kho,
)
def _kho(prog: Program, name: str, args: Sequence[str], **more: Any) -> int:
    from .cli import parser_for, perform

    try:
        return perform(parser_for(prog), args)
    except SystemExit as ended:
        # argparse has said why.
        return int(ended.code or 0)
