"""Per-CPU irqs: who handles them, and on which CPUs (``kernel/irq/manage.c``).

``request_percpu_irq(virq, handler, name, dev_id)`` publishes a handler for all CPUs;
``enable_percpu_irq(virq)`` then lets the interrupt through on the CPU that calls it.
``enable_percpu_irq_mask(virq, cpus)``, which the kernel does not have, does so on
several CPUs, for the host as well. An interrupt that comes before that stays pending;
one that is let through and that nobody has requested is masked where it came, as
spurious (``handle_percpu_devid_irq``). A CPU that goes offline takes none, and what is
sent to it then is lost; when it is back, also as a new process after a kill, what was
enabled is enabled: the masks are the controller's, in the machine's memory. (In the
kernel each driver does that with a hotplug callback.)

The handler is called as ``handler(irq, dev_id)`` in interrupt context on the CPU that
took it; it may return ``IRQ_HANDLED`` or ``IRQ_NONE``, which nobody looks at, as in the
kernel. A ``dev_id`` that is a per-CPU array (``cluster.percpu``) is handed over as that
CPU's row, as the kernel's ``__percpu`` pointer is; a row of one number as an array of
one. A ``NativeHandler`` gets ``dev_id`` as its info: an int, a shared array, or that
CPU's row of a per-CPU array.

A Python handler is the function as it was when it was requested, whatever becomes of
the function object, and belongs to the process that requested it. When that was a CPU
and it dies, the irq stays requested but nobody handles it: interrupts are counted as
``irq_other`` until somebody frees it and requests it anew. Native handlers have no
owner.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from operator import index
from typing import Any, NoReturn, TypeAlias

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import ClusterStateError, IrqError, ShmipiWarning
from shmipi.irq.ipi import IpiCalls
from shmipi.irq.irqdesc import IrqDesc, refuse
from shmipi.irq.irqdomain import SYNCHRONIZE_S
from shmipi.irq.table import (
    INVALID_HWIRQ,
    IRQ_TYPE_EDGE_RISING,
    IRQ_TYPE_NONE,
    IRQ_TYPE_SENSE_MASK,
    IrqFlags,
    irq_name,
)
from shmipi.machine.arrays import SharedArray

__all__ = ["IrqHandler", "PercpuCalls"]

IrqHandler: TypeAlias = Callable[..., object] | _core.NativeHandler


class PercpuCalls(IpiCalls):
    """Requesting and enabling irqs of one machine."""

    def __init__(self) -> None:
        # What this process requested: free_percpu_irq compares the dev_id.
        self._requested: dict[int, tuple[int, Any, Any]] = {}

    def request_percpu_irq(
        self, virq: int, handler: IrqHandler, name: str = "", dev_id: Any = None
    ) -> None:
        """Publish the handler of an irq; see the module for how it is called.

        ``name`` is for ``/proc/interrupts`` (31 bytes are kept). The irq is let through
        nowhere until it is enabled. ``IrqError``: EINVAL (no such irq, a coprocessor's,
        not per-CPU, no handler, no ``dev_id``), EBUSY (requested already);
        ``TypeError`` for a handler that is none, ``ClusterStateError`` in an interrupt
        handler.
        """
        machine = self.table.machine
        label = irq_name(name)
        if handler is not None and not (
            callable(handler) or isinstance(handler, _core.NativeHandler)
        ):
            raise TypeError(
                f"an irq handler is a function or a NativeHandler, not {handler!r}"
            )
        with self.table.locked():
            desc = self._percpu(virq)
            if handler is None:
                refuse(desc, "a handler is needed")
            if dev_id is None:
                refuse(desc, "a dev_id is needed: a per-CPU array, as a rule")
            if self.table.action(virq):
                refuse(desc, "it is requested already", code=errno.EBUSY)
            # A new one may be in use by those who look it up: the name goes before it.
            self.table._store("name", virq, label)
            if isinstance(handler, _core.NativeHandler):
                published: Any = handler
                stride = dev_id.strides[0] if _is_percpu(dev_id, machine) else 0
                info = dev_id[0:1] if stride else dev_id
                machine.irq_request(virq, handler, info, stride)
            else:
                published = _plain(handler, dev_id, machine)
                machine.irq_request(virq, published, None)
            self._requested[virq] = (desc.epoch, published, dev_id)

    def free_percpu_irq(
        self, virq: int, dev_id: Any = None, *, timeout: float = SYNCHRONIZE_S
    ) -> None:
        """Withdraw the handler of an irq that is enabled nowhere any more.

        Returns when it is in progress on no CPU, as ``synchronize_irq``; what was taken
        and not begun is dropped. Any process may free it. As in the kernel this only
        warns (``ShmipiWarning``), and changes nothing, when it is not requested, still
        enabled on a CPU, or was requested by this process with another ``dev_id``. No
        such irq, or one that is not per-CPU: nothing. ``IpiTimeoutError``: it is
        withdrawn, but still in progress after ``timeout`` seconds;
        ``ClusterStateError`` in an interrupt handler.
        """
        with self.table.locked():
            desc = self._percpu_or_none(virq)
            if desc is None:
                return
            known = self._requested.get(virq)
            mine = known is not None and known[0] == desc.epoch
            enabled = self._enabled(desc)
            problem = ""
            if not self.table.action(virq) or (
                mine and known is not None and dev_id is not known[2]
            ):
                problem = f"Trying to free already-free IRQ {virq}"
            elif enabled:
                problem = f"percpu IRQ {virq} still enabled on CPU{enabled.first}!"
            else:
                self.table.machine.irq_free(virq)
                self._requested.pop(virq, None)
        if problem:
            warnings.warn(problem, ShmipiWarning, stacklevel=2)
        else:
            self._let_end(virq, self._places_of(virq), timeout)

    def request_percpu_nmi(
        self, virq: int, handler: IrqHandler, name: str = "", dev_id: Any = None
    ) -> NoReturn:
        """Refuse: ``IrqError`` EINVAL, as where ``irq_supports_nmi`` is false.

        No controller here delivers an irq of a domain as an NMI: what those deliver so
        is ``smp_send_nmi_ipi``'s and ``register_nmi_handler``'s.
        """
        desc = self._percpu(virq)
        refuse(desc, f"the chip of domain {desc.domain.name} has no NMIs for irqs")

    def enable_percpu_irq(self, virq: int, type: int = IRQ_TYPE_NONE) -> None:
        """Let an irq through on this CPU; one that is pending is taken at once.

        ``type`` is an ``IRQ_TYPE_*``. An SGI of a GIC is IRQ_TYPE_EDGE_RISING: with
        another the irq is not enabled (``ShmipiWarning``, ``gic_set_type``); other
        controllers have nothing to set. As in the kernel no such irq, or one that is
        not per-CPU, is nothing. ``IrqError`` EINVAL: it is not for this CPU;
        ``ClusterStateError`` in the host, which has ``enable_percpu_irq_mask``.
        """
        cpu = self._this_cpu("enable_percpu_irq_mask")
        desc = self._percpu_or_none(virq)
        if desc is None:
            return
        sense = index(type) & IRQ_TYPE_SENSE_MASK
        edge_only = self.table.chip.flow == "sgi"
        if edge_only and sense not in (IRQ_TYPE_NONE, IRQ_TYPE_EDGE_RISING):
            warnings.warn(
                f"failed to set type for IRQ{virq}: it is edge triggered",
                ShmipiWarning,
                stacklevel=2,
            )
            return
        self._switch(desc, CpuMask([cpu]), True)

    def disable_percpu_irq(self, virq: int) -> None:
        """Hold an irq back on this CPU: what comes stays pending.

        No such irq: nothing. ``ClusterStateError`` in the host.
        """
        cpu = self._this_cpu("disable_percpu_irq_mask")
        desc = self._percpu_or_none(virq)
        if desc is not None:
            self._switch(desc, CpuMask([cpu]), False)

    def enable_percpu_irq_mask(self, virq: int, cpus: MaskLike | None = None) -> None:
        """Let an irq through on ``cpus``; None: on all that it was reserved for.

        On a CPU that is offline it takes effect when that comes online. ``IrqError``
        EINVAL: no such irq, not per-CPU, or not for such a CPU.
        """
        self._switch_mask(virq, cpus, True)

    def disable_percpu_irq_mask(self, virq: int, cpus: MaskLike | None = None) -> None:
        """Hold an irq back on ``cpus``, as ``enable_percpu_irq_mask``."""
        self._switch_mask(virq, cpus, False)

    def irq_percpu_is_enabled(self, virq: int, cpu: int | None = None) -> bool:
        """Is an irq let through on this CPU (from the host: on ``cpu``)?

        False for no such irq, or one that is not per-CPU.
        """
        if cpu is None:
            cpu = self._this_cpu()
        desc = self._percpu_or_none(virq)
        return desc is not None and cpu in self._enabled(desc)

    def _switch_mask(self, virq: int, cpus: MaskLike | None, on: bool) -> None:
        desc = self._percpu(virq)
        chosen = self.table.affinity(virq)
        if cpus is not None:
            chosen = self.table.cpus([cpus] if isinstance(cpus, int) else cpus)
        self._switch(desc, chosen, on)

    def _switch(self, desc: IrqDesc, chosen: CpuMask, on: bool) -> None:
        foreign = chosen - self.table.affinity(desc.irq)
        if foreign:
            refuse(desc, f"it is not for CPUs {foreign}", foreign.first)
        for cpu in chosen:
            line = desc.mapping.hwirq(cpu)
            if line != INVALID_HWIRQ:
                self.table.machine.irq_enable_line(cpu, line, on)

    def _this_cpu(self, instead: str = "") -> int:
        machine = self.table.machine
        if not machine.is_cpu:
            hint = f": use {instead}(virq, cpus)" if instead else ""
            raise ClusterStateError(f"the host is no CPU: say which CPU is meant{hint}")
        return machine.id

    def _percpu_or_none(self, virq: int) -> IrqDesc | None:
        """irq_get_desc_lock(irq, IRQ_GET_DESC_CHECK_PERCPU)."""
        try:
            return self._percpu(virq)
        except IrqError:
            return None

    def _enabled(self, desc: IrqDesc) -> CpuMask:
        """The CPUs that let it through: what the controller's masks say."""
        machine, chip = self.table.machine, self.table.chip
        found = []
        for cpu in self.table.affinity(desc.irq):
            line = desc.mapping.hwirq(cpu)
            shared = line != INVALID_HWIRQ and chip.is_routed(line)
            register = "mask" if shared else "enable"
            if line != INVALID_HWIRQ and (
                machine.pic_read(0 if shared else cpu, register, line // 64)
                >> (line % 64)
                & 1
            ):
                found.append(cpu)
        return CpuMask(found)

    def _percpu(self, virq: int) -> IrqDesc:
        desc = self._desc(virq)
        if desc.flags & IrqFlags.IRQ_NOREQUEST:
            refuse(desc, "it is a coprocessor's: nobody here can request it")
        if not desc.flags & IrqFlags.IRQ_PER_CPU_DEVID:
            refuse(desc, "it is not per-CPU")
        if desc.irq != desc.ipi_base:
            refuse(desc, f"it is part of the block of irq {desc.ipi_base}")
        return desc

    def _was_requested(self, desc: IrqDesc) -> None:
        """An irq was destroyed with its handler."""
        self._requested.pop(desc.irq, None)
        warnings.warn(
            f"irq {desc.irq} of domain {desc.domain.name} was destroyed while it was"
            " requested: free_percpu_irq comes first",
            ShmipiWarning,
            stacklevel=3,
        )


def _is_percpu(dev_id: Any, machine: _core.Machine) -> bool:
    return (
        isinstance(dev_id, SharedArray)
        and dev_id._key is not None
        and dev_id._key[0] == "percpu"
        and dev_id.ndim > 0
        and dev_id.shape[0] == machine.ncpus
    )


def _plain(handler: Callable[..., object], dev_id: Any, machine: _core.Machine) -> Any:
    """Return a function of the irq alone: only functions travel by number.

    It has the handler's name, by which ``Cluster.cpus`` and ``shmipi ps`` show it.
    """
    call = _bound(handler, dev_id, machine)
    name = getattr(handler, "__qualname__", type(handler).__qualname__)
    call.__qualname__, call.__name__ = name, name.rpartition(".")[2]
    return call


def _bound(handler: Callable[..., object], dev_id: Any, machine: _core.Machine) -> Any:
    if _is_percpu(dev_id, machine):
        flat = dev_id.ndim == 1

        def call_percpu(irq: int) -> None:
            cpu = _core.smp_processor_id()
            handler(irq, dev_id[cpu : cpu + 1] if flat else dev_id[cpu])

        return call_percpu

    def call_dev(irq: int) -> None:
        handler(irq, dev_id)

    return call_dev
