# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all tests share."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

from khoscope.cli import main
from tests.command import Result, Run

# A loaded machine is slow, and no test depends on time.
settings.register_profile(
    "khoscope", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
# `make fuzz`: other cases each time, wherever it runs.
settings.register_profile(
    "long", settings.get_profile("khoscope"), max_examples=20 * 60, derandomize=False
)
settings.load_profile("khoscope")

# A script that starts the tests in the background has them ignore these, and with them all the
# programs that they start to interrupt them.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs khoscope in this process."""

    def run(*words: object) -> Result:
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run
