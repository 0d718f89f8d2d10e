# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wheel, as somebody has it who has nothing else of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from khoscope import __version__
from khoscope.checks import RULES

ROOT = Path(__file__).parent.parent

#: What is in the working tree and not of the project.
_OURS = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make dist`` makes: a wheel that is built from the source archive."""
    tree, made = tmp_path_factory.mktemp("tree") / "khoscope", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=_OURS)
    _run(sys.executable, "-m", "build", "--outdir", str(made), str(tree))
    assert (made / f"khoscope-{__version__}.tar.gz").exists()
    (wheel,) = made.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it needs, none of which is compiled here."""
    environment = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "venv", str(environment))
    pip = str(environment / "bin" / "pip")
    _run(pip, "install", "--quiet", "--only-binary=:all:", str(wheel))
    return environment


def _run(*words: str, cwd: Path | None = None) -> str:
    """Its output. It sees nothing of the environment that the tests run in."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    result = subprocess.run(
        words, cwd=cwd, env=environment, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{words}: {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_all_of_it_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    inside = {name.partition("/")[2] for name in names}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("khoscope/**/*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert inside >= {"bpf/kho_trace.c", "demo/findings.json"}
    demo = {path.name for path in ROOT.glob("khoscope/demo/*.khosnap")}
    assert {Path(name).name for name in inside if name.endswith(".khosnap")} == demo
    units = {path.name for path in ROOT.glob("khoscope/units/*")}
    assert {Path(name).name for name in inside if name.startswith("units/")} == units
    manuals = {path.name for path in ROOT.glob("docs/*.8")}
    assert {Path(name).name for name in inside if "/man/man8/" in name} == manuals
    licences = {path.name for path in ROOT.glob("LICENSE*")}
    assert {Path(name).name for name in inside if name.startswith("licenses/")} == licences


def test_it_runs_from_there(installed: Path, tmp_path: Path) -> None:
    def khoscope(*words: str) -> str:
        return _run(str(installed / "bin" / "khoscope"), *words, cwd=tmp_path)

    assert khoscope("--version") == f"khoscope {__version__}\n"
    assert "fixed" in khoscope("demo")
    assert all(name in khoscope("checks") for name in RULES)
    (demo,) = installed.glob("lib/python3*/site-packages/khoscope/demo")
    units = khoscope("install-units", str(tmp_path), "--khoscope", "/opt/khoscope")
    assert "ExecStart=/opt/khoscope carry" in units
    assert "/dts-v1/;" in khoscope("--snapshot", str(demo / "odd-before.khosnap"), "fdt")
    (manual,) = installed.glob("share/man/man8/khoscope.8")
    assert manual.read_text() == (ROOT / "docs" / "khoscope.8").read_text()
