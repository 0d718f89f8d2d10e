# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes of memory in words."""

from __future__ import annotations


def human(size: int) -> str:
    """Bytes with a binary unit."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    unit = min(max(size.bit_length() - 1, 0) // 10, len(units) - 1)
    value = size / (1 << 10 * unit)
    return f"{value:.0f} {units[unit]}" if value == int(value) else f"{value:.1f} {units[unit]}"
