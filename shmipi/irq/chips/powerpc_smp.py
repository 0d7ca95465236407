"""arch/powerpc on top of an interrupt controller: messages, doorbells, lazy masking.

What powerpc's kernel does with the one IPI that its interrupt controller gives each
CPU, under the kernel's names: ``arch/powerpc/kernel/smp.c`` (messages behind the IPI),
``dbell.c`` (core doorbells) and ``irq_64.c`` (soft-masking). The methods below are the
sender's side and what else software can do by hand. A machine's own calls go the same
way without Python; who receives is always the core:

==================================================  ====================================
the kernel's function, on the receiving CPU         where it is here
==================================================  ====================================
masked_interrupt                                    flow_esb.c, esb_masked
arch_local_irq_restore, replay_soft_interrupts      entry.c, shi_irq_restore
do_IRQ, xive_get_irq, xive_scan_interrupts          flow_esb.c, get_irq
xive_read_eq                                        flow_esb.c, read_eq
xive_muxed_ipi_action, doorbell_exception           flow_esb.c, esb_next
smp_ipi_demux, smp_ipi_demux_relaxed                flow_esb.c, esb_next
generic_smp_call_function_interrupt, scheduler_ipi  chip.c, shi_chip_act
nmi_ipi_action                                      nmi.c, by_line
smp_handle_nmi_ipi                                  nmi.c, shi_nmi_ipi_native
__flush_smp_call_function_queue                     smp.c, flush_queue
xive_ipi_eoi, xive_irq_eoi, xive_do_source_eoi      flow_esb.c, end, source_eoi
==================================================  ====================================

In ``cluster.trace_events()`` a call from one CPU to another leaves ``chip_message``
(the byte is stored), ``chip_trigger`` (the ESB's trigger page is written), ``line_ack``
of the IPI and of the message, ``flush``, ``line_eoi`` of the message and ``chip_eoi``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import CpuOfflineError, IrqError
from shmipi.irq.chips.base import Chip

__all__ = [
    "DOORBELL_LINE",
    "IRQ_HANDLED",
    "NMI_IPI_ALL_OTHERS",
    "PACA_IRQ_DBELL",
    "PACA_IRQ_DEC",
    "PACA_IRQ_EE",
    "PACA_IRQ_HARD_DIS",
    "PACA_IRQ_HMI",
    "PACA_IRQ_PMI",
    "PPC_MSG_CALL_FUNCTION",
    "PPC_MSG_NMI_IPI",
    "PPC_MSG_RESCHEDULE",
    "PPC_MSG_RM_HOST_ACTION",
    "PPC_MSG_TICK_BROADCAST",
    "PowerpcSmp",
    "SmpOps",
    "smp_ipi_name",
]

# Messages behind the one IPI (asm/smp.h): a byte of `messages` each, and a line here.
PPC_MSG_CALL_FUNCTION = 0
PPC_MSG_RESCHEDULE = 1
PPC_MSG_TICK_BROADCAST = 2
PPC_MSG_NMI_IPI = 3
PPC_MSG_RM_HOST_ACTION = 4
NR_PPC_MSGS = 5

#: The core doorbell: no message, but the other way to them.
DOORBELL_LINE = 6

#: What the kernel calls the messages that may have an irq of their own.
smp_ipi_name = {
    PPC_MSG_CALL_FUNCTION: "ipi call function",
    PPC_MSG_RESCHEDULE: "ipi reschedule",
    PPC_MSG_TICK_BROADCAST: "ipi tick-broadcast",
    PPC_MSG_NMI_IPI: "nmi ipi",
}

#: In place of a CPU's number, for ``cause_nmi_ipi``.
NMI_IPI_ALL_OTHERS = -2

IRQ_HANDLED = 1

# paca->irq_happened (asm/hw_irq.h). Hypervisor maintenance, decrementer and performance
# monitor interrupts do not arise here: only EE and DBELL do.
PACA_IRQ_HARD_DIS = 0x01
PACA_IRQ_DBELL = 0x02
PACA_IRQ_EE = 0x04
PACA_IRQ_DEC = 0x08
PACA_IRQ_HMI = 0x10
PACA_IRQ_PMI = 0x20


@dataclass(frozen=True)
class SmpOps:
    """``struct smp_ops_t``: how a platform sends IPIs.

    ``message_pass(cpu, msg)`` where each message has an IPI of its own; None: the
    messages are muxed, and ``cause_ipi(cpu)`` causes the one IPI behind which they are.
    ``cause_nmi_ipi(cpu)`` causes a real NMI, and returns 1 if it did.
    """

    message_pass: Callable[[int, int], None] | None
    cause_ipi: Callable[[int], None]
    cause_nmi_ipi: Callable[[int], int] | None


class PowerpcSmp(Chip):
    """What powerpc's kernel adds to its interrupt controller.

    ``threads_per_core`` CPUs in a row are the threads of a core; with more than one,
    IPIs between them are doorbells. ``nmi_ipi`` is CONFIG_NMI_IPI: the message
    PPC_MSG_NMI_IPI runs the NMI's handler. That is the fallback where the platform has
    no ``cause_nmi_ipi``, and can be masked; ``smp_send_nmi_ipi`` here causes system
    resets, which cannot.
    """

    def __init__(self, threads_per_core: int = 1, *, nmi_ipi: bool = True) -> None:
        if threads_per_core < 1:
            raise ValueError(
                f"{self.name}: threads_per_core is {threads_per_core}, not 1 or more"
            )
        self.siblings = threads_per_core
        self.nmi_ipi = nmi_ipi

    # ---- topology -------------------------------------------------------------------

    @property
    def threads_per_core(self) -> int:
        """How many CPUs ring each other's doorbells."""
        return self.siblings

    def cpu_thread_in_core(self, cpu: int) -> int:
        """Return which thread of its core a CPU is, from 0."""
        return self._exists(cpu) % self.siblings

    def cpu_first_thread_sibling(self, cpu: int) -> int:
        """Return the first CPU of a CPU's core."""
        return self._exists(cpu) - cpu % self.siblings

    def cpu_sibling_mask(self, cpu: int) -> CpuMask:
        """Return the CPUs of a CPU's core, itself among them."""
        first = self.cpu_first_thread_sibling(cpu)
        return CpuMask(range(first, min(first + self.siblings, self.ncpus)))

    # ---- smp.c: sending -------------------------------------------------------------

    @property
    def smp_ops(self) -> SmpOps:
        """How this platform sends; a subclass may return another one.

        The methods below go by it. Calls of the machine itself are muxed, with a
        doorbell for siblings and the controller's IPI for all others, as these are.
        """
        raise NotImplementedError

    def do_message_pass(self, cpu: int, msg: int) -> None:
        """Send ``msg`` (PPC_MSG_*) to ``cpu``.

        Lost if the CPU is offline. Raises ``IrqError`` (EINVAL) for a message and
        ``CpuOfflineError`` for a CPU that does not exist.
        """
        ops = self.smp_ops
        if ops.message_pass is not None:
            ops.message_pass(self._exists(cpu), self._message(msg))
        else:
            self.smp_muxed_ipi_message_pass(cpu, msg)

    def smp_muxed_ipi_set_message(self, cpu: int, msg: int) -> None:
        """Store the byte of ``msg`` and cause no IPI: whichever comes next takes it."""
        self.machine.esb_message(self._exists(cpu), self._message(msg))

    def smp_muxed_ipi_message_pass(self, cpu: int, msg: int) -> None:
        """Store the byte of ``msg``, then cause the CPU's one IPI."""
        self.smp_muxed_ipi_set_message(cpu, msg)
        self.smp_ops.cause_ipi(cpu)

    def arch_send_call_function_single_ipi(self, cpu: int) -> None:
        """Have ``cpu`` look at its call_single_queue."""
        self.do_message_pass(cpu, PPC_MSG_CALL_FUNCTION)

    def arch_send_call_function_ipi_mask(self, mask: MaskLike) -> None:
        """Have each of ``mask`` look at its call_single_queue; a message each."""
        for cpu in CpuMask.of(mask):
            self.do_message_pass(cpu, PPC_MSG_CALL_FUNCTION)

    def arch_smp_send_reschedule(self, cpu: int) -> None:
        """Nudge ``cpu`` to reschedule."""
        self.do_message_pass(cpu, PPC_MSG_RESCHEDULE)

    def tick_broadcast(self, mask: MaskLike) -> None:
        """Send the tick to CPUs whose own timer stopped: counted where it arrives."""
        for cpu in CpuMask.of(mask):
            self.do_message_pass(cpu, PPC_MSG_TICK_BROADCAST)

    def pseries_cause_nmi_ipi(self, cpu: int) -> int:
        """Cause a system reset (H_SIGNAL_SYS_RESET) at ``cpu``, or NMI_IPI_ALL_OTHERS.

        Returns 1, or 0 where there is no such CPU, or it is offline.
        """
        machine = self.machine
        if cpu == NMI_IPI_ALL_OTHERS:
            me = machine.id if machine.is_cpu else None
            self.send_nmi([other for other in range(self.ncpus) if other != me])
            return 1
        if not 0 <= cpu < self.ncpus:
            return 0
        try:
            machine.nmi_send(cpu)
        except CpuOfflineError:
            return 0
        return 1

    def smp_request_message_ipi(self, virq: int, msg: int) -> int:
        """Let the irq ``virq`` be message ``msg``: a platform with an IPI for each.

        Whichever CPU takes the irq does what it does for the message; the irq's line is
        the caller's to raise and to unmask. Returns 0; 1 for PPC_MSG_NMI_IPI where it
        is not configured, and nothing was requested. Raises ``IrqError``: EINVAL for a
        message that has no irq of its own or an irq that cannot be, EBUSY for one that
        has a handler.
        """
        if msg not in smp_ipi_name:
            raise self.invalid(
                f"message {msg} has no irq: 0 to {PPC_MSG_NMI_IPI} have", irq=virq
            )
        if msg == PPC_MSG_NMI_IPI and not self.nmi_ipi:
            return 1
        if not 0 < virq < _core.NR_IRQS:
            raise self.invalid(
                f"unable to request irq {virq} for {smp_ipi_name[msg]}: they are 1 to"
                f" {_core.NR_IRQS - 1}",
                irq=virq,
            )
        machine = self.machine
        with machine.irq_lock():
            if _irq_has_action(machine, virq):
                raise IrqError(
                    f"{self.name}: unable to request irq {virq} for"
                    f" {smp_ipi_name[msg]}: it has a handler, free it first",
                    errno=errno.EBUSY,
                    irq=virq,
                    domain=self.name,
                )
            machine.irq_request(virq, msg, None)
        return 0

    # ---- smp.c: receiving, by hand --------------------------------------------------

    def smp_ipi_demux(self) -> int:
        """Take the messages of this CPU until there are none; IRQ_HANDLED.

        The IPI's handler does so by itself. By hand it finds what was stored without an
        IPI, or what an IPI that is masked here has not fetched yet; handlers written in
        Python run when interrupts are on. ``ClusterStateError`` in the host.
        """
        self.cpu()
        self.machine.esb_demux()
        return IRQ_HANDLED

    def smp_ipi_demux_relaxed(self) -> int:
        """``smp_ipi_demux`` for callers that had their barrier: here, the same."""
        return self.smp_ipi_demux()

    # ---- dbell.c --------------------------------------------------------------------

    def doorbell_global_ipi(self, cpu: int) -> None:
        """Ring the doorbell of any CPU (msgsnd, whose tag is the CPU)."""
        self.raise_line(DOORBELL_LINE, self._exists(cpu))

    def doorbell_core_ipi(self, cpu: int) -> None:
        """Ring the doorbell of a thread of this core (msgsndp).

        Its tag is no more than the number of the thread in its core: for a CPU of
        another core it is the thread of that number in this one which is rung, as in
        the hardware. ``ClusterStateError`` in the host, which is in no core.
        """
        tag = self.cpu_thread_in_core(cpu)
        self.raise_line(DOORBELL_LINE, self.cpu_first_thread_sibling(self.cpu()) + tag)

    def doorbell_try_core_ipi(self, cpu: int) -> int:
        """Ring ``cpu`` if it is in this core: 1 if so, else 0."""
        machine = self.machine
        if not machine.is_cpu or cpu not in self.cpu_sibling_mask(machine.id):
            self._exists(cpu)
            return 0
        self.doorbell_core_ipi(cpu)
        return 1

    # ---- irq_64.c: lazy masking -----------------------------------------------------

    def irq_happened(self, cpu: int | None = None) -> int:
        """Return ``paca->irq_happened`` of a CPU (default: this one): PACA_IRQ_*.

        What came under ``local_irq_disable``. An external interrupt (EE) goes on
        asking, so it turns interrupts off for good (HARD_DIS) and nothing after it is
        noted until they are on again; a doorbell (DBELL) is over when it has come.
        When interrupts are on again they are replayed: HMI, DEC, EE, DBELL, PMI, of
        which EE and DBELL arise here, and what EE kept out is taken after them.
        """
        return self.read("happened", self.cpu() if cpu is None else cpu)

    def lazy_irq_pending(self) -> bool:
        """Has anything happened on this CPU while interrupts were off?

        Also what has come to the controller and is about to interrupt: here the kick is
        a signal, which takes a moment.
        """
        return bool(
            self.irq_happened() & ~PACA_IRQ_HARD_DIS or self.interrupt_asserted()
        )

    def interrupt_asserted(self, cpu: int | None = None) -> bool:
        """Does the controller ask for a CPU (default: this one)?"""
        raise NotImplementedError

    def prep_irq_for_idle(self) -> bool:
        """Make ready for a sleep that ends with interrupts on: may the CPU sleep?

        To be called with interrupts off. False, and they stay off, if something has
        happened: ``local_irq_enable`` replays it. Else they are on, and True. The idle
        loop of the machine asks the same of the core, in one step with going to sleep.
        """
        if self.lazy_irq_pending():
            return False
        _core.local_irq_enable()
        return True

    # ---- checks ---------------------------------------------------------------------

    def _exists(self, cpu: int) -> int:
        if not 0 <= cpu < self.ncpus:
            raise CpuOfflineError(
                f"{self.name}: there is no CPU {cpu}: they are 0 to {self.ncpus - 1}",
                cpu=cpu,
            )
        return cpu

    def _message(self, msg: int) -> int:
        if not 0 <= msg < NR_PPC_MSGS or (msg == PPC_MSG_NMI_IPI and not self.nmi_ipi):
            raise self.invalid(f"there is no message {msg}: they are PPC_MSG_*, 0 to 4")
        return msg


def _irq_has_action(machine: _core.Machine, virq: int) -> bool:
    offset, size = {name: (at, n) for name, at, n in _core.IRQDESC_FIELDS}["action"]
    at = machine.irq_offset + _core.IRQDESC_OFFSET + virq * _core.IRQDESC_BYTES + offset
    return any(memoryview(machine)[at : at + size])
