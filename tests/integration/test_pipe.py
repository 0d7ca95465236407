"""The doorbell that is a pipe: what is its own, beside what all doorbells do."""

import contextlib
import fcntl
import os
import signal

import pytest

from shmipi import CallSingleData, Cluster, smp

PAGE = os.sysconf("SC_PAGE_SIZE")


def bells(cluster):
    return cluster._machine.doorbell_fds()


def fill(pipe):
    """Write until it is full; return how many bytes that took."""
    written = 0
    with contextlib.suppress(BlockingIOError):
        while written <= PAGE:
            written += os.write(pipe, bytes(256))
    return written


def held(pid):
    """What the descriptors of a process are."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # what listed them
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2, idle="halt", doorbell="pipe", kick=False) as made:
        yield made


def test_each_is_one_page_and_one_descriptor(cluster):
    for pipe in bells(cluster):
        flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDWR  # who rings can have no SIGPIPE
        assert flags & os.O_NONBLOCK
        assert fcntl.fcntl(pipe, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) == PAGE
    # The ends that it was made of are open nowhere any more.
    names = [os.readlink(f"/proc/self/fd/{pipe}") for pipe in bells(cluster)]
    for process in (os.getpid(), *(cpu.pid for cpu in cluster.cpus)):
        found = held(process)
        assert [found.count(name) for name in names] == [1, 1]


def test_every_way_in_rings_a_halted_cpu(cluster, eventually):
    seen = cluster.shared("seen", "i8", 1)

    def note(_=None):
        seen[0] += 1

    csd = CallSingleData(note)
    ways = [
        lambda: cluster.call(1, note),
        lambda: cluster.call(1, note, bytes(1 << 20)),
        lambda: cluster.submit(1, note).result(5),
        lambda: cluster.run(note, cpus=[1]),
        lambda: cluster.smp.smp_call_function_single(1, note, wait=False),
        lambda: cluster.smp.smp_call_function_single_async(1, csd),
        lambda: cluster.smp.smp_call_function_many("1", note),
        lambda: cluster.smp.smp_send_nmi_ipi(1, note),
    ]
    for number, way in enumerate(ways, start=1):
        eventually(lambda: cluster.cpus[1].state == "halted")
        before = cluster.host_counters()["doorbells_sent"]
        way()
        eventually(lambda now=number: seen[0] == now)
        is_nmi = number == len(ways)  # a signal wakes it
        assert is_nmi or cluster.host_counters()["doorbells_sent"] > before


def test_a_full_pipe_is_a_rung_bell(cluster, eventually):
    """Nobody waits for room in it, and it is emptied by one wake-up."""
    (_, target) = bells(cluster)
    cpu = cluster.cpus[1]
    eventually(lambda: cluster.cpus[1].state == "halted")
    os.kill(cpu.pid, signal.SIGSTOP)
    try:
        assert fill(target) == PAGE
        before = cluster.host_counters()
        woken = cluster.counters()["doorbells_received"][1]
        answer = cluster.submit(1, smp.smp_processor_id)
        now = cluster.host_counters()
        assert now["doorbells_sent"] > before["doorbells_sent"]
        assert now["doorbells_retried"] > before["doorbells_retried"]
        assert not answer.done()
    finally:
        os.kill(cpu.pid, signal.SIGCONT)
    assert answer.result(5) == 1
    assert cluster.counters()["doorbells_received"][1] == woken + 1
    eventually(lambda: cluster.cpus[1].state == "halted")
    with pytest.raises(BlockingIOError):
        os.read(target, 1)
    assert cluster.call(1, smp.smp_processor_id, timeout=5) == 1


def test_a_token_that_nobody_meant_is_spurious(cluster, eventually):
    eventually(lambda: cluster.cpus[1].state == "halted")
    before = cluster.counters()["doorbells_spurious"][1]
    os.write(bells(cluster)[1], b"stray")
    eventually(lambda: cluster.counters()["doorbells_spurious"][1] > before)
    assert cluster.cpus[1].state == "halted"
    assert cluster.call(1, smp.smp_processor_id, timeout=5) == 1


def test_a_cpu_that_was_killed_leaves_its_tokens_to_the_next(boot, eventually):
    cluster = boot(2, idle="halt", doorbell="pipe")
    (_, target) = bells(cluster)
    eventually(lambda: cluster.cpus[1].state == "halted")
    os.kill(cluster.cpus[1].pid, signal.SIGSTOP)
    fill(target)
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)
    assert cluster.call(1, smp.smp_processor_id, timeout=5) == 1
    eventually(lambda: cluster.cpus[1].state == "halted")
    assert cluster.call(1, smp.smp_processor_id, timeout=5) == 1


def test_no_sigpipe_at_the_machines_end(script):
    """A host that has SIGPIPE at its default rings the pipes of a machine that died."""
    done = script(
        """
        import os, signal
        from shmipi import Cluster, NoMachineError, ShmipiError
        if __name__ == "__main__":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            cluster = Cluster(2, idle="halt", doorbell="pipe")
            pipes = cluster._machine.doorbell_fds()
            os.kill(cluster._machine.firmware_pid, signal.SIGKILL)
            try:
                cluster.call(1, abs, -1)
            except ShmipiError as error:
                print(type(error).__name__)
            print([os.write(pipe, b"x") for pipe in pipes])
        """
    )
    assert done.text.splitlines()[-1] == "[1, 1]"
