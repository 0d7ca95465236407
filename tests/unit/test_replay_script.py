"""What a trace becomes to be replayed, and what is read from a replay's stamps."""

from __future__ import annotations

import lzma
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shmipi import _core
from shmipi.cli import replay as cli_replay
from shmipi.trace import ftrace, matching, replay
from shmipi.trace.script import CALL, ENTRY, HALTPOLL, How, Op, Policy, Script, write

DATA = Path(__file__).resolve().parents[1] / "data"
TRACES = ("hackbench", "python_import", "pingpong", "gcc")
CALLING = "generic_smp_call_function_single_interrupt+0x0/0x10"


def event(cpu: int, at: int, text: str, task: str = "a-1", flags: str = "d..1.") -> str:
    return f" {task} [{cpu:03}] {flags} 1.{at:06}: {text}\n"


def queue(cpu: int, at: int, to: int, csd: int, func: str = "flush_tlb_func") -> str:
    return event(cpu, at, f"csd_queue_cpu: cpu={to} callsite=x func={func} csd={csd:x}")


def ring(cpu: int, at: int, to: int, callback: str = CALLING) -> str:
    return event(cpu, at, f"ipi_send_cpu: cpu={to} callsite=x callback={callback}")


def run(cpu: int, at: int, csd: int, func: str, task: str = "<idle>-0") -> list[str]:
    """One interrupt of 10 us, and a function of 4 in it."""
    texts = [
        (0, "call_function_single_entry: vector=251"),
        (2, f"csd_function_entry: func={func}, csd={csd:x}"),
        (6, f"csd_function_exit: func={func}, csd={csd:x}"),
        (10, "call_function_single_exit: vector=251"),
    ]
    return [event(cpu, at + us, text, task, "d.h1.") for us, text in texts]


def local(cpu: int, at: int, func: str) -> list[str]:
    return [
        event(cpu, at, f"csd_function_entry: func={func}, csd=0"),
        event(cpu, at + 3, f"csd_function_exit: func={func}, csd=0"),
    ]


def script_of(lines: list[str], **options: Any) -> Script:
    trace = ftrace.read_lines(lines, "trace")
    return write(trace, matching.match(trace), **options)


def ops(script: Script, cpu: int) -> list[Op]:
    return [Op(int(step["op"])) for step in script.steps[cpu]]


@pytest.mark.parametrize("name", TRACES)
def test_all_that_was_sent_is_in_the_script(name: str) -> None:
    trace = ftrace.read(DATA / f"{name}.ftrace.xz")
    traffic = matching.match(trace)
    script = write(trace, traffic)
    done = Counter(Op(int(each)) for own in script.steps for each in own["op"])
    reschedules = sum(sent.vector == "reschedule" for sent in traffic.sent)
    assert done[Op.CALL] == len(traffic.queued)
    assert done[Op.RESCHED] == reschedules
    assert done[Op.LOCAL] == traffic.entries_local
    # An IPI whose queueing is not in the trace is sent all the same.
    calls = sum(sent.vector != "reschedule" for sent in traffic.sent)
    assert done[Op.RAISE] == calls - sum(q.how == "rung" for q in traffic.queued)
    for own in script.steps:
        assert (np.diff(own["at_ns"][own["op"] != Op.WAIT].astype("i8")) >= 0).all()


def test_twice_as_fast_is_half_the_time_for_the_same_functions() -> None:
    trace = ftrace.read(DATA / "gcc.ftrace.xz")
    traffic = matching.match(trace)
    script, fast = (write(trace, traffic, speed=speed) for speed in (1, 2))
    assert fast.duration_ns == pytest.approx(script.duration_ns / 2, abs=1000)
    assert (fast.calls["burn_ns"] == script.calls["burn_ns"]).all()


def test_a_cpu_waits_in_the_state_that_its_entries_show() -> None:
    lines = [
        *(queue(0, 100, 1, 10, "f"), ring(0, 100, 1), *run(1, 110, 10, "f")),
        *(queue(0, 200, 1, 10, "f"), ring(0, 200, 1)),
        *run(1, 210, 10, "f", "b-2"),
        queue(0, 300, 1, 10, "f"),  # no IPI: it polls
        *(queue(0, 400, 1, 10, "f"), ring(0, 400, 1), *run(1, 410, 10, "f")),
    ]
    waits = script_of(lines).steps[1]
    assert list(waits["op"]) == [Op.WAIT] * 4
    found = [int(state) for state in waits["state"]]
    assert found == [_core.HALTED, _core.RUNNING, _core.POLLING, _core.HALTED]
    # Each until the next is sent at most, and ended by its own call.
    assert list(waits["at_ns"][:3]) == [100_000, 200_000, 300_000]
    assert list(waits["call"]) == [0, 1, 2, 3]
    always = script_of(lines, idle="poll").steps[1]["state"]
    assert [int(state) for state in always] == [
        _core.POLLING,
        _core.RUNNING,
        _core.POLLING,
        _core.POLLING,
    ]
    policy = script_of(lines, idle="haltpoll").steps[1]["state"]
    assert list(policy) == [HALTPOLL, _core.RUNNING, HALTPOLL, HALTPOLL]


def test_the_own_part_of_a_call_runs_before_the_wait_for_the_others() -> None:
    lines = [
        *(queue(0, 100, 1, 10), ring(0, 101, 1), *local(0, 102, "flush_tlb_func")),
        *(*run(1, 110, 10, "flush_tlb_func"), *local(0, 130, "flush_tlb_func")),
    ]
    script = script_of(lines)
    assert ops(script, 0) == [Op.CALL, Op.LOCAL, Op.JOIN, Op.WAIT, Op.LOCAL]
    assert script.calls["burn_ns"].tolist() == [4000, 3000, 3000]
    assert int(script.steps[0][2]["over_ns"]) == 16_000  # the function's end, there


def test_one_ipi_to_several_is_one_call_to_many() -> None:
    lines = [
        *(queue(0, 100, 3, 10), queue(0, 100, 1, 11)),
        event(0, 101, f"ipi_send_cpumask: cpumask=a callsite=x callback={CALLING}"),
        *(*run(1, 110, 11, "flush_tlb_func"), *run(3, 112, 10, "flush_tlb_func")),
    ]
    script = script_of(lines)
    assert script.ncpus == 4
    assert ops(script, 0) == [Op.MANY, Op.JOIN]
    assert int(script.steps[0][0]["count"]) == 2
    assert script.calls["cpu"].tolist() == [1, 3]  # ascending, as the core has them
    assert [int(own["call"][0]) for own in (script.steps[1], script.steps[3])] == [0, 1]


def test_who_is_seen_to_go_on_does_not_wait() -> None:
    """The trace does not say who waits: what it shows decides, but for well-known."""
    wake = "sched_waking: comm=c pid=3 prio=120 target_cpu=000"

    def trace(func: str, went_on: bool) -> list[str]:
        lines = [queue(0, 100, 1, 10, func), ring(0, 101, 1)]
        lines += [event(0, 105, wake)] if went_on else []
        lines += run(1, 110, 10, func)
        return [*lines, event(0, 130, wake)]

    assert script_of(trace("f", went_on=False)).waited == {"f": True}
    assert script_of(trace("f", went_on=True)).waited == {"f": False}
    assert script_of(trace("nohz_csd_func", went_on=False)).waited["nohz_csd_func"] is (
        False
    )
    assert script_of(trace("flush_tlb_func", went_on=True)).waited["flush_tlb_func"]


# ---- policies ------------------------------------------------------------------------


def test_lazy_reschedules_spare_running_cpus_only() -> None:
    lines = [
        ring(0, 100, 1, "0x0"),
        event(1, 110, "reschedule_entry: vector=253", "b-2", "d.h1."),
        event(1, 111, "reschedule_exit: vector=253", "b-2", "d.h1."),
        ring(0, 200, 1, "0x0"),
        event(1, 210, "reschedule_entry: vector=253", "<idle>-0", "d.h1."),
        event(1, 211, "reschedule_exit: vector=253", "<idle>-0", "d.h1."),
    ]
    script = script_of(lines, policy=Policy(lazy_resched=True))
    assert [op for op in ops(script, 0) if op != Op.WAIT] == [Op.LAZY, Op.RESCHED]
    assert script.spared == 1
    assert ops(script, 1) == [Op.WAIT]


def wakes(cpu: int, to: int, first: int, n: int, gap: int) -> list[str]:
    ttwu = "sched_ttwu_pending"
    lines = []
    for number in range(n):
        at = first + number * gap
        lines += [queue(cpu, at, to, 16 + number, ttwu), ring(cpu, at + 1, to)]
        lines += run(to, at + 5, 16 + number, ttwu)
    return lines


def test_a_batch_is_one_ipi_and_held_for_a_millisecond_at_most() -> None:
    near = script_of(wakes(0, 1, 100, 6, 20), policy=Policy(batch=4))
    batches = near.steps[0][near.steps[0]["op"] == Op.BATCH]
    assert batches["count"].tolist() == [4, 2]
    assert int(batches["at_ns"][0]) == 60_000  # when the fourth came
    assert int(batches["call"][1]) == 4
    assert near.wanted == [0, 20_000, 40_000, 60_000, 80_000, 100_000]
    assert ops(near, 1) == [Op.WAIT] * 2
    far = script_of(wakes(0, 1, 100, 3, 3000), policy=Policy(batch=4))
    batches = far.steps[0][far.steps[0]["op"] == Op.BATCH]
    assert batches["count"].tolist() == [1, 1, 1]
    assert batches["at_ns"].tolist()[:2] == [1_000_000, 4_000_000]


def test_no_ipi_goes_to_an_isolated_cpu() -> None:
    lines = [
        *(queue(0, 100, 1, 10), ring(0, 101, 1), *run(1, 110, 10, "flush_tlb_func")),
        *wakes(0, 1, 200, 1, 0),
        ring(0, 300, 1, "0x0"),
        *local(1, 500, "g"),
    ]
    script = script_of(lines, policy=Policy(isolate=frozenset({1})))
    # The wake-up is of a task that runs on CPU 0 then; the reschedule has no task.
    assert [op for op in ops(script, 0) if op != Op.WAIT] == [Op.LOCAL]
    # The flush runs when CPU 1 does something by itself, before that.
    own = script.steps[1]
    assert [op for op in ops(script, 1) if op != Op.WAIT] == [Op.LOCAL, Op.LOCAL]
    first = own[own["op"] == Op.LOCAL][0]
    assert int(first["at_ns"]) == 400_000
    assert script.wanted[int(first["call"])] == 0
    assert script.spared == 3


@pytest.mark.parametrize(
    "options", [{"speed": 0}, {"speed": -1}, {"speed": math.nan}, {"idle": "sleep"}]
)
def test_what_no_script_can_be_of(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is above 0|does one of"):
        script_of(wakes(0, 1, 100, 1, 0), **options)


def test_policies_that_are_none() -> None:
    for batch in (-1, 1, 33):
        with pytest.raises(ValueError, match="2 to 32"):
            Policy(batch=batch)
    with pytest.raises(ValueError, match="no CPU is left"):
        script_of(wakes(0, 1, 1, 1, 0), policy=Policy(isolate=frozenset({0, 1})))


# ---- what is read from the stamps ----------------------------------------------------


def test_an_ipi_that_is_sent_while_one_is_pending_is_one_with_it() -> None:
    lines = [ring(0, at, 1, "0x0") for at in (100, 101, 140)]
    script = script_of(lines)
    calls = script.calls.copy()
    calls["how"] = How.RUNG
    calls["queued"] = [100_000, 102_000, 140_000]
    log = np.zeros(2, ENTRY)
    log["entered"], log["left"] = [120_000, 150_000], [121_000, 151_000]
    log["use"] = _core.USE_RESCHEDULE
    played = replay.Played(calls, [np.zeros(0, ENTRY), log], 0, [0, 0], [0, 0], 1)
    vector = replay.measured(script, played, "call_function_single")["ipi"][
        "reschedule"
    ]
    assert (vector["sent"], vector["entered"]) == (3, 2)
    assert vector["entries_without_send"] == 0
    assert vector["send_to_entry_us"]["count"] == 2
    scale = _core.stamp_to_mono(1_000_000) - _core.stamp_to_mono(0)
    assert vector["send_to_entry_us"]["max"] == pytest.approx(0.02 * scale / 1000, 0.1)


def test_what_keeps_fifo_from_all_of_a_core_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that spins longer than sched_rt_runtime_us is stopped for the rest."""
    texts = {"rt_runtime_us": "950000\n", "rt_period_us": "1000000\n"}

    def read(path: Path, *_: Any) -> str:
        return texts[path.name.removeprefix("sched_")]

    monkeypatch.setattr(Path, "read_text", read)

    def said(*ran: replay.Ran) -> list[str]:
        scheduler = cli_replay._scheduler(list(ran))
        assert scheduler["rt_runtime_us"] == int(texts["rt_runtime_us"])
        assert scheduler["busy_s"] == max(own.busy_s for own in ran)
        return cli_replay._throttled(scheduler)

    spun, slept = replay.Ran("", 2.5, 2), replay.Ran("", 0.9, 1)
    (text,) = said(slept, spun)
    assert text.startswith("a CPU was busy for 2.50 s, and CPUs were stopped 3 times")
    assert "of each 1 s the kernel lets SCHED_FIFO have 0.95" in text
    assert said(slept, slept) == []
    assert said(replay.Ran("", 2.5, 0)) == []  # nobody wanted the core
    assert said(replay.Ran("not asked for", 2.5, 9)) == []
    texts["rt_runtime_us"] = "-1\n"
    assert said(spun) == []


def test_the_scripts_of_damaged_traces_end_as_they_do() -> None:
    with lzma.open(DATA / "gcc.ftrace.xz", "rt") as file:
        lines = file.read().splitlines(keepends=True)
    script = script_of(lines[:700])
    assert any(
        "the file was cut" in w for w in ftrace.read_lines(lines[:700], "x").warnings
    )
    assert 0 < sum(map(len, script.steps)) < 2000
    assert script.calls.dtype == CALL
