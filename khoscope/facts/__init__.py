# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts: what was read, with where and when; and how that is kept in files.  No opinion."""
