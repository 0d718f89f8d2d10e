# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the binding of /dev/liveupdate says to the kernel, byte for byte; no kernel needed."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from khoscope.carry.liveupdate import LiveUpdate
from khoscope.sources import host_files


class Kernel:
    """ioctl() as the kernel's: takes down what was asked, and answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bytes]] = []
        #: What it writes over the structure, from the second member on.
        self.answer = b""

    def ioctl(self, fd: int, request: int, argument: bytearray) -> int:
        os.fstat(fd)
        self.asked.append((request, bytes(argument)))
        argument[4 : 4 + len(self.answer)] = self.answer
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    kernel = Kernel()
    device = tmp_path / "liveupdate"
    device.touch()
    monkeypatch.setattr(host_files, "LIVEUPDATE", device)
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    return kernel


def test_create_and_preserve(kernel: Kernel) -> None:
    """Numbers and layouts as a C program of the uapi header has them."""
    fd = os.open(os.devnull, os.O_RDONLY)
    kernel.answer = struct.pack("=i", fd)
    with LiveUpdate() as device, device.create_session("khoscope") as session:
        kernel.answer = b""
        session.preserve_fd(7, 0x1122334455667788)
    assert kernel.asked == [
        (0xBA00, struct.pack("=Ii", 72, -1) + b"khoscope".ljust(64, b"\0")),
        (0xBA40, struct.pack("=Ii", 16, 7) + bytes.fromhex("8877665544332211")),
    ]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_retrieve_name_and_finish(kernel: Kernel) -> None:
    kernel.answer = struct.pack("=i", os.open(os.devnull, os.O_RDONLY))
    with LiveUpdate() as device, device.retrieve_session("a") as session:
        kernel.answer = struct.pack("=i", 33)
        assert session.retrieve_fd(5) == 33
        kernel.answer = struct.pack("=I64s", 0, b"a\xff")
        assert session.name() == os.fsdecode(b"a\xff")
        kernel.answer = b""
        session.finish()
    assert kernel.asked == [
        (0xBA01, struct.pack("=Ii", 72, -1) + b"a".ljust(64, b"\0")),
        (0xBA41, struct.pack("=IiQ", 16, -1, 5)),
        (0xBA43, struct.pack("=I", 72) + bytes(68)),
        (0xBA42, struct.pack("=II", 8, 0)),
    ]


def test_the_device_is_closed_once(kernel: Kernel) -> None:
    device = LiveUpdate()
    device.close()
    other = os.open(os.devnull, os.O_RDONLY)
    device.close()
    os.close(other)


def test_errors_come_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_files, "LIVEUPDATE", tmp_path / "none")
    with pytest.raises(OSError, match="No such file") as caught:
        LiveUpdate()
    assert caught.value.errno == errno.ENOENT
