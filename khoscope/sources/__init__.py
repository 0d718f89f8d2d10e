# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sources read a kernel and give a Snapshot.  Only sources import drgn."""
