# SPDX-License-Identifier: LGPL-2.1-or-later
"""
KHO helpers for drgn sessions and scripts.

As in ``drgn.helpers.linux``, there is a module for each of the kernel's files.
:mod:`khoscope.helpers.facts` is khoscope's own.

``khoscope shell`` loads the helpers.  Elsewhere, use ``import khoscope``.
"""

from . import facts, kexec_handover, luo
from .facts import *  # noqa: F403
from .kexec_handover import *  # noqa: F403
from .luo import *  # noqa: F403

__all__ = (*kexec_handover.__all__, *luo.__all__, *facts.__all__)
