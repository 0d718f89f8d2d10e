# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Views of ``khoscope fdt``.

A tree is printed as device-tree source, from which dtc makes the same properties.  Numbers are
printed as byte strings, as they stand in memory, and a comment says what they mean: ``<…>`` would
be big endian, but KHO's values are not.  Remarks about a tree are ``//`` comments, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

from ..abi.fdt import DeviceTree, Node, Property
from ..facts.blobs import Area, Blob, Value
from ..facts.snapshot import Snapshot
from ..words.printable import printable
from . import documents
from .text import WIDTH, Text, counted

_INDENT = " " * 4
#: Bytes in one line of a dump or of a byte string.
_ROW = 16
#: Characters that a name may not have. A backslash begins a character that fdt.py has escaped.
_NO_NAME = re.compile(r"[^0-9A-Za-z,._+*#?@\\-]")


class FdtText(Text):
    """Writes blobs as text."""

    def fdt(self, facts: Snapshot, which: str, blobs: Iterable[Blob]) -> None:
        """``khoscope fdt``."""
        self.line(f"// {facts.kernel.release}, {facts.taken.source}, {which}")
        self.line(f"// read {facts.taken.time} by khoscope {facts.taken.khoscope}")
        if which == "in":
            self.line("// What clients have taken back may hold anything by now, and look broken.")
        for blob in blobs:
            self.line()
            self.blob(blob)

    def blob(self, blob: Blob) -> None:
        """Print a blob; its problems come first."""
        self.wrapped(_title(blob), "//   ", "// ", "bold")
        if blob.preserved is False:
            self.line(self.paint("red", "// not preserved: the next kernel may find anything"))
        self.problems(blob.problems)
        if blob.tree:
            self.tree_source(blob.tree, blob.values)
        elif blob.fields:
            for name, value in blob.fields.items():
                self.line(f"{name:<16}  {_words(value)}".rstrip())
        elif blob.raw:
            self.dump(blob.raw)
        for area in blob.areas:
            self.area(area)

    def tree_source(self, tree: DeviceTree, values: dict[int, Value]) -> None:
        """An FDT as device-tree source."""
        self.line("/dts-v1/;")
        for phys, size in tree.reserved:
            self.line(f"/memreserve/ {phys:#x} {size:#x};")
        self.line()
        self._node(tree.root, values, "")

    def _node(self, node: Node, values: dict[int, Value], indent: str) -> None:
        self.line(f"{indent}{_name(node.name) or '/'} {{")
        inside = indent + _INDENT
        for found in node.properties:
            self._property(found, values.get(found.offset), inside)
        for i, child in enumerate(node.children):
            if i or node.properties:
                self.line()
            self._node(child, values, inside)
        self.line(f"{indent}}};")

    def _property(self, found: Property, value: Value | None, indent: str) -> None:
        name = indent + _name(found.name)
        if not found.value:
            self.line(f"{name};")
            return
        strings = _strings(found.value, value)
        if strings:
            self.line(f"{name} = {strings};")
            return
        rows = [row.hex(" ") for row in _rows(found.value)]
        source = f"{name} = [{rows[0]}];"
        comment = "" if value is None else f"/* {_comment(_words(value))} */"
        below = len(rows) > 1 or len(source) > WIDTH
        if not below and len(source) + len(comment) < WIDTH:
            source, comment = f"{source} {comment}".rstrip(), ""
        if comment:
            self.line(indent + comment)
        if below:
            self._byte_rows(name, rows, indent + _INDENT)
        else:
            self.line(source)

    def _byte_rows(self, name: str, rows: list[str], indent: str) -> None:
        """Print a byte string below its name, each row on a line of its own."""
        self.line(f"{name} =")
        for i, row in enumerate(rows):
            self.line(f"{indent}{' ' if i else '['}{row}{'];' if i == len(rows) - 1 else ''}")

    def dump(self, raw: bytes) -> None:
        """Print bytes in hex and as text."""
        rows = -(-len(raw) // _ROW)
        for i, row in enumerate(islice(_rows(raw), self._limit)):
            text = "".join(chr(c) if 0x20 <= c < 0x7F else "." for c in row)
            self.line(f"{_ROW * i:08x}  {row.hex(' '):<{3 * _ROW - 1}}  {text}")
        self._more(rows, rows, f"rows of {_ROW} bytes")

    def area(self, area: Area) -> None:
        """Print a vmalloc area and its chain."""
        what = f"{area.where}: struct kho_vmalloc"
        if area.chain is None:
            self.line(f"// {what}, its chain was not followed")
            return
        chunks, pages = counted(area.chain.chunks, "chunk"), counted(area.chain.listed, "page")
        self.line(f"// {what}, its chain: {chunks}, {pages} listed")
        self.problems(area.chain.problems)

    def problems(self, problems: list[str]) -> None:
        """Print the problems."""
        for problem in islice(problems, self._limit):
            self.wrapped(problem, "//   ", self.paint("red", "// problem: "))
        self._more(len(problems), len(problems), "problems")


def _title(blob: Blob) -> str:
    name = "root FDT" if blob.name is None else blob.name
    size = "size unknown" if blob.size is None else counted(blob.size, "byte")
    phys = "" if blob.phys is None else f" at {blob.phys:#x}"
    preserved = ", preserved" if blob.preserved else ""
    kind = "" if blob.name is None else f"{blob.kind}, "
    return f"{name}: {kind}{size}{phys}{preserved}"


def _name(text: str) -> str:
    """A name that dtc accepts; other characters would mean something in device-tree source."""
    return _NO_NAME.sub(lambda c: f"\\x{ord(c[0]):02x}", text)


def _comment(text: str) -> str:
    """The text, changed so that it cannot end the comment around it."""
    return text.replace("*/", "*\\x2f")


def _rows(raw: bytes) -> Iterable[bytes]:
    return (raw[at : at + _ROW] for at in range(0, len(raw), _ROW))


def _strings(raw: bytes, value: Value | None) -> str:
    """A value as strings of device-tree source, or empty text if the value is not strings."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or "".join(f"{text}\0" for text in texts).encode() != raw:
        return ""
    # If a character needed an escape, print bytes instead: dtc has escapes of its own.
    if any(printable(text) != text for text in texts):
        return ""
    quoted = (text.replace("\\", r"\\").replace('"', r"\"") for text in texts)
    return ", ".join(f'"{text}"' for text in quoted)


def _words(value: Value) -> str:
    """A value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(value) or "none"
    return str(value)


def write_json(facts: Snapshot, which: str, blobs: list[Blob], out: IO[str]) -> None:
    """
    ``fdt --json``, schema khoscope.fdt/1.

    :param blobs: the root FDT and all subtrees, or the one subtree that was asked for.
    """
    rows = [(blob.name, _row(blob)) for blob in blobs]
    document = {
        "schema": "khoscope.fdt/1",
        **documents.about(facts),
        "side": which,
        "fdt": next((row for name, row in rows if name is None), None),
        "subtrees": [{"name": name, **row} for name, row in rows if name is not None],
    }
    documents.write(document, out)


def _row(blob: Blob) -> dict[str, Any]:
    """A blob; with its bytes if they are not an FDT."""
    return {
        "phys": _address(blob.phys),
        "size": blob.size,
        "kept": len(blob.raw or b""),
        "preserved": blob.preserved,
        "kind": str(blob.kind),
        "decoded": blob.fields,
        "tree": _tree_row(blob.tree.root, blob.values) if blob.tree else None,
        "raw": blob.raw.hex() if blob.raw and not blob.tree else None,
        "vmallocs": [_area_row(area) for area in blob.areas],
        "problems": blob.problems,
    }


def _tree_row(node: Node, values: dict[int, Value]) -> dict[str, Any]:
    """A node. If a name is there twice, the first one counts, as in the kernel."""
    row: dict[str, Any] = {"properties": {}, "nodes": {}}
    for found in node.properties:
        value = {"raw": found.value.hex(), "decoded": values.get(found.offset)}
        row["properties"].setdefault(found.name, value)
    for child in node.children:
        row["nodes"].setdefault(child.name, _tree_row(child, values))
    return row


def _area_row(area: Area) -> dict[str, Any]:
    chain = area.chain and {
        "chunks": area.chain.chunks,
        "listed": area.chain.listed,
        "problems": area.chain.problems,
    }
    return {"property": area.where, "decoded": area.decoded, "chain": chain}


def _address(phys: int | None) -> str | None:
    return None if phys is None else f"{phys:#x}"
