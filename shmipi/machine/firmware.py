"""The firmware: a clean, single-threaded process that boots, watches and reaps CPUs.

It is started by the host (``boot.py``) in a session of its own, imports once, and forks
the CPUs. It owns the machine: whatever happens to the host, the CPUs end with the
firmware, and the segment, semaphores and queues are removed by it.

The host talks to it over a socket, one JSON object per message.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import json
import os
import pickle
import select
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from shmipi import _core
from shmipi.errors import ShmipiOSError, TaskInterrupt
from shmipi.machine import (
    arrays,
    byvalue,
    controller,
    crashdump,
    doorbells,
    process,
    segment,
    title,
)
from shmipi.machine.ending import ending_number
from shmipi.machine.guests import Guests

__all__ = ["main"]

_MESSAGE_MAX = 1 << 16
_REAP_RETRY_S = 0.005
_KILL_WAIT_S = 5.0
_LOOK_S = 0.01
_FORKS = 64  # so many in a row: the host may die meanwhile
_TOGETHER_S = 20e-6  # for each CPU that ends with others, who are looked at together
_TOGETHER_MOST_S = 0.002
_FEW = 8  # CPUs that come up: each is looked at as soon as it tells
_ALIVE_MOST = 64  # of those who end in a row, that are looked at behind the first
# By name: shmipi's own are above this module, which does not use them.
_PRELOAD = (
    "numpy",
    "cloudpickle",
    "shmipi.smp",
    "shmipi.atomic",
    "shmipi.irq",
    "shmipi.users.backtrace",
    "shmipi.users.crash",
)
_ONLINE_S = 30.0
_HELD_S = 5.0  # a dead CPU's run queue, by somebody who is stopped
_STARVED_S = 20.0  # more for who had no core: together less than the host waits
_STOOD_S = 1.0  # between two looks: what is more was taken from all processes


_Send = Callable[[dict[str, Any]], None]


class _BootOrder(NamedTuple):
    number: Any  #: of the order, for its answer
    cpu: int
    send: _Send
    until: float  #: a death that takes longer is said to be what is in the way


class Firmware:
    """Boots CPUs of one machine, reaps them, and takes orders from the host."""

    machine: _core.Machine

    def __init__(
        self, control: socket.socket, config: dict[str, Any], memory: int
    ) -> None:
        self.control = control
        self.config = config
        self.memory = memory
        self.identity = segment.identity(memory)
        self.host = os.pidfd_open(config["host_pid"])
        self.life = select.poll()
        self.life.register(self.host, select.POLLIN)
        self.life.register(control, select.POLLRDHUP)
        self.pids: dict[int, int] = {}  # pid -> CPU
        self.coprocessors: dict[int, int] = {}  # pid -> its place
        self.generations: dict[int, int] = {}  # CPU -> of its process
        self.ordered: set[int] = set()  # pids that it was told to kill
        self.unreaped: set[int] = set()  # pids of the dead whose number is guarded
        self.held: set[int] = set()  # dead CPUs whose tasks one that is stopped holds
        self.later: list[_BootOrder] = []
        self.stopping = False
        self.again = False  # reap() has not looked at everybody
        self.deadline = 0.0  # of an orderly stop
        self.selector = selectors.EpollSelector()

    # ---- boot -----------------------------------------------------------------------

    def publish(self) -> None:
        """Give the machine its name, which from now on is ours to remove. ``OSError``.

        Not before: a host that is killed as it begins leaves nothing that has a name.
        """
        wake_with(self.control)
        self.check_host()
        full = self.config["segment"]
        try:
            segment.publish(self.memory, full)
        except OSError as error:
            raise _Refusal("name", error.errno, str(error.strerror)) from None
        # By its name, and with an open file of our own: so the lock is ours, too.
        fd = segment.open_segment(full)
        self.machine = _core.Machine(fd, self.config["ncpus"] + 1)
        os.close(fd)  # the machine has a descriptor of its own: the lock is on that
        os.close(self.memory)
        self.guests = Guests(
            self.machine, self.selector, self.config, self.identity, self.obey_guest
        )
        self.machine.set_firmware(os.getpid())
        self.machine.set_state(_core.BOOTING)

    def make_doorbells(self) -> None:
        """Make those of all CPUs, where they are what bears a name."""
        config = self.config
        bell = doorbells.BY_NAME[config["doorbell"]]
        if bell.folder is None:
            return
        try:
            for cpu in range(config["ncpus"]):
                bell.create(f"{config['segment']}.{cpu}")
        except OSError as error:
            text = error.strerror or str(error)
            raise _Refusal("doorbell", error.errno, text) from None

    def prepare(self) -> None:
        """Load handlers, open doorbells, and get ready to fork."""
        config = self.config
        # A number means the same function in the host and in all its machines.
        for name in config["handler_names"]:
            _core.native_name(name)
        for spec in config["handlers"]:
            _core.native_load(spec)
        self.machine.open_doorbells(config["segment"], config["inherited"])
        self.guests.keep_doorbells()
        _core.shield()
        self.arrays = arrays.Arrays(self.machine)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(config["kick_signal"], _core.irq_entry)
        # Blocked across every fork: a kick must not meet a child that is no CPU yet.
        _core.kick_block(config["kick_signal"], True)
        signal.signal(config["nmi_signal"], _core.nmi_entry)
        _core.kick_block(config["nmi_signal"], True)
        self.signals = _core.signal_fd([signal.SIGCHLD, signal.SIGTERM])
        self.arrays.make_current()
        byvalue.adopt_main(config["main"])
        self.controller = controller.register(
            self.machine, pickle.loads(config["controller"])
        )
        os.register_at_fork(after_in_child=self.machine.forked)
        sys.unraisablehook = _unraisable
        self.selector.register(self.host, selectors.EVENT_READ, self.host_died)
        self.selector.register(self.control, selectors.EVENT_READ, self.on_message)
        self.selector.register(self.signals, selectors.EVENT_READ, self.on_signal)
        self.show("firmware")
        gc.collect()
        gc.freeze()  # a collection in a CPU must not copy every page of imports

    def boot(self, cpus: list[int]) -> None:
        """Fork these CPUs and wait until each is online or dead. ``OSError``."""
        self.before_fork()
        me, private = os.getpid(), self.private()
        coming: list[int] = []
        for at in range(0, len(cpus), _FORKS):
            self.check_host()
            some = cpus[at : at + _FORKS]
            # Not os.fork(): a child goes to its idle loop, without Python.
            made, code = self.machine.fork_cpus(some, me, private)
            for number, (pid, generation) in zip(some, made, strict=False):
                self.pids[pid] = number
                self.generations[number] = generation
            if code:
                raise OSError(code, os.strerror(code))
            coming = self.still_coming(coming + some)
        self.await_online(coming)

    def show(self, role: str) -> None:
        """Let ``ps`` show this process in that role."""
        title.show(self.machine.name, role)

    def before_fork(self) -> None:
        """Check that a fork is safe; nothing is printed twice. ``OSError``."""
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise OSError(
                errno.EAGAIN,
                f"the firmware has {threads} threads and cannot fork safely: a native"
                " handler's library started one",
            )
        sys.stdout.flush()
        sys.stderr.flush()

    def private(self) -> list[int]:
        """Return the descriptors that are no child's business."""
        return [
            self.control.fileno(),
            self.host,
            self.signals,
            self.selector.fileno(),
            *self.guests.private(),
        ]

    def await_online(self, cpus: list[int]) -> None:
        """Return when every one of ``cpus`` is online. ``OSError`` when one died.

        And when one does not come: says what its process does. A time in which this one
        stood as well (a guest that is paused, SIGSTOP) counts for nothing, and who has
        not had its core has longer.
        """
        left, more = _ONLINE_S + 0.05 * len(cpus), _STARVED_S
        looked, reaped = time.monotonic(), 0.0
        while True:
            seen = self.machine.hotplug_event
            cpus = self.still_coming(cpus)
            if not cpus:
                return
            self.check_host()
            now = time.monotonic()
            left -= min(now - looked, _STOOD_S)
            looked = now
            if left < 0:
                starved, text = self.why_not_online(cpus[0])
                if not (starved and more):
                    raise OSError(errno.ETIMEDOUT, text)
                left, more = more, 0.0
            if len(cpus) > _FEW:  # each that comes up tells, and all are looked at
                time.sleep(_TOGETHER_MOST_S)
            self.machine.wait_hotplug(seen, _LOOK_S)
            self.machine.look_after()  # the others go on while one comes up
            # Not for each that comes online: the kernel looks at every child.
            if (now := time.monotonic()) - reaped >= _LOOK_S:
                self.reap()
                reaped = now

    def why_not_online(self, number: int) -> tuple[bool, str]:
        """Has it not had its core? And what its process does, in words."""
        pid = next(iter(self.processes(number)), 0)
        core, (state, had) = self.machine.slot(number).core, process.core_time(pid)
        starved = state == "R" and had < process.LOOKED_NS
        if starved:
            how = f"waits for core {core}, which others have: of real-time priority?"
        elif state in "Tt":
            how = "is stopped (SIGSTOP, a debugger), or gone"
        else:
            how = f"is in state {state} (man 5 proc)"
        return starved, (
            f"CPU {number} does not come online: its process {pid} {how}; it had core"
            f" {core} for {had / 1e6:.0f} ms"
        )

    def still_coming(self, cpus: list[int]) -> list[int]:
        """Return those that are not online; start who waits for it.

        All at once, as the kernel does with CONFIG_HOTPLUG_PARALLEL. ``OSError`` when
        one died.
        """
        coming = []
        for number in cpus:
            state = self.machine.slot(number).state
            if state == _core.OFFLINE:
                self.controller.bring_up(number)
                coming.append(number)
            elif state == _core.CPU_DEAD:
                code = self.machine.boot_error(number)
                if not code:
                    text = f"CPU {number} died before it was online"
                    raise OSError(errno.ECHILD, text)
                text = os.strerror(code)
                if code == errno.EAGAIN:
                    text = (
                        "no room for its timer in the queue of signals:"
                        " RLIMIT_SIGPENDING (ulimit -i) is too small, or others of your"
                        " processes use it up"
                    )
                raise OSError(code, f"CPU {number}: {text}")
        return coming

    # ---- events ---------------------------------------------------------------------

    def loop(self) -> None:
        """Serve until there is nothing left to serve."""
        while not (self.stopping and not self.pids and not self.coprocessors):
            timeout = self.guests.timeout()
            if self.unreaped or self.held:
                timeout = _REAP_RETRY_S
            if self.stopping:
                left = max(0.0, self.deadline - time.monotonic())
                timeout = left if timeout is None else min(left, timeout)
            if self.again:
                self.again, timeout = False, 0.0
            # In C: every 10 ms it looks whether some CPU was left without its ring.
            self.machine.watch(
                self.selector.fileno(), -1.0 if timeout is None else timeout
            )
            for key, _ in self.selector.select(0):
                key.data()
            if self.stopping:  # each look costs, and more of them end every moment
                time.sleep(min(_TOGETHER_S * len(self.pids), _TOGETHER_MOST_S))
            self.reap()
            self.guests.look()
            if not self.stopping:
                self.obey_later()
                self.obey_cpus()
            elif time.monotonic() >= self.deadline:
                self.kill_all()
                return

    def on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                # struct signalfd_siginfo: 128 bytes, the number first.
                (number,) = struct.unpack_from("I", os.read(self.signals, 128))
                if number == signal.SIGTERM:
                    self.stop(1.0)

    def host_died(self) -> None:
        self.kill_all()
        self.stopping = True

    def on_message(self) -> None:
        data, fds, *_ = socket.recv_fds(self.control, _MESSAGE_MAX, 1)
        if not data:
            # The host closed its end, or died: its pidfd tells which, either ends us.
            self.kill_all()
            self.stopping = True
            return
        message = json.loads(data)
        if message["op"] == "stop":
            self.stop(message["grace"])
        elif message["op"] == "boot":
            self.boot_later(message["id"], message["cpu"], self.send)
        elif message["op"] == "coprocessor":
            number, virq = message["number"], message["virq"]
            self.answer(message["id"], self.start_coprocessor, number, virq, fds[0])
        elif message["op"] == "kill_coprocessor":
            self.answer(message["id"], self.kill_coprocessor, message["pid"])
        elif message["op"] == "fork":
            self.answer(message["id"], self.fork, message["cores"])
        elif message["op"] == "kill":
            self.kill_cpu(message["cpu"], message["generation"])

    def obey_guest(self, message: dict[str, Any], send: _Send) -> None:
        """Do what an attached host asked for."""
        cpu = message.get("cpu")
        if message.get("op") == "boot" and isinstance(cpu, int) and not self.stopping:
            self.boot_later(message.get("id"), cpu, send)
        elif message.get("op") == "kill" and isinstance(cpu, int):
            self.kill_cpu(cpu, message.get("generation"))

    def processes(self, number: int) -> list[int]:
        """Return the pid of the CPU, if it has a process: ours, and not reaped.

        So nobody else has the number.
        """
        return [
            pid
            for pid, cpu in self.pids.items()
            if cpu == number and pid not in self.unreaped
        ]

    def boot_later(self, number: Any, cpu: int, send: _Send) -> None:
        """Boot a CPU when the deaths that are known by now are gone through with."""
        until = time.monotonic() + _HELD_S
        self.later.append(_BootOrder(number, cpu, send, until))

    def obey_later(self) -> None:
        """Boot what was to be booted, but who is not buried yet."""
        orders, self.later = self.later, []
        for order in orders:
            if order.send != self.send and not self.guests.has(order.send):
                continue  # who ordered it has gone
            if order.cpu in self.held and time.monotonic() < order.until:
                self.later.append(order)
            else:
                order.send(self.outcome(order.number, self.boot_one, order.cpu))

    def obey_cpus(self) -> None:
        """Do what INIT and STARTUP IPIs have ordered: end processes, make processes."""
        ends, starts = self.machine.ordered()
        for number, generation in ends:
            if generation != self.generations.get(number, 0) & 0xFFFF:
                continue
            for pid in self.processes(number):
                self.ordered.add(pid)
                os.kill(pid, signal.SIGKILL)
        for number in starts:
            if self.processes(number) or number in self.held:
                continue
            try:
                self.boot([number])
            except OSError as error:
                if self.machine.slot(number).registered:
                    continue  # it came up, and was reset again before we looked
                # Who sent the IPI waits for no answer, as with the hardware.
                print(f"shmipi: CPU {number} did not start: {error}", file=sys.stderr)
                self.machine.pic_write(number, "startup", 0, _core.STARTUP_RESET)

    def fork(self, cores: list[int]) -> dict[str, float]:
        """Measure what forking this process costs by itself. ``OSError``."""
        self.before_fork()
        made, ended = _core.limit_fork(cores)
        return {"fork_s": made, "exit_s": ended}

    def start_coprocessor(self, number: int, virq: int, fd: int) -> dict[str, int]:
        """Fork a coprocessor that runs what ``fd`` holds. ``OSError``."""
        try:
            self.before_fork()
            me = os.getpid()
            pid = os.fork()
            if not pid:
                self.become_coprocessor(me, number, virq, fd)
        finally:
            os.close(fd)
        self.coprocessors[pid] = number
        self.machine.coproc_set(number, pid, virq)
        return {"pid": pid}

    def become_coprocessor(
        self, firmware: int, number: int, virq: int, fd: int
    ) -> NoReturn:
        """In the child: no CPU, and not the firmware any more."""
        status = 1
        try:
            _core.die_with(firmware)
            self.show(f"coprocessor {number}")
            process.enter()
            with os.fdopen(fd, "rb") as stream:
                stream.seek(0)  # the position is the host's too
                start = stream.read()
            # Nothing of the machine goes on in a child of its own.
            os.register_at_fork(after_in_child=self.machine.disown)
            for private in self.private():
                os.close(private)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            self.machine.coproc_set(number, os.getpid(), virq)
            status = pickle.loads(start)(self.machine, number)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def kill_coprocessor(self, pid: int) -> None:
        if pid in self.coprocessors:
            os.kill(pid, signal.SIGKILL)  # not reaped, so the number is still its

    def kill_cpu(self, number: int, generation: Any) -> None:
        """Kill the process that is this CPU, unless it is another one by now."""
        for pid in self.processes(number):
            if self.machine.slot(number).generation == generation:
                self.ordered.add(pid)
                os.kill(pid, signal.SIGKILL)

    def boot_one(self, number: int) -> None:
        if not 0 <= number < self.config["ncpus"]:
            raise OSError(errno.ENXIO, f"there is no CPU {number}")
        if self.processes(number):
            raise OSError(errno.EBUSY, f"CPU {number} is not dead")
        if number in self.held:
            raise OSError(
                errno.EBUSY,
                f"CPU {number} died, and a process that is stopped has its run queue:"
                " let that go on (SIGCONT)",
            )
        self.boot([number])

    def check_host(self) -> None:
        """Raise ``OSError`` when the host has died, or closed its end."""
        # Another parent: it died before its pid was ours to watch.
        if self.life.poll(0) or os.getppid() != self.config["host_pid"]:
            raise OSError(errno.ECHILD, "the host died")

    def answer(self, number: int, work: Any, *args: Any) -> None:
        self.send(self.outcome(number, work, *args))

    def outcome(self, number: Any, work: Any, *args: Any) -> dict[str, Any]:
        """Do an order; return what is to be said to the host that gave it."""
        reply: dict[str, Any] = {"id": number}
        try:
            reply |= work(*args) or {}
        except OSError as error:
            reply |= {"error": error.strerror or str(error), "errno": error.errno}
        return reply

    def send(self, reply: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the host may be gone: its pidfd tells
            self.control.send(json.dumps(reply).encode())

    # ---- death ----------------------------------------------------------------------

    def reap(self) -> None:
        """Look after CPUs that died: mark, complete, ring, and only then wait for."""
        if not self.stopping and self.machine.crash_panic() is not None:
            self.crash({})
        for dead in () if self.stopping else tuple(self.held):
            self.complete(dead)
        for pid, end in self.find_dead():
            number = self.coprocessors.pop(pid, None)
            if number is not None:
                os.waitpid(pid, 0)  # first: who sees its place free finds no process
                self.machine.coproc_set(number, 0, 0)
                continue
            self.unreaped.add(pid)
            self.look_for_crash(pid, end)
            self.bury(pid, end)
            if not self.stopping:
                self.release()
        self.release()

    def find_dead(self) -> Iterator[tuple[int, int]]:
        """Yield children that ended and are not waited for yet, each once, and how."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, look)) is not None:
                if found.si_pid in self.unreaped:
                    break  # it stands in front of the others: ask for each
                yield found.si_pid, ending_number(found)
            else:
                return
        alive = 0
        children = [*self.pids, *self.coprocessors]
        if self.stopping and found is not None and found.si_pid in self.pids:
            # None before it is dead.
            children = children[children.index(found.si_pid) :]
        for pid in [pid for pid in children if pid not in self.unreaped]:
            with contextlib.suppress(ChildProcessError):
                if (found := os.waitid(os.P_PID, pid, look)) is not None:
                    yield pid, ending_number(found)
                else:
                    alive += 1
            if self.stopping and alive == _ALIVE_MOST:
                self.again = True  # they were told in a row, and most end so
                return

    def look_for_crash(self, pid: int, end: int) -> None:
        """Has a CPU died by a signal that nobody ordered?"""
        by_signal = end and not end & _core.END_EXITED
        if by_signal and pid in self.pids and pid not in self.ordered:
            self.crash({self.pids[pid]: end})

    def crash(self, ends: dict[int, int]) -> None:
        """Make the crash dump, if one is to be made and there was none."""
        if self.stopping or not self.machine.crash_armed():
            return
        words = crashdump.crash(
            self.machine, self.controller, ends, self.end_of, self.is_stopped
        )
        if not words:  # nmi_shootdown_cpus(): WARN_ON_ONCE
            words = "another CPU has died since: the crash dump is of the first"
        print(f"shmipi: {words}", file=sys.stderr, flush=True)

    def end_of(self, number: int) -> int | None:
        """Return how the CPU's process has ended; None: it has not, 0: it has none."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        for pid in self.processes(number):
            with contextlib.suppress(ChildProcessError):
                found = os.waitid(os.P_PID, pid, look)
                return None if found is None else ending_number(found)
        return 0

    def is_stopped(self, number: int) -> bool:
        """Is its process stopped by a signal?"""
        return any(process.is_stopped(pid) for pid in self.processes(number))

    def release(self) -> None:
        """Give up dead CPUs' pids, but those that a sender may be about to signal."""
        if not self.unreaped:
            return
        guarded = self.machine.reap_guarded()
        for pid in list(self.unreaped):
            if self.pids.get(pid) not in guarded:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
                self.unreaped.discard(pid)
                self.pids.pop(pid, None)

    def bury(self, pid: int, end: int) -> None:
        number = self.pids.get(pid)
        if number is None:
            return
        self.ordered.discard(pid)
        if self.machine.stopped(number):
            end = _core.END_STOPPED
        self.machine.reap_mark(number, end)
        if not self.stopping:
            self.complete(number)
            self.guests.sender_ended(number)

    def complete(self, number: int) -> None:
        """Go through with a death; its tasks wait where one that is stopped has it."""
        if self.machine.reap_complete(number) is None:
            self.held.add(number)
        else:
            self.held.discard(number)
        self.machine.reap_ring_all()

    # ---- the end --------------------------------------------------------------------

    def stop(self, grace: float) -> None:
        """Ask every CPU to end; those that have not after ``grace`` s are killed."""
        self.machine.set_shut_down()
        self.machine.stop_all()
        self.guests.close()  # who is refused now finds why
        self.guests.tell({"op": "shutdown"})
        self.stopping = True
        self.deadline = time.monotonic() + grace

    def kill_all(self) -> None:
        self.machine.set_state(_core.DEAD)
        for pid in (*self.pids, *self.coprocessors):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # our child: not reaped, so its pid is its
        deadline = time.monotonic() + _KILL_WAIT_S
        while (self.pids or self.coprocessors) and time.monotonic() < deadline:
            try:
                pid, _ = os.waitpid(-1, 0)
            except ChildProcessError:
                break
            self.pids.pop(pid, None)
            self.coprocessors.pop(pid, None)

    def close(self) -> None:
        """Remove what the machine has outside its processes."""
        if hasattr(self, "machine"):
            self.machine.set_state(_core.DEAD)
        segment.remove(self.config["segment"], self.identity, self.config["ncpus"])


class _Refusal(OSError):
    """The system refused ``what``, for which the host has words of its own."""

    def __init__(self, what: str, code: int | None, text: str) -> None:
        super().__init__(code, text)
        self.what = what


def wake_with(control: socket.socket) -> None:
    """Have the kernel continue this process when the host writes, or ends.

    A firmware that is stopped (SIGSTOP) could not end the machine after its host.
    """
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(control, fcntl.F_SETSIG, signal.SIGCONT)
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """On a CPU: what a ``__del__`` or a callback raised; a cancel is not lost there."""
    if isinstance(lost.exc_value, TaskInterrupt):
        _core.task_interrupt_lost()
    else:
        sys.__unraisablehook__(lost)


def _restore(config: dict[str, Any]) -> None:
    """Give this process, and so the CPUs, the host's surroundings."""
    sys.path[:] = config["path"]
    sys.argv[:] = config["argv"]
    warnings.filters[:] = pickle.loads(config["filters"])  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _read_config(fd: int) -> dict[str, Any]:
    """Return what the host has written. ``EOFError`` when it died before the end."""
    with os.fdopen(fd, "rb") as stream:
        data = stream.read()
    try:
        config: dict[str, Any] = pickle.loads(data)
    except pickle.UnpicklingError:  # cut short
        raise EOFError from None
    return config


def _reply(error: BaseException) -> dict[str, Any]:
    """Return what the host is told of what ended the boot."""
    if isinstance(error, MemoryError):
        return {"error": "no memory", "errno": errno.ENOMEM}
    if isinstance(error, (OSError, ShmipiOSError)):
        text = error.strerror or str(error)
        what = getattr(error, "what", None)
        return {"error": text, "errno": error.errno, "what": what}
    # Of the user's controller, for example, or of an import.
    return {"error": f"{type(error).__name__}: {error}", "errno": errno.EIO}


def main() -> None:
    """Entry of the process; its arguments are descriptors: config, control, memory.

    And the working directory, if that has no name any more.
    """
    # A host that ignores SIGCHLD, as daemons do, hands that on: the dead would be
    # waited for by the kernel and never be seen here, nor a task's child by the task.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process.enter()
    config_fd, control_fd, memory, *here = (int(word) for word in sys.argv[1:])
    try:
        config = _read_config(config_fd)
    except EOFError:
        os._exit(1)  # the host died, and the machine has no name yet
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    os.set_inheritable(memory, False)
    firmware = None
    try:
        _restore(config)
        # Imported once, here, for every CPU: a handler that needs one of them first may
        # stand in the middle of a task's import.
        for name in (*_PRELOAD, *config["preload"]):
            importlib.import_module(name)
        for folder in here:
            os.fchdir(folder)
            os.close(folder)

        # numpy's libraries have read these by now: CPUs see the host's environment.
        for key, value in config["environment"].items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        firmware = Firmware(control, config, memory)
        firmware.publish()
        firmware.make_doorbells()
        firmware.prepare()
        firmware.boot(list(range(config["ncpus"])))
        firmware.machine.set_state(_core.UP)
        firmware.send({"ok": True})
        firmware.loop()
    except Exception as error:
        with contextlib.suppress(OSError):
            control.send(json.dumps(_reply(error)).encode())
    finally:
        if firmware is not None:
            if firmware.pids or firmware.coprocessors:
                firmware.kill_all()
            firmware.close()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
