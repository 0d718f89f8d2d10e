# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session of more files than khoscope once took for a list that loops, across a kexec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from khoscope.abi.serialized import KHO_BLOCK_HEADER_SER, LUO_FILE_SER
from khoscope.facts.store import load_file
from tests.vm.test_khoscope import host
from tests.vm.test_rules import rules
from vm.job import Job
from vm.kernel import under_test
from vm.machine import Machine

PAGE = 4096
FILES = 20_000
#: LUO before linux 7.2 has room for 128 files in a session.
KERNELS = [name for name in under_test() if name.startswith(("7.2", "7.3"))][:1] or ["7.2-fixed"]

_HOLD = f"""
import os, signal
from khoscope.carry.liveupdate import LiveUpdate
with LiveUpdate() as device:
    session = device.create_session("many")
for token in range({FILES}):
    fd = os.memfd_create("", os.MFD_ALLOW_SEALING)
    os.write(fd, b"%d" % token)
    session.preserve_fd(fd, token)
    os.close(fd)
print("held", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_files(kernel: str, tmp_path: Path) -> None:
    before = tmp_path / "before.khosnap"
    with Machine(kernel, memory=3072) as machine:
        words = ("env", "PYTHONPATH=/khoscope", "python3", "-c", _HOLD)
        Job(machine, "/root/many", words).until_on(600)
        luo = json.loads(host(*machine.source, "luo", "--json"))["outgoing"]
        (session,) = luo["sessions"]
        assert (luo["problems"], session["problems"]) == ([], [])
        assert (session["name"], session["count"]) == ("many", FILES)
        assert [int(file["token"], 16) for file in session["files"]] == [*range(FILES)]
        for file in session["files"]:
            token = int(file["token"], 16)
            memfd = file["memfd"]
            assert (memfd["size"], memfd["pages"], memfd["problems"]) == (len(str(token)), 1, [])
        # Each page is one file's.
        pages = [(each["phys"], each["size"]) for f in session["files"] for each in ranges(f)]
        assert len({*pages}) == FILES
        # Whole pages: each file's data, its structure, the list of its folios and that list's
        # chunk; and the blocks of the session's list.
        per_block = (PAGE - KHO_BLOCK_HEADER_SER.itemsize) // LUO_FILE_SER.itemsize
        assert session["bytes"] == (4 * FILES + -(-FILES // per_block)) * PAGE
        machine.load_kexec()
        report = json.loads(host(*machine.source, "verify", "--json"))
        assert report["verdict"] == "pass"
        assert "broken-luo" not in rules(report["findings"])
        host(*machine.source, "snapshot", str(before))
        facts = load_file(before)
        assert facts.outgoing.luo is not None
        assert len(facts.outgoing.luo.sessions[0].files) == FILES
        machine.execute_kexec()
        came = json.loads(host(*machine.source, "luo", "--json"))["incoming"]
        assert [file["memfd"] for file in came["sessions"][0]["files"]] == [
            file["memfd"] for file in session["files"]
        ]
        report = json.loads(host(*machine.source, "verify", "--before", str(before), "--json"))
        assert report["verdict"] == "pass"


def ranges(file: dict[str, object]) -> list[dict[str, object]]:
    memfd = file["memfd"]
    assert isinstance(memfd, dict)
    found: list[dict[str, object]] = memfd["ranges"]
    return found
