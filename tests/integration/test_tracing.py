"""Tracing machines that run: what is recorded, counted, and in the kernel's words."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from shmipi import Cluster, ClusterStateError, CpuDiedError, _core, cli, smp
from shmipi.trace import ftrace, kernel, matching, timeline
from shmipi.trace.events import TraceEvent
from shmipi.trace.export import ftrace as ftrace_lines
from shmipi.trace.record import KERNEL_EVENTS, load


@pytest.fixture(scope="module")
def halted():
    """A machine whose CPUs sleep: every call has its IPI."""
    with Cluster(4, idle="halt") as cluster:
        yield cluster


def nothing(info=None):
    return info


def caller(target, calls):
    for _ in range(calls):
        smp.smp_call_function_single(target, nothing, None)


def seldom_caller(target):
    """Calls for ever, and fills no ring before its reader comes, however late."""
    while True:
        caller(target, 10)
        time.sleep(0.001)


def recorded(cluster, work, *, records=1 << 14, events="kernel"):
    """What is recorded of the machine while ``work`` runs: all of it."""
    cluster.tracing.start(records, lossless=True, events=events)
    try:
        with cluster.tracing.recorder() as recorder:
            work()
            cluster.tracing.stop()
    finally:
        cluster.tracing.stop()
    assert recorder.trace.complete, recorder.trace.lost
    return recorder.trace


def names_of(trace):
    return Counter(event.name for event in kernel.events(trace))


def at_rest(cluster):
    """Every CPU has recorded what it did, and sleeps."""
    # Not Cpu.state, which is "halted" also of one that was rung and has yet to wake up.
    slots = range(cluster.ncpus)
    while any(cluster._machine.slot(n).state != _core.HALTED for n in slots):
        time.sleep(0.001)


def total(cluster, name):
    return int(cluster.counters()[name].sum()) + cluster.host_counters()[name]


def test_each_call_is_there_with_the_kernels_names_and_fields(halted):
    before = {
        name: total(halted, name) for name in ("csd_queued", "elided", "coalesced")
    }

    def work():
        at_rest(halted)  # else one polls perhaps, and needs no interrupt
        for cpu in range(4):
            halted.call(cpu, nothing, 7)
        at_rest(halted)
        halted.smp.on_each_cpu(nothing, None, True)
        at_rest(halted)
        taken = total(halted, "irq_resched")
        halted.smp.smp_send_reschedule(2)
        while total(halted, "irq_resched") == taken:
            time.sleep(0.001)
        at_rest(halted)
        halted.call(2, nothing)
        at_rest(halted)  # it goes on before the interrupt that it has caused returns

    trace = recorded(halted, work)
    found = list(kernel.events(trace))
    queued = total(halted, "csd_queued") - before["csd_queued"]
    names = names_of(trace)
    assert names["csd_queue_cpu"] == queued == 9
    assert names["csd_function_entry"] == names["csd_function_exit"] == 9
    assert names["ipi_send_cpumask"] == 1
    assert (
        names["call_function_single_entry"] == names["call_function_single_exit"] == 5
    )
    assert names["call_function_entry"] == 4
    assert names["reschedule_entry"] == names["reschedule_exit"] == 1
    first = next(event for event in found if event.name == "csd_queue_cpu")
    assert first.cpu == 4  # the host's number: the one after the last CPU's
    assert first.pid == os.getpid()
    assert first.fields["func"].name == "nothing"
    assert first.fields["callsite"].name.startswith("test_tracing.py:")
    assert first.fields["callsite"].name.endswith("<locals>.work)")
    mask = next(event for event in found if event.name == "ipi_send_cpumask")
    assert mask.fields["cpumask"] == 0b1111
    nudge = [e for e in found if e.name == "ipi_send_cpu"][-2]
    assert nudge.fields["cpu"] == 2
    assert not nudge.fields["callback"].address  # as smp_send_reschedule has it
    idle = [e.fields["state"] for e in found if e.name == "cpu_idle" and e.cpu == 1]
    assert set(idle) == {1, 4294967295}


def reschedules(target):
    smp.smp_send_reschedule(target)


def works(target):
    smp.irq_work_queue_on(smp.irq_work(nothing), target)


def calls_between(target):
    """A call, and what is no call, and its like from a handler."""
    for send in (reschedules, works):
        caller(target, 1)
        send(target)
    smp.smp_call_function_single(target, reschedules, 0)


def test_what_is_no_call_is_of_its_own_line_and_not_of_the_last_calls(halted):
    trace = recorded(halted, lambda: halted.run(calls_between, 3, cpus=[1]))
    sites = [
        (event.cpu, event.name, event.fields["callsite"].name.partition("(")[2])
        for event in kernel.events(trace)
        if event.name == "csd_queue_cpu"
        or (event.name == "ipi_send_cpu" and not event.fields["callback"].address)
    ]
    assert [site for site in sites if site[0] in (1, 3)] == [
        (1, "csd_queue_cpu", "caller)"),
        (1, "ipi_send_cpu", "reschedules)"),
        (1, "csd_queue_cpu", "caller)"),
        (1, "csd_queue_cpu", "works)"),
        (1, "csd_queue_cpu", "calls_between)"),
        (3, "ipi_send_cpu", "reschedules)"),
    ]


def test_our_own_import_reads_the_text_back_unchanged(halted, tmp_path):
    trace = recorded(halted, lambda: caller_from_host(halted, 40, asleep=True))
    lines = list(ftrace_lines(trace))
    read = ftrace.read_lines((line + "\n" for line in lines), "ours")
    found = list(kernel.events(trace))
    assert not read.warnings
    assert read.in_buffer == read.written == len(found)
    assert [
        (r.time_ns, r.cpu, r.task, r.pid, r.flags, r.event, r.text)
        for r in read.records
    ] == [
        (e.time_ns, e.cpu, e.task, e.pid, e.flags, e.name, kernel.text_of(e))
        for e in found
    ]
    traffic = matching.match(read).as_dict()
    assert traffic["queued"] == traffic["rung"] == traffic["run"] == 40
    assert traffic["unseen"] == traffic["entries_unmatched"] == 0
    assert traffic["ipi"]["call_function_single"]["entries_without_send"] == 0
    assert traffic["ipi"]["call_function_single"]["sent"] == 40
    # And a file of ours is read back as it was.
    trace.save(tmp_path / "it")
    again = load(tmp_path / "it")
    assert (again.records == trace.records).all()
    assert again.about == trace.about


def caller_from_host(cluster, calls, asleep=False):
    """Call each in turn; if `asleep`, when it is: a CPU that polls needs no IPI."""
    for n in range(calls):
        if asleep:
            at_rest(cluster)
        cluster.call(n % 4, nothing)


def test_what_needed_no_ipi_is_told_as_the_machine_counts_it():
    with Cluster(2, idle="poll") as cluster:
        counted = ("csd_queued", "elided", "coalesced")
        before = {name: total(cluster, name) for name in counted}
        trace = recorded(cluster, lambda: cluster.run(caller, 1, 300, cpus=[0]))
        after = {name: total(cluster, name) - before[name] for name in counted}
        names = names_of(trace)
        assert names["csd_queue_cpu"] == after["csd_queued"] >= 300
        assert names["sched_wake_idle_without_ipi"] == after["elided"] >= 250
        rows = timeline.summary(timeline.timeline(kernel.events(trace), trace.ncpus))[
            "calls"
        ]
        row = next(r for r in rows if r["function"] == "nothing")
        assert (row["from"], row["to"], row["queued"], row["run"]) == (0, 1, 300, 300)
        assert row["elided"] + row["rung"] + row["coalesced"] == 300
        assert sum(r["elided"] for r in rows) == after["elided"]
        assert sum(r["coalesced"] for r in rows) == after["coalesced"]


def test_it_is_switched_on_and_off_under_load_and_loses_nothing(halted):
    """With a reader; on a busy computer it comes seldom, so rings hold a while."""

    def some_calls():
        begun = total(halted, "csd_sync")
        while total(halted, "csd_sync") < begun + 40:
            time.sleep(0.01)

    work = halted.start(seldom_caller, 1, cpus=[0])
    try:
        some_calls()
        on_and_off(halted, some_calls)
    finally:
        work.cancel()
        work.wait()


def on_and_off(halted, some_calls):
    for _ in range(3):
        trace = recorded(halted, some_calls, records=1 << 16)
        names = names_of(trace)
        # Each CPU may be in the middle of one when it is switched on, and off.
        entries, exits = names["csd_function_entry"], names["csd_function_exit"]
        assert entries > 10
        assert abs(entries - exits) <= 4
        assert abs(names["csd_queue_cpu"] - entries) <= 4
        assert not halted.tracing.on
        halted.smp.on_each_cpu(nothing)  # who saw it on has recorded by now
        before = [count.recorded for count in halted.tracing.counts()]
        time.sleep(0.02)
        assert [count.recorded for count in halted.tracing.counts()] == before


def test_a_full_ring_counts_what_it_has_not(halted):
    for lossless in (True, False):
        at_rest(halted)
        halted.tracing.start(64, lossless=lossless, events=["csd_unlock"])
        # What was there before counts for nobody.
        with (
            pytest.raises(ClusterStateError),
            halted.tracing.recorder(),
            halted.tracing.recorder(),
        ):
            pass
        recorder = halted.tracing.recorder()
        caller_from_host(halted, 4 * 500)
        at_rest(halted)
        halted.tracing.stop()
        trace = recorder.finish()
        assert len(trace.records) == 4 * 64
        assert trace.lost == {cpu: 500 - 64 for cpu in range(4)}
        assert not trace.torn
        assert set(trace.records["event"]) == {TraceEvent.csd_unlock}
        halted.tracing.start(128)  # others: these are at their begin
        halted.tracing.stop()


def caller_until_killed(target, calls):
    caller(target, calls)
    time.sleep(60)


def test_a_cpu_that_is_killed_leaves_a_trace_that_can_be_read(eventually):
    with Cluster(3, idle="halt") as cluster:
        cluster.tracing.start(1 << 16, lossless=True)
        with cluster.tracing.recorder() as recorder:
            # No more than the rings hold: their reader may not come for a while.
            work = cluster.start(caller_until_killed, 0, 3000, cpus=[1])
            eventually(lambda: total(cluster, "csd_sync") > 500)
            os.kill(cluster.cpus[1].pid, signal.SIGKILL)
            with pytest.raises(CpuDiedError):
                work.results()
            cluster.online(1)
            cluster.call(1, nothing)
            cluster.tracing.stop()
        trace = recorder.trace
        # Nothing is missing but a record that it was in the middle of.
        assert trace.lost == trace.torn
        assert sum(trace.torn.values()) <= 1
        found = list(kernel.events(trace))
        last = max(i for i, e in enumerate(found) if e.name == "cpuhp_enter")
        steps = [e.fields["fun"].name for e in found if e.name == "cpuhp_enter"]
        assert steps == ["cpuhp_report_idle_dead", "bringup_cpu"]
        assert any(e.cpu == 1 and e.name == "csd_function_exit" for e in found[last:])
        made = timeline.timeline(found, trace.ncpus)
        assert all(span.end_ns >= span.start_ns for span in made.spans)


ELSEWHERE = """
import sys, time
from shmipi import Cluster
from shmipi.trace import kernel
with Cluster.attach(sys.argv[1]) as cluster:
    cluster.tracing.start(1 << 12, lossless=True)
    with cluster.tracing.recorder() as recorder:
        print("go", flush=True)
        sys.stdin.readline()
        cluster.call(2, int)
        cluster.tracing.stop()
    assert recorder.trace.complete
    names = [(e.task, e.name) for e in kernel.events(recorder.trace)]
    print(*(names.count((who, "csd_queue_cpu")) for who in ("host", "guest")))
"""


def test_another_process_traces_a_machine(halted):
    with subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, halted.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        caller_from_host(halted, 12)
        out, _ = process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert out.split() == ["12", "1"]


def test_a_recorder_that_dies_leaves_the_machine_as_it_is(halted):
    text = ELSEWHERE.replace('print("go"', "import os; os.kill(os.getpid(), 9)\n#")
    done = subprocess.run([sys.executable, "-c", text, halted.name], timeout=30)
    assert done.returncode == -signal.SIGKILL
    caller_from_host(halted, 4 * 2000)  # its rings are full, and nobody reads them
    assert halted.tracing.on
    deadline = time.monotonic() + 5
    while True:
        try:
            trace = recorded(halted, lambda: caller_from_host(halted, 8))
            break
        except ClusterStateError:  # the firmware does not know yet that it is gone
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert names_of(trace)["csd_queue_cpu"] == 8


def test_who_records_is_not_disturbed_by_others(halted, tmp_path, capfd):
    halted.tracing.start(1 << 12, lossless=True)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    were = [signal.getsignal(number) for number in numbers]
    record = ["record", "-o", str(tmp_path / "x"), "--duration", "10ms"]
    try:
        with halted.tracing.recorder() as recorder:
            for begin in (["start"], record):
                others = [*begin, halted.name, "--events", "all", "--records"]
                assert cli.main(["trace", *others, "64"]) == 1
                assert "recorded already, in rings of 4096" in capfd.readouterr().err
            assert cli.main(["trace", *others, "4k"]) == 1
            assert "records this machine already" in capfd.readouterr().err
            assert set(halted.tracing.events) == {event.name for event in KERNEL_EVENTS}
            assert halted.tracing.size == 1 << 12
            caller_from_host(halted, 40)
    finally:
        for number, handler in zip(numbers, were, strict=True):
            signal.signal(number, handler)
    assert recorder.trace.complete
    assert names_of(recorder.trace)["csd_queue_cpu"] == 40


def test_from_the_boot_on_and_what_is_refused(eventually):
    with Cluster(2, trace=100) as cluster:
        assert cluster.tracing.on
        assert cluster.tracing.size == 128

        def online():
            found = cluster.trace_events()
            return sorted(found["cpu"][found["event"] == TraceEvent.cpu_online])

        # A CPU is online for others before it has recorded that it is.
        eventually(lambda: online() == [0, 1])
        for bad in (1, 1 << 25):
            with pytest.raises(ValueError, match="2 to"):
                cluster.tracing.start(bad)
        with pytest.raises(TypeError):
            cluster.tracing.start("many")  # type: ignore[arg-type]
        for events in ("none", "nonsense", []):
            with pytest.raises(ValueError, match="event"):
                cluster.tracing.start(events=events)
        cluster.tracing.start(events="csd_queue_cpu,rung")
        assert cluster.tracing.events == ("csd_queue_cpu", "rung")
        cluster.tracing.start(events=["ipi_send_cpumask"])
        assert cluster.tracing.events == ("ipi_send_cpumask", "cpumask")  # it has both
        cluster.tracing.start()
        assert set(cluster.tracing.events) == {event.name for event in KERNEL_EVENTS}
        assert cluster.tracing.size == 128  # as they were
    for bad in (1, -5):
        with pytest.raises(ValueError, match="2 to"):
            Cluster(2, trace=bad)


def test_the_bench_says_what_it_costs(tmp_path):
    file = tmp_path / "trace.json"
    arguments = ["--calls", "2000", "--blocks", "5", "--json", str(file)]
    assert cli.main(["bench", "trace", *arguments]) == 0
    found = json.loads(file.read_text())
    rows = {(row["what"], row["tracing"]): row["ns"] for row in found["rows"]}
    assert rows["event", "off"] < rows["event", "on"]
    assert rows["event", "on, lossless"] > 0
    assert rows["call", "off"] > 0
    assert rows["call", "on"] > 0
    assert found["stamp_ns"] > 0
