#!/usr/bin/env python3
"""RCU: memory is read without a lock, and used again when nobody reads it any more.

    scripts/rcu.py [CPUS] [UPDATES]         default: 4 CPUs, 300 updates

CPU 0 publishes one object after the other, and frees the one before when a grace period
has gone by; the others read. Then the same without the wait, to show what it is for.
"""

import sys
import time

from shmipi import Cluster, atomic, percpu, shared, smp
from shmipi.users import rcu

FREE = 0


def readers(done: int) -> None:
    """Task: look at the published object, again and again."""
    row, objects = percpu("seen")[smp.smp_processor_id()], shared("objects")
    current = shared("current")
    while atomic.load(current, 1) != done:
        rcu.rcu_read_lock()
        found = atomic.load(current, 0)
        for _ in range(20):
            row[1] += atomic.load(objects, found) == FREE
        rcu.rcu_read_unlock()
        row[0] += 1


def updater(updates: int, wait: bool, done: int) -> None:
    """Task: publish, wait, free."""
    objects, current = shared("objects"), shared("current")
    for number in range(updates):
        old, new = atomic.load(current, 0), (number + 1) % len(objects)
        atomic.store(objects, new, number + 1)
        atomic.store(current, 0, new)
        rcu.synchronize_rcu_expedited() if wait else time.sleep(2e-5)
        atomic.store(objects, old, FREE)
    atomic.store(current, 1, done)


if __name__ == "__main__":
    ncpus, updates = [*map(int, sys.argv[1:]), *(4, 300)[len(sys.argv) - 1 :]]
    with Cluster(ncpus) as cluster:
        cluster.users.rcu.stats()  # it begins with its first use
        seen = cluster.percpu("seen", "i8", 2)
        objects = cluster.shared("objects", "u8", 16)
        cluster.shared("current", "u8", 2)
        for turn, wait in enumerate((True, False), 1):
            seen[:], objects[:] = 0, 1
            tasks = cluster.start(readers, turn, cpus=range(1, ncpus))
            cluster.run(updater, updates, wait, turn, cpus=[0])
            tasks.results()
            reads, freed = (int(n) for n in seen.sum(axis=0))
            print("wait" if wait else "none", f"{reads} reads, {freed} of freed memory")
            if wait and freed:
                sys.exit("a reader saw freed memory")
