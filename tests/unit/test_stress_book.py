"""The account of a stress run: what is right passes, and each thing wrong is reported.

No machine here: the test plays the machine, runs the handlers' side itself, and leaves
out, repeats or disturbs what a broken machine would.
"""

from random import Random

import numpy as np
import pytest

from shmipi import CpuDiedError, CpusFailedError, smp
from shmipi.stress import book as books
from shmipi.stress.book import NATIVE, WAIT, Book, Ledger, broadcasts
from shmipi.stress.invoker import Invoker
from shmipi.stress.options import PRIMITIVES, Options, selection
from shmipi.stress.report import Hotplug, error_counts, statistics

NCPUS = 4
ME = 0


class Rig:
    """A sender's ledger on ordinary memory, and what it asked to have proven."""

    def __init__(self) -> None:
        self.book = Book(lambda _, dtype, shape: np.zeros(shape, dtype), NCPUS, NCPUS)
        self.proofs: list[list[int]] = []
        self.on_proof = lambda: None
        self.on_pause = lambda: None
        self.dead: set[int] = set()
        self.pauses = 0
        self.ledger = self.successor()

    def successor(self) -> Ledger:
        return Ledger(self.book, ME, self.prove, self.pause, self.dead.__contains__)

    def prove(self, cpus) -> None:
        self.proofs.append(list(cpus))
        self.on_proof()

    def pause(self, turn: int) -> None:
        self.pauses += 1
        self.on_pause()

    def run_single(self, info: int, cpu: int) -> None:
        self.book.left_single(self.book.ran_single(info, cpu), info)

    def run_many(self, info: int, *cpus: int) -> None:
        for cpu in cpus:
            self.book.left_many(self.book.ran_many(info, cpu), info)

    def kill(self, cpu: int) -> None:
        """As the driver: the words are odd from before the kill to after the boot."""
        self.book.plug[cpu] += np.uint64(1)
        self.book.kills[cpu] += np.uint64(1)

    def boot(self, cpu: int) -> None:
        self.book.kills[cpu] += np.uint64(1)
        self.book.plug[cpu] += np.uint64(1)

    def broadcast(self, flags: int, *ran: int, targets=(1, 2, 3), between=None):
        """A broadcast that ran on the CPUs of `ran`: its record."""
        record, info = self.ledger.open_many(flags)
        before = self.ledger.before_many()
        if flags & NATIVE:
            info[0] += len(ran)
        else:
            self.run_many(info, *ran)
        if between is not None:
            between()
        mask = np.isin(np.arange(NCPUS), targets)
        self.ledger.after_many(record, before, mask)
        return record

    def found(self) -> dict[str, int]:
        """What was counted, without the zeros and without what is no error."""
        return {k: v for k, v in self.book.totals().items() if v and k != "executions"}


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(books, "STALL_S", 0.02)
    return Rig()


# ---- what is right -------------------------------------------------------------------


def test_calls_that_run_once_leave_nothing(rig: Rig) -> None:
    for _ in range(3 * books.SINGLES):
        record, info = rig.ledger.open_single(1, WAIT)
        rig.run_single(info, 1)
        rig.ledger.returned_single(record)
        record, info = rig.ledger.open_single(2, 0)
        rig.run_single(info, 2)
        rig.ledger.returned_many(rig.broadcast(WAIT, 1, 2, 3), died=False)
        rig.broadcast(0, 1, 2, 3)
    rig.ledger.settle_all()
    assert rig.found() == {}
    assert rig.proofs == []
    assert rig.book.totals()["executions"] == 3 * books.SINGLES * 8


def test_native_calls_are_counted(rig: Rig) -> None:
    record, word = rig.ledger.open_single(1, WAIT | NATIVE)
    word[0] += 1
    rig.ledger.returned_single(record)
    record, word = rig.ledger.open_single(1, NATIVE)
    assert not rig.ledger.completed(record)
    word[0] += 1
    assert rig.ledger.completed(record)
    rig.ledger.returned_many(rig.broadcast(WAIT | NATIVE, 1, 2, 3), died=False)
    rig.ledger.settle_all()
    assert rig.found() == {}
    assert rig.book.totals()["executions"] == 5


def test_refused_calls_have_not_run(rig: Rig) -> None:
    record, _ = rig.ledger.open_single(3, WAIT)
    rig.ledger.refused_single(record)
    rig.ledger.settle_all()
    assert rig.found() == {}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_target_may_or_may_not_have_run_it(rig: Rig, ran: bool, when) -> None:
    if when == "before":  # the kill had begun when the call was made
        rig.kill(1)
    waiting, info = rig.ledger.open_single(1, WAIT)
    nowait, other = rig.ledger.open_single(1, 0)
    if ran:
        rig.run_single(info, 1)
        rig.run_single(other, 1)
    if when == "after":
        rig.kill(1)
    rig.boot(1)
    rig.ledger.died_single(waiting)
    rig.ledger.settle_all()
    assert rig.found() == {"in_flight": 1 if ran else 2}
    assert rig.proofs == ([] if ran else [[1]])
    del nowait


def test_a_killed_sender_leaves_its_calls_to_its_successor(rig: Rig) -> None:
    _, info = rig.ledger.open_single(1, 0)
    rig.run_single(info, 1)
    rig.ledger.open_single(2, WAIT)
    rig.ledger.open_single(3, 0)
    rig.ledger.open_many(0)
    heir = rig.successor()
    heir.inherit()
    assert rig.proofs == [[0, 1, 2, 3]]
    assert rig.found() == {"in_flight": 3}
    heir.inherit()
    assert rig.found() == {"in_flight": 3}


def test_a_target_going_offline_during_a_broadcast_may_be_skipped(rig: Rig) -> None:
    def unplug() -> None:
        rig.book.plug[2] += np.uint64(1)

    rig.broadcast(0, 1, 3, between=unplug)
    rig.ledger.settle_all()
    assert rig.proofs == [[2]]  # whether it was queued is not known: it must be over
    rig.broadcast(0, 1, 2, 3)  # offline or not as yet: the word is odd
    rig.ledger.settle_all()
    assert rig.found() == {}


def test_a_target_killed_after_a_broadcast(rig: Rig) -> None:
    record = rig.broadcast(0, 1, 3)
    rig.kill(2)
    rig.boot(2)
    rig.ledger.settle_many(record)
    assert rig.found() == {"in_flight": 1}
    record = rig.broadcast(WAIT, 1, 3)
    rig.kill(2)
    rig.ledger.returned_many(record, died=True)
    assert rig.found() == {"in_flight": 2}


# ---- what is wrong -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, NATIVE])
def test_a_lost_call_is_found(rig: Rig, kind: int) -> None:
    record, _ = rig.ledger.open_single(1, WAIT | kind)
    rig.ledger.returned_single(record)
    found = rig.found()
    assert found.pop("lost") == 1
    assert found == ({} if kind else {"mb_out": 1})


def test_a_lost_call_that_nobody_waits_for_is_found(rig: Rig) -> None:
    rig.ledger.open_single(1, 0)
    rig.ledger.settle_all()
    assert rig.proofs == [[1]]  # only after the proof that it will never come
    assert rig.found() == {"lost": 1, "stalled": 1}


def test_a_late_call_is_not_lost(rig: Rig) -> None:
    _, info = rig.ledger.open_single(1, 0)
    rig.on_proof = lambda: rig.run_single(info, 1)
    rig.ledger.settle_all()
    assert rig.found() == {"stalled": 1}


@pytest.mark.parametrize("flags", [0, WAIT])
def test_a_lost_execution_of_a_broadcast_is_found(rig: Rig, flags: int) -> None:
    record = rig.broadcast(flags, 1, 3)
    if flags:
        rig.ledger.returned_many(record, died=False)
    else:
        rig.ledger.settle_all()
        assert rig.proofs[0] == [2]
    assert rig.found()["lost"] == 1


def test_a_lost_execution_of_a_native_broadcast_is_found(rig: Rig) -> None:
    rig.ledger.returned_many(rig.broadcast(WAIT | NATIVE, 1, 2), died=False)
    assert rig.found() == {"lost": 1}


@pytest.mark.parametrize("kind", [0, NATIVE])
def test_a_duplicated_call_is_found(rig: Rig, kind: int) -> None:
    record, info = rig.ledger.open_single(1, WAIT | kind)
    for _ in range(3):
        if kind:
            info[0] += 1
        else:
            rig.run_single(info, 1)
    rig.ledger.returned_single(record)
    assert rig.found() == {"duplicated": 2}


@pytest.mark.parametrize("kind", [0, NATIVE])
def test_a_duplicate_that_comes_later_is_found(rig: Rig, kind: int) -> None:
    record, info = rig.ledger.open_single(1, WAIT | kind)
    again = (lambda: info.__setitem__(0, info[0] + 1)) if kind else None
    again = again or (lambda: rig.run_single(info, 1))
    again()
    rig.ledger.returned_single(record)
    assert rig.found() == {}
    again()  # after it was settled
    for _ in range(books.SINGLES):  # until its record is used again
        record, other = rig.ledger.open_single(1, WAIT)
        rig.run_single(other, 1)
        rig.ledger.returned_single(record)
    assert rig.found() == {"duplicated": 1}


def test_a_duplicate_into_a_later_use_of_its_record_is_found(rig: Rig) -> None:
    infos = []
    for _ in range(books.SINGLES + 1):
        record, info = rig.ledger.open_single(1, WAIT)
        infos.append(info)
        if len(infos) > books.SINGLES:
            rig.run_single(infos[0], 1)
        rig.run_single(info, 1)
        rig.ledger.returned_single(record)
    assert rig.found() == {"late": 1, "duplicated": 1}


@pytest.mark.parametrize("kind", [0, NATIVE])
def test_a_duplicated_execution_of_a_broadcast_is_found(rig: Rig, kind: int) -> None:
    rig.ledger.returned_many(rig.broadcast(WAIT | kind, 1, 2, 2, 3), died=False)
    assert rig.found() == {"duplicated": 1}


def test_a_call_that_ran_although_refused_is_found(rig: Rig) -> None:
    record, info = rig.ledger.open_single(1, WAIT)
    rig.run_single(info, 1)
    rig.ledger.refused_single(record)
    assert rig.found() == {"duplicated": 1}


def test_two_executions_of_a_call_in_flight_at_a_death_are_too_many(rig: Rig) -> None:
    record, info = rig.ledger.open_single(1, WAIT)
    rig.run_single(info, 1)
    rig.run_single(info, 1)
    rig.kill(1)
    rig.ledger.died_single(record)
    assert rig.found() == {"in_flight": 1, "duplicated": 1}


def test_a_call_on_the_wrong_cpu_is_found(rig: Rig, capfd) -> None:
    record, info = rig.ledger.open_single(1, WAIT)
    rig.run_single(info, 2)
    rig.ledger.returned_single(record)
    assert rig.found() == {"wrong_cpu": 1}
    assert "Wanted CPU 1 got CPU 2" in capfd.readouterr().err


def test_a_broadcast_to_a_cpu_outside_its_mask_is_found(rig: Rig) -> None:
    record = rig.broadcast(WAIT, 1, 2, 3, targets=(1, 3))
    rig.ledger.returned_many(record, died=False)
    assert rig.found() == {"stray": 1}


def test_a_store_before_the_call_that_is_not_seen_is_found(rig: Rig) -> None:
    record, info = rig.ledger.open_single(1, WAIT)
    rig.ledger._s[record * books.SINGLE_WORDS + books.IN] -= 1  # not visible yet
    rig.run_single(info, 1)
    rig.ledger.returned_single(record)
    record, info = rig.ledger.open_many(WAIT)
    rig.ledger._m[record * books.MANY_WORDS + books.M_IN] -= 1
    rig.run_many(info, 1)
    assert rig.found() == {"mb_in": 2}


def test_a_handlers_store_that_is_not_seen_is_found(rig: Rig) -> None:
    record, info = rig.ledger.open_single(1, WAIT)
    rig.book.ran_single(info, 1)
    rig.ledger.returned_single(record)
    assert rig.found() == {"mb_out": 1}
    record, info = rig.ledger.open_many(WAIT)
    before = rig.ledger.before_many()
    rig.run_many(info, 1, 3)
    rig.book.ran_many(info, 2)
    rig.ledger.after_many(record, before, np.isin(np.arange(NCPUS), (1, 2, 3)))
    rig.ledger.returned_many(record, died=False)
    assert rig.found() == {"mb_out": 2}


def test_a_death_that_nobody_caused_is_found(rig: Rig) -> None:
    record, _ = rig.ledger.open_single(1, WAIT)
    rig.ledger.died_single(record)
    assert rig.found() == {"died": 1, "in_flight": 1}
    rig.ledger.returned_many(rig.broadcast(WAIT, 1, 2, 3), died=True)
    assert rig.found() == {"died": 2, "in_flight": 2}


# ---- size, lines, options ------------------------------------------------------------


def test_memory_is_bounded() -> None:
    assert broadcasts(2, 2) == books.BROADCASTS
    assert broadcasts(1024, 1024) == 1
    for n in (64, 128, 256, 512):
        assert 24 * n * n * broadcasts(n, n) <= 32 << 20


def test_every_error_is_in_the_line(rig: Rig) -> None:
    totals = rig.book.totals()
    clean = statistics(totals, error_counts(totals, {}), Hotplug(), done=False)
    assert clean.startswith("shmipi-stress: scf_invoked_count ver: 0 resched: 0")
    assert clean.endswith("ste: 0 stnmie: 0 stnmoe: 0 staf: 0 lost: 0 dup: 0 ifd: 0")
    for name, where in {
        "lost": "lost: 1",
        "duplicated": "dup: 1",
        "mb_in": "stnmie: 1",
        "mb_out": "stnmoe: 1",
        "alloc": "staf: 1",
        "wrong_cpu": "ste: 1",
        "stray": "ste: 1",
        "stalled": "ste: 1",
        "late": "ste: 1",
        "died": "ste: 1",
        "raised": "ste: 1",
    }.items():
        bad = {**totals, name: 1}
        line = statistics(bad, error_counts(bad, {}), Hotplug(), done=True)
        assert line.startswith("shmipi-stress: !!! scf_invoked_count VER:"), name
        assert where in line, name
    bad = {**totals, "in_flight": 5}  # no error
    assert "!!!" not in statistics(bad, error_counts(bad, {}), Hotplug(), done=True)


def test_the_kernels_rules_for_weights() -> None:
    assert selection({}, 4) == (8, 8, 8, 8, 2, 2, 1, 1)
    assert selection({"resched": 0, "all": 0}, 3) == (0, 6, 6, 6, 2, 2, 0, 1)
    assert selection({"many": 3}, 4) == (0, 0, 0, 0, 3, 0, 0, 0)
    assert selection({"many": 3, "single": 0}, 4) == (0, 0, 0, 0, 3, 0, 0, 0)
    every = dict.fromkeys(PRIMITIVES, 0)
    with pytest.raises(ValueError, match="all zero weights makes no sense"):
        selection(every, 4)
    with pytest.raises(ValueError, match="weight_many is -2"):
        selection({"many": -2}, 4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"handler": "c"}, "handler is 'c'"),
        ({"duration": -1}, "duration is -1"),
        ({"duration": float("nan")}, "duration is nan"),
        ({"stat_interval": 0}, "stat_interval is 0"),
        ({"longwait": -1}, "longwait is -1"),
        ({"nthreads": 0}, "nthreads is 0"),
        ({"weights": {"most": 1}}, "no primitive 'most'"),
        ({"kill_interval": -0.1}, "kill_interval is -0.1"),
    ],
)
def test_options_without_a_meaning(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Options(**wrong)


def test_no_more_invokers_than_cpus() -> None:
    assert Options(nthreads=2).senders(3) == 2
    assert Options().senders(3) == 3
    with pytest.raises(ValueError, match="nthreads is 4"):
        Options(nthreads=4).senders(3)


# ---- a CPU that others kill ----------------------------------------------------------


@pytest.mark.parametrize("native", [0, NATIVE])
@pytest.mark.parametrize("told", [False, True])
def test_what_died_with_a_cpu_that_others_killed_is_not_lost(rig, native, told):
    """The driver finds it dead some time after the broadcast to it has returned."""
    record = rig.broadcast(WAIT | native, 1, 3)
    rig.dead.add(2)

    def driver():
        if rig.pauses == 3:
            rig.kill(2)

    rig.on_pause = driver
    rig.ledger.returned_many(record, died=told)
    assert rig.found() == {"in_flight": 1}


def test_what_a_live_cpu_did_not_run_is_lost_beside_a_dead_one(rig):
    record = rig.broadcast(WAIT, 3)
    rig.dead.add(2)
    rig.on_pause = lambda: rig.kill(2) if rig.pauses == 1 else None
    rig.ledger.returned_many(record, died=False)
    assert rig.found() == {"in_flight": 1, "lost": 1}


@pytest.mark.parametrize("died", [[1], [1, 3]])
def test_a_broadcast_may_lose_one_cpu_or_several(rig, monkeypatch, died):
    """Whom it names, an error or a group of them, has died: the invoker goes on."""
    invoker = Invoker(rig.book, rig.ledger, ME, Random(1), (1,) * 8, "python")
    each = [CpuDiedError("it died", cpu=cpu) for cpu in died]

    def broadcast(function, info, wait):
        rig.run_many(info, *({1, 2, 3} - set(died)))
        for cpu in died:
            rig.kill(cpu)
        raise each[0] if len(each) == 1 else CpusFailedError("several", each)

    monkeypatch.setattr(smp, "smp_call_function", broadcast)
    invoker.all(WAIT)
    for cpu in died:
        rig.boot(cpu)
    rig.ledger.settle_all()
    assert rig.found() == {"in_flight": 1}
