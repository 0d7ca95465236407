"""``shmipi demo``: what a machine is and does, in a few seconds."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from shmipi.cli.console import count_of
from shmipi.cli.options import add_machine_options, boot, load_controller
from shmipi.errors import CommandError, RemoteCallError

if TYPE_CHECKING:
    from shmipi.bench.runner import Progress
    from shmipi.cluster import Cluster
    from shmipi.stress.report import Report

HELP = """\
Boots a machine, makes each kind of call and says what travelled for it, tortures the
machine for three seconds, measures its latencies beside the limits of this computer,
and ends with a verdict. Takes about 15 seconds. Exit status 1 when a call was lost."""
EXAMPLE = """\
shmipi demo
shmipi demo --cpus 4 --idle halt"""

_STRESS_S: Final = 3.0
_CALLS: Final = 300  # of each row of the latencies, in so many blocks
_BLOCKS: Final = 5
#: What a line of the demo shows of the counters, in words for one and for several.
_TRAVELLED: Final = {
    "csd_queued": ("csd", "csds"),
    "doorbells_sent": ("doorbell", "doorbells"),
    "kicks_sent": ("kick signal", "kick signals"),
    "elided": ("not rung: polling", "not rung: polling"),
    "coalesced": ("not rung: queue not empty", "not rung: queue not empty"),
    "resched_sent": ("reschedule interrupt", "reschedule interrupts"),
    "resched_elided": ("reschedule without interrupt",) * 2,
    "calls_self": ("run inline", "run inline"),
}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Show it all; return 1 when the stress run found an error."""
    from shmipi.bench.runner import Progress

    progress = Progress("demo")
    start = time.perf_counter()
    with boot(args) as cluster:
        _machine(cluster, time.perf_counter() - start)
        _calls(cluster)
        try:
            report = _stress(cluster, progress)
        finally:
            progress.clear()
        start = time.perf_counter()
    print(f"  machine shut down in {(time.perf_counter() - start) * 1e3:.0f} ms")
    try:
        latency = _latency(args, progress)
    finally:
        progress.clear()
    print(f"\n{_verdict(report, latency)}")
    return 0 if report.verdict == "SUCCESS" else 1


# ---- the machine ---------------------------------------------------------------------


def _machine(cluster: Cluster, seconds: float) -> None:
    cores = sorted({cpu.core for cpu in cluster.cpus})
    print(
        f"machine {cluster.name}: {count_of(cluster.ncpus, 'CPU')} on"
        f" {count_of(len(cores), 'core')}, idle={cluster.idle},"
        f" doorbell={cluster.doorbell}, controller={cluster.controller},"
        f" up in {seconds * 1e3:.0f} ms"
    )
    for cpu in cluster.cpus[:8]:
        print(f"  CPU {cpu.id}: process {cpu.pid} on core {cpu.core}, {cpu.state}")
    if cluster.ncpus > 8:
        print(f"  and {cluster.ncpus - 8} more")


# ---- the calls -----------------------------------------------------------------------


class _Lines:
    """Prints a line for each call: what was done, what came of it, what travelled."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def _counts(self) -> dict[str, int]:
        host, cpus = self._cluster.host_counters(), self._cluster.counters()
        return {name: host[name] + int(cpus[name].sum()) for name in _TRAVELLED}

    @contextmanager
    def line(self, what: str) -> Iterator[Callable[[str], None]]:
        """Give a function that takes what came of it; print when the block ends."""
        before, came = self._counts(), ["done"]
        yield lambda text: came.append(text)
        after = self._counts()
        travelled = [
            f"{number} {one if number == 1 else several}"
            for name, (one, several) in _TRAVELLED.items()
            if (number := after[name] - before[name])
        ]
        print(f"  {what:<41} {came[-1]:<36} {', '.join(travelled)}", flush=True)


def _calls(cluster: Cluster) -> None:
    from shmipi import NativeHandler

    print(
        "\ncalls: what was called, what came of it, what travelled for it"
        "\n(a doorbell wakes the CPU, if it is halted, and one the caller, if it is)"
    )
    lines, last = _Lines(cluster), cluster.ncpus - 1
    smp, everyone = cluster.smp, cluster.online_mask
    counts = cluster.percpu("demo_counts", "u8")
    mine = counts[last : last + 1]
    count = NativeHandler("count")

    with lines.line(f"call({last}, os.getpid)") as came:
        came(f"pid {cluster.call(last, os.getpid)}")
    factor = 6
    with lines.line(f"call({last}, lambda x: x * factor, 7)") as came:
        came(f"{cluster.call(last, lambda x: x * factor, 7)}: a closure")
    with lines.line(f"call({last}, int, 'seven')") as came:
        came(_error_of(cluster, last))
    with lines.line("submit(cpu, sum, range(1000)) to all") as came:
        futures = [cluster.submit(cpu, sum, range(1000)) for cpu in everyone]
        came(f"{sum(future.result() for future in futures)} of {len(futures)} futures")
    with lines.line("run(whoami): a task on every CPU") as came:
        came(f"they are CPUs {_cpulist(cluster.run(_whoami))}")
    with lines.line(f"smp_call_function_single({last}, count)") as came:
        smp.smp_call_function_single(last, count, mine)
        came("a handler in C ran once")
    with lines.line("on_each_cpu(count, wait=True)") as came:
        smp.on_each_cpu(_count_here, None, True)
        came(f"ran on {int((counts > 0).sum())} of {cluster.ncpus} CPUs")
    with lines.line("smp_call_function_single_async(csd)") as came:
        csd = smp.CallSingleData(count, mine)
        smp.smp_call_function_single_async(last, csd)
        while csd.locked:
            time.sleep(0)
        came("the caller's own csd, free again")
    with lines.line("256 calls to one CPU, wait=False") as came:
        before = int(mine[0])
        for _ in range(256):
            smp.smp_call_function_single(last, count, mine, False)
        # A waiting call would be no barrier: the queue is drained waiting ones first.
        deadline = time.monotonic() + 5.0
        while int(mine[0]) - before < 256 and time.monotonic() < deadline:
            time.sleep(0.0001)
        came(f"{int(mine[0]) - before} ran")
    with lines.line(f"smp_send_reschedule({last})") as came:
        smp.smp_send_reschedule(last)
        came("look again, CPU")
    if last > 0:
        with lines.line(f"CPU 0 calls CPU {last}, then itself") as came:
            came(f"answers {cluster.run(_call_around, last, cpus=[0])[0]}")
    _call_running(cluster, lines, last)
    _kill(cluster, lines, last)


def _cpulist(cpus: list[int]) -> str:
    from shmipi import CpuMask

    return str(CpuMask(cpus))


def _error_of(cluster: Cluster, cpu: int) -> str:
    try:
        cluster.call(cpu, int, "seven")
    except RemoteCallError as error:
        return f"{type(error.__cause__).__name__} came back as the cause"
    return "no error?"


def _call_running(cluster: Cluster, lines: _Lines, cpu: int) -> None:
    """A task sleeps in a system call; the kick runs the handler on top of it."""
    task = cluster.start(time.sleep, 60, cpus=[cpu])
    try:
        while cluster.cpus[cpu].state != "running" and not task.done():
            time.sleep(0.001)
        with lines.line(f"call({cpu}, ...) while it sleeps in a task") as came:
            start = time.perf_counter()
            cluster.call(cpu, _nothing)
            came(f"answered after {(time.perf_counter() - start) * 1e6:.0f} us")
    finally:
        task.cancel()
    task.wait()


def _kill(cluster: Cluster, lines: _Lines, cpu: int) -> None:
    from shmipi import CpuOfflineError

    victim = cluster.cpus[cpu]
    with lines.line(f"kill -9 {victim.pid}, which is CPU {cpu}") as came:
        os.kill(victim.pid, signal.SIGKILL)
        while cluster.cpus[cpu].state != "dead":
            time.sleep(0.001)
        try:
            cluster.call(cpu, _nothing)
        except CpuOfflineError as error:
            came(f"calls to it raise {type(error).__name__}")
    with lines.line(f"online({cpu})") as came:
        cluster.online(cpu)
        came(f"back as pid {cluster.call(cpu, os.getpid)}")


# On the CPUs.


def _nothing() -> None:
    """Do nothing: what is looked at is the way here."""


def _whoami() -> int:
    from shmipi import smp

    return smp.smp_processor_id()


def _count_here(info: object) -> None:
    from shmipi import atomic, percpu, smp

    atomic.fetch_add(percpu("demo_counts"), smp.smp_processor_id(), 1)


def _call_around(other: int) -> list[int]:
    from shmipi import smp

    answers: list[int] = []
    smp.smp_call_function_single(other, _nothing_of)
    smp.smp_call_function_single(
        smp.smp_processor_id(), lambda info: answers.append(smp.smp_processor_id())
    )
    return [other, *answers]


def _nothing_of(info: object) -> None:
    """Do nothing, as a handler of the smp_call_function family."""


# ---- stress --------------------------------------------------------------------------


def _stress(cluster: Cluster, progress: Progress) -> Report:
    """Torture the machine; say what came of it."""
    from shmipi import stress

    print(
        f"\nstress: for {_STRESS_S:.0f} s every CPU makes calls of all kinds at random",
        flush=True,
    )
    report = stress.run(
        stress.Options(duration=_STRESS_S),
        cluster=cluster,
        progress=lambda done: progress(f"stress, {done:.0f} of {_STRESS_S:.0f} s"),
    )
    progress.clear()
    if report.interrupted:  # it ends in order by itself; so does the rest, here
        raise KeyboardInterrupt
    kinds = ", ".join(
        f"{name} {number}" for name, number in report.by_primitive.items()
    )
    print(
        f"  {report.calls} calls, {report.calls_per_s:,.0f} a second: {kinds}\n"
        f"  lost {report.lost}, duplicated {report.duplicated}, errors {report.errors}"
    )
    for line in report.explain():
        print(f"  {line}")
    return report


# ---- latency -------------------------------------------------------------------------


def _latency(args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Measure a few rows of `shmipi bench latency`, print them beside their limits.

    Returns the rows; none where this computer has no two cores for it.
    """
    from shmipi.bench import latency
    from shmipi.report.bench import table

    cores = args.cores if len(set(args.cores)) > 1 else "auto"
    options = latency.Options(
        calls=_CALLS,
        blocks=_BLOCKS,
        doorbells=tuple(dict.fromkeys(("none", args.doorbell, "signal"))),
        cores=cores,
        controller=load_controller(args.controller),
    )
    print(
        f"\nlatency of a call, there and back: medians of {_CALLS} calls between two"
        " cores,\nbeside the same round trip in C with nothing of shmipi in between",
        flush=True,
    )
    try:
        result = latency.run(options, progress)
    except CommandError as error:
        progress.clear()
        print(f"  not measured: {error}")
        return []
    except RemoteCallError as error:
        progress.clear()
        print(f"  not measured: on CPU {error.cpu}: {error.remote_repr}")
        return []
    progress.clear()
    print()
    cells = []
    for row in result["rows"]:
        limit = result["limits"][row["limit"]]
        beside = limit.get("batch_ns", limit.get("p50"))
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f} x"
        cells.append(
            [
                _target(row),
                row["handler"],
                _us(_typical(row)),
                row["limit"],
                "-" if beside is None else _us(beside),
                ratio,
                "" if row["valid"] else "disturbed",
            ]
        )
    header = [
        "the target is",
        "handler",
        "round trip",
        "limit",
        "its time",
        "ratio",
        "",
    ]
    table(header, cells, sys.stdout)
    disturbed = sum(not row["valid"] for row in result["rows"])
    if disturbed:
        print(
            f"{disturbed} of {len(cells)} rows were disturbed by other work on this"
            " computer: `shmipi bench latency`\nsays how, `shmipi doctor` what to do"
        )
    return list(result["rows"])


def _target(row: dict[str, Any]) -> str:
    """Return what a row's target does, and how it is rung."""
    if row["target_state"] == "polling":
        return "polling, not rung"
    parked = ", caller sleeps too" if row["sender_wait"] == "park" else ""
    return f"{row['target_state']}, {row['doorbell']}{parked}"


def _typical(row: dict[str, Any]) -> float:
    typical: float = row.get("batch_ns", row["rtt_ns"]["p50"])
    return typical


def _us(ns: float) -> str:
    return f"{ns / 1e3:.2f} us"


def _verdict(report: Report, rows: list[dict[str, Any]]) -> str:
    """Return the last line: did it work, and what a call costs here."""
    account = (
        f"{report.calls} calls, none lost, none twice"
        if report.verdict == "SUCCESS"
        else f"{report.lost} calls lost, {report.duplicated} twice,"
        f" {report.errors} other errors"
    )
    costs = []
    for state in ("polling", "halted", "running"):
        for row in rows:
            if row["target_state"] == state and row["handler"] == "native":
                costs.append(f"{_us(_typical(row))} to a {state} CPU")
                break
    cost = f"; a call costs {', '.join(costs)}" if costs else ""
    return f"{report.verdict}: {account}{cost}"
