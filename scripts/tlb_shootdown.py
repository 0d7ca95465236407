#!/usr/bin/env python3
"""What TLB shootdowns cost: those who unmap, and those who are interrupted for it.

    scripts/tlb_shootdown.py [CPUS] [PAGES]         default: 3 CPUs, 300 pages each

CPU 0 computes and never asks for anything. Each other CPU "unmaps" PAGES pages: it
takes the mapping away and has all others drop the page from their "TLB", as munmap()
does: smp_call_function(flush, page, wait=True). It fails if a flush was lost.
"""

import sys
import time

from shmipi import Cluster, atomic, percpu, shared, smp


def flush(page: int) -> None:
    """Handler, in interrupt context: forget a page and count it."""
    me = smp.smp_processor_id()
    percpu("tlb")[me, page] = 0
    atomic.fetch_add(percpu("taken"), me, 1)


def work(pages: int, busy: int) -> float:
    """Task: unmap pages one by one; return the time of each in us. CPU 0 computes."""
    start = time.perf_counter()
    if smp.smp_processor_id() == 0:
        while percpu("taken")[0] < pages * busy and time.perf_counter() < start + 20:
            pass  # flushes are counted behind its back
        return 0.0
    for page in range(pages):
        shared("mappings")[page] = 0
        smp.smp_call_function(flush, page, True)
    return (time.perf_counter() - start) / pages * 1e6


def main() -> None:
    """Boot, run, print."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    pages = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    with Cluster(ncpus, idle="halt") as cluster:
        mappings = cluster.shared("mappings", "u8", pages)
        tlb, taken = cluster.percpu("tlb", "u8", pages), cluster.percpu("taken", "u8")
        mappings[:], tlb[:] = 1, 1
        # Each CPU finds the arrays once, before there are any interrupts.
        cluster.run(lambda: (mappings.shape, tlb.shape, taken.shape))
        times = cluster.run(work, pages, ncpus - 1)
        kicks = cluster.counters()["kicks_received"]
        print("CPU  us per unmap  flushes taken  kick signals")
        for cpu, spent in enumerate(times):
            print(f"{cpu:3}{spent:14.1f}{int(taken[cpu]):15}{int(kicks[cpu]):14}")
        wanted = [pages * (ncpus - 1 - (cpu > 0)) for cpu in range(ncpus)]
        if [int(n) for n in taken] != wanted or tlb[0].any():
            sys.exit(f"lost flushes: {taken} were taken, {wanted} sent")


if __name__ == "__main__":
    main()
