"""A CPU is forked without Python, which hears of it when it first runs anything."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

import shmipi
from shmipi import _core, smp
from shmipi.bench.boot import private_kib
from shmipi.irq.chips.apic import Apic
from shmipi.machine.process import is_stopped
from shmipi.users import cpumap, tick


def look(where):
    """Say who runs it; `random` is seeded anew by a hook of Python after a fork."""
    row = shmipi.shared("rows")[where]
    row[0] = os.getpid()
    row[1] = threading.active_count()
    row[2] = random.getrandbits(62)
    row[3] += 1


def note(where):
    look(where)


def nmi(regs):
    look(smp.smp_processor_id())


@pytest.mark.parametrize("idle", ["halt", "haltpoll"])
def test_whatever_runs_first_finds_an_interpreter_of_its_own(boot, eventually, idle):
    cluster = boot(8, idle=idle)
    rows = cluster.shared("rows", "u8", (8, 4))
    n = cluster.shared("n", "i8", 1)
    count = smp.NativeHandler("count")
    cluster.smp.on_each_cpu(count, n)
    cluster.call(0, count, n)  # nothing of it is Python
    assert n[0] == 9
    pids = [cpu.pid for cpu in cluster.cpus]
    before = [private_kib(pid) for pid in pids]
    assert max(before) < 300, "a CPU that has run no Python has little of its own"

    cluster.call(0, look, 0)
    cluster.run(look, 1, cpus=[1])
    cluster.smp.smp_call_function_single(2, note, 2, wait=False)
    cluster.submit(3, look, 3).result(5)
    # Parked, and back, before it has run anything.
    cluster.offline(4)
    cluster.online(4)
    cluster.call(4, look, 4)
    assert cluster.smp.smp_send_nmi_ipi(5, nmi, 5_000_000) == 1
    cluster.smp.smp_call_function_many([6], note, 6, True)
    cluster.run(smp.smp_call_function_single, 7, note, 7, True, cpus=[0])
    eventually(lambda: rows[:, 3].tolist() == [1] * 8)
    assert rows[:, 0].tolist() == pids
    assert rows[:, 1].tolist() == [1] * 8
    assert len(set(rows[:, 2].tolist())) == 8
    assert cluster.run(smp.smp_processor_id) == list(range(8))


def test_cpus_that_have_run_nothing_are_taken_offline_killed_and_ended(
    boot, eventually
):
    cluster = boot(4, idle="halt")
    cluster.offline(1)
    os.kill(cluster.cpus[2].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[2].state == "dead")
    cluster.online(2)
    cluster.online(1)
    cluster.offline(3)
    start = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - start < 1.5, "each ended by itself: the grace is 2 s"


def test_a_signal_that_comes_before_python_is_not_lost(script):
    done = script(
        """
        import os, signal, time
        from shmipi import Cluster
        from shmipi.irq.chips.apic import Apic

        class Noting(Apic):
            def bind(self, machine):
                signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"noted\\n"))
                return super().bind(machine)

        if __name__ == "__main__":
            with Cluster(2, idle="halt", controller=Noting()) as cluster:
                os.kill(cluster.cpus[1].pid, signal.SIGUSR1)
                time.sleep(0.2)
                print("pid", cluster.call(1, os.getpid) == cluster.cpus[1].pid)
        """
    )
    assert done.text == "noted\npid True\n"


def test_nor_is_one_whose_handler_is_older_than_the_machine(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'noted\\n'))\n"
    )
    done = script(
        """
        import os, signal, time
        from shmipi import Cluster

        if __name__ == "__main__":
            with Cluster(2, idle="halt") as cluster:
                for cpu in cluster.cpus:
                    os.kill(cpu.pid, signal.SIGUSR1)
                time.sleep(0.2)
                print("pid", cluster.call(1, os.getpid) == cluster.cpus[1].pid)
        """,
        prefix=("env", f"PYTHONPATH={Path(shmipi.__file__).parents[1]}:{tmp_path}"),
    )
    assert done.text == "noted\nnoted\npid True\n"


@pytest.mark.parametrize("newborn", [True, False])
def test_nor_is_one_that_comes_just_before_the_last_sleep(
    boot, eventually, tmp_path, newborn
):
    """It interrupts no sleep: its handler runs when the machine ends, at the latest."""
    note = tmp_path / "note"

    class Noting(Apic):
        def bind(self, machine):
            signal.signal(signal.SIGUSR1, lambda *_: note.write_text("noted"))
            return super().bind(machine)

    cluster = boot(2, idle="halt", controller=Noting(), steps=True)
    if not newborn:
        cluster.run(int)
        eventually(lambda: cluster.cpus[1].state == "halted")
    pid = cluster.cpus[1].pid
    cluster._machine.arm_step(1, "halted", _core.STEP_STOP)
    cluster.smp.smp_call_function_single(1, smp.NativeHandler("noop"))
    eventually(lambda: cluster._machine.step_hit(1) == "halted")
    eventually(lambda: is_stopped(pid))
    for number in (signal.SIGUSR1, signal.SIGCONT):
        os.kill(pid, number)
    eventually(lambda: psutil.Process(pid).status() == "sleeping")
    cluster.shutdown()
    assert note.read_text() == "noted"


def test_a_hook_of_the_fork_finds_no_machine(script):
    """It runs when Python hears of the fork: to wait in it would begin that anew."""
    done = script(
        """
        import os
        from shmipi import Cluster, NoMachineError, smp
        from shmipi.irq.chips.apic import Apic

        def hook():
            try:
                smp.smp_call_function_single(1, id, 0)
                os.write(1, b"a CPU\\n")
            except NoMachineError:
                os.write(1, b"no machine\\n")

        class Hooking(Apic):
            def bind(self, machine):
                os.register_at_fork(after_in_child=hook)
                return super().bind(machine)

        if __name__ == "__main__":
            with Cluster(2, idle="halt", controller=Hooking()) as cluster:
                print(cluster.call(0, os.getpid) == cluster.cpus[0].pid, flush=True)
        """
    )
    assert done.text == "no machine\nTrue\n"


def timed(timer):
    """A timer's function."""
    shmipi.shared("came")[0] = 1


def passes(flow, data):
    """A program of a cpumap."""
    shmipi.shared("came")[0] = 1
    return cpumap.XDP_PASS


def woken():
    """A task of the scheduler."""
    shmipi.shared("came")[0] = 1


def by_a_timer(cluster):
    timer = cluster.users.tick.hrtimer("first", timed)
    tick.hrtimer_start(timer, 10_000_000, cpu=1)


def by_a_program(cluster):
    made = cluster.users.cpumap.create("first")
    made.update_elem(1, 192, prog=passes)

    def redirect():
        assert cpumap.cpu_map("first").generate(1, 7, 8) == 8

    cluster.run(redirect, cpus=[0])


def by_a_wake_up(cluster):
    cluster.users.scheduler.spawn(woken, cpus=1).result(10)


def by_a_call(cluster):
    cluster.call(1, timed, None)


def by_the_takedown(cluster):
    cluster.offline(1)
    cluster.online(1)
    cluster.shared("came", "i8", 2)[0] = 1


@pytest.mark.parametrize(
    "way", [by_a_timer, by_a_program, by_a_wake_up, by_a_call, by_the_takedown]
)
def test_what_interrupts_a_frame_without_builtins_is_imported_all_the_same(
    boot, eventually, way
):
    """As that of a namedtuple's __new__: PyImport_Import() asks it for __import__."""
    cluster = boot(2, idle="halt")
    came = cluster.shared("came", "i8", 2)

    def bare():
        came = shmipi.shared("came")
        names = {"__builtins__": {}, "came": came.data}
        exec("came[1] = 1\nwhile not came[0]: pass", names)

    (task,) = cluster.start(bare, cpus=[1])
    eventually(lambda: came[1])
    try:
        way(cluster)
        eventually(lambda: came[0])
    finally:
        came[0] = 1
    task.result(10)
    assert cluster.counters()["unraisable"].sum() == 0
