# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unmodified kernel that Debian's users run, from Debian's package, with its initramfs."""

from __future__ import annotations

import shlex
from pathlib import Path

from vm import cache, debian
from vm.cache import Log
from vm.kernel import STOCK, Kernel
from vm.root import SUITE

PACKAGES = ["initramfs-tools", "linux-image-amd64", "zstd"]

#: Modules of Debian's kernel that the guest's init needs. The root has no modules, so the initramfs
#: loads them.
MODULES = [
    *("virtio_blk", "ext4", "9p", "9pnet_virtio", "virtio_rng"),
    # A guest uses this to say where its vmcoreinfo is.
    "qemu_fw_cfg",
    "pvpanic-pci",
]

# Part of the key: increase it when the recipe below changes what it makes.
_RECIPE = "1"

# This must run before initramfs-tools is installed, which makes the initramfs as soon as there is a
# kernel.
_HOOK = f"""
to=$1/usr/share/initramfs-tools
mkdir -p $to/conf.d $to/modules.d
echo MODULES=list >$to/conf.d/khoscope
printf '%s\\n' {" ".join(MODULES)} >$to/modules.d/khoscope
"""
_COMMANDS = ["apt-config", "mmdebstrap"]


def find(name: str = STOCK) -> Kernel | None:
    """The kernel, or None if it has not been fetched."""
    entry = _entry()
    return _kernel(name, entry) if entry.exists() else None


def build(name: str = STOCK) -> Kernel:
    """The kernel, which is fetched now if it is missing. Call this inside `cache.locked()`."""
    entry = _entry()
    if not entry.exists():
        debian.require(_COMMANDS)
        with Log(name) as log:
            cache.make(entry, lambda to: _fetch(to, log))
    return _kernel(name, entry)


def _kernel(name: str, entry: Path) -> Kernel:
    return Kernel(name, (entry / "release").read_text(), entry)


def _entry() -> Path:
    return cache.entry(f"kernel-{STOCK}", cache.digest(_RECIPE, SUITE, *PACKAGES, _HOOK))


def _fetch(to: Path, log: Log) -> None:
    with log.step(f"fetching the kernel of Debian {SUITE}"):
        taken = f"copy-out /boot {shlex.quote(str(to))}"
        hooks = [f"--essential-hook={_HOOK}", f"--customize-hook={taken}"]
        debian.bootstrap(SUITE, PACKAGES, hooks, Path("/dev/null"), log)
    (image,) = to.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    (to / "release").write_text(release)
    image.rename(to / "bzImage")
    (to / f"boot/initrd.img-{release}").rename(to / "initrd")
    cache.remove(to / "boot")
