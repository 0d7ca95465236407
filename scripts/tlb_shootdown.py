#!/usr/bin/env python3
"""A TLB shootdown: what munmap() has to do before a page may be used again.

    scripts/tlb_shootdown.py [CPUS] [PAGES]         default: 3 CPUs, 100 pages each

CPU 0 computes in an address space. Each other CPU maps pages there, lets CPU 0 use
them, and unmaps them: that interrupts CPU 0, which drops them from its TLB. Then the
same with that rule switched off. It fails if a load sees what is gone, or if then none.
"""

import contextlib
import sys
import time

from shmipi import Cluster, PageFaultError, _core, atomic, shared, smp
from shmipi.users import tlb


def compute(mm: tlb.Mm, others: int) -> tuple[int, int]:
    """Task of CPU 0: load from everywhere; how many loads, and how many were stale."""
    (known, looks, done), loads, stale = shared("book"), 0, 0
    tlb.use_mm(mm)
    while atomic.load(done, 0) < others:
        for cpu in range(1, others + 1):
            atomic.fetch_add(looks, cpu, 1)
            before = atomic.load(known, cpu)
            with contextlib.suppress(PageFaultError):
                found = tlb.load(cpu << 32)
                loads, stale = loads + 1, stale + (0 < found < before)
    return loads, stale


def unmap(mm: tlb.Mm, pages: int) -> None:
    """Task of the others: map, let it be used, unmap."""
    (known, looks, done), cpu = shared("book"), smp.smp_processor_id()
    for what in range(1, 2 * pages + 1):  # odd: mapped, with that in it
        if what % 2:
            mm.mmap(tlb.PAGE_SIZE, address=cpu << 32)
            mm.write(cpu << 32, what.to_bytes(8, "little"))
        else:
            mm.munmap(cpu << 32, tlb.PAGE_SIZE)
        atomic.store(known, cpu, what)
        seen = atomic.load(looks, cpu)
        while atomic.load(looks, cpu) < seen + 2:  # a whole look of CPU 0
            time.sleep(0.0005)
    atomic.fetch_add(done, 0, 1)


ncpus, pages = [int(n) for n in sys.argv[1:]] or [3, 100]
with Cluster(ncpus, idle="halt") as cluster:
    mm, rules = cluster.users.tlb.mm("shop"), [rule[:2] for rule in _core.RULES]
    for broken in (0, 1 << rules.index(("tlb", "shootdown"))):
        cluster._machine.set_broken(broken)
        cluster.shared("book", "i8", (3, ncpus))[:] = 0
        computing = cluster.start(compute, mm, ncpus - 1, cpus=[0])[0]
        cluster.run(unmap, mm, pages, cpus=range(1, ncpus))
        loads, stale = computing.result()
        print(f"{loads} loads, {stale} stale, flushes {cluster.counters()['irq_tlb']}")
        if (stale > 0) != (broken > 0):
            sys.exit("is that a TLB?")
