# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts: what was read, where and when, and how files keep it.  No opinions."""
