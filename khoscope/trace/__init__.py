# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follow calls of KHO as they happen: kernel events become facts, the checks decide."""
