# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What kernels hand each other: keys and stamps, serialized layouts, FDTs.

The ground floor: pure arithmetic and decoding, which knows nothing of drgn or of facts.
"""
