# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes BTF, type by type, as ``Documentation/bpf/btf.rst`` has it; also wrong BTF."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = range(1, 9)
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC = range(9, 16)
FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(16, 20)
SIGNED, CHAR, BOOL = 1, 2, 4


class Writer:
    """
    Types get their ids in the order in which they are added.

    :param first: the id of the first, and the offset of the first string: of split BTF, those
        after its base's.
    """

    def __init__(self, first: int = 1, first_string: int = 0) -> None:
        self._first_string = first_string
        self._types: list[bytes] = []
        self._strings = b"" if first_string else b"\0"
        self._known = {"": 0}
        self.first = first

    def string(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = self._first_string + len(self._strings)
            self._strings += text.encode() + b"\0"
        return self._known[text]

    @property
    def next(self) -> int:
        """The id that the next type gets."""
        return self.first + len(self._types)

    @property
    def end_string(self) -> int:
        return self._first_string + len(self._strings)

    def add(
        self,
        kind: int,
        name: str = "",
        value: int = 0,
        more: Sequence[int] = (),
        count: int = 0,
        flag: bool = False,
    ) -> int:
        """Any ``struct btf_type`` with its words after it; the id."""
        words = (self.string(name), flag << 31 | kind << 24 | count, value, *more)
        self._types.append(struct.pack(f"<{len(words)}I", *(word & 0xFFFFFFFF for word in words)))
        return self.next - 1

    def integer(self, name: str, size: int, encoding: int = 0, bits: int = 0, at: int = 0) -> int:
        return self.add(INT, name, size, [encoding << 24 | at << 16 | (bits or 8 * size)])

    def array(self, element: int, count: int) -> int:
        return self.add(ARRAY, "", 0, [element, element, count])

    def struct(
        self,
        name: str,
        size: int,
        members: Iterable[tuple[str, int, int]],
        kind: int = STRUCT,
        flag: bool = False,
    ) -> int:
        """Members: name, type, offset in bits (and with a flag the width of a bit-field above)."""
        words = [word for m in members for word in (self.string(m[0]), m[1], m[2])]
        return self.add(kind, name, size, words, len(words) // 3, flag)

    def enum(
        self,
        name: str,
        values: dict[str, int],
        size: int = 4,
        signed: bool = False,
        wide: bool = False,
    ) -> int:
        words: list[int] = []
        for text, value in values.items():
            words += [self.string(text), value & 0xFFFFFFFF]
            if wide:
                words.append(value >> 32 & 0xFFFFFFFF)
        return self.add(ENUM64 if wide else ENUM, name, size, words, len(values), signed)

    def function(self, name: str, returns: int, parameters: Iterable[tuple[str, int]]) -> int:
        words = [word for text, kind in parameters for word in (self.string(text), kind)]
        proto = self.add(FUNC_PROTO, "", returns, words, len(words) // 2)
        return self.add(FUNC, name, proto, count=1)

    def data(self, layout: bytes | None = None) -> bytes:
        """The whole; `layout`: the section that describes kinds, with the longer header."""
        types = b"".join(self._types)
        lengths = [0, len(types), len(types), len(self._strings)]
        if layout is not None:
            lengths += [len(types) + len(self._strings), len(layout)]
        header = struct.pack("<HBBI", 0xEB9F, 1, 0, 8 + 4 * len(lengths))
        header += struct.pack(f"<{len(lengths)}I", *lengths)
        return header + types + self._strings + (layout or b"")
