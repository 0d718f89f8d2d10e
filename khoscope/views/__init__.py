# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views render facts and findings. They compute nothing."""
