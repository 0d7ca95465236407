"""Idle policies, doorbells, and what is counted of them."""

import itertools
import os
import time
from pathlib import Path

import pytest

from shmipi import smp
from shmipi.names import DOORBELLS

IDLE = ["poll", "haltpoll", "halt"]


def switches(pid):
    """Context switches of a process so far: (voluntary, all)."""
    text = Path(f"/proc/{pid}/status").read_text()
    values = {
        line.split(":")[0]: int(line.split()[1])
        for line in text.splitlines()
        if "ctxt_switches" in line
    }
    voluntary = values["voluntary_ctxt_switches"]
    return voluntary, voluntary + values["nonvoluntary_ctxt_switches"]


def asleep(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize(("doorbell", "idle"), list(itertools.product(DOORBELLS, IDLE)))
def test_every_doorbell_with_every_idle_policy(boot, eventually, doorbell, idle):
    cluster = boot(3, doorbell=doorbell, idle=idle)
    assert (cluster.doorbell, cluster.idle) == (doorbell, idle)
    n = cluster.shared("n", "i8", 3)

    def task():
        me = smp.smp_processor_id()
        for turn in range(60):
            smp.smp_call_function_single(
                (me + 1 + turn % 2) % 3, smp.NativeHandler("count"), n[me:]
            )
        return me

    for turn in range(100):
        assert cluster.call(turn % 3, abs, -turn, timeout=10) == turn
    assert cluster.run(task) == [0, 1, 2]
    assert n.tolist() == [60] * 3
    # After a pause, from sleep: and by every way of calling.
    if idle != "poll":
        eventually(lambda: {cpu.state for cpu in cluster.cpus} == {"halted"})
    cluster.smp.on_each_cpu(smp.NativeHandler("count"), n)
    assert n[0] == 63
    assert [f.result(5) for f in [cluster.submit(c, abs, -c) for c in range(3)]] == [
        0,
        1,
        2,
    ]
    # A task is interrupted whatever the doorbell is.
    flag = cluster.shared("flag", "i8", 1)

    def busy():
        flag[0] = 1
        end = time.monotonic() + 5
        while flag[0] == 1 and time.monotonic() < end:
            pass
        return int(flag[0])

    future = cluster._machine.post(1, busy, (), None, True)
    eventually(lambda: flag[0])
    assert cluster.call(1, smp.in_hardirq, timeout=5)

    def let_go():
        flag[0] = 2

    cluster.call(1, let_go, timeout=5)
    assert cluster._machine.collect(future, 1, 5.0) == 2
    counters = cluster.counters()
    assert counters["corrupt"].sum() == 0
    assert counters["kicks_received"][1] > 0
    if idle == "halt":
        assert (counters["halts"] > 0).all()
        assert (counters["doorbells_received"] > 0).all()


def test_polling_cpus_are_not_rung(boot, eventually):
    """Proves rows 29 and 30."""
    cluster = boot(2, idle="poll")
    eventually(lambda: {cpu.state for cpu in cluster.cpus} == {"polling"})
    cluster.call(1, int)
    before, there = cluster.host_counters(), cluster.counters()
    for _ in range(100):
        cluster.smp.smp_call_function_single(1, id)
    after, now = cluster.host_counters(), cluster.counters()
    assert after["elided"] - before["elided"] == 100
    assert now["doorbells_received"][1] == there["doorbells_received"][1]
    assert now["irq_call_single"][1] == there["irq_call_single"][1]
    assert now["halts"][1] == 0


def test_halted_cpus_are_rung_once_each(boot, eventually):
    """A CPU that others keep off its core for 20 ms is rung again, by the watchdog:
    fifty calls that met none of that are looked for."""
    cluster = boot(2, idle="halt")
    cluster.call(1, int)
    again, end = 1, time.monotonic() + 30
    while again and time.monotonic() < end:
        before, there = cluster.host_counters(), cluster.counters()
        for _ in range(50):
            eventually(lambda: cluster.cpus[1].state == "halted")
            cluster.smp.smp_call_function_single(1, id)
        after, now = cluster.host_counters(), cluster.counters()
        sent = after["doorbells_sent"] - before["doorbells_sent"]
        again = after["rekicked"] - before["rekicked"]
        assert now["irq_call_single"][1] - there["irq_call_single"][1] == 50
        assert now["doorbells_received"][1] - there["doorbells_received"][1] == 50
    assert again == 0  # where it was, one may have been a kick: it had begun to run
    assert sent == 50


def test_haltpoll_polls_first_and_halts_then(boot, eventually):
    cluster = boot(2, idle="haltpoll")
    eventually(lambda: {cpu.state for cpu in cluster.cpus} == {"halted"})
    assert cluster.call(1, int) == 0
    eventually(lambda: cluster.cpus[1].state == "halted")


def test_idle_auto_is_one_of_the_others(boot):
    assert boot(2).idle in IDLE
    # More CPUs than cores: nobody may spin on a core that others need.
    assert boot(os.cpu_count() * 2 + 1).idle in ("haltpoll", "halt")


@pytest.mark.alone
def test_halted_cpus_do_not_wake_up(boot, eventually):
    """256 with futex, fewer with those of which a system has few: none switches."""
    few = {"futex": 256, "mqueue": 8}
    sizes = {doorbell: few.get(doorbell, 24) for doorbell in DOORBELLS}
    pids = {}
    for doorbell, ncpus in sizes.items():
        cluster = boot(ncpus, idle="halt", doorbell=doorbell)

        def states(cluster=cluster):
            return {cpu.state for cpu in cluster.cpus}

        eventually(lambda states=states: states() == {"halted"}, 10)
        pids |= {cpu.pid: (doorbell, cpu.id) for cpu in cluster.cpus}
    assert len(pids) == sum(sizes.values())
    # A CPU says that it halts before it sleeps.
    eventually(lambda: all(asleep(pid) for pid in pids), 10)
    # All machines are watched in the same second.
    time.sleep(0.2)
    before = {pid: switches(pid) for pid in pids}
    time.sleep(1.0)
    assert [pids[pid] for pid in pids if switches(pid) != before[pid]] == []


def test_an_oversubscribed_machine_of_pollers_is_not_starved(boot):
    """More spinning CPUs than cores: calls and tasks still get through."""
    cluster = boot(os.cpu_count() * 3, idle="poll")
    start = time.monotonic()
    for turn in range(30):
        assert cluster.call(turn % cluster.ncpus, abs, -turn, timeout=20) == turn
    assert cluster.run(smp.smp_processor_id) == list(range(cluster.ncpus))
    assert time.monotonic() - start < 20


def test_a_handler_that_was_idle_can_use_the_interpreters_threads(boot, background):
    """An idle CPU gives the interpreter up: threads that a handler started go on."""
    cluster = boot(2, idle="poll")
    n = cluster.shared("n", "i8", 1)

    def start():
        import threading

        def count():
            for _ in range(50):
                n[0] += 1
                time.sleep(0.001)

        threading.Thread(target=count).start()

    cluster.call(1, start)
    deadline = time.monotonic() + 5
    while n[0] < 50:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- counters ------------------------------------------------------------------------


def test_counters_add_up(boot, background):
    """Proves row 85."""
    cluster = boot(3, idle="halt")

    def task():
        me = smp.smp_processor_id()
        for turn in range(200):
            smp.smp_call_function_single((me + 1) % 3, id)
            smp.smp_call_function_single((me + 2) % 3, id, None, turn % 5 > 0)
        smp.smp_call_function(id)

    for _ in range(3):
        cluster.run(task)
    cluster.smp.on_each_cpu(id)
    for cpu in range(3):
        cluster.call(cpu, int)
        cluster.call(cpu, int)
    cpus = {name: int(row.sum()) for name, row in cluster.counters().items()}
    host = cluster.host_counters()
    both = {name: cpus[name] + host[name] for name in cpus}
    # Everything queued was run, and everything run was a handler or a task.
    assert (
        both["csd_queued"] == cpus["csd_sync"] + cpus["csd_async"] + cpus["tasks_run"]
    )
    assert (
        cpus["python_run"] + cpus["native_run"] == cpus["csd_sync"] + cpus["csd_async"]
    )
    assert cpus["tasks_run"] == 9
    assert cpus["calls_single"] == 9 * 400
    assert cpus["calls_many"] == 9
    assert host["calls_many"] == 1
    # An interrupt is sent, or was not needed.
    sent = both["doorbells_sent"] + both["kicks_sent"]
    assert both["elided"] + both["coalesced"] <= both["csd_queued"]
    assert cpus["irq_call_single"] + cpus["irq_call"] <= both["csd_queued"]
    assert (
        cpus["doorbells_received"] + cpus["kicks_received"] <= sent + both["rekicked"]
    )
    assert cpus["kicks_spurious"] == cpus["corrupt"] == cpus["died"] == 0
    assert cpus["halts"] >= 3


def test_counters_are_per_cpu_arrays(cluster):
    counters = cluster.counters()
    assert {row.shape for row in counters.values()} == {(3,)}
    for word in ("sent", "received", "spurious", "retried"):
        assert f"doorbells_{word}" in counters
        assert f"kicks_{word}" in counters
    assert {"elided", "coalesced", "rekicked", "kicks_coalesced"} <= set(counters)
    before = counters["python_run"].copy()
    cluster.call(1, int)
    assert (counters["python_run"] == before).all()  # a copy, not a view
    assert (cluster.counters()["python_run"] - before).tolist() == [0, 1, 0]


def test_interrupts_has_the_shape_of_proc_interrupts(cluster):
    """Proves row 85."""
    for _ in range(3):
        cluster.smp.on_each_cpu(id)
    lines = cluster.interrupts().splitlines()
    assert lines[0].split() == ["CPU0", "CPU1", "CPU2"]
    rows = {line.split(":")[0].strip(): line.split(":")[1] for line in lines[1:]}
    assert {"RES", "CAL"} <= set(rows)
    for text in rows.values():
        numbers = text.split()[:3]
        assert all(number.isdigit() for number in numbers)
        assert text.split()[3:]
    assert sum(map(int, rows["CAL"].split()[:3])) > 0
    width = {line.index("CPU0") + 4 for line in lines[:1]}
    assert len(width) == 1


def test_a_stopped_target_is_rung_again_and_counted(boot, eventually, background):
    """No progress for 10 ms: `rekicked`, backing off, and nothing piles up."""
    cluster = boot(2, idle="halt")
    eventually(lambda: cluster.cpus[1].state == "halted")
    os.kill(cluster.cpus[1].pid, 19)
    thread = background(cluster.call, 1, abs, -3)
    eventually(lambda: cluster.host_counters()["rekicked"])
    time.sleep(0.6)
    rekicked = cluster.host_counters()["rekicked"]
    os.kill(cluster.cpus[1].pid, 18)
    assert thread.end() == 3
    assert 1 <= rekicked <= 20
