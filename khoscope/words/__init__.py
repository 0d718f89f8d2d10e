# SPDX-License-Identifier: LGPL-2.1-or-later
"""How khoscope says what it cannot do, and shows text that is not its own."""
