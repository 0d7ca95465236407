#!/usr/bin/env python3
"""A CPU left alone: what reaches an isolated one, and why.

    scripts/nohz_full.py [SECONDS]                           default: 0.3 seconds

CPU 2 is nohz_full and computes. Tasks and timers that may run anywhere keep off it,
also timers it starts. Then it is kicked three times, for a cause each. Else it fails.
"""

import sys
import time

from shmipi import Cluster, NativeHandler, atomic, shared, smp
from shmipi.users import nohz, scheduler, tick


def compute() -> int:
    """Task of CPU 2: nobody else's business; how often its timer stood here."""
    timer, stop, here = tick.hrtimer("any"), shared("stop"), 0
    atomic.store(stop, 1, 1)
    while not atomic.load(stop, 0):
        tick.hrtimer_start(timer, 1_000_000_000)
        here += timer.cpu == 2
    return here


def work(seconds: float) -> set[int]:
    """Task of CPU 0: tasks, kicks; where those went."""
    seen, end = set(), time.monotonic() + seconds
    while not seen or time.monotonic() < end:
        tasks = [scheduler.spawn(smp.smp_processor_id) for _ in range(6)]
        seen |= {task.result() for task in tasks}
    for bit in (nohz.TICK_DEP_BIT_SCHED, nohz.TICK_DEP_BIT_RCU):
        nohz.tick_nohz_dep_set_cpu(2, bit)
        nohz.tick_nohz_dep_clear_cpu(2, bit)
        time.sleep(0.3)  # one that is pending stands for the next, too
    return seen if nohz.wake_up_nohz_cpu(2) else set()


if __name__ == "__main__":
    with Cluster(4, nohz_full="2") as cluster:
        stop = cluster.shared("stop", "i8", 2)
        cluster.users.tick.hrtimer("any", NativeHandler("noop"))
        running = cluster.start(compute, cpus=[2])
        while not stop[1]:
            time.sleep(0.01)
        (before,) = cluster.users.nohz.stats()
        (seen,) = cluster.run(work, float([*sys.argv, "0.3"][1]), cpus=[0])
        time.sleep(0.3)
        (now,) = cluster.users.nohz.stats()
        stop[0] = 1
        (timers,) = running.results()
    taken = {cause: n - before.interrupts[cause] for cause, n in now.interrupts.items()}
    taken = {cause: n for cause, n in taken.items() if n}
    kicks = {cause: n for cause, n in now.by_cause.items() if n}
    print(f"tasks ran on {sorted(seen)}; timers on CPU 2: {timers}")
    print(f"interrupts of CPU 2: {taken}; kicks by cause: {kicks}")
    counted = now.counted - before.counted, sum(kicks.values())
    if not seen or 2 in seen or timers or taken != {"irq_work": 3} or counted != (3, 3):
        sys.exit("is that a CPU left alone?")
