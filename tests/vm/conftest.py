# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines for the tests. A kernel that is not built is a failure that says how to build it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vm.kernel import NAMES
from vm.machine import Machine

#: The files whose groups take longest (docs/measured.md), which must not be left for the end: then
#: all other processors would wait for the last of them.
LONGEST = (
    "test_systemd",
    "test_trace_load",
    "test_machine",
    "test_rules",
    "test_carry",
    "test_clients",
    "test_trace_refusals",
    "test_btf",
    "test_drgn",
    "test_sessions",
    "test_trace",
    "test_khoscope",
)

#: What Machine says of a kernel that was started and has not come up, and of QEMU when it crashed.
NOT_UP = r"GuestHung: (booting|kexec): no end after|GuestDied: .*: QEMU has ended by SIGSEGV"


# Before pytest-xdist's own, which looks for the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Tests of one file on one kernel share a guest, and so a worker; pytest-xdist takes these groups
    in this order.
    """
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    for item in items:
        parameters = getattr(item, "callspec", None)
        kernels = (
            [] if parameters is None else [v for v in parameters.params.values() if v in NAMES]
        )
        item.add_marker(pytest.mark.xdist_group("-".join([item.path.stem, *kernels])))
        # A kernel that does not come up (docs/lab.md knows of one reason), or a crash of QEMU, says
        # nothing of what is tested.  All else that hangs is a failure.
        item.add_marker(pytest.mark.flaky(reruns=2, only_rerun=[NOT_UP]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What nothing else would say: that there are no groups, or that all kernels are not enough.

    Without groups each worker boots a guest for the same tests. Without parameters a test is
    skipped, which is right where it is about kernels that nobody asked for.
    """
    if os.environ.get("KERNELS", "all") == "all":
        for item in session.items:
            skips = [str(mark.kwargs.get("reason")) for mark in item.iter_markers("skip")]
            is_empty = any("empty parameter set" in why for why in skips)
            if is_empty and item.get_closest_marker("older_kernels") is None:
                raise pytest.UsageError(f"{item.nodeid} runs on none of all kernels")
    if hasattr(session.config, "workerinput"):
        lost = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if lost:
            raise pytest.UsageError(f"{lost[0]} is in no group: is it --dist loadgroup?")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the guests stood that did not come up: what is run once more would hide it."""
    for report in terminalreporter.stats.get("rerun", []):
        crash = getattr(report.longrepr, "reprcrash", None)
        terminalreporter.section(f"run once more: {report.nodeid}")
        terminalreporter.write_line(crash.message if crash else report.longreprtext)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A running guest that the tests of one module share; they leave it as they found it."""
    with Machine("7.2-base") as machine:
        yield machine
