# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about the kernel that is to be booted next: from its image, or as it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: In place of a file's name: the image that is loaded in the kernel's memory.
LOADED: Final = "loaded"


@dataclass(frozen=True)
class NextKernel:
    """
    A kernel, as its image says.

    For each kind of ``compatible``, these are all that the image contains: one if the kernel takes
    such a handover, none if it was built without, several if khoscope cannot tell which it takes.

    :param path: the image; for a directory, the image that was found in it; LOADED.
    :param compression: of a bzImage's payload; None: a vmlinux, or an arm64 Image.
    :param release: ``UTS_RELEASE``.
    :param kho: ``KHO_FDT_COMPATIBLE``.
    :param luo: ``LUO_ABI_COMPATIBLE``; up to linux 7.1 ``LUO_FDT_COMPATIBLE``.
    :param memfd: ``MEMFD_LUO_FH_COMPATIBLE``.
    :param luo_session: ``LUO_FDT_SESSION_COMPATIBLE``, of a node in LUO's FDT.
    :param luo_flb: ``LUO_FDT_FLB_COMPATIBLE``, likewise; kernels without one do not look for it.
    :param misses_files: whether it fails every open of ``/dev/liveupdate`` if a file of a session
        has no handler; if not, that session lacks files, and no error says so.
    :param newer_functions: whether it has functions of KHO that came with linux 6.18
        (``kho_preserve_pages``, ``kho_preserve_vmalloc``); False: it does not say so.
    :param size: bytes that it takes in one piece while it starts: ``init_size`` of a bzImage,
        ``image_size`` of an arm64 Image; of a vmlinux what it takes at least; None: it does not
        say.
    :param initrd: bytes of the initrd that goes with it; None: none does, or none was named.
    :param command_line: that it will be booted with; None: an image in a file does not say.
    """

    path: str
    compression: str | None
    release: str
    kho: tuple[str, ...] = ()
    luo: tuple[str, ...] = ()
    memfd: tuple[str, ...] = ()
    luo_session: tuple[str, ...] = ()
    luo_flb: tuple[str, ...] = ()
    misses_files: bool = False
    newer_functions: bool = False
    size: int | None = None
    initrd: int | None = None
    command_line: str | None = None

    @property
    def has_page_bitmaps(self) -> bool:
        """
        Whether bitmaps of preserved memory, if it reads any, surely have the size of a page.

        They have 512 bytes from linux 6.16 to 6.17.8, which have neither LUO nor those functions.
        6.17.9 and what follows in its series looks like them.
        """
        return self.newer_functions or bool(self.luo)

    @property
    def is_loaded(self) -> bool:
        """Whether it was read as it is loaded, not from a file."""
        return self.command_line is not None

    @property
    def in_words(self) -> str:
        """What the kernel is, and what it takes, in one line."""
        form = f"bzImage ({self.compression})" if self.compression else "not compressed"
        takes = [" and ".join(each) for each in (self.kho, self.luo, self.memfd) if each]
        where = "as loaded, " if self.is_loaded else ""
        return f"{where}{self.release}, {form}, {', '.join(takes) or 'no KHO'}"
