# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khoscope scratch --brief``: one line and an exit status, for those who ask many hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from khoscope.cli import main
from khoscope.commands import scratch as command
from khoscope.facts.brief import of_files, of_kernel
from khoscope.facts.host_scratch import HostScratch
from khoscope.facts.snapshot import Handover
from khoscope.words.errors import KhoscopeError
from tests.synthetic import Block
from tests.test_scratch import host

MIB = 1 << 20
WASTED = HostScratch(True, "kho=on on the command line", size=184 * MIB)
OFF = HostScratch(False, "kho=off on the command line", size=0)
UNKNOWN = HostScratch(None, "kho=on on the command line; whether that went well, no file says")


def test_brief() -> None:
    unused, used = of_kernel(host()), of_kernel(host(Block(0x400000)))
    assert (unused.on, unused.is_wasted, used.is_wasted) == (True, True, False)
    assert of_files(WASTED).is_wasted
    assert not of_files(OFF).is_wasted
    # On, but it takes nothing.
    assert not of_files(HostScratch(True, "kho=on on the command line", size=0)).is_wasted
    # Off, and yet in the way: the kernel before had it on.
    off = replace(host(), kho_enable=False, handover=Handover(True, "7.2.1", 1))
    assert (of_kernel(off).on, of_kernel(off).users, of_kernel(off).is_wasted) == (
        False,
        None,
        True,
    )


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        (OFF, 0, "KHO off: kho=off on the command line"),
        (
            WASTED,
            1,
            "KHO on: kho=on on the command line; 184 MiB that only movable memory may use; who "
            "uses it is not known without root and debug info; /proc/meminfo has it in CmaFree, "
            "not in CmaTotal",
        ),
        (
            HostScratch(False, "kho=off on the command line", size=184 * MIB),
            1,
            "KHO off: kho=off on the command line; 184 MiB that only movable memory may use; the "
            "kernel before has left it, and a cold boot with kho=off gives it back; /proc/meminfo "
            "has it in CmaFree, not in CmaTotal",
        ),
        (UNKNOWN, 3, f"KHO not known: {UNKNOWN.why}"),
        # It is on, and neither who uses it nor what it takes can be told.
        (
            HostScratch(True, "kho=on on the command line"),
            3,
            "KHO on: kho=on on the command line; scratch of unknown size that only movable memory "
            "may use; who uses it is not known without root and debug info",
        ),
    ],
)
def test_brief_without_root(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: HostScratch,
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr(command.os, "geteuid", lambda: 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr("khoscope.sources.host_scratch.read_host_scratch", lambda: found)
    assert main(["scratch", "--brief"]) == status
    assert capsys.readouterr().out == f"{said}\n"


def test_brief_of_a_kernel_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Even root may have no debug info; but somebody who named a file wants that file."""

    def unreadable(*_: object) -> None:
        raise KhoscopeError("no debug info", "install it")

    monkeypatch.setattr(command.os, "geteuid", lambda: 0)  # type: ignore[attr-defined]
    monkeypatch.setattr("khoscope.sources.host_scratch.read_host_scratch", lambda: OFF)
    monkeypatch.setattr(command.common, "kernel", unreadable)  # type: ignore[attr-defined]
    assert main(["scratch", "--brief"]) == 0
    assert "KHO off" in capsys.readouterr().out
    assert main(["--snapshot", str(tmp_path / "none"), "scratch", "--brief"]) == 2


def test_without_debug_info_there_is_still_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(*_: object) -> None:
        raise KhoscopeError("no debug info", "install it")

    monkeypatch.setattr(command.common, "kernel", unreadable)  # type: ignore[attr-defined]
    assert main(["scratch"]) == 2
    what, hint = capsys.readouterr().err.splitlines()
    assert (what, hint) == (
        "khoscope: no debug info",
        "khoscope: install it; khoscope scratch --brief goes by this host's files alone",
    )
