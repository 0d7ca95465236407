#!/usr/bin/env python3
"""Tasks that sleep and are woken, on run queues; and how the wake-ups got there.

    scripts/scheduler.py [WAKE-UPS]         default: 500

CPU 0 owes two sleepers on CPU 1 something, again and again, and wakes them.
"""

import contextlib
import sys
from collections.abc import Iterator

from shmipi import Cluster, NoTaskError, SharedArray, smp
from shmipi.users import scheduler


def sleeper(owed: SharedArray, me: int, last: int) -> Iterator[None]:
    """Take what is owed, and sleep when there is nothing: no wake-up falls between."""
    done = 0
    while done < last:
        scheduler.set_current_state(scheduler.TASK_INTERRUPTIBLE)
        if owed[me] == done:
            yield  # schedule()
        scheduler.set_current_state(scheduler.TASK_RUNNING)
        done = int(owed[me])


def producer(owed: SharedArray, tasks: list[scheduler.SchedTask], last: int) -> None:
    """Task on CPU 0: each sleeper in turn."""
    for n in range(last):
        for me, task in enumerate(tasks):
            owed[me] = n + 1
            with contextlib.suppress(NoTaskError):  # it has seen the last already
                scheduler.wake_up_process(task)


class Roamer:
    """It pickles, so it goes where there is room."""

    def __init__(self, steps: int) -> None:
        self.left, self.cpus = steps, set[int]()

    def __next__(self) -> None:
        self.cpus.add(smp.smp_processor_id())
        self.left -= 1
        if not self.left:
            raise StopIteration(sorted(self.cpus))


if __name__ == "__main__":
    last = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with Cluster(4, idle="halt") as cluster:
        sched, owed = cluster.users.scheduler, cluster.shared("owed", "i8", 2)
        tasks = [sched.spawn(sleeper, owed, me, last, cpus=1) for me in (0, 1)]
        roamer = sched.spawn(Roamer(300))
        cluster.run(producer, owed, tasks, last, cpus=[0])
        assert [task.result(10) for task in tasks] == [None, None]
        print(f"{2 * last} things owed, all taken; one roamed: {roamer.result(10)}")
        for rq in map(sched.rq, range(cluster.ncpus)):
            print(f"{rq.switches} steps, {rq.wakelist} by {rq.batches} wake lists")
