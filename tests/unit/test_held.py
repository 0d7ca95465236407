"""Whether other work held a core, as the kernel counts it, and what explain marks."""

import io
import os
import time

import pytest

from shmipi.cli import explain
from shmipi.machine.held import Held, Look, held, look
from shmipi.machine.topology import usable_cores
from shmipi.trace.chains import Explained, Step


def spin_on(core):
    """Fork a process that keeps a core busy; return its pid."""
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        end = time.monotonic() + 20
        while time.monotonic() < end:
            pass
        os._exit(0)
    return pid


def test_a_process_that_shares_its_core_is_held():
    core = usable_cores()[0]
    pids = [spin_on(core), spin_on(core)]
    try:
        before = look(pids[0], core)
        end = time.monotonic() + 10
        while (
            True
        ):  # until both have had the core: at once, or on a busy computer later
            time.sleep(0.02)
            found = held(before, look(pids[0], core))
            if (found and found.preempted) or time.monotonic() > end:
                break
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    assert found is not None
    assert found.preempted >= 1
    assert "pushed off its core" in found.why


def test_what_is_counted(tmp_path):
    process = tmp_path / "77"
    process.mkdir()
    (process / "status").write_text(
        "voluntary_ctxt_switches:\t9\nnonvoluntary_ctxt_switches:\t3\n"
    )
    (process / "schedstat").write_text("1000 250000 12\n")
    (tmp_path / "stat").write_text("cpu  0\ncpu5 1 2 3 4 5 6 7 200 0 0\n")
    tick = os.sysconf("SC_CLK_TCK")
    assert look(77, 5, proc=tmp_path) == Look(3, 250_000, 200 / tick)
    # A kernel that counts none of it: nothing is known, and nothing is marked.
    assert look(78, 6, proc=tmp_path) == Look(0, 0, 0.0)


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (Look(5, 1000, 1.0), None),
        (Look(5, 101_000, 1.0), None),  # woke up: no other work's
        (Look(6, 1000, 1.0), "was pushed off its core once"),
        (Look(7, 1000, 1.0), "was pushed off its core 2 times"),
        (Look(5, 3_201_000, 1.0), "waited 3.2 ms for it"),
        (Look(5, 1000, 1.03), "lost it to the hypervisor for 30 ms"),
        (
            Look(6, 5_001_000, 1.0),
            "was pushed off its core once and waited 5.0 ms for it",
        ),
    ],
)
def test_the_signs(after, why):
    found = held(Look(5, 1000, 1.0), after)
    assert (found.why if found else None) == why


def step(cpu, stage_ns):
    return Step(0, stage_ns, cpu, 1, "csd_unlock", ("csd_unlock()",), "")


STEPS = [
    step(0, 0),
    step(0, 900),
    step(0, 1500),
    step(1, 30_000),
    step(1, 400),
    step(1, 2_000),
    step(0, 5_000),
]


@pytest.mark.parametrize(
    ("lost", "marks"),
    [
        ((), "......."),
        ((0,), "..**..*"),  # what follows what it did, too: and nothing that is short
        ((1,), "...*.**"),
        ((0, 1), "..**.**"),
        ((2,), "......."),
    ],
)
def test_figures_taken_while_other_work_held_the_core_are_marked(lost, marks):
    how = dict.fromkeys(lost, Held(1, 0, 0.0))
    assert explain._marked(STEPS, how) == [mark == "*" for mark in marks]
    found = explain._as_json(Explained(STEPS), how)
    assert [stage["held"] for stage in found["steps"]] == [
        mark == "*" for mark in marks
    ]
    assert list(found["held"]) == [str(cpu) for cpu in lost]


def test_marks_are_shown_and_explained(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(explain, "human_stream", lambda args: shown)
    about = {
        "function": "smp_call_function_single",
        "targets": [1],
        "state": "halted",
        "handler": "native",
        "controller": "apic",
        "description": "one",
        "cpus": [],
    }

    class Arguments:
        coalesce = False

    explain._print(about, Explained(STEPS), {1: Held(2, 0, 0.0)}, Arguments)
    text = shown.getvalue()
    assert "+30000 ns*" in text
    assert "+1500 ns " in text
    assert "* CPU 1 was pushed off its core 2 times: other work held it" in text
    shown.truncate(0)
    explain._print(about, Explained(STEPS[:2]), {1: Held(2, 0, 0.0)}, Arguments)
    assert "no stage was long enough" in shown.getvalue()
    shown.truncate(0)
    explain._print(about, Explained(STEPS), {}, Arguments)
    assert "*" not in shown.getvalue()
