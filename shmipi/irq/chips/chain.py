"""The kernel functions that an IPI passes: what all architectures have in common.

The chains of one are its controller's (``Chip.chains``), written as somebody knows them
who has read ``kernel/smp.c`` and the architecture's ``smp.c``: an indented line is
called by the one above it. Each entry names the tracepoint of the core
(``SHI_TRACE_EVENTS`` in ``_core/base/layout.h``) that is recorded where this machine
does what that function does, so a function that a trace has no record for was not
passed. ``{cpu}`` is the target, ``{line}`` the line's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = [
    "CALLS",
    "QUEUE_MANY",
    "QUEUE_SINGLE",
    "SEND_MASK",
    "SEND_ONE",
    "Chain",
    "Stage",
    "at",
    "bare",
    "of",
]

#: What can be explained, and the function that a caller calls for it.
CALLS: Final = {
    "single": "smp_call_function_single",
    "many": "smp_call_function_many",
    "resched": "resched_cpu",
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
        return [bare(function) for function in self.functions]


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


def at(event: str, *functions: str, when: str = "") -> Stage:
    """Return a stage; see ``Stage`` for ``when``."""
    return Stage(event, functions, when)


# ---- kernel/smp.c: the same on every architecture ------------------------------------

QUEUE_SINGLE: Final = (
    at("call_entry", "smp_call_function_single({cpu}, func, info, wait)"),
    at("call_begin", "  generic_exec_single({cpu}, csd)"),
    at("queue_push", "    __smp_call_single_queue({cpu}, &csd->node.llist)"),
    at(
        "csd_queue_cpu",
        "      llist_add(node, &per_cpu(call_single_queue, {cpu}))",
    ),
)
QUEUE_MANY: Final = (
    at(
        "call_entry",
        "smp_call_function_many(mask, func, info, wait)",
        "  smp_call_function_many_cond(mask, func, info, ...)",
    ),
    at("call_begin", "    csd_lock(csd)"),
    at(
        "csd_queue_cpu",
        "    llist_add(&csd->node.llist, &per_cpu(call_single_queue, {cpu}))",
    ),
)
#: The target polls: it has promised to look at the queue before it does anything else.
_ELIDED: Final = (
    at(
        "wake_idle_without_ipi",
        "      send_call_function_single_ipi({cpu})",
        "        call_function_single_prep_ipi({cpu})",
        "          set_nr_if_polling(rq->idle)",
    ),
)
#: Looked at only when a single CPU is left to be interrupted.
_ELIDED_OF_MANY: Final = (
    at(
        "wake_idle_without_ipi",
        "    call_function_single_prep_ipi({cpu})",
        "      set_nr_if_polling(rq->idle)",
    ),
)
SEND_ONE: Final = (
    "      send_call_function_single_ipi({cpu})",
    "        arch_send_call_function_single_ipi({cpu})",
)
SEND_MASK: Final = (
    "    send_call_function_ipi_mask(mask)",
    "      arch_send_call_function_ipi_mask(mask)",
)
_RUN: Final = (
    # From the idle loop of a CPU that polled; or inside the interrupt's handler, and
    # then the lines below are indented as deep as that is.
    at(
        "flush",
        "do_idle()",
        "  flush_smp_call_function_queue()",
        "    __flush_smp_call_function_queue(true)",
        when="idle",
    ),
    at("flush", "__flush_smp_call_function_queue(true)", when="interrupt"),
    at("csd_function_entry", "  csd_do_func(func, info, csd)"),
    at("csd_unlock", "  csd_unlock(csd)"),
    at("call_end", "  csd_lock_wait(csd)"),
)
_RESCHED: Final = (
    at(
        "call_entry",
        "resched_cpu({cpu})",
        "  resched_curr(cpu_rq({cpu}))",
        "    __resched_curr(rq, TIF_NEED_RESCHED)",
        "      set_nr_and_not_polling(ti, tif)",
        when="=3",
    ),
    at("call_entry", "smp_send_reschedule({cpu})", when="=2"),
)
_RESCHED_ELIDED: Final = (
    at("wake_idle_without_ipi", "      trace_sched_wake_idle_without_ipi({cpu})"),
    at("resched_idle", "do_idle()", "  need_resched()"),
)


def of(
    *, call: Iterable[Stage], resched: Iterable[Stage], nmi: Iterable[Stage]
) -> dict[str, Chain]:
    """Return the chains of one architecture from what differs: its interrupts."""
    call = tuple(call)
    return {
        "single": Chain(QUEUE_SINGLE, _ELIDED, call, _RUN),
        "many": Chain(QUEUE_MANY, _ELIDED_OF_MANY, call, _RUN),
        "resched": Chain(_RESCHED, _RESCHED_ELIDED, tuple(resched), ()),
        "nmi": Chain((), (), tuple(nmi), ()),
    }


def bare(function: str) -> str:
    """Return a function's name alone."""
    return function.strip().partition("(")[0]
