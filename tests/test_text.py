# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reaches a terminal."""

from __future__ import annotations

import io

from khoscope.views.text import Text
from tests.synthetic import PLAIN, Block, snapshot


def test_facts_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    Text(out).header(snapshot(PLAIN, [Block(0x1000)], release="7.2\033]0;owned\007\x9b2J\r"))
    assert "7.2\\x1b]0;owned\\x07\\x9b2J\\r" in out.getvalue()
    assert not set(out.getvalue()) & {"\033", "\007", "\x9b", "\r"}
