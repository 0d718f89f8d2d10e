# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope trace``: follow KHO's calls as they happen."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING

from .. import checks
from ..facts.calls import CallKind, Symbols, Tracing
from ..views.progress import Progress
from . import common

if TYPE_CHECKING:
    from ..trace.session import View

#: The clock of ``bpf_ktime_get_ns()``.
CLOCK = time.CLOCK_MONOTONIC


def add(trace: argparse.ArgumentParser) -> None:
    trace.description = """\
Follow KHO's calls as they happen, and check every block: do the refcounts of
its pages fit the type that is recorded or stamped?"""
    trace.formatter_class = argparse.RawDescriptionHelpFormatter
    trace.epilog = """\
examples:
  khoscope trace                       one line per call, until Ctrl-C
  khoscope trace --check -d 30         trace for 30 seconds, then give a verdict
  khoscope trace --stacks -c kexecd    show kernel stacks, of one command only
  khoscope trace --summary -i 1        totals and latencies, every second
  khoscope trace --only restore --before before.khosnap
                                       after the kexec: compare with what was
                                       there before it
  khoscope trace --record a.khotrace   keep the events
  khoscope trace --replay a.khotrace   show and check them, on any machine

exit status: 0 fine, 1 --check found an error, 2 khoscope could not do it, 3 no
verdict: --check found nothing wrong, but something was missed"""
    trace.set_defaults(run=_run, refuse=_refuse)
    kind = common.output(trace, "call")
    kind.add_argument(
        "--summary",
        action="store_true",
        help="print totals by client instead of each call; they are counted in the kernel",
    )
    trace.add_argument(
        "--check",
        action="store_true",
        help="exit with status 1 if there was an error, or 3 if something was missed; print totals "
        "as --summary does, unless other options are about each call",
    )
    trace.add_argument("--stacks", action="store_true", help="print the kernel stack of each call")
    trace.add_argument(
        "-d", "--duration", type=_seconds, metavar="SECONDS", help="end after this many seconds"
    )
    trace.add_argument(
        "-i",
        "--interval",
        type=_seconds,
        metavar="SECONDS",
        help="with --summary: print a summary at this interval",
    )
    trace.add_argument("-p", "--pid", type=_pid, help="follow only calls by this process")
    trace.add_argument(
        "-c", "--comm", type=common.given, help="follow only calls by processes with this name"
    )
    trace.add_argument(
        "--only",
        type=_kinds,
        metavar="KIND,…",
        help=f"follow only these kinds of calls: {', '.join(CallKind)}",
    )
    trace.add_argument(
        "--min-order",
        type=_order,
        default=0,
        metavar="N",
        help="show only blocks of this order and above",
    )
    common.before_option(trace, "compare with this snapshot of the kernel that handed over")
    files = trace.add_mutually_exclusive_group()
    files.add_argument(
        "--record", metavar="FILE", type=common.path, help="also write the events to a file"
    )
    files.add_argument("--replay", metavar="FILE", type=common.path, help="show recorded events")
    trace.add_argument("--probe", choices=["fentry", "kprobe"], help="use only this kind of probe")
    trace.add_argument(
        "--buffer",
        type=_kibibytes,
        metavar="KIB",
        help="size of the event buffer, rounded down to a power of two (default 16384)",
    )
    trace.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,  # without it, the option before the command counts
        help="also print what the compiler and the verifier say",
    )


def _refuse(args: argparse.Namespace) -> str | None:
    if args.snapshot or args.qemu or args.core:
        return "trace follows the running kernel, or a recording (--replay)"
    if args.replay:
        live = {"-d": args.duration, "-i": args.interval, "--probe": args.probe}
        live |= {"--buffer": args.buffer, "--type-shift": args.type_shift}
        for option, value in live.items():
            if value is not None:
                return f"{option} is for the running kernel, not for a recording"
    return None


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


def _kinds(text: str) -> frozenset[CallKind]:
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word not in list(CallKind)]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: choose among {', '.join(CallKind)}")
    return frozenset(map(CallKind, words))


def _run(args: argparse.Namespace) -> int:
    from ..trace.before import Before
    from ..trace.call_filter import CallFilter
    from ..trace.record import Recorder, load
    from ..trace.session import TraceSession

    wanted = CallFilter(args.only or frozenset(CallKind), args.pid, args.comm, args.min_order)
    earlier = common.load_before(args)
    before = Before(earlier) if earlier else None
    if args.replay:
        recording = load(args.replay)
        view = _trace_view(args, recording.symbols)
        session = TraceSession(recording.tracing, wanted, view, before)
        return _judged(args, session.replay(recording))

    from ..trace.assemble import Assembler
    from ..trace.kinds import Kinds
    from ..trace.probes import BUFFER, CLIENT_FRAMES, MOST_BORDERS, STACK_FRAMES, Probes

    with Progress(sys.stderr) as progress:
        source = common.kernel(args, progress)
        facts = source.tree()
    frames = STACK_FRAMES if args.stacks else CLIENT_FRAMES
    places = checks.places(facts) if _by_kind(args) else None
    if places and len(places.borders) > MOST_BORDERS:
        places = None
    buffer = args.buffer or BUFFER
    probes = Probes(source, wanted, args.probe, frames, buffer, args.verbose, places)
    assembler = Assembler(source.abi, source.layout, frames, counted=places is not None)
    kinds = Kinds(assembler) if places else None
    interval = args.interval or (None if args.summary or _by_kind(args) else 1.0)
    with contextlib.ExitStack() as stack:
        # If the file cannot be written, khoscope fails before it attaches anything.
        recorder = stack.enter_context(Recorder(args.record, facts)) if args.record else None
        stack.enter_context(probes)
        started = time.clock_gettime_ns(CLOCK)
        tracing = Tracing(facts, probes.attached, probes.missing, probes.buffer, started)
        # Of what is counted, the kernel leaves out what is not asked for.
        wanted = CallFilter() if kinds else wanted
        session = TraceSession(tracing, wanted, _trace_view(args, probes.symbol), before)
        report = session.live(probes, assembler, recorder, args.duration, interval, kinds)
    return _judged(args, report)


def _by_kind(args: argparse.Namespace) -> bool:
    """
    Whether calls are counted by kind: nobody asked to see each of them, or for what is in no kind.
    """
    each = args.json or args.jsonl or args.stacks or args.record or args.replay or args.before
    return bool((args.check or args.summary) and not each)


def _trace_view(args: argparse.Namespace, symbols: Symbols) -> View:
    from ..views.trace.documents import JsonLines, JsonView
    from ..views.trace.lines import Lines
    from ..views.trace.sums import SummaryView

    if args.json:
        return JsonView(sys.stdout, symbols, args.stacks)
    if args.jsonl:
        return JsonLines(sys.stdout, symbols, args.stacks)
    if args.summary or _by_kind(args):
        return SummaryView(sys.stdout, symbols, args.limit)
    return Lines(sys.stdout, symbols, args.stacks, args.limit)


def _judged(args: argparse.Namespace, report: checks.Report) -> int:
    return common.judged(report) if args.check else common.FINE
