"""The call-function layer against a plain sequential model of it (hypothesis).

The model is a few lists: what each CPU has run, and what waits for it while it has
interrupts disabled. Steps are chosen at random, made from the host or from a CPU, and
after each the machine must have run exactly what the model says, in that order.
"""

import errno
import time

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import shmipi
from shmipi import (
    CpuOfflineError,
    CsdBusyError,
    IpiTimeoutError,
    RemoteCallError,
    atomic,
    smp,
)

NCPUS = 3
CSDS = 3
SOON_S = 10.0

CPUS = st.integers(0, NCPUS - 1)
#: Who sends: the host, or a CPU.
SENDERS = st.one_of(st.none(), CPUS)
MASKS = st.sets(CPUS)
#: What travels inline, and what is pickled.
PAYLOADS = st.one_of(st.none(), st.binary(max_size=40), st.lists(st.integers()))

#: The same choices in each run, so that CI does not fail for one that nobody made.
PROFILE = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


# ---- what runs on the machine --------------------------------------------------------


def note(number):
    """The handler: writes down that it ran, on the CPU that it ran on."""
    log = shmipi.percpu("sequential.log")[smp.smp_processor_id()]
    log[1 + atomic.fetch_add(log, 0, 1)] = number


def answer(number, payload):
    """The same for who wants a result."""
    note(number)
    if number % 5 == 0:
        raise LookupError(number)
    return smp.smp_processor_id(), number, payload


def hold(cpu):
    """A task with interrupts disabled until it is let go."""
    gate = shmipi.shared("sequential.gate")
    smp.local_irq_disable()
    gate[cpu] = 1
    while gate[cpu] == 1:
        time.sleep(0.0002)
    smp.local_irq_enable()


def send(kind, *args):
    """What a sender does, on a CPU or on the host."""
    here, words = args[0], args[1:]
    if kind == "single":
        cpu, number, wait = words
        here.smp_call_function_single(cpu, note, number, wait)
    elif kind == "native":
        (cpu,) = words
        count = shmipi.percpu("sequential.count")[cpu]
        here.smp_call_function_single(cpu, smp.NativeHandler("count"), count, False)
    elif kind == "many":
        mask, number, wait = words
        if here is smp:
            smp.preempt_disable()
        here.smp_call_function_many(sorted(mask), note, number, wait)
        if here is smp:
            smp.preempt_enable()
    elif kind == "each":
        mask, number, wait = words
        here.on_each_cpu_mask(sorted(mask), note, number, wait)
    else:
        mask, odd, number, wait = words
        here.on_each_cpu_cond_mask(
            lambda cpu, info: cpu % 2 == odd, note, number, wait, sorted(mask)
        )


def from_cpu(kind, *words):
    """A task that sends; it tells whether that was refused."""
    try:
        send(kind, smp, *words)
    except CpuOfflineError:
        return True
    return False


# ---- the model, and the steps --------------------------------------------------------


class Sequential(RuleBasedStateMachine):
    """One life of the machine: it begins and ends with all CPUs online and idle."""

    cluster = None

    def __init__(self):
        super().__init__()
        cluster = self.cluster
        self.log = cluster.percpu("sequential.log", "i8", 4096)
        self.count = cluster.percpu("sequential.count", "i8", 1)
        self.gate = cluster.shared("sequential.gate", "i8", NCPUS)
        self.log[:], self.count[:], self.gate[:] = 0, 0, 0
        self.number = 0
        # The model.
        self.online = set(range(NCPUS))
        self.held = {}  # CPU -> the task that holds it
        self.ran = [[] for _ in range(NCPUS)]
        self.waiting = [([], []) for _ in range(NCPUS)]  # SYNC, ASYNC
        self.counted = [0] * NCPUS
        self.count_waits = [0] * NCPUS
        self.futures = []  # (cpu, future, number, payload)
        self.csds = [cluster.smp.CallSingleData(note, -1 - n) for n in range(CSDS)]
        self.csd_at = [None] * CSDS

    def next(self):
        self.number += 1
        return self.number

    def expect(self, cpu, number, *, sync):
        """It runs on that CPU, now or when that is let go."""
        if cpu in self.held:
            self.waiting[cpu][0 if sync else 1].append(number)
        else:
            self.ran[cpu].append(number)

    def do(self, sender, kind, *words):
        """Let the sender do it; was it refused?"""
        if sender is None:
            try:
                send(kind, self.cluster.smp, *words)
            except CpuOfflineError as error:
                return error.errno == errno.ENXIO
            return False
        (refused,) = self.cluster.run(
            from_cpu, kind, *words, cpus=[sender], timeout=SOON_S
        )
        return refused

    def can_send(self, sender):
        return sender is None or (sender in self.online and sender not in self.held)

    @rule(sender=SENDERS, cpu=CPUS, wait=st.booleans())
    def single(self, sender, cpu, wait):
        if not self.can_send(sender):
            return
        number = self.next()
        refused = self.do(sender, "single", cpu, number, wait and cpu not in self.held)
        assert refused == (cpu not in self.online)
        if not refused:
            self.expect(cpu, number, sync=False)  # one that waits is over by now

    @rule(sender=SENDERS, cpu=CPUS)
    def native(self, sender, cpu):
        if not self.can_send(sender):
            return
        refused = self.do(sender, "native", cpu)
        assert refused == (cpu not in self.online)
        if not refused and cpu in self.held:
            self.count_waits[cpu] += 1
        elif not refused:
            self.counted[cpu] += 1

    @rule(
        sender=SENDERS,
        mask=MASKS,
        how=st.sampled_from(["many", "each", 0, 1]),
        wait=st.booleans(),
    )
    def broadcast(self, sender, mask, how, wait):
        if not self.can_send(sender):
            return
        number = self.next()
        there = {cpu for cpu in mask if cpu in self.online}
        if how == "many":
            there -= {sender}
        elif how != "each":
            there = {cpu for cpu in there if cpu % 2 == how}
        wait = wait and not there & self.held.keys()
        words = (mask, number, wait) if how in ("many", "each") else ()
        assert not (
            self.do(sender, how, *words)
            if words
            else self.do(sender, "cond", mask, how, number, wait)
        )
        for cpu in there:
            self.expect(cpu, number, sync=False)

    @rule(cpu=CPUS, payload=PAYLOADS)
    def submit(self, cpu, payload):
        number = self.next()
        try:
            future = self.cluster.submit(cpu, answer, number, payload)
        except CpuOfflineError:
            assert cpu not in self.online
            return
        assert cpu in self.online
        self.expect(cpu, number, sync=True)
        self.futures.append((cpu, future, number, payload))
        if cpu not in self.held:
            self.settle(cpu)

    @rule(cpu=CPUS, which=st.integers(0, CSDS - 1))
    def own_csd(self, cpu, which):
        try:
            self.cluster.smp.smp_call_function_single_async(cpu, self.csds[which])
        except CsdBusyError:
            assert self.csd_at[which] is not None
            return
        except CpuOfflineError:
            assert cpu not in self.online
            assert not self.csds[which].locked
            return
        assert self.csd_at[which] is None
        assert cpu in self.online
        self.expect(cpu, -1 - which, sync=False)
        if cpu in self.held:
            self.csd_at[which] = cpu
        else:
            self.flush(cpu)  # it is free when it has been taken

    @precondition(lambda self: len(self.held) < NCPUS)
    @rule(cpu=CPUS)
    def disable_interrupts(self, cpu):
        if cpu in self.held or cpu not in self.online:
            return
        self.flush(cpu)
        self.gate[cpu] = 0
        (task,) = self.cluster.start(hold, cpu, cpus=[cpu])
        deadline = time.monotonic() + SOON_S
        while not self.gate[cpu]:
            assert time.monotonic() < deadline, "the task does not begin"
            time.sleep(0.0001)
        self.held[cpu] = task

    @precondition(lambda self: self.held)
    @rule(cpu=CPUS)
    def enable_interrupts(self, cpu):
        if cpu not in self.held:
            return
        self.gate[cpu] = 2
        self.held.pop(cpu).result(SOON_S)
        sync, other = self.waiting[cpu]
        self.ran[cpu] += sync + other  # SYNC first, each first in first out
        self.waiting[cpu] = ([], [])
        self.counted[cpu] += self.count_waits[cpu]
        self.count_waits[cpu] = 0
        self.csd_at = [None if at == cpu else at for at in self.csd_at]
        self.settle(cpu)
        self.flush(cpu)

    @rule(cpu=CPUS)
    def offline(self, cpu):
        if cpu not in self.online or cpu in self.held or len(self.online) == 1:
            return
        if self.held:  # all CPUs are stopped to that end, and one takes no interrupts
            with pytest.raises(IpiTimeoutError):
                self.cluster.offline(cpu, 0.01)
        else:
            self.cluster.offline(cpu, SOON_S)
            self.online.discard(cpu)

    @rule(cpu=CPUS)
    def bring_online(self, cpu):
        self.cluster.online(cpu, SOON_S)
        self.online.add(cpu)

    # ---- what must hold --------------------------------------------------------------

    def settle(self, cpu):
        """All futures of this CPU have what the function returned or raised."""
        mine = [one for one in self.futures if one[0] == cpu]
        self.futures = [one for one in self.futures if one[0] != cpu]
        for _, future, number, payload in mine:
            if number % 5:
                assert future.result(SOON_S) == (cpu, number, payload)
            else:
                error = future.exception(SOON_S)
                assert isinstance(error, RemoteCallError)
                assert isinstance(error.__cause__, LookupError)

    def flush(self, cpu):
        """All that was sent there has run: a waiting call overtakes, a second not."""
        self.cluster.call(cpu, int, timeout=SOON_S)
        self.cluster.call(cpu, int, timeout=SOON_S)

    @invariant()
    def the_machine_is_as_the_model(self):
        for cpu in range(NCPUS):
            if cpu in self.online and cpu not in self.held:
                self.flush(cpu)
            log = self.log[cpu]
            assert log[1 : 1 + log[0]].tolist() == self.ran[cpu], f"CPU {cpu}"
            assert self.count[cpu, 0] == self.counted[cpu], f"CPU {cpu}"
        for csd, at in zip(self.csds, self.csd_at, strict=True):
            assert csd.locked == (at is not None)
        for cpu, future, _, _ in self.futures:
            assert cpu in self.held
            assert not future.done()
        assert str(self.cluster.online_mask) == str(shmipi.CpuMask(self.online))

    def teardown(self):
        for cpu in list(self.held):
            self.enable_interrupts(cpu)
        for cpu in range(NCPUS):
            self.cluster.online(cpu, SOON_S)


@pytest.mark.long
def test_calls_are_those_of_a_sequential_model(cluster, monkeypatch):
    monkeypatch.setattr(Sequential, "cluster", cluster)
    run_state_machine_as_test(Sequential, settings=PROFILE)


class Unfair(Sequential):
    """A model that is wrong: what waits may overtake nothing."""

    def expect(self, cpu, number, *, sync):
        super().expect(cpu, number, sync=False)


def test_a_model_that_is_wrong_is_found_out(cluster, monkeypatch):
    """Else the test above would pass whatever the machine did."""
    monkeypatch.setattr(Sequential, "cluster", cluster)
    quick = settings(PROFILE, phases=(Phase.generate,), max_examples=200)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Unfair, settings=quick)
