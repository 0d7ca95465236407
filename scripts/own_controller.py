#!/usr/bin/env python3
"""An interrupt controller of one's own: a "postbox" of eight letters for each CPU.

    scripts/own_controller.py [CPUS]                            default: 3 CPUs

Boots a machine with it, calls every CPU, and sends a letter to a handler of its own.
"""

import sys
import time
from collections.abc import Iterable

from shmipi import Cluster, smp
from shmipi.irq.chips import Chip, Line, Row


class Postbox(Chip):
    """Letters are bits: a CPU takes all there are at once, the least one first."""

    name = "postbox"
    description = "eight letters for each CPU"
    flow = "mailbox"
    max_cpus = 64
    group = 8  # CPUs next to each other, whom one register write reaches
    rows = (Row("WUP", "Wake-up letters"), Row("FUN", "Function call letters"))

    def lines(self, ncpus: int) -> Iterable[Line]:
        """Two letters are the kernel's, six are free for IPI domains."""
        yield Line(0, "WAKE_UP", "reschedule", "WUP")
        yield Line(1, "FUNCTION_CALL", "call", "FUN")
        yield from (Line(letter, f"letter {letter}", "irq") for letter in range(2, 8))


def parcel(virq: int, mine: list[int]) -> None:
    """Handle the letter, in interrupt context: ``mine`` is this CPU's row."""
    mine[0] += 1


def main() -> None:
    """Boot, call, send, print; fail if a letter is lost."""
    ncpus = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with Cluster(ncpus, controller=Postbox, idle="halt") as cluster:
        parcels = cluster.percpu("parcels", "i8")
        while any(cpu.state != "halted" for cpu in cluster.cpus):
            time.sleep(0.001)  # one that polls yet needs no letter
        called = [cluster.call(cpu, smp.smp_processor_id) for cpu in range(ncpus)]
        virq = cluster.irq.irq_reserve_ipi(None, range(ncpus))
        cluster.irq.request_percpu_irq(virq, parcel, "parcel", parcels)
        cluster.irq.enable_percpu_irq_mask(virq)
        cluster.irq.ipi_send_mask(virq, range(1, ncpus))
        deadline = time.monotonic() + 10
        while parcels.sum() < ncpus - 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        print(f"calls ran on {called}; letters: {parcels.tolist()}")
        print(cluster.interrupts(), end="")
        sys.exit("a letter was lost" if any(parcels != [0] + [1] * (ncpus - 1)) else 0)


if __name__ == "__main__":
    main()
