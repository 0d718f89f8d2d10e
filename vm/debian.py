# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian as this machine knows it: its mirror, its keyring, and the packages to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vm import cache
from vm.cache import BuildError, Log

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT = Path("/etc/apt")
PACKAGES = Path(__file__).with_name("packages.txt")

# A source with one of these suites and the component main is the Debian archive itself, and not
# a third party's repository for it ("bookworm-pgdg", "cloud-sdk-bookworm", …).
_SUITES = {"oldoldstable", "oldstable", "stable", "testing", "unstable", "sid", "bullseye"}
_SUITES |= {"bookworm", "trixie", "forky", "duke"}


def mirror() -> str:
    """The archive's address in this machine's own apt sources."""
    for uri, suites, components in _sources():
        if _SUITES & set(suites) and "main" in components:
            return uri
    raise BuildError(
        f"No Debian mirror in the apt sources below {APT}.\n"
        "On a machine that is not Debian give the kernel with --source; the guest's root "
        "needs a mirror in any case."
    )


def transport() -> str:
    """This machine's apt settings for reaching mirrors (proxies, dated archives)."""
    command = ["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n']
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "".join(re.findall(r"(?mi)^Acquire::(?:Check-|https?::).*\n", dump))


def bootstrap(
    suite: str, packages: Sequence[str], options: Sequence[str | Path], target: Path, log: Log
) -> None:
    """Install a small Debian with these packages on top of mmdebstrap's essential variant.

    :param options: more options of mmdebstrap
    :param target: the archive to make, or /dev/null
    """
    # unshare gives an ordinary user a range of user ids of their own (package uidmap).
    mode = "root" if os.geteuid() == 0 else "unshare"
    with cache.scratch("apt") as to:
        (settings := to / "apt.conf").write_text(transport())
        command: list[str | Path] = ["mmdebstrap", f"--mode={mode}", "--variant=essential"]
        command += [f"--include={','.join(packages)}", f"--keyring={KEYRING}"]
        log.run([*command, f"--aptopt={settings}", *options, suite, target, mirror()])


def _sources() -> list[tuple[str, list[str], list[str]]]:
    """Address, suites and components of each `deb` entry, in both of apt's formats."""
    found = []
    for path in [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]:
        if path.suffix == ".sources":
            for block in re.split(r"\n\s*\n", path.read_text()):
                field = _fields(block)
                if "deb" in field.get("types", "") and field.get("enabled", "yes") != "no":
                    suites, components = field["suites"].split(), field["components"].split()
                    found += [(uri, suites, components) for uri in field["uris"].split()]
        elif path.suffix == ".list" and path.exists():
            for line in path.read_text().splitlines():
                match = re.match(r"\s*deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line)
                if match:
                    found.append((match[1], [match[2]], match[3].split()))
    return found


def _fields(block: str) -> dict[str, str]:
    lines = [line for line in block.splitlines() if not line.startswith("#")]
    text = re.sub(r"\n[ \t]+", " ", "\n".join(lines))
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def require(commands: Sequence[str], headers: Sequence[str] = ()) -> None:
    """Stop, and name the packages to install, if a command or a C header is missing."""
    missing = [command for command in commands if shutil.which(command) is None]
    if "gcc" not in missing:
        missing += [header for header in headers if not _compiles(f"#include <{header}>\n")]
    if missing:
        raise BuildError(
            f"Not installed: {' '.join(missing)}\n"
            f"Install what building needs: apt-get install {' '.join(packages())}"
        )


def _compiles(text: str) -> bool:
    command = ["gcc", "-fsyntax-only", "-x", "c", "-"]
    result = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    return result.returncode == 0


def packages() -> list[str]:
    """The Debian packages that the machine needs for building and running."""
    lines = PACKAGES.read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]
