# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demo's snapshots of real guests: they load, and the checks still say what they said."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from khoscope import demo
from khoscope.cli import main
from khoscope.demo import SCENES, Scene
from khoscope.facts.columns import Blocks
from khoscope.sources.walk import in_ranges
from khoscope.views import documents

NAMES = [scene.name for scene in SCENES]


def recorded() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        resources.files(demo).joinpath("findings.json").read_text()
    )
    return found


def test_every_scene_is_recorded() -> None:
    assert set(recorded()) == set(NAMES)
    files = {path.name for path in demo.path("x").parent.glob("*.khosnap")}
    assert files == {f"{name}.khosnap" for name in NAMES}


def test_snapshots_are_small() -> None:
    assert sum(demo.path(name).stat().st_size for name in NAMES) < 1 << 20


@pytest.mark.parametrize("scene", SCENES, ids=NAMES)
def test_findings_are_those_that_were_recorded(scene: Scene) -> None:
    _, report = demo.load(scene)
    found = documents.verdict(report)
    wanted = recorded()[scene.name]
    for finding in found["findings"]:
        # The explanation is the rule's, not the guest's.
        assert finding.pop("explain")
    assert {name: found[name] for name in wanted} == wanted
    assert found["incomplete"] == []


@pytest.mark.parametrize("scene", SCENES, ids=NAMES)
def test_facts_agree_with_themselves(scene: Scene) -> None:
    """Blocks that were kept with their pages are those of the tree, and lie in RAM."""
    facts, _ = demo.load(scene)
    abi = facts.abi
    kept = Blocks.concatenate(facts.outgoing.blocks)
    decoded = Blocks.concatenate(facts.outgoing.tree.blocks(abi))
    for column in Blocks.DTYPES:
        assert (getattr(kept, column) == getattr(decoded, column)).all()
    assert in_ranges(facts.ram, kept.phys, kept.end(abi.page_shift)).all()
    assert facts.scan is not None
    assert facts.scan.unread == 0
    assert (facts.incoming is not None) == (scene.before is not None) == facts.handover.is_kho_boot


def test_what_the_demo_is_about() -> None:
    """Before the kexec khoscope says what happens after it, and whose fault it is."""
    assert {name: scene["verdict"] for name, scene in recorded().items()} == {
        **dict.fromkeys(("rfc-before", "rfc-after"), "fail"),
        **dict.fromkeys(("fixed-before", "fixed-after"), "pass"),
        **dict.fromkeys(("odd-before", "odd-after"), "fail"),
    }
    rules = {name: {f["rule"] for f in scene["findings"]} for name, scene in recorded().items()}
    # The same memory is on both kernels: whatever is wrong with it follows from the lost type.  How
    # the folios of the exercise module will be restored, nothing in memory says.
    assert rules["rfc-before"] == {
        *("type-not-stored", "abi-not-bumped", "type-mismatch", "wrong-after-restore"),
        "needs-folio-restore",
    }
    _, report = demo.load(SCENES[0])
    lost = report.follows["type-not-stored"]
    assert lost == {name: report.counts[name] for name in ("type-mismatch", "wrong-after-restore")}
    assert "wrong-refcounts" in rules["rfc-after"]
    assert rules["fixed-before"] == {"needs-folio-restore"}
    assert {"mixed-refcounts", "stale-entry", "type-mismatch"} <= rules["odd-before"]


def test_demo_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(f"{name} ─" in out for name in NAMES)
    assert all(f"$ {demo.command(scene)}" in out for scene in SCENES)
    assert "python -m vm record" in out
    assert "\033" not in out
    directory = str(demo.path("x").parent)
    wide = [line for line in out.splitlines() if len(line) > 80 and directory not in line]
    assert wide == []


def test_demo_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "khoscope.demo/1"
    assert [scene["name"] for scene in document["scenes"]] == NAMES
    verdicts = {scene["name"]: scene["verdict"] for scene in document["scenes"]}
    assert verdicts == {name: scene["verdict"] for name, scene in recorded().items()}
