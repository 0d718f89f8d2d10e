# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The demo: it runs the checks on snapshots of real guests that ship with khoscope.

``python -m vm record`` made the snapshots, before and after a kexec.  First, they show the same
healthy memory on two kernels: one with the patch series as posted, one with the repaired series.
Then they show everything that the exercise module can do wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

from .. import checks
from ..checks import Report
from ..facts import store
from ..facts.snapshot import Snapshot
from ..views import documents
from ..views.text import Text


@dataclass(frozen=True)
class Scene:
    """
    One kernel on one side of a kexec.

    :param name: name of the snapshot file, without its ending.
    :param before: name of the scene before the kexec, or None if this scene is before it.
    :param story: what the scene shows.
    """

    name: str
    before: str | None
    story: str


SCENES = [
    Scene(
        "rfc-before",
        None,
        "The series as posted, before the kexec, and memory with which nothing is wrong: unsplit "
        "and split blocks, folios, DMA buffers, vmalloc areas. The page type is in a key bit that "
        "the tree does not store. khoscope says so before any harm is done.",
    ),
    Scene(
        "rfc-after",
        "rfc-before",
        "The same machine after the kexec, its memory restored: what was split has lost the "
        "references of all pages but the first.",
    ),
    Scene(
        "fixed-before",
        None,
        "The same memory on a kernel whose type bit is where the tree keeps it.",
    ),
    Scene("fixed-after", "fixed-before", "After the kexec: all of it came back as it was."),
    Scene(
        "odd-before",
        None,
        "That kernel once more, and memory that no type describes: neighbours preserved as one, "
        "parts of a block, memory split or freed behind KHO's back.",
    ),
    Scene(
        "odd-after",
        "odd-before",
        "After the kexec: what the checks had named before is wrong now, and nothing else.",
    ),
]


def path(name: str) -> Path:
    """The file of a scene's snapshot."""
    return Path(str(resources.files(__name__))) / f"{name}.khosnap"


def load(scene: Scene) -> tuple[Snapshot, Report]:
    """A scene's facts, and what the checks find in them."""
    facts = store.load_file(path(scene.name))
    if scene.before is None:
        return facts, checks.check(facts)
    return facts, checks.compare(store.load_file(path(scene.before)), facts)


def command(scene: Scene) -> str:
    """The command that shows a scene in full."""
    before = f" --before {scene.before}.khosnap" if scene.before else ""
    return f"khoscope --snapshot {scene.name}.khosnap verify{before}"


def show(out: IO[str], as_json: bool) -> None:
    """Show all scenes, as text or as one document (schema khoscope.demo/1)."""
    if as_json:
        scenes = []
        for scene in SCENES:
            facts, report = load(scene)
            about = documents.about(facts)
            verdict = documents.verdict(report)
            scenes.append({"name": scene.name, "story": scene.story, **about, **verdict})
        documents.write({"schema": "khoscope.demo/1", "scenes": scenes}, out)
        return
    text = Text(out)
    explained: set[str] = set()
    text.wrapped(
        "These are snapshots of real kernels in a VM, in which a module preserved memory of "
        "every kind. All you see is computed now, from the facts in the files."
    )
    for scene in SCENES:
        facts, report = load(scene)
        text.scene(scene.name, scene.story, facts, report, explained)
        text.line(f"$ {command(scene)}")
    text.line()
    text.line(f"The files are in {path('').parent}")
    text.line("They were made by: python -m vm record")
