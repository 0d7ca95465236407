"""`shmipi explain`: one real call, and the names of what it passed."""

import argparse
import itertools
import json

import numpy as np
import pytest

from shmipi import _core, names
from shmipi.cli import explain, main
from shmipi.trace import chains

CONTROLLERS = names.CONTROLLERS

#: The call chains of the texts that the project comes from: x86, powerpc, mips.
SENT = {
    ("apic", "single"): [
        "smp_call_function_single",
        "generic_exec_single",
        "__smp_call_single_queue",
        "llist_add",
        "__apic_send_IPI",
    ],
    ("xive", "single"): [
        "smp_call_function_single",
        "generic_exec_single",
        "__smp_call_single_queue",
        "send_call_function_single_ipi",
        "arch_send_call_function_single_ipi",
        "do_message_pass",
        "smp_muxed_ipi_message_pass",
        "smp_muxed_ipi_set_message",
        "smp_ops->cause_ipi",
        "xive_cause_ipi",
    ],
    ("mips", "single"): [
        "smp_call_function_single",
        "generic_exec_single",
        "arch_send_call_function_single_ipi",
        "mp_ops->send_ipi_mask",
    ],
    ("mips", "many"): [
        "smp_call_function_many",
        "arch_send_call_function_ipi_mask",
        "mp_ops->send_ipi_mask",
    ],
    ("mips", "resched"): ["smp_send_reschedule", "mp_ops->send_ipi_single"],
}
RECEIVED = {
    ("apic", "single"): [
        "sysvec_call_function_single",
        "apic_eoi",
        "generic_smp_call_function_single_interrupt",
        "__flush_smp_call_function_queue",
        "csd_do_func",
    ],
    ("xive", "single"): [
        "xive_muxed_ipi_action",
        "smp_ipi_demux",
        "smp_ipi_demux_relaxed",
        "generic_smp_call_function_interrupt",
        "__flush_smp_call_function_queue",
        "csd_do_func",
    ],
    ("mips", "single"): [
        "mailbox_interrupt",
        "generic_smp_call_function_interrupt",
        "__flush_smp_call_function_queue",
    ],
    ("mips", "many"): [
        "mailbox_interrupt",
        "generic_smp_call_function_interrupt",
        "__flush_smp_call_function_queue",
    ],
    ("mips", "resched"): ["mailbox_interrupt", "scheduler_ipi"],
}
#: The arguments that the texts spell out.
SPELLED = {
    ("apic", "single"): ["__apic_send_IPI(1, CALL_FUNCTION_SINGLE_VECTOR)"],
    ("xive", "single"): [
        "do_message_pass(1, PPC_MSG_CALL_FUNCTION)",
        "__flush_smp_call_function_queue(true)",
    ],
    ("mips", "single"): [
        "mp_ops->send_ipi_mask(&cpumask_of_cpu(1), SMP_CALL_FUNCTION)"
    ],
    ("mips", "many"): ["mp_ops->send_ipi_mask(mask, SMP_CALL_FUNCTION)"],
    ("mips", "resched"): ["mp_ops->send_ipi_single(1, SMP_RESCHEDULE_YOURSELF)"],
}
#: The chip's own part, of the architectures that the texts leave out.
OTHERS = {
    "mips-gic": (["gic_send_ipi"], ["gic_handle_shared_int", "ipi_call_interrupt"]),
    "gicv2": (
        ["smp_cross_call", "gic_ipi_send_mask"],
        ["gic_handle_irq", "gic_eoi_irq"],
    ),
    "gicv3": (["gic_ipi_send_mask", "gic_send_sgi"], ["do_handle_IPI", "gic_eoi_irq"]),
    "riscv": (["ipi_mux_send_mask", "sbi_send_ipi"], ["ipi_mux_process", "handle_IPI"]),
    "loongarch": (
        ["loongson_send_ipi_single", "ipi_write_action"],
        ["loongson_ipi_interrupt", "ipi_read_clear"],
    ),
}


def document(capfd, *arguments):
    assert main(["explain", *arguments, "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["schema"] == "shmipi.explain/1"
    return found


def passed(found, cpu):
    return [
        name
        for step in found["steps"]
        if step["cpu"] == cpu
        for name in step["functions"]
    ]


def in_order(names, of):
    """Are these among ``of``, in this order?"""
    rest = iter(of)
    return all(name in rest for name in names)


def check_times(found):
    at = [step["at_ns"] for step in found["steps"]]
    assert at[0] == 0
    assert at == sorted(at)
    assert [step["stage_ns"] for step in found["steps"]] == [
        0,
        *(after - before for before, after in itertools.pairwise(at)),
    ]


# ---- every name of the texts ---------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "call"), SENT, ids=["-".join(key) for key in SENT]
)
def test_every_function_of_the_texts_is_passed(capfd, controller, call):
    """Proves rows 21 and 84."""
    found = document(capfd, "--controller", controller, "--call", call)
    assert in_order(SENT[controller, call], passed(found, 0))
    for cpu in found["targets"]:
        assert in_order(RECEIVED[controller, call], passed(found, cpu))
    assert found["not_passed"] == []
    calls = [call for step in found["steps"] for call in step["calls"]]
    for spelled in SPELLED[controller, call]:
        assert spelled in calls
    check_times(found)
    # What they are here: the doorbell, and the sleep that it ends.
    here = [step["here"] for step in found["steps"]]
    assert any("FUTEX_WAKE" in text for text in here)
    assert any("back from FUTEX_WAIT" in text for text in here)


@pytest.mark.parametrize("controller", OTHERS)
def test_the_other_architectures_have_theirs(capfd, controller):
    found = document(capfd, "--controller", controller)
    sent, received = OTHERS[controller]
    assert in_order(["generic_exec_single", "llist_add", *sent], passed(found, 0))
    assert in_order(received[:1], passed(found, 1))
    for name in (*received, "generic_smp_call_function_interrupt", "csd_do_func"):
        assert name in passed(found, 1)


def test_a_call_to_all_others_on_x86_is_one_register_write(capfd):
    """Proves row 15."""
    found = document(capfd, "--call", "many")
    names = passed(found, 0)
    assert "__apic_send_IPI_allbutself" in names
    assert "__apic_send_IPI" not in names
    assert names.count("llist_add") == 2
    for cpu in (1, 2):
        assert "sysvec_call_function" in passed(found, cpu)


@pytest.mark.parametrize(
    ("controller", "handler", "entry"),
    [
        ("apic", "native", "exc_nmi"),
        ("xive", "python", "smp_handle_nmi_ipi"),
        ("riscv", "native", "nmi_cpu_backtrace"),
    ],
)
def test_an_nmi(capfd, controller, handler, entry):
    found = document(
        capfd, "--controller", controller, "--call", "nmi", "--handler", handler
    )
    assert entry in passed(found, 1)
    assert found["handler"] == handler
    events = [step["tracepoint"] for step in found["steps"]]
    for event in ("nmi_send", "nmi_entry", "nmi_handler", "nmi_exit"):
        assert event in events


# ---- what did not happen -------------------------------------------------------------


@pytest.mark.parametrize("controller", ["apic", "xive"])
def test_a_polling_target_is_sent_nothing(capfd, controller):
    """Proves row 84."""
    found = document(capfd, "--controller", controller, "--state", "polling")
    assert in_order(
        ["llist_add", "call_function_single_prep_ipi", "set_nr_if_polling"],
        passed(found, 0),
    )
    assert in_order(
        ["flush_smp_call_function_queue", "__flush_smp_call_function_queue"],
        passed(found, 1),
    )
    assert found["spared"] == {"1": "elided"}
    words = " ".join(found["words"])
    assert "Elided: CPU 1 was polling" in words
    for name in RECEIVED[controller, "single"][:2]:
        assert name in found["not_passed"]
        assert name in words
        assert name not in passed(found, 1)
    assert "__flush_smp_call_function_queue" not in found["not_passed"]
    assert {step["tracepoint"] for step in found["steps"]}.isdisjoint(
        {"ipi_send_cpu", "rung", "ipi_entry"}
    )


def test_a_reschedule_of_a_polling_target_is_a_flag(capfd):
    found = document(capfd, "--call", "resched", "--state", "polling")
    assert passed(found, 0) == [
        "resched_cpu",
        "resched_curr",
        "__resched_curr",
        "set_nr_and_not_polling",
        "trace_sched_wake_idle_without_ipi",
    ]
    assert "native_smp_send_reschedule" in found["not_passed"]
    assert "need_resched" in passed(found, 1)
    assert "scheduler_ipi" in found["not_passed"]
    assert found["handler"] is None


def test_a_running_target_is_kicked(capfd):
    found = document(capfd, "--state", "running", "--handler", "python")
    here = [step["here"] for step in found["steps"]]
    assert any("rt_tgsigqueueinfo" in text for text in here)
    assert any("signal's handler" in text for text in here)
    assert found["not_passed"] == []
    events = [step["tracepoint"] for step in found["steps"] if step["cpu"] == 1]
    # A Python handler waits for the interpreter: the signal's handler has returned.
    assert events.index("irq_exit") < events.index("csd_function_entry")


def test_a_call_behind_another_is_coalesced(capfd):
    for _ in range(5):  # a sender that loses its core comes too late
        found = document(capfd, "--controller", "mips", "--coalesce")
        if found["spared"]:
            break
    assert found["spared"] == {"1": "coalesced"}
    assert "mp_ops->send_ipi_mask" in found["not_passed"]
    assert "Coalesced: the queue of CPU 1 was not empty" in " ".join(found["words"])
    assert passed(found, 1).count("csd_do_func") == 1  # the other's is left out


# ---- a name is printed for a record --------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    """``recorded(controller)``: the records of one call, and how to read them."""
    known = {}

    def record(controller):
        if controller not in known:
            parser = argparse.ArgumentParser()
            explain.prepare_parser(parser)
            args = parser.parse_args(["--controller", controller])
            with explain._boot(args) as cluster:
                records, _ = explain._record(cluster, args)
                lines = {
                    line.number: (line.name, line.use)
                    for line in cluster.chip.lines(cluster.ncpus)
                }
            known[controller] = (
                records,
                {
                    "controller": controller,
                    "call": "single",
                    "sender": 0,
                    "lines": lines,
                    "ncpus": 2,
                },
            )
        return known[controller]

    return record


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_without_its_record_a_name_is_gone(recorded, controller):
    records, how = recorded(controller)
    whole = chains.read(records, **how)
    events = {step.event for step in whole.steps}
    named = {step.event for step in whole.steps if step.calls}
    assert len(named) >= 9
    for event in events:
        number = _core.TRACE_EVENTS.index(event)
        less = chains.read(records[records["event"] != number], **how)
        gone = {
            name
            for step in whole.steps
            if step.event == event
            for name in step.functions
        }
        left = {
            name
            for step in whole.steps
            if step.event != event
            for name in step.functions
        }
        assert set(less.functions()) == left, event
        assert not (gone - left) & set(less.functions())
    assert chains.read(records[:0], **how).functions() == []


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_table_names_tracepoints_that_there_are(controller):
    assert set(chains.CHAINS) == set(CONTROLLERS)
    assert set(chains.CHAINS[controller]) == set(chains.CALLS)
    for chain in chains.CHAINS[controller].values():
        for stage in chain.stages:
            assert stage.event in _core.TRACE_EVENTS
            assert stage.functions
            for function in stage.functions:
                assert function.format(cpu=1, line="A LINE").strip()


def test_what_a_coalesced_line_says():
    """Records as the core writes them: a line that was pending already."""
    rows = [("ipi_send_cpu", 0, 1, 0xFB), ("line_kept", 0, 1, 0xFB), ("rung", 0, 1, 0)]
    records = np.zeros(
        len(rows),
        [
            (name, "u8")
            for name in ("slot", "stamp", "event", "cpu", "csd", "func", "arg")
        ],
    )
    for at, (event, slot, cpu, arg) in enumerate(rows):
        number = _core.TRACE_EVENTS.index(event)
        records[at] = (slot, 1000 + at, number, cpu, 0, 0, arg)
    found = chains.read(
        records,
        controller="apic",
        call="single",
        sender=0,
        lines={0xFB: ("A_VECTOR", "call_single")},
        ncpus=2,
    )
    assert found.steps[1].note == (
        "A_VECTOR needs no ring: it was pending already, or is masked"
    )
    assert any(words.startswith("A_VECTOR needs no ring") for words in found.words)
    assert any("Not rung: CPU 1 polls" in words for words in found.words)


# ---- for people, and bad arguments ---------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--state", "running", "--coalesce"]])
def test_what_was_taken_while_other_work_held_the_core_is_marked(capfd, more):
    assert main(["explain", *more, "--json", "-"]) == 0
    found = json.loads(capfd.readouterr().out)
    lost = {int(cpu) for cpu in found["held"]}
    assert lost <= {0, 1}
    for how in found["held"].values():
        assert how["preempted"] or how["waited_ns"] > 100_000 or how["stolen_s"]
    before = None
    for step in found["steps"]:
        near = step["cpu"] in lost or before in lost
        assert step["held"] == (near and step["stage_ns"] >= 1000)
        before = step["cpu"]


def test_the_text_is_for_people(capfd, tmp_path):
    target = tmp_path / "explain.json"
    assert main(["explain", "--doorbell", "sem", "--json", str(target)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert json.loads(target.read_text())["doorbell"] == "sem"
    lines = out.splitlines()
    assert "smp_call_function_single() from CPU 0 to CPU 1, halted" in lines[0]
    header = next(line for line in lines if "function in the kernel" in line)
    column = header.index("function in the kernel")
    assert any(
        line[column:].startswith("  generic_exec_single(1, csd)") for line in lines
    )
    assert any("doorbell of CPU 1: sem_post" in line for line in lines)
    assert "Nothing was elided" in lines[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--controller", "8259"],
        ["--call", "broadcast"],
        ["--state", "offline"],
        ["--handler", "rust"],
        ["--call", "resched", "--handler", "native"],
        ["--call", "many", "--coalesce"],
        ["--cores", "4095"],
        ["--json", "/nowhere/x.json"],
        ["extra"],
    ],
    ids=" ".join,
)
def test_nonsense_is_one_line_and_status_2(capfd, arguments):
    assert main(["explain", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("shmipi explain: ")
