# SPDX-License-Identifier: LGPL-2.1-or-later
"""See what Kexec HandOver carries across a kexec, and check that it arrived intact."""

__version__ = "0.1.0"
