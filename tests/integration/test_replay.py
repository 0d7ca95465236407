"""``shmipi replay``: a kernel's IPIs on a machine of as many CPUs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shmipi import CpuDiedError, _core, cli
from shmipi.trace import ftrace, matching, replay
from shmipi.trace.script import How, Op, Policy, write

DATA = Path(__file__).resolve().parents[1] / "data"
EXPECTED = json.loads((DATA / "traces.json").read_text())
HACKBENCH = str(DATA / "hackbench.ftrace.xz")
CALLING = "generic_smp_call_function_single_interrupt+0x0/0x10"


def event(cpu, at, text, task="a-1"):
    return f" {task} [{cpu:03}] d..1. 1.{at:06}: {text}\n"


def queue(cpu, at, to, csd, func="flush_tlb_func"):
    return event(cpu, at, f"csd_queue_cpu: cpu={to} callsite=x func={func} csd={csd:x}")


def ring(cpu, at, to, callback=CALLING):
    return event(cpu, at, f"ipi_send_cpu: cpu={to} callsite=x callback={callback}")


def run(cpu, at, csd, func, task="<idle>-0", us=4):
    return [
        event(cpu, at, "call_function_single_entry: vector=251", task),
        event(cpu, at, f"csd_function_entry: func={func}, csd={csd:x}", task),
        event(cpu, at + us, f"csd_function_exit: func={func}, csd={csd:x}", task),
        event(cpu, at + us, "call_function_single_exit: vector=251", task),
    ]


def four_cpus():
    """Everything: one to one, one to many, wake-ups, reschedules, a long function."""
    lines = []
    for step in range(5):
        at = 1000 + step * 4000
        lines += [queue(0, at, 1, 10), ring(0, at, 1), *run(1, at + 20, 10, "f", us=50)]
        lines += [queue(3, at + 200, 2, 20, "sched_ttwu_pending"), ring(3, at + 200, 2)]
        lines += [queue(3, at + 203, 2, 21, "sched_ttwu_pending")]
        lines += run(2, at + 220, 20, "sched_ttwu_pending", us=30)
        lines += [ring(1, at + 400, 3, "0x0")]
        lines += [event(3, at + 420, "reschedule_entry: vector=253", "b-2")]
        lines += [event(3, at + 421, "reschedule_exit: vector=253", "b-2")]
        lines += [queue(2, at + 600, cpu, 30 + cpu) for cpu in (3, 0)]
        lines += [
            event(
                2,
                at + 600,
                f"ipi_send_cpumask: cpumask=9 callsite=x callback={CALLING}",
            )
        ]
        for cpu in (0, 3):
            lines += run(cpu, at + 620, 30 + cpu, "flush_tlb_func")
    return lines


def script_of(lines, **options):
    trace = ftrace.read_lines(lines, "trace")
    return write(trace, matching.match(trace), **options)


def long_script():
    """Two sends, half a minute apart: who waits for the second can be killed."""
    return [
        *(queue(0, 0, 1, 10), ring(0, 0, 1), *run(1, 20, 10, "flush_tlb_func")),
        ring(0, 60, 1, "0x0").replace(" 1.", " 31."),
        event(1, 70, "reschedule_entry: vector=253").replace(" 1.", " 31."),
    ]


@pytest.mark.parametrize(
    ("controller", "doorbell"),
    [
        ("apic", "futex"),
        ("xive", "signal"),
        ("mips", "eventfd"),
        ("gicv3", "mqueue"),
        ("riscv", "sem"),
        ("mips-gic", "pipe"),
    ],
)
def test_every_call_arrives_on_each_controller_and_doorbell(boot, controller, doorbell):
    script = script_of(four_cpus())
    cluster = boot(4, idle="halt", controller=controller, doorbell=doorbell)
    played, refused = replay.on(cluster, script, timeout=30)
    assert len(refused) == 4
    calls = played.calls
    for number, op in enumerate(script.ops):
        call = calls[number]
        assert call["queued"] > 0
        assert call["due"] >= played.start_ns > 0
        if op != Op.RESCHED:
            assert call["queued"] < call["entered"]
            took = _core.stamp_to_mono(int(call["left"])) - _core.stamp_to_mono(
                int(call["entered"])
            )
            assert took >= int(call["burn_ns"]) - 2
    # A list of wake-ups is one run, however many were in it.
    wakes = [
        n for n, op in enumerate(script.ops) if op == Op.CALL and calls[n]["cpu"] == 2
    ]
    assert len(wakes) == 10
    batches = {int(calls[n]["entered"]) for n in wakes}
    assert len(batches) < 10
    # A function that is waited for has ended before its sender goes on.
    waited = [n for n, op in enumerate(script.ops) if op == Op.MANY]
    assert all(int(calls[n]["left"]) < int(calls[n + 2]["queued"]) for n in waited[:-2])
    single = "call_function" if controller not in ("apic",) else "call_function_single"
    found = replay.measured(script, played, single)
    assert found["queued"] == 25
    assert found["rung"] + found["coalesced"] + found["elided"] == found["queued"]
    assert found["queue_to_function_us"]["count"] == found["run"]
    assert found["run"] + found["unseen"] == found["queued"]
    assert found["ipi"]["reschedule"]["sent"] == 5
    assert all(not each["entries_without_send"] for each in found["ipi"].values())
    # The same machine again, otherwise: nothing of the first is left.
    again, _ = replay.on(cluster, script, pace="causal", timeout=30)
    assert again.start_ns > played.start_ns
    assert (again.calls["queued"] > played.calls["queued"]).all()
    quick, _ = replay.on(cluster, script, pace="asap", timeout=30)
    assert not quick.calls["due"].any()
    assert replay.late(quick, script)["on_time"] is None
    assert (quick.calls["how"] != How.UNSENT).all()


@pytest.mark.alone  # its CPUs have their cores for themselves (SCHED_FIFO)
def test_the_command_says_what_was_measured(capsys):
    assert cli.main(["replay", HACKBENCH, "--json", "-"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    expected = EXPECTED["hackbench"]
    assert told["schema"] == "shmipi.replay/1"
    assert told["events"] == expected["events"]
    for side in ("kernel", "replay"):
        found = told[side]
        assert found["queued"] == 108
        assert found["rung"] + found["coalesced"] + found["elided"] == 108
        assert found["entries_local"] == 510
        assert found["queue_to_function_us"]["count"] == 108 - found["unseen"]
        assert found["ipi"]["reschedule"]["sent"] == 257
        assert found["ipi"]["call_function_single"]["sent"] == found["rung"]
        for each in (
            found["queue_to_function_us"],
            found["ipi"]["reschedule"]["send_to_entry_us"],
        ):
            assert 0 < each["p50"] <= each["p99"] <= each["max"] <= each["sum"]
    assert told["kernel"]["rung"] == 98
    assert told["kernel"]["queue_to_function_us"] == expected["queue_to_function_us"]
    # Real stamps are not those of the trace.
    assert told["replay"]["queue_to_function_us"]["sum"] != 1852.0
    assert (
        0 <= told["late_us"]["p50"] <= told["late_us"]["p99"] <= told["late_us"]["max"]
    )
    assert told["valid"] is (told["on_time"] >= 0.95 and not told["why"])


@pytest.mark.alone  # its CPUs have their cores for themselves (SCHED_FIFO)
def test_a_policy_is_replayed_beside_it(capsys):
    args = ["replay", str(DATA / "gcc.ftrace.xz"), "--what-if", "lazy-resched"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    # Above the table stands what a busy computer made late.
    lines = [line.split() for line in text.splitlines()]
    assert ["kernel", "replay", "lazy-resched"] in lines
    assert "IPIs become" in text
    # 19 of 21 went to a CPU that ran something; its flag is set, and nobody is sent to.
    (row,) = [line.split() for line in text.splitlines() if "reschedule sent  " in line]
    assert row[-3:] == ["21", "21", "2"]


@pytest.mark.alone  # its CPUs have their cores for themselves (SCHED_FIFO)
def test_a_batch_comes_by_one_interrupt(boot):
    lines = []
    for number in range(8):
        csd, at = 16 + number, 1000 + 20 * number
        lines += [queue(0, at, 1, csd, "sched_ttwu_pending"), ring(0, at, 1)]
        lines += run(1, at + 5, csd, "sched_ttwu_pending")
    script = script_of(lines, policy=Policy(batch=8))
    cluster = boot(2, idle="halt")
    for _ in range(10):
        played, _ = replay.on(cluster, script, timeout=30)
        found = replay.measured(script, played, "call_function_single")
        assert found["run"] + found["unseen"] == 8
        assert found["rung"] <= 2
        if (found["rung"], found["coalesced"]) == (1, 7):
            break
        # One push at a time: a target that is awake may take some before the others
        # come, as it is where their sender loses its core among them.
    assert (found["rung"], found["coalesced"]) == (1, 7)
    assert len({int(call["entered"]) for call in played.calls}) == 1
    # They waited from when they were to be queued: the first for the last.
    times = found["queue_to_function_us"]["max"], found["unseen_us"]["max"]
    assert max(us for us in times if us is not None) > 140


@pytest.mark.alone  # its CPUs have their cores for themselves (SCHED_FIFO)
def test_haltpoll_polls_for_what_comes_soon_and_halts_for_the_rest(boot):
    """Its window grows where halts are short: what comes then finds the CPU polling."""
    lines = []
    times = [60 * number for number in range(300)]  # us
    times += [20_000 + 5000 * number for number in range(10)]
    for number, at in enumerate(times):
        csd = 16 + number % 2
        lines += [queue(0, at, 1, csd, "f"), ring(0, at, 1), *run(1, at + 20, csd, "f")]
    cluster = boot(2, idle="halt")

    def elided(idle):
        script = script_of(lines, idle=idle)
        for _ in range(10):
            played, _ = replay.on(cluster, script, timeout=30)
            ends = [_core.stamp_to_mono(int(call["left"])) for call in played.calls]
            late = [e - int(c["due"]) for e, c in zip(ends, played.calls, strict=True)]
            if max(late) < 2_000_000:  # ns: neither side was kept from its core
                break
        found = [How(int(call["how"])) == How.ELIDED for call in played.calls]
        return sum(found[:300]), sum(found[300:])

    soon, late = elided("haltpoll")
    assert soon > 100 + elided("halt")[0]
    assert late < 5


def test_who_waits_for_the_others_leaves_its_core_to_them(boot, background, eventually):
    """It sleeps until all have come, and only then has its core for itself."""
    lines = [queue(0, 1000, 1, 10), ring(0, 1000, 1), *run(1, 1020, 10, "f")]
    cluster = boot(2, idle="halt")
    first, late = (cpu.pid for cpu in cluster.cpus)
    os.kill(late, signal.SIGSTOP)
    try:
        plays = background(lambda: replay.on(cluster, script_of(lines), timeout=30))
        eventually(lambda: cluster.cpus[0].task and cluster.cpus[0].state == "halted")
        assert os.sched_getscheduler(first) == os.SCHED_OTHER
    finally:
        os.kill(late, signal.SIGCONT)
    plays.end(30)


def test_a_killed_cpu_ends_the_replay(boot, eventually):
    script = script_of(long_script())
    cluster = boot(2, idle="halt")
    failed = []

    def play():
        try:
            replay.on(cluster, script, fifo=False)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=play)
    thread.start()
    eventually(lambda: cluster._machine.slot(1).task and cluster._machine.slot(0).task)
    time.sleep(0.1)
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    thread.join(20)
    assert isinstance(failed[0], CpuDiedError), failed
    eventually(lambda: not cluster._machine.slot(0).task)  # the other gives up


@pytest.mark.alone  # its CPUs have their cores for themselves (SCHED_FIFO)
def test_ctrl_c_ends_a_replay_and_leaves_nothing(tmp_path):
    path = tmp_path / "long"
    path.write_text("".join(long_script()))
    program = subprocess.Popen(
        [sys.executable, "-m", "shmipi", "replay", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 15
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.0)
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=20)
    assert program.returncode == 130
    assert said == "shmipi replay: interrupted\n"


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["/nonexistent"], 2, "No such file"),
        (["FOREIGN"], 1, ":1: this is no line of a kernel's trace"),
        (["NOTHING"], 1, "there is no IPI in it to replay"),
        (["MANY"], 1, "is of 5000 CPUs: a machine has 4096 at most"),
        ([HACKBENCH, "--speed", "0"], 2, "is no speed: give more than 0"),
        ([HACKBENCH, "--speed", "-1"], 2, "is no speed: give more than 0"),
        ([HACKBENCH, "--speed", "nan"], 2, "is no speed: give more than 0"),
        ([HACKBENCH, "--what-if", "magic"], 2, "is no policy: lazy-resched, batch=N"),
        ([HACKBENCH, "--what-if", "batch=1"], 2, "a batch is of 2 to 32 calls"),
        ([HACKBENCH, "--what-if", "batch=0"], 2, "a batch is of 2 to 32 calls"),
        ([HACKBENCH, "--what-if", "batch=x"], 2, "no number of calls"),
        ([HACKBENCH, "--what-if", "isolate=7"], 2, "the trace has no CPU 7"),
        ([HACKBENCH, "--what-if", "isolate=0-1"], 2, "no CPU is left"),
        ([HACKBENCH, "--what-if", "controller=z80"], 2, "is not one of"),
    ],
)
def test_what_cannot_be_replayed(args, status, said, tmp_path, capsys):
    files = {
        "FOREIGN": "root:x:0:0:root:/root:/bin/bash\n",
        "NOTHING": event(0, 1, "sched_waking: comm=c pid=3 prio=120 target_cpu=000"),
        "MANY": event(4999, 1, "ipi_send_cpu: cpu=0 callsite=x callback=0x0"),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = [str(tmp_path / arg) if arg in files else arg for arg in args]
    assert cli.main(["replay", *told]) == status
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_what_a_trace_lacks_is_said(tmp_path, capsys):
    path = tmp_path / "lost"
    lines = [*four_cpus(), "CPU:1 [LOST 12 EVENTS]\n"]
    path.write_text("".join(lines))
    assert cli.main(["replay", str(path), "--no-fifo", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["warnings"] == ["12 events were lost while it was recorded"]
    assert told["scheduler"]["policy"] == "SCHED_OTHER"
    assert 0 < told["scheduler"]["busy_s"] < 5
    assert told["scheduler"]["preempted"] >= 0
