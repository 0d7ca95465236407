#!/usr/bin/env python3
"""Change what everybody reads without a lock; then a CPU's way down, and up.

Four CPUs read a table in plain Python while it is replaced with all of them stopped, so
nobody sees half of it. Then CPU 2 goes offline and comes back: its states say so.
"""

from collections.abc import Callable

import shmipi
from shmipi import SharedArray, smp
from shmipi.smp import CpuhpState

CHANGES = 40


def read(table: SharedArray, end: SharedArray) -> tuple[int, int]:
    """Task: how often the table was read, and how often it was half new."""
    looks = torn = 0
    while not end[0]:
        smp.preempt_disable()  # the stopper comes before this, or after the next
        torn += len(set(table.tolist())) > 1
        smp.preempt_enable()
        looks += 1
    return looks, torn


with shmipi.Cluster(4) as cluster:
    table, end = cluster.shared("table", "i8", 64), cluster.shared("end", "i8", 1)
    log, at = cluster.shared("log", "i8", (16, 3)), cluster.shared("at", "i8", 1)

    def replace(value: int) -> None:
        for place in range(len(table)):  # all CPUs are stopped: as slowly as it likes
            table[place] = value

    def note(state: int, up: bool) -> Callable[[int], None]:
        def callback(cpu: int) -> None:
            log[at[0]] = cpu, state, up
            at[0] += 1

        return callback

    tasks = cluster.start(read, table, end)
    for value in range(1, CHANGES + 1):
        cluster.smp.stop_machine(replace, value, [value % 4])
    end[0] = 1
    looks, torn = (sum(numbers) for numbers in zip(*tasks.results(), strict=True))
    print(f"{CHANGES} tables were replaced; {looks} looks at it, {torn} of them torn")
    for name in ("BP_PREPARE_DYN", "AP_SCHED_STARTING", "AP_ONLINE_DYN"):
        state = CpuhpState[f"CPUHP_{name}"]
        up, down = note(state, True), note(state, False)
        cluster.smp.cpuhp_setup_state_nocalls(state, "demo", up, down)
    cluster.offline(2)
    cluster.online(2)
    for cpu, state, up in log[: at[0]].tolist():
        print(f"CPU {cpu}: {CpuhpState(state).name} {'startup' if up else 'teardown'}")
