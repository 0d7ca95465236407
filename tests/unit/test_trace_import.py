"""A kernel's traces, read and matched.

``tests/data`` has four, recorded from Linux 6.18 on two virtual CPUs, and what another
program, written without knowledge of this one, found in them.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from shmipi import cli
from shmipi.errors import TraceFormatError
from shmipi.trace import ftrace, matching

DATA = Path(__file__).resolve().parents[1] / "data"
EXPECTED = json.loads((DATA / "traces.json").read_text())


def text_of(name: str) -> list[str]:
    with lzma.open(DATA / f"{name}.ftrace.xz", "rt") as file:
        return file.read().splitlines(keepends=True)


def found(lines: list[str]) -> dict[str, Any]:
    return matching.match(ftrace.read_lines(lines, "trace")).as_dict()


@pytest.mark.parametrize("name", EXPECTED)
def test_agrees_with_an_independent_account(name: str) -> None:
    trace = ftrace.read(DATA / f"{name}.ftrace.xz")
    expected = EXPECTED[name]
    assert trace.lines == expected["lines"]
    assert trace.events == expected["events"]
    told = matching.match(trace).as_dict()
    del told["function_run_us"]["p99"]
    told["how"] = {n: told[n] for n in ("rung", "coalesced", "elided") if told[n]}
    told["state"] = {n: told[n] for n in ("run", "unseen") if told[n]}
    keys = expected.keys() - {"lines", "events"}
    assert {key: told[key] for key in keys} == {key: expected[key] for key in keys}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_line_is_accounted_for(name: str) -> None:
    trace = ftrace.read(DATA / f"{name}.ftrace.xz")
    counted = trace.comments + trace.blank + trace.lost_lines + trace.other
    assert counted + len(trace.records) == trace.lines
    assert len(trace.records) == sum(trace.events.values()) == trace.in_buffer


def without_flags(line: str) -> str:
    return re.sub(r"(\[\d+\]) \S{5} ", r"\1 ", line)


def with_tgid(line: str) -> str:
    return re.sub(r"(-\d+ +)(\[\d+\])", r"\1(  77) \2", line)


def latency_format(line: str) -> str:
    return re.sub(
        r"\[0*(\d+)\] (\S{5}) +\d+\.(\d+): ",
        lambda m: f"  {m[1]}{m[2]}  {int(m[3])}us : ",
        line,
    )


def as_reported(line: str) -> str:
    """As `trace-cmd report` prints it: nanoseconds, the event's name padded."""
    if line.startswith("#"):
        return "cpus=2\n" if "entries-in" in line else ""
    return re.sub(r"\.(\d{6}): (\w+):", r".\g<1>123: \2:      ", without_flags(line))


@pytest.mark.parametrize(
    "change",
    [without_flags, with_tgid, latency_format, as_reported],
    ids=lambda change: change.__name__,
)
def test_every_format_says_the_same(change: Any) -> None:
    lines = text_of("gcc")
    changed = [new for line in lines if (new := change(line))]
    assert changed != lines
    assert found(changed) == found(lines)
    assert ftrace.read_lines(changed, "trace").ncpus == 2


def test_compressed_as_gzip(tmp_path: Path) -> None:
    path = tmp_path / "gcc.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(text_of("gcc"))
    assert ftrace.read(path).lines == EXPECTED["gcc"]["lines"]


def test_the_printed_time_decides_nothing() -> None:
    """Lines of one microsecond may have any order; that of the file is the true one."""
    lines = text_of("pingpong")
    frozen = [re.sub(r"\d+\.\d{6}: ", "1.000000: ", line) for line in lines]
    before, after = found(lines), found(frozen)
    for key in ("rung", "coalesced", "elided", "run", "unseen", "entries_matched"):
        assert before[key] == after[key]


def event(cpu: int, at: int, text: str, task: str = "a-1") -> str:
    return f" {task} [{cpu:03}] d..1. 1.{at:06}: {text}\n"


def queue(cpu: int, at: int, to: int, csd: int, func: str = "f") -> str:
    return event(cpu, at, f"csd_queue_cpu: cpu={to} callsite=x func={func} csd={csd:x}")


def ring(cpu: int, at: int, to: int) -> str:
    call = "generic_smp_call_function_single_interrupt+0x0/0x10"
    return event(cpu, at, f"ipi_send_cpu: cpu={to} callsite=x callback={call}")


def run(cpu: int, at: int, *csds: int, func: str = "f") -> list[str]:
    """One interrupt that runs these."""
    lines = [event(cpu, at, "call_function_single_entry: vector=251")]
    for csd in csds:
        lines += [
            event(cpu, at, f"csd_function_entry: func={func}, csd={csd:x}"),
            event(cpu, at + 1, f"csd_function_exit: func={func}, csd={csd:x}"),
        ]
    return [*lines, event(cpu, at + 1, "call_function_single_exit: vector=251")]


def test_a_csd_that_is_queued_again_has_run() -> None:
    told = found(
        [queue(0, 1, 1, 10), queue(0, 9, 1, 10), ring(0, 9, 1), *run(1, 12, 10)]
    )
    assert (told["elided"], told["rung"], told["unseen"]) == (1, 1, 1)
    assert told["queue_to_function_us"]["max"] == 3


def test_what_an_interrupt_leaves_behind_ran_unseen() -> None:
    lines = [queue(0, 1, 1, 10), queue(0, 2, 1, 11), ring(0, 2, 1), *run(1, 5, 11)]
    told = found([*lines, queue(0, 7, 1, 12), ring(0, 7, 1), *run(1, 9, 12)])
    assert (told["run"], told["unseen"]) == (2, 1)


def test_an_interrupt_between_a_queueing_and_its_ipi() -> None:
    """It queues and rings itself, and takes nothing of the task's."""
    lines = [
        queue(0, 1, 1, 10),
        event(0, 2, "reschedule_entry: vector=253"),
        queue(0, 3, 1, 11),
        event(0, 4, "reschedule_exit: vector=253"),
        ring(0, 5, 1),
        *run(1, 8, 10, 11),
    ]
    told = found(lines)
    assert (told["rung"], told["coalesced"], told["run"]) == (1, 1, 2)


def test_one_wake_up_stands_for_its_list() -> None:
    ttwu = "sched_ttwu_pending"
    lines = [
        *(queue(0, 1, 1, 10, ttwu), ring(0, 2, 1)),
        *(queue(0, 3, 1, 11, ttwu), queue(0, 4, 1, 12)),
        *run(1, 9, 10, func=ttwu),
    ]
    told = found(lines)
    assert (told["largest_batch"], told["run"], told["unseen"]) == (2, 2, 1)
    assert told["queue_to_function_us"]["sum"] == 8 + 6


def test_a_mask_rings_all_in_it() -> None:
    lines = [
        *(queue(0, 1, 1, 10), queue(0, 1, 2, 11), queue(0, 1, 35, 12)),
        event(
            0,
            2,
            "ipi_send_cpumask: cpumask=00000008,00000002 callsite=x"
            " callback=generic_smp_call_function_single_interrupt+0x0/0x10",
        ),
        event(1, 5, "call_function_entry: vector=252"),
        event(1, 5, "csd_function_entry: func=f, csd=a"),
        event(1, 6, "csd_function_exit: func=f, csd=a"),
        event(1, 6, "call_function_exit: vector=252"),
    ]
    told = found(lines)
    assert (told["rung"], told["elided"]) == (2, 1)
    assert told["ipi"]["call_function"]["sent"] == 2
    assert told["ipi"]["call_function"]["send_to_entry_us"]["max"] == 3


def test_two_interrupts_of_a_vector_are_under_way_at_most() -> None:
    """One in service and one pending: the third is one with that."""
    sends = [
        event(0, n, "ipi_send_cpu: cpu=1 callsite=x callback=0x0") for n in (1, 2, 3)
    ]
    entries = [event(1, n, "reschedule_entry: vector=253") for n in (11, 22, 33)]
    counts = found([*sends, *entries])["ipi"]["reschedule"]
    assert counts["sent"] == counts["entered"] == 3
    assert counts["entries_without_send"] == 1
    assert counts["send_to_entry_us"]["sum"] == 10 + 20


def test_entries_of_arm64() -> None:
    lines = [
        *(queue(0, 1, 1, 10), ring(0, 2, 1)),
        event(1, 5, "ipi_entry: (Function call interrupts)"),
        event(1, 5, "csd_function_entry: func=f, csd=a"),
        event(1, 6, "csd_function_exit: func=f, csd=a"),
        event(1, 6, "ipi_exit: (Function call interrupts)"),
        event(0, 7, "ipi_send_cpu: cpu=1 callsite=x callback=0x0"),
        event(1, 9, "ipi_entry: (Rescheduling interrupts)"),
        event(1, 9, "ipi_exit: (Rescheduling interrupts)"),
    ]
    told = found(lines)
    assert told["rung"] == told["run"] == 1
    assert told["ipi"]["call_function"]["send_to_entry_us"]["max"] == 3
    assert told["ipi"]["reschedule"]["send_to_entry_us"]["max"] == 2


# ---- what a trace lacks --------------------------------------------------------------


def warned(lines: list[str]) -> str:
    return "\n".join(ftrace.read_lines(lines, "trace").warnings)


def test_what_a_trace_lacks_is_said() -> None:
    whole = text_of("gcc")
    assert not warned(whole)
    assert "the file was cut" in warned(whole[:1000])
    overwritten = [line.replace("2171/2171", "2171/5000") for line in whole]
    assert "2829 of 5000 events were overwritten" in warned(overwritten)
    assert "12 events were lost" in warned([*whole, "CPU:1 [LOST 12 EVENTS]\n"])
    assert "7 events were lost" in warned([*whole, "CPU:0 [7 EVENTS DROPPED]\n"])


def test_a_kind_of_event_that_ends_before_the_trace_is_said() -> None:
    told = ftrace.read(DATA / "python_import.ftrace.xz").warnings
    assert [warning.split()[0] for warning in told] == [
        "call_function_single_exit",
        "csd_function_exit",
        "ipi_send_cpu",
    ]
    assert "ends at line 7745" in told[1]
    assert "is there 42 times" in told[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"root:x:0:0:root:/root:/bin/bash\n",
            "1: this is no line of a kernel's trace",
        ),
        (b"\xff\xfe\x00", "is no text"),
        (b"", "there is no event in it"),
        (b"# tracer: nop\n\n", "there is no event in it"),
        (lzma.compress(b"# tracer: nop\n" * 999)[:40], "ended before"),
        (gzip.compress(b"# tracer: nop\n" * 999)[:30], "ended before"),
    ],
    ids=["foreign", "binary", "empty", "comments", "cut-xz", "cut-gz"],
)
def test_what_is_no_trace(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert cli.main(["trace", "import", str(path)]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    with pytest.raises(TraceFormatError):
        ftrace.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "csd_queue_cpu:",
        "csd_queue_cpu: cpu=x callsite=f func=f csd=1",
        "csd_queue_cpu: cpu=0 callsite=f func=f csd=zz",
        "csd_queue_cpu: cpu=0 callsite=f csd=(____ptrval____)",
        "csd_function_entry: hello",
        "csd_function_exit: func=f",
        "ipi_send_cpu: callsite=f callback=0x0",
        f"ipi_send_cpu: cpu={'9' * 5000} callsite=f callback=0x0",
        "ipi_send_cpumask: cpumask=0,1-5 callsite=f callback=0x0",
        "ipi_send_cpumask: cpumask= callsite=f callback=0x0",
    ],
)
def test_an_event_without_what_it_must_have_is_damage(text: str) -> None:
    lines = ["\n", event(0, 1, text)]
    with pytest.raises(TraceFormatError, match=r"trace:2: \w+ has no \w+ ") as raised:
        ftrace.read_lines(lines, "trace")
    assert raised.value.line == 2


@pytest.mark.parametrize(
    "line",
    [
        f" a-1 [{'9' * 5000}] d..1. 1.000001: x:\n",
        f" a-1 [000] d..1. {'9' * 5000}.000001: x:\n",
        f" a-{'9' * 5000} [000] d..1. 1.000001: x:\n",
        f"cpus={'9' * 5000}\n",
        f"CPU:1 [LOST {'9' * 5000} EVENTS]\n",
    ],
)
def test_numbers_that_none_can_be_are_in_no_trace(line: str) -> None:
    with pytest.raises(TraceFormatError, match="trace:1: this is no line"):
        ftrace.read_lines([line], "trace")
    head = f"# entries-in-buffer/entries-written: {'9' * 5000}/1   #P:2\n"
    trace = ftrace.read_lines([head, event(0, 1, "x:")], "trace")
    assert (trace.comments, trace.in_buffer, trace.ncpus) == (1, None, 1)


def test_the_name_of_a_task_may_be_any_bytes(tmp_path: Path) -> None:
    """Fifteen bytes of it are kept: the last character may be half of one."""
    path = tmp_path / "file"
    path.write_bytes(event(0, 1, "x: y=z").replace("a-1", "\xe9-1").encode("latin-1"))
    (record,) = ftrace.read(path).records
    assert (record.task, record.pid) == ("\udce9", 1)


def test_the_first_foreign_line_is_named() -> None:
    lines = text_of("gcc")
    lines[700] = lines[700][:30] + "\n"
    with pytest.raises(TraceFormatError, match="trace:701: ") as raised:
        ftrace.read_lines(lines, "trace")
    assert raised.value.line == 701


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(DATA / "hackbench.ftrace.xz")
    assert cli.main(["trace", "import", path]) == 0
    printed = capsys.readouterr().out
    assert "108 calls queued: 98 with an IPI, 10 behind another (coalesced)" in printed
    assert cli.main(["trace", "import", path, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "shmipi.trace-import/1"
    assert told["kernel"]["rung"] == 98
    assert told["events"] == EXPECTED["hackbench"]["events"]
    assert cli.main(["trace", "import", "/nonexistent"]) == 2
    assert cli.main(["trace"]) == 2
