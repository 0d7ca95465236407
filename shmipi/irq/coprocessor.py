"""Coprocessors: processes that take interrupts and are no CPUs of the machine.

A coprocessor is an interrupt controller of its own: a ``SINGLE`` domain without a
parent and with one hwirq. Its irq is marked NOREQUEST: CPUs and the host can send it,
and that is all. Its only target has number 0, so these are the same::

    cluster.irq.ipi_send_single(virq, 0)
    cluster.irq.irq_send_ipi_all(virq)

The line is one bit: interrupts that come before the coprocessor has looked collapse.
What else it is to know lies in shared arrays (``shmipi.shared``, ``shmipi.percpu``).

The process is forked by the firmware from its clean state, and ends with the machine.
"""

from __future__ import annotations

import contextlib
import errno
import random
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shmipi import _core
from shmipi.cpumask import CpuMask
from shmipi.errors import ClusterStateError, IrqError, MachineDiedError
from shmipi.irq.irqdesc import IrqDomain
from shmipi.irq.manage import PercpuCalls
from shmipi.irq.of import checked_name
from shmipi.irq.table import IrqDomainFlags, IrqFlags
from shmipi.machine import remote

if TYPE_CHECKING:
    from shmipi.machine.boot import Host

__all__ = ["Coprocessor", "CoprocessorCalls", "CoprocessorLine"]

_LOOK_S = 0.5


class CoprocessorLine:
    """A coprocessor's end of its interrupt line: the first argument of its function."""

    def __init__(self, machine: _core.Machine, number: int, name: str) -> None:
        self._machine = machine
        self._number = number
        #: What the coprocessor is called.
        self.name = name

    @property
    def virq(self) -> int:
        """The irq that interrupts it."""
        return self._machine.coproc(self._number).virq

    @property
    def pending(self) -> bool:
        """Is the line pending? Looking leaves it so."""
        return bool(self._machine.coproc(self._number).pending)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the line is pending and acknowledge it: True.

        False when it was not in ``timeout`` seconds. When the machine stops, this
        raises ``SystemExit``, which ends the process unless it is caught.
        """
        machine, number = self._machine, self._number
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            seen = machine.coproc_wait(number, 0, 0.0)
            if machine.coproc_take(number):
                return True
            if machine.state >= _core.STOPPING:
                raise SystemExit(0)
            left = _LOOK_S
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
                if left <= 0:
                    return False
            machine.coproc_wait(number, seen, left)


class _Start:
    """What the firmware's child runs; it arrives there pickled."""

    def __init__(self, name: str, func: bytes) -> None:
        self.name = name
        self.func = func

    def __call__(self, machine: _core.Machine, number: int) -> int:
        """Run the function: the process's exit status."""
        random.seed()
        np.random.seed()
        status = 0
        try:
            func, args = remote.loads(self.func)
            func(CoprocessorLine(machine, number, self.name), *args)
        except SystemExit as end:
            status = (
                end.code if isinstance(end.code, int) else int(end.code is not None)
            )
        except BaseException:
            traceback.print_exc()
            status = 1
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        return status


class Coprocessor:
    """A coprocessor as the host holds it; a context manager, which kills it."""

    def __init__(self, calls: CoprocessorCalls, domain: IrqDomain, virq: int) -> None:
        self._calls = calls
        #: Its domain: one hwirq.
        self.domain = domain
        #: What to send to.
        self.virq = virq
        #: The process.
        self.pid = 0

    def __repr__(self) -> str:
        state = "alive" if self.alive else "ended"
        return f"<Coprocessor {self.name} irq {self.virq} pid {self.pid} {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ClusterStateError, MachineDiedError):
            self.kill()

    @property
    def name(self) -> str:
        """What it was called when it was added."""
        return self.domain.name

    @property
    def alive(self) -> bool:
        """Does the process still run?"""
        machine = self._calls.table.machine
        if machine.closed or machine.state >= _core.DEAD:
            return False
        place = machine.coproc(self.domain.coprocessor)
        return place.pid == self.pid and place.virq == self.virq

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended: True, or False after ``timeout`` seconds.

        Its irq and domain are given back then.
        """
        machine = self._calls.table.machine
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if machine.closed:
                return True
            seen = machine.hotplug_event
            if not self.alive:
                break
            left = _LOOK_S
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
                if left <= 0:
                    return False
            machine.wait_hotplug(seen, left)
        self._calls._bury()
        return True

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its end. Nothing happens if it has ended."""
        if self.alive:
            self._calls._host_process().kill_coprocessor(self.pid)
        self.join()


class CoprocessorCalls(PercpuCalls):
    """Coprocessors of one machine: the host adds them."""

    _host: Host | None = None

    def _host_process(self) -> Host:
        if self._host is None:
            raise ClusterStateError("coprocessors are the host's to add and to end")
        return self._host

    def add_coprocessor(
        self, name: str, func: Callable[..., object], *args: Any
    ) -> Coprocessor:
        """Start a coprocessor: a process that runs ``func(line, *args)``.

        ``name`` is its irq domain's too. It ends when the function returns or the
        machine ends; what the function raises is printed. Only the host can do this.
        ``IrqError``: EEXIST (the name is taken), ENOMEM (a machine has 8 of them),
        what reserving an irq raises; ``OSError`` when no process can be made; what
        pickling raises.
        """
        host = self._host_process()
        if not callable(func):
            raise TypeError(f"a coprocessor runs a function, not {func!r}")
        with host.coprocessor_lock:  # one after another, none while the dead are buried
            start = remote.dumps(_Start(name, remote.dumps((func, args))))
            self._bury_dead()
            made = Coprocessor(self, *self._add(checked_name(name)))
            try:
                made.pid = host.start_coprocessor(
                    made.domain.coprocessor, made.virq, start
                )
            except BaseException:
                self._bury_dead()
                raise
        return made

    def _add(self, name: str) -> tuple[IrqDomain, int]:
        with self.table.locked():
            domains = self.domains
            if name == "root" or name in [domain.name for domain in domains]:
                raise IrqError(
                    f"there is an irq domain {name} already",
                    errno=errno.EEXIST,
                    domain=name,
                )
            taken = {domain.coprocessor for domain in domains}
            free = [n for n in range(_core.NCOPROC) if n not in taken]
            if not free:
                raise IrqError(
                    f"a machine has at most {_core.NCOPROC} coprocessors",
                    errno=errno.ENOMEM,
                    domain=name,
                )
            flags = IrqDomainFlags.IRQ_DOMAIN_FLAG_IPI_SINGLE
            domain = IrqDomain(
                self.table,
                self.table.add_domain(name, flags, -1, free[0], frozenset()),
            )
            try:
                virq = self._find_descs(domain, 1)
            except IrqError:
                self.table.drop_domain(domain.index)
                raise
            self.table.make(
                domain.index,
                virq,
                0,
                [0],
                CpuMask([0]),
                IrqFlags.IRQ_NOREQUEST | IrqFlags.IRQ_NO_BALANCING,
                name,
            )
        return domain, virq

    def _bury(self) -> None:
        host = self._host
        if host is not None:
            with host.coprocessor_lock:
                self._bury_dead()

    def _bury_dead(self) -> None:
        """Give back the irqs and domains of coprocessors that have ended."""
        machine = self.table.machine
        if machine.closed or machine.state >= _core.STOPPING:
            return
        with self.table.locked():
            for domain in self.domains:
                if not domain.is_coprocessor or machine.coproc(domain.coprocessor).virq:
                    continue
                for virq in self.table.virqs_of(domain.index):
                    self.table.destroy(virq, self._desc(virq).ipi_nr)
                self.table.drop_domain(domain.index)
