"""register_nmi_handler: the lists of arch/x86/kernel/nmi.c, and who waits for whom."""

import errno
import os
import signal
import time
import warnings

import pytest

import shmipi
from shmipi import (
    Cluster,
    ClusterStateError,
    IrqError,
    MachineDiedError,
    ShmipiWarning,
    smp,
)
from shmipi.smp import (
    NMI_DONE,
    NMI_FLAG_FIRST,
    NMI_HANDLED,
    NMI_IO_CHECK,
    NMI_LOCAL,
    NMI_REASON_IOCHK,
    NMI_REASON_SERR,
    NMI_SERR,
    NMI_UNKNOWN,
    nmi,
)

LONG = 20_000_000
COUNT = smp.NativeHandler("count")
TYPES = (NMI_LOCAL, NMI_UNKNOWN, NMI_SERR, NMI_IO_CHECK)


class Rig:
    """Handlers that note who was asked, in which order, and what the NMI came to."""

    def __init__(self, cluster, eventually):
        self.cluster, self.wait, self.names = cluster, eventually, []
        self.order = cluster.shared("order", "i8", 32)
        self.order[:] = 0
        self.n = cluster.shared("n", "i8", 4)
        self.n[:] = 0
        self.before = cluster.counters()

    def add(self, type, name, returns=NMI_HANDLED, flags=0, number=None):
        number = len(self.names) + 1 if number is None else number

        def handler(given, regs):
            order = shmipi.shared("order")
            order[0] += 1
            order[order[0]] = number if given == type and regs is None else -1
            return returns

        self.register(type, handler, flags, name)

    def register(self, type, handler, flags, name, info=None):
        self.cluster.smp.register_nmi_handler(type, handler, flags, name, info)
        self.names.append((type, name))

    def remove(self, type, name):
        self.names.remove((type, name))
        self.cluster.smp.unregister_nmi_handler(type, name)

    def grown(self, counter):
        now = self.cluster.counters()[counter]
        return int((now - self.before[counter]).sum())

    def nmi(self, reason=0):
        """Send one to CPU 1, and return who was asked."""
        self.order[:] = 0
        nmis = self.grown("nmi")
        self.cluster.chip.send_nmi(1, reason)
        self.wait(lambda: self.grown("nmi") == nmis + 1)
        self.wait(lambda: not self.cluster.chip.read("nmi", 1))
        return self.order[1 : self.order[0] + 1].tolist()


@pytest.fixture
def rig(cluster, eventually):
    made = Rig(cluster, eventually)
    yield made
    for type, name in made.names:
        cluster.smp.unregister_nmi_handler(type, name)


# ---- who is asked --------------------------------------------------------------------


def test_all_of_a_type_are_asked_in_order(rig):
    """nmi_handle walks the whole list, also when the first has handled something."""
    rig.add(NMI_LOCAL, "a")
    rig.add(NMI_LOCAL, "b", NMI_DONE)
    rig.add(NMI_LOCAL, "c", None)
    rig.add(NMI_LOCAL, "d", flags=NMI_FLAG_FIRST)
    rig.add(NMI_LOCAL, "e", flags=NMI_FLAG_FIRST)
    assert rig.nmi() == [5, 4, 1, 2, 3]
    rig.remove(NMI_LOCAL, "d")
    rig.remove(NMI_LOCAL, "c")
    assert rig.nmi() == [5, 1, 2]
    rig.add(NMI_LOCAL, "f", number=6)
    assert rig.nmi() == [5, 1, 2, 6]
    assert rig.grown("nmi_unknown") == 0


def test_native_handlers_of_a_type_run_in_the_signals_handler(
    rig, background, eventually
):
    """Before its Python ones, which wait for the interpreter."""
    go = rig.cluster.shared("go", "i8", 2)
    go[:] = 0

    def deaf():
        import itertools
        import operator

        # One call into C, which says that it has begun and ends when it is told to.
        word = memoryview(go)
        begins = [(word.__setitem__, 0, 1)]
        looks = itertools.repeat((word.__getitem__, 1))
        any(itertools.starmap(operator.call, itertools.chain(begins, looks)))
        return int(shmipi.shared("n")[0]), int(shmipi.shared("order")[0])

    rig.add(NMI_LOCAL, "python")
    rig.register(NMI_LOCAL, COUNT, 0, "native", rig.n[:1])
    task = background(lambda: rig.cluster.run(deaf, cpus=[1]))
    try:
        eventually(lambda: go[0])
        rig.cluster.chip.send_nmi(1)
        eventually(lambda: rig.n[0] == 1)
        python_yet = int(rig.order[0])
    finally:
        go[1] = 1
    assert task.end(60)[0][0] == 1
    assert python_yet == 0
    eventually(lambda: rig.order[:2].tolist() == [1, 1])


def test_unknown_ones_are_those_that_no_local_handler_has_handled(rig):
    assert rig.nmi() == []
    assert rig.grown("nmi_unknown") == 1  # "NMI received for unknown reason"
    rig.add(NMI_LOCAL, "local", NMI_DONE)
    rig.add(NMI_UNKNOWN, "unknown", 2)
    rig.register(NMI_UNKNOWN, COUNT, 0, "native", rig.n[:1])
    assert rig.nmi() == [1, 2]
    assert rig.n[0] == 1
    assert rig.grown("nmi_unknown") == 4  # what its handlers have handled
    rig.add(NMI_LOCAL, "handles")
    assert rig.nmi() == [1, 4]
    assert (rig.n[0], rig.grown("nmi_unknown")) == (1, 4)


def test_external_ones_have_a_reason(rig):
    """default_do_nmi: local first, then SERR, IO_CHECK; unknown without a reason."""
    for type, name in zip(TYPES, ("local", "unknown", "serr", "check"), strict=True):
        rig.add(type, name, NMI_DONE if type == NMI_LOCAL else NMI_HANDLED)
    assert rig.nmi(NMI_REASON_SERR) == [1, 3]
    assert rig.nmi(NMI_REASON_IOCHK) == [1, 4]
    assert rig.nmi(NMI_REASON_SERR | NMI_REASON_IOCHK) == [1, 3]
    assert rig.nmi() == [1, 4]  # the other half of the last reason
    assert rig.nmi() == [1, 2]
    assert rig.grown("nmi_external") == 4
    rig.remove(NMI_LOCAL, "local")
    rig.add(NMI_LOCAL, "handles", number=5)
    assert rig.nmi(NMI_REASON_SERR) == [5]  # stands until nobody else has handled one
    rig.remove(NMI_LOCAL, "handles")
    assert rig.nmi() == [3]
    rig.remove(NMI_SERR, "serr")
    assert rig.nmi(NMI_REASON_SERR) == []  # nobody's, but no unknown one
    assert rig.grown("nmi_unknown") == 1
    with pytest.raises(ValueError, match="1 is no reason"):
        rig.cluster.chip.send_nmi(1, 1)


def test_the_second_half_of_a_back_to_back_nmi_is_swallowed(rig):
    """An NMI handler that has handled two events may have handled the next NMI's."""

    def twice(type, regs):
        n = shmipi.shared("n")
        n[0] += 1
        if n[0] > 1:
            return NMI_DONE
        shmipi.irq.chip().send_nmi(1)
        return int(n[1])

    rig.register(NMI_LOCAL, twice, 0, "twice")
    for handled, swallowed, unknown in ((2, 1, 0), (1, 1, 1)):
        rig.n[:2] = 0, handled
        rig.cluster.chip.send_nmi(1)
        rig.wait(lambda: rig.n[0] == 2)
        rig.wait(lambda s=swallowed: rig.grown("nmi_swallowed") == s)
        rig.wait(lambda u=unknown: rig.grown("nmi_unknown") == u)
        rig.wait(lambda: not rig.cluster.chip.read("nmi", 1))  # it is over


def test_an_nmi_ipi_is_the_first_local_handler(rig):
    """And all others are asked as well: two NMIs may have collapsed."""
    rig.add(NMI_LOCAL, "local", NMI_DONE)
    rig.register(NMI_LOCAL, COUNT, 0, "native", rig.n[:1])
    rig.add(NMI_UNKNOWN, "unknown")

    def ipi(regs):
        order = shmipi.shared("order")
        order[0] += 1
        order[order[0]] = 9

    for _ in range(2):
        rig.order[:] = 0
        assert rig.cluster.smp.smp_send_nmi_ipi(1, ipi, LONG) == 1
        rig.wait(lambda: rig.order[:3].tolist() == [2, 9, 1])
    assert rig.n[0] == 2
    rig.remove(NMI_LOCAL, "native")
    rig.remove(NMI_LOCAL, "local")
    rig.order[:] = 0
    assert rig.cluster.smp.smp_send_nmi_ipi(1, ipi, LONG) == 1
    rig.wait(lambda: not rig.cluster.chip.read("nmi", 1))
    assert rig.order[:2].tolist() == [1, 9]  # handled: it is not unknown


def test_what_a_handler_raises_handles_nothing(rig):
    def broken(type, regs):
        raise ValueError("from a handler")

    rig.register(NMI_LOCAL, broken, 0, "broken")
    rig.register(NMI_LOCAL, lambda *_: "three", 0, "words")
    rig.add(NMI_UNKNOWN, "unknown", number=7)
    assert rig.nmi() == [7]
    assert rig.grown("unraisable") == 2


# ---- what is refused -----------------------------------------------------------------


def refused(code, func, *args):
    with pytest.raises(IrqError) as error:
        func(*args)
    assert error.value.errno == code
    return str(error.value)


def test_what_cannot_be_registered(rig):
    register = rig.cluster.smp.register_nmi_handler
    for bad in (None, 5):
        assert "no handler" in refused(errno.EINVAL, register, NMI_LOCAL, bad, 0, "x")
    assert "types are 0 to 3" in refused(errno.EINVAL, register, 4, id, 0, "x")
    assert "flags" in refused(errno.EINVAL, register, NMI_LOCAL, id, 2, "x")
    assert "name" in refused(errno.EINVAL, register, NMI_LOCAL, id, 0, "")
    assert "31 bytes" in refused(errno.EINVAL, register, NMI_LOCAL, id, 0, 32 * "x")
    assert rig.nmi() == []
    refused(errno.EINVAL, rig.cluster.smp.unregister_nmi_handler, -1, "x")


def test_one_that_is_linked_already(rig):
    """__register_nmi_handler: an nmiaction is in one list, once."""

    def handler(type, regs):
        shmipi.shared("n")[3] += 1

    rig.register(NMI_LOCAL, handler, 0, "mine")
    text = refused(
        errno.EINVAL,
        rig.cluster.smp.register_nmi_handler,
        NMI_LOCAL,
        handler,
        0,
        "mine",
    )
    assert "is registered already" in text
    rig.register(NMI_LOCAL, handler, 0, "other")
    rig.nmi()
    assert rig.n[3] == 2
    # The name is the key, and not unique: the first of that name goes.
    rig.add(NMI_LOCAL, "mine", number=2)
    rig.remove(NMI_LOCAL, "mine")
    assert rig.nmi() == [2]
    assert rig.n[3] == 3
    rig.remove(NMI_LOCAL, "mine")
    assert rig.nmi() == []


def test_there_is_room_for_15_of_a_type(rig):
    for number in range(15):
        rig.add(NMI_LOCAL, f"h{number}")
    text = refused(
        errno.ENOSPC, rig.cluster.smp.register_nmi_handler, NMI_LOCAL, id, 0, "more"
    )
    assert "no room" in text
    assert rig.nmi() == list(range(1, 16))
    rig.remove(NMI_LOCAL, "h7")
    rig.add(NMI_LOCAL, "more", number=16, flags=NMI_FLAG_FIRST)
    assert rig.nmi() == [16, *range(1, 8), *range(9, 16)]


def test_a_second_one_for_serr_is_warned_of(script):
    script(
        """
        import warnings
        from shmipi import Cluster, ShmipiWarning, smp

        if __name__ == "__main__":
            with Cluster(1) as cluster, warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                for type in (smp.NMI_SERR, smp.NMI_IO_CHECK, smp.NMI_LOCAL):
                    for name in "abc":
                        noop = smp.NativeHandler("noop")
                        cluster.smp.register_nmi_handler(type, noop, 0, name)
                text = [str(w.message) for w in given if w.category is ShmipiWarning]
                assert len(text) == 2, text
                assert "NMI_SERR has several" in text[0]
                assert "NMI_IO_CHECK has several" in text[1]
        """
    )


# ---- unregister ----------------------------------------------------------------------


@pytest.mark.parametrize("who", ["host", "task"])
def test_unregister_waits_until_no_cpu_runs_it(rig, background, who):
    """synchronize_rcu: after it the handler may be unloaded."""
    cluster = rig.cluster

    def slow(type, regs):
        n = shmipi.shared("n")
        n[0] = 1
        while not n[1]:
            pass
        n[2] = 1

    def unregister(n, where):
        wait = nmi._synchronize

        def noted(machine):
            n[3] = 1
            wait(machine)

        nmi._synchronize = noted
        try:
            where.unregister_nmi_handler(NMI_LOCAL, "slow")
        finally:
            nmi._synchronize = wait
        return int(n[2])

    def by_task(n):
        return unregister(n, smp)

    rig.register(NMI_LOCAL, slow, 0, "slow")
    cluster.chip.send_nmi(1)
    rig.wait(lambda: rig.n[0])
    if who == "task":
        thread = background(lambda: cluster.run(by_task, rig.n, cpus=[0])[0])
    else:
        thread = background(unregister, rig.n, cluster.smp)
    rig.wait(lambda: rig.n[3])
    thread.join(0.1)
    assert thread.is_alive()
    # It is asked no more all the same, and what is not there is not waited for.
    start = time.monotonic()
    cluster.smp.unregister_nmi_handler(NMI_UNKNOWN, "slow")
    assert time.monotonic() - start < 1
    cluster.chip.send_nmi(2)
    rig.wait(lambda: cluster.chip.read("nmi", 2) == 0)
    rig.n[1] = 1
    assert thread.end() == 1
    rig.names.clear()


def test_unregister_does_not_wait_for_a_cpu_that_dies(rig, background):
    def forever(type, regs):
        shmipi.shared("n")[0] = 1
        while True:
            pass

    cluster = rig.cluster
    rig.register(NMI_LOCAL, forever, 0, "forever")
    cluster.chip.send_nmi(1)
    rig.wait(lambda: rig.n[0])
    thread = background(cluster.smp.unregister_nmi_handler, NMI_LOCAL, "forever")
    thread.join(0.05)
    assert thread.is_alive()
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    thread.end()
    rig.names.clear()
    cluster.online(1)
    rig.before = cluster.counters()
    assert rig.nmi() == []
    cluster.smp.register_nmi_handler(NMI_LOCAL, COUNT, 0, "again", rig.n[3:4])
    cluster.smp.unregister_nmi_handler(NMI_LOCAL, "again")


def test_unregister_does_not_wait_for_a_machine_that_dies(boot, eventually, background):
    """Nobody is left there to say of a CPU in an NMI's handler that it is dead."""

    def forever(type, regs):
        shmipi.shared("n")[0] = 1
        while True:
            pass

    cluster = boot(2, idle="halt")
    n = cluster.shared("n", "i8", 1)
    cluster.smp.register_nmi_handler(NMI_LOCAL, forever, 0, "forever")
    cluster.chip.send_nmi(1)
    eventually(lambda: n[0])
    thread = background(cluster.smp.unregister_nmi_handler, NMI_LOCAL, "forever")
    thread.join(0.05)
    assert thread.is_alive()
    os.kill(cluster._machine.firmware_pid, signal.SIGKILL)
    with pytest.raises(MachineDiedError):
        thread.end()


def test_ctrl_c_ends_the_wait_and_it_is_unregistered_all_the_same(rig, monkeypatch):
    def slow(type, regs):
        n = shmipi.shared("n")
        n[0] += 1
        while not n[1]:
            pass

    def interrupt(*_):
        raise KeyboardInterrupt

    def waits(machine, wait=nmi._synchronize):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        wait(machine)

    cluster = rig.cluster
    rig.register(NMI_LOCAL, slow, 0, "slow")
    cluster.chip.send_nmi(1)
    rig.wait(lambda: rig.n[0])
    monkeypatch.setattr(nmi, "_synchronize", waits)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster.smp.unregister_nmi_handler(NMI_LOCAL, "slow")
    finally:
        signal.signal(signal.SIGALRM, old)
        monkeypatch.undo()
    rig.names.clear()
    rig.n[1] = 1
    rig.wait(lambda: not cluster.chip.read("nmi", 1))
    assert rig.nmi() == []
    assert rig.n[0] == 1


def test_not_from_a_handler(rig):
    """It waits, and of an NMI's handler the kernel warns."""

    def unregister(*_):
        try:
            smp.unregister_nmi_handler(NMI_LOCAL, "there")
        except ClusterStateError as error:
            shmipi.shared("n")[0] += "waits until no CPU runs it" in str(error)
        return NMI_HANDLED

    def off():
        smp.local_irq_disable()
        unregister()
        smp.local_irq_enable()

    rig.register(NMI_LOCAL, unregister, 0, "there")
    rig.nmi()
    assert rig.n[0] == 1
    rig.cluster.call(1, unregister)
    rig.cluster.run(off, cpus=[1])
    assert rig.n[0] == 3
    rig.nmi()
    assert rig.n[0] == 4


def test_registered_from_everywhere(rig):
    """In handlers, too, of NMIs as well: from the next NMI on it is asked."""

    def register(type, regs):
        n = shmipi.shared("n")
        n[0] += 1
        if n[0] == 1:
            smp.register_nmi_handler(NMI_LOCAL, COUNT, 0, "nmi", n[1:2])

    def irq():
        smp.register_nmi_handler(NMI_LOCAL, COUNT, 0, "irq", shmipi.shared("n")[2:3])

    rig.register(NMI_LOCAL, register, 0, "first")
    rig.nmi()
    assert rig.n[:2].tolist() == [1, 0]
    rig.cluster.call(2, irq)
    rig.names += [(NMI_LOCAL, "nmi"), (NMI_LOCAL, "irq")]
    rig.nmi()
    assert rig.n[:3].tolist() == [2, 1, 1]


def test_whoever_did_it_and_whatever_became_of_him(rig):
    """A CPU's handler; a dead CPU's, of which Python's is not asked any more."""

    def register():
        def mine(type, regs):
            shmipi.shared("n")[0] += 1

        smp.register_nmi_handler(NMI_LOCAL, mine, 0, "python")
        smp.register_nmi_handler(NMI_LOCAL, COUNT, 0, "native", shmipi.shared("n")[1:2])

    cluster = rig.cluster
    cluster.run(register, cpus=[0])
    rig.names += [(NMI_LOCAL, "python"), (NMI_LOCAL, "native")]
    rig.nmi()
    assert rig.n[:2].tolist() == [1, 1]
    os.kill(cluster.cpus[0].pid, signal.SIGKILL)
    rig.wait(lambda: cluster.cpus[0].state == "dead")
    rig.nmi()
    assert rig.n[:2].tolist() == [1, 2]
    cluster.online(0)
    rig.before = cluster.counters()
    with Cluster.attach(cluster.name) as guest:
        guest.smp.unregister_nmi_handler(NMI_LOCAL, "python")
        guest.smp.unregister_nmi_handler(NMI_LOCAL, "native")
        n = guest.shared("n", "i8", 4)
        guest.smp.register_nmi_handler(NMI_LOCAL, COUNT, 0, "guest", n[2:3])
        rig.names[:] = [(NMI_LOCAL, "guest")]
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShmipiWarning)
            rig.nmi()
    rig.nmi()  # its native handler is there yet, as the guest is not
    assert rig.n[:3].tolist() == [1, 2, 2]
