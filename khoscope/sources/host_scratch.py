# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Reads what a host's files say of KHO's scratch areas.

No line of these files is trusted to be there, or to be as the kernel writes it: what does not look
like that counts as not read.
"""

from __future__ import annotations

import os
import platform
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from ..facts import budget
from ..facts.host_scratch import CmaCounts, HostScratch, Told, host_switch, scratch_size
from ..facts.status import not_reserved
from . import host_files

#: Bytes of a configuration, unpacked.
_CONFIGURATION: Final = 4 << 20
#: Records of the log that are read at most, and bytes of one (PRINTK_MESSAGE_MAX, and its prefix).
_RECORDS, _RECORD = 1 << 18, 8192
#: ``SETUP_KEXEC_KHO`` (arch/x86/include/uapi/asm/setup_data.h), and how many of all types to read.
_SETUP_KEXEC_KHO, _SETUP_DATA = 10, 64
#: What a kernel that another one has handed over to says first.
_FOUND: Final = "KHO: found kexec handover data"

#: Where each fact is, by the names in ``khoscope/facts/host_scratch.py``.
_FILES: Final = {
    "areas": host_files.SCRATCH_LEN,
    "zones": host_files.ZONEINFO,
    "free": host_files.MEMINFO,
    "blocks": host_files.PAGETYPEINFO,
    "out": host_files.KHO_OUT,
    "lacking": host_files.LOG,
    "command_line": host_files.COMMAND_LINE,
}


def read_host_scratch(root: Path = Path("/"), built: bool | None = None) -> HostScratch:
    """
    Read it, with whatever rights khoscope has; what it may not read is not known.

    As root, this reads /proc/pagetypeinfo, for which the kernel visits each page block.

    :param root: where the host's files are.
    :param built: whether the running kernel has KHO, by its symbols; None: its configuration says.
    """
    memory, areas, log = _memory(root), _areas(root), _log(root)
    cma = _cma(root, memory)
    config, lines = _configuration(root)
    told = Told(
        command_line=host_files.text(root, host_files.COMMAND_LINE),
        built=_is_set(lines, "CONFIG_KEXEC_HANDOVER") if built is None else built,
        default=_is_set(lines, "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"),
        lacking=not_reserved(log),
        out=host_files.is_there(root, host_files.KHO_OUT),
        took_over=_took_over(root, log),
        ram=memory.get("MemTotal"),
    )
    size, size_by = scratch_size(areas, cma, told.took_over)
    switch = host_switch(told, size, cma)
    files = {name: str(file) for name, file in _FILES.items()}
    files["size"] = files[size_by] if size_by else ""
    files["built"] = config if built is None else str(host_files.KALLSYMS)
    return HostScratch(
        switch.on, switch.why, files[switch.by], switch.hint, size, files["size"], cma
    )


# -- memory ---------------------------------------------------------------------------------------


def _memory(root: Path) -> dict[str, int]:
    """Lines of /proc/meminfo, in bytes."""
    text = host_files.text(root, host_files.MEMINFO) or ""
    found = re.findall(r"^(\w+): +([0-9]{1,15}) kB$", text, re.MULTILINE)
    return {name: int(number) << 10 for name, number in found}


def _cma(root: Path, memory: Mapping[str, int]) -> CmaCounts:
    total, free = memory.get("CmaTotal"), memory.get("CmaFree")
    blocks = _page_blocks(host_files.text(root, host_files.PAGETYPEINFO) or "")
    return CmaCounts(total, free, _zones(root), *blocks)


def _zones(root: Path) -> int | None:
    """Bytes of CMA in all zones (``zoneinfo_show_print()``), cma_pages of each."""
    text = host_files.text(root, host_files.ZONEINFO) or ""
    pages = re.findall(r"^ +cma +([0-9]{1,15})$", text, re.MULTILINE)
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE") if pages else None


def _page_blocks(text: str) -> tuple[int | None, int | None]:
    """Page blocks of type CMA, and bytes of one (``pagetypeinfo_show()``, once for each node)."""
    pages = re.search(r"^Pages per block: +([0-9]{1,9})$", text, re.MULTILINE)
    counts: list[int] = []
    column = None
    for line in text.splitlines():
        if title := re.match(r"Number of blocks type +(.*)", line):
            types = title[1].split()
            column = types.index("CMA") if "CMA" in types else None
        elif row := re.match(r"Node +[0-9]+, zone +\S+ +([0-9 ]+)$", line):
            numbers = row[1].split()
            if column is not None and column < len(numbers):
                counts.append(int(numbers[column][:15]))
        else:
            # Another table, such as that of mixed blocks, may follow.
            column = None
    if pages is None or not counts:
        return None, None
    return sum(counts), int(pages[1]) * os.sysconf("SC_PAGE_SIZE")


def _areas(root: Path) -> list[tuple[int, int]] | None:
    """Address and bytes of each area (``scratch_phys_show()``); None: debugfs does not say."""
    starts = _hex_lines(host_files.text(root, host_files.SCRATCH_PHYS))
    sizes = _hex_lines(host_files.text(root, host_files.SCRATCH_LEN))
    if not starts or not sizes or len(starts) != len(sizes):
        return None
    return list(zip(starts, sizes, strict=True))


def _hex_lines(text: str | None) -> list[int] | None:
    """None, too, if that is not what they are, or if they are more than any kernel has."""
    lines = (text or "").splitlines()
    if len(lines) > budget.SCRATCH or not all(
        re.fullmatch(r"0x[0-9a-f]{1,16}", line) for line in lines
    ):
        return None
    numbers = [int(line, 16) for line in lines]
    return numbers if max(numbers, default=0) <= budget.ADDRESSES else None


# -- the switch -----------------------------------------------------------------------------------


def _configuration(root: Path) -> tuple[str, frozenset[str]]:
    """The file that has the kernel's configuration, "" if there is none, and its lines."""
    for path in host_files.configurations(platform.release()):
        content = host_files.content(root, path) or b""
        if path.suffix == ".gz":
            content = _unpacked(content)
        lines = frozenset(content[:_CONFIGURATION].decode(errors="replace").splitlines())
        if any(re.match(r"CONFIG_\w+=", line) for line in lines):
            return str(path), lines
    return "", frozenset()


def _unpacked(content: bytes) -> bytes:
    """Of what gzip has packed; nothing if it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(content, _CONFIGURATION)
    except zlib.error:
        return b""


def _is_set(configuration: frozenset[str], name: str) -> bool | None:
    """False, too, of what this kernel cannot be configured for; None: nothing is known."""
    return f"{name}=y" in configuration if configuration else None


def _log(root: Path) -> list[str]:
    """
    What the kernel itself has logged of KHO and is still there.

    It may be far back, and be gone on a host that is up for long.
    """
    try:
        fd = os.open(host_files.at(root, host_files.LOG), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        content = b"".join(_records(fd))
    finally:
        os.close(fd)
    records = [line.partition(";") for line in content.decode(errors="replace").splitlines()]
    return [text for prefix, _, text in records if "KHO: " in text and _by_kernel(prefix)]


def _records(fd: int) -> Iterable[bytes]:
    """Records up to the end of the log as it is now, or to a bound if it grows as fast."""
    for _ in range(_RECORDS):
        try:
            record = os.read(fd, _RECORD)
        except BrokenPipeError:
            # Written over while it was read: the next read goes on behind the gap.
            continue
        except OSError:
            return
        if not record:
            return
        yield record


def _by_kernel(prefix: str) -> bool:
    """Whether a record has the facility LOG_KERN: what programs write to the log never has."""
    level = prefix.partition(",")[0]
    return re.fullmatch(r"[0-7]", level) is not None


def _took_over(root: Path, log: list[str]) -> bool | None:
    """Whether another kernel has handed over to this one; None: no file says it."""
    if any(line.startswith(_FOUND) for line in log) or _SETUP_KEXEC_KHO in _setup_data(root):
        return True
    if any(host_files.is_there(root, path) for path in (host_files.KHO_IN, host_files.CHOSEN_KHO)):
        return True
    told = (host_files.BOOT_PARAMS, host_files.CHOSEN)
    return False if any(host_files.is_there(root, path) for path in told) else None


def _setup_data(root: Path) -> set[int]:
    """Types of what this kernel was given when it was started (``struct setup_data``), on x86."""
    try:
        names = os.listdir(host_files.at(root, host_files.SETUP_DATA))[:_SETUP_DATA]
    except OSError:
        return set()
    said = [host_files.text(root, host_files.SETUP_DATA / name / "type") for name in names]
    types = [re.fullmatch(r"0x[0-9a-f]{1,8}", (text or "").strip()) for text in said]
    return {int(found[0], 16) for found in types if found}
