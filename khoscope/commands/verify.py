# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope verify``: run the checks."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import checks
from ..carry import systemd
from ..facts.metrics import hands_over
from ..facts.next_kernel import LOADED, NextKernel
from ..facts.snapshot import Snapshot
from ..views import documents
from ..views import gate as gate_view
from ..views import journal as journal_view
from ..views import metrics as metrics_view
from ..views import watch as watch_view
from ..views.progress import Progress
from ..views.text import Text
from ..words.errors import KhoscopeError, say
from . import common
from .checks import rule_name

if TYPE_CHECKING:
    from ..sources.kernel import KernelSource


def add(verify: argparse.ArgumentParser) -> None:
    verify.description = """\
Run the checks (khoscope checks lists them), and say whether it is safe to
kexec. In the new kernel, with --before, say whether everything arrived."""
    verify.formatter_class = argparse.RawDescriptionHelpFormatter
    verify.epilog = """\
examples:
  khoscope verify                              is it safe to kexec?
  khoscope verify --next /boot/vmlinuz-7.2.1   is it safe into this kernel?
  khoscope verify --next loaded                and into the one that is loaded?
  khoscope verify --fail-on warning --skip kernel-tainted
  khoscope verify --only blob-not-preserved,broken-vmalloc
  khoscope verify --watch 10                   print what changes, until Ctrl-C
  khoscope verify --before before.khosnap      compare, after the kexec
  khoscope verify --gate --journal             may the kexec come now? for an agent

exit status: 0 fine, 1 a check failed, 2 khoscope could not do it, 3 no verdict:
khoscope found nothing wrong, but could not see everything"""
    verify.set_defaults(run=_run, refuse=_refuse)
    common.output(verify)
    common.before_option(verify, "compare with this snapshot of the kernel that handed over")
    verify.add_argument(
        "--next",
        metavar="FILE",
        type=common.given,
        help="compare with the kernel that you are going to boot: a bzImage, an arm64 Image, a "
        f"vmlinux, or a directory with one of them; {LOADED!r} means the image that is loaded, "
        "with its command line. LZ4 and Zstandard images need khoscope[images]",
    )
    verify.add_argument(
        "--initrd",
        metavar="FILE",
        type=common.path,
        help="its initrd: does it fit into scratch, too? (with --next FILE)",
    )
    verify.add_argument(
        "--gate",
        action="store_true",
        help="may the kexec come now? Also: is an image loaded, does somebody hold each session, "
        "does what systemd keeps for services go along, and a snapshot? A reason per line",
    )
    verify.add_argument(
        "--journal",
        action="store_true",
        help="also write findings and verdict into the journal, in fields of its own",
    )
    verify.add_argument("--only", type=_rules, metavar="RULE,…", help="run only these checks")
    verify.add_argument("--skip", type=_rules, metavar="RULE,…", help="run all but these checks")
    verify.add_argument(
        "--fail-on",
        type=_fail_on,
        default=_FailOn(),
        metavar="SEVERITY[,RULE…]",
        help="what makes the exit status 1: error (default), or warning for both; and findings of "
        "these rules, whatever their severity",
    )
    verify.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="run the checks again at this interval until Ctrl-C, and print what changes",
    )
    verify.add_argument(
        "--metrics",
        metavar="FILE",
        type=common.path,
        help="also write verdict and findings to this file, as khoscope metrics has them",
    )


def _rules(text: str) -> frozenset[str]:
    """Names of rules."""
    return frozenset(rule_name(name.strip()) for name in text.split(","))


@dataclass(frozen=True)
class _FailOn:
    """What makes a report a failure, as :class:`.checks.RuleSelection` has it."""

    severity: checks.Severity = checks.Severity.ERROR
    closing: frozenset[str] = frozenset()


def _fail_on(text: str) -> _FailOn:
    severity, *rules = (part.strip() for part in text.split(","))
    if severity not in (checks.Severity.ERROR, checks.Severity.WARNING):
        raise argparse.ArgumentTypeError(f"{severity}: error or warning come first")
    return _FailOn(checks.Severity(severity), frozenset(map(rule_name, rules)))


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: not a time to wait")
    return number


def _refuse(args: argparse.Namespace) -> str | None:
    if args.watch and common.is_file(args):
        return "--watch is for a kernel that runs: a file does not change"
    if args.watch and args.metrics:
        return "--metrics is for one run: have khoscope metrics run at an interval"
    if args.gate and args.before:
        return "--gate is for the kexec to come: leave --before out"
    if args.gate and args.watch:
        return "--gate is for one moment: leave --watch out"
    if args.journal and args.watch:
        return "--journal is for one run: leave --watch out"
    if args.initrd and not args.next:
        return "--initrd needs --next"
    if args.initrd and args.next == LOADED:
        return "--initrd is for a FILE: --next loaded knows its own"
    possible = _possible(args)
    for name in sorted(((args.only or frozenset()) | args.fail_on.closing) - possible):
        rule = checks.RULES[name]
        if "kexec" in rule.finders:
            return f"{name} is about the kexec to come: leave --before out"
        if "gate" in rule.finders:
            return f"{name} needs --gate"
        needs = "--before" if rule.is_across else "--next" if "next" in rule.finders else None
        return f"{name} needs {needs}" if needs else f"{name} is a check of khoscope trace"
    if not _wanted(args, possible):
        return "--only and --skip leave no check to run"
    return None


def _possible(args: argparse.Namespace) -> frozenset[str]:
    """The rules that can run with the options given."""
    scopes = checks.ONE_KERNEL | (checks.ACROSS if args.before else checks.KEXEC)
    scopes |= checks.GATE if args.gate else set()
    scopes |= checks.NEXT if args.next or args.gate else set()
    return frozenset(checks.of_scopes(scopes))


def _wanted(args: argparse.Namespace, possible: frozenset[str]) -> frozenset[str]:
    return (args.only or possible) - (args.skip or frozenset())


def _run(args: argparse.Namespace) -> int:
    try:
        return _verify(args)
    except systemd.NoJournal:
        raise
    except KhoscopeError as error:
        if args.journal:
            try:
                about = checks.About.ARRIVAL if args.before else checks.About.KEXEC
                systemd.journal([journal_view.error_entry(error, about, args.gate)])
            except systemd.NoJournal as unheard:
                say(unheard.what, unheard.hint)
        raise


@dataclass(frozen=True)
class _Judged:
    """A report, and the kernel that it takes for the next one."""

    report: checks.Report
    next_kernel: NextKernel | None


def _verify(args: argparse.Namespace) -> int:
    started = time.monotonic()
    if args.next == LOADED and args.snapshot:
        raise KhoscopeError(
            "a snapshot does not hold the image that was loaded",
            "name its FILE after --next, or ask the kernel itself, or a vmcore",
        )
    before = common.load_before(args)
    image = _read_next(args) if args.next and args.next != LOADED else None
    closing = args.fail_on.closing | (checks.CLOSING if args.gate else frozenset())
    asked = checks.RuleSelection(_wanted(args, _possible(args)), args.fail_on.severity, closing)

    def report(
        facts: Snapshot, before: Snapshot | None, following: NextKernel | None
    ) -> checks.Report:
        if before is None:
            return checks.check(facts, following, asked, args.gate)
        return checks.compare(before, facts, following, asked)

    def judge(source: KernelSource) -> tuple[Snapshot, _Judged]:
        following, unread = _following(args, source, image)
        use = functools.partial(report, following=following)
        facts, found = source.judge(use, before, args.gate)
        if not found.counts["no-image"]:
            found.incomplete += unread
            found.doubtful |= {checks.Question.IMAGE} if unread else set()
        return facts, _Judged(found, following)

    if args.watch:
        return _watch(args, judge)
    facts, judged = common.used(
        args, lambda facts: _Judged(report(facts, before, image), image), judge
    )
    came = None if before is None else checks.came_back(before, facts)
    _show(args, facts, judged, came, time.monotonic() - started)
    return common.judged(judged.report)


def _show(
    args: argparse.Namespace,
    facts: Snapshot,
    judged: _Judged,
    came: list[checks.Came] | None,
    seconds: float,
) -> None:
    """Print the report, and write it wherever else it was asked for."""
    found, next_kernel = judged.report, judged.next_kernel
    over = hands_over(facts) if args.gate else None
    if over is not None and args.json:
        gate_view.write_json(facts, found, over, next_kernel, seconds, sys.stdout)
    elif over is not None:
        gate = gate_view.GateText(sys.stdout, args.limit)
        gate.gate(facts, found, over, next_kernel, seconds)
    elif args.json:
        documents.write_verify(facts, found, sys.stdout, next_kernel, came)
    else:
        Text(sys.stdout, args.limit).verify(facts, found, next_kernel, came)
    # The journal first; and neither keeps the other from being written.
    with contextlib.ExitStack() as stack:
        if args.metrics:
            text = io.StringIO()
            metrics_view.write_report(facts, found, text)
            stack.callback(common.write_readable, args.metrics, text.getvalue())
        if args.journal:
            entries = journal_view.entries(found, came or [], over, seconds, args.limit)
            stack.callback(systemd.journal, entries)


def _following(
    args: argparse.Namespace, source: KernelSource, image: NextKernel | None
) -> tuple[NextKernel | None, list[str]]:
    """
    The next kernel, if it is known, and why it is not.

    A gate asks for what is loaded, and says what else is wrong if that cannot be told.
    """
    if args.next == LOADED:
        return source.loaded_image(), []
    if args.gate and image is None:
        try:
            return source.loaded_image(), []
        except KhoscopeError as error:
            return None, [error.what]
    return image, []


def _read_next(args: argparse.Namespace) -> NextKernel:
    from ..sources.next_kernel import read_image, with_initrd

    kernel = read_image(Path(args.next))
    return with_initrd(kernel, args.initrd) if args.initrd else kernel


def _watch(
    args: argparse.Namespace, judge: Callable[[KernelSource], tuple[Snapshot, _Judged]]
) -> int:
    """Run the checks again and again, until Ctrl-C or until the kernel cannot be read any more."""
    view = watch_view.Lines(sys.stdout) if args.json else watch_view.Watch(sys.stdout, args.limit)
    # Nobody wants to see a progress bar every few seconds.
    source = common.kernel(args, Progress(io.StringIO()))
    last: checks.Report | None = None
    try:
        while True:
            facts, judged = judge(source)
            now = judged.report
            if last is None:
                view.start(facts, now, judged.next_kernel)
            elif changes := checks.changes(last, now):
                view.changed(facts.taken, now, changes)
            last = now
            sys.stdout.flush()
            time.sleep(args.watch)
    except KeyboardInterrupt:
        if last is None:
            raise
        return common.judged(last)
