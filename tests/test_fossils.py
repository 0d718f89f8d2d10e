# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Every command on a vmcore of every kernel, before and after its kexec: it says what it said.

`python -m vm fossil KERNEL` makes the vmcores (docs/lab.md). To change on purpose what is said of
them: ``python -m tests.test_fossils``, and look at the difference before you commit it. With the
names of kernels, that writes anew what is said of those.

What is kept is for people to read, so long lists and texts are cut. The hash of what was cut off
is kept, too: nothing in there changes without being seen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from drgn.commands import run_command

from khoscope.cli import main
from khoscope.sources import open as sources
from tests.kept import Kept
from vm.fossil import (
    COMMANDS,
    FOSSILS,
    OF_STAGE,
    PLACES,
    STAGES,
    SUFFIX,
    Places,
    Said,
    helped,
    said,
    unpack,
)
from vm.kernel import KERNELS as BUILT

KEPT = Kept(Path(__file__).parent / "recorded" / "fossils")

KERNELS = sorted(path.name.removesuffix(SUFFIX) for path in FOSSILS.iterdir())

#: The widest line that is kept, if it holds more than one value; of a longer list or text, how much
#: is kept.
WIDTH, ITEMS, CHARACTERS = 100, 12, 400


def look(kernel: str, directory: Path) -> Iterator[tuple[str, str]]:
    """
    What all commands and helpers say about a kernel's fossils, as it is kept, by the files' names.

    :param directory: an empty one
    """
    places = unpack(FOSSILS / f"{kernel}{SUFFIX}", directory)
    # Opening one takes longer than any command.
    with patch.object(sources, "open_core", functools.cache(sources.open_core)):
        for stage in STAGES:
            run = functools.partial(_main, stage)
            known: dict[str, Any] = {}
            for command, runs in said(run, stage, places, directory):
                kept = wrapped([_kept(each, known) for each in runs])
                yield f"{kernel}-{stage}-{command}", f"{kept}\n"
            helpers = helped(sources.open_core(directory / stage))
            yield f"{kernel}-{stage}-helpers", f"{wrapped(shortened(helpers))}\n"


def _main(core: str, words: list[str]) -> int:
    return main(["--core", core, *words])


def _kept(run: Said, known: dict[str, Any]) -> Any:
    """
    What is kept of one run.

    :param known: what earlier documents said about the kernel, which is not said again
    """
    fields = asdict(run)
    for document in fields["documents"]:
        for name in ("kernel", "abi"):
            if name not in document:
                continue
            if document[name] == known.get(name):
                del document[name]
            else:
                known[name] = document[name]
    return shortened(fields)


def shortened(value: Any) -> Any:
    """JSON in which long lists and texts are cut, and end in a hash of what was cut off."""
    if isinstance(value, str) and len(value) > CHARACTERS:
        return f"{value[:CHARACTERS]}… {_digest(value)}"
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        cut = [shortened(each) for each in value[:ITEMS]]
        return [*cut, f"… of {len(value)}, {_digest(value)}"] if len(value) > ITEMS else cut
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def wrapped(value: Any, indent: int = 0) -> str:
    """JSON whose lines are as long as can be: what fits into one is in one."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or indent + len(flat) <= WIDTH:
        return flat
    if isinstance(value, dict):
        brackets = "{}"
        parts = [f"{json.dumps(key)}: {wrapped(each, indent + 1)}" for key, each in value.items()]
    else:
        brackets = "[]"
        parts = [wrapped(each, indent + 1) for each in value]
    body = ",\n".join(f"{' ' * (indent + 1)}{part}" for part in parts)
    return f"{brackets[0]}\n{body}\n{' ' * indent}{brackets[1]}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_says_what_it_said(kernel: str, tmp_path: Path) -> None:
    for name, text in look(kernel, tmp_path):
        assert text == KEPT.text(name), name


def test_drgn_opens_one(tmp_path: Path) -> None:
    """By itself, as any other vmcore; our plugin's BTF gives it types."""
    unpack(FOSSILS / f"{KERNELS[0]}{SUFFIX}", tmp_path)
    show = "from khoscope import btf; btf.register(prog); print(prog['kho_out'])"
    drgn = [str(Path(sys.executable).with_name("drgn")), "--quiet", "-c", "before", "-e", show]
    done = subprocess.run(drgn, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(struct kho_out){\n")


@pytest.fixture(scope="module")
def bare_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vmcore of a kernel whose trees take bare keys."""
    directory = tmp_path_factory.mktemp("bare_keys")
    unpack(FOSSILS / f"7.3-fixed{SUFFIX}", directory)
    return directory / "before"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--root", "kho_out"], "not a struct kho_radix_tree"),
        (["--root", "kho_out.nothing"], "no member"),
        (["--root", "0xffffffffffffff00"], "cannot be read"),
        (["--root", "kho_out.radix_tree", "--incoming"], "--root and --incoming name 2 trees"),
        (["--raw-keys", "--order", "3"], "raw keys"),
    ],
)
def test_what_is_no_tree(
    bare_keys: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(str(bare_keys), ["tree", *words]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert expected in errors


def _status(core: str, words: list[str]) -> int | str | None:
    """argparse ends the program when words do not go together."""
    try:
        return _main(core, words)
    except SystemExit as end:
        return end.code


def test_khos_own_tree_by_its_name_and_by_its_address(
    bare_keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tree(*words: str) -> Any:
        assert _main(str(bare_keys), ["tree", "--limit", "0", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    own = tree()
    assert own["blocks"]
    for name in ("kho_out.radix_tree", own["root"]):
        named = tree("--root", name)
        for part in ("root", "totals", "blocks", "bad_entries"):
            assert named[part] == own[part], (name, part)
    raw = tree("--root", "kho_out.radix_tree", "--raw-keys")
    assert [row["key"] for row in raw["keys"]] == [block["key"] for block in own["blocks"]]
    assert not {"totals", "blocks"} & raw.keys()


@pytest.mark.parametrize("name", ["verify", "status", "pages"])
def test_kho_of_a_session_is_the_command_line(
    bare_keys: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [name, "--json"]
    if name == "pages":
        words.insert(1, Places.load(bare_keys.with_name(PLACES)).pages[0])
    status = _main(str(bare_keys), words)
    expected = json.loads(capsys.readouterr().out)
    assert run_command(sources.open_core(bare_keys), " ".join(["kho", *words])) == status
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == expected.keys()
    for part in found.keys() - {"taken"}:
        assert found[part] == expected[part], part


def test_every_command_is_kept() -> None:
    """Of all kernels, and of no other."""
    commands = {stage: {*COMMANDS, *OF_STAGE[stage], "helpers"} for stage in STAGES}
    assert KEPT.names() == {
        f"{kernel}-{stage}-{command}"
        for kernel in KERNELS
        for stage in STAGES
        for command in commands[stage]
    }


def test_every_kernel_is_kept() -> None:
    """All that are built for x86 but the variants, which differ in what they refuse alone."""
    assert set(KERNELS) == set(BUILT)


def test_they_are_small() -> None:
    """The repository holds them for good."""
    assert KERNELS
    for kernel in KERNELS:
        assert (FOSSILS / f"{kernel}{SUFFIX}").stat().st_size < len(STAGES) * (3 << 19)


if __name__ == "__main__":
    for each in sys.argv[1:] or KERNELS:
        with tempfile.TemporaryDirectory() as made:
            KEPT.replace(look(each, Path(made)), f"{each}-")
