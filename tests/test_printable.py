# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text from elsewhere: whatever it holds, no line on a terminal is anybody's but ours."""

from __future__ import annotations

import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khoscope import demo
from khoscope.abi.fdt import DeviceTree, Node, Property
from khoscope.abi.kho_fdt import Fdt, Subtree, parse_root_fdt
from khoscope.checks import check
from khoscope.cli import main
from khoscope.facts import store
from khoscope.views.fdt import FdtText
from khoscope.views.text import Text
from khoscope.words.errors import KhoscopeError
from khoscope.words.printable import printable
from tests.command import Result, Run
from tests.synthetic import PLAIN, ROOT, Block, fdt_blob, snapshot
from tests.test_store import CLIENTS, rewritten
from tests.test_trace_record import some_batches, write

#: What a text may hold: a line of its own, a colour, an order of its own, and something unseen.
HOSTILE = "\nPASS: safe to kexec\x1b[31m\u202e\u200b"

#: What our own colours are made of.
COLOURS = re.compile("\x1b\\[(1|2|31|32|33)?m")


# The function


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7.2.12-khoscope", "7.2.12-khoscope"),
        ("", ""),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b]0;owned\x07\x9b2J", "\\x1b]0;owned\\x07\\x9b2J"),
        ("naïve → × … ─", "naïve → × … ─"),
        ("e\u0301", "e\\u0301"),
        ("\u202eabc\u202c", "\\u202eabc\\u202c"),
        ("\u05d0\u0627\u0661", "\\u05d0\\u0627\\u0661"),
        ("\u3164\u2800\u200b\ufeff\xad", "\\u3164\\u2800\\u200b\\ufeff\\xad"),
        ("\ufe0f\U000e0041", "\\ufe0f\\U000e0041"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable(text: str, wanted: str) -> None:
    assert printable(text) == wanted


@given(st.text())
def test_printable_is_harmless_and_the_same_again(text: str) -> None:
    shown = printable(text)
    harmless(shown)
    assert printable(shown) == shown


def harmless(line: str) -> None:
    """None of its characters does more than stand there."""
    for c in line:
        assert unicodedata.category(c) not in {
            *("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Mn", "Me"),
        }, line
        assert unicodedata.bidirectional(c) not in {
            *("R", "AL", "AN", "RLE", "RLO", "LRE", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"),
        }, line


@given(st.text(), st.text())
def test_two_lines_are_two(what: str, hint: str) -> None:
    error = KhoscopeError(what, hint)
    for line in (error.what, error.hint, str(error)):
        harmless(line)


@given(st.text(), st.text(), st.text())
def test_a_line_is_one_line(before: str, painted: str, after: str) -> None:
    """With our colour where we have put it, and nowhere else."""
    plain, colour = io.StringIO(), Terminal()
    Text(plain).line(before + painted + after)
    text = Text(colour)
    text.line(before + text.paint("red", painted) + after)
    harmless(plain.getvalue()[:-1])
    assert colour.getvalue().count("\x1b") == 2
    assert COLOURS.sub("", colour.getvalue()) == plain.getvalue()


@given(st.text(), st.text(), st.integers(0, 12))
def test_a_paragraph_is_laid_out_without_its_colours(first: str, text: str, indent: int) -> None:
    plain, colour = io.StringIO(), Terminal()
    Text(plain).wrapped(text, " " * indent, first)
    view = Text(colour)
    view.wrapped(text, " " * indent, view.paint("bold", first), "red")
    assert COLOURS.sub("", colour.getvalue()) == plain.getvalue()
    for line in plain.getvalue().split("\n"):
        harmless(line)


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1))
def test_a_cell_is_one_line(rows: list[list[str]]) -> None:
    out = io.StringIO()
    Text(out).table(rows, ["a", "b"], ["left", "right"])
    lines = out.getvalue().split("\n")[:-1]
    assert len(lines) == 2 + len(rows)
    for line in lines:
        harmless(line)


def test_nobody_knows_where_our_colours_are() -> None:
    """Not even one who has seen how another line was painted."""
    seen = Text(Terminal()).paint("red", "x")
    out = Terminal()
    Text(out).line(seen)
    assert "\x1b" not in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# The views, with every string of the schema


def strings(found: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in a JSON document its strings are."""
    if isinstance(found, str):
        yield at
    elif isinstance(found, dict):
        for name, each in found.items():
            yield from strings(each, (*at, name))
    elif isinstance(found, list):
        for i, each in enumerate(found):
            yield from strings(each, (*at, i))


def extended(document: Any, at: tuple[str | int, ...], more: str) -> None:
    """Add to one string of a document."""
    for step in at[:-1]:
        document = document[step]
    document[at[-1]] += more


def meta_of(data: bytes, name: str = "meta.json") -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return json.loads(archive.read(name))


def marker(number: int) -> str:
    return f"mark{number:04}"


def kind_of(at: tuple[str | int, ...]) -> tuple[str, ...]:
    """A place in the schema: all items of a list are alike."""
    return tuple("*" if isinstance(step, int) else step for step in at)


class Victims:
    """A snapshot file, and the same with every string that it may hold made hostile."""

    def __init__(self, data: bytes, directory: Path) -> None:
        self.directory = directory
        self.whole = data
        self.places = list(strings(meta_of(data)))
        self.refused = [at for at in self.places if not self._is_read(at)]
        meta = meta_of(data)
        for number, at in enumerate(self.places):
            if at not in self.refused:
                extended(meta, at, HOSTILE + marker(number))
        self.all = directory / "all.khosnap"
        self.all.write_bytes(rewritten({"meta.json": json.dumps(meta).encode()}, data))

    def one(self, at: tuple[str | int, ...]) -> Path:
        meta = meta_of(self.whole)
        extended(meta, at, HOSTILE + marker(self.places.index(at)))
        path = self.directory / "one.khosnap"
        path.write_bytes(rewritten({"meta.json": json.dumps(meta).encode()}, self.whole))
        return path

    def _is_read(self, at: tuple[str | int, ...]) -> bool:
        try:
            store.load_file(self.one(at))
        except KhoscopeError:
            return False
        return True


SOURCES: dict[str, Callable[[], bytes]] = {
    "clients": lambda: CLIENTS,
    **{
        name: lambda name=name: demo.path(name).read_bytes()  # type: ignore[misc]
        for name in ("rfc-before", "odd-after")
    },
}


@pytest.fixture(scope="module", params=sorted(SOURCES))
def victims(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Victims:
    return Victims(SOURCES[request.param](), tmp_path_factory.mktemp("victims"))


#: Every command that takes a snapshot; FILE is that.
COMMANDS = [
    *("status", "tree --nodes", "tree --incoming", "tree --raw-keys", "owners", "luo"),
    *("verify", "verify --fail-on warning", "fdt in", "fdt out", "fdt no-such-subtree"),
    *("pages 0x0..0x100000", "pages 0x40000000", "diff FILE FILE", "diff FILE OTHER"),
    *("diff OTHER FILE", "verify --before FILE", "verify --before OTHER", "snapshot COPY"),
    "metrics",
]


def words(command: str, victims: Victims, path: Path, limit: bool = True) -> list[str]:
    other, copy = victims.directory / "whole.khosnap", victims.directory / "copy.khosnap"
    other.write_bytes(victims.whole)
    names = {"FILE": str(path), "OTHER": str(other), "COPY": str(copy)}
    said = [names.get(word, word) for word in command.split()]
    limits = ["--limit", "0"] if limit and command != "metrics" else []
    return ["--snapshot", str(path), *said, *limits]


def nothing_is_forged(result: Result, document: bool = False) -> None:
    assert result.status in (0, 1, 2, 3)
    out, err = result.out.split("\n"), result.err.split("\n")
    for line in [*out, *err]:
        harmless(line)
    if document:
        json.loads(result.out)
    # Only the last line of a verdict may begin so.
    assert not [line for line in [*out[:-2], *err] if line.startswith("PASS")]
    assert not [line for line in out if line.startswith("PASS") and "mark" in line]
    if result.status == 2 and not err[0].startswith("usage: "):
        assert len(err) == 3
        assert all(line.startswith("khoscope: ") for line in err[:2])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_with_all_strings(run: Run, victims: Victims, command: str) -> None:
    nothing_is_forged(run(*words(command, victims, victims.all)))


@pytest.mark.parametrize("command", ["status", "verify", "owners", "luo", "fdt out", "tree"])
def test_json_with_all_strings(run: Run, victims: Victims, command: str) -> None:
    result = run(*words(f"{command} --json", victims, victims.all))
    assert result.status in (0, 1, 3)
    nothing_is_forged(result, document=True)


def test_every_string_alone(run: Run, victims: Victims) -> None:
    """Also where a file is refused for it: an enumeration, a schema."""
    tried = set()
    for at in victims.places:
        if kind_of(at) in tried:
            continue
        tried.add(kind_of(at))
        path = victims.one(at)
        for command in ("status", "verify", "verify --before FILE"):
            result = run(*words(command, victims, path))
            nothing_is_forged(result)
            assert at not in victims.refused or result.status == 2
    assert len(tried) > 25


def test_the_strings_are_shown(run: Run, victims: Victims) -> None:
    """That the tests above have looked at something."""
    shown = "".join(
        re.sub(r"\s", "", run(*words(command, victims, victims.all)).out) for command in COMMANDS
    )
    seen = {kind_of(at) for number, at in enumerate(victims.places) if marker(number) in shown}
    assert seen >= {("kernel", "release"), ("taken", "source"), ("taken", "time")}
    assert seen >= {("taken", "khoscope"), ("kernel", "boot_id")}
    # Of a root FDT its bytes are shown, and nothing that is recorded of them.
    assert ("outgoing", "fdt", "subtrees", "*", "name") not in seen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_with_names_in_an_fdt(run: Run, tmp_path: Path, command: str) -> None:
    """They are in no string of the schema, but in bytes."""
    name = f"a{HOSTILE}".encode("ascii", "replace").decode()
    fdt = Fdt(0x2000, "kho-v4", ROOT, [Subtree(name, 0x5000, 16)])
    facts = snapshot(PLAIN, [Block(0x1000)], fdt=parse_root_fdt(0x2000, fdt_blob(fdt)))
    side = replace(facts.outgoing, blobs={"fdt": fdt_blob(fdt)})
    facts = replace(facts, outgoing=side)
    path = tmp_path / "a.khosnap"
    store.save_file(facts, path)
    names = {"FILE": str(path), "OTHER": str(path), "COPY": str(tmp_path / "b.khosnap")}
    result = run("--snapshot", path, *(names.get(word, word) for word in command.split()))
    nothing_is_forged(result)
    if command in ("status", "fdt out"):
        assert "a\\nPASS" in result.out or "a\\x0aPASS" in result.out


@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "snapshot COPY"])
def test_on_a_terminal_there_are_our_colours_and_no_others(
    run: Run, victims: Victims, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no line is laid out otherwise for them."""
    arguments = words(command, victims, victims.all)
    plain = run(*arguments).out
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    main(arguments)
    assert COLOURS.sub("", out.getvalue()) == plain


def test_recordings(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.khotrace"
    write(path, some_batches())
    whole = path.read_bytes()
    said = set()
    for name in ("meta.json", "facts/meta.json"):
        for number, at in enumerate(strings(meta_of(whole, name))):
            meta = meta_of(whole, name)
            extended(meta, at, HOSTILE + marker(number))
            path.write_bytes(rewritten({name: json.dumps(meta).encode()}, whole))
            for more in ([], ["--summary"], ["--stacks", "--check"]):
                result = run("trace", "--replay", str(path), *more)
                nothing_is_forged(result)
                said.add(result.status)
    assert said >= {0, 2}


def test_names_in_a_recording(run: Run, tmp_path: Path) -> None:
    """What the kernel says of tasks and subtrees is bytes; some_batches() has any at all."""
    path = tmp_path / "a.khotrace"
    write(path, some_batches())
    for more in ([], ["--stacks"], ["--summary"]):
        nothing_is_forged(run("trace", "--replay", str(path), "--limit", "0", *more))


def test_names_of_files(run: Run, tmp_path: Path) -> None:
    path = tmp_path / HOSTILE
    for arguments in (
        ["--snapshot", path, "status"],
        ["diff", path, path],
        ["--core", path, "tree"],
        ["trace", "--replay", path],
        ["--snapshot", demo.path("odd-after"), "verify", "--next", path],
        ["--snapshot", demo.path("odd-after"), "snapshot", path / "x"],
    ):
        result = run(*arguments)
        assert result.status == 2
        nothing_is_forged(result)


@pytest.mark.parametrize(
    "words", [[HOSTILE], ["tree", HOSTILE], ["checks", HOSTILE], ["-" + HOSTILE]]
)
def test_words_that_nobody_knows(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    nothing_is_forged(result)
    assert "error: " in result.err.splitlines()[-1]


# Device-tree source


def source(tree: DeviceTree, values: dict[int, Any]) -> list[str]:
    out = io.StringIO()
    FdtText(out).tree_source(tree, values)
    return out.getvalue().splitlines()


def test_a_comment_does_not_end_early() -> None:
    evil = "*/ evil; /* \u05d0"
    found = Property("compatible", evil.encode() + b"\0", 7)
    lines = source(DeviceTree(Node("", [found]), 0, [], []), {7: evil})
    comments = [line for line in lines if "/*" in line]
    assert comments == ["    /* *\\x2f evil; /* \\u05d0 */"]
    assert "evil" not in "".join(line for line in lines if line not in comments)


def test_a_name_is_only_a_name() -> None:
    evil = 'a"; /* \n{'
    node = Node(evil, [Property(evil, b"", 0)], [])
    lines = source(DeviceTree(Node("", [], [node]), 0, [], []), {})
    assert "    a\\x22\\x3b\\x20\\x2f*\\x20\\x0a\\x7b {" in lines
    assert "        a\\x22\\x3b\\x20\\x2f*\\x20\\x0a\\x7b;" in lines


def test_a_verdict_is_ours() -> None:
    """The files in which this was found: a release that ends its line."""
    out = io.StringIO()
    facts = snapshot(PLAIN, [Block(0x1000)], release=f"7.2{HOSTILE}")
    Text(out).verify(facts, check(facts))
    lines = out.getvalue().split("\n")
    assert lines[0].startswith("'7.2\\nPASS: safe to kexec\\x1b[31m\\u202e\\u200b', ")
    assert [line for line in lines if line.startswith("PASS")] in ([], [lines[-2]])
