"""CPUs left alone: nohz_full; kernel/time/tick-sched.c, sched/core.c."""

import time

import pytest

import shmipi
from shmipi import ClusterStateError, NativeHandler, smp
from shmipi.users import nohz, scheduler, tick

CPUS = 4
MS = 1_000_000


@pytest.fixture
def rig(cluster_until_failure):
    with cluster_until_failure(CPUS, idle="halt") as cluster:
        cluster.shared("log", "i8", 8)[:] = 0
        cluster.users.nohz.tick_nohz_full_setup("2-3")
        yield cluster
        for cpu in range(CPUS):
            cluster.online(cpu)


def spin(place):
    words = shmipi.shared("log")
    words[place] = 1
    while words[place] != 2:
        pass


def kicks(cluster, cpu):
    return next(one for one in cluster.users.nohz.stats() if one.cpu == cpu)


def interrupts(cluster, cpu):
    """Every interrupt that the controller has given to ``cpu``."""
    return sum(int(counts[cpu]) for _, _, counts in cluster._host.counters.interrupts())


def cause(cpu):
    nohz.tick_nohz_dep_set_cpu(cpu, nohz.TICK_DEP_BIT_SCHED)
    first = nohz.can_stop_full_tick(cpu)
    nohz.tick_nohz_dep_set_cpu(cpu, nohz.TICK_DEP_BIT_RCU)  # it has one: no kick
    nohz.tick_nohz_dep_clear_cpu(cpu, nohz.TICK_DEP_BIT_SCHED)
    nohz.tick_nohz_dep_clear_cpu(cpu, nohz.TICK_DEP_BIT_RCU)
    return first, nohz.can_stop_full_tick(cpu)


def test_the_interrupts_of_an_isolated_cpu_are_its_kicks_by_cause(rig, eventually):
    """tick_nohz_dep_set_cpu: only the first cause kicks; row 65 from another CPU."""
    words = rig.shared("log", "i8", 8)
    task = rig.start(spin, 0, cpus=[2])
    eventually(lambda: words[0] == 1)
    time.sleep(0.01)
    before, counts = kicks(rig, 2), rig.counters()
    assert rig.run(cause, 2, cpus=[0]) == [(False, True)]
    eventually(lambda: kicks(rig, 2).taken == before.taken + 1)
    eventually(lambda: rig.cpus[2].state == "running")  # else the next is no interrupt
    assert rig.run(nohz.tick_nohz_full_kick_cpu, 2, cpus=[1]) == [True]
    eventually(lambda: kicks(rig, 2).taken == before.taken + 2)
    after, now = kicks(rig, 2), rig.counters()
    sent = {c: n - before.by_cause[c] for c, n in after.by_cause.items()}
    assert {c: n for c, n in sent.items() if n} == {"sched": 1, "kick": 1}
    assert after.dependencies == ()
    taken = {
        name: int(now[name][2] - counts[name][2])
        for name in ("irq_call_single", "irq_call", "irq_resched", "irq_other")
    }
    assert taken == {
        "irq_call_single": sum(sent.values()),
        "irq_call": 0,
        "irq_resched": 0,
        "irq_other": 0,
    }
    words[0] = 2
    task.results()


def grown(cluster, before, cpu=2):
    """Interrupts of ``cpu`` since ``before``, by cause; all are accounted for."""
    now = next(one for one in cluster.users.nohz.stats() if one.cpu == cpu)
    assert sum(now.interrupts.values()) <= now.counted
    return {
        cause: n - before.interrupts[cause]
        for cause, n in now.interrupts.items()
        if n != before.interrupts[cause]
    }


def asks(cause):
    """Task of CPU 0: interrupt CPU 2, for that."""
    if cause == "reschedule":
        smp.smp_send_reschedule(2)
    elif cause == "call":
        smp.smp_call_function_single(2, NativeHandler("noop"), None, True)
    elif cause == "irq_work":
        assert nohz.tick_nohz_full_kick_cpu(2)
    elif cause == "stopper":
        smp.stop_one_cpu(2, nothing)
    elif cause == "nmi":
        smp.smp_send_nmi_ipi(2, NativeHandler("noop"), 1_000_000)
    elif cause == "timer":
        pinned = tick.HRTIMER_MODE_REL_PINNED
        tick.hrtimer_start(tick.hrtimer("there"), MS, pinned, cpu=2)
    else:
        scheduler.spawn(smp.smp_processor_id, cpus=2, daemon=True)


def test_every_interrupt_of_an_isolated_cpu_has_its_cause(rig, eventually):
    """Of one that computes: what comes, what for, and nothing else; and what a task
    that waits for it costs: its ticks."""
    words = rig.shared("log", "i8", 8)
    timer = rig.users.tick.hrtimer("there", NativeHandler("noop"))
    task = rig.start(spin, 0, cpus=[2])
    eventually(lambda: words[0] == 1)
    time.sleep(0.01)
    for cause in ("reschedule", "call", "irq_work", "stopper", "nmi"):
        before = kicks(rig, 2)
        rig.run(asks, cause, cpus=[0])
        eventually(lambda before=before: grown(rig, before))
        time.sleep(0.002)
        assert grown(rig, before) == {cause: 1}
        # Back in its task: until then it polls, and what comes is no interrupt.
        taken = before.taken + (cause == "irq_work")
        eventually(lambda taken=taken: kicks(rig, 2).taken == taken)
        eventually(lambda: rig.cpus[2].state == "running")
    before = kicks(rig, 2)
    rig.run(asks, "timer", cpus=[0])
    eventually(lambda: timer.fired == 1)
    assert set(grown(rig, before)) == {"reschedule", "timer"}
    eventually(lambda: rig.cpus[2].state == "running")
    rig.users.scheduler._machine.sched_llc(2, 7)  # no cache is shared: by the wake list
    before = kicks(rig, 2)
    rig.run(asks, "wakeup", cpus=[0])
    eventually(lambda: grown(rig, before).get("wakeup") == 1)
    other = rig.users.scheduler.spawn(takes_turns, words, cpus=2)
    eventually(lambda: grown(rig, before).get("tick", 0) > 2)
    words[1] = 2
    other.result(20)
    assert set(grown(rig, before)) <= {"wakeup", "reschedule", "tick"}
    words[0] = 2
    task.results()
    eventually(lambda: sum((one := kicks(rig, 2)).interrupts.values()) == one.counted)
    rig.users.scheduler._machine.sched_llc(2, 0)


def nothing(_):
    return None


def takes_turns(words):
    while words[1] != 2:
        yield


def kick_everybody():
    others = [nohz.tick_nohz_full_kick_cpu(cpu) for cpu in (0, 1, 7)]
    return others, nohz.tick_nohz_full_kick_all()


def test_only_isolated_cpus_are_kicked(rig):
    """tick_nohz_full_kick_cpu returns for others; kick_all is for who is online."""
    assert rig.run(kick_everybody, cpus=[1]) == [([False] * 3, 2)]
    rig.offline(3)
    assert rig.run(kick_everybody, cpus=[1])[0][1] == 1


def test_a_task_is_kicked_where_it_runs_and_while_it_runs(rig, eventually):
    """tick_nohz_kick_task: not once it sleeps or has ended."""
    words = rig.shared("log", "i8", 8)
    tasks = rig.start(spin, 1, cpus=[3])
    (task,) = list(tasks)
    eventually(lambda: words[1] == 1)
    before = kicks(rig, 3)
    assert nohz.tick_nohz_kick_task(task)
    eventually(lambda: kicks(rig, 3).taken == before.taken + 1)
    assert kicks(rig, 3).by_cause["task"] == before.by_cause["task"] + 1
    assert kicks(rig, 2).by_cause["task"] == 0
    words[1] = 2
    tasks.results()
    assert not nohz.tick_nohz_kick_task(task)


def start(name, mode):
    tick.hrtimer_start(tick.hrtimer(name), 60_000 * MS, mode)
    return tick.hrtimer(name).cpu, nohz.housekeeping_any_cpu()


def test_timers_that_are_not_pinned_go_to_housekeeping_cpus(rig):
    """get_nohz_timer_target(); HRTIMER_MODE_PINNED stays; those of the dead too."""
    timer = rig.users.tick.hrtimer("far", NativeHandler("noop"))
    unbound, pinned = tick.HRTIMER_MODE_REL, tick.HRTIMER_MODE_REL_PINNED
    assert rig.run(start, "far", unbound, cpus=[3]) == [(0, 0)]
    assert rig.run(start, "far", unbound, cpus=[1]) == [(1, 1)]
    rig.offline(0)
    assert rig.run(start, "far", unbound, cpus=[3]) == [(1, 1)]
    assert rig.run(start, "far", pinned, cpus=[3]) == [(3, 1)]
    rig.online(0)
    rig.run(start, "far", unbound, cpus=[1])
    rig.offline(1)
    assert timer.cpu == 0  # and not one of the isolated
    assert tick.hrtimer_cancel(timer) == 1


def wake(cpu):
    return nohz.wake_up_nohz_cpu(cpu)


def test_wake_up_nohz_cpu(rig, eventually):
    """An isolated one is kicked, one that idles rescheduled, an offline one left."""
    before = kicks(rig, 2).by_cause["timer"]
    assert rig.run(wake, 2, cpus=[0]) == [True]
    assert kicks(rig, 2).by_cause["timer"] == before + 1
    resched = int(rig.counters()["irq_resched"][1])
    eventually(lambda: rig.cpus[1].state == "halted")
    assert rig.run(wake, 1, cpus=[0]) == [False]
    eventually(lambda: int(rig.counters()["irq_resched"][1]) > resched)
    rig.offline(2)
    assert rig.run(wake, 2, cpus=[0]) == [False]


def test_tasks_that_may_run_anywhere_keep_off(boot, eventually):
    """HK_TYPE_KTHREAD: also woken by an isolated CPU, also when the others are busy."""
    with pytest.raises(ValueError, match="keep house"):
        boot(2, nohz_full="0-1")
    cluster = boot(CPUS, nohz_full="2-3")
    sched = cluster.users.scheduler

    def anywhere():
        seen = set()
        for _ in range(10):
            seen.add(smp.smp_processor_id())
            yield
        return seen

    def spawns():
        tasks = [scheduler.spawn(anywhere) for _ in range(6)]
        return set().union(*(task.result(20) for task in tasks))

    for cpu in range(CPUS):
        assert cluster.run(spawns, cpus=[cpu])[0] <= {0, 1}
    told = sched.spawn(anywhere, cpus="2")
    assert told.result(20) == {2}
    asked = sched.kthread_create(anywhere)
    assert sched.sched_getaffinity(asked) == shmipi.CpuMask("0-1")
    asked.wake()
    assert asked.result(20) <= {0, 1}
    cluster.offline(0)
    cluster.offline(1)  # nobody keeps house: select_fallback_rq
    assert sched.spawn(anywhere).result(20) <= {2, 3}


def test_the_masks(rig):
    assert rig.run(nohz.tick_nohz_full_enabled, cpus=[0]) == [True]
    assert rig.run(nohz.housekeeping_cpumask, cpus=[2]) == [shmipi.CpuMask("0-1")]
    assert rig.run(nohz.can_stop_full_tick, 0, cpus=[0]) == [False]
    assert smp is not None


def test_bad_input_says_so(rig, boot):
    setup = rig.users.nohz.tick_nohz_full_setup
    with pytest.raises(ValueError, match="keep house"):
        setup("0-3")
    with pytest.raises(ValueError, match="4 CPUs"):
        setup("9")
    assert [one.cpu for one in rig.users.nohz.stats()] == [2, 3]
    with boot(2) as cluster:
        assert cluster.users.nohz.stats() == ()
        assert cluster.run(_unset, cpus=[0]) == [(False, False, "not isolated")]


def _unset():
    try:
        nohz.tick_nohz_dep_set_cpu(1, 0)
    except ClusterStateError:
        text = "not isolated"
    return nohz.tick_nohz_full_enabled(), nohz.tick_nohz_full_kick_cpu(1), text


def start_where(gone):
    real, tick.housekeeping_any_cpu = tick.housekeeping_any_cpu, lambda: gone
    timer = tick.hrtimer("stays")
    try:
        tick.hrtimer_start(timer, 5_000 * MS)
        where = timer.cpu
        with pytest.raises(shmipi.CpuOfflineError):
            tick.hrtimer_start(timer, 5_000 * MS, cpu=gone)
        return where
    finally:
        tick.housekeeping_any_cpu = real
        tick.hrtimer_try_to_cancel(timer)


def test_a_timer_stays_where_the_housekeeping_cpu_has_just_gone(rig):
    """Chosen for it, a CPU that goes offline before the timer is there is no error."""
    rig.users.tick.hrtimer("stays", NativeHandler("noop"))
    rig.offline(1)
    assert rig.run(start_where, 1, cpus=[2]) == [2]
