# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels for arm64 with 4, 16 and 64 KiB pages, and guests to boot them in, under TCG.

    with Arm64("7.2-arm64-64k") as guest:
        guest.ask("load", guest.command_line(2))
        guest.kexec()

The kernels are as small as kernels with KHO can be. A guest is an initramfs with one program
(vm/guest-arm64/init.c), without a root file system or modules. khoscope looks at it from the host.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from vm import cache, debian, kernel
from vm.cache import Log
from vm.kernel import Kernel
from vm.machine import GuestDied, GuestError, GuestHung, MachineError, start_qemu

#: All arm64 kernels that are built.
NAMES = list(kernel.ARM64)

#: Seconds. A boot takes only a few, but under TCG on a busy host it takes many.
TIMEOUT = 240.0

# Part of every kernel's key: increase it when the recipe below changes what it makes.
_RECIPE = "1"

_PREFIX = "aarch64-linux-gnu-"
_HERE = Path(__file__).parent
_CONFIG = _HERE / "arm64.config"
_INIT = _HERE / "guest-arm64/init.c"
_COMMANDS = [
    *("bc", "bison", "ccache", "flex", "gcc", "make", "patch", "perl", "tar", "xz"),
    f"{_PREFIX}gcc",
]
_ANSWER = "khoscope-init: "
_CONSOLE_TAIL = 40


def find(name: str) -> Kernel | None:
    """The kernel built from its current sources, or None if it is not built."""
    source = kernel.source_of(kernel.series(name))
    if source is None:
        return None
    entry = _entry(name, source)
    return _kernel(name, entry) if entry.exists() and _init_entry().exists() else None


def build(name: str) -> Kernel:
    """The kernel, which is built now if it is missing. Call this inside `cache.locked()`."""
    series = kernel.series(name)
    archive = kernel.source_of(series) or kernel.fetch(series)
    entry, init = _entry(name, archive), _init_entry()
    if not entry.exists() or not init.exists():
        debian.require(_COMMANDS)
        with Log(name) as log:
            cache.make(entry, lambda to: _compile(name, archive, to, log))
            cache.make(init, lambda to: _compile_init(to, log))
    return _kernel(name, entry)


def clean() -> None:
    """Remove the work directory. Do so when nothing is left to build."""
    if _work().exists():
        cache.remove(_work())


def _kernel(name: str, entry: Path) -> Kernel:
    return Kernel(name, (entry / "release").read_text().strip(), entry)


def _entry(name: str, source: Path) -> Path:
    parts = (_RECIPE, kernel.compiler(_PREFIX), source.name, name, _wanted(name), _patches(name))
    return cache.entry(f"kernel-{name}", cache.digest(*parts))


def _init_entry() -> Path:
    return cache.entry("init-arm64", cache.digest(_RECIPE, kernel.compiler(_PREFIX), _INIT))


def _patches(name: str) -> dict[str, bytes]:
    return kernel.patches_of(kernel.ARM64[name][0])


def _wanted(name: str) -> str:
    """The kernel's configuration on top of tinyconfig."""
    suffix = name.partition("-")[2]
    option = kernel.ARM64[name][1]
    return f'{_CONFIG.read_text()}{option}\nCONFIG_LOCALVERSION="-khoscope-{suffix}"\n'


# These kernels have a work tree of their own, because the other tree holds objects for x86.


def _work() -> Path:
    return cache.directory() / "work-arm64"


def _compile(name: str, source: Path, to: Path, log: Log) -> None:
    """Fill a kernel entry."""
    tree = _work() / "linux"
    kernel.prepare(source, _patches(name), log, _work())
    arch = ("ARCH=arm64", f"CROSS_COMPILE={_PREFIX}")
    make = kernel.kbuild(tree, log, *arch, prefix=_PREFIX)
    kernel.configure(make, tree, name, _wanted(name), log)
    with log.step(f"compiling on {os.cpu_count()} processors"):
        make("Image")
    kernel.keep(tree, "arch/arm64/boot/Image", to)


def _compile_init(to: Path, log: Log) -> None:
    with log.step("compiling the guest's init"):
        options = ["-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector"]
        log.run([f"{_PREFIX}gcc", "-O2", "-Wall", "-Werror", *options, "-o", to / "init", _INIT])


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An initramfs in the format "newc", made from files by name, each with its mode."""
    out = bytearray()
    entries = {**files, "TRAILER!!!": (0, b"")}
    for number, (name, (mode, content)) in enumerate(entries.items(), 1):
        path = name.encode() + b"\0"
        header = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        for part in (b"070701" + b"".join(b"%08X" % n for n in header) + path, content):
            out += part
            out += bytes(-len(out) % 4)
    return bytes(out)


class Arm64:
    """One virtual machine, running from ``__enter__`` to ``__exit__``.

    :param name: the kernel to boot
    :param append: more words for its command line
    :param memory: the guest's memory in MiB. With 64 KiB pages, scratch areas are multiples of
        512 MiB
    """

    def __init__(self, name: str, append: str = "", memory: int = 4096) -> None:
        found = find(name)
        if found is None:
            raise MachineError(f"kernel {name} is not built; run: python -m vm build {name}")
        self.kernel = found
        self.boot_seconds = 0.0
        #: How many kernels this machine has started.
        self.boots = 0
        self._append = append
        self._memory = memory
        self._cleanup = contextlib.ExitStack()
        self._read = bytearray()
        self._seen = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def command_line(self, boot: int) -> str:
        """The kernel's command line at its boot number `boot`."""
        words = "console=ttyAMA0 panic=-1 printk.devkmsg=on kho=on liveupdate=on"
        return f"{words} {self._append} khoscope_boot={boot}"

    def console(self) -> str:
        """The console's text since the first boot."""
        return self._read.decode(errors="replace").replace("\r", "")

    def ask(self, word: str, rest: str = "", timeout: float = TIMEOUT) -> int:
        """Send a command to the guest's init, and return its answer; see vm/guest-arm64/init.c."""
        self._send(f"{word} {rest}".strip())
        return self._answer(word, timeout)

    def kexec(self) -> None:
        """Jumps into the kernel that was loaded, and waits for its init."""
        self._send("kexec")
        self._booted()

    def _start(self) -> None:
        started = time.monotonic()
        directory = Path(tempfile.mkdtemp(prefix="khoscope-arm64-"))
        self._cleanup.callback(shutil.rmtree, directory)
        #: QMP for other programs, such as ``khoscope --qemu``. It accepts one at a time.
        self.qmp_socket = directory / "qmp"
        initramfs = directory / "initramfs"
        initramfs.write_bytes(self._initramfs())
        self._serial, theirs = socket.socketpair()
        self._cleanup.enter_context(self._serial)
        # fmt: off
        arguments = [
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            # This is the smallest processor with all page sizes, so its emulation is the fastest.
            "-machine", "virt,gic-version=3", "-cpu", "cortex-a35", "-accel", "tcg",
            "-smp", "1", "-m", str(self._memory),
            "-kernel", str(self.kernel.share / "Image"), "-initrd", str(initramfs),
            "-append", self.command_line(1),
            "-device", "vmcoreinfo",
            "-chardev", f"socket,id=serial,fd={theirs.fileno()}", "-serial", "chardev:serial",
            "-qmp", f"unix:{self.qmp_socket},server=on,wait=off",
        ]
        # fmt: on
        with theirs:
            process = start_qemu("aarch64", arguments, [theirs.fileno()], directory)
        self._log = directory / "qemu.log"
        self._cleanup.callback(process.wait)
        self._cleanup.callback(process.kill)
        self._booted()
        self.boot_seconds = time.monotonic() - started

    def _initramfs(self) -> bytes:
        """The init and, for the kexec, the kernel and the next kernel's own initramfs."""
        init = (stat.S_IFREG | 0o755, (_init_entry() / "init").read_bytes())
        directory = (stat.S_IFDIR | 0o755, b"")
        plain = stat.S_IFREG | 0o644
        image = (self.kernel.share / "Image").read_bytes()
        both = {"dev": directory, "proc": directory, "init": init}
        return cpio({**both, "Image": (plain, image), "next": (plain, cpio(both))})

    def _send(self, line: str) -> None:
        # If nobody is there, that shows when the answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._serial.sendall(line.encode() + b"\n")

    def _booted(self) -> None:
        boot = self._answer("boot", TIMEOUT)
        self.boots += 1
        if boot != self.boots:
            raise self._error(GuestError, f"boot {boot} is running, not boot {self.boots}")

    def _answer(self, word: str, timeout: float) -> int:
        for line in self._lines(timeout):
            _, ours, answer = line.partition(_ANSWER)
            if ours:
                name, _, result = answer.partition(" ")
                if name == word and re.fullmatch(r"-?\d+", result):
                    return int(result)
                raise self._error(GuestError, f"{word}: the guest's answer is {answer}")
        raise self._error(GuestHung, f"{word}: no answer after {timeout:g} s")

    def _lines(self, timeout: float) -> Iterator[str]:
        """Yield whole lines of the console as they come, each once, until the time is over."""
        end = time.monotonic() + timeout
        while True:
            at = self._read.find(b"\n", self._seen)
            if at >= 0:
                line = self._read[self._seen : at].decode(errors="replace").strip()
                self._seen = at + 1
                yield line
                continue
            if not select.select([self._serial], [], [], max(end - time.monotonic(), 0))[0]:
                return
            try:
                data = self._serial.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                log = self._log.read_text(errors="replace").strip()
                raise self._error(GuestDied, f"QEMU has ended {log}".strip())
            self._read += data

    def _error(self, kind: type[GuestError], text: str) -> GuestError:
        return kind(text, "\n".join(self.console().splitlines()[-_CONSOLE_TAIL:]))
