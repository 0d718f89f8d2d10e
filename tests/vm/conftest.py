# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines for the tests. A kernel that is not built is a failure that says how to build it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm.machine import Machine


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A running guest that the tests of one module share; they leave it as they found it."""
    with Machine("7.2-base") as machine:
        yield machine
