# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope trace``, by what they print while it goes on."""
