# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views of ``khoscope trace``, one module for each kind of output."""
