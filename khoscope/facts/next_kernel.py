# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about the kernel that is to be booted next, from its image alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NextKernel:
    """
    A kernel, as its image says.

    Of each ``compatible`` these are all that stand in the image: one where the kernel takes such a
    handover, none where it was built without, several where it cannot be told.

    :param path: the image; of a directory, the one that was found in it.
    :param compression: of a bzImage's payload; None: a vmlinux, or an arm64 Image.
    :param release: ``UTS_RELEASE``.
    :param kho: ``KHO_FDT_COMPATIBLE``.
    :param luo: ``LUO_ABI_COMPATIBLE``.
    :param memfd: ``MEMFD_LUO_FH_COMPATIBLE``.
    """

    path: str
    compression: str | None
    release: str
    kho: tuple[str, ...] = ()
    luo: tuple[str, ...] = ()
    memfd: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """What it is and takes, in one line."""
        form = f"bzImage ({self.compression})" if self.compression else "not compressed"
        takes = [" and ".join(each) for each in (self.kho, self.luo, self.memfd) if each]
        return f"{self.release}, {form}, {', '.join(takes) or 'no KHO'}"
