"""What distorts measurements on this computer, what limits size, and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, TextIO

from shmipi.machine import doorbells
from shmipi.machine.facts import Facts
from shmipi.machine.limits import limit_text

__all__ = [
    "Finding",
    "examine",
    "findings_json",
    "render",
    "summary",
    "with_effects",
]

Level = Literal["ok", "note", "warning"]

_MIB: Final = 1 << 20
_NOTHING: Final = "nothing to do"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    ``level`` is ``"ok"``, ``"note"`` (know it when you read the figures) or
    ``"warning"`` (until it is changed figures are wrong, or the machine does not boot).
    """

    name: str
    level: Level
    value: str
    why: str
    advice: str
    #: How large its effect was measured to be here; None: it was not measured.
    effect: str | None = None


def examine(facts: Facts, ncpus: int) -> list[Finding]:
    """Judge the facts for measurements, and for a machine of ``ncpus`` CPUs."""
    found: list[Finding] = []
    for check in _CHECKS:
        found += check(facts, ncpus)
    return found


def with_effects(
    findings: Sequence[Finding], effects: Mapping[str, str]
) -> list[Finding]:
    """Return the findings with what was measured of them, by their names."""
    return [replace(finding, effect=effects.get(finding.name)) for finding in findings]


def summary(findings: Sequence[Finding], ncpus: int) -> str:
    """Return the verdict in one line."""
    warnings = sum(finding.level == "warning" for finding in findings)
    notes = sum(finding.level == "note" for finding in findings)
    if not warnings:
        return f"nothing stands against a machine of {ncpus} CPUs here ({notes} notes)"
    return f"{warnings} to change, {notes} to know (judged for {ncpus} CPUs)"


def findings_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return the findings as JSON objects, keys as the fields of ``Finding``.

    One without a measured effect has no ``effect``.
    """
    return [
        {key: value for key, value in asdict(finding).items() if value is not None}
        for finding in findings
    ]


def render(findings: Sequence[Finding], ncpus: int, stream: TextIO) -> None:
    """Print the findings: a table on a terminal, plain text elsewhere."""
    if stream.isatty():
        _render_table(findings, stream)
    else:
        _render_text(findings, stream)
    print(f"\n{summary(findings, ncpus)}", file=stream)


def _render_table(findings: Sequence[Finding], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "yellow", "warning": "bold red"}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "what", "here", "why it matters, what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        about = Text(finding.why, style="dim")
        if finding.level != "ok":
            about = Text.assemble((finding.why, "dim"), "\n", finding.advice)
        if finding.effect is not None:
            about.append(f"\nmeasured: {finding.effect}")
        # Text and not str: values such as "[always]" are not markup.
        style = styles[finding.level]
        table.add_row(
            Text(finding.level, style), Text(finding.name), Text(finding.value), about
        )
    Console(file=stream).print(table)


def _render_text(findings: Sequence[Finding], stream: TextIO) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(
            f"{finding.level:7}  {finding.name:{width}}  {finding.value}", file=stream
        )
        texts = [] if finding.level == "ok" else [finding.why, finding.advice]
        if finding.effect is not None:
            texts.append(f"measured: {finding.effect}")
        for text in texts:
            lines = textwrap.wrap(text, 88 - width - 11, break_on_hyphens=False)
            for line in lines:
                print(" " * (width + 11) + line, file=stream)


# --- what distorts measurements


def _cores(facts: Facts, ncpus: int) -> Iterator[Finding]:
    value = f"{facts.ncores} usable ({facts.cores}) on {facts.cpu_model}"
    if facts.ncores == 1:
        yield Finding(
            "cores",
            "warning",
            value,
            "sender and target share one core: every call is also a context switch,"
            " and polling cannot work",
            "run on two or more cores (taskset, --cpus of docker); until then read"
            " latencies as scheduling latencies",
        )
        return
    yield Finding(
        "cores",
        "note" if facts.ncores == 2 else "ok",
        value,
        "a machine whose CPUs and host each have a core polls; others share and halt",
        "two CPUs are measured well, but the host shares a core with one of them:"
        " a third core would be its own"
        if facts.ncores == 2
        else _NOTHING,
    )


def _smt(facts: Facts, ncpus: int) -> Iterator[Finding]:
    value = (
        f"{facts.physical_cores} physical cores" if facts.physical_cores > 1 else "one"
    )
    shared = facts.physical_cores < 2 <= facts.ncores
    yield Finding(
        "SMT",
        "warning" if shared else "note" if facts.smt else "ok",
        f"on, {value}" if facts.smt else "no shared cores",
        "two hardware threads of one core share its caches: a call between them is"
        " faster than between cores, and a spinning one slows the other",
        "all usable cores are threads of one physical core: name others with taskset"
        if shared
        else "CPUs go to distinct physical cores first; compare results only for"
        " equal --cores"
        if facts.smt
        else _NOTHING,
    )


def _nodes(facts: Facts, ncpus: int) -> Iterator[Finding]:
    if facts.nodes > 1:
        yield Finding(
            "NUMA",
            "note",
            f"{facts.nodes} nodes",
            "a cache line costs several times more between nodes than within one",
            "for a latency that can be compared keep --cores A,B within one node",
        )


def _load(facts: Facts, ncpus: int) -> Iterator[Finding]:
    if facts.load_1m is None:
        return
    busy = facts.load_1m > 0.5 * facts.ncores
    yield Finding(
        "load",
        "warning" if busy else "ok",
        f"{facts.load_1m:.2f} over the last minute",
        "what else runs takes the cores away in the middle of a call",
        "stop other work, or wait until it has ended" if busy else _NOTHING,
    )


def _virtual(facts: Facts, ncpus: int) -> Iterator[Finding]:
    if facts.virtualisation is None:
        yield Finding(
            "virtualisation",
            "ok",
            "none seen",
            "in a guest, to wake a halted core takes an exit to the hypervisor",
            _NOTHING,
        )
    else:
        yield Finding(
            "virtualisation",
            "note",
            facts.virtualisation,
            "to wake a halted core, and to signal another one, takes an exit to the"
            " hypervisor: tens of microseconds where bare metal takes a few",
            "polling rows are like bare metal; quote others only with the limits"
            " measured beside them",
        )


def _steal(facts: Facts, ncpus: int) -> Iterator[Finding]:
    if facts.steal_share is None or facts.steal_s is None:
        return
    share = facts.steal_share
    level: Level = "warning" if share > 0.02 else "note" if share > 0.001 else "ok"
    yield Finding(
        "steal",
        level,
        f"{facts.steal_s:.2f} s since boot, {share:.2%} of busy time",
        "the hypervisor ran somebody else on these cores: calls then take milliseconds",
        "use a host that is not oversold or dedicated vCPUs; bench marks blocks with"
        " stolen time as not valid"
        if level != "ok"
        else _NOTHING,
    )


def _frequency(facts: Facts, ncpus: int) -> Iterator[Finding]:
    value = ", ".join(facts.governors) or "no frequency scaling seen"
    slow = bool(facts.governors) and facts.governors != ("performance",)
    yield Finding(
        "governor",
        "warning" if slow else "ok",
        value,
        "a governor that follows the load makes the first calls after a pause slow",
        "cpupower frequency-set -g performance" if slow else _NOTHING,
    )
    if facts.turbo is not None:
        yield Finding(
            "turbo",
            "note" if facts.turbo else "ok",
            "on" if facts.turbo else "off",
            "the clock depends on how many cores are busy and how warm they are",
            "for figures that repeat: echo 1 > /sys/devices/system/cpu/intel_pstate/"
            "no_turbo, or echo 0 > /sys/devices/system/cpu/cpufreq/boost"
            if facts.turbo
            else _NOTHING,
        )


def _idle(facts: Facts, ncpus: int) -> Iterator[Finding]:
    if facts.idle_exit_us is None:
        return
    deep = facts.idle_exit_us > 10
    yield Finding(
        "idle states",
        "note" if deep else "ok",
        f"{facts.idle_driver or 'cpuidle'}, exit in up to {facts.idle_exit_us} us",
        "a halted core wakes more slowly the longer it slept",
        "compare at equal --gap only, or hold /dev/cpu_dma_latency open with 0 in it"
        if deep
        else _NOTHING,
    )


def _clock(facts: Facts, ncpus: int) -> Iterator[Finding]:
    if facts.clocksource is not None:
        good = facts.clocksource in ("tsc", "kvm-clock", "arch_sys_counter")
        good = good or "hyperv" in facts.clocksource
        yield Finding(
            "clocksource",
            "ok" if good else "warning",
            facts.clocksource,
            "a clock that is read by a system call or from a device takes up to a"
            " microsecond a stamp",
            _NOTHING
            if good
            else "see dmesg for why tsc was given up; boot with tsc=reliable if it is"
            " known to be good",
        )
    if facts.timer_slack_ns is not None:
        coarse = facts.timer_slack_ns > 1_000_000
        yield Finding(
            "timer slack",
            "warning" if coarse else "ok",
            f"{facts.timer_slack_ns / 1000:g} us",
            "every timed sleep may end this much late; wake-ups by a doorbell do not",
            "something set it (a service manager, a battery saver): start from a plain"
            " shell"
            if coarse
            else _NOTHING,
        )


def _flaws(facts: Facts, ncpus: int) -> Iterator[Finding]:
    count = len(facts.mitigations)
    yield Finding(
        "mitigations",
        "note" if count else "ok",
        ", ".join(facts.mitigations) if count else "none",
        "they make each entry into the kernel slower, and so each wake-up and signal,"
        " but not a call to a polling CPU",
        "compare machines with equal ones (shmipi doctor --json has the kernel's words)"
        if count
        else _NOTHING,
    )


def _isolation(facts: Facts, ncpus: int) -> Iterator[Finding]:
    isolated = facts.isolated_cores
    yield Finding(
        "isolated cores",
        "ok" if isolated else "note",
        isolated or "none",
        "other processes and the timer tick of a core are the tail of every histogram",
        f"measure on them: --cores {isolated} (taskset -c first if they are not usable)"
        if isolated
        else "for p99.9 and above boot with isolcpus=domain,managed_irq,LIST"
        " nohz_full=LIST and give --cores LIST",
    )


def _quota(facts: Facts, ncpus: int) -> Iterator[Finding]:
    quota = facts.cgroup_quota_cores
    if quota is None:
        yield Finding(
            "cgroup quota",
            "ok",
            "none",
            "a used-up quota stops every process until the next period",
            _NOTHING,
        )
    else:
        small = quota < facts.ncores
        yield Finding(
            "cgroup quota",
            "warning" if small else "ok",
            f"{quota:g} cores for {facts.ncores} cores",
            "a used-up quota stops every process until the next period: calls then"
            " take up to 100 ms",
            "remove it, or give whole cores by cpuset instead (docker: --cpuset-cpus"
            " for --cpus)"
            if small
            else _NOTHING,
        )
    throttled = facts.cgroup_throttled_s
    if throttled:
        yield Finding(
            "throttling",
            "warning",
            f"{throttled:.1f} s in {facts.cgroup_throttled_periods or 0} periods",
            "this cgroup did use up its quota; what was measured then is not worth"
            " keeping",
            "raise or remove the quota (cpu.max)",
        )


# --- what limits size


def _files(facts: Facts, ncpus: int) -> Iterator[Finding]:
    # A pidfd of each CPU and, with some, a doorbell of each; and the rest.
    bells = [bell.name for bell in doorbells.BY_NAME.values() if bell.is_descriptor]
    yield _rlimit_finding(
        facts,
        "NOFILE",
        need=2 * ncpus + 64,
        per_cpu=2,
        why="the firmware holds a pidfd of each CPU, and with the"
        f" {', '.join(bells[:-1])} and {bells[-1]} doorbells every process holds a"
        " descriptor of each CPU",
        flag="n",
    )


def _signals(facts: Facts, ncpus: int) -> Iterator[Finding]:
    # A timer of each CPU; and a kick, an NMI and a halt signal, one of each at most.
    yield _rlimit_finding(
        facts,
        "SIGPENDING",
        need=4 * ncpus + 16,
        per_cpu=4,
        why="a kick is a queued real-time signal, at most one of each class for a CPU,"
        " and each has a timer; the limit counts those of all your processes",
        flag="i",
    )


def _rlimit_finding(
    facts: Facts, name: str, *, need: int, per_cpu: int, why: str, flag: str
) -> Finding:
    soft, hard = facts.rlimits.get(name, (None, None))
    enough_soft = soft is None or soft >= need
    enough_hard = hard is None or hard >= need
    advice = _NOTHING
    level: Level = "ok"
    if not enough_hard:
        level = "warning"
        advice = (
            f"raise it to {need} as root: /etc/security/limits.conf, LimitXXX= of the"
            " service, or --ulimit of docker"
        )
    elif not enough_soft:
        level = "note"
        advice = f"ulimit -{flag} {need} before you start a machine that large"
    return Finding(f"RLIMIT_{name}", level, limit_text((soft, hard)), why, advice)


def _doorbells(facts: Facts, ncpus: int) -> Iterator[Finding]:
    limits = doorbells.Limits(facts.rlimits, facts.sysctls)
    for bell in doorbells.BY_NAME.values():
        for need in bell.needs(limits, ncpus):
            yield Finding(
                need.name,
                "note" if need.advice else "ok",
                need.value,
                need.why,
                need.advice or _NOTHING,
            )


def _processes(facts: Facts, ncpus: int) -> Iterator[Finding]:
    need = ncpus + 2  # and the firmware, and whoever runs beside it
    soft, hard = facts.rlimits.get("NPROC", (None, None))
    used = facts.user_tasks or 0
    small = soft is not None and soft - used < need and not facts.privileged
    yield Finding(
        "RLIMIT_NPROC",
        "warning" if small else "ok",
        limit_text((soft, hard))
        + (
            ", not for this user"
            if facts.privileged and soft is not None
            else f", {used} in use"
            if soft is not None
            else ""
        ),
        "each CPU is a process; the limit counts all processes and threads of a user",
        f"ulimit -u {used + need}" if small else _NOTHING,
    )
    for name, limit, used_now, advice in (
        (
            "pids.max",
            facts.pids_max,
            facts.pids_current,
            "raise the cgroup's limit: --pids-limit of docker, TasksMax= of systemd",
        ),
        ("kernel.pid_max", facts.pid_max, None, "sysctl kernel.pid_max=4194304"),
        (
            "kernel.threads-max",
            facts.threads_max,
            None,
            "sysctl kernel.threads-max=100000, if there is memory for them",
        ),
    ):
        if limit is None:
            continue
        small = limit - (used_now or 0) < need
        in_use = "" if used_now is None else f", {used_now} in use"
        yield Finding(
            name,
            "warning" if small else "ok",
            f"{limit}{in_use}",
            "each CPU is a process",
            advice if small else _NOTHING,
        )


#: What a machine takes of /dev/shm: header and slots at boot, and a row of call_single_
#: data for each CPU at its first call. Arguments and arrays come on top.
_SHM_FIXED: Final = 1 << 20
_SHM_PER_SLOT: Final = 2 << 10
_SHM_PER_CALLER: Final = 512 << 10
#: Address space: the places of shared arrays and arenas are reserved, hardly ever used.
_ADDRESS_SPACE: Final = 80 << 30
#: And of memory: the pages that a CPU's process does not share with the firmware.
_PRIVATE_PER_CPU: Final = 3 * _MIB // 2


def _memory(facts: Facts, ncpus: int) -> Iterator[Finding]:
    why = (
        "the machine lives in a shared-memory object there; a full one is an error at"
        " boot or at a CPU's first call"
    )
    size, free = facts.shm_size_bytes, facts.shm_free_bytes
    if size is None or free is None:
        yield Finding(
            "/dev/shm",
            "warning",
            "not there",
            why,
            "mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
        )
    else:
        boot = _SHM_FIXED + ncpus * _SHM_PER_SLOT
        need = boot + ncpus * _SHM_PER_CALLER
        level: Level = "warning" if free < boot else "note" if free < need else "ok"
        yield Finding(
            "/dev/shm",
            level,
            f"{_mib(size)}, {_mib(free)} free",
            why,
            f"make it larger ({_mib(need)} if each of {ncpus} CPUs makes calls):"
            f" mount -o remount,size={max(need // _MIB * 2, 256)}M /dev/shm, docker run"
            " --shm-size; shmipi clean removes what dead machines left"
            if level != "ok"
            else _NOTHING,
        )
    available = facts.memory_available_bytes
    if available is not None:
        need = ncpus * _PRIVATE_PER_CPU
        small = available < need
        yield Finding(
            "memory",
            "warning" if small else "ok",
            f"{_mib(available)} available",
            "a CPU's process has up to 1.5 MiB of its own",
            f"{ncpus} CPUs want {_mib(need)}: boot fewer" if small else _NOTHING,
        )


def _address_space(facts: Facts, ncpus: int) -> Iterator[Finding]:
    soft, hard = facts.rlimits.get("AS", (None, None))
    small = soft is not None and soft < _ADDRESS_SPACE
    yield Finding(
        "RLIMIT_AS",
        "warning" if small else "ok",
        limit_text((soft, hard)),
        "every process maps the whole machine, most of it room that is never used",
        "ulimit -v unlimited; limit memory by cgroup and not by address space"
        if small
        else _NOTHING,
    )


def _permissions(facts: Facts, ncpus: int) -> Iterator[Finding]:
    for name, error, why, advice in (
        (
            "pinning",
            facts.pinning_error,
            "a CPU that moves between cores is not measured, the scheduler is",
            "allow sched_setaffinity in the sandbox or its seccomp profile",
        ),
        (
            "pidfd",
            facts.pidfd_error,
            "the host and the firmware watch each other and signal through pidfds",
            "allow pidfd_open in the sandbox, or use Linux 5.4 or newer",
        ),
    ):
        yield Finding(
            name,
            "ok" if error is None else "warning",
            "allowed" if error is None else error,
            why,
            _NOTHING if error is None else advice,
        )


def _software(facts: Facts, ncpus: int) -> Iterator[Finding]:
    container = f", in {facts.container}" if facts.container else ""
    yield Finding(
        "kernel",
        "ok",
        f"{facts.kernel} {facts.arch}{container}",
        "its signal and futex paths are part of every figure but the polling ones",
        _NOTHING,
    )
    yield Finding(
        "python",
        "ok",
        facts.python + ("" if facts.gil else ", without the GIL"),
        "rows of Python handlers depend on its version",
        _NOTHING,
    )


_CHECKS: Final[tuple[Callable[[Facts, int], Iterator[Finding]], ...]] = (
    _cores,
    _smt,
    _nodes,
    _load,
    _virtual,
    _steal,
    _frequency,
    _idle,
    _clock,
    _flaws,
    _isolation,
    _quota,
    _permissions,
    _memory,
    _address_space,
    _processes,
    _files,
    _signals,
    _doorbells,
    _software,
)


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"
