"""``shmipi explain``: the functions that one call passes, and the time between them."""

from __future__ import annotations

import argparse
import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shmipi.cli.options import (
    add_json_option,
    core_list,
    document,
    human_stream,
    write_json,
)
from shmipi.errors import CommandError, RemoteCallError, ShmipiError
from shmipi.names import CONTROLLERS, DOORBELLS
from shmipi.report.table import columns_of, folded

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.machine.held import Held, Look
    from shmipi.trace.chains import Explained, Step

HELP = """\
Boots a small machine, makes one real call in it and prints the functions that it passed
on the CPU that sent it and on the CPU that received it, in order, under the names they
have in the kernel of the controller's architecture. A line is printed for a tracepoint
that was recorded, and never for one that was not: what was elided or coalesced is named
as not passed. The time of a stage is that since the line before, on one clock for all
CPUs, and holds the cost of its record. A time with a * was taken while other work held
the core of one of the two CPUs: make the call again."""
EXAMPLE = """\
shmipi explain --controller apic
shmipi explain --controller xive --state polling
shmipi explain --controller riscv --coalesce
shmipi explain --controller mips --call resched --json -"""

_CALLS: Final = ("single", "many", "resched", "nmi")
_STATES: Final = ("polling", "halted", "running")
_HANDLERS: Final = ("native", "python")

_SENDER: Final = 0
_WARM_UP: Final = 5  # calls before the one that is shown
_GAP_NS: Final = 100_000  # before each, so that a target is in its state for a while
_SETTLE_S: Final = 0.005  # what the targets do after the call has returned,
_PATIENCE_S: Final = 5.0  # or longer, where they share their cores with other work
_SPIN_NS: Final = 10**9
_MASKED_S: Final = 0.002
#: A shared array, and what its words say.
_FLAGS: Final = "explain.flags"
_STOP, _MASKED, _CALLING = range(3)


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--controller",
        choices=CONTROLLERS,
        default="apic",
        help="the interrupt controller (default: apic)",
    )
    parser.add_argument(
        "--call",
        choices=_CALLS,
        default="single",
        help="smp_call_function_single, smp_call_function_many to two CPUs,"
        " resched_cpu, or smp_send_nmi_ipi (default: single)",
    )
    parser.add_argument(
        "--state",
        choices=_STATES,
        default="halted",
        help="what the target does when it is called (default: halted)",
    )
    parser.add_argument(
        "--coalesce",
        action="store_true",
        help="queue another call first, to a target that runs with interrupts off",
    )
    parser.add_argument(
        "--handler",
        choices=_HANDLERS,
        help="what runs on the target: a C or a Python function (default: native)",
    )
    parser.add_argument(
        "--doorbell",
        choices=DOORBELLS,
        default="futex",
        help="what wakes a halted CPU (default: futex)",
    )
    parser.add_argument(
        "--cores",
        type=core_list,
        default="auto",
        metavar="LIST",
        help="cores for the CPUs, used in turn, the sender's first (default: auto)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Make the call, print what it passed."""
    if args.call == "resched" and args.handler is not None:
        raise CommandError(
            "--handler is for calls that run one: a reschedule is only a nudge",
            status=2,
        )
    if args.coalesce and args.call != "single":
        raise CommandError(
            f"--coalesce is for --call single: a {args.call} call goes on no queue that"
            " another could be on alone",
            status=2,
        )
    if args.coalesce:
        args.state = "running"
    with _boot(args) as cluster:
        try:
            records, lost = _record(cluster, args)
            explained = _explain(cluster, args, records)
        except RemoteCallError as error:
            raise CommandError(
                f"the call from CPU {error.cpu} failed: {error.remote_repr}"
            ) from None
        about = _about(cluster, args)
    if args.json != "-":
        _print(about, explained, lost, args)
    write_json(args.json, document("explain", **about, **_as_json(explained, lost)))
    return 0


# ---- the machine and the call --------------------------------------------------------


def _targets(args: argparse.Namespace) -> list[int]:
    return [1, 2] if args.call == "many" else [1]


def _boot(args: argparse.Namespace) -> Cluster:
    from shmipi.cluster import Cluster

    try:
        return Cluster(
            1 + len(_targets(args)),
            idle="poll" if args.state == "polling" else "halt",
            controller=args.controller,
            doorbell=args.doorbell,
            cores=args.cores,
            trace=True,
        )
    except ShmipiError:
        raise
    except ValueError as error:
        raise CommandError(str(error), status=2) from None


def _record(cluster: Cluster, args: argparse.Namespace) -> tuple[Any, dict[int, Held]]:
    """Make the call; return the records of its time, and whose core was held in it."""
    targets = _targets(args)
    task = _run_masked if args.coalesce else _run_python
    with _tasks(cluster, task, targets if args.state == "running" else []):
        start, returned, settled, lost = cluster.run(
            _behind_another if args.coalesce else _call,
            args.call,
            targets,
            args.state,
            args.handler,
            cpus=[_SENDER],
        )[0]
    records = cluster.trace_events()
    # The sender's until the call has returned; the targets' until they were done.
    own = (records["slot"] == _SENDER) & (records["stamp"] <= returned)
    theirs = (records["slot"] != _SENDER) & (records["slot"] < cluster.ncpus)
    mine = (own | theirs) & (records["stamp"] >= start) & (records["stamp"] <= settled)
    return records[mine], lost


def _explain(cluster: Cluster, args: argparse.Namespace, records: Any) -> Explained:
    from shmipi.trace.chains import read

    return read(
        records,
        controller=cluster.controller,
        call=args.call,
        sender=_SENDER,
        lines={
            line.number: (line.name, line.use)
            for line in cluster.chip.lines(cluster.ncpus)
        },
        ncpus=cluster.ncpus,
        doorbell=args.doorbell,
    )


@contextlib.contextmanager
def _tasks(
    cluster: Cluster, task: Callable[[], None], cpus: list[int]
) -> Iterator[None]:
    """Let CPUs run a task meanwhile."""
    flags = cluster.shared(_FLAGS, "i8", 3)
    machine = cluster._machine
    calls = [(cpu, machine.post(cpu, task, (), None, True)) for cpu in cpus]
    try:
        yield
    finally:
        flags[_STOP] = 1
        for cpu, call in calls:
            machine.collect(call, cpu, 10.0)


# On the CPUs.


def _run_python() -> None:
    """Run bytecode until told to end."""
    from shmipi import shared

    flags = shared(_FLAGS)
    while not flags[_STOP]:
        for _ in range(200):
            pass


def _run_masked() -> None:
    """Keep interrupts off until the sender says that it calls, and a little longer."""
    from shmipi import shared, smp

    flags = shared(_FLAGS)
    while not flags[_STOP]:
        smp.local_irq_disable()
        flags[_MASKED] = 1
        while not flags[_CALLING] and not flags[_STOP]:
            pass
        end = time.monotonic() + _MASKED_S
        while time.monotonic() < end:
            pass
        flags[_MASKED] = flags[_CALLING] = 0
        smp.local_irq_enable()


def _cores(cpus: list[int]) -> dict[int, tuple[int, int]]:
    """Return process and core of the sender and of ``cpus``."""
    from shmipi import _core

    machine = _core.current_machine()
    slots = {cpu: machine.slot(cpu) for cpu in (_SENDER, *cpus)}
    return {cpu: (slot.pid, slot.core) for cpu, slot in slots.items()}


def _look(cores: dict[int, tuple[int, int]]) -> dict[int, Look]:
    """Look at what was counted for each; the sender last: it is the one that looks."""
    from shmipi.machine.held import look

    return {cpu: look(*cores[cpu]) for cpu in reversed(cores)}


def _lost(before: dict[int, Look], after: dict[int, Look]) -> dict[int, Held]:
    """Return the CPUs whose core other work held between two looks, and how."""
    from shmipi.machine.held import held

    found = {cpu: held(look, after[cpu]) for cpu, look in before.items()}
    return {cpu: how for cpu, how in sorted(found.items()) if how is not None}


def _call(
    kind: str, cpus: list[int], state: str, handler: str | None
) -> tuple[int, int, int, dict[int, Held]]:
    """Make the calls; return the times around the last, and when targets were done.

    And the CPUs that lost their cores between the look before it and the one after.
    """
    from shmipi import _core, smp

    wanted = {
        "polling": _core.POLLING,
        "halted": _core.HALTED,
        "running": _core.RUNNING,
    }[state]
    function = _function(handler)
    make: dict[str, Any] = {
        "single": lambda: smp.smp_call_function_single(cpus[0], function),
        "many": lambda: _call_many(cpus, function),
        "resched": lambda: smp.resched_cpu(cpus[0]),
        "nmi": lambda: smp.smp_send_nmi_ipi(cpus[0], function),
    }
    call = make[kind]
    machine = _core.current_machine()
    mine, *theirs = (machine.slot(cpu).core for cpu in (_SENDER, *cpus))
    # As the kernel's caller it spins until its csd is unlocked, and does not sleep; but
    # not on the core that a target needs.
    _core.bench_spin(None if mine in theirs else _SPIN_NS)
    start = returned = 0
    cores = _cores(cpus)
    before = after = _look(cores)
    try:
        for _ in range(_WARM_UP + 1):
            before = _look(cores)
            for cpu in (*cpus, *cpus):  # once more: the first may have changed since
                _core.bench_await(cpu, wanted, _GAP_NS)
            start = _core.stamp()
            call()
            returned = _core.stamp()
            after = _look(cores)
            time.sleep(_SETTLE_S)
    finally:
        _core.bench_spin(None)
    _settle(cpus, start, _last_record(kind, state))
    return start, returned, _core.stamp(), _lost(before, after)


def _call_many(cpus: list[int], function: Any) -> None:
    from shmipi import smp

    smp.preempt_disable()
    smp.smp_call_function_many(cpus, function)
    smp.preempt_enable()


def _last_record(kind: str, state: str) -> str:
    """The tracepoint by which a target shows that it is done with a call."""
    if state == "halted":
        return "cpu_halt"
    if kind == "nmi":
        return "nmi_exit"
    if state == "running":
        return "irq_exit"
    return "resched_idle" if kind == "resched" else "csd_unlock"


def _settle(cpus: list[int], start: int, event: str) -> None:
    """Wait until each of ``cpus`` has recorded ``event``: it may have lost its core."""
    from shmipi import _core
    from shmipi.trace import events

    number = _core.TRACE_EVENTS.index(event)
    deadline = time.monotonic() + _PATIENCE_S
    missing = set(cpus)
    while missing and time.monotonic() < deadline:
        records = events.read(_core.current_machine())
        found = (records["stamp"] >= start) & (records["event"] == number)
        missing -= {int(cpu) for cpu in records["slot"][found]}
        time.sleep(_SETTLE_S)


def _behind_another(
    kind: str, cpus: list[int], state: str, handler: str | None
) -> tuple[int, int, int, dict[int, Held]]:
    """The same, each call behind one that the target has not taken yet."""
    from shmipi import _core, shared, smp

    del kind, state
    flags, function = shared(_FLAGS), _function(handler)
    start = returned = 0
    cores = _cores(cpus)
    before = after = _look(cores)
    for _ in range(_WARM_UP + 1):
        before = _look(cores)
        while not flags[_MASKED] or flags[_CALLING]:
            pass
        smp.smp_call_function_single(cpus[0], function, None, False)
        time.sleep(_GAP_NS / 1e9)  # the kick it was sent is none of what is shown
        flags[_CALLING] = 1
        start = _core.stamp()
        smp.smp_call_function_single(cpus[0], function)
        returned = _core.stamp()
        after = _look(cores)
    _settle(cpus, start, "ipi_exit")
    return start, returned, _core.stamp(), _lost(before, after)


def _function(handler: str | None) -> Any:
    from shmipi import smp

    return _nothing if handler == "python" else smp.NativeHandler("noop")


def _nothing(info: object) -> None:
    """Do nothing: what is looked at is the way here."""


# ---- the result ----------------------------------------------------------------------


def _about(cluster: Cluster, args: argparse.Namespace) -> dict[str, Any]:
    from shmipi import _core
    from shmipi.trace.chains import CALLS

    targets = _targets(args)
    return {
        "controller": cluster.controller,
        "description": cluster.chip.description,
        "call": args.call,
        "function": CALLS[args.call],
        "state": args.state,
        "behind_another": args.coalesce,
        "handler": None if args.call == "resched" else args.handler or "native",
        "doorbell": args.doorbell,
        "clock": _core.clock_source(),
        "sender": _SENDER,
        "targets": targets,
        "cpus": [
            {"cpu": cpu.id, "pid": cpu.pid, "core": cpu.core} for cpu in cluster.cpus
        ],
    }


def _marked(steps: Sequence[Step], lost: Mapping[int, Held]) -> list[bool]:
    """Say of which steps the time was taken while other work may have held the core.

    Those of a CPU that lost its core, and those that follow one of its: what it did
    next may have had to wait. But none that took too short for anybody to come and go.
    """
    from shmipi.machine.held import SWITCHES_NS

    before = [None, *(step.cpu for step in steps)]
    return [
        step.stage_ns >= SWITCHES_NS and (step.cpu in lost or last in lost)
        for step, last in zip(steps, before, strict=False)
    ]


def _as_json(explained: Explained, lost: Mapping[int, Held]) -> dict[str, Any]:
    marked = _marked(explained.steps, lost)
    return {
        "held": {
            str(cpu): {
                "preempted": how.preempted,
                "waited_ns": how.waited_ns,
                "stolen_s": how.stolen_s,
            }
            for cpu, how in lost.items()
        },
        "steps": [
            {
                "at_ns": step.at_ns,
                "stage_ns": step.stage_ns,
                "held": mark,
                "cpu": step.cpu,
                "about_cpu": step.target,
                "side": "sends" if step.cpu == _SENDER else "receives",
                "tracepoint": step.event,
                "functions": step.functions,
                "calls": [call.strip() for call in step.calls],
                "here": step.note,
            }
            for step, mark in zip(explained.steps, marked, strict=True)
        ],
        "spared": {str(cpu): why for cpu, why in explained.spared.items()},
        "not_passed": explained.not_passed,
        "words": explained.words,
    }


def _print(
    about: dict[str, Any],
    explained: Explained,
    lost: Mapping[int, Held],
    args: argparse.Namespace,
) -> None:
    stream = human_stream(args)
    targets = " and ".join(f"CPU {cpu}" for cpu in about["targets"])
    handler = f", {about['handler']} handler" if about["handler"] else ""
    width = columns_of(stream)
    for line in (
        f"{about['function']}() from CPU {_SENDER} to {targets}, {about['state']}"
        f"{handler}{', behind another call' if args.coalesce else ''}",
        f"controller {about['controller']}: {about['description']}",
        "; ".join(
            f"CPU {cpu['cpu']} is process {cpu['pid']} on core {cpu['core']}"
            for cpu in about["cpus"]
        ),
    ):
        print(folded(line, width), file=stream)
    print(file=stream)
    rows = [("at", "stage", "CPU", "function in the kernel", "here")]
    marked = _marked(explained.steps, lost)
    for step, mark in zip(explained.steps, marked, strict=True):
        rows += _rows(step, mark)
    for line in _table(rows, width):
        print(line, file=stream)
    print(file=stream)
    notes = [f"* CPU {cpu} {how.why}: other work held it" for cpu, how in lost.items()]
    if lost and not any(marked):
        notes.append("no stage was long enough for that: the times are the call's own")
    for words in (*notes, *explained.words):
        shown = textwrap.fill(words, min(width or 88, 88), break_on_hyphens=False)
        print(shown, file=stream)


def _table(rows: list[tuple[str, str, str, str, str]], width: int | None) -> list[str]:
    """Lines of at most ``width``: where one is too short, what is here goes below."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    heads = [
        f"{at:>{widths[0]}}  {stage:>{widths[1]}}  {cpu:{widths[2]}}  "
        for at, stage, cpu, _, _ in rows
    ]
    lines = [
        f"{head}{row[3]:{widths[3]}}  {row[4]}".rstrip()
        for head, row in zip(heads, rows, strict=True)
    ]
    if width is None or max(map(len, lines)) <= width:
        return lines
    lines = []
    for head, (*_, function, here) in zip(heads, rows, strict=True):
        margin = " " * min(len(head), width // 2)
        parts = [part for part in (function, here) if part] or [""]
        for number, part in enumerate(parts):
            begin = margin + "    " if number else head
            end = margin + "    "
            lines += textwrap.wrap(
                part,
                width,
                initial_indent=begin,
                subsequent_indent=end,
                break_on_hyphens=False,
            ) or [begin.rstrip()]
    return lines


def _rows(step: Step, mark: bool) -> list[tuple[str, str, str, str, str]]:
    """The lines of a step: one for each function, what happened beside the last."""
    cpu = f"{step.cpu} ->" if step.cpu == _SENDER else f"  -> {step.cpu}"
    calls = step.calls or ("",)
    last = len(calls) - 1
    return [
        (
            "" if number else _time(step.at_ns),
            "" if number else f"+{_time(step.stage_ns)}{'*' if mark else ''}",
            cpu,
            call,
            step.note if number == last else "",
        )
        for number, call in enumerate(calls)
    ]


def _time(ns: int) -> str:
    return f"{ns} ns" if ns < 100_000 else f"{ns / 1000:.0f} us"
