#!/usr/bin/env python3
"""Packets to other CPUs through bounded rings: BPF's cpumap.

    scripts/cpumap_redirect.py [CPUS] [PACKETS]       default: 3 CPUs, 200000 packets

CPU 0 redirects packets to the others in turn. Each has a ring of 2048 and a thread that
empties it; CPU 0 wakes a thread once at the end of a poll, not for each packet.
"""

import sys
import time

from shmipi import Cluster
from shmipi.users.cpumap import CpuMap


def redirect(cpumap: CpuMap, packets: int, ncpus: int) -> float:
    """Task: hand them all in; how many a second."""
    begin = time.perf_counter()
    done = turn = 0
    while done < packets:
        turn += 1
        cpu = 1 + turn % (ncpus - 1)
        done += cpumap.generate(cpu, cpu, min(512, packets - done))
    return packets / (time.perf_counter() - begin)


def main() -> None:
    """Boot, run, print."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    packets = int(sys.argv[2]) if len(sys.argv) > 2 else 200_000
    with Cluster(ncpus) as cluster:
        cpumap = cluster.users.cpumap.create("demo")
        for cpu in range(1, ncpus):
            cpumap.update_elem(cpu, 2048)
        [rate] = cluster.run(redirect, cpumap, packets, ncpus, cpus=[0])
        while cpumap.stats.queued:
            time.sleep(0.001)
        stats = cpumap.stats
        print(f"{stats.in_} packets at {rate / 1e6:.1f} million a second")
        print(f"delivered {stats.delivered}, dropped by full rings {stats.dropped}")
        print(f"wake-ups {stats.wakes}: one for {stats.in_ / stats.wakes:.0f} packets")
        sys.exit(stats.in_ != stats.delivered + stats.dropped)


if __name__ == "__main__":
    main()
