# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m vm`: kernels with KHO in a virtual machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vm import build, kernel
from vm.cache import BuildError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels and whether each is built")
    builder = commands.add_parser("build", help="build kernels and the guest's root")
    builder.add_argument(
        "kernel", nargs="*", choices=[*kernel.KERNELS, []], help="which kernels (all)"
    )
    builder.add_argument(
        "--source",
        type=Path,
        help="a kernel tree, a tarball or Debian's package of one; remembered for later builds "
        f"(at first: the newest {kernel.PACKAGE} of {kernel.SUITE})",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "kernels":
            return build.kernels()
        return build.build(arguments.kernel, arguments.source)
    except BuildError as error:
        print(f"python -m vm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
