#!/usr/bin/env python3
"""Keep a CPU from answering an IPI, so that there is a stall to report.

    scripts/csd_stall.py [STALL_MS] [TIMEOUT_MS]         default: 450 ms, 100 ms

As lib/test_csd_lock.c of the kernel: the target spins inside a handler, which is busy
for who waits, or with interrupts disabled, which is idle: the IPI is sent again.
"""

import logging
import os
import signal
import sys
import threading
import time

from shmipi import Cluster, IpiStallError, smp


def nop() -> None:
    """What is waited for."""


def spin(seconds: float, irqs_off: bool, begun: smp.Completion) -> None:
    """Take so long."""
    flags, end = irqs_off and smp.local_irq_save(), time.monotonic() + seconds
    begun.complete()
    while time.monotonic() < end:
        pass
    smp.local_irq_restore(flags) if irqs_off else None


if __name__ == "__main__":
    stall_ms, timeout_ms = [*map(int, sys.argv[1:]), *(450, 100)[len(sys.argv) - 1 :]]
    seconds = stall_ms / 1000
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    with Cluster(2, csd_lock_timeout=timeout_ms) as cluster:
        begun = cluster.completion("begun")
        print(f"--- CPU 1 stalls for {stall_ms} ms inside a handler")
        cluster.submit(1, spin, seconds, False, begun)
        begun.wait_for_completion()
        cluster.call(1, nop)
        print(f"--- CPU 1 stalls for {stall_ms} ms with interrupts disabled")
        task = cluster.start(spin, seconds, True, begun, cpus=[1])
        begun.wait_for_completion()
        cluster.call(1, nop)
        task.results()
        print(f"--- CPU 1 is stopped by SIGSTOP for {stall_ms} ms")
        os.kill(pid := cluster.cpus[1].pid, signal.SIGSTOP)
        threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()
        cluster.call(1, nop)
        print("--- the same, and panic_on_ipistall")
        cluster.panic_on_ipistall = timeout_ms
        os.kill(pid, signal.SIGSTOP)
        try:
            cluster.call(1, nop)
        except IpiStallError as error:
            print(f"CPU {error.cpu}, {error.function}: {error}")
        os.kill(pid, signal.SIGCONT)
        print(cluster.call(1, int, "7"), "is what it answers now")
