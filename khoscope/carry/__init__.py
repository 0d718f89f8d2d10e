# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exception to read-only: khoscope creates a memfd and asks the kernel to preserve it."""
