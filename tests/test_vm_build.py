# SPDX-License-Identifier: LGPL-2.1-or-later
"""The builders' cache and what surrounds it; nothing is compiled here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from vm import cache, debian, kernel, root, selftests


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "khoscope"


def fill(to: Path) -> None:
    (to / "file").write_text("whole")


def test_entry_is_made_once(home: Path) -> None:
    final = cache.entry("thing", "1")
    with cache.locked():
        assert cache.make(final, fill) == home / "thing-1"
        cache.make(final, lambda _: pytest.fail("made twice"))
    assert (final / "file").read_text() == "whole"


def test_failed_step_leaves_nothing(home: Path) -> None:
    def broken(to: Path) -> None:
        fill(to)
        (to / "closed").mkdir(mode=0o500)
        raise cache.BuildError("no")

    with cache.locked(), pytest.raises(cache.BuildError, match="no"):
        cache.make(cache.entry("thing", "1"), broken)
    assert [path.name for path in home.iterdir()] == ["lock"]


def test_failing_command_shows_its_last_words(home: Path) -> None:
    with cache.locked(), cache.Log("thing") as log, pytest.raises(cache.BuildError) as caught:
        log.run(["sh", "-c", "echo last words; exit 3"])
    text = str(caught.value)
    assert "sh failed with status 3" in text
    assert "last words" in text
    assert str(home / "log/thing.log") in text


BUILDER = """
import sys
from vm import cache
def fill(to):
    with cache.Log("thing") as log:
        log.run(["sh", "-c", "echo $$ > pid; exec sleep 60"], cwd=to)
with cache.locked():
    cache.make(cache.entry("thing", "1"), fill)
"""


def start_builder(home: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A build in a process of its own, and the id of the command that it runs."""
    process = subprocess.Popen([sys.executable, "-c", BUILDER], cwd=Path(__file__).parents[1])
    pid = home / f"{cache.PARTIAL}thing-1" / "pid"
    end = time.monotonic() + 10
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < end, "the builder did not start its command"
        time.sleep(0.01)
    return process, int(pid.read_text())


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_nothing(home: Path, ending: signal.Signals) -> None:
    process, command = start_builder(home)
    process.send_signal(ending)
    assert process.wait(10) != 0
    assert not running(command)
    assert not list(home.glob("*thing*"))


def test_killed_build_is_cleaned_up_by_the_next(home: Path) -> None:
    process, command = start_builder(home)
    process.kill()
    process.wait(10)
    assert list(home.glob(f"{cache.PARTIAL}*"))
    os.kill(command, signal.SIGKILL)  # it holds the lock: the next build would wait for it
    with cache.locked():
        assert not list(home.glob(f"{cache.PARTIAL}*"))


def test_digest_sees_names_contents_and_borders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    keys = [cache.digest("a", "b"), cache.digest("ab"), cache.digest("a"), cache.digest(file)]
    keys += [cache.digest({"x": b"y"}), cache.digest({"y": b"x"}), cache.digest({})]
    file.write_text("b")
    keys.append(cache.digest(file))
    assert len(set(keys)) == len(keys)


def test_kernel_key_follows_what_goes_in(tmp_path: Path) -> None:
    source = tmp_path / "source-1"
    patches = {"0001-a.patch": b"+1"}
    base = kernel._kernel_entry("7.2-rfc", source, patches)
    assert base == kernel._kernel_entry("7.2-rfc", source, dict(patches))
    assert base != kernel._kernel_entry("7.2-rfc", source, {"0001-a.patch": b"+2"})
    assert base != kernel._kernel_entry("7.2-rfc", tmp_path / "source-2", patches)
    shares = {
        kernel._share_entry(base, module, tests)
        for module in ({}, {"a.c": b""})
        for tests in (None, selftests.entry(source, "gcc 1"), selftests.entry(source, "gcc 2"))
    }
    assert len(shares) == 6


def test_kernels_of_a_source_share_its_selftests(tmp_path: Path) -> None:
    def entry(name: str, source: str) -> Path | None:
        return kernel._selftests_entry(name, tmp_path / source)

    found = [entry(name, "source-1") for name in ("7.2-base", "7.2-fixed", "7.2-nodebug")]
    assert found == [entry("7.2-base", "source-1")] * 3
    assert found[0] not in (None, entry("7.2-base", "source-2"))
    # It has no live update.
    assert entry("6.18-base", "source-1") is None


def test_root_key_follows_the_guest_files() -> None:
    entries = {root._root_entry(files) for files in ({}, {"/a": b""}, {"/b": b""}, {"/a": b"1"})}
    assert len(entries) == 4


def test_a_root_with_more_packages_is_an_image_of_its_own() -> None:
    ways: list[tuple[str, ...]] = [(), ("bpftrace",), ("bpftrace", "perf")]
    assert len({root._root_entry({}, more) for more in ways}) == len(ways)
    assert root._root_entry({}) == root._root_entry({}, ())


def make_tree(path: Path, series: str = "7.2") -> Path:
    (path / "init").mkdir(parents=True)
    (path / "Kconfig").write_text("mainmenu\n")
    version, patchlevel = series.split(".")
    lines = f"VERSION = {version}\nPATCHLEVEL = {patchlevel}\nSUBLEVEL = 1\nmrproper:\n"
    (path / "Makefile").write_text(lines)
    (path / "init/main.c").write_text("int main;\n")
    (path / "link").symlink_to("init/main.c")
    return path


def unpacked(source: Path) -> dict[str, str]:
    """What the work directory holds after `source` was taken."""
    with cache.locked(), cache.Log("test") as log:
        entry = kernel._take(source, log)
        kernel.prepare(entry, {}, log, kernel._work())
    tree = kernel._work() / "linux"
    return {str(p.relative_to(tree)): p.read_text() for p in tree.rglob("*") if p.is_file()}


def test_tree_and_tarball_are_the_same_source(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "linux-1")
    tarball = tmp_path / "linux-1.tar.gz"
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(tree, "linux-1")
    files = {"Kconfig", "Makefile", "init/main.c", "link"}
    assert set(unpacked(tree)) == files
    assert unpacked(tarball) == unpacked(tree)
    (tree / "init/main.c").write_text("int main, more;\n")
    assert unpacked(tree)["init/main.c"] == "int main, more;\n"


def test_a_source_is_of_the_series_that_it_says(tmp_path: Path, home: Path) -> None:
    trees = {series: make_tree(tmp_path / f"linux-{series}", series) for series in ("7.2", "7.3")}
    # Another Makefile that says something else.
    (trees["7.2"] / "init/Makefile").write_text("VERSION = 7\nPATCHLEVEL = 3\n")
    with cache.locked():
        for series, tree in trees.items():
            assert kernel.select(tree) == series
        links = {series: kernel.source_of(series) for series in trees}
        assert None not in links.values()
        assert links["7.2"] != links["7.3"]
        # The last choice is the one that holds, for its series alone.
        (trees["7.3"] / "init/main.c").write_text("int other;\n")
        kernel.select(trees["7.3"])
    assert kernel.source_of("7.2") == links["7.2"]
    assert kernel.source_of("7.3") != links["7.3"]


@pytest.mark.parametrize("series", ["6.12", "7.20", None])
def test_a_source_of_no_known_series_is_refused(tmp_path: Path, series: str | None) -> None:
    tree = make_tree(tmp_path / "linux", series or "7.2")
    if series is None:
        (tree / "Makefile").write_text("mrproper:\n")
    known = "7.2 and 7.3 and 6.18 and 7.1"
    said = f"is linux {series or r'[?][.][?]'}, and the kernels are of {known}"
    with cache.locked(), pytest.raises(cache.BuildError, match=said):
        kernel.select(tree)
    assert kernel.source_of("7.2") is None


#: What Debian's archive has on any day.
ALWAYS_THERE = [name for name in kernel.NAMES if kernel.series(name) in {"7.2", "7.3"}]


@pytest.mark.parametrize(
    ("words", "chosen", "tested"),
    [
        (None, ALWAYS_THERE, [name for name in ALWAYS_THERE if name in kernel.KERNELS]),
        ("all", ALWAYS_THERE, [name for name in ALWAYS_THERE if name in kernel.KERNELS]),
        ("7.1 6.18-base", ["6.18-base", "7.1-base"], ["6.18-base", "7.1-base"]),
        (
            "7.2",
            ["7.2-base", "7.2-rfc", "7.2-fixed", "7.2-nodebug"],
            ["7.2-base", "7.2-rfc", "7.2-fixed"],
        ),
        ("7.3-rfc 7.2-nodebug", ["7.2-nodebug", "7.3-rfc"], ["7.3-rfc"]),
    ],
)
def test_kernels_that_are_chosen(
    monkeypatch: pytest.MonkeyPatch, words: str | None, chosen: list[str], tested: list[str]
) -> None:
    if words is None:
        monkeypatch.delenv("KERNELS", raising=False)
    else:
        monkeypatch.setenv("KERNELS", words)
    assert kernel.chosen() == chosen
    assert kernel.under_test() == tested


def test_kernels_that_are_named_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [*kernel.NAMES, *kernel.ARM64, kernel.STOCK]
    monkeypatch.setenv("KERNELS", "all")
    left_out = {"7.2-arm64-4k", *(name for name in every if kernel.series(name) in kernel.ARCHIVED)}
    assert kernel.chosen(every) == [name for name in every if name not in left_out]
    monkeypatch.setenv("KERNELS", "7.2-arm64-4k")
    assert kernel.chosen(every) == ["7.2-arm64-4k"]


def test_kernels_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS", "7.2 7.4")
    with pytest.raises(cache.BuildError, match=r"neither a kernel nor a series 7\.4"):
        kernel.chosen()


def test_git_tree_gives_what_git_knows(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "linux")
    (tree / ".gitignore").write_text("*.o\n")
    (tree / "init/main.o").write_text("")
    subprocess.run(["git", "init", "-q", tree], check=True)
    assert set(unpacked(tree)) == {".gitignore", "Kconfig", "Makefile", "init/main.c", "link"}


def test_patches_are_switched_and_not_piled_up(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "linux")
    patch = "--- a/Kconfig\n+++ b/Kconfig\n@@ -1 +1 @@\n-{}\n+{}\n"
    one = patch.format("mainmenu", "one").encode()
    two = patch.format("one", "two").encode()
    other = patch.format("mainmenu", "other").encode()
    with cache.locked(), cache.Log("test") as log:
        entry = kernel._take(tree, log)
        for patches, text in (
            ({}, "mainmenu"),
            ({"1": one, "2": two}, "two"),
            ({"1": one}, "one"),
            ({"1": other}, "other"),
            ({}, "mainmenu"),
        ):
            kernel.prepare(entry, patches, log, kernel._work())
            assert (kernel._work() / "linux/Kconfig").read_text() == f"{text}\n"
        with pytest.raises(cache.BuildError, match="patch failed"):
            kernel.prepare(entry, {"1": two}, log, kernel._work())
        kernel.prepare(entry, {}, log, kernel._work())
    assert (kernel._work() / "linux/Kconfig").read_text() == "mainmenu\n"


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_is_no_kernel_is_refused(tmp_path: Path, make: object) -> None:
    source = tmp_path / "nothing"
    assert callable(make)
    make(source)
    with pytest.raises(cache.BuildError):
        unpacked(source)


def test_options_that_did_not_come_true() -> None:
    config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=m\nCONFIG_E=y\n"
    wanted = "# text\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=n\nCONFIG_D=y\nCONFIG_E=n\n"
    assert kernel.unmet(wanted, config) == ["CONFIG_D=y", "CONFIG_E=n"]


def test_a_variant_is_its_kernel_but_for_its_options() -> None:
    assert kernel.patches_of("7.2-nodebug") == kernel.patches_of("7.2-fixed")
    fixed, variant = (kernel._wanted(name).splitlines() for name in ("7.2-fixed", "7.2-nodebug"))
    assert set(fixed) - set(variant) == {
        "CONFIG_KEXEC_HANDOVER_DEBUG=y",
        'CONFIG_LOCALVERSION="-khoscope-fixed"',
    }
    assert set(variant) - set(fixed) == {
        "CONFIG_KEXEC_HANDOVER_DEBUG=n",
        'CONFIG_LOCALVERSION="-khoscope-nodebug"',
    }
    entries = {kernel._kernel_entry(name, Path("source-1"), {}) for name in kernel.NAMES}
    assert len(entries) == len(kernel.NAMES)


def test_options_of_a_series() -> None:
    assert not kernel._options("7.2-fixed")
    old, new = (kernel._wanted(name).splitlines() for name in ("7.2-fixed", "7.3-fixed"))
    assert set(old) - set(new) == {"CONFIG_PROC_SYSCTL=y"}
    assert set(new) - set(old) == {"CONFIG_PROC_SYSCTL=n", "CONFIG_SYSCTL=y"}


def test_mirror_from_both_formats_of_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "APT", tmp_path)
    (tmp_path / "sources.list.d").mkdir()
    with pytest.raises(cache.BuildError, match="No Debian mirror"):
        debian.mirror()
    (tmp_path / "sources.list.d/others.list").write_text(
        "deb http://others.invalid/apt bookworm-others main\n"
    )
    (tmp_path / "sources.list.d/debian.sources").write_text(
        "# written by an installer\nTypes: deb\nURIs: http://one.invalid/debian\n"
        "Suites: bookworm\n bookworm-updates\nComponents: main\n\n"
        "Types: deb\nURIs: http://security.invalid\nSuites: bookworm-security\nComponents: main\n"
    )
    assert debian.mirror() == "http://one.invalid/debian"
    (tmp_path / "sources.list").write_text(
        "# deb http://no.invalid/debian trixie main\n"
        "deb-src http://no.invalid/debian trixie main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://two.invalid/debian trixie main contrib # x\n"
    )
    assert debian.mirror() == "http://two.invalid/debian"


def test_missing_tools_are_named_with_the_packages() -> None:
    with pytest.raises(cache.BuildError, match=r": no-such-tool no/such.h\n.*install bc bison"):
        debian.require(["sh", "no-such-tool"], ["stdio.h", "no/such.h"])
