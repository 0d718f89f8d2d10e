# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Live Update Orchestrator
------------------------

Helpers for the Live Update Orchestrator (LUO): ``kernel/liveupdate/luo_session.c`` and
``kernel/liveupdate/luo_internal.h``.  This module depends on nothing but drgn.
"""

from __future__ import annotations

from collections.abc import Iterator

from drgn import Object, Program
from drgn.helpers.common.prog import takes_program_or_default
from drgn.helpers.linux.list import validate_list_for_each_entry

__all__ = ("luo_session_for_each",)


@takes_program_or_default
def luo_session_for_each(prog: Program, *, incoming: bool = False) -> Iterator[Object]:
    """
    Iterate over the sessions that would be handed to the next kernel.

    >>> for session in luo_session_for_each():
    ...     print(session.name.string_(), int(session.file_set.count))
    ...
    b'vm1' 2

    :param incoming: Iterate instead over the sessions that this kernel was handed and that nobody
        has finished.  The list is empty until ``/dev/liveupdate`` is opened for the first time.
    :return: Iterator of ``struct luo_session *`` objects.
    :raises ValidationError: if the list is not valid, or changes during the iteration
    """
    sessions = prog["luo_session_global"]
    header = sessions.incoming if incoming else sessions.outgoing
    return validate_list_for_each_entry("struct luo_session", header.list.address_of_(), "list")
