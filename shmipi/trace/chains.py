"""The kernel functions that an IPI passes, by architecture, and how a trace shows it.

The tables below are the call chains as somebody knows them who has read
``kernel/smp.c`` and the architecture's ``smp.c``: an indented line is called by the one
above it. Each entry names the tracepoint of the core (``SHI_TRACE_EVENTS`` in
``_core/layout.h``) that is recorded where this machine does what that function does, so
a function that a trace has no record for was not passed. ``{cpu}`` is the target,
``{line}`` the line's name.

==========  ============================================================================
apic        x86: arch/x86/kernel/{smp,apic/ipi}.c
xive        powerpc: arch/powerpc/kernel/smp.c, arch/powerpc/sysdev/xive/common.c
mips        arch/mips/include/asm/smp.h, arch/mips/cavium-octeon/smp.c
mips-gic    arch/mips/kernel/smp.c, drivers/irqchip/irq-mips-gic.c
gicv2/3     arch/arm64/kernel/smp.c, drivers/irqchip/irq-gic.c, irq-gic-v3.c
riscv       arch/riscv/kernel/{smp,sbi-ipi}.c, kernel/irq/ipi-mux.c
==========  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from shmipi import _core
from shmipi.machine import doorbells

__all__ = ["CALLS", "CHAINS", "Chain", "Explained", "Stage", "Step", "read"]

#: What can be explained, and the function that a caller calls for it.
CALLS: Final = {
    "single": "smp_call_function_single",
    "many": "smp_call_function_many",
    "resched": "smp_send_reschedule",
    "nmi": "smp_send_nmi_ipi",
}


@dataclass(frozen=True)
class Stage:
    """A tracepoint, and the functions of the kernel that it stands for.

    ``functions`` are as they are called, outermost first, indented by depth. ``when``
    restricts it: "one", "mask" and "all but self" (whom the sender asks the chip to
    interrupt), "idle" and "interrupt" (where a queue is emptied), a line's use
    ("call_single", "call"), "first" (of a loop), "=N": a record with that ``arg``.
    """

    event: str
    functions: tuple[str, ...]
    when: str = ""

    @property
    def names(self) -> list[str]:
        """The functions' bare names."""
        return [_bare(function) for function in self.functions]


class Chain(NamedTuple):
    """What one kind of call passes on one architecture.

    ``queue`` is passed by every call, ``elided`` in place of ``interrupt`` when the
    target polls, ``run`` when the work is done.
    """

    queue: tuple[Stage, ...]
    elided: tuple[Stage, ...]
    interrupt: tuple[Stage, ...]
    run: tuple[Stage, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All of them, in order."""
        return self.queue + self.elided + self.interrupt + self.run


def _at(event: str, *functions: str, when: str = "") -> Stage:
    return Stage(event, functions, when)


# ---- kernel/smp.c: the same on every architecture ------------------------------------

_QUEUE_SINGLE: Final = (
    _at("call_entry", "smp_call_function_single({cpu}, func, info, wait)"),
    _at("call_begin", "  generic_exec_single({cpu}, csd)"),
    _at("queue_push", "    __smp_call_single_queue({cpu}, &csd->node.llist)"),
    _at(
        "csd_queue_cpu",
        "      llist_add(node, &per_cpu(call_single_queue, {cpu}))",
    ),
)
_QUEUE_MANY: Final = (
    _at(
        "call_entry",
        "smp_call_function_many(mask, func, info, wait)",
        "  smp_call_function_many_cond(mask, func, info, ...)",
    ),
    _at("call_begin", "    csd_lock(csd)"),
    _at(
        "csd_queue_cpu",
        "    llist_add(&csd->node.llist, &per_cpu(call_single_queue, {cpu}))",
    ),
)
#: The target polls: it has promised to look at the queue before it does anything else.
_ELIDED: Final = (
    _at(
        "wake_idle_without_ipi",
        "      send_call_function_single_ipi({cpu})",
        "        call_function_single_prep_ipi({cpu})",
        "          set_nr_if_polling(rq->idle)",
    ),
)
#: The kernel looks at this only when one CPU is left to be interrupted; here, at each.
_ELIDED_OF_MANY: Final = (
    _at(
        "wake_idle_without_ipi",
        "    call_function_single_prep_ipi({cpu})",
        "      set_nr_if_polling(rq->idle)",
    ),
)
_SEND_ONE: Final = (
    "      send_call_function_single_ipi({cpu})",
    "        arch_send_call_function_single_ipi({cpu})",
)
_SEND_MASK: Final = (
    "    send_call_function_ipi_mask(mask)",
    "      arch_send_call_function_ipi_mask(mask)",
)
_RUN: Final = (
    # From the idle loop of a CPU that polled; or inside the interrupt's handler, and
    # then the lines below are indented as deep as that is.
    _at(
        "flush",
        "do_idle()",
        "  flush_smp_call_function_queue()",
        "    __flush_smp_call_function_queue(true)",
        when="idle",
    ),
    _at("flush", "__flush_smp_call_function_queue(true)", when="interrupt"),
    _at("csd_function_entry", "  csd_do_func(func, info, csd)"),
    _at("csd_unlock", "  csd_unlock(csd)"),
    _at("call_end", "  csd_lock_wait(csd)"),
)
_RESCHED: Final = (_at("call_entry", "smp_send_reschedule({cpu})"),)
_RESCHED_ELIDED: Final = (
    _at("wake_idle_without_ipi", "  set_nr_if_polling(rq->idle)"),
    _at("resched_idle", "do_idle()", "  need_resched()"),
)


def _chains(
    *, call: Iterable[Stage], resched: Iterable[Stage], nmi: Iterable[Stage]
) -> dict[str, Chain]:
    """The chains of one architecture from what differs: its interrupts."""
    call = tuple(call)
    return {
        "single": Chain(_QUEUE_SINGLE, _ELIDED, call, _RUN),
        "many": Chain(_QUEUE_MANY, _ELIDED_OF_MANY, call, _RUN),
        "resched": Chain(_RESCHED, _RESCHED_ELIDED, tuple(resched), ()),
        "nmi": Chain((), (), tuple(nmi), ()),
    }


# ---- x86 -----------------------------------------------------------------------------

_X86: Final = _chains(
    call=(
        _at(
            "call_ipi",
            *_SEND_ONE,
            "          native_send_call_func_single_ipi({cpu})",
        ),
        _at("ipi_send_cpu", "            __apic_send_IPI({cpu}, {line})", when="one"),
        _at(
            "ipi_send_cpumask",
            *_SEND_MASK,
            "        native_send_call_func_ipi(mask)",
            "          __apic_send_IPI_allbutself({line})",
            when="all but self",
        ),
        _at(
            "ipi_send_cpumask",
            *_SEND_MASK,
            "        native_send_call_func_ipi(mask)",
            "          __apic_send_IPI_mask(mask, {line})",
            when="mask",
        ),
        _at("line_ack", "sysvec_call_function_single()", when="call_single"),
        _at("line_ack", "sysvec_call_function()", when="call"),
        _at("line_eoi", "  apic_eoi()"),
        _at(
            "call_interrupt",
            "  generic_smp_call_function_single_interrupt()",
            when="call_single",
        ),
        _at("call_interrupt", "  generic_smp_call_function_interrupt()", when="call"),
    ),
    resched=(
        _at(
            "ipi_send_cpu",
            "  native_smp_send_reschedule({cpu})",
            "    __apic_send_IPI({cpu}, {line})",
        ),
        _at("line_ack", "sysvec_reschedule_ipi()"),
        _at("line_eoi", "  apic_eoi()"),
        _at("scheduler_ipi", "  scheduler_ipi()"),
    ),
    nmi=(
        _at(
            "nmi_send",
            "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
            "  nmi_raise_cpu_backtrace(mask)",
            "    __apic_send_IPI_mask(mask, NMI_VECTOR)",
        ),
        _at("nmi_entry", "exc_nmi(regs)", "  default_do_nmi(regs)"),
        _at("nmi_handler", "    nmi_handle(NMI_LOCAL, regs)"),
    ),
)

# ---- powerpc -------------------------------------------------------------------------

#: arch_send_call_function_ipi_mask() does this for each CPU of the mask.
_PPC_PASS: Final = (
    _at(
        "ipi_send_cpu",
        "          do_message_pass({cpu}, {line})",
        "            smp_muxed_ipi_message_pass({cpu}, {line})",
    ),
    _at("chip_message", "              smp_muxed_ipi_set_message({cpu}, {line})"),
    _at(
        "chip_trigger",
        "              smp_ops->cause_ipi({cpu})",
        "                xive_cause_ipi({cpu})",
    ),
)
_PPC_DEMUX: Final = (
    # By the one IPI that a CPU has, or by the core doorbell: the way in for siblings.
    _at("line_ack", "xive_muxed_ipi_action(irq, dev_id)", when="=5"),
    _at("line_ack", "doorbell_exception(regs)", when="=6"),
    _at("chip_demux", "  smp_ipi_demux()", "    smp_ipi_demux_relaxed()", when="first"),
)
_PPC_EOI: Final = _at("chip_eoi", "xive_do_source_eoi(xd)")

_POWERPC: Final = _chains(
    call=(
        _at("call_ipi", *_SEND_ONE),
        _at("ipi_send_cpumask", *_SEND_MASK),
        *_PPC_PASS,
        *_PPC_DEMUX,
        _at("call_interrupt", "      generic_smp_call_function_interrupt()"),
        _PPC_EOI,
    ),
    resched=(
        *_PPC_PASS,
        *_PPC_DEMUX,
        _at("scheduler_ipi", "      scheduler_ipi()"),
        _PPC_EOI,
    ),
    nmi=(
        _at(
            "nmi_send",
            "smp_send_nmi_ipi({cpu}, fn, delay_us)",
            "  do_smp_send_nmi_ipi({cpu}, safe)",
            "    smp_ops->cause_nmi_ipi({cpu})",
        ),
        _at("nmi_entry", "system_reset_exception(regs)"),
        _at("nmi_handler", "  smp_handle_nmi_ipi(regs)"),
    ),
)

# ---- mips ----------------------------------------------------------------------------

_MIPS_SEND: Final = (
    _at(
        "call_ipi",
        *_SEND_ONE,
        "          mp_ops->send_ipi_mask(&cpumask_of_cpu({cpu}), SMP_CALL_FUNCTION)",
    ),
    _at(
        "ipi_send_cpumask",
        *_SEND_MASK,
        "        mp_ops->send_ipi_mask(mask, SMP_CALL_FUNCTION)",
    ),
)
_MIPS_RESCHED: Final = "  mp_ops->send_ipi_single({cpu}, SMP_RESCHEDULE_YOURSELF)"
_MIPS_NMI: Final = (
    _at(
        "nmi_send",
        "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
        "  raise_backtrace(mask)",
    ),
    _at("nmi_handler", "handle_backtrace(info)"),
)

_MIPS: Final = _chains(
    call=(
        *_MIPS_SEND,
        _at("ipi_send_cpu", "            octeon_send_ipi_single({cpu}, {line})"),
        _at("ipi_entry", "mailbox_interrupt(irq, dev_id)"),
        _at("call_interrupt", "  generic_smp_call_function_interrupt()"),
    ),
    resched=(
        _at("ipi_send_cpu", _MIPS_RESCHED),
        _at("ipi_entry", "mailbox_interrupt(irq, dev_id)"),
        _at("scheduler_ipi", "  scheduler_ipi()"),
    ),
    nmi=_MIPS_NMI,
)

#: The IPIs are irqs of a domain over the GIC's: __ipi_send_mask() finds the hwirqs.
_GIC_ENTRY: Final = (
    _at("ipi_entry", "gic_irq_dispatch(desc)", "  gic_handle_shared_int(true)"),
    _at("line_ack", "    gic_ack_irq(d)"),
)

_MIPS_GIC: Final = _chains(
    call=(
        *_MIPS_SEND,
        _at(
            "ipi_send_cpu",
            "            mips_smp_send_ipi_mask(mask, SMP_CALL_FUNCTION)",
            "              __ipi_send_mask(call_desc, mask)",
            "                gic_send_ipi(d, {cpu})",
            when="one",
        ),
        _at("ipi_send_cpu", "                gic_send_ipi(d, {cpu})", when="mask"),
        *_GIC_ENTRY,
        _at(
            "call_interrupt",
            "    ipi_call_interrupt(irq, dev_id)",
            "      generic_smp_call_function_interrupt()",
        ),
    ),
    resched=(
        _at(
            "ipi_send_cpu",
            _MIPS_RESCHED,
            "    mips_smp_send_ipi_single({cpu}, SMP_RESCHEDULE_YOURSELF)",
            "      __ipi_send_mask(sched_desc, mask)",
            "        gic_send_ipi(d, {cpu})",
        ),
        *_GIC_ENTRY,
        _at(
            "scheduler_ipi",
            "    ipi_resched_interrupt(irq, dev_id)",
            "      scheduler_ipi()",
        ),
    ),
    nmi=_MIPS_NMI,
)

# ---- arm64 ---------------------------------------------------------------------------

_ARM64_ENTRY: Final = (
    _at("ipi_entry", "gic_handle_irq(regs)"),
    _at("line_ack", "  ipi_handler(irq, data)", "    do_handle_IPI({line})"),
)
_ARM64_EOI: Final = _at("line_eoi", "  gic_eoi_irq(d)")


def _arm64(*write: str) -> dict[str, Chain]:
    """``write`` is the controller's part: how an SGI is sent."""

    def written(depth: int) -> tuple[str, ...]:
        return tuple(" " * depth + function for function in write)

    return _chains(
        call=(
            _at(
                "call_ipi",
                *_SEND_ONE,
                "          smp_cross_call(cpumask_of({cpu}), {line})",
                "            __ipi_send_mask(desc, cpumask_of({cpu}))",
            ),
            _at(
                "ipi_send_cpumask",
                *_SEND_MASK,
                "        smp_cross_call(mask, {line})",
                "          __ipi_send_mask(desc, mask)",
                *written(12),
            ),
            _at("ipi_send_cpu", *written(14), when="one"),
            *_ARM64_ENTRY,
            _at("call_interrupt", "      generic_smp_call_function_interrupt()"),
            _ARM64_EOI,
        ),
        resched=(
            _at(
                "ipi_send_cpu",
                "  arch_smp_send_reschedule({cpu})",
                "    smp_cross_call(cpumask_of({cpu}), {line})",
                "      __ipi_send_mask(desc, cpumask_of({cpu}))",
                *written(8),
            ),
            *_ARM64_ENTRY,
            _at("scheduler_ipi", "      scheduler_ipi()"),
            _ARM64_EOI,
        ),
        nmi=(
            _at(
                "nmi_send",
                "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
                "  arm64_backtrace_ipi(mask)",
            ),
            _at("ipi_send_cpu", "    __ipi_send_mask(desc, mask)", *written(6)),
            *_ARM64_ENTRY,
            _at("nmi_handler", "      nmi_cpu_backtrace(regs)"),
            _ARM64_EOI,
        ),
    )


_GICV2: Final = _arm64("gic_ipi_send_mask(d, mask)")
_GICV3: Final = _arm64(
    "gic_ipi_send_mask(d, mask)", "  gic_send_sgi(cluster_id, tlist, irq)"
)

# ---- riscv ---------------------------------------------------------------------------

#: ipi_mux_send_mask() rings for a bit that goes from 0 to 1 and is not masked there.
_MUX_RING: Final = _at(
    "line_set",
    "                ipi_mux_send({cpu})",
    "                  sbi_send_ipi({cpu})",
)
_MUX_ENTRY: Final = (
    _at("ipi_entry", "sbi_ipi_handle(desc)", "  ipi_mux_process()"),
    _at("line_ack", "    handle_IPI(irq, data)"),
)

_RISCV: Final = _chains(
    call=(
        _at(
            "call_ipi",
            *_SEND_ONE,
            "          send_ipi_single({cpu}, {line})",
            "            __ipi_send_mask(ipi_desc[op], cpumask_of({cpu}))",
        ),
        _at(
            "ipi_send_cpumask",
            *_SEND_MASK,
            "        send_ipi_mask(mask, {line})",
            "          __ipi_send_mask(ipi_desc[op], mask)",
            "            ipi_mux_send_mask(d, mask)",
        ),
        _at("ipi_send_cpu", "              ipi_mux_send_mask(d, mask)", when="one"),
        _MUX_RING,
        *_MUX_ENTRY,
        _at("call_interrupt", "      generic_smp_call_function_interrupt()"),
    ),
    resched=(
        _at(
            "ipi_send_cpu",
            "  arch_smp_send_reschedule({cpu})",
            "    send_ipi_single({cpu}, {line})",
            "      __ipi_send_mask(ipi_desc[op], cpumask_of({cpu}))",
            "        ipi_mux_send_mask(d, mask)",
        ),
        _MUX_RING,
        *_MUX_ENTRY,
        _at("scheduler_ipi", "      scheduler_ipi()"),
    ),
    nmi=(
        _at(
            "nmi_send",
            "nmi_trigger_cpumask_backtrace(mask, exclude_cpu, raise)",
            "  riscv_backtrace_ipi(mask)",
        ),
        _at(
            "ipi_send_cpu",
            "    __ipi_send_mask(ipi_desc[op], mask)",
            "      ipi_mux_send_mask(d, mask)",
        ),
        _MUX_RING,
        *_MUX_ENTRY,
        _at("nmi_handler", "      nmi_cpu_backtrace(regs)"),
    ),
)

#: By the controller's name, then by the call's (``CALLS``).
CHAINS: Final[Mapping[str, Mapping[str, Chain]]] = {
    "apic": _X86,
    "xive": _POWERPC,
    "mips": _MIPS,
    "mips-gic": _MIPS_GIC,
    "gicv2": _GICV2,
    "gicv3": _GICV3,
    "riscv": _RISCV,
}

# ---- what no function of the kernel stands for: the hardware, here -------------------

#: What the controller does at a tracepoint, where it is not the same on all of them.
_HARDWARE: Final[Mapping[str, Mapping[str, str]]] = {
    "apic": {
        "line_set": "ICR written: {line} set in the IRR of CPU {cpu}",
        "line_ack": "{line} taken from the IRR",
    },
    "xive": {
        "line_set": "the source of CPU {cpu} notifies",
        "ipi_entry": "external interrupt, vector 0x500",
        "line_ack": "{line} found in the messages",
        "line_ack=5": "source of the IPI taken from the event queue",
        "line_ack=6": "core doorbell",
        "line_eoi": "{line} handled",
    },
    "mips": {
        "line_set": "mailbox{cpu}: action {line} written",
        "line_ack": "mailbox{cpu} read and cleared: action {line}",
        "line_eoi": "action {line} handled",
    },
    "mips-gic": {
        "line_set": "WEDGE written: {line} is pending",
        "line_ack": "WEDGE written: {line} cleared",
        "line_eoi": "{line} handled",
    },
    "gicv2": {
        "line_set": "GICD_SGIR written: {line} is pending at CPU {cpu}",
        "line_ack": "GICC_IAR read: {line}",
        "line_eoi": "GICC_EOIR written: {line} not active",
    },
    "gicv3": {
        "line_set": "ICC_SGI1R_EL1 written: {line} is pending at CPU {cpu}",
        "line_ack": "ICC_IAR1_EL1 read: {line}",
        "line_eoi": "ICC_EOIR1_EL1 written: {line} not active",
    },
    "riscv": {
        "line_set": "bit of {line} went from 0 to 1: software interrupt at CPU {cpu}",
        "line_ack": "bit of {line} taken",
        "line_eoi": "{line} handled",
    },
}
_HERE: Final[Mapping[str, str]] = {
    "call_entry": "called",
    "call_interrupt": "its handler is about the queue of CPU {cpu}",
    "call_begin": "a call_single_data is filled",
    "queue_push": "it is locked",
    "csd_queue_cpu": "one compare-and-swap of the word of CPU {cpu}",
    "csd_coalesced": "coalesced: the queue of CPU {cpu} was not empty",
    "wake_idle_without_ipi": "elided: CPU {cpu} polls",
    "call_ipi": "the chip is asked",
    "ipi_send_cpumask": "the chip is asked, once for all",
    "ipi_send_cpu": "{line} for CPU {cpu}",
    "line_set": "{line} is pending at CPU {cpu}",
    "line_kept": "{line} needs no ring: it was pending already, or is masked",
    "chip_message": "message byte of CPU {cpu}",
    "cpu_halt": "CPU {cpu} halts again",
    "cpu_wake": "CPU {cpu} wakes",
    "irq_entry": "in the signal's handler: the kick is acknowledged",
    "irq_masked": "interrupts are off: replayed when they are enabled",
    "irq_exit": "the signal's handler returns",
    "ipi_entry": "CPU {cpu} takes what is pending",
    "ipi_exit": "nothing more is pending",
    "line_ack": "{line} taken",
    "line_eoi": "{line} ended",
    "flush": "the whole queue is taken, in one exchange",
    "csd_function_entry": "func runs",
    "csd_function_exit": "func has returned",
    "csd_unlock": "after func: the caller waits for it",
    "call_end": "the caller saw it unlocked",
    "resched_idle": "the idle loop found NEED_RESCHED",
    "scheduler_ipi": "the nudge is all there is to it",
    "nmi_send": "pending at CPU {cpu}",
    "nmi_entry": "in the NMI's signal handler",
    "nmi_handler": "the handler begins",
    "nmi_exit": "the handler has returned",
}
_PQ: Final = (
    "00: it notifies",
    "01: off",
    "10: Q is set, EOI triggers again",
    "11: absorbed",
)


# ---- reading a trace -----------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A record of the trace, and what it stands for.

    ``at_ns`` counts from the call's first record, ``stage_ns`` from the record before,
    whichever CPU wrote that. ``calls`` are the kernel functions as they are called,
    outermost first and indented; none where only hardware acts. ``note`` is what
    happened here.
    """

    at_ns: int
    stage_ns: int
    cpu: int
    target: int
    event: str
    calls: tuple[str, ...]
    note: str

    @property
    def functions(self) -> list[str]:
        """The bare names of ``calls``."""
        return [_bare(call) for call in self.calls]


@dataclass
class Explained:
    """One call as it was recorded: its steps, and what did not happen."""

    steps: list[Step]
    #: CPUs that were sent no interrupt, and why: "elided" or "coalesced".
    spared: dict[int, str] = field(default_factory=dict)
    #: Functions that the call would have passed with an interrupt, and did not.
    not_passed: list[str] = field(default_factory=list)
    #: The same in sentences, with all that was not needed on the way.
    words: list[str] = field(default_factory=list)

    def functions(self, cpu: int | None = None) -> list[str]:
        """Return the functions passed, in order; on one CPU, or on all."""
        return [
            name
            for step in self.steps
            if cpu is None or step.cpu == cpu
            for name in step.functions
        ]


def read(
    records: Iterable[Any],
    *,
    controller: str,
    call: str,
    sender: int,
    lines: Mapping[int, tuple[str, str]],
    ncpus: int,
    doorbell: str = "futex",
) -> Explained:
    """Explain one call from its trace records (``Cluster.trace_events()``), in order.

    ``records`` are those of the time of the call; of other calls' call_single_data they
    may hold some, which are left out. ``lines`` gives each line's name and use.
    Raises ``KeyError`` for a controller or a call that there is no chain for.
    """
    reader = _Reader(CHAINS[controller][call], controller, sender, lines, doorbell)
    reader.ncpus = ncpus
    records = list(records)
    begun = _core.TRACE_EVENTS.index("call_begin")
    own = {
        int(record["csd"])
        for record in records
        if int(record["event"]) == begun and int(record["slot"]) == sender
    }
    for record in records:
        if not own or int(record["csd"]) in {0, *own}:
            reader.take(record)
    return reader.result()


class _Reader:
    """Turns records into steps; remembers where each CPU is."""

    def __init__(
        self,
        chain: Chain,
        controller: str,
        sender: int,
        lines: Mapping[int, tuple[str, str]],
        doorbell: str,
    ) -> None:
        self.chain = chain
        self.sender = sender
        self.lines = lines
        self.hardware = _HARDWARE[controller]
        bell = doorbells.BY_NAME[doorbell]
        self.ring, self.sleep = bell.rings, bell.sleeps
        self.ncpus = 0
        self.steps: list[Step] = []
        self.first = self.last = 0
        self.asked = "one"  # how many CPUs the sender asked the chip for, last
        self.inside: set[tuple[int, str]] = set()  # a CPU, and what it is inside of
        self.demuxing: set[int] = set()
        self.states: dict[int, str] = {}  # of each target: what became of its IPI
        self.depths: dict[int, int] = {}  # indentation of what empties a CPU's queue
        self.by_line = False  # the NMI came by a line that can be masked
        self.more: list[str] = []

    def take(self, record: Any) -> None:
        """Add the step of one record."""
        event = _core.TRACE_EVENTS[int(record["event"])]
        at, cpu = int(record["stamp"]), int(record["slot"])
        if not self.steps:
            self.first = self.last = at
        words = self._words(event, cpu, record)
        fill = self._fill(event, record)
        stage = self._stage(event, words)
        note = self.hardware.get(event, _HERE.get(event, event))
        note = self.hardware.get(f"{event}={record['arg']}", note)
        if event == "rung":
            note = self._rung(record)
        elif event == "chip_trigger":
            note = f"0 written to trig_mmio: P and Q were {_PQ[int(record['arg']) & 3]}"
        elif event == "chip_eoi":
            note = "P and Q cleared" + (
                ": Q was set, triggered again" if int(record["arg"]) & 1 else ""
            )
        elif event == "chip_demux":
            note = (
                "messages exchanged with 0"
                if int(record["arg"])
                else "no more messages: the loop ends"
            )
        elif event == "cpu_wake":
            note = f"CPU {cpu} wakes: back from {self.sleep}"
        elif event == "nmi_entry" and self.by_line:
            note = "in the handler of the line that stands in for an NMI"
        calls = self._indented(event, stage.functions if stage is not None else (), cpu)
        self.steps.append(
            Step(
                at - self.first,
                at - self.last,
                cpu,
                int(fill["cpu"]),
                event,
                tuple(call.format(**fill) for call in calls),
                note.format(**fill),
            )
        )
        self.last = at
        self._follow(event, cpu, fill, note.format(**fill))

    def _words(self, event: str, cpu: int, record: Any) -> set[str]:
        """Return what ``Stage.when`` may ask for, as it is at this record."""
        arg = int(record["arg"])
        words = {f"={arg}"}
        if event in _BY_LINE and arg in self.lines:
            words.add(self.lines[arg][1])
        if event == "call_ipi":
            self.asked = "one"
        elif event == "ipi_send_cpu":
            words.add(self.asked)
        elif event == "ipi_send_cpumask":
            self.asked = "mask"
            # One register write for all that are not the sender.
            if int(record["func"]) == 1 and int(record["cpu"]) == self.ncpus - 1:
                words.add("all but self")
            words.add("mask")
        elif event == "flush":
            in_handler = any((cpu, end) in self.inside for end in _EXITS)
            words.add("interrupt" if in_handler else "idle")
        elif event == "chip_demux" and arg and cpu not in self.demuxing:
            words.add("first")
        return words

    def _stage(self, event: str, words: set[str]) -> Stage | None:
        for stage in self.chain.stages:
            if stage.event == event and (not stage.when or stage.when in words):
                return stage
        return None

    def _indented(
        self, event: str, calls: tuple[str, ...], cpu: int
    ) -> tuple[str, ...]:
        if event in ("flush", "csd_function_entry", "csd_unlock") and len(calls) == 1:
            return (" " * self.depths.get(cpu, 0) + calls[0],)
        if calls and event in ("flush", "call_interrupt"):
            deepest = len(calls[-1]) - len(calls[-1].lstrip())
            self.depths[cpu] = deepest + 2 * (event == "call_interrupt")
        return calls

    def _fill(self, event: str, record: Any) -> dict[str, Any]:
        arg = int(record["arg"])
        line = self.lines.get(arg, (f"line {arg}", ""))[0] if event in _BY_LINE else ""
        cpu = int(record["slot" if event == "ipi_send_cpumask" else "cpu"])
        return {"cpu": cpu, "line": line}

    def _rung(self, record: Any) -> str:
        way, cpu = int(record["arg"]), int(record["cpu"])
        if way == 1:
            return f"doorbell of CPU {cpu}: {self.ring}"
        if way == 2:
            return f"kick of CPU {cpu}: rt_tgsigqueueinfo, a real-time signal"
        if way == 3:
            return f"NMI of CPU {cpu}: a signal of its own, which nothing masks"
        return f"not rung: CPU {cpu} polls, or somebody has rung it already"

    def _follow(self, event: str, cpu: int, fill: dict[str, Any], note: str) -> None:
        if event == "line_ack":
            self.by_line = True
        elif event in _ENTRIES:
            self.inside.add((cpu, _ENTRIES[event]))
        elif event in _EXITS:
            self.inside.discard((cpu, event))
        elif event == "chip_demux":
            self.demuxing.add(cpu)
        elif event == "chip_eoi":
            self.demuxing.discard(cpu)
        if cpu != self.sender:
            return
        if event == "wake_idle_without_ipi":
            self.states[fill["cpu"]] = "elided"
        elif event == "csd_coalesced":
            self.states[fill["cpu"]] = "coalesced"
        elif event == "ipi_send_cpu":
            self.states[fill["cpu"]] = "sent"
        elif event == "line_kept" or note.startswith("not rung"):
            self.more.append(note)

    def result(self) -> Explained:
        """Say what did not happen, once all records are taken."""
        found = Explained(self.steps)
        found.spared = {
            cpu: state for cpu, state in self.states.items() if state != "sent"
        }
        if found.spared:
            passed = set(found.functions())
            found.not_passed = list(
                dict.fromkeys(
                    name
                    for stage in self.chain.interrupt
                    if self._could(stage)
                    for name in stage.names
                    if name not in passed
                )
            )
        for state, words in _WHY.items():
            cpus = [cpu for cpu, why in found.spared.items() if why == state]
            if cpus:
                found.words.append(words.format(cpus=_cpus(cpus)))
        if found.spared and found.not_passed:
            whom = "" if len(found.spared) == len(self.states) else " for them"
            found.words.append(f"Not passed{whom}: {', '.join(found.not_passed)}.")
        for note in self.more:
            found.words.append(note[0].upper() + note[1:] + ".")
        if not found.words and self.steps:
            found.words.append(
                "Nothing was elided and nothing coalesced: every step was taken."
            )
        return found

    def _could(self, stage: Stage) -> bool:
        """Would the interrupt have gone this way?  Of alternatives one is named."""
        several = self.chain.queue == _QUEUE_MANY and len(self.states) > 1
        if stage.event in ("call_ipi", "ipi_send_cpumask") and several == (
            stage.event == "call_ipi"
        ):
            return False
        if stage.when in ("one", "call_single"):
            return not several
        if stage.when in ("all but self", "call"):
            return several
        if stage.when == "mask":
            return several and not any(
                other.when == "all but self" for other in self.chain.interrupt
            )
        return stage.when != "=6"


#: What a CPU is inside of, from the one record to the other.
_ENTRIES: Final = {
    "irq_entry": "irq_exit",
    "ipi_entry": "ipi_exit",
    "call_interrupt": "flush",
}
_EXITS: Final = tuple(_ENTRIES.values())
#: Events whose ``arg`` is a line.
_BY_LINE: Final = {
    "call_interrupt",
    "call_ipi",
    "chip_message",
    "ipi_send_cpu",
    "ipi_send_cpumask",
    "line_ack",
    "line_eoi",
    "line_kept",
    "line_set",
    "scheduler_ipi",
}
_WHY: Final = {
    "elided": "Elided: {cpus} polling (TIF_POLLING_NRFLAG), which is a promise to look"
    " at the queue and at NEED_RESCHED. The store was the interrupt: the chip was not"
    " touched, nobody was rung.",
    "coalesced": "Coalesced: the queue of {cpus} not empty, so whoever queued first has"
    " sent the interrupt that this call is served by as well.",
}


def _cpus(cpus: Sequence[int]) -> str:
    if len(cpus) == 1:
        return f"CPU {cpus[0]} was"
    return f"CPUs {', '.join(map(str, cpus))} were"


def _bare(function: str) -> str:
    return function.strip().partition("(")[0]
