#!/usr/bin/env python3
"""Code that is replaced while CPUs run it: text_poke() and the icache flush.

    scripts/icache.py [CPUS] [TIMES]                default: 3 CPUs, 50 times

All CPUs but CPU 0 call one function of the machine's table, over and over. CPU 0 says
which version is the oldest that may still run, which it raises each time text_poke()
has returned. Then the same with the flush switched off: CPUs go on with what they have
fetched. It fails if an old version runs after text_poke(), or if then none does.
"""

import sys
import time
from functools import partial

from shmipi import Cluster, _core, atomic, shared
from shmipi.users import icache


def version(number: int) -> int:
    """What is replaced: it says which it is."""
    return number


def call() -> int:
    """Task of the others: count calls; how many were of a replaced version."""
    function, oldest, old = icache.text("version"), shared("oldest"), 0
    while (least := atomic.load(oldest, 0)) >= 0:
        old += function() < least
        atomic.fetch_add(oldest, 1, 1)
    return old


def replace(times: int, others: int) -> None:
    """Task of CPU 0: replace it, and when that has returned say that it is replaced."""
    function, oldest = icache.text("version"), shared("oldest")
    for number in range(int(oldest[0]) + 1, int(oldest[0]) + times + 1):
        function.text_poke(partial(version, number))
        atomic.store(oldest, 0, number)
        enough = int(oldest[1]) + others + 1
        while oldest[1] < enough:  # one has looked since, and called it
            time.sleep(0.002)


if __name__ == "__main__":
    ncpus, times = [int(n) for n in sys.argv[1:]] or [3, 50]
    with Cluster(ncpus) as cluster:
        cluster.users.icache.define("version", partial(version, 0))
        oldest, rules = cluster.shared("oldest", "i8", 2), [r[:2] for r in _core.RULES]
        for broken in (0, 1 << rules.index(("icache", "ipi"))):
            cluster._machine.set_broken(broken)
            last, oldest[1] = int(oldest[0]), 0
            running = cluster.start(call, cpus=range(1, ncpus))
            cluster.run(replace, times, ncpus - 1, cpus=[0])
            oldest[0] = -1
            old = sum(running.results())
            oldest[0] = last + times
            print(f"{times} times, {oldest[1]:,} calls, {old:,} of an old version")
            if (old > 0) != (broken > 0):
                sys.exit("is that a flush?")
