"""The scheduler under stress: tasks that every CPU wakes, each on two CPUs of its own.

Each task sleeps until it is owed something, and takes it. Nobody owes it more before it
has: so a wake-up that is lost stays lost, and is seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from shmipi import atomic, errors, smp
from shmipi.stress.users.base import (
    Outcome,
    UserCheck,
    Violations,
    Worker,
    had_no_core,
)
from shmipi.users import scheduler
from shmipi.users.scheduler import TASK_INTERRUPTIBLE, TASK_RUNNING, SchedTask

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_LOST_S = 0.4  # asleep for so long with something that it was woken for
_STARVED_S = 0.5
_WRONG_NS = 50_000_000
_LATE_NS = 20_000_000  # of the CPU's own time: some slices
_LATE_IN = 10
_STEP_S = 2.0
_END_S = 10.0
_BURST = 10
_OWED, _DONE, _RUNS, _STEPS, _HOTPLUG, _ID, _FREE, _WRONG = range(8)


class _Sleeper:
    """A task of the scheduler; what it keeps is in shared memory."""

    def __init__(
        self, book: SharedArray, stop: SharedArray, said: Violations, me: int
    ) -> None:
        self.book, self.stop, self.said, self.me = book, stop, said, me

    def __iter__(self) -> _Sleeper:
        return self

    def __next__(self) -> None:
        book, me, cpu = self.book, self.me, smp.smp_processor_id()
        other = int(atomic.exchange(book, (me, _RUNS), cpu + 1))
        if other:
            self.said.report(
                f"task {me} runs on CPU {cpu} while a step of it runs on CPU"
                f" {other - 1}: it was queued before that had ended"
            )
        self._look_where(cpu)
        book[me, _STEPS] += 1
        ended = False
        while True:
            scheduler.set_current_state(TASK_INTERRUPTIBLE)
            owed = atomic.load(book, (me, _OWED))
            ended = bool(atomic.load(self.stop, 0))
            if owed == book[me, _DONE] and not ended:
                break
            scheduler.set_current_state(TASK_RUNNING)
            atomic.store(book, (me, _DONE), owed)
            if ended:
                break
        atomic.store(book, (me, _RUNS), 0)
        if ended:
            raise StopIteration

    def _look_where(self, cpu: int) -> None:
        book, me, machine = self.book, self.me, _machine()
        own = _allowed(me, machine.ncpus)
        if cpu in own or book[me, _FREE]:
            return
        # Unless its CPUs are offline, or were as it was woken: select_fallback_rq sent
        # it here, and it has to go back at the end of this step.
        count, now = machine.wait_hotplug(0, 0.0), time.monotonic_ns()
        active = any(machine.sched_rq(other)[2] for other in own)
        if count != book[me, _HOTPLUG] or not active:
            book[me, _HOTPLUG], book[me, _WRONG] = count, 0
        elif not book[me, _WRONG]:
            book[me, _WRONG] = now
        elif now - book[me, _WRONG] > _WRONG_NS:
            self.said.report(
                f"task {me} runs on CPU {cpu}, and may run on {sorted(own)} only, where"
                " none has gone on- or offline"
            )


def _machine() -> Any:
    return scheduler._here()._machine


def _allowed(task: int, ncpus: int) -> set[int]:
    """Two CPUs, and the last third of the tasks one: no other CPU helps it out."""
    if task >= 2 * ncpus:
        return {task % ncpus}
    return {task % ncpus, (task + 1) % ncpus}


def _owe(book: SharedArray, task: int) -> int:
    """Owe a task that has what it was owed one more; return how much then, or 0."""
    owed = atomic.load(book, (task, _OWED))
    if owed != atomic.load(book, (task, _DONE)):
        return 0
    if atomic.compare_exchange(book, (task, _OWED), owed, owed + 1) != owed:
        return 0
    return owed + 1


def _preempts(
    book: SharedArray, woken: SharedArray, said: Violations, cpu: int
) -> None:
    """Wake the task that may run here only, and go on: it has to come on top.

    No schedule point here lets it run, and no other CPU may have it: nothing does but
    the request that its wake-up sets, and the tick.
    """
    machine = _machine()
    task = 2 * machine.ncpus + cpu
    owed = _owe(book, task)
    if not owed:
        return
    id, clock = int(book[task, _ID]), time.thread_time_ns
    with contextlib.suppress(errors.NoTaskError):
        scheduler.wake_up_process(id)
        woken[cpu, task] = owed
        began = clock()
        while atomic.load(book, (task, _DONE)) < owed:
            late = clock() - began > _LATE_NS
            row = machine.sched_task(id)
            queued = row[1] == TASK_RUNNING and not row[2] & scheduler._ON_CPU
            if row[3] != cpu:
                return
            if late and queued:
                said.report(
                    f"task {task} was woken on CPU {cpu}, and waits on its run queue"
                    f" while that runs another for {_LATE_NS // 1_000_000} ms: nobody"
                    " has told it to reschedule"
                )
            if late:
                return


def _worker(
    book: SharedArray,
    woken: SharedArray,
    said: Violations,
    kicks: bool,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    random = Random(seed)
    while True:
        if kicks and not random.randrange(_LATE_IN):
            _preempts(book, woken, said, cpu)
        for _ in range(_BURST):
            task = random.randrange(len(book))
            owed = _owe(book, task)
            if not owed:
                continue
            with contextlib.suppress(errors.NoTaskError):
                scheduler.wake_up_process(int(book[task, _ID]))
                # From here on it is the scheduler's fault. Of a waker that is killed
                # before, nobody can tell.
                woken[cpu, task] = owed
        yield


class Check(UserCheck):
    """No wake-up is lost; one CPU at a time, and one it may run on; none starves."""

    name: ClassVar[str] = "sched"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        n = 3 * cluster.ncpus
        self.sched = cluster.users.scheduler
        machine = self.sched._machine
        for cpu in range(cluster.ncpus):
            machine.sched_llc(cpu, 0)  # both ways to a run queue on every computer
        self.book = self.shared("book", "i8", (n, 16))
        self.stop = self.shared("stop", "i8", 1)
        self.woken = self.percpu("woken", "i8", n)
        self.dead = 0
        self.tasks = [self._spawn(i) for i in range(n)]
        self.seen: list[tuple[Any, float, list[tuple[str, int]]]] = [((), 0.0, [])] * n
        # Many CPUs on few cores: it may be long until it is the turn of one.
        turn = 0.05 * max(0, cluster.ncpus - 8)
        self.lost_s, self.starved_s = _LOST_S + turn, _STARVED_S + turn

    def _spawn(self, i: int) -> SchedTask:
        machine = self.sched._machine
        self.book[i, _RUNS] = 0
        self.book[i, _HOTPLUG] = self.book[i, _FREE] = 0
        made = _Sleeper(self.book, self.stop, self.violations, i)
        cpus = _allowed(i, machine.ncpus)
        try:
            task = self.sched.kthread_create(made, cpus=cpus, name=f"stress.{i}")
        except errors.AffinityError:  # both are offline now
            task = self.sched.kthread_create(made, name=f"stress.{i}")
            self.book[i, _FREE] = 1
        self.book[i, _ID] = task.id
        task.wake()
        return task

    def work(self) -> Worker:
        """Return what wakes the tasks."""
        kicks = self.sched._machine.kick
        return partial(_worker, self.book, self.woken, self.violations, kicks)

    def host(self) -> None:
        """Look for the lost and the starved; make anew what died with its CPU."""
        now = time.monotonic()
        known = {row.id: row for row in self.sched.ps()}
        had = self.core_times()
        for i, task in enumerate(self.tasks):
            info = known.get(task.id)
            if info is None or info.state == "dead":
                self._bury(i)
                continue
            owed, done = int(self.book[i, _OWED]), int(self.book[i, _DONE])
            what = (info.state, info.running, info.switches, info.cpu, owed, done)
            if what != self.seen[i][0] or had[info.cpu][0] in "Tt":
                self.seen[i] = what, now, had
                continue
            for_s = now - self.seen[i][1]
            if had_no_core(self.seen[i][2][info.cpu], had[info.cpu]):
                continue  # it waits for its core: others have it
            if for_s > self.starved_s and any(
                map(had_no_core, self.seen[i][2], had)
            ):  # its CPU may wait for such a one: for a flush, in stop_machine
                self.seen[i] = what, now, had
                continue
            if info.running:
                self._in_a_step(i, info.cpu, for_s)
            elif info.state == "sleeping" and owed != done and for_s > self.lost_s:
                self.seen[i] = what, now, had
                if int(self.woken[:, i].max()) >= owed:
                    self.violations.report(
                        f"a wake-up is lost: task {i} sleeps on CPU {info.cpu} since"
                        f" {for_s:.1f} s, owed {owed} and done {done}; it was woken"
                        " between its look at what it waits for and its sleep"
                    )
                self._wake(task)
            elif info.state == "running" and for_s > self.starved_s:
                self.seen[i] = what, now, had
                if self.cluster.cpus[info.cpu].state not in ("offline", "dead"):
                    self.violations.report(
                        f"task {i} starves: on the run queue of CPU {info.cpu} since"
                        f" {for_s:.1f} s, which never looks at it"
                    )

    def _in_a_step(self, i: int, cpu: int, for_s: float) -> None:
        """Blame who keeps a step, which is short, from going on."""
        if for_s < _STEP_S + self.starved_s - _STARVED_S:
            return
        if self.cluster.cpus[cpu].state in ("offline", "dead"):
            return  # it goes on when that is back
        self.seen[i] = (), 0.0, []
        self.violations.report(
            f"task {i} is in a step on CPU {cpu} since {for_s:.1f} s: what came on top"
            " of it does not end, and others wait for it"
        )

    def _bury(self, i: int) -> None:
        try:
            self.tasks[i].result(0)
        except (errors.CpuDiedError, errors.NoTaskError):
            self.dead += 1
        self.tasks[i] = self._spawn(i)

    def _wake(self, task: SchedTask) -> None:
        with contextlib.suppress(errors.NoTaskError):
            task.wake()

    def finish(self) -> None:
        """Let the tasks end."""
        atomic.store(self.stop, 0, 1)
        end = time.monotonic() + _END_S
        left = list(self.tasks)
        while left and time.monotonic() < end:
            for task in left:
                self._wake(task)
            time.sleep(0.005)
            left = [task for task in left if not task.done()]
        for task in self.tasks:
            if task in left:
                self.violations.report(f"{task!r} does not end, although it is woken")
                continue
            try:
                task.result(0)
            except errors.CpuDiedError:
                self.dead += 1

    def outcome(self) -> Outcome:
        """Return how often they were woken, and what is still owed."""
        owed = self.book[:, _OWED] - self.book[:, _DONE]
        return Outcome(
            {
                "wakeups": int(self.book[:, _DONE].sum()),
                "steps": int(self.book[:, _STEPS].sum()),
                "died": self.dead,
            },
            {"owed": int(owed.sum())},
        )
