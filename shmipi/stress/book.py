"""The account of every call of a stress run, in shared memory.

Each sender (the invoker of one CPU) has a row of records that it uses in turn, so that
memory is bounded. A record is one call; a *cell* of it is one execution that the call
asks for: one for a single call, one per CPU for a broadcast. A cell is a counter that
handlers increase atomically and that is **never reset**: when the call is settled, what
was counted becomes the base of the next use. So no execution, however late, escapes: it
is either the one expected or one too many.

What is right for a cell:

=================================  ========================================
the target stayed online           exactly one execution
refused with CpuOfflineError       none
the target or the sender was       none or one; counted as in flight at a
killed with the call in hand       death when it did not run or a waiter saw
                                   CpuDiedError
broadcast, target went on- or      none or one (the call returns nothing, so
offline during the call itself     nobody can say whether it was queued)
=================================  ========================================

More than that is ``duplicated``, less is ``lost``. Whether a CPU stayed online is known
exactly: who changes it (the driver) makes its ``plug`` word odd before it begins and
even after it has ended, and the ``kills`` word likewise around a kill and the boot that
follows it.

A call that may not run any more is settled only after a proof: two waiting calls to its
target, one after the other. Both are queued behind it; the second is taken off the
queue after everything that was taken with the first has run. A target that is offline
has drained, a dead one has dropped what it had.

Native handlers only count. They cannot tell one CPU from another, so a native broadcast
has one cell for all its targets, and only the sum is checked.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shmipi import atomic

__all__ = [
    "FAULTS",
    "STATS",
    "Book",
    "Ledger",
    "Make",
    "say",
]

# A record of a single call, one cache line.
COUNT, BASE, SEQ, IN, OUT, CPU, KILLS, STATE = range(8)
SINGLE_WORDS: Final = 8
# The head of a broadcast's record. COUNT and BASE are those of native ones.
M_COUNT, M_BASE, M_SEQ, M_IN, M_STATE = range(5)
MANY_WORDS: Final = 8
# Its cells: [kind][cpu].
C_COUNT, C_BASE, C_OUT = range(3)

# STATE: FREE, or PENDING with flags.
FREE, PENDING, WAIT, NATIVE = 0, 1, 2, 4

#: Single calls on record per sender: twice what can be in flight without waiting.
SINGLES: Final = 128
#: Broadcasts on record per sender, at most; fewer on large machines.
BROADCASTS: Final = 16
_CELL_BUDGET: Final = 32 << 20

# What travels to a Python handler in one inline integer: seq | record | sender.
_ROW_BITS, _RECORD_BITS = 12, 8
_SEQ_SHIFT: Final = _ROW_BITS + _RECORD_BITS
_ROW_MASK: Final = (1 << _ROW_BITS) - 1
_RECORD_MASK: Final = (1 << _RECORD_BITS) - 1

# The head of a sender's row.
H_SEQ, H_INCARNATION, H_BEAT, H_DOING, H_TARGET = range(5)
HEAD_WORDS: Final = 16

#: What a sender counts, one word each; only its invoker writes them.
STATS: Final = (
    "resched",
    "single",
    "single_ofl",
    "single_wait",
    "single_wait_ofl",
    "single_rpc",
    "single_rpc_ofl",
    "many",
    "many_wait",
    "all",
    "all_wait",
    "lost",
    "duplicated",
    "in_flight",
    "mb_out",
    "stray",
    "alloc",
    "stalled",
    "died",
    "raised",
)
_STAT: Final = {name: index for index, name in enumerate(STATS)}
STAT_WORDS: Final = 32

#: What handlers find wrong, one word each per CPU, added to atomically.
FAULTS: Final = ("wrong_cpu", "mb_in", "late")
_WRONG_CPU, _MB_IN, _LATE = range(3)
FAULT_WORDS: Final = 8

# Words of the driver for everybody; K_LONGWAIT is in milliseconds, K_DRIVER is slot + 1
# and generation << 32 of the host that drives the run.
K_STOP, K_PAUSE, K_LONGWAIT, K_SALT, K_READY, K_GO, K_DRIVER = range(7)
CONTROL_WORDS: Final = 16

#: Seconds without progress after which a wait is looked into.
STALL_S: Final = 10.0


def _view(words: NDArray[np.uint64]) -> memoryview[int]:
    buffer: Any = words  # numpy says that it is a buffer from Python 3.12 on only
    return memoryview(buffer)


class Make(Protocol):
    """``cluster.shared``, ``shmipi.shared`` of a CPU, or zeros in a test."""

    def __call__(
        self, name: str, dtype: str, shape: tuple[int, ...], /
    ) -> NDArray[Any]: ...


class Book:
    """The shared arrays of a run, and the handlers' side of the account.

    ``make`` makes or finds an array of unsigned 64-bit words; see ``find`` for a CPU.
    """

    def __init__(self, make: Make, ncpus: int, senders: int) -> None:
        if senders > _ROW_MASK + 1:
            raise ValueError(f"{senders} senders: at most {_ROW_MASK + 1}")
        self.ncpus = ncpus
        self.senders = senders
        self.broadcasts = broadcasts(ncpus, senders)
        self._attach(make)

    def _attach(self, make: Make) -> None:
        ncpus, senders, deep = self.ncpus, self.senders, self.broadcasts

        def words(name: str, *shape: int) -> NDArray[np.uint64]:
            array: NDArray[np.uint64] = np.asarray(make(f"stress.{name}", "u8", shape))
            return array

        self.control_words = words("control", CONTROL_WORDS)
        self.plug = words("plug", ncpus)
        self.kills = words("kills", ncpus)
        self.fault_words = words("faults", ncpus, FAULT_WORDS)
        self.head_words = words("head", senders, HEAD_WORDS)
        self.stat_words = words("stats", senders, STAT_WORDS)
        self.single_words = words("single", senders, SINGLES, SINGLE_WORDS)
        self.many_words = words("many", senders, deep, MANY_WORDS)
        self.cells = words("cells", senders, deep, 3, ncpus)
        # Flat views of machine words: what is read and written one by one goes through
        # these, several times faster than through numpy.
        self.control = _view(self.control_words)
        self.faults = _view(self.fault_words.reshape(-1))
        self.kill_view = _view(self.kills)
        self.single = _view(self.single_words.reshape(-1))
        self.many = _view(self.many_words.reshape(-1))
        self.cell_view = _view(self.cells.reshape(-1))
        self._single_row = SINGLES * SINGLE_WORDS
        self._many_row = deep * MANY_WORDS
        self._cell_row = deep * 3 * ncpus

    @classmethod
    def find(cls, look_up: Callable[[str], NDArray[Any]], ncpus: int) -> Book:
        """Return the book of the machine that ``look_up`` finds arrays of."""
        senders = look_up("stress.head").shape[0]
        return cls(lambda name, dtype, shape: look_up(name), ncpus, senders)

    def reset(self) -> None:
        """Zero everything: before a run, while no call of an earlier one is open."""
        for words in (
            self.control_words,
            self.plug,
            self.kills,
            self.fault_words,
            self.head_words,
            self.stat_words,
            self.single_words,
            self.many_words,
            self.cells,
        ):
            words[...] = 0

    # ---- handlers --------------------------------------------------------------------

    def ran_single(self, info: int, cpu: int) -> int:
        """A Python handler of a single call starts on ``cpu``: return its record.

        Checks the CPU and that the sender's store before the call is visible, then
        counts. ``left`` is for its end.
        """
        single = self.single
        row, record = info & _ROW_MASK, info >> _ROW_BITS & _RECORD_MASK
        at = row * self._single_row + record * SINGLE_WORDS
        seen, seq = single[at + IN], info >> _SEQ_SHIFT  # before any atomic operation
        if seen != seq:
            self._out_of_order(seen, seq, cpu)
        if single[at + CPU] != cpu and seen <= seq:
            self.fault(_WRONG_CPU, cpu, f"Wanted CPU {single[at + CPU]} got CPU {cpu}")
        atomic.fetch_add(single, at + COUNT, 1)
        return at

    def left_single(self, at: int, info: int) -> None:
        """The handler's store, for a waiting sender to see; an RPC's completion."""
        self.single[at + OUT] = info >> _SEQ_SHIFT

    def ran_many(self, info: int, cpu: int) -> int:
        """A Python handler of a broadcast starts on ``cpu``: return its cell."""
        row, record = info & _ROW_MASK, info >> _ROW_BITS & _RECORD_MASK
        seen = self.many[row * self._many_row + record * MANY_WORDS + M_IN]
        seq = info >> _SEQ_SHIFT
        if seen != seq:
            self._out_of_order(seen, seq, cpu)
        at = row * self._cell_row + record * 3 * self.ncpus + cpu
        atomic.fetch_add(self.cell_view, at, 1)
        return at

    def left_many(self, at: int, info: int) -> None:
        """The handler's store, for a waiting sender to see."""
        self.cell_view[at + C_OUT * self.ncpus] = info >> _SEQ_SHIFT

    def _out_of_order(self, seen: int, seq: int, cpu: int) -> None:
        if seen < seq:
            self.fault(
                _MB_IN,
                cpu,
                f"call {seq}: the sender's store before the call is not visible",
            )
        else:
            # Its record serves a later call: this one had been settled. The count that
            # follows is one too many there, and found so.
            self.fault(_LATE, cpu, f"call {seq} ran again after it was settled")

    def fault(self, kind: int, cpu: int, text: str) -> None:
        """Count a fault of ``FAULTS``; the first of each on a CPU is printed."""
        if atomic.fetch_add(self.faults, cpu * FAULT_WORDS + kind, 1) == 0:
            say(f"CPU {cpu}: {text}")

    # ---- sums ------------------------------------------------------------------------

    def totals(self) -> dict[str, int]:
        """Return the sums so far of ``STATS`` and ``FAULTS``, and ``executions``."""
        stats = self.stat_words.sum(axis=0)
        faults = self.fault_words.sum(axis=0)
        total = {name: int(stats[index]) for index, name in enumerate(STATS)}
        total |= {name: int(faults[index]) for index, name in enumerate(FAULTS)}
        total["executions"] = int(
            self.single_words[..., COUNT].sum()
            + self.many_words[..., M_COUNT].sum()
            + self.cells[:, :, C_COUNT].sum()
        )
        return total


def say(text: str) -> None:
    """Print a complaint. Not through sys.stderr: a handler may have interrupted it."""
    with contextlib.suppress(OSError):
        os.write(2, f"shmipi-stress: {text}\n".encode(errors="backslashreplace"))


def broadcasts(ncpus: int, senders: int) -> int:
    """Return how many broadcasts a sender has on record: fewer on large machines."""
    return max(1, min(BROADCASTS, _CELL_BUDGET // (24 * ncpus * senders)))


class Ledger:
    """A sender's side of the account: opens, settles and judges its calls.

    Args:
        book: the shared arrays.
        row: this sender's row; its CPU's number.
        prove: makes sure that what was queued on these CPUs has run or never will; see
            the module's text. Returns when it is so.
        pause: called while waiting, with how many times it has been.
    """

    def __init__(
        self,
        book: Book,
        row: int,
        prove: Callable[[Iterable[int]], None],
        pause: Callable[[int], None],
        dead: Callable[[int], bool] = lambda cpu: False,
    ) -> None:
        self.book = book
        self.row = row
        self._prove = prove
        self._pause = pause
        self._dead = dead
        self._s = book.single[row * book._single_row : (row + 1) * book._single_row]
        self._m = book.many[row * book._many_row : (row + 1) * book._many_row]
        self._cells = book.cells[row]
        self._head = _view(book.head_words[row])
        self._stats = _view(book.stat_words[row])
        # Made once: a native handler is given its word as an array.
        self._single_words = [
            self._s[r * SINGLE_WORDS + COUNT :][:1] for r in range(SINGLES)
        ]
        self._many_words = [
            self._m[r * MANY_WORDS + M_COUNT :][:1] for r in range(book.broadcasts)
        ]
        self._must: list[NDArray[np.uint64]] = [
            np.zeros(book.ncpus, np.uint64) for _ in range(book.broadcasts)
        ]
        self._may: list[NDArray[np.bool_]] = [
            np.zeros(book.ncpus, np.bool_) for _ in range(book.broadcasts)
        ]
        self._next_single = 0
        self._next_many = 0

    def count(self, name: str, n: int = 1) -> None:
        """Add to one of ``STATS``."""
        self._stats[_STAT[name]] += n

    def complain(self, text: str) -> None:
        """Print what is wrong, for a person."""
        say(f"CPU {self.row}: {text}")

    def beat(self) -> None:
        """Show the driver that this sender gets on."""
        self._head[H_BEAT] += 1

    def doing(self, primitive: int, target: int) -> None:
        """Show the driver what comes next, and to whom (-1: several)."""
        self._head[H_DOING] = primitive
        self._head[H_TARGET] = target + 1

    def _new_seq(self) -> int:
        seq: int = self._head[H_SEQ] + 1
        self._head[H_SEQ] = seq
        return seq

    # ---- single calls ----------------------------------------------------------------

    def open_single(self, cpu: int, flags: int) -> tuple[int, Any]:
        """Put a call to ``cpu`` on record: (record, info for its handler).

        ``flags``: WAIT and NATIVE. Waits until the record's earlier call is settled.
        """
        record = self._next_single
        self._next_single = (record + 1) % SINGLES
        at, s = record * SINGLE_WORDS, self._s
        if s[at + STATE]:
            self.settle_single(record)
        seq = self._new_seq()
        if s[at + COUNT] != s[at + BASE]:
            self._excess(s[at + COUNT] - s[at + BASE])
            s[at + BASE] = s[at + COUNT]
        s[at + SEQ] = seq
        s[at + CPU] = cpu
        s[at + KILLS] = self.book.kill_view[cpu]
        s[at + STATE] = PENDING | flags
        s[at + IN] = seq  # the last store before the call: what the handler looks for
        if flags & NATIVE:
            return record, self._single_words[record]
        return record, seq << _SEQ_SHIFT | record << _ROW_BITS | self.row

    def returned_single(self, record: int) -> None:
        """A waiting call returned: it has run once, and its store must be visible."""
        at, s = record * SINGLE_WORDS, self._s
        out = s[at + OUT]  # plain, and first
        if not s[at + STATE] & NATIVE and out != s[at + SEQ]:
            self.count("mb_out")
            self.complain(
                f"Memory-ordering failure: call {s[at + SEQ]} to CPU {s[at + CPU]}"
                " returned and its handler's store is not visible"
            )
        self._close_single(at, died=False)

    def refused_single(self, record: int) -> None:
        """CpuOfflineError: nothing was queued, so nothing may have run."""
        at, s = record * SINGLE_WORDS, self._s
        ran = s[at + COUNT] - s[at + BASE]
        if ran:
            self._excess(ran)
        self._free_single(at)

    def died_single(self, record: int) -> None:
        """CpuDiedError: it may or may not have run. Unexpected if nobody was killed."""
        at, s = record * SINGLE_WORDS, self._s
        if not self._doomed(at):
            self.count("died")
            self.complain(
                f"call {s[at + SEQ]}: CpuDiedError, and nobody had killed"
                f" CPU {s[at + CPU]}"
            )
        self.count("in_flight")
        self._close_single(at, died=True)

    def completed(self, record: int) -> bool:
        """Has the handler of an RPC come to its end (or been counted, if native)?"""
        at, s = record * SINGLE_WORDS, self._s
        if s[at + STATE] & NATIVE:
            return bool(s[at + COUNT] != s[at + BASE])
        return bool(s[at + OUT] == s[at + SEQ])

    def await_completion(self, record: int) -> None:
        """Wait for an RPC's handler, or for the proof that it never comes."""
        at = record * SINGLE_WORDS
        if self._await(
            lambda: self.completed(record),
            lambda: self._doomed(at),
            lambda: [self._s[at + CPU]],
            f"the completion of call {self._s[at + SEQ]}",
        ):
            self._close_single(at, died=False)
        else:
            self.settle_single(record)

    def _doomed(self, at: int) -> bool:
        """Was the target being killed when the call was made, or has been since?"""
        then = self._s[at + KILLS]
        return bool(then & 1 or self.book.kill_view[self._s[at + CPU]] != then)

    def settle_single(self, record: int) -> None:
        """Judge a call that nobody waited for, waiting until that can be done."""
        at, s = record * SINGLE_WORDS, self._s
        if self._await(
            lambda: s[at + COUNT] != s[at + BASE],
            lambda: self._doomed(at),
            lambda: [s[at + CPU]],
            f"call {s[at + SEQ]}",
        ):
            self._close_single(at, died=False)
            return
        self._prove([s[at + CPU]])
        ran = s[at + COUNT] != s[at + BASE]  # before the kills are read again
        died = self._doomed(at)
        if died and not ran:
            self.count("in_flight")
        self._close_single(at, died=died)

    def _close_single(self, at: int, *, died: bool) -> None:
        s = self._s
        ran = s[at + COUNT] - s[at + BASE]
        if ran > 1:
            self._excess(ran - 1)
        elif not ran and not died:
            self.count("lost")
            self.complain(f"call {s[at + SEQ]} to CPU {s[at + CPU]} is lost")
        self._free_single(at)

    def _free_single(self, at: int) -> None:
        self._s[at + BASE] = self._s[at + COUNT]
        self._s[at + STATE] = FREE

    def _excess(self, n: int) -> None:
        self.count("duplicated", n)
        self.complain(f"{n} execution(s) more than calls")

    # ---- broadcasts ------------------------------------------------------------------

    def open_many(self, flags: int) -> tuple[int, Any]:
        """Put a broadcast on record: (record, info for its handler)."""
        record = self._next_many
        self._next_many = (record + 1) % self.book.broadcasts
        at, m = record * MANY_WORDS, self._m
        if m[at + M_STATE]:
            self.settle_many(record)
        seq = self._new_seq()
        counts = self._cells[record, C_COUNT]
        extra = int(counts.sum() - self._cells[record, C_BASE].sum())
        extra += m[at + M_COUNT] - m[at + M_BASE]
        if extra:
            self._excess(extra)
        self._cells[record, C_BASE] = counts
        m[at + M_BASE] = m[at + M_COUNT]
        m[at + M_SEQ] = seq
        m[at + M_STATE] = PENDING | flags
        m[at + M_IN] = seq
        if flags & NATIVE:
            return record, self._many_words[record]
        return record, seq << _SEQ_SHIFT | record << _ROW_BITS | self.row

    def before_many(self) -> NDArray[np.uint64]:
        """Return what ``after_many`` compares with: just before the broadcast."""
        return self.book.plug.copy()

    def after_many(
        self, record: int, before: NDArray[np.uint64], targets: NDArray[np.bool_]
    ) -> None:
        """The broadcast to ``targets`` (per CPU, without self) has returned.

        Must run: targets that were online before and have not changed since.
        """
        kills = self.book.kills + np.uint64(1)  # read before the plugs
        steady = (before == self.book.plug) & (before & np.uint64(1) == 0) & targets
        np.multiply(kills, steady, out=self._must[record])
        # An odd plug is no proof of the contrary: it may have been online for a part.
        self._may[record][:] = targets

    def returned_many(self, record: int, *, died: bool) -> None:
        """A waiting broadcast returned (``died``: CpuDiedError): everything has run."""
        at, m = record * MANY_WORDS, self._m
        outs = self._cells[record, C_OUT] == m[at + M_SEQ]  # plain, and first
        if not died and self._exact(record, outs):
            self._free_many(record)
            return
        buried = self._await_burial(record)
        if not m[at + M_STATE] & NATIVE:
            ran = self._cells[record, C_COUNT] != self._cells[record, C_BASE]
            hidden = ran & ~outs & (self._still(record) != 0)
            if hidden.any():
                self.count("mb_out", int(hidden.sum()))
                self.complain(
                    f"Memory-ordering failure: broadcast {m[at + M_SEQ]} returned and"
                    f" its handler's store on CPU {int(hidden.argmax())} is not visible"
                )
        if died or buried:
            self.count("in_flight")
        if died:
            must = self._must[record]
            if bool((must != 0).any()) and not self._any_killed(record):
                self.count("died")
                self.complain(
                    f"broadcast {m[at + M_SEQ]}: CpuDiedError, and nobody had killed a"
                    " target"
                )
        self._close_many(record, died)

    def _any_killed(self, record: int) -> bool:
        may = self._may[record]
        must = self._must[record]
        # A target that was unsteady during the call may be the one that died.
        return bool((self._still(record) != must).any() or (may & (must == 0)).any())

    def _still(self, record: int) -> NDArray[np.uint64]:
        """What must run and has not been killed since."""
        must = self._must[record]
        alive: NDArray[np.uint64] = np.where(
            must == self.book.kills + np.uint64(1), must, np.uint64(0)
        )
        return alive

    def _ran(self, record: int) -> NDArray[np.int64]:
        delta: NDArray[np.int64] = (
            self._cells[record, C_COUNT] - self._cells[record, C_BASE]
        ).view(np.int64)
        return delta

    def _missing(self, record: int) -> list[int]:
        """CPUs whose execution is owed. Counts are read first, deaths second."""
        at, m = record * MANY_WORDS, self._m
        if m[at + M_STATE] & NATIVE:
            ran = m[at + M_COUNT] - m[at + M_BASE]
            owed = np.flatnonzero(self._still(record))
            return [int(cpu) for cpu in owed] if ran < len(owed) else []
        delta = self._ran(record)
        owed = np.flatnonzero((delta == 0) & (self._still(record) != 0))
        return [int(cpu) for cpu in owed]

    def _await_burial(self, record: int) -> bool:
        """Wait until the driver says of CPUs that others killed that they are dead.

        It does when it looks next; what had died with them would be lost until then.
        False: no execution is owed by a dead CPU.
        """
        turns, deadline = 0, time.monotonic() + self._patience()
        while any(self._dead(cpu) for cpu in self._missing(record)):
            self.beat()
            self._pause(turns)
            turns += 1
            if time.monotonic() > deadline:
                break
        return turns > 0

    def settle_many(self, record: int) -> None:
        """Judge a broadcast that nobody waited for, waiting until that can be done."""
        at, m = record * MANY_WORDS, self._m
        if self._exact(record):
            self._free_many(record)
            return
        if not self._await(
            lambda: not self._missing(record),
            lambda: False,
            lambda: self._missing(record),
            f"broadcast {m[at + M_SEQ]}",
        ):
            self._prove(self._missing(record))
        # Where none or one is right, the one must have come before the record goes on.
        doubt = self._may[record] & (self._still(record) == 0)
        if not m[at + M_STATE] & NATIVE:
            doubt &= self._ran(record) == 0
        died = bool((self._still(record) != self._must[record]).any())
        if doubt.any():
            self._prove(int(cpu) for cpu in np.flatnonzero(doubt))
        if died and not m[at + M_STATE] & NATIVE:
            dead = (self._still(record) == 0) & (self._must[record] != 0)
            if bool((dead & (self._ran(record) == 0)).any()):
                self.count("in_flight")
        elif died:
            self.count("in_flight")
        self._close_many(record, died)

    def _close_many(self, record: int, died: bool) -> None:
        at, m = record * MANY_WORDS, self._m
        may = self._may[record]
        if m[at + M_STATE] & NATIVE:
            ran = m[at + M_COUNT] - m[at + M_BASE]
            least = int((self._still(record) != 0).sum())
            lost = max(0, least - ran)
            extra = max(0, ran - int(may.sum()))
            stray = 0
        else:
            delta = self._ran(record)
            lost = int(((delta == 0) & (self._still(record) != 0)).sum())
            extra = int((delta[delta > 1] - 1).sum())
            stray = int(((delta != 0) & ~may).sum())
        if lost:
            self.count("lost", lost)
            self.complain(f"broadcast {m[at + M_SEQ]}: {lost} execution(s) lost")
        if extra:
            self._excess(extra)
        if stray:
            self.count("stray", stray)
            self.complain(
                f"broadcast {m[at + M_SEQ]} ran on {stray} CPU(s) that it was not for"
            )
        self._free_many(record)

    def _exact(self, record: int, outs: NDArray[np.bool_] | None = None) -> bool:
        """Has every target run it once, and nobody else? Then nothing is to be judged.

        ``outs``: whose store after it is visible; None: nobody waited for one.
        """
        at, m = record * MANY_WORDS, self._m
        may = self._may[record]
        if m[at + M_STATE] & NATIVE:
            return m[at + M_COUNT] - m[at + M_BASE] == np.count_nonzero(may)
        delta = self._cells[record, C_COUNT] - self._cells[record, C_BASE]
        if not np.array_equal(delta, may):
            return False
        return outs is None or np.array_equal(outs, may)

    def _free_many(self, record: int) -> None:
        at, m = record * MANY_WORDS, self._m
        cells = self._cells[record]
        cells[C_BASE] = cells[C_COUNT]
        m[at + M_BASE] = m[at + M_COUNT]
        m[at + M_STATE] = FREE

    # ---- all of them -----------------------------------------------------------------

    def settle_all(self) -> None:
        """Judge every call that is still open: at the end of an invoker."""
        for record in range(SINGLES):
            if self._s[record * SINGLE_WORDS + STATE]:
                self.settle_single(record)
        for record in range(self.book.broadcasts):
            if self._m[record * MANY_WORDS + M_STATE]:
                self.settle_many(record)

    def inherit(self, *, proven: bool = False) -> None:
        """Settle what a killed invoker of this row left open: none or one is right.

        ``proven``: no target can run any of it any more.
        """
        s, m = self._s, self._m
        singles = [r for r in range(SINGLES) if s[r * SINGLE_WORDS + STATE]]
        manys = [r for r in range(self.book.broadcasts) if m[r * MANY_WORDS + M_STATE]]
        if not proven and (singles or manys):
            targets = {s[r * SINGLE_WORDS + CPU] for r in singles}
            self._prove(range(self.book.ncpus) if manys else sorted(targets))
        for record in singles:
            at = record * SINGLE_WORDS
            ran = s[at + COUNT] - s[at + BASE]
            if s[at + STATE] & WAIT or not ran:
                self.count("in_flight")
            if ran > 1:
                self._excess(ran - 1)
            self._free_single(at)
        for record in manys:
            self.count("in_flight")
            self._must[record][:] = 0
            self._may[record][:] = True
            self._close_many(record, True)

    def _await(
        self,
        reached: Callable[[], bool],
        given_up: Callable[[], bool],
        targets: Callable[[], list[int]],
        what: str,
    ) -> bool:
        """Wait for ``reached``; False when ``given_up``, or after too long."""
        turns, deadline = 0, 0.0
        while not reached():
            if given_up():
                return False
            self._pause(turns)
            turns += 1
            if turns & 15 == 0:
                self.beat()
                now = time.monotonic()
                if not deadline:
                    deadline = now + self._patience()
                elif now > deadline:
                    self.count("stalled")
                    names = ", ".join(map(str, targets()[:8]))
                    self.complain(f"has waited for {what}: CPU {names} does not run it")
                    return False
        return True

    def _patience(self) -> float:
        """Seconds until a wait is a stall: longer where handlers may burn, or queue."""
        return STALL_S + 3e-3 * self.book.control[K_LONGWAIT] + 0.05 * self.book.ncpus
