"""``shmipi replay``: a real kernel's IPIs, played on a machine of as many CPUs."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shmipi.cli.options import (
    add_json_option,
    controller,
    core_list,
    document,
    human_stream,
    load_controller,
    usage_errors,
    write_json,
)
from shmipi.errors import CommandError, TraceFormatError
from shmipi.names import DOORBELLS

if TYPE_CHECKING:
    from shmipi.trace.ftrace import Ftrace
    from shmipi.trace.matching import Traffic
    from shmipi.trace.replay import Ran
    from shmipi.trace.script import Policy, Script

HELP = """\
Plays the IPIs of a trace (see shmipi trace import) on a machine of as many CPUs: each
sends what it sent there when it sent it, waits in between halted, polling or running as
it did there, and its handlers take as long. All that is reported of the replay is
measured in it, and stands beside what the kernel's trace says."""
EXAMPLE = """\
shmipi replay hackbench.ftrace.xz
shmipi replay pingpong.ftrace.xz --causal --json result.json
shmipi replay gcc.ftrace.xz --what-if batch=4"""

#: What an idle CPU does (``shmipi.trace.script.IDLE``).
IDLE: Final = ("trace", "poll", "halt", "haltpoll")
_POLICIES: Final = "lazy-resched, batch=N, isolate=CPULIST or controller=C"
#: Beside the time that a trace takes: to boot, to meet, to wait for what is slow.
_GRACE_S: Final = 60.0
#: More stolen time than this share makes a replay invalid.
_STOLEN: Final = 0.02
_LEAST_ON_TIME: Final = 0.95
#: A replay that takes longer says so before.
_LONG_S: Final = 60.0


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="the trace, also .xz or .gz")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--speed",
        type=_speed,
        default=1.0,
        metavar="X",
        help="this many times as fast; what functions take stays (default: 1)",
    )
    pace.add_argument(
        "--asap",
        action="store_true",
        help="send without waiting for the time, in each CPU's order",
    )
    pace.add_argument(
        "--causal",
        action="store_true",
        help="send as long after the interrupt or the answer before it as there,"
        " whenever that comes here",
    )
    parser.add_argument(
        "--what-if",
        type=_policy,
        metavar="POLICY",
        help=f"replay it once more otherwise, and say what that saves: {_POLICIES}",
    )
    parser.add_argument(
        "--idle",
        choices=IDLE,
        default="trace",
        help="what an idle CPU does: as the trace shows, or always the same (default:"
        " trace)",
    )
    parser.add_argument(
        "--doorbell",
        choices=DOORBELLS,
        default="futex",
        help="what wakes a halted CPU (default: futex)",
    )
    parser.add_argument(
        "--controller",
        type=controller,
        default="apic",
        metavar="C",
        help="the interrupt controller, or a class of your own as FILE.py:CLASS or"
        " MODULE:CLASS (default: apic)",
    )
    parser.add_argument(
        "--cores",
        type=core_list,
        default="auto",
        metavar="LIST",
        help="cores for the CPUs, used in turn, such as 0-3 (default: auto)",
    )
    parser.add_argument(
        "--no-fifo",
        action="store_true",
        help="no real-time priority (SCHED_FIFO) for the CPUs where it is permitted",
    )
    add_json_option(parser)


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no speed: give more than 0")
    return speed


def _policy(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if name == "lazy-resched" and not equals:
        return name, ""
    if name == "controller" and value:
        return name, controller(value)
    if name in ("batch", "isolate") and value:
        return name, value
    raise argparse.ArgumentTypeError(f"{text[:60]!r} is no policy: {_POLICIES}")


def run(args: argparse.Namespace) -> int:
    """Read, match, play, print."""
    from shmipi.report import replay as report
    from shmipi.trace import matching

    trace = _read(args.file)
    traffic = matching.match(trace)
    if not traffic.sent and not traffic.queued:
        raise CommandError(f"{args.file}: there is no IPI in it to replay")
    result = _replay(args, trace, traffic)
    if args.json != "-":
        report.render(result, human_stream(args))
    write_json(args.json, document("replay", **result))
    return 0


def _read(file: str) -> Ftrace:
    from shmipi import _core
    from shmipi.trace import ftrace

    try:
        trace = ftrace.read(file)
    except TraceFormatError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{file!r}: {error.strerror}", status=2) from None
    if trace.ncpus > _core.MAX_CPUS:
        raise CommandError(
            f"{file} is of {trace.ncpus} CPUs: a machine has {_core.MAX_CPUS} at most"
        )
    return trace


def _replay(
    args: argparse.Namespace, trace: Ftrace, traffic: Traffic
) -> dict[str, Any]:
    from shmipi.machine.facts import gather
    from shmipi.trace.script import Policy

    pace = "asap" if args.asap else "causal" if args.causal else "timed"
    script = _script(args, trace, traffic, Policy())
    policy = args.what_if and _parsed(args.what_if, trace)
    other = _script(args, trace, traffic, policy) if policy else None
    seconds = script.duration_ns / 1e9
    if pace != "asap" and seconds > _LONG_S:
        print(f"this takes {seconds:.0f} s: --speed makes it less", file=sys.stderr)
    found = _play(args, script, pace, args.controller)
    warnings = [*trace.warnings, *_throttled(found["scheduler"])]
    result = {
        "file": trace.name,
        "ncpus": trace.ncpus,
        "duration_s": script.duration_ns / 1e9,
        "pace": pace,
        "speed": args.speed,
        "idle": args.idle,
        "doorbell": args.doorbell,
        "controller": args.controller,
        "warnings": warnings,
        "waited_for": dict(sorted(script.waited.items())),
        "events": dict(sorted(trace.events.items())),
        "kernel": traffic.as_dict(),
        **found,
        "what_if": None,
        "machine": gather().as_dict(),
    }
    if other is not None:
        name, value = args.what_if
        again = _play(
            args, other, pace, value if name == "controller" else args.controller
        )
        words = "=".join(part for part in (name, value) if part)
        result["what_if"] = {
            "policy": words,
            **again,
            "saved": _saved(found, again),
            "words": _words(words, found, again),
        }
        warnings += [f"{words}: {each}" for each in _throttled(again["scheduler"])]
        result["why"] += [f"{words}: {why}" for why in again["why"]]
        result["valid"] = not result["why"]
    return result


def _script(
    args: argparse.Namespace, trace: Ftrace, traffic: Traffic, policy: Policy
) -> Script:
    from shmipi.trace import script

    with usage_errors():
        return script.write(
            trace, traffic, speed=args.speed, idle=args.idle, policy=policy
        )


def _parsed(what_if: tuple[str, str], trace: Ftrace) -> Policy:
    from shmipi.cpumask import CpuMask
    from shmipi.trace.script import Policy

    name, value = what_if
    with usage_errors():
        if name == "batch":
            if not value.isascii() or not value.isdigit():
                raise ValueError(f"batch={value[:40]}: that is no number of calls")
            return Policy(batch=int(value))
        if name == "isolate":
            cpus = frozenset(CpuMask(value))
            beyond = sorted(cpu for cpu in cpus if cpu >= trace.ncpus)
            if beyond:
                raise ValueError(f"the trace has no CPU {beyond[0]}")
            return Policy(isolate=cpus)
    return Policy(lazy_resched=name == "lazy-resched")


def _play(
    args: argparse.Namespace, script: Script, pace: str, name: str
) -> dict[str, Any]:
    """Boot a machine, play the script on it, and say what was measured."""
    from shmipi.cluster import Cluster
    from shmipi.machine.facts import steal_seconds
    from shmipi.trace import replay

    seconds = script.duration_ns / 1e9
    chip = load_controller(name)
    with usage_errors():
        cluster = Cluster(
            script.ncpus,
            idle="halt",
            doorbell=args.doorbell,
            controller=chip,
            cores=args.cores,
        )
    with cluster:
        cores = [cpu.core for cpu in cluster.cpus]
        stolen = steal_seconds(cores)
        played, ran = replay.on(
            cluster,
            script,
            pace=pace,
            fifo=not args.no_fifo,
            timeout=10 * seconds + _GRACE_S,
        )
        after = steal_seconds(cores)
        single = any(
            line.use == "call_single" for line in cluster.chip.lines(script.ncpus)
        )
    measured = replay.measured(
        script, played, "call_function_single" if single else "call_function"
    )
    found = {
        "replay": measured,
        **replay.late(played, script),
        **replay.victims(played),
        "missed": sum(played.missed),
        "cores": cores,
        "scheduler": _scheduler(ran),
    }
    taken = after - stolen if stolen is not None and after is not None else 0.0
    found["why"] = _why(found, script, played.unlogged, taken, seconds)
    found["valid"] = not found["why"]
    return found


def _scheduler(ran: list[Ran]) -> dict[str, Any]:
    """Return how CPUs were scheduled, and what keeps SCHED_FIFO from all of a core."""
    why = next((own.why for own in ran if own.why), "")
    limits: dict[str, int | None] = {}
    for name in ("rt_runtime_us", "rt_period_us"):
        try:
            limits[name] = int(Path(f"/proc/sys/kernel/sched_{name}").read_text())
        except (OSError, ValueError):
            limits[name] = None
    return {
        "policy": "SCHED_OTHER" if why else "SCHED_FIFO",
        "why": why,
        **limits,
        "busy_s": max(own.busy_s for own in ran),
        "preempted": sum(own.preempted for own in ran),
    }


def _throttled(scheduler: dict[str, Any]) -> list[str]:
    """Say so where a core may have been taken from a CPU that spun for too long."""
    most, period = scheduler["rt_runtime_us"], scheduler["rt_period_us"]
    if (
        scheduler["policy"] != "SCHED_FIFO"
        or not scheduler["preempted"]
        or None in (most, period)
        or most < 0
        or scheduler["busy_s"] * 1e6 < most
    ):
        return []
    return [
        f"a CPU was busy for {scheduler['busy_s']:.2f} s, and CPUs were stopped"
        f" {scheduler['preempted']} times for others: of each {period / 1e6:g} s the"
        f" kernel lets SCHED_FIFO have {most / 1e6:g} (sched_rt_runtime_us)"
    ]


def _why(
    found: dict[str, Any], script: Script, unlogged: int, stolen: float, seconds: float
) -> list[str]:
    why = []
    on_time = found["on_time"]
    if on_time is not None and on_time < _LEAST_ON_TIME:
        why.append(
            f"{on_time:.1%} of sends were on time, and {_LEAST_ON_TIME:.0%} should be"
        )
    if unlogged:
        why.append(f"{unlogged} interrupts more than there was room for")
    if stolen > max(0.02, _STOLEN * seconds):
        why.append(f"the hypervisor took {stolen:.2f} s of {seconds:.2f} s")
    return why


def _sent(found: dict[str, Any]) -> int:
    return sum(vector["sent"] for vector in found["replay"]["ipi"].values())


def _saved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        "ipis": _sent(before) - _sent(after),
        "victim_us": before["victim_us"] - after["victim_us"],
        "handlers_us": before["handlers_us"] - after["handlers_us"],
    }


def _words(policy: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    from shmipi.report.cells import span

    sent, still = _sent(before), _sent(after)
    was, now = before["victim_us"], after["victim_us"]
    delay = [each["replay"]["queue_to_function_us"]["p50"] for each in (before, after)]
    words = [
        f"{policy}: {sent} IPIs become {still}, {_share(sent, still)}; they take"
        f" {span(now * 1000)} of CPUs that run, not {span(was * 1000)},"
        f" {_share(was, now)}"
    ]
    if None not in delay:
        words.append(
            f"a call waits {span(delay[1] * 1000)} for its function (p50), not"
            f" {span(delay[0] * 1000)}"
        )
    return words


def _share(before: float, after: float) -> str:
    if not before:
        return "as before" if not after else "from nothing"
    share = 1 - after / before
    return f"{abs(share):.0%} {'less' if share >= 0 else 'more'}"
