"""The x86 local APIC, as xAPIC and as x2APIC.

Every CPU has one. Software sends an interprocessor interrupt (IPI) by writing its
interrupt command register (ICR): what to deliver, and to whom. Names, numbers and rules
are those of the Intel SDM, volume 3, chapter "Advanced Programmable Interrupt
Controller (APIC)", and of the kernel's
``arch/x86/include/asm/{apicdef.h,irq_vectors.h}`` and ``arch/x86/kernel/apic/``.

What there is of it, and what is not:

* Fixed IPIs, and an xAPIC's lowest-priority ones, go through IRR (accepted), TPR and
  PPR (how important must it be) and ISR (in service until EOI). NMI, INIT and STARTUP
  bypass all of that.
* The kernel's system vectors (``SYSVEC``) are taken by the core: they write EOI before
  they do anything else, so they are never seen in service. The other vectors from 0x20
  to 0xea are free for IPI domains.
* Only edge-triggered messages, so TMR is 0. No local vector table: nothing but IPIs
  arrives, and an error only shows in ESR. SMI, remote read and ExtINT do not exist.
* A vector that nobody has requested is masked and stays in IRR. A real APIC has no mask
  per vector; the kernel reports such an interrupt ("No irq handler for vector").
* A message is delivered before the write returns: ICR is never busy (no row RTR).
* CPU ``n`` has the APIC id ``n``. Which logical ids there are is chosen at boot, by
  ``Apic(destination=...)``, not by writing LDR and DFR.

In the host a bound chip is an agent on the bus without an APIC of its own: it may write
ICR, "all but self" are all CPUs, and there is no "self".
"""

from __future__ import annotations

import contextlib
import copy
import errno
import operator
import warnings
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import ClassVar, Final, Literal, NoReturn, Self, TypeAlias, cast

from shmipi import _core
from shmipi.cpumask import CpuMask, MaskLike
from shmipi.errors import CpuOfflineError, IrqError, ShmipiWarning
from shmipi.irq.chips import chain
from shmipi.irq.chips.base import Chip, Line, Row
from shmipi.machine import controller

Mode: TypeAlias = Literal["auto", "xapic", "x2apic"]
Destination: TypeAlias = Literal["physical", "flat", "cluster"]

# ---- vectors (irq_vectors.h) --------------------------------------------------------

NMI_VECTOR: Final = 0x02
#: 0 to 0x1f are the processor's exceptions; of these 0 to 15 can not be sent at all.
FIRST_EXTERNAL_VECTOR: Final = 0x20
IA32_SYSCALL_VECTOR: Final = 0x80
FIRST_SYSTEM_VECTOR: Final = 0xEB
POSTED_MSI_NOTIFICATION_VECTOR: Final = 0xEB
#: Also the tick-broadcast IPI.
LOCAL_TIMER_VECTOR: Final = 0xEC
HYPERV_STIMER0_VECTOR: Final = 0xED
HYPERV_REENLIGHTENMENT_VECTOR: Final = 0xEE
MANAGED_IRQ_SHUTDOWN_VECTOR: Final = 0xEF
POSTED_INTR_NESTED_VECTOR: Final = 0xF0
POSTED_INTR_WAKEUP_VECTOR: Final = 0xF1
POSTED_INTR_VECTOR: Final = 0xF2
HYPERVISOR_CALLBACK_VECTOR: Final = 0xF3
DEFERRED_ERROR_VECTOR: Final = 0xF4
PERF_GUEST_MEDIATED_PMI_VECTOR: Final = 0xF5
IRQ_WORK_VECTOR: Final = 0xF6
X86_PLATFORM_IPI_VECTOR: Final = 0xF7
REBOOT_VECTOR: Final = 0xF8
THRESHOLD_APIC_VECTOR: Final = 0xF9
THERMAL_APIC_VECTOR: Final = 0xFA
CALL_FUNCTION_SINGLE_VECTOR: Final = 0xFB
CALL_FUNCTION_VECTOR: Final = 0xFC
RESCHEDULE_VECTOR: Final = 0xFD
ERROR_APIC_VECTOR: Final = 0xFE
SPURIOUS_APIC_VECTOR: Final = 0xFF
NR_VECTORS: Final = 256

#: The kernel's handler of each system vector: what the core does when one arrives.
#: ``sysvec_call_function_single`` and ``sysvec_call_function`` run the CPU's
#: call_single_queue (``__flush_smp_call_function_queue``, then ``csd_do_func`` for each
#: entry); ``sysvec_reschedule_ipi`` has done all it is for by interrupting; the rest is
#: counted in a row of ``/proc/interrupts``.
SYSVEC: Final = MappingProxyType(
    {
        LOCAL_TIMER_VECTOR: "sysvec_apic_timer_interrupt",
        DEFERRED_ERROR_VECTOR: "sysvec_deferred_error",
        IRQ_WORK_VECTOR: "sysvec_irq_work",
        X86_PLATFORM_IPI_VECTOR: "sysvec_x86_platform_ipi",
        REBOOT_VECTOR: "sysvec_reboot",
        THRESHOLD_APIC_VECTOR: "sysvec_threshold",
        THERMAL_APIC_VECTOR: "sysvec_thermal",
        CALL_FUNCTION_SINGLE_VECTOR: "sysvec_call_function_single",
        CALL_FUNCTION_VECTOR: "sysvec_call_function",
        RESCHEDULE_VECTOR: "sysvec_reschedule_ipi",
        ERROR_APIC_VECTOR: "sysvec_error_interrupt",
        SPURIOUS_APIC_VECTOR: "sysvec_spurious_apic_interrupt",
    }
)

_SYSTEM: Final = (
    Line(LOCAL_TIMER_VECTOR, "LOCAL_TIMER_VECTOR", "timer", "LOC"),
    Line(DEFERRED_ERROR_VECTOR, "DEFERRED_ERROR_VECTOR", "count", "DFR"),
    Line(IRQ_WORK_VECTOR, "IRQ_WORK_VECTOR", "irq_work", "IWI"),
    Line(X86_PLATFORM_IPI_VECTOR, "X86_PLATFORM_IPI_VECTOR", "count", "PLT"),
    Line(REBOOT_VECTOR, "REBOOT_VECTOR", "stop"),
    Line(THRESHOLD_APIC_VECTOR, "THRESHOLD_APIC_VECTOR", "count", "THR"),
    Line(THERMAL_APIC_VECTOR, "THERMAL_APIC_VECTOR", "count", "TRM"),
    Line(
        CALL_FUNCTION_SINGLE_VECTOR, "CALL_FUNCTION_SINGLE_VECTOR", "call_single", "CAL"
    ),
    Line(CALL_FUNCTION_VECTOR, "CALL_FUNCTION_VECTOR", "call", "CAL"),
    Line(RESCHEDULE_VECTOR, "RESCHEDULE_VECTOR", "reschedule", "RES"),
    Line(ERROR_APIC_VECTOR, "ERROR_APIC_VECTOR", "count", "ERR"),
    Line(SPURIOUS_APIC_VECTOR, "SPURIOUS_APIC_VECTOR", "count", "SPU"),
)

# ---- registers (apicdef.h), by offset -----------------------------------------------

#: The x2APIC's MSR of a register is APIC_BASE_MSR + (offset >> 4).
APIC_BASE_MSR: Final = 0x800
APIC_ID: Final = 0x20
APIC_TASKPRI: Final = 0x80
APIC_PROCPRI: Final = 0xA0
APIC_EOI: Final = 0xB0
APIC_EOI_ACK: Final = 0x0
APIC_LDR: Final = 0xD0
APIC_DFR: Final = 0xE0
APIC_DFR_CLUSTER: Final = 0x0FFFFFFF
APIC_DFR_FLAT: Final = 0xFFFFFFFF
APIC_SPIV: Final = 0xF0
APIC_SPIV_APIC_ENABLED: Final = 1 << 8
APIC_ISR: Final = 0x100
APIC_TMR: Final = 0x180
APIC_IRR: Final = 0x200
APIC_ESR: Final = 0x280
#: Bit 4 (SDM, "Redirectable IPI"; apic.c's error_interrupt_reason has no macro for it).
APIC_ESR_REDIR: Final = 0x10
APIC_ESR_SENDILL: Final = 0x20
APIC_ESR_ILLREGA: Final = 0x80
APIC_ICR: Final = 0x300
APIC_ICR2: Final = 0x310
APIC_SELF_IPI: Final = 0x3F0

# ICR: delivery mode, destination mode, level, trigger, shorthand.
APIC_DM_FIXED: Final = 0x000
APIC_DM_LOWEST: Final = 0x100
APIC_DM_SMI: Final = 0x200
APIC_DM_REMRD: Final = 0x300
APIC_DM_NMI: Final = 0x400
APIC_DM_INIT: Final = 0x500
APIC_DM_STARTUP: Final = 0x600
APIC_DM_EXTINT: Final = 0x700
APIC_DEST_PHYSICAL: Final = 0x000
APIC_DEST_LOGICAL: Final = 0x800
APIC_ICR_BUSY: Final = 0x1000
APIC_INT_ASSERT: Final = 0x4000
APIC_INT_LEVELTRIG: Final = 0x8000
APIC_DEST_NOSHORT: Final = 0x00000
APIC_DEST_SELF: Final = 0x40000
APIC_DEST_ALLINC: Final = 0x80000
APIC_DEST_ALLBUT: Final = 0xC0000

_VECTOR: Final = 0xFF
_DELIVERY: Final = 0x700
_SHORTHAND: Final = 0xC0000
_ICR_BITS: Final = (
    _VECTOR
    | _DELIVERY
    | APIC_DEST_LOGICAL
    | APIC_INT_ASSERT
    | APIC_INT_LEVELTRIG
    | _SHORTHAND
)

#: The id that means every CPU, in either destination mode.
APIC_BROADCAST: Final = 0xFF
X2APIC_BROADCAST: Final = 0xFFFFFFFF

#: Where a secondary CPU begins: the page of the kernel's real-mode trampoline.
TRAMPOLINE_START_EIP: Final = 0x99000

_FLAT_CPUS: Final = 8
_XAPIC_CPUS: Final = 255  # id 255 means all
_XAPIC_CLUSTER: Final = 4
_XAPIC_CLUSTERS: Final = 15  # cluster 15 would be in the broadcast
_X2APIC_CLUSTER: Final = 16

__all__ = [
    "SYSVEC",
    "Apic",
    "__apic_send_IPI",
    "__apic_send_IPI_all",
    "__apic_send_IPI_allbutself",
    "__apic_send_IPI_mask",
    "__apic_send_IPI_mask_allbutself",
    "__apic_send_IPI_self",
    *(name for name in list(globals()) if name.isupper() and not name.startswith("_")),
]


# ---- for explain: arch/x86/kernel/{smp,apic/ipi}.c -----------------------------------

_X86: Final = chain.of(
    call=(
        chain.at(
            "call_ipi",
            *chain.SEND_ONE,
            "          native_send_call_func_single_ipi({cpu})",
        ),
        chain.at(
            "ipi_send_cpu", "            __apic_send_IPI({cpu}, {line})", when="one"
        ),
        chain.at(
            "ipi_send_cpumask",
            *chain.SEND_MASK,
            "        native_send_call_func_ipi(mask)",
            "          __apic_send_IPI_allbutself({line})",
            when="all but self",
        ),
        chain.at(
            "ipi_send_cpumask",
            *chain.SEND_MASK,
            "        native_send_call_func_ipi(mask)",
            "          __apic_send_IPI_mask(mask, {line})",
            when="mask",
        ),
        chain.at("line_ack", "sysvec_call_function_single()", when="call_single"),
        chain.at("line_ack", "sysvec_call_function()", when="call"),
        chain.at("line_eoi", "  apic_eoi()"),
        chain.at(
            "call_interrupt",
            "  generic_smp_call_function_single_interrupt()",
            when="call_single",
        ),
        chain.at(
            "call_interrupt", "  generic_smp_call_function_interrupt()", when="call"
        ),
    ),
    resched=(
        chain.at(
            "ipi_send_cpu",
            "  native_smp_send_reschedule({cpu})",
            "    __apic_send_IPI({cpu}, {line})",
        ),
        chain.at("line_ack", "sysvec_reschedule_ipi()"),
        chain.at("line_eoi", "  apic_eoi()"),
        chain.at("scheduler_ipi", "  scheduler_ipi()"),
    ),
    nmi=(
        chain.at(
            "nmi_send",
            "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
            "  nmi_raise_cpu_backtrace(mask)",
            "    __apic_send_IPI_mask(mask, NMI_VECTOR)",
        ),
        chain.at("nmi_entry", "exc_nmi(regs)", "  default_do_nmi(regs)"),
        chain.at("nmi_handler", "    nmi_handle(NMI_LOCAL, regs)"),
    ),
)


class Apic(Chip):
    """The x86 local APIC.

    Args:
        mode: "xapic" (8-bit ids, ICR is two 32-bit registers), "x2apic" (32-bit ids,
            ICR is one 64-bit register), or "auto": xAPIC for up to 255 CPUs, x2APIC for
            more and for clusters, which is where the kernel uses them.
        destination: how IPIs to several CPUs are addressed. "physical": one write for
            each, by id. "flat": the CPUs' bits in one write, at most 8 CPUs, xAPIC
            only. "cluster": one write for each cluster, of 4 CPUs (xAPIC, at most 60
            CPUs) or of 16 (x2APIC).
        no_ipi_broadcast: the kernel's parameter: True: the kernel-level functions do
            not use the shorthands "all" and "all but self".

    Raises:
        ValueError: another mode or destination, flat with x2APIC; and, once the number
            of CPUs is known (``Cluster``), more than it can address.

    ``for_cpus`` gives the chip with ``mode`` chosen; ``cluster.chip`` is one. What is
    written to ICR that must not be is refused with ``IrqError`` EINVAL, and nothing is
    sent: where the hardware notes it in ESR it is also noted there.
    """

    name = "apic"
    stops_by = "line_nmi"
    description = "x86 local APIC (xAPIC, x2APIC): 256 vectors in 16 priority classes"
    flow = "vector"
    shorthand = True
    startup = True
    vectors = True
    domain_name = "apic vector"
    chains = _X86
    hardware: ClassVar = {
        "line_set": "ICR written: {line} set in the IRR of CPU {cpu}",
        "line_ack": "{line} taken from the IRR",
    }
    rows = (
        Row("NMI", "Non-maskable interrupts", "nmi"),
        Row("LOC", "Local timer interrupts"),
        Row("SPU", "Spurious interrupts"),
        Row("IWI", "IRQ work interrupts"),
        Row("PLT", "Platform interrupts"),
        Row("RES", "Rescheduling interrupts"),
        Row("CAL", "Function call interrupts"),
        # No vector of its own: counts flush_tlb_func() for other CPUs.
        Row("TLB", "TLB shootdowns", "irq_tlb"),
        Row("TRM", "Thermal event interrupts"),
        Row("THR", "Threshold APIC interrupts"),
        Row("DFR", "Deferred Error APIC interrupts"),
        Row("ERR", "APIC error interrupts"),
    )

    #: "auto", "xapic" or "x2apic".
    mode: Mode
    #: "physical", "flat" or "cluster".
    destination: Destination

    def __init__(
        self,
        mode: Mode = "auto",
        destination: Destination = "physical",
        *,
        no_ipi_broadcast: bool = False,
    ) -> None:
        if mode not in ("auto", "xapic", "x2apic"):
            raise ValueError(f"mode is {mode!r}: choose 'auto', 'xapic' or 'x2apic'")
        if destination not in ("physical", "flat", "cluster"):
            raise ValueError(
                f"destination is {destination!r}: choose 'physical', 'flat' or"
                " 'cluster'"
            )
        if mode == "x2apic" and destination == "flat":
            raise ValueError(
                "an x2APIC has no logical flat mode: use destination='cluster', or"
                " mode='xapic'"
            )
        self.mode = mode
        self.destination = destination
        self.shorthand = not no_ipi_broadcast
        # Registers of the own CPU that nothing in the machine acts on.
        self._icr = 0
        self._esr = 0
        self._errors = 0  # noted since ESR was last written

    # ---- the description ------------------------------------------------------------

    def check(self, ncpus: int) -> None:
        """Raise ``ControllerError`` EINVAL if it cannot address so many CPUs."""
        if self.destination == "flat" and ncpus > _FLAT_CPUS:
            raise self.too_many(
                _FLAT_CPUS,
                f"logical flat mode has one bit for each of {_FLAT_CPUS} CPUs, not"
                f" {ncpus}: use Apic(destination='physical') or 'cluster'",
            )
        if self.mode == "xapic" and self.destination == "cluster":
            limit = _XAPIC_CLUSTER * _XAPIC_CLUSTERS
            if ncpus > limit:
                raise self.too_many(
                    limit,
                    f"xAPIC clusters hold {limit} CPUs ({_XAPIC_CLUSTERS} of"
                    f" {_XAPIC_CLUSTER}), not {ncpus}: use Apic(mode='x2apic')",
                )
        if self.mode == "xapic" and ncpus > _XAPIC_CPUS:
            raise self.too_many(
                _XAPIC_CPUS,
                f"an xAPIC has ids for {_XAPIC_CPUS} CPUs, not {ncpus}: use"
                " Apic(mode='x2apic'), or leave the choice to mode='auto'",
            )
        super().check(ncpus)

    def for_cpus(self, ncpus: int) -> Self:
        """Return it with ``mode`` chosen for ``ncpus`` CPUs, or raise as ``check``."""
        self.check(ncpus)
        chosen = copy.copy(self)
        if chosen.mode == "auto":
            x2apic = ncpus > _XAPIC_CPUS or chosen.destination == "cluster"
            chosen.mode = "x2apic" if x2apic else "xapic"
        if chosen.destination == "flat":
            chosen.group = _FLAT_CPUS
        elif chosen.destination == "cluster":
            chosen.group = _X2APIC_CLUSTER if chosen.x2apic else _XAPIC_CLUSTER
        return chosen

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Return the system vectors, and those that are free for IPI domains."""
        yield from _SYSTEM
        for vector in range(FIRST_EXTERNAL_VECTOR, FIRST_SYSTEM_VECTOR):
            if vector != IA32_SYSCALL_VECTOR:
                yield Line(vector, f"vector {vector:#x}", "irq")

    def bring_up(self, cpu: int) -> None:
        """Start a CPU that waits for STARTUP: INIT, STARTUP, STARTUP.

        As ``wakeup_secondary_cpu_via_init`` (``arch/x86/kernel/smpboot.c``): the second
        STARTUP finds a CPU that runs, and is dropped. Who calls it must be the only one
        who starts CPUs (the kernel holds its hotplug lock).
        """
        if self.read("startup", cpu) != _core.STARTUP_WAITING:
            return
        self.write_icr(APIC_INT_LEVELTRIG | APIC_INT_ASSERT | APIC_DM_INIT, cpu)
        self.write_icr(APIC_INT_LEVELTRIG | APIC_DM_INIT, cpu)  # de-assert
        for _ in range(2):
            self.write_icr(APIC_DM_STARTUP | TRAMPOLINE_START_EIP >> 12, cpu)

    # ---- registers ------------------------------------------------------------------

    @property
    def x2apic(self) -> bool:
        """Is it in x2APIC mode?"""
        return self.mode == "x2apic"

    def write(self, register: int, value: int) -> None:
        """Write a register of the own CPU, by its offset (``APIC_EOI``, ...).

        xAPIC: ``APIC_ICR2``'s bits 24 to 31 are the destination of the next write to
        ``APIC_ICR``. x2APIC: bits 32 to 63 of ``APIC_ICR`` are. Raises ``IrqError``
        EINVAL for a register that is not there or not written by software, and for a
        value it can not take; ``ClusterStateError`` in the host for all but ICR.
        """
        if register == APIC_ICR:
            if not 0 <= value < 1 << (64 if self.x2apic else 32):
                self._refuse_value("APIC_ICR", value)
            if not self.x2apic:
                value |= self._icr & ~0xFFFFFFFF
            self._icr = value
            dest = value >> 32 if self.x2apic else value >> 56
            self._send(value & 0xFFFFFFFF, dest)
        elif register == APIC_ICR2 and not self.x2apic:
            if not 0 <= value < 1 << 32:
                self._refuse_value("APIC_ICR2", value)
            self._icr = (value & 0xFF000000) << 32 | self._icr & 0xFFFFFFFF
        elif register == APIC_SELF_IPI and self.x2apic:
            self.cpu()
            if not 0 <= value <= _VECTOR:
                self._refuse_value("APIC_SELF_IPI", value)
            self._send(APIC_DEST_SELF | value, 0)
        elif register == APIC_EOI:
            if self.x2apic and value != APIC_EOI_ACK:
                self._refuse_value("APIC_EOI", value)
            self.write_eoi()
        elif register == APIC_TASKPRI:
            self.write_tpr(value)
        elif register == APIC_ESR:
            self.cpu()
            if self.x2apic and value:
                self._refuse_value("APIC_ESR", value)
            self._esr, self._errors = self._errors, 0
        else:
            self._refuse_register(register, "written")

    def read_register(self, register: int, cpu: int | None = None) -> int:
        """Read a register by its offset; ``cpu=None``: of the own CPU.

        Those of other CPUs can be looked at as well, as a debugger would, but for ICR
        and ESR, which are the own CPU's alone. ``APIC_IRR``, ``APIC_ISR`` and
        ``APIC_TMR`` are eight registers of 32 vectors each, 0x10 apart. Raises
        ``IrqError`` EINVAL for a register that is not there or not to be read,
        ``CpuOfflineError`` for a CPU that is not there, ``ClusterStateError`` in the
        host for its own.
        """
        who = self.cpu() if cpu is None else cpu
        self._exists(who)
        if register in (APIC_ICR, APIC_ICR2, APIC_ESR) and who != self.cpu():
            raise self._einval(
                f"register {register:#x} can be read by CPU {who} alone", cpu=who
            )
        for base, bits in ((APIC_ISR, self.read_isr), (APIC_IRR, self.read_irr)):
            if register in range(base, base + 0x80, 0x10):
                return bits(who) >> 2 * (register - base) & 0xFFFFFFFF
        if register in range(APIC_TMR, APIC_TMR + 0x80, 0x10):
            return 0
        if register == APIC_ID:
            return who if self.x2apic else who << 24
        if register == APIC_TASKPRI:
            return self.read_tpr(who)
        if register == APIC_PROCPRI:
            return self.read_ppr(who)
        if register == APIC_LDR:
            return self.read_ldr(who)
        if register == APIC_DFR and not self.x2apic:
            cluster = self.destination == "cluster"
            return APIC_DFR_CLUSTER if cluster else APIC_DFR_FLAT
        if register == APIC_SPIV:
            enabled = APIC_SPIV_APIC_ENABLED if self.is_online(who) else 0
            return enabled | SPURIOUS_APIC_VECTOR
        if register == APIC_ESR:
            return self._esr
        if register == APIC_ICR:
            return self._icr if self.x2apic else self._icr & 0xFFFFFFFF
        if register == APIC_ICR2 and not self.x2apic:
            return self._icr >> 32
        self._refuse_register(register, "read")

    def read_irr(self, cpu: int) -> int:
        """Return the vectors accepted by a CPU and not taken yet: bit v is vector v."""
        return self._vectors("irr", cpu)

    def read_isr(self, cpu: int) -> int:
        """Return the vectors in service at a CPU, taken and not ended, likewise."""
        return self._vectors("isr", cpu)

    def _vectors(self, register: str, cpu: int) -> int:
        self._exists(cpu)
        return sum(
            self.read(register, cpu, i) << 64 * i for i in range(NR_VECTORS // 64)
        )

    def read_tpr(self, cpu: int) -> int:
        """Return the task-priority register: vectors of its class and below wait."""
        self._exists(cpu)
        return self.read("threshold", cpu)

    def read_ppr(self, cpu: int) -> int:
        """Return the processor priority: of TPR, or the class of what is in service."""
        tpr = self.read_tpr(cpu)
        serving = max(0, self.read_isr(cpu).bit_length() - 1) & 0xF0
        return tpr if tpr & 0xF0 >= serving else serving

    def read_ldr(self, cpu: int) -> int:
        """Return the logical destination register, as ``Apic(destination=...)`` has it.

        xAPIC, in bits 24 to 31: flat: a bit for each CPU; cluster: the cluster's number
        and a bit for each of its 4 CPUs; physical: 0, no logical id. x2APIC, fixed by
        the hardware: the cluster (id >> 4) in bits 16 to 31, a bit for each of its 16
        CPUs below.
        """
        self._exists(cpu)
        if self.x2apic:
            return cpu >> 4 << 16 | 1 << (cpu & 15)
        if self.destination == "flat":
            return 1 << cpu << 24
        if self.destination == "cluster":
            return (cpu >> 2 << 4 | 1 << (cpu & 3)) << 24
        return 0

    def write_tpr(self, value: int) -> None:
        """Write the own CPU's TPR (0 to 255): hold back vectors of its class and below.

        What it lets through is taken at once, or when interrupts are enabled. A
        function call can run before its vector is let through: a CPU that has another
        reason to look at its queue does.
        """
        self.cpu()
        if not 0 <= value <= 0xFF:
            self._refuse_value("APIC_TASKPRI", value)
        self.machine.irq_threshold(value)

    def write_eoi(self) -> None:
        """Say, in a handler, that its vector is done: another of its kind may be taken.

        It will be when the handler has returned, since handlers do not nest here; a
        handler that has not written EOI when it returns has it written for it. Nothing
        happens where no vector is in service.
        """
        self.cpu()
        self.machine.irq_end(_core.NO_LINE)

    def startup_address(self, cpu: int) -> int:
        """Return where the last STARTUP that a CPU took let it begin (0xVV000)."""
        self._exists(cpu)
        return self.read("sipi", cpu) << 12

    # ---- the interrupt command register ---------------------------------------------

    def write_icr(self, low: int, dest: int = 0) -> None:
        """Send an IPI: write ICR.

        ``low`` is the lower word: vector | APIC_DM_... | APIC_DEST_LOGICAL | ...;
        ``dest`` the destination: an APIC id, a logical id, or nothing with a shorthand.
        xAPIC: two writes, ICR2 and then ICR, with interrupts off (a shorthand: ICR
        alone); x2APIC: one write of 64 bits. Destinations that do not exist ignore it.

        * APIC_DM_FIXED: the vector. APIC_DM_LOWEST, which only an xAPIC has: at that
          one of the CPUs addressed whose PPR is lowest (the least id of several).
          Offline CPUs accept neither.
        * APIC_DM_NMI: two may be pending while none is in service, one while one is.
        * APIC_DM_INIT: reset: the CPU's process ends, whatever it does. A secondary CPU
          then waits for STARTUP; CPU 0, the bootstrap processor, starts anew by itself.
          A de-assert (level-triggered, not asserted) does nothing.
        * APIC_DM_STARTUP: a CPU that waits for it (in reset, or dead) starts, as a new
          process of a new generation; others drop it.

        Raises ``IrqError`` EINVAL, with nothing sent: a vector below 16
        (APIC_ESR_SENDILL), a delivery mode that is reserved here (APIC_DM_LOWEST on an
        x2APIC: APIC_ESR_REDIR), a combination with a shorthand that the SDM calls
        invalid, reserved bits, a destination that does not fit. EPERM: a broadcast
        shorthand while some CPU has never been up.
        ``ClusterStateError``: "self" in the host.
        """
        if not 0 <= dest <= (0xFFFFFFFF if self.x2apic else 0xFF):
            raise self._einval(
                f"destination {dest:#x} does not fit ICR ({self.mode} ids have"
                f" {32 if self.x2apic else 8} bits)"
            )
        if not low & _SHORTHAND:
            # ICR2 in the same step: nothing may come between it and ICR.
            self._icr = dest << (32 if self.x2apic else 56)
        self._icr = self._icr & ~0xFFFFFFFF | low & 0xFFFFFFFF
        self._send(low, dest)

    def _send(self, low: int, dest: int) -> None:
        delivery, vector = low & _DELIVERY, low & _VECTOR
        self._check_command(low)
        targets = self._addressed(low, dest)
        machine = self.machine
        if delivery == APIC_DM_INIT:
            deassert = low & APIC_INT_LEVELTRIG and not low & APIC_INT_ASSERT
            machine.irq_raise(0, [], 1)  # counts the write
            # Itself last: it does not come back.
            for cpu in sorted(targets, key=self._is_self) if not deassert else ():
                machine.init_ipi(cpu)
        elif delivery == APIC_DM_STARTUP:
            machine.irq_raise(0, [], 1)
            for cpu in targets:
                machine.startup_ipi(cpu, vector)
        elif delivery == APIC_DM_NMI:
            machine.irq_raise(0, [], 1)
            for cpu in targets:
                with contextlib.suppress(CpuOfflineError):
                    machine.nmi_send(cpu, 0)
        else:
            # An APIC that is not enabled accepts no vectors.
            accepting = [cpu for cpu in targets if self.is_online(cpu)]
            if delivery == APIC_DM_LOWEST and accepting:
                accepting = [min(accepting, key=lambda cpu: (self.read_ppr(cpu), cpu))]
            machine.irq_raise(vector, accepting, 1)

    def _is_self(self, cpu: int) -> bool:
        return self.machine.is_cpu and cpu == self.machine.id

    def _check_command(self, low: int) -> None:
        delivery, vector, shorthand = low & _DELIVERY, low & _VECTOR, low & _SHORTHAND
        if low & ~_ICR_BITS:
            raise self._einval(f"ICR {low:#x} has reserved bits: {low & ~_ICR_BITS:#x}")
        if delivery in _RESERVED:
            raise self._einval(
                f"delivery mode {_RESERVED[delivery]} is reserved here: there are"
                " fixed, lowest priority, NMI, INIT and STARTUP"
            )
        # SDM, "Valid Combinations for the ... Local xAPIC ICR".
        if shorthand in (APIC_DEST_SELF, APIC_DEST_ALLINC) and delivery:
            raise self._einval(
                "the shorthands self and all-including-self are for fixed delivery"
                f" alone, not for {delivery:#x}: name the destination, or use"
                " APIC_DEST_ALLBUT"
            )
        if delivery in (APIC_DM_FIXED, APIC_DM_LOWEST) and vector < 16:
            self._errors |= APIC_ESR_SENDILL
            raise self._einval(
                f"vector {vector} is illegal: an APIC sends 16 to 255 (send an NMI with"
                " APIC_DM_NMI)"
            )
        if delivery == APIC_DM_LOWEST and self.x2apic:
            self._errors |= APIC_ESR_REDIR
            raise self._einval(
                "delivery mode lowest priority is reserved on an x2APIC: send fixed, or"
                " boot with Apic(mode='xapic')"
            )

    def _addressed(self, low: int, dest: int) -> list[int]:
        """Return the CPUs that exist and are meant by ``dest``, or by the shorthand."""
        everybody = range(self.ncpus)
        shorthand = low & _SHORTHAND
        if shorthand == APIC_DEST_SELF:
            return [self.cpu()]
        if shorthand:
            self._check_broadcast()
            including = shorthand == APIC_DEST_ALLINC
            return [cpu for cpu in everybody if including or not self._is_self(cpu)]
        if dest == (X2APIC_BROADCAST if self.x2apic else APIC_BROADCAST):
            return list(everybody)
        if not low & APIC_DEST_LOGICAL:
            return [dest] if dest < self.ncpus else []
        if self.x2apic:
            return self._members(dest >> 16, dest & 0xFFFF, _X2APIC_CLUSTER)
        if self.destination == "cluster":
            return self._members(dest >> 4, dest & 0xF, _XAPIC_CLUSTER)
        if self.destination == "flat":
            return self._members(0, dest, _FLAT_CPUS)
        return []  # no CPU has a logical id

    def _members(self, cluster: int, bits: int, size: int) -> list[int]:
        first = cluster * size
        return [
            cpu
            for cpu in range(first, min(first + size, self.ncpus))
            if bits >> (cpu - first) & 1
        ]

    # ---- the broadcast shorthands ---------------------------------------------------

    def cpus_booted_once_mask(self) -> CpuMask:
        """Return the CPUs that have been up at least once since the machine booted.

        The firmware declares the machine up when every CPU has come online; until then
        those are in it that are online now.
        """
        if self.machine.state not in (_core.NEW, _core.BOOTING):
            return CpuMask.full(self.ncpus)
        return self.cpu_online_mask()

    def cpu_online_mask(self) -> CpuMask:
        """Return the CPUs that are online."""
        return CpuMask(cpu for cpu in range(self.ncpus) if self.is_online(cpu))

    def apic_use_ipi_shorthand(self) -> bool:
        """May the kernel-level functions use the broadcast shorthands now?

        The rule of ``apic_smt_update`` (``arch/x86/kernel/apic/ipi.c``): not with
        ``no_ipi_broadcast``, not with one CPU online, and not before all CPUs that are
        present have booted once: the APIC of one that has not may be in any state.
        """
        return (
            self.shorthand
            and len(self.cpu_online_mask()) > 1
            and len(self.cpus_booted_once_mask()) == self.ncpus
        )

    def _check_broadcast(self) -> None:
        never = CpuMask.full(self.ncpus) - self.cpus_booted_once_mask()
        if never:
            raise IrqError(
                f"{self.name}: a broadcast shorthand would reach CPUs {never}, which"
                " have not booted yet: send to each CPU by its id",
                errno=errno.EPERM,
                cpu=min(never),
                domain=self.name,
            )

    # ---- what the kernel has over it (arch/x86/kernel/apic/ipi.c) -------------------
    #
    # With NMI_VECTOR each of them sends an NMI (the kernel's __prepare_ICR).

    def apic_send_IPI(self, cpu: int, vector: int) -> None:
        """Send ``vector`` to one CPU, by its id; whether it is online is not looked at.

        This is the kernel's ``__apic_send_IPI``, which is also a function of this
        module and an attribute of the class. Raises ``IrqError`` as ``write_icr``, also
        for a CPU that is not there.
        """
        self._mask([cpu])
        self.write_icr(_command(vector), cpu)

    def apic_send_IPI_mask(self, mask: MaskLike, vector: int) -> None:
        """Send ``vector`` to several CPUs, in the destination mode of the machine.

        Physical: a write for each; flat: one; cluster: one for each cluster. With an
        empty mask nothing is sent, and a ``ShmipiWarning`` says so. ``IrqError`` for
        a CPU that is not there.
        """
        cpus = self._mask(mask)
        if not cpus:
            warnings.warn("empty IPI mask", ShmipiWarning, stacklevel=2)
        for low, dest in self._commands(cpus, vector):
            self.write_icr(low, dest)

    def _commands(self, cpus: CpuMask, vector: int) -> Iterator[tuple[int, int]]:
        low = _command(vector)
        if self.destination == "physical":
            yield from ((low, cpu) for cpu in cpus)
            return
        low |= APIC_DEST_LOGICAL
        # The logical ids of a cluster's CPUs differ in their own bits alone.
        together: dict[int, int] = {}
        for cpu in cpus:
            ldr = self.read_ldr(cpu) if self.x2apic else self.read_ldr(cpu) >> 24
            cluster = cpu // self.group
            together[cluster] = together.get(cluster, 0) | ldr
        yield from ((low, dest) for dest in together.values())

    def apic_send_IPI_mask_allbutself(self, mask: MaskLike, vector: int) -> None:
        """Send ``vector`` to the CPUs of ``mask`` other than this one."""
        others = CpuMask(cpu for cpu in self._mask(mask) if not self._is_self(cpu))
        for low, dest in self._commands(others, vector):
            self.write_icr(low, dest)

    def apic_send_IPI_allbutself(self, vector: int) -> None:
        """Send ``vector`` to all online CPUs but this one.

        By the shorthand where ``apic_use_ipi_shorthand()``, else one by one; with fewer
        than two CPUs online there is nothing to do.
        """
        online = self.cpu_online_mask()
        if len(online) < 2 and self.machine.is_cpu:
            return
        if self.apic_use_ipi_shorthand():
            self.write_icr(_command(vector) | APIC_DEST_ALLBUT)
        else:
            self.apic_send_IPI_mask_allbutself(online, vector)

    def apic_send_IPI_all(self, vector: int) -> None:
        """Send ``vector`` to all online CPUs with this one, by the shorthand or not."""
        if vector != NMI_VECTOR and self.apic_use_ipi_shorthand():
            self.write_icr(_command(vector) | APIC_DEST_ALLINC)
        else:
            self.apic_send_IPI_mask(self.cpu_online_mask(), vector)

    def apic_send_IPI_self(self, vector: int) -> None:
        """Send ``vector`` to this CPU: x2APIC by APIC_SELF_IPI, xAPIC by shorthand.

        An NMI goes by the CPU's id: shorthands to oneself are for vectors.
        """
        if vector == NMI_VECTOR:
            self.write_icr(APIC_DM_NMI, self.cpu())
        elif self.x2apic:
            self.write(APIC_SELF_IPI, vector)
        else:
            self.write_icr(_command(vector) | APIC_DEST_SELF)

    def native_smp_send_reschedule(self, cpu: int) -> None:
        """Send the reschedule IPI; an offline CPU gets none: ``ShmipiWarning``."""
        self._mask([cpu])
        if not self.is_online(cpu):
            warnings.warn(
                f"sched: Unexpected reschedule of offline CPU#{cpu}!",
                ShmipiWarning,
                stacklevel=2,
            )
            return
        self.apic_send_IPI(cpu, RESCHEDULE_VECTOR)

    def native_send_call_func_single_ipi(self, cpu: int) -> None:
        """Have a CPU look at its call_single_queue."""
        self.apic_send_IPI(cpu, CALL_FUNCTION_SINGLE_VECTOR)

    def native_send_call_func_ipi(self, mask: MaskLike) -> None:
        """Have CPUs look at their queues: by a shorthand if they are all there are.

        If ``mask`` and this CPU are the CPUs that are online: "all" when this one is in
        it, else "all but self"; otherwise as ``apic_send_IPI_mask``.
        """
        cpus = self._mask(mask)
        me = {self.machine.id} if self.machine.is_cpu else set()
        if not self.apic_use_ipi_shorthand() or cpus | me != self.cpu_online_mask():
            self.apic_send_IPI_mask(cpus, CALL_FUNCTION_VECTOR)
        elif me & cpus:
            self.write_icr(_command(CALL_FUNCTION_VECTOR) | APIC_DEST_ALLINC)
        else:
            self.write_icr(_command(CALL_FUNCTION_VECTOR) | APIC_DEST_ALLBUT)

    # ---- refusals -------------------------------------------------------------------

    def _einval(self, message: str, *, cpu: int | None = None) -> IrqError:
        return IrqError(
            f"{self.name}: {message}", cpu=cpu, errno=errno.EINVAL, domain=self.name
        )

    def _refuse_value(self, register: str, value: int) -> NoReturn:
        raise self._einval(f"{register} can not take {value:#x}")

    def _refuse_register(self, register: int, verb: str) -> NoReturn:
        self._errors |= APIC_ESR_ILLREGA
        hint = (
            ": Apic(destination=...) chooses it at boot"
            if register in (APIC_LDR, APIC_DFR)
            else ""
        )
        raise self._einval(
            f"there is no register {register:#x} of the {self.mode} to be {verb} by"
            f" software{hint}"
        )

    def _exists(self, cpu: int) -> None:
        if not 0 <= cpu < self.ncpus:
            raise CpuOfflineError(
                f"CPU {cpu} does not exist: this machine has CPUs 0-{self.ncpus - 1}",
                cpu=cpu,
            )

    def _mask(self, cpus: MaskLike) -> CpuMask:
        try:
            return CpuMask.of(cpus, self.ncpus)
        except ValueError as error:
            raise self._einval(str(error)) from None


_RESERVED: Final = {
    APIC_DM_SMI: "SMI",
    APIC_DM_REMRD: "remote read",
    APIC_DM_EXTINT: "ExtINT",
}


def _command(vector: int) -> int:
    # Not to be taken for the bits of the ICR beside it.
    if not 0 <= operator.index(vector) <= _VECTOR:
        raise IrqError(
            f"apic: vector {vector} is illegal: an APIC sends 16 to 255", domain="apic"
        )
    return APIC_DM_NMI if vector == NMI_VECTOR else APIC_DM_FIXED | vector


def __apic_send_IPI(cpu: int, vector: int) -> None:
    """Send ``vector`` to ``cpu``: ``apic_send_IPI`` of the current machine's chip.

    Inside a class the name would be mangled; ``chip.apic_send_IPI`` is the same. Raises
    ``NoMachineError`` where there is no machine, or several, to act on, ``IrqError``
    EINVAL if its controller is no APIC.
    """
    _current().apic_send_IPI(cpu, vector)


def _current() -> Apic:
    chip = cast(Chip, controller.of(_core.current_machine()))
    if not isinstance(chip, Apic):
        raise chip.invalid("this machine has no local APIC: boot it with 'apic'")
    return chip


def __apic_send_IPI_mask(mask: MaskLike, vector: int) -> None:
    """Send ``vector`` to the CPUs of ``mask``, as ``__apic_send_IPI``."""
    _current().apic_send_IPI_mask(mask, vector)


def __apic_send_IPI_mask_allbutself(mask: MaskLike, vector: int) -> None:
    """Send ``vector`` to the CPUs of ``mask`` but this, as ``__apic_send_IPI``."""
    _current().apic_send_IPI_mask_allbutself(mask, vector)


def __apic_send_IPI_allbutself(vector: int) -> None:
    """Send ``vector`` to all online CPUs but this one, as ``__apic_send_IPI``."""
    _current().apic_send_IPI_allbutself(vector)


def __apic_send_IPI_all(vector: int) -> None:
    """Send ``vector`` to all online CPUs, as ``__apic_send_IPI``."""
    _current().apic_send_IPI_all(vector)


def __apic_send_IPI_self(vector: int) -> None:
    """Send ``vector`` to this CPU, as ``__apic_send_IPI``."""
    _current().apic_send_IPI_self(vector)


# The kernel's names, which a class body can not define.
for _name in ("", "_mask", "_mask_allbutself", "_allbutself", "_all", "_self"):
    setattr(Apic, f"__apic_send_IPI{_name}", getattr(Apic, f"apic_send_IPI{_name}"))
