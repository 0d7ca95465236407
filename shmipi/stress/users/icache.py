"""Code replacement under fire: who calls after it has returned runs the new function.

Each function of the table returns its number. A CPU that replaces one tells the others
when that has returned; who looks at that first and calls then must not get less.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from shmipi import atomic, smp
from shmipi.errors import ShmipiOSError
from shmipi.machine import arrays
from shmipi.stress.users.base import Outcome, UserCheck, Violations, Worker
from shmipi.users.icache import Text

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.arrays import SharedArray

FUNCTIONS: Final = 4
_CALLS: Final = 40
_LONG: Final = 400


class Check(UserCheck):
    """Calls beside replacements."""

    name: ClassVar[str] = "icache"

    def __init__(self, cluster: Cluster, seed: int) -> None:
        super().__init__(cluster, seed)
        #: Of each function: its number when a replacement has returned; who replaces;
        #: who runs each, by CPU, while it does.
        self.known = self.shared("known", "i8", (FUNCTIONS, 16))
        self.running = self.percpu("running", "i8", FUNCTIONS)
        self.tally = self.percpu("tally", "i8", 4)
        self.texts = []
        icache = cluster.users.icache
        for n in range(FUNCTIONS):
            name = f"stress.icache.{n}"
            try:
                text = icache.text(name)
                text.text_poke(partial(run, self.running, n, 0))
            except KeyError:
                text = icache.define(name, partial(run, self.running, n, 0))
            self.texts.append(text)

    def work(self) -> Worker:
        """Return what runs on every CPU."""
        return partial(
            worker, self.texts, self.known, self.running, self.tally, self.violations
        )

    def died(self, cpu: int) -> None:
        """Nothing runs there, and another may replace what it was replacing."""
        self.running[cpu] = 0
        for n in range(FUNCTIONS):
            atomic.compare_exchange(self.known, (n, 1), cpu + 1, 0)

    def outcome(self) -> Outcome:
        """Return the account."""
        calls, pokes, failed = (int(n) for n in self.tally[:, :3].sum(axis=0))
        return Outcome(
            {"calls": calls, "replacements": pokes, "given_up": failed},
            {"old_code": self.violations.count},
        )


def run(running: SharedArray, n: int, number: int, cpu: int, long: bool) -> int:
    """Say for how long it runs, as which number; return that."""
    running[cpu, n] = number + 1
    for _ in range(_LONG if long else 0):
        pass
    running[cpu, n] = 0
    return number


def worker(
    texts: list[Text],
    known: SharedArray,
    running: SharedArray,
    tally: SharedArray,
    violations: Violations,
    cpu: int,
    seed: int,
) -> Iterator[None]:
    """Call functions, and now and then replace one."""
    random = Random(seed)
    running[cpu] = 0  # of one who was killed here
    atomic.store(tally, (cpu, 3), arrays.here().machine.slot(cpu).generation)
    while True:
        for _ in range(_CALLS):
            n = random.randrange(FUNCTIONS)
            before = atomic.load(known, (n, 0))
            got = texts[n](cpu, random.random() < 0.5)
            tally[cpu, 0] += 1
            if got < before:
                violations.report(
                    f"CPU {cpu} ran function {n} as of replacement {got}, after"
                    f" replacement {before} had returned"
                )
        if random.random() < 0.2:
            _replace(texts, known, running, tally, violations, cpu, random)
        yield


def _lives(tally: SharedArray, cpu: int) -> bool:
    """Return whether the process that has written to a CPU's rows is there still."""
    slot = arrays.here().machine.slot(cpu)
    return smp.cpu_online(cpu) and int(tally[cpu, 3]) == slot.generation


def _replace(
    texts: list[Text],
    known: SharedArray,
    running: SharedArray,
    tally: SharedArray,
    violations: Violations,
    cpu: int,
    random: Random,
) -> None:
    n = random.randrange(FUNCTIONS)
    if atomic.compare_exchange(known, (n, 1), 0, cpu + 1) != 0:
        return
    try:
        number = atomic.fetch_add(known, (n, 2), 1) + 1
        texts[n].text_poke(partial(run, running, n, number))
        for other in range(len(running)):
            runs = int(running[other, n])
            if 0 < runs <= number and other != cpu and _lives(tally, other):
                violations.report(
                    f"CPU {other} was in function {n} as of replacement {runs - 1} when"
                    f" replacement {number} had returned on CPU {cpu}"
                )
        atomic.store(known, (n, 0), number)
        tally[cpu, 1] += 1
    except ShmipiOSError:
        tally[cpu, 2] += 1
    finally:
        atomic.store(known, (n, 1), 0)
