# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests that throw garbage at whatever reads what others wrote: many cases of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import pytest
from hypothesis import settings

T = TypeVar("T", bound=Callable[..., Any])

#: Cases of such a test for each one of another property; all of them together are 10,000.
TIMES: Final = 11


def fuzz(test: T) -> T:
    """Mark a test as one of those, above ``@given``."""
    many = settings(max_examples=TIMES * settings().max_examples)
    return pytest.mark.fuzz(many(test))
