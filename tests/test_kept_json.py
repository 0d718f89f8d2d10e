# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The JSON of every command on every demo snapshot is, byte for byte, what it was.

Scripts read it.  To change it on purpose: ``python -m tests.test_kept_json``, and look at the
difference before you commit it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from khoscope import demo
from khoscope.cli import main
from tests.kept import Kept

KEPT = Kept(Path(__file__).parent / "recorded" / "json")
RECORDING = Path(__file__).parent / "recorded" / "rfc.khotrace"

#: Of one snapshot.
COMMANDS = {
    "status": ("status",),
    "scratch": ("scratch",),
    "tree": ("tree", "--nodes"),
    "blocks": ("tree", "--jsonl", "--order", "0"),
    "owners": ("owners",),
    "pages": ("pages", "0x1000000..0x2000000"),
    "fdt": ("fdt",),
    "luo": ("luo",),
    "verify": ("verify",),
}

#: Of more than one file, or none.
OTHERS = {
    "rfc-incoming": ("--snapshot", "{rfc-after}", "tree", "--incoming"),
    "odd-incoming": ("--snapshot", "{odd-after}", "tree", "--incoming"),
    "diff": ("diff", "{rfc-before}", "{fixed-before}"),
    "rfc-arrival": ("--snapshot", "{rfc-after}", "verify", "--before", "{rfc-before}"),
    "fixed-arrival": ("--snapshot", "{fixed-after}", "verify", "--before", "{fixed-before}"),
    "odd-arrival": ("--snapshot", "{odd-after}", "verify", "--before", "{odd-before}"),
    "trace": ("trace", "--replay", str(RECORDING), "--check"),
    "demo": ("demo",),
}


def commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """All of them, as arguments of khoscope, by the names of the files with what they print."""
    with resources.as_file(resources.files(demo)) as directory:
        paths = {path.stem: str(path) for path in sorted(directory.glob("*.khosnap"))}
    for name, path in paths.items():
        for kind, words in COMMANDS.items():
            yield f"{name}-{kind}", ("--snapshot", path, *words)
    for name, words in OTHERS.items():
        yield name, tuple(word.format_map(paths) for word in words)


def printed(words: tuple[str, ...]) -> str:
    """What a command prints as JSON."""
    json = () if "--jsonl" in words else ("--json",)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main([*words, *json])
    assert status in (0, 1), words
    return out.getvalue()


@pytest.mark.parametrize(("name", "words"), list(commands()), ids=[name for name, _ in commands()])
def test_json_is_what_it_was(name: str, words: tuple[str, ...]) -> None:
    assert printed(words) == KEPT.text(name)


def test_nothing_else_is_kept() -> None:
    assert KEPT.names() == {name for name, _ in commands()}


if __name__ == "__main__":
    KEPT.replace((kept, printed(argv)) for kept, argv in commands())
