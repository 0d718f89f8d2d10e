# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Read the facts of a kernel through drgn: the live one, a vmcore, or a QEMU guest over QMP.

Nothing here decides what is right or wrong, and nothing depends on a kernel's version: types,
members and symbols are asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, Generic, TypeVar

import numpy as np
from drgn import FaultError, Object, Program, Type, TypeKind, cast, offsetof, sizeof
from drgn.helpers.linux.ioport import for_each_resource
from drgn.helpers.linux.kallsyms import module_kallsyms
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import follow_phys, phys_to_virt, virt_to_phys
from drgn.helpers.linux.mmzone import for_each_online_pgdat
from drgn.helpers.linux.module import for_each_module
from drgn.helpers.linux.printk import get_printk_records

from .. import __version__, btf, budget
from ..abi import COMPATIBLES_WITHOUT_TYPES, POSTED_TYPE_SHIFT, U64, Abi, Stamp
from ..clients import Kind, Liveupdate, Owner
from ..columns import Blocks, Columns, Leaves
from ..errors import KhoscopeError
from ..fdt import parse_root_fdt
from ..runs import PageRuns, Seen
from ..serialized import KHO_VMALLOC, one
from ..snapshot import (
    Fdt,
    Handover,
    Kernel,
    KexecImage,
    KeySet,
    Scan,
    Side,
    Snapshot,
    Taken,
    Tree,
    Watched,
)
from ..store import spool
from .clients import with_clients, with_vm_structs
from .follow import Following
from .pages import PageLayout, PageReader
from .walk import READ_SIZE, READS, in_ranges, settle, walk

#: ``IORESOURCE_SYSTEM_RAM`` (include/linux/ioport.h, a #define).
IORESOURCE_SYSTEM_RAM: Final = 0x01000000
#: More scratch areas than nodes any kernel supports (MAX_NUMNODES is 1024): a corrupt count.
SCRATCH_LIMIT: Final = 1 << 12
#: More file handlers than any kernel has: a corrupt list.
HANDLER_LIMIT: Final = 1 << 8

#: What a kernel says when KHO or the page allocator finds something broken.
TROUBLE = re.compile(
    r"KHO: .*(fail|disabl|incompatib|invalid|broken|too small|not supported)"
    r"|Bad page state|page dumped because"
    r"|(WARNING|kernel BUG).*(kexec_handover|kho_)",
    re.IGNORECASE,
)
#: Lines of it that are kept.
TROUBLE_KEPT: Final = 64

C = TypeVar("C", bound=Columns)


@dataclass(frozen=True)
class Layout:
    """
    Where a program that runs in the kernel finds what KHO is about.

    :param pages: ``struct page`` and where they are.
    :param direct_map: virtual address at which physical address 0 is mapped.
    :param tree: virtual address of ``kho_out.radix_tree``.
    :param root: offset of ``root`` in ``struct kho_radix_tree``.
    """

    pages: PageLayout
    direct_map: int
    tree: int
    root: int


#: Told what is being read, how far it is, and of how much.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Overrides:
    """
    What the user knows better than the kernel's debug info.

    :param type_shift: key bit of the page type; -1: the kernel has no types.
    """

    type_shift: int | None = None


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn what drgn raises when a kernel cannot be read into a KhoscopeError."""
    try:
        yield
    except FaultError as error:
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
    except (LookupError, AttributeError) as error:
        raise KhoscopeError(
            f"the kernel's debug info lacks what khoscope needs ({error})",
            "name the vmlinux of this very kernel, with DWARF, by --vmlinux",
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
        self._unreadable: list[str] = []
        try:
            self._kho_out = prog["kho_out"]
            self._kho_in = prog["kho_in"]
        except KeyError:
            raise KhoscopeError(
                "this kernel has no kexec handover (no kho_out in its debug info)",
                "boot a kernel that was built with CONFIG_KEXEC_HANDOVER=y",
            ) from None
        try:
            self._tree = self._kho_out.radix_tree
        except AttributeError:
            raise KhoscopeError(
                "this kernel's KHO is older than the radix tree (no kho_out.radix_tree)",
                "use a kernel that keeps preserved memory in a struct kho_radix_tree",
            ) from None
        self.enabled = bool(prog["kho_enable"].value_())
        self.ram = self._read_ram()
        fdt, _ = self._read_fdt(self.phys(self._kho_out.fdt))
        self.abi = probe_abi(prog, fdt.compatible, overrides or Overrides())
        ram_end = int(self.ram[-1, 1]) >> self.abi.page_shift
        self.layout = Layout(
            page_layout(prog),
            int(phys_to_virt(prog, 0).value_()),
            self._tree.address_ or 0,
            offsetof(prog.type("struct kho_radix_tree"), "root"),
        )
        self._pages = PageReader(self.abi, self.layout.pages, self._read_virt, ram_end)

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
        What :meth:`tree` gives, whether KHO is on or off: without it, there is no tree.
        """
        if self._moves:
            _, tree = settle(self._walk_outgoing, lambda _: None)
        else:
            tree = self._walk_outgoing()
        return self._snapshot(tree, self._kernel())

    @told()
    def clients(self) -> Snapshot:
        """:meth:`outline`, and what the structures of KHO's clients lead to."""
        return self._with_clients(self.outline())

    @told()
    def status(self) -> Snapshot:
        """
        :meth:`clients`, how full scratch is, and what is stamped, which can be only after a KHO
        boot: looking for it takes a scan of all struct pages.
        """
        facts = replace(self.clients(), scratch_free=self._scratch_free())
        if not facts.handover.is_kho_boot:
            return facts
        scan = _Scan(self)
        facts = spool(replace(facts, stamps=_Lazy(scan.stamps)))
        return replace(facts, scan=scan.result())

    @told()
    def snapshot(self, before: Snapshot | None = None, stamps: bool = True) -> Snapshot:
        """
        All facts, read once and kept.

        :param before: also look at the pages of the blocks that this snapshot recorded.
        :param stamps: also look for stamps, which takes a scan of all struct pages.
        :raises KhoscopeError: if KHO is off.
        """
        self._require_kho()
        if before is not None and before.abi.page_shift != self.abi.page_shift:
            raise KhoscopeError(
                f"the earlier snapshot has {before.abi.page_size} byte pages, "
                f"this kernel has {self.abi.page_size}",
                "compare with a snapshot of the kernel that handed over",
            )
        kernel = self._kernel()
        scan = _Scan(self)

        def read(tree: Tree) -> Snapshot:
            facts = self._with_clients(self._snapshot(tree, kernel))
            outgoing = with_vm_structs(self.prog, self.abi, self.layout.pages, facts.outgoing)
            blocks = _Lazy(lambda: map(self._pages.with_pages, tree.blocks(self.abi)))
            facts = replace(
                facts,
                outgoing=replace(outgoing, blocks=blocks),
                stamps=_Lazy(scan.stamps) if stamps else (),
                scratch_free=self._scratch_free(),
            )
            if before is not None:
                recorded = before.outgoing.tree
                watched = _Lazy(lambda: map(self._pages.with_pages, recorded.blocks(before.abi)))
                facts = replace(
                    facts,
                    watching=Watched(before.taken.time, before.kernel.boot_id),
                    watched=watched,
                    evidence=_Lazy(lambda: self._leaves_now(recorded)),
                )
            return replace(spool(facts), scan=scan.result() if stamps else None)

        if not self._moves:
            return read(self._walk_outgoing())
        facts, tree = settle(self._walk_outgoing, read)
        outgoing = replace(facts.outgoing, tree=tree)
        if tree.state.moved:
            # Blocks that came or went meanwhile are not judged: their pages were in motion.
            stood = KeySet(self.abi, tree.leaves)
            every = facts.outgoing.blocks
            outgoing = replace(
                outgoing,
                blocks=_Lazy(
                    lambda: filter(len, (part[stood.contains(part.key)] for part in every))
                ),
            )
        return replace(facts, outgoing=outgoing)

    @told()
    def vmalloc(self, address: int) -> Snapshot:
        """
        :meth:`outline`, and of the outgoing side's clients one ``struct kho_vmalloc`` alone.

        :param address: physical, or kernel virtual.
        :raises KhoscopeError: if nothing can be read there.
        """
        facts = self.outline()
        following = Following(self.abi, self.ram, self.read_phys)
        try:
            phys = self._physical(address)
            desc = one(KHO_VMALLOC, self.prog.read(phys, KHO_VMALLOC.itemsize, physical=True))
        except FaultError as error:
            raise KhoscopeError(
                f"{address:#x}: there is no memory to read ({error})",
                "give the physical or kernel virtual address of a struct kho_vmalloc",
            ) from error
        following.vmalloc(desc, phys, Owner(Kind.VMALLOC_PAGE, f"{address:#x}"))
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
        Any ``struct kho_radix_tree``, of KHO or of whoever else uses one, read until it settles.

        :param where: a symbol, with members if need be (``kho_out.radix_tree``), the virtual
            address of the tree, or the physical one of its root node.
        :raises KhoscopeError: if there is no such tree.
        """
        root = self._root_of(where)

        def read() -> Tree:
            return walk(self.abi, root(), self.ram, self.read_phys)

        return settle(read, lambda _: None)[1] if self._moves else read()

    def _root_of(self, where: str) -> Callable[[], int]:
        """What reads the physical address of a tree's root node."""
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
            # A kernel's debug info may know the symbol alone: of a module's it does.
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
        """Where a symbol is, of the kernel or of one of its modules."""
        try:
            return self.prog.symbol(name).address
        except LookupError:
            for module in for_each_module(self.prog):
                for symbol in module_kallsyms(module):
                    if symbol.name == name:
                        return symbol.address
            raise

    def _physical(self, address: int) -> int:
        """Where a physical or kernel virtual address is."""
        if address < 1 << 63:
            return address
        return int(follow_phys(self.prog["init_mm"].address_of_(), address).value_())

    def stamps(self) -> Iterator[Blocks]:
        """Every stamped page; a scan of all struct pages."""
        return _Scan(self).stamps()

    def pages(self, start: int, end: int) -> Iterator[PageRuns]:
        """The struct pages of the pfns [start, end), window by window, each a row."""
        with told():
            yield from self._pages.pages(start, end)

    def scratch(self) -> U64:
        """``kho_scratch``: u64, shape (n, 2), address and size of each area."""
        count = self.prog["kho_scratch_cnt"].value_()
        areas = self.prog["kho_scratch"]
        if not areas or count > SCRATCH_LIMIT:
            return np.zeros((0, 2), np.uint64)
        found = [(areas[i].addr.value_(), areas[i].size.value_()) for i in range(count)]
        return np.array(found, np.uint64).reshape(-1, 2)

    @told()
    def arguments(self, function: str) -> int | None:
        """How many arguments a kernel function has; None: there is none that could be probed."""
        try:
            self.prog.symbol(function)
            return len(self.prog.function(function).type_.parameters or ())
        except LookupError:
            # No symbol: the compiler has inlined it, or made another one of it.
            return None

    def _require_kho(self) -> None:
        if not self.enabled or not self._tree.root:
            raise KhoscopeError(
                "KHO is off in this kernel (kho_enable is false or kho_out has no tree)",
                "boot it with kho=on",
            )

    def _snapshot(self, tree: Tree, kernel: Kernel) -> Snapshot:
        fdt, blobs = self._read_fdt(self.phys(self._kho_out.fdt))
        kho_in = self._kho_in
        came_from = Handover(
            bool(kho_in.fdt_phys),
            kho_in.previous_release.string_().decode("ascii", "backslashreplace"),
            kho_in.kexec_count.value_(),
        )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Snapshot(
            Taken(__version__, now.replace("+00:00", "Z"), self._label),
            kernel,
            self.abi,
            self.enabled,
            came_from,
            self.ram,
            self.scratch(),
            Side(fdt, tree, blobs),
            self._incoming(),
            image=self._image(),
            liveupdate=self._liveupdate(),
            unreadable=list(dict.fromkeys(self._unreadable)),
        )

    def _incoming(self) -> Side | None:
        phys = self._kho_in.fdt_phys.value_()
        if not phys:
            return None
        fdt, blobs = self._read_fdt(phys)
        # Its pages went back to the page allocator after the boot: no second look can agree.
        tree = walk(self.abi, self._incoming_root(fdt), self.ram, self.read_phys)
        return Side(fdt, tree, blobs)

    def _incoming_root(self, fdt: Fdt) -> int:
        """Where the kernel found the tree; before linux 7.3 it did not keep what the FDT says."""
        try:
            return self.phys(self._kho_in.radix_tree.root)
        except AttributeError:
            return fdt.memory_map or 0

    def _with_clients(self, facts: Snapshot) -> Snapshot:
        def of(side: Side, outgoing: bool) -> Side:
            return with_clients(self.prog, self.abi, self.ram, self.read_phys, side, outgoing)

        incoming = None if facts.incoming is None else of(facts.incoming, False)
        return replace(facts, outgoing=of(facts.outgoing, True), incoming=incoming)

    def _walk_outgoing(self) -> Tree:
        return walk(self.abi, self.phys(self._tree.root), self.ram, self.read_phys)

    def _leaves_now(self, recorded: Tree) -> Iterator[Leaves]:
        """What stands where the leaves of another kernel's tree stood."""
        for nodes in recorded.nodes:
            # The addresses come out of a file.
            size = np.uint64(self.abi.page_size)
            sound = in_ranges(self.ram, nodes.phys, nodes.phys + size) & (nodes.phys % size == 0)
            every = nodes[(nodes.level == 0) & (nodes.used > 0) & sound]
            step = READ_SIZE // self.abi.page_size
            for leaves in (every[at : at + step] for at in range(0, len(every), step)):
                pages = [self.read_phys(phys, self.abi.page_size) for phys in leaves.phys.tolist()]
                read = np.array([page is not None for page in pages])
                if not read.any():
                    continue
                raw = b"".join(page for page in pages if page is not None)
                yield Leaves(leaves.key[read], np.frombuffer(raw, np.uint8).reshape(sum(read), -1))

    def _scratch_free(self) -> list[int | None]:
        """Pages of each scratch area that the buddy allocator holds; None: they cannot be read."""
        # Nothing of a corrupt area beyond RAM.
        end = int(self.ram[-1, 1])
        return [self._free(at, min(at + size, end)) for at, size in self.scratch().tolist()]

    def _free(self, start: int, end: int) -> int | None:
        shift = self.abi.page_shift
        free = 0
        for pages in self.pages(start >> shift, end >> shift):
            if (pages.seen != Seen.READ).any():
                return None
            free += int((pages.buddy != PageRuns.ALLOCATED).sum())
        return free

    def _image(self) -> KexecImage | None:
        """``kexec_image``; None: this kernel has none of its members that KHO is about."""
        try:
            image = self.prog["kexec_image"]
            if not image:
                return KexecImage(False)
            known = min(image.nr_segments.value_(), image.segment.type_.length or 0)
            return KexecImage(
                True,
                bool(image.file_mode),
                image.kho.fdt.value_(),
                sum(image.segment[i].memsz.value_() for i in range(known)),
            )
        except (KeyError, AttributeError):
            return None
        except FaultError:
            self._unreadable.append("the loaded kexec image (kexec_image)")
            return None

    def _liveupdate(self) -> Liveupdate | None:
        """``luo_global`` and the file handlers; None: this kernel has no LUO."""
        try:
            enabled = bool(self.prog["luo_global"].enabled)
            handlers = self.prog["luo_file_handler_list"].address_of_()
        except (KeyError, AttributeError):
            return None
        listed = list_for_each_entry("struct liveupdate_file_handler", handlers, "list")
        return Liveupdate(
            enabled,
            [
                handler.compatible.string_().decode("ascii", "backslashreplace")
                for handler in islice(listed, HANDLER_LIMIT)
            ],
        )

    def _kernel(self) -> Kernel:
        uts = self.prog["init_uts_ns"].name
        boot_id = uuid.UUID(bytes=bytes(self.prog["sysctl_bootid"].value_()))
        log: list[str] = []
        for record in get_printk_records(self.prog):
            text = record.text.decode("utf-8", "backslashreplace")
            if TROUBLE.search(text) and len(log) < TROUBLE_KEPT:
                log.append(text)
        flags = self.prog.type("enum pageflags").enumerators or ()
        names: dict[int, str] = {}
        for flag in flags:
            names.setdefault(flag.value, flag.name.removeprefix("PG_"))
        last = self.prog["__NR_PAGEFLAGS"].value_()
        return Kernel(
            uts.release.string_().decode(),
            uts.version.string_().decode(),
            str(boot_id) if boot_id.int else None,
            self.prog["tainted_mask"].value_(),
            log,
            [names.get(bit, "") for bit in range(last)],
            {
                value: name.removeprefix("PGTY_")
                for name, value in _enumerators(self.prog, "enum pagetype").items()
            },
            self.prog["saved_command_line"].string_().decode("utf-8", "backslashreplace"),
        )

    def _read_ram(self) -> U64:
        """
        System RAM from ``iomem_resource``, adjacent ranges joined.

        Resources are in the kernel's heap, of which vmcores may lack pages: then what nodes span,
        with the holes in it.
        """
        try:
            ranges = sorted(
                (resource.start.value_(), resource.end.value_() + 1)
                for resource in for_each_resource(self.prog["iomem_resource"].address_of_())
                if resource.flags.value_() & IORESOURCE_SYSTEM_RAM
            )
        except FaultError:
            self._unreadable.append(
                "where RAM is (iomem_resource): what nodes span is taken for it"
            )
            ranges = sorted(self._node_spans())
        joined: list[tuple[int, int]] = []
        for start, end in ranges:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        if not joined:
            raise KhoscopeError(
                "this kernel lists no System RAM in iomem_resource",
                "check that the debug info belongs to this kernel",
            )
        return np.array(joined, np.uint64)

    def _node_spans(self) -> Iterator[tuple[int, int]]:
        """First and last-plus-one physical address of each NUMA node."""
        shift = self.prog["PAGE_SHIFT"].value_()
        for node in for_each_online_pgdat(self.prog):
            first, pages = node.node_start_pfn.value_(), node.node_spanned_pages.value_()
            if pages:
                yield first << shift, first + pages << shift

    def _read_fdt(self, phys: int) -> tuple[Fdt, dict[str, bytes]]:
        """A root FDT and the blobs: itself as "fdt", subtrees by name as far as readable."""
        if not phys:
            return Fdt(0, problems=["there is none"]), {}
        size = self.prog["PAGE_SIZE"].value_()
        blob = self.read_phys(phys, size)
        # kho_add_subtree() moves things about in it.
        for _ in range(READS):
            again = self.read_phys(phys, size)
            if again == blob:
                break
            blob = again
        fdt = parse_root_fdt(phys, blob)
        blobs = {} if blob is None else {"fdt": blob}
        for subtree in fdt.subtrees:
            if subtree.phys is None or not subtree.size:
                continue
            span = (
                np.array([subtree.phys], np.uint64),
                np.array([min(subtree.phys + subtree.size, 2**64 - 1)], np.uint64),
            )
            if in_ranges(self.ram, *span)[0]:
                kept = min(subtree.size, budget.BLOB, budget.BLOBS - sum(map(len, blobs.values())))
                data = self.read_phys(subtree.phys, kept)
                if data:
                    blobs[f"subtree {subtree.name}"] = data
        return fdt, blobs

    def phys(self, pointer: Object) -> int:
        return int(virt_to_phys(pointer).value_()) if pointer else 0

    def read_phys(self, address: int, size: int) -> bytes | None:
        try:
            return self.prog.read(address, size, physical=True)
        except FaultError:
            return None

    def _read_virt(self, address: int, size: int) -> bytes | None:
        try:
            return self.prog.read(address, size)
        except FaultError:
            return None


@dataclass
class _Lazy(Generic[C]):
    """A stream that asks the kernel anew at each iteration."""

    make: Callable[[], Iterator[C]]

    def __iter__(self) -> Iterator[C]:
        return self.make()


class _Scan:
    """The stamp scan of a source, and what it could not see."""

    def __init__(self, source: KernelSource) -> None:
        self._source = source
        self._scanned = self._unread = 0

    def stamps(self) -> Iterator[Blocks]:
        self._scanned = self._unread = 0
        return self._source._pages.stamps(self._source.ram, self._count)

    def _count(self, pages: int) -> None:
        if pages > 0:
            self._scanned += pages
        else:
            self._unread -= pages
        total = int((self._source.ram[:, 1] - self._source.ram[:, 0]).sum())
        self._source._progress(
            "scanning struct pages for stamps",
            self._scanned + self._unread,
            total >> self._source.abi.page_shift,
        )

    def result(self) -> Scan:
        return Scan(self._scanned, self._unread)


def probe_abi(prog: Program, compatible: str | None, overrides: Overrides) -> Abi:
    """
    What this kernel does, from its types.

    :param compatible: of its own root FDT.
    """
    decided: dict[str, str] = {}
    constants = _enumerators(prog, "enum kho_radix_consts")
    page_shift = prog["PAGE_SHIFT"].value_()
    computed = Abi.for_page_shift(page_shift)

    def constant(name: str, otherwise: int) -> int:
        if name in constants:
            decided[name] = "enum kho_radix_consts"
            return constants[name]
        decided[name] = "computed from PAGE_SHIFT: not in the debug info"
        return otherwise

    stamp = probe_stamp(prog)
    order_0 = constant("KHO_ORDER_0_LOG2", computed.order_0_log2)
    return Abi(
        page_shift,
        order_0,
        constant("KHO_TABLE_SIZE_LOG2", computed.table_size_log2),
        constant("KHO_BITMAP_SIZE_LOG2", computed.bitmap_size_log2),
        constant("KHO_TREE_MAX_DEPTH", computed.tree_max_depth),
        prog.type("struct zone").member("free_area").type.length - 1,
        _probe_type_shift(prog, constants, order_0, compatible, overrides, stamp, decided),
        stamp,
        compatible,
        # Trees of bare keys (linux 7.3) have it, and have lost KHO_ORDER_0_LOG2.
        constants.get("KHO_RADIX_KEY_WIDTH"),
        decided,
    )


def _probe_type_shift(
    prog: Program,
    constants: dict[str, int],
    order_0: int,
    compatible: str | None,
    overrides: Overrides,
    stamp: Stamp,
    decided: dict[str, str],
) -> int | None:
    name = "KHO_KEY_TYPE_SHIFT"
    if overrides.type_shift is not None:
        if 0 <= overrides.type_shift <= order_0:
            raise KhoscopeError(
                f"key bit {overrides.type_shift} holds an order or an address, not a type",
                "give a bit above KHO_ORDER_0_LOG2, or none",
            )
        decided[name] = "--type-shift"
        return None if overrides.type_shift < 0 else overrides.type_shift
    if name in constants:
        decided[name] = "enum kho_radix_consts"
        return constants[name]
    if not _enumerators(prog, "enum kho_page_type") and stamp.type_shift is None:
        decided[name] = "no enum kho_page_type, no type in union kho_page_info: no types"
        return None
    posted = compatible in COMPATIBLES_WITHOUT_TYPES
    decided[name] = (
        "there are page types, but the bit is a #define that debug info does not carry; "
        + (f"{compatible}: taken for the series as posted" if posted else "guessed as posted")
    )
    return POSTED_TYPE_SHIFT


def probe_stamp(prog: Program) -> Stamp:
    """The layout of ``union kho_page_info``."""
    bits: dict[str, tuple[int, int]] = {}

    def collect(type_: Type, offset: int) -> None:
        for member in type_.members or ():
            at = offset + member.bit_offset
            if member.name is None:
                collect(member.type, at)
            else:
                bits[member.name] = at, member.bit_field_size or 8 * sizeof(member.type)

    collect(prog.type("union kho_page_info"), 0)
    return Stamp(bits["order"][1], bits["type"][0] if "type" in bits else None, bits["magic"][0])


def page_layout(prog: Program) -> PageLayout:
    """Where this kernel's ``struct page`` keeps things."""
    page = prog.type("struct page")
    pagetype = _enumerators(prog, "enum pagetype")
    try:
        vmemmap = prog["vmemmap"]
    except KeyError:
        raise KhoscopeError(
            "this kernel's struct pages are not one array (no vmemmap)",
            "use a kernel that was built with CONFIG_SPARSEMEM_VMEMMAP=y",
        ) from None
    compound = "compound_info" if page.has_member("compound_info") else "compound_head"
    return PageLayout(
        vmemmap=cast("unsigned long", vmemmap).value_(),
        size=sizeof(page),
        flags=offsetof(page, "flags"),
        private=offsetof(page, "private"),
        refcount=offsetof(page, "_refcount"),
        page_type=offsetof(page, "page_type"),
        compound=offsetof(page, compound),
        lru=offsetof(page, "lru"),
        head_bit=_enumerators(prog, "enum pageflags")["PG_head"],
        buddy_type=pagetype["PGTY_buddy"],
        untyped=pagetype["PGTY_mapcount_underflow"],
    )


def _enumerators(prog: Program, name: str) -> dict[str, int]:
    """The constants of an enum; none where the kernel has no such enum."""
    try:
        enumerators = prog.type(name).enumerators
    except LookupError:
        return {}
    return {e.name: e.value for e in enumerators or ()}
