"""The cores of this computer, and which of them the CPUs of a machine get."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shmipi.cpumask import CpuMask, MaskLike

__all__ = [
    "Core",
    "auto_idle",
    "cgroup_quota",
    "default_ncpus",
    "oversubscribed",
    "physical_cores",
    "place",
    "read_cores",
    "usable_cores",
]

_SYS = Path("/sys")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Core:
    """One hardware thread: what Linux calls a CPU, and shmipi, whose CPUs are
    processes, calls a core.

    ``core_id`` is unique within a package only. ``siblings`` are the hardware threads
    of the same physical core, this one included.
    """

    number: int
    package: int
    core_id: int
    node: int
    siblings: CpuMask


def usable_cores() -> list[int]:
    """Return the cores that this process may run on, in ascending order.

    That is its affinity: what taskset, a cpuset or a container leaves of the computer.
    """
    return sorted(os.sched_getaffinity(0))


def default_ncpus() -> int:
    """Return how many CPUs a machine has by default: the usable cores, at least 2."""
    return max(2, len(usable_cores()))


def read_cores(
    numbers: Iterable[int] | None = None, *, sys: Path = _SYS, proc: Path = _PROC
) -> list[Core]:
    """Describe cores (default: the usable ones) from sysfs, else from /proc/cpuinfo.

    Where neither tells (a container may hide both) each core counts as a physical core
    of its own in package 0, node 0. ``sys`` and ``proc`` are for tests.
    """
    nodes = _nodes(sys)
    cpuinfo: dict[int, dict[str, int]] | None = None
    cores = []
    for number in sorted(set(usable_cores() if numbers is None else numbers)):
        folder = sys / "devices/system/cpu" / f"cpu{number}" / "topology"
        package = _read_int(folder / "physical_package_id")
        core_id = _read_int(folder / "core_id")
        # `thread_siblings_list` is the older name of `core_cpus_list`.
        siblings = _read_mask(folder / "core_cpus_list") or _read_mask(
            folder / "thread_siblings_list"
        )
        if core_id is None:
            cpuinfo = _cpuinfo(proc) if cpuinfo is None else cpuinfo
            known = cpuinfo.get(number, {})
            core_id, package = known.get("core id"), known.get("physical id")
            if core_id is not None:
                place = (core_id, package)
                siblings = CpuMask(
                    other
                    for other, fields in cpuinfo.items()
                    if (fields.get("core id"), fields.get("physical id")) == place
                )
        if number not in siblings:
            siblings = CpuMask([number])
        cores.append(
            Core(
                number=number,
                # Virtual machines and some arm boards say -1 for "not known".
                package=max(package or 0, 0),
                core_id=number if core_id is None else core_id,
                node=nodes.get(number, 0),
                siblings=siblings,
            )
        )
    return cores


def physical_cores(cores: Iterable[Core]) -> list[list[int]]:
    """Group cores that are hardware threads of one physical core.

    The groups are in the order of their node, package and first core, and hold only
    cores of ``cores``.
    """
    groups: dict[int, list[Core]] = {}
    for core in cores:
        groups.setdefault(core.siblings.first or 0, []).append(core)
    ordered = sorted(
        groups.values(),
        key=lambda group: min((core.node, core.package, core.number) for core in group),
    )
    return [sorted(core.number for core in group) for group in ordered]


def place(
    ncpus: int,
    cores: MaskLike | str = "auto",
    *,
    topology: Sequence[Core] | None = None,
) -> list[int]:
    """Return the core of each CPU 0 to ``ncpus`` - 1.

    With ``"auto"`` CPUs go to distinct physical cores first, then to their other
    hardware threads, then round the same way again. A list (or cpulist) is used in
    turn, in its own order, and may name a core twice. ``topology`` describes the usable
    cores (default: those of this process).

    Raises ``ValueError`` naming a core that cannot be used, or for an empty list.
    """
    if ncpus < 1:
        raise ValueError(f"a machine has at least 1 CPU, not {ncpus}")
    if topology is None:
        topology = read_cores() if isinstance(cores, str) and cores == "auto" else ()
        usable = CpuMask(usable_cores())
    else:
        usable = CpuMask(core.number for core in topology)
    order = _spread(topology) if isinstance(cores, str) and cores == "auto" else []
    if not order:
        order = _given(cores, usable)
    return [order[cpu % len(order)] for cpu in range(ncpus)]


def _spread(topology: Sequence[Core]) -> list[int]:
    """Order cores: the first thread of each physical core, then each second one..."""
    groups = physical_cores(topology)
    depth = max(map(len, groups), default=0)
    return [group[i] for i in range(depth) for group in groups if i < len(group)]


def _given(cores: MaskLike | str, usable: CpuMask) -> list[int]:
    if not isinstance(cores, str | CpuMask | Iterable):
        raise ValueError(
            f"cores is 'auto' or a list of core numbers such as [0, 1], not {cores!r}"
        )
    parts: Iterable[MaskLike]
    # Each part is parsed alone: a mask would lose order and repetition.
    parts = cores.split(",") if isinstance(cores, str) else [[core] for core in cores]
    try:
        order = [core for part in parts for core in CpuMask(part)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cores is 'auto' or a list of core numbers such as [0, 1]: {error}"
        ) from None
    if not order:
        raise ValueError("the list of cores is empty: name at least one, or say 'auto'")
    for core in order:
        if core not in usable:
            raise ValueError(
                f"core {core} cannot be used: this process may run on cores {usable}"
                " (see taskset -p $$); choose from these, or say 'auto'"
            )
    return order


def oversubscribed(
    placement: Sequence[int],
    *,
    host_needs_one: bool = True,
    usable: MaskLike | None = None,
) -> bool:
    """Return True if two CPUs share a core, or no usable core is left for the host."""
    taken = CpuMask(placement)
    if taken.weight < len(placement):
        return True
    free = CpuMask(usable_cores() if usable is None else usable) - taken
    return host_needs_one and not free


def auto_idle(
    placement: Sequence[int],
    *,
    usable: MaskLike | None = None,
    quota: float | None = None,
) -> str:
    """Return the idle policy that ``"auto"`` means: ``"poll"`` or ``"haltpoll"``.

    CPUs poll only if each has a core to itself and one is left for the host, and if the
    cgroup's quota (default: this process's own) pays for all of them: a quota that is
    spun away stops everybody for the rest of its period.
    """
    if oversubscribed(placement, usable=usable):
        return "haltpoll"
    cores = cgroup_quota() if quota is None else quota
    return "haltpoll" if cores is not None and cores < len(placement) + 1 else "poll"


def cgroup_quota(*, sys: Path = _SYS, proc: Path = _PROC) -> float | None:
    """Return the CPU bandwidth limit of this process's cgroup in cores, or None.

    The smallest of the limits on the way up to the root counts; a container sees only
    those within its own view.
    """
    limits = []
    for folder in cgroup_folders("cpu", sys=sys, proc=proc):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2:
            quota, period = words
        else:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def cgroup_folders(
    controller: str, *, sys: Path = _SYS, proc: Path = _PROC
) -> list[Path]:
    """Return the directories of this process's cgroup for a controller, leaf first.

    For cgroup v2 these are the same for all controllers. Empty where there are none.
    """
    folders = []
    for line in _read(proc / "self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if hierarchy == "0" and not names:
            mounts = [sys / "fs/cgroup", sys / "fs/cgroup/unified"]
        elif controller in names.split(","):
            mounts = [sys / "fs/cgroup" / names, sys / "fs/cgroup" / controller]
        else:
            continue
        # Without a cgroup namespace a container sees the outer path of a directory
        # that is mounted at its own root: then only the root exists.
        inner = Path(path.lstrip("/"))
        for mount in mounts:
            steps = [mount / inner, *(mount / up for up in inner.parents)]
            found = [step for step in steps if ".." not in step.parts and step.is_dir()]
            if found:
                folders += found
                break
    return list(dict.fromkeys(folders))


def _nodes(sys: Path) -> dict[int, int]:
    nodes = {}
    for folder in (sys / "devices/system/node").glob("node[0-9]*"):
        for core in _read_mask(folder / "cpulist"):
            nodes[core] = int(folder.name.removeprefix("node"))
    return nodes


def numa_distance(core: int, other: int, *, sys: Path = _SYS) -> int:
    """Return how far two cores are from each other: 10 on a node, as ACPI's SLIT."""
    own, its = _numa(sys)
    a, b = own.get(core, 0), own.get(other, 0)
    row = its.get(a, [])
    return row[b] if b < len(row) else 10 if a == b else 20


@functools.cache
def _numa(sys: Path) -> tuple[dict[int, int], dict[int, list[int]]]:
    nodes = _nodes(sys)
    return nodes, {
        node: [
            int(distance)
            for distance in _read(
                sys / "devices/system/node" / f"node{node}/distance"
            ).split()
        ]
        for node in set(nodes.values())
    }


def _cpuinfo(proc: Path) -> dict[int, dict[str, int]]:
    """Return the integer fields of /proc/cpuinfo by core number."""
    found: dict[int, dict[str, int]] = {}
    fields: dict[str, int] = {}
    for line in _read(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "processor" and value.strip().isdigit():
            fields = found.setdefault(int(value), {})
        elif value.strip().isdigit():
            fields[key.strip()] = int(value)
    return found


def _read(path: Path) -> str:
    """Return a file's text without its newline; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:
        return None


def _read_mask(path: Path) -> CpuMask:
    try:
        return CpuMask(_read(path))
    except ValueError:
        return CpuMask()
