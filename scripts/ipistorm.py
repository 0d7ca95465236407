#!/usr/bin/env python3
"""A storm of calls, as the kernel module ipistorm makes: each CPU calls, all at once.

    scripts/ipistorm.py --cpus 4 --seconds 1 --mask 1 --offset 1 --no-wait

CPU a calls CPU a + offset, with a mask within its group, with --all all others; with
--cpulist only these call. Handlers count: what was sent and what ran is compared.
"""

import argparse
import time
from typing import Any

from shmipi import Cluster, CpuMask, NativeHandler, atomic, smp
from shmipi.bench.storm import targets as storm_targets


def storm(targets: list[int], callers: int, options: Any, ran: Any, meet: Any) -> int:
    """Task: meet the others, call until the time is over; return how many calls."""
    cpu, count = smp.smp_processor_id(), NativeHandler("count")
    atomic.fetch_add(meet, 0, 1)
    while atomic.load(meet, 0) < callers:
        time.sleep(0.0005)
    calls, begun = 0, time.monotonic()
    while time.monotonic() < begun + options.seconds:
        if options.all:
            smp.smp_call_function(count, ran[cpu], options.wait)
        else:
            smp.smp_call_function_single(targets[cpu], count, ran[cpu], options.wait)
        calls += 1
        time.sleep(options.delay / 1e6) if options.delay else smp.cond_resched()
    return calls


def main() -> int:
    """Boot, call, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usually = {"cpus": 4, "offset": 1, "mask": 0, "seconds": 1.0, "delay": 0.0}
    for name, usual in usually.items():
        parser.add_argument(f"--{name}", type=type(usual), default=usual)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--cpulist")
    parser.add_argument("--no-wait", dest="wait", action="store_false")
    options = parser.parse_args()
    n, callers = options.cpus, CpuMask(options.cpulist or f"0-{options.cpus - 1}")
    targets = storm_targets(n, options.offset, options.mask or -1)
    with Cluster(n) as cluster:
        ran, meet = cluster.percpu("ran", "i8", 1), cluster.shared("meet", "i8", 1)
        given = targets, len(callers), options, ran, meet
        calls = cluster.run(storm, *given, cpus=callers)
        for cpu in [*range(n), *range(n)]:  # twice: then all that was sent has run
            cluster.call(cpu, int)
        for cpu, sent in zip(callers, calls, strict=True):
            whom = "all others" if options.all else f"CPU {targets[cpu]}"
            print(f"CPU {cpu} -> {whom}: {sent} calls, {ran[cpu, 0]} ran")
        return int(sum(calls) * (n - 1 if options.all else 1) != ran.sum())


if __name__ == "__main__":
    raise SystemExit(main())
