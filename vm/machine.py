# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest of our own: QEMU, its monitor, the guest agent, and a kexec between two kernels.

    with Machine("7.2-fixed") as machine:
        machine.run("khoscope tree", check=True)
        machine.load_kexec()
        machine.execute_kexec()

Commands and files go through QEMU's guest agent; events and memory dumps go through QMP. Only
people read the console (``Machine.console()``). Every wait has a deadline. If the guest is gone,
the wait ends at once: QEMU exits when its guest panics, resets or powers off, and every operation
watches for that.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import itertools
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

from vm import kernel as kernels
from vm import root as roots
from vm import stock

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent

#: The kernels that a machine can boot.
NAMES = [*kernels.NAMES, kernels.STOCK]

#: Longest wait for one answer of the agent; a guest that is silent for longer has hung. The value
#: is generous, because under TCG on a busy host the agent may wait for seconds for its turn.
REPLY_TIMEOUT = 30.0
# systemd ends the services first, one of which is the agent.
LEAVE_TIMEOUT = 60.0
BOOT_TIMEOUT = 120.0
KEXEC_TIMEOUT = 240.0

#: The agent keeps at most this much of a command's output (GUEST_EXEC_MAX_OUTPUT in QEMU).
MAX_OUTPUT = 16 << 20
_CHUNK = 1 << 20
#: Debugfs has this on the kernels up to 7.0, which hand over only what somebody has finalized.
FINALIZE = "/sys/kernel/debug/kho/out/finalize"
#: What of the repository is in the guest's /khoscope.
_GUEST_TREE = ("khoscope", "bpf", "vm")
_AGENT_NAME = "org.qemu.guest_agent.0"
_TEMPORARY = "khoscope-vm-"
_CONSOLE_TAIL = 40

# The library logs the errors that it raises, and the late answers that we drop on purpose.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class MachineError(Exception):
    """The machine cannot start, or was asked for something that it cannot do."""


class GuestError(MachineError):
    """Something in the guest went wrong. The error has the last lines of the console."""

    def __init__(self, message: str, console: str) -> None:
        super().__init__(message)
        self.console = console

    def __str__(self) -> str:
        tail = "\n".join(f"  | {line}" for line in self.console.splitlines())
        return f"{self.args[0]}\nlast lines of the console:\n{tail or '  (nothing)'}"


class GuestDied(GuestError):
    """The guest is gone: it panicked, reset or powered off, or QEMU ended."""


class GuestHung(GuestError):
    """The guest still runs but did not answer in time."""


class CommandTimeout(GuestError):
    """A command in the guest ran for too long and was killed. ``result`` has its output."""

    def __init__(self, message: str, console: str, result: Result) -> None:
        super().__init__(message, console)
        self.result = result


class CommandFailed(GuestError):
    """A command that was run with ``check=True`` failed. ``result`` has its status and output."""

    def __init__(self, message: str, console: str, result: Result) -> None:
        super().__init__(message, console)
        self.result = result

    def __str__(self) -> str:
        output = self.result.stdout + self.result.stderr
        return f"{self.args[0]}\n{output.rstrip()}"


@dataclass(frozen=True)
class Result:
    """What a command in the guest did. ``returncode`` is negative if a signal ended the command.

    The output is decoded as UTF-8 with ``surrogateescape``, so other bytes survive a round trip.
    """

    command: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


def accelerator() -> str:
    """``kvm`` if a guest can really run on it, else ``tcg``.

    A machine that cannot run a guest may still have a /dev/kvm, and let us open it.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    return "kvm" if os.access("/dev/kvm", os.W_OK) and {"vmx", "svm"} & set(flags) else "tcg"


def start_qemu(
    target: str, arguments: Sequence[str], fds: Sequence[int], directory: Path
) -> subprocess.Popen[bytes]:
    """Starts QEMU. It dies with the thread that started it (PR_SET_PDEATHSIG), even by SIGKILL.

    :param fds: descriptors that QEMU inherits
    :param directory: directory of ``qemu.log``, into which QEMU writes its errors

    :raise MachineError: if QEMU or setpriv is not installed
    """
    qemu, setpriv = shutil.which(f"qemu-system-{target}"), shutil.which("setpriv")
    if qemu is None or setpriv is None:
        missing = f"qemu-system-{target}" if qemu is None else "setpriv"
        raise MachineError(
            f"{missing} is not installed; "
            "run: apt-get install qemu-system-x86 qemu-system-arm util-linux"
        )
    with (directory / "qemu.log").open("wb") as log:
        return subprocess.Popen(
            [setpriv, "--pdeathsig", "KILL", "--", qemu, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds,
            # QEMU keeps its overlay of a disk there, in an unlinked file.
            env={**os.environ, "TMPDIR": str(directory)},
            # Ctrl-C must not reach QEMU, because we end QEMU in good order.
            start_new_session=True,
        )


class Machine:
    """One virtual machine, running from ``__enter__`` to ``__exit__``.

    :param kernel: the kernel to boot, or its name
    :param others: further kernels that :meth:`load_kexec` may load
    :param accel: ``kvm`` or ``tcg``; if None, :func:`accelerator` chooses
    :param append: more words for the kernel's command line
    :param memory: the guest's memory in MiB
    :param borders: where a second and further NUMA nodes begin, in KiB
    :param la57: under TCG, give the guest page tables of five levels
    :param root: an image of the guest's root with more in it; if None, that of all guests

    Start and use a machine in one thread: see :func:`start_qemu`.
    """

    def __init__(
        self,
        kernel: kernels.Kernel | str,
        *others: kernels.Kernel | str,
        accel: str | None = None,
        append: str = "",
        memory: int = 1024,
        borders: Sequence[int] = (),
        la57: bool = False,
        root: Path | None = None,
    ) -> None:
        self.kernel = _built(kernel)
        self.kernels = {k.name: k for k in (self.kernel, *map(_built, others))}
        self.accel = accel or accelerator()
        self.boot_seconds = 0.0
        #: How many kernels this machine has started. The running one has this number in
        #: ``khoscope.boot=``.
        self.boots = 0
        root = root or roots.find()
        if root is None:
            raise MachineError("the guest's root is not built; run: python -m vm build")
        self._root = root
        self._append = append
        self._memory = memory
        self._borders = tuple(borders)
        self._la57 = la57
        self._cleanup = contextlib.ExitStack()

    @property
    def source(self) -> tuple[str, ...]:
        """The options with which khoscope reads the guest from the host."""
        vmlinux = self.kernel.share / "vmlinux"
        return ("--qemu", str(self.qmp_socket), "--vmlinux", str(vmlinux))

    # -- from start to end ------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the guest and removes its files. A second call does nothing."""
        self._cleanup.close()

    def _start(self) -> None:
        started = time.monotonic()
        self.directory = self._make_directory()
        self.console_log = self.directory / "console"
        #: QMP for other programs: ``khoscope --qemu``, ``drgn --qemu``. It accepts one at a time.
        self.qmp_socket = self.directory / "qmp"
        self._agent_socket = self.directory / "agent"
        self._tree = self.directory / "tree.tar"
        _archive(self._tree)

        self._control = QMPClient("control")
        self._agent = QMPClient("agent", readbuflen=4 * MAX_OUTPUT)
        self._agent.negotiate = self._agent.await_greeting = False
        self._loop = asyncio.new_event_loop()
        self._cleanup.callback(self._end_loop)
        control, control_qemu = socket.socketpair()
        self.terminal, terminal_qemu = socket.socketpair()
        self._cleanup.enter_context(self.terminal)
        with control_qemu, terminal_qemu:
            fds = (control_qemu.fileno(), terminal_qemu.fileno())
            self._qemu = start_qemu("x86_64", self._arguments(*fds), fds, self.directory)
        self._cleanup.callback(self._kill)

        self._loop.run_until_complete(self._connect_control(control))
        self._dead = self._loop.create_task(self._until_dead())
        with self._control.listener("VSERPORT_CHANGE") as ports:
            self._do(self._connect_agent(ports), BOOT_TIMEOUT, "booting")
        self._check_boot(1)
        self.boot_seconds = time.monotonic() - started

    def _arguments(self, control: int, terminal: int) -> list[str]:
        command_line = " ".join(
            (
                "console=ttyS0 root=/dev/vda rw init=/usr/sbin/khoscope-init panic=-1",
                # Mitigations cost much time, and TCG's processor does not need them.
                "mitigations=off",
                # The clocksource watchdog of 7.2 may wait for ever for a processor that has stopped
                # for the change from jiffies to the TSC (docs/lab.md).
                "tsc=nowatchdog",
                # On a busy host the timer's interrupts come too late for a check at boot, which
                # then panics. Under KVM, the kernel leaves this check out by itself.
                "no_timer_check",
                f"kho=on liveupdate=on khoscope.kernel={self.kernel.name} khoscope.boot=1",
                self._append,
            )
        ).strip()
        # fmt: off
        # QEMU 7.2 emulates AVX2 wrongly: numpy's argsort then gives wrong orders. A fifth level of
        # page tables takes a fifth of the time.
        tcg = "max,-avx2" if self._la57 else "max,-avx2,-la57"
        arguments = [
            "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", f"q35,accel={self.accel}",
            "-cpu", "host" if self.accel == "kvm" else tcg,
            # Processors of two nodes are in two sockets.
            "-smp", "2,sockets=2" if self._borders else "2", "-m", f"{self._memory}",
            # A reset and a power-off end QEMU, and so does a panic, by panic=-1. A kexec does not.
            # pvpanic tells why it ended, before the kernel has printed all of it: so it only tells.
            "-no-reboot", "-device", "pvpanic-pci", "-action", "panic=none",
            "-kernel", str(self.kernel.share / "bzImage"), "-append", command_line,
            "-drive", f"file={_escape(self._root)},format=raw,if=none,id=root,snapshot=on",
            "-device", "virtio-blk-pci,drive=root",
            "-drive", f"file={_escape(self._tree)},format=raw,if=none,id=tree,readonly=on",
            "-device", "virtio-blk-pci,drive=tree",
            "-device", "virtio-rng-pci",
            "-device", "vmcoreinfo",
            "-chardev", f"file,id=console,path={_escape(self.console_log)}",
            "-serial", "chardev:console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=terminal,fd={terminal}",
            "-device", "virtconsole,nr=0,chardev=terminal",
            "-chardev", f"socket,id=agent,path={_escape(self._agent_socket)},server=on,wait=off",
            "-device", f"virtserialport,nr=1,id=agent,chardev=agent,name={_AGENT_NAME}",
            "-chardev", f"socket,id=control,fd={control}",
            "-mon", "chardev=control,mode=control",
            "-qmp", f"unix:{_escape(self.qmp_socket)},server=on,wait=off",
        ]
        # fmt: on
        if self._borders:
            edges = (0, *self._borders, self._memory << 10)
            for node, (start, end) in enumerate(itertools.pairwise(edges)):
                cpus = f",cpus={node}" if node < 2 else ""
                backend = f"memory-backend-ram,id=node{node},size={end - start}K"
                numa = f"node,nodeid={node},memdev=node{node}{cpus}"
                arguments += ["-object", backend, "-numa", numa]
        if (initrd := self.kernel.share / "initrd").exists():
            arguments += ["-initrd", str(initrd)]
        for number, each in enumerate(self.kernels.values()):
            share = f"id=share{number},path={_escape(each.share)},mount_tag={each.name}"
            share += ",security_model=none"
            arguments += ["-virtfs", f"local,{share},readonly=on,multidevs=remap"]
        return arguments

    def _make_directory(self) -> Path:
        """Makes a directory that is ours while we hold its lock, and removes stale ones.

        Only SIGKILL leaves a stale directory behind. It releases the lock on the directory.
        """
        for stale in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                status = stale.stat()
                # A younger directory may be between its mkdir and its flock.
                if status.st_uid == os.getuid() and status.st_mtime < time.time() - 5:
                    _remove_unlocked(stale)
        directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
        self._cleanup.callback(os.close, _lock(directory))
        self._cleanup.callback(shutil.rmtree, directory)
        if len(str(directory / "agent")) > 100:
            raise MachineError(f"{directory} is too long for a socket's path; set a shorter TMPDIR")
        return directory

    async def _connect_control(self, connection: socket.socket) -> None:
        try:
            await asyncio.wait_for(self._control.connect(connection), REPLY_TIMEOUT)
        except (QMPError, TimeoutError) as error:
            self._kill()
            log = (self.directory / "qemu.log").read_text(errors="replace").strip()
            raise MachineError(f"QEMU did not start: {log or error}") from error

    async def _until_dead(self) -> str:
        """Waits until QEMU has ended, and returns why. With -no-reboot it ends with the guest."""
        while self._control.runstate == Runstate.RUNNING:
            await self._control.runstate_changed()
        events: dict[Any, Any] = {e["event"]: e.get("data") for e in self._control.events.history}
        if "GUEST_PANICKED" in events:
            return "the guest panicked"
        if "SHUTDOWN" in events:
            return f"the guest has ended ({events['SHUTDOWN']['reason']})"
        log = (self.directory / "qemu.log").read_text(errors="replace").strip()
        try:
            # QMP breaks a moment before the process is gone.
            status = await asyncio.to_thread(self._qemu.wait, 5)
        except subprocess.TimeoutExpired:
            return f"QEMU has closed QMP, and still runs {log}".strip()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"QEMU has ended {how} {log}".strip()

    def _kill(self) -> None:
        self._qemu.kill()
        self._qemu.wait()

    def _end_loop(self) -> None:
        async def end() -> None:
            for client in (self._control, self._agent):
                if client.runstate != Runstate.IDLE:
                    # This raises the error that ended the connection: QEMU has been killed.
                    with contextlib.suppress(QMPError, OSError, EOFError):
                        await client.disconnect()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._loop.run_until_complete(end())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    # -- waiting ----------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        """Runs `work` until it ends, the guest ends or the deadline passes, whichever is first."""
        return self._loop.run_until_complete(self._watched(work, timeout, what))

    async def _watched(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        task = self._loop.create_task(work)
        try:
            await asyncio.wait(
                {task, self._dead}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
        except ExecuteError as error:
            raise self._error(GuestError, f"{what}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            # The agent's channel often breaks a moment before QMP reports that QEMU is gone.
            await asyncio.wait({self._dead}, timeout=5)
            if not self._dead.done():
                raise self._error(GuestError, f"{what}: the agent's channel broke") from error
        finally:
            task.cancel()
        if self._dead.done():
            raise self._error(GuestDied, f"{what}: {self._dead.result()}")
        raise self._error(GuestHung, f"{what}: no end after {timeout:g} s{await self._where()}")

    async def _where(self) -> str:
        """Where each processor of a hung guest is, if QEMU still answers."""
        question = {"command-line": "info registers -a"}
        try:
            answer = self._control.execute("human-monitor-command", question)
            said: Any = await asyncio.wait_for(answer, 5)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            return f" (nor does QEMU answer: {error!r})"
        lines = (line for line in str(said).splitlines() if line.startswith(("CPU#", "RIP=")))
        return "".join(f"\n  {line.strip()}" for line in lines)

    def _error(self, kind: type[GuestError], message: str) -> GuestError:
        return kind(message, self.console(_CONSOLE_TAIL))

    def console(self, lines: int | None = None) -> str:
        """The console's text since the first boot, or its last lines."""
        text = self.console_log.read_text(errors="replace").replace("\r", "")
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    # -- the guest agent --------------------------------------------------------------------------

    async def _connect_agent(self, ports: EventListener) -> None:
        """Waits until the agent opens its port, then synchronises with it.

        A late answer to a request from before a kexec does no harm: nobody waits for its id.
        """
        await _until_port(ports, is_open=True)
        if self._agent.runstate != Runstate.RUNNING:
            if self._agent.runstate == Runstate.DISCONNECTING:
                with contextlib.suppress(QMPError, OSError, EOFError):
                    await self._agent.disconnect()  # raises the error that broke the connection
            await self._agent.connect(str(self._agent_socket))
        number = self.boots + 1
        if await self._ask("guest-sync", id=number) != number:
            raise self._error(GuestError, "the guest agent is out of step")

    async def _ask(self, request: str, **arguments: object) -> Any:
        try:
            return await asyncio.wait_for(
                self._agent.execute(request, arguments), timeout=REPLY_TIMEOUT
            )
        except TimeoutError:
            raise self._error(
                GuestHung, f"the guest agent did not answer {request} in {REPLY_TIMEOUT:g} s"
            ) from None

    async def spawn(self, argv: Sequence[str], input: bytes | None = None) -> int:
        arguments: dict[str, object] = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "capture-output": True,
        }
        if input is not None:
            arguments["input-data"] = base64.b64encode(input).decode()
        answer = await self._ask("guest-exec", **arguments)
        return int(answer["pid"])

    async def _wait(self, pid: int, timeout: float) -> dict[str, Any] | None:
        """Waits for a process; returns the agent's report on its end, or None at the deadline."""
        deadline = time.monotonic() + timeout
        pause = 0.01
        while True:
            status: dict[str, Any] = await self._ask("guest-exec-status", pid=pid)
            if status["exited"]:
                return status
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    async def _execute(self, command: tuple[str, ...], input: bytes | None, limit: float) -> Result:
        # The command gets a session of its own, which is killed as a whole at the deadline.
        pid = await self.spawn(("setsid", "--wait", *command), input)
        status = await self._wait(pid, limit)
        if status is not None:
            return self._result(command, status)
        await self.spawn(("kill", "-KILL", "--", f"-{pid}"))
        status = await self._wait(pid, REPLY_TIMEOUT)
        message = f"{shlex.join(command)} ran for more than {limit:g} s"
        if status is None:
            raise self._error(GuestHung, f"{message} and cannot be killed")
        raise CommandTimeout(message, self.console(_CONSOLE_TAIL), self._result(command, status))

    def _result(self, command: tuple[str, ...], status: dict[str, Any]) -> Result:
        if status.get("out-truncated") or status.get("err-truncated"):
            raise MachineError(
                f"{shlex.join(command)} printed more than {MAX_OUTPUT >> 20} MiB;"
                " redirect it to a file and use copy_out"
            )
        output, errors = (
            base64.b64decode(status.get(key, "")).decode(errors="surrogateescape")
            for key in ("out-data", "err-data")
        )
        returncode = -status["signal"] if "signal" in status else status["exitcode"]
        return Result(command, returncode, output, errors)

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60.0,
        input: bytes | None = None,
        env: dict[str, str] | None = None,
        check: bool = False,
    ) -> Result:
        """Runs a command in the guest, as root, in ``/root``. The shell runs a string.

        The result holds up to 16 MiB each of output and errors. For more, redirect them to a file
        and :meth:`copy_out` the file.

        :raise CommandTimeout: if the command did not end in time, and was killed
        :raise CommandFailed: with `check`, if the exit status is not 0
        """
        words = ("sh", "-c", command) if isinstance(command, str) else tuple(command)
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        words = ("env", "--chdir=/root", *settings, *words)
        # The agent's answers and the kill have limits of their own. This one is the last resort.
        result = self._do(
            self._execute(words, input, timeout),
            timeout + 4 * REPLY_TIMEOUT,
            shlex.join(words),
        )
        if check and result.returncode != 0:
            raise CommandFailed(
                f"{shlex.join(result.command)} ended with status {result.returncode}",
                self.console(_CONSOLE_TAIL),
                result,
            )
        return result

    def copy_in(self, local: Path, remote: str, *, timeout: float = 300.0) -> None:
        """Copies a file into the guest."""
        self._do(self._write(local, remote), timeout, f"copying {local} in")

    def copy_out(self, remote: str, local: Path, *, timeout: float = 300.0) -> None:
        """Copies a file out of the guest."""
        try:
            self._do(self._read(remote, local), timeout, f"copying {remote} out")
        except BaseException:
            local.unlink(missing_ok=True)
            raise

    async def _write(self, local: Path, remote: str) -> None:
        with local.open("rb") as source:
            handle = await self._ask("guest-file-open", path=remote, mode="wb")
            while chunk := source.read(_CHUNK):
                data = base64.b64encode(chunk).decode()
                answer = await self._ask("guest-file-write", handle=handle, **{"buf-b64": data})
                if answer["count"] != len(chunk):
                    raise self._error(GuestError, f"only part of {remote} could be written")
            await self._ask("guest-file-close", handle=handle)

    async def _read(self, remote: str, local: Path) -> None:
        handle = await self._ask("guest-file-open", path=remote, mode="rb")
        with local.open("wb") as target:
            while True:
                answer = await self._ask("guest-file-read", handle=handle, count=_CHUNK)
                target.write(base64.b64decode(answer["buf-b64"]))
                if answer["eof"]:
                    break
        await self._ask("guest-file-close", handle=handle)

    # -- kexec ------------------------------------------------------------------------------------

    def command_line(self) -> list[str]:
        """The words of the running kernel's command line."""
        return self.run(("cat", "/proc/cmdline"), check=True).stdout.split()

    def finalize(self) -> None:
        """Finalizes KHO, on a kernel that hands over only what is finalized.

        On 6.18, nothing can be preserved after that (EBUSY), and an image that was loaded before
        that hands nothing over. A second call does nothing.

        :raise CommandFailed: if a client of KHO, or KHO, refuses
        """
        words = f"! test -e {FINALIZE} || grep -q 1 {FINALIZE} || echo 1 >{FINALIZE}"
        self.run(words, check=True)

    def must_finalize(self) -> bool:
        """Does :meth:`finalize` do anything on this kernel?"""
        return self.run(("test", "-e", FINALIZE)).returncode == 0

    def load_kexec(
        self, kernel: str | None = None, append: str = "", *, handover: bool = True
    ) -> None:
        """Loads the next kernel with kexec_file_load, which hands over what KHO preserves.

        This finalizes KHO first.

        :param kernel: name of a kernel that this machine was made with; None for the running kernel
        :param append: more words for its command line
        :param handover: False for kexec_load, which loses everything that is preserved
        """
        words = [w for w in self.command_line() if not w.startswith("khoscope.boot=")]
        image = "/kernel/bzImage"
        if kernel is not None:
            if kernel not in self.kernels:
                raise MachineError(f"this machine was not made with a kernel {kernel}")
            words = [w for w in words if not w.startswith("khoscope.kernel=")]
            words.append(f"khoscope.kernel={kernel}")
            image = f"/run/next-{kernel}/bzImage"
            self.run(
                f"mkdir -p /run/next-{kernel} && mountpoint -q /run/next-{kernel} ||"
                f" mount -t 9p -o trans=virtio,version=9p2000.L,ro {kernel} /run/next-{kernel}",
                check=True,
            )
        words.append(f"khoscope.boot={self.boots + 1}")
        command_line = " ".join((*words, append)).strip()
        if handover:
            self.finalize()
        load = ("kexec", "-s" if handover else "-c", "-l", image)
        self.run((*load, f"--command-line={command_line}"), check=True)

    def execute_kexec(self, by: tuple[str, ...] = ("kexec", "-e")) -> None:
        """Jumps into the loaded kernel and waits until its guest agent answers.

        :param by: the command that does it
        """
        loaded = self.run(("cat", "/sys/kernel/kexec_loaded"), check=True).stdout.strip()
        if loaded != "1":
            raise MachineError("no kernel is loaded for the kexec: call load_kexec first")
        # The second boot finds on disk only what was synced.
        self.run(("sync",), check=True)
        self._leave(by)

    def load_crash_kernel(self) -> None:
        """Loads the running kernel's image for :meth:`crash`. It needs ``crashkernel=`` at boot."""
        mine = ("khoscope.boot=", "kho=", "liveupdate=", "crashkernel=")
        words = [w for w in self.command_line() if not w.startswith(mine)]
        # Use one processor, because the others are wherever the crash has left them.
        words += [f"khoscope.boot={self.boots + 1}", "nr_cpus=1", "reset_devices"]
        load = ("kexec", "-s", "-p", "/kernel/bzImage", f"--command-line={' '.join(words)}")
        self.run(load, check=True)

    def crash(self) -> None:
        """Panics, and waits for the guest agent of the crash kernel, which has /proc/vmcore."""
        loaded = self.run(("cat", "/sys/kernel/kexec_crash_loaded"), check=True).stdout.strip()
        if loaded != "1":
            raise MachineError("no crash kernel is loaded: call load_crash_kernel first")
        self.run(("sync",), check=True)
        self._leave(("sh", "-c", "echo c > /proc/sysrq-trigger"))

    def _leave(self, command: tuple[str, ...]) -> None:
        """Runs a command that ends this kernel and starts the next."""
        with self._control.listener("VSERPORT_CHANGE") as ports:
            self._do(self._jump(command, ports), KEXEC_TIMEOUT, "kexec")
        self._check_boot(self.boots + 1)

    async def _jump(self, command: tuple[str, ...], ports: EventListener) -> None:
        # The jump may come before the agent's answer, so we wait until the port closes.
        kexec = self._loop.create_task(self.spawn(command))
        try:
            await asyncio.wait_for(_until_port(ports, is_open=False), LEAVE_TIMEOUT)
        except TimeoutError:
            status = await self._wait(await kexec, REPLY_TIMEOUT)
            result = self._result(command, status) if status else "it still runs"
            message = f"{shlex.join(command)} did not leave the kernel: {result}"
            raise self._error(GuestHung, message) from None
        finally:
            kexec.cancel()
        await self._connect_agent(ports)

    def _check_boot(self, number: int) -> None:
        word = f"khoscope.boot={number}"
        if word not in self.command_line():
            raise self._error(GuestError, f"the running kernel is not the one with {word}")
        self.boots = number

    # -- QMP --------------------------------------------------------------------------------------

    def qmp(self, request: str, *, timeout: float = REPLY_TIMEOUT, **arguments: object) -> object:
        """Runs one QMP command over our own channel."""
        return self._do(self._control.execute(request, arguments), timeout, request)

    def dump(self, path: Path, *, timeout: float = 300.0) -> None:
        """Writes the guest's memory as an ELF core."""
        try:
            self.qmp(
                "dump-guest-memory",
                timeout=timeout,
                paging=False,
                protocol=f"file:{path.resolve()}",
            )
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def wait(self, meanwhile: Coroutine[Any, Any, None]) -> str:
        """Waits, without a deadline, until the guest has ended, and returns why.

        :param meanwhile: runs until then; if it fails, the wait ends
        """

        async def both() -> str:
            task = self._loop.create_task(meanwhile)
            try:
                while not self._dead.done():
                    await asyncio.wait({task, self._dead}, return_when=asyncio.FIRST_COMPLETED)
                    if task.done():
                        task.result()
                        await self._dead
            finally:
                task.cancel()
            return self._dead.result()

        return self._loop.run_until_complete(both())


def _archive(to: Path) -> None:
    """Writes what the guest has in /khoscope: the working tree's programs, without byte code."""

    def no_byte_code(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.endswith("__pycache__") else member

    with tarfile.open(to, "w") as archive:
        for name in _GUEST_TREE:
            archive.add(REPOSITORY / name, name, filter=no_byte_code)


async def _until_port(ports: EventListener, *, is_open: bool) -> None:
    async for event in ports:
        if event["data"] == {"id": "agent", "open": is_open}:
            return


def _built(kernel: kernels.Kernel | str) -> kernels.Kernel:
    if not isinstance(kernel, str):
        return kernel
    if kernel not in NAMES:
        raise MachineError(f"no kernel is called {kernel}; there are: {', '.join(NAMES)}")
    found = stock.find() if kernel == kernels.STOCK else kernels.find(kernel)
    if found is None:
        raise MachineError(f"kernel {kernel} is not built; run: python -m vm build {kernel}")
    return found


def _escape(value: object) -> str:
    """Escapes a value for QEMU's comma-separated options."""
    return str(value).replace(",", ",,")


def _lock(directory: Path) -> int:
    """Locks a directory. The lock ends when the descriptor is closed or the process dies."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_unlocked(directory: Path) -> None:
    try:
        descriptor = _lock(directory)
    except BlockingIOError:
        return  # its process is still alive
    shutil.rmtree(directory)
    os.close(descriptor)
