#!/usr/bin/env python3
"""Store buffers, and the membarrier() that empties another CPU's.

    scripts/membarrier.py [ROUNDS]                          default: 100,000 rounds

CPU 0 does x = 1; r1 = y without a fence, CPU 1 does y = 1; a barrier; r2 = x. Each
store may wait in its CPU's store buffer, so both may read 0, although CPU 1 has fenced
itself: it takes two. With membarrier() instead, which has CPU 0 do the other one, both
never read 0. The program fails if they do, or if they never do without.
"""

import sys
import time

from shmipi import Cluster
from shmipi.users import tlb
from shmipi.users.membarrier import (
    LITMUS_WORDS,
    MEMBARRIER_CMD_PRIVATE_EXPEDITED,
    MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED,
    membarrier,
    store_buffer,
)


def side(mm: tlb.Mm, array: object, rounds: int, slow: bool, cmd: int) -> tuple:
    """Task of a CPU: one side of the test, in the address space of both."""
    with tlb.using(mm):
        membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
        return store_buffer(array, rounds, slow=slow, cmd=cmd)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with Cluster(2) as cluster:
        mm = cluster.users.tlb.mm("litmus")
        array = cluster.shared("litmus", "u8", LITMUS_WORDS)
        ways = {
            "a fence of its own": 0,
            "membarrier()": MEMBARRIER_CMD_PRIVATE_EXPEDITED,
        }
        for name, cmd in ways.items():
            zeros = done = 0
            end = time.monotonic() + 20  # the two need a core each at the same time
            while (done < rounds or not (zeros or cmd)) and time.monotonic() < end:
                array[:] = 0
                fast = cluster.start(side, mm, array, rounds, False, 0, cpus=[0])
                slow = cluster.run(side, mm, array, rounds, True, cmd, cpus=[1])
                fast.results()
                done, zeros = done + slow[0][0], zeros + slow[0][1]
            sent = cluster.counters()
            ipis = int(sent["irq_call"].sum() + sent["irq_call_single"].sum())
            print(f"{name:20} {done:9,} rounds, {zeros:,} read 0 twice; IPIs: {ipis:,}")
            if (zeros > 0) != (cmd == 0) or not done:
                sys.exit("is that a store buffer, and that a barrier?")
