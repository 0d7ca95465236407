"""``Cluster``: the user's handle on a machine."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import (
    ArenaFullError,
    BootError,
    ClusterStateError,
    ControllerError,
    CpuDiedError,
    HotplugError,
    IpiStallError,
    IpiTimeoutError,
    MachineDiedError,
    ShmipiError,
)
from shmipi.irq import BoundIrq, DomainNode
from shmipi.irq import current as irqs
from shmipi.irq.chips import CHIPS, Chip
from shmipi.irq.of import Description, check_tree, parse_tree
from shmipi.machine import controller as controllers
from shmipi.machine import locks, process, rings, segment, topology
from shmipi.machine.arrays import Arrays, SharedArray
from shmipi.machine.attach import Guest
from shmipi.machine.boot import Host, Plan
from shmipi.machine.limits import start_thread
from shmipi.names import DOORBELLS, IDLE
from shmipi.smp import BoundSmp, Completion, WaitQueue, cpuhp
from shmipi.smp.cpuhp import CpuHotplug
from shmipi.smp.csdlock import Stall
from shmipi.smp.stop import STOP_TIMEOUT_S, take_cpu_down
from shmipi.task import Tasks, check_timeout
from shmipi.trace import events
from shmipi.trace.counters import Counters, interrupts
from shmipi.trace.record import Asked, Recorder, Tracing
from shmipi.users.bound import BoundUsers

__all__ = ["Cluster", "Cpu"]

_Result = TypeVar("_Result")

#: Words for the states of ``enum shi_state``; a rung CPU is a halted one still.
_STATES = ("offline", "running", "polling", "halted", "halted", "dead")

#: The states of a CPU that runs a handler.
_HANDLER_STATES = {
    _core.HANDLER_IRQ: "irq",
    _core.HANDLER_NMI: "nmi",
    _core.HANDLER_SOFTIRQ: "softirq",
}

_HOTPLUG_LOOK_S = 0.05
_HOTPLUG_NAP_S = 0.0005
_KICK_OFFSET = 8  # SIGRTMIN + 8: glibc keeps the first two, others like the next few


@dataclass(frozen=True)
class Cpu:
    """A CPU of a machine, as it was when looked at.

    ``state`` is one of offline, running, polling, halted, dead; irq and nmi while it
    runs a handler. ``generation`` counts the processes that have been this CPU, from 1.
    ``handler`` is the name of the handler that it runs and ``since`` for how long, in
    seconds (None of a native one); ``task`` is the name of its task. None for none.
    """

    id: int
    pid: int
    core: int
    state: str
    generation: int
    handler: str | None = None
    since: float | None = None
    task: str | None = None


class Cluster:
    """A machine of ``ncpus`` pinned processes that interrupt each other.

    Use it as a context manager; the machine ends with the block::

        with Cluster(4) as cluster:
            cluster.call(1, os.getpid)

    Args:
        ncpus: how many CPUs (1 to 4096); None: the number of usable cores, at least 2.
            It may be far more than the cores.
        idle: what a CPU with nothing to do does: "poll" (spin), "haltpoll" (spin for an
            adaptive window, then halt), "halt", or "auto": poll only when every CPU has
            a core to itself and one is left for the host, else haltpoll.
        doorbell: what wakes a halted CPU, one of ``shmipi.names.DOORBELLS`` (the README
            says what each is).
        kick: True: a running CPU is interrupted by a real-time signal, SIGRTMIN+8; a
            signal number: by that one; False: CPUs are cooperative and take interrupts
            when a task ends, waits, or calls ``smp.cond_resched()``.
        controller: the interrupt controller: its name ("apic", "xive" and so on: those
            of ``shmipi.irq.chips.CHIPS``), or a ``Chip``, your own for example.
        cores: "auto" (distinct physical cores first, then round robin) or a list of
            core numbers used in turn (also a cpulist string).
        name: for ``shmipi ps`` and ``shmipi interrupts``; None: a random one.
        handlers: native handlers to load: "FILE.so:symbol". The built-in ones (noop,
            count, stamp, burn) are always there.
        preload: modules that are imported once, before the CPUs are forked: each would
            else import them when it first needs them.
        trace: True: record tracepoints from the start, see ``tracing``; a number: with
            that many records for each CPU.
        csd_lock_timeout: ms after which a wait for a CPU that does not answer is
            reported, with what that CPU does; 0: never. ``cluster.csd_lock_timeout``.
        crash: a file or folder: the death of a CPU by a signal stops the others and
            makes a crash dump there (``cluster.users.crash.arm``).
        nohz_full: CPUs that are left alone, such as "1-3": timers, kernel threads and
            tasks of the scheduler that may run anywhere keep off them
            (``cluster.users.nohz.tick_nohz_full_setup``).
        panic_on_ipistall: ms after which it is given up (``IpiStallError``); 0: never.
        domains: irq domains beside the controller's own, as a small device tree: a dict
            or text (``shmipi.irq.of.parse_tree``).

    Raises:
        BootError: the machine could not be booted; its errno says why and its text what
            to do. Nothing is left behind.
        ValueError, TypeError: an argument that cannot be meant.
    """

    def __init__(
        self,
        ncpus: int | None = None,
        *,
        idle: str = "auto",
        doorbell: str = "futex",
        kick: bool | int = True,
        controller: str | Chip | type[Chip] = "apic",
        cores: str | Sequence[int] = "auto",
        name: str | None = None,
        handlers: Iterable[str] = (),
        trace: bool | int = False,
        domains: Description | None = None,
        csd_lock_timeout: int = 5000,
        panic_on_ipistall: int = 0,
        crash: str | os.PathLike[str] | None = None,
        preload: Iterable[str] = (),
        nohz_full: MaskLike | None = None,
    ) -> None:
        plan = _plan(
            ncpus,
            idle,
            doorbell,
            kick,
            controller,
            cores,
            name,
            handlers,
            trace,
            domains=domains,
            preload=preload,
        )
        params = _milliseconds(csd_lock_timeout, panic_on_ipistall)
        asked = Asked.here()
        if asked is not None:
            plan = replace(plan, trace=asked.records)
        self._open(plan)
        self._machine.set_csd_lock_params(*params)
        try:
            if asked is not None:
                self._ending.recorded = asked, asked.begin(self.tracing)
            if crash is not None:
                self.users.crash.arm(crash)
            if nohz_full is not None:
                self.users.nohz.tick_nohz_full_setup(nohz_full)
        except BaseException:
            self.shutdown()
            raise

    @classmethod
    def attach(cls, name: str) -> Self:
        """Attach to a machine of this user that another process has booted.

        ``shmipi launch --name lab`` keeps one up, for example. What is returned is a
        host as any other: it calls, runs tasks, makes arrays, takes CPUs off- and
        online. ``shutdown()``, or the end of its ``with`` block, detaches, and the
        machine goes on; so it does when this process dies. When the machine ends, so
        does this: ``ClusterStateError`` if its owner shut it down,
        ``MachineDiedError`` otherwise. Calls that it had sent run; its tasks end with
        it, whether it detaches or dies: one that has not begun never does, one that
        runs gets ``TaskInterrupt``, as of ``Task.cancel()``. So do irq handlers that
        it requested in Python. Coprocessors are the owner's alone.

        Raises ``AttachError`` (its errno: ENOENT there is no such machine, EAGAIN six
        hosts are attached already, EOWNERDEAD it is dead, ESHUTDOWN it ends just now,
        ECONNREFUSED or EOPNOTSUPP it runs in another container, ENOPKG its controller
        is of a module that is not here), ``LayoutError`` for one that another version
        of shmipi booted, ``ValueError`` for what is no name.
        """
        cluster = cls.__new__(cls)
        cluster._hold(Guest(name))
        return cluster

    def _open(self, plan: Plan) -> None:
        self._hold(Host(plan))

    def _hold(self, host: Host | Guest) -> None:
        self._host = host
        # Both before there is anything to end: Ctrl-C can come at any step.
        self._ending = _Ending(host)
        self._finalizer = weakref.finalize(self, self._ending.last)
        try:
            host.open()
            self._bind(host)
            if isinstance(host, Host):
                self.irq.set_up(cast(tuple[DomainNode, ...], host.plan.domains))
        except BaseException:
            self._end()
            raise

    def _bind(self, host: Host | Guest) -> None:
        plan = host.plan
        self._machine = host.machine
        self._chip = cast(Chip, controllers.register(self._machine, plan.controller))
        self._arrays = self._ending.arrays = Arrays(self._machine)
        self._counters = Counters(self._machine)
        self._futures = self._ending.futures = _Futures(self._machine, host)
        self._hotplug_lock = threading.Lock()
        #: Whose turn it is to change CPUs, of this host's threads.
        self._hotplug_turn: Callable[[], _Turn | None] = lambda: None
        self._cpuhp = self._ending.cpuhp = CpuHotplug(self._arrays, self._hotplug)
        cpuhp.register(self._machine, self._cpuhp)
        #: ``shmipi.smp`` bound to this machine.
        self.smp = BoundSmp(self._machine)
        #: ``shmipi.irq`` bound to this machine: irq domains, IPIs, coprocessors.
        self.irq = BoundIrq(
            self._machine, self._chip, host if isinstance(host, Host) else None
        )
        irqs.register(self._machine, self.irq)
        #: Its tracepoints: on and off, and what they have recorded.
        self.tracing = Tracing(self._arrays, self._chip)
        #: ``shmipi.users`` bound to this machine: what IPIs are for.
        self.users = BoundUsers(self._arrays)
        _open_clusters.add(self)
        _choose_current()

    def _end(self) -> None:
        """End the machine, or what is left of it after an interruption."""
        _open_clusters.discard(self)
        try:
            self._ending()
        except BaseException:  # Ctrl-C: no more patience, but no half of a machine
            self._host.hurry()
            self._ending()
            raise
        finally:
            _choose_current()
        self._finalizer.detach()

    # ---- life -----------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """End the machine: CPUs leave their idle loops and end in order.

        A CPU that is still busy after two seconds is killed, or on Ctrl-C, which is
        raised when the machine has ended. Pending futures fail with
        ``MachineDiedError``. A machine that this host is attached to goes on: only this
        host's part in it ends, and its pending futures fail with
        ``ClusterStateError``. Arrays in use keep their memory. Calling it again, or in
        a fork's child, does nothing, unless an interruption has left something to do.
        """
        if self._finalizer.alive and os.getpid() == self._host.owner:
            self._end()

    def __repr__(self) -> str:
        if not hasattr(self, "_machine"):
            return "<Cluster not booted>"
        if self.closed:
            return f"<Cluster {self.name!r} closed>"
        plan = self._host.plan
        return (
            f"<Cluster {self.name!r}{' attached' * self.attached}:"
            f" {plan.ncpus} CPUs, {len(self.online_mask)} online, idle={plan.idle},"
            f" doorbell={plan.doorbell},"
            f" controller={plan.controller.name}>"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Cluster is its host's and does not travel to CPUs: there, use"
            " shmipi.smp, shmipi.shared and shmipi.percpu"
        )

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._host.plan.name

    @property
    def attached(self) -> bool:
        """Did another process boot the machine?"""
        return isinstance(self._host, Guest)

    @property
    def closed(self) -> bool:
        """True after ``shutdown()``, and in a fork's child."""
        return self._machine.closed

    @property
    def idle(self) -> str:
        """The idle policy in force: what "auto" came to."""
        return self._host.plan.idle

    @property
    def doorbell(self) -> str:
        """The doorbell of a halted CPU."""
        return self._host.plan.doorbell

    @property
    def controller(self) -> str:
        """The name of the interrupt controller."""
        return str(self._host.plan.controller.name)

    @property
    def chip(self) -> Chip:
        """The interrupt controller, bound to this machine: its registers."""
        self._check()
        return self._chip

    @property
    def payload_max(self) -> int:
        """The most that one pickled argument or result may have, in bytes.

        It is 32 MiB with up to 63 CPUs, less with more.
        """
        return self._machine.payload_max

    @property
    def csd_lock_timeout(self) -> int:
        """Report waits that last longer, in ms; 0: never. As the kernel's parameter."""
        return self._machine.csd_lock_params()[0]

    @csd_lock_timeout.setter
    def csd_lock_timeout(self, ms: int) -> None:
        self._check()
        self._machine.set_csd_lock_params(*_milliseconds(ms, self.panic_on_ipistall))

    @property
    def panic_on_ipistall(self) -> int:
        """Give waits up that are reported and last longer, in ms; 0: never."""
        return self._machine.csd_lock_params()[1]

    @panic_on_ipistall.setter
    def panic_on_ipistall(self, ms: int) -> None:
        self._check()
        self._machine.set_csd_lock_params(*_milliseconds(self.csd_lock_timeout, ms))

    def _check(self) -> None:
        if os.getpid() != self._host.owner:
            raise ClusterStateError(
                "this cluster belongs to the parent process: a fork's child can not"
                " use it"
            )
        if self.closed or self._host.closing:
            raise ClusterStateError("this cluster is closed")
        # Another host may have noticed, and written it down, before this one has.
        if self._host.died or self._machine.state == _core.DEAD:
            raise self._host.end_error()

    # ---- what there is --------------------------------------------------------------

    @property
    def ncpus(self) -> int:
        """How many CPUs the machine has, online or not."""
        return self._host.plan.ncpus

    @property
    def cpus(self) -> tuple[Cpu, ...]:
        """Every CPU as it is now."""
        self._check()
        return tuple(self._look(self._cpu(n)) for n in range(self.ncpus))

    def _look(self, cpu: Cpu) -> Cpu:
        """Say what an online CPU does, beside its state."""
        kind, handler, begun, task = self._machine.doing(cpu.id)
        if cpu.state in ("offline", "dead"):
            return cpu
        return replace(
            cpu,
            state=_HANDLER_STATES.get(kind, cpu.state),
            handler=handler,
            since=max(0, time.monotonic_ns() - begun) / 1e9 if begun else None,
            task=task,
        )

    def _cpu(self, number: int) -> Cpu:
        slot = self._machine.slot(number)
        word = _STATES[slot.state] if slot.state < len(_STATES) else "dead"
        return Cpu(number, slot.pid, slot.core, word, slot.generation)

    @property
    def online_mask(self) -> CpuMask:
        """The CPUs that are online (the kernel's cpu_online_mask)."""
        self._check()
        return CpuMask(
            n
            for n in range(self.ncpus)
            if self._cpu(n).state not in ("offline", "dead")
        )

    def counters(self) -> dict[str, NDArray[np.uint64]]:
        """Return what each CPU counted since boot: name -> array of shape (ncpus,)."""
        self._check()
        return self._counters.cpus()

    def host_counters(self) -> dict[str, int]:
        """Return what the host counted as a sender: name -> number."""
        self._check()
        return self._counters.host()

    def interrupts(self) -> str:
        """Return the counts in the shape of ``/proc/interrupts``."""
        self._check()
        return interrupts(self._counters)

    def trace_events(self) -> NDArray[Any]:
        """Return the tracepoints recorded so far, oldest first, as a structured array.

        Fields: slot (who wrote it: a CPU's number, or ``ncpus`` for the host), stamp
        (ns, CLOCK_MONOTONIC), event (a ``shmipi.TraceEvent``), flags, cpu, csd, func,
        arg, site, seq. Empty unless it was made with ``trace=True``, or ``tracing`` was
        started. ``tracing.read()`` has them with the kernel's names and fields.
        """
        self._check()
        return events.read(self._machine)

    # ---- calls ----------------------------------------------------------------------

    def call(
        self,
        cpu: int,
        func: Callable[..., _Result],
        /,
        *args: Any,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> _Result:
        """Run ``func(*args, **kwargs)`` on ``cpu`` as an IPI handler: its result.

        It runs in interrupt context: with interrupts off on that CPU, on top of
        whatever task is running there, at once if the CPU is idle, else at the task's
        next bytecode boundary. So it must be short, must not wait for what that task
        holds, and delays every other call to that CPU; ``run()`` is for longer work.

        ``timeout`` is in seconds. Raises ``RemoteCallError`` (the function raised; the
        original is its ``__cause__``), ``CpuOfflineError``, ``CpuDiedError``,
        ``IpiTimeoutError`` (it stays queued and may still run), ``MachineDiedError``,
        ``ArenaFullError``, and what pickling raises.
        """
        result: _Result = self._machine.call(cpu, func, args, kwargs or None, timeout)
        return result

    def submit(
        self, cpu: int, func: Callable[..., _Result], /, *args: Any, **kwargs: Any
    ) -> Future[_Result]:
        """Start ``call(cpu, func, ...)``; return a ``concurrent.futures.Future``.

        ``func`` runs in interrupt context, as with ``call``, whose errors are the
        future's. A future that was started cannot be cancelled. Waits for one to end
        when all requests are in flight, or fill /dev/shm.
        """
        self._check()
        return self._futures.submit(cpu, func, args, kwargs or None)

    def start(
        self,
        func: Callable[..., _Result],
        /,
        *args: Any,
        cpus: MaskLike | None = None,
        **kwargs: Any,
    ) -> Tasks[_Result]:
        """Start ``func(*args, **kwargs)`` as a task on each CPU; return their handles.

        A task may take long, sleep and be interrupted; a CPU runs one at a time, the
        next when the one before it has ended. ``cpus=None``: the CPUs that are online.
        An ``async def`` function runs in an event loop of its own (``asyncio.run``).
        For keyword arguments named ``cpus`` use ``functools.partial``.

        What is wrong is an error before any of them runs: ``CpuOfflineError`` when a
        CPU is not online, ``ValueError`` for an empty mask, ``ArenaFullError`` for
        arguments too large: all CPUs share one copy of them.
        """
        self._check()
        tasks: Tasks[_Result] = Tasks(self, func)
        try:
            tasks._start(self._targets(cpus), func, args, kwargs)
        except BaseException as error:
            tasks._give_up(error)
            raise
        return tasks

    def run(
        self,
        func: Callable[..., _Result],
        /,
        *args: Any,
        cpus: MaskLike | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list[_Result]:
        """Run ``func(*args, **kwargs)`` as a task on each CPU: results in CPU order.

        It is ``start`` and a wait for all. ``timeout`` is in seconds: tasks that have
        not ended by then are cancelled (``Task.cancel``), and ``IpiTimeoutError`` names
        their CPUs. So they are when the wait is interrupted, by Ctrl-C for example,
        which ends it after a second at most.

        Raises what one task's call raises, or a ``CpusFailedError`` (an
        ``ExceptionGroup``) of several, after all have ended; the error's ``results``
        has what the other CPUs returned. Raises what ``start`` raises. For keyword
        arguments named ``cpus`` or ``timeout`` use ``functools.partial``.
        """
        self._check()
        check_timeout(timeout)
        targets = self._targets(cpus)
        tasks: Tasks[_Result] = Tasks(self, func)
        try:
            tasks._start(targets, func, args, kwargs)
            return tasks._run(timeout)
        except BaseException as error:
            if not isinstance(error, Exception) or isinstance(error, IpiStallError):
                tasks._give_up(error)
            raise

    def _targets(self, cpus: MaskLike | None) -> CpuMask:
        online = self.online_mask
        mask = online if cpus is None else CpuMask.of(cpus, self.ncpus)
        if cpus is None and not mask:
            self._machine.refuse(0)  # as every other is, it is offline
        if not mask:
            raise ValueError("cpus is empty: there is nothing to run on")
        for cpu in mask - online:
            self._machine.refuse(cpu)
        return mask

    # What tasks want of it.

    def _generation(self, cpu: int) -> int:
        return self._cpu(cpu).generation

    def _kill(self, cpu: int, generation: int) -> bool:
        """Have a CPU's process killed: was it online?"""
        online = self._cpu(cpu).state != "offline"
        self._host.kill_cpu(cpu, generation)
        return online

    def _revive(self, cpu: int) -> None:
        self.online(cpu)

    # ---- memory ---------------------------------------------------------------------

    def percpu(
        self, name: str, dtype: DTypeLike, shape: int | tuple[int, ...] = ()
    ) -> SharedArray:
        """Return array ``name`` with a row per CPU: shape (ncpus, *shape), zeroed.

        Each row is on cache lines of its own. ``shmipi.percpu(name)`` on a CPU is the
        same memory; so is the array when it is pickled. Raises ``ValueError`` when the
        name is in use with another dtype or shape, ``ArenaFullError`` when /dev/shm is
        full.
        """
        self._check()
        return self._arrays.make("percpu", name, dtype, shape)

    def shared(
        self, name: str, dtype: DTypeLike, shape: int | tuple[int, ...] = ()
    ) -> SharedArray:
        """Return array ``name`` of ``shape``, zeroed, shared by all CPUs and the host.

        As ``percpu`` otherwise. Use ``shmipi.atomic`` where several CPUs write.
        """
        self._check()
        return self._arrays.make("shared", name, dtype, shape)

    def completion(self, name: str) -> Completion:
        """Return completion ``name``, not done at first; see ``smp.Completion``.

        It is the same everywhere: ``smp.completion(name)`` on a CPU, or sent there.
        Raises ``ArenaFullError`` when /dev/shm is full.
        """
        self._check()
        return Completion.make(self._arrays, name)

    def wait_queue(self, name: str) -> WaitQueue:
        """Return wait queue ``name``; see ``smp.WaitQueue``. As ``completion``."""
        self._check()
        return WaitQueue.make(self._arrays, name)

    # ---- hotplug --------------------------------------------------------------------

    def offline(self, cpu: int, timeout: float | None = None) -> None:
        """Take ``cpu`` offline in order: all CPUs stop, it drains its queue and parks.

        Calls that were queued have run; from then on calls to it raise
        ``CpuOfflineError``. A task that it runs is stopped where it stands, and tasks
        that it has not begun wait, until ``online(cpu)``; tasks of the scheduler that
        can move go elsewhere, when their step has ended (within 0.2 s). Sections with
        preemption or interrupts disabled, on any CPU, and anybody's
        ``smp.cpus_read_lock()``, hold this off. Nothing happens if it is offline
        already. Raises ``CpuOfflineError`` for what is no CPU, ``HotplugError`` (EBUSY
        for the last that is online, or what a callback of ``smp.cpuhp_setup_state``
        refuses with: it stays), ``IpiTimeoutError``, which names who did not stop,
        after ``timeout`` seconds (None: 10, once it is its turn; the request stands
        withdrawn), ``CpuDiedError``.
        """
        self._check()
        self._exists(cpu)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._hotplug(timeout):
            if self._cpu(cpu).state in ("offline", "dead"):
                return
            if deadline is None:
                deadline = time.monotonic() + STOP_TIMEOUT_S
            if len(self.online_mask) == 1:
                raise HotplugError(
                    f"CPU {cpu} is the last one that is online: it stays",
                    cpu=cpu,
                    errno=errno.EBUSY,
                )
            self._cpuhp.leave(cpu)
            try:
                self._take_down(cpu, deadline)
            except BaseException:
                self._machine.wake_cpu(cpu)
                with contextlib.suppress(IpiTimeoutError, MachineDiedError):
                    # It may have gone just then: the request stands withdrawn.
                    self._await(cpu, lambda state: state != "offline", 1.0, start=True)
                if self._cpu(cpu).state == "dead":
                    self._cpuhp.gone(cpu)
                else:
                    self._cpuhp.stays(cpu)
                raise
            self._cpuhp.gone(cpu)

    def _take_down(self, cpu: int, deadline: float) -> None:
        """Stop all CPUs, and have ``cpu`` leave (``takedown_cpu``)."""
        dying = self._cpuhp.dying(cpu)
        while True:
            if self._cpu(cpu).state == "dead":
                raise CpuDiedError(f"CPU {cpu} died before it was offline", cpu=cpu)
            left = max(0.0, deadline - time.monotonic())
            try:
                code = take_cpu_down(
                    self._machine, list(self.online_mask), cpu, dying, left
                )
            except CpuDiedError as error:
                if error.cpu == cpu:
                    continue
                code = -errno.EAGAIN  # of another: once more, without it
            if not code:
                return
            if code != -errno.EAGAIN:
                self._check()
                raise HotplugError(f"CPU {cpu} stays", cpu=cpu, errno=-code)
            # Its results wait for room: for their readers, who are stopped meanwhile;
            # or a step of a task that can move has not ended there.
            self._machine.make_room(cpu)
            if time.monotonic() >= deadline:
                raise IpiTimeoutError(
                    f"CPU {cpu} has results to send, and nobody makes room, or a step"
                    " of a task that has not ended",
                    cpu=cpu,
                )
            time.sleep(_HOTPLUG_NAP_S)

    def online(self, cpu: int, timeout: float | None = None) -> None:
        """Bring ``cpu`` back: a parked one goes on, a dead one is booted anew.

        A new process in the slot has a new generation. Raises ``CpuOfflineError`` for a
        CPU that does not exist, ``BootError``, ``IpiTimeoutError``, ``HotplugError``
        when a callback (``smp.cpuhp_setup_state``) refuses.
        """
        self._check()
        self._exists(cpu)
        with self._hotplug(timeout):
            state = self._cpu(cpu).state
            if state not in ("offline", "dead"):
                return
            self._cpuhp.prepare(cpu)
            try:
                self._bring_up(cpu, state, timeout)
            except BaseException:
                self._cpuhp.gone(cpu)
                raise
            try:
                self._cpuhp.came(cpu)
            except BaseException:
                with contextlib.suppress(ShmipiError):
                    self._take_down(cpu, time.monotonic() + STOP_TIMEOUT_S)
                self._cpuhp.gone(cpu)
                raise

    def _bring_up(self, cpu: int, state: str, timeout: float | None) -> None:
        if state == "offline":
            self._machine.wake_cpu(cpu)
            state = self._await(
                cpu, lambda state: state != "offline", timeout, start=True
            )
        if state == "dead":
            self._host.boot_cpu(cpu)
        # Online for interrupts, it takes tasks a moment later: cpu_up() returns after
        # sched_cpu_activate(), too.
        self._await(
            cpu,
            lambda state: (
                state in ("offline", "dead") or self._machine.sched_rq(cpu)[2]
            ),
            timeout,
        )

    @contextlib.contextmanager
    def _hotplug(self, timeout: float | None) -> Iterator[None]:
        """One change at a time, of all threads of all hosts (cpu_hotplug_lock)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # Who has the turn keeps this object, and nobody else does: an exception that
        # comes between any two steps (Ctrl-C) ends the turn with the frame it was in.
        turn = _Turn()
        try:
            while not self._take_turn(turn):
                self._check()
                if deadline is not None and time.monotonic() >= deadline:
                    raise IpiTimeoutError(
                        "another thread takes a CPU off- or online for more than"
                        f" {timeout} s"
                    )
                time.sleep(_HOTPLUG_NAP_S)
            with locks.held(self._machine, "hotplug", timeout, self._check):
                self._await_readers(deadline)
                yield
        finally:
            del turn  # the frame may live on in a traceback

    def _take_turn(self, turn: _Turn) -> bool:
        with self._hotplug_lock:
            if self._hotplug_turn() is not None:
                return False
            self._hotplug_turn = weakref.ref(turn)
            return True

    def _await_readers(self, deadline: float | None) -> None:
        """Wait until nobody is in ``cpus_read_lock()``; none comes from now on."""
        while (reader := self._machine.cpus_reader()) >= 0:
            self._check()
            if deadline is not None and time.monotonic() >= deadline:
                who = f"CPU {reader}" if reader < self.ncpus else "a host"
                raise IpiTimeoutError(f"{who} holds cpus_read_lock()")
            time.sleep(_HOTPLUG_NAP_S)

    def _exists(self, cpu: int) -> None:
        if not 0 <= cpu < self.ncpus:
            self._machine.refuse(cpu)

    def _await(
        self,
        cpu: int,
        reached: Callable[[str], object],
        timeout: float | None,
        start: bool = False,
    ) -> str:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            seen = self._machine.hotplug_event
            if start:
                self._chip.bring_up(cpu)
            state = self._cpu(cpu).state
            if reached(state):
                return state
            self._check()
            if deadline is not None and time.monotonic() >= deadline:
                raise IpiTimeoutError(
                    f"CPU {cpu} did not change its state in {timeout} s: is it stopped,"
                    " or running with interrupts disabled?",
                    cpu=cpu,
                )
            self._machine.wait_hotplug(seen, _HOTPLUG_LOOK_S)


class _Turn:
    """A thread's turn to take CPUs off- and online; see ``Cluster._hotplug``."""

    __slots__ = ("__weakref__",)


def _settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
    """Run the done-callbacks: whatever one raises, the other futures go on."""
    try:
        set_outcome(outcome)
    except BaseException:
        threading.excepthook(
            threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
        )


class _Futures:
    """Completes ``submit``'s futures: a thread that sleeps on the host's doorbell."""

    def __init__(self, machine: _core.Machine, host: Host | Guest) -> None:
        self._machine = machine
        self._host = host
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[int, Future[Any]]] = {}
        self._stalls: dict[int, Stall] = {}  # by call, of those that are pending
        self._stalls_look = 0.0
        self._ended = 0  # calls that are not pending, and whose results are being read
        self._thread: threading.Thread | None = None
        self._stop = False

    def submit(
        self,
        cpu: int,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
    ) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        while True:
            seen = self._machine.event
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(
                        target=self._complete, name="shmipi-futures", daemon=True
                    )
                    start_thread(thread)
                    self._thread = thread
                ends = bool(self._pending or self._ended)  # before: an end makes room
                # Under the lock: the thread must not meet a call without a future.
                try:
                    call = self._machine.post(cpu, func, args, kwargs, False)
                except ArenaFullError as error:
                    if not self._makes_room(error.errno, ends):
                        raise
                else:
                    self._pending[call] = (cpu, future)
                    return future
            # Every request is in flight, or fills /dev/shm: one has to end first.
            self._machine.wait_event(seen, 0.01)

    def _makes_room(self, code: int | None, ends: bool) -> bool:
        """Does the end of a call give back what this one lacks?"""
        if code == errno.EAGAIN:
            return bool(self._pending)
        # What was sent lies in /dev/shm until its result has been read: by the thread,
        # but not while a callback there submits.
        reads = threading.current_thread() is self._thread
        return code == errno.ENOSPC and ends and not reads

    def _complete(self) -> None:
        machine = self._machine
        while True:
            seen = machine.event
            if self._stop:  # after that: else its ring is one that was seen
                return
            with self._lock:
                done = [
                    (call, *self._pending.pop(call))
                    for call in list(self._pending)
                    if machine.done(call)
                ]
                busy = bool(self._pending)
                self._ended = len(done)
            for call, cpu, future in done:
                if stall := self._stalls.pop(call, None):
                    stall.over()
                try:
                    result = machine.collect(call, cpu, None)
                except BaseException as error:
                    _settle(future.set_exception, error)
                else:
                    _settle(future.set_result, result)
            self._ended = 0
            self._look_for_stalls()
            if machine.state == _core.DEAD or self._host.died:
                self._fail()
            if not done:
                # A limit although every end rings: the ring may die with its ringer.
                machine.wait_event(seen, 0.01 if busy else 1.0)

    def _all_pending(self) -> Iterable[tuple[int, tuple[int, Future[Any]]]]:
        # Not list(items()): it makes tuples, which may start a collection, whose
        # finalizers let others run, who submit: the dictionary changes under it.
        return self._pending.copy().items()

    def _look_for_stalls(self) -> None:
        now = time.monotonic()
        if now < self._stalls_look:  # each look is at all of them
            return
        timeout = self._machine.csd_lock_params()[0]
        self._stalls_look = now + min(max(timeout / 4000, 0.01), 1.0)
        for call, (cpu, _) in self._all_pending():
            if call not in self._stalls:
                self._stalls[call] = Stall(self._machine, call, cpu)
            try:
                self._stalls[call].look()
            except IpiStallError as error:
                with self._lock:
                    _, future = self._pending.pop(call)
                    del self._stalls[call]
                    self._machine.abandon(call)
                _settle(future.set_exception, error)

    def _fail(self) -> None:
        for call, (cpu, future) in self._all_pending():
            self._fail_one(call, cpu, future)
            with self._lock:
                self._pending.pop(call, None)  # last: until then it can be done again
                self._stalls.pop(call, None)

    def _fail_one(self, call: int, cpu: int, future: Future[Any]) -> None:
        if future.done():
            return
        if self._machine.done(call):
            with contextlib.suppress(Exception):
                future.set_result(self._machine.collect(call, cpu, None))
                return
        future.set_exception(self._end_error(cpu))

    def _end_error(self, cpu: int) -> ShmipiError:
        what = "with this call in hand: it may or may not have run"
        if isinstance(self._host, Guest) and self._machine.state < _core.STOPPING:
            return ClusterStateError(f"this host detached {what}")
        if isinstance(self._host, Guest) and self._machine.shut_down:
            return ClusterStateError(f"{self._host.end_error()} {what}")
        return MachineDiedError(f"the machine ended {what}", cpu=cpu)

    def close(self) -> None:
        self._stop = True
        with contextlib.suppress(ClusterStateError):
            self._machine.ring_event()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        self._fail()


# ---- the clusters of this process ---------------------------------------------------

_open_clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()


def _choose_current() -> None:
    """Module-level ``shmipi.smp`` acts on the open cluster if there is just one."""
    if process.is_part():
        return  # there it is the machine that this process is a part of
    clusters = list(_open_clusters)
    for cluster in clusters:
        cluster._machine.set_current(False)
        cluster._arrays.make_current(False)
    _core.set_open(len(clusters))
    if len(clusters) == 1:
        clusters[0]._machine.set_current(True)
        clusters[0]._arrays.make_current()


class _Ending:
    """What ends a machine in this process: a call of it, and any number of calls.

    An interruption (Ctrl-C) can come between any two bytecodes. So each step can be
    done again, and the one that says that all are done is the last.
    """

    def __init__(self, host: Host | Guest) -> None:
        self.host = host
        self.futures: _Futures | None = None
        self.arrays: Arrays | None = None
        self.cpuhp: CpuHotplug | None = None
        #: What `shmipi trace record -- COMMAND` asks of it, and who does it.
        self.recorded: tuple[Asked, Recorder] | None = None
        self._done = False

    def __call__(self) -> None:
        host = self.host
        if self._done or os.getpid() != host.owner:
            return
        if isinstance(host, Host):
            host.close()
            self._close_users()
        else:  # the machine goes on: first nobody uses it, then it is left
            host.leave()  # threads that wait for what another host has give up
            self._close_users()
            host.close()
        machine = getattr(host, "machine", None)
        if machine is not None:
            controllers.forget(machine)
            irqs.forget(machine)
            machine.close()
        recorded, self.recorded = self.recorded, None
        self._done = True
        if recorded is not None:
            # Its memory is there for as long as this holds it.
            asked, recorder = recorded
            with contextlib.suppress(OSError):
                asked.end(recorder)

    def last(self) -> None:
        """At the interpreter's end, or with the Cluster: nobody hears of errors."""
        try:
            self()
        except KeyboardInterrupt:
            self.host.hurry()
            self()

    def _close_users(self) -> None:
        if self.futures is not None:
            self.futures.close()
        if self.cpuhp is not None:
            self.cpuhp.close()
        if self.arrays is not None:
            self.arrays.close()


def _after_fork_in_child() -> None:
    for cluster in list(_open_clusters):
        cluster._finalizer.detach()
        cluster._host.disown()
    _open_clusters.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- checking arguments -------------------------------------------------------------


def _plan(
    ncpus: int | None,
    idle: str,
    doorbell: str,
    kick: bool | int,
    controller: str | Chip | type[Chip],
    cores: str | Sequence[int],
    name: str | None,
    handlers: Iterable[str],
    trace: bool | int,
    steps: bool = False,
    arena_bytes: int = 0,
    domains: Description | None = None,
    preload: Iterable[str] = (),
) -> Plan:
    if ncpus is None:
        ncpus = topology.default_ncpus()
    if isinstance(ncpus, bool) or not isinstance(ncpus, int):
        raise TypeError(f"ncpus is {ncpus!r}: give a number of CPUs, or None")
    if not 1 <= ncpus <= _core.MAX_CPUS:
        raise ValueError(f"ncpus is {ncpus}: a machine has 1 to {_core.MAX_CPUS} CPUs")
    chip = _chip(controller).for_cpus(ncpus)
    nodes = parse_tree(domains)
    check_tree(nodes, chip, ncpus)
    if doorbell not in DOORBELLS:
        raise ValueError(
            f"doorbell is {doorbell!r}: choose from {', '.join(map(repr, DOORBELLS))}"
        )
    if idle not in ("auto", *IDLE):
        raise ValueError(
            f"idle is {idle!r}: choose from 'auto', {', '.join(map(repr, IDLE))}"
        )
    placement = topology.place(ncpus, cores)
    if idle == "auto":
        idle = topology.auto_idle(placement)
    return Plan(
        name=segment.check_name(name),
        cores=placement,
        idle=idle,
        doorbell=doorbell,
        kick=kick is not False,
        kick_signal=_kick_signal(kick),
        nmi_signal=_nmi_signal(_kick_signal(kick)),
        controller=chip,
        handlers=_handlers(handlers),
        oversubscribed=topology.oversubscribed(placement),
        trace=rings.check_records(trace)
        if not isinstance(trace, bool)
        else rings.RECORDS * trace,
        steps=steps,
        arena_bytes=arena_bytes,
        domains=nodes,
        preload=_modules(preload),
    )


def _milliseconds(timeout: int, panic: int) -> tuple[int, int]:
    for name, ms in (("csd_lock_timeout", timeout), ("panic_on_ipistall", panic)):
        if isinstance(ms, bool) or not isinstance(ms, int):
            raise TypeError(f"{name} is {ms!r}: give milliseconds, 0 for never")
        if not 0 <= ms < 1 << 32:
            raise ValueError(f"{name} is {ms}: give milliseconds, 0 for never")
    return timeout, panic


def _chip(controller: str | Chip | type[Chip]) -> Chip:
    if isinstance(controller, Chip):
        return controller
    if isinstance(controller, type) and issubclass(controller, Chip):
        return controller()
    if not isinstance(controller, str) or controller not in CHIPS:
        raise ControllerError(
            f"controller is {controller!r}: choose from {', '.join(map(repr, CHIPS))},"
            " or give a Chip of your own",
            domain=str(controller),
        )
    return CHIPS[controller]()


def _nmi_signal(kick: int) -> int:
    return kick + 1 if kick < signal.SIGRTMAX else kick - 1


def _kick_signal(kick: bool | int) -> int:
    if isinstance(kick, bool):
        return signal.SIGRTMIN + _KICK_OFFSET
    if not isinstance(kick, int) or not signal.SIGRTMIN <= kick <= signal.SIGRTMAX:
        raise ValueError(
            f"kick is {kick!r}: True, False or a real-time signal"
            f" ({int(signal.SIGRTMIN)} to {int(signal.SIGRTMAX)})"
        )
    return int(kick)


def _modules(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError("preload is a list of names, not one string")
    chosen = tuple(names)
    for name in chosen:
        if not isinstance(name, str) or not name:
            raise TypeError(f"preload has {name!r}: give the names of modules")
    return chosen


def _handlers(handlers: Iterable[str]) -> tuple[str, ...]:
    if isinstance(handlers, str):
        raise TypeError("handlers is a list of names, not one string")
    builtin = ("noop", "count", "stamp", "burn")
    chosen = []
    for spec in handlers:
        if spec in builtin:
            continue
        path, colon, symbol = str(spec).rpartition(":")
        if not colon or not path or not symbol:
            raise ValueError(
                f"native handler {spec!r}: give FILE.so:symbol or one of"
                f" {', '.join(builtin)}"
            )
        if not os.path.exists(path):
            raise BootError(f"native handler {spec}: there is no file {path}", errno=2)
        chosen.append(f"{os.path.abspath(path)}:{symbol}")
    return tuple(chosen)
