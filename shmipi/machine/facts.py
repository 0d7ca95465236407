"""What this computer is: the facts that a measurement is worthless without.

Every fact comes from /proc, /sys or the process itself, and every one of them may be
missing (containers hide most): then it is ``None`` or empty, never an error.
"""

from __future__ import annotations

import os
import platform
import resource
import sys as python
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from shmipi.machine import doorbells
from shmipi.machine.topology import (
    cgroup_folders,
    cgroup_quota,
    physical_cores,
    read_cores,
    usable_cores,
)

__all__ = ["Facts", "Limit", "gather", "steal_seconds", "throttled"]

#: The soft and the hard value of a resource limit; ``None`` is unlimited.
Limit = tuple[int | None, int | None]

_RLIMITS: Final = {
    "NOFILE": resource.RLIMIT_NOFILE,
    "NPROC": resource.RLIMIT_NPROC,
    "AS": resource.RLIMIT_AS,
    # The two that the resource module has on Linux only.
    "SIGPENDING": getattr(resource, "RLIMIT_SIGPENDING", 11),
    "MSGQUEUE": getattr(resource, "RLIMIT_MSGQUEUE", 12),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """One reading of this computer. Times are in the unit that the name ends in."""

    cpu_model: str
    arch: str
    #: The cores that this process may run on, as a cpulist, and how many.
    cores: str
    ncores: int
    #: Physical cores and NUMA nodes among these.
    physical_cores: int
    nodes: int
    #: True if two usable cores are hardware threads of one physical core.
    smt: bool
    kernel: str
    kernel_build: str
    #: The hypervisor's name, ``"yes"`` if only its presence is known, or ``None``.
    virtualisation: str | None
    container: str | None
    #: Time that the hypervisor took from the usable cores since boot, and its share of
    #: all their time that was not idle.
    steal_s: float | None
    steal_share: float | None
    load_1m: float | None
    #: Distinct frequency governors of the usable cores; empty without scaling.
    governors: tuple[str, ...]
    turbo: bool | None
    idle_driver: str | None
    #: The longest exit latency of an enabled idle state.
    idle_exit_us: int | None
    clocksource: str | None
    timer_slack_ns: int | None
    #: CPU flaws that the kernel works around or is open to, with its words.
    mitigations: Mapping[str, str]
    #: Cores that the kernel keeps free of other work, as cpulists.
    isolated_cores: str
    nohz_full_cores: str
    cgroup_quota_cores: float | None
    cgroup_throttled_s: float | None
    cgroup_throttled_periods: int | None
    rlimits: Mapping[str, Limit]
    #: True for root or a holder of CAP_SYS_RESOURCE: RLIMIT_NPROC does not bind it.
    privileged: bool
    user_tasks: int | None
    pids_max: int | None
    pids_current: int | None
    pid_max: int | None
    threads_max: int | None
    #: What doorbells want to know of /proc/sys, by its path there, where there is such.
    sysctls: Mapping[str, int]
    shm_size_bytes: int | None
    shm_free_bytes: int | None
    memory_available_bytes: int | None
    #: None where it works, else what the system says: pinning, pidfd_open.
    pinning_error: str | None
    pidfd_error: str | None
    python: str
    gil: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for JSON: plain dicts, lists, strings and numbers."""
        return asdict(self)


def gather(*, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Facts:
    """Read all the facts. ``sys`` and ``proc`` are for tests. Never raises OSError."""
    usable = usable_cores()
    cores = read_cores(usable, sys=sys, proc=proc)
    groups = physical_cores(cores)
    cpu = sys / "devices/system/cpu"
    steal = _cpu_times(proc, usable)
    stats = _throttling(sys, proc)
    shm = _shm()
    busy = None if steal is None else steal[0] + steal[1]
    values: dict[str, Any] = {
        "cpu_model": _cpu_model(proc),
        "arch": platform.machine(),
        "cores": _cpulist(usable),
        "ncores": len(usable),
        "physical_cores": len(groups),
        "nodes": len({core.node for core in cores}),
        "smt": any(len(group) > 1 for group in groups),
        "kernel": f"{platform.system()} {platform.release()}",
        "kernel_build": platform.version(),
        "virtualisation": _virtualisation(sys, proc),
        "container": _container(proc),
        "steal_s": None if steal is None else steal[0],
        "steal_share": None if steal is None or not busy else steal[0] / busy,
        "load_1m": _float(_read(proc / "loadavg").partition(" ")[0]),
        "governors": tuple(
            sorted(
                {_read(cpu / f"cpu{core}/cpufreq/scaling_governor") for core in usable}
                - {""}
            )
        ),
        "turbo": _turbo(cpu),
        "idle_driver": _word(cpu / "cpuidle/current_driver"),
        "idle_exit_us": _idle_exit(cpu / f"cpu{usable[0]}" / "cpuidle"),
        "clocksource": _word(
            sys / "devices/system/clocksource/clocksource0/current_clocksource"
        ),
        "timer_slack_ns": _int(_read(proc / "self/timerslack_ns")),
        "mitigations": _mitigations(cpu / "vulnerabilities"),
        "isolated_cores": _cores_text(cpu / "isolated"),
        "nohz_full_cores": _cores_text(cpu / "nohz_full"),
        "cgroup_quota_cores": cgroup_quota(sys=sys, proc=proc),
        "cgroup_throttled_s": stats[0],
        "cgroup_throttled_periods": stats[1],
        "rlimits": {name: _rlimit(number) for name, number in _RLIMITS.items()},
        "privileged": _privileged(proc),
        "user_tasks": _user_tasks(proc),
        "pids_max": _cgroup_pids("pids.max", sys, proc),
        "pids_current": _cgroup_pids("pids.current", sys, proc),
        "pid_max": _int(_read(proc / "sys/kernel/pid_max")),
        "threads_max": _int(_read(proc / "sys/kernel/threads-max")),
        "sysctls": {
            name: value
            for name in doorbells.SYSCTLS
            if (value := _int(_read(proc / "sys" / name))) is not None
        },
        "shm_size_bytes": shm[0],
        "shm_free_bytes": shm[1],
        "memory_available_bytes": _memory(proc),
        "pinning_error": _pinning(),
        "pidfd_error": _pidfd(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(python, "_is_gil_enabled", lambda: True)(),
    }
    assert values.keys() == {field.name for field in fields(Facts)}
    return Facts(**values)


def steal_seconds(
    cores: Iterable[int] | None = None, *, proc: Path = Path("/proc")
) -> float | None:
    """Return the time stolen from cores since boot in seconds, None if it is not known.

    The default are the usable cores. The difference over a measurement says whether a
    hypervisor took time from it.
    """
    times = _cpu_times(proc, usable_cores() if cores is None else list(cores))
    return None if times is None else times[0]


def _cpu_times(proc: Path, cores: list[int]) -> tuple[float, float] | None:
    """Return (stolen, busy) seconds of cores since boot."""
    wanted = {f"cpu{core}" for core in cores}
    stolen = busy = 0
    found = False
    for line in _read(proc / "stat").splitlines():
        name, *numbers = line.split()
        if name in wanted and len(numbers) >= 8 and all(map(str.isdigit, numbers)):
            # user nice system idle iowait irq softirq steal
            ticks = [int(number) for number in numbers[:8]]
            stolen += ticks[7]
            busy += sum(ticks[:3]) + ticks[5] + ticks[6]
            found = True
    hertz = os.sysconf("SC_CLK_TCK")
    return (stolen / hertz, busy / hertz) if found else None


def _cpu_model(proc: Path) -> str:
    info = _cpuinfo(proc)
    for key in ("model name", "Model", "Processor"):
        if info.get(key):
            return info[key]
    if "CPU part" in info:  # arm has numbers only
        return f"arm implementer {info.get('CPU implementer')} part {info['CPU part']}"
    return platform.processor() or platform.machine()


def _cpuinfo(proc: Path) -> dict[str, str]:
    """Return the fields of the first core in /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in _read(proc / "cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _virtualisation(sys: Path, proc: Path) -> str | None:
    vendor = _read(sys / "class/dmi/id/sys_vendor")
    product = _read(sys / "class/dmi/id/product_name")
    for text, name in (
        ("QEMU", "KVM/QEMU"),
        ("Amazon EC2", "Amazon EC2"),
        ("Google Compute Engine", "Google Compute Engine"),
        ("VMware", "VMware"),
        ("innotek", "VirtualBox"),
        ("VirtualBox", "VirtualBox"),
        ("Virtual Machine", "Hyper-V"),
        ("Xen", "Xen"),
        ("KVM", "KVM"),
    ):
        # Bare-metal instances of a cloud carry its vendor, but not the flag below.
        if text in f"{vendor} {product}" and ".metal" not in product:
            return name
    release = _read(proc / "sys/kernel/osrelease").lower()
    if "microsoft" in release or "wsl" in release:
        return "WSL"
    if kind := _read(sys / "hypervisor/type"):
        return kind
    flags = _cpuinfo(proc).get("flags", "").split()
    # Of the clocks only those of a guest name their hypervisor.
    clocks = _read(
        sys / "devices/system/clocksource/clocksource0/available_clocksource"
    )
    for clock, name in (("kvm", "KVM"), ("hyperv", "Hyper-V"), ("xen", "Xen")):
        if clock in clocks:
            return name
    return "yes" if "hypervisor" in flags else None


def _container(proc: Path) -> str | None:
    for marker, name in (
        ("/.dockerenv", "docker"),
        ("/run/.containerenv", "podman"),
        ("/run/host/container-manager", "systemd-nspawn"),
    ):
        if os.path.exists(marker):
            return name
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    # Of another process's environment root alone may know.
    for word in _read(proc / "1/environ").split("\0"):
        if word.startswith("container="):
            return word.partition("=")[2] or "yes"
    return None


def _turbo(cpu: Path) -> bool | None:
    intel = _read(cpu / "intel_pstate/no_turbo")
    if intel in ("0", "1"):
        return intel == "0"
    boost = _read(cpu / "cpufreq/boost")
    return boost == "1" if boost in ("0", "1") else None


def _idle_exit(folder: Path) -> int | None:
    latencies = [
        latency
        for state in folder.glob("state[0-9]*")
        if _read(state / "disable") != "1"
        and (latency := _int(_read(state / "latency"))) is not None
    ]
    return max(latencies, default=None)


def _mitigations(folder: Path) -> dict[str, str]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return {}
    texts = {name: _read(folder / name) for name in names}
    return {name: text for name, text in texts.items() if text not in ("", _SAFE)}


_SAFE: Final = "Not affected"


def throttled(*, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> int:
    """Return in how many periods this cgroup, or one above, had used up its quota.

    0 where that is not known. The difference over a measurement says whether it was
    held back.
    """
    return _throttling(sys, proc)[1] or 0


def _throttling(sys: Path, proc: Path) -> tuple[float | None, int | None]:
    """Return (seconds, periods) in which this cgroup or one above had to wait."""
    seconds: list[float] = []
    periods: list[int] = []
    for folder in cgroup_folders("cpu", sys=sys, proc=proc):
        for line in _read(folder / "cpu.stat").splitlines():
            key, _, number = line.partition(" ")
            if not number.isdigit():
                continue
            if key == "throttled_usec":
                seconds.append(int(number) / 1e6)
            elif key == "throttled_time":  # cgroup v1, in ns
                seconds.append(int(number) / 1e9)
            elif key == "nr_throttled":
                periods.append(int(number))
    return max(seconds, default=None), max(periods, default=None)


def _cgroup_pids(name: str, sys: Path, proc: Path) -> int | None:
    """Return pids.max (the tightest on the way up), or pids.current beside it."""
    tightest: tuple[int, Path] | None = None
    for folder in cgroup_folders("pids", sys=sys, proc=proc):
        limit = _int(_read(folder / "pids.max"))  # "max" is no limit
        if limit is not None and (tightest is None or limit < tightest[0]):
            tightest = limit, folder
    return None if tightest is None else _int(_read(tightest[1] / name))


def _rlimit(number: int) -> Limit:
    try:
        soft, hard = resource.getrlimit(number)
    except (OSError, ValueError):
        return None, None
    unlimited = resource.RLIM_INFINITY
    return (None if soft == unlimited else soft, None if hard == unlimited else hard)


def _privileged(proc: Path) -> bool:
    if os.getuid() == 0:
        return True
    for line in _read(proc / "self/status").splitlines():
        if line.startswith("CapEff:"):
            with suppress(ValueError):
                return bool(int(line.split()[1], 16) & (1 << 24))  # CAP_SYS_RESOURCE
    return False


def _user_tasks(proc: Path) -> int | None:
    """Count the processes and threads of this user: what RLIMIT_NPROC counts."""
    total = 0
    try:
        entries = list(os.scandir(proc))
    except OSError:
        return None
    for entry in entries:
        if entry.name.isdigit():
            with suppress(OSError):  # it ended in between
                if entry.stat().st_uid == os.getuid():
                    total += len(os.listdir(os.path.join(entry.path, "task")))
    return total


def _shm() -> tuple[int | None, int | None]:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None, None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _memory(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            kib = _int(line.split()[1])
            return None if kib is None else kib * 1024
    return None


def _pinning() -> str | None:
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except OSError as error:
        return error.strerror
    return None


def _pidfd() -> str | None:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return error.strerror
    return None


def _cpulist(cores: Iterable[int]) -> str:
    from shmipi.cpumask import CpuMask

    return str(CpuMask(cores))


def _cores_text(path: Path) -> str:
    text = _read(path)
    return "" if text == "(null)" else text  # what an empty nohz_full reads as


def _word(path: Path) -> str | None:
    return _read(path) or None


def _int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read(path: Path) -> str:
    """Return a file's text without its newline; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
