# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A loaded machine is slow, and no test depends on time.
settings.register_profile(
    "khoscope", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
# `make fuzz`: other cases each time, wherever it runs.
settings.register_profile(
    "long", settings.get_profile("khoscope"), max_examples=20 * 60, derandomize=False
)
settings.load_profile("khoscope")
