# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels with KHO in a virtual machine: build them, boot them, and exercise KHO in them."""
