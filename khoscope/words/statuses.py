# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Exit statuses: fine; found an error; could not do it; found nothing wrong, but could not see
everything.
"""

from __future__ import annotations

FINE, FOUND, UNABLE, NO_VERDICT = 0, 1, 2, 3
