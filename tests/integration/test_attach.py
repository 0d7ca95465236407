"""Hosts that attach to a machine that another process has booted."""

import contextlib
import errno
import json
import os
import secrets
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import shmipi
from shmipi import (
    AttachError,
    Cluster,
    ClusterStateError,
    CpuOfflineError,
    LayoutError,
    MachineDiedError,
    _core,
    cli,
    smp,
)
from shmipi.machine import locks, segment
from shmipi.machine.guests import Guests, address
from shmipi.machine.process import is_stopped
from shmipi.names import DOORBELLS

SOON_S = 2.0  # hard; what is meant is a second at most

# What another process does with the machine that it is told the name of.
EVERYTHING = """
import os, sys
import numpy as np
from shmipi import Cluster, RemoteCallError, atomic, percpu, smp

def where(x):
    return x, smp.smp_processor_id()

def count(info):
    atomic.fetch_add(hits, 0, 1)

def taken(virq, dev_id):
    atomic.fetch_add(percpu("taken"), smp.smp_processor_id(), 1)

if __name__ == "__main__":
    with Cluster.attach(sys.argv[1]) as lab:
        n = lab.ncpus
        assert lab.attached and lab.name == sys.argv[1]
        assert lab.call(1, where, "x") == ("x", 1)
        assert lab.call(1, bytes, 1_000_000) == bytes(1_000_000)
        assert lab.call(0, len, bytes(1_000_000)) == 1_000_000
        assert [lab.submit(cpu, where, 5).result(10) for cpu in range(n)] == [
            (5, cpu) for cpu in range(n)
        ]
        assert lab.run(smp.smp_processor_id) == list(range(n))
        try:
            lab.call(0, int, "seven")
        except RemoteCallError as error:
            assert isinstance(error.__cause__, ValueError)
        else:
            raise AssertionError
        hits = lab.shared("hits", "i8", 1)
        for _ in range(20):
            lab.smp.smp_call_function_many(range(n), count)
            lab.smp.smp_call_function_single(1, count, None, False)
        lab.run(int)
        assert hits[0] == 20 * (n + 1), hits
        assert lab.shared("owners", "f8", 3)[2] == 2.5
        lab.offline(1)
        assert 1 not in lab.online_mask
        lab.online(1)
        virq = lab.irq.irq_reserve_ipi(None, "0-1")
        seen = lab.percpu("taken", "i8")
        lab.irq.request_percpu_irq(virq, taken, "mine", seen)
        lab.irq.enable_percpu_irq_mask(virq)
        lab.irq.ipi_send_mask(virq, "0-1")
        while not seen[:2].all():  # the sender has not waited
            pass
        lab.run(int)
        assert seen[:2].tolist() == [1, 1], seen
        lab.irq.disable_percpu_irq_mask(virq)
        lab.irq.free_percpu_irq(virq, seen)
        lab.irq.irq_destroy_ipi(virq)
        assert lab.counters()["tasks_run"].sum() >= 3 * n
        assert lab.host_counters()["calls_single"] >= 20
        assert "CPU1" in lab.interrupts()
        assert len(lab.trace_events()) > 0
        os.kill(lab.cpus[1].pid, 9)
        while lab.cpus[1].state != "dead":
            pass
        lab.online(1)
        assert lab.call(1, where, "again") == ("again", 1)
    print("done")
"""


@pytest.fixture
def lab(cluster_until_failure):
    with cluster_until_failure(3, idle="halt") as made:
        yield made


@pytest.mark.parametrize("doorbell", DOORBELLS)
def test_another_process_uses_the_machine_as_its_host_does(boot, script, doorbell):
    owner = boot(2, doorbell=doorbell, trace=True)
    owner.shared("owners", "f8", 3)[2] = 2.5
    assert script(EVERYTHING, owner.name).text == "done\n"
    assert owner.call(1, smp.smp_processor_id) == 1
    assert owner.shared("hits", "i8", 1)[0] == 60
    assert owner.host_counters()["calls_single"] < 20  # its own, not the other's


def test_cooperative_cpus_answer_an_attached_host(boot, script):
    owner = boot(2, kick=False, trace=True)
    owner.shared("owners", "f8", 3)[2] = 2.5
    assert script(EVERYTHING, owner.name).text == "done\n"


def test_detaching_leaves_the_machine_and_frees_the_slot(lab):
    for _ in range(3 * _core.GUESTS):
        with Cluster.attach(lab.name) as here:
            assert "attached" in repr(here)
            assert here.call(1, int, "7") == 7
        assert here.closed
        with pytest.raises(ClusterStateError, match="closed"):
            here.call(1, int)
    assert lab.call(1, int, "7") == 7


def test_as_many_hosts_as_there_are_slots(lab):
    hosts = [Cluster.attach(lab.name) for _ in range(_core.GUESTS)]
    try:
        with pytest.raises(AttachError, match="6 hosts are attached") as caught:
            Cluster.attach(lab.name)
        assert caught.value.errno == errno.EAGAIN
        results = [host.submit(i % 3, int, str(i)) for i, host in enumerate(hosts)]
        assert [result.result(5) for result in results] == list(range(_core.GUESTS))
    finally:
        for host in hosts:
            host.shutdown()
    Cluster.attach(lab.name).shutdown()


def test_no_machine_and_a_dead_one(script, eventually):
    with pytest.raises(AttachError, match="no machine") as caught:
        Cluster.attach("there-is-none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="name"):
        Cluster.attach("no name")
    name = f"dead{os.getpid()}"
    path = segment.SHM / segment.full_name(name)
    with Cluster(1, name=name) as machine:
        with path.open("rb") as file:
            data = file.read(1 << 20)
        other = path.with_name(segment.full_name(f"other{os.getpid()}"))
        try:
            other.write_bytes(data[:8] + b"\xff\0\0\0" + data[12:])
            with pytest.raises(LayoutError, match="layout version 255"):
                Cluster.attach(f"other{os.getpid()}")
        finally:
            other.unlink()
        del machine
    try:
        path.write_bytes(data)
        with pytest.raises(AttachError, match="is dead") as caught:
            Cluster.attach(name)
        assert caught.value.errno == errno.EOWNERDEAD
    finally:
        path.unlink()


@pytest.fixture
def ending(boot, background, eventually, monkeypatch):
    """A machine, and what ends it: but not before its task was told to go on."""
    owner = boot(1)
    begun, told = owner.shared("begun", "i8", 1), owner.shared("told", "i8", 1)

    def busy():
        smp.local_irq_disable()
        begun[0] = 1
        end = time.monotonic() + 20.0
        while not told[0] and time.monotonic() < end:
            time.sleep(0)
        smp.local_irq_enable()
        begun[0] = 2

    owner.start(busy)
    eventually(lambda: begun[0])
    # On a busy computer it must not be killed before somebody was told.
    monkeypatch.setattr(type(owner._host).close, "__defaults__", (30.0,))
    return owner, begun, told, lambda: background(owner.shutdown)


def test_a_machine_that_ends_just_now_says_so(ending):
    owner, begun, told, shut_down = ending
    shutdown = shut_down()
    seen = {}
    while shutdown.is_alive():
        try:
            Cluster.attach(owner.name).shutdown()
        except AttachError as error:
            seen[error.errno] = str(error)
            if error.errno == errno.ESHUTDOWN:
                told[0] = 1
    shutdown.end()
    assert "it is being shut down" in seen.get(errno.ESHUTDOWN, ""), seen
    assert seen.keys() <= {errno.ESHUTDOWN, errno.EOWNERDEAD, errno.ENOENT}
    assert begun[0] == 2
    for name in (None, 5, "", "a/b"):
        with pytest.raises(ValueError, match="name is"):
            Cluster.attach(name)


def test_who_comes_with_the_shutdown_does_not_end_it_at_once():
    """The firmware finds both at one look, and the order to stop closes the door."""
    full = f"shmipi.{os.getuid()}.t{secrets.token_hex(6)}"
    config = {"segment": full, "ncpus": 1, "doorbell": "futex"}
    machine = SimpleNamespace(nslots=_core.GUESTS + 2)
    with selectors.EpollSelector() as selector:
        guests = Guests(machine, selector, config, (1, 2), None)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            visitor.connect(address(full, (1, 2)))
            found = selector.select(1)
            assert found
            guests.close()
            for key, _ in found:
                key.data()
            with pytest.raises(ConnectionResetError):  # and looks how the machine is
                visitor.recv(100)


def test_a_controller_of_a_module_that_is_not_here(tmp_path, script, capsys):
    (tmp_path / "ownchip.py").write_text(
        "from shmipi.irq.chips.apic import Apic\nclass Own(Apic):\n    name = 'own'\n"
    )
    name = f"own{os.getpid()}"
    program = f"""
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    import ownchip
    from shmipi import Cluster
    if __name__ == "__main__":
        with Cluster(1, name={name!r}, controller=ownchip.Own):
            print("up", flush=True)
            sys.stdin.read()
    """
    owner = script(program, wait=False, stdin=subprocess.PIPE)
    assert owner.stdout.readline() == "up\n"
    with pytest.raises(AttachError, match=r"ModuleNotFoundError.*ownchip.*PYTHONPATH"):
        Cluster.attach(name)
    assert cli.main(["call", name, "0", "os:getpid"]) == 1
    assert capsys.readouterr().err.startswith("shmipi call: machine ")
    sys.path.insert(0, str(tmp_path))
    try:
        with Cluster.attach(name) as here:
            assert here.controller == "own"
            assert here.call(0, int, "3") == 3
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("ownchip")
    owner.communicate()


@pytest.mark.parametrize("doorbell", ["eventfd", "sem", "pipe"])
def test_no_room_for_the_doorbells_is_said_at_once(boot, script, doorbell):
    program = """
    import os, resource, sys, time
    from shmipi import AttachError, Cluster
    if __name__ == "__main__":
        Cluster.attach(sys.argv[1]).shutdown()
        before = os.listdir("/proc/self/fd")
        for room in (5, 7, 9, 11):
            begun = time.monotonic()
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + room, 4096))
            try:
                Cluster.attach(sys.argv[1])
            except AttachError as error:
                assert "ulimit -n" in str(error) or "open files" in str(error), error
            else:
                raise AssertionError
            assert time.monotonic() - begun < 10
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            assert os.listdir("/proc/self/fd") == before
        print("said")
    """
    lab = boot(16, doorbell=doorbell)
    assert script(program, lab.name).text == "said\n"
    assert lab.call(15, int, "3") == 3


def test_another_network_namespace_is_said(lab, script):
    try:
        subprocess.run(["unshare", "-n", "true"], check=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespace can be made here")
    program = """
    import sys
    from shmipi import AttachError, Cluster
    try:
        Cluster.attach(sys.argv[1])
    except AttachError as error:
        print(error.errno, error)
    """
    text = script(program, lab.name, prefix=("unshare", "-n")).text
    assert text.startswith(f"{errno.ECONNREFUSED} ")
    assert "network namespace" in text


# ---- the machine's end ---------------------------------------------------------------

WAITERS = """
import sys, threading, time
from shmipi import Cluster

def main():
    lab = Cluster.attach(sys.argv[1])
    fell = {}

    def wait(name, work):
        try:
            work()
        except Exception as error:
            fell[name] = (time.monotonic(), repr(error))

    future = lab.submit(0, time.sleep, 100)
    works = {
        "call": lambda: lab.call(0, int),
        "run": lambda: lab.run(time.sleep, 100, cpus=[1]),
        "future": lambda: future.result(),
        "smp": lambda: lab.smp.smp_call_function_single(0, int),
        "many": lambda: lab.smp.on_each_cpu(int),
        "offline": lambda: lab.offline(0),
    }
    threads = [threading.Thread(target=wait, args=work) for work in works.items()]
    for thread in threads:
        thread.start()
    print("waiting", flush=True)
    for thread in threads:
        thread.join(20)
    wait("later", lambda: lab.call(0, int))
    wait("attribute", lambda: lab.cpus)
    for name, (when, error) in sorted(fell.items()):
        print(name, when, error, flush=True)
    lab.shutdown()

if __name__ == "__main__":
    main()
"""


def waiting(script, name):
    process = script(WAITERS, name, wait=False)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    return process


def check_told(process, ended, kind):
    text, _ = process.communicate(timeout=25)
    told = {line.split()[0]: line.split(maxsplit=2)[1:] for line in text.splitlines()}
    names = {"call", "run", "future", "smp", "many", "offline", "later", "attribute"}
    assert set(told) == names, text
    for name, (when, error) in told.items():
        assert error.startswith(kind), (name, error)
        assert float(when) - ended < SOON_S, (name, float(when) - ended)


def test_a_death_that_another_host_has_noticed_first(boot):
    owner = boot(2, idle="halt")
    with shmipi.Cluster.attach(owner.name) as lab:
        os.kill(owner._machine.firmware_pid, signal.SIGSTOP)
        try:
            owner._machine.set_state(shmipi._core.DEAD)
            assert not lab._host.died
            with pytest.raises(shmipi.MachineDiedError):
                lab.call(0, int)
            with pytest.raises(shmipi.MachineDiedError):
                lab.cpus  # noqa: B018
        finally:
            os.kill(owner._machine.firmware_pid, signal.SIGKILL)


@pytest.mark.alone  # it measures
def test_an_orderly_shutdown_is_told_as_one(boot, script):
    owner = boot(2, name=f"end{os.getpid()}")
    process = waiting(script, owner.name)
    ended = time.monotonic()
    owner.shutdown()
    check_told(process, ended, "ClusterStateError('the machine end")


@pytest.mark.alone  # it measures
def test_a_death_is_told_as_one(boot, script):
    owner = boot(2)
    process = waiting(script, owner.name)
    ended = time.monotonic()
    os.kill(owner._machine.firmware_pid, signal.SIGKILL)
    check_told(process, ended, "MachineDiedError")


@pytest.mark.alone
def test_the_owners_death_is_told_and_nobody_keeps_the_machine_alive(script):
    name = f"orphan{os.getpid()}"
    program = f"""
    import time
    from shmipi import Cluster
    if __name__ == "__main__":
        cluster = Cluster(2, name={name!r})
        print("up", flush=True)
        time.sleep(60)
    """
    owner = script(program, wait=False)
    assert owner.stdout.readline() == "up\n"
    here = Cluster.attach(name)
    try:
        firmware = here._machine.firmware_pid
        # Neither can remove anything: a host that ends continues its firmware.
        os.kill(owner.pid, signal.SIGSTOP)
        os.kill(firmware, signal.SIGKILL)
        os.kill(owner.pid, signal.SIGKILL)
        with pytest.raises(MachineDiedError):
            here.run(time.sleep, 60, cpus=[0])
        deadline = time.monotonic() + 5
        found = None
        while time.monotonic() < deadline:
            found = next((f for f in segment.find() if f.name == name), None)
            if found is None or not found.alive:
                break
            time.sleep(0.01)
        assert found is not None
        assert not found.alive
        segment.clean()
    finally:
        here.shutdown()


def knocker(lab, made):
    """Connect to the firmware's socket as any program of this user can."""
    full = segment.full_name(lab.name)
    fd = os.open(segment.SHM / full, os.O_RDONLY)
    where = address(full, segment.identity(fd))
    os.close(fd)

    def connect():
        made.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        made[-1].connect(where)
        made[-1].settimeout(10)
        return made[-1]

    return connect


def test_nonsense_on_the_socket_hurts_nobody(boot):
    lab, made = boot(3), []
    knock = knocker(lab, made)
    deep = "[" * 500 + "]" * 500
    messages = ["", "x", "[]", "null", '{"op": 1}', '{"op": "detach"}', "[" * 60_000]
    for message in messages:
        knock().send(message.encode())
        with Cluster.attach(lab.name) as here:
            assert here.call(1, int, "3", timeout=5) == 3
    guest = knock()
    guest.send(b'{"op": "attach"}')
    assert "slot" in json.loads(guest.recv(1000))
    for rest in (f'"id": {deep}', '"generation": []', f'"cpu": {"9" * 4000}', ""):
        with contextlib.suppress(ConnectionError):  # it has heard enough
            guest.send(f'{{"op": "kill", "cpu": 1, {rest or chr(34)}}}'.encode())
            guest.send(f'{{"op": "boot", "cpu": 1, {rest or chr(34)}}}'.encode())
    assert lab.run(smp.smp_processor_id) == [0, 1, 2]
    for connection in made:
        connection.close()


def test_who_leaves_without_having_read_the_answer_frees_the_slot(boot, eventually):
    """His close resets the connection: the kernel tells before what he said last."""
    lab, made = boot(1), []
    knock = knocker(lab, made)
    firmware = lab._machine.firmware_pid
    for _ in range(_core.GUESTS):
        guest = knock()
        guest.send(b'{"op": "attach"}')
        assert select.select([guest], [], [], 10)[0]
        os.kill(firmware, signal.SIGSTOP)
        try:
            eventually(lambda: is_stopped(firmware))
            guest.send(b'{"op": "detach"}')
            guest.close()
        finally:
            os.kill(firmware, signal.SIGCONT)
    with contextlib.ExitStack() as hosts:
        for _ in range(_core.GUESTS):
            hosts.enter_context(Cluster.attach(lab.name))


def test_who_connects_and_says_nothing_keeps_nobody_out(boot):
    lab, made = boot(2), []
    knock = knocker(lab, made)
    for _ in range(40):
        knock()
    with Cluster.attach(lab.name) as here:
        assert here.call(1, int, "3", timeout=5) == 3
    for connection in made:
        connection.close()


# ---- between hosts -------------------------------------------------------------------


MAINS = """
import sys
from shmipi import Cluster

SIZE = base = int(sys.argv[2])

class Thing:
    size = base

def helper():
    return SIZE

def work():
    return SIZE, helper(), Thing.size

if __name__ == "__main__":
    with Cluster.attach(sys.argv[1]) as here:
        for turn in range(100):
            SIZE = base + turn
            assert here.call(0, work) == (SIZE, SIZE, base)
            assert here.run(work, cpus=[1]) == [(SIZE, SIZE, base)]
            assert here.submit(2, lambda: (SIZE, helper())).result(10) == (SIZE, SIZE)
"""


def test_hosts_are_programs_of_their_own(lab, script):
    """Each has its own ``__main__`` on the CPUs, whatever names the others use."""
    hosts = [script(MAINS, lab.name, str(n), wait=False) for n in (1000, 2000, 3000)]
    for host in hosts:
        text, _ = host.communicate(timeout=30)
        assert (host.returncode, text) == (0, "")


def test_hosts_make_arrays_at_once(lab, script):
    program = """
    import sys
    from shmipi import Cluster
    if __name__ == "__main__":
        with Cluster.attach(sys.argv[1]) as here:
            for i in range(100):
                here.shared(f"mine-{sys.argv[2]}-{i}", "i8", 1)[0] = i
                here.shared(f"ours-{i}", "i8", 3)[int(sys.argv[2])] = i
    """
    started = [script(program, lab.name, str(n), wait=False) for n in range(3)]
    for process in started:
        text, _ = process.communicate(timeout=30)
        assert process.returncode == 0, text
    for i in range(100):
        assert lab.shared(f"ours-{i}", "i8", 3).tolist() == [i] * 3
        for n in range(3):
            assert lab.shared(f"mine-{n}-{i}", "i8", 1)[0] == i


def test_a_killed_hosts_locks_are_taken_from_it(lab, script, eventually):
    program = """
    import os, sys
    from shmipi import Cluster
    if __name__ == "__main__":
        here = Cluster.attach(sys.argv[1])
        for name in ("array", "hotplug", "tool"):
            assert here._machine.trylock(name)
        with here._machine.irq_lock():
            print("held", flush=True)
            os.kill(os.getpid(), int(sys.argv[2]))
    """
    stopped = script(program, lab.name, str(int(signal.SIGSTOP)), wait=False)
    assert stopped.stdout.readline() == "held\n"
    with pytest.raises(shmipi.IpiTimeoutError, match="is it stopped"):
        lab.offline(2, timeout=0.1)
    stopped.kill()
    lab.offline(2, timeout=5)
    lab.online(2, timeout=5)
    lab.shared("after-a-kill", "i8", 1)
    virq = lab.irq.irq_reserve_ipi(None, "0-1")
    lab.irq.irq_destroy_ipi(virq)


def test_two_hosts_bring_a_dead_cpu_back(lab, eventually):
    with Cluster.attach(lab.name) as here:
        os.kill(lab.cpus[2].pid, signal.SIGKILL)
        eventually(lambda: lab.cpus[2].state == "dead")
        with pytest.raises(CpuOfflineError):
            here.call(2, int)
        before = lab.cpus[2].generation
        threads = [
            threading.Thread(target=host.online, args=(2,)) for host in (lab, here)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert lab.cpus[2].generation == before + 1
        assert lab.call(2, int) == here.call(2, int) == 0


def test_a_host_detaches_while_its_threads_call(lab, background):
    """Each ends with an error, and what they left never reaches the slot's next."""
    gate = lab.shared("gate", "i8", 1)

    def held(number):
        while shmipi.shared("gate")[0] <= number:
            time.sleep(0.005)

    for number in range(5):
        here = Cluster.attach(lab.name)

        def calls(here=here):
            while True:
                here.call(0, len, bytes(5000))

        threads = [background(calls) for _ in range(3)]
        waits = background(here.call, 1, held, number)
        time.sleep(0.05)
        here.shutdown()
        for thread in (*threads, waits):
            with pytest.raises(ClusterStateError, match="closed"):
                thread.end()
        gate[0] = number + 1
        with Cluster.attach(lab.name) as other:
            assert [other.call(0, int, str(i)) for i in range(50)] == list(range(50))
    assert lab.counters()["corrupt"].sum() == 0


def test_a_host_detaches_while_the_firmware_owes_it_an_answer(
    boot, background, eventually
):
    owner = boot(2, idle="halt")
    lab = Cluster.attach(owner.name)
    firmware = owner._machine.firmware_pid
    os.kill(owner.cpus[1].pid, signal.SIGKILL)
    eventually(lambda: owner.cpus[1].state == "dead")
    os.kill(firmware, signal.SIGSTOP)
    try:
        asks = background(lab.online, 1)
        eventually(lambda: lab._host._orders)
        lab.shutdown()
        with pytest.raises(ClusterStateError, match="detached"):
            asks.end(10)
    finally:
        os.kill(firmware, signal.SIGCONT)


def test_a_host_detaches_while_another_changes_cpus(boot, background, eventually):
    """Its thread that looks after dead CPUs waits for the other, and not for ever."""
    owner = boot(2, idle="halt")
    lab = Cluster.attach(owner.name)
    lab.smp.cpuhp_setup_state(smp.CpuhpState.CPUHP_BP_PREPARE_DYN, "x", None, int)
    with locks.held(owner._machine, "hotplug", 5):
        os.kill(owner.cpus[1].pid, signal.SIGKILL)
        eventually(lambda: lab._hotplug_turn() is not None)  # it waits
        background(lab.shutdown).end(10)


@pytest.mark.parametrize("way", ["call", "run", "single", "each"])
def test_a_host_detaches_in_a_signal_handler_of_its_call(lab, way):
    """It gets an error, and not None: what it reads is no longer the machine's."""
    here = Cluster.attach(lab.name)
    gate = lab.shared("gate of a signal", "i8", 1)
    gate[0] = 0

    def held(_=None):
        end = time.monotonic() + 30
        while not gate[0] and time.monotonic() < end:
            time.sleep(0.005)

    ways = {
        "call": lambda: here.call(1, held),
        "run": lambda: here.run(held),
        "single": lambda: here.smp.smp_call_function_single(1, held),
        "each": lambda: here.smp.on_each_cpu(held),
    }
    before = signal.signal(signal.SIGALRM, lambda *_: here.shutdown())
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(ClusterStateError, match="closed"):
            ways[way]()
    finally:
        gate[0] = 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        here.shutdown()
    assert lab.run(int) == [0] * len(lab.cpus)


LEAVES_TASKS = """
import os, sys, time
from shmipi import Cluster, atomic, shared, smp

def spin():
    atomic.fetch_add(shared("begun"), 0, 1)
    while True:
        pass

def sleep():
    atomic.fetch_add(shared("begun"), 0, 1)
    time.sleep(100)

def wait():
    atomic.fetch_add(shared("begun"), 0, 1)
    while True:
        smp.wait_for_interrupt()

def never():
    atomic.fetch_add(shared("never"), 0, 1)

if __name__ == "__main__":
    here = Cluster.attach(sys.argv[1])
    begun = here.shared("begun", "i8", 1)
    here.shared("never", "i8", 1)
    kept = [here.start(f, cpus=[n]) for n, f in enumerate((spin, sleep, wait))]
    kept += [here.start(never), here.start(never)]
    here.start(never)
    while begun[0] < 3:
        time.sleep(0.001)
    print("left", flush=True)
    if sys.argv[2] == "detach":
        here.shutdown()
        print("detached", flush=True)
        sys.stdin.read()
    elif sys.argv[2] == "exit":
        sys.exit(0)
    else:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("end", "doorbell"),
    [("detach", "futex"), ("exit", "sem"), *(("kill", d) for d in DOORBELLS)],
)
def test_the_tasks_of_a_host_end_with_it(boot, script, end, doorbell):
    """Those that run are cancelled, the others never begin."""
    lab = boot(3, doorbell=doorbell)
    generations = [cpu.generation for cpu in lab.cpus]
    if end == "detach":
        process = script(LEAVES_TASKS, lab.name, end, wait=False)
        assert [process.stdout.readline() for _ in range(2)] == ["left\n", "detached\n"]
    else:
        script(LEAVES_TASKS, lab.name, end, status=-9 if end == "kill" else 0)
    assert lab.run(smp.smp_processor_id, timeout=5) == [0, 1, 2]
    assert lab.shared("begun", "i8", 1)[0] == 3
    assert lab.shared("never", "i8", 1)[0] == 0
    assert [cpu.generation for cpu in lab.cpus] == generations
    assert lab.counters()["unraisable"].sum() == 0
    if end == "detach":
        process.communicate()


def test_a_killed_hosts_tasks_on_cooperative_cpus(boot, script):
    """There a task is cancelled where it yields, or waits."""
    lab = boot(3, kick=False)
    program = LEAVES_TASKS.replace("pass", "smp.cond_resched()")
    program = program.replace("time.sleep(100)", "wait()")
    script(program, lab.name, "kill", status=-9)
    assert lab.run(smp.smp_processor_id, timeout=5) == [0, 1, 2]
    assert lab.shared("never", "i8", 1)[0] == 0


def test_a_forks_child_is_not_attached(lab):
    with Cluster.attach(lab.name) as here:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                here.call(0, int)
            except ClusterStateError:
                here.shutdown()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert here.call(0, int, "5") == 5
    Cluster.attach(lab.name).shutdown()


def test_a_native_handler_is_the_machines_whatever_its_number(tmp_path, boot, script):
    source = tmp_path / "two.c"
    source.write_text(
        "#include <stdint.h>\n"
        "void one(void *info) { *(int64_t *)info = 1; }\n"
        "void two(void *info) { *(int64_t *)info = 2; }\n"
        "void three(void *info) { *(int64_t *)info = 3; }\n"
    )
    library = tmp_path / "two.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [*compiler.split(), "-shared", "-fPIC", "-o", library, source], check=True
    )
    owner = boot(2, handlers=[f"{library}:one", f"{library}:two"])
    program = """
    import sys
    from shmipi import Cluster, NativeHandler
    library = sys.argv[2]
    if __name__ == "__main__":
        # Here the numbers are others.
        names = [f"{library}:three", f"{library}:two", f"{library}:one"]
        with Cluster(1, handlers=names), Cluster.attach(sys.argv[1]) as here:
            cell = here.shared("cell", "i8", 1)
            for name, value in (("one", 1), ("two", 2)):
                handler = NativeHandler(f"{library}:{name}")
                here.smp.smp_call_function_single(1, handler, cell)
                assert cell[0] == value, (name, cell)
            try:
                handler = NativeHandler(names[0])
                here.smp.smp_call_function_single(1, handler, cell)
            except LookupError as error:
                print(error)
    """
    text = script(program, owner.name, str(library)).text
    assert "was not booted with this native handler" in text


# ---- death ---------------------------------------------------------------------------

SENDER = """
import os, sys, time
from shmipi import Cluster, smp

def slow(sender):
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{sender}") and time.monotonic() < end:
        time.sleep(0.01)

if __name__ == "__main__":
    here = Cluster.attach(sys.argv[1])
    what, step, action = sys.argv[2:5]
    n = here.shared("n", "i8", 1)
    here.call(1, int)
    here.smp.smp_call_function_single(1, smp.NativeHandler("count"), n, False)
    here.run(int)
    while here.cpus[1].state != "halted":  # else it polls still, and nobody rings it
        time.sleep(0.001)
    here._machine.arm_step(here._machine.id, step, int(action))
    print("armed", flush=True)
    if what == "call":
        here.smp.smp_call_function_single(1, smp.NativeHandler("count"), n)
    elif what == "nowait":
        here.smp.smp_call_function_single(1, smp.NativeHandler("count"), n, False)
        here.smp.smp_call_function_single(1, smp.NativeHandler("count"), n)
    elif what == "slow":
        here.smp.smp_call_function_single(1, slow, os.getpid())
    elif what == "submit":
        here.submit(1, len, bytes(20_000)).result()
    elif what == "run":
        here.run(len, bytes(20_000), cpus=[1])
    print("through", flush=True)
"""
STEPS = [
    ("call", "push"),
    ("call", "aim"),
    ("call", "pushed"),
    ("call", "raise"),
    ("call", "ring"),
    ("call", "rung"),
    ("nowait", "pushed"),
    ("slow", "park"),
    ("slow", "parked"),
    ("slow", "wake"),
    ("submit", "push"),
    ("submit", "aim"),
    ("submit", "pushed"),
    ("run", "aim"),
    ("run", "ring"),
]


@pytest.fixture
def stepped(cluster_until_failure):
    with cluster_until_failure(2, idle="halt", steps=True) as made:
        yield made


@pytest.mark.parametrize(("what", "step"), STEPS)
def test_an_attached_host_killed_at(stepped, script, eventually, what, step):
    """Its owner's calls return and are its own, and the slot is another's then."""
    stepped.shared("n", "i8", 1)
    assert stepped.submit(1, len, bytes(20_000)).result(5) == 20_000
    free = shm_of(stepped)
    kill = str(_core.STEP_KILL)
    script(SENDER, stepped.name, what, step, kill, status=-9)
    for cpu in (0, 1):
        assert stepped.call(cpu, int, "3", timeout=5) == 3
    assert stepped.submit(1, len, bytes(20_000)).result(5) == 20_000
    assert stepped.run(smp.smp_processor_id) == [0, 1]
    # Its memory has come home: nothing of it is in flight for good.
    eventually(lambda: shm_of(stepped) <= free + 64 * 1024)
    with Cluster.attach(stepped.name) as here:
        assert here.call(1, len, bytes(20_000), timeout=5) == 20_000
    assert stepped.counters()["corrupt"].sum() == 0


@pytest.mark.parametrize("step", ["push", "pushed", "ring"])
def test_an_attached_host_stopped_at(stepped, script, eventually, step):
    stepped.shared("n", "i8", 1)
    stop = str(_core.STEP_STOP)
    process = script(SENDER, stepped.name, "call", step, stop, wait=False)
    assert process.stdout.readline() == "armed\n"
    status = Path(f"/proc/{process.pid}/stat")
    eventually(lambda: " T " in status.read_text())
    for cpu in (0, 1):
        assert stepped.call(cpu, int, "3", timeout=5) == 3
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == "through\n"


def shm_of(cluster):
    """Bytes that a machine takes of /dev/shm."""
    return (segment.SHM / segment.full_name(cluster.name)).stat().st_blocks * 512


def test_what_a_killed_host_had_allocated_is_given_back(lab, script, eventually):
    before = shm_of(lab)
    program = """
    import os, sys, time
    from shmipi import Cluster
    if __name__ == "__main__":
        here = Cluster.attach(sys.argv[1])
        kept = [here.submit(1, len, bytes(3_000_000)) for _ in range(5)]
        print([future.result() for future in kept][:1], flush=True)
        kept = [here.submit(1, len, bytes(3_000_000)) for _ in range(5)]
        functions = [lambda n=n: n for n in range(500)]
        print(sum(here.call(0, f) for f in functions), flush=True)
        os.kill(os.getpid(), 9)
    """
    process = script(program, lab.name, status=-9)
    assert process.text.split() == ["[3000000]", str(sum(range(500)))]
    eventually(lambda: shm_of(lab) <= before + 64 * 1024, 10)
    assert lab.call(1, int, "4") == 4


def test_what_a_killed_host_had_queued_stays_until_it_has_run(boot, script, eventually):
    """Its slot is another's meanwhile, and no result is delivered to the wrong one."""
    lab = boot(2, idle="halt")
    ran = lab.shared("ran", "i8", 64)
    program = """
    import os, sys
    from shmipi import Cluster, atomic
    if __name__ == "__main__":
        here = Cluster.attach(sys.argv[1])
        ran = here.shared("ran", "i8", 64)
        def work(i, more):
            atomic.fetch_add(ran, i, 1)
            return bytes(4000) + b"wrong"
        for i in range(50):
            here.submit(1, work, i, bytes(i * 100))
        os.kill(os.getpid(), 9)
    """
    pid = lab.cpus[1].pid
    for _ in range(_core.GUESTS + 1):  # each slot has something in flight
        os.kill(pid, signal.SIGSTOP)
        try:
            script(program, lab.name, status=-9)
            with Cluster.attach(lab.name) as here:
                future = here.submit(1, str, "mine")
                os.kill(pid, signal.SIGCONT)
                assert future.result(10) == "mine"
        finally:
            os.kill(pid, signal.SIGCONT)
    eventually(lambda: (ran[:50] == _core.GUESTS + 1).all())
    assert lab.counters()["corrupt"].sum() == 0
    assert lab.counters()["unraisable"].sum() == 0


SOAK = """
import random, sys
from shmipi import Cluster, smp

def echo(value, more):
    return value, more, smp.smp_processor_id()

if __name__ == "__main__":
    me, here = int(sys.argv[2]), Cluster.attach(sys.argv[1])
    print("up", flush=True)
    serial = 0
    while True:
        futures = []
        for _ in range(20):
            serial += 1
            cpu, more = random.randrange(here.ncpus), bytes(random.choice([0, 9, 7000]))
            asked = (me, serial)
            futures.append((cpu, asked, more, here.submit(cpu, echo, asked, more)))
            assert here.call(cpu, echo, asked, more) == (asked, more, cpu)
        here.smp.on_each_cpu(id)
        for cpu, asked, more, future in futures:
            assert future.result(20) == (asked, more, cpu)
"""


def test_hosts_are_killed_and_replaced_while_the_owner_calls(boot, script):
    lab = boot(3)
    name, serial, deaths = lab.name, 0, 0
    hosts = [script(SOAK, name, str(n), wait=False) for n in range(3)]
    end = time.monotonic() + 3
    try:
        while time.monotonic() < end:
            until = time.monotonic() + 0.15
            while time.monotonic() < until:
                serial += 1
                cpu, more = serial % 3, bytes(serial * 37 % 9000)
                future = lab.submit(cpu, echo, ("owner", serial), more)
                assert lab.call(cpu, echo, -serial, more) == (-serial, more, cpu)
                assert future.result(20) == (("owner", serial), more, cpu)
            victim = hosts.pop(0)
            assert victim.stdout.readline() == "up\n"
            assert victim.poll() is None, victim.stdout.read()
            victim.kill()
            text = victim.communicate()[0]
            assert not text, text
            deaths += 1
            hosts.append(script(SOAK, name, str(10 + deaths), wait=False))
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    print(f"{serial} calls and submits of the owner, {deaths} hosts killed")
    counters = lab.counters()
    assert counters["corrupt"].sum() == counters["unraisable"].sum() == 0
    assert lab.run(smp.smp_processor_id) == [0, 1, 2]


def echo(value, more):
    return value, more, smp.smp_processor_id()


# ---- on the command line -------------------------------------------------------------

PROGRAM = """
import os

FACTOR = 3

def helper(x):
    return x * FACTOR

def go(*values):
    return [helper(value) for value in values]

def pid():
    return os.getpid()

def bad():
    raise ValueError("on purpose")

def odd():
    return {1, 2}

def nothing():
    pass

class Nameless:
    def __repr__(self):
        raise LookupError("no words")

def nameless():
    return Nameless()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def command(capsys, *arguments):
    """Run `shmipi call` in this process: status, output, errors."""
    path = list(sys.path)
    try:
        status = cli.main(["call", *arguments])
    finally:
        sys.path[:] = path
    out, err = capsys.readouterr()
    return status, out, err


def test_call_runs_functions_of_files_and_modules(lab, program, capsys):
    def call(*arguments):
        status, out, err = command(capsys, *arguments)
        assert (status, err) == (0, "")
        return out

    pids = [str(cpu.pid) for cpu in lab.cpus]
    assert call(lab.name, "1", "os:getpid") == pids[1] + "\n"
    assert call(lab.name, "2", f"{program}:pid") == pids[2] + "\n"
    out = call(lab.name, "0", f"{program}:go", "1", "-2.5", "x", "(4,)", "--y")
    assert out == "[3, -7.5, 'xxx', (4, 4, 4), '--y--y--y']\n"
    assert call(lab.name, "0", f"{program}:nothing") == ""
    assert call("--json", lab.name, "0", f"{program}:nothing") == "null\n"
    assert call("--json", lab.name, "0", f"{program}:go", "1") == "[3]\n"
    out = call("--repeat", "200", lab.name, "0", f"{program}:go", "1")
    assert out.startswith("[3]\n200 calls, round trips in us: least ")
    timed = json.loads(call("--json", "--repeat", "20", lab.name, "0", "builtins:int"))
    assert (timed["result"], timed["calls"]) == (0, 20)
    assert (
        0 < timed["rtt_ns"]["min"] <= timed["rtt_ns"]["p50"] <= timed["rtt_ns"]["max"]
    )


def test_ps_shows_who_is_attached(lab, capsys, eventually):
    def shown():
        assert cli.main(["ps", "--json", "-"]) == 0
        machines = json.loads(capsys.readouterr().out)["machines"]
        return next(m["attached"] for m in machines if m["name"] == lab.name)

    eventually(lambda: shown() == [])  # a host before may be leaving still
    with Cluster.attach(lab.name):
        assert shown() == [os.getpid()]
        assert cli.main(["ps", "-v"]) == 0
        assert f"attached: {os.getpid()}\n" in capsys.readouterr().out


def test_call_says_what_is_wrong_in_words(lab, program, tmp_path, capsys):
    name = lab.name
    leaves = tmp_path / "leaves.py"
    leaves.write_text("raise SystemExit(5)")
    for status, words, *arguments in [
        (1, "ValueError: on purpose", name, "1", f"{program}:bad"),
        (1, "CPU 9 does not exist", name, "9", "os:getpid"),
        (1, "no answer", "--timeout", "50ms", name, "1", "time:sleep", "1"),
        (1, "is not for JSON", "--json", name, "1", f"{program}:odd"),
        (1, "is not for JSON", "--json", name, "1", "builtins:float", "nan"),
        (1, "LookupError: no words", name, "1", f"{program}:nameless"),
        (1, "imported: SystemExit: 5", name, "1", f"{leaves}:x"),
        (2, "no name of a module", name, "1", "..os:x"),
        (1, "there is no machine", "there-is-none", "1", "os:getpid"),
        (2, "letters", "no name", "1", "os:getpid"),
        (2, "has no function", name, "1", f"{program}:missing"),
        (2, "is not a function", name, "1", "os:environ"),
        (2, "there is no module", name, "1", "nowhere.nothing:x"),
        (2, "there is no file", name, "1", "nowhere.py:x"),
        (2, "neither", name, "1", "os"),
        (2, "not a whole number", name, "one", "os:getpid"),
    ]:
        got, out, err = command(capsys, *arguments)
        assert (got, out) == (status, ""), (arguments, err)
        assert words in err
        assert err.startswith("shmipi call: ")


def test_stress_attaches_and_a_killed_one_leaves_the_cpus_idle(lab, capsys, eventually):
    arguments = ["stress", "--attach", lab.name, "--duration"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shmipi", *arguments, "30s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        eventually(lambda: all(lab._machine.slot(cpu).busy for cpu in range(3)), 20)
        assert cli.main([*arguments, "1s"]) == 1
        assert "another host has the whole machine" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
    assert cli.main([*arguments, "1s"]) == 0
    assert "SUCCESS" in capsys.readouterr().out
    assert lab.run(smp.smp_processor_id) == [0, 1, 2]
    assert cli.main([*arguments, "1s", "--cpus", "3"]) == 2
    assert "--cpus is for a machine that is booted" in capsys.readouterr().err
