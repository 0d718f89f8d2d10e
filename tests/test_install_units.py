# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``khoscope install-units``: what it writes, where, and that it overwrites nothing.

systemd itself reads the units in tests/vm/test_systemd.py.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from khoscope.cli import parser
from khoscope.commands import install_units
from khoscope.commands.install_units import UNITS
from khoscope.facts.files import NewFile
from khoscope.words.errors import KhoscopeError
from tests.command import Result, Run

KHOSCOPE = "/opt/khoscope/bin/khoscope"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def units(tmp_path: Path) -> Path:
    directory = tmp_path / "units"
    directory.mkdir()
    return directory


@pytest.fixture
def install(run: Run, units: Path) -> Callable[..., Result]:
    def install(*words: object) -> Result:
        return run("install-units", "--khoscope", KHOSCOPE, units, *words)

    return install


Install = Callable[..., Result]


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """A unit, as systemd reads it (systemd.syntax(7)): names may come again."""
    found: dict[str, list[tuple[str, str]]] = {}
    section: list[tuple[str, str]] | None = None
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if head := re.fullmatch(r"\[(\w+)\]", line):
            assert head[1] not in found
            section = found[head[1]] = []
            continue
        name, equals, value = line.partition("=")
        assert section is not None
        assert equals, line
        assert re.fullmatch("[A-Z][A-Za-z]+", name), line
        assert value == value.strip()
        section.append((name, value))
    return found


def test_nothing_is_written_unless_asked(install: Install, units: Path) -> None:
    result = install()
    assert (result.status, result.err) == (0, "")
    assert list(units.iterdir()) == []
    for name in UNITS:
        assert f"{units / name}: not written\n" in result.out
    assert f"ExecStart={KHOSCOPE} carry\n" in result.out
    assert result.last == "nothing was written: --write does that"


def test_they_are_written(install: Install, units: Path) -> None:
    umask = os.umask(0o077)
    try:
        result = install("--write")
    finally:
        os.umask(umask)
    assert (result.status, result.err) == (0, "")
    assert sorted(path.name for path in units.iterdir()) == sorted(UNITS)
    for path in units.iterdir():
        assert path.is_file()
        assert path.stat().st_mode & 0o7777 == 0o644
        assert f"{path}: written\n" in result.out
    assert "systemctl daemon-reload" in result.last
    # What is shown is what is written.
    shown = install().out
    assert all(path.read_text() in shown for path in units.iterdir())


def test_again(install: Install, units: Path) -> None:
    install("--write")
    before = {path: path.stat() for path in units.iterdir()}
    result = install("--write")
    assert result.status == 0
    assert result.out.count(": is there already\n") == len(UNITS)
    assert {path: path.stat() for path in units.iterdir()} == before
    # What is missing is added.
    (units / UNITS[1]).unlink()
    result = install("--write")
    assert f"{units / UNITS[1]}: written\n" in result.out
    assert result.out.count(": is there already\n") == len(UNITS) - 1


OTHERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("[Unit]\n"),
    "nothing": lambda path: path.touch(),
    "more": lambda path: path.write_bytes(b"x" * (1 << 20)),
    "bytes": lambda path: path.write_bytes(b"\xff\0"),
    "directory": lambda path: path.mkdir(),
    "masked": lambda path: path.symlink_to("/dev/null"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "linked": lambda path: path.symlink_to(__file__),
    "loop": lambda path: path.symlink_to(path.name),
    "fifo": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("number", range(len(UNITS)))
@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_is_overwritten(install: Install, units: Path, kind: str, number: int) -> None:
    """And none of the others is written."""
    path = units / UNITS[number]
    OTHERS[kind](path)
    before = path.lstat()
    for words in ([], ["--write"]):
        result = install(*words)
        result.refused(str(path), "nothing is overwritten")
        assert result.out == ""
    assert list(units.iterdir()) == [path]
    assert path.lstat() == before


def test_one_that_was_changed(install: Install, units: Path) -> None:
    install("--write")
    path = units / UNITS[0]
    text = path.read_text().replace("5min", "9min")
    path.write_text(text)
    install("--write").refused("there is another file of that name")
    install("--write", "--metrics", "/var/lib/other.prom").refused("there is another file")
    assert path.read_text() == text


def test_one_that_comes_meanwhile(
    install: Install, units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes it after khoscope has looked."""
    finish = NewFile.finish

    def late(self: NewFile) -> None:
        if not (units / UNITS[0]).exists():
            (units / UNITS[0]).write_text("theirs")
        finish(self)

    monkeypatch.setattr(NewFile, "finish", late)
    install("--write").refused("File exists")
    assert [path.name for path in units.iterdir()] == [UNITS[0]]
    assert (units / UNITS[0]).read_text() == "theirs"


def test_no_room(install: Install, units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the last of them: then the others do not get their names."""
    made: list[NewFile] = []
    init = NewFile.__init__

    def full(self: NewFile, path: Path, mode: int = 0o600, *, replace: bool = True) -> None:
        init(self, path, mode, replace=replace)
        made.append(self)
        if len(made) == len(UNITS):
            self.file.close()
            self.file = open("/dev/full", "w+b")  # noqa: SIM115 - it is closed as the other is

    monkeypatch.setattr(NewFile, "__init__", full)
    install("--write").refused("No space left on device")
    assert list(units.iterdir()) == []


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_new_file_that_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    """On file systems with unnamed files, and on others."""
    if not unnamed:
        monkeypatch.setattr("khoscope.facts.files._unnamed", lambda directory: None)

    def write(text: bytes) -> None:
        with NewFile(tmp_path / "new", 0o644, replace=False) as new:
            new.telling.write(text)
            new.finish()

    write(b"first")
    with pytest.raises(KhoscopeError, match="File exists"):
        write(b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new").read_bytes() == b"first"
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize(
    "odd",
    ["khoscope", "./khoscope", "/opt/a b", "/opt/%h", "/opt/$x", '/opt/"', "/opt/a\n[X]", "/ä", ""],
)
@pytest.mark.parametrize("option", ["--khoscope", "--metrics"])
def test_odd_paths(install: Install, units: Path, option: str, odd: str) -> None:
    """systemd would read something else in them."""
    result = install(option, odd, "--write")
    assert (result.status, result.out) == (2, "")
    assert list(units.iterdir()) == []
    if odd:
        result.refused("not a path for a unit")


@pytest.mark.parametrize("there", [False, True])
def test_no_directory(run: Run, tmp_path: Path, there: bool) -> None:
    path = tmp_path / "x"
    if there:
        path.touch()
    run("install-units", "--khoscope", KHOSCOPE, path, "--write").refused("is not a directory")


def test_the_khoscope_in_path(
    run: Run, units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    run("install-units", units).refused("there is no khoscope in PATH", "--khoscope")
    ours = tmp_path / "bin" / "khoscope"
    ours.parent.mkdir()
    ours.touch()
    ours.chmod(0o755)
    assert f"ExecStart={ours} carry\n" in run("install-units", units).out


@pytest.mark.parametrize("there", [False, True])
def test_where_the_result_goes(
    install: Install, tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node exporter's directory, if there is one."""
    textfiles, state = tmp_path / "textfiles", Path("/var/lib/khoscope")
    monkeypatch.setattr(install_units, "_TEXTFILES", textfiles)
    if there:
        textfiles.mkdir()
    where = textfiles if there else state
    out = install().out
    assert f"--metrics {where}/khoscope.prom " in out
    assert f"ReadWritePaths={where}\n" in out
    out = install("--metrics", "/srv/x/y.prom").out
    assert "--metrics /srv/x/y.prom " in out
    assert "ReadWritePaths=/srv/x\n" in out


# -- the units ------------------------------------------------------------------------------------

SECTIONS = {"Unit", "Service", "Install"}


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_one(install: Install, units: Path, name: str) -> None:
    install("--write", "--metrics", "/var/lib/khoscope/khoscope.prom")
    text = (units / name).read_text()
    assert not re.search("@[A-Z_]+@", text)
    found = sections(text)
    assert found.keys() <= SECTIONS
    settings = {section: dict(pairs) for section, pairs in found.items()}
    assert settings["Unit"]["Description"]
    assert settings["Unit"]["Documentation"] == "man:khoscope(8)"
    if not name.endswith(".service"):
        assert found.keys() == {"Unit"}
        return
    assert found.keys() == SECTIONS
    assert settings["Install"]["WantedBy"]
    service = settings["Service"]
    # It ends, whatever happens.
    assert service["TimeoutStartSec"] == "5min"
    # What all of them are denied, at the place where settings of services are.
    hardening = (ROOT / "khoscope" / "units" / "hardening.conf").read_text()
    common = sections("[Service]\n" + hardening)["Service"]
    assert set(common) <= set(found["Service"])
    assert service["NoNewPrivileges"] == "yes"
    assert service["DeviceAllow"] == "/dev/liveupdate rw"
    # khoscope takes the words that it is started with.
    program, *words = shlex.split(service["ExecStart"])
    assert program == KHOSCOPE
    assert parser().parse_args(words).run
    assert words[0] in ("carry", "verify")
    for setting in ("ExecStartPre", "ExecStartPost", "ExecStopPost"):
        if setting in service:
            assert service[setting].startswith("/usr/bin/")


def test_carry_survives_systemctl_kexec(install: Install, units: Path) -> None:
    install("--write")
    settings = dict(sections((units / "khoscope-carry.service").read_text())["Unit"])
    for name, value in (
        ("DefaultDependencies", "no"),
        ("IgnoreOnIsolate", "yes"),
        ("SurviveFinalKillSignal", "yes"),
    ):
        assert settings[name] == value


def test_every_file_is_a_unit_or_part_of_one() -> None:
    there = {path.name for path in (ROOT / "khoscope" / "units").iterdir()}
    assert there == {*UNITS, "hardening.conf"}
