"""Coprocessors: processes that take interrupts, are no CPUs, and leave nothing."""

import contextlib
import errno
import os
import signal
import time

import pytest

import shmipi
from shmipi import ClusterStateError, NoMachineError, _core, irq, smp
from shmipi.errors import DeviceTreeError, IrqError
from shmipi.irq import IrqFlags


def count(mailbox, name="taken"):
    """Count interrupts until the machine stops."""
    taken = shmipi.shared(name)
    taken[0] = 1 if mailbox.name else 2
    while True:
        if mailbox.wait(1.0):
            taken[1] += 1


def refused(code, call, *args, **options):
    with pytest.raises(IrqError) as caught:
        call(*args, **options)
    assert caught.value.errno == code, caught.value
    return caught.value


def wait(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.0005)


def exists(pid):
    return os.path.exists(f"/proc/{pid}")


@pytest.fixture
def started(boot):
    cluster = boot(2, idle="halt")
    taken = cluster.shared("taken", "i8", 2)
    dsp = cluster.irq.add_coprocessor("dsp", count)
    wait(lambda: taken[0])
    return cluster, dsp, taken


def send_all(virq):
    from shmipi import irq

    irq.irq_send_ipi_all(virq)


@pytest.mark.parametrize("controller", ["apic", "mips-gic"])
def test_the_host_and_cpus_send_to_it(boot, controller):
    cluster = boot(2, idle="halt", controller=controller)
    taken = cluster.shared("taken", "i8", 2)
    with cluster.irq.add_coprocessor("dsp", count) as dsp:
        wait(lambda: taken[0])
        senders = [
            lambda: cluster.irq.irq_send_ipi_all(dsp.virq),
            lambda: cluster.irq.ipi_send_single(dsp.virq, 0),
            lambda: cluster.irq.irq_send_ipi(dsp.virq, "0"),
            lambda: cluster.irq.ipi_send_mask(dsp.virq, [0]),
            lambda: cluster.run(send_all, dsp.virq, cpus=[1]),
            lambda: cluster.call(0, send_all, dsp.virq),  # from a handler
        ]
        for number, send in enumerate(senders, 1):
            send()
            wait(lambda n=number: taken[1] == n)
        assert dsp.alive
        assert dsp.pid not in [cpu.pid for cpu in cluster.cpus]
    assert not dsp.alive
    assert not exists(dsp.pid)
    assert taken[1] == len(senders)
    assert [domain.name for domain in cluster.irq.domains[2:]] == []


def test_it_is_a_domain_of_its_own_with_one_hwirq(started):
    cluster, dsp, _ = started
    desc = cluster.irq.irq_to_desc(dsp.virq)
    assert (dsp.name, dsp.domain.parent, dsp.domain.hwirqs()) == ("dsp", None, [0])
    assert dsp.domain.mapping == "single"
    assert dsp.domain.is_ipi
    assert desc.flags == IrqFlags.IRQ_NOREQUEST | IrqFlags.IRQ_NO_BALANCING
    assert cluster.irq.ipi_get_hwirq(dsp.virq, 0) == 0
    error = refused(errno.EBUSY, cluster.irq.irq_reserve_ipi, "dsp", "0")
    assert error.domain == "dsp"
    error = refused(errno.EINVAL, cluster.irq.irq_reserve_ipi, "dsp", "0-1")
    assert (error.domain, error.cpu) == ("dsp", 1)
    error = refused(errno.EINVAL, cluster.irq.irq_send_ipi, dsp.virq, [1])
    assert (error.irq, error.cpu) == (dsp.virq, 1)
    refused(errno.EINVAL, cluster.irq.ipi_send_single, dsp.virq, 1)


def test_its_irq_can_not_be_requested(started):
    cluster, dsp, taken = started
    data = cluster.shared("data", "i8", cluster.ncpus)
    for call, args in (
        (cluster.irq.request_percpu_irq, (dsp.virq, print, "dsp", data)),
        (cluster.irq.enable_percpu_irq_mask, (dsp.virq,)),
        (cluster.irq.disable_percpu_irq_mask, (dsp.virq,)),
    ):
        error = refused(errno.EINVAL, call, *args)
        assert (error.irq, error.domain) == (dsp.virq, "dsp")
    # Where the kernel returns nothing, nothing happens: it stays the coprocessor's.
    cluster.irq.free_percpu_irq(dsp.virq)
    cluster.call(0, irq.enable_percpu_irq, dsp.virq)
    cluster.call(0, irq.disable_percpu_irq, dsp.virq)
    cluster.irq.irq_send_ipi_all(dsp.virq)
    wait(lambda: taken[1] == 1)


def test_interrupts_collapse_until_it_looks(boot):
    cluster = boot(1, idle="halt")
    go = cluster.shared("go", "i8", 4)

    def slow(mailbox, go):
        go[0] = 1
        while go[1] == 0:
            time.sleep(0.001)
        assert mailbox.pending
        go[2] = sum(mailbox.wait(0.05) for _ in range(3))
        go[3] = mailbox.virq

    dsp = cluster.irq.add_coprocessor("dsp", slow, go)
    wait(lambda: go[0])
    for _ in range(5):
        cluster.irq.irq_send_ipi_all(dsp.virq)
    go[1] = 1
    assert dsp.join(5.0)
    assert go.tolist() == [1, 1, 1, dsp.virq]
    assert not dsp.alive


def test_a_wait_has_a_timeout(boot):
    cluster = boot(1, idle="halt")
    found = cluster.shared("found", "f8", 3)

    def watch(mailbox, found):
        start = time.monotonic()
        found[0] = mailbox.wait(0.05)
        found[1] = time.monotonic() - start
        found[2] = mailbox.wait(0)

    assert cluster.irq.add_coprocessor("dsp", watch, found).join(5.0)
    assert found[0] == found[2] == 0
    assert 0.05 <= found[1] < 2


def test_its_death_gives_everything_back(started):
    cluster, dsp, _ = started
    place = dsp.domain.coprocessor
    os.kill(dsp.pid, signal.SIGKILL)
    wait(lambda: not dsp.alive)
    assert not exists(dsp.pid)
    assert cluster._machine.coproc(place) == (0, 0, 0)
    error = refused(errno.ENXIO, cluster.irq.irq_send_ipi_all, dsp.virq)
    assert (error.irq, error.domain) == (dsp.virq, "dsp")
    assert dsp.join(0)
    assert refused(errno.EINVAL, cluster.irq.irq_send_ipi_all, dsp.virq).irq == dsp.virq
    again = cluster.irq.add_coprocessor("dsp", count)
    assert again.domain.coprocessor == place
    assert again.virq == dsp.virq
    assert not dsp.alive
    assert cluster.call(0, os.getpid) == cluster.cpus[0].pid


def test_an_old_descriptor_does_not_reach_the_next_one(started):
    cluster, dsp, taken = started
    old = cluster.irq.irq_to_desc(dsp.virq)
    dsp.kill()
    dsp.kill()  # nothing happens
    taken[:] = 0
    cluster.irq.irq_reserve_ipi(None, "0")  # the virq is another's now
    new = cluster.irq.add_coprocessor("new", count)
    wait(lambda: taken[0])
    assert new.domain.coprocessor == dsp.domain.coprocessor
    assert new.virq != dsp.virq
    from shmipi.irq import __ipi_send_mask as unverified

    refused(errno.ENXIO, unverified, old, "0")
    cluster.irq.irq_send_ipi_all(new.virq)
    wait(lambda: taken[1] == 1)


def test_a_function_that_raises_or_returns(boot, capfd):
    cluster = boot(1, idle="halt")

    def bad(mailbox):
        raise ValueError("from the coprocessor")

    dsp = cluster.irq.add_coprocessor("bad", bad)
    assert dsp.join(5.0)
    assert "from the coprocessor" in capfd.readouterr().err
    dsp = cluster.irq.add_coprocessor("good", lambda mailbox: None)
    assert dsp.join(5.0)
    assert capfd.readouterr().err == ""
    assert not exists(dsp.pid)


def test_large_functions_travel(boot):
    cluster = boot(1, idle="halt")
    found = cluster.shared("found", "i8", 1)
    text = os.urandom(1 << 20)  # much more than a control message holds

    def measure(mailbox, found, text):
        found[0] = len(text)

    assert cluster.irq.add_coprocessor("dsp", measure, found, text).join(5.0)
    assert found[0] == 1 << 20


def test_what_can_not_be_pickled_starts_nothing(boot):
    cluster = boot(1, idle="halt")
    with pytest.raises(TypeError, match="pickle"):
        cluster.irq.add_coprocessor("dsp", lambda mailbox, x: None, iter_lock())
    assert len(cluster.irq.domains) == 2


def iter_lock():
    import threading

    return threading.Lock()


def test_bad_names_and_too_many(started):
    cluster, _, _ = started
    assert refused(errno.EEXIST, cluster.irq.add_coprocessor, "dsp", count).domain
    refused(errno.EEXIST, cluster.irq.add_coprocessor, "apic-ipi", count)
    with pytest.raises(DeviceTreeError, match="1 to 31"):
        cluster.irq.add_coprocessor("", count)
    for number in range(_core.NCOPROC - 1):
        cluster.irq.add_coprocessor(f"n{number}", count)
    error = refused(errno.ENOMEM, cluster.irq.add_coprocessor, "more", count)
    assert error.domain == "more"


def test_only_the_host_adds_them(started):
    cluster, _, _ = started

    def there():
        from shmipi import irq

        irq.irq().add_coprocessor("x", print)

    with pytest.raises(shmipi.RemoteCallError) as caught:
        cluster.run(there, cpus=[0])
    assert isinstance(caught.value.__cause__, ClusterStateError)


def test_it_is_no_cpu(boot):
    cluster = boot(1, idle="halt")
    found = cluster.shared("found", "i8", 2)

    def look(mailbox, found):
        with contextlib.suppress(NoMachineError):
            smp.smp_processor_id()
            found[0] = 1
        with contextlib.suppress(NoMachineError):
            smp.smp_call_function_single(0, print)
            found[0] = 2
        found[1] = os.getppid()

    dsp = cluster.irq.add_coprocessor("dsp", look, found)
    assert dsp.join(5.0)
    assert found.tolist() == [0, cluster._machine.firmware_pid]
    assert len(cluster.cpus) == 1


def test_it_ends_with_the_machine(boot):
    cluster = boot(1, idle="halt")
    up = cluster.shared("up", "i8", 2)

    def patient(mailbox, up):
        from shmipi.irq import coprocessor

        coprocessor._LOOK_S = 60.0
        up[0] = 1
        try:
            mailbox.wait()
        finally:
            up[1] = 1

    dsp = cluster.irq.add_coprocessor("dsp", patient, up)
    wait(lambda: up[0])
    start = time.monotonic()
    cluster._host.close(20.0)  # as shutdown, with more patience
    assert time.monotonic() - start < 10  # not by the grace's end: it was told
    cluster.shutdown()
    assert up[1]
    assert not exists(dsp.pid)
    assert not dsp.alive
    assert dsp.join(0)


def test_one_that_does_not_listen_is_killed_at_the_end(boot):
    cluster = boot(1, idle="halt")
    up = cluster.shared("up", "i8", 1)

    def deaf(mailbox, up):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        up[0] = 1
        while True:
            time.sleep(60)

    dsp = cluster.irq.add_coprocessor("deaf", deaf, up)
    wait(lambda: up[0])
    cluster._host.close(0.2)  # as shutdown, with less patience
    assert not exists(dsp.pid)


@pytest.mark.parametrize("who", ["host", "firmware"])
def test_it_ends_when_others_are_killed(script, who):
    """Nothing is left when the host or the firmware is killed with SIGKILL."""
    program = script(
        """
        import sys, time
        from shmipi import Cluster

        def forever(mailbox):
            while True:
                time.sleep(60)

        cluster = Cluster(1, idle="halt")
        dsp = cluster.irq.add_coprocessor("dsp", forever)
        print(dsp.pid, cluster._machine.firmware_pid, flush=True)
        time.sleep(60)
        """,
        wait=False,
    )
    pid, firmware = (int(word) for word in program.stdout.readline().split())
    assert exists(pid)
    if who == "host":
        program.kill()
    else:
        os.kill(firmware, signal.SIGKILL)
    wait(lambda: not exists(pid))
    program.kill()


def test_a_child_of_it_does_not_hold_the_machine(boot):
    cluster = boot(1, idle="halt")
    found = cluster.shared("found", "i8", 1)

    def parent(mailbox, found):
        forked, says = os.pipe()
        child = os.fork()
        if not child:
            os.write(says, b"!")  # what is done after a fork is done
            time.sleep(60)
            os._exit(0)
        os.read(forked, 1)
        found[0] = child

    dsp = cluster.irq.add_coprocessor("dsp", parent, found)
    assert dsp.join(5.0)
    child, name = int(found[0]), cluster.name
    try:
        cluster.shutdown()
        from shmipi.machine import segment

        assert name not in [found.name for found in segment.find()]
        assert not any(
            "shmipi" in os.readlink(f"/proc/{child}/fd/{fd}")
            for fd in os.listdir(f"/proc/{child}/fd")
        )
    finally:
        os.kill(child, signal.SIGKILL)
        wait(lambda: not exists(child))
