# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope``, and ``python -m khoscope``."""

import signal
import sys


def main() -> int:
    """Import the command line, and run it."""
    # Until all is imported there is nothing to tidy up: Ctrl-C just ends it, without a traceback.
    ends = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ends:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as run

    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
