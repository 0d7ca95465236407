#!/usr/bin/env python3
"""Where every CPU is, what stops them, and what is left of a machine that crashes.

    scripts/crash_dump.py

CPU 1 keeps interrupts disabled for ever, CPU 2 waits for it. An NMI has each show its
stack all the same. Then a native handler on CPU 3 touches memory that is none: that
stops the other CPUs, each of which saves what it was doing, and one file says it all.
"""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shmipi import Cluster, CpuDiedError, NativeHandler, smp
from shmipi.cli import main as shmipi


def never_again(off: Any) -> None:
    """Task: nothing that can be masked reaches this CPU any more."""
    smp.local_irq_disable()
    off[0] = 1
    while True:
        pass


def nop(info: object) -> None:
    """What is waited for in vain."""


def main() -> None:
    """Boot, look, crash, read."""
    os.dup2(1, 2)  # what the firmware says is part of it
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "crash.json")
        with Cluster(4, crash=file) as cluster:
            off = cluster.shared("off", "i8", 1)
            cluster.start(never_again, off, cpus=[1])
            while not off[0]:
                time.sleep(0.01)
            cluster.start(smp.smp_call_function_single, 1, nop, None, True, cpus=[2])
            while not cluster.cpus[2].task or cluster.cpus[2].state != "halted":
                time.sleep(0.1)
            cluster.users.backtrace.trigger_all_cpu_backtrace()
            try:
                cluster.call(3, NativeHandler("count"), 8)  # adds 1 to what is at 8
            except CpuDiedError as error:
                print(error)
            while not file.exists():
                time.sleep(0.01)
        shmipi(["crash", str(file)])


if __name__ == "__main__":
    main()
