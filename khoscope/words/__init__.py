# SPDX-License-Identifier: LGPL-2.1-or-later
"""How khoscope reports what it cannot do, and how it shows text that is not its own."""
