# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parse, pick a source, a check set and a view."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, checks, store
from .calls import Kind, Symbols, Tracing
from .errors import KhoscopeError
from .snapshot import Snapshot
from .views import json as json_view
from .views.progress import Progress
from .views.select import Filter
from .views.text import LIMIT, Text

if TYPE_CHECKING:
    from drgn import Program

    from .sources.kernel import KernelSource
    from .trace.session import View

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

#: The clock of ``bpf_ktime_get_ns()``.
CLOCK = time.CLOCK_MONOTONIC

#: Exit statuses (design: 0 fine, 1 found an error, 2 could not do it).
FINE, FOUND, UNABLE = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without Unicode gets an arrow as \u2192, not a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parse(argv)
        command: Callable[[argparse.Namespace], int] = args.command
        status = command(args)
        sys.stdout.flush()
        return status
    except KhoscopeError as error:
        print(f"khoscope: {error.what}\nkhoscope: {error.hint}", file=sys.stderr)
        return UNABLE
    except BrokenPipeError:
        return _die_of(signal.SIGPIPE)
    except OSError as error:
        # What reads and writes files says so itself: this is what we print to.
        print(f"khoscope: cannot write: {error.strerror or error}", file=sys.stderr)
        print("khoscope: see where the output goes", file=sys.stderr)
        return UNABLE
    except KeyboardInterrupt:
        print("khoscope: interrupted", file=sys.stderr)
        return _die_of(signal.SIGINT)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    top = parser()
    args = top.parse_args(argv)
    if args.snapshot and args.type_shift is not None:
        top.error("--type-shift is for kernels: a snapshot's blocks are decoded already")
    if args.command is _trace and (args.snapshot or args.qemu or args.core):
        top.error("trace follows the running kernel, or a recording (--replay)")
    if args.command is _trace and args.replay:
        live = {"-d": args.duration, "-i": args.interval, "--probe": args.probe}
        live |= {"--buffer": args.buffer, "--type-shift": args.type_shift}
        for option, value in live.items():
            if value is not None:
                top.error(f"{option} is for the running kernel, not for a recording")
    if args.snapshot and args.command is _snapshot and args.before:
        top.error("a snapshot does not hold the pages of another: --before needs a kernel")
    return args


def _die_of(number: signal.Signals) -> int:
    """End as the signal would have ended us, so that a shell sees what happened."""
    # What is still buffered has nobody to go to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return UNABLE


def parser() -> argparse.ArgumentParser:
    """The options and commands."""
    top = argparse.ArgumentParser(
        prog="khoscope",
        description="See what Kexec HandOver carries across a kexec, and check that it arrived.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  sudo khoscope tree                          what this kernel would hand over
  sudo khoscope verify                        is it safe to kexec with that?
  sudo khoscope snapshot before.khosnap       keep the facts, then kexec, then
  sudo khoscope verify --before before.khosnap
  sudo khoscope trace                         calls of KHO as they happen
  khoscope --qemu guest.qmp --vmlinux vmlinux tree
  khoscope --core vmcore --vmlinux vmlinux verify

exit status: 0 fine, 1 verify or trace --check found an error, 2 could not do it""",
    )
    top.add_argument("--version", action="version", version=f"khoscope {__version__}")
    source = top.add_mutually_exclusive_group()
    source.add_argument(
        "--live", action="store_true", help="the running kernel, /proc/kcore (default)"
    )
    source.add_argument("--qemu", metavar="SOCKET", help="a QEMU guest, by its QMP socket")
    source.add_argument("--core", metavar="FILE", type=Path, help="a vmcore")
    source.add_argument("--snapshot", metavar="FILE", type=Path, help="a .khosnap file")
    top.add_argument("--vmlinux", metavar="FILE", type=Path, help="debug info of the kernel")
    top.add_argument(
        "--type-shift",
        metavar="BIT",
        type=_type_shift,
        help="key bit of the page type, or 'none': overrides what debug info says",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    tree = commands.add_parser("tree", help="what the radix tree holds")
    tree.set_defaults(command=_tree)
    _output(tree, "block")
    tree.add_argument("--order", type=int, help="only blocks of this order")
    tree.add_argument("--type", choices=["contig", "split"], help="only blocks of this type")
    tree.add_argument(
        "--phys", type=_range, metavar="ADDR[..END]", help="only blocks that share this memory"
    )
    tree.add_argument("--nodes", action="store_true", help="show the tree's own nodes, too")
    tree.add_argument(
        "--incoming",
        action="store_true",
        help="the tree that this kernel was handed, as far as it is still there",
    )

    verify = commands.add_parser("verify", help="run the checks")
    verify.set_defaults(command=_verify)
    _output(verify)
    verify.add_argument(
        "--before", metavar="FILE", type=Path, help="snapshot of the kernel that handed over"
    )

    snapshot = commands.add_parser("snapshot", help="write all facts to a file")
    snapshot.set_defaults(command=_snapshot)
    _output(snapshot)
    snapshot.add_argument("file", metavar="FILE", type=Path)
    snapshot.add_argument(
        "--before", metavar="FILE", type=Path, help="also look at the pages that FILE recorded"
    )

    diff = commands.add_parser("diff", help="what changed between two snapshots")
    diff.set_defaults(command=_diff)
    _output(diff, "block")
    diff.add_argument("a", metavar="A", type=Path)
    diff.add_argument("b", metavar="B", type=Path)

    _trace_parser(commands)

    shell = commands.add_parser("shell", help="drgn session with prog and the kho_* helpers")
    shell.set_defaults(command=_shell)

    demo = commands.add_parser("demo", help="what khoscope shows; needs no root and no KHO")
    demo.set_defaults(command=_demo)
    demo.add_argument("--json", action="store_true", help="one JSON document")
    return top


def _trace_parser(commands: _Commands) -> None:
    trace = commands.add_parser(
        "trace",
        help="follow preserve, unpreserve, split and restore as they happen",
        description="""\
Follow KHO's calls as they happen, and check every block: the refcounts of its
pages against the type that is recorded or stamped.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  khoscope trace                       one line per call, until Ctrl-C
  khoscope trace --check -d 30         for 30 seconds, then say how it went
  khoscope trace --stacks -c kexecd    with kernel stacks, of one command only
  khoscope trace --summary -i 1        totals and latencies, every second
  khoscope trace --only restore --before before.khosnap
                                       after the kexec: against what was there
                                       before it
  khoscope trace --record a.khotrace   keep it
  khoscope trace --replay a.khotrace   show and check it, anywhere

exit status: 0 fine, 1 --check found an error or missed something, 2 could not
do it""",
    )
    trace.set_defaults(command=_trace)
    kind = _output(trace, "call")
    kind.add_argument("--summary", action="store_true", help="totals by client, not each call")
    trace.add_argument(
        "--check", action="store_true", help="exit status 1 if anything was wrong, or missed"
    )
    trace.add_argument("--stacks", action="store_true", help="the kernel stack of each call")
    trace.add_argument(
        "-d", "--duration", type=_seconds, metavar="SECONDS", help="end after so long"
    )
    trace.add_argument(
        "-i",
        "--interval",
        type=_seconds,
        metavar="SECONDS",
        help="with --summary: print it every so often",
    )
    trace.add_argument("-p", "--pid", type=_pid, help="only calls by this process")
    trace.add_argument("-c", "--comm", help="only calls by processes of this name")
    trace.add_argument(
        "--only",
        type=_kinds,
        metavar="KIND,…",
        help=f"only calls that {', '.join(Kind)}",
    )
    trace.add_argument(
        "--min-order",
        type=_order,
        default=0,
        metavar="N",
        help="only blocks of this order and above",
    )
    trace.add_argument(
        "--before", metavar="FILE", type=Path, help="snapshot of the kernel that handed over"
    )
    files = trace.add_mutually_exclusive_group()
    files.add_argument(
        "--record", metavar="FILE", type=Path, help="write the events to a file, too"
    )
    files.add_argument("--replay", metavar="FILE", type=Path, help="show recorded events")
    trace.add_argument("--probe", choices=["fentry", "kprobe"], help="this kind of probe only")
    trace.add_argument(
        "--buffer",
        type=_kibibytes,
        metavar="KIB",
        help="size of the event buffer, a power of two (default 16384)",
    )
    trace.add_argument(
        "-v", "--verbose", action="store_true", help="what the compiler and the verifier say"
    )


def _output(
    command: argparse.ArgumentParser, lines: str | None = None
) -> argparse._MutuallyExclusiveGroup:
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="one JSON document")
    if lines:
        kind.add_argument("--jsonl", action="store_true", help=f"one JSON object per {lines}")
    command.add_argument(
        "--limit",
        type=_limit,
        default=LIMIT,
        metavar="N",
        help=f"rows of each list as text, 0 for all (default {LIMIT})",
    )
    return kind


def _limit(text: str) -> int | None:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number or None


def _type_shift(text: str) -> int:
    number = -1 if text == "none" else int(text)
    if text != "none" and not 0 <= number < 64:
        raise ValueError(text)
    return number


def _range(text: str) -> tuple[int, int]:
    first, dots, end = text.partition("..")
    start = int(first, 0)
    stop = int(end, 0) if dots else start + 1
    if not 0 <= start < stop <= 1 << 64:
        raise ValueError(text)
    return start, stop


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text}: not a time that ends")
    return number


def _pid(text: str) -> int:
    number = int(text)
    if not 0 < number <= 1 << 22:
        raise argparse.ArgumentTypeError(f"{text}: not a process")
    return number


def _order(text: str) -> int:
    number = int(text)
    if not 0 <= number < 64:
        raise argparse.ArgumentTypeError(f"{text}: not an order")
    return number


def _kibibytes(text: str) -> int:
    number = int(text)
    if not 4 <= number <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text}: choose 4 to {1 << 20}")
    return number << 10


def _kinds(text: str) -> frozenset[Kind]:
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word not in list(Kind)]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: choose among {', '.join(Kind)}")
    return frozenset(map(Kind, words))


def _program(args: argparse.Namespace) -> tuple[Program, str, bool]:
    """The kernel that was asked for, how it is read, and whether it runs meanwhile."""
    from .sources.open import open_core, open_live, open_qemu

    if args.qemu:
        return open_qemu(args.qemu, args.vmlinux), f"QEMU guest at {args.qemu}", True
    if args.core:
        return open_core(args.core, args.vmlinux), f"vmcore {args.core}", False
    return open_live(args.vmlinux), "live kernel, /proc/kcore", True


def _kernel(args: argparse.Namespace, progress: Progress) -> KernelSource:
    from .sources.kernel import KernelSource, Overrides

    return KernelSource(*_program(args), Overrides(args.type_shift), progress)


def _facts(args: argparse.Namespace, before: Snapshot | None = None) -> Snapshot:
    """All facts from the source that was asked for."""
    if args.snapshot:
        return store.load_file(args.snapshot)
    with Progress(sys.stderr) as progress:
        return _kernel(args, progress).snapshot(before)


def _tree(args: argparse.Namespace) -> int:
    if args.snapshot:
        facts = store.load_file(args.snapshot)
    else:
        with Progress(sys.stderr) as progress:
            facts = _kernel(args, progress).tree()
    which = "incoming" if args.incoming else "outgoing"
    side = facts.incoming if args.incoming else facts.outgoing
    if side is None:
        raise KhoscopeError(
            "this kernel was not handed anything: there is no incoming tree",
            "ask in a kernel that was kexec'ed with KHO on, or leave --incoming out",
        )
    wanted = Filter(args.order, args.type, args.phys)
    if args.json:
        json_view.write_tree(facts, side.tree, which, wanted, args.nodes, sys.stdout)
    elif args.jsonl:
        json_view.write_block_lines(facts, side.tree, wanted, sys.stdout)
    else:
        Text(sys.stdout, args.limit).tree(facts, side.tree, which, wanted, args.nodes)
    return FINE


def _verify(args: argparse.Namespace) -> int:
    before = store.load_file(args.before) if args.before else None
    facts = _facts(args, before)
    report = checks.check(facts) if before is None else checks.compare(before, facts)
    if args.json:
        json_view.write_verify(facts, report, sys.stdout)
    else:
        Text(sys.stdout, args.limit).verify(facts, report)
    if report.errors:
        return FOUND
    if report.incomplete:
        raise KhoscopeError(
            f"no verdict: {'; '.join(report.incomplete)}",
            "let the clients of KHO come to rest, or give a source that has all struct pages, and "
            "run it again",
        )
    return FINE


def _snapshot(args: argparse.Namespace) -> int:
    before = store.load_file(args.before) if args.before else None
    facts = _facts(args, before)
    store.save_file(facts, args.file)
    if args.json:
        json_view.write_snapshot(facts, args.file, sys.stdout)
    else:
        Text(sys.stdout, args.limit).snapshot(facts, args.file)
    return FINE


def _diff(args: argparse.Namespace) -> int:
    a, b = store.load_file(args.a), store.load_file(args.b)
    if args.json:
        json_view.write_diff(a, b, sys.stdout)
    elif args.jsonl:
        json_view.write_diff_lines(a, b, sys.stdout)
    else:
        Text(sys.stdout, args.limit).diff(a, b)
    return FINE


def _trace(args: argparse.Namespace) -> int:
    from .trace.before import Before
    from .trace.record import Recorder, load
    from .trace.select import Wanted
    from .trace.session import Session

    wanted = Wanted(args.only or frozenset(Kind), args.pid, args.comm, args.min_order)
    before = Before(store.load_file(args.before)) if args.before else None
    if args.replay:
        recording = load(args.replay)
        view = _trace_view(args, recording.symbols)
        session = Session(recording.tracing, wanted, view, before)
        return _judged(args, session.replay(recording))

    from .trace.assemble import Assembler
    from .trace.probes import BUFFER, CLIENT_FRAMES, STACK_FRAMES, Probes

    with Progress(sys.stderr) as progress:
        source = _kernel(args, progress)
        facts = source.tree()
    frames = STACK_FRAMES if args.stacks else CLIENT_FRAMES
    probes = Probes(source, wanted, args.probe, frames, args.buffer or BUFFER, args.verbose)
    assembler = Assembler(source.abi, source.layout, frames)
    interval = args.interval or (None if args.summary else 1.0)
    with contextlib.ExitStack() as stack:
        # A file that cannot be written is found out before anything is attached.
        recorder = stack.enter_context(Recorder(args.record, facts)) if args.record else None
        stack.enter_context(probes)
        started = time.clock_gettime_ns(CLOCK)
        tracing = Tracing(facts, probes.attached, probes.missing, probes.buffer, started)
        session = Session(tracing, wanted, _trace_view(args, probes.symbol), before)
        report = session.live(probes, assembler, recorder, args.duration, interval)
    return _judged(args, report)


def _trace_view(args: argparse.Namespace, symbols: Symbols) -> View:
    from .views import trace

    if args.json:
        return trace.JsonView(sys.stdout, symbols, args.stacks)
    if args.jsonl:
        return trace.JsonLines(sys.stdout, symbols, args.stacks)
    if args.summary:
        return trace.SummaryView(sys.stdout, symbols, args.limit)
    return trace.Lines(sys.stdout, symbols, args.stacks, args.limit)


def _judged(args: argparse.Namespace, report: checks.Report) -> int:
    return FINE if not args.check or report.passed else FOUND


def _shell(args: argparse.Namespace) -> int:
    if args.snapshot:
        raise KhoscopeError(
            "a snapshot holds facts, not memory: drgn has nothing to look at",
            "give --live, --qemu or --core",
        )
    if not sys.stdin.isatty():
        raise KhoscopeError(
            "the shell needs a terminal", "for a script, run drgn and `import khoscope` in it"
        )
    from .shell import run

    with Progress(sys.stderr) as progress:
        source = _kernel(args, progress)
    run(source)
    return FINE


def _demo(args: argparse.Namespace) -> int:
    from .demo import show

    show(sys.stdout, args.json)
    return FINE
