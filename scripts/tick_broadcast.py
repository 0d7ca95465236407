#!/usr/bin/env python3
"""Who wakes a CPU that sleeps with its own timer stopped: tick broadcast.

    scripts/tick_broadcast.py [CPUS] [TIMERS]         default: 4 CPUs, 40 timers each

Every CPU starts a timer and sleeps, again and again. In deep sleep a CPU's own timer
stands still: the broadcast device, bound to one CPU, fires the others' through the
timer's interrupt line. Half way the CPU that has the device is taken offline.
"""

import sys
import time

from shmipi import Cluster, percpu, smp
from shmipi.users import tick


def fired(timer: tick.HrTimer) -> None:
    """Handler, in hard interrupt context: how late is it?"""
    row, late = percpu("log")[int(timer.name)], tick.ktime_get() - timer.due
    row[:] = row[0] + 1, row[1] + (late < 0), max(row[2], late)


def sleeper(timers: int) -> None:
    """Task: start a timer, sleep until it has fired."""
    timer = tick.hrtimer(str(cpu := smp.smp_processor_id()))
    for number in range(timers):
        tick.hrtimer_start(timer, (number % 7 + 1) * 1_000_000)
        end = time.monotonic() + 20  # lost by then
        while percpu("log")[cpu, 0] == number and time.monotonic() < end:
            smp.wait_for_interrupt(1.0)


def main() -> None:
    """Boot, run, print."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    timers = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    with Cluster(ncpus, idle="halt") as cluster:
        log = cluster.percpu("log", "i8", 3)
        broadcast = cluster.users.tick
        for cpu in range(ncpus):
            broadcast.hrtimer(str(cpu), fired)
        for part in range(2):
            log[:] = 0
            if part and (owner := broadcast.stats().bound_on) is not None:
                cluster.offline(owner)
            cluster.run(sleeper, timers, cpus=cluster.online_mask)
            stats = broadcast.stats()
            print(f"the broadcast device is bound to CPU {stats.bound_on}")
            print("CPU  timers  early  latest us  broadcasts sent  taken")
            for cpu in cluster.online_mask:
                one, (fires, early, late) = stats.cpus[cpu], log[cpu].tolist()
                figures = f"{cpu:3}{fires:8}{early:7}{late / 1000:11.1f}"
                print(f"{figures}{one.sent:17}{one.broadcast:7}")
                if early or fires != timers:
                    sys.exit(f"CPU {cpu}: {fires} of {timers} timers, {early} early")


if __name__ == "__main__":
    main()
