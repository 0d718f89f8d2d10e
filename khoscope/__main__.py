# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope``, and ``python -m khoscope``."""

import signal
import sys


def main() -> int:
    """Import the command line, and run it."""
    # khoscope/__init__.py does this, too, unless another program imported it. The command line
    # sets its own handlers later.
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from .cli import main as run
    except ImportError as error:
        from .words.errors import not_whole, say
        from .words.statuses import UNABLE

        lacking = not_whole(error)
        say(lacking.what, lacking.hint)
        return UNABLE
    return run()


if __name__ == "__main__":
    sys.exit(main())
