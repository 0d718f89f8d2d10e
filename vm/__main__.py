# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m vm`: kernels with KHO in a virtual machine."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vm import build, kernel
from vm.cache import BuildError
from vm.exercise import SCENARIOS, ExerciseError
from vm.fossil import fossil
from vm.machine import NAMES, Machine, MachineError
from vm.record import record
from vm.scenario import scenario
from vm.shell import shell


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, and return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    arguments = _parser().parse_args(argv)
    try:
        match arguments.command:
            case "kernels":
                return build.kernels()
            case "build":
                return build.build(arguments.kernel, arguments.source)
            case "shell":
                shell(arguments.kernel, arguments.accel)
                return 0
            case "run":
                return _run(arguments.kernel, arguments.words, arguments.accel)
            case "scenario":
                return scenario(arguments.kernel, arguments.name, arguments.accel)
            case "fossil":
                return fossil(arguments.kernel, arguments.accel)
            case _:
                return record(arguments.accel)
    except (BuildError, MachineError, ExerciseError) as error:
        print(f"python -m vm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list the kernels and whether each is built")
    builder = commands.add_parser("build", help="build kernels and the guest's roots")
    builder.add_argument(
        "kernel",
        nargs="*",
        choices=[*build.NAMES, []],
        metavar="KERNEL",
        help=f"one or more of {', '.join(build.NAMES)} (default: the kernels and series that the "
        "environment variable KERNELS names; if it is not set, all but those of "
        f"{' and '.join(kernel.ARCHIVED)})",
    )
    builder.add_argument(
        "--source",
        type=Path,
        help=f"a tree of linux {' or '.join(kernel.SERIES)}, a tarball of one, or Debian's package "
        "of one. It is remembered for later builds of that series "
        f"(initial default: the newest {kernel.PACKAGE}SERIES of {kernel.SUITE})",
    )

    boots = argparse.ArgumentParser(add_help=False)
    boots.add_argument(
        "--accel",
        choices=["kvm", "tcg"],
        help="the accelerator (default: kvm if a guest can run on it, else tcg)",
    )

    def one(names: Sequence[str]) -> argparse.ArgumentParser:
        one = argparse.ArgumentParser(add_help=False, parents=[boots])
        listed = f"one of {', '.join(names)}"
        one.add_argument("kernel", choices=names, metavar="KERNEL", help=listed)
        return one

    any_kernel = one(NAMES)
    commands.add_parser(
        "shell", parents=[any_kernel], help="boot to a root shell; Ctrl-D ends the VM"
    )
    runner = commands.add_parser(
        "run",
        parents=[any_kernel],
        usage="%(prog)s [--accel {kvm,tcg}] KERNEL -- COMMAND [ARGUMENT ...]",
        help="boot, run one command, and pass on its output and exit status",
    )
    runner.add_argument("words", nargs="+", metavar="COMMAND")
    scenarios = commands.add_parser(
        "scenario",
        parents=[one(kernel.NAMES)],
        help="take each kind of memory across a kexec, and print a table of what happened",
    )
    scenarios.add_argument(
        "name",
        nargs="*",
        choices=[*SCENARIOS, []],
        metavar="NAME",
        help=f"one or more of {', '.join(SCENARIOS)} (default: all)",
    )
    commands.add_parser(
        "fossil",
        parents=[one(kernel.NAMES)],
        help="make vmcores for tests/fossils, with the pages alone that khoscope reads",
    )
    commands.add_parser("record", parents=[boots], help="make the snapshots of khoscope demo")
    return parser


def _run(name: str, words: Sequence[str], accel: str | None) -> int:
    with Machine(name, accel=accel) as machine:
        print(
            f"{name} booted in {machine.boot_seconds:.1f} s with {machine.accel}", file=sys.stderr
        )
        result = machine.run(words, timeout=math.inf)
    for stream, text in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
        stream.buffer.write(text.encode(errors="surrogateescape"))
    # A shell reports a signal the same way.
    return 128 - result.returncode if result.returncode < 0 else result.returncode


if __name__ == "__main__":
    sys.exit(main())
