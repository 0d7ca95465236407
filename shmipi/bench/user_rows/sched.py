"""The remote wake-up of a task: until its step runs on the other CPU.

And of two tasks by each other, in turns, both asleep until then: what two processes do
with two pipes in `perf bench sched pipe`.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from shmipi import _core
from shmipi.bench.user_rows.base import Took, UserRow
from shmipi.machine.arrays import SharedArray, home_of
from shmipi.users import scheduler
from shmipi.users.scheduler import TASK_INTERRUPTIBLE, TASK_RUNNING, SchedTask

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_WOKEN, _GAME = "bench.users.woken", "bench.users.game"
_STATES = {"polling": _core.POLLING, "halted": _core.HALTED}
_BATCH = 200  # turns of both players
# Of a game: struct shi_game, measure/wakes.h.
_TURN, _LEFT, _TASK, _BEGAN, _ENDED = 0, 1, 2, 4, 5

#: Why it takes more than a call, to a CPU that polls.
_LINES = (
    "the lines of the task's word, of the run queue and of the csd go to the other CPU"
    " one after the other, of a call that of the csd alone"
)


# ---- on the CPUs ---------------------------------------------------------------------


def sleeper(ran: SharedArray) -> Generator[None, None, None]:
    """The task: count its wake-ups."""
    woken, count = 0, ran.data
    while True:
        scheduler.set_current_state(TASK_INTERRUPTIBLE)
        if scheduler.kthread_should_stop():
            scheduler.set_current_state(TASK_RUNNING)
            return
        yield
        woken += 1
        count[0] = woken


def wakes(
    task: SchedTask, ran: SharedArray, state: int, calls: int, warmup: int, gap_ns: int
) -> _core.Hist:
    """Task on CPU 0: wake it, and see it run; ns of each."""
    took, clock, wake = _core.Hist(), time.perf_counter_ns, scheduler.wake_up_process
    id, count = task.id, ran.data
    for number in range(-warmup, calls):
        _core.bench_await(1, state, gap_ns)
        seen = count[0]
        start = clock()
        wake(id)
        while count[0] == seen:
            pass
        if number >= 0:
            took.record(clock() - start)
    return took


def native_wakes(
    task: int, at: int, calls: int, warmup: int, gap_ns: int, state: int
) -> _core.Hist:
    """The same of a native task, by a native loop."""
    return _core.bench_wakes(
        task, 1, at, calls, warmup=warmup, gap_ns=gap_ns, state=state
    )


def player(shared: SharedArray, me: int) -> Generator[None, None, None]:
    """One of two tasks: wake the other when it is my turn."""
    game, clock = shared.data, time.monotonic_ns
    while True:
        scheduler.set_current_state(TASK_INTERRUPTIBLE)
        if scheduler.kthread_should_stop():
            scheduler.set_current_state(TASK_RUNNING)
            return
        left = game[_LEFT]
        if game[_TURN] != me or not left:
            yield
            continue
        scheduler.set_current_state(TASK_RUNNING)
        if not game[_BEGAN]:
            game[_BEGAN] = clock()
        if left == 1:
            game[_ENDED] = clock()
        game[_LEFT] = left - 1
        game[_TURN] = 1 - me
        scheduler.wake_up_process(game[_TASK + 1 - me])


# ---- rows ----------------------------------------------------------------------------


def _sleeps(rig: Rig, task: SchedTask) -> None:
    while task.info().state != "sleeping" or task.info().running:
        time.sleep(0.0005)


class WakeUp(UserRow):
    """A task that sleeps on an idle CPU."""

    what = "try_to_wake_up of a task, until it runs"

    def __init__(self, flavour: str, state: str) -> None:
        self.flavour, self.state = flavour, state
        self.miss = _LINES if state == "polling" else ""

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Wake it."""
        ran = rig.cluster.shared(_WOKEN, "i8", 1)
        at = home_of(ran).offset_of(ran)
        assert at is not None
        users, machine = rig.cluster.users.scheduler, rig.cluster._machine
        if self.flavour == "python":
            task = users.spawn(sleeper, ran, cpus=1)
            how: Any = wakes, task, ran, _STATES[self.state], calls, warmup, gap_ns
        else:
            task = SchedTask(machine, _core.bench_task(machine, False, 1, at))
            task.wake()
            how = native_wakes, task.id, at, calls, warmup, gap_ns, _STATES[self.state]
        _sleeps(rig, task)
        try:
            took: _core.Hist = rig.run(0, *how)
        finally:
            _end(rig, task)
        return took


class PingPong(UserRow):
    """Two tasks, each on its CPU, that wake each other and sleep."""

    what = "two tasks wake each other, there and back"
    raw_times = 2.0

    def __init__(self, flavour: str, state: str) -> None:
        self.flavour, self.state = flavour, state
        self.miss = _LINES if state == "polling" else ""
        self.beside = "pipe_park" if state == "halted" else ""

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Play."""
        rig.idle(0, "poll" if self.state == "polling" else "halt")
        game = rig.cluster.shared(_GAME, "i8", 6)
        game[:] = 0
        tasks = [self._player(rig, game, me) for me in (0, 1)]
        try:
            for task in tasks:
                task.wake()
                _sleeps(rig, task)
            game[_TASK : _TASK + 2] = [task.id for task in tasks]
            _play(game, tasks[0], max(1, warmup))
            return [
                _play(game, tasks[0], _BATCH) for _ in range(max(1, calls // _BATCH))
            ]
        finally:
            for task in tasks:
                _end(rig, task)
            rig.idle(0, "halt")

    def _player(self, rig: Rig, game: SharedArray, me: int) -> SchedTask:
        machine, at = rig.cluster._machine, home_of(game).offset_of(game)
        assert at is not None
        if self.flavour == "python":
            users = rig.cluster.users.scheduler
            return users.kthread_create(player, game, me, cpus=me)
        return SchedTask(machine, _core.bench_task(machine, True, me, at))


def _play(game: SharedArray, first: SchedTask, turns: int) -> float:
    """Let them take so many turns each: ns of both."""
    game[_TURN] = game[_BEGAN] = game[_ENDED] = 0
    game[_LEFT] = 2 * turns + 1  # the last one says when the one before has come
    first.wake()
    end = time.monotonic() + 30
    while game[_LEFT]:
        time.sleep(0.001)
        if time.monotonic() > end:
            raise RuntimeError("two tasks wake each other, and one does not run")
    return float(game[_ENDED] - game[_BEGAN]) / turns


def _end(rig: Rig, task: SchedTask) -> None:
    machine, end = rig.cluster._machine, time.monotonic() + 10
    machine.sched_stop(task.id)
    while not task.done():
        if time.monotonic() > end:
            raise RuntimeError("a task was told to stop, and does not")
        time.sleep(0.0005)
    machine.sched_release(task.id)


def rows() -> list[UserRow]:
    """Return the rows."""
    made = WakeUp, PingPong
    flavours = "native", "python"
    return [
        row(flavour, state)
        for row in made
        for state in ("polling", "halted")
        for flavour in flavours
    ]
