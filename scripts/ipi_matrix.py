#!/usr/bin/env python3
"""N x N matrix of call latencies: row calls column, median round trip in microseconds.

    scripts/ipi_matrix.py [CPUS] [CALLS]        default: 4 CPUs, 300 calls a pair

Each CPU in turn calls each other one with smp_call_function_single(wait=True) and an
empty handler in C. Where two CPUs share a core the target must first be scheduled; the
diagonal is a call to itself, which runs inline. All CPUs but the caller are idle.
"""

import sys
import time

import numpy as np

from shmipi import Cluster, NativeHandler, smp


def measure(others: list[int], calls: int) -> list[float]:
    """Task: call each CPU of ``others``; return the median time of a call, in us."""
    noop = NativeHandler("noop")
    medians = []
    for cpu in others:
        times = np.empty(calls)
        for i in range(calls):
            start = time.perf_counter_ns()
            smp.smp_call_function_single(cpu, noop)
            times[i] = time.perf_counter_ns() - start
        medians.append(float(np.median(times)) / 1e3)
    return medians


def main() -> None:
    """Boot, measure, print."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    calls = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    with Cluster(ncpus) as cluster:
        cpus = cluster.cpus
        print(f"{ncpus} CPUs, idle={cluster.idle}, doorbell={cluster.doorbell}; us")
        print("from  core" + "".join(f"{f'CPU{cpu.id}':>10}" for cpu in cpus))
        for cpu in cpus:
            [row] = cluster.run(measure, list(range(ncpus)), calls, cpus=[cpu.id])
            cells = "".join(f"{value:10.2f}" for value in row)
            print(f"CPU{cpu.id:<4}{cpu.core:3}{cells}", flush=True)


if __name__ == "__main__":
    main()
