# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read the facts of a kernel through drgn: the live one, a vmcore, or a QEMU guest over QMP.

This module does not decide what is right or wrong, and does not depend on a kernel's version: it
asks for types, members and symbols.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Generic, TypeVar

import numpy as np
from drgn import BadDataError, FaultError, Object, Program, TypeKind, offsetof, sizeof
from drgn.helpers.linux.kallsyms import module_kallsyms
from drgn.helpers.linux.mm import follow_phys, page_to_phys, virt_to_phys
from drgn.helpers.linux.module import for_each_module

from .. import __version__
from ..abi.keys import U64, Abi, Finalize, Tracker
from ..abi.kho_fdt import Fdt
from ..abi.serialized import KHO_VMALLOC, unpack
from ..facts.by_address import by_address
from ..facts.clients import Content, Holders, Owner, OwnerKind
from ..facts.columns import Blocks, ChunkByChunk, Columns, Leaves
from ..facts.next_kernel import NextKernel
from ..facts.page_runs import PageRuns
from ..facts.snapshot import Kernel, Provenance, Scan, Side, Snapshot, Watched
from ..facts.status import no_kho
from ..facts.store import Draft
from ..facts.tree import KeySet, Tree
from ..words.errors import KhoscopeError
from . import btf
from .clients import Where, with_clients, with_vm_structs
from .content import memfd_pieces
from .follow import ClientWalker
from .holders import read_holders
from .loaded_image import read_loaded_image
from .open import is_this_host
from .pages import PageLayout, PageReader
from .probe import Overrides as Overrides
from .probe import (
    direct_map,
    page_layout,
    probe,
    probe_abi,
    refuse_platform,
    track_layout,
    use_layout,
)
from .reading import Reading
from .services import read_services
from .track import TrackLayout, leaves_of, walk_chunks, walk_track
from .uses import UseReader
from .walk import READ_SIZE, READS, in_ranges, read_nodes, settle, walk

C = TypeVar("C", bound=Columns | Content)
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """
    Where a program that runs in the kernel finds KHO's data.

    :param pages: ``struct page`` and where they are.
    :param direct_map: virtual address at which physical address 0 is mapped.
    :param tree: virtual address of ``kho_out.radix_tree``; 0: the kernel has another tracker.
    :param root: offset of ``root`` in ``struct kho_radix_tree``.
    :param orders: virtual address of ``orders`` in ``struct kho_mem_track``; 0: the kernel has
        another tracker.
    :param track: how its xarrays are built.
    """

    pages: PageLayout
    direct_map: int
    tree: int
    root: int
    orders: int = 0
    track: TrackLayout | None = None


@dataclass(frozen=True)
class Parameter:
    """
    A parameter of a kernel function.

    :param name: as the kernel's source has it.
    :param size: bytes; the rest of its register may hold anything.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Signature:
    """
    What a kernel function takes and gives back.

    :param is_void: it gives back nothing.
    """

    parameters: tuple[Parameter, ...]
    is_void: bool


#: Called with what is being read, how much of it is done, and the total.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report no progress."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """
    Turn what drgn raises when a kernel cannot be read into a KhoscopeError.

    Missing debug info does not show up here: the probe has already asked for everything.
    """
    try:
        yield
    except (FaultError, BadDataError) as error:
        raise KhoscopeError(
            f"kernel memory cannot be read ({error})",
            "a vmcore must be whole and hold all kernel pages (makedumpfile -d 23 keeps them); "
            "a live kernel may be locked down",
        ) from error
    except btf.BtfError as error:
        raise KhoscopeError(
            f"the kernel's debug info cannot be used ({error})",
            "name the vmlinux of this very kernel by --vmlinux",
        ) from error
    except Exception as error:
        # drgn raises a bare Exception when a QMP server hangs up. Anything else is a bug of ours.
        if not isinstance(error, OSError) and type(error) is not Exception:
            raise
        raise KhoscopeError(
            f"the kernel cannot be read any more ({error})",
            "see whether the guest, or the file, is still there",
        ) from error


class KernelSource:
    """
    A kernel with KHO.

    :param prog: with the kernel's debug info loaded.
    :param label: how it is read, for people.
    :param moves: the kernel runs while it is read.
    :raises KhoscopeError: if the kernel has no KHO that khoscope understands.
    """

    @told()
    def __init__(
        self,
        prog: Program,
        label: str,
        moves: bool,
        overrides: Overrides | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.prog = prog
        self._label = label
        self._moves = moves
        self._progress = progress
        refuse_platform(prog)
        self._parts = probe(prog)
        self._kho_in = prog["kho_in"]
        self._tracker = self._out(self._parts.kho_out.tracker)
        self.enabled = bool(prog["kho_enable"].value_())
        reading = self._begin()
        fdt, _ = reading.root_fdt(self._fdt_phys(reading.finalized()))
        self.abi = probe_abi(prog, self._parts, fdt.compatible, overrides or Overrides())
        self._is_radix = self.abi.tracker == Tracker.RADIX
        pages, mapped = page_layout(prog), direct_map(prog)
        if self._is_radix:
            root = offsetof(prog.type("struct kho_radix_tree"), "root")
            self.layout = Layout(pages, mapped, self._tracker.address_ or 0, root)
        else:
            self._track_layout = track_layout(prog, mapped)
            orders = self._tracker.orders.address_ or 0
            self.layout = Layout(pages, mapped, 0, 0, orders, self._track_layout)

    @told()
    def tree(self) -> Snapshot:
        """
        The outgoing and incoming tree without a look at any struct page.

        :raises KhoscopeError: if KHO is off.
        """
        self._require_kho()
        return self.outline()

    @told()
    def outline(self) -> Snapshot:
        """
        What :meth:`tree` gives, even if KHO is off: then there is no tree.
        """
        return self._outline(self._begin())

    def _outline(self, reading: Reading) -> Snapshot:
        def walk_it() -> Tree:
            return self._walk_outgoing(reading)

        tree = settle(walk_it, lambda _: None)[1] if self._moves else walk_it()
        return self._snapshot(reading, tree, reading.kernel())

    @told()
    def clients(self) -> Snapshot:
        """
        :meth:`outline`, and what the structures of KHO's clients lead to.

        What is in files is read while that is iterated.
        """
        reading = self._begin()
        facts = self._clients(reading)
        return replace(facts, contents=self._contents(reading, facts))

    def _contents(self, reading: Reading, facts: Snapshot) -> Iterable[Content]:
        at = self.abi, reading.ram, reading.read_phys

        def contents() -> Iterator[Content]:
            for side in filter(None, (facts.outgoing, facts.incoming)):
                for session in side.luo.sessions if side.luo is not None else ():
                    for file in session.files:
                        if file.memfd is None:
                            continue
                        yield Content(
                            side is facts.incoming,
                            session.name,
                            file.token,
                            file.memfd.size,
                            memfd_pieces(*at, file.handler, file.data),
                        )

        return _Lazy(contents)

    def _clients(self, reading: Reading) -> Snapshot:
        return self._with_clients(reading, self._outline(reading))

    @told()
    def luo(self) -> Snapshot:
        """
        :meth:`clients`, who holds sessions of LUO and its device, and what systemd keeps for
        services.
        """
        reading = self._begin()
        return self._with_services(self._with_holders(reading, self._clients(reading)))

    @told()
    def scratch(self) -> Snapshot:
        """
        :meth:`clients`, what the scratch areas are used for, and what systemd keeps for services.
        """
        reading = self._begin()
        return self._with_services(self._with_scratch(reading, self._clients(reading)))

    @told()
    def status(self, use: Callable[[Snapshot], T]) -> tuple[Snapshot, T]:
        """
        :meth:`scratch`, what is stamped, and what ``use`` makes of them.

        There are stamps only after a KHO boot: looking for them takes a scan of all struct pages,
        whenever ``use`` iterates them.
        """
        facts = self.scratch()
        if facts.handover.is_kho_boot and self.abi.stamp.has_magic:
            scan = _Scan(self, facts.ram, bare=True)
            facts = replace(facts, stamps=_Lazy(scan.stamps), scan=scan.seen)
        return facts, use(facts)

    def judge(
        self,
        use: Callable[[Snapshot, Snapshot | None], T],
        before: Snapshot | None = None,
        gate: bool = False,
    ) -> tuple[Snapshot, T]:
        """
        All facts that a verdict needs, and what ``use`` makes of them.

        The streams are read while ``use`` iterates them, in order of address, and are not kept.  If
        the tree moves meanwhile, ``use`` is called again: only what it gave last counts.

        :param use: is given the facts, and ``before`` with its blocks in the order of ``watched``.
        :param before: as in :meth:`snapshot`; None: what is stamped is not looked for, either.
        :param gate: also who holds sessions.
        :raises KhoscopeError: if KHO is off.
        """
        with told():
            self._require_comparable(before)
            reading = self._begin()
            kernel = reading.kernel()
            stamps = before is not None

            def read(tree: Tree) -> tuple[Snapshot, T]:
                turned = before
                if before is not None:
                    blocks = _Lazy(functools.partial(by_address, before.outgoing.blocks))
                    turned = replace(before, outgoing=replace(before.outgoing, blocks=blocks))
                facts = self._lazily(reading.attempt(), tree, kernel, turned, stamps)
                if gate:
                    facts = self._with_holders(reading, facts)
                facts = self._with_services(facts, before)
                return facts, use(facts, turned)

            (facts, used), tree = self._settled(reading, read)
            seen = facts.outgoing.tree.state
            if not tree.state.moved and tree.state.problem_count == seen.problem_count:
                return replace(facts, outgoing=replace(facts.outgoing, tree=tree)), used
        # What stood still among what moves is known only after all was read: keep it until then.
        facts = self.snapshot(before, stamps)
        return facts, use(facts, before)

    @told()
    def snapshot(
        self,
        before: Snapshot | None = None,
        stamps: bool = True,
        file: IO[bytes] | None = None,
        contents: bool = False,
    ) -> Snapshot:
        """
        All facts, read once and kept.

        :param before: also look at the pages of the blocks that this snapshot recorded.
        :param stamps: also look for stamps, which takes a scan of all struct pages; of no use in a
            kernel whose stamps have no magic.
        :param file: becomes a snapshot file, and is what the facts are kept in, as :class:`Draft`
            has it; None: a temporary file is.
        :param contents: also what is in the memfds that LUO preserves.
        :raises KhoscopeError: if KHO is off.
        """
        self._require_comparable(before)
        reading = self._begin()
        kernel = reading.kernel()

        with Draft(file) as draft:

            def read(tree: Tree) -> Snapshot:
                facts = self._lazily(reading.attempt(), tree, kernel, before, stamps)
                if contents:
                    facts = replace(facts, contents=self._contents(reading, facts))
                draft.put(facts)
                return facts

            facts, tree = self._settled(reading, read)
            facts = self._with_services(self._with_holders(reading, facts), before)
            kept = draft.finish(replace(facts, outgoing=replace(facts.outgoing, tree=tree)))
            if not tree.state.moved:
                return kept
            # Do not judge blocks that came or went meanwhile: their pages were in motion.
            stood = KeySet(self.abi, tree.leaves)
            every = kept.outgoing.blocks
            blocks = _Lazy(lambda: filter(len, (part[stood.contains(part.key)] for part in every)))
            outgoing = replace(kept.outgoing, tree=tree, blocks=blocks)
            return draft.copy(replace(kept, outgoing=outgoing))

    def _settled(self, reading: Reading, read: Callable[[Tree], T]) -> tuple[T, Tree]:
        """What ``read`` makes of the tree, and the tree, as :func:`settle` has them."""

        def walk_it() -> Tree:
            return self._walk_outgoing(reading)

        if self._moves:
            return settle(walk_it, read)
        tree = walk_it()
        return read(tree), tree

    def _require_comparable(self, before: Snapshot | None) -> None:
        self._require_kho()
        if before is not None and before.abi.page_shift != self.abi.page_shift:
            raise KhoscopeError(
                f"the earlier snapshot has {before.abi.page_size} byte pages, "
                f"this kernel has {self.abi.page_size}",
                "compare with a snapshot of the kernel that handed over",
            )

    def _lazily(
        self,
        reading: Reading,
        tree: Tree,
        kernel: Kernel,
        before: Snapshot | None,
        stamps: bool,
    ) -> Snapshot:
        """
        All facts, on the strength of a tree.  Streams of blocks are read anew whenever they are
        iterated: those of the tree in order of address, those of ``before`` in its order.
        """
        pages = self._page_reader(reading.ram)
        facts = self._with_clients(reading, self._snapshot(reading, tree, kernel))
        facts = self._with_scratch(reading, facts)
        outgoing = self._with_vm_structs(reading, facts)

        def read(what: str, of: Tree) -> Callable[[Blocks], Blocks]:
            done = self._counter(what, sum(int(leaves.counts().sum()) for leaves in of.leaves))

            def with_pages(part: Blocks) -> Blocks:
                done(len(part))
                return pages.with_pages(part)

            return with_pages

        blocks = _Lazy(lambda: map(read("checking blocks", tree), tree.by_address(self.abi)))
        facts = replace(facts, outgoing=replace(outgoing, blocks=blocks))
        # Without a magic, there is nothing to look for.
        if stamps and self.abi.stamp.has_magic:
            scan = _Scan(self, reading.ram)
            facts = replace(facts, stamps=_Lazy(scan.stamps), scan=scan.seen)
        if before is not None:
            recorded = before.outgoing
            facts = replace(
                facts,
                watching=Watched(before.taken.time, before.kernel.boot_id),
                watched=ChunkByChunk(
                    recorded.blocks, read("looking at recorded blocks", recorded.tree)
                ),
                evidence=[*self._leaves_now(reading, before.abi, recorded.tree)],
            )
        return replace(facts, unreadable=list(reading.unreadable))

    @told()
    def vmalloc(self, address: int) -> Snapshot:
        """
        :meth:`outline`, and a single ``struct kho_vmalloc`` in place of the outgoing side's
        clients.

        :param address: physical, or kernel virtual.
        :raises KhoscopeError: if nothing can be read there.
        """
        reading = self._begin()
        facts = self._outline(reading)
        following = ClientWalker(self.abi, reading.ram, reading.read_phys)
        try:
            phys = self._physical(address)
            desc = unpack(KHO_VMALLOC, self.prog.read(phys, KHO_VMALLOC.itemsize, physical=True))
        except FaultError as error:
            raise KhoscopeError(
                f"{address:#x}: there is no memory to read ({error})",
                "give the physical or kernel virtual address of a struct kho_vmalloc",
            ) from error
        following.vmalloc(desc, phys, Owner(OwnerKind.VMALLOC_PAGE, f"{address:#x}"))
        outgoing = replace(
            facts.outgoing,
            vmallocs=following.vmallocs,
            owners=following.owners,
            claims=following.claims(),
        )
        return replace(facts, outgoing=outgoing)

    @told()
    def radix_tree(self, where: str) -> Tree:
        """
        Any ``struct kho_radix_tree``, KHO's or another user's, read until it settles.

        :param where: a symbol, with members if need be (``kho_out.radix_tree``), the virtual
            address of the tree, or the physical one of its root node.
        :raises KhoscopeError: if there is no such tree.
        """
        if not self._is_radix:
            raise KhoscopeError(
                f"this kernel has no radix trees: it keeps preserved memory in {self.abi.tracker}",
                "leave --root out",
            )
        root = self._root_of(where)
        reading = self._begin()

        def read() -> Tree:
            return walk(self.abi, root(), reading.ram, reading.read_phys)

        return settle(read, lambda _: None)[1] if self._moves else read()

    def _root_of(self, where: str) -> Callable[[], int]:
        """A function that reads the physical address of a tree's root node."""
        try:
            address = int(where, 0)
        except ValueError:
            tree = self._named_tree(where)
        else:
            if address < 1 << 63:
                return lambda: address
            tree = Object(self.prog, "struct kho_radix_tree", address=address)
        return lambda: self.phys(tree.root)

    def _named_tree(self, where: str) -> Object:
        name, *members = where.split(".")
        try:
            # Debug info may know only the symbol but not its type, as for a module's variables.
            found = (
                self.prog[name]
                if name in self.prog
                else Object(self.prog, "struct kho_radix_tree", address=self._address(name))
            )
            for member in members:
                found = found.member_(member)
        except (LookupError, TypeError) as error:
            raise KhoscopeError(
                f"{where}: {error}", "give the name or address of a struct kho_radix_tree"
            ) from error
        type_ = found.type_
        if type_.kind == TypeKind.POINTER:
            found, type_ = found[0], type_.type
        if type_.type_name() != "struct kho_radix_tree":
            raise KhoscopeError(
                f"{where} is a {type_.type_name()}, not a struct kho_radix_tree",
                "name its member that is one: kho_out.radix_tree",
            )
        return found

    def _address(self, name: str) -> int:
        """The address of a symbol of the kernel or of one of its modules."""
        try:
            return self.prog.symbol(name).address
        except LookupError:
            for module in for_each_module(self.prog):
                for symbol in module_kallsyms(module):
                    if symbol.name == name:
                        return symbol.address
            raise

    def _physical(self, address: int) -> int:
        """The physical address of a physical or kernel virtual address."""
        if address < 1 << 63:
            return address
        return int(follow_phys(self.prog["init_mm"].address_of_(), address).value_())

    def stamps(self) -> Iterator[Blocks]:
        """
        Every stamped page; a scan of all struct pages.

        :raises KhoscopeError: if this kernel's stamps have no magic.
        """
        if not self.abi.stamp.has_magic:
            raise KhoscopeError(
                "the stamps of this kernel are an order alone, and cannot be searched for",
                "compare it with a snapshot of the kernel before it: khoscope verify --before",
            )
        return _Scan(self, self._begin().ram, bare=True).stamps()

    def pages(self, start: int, end: int) -> Iterator[PageRuns]:
        """The struct pages of the pfns [start, end), window by window, each a row."""
        with told():
            yield from self._page_reader(self._begin().ram).pages(start, end)

    @told()
    def signature(self, function: str) -> Signature | None:
        """
        What a kernel function takes and gives back; None: there is no such function that could be
        probed.
        """
        try:
            self.prog.symbol(function)
            type_ = self.prog.function(function).type_
        except LookupError:
            # No symbol: the compiler has inlined the function, or made another one of it.
            return None
        parameters = (Parameter(each.name or "", sizeof(each.type)) for each in type_.parameters)
        return Signature(tuple(parameters), type_.type.kind == TypeKind.VOID)

    @told()
    def loaded_image(self) -> NextKernel:
        """
        The kernel that the next kexec starts, from the image that is loaded.

        :raises KhoscopeError: if none is loaded, or it is none that khoscope can read.
        """
        reading = self._begin()
        return read_loaded_image(
            self.prog, self._parts, reading.ram, reading.read_phys, self._moves
        )

    @told()
    def has_kho(self) -> bool:
        """Whether KHO is on in this kernel, and set up: whether it would hand anything over."""
        there = self._tracker.root if self._is_radix else self._out(self._parts.kho_out.fdt)
        return self.enabled and bool(there)

    def _require_kho(self) -> None:
        if not self.has_kho():
            raise no_kho(self.outline(), f"kho_out has no {'tree' if self._is_radix else 'FDT'}")

    def _out(self, path: str) -> Object:
        """A member of ``kho_out``, or of one of its members."""
        found = self.prog["kho_out"]
        for member in path.split("."):
            found = found.member_(member)
        return found

    def _fdt_phys(self, finalized: bool | None) -> int:
        """
        Where the outgoing root FDT is; 0: nowhere.

        :param finalized: :attr:`Snapshot.finalized`.  Where finalizing writes the FDT, its page
            holds anything before that, and afterwards what nobody took back: kho_abort() does not.
        """
        if not finalized and self._parts.kho_out.finalize == Finalize.BEFORE_LOAD:
            return 0
        fdt = self._out(self._parts.kho_out.fdt)
        if fdt.type_.type_name() == "struct page *":
            return int(page_to_phys(fdt).value_()) if fdt else 0
        return self.phys(fdt)

    def _begin(self) -> Reading:
        """Begin a new reading: RAM comes and goes, and so do faults."""
        return Reading.begin(self.prog, self._parts)

    def _page_reader(self, ram: U64) -> PageReader:
        end = int(ram[-1, 1]) >> self.abi.page_shift
        return PageReader(self.abi, self.layout.pages, self._read_virt, end)

    def _snapshot(self, reading: Reading, tree: Tree, kernel: Kernel) -> Snapshot:
        finalized = reading.finalized()
        fdt, blobs = reading.fdt(self._fdt_phys(finalized), outgoing=True)
        abi = self.abi
        if abi.finalize == Finalize.BEFORE_LOAD:
            # It comes and goes with finalizing, while this source may be in use.
            abi = replace(abi, compatible=fdt.compatible)
        chunks = self._chunks(reading, fdt) if finalized else None
        scratch = reading.scratch(self.enabled)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Snapshot(
            Provenance(__version__, now.replace("+00:00", "Z"), self._label),
            kernel,
            abi,
            self.enabled,
            reading.handover(),
            reading.ram,
            scratch,
            Side(fdt, tree, blobs, serialized=chunks),
            self._incoming(reading),
            image=reading.image(),
            liveupdate=reading.liveupdate(),
            offline=reading.offline(),
            nodes=reading.nodes(),
            crash_image=reading.crash_image(),
            unreadable=list(reading.unreadable),
            finalized=finalized,
            scratch_setup=reading.scratch_setup(),
            memory=reading.memory(scratch),
        )

    def _chunks(self, reading: Reading, fdt: Fdt) -> Tree:
        """The chain that is handed over."""
        path = self._parts.kho_out.chunks
        # Where the kernel has no pointer of its own, the FDT has the only one.
        first = (fdt.memory_map or 0) if path is None else self.phys(self._out(path))
        return walk_chunks(self.abi, first, reading.ram, reading.read_phys)

    def _incoming(self, reading: Reading) -> Side | None:
        phys = reading.incoming_fdt()
        if not phys:
            return None
        fdt, blobs = reading.fdt(phys, outgoing=False)
        # The tree's pages went back to the page allocator after the boot, so a second read cannot
        # agree.
        root = reading.fact(
            "the root of the incoming tree (kho_in)", lambda: self._incoming_root(fdt), 0
        )
        walk_it = walk if self._is_radix else walk_chunks
        return Side(fdt, walk_it(self.abi, root, reading.ram, reading.read_phys), blobs)

    def _incoming_root(self, fdt: Fdt) -> int:
        """
        Where the kernel found the tree; before linux 7.3 it did not keep the address, so take it
        from the FDT.
        """
        if self._parts.incoming_tree:
            return self.phys(self._kho_in.radix_tree.root)
        return fdt.memory_map or 0

    def _with_clients(self, reading: Reading, facts: Snapshot) -> Snapshot:
        at = self._where(reading)
        outgoing, incoming = facts.outgoing, facts.incoming
        outgoing, unread = with_clients(at, outgoing, None)
        for what in unread:
            reading.cannot(f"{what} (outgoing)")
        if incoming is not None:
            incoming, unread = with_clients(at, incoming, outgoing)
            for what in unread:
                reading.cannot(f"{what} (incoming)")
        return replace(
            facts, outgoing=outgoing, incoming=incoming, unreadable=list(reading.unreadable)
        )

    def _with_holders(self, reading: Reading, facts: Snapshot) -> Snapshot:
        """
        The same with who holds sessions and the device, if there is LUO.

        While the kernel runs, a session may be handed from one process to another: khoscope looks
        again, READS times at most, until each outgoing session has a holder.
        """
        state, luo = facts.liveupdate, facts.outgoing.luo
        if state is None:
            return facts
        sessions = {session.name for session in luo.sessions} if luo else set()
        holders = Holders()
        for _ in range(READS if self._moves else 1):
            holders = read_holders(self._where(reading), self.layout.direct_map)
            if sessions <= {held.session for each in holders.processes for held in each.held}:
                break
        return replace(facts, liveupdate=replace(state, holders=holders))

    def _with_services(self, facts: Snapshot, before: Snapshot | None = None) -> Snapshot:
        """
        The same with what systemd keeps for services, if this is the host, and LUO is on.

        :param before: where LUO is off, what that kernel's systemd kept is lost, and is missing.
        """
        state = facts.liveupdate
        is_on = state is not None and state.enabled
        was_asked = before is not None and before.services is not None
        if not (is_on or was_asked) or not is_this_host(self.prog):
            return facts
        return replace(facts, services=read_services())

    def _with_vm_structs(self, reading: Reading, facts: Snapshot) -> Side:
        at = self._where(reading)
        outgoing, unread = with_vm_structs(at, self.layout.pages, facts.outgoing)
        for what in unread:
            reading.cannot(what)
        return outgoing

    def _where(self, reading: Reading) -> Where:
        ram, read = reading.ram, reading.read_phys
        return Where(self.prog, self._parts, self.abi, ram, read, self._moves)

    def _walk_outgoing(self, reading: Reading) -> Tree:
        ram, read = reading.ram, reading.read_phys
        if self._is_radix:
            return walk(self.abi, self.phys(self._tracker.root), ram, read)
        orders = self._tracker.orders
        head = orders.xa_head.value_()
        # It is a variable of the kernel's, and not in the direct map.
        root = self._physical(orders.address_)
        return walk_track(self.abi, self._track_layout, root, head, ram, read)

    def _leaves_now(self, reading: Reading, recorded_abi: Abi, recorded: Tree) -> Iterator[Leaves]:
        """What memory holds now where the leaves of another kernel's tree were."""
        lost = 0
        size = recorded_abi.bitmap_bytes
        for nodes in recorded.nodes:
            # The addresses come from a file: check them.
            end = nodes.phys + np.uint64(size)
            sound = in_ranges(reading.ram, nodes.phys, end) & (nodes.phys % np.uint64(size) == 0)
            every = nodes[(nodes.level == 0) & (nodes.used > 0) & sound]
            # Bitmaps that make up one leaf must not be told apart.
            step = READ_SIZE // size if size == recorded_abi.page_size else len(every) + 1
            for part in (every[at : at + step] for at in range(0, len(every), step)):
                found = list(read_nodes(reading.read_phys, part.phys, size))
                lost += len(part) - sum(len(rows) for rows, _ in found)
                for rows, raw in found:
                    yield leaves_of(recorded_abi, part.key[rows], raw, empty=True)
        if lost:
            reading.cannot(f"{lost:,} of the pages where the earlier snapshot's leaves were")

    def _with_scratch(self, reading: Reading, facts: Snapshot) -> Snapshot:
        """The same with what each scratch area is used for."""
        # A corrupt area may reach beyond RAM: read nothing there.
        last, shift = int(facts.ram[-1, 1]), self.abi.page_shift
        areas = [(phys, max(min(phys + size, last), phys)) for phys, size in facts.scratch.tolist()]
        if sum(end - phys for phys, end in areas) > last:
            reading.cannot("what scratch is used for: its areas are larger than RAM")
            return replace(facts, unreadable=list(reading.unreadable))
        reader = UseReader(
            self._page_reader(facts.ram),
            use_layout(self.prog),
            facts.kernel.page_types,
            self._moves,
            self._counter("looking at scratch", sum(end - phys for phys, end in areas) >> shift),
        )
        free: list[int | None] = []
        uses = []
        for phys, end in areas:
            count, use = reader.uses(phys >> shift, end >> shift)
            free.append(None if use.unread else count)
            if facts.memory is not None:
                blocks = reading.page_blocks(phys, end - phys, facts.memory.block_order)
                use = replace(use, blocks=blocks)
            uses.append(use)
        return replace(
            facts, scratch_free=free, scratch_use=uses, unreadable=list(reading.unreadable)
        )

    def _counter(self, what: str, total: int) -> Callable[[int], None]:
        """Reports progress when it is told how much more is done."""
        done = _Count()

        def count(more: int) -> None:
            done.value += more
            self._progress(what, done.value, total)

        return count

    def phys(self, pointer: Object) -> int:
        return int(virt_to_phys(pointer).value_()) if pointer else 0

    def _read_virt(self, address: int, size: int) -> bytes | None:
        try:
            return self.prog.read(address, size)
        except FaultError:
            return None


@dataclass
class _Count:
    """A number that is known only after a stream was read."""

    value: int = 0


@dataclass
class _Lazy(Generic[C]):
    """A stream that reads the kernel anew at each iteration."""

    make: Callable[[], Iterator[C]]

    def __iter__(self) -> Iterator[C]:
        return self.make()


class _Scan:
    """
    The stamp scan of a source.

    :param bare: without a look at the struct pages of the stamped blocks.
    """

    def __init__(self, source: KernelSource, ram: U64, bare: bool = False) -> None:
        self._source = source
        self._ram = ram
        self._bare = bare
        self._pages = source._page_reader(ram)
        self.seen = Scan()

    def stamps(self) -> Iterator[Blocks]:
        self.seen.scanned = self.seen.unread = 0
        return self._pages.stamps(self._ram, self._count, self._bare)

    def _count(self, pages: int) -> None:
        if pages > 0:
            self.seen.scanned += pages
        else:
            self.seen.unread -= pages
        total = int((self._ram[:, 1] - self._ram[:, 0]).sum())
        self._source._progress(
            "scanning struct pages",
            self.seen.scanned + self.seen.unread,
            total >> self._source.abi.page_shift,
        )
