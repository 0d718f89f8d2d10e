# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host offers to khoscope: facts, each with where it was read and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Whether it is there."""

    OK = "ok"
    NO = "no"
    UNKNOWN = "?"


@dataclass(frozen=True)
class Fact:
    """
    Something that khoscope, or a part of it, needs.

    :param value: what was found, in words.
    :param read_from: the file or the kernel's variable.
    :param hint: what to do; empty if there is nothing to do.
    :param needed: by all commands that read the running kernel, not only by some others.
    """

    name: str
    state: State
    value: str
    read_from: str
    hint: str = ""
    needed: bool = False


def missing(facts: list[Fact]) -> Fact | None:
    """The first needed thing that is missing, or that may be missing."""
    return next((fact for fact in facts if fact.needed and fact.state != State.OK), None)
