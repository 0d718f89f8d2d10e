# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels with KHO in a virtual machine: building them, booting them, exercising KHO in them."""
