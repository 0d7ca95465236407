#!/usr/bin/env python3
"""Where a block request completes: on the CPU that has submitted it.

    scripts/block_completion.py [CPUS] [REQUESTS]     default: 3 CPUs, 60 requests each

The device interrupts CPU 0 for everybody's requests. With the queue's flags off they
complete there; with them on each goes back to its CPU, by one IPI for all that wait.
"""

import sys
import time

from shmipi import Cluster
from shmipi.users import blk


def submit(count: int) -> None:
    """Task: as many as there are tags for."""
    for number in range(min(count, blk.DEPTH)):
        blk.submit(number)


def interrupt() -> int:
    """Task: the device's interrupts; how many."""
    return blk.interrupt(1_000_000)


def ended() -> list[int]:
    """Task: the CPUs on which this CPU's requests have completed."""
    return [request.cpu for request in blk.end()]


def main() -> None:
    """Boot, run, print."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    with Cluster(ncpus) as cluster:
        device = cluster.users.blk
        for name, flags in (("flags off", 0), ("SAME_COMP | SAME_FORCE", 3)):
            device.set(flags)
            before = device.stats().ipis
            cluster.run(submit, count)
            cluster.run(interrupt, cpus=[0])
            while device.stats().in_flight + device.stats().waiting:
                time.sleep(0.001)
            print(f"{name}: {device.stats().ipis - before} IPIs")
            for cpu, where in enumerate(cluster.run(ended)):
                print(f"  submitted on CPU {cpu}: completed on {sorted(set(where))}")
        stats = device.stats()
        print(f"submitted {stats.submitted}, completed {stats.completed}")
        sys.exit(stats.submitted != stats.completed)


if __name__ == "__main__":
    main()
