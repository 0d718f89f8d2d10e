# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reaches a terminal."""

from __future__ import annotations

import io
import json

import numpy as np

from khoscope.abi.keys import BAD_ORDER, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT, NO_TYPE
from khoscope.facts.columns import Blocks
from khoscope.views import documents
from khoscope.views.text import Text
from tests.synthetic import PLAIN, Block, snapshot


def test_facts_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    Text(out).header(snapshot(PLAIN, [Block(0x1000)], release="7.2\033]0;owned\007\x9b2J\r"))
    assert "7.2\\x1b]0;owned\\x07\\x9b2J\\r" in out.getvalue()
    assert not set(out.getvalue()) & {"\033", "\007", "\x9b", "\r"}


def test_lines_of_blocks_are_their_rows() -> None:
    """Written by templates, as json.dumps() writes each of them."""
    random = np.random.default_rng(3)
    count = 500
    order = random.choice(np.array([0, 3, 10, 52, 63, 64, BAD_ORDER], np.uint8), count)
    kind = random.choice(np.array([NO_TYPE, KHO_PAGE_CONTIG, KHO_PAGE_SPLIT], np.int8), count)
    key, phys = random.integers(0, 2**64, (2, count), np.uint64, endpoint=False)
    phys[:9] = 0
    blocks = Blocks(key, phys, order, kind)
    rows = list(documents.block_rows(blocks))
    assert list(documents.block_lines(blocks)) == list(map(json.dumps, rows))
    who = random.integers(-1, 3, count)
    names = {i: {"owner": f'100 % of "{i}" {{}}\u00fc'} if i else {} for i in range(-1, 3)}
    named = [{**row, **names[each]} for row, each in zip(rows, who.tolist(), strict=True)]
    lines = documents.block_lines(blocks, who, names.__getitem__)
    assert list(lines) == list(map(json.dumps, named))
    assert list(documents.block_lines(Blocks.empty())) == []
    keys = [json.dumps({"key": f"{each:#x}"}) for each in key.tolist()]
    assert list(documents.key_lines(blocks)) == keys
