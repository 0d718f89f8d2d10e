# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest kernels: fetch the source, patch, configure, compile, and the module on top."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vm import cache, debian
from vm.cache import BuildError, Log

#: The kernels, SERIES-WHAT, and the directories below kernel-patches/ whose patches they carry, in
#: order.
KERNELS: dict[str, list[str]] = {
    "7.2-base": [],
    "7.2-rfc": ["7.2/rfc"],
    "7.2-fixed": ["7.2/rfc", "7.2/fix"],
    "7.3-base": [],
    "7.3-rfc": ["7.3/rfc"],
    "7.3-fixed": ["7.3/rfc", "7.3/fix"],
}

#: Kernels that let happen what those refuse: the one of them that each is but for these options.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "7.2-nodebug": ("7.2-fixed", ["CONFIG_KEXEC_HANDOVER_DEBUG=n"]),
}

#: The kernels of vm/arm64.py: the one of KERNELS that has the same patches, and the page size.
ARM64: dict[str, tuple[str, str]] = {
    "7.2-arm64-64k-rfc": ("7.2-rfc", "CONFIG_ARM64_64K_PAGES=y"),
    "7.2-arm64-64k": ("7.2-fixed", "CONFIG_ARM64_64K_PAGES=y"),
    "7.2-arm64-4k": ("7.2-fixed", "CONFIG_ARM64_4K_PAGES=y"),
}

#: The kernel of vm/stock.py: Debian's own, of no series, on which nothing is to be seen.
STOCK = "debian"

#: What a series has to be configured with besides, or instead of, vm/kernel.config.
SERIES: dict[str, list[str]] = {
    "7.2": [],
    # The same option under another name.
    "7.3": ["CONFIG_PROC_SYSCTL=n", "CONFIG_SYSCTL=y"],
}


def series(name: str) -> str:
    """The one of SERIES whose source the kernel is made from."""
    return name.partition("-")[0]


def what(name: str) -> str:
    """What the kernel is in its series: base, rfc, fixed, or a variant."""
    return name.partition("-")[2]


#: All kernels; those of a series follow each other, as going to another unpacks its source.
NAMES = sorted([*KERNELS, *VARIANTS], key=lambda name: list(SERIES).index(series(name)))

#: Where the source of a series, PACKAGE and its name, comes from when nobody says otherwise.
SUITE = "trixie-backports"
PACKAGE = "linux-source-"


def chosen(names: Sequence[str] = NAMES) -> list[str]:
    """Those of `names` that the environment's KERNELS names, each or by its series; without it all.

    :raise BuildError: it names what there is not
    """
    words = os.environ.get("KERNELS", "").split() or ["all"]
    for word in words:
        if word not in {"all", *SERIES, *NAMES, *ARM64, STOCK}:
            raise BuildError(
                f"KERNELS: there is neither a kernel nor a series {word}.\n"
                f"Say all, or some of: {', '.join([*SERIES, *NAMES, *ARM64, STOCK])}."
            )
    return [name for name in names if {"all", series(name), name} & set(words)]


def under_test() -> list[str]:
    """The kernels that a test of all kernels runs on: what is chosen of KERNELS."""
    return [name for name in chosen() if name in KERNELS]


# Part of every kernel's key: count up when the recipe below makes something else.
_RECIPE = "1"

_HERE = Path(__file__).parent
_PATCHES = _HERE.parent / "kernel-patches"
_CONFIG = _HERE / "kernel.config"
_MODULE = _HERE / "kmod"
_COMMANDS = [
    *("bc", "bison", "ccache", "flex", "gcc", "make", "pahole", "patch", "perl", "tar", "xz"),
    "zstd",
]
_HEADERS = ["gelf.h", "zlib.h"]


@dataclass(frozen=True)
class Kernel:
    """A kernel that is built; `share` is what the guest sees as /kernel."""

    name: str
    release: str
    share: Path


def patched_as(name: str) -> str:
    """The one of KERNELS that it is, or is a variant of."""
    return VARIANTS[name][0] if name in VARIANTS else name


def find(name: str) -> Kernel | None:
    """The kernel as its sources are now, or None if that is not built."""
    source = source_of(series(name))
    if source is None:
        return None
    share = _share_entry(_kernel_entry(name, source, patches_of(name)), _module_files())
    return _kernel(name, share) if share.exists() else None


def build(name: str) -> Kernel:
    """The kernel, built now if it is not there. Call it inside `cache.locked()`."""
    archive = source_of(series(name)) or fetch(series(name))
    patches = patches_of(name)
    module = _module_files()
    if "Makefile" not in module:
        raise BuildError(f"The exercise module is missing: no Makefile in {_MODULE}.")
    entry = _kernel_entry(name, archive, patches)
    share = _share_entry(entry, module)
    if not entry.exists():
        debian.require(_COMMANDS, _HEADERS)
        with Log(name) as log:
            cache.make(entry, lambda to: _compile(name, archive, patches, to, log))
    if not share.exists():
        debian.require(_COMMANDS, _HEADERS)
        with Log(f"{name}-module") as log:
            cache.make(share, lambda to: _compile_module(entry, module, to, log))
    return _kernel(name, share)


def fetch(series: str) -> Path:
    """Choose Debian's newest package of the series. Call it inside `cache.locked()`."""
    with Log("source") as log:
        return _choose(_fetch(series, log), series)


def select(source: Path) -> str:
    """Choose a kernel tree, a tarball of one, or Debian's package of one; the series that it is of.

    The choice stays until the next: `find()` and `build()` mean it for all kernels of the series.
    Call it inside `cache.locked()`.

    :raise BuildError: it is of no series that there are kernels of
    """
    with Log("source") as log:
        entry = _take(source, log)
        found = _series_of(entry, log)
    if found not in SERIES:
        raise BuildError(
            f"{source} is linux {found}, and the kernels are of {' and '.join(SERIES)}.\n"
            "Give the source of one of these."
        )
    _choose(entry, found)
    return found


def _kernel(name: str, share: Path) -> Kernel:
    return Kernel(name, (share / "release").read_text().strip(), share)


def clean() -> None:
    """Forget the work directory; worth it when nothing is left to build."""
    if _work().exists():
        cache.remove(_work())


# Entries: source-KEY holds an archive; kernel-NAME-KEY what was compiled from it, with what
# the module needs to be compiled against it; share-NAME-KEY is what the guest sees. Files are
# read once, for the key and for the work, since someone may be editing them.

_Files = dict[str, bytes]


def _kernel_entry(name: str, source: Path, patches: _Files) -> Path:
    parts = (_RECIPE, compiler(), source.name, name, _CONFIG, patches)
    return cache.entry(f"kernel-{name}", cache.digest(*parts, *_options(name)))


def _share_entry(kernel: Path, module: _Files) -> Path:
    name = kernel.name.removeprefix("kernel-").rpartition("-")[0]
    return cache.entry(f"share-{name}", cache.digest(_RECIPE, kernel.name, module))


def patches_of(name: str) -> _Files:
    """What one of KERNELS or VARIANTS carries, in order: file name and content."""
    found: _Files = {}
    for directory in KERNELS[patched_as(name)]:
        patches = sorted((_PATCHES / directory).glob("*.patch"))
        if not patches:
            raise BuildError(f"{name}: no patches in {_PATCHES / directory}.")
        found |= {patch.name: patch.read_bytes() for patch in patches}
    return found


def _options(name: str) -> list[str]:
    """What the kernel is configured with besides, or instead of, vm/kernel.config."""
    return [*SERIES[series(name)], *(VARIANTS[name][1] if name in VARIANTS else [])]


def _wanted(name: str) -> str:
    """What the kernel is configured with, on top of tinyconfig."""
    options = _options(name)
    replaced = {option.partition("=")[0] for option in options}
    lines = _CONFIG.read_text().splitlines()
    lines = [line for line in lines if line.partition("=")[0] not in replaced]
    lines += [*options, f'CONFIG_LOCALVERSION="-khoscope-{what(name)}"']
    return "".join(f"{line}\n" for line in lines)


def _module_files() -> _Files:
    """The module's sources, and not what a compiler may have left next to them."""
    return {
        file.name: file.read_bytes()
        for file in sorted(_MODULE.glob("*"))
        if file.suffix in {".c", ".h"} or file.name == "Makefile"
    }


@lru_cache
def compiler(prefix: str = "") -> str:
    """What the compiler says it is, or "none"."""
    gcc = f"{prefix}gcc"
    if shutil.which(gcc) is None:
        return "none"
    return subprocess.run([gcc, "--version"], check=True, capture_output=True, text=True).stdout


# The source


def _link(series: str) -> Path:
    """What leads to the source that was chosen for the series."""
    return cache.directory() / f"source-{series}"


def source_of(series: str) -> Path | None:
    """The entry of the source that was chosen for the series."""
    link = _link(series)
    return link.resolve() if link.exists() else None


def _choose(entry: Path, series: str) -> Path:
    link = _link(series)
    pending = link.with_name(cache.PARTIAL + link.name)
    pending.symlink_to(entry.name)
    pending.rename(link)
    return entry


def _series_of(entry: Path, log: Log) -> str:
    """The series that a source says in its Makefile that it is of; "?" where it says nothing."""
    with cache.scratch("makefile") as to:
        (makefile := to / "Makefile").touch()
        pattern = ["--occurrence=1", "--wildcards", "--no-wildcards-match-slash", "*/Makefile"]
        log.run(["tar", "-xOf", entry / "linux.tar", *pattern], stdout=makefile)
        text = makefile.read_text()
    parts = [re.search(rf"(?m)^{name} = (\d+)$", text) for name in ("VERSION", "PATCHLEVEL")]
    return ".".join(part[1] if part else "?" for part in parts)


def _fetch(series: str, log: Log) -> Path:
    """Debian's newest package, through an apt of our own: the machine's stays as it is."""
    name = PACKAGE + series
    debian.require(["apt-get", "dpkg-deb"])
    with cache.scratch("fetched") as to:
        (to / "state/lists/partial").mkdir(parents=True)
        (to / "cache/archives/partial").mkdir(parents=True)
        listing = to / "sources.list"
        listing.write_text(f"deb [signed-by={debian.KEYRING}] {debian.mirror()} {SUITE} main\n")
        options = {
            "Dir::Etc::sourcelist": listing,
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "Dir::State": to / "state",
            "Dir::Cache": to / "cache",
            "APT::Sandbox::User": "",
        }
        apt: list[str | Path] = ["apt-get", "-q"]
        apt += [f"-o{option}={value}" for option, value in options.items()]
        with log.step(f"asking {SUITE} for the newest {name}"):
            log.run([*apt, "update"])
        with log.step(f"fetching {name}"):
            log.run([*apt, "download", name], cwd=to)
        (package,) = to.glob("*.deb")
        return _take(package, log)


def _take(source: Path, log: Log) -> Path:
    """The cache entry with the archive of a kernel tree, made from any of the three forms."""
    if source.is_dir():
        if not (source / "Kconfig").exists():
            raise BuildError(f"{source} is not a kernel tree: it has no Kconfig.")
        files = _tree(source)
        stats = ((name, os.lstat(source / name)) for name in files)
        listing = "".join(f"{name}\0{s.st_size}\0{s.st_mtime_ns}\0" for name, s in stats)
        key = cache.digest("tree", listing.encode(errors="surrogateescape"))
    elif source.is_file():
        key = cache.digest("file", source)
    else:
        raise BuildError(f"{source} is neither a kernel tree nor a tarball nor a package.")

    def fill(to: Path) -> None:
        archive = to / "linux.tar"
        with log.step(f"taking {source.name}"):
            if source.is_dir():
                names = to / "names"
                names.write_bytes(b"".join(os.fsencode(name) + b"\0" for name in files))
                command: list[str | Path] = ["tar", "--null", "--no-recursion", "--zstd"]
                command += ["--transform", "s,^,linux/,S", "-C", source, "-T", names]
                log.run([*command, "-cf", archive])
                names.unlink()
            elif source.suffix == ".deb":
                (data := to / "data.tar").touch()
                log.run(["dpkg-deb", "--fsys-tarfile", source], stdout=data)
                pattern = "./usr/src/linux-source-*.tar.*"
                log.run(["tar", "-xOf", data, "--wildcards", pattern], stdout=archive)
                data.unlink()
            else:
                shutil.copyfile(source, archive)

    return cache.make(cache.entry("source", key), fill)


def _tree(tree: Path) -> list[str]:
    """The files of a kernel tree: what git would take where it is git's, else all of them."""
    if (tree / ".git").exists():
        command = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others"]
        output = subprocess.run([*command, "--exclude-standard"], check=True, capture_output=True)
        names = {os.fsdecode(name) for name in output.stdout.split(b"\0") if name}
        return sorted(name for name in names if os.path.lexists(tree / name))
    return sorted(
        os.path.relpath(os.path.join(parent, name), tree)
        for parent, _, names in os.walk(tree)
        for name in names
    )


# Compiling. All kernels are made in one work directory, one after the other: going from one
# patch set to the next compiles only what the patches touch. Another series starts anew.


def _work() -> Path:
    return cache.directory() / "work"


def _compile(name: str, source: Path, patches: _Files, to: Path, log: Log) -> None:
    """Fill a kernel entry."""
    tree = _work() / "linux"
    prepare(source, patches, log, _work())
    make = kbuild(tree, log)
    configure(make, tree, name, _wanted(name), log)
    with log.step(f"compiling on {os.cpu_count()} processors"):
        make("all")
    with log.step("keeping what boots and what modules need"):
        keep(tree, "arch/x86/boot/bzImage", to)
        script = f"$(srctree)/scripts/package/install-extmod-build {to / 'build'}"
        make("run-command", f"KBUILD_RUN_COMMAND={script}")
        # For the module's BTF, which builds upon the kernel's.
        (to / "build/vmlinux").symlink_to("../vmlinux")


def kbuild(tree: Path, log: Log, *variables: str, prefix: str = "") -> Callable[..., None]:
    """What makes targets of a kernel tree.

    :param variables: of make's, besides
    :param prefix: of the compiler's name
    """
    flags = [
        # The same inputs give the same kernel, and ccache knows them again.
        "KBUILD_BUILD_USER=khoscope",
        "KBUILD_BUILD_HOST=khoscope",
        "KBUILD_BUILD_TIMESTAMP=Thu, 1 Jan 2026 00:00:00 +0000",
        f"CC=ccache {prefix}gcc",
        "HOSTCC=ccache gcc",
        # Given, if only as nothing: else the state of a git around the cache goes in.
        "LOCALVERSION=",
        *variables,
    ]
    # Depend mode: a first compilation does not preprocess everything twice.
    env = {"CCACHE_DIR": str(cache.directory() / "ccache"), "CCACHE_MAXSIZE": "2G"}
    env["CCACHE_DEPEND"] = "1"

    def make(*targets: str) -> None:
        log.run(["make", f"-j{os.cpu_count()}", *flags, *targets], cwd=tree, env=env)

    return make


def configure(make: Callable[..., None], tree: Path, name: str, wanted: str, log: Log) -> None:
    """Give a tree its configuration: tinyconfig, and what is wanted on top of it.

    :raise BuildError: it is not what came out
    """
    with log.step("configuring"):
        make("tinyconfig")
        with (tree / ".config").open("a") as config:
            config.write(wanted)
        make("olddefconfig")
    missing = unmet(wanted, (tree / ".config").read_text())
    if missing:
        raise BuildError(
            f"{name}: this source does not give what is asked for:\n  " + "\n  ".join(missing)
        )


def keep(tree: Path, image: str, to: Path) -> None:
    """Copy from a tree what boots, what debuggers read, and the kernel's release."""
    for file in (image, "vmlinux"):
        shutil.copy(tree / file, to)
    shutil.copy(tree / "include/config/kernel.release", to / "release")


def prepare(source: Path, patches: _Files, log: Log, work: Path) -> None:
    """Bring a work directory to this source with these patches.

    `ready` names the source and is there only while the tree is known to hold exactly that
    source with the patches in `applied`. A build that ended in between starts from nothing.
    """
    tree, applied, ready = work / "linux", work / "applied", work / "ready"
    if not ready.exists() or ready.read_text() != source.name:
        with log.step("unpacking the source"):
            if work.exists():
                cache.remove(work)
            tree.mkdir(parents=True)
            applied.mkdir()
            log.run(["tar", "-xf", source / "linux.tar", "-C", tree, "--strip-components=1"])
            if not (tree / "Kconfig").exists():
                raise BuildError(f"{source / 'linux.tar'} is not the archive of a kernel tree.")
            log.run(["make", "mrproper"], cwd=tree)
            ready.write_text(source.name)
    there = sorted(applied.iterdir())
    wanted = {f"{i:03}-{name}": patch for i, (name, patch) in enumerate(patches.items())}
    same = 0
    while same < len(there) and wanted.get(there[same].name) == there[same].read_bytes():
        same += 1
    if len(there) == len(wanted) == same:
        return
    with log.step(f"applying the {len(wanted)} patches"):
        ready.unlink()
        patch = ["patch", "-p1", "--batch", "--no-backup-if-mismatch"]
        for file in reversed(there[same:]):
            log.run([*patch, "--reverse", "-i", file], cwd=tree)
            file.unlink()
        for name, content in list(wanted.items())[same:]:
            file = applied / name
            file.write_bytes(content)
            log.run([*patch, "--forward", "-i", file], cwd=tree)
        ready.write_text(source.name)


def unmet(wanted: str, config: str) -> list[str]:
    """The lines of `wanted` that `config` does not fulfil; an option set to n may be absent."""
    have = set(config.splitlines())
    named = {line.partition("=")[0] for line in have}
    return [
        line
        for line in wanted.splitlines()
        if re.match("CONFIG_", line)
        and (line.removesuffix("=n") in named if line.endswith("=n") else line not in have)
    ]


def _compile_module(kernel: Path, module: _Files, to: Path, log: Log) -> None:
    """Fill a share entry: the kernel's files and the exercise module made for it."""
    for name in ("bzImage", "vmlinux", "release"):
        os.link(kernel / name, to / name)
    build = to / "kmod"
    build.mkdir()
    for name, content in module.items():
        (build / name).write_bytes(content)
    with log.step("compiling the exercise module"):
        log.run(["make", "-C", kernel / "build", f"M={build}", "modules"])
    (build / "kho_exercise.ko").rename(to / "kho_exercise.ko")
    cache.remove(build)
