#!/usr/bin/env python3
"""Where code runs: a task, an NMI, an irq_work, and softirqs, each in turn.

    scripts/contexts.py [CONTROLLER]                  default: apic

An NMI comes to a task that has interrupts disabled, and queues an irq_work, which runs
when they are on again, and raises softirqs, which run after it, lowest first.
"""

import sys
import time

from shmipi import Cluster, atomic, shared, smp

ASKED = ("in_task", "in_serving_softirq", "in_hardirq", "in_nmi", "irqs_disabled")
NAMES = ("task", "NMI", "irq_work", "softirq HI", "softirq TASKLET", "task again")


def here(what: int) -> None:
    """Write down where this runs, and leave the rest to others."""
    row = shared("log")[1 + atomic.fetch_add(shared("log"), (0, 0), 1)]
    answers = sum(bool(getattr(smp, name)()) << n for n, name in enumerate(ASKED))
    row[:] = what, answers, smp.preempt_count()
    if NAMES[what] == "NMI":
        smp.irq_work_queue(smp.the_work)  # type: ignore[attr-defined]
    elif NAMES[what] == "irq_work":
        list(map(smp.raise_softirq, (smp.TASKLET_SOFTIRQ, smp.HI_SOFTIRQ)))


def task() -> None:
    """Hold interrupts off until the NMI has come, if it can: some can be masked."""
    smp.the_work = smp.irq_work(here, 2)  # type: ignore[attr-defined]
    smp.local_irq_disable()
    here(0)
    for count, seconds in ((2, 0.5), (len(NAMES) - 1, 10.0)):
        end = time.monotonic() + seconds
        while shared("log")[0, 0] < count and time.monotonic() < end:
            pass
        smp.local_irq_enable()
    here(5)


def main() -> None:
    with Cluster(2, idle="halt", controller=(sys.argv[1:] or ["apic"])[0]) as cluster:
        log = cluster.shared("log", "i8", (16, 3))
        cluster.smp.open_softirq(smp.HI_SOFTIRQ, lambda: here(3))
        cluster.smp.open_softirq(smp.TASKLET_SOFTIRQ, lambda: here(4))
        running = cluster.start(task, cpus=[1])
        while not log[0, 0]:
            time.sleep(0.001)
        cluster.smp.smp_send_nmi_ipi(1, lambda regs: here(1), 10_000_000)
        running.results(15)
        for what, answers, count in (rows := log[1 : 1 + log[0, 0]].tolist()):
            said = " ".join(name for n, name in enumerate(ASKED) if answers >> n & 1)
            print(f"{NAMES[what]:16} preempt_count {count:#8x}  {said}")
        sys.exit([row[0] for row in rows] != list(range(len(NAMES))))


if __name__ == "__main__":
    main()
