# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest kernels: fetch the source, patch, configure and compile it, and build the module."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vm import cache, debian, selftests
from vm.cache import BuildError, Log

#: The kernels, named SERIES-WHAT. For each, the directories below kernel-patches/ whose patches it
#: carries, in order.
KERNELS: dict[str, list[str]] = {
    "7.2-base": [],
    "7.2-rfc": ["7.2/rfc"],
    "7.2-fixed": ["7.2/rfc", "7.2/fix"],
    "7.3-base": [],
    "7.3-rfc": ["7.3/rfc"],
    "7.3-fixed": ["7.3/rfc", "7.3/fix"],
    "6.18-base": [],
    "7.1-base": [],
}

#: Kernels that permit what the kernels above refuse. Each is one of KERNELS with these options
#: changed.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "7.2-nodebug": ("7.2-fixed", ["CONFIG_KEXEC_HANDOVER_DEBUG=n"]),
}

#: The kernels of vm/arm64.py. For each, the one of KERNELS that has the same patches, and its page
#: size.
ARM64: dict[str, tuple[str, str]] = {
    "7.2-arm64-64k-rfc": ("7.2-rfc", "CONFIG_ARM64_64K_PAGES=y"),
    "7.2-arm64-64k": ("7.2-fixed", "CONFIG_ARM64_64K_PAGES=y"),
    "7.2-arm64-4k": ("7.2-fixed", "CONFIG_ARM64_4K_PAGES=y"),
    "7.2-arm64-16k": ("7.2-fixed", "CONFIG_ARM64_16K_PAGES=y"),
}

#: Kernels that are built and tested only where they are named: each takes minutes, and others show
#: the same. x86 has pages of 4 KiB, too.
BY_NAME: set[str] = {"7.2-arm64-4k"}

#: The kernel of vm/stock.py. It is Debian's own, belongs to no series, and has no KHO to look at.
STOCK = "debian"

#: Options of a series that add to, or replace, those of vm/kernel.config.
SERIES: dict[str, list[str]] = {
    "7.2": [],
    # The same option under another name.
    "7.3": ["CONFIG_PROC_SYSCTL=n", "CONFIG_SYSCTL=y"],
    # Up to 7.1, KHO and deferred struct pages exclude each other; live update is younger than 6.18.
    # With DEBUG_VM, kho_restore_pages() of 6.18 is a BUG for every block above order 0: it calls
    # split_page() on a page that it has just made compound. Without it, as in most distributions,
    # the pages come back and stay compound. The checks of pages that are freed are then on if
    # INIT_ON_ALLOC is, which distributions have too.
    "6.18": [
        "CONFIG_DEBUG_VM=n",
        "CONFIG_DEBUG_VM_PGFLAGS=n",
        "CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y",
        "CONFIG_DEFERRED_STRUCT_PAGE_INIT=n",
        "CONFIG_KEXEC_HANDOVER_DEBUGFS=n",
        "CONFIG_LIVEUPDATE=n",
        "CONFIG_LIVEUPDATE_MEMFD=n",
    ],
    "7.1": ["CONFIG_DEFERRED_STRUCT_PAGE_INIT=n"],
}

#: Series that the archive keeps only as source packages of a version, and not for ever: nothing
#: that must work on any day depends on them, so "all" leaves them out.
ARCHIVED: dict[str, str] = {"6.18": "6.18.15-1~bpo13+1", "7.1": "7.1.13-1~bpo13+1"}


def series(name: str) -> str:
    """The one of SERIES from whose source the kernel is built."""
    return name.partition("-")[0]


def what(name: str) -> str:
    """What the kernel is in its series: base, rfc, fixed, or a variant."""
    return name.partition("-")[2]


#: All kernels, ordered by series, because a build that changes the series unpacks another source.
NAMES = sorted([*KERNELS, *VARIANTS], key=lambda name: list(SERIES).index(series(name)))

#: The default source of a series: the package PACKAGE plus the series' name, from this suite.
SUITE = "trixie-backports"
PACKAGE = "linux-source-"

#: Downloads a file the way that apt does, and checks its hash.
APT_HELPER = Path("/usr/lib/apt/apt-helper")


def chosen(names: Sequence[str] = NAMES) -> list[str]:
    """The kernels of `names` that the environment variable KERNELS selects.

    KERNELS holds names of kernels and of series, or "all", as if it is not set: all but the series
    of ARCHIVED. Neither a series nor "all" means the kernels of BY_NAME.

    :raise BuildError: if KERNELS names a kernel or series that does not exist
    """
    words = os.environ.get("KERNELS", "").split() or ["all"]
    for word in words:
        if word not in {"all", *SERIES, *NAMES, *ARM64, STOCK}:
            raise BuildError(
                f"KERNELS: there is neither a kernel nor a series {word}.\n"
                f"Say all, or some of: {', '.join([*SERIES, *NAMES, *ARM64, STOCK])}."
            )

    def is_meant(name: str) -> bool:
        of_all = "all" in words and series(name) not in ARCHIVED
        return (of_all or series(name) in words) and name not in BY_NAME

    return [name for name in names if name in words or is_meant(name)]


def under_test() -> list[str]:
    """The kernels on which a test of all kernels runs: the chosen ones in KERNELS."""
    return [name for name in chosen() if name in KERNELS]


def one_of_each_series() -> list[str]:
    """The kernels on which a test runs whose result the patches do not change.

    They are the last ones of their series among the chosen ones: the repaired one, if there is one.
    """
    return list({series(name): name for name in under_test()}.values())


# Part of every kernel's key: increase it when the recipe below changes what it makes.
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
    """The one of KERNELS that has the same patches: the kernel itself, unless it is a variant."""
    return VARIANTS[name][0] if name in VARIANTS else name


def find(name: str) -> Kernel | None:
    """The kernel built from its current sources, or None if it is not built."""
    source = source_of(series(name))
    if source is None:
        return None
    entry = _kernel_entry(name, source, patches_of(name))
    share = _share_entry(entry, _module_files(), _selftests_entry(name, source))
    return _kernel(name, share) if share.exists() else None


def build(name: str) -> Kernel:
    """The kernel, which is built now if it is missing. Call this inside `cache.locked()`."""
    archive = source_of(series(name)) or fetch(series(name))
    patches = patches_of(name)
    module = _module_files()
    if "Makefile" not in module:
        raise BuildError(f"The exercise module is missing: no Makefile in {_MODULE}.")
    entry = _kernel_entry(name, archive, patches)
    tests = _selftests_entry(name, archive)
    share = _share_entry(entry, module, tests)
    if not entry.exists():
        debian.require(_COMMANDS, _HEADERS)
        with Log(name) as log:
            cache.make(entry, lambda to: _compile(name, archive, patches, to, log))
    if not share.exists():
        debian.require(_COMMANDS, _HEADERS)
        if tests is not None:
            selftests.build(archive, compiler())
        with Log(f"{name}-module") as log:
            cache.make(share, lambda to: _fill_share(entry, module, tests, to, log))
    return _kernel(name, share)


def fetch(series: str) -> Path:
    """Choose Debian's newest package of the series. Call this inside `cache.locked()`."""
    with Log("source") as log:
        found = _fetch_archived(series, log) if series in ARCHIVED else _fetch(series, log)
        return _choose(found, series)


def select(source: Path) -> str:
    """Choose a kernel tree, a tarball of one, or Debian's package of one, and return its series.

    The choice holds until the next one: `find()` and `build()` use it for all kernels of the
    series. Call this inside `cache.locked()`.

    :raise BuildError: if the source is of a series without kernels here
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
    """Remove the work directory. Do so when nothing is left to build."""
    if _work().exists():
        cache.remove(_work())


# Entries: source-KEY holds an archive. kernel-NAME-KEY holds the kernel that was compiled from it,
# and the files to compile the module against it. selftests-KEY holds programs that come with the
# source. share-NAME-KEY is what the guest sees. Each file is read once, for both the key and the
# build, because someone may be editing it.

_Files = dict[str, bytes]


def _kernel_entry(name: str, source: Path, patches: _Files) -> Path:
    parts = (_RECIPE, compiler(), source.name, name, _CONFIG, patches)
    return cache.entry(f"kernel-{name}", cache.digest(*parts, *_options(name)))


def _share_entry(kernel: Path, module: _Files, tests: Path | None) -> Path:
    name = kernel.name.removeprefix("kernel-").rpartition("-")[0]
    parts = [] if tests is None else [tests.name]
    return cache.entry(f"share-{name}", cache.digest(_RECIPE, kernel.name, module, *parts))


def _selftests_entry(name: str, source: Path) -> Path | None:
    """The selftests of live update, if the kernel has that."""
    if "CONFIG_LIVEUPDATE=n" in _options(name):
        return None
    return selftests.entry(source, compiler())


def patches_of(name: str) -> _Files:
    """The patches of a kernel in KERNELS or VARIANTS, in order: file name and content."""
    found: _Files = {}
    for directory in KERNELS[patched_as(name)]:
        patches = sorted((_PATCHES / directory).glob("*.patch"))
        if not patches:
            raise BuildError(f"{name}: no patches in {_PATCHES / directory}.")
        found |= {patch.name: patch.read_bytes() for patch in patches}
    return found


def _options(name: str) -> list[str]:
    """The kernel's options that add to, or replace, those of vm/kernel.config."""
    return [*SERIES[series(name)], *(VARIANTS[name][1] if name in VARIANTS else [])]


def _wanted(name: str) -> str:
    """The kernel's configuration on top of tinyconfig."""
    options = _options(name)
    replaced = {option.partition("=")[0] for option in options}
    lines = _CONFIG.read_text().splitlines()
    lines = [line for line in lines if line.partition("=")[0] not in replaced]
    lines += [*options, f'CONFIG_LOCALVERSION="-khoscope-{what(name)}"']
    return "".join(f"{line}\n" for line in lines)


def _module_files() -> _Files:
    """The module's sources, but not the files that a compiler may have left next to them."""
    return {
        file.name: file.read_bytes()
        for file in sorted(_MODULE.glob("*"))
        if file.suffix in {".c", ".h"} or file.name == "Makefile"
    }


@lru_cache
def compiler(prefix: str = "") -> str:
    """The compiler's own version text, or "none" if there is no compiler."""
    gcc = f"{prefix}gcc"
    if shutil.which(gcc) is None:
        return "none"
    return subprocess.run([gcc, "--version"], check=True, capture_output=True, text=True).stdout


# The source


def _link(series: str) -> Path:
    """The link to the source that was chosen for the series."""
    return cache.directory() / f"source-{series}"


def source_of(series: str) -> Path | None:
    """The entry of the source that was chosen for the series, or None."""
    link = _link(series)
    return link.resolve() if link.exists() else None


def _choose(entry: Path, series: str) -> Path:
    link = _link(series)
    pending = link.with_name(cache.PARTIAL + link.name)
    pending.symlink_to(entry.name)
    pending.rename(link)
    return entry


def _series_of(entry: Path, log: Log) -> str:
    """The series according to the source's Makefile, with "?" for a number that it lacks."""
    with cache.scratch("makefile") as to:
        (makefile := to / "Makefile").touch()
        pattern = ["--occurrence=1", "--wildcards", "--no-wildcards-match-slash", "*/Makefile"]
        log.run(["tar", "-xOf", entry / "linux.tar", *pattern], stdout=makefile)
        text = makefile.read_text()
    parts = [re.search(rf"(?m)^{name} = (\d+)$", text) for name in ("VERSION", "PATCHLEVEL")]
    return ".".join(part[1] if part else "?" for part in parts)


@contextlib.contextmanager
def _apt(kind: str, log: Log) -> Iterator[tuple[Path, list[str]]]:
    """A directory, and apt's options for a state and sources of our own there; the machine's stay
    unchanged.

    :param kind: deb or deb-src
    """
    with cache.scratch("fetched") as to:
        (to / "state/lists/partial").mkdir(parents=True)
        (to / "cache/archives/partial").mkdir(parents=True)
        listing = to / "sources.list"
        listing.write_text(f"{kind} [signed-by={debian.KEYRING}] {debian.mirror()} {SUITE} main\n")
        settings = {
            "Dir::Etc::sourcelist": listing,
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "Dir::State": to / "state",
            "Dir::Cache": to / "cache",
            "APT::Sandbox::User": "",
        }
        options = ["-q", *(f"-o{option}={value}" for option, value in settings.items())]
        with log.step(f"asking {SUITE} what it has"):
            log.run(["apt-get", *options, "update"])
        yield to, options


def _fetch(series: str, log: Log) -> Path:
    """Fetch Debian's newest package."""
    name = PACKAGE + series
    debian.require(["apt-get", "dpkg-deb"])
    with _apt("deb", log) as (to, options):
        with log.step(f"fetching the newest {name} of {SUITE}"):
            log.run(["apt-get", *options, "download", name], cwd=to)
        (package,) = to.glob("*.deb")
        return _take(package, log)


def _fetch_archived(series: str, log: Log) -> Path:
    """Fetch the upstream tarball of one of Debian's source packages, as long as it is there.

    The package's other files may be gone already, and are not needed.
    """
    wanted = f"linux={ARCHIVED[series]}"
    debian.require(["apt-get"])
    with _apt("deb-src", log) as (to, options):
        (listing := to / "uris").touch()
        with log.step(f"fetching the source of {wanted}"):
            log.run(["apt-get", *options, "source", "--print-uris", wanted], stdout=listing)
            text = listing.read_text()
            found = re.search(r"(?m)^'(.+)' (\S+\.orig\.tar\.\S+) \d+ (\S+)$", text)
            if found is None:
                raise log.error(f"apt names no tarball of {wanted}; give one with --source")
            uri, name, digest = found.groups()
            log.run([APT_HELPER, *options, "download-file", uri, to / name, digest])
        return _take(to / name, log)


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
    """The files of a kernel tree: those that git would take if it is a git tree, else all."""
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


# Compiling. All kernels are built in one work directory, one after the other. From one patch set
# to the next, make compiles only what the patches touch. Another series starts from scratch.


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
        # The module's BTF builds upon the kernel's BTF, which is in vmlinux. What it is made with
        # is missing from the files of 6.18.
        (to / "build/vmlinux").symlink_to("../vmlinux")
        resolver = Path("tools/bpf/resolve_btfids/resolve_btfids")
        if not (to / "build" / resolver).exists():
            (to / "build" / resolver).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / resolver, to / "build" / resolver)


def kbuild(tree: Path, log: Log, *variables: str, prefix: str = "") -> Callable[..., None]:
    """A function that makes targets of a kernel tree.

    :param variables: more variables for make
    :param prefix: prefix of the compiler's name
    """
    flags = [
        # With these, the same inputs give the same kernel, and ccache recognises them.
        "KBUILD_BUILD_USER=khoscope",
        "KBUILD_BUILD_HOST=khoscope",
        "KBUILD_BUILD_TIMESTAMP=Thu, 1 Jan 2026 00:00:00 +0000",
        f"CC=ccache {prefix}gcc",
        "HOSTCC=ccache gcc",
        # This is set, although empty, so that a git tree around the cache has no influence.
        "LOCALVERSION=",
        # Compressing well takes 40 seconds of each kernel: kbuild asks for zstd -22, and for xz.
        "ZSTD=sh -c 'exec zstd -3' --",
        *variables,
    ]
    # In depend mode, a first compilation does not preprocess everything twice.
    env = {"CCACHE_DIR": str(cache.directory() / "ccache"), "CCACHE_MAXSIZE": "2G"}
    env |= {"CCACHE_DEPEND": "1", "XZ_OPT": "-0"}

    def make(*targets: str) -> None:
        log.run(["make", f"-j{os.cpu_count()}", *flags, *targets], cwd=tree, env=env)

    return make


def configure(make: Callable[..., None], tree: Path, name: str, wanted: str, log: Log) -> None:
    """Configure a tree with tinyconfig, and with the wanted options on top of it.

    :raise BuildError: if the resulting configuration lacks a wanted option
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
    """Copy the image, the vmlinux for debuggers, and the kernel's release from a tree."""
    for file in (image, "vmlinux"):
        shutil.copy(tree / file, to)
    shutil.copy(tree / "include/config/kernel.release", to / "release")


def prepare(source: Path, patches: _Files, log: Log, work: Path) -> None:
    """Bring a work directory to this source with these patches.

    The file `ready` names the source. It exists only while the tree is known to hold exactly that
    source with the patches in `applied`. If a build ended in between, the next one starts from
    scratch.
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
            if (tree / ".config").exists():
                # Somebody has built in it. Debian's own tarballs lack files that this would need.
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
    """The lines of `wanted` that `config` does not satisfy. An option set to n may be absent."""
    have = set(config.splitlines())
    named = {line.partition("=")[0] for line in have}
    return [
        line
        for line in wanted.splitlines()
        if re.match("CONFIG_", line)
        and (line.removesuffix("=n") in named if line.endswith("=n") else line not in have)
    ]


def _fill_share(kernel: Path, module: _Files, tests: Path | None, to: Path, log: Log) -> None:
    """Fill a share entry: the kernel's files, its selftests, and the module built for it."""
    for name in ("bzImage", "vmlinux", "release"):
        os.link(kernel / name, to / name)
    if tests is not None:
        shutil.copytree(tests, to / "selftests", copy_function=os.link)
    build = to / "kmod"
    build.mkdir()
    for name, content in module.items():
        (build / name).write_bytes(content)
    with log.step("compiling the exercise module"):
        log.run(["make", "-C", kernel / "build", f"M={build}", "modules"])
    (build / "kho_exercise.ko").rename(to / "kho_exercise.ko")
    cache.remove(build)
