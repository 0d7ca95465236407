"""NMIs: with a true one, a CPU that never enables interrupts is dumped and stopped.

Every CPU keeps interrupts disabled most of the time. The host has them all say where
they are, again and again, and each that lives has to. CPUs take ``backtrace_flag`` as
well: whoever has it has it alone. A small machine beside this one is stopped
(``smp_send_stop``) while one of its CPUs keeps interrupts off for ever.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar

from shmipi import _core, atomic, smp
from shmipi.machine.process import is_stopped
from shmipi.stress.users.base import (
    LOOKED_NS,
    Beside,
    Outcome,
    UserCheck,
    Violations,
    Worker,
    core_time,
)

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

__all__ = ["Check"]

_MASKED_S = 0.0008
_HELD_S = 0.0003
_ANSWER_S = (0.5, 1.0)  # the second time it is a violation
_TURN_S = 0.01  # more for each CPU on a core: until it is the turn of the last
_SPIN_S = 60.0
_PAUSE_S = 0.3
_STOP_S = 10.0  # to have a core for ``LOOKED_NS``
_LOOK_S = 0.002


class Check(UserCheck):
    """The check of ``nmi``: backtraces, and ``smp_send_stop``."""

    name: ClassVar[str] = "nmi"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        self.tally = self.percpu("tally", "i8", 2)
        self.holder = self.shared("holder", "i8", 1)
        self.rounds = self.answers = self.stops = 0
        self.users = cluster.users.backtrace
        self.users.backtraces([])  # its memory is made
        cores = len({cpu.core for cpu in cluster.cpus})
        turns = _TURN_S * (cluster.ncpus / cores - 1)
        self.answer_s = _ANSWER_S[0] + turns, _ANSWER_S[1] + turns
        #: CPUs that have not answered when first asked: their process, and how long
        #: that had had a core.
        self.silent: dict[int, tuple[int, int]] = {}
        self._others = Beside(self._stop_others)

    def work(self) -> Worker:
        """Keep interrupts off, and take the flag."""
        return partial(worker, self.tally, self.holder, self.violations)

    def host(self) -> None:
        """Ask every CPU."""
        if self._others.ident is None and not self.cluster._machine.has_no_nmi():
            self._others.start()
        self._others.look()
        asked = self._generations()
        texts = self.users.backtraces(list(asked), timeout=self.answer_s[0])
        if texts is None:
            return  # a CPU has the flag
        self.rounds += 1
        silent = self._silent_ones(texts)
        self.answers += len(texts) - len(silent)
        if silent and not self.cluster._machine.has_no_nmi():
            self._ask_again(silent, asked)

    def _generations(self) -> dict[int, int]:
        return {
            cpu.id: cpu.generation
            for cpu in self.cluster.cpus
            if cpu.state not in ("offline", "dead") and not is_stopped(cpu.pid)
        }

    def _silent_ones(self, texts: dict[int, str]) -> list[int]:
        """Return who did not answer; keep since when, by its time on a core."""
        silent = []
        for cpu, text in texts.items():
            if "did not answer" not in text:
                self.silent.pop(cpu, None)
                continue
            silent.append(cpu)
            generation = self.cluster.cpus[cpu].generation
            if self.silent.get(cpu, (0, 0))[0] != generation:
                self.silent[cpu] = generation, self.core_time(cpu)[1]
        return silent

    def _ask_again(self, cpus: list[int], generations: dict[int, int]) -> None:
        begun = time.monotonic()
        texts = None
        while texts is None and time.monotonic() < begun + self.answer_s[1]:
            texts = self.users.backtraces(cpus, timeout=self.answer_s[1])
        now = self._generations()
        for cpu in self._silent_ones(texts or {}):
            # One that was stopped, killed or offline meanwhile could not answer.
            (generation, had), (state, ran) = self.silent[cpu], self.core_time(cpu)
            same = now.get(cpu) == generations.get(cpu) == generation
            if not same or state in "Tt":
                del self.silent[cpu]
                continue
            if state == "R" and ran - had < LOOKED_NS:
                continue  # it waits for its core: until it has had that, or answers
            first, second = self.answer_s
            self.violations.report(
                f"CPU {cpu} lives and did not answer an NMI in {second:g} s, nor in"
                f" {first:g} s before, and had its core for {(ran - had) // 1_000_000}"
                f" ms: {(texts or {})[cpu].splitlines()[1:3]}"
            )

    def _stop_others(self, ends: threading.Event) -> None:
        """On a machine of its own: its CPUs do not come back."""
        from shmipi.cluster import Cluster

        while not ends.is_set():
            with Cluster(2, idle="halt", controller=self.cluster.controller) as cluster:
                cluster._machine.set_broken(self.cluster._machine.broken())
                cluster.start(never_again, _SPIN_S, cpus=[1])
                while not cluster.cpus[1].task:
                    time.sleep(0.001)
                time.sleep(0.02)
                self.stops += 1
                if not _stop(cluster, cluster.cpus[1].pid):
                    self.violations.report(
                        "CPU 1 keeps interrupts off, and neither the stop IPI nor"
                        " the NMI behind it stopped it"
                    )
                one = cluster.cpus[1]
                if one.state not in ("offline", "dead"):
                    os.kill(one.pid, signal.SIGKILL)  # or its end waits
            ends.wait(_PAUSE_S)

    def finish(self) -> None:
        """Let the other machine end."""
        self._others.end()
        self._others.look()

    def close(self) -> None:
        """Let the other machine end, whatever has become of this machine."""
        self._others.end()

    def outcome(self) -> Outcome:
        """Return what was asked, and what was answered."""
        masked, held = (int(n) for n in self.tally.sum(axis=0))
        done = {
            "rounds": self.rounds,
            "masked": masked,
            "flag_taken": held,
            "machines_stopped": self.stops,
        }
        return Outcome(done, {"answers": self.answers})


def _stop(cluster: Cluster, pid: int) -> bool:
    """Stop a machine; False: CPU 1, that process, could have stopped, and has not.

    The NMI has 10 ms, which is less than a turn where others have the core for most of
    the time; but who has not stopped by then does when it has its core again. Nobody is
    named where nobody is waited for, nor has an NMI been sent.
    """
    if 1 not in cluster.users.stop.smp_send_stop():
        return True
    had, end = core_time(pid)[1], time.monotonic() + _STOP_S
    while cluster.cpus[1].state not in ("offline", "dead"):
        if core_time(pid)[1] - had >= LOOKED_NS:
            return False
        if time.monotonic() > end:
            return True  # it has had no core
        time.sleep(_LOOK_S)
    return True


def never_again(seconds: float) -> None:
    """Task: keep interrupts off until this CPU is stopped."""
    smp.local_irq_disable()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    smp.local_irq_enable()


def worker(
    tally: SharedArray,
    holder: SharedArray,
    violations: Violations,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    """Keep interrupts off; now and then hold backtrace_flag."""
    random = Random(seed)
    machine = _core.current_machine()
    me = machine.slot(cpu).generation << 16 | (cpu + 1)
    while True:
        flags = smp.local_irq_save()
        _spin(_MASKED_S)
        smp.local_irq_restore(flags)
        tally[cpu, 0] += 1
        yield
        if random.random() < 0.2 and machine.backtrace_begin():
            other = int(atomic.exchange(holder, 0, me))
            if other and other != me and _lives(machine, other):
                violations.report(
                    f"CPU {cpu} took backtrace_flag while CPU {(other & 0xFFFF) - 1}"
                    " had it: the mask of the one is the other's"
                )
            _spin(_HELD_S)
            atomic.compare_exchange(holder, 0, me, 0)
            machine.backtrace_end()
            tally[cpu, 1] += 1
            yield


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _lives(machine: _core.Machine, holder: int) -> bool:
    """Is the CPU that wrote this what it was?"""
    slot = machine.slot((holder & 0xFFFF) - 1)
    return slot.generation == holder >> 16 and slot.state != _core.CPU_DEAD
