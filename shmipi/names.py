"""Names that options are checked against before anything heavy is imported.

Each list is the order in which ``--help`` shows what it names.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BENCHES", "CHIPS", "CONTROLLERS", "DOORBELLS", "IDLE", "IDLE_POLICIES"]

#: What wakes a halted CPU, by its number in the segment.
DOORBELLS: Final = ("futex", "sem", "signal", "eventfd", "mqueue", "pipe")
#: What an idle CPU does, by its number in the segment.
IDLE: Final = ("poll", "haltpoll", "halt")
IDLE_POLICIES: Final = ("auto", *IDLE)
#: The interrupt controllers, and the module of ``shmipi.irq.chips`` that has each.
CHIPS: Final = {
    "apic": "apic",
    "xive": "xive",
    "mips": "mips",
    "mips-gic": "mips_gic",
    "gicv2": "gic",
    "gicv3": "gic",
    "riscv": "riscv",
    "loongarch": "loongarch",
}
CONTROLLERS: Final = tuple(CHIPS)

#: Every module of ``shmipi.bench`` that measures, with its line in ``bench --help``.
BENCHES: Final = {
    "limits": "round trips between two processes with nothing of shmipi in between",
    "latency": "waiting calls from one CPU to another, beside their limits",
    "controllers": "the same calls through each interrupt controller",
    "irq": "IPIs of a domain to the handlers of requested irqs, beside plain calls",
    "throughput": "calls per second that nobody waits for",
    "boot": "boot and shutdown time, and memory per CPU",
    "broadcast": "on_each_cpu(wait=True) over many halted CPUs",
    "death": "how soon the death of a CPU is told to who waits for it",
    "matrix": "calls from each core to each other one",
    "gap": "calls after the target was left alone, from 1 us to 100 ms",
    "storm": "many CPUs call at once, in the patterns of ipistorm",
    "victim": "what interrupts take from the work of a CPU, also the kernel's own",
    "norov": "the rows of the kernel's IPI benchmark, printed as it prints them",
    "scale": "broadcasts over 2 to 1,024 CPUs, beside as many plain processes",
    "peers": "the same work by what else wakes a process in Python",
    "kernel": "what the kernel's own inter-processor interrupts cost here",
    "trace": "what tracepoints cost, switched off and on",
    "users": "what IPIs are for: each beside the raw calls that it is made of",
}
