# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Facts about calls of KHO: who asked for what, and what became of each block.

A call here is an outermost call.  The calls that it makes in turn show in the blocks that it
touches.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import U64
from .columns import NOT_KEPT, Blocks, Columns, Pages
from .snapshot import Snapshot


class CallKind(StrEnum):
    """What a call is for; ``trace --only`` chooses among them."""

    PRESERVE = "preserve"
    UNPRESERVE = "unpreserve"
    SPLIT = "split"
    RESTORE = "restore"
    SUBTREE = "subtree"
    TREE = "tree"


class Use(IntEnum):
    """What a function itself does to a block; ``enum block_use`` in bpf/kho_trace.c."""

    NO_BLOCK = 0
    NAMED = 1
    BLOCK_BY_PFN = 2
    BLOCK_BY_KEY = 3
    BLOCK_BY_STAMP = 4
    BLOCK_OF_FOLIO = 5
    BLOCKS_OF_PAGES = 6
    BLOCKS_OF_PHYS = 7
    BLOCKS_BY_STAMP = 8


class Action(IntEnum):
    """What became of a block."""

    NONE = 0
    ADD = 1
    DELETE = 2
    RESTORE = 3


@dataclass(frozen=True)
class Function:
    """
    A function of kernel/liveupdate/kexec_handover.c.

    :param arguments: their names, in the order of the newest kernel that has the function; a
        kernel may lack the last ones, and have others in front of the first.
    :param returns: ``int`` (0 or a negative errno), ``pointer`` (NULL: failed) or ``void``; what is
        void may be an ``int`` in some kernels.
    :param use: what it does to a block itself.
    :param otherwise: what it tells of its blocks in kernels that have no function, or none that can
        be probed, which adds, deletes or restores a single block.
    """

    name: str
    kind: CallKind
    arguments: tuple[str, ...]
    returns: str = "int"
    use: Use = Use.NO_BLOCK
    action: Action = Action.NONE
    otherwise: Use = Use.NO_BLOCK

    @property
    def short(self) -> str:
        """The name without ``kho_``."""
        return self.name.removeprefix("kho_")


#: The traced functions.  bpf/kho_trace.c and recordings name a function by its index, so new
#: functions go to the end.
FUNCTIONS: Final[Sequence[Function]] = (
    Function("kho_preserve_folio", CallKind.PRESERVE, ("folio",), otherwise=Use.BLOCK_OF_FOLIO),
    Function(
        "kho_preserve_pages",
        CallKind.PRESERVE,
        ("page", "nr_pages"),
        otherwise=Use.BLOCKS_OF_PAGES,
    ),
    Function("kho_preserve_vmalloc", CallKind.PRESERVE, ("ptr", "preservation")),
    Function(
        "kho_unpreserve_folio",
        CallKind.UNPRESERVE,
        ("folio",),
        "void",
        otherwise=Use.BLOCK_OF_FOLIO,
    ),
    Function(
        "kho_unpreserve_pages",
        CallKind.UNPRESERVE,
        ("page", "nr_pages"),
        "void",
        otherwise=Use.BLOCKS_OF_PAGES,
    ),
    Function("kho_unpreserve_vmalloc", CallKind.UNPRESERVE, ("preservation",), "void"),
    Function("kho_split_preserved_pages", CallKind.SPLIT, ("page", "order")),
    Function(
        "kho_restore_folio", CallKind.RESTORE, ("phys",), "pointer", otherwise=Use.BLOCK_BY_STAMP
    ),
    Function(
        "kho_restore_pages",
        CallKind.RESTORE,
        ("phys", "nr_pages"),
        "pointer",
        otherwise=Use.BLOCKS_BY_STAMP,
    ),
    Function("kho_restore_vmalloc", CallKind.RESTORE, ("preservation",), "pointer"),
    Function(
        "kho_restore_page",
        CallKind.RESTORE,
        ("phys", "is_folio"),
        "pointer",
        Use.BLOCK_BY_STAMP,
        Action.RESTORE,
    ),
    Function("kho_add_subtree", CallKind.SUBTREE, ("name", "blob", "size"), "int", Use.NAMED),
    Function("kho_remove_subtree", CallKind.SUBTREE, ("blob",), "void"),
    Function(
        "kho_radix_add_page",
        CallKind.TREE,
        ("tree", "pfn", "order", "type"),
        "int",
        Use.BLOCK_BY_PFN,
        Action.ADD,
    ),
    Function(
        "kho_radix_del_page",
        CallKind.TREE,
        ("tree", "pfn", "order", "type"),
        "void",
        Use.BLOCK_BY_PFN,
        Action.DELETE,
    ),
    Function(
        "kho_radix_add_key",
        CallKind.TREE,
        ("tree", "key"),
        "int",
        Use.BLOCK_BY_KEY,
        Action.ADD,
    ),
    Function(
        "kho_radix_del_key",
        CallKind.TREE,
        ("tree", "key"),
        "void",
        Use.BLOCK_BY_KEY,
        Action.DELETE,
    ),
    # Linux 6.16 and 6.17, in the place of kho_preserve_pages().
    Function(
        "kho_preserve_phys", CallKind.PRESERVE, ("phys", "size"), otherwise=Use.BLOCKS_OF_PHYS
    ),
)

#: By name.
NUMBERS: Final = {function.name: number for number, function in enumerate(FUNCTIONS)}

#: KHO's own wrappers around these functions: the client is their caller.
WRAPPERS: Final = frozenset({"kho_alloc_preserve", "kho_unpreserve_free", "kho_restore_free"})

#: Errors by number, with the kernel's own names: the C library has two names for one of them.
ERRNO_NAMES: Final = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}

#: No physical address, no order, no function; whether a bit is set is not known.
NO_PHYS: Final = 2**64 - 1
#: This kernel's function has no such argument.
NO_ARGUMENT: Final = 2**64 - 1
NO_ORDER: Final = 255
BIT_CLEAR, BIT_SET, BIT_UNKNOWN = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Calls(Columns):
    """
    Outermost calls, in the order in which they returned; or kinds of them.

    :param call: u64, names the call, unique in one trace.
    :param function: u8, index into FUNCTIONS.
    :param tid: u32, ``task_struct.pid``.
    :param tgid: u32, ``task_struct.tgid``.
    :param comm: ``task_struct.comm``, 16 bytes.
    :param enter: u64, ns of ``ktime_get_ns()``.
    :param leave: u64, likewise.
    :param args: u64, shape (n, 4), those of FUNCTIONS as they were passed; ``NO_ARGUMENT`` for what
        this kernel's function does not take.
    :param ret: i64, what came back: ``int`` sign-extended; the pointer; 0 for ``void``.
    :param phys: u64, ``phys_addr_t`` of the memory that was named; ``NO_PHYS`` if the arguments do
        not say (vmalloc).
    :param pages: u64, how many pages were asked for; for vmalloc and folios, how many were touched.
    :param blocks: u64, blocks that were touched.
    :param name: of a subtree, 32 bytes.
    :param stack: u64, shape (n, frames), return addresses, innermost first; 0: none.
    :param count: u64, how many calls each row stands for: itself, and others that differ from it
        only in addresses, times and tasks; None: each stands for itself.
    :param all_pages: u64, how many pages all of these were asked for; None: likewise.
    """

    call: U64
    function: NDArray[np.uint8]
    tid: NDArray[np.uint32]
    tgid: NDArray[np.uint32]
    comm: Annotated[NDArray[np.bytes_], "|S16"]
    enter: U64
    leave: U64
    args: U64
    ret: NDArray[np.int64]
    phys: U64
    pages: U64
    blocks: U64
    name: Annotated[NDArray[np.bytes_], "|S32"]
    stack: U64
    count: Annotated[U64 | None, NOT_KEPT] = None
    all_pages: Annotated[U64 | None, NOT_KEPT] = None

    @classmethod
    def empty(cls) -> Calls:
        columns = {name: np.zeros(0, dtype) for name, dtype in cls.DTYPES.items()}
        columns["args"], columns["stack"] = np.zeros((0, 4), "<u8"), np.zeros((0, 1), "<u8")
        return cls(**columns)

    @property
    def times(self) -> U64:
        """u64, how many calls each row stands for."""
        return np.ones(len(self), np.uint64) if self.count is None else self.count

    @property
    def total(self) -> U64:
        """u64, how many pages the calls that each row stands for were asked for."""
        return self.pages if self.all_pages is None else self.all_pages

    @property
    def failed(self) -> NDArray[np.bool_]:
        """bool, returned a negative errno or NULL."""
        pointer = np.array([function.returns == "pointer" for function in FUNCTIONS])
        return np.where(pointer[self.function], self.ret == 0, self.ret < 0)


@dataclass(frozen=True, eq=False)
class Touches(Columns):
    """
    What calls did to blocks; or kinds of that.

    :param call: u64, the call that it belongs to.
    :param function: u8, index into FUNCTIONS: the function that did it, or, where none is seen that
        does it to a single block, the one whose arguments name the block.
    :param action: i8, :class:`Action`.
    :param ret: i64, what that function returned, as in :class:`Calls`; what that call returned
        if it failed and has undone what this function did.
    :param before: u8, whether the block's bit was set in the tree at entry: ``BIT_CLEAR``,
        ``BIT_SET`` or ``BIT_UNKNOWN``.
    :param after: u8, likewise at return.
    :param as_folio: bool, restored by ``kho_restore_folio``; else by ``kho_restore_pages``.
    :param asked: u8, the order of the block by the arithmetic of the caller,
        ``kho_preserve_pages`` or ``kho_restore_pages``; ``NO_ORDER``: it is another caller.
    :param looked: u32, the number of pages whose refcount was read; if the block has more pages, it
        was sampled.
    :param blocks: the blocks.  Added and deleted blocks have key and type as the tree stores them,
        restored blocks have order and type of the stamp.  ``facts`` were read at entry of an add,
        or at return of a restore, with the stamp in ``private``.
    :param known: bool, the block is in the snapshot of the kernel that handed over.
    :param was: what its struct pages were in that kernel; zeros where not known.
    :param count: u64, how many blocks each row stands for, as in :class:`Calls`.
    """

    call: U64
    function: NDArray[np.uint8]
    action: NDArray[np.int8]
    ret: NDArray[np.int64]
    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    as_folio: NDArray[np.bool_]
    asked: NDArray[np.uint8]
    looked: NDArray[np.uint32]
    blocks: Blocks
    known: Annotated[NDArray[np.bool_], NOT_KEPT]
    was: Pages
    count: Annotated[U64 | None, NOT_KEPT] = None

    @property
    def times(self) -> U64:
        """u64, how many blocks each row stands for."""
        return np.ones(len(self), np.uint64) if self.count is None else self.count

    @classmethod
    def empty(cls) -> Touches:
        columns: dict[str, Any] = {name: np.zeros(0, dtype) for name, dtype in cls.DTYPES.items()}
        blocks = dataclasses.replace(Blocks.empty(), pages=Pages.empty())
        return cls(**columns, blocks=blocks, known=np.zeros(0, np.bool_), was=Pages.empty())

    @property
    def succeeded(self) -> NDArray[np.bool_]:
        """Added, deleted or restored as asked."""
        restored = self.action == Action.RESTORE
        return np.where(restored, self.ret != 0, self.ret >= 0)

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """Blocks of which the kernel did not try to read every refcount."""
        tried = self.looked.astype(np.uint64) + self.blocks.facts.unread
        return tried < self.blocks.page_count


@dataclass(frozen=True, eq=False)
class Places:
    """
    Addresses that tell blocks apart.

    :param borders: u64, ``phys_addr_t``, in order: what is to be said of blocks differs only by
        which of these are at or below their first and their last byte.
    :param ordinary: bool, one more: whether memory behind so many borders is RAM and nothing else.
    """

    borders: U64
    ordinary: NDArray[np.bool_]


def rows_of(calls: U64, wanted: U64) -> NDArray[np.int64]:
    """i64, the row of each wanted call in a column of calls; -1: it is not there."""
    if not len(calls):
        return np.full(len(wanted), -1, np.int64)
    sorter = np.argsort(calls, kind="stable")
    at = np.searchsorted(calls, wanted, sorter=sorter)
    at = sorter[np.minimum(at, len(calls) - 1)]
    return np.where(calls[at] == wanted, at, -1)


@dataclass(frozen=True)
class Losses:
    """
    What a trace did not see.

    :param lost: events for which the buffer had no room.
    :param missed: calls that could not be followed from entry to return.
    :param sampled: blocks of which not all refcounts were read.
    :param unread: blocks of which some struct pages could not be read.
    :param open: calls that had not returned at the end.
    :param made: events that the kernel made: those seen and those lost.
    :param unseen: calls of which no block was seen, though they have some.
    """

    lost: int = 0
    missed: int = 0
    sampled: int = 0
    unread: int = 0
    open: int = 0
    made: int = 0
    unseen: int = 0

    def __bool__(self) -> bool:
        """Whether the trace missed anything."""
        return bool(
            self.lost or self.missed or self.sampled or self.unread or self.open or self.unseen
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """
    Calls that have returned, each with all that it did to blocks.

    :param touches: those of the first call, then those of the second and so on; at the end, touches
        whose call is not among ``calls``: that call has not returned yet and has too many touches
        to wait for it, or its event was lost.
    """

    calls: Calls
    touches: Touches

    def starts(self) -> NDArray[np.int64]:
        """i64, n + 1 of them: where the touches of each call begin, and where the last's end."""
        at = rows_of(self.calls.call, self.touches.call)
        counts = np.bincount(at[at >= 0], minlength=len(self.calls))
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@dataclass(frozen=True)
class Tracing:
    """
    What is traced, and how.

    :param facts: of the kernel, when tracing began; without struct pages.
    :param attached: ``fentry`` or ``kprobe`` by function.
    :param missing: functions that are not traced, and why; of functions that are traced, why their
        blocks are not seen.
    :param buffer: what carries the events, in words.
    :param started: ns of ``ktime_get_ns()`` when tracing began.
    """

    facts: Snapshot
    attached: dict[str, str]
    missing: dict[str, str]
    buffer: str
    started: int

    @property
    def left_out(self) -> dict[str, str]:
        """Functions that are not traced, and why."""
        return {name: why for name, why in self.missing.items() if name not in self.attached}

    @property
    def untold(self) -> dict[str, str]:
        """Functions that are traced, and why their blocks are not seen."""
        return {name: why for name, why in self.missing.items() if name in self.attached}


#: Turns a kernel address into ``function+0x1f [module]`` (``[kernel]`` for what is built in), or
#: ``[unknown]``.
Symbols = Callable[[int], str]


def frames(stack: Iterable[int], symbols: Symbols) -> list[str]:
    """
    The stack above KHO's own functions, innermost first: the first frame is the client.

    A stack begins with the frames of the tracing: the BPF program, its trampoline, the traced
    function.
    """
    names = [symbols(address) for address in stack if address]
    for i, name in enumerate(names):
        # The compiler may make several functions of one: function.part.0
        function = name.partition("+")[0].partition(".")[0]
        ours = function in NUMBERS or function in WRAPPERS or name.endswith("[bpf]")
        if not ours and not function.startswith(("bpf_prog_", "bpf_trampoline_")):
            return names[i:]
    return []


def client(stack: Iterable[int], symbols: Symbols) -> str:
    """Who called: ``function [module]``; ``[unknown]`` if the stack does not say."""
    above = frames(stack, symbols)
    if not above:
        return "[unknown]"
    function, _, module = above[0].partition(" ")
    return f"{function.partition('+')[0]} {module}".strip()
