"""What runs on each CPU of a stress run: the invoker task and the handlers."""

from __future__ import annotations

import os
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any, Final

import numpy as np

from shmipi import _core, atomic, smp
from shmipi.cpumask import CpuMask
from shmipi.errors import (
    ArenaFullError,
    CpuDiedError,
    CpuOfflineError,
    RemoteCallError,
    ShmipiWarning,
)
from shmipi.machine import arrays
from shmipi.stress.book import (
    H_INCARNATION,
    K_DRIVER,
    K_GO,
    K_LONGWAIT,
    K_PAUSE,
    K_READY,
    K_SALT,
    K_STOP,
    NATIVE,
    WAIT,
    Book,
    Ledger,
)
from shmipi.stress.options import PRIMITIVES

__all__ = ["invoke"]

#: The share of native handlers where both kinds are asked for.
_NATIVE_SHARE: Final = 0.25
_SPINS, _YIELDS = 20, 40
_LOOK = 256  # calls between looks at whether the driver is still there
_NAP_S, _MAX_NAP_S = 50e-6, 2e-3

_book: Book | None = None


def _the_book() -> Book:
    """Return the book of the machine that this process is a CPU of."""
    global _book
    if _book is None:
        # A handler that interrupted this would look for them once more.
        flags = smp.local_irq_save()
        try:
            _book = Book.find(arrays.shared, arrays.shared("stress.plug").shape[0])
        finally:
            smp.local_irq_restore(flags)
    return _book


# ---- handlers ------------------------------------------------------------------------


def on_single(info: int) -> None:
    """The handler of single calls, with scftorture's checks."""
    book = _book or _the_book()
    at = book.ran_single(info, smp.smp_processor_id())
    _burn(book, info)
    book.left_single(at, info)


def on_many(info: int) -> None:
    """The handler of broadcasts."""
    book = _book or _the_book()
    cpu = smp.smp_processor_id()
    at = book.ran_many(info, cpu)
    _burn(book, info + cpu)
    book.left_many(at, info)


def on_flush(info: None) -> None:
    """Nothing: that it has run is the message."""


def _burn(book: Book, number: int) -> None:
    """Take long now and then, as scftorture's handler does; by the call's number."""
    dice = (number ^ book.control[K_SALT]) * 0x9E3779B97F4A7C15 >> 20 & 0xFFFFFFFF
    longwait = book.control[K_LONGWAIT]
    if longwait:
        if dice & 0xFFF:
            return
        seconds = float((dice >> 12) % longwait + 1) * 1e-3
    elif dice & 0xFFC0:
        return
    else:
        seconds = (dice & 0x3F) * 1e-6
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


# ---- the invoker ---------------------------------------------------------------------


def _call_many(mask: CpuMask, function: Any, info: Any, wait: bool) -> None:
    # As scftorture: its caller answers for preemption being disabled.
    smp.preempt_disable()
    try:
        smp.smp_call_function_many(mask, function, info, wait)
    finally:
        smp.preempt_enable()


def invoke(seed: int, incarnation: int, weights: tuple[int, ...], handler: str) -> None:
    """Call at random until told to stop: the task of one CPU.

    ``incarnation`` tells the invokers that this CPU has had apart: a killed one's
    successor first settles the calls that it left.
    """
    book = _the_book()
    cpu = smp.smp_processor_id()
    # The kernel's warning for a reschedule of an offline CPU; here that is the point.
    warnings.filterwarnings(
        "ignore", "sched: Unexpected reschedule", category=ShmipiWarning
    )
    ledger = Ledger(book, cpu, lambda cpus: prove(cpus, cpu), pause, is_dead)
    book.head_words[cpu, H_INCARNATION] = incarnation
    ledger.inherit()
    # All begin at once: the first must not torture a machine that is still importing.
    atomic.fetch_add(book.control, K_READY, 1)
    while not (book.control[K_GO] or book.control[K_STOP]):
        orphaned(book)
        time.sleep(0.002)
    # A string: it is hashed, so that neighbours' choices have nothing in common.
    Invoker(
        book, ledger, cpu, Random(f"{seed}/{cpu}/{incarnation}"), weights, handler
    ).loop()


def orphaned(book: Book) -> None:
    """Stop the run if the host that drives it is gone: nobody else ever would."""
    driver = book.control[K_DRIVER]
    slot, generation = (driver & 0xFFFFFFFF) - 1, driver >> 32
    if _core.current_machine().slot(slot).generation != generation:
        book.control[K_STOP] = 1


def is_dead(cpu: int) -> bool:
    """Has its process ended, whoever ended it?"""
    return _core.current_machine().slot(cpu).state == _core.CPU_DEAD


def pause(turn: int) -> None:
    """Wait a little: spin, then yield, then sleep; interrupts come in all the time."""
    smp.cond_resched()
    if turn < _SPINS:
        return
    if turn < _YIELDS:
        os.sched_yield()
        return
    time.sleep(min(_MAX_NAP_S, _NAP_S * (turn - _YIELDS + 1)))


def prove(cpus: Iterable[int], me: int) -> None:
    """Return when nothing that this CPU had sent to ``cpus`` can run any more.

    Two waiting calls, the second taken off the queue after all that came with the
    first. A CPU that is offline has drained its queue, a dead one has dropped it.
    """
    for cpu in cpus:
        if cpu == me:
            continue
        for _ in range(2):
            try:
                smp.smp_call_function_single(cpu, on_flush)
            except (CpuOfflineError, CpuDiedError):
                break


class Invoker:
    """The loop of one CPU: scftorture's ``scftorture_invoke_one`` again and again."""

    def __init__(
        self,
        book: Book,
        ledger: Ledger,
        cpu: int,
        random: Random,
        weights: tuple[int, ...],
        handler: str,
    ) -> None:
        self.book = book
        self.ledger = ledger
        self.cpu = cpu
        self.random = random
        self.limits = list(accumulate(weights))
        self.share = {"python": 0.0, "native": 1.0, "mix": _NATIVE_SHARE}[handler]
        self.counter = smp.NativeHandler("count")
        self.everybody = CpuMask.full(book.ncpus)
        self.others = np.ones(book.ncpus, np.bool_)
        self.others[cpu] = False
        self.primitives: tuple[Callable[[], None], ...] = (
            self.resched,
            lambda: self.single(0, False),
            lambda: self.single(WAIT, False),
            lambda: self.single(0, True),
            lambda: self.many(0),
            lambda: self.many(WAIT),
            lambda: self.all(0),
            lambda: self.all(WAIT),
        )

    def loop(self) -> None:
        """Call until the stop word is set; then settle everything."""
        control, ledger, limits = self.book.control, self.ledger, self.limits
        random, total, turn = self.random.random, limits[-1], 0
        while not control[K_STOP]:
            ledger.beat()
            turn += 1
            if not turn % _LOOK:
                orphaned(self.book)
            if control[K_PAUSE]:
                orphaned(self.book)
                smp.cond_resched()
                time.sleep(0.001)
                continue
            choice = bisect_right(limits, random() * total)
            # Counted first: a call that its sender's death ends has been made.
            ledger.count(PRIMITIVES[choice])
            ledger.doing(choice, -1)
            try:
                self.primitives[choice]()
            except RemoteCallError as error:
                ledger.count("raised")
                ledger.complain(f"a handler raised: {error}")
            smp.cond_resched()
        ledger.doing(0, -1)
        ledger.settle_all()

    def _handler(self, flags: int) -> int:
        return flags | NATIVE if self.random.random() < self.share else flags

    def resched(self) -> None:
        """Nudge a random CPU."""
        smp.smp_send_reschedule(int(self.random.random() * self.book.ncpus))

    def single(self, flags: int, rpc: bool) -> None:
        """Call a random CPU: any, this one and offline ones included."""
        cpu = int(self.random.random() * self.book.ncpus)
        flags = self._handler(flags)
        ledger = self.ledger
        ledger.doing(3 if rpc else 2 if flags & WAIT else 1, cpu)
        record, info = ledger.open_single(cpu, flags)
        function: Any = self.counter if flags & NATIVE else on_single
        wait = bool(flags & WAIT)
        try:
            smp.smp_call_function_single(cpu, function, info, wait)
        except CpuOfflineError:
            ledger.count(
                "single_rpc_ofl" if rpc else "single_wait_ofl" if wait else "single_ofl"
            )
            ledger.refused_single(record)
            return
        except CpuDiedError:
            ledger.died_single(record)
            return
        except ArenaFullError:
            ledger.count("alloc")
            ledger.refused_single(record)
            return
        if wait:
            ledger.returned_single(record)
        elif rpc:
            ledger.await_completion(record)

    def many(self, flags: int) -> None:
        """Call the CPUs of a mask: all of them, or a random half of them."""
        random = self.random
        if random.random() < 0.5:
            mask, targets = self.everybody, self.others
        else:
            bits = random.getrandbits(self.book.ncpus) or 1
            mask = CpuMask.from_bits(bits)
            raw = np.frombuffer(bits.to_bytes(-(-self.book.ncpus // 8), "little"), "u1")
            chosen = np.unpackbits(raw, count=self.book.ncpus, bitorder="little")
            targets = chosen.astype(np.bool_) & self.others
        self._broadcast(
            flags,
            targets,
            partial(_call_many, mask),
        )

    def all(self, flags: int) -> None:
        """Call all other CPUs."""
        self._broadcast(flags, self.others, smp.smp_call_function)

    def _broadcast(
        self, flags: int, targets: Any, call: Callable[[Any, Any, bool], None]
    ) -> None:
        flags = self._handler(flags)
        ledger = self.ledger
        record, info = ledger.open_many(flags)
        function: Any = self.counter if flags & NATIVE else on_many
        died = False
        before = ledger.before_many()
        try:
            call(function, info, bool(flags & WAIT))
        except* CpuDiedError:  # of one, or of several in a group
            died = True
        except* ArenaFullError:
            ledger.count("alloc")
            targets = np.zeros_like(targets)
        ledger.after_many(record, before, targets)
        if flags & WAIT:
            ledger.returned_many(record, died=died)
