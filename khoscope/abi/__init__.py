# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What kernels hand each other: keys and stamps, serialized layouts, FDTs.

The bottom layer: pure arithmetic and decoding.  It knows nothing about drgn or facts.
"""
