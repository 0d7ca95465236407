#!/usr/bin/env python3
"""Which CPU does a packet's protocol: receive packet steering (RPS), and RFS.

    scripts/receive_steering.py [CPUS] [PACKETS]      default: 4 CPUs, 20000 packets

CPU 0 gets packets of 8 flows. First RPS spreads the flows by their hash; then tasks
read them on the last CPU, and RFS steers all flows there, none of them out of order.
"""

import sys
import time

from shmipi import Cluster
from shmipi.users import rps

FLOWS = [number * 0x20000001 + 1 & 0xFFFFFFFF for number in range(8)]


def receive(packets: int) -> None:
    """Task: what CPU 0's device brings."""
    done = 0
    while done < packets:
        done += rps.generate(FLOWS[done // 50 % 8], 50)


def main() -> None:
    """Boot, run, print."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    packets = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    with Cluster(ncpus) as cluster:
        steer = cluster.users.rps
        steer.set_map(range(ncpus))
        before = [steer.stats(cpu) for cpu in range(ncpus)]
        for name in ("RPS", "RFS"):
            if name == "RFS":
                steer.set_sock_flow_entries(256)
                steer.set_flow_cnt(256)
                for flow in FLOWS:
                    steer.record(flow, ncpus - 1)
            cluster.run(receive, packets, cpus=[0])
            while steer.stats().queued:
                time.sleep(0.001)
            after = [steer.stats(cpu) for cpu in range(ncpus)]
            there = [
                b.delivered - a.delivered for a, b in zip(before, after, strict=True)
            ]
            sent, before = after[0].ipis - before[0].ipis, after
            print(f"{name}: delivered on CPUs 0 to {ncpus - 1}: {there}, IPIs: {sent}")
        total = steer.stats()
        print(f"{total.in_} = {total.delivered} delivered + {total.dropped} dropped")
        wrong = sum(steer.flow(flow).disorder for flow in FLOWS)
        print(f"out of order: {wrong}")
        sys.exit(wrong or total.in_ != total.delivered + total.dropped)


if __name__ == "__main__":
    main()
