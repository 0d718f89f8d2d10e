# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's root: a small Debian with drgn, bcc and kexec-tools, as one ext4 image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vm import cache, debian
from vm.cache import Log

SUITE = "testing"

# These packages come on top of mmdebstrap's essential variant, which has dpkg, bash and coreutils.
PACKAGES = [
    *("hostname", "kexec-tools", "kmod", "makedumpfile", "mount", "procps", "qemu-guest-agent"),
    *("python3", "python3-bpfcc", "python3-drgn", "python3-libfdt", "python3-lz4"),
    *("python3-msgspec", "python3-numpy", "python3-pyelftools", "python3-tabulate"),
    *("python3-zstandard", "tar", "util-linux", "xz-utils"),
]

# For a guest whose PID 1 is systemd, in an image of its own (vm/systemd.py). libseccomp2 has it
# filter system calls. promtool, a program of 96 MiB that needs nothing but libc, is the judge of
# what is printed for Prometheus.
SYSTEMD = (
    *("dbus", "libseccomp2", "promtool", "python3-systemd", "systemd", "systemd-sysv", "udev"),
)

# Nobody reads documentation in the guest.
_EXCLUDED = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*"]

_FREE_MIB = 300

# Part of the key: increase it when the recipe below changes what it makes.
_RECIPE = "1"

_GUEST = Path(__file__).with_name("guest")
_COMMANDS = ["apt-config", "mmdebstrap", "mke2fs", "debugfs", "tar", "unshare", "sh"]

# This runs where it may make files of any owner. For an ordinary user that is a user namespace.
# There, the files go on a tmpfs, because the user could not delete them afterwards.
# /dev stays empty, because the kernel fills it.
_PACK = """
set -eu
mkdir root
if [ "$2" = namespace ]; then mount -t tmpfs tmpfs root; fi
tar -xf root.tar --exclude=./dev/* -C root
mkdir root/kernel root/khoscope
size=$(($(du -sm root | cut -f1) * 11 / 10 + $1))
mke2fs -q -t ext4 -L khoscope -d root root.ext4 "${size}M"
if [ "$2" = namespace ]; then umount root; fi
rm -rf root root.tar
"""


def find(more: Sequence[str] = ()) -> Path | None:
    """The image built from the current recipe, or None if it is not built.

    :param more: packages that are in it besides those of every guest
    """
    image = _root_entry(_guest_files(), more) / "root.ext4"
    return image if image.exists() else None


def build(more: Sequence[str] = ()) -> Path:
    """The image, which is built now if it is missing. Call this inside `cache.locked()`.

    :param more: as of :func:`find`: each choice is an image of its own
    """
    guest = _guest_files()
    entry = _root_entry(guest, more)
    if not entry.exists():
        debian.require(_COMMANDS)
        with Log("-".join(["root", *more])) as log:
            system = cache.make(_debian_entry(more), lambda to: _install(more, to, log))
            cache.make(entry, lambda to: _add_guest(system, guest, to, log))
    return entry / "root.ext4"


# Entries: debian-KEY is the root without our own files; root-KEY is the whole root. So after a
# change to a file of vm/guest/, the build takes only seconds and needs no mirror.


def _debian_entry(more: Sequence[str] = ()) -> Path:
    recipe = [_RECIPE, SUITE, *PACKAGES, *more, *_EXCLUDED, str(_FREE_MIB), _PACK]
    return cache.entry("debian", cache.digest(*recipe))


def _root_entry(guest: dict[str, bytes], more: Sequence[str] = ()) -> Path:
    return cache.entry("root", cache.digest(_RECIPE, _debian_entry(more).name, guest))


def _guest_files() -> dict[str, bytes]:
    """The files of vm/guest/ by their paths in the guest."""
    return {
        "/usr/sbin/khoscope-init"
        if file.name == "init"
        else f"/usr/local/bin/{file.name}": file.read_bytes()
        for file in sorted(_GUEST.iterdir())
    }


def _install(more: Sequence[str], to: Path, log: Log) -> None:
    with log.step(f"installing Debian {SUITE}"):
        excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
        debian.bootstrap(SUITE, [*PACKAGES, *more], excluded, to / "root.tar", log)
    with log.step("making the image"):
        unshare = ["unshare", "--map-root-user", "--map-auto", "--mount"]
        root = os.geteuid() == 0
        place = "here" if root else "namespace"
        pack = ["sh", "-c", _PACK, "sh", str(_FREE_MIB), place]
        log.run(pack if root else [*unshare, *pack], cwd=to)


def _add_guest(system: Path, guest: dict[str, bytes], to: Path, log: Log) -> None:
    image = to / "root.ext4"
    with log.step("adding the guest's own files"):
        log.run(["cp", "--sparse=always", system / "root.ext4", image])
        for path, content in guest.items():
            file = to / "file"
            file.write_bytes(content)
            # debugfs needs no mount. Its exit status does not tell whether it failed, so check.
            request = f"write {file} {path}\nsif {path} mode 0100755\nsif {path} uid 0\n"
            (to / "request").write_text(f"{request}sif {path} gid 0\ndump {path} {to / 'check'}\n")
            log.run(["debugfs", "-w", "-f", to / "request", image])
            if (to / "check").read_bytes() != content:
                raise log.error(f"debugfs has not written {path}")
        for name in ("file", "request", "check"):
            (to / name).unlink()
        image.chmod(0o444)
