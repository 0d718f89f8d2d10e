# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exception to read-only: a memfd of khoscope's own that the kernel preserves."""
