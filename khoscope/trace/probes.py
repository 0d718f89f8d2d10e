# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put bpf/kho_trace.c into the running kernel, with bcc, and take its records out."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..abi.keys import KHO_PAGE_MAGIC, Abi, Tracker
from ..facts.calls import (
    FUNCTIONS,
    NO_ARGUMENT,
    NUMBERS,
    Action,
    Batch,
    CallKind,
    Function,
    Places,
    Use,
)
from ..sources import host_files
from ..sources.bcc import import_bcc
from ..sources.kernel import KernelSource, Layout, Signature
from ..words.errors import KhoscopeError, say
from .assemble import MEANT, events_in, record_dtype
from .call_filter import CallFilter
from .kinds import Counted
from .ring import Reader, Ring

#: Stack frames kept of each call: enough to find the client, or the whole stack.  The innermost
#: frames belong to the BPF program, its trampoline and KHO itself.
CLIENT_FRAMES, STACK_FRAMES = 8, 40
#: Bytes of the ring buffer.
BUFFER: Final = 16 << 20
#: How many kinds of calls, and of blocks, are counted.
KINDS: Final = 1 << 13
#: Addresses at which kinds differ (``PLACES`` in bpf/kho_trace.c), but for the end of all.
MOST_BORDERS: Final = 255
#: How many records are shown at once.
ENOUGH: Final = 1 << 13
#: Bytes of records that have been taken out of the ring buffer and wait to be shown.
BACKLOG: Final = 256 << 20

#: Arguments that are kept of each call (``args`` in bpf/kho_trace.c).
_ARGUMENTS: Final = 4

#: A program of ``struct bpf_insn``: ``may_goto +0; r0 = 0; exit``.
_MAY_GOTO: Final = bytes([0xE5, *7 * [0], 0xB7, *7 * [0], 0x95, *7 * [0]])

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_KINDS: Final = list(CallKind)


@dataclass(frozen=True)
class Counters:
    """
    What the kernel has counted (``enum counter`` in bpf/kho_trace.c).

    :param made: events.
    :param lost: events for which the buffer had no room.
    :param missed: calls that could not be followed from entry to return, including those that had
        begun before tracing began.
    :param open: calls that have not returned.
    """

    made: int
    lost: int
    missed: int
    open: int


#: What is before the record in ``struct sum``, and ``struct places``.
_SUM = np.dtype([("count", "<u8"), ("pages", "<u8")])
_PLACES = np.dtype(
    [("border", "<u8", (MOST_BORDERS + 1,)), ("ordinary", "u1", (MOST_BORDERS + 1,))]
)


@dataclass(frozen=True)
class _Probe:
    """A function to attach to, how to attach, and what the function does to blocks."""

    function: Function
    how: str
    signature: Signature
    use: Use

    @property
    def adds(self) -> bool:
        """Whether it tells of blocks that are added."""
        on_its_own = self.use > Use.NAMED and self.function.kind == CallKind.PRESERVE
        return self.function.action == Action.ADD or on_its_own

    def source(self) -> str:
        """The lines of C that define its BPF programs."""
        f = self.function
        number = NUMBERS[f.name]
        kind = 1 << _KINDS.index(f.kind)
        adds = int(self.adds)
        arguments = ", ".join(self._arguments())
        entry = f"({f.name}, {number}, {kind}, {self.use.name}, {adds}, {arguments})\n"
        result = f"{self._result()}, {int(f.returns == 'pointer')}, {self._asked()}"
        leave = f"({f.name}, {number}, {self.use.name}, {adds}, {result})\n"
        if self.how == "kprobe":
            return f"KPROBE{entry}KRETPROBE{leave}"
        return f"FENTRY{entry}FEXIT{leave}"

    def _arguments(self) -> Iterator[str]:
        """Where the arguments that we know are, in our order; those of FUNCTIONS come first."""
        names = [parameter.name for parameter in self.signature.parameters]
        first = self.function.arguments[0]
        skipped = names.index(first) if first in names else 0
        parameters = self.signature.parameters[skipped:]
        ours = len(self.function.arguments)
        for i in range(_ARGUMENTS):
            if i >= ours:
                yield "0"
            elif i >= len(parameters):
                yield f"{NO_ARGUMENT:#x}ULL"
            else:
                at = i + skipped
                place = f"PT_REGS_PARM{at + 1}(ctx)" if self.how == "kprobe" else f"ctx[{at}]"
                # An argument of 32 bits may leave anything in the rest of its register.
                yield f"(u32){place}" if parameters[i].size == 4 else place

    def _asked(self) -> str:
        """How many pages a call is about, as :class:`~.assemble.Assembler` has it."""
        arguments = self.function.arguments
        if "nr_pages" in arguments:
            return f"PAGES_COUNTED({arguments.index('nr_pages')})"
        if {"order", "page"} <= {*arguments}:
            return f"PAGES_OF_ORDER({arguments.index('order')})"
        if "size" in arguments:
            return f"PAGES_OF_SIZE({arguments.index('size')})"
        return f"PAGES_TOUCHED({MEANT[NUMBERS[self.function.name]].name})"

    def _result(self) -> str:
        if self.signature.is_void:
            return "0"
        if self.how == "kprobe":
            return "PT_REGS_RC(ctx)"
        return f"ctx[{len(self.signature.parameters)}]"


class Probes:
    """
    The probes in the running kernel, from ``with`` to its end.  The kernel holds them only for this
    process: however the process ends, nothing is left behind.

    :param source: the running kernel.
    :param how: ``fentry`` or ``kprobe`` for all functions; None: fentry if the kernel supports it.
    :param frames: stack frames kept of each call.
    :param buffer: bytes.
    :param verbose: show what the compiler and the verifier say.
    :param places: count calls and blocks by kind, which differ by these; None: each is told.
    :raises KhoscopeError: if bcc, kernel headers or the permission are missing, or if the kernel
        refuses the programs.
    """

    def __init__(
        self,
        source: KernelSource,
        wanted: CallFilter,
        how: str | None = None,
        frames: int = CLIENT_FRAMES,
        buffer: int = BUFFER,
        verbose: bool = False,
        places: Places | None = None,
    ) -> None:
        self._bcc = import_bcc()
        self._source = source
        self._wanted = wanted
        self._how = how
        self._frames = frames
        # The kernel wants a power of two.
        self._pages = 1 << max((buffer // _PAGE).bit_length() - 1, 0)
        self._verbose = verbose
        self._places = places
        self._size = record_dtype(frames).itemsize
        self._reader: Reader | None = None
        self._bpf: Any = None
        self._taken = self._grouped = 0
        self._symbols: dict[int, str] = {}
        self._symbol_cache: Any = None
        #: Those of which the cache has the symbols.
        self._modules: frozenset[_Module] = frozenset()
        #: A note to print once stderr is restored.
        self._note = ""
        #: ``fentry`` or ``kprobe`` by function, and why others are left out.
        self.attached: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    @property
    def buffer(self) -> str:
        """In words."""
        size = self._pages * _PAGE
        amount = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        ring = f"ring buffer of {amount}"
        if self._places is None:
            return ring
        return f"counted by kind, up to {KINDS:,} of calls and of blocks; {ring} for what is odd"

    def __enter__(self) -> Self:
        probes = self._choose()
        with self._listening() as said:
            try:
                self._attach(probes, said)
                self._open_buffer()
                self._set_places()
                self.arm(True)
            except BaseException:
                self._detach()
                raise
        if self._note:
            say(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._reader is not None:
            self._reader.stop()
        self._reader = None
        self._forget_symbols()
        if self._bpf is not None:
            self._bpf.cleanup()

    # -- attaching --------------------------------------------------------------------------------

    def _choose(self) -> list[_Probe]:
        found = {}
        for function in FUNCTIONS:
            signature = self._source.signature(function.name)
            if signature is None:
                self.missing[function.name] = _NOT_THERE
            else:
                found[function.name] = signature
        # Kinds of calls whose blocks only their own arguments tell.
        blind: set[CallKind] = set()
        if self._source.abi.tracker == Tracker.XARRAY:
            blind |= {CallKind.PRESERVE, CallKind.UNPRESERVE}
        if "kho_restore_page" not in found or not _is_known(found["kho_restore_page"]):
            found.pop("kho_restore_page", None)
            self.missing["kho_restore_page"] = _TOLD_OTHERWISE
            blind.add(CallKind.RESTORE)
        probes = []
        for name, signature in found.items():
            function = FUNCTIONS[NUMBERS[name]]
            use = function.use
            if function.kind in blind:
                use = function.otherwise
            probes.append(_Probe(function, self._best(name), signature, use))
        if not any(probe.adds for probe in probes):
            raise KhoscopeError(_nothing_adds(self._source.abi), _INLINED)
        if CallKind.UNPRESERVE in blind and "kho_unpreserve_vmalloc" in found:
            self.missing["kho_unpreserve_vmalloc"] = _UNTOLD
        return probes

    def _best(self, name: str) -> str:
        if self._how:
            return self._how
        traceable = self._traceable
        known = b"\0" + name.encode() + b"\0" in self._btf and (name in traceable or not traceable)
        return "fentry" if known else "kprobe"

    @cached_property
    def _btf(self) -> bytes:
        """The kernel's BTF, which has all names; empty if fentry is not available."""
        if not host_files.BTF.exists() or not self._bcc.BPF.support_kfunc():
            return b""
        return host_files.BTF.read_bytes()

    @cached_property
    def _traceable(self) -> frozenset[str]:
        """Functions that ftrace can patch; empty: the kernel does not say."""
        if not os.access(host_files.TRACEABLE, os.R_OK):
            return frozenset()
        return frozenset(line.split()[0] for line in host_files.TRACEABLE.read_text().splitlines())

    @cached_property
    def _has_may_goto(self) -> bool:
        """Whether the kernel takes programs whose loops may be long (since linux 6.9)."""
        program = self._bcc.lib.bcc_prog_load(
            self._bcc.BPF.KPROBE, b"may_goto", _MAY_GOTO, len(_MAY_GOTO), b"GPL", 0, 0, None, 0
        )
        if program < 0:
            return False
        os.close(program)
        return True

    def _attach(self, probes: list[_Probe], said: Callable[[], str]) -> None:
        try:
            self._bpf = self._compile(probes)
        except _BccError as error:
            refused = _refusal(error, said(), self._verbose)
            fentry = any(probe.how == "fentry" for probe in probes)
            if self._how or not fentry or not refused.what.startswith(_VERIFIER):
                raise refused from error
            # The kernel may refuse a trampoline but accept a kprobe.
            self._note = f"{refused.what}; kprobes are used"
            probes = [replace(probe, how="kprobe") for probe in probes]
            try:
                self._bpf = self._compile(probes)
            except _BccError as again:
                raise _refusal(again, said(), self._verbose) from again
        for probe in probes:
            if probe.how == "fentry" or self._attach_kprobe(probe, said):
                self.attached[probe.function.name] = probe.how
            else:
                self.missing[probe.function.name] = _UNPROBED
        blind = [p.function.name for p in probes if p.use > Use.NAMED]
        blind = [name for name in blind if name not in self.attached]
        if blind:
            raise KhoscopeError(
                f"{', '.join(blind)}: {_UNPROBED}",
                "see that the kernel has CONFIG_KPROBES=y and is not locked down",
            )

    def _compile(self, probes: list[_Probe]) -> Any:
        """Compile.  bcc loads and attaches fentry programs right away."""
        text = resources.files("khoscope").joinpath("bpf/kho_trace.c").read_text()
        text += "".join(probe.source() for probe in probes)
        flags = [f"-D{name}={value}" for name, value in self._defines().items()]
        debug = self._bcc.DEBUG_BPF if self._verbose else 0
        bpf = self._bcc.BPF.__new__(self._bcc.BPF)
        try:
            with _bcc_errors():
                bpf.__init__(text=text, cflags=flags, debug=debug)
        except BaseException:
            # Some programs may be attached already.
            bpf.cleanup()
            raise
        return bpf

    def _defines(self) -> dict[str, str | int]:
        """What bpf/kho_trace.c needs to know."""
        abi, layout = self._source.abi, self._source.layout
        defines: dict[str, str | int] = {
            "VMEMMAP": f"{layout.pages.vmemmap:#x}ULL",
            "PAGE_STRUCT_SIZE": layout.pages.size,
            "REFCOUNT_OFFSET": layout.pages.refcount,
            "PRIVATE_OFFSET": layout.pages.private,
            "FLAGS_OFFSET": layout.pages.flags,
            "COMPOUND_OFFSET": layout.pages.compound,
            "PAGE_TYPE_OFFSET": layout.pages.page_type,
            "HEAD_BIT": layout.pages.head_bit,
            "PAGE_SHIFT_BITS": abi.page_shift,
            "DIRECT_MAP": f"{layout.direct_map:#x}ULL",
            "TREE": f"{layout.tree:#x}ULL",
            "ROOT_OFFSET": layout.root,
            **_xarrays(abi, layout),
            "ORDER_0_LOG2": abi.order_0_log2,
            "TABLE_LOG2": abi.table_size_log2,
            "BITMAP_LOG2": abi.bitmap_size_log2,
            "DEPTH": abi.tree_max_depth,
            "STORED_BITS": abi.stored_bits,
            "KEY_WIDTH": 64 if abi.key_width is None else abi.key_width,
            "TYPE_SHIFT": 64 if abi.type_shift is None else abi.type_shift,
            # Without a magic, the high half is 0.
            "STAMP_MAGIC": 0 if abi.stamp.magic_shift is None else f"{KHO_PAGE_MAGIC:#x}",
            "STAMP_MAGIC_SHIFT": abi.stamp.magic_shift or 32,
            "STAMP_ORDER_MASK": f"{(1 << abi.stamp.order_bits) - 1:#x}",
            "STAMP_TYPE_SHIFT": 64 if abi.stamp.type_shift is None else abi.stamp.type_shift,
            "PRESERVE_PAGES": NUMBERS["kho_preserve_pages"],
            "RESTORE_PAGES": NUMBERS["kho_restore_pages"],
            "HUGETLB_TYPE": layout.pages.hugetlb_type,
            "OPTIMIZED": layout.pages.optimized,
            "OWN_PAGES": layout.pages.own(abi.page_size),
            "MAY_GOTO": int(self._has_may_goto),
            "STACK_FRAMES": self._frames,
            "KINDS": KINDS if self._places is not None else 0,
            "MIN_ORDER": self._wanted.min_order,
            "ONLY": sum(1 << _KINDS.index(kind) for kind in self._wanted.kinds),
            "RING_PAGES": self._pages,
        }
        if self._wanted.tgid is not None:
            defines["WANTED_TGID"] = self._wanted.tgid
        if self._wanted.comm_bytes is not None:
            comm = self._wanted.comm_bytes.ljust(16, b"\0")
            defines["WANTED_COMM"] = "{" + ",".join(str(byte) for byte in comm) + "}"
        return defines

    def _attach_kprobe(self, probe: _Probe, said: Callable[[], str]) -> bool:
        """Whether it could be attached."""
        if (
            os.access(host_files.KPROBES_ENABLED, os.R_OK)
            and host_files.KPROBES_ENABLED.read_text().strip() == "0"
        ):
            raise KhoscopeError(
                f"kprobes are switched off ({host_files.KPROBES_ENABLED} is 0)",
                f"write 1 to {host_files.KPROBES_ENABLED}",
            )
        name = probe.function.name
        try:
            # Attach the return first: then every call that is seen to begin is also seen to end.
            with _bcc_errors():
                self._bpf.attach_kretprobe(event=name, fn_name=f"leave_{name}")
            try:
                with _bcc_errors():
                    self._bpf.attach_kprobe(event=name, fn_name=f"enter_{name}")
            except _BccError:
                # Otherwise every return would count as a call whose beginning was missed.
                self._bpf.detach_kretprobe(event=name)
                raise
        except _BccError as error:
            if "Failed to attach" not in str(error):
                raise _refusal(error, said(), self._verbose) from error
            return False
        return True

    @contextmanager
    def _listening(self) -> Iterator[Callable[[], str]]:
        """
        Capture what libbcc and the compiler write; ``-v`` shows it on stderr.

        They write some of it to stdout, where khoscope's own data goes.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with tempfile.TemporaryFile() as heard:
            saved = {number: os.dup(number) for number in (1, 2)}
            if not self._verbose:
                os.dup2(heard.fileno(), 2)
            os.dup2(2, 1)

            def said() -> str:
                _flush_c()
                heard.seek(0)
                return heard.read().decode(errors="replace")

            try:
                yield said
            finally:
                _flush_c()
                for number, copy in saved.items():
                    os.dup2(copy, number)
                    os.close(copy)

    # -- following --------------------------------------------------------------------------------

    def _open_buffer(self) -> None:
        descriptor = self._bpf["events"].map_fd
        try:
            ring = Ring(descriptor, self._pages * _PAGE, self._size)
        except OSError as error:
            raise KhoscopeError(
                f"the events' ring buffer cannot be mapped ({error.strerror})",
                "see RLIMIT_AS, or take a smaller --buffer",
            ) from error
        self._reader = Reader(ring, BACKLOG // self._size)

    def _set_places(self) -> None:
        if self._places is not None:
            table = self._bpf["places"]
            value = np.zeros(1, _PLACES)
            value["border"] = 2**63 - 1
            value["border"][0, : len(self._places.borders)] = self._places.borders
            value["ordinary"][0, : len(self._places.ordinary)] = self._places.ordinary
            table[ctypes.c_int(0)] = table.Leaf.from_buffer_copy(value.tobytes())

    def kinds(self) -> tuple[Counted, Counted]:
        """The kinds of calls, and of blocks, that have been counted since the beginning."""
        calls, blocks = (self._counted(name) for name in ("call_kinds", "block_kinds"))
        self._grouped = int(calls.count.sum() + blocks.count.sum())
        return calls, blocks

    def _counted(self, name: str) -> Counted:
        items = [(bytes(key), bytes(told)) for key, told in self._bpf[name].items_lookup_batch()]
        told = np.frombuffer(b"".join(each for _, each in items), np.uint8)
        told = told.reshape(len(items), _SUM.itemsize + self._size)
        sums = np.ascontiguousarray(told[:, : _SUM.itemsize]).view(_SUM)[:, 0]
        keys = [key for key, _ in items]
        return Counted(keys, sums["count"], sums["pages"], told[:, _SUM.itemsize :])

    def arm(self, on: bool) -> None:
        """
        Begin to follow calls; or, if not ``on``, follow only calls that have begun to their end.
        """
        self._bpf["armed"][ctypes.c_int(0)] = ctypes.c_uint(int(on))
        if not on and self._reader is not None:
            # From here on, a poll that finds nothing says that there is nothing.
            self._reader.stop()

    def poll(self, milliseconds: int) -> NDArray[np.uint8]:
        """The oldest records that have come, u8, shape (n, size); wait if there are none yet."""
        assert self._reader is not None
        records = self._reader.poll(milliseconds, ENOUGH)
        self._taken += events_in(records)
        return records

    def held(self) -> NDArray[np.uint8]:
        """Blocks that calls which have not returned would tell when they do, as records."""
        records = [bytes(t.told.record) for t in self._tasks() if t.told.record.call.has_block]
        held = np.frombuffer(b"".join(records), np.uint8).reshape(-1, self._size)
        self._taken += events_in(held)
        return held

    def counters(self) -> Counters:
        """What the kernel has counted so far."""
        table = self._bpf["counters"]
        made, lost, missed, unseen = (
            sum(int(on_cpu) for on_cpu in table[ctypes.c_int(i)]) for i in range(4)
        )
        missed += unseen + sum(map(_recursion_misses, self._bpf.funcs.values()))
        return Counters(made, lost, missed, self._open())

    def _open(self) -> int:
        """Calls that somebody asked for and that have not returned."""
        return sum(task.depth > 0 and not task.muted for task in self._tasks())

    def _tasks(self) -> Iterator[Any]:
        """``struct task`` of each task that is in a call."""
        table = self._bpf["tasks"]
        # While tasks come and go, the iteration might begin again and again.
        for tid in islice(table, table.max_entries):
            try:
                yield table[tid]
            except KeyError:
                continue  # It has returned meanwhile.

    def drained(self) -> Counters:
        """The counters at the end, when all records have been taken."""
        counters = self.counters()
        # A record that was made but not taken is lost, even if the kernel did not count it as lost.
        lost = max(counters.lost, counters.made - self._taken - self._grouped)
        return Counters(counters.made, lost, counters.missed, counters.open)

    # -- symbols ----------------------------------------------------------------------------------

    def learn(self, batch: Batch) -> None:
        """
        Look up the addresses of a batch's stacks while their modules are loaded.

        What a module leaves behind keeps its name until another module is loaded there.
        """
        modules = _loaded_modules()
        came = modules - self._modules
        stale = {a for a in self._symbols if any(module.holds(a) for module in came)}
        new = set(np.unique(batch.calls.stack).tolist()) - self._symbols.keys() - {0}
        if not new and not stale:
            return
        if self._symbol_cache is None or modules != self._modules:
            self._forget_symbols()
            # A cache of bcc reads the symbols of modules only once.
            self._symbol_cache = self._bcc.SymbolCache(-1)
            self._modules = modules
        for address in new | stale:
            self._symbols[address] = self._look_up(address)

    def _look_up(self, address: int) -> str:
        name, offset, module = self._symbol_cache.resolve(address, False)
        if name is None or module is None:
            return _UNKNOWN
        of = os.path.basename(module.decode())
        # bcc gives the symbol before the address, however far away, and of whatever module.
        spans = [each for each in self._modules if each.name == of]
        if not (any(each.holds(address) for each in spans) if spans else offset < _FARTHEST):
            return _UNKNOWN
        return f"{name.decode()}+{offset:#x} [{of}]"

    def _forget_symbols(self) -> None:
        """bcc keeps a cache, of some MiB, until it is told to free it."""
        if self._symbol_cache is not None:
            self._bcc.lib.bcc_free_symcache(self._symbol_cache.cache, -1)
            self._symbol_cache = None

    @property
    def symbols(self) -> dict[int, str]:
        """All addresses that were looked up."""
        return self._symbols

    def symbol(self, address: int) -> str:
        """``function+0x1f [module]``, or ``[unknown]``."""
        return self._symbols.get(address, _UNKNOWN)


_UNKNOWN: Final = "[unknown]"
#: Bytes that no function of the kernel, and no BPF program, is long.
_FARTHEST: Final = 1 << 20


class _Module(NamedTuple):
    """A module that is loaded, and where: its functions come first in what it occupies."""

    name: str
    start: int
    size: int

    def holds(self, address: int) -> bool:
        return self.start <= address < self.start + self.size


def _loaded_modules() -> frozenset[_Module]:
    """``name size users used-by state address …``, a line for each."""
    lines = [line.split() for line in host_files.LOADED_MODULES.read_text().splitlines()]
    return frozenset(_Module(line[0], int(line[5], 16), int(line[1])) for line in lines)


_NOT_THERE = "not in this kernel"
_TOLD_OTHERWISE = "its callers tell what they restore"
_UNTOLD = "this kernel has no function that tells of them"
_INLINED = "its compiler may have inlined it; khoscope verify does without"


def _nothing_adds(abi: Abi) -> str:
    """That no function is there which adds blocks, in words."""
    what, names = "adds a block to KHO's tree", "kho_radix_add_page, kho_radix_add_key"
    if abi.tracker == Tracker.XARRAY:
        what = "preserves a folio or pages"
        names = "kho_preserve_folio, kho_preserve_pages, kho_preserve_phys"
    return f"this kernel has no function that {what} ({names})"


def _is_known(kho_restore_page: Signature) -> bool:
    """
    Whether it is the one that restores a block either as a folio or as pages (since linux 6.19).

    In linux 6.18 its callers make pages of what it restores, and trees that are not merged yet have
    another function of that name.
    """
    names = [parameter.name for parameter in kho_restore_page.parameters]
    return names == list(FUNCTIONS[NUMBERS["kho_restore_page"]].arguments)


def _xarrays(abi: Abi, layout: Layout) -> dict[str, str | int]:
    """What bpf/kho_trace.c needs to know of a ``struct kho_mem_track``."""
    track = layout.track
    return {
        "ORDERS": f"{layout.orders:#x}ULL",
        "XA_HEAD": track.head if track else 0,
        "XA_SHIFT": track.shift if track else 0,
        "XA_SLOTS": track.slots if track else 0,
        "XA_CHUNK_LOG2": track.chunk_log2 if track else 0,
        "PHYS_BITS": track.phys_bits if track else 0,
        "PRESERVE_LOG2": abi.bitmap_log2,
    }


def _flush_c() -> None:
    """Write out what the C library has buffered."""
    ctypes.CDLL(None).fflush(None)


class _BccError(Exception):
    """Something that bcc could not do."""


@contextmanager
def _bcc_errors() -> Iterator[None]:
    """bcc raises a bare Exception for whatever it cannot do; any other type is a bug."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise _BccError(str(error)) from error


_VERIFIER = "the kernel's BPF verifier refuses"
_UNPROBED = "cannot be probed (notrace, inlined, or kprobes are blocked)"


def _refusal(error: _BccError, said: str, verbose: bool) -> KhoscopeError:
    """Explain bcc's exception, by what it says and what bcc wrote to stderr."""
    text = str(error)
    if "Unable to find kernel headers" in said or "chdir(/lib/modules" in said:
        return KhoscopeError(
            f"no kernel headers: bcc needs them to compile ({platform.release()})",
            "use a kernel with CONFIG_IKHEADERS=y (and tar and xz), or install its headers package",
        )
    unmade = re.search(r"could not open bpf map: (\w+), error: (.*)", said)
    if "super-user" in text or "Operation not permitted" in (unmade[2] if unmade else text):
        return KhoscopeError(
            "the kernel does not let BPF programs in (not permitted)",
            "run khoscope as root, with CAP_BPF and CAP_PERFMON, on a kernel without lockdown",
        )
    if unmade:
        return KhoscopeError(
            f"the kernel does not make the BPF map {unmade[1]} ({unmade[2]})",
            "take a smaller --buffer; see how much memory is free",
        )
    log = "" if verbose else "; -v shows its log"
    if "Failed to load" in text:
        last = [line for line in said.splitlines() if line.strip() and "processed" not in line]
        reason = f": {last[-1].strip()}" if last else ""
        return KhoscopeError(
            f"{_VERIFIER} {text.partition('BPF program ')[2] or text}{reason}{log}",
            "try the other kind of probe (--probe), and please report it with the log",
        )
    if "Failed to attach" in text:
        return KhoscopeError(
            f"the kernel does not attach BPF programs to functions ({text})",
            "try --probe kprobe; see that ftrace is on (/proc/sys/kernel/ftrace_enabled)",
        )
    return KhoscopeError(
        f"bcc cannot compile khoscope's BPF program ({text}){log}",
        "use a bcc that knows this kernel's headers (0.35 is known to work)",
    )


def _recursion_misses(program: Any) -> int:
    """How often the kernel did not run a program because it was already running on that CPU."""
    info = Path(f"/proc/self/fdinfo/{program.fd}").read_text()
    lines = (line.partition(":") for line in info.splitlines())
    return sum(int(value) for name, _, value in lines if name == "recursion_misses")
