# SPDX-License-Identifier: LGPL-2.1-or-later
"""The images of the kernels that are built: what each says, and which may follow which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from khoscope.abi.kho_fdt import Fdt
from khoscope.checks.next_kernel import image_abi_differs
from khoscope.facts.clients import Luo, LuoFile, LuoSession
from khoscope.facts.next_kernel import NextKernel
from khoscope.facts.snapshot import Snapshot
from khoscope.sources.next_kernel import read_image
from khoscope.words.errors import KhoscopeError
from tests.synthetic import PLAIN, snapshot
from vm.kernel import Kernel, find, under_test, what

KHO = {"base": "kho-v4", "rfc": "kho-v4", "fixed": "kho-v5"}


def built(name: str) -> Kernel:
    kernel = find(name)
    assert kernel is not None, f"{name} is not built: python -m vm build"
    return kernel


def handed_over_by(kernel: NextKernel) -> Snapshot:
    """What a kernel hands over that has one memfd in a session."""
    (kho,), (luo,), (memfd,) = kernel.kho, kernel.luo, kernel.memfd
    sessions = [LuoSession("vm", False, 1, [LuoFile(memfd, 1, 0x1000)])]
    facts = snapshot(PLAIN, [], fdt=Fdt(0x2000, kho, 0x1000))
    return replace(facts, outgoing=replace(facts.outgoing, luo=Luo(0x9000, luo, 1, True, sessions)))


@pytest.mark.parametrize("name", under_test())
def test_image(name: str) -> None:
    kernel = built(name)
    path = kernel.share / "bzImage"
    found = read_image(path)
    assert found == NextKernel(
        str(path), "zstd", kernel.release, (KHO[what(name)],), ("luo-v5",), ("memfd-v2",)
    )
    vmlinux = kernel.share / "vmlinux"
    assert read_image(vmlinux) == replace(found, path=str(vmlinux), compression=None)
    # Both are in the one directory: the same kernel.
    assert read_image(kernel.share) == found


@pytest.mark.parametrize("before", under_test())
@pytest.mark.parametrize("after", under_test())
def test_which_may_follow_which(before: str, after: str) -> None:
    facts = handed_over_by(read_image(built(before).share))
    following = read_image(built(after).share)
    said = [message.text for message in image_abi_differs(facts, following)]
    old, new = KHO[what(before)], KHO[what(after)]
    if old == new:
        assert said == []
    else:
        assert said == [
            f"{built(after).release} takes {new}, this kernel hands over {old}: "
            "it boots as if nothing was handed over"
        ]


def test_truncated_image(tmp_path: Path) -> None:
    """A download that was cut short is no kernel without KHO."""
    whole = (built("7.2-fixed").share / "bzImage").read_bytes()
    path = tmp_path / "bzImage"
    for length in (0, 0x24F, 0x4000, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(KhoscopeError):
            read_image(path)
