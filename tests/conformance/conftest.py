"""Lines with handlers of the tests' own, and a look at what arrived where."""

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pytest

import shmipi
from shmipi import smp
from shmipi.irq.chips import Chip

#: Descriptors from the upper end: nobody else takes those in these machines.
_VIRQ = 1000


@dataclass(frozen=True)
class Verdict:
    """What was wrong with the interrupts that CPUs took: cpu -> how many.

    As ``check_acked`` of kvm-unit-tests (arm/gic.c): missing and extra where there had
    to be some, unexpected where there had to be none; taken, but of another number or
    from another sender than was meant.
    """

    missing: dict[int, int] = field(default_factory=dict)
    extra: dict[int, int] = field(default_factory=dict)
    unexpected: dict[int, int] = field(default_factory=dict)
    wrong_irq: dict[int, int] = field(default_factory=dict)
    wrong_sender: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Was anything wrong?"""
        return any(vars(self).values())


def check_acked(
    wanted: dict[int, int],
    acked: Any,
    wrong_irq: Any = (),
    wrong_sender: Any = (),
) -> Verdict:
    """Compare what each CPU took with what it was sent. Arrays are by CPU."""
    verdict = Verdict()
    for cpu, taken in enumerate(np.asarray(acked).tolist()):
        due = wanted.get(cpu, 0)
        if not due and taken:
            verdict.unexpected[cpu] = taken
        elif taken < due:
            verdict.missing[cpu] = due - taken
        elif taken > due:
            verdict.extra[cpu] = taken - due
    for found, counts in (
        (verdict.wrong_irq, wrong_irq),
        (verdict.wrong_sender, wrong_sender),
    ):
        found.update({cpu: int(n) for cpu, n in enumerate(counts) if n})
    return verdict


class Lines:
    """Requests lines of a controller, before there is any IPI domain over it."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.machine = cluster._machine
        self.chip: Chip = cluster.chip
        self._taken: list[tuple[int, int]] = []
        self._kept: list[Any] = []  # a handler lives as long as it may be called
        self._wanted: dict[int, int] = {}

    def of_cpu(self, which: int = 0) -> list[int]:
        """A line for each CPU: the same one, where each CPU has lines of its own."""
        ncpus = self.cluster.ncpus
        free = self.chip.ipi_lines(ncpus)
        if self.chip.flow != "shared":
            return [free[which]] * ncpus
        lines = list(free[which * ncpus : (which + 1) * ncpus])
        for cpu, line in enumerate(lines):
            self.chip.route_line(line, cpu)
        return lines

    def request(self, line: int, handler: Any, info: Any = None) -> int:
        """Give a line a handler; unmask it at every CPU that it can go to."""
        virq = _VIRQ + len(self._kept)
        with self.machine.irq_lock():
            self.machine.irq_request(virq, handler, info)
        self.machine.pic_write(0, "line_virq", line, virq)
        self._kept.append(handler)
        self._taken.append((line, virq))
        for cpu in range(self.cluster.ncpus):
            self.chip.unmask_line(line, cpu)
        return virq

    def request_all(self, handler: Any, info: Any = None, which: int = 0) -> list[int]:
        """Give every CPU a line with this handler; return them by CPU."""
        lines = self.of_cpu(which)
        for cpu, line in enumerate(lines):
            if line not in lines[:cpu]:
                self.request(line, handler, info)
        return lines

    def release(self) -> None:
        """Mask them all and take the handlers away."""
        for line, virq in self._taken:
            for cpu in range(self.cluster.ncpus):
                self.chip.mask_line(line, cpu)
            self.machine.irq_free(virq)
            self.machine.pic_write(0, "line_virq", line, 0)
        self._taken.clear()


@pytest.fixture
def lines() -> Iterator[Callable[[Any], Lines]]:
    """`lines(cluster)`: its lines; what is requested of them ends with the test."""
    made: list[Lines] = []

    def of(cluster: Any) -> Lines:
        made.append(Lines(cluster))
        return made[-1]

    yield of
    for each in made:
        if not each.cluster.closed:
            each.release()


@pytest.fixture
def acked() -> Callable[..., Verdict]:
    """`acked(wanted, taken, ...)`: a Verdict on what CPUs took."""
    return check_acked


@pytest.fixture
def settle(eventually: Callable[..., float]) -> Callable[..., None]:
    """`settle(look, wanted)`: until it is so, and 5 ms for what should not come."""

    def wait(look: Callable[[], Any], wanted: Any, seconds: float = 5.0) -> None:
        def same() -> bool:
            return bool(np.array_equal(look(), wanted))

        end = time.monotonic() + seconds
        while not same() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.005)
        assert np.array_equal(look(), wanted), f"{look()}, and not {wanted}"

    return wait


@pytest.fixture
def held(
    background: Callable[..., Any], eventually: Callable[..., float]
) -> Iterator[Callable[..., Any]]:
    """`held(cluster, cpu)`: that CPU runs a task with interrupts disabled.

    The value has `.release(then)`: run `then()` there, enable interrupts, and return
    (what `look` gave before, what it gave at once after).
    """
    started: list[Held] = []

    def start(cluster: Any, cpu: int, work: Callable[[], Any], look: Any) -> Held:
        started.append(Held(cluster, cpu, work, look, background, eventually))
        return started[-1]

    yield start
    for each in started:
        each.flag[1] = 1


class Held:
    """A CPU with interrupts off, until it is released."""

    def __init__(
        self,
        cluster: Any,
        cpu: int,
        work: Callable[[], Any],
        look: Callable[[], Any],
        background: Callable[..., Any],
        eventually: Callable[..., float],
    ) -> None:
        flag = self.flag = cluster.shared(f"held{cpu}", "i8", 2)
        flag[:] = 0

        def task() -> tuple[Any, Any]:
            smp.local_irq_disable()
            flag[0] = 1
            end = time.monotonic() + 20
            while not flag[1] and time.monotonic() < end:
                pass
            work()
            before = look()
            smp.local_irq_enable()
            return before, look()

        self._thread = background(lambda: cluster.run(task, cpus=[cpu])[0])
        eventually(lambda: flag[0] or not self._thread.is_alive())
        if not flag[0]:
            self._thread.end()  # raises what the task raised

    def release(self) -> Any:
        """Let it go on; return (look before enabling interrupts, look after)."""
        self.flag[1] = 1
        return self._thread.end()


@pytest.fixture
def stuck(
    background: Callable[..., Any], eventually: Callable[..., float]
) -> Iterator[Callable[..., Callable[[], None]]]:
    """`free = stuck(cluster, cpu)`: a task of that CPU is in C and takes no bytecode.

    It takes signals, so native handlers run, but Python ones wait for `free()`.
    """
    libc = ctypes.PyDLL(None)  # keeps the interpreter, as a real C extension may
    shared = ctypes.create_string_buffer(16)  # a pthread_mutexattr_t, between processes
    libc.pthread_mutexattr_init(shared)
    libc.pthread_mutexattr_setpshared(shared, 1)
    ends: list[Callable[[], None]] = []

    def start(cluster: Any, cpu: int) -> Callable[[], None]:
        words = cluster.shared(f"stuck{cpu}", "i8", 17)
        lock = ctypes.c_void_p(words.ctypes.data)
        words[:] = 0
        libc.pthread_mutex_init(lock, shared)
        libc.pthread_mutex_lock(lock)

        def task() -> None:
            wait = ctypes.PyDLL(None).pthread_mutex_lock
            there = ctypes.c_void_p(words.ctypes.data)
            words[16] = 1
            wait(there)

        thread = background(lambda: cluster.run(task, cpus=[cpu]))
        done: list[bool] = []

        def free() -> None:
            if not done:
                done.append(True)
                libc.pthread_mutex_unlock(lock)
                thread.end(20)

        ends.append(free)
        eventually(lambda: words[16])
        # The one place where it sleeps from here on.
        process = psutil.Process(cluster.cpus[cpu].pid)
        eventually(lambda: process.status() == "sleeping")
        return free

    yield start
    for free in ends:
        free()


@pytest.fixture
def masked(machine: Any, background: Any, eventually: Any) -> Iterator[Any]:
    """CPU 1 of `machine` runs a task with interrupts disabled; `masked()` ends it.

    `machine` is the module's, with a shared array "go" of four.
    """
    go = machine.shared("go", "i8", 4)
    go[:] = 0

    def task() -> None:
        smp.local_irq_disable()
        flag = shmipi.shared("go")
        flag[0] = 1
        end = time.monotonic() + 10
        while not flag[1] and time.monotonic() < end:
            pass
        smp.local_irq_enable()

    thread = background(lambda: machine.run(task, cpus=[1]))
    eventually(lambda: go[0])

    def end() -> None:
        go[1] = 1
        thread.end()

    yield end
    end()


@pytest.fixture
def request_irq(machine: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """`request_irq(handler, info, cpus)`: the module's line FREE has it in a test."""
    m, kept = machine._machine, []
    line, virq = request.module.FREE, request.module.VIRQ

    def start(handler: Any, info: Any = None, cpus: Any = (0, 1, 2)) -> None:
        kept.append(handler)
        with m.irq_lock():
            m.irq_request(virq, handler, info)
        m.pic_write(0, "line_virq", line, virq)
        for cpu in cpus:
            machine.chip.unmask_line(line, cpu)

    yield start
    for cpu in range(3):
        machine.chip.mask_line(line, cpu)
        machine.chip.clear_line(line, cpu)
    m.pic_write(0, "line_virq", line, 0)
    m.irq_free(virq)
