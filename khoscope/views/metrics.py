# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Metrics in Prometheus' text format, version 0.0.4.

What is not known has no sample.  No label has the name of a session, a file or an owner: these come
and go, and each would be a time series for as long as Prometheus keeps any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import IO, Final, Literal

from .. import __version__
from ..abi.keys import BAD_ORDER, TYPE_NAMES
from ..checks import RULES, About, Report, Verdict
from ..facts.metrics import Metrics, taken_at
from ..facts.snapshot import Snapshot
from ..words.printable import printable

#: Labels, and a number; None: it is not known.
Sample = tuple[Mapping[str, str], int | None]

#: What a verdict is about, as a label has it.
_ABOUT: Final = {About.KEXEC: "kexec", About.ARRIVAL: "arrival"}
#: What must not stand in a label's value as it is.
_ESCAPED: Final = str.maketrans({"\\": r"\\", '"': r"\""})


def write_metrics(
    facts: Snapshot | None, metrics: Metrics | None, report: Report | None, out: IO[str]
) -> None:
    """
    ``khoscope metrics``.

    :param facts: None: the kernel has no KHO; ``metrics`` likewise.
    :param report: None: KHO is off, and there is nothing to judge.
    """
    text = Exposition(out)
    text.family(
        "khoscope_build_info",
        "gauge",
        "The khoscope that wrote this.",
        [({"version": __version__}, 1)],
    )
    text.family(
        "khoscope_kho_enabled",
        "gauge",
        "Whether Kexec HandOver is on in this kernel, and set up.",
        [({}, int(report is not None))],
    )
    if facts is not None and metrics is not None:
        _kernel(text, facts)
        _preserved(text, metrics, facts.abi.page_shift)
        _luo(text, metrics)
        _scratch(text, metrics)
        if report is not None:
            _report(text, facts, report)


def write_report(facts: Snapshot, report: Report, out: IO[str]) -> None:
    """``khoscope verify --metrics``: what verify says, and nothing else."""
    _report(Exposition(out), facts, report)


def _kernel(text: Exposition, facts: Snapshot) -> None:
    luo = facts.outgoing.luo
    text.family(
        "khoscope_kernel_info",
        "gauge",
        "The kernel, and the ABIs in which it hands over: of KHO and of LUO.",
        [
            (
                {
                    "release": facts.kernel.release,
                    "kho": facts.outgoing.fdt.compatible or "",
                    "luo": (luo and luo.compatible) or "",
                },
                1,
            )
        ],
    )
    text.family(
        "khoscope_facts_timestamp_seconds",
        "gauge",
        "When khoscope read this kernel.",
        [({}, taken_at(facts.taken))],
    )
    text.family(
        "khoscope_handovers_total",
        "counter",
        "Kexecs with a handover since the last cold boot.",
        [({}, facts.handover.kexec_count)],
    )


def _preserved(text: Exposition, metrics: Metrics, page_shift: int) -> None:
    kinds = [
        (
            {
                "order": str(order) if order != BAD_ORDER else "bad",
                "type": TYPE_NAMES[kind] or "none",
            },
            blocks,
            blocks << order + page_shift if order != BAD_ORDER else None,
        )
        for (order, kind), blocks in sorted(metrics.preserved.items())
    ]
    text.family(
        "khoscope_preserved_blocks",
        "gauge",
        "Blocks that this kernel would hand over, by order and type.",
        ((labels, blocks) for labels, blocks, _ in kinds),
    )
    text.family(
        "khoscope_preserved_bytes",
        "gauge",
        "Memory that this kernel would hand over, by order and type of its blocks.",
        ((labels, size) for labels, _, size in kinds),
    )


def _luo(text: Exposition, metrics: Metrics) -> None:
    sides = [
        ({"direction": name}, side)
        for name, side in (("outgoing", metrics.outgoing), ("incoming", metrics.incoming))
        if side is not None
    ]
    text.family(
        "khoscope_luo_sessions",
        "gauge",
        "Live update sessions: to be handed over, and handed over to this kernel.",
        ((labels, side.sessions) for labels, side in sides),
    )
    text.family(
        "khoscope_luo_files",
        "gauge",
        "Files in live update sessions.",
        ((labels, side.files) for labels, side in sides),
    )


def _scratch(text: Exposition, metrics: Metrics) -> None:
    text.family(
        "khoscope_scratch_bytes",
        "gauge",
        "Size of each scratch area, which only movable memory may use.",
        (({"area": area.purpose}, area.size) for area in metrics.scratch),
    )
    text.family(
        "khoscope_scratch_free_bytes",
        "gauge",
        "Memory of a scratch area that is free.",
        (({"area": area.purpose}, area.free) for area in metrics.scratch),
    )
    text.family(
        "khoscope_scratch_unmovable_bytes",
        "gauge",
        "Memory of a scratch area that cannot be moved away.",
        (({"area": area.purpose}, area.unmovable) for area in metrics.scratch),
    )


def _report(text: Exposition, facts: Snapshot, report: Report) -> None:
    about = {"about": _ABOUT[report.about]}
    text.family(
        "khoscope_findings",
        "gauge",
        "What the checks found; a check that has not run has no sample.",
        (
            ({**about, "rule": name, "severity": RULES[name].severity}, report.counts[name])
            for name in sorted(report.rules)
        ),
    )
    text.family(
        "khoscope_skipped_rules",
        "gauge",
        "Checks that were left out on request.",
        [(about, len(report.left_out))],
    )
    text.family(
        "khoscope_verdict",
        "gauge",
        "The last verdict: 1 at that which was given.",
        (({**about, "verdict": each}, int(each == report.verdict)) for each in Verdict),
    )
    text.family(
        "khoscope_verdict_timestamp_seconds",
        "gauge",
        "When khoscope read what the last verdict is about.",
        [(about, taken_at(facts.taken))],
    )


class Exposition:
    """
    Writes families of samples.

    The words of HELP are khoscope's own, and need no escapes.  All is ASCII, whatever the encoding
    of the stream.
    """

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def family(
        self, name: str, kind: Literal["gauge", "counter"], what: str, samples: Iterable[Sample]
    ) -> None:
        """
        Write the samples that are known, if there are any.

        Of samples with the same labels, which a made-up file may have, only the first counts: two
        would make Prometheus refuse all of the file.
        """
        known: dict[str, int] = {}
        for labels, value in samples:
            if value is not None:
                known.setdefault(_labels(labels), value)
        if known:
            self._out.write(f"# HELP {name} {what}\n# TYPE {name} {kind}\n")
            self._out.writelines(f"{name}{each} {value}\n" for each, value in known.items())


def _labels(labels: Mapping[str, str]) -> str:
    pairs = ",".join(f'{name}="{_value(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _value(text: str) -> str:
    """A label's value; :func:`printable` leaves no newline."""
    return printable(text).encode("ascii", "backslashreplace").decode().translate(_ESCAPED)
